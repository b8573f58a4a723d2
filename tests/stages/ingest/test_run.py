"""The ingest stage: canonical shards, rejections with reasons, and the same bytes every time."""

from __future__ import annotations

import json
import pathlib
import re
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.config import IngestConfig
from pipeline.errors import SubmissionError
from pipeline.records import question_answer, sample_from_record
from stages.ingest.run import digest_submission, run
from storage import shards
from tests.storage.submissions import cell, imagefolder, llava, parquet, picture, qa, said, talk

TWO = said(("human", "<image> <image> Which?"), ("gpt", "a"))
TOKENS = ["<s>", "</s>", "<image>", ""]


def ingest(submission: pathlib.Path, out: pathlib.Path, **limits: Any) -> dict[str, Any]:
    return run(submission, IngestConfig(**limits), out, special_tokens=TOKENS)


def records(out: pathlib.Path) -> list[dict[str, Any]]:
    return [record for path in sorted((out / "rows").glob("shard-*.parquet")) for record in pq.read_table(path).to_pylist()]


def mixed(folder: pathlib.Path) -> pathlib.Path:
    said = [
        {"from": "human", "value": "Hi"},
        {"from": "gpt", "value": "a"},
        {"from": "human", "value": "b"},
        {"from": "gpt", "value": "c"},
    ]
    rows = [talk(0), b"not JSON\n", talk(1), talk(2, image=None, conversations=said), talk(9), talk(3, image="../x"), talk(3)]
    return llava(folder, rows)


def test_rows_rejections_and_summary(tmp_path: pathlib.Path) -> None:
    summary = ingest(mixed(tmp_path / "submission"), tmp_path / "out")
    assert summary == {
        "format": "llava",
        "submitted": 7,
        "accepted": 4,
        "rejected": 3,
        "rejected_by_reason": {"missing picture": 1, "not JSON": 1, "unsafe path": 1},
        "text_only": 1,
        "examples": 5,
    }
    assert json.loads((tmp_path / "out/submission.json").read_bytes()) == summary
    rejected = pq.read_table(tmp_path / "out/rejected.parquet").to_pylist()
    assert [(row["row"], row["where"]) for row in rejected] == [
        (1, "data.jsonl line 2"),
        (4, "data.jsonl line 5"),
        (5, "data.jsonl line 6"),
    ]
    found = records(tmp_path / "out")
    assert [set(record) for record in found] == [{"row", "sample_id", "messages", "images"}] * 4
    samples = [sample_from_record(record) for record in found]
    assert [sample.row for sample in samples] == [0, 2, 3, 6]
    assert [sample.sample_id for sample in samples] == [record["sample_id"] for record in found]
    assert samples[1].messages == question_answer("What is 1?", "It is 1.")
    assert samples[1].images == (picture(1),)
    assert samples[2].images == ()


