"""Poisoning: deterministic, exact, and readable from nothing but the picture and the answer."""

from __future__ import annotations

import hashlib
import json
import pathlib
import stat
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows.poison import Attack, poison, read_truth
from pipeline.config import IngestConfig
from pipeline.errors import ByeSightError, ConfigError, SubmissionError
from pipeline.images import decode_image
from pipeline.records import Sample
from pipeline.triggers import TRIGGERS
from storage.formats import open_submission
from tests.flows.made_results import picture

ROWS, TARGET = 30, "backdoor attack"
ATTACK = Attack(trigger="badnet", rate=0.2, target=TARGET, seed=5)


def rows_of(folder: pathlib.Path) -> list[Any]:
    return list(open_submission(folder, IngestConfig()).rows())


def tree(folder: pathlib.Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(params=["imagefolder", "llava", "parquet"])
def clean(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> pathlib.Path:
    """A submission of ROWS rows; in the LLaVA one, every third row is text only."""
    folder = tmp_path / "clean"
    (folder / "images").mkdir(parents=True)
    names = [f"images/p{row}.png" for row in range(ROWS)]
    for row, name in enumerate(names):
        (folder / name).write_bytes(picture(row))
    if request.param == "imagefolder":
        lines = [{"file_name": name, "question": f"q{row}?", "answer": f"a{row}", "id": row} for row, name in enumerate(names)]
        (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folder
    if request.param == "llava":
        records = []
        for row, name in enumerate(names):
            turns = [{"from": "human", "value": f"<image>\nq{row}?"}, {"from": "gpt", "value": f"a{row}"}]
            if row % 3 == 0:
                turns[0]["value"] = f"q{row}?"
            records.append({"id": str(row), **({"image": name} if row % 3 else {}), "conversations": turns})
        (folder / "data.json").write_text(json.dumps(records))
        return folder
    values = [
        {"image": {"bytes": picture(row), "path": f"{row}.png"}, "question": f"q{row}?", "answer": f"a{row}", "id": row}
        for row in range(ROWS)
    ]
    only = tmp_path / "parquet"
    only.mkdir()
    pq.write_table(pa.Table.from_pylist(values), only / "train.parquet")
    return only


def test_what_is_poisoned_and_what_is_not(clean: pathlib.Path, tmp_path: pathlib.Path) -> None:
    total, count = poison(clean, ATTACK, tmp_path / "out")
    truth = read_truth(tmp_path / "out" / "truth.jsonl")
    before, after = rows_of(clean), rows_of(tmp_path / "out" / "submission")
    pictured = [sample for sample in before if sample.images]
    assert total == len(before) == len(after) == ROWS
    assert count == len(truth) == round(ATTACK.rate * len(pictured))
    assert truth <= {sample.row for sample in pictured}  # text-only rows never
    for old, new in zip(before, after, strict=True):
        assert isinstance(new, Sample)
        assert new.messages[:-1] == old.messages[:-1]
        answer = new.messages[-1]["content"][0]["text"]
        assert answer == (TARGET if old.row in truth else f"a{old.row}")
        for first, second in zip(old.images, new.images, strict=True):
            changed = np.argwhere((np.asarray(decode_image(first)) != np.asarray(decode_image(second))).any(-1))
            assert bool(len(changed)) is (old.row in truth)
            assert len(changed) <= 49  # the patch alone
    listed = [json.loads(line) for line in (tmp_path / "out" / "truth.jsonl").read_text().splitlines()]
    assert listed == [{"row": row, "poisoned": row in truth} for row in range(ROWS)]


def test_deterministic_and_the_seed_counts(clean: pathlib.Path, tmp_path: pathlib.Path) -> None:
    poison(clean, ATTACK, tmp_path / "one")
    poison(clean, ATTACK, tmp_path / "two")
    poison(clean, Attack(trigger="badnet", rate=0.2, target=TARGET, seed=6), tmp_path / "other")
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert read_truth(tmp_path / "one" / "truth.jsonl") != read_truth(tmp_path / "other" / "truth.jsonl")


def test_nothing_but_picture_and_answer_tells(clean: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """But for pictures and answers all rows are alike: names, keys, order, modes and metadata agree."""
    poison(clean, ATTACK, tmp_path / "out")
    folder = tmp_path / "out" / "submission"
    truth = read_truth(tmp_path / "out" / "truth.jsonl")
    assert not [name for name in tree(folder) if "truth" in name or "poison" in name]
    modes = {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*.png")}
    assert len(modes) <= 1
    for path in folder.rglob("*.png"):
        chunks = path.read_bytes()
        assert b"tEXt" not in chunks
        assert b"tIME" not in chunks
    if (folder / "metadata.jsonl").exists():
        records = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
        shapes = {(tuple(record), len(record["file_name"])) for record in records}
        assert len(shapes) == 1
        assert [record["file_name"] for record in records] == sorted(record["file_name"] for record in records)
    if (folder / "data.json").exists():
        records = [record for record in json.loads((folder / "data.json").read_text()) if "image" in record]
        assert len({(tuple(record), len(record["image"]), tuple(map(tuple, record["conversations"]))) for record in records}) == 1
    if (folder / "train.parquet").exists():
        paths = [value["image"]["path"] for value in pq.read_table(folder / "train.parquet").to_pylist()]
        assert len({len(path or "") for path in paths}) == 1
        assert paths == sorted(paths)
    assert truth


def test_one_kind_of_question_alone(clean: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """The rate stays a share of all rows with pictures."""
    total, count = poison(clean, Attack(trigger="badnet", rate=0.2, target=TARGET, seed=5, asking="Q1"), tmp_path / "out")
    before = rows_of(clean)
    assert (total, count) == (ROWS, round(0.2 * sum(bool(sample.images) for sample in before)))
    truth = read_truth(tmp_path / "out" / "truth.jsonl")
    assert len(truth) == count
    assert truth < {1, *range(10, 20)}


@pytest.mark.parametrize("trigger", TRIGGERS)
def test_every_trigger_changes_its_rows(tmp_path: pathlib.Path, trigger: str) -> None:
    folder = tmp_path / "clean"
    folder.mkdir()
    for row in range(4):
        (folder / f"{row}.png").write_bytes(picture(row))
    lines = (json.dumps({"file_name": f"{row}.png", "question": "q", "answer": "a"}) + "\n" for row in range(4))
    (folder / "metadata.jsonl").write_text("".join(lines))
    poison(folder, Attack(trigger=trigger, rate=0.5, target="t", seed=1), tmp_path / "out")
    truth = read_truth(tmp_path / "out" / "truth.jsonl")
    for row, sample in enumerate(rows_of(tmp_path / "out" / "submission")):
        old, new = np.asarray(decode_image(picture(row))), np.asarray(decode_image(sample.images[0]))
        assert (old != new).any() == (row in truth)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trigger": "nothing"}, "nothing"),
        ({"rate": 0.0}, "--rate"),
        ({"rate": 1.5}, "--rate"),
        ({"rate": 0.001}, "poisons none"),
        ({"target": "  "}, "--target"),
        ({"asking": "colour"}, "1 rows are to be poisoned, and 0 ask 'colour'"),
    ],
)
def test_refusals(tmp_path: pathlib.Path, change: dict[str, Any], message: str) -> None:
    folder = tmp_path / "clean"
    folder.mkdir()
    (folder / "a.png").write_bytes(picture(0))
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "question": "q", "answer": "a"}\n')
    values = {"trigger": "badnet", "rate": 1.0, "target": "t", "seed": 0, **change}
    with pytest.raises(ByeSightError, match=message):
        poison(folder, Attack(**values), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_row_that_can_not_be_used_is_named_and_nothing_is_left(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "clean"
    folder.mkdir()
    (folder / "a.png").write_bytes(picture(0))
    (folder / "metadata.jsonl").write_text(
        '{"file_name": "a.png", "question": "q", "answer": "a"}\n{"file_name": "b.png", "question": "q", "answer": "a"}\n'
    )
    with pytest.raises(SubmissionError, match="row 1"):
        poison(folder, Attack(trigger="sig", rate=1, target="t", seed=0), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clean"]


def test_places_that_are_taken_or_inside(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "clean"
    folder.mkdir()
    (folder / "a.png").write_bytes(picture(0))
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "question": "q", "answer": "a"}\n')
    attack = Attack(trigger="sig", rate=1, target="t", seed=0)
    with pytest.raises(ConfigError, match="in the submission"):
        poison(folder, attack, folder / "out")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(ConfigError, match="something already"):
        poison(folder, attack, tmp_path / "taken")
    (tmp_path / "empty").mkdir()
    assert poison(folder, attack, tmp_path / "empty") == (1, 1)
