"""Base models and adapters from local folders: refused unless they are plain safetensors without code of their own."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

import safetensors
import torch

from pipeline.decoder import attention_layers
from pipeline.errors import ModelError
from pipeline.prompts import check_template

EMBEDDED_BASE = pathlib.Path(__file__).parent / "embedded" / "model"
"""The base model that ships with ByeSight."""

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_BASE = "base.json"

Dtype = Literal["auto", "float32", "bfloat16"]

_log = logging.getLogger(__name__)
_PICKLED = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib"})
_IDENTITY = frozenset({".json", ".jinja", ".safetensors", ".model", ".txt"})
_NOT_IDENTITY = frozenset({"recipe.json", "requirements.txt"})
_NOT_CONFIG = frozenset({"tokenizer.json", "vocab.json", "added_tokens.json", "recipe.json"})


def check_model_folder(folder: pathlib.Path) -> None:
    """Refuse a base model that could run code, or that ByeSight can't train or probe; its weights are not loaded.

    Raises:
        ModelError: not a folder; pickled weights, Python files or `auto_map` in it; no, damaged or overlapping safetensors; no chat
            template; an encoder-decoder, a model without image tokens, or one that `pipeline.decoder.attention_layers` refuses;
            a processor that `load_processor` refuses.
    """
    _check_files(folder)
    load_processor(folder)


def _check_files(folder: pathlib.Path) -> None:
    """`check_model_folder` but for the processor."""
    _refuse_code(folder)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ModelError(f"{folder}: no *.safetensors; save the model with safetensors")
    for path in weights:
        _check_safetensors(path)
    _check_index(folder)
    if not (folder / "chat_template.jinja").is_file() and not any(
        _read_json(folder / name).get("chat_template")
        for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json")
        if (folder / name).is_file()
    ):
        raise ModelError(f"{folder}: no chat template (chat_template.jinja, or `chat_template` in tokenizer_config.json)")
    config = _model_config(folder)
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{folder}: {config.model_type} is an encoder-decoder; ByeSight needs a decoder that sees image tokens")
    image_token_id(config)
    _check_tower(config, folder)


def base_identity(folder: pathlib.Path) -> str:
    """Hash of everything that decides what the base computes: weights, configuration, tokenizer, processor and chat template.

    Returns:
        64 hexadecimal digits; the same for equal files in any place. Remembered per process while path, size and time stay.

    Raises:
        ModelError: the folder holds no such files.
    """
    files = sorted(p for p in folder.glob("*") if p.is_file() and p.suffix in _IDENTITY and p.name not in _NOT_IDENTITY)
    if not any(path.suffix == ".safetensors" for path in files):
        raise ModelError(f"{folder}: no model with *.safetensors here")
    digest = hashlib.sha256()
    for path in files:
        status = path.stat()
        digest.update(f"{path.name}\0{_file_digest(path.resolve(), status.st_mtime_ns, status.st_size)}\n".encode())
    return digest.hexdigest()


def load_processor(folder: pathlib.Path) -> Any:
    """A base's processor, whose tokenizer pads on the left and has a padding token.

    Raises:
        ModelError: it can't be loaded, has no tokenizer, or its chat template can't be used (`pipeline.prompts.check_template`).
    """
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError, TypeError) as error:
        raise ModelError(f"{folder}: the processor can't be loaded: {error}") from error
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None:
        raise ModelError(f"{folder}: {type(processor).__name__} has no tokenizer; preprocessor files are missing")
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if processor.chat_template is None:  # it lies in tokenizer_config.json alone
        processor.chat_template = tokenizer.chat_template
    try:
        check_template(processor, image_token_id(_model_config(folder)))
    except ModelError as error:
        raise ModelError(f"{folder}: {error}") from error
    return processor


def load_base(folder: pathlib.Path, *, dtype: Dtype = "auto", device: torch.device | str | None = None) -> tuple[Any, Any]:
    """Load a base model and its processor from a local folder, after `check_model_folder`.

    Args:
        folder: a Hugging Face folder.
        dtype: type of the weights; auto is bfloat16 on a GPU and float32 on a CPU.
        device: where the model goes; None takes `pick_device()`.

    Returns:
        The model, in evaluation mode, and the processor, as `load_processor` gives it.

    Raises:
        ModelError: the folder is refused, can't be loaded, or lacks weights of the architecture.
    """
    from transformers import AutoModelForImageTextToText
    from transformers.utils import logging as transformers_logging

    folder = folder.resolve()
    _check_files(folder)
    where = torch.device(device) if device is not None else pick_device()
    chosen = (torch.bfloat16 if where.type == "cuda" else torch.float32) if dtype == "auto" else getattr(torch, dtype)
    safe = {"trust_remote_code": False, "local_files_only": True}
    processor = load_processor(folder)
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    whole = None if where.type == "cpu" else {"": where}  # weights go there one by one: the CPU needn't hold them all
    try:
        model, report = AutoModelForImageTextToText.from_pretrained(
            folder, **safe, dtype=chosen, use_safetensors=True, output_loading_info=True, device_map=whole
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError, TypeError) as error:
        raise ModelError(f"{folder}: the base model can't be loaded: {error}") from error
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    absent = sorted(report.get("missing_keys", ())) + [str(key) for key in report.get("mismatched_keys", ())]
    if absent:
        raise ModelError(f"{folder}: {len(absent)} weights are missing or of another shape, first {absent[0]}")
    return model.to(where).eval(), processor


def load_adapter(model: Any, folder: pathlib.Path) -> Any:
    """Put a LoRA adapter on a base model that `load_base` gave.

    Args:
        model: the base; its modules are wrapped in place.
        folder: adapter_config.json, adapter_model.safetensors and, if the adapter was made here, base.json.

    Returns:
        A `peft.PeftModel` in evaluation mode.

    Raises:
        ModelError: files are missing, pickled or damaged; not LoRA; made for another base; keys or shapes that don't fit this base,
            or weights that aren't finite.
    """
    from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

    _refuse_code(folder)
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise ModelError(f"{folder}: {name} is missing")
    _check_base(model, folder)
    settings = _read_json(folder / ADAPTER_CONFIG)
    if settings.get("peft_type") != "LORA" or not isinstance(settings.get("init_lora_weights", True), bool):
        raise ModelError(f"{folder / ADAPTER_CONFIG}: only plain LoRA adapters are loaded")
    tensors = _finite_tensors(folder / ADAPTER_WEIGHTS)
    try:
        adapted = PeftModel(model, LoraConfig.from_pretrained(folder))
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{folder}: the adapter doesn't fit this base: {error}") from error
    expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    wrong = sorted(expected.keys() ^ tensors.keys()) or [
        key for key, value in expected.items() if value.shape != tensors[key].shape
    ]
    if wrong:
        raise ModelError(
            f"{folder}: {len(wrong)} weights don't fit this base, first {wrong[0]}; was the adapter made for another base?"
        )
    set_peft_model_state_dict(adapted, tensors)
    return adapted.eval()


def hidden_size(model: Any) -> int:
    """Width of the language model's hidden states."""
    return int(model.config.get_text_config().hidden_size)


