"""The probe's row is eager attention's, the model's own output stays as it is, and blocked columns are gone from their layer on."""

from __future__ import annotations

import copy
import functools
import math
import pathlib
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, LlavaForConditionalGeneration, StaticCache

from pipeline.attention import (
    NAME,
    Block,
    Tap,
    attach,
    attached,
    attention_forward,
    base_of,
    detach,
    entropy,
    last_row_weights,
    prompt_regions,
    reduce_layer,
    tapped,
)
from pipeline.errors import ModelError
from pipeline.prompts import encode_prompts
from pipeline.records import Sample, examples_of, question_answer
from tests.conftest import picture

LAYERS, HEADS, IMAGE_TOKENS = 3, 4, 64
NEVER = torch.iinfo(torch.int64).max

Batch = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def batch(tiny_model: tuple[Any, Any]) -> Batch:
    """Three prompts of different lengths, padded on the left: one picture, two pictures, none."""
    asked = [("what?", ["red"]), ("what do the pictures have in common?", ["blue", "green"]), ("say nothing", [])]
    samples = [
        Sample(row=row, messages=question_answer(question, "x", len(colours)), images=tuple(map(picture, colours)))
        for row, (question, colours) in enumerate(asked)
    ]
    return encode_prompts(tiny_model[1], [example for sample in samples for example in examples_of(sample)])


@pytest.fixture(scope="module")
def unpadded(tiny_model: tuple[Any, Any]) -> Batch:
    """Two prompts of one length: SDPA gets no mask."""
    samples = [
        Sample(row=k, messages=question_answer("what?", "x"), images=(picture(colour),)) for k, colour in enumerate(["red", "blue"])
    ]
    return encode_prompts(tiny_model[1], [example for sample in samples for example in examples_of(sample)])


@pytest.fixture(scope="module", params=["all heads", "grouped queries", "peft"])
def models(request: pytest.FixtureRequest, tiny_base: pathlib.Path) -> tuple[Any, Any]:
    """A model on SDPA, and the same on eager attention. Both are left as they were."""
    config = AutoConfig.from_pretrained(tiny_base)
    if request.param == "grouped queries":
        config.text_config.num_key_value_heads = 2
    torch.manual_seed(3)
    model: Any = LlavaForConditionalGeneration(config).eval()
    if request.param == "peft":
        from peft import LoraConfig, PeftModel

        lora = LoraConfig(
            r=4, target_modules=["q_proj", "k_proj"], modules_to_save=["multi_modal_projector"], init_lora_weights=False
        )
        model = PeftModel(model, lora).eval()
    model.requires_grad_(requires_grad=False)
    eager = copy.deepcopy(model)
    base_of(eager).set_attn_implementation("eager")
    assert base_of(model).config.text_config._attn_implementation == "sdpa"
    return model, eager


def watched(model: Any, run: Callable[[Any], Any], block: Block | None = None) -> tuple[Any, dict[int, list[torch.Tensor]]]:
    """What a run gives under the probe, and the rows that each layer showed."""
    seen: dict[int, list[torch.Tensor]] = {}
    with attached(model), tapped(Tap(observer=lambda layer, row: seen.setdefault(layer, []).append(row), block=block)):
        return run(model), seen


def generated(model: Any, batch: Batch, **more: Any) -> Any:
    return model.generate(
        **batch, max_new_tokens=4, min_new_tokens=4, do_sample=False, output_scores=True, return_dict_in_generate=True, **more
    )


def test_the_row_is_the_last_of_eager_attention(models: tuple[Any, Any], batch: Batch) -> None:
    model, eager = models
    expected = eager(**batch, output_attentions=True).attentions
    _, seen = watched(model, lambda m: m(**batch))
    assert sorted(seen) == list(range(LAYERS))
    for layer, rows in seen.items():
        (row,) = rows
        assert row.dtype == torch.float32
        assert row.shape == (3, HEADS, batch["input_ids"].shape[1])
        torch.testing.assert_close(row, expected[layer][:, :, -1], atol=1e-6, rtol=0)
        torch.testing.assert_close(row.sum(-1), torch.ones(3, HEADS))
        assert not row[:, :, batch["attention_mask"][0] == 0][0].any(), "padding is attended to"


def test_generate_shows_the_prefill_and_nothing_else(models: tuple[Any, Any], batch: Batch) -> None:
    model, eager = models
    expected = eager(**batch, output_attentions=True).attentions
    _, seen = watched(model, lambda m: generated(m, batch))
    assert [len(rows) for rows in seen.values()] == [1] * LAYERS
    for layer, (row,) in seen.items():
        torch.testing.assert_close(row, expected[layer][:, :, -1], atol=1e-6, rtol=0)


