"""What the tests of the guarded model share: prompts for a tiny LLaVA, and detectors that flag what they are told to."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from pipeline.attention import Block, LayerStatistics, Tap, attached, base_of, prompt_regions, reduce_layer, tapped
from pipeline.records import Example, question_answer
from stages.guard.detector import FEATURES, Detector, feature_vectors
from stages.guard.transfer import TransferRule
from tests.conftest import picture
from tests.stages.guard.detectors import plain_detector
from tests.stages.samples import noise

LAYERS, HEADS = 3, 4
FAR = 1e9
"""A threshold that nothing exceeds."""

Batch = dict[str, torch.Tensor]


def asked(question: str, *seeds: int) -> Example:
    return Example(row=0, turn=0, prompt=question_answer(question, "x", len(seeds))[:1], answer="", images=tuple(map(noise, seeds)))


def coloured(question: str, *colours: str) -> Example:
    prompt = question_answer(question, "x", len(colours))[:1]
    return Example(row=0, turn=0, prompt=prompt, answer="", images=tuple(map(picture, colours)))


def generated(model: Any, batch: Batch, **more: Any) -> Any:
    settings = {
        "max_new_tokens": 5,
        "min_new_tokens": 5,
        "do_sample": False,
        "output_scores": True,
        "return_dict_in_generate": True,
    }
    return model.generate(**batch, **{**settings, **more})


@dataclasses.dataclass(frozen=True)
class Prefill:
    """What an unguarded prefill shows: vectors (batch, dimensions), rows of weights by layer, image tokens (batch, keys)."""

    vectors: torch.Tensor
    weights: dict[int, torch.Tensor]
    image: torch.Tensor


def prefill(model: Any, batch: Batch) -> Prefill:
    regions = prompt_regions(batch["input_ids"], batch["attention_mask"], base_of(model).config.image_token_id)
    weights: dict[int, torch.Tensor] = {}
    statistics: dict[int, LayerStatistics] = {}

    def observe(layer: int, row: torch.Tensor) -> None:
        weights[layer], statistics[layer] = row, reduce_layer(row, regions, top=1)

    with attached(model), torch.inference_mode(), tapped(Tap(observer=observe)):
        model(**batch)
    vectors = feature_vectors(statistics, regions.image.sum(-1), range(LAYERS), FEATURES)
    return Prefill(vectors=vectors, weights=weights, image=regions.image)


def detector_for(seen: Prefill, row: int, rewind: int) -> Detector:
    """Flags one row alone, and rewinds it to a layer: the reference is another row's vector."""
    others = [k for k in range(len(seen.vectors)) if k != row and bool(seen.image[k].any())]
    mean = seen.vectors[others].mean(dim=0)
    cells = (seen.vectors - mean).reshape(len(seen.vectors), LAYERS, len(FEATURES), HEADS)
    limits = torch.where(torch.arange(LAYERS) >= rewind, cells[row].abs().amax(dim=(1, 2)) / 2, FAR)
    concentrated = cells[row, :, FEATURES.index("deficit")]
    assert concentrated.max() > 0
    detector = dataclasses.replace(plain_detector(), mean=mean, layer_thresholds=limits)
    scale = torch.ones_like(mean)
    distances = detector.distances(seen.vectors)
    if distances[row] <= distances[others].max():  # weigh the dimension in which it differs most
        scale[(seen.vectors[row] - mean).abs().argmax()] = 100
        detector = dataclasses.replace(detector, whitening=torch.diag(scale))
        distances = detector.distances(seen.vectors)
    assert distances[row] > distances[others].max(), "the test's own picture does not stand out"
    return dataclasses.replace(detector, threshold=float((distances[row] + distances[others].max()) / 2))


def state(model: Any) -> tuple[str, int, int, int]:
    """The attention that the decoder's layers look up, and the hooks on the model that generates and on its decoder."""
    base = base_of(model)
    decoder = base.get_decoder()
    (attention,) = {layer.self_attn.config._attn_implementation for layer in decoder.layers}
    return attention, len(base._forward_pre_hooks), len(base._forward_hooks), len(decoder._forward_pre_hooks)


def same_scores(a: Any, b: Any, rows: Sequence[int]) -> bool:
    return all(torch.equal(x[list(rows)], y[list(rows)]) for x, y in zip(a.scores, b.scores, strict=True))


def first_tokens(model: Any, batch: Batch) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(**batch).logits[:, -1].argmax(-1)
    return found


def rule_for(model: Any, batch: Batch, hosts: tuple[Batch, ...], *rows: int, **given: Any) -> TransferRule:
    """Some rows are suspicious: what the others begin with is familiar."""
    first = first_tokens(model, batch)
    others = [k for k in range(len(first)) if k not in rows]
    assert not torch.isin(first[list(rows)], first[others]).any(), "the test's pictures do not tell answers apart"
    settings = {"hosts": hosts, "distance": FAR, "familiar": first[others], "attended": 0.5, "whole": 0.5}
    return TransferRule(**{**settings, **given})


def late_detector(**given: Any) -> Detector:
    """Flags nothing, and rewinds to the last layer."""
    return dataclasses.replace(plain_detector(threshold=FAR), layer_thresholds=torch.tensor([FAR, FAR, 1e-6]), **given)


def under_block(model: Any, batch: Batch, block: Block, **more: Any) -> Any:
    with attached(model), tapped(Tap(block=block)), torch.inference_mode():
        return generated(model, batch, **more)
