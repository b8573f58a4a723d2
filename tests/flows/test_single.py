"""Fine-tuning and evaluating alone: the rows that are named, the models that are told apart, the store that is shared."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows import line
from flows.engines import LazyEngine
from flows.line import open_line, special_tokens
from flows.single import _long_enough, evaluate_model, finetune_plain, read_rows
from pipeline.config import RunConfig
from pipeline.errors import ConfigError, ModelError
from pipeline.models import load_adapter, load_base, load_processor
from stages.verify.evaluate import evaluate
from tests.flows.conftest import ROWS, TARGET


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("rows.txt", "3\n1\n\n2\n3\n", [1, 2, 3]),
        ("rows.jsonl", '{"row": 4, "poisoned": false}\n{"row": 0}\n', [0, 4]),
    ],
)
def test_rows_from_lines(tmp_path: pathlib.Path, name: str, content: str, expected: list[int]) -> None:
    (tmp_path / name).write_text(content)
    assert read_rows(tmp_path / name) == expected


def test_rows_from_parquet(tmp_path: pathlib.Path) -> None:
    pq.write_table(pa.table({"row": [5, 2], "other": ["a", "b"]}), tmp_path / "rows.parquet")
    assert read_rows(tmp_path / "rows.parquet") == [2, 5]


@pytest.mark.parametrize("content", ["", "x\n", "-1\n", '{"line": 1}\n', "[1]\n", '"a"\n', "null\n"])
def test_rows_that_are_none(tmp_path: pathlib.Path, content: str) -> None:
    (tmp_path / "rows.txt").write_text(content)
    with pytest.raises(ConfigError, match="--rows"):
        read_rows(tmp_path / "rows.txt")


def test_rows_from_a_missing_or_broken_file(tmp_path: pathlib.Path) -> None:
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    pq.write_table(pa.table({"number": [1]}), tmp_path / "other.parquet")
    for name in ("missing.txt", "missing.parquet", "broken.parquet", "other.parquet"):
        with pytest.raises(ConfigError, match="--rows"):
            read_rows(tmp_path / name)


def test_special_tokens_are_the_tokenizers(tiny_base: pathlib.Path, tmp_path: pathlib.Path) -> None:
    tokens = special_tokens(tiny_base)
    assert tokens == sorted(tokens)
    assert {"<image>", "</s>"} <= set(tokens)
    with pytest.raises(ModelError, match="tokenizer"):
        special_tokens(tmp_path)


def test_finetune_then_evaluate(
    poisoned: pathlib.Path, tiny_base: pathlib.Path, quick: RunConfig, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch: list[pathlib.Path] = []

    def watched(*given: Any, **named: Any) -> dict[str, Any]:
        scratch.append(named["scratch"])
        return evaluate(*given, **named)

    monkeypatch.setattr("stages.verify.evaluate.evaluate", watched)
    submission, out, store = poisoned / "submission", tmp_path / "adapter", tmp_path / "store"
    (tmp_path / "rows.txt").write_text("\n".join(map(str, range(32))))
    summary = finetune_plain(submission, out, base=tiny_base, config=quick, store=store, rows=tmp_path / "rows.txt")
    assert (summary["rows"], summary["steps"]) == (32, 2)
    assert {"adapter_config.json", "adapter_model.safetensors", "loss.jsonl"} <= {path.name for path in out.iterdir()}
    load_adapter(load_base(tiny_base, device="cpu")[0], out)
    with pytest.raises(ConfigError, match="something already"):
        finetune_plain(submission, out, base=tiny_base, config=quick, store=store, rows=None)
    found = evaluate_model(
        out, submission, base=tiny_base, config=quick, store=store, trigger="badnet", target=TARGET, trigger_seed=0
    )
    assert found["rows"] == found["triggered_rows"] == ROWS
    assert found["guarded"] is False
    assert scratch[0].is_relative_to(store), "other nodes don't see the driver's temporary folder"
    assert not scratch[0].exists()
    assert 0 <= found["clean"] <= 1
    assert 0 <= found["asr"] <= 1
    plain = evaluate_model(tiny_base, submission, base=None, config=quick, store=store)
    assert (plain["rows"], plain.get("asr")) == (ROWS, None)
    assert len(list((store / "ingest").iterdir())) == 1  # read once for all


def test_chosen_rows_have_keys_of_their_own(
    poisoned: pathlib.Path, tiny_base: pathlib.Path, quick: RunConfig, tmp_path: pathlib.Path
) -> None:
    with LazyEngine(quick.engine) as engine:
        run = open_line(poisoned / "submission", tiny_base, quick, tmp_path / "store", engine)
        ingested = line.ingest(run)
        first, second, again = (line.choose(run, ingested, rows) for rows in ([1, 2], [1, 3], [1, 2]))
    assert first.key == again.key != second.key
    assert again.reused


def test_what_is_no_model_or_half_a_request(tmp_path: pathlib.Path, tiny_base: pathlib.Path, quick: RunConfig) -> None:
    def evaluate(model: pathlib.Path, **given: str | pathlib.Path | None) -> None:
        evaluate_model(model, tmp_path, config=quick, store=tmp_path / "store", **{"base": None, **given})  # type: ignore[arg-type]

    with pytest.raises(ConfigError, match="go together"):
        evaluate(tiny_base, trigger="badnet")
    with pytest.raises(ConfigError, match="go together"):
        evaluate(tiny_base, target="x")
    with pytest.raises(ModelError, match="neither a delivery"):
        evaluate(tmp_path)
    with pytest.raises(ModelError, match="--base is for adapters"):
        evaluate(tiny_base, base=tiny_base)


def test_answers_are_waited_for_as_long_as_the_target_is(tiny_base: pathlib.Path, quick: RunConfig) -> None:
    assert _long_enough(quick.verify, "a", tiny_base).max_new_tokens >= quick.verify.max_new_tokens
    length = len(load_processor(tiny_base).tokenizer("visit the shop " * 9, add_special_tokens=False)["input_ids"])
    longer = _long_enough(quick.verify, "visit the shop " * 9, tiny_base)
    assert longer == quick.verify.model_copy(update={"max_new_tokens": length + 1})


def test_the_store_may_not_lie_in_the_submission(poisoned: pathlib.Path, tiny_base: pathlib.Path, quick: RunConfig) -> None:
    submission = poisoned / "submission"
    with LazyEngine(quick.engine) as engine, pytest.raises(ConfigError, match="--store"):
        open_line(submission, tiny_base, quick, submission / ".byesight", engine)
    assert json.loads((poisoned / "truth.jsonl").read_text().splitlines()[0])["row"] == 0
