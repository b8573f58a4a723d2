"""The training rows: memory-mapped, in an order that depends on the seed alone, never on the number of workers."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from pipeline.errors import StageError
from pipeline.prompts import IGNORED, Batch, encode_training
from pipeline.records import Example, examples_of, sample_from_record
from storage.subset import canonical_shards


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingRows:
    """Canonical rows on disk and the examples in them.

    Attributes:
        records: a memory-mapped `datasets.Dataset` of `row`, `messages` and `images`.
        index: int64 (examples, 2): position in `records`, and the assistant turn.
    """

    records: Any
    index: np.ndarray

    def __len__(self) -> int:
        return len(self.index)

    @property
    def rows(self) -> int:
        """Rows that hold an example."""
        return len(np.unique(self.index[:, 0]))

    def example(self, number: int) -> Example:
        """Read one example from disk."""
        position, turn = self.index[number]
        return examples_of(sample_from_record(self.records[int(position)]))[int(turn)]

    def longest(self) -> Iterator[Example]:
        """The last example of every row: it holds the texts and pictures of all."""
        for position in np.unique(self.index[:, 0]).tolist():
            yield examples_of(sample_from_record(self.records[position]))[-1]


def open_rows(rows: pathlib.Path, cache: pathlib.Path, keep: pathlib.Path | None) -> TrainingRows:
    """Open the shards of a folder without reading them into memory.

    Args:
        rows: folder with shard-*.parquet.
        cache: folder for the memory-mapped copy.
        keep: a Parquet file whose column `row` names the rows to train on; None trains on all.

    Raises:
        StageError: no shards, rows to keep that aren't there, or nothing to train on.
    """
    import datasets

    shards = canonical_shards(rows)
    if not shards:
        raise StageError(f"{rows}: no shard-*.parquet to train on")
    datasets.disable_progress_bars()
    columns = ["row", "messages", "images"]
    records = datasets.Dataset.from_parquet([str(path) for path in shards], cache_dir=str(cache), columns=columns)
    numbers = np.asarray(records.data.column("row"), dtype=np.int64)
    chosen = np.ones(len(numbers), dtype=bool)
    if keep is not None:
        kept = np.asarray(pq.read_table(keep, columns=["row"]).column("row"), dtype=np.int64)
        absent = np.setdiff1d(kept, numbers)
        if len(absent):
            raise StageError(f"{keep}: {len(absent)} rows to keep are not in {rows}, first {absent[0]}")
        chosen = np.isin(numbers, kept)
    index = []
    for position, messages in enumerate(records.data.column("messages")):
        if chosen[position]:
            answers = sum(message["role"] == "assistant" for message in json.loads(messages.as_py()))
            index += [(position, turn) for turn in range(answers)]
    if not index:
        raise StageError(f"{rows}: no row with an answer to train on{' among the kept ones' if keep is not None else ''}")
    return TrainingRows(records=records, index=np.asarray(index, dtype=np.int64))


@dataclasses.dataclass(kw_only=True)
class Schedule:
    """Which examples make up which step: a new permutation per epoch, cut into batches; the last of an epoch may be short."""

    examples: int
    batch_size: int
    epochs: float
    seed: int
    _shuffled: tuple[int, np.ndarray] | None = None

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.examples / self.batch_size)

    @property
    def steps(self) -> int:
        return max(1, round(self.epochs * self.steps_per_epoch))

    def batch(self, step: int) -> np.ndarray:
        """Numbers of the examples of a step, counted from 0. int64 (at most batch_size,)."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if self._shuffled is None or self._shuffled[0] != epoch:
            self._shuffled = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.examples)
        return self._shuffled[1][within * self.batch_size : (within + 1) * self.batch_size]


@dataclasses.dataclass(kw_only=True)
class StepBatches(torch.utils.data.Dataset[Batch]):
    """One item per step and worker, in this order: the worker's share of the step's batch, ready for the model."""

    rows: TrainingRows
    schedule: Schedule
    processor: Any
    max_length: int
    world_size: int

    def __len__(self) -> int:
        return self.schedule.steps * self.world_size

    def __getitem__(self, item: int) -> Batch:
        step, rank = divmod(item, self.world_size)
        batch = self.schedule.batch(step)
        share = batch[rank :: self.world_size]
        encoded = encode_training(
            self.processor, [self.rows.example(n) for n in (share if len(share) else batch[:1])], self.max_length
        )
        if not len(share):  # an epoch's last batch may be smaller than the number of workers: this one adds nothing to the loss
            encoded["labels"].fill_(IGNORED)
        return encoded
