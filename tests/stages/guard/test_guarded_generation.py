"""Every way to generate gives what the model gives, or in flagged rows what a run without their tokens gives; or is refused."""

from __future__ import annotations

import concurrent.futures
import contextlib
import copy
import dataclasses
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import CompileConfig, DynamicCache, GenerationConfig, StaticCache, StoppingCriteriaList
from transformers.generation import BaseStreamer

from pipeline.attention import Block, Tap, attached, tapped
from pipeline.errors import ConfigError, RefusedInputError
from pipeline.models import image_token_id
from pipeline.prompts import encode_prompts
from pipeline.records import Example, Message, question_answer
from stages.guard.detector import Detector
from stages.guard.files import Guard
from stages.guard.guarded import GuardedModel
from stages.guard.policy import Action, Policy
from stages.guard.purify import rewind_layers, stealing_heads, stealing_tokens
from stages.guard.transfer import Carried, TransferRule, TransferTest
from tests.eager import NEVER, eager_rows, generated, in_dtype, plain_vectors
from tests.families import FAMILIES, build
from tests.family_parts import WINDOW, Batch
from tests.stages.guard.test_guarded_families import Seen, detector_for, harmless
from tests.stages.samples import noise

STEPS = 6
SEED = 11
Way = Callable[[Any], dict[str, Any]]
"""Arguments of `generate`, made anew for each call of a model."""


def text_config(model: Any) -> Any:
    return model.config.get_text_config()


WAYS: dict[str, Way] = {
    "greedy": lambda _: {},
    "sampling": lambda _: {"do_sample": True, "temperature": 1.5, "top_k": 40},
    "several samples": lambda _: {"do_sample": True, "num_return_sequences": 3},
    "beams": lambda _: {"num_beams": 3},
    "several beams": lambda _: {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5},
    "sampled beams": lambda _: {"num_beams": 2, "do_sample": True},
    "no cache": lambda _: {"use_cache": False},
    "dynamic": lambda _: {"cache_implementation": "dynamic"},
    "static": lambda _: {"cache_implementation": "static"},
    "static beams": lambda _: {"cache_implementation": "static", "num_beams": 2},
    "hybrid, which is static": lambda _: {"generation_config": GenerationConfig(cache_implementation="hybrid")},
    "a cache of one's own": lambda model: {"past_key_values": DynamicCache(config=text_config(model))},
    "without its windows": lambda _: {"past_key_values": DynamicCache()},
    "a static one": lambda model: {"past_key_values": StaticCache(config=text_config(model), max_cache_len=192)},
    "processors": lambda _: {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "bad_words_ids": [[57], [109]]},
}
NAMES = ("llava", "gemma3", "paligemma2", "internvl_gpt_oss", "qwen2_5_vl", "llama4")
"""All have grouped queries; all but the first a window or chunks shorter than a prompt, the third capped logits, the fourth sinks,
the fifth several position axes."""
STATIC = {"static", "static beams", "hybrid, which is static", "a static one"}
EXPANDED = {"several samples", "beams", "several beams", "sampled beams", "static beams"}


def cases() -> list[tuple[str, str]]:
    """Families and ways, without those that transformers 5.23 fails at by itself: Llama 4 does not repeat pictures for beams."""
    failing = {"llama4": EXPANDED, **{name: STATIC for name in NAMES if not FAMILIES[name].static}}
    return [(name, way) for name in NAMES for way in WAYS if way not in failing.get(name, ())]


@contextlib.contextmanager
def same_kernel(name: str) -> Iterator[None]:
    """Where a family's own attention is not SDPA, the unguarded model computes with the guard's."""
    with attached(build(name).model) if FAMILIES[name].own == "eager" else contextlib.nullcontext():
        yield


def asked(model: Any, batch: Batch, way: dict[str, Any], steps: int = STEPS) -> Any:
    torch.manual_seed(SEED)
    return generated(model, batch, steps, **way)


