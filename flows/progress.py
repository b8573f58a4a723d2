"""Progress of a run, told to whoever listens: a terminal, Prefect, a test. The stages know nothing of it."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator

from pipeline.records import Progress

Listener = Callable[[str, float, str], None]
"""Called with the stage's name, the share done (0 to 1) and a short text."""

_LISTENERS: contextvars.ContextVar[tuple[Listener, ...]] = contextvars.ContextVar("byesight_listeners", default=())


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Tell a listener of the progress made inside the block, beside those that listen already."""
    token = _LISTENERS.set((*_LISTENERS.get(), listener))
    try:
        yield
    finally:
        _LISTENERS.reset(token)


def tell(stage: str, share: float, text: str) -> None:
    """Tell all listeners."""
    for listener in _LISTENERS.get():
        listener(stage, share, text)


def progress_of(stage: str) -> Progress:
    """The progress callback that a stage is given."""
    listeners = _LISTENERS.get()  # kept here: an engine may call from another thread

    def progress(share: float, text: str) -> None:
        for listener in listeners:
            listener(stage, min(1.0, max(0.0, share)), text)

    return progress
