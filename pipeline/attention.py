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
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from pipeline.decoder import attention_layers, text_config
from pipeline.errors import ModelError

NAME = "byesight"
"""The attention implementation's name in a model's configuration."""

Observer = Callable[[int, torch.Tensor], None]
"""Takes a layer's number (its place in `attention_layers`) and the weights of the last query position, float32 (batch, heads,
keys), which sum to 1 over the keys, or to what an attention sink leaves."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """Key columns that nothing may attend to.

    Attributes:
        keys: bool (batch, keys), True where blocked; later keys are free.
        from_layer: int (batch,), per row the number of the first layer in which they are blocked.
    """

    keys: torch.Tensor
    from_layer: torch.Tensor

    def in_layer(self, layer: int) -> torch.Tensor | None:
        """The columns blocked in a layer, bool (batch, keys); None where there is none."""
        active = self.from_layer <= layer
        return self.keys & active[:, None] if bool(active.any()) else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kept:
    """What is left of a prompt's keys in a layer's cache from which others were taken out.

    Attributes:
        columns: int (batch, kept), their places in the prompt, padding included.
        valid: bool (batch, kept), False where a row has fewer left than another and its place is only filled.
        prompt: keys of the whole prompt.
    """

    columns: torch.Tensor
    valid: torch.Tensor
    prompt: int

    @classmethod
    def without(cls, closed: torch.Tensor) -> Kept:
        """All columns but the closed, bool (batch, keys), as many in each row as the row with most of them has."""
        most = int((~closed).sum(-1).max())
        columns = closed.int().argsort(dim=-1, stable=True)[:, :most]
        return cls(columns=columns, valid=~closed.gather(1, columns), prompt=closed.shape[1])

    def cut(self, states: torch.Tensor) -> torch.Tensor:
        """Keys or values (batch, heads, keys, dim) of the whole prompt without what was taken out."""
        index = self.columns[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
        return states.gather(2, index)

    def mask(self, whole: torch.Tensor | None, length: int) -> torch.Tensor | None:
        """A decoding step's mask, (batch or 1, 1 or heads, 1, at least `length` keys) or None, cut to the keys that are left."""
        new = length - self.prompt
        if whole is None:
            if bool(self.valid.all()):
                return None
            return torch.nn.functional.pad(self.valid, (0, new), value=True)[:, None, None]
        later = torch.arange(self.prompt, length, device=whole.device).expand(len(self.columns), -1)
        index = torch.cat([self.columns, later], dim=1)[:, None, None]
        cut = whole[..., :length].expand(len(self.columns), -1, -1, -1)
        cut = cut.gather(3, index.expand(-1, cut.shape[1], cut.shape[2], -1))
        return _with_block(~self.valid, cut, cut.shape[-1])


@dataclasses.dataclass(kw_only=True)
class Tap:
    """What forward passes inside `tapped` are watched for and kept from.

    Attributes:
        observer: called in every layer of a prefill (query length above 1); None watches nothing.
        block: the columns that are blocked, in prefill and decoding alike.
        kept: by layer, what is left where columns were taken out of the cache; nothing is blocked there.
        length: tokens of prompt and answer so far, padding too, as the model's last mask counted them; 0 before the first.
    """

    observer: Observer | None = None
    block: Block | None = None
    kept: dict[int, Kept] = dataclasses.field(default_factory=dict)
    length: int = 0


_Function = TypeVar("_Function", bound=Callable[..., Any])
_TAP: contextvars.ContextVar[Tap | None] = contextvars.ContextVar("byesight_tap", default=None)
_LAYERS: weakref.WeakKeyDictionary[torch.nn.Module, int] = weakref.WeakKeyDictionary()
"""The numbers of the attention layers of every model that was ever attached."""
_ROWS = 128
"""Query rows computed at a time where SDPA can't be used."""


def uncompiled(function: _Function) -> _Function:
    """Keep a function out of the graphs of torch.compile, and so of `generate` with a static cache on an accelerator.

    A graph would hold for every later call what the context variables were in the call that it was traced in: whether a tap was
    open, and which columns it closed.
    """
    kept: _Function = torch.compiler.disable(function, reason="what it does is the call's")  # type: ignore[no-untyped-call]
    return kept


@contextlib.contextmanager
def tapped(tap: Tap) -> Iterator[Tap]:
    """Open a tap for the forward passes of this thread inside the block."""
    token = _TAP.set(tap)
    try:
        yield tap
    finally:
        _TAP.reset(token)


