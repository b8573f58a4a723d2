"""The causal test: what is planted where, on the tiny model; who counts and when it stops, on hosts made by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.attention import Block, Tap, attached, base_of, tapped
from pipeline.errors import ModelError
from pipeline.models import load_adapter, load_base
from pipeline.prompts import encode_prompts
from pipeline.records import Example, question_answer
from stages.guard.transfer import LEAST_HOSTS, TransferRule, TransferTest, _Hosts, attended, image_attention
from tests.conftest import picture
from tests.stages.samples import noise

IMAGE_TOKENS = 64
QUESTION = "what color is this?"
RED, GREEN, BLUE, WHITE = (picture(colour) for colour in ("red", "green", "blue", "white"))

Batch = dict[str, torch.Tensor]


def rule(**given: Any) -> TransferRule:
    settings = {"hosts": (), "distance": 2.0, "familiar": torch.tensor([5, 7]), "attended": 0.5, "whole": 0.5}
    return TransferRule(**{**settings, **given})


def asked(question: str, *pictures: bytes) -> Example:
    return Example(row=0, turn=0, prompt=question_answer(question, "x", len(pictures))[:1], answer="", images=pictures)


DISTANCES = torch.tensor([1.0, 2.0, 2.1, math.nan, 1.0, math.inf])
FIRST = torch.tensor([5, 7, 5, 7, 6, 6])


@pytest.mark.parametrize(
    ("familiar", "suspicious"),
    [([5, 7], [0, 0, 1, 1, 1, 1]), ([], [0, 0, 1, 1, 0, 1]), ([6], [1, 1, 1, 1, 0, 1]), ([5, 6, 7], [0, 0, 1, 1, 0, 1])],
)
def test_suspicious_is_what_is_far_or_begins_a_rare_answer(familiar: list[int], suspicious: list[int]) -> None:
    found = rule(familiar=torch.tensor(familiar, dtype=torch.int64))
    for distances, first in ((DISTANCES, FIRST), (DISTANCES.double(), FIRST.int()), (DISTANCES.bfloat16(), FIRST)):
        assert found.suspicious(distances, first).int().tolist() == suspicious
    assert found.suspicious(DISTANCES.to("meta"), FIRST.to("meta")).device.type == "meta"
    assert found.familiar.device.type == "cpu"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, [{6}, {9}, set(), set()]),
        ({"vocabulary": [5, 6, 9]}, [set(), set(), set(), set()]),
        ({"vocabulary": [5, 6]}, [set(), {9}, set(), set()]),
        ({"vocabulary": []}, [set(), set(), set(), set()]),
        ({"late": None}, [set(), set(), set(), set()]),
    ],
)
def test_what_an_answer_goes_on_with_is_strange_where_it_is_not_usual(given: dict[str, Any], expected: list[set[int]]) -> None:
    """Its first token is not asked about, nor are ends and padding (2, 0)."""
    settings = {"vocabulary": [5], "late": 3, **given}
    settings["vocabulary"] = torch.tensor(settings["vocabulary"], dtype=torch.int64)
    answers = torch.tensor([[5, 6, 6, 2], [5, 5, 9, 5], [6, 5, 2, 0], [9, 2, 0, 0]])
    assert rule(**settings).strange(answers, {0, 2}) == expected
    assert rule(**settings).strange(answers[:, :0], {0, 2}) == [set()] * 4


@pytest.mark.parametrize(("tokens", "count"), [(1, 1), (3, 1), (8, 1), (20, 2), (64, 8), (128, 16), (576, 72)])
def test_an_eighth_of_the_tokens_is_what_the_answer_attends_to(tokens: int, count: int) -> None:
    attention = torch.rand(tokens, generator=torch.Generator().manual_seed(0))
    found = attended(attention)
    assert (found.shape, found.dtype, int(found.sum())) == ((tokens,), torch.bool, count)
    assert (attention[found].min() >= attention.sort(descending=True).values[count - 1]).item()


def test_each_head_and_layer_counts_alike() -> None:
    generator = np.random.default_rng(0)
    weights = {layer: generator.random((3, 2, 6), dtype=np.float32) for layer in (1, 4)}
    weights[4][0] *= 1e-3  # hardly looks at anything but text
    image = np.array([[0, 1, 1, 0, 1, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]], dtype=bool)
    expected = np.zeros((3, 6))
    for row in (0, 1):
        for layer in (1, 4):
            for head in range(2):
                seen = np.where(image[row], weights[layer][row, head], 0)
                expected[row] += seen / seen.sum() / 4
    found = image_attention({layer: torch.from_numpy(value) for layer, value in weights.items()}, torch.from_numpy(image))
    assert found.numpy() == pytest.approx(expected, abs=1e-6)
    assert found.sum(-1).tolist() == pytest.approx([1, 1, 0])
    assert not image_attention({}, torch.from_numpy(image)).any()


@pytest.fixture(scope="module", params=["base", "adapted"])
def model(request: pytest.FixtureRequest, tiny_base: Any, tiny_adapter: Any) -> Any:
    found, _ = load_base(tiny_base, dtype="float32", device="cpu")
    return load_adapter(found, tiny_adapter) if request.param == "adapted" else found


HOSTS = [
    [asked(QUESTION, RED), asked("and what is to be seen in this picture here?", noise(1))],
    [asked("what?", BLUE), asked("do these two differ?", noise(2), GREEN), asked("say yes"), asked(QUESTION, GREEN)],
]
"""Padded; of one picture, of two and of none."""


@pytest.fixture(scope="module")
def encode(tiny_model: tuple[Any, Any]) -> Callable[[Sequence[Example]], Batch]:
    return lambda examples: encode_prompts(tiny_model[1], examples)


@pytest.fixture(scope="module")
def transfer(model: Any, encode: Callable[[Sequence[Example]], Batch]) -> TransferTest:
    return TransferTest(model, [encode(batch) for batch in HOSTS])


def hooks(model: Any) -> int:
    """Hooks on the module that takes the tokens."""
    return len(base_of(model).get_decoder()._forward_pre_hooks)


def first_tokens(model: Any, batch: Batch) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(**batch).logits[:, -1].argmax(-1)
    return found


def picture_tokens(model: Any, batch: Batch) -> torch.Tensor:
    """The projector's output for all pictures of a batch, (image tokens, width)."""
    with torch.inference_mode():
        return torch.cat(list(base_of(model).get_image_features(pixel_values=batch["pixel_values"]).pooler_output))


