"""The guarded model: unflagged inputs are untouched to the bit, flagged ones are those of a run that never saw their tokens."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import math
import pathlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlavaForConditionalGeneration

from pipeline.attention import NAME, Block, LayerStatistics, Tap, attached, base_of, prompt_regions, reduce_layer, tapped
from pipeline.errors import ConfigError, ModelError
from pipeline.models import load_adapter, load_base
from pipeline.prompts import encode_prompts
from pipeline.records import Example, question_answer
from stages.guard.closing import Closing
from stages.guard.detector import FEATURES, Detector, feature_vectors
from stages.guard.guarded import GuardedModel, RefusedInputError
from stages.guard.policy import Action, Policy
from stages.guard.purify import rewind_layers, stealing_heads, stealing_tokens
from stages.guard.records import GuardRecord
from stages.guard.transfer import Carried, TransferRule, TransferTest, attended, image_attention
from tests.conftest import picture
from tests.stages.guard.detectors import plain_detector
from tests.stages.samples import noise

LAYERS, HEADS = 3, 4
FAR = 1e9
"""A threshold that nothing exceeds."""

Batch = dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=["base", "adapted", "grouped queries"])
def model(request: pytest.FixtureRequest, tiny_base: pathlib.Path) -> Any:
    if request.param == "grouped queries":
        config = AutoConfig.from_pretrained(tiny_base)
        config.text_config.num_key_value_heads = 2
        torch.manual_seed(5)
        return LlavaForConditionalGeneration(config).eval()
    found, _ = load_base(tiny_base, dtype="float32", device="cpu")
    return load_adapter(found, request.getfixturevalue("tiny_adapter")) if request.param == "adapted" else found


def asked(question: str, *seeds: int) -> Example:
    return Example(row=0, turn=0, prompt=question_answer(question, "x", len(seeds))[:1], answer="", images=tuple(map(noise, seeds)))


@pytest.fixture(scope="module")
def batch(tiny_model: tuple[Any, Any]) -> Batch:
    """Four prompts, padded on the left: one picture, two, none, and one under a longer question."""
    examples = [
        asked("what?", 1),
        asked("what are these two?", 2, 3),
        asked("say yes"),
        asked("what might be in this picture here?", 4),
    ]
    return encode_prompts(tiny_model[1], examples)


@pytest.fixture(scope="module")
def even(tiny_model: tuple[Any, Any]) -> Batch:
    """Three prompts of one length: SDPA gets no mask."""
    return encode_prompts(tiny_model[1], [asked("what?", seed) for seed in (1, 2, 3)])


def generated(model: Any, batch: Batch, **more: Any) -> Any:
    settings = {
        "max_new_tokens": 5,
        "min_new_tokens": 5,
        "do_sample": False,
        "output_scores": True,
        "return_dict_in_generate": True,
    }
    return model.generate(**batch, **{**settings, **more})


@dataclasses.dataclass(frozen=True)
class Prefill:
    """What an unguarded prefill shows: vectors (batch, dimensions), rows of weights by layer, image tokens (batch, keys)."""

    vectors: torch.Tensor
    weights: dict[int, torch.Tensor]
    image: torch.Tensor


def prefill(model: Any, batch: Batch) -> Prefill:
    regions = prompt_regions(batch["input_ids"], batch["attention_mask"], base_of(model).config.image_token_id)
    weights: dict[int, torch.Tensor] = {}
    statistics: dict[int, LayerStatistics] = {}

    def observe(layer: int, row: torch.Tensor) -> None:
        weights[layer], statistics[layer] = row, reduce_layer(row, regions, top=1)

    with attached(model), torch.inference_mode(), tapped(Tap(observer=observe)):
        model(**batch)
    vectors = feature_vectors(statistics, regions.image.sum(-1), range(LAYERS), FEATURES)
    return Prefill(vectors=vectors, weights=weights, image=regions.image)


def detector_for(seen: Prefill, row: int, rewind: int) -> Detector:
    """Flags one row alone, and rewinds it to a layer: the reference is another row's vector."""
    others = [k for k in range(len(seen.vectors)) if k != row and bool(seen.image[k].any())]
    mean = seen.vectors[others].mean(dim=0)
    cells = (seen.vectors - mean).reshape(len(seen.vectors), LAYERS, len(FEATURES), HEADS)
    limits = torch.where(torch.arange(LAYERS) >= rewind, cells[row].abs().amax(dim=(1, 2)) / 2, FAR)
    concentrated = cells[row, :, FEATURES.index("deficit")]
    assert concentrated.max() > 0
    detector = dataclasses.replace(plain_detector(), mean=mean, layer_thresholds=limits)
    scale = torch.ones_like(mean)
    distances = detector.distances(seen.vectors)
    if distances[row] <= distances[others].max():  # weigh the dimension in which it differs most
        scale[(seen.vectors[row] - mean).abs().argmax()] = 100
        detector = dataclasses.replace(detector, whitening=torch.diag(scale))
        distances = detector.distances(seen.vectors)
    assert distances[row] > distances[others].max(), "the test's own picture does not stand out"
    return dataclasses.replace(detector, threshold=float((distances[row] + distances[others].max()) / 2))


