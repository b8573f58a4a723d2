"""Published defences that repair a picture before the model sees it, re-implemented at small scale: BDMAE, ZIP and SampDetox.

Our own code, after the papers and, where these leave a figure open, after their public code. The generative models behind them are
those of `benchmarks.restorer_models`: tiny, and trained on clean scenes of 64 x 64 pixels. A picture of another size is resized to
that, restored, and resized back, at the price of its detail. No published figure is reproduced here.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import nn

from benchmarks.restorer_models import KEPT, LEVELS, PATCH, SIDE, TOKENS, fitted, predicted_picture

Answers = Callable[[Sequence[Image.Image]], Sequence[str]]
"""What the model says to a row's question on each of some pictures in the place of the row's own."""


class Restorer(Protocol):
    """Restores a picture; `rng` is for what is drawn at random."""

    def __call__(self, image: Image.Image, rng: np.random.Generator, answers: Answers) -> Image.Image: ...


class Fit(Protocol):
    """Makes a restorer; its model is trained in a folder or found there, in miniature if `quick`."""

    def __call__(self, folder: pathlib.Path, *, quick: bool) -> Restorer: ...


def fit_bdmae(folder: pathlib.Path, *, quick: bool) -> Restorer:
    """`bdmae` with its masked autoencoder."""
    return functools.partial(bdmae, fitted("masked-autoencoder", folder, quick=quick))


def fit_zip(folder: pathlib.Path, *, quick: bool) -> Restorer:
    """`zero_shot_purified` with its diffusion model."""
    return functools.partial(zero_shot_purified, fitted("denoiser", folder, quick=quick))


def fit_sampdetox(folder: pathlib.Path, *, quick: bool) -> Restorer:
    """`detoxified` with its diffusion model."""
    return functools.partial(detoxified, fitted("denoiser", folder, quick=quick))


_ROUNDS, _MASKS, _SHARE = 5, 5, 0.75  # N_o, N_i and the masking ratio of the search
_REFINEMENTS, _STEP = 10, 0.05  # N_r and beta_0
_NEIGHBOUR = 0.5  # what a neighbour of a chosen token gains in the topological search
_SUSPICIOUS = 0.2  # least image score of a token whose neighbourhood is refined
_THRESHOLDS = (0.6, 0.55, 0.5, 0.45, 0.4)
_MOST = 0.25  # of the tokens that are restored in the end


def bdmae(autoencoder: nn.Module, image: Image.Image, rng: np.random.Generator, answers: Answers) -> Image.Image:
    """BDMAE (Sun et al. 2023, arXiv 2303.15564; code tsun/BDMAE): find the trigger by masked restorations, restore it alone.

    Adapted to answers in words: two "labels" are the same if the texts that `answers` gives are. A picture costs 46 answers: one as
    it is, 25 in the search, 20 in the refinement. Tokens are 8 x 8 of 8 pixels, not 14 x 14. Scores, rounds and thresholds are the
    public code's, per picture where that takes the mean over a batch.
    """
    picture = _pixels(image)
    said = answers([image])[0]
    by_image, by_label = trigger_scores(autoencoder, picture, rng, lambda tried: [text == said for text in _said(answers, tried)])
    scores = (by_image + by_label) / 2
    thresholds = np.asarray(_THRESHOLDS)
    for _ in range(200):
        if (scores >= thresholds[-1]).mean() < _MOST:
            break
        thresholds = 1 - 0.99 * (1 - thresholds)
    masks = torch.from_numpy(np.stack([scores >= threshold for threshold in thresholds]))
    with torch.inference_mode():
        drawn = autoencoder(picture.expand(len(masks), -1, -1, -1), masks).clamp(-1, 1)
    covered = _spread(masks)
    mean = (drawn * covered).sum(0) / covered.sum(0).clamp(min=1)
    return _image(torch.where(covered.any(0), mean, picture[0]), image.size)


def trigger_scores(
    autoencoder: nn.Module, picture: torch.Tensor, rng: np.random.Generator, same: Callable[[torch.Tensor], Sequence[bool]]
) -> tuple[np.ndarray, np.ndarray]:
    """How suspicious every token of a picture is (BDMAE, sections 3.2 and 3.3).

    Args:
        autoencoder: a `MaskedAutoencoder`.
        picture: float (1, 3, SIDE, SIDE) in [-1, 1].
        rng: draws masks.
        same: whether the label of each of some pictures, float (count, 3, SIDE, SIDE), is that of `picture`.

    Returns:
        The image score (dissimilarity of the restored token) and the label score (share of masks over the token that changed the
        label), refined; each float (TOKENS, TOKENS), 0 to about 1.
    """
    count = _ROUNDS * _MASKS
    order = rng.random((count, TOKENS**2)).argsort(1).argsort(1)
    masks = (order < round(_SHARE * TOKENS**2)).reshape(count, TOKENS, TOKENS)
    restored = _refilled(autoencoder, picture, masks)
    covered = _spread(torch.from_numpy(masks))
    dissimilar = []
    for seen in range(_MASKS, count + 1, _MASKS):
        weight = covered[:seen].float()
        mean = (restored[:seen] * weight).sum(0) / weight.sum(0).clamp(min=1)
        mean = torch.where(covered[:seen].any(0), mean, picture[0])
        dissimilar.append(1 - nn.functional.avg_pool2d(similarity(picture, mean[None]), PATCH)[0].numpy())
    by_image = np.mean(dissimilar, 0)
    changed = ~np.asarray(same(restored))
    by_label = (masks * changed[:, None, None]).mean(0)
    sizes = int((by_image >= _SUSPICIOUS).sum()), int(by_label.sum())
    for _ in range(_REFINEMENTS):
        halves, rests = zip(
            *(_halved(score, size, rng) for score, size in zip((by_image, by_label), sizes, strict=True)), strict=True
        )
        signs = np.where(same(_refilled(autoencoder, picture, np.stack(halves))), -_STEP, _STEP)
        by_image = by_image + signs[0] * (halves[0].astype(float) - rests[0])
        by_label = by_label + signs[1] * (halves[1].astype(float) - rests[1])
    return by_image, by_label


def _halved(score: np.ndarray, size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Half of the `size` highest tokens, grown from a seed over neighbours, and the other half; bool (TOKENS, TOKENS)."""
    highest = np.zeros(score.shape, dtype=bool)
    highest.flat[np.argsort(-score, axis=None)[:size]] = True
    chosen = np.zeros_like(highest)
    for _ in range(min(size, max(1, size // 2))):
        edge = np.pad(chosen, 1)
        near = edge[:-2, 1:-1] | edge[2:, 1:-1] | edge[1:-1, :-2] | edge[1:-1, 2:]
        drawn = rng.random(score.shape) * (score + _NEIGHBOUR * near)
        chosen.flat[np.where(highest & ~chosen, drawn, -np.inf).argmax()] = True
    return chosen, highest & ~chosen


_POOL = 4
_ZIP_STEPS = 20


def zero_shot_purified(denoiser: nn.Module, image: Image.Image, rng: np.random.Generator, _answers: Answers) -> Image.Image:
    """ZIP (Shi et al. 2023, arXiv 2303.12175; code sycny/ZIP): blur the trigger away, have a diffusion model draw the picture anew.

    From pure noise, the picture x that each step predicts is moved towards the blurred original y to x + (1 - kept) A+(y - A x):
    the code's step in terms of x, with the exponent of its weight at 1. A is the mean over 4 x 4 pixels, A+ repeats it; as for
    photos in the paper, colours are not turned to grey. 20 steps without time travel.
    """
    picture = _pixels(image)
    blurred = _pooled(picture)
    noisy = _noise(rng)
    levels = np.linspace(LEVELS - 1, 0, _ZIP_STEPS).round().astype(int).tolist()
    with torch.inference_mode():
        for level, following in zip(levels, [*levels[1:], -1], strict=True):
            drawn = predicted_picture(denoiser, noisy, level)
            guided = drawn + (1 - KEPT[level]) * (blurred - _pooled(drawn))
            noisy = _fainter(noisy, guided, level, following, rng)
    return _image(noisy[0], image.size)


_LIGHT, _STRONG, _STRIDE = 20, 120, 10


def detoxified(denoiser: nn.Module, image: Image.Image, rng: np.random.Generator, _answers: Answers) -> Image.Image:
    """SampDetox (Yang et al. 2024, NeurIPS; code easywood0204/SampDetox): light noise, then strong noise where that changed most.

    Noise of level 20 of 1,000 is put on and taken off again, against faint triggers. Then every pixel gets noise up to level 120,
    by how unlike the original it has become (structural similarity, stretched to 0 to 1 over the picture as in the code), and joins
    the denoising at its own level. Ten levels a step.
    """
    picture = _pixels(image)
    with torch.inference_mode():
        level = torch.full((SIDE, SIDE), _LIGHT)
        light = _denoised(denoiser, picture, level, rng)
        alike = similarity(picture, light)[0]
        unlike = 1 - (alike - alike.min()) / (alike.max() - alike.min()).clamp(min=1e-6)
        strong = _denoised(denoiser, light, (unlike * _STRONG).long() // _STRIDE * _STRIDE, rng)
    return _image(strong[0], image.size)


def _denoised(denoiser: nn.Module, picture: torch.Tensor, level: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Noise of a level per pixel, int64 (SIDE, SIDE), multiples of `_STRIDE`, put on a picture and taken off."""
    kept = torch.where(level > 0, KEPT[level], 1.0)
    noisy = kept.sqrt() * picture + (1 - kept).sqrt() * _noise(rng)
    for now in range(int(level.max()), 0, -_STRIDE):
        following = now - _STRIDE if now > _STRIDE else -1
        fainter = _fainter(noisy, predicted_picture(denoiser, noisy, now), now, following, rng)
        noisy = torch.where(level >= now, fainter, noisy)
    return noisy


def _fainter(noisy: torch.Tensor, drawn: torch.Tensor, level: int, following: int, rng: np.random.Generator) -> torch.Tensor:
    """A step of DDIM with the noise of DDPM (Song et al. 2021, equations 12 and 16, eta 1) to a lower level; -1 is none at all."""
    if following < 0:
        return drawn
    kept, then = KEPT[level], KEPT[following]
    noise = (noisy - kept.sqrt() * drawn) / (1 - kept).sqrt()
    fresh = ((1 - then) / (1 - kept) * (1 - kept / then)).sqrt()
    return then.sqrt() * drawn + (1 - then - fresh**2).clamp(min=0).sqrt() * noise + fresh * _noise(rng)


def similarity(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Structural similarity per pixel, mean over the channels (Wang et al. 2004: Gaussian window of 11 pixels, deviation 1.5).

    Args:
        first: float (batch, 3, height, width) in [-1, 1].
        second: of the same shape.

    Returns:
        float (batch, height, width), at most 1.
    """
    window = torch.exp(-((torch.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    window = (window / window.sum()).expand(3, 1, 1, 11)

    def local(values: torch.Tensor) -> torch.Tensor:
        padded = nn.functional.pad(values, (5, 5, 5, 5), mode="reflect")
        return nn.functional.conv2d(nn.functional.conv2d(padded, window, groups=3), window.transpose(2, 3), groups=3)

    a, b = (first + 1) / 2, (second + 1) / 2
    mean_a, mean_b = local(a), local(b)
    variance_a, variance_b = local(a * a) - mean_a**2, local(b * b) - mean_b**2
    covariance = local(a * b) - mean_a * mean_b
    alike = (2 * mean_a * mean_b + 0.01**2) * (2 * covariance + 0.03**2)
    return (alike / ((mean_a**2 + mean_b**2 + 0.01**2) * (variance_a + variance_b + 0.03**2))).mean(1)


def _refilled(autoencoder: nn.Module, picture: torch.Tensor, masks: np.ndarray) -> torch.Tensor:
    """A picture with each of some masks, bool (count, TOKENS, TOKENS), filled in: float (count, 3, SIDE, SIDE)."""
    masked = torch.from_numpy(masks)
    with torch.inference_mode():
        drawn = autoencoder(picture.expand(len(masks), -1, -1, -1), masked).clamp(-1, 1)
    return torch.where(_spread(masked), drawn, picture)


def _said(answers: Answers, pictures: torch.Tensor) -> Sequence[str]:
    return answers([_image(picture, (SIDE, SIDE)) for picture in pictures])


def _spread(masks: torch.Tensor) -> torch.Tensor:
    """Masks of tokens, bool (count, TOKENS, TOKENS), as masks of pixels, bool (count, 1, SIDE, SIDE)."""
    return masks.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)[:, None]


def _pooled(pictures: torch.Tensor) -> torch.Tensor:
    """Means over `_POOL` x `_POOL` pixels, repeated over them; float (batch, 3, SIDE, SIDE)."""
    return nn.functional.interpolate(nn.functional.avg_pool2d(pictures, _POOL), scale_factor=_POOL, mode="nearest")


def _noise(rng: np.random.Generator) -> torch.Tensor:
    """Standard normal, float (1, 3, SIDE, SIDE)."""
    return torch.from_numpy(rng.standard_normal((1, 3, SIDE, SIDE), dtype=np.float32))


def _pixels(image: Image.Image) -> torch.Tensor:
    """A picture at the models' size, float (1, 3, SIDE, SIDE) in [-1, 1]."""
    small = np.asarray(_resized(image, (SIDE, SIDE)), dtype=np.float32)
    return torch.from_numpy(small / 127.5 - 1).permute(2, 0, 1)[None]


def _image(pixels: torch.Tensor, size: tuple[int, int]) -> Image.Image:
    """Pixels, float (3, SIDE, SIDE) in [-1, 1], as a picture of a size (width, height)."""
    values = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return _resized(Image.fromarray(values.permute(1, 2, 0).numpy()), size)


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)
