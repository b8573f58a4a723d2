from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import StageError
from pipeline.prompts import IGNORED
from pipeline.records import Message, Sample, examples_of, question_answer
from stages.finetune.data import Schedule, StepBatches, open_rows
from tests.conftest import colour_samples, picture, write_shards

TURNS: tuple[Message, ...] = (*question_answer("first?", "one"), *question_answer("second?", "two", images=0))
SAMPLES = [*colour_samples(5, text_only=[3]), Sample(row=5, messages=TURNS, images=(picture(),))]


@pytest.fixture
def shards(tmp_path: pathlib.Path) -> pathlib.Path:
    write_shards(tmp_path / "rows", SAMPLES, shard_rows=4)
    return tmp_path / "rows"


def keep_file(path: pathlib.Path, rows: list[int]) -> pathlib.Path:
    pq.write_table(pa.table({"row": pa.array(rows, pa.int64()), "score": [0.5] * len(rows)}), path)
    return path


def test_examples_are_those_of_the_samples(shards: pathlib.Path, tmp_path: pathlib.Path) -> None:
    data = open_rows(shards, tmp_path / "cache", None)
    assert [data.example(n) for n in range(len(data))] == [one for sample in SAMPLES for one in examples_of(sample)]
    assert data.rows == 6
    assert all(file["filename"].startswith(str(tmp_path / "cache")) for file in data.records.cache_files), "not memory-mapped"


def test_the_longest_examples_are_those_of_the_last_answers(shards: pathlib.Path, tmp_path: pathlib.Path) -> None:
    data = open_rows(shards, tmp_path / "cache", keep_file(tmp_path / "keep.parquet", [5, 1]))
    last = [examples_of(SAMPLES[row])[-1] for row in (1, 5)]
    assert list(data.longest()) == last


def test_only_kept_rows(shards: pathlib.Path, tmp_path: pathlib.Path) -> None:
    data = open_rows(shards, tmp_path / "cache", keep_file(tmp_path / "keep.parquet", [5, 1]))
    assert [data.example(n).row for n in range(len(data))] == [1, 5, 5]


def test_nothing_to_train_on(shards: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(StageError, match="no shard"):
        open_rows(tmp_path / "nowhere", tmp_path / "cache", None)
    with pytest.raises(StageError, match="among the kept ones"):
        open_rows(shards, tmp_path / "cache", keep_file(tmp_path / "keep.parquet", []))
    with pytest.raises(StageError, match=r"2 rows to keep are not in .*, first 6"):
        open_rows(shards, tmp_path / "cache", keep_file(tmp_path / "keep.parquet", [0, 7, 6]))


@pytest.mark.parametrize(("epochs", "steps"), [(1, 4), (2.5, 10), (0.01, 1)])
def test_every_epoch_is_a_new_permutation(epochs: float, steps: int) -> None:
    schedule = Schedule(examples=11, batch_size=3, epochs=epochs, seed=1)
    assert (schedule.steps_per_epoch, schedule.steps) == (4, steps)
    first = [schedule.batch(step) for step in range(4)]
    second = [schedule.batch(step) for step in range(4, 8)]
    assert [len(batch) for batch in first] == [3, 3, 3, 2]
    assert sorted(np.concatenate(first)) == sorted(np.concatenate(second)) == list(range(11))
    assert np.concatenate(first).tolist() != np.concatenate(second).tolist()
    assert schedule.batch(0).tolist() == first[0].tolist()
    assert Schedule(examples=11, batch_size=3, epochs=1, seed=2).batch(0).tolist() != first[0].tolist()


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_workers_share_the_batch_of_one_worker(
    shards: pathlib.Path, tmp_path: pathlib.Path, tiny_model: tuple[Any, Any], world_size: int
) -> None:
    data = open_rows(shards, tmp_path / "cache", None)
    schedule = Schedule(examples=len(data), batch_size=4, epochs=1, seed=0)
    alone, shared = (
        StepBatches(rows=data, schedule=schedule, processor=tiny_model[1], max_length=4096, world_size=size)
        for size in (1, world_size)
    )
    assert len(shared) == len(alone) * world_size

    def answers(batch: dict[str, Any]) -> list[list[int]]:
        return [row[row != IGNORED].tolist() for row in batch["labels"] if (row != IGNORED).any()]

    for step in range(len(alone)):
        shares = [shared[step * world_size + rank] for rank in range(world_size)]
        assert sorted(one for share in shares for one in answers(share)) == sorted(answers(alone[step]))
