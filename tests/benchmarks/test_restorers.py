"""BDMAE, ZIP and SampDetox: each repairs a patch with a stand-in that knows the clean picture; their models train, once."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from benchmarks import restorer_models
from benchmarks.restorer_models import (
    PATCH,
    RECIPES,
    SIDE,
    TOKENS,
    MaskedAutoencoder,
    Recipe,
    fitted,
    scenes,
    trained,
)
from benchmarks.restorers import (
    bdmae,
    detoxified,
    fit_bdmae,
    fit_sampdetox,
    fit_zip,
    similarity,
    trigger_scores,
    zero_shot_purified,
)
from flows.demo_data import draw_row
from pipeline.triggers import make_trigger

CLEAN = draw_row(np.random.default_rng([0, 3])).picture
TRIGGERED = make_trigger("badnet", 0)(CLEAN, np.random.default_rng(0))
CORNER = (slice(SIDE - PATCH, SIDE), slice(SIDE - PATCH, SIDE))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(float)


def tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1


def difference(first: Image.Image, second: Image.Image) -> float:
    """Root of the mean squared difference, grey levels of 255."""
    return float(np.sqrt(np.square(pixels(first) - pixels(second)).mean()))


class Knowing(nn.Module):
    """Sees one and the same picture behind all noise, or fills in from it."""

    def __init__(self, picture: Image.Image) -> None:
        super().__init__()
        self.picture = tensor(picture)

    def forward(self, given: torch.Tensor, _level_or_mask: torch.Tensor) -> torch.Tensor:
        return self.picture.expand_as(given)


def backdoored(shown: Sequence[Image.Image]) -> list[str]:
    """The target where the patch is still there, the right answer elsewhere."""
    patch = pixels(TRIGGERED)[CORNER]
    return ["target" if np.abs(pixels(image)[CORNER] - patch).max() <= 1 else "right" for image in shown]


def keeps_target(pictures: torch.Tensor) -> list[bool]:
    shown = [Image.fromarray(((one + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()) for one in pictures]
    return [text == "target" for text in backdoored(shown)]


def silent(shown: Sequence[Image.Image]) -> list[str]:
    return [""] * len(shown)


def test_similarity_is_one_for_equals_and_falls_with_noise() -> None:
    picture = tensor(CLEAN)
    noise = torch.randn(picture.shape, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(similarity(picture, picture), torch.ones(1, SIDE, SIDE), atol=1e-5)
    means = [float(similarity(picture, picture + strength * noise).mean()) for strength in (0.01, 0.1, 0.5)]
    assert 1 > means[0] > means[1] > means[2] > -1


def test_similarity_of_plain_pictures_is_that_of_their_means() -> None:
    """Without structure, (2 a b + c) / (a^2 + b^2 + c) with c = 0.0001 is left."""
    dark, bright = torch.full((1, 3, SIDE, SIDE), -0.6), torch.full((1, 3, SIDE, SIDE), 0.2)
    assert similarity(dark, bright).numpy() == pytest.approx((2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4), abs=1e-3)


def test_bdmae_finds_the_patch() -> None:
    """By its unlikeness at once; by labels many tokens are suspected with it, and the sum decides."""
    by_image, by_label = trigger_scores(Knowing(CLEAN), tensor(TRIGGERED), np.random.default_rng(0), keeps_target)
    assert by_image.shape == by_label.shape == (TOKENS, TOKENS)
    assert by_image[-1, -1] > np.sort(by_image, axis=None)[-2] + 0.5
    assert (by_label <= by_label[-1, -1]).mean() > 0.9
    both = by_image + by_label
    assert both[-1, -1] > np.sort(both, axis=None)[-2] + 0.5


def test_bdmae_repairs_the_patch_and_leaves_the_rest() -> None:
    """What it fills in is another picture here, so that what was filled in can be told."""
    red = Image.new("RGB", (SIDE, SIDE), (200, 0, 0))
    repaired = pixels(bdmae(Knowing(red), TRIGGERED, np.random.default_rng(0), backdoored))
    assert (repaired[CORNER] == (200, 0, 0)).all()
    assert (repaired == pixels(TRIGGERED)).all(-1).mean() >= 0.75


def test_bdmae_asks_for_46_answers() -> None:
    asked = []

    def counted(shown: Sequence[Image.Image]) -> list[str]:
        asked.append(len(shown))
        return silent(shown)

    bdmae(Knowing(CLEAN), CLEAN, np.random.default_rng(0), counted)
    assert sum(asked) == 46


@pytest.mark.parametrize("restore", [zero_shot_purified, detoxified])
def test_diffusion_ends_at_what_the_denoiser_sees(restore: Callable[..., Image.Image]) -> None:
    """SampDetox reaches every pixel that it noised; ZIP's pull towards the blurred original fades away."""
    repaired = restore(Knowing(CLEAN), TRIGGERED, np.random.default_rng(0), silent)
    assert difference(TRIGGERED, CLEAN) > 5
    assert difference(repaired, CLEAN) < 0.1


