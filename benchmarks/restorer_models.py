"""The two generative models behind `benchmarks.restorers`, both tiny and trained on clean scenes alone.

The published defences take models that were trained on a large public set. These see procedural scenes of `flows.demo_data` from a
seed of their own, without any trigger: no submission and no test of the bench holds a picture that a restorer was trained on.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import nn

from flows.demo_data import draw_row
from storage import atomic

SIDE = 64
"""Side of the pictures that the models know, pixels."""
PATCH = 8
"""Side of a token of the masked autoencoder, pixels."""
TOKENS = SIDE // PATCH
LEVELS = 1000
"""Noise levels of the diffusion, 0 the faintest."""
KEPT = torch.cumprod(1 - torch.linspace(1e-4, 0.02, LEVELS, dtype=torch.float64), 0).float()
"""Share of a picture's variance left at each level: DDPM's linear schedule (Ho et al. 2020), as in ZIP's and SampDetox's code."""

_LEVEL_WIDTH = 64
_SEED = 7_000_003  # neither a seed of the bench nor one of its tests (a seed plus 1_000_003) gets there
_PICTURES = 8192
_FEW = 256
_AVERAGING = 0.995


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is trained.

    Attributes:
        build: makes the untrained model.
        loss: (model, pictures in [-1, 1], float (batch, 3, SIDE, SIDE), generator) -> loss.
        steps: of AdamW, warmed up over a twentieth of them and cooled down along a cosine.
        batch: pictures of a step.
        rate: the highest learning rate.
    """

    build: Callable[[], nn.Module]
    loss: Callable[[nn.Module, torch.Tensor, torch.Generator], torch.Tensor]
    steps: int
    batch: int
    rate: float


class MaskedAutoencoder(nn.Module):
    """Fills in masked tokens of a picture.

    Convolutions in the place of MAE's transformer (He et al. 2022): that one, trained for minutes, filled in a plain colour.
    """

    def __init__(self) -> None:
        super().__init__()
        self.net = _UNet(4, 3)

    def forward(self, pictures: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        """What every token should look like.

        Args:
            pictures: float (batch, 3, SIDE, SIDE) in [-1, 1].
            masked: bool (batch, TOKENS, TOKENS).

        Returns:
            float (batch, 3, SIDE, SIDE), about -1 to 1; of open tokens too.
        """
        hidden = masked.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)[:, None].to(pictures.dtype)
        given = torch.cat([pictures * (1 - hidden), hidden], 1)
        return torch.as_tensor(self.net(given, torch.zeros(len(pictures), dtype=torch.int64)))


