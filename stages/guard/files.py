"""The guard's two files beside the adapter: guard.json (what it is and belongs to) and guard.safetensors (its reference)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pipeline.errors import ModelError
from pipeline.models import ADAPTER_WEIGHTS
from stages.guard.detector import TENSORS, Detector

GUARD = "guard.json"
GUARD_TENSORS = "guard.safetensors"
SCHEMA = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guard:
    """A calibrated guard as it is stored.

    Attributes:
        detector: the reference and the threshold.
        action: what happens to a flagged input.
        base: identity of the base it was calibrated on.
        adapter: sha256 of the adapter's weights; empty where the base itself is guarded.
        facts: reference rows, target false positive rate and the like, for people to read.
    """

    detector: Detector
    action: str
    base: str
    adapter: str
    facts: dict[str, Any]


def adapter_digest(folder: pathlib.Path) -> str:
    """sha256 of an adapter's weights."""
    with (folder / ADAPTER_WEIGHTS).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_guard(guard: Guard, folder: pathlib.Path) -> None:
    """Write guard.json and guard.safetensors into an existing folder."""
    detector = guard.detector
    content = {
        "schema": SCHEMA,
        "base": guard.base,
        "adapter": guard.adapter,
        "action": guard.action,
        "layers": list(detector.layers),
        "features": list(detector.features),
        "threshold": detector.threshold,
        "facts": guard.facts,
    }
    (folder / GUARD).write_text(json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")
    tensors = {name: getattr(detector, name).float().cpu().contiguous() for name in TENSORS}
    save_file(tensors, folder / GUARD_TENSORS)


def load_guard(folder: pathlib.Path, *, base: str, adapter: str) -> Guard:
    """Read a guard and check that it belongs to this base and adapter.

    Args:
        folder: holds guard.json and guard.safetensors.
        base: identity of the base in use.
        adapter: sha256 of the adapter's weights in use.

    Raises:
        ModelError: files are missing, damaged, of another schema, or made for another base or adapter.
    """
    try:
        content = json.loads((folder / GUARD).read_text(encoding="utf-8"))
        tensors = load_file(folder / GUARD_TENSORS)
    except FileNotFoundError as error:
        raise ModelError(f"{folder}: no guard here ({GUARD} and {GUARD_TENSORS})") from error
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"{folder}: the guard can't be read: {error}") from error
    if content.get("schema") != SCHEMA:
        raise ModelError(f"{folder / GUARD}: schema {content.get('schema')!r} is not {SCHEMA}; calibrate the guard again")
    for name, expected, actual in (("base", content.get("base"), base), ("adapter", content.get("adapter"), adapter)):
        if expected != actual:
            raise ModelError(f"{folder / GUARD}: the guard was calibrated on {name} {str(expected)[:16]}, not on {actual[:16]}")
    try:
        detector = _detector(content, tensors)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{folder}: the guard's files are incomplete or contradict each other: {error}") from error
    return Guard(detector=detector, action=content["action"], base=base, adapter=adapter, facts=content["facts"])


def _detector(content: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Detector:
    size, layers = len(tensors["mean"]), len(content["layers"])
    shapes = {"mean": (size,), "deviation": (size,), "whitening": (size, size), "layer_thresholds": (layers,)}
    for name in TENSORS:
        if tensors[name].shape != shapes[name] or not torch.isfinite(tensors[name]).all():
            raise ValueError(f"{name} of shape {tuple(tensors[name].shape)} is not {shapes[name]}, or not finite")
    return Detector(
        layers=tuple(int(layer) for layer in content["layers"]),
        features=tuple(str(name) for name in content["features"]),
        threshold=float(content["threshold"]),
        **{name: tensors[name] for name in TENSORS},
    )
