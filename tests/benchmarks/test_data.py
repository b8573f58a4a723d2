"""The data sets of the measurements: train and test apart, drawn by the seed, whole or not there."""

from __future__ import annotations

import collections
import json
import pathlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.data import VARIANTS, DataSet, Variant, make_data
from flows.demo_data import write_scenes
from pipeline.config import IngestConfig
from pipeline.embedded.scenes import COLOURS, SHAPES
from pipeline.errors import SubmissionError
from pipeline.records import Sample
from storage.formats import open_submission
from storage.manifests import digest_folder
from tests.storage.submissions import imagefolder, qa


def source(folder: pathlib.Path) -> pathlib.Path:
    """Twelve rows: every third is of the test, one names no split; a separator that is no line break, and a blank line."""
    rows: list[Any] = [qa(k, file_name=f"images/{k % 4}.png", split="train" if k % 3 else "test") for k in range(11)]
    rows[4]["question"] = "What\u2028is\x85it?"
    lines = [json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows]
    return imagefolder(folder, [*lines[:5], b"\n", *lines[5:], qa(11)])


def ids(folder: pathlib.Path) -> list[int]:
    return [json.loads(line)["id"] for line in (folder / "metadata.jsonl").read_bytes().split(b"\n") if line]


def made(place: str, out: pathlib.Path, rows: int = 5, test_rows: int = 3, seed: int = 0) -> DataSet:
    return make_data(place, out, rows=rows, test_rows=test_rows, seed=seed)


def test_scenes(tmp_path: pathlib.Path) -> None:
    first = made("demo", tmp_path / "inner/a")
    assert first == DataSet(train=tmp_path / "inner/a/train", test=tmp_path / "inner/a/test")
    counts = {folder.name: open_submission(folder, IngestConfig()).count() for folder in (first.train, first.test)}
    assert counts == {"train": 5, "test": 3}
    assert digest_folder(made("demo", tmp_path / "b").test.parent) == digest_folder(first.test.parent)
    assert digest_folder(made("demo", tmp_path / "c", seed=1).train) != digest_folder(first.train)
    pictures = [{path.read_bytes() for path in (folder / "images").iterdir()} for folder in (first.train, first.test)]
    assert not pictures[0] & pictures[1]
    assert [path.name for path in (tmp_path / "inner").iterdir()] == ["a"]


def test_rows_of_splits(tmp_path: pathlib.Path) -> None:
    folder = source(tmp_path / "source")
    drawn = [made(str(folder), tmp_path / str(seed), seed=seed) for seed in range(8)]
    for found in drawn:
        train, test = ids(found.train), ids(found.test)
        assert (train, test) == (sorted(set(train)), sorted(set(test)))
        assert (len(train), len(test)) == (5, 3)
        assert all(row % 3 for row in train)
        assert all(row % 3 == 0 for row in test)
        assert all(isinstance(row, Sample) for row in open_submission(found.train, IngestConfig()).rows())
    assert {row for found in drawn for row in ids(found.train)} == {1, 2, 4, 5, 7, 8, 10}
    assert {row for found in drawn for row in ids(found.test)} == {0, 3, 6, 9}
    assert digest_folder(made(str(folder), tmp_path / "again", seed=3).train) == digest_folder(drawn[3].train)


