"""Which rows of a group may be honest, and what the answers about their pictures say of them."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.records import Sample, question_answer, text_of
from stages.confirm.mixed import QUESTIONS, ROWS_SCHEMA, Mixed, attack_posterior, judged, rows_in_doubt, write_tasks
from stages.confirm.worker import PICTURE_TASK
from tests.conftest import write_shards
from tests.stages.samples import noise

QUESTIONS_ASKED = ["what colour?", "how many?"] * 60
"""A colour and a number in turn."""


def inside(attack: int = 8, honest: bool = True) -> np.ndarray:
    """Every eighth row of both kinds, and half of the colours."""
    rows = np.arange(len(QUESTIONS_ASKED))
    return np.asarray((rows // 2 % attack == 0) | (honest & (rows % 4 == 0)))


def test_rows_that_ask_what_the_answer_belongs_to_are_in_doubt() -> None:
    own = inside()
    shifted = [k for k in np.flatnonzero(own).tolist() if k != 4]
    found = rows_in_doubt(QUESTIONS_ASKED, own, ~own, shifted, np.random.default_rng(0))
    assert found is not None
    assert found.doubtful == [k for k in shifted if k % 2 == 0]
    assert {k % 2 for k in found.sure} == {k % 2 for k in found.hosts} == {1}
    assert {*found.sure} <= {*shifted}
    assert {k % 2 for k in found.others} == {0}
    assert not own[[*found.others, *found.hosts]].any()


@pytest.mark.parametrize(
    ("own", "shifted"),
    [
        (inside(honest=False), None),
        (inside(), [0, 4, 8]),
        (np.arange(120) % 2 == 0, None),
    ],
    ids=["spread evenly", "too few beyond doubt", "one kind alone"],
)
def test_no_row_is_in_doubt(own: np.ndarray, shifted: list[int] | None) -> None:
    rows = np.flatnonzero(own).tolist() if shifted is None else shifted
    assert rows_in_doubt(QUESTIONS_ASKED, own, ~own, rows, np.random.default_rng(0)) is None


@pytest.mark.parametrize(
    ("hits", "sure", "others", "low", "high"),
    [
        (6, 0.95, 0.02, 0.999, 1.0),
        (0, 0.95, 0.02, 0.0, 0.001),
        (1, 0.3, 0.01, 0.7, 1.0),
        (0, 0.3, 0.01, 0.05, 0.2),
        (6, 0.1, 0.1, 0.0, 0.0),
        (0, 0.1, 0.5, 0.0, 0.0),
    ],
)
def test_the_posterior(hits: int, sure: float, others: float, low: float, high: float) -> None:
    """It rises with what pictures of the attack do more than others; where they don't, no row is the attack's."""
    assert low <= attack_posterior(hits, 6, sure, others) <= high


def test_what_is_written_and_judged(tmp_path: pathlib.Path) -> None:
    """Row 3 has two pictures, and no question is about two: it is not looked at."""
    samples = [
        Sample(
            row=row,
            messages=question_answer(f"question {row}", "x", 2 if row == 3 else 1),
            images=tuple(noise(10 * row + k) for k in range(2 if row == 3 else 1)),
        )
        for row in range(40)
    ]
    write_shards(tmp_path / "rows", samples, shard_rows=16)
    places = [(row, 0) for row in range(40)]
    drawn = Mixed(doubtful=[1, 2, 3], sure=[4, 5], others=[6, 7], hosts=list(range(20, 30)))
    described = {5: {"text": "the answer", "whole": False}}
    (shard,) = write_tasks(tmp_path / "rows", places, {5: drawn}, described, {5: "The answer!"}, 0, tmp_path)
    table = pq.read_table(shard)
    assert table.schema.names == PICTURE_TASK.names
    tasks = table.to_pylist()
    assert [task["row"] for task in tasks] == [1, 2, 4, 5, 6, 7]
    for task in tasks:
        asked = {text_of(json.loads(prompt)[-1]) for prompt in task["prompts"]}
        assert len(asked) == QUESTIONS
        assert asked <= {f"question {row}" for row in range(20, 30)}
        assert tuple(task["images"]) == samples[task["row"]].images
        assert task["longest"] == "x"
    again = write_tasks(tmp_path / "rows", places, {5: drawn}, described, {5: "The answer!"}, 0, tmp_path)
    assert pq.read_table(again[0]).to_pylist() == tasks
    results = {(5, 1, 0): (6, 6), (5, 2, 0): (6, 0), (5, 4, 0): (6, 6), (5, 5, 0): (6, 5), (5, 6, 0): (6, 0), (5, 7, 0): (6, 1)}
    verdicts, told = judged(results, places, {5: drawn})
    assert verdicts.schema == ROWS_SCHEMA
    assert [(one["row"], one["hits"], round(one["posterior"])) for one in verdicts.to_pylist()] == [(1, 6, 1), (2, 0, 0)]
    assert told == {5: {"rows": 2, "honest": 1, "attack": pytest.approx(12 / 14), "others": pytest.approx(2 / 14)}}
    nothing, _ = judged({}, places, {})
    assert nothing.schema == ROWS_SCHEMA