def seen_of(name: str, batch: Batch) -> Seen:
    ids, mask, token = batch["input_ids"], batch["attention_mask"], image_token_id(build(name).model.config)
    rows = eager_rows(name, batch)
    vectors = plain_vectors(rows, ids.numpy(), mask.numpy(), token)
    return Seen(vectors=torch.from_numpy(vectors).float(), rows=rows, image=(ids == token) & mask.bool())


@dataclasses.dataclass(frozen=True)
class Flagging:
    """A detector that flags one row alone, and what is closed of it: bool (batch, keys) from a layer on."""

    row: int
    rewind: int
    detector: Detector
    tokens: torch.Tensor

    def block(self, beams: int = 1) -> Block:
        layers = torch.where(self.tokens.any(1), self.rewind, NEVER)
        return Block(keys=self.tokens.repeat_interleave(beams, 0), from_layer=layers.repeat_interleave(beams))


def flagging(name: str, batch: Batch, row: int, rewind: int = 1) -> Flagging:
    seen = seen_of(name, batch)
    detector = detector_for(seen, row, rewind)
    deviations = detector.deviations(seen.vectors)
    tokens = stealing_tokens(dict(enumerate(seen.rows)), seen.image, stealing_heads(detector, deviations))
    tokens &= (torch.arange(len(tokens)) == row)[:, None]
    assert rewind_layers(detector, deviations)[row] == rewind
    assert 0 < tokens.sum() < seen.image[row].sum()
    return Flagging(row=row, rewind=rewind, detector=detector, tokens=tokens)


def rows_of(row: int, count: int) -> list[int]:
    """The rows that `count` answers to an input take in what is returned."""
    return list(range(row * count, (row + 1) * count))


@pytest.mark.parametrize(("name", "way"), cases())
def test_unflagged_inputs_get_the_models_own_answers(name: str, way: str) -> None:
    built = build(name)
    with same_kernel(name):
        plain = asked(built.model, built.batch, WAYS[way](built.model))
    with GuardedModel(built.model, harmless(FAMILIES[name].attention_layers)) as guarded:
        found = asked(guarded, built.batch, WAYS[way](built.model))
        assert [(record.ran, record.flagged) for record in guarded.records] == [(bool(e.images), False) for e in built.examples]
    assert torch.equal(found.sequences, plain.sequences)
    assert all(torch.equal(a, b) for a, b in zip(found.scores, plain.scores, strict=True))


@pytest.mark.parametrize(("name", "way"), cases())
def test_a_flagged_input_gets_the_answers_of_a_run_without_its_tokens(name: str, way: str) -> None:
    built, flags = build(name), flagging(name, build(name).batch, 1)
    settings = WAYS[way](built.model)
    returned = settings.get("num_return_sequences", 1)
    beams = max(settings.get("num_beams", 1), returned)
    with attached(built.model):
        plain = asked(built.model, built.batch, WAYS[way](built.model))
        with tapped(Tap(block=flags.block(beams))):
            reference = asked(built.model, built.batch, WAYS[way](built.model))
    with GuardedModel(built.model, flags.detector) as guarded:
        found = asked(guarded, built.batch, settings)
        records = guarded.records
    assert [record.flagged for record in records] == [False, True, False]
    assert (records[1].tokens_pruned, records[1].rewind_layer) == (int(flags.tokens.sum()), 1)
    assert torch.equal(found.sequences, reference.sequences)
    others = rows_of(0, returned) + rows_of(2, returned)
    assert torch.equal(found.sequences[others], plain.sequences[others])
    expanded = rows_of(1, beams)
    for a, b in zip(found.scores, reference.scores, strict=True):
        assert torch.equal(a[expanded], b[expanded])
    assert not torch.allclose(found.scores[0][expanded], plain.scores[0][expanded], atol=1e-2), "nothing was closed"


