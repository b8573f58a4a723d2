"""One table that every family passes: the probe shows eager attention's row, changes nothing, and closes what it is told to."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.attention import NAME, Block, Tap, attached, tapped
from pipeline.decoder import attention_layers, is_hybrid
from pipeline.models import image_token_id
from tests.eager import NEVER, attention_modules, closed, eager_rows, eager_twin, generated, in_dtype
from tests.families import FAMILIES, build
from tests.family_parts import HEADS, Batch

BFLOAT16 = 0.06
"""How far two bfloat16 ways to one weight may lie apart: it has 8 bits, and its errors add up over the layers. Eager attention
itself is up to 0.04 from its float32 weights here. Twice that where the gated delta rule, which divides small numbers, comes
before."""

pytestmark = pytest.mark.usefixtures("_left_as_it_was")


@pytest.fixture(params=FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def implementations(model: Any) -> list[str]:
    """The attention of every configuration in the model, in the order of its modules."""
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    return [config._attn_implementation for config in configs.values()]


@pytest.fixture
def _left_as_it_was(name: str) -> Any:
    model = build(name).model
    before = implementations(model)
    yield
    assert implementations(model) == before


@torch.no_grad()
def observed(model: Any, batch: Batch) -> list[torch.Tensor]:
    """By layer, what the probe shows in one forward pass."""
    seen: dict[int, list[torch.Tensor]] = {}
    with attached(model), tapped(Tap(observer=lambda layer, row: seen.setdefault(layer, []).append(row))):
        model(**batch)
    assert sorted(seen) == list(range(len(seen)))
    assert all(len(rows) == 1 for rows in seen.values())
    return [seen[layer][0] for layer in range(len(seen))]


def test_the_batch_is_a_hard_one(name: str) -> None:
    built, family = build(name), FAMILIES[name]
    mask, image = built.batch["attention_mask"], built.batch["input_ids"] == image_token_id(built.model.config)
    assert len(set(mask.sum(1).tolist())) == len(mask), "rows of equal length"
    assert mask[:, -1].all()
    assert not mask[:, 0].all()
    assert not (image & (mask == 0)).any()
    assert image.any(1).tolist() == [bool(sizes) for _, sizes in family.asked]
    assert image[1].sum() >= 2 * 16, "not several pictures"


def test_the_row_is_the_last_of_eager_attention(name: str) -> None:
    model, batch = build(name).model, build(name).batch
    rows, expected = observed(model, batch), eager_rows(name, batch)
    assert len(rows) == len(expected) == FAMILIES[name].attention_layers
    for row, other in zip(rows, expected, strict=True):
        assert row.dtype == torch.float32
        assert row.shape == (len(batch["input_ids"]), HEADS, batch["input_ids"].shape[1])
        torch.testing.assert_close(row, other, atol=1e-5, rtol=0)
        assert not row.transpose(1, 2)[batch["attention_mask"] == 0].any(), "padding is attended to"
    assert max(float(row.amax(-1).mean()) for row in rows) > 0.1, "attention is too even to tell anything"


def test_the_row_in_bfloat16(name: str) -> None:
    model = in_dtype(name, torch.bfloat16)
    batch = {key: value.bfloat16() if value.is_floating_point() else value for key, value in build(name).batch.items()}
    expected = eager_rows(name, batch, torch.bfloat16)
    tolerance = BFLOAT16 * (2 if name == "qwen3_5" else 1)
    for row, other in zip(observed(model, batch), expected, strict=True):
        assert row.dtype == torch.float32
        torch.testing.assert_close(row, other.float(), atol=tolerance, rtol=0)


@torch.no_grad()
def test_the_output_is_the_model_s_own(name: str) -> None:
    """SDPA to the bit; where a family has no SDPA its own is eager attention, and the same to rounding."""
    model, batch, own = build(name).model, build(name).batch, FAMILIES[name].own
    assert model.config.get_text_config()._attn_implementation == own
    tolerance = 0.0 if own == "sdpa" else 1e-5
    expected, steps = model(**batch).logits, generated(model, batch)
    with attached(model):
        runs = [(model(**batch).logits, generated(model, batch))]
        with tapped(Tap(observer=lambda *_: None)):
            runs.append((model(**batch).logits, generated(model, batch)))
    for logits, found in runs:
        assert torch.equal(found.sequences, steps.sequences)
        for a, b in zip([logits, *found.scores], [expected, *steps.scores], strict=True):
            torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("from_layer", [(0, 0, 0), (1, 0, NEVER), (NEVER, 1, 0)])
def test_closed_columns_are_those_of_an_eager_mask(name: str, from_layer: tuple[int, ...]) -> None:
    model, batch, noise = build(name).model, build(name).batch, FAMILIES[name].noise
    columns = batch["input_ids"] == image_token_id(model.config)
    columns[:, ::3] = False
    columns[-1, -4] = True  # some text as well
    eager = eager_twin(name)
    with closed(eager, columns, from_layer) as left_out:
        logits, steps = eager(**batch).logits, generated(eager, batch)
    assert (max(left_out) > 0) == FAMILIES[name].windowed
    block = Block(keys=columns, from_layer=torch.tensor(from_layer))
    plain = generated(model, batch)
    with attached(model), tapped(Tap(block=block)):
        found, decoded = model(**batch).logits, generated(model, batch)
    open_ = batch["attention_mask"].bool() & ~columns  # what a closed token itself computes is read by nobody
    torch.testing.assert_close(found[open_], logits[open_], atol=noise, rtol=noise)
    assert torch.equal(decoded.sequences, steps.sequences)
    for a, b in zip(decoded.scores, steps.scores, strict=True):
        torch.testing.assert_close(a, b, atol=noise, rtol=noise)
    for row, first in enumerate(from_layer):
        changed = not torch.allclose(decoded.scores[0][row], plain.scores[0][row], atol=10 * noise)
        assert changed == (first < NEVER), row


def test_the_language_tower_alone_is_attached(name: str) -> None:
    model = build(name).model
    own = {id(module) for module in attention_modules(model)}
    assert {id(module) for module in attention_layers(model)} == own
    others = [m for m in model.modules() if hasattr(m, "config") and m.config is not model.config.get_text_config()]
    before = [module.config._attn_implementation for module in others]
    with attached(model):
        assert {module.config._attn_implementation for module in attention_modules(model)} == {NAME}
        assert [module.config._attn_implementation for module in others] == before


def test_which_families_are_hybrid() -> None:
    assert {name for name in FAMILIES if is_hybrid(build(name).model)} == {"lfm2_vl", "qwen3_5"}
