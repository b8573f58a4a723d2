"""The speed bench: its memory count, and what it says of the extraction's memory; times are nothing for a test."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from benchmarks.guard_speed import IMAGE, TEXT, LiveBytes, build, extraction, guarded, peak_bytes, plain_prefill, prompts, purified


@pytest.fixture(scope="module")
def model() -> Any:
    return build("mid", "cpu")


def test_live_bytes() -> None:
    """Two of three tensors of a megabyte live at once; a view takes nothing."""
    with LiveBytes() as live:
        first = torch.ones(1 << 18)
        second = first + 1
        del first
        third = second.view(2, -1) * 2
        del second, third
        small = torch.ones(8)
    assert live.peak == 2 << 20
    assert small.sum() == 8


def test_extraction_needs_no_maps(model: Any) -> None:
    batch = prompts(model, 1)
    text = model.config.text_config
    maps = text.num_hidden_layers * text.num_attention_heads * (IMAGE + TEXT) ** 2 * 4
    with torch.inference_mode():
        plain, read = (peak_bytes(partial(way, model, batch), "cpu") for way in (plain_prefill, extraction))
    assert plain > 0
    assert read - plain < 0.01 * maps


@pytest.mark.parametrize("way", ["mask", "remove"])
def test_what_is_timed_closes_all_pictures(model: Any, way: str) -> None:
    with purified(model, prompts(model, 1, pictures=2), 2, way) as run:  # type: ignore[arg-type]
        run()
        (record,) = run.args[0].records  # type: ignore[attr-defined]
    assert (record.tokens_pruned, record.rewind_layer) == (2 * IMAGE, 2)


def test_who_is_flagged_and_tried(model: Any) -> None:
    batch = prompts(model, 1)
    for settings, expected in (({}, (False, False)), ({"flags": True}, (True, False)), ({"tried": True}, (False, True))):
        with guarded(model, batch, **settings) as run:
            run()
            (record,) = run.args[0].records  # type: ignore[attr-defined]
        assert (record.flagged, record.tried) == expected
