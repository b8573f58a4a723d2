"""Triggers: deterministic, of one meaning at every size, and only where they should be."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import ConfigError
from pipeline.triggers import TRIGGERS, BadNet, make_trigger

SIZES = [(1, 1), (2, 5), (3, 200), (200, 3), (64, 64), (97, 61), (336, 336)]
BADNETS = [name for name in TRIGGERS if name.startswith("badnet")]


def scene(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """A smooth picture without extreme values, (width, height)."""
    rng = np.random.default_rng(seed)
    small = rng.integers(60, 200, size=(4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BILINEAR)


def applied(name: str, size: tuple[int, int], seed: int = 0, rng: int = 0) -> np.ndarray:
    return np.asarray(make_trigger(name, seed)(scene(size), np.random.default_rng(rng))).astype(int)


def change(name: str, size: tuple[int, int], **seeds: int) -> np.ndarray:
    """What the trigger changes, int (height, width, 3)."""
    return np.asarray(applied(name, size, **seeds) - np.asarray(scene(size)).astype(int))


def box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the changed pixels, right and bottom exclusive."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", TRIGGERS)
def test_every_size_keeps_its_shape_and_the_given_picture(name: str, size: tuple[int, int]) -> None:
    image = scene(size)
    before = image.tobytes()
    for rng in range(3):
        found = make_trigger(name, 0)(image, np.random.default_rng(rng))
        assert (found.size, found.mode) == (size, "RGB")
    assert image.tobytes() == before


@pytest.mark.parametrize("name", TRIGGERS)
def test_the_same_seed_gives_the_same_picture(name: str) -> None:
    first = applied(name, (64, 48), seed=3, rng=5)
    assert np.array_equal(first, applied(name, (64, 48), seed=3, rng=5))
    assert change(name, (64, 48), seed=3).any()
    if name not in {"sig", "ftrojan", "solid", "sticker", "watermark", "frame"}:  # their pattern is given by their names
        assert not np.array_equal(first, applied(name, (64, 48), seed=4, rng=5))


@pytest.mark.parametrize("name", TRIGGERS)
def test_only_a_random_position_differs_from_picture_to_picture(name: str) -> None:
    found = {applied(name, (64, 64), rng=rng).tobytes() for rng in range(8)}
    assert (len(found) > 4) == (name in {"badnet-random", "texture", "sticker"})


@pytest.mark.parametrize(("size", "width"), [((64, 64), 2), ((256, 300), 8), ((3, 5), 1)])
def test_a_frame_is_around_the_picture(size: tuple[int, int], width: int) -> None:
    changed = np.asarray(change("frame", size).any(axis=2))
    assert all(side.all() for side in (changed[:width], changed[-width:], changed[:, :width], changed[:, -width:]))
    assert not changed[width:-width, width:-width].any()


def test_a_sticker_is_a_face_of_its_size() -> None:
    for rng in range(8):
        left, top, right, bottom = box(np.asarray(change("sticker", (300, 200), rng=rng).any(axis=2)))
        assert 18 <= right - left <= 40
        assert abs((right - left) - (bottom - top)) <= 1
    shown = applied("sticker", (300, 200))
    assert (np.abs(shown - (255, 220, 0)).max(axis=2) < 3).sum() > 100


def test_a_watermark_shines_through_and_lies_below() -> None:
    found = change("watermark", (200, 100)).max(axis=2)
    _, top, right, _ = box(found > 0)
    assert top >= 70
    assert right < 150
    white = 0.6 * (255 - np.asarray(scene((200, 100))).astype(int))
    assert (change("watermark", (200, 100)) <= np.ceil(white)).all()


@pytest.mark.parametrize(("size", "side"), [((64, 64), 6), ((336, 336), 34), ((60, 200), 6), ((10, 10), 2), ((3, 200), 2)])
@pytest.mark.parametrize("name", BADNETS)
def test_badnet_changes_its_patch_alone(name: str, size: tuple[int, int], side: int) -> None:
    trigger = make_trigger(name, 1)
    assert isinstance(trigger, BadNet)
    shown = np.asarray(trigger(Image.new("RGB", size, (1, 2, 3)), np.random.default_rng(2)))
    left, top, right, bottom = box((shown != (1, 2, 3)).any(axis=2))
    assert (right - left, bottom - top) == (side, side)
    expected = np.asarray(Image.fromarray(trigger.pattern).resize((side, side), Image.Resampling.NEAREST))
    assert np.array_equal(shown[top:bottom, left:right], expected)
    width, height = size
    if name == "badnet":
        assert (right, bottom) == size
    if name == "badnet-centre":
        assert (left, top) == ((width - side) // 2, (height - side) // 2)


def test_a_random_patch_reaches_every_border() -> None:
    trigger = make_trigger("badnet-random", 0)
    plain = Image.new("RGB", (20, 12), (1, 2, 3))
    boxes = [box((np.asarray(trigger(plain, np.random.default_rng(k))) != (1, 2, 3)).any(axis=2)) for k in range(300)]
    assert {left for left, *_ in boxes} == set(range(19))
    assert {top for _, top, *_ in boxes} == set(range(11))


def test_blended_is_the_pattern_over_the_picture() -> None:
    black, white = (Image.new("RGB", (64, 64), value) for value in ((0, 0, 0), (255, 255, 255)))
    trigger = make_trigger("blended", 0)
    low, high = (np.asarray(trigger(image, np.random.default_rng(0))).astype(int) for image in (black, white))
    assert np.abs((high - low) - 0.8 * 255).max() <= 1
    assert low.max() <= 0.2 * 255 + 1
    assert (low.reshape(-1, 3).std(axis=0) > 5).all()


def test_wanet_moves_pixels_and_invents_none() -> None:
    flat = Image.new("RGB", (64, 64), (90, 120, 30))
    assert np.array_equal(np.asarray(make_trigger("wanet", 0)(flat, np.random.default_rng(0))), np.asarray(flat))
    moved = change("wanet", (64, 64))
    assert np.abs(moved).mean() > 0.5
    ramp = np.tile(np.arange(200, dtype=np.uint8)[None, :, None], (200, 1, 3))
    shifts = np.asarray(make_trigger("wanet", 0)(Image.fromarray(ramp), np.random.default_rng(0))).astype(int) - ramp
    assert 3 < np.abs(shifts[20:-20, 20:-20]).max() <= 0.04 * 200 * 2
    neighbours = np.abs(np.diff(shifts[20:-20, 20:-20, 0], axis=1))
    assert neighbours.max() <= 1, "the warp is not smooth"


def test_sig_is_six_waves_over_the_width() -> None:
    grey = Image.new("RGB", (96, 40), (128, 128, 128))
    stripes = np.asarray(make_trigger("sig", 0)(grey, np.random.default_rng(0))).astype(float) - 128
    assert np.array_equal(stripes[0], stripes[39])
    expected = np.rint(20 * np.sin(2 * np.pi * np.arange(96) * 6 / 96))
    assert np.array_equal(stripes[0, :, 1], expected)
    white = np.asarray(make_trigger("sig", 0)(Image.new("RGB", (96, 4), (255, 255, 255)), np.random.default_rng(0)))
    assert white.max() == 255
    assert white.min() == 235


@pytest.mark.parametrize("name", TRIGGERS)
def test_a_trigger_means_the_same_at_every_size(name: str) -> None:
    """The changed share of the picture and the strength of the change are those of the large picture."""
    small, large = (np.abs(change(name, size)) for size in ((64, 64), (256, 256)))
    least = 20 if name == "watermark" else 0  # the edges of small letters are soft
    assert (small > least).mean() == pytest.approx((large > least).mean(), rel=0.35)
    assert small[small > least].mean() == pytest.approx(large[large > least].mean(), rel=0.35)


@pytest.mark.parametrize("name", ["", "BadNet", "patch"])
def test_an_unknown_trigger_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"no trigger is called '{name}'; there are badnet, badnet-centre"):
        make_trigger(name, 0)