def last_row_weights(
    query: torch.Tensor,
    key: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    *,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention weights of the last query position of a prefill.

    Args:
        query: (batch, heads, queries, dim).
        key: (batch, key-value heads, keys, dim); heads is a multiple of key-value heads (grouped-query attention).
        attention_mask: (batch or 1, 1 or heads, queries or 1, keys), bool (True: may attend) or additive; None: causal, query k
            sees the keys up to k.
        scaling: factor on the logits; None means dim ** -0.5.
        softcap: bound c of the logits x, which become c tanh(x / c) (Gemma 2).
        sinks: (heads,), logits of an attention sink that takes its share of each head's weights (GPT-OSS).

    Returns:
        float32 (batch, heads, keys), each row summing to 1, or to what the sink leaves.
    """
    queries = query.shape[2]
    last = slice(queries - 1, queries)
    mask = _mask_of_rows(attention_mask, last, query, key, causal=True)
    return _weights(query[:, :, last], key, mask, scaling=scaling, softcap=softcap, sinks=sinks)[:, :, 0]


def _weights(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor,
    *,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Softmax over the keys, float32 (batch, heads, queries, keys); arguments as `last_row_weights`, all of the same queries."""
    batch, heads, queries, dim = query.shape
    groups, keys = key.shape[1], key.shape[2]
    grouped = query.reshape(batch, groups, heads // groups * queries, dim)
    logits = torch.matmul(grouped, key.transpose(2, 3)).reshape(batch, heads, queries, keys).float()
    logits = logits * (dim**-0.5 if scaling is None else scaling)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    # The least float instead of infinity: a row that may attend to nothing (padding) must not turn into NaN.
    logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min) if mask.dtype == torch.bool else logits + mask
    if sinks is None:
        return torch.softmax(logits, dim=-1)
    column = sinks.float().reshape(1, heads, 1, 1).expand(batch, heads, queries, 1)
    return torch.softmax(torch.cat([logits, column], dim=-1), dim=-1)[..., :-1]


def _mask_of_rows(
    attention_mask: torch.Tensor | None, rows: slice, query: torch.Tensor, key: torch.Tensor, *, causal: bool
) -> torch.Tensor:
    """The mask (batch or 1, 1 or heads, rows, keys) of some query rows; without a mask what SDPA does without one.

    That is: causal from the first key on, so that the room which a static cache keeps for later tokens is closed.
    """
    queries, keys = query.shape[2], key.shape[2]
    if attention_mask is not None:
        return attention_mask.expand(-1, -1, queries, -1)[:, :, rows, :keys]
    last = torch.arange(queries, device=query.device)[rows, None] if causal and queries > 1 else keys
    return (torch.arange(keys, device=query.device) <= last)[None, None].expand(1, 1, rows.stop - rows.start, keys)


def _with_block(blocked: torch.Tensor, mask: torch.Tensor, length: int) -> torch.Tensor:
    """A mask (batch or 1, 1 or heads, queries, keys) with the blocked columns (batch, prompt keys) closed.

    Args:
        blocked: bool, counted from the prompt's first token.
        mask: bool or additive.
        length: tokens so far; a sliding window's cache holds the last of them alone.
    """
    keys = mask.shape[-1]
    columns = blocked[:, max(0, length - keys) :][:, :keys]
    columns = torch.nn.functional.pad(columns, (0, keys - columns.shape[1]))[:, None, None]
    return mask & ~columns if mask.dtype == torch.bool else mask.masked_fill(columns, torch.finfo(mask.dtype).min)


def _explicit_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    causal: bool,
    dropout: float,
    **settings: Any,
) -> torch.Tensor:
    """What SDPA can't do (capped logits, sinks), some query rows at a time: (batch, queries, heads, value dim)."""
    batch, heads, queries, _ = query.shape
    groups = key.shape[1]
    parts = []
    for start in range(0, queries, _ROWS):
        rows = slice(start, min(start + _ROWS, queries))
        mask = _mask_of_rows(attention_mask, rows, query, key, causal=causal)
        weights = _weights(query[:, :, rows], key, mask, **settings).to(value.dtype)
        weights = torch.nn.functional.dropout(weights, p=dropout)
        grouped = weights.reshape(batch, groups, -1, weights.shape[-1])
        parts.append(torch.matmul(grouped, value).reshape(batch, heads, rows.stop - rows.start, value.shape[-1]))
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous()


