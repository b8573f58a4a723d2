"""A model whose `generate` is watched by CleanSight's detector and purified where it flags.

Detection reads the attention rows of the prefill that `generate` makes anyway. Where a row of the batch is flagged, the prefill is run once
more with that row's stealing tokens closed from its rewind layer on; logits and cache of the flagged rows are replaced, those of the others
stay as they were. The tokens stay closed in every decoding step. All state lives in a context variable of the call, none on the model.
"""

from __future__ import annotations

import contextvars
import copy
import dataclasses
import time
from typing import Any, Literal

import torch

from pipeline.attention import (
    Block,
    LayerStatistics,
    PromptRegions,
    Tap,
    attach,
    base_of,
    detach,
    prompt_regions,
    reduce_layer,
    tapped,
)
from pipeline.errors import ByeSightError
from pipeline.models import image_token_id
from stages.guard.detector import Detector, feature_vectors
from stages.guard.purify import rewind_layers, stealing_heads, stealing_tokens

Action = Literal["purify", "refuse", "report"]


class GuardRefusal(ByeSightError):
    """The guard's action is `refuse` and at least one input of the call was flagged."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuardRecord:
    """What the guard did with one input; holds nothing of the user's content.

    Attributes:
        ran: whether the detector looked at it (an input without pictures is not looked at).
        flagged: whether its distance is above the threshold.
        distance, threshold: in whitened standard deviations; distance is NaN where it did not run.
        tokens_pruned: image tokens closed.
        rewind_layer: the layer from which they are closed; -1 where nothing is.
        milliseconds: time that the guard took for the whole batch beyond the model's own prefill.
    """

    ran: bool
    flagged: bool
    distance: float
    threshold: float
    tokens_pruned: int
    rewind_layer: int
    milliseconds: float


@dataclasses.dataclass(kw_only=True)
class _Call:
    """The state of one `generate` call."""

    tap: Tap
    regions: PromptRegions | None = None
    weights: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)
    statistics: dict[int, LayerStatistics] = dataclasses.field(default_factory=dict)
    records: list[GuardRecord] = dataclasses.field(default_factory=list)
    done: bool = False
    seconds: float = 0.0


_CALL: contextvars.ContextVar[_Call | None] = contextvars.ContextVar("byesight_guard_call", default=None)


class GuardedModel:
    """Wraps a model; everything but `generate` is the model's own.

    Use it as a context manager, or call `detach`, to give the model back as it was.
    """

    def __init__(self, model: Any, detector: Detector, *, action: Action = "purify") -> None:
        self.model = model
        self.detector = detector.to(model.device)
        self.action = action
        self.records: list[GuardRecord] = []
        """One per input of the last `generate` call."""
        base = base_of(model)
        self._image_token_id = image_token_id(base.config)
        self._before = attach(model)
        self._handles = [
            base.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            base.register_forward_hook(self._after_forward, with_kwargs=True),
        ]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __enter__(self) -> GuardedModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def detach(self) -> None:
        """Remove the hooks and put the model's own attention back."""
        for handle in self._handles:
            handle.remove()
        if self._handles:
            detach(self.model, self._before)
        self._handles = []

    @torch.inference_mode()
    def generate(self, **inputs: Any) -> Any:
        """The model's `generate`, guarded.

        Args:
            inputs: as the model's own; prompts are padded on the left.

        Returns:
            What the model's own `generate` returns; `records` holds one record per input afterwards.

        Raises:
            GuardRefusal: the action is `refuse` and an input was flagged.
        """
        call = _Call(tap=Tap())
        call.tap.observer = lambda layer, weights: self._observe(call, layer, weights)
        token = _CALL.set(call)
        try:
            with tapped(call.tap):
                output = self.model.generate(**inputs)
        finally:
            _CALL.reset(token)
        self.records = call.records
        return output

    def _observe(self, call: _Call, layer: int, weights: torch.Tensor) -> None:
        if call.done or call.regions is None:
            return
        started = time.perf_counter()
        call.weights[layer] = weights
        if layer in self.detector.layers:
            call.statistics[layer] = reduce_layer(weights, call.regions, top=1)
        call.seconds += time.perf_counter() - started

    def _before_forward(self, _module: torch.nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """At the prefill of a guarded call: find the image and the text in the prompt."""
        call = _CALL.get()
        if call is None or call.done or kwargs.get("input_ids") is None:
            return
        input_ids = kwargs["input_ids"]
        mask = kwargs.get("attention_mask")
        seen = torch.ones_like(input_ids) if mask is None or mask.dim() != 2 else mask[:, -input_ids.shape[1] :]
        call.regions = prompt_regions(input_ids, seen, self._image_token_id)

    def _after_forward(self, module: torch.nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """At the prefill of a guarded call: detect, and run flagged rows again with their tokens closed."""
        call = _CALL.get()
        if call is None or call.done or call.regions is None:
            return output
        call.done = True
        started = time.perf_counter()
        image = call.regions.image
        vectors = feature_vectors(call.statistics, image.sum(-1), self.detector.layers, self.detector.features)
        distances = self.detector.distances(vectors)
        flagged = distances > self.detector.threshold
        pruned = torch.zeros_like(image)
        layers = torch.full((len(image),), -1, device=image.device)
        if bool(flagged.any()):
            if self.action == "refuse":
                raise GuardRefusal(f"{int(flagged.sum())} of {len(image)} inputs were flagged by the guard and refused")
            if self.action == "purify":
                deviations = self.detector.deviations(vectors)
                heads = stealing_heads(self.detector, deviations)
                pruned = stealing_tokens(call.weights, image, heads) & flagged[:, None]
                layers = torch.where(flagged, rewind_layers(self.detector, deviations), layers)
                call.tap.block = Block(keys=pruned, from_layer=torch.where(flagged, layers, torch.iinfo(torch.int64).max))
                self._run_again(module, kwargs, output, flagged)
        call.weights.clear()
        milliseconds = 1000 * (call.seconds + time.perf_counter() - started)
        ran = image.any(-1)
        for k in range(len(image)):
            call.records.append(
                GuardRecord(
                    ran=bool(ran[k]),
                    flagged=bool(flagged[k]),
                    distance=float(distances[k]),
                    threshold=self.detector.threshold,
                    tokens_pruned=int(pruned[k].sum()),
                    rewind_layer=int(layers[k]),
                    milliseconds=milliseconds,
                )
            )
        return output

    @staticmethod
    def _run_again(module: torch.nn.Module, kwargs: dict[str, Any], output: Any, flagged: torch.Tensor) -> None:
        """Replace logits and cache of the flagged rows by those of a prefill under the open block, in place."""
        cache = output.past_key_values
        again = dict(kwargs)
        if cache is not None:
            fresh = copy.copy(cache)
            fresh.layers = [type(layer)() for layer in cache.layers]
            again["past_key_values"] = fresh
        second = module.forward(**again)
        rows = flagged[:, None, None]
        output.logits = torch.where(rows, second.logits, output.logits)
        if cache is not None:
            for old, new in zip(cache.layers, second.past_key_values.layers, strict=True):
                old.keys = torch.where(rows[..., None], new.keys, old.keys)
                old.values = torch.where(rows[..., None], new.values, old.values)
