"""How far the rows of a group shift the model's attention together: pure functions on arrays.

BYE averages the heads and looks for low entropy. That misses triggers that raise entropy and data sets that are bimodal for an
honest reason. Here every head of every layer counts, with both signs, whitened by how attention honestly varies within the same
question; what is measured is the size of the shift that a group's rows have in common, not whether a row is unusual.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from sklearn.decomposition import PCA
from sklearn.mixture import GaussianMixture

from stages.extract.table import AttentionTable
from stages.score.bye import two_components
from stages.score.groups import MANY, Group, plain_answer

_CLIP = 6.0
"""Robust deviations beyond which a feature counts no further."""
_QUESTION_ROWS = 20
"""Rows from which a question has a reference of its own."""
_MOST_ALIKE = 0.5
"""Largest share of one answer among the rows of such a question."""
_COLUMNS, _ROWS = 64, 4096
"""Features whose medians are taken, and examples that are computed with, at a time: no step holds more than two copies of all."""
_LEAST_WITHIN = 0.01
"""Least share of the variance along a shift that is taken to be within the group and the others."""
_DIRECTIONS, _ROWS_EACH, _FITTED = 20, 10, 4096
"""Most directions in which a group's rows differ the most, fewest rows for each, and most rows, by which its parts are told."""
_VERY_STRONG = 10.0
"""Difference of the Bayesian information criterion from which evidence is very strong (Kass and Raftery, 1995, section 3.2)."""
_EQUAL = 1e-9
"""Largest spread of features that are all the same."""
_SPLIT_SEPARATION = 2.0
"""Bimodal separation (BYE's index) from which a group is two groups: rows of an attack, and honest rows with the same answer."""


def head_features(table: AttentionTable) -> np.ndarray:
    """Per head the log ratio of image to text attention, and ln(image tokens) minus the entropy of its image attention, nats.

    Returns:
        float32 (examples, 2 * layers * heads).
    """
    features = np.concatenate(
        [part.reshape(len(table), -1) for part in (table.ratio, table.head_entropy)], axis=1, dtype=np.float32
    )
    entropy = features[:, features.shape[1] // 2 :]
    np.subtract(np.log(np.maximum(table.image_tokens, 1))[:, None], entropy, out=entropy, casting="same_kind")
    return features


def within_questions(features: np.ndarray, questions: Sequence[str], answers: Sequence[str]) -> np.ndarray:
    """Standardise robustly (median, median absolute deviation) within equal questions.

    A question that few rows ask has no reference of its own, and none where one answer holds more than half of its rows: a trigger
    would be what is usual to a question that an attack alone asks. Such questions share one reference; where the same holds of them
    together, that of all examples.

    Args:
        features: float (examples, dimensions).
        questions: one text per example.
        answers: theirs.

    Returns:
        float (examples, dimensions), clipped at 6 deviations.
    """
    numbers = {question: number for number, question in enumerate(dict.fromkeys(questions))}
    kinds = np.asarray([numbers[question] for question in questions], dtype=np.int64)
    plain = [plain_answer(answer) for answer in answers]
    texts = {answer: number for number, answer in enumerate(dict.fromkeys(plain))}
    given = np.asarray([texts[answer] for answer in plain], dtype=np.int64)
    of_question = _rows_of(kinds)
    own = [rows for rows in of_question if _is_reference(given[rows])]
    shared = np.ones(len(features), dtype=bool)
    for rows in own:
        shared[rows] = False
    rest = np.flatnonzero(shared)
    if _is_reference(given[rest]):
        own.append(rest)
        rest = rest[:0]
    result = np.empty_like(features)
    for start in range(0, features.shape[1], _COLUMNS):
        columns = slice(start, start + _COLUMNS)
        result[:, columns] = _standardised(features[:, columns], own, rest)
    return result


def _standardised(features: np.ndarray, own: Sequence[np.ndarray], rest: np.ndarray) -> np.ndarray:
    """Some features, (examples, any), standardised within each of some sets of rows; the rest by all rows."""
    middle = np.median(features, axis=0)
    spread = _robust_deviation(features - middle)
    result = np.empty_like(features)
    for rows in own:
        centred = features[rows] - np.median(features[rows], axis=0)
        result[rows] = _clipped(centred, np.maximum(_robust_deviation(centred), 0.25 * spread))
    result[rest] = _clipped(features[rest] - middle, spread)
    return result


def _rows_of(kinds: np.ndarray) -> list[np.ndarray]:
    """Positions of the examples of each kind, kinds and positions ascending. kinds: int (examples,)."""
    order = np.argsort(kinds, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(kinds[order])) + 1)


def _is_reference(given: np.ndarray) -> bool:
    """Whether examples with these answers, int (examples,), are enough and various enough to tell what is usual among them."""
    return len(given) >= _QUESTION_ROWS and np.unique(given, return_counts=True)[1].max() <= _MOST_ALIKE * len(given)


