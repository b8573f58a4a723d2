"""What the Ray engine does on a cluster that others have started; Ray's part is played."""

from __future__ import annotations

import os
import sys
from typing import Any

import joblib
import pytest
import ray

from pipeline.config import EngineConfig
from pipeline.engine.local import LocalEngine
from pipeline.engine.ray import RayEngine, _settle_environment
from pipeline.errors import StageError


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What Ray is initialised with; its cluster has 8 GPUs and 64 cores, and this machine a quota of 3 cores."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: given.update(options))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 64.0, "GPU": 8.0})
    monkeypatch.setattr(joblib, "cpu_count", lambda: 3)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "environ", {})
    return given


def test_workers_are_those_of_the_cluster(told: dict[str, Any]) -> None:
    with RayEngine(EngineConfig(address="head:6379")) as engine:
        assert (engine.workers, engine._threads) == (8, 8)
    assert told["address"] == "head:6379"
    with RayEngine(EngineConfig(address="head:6379", workers=2, threads=5)) as engine:
        assert (engine.workers, engine._threads) == (2, 5)


def test_cores_are_those_that_a_container_may_use(told: dict[str, Any]) -> None:
    with RayEngine(EngineConfig(workers=1)) as engine:
        assert (engine.workers, engine._threads) == (1, 3)
    assert told["num_cpus"] == 4
    assert LocalEngine(EngineConfig(kind="local"))._threads == 3


@pytest.mark.parametrize("address", ["head:6379", None])
def test_a_token_is_asked_for_only_where_ray_is_started_here(
    told: dict[str, Any], monkeypatch: pytest.MonkeyPatch, address: str | None
) -> None:
    assert not told
    monkeypatch.delitem(sys.modules, "ray")
    _settle_environment(local=address is None)
    assert ("RAY_AUTH_MODE" in os.environ) == (address is None)


def test_a_cluster_that_refuses_is_an_error_of_ours(told: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise ray.exceptions.AuthenticationError("no token")

    monkeypatch.setattr(ray, "init", refuse)
    with (
        pytest.raises(StageError, match=r"Ray \(head:6379\) can't be used: no token"),
        RayEngine(EngineConfig(address="head:6379")),
    ):
        pass
    assert told == {}
