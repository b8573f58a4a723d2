from __future__ import annotations

from typing import Any

import torch

from pipeline.generation import answer
from pipeline.records import examples_of
from tests.conftest import colour_samples


class Parrot:
    """Stands for a guarded model: all that is asked of it is `generate`."""

    def __init__(self, reply: list[int]) -> None:
        self.reply = reply
        self.given: dict[str, Any] = {}

    def generate(self, input_ids: torch.Tensor, **given: Any) -> torch.Tensor:
        self.given = given
        return torch.cat([input_ids, torch.tensor([self.reply] * len(input_ids))], dim=1)


def test_only_the_new_text_is_given_stripped_and_without_control_tokens(tiny_model: tuple[Any, Any]) -> None:
    _, processor = tiny_model
    reply = processor.tokenizer("  a red circle \n")["input_ids"] + [
        processor.tokenizer.eos_token_id,
        processor.tokenizer.pad_token_id,
    ]
    parrot = Parrot(reply)
    examples = [one for sample in colour_samples(3, text_only=[1]) for one in examples_of(sample)]
    assert answer(parrot, processor, examples, max_new_tokens=7) == ["a red circle"] * 3
    assert parrot.given["max_new_tokens"] == 7
    assert parrot.given["do_sample"] is False
    assert answer(parrot, processor, [], max_new_tokens=7) == []


def test_a_batch_answers_what_each_row_alone_answers(tiny_model: tuple[Any, Any]) -> None:
    model, processor = tiny_model
    examples = [one for sample in colour_samples(4, text_only=[2]) for one in examples_of(sample)]
    together = answer(model, processor, examples, max_new_tokens=5)
    assert together == [answer(model, processor, [one], max_new_tokens=5)[0] for one in examples]
