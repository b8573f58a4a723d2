"""Tiny models and prompts for the tests of the guarded model."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlavaForConditionalGeneration

from pipeline.models import load_adapter, load_base
from pipeline.prompts import encode_prompts
from tests.stages.guard.tiny import Batch, asked, coloured


@pytest.fixture(scope="module", params=["base", "adapted", "grouped queries"])
def model(request: pytest.FixtureRequest, tiny_base: pathlib.Path) -> Any:
    if request.param == "grouped queries":
        config = AutoConfig.from_pretrained(tiny_base)
        config.text_config.num_key_value_heads = 2
        torch.manual_seed(5)
        return LlavaForConditionalGeneration(config).eval()
    found, _ = load_base(tiny_base, dtype="float32", device="cpu")
    return load_adapter(found, request.getfixturevalue("tiny_adapter")) if request.param == "adapted" else found


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
