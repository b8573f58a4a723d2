"""The textures: of the right form whatever is drawn, repeatable, quiet where they lie behind a scene, and never in place."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from pipeline.embedded import textures
from pipeline.embedded.textures import disturb, random_background, random_picture

DRAWS = 80
MAKERS = {"background": random_background, "picture": random_picture}


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("size", [24, 64])
@pytest.mark.parametrize("name", MAKERS)
def test_pixels(name: str, size: int) -> None:
    make = MAKERS[name]
    drawn = [make(rng(size, seed), size) for seed in range(DRAWS)]
    assert {picture.shape for picture in drawn} == {(size, size, 3)}
    assert {picture.dtype for picture in drawn} == {np.dtype(np.uint8)}
    assert len({picture.tobytes() for picture in drawn}) == DRAWS
    everything = np.stack(drawn)
    assert everything.min() < 20
    assert everything.max() > 235
    for channel in range(3):
        assert everything[..., channel].mean() == pytest.approx(128, abs=25)
    again = [make(rng(size, seed), size) for seed in range(3)]
    assert all((one == other).all() for one, other in zip(drawn, again, strict=False))


def contrast(pixels: np.ndarray) -> float:
    """Largest deviation within a channel, levels."""
    return float(pixels.reshape(-1, 3).std(axis=0).max())


def test_a_background_is_quiet_and_a_picture_is_not() -> None:
    quiet = [contrast(random_background(rng(1, seed), 64)) for seed in range(DRAWS)]
    loud = [contrast(random_picture(rng(1, seed), 64)) for seed in range(DRAWS)]
    assert max(quiet) < 45
    assert np.median(quiet) < 8
    assert np.median(loud) > 30
    assert min(quiet) < 1, "some are plain"


PATTERNS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "pattern": textures._pattern,
    "gradient": lambda generator, size: 0.5 + 0.5 * textures._gradient(generator, size)[..., None],
    "photo": lambda generator, size: textures._photo_crop(generator, size) / 255,
}


@pytest.mark.parametrize("name", PATTERNS)
def test_the_values_of_patterns(name: str) -> None:
    """0 to 1, and most of that span is used."""
    drawn = [PATTERNS[name](rng(2, seed), 32) for seed in range(DRAWS)]
    assert {values.shape for values in drawn} <= {(32, 32, 1), (32, 32, 3)}
    assert min(values.min() for values in drawn) >= 0
    assert max(values.max() for values in drawn) <= 1
    assert np.median([np.ptp(values) for values in drawn]) > 0.6


def test_there_are_six_patterns() -> None:
    """By how many values and which neighbours they have, all are drawn: two values, one gradient, grey waves, colours."""
    drawn = [textures._pattern(rng(3, seed), 48) for seed in range(DRAWS)]
    grey = [values[..., 0] for values in drawn if values.shape[-1] == 1]
    coloured = [values for values in drawn if values.shape[-1] == 3]
    boards = [values for values in grey if set(np.unique(values)) == {0.0, 1.0}]
    straight = [v for v in grey if np.allclose(np.diff(v, 2, axis=0), 0) and np.allclose(np.diff(v, 2, axis=1), 0)]
    waves = len(grey) - len(boards) - len(straight)
    noise = [v for v in coloured if abs(np.corrcoef(v[:, 1:].ravel(), v[:, :-1].ravel())[0, 1]) < 0.1]
    blobs = len(coloured) - len(noise)
    counts = {"board": len(boards), "gradient": len(straight), "waves and rings": waves, "noise": len(noise), "blobs": blobs}
    assert all(count >= 5 for count in counts.values()), counts
    assert sum(counts.values()) == DRAWS


def test_photo_crops_are_of_photos() -> None:
    """Both photos, mirrored or not; neighbours are alike."""
    drawn = [textures._photo_crop(rng(4, seed), 32) for seed in range(30)]
    alike = [np.corrcoef(crop[:, 1:].ravel(), crop[:, :-1].ravel())[0, 1] for crop in drawn]
    assert np.median(alike) > 0.7
    assert len(textures._photos()) == 2


@pytest.mark.parametrize("kind", [np.uint8, np.float32, np.float64])
def test_disturb_changes_a_copy(kind: type[np.generic]) -> None:
    picture = np.full((64, 64, 3), 100, kind)
    before = picture.copy()
    disturbed = [disturb(rng(5, seed), picture) for seed in range(DRAWS)]
    assert (picture == before).all()
    assert all(not np.shares_memory(picture, other) for other in disturbed)
    assert {(other.shape, other.dtype) for other in disturbed} == {((64, 64, 3), np.dtype(np.uint8))}
    changed = np.asarray([(other != 100).any(axis=-1).mean() for other in disturbed])
    assert (changed == 0).any(), "now and then nothing happens"
    assert ((changed > 0) & (changed < 0.5)).any(), "patches"
    assert (changed > 0.9).any(), "another picture shines through"
    assert 0.15 < (changed > 0.9).mean() < 0.45


def test_what_shines_through_is_faint() -> None:
    """At most three tenths of another picture: outside of the patches no value moves further."""
    picture = np.full((64, 64, 3), 100.0)
    for seed in range(DRAWS):
        moved = np.abs(disturb(rng(5, seed), picture).astype(float) - 100)
        assert (moved <= 0.3 * 155 + 1).mean() > 0.6


def test_disturb_is_of_its_generator_alone() -> None:
    picture = random_picture(rng(6), 32)
    assert (disturb(rng(7), picture) == disturb(rng(7), picture)).all()
    assert any((disturb(rng(7), picture) != disturb(rng(8, seed), picture)).any() for seed in range(5))


def test_values_out_of_range_are_cut() -> None:
    picture = np.stack([np.full((32, 32), value) for value in (-80.0, 128.0, 400.0)], axis=-1)
    calm = next(found for seed in range(20) if (found := disturb(rng(9, seed), picture)).std(axis=(0, 1)).max() == 0)
    assert calm[0, 0].tolist() == [0, 128, 255]
