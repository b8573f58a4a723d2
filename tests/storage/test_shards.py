"""Canonical shards give back the samples that were written, in order and in few files."""

from __future__ import annotations

import pathlib

import pyarrow.parquet as pq
import pytest

from pipeline.records import Rejection, Sample, question_answer, sample_from_record
from storage import shards
from storage.shards import REJECTED_SCHEMA, SHARD_SCHEMA, ShardWriter, write_rejected
from storage.subset import canonical_shards
from tests.stages.samples import mixed_samples

ODD = Sample(
    row=11,
    messages=question_answer('"naïve" 日本 \U0001f600\n\x00', "\\ </s>\u2028", 3),
    images=(b"", b"\x00\xff" * 500, b"\x89PNG"),
)
"""Bytes and text that a careless writer changes."""
SAMPLES = [*mixed_samples(), ODD]


def written(folder: pathlib.Path, samples: list[Sample], rows: int) -> list[pathlib.Path]:
    folder.mkdir(exist_ok=True)
    writer = ShardWriter(folder, rows=rows)
    for sample in samples:
        writer.add(sample)
    writer.close()
    return canonical_shards(folder)


def sizes(paths: list[pathlib.Path]) -> list[int]:
    return [pq.read_metadata(path).num_rows for path in paths]


@pytest.mark.parametrize(("rows", "expected"), [(1, [1] * 8), (3, [3, 3, 2]), (4, [4, 4]), (8, [8]), (100, [8])])
def test_samples_come_back(rows: int, expected: list[int], tmp_path: pathlib.Path) -> None:
    paths = written(tmp_path / "rows", SAMPLES, rows)
    assert [path.name for path in paths] == [f"shard-{index:05d}.parquet" for index in range(len(expected))]
    assert sizes(paths) == expected
    tables = [pq.read_table(path) for path in paths]
    assert all(table.schema.equals(SHARD_SCHEMA) for table in tables)
    records = [record for table in tables for record in table.to_pylist()]
    assert [sample_from_record(record) for record in records] == SAMPLES
    assert [record["sample_id"] for record in records] == [sample.sample_id for sample in SAMPLES]


def test_a_shard_is_full_by_its_pictures_bytes(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture larger than a shard has one of its own; text does not count."""
    monkeypatch.setattr(shards, "SHARD_BYTES", 100)
    lengths = (40, 59, 1, 0, 500, 99, 0, 100)
    samples = [Sample(row=k, messages=question_answer("q" * 300, "a"), images=(bytes(n),)) for k, n in enumerate(lengths)]
    assert sizes(written(tmp_path / "rows", samples, 100)) == [3, 2, 3]


def test_nothing_gives_no_shard_and_closing_twice_no_second_one(tmp_path: pathlib.Path) -> None:
    assert written(tmp_path / "none", [], 4) == []
    writer = ShardWriter(tmp_path, rows=4)
    writer.add(ODD)
    writer.close()
    writer.close()
    assert sizes(canonical_shards(tmp_path)) == [1]


def test_the_rows_of_a_shard_are_in_its_statistics(tmp_path: pathlib.Path) -> None:
    """What reads some rows need not open the other shards."""
    for path, rows in zip(written(tmp_path / "rows", SAMPLES, 4), ((0, 3), (5, 11)), strict=True):
        (group,) = (pq.read_metadata(path).row_group(index) for index in range(pq.read_metadata(path).num_row_groups))
        assert (group.column(0).statistics.min, group.column(0).statistics.max) == rows
        assert group.column(3).statistics is None, "pictures are not copied into the footer"


def test_equal_samples_give_equal_bytes(tmp_path: pathlib.Path) -> None:
    one, two = (written(tmp_path / name, SAMPLES, 3) for name in ("one", "two"))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]


@pytest.mark.parametrize("count", [0, 2])
def test_rejected_rows(count: int, tmp_path: pathlib.Path) -> None:
    rejections = [Rejection(row=9 - k, reason=f"not JSON: {k}", where=f"data.jsonl line {k}") for k in range(count)]
    write_rejected(tmp_path / "rejected.parquet", rejections)
    table = pq.read_table(tmp_path / "rejected.parquet")
    assert table.schema.equals(REJECTED_SCHEMA)
    assert [Rejection(**record) for record in table.to_pylist()] == rejections
