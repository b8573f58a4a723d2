"""Load a delivered adapter with its guard, as a serving process does: no Prefect, no Ray, no pyarrow, no scikit-learn."""

from __future__ import annotations

import pathlib
from typing import Any

import torch

from pipeline.errors import ModelError
from pipeline.models import ADAPTER_CONFIG, EMBEDDED_BASE, Dtype, base_identity, load_adapter, load_base
from stages.guard.files import adapter_digest, load_guard
from stages.guard.guarded import GuardedModel


def adapter_folder(folder: pathlib.Path) -> pathlib.Path:
    """The adapter in a delivery, or the folder itself if it is an adapter's.

    Raises:
        ModelError: it is neither.
    """
    for candidate in (folder / "adapter", folder):
        if (candidate / ADAPTER_CONFIG).is_file():
            return candidate
    raise ModelError(f"{folder}: neither a delivery nor an adapter folder (no {ADAPTER_CONFIG})")


def load_guarded(
    folder: pathlib.Path | str,
    base: pathlib.Path | str | None = None,
    *,
    dtype: Dtype = "auto",
    device: torch.device | str | None = None,
    merge: bool = False,
) -> tuple[GuardedModel, Any]:
    """Load base, adapter and guard.

    Args:
        folder: a delivery, or an adapter folder with guard.json and guard.safetensors in it.
        base: folder of the base model; None takes the embedded base.
        dtype: type of the weights; auto is bfloat16 on a GPU and float32 on a CPU.
        device: where the model goes; None takes a GPU if there is one.
        merge: add the adapter to the base's weights; answers come faster, and the adapter can't be taken off again.

    Returns:
        The guarded model and the base's processor.

    Raises:
        ModelError: files are missing or refused, or the guard belongs to another adapter or base.
    """
    adapter = adapter_folder(pathlib.Path(folder))
    base = EMBEDDED_BASE if base is None else pathlib.Path(base)
    guard = load_guard(adapter, base=base_identity(base), adapter=adapter_digest(adapter))
    model, processor = load_base(base, dtype=dtype, device=device)
    model = load_adapter(model, adapter)
    if merge:
        model = model.merge_and_unload()
    return GuardedModel.of(model, guard), processor