def chosen_tokens(seen: Prefill, detector: Detector) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (batch, keys) and layers (batch,) that the purification's functions choose."""
    deviations = detector.deviations(seen.vectors)
    return stealing_tokens(seen.weights, seen.image, stealing_heads(detector, deviations)), rewind_layers(detector, deviations)


def state(model: Any) -> tuple[str, int, int, int]:
    """The attention that the decoder's layers look up, and the hooks on the model that generates and on its decoder."""
    base = base_of(model)
    decoder = base.get_decoder()
    (attention,) = {layer.self_attn.config._attn_implementation for layer in decoder.layers}
    return attention, len(base._forward_pre_hooks), len(base._forward_hooks), len(decoder._forward_pre_hooks)


@pytest.fixture(autouse=True)
def _left_as_it_was(model: Any) -> Iterator[None]:
    before = state(model)
    yield
    assert state(model) == before


def same_scores(a: Any, b: Any, rows: Sequence[int]) -> bool:
    return all(torch.equal(x[list(rows)], y[list(rows)]) for x, y in zip(a.scores, b.scores, strict=True))


@pytest.mark.parametrize("name", ["batch", "even"])
@pytest.mark.parametrize("action", ["purify", "refuse", "report"])
def test_unflagged_inputs_are_untouched(model: Any, name: str, action: Action, request: pytest.FixtureRequest) -> None:
    given = request.getfixturevalue(name)
    plain = generated(model, given)
    with GuardedModel(model, plain_detector(threshold=FAR), policy=Policy(action=action)) as guarded:
        found = generated(guarded, given)
    assert torch.equal(found.sequences, plain.sequences)
    assert same_scores(found, plain, range(len(given["input_ids"])))
    pictured = (given["input_ids"] == base_of(model).config.image_token_id).any(dim=1).tolist()
    distances = plain_detector().distances(prefill(model, given).vectors)
    for record, ran, distance in zip(guarded.records, pictured, distances, strict=True):
        assert (record.ran, record.flagged, record.tokens_pruned, record.rewind_layer) == (ran, False, 0, -1)
        assert record.threshold == FAR
        assert record.milliseconds > 0
        assert record.distance == pytest.approx(float(distance), nan_ok=True)
        assert math.isnan(record.distance) != ran


