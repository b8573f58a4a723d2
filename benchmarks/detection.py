"""Suite `detection`: filters on submissions that are poisoned in many ways, at many rates.

A cell is an attack at a poison rate, a data set, a base and a seed: the base is fine-tuned once on the poisoned submission, and
every filter is given what that provisional model shows of each row, and no truth. Precision, recall, F1 and AUROC are of rows; the
removed share is of all rows. Records whose name ends in ", retrained" fine-tune the base anew on the rows that a filter keeps
("truth": on those that are clean; "no filter": on all) and give clean performance (exact match on clean test rows) and attack
success rate (on the same rows with the trigger; of several triggers the mean). They are made at a rate of 10%, and elsewhere where
`--only` names them.
"""

from __future__ import annotations

import pathlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score

from benchmarks.attacks import ATTACKS, Part, poison_rows
from benchmarks.bench import Cell, Record, Setting, Suite, cell_text, markdown, percent, poisoned_cells, run_config, seeds_of
from benchmarks.data import make_data
from benchmarks.filters import FILTERS, Filtered, gather
from benchmarks.plots import f1_by_attack, f1_by_rate
from flows import line
from flows.demo import detection
from flows.engines import LazyEngine
from flows.line import Line, open_line
from flows.poison import SUBMISSION
from flows.report import only_finite
from stages.verify.measure import attack_success, exact_match
from stages.verify.run import Candidate, answers_of
from storage.store import StageResult
from storage.subset import canonical_shards, copy_rows, read_rows

RATES = (0.005, 0.01, 0.05, 0.1, 0.3, 0.5)
RETRAINED_RATE = 0.1
"""Where models are retrained unasked: BYE's own poison rate."""
_RETRAINED = ", retrained"
_TRAINED = ("no filter", "ours", "bye, paper's rule", "bye, public code's rule", "truth")
RETRAINED = tuple(name + _RETRAINED for name in _TRAINED)
UNFILTERED = "no filter" + _RETRAINED
_OWN = ("ours", "ours, asking removes")
_CELL = ["attack", "rate", "seed"]
_QUICK = ("badnet", "text prefix")
_FIGURES = {"precision": "precision", "recall": "recall", "f1": "F1", "auroc": "AUROC", "removed": "rows removed"}


def grid(setting: Setting, seeds: Sequence[int]) -> list[Cell]:
    """Every attack at every rate, seed by seed, the rate at which models are retrained first; in miniature two attacks at it."""
    rates = sorted(RATES, key=lambda rate: rate != RETRAINED_RATE)
    attacks, rates = (_QUICK, rates[:1]) if setting.quick else (tuple(ATTACKS), rates)
    return poisoned_cells(setting, seeds, attacks=attacks, rates=rates)


def keys(cell: Cell, setting: Setting) -> list[str]:
    """The filters, and the retrained models at one rate."""
    return [*FILTERS, *(RETRAINED if cell.fields["rate"] == RETRAINED_RATE and not setting.quick else ())]


def asked(cell: Cell, setting: Setting) -> list[str]:
    """The retrained models of the other cells."""
    return [name for name in RETRAINED if name not in keys(cell, setting)]


def measure(cell: Cell, setting: Setting, folder: pathlib.Path, names: Sequence[str]) -> Iterator[Record]:
    """Fine-tune provisionally and filter; then one record per filter and per retrained model."""
    seed, rate, parts = int(cell.fields["seed"]), float(cell.fields["rate"]), ATTACKS[str(cell.fields["attack"])]
    config = run_config(setting, seed)
    place = setting.out / "data" / f"{cell.fields['data']}-{setting.rows}-{seed}"
    data = make_data(setting.data, place, rows=setting.rows, test_rows=setting.test_rows, seed=seed)
    truth = poison_rows(data.train, parts, folder, rate=rate, seed=seed)
    with LazyEngine(config.engine) as engine:
        run = open_line(folder / SUBMISSION, setting.base, config, setting.out / "store", engine)
        stages = line.until_clusters(run)
        evidence = gather(run, stages)
        poisoned = np.isin(np.arange(evidence.rows), sorted(truth))
        test = line.rows_of(line.ingest(open_line(data.test, setting.base, config, setting.out / "store", engine)))
        for name in names:
            if name in FILTERS:
                found = FILTERS[name](evidence)
                yield {"filter": name, **figures_of(found, poisoned), "verdict": found.verdict}
                continue
            chooser = name.removesuffix(_RETRAINED)
            removed = {"truth": poisoned, "no filter": np.zeros(evidence.rows, bool)}.get(chooser)
            removed = FILTERS[chooser](evidence).removed if removed is None else removed
            adapter = retrained(run, stages, removed).folder / "adapter"
            yield {"filter": name, "removed": float(removed.mean()), **answered(run, adapter, test, parts)}


