"""What the engine tests run; importable, so that Ray's workers find it."""

from __future__ import annotations

import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import torch

from pipeline.engine import TrainContext
from pipeline.errors import ModelError, StageError, SubmissionError

SETTLE_SECONDS = 1.0
"""Ray Train's controller learns of a report at its next poll; one that it hasn't seen is lost with the worker."""

OUTPUT = pa.schema([("row", pa.int64()), ("rows", pa.list_(pa.int64())), ("pair", pa.list_(pa.float32(), 2)), ("pid", pa.int64())])


class Rows:
    """Gives for each row the rows that it was called with; can fail, or kill its process once."""

    def __init__(self, fail_at: int, die_once: pathlib.Path | None) -> None:
        self.fail_at = fail_at
        self.die_once = die_once

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = table.column("row").to_pylist()
        if self.fail_at in rows:
            raise SubmissionError(f"row {self.fail_at}: too bad\nfor words")
        if self.die_once is not None and not self.die_once.exists():
            self.die_once.touch()
            os._exit(1)
        columns = {"row": rows, "rows": [rows] * len(rows), "pair": [[row, 0.5] for row in rows], "pid": [os.getpid()] * len(rows)}
        return pa.table(columns, schema=OUTPUT)


def rows_worker(*, fail_at: int = -1, die_once: str | None = None) -> Rows:
    return Rows(fail_at, pathlib.Path(die_once) if die_once else None)


def broken_worker() -> Rows:
    raise ModelError("the base is not what it was")


def buggy_worker() -> Rows:
    raise ZeroDivisionError("a bug")


def greedy_worker(*, batch_size: int | None = None, building: bool = False) -> Greedy:
    del batch_size
    if building:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return Greedy()


class Greedy:
    """Asks for more memory than there is."""

    def __call__(self, table: pa.Table) -> pa.Table:
        raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {table.num_rows} GiB")


GREEDY: tuple[tuple[dict[str, Any], str], ...] = (
    ({"batch_size": 32}, "the GPU's memory is too small: lower engine.batch_size (now 32)"),
    ({}, "the GPU's memory is too small: lower engine.batch_size"),
    ({"batch_size": 1}, "the GPU's memory is too small: engine.batch_size is 1 already; take a smaller base or a larger GPU"),
    (
        {"batch_size": 32, "building": True},
        "the GPU's memory is too small: it can't hold what a worker of the engine stage loads; take a smaller base or a larger GPU",
    ),
)
"""Arguments of `greedy_worker`, and what is said of it; its package, and so its stage, is `engine`."""


def buggy_loop(arguments: Mapping[str, Any], context: TrainContext) -> None:
    """The last rank fails while the others wait for it."""
    with (pathlib.Path(arguments["scratch"]) / "starts").open("a") as file:
        file.write(f"{context.rank} ")
    if context.rank == context.world_size - 1:
        time.sleep(SETTLE_SECONDS)
        raise ZeroDivisionError("a bug")
    torch.distributed.all_reduce(torch.ones(1))


def count_steps(arguments: Mapping[str, Any], context: TrainContext) -> None:
    """Count to `steps`, with a checkpoint after each; `die_at` kills the last rank once; `fail_at` raises a StageError there."""
    scratch = pathlib.Path(arguments["scratch"])
    with context.resume_from() as checkpoint:
        start = int((checkpoint / "step").read_text()) if checkpoint else 0
    if context.rank == 0:
        with (scratch / "starts").open("a") as file:
            file.write(f"{start} ")
    for step in range(start + 1, arguments["steps"] + 1):
        marker = scratch / f"died-{step}"
        if step == arguments.get("die_at") and context.rank == context.world_size - 1 and not marker.exists():
            marker.touch()
            time.sleep(SETTLE_SECONDS)
            os._exit(1)
        if step == arguments.get("fail_at") and context.rank == 0:
            time.sleep(SETTLE_SECONDS if context.world_size > 1 else 0)
            raise StageError(f"no use after step {step}")
        folder = scratch / f"step-{step}"
        if context.rank == 0:
            folder.mkdir(exist_ok=True)
            (folder / "step").write_text(str(step))
        total = torch.ones(1)
        if context.world_size > 1:
            torch.distributed.all_reduce(total)
        assert int(total) == context.world_size
        context.report({"step": step}, folder if context.rank == 0 else None)
        context.progress(step / arguments["steps"], f"step {step}")