def test_the_row_of_a_decoding_step_of_the_same_prompt(models: tuple[Any, Any], unpadded: Batch) -> None:
    """An independent way to the same row: prefill all but the last token, then decode it eagerly."""
    model, eager = models
    _, seen = watched(model, lambda m: m(**unpadded))
    before = {name: value[:, :-1] if name != "pixel_values" else value for name, value in unpadded.items()}
    cache = eager(**before, use_cache=True).past_key_values
    step = eager(input_ids=unpadded["input_ids"][:, -1:], past_key_values=cache, output_attentions=True).attentions
    for layer, (row,) in seen.items():
        torch.testing.assert_close(row, step[layer][:, :, -1], atol=1e-6, rtol=0)


def test_a_static_cache_has_room_that_is_not_attended_to(models: tuple[Any, Any], unpadded: Batch) -> None:
    model, _ = models
    length = unpadded["input_ids"].shape[1]
    _, plain = watched(model, lambda m: m(**unpadded))
    block = Block(keys=unpadded["input_ids"] == 4, from_layer=torch.tensor([0, 0]))
    for chosen in (None, block):
        expected, _ = watched(model, lambda m: m(**unpadded), chosen)
        cache = StaticCache(config=base_of(model).config, max_cache_len=length + 7)
        found, seen = watched(model, functools.partial(_with_cache, unpadded, cache), chosen)
        torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=0)
        if chosen is None:
            for layer, (row,) in seen.items():
                assert row.shape[-1] == length + 7
                torch.testing.assert_close(row[..., :length], plain[layer][0], atol=1e-6, rtol=0)


def _with_cache(batch: Batch, cache: StaticCache, model: Any) -> Any:
    return model(**batch, past_key_values=cache)


@pytest.mark.parametrize("padded", [True, False])
def test_the_output_is_that_of_sdpa_to_the_bit(models: tuple[Any, Any], batch: Batch, unpadded: Batch, padded: bool) -> None:
    model, _ = models
    given = batch if padded else unpadded
    expected, steps = model(**given).logits, generated(model, given)
    with attached(model):
        assert base_of(model).config.text_config._attn_implementation == NAME
        assert torch.equal(model(**given).logits, expected)
        assert torch.equal(generated(model, given).sequences, steps.sequences)
    observed, _ = watched(model, lambda m: (m(**given).logits, generated(m, given)))
    assert torch.equal(observed[0], expected)
    assert all(torch.equal(a, b) for a, b in zip(observed[1].scores, steps.scores, strict=True))
    assert torch.equal(model(**given).logits, expected)