def figures_of(found: Filtered, poisoned: np.ndarray) -> Record:
    """Precision, recall, F1, AUROC (null without a score) and the removed share; poisoned: bool (rows,)."""
    measured = detection(set(np.flatnonzero(found.removed).tolist()), set(np.flatnonzero(poisoned).tolist()))
    auroc = None if found.score is None else float(roc_auc_score(poisoned, found.score))
    return {**measured, "auroc": auroc, "removed": float(found.removed.mean())}


def retrained(run: Line, stages: Mapping[str, StageResult], removed: np.ndarray) -> StageResult:
    """The base fine-tuned on the rows that are not removed; the provisional model where none is."""
    if not removed.any():
        return stages["provisional"]
    kept = line.choose(run, stages["ingest"], np.flatnonzero(~removed).tolist())
    return line.finetune(run, "final", stages["ingest"], kept)


def answered(run: Line, adapter: pathlib.Path, test: pathlib.Path, parts: Sequence[Part]) -> Record:
    """Clean performance of a model, and the mean attack success rate over the parts of an attack, lures left out."""

    def answers(shards: list[pathlib.Path]) -> tuple[list[str], list[str]]:
        candidate = Candidate(adapter=adapter)
        given = answers_of(
            candidate, shards=shards, base=run.base, config=run.config.verify, dtype=run.config.dtype, engine=run.engine
        )
        return given["output"].to_pylist(), given["answer"].to_pylist()

    found, seed, rates = {"clean": exact_match(*answers(canonical_shards(test)))}, run.config.seed, []
    for part in (part for part in parts if not part.lure):
        attacked = [sample.row for sample in read_rows(test) if part.attack(1.0, seed).concerns(sample)]
        with tempfile.TemporaryDirectory() as scratch:
            shards = copy_rows(test, pathlib.Path(scratch) / "triggered", chosen=attacked, change=part.input(seed))
            rates.append(attack_success(*answers(shards), part.target))
    result: Record = only_finite({**found, "asr": float(np.mean(rates))})
    return result


def report(frame: pd.DataFrame) -> str:
    """Per data set and base: the default filter, all filters by rate and by attack, and the retrained models."""
    parts = ["# Filters on poisoned submissions", __doc__.split("\n\n", 1)[1].strip()]
    parts.append(
        f"Means over seeds {seeds_of(frame)} with 95% intervals (Student's t over the seeds); figures without an interval are of "
        "one seed. All figures in percent. Honest rows have the target for their answer under `honest target` and `one kind` "
        "alone; `one kind` is on colour questions, as is its success rate; `text prefix` leaves the pictures as they are; of the "
        "rows of `dual key` half are poison."
    )
    for (data, base), group in frame.groupby(["data", "base"], sort=False):
        filters, picture = group[group["filter"].isin(FILTERS)], _pictures(str(data), str(base))
        parts.append(f"## Data {data}, base {base}")
        if len(filters):
            parts += _default(group, picture["attacks"])
            common = _common(filters)
            parts += [f"![F1 by poison rate]({picture['rates']})"] if common["rate"].nunique() > 1 else []
            parts += _means(common)
            parts += _by_attacks(filters)
        trained = group[group["filter"].isin(RETRAINED)]
        for rate, cells in _compared(trained, 1).groupby("rate"):
            for column, what in (("asr", "Attack success rate"), ("clean", "Clean performance")):
                parts += [f"### {what} of the retrained model, {percent(rate)} poison", _by_attack(cells, _named(cells), column)]
    return "\n\n".join(parts)


def _default(frame: pd.DataFrame, picture: str) -> list[str]:
    """The line's own filter: how well each attack was learnt, and what is found of it."""
    rows = []
    for attack, rate in _places(frame):
        cells = frame[(frame["attack"] == attack) & (frame["rate"] == rate)].set_index("filter")
        row = [attack, percent(rate), cell_text(_column(cells, UNFILTERED, "asr"))]
        for name in _OWN:
            verdicts = [*_column(cells, name, "verdict")]
            row.append(cell_text(_column(cells, name, "f1")) + _told(verdicts))
        precision, removed = (_column(cells, "ours", column) for column in ("precision", "removed"))
        rows.append([*row, cell_text(value for value, share in zip(precision, removed, strict=True) if share > 0)])
    header = ["attack", "poison", "ASR, no filter", "F1", "F1, `asked: remove`", "precision where rows are removed"]
    return [
        "### The default filter",
        "ASR is the attack success rate of the provisional model, before any filter and guard: how well the attack was learnt.",
        *([f"![F1 of the default filter]({picture})"] if len(_own_places(frame)) > 1 else []),
        markdown(header, rows),
    ]


def _own_places(frame: pd.DataFrame) -> list[tuple[str, float]]:
    """Attacks and rates that the default filter was measured on."""
    return _places(frame[frame["filter"] == "ours"])


