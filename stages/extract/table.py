"""The attention table as arrays, for the stages that read it."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import StageError

_TEXTS = ("question", "answer")
_NUMBERS = ("row", "turn", "image_tokens")
_SHAPE = ("layers", "heads")
_STATISTICS = {"entropy": 2, "head_entropy": 3, "image_share": 3, "ratio": 3}
"""And their dimensions: examples, layers and, where there are three, heads."""
_ROWS = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionTable:
    """The pictured examples of an attention table; text-only examples are left out.

    Attributes:
        row, turn: int (examples,).
        question, answer: the submitted texts, one per example.
        image_tokens: int (examples,).
        entropy: float (examples, layers), nats, of the head-averaged image attention.
        head_entropy, image_share, ratio: float (examples, layers, heads).
    """

    row: np.ndarray
    turn: np.ndarray
    question: list[str]
    answer: list[str]
    image_tokens: np.ndarray
    entropy: np.ndarray
    head_entropy: np.ndarray
    image_share: np.ndarray
    ratio: np.ndarray

    def __len__(self) -> int:
        return len(self.row)

    @classmethod
    def from_arrow(cls, table: pa.Table) -> AttentionTable:
        """Take the extract stage's records.

        Raises:
            StageError: examples disagree in layers or heads, or a statistic is not finite.
        """
        return cls._gathered(table.to_batches(), int((table["image_tokens"].to_numpy() > 0).sum()))

    @classmethod
    def read(cls, path: pathlib.Path) -> AttentionTable:
        """Read `attention.parquet`, some records at a time: what is in memory are the arrays."""
        pictured = int((pq.read_table(path, columns=["image_tokens"])["image_tokens"].to_numpy() > 0).sum())
        with pq.ParquetFile(path) as file:
            return cls._gathered(file.iter_batches(batch_size=_ROWS, columns=[*_TEXTS, *_NUMBERS, *_SHAPE, *_STATISTICS]), pictured)

    @classmethod
    def _gathered(cls, batches: Iterable[pa.RecordBatch], pictured: int) -> AttentionTable:
        """The pictured examples of all batches, of which there are so many."""
        texts: dict[str, list[str]] = {name: [] for name in _TEXTS}
        numbers: dict[str, list[np.ndarray]] = {name: [np.empty(0, dtype=np.int32)] for name in _NUMBERS}
        arrays = {name: np.empty((0,) * dimensions, dtype=np.float32) for name, dimensions in _STATISTICS.items()}
        shape, start = None, 0
        for whole in batches:
            batch = whole.filter(pa.array(whole["image_tokens"].to_numpy() > 0))
            if not len(batch):
                continue
            shapes = {*zip(*(batch[name].to_pylist() for name in _SHAPE), strict=True), *([shape] if shape else [])}
            if len(shapes) > 1:
                raise StageError(f"the attention table mixes models: (layers, heads) are {sorted(shapes)}")
            if shape is None:
                (shape,) = shapes
                arrays = {name: np.empty((pictured, *shape[: n - 1]), dtype=np.float32) for name, n in _STATISTICS.items()}
            rows = slice(start, start + len(batch))
            for name in _NUMBERS:
                numbers[name].append(batch[name].to_numpy())
            for name in _TEXTS:
                texts[name] += batch[name].to_pylist()
            for name in _STATISTICS:
                values = np.asarray(batch[name].flatten()).reshape(len(batch), *arrays[name].shape[1:])
                if not np.isfinite(values).all():
                    bad = batch["row"][int(np.argwhere(~np.isfinite(values))[0, 0])].as_py()
                    raise StageError(
                        f"row {bad}: its {name} is not finite; the provisional model's weights or the picture are damaged"
                    )
                arrays[name][rows] = values
            start = rows.stop
        arrays |= {name: np.concatenate(parts) for name, parts in numbers.items()}
        return cls(question=texts["question"], answer=texts["answer"], **arrays)
