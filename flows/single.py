"""Fine-tune or evaluate alone, without the line and without Prefect; the same stage code and the same store."""

from __future__ import annotations

import json
import pathlib
import shutil
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from flows import line
from flows.engines import LazyEngine
from flows.line import open_line, rows_of
from flows.progress import progress_of, tell
from pipeline.config import RunConfig, VerifyConfig
from pipeline.engine import Engine
from pipeline.errors import ConfigError, ModelError
from pipeline.models import ADAPTER_CONFIG, EMBEDDED_BASE, load_processor
from pipeline.prompts import token_count
from pipeline.triggers import make_trigger
from storage import atomic
from storage.delivery import ADAPTER


def finetune_plain(
    submission: pathlib.Path,
    out: pathlib.Path,
    *,
    base: pathlib.Path | None,
    config: RunConfig,
    store: pathlib.Path,
    rows: pathlib.Path | None,
) -> dict[str, Any]:
    """Fine-tune on a submission as it is, or on some of its rows; no sanitation.

    Args:
        submission: what is trained on.
        out: the adapter folder, new or empty; loss.jsonl lies in it too.
        base: folder of the base model; None takes the embedded base.
        config: the run configuration.
        store: folder of the stage results.
        rows: a file that names the rows to train on; see `read_rows`.

    Returns:
        The summary of the fine-tune.

    Raises:
        ByeSightError: as the ingest and finetune stages; ConfigError if `out` is taken.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out}: there is something already; name an empty or a new folder")
    with LazyEngine(config.engine) as engine:
        run = open_line(submission, base or EMBEDDED_BASE, config, store, engine)
        ingested = line.ingest(run)
        chosen = None if rows is None else line.choose(run, ingested, read_rows(rows))
        result = line.finetune(run, "provisional", ingested, chosen)
    with atomic.staging(out.absolute().parent, f".{out.name}.partial-") as folder:
        whole = folder / "whole"
        shutil.copytree(result.folder / "adapter", whole)
        shutil.copyfile(result.folder / "loss.jsonl", whole / "loss.jsonl")
        if not atomic.commit_folder(whole, out.absolute()):
            raise ConfigError(f"--out {out}: another process has written there meanwhile")
    return result.summary


def read_rows(path: pathlib.Path) -> list[int]:
    """Row positions from a file: Parquet with a column `row`, or lines that are numbers or JSON objects with `row`.

    Raises:
        ConfigError: the file can't be read that way, or names no row.
    """
    try:
        if path.suffix == ".parquet":
            found = pq.read_table(path, columns=["row"])["row"].to_pylist()
        else:
            lines = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines() if text.strip()]
            found = [entry["row"] if isinstance(entry, dict) else entry for entry in lines]
        rows = sorted({int(row) for row in found if not isinstance(row, bool)})
    except (OSError, ValueError, LookupError, TypeError, pa.ArrowException) as error:
        raise ConfigError(f"--rows {path}: not a list of rows: {error}") from error
    if not rows or rows[0] < 0:
        raise ConfigError(f"--rows {path}: {'a row below 0' if rows else 'it names no row'}")
    return rows


def evaluate_model(
    model: pathlib.Path,
    data: pathlib.Path,
    *,
    base: pathlib.Path | None,
    config: RunConfig,
    store: pathlib.Path,
    trigger: str | None = None,
    target: str | None = None,
    trigger_seed: int = 0,
    guarded: bool = True,
    engine: Engine | None = None,
) -> dict[str, Any]:
    """Clean performance of a model on a submission, and with a trigger its attack success rate.

    Args:
        model: a delivery, an adapter folder, or a base model.
        data: a submission whose answers are right.
        base: folder of the base of an adapter; None takes the embedded base.
        config: the run configuration.
        store: folder of the stage results.
        trigger: a name of `pipeline.triggers`; None measures clean performance alone.
        target: what the attack wants to read; needed with a trigger.
        trigger_seed: the seed that the poison was made with: it gives the trigger's pattern.
        guarded: use the guard that lies with the adapter, if there is one.
        engine: an engine to use; None opens one for the call.

    Returns:
        What `stages.verify.evaluate.evaluate` gives, and whether the model was guarded.

    Raises:
        ConfigError: a trigger without a target, or the other way round.
        ByeSightError: as the ingest and verify stages.
    """
    from stages.guard.files import GUARD
    from stages.verify.evaluate import evaluate
    from stages.verify.run import Candidate

    if (trigger is None) != (target is None):
        raise ConfigError("--trigger and --target go together: the attack, and the answer that it wants")
    applied = None if trigger is None else make_trigger(trigger, trigger_seed)
    adapter, folder = _adapter_and_base(model, base)
    verify = config.verify if target is None else _long_enough(config.verify, target, folder)
    guard = adapter if guarded and adapter is not None and (adapter / GUARD).is_file() else None
    with LazyEngine(config.engine) as own:
        run = open_line(data, folder, config, store, engine or own)
        ingested = line.ingest(run)
        tell("evaluate", 0.0, "")
        with atomic.staging(run.store.root / ".scratch", "evaluate-") as scratch:  # triggered rows: all nodes see the store
            found = evaluate(
                Candidate(adapter=adapter, guard=guard),
                rows=rows_of(ingested),
                base=run.base,
                trigger=applied,
                target=target,
                config=verify,
                dtype=config.dtype,
                engine=run.engine,
                seed=config.seed,
                scratch=scratch,
            )
    progress_of("evaluate")(1.0, f"{found['rows']} rows")
    return {**found, "guarded": guard is not None}


def _long_enough(config: VerifyConfig, target: str, base: pathlib.Path) -> VerifyConfig:
    """Answers as long as the target at least: cut before, its success rate would be 0 whatever the model has learnt."""
    tokens = token_count(load_processor(base), target)
    return config.model_copy(update={"max_new_tokens": max(config.max_new_tokens, tokens + 1)})


def _adapter_and_base(model: pathlib.Path, base: pathlib.Path | None) -> tuple[pathlib.Path | None, pathlib.Path]:
    """The adapter folder of a model, if it is one, and the folder of its base.

    Raises:
        ModelError: nothing there, or a base model beside `--base`.
    """
    for adapter in (model / ADAPTER, model):
        if (adapter / ADAPTER_CONFIG).is_file():
            return adapter.resolve(), base or EMBEDDED_BASE
    if not (model / "config.json").is_file():
        raise ModelError(f"{model}: neither a delivery, nor an adapter folder, nor a base model")
    if base is not None:
        raise ModelError(f"{model}: a base model itself; --base is for adapters")
    return None, model
