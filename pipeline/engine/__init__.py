"""Where the work runs: in this process or on Ray, behind one interface. The engine is no part of a result's key."""

from __future__ import annotations

import contextlib
import pathlib
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, Self

import pyarrow as pa

from pipeline.config import EngineConfig
from pipeline.records import Progress

_MOST_CPU_WORKERS = 4


class TableWorker(Protocol):
    """Built once per worker, where it loads its model; then called with one table after another."""

    def __call__(self, table: pa.Table, /) -> pa.Table: ...


class TrainContext(Protocol):
    """What a training loop sees of the engine that runs it.

    Attributes:
        rank: number of this worker, from 0.
        world_size: workers in all.
    """

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def report(self, metrics: Mapping[str, float], checkpoint: pathlib.Path | None) -> None:
        """Called by every worker at the same step; the folder that rank 0 gives is taken over: the next start resumes from it."""

    def resume_from(self) -> contextlib.AbstractContextManager[pathlib.Path | None]:
        """The last reported checkpoint, of this or of an interrupted run in the same scratch folder."""

    def progress(self, share: float, text: str) -> None:
        """Show the share done (0 to 1) and a short text to the driver; only rank 0 is heard."""


TrainLoop = Callable[[Mapping[str, Any], TrainContext], None]


def worker_count(config: EngineConfig, *, gpus: int, cores: int) -> int:
    """Workers that a configuration asks for, of a machine or a cluster.

    A worker per core trains a small model nearly twice as fast as one worker with a thread per core (measured on two cores); each
    holds the model, so that a large one on a CPU is better given fewer by hand.
    """
    return config.workers or gpus or min(_MOST_CPU_WORKERS, cores)


class Engine(Protocol):
    """Runs workers over shards, and training loops. A context manager; what it starts ends with it."""

    def map_shards(
        self, shards: Sequence[pathlib.Path], build: Callable[..., TableWorker], arguments: Mapping[str, Any], *, batch_rows: int
    ) -> Iterator[pa.Table]:
        """Run every row of Parquet shards through workers.

        Args:
            shards: Parquet files of one schema.
            build: importable; called once per worker with `arguments`.
            arguments: plain picklable values; paths as absolute strings.
            batch_rows: most rows that a worker is called with.

        Yields:
            The workers' tables, in ANY order: let them carry the row, and sort.

        Raises:
            ByeSightError: what a worker raised, or a StageError where workers died or the GPU's memory is too small.
        """

    def train(self, loop: TrainLoop, arguments: Mapping[str, Any], *, scratch: pathlib.Path, progress: Progress) -> None:
        """Run a training loop on all workers until it returns.

        Args:
            loop: importable; called on every worker with `arguments` and its context.
            arguments: plain picklable values; paths as absolute strings.
            scratch: folder for checkpoints, seen by all workers; a second call with it goes on where the first was interrupted.
            progress: told what rank 0 reports.

        Raises:
            ByeSightError: what the loop raised, or a StageError where workers died more often than they are restarted.
        """

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None, /
    ) -> None: ...


def open_engine(config: EngineConfig) -> Engine:
    """The engine that a configuration asks for; Ray starts when it is entered."""
    if config.kind == "local":
        from pipeline.engine.local import LocalEngine

        return LocalEngine(config)
    from pipeline.engine.ray import RayEngine

    return RayEngine(config)
