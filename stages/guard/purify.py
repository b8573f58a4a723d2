"""CleanSight's purification: which image tokens of a flagged prompt are closed, and from which layer on.

Published (arXiv 2603.12989, section 4.2): the tokens whose attention exceeds tau in any head of the last detection layer, closed from the
next layer on. In a shallow model the last position has read the trigger by then. The default detects late and rewinds early: tokens are
chosen where the heads deviate from their reference, and the prefill is run again with them closed from the layer where the deviation begins.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

TAU = 1e-4
"""Attention above which the published rule prunes a token, as others report running it (the public code's default is 0.02)."""


def published_tokens(weights: torch.Tensor, image: torch.Tensor, tau: float = TAU) -> torch.Tensor:
    """Image tokens whose attention exceeds tau in any head.

    Args:
        weights: (batch, heads, keys), the last detection layer's row.
        image: bool (batch, keys).
        tau: least attention weight.

    Returns:
        bool (batch, keys).
    """
    return (weights.amax(dim=1) > tau) & image


def stealing_tokens(
    weights: Mapping[int, torch.Tensor], image: torch.Tensor, excess: Mapping[int, torch.Tensor], share: float
) -> torch.Tensor:
    """The fewest image tokens that hold `share` of the image attention of the deviating heads.

    Args:
        weights: by layer, (batch, heads, keys).
        image: bool (batch, keys).
        excess: by layer, (batch, heads), how far each head lies from its reference; weights the heads.
        share: 0 to 1.

    Returns:
        bool (batch, keys), at least one token in each row that has image tokens.
    """
    total = torch.zeros(image.shape, device=image.device)
    for layer, row in weights.items():
        on_image = row * image[:, None]
        on_image = on_image / on_image.sum(-1, keepdim=True).clamp(min=1e-12)
        total += (on_image * excess[layer][..., None]).sum(1)
    total = total / total.sum(-1, keepdim=True).clamp(min=1e-12)
    ordered, columns = total.sort(dim=-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    return torch.zeros_like(image).scatter(1, columns, (before < share) & (ordered > 0)) & image
