"""The guarded model: unflagged inputs are untouched to the bit, flagged ones are those of a run that never saw their tokens."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import math
import pathlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from pipeline.attention import NAME, Block, Tap, attached, base_of, tapped
from pipeline.errors import ConfigError, RefusedInputError
from pipeline.models import load_base
from pipeline.prompts import encode_prompts
from stages.guard.detector import Detector
from stages.guard.guarded import GuardedModel
from stages.guard.policy import Action, Policy
from stages.guard.purify import rewind_layers, stealing_heads, stealing_tokens
from stages.guard.records import GuardRecord
from tests.stages.guard.detectors import plain_detector
from tests.stages.guard.tiny import FAR, HEADS, LAYERS, Batch, Prefill, asked, detector_for, generated, prefill, same_scores, state


@pytest.fixture(autouse=True)
def _left_as_it_was(model: Any) -> Iterator[None]:
    before = state(model)
    yield
    assert state(model) == before


def chosen_tokens(seen: Prefill, detector: Detector) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (batch, keys) and layers (batch,) that the purification's functions choose."""
    deviations = detector.deviations(seen.vectors)
    return stealing_tokens(seen.weights, seen.image, stealing_heads(detector, deviations)), rewind_layers(detector, deviations)


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
    with GuardedModel(model, detector, policy=Policy(action="refuse")) as guarded, pytest.raises(RefusedInputError, match="3 of 3"):
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
        for name in ("judge.feature_vectors", "judge.stealing_tokens", "guarded.reduce_layer", "guarded.prompt_regions"):
            with monkeypatch.context() as patch:
                patch.setattr(f"stages.guard.{name}", burst)
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
