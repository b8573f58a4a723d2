"""Seconds and memory of what runs in this process and in all processes that it starts.

Memory is the sum of the processes' proportional set sizes (PSS), in which a page that several share counts once; Linux alone tells
it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Self

import psutil

INTERVAL = 0.25
"""Seconds between two looks at the memory."""
_MORE = 1.01
"""Growth of the resident memory upon which a look counts exactly: that takes 6 ms per process, the sum of resident sizes 0.1 ms."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Used:
    """What a stage took: wall-clock seconds, and the most memory that was seen at once, bytes."""

    seconds: float
    memory: int


class Usage:
    """A context manager whose thread looks at the memory now and then; `stage` tells what belongs to which name."""

    def __init__(self, interval: float = INTERVAL) -> None:
        self.stages: dict[str, Used] = {}
        self._peak = self._resident = 0
        self._looking = threading.Lock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look_on, args=(interval,), daemon=True)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure a block; blocks of one name add up, their memory is the larger."""
        with self._looking:  # a look that began before counts for what was before
            self._peak = self._resident = 0
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        self._look()
        known = self.stages.get(name, Used(seconds=0.0, memory=0))
        self.stages[name] = Used(seconds=known.seconds + seconds, memory=max(known.memory, self._peak))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None, /) -> None:
        self._end.set()
        self._thread.join()

    def _look_on(self, interval: float) -> None:
        while not self._end.wait(interval):
            self._look()

    def _look(self) -> None:
        with self._looking:
            own = psutil.Process()
            processes = (own, *own.children(recursive=True))
            resident = _sum(processes, lambda process: int(process.memory_info().rss))
            if resident > _MORE * self._resident:
                self._resident = resident
                self._peak = max(self._peak, _sum(processes, lambda process: int(process.memory_full_info().pss)))


def _sum(processes: Sequence[psutil.Process], size: Callable[[psutil.Process], int]) -> int:
    total = 0
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):  # it has ended meanwhile
            total += size(process)
    return total
