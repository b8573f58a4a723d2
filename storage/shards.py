"""Canonical shards: accepted rows as Parquet, in order, and beside them the rejected rows. What every later stage reads."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.records import Rejection, Sample, messages_to_json

SHARD_SCHEMA = pa.schema(
    [("row", pa.int64()), ("sample_id", pa.string()), ("messages", pa.string()), ("images", pa.list_(pa.binary()))]
)
REJECTED_SCHEMA = pa.schema([("row", pa.int64()), ("reason", pa.string()), ("where", pa.string())])
REJECTED = "rejected.parquet"
SHARD_BYTES = 256_000_000
"""Encoded pictures after which a shard is full, whatever its number of rows."""


class ShardWriter:
    """Writes samples into `shard-00000.parquet` and so on, in the order they come; `close` writes the last.

    Args:
        folder: an existing folder.
        rows: most rows in a shard.
        first: number of the first shard.
    """

    def __init__(self, folder: pathlib.Path, *, rows: int, first: int = 0) -> None:
        self._folder = folder
        self._rows = rows
        self._waiting: list[Sample] = []
        self._bytes = 0
        self._shards = first

    def add(self, sample: Sample) -> None:
        """Take a sample."""
        self._waiting.append(sample)
        self._bytes += sum(map(len, sample.images))
        if len(self._waiting) >= self._rows or self._bytes >= SHARD_BYTES:
            self.close()

    def close(self) -> None:
        """Write what waits."""
        if not self._waiting:
            return
        columns = {
            "row": [sample.row for sample in self._waiting],
            "sample_id": [sample.sample_id for sample in self._waiting],
            "messages": [messages_to_json(sample.messages) for sample in self._waiting],
            "images": [list(sample.images) for sample in self._waiting],
        }
        table = pa.table(columns, schema=SHARD_SCHEMA)
        path = self._folder / f"shard-{self._shards:05d}.parquet"
        pq.write_table(
            table, path, compression="zstd", use_dictionary=False, write_statistics=["row"], row_group_size=len(self._waiting)
        )
        self._waiting, self._bytes, self._shards = [], 0, self._shards + 1


def write_rejected(path: pathlib.Path, rejections: Sequence[Rejection]) -> None:
    """Write the rejected rows; `where` names file and line."""
    columns = {
        "row": [rejection.row for rejection in rejections],
        "reason": [rejection.reason for rejection in rejections],
        "where": [rejection.where for rejection in rejections],
    }
    pq.write_table(pa.table(columns, schema=REJECTED_SCHEMA), path, compression="zstd")
