"""Suite `cost`: seconds and peak memory of every stage of the line, against one plain fine-tune of the same rows.

A cell is a submission of so many rows, clean or poisoned, that goes through the whole line in a store of its own, on Ray with so
many workers of one thread each. Seconds are by the clock, and of the processors over all processes of the run (Ray's own and the
driver among them), which other load on the machine changes less. Memory is the most that these processes held at once, as the sum
of their proportional set sizes, looked at four times a second; files that are mapped into memory count, although the system can
take those back. `engine` is Ray's start and end. The plain fine-tune is the provisional one: the same function on all rows as they
were submitted, which is all that `byesight finetune` does after it has read them; Ray's start is in neither. Prefect is left out:
its server and pages, and the start of Python.
"""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd

from benchmarks.attacks import ATTACKS, poison_rows
from benchmarks.bench import Cell, Record, Setting, Suite, cell_text, markdown, run_config, seeds_of
from benchmarks.data import make_data
from benchmarks.usage import Usage, Used
from flows import line
from flows.engines import LazyEngine
from flows.line import STAGES, open_line
from flows.poison import SUBMISSION
from flows.report import Results
from flows.sanitize import deliver_results
from pipeline.config import EngineConfig, RunConfig

SIZES = (1000, 3000, 10_000)
"""Rows of the submissions, where `--rows` names none."""
WORKERS = (1, 2)
SUBMISSIONS = ("poisoned", "clean")
ATTACK, RATE = "badnet", 0.1
ENGINE, PLAIN, WHOLE = "engine", "plain fine-tune", "whole line"
RECORDS = (ENGINE, *STAGES, PLAIN, WHOLE)
"""In the order of the tables."""
_QUICK = (60,)
_PLACE = ["rows", "workers", "submission", "data", "base", "seed"]
_FIGURES = ("seconds", "processor", "memory")
_GIB = 2**30


def grid(setting: Setting, seeds: Sequence[int]) -> list[Cell]:
    """Every size with every number of workers, seed by seed, the smallest first; in miniature one cell."""
    sizes = (setting.rows,) if setting.rows else _QUICK if setting.quick else SIZES
    workers, submissions = (WORKERS, SUBMISSIONS) if not setting.quick else (WORKERS[:1], SUBMISSIONS[:1])
    places = [(seed, rows, number, name) for seed in seeds for rows in sizes for number in workers for name in submissions]
    data = pathlib.Path(setting.data).name
    return [
        Cell(fields=dict(zip(_PLACE, (rows, number, name, data, setting.base.name, seed), strict=True)))
        for seed, rows, number, name in places
    ]


def keys(_cell: Cell, _setting: Setting) -> Sequence[str]:
    """The stages, the fine-tune to compare with, and the whole."""
    return RECORDS


def measure(cell: Cell, setting: Setting, folder: pathlib.Path, names: Sequence[str]) -> Iterator[Record]:
    """Sanitize a submission in an empty store; then one record per stage."""
    seed, rows = int(cell.fields["seed"]), int(cell.fields["rows"])
    place = setting.out / "data" / f"{cell.fields['data']}-{rows}-{seed}"
    data = make_data(setting.data, place, rows=rows, test_rows=setting.test_rows, seed=seed)
    submission = data.train
    if cell.fields["submission"] == "poisoned":
        poison_rows(data.train, ATTACKS[ATTACK], folder / "poisoned", rate=RATE, seed=seed)
        submission = folder / "poisoned" / SUBMISSION
    fresh = folder / "run"
    shutil.rmtree(fresh, ignore_errors=True)  # of a run that was killed
    used = sanitized(submission, setting.base, configuration(setting, seed, int(cell.fields["workers"])), fresh)
    shutil.rmtree(fresh)
    for name in names:
        one = used[name]
        yield {"stage": name, "seconds": round(one.seconds, 3), "processor": round(one.processor, 3), "memory": one.memory}


def configuration(setting: Setting, seed: int, workers: int) -> RunConfig:
    """The bench's configuration, but on Ray."""
    return run_config(setting, seed).model_copy(update={"engine": EngineConfig(kind="ray", workers=workers, threads=1)})


