"""Tables in any order become one file in row order, and nothing that is missing or doubled goes unseen."""

from __future__ import annotations

import itertools
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import StageError
from storage.ordered import rows_of_shards, write_ordered
from tests.conftest import colour_samples, write_shards

ROWS = np.array([0, 1, 4, 5, 9, 10, 11])


def table(*records: tuple[int, int]) -> pa.Table:
    """Records (row, turn)."""
    return pa.table({"row": pa.array([row for row, _ in records], pa.int64()), "turn": [turn for _, turn in records]})


PARTS = [table((0, 0), (0, 1), (1, 0)), table((4, 0)), table((5, 0), (9, 0), (9, 1), (9, 2)), table((10, 0), (11, 0))]
WHOLE = [(0, 0), (0, 1), (1, 0), (4, 0), (5, 0), (9, 0), (9, 1), (9, 2), (10, 0), (11, 0)]


def test_every_order_gives_the_same_bytes(tmp_path: pathlib.Path) -> None:
    found = set()
    for number, order in enumerate(itertools.permutations(PARTS)):
        path = tmp_path / f"{number}.parquet"
        assert write_ordered(iter(order), ROWS, path) == len(WHOLE)
        found.add(path.read_bytes())
    assert len(found) == 1
    assert [tuple(record.values()) for record in pq.read_table(path).to_pylist()] == WHOLE


def test_what_is_in_order_is_not_held(tmp_path: pathlib.Path) -> None:
    """Every table is written before the next one is asked for."""
    path = tmp_path / "x.parquet"
    sizes = []

    def parts() -> object:
        for part in PARTS:
            sizes.append(path.stat().st_size if path.exists() else 0)
            yield part

    write_ordered(parts(), ROWS, path)  # type: ignore[arg-type]
    assert sizes == sorted(set(sizes))


def test_rows_inside_of_a_table_may_be_unordered_and_tables_empty(tmp_path: pathlib.Path) -> None:
    mixed = table((1, 0), (0, 0), (1, 1), (0, 1))
    assert write_ordered([mixed.slice(0, 0), mixed, mixed.slice(0, 0)], np.array([0, 1]), tmp_path / "x.parquet") == 4
    assert pq.read_table(tmp_path / "x.parquet")["row"].to_pylist() == [0, 0, 1, 1]
    assert pq.read_table(tmp_path / "x.parquet")["turn"].to_pylist() == [0, 1, 0, 1]


BAD = {
    "the first is missing": (PARTS[1:], "row 0 has no result; 0 of 7 rows"),
    "one between is missing": ([PARTS[0], PARTS[2], PARTS[3]], "row 4 has no result; 2 of 7 rows"),
    "the last is missing": (PARTS[:3], "row 10 has no result; 5 of 7 rows"),
    "nothing came": ([], "row 0 has no result"),
    "a table lacks a row": ([PARTS[0], PARTS[1], table((5, 0), (10, 0), (11, 0))], "results around row 5 are incomplete"),
    "twice, while it waits": ([PARTS[2], PARTS[2], PARTS[0], PARTS[1], PARTS[3]], "results of row 5 came twice"),
    "twice, after it was written": ([PARTS[0], PARTS[0], *PARTS[1:]], "results of row 0 came twice"),
    "twice, the last": ([*PARTS, PARTS[3]], "results of row 10 came twice"),
    "overlapping": ([PARTS[0], table((1, 0), (4, 0)), *PARTS[2:]], "results of row 1 came twice"),
    "overlapping at the end": ([*PARTS[:3], table((9, 0), (10, 0), (11, 0))], "results of row 9 came twice"),
    "overlapping inside": ([PARTS[0], PARTS[1], table((5, 0), (9, 0), (10, 0)), PARTS[3]], "results of row 10 came twice"),
    "not asked for": ([*PARTS, table((12, 0))], "row 12, which was not asked for"),
    "not asked for, between": ([PARTS[0], table((2, 0)), *PARTS[1:]], "row 2, which was not asked for"),
}


@pytest.mark.parametrize("name", BAD)
def test_missing_and_doubled_rows(name: str, tmp_path: pathlib.Path) -> None:
    tables, says = BAD[name]
    with pytest.raises(StageError, match=says):
        write_ordered(tables, ROWS, tmp_path / "x.parquet")


def test_a_failing_source_is_passed_on(tmp_path: pathlib.Path) -> None:
    def broken() -> object:
        yield PARTS[0]
        raise StageError("the worker died")

    with pytest.raises(StageError, match="the worker died"):
        write_ordered(broken(), ROWS, tmp_path / "x.parquet")  # type: ignore[arg-type]


def test_rows_of_shards(tmp_path: pathlib.Path) -> None:
    shards = write_shards(tmp_path, [*colour_samples(5), *colour_samples(3, first=20)], shard_rows=3)
    assert rows_of_shards(shards).tolist() == [0, 1, 2, 3, 4, 20, 21, 22]
    assert rows_of_shards([]).tolist() == []
