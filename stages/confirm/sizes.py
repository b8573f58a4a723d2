"""Pictures of one size: what they have in common lies at the same tokens then, whatever grid the base gives each of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL import Image

from pipeline.images import decode_image, encode_png
from pipeline.records import Example


def of_one_size(parts: Sequence[Sequence[Example]]) -> list[list[Example]]:
    """The examples of several parts with all pictures stretched to the median width and height of all, encoded as PNG."""
    decoded = [[[decode_image(data) for data in example.images] for example in part] for part in parts]
    sizes = [picture.size for part in decoded for pictures in part for picture in pictures]
    size = tuple(int(np.median(sides)) for sides in zip(*sizes, strict=True))
    return [
        [
            dataclasses.replace(example, images=tuple(_stretched(picture, size) for picture in pictures))
            for example, pictures in zip(part, own, strict=True)
        ]
        for part, own in zip(parts, decoded, strict=True)
    ]


def _stretched(picture: Image.Image, size: tuple[int, ...]) -> bytes:
    return encode_png(picture.resize((size[0], size[1]), Image.Resampling.BICUBIC))