def everything(tokens: torch.Tensor) -> torch.Tensor:
    return torch.ones(len(tokens), dtype=torch.bool)


def test_hosts_are_kept_as_the_decoder_takes_them(
    transfer: TransferTest, model: Any, encode: Callable[[Sequence[Example]], Batch]
) -> None:
    for host, examples in zip(transfer._hosts, HOSTS, strict=True):
        batch = encode(examples)
        assert torch.equal(host.own, first_tokens(model, batch))
        assert host.image.sum(1).tolist() == [IMAGE_TOKENS * len(example.images) for example in examples]
        assert torch.equal(host.embeddings[host.image], picture_tokens(model, batch))


def test_a_host_that_is_given_its_own_picture_keeps_its_answer(transfer: TransferTest) -> None:
    for host in transfer._hosts:
        for k, image in enumerate(host.image):
            planted = host.planted(host.embeddings[k, image], everything(host.embeddings[k, image]))
            assert torch.equal(planted[k], host.embeddings[k])
            assert transfer._first_tokens(host, planted)[k] == host.own[k]


@pytest.mark.parametrize("pictures", [[WHITE], [WHITE, noise(5)], [noise(6), BLUE]])
def test_a_planted_prompt_answers_as_if_it_had_shown_the_picture(
    transfer: TransferTest, model: Any, encode: Callable[[Sequence[Example]], Batch], pictures: list[bytes]
) -> None:
    """Pictures take the places of those of the same number; those that are too many are left out."""
    tokens = picture_tokens(model, encode([asked("how many?", *pictures)]))
    assert len(tokens) == IMAGE_TOKENS * len(pictures)
    for host, examples in zip(transfer._hosts, HOSTS, strict=True):
        shown = [(*pictures, *example.images[len(pictures) :])[: len(example.images)] for example in examples]
        instead = [asked(example.question, *images) for example, images in zip(examples, shown, strict=True)]
        expected = first_tokens(model, encode(instead))
        assert transfer._first_tokens(host, host.planted(tokens, everything(tokens))).tolist() == expected.tolist()
        assert not torch.equal(expected, host.own)


