"""Pictures of the bench, in the style of the line's own figures; the same input gives the same bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import PercentFormatter

from benchmarks.bench import interval, percent
from flows.figures import KEPT, MUTED, REMOVED, plain_axes, png

_FIRST = (KEPT, "#7ea6c9", REMOVED, "#e0a458")
"""Colours of the line's filter, by default and set to remove what asking finds, and of plain BYE by both rules."""
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
    axes.set_xticks(ticks, [percent(rate) for rate in ticks])
    axes.minorticks_off()
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("poison rate")
    axes.set_ylabel("F1, mean over the attacks")
    _legend(axes)
    return png(figure)


def f1_by_attack(found: Mapping[tuple[str, float], float]) -> bytes:
    """F1 as a map, a row per attack and a column per poison rate; what was not measured stays white.

    Args:
        found: (attack, rate from 0 to 1) -> mean over the seeds (0 to 1).

    Returns:
        PNG.
    """
    attacks, rates = list(dict.fromkeys(attack for attack, _ in found)), sorted({rate for _, rate in found})
    values = np.full((len(attacks), len(rates)), np.nan)
    for (attack, rate), value in found.items():
        values[attacks.index(attack), rates.index(rate)] = value
    figure, axes = plain_axes(height=1.0 + 0.28 * len(attacks))
    axes.imshow(
        values, cmap=LinearSegmentedColormap.from_list("found", ["#f3e1da", "#dfe6ec", KEPT]), vmin=0, vmax=1, aspect="auto"
    )
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            axes.text(
                column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=8, color="white" if value > 0.7 else "black"
            )
    axes.set_xticks(range(len(rates)), [percent(rate) for rate in rates])
    axes.set_yticks(range(len(attacks)), attacks, fontsize=8)
    axes.set_xlabel("poison rate")
    axes.set_title("F1 of the default filter, percent", fontsize=9, loc="left")
    axes.tick_params(length=0)
    return png(figure)


def asr_by_attack(found: Mapping[str, Mapping[str, Sequence[float]]]) -> bytes:
    """Attack success rate without and with a defence, a row per attack, with its 95% interval over the seeds.

    Args:
        found: attack -> defence -> a value per seed (0 to 1).

    Returns:
        PNG.
    """
    figure, axes = plain_axes(height=1.2 + 0.26 * len(found))
    places = np.arange(len(found))
    axes.hlines(places, 0, 1, color=MUTED, linewidth=0.4)
    names = list(dict.fromkeys(name for values in found.values() for name in values))
    for name, colour in zip(names, (REMOVED, KEPT, *_OTHERS), strict=False):
        spans = np.asarray([interval(values.get(name, ())) for values in found.values()]).reshape(-1, 2)
        mean, half = spans[:, 0], np.nan_to_num(spans[:, 1])
        reach = np.stack([mean - np.clip(mean - half, 0, 1), np.clip(mean + half, 0, 1) - mean])
        axes.errorbar(mean, places, xerr=reach, color=colour, label=name, linestyle="", marker="o", markersize=4, elinewidth=1)
    axes.set_xlim(-0.02, 1.02)
    _name_rows(axes, list(found), "attack success rate")
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
    axes.set_xlim(-0.01, 1.0)
    _name_rows(axes, list(found), "rows removed from a clean submission")
    return png(figure)


def _name_rows(axes: Axes, names: Sequence[str], what: str) -> None:
    """Names beside the rows, the first on top, shares in percent below them, and the legend."""
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel(what)
    _legend(axes)


def _legend(axes: Axes) -> None:
    axes.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
