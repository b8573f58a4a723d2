"""What a model answers: greedy generation in batches; and the random numbers of generation that is not greedy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from pipeline.prompts import encode_prompts
from pipeline.records import Example

LONGEST = 256
"""Tokens of an answer that are waited for, at most; what is longer counts as given as far as it goes."""


class RandomState:
    """The random numbers that sampling on a device goes on with, as they stand when this is made."""

    def __init__(self, device: torch.device) -> None:
        self._gpus = [device] if device.type == "cuda" else []
        self._cpu = torch.get_rng_state()
        self._states = [torch.cuda.get_rng_state(gpu) for gpu in self._gpus]

    def restore(self) -> None:
        """Go on as it stood."""
        torch.set_rng_state(self._cpu)
        for gpu, state in zip(self._gpus, self._states, strict=True):
            torch.cuda.set_rng_state(state, gpu)

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Inside, go on as it stood; afterwards as it stands now."""
        with torch.random.fork_rng(self._gpus):
            self.restore()
            yield


def answer(model: Any, processor: Any, examples: Sequence[Example], *, max_new_tokens: int) -> list[str]:
    """Greedy answers to a batch of prompts.

    Args:
        model: anything with the `generate` of transformers, a guarded model too; it gives the prompt back before the answer.
        processor: the base's processor.
        examples: what is asked; their own answers are not looked at.
        max_new_tokens: longest answer, tokens.

    Returns:
        One text per example, stripped.
    """
    if not examples:
        return []
    return complete(model, processor, encode_on(model, processor, examples), max_new_tokens=max_new_tokens)


def tokens_to_wait_for(longest: int, usual: int) -> int:
    """How many tokens to generate, at least `usual`: an answer of `longest` tokens is not cut, up to `LONGEST` of them."""
    return max(usual, min(LONGEST, longest + 1))


def encode_on(model: Any, processor: Any, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    """The prompts of a batch on the model's device, padded on the left."""
    device = getattr(model, "device", torch.device("cpu"))
    return {name: value.to(device) for name, value in encode_prompts(processor, examples).items()}


def complete(model: Any, processor: Any, batch: dict[str, torch.Tensor], *, max_new_tokens: int) -> list[str]:
    """Greedy answers to prompts that are encoded already, one text per row, stripped."""
    output = model.generate(
        **batch,
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        max_new_tokens=max_new_tokens,
        pad_token_id=processor.tokenizer.pad_token_id,
    )
    texts = processor.tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]
