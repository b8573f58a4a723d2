"""The lazy engine: started by the first call, once, and closed with its block."""

from __future__ import annotations

import contextlib
import pathlib
import signal
from collections.abc import Iterator
from typing import Any

import pytest

import flows.engines
from flows.engines import LazyEngine
from pipeline.config import EngineConfig
from pipeline.records import no_progress


class Recorder:
    """Counts how often engines are opened and closed; answers SIGTERM itself, as Ray does."""

    def __init__(self) -> None:
        self.events: list[str] = []

    @contextlib.contextmanager
    def open(self, config: EngineConfig) -> Iterator[Any]:
        self.events.append(f"open {config.kind}")
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            yield self
        finally:
            self.events.append("close")

    def train(self, *_: Any, **__: Any) -> None:
        self.events.append("train")

    def map_shards(self, *_: Any, **__: Any) -> Iterator[int]:
        self.events.append("map")
        return iter([1])


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(flows.engines, "open_engine", recorder.open)
    return recorder


def test_unused_is_never_opened(recorder: Recorder) -> None:
    with LazyEngine(EngineConfig()):
        pass
    assert recorder.events == []


def test_opened_once_and_closed_with_the_block(recorder: Recorder, tmp_path: pathlib.Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with LazyEngine(EngineConfig()) as engine:
        engine.train(lambda *_: None, {}, scratch=tmp_path, progress=no_progress)
        assert list(engine.map_shards([], lambda: None, {}, batch_rows=1)) == [1]  # type: ignore[arg-type, return-value]
        assert signal.getsignal(signal.SIGTERM) is before
    assert recorder.events == ["open ray", "train", "map", "close"]


def test_closed_by_hand_it_starts_anew(recorder: Recorder) -> None:
    with LazyEngine(EngineConfig(kind="local")) as engine:
        engine.open()
        engine.close()
        engine.open()
    assert recorder.events == ["open local", "close", "open local", "close"]


def test_closed_when_the_block_raises(recorder: Recorder) -> None:
    def fails() -> None:
        with LazyEngine(EngineConfig(kind="local")) as engine:
            engine.open()
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fails()
    assert recorder.events == ["open local", "close"]
