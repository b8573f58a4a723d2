"""Data sets for measuring: procedural scenes, or a folder of rows with train and test splits."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import numpy as np

from flows.demo_data import write_scenes
from pipeline.config import IngestConfig
from pipeline.errors import SubmissionError
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
    found = DataSet(train=out / "train", test=out / "test")
    if found.test.is_dir():
        return found
    if source == "demo":
        write_scenes(found.train, rows=rows, seed=seed)
        write_scenes(found.test, rows=test_rows, seed=seed + _TEST_SEED)
        return found
    folder = pathlib.Path(source)
    lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    splits = np.asarray([json.loads(line).get("split") for line in lines if line.strip()])
    opened = open_submission(folder, IngestConfig())
    rng = np.random.default_rng([seed, 29])
    for name, path, wanted in (("train", found.train, rows), ("test", found.test, test_rows)):
        positions = np.flatnonzero(splits == name)
        if len(positions) < wanted:
            raise SubmissionError(f"{folder.name}: {len(positions)} rows of split {name!r}, {wanted} are needed")
        opened.write_subset(sorted(int(row) for row in rng.choice(positions, size=wanted, replace=False)), path)
    return found
