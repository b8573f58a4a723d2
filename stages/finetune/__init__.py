"""Fine-tune a LoRA adapter: provisional on all rows, final on the kept ones."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from pipeline.config import FinetuneConfig
from pipeline.engine import Engine, TrainContext
from pipeline.models import Dtype
from pipeline.records import Progress, no_progress

VERSION = 1

_SUMMARY = "summary.json"


def run(
    rows: pathlib.Path,
    base: pathlib.Path,
    config: FinetuneConfig,
    engine: Engine,
    out: pathlib.Path,
    *,
    seed: int,
    scratch: pathlib.Path,
    dtype: Dtype = "auto",
    keep: pathlib.Path | None = None,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Fine-tune on an engine's workers.

    Args:
        rows: folder with canonical shards.
        base: folder of the base model.
        config: hyperparameters.
        engine: an entered engine.
        out: gets adapter/ (adapter_config.json, adapter_model.safetensors, base.json) and loss.jsonl (step, epoch, loss,
            learning_rate).
        seed: of the initial weights and the order of the examples.
        scratch: checkpoints; a call after an interrupted one goes on from its last checkpoint. The caller removes it.
        dtype: type of the base's weights.
        keep: Parquet file whose column `row` names the rows to train on; None trains on all.
        progress: told every few steps.

    Returns:
        The summary of `stages.finetune.train.train_adapter`.

    Raises:
        ByeSightError: as `train_adapter`, and a StageError where workers died.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    arguments = {
        "rows": str(rows.resolve()),
        "base": str(base.resolve()),
        "config": config.model_dump(),
        "out": str(out.resolve()),
        "seed": seed,
        "dtype": dtype,
        "keep": str(keep.resolve()) if keep is not None else None,
        "scratch": str(scratch.resolve()),
    }
    engine.train(train_loop, arguments, scratch=scratch.resolve(), progress=progress)
    summary: dict[str, Any] = json.loads((scratch / _SUMMARY).read_text(encoding="utf-8"))
    return summary


def train_loop(arguments: Mapping[str, Any], context: TrainContext) -> None:
    """`train_adapter` as an engine calls it on every worker; rank 0 leaves the summary in the scratch folder."""
    from stages.finetune.train import train_adapter

    paths = {name: pathlib.Path(arguments[name]) for name in ("rows", "base", "out", "scratch")}
    summary = train_adapter(
        **paths,
        config=FinetuneConfig.model_validate(arguments["config"]),
        keep=pathlib.Path(arguments["keep"]) if arguments["keep"] else None,
        seed=arguments["seed"],
        dtype=arguments["dtype"],
        context=context,
    )
    if context.rank == 0:
        (paths["scratch"] / _SUMMARY).write_text(json.dumps(summary), encoding="utf-8")
