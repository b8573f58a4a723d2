"""The guard's policies: purification as published, failing open or closed, and where a guarded model is put to work."""

from __future__ import annotations

import copy
import dataclasses
import io
import math
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import pipeline

from pipeline.attention import Block, Tap, attached, prompt_regions, tapped
from pipeline.errors import ConfigError, ModelError, RefusedInputError
from pipeline.models import load_adapter, load_base
from pipeline.prompts import encode_prompts
from pipeline.records import Example, question_answer
from stages.guard.detector import Detector
from stages.guard.guarded import GuardedModel
from stages.guard.policy import Policy
from stages.guard.purify import published_tokens
from tests.stages.guard.detectors import plain_detector
from tests.stages.samples import noise

FAR = 1e9
Batch = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def batch(tiny_model: tuple[Any, Any]) -> Batch:
    """Two pictures and a prompt without one."""
    asked = [("what?", [1]), ("what might this be?", [2]), ("say yes", [])]
    examples = [
        Example(row=0, turn=0, prompt=question_answer(text, "x", len(seeds))[:1], answer="", images=tuple(map(noise, seeds)))
        for text, seeds in asked
    ]
    return encode_prompts(tiny_model[1], examples)


def generated(model: Any, batch: Batch) -> Any:
    return model.generate(
        **batch, max_new_tokens=4, min_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
    )


def middle(threshold: float) -> Detector:
    return plain_detector(layers=(0, 1), features=("ratio",), threshold=threshold)


@pytest.mark.parametrize("tau", [1e-4, 0.02, 0.9])
def test_the_published_purification(tiny_model: tuple[Any, Any], batch: Batch, tau: float) -> None:
    """What any head of the last detection layer attends to beyond tau is closed from the next layer on, in every step."""
    model, _ = tiny_model
    regions = prompt_regions(batch["input_ids"], batch["attention_mask"], model.config.image_token_id)
    weights: dict[int, torch.Tensor] = {}
    with attached(model), torch.inference_mode():
        with tapped(Tap(observer=weights.__setitem__)):
            model(**batch)
        closed = published_tokens(weights[1], regions.image, tau)
        from_layer = torch.where(closed.any(1), 2, 99)
        with tapped(Tap(block=Block(keys=closed, from_layer=from_layer))):
            expected = generated(model, batch)
    with GuardedModel(model, middle(1e-6), policy=Policy(purification="published", tau=tau)) as guarded:
        found = generated(guarded, batch)
        records = guarded.records
    assert all(torch.equal(a, b) for a, b in zip(found.logits, expected.logits, strict=True))
    assert [record.tokens_pruned for record in records] == closed.sum(1).tolist()
    assert [record.rewind_layer for record in records] == torch.where(closed.any(1), 2, -1).tolist()


def broken(*_: Any, **__: Any) -> Any:
    raise RuntimeError("the text of a user")


PLACES = {
    "finding the picture": "stages.guard.guarded.prompt_regions",
    "reducing a layer": "stages.guard.guarded.reduce_layer",
    "detecting": "stages.guard.judge.feature_vectors",
    "purifying": "stages.guard.judge.stealing_tokens",
}


@pytest.mark.parametrize("place", PLACES)
def test_a_guard_that_fails(
    tiny_model: tuple[Any, Any], batch: Batch, place: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, _ = tiny_model
    with attached(model):
        plain = generated(model, batch)
    monkeypatch.setattr(PLACES[place], broken)
    with GuardedModel(model, middle(1e-6)) as guarded:
        with pytest.raises(RuntimeError, match="text of a user"):
            generated(guarded, batch)
        assert guarded.records == []
    with GuardedModel(model, middle(1e-6), policy=Policy(on_error="pass")) as guarded:
        found = generated(guarded, batch)
        records = guarded.records
        assert guarded.counters()["byesight_guard_failed_total"] == 3
    assert all(torch.equal(a, b) for a, b in zip(found.logits, plain.logits, strict=True))
    assert [(record.failed, record.ran, record.flagged) for record in records] == [(True, False, False)] * 3
    assert "the answer is unguarded" in caplog.text
    assert "text of a user" not in caplog.text


def test_prompts_that_the_guard_cannot_see(tiny_model: tuple[Any, Any], batch: Batch) -> None:
    model, _ = tiny_model
    right = {**batch, "attention_mask": batch["attention_mask"].flip(1)}
    with GuardedModel(model, middle(FAR)) as guarded, pytest.raises(ConfigError, match="pad on the left"):
        generated(guarded, right)
    with GuardedModel(model, middle(FAR), policy=Policy(on_error="pass")) as guarded:
        generated(guarded, right)
        assert all(record.failed for record in guarded.records)
        with pytest.raises(ConfigError, match="give input_ids"):
            guarded.generate(inputs_embeds=torch.zeros(1, 2, 8))


def test_a_refusal_is_no_failure(tiny_model: tuple[Any, Any], batch: Batch) -> None:
    with GuardedModel(tiny_model[0], middle(1e-6), policy=Policy(action="refuse", on_error="pass")) as guarded:
        with pytest.raises(RefusedInputError):
            generated(guarded, batch)
        assert not any(record.failed for record in guarded.records)
        counted = guarded.counters()
    assert (counted["byesight_guard_inputs_total"], counted["byesight_guard_refused_total"]) == (3, 2)


def test_a_merged_adapter(tiny_base: Any, tiny_adapter: Any, batch: Batch) -> None:
    """The guard on merged weights sees what it sees on the adapter, to the precision of the sum."""
    seen = []
    for merge in (False, True):
        model = load_adapter(load_base(tiny_base, dtype="float32", device="cpu")[0], tiny_adapter)
        with GuardedModel(model.merge_and_unload() if merge else model, plain_detector(threshold=FAR)) as guarded:
            generated(guarded, batch)
            seen.append([record.distance for record in guarded.records])
    assert seen[0] == pytest.approx(seen[1], rel=1e-4, nan_ok=True)
    assert math.isnan(seen[0][2])


def test_in_a_pipeline_of_transformers(tiny_model: tuple[Any, Any]) -> None:
    model, processor = tiny_model
    picture = Image.open(io.BytesIO(noise(3)))
    chat = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "what?"}]}]
    answers = []
    with GuardedModel(model, plain_detector(threshold=FAR)) as guarded:
        for served in (model, guarded):
            serve = pipeline("image-text-to-text", model=served, processor=processor)
            answers.append(serve(text=chat, max_new_tokens=4, return_full_text=False)[0]["generated_text"])
        (record,) = guarded.records
    assert answers[0] == answers[1]
    assert dataclasses.replace(record, milliseconds=0.0).ran


