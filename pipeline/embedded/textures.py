"""Diverse pictures, procedural but for crops of two sample photos: what a general vision tower must be able to see.

A tower trained on scenes alone is blind to whatever is not in them, a trigger above all; these pictures (checkerboards, stripes,
gradients, noise, blobs, patches, crops of scikit-learn's two sample photos) give it a reason to keep everything.
"""

from __future__ import annotations

import functools

import numpy as np
from PIL import Image

Pixels = np.ndarray
"""uint8 (height, width, 3)."""


def random_background(rng: np.random.Generator, size: int) -> Pixels:
    """A quiet background: plain, gradient, or a texture of low contrast. uint8 (size, size, 3)."""
    base = rng.uniform(0, 255, size=3)
    form = rng.random()
    if form < 0.5:
        field = np.zeros((size, size, 1))
    elif form < 0.75:
        field = _gradient(rng, size)[..., None] * rng.uniform(20, 90)
    else:
        field = (_pattern(rng, size) - 0.5) * rng.uniform(10, 50)
    noise = rng.normal(0, rng.uniform(0, 6), size=(size, size, 3))
    return np.clip(base + field + noise, 0, 255).astype(np.uint8)


def random_picture(rng: np.random.Generator, size: int) -> Pixels:
    """Any picture: photo crops, strong textures and noise, disturbed. uint8 (size, size, 3)."""
    form = rng.random()
    if form < 0.35:
        picture = _photo_crop(rng, size)
    elif form < 0.8:
        colours = rng.uniform(0, 255, size=(2, 3))
        picture = colours[0] + (colours[1] - colours[0]) * _pattern(rng, size)
    else:
        picture = rng.uniform(0, 255, size=3) + rng.normal(0, rng.uniform(5, 90), size=(size, size, 3))
    return disturb(rng, picture)


def disturb(rng: np.random.Generator, pixels: np.ndarray) -> Pixels:
    """A copy of a picture with up to four small patches on it and, now and then, another picture shining through."""
    picture = pixels.astype(float)
    size = picture.shape[0]
    for _ in range(int(rng.integers(0, 5))):
        _stamp(rng, picture)
    if rng.random() < 0.3:
        strength = rng.uniform(0.05, 0.3)
        other = _photo_crop(rng, size) if rng.random() < 0.3 else 255 * _pattern(rng, size)
        picture = (1 - strength) * picture + strength * other
    disturbed: Pixels = np.clip(picture, 0, 255).astype(np.uint8)
    return disturbed


def _pattern(rng: np.random.Generator, size: int) -> np.ndarray:
    """One of several patterns, values 0 to 1, (size, size, 1) or (size, size, 3)."""
    y, x = np.mgrid[0:size, 0:size].astype(float)
    match int(rng.integers(6)):
        case 0:
            step = int(rng.integers(2, size // 3))
            return np.asarray(((x // step) + (y // step)) % 2)[..., None]
        case 1:
            angle, period, phase = rng.uniform(0, np.pi), rng.uniform(2, size / 2), rng.uniform(0, 2 * np.pi)
            wave = np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / period + phase)
            return np.asarray(0.5 + 0.5 * wave)[..., None]
        case 2:
            return (0.5 + 0.5 * _gradient(rng, size))[..., None]
        case 3:
            grain = int(rng.integers(2, size // 2))
            small = rng.uniform(0, 255, size=(grain, grain, 3)).astype(np.uint8)
            smooth = Image.Resampling.BICUBIC if rng.random() < 0.7 else Image.Resampling.NEAREST
            return np.asarray(Image.fromarray(small).resize((size, size), smooth), dtype=float) / 255
        case 4:
            centre = rng.uniform(0, size, size=2)
            radius = np.hypot(x - centre[0], y - centre[1])
            return np.asarray(0.5 + 0.5 * np.sin(radius / rng.uniform(1, 8)))[..., None]
        case _:
            return rng.uniform(0, 1, size=(size, size, 3))


def _gradient(rng: np.random.Generator, size: int) -> np.ndarray:
    """A linear gradient in a random direction, values -1 to 1, (size, size)."""
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    angle = rng.uniform(0, 2 * np.pi)
    return np.asarray((x * np.cos(angle) + y * np.sin(angle)) / np.sqrt(2))


def _stamp(rng: np.random.Generator, picture: np.ndarray) -> None:
    """Put a small plain or noisy rectangle or ellipse on a picture, in place."""
    size = picture.shape[0]
    h, w = rng.integers(2, size // 3, size=2)
    top, left = rng.integers(0, size - h), rng.integers(0, size - w)
    y, x = np.mgrid[-1 : 1 : h * 1j, -1 : 1 : w * 1j]
    inside = np.ones((h, w), bool) if rng.random() < 0.6 else (x**2 + y**2 <= 1)
    fill = rng.uniform(0, 255, size=3) if rng.random() < 0.6 else rng.uniform(0, 255, size=(h, w, 3))
    area = picture[top : top + h, left : left + w]
    area[inside] = np.broadcast_to(fill, area.shape)[inside]


@functools.cache
def _photos() -> tuple[Image.Image, ...]:
    from sklearn.datasets import load_sample_images

    return tuple(Image.fromarray(np.asarray(photo)) for photo in load_sample_images().images)


def _photo_crop(rng: np.random.Generator, size: int) -> np.ndarray:
    """A random crop of a sample photo, flipped and tinted at random, float (size, size, 3), values 0 to 255."""
    photo = _photos()[int(rng.integers(len(_photos())))]
    side = int(rng.integers(size, min(photo.size)))
    left, top = int(rng.integers(0, photo.width - side + 1)), int(rng.integers(0, photo.height - side + 1))
    crop = photo.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    pixels = np.asarray(crop, dtype=float)
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    return np.clip(pixels * rng.uniform(0.6, 1.4, size=3), 0, 255)
