"""Write result tables that arrive in any order as one Parquet file in row order, holding only what is out of order."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import StageError


def rows_of_shards(shards: Sequence[pathlib.Path]) -> np.ndarray:
    """The row positions of canonical shards in order, int64 (rows,); no other column is read."""
    if not shards:
        return np.empty(0, dtype=np.int64)
    return np.concatenate([pq.read_table(shard, columns=["row"])["row"].to_numpy() for shard in shards])


def write_ordered(tables: Iterable[pa.Table], rows: np.ndarray, path: pathlib.Path) -> int:
    """Write tables as they complete the order.

    Args:
        tables: each with a column `row`; a table covers a run of consecutive entries of `rows`, with one or more records per row.
        rows: int64, every row that must appear, ascending.
        path: the Parquet file to write.

    Returns:
        The number of records written.

    Raises:
        StageError: a row is missing, unknown or came twice; the file is incomplete then.
    """
    waiting: dict[int, pa.Table] = {}
    position = written = 0
    writer: pq.ParquetWriter | None = None
    try:
        for table in tables:
            if not table.num_rows:
                continue
            first = int(pc.min(table["row"]).as_py())
            if first in waiting or (position and first <= int(rows[position - 1])):
                raise StageError(f"{path.name}: the results of row {first} came twice")
            waiting[first] = table
            while position < len(rows) and int(rows[position]) in waiting:
                ready = waiting.pop(int(rows[position])).sort_by("row").combine_chunks()
                found = np.unique(ready["row"].to_numpy())
                if not np.array_equal(found, rows[position : position + len(found)]):
                    raise StageError(f"{path.name}: the results around row {rows[position]} are incomplete or doubled")
                writer = writer or pq.ParquetWriter(path, ready.schema, compression="zstd")
                writer.write_table(ready)
                position, written = position + len(found), written + ready.num_rows
    finally:
        if writer is not None:
            writer.close()
    if position != len(rows):
        raise StageError(f"{path.name}: row {rows[position]} has no result; {position} of {len(rows)} rows are written")
    if waiting:
        raise StageError(f"{path.name}: results of row {min(waiting)}, which was not asked for")
    return written
