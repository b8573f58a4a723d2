"""A model whose `generate` is watched by CleanSight's detector and purified where it flags.

Detection reads the attention rows of the prefill that `generate` makes anyway. Suspicious inputs are tried causally
(`stages.guard.transfer`). Where a row of the batch is flagged, the prefill is run once more with that row's stealing tokens closed
from its rewind layer on; an input that passed the causal test and still begins the same answer is rewound further. Logits and cache
of the flagged rows are replaced, those of the others stay as they were. The tokens stay closed in every decoding step. An answer
that goes on with unusual words is given again with its picture closed late; where that answer is a usual one, the input is flagged.
All state lives in a context variable of the call, none on the model.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import dataclasses
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, Self

import torch

from pipeline.attention import (
    Block,
    Tap,
    attach,
    base_of,
    detach,
    prompt_regions,
    reduce_layer,
    tapped,
    uncompiled,
)
from pipeline.decoder import attention_layers, is_hybrid
from pipeline.errors import ConfigError, ModelError, RefusedInputError
from pipeline.generation import RandomState
from pipeline.models import image_token_id
from stages.guard.call import Call
from stages.guard.closing import NEVER
from stages.guard.detector import Detector
from stages.guard.files import Guard, dtype_name
from stages.guard.judge import Judge
from stages.guard.policy import DEFAULT, Policy
from stages.guard.records import Counters, GuardRecord
from stages.guard.transfer import TransferRule, TransferTest
from stages.guard.ways import end_tokens, refuse_ways

_log = logging.getLogger(__name__)

_UNSEEN = ("pixel_values_videos", "input_features")
"""What processors give for videos and sound."""

_CALL: contextvars.ContextVar[Call | None] = contextvars.ContextVar("byesight_guard_call", default=None)


class GuardedModel:
    """Wraps a model; everything but `generate` is the model's own.

    Use it as a context manager, or call `detach`, to give the model back as it was.

    Args:
        model: base or PEFT model.
        detector: calibrated on this very model.
        transfer: the causal test of suspicious inputs; None leaves all to the detector, as published.
        policy: what happens to flagged inputs, and when the guard itself fails.

    Raises:
        ModelError: the model's attention can't be read (`pipeline.decoder`), it has fewer layers than the detector reads, or
            picture tokens can't be planted into its prompts.
    """

    def __init__(
        self,
        model: Any,
        detector: Detector,
        *,
        transfer: TransferRule | None = None,
        policy: Policy = DEFAULT,
    ) -> None:
        self.model = model
        self._counters = Counters()
        self._last = threading.local()
        base = base_of(model)
        self._image_token_id = image_token_id(base.config)
        layers = len(attention_layers(base))
        if detector.layers[-1] >= layers:
            raise ModelError(f"the guard reads attention layer {detector.layers[-1]}, but {type(base).__name__} has {layers}")
        if policy.action == "purify" and is_hybrid(base):
            _log.warning(
                "%s has layers without attention, which can pass on what the guard closes; the action `refuse` is safer",
                type(base).__name__,
            )
        if policy.purification == "published" and detector.layers[-1] + 1 >= layers:
            raise ModelError(f"the published purification closes tokens after layer {detector.layers[-1]}, the last there is")
        self._before = attach(model)
        try:
            test = None if transfer is None else TransferTest(model, transfer.hosts)
        except BaseException:
            detach(model, self._before)
            raise
        self._judge = Judge(detector=detector.to(model.device), rule=transfer, test=test, policy=policy, layers=layers)
        self._handles = [
            base.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            base.register_forward_hook(self._after_forward, with_kwargs=True),
            base.get_decoder().register_forward_pre_hook(self._before_decoder, with_kwargs=True),
        ]

    @classmethod
    def of(cls, model: Any, guard: Guard) -> GuardedModel:
        """Put a stored guard on the model that it was calibrated on; warns where its weights are of another type."""
        calibrated, actual = guard.facts.get("dtype"), dtype_name(model)
        if calibrated not in (None, actual):
            _log.warning(
                "the guard was calibrated in %s and the model is in %s: its false positive rate may be another", calibrated, actual
            )
        return cls(model, guard.detector, transfer=guard.transfer, policy=guard.policy)

    def __getattr__(self, name: str) -> Any:
        if name == "model":  # not there yet, while a copy is made
            raise AttributeError(name)
        return getattr(self.model, name)

    def eval(self) -> Self:
        """The model in evaluation mode, still guarded."""
        self.model.eval()
        return self

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """The guarded model where it is.

        Raises:
            ModelError: it would be moved, or change its type: the guard was calibrated, and its prompts run, as it is.
        """
        parsed: tuple[Any, ...] = torch._C._nn._parse_to(*args, **kwargs)  # noqa: SLF001 - what Module.to itself calls
        device, dtype = parsed[:2]
        if device not in (None, self.model.device) or dtype not in (None, self.model.dtype):
            raise ModelError("a guarded model can't be moved; move the model before the guard is put on it")
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    @property
    def detector(self) -> Detector:
        """The calibrated reference, on the model's device."""
        return self._judge.detector

    @property
    def rule(self) -> TransferRule | None:
        """The causal tests of suspicious inputs, if there are any."""
        return self._judge.rule

    @property
    def policy(self) -> Policy:
        """What happens to flagged inputs."""
        return self._judge.policy

    @property
    def records(self) -> list[GuardRecord]:
        """One per input of this thread's last `generate` call; empty where it failed before the detection."""
        return list(getattr(self._last, "records", []))

    def counters(self) -> dict[str, float]:
        """Totals over all calls and threads since the guard was made, as `Counters.totals`."""
        return self._counters.totals()

    def detach(self) -> None:
        """Remove the hooks and put the model's own attention back."""
        for handle in self._handles:
            handle.remove()
        if self._handles:
            detach(self.model, self._before)
        self._handles = []

    @torch.no_grad()  # as the model's own: tensors of an inference mode could not be changed by who is given them
    def generate(self, **inputs: Any) -> Any:
        """The model's `generate`, guarded.

        Args:
            inputs: as the model's own; prompts are padded on the left and given whole, as input_ids.

        Returns:
            What the model's own `generate` returns; `records` holds one record per input afterwards.

        Raises:
            RefusedInputError: the action is `refuse` and an input was flagged.
            ConfigError: prompts that the guard can't see (embeddings instead of ids, continued caches) and ways to generate that it
                can't follow (`stages.guard.ways`), named before anything runs; padding on the right, unless `on_error` is `pass`:
                then the answer is unguarded.
        """
        self._last.records = []
        prompt = inputs.get("input_ids", inputs.get("inputs"))
        if prompt is None or inputs.get("inputs_embeds") is not None:
            raise ConfigError("the guard finds pictures by their tokens: give input_ids, and no inputs_embeds")
        if not self._handles:
            raise ConfigError("the guard is detached")
        if strange := sorted(name for name in _UNSEEN if inputs.get(name) is not None):
            raise ConfigError(f"the guard looks at pictures alone, not at {', '.join(strange)}")
        refuse_ways(base_of(self.model), inputs)
        call = Call(
            owner=self,
            inputs=prompt.shape[0],
            prompt=prompt.shape[1],
            mask=inputs.get("attention_mask"),
            says_late=torch.zeros(prompt.shape[0], dtype=torch.bool, device=self.model.device),
        )
        draws = RandomState(self.model.device) if self._tries_answers(inputs) else None
        unseen: list[GuardRecord] = []
        try:
            output = self._answer(call, inputs)
            if draws is not None:
                with self._forgiving(call):
                    call.says_late = self._says_late(call, inputs, output, draws)
                if self.policy.action == "purify" and bool(call.says_late.any()):
                    before, call = call.records, call.afresh()
                    draws.restore()
                    output = self._answer(call, inputs)
                    call.records = [new.after(old) for new, old in zip(call.records, before, strict=True)]
        except Exception:
            unseen = [GuardRecord.of_failure(self.detector.threshold)] * call.inputs
            raise
        else:
            return output
        finally:
            self._last.records = call.records
            # What was found counts also where the answer failed later; an attack that was seen is not a guard that failed.
            self._counters.add(call.records or unseen, refuses=self.policy.action == "refuse")

    def _answer(self, call: Call, inputs: Mapping[str, Any]) -> Any:
        """What the model generates, watched; raises ModelError where it did without a prefill that the guard could see."""
        call.tap.observer = lambda layer, weights: self._observe(call, layer, weights)
        token = _CALL.set(call)
        try:
            with tapped(call.tap):
                output = self.model.generate(**inputs)
        finally:
            _CALL.reset(token)
        if not call.done:
            raise ModelError("the model answered without a prefill that the guard could see")
        return output

    def _tries_answers(self, inputs: Mapping[str, Any]) -> bool:
        """Whether the answers of a call can be tried as a whole, which gives them once more.

        What was handed to the caller as it was made can't be taken back, and a cache of the caller's can't be filled twice: such
        calls are left at what the prefill tells.
        """
        handed_out = any(inputs.get(name) is not None for name in ("streamer", "past_key_values"))
        return self.rule is not None and self.rule.late is not None and not handed_out

    def _says_late(self, call: Call, inputs: Mapping[str, Any], output: Any, draws: RandomState) -> torch.Tensor:
        """Which inputs say something unusual that they would not say with their pictures closed late, bool (inputs,).

        Their answers are given once more, with the same random numbers.
        """
        found = torch.zeros_like(call.says_late)
        if any(record.failed for record in call.records):
            return found
        assert call.regions is not None
        assert self.rule is not None
        assert self.rule.late is not None
        started = time.perf_counter()
        ends = end_tokens(base_of(self.model), inputs)
        answers = _answers(output, call.prompt)
        strange = self.rule.strange(answers, ends)
        several = len(strange) // call.inputs
        tried = torch.tensor([bool(said) for said in strange], device=found.device).view(-1, several).any(-1)
        tried &= call.regions.image.any(-1)[:: call.beams]
        if not bool(tried.any()):
            return found
        layers = torch.where(tried, self.rule.late, NEVER).repeat_interleave(call.beams)
        with draws.again(), tapped(Tap(block=Block(keys=call.regions.image, from_layer=layers))):
            others = _answers(self.model.generate(**inputs), call.prompt)
        # What was flagged and purified before may say its target again where so little is closed: that is no better answer.
        begins = (others[:, 0] == answers[:, 0]) | self.rule.begins_usually(others[:, 0])
        usual = [not said for said in self.rule.strange(others, ends)]
        found = tried & (begins & torch.tensor(usual, device=found.device)).view(-1, several).all(-1)
        milliseconds = 1000 * (time.perf_counter() - started)
        call.records = [
            dataclasses.replace(
                record,
                tried=record.tried or bool(tried[k]),
                late=record.late or bool(found[k]),
                flagged=record.flagged or bool(found[k]),
                milliseconds=record.milliseconds + milliseconds,
            )
            for k, record in enumerate(call.records)
        ]
        self._judge.refuse(call)
        return found

    @contextlib.contextmanager
    def _forgiving(self, call: Call) -> Iterator[None]:
        """The guard's own work; where it fails and the policy allows it, the call goes on unguarded."""
        try:
            yield
        except RefusedInputError:
            raise
        except Exception as error:
            if self.policy.on_error == "raise":
                raise
            _log.warning("the guard failed (%s), the answer is unguarded", type(error).__name__)
            call.done, call.tap.observer, call.tap.block = True, None, None
            call.records = [GuardRecord.of_failure(self.detector.threshold)] * call.inputs

    def _observe(self, call: Call, layer: int, weights: torch.Tensor) -> None:
        if call.regions is None or layer not in self.detector.layers:
            return
        with self._forgiving(call):
            self._reduce(call, layer, weights)

    @staticmethod
    def _reduce(call: Call, layer: int, weights: torch.Tensor) -> None:
        """Keep a layer's row of weights and its statistics."""
        assert call.regions is not None
        started = time.perf_counter()
        call.weights[layer] = weights[..., : call.prompt]  # a static cache keeps room for more
        call.statistics[layer] = reduce_layer(call.weights[layer], call.regions, top=1)
        call.seconds += time.perf_counter() - started

    @uncompiled
    def _before_forward(self, _module: torch.nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """At the prefill of a guarded call: find the image and the text in the prompt."""
        call = _CALL.get()
        if call is not None and call.owner is self and not call.done:
            with self._forgiving(call):
                self._find_regions(call, kwargs)

    def _find_regions(self, call: Call, kwargs: dict[str, Any]) -> None:
        """Where image and text lie in the prompts of a prefill; raises ConfigError where they can't be told."""
        input_ids = kwargs.get("input_ids")
        if input_ids is None or input_ids.shape[1] != call.prompt:
            raise ConfigError("the guard must see the whole prompt in one prefill, and the model was run on something else before")
        mask = kwargs.get("attention_mask")
        if not isinstance(mask, torch.Tensor) or mask.dim() != 2:  # a static cache is given masks of four dimensions, one a kind
            mask = None if call.mask is None else call.mask.repeat_interleave(len(input_ids) // call.inputs, dim=0)
        seen = torch.ones_like(input_ids) if mask is None else mask.to(input_ids.device)
        if not bool(seen[:, -1].all()):
            raise ConfigError("the guard reads the last position of each prompt: pad on the left")
        call.regions = prompt_regions(input_ids, seen, self._image_token_id)
        call.empty_cache = copy.deepcopy(kwargs.get("past_key_values"))

    @uncompiled
    def _before_decoder(self, _module: torch.nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """At the prefill of a guarded call: keep the picture as the decoder takes it."""
        call = _CALL.get()
        if call is not None and call.owner is self and not call.done and self._judge.test is not None:
            call.embeddings = kwargs.get("inputs_embeds")

    @uncompiled
    def _after_forward(self, module: torch.nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """At the prefill of a guarded call: detect, and run flagged rows again with their tokens closed."""
        call = _CALL.get()
        if call is None or call.owner is not self or call.done or call.regions is None:
            return output
        call.done = True
        call.tap.observer = None
        try:
            with self._forgiving(call):
                self._judge.judge(call, module, kwargs, output)
        finally:
            call.forget()
        return output


def _answers(output: Any, prompt: int) -> torch.Tensor:
    """What was generated after the prompts, int (sequences, tokens)."""
    sequences: torch.Tensor = output if isinstance(output, torch.Tensor) else output.sequences
    return sequences[:, prompt:]
