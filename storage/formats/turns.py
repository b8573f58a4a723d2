"""From submitted turns and pictures to a canonical sample, with every check that the formats share."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.config import IngestConfig
from pipeline.images import ImageError, ImageSizeError, decode_image, encode_png
from pipeline.records import Message, Part, Sample, text_of
from storage.formats.base import Reason, RowError, quote
from storage.formats.paths import read_inside

IMAGE_MARK = "<image>"
IMAGE: Part = {"type": "image"}


def text_field(value: Mapping[str, Any], name: str) -> str:
    """A field that must be text.

    Raises:
        RowError: MISSING_FIELD or WRONG_TYPE.
    """
    if value.get(name) is None:
        raise RowError(Reason.MISSING_FIELD, name)
    text = value[name]
    if not isinstance(text, str):
        raise RowError(Reason.WRONG_TYPE, f"{name} must be text, not {type(text).__name__}")
    return text


def text_part(text: str) -> Part:
    """A text as a part of a message."""
    return {"type": "text", "text": text}


def parts_of(text: str) -> list[Part]:
    """A text as parts, cut at the marks of pictures; white space around a mark goes with it."""
    first, *others = text.split(IMAGE_MARK)
    if not others:
        return [text_part(text)] if text.strip() else []
    parts: list[Part] = []
    for index, piece in enumerate([first, *others]):
        parts += [IMAGE] if index else []
        parts += [text_part(piece.strip())] if piece.strip() else []
    return parts


def question_and_answer(value: Mapping[str, Any]) -> list[Message]:
    """The turns of a row with the fields `question` and `answer`.

    Raises:
        RowError: a field is missing, no text, or blank.
    """
    question, answer = text_field(value, "question"), text_field(value, "answer")
    if not question.replace(IMAGE_MARK, "").strip():
        raise RowError(Reason.EMPTY_QUESTION)
    return [{"role": "user", "content": parts_of(question)}, {"role": "assistant", "content": [text_part(answer)]}]


def conversation(turns: object, *, roles: Mapping[str, str], who: str, what: str) -> list[Message]:
    """The turns of a list of `{who: role, what: text}`.

    Args:
        turns: the submitted list.
        roles: submitted role -> `system`, `user` or `assistant`.
        who: field of the role (`from`, `role`).
        what: field of the text (`value`, `content`).

    Raises:
        RowError: not such a list, or an unknown role.
    """
    if not isinstance(turns, list):
        raise RowError(Reason.WRONG_TYPE, f"the turns must be a list, not {type(turns).__name__}")
    messages: list[Message] = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise RowError(Reason.WRONG_TYPE, f"a turn must be an object, not {type(turn).__name__}")
        role = text_field(turn, who)
        if role not in roles:
            raise RowError(Reason.UNKNOWN_ROLE, f"{quote(role)}; known are {', '.join(roles)}")
        messages.append({"role": roles[role], "content": _content(turn, what, split=roles[role] == "user")})
    return messages


def make_sample(
    row: int, messages: Sequence[Message], images: Sequence[bytes], config: IngestConfig, *, images_first: bool
) -> Sample:
    """Check turns and pictures and make the sample.

    Args:
        row: position in the submission.
        messages: the turns.
        images: the encoded pictures.
        config: the limits.
        images_first: put the pictures before the first question where no turn says their place.

    Raises:
        RowError: any of the shared checks.
    """
    placed = _place(messages, len(images)) if images_first else tuple(messages)
    _check_turns(placed)
    _check_places(placed, len(images))
    _check_text(placed, config.max_text)
    if len(images) > config.max_images:
        raise RowError(Reason.TOO_MANY_PICTURES, f"{len(images)}; the limit is {config.max_images}")
    for number, image in enumerate(images, 1):
        check_picture(image, config, f"picture {number} of {len(images)}: " if len(images) > 1 else "")
    return Sample(row=row, messages=placed, images=tuple(images))


def without_tokens(sample: Sample, special_tokens: Sequence[str]) -> Sample:
    """The sample as it is.

    Raises:
        RowError: SPECIAL_TOKEN; a turn spells out what the base's tokenizer reads as control.
    """
    for message in sample.messages:
        token = next((token for token in special_tokens if token and token in text_of(message)), None)
        if token is not None:
            raise RowError(
                Reason.SPECIAL_TOKEN,
                f"{token!a} in a turn of the {message['role']} would be read as control by the model; write it otherwise",
            )
    return sample


def check_picture(data: bytes, config: IngestConfig, which: str = "") -> None:
    """Decode a picture within the limits.

    Args:
        data: the encoded picture.
        config: the limits.
        which: what names it in a message.

    Raises:
        RowError: PICTURE_TOO_LARGE or PICTURE_REFUSED.
    """
    if len(data) > config.max_image_bytes:
        raise RowError(Reason.PICTURE_TOO_LARGE, f"{which}{len(data)} bytes; the limit is {config.max_image_bytes}")
    try:
        decode_image(data, max_pixels=config.max_pixels)
    except ImageSizeError as error:
        raise RowError(Reason.PICTURE_TOO_LARGE, f"{which}{error}") from error
    except ImageError as error:
        raise RowError(Reason.PICTURE_REFUSED, f"{which}{error}") from error


def read_pictures(root: pathlib.Path, names: Sequence[str], config: IngestConfig) -> list[bytes]:
    """The pictures that a row names.

    Raises:
        RowError: too many, or one that is unsafe, missing or too large.
    """
    if len(names) > config.max_images:
        raise RowError(Reason.TOO_MANY_PICTURES, f"{len(names)}; the limit is {config.max_images}")
    return [read_inside(root, name, max_bytes=config.max_image_bytes) for name in names]


def encoded_alike(data: bytes, config: IngestConfig) -> bytes:
    """A picture decoded and encoded again, so that all pictures are files of one kind."""
    return encode_png(decode_image(data, max_pixels=config.max_pixels))


def _content(turn: Mapping[str, Any], what: str, *, split: bool) -> list[Part]:
    """The parts of a turn: its text (cut at marks where a person speaks), or the list of parts of Hugging Face's chat form."""
    content = turn.get(what)
    if not isinstance(content, list):
        text = text_field(turn, what)
        return parts_of(text) if split else [text_part(text)]
    parts: list[Part] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "image":
            parts.append(IMAGE)
        elif kind == "text":
            parts.append(text_part(text_field(part, "text")))
        elif kind == "image_url":
            raise RowError(Reason.URL, "URLs are not fetched; put the picture into the column")
        else:
            raise RowError(Reason.WRONG_TYPE, "a part of a turn must be {type: image} or {type: text, text}")
    return parts


