"""How many workers a configuration asks for."""

from __future__ import annotations

import os

import pytest
import torch

from pipeline.config import EngineConfig
from pipeline.engine import worker_count


@pytest.mark.parametrize(
    ("asked", "gpus", "cores", "expected"), [(3, 8, 2, 3), (0, 8, 2, 8), (0, 0, 2, 2), (0, 0, 64, 4), (0, 0, None, 1)]
)
def test_worker_count(asked: int, gpus: int, cores: int | None, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert worker_count(EngineConfig(workers=asked)) == expected
