from __future__ import annotations

import contextlib
import ipaddress
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

import psutil
import pytest

from pipeline.config import EngineConfig
from pipeline.engine.local import LocalEngine
from pipeline.errors import StageError, SubmissionError
from pipeline.records import no_progress
from tests.conftest import colour_samples, write_shards
from tests.pipeline.engine import jobs

pytestmark = pytest.mark.ray


@pytest.fixture
def shards(tmp_path: pathlib.Path) -> list[pathlib.Path]:
    return write_shards(tmp_path / "rows", colour_samples(50), shard_rows=20)


def by_row(tables: Any) -> dict[int, dict[str, Any]]:
    rows = [row for table in tables for row in table.to_pylist()]
    assert len({row["row"] for row in rows}) == len(rows)
    return {row["row"]: row for row in rows}


def test_rows_come_once_from_several_processes_in_the_batches_of_the_local_engine(
    ray_engine: Any, shards: list[pathlib.Path], tmp_path: pathlib.Path
) -> None:
    """Although a worker dies on the way."""
    arguments = {"die_once": str(tmp_path / "died")}
    tables = list(ray_engine.map_shards(shards, jobs.rows_worker, arguments, batch_rows=3))
    assert (tmp_path / "died").exists()
    assert {table.schema for table in tables} == {jobs.OUTPUT}
    found = by_row(tables)
    local = by_row(LocalEngine(EngineConfig(kind="local")).map_shards(shards, jobs.rows_worker, {}, batch_rows=3))
    assert {row: values["rows"] for row, values in found.items()} == {row: values["rows"] for row, values in local.items()}
    assert os.getpid() not in {values["pid"] for values in found.values()}


def test_a_worker_error_comes_back_as_itself(ray_engine: Any, shards: list[pathlib.Path]) -> None:
    with pytest.raises(SubmissionError) as caught:
        list(ray_engine.map_shards(shards, jobs.rows_worker, {"fail_at": 33}, batch_rows=10))
    assert str(caught.value) == "row 33: too bad\nfor words"


def test_no_shards_no_tables(ray_engine: Any) -> None:
    assert list(ray_engine.map_shards([], jobs.rows_worker, {}, batch_rows=10)) == []


def test_training_survives_a_dead_worker_and_then_ends_at_our_own_error(ray_engine: Any, tmp_path: pathlib.Path) -> None:
    told: list[tuple[float, str]] = []
    arguments = {"steps": 4, "scratch": str(tmp_path), "die_at": 3, "fail_at": 4}
    with pytest.raises(StageError, match="no use after step 4") as caught:
        ray_engine.train(jobs.count_steps, arguments, scratch=tmp_path, progress=lambda share, text: told.append((share, text)))
    assert str(caught.value) == "no use after step 4"
    assert (tmp_path / "starts").read_text().split() == ["0", "2"]
    assert told == [(0.25, "step 1"), (0.5, "step 2"), (0.75, "step 3")]
    del arguments["fail_at"]
    ray_engine.train(jobs.count_steps, arguments, scratch=tmp_path, progress=no_progress)
    assert (tmp_path / "starts").read_text().split() == ["0", "2", "3"]


def test_a_bug_of_one_rank_ends_the_training_at_once(ray_engine: Any, tmp_path: pathlib.Path) -> None:
    with pytest.raises(StageError, match="a bug") as caught:
        ray_engine.train(jobs.buggy_loop, {"scratch": str(tmp_path)}, scratch=tmp_path, progress=no_progress)
    assert str(caught.value) == "ZeroDivisionError: a bug"
    assert "in buggy_loop" in caught.value.__notes__[0]
    assert sorted((tmp_path / "starts").read_text().split()) == ["0", "1"]


def test_a_training_that_is_given_up_ends(ray_engine: Any, tmp_path: pathlib.Path) -> None:
    def give_up(*_: Any) -> None:
        raise ZeroDivisionError("a bug of the driver's")

    with pytest.raises(ZeroDivisionError):
        ray_engine.train(jobs.count_steps, {"steps": 10**6, "scratch": str(tmp_path)}, scratch=tmp_path, progress=give_up)
    told, deadline = tmp_path / "progress.jsonl", time.monotonic() + 60
    before = -1
    while (size := told.stat().st_size) != before and time.monotonic() < deadline:
        before = size
        time.sleep(3)
    assert size == before


def test_all_ports_are_on_loopback(ray_engine: Any) -> None:
    listening = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # Ray ends idle workers now and then
            connections = process.net_connections(kind="tcp")
            listening += [ipaddress.ip_address(c.laddr.ip) for c in connections if c.status == psutil.CONN_LISTEN]
    assert listening
    assert all((getattr(address, "ipv4_mapped", None) or address).is_loopback for address in listening)


@pytest.mark.parametrize("method", ["map_shards", "train"])
def test_an_interrupted_process_ends_as_it_wants_to(shards: list[pathlib.Path], tmp_path: pathlib.Path, method: str) -> None:
    """Ray would end it on the spot if a thread of it used Ray after its shutdown."""
    code = f"""
import pathlib, sys
from pipeline.config import EngineConfig
from pipeline.engine.ray import RayEngine
from tests.pipeline.engine import jobs

shards, scratch = [pathlib.Path(path) for path in {[str(path) for path in shards]}], pathlib.Path({str(tmp_path)!r})
try:
    with RayEngine(EngineConfig(kind="ray", workers=1)) as engine:
        if {method!r} == "train":
            arguments = {{"steps": 1000, "scratch": str(scratch)}}
            engine.train(jobs.count_steps, arguments, scratch=scratch, progress=lambda *_: sys.exit(7))
        for table in engine.map_shards(shards, jobs.rows_worker, {{}}, batch_rows=1):
            sys.exit(7)
finally:
    print("cleaned up", engine.temporary)
"""
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[3])}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, ended.stdout.split("\n")[-2:]) == (7, ["cleaned up None", ""]), ended.stderr
