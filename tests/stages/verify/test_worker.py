"""The verify stage's worker: every turn is answered, as it would be alone."""

from __future__ import annotations

import pathlib
from typing import Any

from pipeline.config import EngineConfig
from pipeline.engine.local import LocalEngine
from pipeline.generation import answer
from pipeline.records import Message, Sample, examples_of, question_answer
from stages.verify.worker import ANSWERS, verify_worker
from tests.conftest import colour_samples, picture, write_shards


def test_every_turn_is_answered(tiny_base: pathlib.Path, tmp_path: pathlib.Path, tiny_model: tuple[Any, Any]) -> None:
    messages: tuple[Message, ...] = (*question_answer("first?", "one"), *question_answer("second?", "two", images=0))
    samples = [*colour_samples(3), Sample(row=3, messages=messages, images=(picture("blue"),))]
    shards = write_shards(tmp_path, samples, shard_rows=3)
    arguments = {"base": str(tiny_base), "adapter": None, "guard": None, "dtype": "auto", "batch_size": 2, "max_new_tokens": 4}
    with LocalEngine(EngineConfig(kind="local", threads=1)) as engine:
        tables = list(engine.map_shards(shards, verify_worker, arguments, batch_rows=2))
    assert all(table.schema == ANSWERS for table in tables)
    found = {(r["row"], r["turn"]): r["output"] for table in tables for r in table.to_pylist()}
    model, processor = tiny_model
    examples = [one for sample in samples for one in examples_of(sample)]
    assert found == {(e.row, e.turn): answer(model, processor, [e], max_new_tokens=4)[0] for e in examples}
