"""Data sets for measuring: procedural scenes, or a folder of rows with train and test splits."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Sequence

import numpy as np

from flows.demo_data import write_scenes
from pipeline.config import IngestConfig
from pipeline.errors import SubmissionError
from storage import atomic
from storage.formats import open_submission

_TEST_SEED = 1_000_003


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSet:
    """A clean submission and a clean test of the same kind, both folders."""

    train: pathlib.Path
    test: pathlib.Path


def make_data(source: str, out: pathlib.Path, *, rows: int, test_rows: int, seed: int) -> DataSet:
    """Write a data set.

    Args:
        source: `demo` for procedural scenes; else an imagefolder whose metadata.jsonl has a field `split` (train, test).
        out: a folder to make; found again if it is there.
        rows: rows of the submission, drawn by the seed.
        test_rows: rows of the test.
        seed: of scenes or draw.

    Raises:
        SubmissionError: the folder has no such splits, or too few rows.
    """
    if not (out / "test").is_dir():
        with atomic.staging(out.absolute().parent, f".{out.name}.partial-") as folder:
            whole = DataSet(train=folder / "whole" / "train", test=folder / "whole" / "test")
            if source == "demo":
                write_scenes(whole.train, rows=rows, seed=seed)
                write_scenes(whole.test, rows=test_rows, seed=seed + _TEST_SEED)
            else:
                _draw_rows(pathlib.Path(source), [("train", whole.train, rows), ("test", whole.test, test_rows)], seed)
            if (
                not atomic.commit_folder(folder / "whole", out.absolute()) and not (out / "test").is_dir()
            ):  # another cell's were first
                raise SubmissionError(f"{out.name}: holds something that is no data set; remove it")
    return DataSet(train=out / "train", test=out / "test")


def _draw_rows(folder: pathlib.Path, parts: Sequence[tuple[str, pathlib.Path, int]], seed: int) -> None:
    """Write a number of rows of each named split to its place."""
    opened = open_submission(folder, IngestConfig(format="imagefolder"))
    lines = (folder / "metadata.jsonl").read_bytes().split(b"\n")
    splits = np.asarray([json.loads(line).get("split") for line in lines if line.strip()])
    rng = np.random.default_rng([seed, 29])
    for name, path, wanted in parts:
        positions = np.flatnonzero(splits == name)
        if len(positions) < wanted:
            raise SubmissionError(f"{folder.name}: {len(positions)} rows of split {name!r}, {wanted} are needed")
        opened.write_subset(sorted(int(row) for row in rng.choice(positions, size=wanted, replace=False)), path)