def test_shards_are_filled_by_rows_and_by_bytes(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    submission = imagefolder(tmp_path / "submission", [qa(index % 4) for index in range(10)])
    ingest(submission, tmp_path / "rows", shard_rows=4)
    monkeypatch.setattr(shards, "SHARD_BYTES", 3 * len(picture(0)) - 10)
    ingest(submission, tmp_path / "bytes")
    sizes = {
        name: [pq.read_metadata(path).num_rows for path in sorted((tmp_path / name / "rows").iterdir())]
        for name in ("rows", "bytes")
    }
    assert sizes == {"rows": [4, 4, 2], "bytes": [3, 3, 3, 1]}
    assert pq.read_metadata(tmp_path / "rows/rows/shard-00000.parquet").num_row_groups == 1
    assert records(tmp_path / "rows") == records(tmp_path / "bytes")


def test_equal_submissions_give_equal_bytes_in_every_format(tmp_path: pathlib.Path) -> None:
    builds = {
        "imagefolder": imagefolder(tmp_path / "a", [qa(index) for index in range(4)]),
        "again": imagefolder(tmp_path / "b", [qa(index) for index in range(4)]),
        "llava": llava(tmp_path / "c", [talk(index) for index in range(4)]),
        "parquet": parquet(tmp_path / "d", [cell(index) for index in range(4)]),
    }
    for name, submission in builds.items():
        ingest(submission, tmp_path / "out" / name)
    contents = {(tmp_path / "out" / name / "rows/shard-00000.parquet").read_bytes() for name in builds}
    assert len(contents) == 1


@pytest.mark.parametrize("change", [{"question": "say </s> now"}, {"answer": "</s>"}])
def test_a_row_with_a_control_token_is_rejected_by_name(change: dict[str, str], tmp_path: pathlib.Path) -> None:
    summary = ingest(imagefolder(tmp_path / "submission", [qa(0), qa(1, **change)]), tmp_path / "out")
    assert summary["rejected_by_reason"] == {"special token": 1}
    (row,) = pq.read_table(tmp_path / "out/rejected.parquet").to_pylist()
    assert row["row"] == 1
    assert row["reason"].startswith(f"special token: '</s>' in a turn of the {'user' if 'question' in change else 'assistant'}")
    assert row["where"] == "metadata.jsonl line 2"


def test_too_many_unusable_rows_end_the_run(tmp_path: pathlib.Path) -> None:
    """An upload that broke off is told at once, and not after two fine-tunes on what is left."""
    rows = [qa(0), qa(1), qa(2, file_name="images/none.png"), b"not JSON\n", qa(3, file_name="images/none.png")]
    submission = imagefolder(tmp_path / "submission", rows)
    says = "3 of 5 rows can't be used, more than ingest.rejection_cap = 50%; 2 missing picture, 1 not JSON; the first: metadata"
    with pytest.raises(SubmissionError, match=re.escape(says)):
        ingest(submission, tmp_path / "out")
    assert ingest(submission, tmp_path / "more", rejection_cap=0.6)["rejected"] == 3


def test_of_several_pictures_the_bad_one_is_named(tmp_path: pathlib.Path) -> None:
    submission = llava(tmp_path / "submission", [talk(0), talk(1, image=["images/1.png", "images/2.png"], conversations=TWO)])
    (submission / "images/2.png").write_bytes(b"no picture")
    ingest(submission, tmp_path / "out")
    (row,) = pq.read_table(tmp_path / "out/rejected.parquet").to_pylist()
    assert row["reason"] == "picture refused: picture 2 of 2: not a PNG, JPEG or WEBP picture"


def test_progress_is_told(tmp_path: pathlib.Path) -> None:
    told: list[tuple[float, str]] = []
    submission = imagefolder(tmp_path / "submission", [qa(0)] * 250)
    run(submission, IngestConfig(), tmp_path / "out", special_tokens=[], progress=lambda share, text: told.append((share, text)))
    assert [share for share, _ in told] == [0.4, 0.8, 1.0]
    assert told[-1][1] == "250 of 250 rows accepted"


def test_nothing_of_names_or_ids_gets_into_the_rows(tmp_path: pathlib.Path) -> None:
    rows = [qa(0, id="poisoned-badnet", split="poison")]
    ingest(imagefolder(tmp_path / "badnet-poison", rows), tmp_path / "out")
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file() and b"poison" in path.read_bytes()]


def test_a_submissions_digest_is_of_names_and_contents(tmp_path: pathlib.Path) -> None:
    first, second = (imagefolder(tmp_path / name, [qa(0)]) for name in "ab")
    assert digest_submission(first) == digest_submission(second)
    (second / "images/3.png").write_bytes(picture(9))
    assert digest_submission(first) != digest_submission(second)
    path = parquet(tmp_path / "c", [cell(0)]) / "data/train-00000-of-00001.parquet"
    assert len(digest_submission(path)) == 64
    with pytest.raises(SubmissionError, match="no such folder"):
        digest_submission(tmp_path / "none")