def sanitized(submission: pathlib.Path, base: pathlib.Path, config: RunConfig, place: pathlib.Path) -> dict[str, Used]:
    """Take a submission through the whole line.

    Args:
        submission: what is sanitized.
        base: folder of the base model.
        config: of the run, its engine too.
        place: a new folder, for the stage results and the delivery.

    Returns:
        What each of `RECORDS` took.
    """
    with Usage() as usage, LazyEngine(config.engine) as engine:
        with usage.stage(ENGINE):
            engine.open()
        run = open_line(submission, base, config, place / "store", engine)
        with usage.stage("ingest"):
            ingested = line.ingest(run)
        with usage.stage("provisional"):
            provisional = line.finetune(run, "provisional", ingested)
        with usage.stage("extract"):
            extracted = line.extract(run, ingested, provisional)
        with usage.stage("score"):
            scored = line.score(run, extracted)
        with usage.stage("confirm"):
            confirmed = line.confirm(run, ingested=ingested, provisional=provisional, extracted=extracted, scored=scored)
        with usage.stage("cluster"):
            clustered = line.cluster(run, ingested=ingested, scored=scored, confirmed=confirmed)
        with usage.stage("final"):
            final = line.final(run, ingested=ingested, provisional=provisional, clustered=clustered)
        with usage.stage("guard"):
            guarded = line.guard(run, ingested, clustered, final)
        with usage.stage("verify"):
            verified = line.verify(
                run, ingested=ingested, provisional=provisional, clustered=clustered, final=final, guarded=guarded
            )
        with usage.stage(ENGINE):
            engine.close()
        results = Results.of(ingested, provisional, extracted, scored, confirmed, clustered, final, guarded, verified)
        with usage.stage("delivery"):
            deliver_results(run, results, place / "delivery")
    used = usage.stages
    whole = Used(
        seconds=sum(one.seconds for one in used.values()),
        processor=sum(one.processor for one in used.values()),
        memory=max(one.memory for one in used.values()),
    )
    return {**used, PLAIN: used["provisional"], WHOLE: whole}


def report(frame: pd.DataFrame) -> str:
    """Per base the line against one plain fine-tune, how it grows with the rows, and all stages."""
    parts = ["# What the line costs", __doc__.split("\n\n", 1)[1].strip()]
    parts.append(f"Means over seeds {seeds_of(frame)} with 95% intervals (Student's t). Poisoned: {ATTACK}, {RATE:.0%}.")
    for (data, base), cells in _against(frame, "stage", PLAIN, "ratio").groupby(["data", "base"], sort=False):
        sizes = sorted(cells["rows"].unique())
        group = _against(cells, "rows", sizes[0], "growth")
        whole = group[group["stage"] == WHOLE]
        parts += [f"## Data {data}, base {base}", "### The whole line, in plain fine-tunes of the same rows"]
        parts.append(_by_size(whole, sizes, {"seconds": "ratio_seconds", "processor": "ratio_processor"}))
        if len(sizes) > 1:
            parts += [f"### The whole line, as multiples of what {sizes[0]} rows take"]
            parts.append(_by_size(whole, sizes[1:], {"seconds": "growth_seconds", "memory": "growth_memory"}))
        for (workers, submission), one in group.groupby(["workers", "submission"]):
            parts += [f"### {str(submission).capitalize()}, workers: {workers}", _by_stage(one, sizes)]
    return "\n\n".join(parts)


def _against(frame: pd.DataFrame, field: str, value: Any, name: str) -> pd.DataFrame:
    """Each figure over that of the record that differs in one field alone, as columns NAME_FIGURE."""
    others = [column for column in ("stage", *_PLACE) if column != field]
    reference = frame[frame[field] == value].set_index(others)[list(_FIGURES)]
    known = frame.join(reference.rename(columns=lambda column: f"reference_{column}"), on=others)
    return frame.assign(**{f"{name}_{column}": known[column] / known[f"reference_{column}"] for column in _FIGURES})


def _by_size(frame: pd.DataFrame, sizes: Sequence[int], columns: dict[str, str]) -> str:
    """A row per submission and number of workers; for each size the columns, by what they are called."""
    header = ["submission", "workers", *(f"{rows} rows {what}".strip() for rows in sizes for what in columns)]
    rows = []
    for (submission, workers), cells in frame.groupby(["submission", "workers"]):
        figures = (_figure(cells[cells["rows"] == size][column]) for size in sizes for column in columns.values())
        rows.append([str(submission), str(workers), *figures])
    return markdown(header, rows)


def _by_stage(frame: pd.DataFrame, sizes: Sequence[int]) -> str:
    """A row per stage; for each size seconds by the clock and of the processors, either in plain fine-tunes too, and memory."""
    columns = ("seconds", "plain fine-tunes", "processor seconds", "plain fine-tunes", "GiB")
    rows = []
    for stage in RECORDS:
        cells = [frame[(frame["stage"] == stage) & (frame["rows"] == size)] for size in sizes]
        rows.append([stage, *(text for one in cells for text in _stage_texts(one))])
    return markdown(["stage", *(f"{rows} rows, {what}" for rows in sizes for what in columns)], rows)


def _stage_texts(cells: pd.DataFrame) -> Iterator[str]:
    for column in ("seconds", "processor"):
        yield cell_text(cells[column], share=False)
        yield _figure(cells[f"ratio_{column}"])
    yield _figure(cells["memory"] / _GIB)


def _figure(values: pd.Series[float]) -> str:
    return cell_text(values, share=False, digits=2)


COST = Suite(name="cost", key="stage", grid=grid, keys=keys, measure=measure, report=report, rows=0, timed=True)