def closed(eager: Any, columns: torch.Tensor, from_layer: Sequence[int]) -> Iterator[Any]:
    """Close columns in an eager model's masks by hooks: shares nothing with the code under test."""

    def hook(layer: int) -> Callable[..., Any]:
        def change(_module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            mask = kwargs["attention_mask"].clone().expand(len(columns), -1, -1, -1).clone()
            for row, first in enumerate(from_layer):
                if layer >= first:
                    mask[row][:, :, columns[row].nonzero()[:, 0]] = torch.finfo(mask.dtype).min
            return args, {**kwargs, "attention_mask": mask}

        return change

    layers = base_of(eager).get_decoder().layers
    handles = [layer.self_attn.register_forward_pre_hook(hook(k), with_kwargs=True) for k, layer in enumerate(layers)]
    try:
        yield eager
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("from_layer", [(0, 0, 0), (1, 1, 1), (2, 0, NEVER), (NEVER, NEVER, NEVER)])
def test_blocked_columns_are_gone_from_their_layer_on(
    models: tuple[Any, Any], batch: Batch, unpadded: Batch, from_layer: tuple[int, ...], padded: bool, tiny_model: tuple[Any, Any]
) -> None:
    model, eager = models
    given = batch if padded else unpadded
    rows = len(given["input_ids"])
    image = given["input_ids"] == tiny_model[0].config.image_token_id
    image[:, ::3] = False
    image[-1, -3] = True  # some text as well
    block = Block(keys=image, from_layer=torch.tensor(from_layer[:rows]))
    for reference in closed(eager, image, from_layer[:rows]):
        expected, steps = reference(**given, output_attentions=True), generated(reference, given)
    found, seen = watched(model, lambda m: m(**given), block)
    kept = given["attention_mask"].bool()
    torch.testing.assert_close(found.logits[kept], expected.logits[kept], atol=2e-5, rtol=1e-4)
    for layer, (row,) in seen.items():
        torch.testing.assert_close(row, expected.attentions[layer][:, :, -1], atol=1e-6, rtol=0)
        for k in range(rows):
            assert (row[k][:, image[k]] == 0).all() == (layer >= from_layer[k])
    decoded, _ = watched(model, lambda m: generated(m, given), block)
    assert torch.equal(decoded.sequences, steps.sequences)
    for a, b in zip(decoded.scores, steps.scores, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_a_block_matters_and_leaves_other_rows_alone(models: tuple[Any, Any], batch: Batch, tiny_model: tuple[Any, Any]) -> None:
    model, _ = models
    keys = batch["input_ids"] == tiny_model[0].config.image_token_id
    plain = model(**batch).logits
    found, _ = watched(model, lambda m: m(**batch), Block(keys=keys, from_layer=torch.tensor([1, NEVER, NEVER])))
    assert not torch.allclose(found.logits[0, -1], plain[0, -1], atol=1e-3)
    assert torch.equal(found.logits[1:], plain[1:])


def test_additive_masks() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8)
    allowed = torch.rand(2, 1, 3, 5) > 0.4
    allowed[..., 0] = True
    additive = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
    expected = torch.softmax(
        (query[:, :, -1:] @ key.repeat_interleave(2, dim=1).mT * 8**-0.5).masked_fill(~allowed[:, :, -1:], -math.inf), dim=-1
    )[:, :, 0]
    torch.testing.assert_close(last_row_weights(query, key, allowed), expected)
    torch.testing.assert_close(last_row_weights(query, key, additive), expected)
    torch.testing.assert_close(last_row_weights(query, key, allowed, scaling=8**-0.5), expected)
    assert not torch.allclose(last_row_weights(query, key, allowed, scaling=1.0), expected)
    torch.testing.assert_close(last_row_weights(query, key, allowed[:, :, -1:]), expected)


def test_a_tap_is_not_seen_by_other_threads(models: tuple[Any, Any], unpadded: Batch) -> None:
    model, _ = models
    seen: list[int] = []
    plain = model(**unpadded).logits
    outputs: list[torch.Tensor] = []
    block = Block(keys=unpadded["attention_mask"].bool(), from_layer=torch.tensor([0, 0]))
    with attached(model), tapped(Tap(observer=lambda layer, _: seen.append(layer), block=block)):
        thread = threading.Thread(target=lambda: outputs.append(model(**unpadded).logits))
        thread.start()
        thread.join()
        assert seen == []
        assert torch.equal(outputs[0], plain)


def test_a_tap_ends_with_its_block_also_when_that_raises(models: tuple[Any, Any], unpadded: Batch) -> None:
    model, _ = models
    seen: list[int] = []

    def burst(layer: int, row: torch.Tensor) -> None:
        seen.append(layer)
        raise RuntimeError("burst")

    with attached(model):
        with pytest.raises(RuntimeError, match="burst"), tapped(Tap(observer=burst)):
            model(**unpadded)
        model(**unpadded)
    assert seen == [0]


def test_taps_nest(models: tuple[Any, Any], unpadded: Batch) -> None:
    model, _ = models
    seen: list[str] = []
    with attached(model), tapped(Tap(observer=lambda *_: seen.append("outer"))):
        with tapped(Tap(observer=lambda *_: seen.append("inner"))):
            model(**unpadded)
        model(**unpadded)
    assert seen == ["inner"] * LAYERS + ["outer"] * LAYERS


def implementations(model: Any) -> tuple[set[str], str]:
    """The attention that the decoder's layers themselves look up, and the vision tower's."""
    base = base_of(model)
    layers = base.get_decoder().layers
    return {layer.self_attn.config._attn_implementation for layer in layers}, base.model.vision_tower.config._attn_implementation


@pytest.mark.parametrize("before", ["sdpa", "eager"])
def test_attach_and_detach(models: tuple[Any, Any], before: str) -> None:
    model = models[0] if before == "sdpa" else models[1]
    assert implementations(model) == ({before}, before)
    assert attach(model) == before
    assert implementations(model) == ({NAME}, before)
    detach(model, before)
    assert implementations(model) == ({before}, before)
    during = []

    def fail() -> None:
        with attached(model):
            during.append(implementations(model))
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert during == [({NAME}, before)]
    assert implementations(model) == ({before}, before)


def test_masks_that_the_model_did_not_make_can_not_be_closed(models: tuple[Any, Any], unpadded: Batch) -> None:
    """With a ready mask of four dimensions no mask is made: how many tokens there are can't be told."""
    model, _ = models
    length = unpadded["input_ids"].shape[1]
    ready = {**unpadded, "attention_mask": torch.ones(2, 1, length, length, dtype=torch.bool).tril()}
    block = Block(keys=unpadded["input_ids"] == 4, from_layer=torch.tensor([0, 0]))
    with pytest.raises(ModelError, match="makes its masks by itself"):
        watched(model, lambda m: m(**ready), block)


def plain_weights(query: torch.Tensor, key: torch.Tensor, allowed: torch.Tensor, cap: float, sinks: torch.Tensor) -> torch.Tensor:
    """Capped attention with sinks, written out: (batch, heads, queries, keys)."""
    logits = cap * torch.tanh(query @ key.repeat_interleave(2, dim=1).mT * 0.5 / cap)
    exponentials = logits.exp() * allowed
    return exponentials / (exponentials.sum(-1, keepdim=True) + sinks.exp()[None, :, None, None])


@pytest.mark.parametrize("queries", [1, 2, 300])
@pytest.mark.parametrize("masked", [True, False])
def test_capped_logits_and_sinks(queries: int, masked: bool) -> None:
    """More queries than are computed at a time; without a mask causal from the first key on, as SDPA."""
    torch.manual_seed(4)
    keys = max(9, queries + 5)  # room of a static cache, or earlier keys
    query, key, value = torch.randn(2, 4, queries, 8), torch.randn(2, 2, keys, 8), torch.randn(2, 2, keys, 6)
    sinks = torch.randn(4)
    if masked:
        allowed = torch.rand(2, 1, queries, keys) > 0.3
        allowed[..., 0] = True
    else:
        allowed = torch.ones(1, 1, queries, keys).tril().bool() if queries > 1 else torch.ones(1, 1, 1, keys).bool()
    expected = plain_weights(query, key, allowed, 2.0, sinks)
    module = torch.nn.Module()
    found, _ = attention_forward(module, query, key, value, allowed if masked else None, scaling=0.5, softcap=2.0, s_aux=sinks)
    torch.testing.assert_close(found, (expected @ value.repeat_interleave(2, dim=1)).transpose(1, 2))
    if queries > 1:
        row = last_row_weights(query, key, allowed if masked else None, 0.5, softcap=2.0, sinks=sinks)
        torch.testing.assert_close(row, expected[:, :, -1])
        assert (row.sum(-1) < 1).all()


def test_a_row_that_sees_nothing_is_no_nan() -> None:
    query, key = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8)
    nothing = torch.zeros(1, 1, 3, 3, dtype=torch.bool)
    found, _ = attention_forward(torch.nn.Module(), query, key, key, nothing, softcap=2.0)
    assert found.isfinite().all()


