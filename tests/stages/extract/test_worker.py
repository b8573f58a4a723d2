"""The extract worker by itself: what it calls the model with, and tables of one schema whatever it is given."""

from __future__ import annotations

import pathlib
from typing import Any

import pyarrow as pa
import pytest

from pipeline.records import Example, messages_to_json
from stages.extract.worker import LISTS, ExtractWorker, records_to_table
from tests.conftest import SHARD_SCHEMA, colour_samples
from tests.stages.samples import EXAMPLES, PICTURED, mixed_samples

LAYERS, HEADS, IMAGE_TOKENS = 3, 4, 64


@pytest.fixture(scope="module")
def worker(tiny_base: pathlib.Path) -> ExtractWorker:
    return ExtractWorker(base=str(tiny_base), adapter=None, dtype="float32", batch_size=4, top_tokens=80)


def table_of(samples: list[Any]) -> pa.Table:
    records = [
        {"row": s.row, "sample_id": s.sample_id, "messages": messages_to_json(s.messages), "images": list(s.images)}
        for s in samples
    ]
    return pa.Table.from_pylist(records, schema=SHARD_SCHEMA)


def test_a_batch_is_of_examples_with_pictures(worker: ExtractWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six of the nine examples show a picture: no model is called for the others, nor with more than four."""
    batches: list[list[tuple[int, int]]] = []
    real = worker.statistics

    def watched(examples: list[Example]) -> list[dict[str, Any]]:
        batches.append([(example.row, example.turn) for example in examples])
        return real(examples)

    monkeypatch.setattr(worker, "statistics", watched)
    found = worker(table_of(mixed_samples()))
    assert batches == [PICTURED[:4], PICTURED[4:]]
    assert list(zip(found["row"].to_pylist(), found["turn"].to_pylist(), strict=True)) == EXAMPLES


def test_text_alone_needs_no_model_and_fits_to_the_rest(worker: ExtractWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    pictured = worker(table_of(colour_samples(2)))
    monkeypatch.setattr(worker, "model", None)
    text = worker(table_of(colour_samples(3, text_only=[0, 1, 2])))
    nothing = worker(table_of([]))
    assert text.schema == nothing.schema == pictured.schema
    assert pa.concat_tables([pictured, text, nothing]).num_rows == 5
    assert nothing.num_rows == 0
    for record in text.to_pylist():
        assert (record["image_tokens"], record["layers"], record["heads"]) == (0, 0, 0)
        assert all(record[name] == [] for name in LISTS)
        assert record["question"].startswith("say ")


def test_more_top_tokens_than_there_are(worker: ExtractWorker) -> None:
    """All are given by falling weight, then places without a token; a picture beside another shifts neither."""
    for record in worker(table_of(mixed_samples())).to_pylist():
        there = record["image_tokens"]
        for layer in range(record["layers"]):
            own = slice(80 * layer, 80 * (layer + 1))
            positions, weights = record["top_positions"][own], record["top_weights"][own]
            assert len(positions) == len(weights) == 80
            assert weights == sorted(weights, reverse=True)
            assert len(set(positions[:there])) == min(there, 80)
            assert set(positions[:there]) <= set(range(there))
            assert positions[there:] == [-1] * (80 - min(there, 80))
            assert not any(weights[there:])
            if there <= 80:
                assert sum(weights) == pytest.approx(1, abs=1e-5)


def test_the_adapter_is_what_is_looked_at(worker: ExtractWorker, tiny_base: pathlib.Path, tiny_adapter: pathlib.Path) -> None:
    adapted = ExtractWorker(base=str(tiny_base), adapter=str(tiny_adapter), dtype="float32", batch_size=4, top_tokens=80)
    given = table_of(colour_samples(4))
    plain, found = worker(given), adapted(given)
    assert plain.schema == found.schema
    for before, after in zip(plain["entropy"].to_pylist(), found["entropy"].to_pylist(), strict=True):
        assert before != pytest.approx(after, abs=1e-4)


def test_statistics_are_flat_with_layers_first(worker: ExtractWorker) -> None:
    (record,) = worker(table_of(colour_samples(1))).to_pylist()
    assert (record["image_tokens"], record["layers"], record["heads"]) == (IMAGE_TOKENS, LAYERS, HEADS)
    assert {name: len(record[name]) for name in LISTS} == {
        "entropy": LAYERS,
        **dict.fromkeys(("head_entropy", "image_share", "ratio"), LAYERS * HEADS),
        **dict.fromkeys(("top_positions", "top_weights"), LAYERS * 80),
    }


def test_the_types_of_the_table() -> None:
    schema = records_to_table([], {}).schema
    assert {name: str(schema.field(name).type) for name in ("row", "turn", "question", "answer", "layers")} == {
        "row": "int64",
        "turn": "int32",
        "question": "string",
        "answer": "string",
        "layers": "int32",
    }
    assert {str(schema.field(name).type.value_type) for name in LISTS if name != "top_positions"} == {"float"}
    assert str(schema.field("top_positions").type.value_type) == "int32"
