from __future__ import annotations

import json
import pathlib
import shutil
import struct
from collections.abc import Callable
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
import transformers

from pipeline import models
from pipeline.errors import ModelError
from pipeline.prompts import prompt_text
from pipeline.records import question_answer


@pytest.fixture
def base(tiny_base: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy that a test may change."""
    return pathlib.Path(shutil.copytree(tiny_base, tmp_path / "base"))


def edit_json(path: pathlib.Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def safetensors_bytes(header: dict[str, Any], data: int) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)


OVERLAPPING = {
    "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
}


def put(name: str, content: bytes) -> Callable[[pathlib.Path], object]:
    def change(folder: pathlib.Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)

    return change


def other_model(config: Any) -> Callable[[pathlib.Path], object]:
    return config.save_pretrained  # type: ignore[no-any-return]


REFUSED: dict[str, tuple[Callable[[pathlib.Path], object], str]] = {
    "pickled weights": (put("pytorch_model.bin", b"x"), "pytorch_model.bin: pickled"),
    "pickle in a subfolder": (put("original/consolidated.PTH", b"x"), "pickled"),
    "joblib": (put("head.joblib", b"x"), "pickled"),
    "python": (put("modeling_mine.py", b"x"), "its own code"),
    "python in a subfolder": (put("custom_generate/generate.py", b"x"), "its own code"),
    "auto_map": (lambda f: edit_json(f / "config.json", auto_map={"AutoModel": "m.M"}), "auto_map"),
    "nested auto_map": (lambda f: edit_json(f / "processor_config.json", image_processor={"auto_map": {}}), "auto_map"),
    "auto_map in another file": (put("preprocessor_config.json", b'{"auto_map": {}}'), "auto_map"),
    "JSON that is none": (put("config.json", b"{"), "config.json"),
    "JSON that is a list": (put("generation_config.json", b"[]"), "must be a JSON object"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no \\*.safetensors"),
    "truncated weights": (lambda f: put("model.safetensors", (f / "model.safetensors").read_bytes()[:-9])(f), "damaged"),
    "overlapping tensors": (put("extra.safetensors", safetensors_bytes(OVERLAPPING, 12)), "extra.safetensors: damaged"),
    "a header longer than the file": (put("extra.safetensors", struct.pack("<Q", 1 << 60)), "damaged"),
    "no tensors": (put("extra.safetensors", safetensors_bytes({}, 0)), "holds no tensors"),
    "an index that leaves the folder": (
        put("model.safetensors.index.json", b'{"weight_map": {"a": "../other.safetensors"}}'),
        "not a file of this folder",
    ),
    "no chat template": (lambda f: (f / "chat_template.jinja").unlink(), "no chat template"),
    "a template for texts alone": (put("chat_template.jinja", b"{{ messages[0]['content'] + '!' }}"), "base: .*can't write"),
    "a template that writes lists": (put("chat_template.jinja", b"<image>{{ messages }}"), "base: .*list of a message's parts"),
    "unknown architecture": (put("config.json", b'{"model_type": "nonesuch"}'), "config.json can't be used"),
    "encoder-decoder": (other_model(transformers.Florence2Config()), "encoder-decoder"),
    "no image token": (other_model(transformers.LlamaConfig()), "no image_token_id"),
    "cross-attention": (other_model(transformers.MllamaConfig()), "base: Mllama.*come in by cross-attention"),
    "sparse attention": (other_model(transformers.MiniMaxM3VLConfig()), "base: MiniMaxM3.*passes block_indices"),
    "a field of another type": (lambda f: edit_json(f / "config.json", vision_feature_layer="x"), "config.json can't be used"),
    "a configuration that makes no model": (
        lambda f: edit_json(f / "config.json", vision_config={"model_type": "clip_vision_model", "patch_size": 0}),
        "no model can be built of its config.json",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_folder_is_refused(base: pathlib.Path, case: str) -> None:
    change, message = REFUSED[case]
    change(base)
    with pytest.raises(ModelError, match=message):
        models.check_model_folder(base)
    with pytest.raises(ModelError, match=message):
        models.load_base(base)


def test_a_sound_folder_passes(tiny_base: pathlib.Path) -> None:
    models.check_model_folder(tiny_base)


def test_a_template_of_the_tokenizer_alone_is_taken(base: pathlib.Path) -> None:
    template = (base / "chat_template.jinja").read_text()
    (base / "chat_template.jinja").unlink()
    edit_json(base / "tokenizer_config.json", chat_template=template)
    models.check_model_folder(base)
    _, processor = models.load_base(base, device="cpu")
    assert prompt_text(processor, question_answer("what?", "x")[:1]) == "USER: <image>\nwhat? ASSISTANT:"


def test_a_file_is_no_folder(tiny_base: pathlib.Path) -> None:
    with pytest.raises(ModelError, match="not a folder"):
        models.check_model_folder(tiny_base / "config.json")


def test_identity_follows_content_alone(base: pathlib.Path, tiny_base: pathlib.Path) -> None:
    identity = models.base_identity(tiny_base)
    assert models.base_identity(base) == identity
    (base / "README.md").write_text("a note")
    (base / "recipe.json").write_text("{}")
    assert models.base_identity(base) == identity
    with (base / "chat_template.jinja").open("a") as file:
        file.write(" ")
    changed = models.base_identity(base)
    assert changed != identity
    weights = bytearray((base / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (base / "model.safetensors").write_bytes(weights)
    assert models.base_identity(base) not in {identity, changed}


def test_identity_needs_weights(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ModelError, match="no model"):
        models.base_identity(tmp_path)


def test_a_base_for_a_gpu_never_lies_on_the_cpu(tiny_base: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **given: Any) -> None:
        raise OSError(f"onto {given['device_map']}")

    monkeypatch.setattr("transformers.AutoModelForImageTextToText.from_pretrained", load)
    with pytest.raises(ModelError, match=r"onto {'': device.type='cuda', index=0.}"):
        models.load_base(tiny_base, device="cuda:0")
    with pytest.raises(ModelError, match="onto None"):
        models.load_base(tiny_base, device="cpu")


def test_load_base(tiny_base: pathlib.Path) -> None:
    model, processor = models.load_base(tiny_base, device="cpu", dtype="bfloat16")
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert processor.tokenizer.padding_side == "left"
    assert models.hidden_size(model) == 128
    assert models.image_token_id(model.config) == processor.image_token_id
    model, _ = models.load_base(tiny_base, device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_missing_weights_are_not_made_up(base: pathlib.Path) -> None:
    tensors = safetensors.torch.load_file(base / "model.safetensors")
    del tensors["language_model.lm_head.weight" if "language_model.lm_head.weight" in tensors else "lm_head.weight"]
    safetensors.torch.save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="1 weights are missing"):
        models.load_base(base)


@pytest.fixture
def adapter(tiny_base: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A LoRA adapter on one layer that isn't the identity."""
    model, _ = models.load_base(tiny_base, device="cpu")
    settings = peft.LoraConfig(r=4, target_modules=r"model\.language_model\.layers\.0\.self_attn\.q_proj", init_lora_weights=False)
    folder = tmp_path / "adapter"
    peft.get_peft_model(model, settings).save_pretrained(folder, save_embedding_layers=False)
    edit_json(folder / "adapter_config.json", init_lora_weights=True)
    (folder / "base.json").write_text(json.dumps({"identity": models.base_identity(tiny_base)}))
    return folder


def change_tensors(folder: pathlib.Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")


def test_load_adapter(tiny_base: pathlib.Path, adapter: pathlib.Path) -> None:
    tensors = safetensors.torch.load_file(adapter / "adapter_model.safetensors")
    adapted = models.load_adapter(models.load_base(tiny_base, device="cpu")[0], adapter)
    state = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    assert state.keys() == tensors.keys()
    assert all(torch.equal(state[name], tensors[name]) for name in tensors)
    assert not adapted.training


REFUSED_ADAPTERS: dict[str, tuple[Callable[[pathlib.Path], object], str]] = {
    "another base": (lambda f: edit_json(f / "base.json", identity="0" * 64), "made for base 0000"),
    "pickled": (put("adapter_model.bin", b"x"), "pickled"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
    "no configuration": (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json is missing"),
    "not LoRA": (lambda f: edit_json(f / "adapter_config.json", peft_type="IA3"), "only plain LoRA"),
    "work at loading": (lambda f: edit_json(f / "adapter_config.json", init_lora_weights="pissa"), "only plain LoRA"),
    "another rank": (lambda f: edit_json(f / "adapter_config.json", r=8), "don't fit this base"),
    "modules that aren't there": (
        lambda f: edit_json(f / "adapter_config.json", target_modules="nonesuch"),
        "doesn't fit this base",
    ),
    "a missing key": (lambda f: change_tensors(f, lambda t: t.pop(next(iter(t)))), "1 weights don't fit"),
    "another key": (lambda f: change_tensors(f, lambda t: t.update(extra=torch.zeros(1))), "1 weights don't fit"),
    "NaN": (lambda f: change_tensors(f, lambda t: next(iter(t.values())).view(-1)[0].fill_(torch.nan)), "NaN"),
    "truncated": (put("adapter_model.safetensors", b"\0" * 20), "damaged"),
}


@pytest.mark.parametrize("case", REFUSED_ADAPTERS)
def test_an_adapter_is_refused(tiny_base: pathlib.Path, adapter: pathlib.Path, case: str) -> None:
    change, message = REFUSED_ADAPTERS[case]
    change(adapter)
    with pytest.raises(ModelError, match=message):
        models.load_adapter(models.load_base(tiny_base, device="cpu")[0], adapter)