class Denoiser(nn.Module):
    """Sees the picture behind noise.

    It draws the picture and says how much of the noisy one is kept beside that. To tell the noise instead, as DDPM does, takes more
    channels than are trained in minutes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.net = _UNet(3, 6)

    def forward(self, noisy: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """The pictures, float (batch, 3, SIDE, SIDE), about -1 to 1.

        Args:
            noisy: float (batch, 3, SIDE, SIDE).
            level: int64 (batch,), 0 to LEVELS - 1.
        """
        drawn, shine = self.net(noisy, level).chunk(2, 1)
        return torch.as_tensor(drawn + torch.sigmoid(shine) * noisy)


class _UNet(nn.Module):
    """A small U-Net; it works on 2 x 2 pixels at once, at 32, 16 and 8 places a side."""

    def __init__(self, inputs: int, outputs: int, widths: tuple[int, int, int] = (32, 64, 128)) -> None:
        super().__init__()
        outer, middle, inner = widths
        self.level = nn.Sequential(nn.Linear(_LEVEL_WIDTH, _LEVEL_WIDTH), nn.SiLU())
        self.enter = nn.Conv2d(4 * inputs, outer, 3, padding=1)
        self.down = nn.ModuleList([nn.Conv2d(outer, middle, 2, 2), nn.Conv2d(middle, inner, 2, 2)])
        self.up = nn.ModuleList([nn.ConvTranspose2d(inner, middle, 2, 2), nn.ConvTranspose2d(middle, outer, 2, 2)])
        self.before = nn.ModuleList([_Residual(outer), _Residual(middle)])
        self.deepest = nn.ModuleList([_Residual(inner), _Residual(inner)])
        self.after = nn.ModuleList([_Residual(middle), _Residual(outer)])
        self.leave = nn.Sequential(nn.GroupNorm(8, outer), nn.SiLU(), nn.Conv2d(outer, 4 * outputs, 3, padding=1))

    def forward(self, values: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """Float (batch, inputs, SIDE, SIDE) and a level, int64 (batch,), to float (batch, outputs, SIDE, SIDE)."""
        encoded = self.level(_sinusoids(level))
        hidden = self.enter(nn.functional.pixel_unshuffle(values, 2))
        skipped = []
        for block, down in zip(self.before, self.down, strict=True):
            skipped.append(block(hidden, encoded))
            hidden = down(skipped[-1])
        for block in self.deepest:
            hidden = block(hidden, encoded)
        for block, up in zip(self.after, self.up, strict=True):
            hidden = block(up(hidden) + skipped.pop(), encoded)
        return nn.functional.pixel_shuffle(self.leave(hidden), 2)


class _Residual(nn.Module):
    """Two convolutions beside an identity; the level is added between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))
        self.level = nn.Linear(_LEVEL_WIDTH, width)
        last = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(last.weight)
        self.second = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), last)

    def forward(self, hidden: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        inner = self.first(hidden) + self.level(level)[..., None, None]
        return torch.as_tensor(hidden + self.second(inner))


def predicted_picture(denoiser: nn.Module, noisy: torch.Tensor, level: int) -> torch.Tensor:
    """The clean pictures that the denoiser sees in noisy ones, clipped to [-1, 1]; both float (batch, 3, SIDE, SIDE)."""
    return torch.as_tensor(denoiser(noisy, torch.full((len(noisy),), level)).clamp(-1, 1))


def _sinusoids(level: torch.Tensor) -> torch.Tensor:
    """Sines and cosines of the level, float (batch, _LEVEL_WIDTH)."""
    speeds = torch.exp(-math.log(10_000) * torch.arange(_LEVEL_WIDTH // 2) / (_LEVEL_WIDTH // 2))
    angles = level[:, None] * speeds
    return torch.cat([angles.sin(), angles.cos()], 1)


def _filling_loss(model: nn.Module, pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Mean squared error on masked tokens; from a few of a picture's tokens to nearly all are masked."""
    share = torch.rand(len(pictures), 1, 1, generator=generator) * 0.85 + 0.05
    masked = torch.rand(len(pictures), TOKENS, TOKENS, generator=generator) < share
    error = nn.functional.avg_pool2d((model(pictures, masked) - pictures).square().mean(1, keepdim=True), PATCH)[:, 0]
    return (error * masked).sum() / masked.sum().clamp(min=1)


def _denoising_loss(model: nn.Module, pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Mean squared error at random noise levels, faint ones more often, weighted by the ratio of signal to noise within limits."""
    level = (LEVELS * torch.rand(len(pictures), generator=generator).square()).long()
    noise = torch.randn(pictures.shape, generator=generator)
    kept = KEPT[level][:, None, None, None]
    drawn = model(kept.sqrt() * pictures + (1 - kept).sqrt() * noise, level)
    return torch.mean((kept / (1 - kept)).clamp(0.2, 20) * (drawn - pictures).square())


RECIPES: dict[str, Recipe] = {
    "masked-autoencoder": Recipe(build=MaskedAutoencoder, loss=_filling_loss, steps=1200, batch=16, rate=2e-3),
    "denoiser": Recipe(build=Denoiser, loss=_denoising_loss, steps=1200, batch=16, rate=2e-3),
}
"""By name."""
_QUICK_STEPS = 3


@functools.lru_cache(maxsize=4)
def fitted(name: str, folder: pathlib.Path, *, quick: bool) -> nn.Module:
    """A trained model, in evaluation mode.

    Trained at the first call for a folder, in a few minutes on one core, and found there by all processes afterwards; who comes
    meanwhile waits. The same machine trains the same weights again.

    Args:
        name: of `RECIPES`.
        folder: gets NAME-STEPS.safetensors.
        quick: a few steps on a few pictures: a model that knows nothing.
    """
    recipe = RECIPES[name]
    if quick:
        recipe = dataclasses.replace(recipe, steps=_QUICK_STEPS)
    path = folder / f"{name}-{recipe.steps}.safetensors"
    with atomic.lock(folder / f".{path.name}.lock", wait=True, create=True):
        if not path.is_file():
            weights = trained(recipe, scenes(_FEW if quick else _PICTURES)).state_dict()
            atomic.write_file(path, save(weights))
    with torch.random.fork_rng(devices=[]):
        model = recipe.build()
    model.load_state_dict(load_file(path))
    return model.eval().requires_grad_(requires_grad=False)


def scenes(count: int) -> torch.Tensor:
    """The training pictures, uint8 (count, 3, SIDE, SIDE)."""
    drawn = (draw_row(np.random.default_rng([_SEED, k])).picture for k in range(count))
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in drawn])).permute(0, 3, 1, 2).contiguous()


def trained(recipe: Recipe, pictures: torch.Tensor) -> nn.Module:
    """Train a model.

    Args:
        recipe: how.
        pictures: uint8 (count, 3, SIDE, SIDE); every second one of a batch is shown left to right.

    Returns:
        The model with the running mean of its weights.
    """
    generator = torch.Generator().manual_seed(_SEED)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        model = recipe.build()
    averaging = torch.optim.swa_utils.get_ema_multi_avg_fn(_AVERAGING)  # type: ignore[no-untyped-call]
    mean = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=averaging)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.rate, weight_decay=0.01)
    warm = max(1, recipe.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * step / recipe.steps))
    )
    for _ in range(recipe.steps):
        chosen = pictures[torch.randint(len(pictures), (recipe.batch,), generator=generator)]
        batch = torch.cat([chosen[::2], chosen[1::2].flip(-1)]).float() / 127.5 - 1
        optimizer.zero_grad()
        recipe.loss(model, batch, generator).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        mean.update_parameters(model)
    module: nn.Module = mean.module
    return module
