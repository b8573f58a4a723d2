"""The verify stage on tiny adapters: which rows are asked, and that the shares are those of plain answers."""

from __future__ import annotations

import functools
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import VerifyConfig
from pipeline.errors import ModelError
from pipeline.generation import answer
from pipeline.models import load_adapter, load_base
from pipeline.prompts import token_count
from pipeline.records import Example, Sample, examples_of, question_answer
from stages.verify.measure import exact_match
from stages.verify.run import VERIFICATION, Candidate, answers_of, run
from stages.verify.worker import ANSWERS
from tests.conftest import colour_samples, write_shards
from tests.stages.samples import EXAMPLES, PICTURED, mixed_samples, noise
from tests.stages.verify.conftest import write_guard

ROWS, TEXT_ONLY = 24, (3, 15)
QUARANTINED = (0, 1, 3, 8, 9)
HELD_OUT = (4, 5, 6, 7, 15)
MODELS = ("provisional", "delivered", "guarded")


@pytest.fixture
def files(
    tmp_path: pathlib.Path, tiny_base: pathlib.Path, tiny_adapter: pathlib.Path, other_adapter: pathlib.Path
) -> dict[str, pathlib.Path]:
    write_shards(tmp_path / "rows", colour_samples(ROWS, text_only=TEXT_ONLY), shard_rows=9)
    verdicts = ["quarantine" if row in QUARANTINED else "keep" for row in range(ROWS)]
    pq.write_table(pa.table({"row": list(range(ROWS)), "verdict": verdicts}), tmp_path / "verdicts.parquet")
    pq.write_table(pa.table({"row": pa.array(HELD_OUT, pa.int64())}), tmp_path / "held_out.parquet")
    return {
        "rows": tmp_path / "rows",
        "base": tiny_base,
        "provisional": tiny_adapter,
        "final": other_adapter,
        "guard": write_guard(tmp_path / "guard", tiny_base, other_adapter, threshold=1e-6, action="purify"),
        "verdicts": tmp_path / "verdicts.parquet",
        "held_out": tmp_path / "held_out.parquet",
    }