def image_token_id(config: Any) -> int:
    """Id of the token that stands for a piece of a picture, from a model's configuration.

    Raises:
        ModelError: the configuration names none: the model doesn't put image tokens into its sequence.
    """
    for name in ("image_token_id", "image_token_index"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    raise ModelError(
        f"{getattr(config, 'model_type', 'model')}: no image_token_id in its configuration; its pictures can't be followed"
    )


def pick_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _refuse_code(folder: pathlib.Path) -> None:
    """Raise ModelError on pickles, Python files and `auto_map` anywhere below a folder."""
    if not folder.is_dir():
        raise ModelError(f"{folder}: not a folder; give a local Hugging Face folder")
    for path in sorted(folder.rglob("*")):
        suffix = path.suffix.lower()
        if suffix in _PICKLED:
            raise ModelError(f"{path}: pickled files are refused; remove it, and keep the weights as safetensors")
        if suffix == ".py":
            raise ModelError(f"{path}: a model that brings its own code is refused")
        if suffix == ".json" and path.parent == folder and path.name not in _NOT_CONFIG and _holds(_read_json(path), "auto_map"):
            raise ModelError(f"{path}: `auto_map` asks for remote code; a model that brings its own code is refused")


def _check_safetensors(path: pathlib.Path) -> None:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            count = len(list(file.keys()))
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path}: damaged safetensors: {error}") from error
    if not count:
        raise ModelError(f"{path}: holds no tensors")


def _check_index(folder: pathlib.Path) -> None:
    """Every file that a shard index names must lie in the folder itself."""
    for path in sorted(folder.glob("*.safetensors.index.json")):
        shards = _read_json(path).get("weight_map")
        if not isinstance(shards, dict):
            raise ModelError(f"{path}: no weight_map")
        for name in sorted(set(map(str, shards.values()))):
            if pathlib.PurePath(name).name != name or not (folder / name).is_file():
                raise ModelError(f"{path}: names {name!r}, which is not a file of this folder")


def _model_config(folder: pathlib.Path) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        raise ModelError(f"{folder}: config.json can't be used: {error}") from error


def _check_tower(config: Any, folder: pathlib.Path) -> None:
    """Raise ModelError if a model of this configuration can't be built or probed; it is built without memory for its weights."""
    from transformers import AutoModelForImageTextToText

    try:
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config, trust_remote_code=False)
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, ImportError, RuntimeError) as error:
        raise ModelError(f"{folder}: no model can be built of its config.json: {error}") from error
    try:
        attention_layers(model)
    except ModelError as error:
        raise ModelError(f"{folder}: {error}") from error


def _check_base(model: Any, folder: pathlib.Path) -> None:
    """Raise ModelError if the adapter records another base than the one that `model` was loaded from."""
    recorded = folder / ADAPTER_BASE
    if not recorded.is_file():
        return
    source = pathlib.Path(str(getattr(model, "name_or_path", "")))
    if not source.is_dir():
        _log.warning("%s: can't tell whether this is the adapter's base: the model was not loaded from a folder", folder)
        return
    expected, actual = _read_json(recorded).get("identity"), base_identity(source)
    if expected != actual:
        raise ModelError(f"{folder}: made for base {str(expected)[:16]}, but {source} is {actual[:16]}")


def _finite_tensors(path: pathlib.Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    _check_safetensors(path)
    tensors: dict[str, torch.Tensor] = load_file(path)
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ModelError(f"{path}: {name} holds NaN or infinity")
    return tensors


def _holds(value: Any, key: str) -> bool:
    """Whether a key occurs anywhere in nested JSON."""
    pending: list[Any] = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, Mapping):
            if key in item:
                return True
            pending.extend(item.values())
        elif isinstance(item, list):
            pending.extend(item)
    return False


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: can't be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: must be a JSON object, not {type(value).__name__}")
    return value


@functools.lru_cache(maxsize=256)
def _file_digest(path: pathlib.Path, _mtime_ns: int, _size: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