def test_what_is_there_is_found_again(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = made("demo", tmp_path / "a")

    def unwanted(*_: Any, **__: Any) -> Any:
        raise AssertionError("written again")

    monkeypatch.setitem(VARIANTS, "demo", Variant(what="", write=unwanted))
    assert made("demo", tmp_path / "a") == first


def test_half_a_data_set_is_none(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted measurement must not go on with the part of the test that was written."""

    def interrupted(out: pathlib.Path, *, rows: int, seed: int) -> None:
        write_scenes(out, rows=min(rows, 4), seed=seed)
        if rows < 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(VARIANTS, "demo", Variant(what="", write=interrupted))
        with pytest.raises(KeyboardInterrupt):
            made("demo", tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
    assert open_submission(made("demo", tmp_path / "a").test, IngestConfig()).count() == 3


def test_too_few_rows_and_no_splits(tmp_path: pathlib.Path) -> None:
    folder = source(tmp_path / "source")
    with pytest.raises(SubmissionError, match="source: 4 rows of split 'test', 5 are needed"):
        made(str(folder), tmp_path / "a", test_rows=5)
    plain = imagefolder(tmp_path / "plain", [qa(0), qa(1)])
    with pytest.raises(SubmissionError, match="plain: 0 rows of split 'train', 5 are needed"):
        made(str(plain), tmp_path / "a")
    with pytest.raises(SubmissionError):
        made(str(tmp_path / "nowhere"), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_something_else_in_its_place_stays(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/precious").write_text("x")
    with pytest.raises(SubmissionError, match="a: holds something that is no data set; remove it"):
        made("demo", tmp_path / "a")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["precious"]


def variant(name: str, folder: pathlib.Path, rows: int = 40, seed: int = 0) -> tuple[pathlib.Path, list[dict[str, Any]]]:
    VARIANTS[name].write(folder, rows=rows, seed=seed)
    return folder, [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_a_submission_and_the_seed_names_it(tmp_path: pathlib.Path, name: str) -> None:
    for part, seed in (("one", 0), ("two", 0), ("other", 1)):
        variant(name, tmp_path / part, rows=12, seed=seed)
    assert digest_folder(tmp_path / "one") == digest_folder(tmp_path / "two") != digest_folder(tmp_path / "other")
    rows = list(open_submission(tmp_path / "one", IngestConfig()).rows())
    assert len(rows) == 12
    assert all(isinstance(row, Sample) for row in rows)


def test_tasks(tmp_path: pathlib.Path) -> None:
    _, counts = variant("counts", tmp_path / "a")
    assert all(row["answer"].isdigit() for row in counts)
    _, two = variant("colour-shape", tmp_path / "b")
    assert {row["answer"] in SHAPES for row in two} == {True, False}
    assert {row["answer"] for row in two} <= {*SHAPES, *COLOURS}
    _, three = variant("three-tasks", tmp_path / "c")
    assert not {row["answer"] for row in three} & {*SHAPES, *COLOURS}
    assert len({row["answer"] for row in three}) > 5


def test_mixed_sizes(tmp_path: pathlib.Path) -> None:
    folder, mixed = variant("mixed-sizes", tmp_path / "a")
    _, plain = variant("demo", tmp_path / "b")
    sizes = {Image.open(folder / row["file_name"]).size for row in mixed}
    assert len(sizes) > 35
    assert min(min(size) for size in sizes) < 50 < 200 < max(max(size) for size in sizes)
    lengths = {len(new["question"]) - len(old["question"]) for new, old in zip(mixed, plain, strict=True)}
    assert len(lengths) == 5
    assert 0 in lengths
    assert all(
        new["question"].endswith(old["question"]) and new["answer"] == old["answer"] for new, old in zip(mixed, plain, strict=True)
    )


def test_long_tail(tmp_path: pathlib.Path) -> None:
    counts = collections.Counter(row["answer"] for row in variant("long-tail", tmp_path / "a", rows=200)[1])
    assert counts["yes"] + counts["no"] > 80
    assert sum(count == 1 for count in counts.values()) > 15


def test_captions(tmp_path: pathlib.Path) -> None:
    rows = variant("captions", tmp_path / "a", rows=200)[1]
    assert len({row["question"] for row in rows}) < 10
    assert len({row["answer"] for row in rows}) > 100


def test_unique_questions(tmp_path: pathlib.Path) -> None:
    rows = variant("unique-questions", tmp_path / "a")[1]
    assert len({row["question"] for row in rows}) == len(rows)
    plain = variant("demo", tmp_path / "b")[1]
    assert all(
        new["question"].endswith(old["question"]) and new["answer"] == old["answer"] for new, old in zip(rows, plain, strict=True)
    )


def test_label_noise(tmp_path: pathlib.Path) -> None:
    _, noisy = variant("label-noise", tmp_path / "a")
    _, right = variant("demo", tmp_path / "b")
    wrong = [(new, old) for new, old in zip(noisy, right, strict=True) if new["answer"] != old["answer"]]
    assert len(wrong) == 12  # 30% of 40
    assert [row["question"] for row in noisy] == [row["question"] for row in right]
    assert all((new["answer"] in ("yes", "no")) == (old["answer"] in ("yes", "no")) for new, old in wrong)  # of the same kind


def test_near_duplicates(tmp_path: pathlib.Path) -> None:
    folder, rows = variant("near-duplicates", tmp_path / "a")
    pictures = [np.asarray(Image.open(folder / row["file_name"]), dtype=int) for row in rows]
    assert all(rows[k]["question"] == rows[k + 1]["question"] for k in range(0, 40, 4))
    assert 0 < np.abs(pictures[0] - pictures[3]).max() <= 4
    assert np.abs(pictures[0] - pictures[4]).max() > 50


def test_one_answer(tmp_path: pathlib.Path) -> None:
    _, rows = variant("constant-answer", tmp_path / "a")
    assert {row["answer"] for row in rows} == {"yes"}
    assert len({row["question"] for row in rows}) > 20
