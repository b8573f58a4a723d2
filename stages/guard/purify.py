"""CleanSight's purification: which image tokens of a flagged prompt are closed, and from which layer on.

Published (arXiv 2603.12989, section 4.2): the tokens whose attention exceeds tau in any head of the last detection layer, closed
from the next layer on. In a shallow model the last position has read the trigger by then. The default detects late and rewinds
early: tokens are chosen in the heads that concentrate more than any clean prompt makes them, and the prefill is run again with
those tokens closed from the first layer that deviates.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from stages.guard.detector import Detector
from stages.guard.policy import TAU

SHARE = 0.8
"""Share of the stealing heads' image attention that the closed tokens hold. Between 0.5 and 0.9 nothing changed in trials."""
LEAST_DEVIATION = 3.0
"""Standard deviations from which a head counts as stealing."""


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


def rewind_layers(detector: Detector, deviations: torch.Tensor) -> torch.Tensor:
    """The first layer of each prompt in which a head deviates more than a clean prompt's do.

    Args:
        detector: holds the layers and their thresholds.
        deviations: (batch, layers, features, heads), from `Detector.deviations`.

    Returns:
        int (batch,), a decoder layer; the most deviating one where none is above its threshold.
    """
    largest = deviations.abs().amax(dim=(2, 3))
    above = largest > detector.layer_thresholds
    index = torch.where(above.any(dim=1), above.int().argmax(dim=1), (largest / detector.layer_thresholds).argmax(dim=1))
    return torch.tensor(detector.layers, device=index.device)[index]


def stealing_heads(detector: Detector, deviations: torch.Tensor) -> dict[int, torch.Tensor]:
    """How much each head steals: its concentration beyond the reference where that is at least `LEAST_DEVIATION`, else 0.

    Args:
        detector: holds the layers and features.
        deviations: (batch, layers, features, heads).

    Returns:
        By layer, (batch, heads). Where no head of a prompt reaches the limit, all that concentrate count.
    """
    kind = "deficit" if "deficit" in detector.features else detector.features[0]
    excess = deviations[:, :, detector.features.index(kind)].clamp(min=0)
    strong = torch.where(excess >= LEAST_DEVIATION, excess, 0)
    chosen = torch.where(strong.amax(dim=(1, 2), keepdim=True) > 0, strong, excess)
    return {layer: chosen[:, k] for k, layer in enumerate(detector.layers)}


def stealing_tokens(
    weights: Mapping[int, torch.Tensor], image: torch.Tensor, heads: Mapping[int, torch.Tensor], share: float = SHARE
) -> torch.Tensor:
    """The fewest image tokens that hold `share` of the stealing heads' image attention.

    Args:
        weights: by layer, (batch, heads, keys).
        image: bool (batch, keys).
        heads: by layer, (batch, heads), how much each head steals.
        share: 0 to 1.

    Returns:
        bool (batch, keys); nothing in rows where no head steals.
    """
    total = torch.zeros(image.shape, device=image.device)
    for layer, stealing in heads.items():
        on_image = weights[layer] * image[:, None]
        on_image = on_image / on_image.sum(-1, keepdim=True).clamp(min=1e-12)
        total = total + (on_image * stealing[..., None]).sum(1)
    total = total / total.sum(-1, keepdim=True).clamp(min=1e-12)
    ordered, columns = total.sort(dim=-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    return torch.zeros_like(image).scatter(1, columns, (before < share) & (ordered > 0)) & image
