"""The attention table as arrays, for the stages that read it."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import StageError


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
        table = table.filter(pa.array(table["image_tokens"].to_numpy() > 0))
        shapes = {(record["layers"], record["heads"]) for record in table.select(["layers", "heads"]).to_pylist()}
        if len(shapes) > 1:
            raise StageError(f"the attention table mixes models: (layers, heads) are {sorted(shapes)}")
        layers, heads = shapes.pop() if shapes else (0, 0)

        def statistic(name: str, *shape: int) -> np.ndarray:
            flat, start = np.empty((len(table), *shape), dtype=np.float32), 0
            for chunk in table[name].chunks:  # all of them together may hold more values than a list array can count
                flat[start : start + len(chunk)] = np.asarray(chunk.flatten()).reshape(len(chunk), *shape)
                start += len(chunk)
            if not np.isfinite(flat).all():
                bad = int(table["row"][int(np.argwhere(~np.isfinite(flat))[0, 0])].as_py())
                raise StageError(f"row {bad}: its {name} is not finite; the provisional model's weights or the picture are damaged")
            return flat

        return cls(
            row=table["row"].to_numpy(),
            turn=table["turn"].to_numpy(),
            question=table["question"].to_pylist(),
            answer=table["answer"].to_pylist(),
            image_tokens=table["image_tokens"].to_numpy(),
            entropy=statistic("entropy", layers),
            head_entropy=statistic("head_entropy", layers, heads),
            image_share=statistic("image_share", layers, heads),
            ratio=statistic("ratio", layers, heads),
        )

    @classmethod
    def read(cls, path: pathlib.Path) -> AttentionTable:
        """Read `attention.parquet`."""
        columns = [
            "row",
            "turn",
            "question",
            "answer",
            "image_tokens",
            "layers",
            "heads",
            "entropy",
            "head_entropy",
            "image_share",
            "ratio",
        ]
        return cls.from_arrow(pq.read_table(path, columns=columns))
