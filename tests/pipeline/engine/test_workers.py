from __future__ import annotations

import contextlib
import pathlib
import types
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest
import ray
import torch

from pipeline import errors
from pipeline.engine.workers import DataWorker, ProgressLines, clear_records, own_error, recorded_error, run_loop, unpack
from tests.conftest import colour_samples, write_shards
from tests.pipeline.engine import jobs


@pytest.fixture
def shard(tmp_path: pathlib.Path) -> str:
    return str(write_shards(tmp_path, colour_samples(5))[0])


def piece(shard: str, start: int) -> pa.Table:
    return pa.table({"shard": [shard], "start": [start]})


def test_a_piece_comes_back_as_it_was_made(shard: str) -> None:
    worker = DataWorker(jobs.rows_worker, {}, 2, 1)
    results = pa.concat_tables([worker(piece(shard, start)) for start in (0, 2, 4)])
    tables = list(unpack(results))
    assert [table.column("row").to_pylist() for table in tables] == [[0, 1], [2, 3], [4]]
    assert all(table.schema == jobs.OUTPUT for table in tables)


def test_errors_travel_as_results(shard: str) -> None:
    failing = DataWorker(jobs.rows_worker, {"fail_at": 3}, 2, 1)
    results = pa.concat_tables([failing(piece(shard, start)) for start in (0, 2)])
    tables = unpack(results)
    assert next(tables).column("row").to_pylist() == [0, 1]
    with pytest.raises(errors.SubmissionError) as caught:
        next(tables)
    assert str(caught.value) == "row 3: too bad\nfor words"
    assert "jobs.py" in caught.value.__notes__[0]


def test_an_error_of_building_comes_with_the_first_piece(shard: str) -> None:
    with pytest.raises(errors.ModelError, match="the base is not what it was"):
        list(unpack(DataWorker(jobs.broken_worker, {}, 2, 1)(piece(shard, 0))))
    with pytest.raises(errors.StageError, match="ZeroDivisionError: a bug"):
        list(unpack(DataWorker(jobs.buggy_worker, {}, 2, 1)(piece(shard, 0))))


@pytest.mark.parametrize(("arguments", "message"), jobs.GREEDY)
def test_too_little_memory_names_the_setting(shard: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(errors.StageError) as caught:
        list(unpack(DataWorker(jobs.greedy_worker, arguments, 2, 1)(piece(shard, 0))))
    assert str(caught.value) == message


@pytest.fixture
def looped(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception], errors.ByeSightError | None]:
    """What is recorded of a training loop that ends with an error, in a worker of two."""
    context = types.SimpleNamespace(get_world_rank=lambda: 1, get_world_size=lambda: 2)
    monkeypatch.setattr("ray.train.get_context", lambda: context)
    monkeypatch.setattr("pipeline.engine.rendezvous.process_group", lambda *_, **__: contextlib.nullcontext())

    def end(error: Exception) -> errors.ByeSightError | None:
        def loop(*_: object) -> None:
            raise error

        with pytest.raises(type(error)):
            run_loop(loop, {}, tmp_path, 1, local=True)
        return recorded_error(tmp_path)

    return end


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (errors.SubmissionError("row 3: no"), errors.SubmissionError, "row 3: no"),
        (AttributeError("'tuple' has no 'dtype'"), errors.StageError, "AttributeError: 'tuple' has no 'dtype'"),
        (RuntimeError("mat1 and mat2 can't be multiplied"), errors.StageError, "RuntimeError: mat1 and mat2 can't be multiplied"),
    ],
)
def test_the_error_of_a_loop_is_recorded(looped: Any, error: Exception, kind: type[Exception], message: str) -> None:
    recorded = looped(error)
    assert (type(recorded), str(recorded)) == (kind, message)
    assert "in loop" in recorded.__notes__[0]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4242"),
        torch.distributed.DistBackendError("NCCL communicator was aborted on rank 0."),
        ray.exceptions.ActorDiedError(),
    ],
    ids=["gloo", "nccl", "ray"],
)
def test_the_death_of_another_worker_is_no_error_of_the_loop(looped: Any, error: Exception) -> None:
    assert looped(error) is None


@pytest.mark.parametrize("kind", ["StageError", "SubmissionError", "RemovalCapError", "ByeSightError"])
def test_own_error_by_name(kind: str) -> None:
    error = own_error(kind, "why")
    assert type(error) is getattr(errors, kind)
    assert str(error) == "why"


def test_progress_lines_wait_for_the_end_of_a_line(tmp_path: pathlib.Path) -> None:
    with ProgressLines(tmp_path) as lines, (tmp_path / "progress.jsonl").open("a") as file:
        assert lines.read() == []
        for text, expected in (
            ('{"share": 0.5, "te', []),
            ('xt": "half"}\n{"share": 1,', [(0.5, "half")]),
            (' "text": "all"}\n', [(1, "all")]),
        ):
            file.write(text)
            file.flush()
            assert lines.read() == expected


def test_records_are_cleared(tmp_path: pathlib.Path) -> None:
    assert recorded_error(tmp_path) is None
    (tmp_path / "error.json").write_text('{"kind": "StageError", "message": "why", "trace": ""}')
    assert isinstance(recorded_error(tmp_path), errors.StageError)
    clear_records(tmp_path)
    assert recorded_error(tmp_path) is None
