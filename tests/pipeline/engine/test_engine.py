"""How many workers a configuration asks for."""

from __future__ import annotations

import pytest

from pipeline.config import EngineConfig
from pipeline.engine import worker_count


@pytest.mark.parametrize(
    ("asked", "gpus", "cores", "expected"), [(3, 8, 2, 3), (0, 8, 2, 8), (0, 0, 2, 2), (0, 0, 64, 4), (0, 0, 1, 1)]
)
def test_worker_count(asked: int, gpus: int, cores: int, expected: int) -> None:
    assert worker_count(EngineConfig(workers=asked), gpus=gpus, cores=cores) == expected
