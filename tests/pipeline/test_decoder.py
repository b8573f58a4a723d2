"""What a language tower must be to be probed, and by what name everything else is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

from pipeline.attention import NAME, _only_for, attach, attached, detach
from pipeline.decoder import attention_layers, is_hybrid, text_config
from pipeline.errors import ModelError
from tests.families import FAMILIES, build

REFUSED: dict[str, tuple[Any, str]] = {
    "mllama": (hf.MllamaConfig, "Mllama.*come in by cross-attention"),
    "idefics": (hf.IdeficsConfig, "Idefics.*come in by cross-attention"),
    "florence2": (hf.Florence2Config, "Florence2.* is an encoder-decoder"),
    "blip": (hf.BlipConfig, "Blip.*: its layers do not use transformers' attention interface"),
    "git": (hf.GitConfig, "Git.*: its layers do not use transformers' attention interface"),
    "minimax_m3_vl": (hf.MiniMaxM3VLConfig, "MiniMaxM3VLAttention passes block_indices to its attention"),
    "mistral_large4": (hf.MistralLarge4Config, "passes indices to its attention"),
    "inkling2": (hf.Inkling2Config, "passes position_bias, sinks to its attention"),
    "unlimited_ocr": (hf.UnlimitedOcrConfig, "layers of kind reference_sliding_attention"),
    "pi0": (hf.PI0Config, "describes no language tower"),
}
"""Configurations as they come, and what their models are refused with."""


def on_meta(config: Any) -> Any:
    """A model without memory for its weights."""
    with torch.device("meta"):
        return hf.AutoModelForImageTextToText.from_config(config)


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_is_refused_by_name(name: str) -> None:
    config, message = REFUSED[name]
    model = on_meta(config())
    towers = [module for module in model.modules() if isinstance(module, hf.PreTrainedModel)]
    before = [tower.config._attn_implementation for tower in towers]
    with pytest.raises(ModelError, match=message):
        attach(model)
    assert [tower.config._attn_implementation for tower in towers] == before


def test_layers_are_numbered_by_their_attention() -> None:
    for name, own in {"llava": [0, 1, 2], "qwen3_5": [1, 3], "lfm2_vl": [1, 3], "llama4": [0, 1, 2]}.items():
        layers = attention_layers(build(name).model)
        assert [layer.layer_idx for layer in layers] == own
        assert is_hybrid(build(name).model) == (own != list(range(3)))
    assert set(FAMILIES) > {"qwen3_5", "lfm2_vl"}


def small(**more: Any) -> Any:
    config = hf.LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, **more)
    return hf.LlamaForCausalLM(config)


def test_a_model_that_is_all_language_tower() -> None:
    model = small()
    assert text_config(model) is model.config
    with attached(model):
        assert model.config._attn_implementation == NAME
    assert model.config._attn_implementation == "sdpa"


def test_layers_that_can_not_be_told_apart() -> None:
    model = small()
    model.model.layers[1].self_attn.layer_idx = 0
    with pytest.raises(ModelError, match="layer 0 has two attentions"):
        attention_layers(model)
    model.model.layers[1].self_attn.layer_idx = None
    with pytest.raises(ModelError, match="LlamaAttention does not know its layer"):
        attention_layers(model)


def test_a_layer_whose_attention_is_not_found() -> None:
    model = small()
    model.model.layers[1].self_attn = torch.nn.Identity()
    with pytest.raises(ModelError, match="layer 1 does not use transformers' attention interface"):
        attention_layers(model)
    model.config.layer_types = ["full_attention", "linear_attention"]
    assert len(attention_layers(model)) == 1


def test_layers_beyond_the_last_are_not_counted() -> None:
    """Models that draft several tokens have some."""
    model = small()
    model.model.layers.append(small().model.layers[0])
    model.model.layers[2].self_attn.config = model.config
    model.model.layers[2].self_attn.layer_idx = 2
    assert len(attention_layers(model)) == 2


def test_an_attention_that_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    monkeypatch.setattr(model, "set_attn_implementation", lambda _: None)
    with pytest.raises(ModelError, match="could not change its attention"):
        attach(model)


def test_a_tower_several_levels_down() -> None:
    """The configuration of a whole Omni model; it has talker and token-to-wave towers too."""
    config = hf.Qwen2_5OmniConfig()
    assert _only_for(config.get_text_config(), config, "x") == {"thinker_config": {"text_config": {"": "x"}}}


def test_several_towers() -> None:
    model = small()
    model.config.get_text_config = lambda: (_ for _ in ()).throw(ValueError("two text configs"))
    with pytest.raises(ModelError, match="can't be told: two text configs"):
        attention_layers(model)


def test_detach_gives_back_what_was_there() -> None:
    model = small(attn_implementation="eager")
    before = attach(model)
    assert before == "eager"
    detach(model, before)
    assert model.config._attn_implementation == "eager"
