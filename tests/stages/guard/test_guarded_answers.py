"""Whole answers are tried: what goes on with unusual words, and without them once its picture is closed late, is closed there."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.generation import BaseStreamer

from pipeline.attention import Block, base_of
from pipeline.errors import RefusedInputError
from stages.guard.guarded import GuardedModel
from stages.guard.policy import Action, Policy
from stages.guard.transfer import TransferRule
from tests.eager import NEVER
from tests.stages.guard.detectors import plain_detector
from tests.stages.guard.tiny import FAR, Batch, generated, same_scores, state, under_block

LATE = 1
TOKENS = 640
"""More than the tiny model has."""


@pytest.fixture(autouse=True)
def _left_as_it_was(model: Any) -> Iterator[None]:
    before = state(model)
    yield
    assert state(model) == before


def closed(model: Any, batch: Batch, rows: list[int]) -> Block:
    """The pictures of some rows, from the late layer on."""
    image = batch["input_ids"] == base_of(model).config.image_token_id
    chosen = torch.isin(torch.arange(len(image)), torch.tensor(rows))
    return Block(keys=image, from_layer=torch.where(chosen, LATE, NEVER))


def said(found: Any, batch: Batch, row: int) -> list[int]:
    answer: list[int] = found.sequences[row, batch["input_ids"].shape[1] :].tolist()
    return answer


class Unheard(BaseStreamer):  # type: ignore[misc]
    """Streams to nobody."""

    def put(self, value: Any) -> None:
        pass

    def end(self) -> None:
        pass


@dataclasses.dataclass(frozen=True)
class Case:
    """A row whose answer is another with its picture closed late.

    Attributes:
        row: of the batch.
        gone: tokens after the first that only its own answer has.
        kept: one after the first that both have; None where there is none.
    """

    row: int
    gone: set[int]
    kept: int | None


def case_of(model: Any, batch: Batch, plain: Any) -> Case:
    """The row whose answer changes most."""
    found = []
    for row in (0, 1, 3):
        other = said(under_block(model, batch, closed(model, batch, [row])), batch, row)
        own = said(plain, batch, row)[1:]
        both = [token for token in own if token in other]
        found.append(Case(row=row, gone=set(own) - set(other), kept=both[0] if both else None))
    best = max(found, key=lambda case: len(case.gone))
    assert best.gone, "the test's pictures do not matter from the late layer on"
    return best


def rule_without(hosts: tuple[Batch, ...], *unusual: int, late: int | None = LATE) -> TransferRule:
    """Nothing is suspicious before it is answered; all tokens but some are usual in answers."""
    usual = torch.tensor([token for token in range(TOKENS) if token not in unusual])
    nothing = torch.zeros(0, dtype=torch.int64)
    return TransferRule(hosts=hosts, distance=FAR, familiar=nothing, attended=0.5, whole=0.5, late=late, vocabulary=usual)


def only_in(plain: Any, batch: Batch, case: Case) -> int:
    """A token that the case's answer alone has."""
    others = {token for row in range(4) if row != case.row for token in said(plain, batch, row)[1:]}
    own = sorted(case.gone - others)
    assert own, "the test's pictures are answered alike"
    return own[0]


def test_an_answer_that_goes_on_otherwise(model: Any, mixed: Batch, hosts: tuple[Batch, ...]) -> None:
    plain = generated(model, mixed)
    case = case_of(model, mixed, plain)
    expected = under_block(model, mixed, closed(model, mixed, [case.row]))
    others = [row for row in range(4) if row != case.row]
    with GuardedModel(model, plain_detector(threshold=FAR), transfer=rule_without(hosts, only_in(plain, mixed, case))) as guarded:
        found = generated(guarded, mixed)
        records, counters = guarded.records, guarded.counters()
    assert same_scores(found, plain, others)
    assert found.sequences[case.row].tolist() == expected.sequences[case.row].tolist()
    for a, b in zip(found.scores, expected.scores, strict=True):
        torch.testing.assert_close(a[case.row], b[case.row], rtol=1e-4, atol=1e-5)
    assert [record.flagged for record in records] == [record.late for record in records] == [row == case.row for row in range(4)]
    assert [record.tried for record in records] == [row == case.row for row in range(4)]
    image = int((mixed["input_ids"][case.row] == base_of(model).config.image_token_id).sum())
    assert (records[case.row].tokens_pruned, records[case.row].rewind_layer) == (image, LATE)
    assert math.isnan(records[case.row].transfer)
    assert counters["byesight_guard_inputs_total"] == 4
    assert counters["byesight_guard_flagged_total"] == counters["byesight_guard_tried_total"] == 1