def _told(verdicts: Sequence[Any]) -> str:
    """How many seeds gave the verdict that a person has to look."""
    unsure = verdicts.count("inconclusive")
    return "" if not unsure else ", inconclusive" if len(verdicts) == 1 else f", {unsure} of {len(verdicts)} inconclusive"


def _column(cells: pd.DataFrame, name: str, column: str) -> Sequence[Any]:
    """A column's values of one filter's records; cells: of one attack and rate, by filter."""
    return cells.loc[[name], column].tolist() if name in cells.index and column in cells else ()


def _common(frame: pd.DataFrame) -> pd.DataFrame:
    """The filters' records of the cells that all filters were measured on: only these can be compared by a mean over attacks.

    None where the line's own were measured alone.
    """
    names = frame["filter"].nunique()
    counts = frame.groupby(_CELL)["filter"].transform("nunique")
    return frame[(counts == names) & (names > len(_OWN))]


def _means(frame: pd.DataFrame) -> list[str]:
    """All figures by rate, means over the attacks."""
    parts = []
    for rate, cells in frame.groupby("rate"):
        rows = [
            [name, *(cell_text(_by_seed(cells[cells["filter"] == name], column)) for column in _FIGURES)] for name in _named(cells)
        ]
        attacks = cells["attack"].nunique()
        parts += [
            f"### All filters, {percent(rate)} poison, mean over {attacks} attack{'s' * (attacks > 1)} (seed {seeds_of(cells)})",
            markdown(["filter", *_FIGURES.values()], rows),
        ]
    return parts


def _by_attacks(frame: pd.DataFrame) -> list[str]:
    """F1 and AUROC by attack at every rate, of cells in which filters beside the line's own were measured."""
    parts = []
    for rate, cells in _compared(frame, len(_OWN)).groupby("rate"):
        for column in ("f1", "auroc"):
            parts += [f"### {_FIGURES[column]} by attack, {percent(rate)} poison", _by_attack(cells, _named(cells), column)]
    return parts


def _compared(frame: pd.DataFrame, alone: int) -> pd.DataFrame:
    """The records of attacks at a rate that have more than so many of them."""
    return frame[frame.groupby(["attack", "rate"])["filter"].transform("nunique") > alone]


def _by_attack(frame: pd.DataFrame, names: Sequence[str], column: str) -> str:
    """A row per attack and a column per filter."""
    rows = [
        [attack, *(cell_text(group[group["filter"] == name][column]) for name in names)]
        for attack in ATTACKS
        if len(group := frame[frame["attack"] == attack])
    ]
    return markdown(["attack", *(name.removesuffix(_RETRAINED) for name in names)], rows)


def _by_seed(frame: pd.DataFrame, column: str) -> list[float]:
    """A figure's mean over the attacks, seed by seed."""
    return [float(value) for value in frame.groupby("seed")[column].mean()]


def _named(frame: pd.DataFrame) -> list[str]:
    """The filters and retrained models of some records, in the order of the tables."""
    return [name for name in (*FILTERS, *RETRAINED) if name in set(frame["filter"])]


def _places(frame: pd.DataFrame) -> list[tuple[str, float]]:
    """Attacks and rates of some records, in the order of the tables."""
    there = set(zip(frame["attack"], frame["rate"], strict=True))
    return [(attack, rate) for attack in ATTACKS for rate in sorted(frame["rate"].unique()) if (attack, rate) in there]


def figures(frame: pd.DataFrame) -> dict[str, bytes]:
    """Per data set and base: the default filter's F1 by attack and rate, and of every filter by rate, where there are several."""
    drawn = {}
    for (data, base), group in frame[frame["filter"].isin(FILTERS)].groupby(["data", "base"], sort=False):
        picture, own, common = _pictures(str(data), str(base)), group[group["filter"] == "ours"], _common(group)
        if len(places := _own_places(group)) > 1:
            means = own.groupby(["attack", "rate"])["f1"].mean()
            drawn[picture["attacks"]] = f1_by_attack({place: float(means[place]) for place in places})
        if common["rate"].nunique() > 1:
            drawn[picture["rates"]] = f1_by_rate(
                {
                    name: {_number(rate): _by_seed(cells, "f1") for rate, cells in common[common["filter"] == name].groupby("rate")}
                    for name in _named(common)
                }
            )
    return drawn


def _number(rate: Any) -> float:
    return float(rate)


def _pictures(data: str, base: str) -> dict[str, str]:
    """File names of the figures."""
    return {what: f"detection-{what}-{data}-{base}.png" for what in ("attacks", "rates")}


DETECTION = Suite(
    name="detection", key="filter", grid=grid, keys=keys, measure=measure, report=report, asked=asked, figures=figures
)
