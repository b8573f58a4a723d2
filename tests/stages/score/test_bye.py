"""Plain BYE on synthetic entropies: what is found, what is not, and that nothing crashes."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from stages.score.bye import RULES, TwoComponents, bye, layer_profiles, two_components

ROWS, POISONED = 2000, 400


def bimodal(distance: float, seed: int, rows: int = ROWS, low: int = POISONED) -> np.ndarray:
    """Entropies around 3 nats with deviation 0.1; the first `low` rows lie `distance` deviations lower."""
    values = np.random.default_rng(seed).normal(3.0, 0.1, rows)
    values[:low] -= 0.1 * distance
    return values


@pytest.mark.parametrize(
    ("distance", "expected"),
    [
        (8.0, {"bsi": True, "public-code": True}),
        (3.4, {"bsi": True, "public-code": False}),  # 3.4 / sqrt(2) = 2.4 is above 2, 3.4 is below 2 (1 + 1)
        (2.0, {"bsi": False, "public-code": False}),
    ],
)
def test_the_rules_differ_as_they_should(distance: float, expected: dict[str, bool]) -> None:
    entropy = bimodal(distance, 1, rows=4000, low=2000)[:, None]
    found = {rule: layer_profiles(entropy, rule, 2.0, 0)[0] for rule in RULES}
    assert {rule: profile.sensitive for rule, profile in found.items()} == expected
    if distance > 3:
        assert found["bsi"].separation == pytest.approx(distance / np.sqrt(2), rel=0.1)
        assert found["bsi"].low == pytest.approx(3 - 0.1 * distance, abs=0.03)
        assert found["bsi"].high == pytest.approx(3, abs=0.03)


def test_the_published_figure_of_the_public_code() -> None:
    """For equal deviations its rule is a separation above 2.83 on the paper's scale."""
    for distance, passes in ((2.82, False), (2.84, True)):
        fit = TwoComponents(
            means=np.array([0.0, distance * np.sqrt(2)]),
            deviations=np.ones(2),
            posterior=np.empty(0),
            bic_gain=1.0,
        )
        assert fit.separation == pytest.approx(distance)
        assert fit.passes("public-code", 2.0) == passes
        assert fit.passes("bsi", 2.0)
        assert not fit.passes("bsi", 3.0)


def test_the_lower_cluster_is_removed() -> None:
    entropy = np.stack([bimodal(0, 0), bimodal(9, 1), bimodal(8, 2), bimodal(0, 3)], axis=1)
    profiles = layer_profiles(entropy, "bsi", 2.0, 0)
    assert [profile.layer for profile in profiles if profile.sensitive] == [1, 2]
    found = bye(entropy, profiles, 0)
    assert found.suspicious.tolist() == [True] * POISONED + [False] * (ROWS - POISONED)
    assert found.score == pytest.approx(entropy[:, 1:3].mean(axis=1))
    assert found.threshold == found.score[:POISONED].max()
    assert found.posterior[:POISONED].min() > 0.99
    assert found.posterior[POISONED:].max() < 0.01


def test_a_trigger_that_raises_entropy_removes_the_clean_rows() -> None:
    """BYE's published failure, which is kept as published."""
    entropy = np.stack([-bimodal(9, 1) + 6], axis=1)
    found = bye(entropy, layer_profiles(entropy, "bsi", 2.0, 0), 0)
    assert found.suspicious.sum() == ROWS - POISONED
    assert not found.suspicious[:POISONED].any()


@pytest.mark.parametrize("rule", RULES)
def test_nothing_is_suspicious_in_one_mode(rule: str) -> None:
    for seed in range(5):
        entropy = np.stack([bimodal(0, 10 * seed + k, rows=500) for k in range(6)], axis=1)
        profiles = layer_profiles(entropy, rule, 2.0, seed)  # type: ignore[arg-type]
        assert not any(profile.sensitive for profile in profiles)
        found = bye(entropy, profiles, seed)
        assert not found.suspicious.any()
        assert not found.posterior.any()
        assert np.isnan(found.score).all()
        assert np.isnan(found.threshold)


def test_one_component_that_fits_as_well_removes_nothing() -> None:
    """Two layers are bimodal in opposite directions: their mean is not."""
    first = bimodal(8, 1)
    entropy = np.stack([first, 6 - first + np.random.default_rng(2).normal(0, 0.1, ROWS)], axis=1)
    profiles = layer_profiles(entropy, "bsi", 2.0, 0)
    assert all(profile.sensitive for profile in profiles)
    found = bye(entropy, profiles, 0)
    assert not found.suspicious.any()
    assert np.isfinite(found.score).all()
    assert np.isnan(found.threshold)


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("kind", ["varied", "constant", "nan", "two values"])
def test_few_and_odd_rows(rows: int, kind: str) -> None:
    entropy = np.random.default_rng(0).normal(3, 0.1, (rows, 2)).astype(np.float32)
    if kind == "constant":
        entropy[:] = 3
    if kind == "nan" and rows:
        entropy[rows // 2, 0] = np.nan
    if kind == "two values":
        entropy = np.where(np.arange(rows)[:, None] % 2 == 0, 1, 3).repeat(2, axis=1).astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mixture says that it found fewer clusters
        for rule in RULES:
            profiles = layer_profiles(entropy, rule, 2.0, 0)
            found = bye(entropy, profiles, 0)
    assert len(profiles) == 2
    assert np.isfinite([[profile.separation, profile.low, profile.high] for profile in profiles]).all()
    assert found.score.shape == found.posterior.shape == found.suspicious.shape == (rows,)
    assert np.isfinite(found.posterior).all()
    if rows < 4 or kind in ("constant", "nan"):
        assert not profiles[0].sensitive
    if rows < 4 or kind == "constant":
        assert not found.suspicious.any()


def test_no_layers_at_all() -> None:
    entropy = np.empty((0, 0), np.float32)
    assert layer_profiles(entropy, "bsi", 2.0, 0) == []
    assert len(bye(entropy, [], 0).suspicious) == 0


def test_the_mixture() -> None:
    values = bimodal(10, 4)
    fit = two_components(values, 0)
    assert fit is not None
    assert fit.means == pytest.approx([2.0, 3.0], abs=0.02)
    assert fit.deviations == pytest.approx([0.1, 0.1], abs=0.01)
    assert fit.posterior.mean() == pytest.approx(0.2, abs=0.01)
    assert fit.bic_gain > 0
    single = two_components(bimodal(0, 5), 0)
    assert single is not None
    assert single.bic_gain < 0
    tiny = two_components(values * 1e-4, 0)
    assert tiny is not None
    assert tiny.separation == pytest.approx(fit.separation, rel=1e-3)
    assert np.array_equal(fit.posterior, two_components(values, 0).posterior)  # type: ignore[union-attr]