@pytest.mark.parametrize("rewind", [0, 1, 2])
@pytest.mark.parametrize("row", [0, 1, 3])
def test_a_flagged_row_is_that_of_a_run_without_its_tokens(model: Any, batch: Batch, row: int, rewind: int) -> None:
    plain, seen = generated(model, batch), prefill(model, batch)
    detector = detector_for(seen, row, rewind)
    tokens, layers = chosen_tokens(seen, detector)
    assert layers[row] == rewind
    assert 0 < tokens[row].sum() < seen.image[row].sum()
    only = tokens & (torch.arange(len(tokens)) == row)[:, None]
    block = Block(keys=only, from_layer=torch.where(only.any(1), rewind, torch.iinfo(torch.int64).max))
    with attached(model), tapped(Tap(block=block)), torch.inference_mode():
        reference = generated(model, batch)
    with GuardedModel(model, detector) as guarded:
        found = generated(guarded, batch)
    assert torch.equal(found.sequences[row], reference.sequences[row])
    assert same_scores(found, reference, [row])
    assert not torch.allclose(found.scores[0][row], plain.scores[0][row], atol=1e-4), "nothing was closed"
    others = [k for k in range(len(tokens)) if k != row]
    assert torch.equal(found.sequences[others], plain.sequences[others])
    assert same_scores(found, plain, others)
    record = guarded.records[row]
    assert (record.flagged, record.tokens_pruned, record.rewind_layer) == (True, int(only.sum()), rewind)
    assert record.distance > record.threshold
    assert [r.flagged for r in guarded.records] == [k == row for k in range(len(tokens))]


