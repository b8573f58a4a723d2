"""The guard's reference: its threshold keeps what it promises on fresh draws."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pipeline.errors import StageError
from stages.guard.calibrate import (
    LEAST_ROWS,
    Whitening,
    calibrate,
    conformal_quantile,
    familiar_tokens,
    fit_reference,
    late_layer,
    layer_thresholds,
    rate_interval,
    transfer_threshold,
)
from stages.guard.transfer import MAJORITY

DIMENSIONS = 64


def draws(rows: int, seed: int, dimensions: int = DIMENSIONS) -> np.ndarray:
    """Correlated Gaussian vectors of very different units."""
    mixing = np.random.default_rng(99).normal(size=(dimensions, dimensions)) / np.sqrt(dimensions) + np.eye(dimensions)
    units = np.logspace(-2, 3, dimensions)
    return np.asarray(5 + np.random.default_rng([seed, 1]).normal(size=(rows, dimensions)) @ mixing * units)


def false_positives(whitening: Whitening, rate: float, rows: int, seeds: int) -> list[float]:
    found = []
    for seed in range(seeds):
        fit = calibrate(draws(rows, seed), false_positive_rate=rate, whitening=whitening, seed=seed)
        distances = np.linalg.norm((draws(4000, 1000 + seed) - fit.mean) @ fit.whitening.T, axis=1)
        found.append(float((distances > fit.threshold).mean()))
    return found


@pytest.mark.parametrize("whitening", ["full", "diagonal"])
@pytest.mark.parametrize(("rate", "low", "high"), [(0.01, 0.004, 0.02), (0.05, 0.03, 0.07)])
def test_the_false_positive_rate_on_fresh_draws(whitening: Whitening, rate: float, low: float, high: float) -> None:
    found = false_positives(whitening, rate, 200, 12)
    assert low < np.mean(found) < high
    assert max(found) < 5 * rate


def test_the_published_threshold_would_not_keep_it() -> None:
    """The quantile of the distances that the fit was made on, at 200 rows and 64 dimensions."""
    values = draws(200, 0)
    mean, matrix, _ = fit_reference(values, "full")
    published = np.quantile(np.linalg.norm((values - mean) @ matrix.T, axis=1), 0.99)
    fresh = np.linalg.norm((draws(4000, 1) - mean) @ matrix.T, axis=1)
    assert (fresh > published).mean() > 0.04


def test_the_two_whitenings() -> None:
    values = draws(3000, 0, 8)
    mean, diagonal, none = fit_reference(values, "diagonal")
    assert none == 0
    assert mean == pytest.approx(values.mean(axis=0))
    assert diagonal == pytest.approx(np.diag(1 / values.std(axis=0)))
    _, full, shrinkage = fit_reference(values, "full")
    assert 0 < shrinkage < 0.1
    white = (values - mean) @ full.T
    assert np.cov(white.T) == pytest.approx(np.eye(8), abs=0.15)
    # a vector that breaks the correlation is far away for the full one alone
    axis = np.linalg.svd(np.cov((values / values.std(axis=0)).T))[2][-1]
    strange = 2 * axis * values.std(axis=0)
    assert np.linalg.norm(full @ strange) > 2.5 * np.linalg.norm(diagonal @ strange)


def test_the_result() -> None:
    values = draws(101, 3, 5)
    fit = calibrate(values, false_positive_rate=0.05, whitening="full", seed=0)
    assert fit.distances.shape == (101,)
    assert fit.threshold == np.sort(fit.distances)[math.ceil(102 * 0.95) - 1]
    assert fit.deviation == pytest.approx(values.std(axis=0))
    again = calibrate(values, false_positive_rate=0.05, whitening="full", seed=0)
    assert again.threshold == fit.threshold
    assert calibrate(values, false_positive_rate=0.05, whitening="full", seed=1).threshold != fit.threshold
    few = calibrate(values[:60], false_positive_rate=0.001, whitening="full", seed=0)
    assert few.threshold == few.distances.max()


def test_more_dimensions_than_rows() -> None:
    fit = calibrate(draws(60, 0, 200), false_positive_rate=0.05, whitening="full", seed=0)
    assert np.isfinite(fit.whitening).all()
    assert fit.shrinkage > 0
    assert fit.threshold > np.median(np.linalg.norm((draws(60, 0, 200) - fit.mean) @ fit.whitening.T, axis=1))


def test_a_constant_dimension() -> None:
    values = draws(80, 0, 4)
    values[:, 2] = 1.25
    fits = [calibrate(values, false_positive_rate=0.05, whitening=whitening, seed=0) for whitening in ("full", "diagonal")]
    assert all(np.isfinite(fit.whitening).all() for fit in fits)
    assert all(math.isfinite(fit.threshold) for fit in fits)


@pytest.mark.parametrize("rows", [0, 1, LEAST_ROWS - 1])
def test_too_few_rows(rows: int) -> None:
    with pytest.raises(StageError, match=f"at least {LEAST_ROWS} kept rows with pictures .* there are {rows}"):
        calibrate(draws(rows, 0), false_positive_rate=0.01, whitening="full", seed=0)
    calibrate(draws(LEAST_ROWS, 0), false_positive_rate=0.01, whitening="full", seed=0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite(value: float) -> None:
    values = draws(LEAST_ROWS, 0)
    values[7, 3] = value
    with pytest.raises(StageError, match="not finite"):
        calibrate(values, false_positive_rate=0.01, whitening="full", seed=0)


def test_rows_that_do_not_differ() -> None:
    with pytest.raises(StageError, match="do not differ"):
        calibrate(np.ones((80, 6)), false_positive_rate=0.01, whitening="full", seed=0)


def test_layer_thresholds() -> None:
    values = draws(1000, 0, 6)
    values[0, 4] += 1e6  # the last of three layers with two quantities each
    fit = calibrate(values, false_positive_rate=0.01, whitening="diagonal", seed=0)
    found = layer_thresholds(values, fit, 3, 0.01)
    assert found.shape == (3,)
    deviations = np.abs((values - values.mean(axis=0)) / values.std(axis=0))
    for layer in range(3):
        largest = deviations[:, 2 * layer : 2 * layer + 2].max(axis=1)
        assert (largest > found[layer]).mean() == pytest.approx(0.01, abs=0.001)
    flat = np.ones((60, 4))
    flat[:, 0] = np.arange(60)
    fit = calibrate(flat, false_positive_rate=0.01, whitening="diagonal", seed=0)
    assert (layer_thresholds(flat, fit, 2, 0.01) > 0).all()


@pytest.mark.parametrize(
    ("rows", "rate", "rank"),
    [
        (9, 0.1, 9),
        (9, 0.2, 8),
        (9, 0.15, 9),
        (19, 0.1, 18),
        (9, 0.01, 9),  # so few rows hold no value that rare: the largest
        (9, 0.0, 9),
        (1, 0.3, 1),
        (24, 0.44, 14),  # 25 * 0.56 is a little more than 14 in floating point
    ],
)
def test_the_conformal_rank(rows: int, rate: float, rank: int) -> None:
    values = np.random.default_rng(0).permutation(np.arange(1.0, rows + 1))
    assert conformal_quantile(values, rate) == rank
    assert conformal_quantile(values * 1e-9 - 5, rate) == pytest.approx(rank * 1e-9 - 5, abs=1e-15)


def test_a_new_value_exceeds_the_quantile_with_the_rate() -> None:
    """On 19 values, where the plain quantile of them would be exceeded more often."""
    generator = np.random.default_rng(0)
    values = generator.exponential(size=(20000, 20))
    limits = np.array([conformal_quantile(row[:19], 0.1) for row in values])
    assert (values[:, 19] > limits).mean() == pytest.approx(0.1, abs=0.007)
    assert (values[:, 19] > np.quantile(values[:, :19], 0.9, axis=1)).mean() > 0.11


FAMILIAR: dict[str, tuple[dict[int, int], float, list[int]]] = {
    "one token": ({7: 100}, 0.1, [7]),
    "the rare one is left out": ({7: 50, 3: 45, 9: 5}, 0.1, [3, 7]),
    "just as rare as the rate": ({7: 50, 3: 45, 9: 5}, 0.05, [3, 7]),
    "too common for it": ({7: 50, 3: 44, 9: 6}, 0.05, [3, 7, 9]),
    "equally rare ones go together": ({7: 90, 3: 5, 9: 5}, 0.1, [7]),
    "or stay together": ({7: 90, 3: 5, 9: 5}, 0.09, [3, 7, 9]),
    "levels add up": ({7: 90, 1: 4, 2: 3, 3: 2, 4: 1}, 0.06, [1, 2, 7]),  # each 1 has as many others as there are of 2
    "beyond the next level": ({7: 90, 1: 5, 2: 3, 3: 2}, 0.05, [1, 7]),
    "its own occurrence does not count": (
        {7: 60, **dict.fromkeys(range(20, 30), 2), **dict.fromkeys(range(40, 45), 4)},
        0.2,
        [7, *range(40, 45)],
    ),
    "a step below what is too common": ({7: 90, 1: 6, 2: 5, 3: 1}, 0.07, [1, 2, 7]),
    "up to the rate": ({7: 90, 1: 4, 2: 3, 3: 2, 4: 1}, 0.1, [7]),
    "as many singles as the rate": ({7: 90, **dict.fromkeys(range(20, 30), 1)}, 0.1, [7]),
    "one single more": ({7: 89, **dict.fromkeys(range(20, 31), 1)}, 0.1, []),
    "all are singles": (dict.fromkeys(range(100), 1), 0.1, []),
    "one single of few rows": ({7: 8, 3: 1}, 0.1, []),
    "no single and none rare": ({7: 5, 3: 5}, 0.1, [3, 7]),
    "a rate of 0": ({7: 98, 3: 2}, 0.0, [3, 7]),
}


@pytest.mark.parametrize("name", FAMILIAR)
def test_familiar_tokens(name: str) -> None:
    counts, rate, expected = FAMILIAR[name]
    first = np.random.default_rng(0).permutation(np.repeat(list(counts), list(counts.values())))
    found = familiar_tokens(first[:, None].tolist(), rate)
    assert found.dtype == np.int64
    assert found.tolist() == expected


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.3])
def test_at_most_the_rate_of_kept_rows_begins_with_a_token_that_is_not_familiar(rate: float) -> None:
    """And no token is left out that is more common than a familiar one."""
    generator = np.random.default_rng(0)
    some = 0
    for _ in range(50):
        first = generator.zipf(1.0 + 2 * generator.random(), size=200) % 1000
        found = familiar_tokens(first[:, None].tolist(), rate)
        if not len(found):
            continue
        some += 1
        tokens, counts = np.unique(first, return_counts=True)
        rare = ~np.isin(tokens, found)
        assert counts[rare].sum() <= rate * len(first)
        assert counts[rare].max(initial=0) < counts[~rare].min()
    assert some > 5


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.3])
def test_a_row_is_judged_by_the_other_rows(rate: float) -> None:
    """Written out: every row is left out in turn; the number that is asked for is the largest that keeps the rate."""
    generator = np.random.default_rng(1)
    some = 0
    for _ in range(30):
        first = generator.zipf(1.0 + 2 * generator.random(), size=80) % 300
        others = np.array([(np.delete(first, k) == first[k]).sum() for k in range(len(first))])
        kept = [number for number in range(1, 81) if (others < number).sum() <= rate * len(first)]
        enough = max(kept, default=0)
        expected = [token for token in np.unique(first) if enough and (first == token).sum() >= enough]
        assert familiar_tokens(first[:, None].tolist(), rate).tolist() == expected
        some += bool(expected)
    assert some > 5


def test_whole_answers() -> None:
    """A row counts once for a token that it repeats, and is as unusual as its rarest token; an answer of no tokens is usual."""
    answers = [[1, 1, 2]] * 8 + [[1, 3]] * 2 + [[1, 4], [], [1, 5, 4]]
    assert familiar_tokens(answers, 0.35).tolist() == [1, 2]
    assert familiar_tokens(answers, 0.2).tolist() == [1, 2, 3, 4, 5]
    assert familiar_tokens(answers, 0.05).tolist() == []


@pytest.mark.parametrize(("rows", "rate"), [(50, 0.01), (99, 0.01), (200, 0.01), (200, 0.05), (1000, 0.1), (120, 0.3)])
def test_the_interval_holds_the_true_rate_as_often_as_it_says(rows: int, rate: float) -> None:
    """Uniform values: what lies above a limit is one minus it."""
    generator = np.random.default_rng(rows)
    true = 1 - np.array([conformal_quantile(generator.random(rows), rate) for _ in range(4000)])
    low, high = rate_interval(rows, rate)
    assert ((low <= true) & (true <= high)).mean() == pytest.approx(0.95, abs=0.012)
    assert (true < low).mean() == pytest.approx(0.025, abs=0.009)
    on_average = max(1, math.floor((rows + 1) * rate + 1e-9)) / (rows + 1)  # at most the rate, but for 50 rows
    assert true.mean() == pytest.approx(on_average, rel=0.06)
    assert (on_average > rate) == (rows < 99)


def test_what_rate_few_rows_can_promise() -> None:
    """At a rate of 0.01, 50 rows give about 0.02, 99 the first quantile of it; only many give a narrow interval."""
    few, least, many = (rate_interval(rows, 0.01) for rows in (50, 99, 10_000))
    assert few == pytest.approx((1 - 0.975 ** (1 / 50), 1 - 0.025 ** (1 / 50)))  # the largest of 50 values
    assert few[1] > 0.07
    assert least[0] < 0.01 < least[1] < 0.04
    assert many == pytest.approx((0.0081, 0.012), rel=0.03)


def test_the_interval_of_a_calibration() -> None:
    values = draws(120, 3, 5)
    for rate in (0.01, 0.2):
        fit = calibrate(values, false_positive_rate=rate, whitening="full", seed=0)
        assert fit.rate_interval == rate_interval(120, rate)
        assert fit.rate_interval[0] < fit.rate_interval[1]


THRESHOLDS: dict[str, tuple[list[float], float]] = {
    "nothing transfers": ([0.0] * 100, MAJORITY),
    "less than the majority does": ([0.0] * 50 + [0.375] * 50, MAJORITY),
    "honest pictures do": ([0.0] * 80 + [0.625] * 20, 0.625),
    "they always do": ([1.0] * 100, 1.0),
    "a few attacks are left in": ([0.25] * 95 + [1.0] * 5, MAJORITY),
    "of few rows one": ([0.25] * 19 + [1.0], MAJORITY),
    "beside honest transfer": ([0.25] * 75 + [0.75] * 20 + [1.0] * 5, 0.75),
    "one too many": ([0.25] * 94 + [1.0] * 6, 1.0),
    "the test often can't tell": ([math.nan] * 60 + [0.0] * 20 + [0.75] * 20, 0.75),
    "it can for too few": ([math.nan] * 60 + [0.25] * 19, 1.0),
    "it never can": ([math.nan] * 60, 1.0),
    "no row was tried": ([], 1.0),
}


@pytest.mark.parametrize("name", THRESHOLDS)
def test_transfer_threshold(name: str) -> None:
    shares, expected = THRESHOLDS[name]
    assert transfer_threshold(np.random.default_rng(0).permutation(np.array(shares, dtype=np.float64))) == expected


CHANGED: dict[str, tuple[list[list[float]], int | None]] = {
    "pictures are read early": ([[1, 0.5, 0, 0]] * 20, 4),
    "one still changes": ([[1, 1, 0.04, 0]] * 25, 4),
    "a share of many does": ([[1, 1, 0.02, 0.02]] * 200, 4),
    "too many do": ([[1, 1, 0.03, 0.02]] * 200, 6),
    "up to the end": ([[1, 1, 1, 0.06]] * 100, None),
    "a layer in between": ([[1, 0, 0.5, 0]] * 20, 6),
    "not from the first": ([[0, 0, 0, 0]] * 20, 2),
    "too few rows": ([[1, 0, 0, 0]] * 19, None),
}


@pytest.mark.parametrize("name", CHANGED)
def test_late_layer(name: str) -> None:
    """Shares of rows that change, per layer."""
    shares, expected = CHANGED[name]
    rows = len(shares)
    changed = np.arange(rows)[:, None] < np.round(np.array(shares[0]) * rows)
    assert late_layer(changed, (0, 2, 4, 6), 0.02) == expected


def test_turns_of_one_row_are_held_out_together() -> None:
    """Four nearly equal turns a row: held out one by one, each is near its siblings, and new rows are flagged far too often."""
    rng = np.random.default_rng(0)

    def turns(rows: int) -> np.ndarray:
        return np.repeat(rng.normal(size=(rows, 48)), 4, axis=0) + 0.3 * rng.normal(size=(4 * rows, 48))

    values, new = turns(100), turns(500)
    rates = []
    for groups in (None, np.repeat(np.arange(100) * 7, 4)):
        fit = calibrate(values, false_positive_rate=0.05, whitening="full", seed=0, groups=groups)
        rates.append(np.mean(np.linalg.norm((new - fit.mean) @ fit.whitening.T, axis=1) > fit.threshold))
    assert rates[0] > 0.15
    assert rates[1] < 0.1
    with pytest.raises(StageError, match="there are 49"):
        calibrate(values[:196], false_positive_rate=0.05, whitening="full", seed=0, groups=np.repeat(np.arange(49), 4))


def test_the_interval_and_the_threshold_count_groups() -> None:
    values = draws(400, 3, 5)
    groups = np.repeat(np.arange(100), 4)
    fit = calibrate(values, false_positive_rate=0.01, whitening="full", seed=0, groups=groups)
    assert fit.rate_interval == rate_interval(100, 0.01)
    assert np.array_equal(fit.groups, groups)
    assert fit.threshold == np.sort(fit.distances)[396]
    often = np.concatenate([np.arange(60), np.full(340, 60)])
    fit = calibrate(values, false_positive_rate=0.1, whitening="full", seed=0, groups=often)
    assert (fit.distances[:60] > fit.threshold).mean() == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize("sizes", [[1] * 9, [4] * 50, [1, 2, 3, 7] * 30, [200] + [1] * 200])
@pytest.mark.parametrize("rate", [0.01, 0.1, 0.3])
def test_rows_of_a_group_share_the_weight_of_one(sizes: list[int], rate: float) -> None:
    groups = np.repeat(np.arange(len(sizes)) * 3, sizes)
    values = np.random.default_rng(0).normal(size=len(groups))
    level = min(1.0, math.ceil((len(values) + 1) * (1 - rate) - 1e-9) / len(values))

    def share(limit: float) -> float:
        return float(np.mean([(values[groups == group] <= limit).mean() for group in np.unique(groups)]))

    found = conformal_quantile(values, rate, groups)
    assert share(found) >= level - 1e-9
    assert share(found - 1e-9) < level - 1e-9
    if len(set(sizes)) == 1:
        assert found == conformal_quantile(values, rate), "of equal size they are as before"


def test_each_by_itself_is_the_default() -> None:
    values = draws(60, 3, 5)
    alone, grouped = (calibrate(values, false_positive_rate=0.1, whitening="full", seed=0, groups=g) for g in (None, np.arange(60)))
    assert np.array_equal(alone.distances, grouped.distances)


def test_the_published_threshold() -> None:
    """A quantile of the distances that the fit was made on; lower than that of rows held out."""
    values = draws(101, 3, 5)
    fit = calibrate(values, false_positive_rate=0.05, whitening="diagonal", seed=0, threshold="in-sample")
    assert fit.distances == pytest.approx(np.linalg.norm((values - fit.mean) @ fit.whitening.T, axis=1))
    assert fit.threshold < calibrate(values, false_positive_rate=0.05, whitening="diagonal", seed=0).threshold
