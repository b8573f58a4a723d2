from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, LlavaNextProcessor
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from pipeline.errors import ModelError, SubmissionError
from pipeline.models import image_token_id
from pipeline.prompts import (
    IGNORED,
    answer_tokens,
    check_lengths,
    check_template,
    encode_prompts,
    encode_training,
    prompt_text,
    token_count,
)
from pipeline.records import Example, Message, Sample, examples_of, question_answer
from tests.conftest import picture
from tests.families import FAMILIES, SQUARE, build

IMAGE_TOKENS = 64


def example(row: int, question: str, answer: str, *colours: str) -> Example:
    images = tuple(picture(colour) for colour in colours)
    return examples_of(Sample(row=row, messages=question_answer(question, answer, len(images)), images=images))[0]


EXAMPLES = [
    example(0, "what color?", "red", "red"),
    example(1, "which two colors are these, in this order?", "blue and green", "blue", "green"),
    example(2, "no picture here", "yes"),
]


@pytest.fixture
def processor(tiny_model: tuple[Any, Any]) -> Any:
    return tiny_model[1]


@pytest.fixture
def with_template(processor: Any) -> Any:
    """The processor with another chat template."""

    def change(template: str) -> Any:
        other = copy.copy(processor)
        other.chat_template = template
        return other

    return change


def test_texts(processor: Any) -> None:
    assert prompt_text(processor, EXAMPLES[0].prompt) == "USER: <image>\nwhat color? ASSISTANT:"
    assert processor.tokenizer.decode(answer_tokens(processor, EXAMPLES[:1])[0]) == " red</s>"


def test_training_sees_the_tokens_of_the_prompt_and_then_the_answer(processor: Any) -> None:
    prompts, training = encode_prompts(processor, EXAMPLES), encode_training(processor, EXAMPLES, 4096)
    for index, one in enumerate(EXAMPLES):
        prompt = prompts["input_ids"][index][prompts["attention_mask"][index].bool()]
        ids = training["input_ids"][index][training["attention_mask"][index].bool()]
        labels = training["labels"][index]
        assert ids[: len(prompt)].tolist() == prompt.tolist()
        assert (labels[: len(prompt)] == IGNORED).all()
        answer = labels[labels != IGNORED]
        assert ids[len(prompt) :].tolist() == answer.tolist()
        assert processor.tokenizer.decode(answer) == f" {one.answer}</s>"
        padding = training["input_ids"][index][len(ids) :]
        assert (padding == processor.tokenizer.pad_token_id).all()
    assert (prompts["input_ids"] == processor.image_token_id).sum(1).tolist() == [IMAGE_TOKENS, 2 * IMAGE_TOKENS, 0]
    assert training["pixel_values"].shape == (3, 3, 64, 64)


