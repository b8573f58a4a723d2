"""Submitted pictures: refused by their header where they are too large, and turned to RGB the same way every time."""

from __future__ import annotations

import contextlib
import io
import struct
import warnings
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_ASPECT = 200
"""Longest side over the shortest (Qwen2-VL's limit): resized to a shortest edge of 336 pixels, it has 22.6 megapixels."""

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)
"""Orientations in which width and height change places."""
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    struct.error,
    zlib.error,
)


class ImageError(ValueError):
    """A picture that can't be used: not PNG, JPEG or WEBP, or damaged."""


class ImageSizeError(ImageError):
    """A picture with more pixels, or longer and thinner, than is allowed."""


def decode_image(data: bytes, *, max_pixels: int | None = None) -> Image.Image:
    """Decode a picture to RGB: first frame, upright by its EXIF orientation, alpha over white, 16 bits to their upper 8.

    Args:
        data: the encoded picture.
        max_pixels: most pixels (width x height); checked before anything is decoded. None: ingest has checked it.

    Raises:
        ImageSizeError: more than `max_pixels` or than Pillow opens (178,956,970), or sides in a ratio above MAX_ASPECT.
        ImageError: empty, damaged, truncated, or of another format.
    """
    if not data:
        raise ImageError("the picture is empty")
    try:
        with _quiet(), Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(image.size, max_pixels)
            image.seek(0)
            image.load()
            turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
            upright = image.transpose(turn) if turn is not None else image
            return _to_rgb(upright, image.info.get("transparency"))
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError("not a PNG, JPEG or WEBP picture") from None
    except Image.DecompressionBombError as error:
        raise ImageSizeError(str(error) if max_pixels is None else f"{error}; the limit is {max_pixels} pixels") from error
    except _DAMAGE as error:
        raise ImageError(f"the picture is damaged: {error}") from error


def image_size(data: bytes) -> tuple[int, int]:
    """Width and height, upright, of a picture that ingest has checked; only its header is read."""
    with _quiet(), Image.open(io.BytesIO(data), formats=FORMATS) as image:
        width, height = image.size
        sideways = image.getexif().get(_ORIENTATION, 1) in _SIDEWAYS
    return (height, width) if sideways else (width, height)


def encode_png(image: Image.Image) -> bytes:
    """Encode as PNG with settings that never differ, and without metadata."""
    buffer = io.BytesIO()
    clean = Image.frombytes(image.mode, image.size, image.tobytes())
    clean.save(buffer, format="PNG", compress_level=6)
    return buffer.getvalue()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of large sizes, which are checked here, and of damaged EXIF
        yield


def _check_size(size: tuple[int, int], max_pixels: int | None) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"the picture has no pixels: {width} x {height}")
    if max_pixels is not None and width * height > max_pixels:
        raise ImageSizeError(f"{width} x {height} pixels; the limit is {max_pixels} pixels")
    if max(size) > MAX_ASPECT * min(size):
        raise ImageSizeError(f"{width} x {height} pixels; sides may be at most {MAX_ASPECT} : 1")


def _to_rgb(image: Image.Image, transparency: object) -> Image.Image:
    if image.mode.startswith("I"):
        values = np.clip(np.asarray(image).astype(np.int64), 0, 65535) >> 8
        return Image.fromarray(values.astype(np.uint8), mode="L").convert("RGB")
    if "A" in image.mode or "a" in image.mode or transparency is not None:
        colours = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours).convert("RGB")
    return image.convert("RGB")
