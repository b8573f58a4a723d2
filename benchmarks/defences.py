"""Defences at test time: the guard in its variants, and its rivals, each as what happens to a picture or to a model.

A rival's model answers `generate` as the guarded one does. Rivals that look at no reference act on every input.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import pathlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from benchmarks.restorers import Fit, Restorer, fit_bdmae, fit_sampdetox, fit_zip
from pipeline.attention import Block, Tap, attached, base_of, prompt_regions, tapped
from pipeline.decoder import attention_layers
from pipeline.models import image_token_id
from stages.guard.files import Guard
from stages.guard.guarded import GuardedModel

Wrap = Callable[[Any], AbstractContextManager[Any]]
Picture = Callable[[Image.Image, np.random.Generator], Image.Image]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Defence:
    """A defence at test time.

    Attributes:
        guard: the guard's configuration; None where there is no guard.
        change: what is changed in the calibrated guard before it is put on.
        wrap: what is done to the model; of rivals.
        restorer: what is done to every picture, if need be by a model that is trained once in the bench's folder; of rivals.
        ablation: whether it takes part in the ablations alone.
    """

    guard: Mapping[str, Any] | None = None
    change: Callable[[Guard], Guard] | None = None
    wrap: Wrap | None = None
    restorer: Fit | None = None
    ablation: bool = False

    @contextlib.contextmanager
    def on(self, model: Any, guard: Guard | None) -> Iterator[Any]:
        """The defended model."""
        if guard is not None:
            with GuardedModel.of(model, guard if self.change is None else self.change(guard)) as guarded:
                yield guarded
        elif self.wrap is not None:
            with self.wrap(model) as wrapped:
                yield wrapped
        else:
            yield model


class Closed:
    """A model in which some image tokens of every prompt are closed from a layer on.

    Args:
        model: what answers.
        layer: the first layer in which they are closed; below 0, counted from the end.
        choose: (weights of the layer before, (batch, heads, keys), or None; image, bool (batch, keys)) -> bool (batch, keys).
        reads: whether `choose` reads attention; it costs a prefill.
    """

    def __init__(
        self, model: Any, layer: int, choose: Callable[[torch.Tensor | None, torch.Tensor], torch.Tensor], *, reads: bool
    ) -> None:
        self.model, self._choose, self._reads = model, choose, reads
        self.layer = layer if layer >= 0 else len(attention_layers(base_of(model))) + layer
        self._image_token = image_token_id(base_of(model).config)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    @torch.inference_mode()
    def generate(self, **inputs: Any) -> Any:
        """The model's `generate` with the tokens closed."""
        regions = prompt_regions(inputs["input_ids"], inputs["attention_mask"], self._image_token)
        seen: dict[int, torch.Tensor] = {}
        if self._reads:
            prompt = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
            with tapped(Tap(observer=seen.__setitem__)):
                self.model(**prompt, use_cache=False, logits_to_keep=1)
        keys = self._choose(seen.get(self.layer - 1), regions.image)
        from_layer = torch.full((len(keys),), self.layer, device=keys.device)
        with tapped(Tap(block=Block(keys=keys, from_layer=from_layer))):
            return self.model.generate(**inputs)


def closing(layer: int, choose: Callable[[torch.Tensor | None, torch.Tensor], torch.Tensor], *, reads: bool) -> Wrap:
    """`Closed` as a defence's `wrap`."""

    @contextlib.contextmanager
    def wrap(model: Any) -> Iterator[Closed]:
        with attached(model):
            yield Closed(model, layer, choose, reads=reads)

    return wrap


def least_attended(share: float) -> Callable[[torch.Tensor | None, torch.Tensor], torch.Tensor]:
    """FastV's choice: the share of image tokens that the last position attends to least, heads averaged."""

    def choose(weights: torch.Tensor | None, image: torch.Tensor) -> torch.Tensor:
        assert weights is not None
        attention = torch.where(image, weights.mean(1), torch.inf)
        rank = attention.argsort(-1).argsort(-1)
        return image & (rank < (share * image.sum(-1, keepdim=True)))

    return choose


def whole_picture(_weights: torch.Tensor | None, image: torch.Tensor) -> torch.Tensor:
    """All image tokens."""
    return image


def random_tokens(share: float) -> Callable[[torch.Tensor | None, torch.Tensor], torch.Tensor]:
    """A share of image tokens, drawn anew for every prompt."""
    generator = torch.Generator().manual_seed(0)

    def choose(_weights: torch.Tensor | None, image: torch.Tensor) -> torch.Tensor:
        drawn = torch.rand(image.shape, generator=generator).to(image.device).masked_fill(~image, torch.inf)
        return image & (drawn.argsort(-1).argsort(-1) < (share * image.sum(-1, keepdim=True)))

    return choose


