from __future__ import annotations

import copy
import dataclasses
import json
import logging
import pathlib
from typing import Any

import pytest
import torch
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    LlavaForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from pipeline.config import FinetuneConfig
from pipeline.models import base_identity, load_adapter, load_base
from pipeline.prompts import IGNORED, encode_training
from stages.finetune.lora import add_lora, learning_rate, lora_targets, projector_name, write_adapter
from stages.finetune.recorder import answer_loss
from tests import families

LINEAR = {
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 99,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


def qwen() -> Any:
    text = TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
    vision = {"embed_dim": 32, "depth": 1, "num_heads": 2, "hidden_size": 32}
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision))


def idefics() -> Any:
    text = TEXT | {"model_type": "llama", "pad_token_id": 0}
    return Idefics3ForConditionalGeneration(
        Idefics3Config(text_config=text, vision_config=VISION, image_token_id=3, pad_token_id=0)
    )


@pytest.mark.parametrize(
    ("width", "given", "rate"),
    [(4096, None, 2e-4), (1024, None, 2e-4 * 4**0.781), (256, None, 2e-4 * 16**0.781), (256, 1e-5, 1e-5)],
)
def test_learning_rate(width: int, given: float | None, rate: float) -> None:
    assert learning_rate(FinetuneConfig(learning_rate=given), width) == pytest.approx(rate)


@pytest.fixture
def llava(tiny_base: pathlib.Path) -> Any:
    return load_base(tiny_base, device="cpu")[0]


FAMILIES = {"qwen": (qwen, "model.language_model", "visual.merger", 2), "idefics": (idefics, "model.text_model", "connector", 2)}


@pytest.mark.parametrize("family", ["llava", *FAMILIES])
def test_what_is_trained(llava: Any, family: str) -> None:
    make, decoder, projector, layers = FAMILIES.get(family, (lambda: llava, "model.language_model", "multi_modal_projector", 3))
    adapted = add_lora(make(), FinetuneConfig(lora_rank=2))
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    expected = {
        f"base_model.model.{decoder}.layers.{layer}.{name}.lora_{side}.default.weight"
        for layer in range(layers)
        for name in LINEAR
        for side in "AB"
    }
    assert expected <= trained
    assert trained - expected
    assert all(f".{projector}.modules_to_save." in name for name in trained - expected)
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}


def test_without_the_projector(llava: Any) -> None:
    adapted = add_lora(llava, FinetuneConfig(train_projector=False))
    assert all("lora_" in name for name, parameter in adapted.named_parameters() if parameter.requires_grad)


def test_an_unknown_projector_is_noted(llava: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.finetune.lora.PROJECTORS", ("nonesuch",))
    assert projector_name(llava) is None
    with caplog.at_level(logging.WARNING):
        add_lora(llava, FinetuneConfig())
    assert "no multimodal projector of a known name" in caplog.text


def test_bfloat16_bases_train_float32_weights(llava: Any) -> None:
    adapted = add_lora(llava.to(torch.bfloat16), FinetuneConfig())
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in adapted.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_the_tower_records_no_gradients(llava: Any) -> None:
    adapted = add_lora(llava, FinetuneConfig())
    seen: list[bool] = []
    tower = adapted.get_base_model().model.vision_tower
    tower.register_forward_hook(lambda module, args, output: seen.append(output.last_hidden_state.requires_grad))
    token = adapted.config.image_token_id
    logits = adapted(input_ids=torch.full((1, 64), token), pixel_values=torch.zeros(1, 3, 64, 64)).logits
    assert seen == [False]
    assert logits.requires_grad


def test_the_adapter_folder(llava: Any, tiny_base: pathlib.Path, tmp_path: pathlib.Path) -> None:
    adapted = add_lora(llava, FinetuneConfig(lora_rank=2))
    with torch.no_grad():
        for parameter in filter(lambda p: p.requires_grad, adapted.parameters()):
            parameter.add_(0.1)
    adapted.eval()
    write_adapter(adapted, tmp_path / "adapter", base_identity(tiny_base))
    files = {path.name: path for path in (tmp_path / "adapter").iterdir()}
    assert files.keys() == {"adapter_config.json", "adapter_model.safetensors", "base.json"}
    settings = json.loads(files["adapter_config.json"].read_text())
    assert settings["inference_mode"] is True
    assert str(tiny_base.parent) not in files["adapter_config.json"].read_text()
    assert json.loads(files["base.json"].read_text())["identity"] == base_identity(tiny_base)

    fresh, _ = load_base(tiny_base, device="cpu")
    ids = {"input_ids": torch.arange(4, 30)[None]}
    with torch.no_grad():
        plain = fresh(**ids).logits
        loaded = load_adapter(fresh, tmp_path / "adapter")(**ids).logits
        assert torch.equal(loaded, adapted(**ids).logits)
    assert not torch.allclose(loaded, plain)


@pytest.mark.parametrize("name", families.FAMILIES)
def test_a_step_of_every_family_lowers_the_loss(name: str) -> None:
    built = families.build(name)
    model = add_lora(copy.deepcopy(built.model), FinetuneConfig(lora_rank=2)).train()
    batch = encode_training(built.processor, [dataclasses.replace(one, answer="red or blue") for one in built.examples], 4096)
    labels = batch.pop("labels")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(2):
        loss = answer_loss(model(**batch).logits, labels, int((labels != IGNORED).sum()))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert losses[1] < losses[0]
    moved = {key.split("layers.")[1].split(".")[0] for key, p in model.named_parameters() if "lora_B" in key and p.any()}
    assert len(moved) == built.model.config.get_text_config().num_hidden_layers


def test_targets_are_short(llava: Any) -> None:
    assert isinstance(llava, LlavaForConditionalGeneration)
    assert lora_targets(llava).startswith(r"model\.language_model\.layers\.\d+\.(?:mlp\.down_proj|")
