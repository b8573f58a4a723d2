"""The base that ships with ByeSight: small, plain, made by the recipe of the code, and able to answer."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from pipeline.embedded.build import Recipe, base_config
from pipeline.embedded.scenes import KINDS, ask, draw_scene
from pipeline.models import EMBEDDED_BASE, check_model_folder

MOST_BYTES = 12_000_000
QUESTIONS = 20
LEAST_RIGHT = dict.fromkeys(KINDS, 0.8)
"""Least exact match per kind of question."""
SEED = 90_001
"""Of scenes that neither training nor `evaluate` draws."""


@pytest.fixture(scope="module")
def base() -> tuple[Any, Any]:
    return LlavaForConditionalGeneration.from_pretrained(EMBEDDED_BASE).eval(), AutoProcessor.from_pretrained(EMBEDDED_BASE)


def test_the_folder_is_small_and_holds_no_code() -> None:
    files = [path for path in EMBEDDED_BASE.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MOST_BYTES
    assert {path.suffix for path in files} == {".json", ".jinja", ".safetensors"}
    check_model_folder(EMBEDDED_BASE)


def test_it_was_made_by_the_recipe() -> None:
    """Threads change the time and not what is learnt."""
    recipe = json.loads((EMBEDDED_BASE / "recipe.json").read_text())
    assert {**recipe, "threads": 0} == dataclasses.asdict(Recipe(threads=0))


def test_it_has_the_architecture_of_the_code(base: tuple[Any, Any]) -> None:
    model, processor = base
    with torch.device("meta"):
        built = LlavaForConditionalGeneration(base_config(processor.tokenizer))
    assert {name: value.shape for name, value in model.state_dict().items()} == {
        name: value.shape for name, value in built.state_dict().items()
    }
    for name in ("image_token_id", "vision_feature_layer", "vision_feature_select_strategy", "image_seq_length"):
        assert getattr(model.config, name) == getattr(built.config, name)
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


@pytest.mark.parametrize("kind", KINDS)
def test_it_answers(kind: str, base: tuple[Any, Any]) -> None:
    """On unseen scenes, through the ordinary processor, chat template and `generate`."""
    model, processor = base
    rng = np.random.default_rng([SEED, KINDS.index(kind)])
    drawn = [(scene, asked) for scene in (draw_scene(rng) for _ in range(200)) if (asked := ask(scene, kind, rng)) is not None]
    chosen = drawn[:QUESTIONS]
    assert len(chosen) == QUESTIONS
    chats = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": a.question}]}] for _, a in chosen]
    prompts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    inputs = processor(images=[scene.image for scene, _ in chosen], text=prompts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        output = model.generate(**inputs, do_sample=False, max_new_tokens=32)
    texts = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    right = np.mean([text.strip() == asked.answer for text, (_, asked) in zip(texts, chosen, strict=True)])
    assert right >= LEAST_RIGHT[kind], list(zip(texts, (asked for _, asked in chosen), strict=True))