@pytest.mark.parametrize("name", ["llava", "gemma3"])
@pytest.mark.parametrize("way", [way for way in WAYS if way not in STATIC])
def test_tokens_taken_out_of_the_cache_are_closed_in_every_way_to_generate(name: str, way: str) -> None:
    """Static caches are never cut; the others are where they grow."""
    built, flags = build(name), flagging(name, build(name).batch, 1)
    found = []
    for policy in (Policy(pruning="mask"), Policy(pruning="remove")):
        with GuardedModel(built.model, flags.detector, policy=policy) as guarded:
            found.append(asked(guarded, built.batch, WAYS[way](built.model)))
            assert [record.flagged for record in guarded.records] == [False, True, False]
    assert torch.equal(found[0].sequences, found[1].sequences)
    for a, b in zip(found[0].scores, found[1].scores, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["gemma3", "paligemma2", "internvl_gpt_oss", "mistral3", "aya_vision", "llama4"])
@pytest.mark.parametrize("flagged", [False, True])
def test_an_answer_that_is_longer_than_the_window(name: str, flagged: bool) -> None:
    """The picture leaves the windows while the answer is written."""
    built, flags, steps = build(name), flagging(name, build(name).batch, 0), WINDOW + 4
    assert built.batch["input_ids"].shape[1] > WINDOW
    tap = Tap(block=flags.block() if flagged else None)
    with attached(built.model), tapped(tap):
        reference = asked(built.model, built.batch, {}, steps)
    with GuardedModel(built.model, flags.detector if flagged else harmless(FAMILIES[name].attention_layers)) as guarded:
        found = asked(guarded, built.batch, {}, steps)
        assert [record.flagged for record in guarded.records] == [flagged, False, False]
    assert torch.equal(found.sequences, reference.sequences)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(found.scores, reference.scores, strict=True))


def first_of(batch: Batch) -> Batch:
    return {name: value[:1] for name, value in batch.items()}


REFUSED: dict[str, tuple[Way, str]] = {
    "assistant_model": (lambda model: {"assistant_model": model}, "drafts tokens into the prompt's prefill"),
    "prompt_lookup_num_tokens": (lambda _: {"prompt_lookup_num_tokens": 2}, "drafts tokens"),
    "assistant_early_exit": (lambda _: {"assistant_early_exit": 1}, "drafts tokens"),
    "use_mtp": (lambda _: {"use_mtp": True}, "drafts tokens"),
    "prefill_chunk_size": (lambda _: {"prefill_chunk_size": 16}, "which the guard must see whole"),
    "token_healing": (lambda _: {"token_healing": True}, "changes the prompt"),
    "guidance_scale": (lambda _: {"guidance_scale": 1.5}, "on a second prompt"),
    "negative_prompt_ids": (lambda _: {"negative_prompt_ids": torch.ones(1, 4, dtype=torch.int64)}, "on a second prompt"),
    "custom_generate": (lambda _: {"custom_generate": lambda *_, **__: None}, "other code"),
    "trust_remote_code": (lambda _: {"trust_remote_code": True, "dola_layers": "low"}, "other code"),
    "output_attentions": (lambda _: {"output_attentions": True}, "does not make"),
    "compile_config": (lambda _: {"compile_config": CompileConfig(fullgraph=True)}, "leave fullgraph at False"),
    "offloaded": (lambda _: {"cache_implementation": "offloaded"}, "a cache that is offloaded; use dynamic or static"),
    "offloaded_static": (lambda _: {"cache_implementation": "offloaded_static"}, "a cache that is offloaded_static"),
    "quantized": (lambda _: {"cache_implementation": "quantized"}, "a cache that is quantized"),
    "paged": (lambda _: {"cache_implementation": "paged"}, "a cache that is paged"),
    "a cache of another kind": (lambda _: {"past_key_values": OtherCache()}, "a DynamicCache or StaticCache alone"),
    "inputs_embeds": (lambda _: {"inputs_embeds": torch.zeros(1, 42, 48)}, "give input_ids, and no inputs_embeds"),
}
"""What is refused, and what the message says; it begins with the setting's name."""


