"""Copies of shards hold the chosen rows, unchanged or changed as asked."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.records import Sample, question_answer, sample_from_record
from storage.subset import canonical_shards, copy_rows, pictured_rows, read_rows
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


def test_shards_without_a_chosen_row_are_not_read(rows: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the numbers of their rows."""
    first, second, third = canonical_shards(rows)
    read = read_columns(monkeypatch)
    assert [sample.row for sample in read_rows(rows, [5, 7])] == [5, 7]
    assert read == [(first, ["row"]), (second, ["row"]), (second, None), (third, ["row"])]


def test_no_picture_is_read_to_know_that_it_is_there(rows: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = read_columns(monkeypatch)
    assert len(pictured_rows(rows)) == 6
    assert {name for _, columns in read for name in columns or ["all"]} == {"row", "messages"}


def read_columns(monkeypatch: pytest.MonkeyPatch) -> list[tuple[pathlib.Path, list[str] | None]]:
    """What is read from now on: the files, and which of their columns."""
    read: list[tuple[pathlib.Path, list[str] | None]] = []
    read_table = pq.read_table

    def noted(path: pathlib.Path, columns: list[str] | None = None, **options: Any) -> pa.Table:
        read.append((path, columns))
        return read_table(path, columns=columns, **options)

    monkeypatch.setattr(pq, "read_table", noted)
    return read


def test_pictured_rows(rows: pathlib.Path, tmp_path: pathlib.Path) -> None:
    assert pictured_rows(rows).tolist() == [1, 2, 3, 5, 6, 7]
    assert pictured_rows(tmp_path / "nowhere").tolist() == []
    assert pictured_rows(tmp_path / "nowhere").dtype == np.int64
