"""Backdoor triggers of the field, as pure functions on pictures; used to measure, never by a stage.

Each trigger is made once from a seed (its pattern is fixed) and then applied to any number of pictures. Sizes are shares of the
picture's side, so that a trigger means the same at 64 and at 336 pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal, Protocol

import numpy as np
from PIL import Image

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
