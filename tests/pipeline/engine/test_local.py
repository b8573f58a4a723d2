from __future__ import annotations

import pathlib
from typing import Any

import pyarrow as pa
import pytest
import torch

from pipeline.config import EngineConfig
from pipeline.engine import open_engine
from pipeline.engine.local import LocalContext, LocalEngine
from pipeline.errors import ModelError, StageError, SubmissionError
from pipeline.records import no_progress
from tests.conftest import colour_samples, write_shards
from tests.pipeline.engine import jobs

ENGINE = LocalEngine(EngineConfig(kind="local", threads=1))


@pytest.fixture
def shards(tmp_path: pathlib.Path) -> list[pathlib.Path]:
    return write_shards(tmp_path / "rows", colour_samples(20), shard_rows=8)


def test_open_engine() -> None:
    assert isinstance(open_engine(EngineConfig(kind="local")), LocalEngine)


def test_every_row_once_in_batches_that_do_not_cross_shards(shards: list[pathlib.Path]) -> None:
    table = pa.concat_tables(ENGINE.map_shards(shards, jobs.rows_worker, {}, batch_rows=3))
    assert table.column("row").to_pylist() == list(range(20))
    batches = dict.fromkeys(tuple(rows) for rows in table.column("rows").to_pylist())
    assert list(batches) == [(0, 1, 2), (3, 4, 5), (6, 7), (8, 9, 10), (11, 12, 13), (14, 15), (16, 17, 18), (19,)]


def test_errors_pass_through(shards: list[pathlib.Path]) -> None:
    with pytest.raises(SubmissionError, match="row 9"):
        list(ENGINE.map_shards(shards, jobs.rows_worker, {"fail_at": 9}, batch_rows=4))
    with pytest.raises(ModelError):
        list(ENGINE.map_shards(shards, jobs.broken_worker, {}, batch_rows=4))


@pytest.mark.parametrize(("arguments", "message"), jobs.GREEDY)
def test_too_little_memory_names_the_setting(shards: list[pathlib.Path], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(StageError) as caught:
        list(ENGINE.map_shards(shards, jobs.greedy_worker, arguments, batch_rows=4))
    assert str(caught.value) == message


def test_threads_are_set_and_put_back() -> None:
    before = torch.get_num_threads()
    with LocalEngine(EngineConfig(kind="local", threads=before + 1)):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_training_goes_on_after_an_interruption(tmp_path: pathlib.Path) -> None:
    told: list[tuple[float, str]] = []
    arguments = {"steps": 4, "scratch": str(tmp_path)}
    with pytest.raises(StageError, match="no use after step 3"):
        ENGINE.train(jobs.count_steps, arguments | {"fail_at": 3}, scratch=tmp_path, progress=no_progress)
    ENGINE.train(jobs.count_steps, arguments, scratch=tmp_path, progress=lambda share, text: told.append((share, text)))
    assert (tmp_path / "starts").read_text().split() == ["0", "2"]
    assert told == [(0.75, "step 3"), (1.0, "step 4")]


def test_only_the_last_whole_checkpoint_is_kept(tmp_path: pathlib.Path) -> None:
    context = LocalContext(tmp_path, no_progress)
    with context.resume_from() as found:
        assert found is None
    for number in range(3):
        folder = tmp_path / "half-written"
        folder.mkdir()
        (folder / "weights").write_text(str(number))
        if number < 2:
            context.report({}, folder)
    context.report({}, None)
    with LocalContext(tmp_path, no_progress).resume_from() as found:
        assert found is not None
        assert (found / "weights").read_text() == "1"
        assert len(list(found.parent.iterdir())) == 1
