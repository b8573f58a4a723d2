"""The actor of the verify stage: what a model answers, with its guard or without."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import pyarrow as pa

from pipeline.generation import answer
from pipeline.models import Dtype, base_identity, load_adapter, load_base
from pipeline.prompts import token_count
from pipeline.records import examples_of, sample_from_record
from stages.verify.measure import same

ANSWERS = pa.schema(
    [
        ("row", pa.int64()),
        ("turn", pa.int32()),
        ("answer", pa.string()),
        ("output", pa.string()),
        ("same", pa.bool_()),
        ("flagged", pa.bool_()),
    ]
)
"""One record per example: the submitted answer, the model's, whether they are the same (as far as was waited for it), and whether
the guard flagged it (null where none looked at it)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifyWorker:
    """Holds a model, guarded or not; turns canonical records into `ANSWERS`."""

    model: Any
    processor: Any
    batch_size: int
    max_new_tokens: int
    guarded: bool

    def __call__(self, table: pa.Table) -> pa.Table:
        examples = [example for record in table.to_pylist() for example in examples_of(sample_from_record(record))]
        outputs: list[str] = []
        flags: list[bool | None] = []
        for start in range(0, len(examples), self.batch_size):
            batch = examples[start : start + self.batch_size]
            outputs += answer(self.model, self.processor, batch, max_new_tokens=self.max_new_tokens)
            flags += (
                [record.flagged if record.ran else None for record in self.model.records] if self.guarded else [None] * len(batch)
            )
        columns = {
            "row": [example.row for example in examples],
            "turn": [example.turn for example in examples],
            "answer": [example.answer for example in examples],
            "output": outputs,
            "same": [self.given(output, example.answer) for output, example in zip(outputs, examples, strict=True)],
            "flagged": flags,
        }
        return pa.table(columns, schema=ANSWERS)

    def given(self, output: str, answer: str) -> bool:
        """Whether an output is the answer.

        An answer longer than what is waited for is given where it begins with the output. That must be half as long as what was
        waited for, at least (its tokens counted again can be fewer): shorter ones ended by themselves.
        """
        cut = token_count(self.processor, answer) >= self.max_new_tokens
        return same(output, answer, cut=cut and 2 * token_count(self.processor, output) >= self.max_new_tokens)


def verify_worker(
    *, base: str, adapter: str | None, guard: str | None, dtype: Dtype, batch_size: int, max_new_tokens: int
) -> VerifyWorker:
    """Load a base, its adapter and its guard; the `build` argument of an engine's `map_shards`."""
    model, processor = load_base(pathlib.Path(base), dtype=dtype)
    if adapter is not None:
        model = load_adapter(model, pathlib.Path(adapter))
    if guard is not None:
        from stages.guard.files import adapter_digest, load_guard
        from stages.guard.guarded import GuardedModel

        digest = adapter_digest(pathlib.Path(adapter)) if adapter else ""
        found = load_guard(pathlib.Path(guard), base=base_identity(pathlib.Path(base)), adapter=digest)
        action = "purify" if found.policy.action == "refuse" else found.policy.action
        policy = dataclasses.replace(found.policy, action=action, on_error="raise")
        model = GuardedModel.of(model, dataclasses.replace(found, policy=policy))
    return VerifyWorker(
        model=model, processor=processor, batch_size=batch_size, max_new_tokens=max_new_tokens, guarded=guard is not None
    )
