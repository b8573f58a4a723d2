"""Pictures become RGB the same way every time, and are refused by their header."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.images import MAX_ASPECT, ImageError, ImageSizeError, decode_image, encode_png, image_size

RED, WHITE = (255, 0, 0), (255, 255, 255)
STORED = {1: (0, 0), 2: (1, 0), 3: (0, 2), 4: (1, 2), 5: (1, 1), 6: (0, 1), 7: (1, -1), 8: (0, -1)}
"""EXIF orientation -> whether the upright picture is mirrored, and the quarter turns to the left, to get the stored one."""


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def half_clear(mode: str) -> Image.Image:
    """Left column red, right column fully clear."""
    image = Image.new("RGBA", (2, 1), (*RED, 255))
    image.putpixel((1, 0), (0, 0, 255, 0))
    return image.convert(mode)


def palette(transparent: int | bytes | None = None) -> bytes:
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, 0, 0, 255])
    image.putpixel((1, 0), 1)
    return encoded(image) if transparent is None else encoded(image, transparency=transparent)


def deep(values: list[int]) -> bytes:
    return encoded(Image.fromarray(np.array([values], dtype=np.uint16)))


@pytest.mark.parametrize(
    ("data", "pixels"),
    [
        (encoded(Image.new("RGB", (1, 1), RED)), [RED]),
        (encoded(Image.new("L", (1, 1), 77)), [(77, 77, 77)]),
        (encoded(Image.new("1", (1, 1), 1)), [WHITE]),
        (palette(), [RED, (0, 0, 255)]),
        (palette(1), [RED, WHITE]),
        (palette(b"\xff\x80"), [RED, (127, 127, 255)]),
        (encoded(half_clear("RGBA")), [RED, WHITE]),
        (encoded(half_clear("LA")), [(76, 76, 76), WHITE]),
        (encoded(Image.new("RGBA", (1, 1), (0, 0, 0, 128))), [(127, 127, 127)]),
        (encoded(Image.new("RGB", (2, 1), RED), transparency=RED), [WHITE, WHITE]),
        (encoded(half_clear("RGBA"), "WEBP", lossless=True), [RED, WHITE]),
        (deep([0, 255, 256, 40_000, 65_535]), [(value,) * 3 for value in (0, 0, 1, 156, 255)]),
        (encoded(Image.new("CMYK", (1, 1), (0, 255, 255, 0)), "JPEG", quality=100), [RED]),
        (encoded(Image.new("L", (1, 1), 77), "JPEG"), [(77, 77, 77)]),
    ],
    ids=[
        "RGB",
        "L",
        "1",
        "P",
        "P, one clear",
        "P, half clear",
        "RGBA",
        "LA",
        "half",
        "colour key",
        "WEBP",
        "16 bits",
        "CMYK",
        "grey JPEG",
    ],
)
def test_every_mode_becomes_rgb(data: bytes, pixels: list[tuple[int, int, int]]) -> None:
    image = decode_image(data)
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image).reshape(-1, 3).astype(int) - np.array(pixels)).max() <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_pictures_stand_upright(orientation: int, kind: str) -> None:
    upright = np.zeros((16, 32, 3), dtype=np.uint8)
    upright[:8, :8] = 255
    mirrored, quarters = STORED[orientation]
    stored = np.rot90(np.fliplr(upright) if mirrored else upright, quarters)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif.tobytes(), quality=100)
    image = decode_image(data)
    assert image.size == image_size(data) == (32, 16)
    assert np.abs(np.asarray(image).astype(int) - upright).max() <= 40


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_the_first_frame_of_an_animation_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    image = decode_image(encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=100, lossless=True))
    assert image.getpixel((0, 0)) == RED


def test_the_smallest_picture_is_allowed() -> None:
    assert decode_image(encoded(Image.new("RGB", (1, 1)))).size == (1, 1)


@pytest.mark.parametrize(("size", "allowed"), [((10, 10), True), ((101, 1), False), ((11, 10), False), ((10, 11), False)])
def test_the_limit_of_pixels_is_exact(size: tuple[int, int], allowed: bool) -> None:
    data = encoded(Image.new("RGB", size))
    if allowed:
        assert decode_image(data, max_pixels=100).size == size
    else:
        with pytest.raises(ImageSizeError, match=f"{size[0]} x {size[1]} pixels; the limit is 100 pixels"):
            decode_image(data, max_pixels=100)


def test_the_limit_of_thinness_is_exact() -> None:
    assert decode_image(encoded(Image.new("L", (MAX_ASPECT, 1)))).size == (MAX_ASPECT, 1)
    with pytest.raises(ImageSizeError, match="200 : 1"):
        decode_image(encoded(Image.new("L", (1, MAX_ASPECT + 1))))


def test_a_large_picture_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.new("1", (6000, 5000)))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ImageSizeError, match="6000 x 5000"):
        decode_image(data, max_pixels=25_000_000)


def test_what_ingest_has_let_in_is_decoded_whatever_its_size() -> None:
    assert decode_image(encoded(Image.new("1", (6000, 5000)))).size == (6000, 5000)


def test_every_cut_and_every_changed_byte_decodes_or_is_an_image_error() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8))
    outcomes = {"decoded": 0, "refused": 0}
    for kind in ("PNG", "JPEG", "WEBP"):
        data = encoded(noise, kind, exif=Image.Exif().tobytes())
        damaged = [data[:size] for size in range(0, len(data), 7)]
        damaged += [data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :] for at in range(0, len(data), 3)]
        for item in damaged:
            try:
                assert decode_image(item).mode == "RGB"
                outcomes["decoded"] += 1
            except ImageError:
                outcomes["refused"] += 1
    assert min(outcomes.values()) > 50


def test_encoding_is_the_same_and_bare() -> None:
    image = Image.new("RGB", (3, 2), RED)
    image.info["comment"] = "secret"
    assert encode_png(image) == encode_png(image.copy())
    assert b"secret" not in encode_png(image)
    assert decode_image(encode_png(image)).getpixel((2, 1)) == RED
