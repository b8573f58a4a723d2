"""Suite `clean`: how much filters remove from submissions in which nothing is poisoned.

A cell is a clean submission and a seed. The submissions are not uniform, each for an honest reason: several tasks at once, pictures
and prompts of many sizes, rare answers, wrong answers, the same row again and again, or one answer for all. The base is fine-tuned
once on each, and every filter is given what that model shows. All that is removed is removed wrongly. Random rows and spectral
signatures remove a set share whatever they see; they are there to compare with.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Sequence

import pandas as pd

from benchmarks.bench import Cell, Record, Setting, Suite, cell_text, interval, markdown, run_config, seeds_of
from benchmarks.data import VARIANTS, make_data
from benchmarks.filters import FILTERS, gather
from benchmarks.plots import removed_by_variant
from flows import line
from flows.engines import LazyEngine
from flows.line import open_line

CLEAN = (
    "counts",
    "captions",
    "colour-shape",
    "three-tasks",
    "demo",
    "mixed-sizes",
    "long-tail",
    "unique-questions",
    "label-noise",
    "near-duplicates",
    "constant-answer",
)
"""Names of `benchmarks.data.VARIANTS`, in the order of the table."""
_QUICK = ("mixed-sizes", "constant-answer")


def grid(setting: Setting, seeds: Sequence[int]) -> list[Cell]:
    """Every variant, seed by seed, or the one data set that is named in the place of `demo`; in miniature two."""
    named = pathlib.Path(setting.data).name
    variants = (named,) if named != "demo" else _QUICK if setting.quick else CLEAN
    return [Cell(fields={"data": variant, "base": setting.base.name, "seed": seed}) for seed in seeds for variant in variants]


def keys(_cell: Cell, _setting: Setting) -> list[str]:
    """The filters."""
    return list(FILTERS)


def measure(cell: Cell, setting: Setting, _folder: pathlib.Path, names: Sequence[str]) -> Iterator[Record]:
    """Fine-tune provisionally and filter; then one record per filter."""
    seed, name = int(cell.fields["seed"]), str(cell.fields["data"])
    config = run_config(setting, seed)
    place = setting.out / "data" / f"{name}-{setting.rows}-{seed}"
    source = name if name in VARIANTS else setting.data
    data = make_data(source, place, rows=setting.rows, test_rows=setting.test_rows, seed=seed)
    with LazyEngine(config.engine) as engine:
        run = open_line(data.train, setting.base, config, setting.out / "store", engine)
        evidence = gather(run, line.until_clusters(run))
    for name in names:
        found = FILTERS[name](evidence)
        yield {"filter": name, "removed": float(found.removed.mean()), "verdict": found.verdict}


def report(frame: pd.DataFrame) -> str:
    """Per base the share of rows that each filter removes from each submission."""
    parts = ["# Filters on clean submissions", __doc__.split("\n\n", 1)[1].strip()]
    parts.append(
        f"Rows removed, percent: means over seeds {seeds_of(frame)} with 95% intervals (Student's t). "
        "Beside it every verdict of the line that is not `clean`."
    )
    for base, group in frame.groupby("base", sort=False):
        rows = [
            [_what(variant), *(cell_text(cells[cells["filter"] == name]["removed"]) + _told(cells, name) for name in FILTERS)]
            for variant in _variants(group)
            if len(cells := group[group["data"] == variant])
        ]
        parts += [f"## Base {base}", f"![Rows removed]({_picture(str(base))})", markdown(["submission", *FILTERS], rows)]
    return "\n\n".join(parts)


def figures(frame: pd.DataFrame) -> dict[str, bytes]:
    """Rows removed by each filter from each submission, a picture per base."""
    return {
        _picture(str(base)): removed_by_variant(
            {
                variant: {
                    name: interval(group[(group["data"] == variant) & (group["filter"] == name)]["removed"])[0] for name in FILTERS
                }
                for variant in _variants(group)
            }
        )
        for base, group in frame.groupby("base", sort=False)
    }


def _variants(frame: pd.DataFrame) -> list[str]:
    """The data sets of some records, those of `CLEAN` first and in its order."""
    there = list(dict.fromkeys(str(name) for name in frame["data"]))
    return [name for name in CLEAN if name in there] + [name for name in there if name not in CLEAN]


def _told(cells: pd.DataFrame, name: str) -> str:
    """How many seeds gave a verdict other than `clean`."""
    verdicts = cells[cells["filter"] == name]["verdict"].dropna() if "verdict" in cells else pd.Series(dtype=str)
    return "".join(
        f", {count} of {len(verdicts)} {verdict}" for verdict, count in verdicts.value_counts().items() if verdict != "clean"
    )


def _what(variant: str) -> str:
    return f"{variant}: {VARIANTS[variant].what}" if variant in VARIANTS else variant


def _picture(base: str) -> str:
    return f"clean-{base}.png"


CLEAN_SUITE = Suite(name="clean", key="filter", grid=grid, keys=keys, measure=measure, report=report, figures=figures)
