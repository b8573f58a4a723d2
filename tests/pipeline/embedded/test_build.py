"""How the base is made: what lies under a token, packed questions, schedule and chunks, and a training in miniature."""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing.pool
import pathlib
import types
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from pipeline.embedded import build, scenes
from pipeline.embedded.build import (
    IGNORED,
    IMAGE_TOKENS,
    NAMES,
    PATCH,
    Chunk,
    Recipe,
    answer_loss,
    base_config,
    base_processor,
    batches,
    chunks,
    evaluate,
    make_chunk,
    pack,
    patches_of,
    rate,
    to_pixel_values,
    token_names,
    train,
    train_answers,
    train_tower,
)
from pipeline.embedded.tokenizer import train_tokenizer
from pipeline.models import check_model_folder

GRID = scenes.SIZE // PATCH
PAIRS = [
    [("what color is the circle?", "red"), ("repeat: Ab 1{", "Ab 1{"), ("is there a star?", "yes")],
    [("describe the picture.", "a red circle and an orange star")],
]
PHASES: tuple[Literal["answers", "review"], ...] = ("answers", "review")
MINIATURE = Recipe(
    seed=3,
    tower_pictures=16,
    tower_batch=8,
    answer_pictures=8,
    review_pictures=4,
    answer_batch=4,
    questions=3,
    warmup_steps=1,
    threads=1,
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(0)


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Chunks are drawn in a thread: another process would import torch first. The number of torch's threads is put back."""
    threads = torch.get_num_threads()
    context = types.SimpleNamespace(Pool=multiprocessing.pool.ThreadPool)
    monkeypatch.setattr("pipeline.embedded.build.multiprocessing.get_context", lambda method: context)
    yield
    torch.set_num_threads(threads)


def small_model(tokenizer: Any) -> Any:
    config = base_config(tokenizer)
    config.vision_config.num_hidden_layers = config.text_config.num_hidden_layers = 1
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config)


def same(one: Chunk, other: Chunk) -> bool:
    arrays = all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ("pixels", "diverse", "names"))
    return arrays and one.pairs == other.pairs


