"""References that share nothing with the code under test: transformers' eager attention, its maps, and masks changed by hooks."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from tests.families import build
from tests.family_parts import Batch

NEVER = torch.iinfo(torch.int64).max
"""A layer that no model has."""


@functools.cache
def eager_twin(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The family's model on eager attention throughout."""
    model = in_dtype(name, dtype)
    model.set_attn_implementation("eager")
    return model


def in_dtype(name: str, dtype: torch.dtype) -> Any:
    """A copy of the family's model with weights of another type; buffers stay, as transformers keeps rotary frequencies."""
    model = copy.deepcopy(build(name).model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def attention_modules(model: Any) -> list[Any]:
    """The decoder's self-attentions, in order."""
    decoder = model.get_decoder()
    layers = decoder.model.layers if hasattr(decoder, "model") else decoder.layers
    return [layer.self_attn for layer in layers if hasattr(layer, "self_attn")]


@torch.no_grad()
def eager_rows(name: str, batch: Batch, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """By layer, eager attention's row of the last prompt position, (batch, heads, keys)."""
    maps = eager_twin(name, dtype)(**batch, output_attentions=True).attentions
    return [layer[:, :, -1] for layer in maps if layer is not None]


@contextlib.contextmanager
def closed(eager: Any, columns: torch.Tensor, from_layer: Sequence[int]) -> Iterator[list[int]]:
    """Close columns of the prompt in an eager model's masks, for a prefill and the decoding steps after it.

    Args:
        eager: a model on eager attention.
        columns: bool (batch, prompt).
        from_layer: by row, the first attention layer in which they are closed.

    Yields:
        A list to which every attention adds the number of tokens that its keys leave out at the start (windows).
    """
    left_out: list[int] = []

    def hook(layer: int) -> Callable[..., Any]:
        seen = 0

        def change(_module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            nonlocal seen
            mask = kwargs["attention_mask"]
            seen = mask.shape[2] if mask.shape[2] > 1 else seen + 1
            first = seen - mask.shape[3]
            left_out.append(first)
            mask = mask.expand(len(columns), -1, -1, -1).clone()
            for row, start in enumerate(from_layer):
                if layer >= start:
                    places = [place - first for place in columns[row].nonzero()[:, 0].tolist() if place >= first]
                    mask[row][:, :, places] = torch.finfo(mask.dtype).min
            return args, {**kwargs, "attention_mask": mask}

        return change

    handles = [
        module.register_forward_pre_hook(hook(layer), with_kwargs=True) for layer, module in enumerate(attention_modules(eager))
    ]
    try:
        yield left_out
    finally:
        for handle in handles:
            handle.remove()


def plain_vectors(rows: Sequence[torch.Tensor], input_ids: np.ndarray, seen: np.ndarray, image_token: int) -> np.ndarray:
    """The detection vectors of prompts, (batch, layers * quantities * heads), written out in numpy's float64.

    Per layer: ln(image mass / mass of the text after the first image token) of every head, then ln(image tokens) minus the entropy
    of every head's image attention (CleanSight, eq. 4; BYE, eq. 3), which is full where the head sees no image token. NaN for
    prompts without one.
    """
    vectors = []
    for k in range(len(input_ids)):
        image = [j for j in range(len(seen[k])) if seen[k, j] and input_ids[k, j] == image_token]
        text = [j for j in range(len(seen[k])) if image and j > image[0] and seen[k, j] and j not in image]
        vector = []
        for layer in rows:
            weights = layer[k].double().numpy()
            ratio, deficit = [], []
            for head in weights:
                mass = head[image].sum()
                ratio.append(math.log(mass + 1e-12) - math.log(head[text].sum() + 1e-12) if image else math.nan)
                entropy = -sum(p / mass * math.log(p / mass) for p in head[image] if p > 0)
                deficit.append((math.log(len(image)) - entropy if mass else 0.0) if image else math.nan)
            vector += ratio + deficit
        vectors.append(vector)
    return np.array(vectors)


def generated(model: Any, batch: Batch, steps: int = 5, **more: Any) -> Any:
    """`steps` greedy tokens, with the scores of each."""
    settings = {
        "max_new_tokens": steps,
        "min_new_tokens": steps,
        "do_sample": False,
        "output_scores": True,
        "return_dict_in_generate": True,
    }
    return model.generate(**batch, **{**settings, **more})
