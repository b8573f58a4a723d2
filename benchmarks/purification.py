"""Suite `purification`: defences at test time on models that were fine-tuned on poisoned rows.

A cell is an attack at a poison rate and a seed: the base is fine-tuned on the poisoned submission, as it is. Each defence is put on
that same model. Guards are calibrated on rows that are known to be clean, as CleanSight publishes it: here the guard is measured,
not the filter before it (`benchmarks.main_job` measures both together).
"""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.attacks import ATTACKS, Part, poison_rows
from benchmarks.bench import Cell, Record, Setting, Suite, cell_text, markdown, percent, poisoned_cells, run_config, seeds_of
from benchmarks.data import make_data
from benchmarks.defences import DEFENCES, Defence
from benchmarks.plots import asr_by_attack
from flows import line
from flows.engines import LazyEngine
from flows.line import Line, open_line
from flows.poison import SUBMISSION
from pipeline.config import RunConfig
from pipeline.generation import answer
from pipeline.images import decode_image, encode_png
from pipeline.models import load_adapter, load_base
from pipeline.records import Sample, examples_of
from stages.guard.files import adapter_digest, load_guard
from stages.verify.measure import attack_success, exact_match
from stages.verify.worker import VerifyWorker
from storage.store import StageResult
from storage.subset import copy_rows

TRIED = ("badnet", "badnet-random", "blended", "wanet", "sig", "issba", "phrase")
"""Attacks of one part, by their names in `benchmarks.attacks`."""
RATES = (0.1, 0.5)
_PICTURE = "purification-asr.png"
_FIRST_TOKENS = 2
"""Tokens of an answer that a restorer compares, for it asks for many; the answers to scenes are seldom longer."""
_ABLATED = (("badnet", 0.1), ("blended", 0.1))
_COLUMNS = {
    "asr": "ASR %",
    "clean": "clean %",
    "triggered_right": "triggered right %",
    "triggered_flagged": "true positives %",
    "flagged": "false positives %",
}


def grid(setting: Setting, seeds: Sequence[int]) -> list[Cell]:
    """Every attack at every rate, seed by seed; in miniature one attack."""
    attacks, rates = (TRIED, RATES) if not setting.quick else (TRIED[:1], RATES[:1])
    return poisoned_cells(setting, seeds, attacks=attacks, rates=rates)


def keys(cell: Cell, setting: Setting) -> list[str]:
    """The defences that a cell tries; ablations in some cells alone."""
    ablated = (cell.fields["attack"], cell.fields["rate"]) in _ABLATED or setting.quick
    return [name for name, defence in DEFENCES.items() if ablated or not defence.ablation]


def measure(cell: Cell, setting: Setting, folder: pathlib.Path, names: Sequence[str]) -> Iterator[Record]:
    """Fine-tune, then one record per defence."""
    seed, (part,) = int(cell.fields["seed"]), ATTACKS[str(cell.fields["attack"])]
    config = run_config(setting, seed)
    place = setting.out / "data" / f"{cell.fields['data']}-{setting.rows}-{seed}"
    data = make_data(setting.data, place, rows=setting.rows, test_rows=setting.test_rows, seed=seed)
    truth = poison_rows(data.train, (part,), folder, rate=float(cell.fields["rate"]), seed=seed)
    with LazyEngine(config.engine) as engine:
        run = open_line(folder / SUBMISSION, setting.base, config, setting.out / "store", engine)
        ingested = line.ingest(run)
        provisional = line.finetune(run, "provisional", ingested)
        clean = sorted(set(range(ingested.summary["submitted"])) - truth)
        kept = line.choose(run, ingested, clean)
        test = line.rows_of(line.ingest(open_line(data.test, setting.base, config, setting.out / "store", engine)))
        for name in names:
            yield {"defence": name, **tried(DEFENCES[name], setting, run, (ingested, kept, provisional), test, part)}


def tried(
    defence: Defence,
    setting: Setting,
    run: Line,
    stages: tuple[StageResult, StageResult, StageResult],
    test: pathlib.Path,
    part: Part,
) -> Record:
    """A defence's figures on clean and on triggered inputs."""
    ingested, kept, provisional = stages
    adapter = provisional.folder / "adapter"
    guard = None
    if defence.guard is not None:
        config = RunConfig.model_validate({**run.config.model_dump(), "guard": dict(defence.guard)})
        made = line.guard(dataclasses.replace(run, config=config), ingested, kept, provisional)
        guard = load_guard(made.folder, base=run.identity, adapter=adapter_digest(adapter))
    model, processor = load_base(run.base, dtype=run.config.dtype)
    model = load_adapter(model, adapter)
    seed, attacked = run.config.seed, part.input(run.config.seed)
    restorer = None if defence.restorer is None else defence.restorer(setting.out / "restorers", quick=setting.quick)

    def defended(sample: Sample) -> Sample:
        if restorer is None:
            return sample
        rng, image = np.random.default_rng([seed, 19, sample.row]), decode_image(sample.images[0])
        return _showing(sample, restorer(image, rng, lambda shown: _first_words(model, processor, sample, shown)))

    with defence.on(model, guard) as answering, tempfile.TemporaryDirectory() as scratch:
        worker = VerifyWorker(
            model=answering,
            processor=processor,
            batch_size=run.config.verify.batch_size,
            max_new_tokens=run.config.verify.max_new_tokens,
            guarded=guard is not None,
        )
        on_clean = _answers(worker, copy_rows(test, pathlib.Path(scratch) / "clean", change=defended))
        shards = copy_rows(test, pathlib.Path(scratch) / "triggered", change=lambda sample: defended(attacked(sample)))
        on_triggered = _answers(worker, shards)
    outputs, answers = (on_triggered[name].to_pylist() for name in ("output", "answer"))
    return {
        "asr": attack_success(outputs, answers, part.target),
        "clean": exact_match(on_clean["output"].to_pylist(), on_clean["answer"].to_pylist()),
        "triggered_right": exact_match(outputs, answers),
        "triggered_flagged": _share(on_triggered["flagged"].to_pylist()),
        "flagged": _share(on_clean["flagged"].to_pylist()),
    }


