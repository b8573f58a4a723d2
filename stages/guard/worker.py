"""The actor of the guard stage: what a guarded prefill would see of kept rows."""

from __future__ import annotations

import pathlib
from collections.abc import Collection, Sequence
from typing import Any, Literal

import pyarrow as pa
import torch
from safetensors.torch import load_file

from pipeline.attention import Block, LayerStatistics, Tap, attach, base_of, prompt_regions, reduce_layer, tapped
from pipeline.decoder import attention_layers
from pipeline.generation import encode_on
from pipeline.models import Dtype, image_token_id, load_adapter, load_base
from pipeline.prompts import answer_tokens
from pipeline.records import Example, examples_of, sample_from_record
from stages.guard.detector import chosen_layers, feature_vectors
from stages.guard.files import dtype_name
from stages.guard.transfer import TransferTest, closing_layers, image_attention, variants

REFERENCE = pa.schema(
    [
        ("row", pa.int64()),
        ("turn", pa.int32()),
        ("dtype", pa.string()),
        ("layers", pa.list_(pa.int32())),
        ("vector", pa.list_(pa.float32())),
        ("first_token", pa.int64()),
        ("answer_tokens", pa.list_(pa.int64())),
        ("attended", pa.float64()),
        ("whole", pa.float64()),
        ("changed", pa.list_(pa.bool_())),
        ("count", pa.int32()),
    ]
)
"""One pictured example: the type of the weights, as torch names it, the layers read, the detection vector, the first token of the
model's answer, the tokens of the submitted one, the shares of hosts that take the first over with its attended tokens and with its
whole picture planted (NaN where these were not tried, or can't tell), whether it begins otherwise with the picture closed from each
of `closing_layers` on (null where that was not tried), and the number of attention layers."""


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
        self.count = len(attention_layers(base_of(self.model)))
        self.layers = chosen_layers(layers, self.count)
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
        answers = answer_tokens(self.processor, examples)
        tried = [k for k, example in enumerate(examples) if self.test is not None and example.row in self.tried]
        changed = dict(zip(tried, self._changed([examples[k] for k in tried]), strict=True)) if tried else {}
        vectors = feature_vectors(statistics, regions.image.sum(-1), self.layers, self.features).cpu().numpy()
        attention = image_attention(weights, regions.image)
        records = []
        for k, example in enumerate(examples):
            image = regions.image[k]
            record = {"row": example.row, "turn": example.turn, "dtype": self._dtype, "count": self.count}
            record |= {"layers": self.layers, "vector": vectors[k], "answer_tokens": answers[k]}
            shares = dict.fromkeys(("attended", "whole"), float("nan"))
            if self.test is not None and k in changed:
                for name, chosen in variants(attention[k, image]).items():
                    shares[name] = self.test.share(int(first[k]), embeddings[0][k, image], chosen, screen=False)
            records.append({**record, "first_token": int(first[k]), **shares, "changed": changed.get(k)})
        return records

    def _changed(self, examples: Sequence[Example]) -> list[list[bool]]:
        """Whether each answer begins otherwise with its picture closed from each of the closing layers on."""
        inputs = encode_on(self.model, self.processor, examples)
        image = prompt_regions(inputs["input_ids"], inputs["attention_mask"], self._image_token).image
        first = []
        for layer in (self.count, *closing_layers(self.count)):
            block = Block(keys=image, from_layer=torch.full((len(image),), layer, device=image.device))
            with tapped(Tap(block=block)):
                first.append(self.model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1].argmax(-1))
        changed: list[list[bool]] = (torch.stack(first[1:], dim=1) != first[0][:, None]).tolist()
        return changed
