"""Figures: real pictures, small, the same bytes for the same input, marks where the model looks."""

from __future__ import annotations

import base64
import io
import math

import numpy as np
import pytest
from PIL import Image

from flows import figures

LAYERS = [{"layer": k, "separation": s, "sensitive": s > 2} for k, s in enumerate([0.5, 3.0, math.nan, 1.0])]


def plotted(*shares: tuple[float, float]) -> str:
    groups = [{"transfer": planted, "pictures_transfer": asked} for planted, asked in shares]
    return figures.plot_transfer(groups, planted=0.5, pictures=0.25)


PLOTS = {
    "losses": lambda: figures.plot_losses({"provisional": [(1, 3.0), (2, 1.0)], "final": [(1, 2.0)]}),
    "no losses": lambda: figures.plot_losses({}),
    "layers": lambda: figures.plot_layers(LAYERS, 2.0),
    "no layers": lambda: figures.plot_layers([], None),
    "transfer": lambda: plotted((0.9, 0.0), (0.1, 0.2)),
    "scores": lambda: figures.plot_scores([0.0, 1.0, math.nan, 9.0], [False, False, False, True], 9.0, label="score"),
    "equal scores": lambda: figures.plot_scores([1.0] * 5, [False] * 5, None, label="score"),
    "no scores": lambda: figures.plot_scores([math.nan, math.inf], [False, False], math.nan, label="score"),
    "calibration": lambda: figures.plot_calibration(list(np.linspace(0, 5, 99)), 4.5),
    "no calibration": lambda: figures.plot_calibration([], math.nan),
}


def decode(uri: str) -> Image.Image:
    kind, data = uri.removeprefix("data:image/").split(";base64,")
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert image.format == kind.upper()
    return image.convert("RGB")


@pytest.mark.parametrize("name", PLOTS)
def test_plots_are_small_pictures_and_repeat_to_the_byte(name: str) -> None:
    first, second = PLOTS[name](), PLOTS[name]()
    assert first == second
    assert len(first) < 80_000
    assert np.asarray(decode(first)).std() > 1


def test_sensitive_layers_and_removed_rows_stand_out() -> None:
    red = np.asarray(Image.new("RGB", (1, 1), figures.REMOVED))[0, 0].astype(int)

    def has_red(uri: str) -> bool:
        return bool((np.abs(np.asarray(decode(uri)).astype(int) - red).sum(-1) < 30).sum() > 50)

    assert has_red(figures.plot_layers(LAYERS, 2.0))
    assert not has_red(figures.plot_layers([{**layer, "sensitive": False} for layer in LAYERS], 2.0))
    assert has_red(plotted((0.9, 0.0)))
    assert has_red(plotted((0.0, 0.3)))
    assert not has_red(plotted((0.4, 0.2)))


@pytest.mark.parametrize(("tokens", "side"), [(64, 8), (576, 24), (0, 0), (65, 0), (1, 1), (2, 0)])
def test_token_grid(tokens: int, side: int) -> None:
    assert figures.token_grid(tokens) == side


def test_marks_frame_the_token() -> None:
    grey = Image.new("RGB", (64, 64), (90, 90, 90))
    plain = np.asarray(decode(figures.thumbnail(grey))).astype(int)
    marked = np.asarray(decode(figures.thumbnail(grey, [63], 8))).astype(int)
    assert marked.shape == (figures.THUMBNAIL, figures.THUMBNAIL, 3)
    changed = np.argwhere(np.abs(marked - plain).sum(-1) > 60)
    assert len(changed) > 40
    assert changed.min() >= figures.THUMBNAIL * 7 // 8 - 8  # the corner's cell and what JPEG smears around it


@pytest.mark.parametrize(("marks", "grid"), [([64, -1], 8), ([3], 0), ([], 8)])
def test_no_marks_outside_of_the_grid(marks: list[int], grid: int) -> None:
    grey = Image.new("RGB", (64, 64), (90, 90, 90))
    assert figures.thumbnail(grey, marks, grid) == figures.thumbnail(grey)


def test_thumbnails_keep_the_shape() -> None:
    assert decode(figures.thumbnail(Image.new("RGB", (400, 100)))).size == (128, 32)
    assert decode(figures.thumbnail(Image.new("RGB", (2000, 1)))).size == (128, 1)