@contextlib.contextmanager
def uniform_attention(model: Any) -> Iterator[Any]:
    """CleanSight's "uniform attention perturbation": attention to the picture is spread evenly over its tokens.

    In every layer, query and step; a query spreads over the tokens that it may see.
    """
    name = "byesight-bench-uniform"
    base = base_of(model)
    before = base.config._attn_implementation  # noqa: SLF001 - transformers has no public name for it
    span: list[torch.Tensor] = []

    def attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        logits = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        weights = (logits if mask is None else logits + mask[..., : key.shape[2]]).float().softmax(-1)
        if span and hasattr(module, "layer_idx"):
            image = torch.zeros(len(query), 1, 1, key.shape[2], dtype=torch.bool, device=query.device)
            image[:, 0, 0, : span[0].shape[1]] = span[0]
            seen = image & (weights > 0)
            mass = (weights * seen).sum(-1, keepdim=True)
            weights = torch.where(seen, mass / seen.sum(-1, keepdim=True).clamp(min=1), weights)
        return (weights.to(value.dtype) @ value).transpose(1, 2).contiguous(), None

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, eager_mask)
    token = image_token_id(base.config)

    class Uniform:
        def __getattr__(self, attribute: str) -> Any:
            return getattr(model, attribute)

        def generate(self, **inputs: Any) -> Any:
            span[:] = [inputs["input_ids"] == token]
            try:
                return model.generate(**inputs)
            finally:
                span.clear()

    base.set_attn_implementation({"text_config": name})
    try:
        yield Uniform()
    finally:
        base.set_attn_implementation({"text_config": before})


def untrained(change: Picture) -> Fit:
    """A change of pictures that takes neither a model nor answers, as a defence's `restorer`."""

    def fit(folder: pathlib.Path, *, quick: bool) -> Restorer:  # noqa: ARG001 - a Fit
        return lambda image, rng, _answers: change(image, rng)

    return fit


def blur(image: Image.Image, _rng: np.random.Generator) -> Image.Image:
    """Gaussian blur of 1/64 of the shorter side."""
    return image.filter(ImageFilter.GaussianBlur(min(image.size) / 64))


def jpeg(image: Image.Image, _rng: np.random.Generator) -> Image.Image:
    """JPEG of quality 30."""
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=30)
    return Image.open(buffer).convert("RGB")


def spatial(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """ST: flip left to right, shrink by up to a tenth and pad at random."""
    flipped = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    scale = float(rng.uniform(0.9, 1.0))
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    canvas = Image.new("RGB", image.size)
    place = int(rng.integers(image.width - size[0] + 1)), int(rng.integers(image.height - size[1] + 1))
    canvas.paste(flipped.resize(size, Image.Resampling.BICUBIC), place)
    return canvas


def every_input(guard: Guard) -> Guard:
    """The guard without detection: every input counts as flagged."""
    return dataclasses.replace(guard, detector=dataclasses.replace(guard.detector, threshold=-1.0), transfer=None)


_PUBLISHED = {"policy": "cleansight"}
DEFENCES: dict[str, Defence] = {
    "none": Defence(),
    "ours": Defence(guard={}),
    "ours, distance alone": Defence(guard={"suspicion_rate": 0.0}),
    "cleansight, tau 1e-4": Defence(guard={**_PUBLISHED, "tau": 1e-4}),
    "cleansight, tau 0.02": Defence(guard={**_PUBLISHED, "tau": 0.02}),
    "blur": Defence(restorer=untrained(blur)),
    "jpeg": Defence(restorer=untrained(jpeg)),
    "spatial transformation": Defence(restorer=untrained(spatial)),
    "bdmae": Defence(restorer=fit_bdmae),
    "zip": Defence(restorer=fit_zip),
    "sampdetox": Defence(restorer=fit_sampdetox),
    "fastv, half of the tokens": Defence(wrap=closing(2, least_attended(0.5), reads=True)),
    "uniform attention": Defence(wrap=uniform_attention),
    "picture closed in the last layer": Defence(wrap=closing(-1, whole_picture, reads=False)),
    "picture closed in the last two layers": Defence(wrap=closing(-2, whole_picture, reads=False)),
    "picture closed in the last four layers": Defence(wrap=closing(-4, whole_picture, reads=False)),
    "detection only": Defence(guard={"action": "report"}, ablation=True),
    "pruning without detection": Defence(guard={"suspicion_rate": 0.0}, change=every_input, ablation=True),
    "cleansight pruning without detection": Defence(guard={**_PUBLISHED}, change=every_input, ablation=True),
    "random pruning, an eighth": Defence(wrap=closing(1, random_tokens(0.125), reads=False), ablation=True),
    "random pruning, half": Defence(wrap=closing(1, random_tokens(0.5), reads=False), ablation=True),
    "cleansight, tau 1e-3": Defence(guard={**_PUBLISHED, "tau": 1e-3}, ablation=True),
    "cleansight, tau 0.1": Defence(guard={**_PUBLISHED, "tau": 0.1}, ablation=True),
    "distance alone, layers early": Defence(guard={"suspicion_rate": 0.0, "layers": [0, 1, 2]}, ablation=True),
    "distance alone, layers middle": Defence(guard={"suspicion_rate": 0.0, "layers": "middle"}, ablation=True),
    "distance alone, layers late": Defence(guard={"suspicion_rate": 0.0, "layers": [5, 6, 7]}, ablation=True),
    "ours, 50 reference rows": Defence(guard={"reference_rows": 50}, ablation=True),
    "ours, 100 reference rows": Defence(guard={"reference_rows": 100}, ablation=True),
    "ours, 200 reference rows": Defence(guard={"reference_rows": 200}, ablation=True),
}
"""By name, in the order of the tables."""
