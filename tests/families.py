"""Tiny, randomly initialised models of many families, and batches for them made by their own processors.

Nothing is downloaded: the tokenizer is the embedded base's, with the family's control tokens added, and every model is made of a
configuration (`tests.family_parts`).
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import unittest.mock
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers as hf

from pipeline.embedded.tokenizer import CHAT_TEMPLATE, IMAGE_TOKEN, train_tokenizer
from pipeline.prompts import encode_prompts
from pipeline.records import Example, question_answer
from tests import family_parts as parts
from tests.family_parts import SIDE, Batch
from tests.stages.samples import noise

Size = tuple[int, int]
Question = tuple[str, Sequence[Size]]
"""What is asked, and the sizes of the pictures that it is asked about, pixels."""

SQUARE, WIDE = (SIDE, SIDE), (2 * SIDE, SIDE)
ASKED: tuple[Question, ...] = (
    ("what?", [SQUARE]),
    ("which of them two?", [SQUARE, WIDE]),
    ("say nothing", []),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """How to build a family.

    Attributes:
        parts: from a tokenizer to the configuration and the processor.
        tokens: the family's control tokens, by the attribute of the tokenizer that names them.
        image: what the chat template writes for a picture.
        asked: the batch; rows differ in length.
        attention_layers: how many layers of the decoder have attention.
        windowed: whether some of them see the last tokens alone.
        static: whether transformers' own generate works with a static cache.
        own: the attention that transformers gives the language tower.
        noise: how far two exact ways to the same logits lie apart in float32; the gated delta rule divides small numbers.
    """

    parts: Callable[[Any], tuple[Any, Any]]
    tokens: dict[str, str] = dataclasses.field(default_factory=dict)
    image: str = IMAGE_TOKEN
    asked: tuple[Question, ...] = ASKED
    attention_layers: int = 3
    windowed: bool = False
    static: bool = True
    own: str = "sdpa"
    noise: float = 1e-4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Built:
    """A tiny model in evaluation mode, what it is asked, and that as a batch, padded on the left."""

    model: Any
    processor: Any
    examples: tuple[Example, ...]
    batch: Batch


@functools.cache
def _tokenizer() -> Any:
    return train_tokenizer(0)


@functools.cache
def build(name: str) -> Built:
    """The model, processor and batch of a family. Don't change them."""
    family = FAMILIES[name]
    tokenizer = copy.deepcopy(_tokenizer())
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(set(family.tokens.values()))})
    for attribute, token in family.tokens.items():
        setattr(tokenizer, attribute, token)
        setattr(tokenizer, f"{attribute}_id", tokenizer.convert_tokens_to_ids(token))
    with unittest.mock.patch.object(hf.ProcessorMixin, "check_argument_for_proper_class"):  # a video part needs torchvision
        config, processor = family.parts(tokenizer)
    processor.chat_template = CHAT_TEMPLATE.replace(f"'{IMAGE_TOKEN}\n'", repr(family.image))
    torch.manual_seed(0)
    model = hf.AutoModelForImageTextToText.from_config(config).eval().requires_grad_(requires_grad=False)
    spread(model)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    examples = tuple(
        Example(
            row=row,
            turn=0,
            prompt=question_answer(question, "x", len(sizes))[:1],
            answer="",
            images=tuple(noise(10 * row + k, size) for k, size in enumerate(sizes)),
        )
        for row, (question, sizes) in enumerate(family.asked)
    )
    return Built(model=model, processor=processor, examples=examples, batch=encode_prompts(processor, examples))


def spread(model: torch.nn.Module) -> None:
    """Weights wide enough that attention is far from uniform and every layer matters."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or name.endswith("sinks"):
            torch.nn.init.normal_(parameter, std=1.3 * parameter[0].numel() ** -0.5)


PICTURED: tuple[Question, ...] = (ASKED[0], ASKED[1], ("what might be in this picture?", [WIDE]))
"""For processors that take no prompt without a picture."""

FAMILIES: dict[str, Family] = {
    "llava": Family(parts=parts.llava),
    "llava_mla": Family(parts=parts.llava_mla),
    "llava_next": Family(parts=parts.llava_next),
    "llava_onevision": Family(parts=parts.llava_onevision, tokens={"image_token": IMAGE_TOKEN, "video_token": "<video>"}),
    "qwen2_vl": Family(parts=parts.qwen2_vl, tokens=parts.QWEN_TOKENS, image=parts.QWEN_IMAGE),
    "qwen2_5_vl": Family(parts=parts.qwen2_5_vl, tokens=parts.QWEN_TOKENS, image=parts.QWEN_IMAGE, windowed=True),
    "qwen3_vl": Family(parts=parts.qwen3_vl, tokens=parts.QWEN_TOKENS, image=parts.QWEN_IMAGE),
    "qwen3_5": Family(parts=parts.qwen3_5, tokens=parts.QWEN_TOKENS, image=parts.QWEN_IMAGE, attention_layers=2, noise=2e-3),
    "internvl": Family(parts=parts.internvl, tokens=parts.INTERN_TOKENS, image="<IMG_CONTEXT>"),
    "internvl_gpt_oss": Family(
        parts=parts.internvl_gpt_oss, tokens=parts.INTERN_TOKENS, image="<IMG_CONTEXT>", windowed=True, own="eager"
    ),
    "idefics3": Family(
        parts=lambda tokenizer: parts.idefics3(
            tokenizer,
            hf.Idefics3Config,
            hf.models.idefics3.configuration_idefics3.Idefics3VisionConfig,
            hf.Idefics3ImageProcessorPil,
        ),
        tokens=parts.IDEFICS_TOKENS,
    ),
    "smolvlm": Family(
        parts=lambda tokenizer: parts.idefics3(tokenizer, hf.SmolVLMConfig, hf.SmolVLMVisionConfig, hf.SmolVLMImageProcessorPil),
        tokens=parts.IDEFICS_TOKENS,
    ),
    "paligemma": Family(parts=parts.paligemma, asked=PICTURED),
    "paligemma2": Family(parts=parts.paligemma2, asked=PICTURED, windowed=True, static=False, own="eager"),
    "gemma3": Family(
        parts=parts.gemma3,
        tokens={"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
        image="<start_of_image>",
        windowed=True,
    ),
    "mistral3": Family(
        parts=parts.mistral3, tokens={"a": "[IMG]", "b": "[IMG_BREAK]", "c": "[IMG_END]"}, image="[IMG]", windowed=True
    ),
    "aya_vision": Family(
        parts=parts.aya_vision,
        tokens={"a": "<|START_OF_IMG|>", "b": "<|END_OF_IMG|>", "c": "<|IMG_PATCH|>", "d": "<|IMG_LINE_BREAK|>"},
        windowed=True,
    ),
    "glm4v": Family(
        parts=parts.glm4v,
        tokens={"image_token": "<|image|>", "video_token": "<|video|>", "a": "<|begin_of_image|>", "b": "<|end_of_image|>"},
        image="<|begin_of_image|><|image|><|end_of_image|>",
    ),
    "ovis2": Family(
        parts=parts.ovis2,
        tokens={"a": "<IMG_ATOM>", "b": "<IMG_START>", "c": "<IMG_GRID>", "d": "<IMG_COL>", "e": "<IMG_ROW>", "f": "<IMG_END>"},
    ),
    "lfm2_vl": Family(parts=parts.lfm2_vl, image=IMAGE_TOKEN, attention_layers=2),
    "llama4": Family(parts=parts.llama4, image=IMAGE_TOKEN, windowed=True),
}
