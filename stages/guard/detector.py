"""CleanSight's detection: how far a prompt's attention lies from that of clean prompts (arXiv 2603.12989, section 4.1).

The published detector takes the visual-to-text attention ratio of every head of a few middle layers and a diagonal whitening. The
default adds the entropy of every head's image attention, all layers and a full, shrunk covariance. Everything here is torch: a
serving process needs nothing else.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from pipeline.attention import LayerStatistics
from pipeline.errors import ConfigError

FEATURES = ("ratio", "deficit")
"""Per head: natural log of image over text attention mass; ln(image tokens) minus the entropy of the image attention, nats."""
TENSORS = ("mean", "deviation", "whitening", "layer_thresholds")
"""The detector's arrays, as guard.safetensors names them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Detector:
    """A Gaussian model of clean prompts' attention.

    Attributes:
        layers: decoder layers that are read, ascending.
        features: the quantities read per layer and head, some of `FEATURES`.
        mean: float32 (dimensions,), dimensions = layers * features * heads, in that order.
        deviation: float32 (dimensions,), standard deviations of the clean prompts, of each dimension by itself.
        whitening: float32 (dimensions, dimensions); distance = ||whitening @ (vector - mean)||.
        threshold: the distance above which a prompt is flagged, in standard deviations.
        layer_thresholds: float32 (layers,), the largest single deviation of a layer that a clean prompt exceeds with the target
            rate.
    """

    layers: tuple[int, ...]
    features: tuple[str, ...]
    mean: torch.Tensor
    deviation: torch.Tensor
    whitening: torch.Tensor
    threshold: float
    layer_thresholds: torch.Tensor

    def distances(self, vectors: torch.Tensor) -> torch.Tensor:
        """Whitened distances (batch,) of vectors (batch, dimensions); NaN, for prompts without pictures, stays NaN."""
        distances: torch.Tensor = ((vectors - self.mean) @ self.whitening.T).norm(dim=-1)
        return distances

    def deviations(self, vectors: torch.Tensor) -> torch.Tensor:
        """How far each quantity lies from its mean, in its standard deviations, float (batch, layers, features, heads)."""
        scaled: torch.Tensor = (vectors - self.mean) / self.deviation
        return scaled.reshape(len(vectors), len(self.layers), len(self.features), -1)

    def to(self, device: torch.device) -> Detector:
        """The same detector on another device."""
        tensors = {name: getattr(self, name).to(device) for name in TENSORS}
        return dataclasses.replace(self, **tensors)


def feature_vectors(
    statistics: Mapping[int, LayerStatistics], image_tokens: torch.Tensor, layers: Sequence[int], features: Sequence[str]
) -> torch.Tensor:
    """Stack what the detector reads.

    Args:
        statistics: by layer, as the attention tap reduced them.
        image_tokens: int (batch,), image tokens of each prompt.
        layers: decoder layers to read.
        features: some of `FEATURES`.

    Returns:
        float32 (batch, layers * features * heads).
    """
    most = torch.log(image_tokens.clamp(min=1).float())[:, None]
    parts = []
    for layer in layers:
        found = statistics[layer]
        values = {"ratio": found.ratio, "deficit": most - found.head_entropy}
        parts += [values[name] for name in features]
    return torch.cat(parts, dim=-1).float()


def chosen_layers(layers: Literal["all", "middle"] | Sequence[int], count: int) -> tuple[int, ...]:
    """The layers that a configuration names, of a model with so many.

    Raises:
        ConfigError: the model has not that many layers.
    """
    if layers == "all":
        return tuple(range(count))
    if layers == "middle":
        return middle_layers(count)
    named = tuple(int(layer) for layer in layers)
    if named[-1] >= count:
        raise ConfigError(f"guard.layers: there is no attention layer {named[-1]}, the model has {count}, from 0")
    return named


def middle_layers(count: int) -> tuple[int, ...]:
    """CleanSight's choice, scaled: LLaVA-1.5-7B's 10th to 12th of 32 layers, at least one layer."""
    first, last = math.floor(count * 9 / 32), max(math.floor(count * 9 / 32) + 1, math.ceil(count * 12 / 32))
    return tuple(range(first, last))