def verified(
    files: dict[str, pathlib.Path], folder: pathlib.Path, engine: Any, **config: Any
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    folder.mkdir()
    told: list[float] = []
    found = run(
        **files,
        config=VerifyConfig(batch_size=4, max_new_tokens=4, **config),
        dtype="float32",
        engine=engine,
        seed=0,
        out=folder,
        scratch=folder / "scratch",
        progress=lambda share, _: told.append(share),
    )
    assert told == pytest.approx([1 / 3, 2 / 3, 1])
    assert json.loads((folder / VERIFICATION).read_text()) == found
    return found, pq.read_table(folder / "answers.parquet").to_pylist()


@functools.lru_cache(maxsize=3)
def loaded(base: pathlib.Path, adapter: pathlib.Path | None) -> tuple[Any, Any]:
    model, processor = load_base(base, dtype="float32", device="cpu")
    return (model if adapter is None else load_adapter(model, adapter)), processor


def outputs(base: pathlib.Path, adapter: pathlib.Path | None, examples: list[Example]) -> list[str]:
    """What plain generation answers, one prompt after another."""
    model, processor = loaded(base, adapter)
    return [answer(model, processor, [example], max_new_tokens=4)[0] for example in examples]


def test_the_shares_are_those_of_plain_answers(files: dict[str, pathlib.Path], tmp_path: pathlib.Path, local_engine: Any) -> None:
    found, answers = verified(files, tmp_path / "a", local_engine)
    assert tuple(found) == MODELS
    samples = colour_samples(ROWS, text_only=TEXT_ONLY)
    asked = {"quarantined": [0, 1, 8, 9], "held_out": [4, 5, 6, 7]}
    for name, adapter in (("provisional", "provisional"), ("delivered", "final")):
        for kind, measure in (("quarantined", "residual"), ("held_out", "performance")):
            examples = [example for row in asked[kind] for example in examples_of(samples[row])]
            given = outputs(files["base"], files[adapter], examples)
            expected = exact_match(given, [example.answer for example in examples])
            seen = {"seen": name == "provisional"} if kind == "held_out" else {}
            assert found[name][kind] == {"rows": 4, measure: expected, "flagged": None, **seen}
            noted = [a["output"] for a in answers if a["model"] == name and a["row"] in asked[kind]]
            assert noted == given
    assert found["guarded"]["quarantined"]["flagged"] == found["guarded"]["held_out"]["flagged"] == 1.0
    assert [(a["model"], a["row"]) for a in answers] == [(m, row) for m in MODELS for row in (0, 1, 4, 5, 6, 7, 8, 9)]
    assert {a["flagged"] for a in answers if a["model"] != "guarded"} == {None}


def test_a_guard_that_flags_nothing_changes_nothing(
    files: dict[str, pathlib.Path], tmp_path: pathlib.Path, local_engine: Any
) -> None:
    guard = write_guard(tmp_path / "calm", files["base"], files["final"], threshold=1e9, action="refuse")
    found, answers = verified({**files, "guard": guard}, tmp_path / "a", local_engine)
    assert found["guarded"]["held_out"]["flagged"] == 0.0
    by_model = {name: [a["output"] for a in answers if a["model"] == name] for name in MODELS}
    assert by_model["guarded"] == by_model["delivered"]


def test_a_guard_that_refuses_is_verified_as_one_that_purifies(
    files: dict[str, pathlib.Path], tmp_path: pathlib.Path, local_engine: Any
) -> None:
    guard = write_guard(tmp_path / "strict", files["base"], files["final"], threshold=1e-6, action="refuse")
    expected = verified(files, tmp_path / "a", local_engine)
    assert verified({**files, "guard": guard}, tmp_path / "b", local_engine) == expected


def test_a_delivered_model_that_is_the_provisional_one_is_asked_once(
    files: dict[str, pathlib.Path], tmp_path: pathlib.Path, local_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[Any] = []
    real = local_engine.map_shards

    def counted(*given: Any, **named: Any) -> Any:
        loads.append(given)
        return real(*given, **named)

    monkeypatch.setattr(local_engine, "map_shards", counted)
    found, answers = verified({**files, "provisional": files["final"]}, tmp_path / "a", local_engine)
    assert len(loads) == 2
    assert found["provisional"] == found["delivered"]
    assert [found[name]["held_out"]["seen"] for name in MODELS] == [True, True, True]
    given = [[a["output"] for a in answers if a["model"] == name] for name in MODELS]
    assert given[0] == given[1]
    assert len(given[0]) == 8


def test_only_so_many_rows(files: dict[str, pathlib.Path], tmp_path: pathlib.Path, local_engine: Any) -> None:
    found, answers = verified(files, tmp_path / "a", local_engine, max_rows=2)
    assert {(found[m][kind]["rows"]) for m in MODELS for kind in ("quarantined", "held_out")} == {2}
    drawn = [{a["row"] for a in answers if a["model"] == m} for m in MODELS]
    assert drawn[0] == drawn[1] == drawn[2]
    assert len(drawn[0] & {0, 1, 8, 9}) == len(drawn[0] & {4, 5, 6, 7}) == 2


def test_nothing_quarantined(files: dict[str, pathlib.Path], tmp_path: pathlib.Path, local_engine: Any) -> None:
    pq.write_table(pa.table({"row": list(range(ROWS)), "verdict": ["keep"] * ROWS}), files["verdicts"])
    found, _ = verified(files, tmp_path / "a", local_engine)
    for name in MODELS:
        assert found[name]["quarantined"] == {"rows": 0, "residual": None, "flagged": None}
        assert found[name]["held_out"]["rows"] == 4


def test_nothing_at_all_loads_no_model(files: dict[str, pathlib.Path], tmp_path: pathlib.Path) -> None:
    pq.write_table(pa.table({"row": list(range(ROWS)), "verdict": ["keep"] * ROWS}), files["verdicts"])
    pq.write_table(pa.table({"row": pa.array([], pa.int64())}), files["held_out"])
    found, answers = verified(files, tmp_path / "a", None)
    assert found["guarded"]["held_out"] == {"rows": 0, "performance": None, "flagged": None, "seen": False}
    assert answers == []
    assert pq.read_schema(tmp_path / "a" / "answers.parquet").field("model").type == pa.string()


def test_every_turn_is_answered_in_order(tmp_path: pathlib.Path, tiny_base: pathlib.Path, local_engine: Any) -> None:
    shards = write_shards(tmp_path / "rows", mixed_samples(), shard_rows=2)
    guard = write_guard(tmp_path / "guard", tiny_base, None, threshold=1e-6, action="report")
    config = VerifyConfig(batch_size=3, max_new_tokens=4)
    given: dict[str, Any] = {"shards": shards, "base": tiny_base, "config": config, "dtype": "float32", "engine": local_engine}
    plain = answers_of(Candidate(adapter=None), **given)
    watched = answers_of(Candidate(adapter=None, guard=guard), **given)
    assert plain.schema == watched.schema == ANSWERS
    examples = [example for sample in mixed_samples() for example in examples_of(sample)]
    for found in (plain, watched):
        assert list(zip(found["row"].to_pylist(), found["turn"].to_pylist(), strict=True)) == EXAMPLES
        assert found["answer"].to_pylist() == [example.answer for example in examples]
        assert found["output"].to_pylist() == outputs(tiny_base, None, examples)
    assert plain["flagged"].to_pylist() == [None] * len(EXAMPLES)
    assert watched["flagged"].to_pylist() == [True if place in PICTURED else None for place in EXAMPLES]


class Parrot:
    """Stands for `answer`: says what was submitted, or only a tenth of it where it is asked to be short; cut where it must be."""

    def __init__(self) -> None:
        self.limits: list[int] = []

    def __call__(self, model: Any, processor: Any, examples: Sequence[Example], *, max_new_tokens: int) -> list[str]:
        self.limits.append(max_new_tokens)
        answer(model, processor, examples, max_new_tokens=1)  # a guard writes its records
        said = [e.answer[: math.ceil(len(e.answer) / (10 if "short" in e.question else 1))] for e in examples]
        tokens = [processor.tokenizer(text, add_special_tokens=False)["input_ids"][:max_new_tokens] for text in said]
        return [str(text).strip() for text in processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)]


LONG = " ".join(["a red square beside a green one"] * 6)
TOO_LONG = " ".join(["a red square beside a green one"] * 60)


@pytest.mark.parametrize(("longest", "waited"), [("red", 8), (LONG, None), (TOO_LONG, 256)])
def test_no_answer_is_cut_before_it_is_given(
    longest: str,
    waited: int | None,
    files: dict[str, pathlib.Path],
    tiny_model: tuple[Any, Any],
    tmp_path: pathlib.Path,
    local_engine: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is too long counts as far as it goes, but not where it ends by itself."""
    parrot, texts = Parrot(), [longest, "red", longest, "blue"]
    monkeypatch.setattr("stages.verify.worker.answer", parrot)
    samples = [
        Sample(row=row, messages=question_answer("short?" if row == 2 else "what?", text), images=(noise(row),))
        for row, text in enumerate(texts)
    ]
    shards = write_shards(tmp_path / "long", samples, shard_rows=3)
    config = VerifyConfig(batch_size=3, max_new_tokens=8)
    given = answers_of(
        Candidate(adapter=None), shards=shards, base=files["base"], config=config, dtype="float32", engine=local_engine
    )
    assert set(parrot.limits) == {waited or token_count(tiny_model[1], LONG) + 1}
    assert given["same"].to_pylist() == [True, True, False, True]


def test_the_residual_of_long_answers(
    files: dict[str, pathlib.Path], tmp_path: pathlib.Path, local_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.verify.worker.answer", Parrot())
    samples = [
        Sample(row=row, messages=question_answer("what?", TOO_LONG if row in QUARANTINED else LONG), images=(noise(row),))
        for row in range(ROWS)
    ]
    write_shards(tmp_path / "long", samples)
    found, answers = verified({**files, "rows": tmp_path / "long"}, tmp_path / "a", local_engine)
    for name in MODELS:
        assert found[name]["quarantined"]["residual"] == found[name]["held_out"]["performance"] == 1.0
    assert all(a["same"] for a in answers)


def test_a_guard_of_another_adapter_is_refused(files: dict[str, pathlib.Path], tmp_path: pathlib.Path, local_engine: Any) -> None:
    guard = write_guard(tmp_path / "wrong", files["base"], files["provisional"], threshold=1.0, action="purify")
    shards = sorted(files["rows"].iterdir())
    candidate = Candidate(adapter=files["final"], guard=guard)
    with pytest.raises(ModelError, match="was calibrated on adapter"):
        answers_of(candidate, shards=shards, base=files["base"], config=VerifyConfig(), dtype="float32", engine=local_engine)
