"""The demonstration's rows: readable, mixed, repeatable."""

from __future__ import annotations

import json
import pathlib

from flows.demo_data import write_scenes
from pipeline.config import IngestConfig
from pipeline.records import Sample
from storage.formats import open_submission
from storage.manifests import digest_folder


def test_scenes_are_a_mixed_imagefolder_and_repeat(tmp_path: pathlib.Path) -> None:
    write_scenes(tmp_path / "one", rows=60, seed=3)
    write_scenes(tmp_path / "two", rows=60, seed=3)
    write_scenes(tmp_path / "other", rows=60, seed=4)
    assert digest_folder(tmp_path / "one") == digest_folder(tmp_path / "two") != digest_folder(tmp_path / "other")
    opened = open_submission(tmp_path / "one", IngestConfig())
    rows = list(opened.rows())
    assert opened.format == "imagefolder"
    assert len(rows) == 60
    assert all(isinstance(row, Sample) and len(row.images) == 1 for row in rows)
    records = [json.loads(line) for line in (tmp_path / "one" / "metadata.jsonl").read_text().splitlines()]
    assert {tuple(record) for record in records} == {("file_name", "question", "answer")}
    questions = " ".join(record["question"] for record in records)
    assert all(word in questions for word in ("color", "how many", "where", "is there"))
    assert len({record["answer"] for record in records}) > 12


def test_a_shorter_set_begins_the_longer(tmp_path: pathlib.Path) -> None:
    write_scenes(tmp_path / "short", rows=3, seed=0)
    write_scenes(tmp_path / "long", rows=5, seed=0)
    short = (tmp_path / "short" / "metadata.jsonl").read_text()
    assert (tmp_path / "long" / "metadata.jsonl").read_text().startswith(short)
