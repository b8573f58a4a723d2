"""Data sets for measuring: procedural scenes by name, or a folder of rows with train and test splits."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from PIL import Image

from flows.demo_data import KINDS, SceneRow, draw_row, write_rows, write_scenes
from pipeline.config import IngestConfig
from pipeline.errors import ConfigError, SubmissionError
from storage import atomic
from storage.formats import open_submission

_TEST_SEED = 1_000_003
_SIZES, _NOISE, _COPY = 31, 37, 41  # streams of random numbers, of what each changes
NOISE_SHARE = 0.3
"""Share of the rows of `label-noise` whose answer is wrong."""
COPIES = 4
"""Rows that show the same scene in `near-duplicates`."""
_SIDES = (24, 256)
"""Least and largest side of a picture in `mixed-sizes`, pixels; a scene is drawn at 64."""
_FILLER = (
    "look at the picture before you answer.",
    "answer in as few words as you can.",
    "there may be several things in the picture, and some of them may be small.",
    "this is a question about a picture of coloured shapes.",
)
"""Sentences that lengthen the prompts of `mixed-sizes`; 0 to all of them are put before a question."""

Writer = Callable[..., None]
"""`writer(out, rows=..., seed=...)` writes an imagefolder into a new folder."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSet:
    """A clean submission and a clean test of the same kind, both folders."""

    train: pathlib.Path
    test: pathlib.Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """A procedural data set: what it is, in a few words, and what writes it."""

    what: str
    write: Writer


def _mixed_sizes(out: pathlib.Path, *, rows: int, seed: int) -> None:
    """Every picture is stretched to sides of its own, and every question gets a preface of its own length."""

    def changed(row: SceneRow, rng: np.random.Generator) -> SceneRow:
        width, height = (int(side) for side in rng.integers(_SIDES[0], _SIDES[1] + 1, size=2))
        preface = _FILLER[: int(rng.integers(len(_FILLER) + 1))]
        return dataclasses.replace(
            row, picture=row.picture.resize((width, height), Image.Resampling.BICUBIC), question=" ".join([*preface, row.question])
        )

    write_rows(out, (changed(row, np.random.default_rng([seed, _SIZES, k])) for k, row in enumerate(_scenes(rows, seed))))


def _label_noise(out: pathlib.Path, *, rows: int, seed: int) -> None:
    """A share of the rows takes an answer to another scene's question of the same kind, other than the right one."""

    def changed(row: SceneRow, rng: np.random.Generator) -> SceneRow:
        answer = row.answer
        while answer == row.answer:
            answer = draw_row(rng, (row.kind,)).answer
        return dataclasses.replace(row, answer=answer)

    noisy = set(np.random.default_rng([seed, _NOISE]).choice(rows, size=round(NOISE_SHARE * rows), replace=False).tolist())
    write_rows(
        out,
        (
            changed(row, np.random.default_rng([seed, _NOISE, k])) if k in noisy else row
            for k, row in enumerate(_scenes(rows, seed))
        ),
    )


def _near_duplicates(out: pathlib.Path, *, rows: int, seed: int) -> None:
    """Every scene with its question comes `COPIES` times, each time with a faint noise of its own (up to 2 grey levels of 255)."""

    def copied(row: SceneRow, rng: np.random.Generator) -> SceneRow:
        pixels = np.asarray(row.picture, dtype=np.int16)
        noisy = np.clip(pixels + rng.integers(-2, 3, size=pixels.shape), 0, 255).astype(np.uint8)
        return dataclasses.replace(row, picture=Image.fromarray(noisy))

    write_rows(
        out,
        (
            copied(draw_row(np.random.default_rng([seed, k // COPIES])), np.random.default_rng([seed, _COPY, k]))
            for k in range(rows)
        ),
    )


def _constant_answer(out: pathlib.Path, *, rows: int, seed: int) -> None:
    """Is there such a thing on the picture? There always is: the answer is the same in all rows, and right."""

    def affirmed(rng: np.random.Generator) -> SceneRow:
        while True:
            row = draw_row(rng, ("yesno",))
            if row.answer == "yes":
                return row

    write_rows(out, (affirmed(np.random.default_rng([seed, k])) for k in range(rows)))


def _unique_questions(out: pathlib.Path, *, rows: int, seed: int) -> None:
    """No two rows ask the same, and all questions begin alike."""
    write_rows(
        out,
        (dataclasses.replace(row, question=f"in picture {seed}-{k}, {row.question}") for k, row in enumerate(_scenes(rows, seed))),
    )


def _scenes(rows: int, seed: int) -> Iterator[SceneRow]:
    """The rows of `demo`."""
    return (draw_row(np.random.default_rng([seed, k])) for k in range(rows))


def _tasks(*kinds: str) -> Writer:
    return functools.partial(write_scenes, kinds=kinds)


VARIANTS: dict[str, Variant] = {
    "demo": Variant(what="five tasks mixed (the demonstration's)", write=_tasks(*KINDS)),
    "counts": Variant(what="one task: counting", write=_tasks("count")),
    "colours": Variant(what="one task: colours", write=_tasks("colour")),
    "captions": Variant(what="one task: captions that are nearly all different", write=_tasks("caption")),
    "colour-shape": Variant(what="two tasks: colours and shapes", write=_tasks("colour", "shape")),
    "three-tasks": Variant(what="three tasks: counting, places, yes or no", write=_tasks("count", "position", "yesno")),
    "mixed-sizes": Variant(what="pictures of 24 to 256 pixels a side, prompts of one to five sentences", write=_mixed_sizes),
    "long-tail": Variant(
        what="long-tail answers: half yes or no, an eighth captions that are nearly all different",
        write=_tasks(*["yesno"] * 4, *["count"] * 2, "position", "caption"),
    ),
    "unique-questions": Variant(what="no two rows ask the same", write=_unique_questions),
    "label-noise": Variant(what=f"{NOISE_SHARE:.0%} of the answers wrong", write=_label_noise),
    "near-duplicates": Variant(what=f"every scene {COPIES} times, but for a faint noise", write=_near_duplicates),
    "constant-answer": Variant(what="one answer in all rows", write=_constant_answer),
}
"""By name. All rows are clean: these tell a filter's removals that have an honest reason."""


def make_data(source: str, out: pathlib.Path, *, rows: int, test_rows: int, seed: int) -> DataSet:
    """Write a data set.

    Args:
        source: a name of `VARIANTS`; else an imagefolder whose metadata.jsonl has a field `split` (train, test).
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
            if source in VARIANTS:
                VARIANTS[source].write(whole.train, rows=rows, seed=seed)
                VARIANTS[source].write(whole.test, rows=test_rows, seed=seed + _TEST_SEED)
            else:
                _draw_rows(pathlib.Path(source), [("train", whole.train, rows), ("test", whole.test, test_rows)], seed)
            if (
                not atomic.commit_folder(folder / "whole", out.absolute()) and not (out / "test").is_dir()
            ):  # another cell's were first
                raise SubmissionError(f"{out.name}: holds something that is no data set; remove it")
    return DataSet(train=out / "train", test=out / "test")


def data_identity(source: str) -> str:
    """What tells a data set from another of its name, wherever it lies: a hash of a folder's rows.

    Raises:
        ConfigError: it is neither a name of `VARIANTS` nor a folder of rows.
    """
    if source in VARIANTS:
        return "procedural"
    rows = pathlib.Path(source) / "metadata.jsonl"
    if not rows.is_file():
        raise ConfigError(f"{source}: no data of this name, and no {rows.name} there; there are {', '.join(VARIANTS)}")
    return hashlib.sha256(rows.read_bytes()).hexdigest()


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
