"""Fit the guard's detector on kept rows; needs scikit-learn, so no serving process imports this."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
from sklearn.covariance import LedoitWolf
from sklearn.model_selection import KFold

from pipeline.errors import StageError

Whitening = Literal["full", "diagonal"]
LEAST_ROWS = 50
"""Fewer reference rows give no usable 1% threshold."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """A fitted reference.

    Attributes:
        mean, deviation: float (dimensions,).
        whitening: float (dimensions, dimensions).
        threshold: distance that a clean prompt exceeds with the target probability.
        distances: float (rows,), cross-validated distances of the reference rows.
        shrinkage: Ledoit-Wolf's weight of the scaled identity, 0 to 1.
    """

    mean: np.ndarray
    deviation: np.ndarray
    whitening: np.ndarray
    threshold: float
    distances: np.ndarray
    shrinkage: float


def fit_reference(vectors: np.ndarray, whitening: Whitening) -> tuple[np.ndarray, np.ndarray, float]:
    """Mean, whitening matrix and shrinkage of clean vectors, float (rows, dimensions).

    The covariance is shrunk after scaling each dimension to unit deviation, so that the units of the features do not matter.
    """
    mean, deviation = vectors.mean(axis=0), np.maximum(vectors.std(axis=0), 1e-6)
    if whitening == "diagonal":
        return mean, np.diag(1 / deviation), 0.0
    fit = LedoitWolf(assume_centered=True).fit((vectors - mean) / deviation)
    values, axes = np.linalg.eigh(fit.covariance_)
    return mean, (axes / np.sqrt(np.maximum(values, 1e-9))).T / deviation, float(fit.shrinkage_)


def calibrate(vectors: np.ndarray, *, false_positive_rate: float, whitening: Whitening, seed: int, folds: int = 10) -> Calibration:
    """Fit on all rows; take the threshold on distances that each row has under a fit without it.

    The published threshold is a quantile of the very distances the fit was made on, which understates it when dimensions are
    near the number of rows. Here it is the conformal quantile, rank ceil((rows + 1)(1 - rate)), of cross-validated distances.

    Args:
        vectors: float (rows, dimensions), clean prompts.
        false_positive_rate: target share of clean prompts above the threshold.
        whitening: `full`, with Ledoit-Wolf shrinkage, or `diagonal`, as published.
        seed: of the folds.
        folds: of the cross-validation.

    Raises:
        StageError: too few rows, values that are not finite, or rows that do not differ.
    """
    if len(vectors) < LEAST_ROWS:
        raise StageError(
            f"the guard needs at least {LEAST_ROWS} kept rows with pictures for its reference, there are {len(vectors)}"
        )
    if not np.isfinite(vectors).all():
        raise StageError("the guard's reference holds values that are not finite")
    vectors = vectors.astype(np.float64)
    distances = np.empty(len(vectors))
    for rest, held in KFold(min(folds, len(vectors)), shuffle=True, random_state=seed).split(vectors):
        mean, matrix, _ = fit_reference(vectors[rest], whitening)
        distances[held] = np.linalg.norm((vectors[held] - mean) @ matrix.T, axis=1)
    rank = min(len(vectors), int(np.ceil((len(vectors) + 1) * (1 - false_positive_rate) - 1e-9)))
    threshold = float(np.sort(distances)[rank - 1])
    if threshold <= 0:
        raise StageError("the guard's reference rows do not differ in their attention; they can't tell what is usual")
    mean, matrix, shrinkage = fit_reference(vectors, whitening)
    deviation = np.maximum(vectors.std(axis=0), 1e-6)
    return Calibration(
        mean=mean, deviation=deviation, whitening=matrix, threshold=threshold, distances=distances, shrinkage=shrinkage
    )


def layer_thresholds(vectors: np.ndarray, fit: Calibration, layers: int, false_positive_rate: float) -> np.ndarray:
    """Per layer, the largest single deviation that a clean prompt exceeds with the target rate, in standard deviations.

    Args:
        vectors: float (rows, layers * quantities), layers first.
        fit: their calibration.
        layers: number of layers.
        false_positive_rate: target rate.

    Returns:
        float (layers,).
    """
    deviations = np.abs((vectors - fit.mean) / fit.deviation).reshape(len(vectors), layers, -1).max(axis=2)
    return np.asarray(np.maximum(np.quantile(deviations, 1 - false_positive_rate, axis=0), 1e-6))