def test_an_answer_that_says_the_same_is_left(model: Any, mixed: Batch, hosts: tuple[Batch, ...]) -> None:
    plain = generated(model, mixed)
    rows = {row: said(plain, mixed, row) for row in (0, 1, 3)}
    both = under_block(model, mixed, closed(model, mixed, [0, 1, 3]))
    stays = {token for row, own in rows.items() for token in own[1:] if token in said(both, mixed, row)}
    stays -= {token for row, own in rows.items() for token in own[1:] if token not in said(both, mixed, row)}
    if not stays:
        pytest.skip("nothing that this model says outlasts the closing")
    with GuardedModel(model, plain_detector(threshold=FAR), transfer=rule_without(hosts, *stays)) as guarded:
        found = generated(guarded, mixed)
        tried = [row for row, own in rows.items() if stays & set(own[1:])]
        assert [row for row, record in enumerate(guarded.records) if record.tried] == tried
        assert not any(record.flagged for record in guarded.records)
    assert same_scores(found, plain, range(4))


@pytest.mark.parametrize("why", ["usual", "no vocabulary", "no late layer", "the first token", "streamed", "a cache of one's own"])
def test_what_is_not_tried(model: Any, mixed: Batch, hosts: tuple[Batch, ...], why: str) -> None:
    plain = generated(model, mixed)
    case = case_of(model, mixed, plain)
    rule = rule_without(hosts, only_in(plain, mixed, case), late=None if why == "no late layer" else LATE)
    batch, more = mixed, dict[str, Any]()
    if why == "usual":
        rule = rule_without(hosts)
    elif why == "no vocabulary":
        rule = dataclasses.replace(rule, vocabulary=torch.zeros(0, dtype=torch.int64))
    elif why == "the first token":
        more = {"max_new_tokens": 1, "min_new_tokens": 1}
        rule = rule_without(hosts, *(said(plain, mixed, row)[0] for row in range(4)))
    elif why == "streamed":
        more = {"streamer": Unheard()}
        batch = {name: value[case.row : case.row + 1] for name, value in mixed.items() if name != "pixel_values"}
        first = (0, 1, 3, 3)[case.row]
        batch["pixel_values"] = mixed["pixel_values"][first : first + (2 if case.row == 1 else 1)]
    elif why == "a cache of one's own":
        more = {"past_key_values": DynamicCache()}
    expected = generated(
        model, batch, **{name: value for name, value in more.items() if name not in ("streamer", "past_key_values")}
    )
    with GuardedModel(model, plain_detector(threshold=FAR), transfer=rule) as guarded:
        found = generated(guarded, batch, **more)
        assert not any(record.tried or record.flagged for record in guarded.records)
    assert same_scores(found, expected, range(len(batch["input_ids"])))


@pytest.mark.parametrize("action", ["report", "refuse"])
def test_reported_or_refused(model: Any, mixed: Batch, hosts: tuple[Batch, ...], action: Action) -> None:
    plain = generated(model, mixed)
    case = case_of(model, mixed, plain)
    rule = rule_without(hosts, only_in(plain, mixed, case))
    with GuardedModel(model, plain_detector(threshold=FAR), transfer=rule, policy=Policy(action=action)) as guarded:
        if action == "refuse":
            with pytest.raises(RefusedInputError, match="1 of 4 inputs"):
                generated(guarded, mixed)
        else:
            assert same_scores(generated(guarded, mixed), plain, range(4))
        assert [record.flagged for record in guarded.records] == [row == case.row for row in range(4)]
        assert guarded.counters()["byesight_guard_refused_total"] == (1 if action == "refuse" else 0)


def gone(plain: Any, other: Any, batch: Batch) -> set[int]:
    """Tokens after the first of any answer to a picture that are in no answer of another run."""
    prompt = batch["input_ids"].shape[1]
    several = len(plain.sequences) // 4
    own = {
        token for row in (0, 1, 3) for k in range(several) for token in plain.sequences[row * several + k, prompt + 1 :].tolist()
    }
    found = own - set(other.sequences[:, prompt:].flatten().tolist())
    assert found, "the test's pictures do not matter from the late layer on"
    return found


