"""The actor of the guard stage: what a guarded prefill would see of kept rows."""

from __future__ import annotations

import pathlib
from collections.abc import Collection, Sequence
from typing import Any, Literal

import pyarrow as pa
import torch
from safetensors.torch import load_file

from pipeline.attention import LayerStatistics, Tap, attach, base_of, prompt_regions, reduce_layer, tapped
from pipeline.decoder import attention_layers
from pipeline.generation import encode_on
from pipeline.models import Dtype, image_token_id, load_adapter, load_base
from pipeline.records import Example, examples_of, sample_from_record
from stages.guard.detector import chosen_layers, feature_vectors
from stages.guard.files import dtype_name
from stages.guard.transfer import TransferTest, image_attention, variants

REFERENCE = pa.schema(
    [
        ("row", pa.int64()),
        ("turn", pa.int32()),
        ("dtype", pa.string()),
        ("layers", pa.list_(pa.int32())),
        ("vector", pa.list_(pa.float32())),
        ("first_token", pa.int64()),
        ("attended", pa.float64()),
        ("whole", pa.float64()),
    ]
)
"""One pictured example: the type of the weights, as torch names it, the layers read, the detection vector, the first token of the
answer, and the shares of hosts that take it over with its attended tokens and with its whole picture planted; NaN where these were
not tried, or can't tell."""


class ReferenceWorker:
    """Holds the model that is guarded; turns canonical records into reference records."""

    def __init__(
        self,
        *,
        base: str,
        adapter: str,
        dtype: Dtype,
        batch_size: int,
        layers: Literal["all", "middle"] | Sequence[int],
        features: Sequence[str],
        hosts: Sequence[str],
        tried: Collection[int],
    ) -> None:
        model, self.processor = load_base(pathlib.Path(base), dtype=dtype)
        self.model = load_adapter(model, pathlib.Path(adapter))
        attach(self.model)
        self.layers = chosen_layers(layers, len(attention_layers(base_of(self.model))))
        self.features = tuple(features)
        self.batch_size = batch_size
        self.test = TransferTest(self.model, [load_file(path) for path in hosts]) if hosts else None
        self.tried = frozenset(tried)
        self._image_token = image_token_id(base_of(self.model).config)
        self._dtype = dtype_name(self.model)

    def __call__(self, table: pa.Table) -> pa.Table:
        samples = [sample_from_record(record) for record in table.to_pylist()]
        examples = [example for sample in samples for example in examples_of(sample) if example.images]
        batches = (examples[start : start + self.batch_size] for start in range(0, len(examples), self.batch_size))
        return pa.Table.from_pylist([record for batch in batches for record in self.records(batch)], schema=REFERENCE)

    @torch.inference_mode()
    def records(self, examples: Sequence[Example]) -> list[dict[str, Any]]:
        """The reference records of a batch."""
        inputs = encode_on(self.model, self.processor, examples)
        regions = prompt_regions(inputs["input_ids"], inputs["attention_mask"], self._image_token)
        weights: dict[int, torch.Tensor] = {}
        statistics: dict[int, LayerStatistics] = {}
        embeddings: list[Any] = []

        def observe(layer: int, row: torch.Tensor) -> None:
            if layer in self.layers:
                weights[layer], statistics[layer] = row, reduce_layer(row, regions, top=1)

        def keep(_module: torch.nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            embeddings.append(kwargs.get("inputs_embeds"))

        handle = base_of(self.model).get_decoder().register_forward_pre_hook(keep, with_kwargs=True)
        try:
            with tapped(Tap(observer=observe)):
                first = self.model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1].argmax(-1)
        finally:
            handle.remove()
        vectors = feature_vectors(statistics, regions.image.sum(-1), self.layers, self.features).cpu().numpy()
        attention = image_attention(weights, regions.image)
        records = []
        for k, example in enumerate(examples):
            image = regions.image[k]
            record = {"row": example.row, "turn": example.turn, "dtype": self._dtype}
            record |= {"layers": self.layers, "vector": vectors[k]}
            shares = dict.fromkeys(("attended", "whole"), float("nan"))
            if self.test is not None and example.row in self.tried:
                for name, chosen in variants(attention[k, image]).items():
                    shares[name] = self.test.share(int(first[k]), embeddings[0][k, image], chosen, screen=False)
            records.append({**record, "first_token": int(first[k]), **shares})
        return records