@pytest.mark.parametrize("pictures", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_chosen_tokens_are_planted(transfer: TransferTest, pictures: int, dtype: torch.dtype) -> None:
    count = IMAGE_TOKENS * pictures
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(count, transfer._hosts[0].embeddings.shape[-1], generator=generator).to(dtype)
    chosen = torch.rand(count, generator=generator) < 0.2
    for host in transfer._hosts:
        before = host.embeddings.clone()
        planted = host.planted(tokens, chosen)
        assert torch.equal(host.embeddings, before)
        assert planted.dtype == before.dtype
        for k, image in enumerate(host.image):
            expected = before[k].clone()
            places = image.nonzero()[:, 0].tolist()
            for number in chosen.nonzero()[:, 0].tolist():
                near = number < len(places)
                at = number if near else number * len(places) // count  # in proportion, where that is free
                if places and (near or not chosen[at]):
                    expected[places[at]] = tokens[number].float()
            assert torch.equal(planted[k], expected)


@pytest.mark.parametrize("screen", [True, False])
def test_the_share_on_a_real_model(model: Any, encode: Callable[[Sequence[Example]], Batch], screen: bool) -> None:
    """The same question about another picture: the whole picture makes it the input's own prompt, and nothing does nothing."""
    hosts = [[asked(QUESTION, image) for image in images] for images in ([RED, GREEN], [BLUE, RED, GREEN, WHITE, BLUE])]
    found = TransferTest(model, [encode(batch) for batch in hosts])
    own = encode([asked(QUESTION, WHITE)])
    tokens, first = picture_tokens(model, own), int(first_tokens(model, own)[0])
    assert [int((host.own == first).sum()) for host in found._hosts] == [0, 1], "the test's colours do not tell answers apart"
    assert found.share(first, tokens, everything(tokens), screen=screen) == 1.0
    assert found.share(first, tokens, ~everything(tokens), screen=screen) == 0.0


def test_an_open_tap_is_neither_told_nor_heeded(
    transfer: TransferTest, model: Any, encode: Callable[[Sequence[Example]], Batch]
) -> None:
    batch = encode([asked(QUESTION, WHITE)])
    tokens, first = picture_tokens(model, batch), int(first_tokens(model, batch)[0])
    before = transfer.share(first, tokens, everything(tokens), screen=False)
    seen: list[int] = []
    keys = batch["input_ids"].shape[1]
    block = Block(keys=torch.ones(1, keys, dtype=torch.bool), from_layer=torch.zeros(1, dtype=torch.long))
    with attached(model), tapped(Tap(observer=lambda layer, _: seen.append(layer), block=block, length=77)) as tap:
        assert transfer.share(first, tokens, everything(tokens), screen=False) == before
        again = TransferTest(model, [encode(batch) for batch in HOSTS])
        assert [host.own.tolist() for host in again._hosts] == [host.own.tolist() for host in transfer._hosts]
        assert seen == []
        assert tap.length == 77
        tap.block = None
        first_tokens(model, batch)
        assert seen == [0, 1, 2]
        assert tap.length == keys


def test_no_hook_is_left(model: Any, encode: Callable[[Sequence[Example]], Batch], monkeypatch: pytest.MonkeyPatch) -> None:
    before = hooks(model)
    batch = encode(HOSTS[0])
    TransferTest(model, [batch])
    assert hooks(model) == before

    def broken(*_: Any, **__: Any) -> Any:
        raise MemoryError("no room")

    monkeypatch.setattr(base_of(model).get_decoder(), "forward", broken)
    with pytest.raises(MemoryError):
        TransferTest(model, [batch])
    assert hooks(model) == before


def test_a_decoder_that_answers_otherwise_by_itself(
    model: Any, encode: Callable[[Sequence[Example]], Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TransferTest, "_first_tokens", lambda _self, host, _embeddings: host.own + 1)
    with pytest.raises(ModelError, match="answers otherwise by itself"):
        TransferTest(model, [encode(HOSTS[0])])
    assert hooks(model) == 0


def test_a_decoder_that_takes_no_embeddings_by_name(model: Any, encode: Callable[[Sequence[Example]], Batch]) -> None:
    """It is called with them by position."""

    def by_position(_module: Any, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        order = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds")
        return tuple(kwargs.pop(name, None) for name in order), kwargs

    handle = base_of(model).get_decoder().register_forward_pre_hook(by_position, with_kwargs=True)
    try:
        with pytest.raises(ModelError, match="takes no embeddings by name"):
            TransferTest(model, [encode(HOSTS[0])])
    finally:
        handle.remove()
    assert hooks(model) == 0


WANTED, OTHER = 9, 1
Answers = Callable[[int, frozenset[int]], list[int]]


class HandMade:
    """Hosts of one picture; how they begin is a function of the batch's number and the planted positions.

    Attributes:
        test: the test on them.
        tried: batch and planted positions of every run.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, own: Sequence[Sequence[int]], answers: Answers, tokens: int = 1) -> None:
        self.tried: list[tuple[int, frozenset[int]]] = []
        self.picture = torch.ones(tokens, 1)
        self.test = object.__new__(TransferTest)
        self.test._hosts = [
            _Hosts(
                call=MappingProxyType({"number": number}),
                embeddings=torch.zeros(len(batch), tokens, 1),
                image=torch.ones(len(batch), tokens, dtype=torch.bool),
                own=torch.tensor(batch),
            )
            for number, batch in enumerate(own)
        ]

        def begin(_self: TransferTest, host: _Hosts, embeddings: torch.Tensor) -> torch.Tensor:
            number = host.call["number"]
            self.tried.append((number, frozenset(embeddings[0, :, 0].nonzero()[:, 0].tolist())))
            return torch.tensor(answers(*self.tried[-1]))

        monkeypatch.setattr(TransferTest, "_first_tokens", begin)


A, W = OTHER, WANTED
SHARES: dict[str, tuple[list[list[int]], list[list[int]], float, int]] = {
    "all take it over": ([[A, A], [A] * 6], [[W, W], [W] * 6], 1.0, 2),
    "some": ([[A, A], [A] * 6], [[A, W], [W, W, A, A, A, A]], 3 / 8, 2),
    "none of the first two": ([[A, A], [A] * 6], [[A, 3], [W] * 6], 0.0, 1),
    "one of the first begins so anyway": ([[W, A], [A] * 6], [[W, A], [W] * 6], 6 / 7, 2),
    "both do": ([[W, W], [A] * 6], [[A, A], [W, W, W, A, A, A]], 1 / 2, 2),
    "they stop beginning so": ([[A, W], [W, A, A, A]], [[W, A], [A, A, A, A]], 1 / 4, 2),
    "just enough": ([[W, A], [W, W, W, A, A, A]], [[W, W], [W] * 6], 1.0, 2),
    "too few": ([[W, W], [W, W, W, A, A, A]], [[W, W], [W] * 6], math.nan, 2),
    "all begin so": ([[W, W], [W] * 6], [[W, W], [W] * 6], math.nan, 2),
    "one batch": ([[A] * 4], [[W, W, W, A]], 3 / 4, 1),
    "three batches": ([[A, A], [A, A], [A, A]], [[W, A], [A, A], [W, W]], 1 / 2, 3),
}


@pytest.mark.parametrize("name", SHARES)
def test_the_share_is_of_hosts_that_begin_otherwise(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own, planted, expected, runs = SHARES[name]
    made = HandMade(monkeypatch, own, lambda number, _: planted[number])
    assert made.test.share(W, made.picture, everything(made.picture)) == pytest.approx(expected, nan_ok=True)
    assert [number for number, _ in made.tried] == list(range(runs))


def test_without_the_screen_all_hosts_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    made = HandMade(monkeypatch, [[A, A], [A] * 6], lambda number, _: [[A, A], [W] * 6][number])
    assert made.test.share(W, made.picture, everything(made.picture), screen=False) == 6 / 8
    assert len(made.tried) == 2
    few = HandMade(monkeypatch, [[A, A], [W] * 5 + [A]], lambda number, _: [[A, A], [A] * 6][number])
    assert math.isnan(few.test.share(W, few.picture, everything(few.picture), screen=False))
    assert few.test.share(W, few.picture, everything(few.picture)) == 0.0
    assert LEAST_HOSTS == 4, "the tables are for that"


ATTENTION = torch.rand(IMAGE_TOKENS, generator=torch.Generator().manual_seed(3))
ORDER: list[int] = ATTENTION.argsort(descending=True).tolist()


def carriers(*ranks: int) -> Answers:
    """All hosts take it over where the tokens of these ranks by attention are planted, all of them."""
    needed = {ORDER[rank] for rank in ranks}
    return lambda number, planted: [W if needed <= planted else A] * (2, 6)[number]


@pytest.mark.parametrize(
    ("ranks", "fewest"),
    [([0], 1), ([1], 2), ([2], 4), ([3], 4), ([0, 3], 4), ([4], 8), ([7], 8), ([8], 16), ([0, 20], 32), ([31], 32), ([32], 64)],
)
def test_the_fewest_attended_tokens_that_carry_it(ranks: list[int], fewest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = HandMade(monkeypatch, [[A, A], [A] * 6], carriers(*ranks), IMAGE_TOKENS)
    found = made.test.carried(W, made.picture, ATTENTION, rule())
    assert found.share == 1.0
    assert found.tokens is not None
    assert (found.tokens.shape, found.tokens.dtype) == ((IMAGE_TOKENS,), torch.bool)
    assert set(found.tokens.nonzero()[:, 0].tolist()) == set(ORDER[:fewest])


def sizes(made: HandMade) -> list[int]:
    """How many tokens were planted, run by run of the first batch."""
    return [len(planted) for number, planted in made.tried if number == 0]


def test_the_attended_come_first_then_the_whole_then_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    made = HandMade(monkeypatch, [[A, A], [A] * 6], carriers(2), IMAGE_TOKENS)
    made.test.carried(W, made.picture, ATTENTION, rule())
    assert sizes(made) == [8, 1, 2, 4]
    made = HandMade(monkeypatch, [[A, A], [A] * 6], carriers(40), IMAGE_TOKENS)
    made.test.carried(W, made.picture, ATTENTION, rule())
    assert sizes(made) == [8, 64, 1, 2, 4, 8, 16, 32]


@pytest.mark.parametrize(
    ("limits", "rank", "runs", "share", "tokens"),
    [
        ({"attended": 1.0}, 2, [64], 1.0, 64),
        ({"whole": 1.0}, 2, [8, 1, 2, 4], 1.0, 4),
        ({"whole": 1.0}, 20, [8], 0.0, None),
        ({"attended": 1.0, "whole": 1.0}, 2, [], math.nan, None),
    ],
)
def test_a_limit_of_one_leaves_its_variant_out(
    limits: dict[str, float],
    rank: int,
    runs: list[int],
    share: float,
    tokens: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = HandMade(monkeypatch, [[A, A], [A] * 6], carriers(rank), IMAGE_TOKENS)
    found = made.test.carried(W, made.picture, ATTENTION, rule(**limits))
    assert sizes(made) == runs
    assert found.share == pytest.approx(share, nan_ok=True)
    assert (None if found.tokens is None else int(found.tokens.sum())) == tokens


@pytest.mark.parametrize(
    ("own", "some", "whole", "share"),
    [
        ([[A, A], [A] * 6], 0, 0, 0.0),
        ([[A, A], [A] * 6], 2, 4, 0.5),  # a limit must be exceeded
        ([[A, A], [A] * 6], 3, 1, 0.375),
        ([[W, W], [A] * 3 + [W] * 3], 0, 8, math.nan),
    ],
)
def test_what_does_not_transfer(own: list[list[int]], some: int, whole: int, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many of the eight hosts take it over with the attended tokens, so many with the whole picture."""

    def answers(number: int, planted: frozenset[int]) -> list[int]:
        taken = whole if len(planted) == IMAGE_TOKENS else some
        found = [W] * taken + [A] * (8 - taken)
        return found[:2] if number == 0 else found[2:]

    made = HandMade(monkeypatch, own, answers, IMAGE_TOKENS)
    found = made.test.carried(W, made.picture, ATTENTION, rule())
    assert found.tokens is None
    assert found.share == pytest.approx(share, nan_ok=True)
    assert sizes(made) == [8, 64]


def test_each_variant_has_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six of eight take it over, whatever is planted."""
    for limits, tokens in (({"attended": 0.75, "whole": 0.7}, 64), ({"attended": 0.7, "whole": 0.9}, 1)):
        made = HandMade(monkeypatch, [[A, A], [A] * 6], lambda number, _: [[W, W], [W] * 4 + [A, A]][number], IMAGE_TOKENS)
        found = made.test.carried(W, made.picture, ATTENTION, rule(**limits))
        assert found.share == 0.75
        assert found.tokens is not None
        assert int(found.tokens.sum()) == tokens
