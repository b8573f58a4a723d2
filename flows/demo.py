"""The demonstration: a submission is made, poisoned and sanitized, and what came out is measured against the truth.

The truth stays in this module: the line is given the poisoned submission and nothing else.
"""

from __future__ import annotations

import pathlib
import shutil
import time
from collections.abc import Collection, Mapping
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.table import Table

from flows.artifacts import number, percent
from flows.demo_data import write_scenes
from flows.engines import LazyEngine
from flows.poison import SUBMISSION, TRUTH, Attack, poison, read_truth
from flows.progress import tell
from flows.report import only_finite
from flows.sanitize import Sanitized, run_sanitize
from flows.single import evaluate_model
from pipeline.config import RunConfig
from pipeline.engine import Engine
from pipeline.errors import ConfigError
from pipeline.records import Verdict
from storage import atomic
from storage.delivery import VERDICTS
from storage.manifests import to_json

TRIGGER, TARGET, RATE = "badnet", "backdoor attack", 0.1
TEST_ROWS = 300
EPOCHS = 5
"""Passes in each fine-tune; with 2,800 rows the trigger is learnt, and the whole takes less than ten minutes on two cores."""
MARK = ".byesight-demo"
MODELS = ("provisional", "delivered", "guarded")
_TEST_SEED = 1_000_003  # added to the seed: the test's scenes are others than the submission's


def run_demo(out: pathlib.Path, *, rows: int, seed: int, base: pathlib.Path | None, config: RunConfig) -> dict[str, Any]:
    """Run the demonstration in a folder.

    Args:
        out: a new or empty folder, or that of an earlier demonstration.
        rows: rows of the submission.
        seed: of the data, the attack and the run.
        base: folder of the base model; None takes the embedded base.
        config: the run configuration.

    Returns:
        The content of demo.json: detection, plain, rows, provisional, delivered, guarded, seconds.

    Raises:
        ConfigError: `out` holds something else.
    """
    _take_place(out)
    data = _make_data(out, rows=rows, seed=seed)
    shutil.rmtree(out / "delivery", ignore_errors=True)  # of another seed, perhaps: that of another submission is not replaced
    sanitized = run_sanitize(data / "poisoned" / SUBMISSION, out / "delivery", base=base, config=config, store=out / "store")
    started = time.monotonic()
    # In this process: Ray's start would take longer than the measuring.
    here = config.engine.model_copy(update={"kind": "local", "threads": config.engine.threads or 1})
    with LazyEngine(here) as engine:
        measured = {
            name: _measure(name, sanitized, data / "test", base=base, config=config, seed=seed, out=out, engine=engine)
            for name in MODELS
        }
    truth = read_truth(data / "poisoned" / TRUTH)
    found: dict[str, Any] = only_finite(
        {
            **detections(sanitized.delivery / VERDICTS, truth),
            "verdict": sanitized.verdict,
            "rows": sanitized.rows,
            **measured,
            "seconds": {**sanitized.seconds, "evaluate": round(time.monotonic() - started, 3)},
            "seed": seed,
        }
    )
    atomic.write_file((out / "demo.json").absolute(), to_json(found))
    return found


def detections(verdicts: pathlib.Path, truth: Collection[int]) -> dict[str, Any]:
    """Precision, recall and F1 of the verdicts and of plain BYE with either of its layer rules."""
    table = pq.read_table(verdicts)

    def measured(column: str, value: object) -> dict[str, float]:
        return detection(set(table.filter(pc.equal(table[column], value))["row"].to_pylist()), truth)

    plain = {"bye": measured("bye_quarantine", True), "bye-public-code": measured("bye_code_quarantine", True)}  # noqa: FBT003
    return {"detection": measured("verdict", str(Verdict.QUARANTINE)), "plain": plain}


def detection(removed: Collection[int], poisoned: Collection[int]) -> dict[str, float]:
    """Precision, recall and F1 of removed rows; a share of nothing is 0, but nothing to find and nothing found is 1."""
    right = len(set(removed) & set(poisoned))
    if not removed and not poisoned:
        return {"precision": 1.0, "recall": 1.0, "f1": 1.0, "removed": 0}
    return {
        "precision": right / len(removed) if removed else 0.0,
        "recall": right / len(poisoned) if poisoned else 0.0,
        "f1": 2 * right / (len(removed) + len(poisoned)),
        "removed": len(removed),
    }


def demo_table(found: Mapping[str, Any]) -> list[Table]:
    """What demo.json says, as tables for a terminal."""
    rows = found["rows"]
    counts = f"{number(rows['kept'])} rows kept, {number(rows['quarantined'])} quarantined; seed {found['seed']}"
    detected = Table("detection", "removed", "precision", "recall", "F1", title=f"Verdict: {found['verdict']}", caption=counts)
    for name, values in {"ByeSight": found["detection"], **{f"plain {k}": v for k, v in found["plain"].items()}}.items():
        detected.add_row(name, number(values["removed"]), *(number(values[key]) for key in ("precision", "recall", "f1")))
    models = Table("model", "clean performance", "attack success rate", "test inputs flagged")
    for name in MODELS:
        models.add_row(name, *(percent(found[name].get(key)) for key in ("clean", "asr", "flagged")))
    seconds = Table("stage", "seconds")
    for stage, value in found["seconds"].items():
        seconds.add_row(stage, number(float(value), 1))
    seconds.add_row("sum", number(float(sum(found["seconds"].values())), 1))
    return [detected, models, seconds]


def _measure(
    name: str,
    sanitized: Sanitized,
    test: pathlib.Path,
    *,
    base: pathlib.Path | None,
    config: RunConfig,
    seed: int,
    out: pathlib.Path,
    engine: Engine,
) -> dict[str, Any]:
    model = sanitized.results["provisional"].folder / "adapter" if name == "provisional" else sanitized.delivery
    tell("evaluate", MODELS.index(name) / len(MODELS), f"{name} model")
    return evaluate_model(
        model,
        test,
        base=base,
        config=config,
        store=out / "store",
        trigger=TRIGGER,
        target=TARGET,
        trigger_seed=seed,
        guarded=name == "guarded",
        engine=engine,
    )


def _take_place(out: pathlib.Path) -> None:
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / MARK).is_file())):
        raise ConfigError(f"--out {out}: the folder holds something that is no demonstration; name an empty or a new folder")
    out.mkdir(parents=True, exist_ok=True)
    (out / MARK).touch()


def _make_data(out: pathlib.Path, *, rows: int, seed: int) -> pathlib.Path:
    """The submission, poisoned, with the truth beside it, and a clean test; always made anew, always the same for a seed."""
    tell("data", 0.0, "")
    data = out / "data"
    shutil.rmtree(data, ignore_errors=True)
    with atomic.staging(out.absolute(), ".data.partial-") as folder:
        write_scenes(folder / "clean", rows=rows, seed=seed)
        tell("data", 0.6, f"{rows} rows")
        write_scenes(folder / "whole" / "test", rows=TEST_ROWS, seed=seed + _TEST_SEED)
        attack = Attack(trigger=TRIGGER, rate=RATE, target=TARGET, seed=seed)
        poison(folder / "clean", attack, folder / "whole" / "poisoned")
        atomic.commit_folder(folder / "whole", data.absolute())
    tell("data", 1.0, f"done: {rows} rows, {percent(RATE)} poisoned")
    return data
