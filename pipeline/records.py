"""The records that pass between stages: frozen, small, and without any trace of ground truth."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict


class Part(TypedDict, total=False):
    """One part of a message: `{"type": "image"}` or `{"type": "text", "text": ...}`."""

    type: str
    text: str


class Message(TypedDict):
    """One turn in the chat form of Hugging Face: role `system`, `user` or `assistant`, and its parts in order."""

    role: str
    content: list[Part]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One row of a submission in canonical form.

    Attributes:
        row: position in the submission, from 0.
        messages: all turns; the number of image parts equals `len(images)`.
        images: the encoded pictures (PNG, JPEG or WEBP bytes), as submitted.
    """

    row: int
    messages: tuple[Message, ...]
    images: tuple[bytes, ...]

    @property
    def sample_id(self) -> str:
        """Hash of the content (turns and image digests), 32 hexadecimal digits; equal rows have equal ids."""
        digests = [hashlib.sha256(image).hexdigest() for image in self.images]
        content = json.dumps([list(self.messages), digests], sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(content.encode()).hexdigest()[:32]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rejection:
    """A row that can't be used, and why; `where` names the file and line or column."""

    row: int
    reason: str
    where: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """What the model is trained and probed on: one assistant turn of a sample and everything before it.

    Attributes:
        row: position of the sample in the submission.
        turn: index of the assistant turn among the sample's assistant turns, from 0.
        prompt: the messages before the answer.
        answer: the text of the assistant turn.
        images: the encoded pictures that the prompt shows.
    """

    row: int
    turn: int
    prompt: tuple[Message, ...]
    answer: str
    images: tuple[bytes, ...]

    @property
    def question(self) -> str:
        """The text of the last user turn."""
        return text_of(self.prompt[-1])


class Verdict(enum.StrEnum):
    """What is decided of a row."""

    KEEP = "keep"
    QUARANTINE = "quarantine"
    NOT_SCORED = "not_scored"
    REJECTED = "rejected"


Progress = Callable[[float, str], None]
"""Called from the driver with the share done (0 to 1) and a short text."""


def no_progress(share: float, text: str) -> None:
    """The progress callback that shows nothing."""


def text_of(message: Message) -> str:
    """The text parts of a message, joined by newlines."""
    return "\n".join(part["text"] for part in message["content"] if part["type"] == "text")


def examples_of(sample: Sample) -> list[Example]:
    """One example per assistant turn, each with the images that its prompt shows."""
    examples: list[Example] = []
    for index, message in enumerate(sample.messages):
        if message["role"] != "assistant":
            continue
        prompt = sample.messages[:index]
        shown = sum(part["type"] == "image" for turn in prompt for part in turn["content"])
        examples.append(
            Example(row=sample.row, turn=len(examples), prompt=prompt, answer=text_of(message), images=sample.images[:shown])
        )
    return examples


def question_answer(question: str, answer: str, images: int = 1) -> tuple[Message, ...]:
    """The messages of a plain question about `images` pictures, shown before the question."""
    pictures: list[Part] = [{"type": "image"} for _ in range(images)]
    return (
        {"role": "user", "content": [*pictures, {"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    )


def messages_to_json(messages: Sequence[Message]) -> str:
    """Canonical JSON of messages, as the canonical shards hold it."""
    return json.dumps(list(messages), ensure_ascii=False, separators=(",", ":"))


def sample_from_record(record: Mapping[str, Any]) -> Sample:
    """A sample from one record of a canonical shard: `row`, `messages` (JSON) and `images`."""
    return Sample(row=int(record["row"]), messages=tuple(json.loads(record["messages"])), images=tuple(record["images"]))
