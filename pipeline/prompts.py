"""From examples to model inputs, for any decoder-only image-text processor: training sees the tokens that inference sees."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import re
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jinja2
import torch
from PIL import Image

from pipeline.errors import ModelError, SubmissionError
from pipeline.images import ImageError, decode_image, image_size
from pipeline.records import Example, Message, question_answer

IGNORED = -100
"""Label of the positions that the loss leaves out."""

_LABELS = "labels"
"""PaliGemma's processor writes them, of what has the token type 1: what has 0 is a prefix, whose tokens see one another."""

_REFUSALS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
"""What a chat template raises of turns that it isn't made for."""

_PART = re.compile(r"\{['\"]type['\"]:")
"""How a part of a message begins where a template writes the list of them."""

Batch = dict[str, torch.Tensor]


def check_template(processor: Any, image_token: int) -> None:
    """Refuse a chat template that loses what rows say or show, by a row of its own.

    Args:
        processor: the base's processor.
        image_token: id of the token that stands for a piece of a picture.

    Raises:
        ModelError: there is no template; it can't write a question about a picture and its answer, or leaves one of the three out.
    """
    picture = io.BytesIO()
    Image.new("RGB", (64, 64)).save(picture, format="PNG")
    question, answer = "which fruit is this?", "a yellow quince"
    asked, said = question_answer(question, answer)
    mend = "put the template of the model's own processor into the folder (chat_template.jinja)"
    try:
        prompt, whole = prompt_text(processor, [asked]), _written(processor, [asked, said], add_generation_prompt=False)
    except _REFUSALS as error:
        raise ModelError(f"its chat template can't write a picture, a question and an answer: {error}; {mend}") from error
    for text, written in ((question, prompt), (answer, whole)):
        if text not in written:
            raise ModelError(f"its chat template leaves the text out ({text!r} became {written!r}); {mend}")
    try:
        batch = encode_prompts(processor, [Example(row=0, turn=0, prompt=(asked,), answer=answer, images=(picture.getvalue(),))])
    except SubmissionError as error:
        raise ModelError(f"its processor refuses a picture by its chat template ({prompt!r}): {error.__cause__}; {mend}") from error
    if not (batch["input_ids"] == image_token).any():
        raise ModelError(f"its chat template leaves the picture out ({prompt!r}); {mend}")


def prompt_text(processor: Any, prompt: Sequence[Message]) -> str:
    """The chat template's text of the messages before an answer, ending where the answer begins.

    Control tokens that the submitted text spells out (`<image>`, an end of sequence) get a zero-width space inside: they stay text.

    Raises:
        ValueError: the template writes a message's list of parts in the place of their text; and what else a template raises.
    """
    return _written(processor, _as_text(processor, prompt), add_generation_prompt=True)


def encode_prompts(processor: Any, examples: Sequence[Example]) -> Batch:
    """The prompts of a batch, without their answers, padded on the left.

    Returns:
        All that the processor gives: input_ids and attention_mask (batch, tokens), and its tensors of the pictures.

    Raises:
        SubmissionError: a row that the chat template or the processor refuses, or a picture that can't be decoded; names the row.
    """
    batch = _process(processor, examples, [_row_prompt(processor, example) for example in examples])
    batch.pop(_LABELS, None)
    return batch


def answer_tokens(processor: Any, examples: Sequence[Example]) -> list[list[int]]:
    """What a model is trained to say to each example: the tokens of its answer, and those that the chat template ends it with.

    Raises:
        SubmissionError: a row that the chat template refuses; names the row.
        ModelError: the template's text with an answer doesn't begin with its text of the prompt.
    """
    return _answer_tokens(processor, examples, [_row_prompt(processor, example) for example in examples])