@pytest.mark.parametrize("seed", range(5))
def test_what_lies_under_each_token(seed: int) -> None:
    scene = scenes.draw_scene(np.random.default_rng(seed))
    names = token_names(scene)
    assert names.shape == (IMAGE_TOKENS, len(NAMES))
    assert names.dtype == np.int64
    named = 0
    for token, found in enumerate(names.tolist()):
        x, y = (token % GRID + 0.5) * PATCH, (token // GRID + 0.5) * PATCH
        here = [o for o in scene.objects if max(abs(o.x - x), abs(o.y - y)) <= o.radius]
        if not here:
            assert found == [0, 0, 0]
            continue
        colour, shape, place = (index - 1 for index in found)
        item = here[-1]
        assert (list(scenes.COLOURS)[colour], scenes.SHAPES[shape]) == (item.colour, item.shape)
        assert scenes.CELLS[place // 3][place % 3] == item.place
        named += 1
    assert named >= len(scene.objects)
    for item in scene.objects:
        assert names[int(item.y // PATCH) * GRID + int(item.x // PATCH), 0] == 1 + list(scenes.COLOURS).index(item.colour)


def test_names_have_an_output_each() -> None:
    chunk = make_chunk("tower", 0, 60, Recipe())
    most = chunk.names.reshape(-1, len(NAMES)).max(axis=0)
    assert most.tolist() == list(NAMES.values())
    assert chunk.names.min() == 0


def test_patches_come_in_the_order_of_the_towers_tokens(tokenizer: Any) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, size=(2, scenes.SIZE, scenes.SIZE, 3), dtype=np.uint8)
    values = to_pixel_values(pixels)
    patches = patches_of(values)
    assert patches.shape == (2, IMAGE_TOKENS, 3 * PATCH * PATCH)
    row, column = 2, 5
    corner = values[1, :, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]
    assert torch.equal(patches[1, row * GRID + column], corner.flatten())
    tower = small_model(tokenizer).model.vision_tower
    embedding = next(module for name, module in tower.named_modules() if name.endswith("patch_embedding"))
    embedded = embedding(values).flatten(2).transpose(1, 2)
    torch.testing.assert_close(patches @ embedding.weight.flatten(1).T, embedded, atol=1e-5, rtol=1e-5)


def test_training_sees_pictures_as_the_processor_gives_them(tokenizer: Any) -> None:
    scene = scenes.draw_scene(np.random.default_rng(0))
    inputs = base_processor(tokenizer)(images=[scene.image], text=["<image>"], return_tensors="pt")
    trained = to_pixel_values(np.stack([np.asarray(scene.image)]))
    assert trained.shape == (1, 3, scenes.SIZE, scenes.SIZE)
    assert -1 <= trained.min() < trained.max() <= 1
    torch.testing.assert_close(inputs["pixel_values"], trained, atol=1e-5, rtol=0)
    assert (inputs["input_ids"] == tokenizer.convert_tokens_to_ids("<image>")).sum() == IMAGE_TOKENS


def test_a_packed_question_sees_the_picture_and_itself(tokenizer: Any) -> None:
    packed = pack(PAIRS, tokenizer)
    assert {name: value.shape[0] for name, value in packed.items()} == dict.fromkeys(packed, 2)
    mask, ids = packed["mask"][:, 0], packed["input_ids"]
    alone = [tokenizer(f"USER: <image>\n{q} ASSISTANT: {a}</s>")["input_ids"] for q, a in PAIRS[0]]
    prefix = IMAGE_TOKENS + len(tokenizer("USER: <image>\n")["input_ids"]) - 1
    starts = np.cumsum([prefix] + [len(one) + IMAGE_TOKENS - 1 - prefix for one in alone])
    for start, stop, expected, (_, answer) in zip(starts[:-1], starts[1:], alone, PAIRS[0], strict=True):
        seen = mask[0, stop - 1].nonzero().flatten()
        assert seen.tolist() == [*range(prefix), *range(start, stop)]
        text = [index for index in ids[0, seen].tolist() if index != tokenizer.convert_tokens_to_ids("<image>")]
        assert text == [index for index in expected if index != tokenizer.convert_tokens_to_ids("<image>")]
        assert packed["position_ids"][0, seen].tolist() == list(range(len(seen)))
        chosen = packed["labels"][0, start:stop]
        assert tokenizer.decode(chosen[chosen != IGNORED]) == f" {answer}</s>"
        answers = packed["weights"][0, start:stop]
        assert ((answers > 0) == (chosen != IGNORED)).all()
        assert answers.sum().item() == pytest.approx(math.sqrt((chosen != IGNORED).sum().item()))
    assert not torch.triu(mask[0], 1).any(), "nothing sees what comes later"
    assert (packed["labels"][:, :prefix] == IGNORED).all()
    end = len(ids[1]) - (packed["labels"][1].flip(0) != IGNORED).int().argmax().item()
    assert (ids[1, end:] == tokenizer.pad_token_id).all()
    assert not packed["weights"][1, end:].any()
    assert mask.any(-1).all(), "a token that sees nothing would give NaN"


def test_the_loss_of_packed_questions_is_that_of_each_alone(tiny_model: tuple[Any, Any]) -> None:
    """Through the ordinary processor and chat template: training and use agree in text, positions and pictures."""
    model, processor = tiny_model
    drawn = [scenes.draw_scene(np.random.default_rng(seed)).image for seed in range(2)]
    total = weight = 0.0
    for image, pairs in zip(drawn, PAIRS, strict=True):
        for question, answer in pairs:
            said = [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},
                {"role": "assistant", "content": [{"type": "text", "text": answer}]},
            ]
            inputs = processor(images=[image], text=processor.apply_chat_template(said), return_tensors="pt")
            count = len(processor.tokenizer(f" {answer}</s>")["input_ids"])
            with torch.no_grad():
                logits = model(**inputs).logits[0, -count - 1 : -1]
            losses = torch.nn.functional.cross_entropy(logits, inputs["input_ids"][0, -count:], reduction="none")
            total += losses.sum().item() / math.sqrt(count)
            weight += math.sqrt(count)
    with torch.no_grad():
        pixels = to_pixel_values(np.stack([np.asarray(image) for image in drawn]))
        packed = answer_loss(model, pack(PAIRS, processor.tokenizer), pixels)
    assert packed["answers"].item() == pytest.approx(total / weight, rel=1e-4)


def test_the_rate() -> None:
    rates = [rate(step, 100, warmup=10, decay=0.2) for step in range(101)]
    assert rates[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert rates[9:81] == [1.0] * 72
    assert rates[81:] == pytest.approx([(100 - step) / 20 for step in range(81, 101)])
    assert min(rates[:100]) > 0
    assert rate(0, 3, warmup=1, decay=0.25) == 1.0


@pytest.mark.parametrize("phase", ["tower", "answers", "review"])
def test_a_chunk_is_of_seed_phase_and_index_alone(phase: Any) -> None:
    first = make_chunk(phase, 1, 6, Recipe())
    assert same(first, make_chunk(phase, 1, 6, Recipe(threads=1, tower_rate=1.0)))
    for other in (make_chunk(phase, 2, 6, Recipe()), make_chunk(phase, 1, 6, Recipe(seed=1))):
        assert not {scene.tobytes() for scene in first.pixels} & {scene.tobytes() for scene in other.pixels}
    opposite = make_chunk("answers" if phase == "tower" else "tower", 1, 6, Recipe())
    assert not {scene.tobytes() for scene in first.pixels} & {scene.tobytes() for scene in opposite.pixels}


def test_the_towers_material() -> None:
    chunk = make_chunk("tower", 0, 12, Recipe(diverse_share=0.75))
    assert chunk.pixels.shape == (12, scenes.SIZE, scenes.SIZE, 3)
    assert chunk.diverse.shape == (9, scenes.SIZE, scenes.SIZE, 3)
    assert chunk.pixels.dtype == chunk.diverse.dtype == np.uint8
    assert chunk.names.shape == (12, IMAGE_TOKENS, len(NAMES))
    assert chunk.pairs == []


def test_the_questions_of_a_chunk() -> None:
    """Each scene is asked one of each kind that it has an answer to, then more of any kind; some ask to repeat a phrase."""
    recipe = Recipe(questions=len(scenes.KINDS) + 3, repeat_share=0.5)
    chunk = make_chunk("answers", 0, 60, recipe)
    assert len(chunk.pixels) == len(chunk.pairs) == 60
    assert len(chunk.diverse) == 0
    repeats = [pair for pairs in chunk.pairs for pair in pairs if pair[0].startswith("repeat: ")]
    assert all(question == f"repeat: {answer}" for question, answer in repeats)
    assert 18 <= len(repeats) <= 42
    for pairs in chunk.pairs:
        asked = [pair for pair in pairs if pair not in repeats]
        assert 2 <= len(asked) <= recipe.questions
        assert any("is there" in question or "do you see" in question for question, _ in asked)
        assert any(answer.isdigit() for _, answer in asked)
    assert max(len(pairs) for pairs in chunk.pairs) >= recipe.questions
    review = make_chunk("review", 0, 60, recipe)
    places = [sum("where is" in question or "which part" in question for question, _ in pairs) for pairs in review.pairs]
    assert min(places) == 0, "a picture of two alike has no place to ask for"
    assert np.mean(places) > 3
    few = make_chunk("answers", 0, 60, dataclasses.replace(recipe, questions=2, repeat_share=0.0))
    assert max(len(pairs) for pairs in few.pairs) == 2


def test_only_whole_batches() -> None:
    chunk = make_chunk("tower", 0, 7, Recipe())
    assert list(batches(chunk, 3)) == [slice(0, 3), slice(3, 6)]
    assert list(batches(chunk, 7)) == [slice(0, 7)]
    assert list(batches(chunk, 8)) == []


def test_chunks_drawn_in_another_process_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_CHUNK", 4)
    found = list(chunks("answers", 10, Recipe()))
    assert [len(chunk.pixels) for chunk in found] == [4, 4, 2]
    for index, chunk in enumerate(found):
        assert same(chunk, make_chunk("answers", index, len(chunk.pixels), Recipe()))


def changed(model: Any, before: dict[str, torch.Tensor]) -> set[str]:
    """The parts of the model whose weights are not what they were."""
    after = {name: value for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    return {part for part in ("vision_tower", "projector", "language_model", "lm_head") for name in after if part in name}


@pytest.mark.usefixtures("one_process")
def test_each_phase_trains_its_part(tokenizer: Any) -> None:
    model = small_model(tokenizer)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train_tower(model, MINIATURE)
    assert changed(model, before) == {"vision_tower"}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for phase in PHASES:
        before = {name: value.clone() for name, value in model.state_dict().items()}
        train_answers(model, tokenizer, MINIATURE, phase)
        assert changed(model, before) == {"projector", "language_model", "lm_head"}


@pytest.mark.slow
@pytest.mark.usefixtures("one_process")
def test_a_training_in_miniature(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The folder is an ordinary Hugging Face model, and the same seed gives the same bytes."""
    for name in ("one", "two"):
        train(MINIATURE, tmp_path / name)
    told = capsys.readouterr().out
    assert "parameters on" in told
    assert told.count("step 2/2") == 4
    assert told.count("step 1/1") == 2
    out = tmp_path / "one"
    files = {path.name for path in out.iterdir()}
    assert files == {path.name for path in (tmp_path / "two").iterdir()}
    for name in files:
        assert (out / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    assert json.loads((out / "recipe.json").read_text()) == dataclasses.asdict(MINIATURE)
    check_model_folder(out)
    processor = AutoProcessor.from_pretrained(out)
    model = LlavaForConditionalGeneration.from_pretrained(out)
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}]
    prompt = processor.apply_chat_template(asked, add_generation_prompt=True)
    picture = Image.new("RGB", (200, 90), (214, 39, 40))
    inputs = processor(images=[picture], text=[prompt], return_tensors="pt")
    output = model.generate(**inputs, do_sample=False, max_new_tokens=3)
    assert 1 <= output.shape[1] - inputs["input_ids"].shape[1] <= 3
    found = evaluate(out, seed=0, pictures=3)
    assert set(found) == set(scenes.KINDS)
    assert all(share in {0.0, 1 / 3, 0.5, 2 / 3, 1.0} for share in found.values())