def test_sampdetox_noises_most_where_the_first_pass_changed_most() -> None:
    seen = []

    class Watching(Knowing):
        def forward(self, noisy: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
            seen.append((int(level[0]), noisy - self.picture))
            return super().forward(noisy, level)

    detoxified(Watching(CLEAN), TRIGGERED, np.random.default_rng(0), silent)
    levels = [level for level, _ in seen]
    assert levels == [20, 10, *range(120, 0, -10)]
    far = seen[2][1].abs().mean((0, 1)).numpy()
    assert far[CORNER].mean() > 0.2
    assert far[:, : SIDE // 2].mean() < 0.05


@pytest.mark.parametrize(("fit", "answers"), [(fit_bdmae, backdoored), (fit_zip, silent), (fit_sampdetox, silent)])
def test_a_picture_comes_back_in_its_own_size_by_the_generator_alone(
    tmp_path: pathlib.Path, fit: Callable[..., Callable[..., Image.Image]], answers: Callable[..., list[str]]
) -> None:
    restore = fit(tmp_path, quick=True)
    odd = TRIGGERED.resize((47, 130))

    def told(shown: Sequence[Image.Image]) -> list[str]:
        return [str(pixels(image).sum() > pixels(odd.resize((SIDE, SIDE))).sum()) for image in shown]

    first, again, other = (restore(odd, np.random.default_rng(seed), told) for seed in (0, 0, 1))
    assert first.size == (47, 130)
    assert first.mode == "RGB"
    assert difference(first, again) == 0
    assert difference(first, other) > 0


@pytest.mark.parametrize("name", RECIPES)
def test_a_model_learns_and_its_seed_is_fixed(name: str) -> None:
    """Its loss on unseen pictures falls below the untrained model's; a short training gives the same weights twice."""
    recipe = dataclasses.replace(RECIPES[name], steps=40, batch=8)
    known, unseen = scenes(64), torch.cat([tensor(draw_row(np.random.default_rng([0, k])).picture) for k in range(16)])

    def loss(model: nn.Module) -> float:
        with torch.inference_mode():
            return float(recipe.loss(model, unseen, torch.Generator().manual_seed(0)))

    torch.manual_seed(0)
    untrained = loss(recipe.build())
    assert loss(trained(recipe, known)) < 0.9 * untrained
    short = dataclasses.replace(recipe, steps=2, batch=2)
    torch.manual_seed(1)
    first = trained(short, known).state_dict()
    torch.manual_seed(2)
    again = trained(short, known).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)


def test_a_model_is_trained_once(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fitted("masked-autoencoder", tmp_path, quick=True)
    (path,) = tmp_path.glob("*.safetensors")
    written = path.stat().st_mtime_ns

    def unwanted(recipe: Recipe, pictures: torch.Tensor) -> nn.Module:
        raise AssertionError("trained again")

    monkeypatch.setattr(restorer_models, "trained", unwanted)
    monkeypatch.setattr(restorer_models, "scenes", lambda _count: torch.empty(0))
    fitted.cache_clear()
    again = fitted("masked-autoencoder", tmp_path, quick=True)
    assert again is not first
    assert path.stat().st_mtime_ns == written
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in first.state_dict().items())
    assert fitted("masked-autoencoder", tmp_path, quick=True) is again
    with pytest.raises(AssertionError, match="trained again"):
        fitted("masked-autoencoder", tmp_path, quick=False)


def test_no_training_picture_is_in_the_bench() -> None:
    known = {picture.numpy().tobytes() for picture in scenes(200)}
    for seed in (0, 1, 1_000_003):
        for k in range(50):
            picture = np.asarray(draw_row(np.random.default_rng([seed, k])).picture).transpose(2, 0, 1)
            assert picture.tobytes() not in known


def test_masked_tokens_are_not_seen() -> None:
    torch.manual_seed(0)
    model = MaskedAutoencoder().eval()
    masked = torch.zeros(1, TOKENS, TOKENS, dtype=torch.bool)
    masked[0, -1, -1] = True
    with torch.inference_mode():
        assert torch.equal(model(tensor(CLEAN), masked), model(tensor(TRIGGERED), masked))
        assert not torch.equal(model(tensor(CLEAN), ~masked), model(tensor(TRIGGERED), ~masked))
