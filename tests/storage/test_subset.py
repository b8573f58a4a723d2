"""Copies of shards hold the chosen rows, unchanged or changed as asked."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.records import Sample, question_answer, sample_from_record
from storage.subset import canonical_shards, copy_rows, pictured_rows
from tests.conftest import colour_samples, picture, write_shards


@pytest.fixture
def rows(tmp_path: pathlib.Path) -> pathlib.Path:
    folder = tmp_path / "rows"
    write_shards(folder, colour_samples(9, text_only=[0, 4, 8]), shard_rows=4)
    return folder


def samples(shards: list[pathlib.Path]) -> list[Sample]:
    return [sample_from_record(record) for shard in shards for record in pq.read_table(shard).to_pylist()]


def test_all_rows(rows: pathlib.Path, tmp_path: pathlib.Path) -> None:
    copied = copy_rows(rows, tmp_path / "out")
    assert copied == canonical_shards(tmp_path / "out")
    assert samples(copied) == colour_samples(9, text_only=[0, 4, 8])
    whole = pa.concat_tables([pq.read_table(shard) for shard in canonical_shards(rows)])
    assert pa.concat_tables([pq.read_table(shard) for shard in copied]) == whole


@pytest.mark.parametrize("chosen", [[7, 2, 2, 5], np.array([5, 7, 2]), {2, 5, 7, 100}, iter([2, 5, 7])])
def test_chosen_rows_come_in_order_and_once(rows: pathlib.Path, tmp_path: pathlib.Path, chosen: object) -> None:
    copied = copy_rows(rows, tmp_path / "out", chosen=chosen)  # type: ignore[arg-type]
    assert [sample.row for sample in samples(copied)] == [2, 5, 7]


def test_none_of_them(rows: pathlib.Path, tmp_path: pathlib.Path) -> None:
    assert copy_rows(rows, tmp_path / "out", chosen=[]) == []
    assert (tmp_path / "out").is_dir()


def test_changed_rows_get_ids_of_their_new_content(rows: pathlib.Path, tmp_path: pathlib.Path) -> None:
    def change(sample: Sample) -> Sample:
        return dataclasses.replace(sample, images=(picture("white"),), messages=question_answer("what?", "x"))

    copied = copy_rows(rows, tmp_path / "out", chosen=[3, 6], change=change)
    (table,) = [pq.read_table(shard) for shard in copied]
    found = samples(copied)
    assert [sample.row for sample in found] == [3, 6]
    assert all(sample.images == (picture("white"),) for sample in found)
    assert table["sample_id"].to_pylist() == [sample.sample_id for sample in found]


def test_an_existing_folder_is_not_written_into(rows: pathlib.Path) -> None:
    with pytest.raises(FileExistsError):
        copy_rows(rows, rows)


def test_pictured_rows(rows: pathlib.Path, tmp_path: pathlib.Path) -> None:
    assert pictured_rows(rows).tolist() == [1, 2, 3, 5, 6, 7]
    assert pictured_rows(tmp_path / "nowhere").tolist() == []
    assert pictured_rows(tmp_path / "nowhere").dtype == np.int64
