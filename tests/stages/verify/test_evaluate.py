"""Clean performance and attack success of any model, with the trigger on the pictures alone."""

from __future__ import annotations

import math
import pathlib
from typing import Any

import numpy as np
import pytest

from pipeline.config import VerifyConfig
from pipeline.errors import SubmissionError
from pipeline.images import decode_image
from pipeline.records import Sample, examples_of, question_answer
from pipeline.triggers import make_trigger
from stages.verify.evaluate import evaluate, triggered
from stages.verify.measure import attack_success, exact_match
from stages.verify.run import Candidate
from tests.conftest import colour_samples, picture, write_shards
from tests.stages.samples import mixed_samples
from tests.stages.verify.conftest import write_guard
from tests.stages.verify.test_run import outputs

ROWS, TEXT_ONLY = 10, (2, 7)
SAMPLES = colour_samples(ROWS, text_only=TEXT_ONLY)


@pytest.fixture
def rows(tmp_path: pathlib.Path) -> pathlib.Path:
    write_shards(tmp_path / "rows", SAMPLES, shard_rows=4)
    return tmp_path / "rows"


def evaluated(
    candidate: Candidate, rows: pathlib.Path, base: pathlib.Path, scratch: pathlib.Path, engine: Any, **attack: Any
) -> dict[str, Any]:
    return evaluate(
        candidate,
        rows=rows,
        base=base,
        trigger=attack.get("trigger"),
        target=attack.get("target"),
        config=VerifyConfig(batch_size=4, max_new_tokens=4),
        dtype="float32",
        engine=engine,
        seed=3,
        scratch=scratch,
    )


@pytest.mark.parametrize("adapted", [True, False])
def test_the_figures(
    adapted: bool,
    rows: pathlib.Path,
    tmp_path: pathlib.Path,
    tiny_base: pathlib.Path,
    tiny_adapter: pathlib.Path,
    local_engine: Any,
) -> None:
    adapter = tiny_adapter if adapted else None
    clean = [example for sample in SAMPLES for example in examples_of(sample)]
    answers = [example.answer for example in clean]
    given = outputs(tiny_base, adapter, clean)
    plain = evaluated(Candidate(adapter=adapter), rows, tiny_base, tmp_path / "plain", local_engine)
    assert plain == {"rows": ROWS, "clean": exact_match(given, answers), "flagged": None}

    trigger = make_trigger("badnet-random", 0)
    marked = [e for s in SAMPLES if s.images for e in examples_of(triggered(s, trigger, 3))]
    given = outputs(tiny_base, adapter, marked)
    target = max(set(given), key=given.count)
    found = evaluated(
        Candidate(adapter=adapter), rows, tiny_base, tmp_path / "b", local_engine, trigger=trigger, target=target.upper()
    )
    answers = [example.answer for example in marked]
    assert found == {
        **plain,
        "triggered_rows": ROWS - len(TEXT_ONLY),
        "asr": pytest.approx(attack_success(given, answers, target), nan_ok=True),
        "triggered_right": exact_match(given, answers),
        "triggered_flagged": None,
    }


def test_flags_are_counted_where_the_guard_looked(
    rows: pathlib.Path, tmp_path: pathlib.Path, tiny_base: pathlib.Path, tiny_adapter: pathlib.Path, local_engine: Any
) -> None:
    guard = write_guard(tmp_path / "guard", tiny_base, tiny_adapter, threshold=1e-6, action="report")
    found = evaluated(
        Candidate(adapter=tiny_adapter, guard=guard),
        rows,
        tiny_base,
        tmp_path / "a",
        local_engine,
        trigger=make_trigger("blended", 0),
        target="x",
    )
    assert (found["flagged"], found["triggered_flagged"]) == (1.0, 1.0)


def test_an_attack_needs_its_target_and_a_picture(
    rows: pathlib.Path, tmp_path: pathlib.Path, tiny_base: pathlib.Path, local_engine: Any
) -> None:
    trigger, base = make_trigger("sig", 0), Candidate(adapter=None)
    for target in (None, ""):
        with pytest.raises(SubmissionError, match="needs its target"):
            evaluated(base, rows, tiny_base, tmp_path / f"a{target}", local_engine, trigger=trigger, target=target)
    write_shards(tmp_path / "text", colour_samples(2, text_only=[0, 1]))
    with pytest.raises(SubmissionError, match="no row holds a picture"):
        evaluated(base, tmp_path / "text", tiny_base, tmp_path / "c", local_engine, trigger=trigger, target="x")


def test_a_target_that_all_answers_hold_leaves_no_row(
    rows: pathlib.Path, tmp_path: pathlib.Path, tiny_base: pathlib.Path, local_engine: Any
) -> None:
    samples = [Sample(row=0, messages=question_answer("what?", "a red one"), images=(picture(),))]
    write_shards(tmp_path / "one", samples)
    trigger = make_trigger("badnet", 0)
    found = evaluated(
        Candidate(adapter=None), tmp_path / "one", tiny_base, tmp_path / "a", local_engine, trigger=trigger, target="Red"
    )
    assert math.isnan(found["asr"])
    assert found["triggered_rows"] == 1


def test_the_trigger_is_on_the_first_picture() -> None:
    sample = mixed_samples()[3]
    assert len(sample.images) == 2
    trigger = make_trigger("badnet-random", 0)
    found = triggered(sample, trigger, 5)
    assert (found.row, found.messages, found.images[1]) == (sample.row, sample.messages, sample.images[1])
    before, after = (np.asarray(decode_image(s.images[0])).astype(int) for s in (sample, found))
    assert 0 < (before != after).any(axis=2).sum() <= 36
    assert triggered(sample, trigger, 5) == found
    assert len({triggered(sample, trigger, seed).images[0] for seed in range(6)}) > 3