def encode_training(processor: Any, examples: Sequence[Example], max_length: int) -> Batch:
    """Prompts followed by their answers, padded on the right.

    Args:
        processor: the base's processor.
        examples: a batch; text-only examples may be among them.
        max_length: longest example, tokens.

    Returns:
        input_ids, attention_mask and labels (batch, tokens), labels `IGNORED` on prompt and padding; any other per-token tensor of
        the processor, zero on the answer, but `token_type_ids` one where that marks what is trained on; its tensors of the
        pictures as they are.

    Raises:
        SubmissionError: as `encode_prompts`, and for an example longer than `max_length`; names the row.
    """
    texts = [_row_prompt(processor, example) for example in examples]
    tokens = _answer_tokens(processor, examples, texts)
    batch = _process(processor, examples, texts)
    marked = batch.pop(_LABELS, None) is not None
    kept = batch["attention_mask"].bool()
    lengths = [int(n) + len(answer) for n, answer in zip(kept.sum(1), tokens, strict=True)]
    for example, length in zip(examples, lengths, strict=True):
        _check_length(example, length, max_length, "with")
    longest = max(lengths)
    shape = batch["input_ids"].shape
    per_token = [name for name, value in batch.items() if value.shape == shape and not value.is_floating_point()]
    encoded = {name: value for name, value in batch.items() if name not in per_token}
    fills = {"input_ids": processor.tokenizer.pad_token_id}
    for name in [*per_token, "labels"]:
        padded = torch.full((len(examples), longest), IGNORED if name == "labels" else fills.get(name, 0), dtype=torch.long)
        for index, answer in enumerate(tokens):
            start = lengths[index] - len(answer)
            if name != "labels":
                padded[index, :start] = batch[name][index, kept[index]]
            if name in ("input_ids", "labels"):
                padded[index, start : lengths[index]] = torch.tensor(answer, dtype=torch.long)
            elif name == "attention_mask" or (name == "token_type_ids" and marked):
                padded[index, start : lengths[index]] = 1
        encoded[name] = padded
    return encoded


def check_lengths(processor: Any, examples: Iterable[Example], max_length: int) -> None:
    """Refuse examples that can't be trained on, before any is: by their texts and the sizes of their pictures.

    No picture is decoded, but of an example that seems too long. Where a processor can't tell the tokens of a size (or tells a few
    too little), the texts alone are counted, and what is too long with its pictures is refused by `encode_training`.

    Args:
        processor: the base's processor.
        examples: of every row the last.
        max_length: longest example, tokens.

    Raises:
        SubmissionError: an example that the chat template refuses, that is longer than `max_length`, or that shows no picture to a
            processor that needs one; names the row.
    """
    count: Any = getattr(processor, "_get_num_multimodal_tokens", None)  # of (height, width); transformers has it for other servers
    image_tokens = functools.lru_cache(lambda size: int(count(image_sizes=[size[::-1]])["num_image_tokens"][0]))
    tried = False
    for example in examples:
        prompt = _row_prompt(processor, example)
        if not tried and (text_only := _without_picture(example)):
            tried = True  # alone: a batch, or a worker's share of one, may hold such examples only
            _check_text_only(processor, text_only)
        length = token_count(processor, prompt + _row_completion(processor, example, prompt))
        _check_length(example, length, max_length, "without")
        if count is not None and length + sum(image_tokens(image_size(image)) for image in example.images) > max_length:
            encode_training(processor, [example], max_length)


def token_count(processor: Any, text: str) -> int:
    """Tokens of a text as it is, with none added around it."""
    return len(processor.tokenizer(text, add_special_tokens=False)["input_ids"])


def _without_picture(example: Example) -> Example | None:
    """An example, or the first of its row, if it shows no picture."""
    if not example.images:
        return example
    first = next((k for k, message in enumerate(example.prompt) if message["role"] == "assistant"), None)
    prompt = example.prompt[:first]
    if first is None or any(part["type"] == "image" for message in prompt for part in message["content"]):
        return None
    return dataclasses.replace(example, turn=0, prompt=prompt, images=())


def _check_text_only(processor: Any, example: Example) -> None:
    try:
        encode_prompts(processor, [example])
    except SubmissionError as error:
        raise SubmissionError(
            f"{error}; it answers where no picture is shown yet, which this base can't be trained on: "
            "take such rows out, or name another --base"
        ) from error


def _check_length(example: Example, length: int, max_length: int, pictures: str) -> None:
    if length > max_length:
        raise SubmissionError(
            f"row {example.row}, answer {example.turn}: {length} tokens {pictures} its pictures, the limit is {max_length}; "
            "raise finetune.max_length or take the row out"
        )


def _as_text(processor: Any, messages: Sequence[Message]) -> list[Message]:
    """Messages whose text can't be read as control tokens."""
    control = _control_tokens(processor.tokenizer)
    return [
        {
            "role": message["role"],
            "content": [
                {"type": "text", "text": control.sub(_break, part["text"])} if part["type"] == "text" else part
                for part in message["content"]
            ],
        }
        for message in messages
    ]


