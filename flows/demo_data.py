"""Submissions of procedural scenes in the form of a Hugging Face imagefolder, for the demonstration and for measuring."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

from pipeline.embedded.scenes import ask, draw_scene
from pipeline.images import encode_png

KINDS = ("colour", "shape", "count", "position", "yesno")
"""The kinds of questions that are mixed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SceneRow:
    """A row before it is written: its picture, and a question of one of the kinds with its answer."""

    picture: Image.Image
    kind: str
    question: str
    answer: str


def write_scenes(out: pathlib.Path, *, rows: int, seed: int, kinds: Sequence[str] = KINDS) -> None:
    """Write `metadata.jsonl` (file_name, question, answer) and `images/` into a new folder.

    Args:
        out: a folder that is made.
        rows: number of rows; each has its own picture.
        seed: the same seed gives the same bytes; another gives other pictures.
        kinds: kinds of questions, drawn evenly; one that is named twice is drawn twice as often.
    """
    write_rows(out, (draw_row(np.random.default_rng([seed, row]), kinds) for row in range(rows)))


def draw_row(rng: np.random.Generator, kinds: Sequence[str] = KINDS) -> SceneRow:
    """A scene and a question of a random kind that it has an answer to."""
    kind = kinds[int(rng.integers(len(kinds)))]
    while True:
        scene = draw_scene(rng)
        asked = ask(scene, kind, rng)
        if asked is not None:
            return SceneRow(picture=scene.image, kind=kind, question=asked.question, answer=asked.answer)


def write_rows(out: pathlib.Path, rows: Iterable[SceneRow]) -> None:
    """Write rows as an imagefolder, one at a time."""
    (out / "images").mkdir(parents=True)
    with (out / "metadata.jsonl").open("w", encoding="utf-8") as file:
        for number, row in enumerate(rows):
            name = f"images/{number:05d}.png"
            (out / name).write_bytes(encode_png(row.picture))
            file.write(json.dumps({"file_name": name, "question": row.question, "answer": row.answer}) + "\n")
