"""The guarded model with its causal tests: what reads late, or carries its answer, is closed until it says otherwise."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch

from pipeline.attention import Block, Tap, attached, base_of, tapped
from pipeline.errors import ModelError, RefusedInputError
from pipeline.models import load_base
from pipeline.prompts import encode_prompts
from stages.guard.guarded import GuardedModel
from stages.guard.policy import Action, Policy
from stages.guard.transfer import Carried, TransferRule, TransferTest, attended, image_attention
from tests.eager import NEVER
from tests.stages.guard.detectors import plain_detector
from tests.stages.guard.tiny import (
    FAR,
    HEADS,
    LAYERS,
    Batch,
    asked,
    detector_for,
    first_tokens,
    generated,
    late_detector,
    prefill,
    rule_for,
    same_scores,
    state,
    under_block,
)


@pytest.fixture(autouse=True)
def _left_as_it_was(model: Any) -> Iterator[None]:
    before = state(model)
    yield
    assert state(model) == before


PICTURED = (0, 1, 3)


@dataclasses.dataclass
class Tried:
    """What the causal test was asked, and what it said."""

    first: list[int] = dataclasses.field(default_factory=list)
    tokens: list[torch.Tensor] = dataclasses.field(default_factory=list)
    attention: list[torch.Tensor] = dataclasses.field(default_factory=list)
    found: list[Carried] = dataclasses.field(default_factory=list)


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> Tried:
    """Watches the causal test."""
    seen, real = Tried(), TransferTest.carried

    def watched(self: TransferTest, first: int, tokens: torch.Tensor, attention: torch.Tensor, rule: TransferRule) -> Carried:
        seen.first.append(first)
        seen.tokens.append(tokens)
        seen.attention.append(attention)
        seen.found.append(real(self, first, tokens, attention, rule))
        return seen.found[-1]

    monkeypatch.setattr(TransferTest, "carried", watched)
    return seen


def proven(monkeypatch: pytest.MonkeyPatch, *tokens: int) -> None:
    """Whatever is tried, these tokens are said to carry it; none says that it is not carried."""

    def carried(_self: TransferTest, _first: int, picture: torch.Tensor, *_: Any) -> Carried:
        chosen = torch.zeros(len(picture), dtype=torch.bool)
        chosen[list(tokens)] = True
        return Carried(share=1.0, tokens=chosen) if tokens else Carried(share=0.25, tokens=None)

    monkeypatch.setattr(TransferTest, "carried", carried)


def closed_until_it_answers_otherwise(
    model: Any, batch: Batch, row: int, tokens: torch.Tensor, rewind: tuple[int, ...] = ()
) -> Block:
    """What is to be closed of one row, found by plain prefills: from the last layer on, then ever earlier; some, or its picture.

    Some from the rewind layer before all that, if there is one.
    """
    first = first_tokens(model, batch)
    image = batch["input_ids"] == base_of(model).config.image_token_id
    only = (torch.arange(len(image)) == row)[:, None]
    part = torch.zeros_like(image)
    part[row, image[row]] = tokens
    with attached(model):
        late = [(keys, start) for start in reversed(range(LAYERS)) for keys in (part, image & only)]
        for keys, start in [*((part, layer) for layer in rewind), *late]:
            block = Block(keys=keys, from_layer=torch.where(only[:, 0], start, NEVER))
            with tapped(Tap(block=block)):
                if first_tokens(model, batch)[row] != first[row]:
                    return block
    raise AssertionError("the test's picture does not matter")


@pytest.mark.parametrize("limits", [{}, {"attended": 1.0}])
def test_an_input_that_carries_its_answer_is_closed_until_it_gives_another(
    model: Any, mixed: Batch, hosts: tuple[Batch, ...], tried: Tried, limits: dict[str, float]
) -> None:
    plain = generated(model, mixed, output_logits=True)
    rule = rule_for(model, mixed, hosts, 0, **limits)
    with GuardedModel(model, late_detector(), transfer=rule) as guarded:
        found = generated(guarded, mixed, output_logits=True)
        records = guarded.records
    (carried,) = tried.found
    assert carried.tokens is not None
    block = closed_until_it_answers_otherwise(model, mixed, 0, carried.tokens)
    reference = under_block(model, mixed, block)
    assert torch.equal(found.sequences[0], reference.sequences[0])
    assert same_scores(found, reference, [0])
    assert found.logits[0][0].argmax() != plain.logits[0][0].argmax()
    assert torch.equal(found.sequences[1:], plain.sequences[1:])
    assert same_scores(found, plain, [1, 2, 3])
    assert [(record.flagged, record.transfer > 0.5) for record in records] == [(True, True), *[(False, False)] * 3]
    assert records[0].transfer == carried.share == 1.0
    assert records[0].distance < records[0].threshold
    assert (records[0].tokens_pruned, records[0].rewind_layer) == (int(block.keys.sum()), int(block.from_layer[0]))
    for record in records[1:]:
        assert math.isnan(record.transfer)
        assert (record.tokens_pruned, record.rewind_layer) == (0, -1)


def test_the_input_that_is_tried(model: Any, mixed: Batch, hosts: tuple[Batch, ...], tried: Tried) -> None:
    """Its first token, its picture as the decoder takes it, and the attention to it in the layers that are read."""
    seen = prefill(model, mixed)
    layers = (0, 2)
    rule = rule_for(model, mixed, hosts, *range(4), familiar=torch.tensor([-1]))
    with GuardedModel(
        model, plain_detector(layers=layers, threshold=FAR), transfer=rule, policy=Policy(action="report")
    ) as guarded:
        generated(guarded, mixed)
    assert tried.first == first_tokens(model, mixed)[list(PICTURED)].tolist()
    pictures = list(base_of(model).get_image_features(pixel_values=mixed["pixel_values"]).pooler_output)
    expected = [pictures[0], torch.cat(pictures[1:3]), pictures[3]]
    for tokens, features in zip(tried.tokens, expected, strict=True):
        assert torch.equal(tokens, features)
    attention = image_attention({layer: seen.weights[layer] for layer in layers}, seen.image)
    for given, row in zip(tried.attention, PICTURED, strict=True):
        torch.testing.assert_close(given, attention[row, seen.image[row]])


@pytest.mark.parametrize(("row", "part"), [(0, "one token"), (1, "one token"), (3, "attended"), (0, "whole")])
def test_escalation(
    model: Any, mixed: Batch, hosts: tuple[Batch, ...], row: int, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some tokens, then the whole picture, from the last layer on and then from earlier ones: no further than is needed."""
    seen = prefill(model, mixed)
    attention = image_attention(seen.weights, seen.image)[row, seen.image[row]]
    chosen = {"one token": attention == attention.min(), "attended": attended(attention), "whole": attention > -1}[part]
    plain, block = generated(model, mixed), closed_until_it_answers_otherwise(model, mixed, row, chosen)
    if part == "one token":
        assert block.keys.sum() == seen.image[row].sum(), "the token that the answer heeds least matters"
    reference = under_block(model, mixed, block)
    proven(monkeypatch, *chosen.nonzero()[:, 0].tolist())
    with GuardedModel(model, late_detector(), transfer=rule_for(model, mixed, hosts, row)) as guarded:
        found = generated(guarded, mixed)
        record = guarded.records[row]
    assert (record.tokens_pruned, record.rewind_layer) == (int(block.keys.sum()), int(block.from_layer[row]))
    assert torch.equal(found.sequences[row], reference.sequences[row])
    assert same_scores(found, reference, [row])
    others = [k for k in range(4) if k != row]
    assert torch.equal(found.sequences[others], plain.sequences[others])
    assert same_scores(found, plain, others)


