"""Fit the guard's detector on kept rows; needs scikit-learn, so no serving process imports this."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Literal

import numpy as np
from scipy.stats import beta
from sklearn.covariance import LedoitWolf
from sklearn.model_selection import KFold

from pipeline.errors import StageError
from stages.guard.transfer import MAJORITY

Whitening = Literal["full", "diagonal"]
Threshold = Literal["cross-validated", "in-sample"]
LEAST_ROWS = 50
"""Fewer reference rows, those of one group counted once, give no usable 1% threshold."""
_LEFT_OUT = 0.05
"""Share of the kept rows that the threshold of planting does not depend on."""
_LEAST_KNOWN = 20
"""Fewer kept rows that the test can tell of give it no threshold."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """A fitted reference.

    Attributes:
        mean, deviation: float (dimensions,).
        whitening: float (dimensions, dimensions).
        threshold: distance that a clean prompt exceeds with the target probability.
        rate_interval: 95% interval of the probability with which one truly does; it is wide where groups are few.
        distances: float (rows,), those of the reference rows that the threshold is a quantile of.
        groups: int (rows,), equal for rows that are not independent of one another.
        shrinkage: Ledoit-Wolf's weight of the scaled identity, 0 to 1.
    """

    mean: np.ndarray
    deviation: np.ndarray
    whitening: np.ndarray
    threshold: float
    rate_interval: tuple[float, float]
    distances: np.ndarray
    groups: np.ndarray
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


def calibrate(
    vectors: np.ndarray,
    *,
    false_positive_rate: float,
    whitening: Whitening,
    seed: int,
    groups: np.ndarray | None = None,
    threshold: Threshold = "cross-validated",
    folds: int = 10,
) -> Calibration:
    """Fit on all rows; take the threshold on distances that each row has under a fit without its group.

    The published threshold is a quantile of the very distances the fit was made on (`in-sample`), which understates it when
    dimensions are near the number of rows. The default is the conformal quantile, rank ceil((rows + 1)(1 - rate)), of
    cross-validated distances, in which each group counts as much as another. What rate that keeps to is uncertain where groups are
    few: `Calibration.rate_interval` says so, as if each were one row (several tell a little more) and held out (`in-sample` ones
    are not; their true rate is higher).

    Args:
        vectors: float (rows, dimensions), clean prompts.
        false_positive_rate: target share of clean prompts above the threshold.
        whitening: `full`, with Ledoit-Wolf shrinkage, or `diagonal`, as published.
        seed: of the folds.
        groups: int (rows,), vectors of one group (questions about one picture) are held out together; None: each by itself.
        threshold: which distances it is a quantile of.
        folds: of the cross-validation.

    Raises:
        StageError: too few groups, values that are not finite, or rows that do not differ.
    """
    groups = np.arange(len(vectors)) if groups is None else groups
    count = len(np.unique(groups))
    if count < LEAST_ROWS:
        raise StageError(
            f"the guard needs at least {LEAST_ROWS} kept rows with pictures for its reference, those that share one counted once; "
            f"there are {count}"
        )
    if not np.isfinite(vectors).all():
        raise StageError("the guard's reference holds values that are not finite")
    vectors = vectors.astype(np.float64)
    mean, matrix, shrinkage = fit_reference(vectors, whitening)
    distances = np.linalg.norm((vectors - mean) @ matrix.T, axis=1)
    if threshold == "cross-validated":
        distances = _held_out_distances(vectors, groups, whitening, seed, folds)
    limit = conformal_quantile(distances, false_positive_rate, groups)
    if limit <= 0:
        raise StageError("the guard's reference rows do not differ in their attention; they can't tell what is usual")
    deviation = np.maximum(vectors.std(axis=0), 1e-6)
    return Calibration(
        mean=mean,
        deviation=deviation,
        whitening=matrix,
        threshold=limit,
        rate_interval=rate_interval(count, false_positive_rate),
        distances=distances,
        groups=groups,
        shrinkage=shrinkage,
    )


def _held_out_distances(vectors: np.ndarray, groups: np.ndarray, whitening: Whitening, seed: int, folds: int) -> np.ndarray:
    """Each row's distance under a fit without its group, float (rows,)."""
    distances = np.empty(len(vectors))
    names, numbers = np.unique(groups, return_inverse=True)
    for _, drawn in KFold(min(folds, len(names)), shuffle=True, random_state=seed).split(names):
        held = np.isin(numbers, drawn)
        rest = ~held
        mean, matrix, _ = fit_reference(vectors[rest], whitening)
        distances[held] = np.linalg.norm((vectors[held] - mean) @ matrix.T, axis=1)
    return distances