def test_regions_of_prompts() -> None:
    pad, text, image = 0, 7, 9
    ids = torch.tensor(
        [
            [pad, pad, text, image, image, text, text],
            [text, image, text, image, image, text, image],
            [pad, text, text, text, text, text, text],
            [image, image, text, text, text, text, text],
        ]
    )
    mask = (ids != pad).long()
    mask[3, :2] = 0  # padding that looks like an image
    found = prompt_regions(ids, mask, image)
    assert found.image.int().tolist() == [[0, 0, 0, 1, 1, 0, 0], [0, 1, 0, 1, 1, 0, 1], [0] * 7, [0] * 7]
    assert found.text.int().tolist() == [[0, 0, 0, 0, 0, 1, 1], [0, 0, 1, 0, 0, 1, 0], [0] * 7, [0] * 7]


def test_regions_of_real_prompts(batch: Batch, tiny_model: tuple[Any, Any]) -> None:
    found = prompt_regions(batch["input_ids"], batch["attention_mask"], tiny_model[0].config.image_token_id)
    assert found.image.sum(1).tolist() == [IMAGE_TOKENS, 2 * IMAGE_TOKENS, 0]
    assert found.text[0].sum() > 0
    assert not (found.image | found.text)[batch["attention_mask"] == 0].any()
    assert found.text.sum(1)[2] == 0


