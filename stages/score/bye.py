"""BYE's layer selection and score, as published (arXiv 2505.16916, section 4) and as in its public code, on arrays."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
from sklearn.mixture import GaussianMixture

LayerRule = Literal["bsi", "public-code"]
RULES: tuple[LayerRule, ...] = ("bsi", "public-code")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoComponents:
    """A two-component Gaussian mixture of one variable, beside one Gaussian; component 0 has the lower mean.

    Attributes:
        means, deviations: float (2,), in the variable's unit.
        posterior: float (samples,), probability of component 0.
        bic_gain: BIC of one component minus BIC of two; positive where two fit better.
    """

    means: np.ndarray
    deviations: np.ndarray
    posterior: np.ndarray
    bic_gain: float

    @property
    def separation(self) -> float:
        """BYE's bimodal separation index: |mu1 - mu2| / sqrt(sigma1^2 + sigma2^2)."""
        return float(abs(self.means[1] - self.means[0]) / max(np.sqrt(np.square(self.deviations).sum()), 1e-12))

    def passes(self, rule: LayerRule, threshold: float) -> bool:
        """Whether the separation makes a layer sensitive: by the paper's index, or by the public code's |mu1-mu2| > 2(s1+s2)."""
        if rule == "bsi":
            return self.separation >= threshold
        return bool(abs(self.means[1] - self.means[0]) > 2 * self.deviations.sum())


def two_components(values: np.ndarray, seed: int) -> TwoComponents | None:
    """Fit one variable, float (samples,); None where there are fewer than 4 finite or only equal values."""
    if len(values) < 4 or not np.isfinite(values).all() or np.ptp(values) < 1e-9:
        return None
    column = values.astype(np.float64)[:, None]
    scale = column.std()
    column = column / scale
    mixture = GaussianMixture(2, n_init=3, random_state=seed, reg_covar=1e-6).fit(column)
    single = GaussianMixture(1, random_state=seed, reg_covar=1e-6).fit(column)
    order = np.argsort(mixture.means_.ravel())
    return TwoComponents(
        means=mixture.means_.ravel()[order] * scale,
        deviations=np.sqrt(mixture.covariances_.ravel()[order]) * scale,
        posterior=mixture.predict_proba(column)[:, order[0]],
        bic_gain=float(single.bic(column) - mixture.bic(column)),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerProfile:
    """One decoder layer's separation of the submission.

    Attributes:
        layer: index of the layer.
        separation: bimodal separation index of its entropies; 0 where nothing could be fitted.
        low, high: means of the two components, nats.
        sensitive: whether the layer passes the rule.
    """

    layer: int
    separation: float
    low: float
    high: float
    sensitive: bool


def layer_profiles(entropy: np.ndarray, rule: LayerRule, threshold: float, seed: int) -> list[LayerProfile]:
    """Fit each layer. entropy: float (samples, layers), nats."""
    profiles = []
    for layer in range(entropy.shape[1]):
        fit = two_components(entropy[:, layer], seed)
        if fit is None:
            mean = float(np.nan_to_num(entropy[:, layer]).mean()) if len(entropy) else 0.0
            profiles.append(LayerProfile(layer=layer, separation=0.0, low=mean, high=mean, sensitive=False))
            continue
        low, high = (float(m) for m in fit.means)
        sensitive = fit.passes(rule, threshold)
        profiles.append(LayerProfile(layer=layer, separation=fit.separation, low=low, high=high, sensitive=sensitive))
    return profiles


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByeResult:
    """What plain BYE says of a submission.

    Attributes:
        score: float (samples,), mean entropy over the sensitive layers, nats; NaN where there is none.
        posterior: float (samples,), probability of the low-entropy component; 0 where nothing is removed.
        suspicious: bool (samples,), the rows that BYE removes.
        threshold: the highest score that falls into the lower component, nats; NaN where nothing is removed.
    """

    score: np.ndarray
    posterior: np.ndarray
    suspicious: np.ndarray
    threshold: float


def bye(entropy: np.ndarray, profiles: list[LayerProfile], seed: int) -> ByeResult:
    """Average the sensitive layers and drop the lower of two components.

    Without a sensitive layer, and where one component fits the score as well as two (BIC), nothing is removed; the public code
    crashes in the first case and removes a cluster in the second.
    """
    samples = len(entropy)
    nothing = np.zeros(samples, bool)
    chosen = [profile.layer for profile in profiles if profile.sensitive]
    if not chosen:
        return ByeResult(score=np.full(samples, np.nan), posterior=np.zeros(samples), suspicious=nothing, threshold=np.nan)
    score = entropy[:, chosen].mean(axis=1)
    fit = two_components(score, seed)
    if fit is None or fit.bic_gain <= 0:
        return ByeResult(score=score, posterior=np.zeros(samples), suspicious=nothing, threshold=np.nan)
    suspicious = fit.posterior > 0.5
    threshold = float(score[suspicious].max()) if suspicious.any() else np.nan
    return ByeResult(score=score, posterior=fit.posterior, suspicious=suspicious, threshold=threshold)
