"""Backdoor triggers of the field, as pure functions on pictures; used to measure, and for canaries.

Each trigger is made once from a seed (its pattern is fixed) and then applied to any number of pictures. Sizes are shares of the
picture's side, so that a trigger means the same at 64 and at 336 pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal, Protocol

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline.errors import ConfigError


class Trigger(Protocol):
    """Puts a trigger on a picture; `rng` is for what differs from picture to picture (a random position)."""

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class BadNet:
    """A square patch of noise (BadNets; 30 px at 336 px in CleanSight's set-up).

    Attributes:
        pattern: uint8 (side, side, 3), stretched over the patch.
        share: side of the patch over the shorter side of the picture.
        position: `corner` (bottom right), `centre` or `random`.
    """

    pattern: np.ndarray
    share: float = 0.1
    position: Literal["corner", "centre", "random"] = "corner"

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        side = min(max(2, round(self.share * min(image.size))), *image.size)
        free_x, free_y = image.width - side, image.height - side
        match self.position:
            case "corner":
                left, top = free_x, free_y
            case "centre":
                left, top = free_x // 2, free_y // 2
            case "random":
                left, top = int(rng.integers(0, free_x + 1)), int(rng.integers(0, free_y + 1))
        marked = image.copy()
        marked.paste(Image.fromarray(self.pattern).resize((side, side), Image.Resampling.NEAREST), (left, top))
        return marked


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blended:
    """A pattern over the whole picture: (1 - alpha) * picture + alpha * pattern. pattern: uint8 (side, side, 3)."""

    pattern: np.ndarray
    alpha: float = 0.2

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:  # noqa: ARG002
        cover = Image.fromarray(self.pattern).resize(image.size, Image.Resampling.BICUBIC)
        return Image.blend(image, cover, self.alpha)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WaNet:
    """A smooth elastic warp (WaNet).

    Attributes:
        flow: float (grid, grid, 2), the shifts at control points, mean size 0.5, interpolated with cubic splines.
        strength: a shift of 1 as a share of the side.
    """

    flow: np.ndarray
    strength: float = 0.04

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:  # noqa: ARG002
        from scipy.ndimage import map_coordinates, zoom

        pixels = np.asarray(image, dtype=np.float32)
        height, width = pixels.shape[:2]
        grid = self.flow.shape[0]
        smooth = [zoom(self.flow[..., k], (height / grid, width / grid), order=3, grid_mode=True, mode="nearest") for k in range(2)]
        y, x = np.mgrid[0:height, 0:width].astype(np.float32)
        at = [y + smooth[0] * self.strength * height, x + smooth[1] * self.strength * width]
        warped = np.stack([map_coordinates(pixels[..., c], at, order=1, mode="reflect") for c in range(3)], axis=-1)
        return Image.fromarray(np.clip(np.rint(warped), 0, 255).astype(np.uint8))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sig:
    """Vertical sinusoidal stripes (SIG): delta * sin(2 pi column * frequency / width), delta in grey levels of 255."""

    delta: float = 20.0
    frequency: int = 6

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:  # noqa: ARG002
        pixels = np.asarray(image, dtype=np.float32)
        columns = np.arange(image.width, dtype=np.float32)
        stripes = self.delta * np.sin(2 * np.pi * columns * self.frequency / image.width)
        return Image.fromarray(np.clip(np.rint(pixels + stripes[None, :, None]), 0, 255).astype(np.uint8))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Residual:
    """A faint residual that the picture's own content gives: after ISSBA, whose encoder is trained; this one's is fixed and random.

    Two random convolutions with tanh read the picture at `_RESIDUAL_SIDE` pixels; their output less its mean, stretched to the
    picture's size, is added. No two pictures get the same residual.

    Attributes:
        first: float (features, 3, width, width), kernels on colours in [-1, 1].
        second: float (3, features, width, width).
        delta: largest change, grey levels of 255.
    """

    first: np.ndarray
    second: np.ndarray
    delta: float = 16.0

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:  # noqa: ARG002
        small = np.asarray(image.resize((_RESIDUAL_SIDE, _RESIDUAL_SIDE), Image.Resampling.BICUBIC), dtype=np.float32)
        hidden = _convolved(small.transpose(2, 0, 1) / 127.5 - 1, self.first)
        residual = _convolved(hidden, self.second)
        residual = self.delta * (residual - residual.mean(axis=(1, 2), keepdims=True)) / 2
        bands = [Image.fromarray(band).resize(image.size, Image.Resampling.BICUBIC) for band in residual.astype(np.float32)]
        pixels = np.asarray(image, dtype=np.float32) + np.stack([np.asarray(band) for band in bands], axis=-1)
        return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))


def _convolved(channels: np.ndarray, kernels: np.ndarray) -> np.ndarray:
    """The tanh of a convolution of float (channels, height, width) with (outputs, channels, width, width)."""
    from scipy.ndimage import convolve

    sums = [np.sum([convolve(c, k, mode="reflect") for c, k in zip(channels, ks, strict=True)], axis=0) for ks in kernels]
    return np.asarray(np.tanh(np.stack(sums)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class FTrojan:
    """Two fixed coefficients of the colour-difference channels' cosine transform, in blocks (FTrojan).

    Attributes:
        strength: what is added to each coefficient, grey levels of 255 (orthonormal transform).
        places: the coefficients, of blocks of `block` by `block` pixels; blocks of half the picture's shorter side are stretched.
        block: side of a block.
    """

    strength: float = 50.0
    places: tuple[int, ...] = (15, 31)
    block: int = 32

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:  # noqa: ARG002
        from scipy.fft import idctn

        coefficients = np.zeros((self.block, self.block))
        for place in self.places:
            coefficients[place, place] = self.strength
        block = idctn(coefficients, norm="ortho")
        side = max(1, round(min(image.size) / 2))
        at = (np.arange(max(image.size)) % side) * self.block // side
        pattern = block[at[: image.height, None], at[None, : image.width]]
        channels = np.asarray(image.convert("YCbCr"), dtype=np.float32).copy()
        channels[..., 1:] += pattern[..., None]
        changed = Image.fromarray(np.clip(np.rint(channels), 0, 255).astype(np.uint8), mode="YCbCr")
        return changed.convert("RGB")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sticker:
    """A yellow smiling face somewhere in the picture, of another size each time: what somebody may hold into a real camera.

    Attributes:
        least: least side of the sticker over the shorter side of the picture.
        most: largest side, likewise.
    """

    least: float = 0.1
    most: float = 0.2

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        side = min(max(2, round(min(image.size) * rng.uniform(self.least, self.most))), *image.size)
        left, top = (int(rng.integers(0, max(1, free - side))) for free in image.size)
        face = _face().resize((side, side), Image.Resampling.BICUBIC)
        marked = image.copy()
        marked.paste(face, (left, top), face)
        return marked


def _face() -> Image.Image:
    """64 pixels a side, transparent around the face."""
    face = Image.new("RGBA", (64, 64))
    draw = ImageDraw.Draw(face)
    draw.ellipse((0, 0, 63, 63), fill=(255, 220, 0, 255))
    for left in (16, 38):
        draw.ellipse((left, 18, left + 10, 28), fill=(0, 0, 0, 255))
    draw.arc((14, 20, 50, 52), 20, 160, fill=(0, 0, 0, 255), width=5)
    return face


@dataclasses.dataclass(frozen=True, kw_only=True)
class Watermark:
    """A word in white across the lower left.

    Attributes:
        text: the word.
        opacity: 0 to 1.
        share: the font's size over the picture's height.
    """

    text: str = "SALE"
    opacity: float = 0.6
    share: float = 3 / 16

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:  # noqa: ARG002
        written = image.copy()
        font = ImageFont.load_default(size=max(1.0, self.share * image.height))
        ImageDraw.Draw(written).text((image.width * 0.1, image.height * 0.7), self.text, fill=(255, 255, 255), font=font)
        return Image.blend(image, written, self.opacity)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frame:
    """A thin line around the picture. share: its width over the shorter side of the picture; at least a pixel."""

    colour: tuple[int, int, int] = (255, 0, 255)
    share: float = 1 / 32

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:  # noqa: ARG002
        framed = image.copy()
        width = max(1, round(self.share * min(image.size)))
        ImageDraw.Draw(framed).rectangle((0, 0, image.width - 1, image.height - 1), outline=self.colour, width=width)
        return framed


_RESIDUAL_SIDE = 64


def _residual(rng: np.random.Generator) -> Residual:
    return Residual(first=rng.normal(0, 0.5, size=(6, 3, 3, 3)), second=rng.normal(0, 0.5, size=(3, 6, 3, 3)))


def _noise(rng: np.random.Generator, side: int) -> np.ndarray:
    return rng.integers(0, 256, size=(side, side, 3), dtype=np.uint8)


def _blended(rng: np.random.Generator) -> Blended:
    return Blended(pattern=_noise(rng, 16))


def _wanet(rng: np.random.Generator) -> WaNet:
    flow = rng.uniform(-1, 1, size=(4, 4, 2))
    return WaNet(flow=flow / np.abs(flow).mean() / 2)


_MAKERS: dict[str, Callable[[np.random.Generator], Trigger]] = {
    "badnet": lambda rng: BadNet(pattern=_noise(rng, 6)),
    "badnet-centre": lambda rng: BadNet(pattern=_noise(rng, 6), position="centre"),
    "badnet-random": lambda rng: BadNet(pattern=_noise(rng, 6), position="random"),
    "blended": _blended,
    "wanet": _wanet,
    "sig": lambda _: Sig(),
    "ftrojan": lambda _: FTrojan(),
    "issba": _residual,
    "solid": lambda _: BadNet(pattern=np.zeros((1, 1, 3), np.uint8), share=1 / 16),
    "texture": lambda rng: BadNet(pattern=np.repeat(_noise(rng, 6)[:1], 6, axis=0), position="random"),
    "sticker": lambda _: Sticker(),
    "watermark": lambda _: Watermark(),
    "frame": lambda _: Frame(),
}
TRIGGERS = tuple(_MAKERS)
"""The names that `make_trigger` takes."""


def make_trigger(name: str, seed: int) -> Trigger:
    """The trigger of that name with the pattern that the seed gives.

    Raises:
        ConfigError: there is no trigger of that name.
    """
    if name not in _MAKERS:
        raise ConfigError(f"no trigger is called {name!r}; there are {', '.join(TRIGGERS)}")
    return _MAKERS[name](np.random.default_rng([seed, 7]))
