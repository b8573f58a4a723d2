"""The actor of the extract stage: one prefill per example, one query row per layer."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipeline.attention import LayerStatistics, Tap, attach, base_of, prompt_regions, reduce_layer, tapped
from pipeline.decoder import attention_layers
from pipeline.errors import ModelError
from pipeline.generation import encode_on
from pipeline.models import Dtype, image_token_id, load_adapter, load_base
from pipeline.records import Example, examples_of, sample_from_record

LISTS = ("entropy", "head_entropy", "image_share", "ratio", "top_positions", "top_weights")
"""Columns that hold one flat list per example; layers come first in each, then heads or places."""


class ExtractWorker:
    """Holds the provisional model; turns canonical records into attention statistics."""

    def __init__(self, *, base: str, adapter: str | None, dtype: Dtype, batch_size: int, top_tokens: int) -> None:
        self.model, self.processor = load_base(pathlib.Path(base), dtype=dtype)
        if adapter is not None:
            self.model = load_adapter(self.model, pathlib.Path(adapter))
        attach(self.model)
        self.layers = len(attention_layers(base_of(self.model)))
        self.batch_size = batch_size
        self.top_tokens = top_tokens

    def __call__(self, table: pa.Table) -> pa.Table:
        """Canonical records to one record per example; text-only examples have `image_tokens` 0 and empty statistics."""
        examples = [example for record in table.to_pylist() for example in examples_of(sample_from_record(record))]
        pictured = [example for example in examples if example.images]
        found: dict[tuple[int, int], dict[str, Any]] = {}
        for start in range(0, len(pictured), self.batch_size):
            batch = pictured[start : start + self.batch_size]
            found.update(zip([(e.row, e.turn) for e in batch], self.statistics(batch), strict=True))
        return records_to_table(examples, found)

    @torch.inference_mode()
    def statistics(self, examples: list[Example]) -> list[dict[str, Any]]:
        """The statistics of a batch of examples, one mapping of flat float32 arrays each."""
        inputs = encode_on(self.model, self.processor, examples)
        regions = prompt_regions(inputs["input_ids"], inputs["attention_mask"], image_token_id(self.model.config))
        layers: dict[int, LayerStatistics] = {}

        def observe(layer: int, weights: torch.Tensor) -> None:
            layers[layer] = reduce_layer(weights, regions, self.top_tokens)

        with tapped(Tap(observer=observe)):
            self.model(**inputs, use_cache=False, logits_to_keep=1)
        ordered = _in_order(layers, self.layers)
        stacked = {name: torch.stack([getattr(layer, name) for layer in ordered], dim=1).cpu().numpy() for name in LISTS}
        tokens = regions.image.sum(-1).cpu().numpy()
        shape = stacked["ratio"].shape
        return [
            {"image_tokens": int(tokens[k]), "layers": shape[1], "heads": shape[2], **{n: v[k].ravel() for n, v in stacked.items()}}
            for k in range(len(examples))
        ]


def _in_order(layers: dict[int, LayerStatistics], count: int) -> list[LayerStatistics]:
    """The statistics of all layers; raises ModelError where one is missing or the layers can't be stacked."""
    if unseen := sorted(set(range(count)) - layers.keys()):
        raise ModelError(f"attention layers {unseen} did not run; the model's attention can't be read")
    if len(heads := {layer.ratio.shape[1] for layer in layers.values()}) > 1:
        raise ModelError(f"the model's layers have {sorted(heads)} attention heads; ByeSight needs the same number in all")
    return [layers[index] for index in range(count)]


def records_to_table(examples: list[Example], found: dict[tuple[int, int], dict[str, Any]]) -> pa.Table:
    """The output table of a batch, with one record per example in order."""
    empty: dict[str, Any] = {"image_tokens": 0, "layers": 0, "heads": 0, **dict.fromkeys(LISTS, np.empty(0, np.float32))}
    records = [found.get((example.row, example.turn), empty) for example in examples]
    columns: dict[str, pa.Array] = {
        "row": pa.array([example.row for example in examples], pa.int64()),
        "turn": pa.array([example.turn for example in examples], pa.int32()),
        "question": pa.array([example.question for example in examples], pa.string()),
        "answer": pa.array([example.answer for example in examples], pa.string()),
    }
    for name in ("image_tokens", "layers", "heads"):
        columns[name] = pa.array([record[name] for record in records], pa.int32())
    for name in LISTS:
        kind = pa.int32() if name == "top_positions" else pa.float32()
        columns[name] = pa.array([record[name] for record in records], pa.list_(kind))
    return pa.table(columns)
