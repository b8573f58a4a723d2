"""The guard's two files beside the adapter: guard.json (what it is and belongs to) and guard.safetensors (its reference)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import pathlib
from typing import Any, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pipeline.attention import base_of
from pipeline.errors import ModelError
from pipeline.models import ADAPTER_WEIGHTS
from stages.guard.detector import FEATURES, TENSORS, Detector
from stages.guard.policy import Action, OnError, Policy, Pruning, Purification
from stages.guard.transfer import LEAST_HOSTS, MAJORITY, TransferRule

GUARD = "guard.json"
GUARD_TENSORS = "guard.safetensors"
SCHEMA = 4
_POLICY = {
    "action": get_args(Action),
    "purification": get_args(Purification),
    "pruning": get_args(Pruning),
    "on_error": get_args(OnError),
}
_LIMITS = ("distance", "attended", "whole")
_TOKENS = ("familiar", "vocabulary")
_HOST = "host"
"""Tensors of the causal test's prompts are named host.BATCH.NAME."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guard:
    """A calibrated guard as it is stored.

    Attributes:
        detector: the reference and the threshold.
        transfer: the causal test of suspicious inputs, if there is one.
        policy: what it does with what it finds.
        base: identity of the base it was calibrated on.
        adapter: sha256 of the adapter's weights; empty where the base itself is guarded.
        facts: reference rows, target false positive rate and the like, for people to read; `dtype` is the type of the weights that
            it was calibrated in, as torch names it.
    """

    detector: Detector
    transfer: TransferRule | None = None
    policy: Policy
    base: str
    adapter: str
    facts: dict[str, Any]


def dtype_name(model: Any) -> str:
    """The type of a model's weights, as torch names it: float32, bfloat16."""
    return str(base_of(model).dtype).removeprefix("torch.")


def adapter_digest(folder: pathlib.Path) -> str:
    """sha256 of an adapter's weights.

    Raises:
        ModelError: they can't be read.
    """
    try:
        with (folder / ADAPTER_WEIGHTS).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"{folder / ADAPTER_WEIGHTS}: can't be read: {error}") from error