class OtherCache(DynamicCache):  # type: ignore[misc]
    """Stands for a cache that keeps its keys in a form of its own."""


@contextlib.contextmanager
def passes_of(model: Any) -> Iterator[list[int]]:
    """Prompt lengths of the forward passes of a model."""
    lengths: list[int] = []

    def note(_module: Any, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        lengths.append(kwargs["input_ids"].shape[1])

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield lengths
    finally:
        handle.remove()


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("on_error", ["raise", "pass"])
def test_what_is_refused_by_name_before_anything_runs(name: str, on_error: Any) -> None:
    """Whatever happens when the guard fails: it did not."""
    built = build("llava")
    way, says = REFUSED[name]
    settings = way(built.model)
    with GuardedModel(built.model, harmless(3), policy=Policy(on_error=on_error)) as guarded:
        with passes_of(built.model) as lengths, pytest.raises(ConfigError) as refused:
            asked(guarded, first_of(built.batch), settings)
        assert lengths == []
        assert guarded.records == []
        assert not any(guarded.counters().values())
    assert says in str(refused.value)
    named = str(refused.value).split(":")[0]
    assert named in settings or name == "inputs_embeds"


@pytest.mark.parametrize(
    "settings", [{"prompt_lookup_num_tokens": 2}, {"guidance_scale": 2.0}, {"cache_implementation": "quantized"}, {"use_mtp": True}]
)
def test_settings_are_found_wherever_they_stand(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """In a generation configuration that is given, and in the model's own; an argument of the call goes before both."""
    built = build("llava")
    (name,) = settings
    with GuardedModel(built.model, harmless(3)) as guarded:
        with pytest.raises(ConfigError, match=f"^{name}: "):
            guarded.generate(**first_of(built.batch), generation_config=GenerationConfig(**settings))
        monkeypatch.setattr(built.model.generation_config, name, settings[name])
        with pytest.raises(ConfigError, match=f"^{name}: "):
            guarded.generate(**first_of(built.batch))
        neutral = {"prompt_lookup_num_tokens": None, "guidance_scale": 1.0, "cache_implementation": "dynamic", "use_mtp": False}
        asked(guarded, first_of(built.batch), {name: neutral[name]})
        assert len(guarded.records) == 1


def test_why_drafts_are_refused() -> None:
    """transformers' first forward pass holds the assistant's tokens beside the prompt; when it does not, allow it."""
    built = build("llava")
    batch, assistant = first_of(built.batch), copy.deepcopy(built.model)
    with passes_of(built.model) as lengths:
        asked(built.model, batch, {"assistant_model": assistant})
    assert lengths[0] > batch["input_ids"].shape[1]


def turns(*, second_picture: bool) -> Batch:
    """A chat's second turn: the first turn's question, picture and answer stand in the prompt."""
    first, answer = question_answer("what?", "a red one")
    again, _ = question_answer("and what might this be?", "x", int(second_picture))
    prompt: tuple[Message, ...] = (first, answer, again)
    pictures = tuple(noise(seed, (32, 32)) for seed in range(70, 71 + second_picture))
    other = Example(
        row=1, turn=0, prompt=question_answer("which of them two?", "x", 1)[:1], answer="", images=(noise(3, (32, 32)),)
    )
    chat = Example(row=0, turn=1, prompt=prompt, answer="", images=pictures)
    return encode_prompts(build("llava").processor, [chat, other])


@pytest.mark.parametrize("second_picture", [False, True])
def test_the_second_turn_of_a_chat(second_picture: bool) -> None:
    """All pictures of the conversation are looked at, and closed where they steal."""
    built, batch = build("llava"), turns(second_picture=second_picture)
    flags = flagging("llava", batch, 0)
    plain = asked(built.model, batch, {})
    with attached(built.model), tapped(Tap(block=flags.block())):
        reference = asked(built.model, batch, {})
    with GuardedModel(built.model, harmless(3)) as guarded:
        found = asked(guarded, batch, {})
        assert all(record.ran for record in guarded.records)
    assert torch.equal(found.sequences, plain.sequences)
    assert all(torch.equal(a, b) for a, b in zip(found.scores, plain.scores, strict=True))
    with GuardedModel(built.model, flags.detector) as guarded:
        found = asked(guarded, batch, {})
        assert [record.flagged for record in guarded.records] == [True, False]
    assert torch.equal(found.sequences, reference.sequences)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(found.scores, reference.scores, strict=True))
    assert torch.equal(found.sequences[1], plain.sequences[1])
    image = batch["input_ids"][0] == image_token_id(built.model.config)
    assert image.sum() == 16 * (1 + second_picture)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_chat_on_the_cache_of_its_first_turn(kind: str) -> None:
    """It is told to give the whole conversation; which is answered."""
    built = build("llava")
    first = first_of(built.batch)
    with GuardedModel(built.model, harmless(3)) as guarded:
        found = asked(guarded, first, {"cache_implementation": kind})
        ids = torch.cat([found.sequences, first["input_ids"][:, -4:]], dim=1)
        whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": first["pixel_values"]}
        with passes_of(built.model) as lengths:
            with pytest.raises(ConfigError, match="give the whole conversation with all its pictures, without past_key_values"):
                asked(guarded, whole, {"past_key_values": found.past_key_values})
            assert lengths == []
        answered = asked(guarded, whole, {})
        assert [record.ran for record in guarded.records] == [True]
    assert torch.equal(answered.sequences, asked(built.model, whole, {}).sequences)


def test_a_static_cache_that_is_used_again() -> None:
    built, flags = build("llava"), flagging("llava", build("llava").batch, 1)
    cache = StaticCache(config=text_config(built.model), max_cache_len=96)
    with GuardedModel(built.model, flags.detector) as guarded:
        first = asked(guarded, built.batch, {"past_key_values": cache})
        cache.reset()
        second = asked(guarded, built.batch, {"past_key_values": cache})
        assert [record.flagged for record in guarded.records] == [False, True, False]
    assert torch.equal(first.sequences, second.sequences)
    assert all(torch.equal(a, b) for a, b in zip(first.scores, second.scores, strict=True))


def compiled_forward(backend: str) -> tuple[Any, Way]:
    """The decoder's part of it, prefill and steps alike."""
    model = copy.deepcopy(build("llava").model)
    model.get_decoder().forward = torch.compile(model.get_decoder().forward, backend=backend)
    return model, lambda _: {}


def compiled_decoding(backend: str) -> tuple[Any, Way]:
    """What `generate` does by itself on an accelerator, with a static cache: it compiles all steps but the prefill."""
    config = CompileConfig(backend=backend, mode=None)
    config._compile_all_devices = True
    return copy.deepcopy(build("llava").model), lambda _: {"cache_implementation": "static", "compile_config": config}


def wrapped(backend: str) -> tuple[Any, Way]:
    return torch.compile(copy.deepcopy(build("llava").model), backend=backend), lambda _: {}


@pytest.mark.parametrize(
    ("compile_it", "backend"), [(compiled_decoding, "eager"), (compiled_forward, "aot_eager"), (wrapped, "eager")]
)
def test_a_compiled_model(compile_it: Callable[[str], tuple[Any, Way]], backend: str) -> None:
    """What one call closes is not closed, or left open, in a later call by the graph that the first one left behind."""
    torch._dynamo.reset()
    built = build("llava")
    flags = [None, flagging("llava", built.batch, 0), flagging("llava", built.batch, 1, rewind=0), None]
    model, way = compile_it(backend)
    for each in flags:
        with attached(built.model), tapped(Tap(block=each.block() if each else None)):
            reference = asked(built.model, built.batch, {"cache_implementation": way(model).get("cache_implementation")}, 4)
        with GuardedModel(model, each.detector if each else harmless(3)) as guarded:
            found = asked(guarded, built.batch, way(model), 4)
            assert [record.flagged for record in guarded.records] == [each is not None and each.row == k for k in range(3)]
        assert torch.equal(found.sequences, reference.sequences)
        for a, b in zip(found.scores, reference.scores, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_threads_with_batches_of_different_sizes(name: str) -> None:
    """Four threads at once; wherever the flagged prompt stands, each batch gets what it gets alone."""
    built = build(name)
    flags = flagging(name, built.batch, 0)
    chosen = [[0], [1, 2], [2, 1, 0], [0, 1, 2, 0, 1]]
    batches = [encode_prompts(built.processor, [built.examples[k] for k in rows]) for rows in chosen]
    together = threading.Barrier(len(chosen))
    with GuardedModel(built.model, flags.detector) as guarded:
        alone = [asked(guarded, batch, {}) for batch in batches]

        def ask(index: int) -> list[tuple[Any, list[bool]]]:
            found = []
            for _ in range(5):
                together.wait()
                found.append((generated(guarded, batches[index], STEPS), [record.flagged for record in guarded.records]))
            return found

        with concurrent.futures.ThreadPoolExecutor(len(chosen)) as pool:
            results = list(pool.map(ask, range(len(chosen))))
        counted = guarded.counters()
    singles = {row: list(answer[len(answer) - STEPS :]) for row, answer in zip(chosen[3][:3], alone[3].sequences, strict=False)}
    for rows, expected, found in zip(chosen, alone, results, strict=True):
        for given, flagged in found:
            assert flagged == [row == 0 for row in rows]
            assert torch.equal(given.sequences, expected.sequences)
            assert all(torch.equal(a, b) for a, b in zip(given.scores, expected.scores, strict=True))
            assert [list(answer[len(answer) - STEPS :]) for answer in given.sequences] == [singles[row] for row in rows]
    assert counted["byesight_guard_inputs_total"] == 6 * 11
    assert counted["byesight_guard_flagged_total"] == 6 * 4


def host_batch() -> tuple[Batch, ...]:
    built = build("llava")
    examples = [
        Example(row=k, turn=0, prompt=question_answer("say it", "x")[:1], answer="", images=(noise(90 + k, (32, 32)),))
        for k in range(4)
    ]
    return (encode_prompts(built.processor, examples),)


@contextlib.contextmanager
def begins(model: Any, *tokens: int) -> Iterator[list[int]]:
    """The first row begins with the first token, from the second forward pass on with the second and so on; behind each, token 9.

    Gives the number of passes so far.
    """
    passes: list[int] = []

    def insist(_module: torch.nn.Module, _args: tuple[Any, ...], logits: torch.Tensor) -> None:
        logits[0, -1, tokens[min(len(passes), len(tokens) - 1)]] = 2e3
        logits[0, -1, 9] = 1e3
        passes.append(len(logits))

    handle = model.get_output_embeddings().register_forward_hook(insist)
    try:
        yield passes
    finally:
        handle.remove()


def test_processors_are_not_asked_what_an_input_begins_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """The causal test and the escalation go by the model's own first token, not by what processors make of it.

    The input's own answer begins with 7, and with 8 once something is closed; both are suppressed, so 9 is answered before and
    after. The guard sees an answer that changed and closes no more; where it stays the same it goes on to the whole picture.
    """
    built = build("llava")

    def carried(_self: TransferTest, first: int, picture: torch.Tensor, *_: Any) -> Carried:
        tried.append(first)
        return Carried(share=1.0, tokens=torch.arange(len(picture)) < 2)

    monkeypatch.setattr(TransferTest, "carried", carried)
    rule = TransferRule(hosts=host_batch(), distance=1e9, familiar=torch.arange(7), attended=0.5, whole=0.5)
    batch, only = first_of(built.batch), {"max_new_tokens": 1, "min_new_tokens": 1, "suppress_tokens": [7, 8]}
    tried: list[int] = []
    with GuardedModel(built.model, harmless(3), transfer=rule) as guarded:
        with begins(built.model, 7, 8) as passes:
            found = asked(guarded, batch, only)
            (record,) = guarded.records
        assert (found.sequences[0, -1], record.flagged, record.tokens_pruned, len(passes)) == (9, True, 2, 2)
        with begins(built.model, 7) as passes:
            found = asked(guarded, batch, only)
            (record,) = guarded.records
        assert (found.sequences[0, -1], record.flagged, record.tokens_pruned, len(passes)) == (9, True, 16, 7)
    assert tried == [7, 7], "what the model would have begun with"


class BurstError(Exception):
    """What a caller's own code raises."""


def bursts_at(step: int, prompt: int) -> StoppingCriteriaList:
    def criterion(input_ids: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
        if input_ids.shape[1] == prompt + step:
            raise BurstError
        return torch.zeros(len(input_ids), dtype=torch.bool)

    return StoppingCriteriaList([criterion])


def test_a_call_that_fails_after_its_detection_is_counted_once_by_what_was_found() -> None:
    """An attack that was seen is counted as such, and not as a failure of the guard."""
    built, flags = build("llava"), flagging("llava", build("llava").batch, 1)
    with GuardedModel(built.model, flags.detector) as guarded:
        with pytest.raises(BurstError):
            asked(guarded, built.batch, {"stopping_criteria": bursts_at(3, built.batch["input_ids"].shape[1])})
        records = guarded.records
        counted = guarded.counters()
    assert [record.flagged for record in records] == [False, True, False]
    assert counted.pop("byesight_guard_seconds_total") > 0
    assert counted == {
        "byesight_guard_inputs_total": 3,
        "byesight_guard_looked_at_total": 2,
        "byesight_guard_tried_total": 0,
        "byesight_guard_flagged_total": 1,
        "byesight_guard_refused_total": 0,
        "byesight_guard_failed_total": 0,
        "byesight_guard_tokens_pruned_total": int(flags.tokens.sum()),
    }


def test_a_call_that_fails_before_its_detection_is_counted_once_as_failed() -> None:
    built = build("llava")
    text = {**built.batch, "pixel_values": built.batch["pixel_values"][:1]}  # fewer pictures than their tokens
    with GuardedModel(built.model, harmless(3)) as guarded:
        with pytest.raises(ValueError, match="do not match"):
            asked(guarded, text, {})
        assert guarded.records == []
        counted = guarded.counters()
    assert {name: value for name, value in counted.items() if value} == {
        "byesight_guard_inputs_total": 3,
        "byesight_guard_failed_total": 3,
    }


@pytest.mark.parametrize("action", ["purify", "report", "refuse"])
def test_counts_of_calls_of_all_kinds(action: Action) -> None:
    """One is answered, one fails while decoding, one before the detection."""
    built, flags = build("llava"), flagging("llava", build("llava").batch, 1)
    refused = RefusedInputError if action == "refuse" else None
    with GuardedModel(built.model, flags.detector, policy=Policy(action=action)) as guarded:
        with pytest.raises(refused) if refused else contextlib.nullcontext():
            asked(guarded, built.batch, {})
        with pytest.raises(refused or BurstError):
            asked(guarded, built.batch, {"stopping_criteria": bursts_at(1, built.batch["input_ids"].shape[1])})
        with pytest.raises(ValueError, match="do not match"):
            asked(guarded, {**built.batch, "pixel_values": built.batch["pixel_values"][:1]}, {})
        counted = guarded.counters()
    names = ("inputs", "looked_at", "flagged", "refused", "failed")
    assert [counted[f"byesight_guard_{name}_total"] for name in names] == [9, 4, 2, 2 if refused else 0, 3]


class Collected(BaseStreamer):  # type: ignore[misc]
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.tokens: list[torch.Tensor] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.tokens.append(value)

    def end(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("flagged", [False, True])
def test_a_streamer(flagged: bool) -> None:
    """It is given the prompt and then each token of the purified answer; nothing of the answer before."""
    built, flags, streamer = build("llava"), flagging("llava", build("llava").batch, 1), Collected()
    with attached(built.model), tapped(Tap(block=flags.block() if flagged else None)):
        reference = asked(built.model, built.batch, {})
    with GuardedModel(built.model, flags.detector if flagged else harmless(3)) as guarded:
        found = asked(guarded, built.batch, {"streamer": streamer})
    assert torch.equal(found.sequences, reference.sequences)
    assert torch.equal(streamer.tokens[0], built.batch["input_ids"])
    assert torch.equal(torch.stack(streamer.tokens[1:], dim=1), reference.sequences[:, -STEPS:])
    assert streamer.ended == 1


def test_a_refused_input_is_not_streamed() -> None:
    built, flags, streamer = build("llava"), flagging("llava", build("llava").batch, 1), Collected()
    with GuardedModel(built.model, flags.detector, policy=Policy(action="refuse")) as guarded, pytest.raises(RefusedInputError):
        asked(guarded, built.batch, {"streamer": streamer})
    assert len(streamer.tokens) == 1, "the prompt alone"


def test_what_is_returned() -> None:
    """Tokens alone, or all that can be asked for; what belongs to a purified row is that of its purified run."""
    built, flags = build("llava"), flagging("llava", build("llava").batch, 1)
    wanted = {"output_logits": True, "output_hidden_states": True}
    with attached(built.model), tapped(Tap(block=flags.block())):
        reference = asked(built.model, built.batch, wanted)
    plain = asked(built.model, built.batch, wanted)
    with GuardedModel(built.model, harmless(3)) as guarded:
        found = asked(guarded, built.batch, wanted)
        tokens = asked(guarded, built.batch, {"return_dict_in_generate": False, "output_scores": False})
        assert isinstance(tokens, torch.Tensor)
        assert torch.equal(tokens, plain.sequences)
    for a, b in zip([*found.logits, *found.scores], [*plain.logits, *plain.scores], strict=True):
        assert torch.equal(a, b)
    for step, other in zip(found.hidden_states, plain.hidden_states, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(step, other, strict=True))
    with GuardedModel(built.model, flags.detector) as guarded:
        found = asked(guarded, built.batch, wanted)
    for a, b in zip([*found.logits, *found.scores], [*reference.logits, *reference.scores], strict=True):
        assert torch.equal(a[1], b[1])
    for a, b in zip(found.past_key_values.layers, reference.past_key_values.layers, strict=True):
        assert torch.equal(a.keys[1], b.keys[1])
        assert torch.equal(a.values[1], b.values[1])
    for step, other in zip(found.hidden_states, reference.hidden_states, strict=True):
        assert all(torch.equal(a[1], b[1]) for a, b in zip(step, other, strict=True))


@pytest.mark.parametrize(
    ("calibrated", "actual", "warned"),
    [("float32", torch.float32, 0), ("bfloat16", torch.bfloat16, 0), ("bfloat16", torch.float32, 1), (None, torch.float32, 0)],
)
def test_another_type_than_the_guard_was_calibrated_in(
    calibrated: str | None, actual: torch.dtype, warned: int, caplog: pytest.LogCaptureFixture
) -> None:
    facts = {} if calibrated is None else {"dtype": calibrated}
    guard = Guard(detector=harmless(3), policy=Policy(), base="a", adapter="b", facts=facts)
    with caplog.at_level(logging.WARNING, "stages.guard.guarded"), GuardedModel.of(in_dtype("llava", actual), guard):
        found = [record.getMessage() for record in caplog.records if "calibrated in" in record.message]
    assert len(found) == warned
    assert all("calibrated in bfloat16 and the model is in float32" in message for message in found)
