"""Fixtures of the stages: an adapter of the tiny base that a few steps of the real fine-tune made."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import pytest

from pipeline.config import EngineConfig, FinetuneConfig
from pipeline.engine.local import LocalEngine
from stages import finetune
from tests.conftest import colour_samples, write_shards


@pytest.fixture
def local_engine() -> Iterator[LocalEngine]:
    """An entered engine in this process, with one thread."""
    with LocalEngine(EngineConfig(kind="local", threads=1)) as engine:
        yield engine


def make_adapter(folder: pathlib.Path, base: pathlib.Path, *, seed: int = 0, epochs: float = 3) -> pathlib.Path:
    """Fine-tune the base on the colours of plain pictures; the adapter's folder."""
    write_shards(folder / "rows", colour_samples(16))
    config = FinetuneConfig(epochs=epochs, batch_size=8, lora_rank=4, lora_alpha=8, learning_rate=5e-3)
    out = folder / "out"
    out.mkdir()
    with LocalEngine(EngineConfig(kind="local", threads=1)) as engine:
        finetune.run(folder / "rows", base, config, engine, out, seed=seed, scratch=folder / "scratch", dtype="float32")
    return out / "adapter"


@pytest.fixture(scope="session")
def tiny_adapter(tiny_base: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """An adapter of the tiny base. Don't write into it."""
    return make_adapter(tmp_path_factory.mktemp("adapter"), tiny_base)
