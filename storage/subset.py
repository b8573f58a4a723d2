"""Some rows of canonical shards, read or copied, or changed on the way; one shard in memory at a time."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import pyarrow.parquet as pq

from pipeline.records import Example, Sample, examples_of, sample_from_record
from storage.ordered import rows_of_shards
from storage.shards import ShardWriter

_ROWS = 512
Place = tuple[int, int]
"""Row and turn of an example."""


def canonical_shards(rows: pathlib.Path) -> list[pathlib.Path]:
    """The shards of a folder in order."""
    return sorted(rows.glob("shard-*.parquet"))


def read_rows(rows: pathlib.Path, chosen: Iterable[int] | None = None) -> Iterator[Sample]:
    """Some rows of canonical shards, in order.

    Args:
        rows: folder of shards.
        chosen: row positions; None gives all.
    """
    wanted = None if chosen is None else np.unique(np.fromiter(chosen, dtype=np.int64))
    for shard in canonical_shards(rows):
        filters = None
        if wanted is not None:
            here = np.intersect1d(rows_of_shards([shard]), wanted)
            if not len(here):
                continue
            filters = [("row", "in", here.tolist())]
        yield from map(sample_from_record, pq.read_table(shard, filters=filters).to_pylist())


def read_examples(rows: pathlib.Path, wanted: Iterable[Place]) -> Iterator[Example]:
    """Some examples of canonical shards, in order."""
    places = set(wanted)
    for sample in read_rows(rows, {row for row, _ in places}):
        yield from (example for example in examples_of(sample) if (example.row, example.turn) in places)


def copy_rows(
    rows: pathlib.Path, out: pathlib.Path, *, chosen: Iterable[int] | None = None, change: Callable[[Sample], Sample] | None = None
) -> list[pathlib.Path]:
    """Write some rows of canonical shards as canonical shards.

    Args:
        rows: folder of shards.
        out: folder to make.
        chosen: row positions to copy; None copies all.
        change: applied to each copied sample.

    Returns:
        The written shards, in row order.
    """
    out.mkdir(parents=True)
    writer = ShardWriter(out, rows=_ROWS)
    for sample in read_rows(rows, chosen):
        writer.add(sample if change is None else change(sample))
    writer.close()
    return canonical_shards(out)


def pictured_rows(rows: pathlib.Path) -> np.ndarray:
    """Positions of the rows that show a picture, int64 ascending; the turns tell, the pictures themselves are not read."""
    found = []
    for shard in canonical_shards(rows):
        table = pq.read_table(shard, columns=["row", "messages"])
        shown = [
            any(part["type"] == "image" for turn in json.loads(turns) for part in turn["content"])
            for turns in table["messages"].to_pylist()
        ]
        found.append(table["row"].to_numpy()[np.asarray(shown, dtype=bool)])
    return np.concatenate(found) if found else np.empty(0, dtype=np.int64)
