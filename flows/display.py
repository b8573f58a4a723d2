"""What the command line shows while it works: a bar per stage on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import time
import types
from typing import Self

from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

NAMES = {
    "prefect": "Prefect",
    "data": "make the data",
    "ingest": "read the submission",
    "chosen": "choose rows",
    "canary": "plant canaries",
    "provisional": "fine-tune on all rows",
    "extract": "record attention",
    "score": "find evidence",
    "confirm": "test suspicious groups",
    "cluster": "decide on rows",
    "final": "fine-tune on kept rows",
    "guard": "calibrate the guard",
    "verify": "verify the models",
    "delivery": "write the delivery",
    "evaluate": "evaluate",
    "poison": "poison",
}
"""Stages in words."""
LINE_SECONDS = 10.0
LOGGERS = ("flows", "pipeline", "stages", "storage")


class Display:
    """Shows progress on stderr; a context manager, and a listener of `flows.progress`. Warnings of the stages are shown too."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._progress = Progress(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[text]}", style="dim"),
            TimeElapsedColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._told: dict[str, float] = {}
        self._handler = RichHandler(console=self.console, show_path=False, show_time=False, markup=False)
        self._handler.setLevel(logging.WARNING)

    def __enter__(self) -> Self:
        for name in LOGGERS:
            logging.getLogger(name).addHandler(self._handler)
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None, /) -> None:
        self._progress.stop()
        for name in LOGGERS:
            logging.getLogger(name).removeHandler(self._handler)

    def __call__(self, stage: str, share: float, text: str) -> None:
        name = NAMES.get(stage, stage)
        if not self.console.is_terminal:
            self._line(stage, name, share, text)
            return
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(name, total=1.0, text="")
        self._progress.update(self._tasks[stage], completed=share, text=escape(text))

    def _line(self, stage: str, name: str, share: float, text: str) -> None:
        """A line where a stage begins, one now and then, and one where it ends."""
        now = time.monotonic()
        line = ""
        if stage not in self._told:
            line = f"{name} ..."
        elif share >= 1 and text.startswith(("done", "found", "ready")):
            line = f"{name}: {text}"
        elif text and share < 1 and now - self._told[stage] >= LINE_SECONDS:
            line = f"{name}: {share:.0%}, {text}"
        if line:
            self._told[stage] = now
            self.console.print(line, markup=False, highlight=False)
