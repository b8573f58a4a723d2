"""What a serving process loads where a delivery is unusual; the guard stage's test loads one that was calibrated."""

from __future__ import annotations

import json
import pathlib
import shutil
from typing import Any

import pytest
import torch

from pipeline.errors import ModelError
from pipeline.models import EMBEDDED_BASE, base_identity
from stages.guard import load
from stages.guard.files import GUARD, Guard, adapter_digest, save_guard
from stages.guard.load import adapter_folder, load_guarded
from stages.guard.policy import Policy
from tests.stages.guard.detectors import plain_detector


@pytest.fixture
def delivery(tiny_base: pathlib.Path, tiny_adapter: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A delivery's folder with the tiny base's adapter and a guard made by hand."""
    adapter = tmp_path / "delivery" / "adapter"
    shutil.copytree(tiny_adapter, adapter)
    guard_for(adapter, base_identity(tiny_base))
    return tmp_path / "delivery"


def guard_for(adapter: pathlib.Path, base: str) -> None:
    guard = Guard(detector=plain_detector(), policy=Policy(action="report"), base=base, adapter=adapter_digest(adapter), facts={})
    save_guard(guard, adapter)


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a base fails the test."""

    def unwanted(*_: Any, **__: Any) -> Any:
        raise AssertionError("a base was loaded for nothing")

    monkeypatch.setattr(load, "load_base", unwanted)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_guarded_model(delivery: pathlib.Path, tiny_base: pathlib.Path, dtype: Any) -> None:
    guarded, processor = load_guarded(str(delivery), str(tiny_base), dtype=dtype, device="cpu")
    assert guarded.policy.action == "report"
    assert guarded.detector.threshold == plain_detector().threshold
    weights = dict(guarded.model.named_parameters())
    assert {value.dtype for name, value in weights.items() if "lora" not in name} >= {getattr(torch, dtype)}
    assert any("lora" in name for name in weights), "the adapter is on it"
    assert not guarded.model.training
    assert processor.tokenizer.padding_side == "left"
    guarded.detach()


def test_a_delivery_comes_before_a_loose_adapter(delivery: pathlib.Path) -> None:
    """A folder may look like both."""
    shutil.copy(delivery / "adapter" / "adapter_config.json", delivery)
    assert adapter_folder(delivery) == delivery / "adapter"
    (delivery / "adapter" / "adapter_config.json").unlink()
    assert adapter_folder(delivery) == delivery


@pytest.mark.usefixtures("no_model")
def test_without_a_base_the_embedded_one_is_meant(delivery: pathlib.Path) -> None:
    with pytest.raises(ModelError, match=f"calibrated on base .*, not on {base_identity(EMBEDDED_BASE)[:16]}"):
        load_guarded(delivery)


@pytest.mark.usefixtures("no_model")
def test_a_delivery_without_its_guard_is_not_loaded_unguarded(delivery: pathlib.Path, tiny_base: pathlib.Path) -> None:
    (delivery / "adapter" / GUARD).unlink()
    with pytest.raises(ModelError, match="no guard here"):
        load_guarded(delivery, tiny_base)


@pytest.mark.usefixtures("no_model")
def test_places_without_a_model(delivery: pathlib.Path, tiny_base: pathlib.Path, tmp_path: pathlib.Path) -> None:
    for place in (tmp_path, tmp_path / "nowhere", delivery / "adapter" / "adapter_config.json"):
        with pytest.raises(ModelError, match="neither a delivery nor an adapter folder"):
            load_guarded(place, tiny_base)
    with pytest.raises(ModelError, match="no model with"):
        load_guarded(delivery, tmp_path)


def test_a_guard_that_names_the_right_base_does_not_make_another_fit(delivery: pathlib.Path, tiny_base: pathlib.Path) -> None:
    """The adapter itself records its base; a guard that was edited by hand does not get past that."""
    record = delivery / "adapter" / "base.json"
    record.write_text(json.dumps({"identity": "0" * 64}))
    with pytest.raises(ModelError, match="made for base 0000000000000000, but"):
        load_guarded(delivery, tiny_base)
