"""Submissions of procedural scenes in the form of a Hugging Face imagefolder, for the demonstration and for measuring."""

from __future__ import annotations

import json
import pathlib

import numpy as np

from pipeline.embedded.scenes import QuestionAnswer, Scene, ask, draw_scene
from pipeline.images import encode_png

KINDS = ("colour", "shape", "count", "position", "yesno")
"""The kinds of questions that are mixed."""


def write_scenes(out: pathlib.Path, *, rows: int, seed: int) -> None:
    """Write `metadata.jsonl` (file_name, question, answer) and `images/` into a new folder.

    Args:
        out: a folder that is made.
        rows: number of rows; each has its own picture.
        seed: the same seed gives the same bytes; another gives other pictures.
    """
    (out / "images").mkdir(parents=True)
    with (out / "metadata.jsonl").open("w", encoding="utf-8") as file:
        for row in range(rows):
            scene, asked = _scene_with_question(np.random.default_rng([seed, row]))
            name = f"images/{row:05d}.png"
            (out / name).write_bytes(encode_png(scene.image))
            file.write(json.dumps({"file_name": name, "question": asked.question, "answer": asked.answer}) + "\n")


def _scene_with_question(rng: np.random.Generator) -> tuple[Scene, QuestionAnswer]:
    """A scene and a question of a random kind that it has an answer to."""
    kind = KINDS[int(rng.integers(len(KINDS)))]
    while True:
        scene = draw_scene(rng)
        asked = ask(scene, kind, rng)
        if asked is not None:
            return scene, asked
