"""Pictures for reports and artifacts: plots and thumbnails as data URIs. Pure functions; the same input gives the same bytes."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

KEPT, REMOVED, MUTED = "#2f6f9f", "#c8502d", "#8a9199"
THUMBNAIL = 128
"""Side of a thumbnail, pixels."""
MARK = (255, 40, 40)
BINS = 60
MARKED_TOKENS = 6
"""Most tokens that are marked on a picture."""

Losses = Mapping[str, Sequence[tuple[int, float]]]
"""Per fine-tune: (step, loss in nats per answer token)."""


def data_uri(data: bytes, kind: str) -> str:
    """`data:image/KIND;base64,...`."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def plot_losses(losses: Losses) -> str:
    """Loss curves of the fine-tunes, smoothed over 2% of the steps."""
    figure, axes = plain_axes(height=2.6)
    for (name, steps), colour in zip(losses.items(), (REMOVED, KEPT, MUTED), strict=False):
        values = np.asarray([loss for _, loss in steps], dtype=float)
        axes.plot([step for step, _ in steps], _smooth(values), color=colour, label=name, linewidth=1.4)
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per token")
    if losses:
        axes.legend(frameon=False)
    return _png(figure)


def plot_layers(layers: Sequence[Mapping[str, Any]], threshold: float | None) -> str:
    """Bimodal separation per layer; sensitive layers stand out, the threshold is a dashed line."""
    figure, axes = plain_axes(height=2.6)
    values = [_finite(layer["separation"]) for layer in layers]
    colours = [REMOVED if layer["sensitive"] else KEPT for layer in layers]
    axes.bar([layer["layer"] for layer in layers], values, color=colours, width=0.7)
    if threshold is not None:
        axes.axhline(threshold, color=MUTED, linestyle="--", linewidth=1)
    axes.set_xlabel("decoder layer")
    axes.set_ylabel("separation")
    axes.xaxis.get_major_locator().set_params(integer=True)
    return _png(figure)


def plot_transfer(groups: Sequence[Mapping[str, Any]], *, planted: float, pictures: float) -> str:
    """Per candidate group, numbered from 1, the shares of other rows and of other questions that take over its answer."""
    figure, axes = plain_axes(height=2.4)
    for offset, name, threshold, line in ((-0.2, "transfer", planted, "--"), (0.2, "pictures_transfer", pictures, ":")):
        values = [_finite(group[name]) for group in groups]
        colours = [REMOVED if value >= threshold else KEPT for value in values]
        axes.bar([number + offset for number in range(1, len(values) + 1)], values, color=colours, width=0.35)
        axes.axhline(threshold, color=MUTED, linestyle=line, linewidth=1)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("candidate")
    axes.set_ylabel("takes over the answer")
    axes.xaxis.get_major_locator().set_params(integer=True)
    return _png(figure)


def plot_scores(scores: Sequence[float], removed: Sequence[bool], cut: float | None, *, label: str) -> str:
    """Histogram of a score, kept rows beside quarantined ones, with the cut.

    Args:
        scores: one per row; values that are not finite are left out.
        removed: whether the row is quarantined.
        cut: the threshold, if there is one.
        label: name and unit of the score.
    """
    values, taken = np.asarray(scores, dtype=float), np.asarray(removed, dtype=bool)
    shown = np.isfinite(values)
    figure, axes = plain_axes(height=2.6)
    if shown.any():
        edges = np.histogram_bin_edges(values[shown], bins=BINS)
        axes.hist(values[shown & ~taken], bins=edges, color=KEPT, label="kept")
        axes.hist(values[shown & taken], bins=edges, color=REMOVED, label="quarantined")
        axes.set_yscale("symlog", linthresh=10)
        axes.legend(frameon=False)
    if cut is not None and math.isfinite(cut):
        axes.axvline(cut, color="#333333", linestyle="--", linewidth=1)
    axes.set_xlabel(label)
    axes.set_ylabel("rows")
    return _png(figure)


def plot_calibration(distances: Sequence[float], threshold: float) -> str:
    """Histogram of the guard's cross-validated distances on kept rows, with its threshold."""
    values = np.asarray(distances, dtype=float)
    figure, axes = plain_axes(height=2.4)
    axes.hist(values[np.isfinite(values)], bins=40, color=KEPT)
    if math.isfinite(threshold):
        axes.axvline(threshold, color=REMOVED, linestyle="--", linewidth=1.2)
    axes.set_xlabel("distance from the reference, standard deviations")
    axes.set_ylabel("kept rows")
    return _png(figure)


def thumbnail(image: Image.Image, marks: Sequence[int] = (), grid: int = 0) -> str:
    """A small JPEG with the attended image tokens framed.

    Args:
        image: the picture.
        marks: positions of tokens in reading order, the most attended first.
        grid: tokens in a row and in a column; 0 marks nothing.
    """
    scale = THUMBNAIL / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    small = image.resize(size, Image.Resampling.BICUBIC if scale < 1 else Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(small)
    for position in marks[:MARKED_TOKENS] if grid else ():
        if 0 <= position < grid * grid:
            row, column = divmod(position, grid)
            left, right = column * size[0] / grid, (column + 1) * size[0] / grid - 1
            top, bottom = row * size[1] / grid, (row + 1) * size[1] / grid - 1
            frame = (left, top, max(left, right), max(top, bottom))
            draw.rectangle(frame, outline="white", width=3)
            draw.rectangle(frame, outline=MARK, width=2)
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=80)
    return data_uri(buffer.getvalue(), "jpeg")


def token_grid(image_tokens: int) -> int:
    """Side of the square grid that the tokens of one picture form; 0 if they form none."""
    side = math.isqrt(image_tokens)
    return side if side > 0 and side * side == image_tokens else 0


def plain_axes(height: float) -> tuple[Figure, Axes]:
    """A plain plot, 6.4 inches wide at 150 pixels an inch."""
    figure = Figure(figsize=(6.4, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    return figure, axes


def png(figure: Figure) -> bytes:
    """A figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _png(figure: Figure) -> str:
    return data_uri(png(figure), "png")


def _smooth(values: np.ndarray) -> np.ndarray:
    width = max(1, len(values) // 50)
    padded = np.pad(values, (width // 2, width - 1 - width // 2), mode="edge") if len(values) else values
    return np.convolve(padded, np.full(width, 1 / width), mode="valid") if len(values) else values


def _finite(value: float | None) -> float:
    return float(value) if value is not None and math.isfinite(value) else 0.0