def _clipped(centred: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    return np.asarray(np.clip(centred / np.maximum(deviation, 1e-6), -_CLIP, _CLIP))


def _robust_deviation(centred: np.ndarray) -> np.ndarray:
    return np.asarray(1.4826 * np.median(np.abs(centred), axis=0))


def whiten(values: np.ndarray) -> np.ndarray:
    """Centre and whiten by a Ledoit-Wolf covariance. float (examples, dimensions) to the same shape."""
    result = values - values.mean(axis=0, dtype=np.float64).astype(values.dtype)
    scale, axes = np.linalg.eigh(ledoit_wolf(result))
    whitening = axes / np.sqrt(np.maximum(scale, 1e-9))
    for rows in _blocks(len(result)):
        result[rows] = result[rows] @ whitening
    return np.asarray(result)


def ledoit_wolf(centred: np.ndarray) -> np.ndarray:
    """The covariance of values of mean 0, shrunk towards a multiple of the identity (Ledoit and Wolf, 2004), and no copy of them.

    float (examples, dimensions) to float64 (dimensions, dimensions).
    """
    count, dimensions = centred.shape
    covariance, fourth = np.zeros((dimensions, dimensions)), 0.0
    for rows in _blocks(count):
        block = centred[rows].astype(np.float64)
        covariance += block.T @ block / count
        fourth += np.square(np.square(block).sum(axis=1)).sum() / count
    mean, square = np.trace(covariance) / dimensions, np.square(covariance).sum()
    distance = square - dimensions * mean**2
    shrinkage = min(1.0, (fourth - square) / count / distance) if distance > 0 else 0.0
    return np.asarray((1 - shrinkage) * covariance + shrinkage * mean * np.eye(dimensions))


def _blocks(count: int) -> Iterator[slice]:
    """Places of that many rows, some at a time."""
    return (slice(start, start + _ROWS) for start in range(0, count, _ROWS))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedShift:
    """A group's shift.

    Attributes:
        size: norm of the mean difference to all other examples, in standard deviations within both, corrected for their sizes.
        projection: float (members,), each member on the shift of the other members, in whitened standard deviations.
        posterior: float (members,), probability that a member belongs to the shifted part of its group; it rises with the
            projection.
    """

    size: float
    projection: np.ndarray
    posterior: np.ndarray


def shift_size(whitened: np.ndarray, group: Group) -> float:
    """The size of one group's shift, as `SharedShift` has it; arguments as `shared_shift` takes them."""
    count, others = len(group.members), len(whitened) - len(group.members)
    total = _total(whitened, group)
    within = sum(float(np.square(whitened[group.members[rows]] - total / count).sum()) for rows in _blocks(count)) / (count - 1)
    noise = within * (1 / count + 1 / others)
    whole = max(0.0, np.square(total / count + total / others).sum() - noise)
    share = count * others / len(whitened) ** 2  # what was whitened holds the shift itself: of half of the rows it can't be above 2
    return float(np.sqrt(whole / max(_LEAST_WITHIN, 1 - share * whole)))


def shared_shift(whitened: np.ndarray, group: Group, seed: int, *, least: int) -> SharedShift:
    """Measure one group.

    Args:
        whitened: float (examples, dimensions), of mean 0, as `whiten` gives it.
        group: at least two of them, and not all.
        seed: of the mixture.
        least: fewest members of a shifted part; a group that has less of one is shifted as a whole.
    """
    count, total = len(group.members), _total(whitened, group)
    rest = -total / (len(whitened) - count)
    projection = np.empty(count)
    for places in _blocks(count):
        rows = whitened[group.members[places]]
        shift = (total - rows) / (count - 1) - rest
        projection[places] = np.einsum("ij,ij->i", rows - rest, shift) / np.maximum(np.linalg.norm(shift, axis=1), 1e-9)
    fit = two_components(projection, seed)
    posterior = np.ones(count)
    if fit is not None and fit.bic_gain > 0 and fit.separation >= _SPLIT_SEPARATION:
        low, high = fit.means  # the tails of unequal components would cross again beyond their means
        parted = np.where(projection <= low, 0.0, np.where(projection >= high, 1.0, 1 - fit.posterior))
        if (parted > 0.5).sum() >= least:
            posterior = parted
    return SharedShift(size=shift_size(whitened, group), projection=projection, posterior=posterior)


def two_parts(whitened: np.ndarray, group: Group, seed: int) -> np.ndarray | None:
    """Whether the rows of a group attend in two ways, as those of an attack and honest ones with its answer do.

    Where all of them ask the same, what both look at shifts their attention alike, against all other rows (`shared_shift`); within
    the group the one looks at the trigger, the other at what shows the answer. Two Gaussians of one covariance are fitted to the
    group's leading principal components, and held for two parts where the evidence against one is very strong.

    Args:
        whitened: float (examples, dimensions), as `whiten` gives it.
        group: the group.
        seed: of the mixture.

    Returns:
        float (members,), the probability of the first part; None where there is one part, or one of fewer than `MANY` rows.
    """
    # In double precision: rows that are nearly copies of each other leave a covariance that single precision can't factor.
    some = whitened[np.random.default_rng(seed).permutation(group.members)[:_FITTED]].astype(np.float64)
    if len(some) < 2 * MANY or np.ptp(some, axis=0).max() < _EQUAL:
        return None
    directions = min(_DIRECTIONS, len(some) // _ROWS_EACH, whitened.shape[1] - 1)
    leading = PCA(directions, svd_solver="arpack", random_state=seed).fit(some)
    fitted = leading.transform(some)
    one, two = (GaussianMixture(n, covariance_type="tied", n_init=10, random_state=seed).fit(fitted) for n in (1, 2))
    blocks = (whitened[group.members[rows]].astype(np.float64) for rows in _blocks(len(group.members)))
    first = np.concatenate([two.predict_proba(leading.transform(block))[:, 0] for block in blocks])
    least = min((first > 0.5).sum(), (first <= 0.5).sum())
    return first if least >= MANY and one.bic(fitted) - two.bic(fitted) > _VERY_STRONG else None


def _total(whitened: np.ndarray, group: Group) -> np.ndarray:
    """The sum of a group's rows, float64 (dimensions,)."""
    parts = (whitened[group.members[rows]].sum(axis=0, dtype=np.float64) for rows in _blocks(len(group.members)))
    return np.asarray(sum(parts, np.zeros(whitened.shape[1])))
