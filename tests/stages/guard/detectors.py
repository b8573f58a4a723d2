"""Detectors made by hand."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from stages.guard.detector import FEATURES, Detector


def plain_detector(
    layers: Sequence[int] = (0, 1, 2), heads: int = 4, features: Sequence[str] = FEATURES, threshold: float = 1.0
) -> Detector:
    """Mean 0 and deviation 1 in every dimension; each layer's threshold is 1."""
    size = len(layers) * heads * len(features)
    return Detector(
        layers=tuple(layers),
        features=tuple(features),
        mean=torch.zeros(size),
        deviation=torch.ones(size),
        whitening=torch.eye(size),
        threshold=threshold,
        layer_thresholds=torch.ones(len(layers)),
    )