def _place(messages: Sequence[Message], images: int) -> tuple[Message, ...]:
    placed = list(messages)
    marked = any(part["type"] == "image" for message in messages for part in message["content"])
    first = next((index for index, message in enumerate(messages) if message["role"] == "user"), None)
    if images and not marked and first is not None:
        content = [IMAGE] * images + placed[first]["content"]
        placed[first] = {"role": "user", "content": content}
    return tuple(placed)


def _check_turns(messages: Sequence[Message]) -> None:
    roles = [message["role"] for message in messages]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if not spoken or len(spoken) % 2 or spoken != ["user", "assistant"] * (len(spoken) // 2):
        raise RowError(Reason.TURN_ORDER, "questions and answers must alternate, from a question to an answer")
    for message in messages:
        if message["role"] == "assistant" and not text_of(message).strip():
            raise RowError(Reason.EMPTY_ANSWER)
        if message["role"] == "user" and not message["content"]:
            raise RowError(Reason.EMPTY_QUESTION)


def _check_places(messages: Sequence[Message], images: int) -> None:
    places = 0
    for message in messages:
        shown = sum(part["type"] == "image" for part in message["content"])
        if IMAGE_MARK in text_of(message) or (shown and message["role"] != "user"):
            raise RowError(Reason.IMAGE_PLACES, f"{IMAGE_MARK} in a turn of the {message['role']}; only questions show pictures")
        places += shown
    if places != images:
        raise RowError(Reason.IMAGE_PLACES, f"{places} places for {images} pictures")


def _check_text(messages: Sequence[Message], limit: int) -> None:
    texts = [text_of(message) for message in messages]
    size = sum(map(len, texts))
    if size > limit:
        raise RowError(Reason.TEXT_TOO_LONG, f"{size} characters; the limit is {limit}")
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise RowError(Reason.LONE_SURROGATE, f"character {error.start}; it can't be written as UTF-8") from None