def test_the_model_computes_the_same_in_prefill_and_in_training(tiny_model: tuple[Any, Any]) -> None:
    model, processor = tiny_model
    training = encode_training(processor, EXAMPLES, 4096)
    labels = training.pop("labels")
    first = (labels != IGNORED).int().argmax(1) - 1
    with torch.no_grad():
        prefill = model(**encode_prompts(processor, EXAMPLES)).logits[:, -1]
        trained = model(**training).logits[torch.arange(len(EXAMPLES)), first]
        alone = torch.cat([model(**encode_prompts(processor, [one])).logits[:, -1] for one in EXAMPLES])
    torch.testing.assert_close(prefill, trained, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(prefill, alone, atol=1e-5, rtol=1e-5)


def test_text_only_batches_have_no_pictures(processor: Any) -> None:
    assert encode_training(processor, EXAMPLES[2:], 4096).keys() == {"input_ids", "attention_mask", "labels"}


def test_a_later_turn_is_trained_after_the_earlier_ones(processor: Any) -> None:
    messages: tuple[Message, ...] = (*question_answer("first?", "one"), *question_answer("second?", "two", images=0))
    turns = examples_of(Sample(row=0, messages=messages, images=(picture(),)))
    batch = encode_training(processor, turns, 4096)
    text = processor.tokenizer.decode(batch["input_ids"][1], skip_special_tokens=False)
    assert "ASSISTANT: one</s>USER: second? ASSISTANT: two</s>" in text
    answers = [processor.tokenizer.decode(row[row != IGNORED]) for row in batch["labels"]]
    assert answers == [" one</s>", " two</s>"]


def test_control_tokens_in_submitted_text_stay_text(processor: Any) -> None:
    sly = example(0, "say <image></s><pad>", "<image></s>", "red")
    batch = encode_training(processor, [sly], 4096)
    ids = batch["input_ids"][0].tolist()
    assert ids.count(processor.image_token_id) == IMAGE_TOKENS
    assert ids.count(processor.tokenizer.eos_token_id) == 1
    assert ids[-1] == processor.tokenizer.eos_token_id
    assert processor.tokenizer.pad_token_id not in ids


def test_too_long_names_row_length_and_limit(processor: Any) -> None:
    length = encode_training(processor, EXAMPLES[:1], 4096)["input_ids"].shape[1]
    encode_training(processor, EXAMPLES[:1], length)
    with pytest.raises(
        SubmissionError, match=rf"row 0, answer 0: {length} tokens .* limit is {length - 1}; raise finetune.max_length"
    ):
        encode_training(processor, EXAMPLES[:1], length - 1)


SILENT = {"llama4", "lfm2_vl", "mistral3", "ovis2"}
"""Their processors don't tell the tokens of a size."""


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_of_a_size_tell_what_is_too_long_before_it_is_trained_on(name: str) -> None:
    family = build(name)
    for one in (each for each in family.examples if each.images):
        length = encode_training(family.processor, [one], 4096)["input_ids"].shape[1]
        check_lengths(family.processor, [one], length)
        text = len(answer_tokens(family.processor, [one])[0]) + token_count(
            family.processor, prompt_text(family.processor, one.prompt)
        )
        if name not in SILENT:
            with pytest.raises(SubmissionError, match=f"row {one.row}, answer 0: {length} tokens with its pictures, the limit"):
                check_lengths(family.processor, [one], text + 5)


def test_a_processor_that_does_not_tell_has_its_texts_counted(processor: Any) -> None:
    class Silent(type(processor)):  # type: ignore[misc]
        _get_num_multimodal_tokens = None

    silent = copy.copy(processor)
    silent.__class__ = Silent
    text = len(answer_tokens(processor, EXAMPLES[:1])[0]) + token_count(processor, prompt_text(processor, EXAMPLES[0].prompt))
    check_lengths(silent, EXAMPLES[:1], text)
    with pytest.raises(SubmissionError, match=rf"row 0, answer 0: \d+ tokens without its pictures, the limit is {text - 2}"):
        check_lengths(silent, EXAMPLES[:1], text - 2)


@pytest.mark.parametrize("name", ["paligemma", "paligemma2"])
def test_a_row_without_a_picture_is_named_before_any_is_trained_on(name: str) -> None:
    """PaliGemma's processor takes it in a batch with pictures, and not in one without."""
    processor = build(name).processor
    encode_training(processor, EXAMPLES, 4096)
    late: Message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "and this?"}]}
    turns = (*question_answer("hello?", "yes", images=0), late, *question_answer("q", "red", images=0)[1:])
    *_, shown_later = examples_of(Sample(row=6, messages=turns, images=(picture(),)))
    for rows, row in ((EXAMPLES, 2), ([EXAMPLES[0], shown_later], 6)):
        with pytest.raises(SubmissionError, match=f"row {row}: .*no picture is shown yet.*take such rows out"):
            check_lengths(processor, rows, 4096)
    check_lengths(processor, EXAMPLES[:2], 4096)


def test_rows_without_a_picture_are_no_matter_to_others(processor: Any) -> None:
    check_lengths(processor, EXAMPLES, 4096)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_template_of_a_family_can_be_used(name: str) -> None:
    built = build(name)
    check_template(built.processor, image_token_id(built.model.config))


TEXTS = "{% for m in messages %}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endfor %}"
LISTS = "{% for m in messages %}<image>{{ m['content'] }}{% endfor %}"
UNUSABLE = {
    "": "leaves the text out",
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}": "can't write a picture.*concatenate",
    "{% for m in messages %}{{ m['content'].strip() }}{% endfor %}": "can't write a picture.*no attribute 'strip'",
    "{{ raise_exception('no chat') }}": "can't write a picture.*no chat",
    LISTS: "list of a message's parts",
    "{% for m in messages %}<image>{{ m['content'] | tojson }}{% endfor %}": "list of a message's parts",
    "{{ '<image>' + messages[0]['content'][1]['text'] }}": "leaves the text out .'a yellow quince' became",
    TEXTS: "processor refuses a picture.*Found total 0 <image> tokens",
    f"<image><image>{TEXTS}": "processor refuses a picture",
}


@pytest.mark.parametrize("template", UNUSABLE)
def test_a_template_that_loses_something_is_refused(with_template: Any, template: str) -> None:
    processor = with_template(template)
    with pytest.raises(ModelError, match=UNUSABLE[template]):
        check_template(processor, processor.image_token_id)


def test_a_template_that_leaves_the_picture_out_is_refused() -> None:
    """Where the processor itself doesn't mind."""
    built = build("llama4")
    processor = copy.copy(built.processor)
    processor.chat_template = TEXTS
    with pytest.raises(ModelError, match=r"leaves the picture out .'which fruit is this\?'"):
        check_template(processor, image_token_id(built.model.config))