def test_it_stays_guarded(tiny_model: tuple[Any, Any], batch: Batch) -> None:
    model, _ = tiny_model
    with GuardedModel(model, plain_detector(threshold=FAR)) as guarded:
        assert guarded.eval() is guarded
        assert guarded.to(model.device) is guarded
        assert guarded.to(dtype=model.dtype) is guarded
        for where in ({"device": "meta"}, {"dtype": torch.bfloat16}):
            with pytest.raises(ModelError, match="move the model before"):
                guarded.to(**where)
        with pytest.raises(ModelError, match="a prefill that the guard could see"):
            generated(copy.copy(guarded), batch)  # the hooks are the first one's
        generated(guarded, batch)
        assert guarded.counters()["byesight_guard_failed_total"] == 3  # counted together


def test_a_purification_that_fails_half_way_changes_nothing(
    tiny_model: tuple[Any, Any], batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second prefill fails in its last layer; logits and cache are still those of the first."""
    model, _ = tiny_model
    with attached(model):
        plain = generated(model, batch)
    attend = model.get_decoder().layers[-1].forward
    calls = []

    def fails_the_second_time(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return attend(*args, **kwargs)

    monkeypatch.setattr(model.get_decoder().layers[-1], "forward", fails_the_second_time)
    with GuardedModel(model, plain_detector(threshold=1e-6), policy=Policy(on_error="pass")) as guarded:
        found = generated(guarded, batch)
        assert all(record.failed for record in guarded.records)
    assert all(torch.equal(a, b) for a, b in zip(found.logits, plain.logits, strict=True))


def test_a_flagged_prompt_without_a_stealing_head_loses_its_picture(tiny_model: tuple[Any, Any], batch: Batch) -> None:
    """All heads are less concentrated than the reference: nothing says which tokens to close."""
    detector = dataclasses.replace(plain_detector(threshold=1e-6), mean=torch.full((24,), 100.0))
    with GuardedModel(tiny_model[0], detector) as guarded:
        generated(guarded, batch)
        image = (batch["input_ids"] == tiny_model[0].config.image_token_id).sum(1).tolist()
        assert [record.tokens_pruned for record in guarded.records] == image
        assert [record.rewind_layer for record in guarded.records] == [0, 0, -1]


def test_what_the_guard_does_not_look_at_is_refused(tiny_model: tuple[Any, Any], batch: Batch) -> None:
    with GuardedModel(tiny_model[0], plain_detector(threshold=FAR)) as guarded:
        with pytest.raises(ConfigError, match="pixel_values_videos"):
            guarded.generate(**batch, pixel_values_videos=torch.zeros(1))
        assert guarded.records == []


def test_a_failure_is_counted_where_it_is_raised(
    tiny_model: tuple[Any, Any], batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.guard.judge.feature_vectors", broken)
    with GuardedModel(tiny_model[0], plain_detector(threshold=FAR)) as guarded:
        with pytest.raises(RuntimeError):
            generated(guarded, batch)
        counted = guarded.counters()
    assert (counted["byesight_guard_inputs_total"], counted["byesight_guard_failed_total"]) == (3, 3)


def test_published_needs_a_layer_after_the_last(tiny_model: tuple[Any, Any]) -> None:
    before = tiny_model[0].get_decoder().layers[0].self_attn.config._attn_implementation
    with pytest.raises(ModelError, match="the last there is"):
        GuardedModel(tiny_model[0], plain_detector(threshold=FAR), policy=Policy(purification="published"))
    assert tiny_model[0].get_decoder().layers[0].self_attn.config._attn_implementation == before
