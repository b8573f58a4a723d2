"""Pictures of the bench, in the style of the line's own figures; the same input gives the same bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.ticker import PercentFormatter

from benchmarks.bench import interval
from flows.figures import KEPT, MUTED, REMOVED, plain_axes, png

_FIRST = (KEPT, REMOVED, "#e0a458")
"""Colours of the line's filter and of plain BYE by both rules."""
_OTHERS = ("#8a9199", "#6a4c93", "#b5b5b5", "#4f9d69", "#b56576", "#7f5539")


def f1_by_rate(found: Mapping[str, Mapping[float, Sequence[float]]]) -> bytes:
    """F1 over the poison rate, a line per filter, with its 95% interval over the seeds as a band.

    Args:
        found: filter -> rate (0 to 1) -> a value per seed (0 to 1).

    Returns:
        PNG.
    """
    figure, axes = plain_axes(height=3.6)
    for (name, values), colour in zip(found.items(), (*_FIRST, *_OTHERS), strict=False):
        rates = sorted(values)
        spans = np.asarray([interval(values[rate]) for rate in rates]).reshape(-1, 2)
        own = colour in _FIRST
        axes.plot(rates, spans[:, 0], color=colour, label=name, linewidth=1.8 if own else 1.0, marker="o", markersize=3)
        if own:
            half = np.nan_to_num(spans[:, 1])
            axes.fill_between(rates, np.clip(spans[:, 0] - half, 0, 1), np.clip(spans[:, 0] + half, 0, 1), color=colour, alpha=0.15)
    ticks = sorted({rate for values in found.values() for rate in values})
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{100 * rate:g}%" for rate in ticks])
    axes.minorticks_off()
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("poison rate")
    axes.set_ylabel("F1, mean over the attacks")
    axes.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return png(figure)


def removed_by_variant(found: Mapping[str, Mapping[str, float]]) -> bytes:
    """Share of rows removed from clean submissions, a row per submission and a mark per filter.

    Args:
        found: submission -> filter -> share (0 to 1).

    Returns:
        PNG.
    """
    figure, axes = plain_axes(height=1.2 + 0.32 * len(found))
    filters = list(next(iter(found.values()), {}))
    places = np.arange(len(found))
    axes.hlines(places, 0, 1, color=MUTED, linewidth=0.4)
    for index, (name, colour) in enumerate(zip(filters, (*_FIRST, *_OTHERS), strict=False)):
        own = colour in _FIRST
        axes.plot(
            [values[name] for values in found.values()],
            places + (index - len(filters) / 2) * 0.06,  # equal shares stay in sight
            color=colour,
            label=name,
            linestyle="",
            marker="D" if own else "o",
            markersize=5 if own else 3.5,
            clip_on=False,
        )
    axes.set_yticks(places, list(found), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(-0.01, 1.0)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("rows removed from a clean submission")
    axes.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return png(figure)