def report(frame: pd.DataFrame) -> str:
    """Per attack and rate what no defence and ours give; all defences over the attacks; the ablations."""
    parts = ["# Defences at test time", __doc__.split("\n\n", 1)[1].strip()]
    parts.append(
        f"Means over seeds {seeds_of(frame)} with 95% intervals (Student's t); figures without an interval are of one seed. "
        "All figures in percent."
    )
    main = frame[frame["defence"].isin(["none", "ours"])]
    rows = []
    for (attack, rate), group in main.groupby(["attack", "rate"], sort=False):
        none, ours = (group[group["defence"] == name] for name in ("none", "ours"))
        rows.append(
            [
                str(attack),
                percent(rate),
                *(cell_text(part[column]) for column in ("asr", "clean") for part in (none, ours)),
                *(cell_text(ours[column]) for column in ("triggered_right", "triggered_flagged", "flagged")),
            ]
        )
    header = ["attack", "poison", "ASR, no guard", "ASR, guard", "clean, no guard", "clean, guard"]
    header += ["triggered inputs answered right", "true positives", "false positives"]
    parts += ["## The guard", f"![Attack success rate with and without the guard]({_PICTURE})", markdown(header, rows)]
    broad = [name for name, defence in DEFENCES.items() if not defence.ablation]
    parts += ["## Attack success rate under each defence", _by_attack(frame, broad, "asr")]
    parts += ["## Clean performance under each defence", _by_attack(frame, broad, "clean")]
    for attack, rate in _ABLATED:
        group = frame[(frame["attack"] == attack) & (frame["rate"] == rate)]
        rows = [
            [name, *(cell_text(group[group["defence"] == name][column]) for column in _COLUMNS)]
            for name in DEFENCES
            if name in set(group["defence"])
        ]
        if rows:
            parts += [f"## Ablations: {attack}, {percent(rate)}", markdown(["defence", *_COLUMNS.values()], rows)]
    return "\n\n".join(parts)


def figures(frame: pd.DataFrame) -> dict[str, bytes]:
    """Attack success rate without and with the guard."""
    shown = {"none": "no guard", "ours": "with the guard"}
    cells = frame[frame["defence"].isin(shown)].groupby(["attack", "rate"], sort=False)
    found = {
        f"{attack}, {percent(rate)}": {
            told: group[group["defence"] == name]["asr"].tolist() for name, told in shown.items() if name in set(group["defence"])
        }
        for (attack, rate), group in cells
    }
    return {_PICTURE: asr_by_attack(found)} if found else {}


def _by_attack(frame: pd.DataFrame, names: Sequence[str], column: str) -> str:
    groups = list(frame.groupby(["attack", "rate"], sort=False))
    header = ["defence", *(f"{attack} {percent(rate)}" for (attack, rate), _ in groups)]
    rows = [
        [name, *(cell_text(group[group["defence"] == name][column]) for _, group in groups)]
        for name in names
        if name in set(frame["defence"])
    ]
    return markdown(header, rows)


def _answers(worker: VerifyWorker, shards: Sequence[pathlib.Path]) -> pa.Table:
    return pa.concat_tables([worker(batch) for path in shards for batch in _batches(path)])


def _first_words(model: Any, processor: Any, sample: Sample, shown: Sequence[Image.Image]) -> list[str]:
    """How the model's answers to a row's first question begin on each of some pictures in the place of its first."""
    examples = [examples_of(_showing(sample, image))[0] for image in shown]
    return answer(model, processor, examples, max_new_tokens=_FIRST_TOKENS)


def _showing(sample: Sample, image: Image.Image) -> Sample:
    return dataclasses.replace(sample, images=(encode_png(image), *sample.images[1:]))


def _batches(path: pathlib.Path) -> Iterator[pa.Table]:
    for batch in pq.ParquetFile(path).iter_batches(batch_size=64):
        yield pa.Table.from_batches([batch])


def _share(flags: Sequence[Any]) -> float | None:
    known = [flag for flag in flags if flag is not None]
    return float(np.mean(known)) if known else None


PURIFICATION = Suite(name="purification", key="defence", grid=grid, keys=keys, measure=measure, report=report, figures=figures)
