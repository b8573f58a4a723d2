"""The records: their JSON, their ids, and how a row becomes examples."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from pipeline.records import (
    Message,
    Sample,
    Verdict,
    examples_of,
    messages_to_json,
    question_answer,
    sample_from_record,
    text_of,
)

TEXTS = [
    "plain",
    "",
    " \t\n\r\n ",
    'quotes " and \\ and \\n',
    "</s><image>",
    "naïve 日本語 \U0001f600 \u202e",
    "\x00\x1f\x7f\u2028",
    "'; DROP--",
]


def system(text: str) -> Message:
    return {"role": "system", "content": [{"type": "text", "text": text}]}


def random_messages(seed: int) -> tuple[Message, ...]:
    """Up to four turns of any text with up to two pictures each, now and then after a system turn."""
    rng = np.random.default_rng(seed)
    messages: list[Message] = [system(str(rng.choice(TEXTS)))] if rng.random() < 0.3 else []
    for _ in range(int(rng.integers(1, 5))):
        messages += question_answer(str(rng.choice(TEXTS)), str(rng.choice(TEXTS)), int(rng.integers(0, 3)))
    return tuple(messages)


def random_sample(seed: int) -> Sample:
    messages = random_messages(seed)
    pictures = sum(part["type"] == "image" for message in messages for part in message["content"])
    return Sample(row=seed, messages=messages, images=tuple(bytes([seed, k]) for k in range(pictures)))


@pytest.mark.parametrize("seed", range(20))
def test_a_sample_comes_back_from_its_record(seed: int) -> None:
    sample = random_sample(seed)
    record = {"row": sample.row, "messages": messages_to_json(sample.messages), "images": list(sample.images)}
    found = sample_from_record(record)
    assert found == sample
    assert found.sample_id == sample.sample_id
    assert messages_to_json(found.messages) == record["messages"]


def test_the_json_of_messages_is_short_and_readable() -> None:
    text = messages_to_json(question_answer("naïve?", "日本"))
    assert text == (
        '[{"role":"user","content":[{"type":"image"},{"type":"text","text":"naïve?"}]},'
        '{"role":"assistant","content":[{"type":"text","text":"日本"}]}]'
    )
    assert messages_to_json([]) == "[]"


def test_equal_rows_have_equal_ids() -> None:
    sample = Sample(row=3, messages=question_answer("what?", "a cat", 2), images=(b"one", b"two"))
    assert len(sample.sample_id) == 32
    int(sample.sample_id, 16)
    assert dataclasses.replace(sample, row=9).sample_id == sample.sample_id
    swapped: Any = json.loads(json.dumps(sample.messages), object_pairs_hook=lambda pairs: dict(reversed(pairs)))
    assert dataclasses.replace(sample, messages=tuple(swapped)).sample_id == sample.sample_id, "the order of keys means nothing"


@pytest.mark.parametrize(
    "change",
    [
        {"messages": question_answer("what?", "a dog", 2)},
        {"messages": question_answer("what? ", "a cat", 2)},
        {"messages": question_answer("what?", "a cat", 1)},
        {"messages": (*question_answer("what?", "a cat", 2), *question_answer("and?", "no", 0))},
        {"images": (b"two", b"one")},
        {"images": (b"one", b"tw0")},
        {"images": (b"onetwo",)},
    ],
    ids=range(7),
)
def test_other_content_has_another_id(change: dict[str, Any]) -> None:
    sample = Sample(row=0, messages=question_answer("what?", "a cat", 2), images=(b"one", b"two"))
    assert dataclasses.replace(sample, **change).sample_id != sample.sample_id


def test_a_plain_row_is_one_example() -> None:
    sample = Sample(row=4, messages=question_answer("which?", "the left one", 2), images=(b"a", b"b"))
    (example,) = examples_of(sample)
    assert (example.row, example.turn, example.question, example.answer) == (4, 0, "which?", "the left one")
    assert example.prompt == sample.messages[:1]
    assert example.images == (b"a", b"b")


def test_each_answer_is_an_example_with_all_before_it() -> None:
    """A picture counts from the turn that shows it."""
    messages = (
        system("Be brief."),
        *question_answer("ready?", "yes", images=0),
        *question_answer("what is it?", "a cat", images=1),
        *question_answer("and these?", "dogs", images=2),
    )
    examples = examples_of(Sample(row=1, messages=messages, images=(b"a", b"b", b"c")))
    assert [example.turn for example in examples] == [0, 1, 2]
    assert [example.answer for example in examples] == ["yes", "a cat", "dogs"]
    assert [example.question for example in examples] == ["ready?", "what is it?", "and these?"]
    assert [example.images for example in examples] == [(), (b"a",), (b"a", b"b", b"c")]
    assert [example.prompt for example in examples] == [messages[:2], messages[:4], messages[:6]]
    assert {example.row for example in examples} == {1}


def test_a_row_without_an_answer_has_no_example() -> None:
    assert examples_of(Sample(row=0, messages=question_answer("what?", "x")[:1], images=(b"a",))) == []


@pytest.mark.parametrize("seed", range(20))
def test_examples_are_the_answers_and_their_prompts(seed: int) -> None:
    sample = random_sample(seed)
    examples = examples_of(sample)
    said = [text_of(message) for message in sample.messages if message["role"] == "assistant"]
    assert [example.answer for example in examples] == said
    for example in examples:
        assert example.prompt[-1]["role"] == "user"
        marks = messages_to_json(example.prompt).count('{"type":"image"}')
        assert example.images == sample.images[:marks]
    assert examples[-1].prompt == sample.messages[:-1]


def test_the_text_of_a_message_is_its_parts_without_pictures() -> None:
    parts: list[Any] = [{"type": "text", "text": "above"}, {"type": "image"}, {"type": "text", "text": " below"}]
    assert text_of({"role": "user", "content": parts}) == "above\n below"
    assert text_of({"role": "user", "content": [{"type": "image"}]}) == ""


def test_verdicts_are_their_words() -> None:
    """They are written into Parquet and JSON as they are."""
    assert {str(verdict) for verdict in Verdict} == {"keep", "quarantine", "not_scored", "rejected"}
    assert json.dumps(Verdict.KEEP) == '"keep"'