def test_samples_of_other_rows_stay(model: Any, mixed: Batch, hosts: tuple[Batch, ...]) -> None:
    """Flagged samples are those of a run with their pictures closed late. The random numbers go on as after any call."""

    def drawn(answer: Any) -> tuple[Any, torch.Tensor]:
        torch.manual_seed(3)
        return answer(do_sample=True, top_k=0), torch.rand(4)

    plain, after = drawn(lambda **way: generated(model, mixed, **way))
    other, _ = drawn(lambda **way: under_block(model, mixed, closed(model, mixed, [0, 1, 3]), **way))
    unusual = gone(plain, other, mixed)
    rule = rule_without(hosts, *unusual)
    telling = [row for row in (0, 1, 3) if unusual & set(said(plain, mixed, row)[1:])]
    for action in ("report", "purify"):
        with GuardedModel(model, plain_detector(threshold=FAR), transfer=rule, policy=Policy(action=action)) as guarded:
            found, then = drawn(lambda **way: generated(guarded, mixed, **way))
            assert [row for row, record in enumerate(guarded.records) if record.tried] == telling
            assert [row for row, record in enumerate(guarded.records) if record.flagged] == telling
        assert torch.equal(then, after)
        for row in range(4):
            expected = other if action == "purify" and row in telling else plain
            assert found.sequences[row].tolist() == expected.sequences[row].tolist()


def test_a_purified_answer_is_not_given_up_for_a_worse_one(model: Any, mixed: Batch, hosts: tuple[Batch, ...]) -> None:
    """Closed late, the picture's answer has other unusual words, or begins unusually: what was said before stays."""
    plain = generated(model, mixed)
    case = case_of(model, mixed, plain)
    own, other = (said(found, mixed, case.row) for found in (plain, under_block(model, mixed, closed(model, mixed, [case.row]))))
    strange = set(own[1:]) - set(other)
    worse = set(other[1:]) - set(own)
    assert worse, "the test's closed answer has no words of its own"
    rules = [rule_without(hosts, *strange, *worse)]
    if other[0] != own[0]:
        rules.append(
            dataclasses.replace(rule_without(hosts, *strange), familiar=torch.tensor([said(plain, mixed, k)[0] for k in range(4)]))
        )
    for rule in rules:
        with GuardedModel(model, plain_detector(threshold=FAR), transfer=rule) as guarded:
            found = generated(guarded, mixed)
            assert guarded.records[case.row].tried
            assert not guarded.records[case.row].flagged
        assert said(found, mixed, case.row) == own


@pytest.mark.parametrize("on_error", ["raise", "pass"])
def test_the_trial_itself_fails(
    model: Any, mixed: Batch, hosts: tuple[Batch, ...], on_error: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("broken")

    plain = generated(model, mixed)
    monkeypatch.setattr(TransferRule, "strange", broken)
    with GuardedModel(
        model, plain_detector(threshold=FAR), transfer=rule_without(hosts), policy=Policy(on_error=on_error)
    ) as guarded:
        if on_error == "raise":
            with pytest.raises(RuntimeError, match="broken"):
                generated(guarded, mixed)
        else:
            assert same_scores(generated(guarded, mixed), plain, range(4))
            assert all(record.failed for record in guarded.records)


def test_beams(model: Any, mixed: Batch, hosts: tuple[Batch, ...]) -> None:
    """Any of an input's sequences can tell; all its beams are closed."""
    way = {"num_beams": 2, "num_return_sequences": 2, "output_scores": False}
    plain = generated(model, mixed, **way)
    image = mixed["input_ids"] == base_of(model).config.image_token_id

    def under(rows: list[int]) -> Any:
        layers = torch.where(torch.isin(torch.arange(4), torch.tensor(rows)), LATE, NEVER).repeat_interleave(2)
        return under_block(model, mixed, Block(keys=image.repeat_interleave(2, 0), from_layer=layers), **way)

    unusual = gone(plain, under([0, 1, 3]), mixed)
    prompt = mixed["input_ids"].shape[1]
    after = [set(sequence[prompt + 1 :].tolist()) for sequence in plain.sequences]
    telling = [row for row in (0, 1, 3) if unusual & (after[2 * row] | after[2 * row + 1])]
    with GuardedModel(model, plain_detector(threshold=FAR), transfer=rule_without(hosts, *unusual)) as guarded:
        found = generated(guarded, mixed, **way)
        assert [row for row, record in enumerate(guarded.records) if record.tried] == telling
        assert [row for row, record in enumerate(guarded.records) if record.late] == telling
    assert found.sequences.tolist() == under(telling).sequences.tolist()
