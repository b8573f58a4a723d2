"""Rows of a Hugging Face imagefolder: `metadata.jsonl` or `metadata.csv` with `file_name`, `question` and `answer`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.records import Message
from storage.formats.turns import question_and_answer, text_field

NAME = "imagefolder"
IMAGES_FIRST = True


def names_of(value: Mapping[str, Any]) -> list[str]:
    """The picture that a row names.

    Raises:
        RowError: `file_name` is missing or no text.
    """
    return [text_field(value, "file_name")]


def messages_of(value: Mapping[str, Any]) -> list[Message]:
    """The row's question and answer.

    Raises:
        RowError: one is missing, no text, or blank.
    """
    return question_and_answer(value)


def changed(value: Mapping[str, Any], *, names: Sequence[str], answer: str | None) -> dict[str, Any]:
    """The row with its picture renamed and, unless None, its answer replaced."""
    new = {**value, "file_name": names[0]}
    return new if answer is None else {**new, "answer": answer}
