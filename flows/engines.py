"""An engine that starts when it is first needed: a run whose results are all in the store starts none."""

from __future__ import annotations

import contextlib
import pathlib
import signal
import threading
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import pyarrow as pa

from pipeline.config import EngineConfig
from pipeline.engine import Engine, TableWorker, TrainLoop, open_engine
from pipeline.records import Progress


class LazyEngine:
    """See `pipeline.engine.Engine`; the real one is opened by the first call and closed at the end."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._stack = contextlib.ExitStack()
        self._engine: Engine | None = None

    def map_shards(
        self, shards: Sequence[pathlib.Path], build: Callable[..., TableWorker], arguments: Mapping[str, Any], *, batch_rows: int
    ) -> Iterator[pa.Table]:
        return self.open().map_shards(shards, build, arguments, batch_rows=batch_rows)

    def train(self, loop: TrainLoop, arguments: Mapping[str, Any], *, scratch: pathlib.Path, progress: Progress) -> None:
        self.open().train(loop, arguments, scratch=scratch, progress=progress)

    def open(self) -> Engine:
        """The real engine, started now if it was not; the process's answer to SIGTERM stays what it was (Ray would put its own)."""
        if self._engine is None:
            with _kept_signal(signal.SIGTERM):
                self._engine = self._stack.enter_context(open_engine(self._config))
        return self._engine

    def close(self) -> None:
        """Stop the real engine; the next call starts a new one."""
        self._engine = None
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None, /) -> None:
        self.close()


@contextlib.contextmanager
def _kept_signal(number: signal.Signals) -> Iterator[None]:
    """Put a signal's handler back after the block."""
    handler = signal.getsignal(number)
    try:
        yield
    finally:
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(number, handler)