def save_guard(guard: Guard, folder: pathlib.Path) -> None:
    """Write guard.json and guard.safetensors into an existing folder."""
    detector = guard.detector
    content = {
        "schema": SCHEMA,
        "base": guard.base,
        "adapter": guard.adapter,
        **dataclasses.asdict(guard.policy),
        "layers": list(detector.layers),
        "features": list(detector.features),
        "threshold": detector.threshold,
        "transfer": None,
        "facts": guard.facts,
    }
    tensors = {name: getattr(detector, name).float() for name in TENSORS}
    if (rule := guard.transfer) is not None:
        content["transfer"] = {**{name: getattr(rule, name) for name in _LIMITS}, "late": rule.late}
        tensors |= {name: getattr(rule, name) for name in _TOKENS}
        tensors |= {f"{_HOST}.{k}.{name}": value for k, batch in enumerate(rule.hosts) for name, value in batch.items()}
    (folder / GUARD).write_text(json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")
    save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, folder / GUARD_TENSORS)


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
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise ModelError(f"{folder}: the guard can't be read: {error}") from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise ModelError(f"{folder / GUARD}: not of schema {SCHEMA}; calibrate the guard again")
    for name, expected, actual in (("base", content.get("base"), base), ("adapter", content.get("adapter"), adapter)):
        if expected != actual:
            raise ModelError(f"{folder / GUARD}: the guard was calibrated on {name} {str(expected)[:16]}, not on {actual[:16]}")
    try:
        detector = _detector(content, tensors)
        transfer = None if content["transfer"] is None else _transfer(content["transfer"], tensors)
        policy, facts = Policy(**{name: content[name] for name in _POLICY}, tau=float(content["tau"])), dict(content["facts"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ModelError(f"{folder}: the guard's files are incomplete or contradict each other: {error}") from error
    if not 0 <= policy.tau < 1:
        raise ModelError(f"{folder / GUARD}: tau {policy.tau} is no attention weight")
    for name, values in _POLICY.items():
        if getattr(policy, name) not in values:
            raise ModelError(f"{folder / GUARD}: the {name} {getattr(policy, name)!r} is none of {', '.join(values)}")
    return Guard(detector=detector, transfer=transfer, policy=policy, base=base, adapter=adapter, facts=facts)


def _detector(content: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Detector:
    """Raises KeyError, TypeError or ValueError where the files do not make a detector."""
    layers = tuple(int(layer) for layer in content["layers"])
    features = tuple(str(name) for name in content["features"])
    threshold = float(content["threshold"])
    if not layers or min(layers) < 0 or list(layers) != sorted(set(layers)):
        raise ValueError(f"layers {layers} are not ascending")
    if not features or not set(features) <= set(FEATURES) or len(set(features)) < len(features):
        raise ValueError(f"features {features} are not of {FEATURES}")
    if not math.isfinite(threshold) or threshold <= 0:
        raise ValueError(f"threshold {threshold} is not a distance")
    size = len(tensors["mean"])
    if not size or size % (len(layers) * len(features)):
        raise ValueError(f"{size} dimensions are not layers x features x heads")
    shapes = {"mean": (size,), "deviation": (size,), "whitening": (size, size), "layer_thresholds": (len(layers),)}
    for name, shape in shapes.items():
        if tensors[name].dtype != torch.float32 or tensors[name].shape != shape or not torch.isfinite(tensors[name]).all():
            raise ValueError(f"{name} of shape {tuple(tensors[name].shape)} is not {shape} of finite float32 numbers")
    for name in ("deviation", "layer_thresholds"):
        if not (tensors[name] > 0).all():
            raise ValueError(f"{name} is not positive")
    return Detector(layers=layers, features=features, threshold=threshold, **{name: tensors[name] for name in TENSORS})


def _transfer(content: dict[str, Any], tensors: dict[str, torch.Tensor]) -> TransferRule:
    """Raises KeyError, TypeError or ValueError where the files do not make a causal test."""
    limits = {name: float(content[name]) for name in _LIMITS}
    if not math.isfinite(limits["distance"]) or not all(MAJORITY <= limits[name] <= 1 for name in ("attended", "whole")):
        raise ValueError(f"{limits} are not a distance and two shares of at least {MAJORITY}")
    late = content["late"]
    if late is not None and (not isinstance(late, int) or late < 1):
        raise ValueError(f"late {late!r} is not a layer after the first")
    tokens = {name: tensors[name] for name in _TOKENS}
    for name, value in tokens.items():
        if value.dim() != 1 or value.dtype != torch.int64:
            raise ValueError(f"{name} of shape {tuple(value.shape)} and type {value.dtype} is not a list of tokens")
    return TransferRule(hosts=_hosts(tensors), late=late, familiar=tokens["familiar"], vocabulary=tokens["vocabulary"], **limits)


def _hosts(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], ...]:
    """The causal test's prompts in batches; raises KeyError or ValueError where there are too few, or they can't be run."""
    hosts: dict[int, dict[str, torch.Tensor]] = {}
    for name in sorted(tensors):
        if name.startswith(f"{_HOST}."):
            _, number, field = name.split(".", 2)
            hosts.setdefault(int(number), {})[field] = tensors[name]
    if sorted(hosts) != list(range(len(hosts))) or sum(len(batch["input_ids"]) for batch in hosts.values()) < LEAST_HOSTS:
        raise ValueError(f"there are not {LEAST_HOSTS} prompts for the causal test")
    for batch in hosts.values():
        ids, mask = batch["input_ids"], batch["attention_mask"]
        if ids.dim() != 2 or ids.dtype != torch.int64 or mask.shape != ids.shape or not bool((mask[:, -1] == 1).all()):
            raise ValueError("the causal test's prompts are not batches of tokens, padded on the left")
        if not all(bool(torch.isfinite(value).all()) for value in batch.values()):
            raise ValueError("the causal test's prompts hold values that are not finite")
    return tuple(hosts[k] for k in range(len(hosts)))