def _break(match: re.Match[str]) -> str:
    return f"{match[0][0]}\u200b{match[0][1:]}"


def control_tokens(tokenizer: Any) -> list[str]:
    """What a tokenizer reads as control, sorted."""
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return sorted({str(token) for token in (*added, *tokenizer.all_special_tokens) if len(str(token)) > 1})


_patterns: weakref.WeakKeyDictionary[Any, re.Pattern[str]] = weakref.WeakKeyDictionary()


def _control_tokens(tokenizer: Any) -> re.Pattern[str]:
    """Matches any special token of a tokenizer, spelt out; the pattern is made once per tokenizer."""
    if tokenizer not in _patterns:
        longest_first = sorted(control_tokens(tokenizer), key=len, reverse=True)
        _patterns[tokenizer] = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
    return _patterns[tokenizer]


def _written(processor: Any, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
    """The chat template's text of messages; a ValueError where it writes the list of a message's parts."""
    text = str(processor.apply_chat_template(list(messages), add_generation_prompt=add_generation_prompt, tokenize=False))
    given = (part["text"] for message in messages for part in message["content"] if part["type"] == "text")
    if _PART.search(text) and not any(map(_PART.search, given)):
        raise ValueError(f"it writes the list of a message's parts in the place of their text: {text!r}")
    return text


def _completion(processor: Any, messages: list[Message], before: str) -> str:
    """What the chat template adds for an answer; an end of sequence is added where the template writes no control token."""
    whole = _written(processor, messages, add_generation_prompt=False)
    if not whole.startswith(before):
        raise ModelError(
            "the chat template's text with an answer doesn't begin with its text of the prompt; it can't be trained on"
        )
    completion = whole[len(before) :]
    if _control_tokens(processor.tokenizer).search(completion):
        return completion
    return completion.rstrip() + str(processor.tokenizer.eos_token)


def _row_prompt(processor: Any, example: Example) -> str:
    with _turns_of(example):
        return prompt_text(processor, example.prompt)


def _row_completion(processor: Any, example: Example, before: str) -> str:
    reply: Message = {"role": "assistant", "content": [{"type": "text", "text": example.answer}]}
    with _turns_of(example):
        return _completion(processor, _as_text(processor, [*example.prompt, reply]), before)


@contextlib.contextmanager
def _turns_of(example: Example) -> Iterator[None]:
    """Name the row whose turns the chat template refuses."""
    try:
        yield
    except _REFUSALS as error:
        raise SubmissionError(f"row {example.row}: the base's chat template refuses its turns: {error}") from error


def _answer_tokens(processor: Any, examples: Sequence[Example], prompts: Sequence[str]) -> list[list[int]]:
    answers = [_row_completion(processor, example, prompt) for example, prompt in zip(examples, prompts, strict=True)]
    return list(processor.tokenizer(answers, add_special_tokens=False)["input_ids"])


def _process(processor: Any, examples: Sequence[Example], texts: Sequence[str]) -> Batch:
    """Run the processor over prompts and their pictures; padded on the left."""
    pictures = _pictures(examples)
    bos = processor.tokenizer.bos_token
    call = functools.partial(
        processor,
        padding=True,
        padding_side="left",
        return_tensors="pt",
        add_special_tokens=not (bos and texts[0].startswith(bos)),
    )
    try:
        batch = dict(call(text=list(texts), images=pictures if any(pictures) else None))
    except (ValueError, IndexError, KeyError, TypeError, RuntimeError, StopIteration) as error:
        for example, text, images in zip(examples, texts, pictures, strict=True):
            try:
                call(text=[text], images=[images] if images else None)
            except (ValueError, IndexError, KeyError, TypeError, RuntimeError, StopIteration) as cause:
                raise SubmissionError(f"row {example.row}: the base's processor refuses it: {cause}") from cause
        raise ModelError(
            f"the base's processor refuses a batch of {len(examples)} rows that it takes one by one: {error}"
        ) from error
    return batch


def _pictures(examples: Sequence[Example]) -> list[list[Any]]:
    """Decoded, each once: the turns of a row share theirs."""
    decoded: dict[int, Any] = {}
    for example in examples:
        for image in example.images:
            if id(image) in decoded:
                continue
            try:
                decoded[id(image)] = decode_image(image)
            except ImageError as error:
                raise SubmissionError(f"row {example.row}: {error}") from error
    return [[decoded[id(image)] for image in example.images] for example in examples]