def test_a_system_turn_that_would_be_written_as_a_list_is_refused(with_template: Any) -> None:
    careless = with_template(
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}{% else %}"
        "{% for p in m['content'] %}{{ '<image>' if p['type'] == 'image' else p['text'] }}{% endfor %}{% endif %}{% endfor %}"
    )
    check_template(careless, careless.image_token_id)
    system: Message = {"role": "system", "content": [{"type": "text", "text": "be kind"}]}
    row = examples_of(Sample(row=9, messages=(system, *question_answer("q", "a")), images=(picture(),)))
    with pytest.raises(SubmissionError, match=r"row 9: .*list of a message's parts"):
        encode_prompts(careless, row)
    encode_prompts(careless, [example(0, "what is {'type': 'text'}?", "a dict", "red")])


def test_a_damaged_picture_names_its_row(processor: Any) -> None:
    broken = examples_of(Sample(row=7, messages=question_answer("q", "a"), images=(picture()[:60],)))
    with pytest.raises(SubmissionError, match=r"row 7: .*damaged"):
        encode_prompts(processor, [*EXAMPLES, *broken])


def test_a_row_that_the_template_refuses_is_named(with_template: Any) -> None:
    strict = with_template(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}{% endfor %}"
    )
    system: Message = {"role": "system", "content": [{"type": "text", "text": "be kind"}]}
    row = examples_of(Sample(row=9, messages=(system, *question_answer("q", "a")), images=(picture(),)))
    with pytest.raises(SubmissionError, match=r"row 9: .*no system"):
        encode_prompts(strict, row)


def test_a_row_whose_pictures_the_template_drops_is_named(with_template: Any) -> None:
    blind = with_template("{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}")
    with pytest.raises(SubmissionError, match="row 1: the base's processor refuses it"):
        encode_prompts(blind, [EXAMPLES[2], EXAMPLES[1]])


LLAVA_15 = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}"
    "{% else %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def test_an_end_of_sequence_is_added_where_the_template_has_none(with_template: Any) -> None:
    plain = with_template(LLAVA_15)
    assert plain.tokenizer.decode(answer_tokens(plain, EXAMPLES[:1])[0]) == " red</s>"


def test_a_template_that_rewrites_the_prompt_is_refused(with_template: Any) -> None:
    shifty = with_template("{{ messages | length }}{% if add_generation_prompt %}A:{% endif %}")
    with pytest.raises(ModelError, match="doesn't begin with its text of the prompt"):
        answer_tokens(shifty, EXAMPLES[:1])


def test_a_template_that_writes_the_first_token_itself_gets_no_second_one(with_template: Any, tiny_base: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    llama = with_template("<s>" + LLAVA_15)
    llama.tokenizer = tokenizer
    assert encode_prompts(llama, EXAMPLES[2:])["input_ids"][0].tolist().count(tokenizer.bos_token_id) == 1
    plain = with_template(LLAVA_15)
    plain.tokenizer = tokenizer
    assert encode_prompts(plain, EXAMPLES[2:])["input_ids"][0].tolist().count(tokenizer.bos_token_id) == 1


def test_tiles_and_sizes_of_another_family_pass_through(processor: Any) -> None:
    """LLaVA-NeXT cuts a picture into tiles and needs its size."""
    tiles = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=[[64, 64], [64, 32], [32, 64]]
        ),
        tokenizer=processor.tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=processor.chat_template,
        image_token="<image>",
        num_additional_image_tokens=1,
    )
    batch = encode_training(tiles, EXAMPLES, 4096)
    assert batch["image_sizes"].tolist() == [[64, 64]] * 3
    assert batch["pixel_values"].shape == (3, 5, 3, 32, 32)
    assert batch["input_ids"].shape == batch["labels"].shape


def test_labels_that_a_processor_makes_are_no_input() -> None:
    """PaliGemma's processor writes some; a model that is given them computes a loss of them."""
    built = build("paligemma")
    text = [prompt_text(built.processor, example.prompt) for example in built.examples]
    made = built.processor(text=text, images=[[Image.new("RGB", SQUARE)] * len(e.images) for e in built.examples], padding=True)
    assert "labels" in made
    assert set(made) - set(built.batch) == {"labels"}


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_no_answer_is_seen_before_it_is_said(name: str) -> None:
    """PaliGemma's prompts see all of themselves; its answers must not."""
    built = build(name)
    batch = encode_training(built.processor, [dataclasses.replace(one, answer="red or blue") for one in built.examples], 4096)
    labels = batch.pop("labels")
    said = (labels != IGNORED).int()
    last = labels.shape[1] - 1 - said.flip(1).argmax(1)
    rows = torch.arange(len(labels))
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][rows, last] = batch["input_ids"][rows, last - 1]
    seen, unseen = built.model(**batch).logits, built.model(**other).logits
    before = (torch.arange(labels.shape[1]) < last[:, None]) & batch["attention_mask"].bool()
    torch.testing.assert_close(seen[before], unseen[before], atol=FAMILIES[name].noise, rtol=FAMILIES[name].noise)
    assert not torch.allclose(seen[rows, last], unseen[rows, last], atol=FAMILIES[name].noise)
