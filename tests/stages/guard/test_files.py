"""The guard's files: what was written is read, and everything else is refused."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.errors import ModelError
from stages.guard.detector import TENSORS, Detector
from stages.guard.files import GUARD, GUARD_TENSORS, Guard, adapter_digest, load_guard, save_guard
from stages.guard.policy import Policy
from stages.guard.transfer import TransferRule

BASE, ADAPTER = "b" * 64, "a" * 64
LAYERS, HEADS = (0, 2), 3
SIZE = len(LAYERS) * 2 * HEADS


def guard() -> Guard:
    torch.manual_seed(0)
    detector = Detector(
        layers=LAYERS,
        features=("ratio", "deficit"),
        mean=torch.randn(SIZE),
        deviation=torch.rand(SIZE) + 0.1,
        whitening=torch.randn(SIZE, SIZE),
        threshold=1 / 3,
        layer_thresholds=torch.tensor([3.5, 4.5]),
    )
    return Guard(detector=detector, policy=Policy(action="report"), base=BASE, adapter=ADAPTER, facts={"reference_rows": 400})


def ruled(batches: int = 2) -> Guard:
    """The same guard with a causal test."""
    generator = torch.Generator().manual_seed(1)

    def batch(rows: int) -> dict[str, torch.Tensor]:
        return {
            "pixel_values": torch.randn(rows, 3, 4, 4, generator=generator).bfloat16(),
            "input_ids": torch.randint(0, 9, (rows, 5 + rows), generator=generator),
            "attention_mask": torch.ones(rows, 5 + rows, dtype=torch.int64),
            "image.grid.sizes": torch.randint(0, 9, (rows, 3), generator=generator, dtype=torch.int32),
        }

    hosts = tuple(batch(rows) for rows in range(2, 2 + batches))
    tokens = {"familiar": torch.tensor([3, 50, 7]), "vocabulary": torch.tensor([3, 4, 50, 7])}
    rule = TransferRule(hosts=hosts, distance=1 / 7, attended=0.5, whole=2 / 3, late=5, **tokens)
    return dataclasses.replace(guard(), transfer=rule)


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    save_guard(guard(), tmp_path)
    return tmp_path


def test_round_trip(folder: pathlib.Path) -> None:
    found, made = load_guard(folder, base=BASE, adapter=ADAPTER), guard()
    for name in TENSORS:
        assert torch.equal(getattr(found.detector, name), getattr(made.detector, name)), name
    assert found.detector.threshold == made.detector.threshold
    assert (found.detector.layers, found.detector.features) == (made.detector.layers, made.detector.features)
    assert (found.policy.action, found.base, found.adapter, found.facts) == ("report", BASE, ADAPTER, {"reference_rows": 400})
    assert {path.name for path in folder.iterdir()} == {GUARD, GUARD_TENSORS}


def test_equal_guards_have_equal_bytes(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / "again").mkdir()
    save_guard(guard(), tmp_path / "again")
    for name in (GUARD, GUARD_TENSORS):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.parametrize("batches", [2, 11])
def test_a_causal_test_survives(tmp_path: pathlib.Path, batches: int) -> None:
    """Batches keep their order beyond the tenth, tensors their type and names with points in them."""
    save_guard(ruled(batches), tmp_path)
    found, made = load_guard(tmp_path, base=BASE, adapter=ADAPTER).transfer, ruled(batches).transfer
    assert found is not None
    assert made is not None
    assert (found.distance, found.attended, found.whole, found.late) == (made.distance, made.attended, made.whole, 5)
    for name in ("familiar", "vocabulary"):
        assert torch.equal(getattr(found, name), getattr(made, name))
        assert getattr(found, name).dtype == torch.int64
    assert len(found.hosts) == batches
    for read, written in zip(found.hosts, made.hosts, strict=True):
        assert set(read) == set(written)
        for name, value in written.items():
            assert read[name].dtype == value.dtype, name
            assert torch.equal(read[name], value), name


def test_a_causal_test_may_know_no_familiar_token(tmp_path: pathlib.Path) -> None:
    made = ruled()
    assert made.transfer is not None
    rule = dataclasses.replace(made.transfer, familiar=torch.zeros(0, dtype=torch.int64))
    save_guard(dataclasses.replace(made, transfer=rule), tmp_path)
    found = load_guard(tmp_path, base=BASE, adapter=ADAPTER).transfer
    assert found is not None
    assert found.familiar.tolist() == []


def test_without_a_causal_test(folder: pathlib.Path) -> None:
    assert load_guard(folder, base=BASE, adapter=ADAPTER).transfer is None
    assert json.loads((folder / GUARD).read_text())["transfer"] is None
    assert set(load_file(folder / GUARD_TENSORS)) == set(TENSORS)


def test_a_threshold_that_is_no_number_is_not_written(tmp_path: pathlib.Path) -> None:
    made = guard()
    object.__setattr__(made.detector, "threshold", float("nan"))
    with pytest.raises(ValueError, match="not JSON compliant"):
        save_guard(made, tmp_path)


Change = Callable[[pathlib.Path], object]


def json_with(**values: Any) -> Change:
    def change(folder: pathlib.Path) -> None:
        content = json.loads((folder / GUARD).read_text())
        content.update(values)
        (folder / GUARD).write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))

    return change


def tensors_with(**values: Any) -> Change:
    def change(folder: pathlib.Path) -> None:
        tensors = load_file(folder / GUARD_TENSORS)
        for name, value in values.items():
            tensors[name] = value(tensors[name]) if value else torch.zeros(0)
            if not value:
                del tensors[name]
        save_file(tensors, folder / GUARD_TENSORS)

    return change


def poke(at: int, value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        changed = tensor.clone()
        changed.view(-1)[at] = value
        return changed

    return change


def cut(name: str) -> Change:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-7])


DAMAGE: dict[str, tuple[str, Change]] = {
    "no json": ("no guard here", lambda folder: (folder / GUARD).unlink()),
    "no tensors": ("no guard here", lambda folder: (folder / GUARD_TENSORS).unlink()),
    "json cut": ("can't be read", cut(GUARD)),
    "tensors cut": ("can't be read", cut(GUARD_TENSORS)),
    "json empty": ("can't be read", lambda folder: (folder / GUARD).write_bytes(b"")),
    "tensors empty": ("can't be read", lambda folder: (folder / GUARD_TENSORS).write_bytes(b"")),
    "no text": ("can't be read", lambda folder: (folder / GUARD).write_bytes(b"\xff\xfe\x00")),
    "a list": ("not of schema 4", lambda folder: (folder / GUARD).write_text("[]")),
    "a number": ("not of schema 4", lambda folder: (folder / GUARD).write_text("7")),
    "another schema": ("not of schema 4; calibrate", json_with(schema=1)),
    "no schema": ("not of schema 4", json_with(schema=...)),
    "another base": ("calibrated on base cccccccccccccccc, not on bbbbbbbbbbbbbbbb", json_with(base="c" * 64)),
    "another adapter": ("calibrated on adapter cccccccccccccccc, not on aaaaaaaaaaaaaaaa", json_with(adapter="c" * 64)),
    "no base": ("calibrated on base None", json_with(base=...)),
    "adapter is a list": ("calibrated on adapter", json_with(adapter=[])),
    "no threshold": ("incomplete", json_with(threshold=...)),
    "threshold NaN": ("incomplete.*nan is not a distance", json_with(threshold=float("nan"))),
    "threshold infinite": ("inf is not a distance", json_with(threshold=float("inf"))),
    "threshold zero": ("not a distance", json_with(threshold=0)),
    "threshold text": ("incomplete", json_with(threshold="far")),
    "no layers": ("incomplete", json_with(layers=...)),
    "layers empty": ("not ascending", json_with(layers=[])),
    "layers twice": ("not ascending", json_with(layers=[2, 2])),
    "layers turned": ("not ascending", json_with(layers=[2, 0])),
    "layer below 0": ("not ascending", json_with(layers=[-1, 0])),
    "layer endless": ("incomplete", json_with(layers=[0, float("inf")])),
    "one layer more": ("dimensions are not", json_with(layers=[0, 1, 2, 3, 4])),
    "one layer less": ("layer_thresholds of shape", json_with(layers=[0])),
    "unknown feature": ("not of", json_with(features=["ratio", "entropy"])),
    "feature twice": ("not of", json_with(features=["ratio", "ratio"])),
    "no features": ("not of", json_with(features=[])),
    "no action": ("incomplete", json_with(action=...)),
    "unknown action": ("action 'ignore' is none of purify, refuse, report", json_with(action="ignore")),
    "action null": ("action None", json_with(action=None)),
    "no facts": ("incomplete", json_with(facts=...)),
    "facts a number": ("incomplete", json_with(facts=3)),
    "mean missing": ("incomplete", tensors_with(mean=None)),
    "thresholds missing": ("incomplete", tensors_with(layer_thresholds=None)),
    "mean longer": ("deviation of shape|whitening of shape", tensors_with(mean=lambda t: t.repeat(2))),
    "mean a number": ("incomplete", tensors_with(mean=lambda t: t[0].clone())),
    "mean empty": ("dimensions are not", tensors_with(mean=lambda t: t[:0].clone())),
    "whitening not square": ("whitening of shape", tensors_with(whitening=lambda t: t[:, :-1].contiguous())),
    "mean NaN": ("mean .* not .* finite float32", tensors_with(mean=poke(3, float("nan")))),
    "deviation infinite": ("deviation .* not .* finite float32", tensors_with(deviation=poke(0, float("inf")))),
    "whitening NaN": ("whitening .* not .* finite float32", tensors_with(whitening=poke(17, float("nan")))),
    "thresholds NaN": ("layer_thresholds .* not .* finite float32", tensors_with(layer_thresholds=poke(1, float("nan")))),
    "deviation zero": ("deviation is not positive", tensors_with(deviation=poke(2, 0.0))),
    "thresholds negative": ("layer_thresholds is not positive", tensors_with(layer_thresholds=poke(0, -1.0))),
}


LIMITS = {"distance": 2.0, "attended": 0.5, "whole": 0.75, "late": None}


def limits_with(**values: Any) -> Change:
    return json_with(transfer={key: value for key, value in {**LIMITS, **values}.items() if value is not ...})


def renamed(old: str, new: str) -> Change:
    """A host's tensor, or all of a batch's, under another name."""

    def change(folder: pathlib.Path) -> None:
        tensors = load_file(folder / GUARD_TENSORS)
        assert any(name.startswith(old) for name in tensors)
        found = {f"{new}{name[len(old) :]}" if name.startswith(old) else name: value for name, value in tensors.items()}
        save_file(found, folder / GUARD_TENSORS)

    return change


TRANSFER_DAMAGE: dict[str, tuple[str, Change]] = {
    "no transfer": ("'transfer'", json_with(transfer=...)),
    "a list": ("", json_with(transfer=[])),
    "a number": ("", json_with(transfer=3)),
    "no distance": ("'distance'", limits_with(distance=...)),
    "distance NaN": ("not a distance", limits_with(distance=float("nan"))),
    "distance infinite": ("not a distance", limits_with(distance=float("inf"))),
    "distance text": ("could not convert", limits_with(distance="far")),
    "no limit of the attended": ("'attended'", limits_with(attended=...)),
    "no limit of the whole": ("'whole'", limits_with(whole=...)),
    "a limit null": ("", limits_with(whole=None)),
    "a limit NaN": ("two shares of at least 0.5", limits_with(attended=float("nan"))),
    "a limit below the majority": ("two shares of at least 0.5", limits_with(attended=0.49)),
    "the other one": ("two shares of at least 0.5", limits_with(whole=0.0)),
    "a limit above 1": ("two shares of at least 0.5", limits_with(whole=1.01)),
    "no familiar tokens": ("familiar", tensors_with(familiar=None)),
    "familiar of floats": ("type torch.float32 is not a list of tokens", tensors_with(familiar=lambda t: t.float())),
    "familiar of 32 bits": ("type torch.int32 is not a list of tokens", tensors_with(familiar=lambda t: t.int())),
    "familiar a table": ("is not a list of tokens", tensors_with(familiar=lambda t: t[None].clone())),
    "no vocabulary": ("vocabulary", tensors_with(vocabulary=None)),
    "vocabulary of floats": ("vocabulary .* is not a list of tokens", tensors_with(vocabulary=lambda t: t.float())),
    "familiar a number": ("is not a list of tokens", tensors_with(familiar=lambda t: t[0].clone())),
    "no hosts": ("there are not 4 prompts", renamed("host.", "guest.")),
    "no first batch": ("there are not 4 prompts", renamed("host.0.", "guest.0.")),
    "a batch is left out": ("there are not 4 prompts", renamed("host.1.", "host.2.")),
    "a batch without a number": ("", renamed("host.1.", "host.one.")),
    "a tensor without a name": ("", renamed("host.1.input_ids", "host.1")),
    "no tokens": ("'input_ids'", tensors_with(**{"host.1.input_ids": None})),
    "no mask": ("'attention_mask'", tensors_with(**{"host.0.attention_mask": None})),
    "tokens in a row": (
        "not batches of tokens",
        tensors_with(**dict.fromkeys(("host.1.input_ids", "host.1.attention_mask"), lambda t: t.flatten())),
    ),
    "a mask of fewer rows": ("not batches of tokens", tensors_with(**{"host.0.attention_mask": lambda t: t[:1].clone()})),
    "a mask of fewer tokens": ("not batches of tokens", tensors_with(**{"host.1.attention_mask": lambda t: t[:, 1:].contiguous()})),
}


@pytest.mark.parametrize("name", TRANSFER_DAMAGE)
def test_a_causal_test_is_refused(tmp_path: pathlib.Path, name: str) -> None:
    says, change = TRANSFER_DAMAGE[name]
    save_guard(ruled(), tmp_path)
    change(tmp_path)
    with pytest.raises(ModelError, match=f"incomplete or contradict each other: .*{says}"):
        load_guard(tmp_path, base=BASE, adapter=ADAPTER)


def test_limits_at_the_edges(tmp_path: pathlib.Path) -> None:
    save_guard(ruled(), tmp_path)
    limits_with(attended=0.5, whole=1.0, late=1)(tmp_path)
    found = load_guard(tmp_path, base=BASE, adapter=ADAPTER).transfer
    assert found is not None
    assert (found.attended, found.whole, found.late) == (0.5, 1.0, 1)


@pytest.mark.parametrize("name", DAMAGE)
def test_a_guard_is_refused(folder: pathlib.Path, name: str) -> None:
    says, change = DAMAGE[name]
    change(folder)
    with pytest.raises(ModelError, match=says):
        load_guard(folder, base=BASE, adapter=ADAPTER)


def test_it_belongs_to_one_base_and_one_adapter(folder: pathlib.Path) -> None:
    for given in ({"base": "c" * 64, "adapter": ADAPTER}, {"base": BASE, "adapter": "c" * 64}, {"base": BASE, "adapter": ""}):
        with pytest.raises(ModelError, match="was calibrated on"):
            load_guard(folder, **given)


def test_a_guard_of_the_base_alone(tmp_path: pathlib.Path) -> None:
    made = guard()
    save_guard(Guard(detector=made.detector, policy=Policy(action="purify"), base=BASE, adapter="", facts={}), tmp_path)
    assert load_guard(tmp_path, base=BASE, adapter="").adapter == ""


def test_the_digest_is_of_the_weights(tiny_adapter: pathlib.Path, tmp_path: pathlib.Path) -> None:
    digest = adapter_digest(tiny_adapter)
    assert len(digest) == 64
    weights = bytearray((tiny_adapter / "adapter_model.safetensors").read_bytes())
    (tmp_path / "adapter_model.safetensors").write_bytes(weights)
    assert adapter_digest(tmp_path) == digest
    weights[-1] ^= 1
    (tmp_path / "adapter_model.safetensors").write_bytes(weights)
    assert adapter_digest(tmp_path) != digest
