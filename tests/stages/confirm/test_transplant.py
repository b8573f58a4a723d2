"""Planted tokens are what the decoder sees, exactly, and nothing stays behind."""

from __future__ import annotations

import copy
import pathlib
from typing import Any

import pytest
import torch

from pipeline.attention import base_of
from pipeline.generation import answer, encode_on
from pipeline.models import load_adapter, load_base
from pipeline.records import Example, examples_of, question_answer
from stages.confirm.transplant import TokenTransplant
from tests.stages.samples import mixed_samples, noise

IMAGE_TOKENS = 64


@pytest.fixture(scope="module", params=["base", "adapted"])
def model(request: pytest.FixtureRequest, tiny_base: pathlib.Path, tiny_adapter: pathlib.Path) -> Any:
    found, _ = load_base(tiny_base, dtype="float32", device="cpu")
    return load_adapter(found, tiny_adapter) if request.param == "adapted" else found


@pytest.fixture
def transplant(model: Any, tiny_model: tuple[Any, Any]) -> TokenTransplant:
    return TokenTransplant(model, tiny_model[1])


EXAMPLES = [example for sample in mixed_samples() for example in examples_of(sample)]


def asked(question: str, *seeds: int) -> Example:
    prompt = question_answer(question, "x", len(seeds))[:1]
    return Example(row=0, turn=0, prompt=prompt, answer="", images=tuple(map(noise, seeds)))


def hooks(model: Any) -> int:
    """Hooks on the module that takes the tokens."""
    return len(base_of(model).model.language_model._forward_pre_hooks)


def logits(transplant: TokenTransplant, model: Any, examples: list[Example], tokens: list[torch.Tensor]) -> torch.Tensor:
    batch = encode_on(model, transplant.processor, examples)
    with torch.inference_mode(), transplant.planted(batch["input_ids"] == base_of(model).config.image_token_id, tokens):
        found: torch.Tensor = model(**batch).logits[:, -1]
    return found


def test_the_tokens_are_the_projectors_output(transplant: TokenTransplant, model: Any) -> None:
    found = transplant.picture_tokens(EXAMPLES)
    assert [len(tokens) for tokens in found] == [64, 0, 64, 64, 128, 0, 64, 0, 64]
    batch = encode_on(model, transplant.processor, EXAMPLES)
    features = base_of(model).get_image_features(pixel_values=batch["pixel_values"]).pooler_output
    assert torch.equal(torch.cat(found), torch.cat(list(features)))
    assert hooks(model) == 0


def test_own_tokens_change_nothing(transplant: TokenTransplant, model: Any, tiny_model: tuple[Any, Any]) -> None:
    batch = encode_on(model, transplant.processor, EXAMPLES)
    with torch.inference_mode():
        plain = model(**batch).logits[:, -1]
    own = transplant.picture_tokens(EXAMPLES)
    assert torch.equal(logits(transplant, model, EXAMPLES, own), plain)
    expected = answer(model, tiny_model[1], EXAMPLES, max_new_tokens=6)
    assert transplant.answers(EXAMPLES, own, max_new_tokens=6) == expected
    assert len(set(expected)) > 1
    assert hooks(model) == 0


def test_all_tokens_of_another_picture_give_what_it_gives(
    transplant: TokenTransplant, model: Any, tiny_model: tuple[Any, Any]
) -> None:
    """Prompts of two lengths, padded; the other picture was seen under another question, and in another place of its batch."""
    hosts = [asked("what?", 1), asked("what is in this picture, please?", 2)]
    sources = [asked("and here, what do you think?", 5), asked("how many?", 6)]
    other = [asked("what?", 5), asked("what is in this picture, please?", 6)]
    planted = transplant.picture_tokens(sources)
    with torch.inference_mode():
        plain, expected = (model(**encode_on(model, transplant.processor, examples)).logits[:, -1] for examples in (hosts, other))
    found = logits(transplant, model, hosts, planted)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(plain, expected, atol=1e-4)
    assert transplant.answers(hosts, planted, max_new_tokens=6) == answer(model, tiny_model[1], other, max_new_tokens=6)


def test_each_prompt_gets_its_own(transplant: TokenTransplant, model: Any) -> None:
    """Only the second prompt is changed; one picture of two, and no picture, are told apart."""
    hosts = [asked("what?", 1), asked("what about these two?", 2, 3), asked("nothing to see")]
    tokens = transplant.picture_tokens(hosts)
    plain = logits(transplant, model, hosts, tokens)
    changed = [tokens[0], torch.cat([tokens[1][:IMAGE_TOKENS], transplant.picture_tokens([asked("x", 9)])[0]]), tokens[2]]
    found = logits(transplant, model, hosts, changed)
    assert torch.equal(found[[0, 2]], plain[[0, 2]])
    expected = logits(transplant, model, [*hosts[:1], asked("what about these two?", 2, 9), hosts[2]], changed)
    torch.testing.assert_close(found[1], expected[1])
    assert not torch.allclose(found[1], plain[1], atol=1e-4)


def test_hooks_are_removed_after_exceptions(transplant: TokenTransplant, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = [asked("what?", 1)]
    own = transplant.picture_tokens(examples)
    for wrong in ([own[0][:3]], [own[0], own[0]]):
        with pytest.raises((RuntimeError, IndexError)):
            transplant.answers(examples, wrong, max_new_tokens=2)
        assert hooks(model) == 0

    def broken(*_: Any, **__: Any) -> Any:
        raise MemoryError("no room")

    projector = base_of(model).model.multi_modal_projector
    with monkeypatch.context() as patch:
        patch.setattr(projector, "forward", broken)
        with pytest.raises(MemoryError):
            transplant.picture_tokens(examples)
    assert hooks(model) == 0
    assert torch.equal(transplant.picture_tokens(examples)[0], own[0])


def test_a_generation_config_of_beams_does_not_mix_prompts(transplant: TokenTransplant, model: Any) -> None:
    examples = [asked("what?", 1), asked("what is it, then?", 2)]
    own = transplant.picture_tokens(examples)
    expected = transplant.answers(examples, own, max_new_tokens=4)
    before = base_of(model).generation_config
    try:
        base_of(model).generation_config = copy.deepcopy(before)
        base_of(model).generation_config.num_beams = 3
        assert transplant.answers(examples, own, max_new_tokens=4) == expected
    finally:
        base_of(model).generation_config = before
