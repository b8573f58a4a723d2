"""The one attention mechanism: the model's fast attention plus the one row of weights of the last prompt position.

A function of this module is registered with transformers' AttentionInterface (and its mask twin) under `NAME`. It runs SDPA and,
where a tap is open, computes the softmax row of the last query position alone: memory O(heads x keys) a layer, never a map of N x
N. The same tap can block key columns from a layer on, which is how the guard prunes. Taps live in a context variable: threads do
not see each other's.

BYE (arXiv 2505.16916, section 3.3) and CleanSight (arXiv 2603.12989, section 4) both read this row.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from pipeline.errors import ModelError

NAME = "byesight"
"""The attention implementation's name in a model's configuration."""

Observer = Callable[[int, torch.Tensor], None]
"""Takes a layer's index and the weights of the last query position, float32 (batch, heads, keys), which sum to 1 over the keys."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """Key columns that nothing may attend to.

    Attributes:
        keys: bool (batch, keys), True where blocked; later keys are free.
        from_layer: int (batch,), per row the first layer in which they are blocked.
    """

    keys: torch.Tensor
    from_layer: torch.Tensor

    def in_layer(self, layer: int) -> torch.Tensor | None:
        """The columns blocked in a layer, bool (batch, keys); None where there is none."""
        active = self.from_layer <= layer
        return self.keys & active[:, None] if bool(active.any()) else None


@dataclasses.dataclass(kw_only=True)
class Tap:
    """What forward passes inside `tapped` are watched for and kept from.

    Attributes:
        observer: called in every layer of a prefill (query length above 1); None watches nothing.
        block: the columns that are blocked, in prefill and decoding alike.
    """

    observer: Observer | None = None
    block: Block | None = None


_TAP: contextvars.ContextVar[Tap | None] = contextvars.ContextVar("byesight_tap", default=None)


@contextlib.contextmanager
def tapped(tap: Tap) -> Iterator[Tap]:
    """Open a tap for the forward passes of this thread inside the block."""
    token = _TAP.set(tap)
    try:
        yield tap
    finally:
        _TAP.reset(token)


def last_row_weights(
    query: torch.Tensor, key: torch.Tensor, attention_mask: torch.Tensor | None, scaling: float | None = None
) -> torch.Tensor:
    """Attention weights of the last query position of a prefill.

    Args:
        query: (batch, heads, queries, dim).
        key: (batch, key-value heads, keys, dim); heads is a multiple of key-value heads (grouped-query attention).
        attention_mask: (batch or 1, 1, queries, keys), bool (True: may attend) or additive; None: causal, query k sees the keys
            up to k.
        scaling: factor on the logits; None means dim ** -0.5.

    Returns:
        float32 (batch, heads, keys), each row summing to 1.
    """
    batch, heads, _, dim = query.shape
    groups, keys = key.shape[1], key.shape[2]
    last = query[:, :, -1].reshape(batch, groups, heads // groups, dim)
    logits = torch.matmul(last, key.transpose(2, 3)).reshape(batch, heads, keys).float()
    logits = logits * (dim**-0.5 if scaling is None else scaling)
    if attention_mask is None:
        logits[..., query.shape[2] :] = -torch.inf  # room that a static cache keeps for later tokens
    else:
        row = attention_mask[:, :, -1, :keys]
        logits = logits.masked_fill(~row, -torch.inf) if row.dtype == torch.bool else logits + row
    return torch.softmax(logits, dim=-1)


def _with_block(blocked: torch.Tensor, query: torch.Tensor, key: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """The mask (batch, 1, queries, keys) with the blocked columns (batch, prompt keys) closed."""
    queries, keys = query.shape[2], key.shape[2]
    columns = torch.nn.functional.pad(blocked[:, :keys], (0, max(0, keys - blocked.shape[1])))
    if attention_mask is None:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device)[None, None]
        mask = mask if queries == 1 else mask.tril()  # as SDPA does without a mask: causal from the first key on
    elif attention_mask.dtype == torch.bool:
        mask = attention_mask[..., :keys]
    else:
        return attention_mask[..., :keys].masked_fill(columns[:, None, None], torch.finfo(attention_mask.dtype).min)
    return mask & ~columns[:, None, None]


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """SDPA, watched and blocked by the open tap; without a tap it is SDPA to the bit."""
    tap = _TAP.get()
    if tap is not None:
        layer = int(getattr(module, "layer_idx"))  # noqa: B009 - torch types every attribute of a module as a tensor
        blocked = None if tap.block is None else tap.block.in_layer(layer)
        if blocked is not None:
            attention_mask = _with_block(blocked, query, key, attention_mask)
        if tap.observer is not None and query.shape[2] > 1:
            tap.observer(layer, last_row_weights(query.detach(), key.detach(), attention_mask, scaling))
    output: tuple[torch.Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )
    return output


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)


def base_of(model: Any) -> PreTrainedModel:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    base: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base


def attach(model: torch.nn.Module) -> str:
    """Give the language tower the probed attention.

    Returns:
        The implementation that was there, to hand to `detach`.

    Raises:
        ModelError: the model's attention can't be replaced (its layers do not use transformers' attention interface).
    """
    base = base_of(model)
    before = str(base.config.get_text_config()._attn_implementation)  # noqa: SLF001 - transformers' own name for it
    try:
        base.set_attn_implementation({"text_config": NAME})
    except ValueError as error:
        raise ModelError(f"{type(base).__name__}: its attention can't be observed: {error}") from error
    if base.config.get_text_config()._attn_implementation != NAME:  # noqa: SLF001
        raise ModelError(f"{type(base).__name__} does not use transformers' attention interface; its attention can't be observed")
    return before


def detach(model: torch.nn.Module, before: str) -> None:
    """Put back what `attach` returned."""
    base_of(model).set_attn_implementation({"text_config": before})


@contextlib.contextmanager
def attached(model: torch.nn.Module) -> Iterator[None]:
    """`attach` for the length of a block; undone also when the block raises."""
    before = attach(model)
    try:
        yield
    finally:
        detach(model, before)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptRegions:
    """Where the image and the text after it lie in a batch of prompts; both bool (batch, keys), padding is in neither."""

    image: torch.Tensor
    text: torch.Tensor


def prompt_regions(input_ids: torch.Tensor, attention_mask: torch.Tensor, image_token_id: int) -> PromptRegions:
    """Find image tokens by their id, and the text that follows the first of them (CleanSight's prompt text).

    Args:
        input_ids: (batch, keys).
        attention_mask: (batch, keys), 0 on padding.
        image_token_id: the model's placeholder for image features.
    """
    seen = attention_mask.bool()
    image = (input_ids == image_token_id) & seen
    after = torch.cumsum(image.int(), dim=1) > 0
    return PromptRegions(image=image, text=after & ~image & seen)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerStatistics:
    """One layer's reduction of the last prompt position's weights, all float32; rows without an image token are NaN.

    Attributes:
        entropy: (batch,) of the head-averaged, renormalised image attention, nats (BYE, eq. 3).
        head_entropy: (batch, heads), the same per head.
        image_share: (batch, heads), attention mass on image tokens.
        ratio: (batch, heads), natural log of image mass over the mass on the text after the image (CleanSight, eq. 4, as a log).
        top_positions: int (batch, top), image tokens by falling attention, counted from the row's first image token; -1 beyond
            the last.
        top_weights: (batch, top), their share of the image attention, head-averaged; 0 beyond the last.
    """

    entropy: torch.Tensor
    head_entropy: torch.Tensor
    image_share: torch.Tensor
    ratio: torch.Tensor
    top_positions: torch.Tensor
    top_weights: torch.Tensor


_TINY = 1e-12


def entropy(weights: torch.Tensor) -> torch.Tensor:
    """Entropy in nats over the last axis, after renormalising; 0 where the weights vanish."""
    share = weights / weights.sum(-1, keepdim=True).clamp(min=_TINY**3)
    return -torch.xlogy(share, share).sum(-1)


def reduce_layer(weights: torch.Tensor, regions: PromptRegions, top: int) -> LayerStatistics:
    """Reduce a layer's row of weights (batch, heads, keys) to its statistics."""
    on_image = weights * regions.image[:, None]
    image_mass = on_image.sum(-1)
    text_mass = (weights * regions.text[:, None]).sum(-1)
    has_image = regions.image.any(-1, keepdim=True)
    mean = on_image.mean(1)
    share = mean / mean.sum(-1, keepdim=True).clamp(min=_TINY**3)
    padded = torch.nn.functional.pad(share.masked_fill(~regions.image, -1), (0, top), value=-1)
    top_weights, columns = padded.topk(top, dim=-1)
    position = torch.cumsum(regions.image.int(), dim=1) - 1
    top_positions = torch.nn.functional.pad(position, (0, top)).gather(1, columns).masked_fill(top_weights < 0, -1)
    nan = torch.full_like(image_mass, torch.nan)
    return LayerStatistics(
        entropy=torch.where(has_image[:, 0], entropy(mean), nan[:, 0]),
        head_entropy=torch.where(has_image, entropy(on_image), nan),
        image_share=torch.where(has_image, image_mass, nan),
        ratio=torch.where(has_image, torch.log(image_mass + _TINY) - torch.log(text_mass + _TINY), nan),
        top_positions=top_positions,
        top_weights=top_weights.clamp(min=0),
    )