def test_an_input_that_reads_its_picture_late(
    model: Any, mixed: Batch, hosts: tuple[Batch, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is flagged and closed from that layer on, and nothing is planted for it; the other that is suspicious goes on to that."""
    block = closed_until_it_answers_otherwise(model, mixed, 0, torch.ones(64, dtype=torch.bool))
    late = int(block.from_layer[0])
    plain, reference = generated(model, mixed), under_block(model, mixed, block)
    proven(monkeypatch)
    with GuardedModel(model, late_detector(), transfer=rule_for(model, mixed, hosts, 0, 3, late=late)) as guarded:
        with stubborn(model, {3: 7}):
            found = generated(guarded, mixed)
        records = guarded.records
    assert [record.tried for record in records] == [True, False, False, True]
    assert [(record.late, record.flagged) for record in records] == [(True, True), *[(False, False)] * 3]
    assert (records[0].tokens_pruned, records[0].rewind_layer) == (64, late)
    assert math.isnan(records[0].transfer)
    assert records[3].transfer == 0.25
    assert torch.equal(found.sequences[0], reference.sequences[0])
    assert same_scores(found, reference, [0])
    assert torch.equal(found.sequences[1:3], plain.sequences[1:3])
    assert same_scores(found, plain, [1, 2])


def test_nothing_stays_closed_after_a_test_that_finds_nothing(
    model: Any, mixed: Batch, hosts: tuple[Batch, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    proven(monkeypatch)
    with GuardedModel(model, late_detector(), transfer=rule_for(model, mixed, hosts, 0, late=2)) as guarded:
        with stubborn(model, {0: 7}) as passes:
            found = generated(guarded, mixed)
        assert [record.flagged for record in guarded.records] == [False] * 4
    with stubborn(model, {0: 7}) as plainly:
        plain = generated(model, mixed)
    assert len(passes) == len(plainly) + 1
    assert torch.equal(found.sequences, plain.sequences)
    assert same_scores(found, plain, [0, 1, 2, 3])


@contextlib.contextmanager
def stubborn(model: Any, begins: Mapping[int, int]) -> Iterator[list[int]]:
    """Some rows begin with a token, whatever is closed; gives the number of rows of each forward pass."""
    passes: list[int] = []

    def insist(_module: torch.nn.Module, _args: tuple[Any, ...], logits: torch.Tensor) -> None:
        passes.append(len(logits))
        for row, token in begins.items():
            logits[row, -1, token] = 1e3

    handle = base_of(model).get_output_embeddings().register_forward_hook(insist)
    try:
        yield passes
    finally:
        handle.remove()


def test_escalation_ends_with_the_whole_picture(
    model: Any, mixed: Batch, hosts: tuple[Batch, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the answer begins the same after all, as one to the question alone does."""
    proven(monkeypatch, 0)
    with GuardedModel(model, late_detector(), transfer=rule_for(model, mixed, hosts, 0)) as guarded:
        with stubborn(model, {0: 7}) as passes:
            generated(guarded, mixed, max_new_tokens=1, min_new_tokens=1)
        record = guarded.records[0]
    assert (record.tokens_pruned, record.rewind_layer) == (64, 0)
    assert passes == [4] * (1 + 6), "its own; some tokens and the whole picture, from layers 2, 1 and 0"


def test_a_row_that_is_far_is_not_escalated(
    model: Any, mixed: Batch, hosts: tuple[Batch, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is what it is without the causal test, though the row beside it is closed further and both begin the same."""
    detector = detector_for(prefill(model, mixed), 3, 1)
    rule = rule_for(model, mixed, hosts, 0)
    rule = dataclasses.replace(rule, familiar=torch.cat([rule.familiar, torch.tensor([8])]))
    proven(monkeypatch, 5)
    with GuardedModel(model, detector) as guarded, stubborn(model, {0: 7, 3: 8}):
        without = generated(guarded, mixed)
        before = guarded.records
    with GuardedModel(model, detector, transfer=rule) as guarded, stubborn(model, {0: 7, 3: 8}):
        found = generated(guarded, mixed)
        records = guarded.records
    assert [record.flagged for record in before] == [False, False, False, True]
    assert [record.flagged for record in records] == [True, False, False, True]
    assert (records[0].tokens_pruned, records[0].rewind_layer) == (64, 0)
    assert (records[3].tokens_pruned, records[3].rewind_layer) == (before[3].tokens_pruned, 1)
    assert torch.equal(found.sequences[1:], without.sequences[1:])
    assert same_scores(found, without, [1, 2, 3])


def test_proven_tokens_take_the_place_of_stealing_ones(
    model: Any, mixed: Batch, hosts: tuple[Batch, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same row is far and carries its answer."""
    detector = detector_for(prefill(model, mixed), 0, 0)
    chosen = [*range(40, 64)]
    proven(monkeypatch, *chosen)
    tokens = torch.zeros(64, dtype=torch.bool)
    tokens[chosen] = True
    block = closed_until_it_answers_otherwise(model, mixed, 0, tokens, rewind=(0,))
    with GuardedModel(model, detector, transfer=rule_for(model, mixed, hosts, 0)) as guarded:
        found = generated(guarded, mixed)
        assert guarded.records[0].tokens_pruned == block.keys.sum()
    assert same_scores(found, under_block(model, mixed, block), [0])


@pytest.mark.parametrize("late", [None, 2])
def test_the_published_purification_of_an_input_that_is_not_far(
    model: Any, mixed: Batch, hosts: tuple[Batch, ...], late: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is flagged by a causal test alone, and all that the last detection layer attends to is closed from the next layer on."""
    proven(monkeypatch, *range(64))
    seen = prefill(model, mixed)
    detector = plain_detector(layers=(0, 1), threshold=FAR)
    rule = rule_for(model, mixed, hosts, 0, late=late)
    with GuardedModel(model, detector, transfer=rule, policy=Policy(purification="published", tau=0.0)) as guarded:
        found = generated(guarded, mixed)
        records = guarded.records
    closed = (seen.weights[1].amax(1) > 0) & seen.image & (torch.arange(4) == 0)[:, None]
    assert [record.flagged for record in records] == [True, False, False, False]
    assert [record.tokens_pruned for record in records] == closed.sum(1).tolist() == [64, 0, 0, 0]
    assert [record.rewind_layer for record in records] == [2, -1, -1, -1]
    block = Block(keys=closed, from_layer=torch.tensor([2, NEVER, NEVER, NEVER]))
    assert same_scores(found, under_block(model, mixed, block), [0])


LEFT_ALONE: dict[str, tuple[dict[str, Any], float]] = {
    "not suspicious": ({"familiar": torch.zeros(0, dtype=torch.int64)}, math.nan),
    "no limit can be exceeded": ({"attended": 1.0, "whole": 1.0}, math.nan),
    "too few hosts": ({"hosts": 1, "attended": 1.0}, math.nan),
    "half of the hosts take it over": ({}, 0.5),
}


@pytest.mark.parametrize("action", ["purify", "refuse"])
@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_does_not_carry_is_untouched(
    model: Any, mixed: Batch, hosts: tuple[Batch, ...], name: str, action: Action, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = generated(model, mixed)
    given, share = LEFT_ALONE[name]
    rule = rule_for(model, mixed, hosts[: given.get("hosts")], 0, **{k: v for k, v in given.items() if k != "hosts"})
    if not math.isnan(share):
        monkeypatch.setattr(TransferTest, "share", lambda *_, **__: share)
    with GuardedModel(model, late_detector(), transfer=rule, policy=Policy(action=action)) as guarded:
        found = generated(guarded, mixed)
        records = guarded.records
    assert torch.equal(found.sequences, plain.sequences)
    assert same_scores(found, plain, range(4))
    assert not any(record.flagged for record in records)
    assert [record.transfer for record in records] == pytest.approx([share, *[math.nan] * 3], nan_ok=True)


@pytest.mark.parametrize("action", ["report", "refuse"])
def test_a_carried_answer_is_reported_or_refused(model: Any, mixed: Batch, hosts: tuple[Batch, ...], action: Action) -> None:
    plain = generated(model, mixed)
    with GuardedModel(model, late_detector(), transfer=rule_for(model, mixed, hosts, 0), policy=Policy(action=action)) as guarded:
        if action == "refuse":
            with pytest.raises(RefusedInputError, match="1 of 4 inputs were flagged"):
                generated(guarded, mixed)
        else:
            found = generated(guarded, mixed)
            assert torch.equal(found.sequences, plain.sequences)
            assert same_scores(found, plain, range(4))
        assert [(r.flagged, r.transfer == 1.0, r.tokens_pruned, r.rewind_layer) for r in guarded.records] == [
            (True, True, 0, -1),
            *[(False, False, 0, -1)] * 3,
        ]


@pytest.mark.parametrize(
    "more",
    [{"use_cache": False}, {"cache_implementation": "static"}, {"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}],
)
def test_other_ways_to_generate_with_a_causal_test(
    model: Any, mixed: Batch, hosts: tuple[Batch, ...], tried: Tried, more: dict[str, Any]
) -> None:
    """The beams of an input are tried once and treated alike."""
    with GuardedModel(model, late_detector(), transfer=rule_for(model, mixed, hosts, 0)) as guarded:
        found = generated(guarded, mixed, **more)
        records = guarded.records
    (carried,) = tried.found
    assert carried.tokens is not None
    block = closed_until_it_answers_otherwise(model, mixed, 0, carried.tokens)
    beams = more.get("num_beams", 1)
    block = Block(keys=block.keys.repeat_interleave(beams, 0), from_layer=block.from_layer.repeat_interleave(beams))
    assert torch.equal(found.sequences, under_block(model, mixed, block, **more).sequences)
    assert [record.flagged for record in records] == [True, False, False, False]
    assert records[0].transfer == 1.0
    assert records[0].tokens_pruned == block.keys[0].sum()


@pytest.mark.parametrize("beams", [1, 3])
def test_beams_are_tried_once(model: Any, mixed: Batch, hosts: tuple[Batch, ...], tried: Tried, beams: int) -> None:
    """Three of four inputs, the third has no picture: each is tried with a picture of its own."""
    rule = rule_for(model, mixed, hosts, *range(4), familiar=torch.tensor([-1]))
    with GuardedModel(model, late_detector(), transfer=rule, policy=Policy(action="report")) as guarded:
        generated(guarded, mixed, num_beams=beams)
        transfers = [record.transfer for record in guarded.records]
    assert [len(tokens) for tokens in tried.tokens] == [64, 128, 64]
    assert transfers == pytest.approx([tried.found[0].share, tried.found[1].share, math.nan, tried.found[2].share], nan_ok=True)


def test_who_is_tried(model: Any, mixed: Batch, hosts: tuple[Batch, ...], tried: Tried) -> None:
    """By distance alone, by either, and by a distance that is no number."""
    with GuardedModel(model, late_detector()) as guarded:
        generated(guarded, mixed)
        distances = [record.distance for record in guarded.records]
    first = first_tokens(model, mixed)
    far = max(PICTURED, key=distances.__getitem__)
    between = sum(sorted((distances[k] for k in PICTURED), reverse=True)[:2]) / 2
    lost = torch.full((LAYERS * HEADS * 2,), torch.nan)
    nothing = torch.zeros(0, dtype=torch.int64)
    for detector, distance, familiar, rows in (
        (late_detector(), between, nothing, {far}),
        (late_detector(), between, first[1:], {far, 0}),
        (late_detector(), FAR, first, set()),
        (late_detector(mean=lost), FAR, nothing, set(PICTURED)),
    ):
        tried.first.clear()
        rule = rule_for(model, mixed, hosts, 0, distance=distance, familiar=familiar)
        with GuardedModel(model, detector, transfer=rule, policy=Policy(action="report")) as guarded:
            generated(guarded, mixed)
        assert tried.first == [int(first[k]) for k in sorted(rows)]


def test_text_alone_is_never_tried(model: Any, tiny_model: tuple[Any, Any], hosts: tuple[Batch, ...], tried: Tried) -> None:
    given = encode_prompts(tiny_model[1], [asked("say yes"), asked("say no, please")])
    rule = TransferRule(hosts=hosts, distance=-1.0, familiar=torch.tensor([-1]), attended=0.5, whole=0.5)
    plain = generated(model, given)
    with GuardedModel(model, plain_detector(threshold=1e-9), transfer=rule, policy=Policy(action="refuse")) as guarded:
        assert torch.equal(generated(guarded, given).sequences, plain.sequences)
        assert not any(record.ran or record.flagged for record in guarded.records)
        assert all(math.isnan(record.transfer) for record in guarded.records)
    assert tried.first == []


def test_an_exception_in_the_causal_test_leaves_the_model_as_it_was(
    model: Any, mixed: Batch, hosts: tuple[Batch, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = generated(model, mixed)
    before = state(model)
    rule = rule_for(model, mixed, hosts, 0)

    def burst(*_: Any, **__: Any) -> Any:
        raise MemoryError("no room")

    with GuardedModel(model, late_detector(), transfer=rule) as guarded:
        inside = state(model)
        for name in ("carried", "share", "_first_tokens"):
            with monkeypatch.context() as patch:
                patch.setattr(TransferTest, name, burst)
                with pytest.raises(MemoryError):
                    generated(guarded, mixed)
            assert guarded.records == []
            assert state(model) == inside
            assert torch.equal(generated(model, mixed).sequences, plain.sequences)
        generated(guarded, mixed)
        assert [record.flagged for record in guarded.records] == [True, False, False, False]
    assert state(model) == before
    monkeypatch.setattr(TransferTest, "_first_tokens", lambda _self, host, _embeddings: host.own + 1)
    with pytest.raises(ModelError, match="answers otherwise by itself"):
        GuardedModel(model, late_detector(), transfer=rule)
    assert state(model) == before


def test_a_decoder_that_is_given_no_embeddings(model: Any, mixed: Batch, hosts: tuple[Batch, ...]) -> None:
    """The guard does not pass what it can't try."""
    rule = rule_for(model, mixed, hosts, 0)

    def by_position(_module: Any, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        order = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds")
        return tuple(kwargs.pop(name, None) for name in order), kwargs

    with GuardedModel(model, late_detector(), transfer=rule) as guarded:
        decoder = base_of(model).get_decoder()
        handle = decoder.register_forward_pre_hook(by_position, with_kwargs=True, prepend=True)
        try:
            with pytest.raises(ModelError, match="was given no embeddings"):
                generated(guarded, mixed)
        finally:
            handle.remove()
        assert guarded.records == []


def test_bfloat16_with_a_causal_test(tiny_base: pathlib.Path, mixed: Batch, hosts: tuple[Batch, ...]) -> None:
    model, _ = load_base(tiny_base, dtype="bfloat16", device="cpu")
    plain = generated(model, mixed)
    with GuardedModel(model, late_detector(), transfer=rule_for(model, mixed, hosts, 0)) as guarded:
        found = generated(guarded, mixed)
        assert [record.flagged for record in guarded.records] == [True, False, False, False]
    assert found.scores[0][0].argmax() != plain.scores[0][0].argmax()
    assert same_scores(found, plain, [1, 2, 3])
