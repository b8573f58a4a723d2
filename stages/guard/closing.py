"""What is closed in a batch of flagged prompts, and how their part of the cache is replaced or shortened."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from pipeline.attention import Block, Kept
from pipeline.decoder import attention_layers

NEVER = torch.iinfo(torch.int64).max
"""A layer that there is not."""


@dataclasses.dataclass(kw_only=True)
class Closing:
    """What is closed in a batch.

    Attributes:
        tokens: bool (batch, keys).
        layers: int (batch,), the layer from which they are closed; -1 where nothing is.
        proven: bool (batch,), whether the tokens are known to carry the answer.
        begun: bool (batch,), in which of these the last layers are tried; the others begin with the layer that they have.
        image: bool (batch, keys), all that could be closed.
        fewest: bool (batch, keys), the tokens that it begins with.
        tried: the layers from which proven tokens are closed in turn, ascending, from the first layer on.
    """

    tokens: torch.Tensor
    layers: torch.Tensor
    proven: torch.Tensor
    begun: torch.Tensor
    image: torch.Tensor
    fewest: torch.Tensor
    tried: tuple[int, ...] = (0,)

    @property
    def block(self) -> Block:
        """The columns as the attention takes them."""
        return Block(keys=self.tokens, from_layer=torch.where(self.layers >= 0, self.layers, NEVER))

    @classmethod
    def nothing(cls, image: torch.Tensor) -> Closing:
        """Nothing is closed."""
        none = torch.zeros_like(image)
        layers = torch.full(image.shape[:1], -1, device=image.device)
        rows = none.any(-1)
        return cls(tokens=none, layers=layers, proven=rows, begun=rows, image=image, fewest=none)

    def widen(self, rows: torch.Tensor) -> torch.Tensor:
        """Go on in the proven of some rows, from the last layer to the first: the fewest tokens, then the whole picture.

        What a prompt has read of its picture before stays, so late closings do the least harm to the right answer.

        Args:
            rows: bool (batch,), those in which too little is closed.

        Returns:
            bool (batch,), the rows in which more is closed now.
        """
        rows = rows & self.proven
        begun = rows & self.begun
        wider = begun & (self.tokens != self.image).any(-1)
        earlier = begun & ~wider & (self.layers > 0)
        tried = torch.tensor(self.tried, device=rows.device)
        before = tried[(torch.searchsorted(tried, self.layers) - 1).clamp(min=0)]
        self.layers = torch.where(earlier, before, self.layers)
        self.tokens = torch.where(wider[:, None], self.image, torch.where(earlier[:, None], self.fewest, self.tokens))
        begins = rows & ~self.begun
        self.layers, self.begun = torch.where(begins, tried[-1], self.layers), self.begun | begins
        return wider | earlier | begins


def taken_out(base: Any, cache: Any, block: Block | None) -> dict[int, Kept]:
    """Take closed columns out of a cache, in place; by layer, what is left.

    The first layer stays whole, for transformers reads the length of what was said so far from it, and so do layers of fixed size
    (static caches, sliding windows) and all where layers share theirs: there the columns stay masked.
    """
    found: dict[int, Kept] = {}
    if block is None or getattr(base.config.get_text_config(), "num_kv_shared_layers", None):
        return found
    growing = [held for held in cache.layers if type(held) is DynamicLayer]
    for number, module in enumerate(attention_layers(base)):
        held, closed = cache.layers[module.layer_idx], block.in_layer(number)
        if closed is None or held not in growing[1:]:
            continue
        kept = Kept.without(closed)
        if kept.columns.shape[1] < closed.shape[1]:
            held.keys, held.values = kept.cut(held.keys), kept.cut(held.values)
            found[number] = kept
    return found


def copy_rows(old: dict[Any, Any], new: dict[Any, Any], rows: torch.Tensor) -> None:
    """Copy a batch's rows from one cache layer's state to another's: keys and values, and what layers without attention keep."""
    for name, value in old.items():
        if isinstance(value, dict):
            copy_rows(value, new[name], rows)
        elif isinstance(value, torch.Tensor) and value.dim() > 1 and len(value) == len(rows):
            value[rows] = new[name][rows]
