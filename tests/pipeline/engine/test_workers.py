from __future__ import annotations

import pathlib

import pyarrow as pa
import pytest

from pipeline import errors
from pipeline.engine.workers import DataWorker, ProgressLines, clear_records, own_error, recorded_error, unpack
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
    (tmp_path / "error.json").write_text('{"kind": "StageError", "message": "why"}')
    assert isinstance(recorded_error(tmp_path), errors.StageError)
    clear_records(tmp_path)
    assert recorded_error(tmp_path) is None
