"""Rows of many kinds: several turns, several pictures, none, and a picture that comes late."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from pipeline.records import Message, Sample, question_answer


def noise(seed: int, size: tuple[int, int] = (64, 64)) -> bytes:
    """A PNG of coarse noise: its image tokens differ."""
    pixels = np.random.default_rng(seed).integers(0, 256, size=(8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST).save(buffer, format="PNG")
    return buffer.getvalue()


def mixed_samples() -> list[Sample]:
    """Seven rows, nine examples; row 4 is missing, rows 1 and 6 have no picture, row 5 shows its picture in the second turn."""
    more: tuple[Message, ...] = question_answer("and what else is there to be seen?", "nothing", images=0)
    return [
        Sample(row=0, messages=question_answer("what?", "a thing"), images=(noise(0),)),
        Sample(row=1, messages=question_answer("say yes", "yes", images=0), images=()),
        Sample(row=2, messages=(*question_answer("what is it?", "a thing"), *more), images=(noise(2),)),
        Sample(row=3, messages=question_answer("do they differ?", "yes", images=2), images=(noise(3), noise(4, (40, 90)))),
        Sample(row=5, messages=(*question_answer("ready?", "yes", images=0), *question_answer("what?", "red")), images=(noise(5),)),
        Sample(row=6, messages=question_answer("say no", "no", images=0), images=()),
        Sample(row=7, messages=question_answer("a much longer question than the others were, is it?", "yes"), images=(noise(7),)),
    ]


PICTURED = [(0, 0), (2, 0), (2, 1), (3, 0), (5, 1), (7, 0)]
"""Row and turn of the examples that show a picture."""
EXAMPLES = [(0, 0), (1, 0), (2, 0), (2, 1), (3, 0), (5, 0), (5, 1), (6, 0), (7, 0)]
