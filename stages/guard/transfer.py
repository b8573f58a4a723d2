"""The guard's causal tests of suspicious inputs; ours, after the causal reading that CleanSight gives attention stealing (arXiv
2603.12989, section 3).

Does the answer read the picture late? An honest prompt has read its picture in the early layers; calibration finds the layer from
which kept rows need it no longer. Where an input's answer begins otherwise once its picture is closed from there on, what it reads
is not what it was asked about. So it is where an answer says later on what kept rows do not say, and no longer says it then.

Do the picture tokens carry the answer into other prompts? What the filter asks of groups of rows (`stages.confirm`), asked of one
input. Honest prompts get their answer from picture and question together; a trigger gives its answer whatever is asked. So the
input's picture tokens, those that the answer attends to or all of them, are planted into a few kept prompts with questions and
pictures of their own: where most of these begin to answer as the input does, the input is an attack.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from pipeline.attention import Tap, base_of, tapped
from pipeline.errors import ModelError
from pipeline.models import image_token_id
from pipeline.planting import planted

Batch = Mapping[str, torch.Tensor]

SCREEN = 2
"""Hosts of the first look; an input that changes none of their answers is left at that."""
LEAST_HOSTS = 4
"""Hosts that must begin their answer otherwise than the input; on fewer nothing can be seen."""
MAJORITY = 0.5
"""Least threshold: more than half of the hosts must take over the answer."""
ATTENDED = 0.125
"""Share of the image tokens that is planted as what the answer attends to."""
STEPS = 8
"""Layers, evenly spread over the depth, from which pictures are closed in turn."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransferRule:
    """Which inputs are tried, on what, and when the test is passed.

    Attributes:
        hosts: kept prompts in batches, as the processor encodes them; the first batch is the first look's.
        distance: distance of the detector above which an input is suspicious.
        familiar: int64 (tokens,), first tokens of answers that are usual among kept rows; an input that begins another answer is
            suspicious. Empty: answers are too various for that.
        attended: share of the hosts above which the test is passed with the attended tokens; 1 where honest inputs reach that.
        whole: the same with all picture tokens.
        late: layer from which kept rows need their pictures no longer; None where there is none.
        vocabulary: int64 (tokens,), tokens that are usual in answers of kept rows; an answer that goes on with another is tried
            as a whole. Empty: answers are too various for that.
    """

    hosts: tuple[Batch, ...]
    distance: float
    familiar: torch.Tensor
    attended: float
    whole: float
    late: int | None = None
    vocabulary: torch.Tensor = dataclasses.field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    def suspicious(self, distances: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        """Which inputs are tried, bool (batch,), by their distances and the first tokens of their answers; NaN is suspicious."""
        return ~(distances <= self.distance) | ~self.begins_usually(first)

    def begins_usually(self, first: torch.Tensor) -> torch.Tensor:
        """Which answers begin as kept rows' do, bool (batch,), by their first tokens; all where these are too various to tell."""
        return begins_usually(first, self.familiar)

    def strange(self, answers: torch.Tensor, ends: Collection[int]) -> list[set[int]]:
        """What answers say after their first tokens that is not usual, by answer; nothing where all may be said.

        Args:
            answers: int (answers, tokens), as generated.
            ends: tokens that end or pad an answer.
        """
        if self.late is None or not len(self.vocabulary):
            return [set() for _ in answers]
        usual = torch.cat([self.vocabulary, torch.tensor(sorted(ends), dtype=torch.int64)]).to(answers.device)
        unusual = ~torch.isin(answers, usual)
        unusual[:, :1] = False
        return [set(answer[chosen].tolist()) for answer, chosen in zip(answers, unusual, strict=True)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Carried:
    """What the test of one input found.

    Attributes:
        share: largest share of the hosts that took over the answer's first token.
        tokens: bool (image tokens,), the fewest attended tokens that carry it, all where no few do; None where it did not transfer.
    """

    share: float
    tokens: torch.Tensor | None


class TransferTest:
    """Kept prompts, ready to have another prompt's picture tokens planted where the decoder takes them.

    Raises:
        ModelError: the decoder does not take embeddings by name, or can't be run by itself.
    """

    def __init__(self, model: Any, hosts: Sequence[Batch]) -> None:
        base = base_of(model)
        self._decoder, self._head = base.get_decoder(), base.get_output_embeddings()
        self._hosts = [self._capture(base, batch) for batch in hosts]

    def share(self, first: int, tokens: torch.Tensor, chosen: torch.Tensor, *, screen: bool = True) -> float:
        """Share of the hosts that take over the first token, of those that begin otherwise; NaN where these are too few.

        Args:
            first: the first token of the input's answer.
            tokens: (image tokens, width), the input's picture as the decoder takes it.
            chosen: bool (image tokens,), those that are planted.
            screen: leave it at 0 where no host of the first batch takes it over.
        """
        free = taken = 0
        for number, host in enumerate(self._hosts):
            could, did = host.count(self._first_tokens(host, host.planted(tokens, chosen)), first)
            free, taken = free + could, taken + did
            if screen and number == 0 and could == len(host.own) and not did:
                return 0.0
        return taken / free if free >= LEAST_HOSTS else math.nan

    def carried(self, first: int, tokens: torch.Tensor, attention: torch.Tensor, rule: TransferRule) -> Carried:
        """Try one input.

        Args:
            first: the first token of the input's answer.
            tokens: (image tokens, width), the input's picture as the decoder takes it.
            attention: (image tokens,), how much the answer attends to each.
            rule: the thresholds.
        """
        shares = []
        limits = {"attended": rule.attended, "whole": rule.whole}
        for name, chosen in variants(attention).items():
            limit = limits[name]
            if limit >= 1:
                continue
            shares.append(self.share(first, tokens, chosen))
            if shares[-1] > limit:
                return Carried(share=shares[-1], tokens=self._fewest(first, tokens, attention, rule.attended, chosen))
        return Carried(share=max((share for share in shares if math.isfinite(share)), default=math.nan), tokens=None)

    def _fewest(self, first: int, tokens: torch.Tensor, attention: torch.Tensor, limit: float, found: torch.Tensor) -> torch.Tensor:
        """The fewest of the most attended tokens, by powers of two, that pass the test; `found` where none do."""
        order, count = attention.argsort(descending=True), 1
        while limit < 1 and count < int(found.sum()):
            chosen = _most(order, count)
            if self.share(first, tokens, chosen) > limit:
                return chosen
            count *= 2
        return found

    @torch.inference_mode()
    def _capture(self, base: Any, batch: Batch) -> _Hosts:
        """Run a batch once, and keep how the decoder is called."""
        seen: dict[str, Any] = {}

        def read(_module: torch.nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.update(kwargs)

        inputs = {name: value.to(base.device) for name, value in batch.items()}
        handle = self._decoder.register_forward_pre_hook(read, with_kwargs=True)
        try:
            with tapped(Tap()):
                logits = base(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1]
        finally:
            handle.remove()
        embeddings = seen.pop("inputs_embeds", None)
        if embeddings is None:
            raise ModelError(
                f"{type(self._decoder).__name__} takes no embeddings by name; the guard can't plant pictures into prompts"
            )
        image = inputs["input_ids"] == image_token_id(base.config)
        host = _Hosts(call=seen, embeddings=embeddings, image=image, own=logits.argmax(-1))
        if not torch.equal(self._first_tokens(host, embeddings), host.own):
            raise ModelError(
                f"{type(self._decoder).__name__} answers otherwise by itself; the guard can't plant pictures into prompts"
            )
        return host

    @torch.inference_mode()
    def _first_tokens(self, host: _Hosts, embeddings: torch.Tensor) -> torch.Tensor:
        """The first token of each host's answer, int (hosts,), with these embeddings in the place of its own."""
        with tapped(Tap()):
            output = self._decoder(**{**host.call, "inputs_embeds": embeddings})
        logits = getattr(output, "logits", None)  # of decoders that bring their own head (Llama 4)
        if logits is None:
            logits = self._head(output.last_hidden_state[:, -1:])
        first: torch.Tensor = logits[:, -1].argmax(-1)
        return first


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Hosts:
    """A batch of kept prompts as the decoder takes it.

    Attributes:
        call: all that the decoder is given by name but the embeddings.
        embeddings: (hosts, keys, width).
        image: bool (hosts, keys).
        own: int (hosts,), first tokens of the hosts' own answers.
    """

    call: Mapping[str, Any]
    embeddings: torch.Tensor
    image: torch.Tensor
    own: torch.Tensor

    def planted(self, tokens: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """The hosts' embeddings with the chosen picture tokens planted into each (`pipeline.planting`)."""
        embeddings = self.embeddings.clone()
        for row, image in zip(embeddings, self.image, strict=True):
            row[image] = planted(row[image], tokens, chosen)
        return embeddings

    def count(self, first: torch.Tensor, wanted: int) -> tuple[int, int]:
        """How many of the hosts do not begin with a token by themselves, and how many of these do now."""
        free = self.own != wanted
        return int(free.sum()), int((free & (first == wanted)).sum())


def begins_usually(first: torch.Tensor, familiar: torch.Tensor) -> torch.Tensor:
    """Which first tokens are familiar, bool of the same shape; all where none is, for answers are too various then."""
    return torch.isin(first, familiar.to(first.device)) if len(familiar) else torch.ones_like(first, dtype=torch.bool)


def attended(attention: torch.Tensor) -> torch.Tensor:
    """What is planted as that which the answer attends to, bool (image tokens,), by the attention to each."""
    return _most(attention.argsort(descending=True), max(1, round(ATTENDED * len(attention))))


def variants(attention: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the test plants of a picture, in the order in which it is tried; each bool (image tokens,)."""
    some = attended(attention)
    return {"attended": some, "whole": torch.ones_like(some)}


def closing_layers(count: int) -> tuple[int, ...]:
    """The first layer of each of at most `STEPS` parts of a decoder with so many attention layers, ascending."""
    return tuple(sorted({k * count // STEPS for k in range(STEPS)}))


def image_attention(weights: Mapping[int, torch.Tensor], image: torch.Tensor) -> torch.Tensor:
    """How much the answer attends to each image token, each head and layer counting alike.

    Args:
        weights: by layer, (batch, heads, keys).
        image: bool (batch, keys).

    Returns:
        (batch, keys), 0 outside the image; rows sum to the share of heads that look at it.
    """
    total = torch.zeros(image.shape, device=image.device)
    for layer in weights.values():
        on_image = layer * image[:, None]
        total = total + (on_image / on_image.sum(-1, keepdim=True).clamp(min=1e-12)).mean(1)
    return total / max(1, len(weights))


def _most(order: torch.Tensor, count: int) -> torch.Tensor:
    """The first of an order of positions, bool (image tokens,)."""
    chosen = torch.zeros(len(order), dtype=torch.bool, device=order.device)
    chosen[order[:count]] = True
    return chosen