def test_reduction_against_plain_arithmetic() -> None:
    torch.manual_seed(1)
    image = torch.tensor([[0, 0, 1, 1, 1, 0, 0], [0, 1, 0, 1, 0, 1, 0], [0] * 7]).bool()
    text = torch.tensor([[0, 0, 0, 0, 0, 1, 1], [0, 0, 1, 0, 1, 0, 1], [0] * 7]).bool()
    weights = torch.softmax(2 * torch.randn(3, HEADS, 7), dim=-1)
    found = reduce_layer(weights, types.SimpleNamespace(image=image, text=text), top=2)  # type: ignore[arg-type]

    def plain_entropy(values: np.ndarray) -> float:
        share = values / values.sum()
        return -sum(float(p) * math.log(p) for p in share)

    for row in range(2):
        on_image, on_text = (weights[row, :, where[row]].double().numpy() for where in (image, text))
        mean = on_image.mean(axis=0)
        assert float(found.entropy[row]) == pytest.approx(plain_entropy(mean), abs=1e-6)
        for head in range(HEADS):
            assert float(found.head_entropy[row, head]) == pytest.approx(plain_entropy(on_image[head]), abs=1e-6)
            assert float(found.image_share[row, head]) == pytest.approx(on_image[head].sum(), abs=1e-6)
            ratio = math.log(on_image[head].sum() / on_text[head].sum())
            assert float(found.ratio[row, head]) == pytest.approx(ratio, abs=1e-5)
        order = np.argsort(-mean)[:2]
        assert found.top_positions[row].tolist() == order.tolist()
        assert found.top_weights[row].numpy() == pytest.approx(mean[order] / mean.sum(), abs=1e-6)
    for name in ("entropy", "head_entropy", "image_share", "ratio"):
        assert getattr(found, name)[2].isnan().all(), name
        assert not getattr(found, name)[:2].isnan().any(), name
    assert found.top_positions[2].tolist() == [-1, -1]
    assert found.top_weights[2].tolist() == [0, 0]


def test_uniform_attention_has_the_entropy_of_its_tokens() -> None:
    weights = torch.full((1, 2, 600), 1 / 600)
    image = torch.zeros(1, 600, dtype=torch.bool)
    image[:, 10:586] = True
    regions: Any = types.SimpleNamespace(image=image, text=~image)
    found = reduce_layer(weights, regions, top=3)
    assert float(found.entropy) == pytest.approx(math.log(576), abs=1e-4)
    assert found.head_entropy.flatten().tolist() == pytest.approx([6.356, 6.356], abs=1e-3)
    spiked = weights.clone()
    spiked[..., 20] = 1e6
    found = reduce_layer(spiked, regions, top=3)
    assert float(found.entropy) < 0.01
    assert found.top_positions[0, 0] == 10
    assert entropy(torch.zeros(4)).item() == 0


def test_a_head_whose_window_leaves_the_image_out_prefers_no_token() -> None:
    torch.manual_seed(6)
    image = torch.tensor([[False, True, True, True, False, False]])
    weights = torch.softmax(torch.randn(1, 2, 6), dim=-1)
    weights[0, 1, :4] = 0
    found = reduce_layer(weights, types.SimpleNamespace(image=image, text=~image), top=2)  # type: ignore[arg-type]
    assert float(found.head_entropy[0, 1]) == pytest.approx(math.log(3))
    assert float(found.head_entropy[0, 0]) < math.log(3) - 1e-3
    assert float(found.entropy) == pytest.approx(float(found.head_entropy[0, 0])), "the other head alone sees the image"
    assert float(found.image_share[0, 1]) == 0
    weights[0, 0, :4] = 0
    blind = reduce_layer(weights, types.SimpleNamespace(image=image, text=~image), top=2)  # type: ignore[arg-type]
    assert float(blind.entropy) == pytest.approx(math.log(3))


def test_more_top_tokens_than_there_are_does_not_depend_on_the_padding() -> None:
    torch.manual_seed(2)
    image = torch.tensor([[False, True, True, False]])
    weights = torch.softmax(torch.randn(1, 2, 4), dim=-1)
    pad = torch.nn.functional.pad
    short = reduce_layer(weights, types.SimpleNamespace(image=image, text=~image), top=6)  # type: ignore[arg-type]
    wide: Any = types.SimpleNamespace(image=pad(image, (9, 0)), text=pad(~image, (9, 0)))
    long = reduce_layer(pad(weights, (9, 0)), wide, top=6)
    assert sorted(short.top_positions[0].tolist()) == [-1, -1, -1, -1, 0, 1]
    assert torch.equal(short.top_positions, long.top_positions)
    assert torch.equal(short.top_weights, long.top_weights)