def conformal_quantile(values: np.ndarray, rate: float, groups: np.ndarray | None = None) -> float:
    """The value of rank ceil((rows + 1)(1 - rate)): a new one exceeds it with at most the rate, on average over such samples.

    Fewer rows than 1 / rate - 1 (99 for a rate of 0.01) have no such rank. The largest value stands for it then, which a new one
    exceeds with a probability of 1 / (rows + 1), more than the rate.

    Args:
        values: float (rows,).
        rate: share of new values above it.
        groups: int (rows,); rows of a group share the weight of one, so that a picture that is often asked about has no more say
            than another. None: each row is one.
    """
    order = np.argsort(values)
    _, numbers, sizes = np.unique(np.arange(len(values)) if groups is None else groups, return_inverse=True, return_counts=True)
    shares = np.cumsum(1 / sizes[numbers[order]]) / len(sizes)
    place = np.searchsorted(shares, _conformal_rank(len(values), rate) / len(values) - 1e-9)
    return float(values[order][min(int(place), len(values) - 1)])


def rate_interval(rows: int, rate: float) -> tuple[float, float]:
    """95% interval of the probability that a new value exceeds the `conformal_quantile` of so many independent ones.

    The value of rank r among n is exceeded with a probability distributed as Beta(n + 1 - r, r), whatever the values' own
    distribution, if that is continuous (Vovk 2012, "Conditional validity of inductive conformal predictors", section 3).
    """
    rank = _conformal_rank(rows, rate)
    low, high = beta.ppf([0.025, 0.975], rows + 1 - rank, rank)
    return float(low), float(high)


def _conformal_rank(rows: int, rate: float) -> int:
    """ceil((rows + 1)(1 - rate)), at most the number of rows."""
    return min(rows, int(np.ceil((rows + 1) * (1 - rate) - 1e-9)))


def familiar_tokens(answers: Sequence[Collection[int]], rate: float) -> np.ndarray:
    """Tokens of answers that are usual: of the kept rows at most the target share has one that is not.

    A row's own answer does not make its tokens usual for it; the other rows do (leave-one-out). So a token is usual where at least
    so many rows have it, and that number is the largest for which at most the target share of rows has a token that fewer others
    have.

    Args:
        answers: tokens that each kept row is answered with: the first alone, or all.
        rate: target share.

    Returns:
        int64 (tokens,), ascending; empty where so many tokens come once that a new one means nothing.
    """
    sets = [set(answer) for answer in answers]
    counts = Counter(itertools.chain.from_iterable(sets))
    rarest = np.asarray([min((counts[token] - 1 for token in tokens), default=len(sets)) for tokens in sets])
    # At 0 more rows than the rate have a token that no other has; their share is that of tokens not seen yet (Good and Turing).
    enough = min((level for level in np.unique(rarest) if (rarest <= level).sum() > rate * len(sets)), default=0)
    return np.asarray(sorted(token for token, count in counts.items() if enough and count >= enough), dtype=np.int64)


def transfer_threshold(shares: np.ndarray) -> float:
    """Share of hosts above which the causal test is passed: what kept rows reach by their pictures' honest contents.

    The kept rows may hold some of the attack still, so the largest of them are left out of it.

    Args:
        shares: float (rows,), of kept rows; NaN where the test can't tell.

    Returns:
        At least `MAJORITY`; 1, which nothing exceeds, where too few rows could be tried.
    """
    known = shares[np.isfinite(shares)]
    left = int(np.ceil(_LEFT_OUT * len(known)))
    return max(MAJORITY, float(np.sort(known)[-1 - left])) if len(known) >= _LEAST_KNOWN else 1.0


def late_layer(changed: np.ndarray, layers: Sequence[int], rate: float) -> int | None:
    """The first layer from which on kept rows need their pictures no longer.

    Args:
        changed: bool (rows, layers), whether a kept row's answer begins otherwise with its picture closed from each layer on.
        layers: the layers, ascending.
        rate: largest share of the rows that may change. One row may in any case, for the kept rows can hold some of the attack.

    Returns:
        A layer after the first; None where too few rows could be tried, or pictures are needed up to the end.
    """
    if len(changed) < _LEAST_KNOWN:
        return None
    found, most = None, max(1, int(rate * len(changed)))
    for layer, count in sorted(zip(layers, changed.sum(axis=0), strict=True), reverse=True):
        if count > most or layer == 0:
            break
        found = layer
    return found


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
