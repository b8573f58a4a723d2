"""The engine that does everything in this process, one thing after another."""

from __future__ import annotations

import contextlib
import pathlib
import shutil
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import joblib
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.config import EngineConfig
from pipeline.engine import TableWorker, TrainLoop
from pipeline.engine.memory import memory_watched
from pipeline.records import Progress


class LocalContext:
    """The training context of a single worker. Checkpoints become visible by one rename: a killed run never leaves half of one."""

    rank = 0
    world_size = 1

    def __init__(self, scratch: pathlib.Path, progress: Progress) -> None:
        self._checkpoints = scratch / "checkpoints"
        self._progress = progress

    def report(self, metrics: Mapping[str, float], checkpoint: pathlib.Path | None) -> None:
        del metrics
        if checkpoint is None:
            return
        self._checkpoints.mkdir(parents=True, exist_ok=True)
        older = self._reported()
        number = int(older[-1].name) + 1 if older else 0
        checkpoint.rename(self._checkpoints / f"{number:08d}")
        for folder in older:
            shutil.rmtree(folder)

    @contextlib.contextmanager
    def resume_from(self) -> Iterator[pathlib.Path | None]:
        reported = self._reported()
        yield reported[-1] if reported else None

    def progress(self, share: float, text: str) -> None:
        self._progress(share, text)

    def _reported(self) -> list[pathlib.Path]:
        return sorted(self._checkpoints.iterdir()) if self._checkpoints.is_dir() else []


class LocalEngine:
    """Work in this process; always one worker, with `threads` threads (0: all cores)."""

    def __init__(self, config: EngineConfig) -> None:
        self._threads = config.threads or joblib.cpu_count()
        self._before = torch.get_num_threads()

    def __enter__(self) -> Self:
        self._before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None, /) -> None:
        torch.set_num_threads(self._before)

    def map_shards(
        self, shards: Sequence[pathlib.Path], build: Callable[..., TableWorker], arguments: Mapping[str, Any], *, batch_rows: int
    ) -> Iterator[pa.Table]:
        with memory_watched(build, arguments, building=True):
            worker = build(**arguments)
        for shard in shards:
            with pq.ParquetFile(shard) as file:
                for batch in file.iter_batches(batch_size=batch_rows):
                    with memory_watched(build, arguments):
                        table = worker(pa.Table.from_batches([batch]))
                    yield table

    def train(self, loop: TrainLoop, arguments: Mapping[str, Any], *, scratch: pathlib.Path, progress: Progress) -> None:
        loop(arguments, LocalContext(scratch, progress))
