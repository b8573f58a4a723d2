"""What a model answers: greedy generation in batches, and the worker that answers whole shards."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import torch

from pipeline.models import Dtype, load_adapter, load_base
from pipeline.prompts import encode_prompts
from pipeline.records import Example, examples_of, sample_from_record

ANSWERS = pa.schema([("row", pa.int64()), ("turn", pa.int64()), ("output", pa.string())])
"""Columns of the tables that `AnswerWorker` gives."""


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
    device = getattr(model, "device", torch.device("cpu"))
    batch = {name: value.to(device) for name, value in encode_prompts(processor, examples).items()}
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerWorker:
    """Answers every assistant turn of the rows of a table (`row`, `messages`, `images`); gives `ANSWERS`."""

    model: Any
    processor: Any
    max_new_tokens: int

    def __call__(self, table: pa.Table) -> pa.Table:
        examples = [example for record in table.to_pylist() for example in examples_of(sample_from_record(record))]
        outputs: list[str] = []
        for start in range(0, len(examples), max(1, len(table))):
            batch = examples[start : start + len(table)]
            outputs += answer(self.model, self.processor, batch, max_new_tokens=self.max_new_tokens)
        columns = {"row": [e.row for e in examples], "turn": [e.turn for e in examples], "output": outputs}
        return pa.table(columns, schema=ANSWERS)


def answer_worker(*, base: str, adapter: str | None = None, dtype: Dtype = "auto", max_new_tokens: int) -> AnswerWorker:
    """Load a base and, if given, its adapter; the `build` argument of an engine's `map_shards`."""
    model, processor = load_base(pathlib.Path(base), dtype=dtype)
    if adapter is not None:
        model = load_adapter(model, pathlib.Path(adapter))
    return AnswerWorker(model=model, processor=processor, max_new_tokens=max_new_tokens)
