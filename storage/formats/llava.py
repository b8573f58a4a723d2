"""Rows of LLaVA: `{"id", "image", "conversations": [{"from": "human" | "gpt", "value"}]}`; `<image>` marks a picture's place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.records import Message
from storage.formats.base import Reason, RowError
from storage.formats.turns import conversation

NAME = "llava"
IMAGES_FIRST = False
ROLES = {"system": "system", "human": "user", "gpt": "assistant"}


def names_of(value: Mapping[str, Any]) -> list[str]:
    """The pictures that a row names: `image` is a name, a list of names, or absent.

    Raises:
        RowError: `image` is something else.
    """
    image = value.get("image")
    if image is None:
        return []
    names = image if isinstance(image, list) else [image]
    if not all(isinstance(name, str) for name in names):
        raise RowError(Reason.WRONG_TYPE, "image is a name or a list of names")
    return list(names)


def messages_of(value: Mapping[str, Any]) -> list[Message]:
    """The row's turns.

    Raises:
        RowError: `conversations` is missing or wrong, or a role is unknown.
    """
    if value.get("conversations") is None:
        raise RowError(Reason.MISSING_FIELD, "conversations")
    return conversation(value["conversations"], roles=ROLES, who="from", what="value")


def changed(value: Mapping[str, Any], *, names: Sequence[str], answer: str | None) -> dict[str, Any]:
    """The row with its pictures renamed and, unless None, its first answer replaced."""
    new = dict(value)
    if names:
        new["image"] = list(names) if isinstance(value["image"], list) else names[0]
    if answer is not None:
        turns = [dict(turn) for turn in value["conversations"]]
        next(turn for turn in turns if turn["from"] == "gpt")["value"] = answer
        new["conversations"] = turns
    return new
