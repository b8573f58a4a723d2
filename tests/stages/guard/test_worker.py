"""The reference worker by itself: its records are those of plain prefills, and what is planted is what the causal test plants."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file

from pipeline.attention import Block, Tap, attached, base_of, tapped
from pipeline.models import load_adapter, load_base
from pipeline.prompts import IGNORED, encode_prompts, encode_training
from pipeline.records import Example, Sample, examples_of, messages_to_json, question_answer
from stages.guard.detector import FEATURES
from stages.guard.transfer import TransferTest, attended, image_attention
from stages.guard.worker import REFERENCE, ReferenceWorker
from tests.conftest import SHARD_SCHEMA, colour_samples, picture
from tests.stages.guard.tiny import prefill
from tests.stages.samples import PICTURED, mixed_samples

LAYERS, HEADS = 3, 4
TRIED = (0, 3, 10, 13)
QUESTION = "what color is this?"

Worker = Callable[..., ReferenceWorker]


def asked(question: str, *pictures: bytes) -> Example:
    return Example(row=0, turn=0, prompt=question_answer(question, "x", len(pictures))[:1], answer="", images=pictures)


HOSTS = [
    asked(question, picture(colour)) for question in (QUESTION, "what may it be?") for colour in ("red", "green", "blue", "white")
]


def samples() -> list[Sample]:
    """Seven rows of many kinds, and the four colours."""
    return [*mixed_samples(), *colour_samples(4, first=10)]


EXAMPLES = {(example.row, example.turn): example for sample in samples() for example in examples_of(sample) if example.images}


def table_of(given: Sequence[Sample]) -> pa.Table:
    records = [
        {"row": s.row, "sample_id": s.sample_id, "messages": messages_to_json(s.messages), "images": list(s.images)} for s in given
    ]
    return pa.Table.from_pylist(records, schema=SHARD_SCHEMA)


@pytest.fixture(scope="module")
def hosts(tiny_model: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A batch of two prompts, and one of six."""
    paths = [tmp_path_factory.mktemp("hosts") / f"{k}.safetensors" for k in range(2)]
    for path, examples in zip(paths, (HOSTS[:2], HOSTS[2:]), strict=True):
        save_file(encode_prompts(tiny_model[1], examples), path)
    return [str(path) for path in paths]


@pytest.fixture(scope="module")
def build(tiny_base: pathlib.Path, tiny_adapter: pathlib.Path, hosts: list[str]) -> Worker:
    def made(**given: Any) -> ReferenceWorker:
        settings = {"dtype": "float32", "batch_size": 4, "layers": "all", "features": FEATURES, "hosts": hosts, "tried": TRIED}
        return ReferenceWorker(base=str(tiny_base), adapter=str(tiny_adapter), **{**settings, **given})

    return made


@pytest.fixture(scope="module")
def worker(build: Worker) -> ReferenceWorker:
    return build()


@pytest.fixture(scope="module")
def found(worker: ReferenceWorker) -> dict[tuple[int, int], dict[str, Any]]:
    """The records of all samples, by row and turn."""
    return {(record["row"], record["turn"]): record for record in worker(table_of(samples())).to_pylist()}


@pytest.fixture(scope="module")
def model(tiny_base: pathlib.Path, tiny_adapter: pathlib.Path) -> Any:
    """The model by itself."""
    return load_adapter(load_base(tiny_base, dtype="float32", device="cpu")[0], tiny_adapter)


def first_tokens(model: Any, processor: Any, examples: Sequence[Example]) -> list[int]:
    """What plain generation begins its answers with."""
    batch = encode_prompts(processor, examples)
    generated = model.generate(**batch, max_new_tokens=1, do_sample=False)
    first: list[int] = generated[:, batch["input_ids"].shape[1]].tolist()
    return first


def plain_vector(model: Any, processor: Any, example: Example) -> tuple[list[float], torch.Tensor]:
    """The detection vector of a prefill by itself, and the attention to each of its image tokens."""
    batch = encode_prompts(processor, [example])
    seen = prefill(model, batch)
    return seen.vectors[0].tolist(), image_attention(seen.weights, seen.image)[0, seen.image[0]]


def test_what_changes_with_the_picture_closed(
    found: dict[tuple[int, int], dict[str, Any]], model: Any, tiny_model: tuple[Any, Any]
) -> None:
    """Each tried example by itself, closed from each layer on."""
    for key, example in EXAMPLES.items():
        record = found[key]
        assert record["count"] == LAYERS
        if example.row not in TRIED:
            assert record["changed"] is None
            continue
        batch = encode_prompts(tiny_model[1], [example])
        image = batch["input_ids"] == base_of(model).config.image_token_id
        first = []
        for layer in (LAYERS, *range(LAYERS)):
            block = Block(keys=image, from_layer=torch.tensor([layer]))
            with attached(model), torch.inference_mode(), tapped(Tap(block=block)):
                first.append(int(model(**batch).logits[0, -1].argmax()))
        assert record["changed"] == [token != first[0] for token in first[1:]]
    assert any(any(record["changed"] or []) for record in found.values())


def test_only_examples_with_pictures(found: dict[tuple[int, int], dict[str, Any]], worker: ReferenceWorker) -> None:
    assert list(found) == [*PICTURED, *((row, 0) for row in range(10, 14))] == list(EXAMPLES)
    text = worker(table_of(colour_samples(3, text_only=[0, 1, 2])))
    assert text.num_rows == 0
    assert text.schema == REFERENCE