def test_without_padding(model: Any, even: Batch) -> None:
    """The other rows' masks become explicit while decoding; their numbers may differ in the last bits, as SDPA's own do."""
    plain, seen = generated(model, even), prefill(model, even)
    detector = detector_for(seen, 1, 1)
    tokens, _ = chosen_tokens(seen, detector)
    tokens[[0, 2]] = False
    block = Block(keys=tokens, from_layer=torch.tensor([9, 1, 9]))
    with attached(model), tapped(Tap(block=block)), torch.inference_mode():
        reference = generated(model, even)
    with GuardedModel(model, detector) as guarded:
        found = generated(guarded, even)
    assert [record.flagged for record in guarded.records] == [False, True, False]
    assert torch.equal(found.sequences[1], reference.sequences[1])
    assert same_scores(found, reference, [1])
    assert torch.equal(found.sequences[[0, 2]], plain.sequences[[0, 2]])
    assert torch.equal(found.scores[0][[0, 2]], plain.scores[0][[0, 2]])
    for a, b in zip(found.scores, plain.scores, strict=True):
        torch.testing.assert_close(a[[0, 2]], b[[0, 2]], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "more",
    [{"use_cache": False}, {"cache_implementation": "static"}, {"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}],
)
def test_other_ways_to_generate(model: Any, batch: Batch, more: dict[str, Any]) -> None:
    seen = prefill(model, batch)
    detector = detector_for(seen, 3, 1)
    tokens, _ = chosen_tokens(seen, detector)
    beams = more.get("num_beams", 1)
    only = tokens & (torch.arange(len(tokens)) == 3)[:, None]
    layers = torch.where(only.any(1), 1, torch.iinfo(torch.int64).max)
    block = Block(keys=only.repeat_interleave(beams, 0), from_layer=layers.repeat_interleave(beams))
    with attached(model), tapped(Tap(block=block)), torch.inference_mode():
        reference = generated(model, batch, **more)
    with GuardedModel(model, detector) as guarded:
        found = generated(guarded, batch, **more)
    assert torch.equal(found.sequences, reference.sequences)
    assert [record.flagged for record in guarded.records] == [False, False, False, True]
    assert guarded.records[3].tokens_pruned == int(only.sum())


def test_a_batch_is_judged_as_its_rows_alone(model: Any, batch: Batch, tiny_model: tuple[Any, Any]) -> None:
    examples = [
        asked("what?", 1),
        asked("what are these two?", 2, 3),
        asked("say yes"),
        asked("what might be in this picture here?", 4),
    ]
    with GuardedModel(model, plain_detector(threshold=FAR)) as guarded:
        generated(guarded, batch)
        together = [record.distance for record in guarded.records]
        alone = []
        for example in examples:
            generated(guarded, encode_prompts(tiny_model[1], [example]))
            (record,) = guarded.records
            alone.append(record.distance)
    assert together == pytest.approx(alone, rel=1e-4, nan_ok=True)


def test_report_flags_and_changes_nothing(model: Any, batch: Batch) -> None:
    plain = generated(model, batch)
    with GuardedModel(model, plain_detector(threshold=1e-6), policy=Policy(action="report")) as guarded:
        found = generated(guarded, batch)
    assert torch.equal(found.sequences, plain.sequences)
    assert same_scores(found, plain, range(4))
    assert [(r.flagged, r.tokens_pruned, r.rewind_layer) for r in guarded.records] == [
        (True, 0, -1),
        (True, 0, -1),
        (False, 0, -1),
        (True, 0, -1),
    ]


def test_refuse(model: Any, batch: Batch) -> None:
    seen = prefill(model, batch)
    with GuardedModel(model, detector_for(seen, 1, 0), policy=Policy(action="refuse")) as guarded:
        with pytest.raises(RefusedInputError, match="1 of 4 inputs were flagged"):
            generated(guarded, batch)
        assert [record.flagged for record in guarded.records] == [False, True, False, False]
        with pytest.raises(RefusedInputError, match="1 of 4 inputs"):
            generated(guarded, batch, num_beams=2)
        assert len(guarded.records) == 4
        text = {name: value[2:3] for name, value in batch.items() if name != "pixel_values"}
        assert generated(guarded, text).sequences.shape[0] == 1
        assert [record.flagged for record in guarded.records] == [False]
        assert generated(model, batch).sequences.shape[0] == 4, "the model's own generate is not guarded"


def test_a_distance_that_is_no_number_is_flagged(model: Any, even: Batch) -> None:
    detector = dataclasses.replace(plain_detector(threshold=FAR), mean=torch.full((LAYERS * HEADS * 2,), torch.nan))
    with GuardedModel(model, detector, policy=Policy(action="purify")) as guarded:
        generated(guarded, even)
        assert all(record.flagged and math.isnan(record.distance) for record in guarded.records)
        guarded.policy = Policy(action="refuse")
        with pytest.raises(RefusedInputError, match="3 of 3"):
            generated(guarded, even)


def test_text_alone(model: Any, tiny_model: tuple[Any, Any]) -> None:
    given = encode_prompts(tiny_model[1], [asked("say yes"), asked("say no, please")])
    plain = generated(model, given)
    with GuardedModel(model, plain_detector(threshold=1e-9), policy=Policy(action="refuse")) as guarded:
        assert torch.equal(generated(guarded, given).sequences, plain.sequences)
        single = {"input_ids": torch.tensor([[7]]), "attention_mask": torch.tensor([[1]])}
        generated(guarded, single)
        assert guarded.records == [dataclasses.replace(guarded.records[0], ran=False, flagged=False)]


def test_all_layers_or_some(model: Any, even: Batch) -> None:
    seen = prefill(model, even)
    detector = plain_detector(layers=(1,), features=("ratio",), threshold=1e-6)
    cells = seen.vectors.reshape(3, LAYERS, 2, HEADS)
    with GuardedModel(model, detector) as guarded:
        generated(guarded, even)
        assert [record.distance for record in guarded.records] == pytest.approx(cells[:, 1, 0].norm(dim=1).tolist(), rel=1e-5)
        assert {record.rewind_layer for record in guarded.records} <= {1, -1}


REFUSED: dict[str, dict[str, Any]] = {
    "no prompt": {"input_ids": None},
    "embeddings": {"input_ids": None, "inputs_embeds": torch.zeros(3, 80, 128), "pixel_values": None},
    "chunks": {"prefill_chunk_size": 16},
    "drafted": {"prompt_lookup_num_tokens": 2},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_guard_can_not_see_is_refused(model: Any, even: Batch, name: str) -> None:
    given = {key: value for key, value in {**even, **REFUSED[name]}.items() if value is not None}
    rows = slice(0, 1) if name == "drafted" else slice(None)
    given = {key: value[rows] if isinstance(value, torch.Tensor) else value for key, value in given.items()}
    with GuardedModel(model, plain_detector(threshold=FAR)) as guarded:
        with pytest.raises(ConfigError, match=r"give input_ids|prefill, which the guard must see"):
            generated(guarded, given)
        assert guarded.records == []
        generated(guarded, even)
        assert len(guarded.records) == 3


def test_a_continued_cache_is_refused(model: Any, even: Batch) -> None:
    start = {name: value[:1, :20] if name != "pixel_values" else value[:0] for name, value in even.items()}
    del start["pixel_values"]
    start["input_ids"] = torch.full_like(start["input_ids"], 7)
    cache = model(**start, use_cache=True).past_key_values
    longer = {
        "input_ids": torch.cat([start["input_ids"], torch.full((1, 5), 8)], 1),
        "attention_mask": torch.ones(1, 25, dtype=torch.long),
    }
    with GuardedModel(model, plain_detector(threshold=FAR)) as guarded, pytest.raises(ConfigError, match="whole prompt"):
        generated(guarded, longer, past_key_values=cache)


def test_padding_on_the_right_is_refused(model: Any, batch: Batch) -> None:
    mask = batch["attention_mask"].flip(1)
    with GuardedModel(model, plain_detector(threshold=FAR)) as guarded:
        for more in ({}, {"cache_implementation": "static"}):
            with pytest.raises(ConfigError, match="pad on the left"):
                generated(guarded, {**batch, "attention_mask": mask}, **more)


def test_an_exception_inside_leaves_the_model_as_it_was(model: Any, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = generated(model, batch)
    seen = prefill(model, batch)
    before = state(model)

    def burst(*_: Any, **__: Any) -> Any:
        raise MemoryError("no room")

    with GuardedModel(model, detector_for(seen, 1, 1)) as guarded:
        inside = state(model)
        for name in ("feature_vectors", "stealing_tokens", "reduce_layer", "prompt_regions"):
            with monkeypatch.context() as patch:
                patch.setattr(f"stages.guard.guarded.{name}", burst)
                with pytest.raises(MemoryError):
                    generated(guarded, batch)
            assert guarded.records == []
            assert state(model) == inside
            assert torch.equal(generated(model, batch).sequences, plain.sequences), "the failed call's block is still open"
        found = generated(guarded, batch)
        assert [record.flagged for record in guarded.records] == [False, True, False, False]
        assert torch.equal(found.sequences[[0, 2, 3]], plain.sequences[[0, 2, 3]])
    assert state(model) == before
    with pytest.raises(RuntimeError, match="outside"), GuardedModel(model, plain_detector()):
        raise RuntimeError("outside")
    assert state(model) == before


def test_detach(model: Any, batch: Batch) -> None:
    before = state(model)
    guarded = GuardedModel(model, plain_detector(threshold=1e-6))
    assert state(model) == (NAME, before[1] + 1, before[2] + 1, before[3] + 1)
    assert guarded.config is model.config, "everything else is the model's own"
    guarded.detach()
    assert state(model) == before
    guarded.detach()
    assert state(model) == before
    with pytest.raises(ConfigError, match="detached"):
        generated(guarded, batch)


def test_a_plain_call_of_the_model_is_not_watched(model: Any, batch: Batch) -> None:
    with torch.inference_mode():
        plain = model(**batch).logits
        with GuardedModel(model, plain_detector(threshold=1e-6)) as guarded:
            generated(guarded, batch)
            assert any(record.tokens_pruned for record in guarded.records)
            assert torch.equal(model(**batch).logits, plain)


def test_two_guards_on_one_model(model: Any, batch: Batch) -> None:
    with (
        GuardedModel(model, plain_detector(threshold=FAR)) as first,
        GuardedModel(model, plain_detector(threshold=1e-6), policy=Policy(action="report")) as second,
    ):
        generated(first, batch)
        assert not any(record.flagged for record in first.records)
        assert second.records == []
        generated(second, batch)
        assert any(record.flagged for record in second.records)
    assert state(model)[0] == "sdpa"


def test_two_threads_at_once(model: Any, batch: Batch, tiny_model: tuple[Any, Any]) -> None:
    """One thread's prompts are flagged and pruned, the other's are not; each gives what it gives alone."""
    seen = prefill(model, batch)
    detector = detector_for(seen, 3, 1)
    other = encode_prompts(tiny_model[1], [asked("say no"), asked("say yes, or no"), asked("say it")])
    with GuardedModel(model, detector) as guarded:
        alone = [(generated(guarded, given).sequences, guarded.records) for given in (batch, other)]
        together = threading.Barrier(2)

        def ask(index: int) -> list[tuple[torch.Tensor, list[GuardRecord]]]:
            found = []
            for _ in range(6):
                together.wait()
                sequences = generated(guarded, (batch, other)[index]).sequences
                together.wait()
                found.append((sequences, guarded.records))
            return found

        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            results = list(pool.map(ask, [0, 1]))
    assert [record.flagged for record in alone[0][1]] == [False, False, False, True]
    for (sequences, records), found in zip(alone, results, strict=True):
        for given, noted in found:
            assert torch.equal(given, sequences)
            assert [dataclasses.replace(r, milliseconds=0, distance=0, transfer=0) for r in noted] == [
                dataclasses.replace(r, milliseconds=0, distance=0, transfer=0) for r in records
            ]


def test_bfloat16(tiny_base: pathlib.Path, batch: Batch) -> None:
    model, _ = load_base(tiny_base, dtype="bfloat16", device="cpu")
    plain = generated(model, batch)
    with GuardedModel(model, plain_detector(threshold=1e-6)) as guarded:
        found = generated(guarded, batch)
        assert [record.flagged for record in guarded.records] == [True, True, False, True]
        assert all(record.tokens_pruned for record in guarded.records if record.flagged)
    assert not any(scores.isnan().any() for scores in found.scores)
    assert same_scores(found, plain, [2])
    assert not torch.equal(found.scores[0][0], plain.scores[0][0])


NEVER = torch.iinfo(torch.int64).max


def coloured(question: str, *colours: str) -> Example:
    prompt = question_answer(question, "x", len(colours))[:1]
    return Example(row=0, turn=0, prompt=prompt, answer="", images=tuple(map(picture, colours)))


@pytest.fixture(scope="module")
def hosts(tiny_model: tuple[Any, Any]) -> tuple[Batch, ...]:
    """The question of the white picture, asked of others: planted whole, it makes them its own prompt."""
    batches = (["red", "green"], ["blue", "red", "green", "blue"])
    return tuple(encode_prompts(tiny_model[1], [coloured("what?", colour) for colour in batch]) for batch in batches)


@pytest.fixture(scope="module")
def mixed(tiny_model: tuple[Any, Any]) -> Batch:
    """Four prompts, padded on the left: a white picture, two, none, and one under a longer question."""
    examples = [
        coloured("what?", "white"),
        coloured("what are these two?", "blue", "green"),
        asked("say yes"),
        coloured("what might be in this picture here?", "green"),
    ]
    return encode_prompts(tiny_model[1], examples)


PICTURED = (0, 1, 3)


def first_tokens(model: Any, batch: Batch) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(**batch).logits[:, -1].argmax(-1)
    return found


def rule_for(model: Any, batch: Batch, hosts: tuple[Batch, ...], *rows: int, **given: Any) -> TransferRule:
    """Some rows are suspicious: what the others begin with is familiar."""
    first = first_tokens(model, batch)
    others = [k for k in range(len(first)) if k not in rows]
    assert not torch.isin(first[list(rows)], first[others]).any(), "the test's pictures do not tell answers apart"
    settings = {"hosts": hosts, "distance": FAR, "familiar": first[others], "attended": 0.5, "whole": 0.5}
    return TransferRule(**{**settings, **given})


def late_detector(**given: Any) -> Detector:
    """Flags nothing, and rewinds to the last layer."""
    return dataclasses.replace(plain_detector(threshold=FAR), layer_thresholds=torch.tensor([FAR, FAR, 1e-6]), **given)


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


def under_block(model: Any, batch: Batch, block: Block, **more: Any) -> Any:
    with attached(model), tapped(Tap(block=block)), torch.inference_mode():
        return generated(model, batch, **more)


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


def test_steps_of_widening() -> None:
    """Rows: begun at layer 5, at 1, at 0, at the end, with a layer of its own; not asked for, not proven, nothing closed."""
    image = torch.tensor([[False, True, True, True]]).repeat(8, 1)
    part = torch.tensor([[False, True, False, False]]).repeat(8, 1)
    part[3], part[7] = image[3], False
    closing = Closing(
        tokens=part.clone(),
        layers=torch.tensor([5, 1, 0, 0, 2, 5, 5, -1]),
        proven=torch.tensor([True, True, True, True, True, True, False, False]),
        begun=torch.tensor([True, True, True, True, False, True, True, False]),
        image=image,
        fewest=part,
        last=5,
        step=2,
    )
    rows = torch.tensor([True, True, True, True, True, False, True, False])
    steps = [
        ([5, 1, 0, 0, 2, 5, 5, -1], [1, 1, 1, 3, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0, 1, 0]),
        ([5, 1, 0, 0, 5, 5, 5, -1], [3, 3, 3, 3, 1, 1, 1, 0], [1, 1, 1, 0, 1, 0, 0, 0]),
        ([3, 0, 0, 0, 5, 5, 5, -1], [1, 1, 3, 3, 3, 1, 1, 0], [1, 1, 0, 0, 1, 0, 0, 0]),
        ([3, 0, 0, 0, 3, 5, 5, -1], [3, 3, 3, 3, 1, 1, 1, 0], [1, 1, 0, 0, 1, 0, 0, 0]),
        ([1, 0, 0, 0, 3, 5, 5, -1], [1, 3, 3, 3, 3, 1, 1, 0], [1, 0, 0, 0, 1, 0, 0, 0]),
        ([1, 0, 0, 0, 1, 5, 5, -1], [3, 3, 3, 3, 1, 1, 1, 0], [1, 0, 0, 0, 1, 0, 0, 0]),
        ([0, 0, 0, 0, 1, 5, 5, -1], [1, 3, 3, 3, 3, 1, 1, 0], [1, 0, 0, 0, 1, 0, 0, 0]),
        ([0, 0, 0, 0, 0, 5, 5, -1], [3, 3, 3, 3, 1, 1, 1, 0], [1, 0, 0, 0, 1, 0, 0, 0]),
        ([0, 0, 0, 0, 0, 5, 5, -1], [3, 3, 3, 3, 3, 1, 1, 0], [0, 0, 0, 0, 1, 0, 0, 0]),
        ([0, 0, 0, 0, 0, 5, 5, -1], [3, 3, 3, 3, 3, 1, 1, 0], [0, 0, 0, 0, 0, 0, 0, 0]),
    ]
    for number, (layers, tokens, wider) in enumerate(steps):
        if number:
            rows = closing.widen(rows)
        assert closing.layers.tolist() == layers
        assert closing.tokens.sum(-1).tolist() == tokens
        assert rows.int().tolist() == wider
    assert torch.equal(closing.tokens[0], image[0])
    assert torch.equal(closing.tokens[5], part[5])
