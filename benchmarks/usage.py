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
"""Seconds between two looks at the processes."""
_MORE = 1.01
"""Growth of the resident memory upon which a look counts exactly: that took 28 ms for five processes with torch."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Used:
    """What a stage took.

    Attributes:
        seconds: by the clock.
        processor: seconds of processors over all processes; other load on the machine changes them little.
        memory: the most that was seen at once, bytes.
    """

    seconds: float = 0.0
    processor: float = 0.0
    memory: int = 0


class Usage:
    """A context manager whose thread looks at the processes now and then; `stage` tells what belongs to which name."""

    def __init__(self, interval: float = INTERVAL) -> None:
        self.stages: dict[str, Used] = {}
        self._peak = self._resident = 0
        self._worked: dict[psutil.Process, float] = {}
        self._looking = threading.Lock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look_on, args=(interval,), daemon=True)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure a block; blocks of one name add up, their memory is the larger."""
        self._look()
        with self._looking:  # a look that began before counts for what was before
            self._peak = self._resident = 0
        worked, started = sum(self._worked.values()), time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        self._look()
        known = self.stages.get(name, Used())
        self.stages[name] = Used(
            seconds=known.seconds + seconds,
            processor=known.processor + sum(self._worked.values()) - worked,
            memory=max(known.memory, self._peak),
        )

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
            for process in processes:
                with _alive():
                    times = process.cpu_times()
                    self._worked[process] = times.user + times.system
            resident = _sum(processes, lambda process: int(process.memory_info().rss))
            if resident > _MORE * self._resident:
                self._resident = resident
                self._peak = max(self._peak, _sum(processes, lambda process: int(process.memory_full_info().pss)))


def _sum(processes: Sequence[psutil.Process], size: Callable[[psutil.Process], int]) -> int:
    total = 0
    for process in processes:
        with _alive():
            total += size(process)
    return total


def _alive() -> contextlib.AbstractContextManager[None]:
    """Passes over a process that has ended meanwhile; what it did until the last look counts."""
    return contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied)
