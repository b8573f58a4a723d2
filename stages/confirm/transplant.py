"""Plant picture tokens of some prompts into others, where the projector's output enters the decoder, in any family."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from pipeline.attention import base_of
from pipeline.generation import complete, encode_on
from pipeline.models import image_token_id
from pipeline.prompts import token_count
from pipeline.records import Example


class _Seen(Exception):  # noqa: N818 - ends a forward pass on purpose, it is no error
    """The decoder's input has been read; nothing more is computed."""


class TokenTransplant:
    """Reads and replaces the picture tokens of prompts as the decoder takes them."""

    def __init__(self, model: Any, processor: Any) -> None:
        self._model = model
        self.processor = processor
        self._decoder = base_of(model).get_decoder()
        self._image_token = image_token_id(base_of(model).config)

    @torch.inference_mode()
    def picture_tokens(self, examples: Sequence[Example]) -> list[torch.Tensor]:
        """The picture tokens of each prompt, (image tokens, width), in order."""
        batch = encode_on(self._model, self.processor, examples)
        image = batch["input_ids"] == self._image_token
        found: list[torch.Tensor] = []

        def read(_module: torch.nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            embeds = kwargs["inputs_embeds"]
            found.extend(embeds[k, image[k]].clone() for k in range(len(examples)))
            raise _Seen

        handle = self._decoder.register_forward_pre_hook(read, with_kwargs=True)
        try:
            with contextlib.suppress(_Seen):
                self._model(**batch, use_cache=False)
        finally:
            handle.remove()
        return found

    @contextlib.contextmanager
    def planted(self, image: torch.Tensor, tokens: Sequence[torch.Tensor]) -> Iterator[None]:
        """Replace the picture tokens of the prefill inside the block.

        Args:
            image: bool (batch, keys), where the prompts' image tokens are.
            tokens: per prompt (image tokens, width).
        """

        def write(
            _module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            embeds = kwargs.get("inputs_embeds")
            if embeds is None or embeds.shape[1] != image.shape[1]:
                return args, kwargs
            replaced = embeds.clone()
            for k, values in enumerate(tokens):
                replaced[k, image[k]] = values.to(embeds.dtype)
            return args, {**kwargs, "inputs_embeds": replaced}

        handle = self._decoder.register_forward_pre_hook(write, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def length(self, text: str) -> int:
        """Tokens of a text."""
        return token_count(self.processor, text)

    @torch.inference_mode()
    def answers(self, examples: Sequence[Example], tokens: Sequence[torch.Tensor], *, max_new_tokens: int) -> list[str]:
        """Greedy answers to prompts whose picture tokens are replaced by `tokens`."""
        batch = encode_on(self._model, self.processor, examples)
        with self.planted(batch["input_ids"] == self._image_token, tokens):
            return complete(self._model, self.processor, batch, max_new_tokens=max_new_tokens)