def test_records_are_those_of_plain_prefills(
    found: dict[tuple[int, int], dict[str, Any]], model: Any, tiny_model: tuple[Any, Any]
) -> None:
    first = first_tokens(model, tiny_model[1], list(EXAMPLES.values()))
    assert [record["first_token"] for record in found.values()] == first
    for record, example in zip(found.values(), EXAMPLES.values(), strict=True):
        labels = encode_training(tiny_model[1], [example], 4096)["labels"][0]
        assert record["answer_tokens"] == labels[labels != IGNORED].tolist()
    assert len(set(first)) > 2, "the test's answers do not differ"
    for place, record in found.items():
        vector, _ = plain_vector(model, tiny_model[1], EXAMPLES[place])
        assert record["layers"] == [0, 1, 2]
        assert len(vector) == LAYERS * HEADS * len(FEATURES)
        assert record["vector"] == pytest.approx(vector, abs=1e-4)


def test_the_share_of_the_whole_picture_is_that_of_prompts_that_show_it(
    found: dict[tuple[int, int], dict[str, Any]], model: Any, tiny_model: tuple[Any, Any]
) -> None:
    """Of two pictures the first is what a host has a place for."""
    own = first_tokens(model, tiny_model[1], HOSTS)
    shares = []
    for (row, turn), record in found.items():
        if row not in TRIED:
            assert math.isnan(record["attended"])
            assert math.isnan(record["whole"])
            continue
        instead = [asked(host.question, *EXAMPLES[row, turn].images[:1]) for host in HOSTS]
        shown = first_tokens(model, tiny_model[1], instead)
        free = [k for k in range(len(HOSTS)) if own[k] != record["first_token"]]
        assert len(free) >= 4
        shares.append(sum(shown[k] == record["first_token"] for k in free) / len(free))
        assert record["whole"] == pytest.approx(shares[-1])
    assert len(shares) == len(TRIED)
    assert max(shares) > 0.5


def test_a_share_is_that_of_the_causal_test_without_its_screen(
    worker: ReferenceWorker, model: Any, tiny_model: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, torch.Tensor, torch.Tensor, bool]] = []

    def share(_self: TransferTest, first: int, tokens: torch.Tensor, chosen: torch.Tensor, *, screen: bool = True) -> float:
        calls.append((first, tokens, chosen, screen))
        return len(calls) / 8

    monkeypatch.setattr(TransferTest, "share", share)
    records = [record for record in worker(table_of(samples())).to_pylist() if record["row"] in TRIED]
    assert [record["row"] for record in records] == list(TRIED)
    assert [(record["attended"], record["whole"]) for record in records] == [(k / 8, (k + 1) / 8) for k in (1, 3, 5, 7)]
    for record, some, whole in zip(records, calls[::2], calls[1::2], strict=True):
        example = EXAMPLES[record["row"], record["turn"]]
        pixels = encode_prompts(tiny_model[1], [example])["pixel_values"]
        with torch.inference_mode():
            expected = torch.cat(list(base_of(model).get_image_features(pixel_values=pixels).pooler_output))
        _, attention = plain_vector(model, tiny_model[1], example)
        for first, tokens, _, screen in (some, whole):
            assert first == record["first_token"]
            torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=1e-5)
            assert not screen
        assert torch.equal(some[2], attended(attention))
        assert bool(whole[2].all())


def test_without_hosts(build: Worker, found: dict[tuple[int, int], dict[str, Any]]) -> None:
    """The rest of the records does not depend on them."""
    without = build(hosts=[])
    assert without.test is None
    for record in without(table_of(samples())).to_pylist():
        other = found[record["row"], record["turn"]]
        assert math.isnan(record["attended"])
        assert math.isnan(record["whole"])
        for name in ("layers", "vector", "first_token"):
            assert record[name] == other[name]


def test_some_layers_and_features(build: Worker, found: dict[tuple[int, int], dict[str, Any]]) -> None:
    chosen = build(hosts=[], tried=(), layers="middle", features=FEATURES[:1])
    for record in chosen(table_of(samples())).to_pylist():
        cells = torch.tensor(found[record["row"], record["turn"]]["vector"]).reshape(LAYERS, len(FEATURES), HEADS)
        assert record["layers"] == [0, 1]
        assert record["vector"] == cells[:2, 0].flatten().tolist()


def test_the_attended_tokens_are_those_of_the_layers_that_are_read(build: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a guard that reads these layers."""
    seen: list[list[int]] = []

    def watched(weights: dict[int, torch.Tensor], image: torch.Tensor) -> torch.Tensor:
        seen.append(sorted(weights))
        return image_attention(weights, image)

    monkeypatch.setattr("stages.guard.worker.image_attention", watched)
    build(layers="middle", tried=())(table_of(colour_samples(1)))
    assert seen == [[0, 1]]


def test_no_hook_is_left(worker: ReferenceWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = base_of(worker.model).get_decoder()
    worker(table_of(colour_samples(2)))
    assert not decoder._forward_pre_hooks

    def broken(*_: Any, **__: Any) -> Any:
        raise MemoryError("no room")

    monkeypatch.setattr(decoder, "forward", broken)
    with pytest.raises(MemoryError):
        worker(table_of(colour_samples(2)))
    assert not decoder._forward_pre_hooks
