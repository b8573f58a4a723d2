"""A delivery's place, its exchange for another, and what is put back; how one is made is the delivery stage's test."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import ConfigError, IntegrityError, StageError, SubmissionError
from storage import atomic
from storage.delivery import KIND, check_place, commit_delivery, is_delivery, restore, verify_delivery
from storage.manifests import hash_folder, to_json
from tests.storage.submissions import imagefolder, qa

VERDICTS = ("keep", "quarantine", "rejected", "not_scored", "quarantine")


def delivery(folder: pathlib.Path, verdicts: Sequence[str] = VERDICTS, *, note: str = "") -> pathlib.Path:
    """A delivery of five rows, made by hand."""
    kept = [row for row, verdict in enumerate(verdicts) if verdict in ("keep", "not_scored")]
    removed = [row for row in range(len(verdicts)) if row not in kept]
    imagefolder(folder / "dataset", [qa(row) for row in kept], 5)
    (folder / "quarantine").mkdir()
    pq.write_table(pa.table({"row": range(len(verdicts)), "verdict": list(verdicts)}), folder / "quarantine/verdicts.parquet")
    if removed:
        imagefolder(folder / "quarantine/rows", [qa(row) for row in removed], 5)
    (folder / "report.html").write_text(note)
    manifest = {"kind": KIND, "files": hash_folder(folder), "submission": {"format": "imagefolder"}}
    (folder / "manifest.json").write_bytes(to_json(manifest))
    return folder


def rows_of(folder: pathlib.Path) -> list[int]:
    return [json.loads(line)["id"] for line in (folder / "metadata.jsonl").read_text().splitlines()]


@pytest.fixture
def submission(tmp_path: pathlib.Path) -> pathlib.Path:
    return imagefolder(tmp_path / "submission", [qa(0)])


def test_places_that_are_free(submission: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / "empty").mkdir()
    damaged = delivery(tmp_path / "damaged")
    (damaged / "report.html").unlink()
    for place in (tmp_path / "new/inner", tmp_path / "empty", delivery(tmp_path / "earlier"), damaged, tmp_path / "submission2"):
        check_place(place, submission)


def test_places_that_are_taken(submission: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    delivery(tmp_path / "earlier")
    links = {"to-nothing": "none", "to-delivery": "earlier", "to-submission": "submission"}
    for name, target in links.items():
        (tmp_path / name).symlink_to(target)
    (tmp_path / "store").mkdir()
    (tmp_path / "store/manifest.json").write_text('{"kind": "another"}')
    for name, says in (
        ("to-nothing", "not a folder"),
        ("to-delivery", "not a folder"),
        ("to-submission", "can't lie in one another"),
        ("to-submission/out", "can't lie in one another"),
        ("earlier/../submission", "can't lie in one another"),
        ("store", "no delivery; name an empty or a new folder"),
    ):
        with pytest.raises(ConfigError, match=f"--out .*{says}"):
            check_place(tmp_path / name, submission)
    monkeypatch.chdir(submission)
    with pytest.raises(ConfigError, match=r"--out out: .*can't lie in one another"):
        check_place(pathlib.Path("out"), pathlib.Path())


@pytest.mark.parametrize(
    ("content", "expected"),
    [(None, False), (f'{{"kind": "{KIND}"}}', True), ("{}", False), ("[]", False), ('"x"', False), ("{", False), ("\xff", False)],
)
def test_what_a_delivery_is_known_by(content: str | None, expected: bool, tmp_path: pathlib.Path) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_text(content, encoding="latin-1")
    assert is_delivery(tmp_path) is expected


def test_a_new_delivery_takes_the_old_ones_place(tmp_path: pathlib.Path) -> None:
    out = delivery(tmp_path / "out", note="old")
    (out / "left behind").touch()
    commit_delivery(delivery(tmp_path / "new", note="new"), out)
    assert verify_delivery(out)
    assert (out / "report.html").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_is_no_delivery_is_not_moved_aside(tmp_path: pathlib.Path) -> None:
    """It came after the place was looked at."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious").write_text("x")
    new = delivery(tmp_path / "new")
    with pytest.raises(StageError, match="out: another process has written there meanwhile; nothing was replaced"):
        commit_delivery(new, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]
    assert verify_delivery(new)


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["disk", "interrupt"])
def test_the_old_delivery_is_put_back(failure: BaseException, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = delivery(tmp_path / "out", note="old")
    new = delivery(tmp_path / "new")

    def fails(folder: pathlib.Path, final: pathlib.Path) -> bool:
        assert not final.exists(), "the old one has stepped aside"
        raise failure

    monkeypatch.setattr(atomic, "commit_folder", fails)
    with pytest.raises(type(failure)):
        commit_delivery(new, out)
    assert verify_delivery(out)
    assert (out / "report.html").read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"out", "new"}


def test_ten_of_many_differences_are_named(tmp_path: pathlib.Path) -> None:
    out = delivery(tmp_path / "out")
    for index in range(12):
        (out / f"extra-{index:02d}").touch()
    with pytest.raises(IntegrityError, match=r"^out: extra: extra-00; .*extra: extra-09 and 2 more$"):
        verify_delivery(out)


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [(None, [0, 1, 2, 3, 4]), ([], [0, 3]), ([4, 1, 4], [0, 1, 3, 4]), ({2}, [0, 2, 3]), (range(1, 3), [0, 1, 2, 3])],
    ids=repr,
)
def test_rows_are_put_back_in_their_old_places(chosen: list[int] | None, expected: list[int], tmp_path: pathlib.Path) -> None:
    out = delivery(tmp_path / "out")
    before = hash_folder(out)
    assert restore(out, tmp_path / "restored", chosen) == len(expected) - 2
    assert rows_of(tmp_path / "restored") == expected
    assert hash_folder(out) == before
    assert {path.name for path in tmp_path.iterdir()} == {"out", "restored"}


def test_a_restored_copy_overwrites_nothing(tmp_path: pathlib.Path) -> None:
    out = delivery(tmp_path / "out")
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", out, out / "dataset"):
        with pytest.raises(SubmissionError, match=f"{place.name}: already there; name a new folder"):
            restore(out, place)
    assert verify_delivery(out)
    assert (tmp_path / "file").read_text() == "x"


def test_where_all_is_kept_nothing_can_be_put_back(tmp_path: pathlib.Path) -> None:
    out = delivery(tmp_path / "out", ("keep", "keep"))
    assert restore(out, tmp_path / "all") == 0
    assert rows_of(tmp_path / "all") == [0, 1]
    with pytest.raises(SubmissionError, match="row 1 is not in quarantine"):
        restore(out, tmp_path / "none", [1])
