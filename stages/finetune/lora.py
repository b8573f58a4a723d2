"""Which parameters are trained, and how the adapter is written."""

from __future__ import annotations

import json
import logging
import pathlib
import re
from typing import Any

import torch

from pipeline.config import FinetuneConfig
from pipeline.errors import ModelError
from pipeline.models import ADAPTER_BASE, ADAPTER_WEIGHTS, hidden_size

PROJECTORS = ("multi_modal_projector", "visual.merger", "connector", "aligner")
"""Names of the module between tower and decoder: LLaVA, InternVL, Gemma 3 and Mistral 3; Qwen-VL; Idefics 3 and SmolVLM; Janus."""

_PUBLISHED_RATE = 2e-4
_PUBLISHED_WIDTH = 4096
_WIDTH_EXPONENT = 0.781

_log = logging.getLogger(__name__)


def learning_rate(config: FinetuneConfig, width: int) -> float:
    """Peak learning rate for a decoder of hidden size `width`: BYE's 2e-4 at 4096 (section 5.1), times (4096 / width) ** 0.781.

    The exponent is that of "LoRA Without Regret" (Schulman et al., 2025) for Llama models.
    """
    if config.learning_rate is not None:
        return config.learning_rate
    return float(_PUBLISHED_RATE * (_PUBLISHED_WIDTH / width) ** _WIDTH_EXPONENT)


def lora_targets(model: Any) -> str:
    """A regular expression for all linear layers in the decoder's blocks (attention and MLP): no vision tower, no output layer.

    A layer that is made of a linear one but gives something else (Llama 4's router, a quantized layer) is none of them.

    Raises:
        ModelError: the model has no decoder with numbered blocks.
    """
    decoder = model.get_decoder()
    prefix = next((name for name, module in model.named_modules() if module is decoder), None)
    if not prefix:
        raise ModelError(f"{type(model).__name__}: its language decoder can't be found")
    block = re.compile(rf"({re.escape(prefix)}\.(?:.+\.)?layers)\.\d+\.(.+)")
    found = [block.fullmatch(name) for name, module in model.named_modules() if type(module).forward is torch.nn.Linear.forward]
    stems = {match[1] for match in found if match}
    kinds = sorted({match[2] for match in found if match})
    if len(stems) != 1:
        raise ModelError(
            f"{type(model).__name__}: {len(stems)} lists of decoder blocks with linear layers below {prefix}; one is needed"
        )
    return rf"{re.escape(stems.pop())}\.\d+\.(?:{'|'.join(map(re.escape, kinds))})"


def projector_name(model: Any) -> str | None:
    """The name that ends the path of the multimodal projector, if it is one of `PROJECTORS`."""
    names = [f".{name}" for name, _ in model.named_modules()]
    return next((known for known in PROJECTORS if any(name.endswith(f".{known}") for name in names)), None)


def add_lora(model: Any, config: FinetuneConfig) -> Any:
    """Wrap a base for training: LoRA on the decoder, the projector too if asked, all else frozen; trained weights are float32.

    Returns:
        A `peft.PeftModel`.
    """
    from peft import LoraConfig, get_peft_model

    projector = projector_name(model) if config.train_projector else None
    if config.train_projector and projector is None:
        _log.warning("%s: no multimodal projector of a known name; only the decoder is trained", type(model).__name__)
    adapted = get_peft_model(
        model,
        LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=lora_targets(model),
            modules_to_save=[projector] if projector else None,
            task_type="CAUSAL_LM",
        ),
    )
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def write_adapter(model: Any, folder: pathlib.Path, identity: str) -> None:
    """Write adapter_config.json, adapter_model.safetensors and base.json, and nothing that names this machine.

    Args:
        model: the `peft.PeftModel`.
        folder: made if it isn't there.
        identity: the base's, from `pipeline.models.base_identity`.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    save_file(
        {name: value.detach().cpu().contiguous() for name, value in weights.items()}, folder / ADAPTER_WEIGHTS, {"format": "pt"}
    )
    settings = model.peft_config["default"]
    before = settings.base_model_name_or_path, settings.inference_mode
    settings.base_model_name_or_path, settings.inference_mode = f"base-{identity[:16]}", True
    settings.save_pretrained(str(folder))
    settings.base_model_name_or_path, settings.inference_mode = before
    base = {"identity": identity, "architecture": type(model.get_base_model()).__name__, "hidden_size": hidden_size(model)}
    (folder / ADAPTER_BASE).write_text(json.dumps(base, indent=2, sort_keys=True) + "\n", encoding="utf-8")
