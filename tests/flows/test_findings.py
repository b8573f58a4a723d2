"""Findings: what is read from the stages' files, for method and for rows that are odd."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows import findings
from flows.figures import thumbnail
from pipeline.images import decode_image
from pipeline.records import Sample, question_answer, sample_from_record
from storage.subset import canonical_shards
from tests.conftest import write_shards
from tests.flows.made_results import GRID, HOSTILE, POISONED, ROWS, Made, picture


def test_suspects_are_the_strongest_and_the_weakest_in_order(made: Made) -> None:
    suspects = findings.read_suspects(made.results.sources(), limit=4)
    rows = sorted(POISONED)
    assert [suspect.row for suspect in suspects] == [rows[0], rows[1], rows[-2], rows[-1]]
    assert suspects[0].question == suspects[0].answer == suspects[0].reason == HOSTILE
    assert (suspects[0].score, suspects[0].posterior) == (5.0, 1.0)
    assert all(suspect.marked and suspect.picture.startswith("data:image/jpeg") for suspect in suspects)


def test_of_several_turns_the_groups_is_shown_with_the_pictures_that_it_saw(made: Made) -> None:
    """A picture comes with every question, a third one after the turn that is shifted most."""
    turns = [message for k in range(3) for message in question_answer(f"question {k}", f"answer {k}")]
    pictures = tuple(picture(100 + k) for k in range(3))
    shards = made.folder / "ingest" / "rows"
    samples = [sample_from_record(r) for path in canonical_shards(shards) for r in pq.read_table(path).to_pylist()]
    samples[5] = Sample(row=5, messages=tuple(turns), images=pictures)
    shutil.rmtree(shards)
    write_shards(shards, samples)
    path = made.folder / "extract" / "attention.parquet"
    records = pq.read_table(path).to_pylist()
    seen = {**records[5], "image_tokens": 2 * GRID**2, "turn": 1, "top_positions": [GRID**2 + 3] * len(records[5]["top_positions"])}
    pq.write_table(pa.Table.from_pylist([*records[:6], seen, *records[6:]]), path)
    path = made.folder / "score" / "members.parquet"
    members = pq.read_table(path).to_pylist()
    second = {"group": 1, "row": 5, "turn": 1, "projection": 9.0, "posterior": 1.0}
    pq.write_table(pa.Table.from_pylist([second, *members]), path)
    suspect = next(suspect for suspect in findings.read_suspects(made.results.sources()) if suspect.row == 5)
    assert (suspect.question, suspect.answer) == ("question 1", "answer 1")
    assert suspect.marked
    assert suspect.picture == thumbnail(decode_image(pictures[1]), [3], GRID)


def test_no_quarantine_no_suspects(made: Made) -> None:
    path = made.folder / "cluster" / "verdicts.parquet"
    table = pq.read_table(path)
    pq.write_table(table.filter(np.asarray(table["verdict"].to_pylist()) != "quarantine"), path)
    assert findings.read_suspects(made.results.sources()) == []
    assert findings.read_scores(made.folder / "cluster", method="transfer").cut is None


def test_marks_come_from_the_layer_where_the_group_shifts(made: Made) -> None:
    record = pq.read_table(made.folder / "extract" / "attention.parquet").to_pylist()[0]
    assert findings.attended_tokens(record, [2]) == [GRID**2 - 1, 0, 1]
    assert findings.attended_tokens(record, [3])[0] == 3
    assert set(findings.attended_tokens(record, [])) == {0, 1, 2, 3, 4, 5, GRID**2 - 1}
    assert findings.attended_tokens({}, [1]) == []
    with_group = findings.read_suspects(made.results.sources())[0].picture
    groups = json.loads((made.folder / "confirm" / "transfer.json").read_text())
    groups[1]["layer"] = 0
    (made.folder / "confirm" / "transfer.json").write_text(json.dumps(groups))
    assert findings.read_suspects(made.results.sources())[0].picture != with_group
    (made.folder / "confirm" / "transfer.json").write_text("[]")  # then the sensitive layer's
    assert findings.read_suspects(made.results.sources())[0].marked


@pytest.mark.parametrize(
    ("pictures", "tokens", "marked"),
    [
        ([(64, 64)], GRID**2, True),
        ([(64, 64)], GRID**2 + 1, False),
        ([(64, 64), (64, 64)], 2 * GRID**2, True),
        ([(64, 64), (64, 64)], GRID**2 + 1, False),
        ([(64, 20)], GRID**2, False),
        ([], 0, False),
    ],
)
def test_only_a_square_grid_is_marked(pictures: list[tuple[int, int]], tokens: int, marked: bool) -> None:
    images = [picture(k, size) for k, size in enumerate(pictures)]
    record = {"image_tokens": tokens, "layers": 1, "top_positions": [tokens - 1, 0], "top_weights": [0.9, 0.1]}
    uri, found = findings._picture(images, record, [0])
    assert found is marked
    assert bool(uri) is bool(images)


def test_a_damaged_picture_is_left_out() -> None:
    assert findings._picture([b"no picture"], {}, []) == ("", False)


def test_scores_leave_out_rejected_rows_and_know_the_cut(made: Made) -> None:
    scores = findings.read_scores(made.folder / "cluster", method="transfer")
    assert len(scores.score) == len(scores.removed) == ROWS
    assert scores.removed.sum() == len(POISONED)
    assert scores.cut == 5.0
    assert findings.read_scores(made.folder / "cluster", method="bye").cut == 5.0 + max(POISONED) / 100


def test_groups_come_with_the_largest_transfer_first(made: Made) -> None:
    assert [group["group"] for group in findings.read_groups(made.folder / "confirm")] == [1, 0]


def test_rejected_rows_and_losses(made: Made) -> None:
    assert [row["row"] for row in findings.read_rejected(made.folder / "ingest", 10)] == [ROWS]
    assert findings.read_losses(made.folder / "final")[:2] == [(1, 3.0), (2, 1.5)]
    assert len(findings.read_calibration(made.folder / "guard")) == 50