@uncompiled
def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """SDPA, watched and blocked by the open tap; without a tap it is SDPA to the bit.

    SDPA can neither cap logits (transformers' wrapper raises) nor have sinks (it ignores them without a word). Where a layer asks
    for either (`softcap`, `s_aux`), all is computed here.
    """
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    tap = _TAP.get()
    layer = None if tap is None else _LAYERS.get(module)
    if tap is not None and layer is not None:
        kept = tap.kept.get(layer)
        blocked = None if tap.block is None or kept is not None else tap.block.in_layer(layer)
        if kept is not None:
            if query.shape[2] > 1 or key.shape[2] != kept.columns.shape[1] + tap.length - kept.prompt:
                raise ModelError("tokens were taken out of the cache; it can only be continued one token at a time")
            attention_mask = kept.mask(attention_mask, tap.length)
        if blocked is not None:
            if not tap.length:
                raise ModelError(f"{type(module).__name__}: the model makes its masks by itself; no column of them can be closed")
            mask = _mask_of_rows(attention_mask, slice(0, query.shape[2]), query, key, causal=causal)
            attention_mask = _with_block(blocked, mask, tap.length)
        if tap.observer is not None and query.shape[2] > 1:
            row = last_row_weights(query.detach(), key.detach(), attention_mask, scaling, softcap=softcap, sinks=s_aux)
            tap.observer(layer, row)
    if softcap is None and s_aux is None:
        output: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **kwargs,
        )
        return output
    own = _explicit_attention(
        query,
        key,
        value,
        attention_mask,
        causal=causal,
        dropout=dropout,
        scaling=scaling,
        softcap=softcap,
        sinks=s_aux,
    )
    return own, None


@uncompiled
def probed_mask(*, q_length: int, q_offset: int | torch.Tensor = 0, **settings: Any) -> torch.Tensor | None:
    """SDPA's mask; tells the open tap how many tokens there are, which the cache knows and an attention layer does not."""
    tap = _TAP.get()
    if tap is not None:
        tap.length = int(q_offset) + q_length
    mask: torch.Tensor | None = sdpa_mask(q_length=q_length, q_offset=q_offset, **settings)
    return mask


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, probed_mask)


def base_of(model: Any) -> PreTrainedModel:
    """The transformers model inside PEFT's or torch.compile's wrapper, or the model itself."""
    inside = getattr(model, "_orig_mod", model)  # torch.compile's; its `generate` is that of the model inside
    base: PreTrainedModel = inside.get_base_model() if hasattr(inside, "get_base_model") else inside
    return base


def attach(model: torch.nn.Module) -> str:
    """Give the language tower the probed attention; every other tower keeps its own.

    Returns:
        The implementation that was there, to hand to `detach`.

    Raises:
        ModelError: the model's attention can't be replaced, for a reason that `attention_layers` names.
    """
    base = base_of(model)
    layers = attention_layers(base)
    before = str(text_config(base)._attn_implementation)  # noqa: SLF001 - transformers' own name for it
    _set_implementation(base, NAME)
    _LAYERS.update({module: number for number, module in enumerate(layers)})
    return before


def detach(model: torch.nn.Module, before: str) -> None:
    """Put back what `attach` returned."""
    _set_implementation(base_of(model), before)


def _set_implementation(base: PreTrainedModel, name: str) -> None:
    text = text_config(base)
    base.set_attn_implementation(_only_for(text, base.config, name) or {})
    if text._attn_implementation != name:  # noqa: SLF001
        raise ModelError(f"{type(base).__name__}: transformers could not change its attention; it can't be observed")


def _only_for(text: Any, config: Any, name: str) -> dict[str, Any] | None:
    """What `set_attn_implementation` takes to change one configuration among those nested in another; None if it is not there."""
    if config is text:
        return {"": name}
    for key in config.sub_configs:
        inner = getattr(config, key, None)
        if inner is not None and (found := _only_for(text, inner, name)) is not None:
            return {key: found}
    return None


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

    Where a layer's window ends after the last image token, its heads prefer none of them: the entropies are ln(image tokens).

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
    most = torch.log(regions.image.sum(-1, keepdim=True).float())
    head_entropy = torch.where(image_mass > 0, entropy(on_image), most)
    mean_entropy = torch.where(mean.sum(-1) > 0, entropy(mean), most[:, 0])
    return LayerStatistics(
        entropy=torch.where(has_image[:, 0], mean_entropy, nan[:, 0]),
        head_entropy=torch.where(has_image, head_entropy, nan),
        image_share=torch.where(has_image, image_mass, nan),
        ratio=torch.where(has_image, torch.log(image_mass + _TINY) - torch.log(text_mass + _TINY), nan),
        top_positions=top_positions,
        top_weights=top_weights.clamp(min=0),
    )
