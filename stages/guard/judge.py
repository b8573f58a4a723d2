"""Which inputs of a prefill are flagged, and what is closed in them."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import torch

from pipeline.attention import Block, base_of
from pipeline.errors import ModelError, RefusedInputError
from stages.guard.call import Call
from stages.guard.closing import NEVER, Closing, copy_rows, taken_out
from stages.guard.detector import Detector, feature_vectors
from stages.guard.policy import Policy
from stages.guard.purify import published_tokens, rewind_layers, stealing_heads, stealing_tokens
from stages.guard.records import GuardRecord
from stages.guard.transfer import Carried, TransferRule, TransferTest, closing_layers, image_attention


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judge:
    """Judges the inputs of a prefill, and purifies what it flags, in place.

    Attributes:
        detector: tells whose attention is far from usual.
        rule, test: the causal tests of suspicious inputs, if there are any.
        policy: what happens to flagged inputs.
        layers: attention layers of the model.
    """

    detector: Detector
    rule: TransferRule | None
    test: TransferTest | None
    policy: Policy
    layers: int

    def judge(self, call: Call, module: torch.nn.Module, kwargs: dict[str, Any], output: Any) -> None:
        """Detect, purify in place, and write the records; raises RefusedInputError where that is the action."""
        assert call.regions is not None
        started = time.perf_counter()
        image = call.regions.image
        ran = image.any(-1)
        distances = torch.full(ran.shape, torch.nan, device=image.device)
        transfers = distances.clone()
        flagged, suspicious, late = (torch.zeros_like(ran) for _ in range(3))
        closing = Closing.nothing(image)
        if bool(ran.any()):
            if unseen := [layer for layer in self.detector.layers if layer not in call.statistics]:
                raise ModelError(f"attention layers {unseen} did not run in the prefill; the guard can't judge it")
            vectors = feature_vectors(call.statistics, image.sum(-1), self.detector.layers, self.detector.features)
            distances = self.detector.distances(vectors)
            far = ran & ~(distances <= self.detector.threshold)
            first = output.logits[:, -1].argmax(-1)
            suspicious = torch.zeros_like(ran) if self.rule is None else ran & self.rule.suspicious(distances, first)
            late = call.says_late.repeat_interleave(call.beams)
            late = late | self._reads_late(call, module, kwargs, suspicious & ~far & ~late, first)
            carried = self._carried(call, suspicious & ~late, first)
            flagged = far | late
            for k, found in carried.items():
                transfers[k : k + call.beams] = found.share
                flagged[k : k + call.beams] |= found.tokens is not None
            if self.policy.action == "purify" and bool(flagged.any()):
                if self.policy.purification == "published":
                    closing = self._published_closing(call, flagged)
                else:
                    closing = self._closing(call, vectors, far, late, carried)
                self._run_again(call, module, kwargs, output, closing, first)
        milliseconds = 1000 * (call.seconds + time.perf_counter() - started)
        call.records = [
            GuardRecord(
                ran=bool(ran[k]),
                flagged=bool(flagged[k]),
                distance=float(distances[k]),
                threshold=self.detector.threshold,
                tried=bool(suspicious[k]),
                late=bool(late[k]),
                transfer=float(transfers[k]),
                tokens_pruned=int(closing.tokens[k].sum()),
                rewind_layer=int(closing.layers[k]),
                milliseconds=milliseconds,
            )
            for k in range(0, len(image), call.beams)  # beams of one input are alike
        ]
        self.refuse(call)

    def refuse(self, call: Call) -> None:
        """Raise RefusedInputError where that is the action and an input was flagged."""
        count = sum(record.flagged for record in call.records)
        if self.policy.action == "refuse" and count:
            raise RefusedInputError(f"{count} of {call.inputs} inputs were flagged by the guard and refused")

    def _reads_late(
        self, call: Call, module: torch.nn.Module, kwargs: dict[str, Any], suspicious: torch.Tensor, first: torch.Tensor
    ) -> torch.Tensor:
        """Which suspicious inputs begin otherwise with their pictures closed in late layers, bool (batch,); one more prefill."""
        if self.rule is None or self.rule.late is None or call.regions is None or not bool(suspicious.any()):
            return torch.zeros_like(suspicious)
        closed = Block(keys=call.regions.image, from_layer=torch.where(suspicious, self.rule.late, NEVER))
        try:
            again = self._prefill(call, module, kwargs, closed)
        finally:
            call.tap.block = None
        changed: torch.Tensor = suspicious & (again.logits[:, -1].argmax(-1) != first)
        return changed

    def _carried(self, call: Call, suspicious: torch.Tensor, first: torch.Tensor) -> dict[int, Carried]:
        """What planting says of suspicious inputs, by the first row of each (its beams are alike)."""
        if self.test is None or self.rule is None or call.regions is None or not bool(suspicious.any()):
            return {}
        if call.embeddings is None:
            raise ModelError("the decoder was given no embeddings; the guard can't try suspicious inputs")
        attention = image_attention(call.weights, call.regions.image)
        found = {}
        for k in suspicious.nonzero()[:, 0].tolist():
            if k % call.beams == 0:
                image = call.regions.image[k]
                found[k] = self.test.carried(int(first[k]), call.embeddings[k, image], attention[k, image], self.rule)
        return found

    def _published_closing(self, call: Call, flagged: torch.Tensor) -> Closing:
        """What CleanSight closes in flagged rows."""
        assert call.regions is not None
        image, last = call.regions.image, self.detector.layers[-1]
        tokens = published_tokens(call.weights[last], image, self.policy.tau) & flagged[:, None]
        return dataclasses.replace(Closing.nothing(image), tokens=tokens, layers=torch.where(tokens.any(-1), last + 1, -1))

    def _closing(
        self, call: Call, vectors: torch.Tensor, far: torch.Tensor, late: torch.Tensor, carried: Mapping[int, Carried]
    ) -> Closing:
        """What is closed in flagged rows, and from where on; where the attention is far from usual, its first such layer is."""
        assert call.regions is not None
        image = call.regions.image
        deviations = self.detector.deviations(vectors)
        tokens = stealing_tokens(call.weights, image, stealing_heads(self.detector, deviations)) & far[:, None]
        proven = torch.zeros_like(far)
        for k, found in carried.items():
            if found.tokens is not None:
                chosen = torch.zeros_like(image[k])
                chosen[image[k]] = found.tokens
                rows = slice(k, k + call.beams)
                tokens[rows], proven[rows] = chosen, True
        layers = torch.where(tokens.any(-1), rewind_layers(self.detector, deviations), -1)
        blind = far & ~tokens.any(-1)  # no head concentrates, or the statistics are not numbers
        tokens, layers = torch.where(blind[:, None], image, tokens), torch.where(blind, 0, layers)
        begun, tried = proven & ~far, closing_layers(self.layers)
        layers = torch.where(begun, tried[-1], layers)
        if self.rule is not None and self.rule.late is not None:
            tokens, layers = torch.where(late[:, None], image, tokens), torch.where(late, self.rule.late, layers)
        return Closing(
            tokens=tokens,
            layers=layers,
            proven=proven,
            begun=begun,
            image=image,
            fewest=tokens,
            tried=tried,
        )

    @staticmethod
    def _prefill(call: Call, module: torch.nn.Module, kwargs: dict[str, Any], block: Block) -> Any:
        """The output of the prefill made once more into a cache of its own, with tokens closed; they stay closed."""
        call.tap.block = block
        return module.forward(**{**kwargs, "past_key_values": copy.deepcopy(call.empty_cache)})

    def _run_again(
        self, call: Call, module: torch.nn.Module, kwargs: dict[str, Any], output: Any, closing: Closing, first: torch.Tensor
    ) -> None:
        """Close tokens, and replace logits, hidden states and cache of their prompts by those of another prefill, in place.

        An input whose picture is proven to carry its answer is closed on until its answer begins otherwise (`Closing.widen`).
        """
        purified = rows = closing.tokens.any(-1)
        again = None
        while bool(rows.any()):
            again = None  # its cache goes before the next is made
            again = self._prefill(call, module, kwargs, closing.block)
            rows = closing.widen(rows & (again.logits[:, -1].argmax(-1) == first))
        if again is None:
            return
        if output.past_key_values is not None:
            for old, new in zip(output.past_key_values.layers, again.past_key_values.layers, strict=True):
                copy_rows(vars(old), vars(new), purified)
            if self.policy.pruning == "remove":
                call.tap.kept = taken_out(base_of(module), output.past_key_values, call.tap.block)
        for old, new in zip(output.get("hidden_states") or (), again.get("hidden_states") or (), strict=True):
            old[purified] = new[purified]
        output.logits[purified] = again.logits[purified]
