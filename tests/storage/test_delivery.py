"""A delivery's place, its exchange for another, and what is put back; how one is made is the delivery stage's test."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib

import pytest

from pipeline.config import IngestConfig
from pipeline.errors import ConfigError, IntegrityError, StageError, SubmissionError
from storage import atomic
from storage.delivery import KIND, check_place, commit_delivery, is_delivery, restore, verify_delivery
from storage.manifests import hash_folder, to_json
from tests.storage.deliveries import delivery, rows_of, sealed
from tests.storage.submissions import imagefolder, qa


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
    with pytest.raises(ConfigError, match=r"--out .*: nothing can be written into .*manifest\.json; name another folder"):
        check_place(tmp_path / "store/manifest.json/out", submission)
    monkeypatch.chdir(submission)
    with pytest.raises(ConfigError, match=r"--out out: .*can't lie in one another"):
        check_place(pathlib.Path("out"), pathlib.Path())


def test_the_delivery_of_another_submission_stays(submission: pathlib.Path, tmp_path: pathlib.Path) -> None:
    out = tmp_path / "earlier"
    out.mkdir()
    for told, taken in ((None, False), ({"digest": None}, False), ({"digest": "b"}, True), ({"digest": "a"}, False)):
        (out / "manifest.json").write_bytes(to_json({"kind": KIND, "submission": told}))
        check_place(out, submission)
        with pytest.raises(ConfigError, match="of another submission") if taken else contextlib.nullcontext():
            check_place(out, submission, "a")


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


def test_rows_are_restored_under_the_limits_that_they_were_read_with(tmp_path: pathlib.Path) -> None:
    """Pictures beyond the default limits, one kept, one quarantined: raised limits let them in, and let them out."""
    out, size = delivery(tmp_path / "out"), IngestConfig().max_image_bytes + 1
    for path in (out / "dataset/images/3.png", out / "quarantine/rows/images/4.png"):
        os.truncate(path, size)
    assert restore(sealed(out, max_image_bytes=size), tmp_path / "restored") == 3
    assert [(tmp_path / f"restored/images/{row}.png").stat().st_size for row in (3, 4)] == [size, size]


@pytest.mark.parametrize(("row", "part"), [(3, "dataset"), (4, "quarantine/rows")])
def test_no_row_is_left_out_silently(row: int, part: str, tmp_path: pathlib.Path) -> None:
    """Neither a kept nor a quarantined one, wherever its picture went; a rejected one may have none."""
    out = delivery(tmp_path / "out")
    (out / "quarantine/rows/images/2.png").unlink()
    assert restore(sealed(out), tmp_path / "without") == 3
    (out / part / f"images/{row}.png").unlink()
    with pytest.raises(SubmissionError, match=rf"row {row} \(metadata\.jsonl line [23]\): it can't be copied: missing picture"):
        restore(sealed(out), tmp_path / "restored")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "without"}


def test_rows_that_the_verdicts_do_not_name(tmp_path: pathlib.Path) -> None:
    for part, says in (("dataset", "holds 3 rows, the verdicts name 2"), ("quarantine/rows", "holds 4 rows, the verdicts name 3")):
        out = delivery(tmp_path / part.replace("/", "-"))
        with (out / part / "metadata.jsonl").open("ab") as file:
            file.write(b'{"id": 9}\n')
        with pytest.raises(IntegrityError, match=f"{part} {says}"):
            restore(sealed(out), tmp_path / "restored")


def test_how_the_submission_was_read_must_be_told(tmp_path: pathlib.Path) -> None:
    out = delivery(tmp_path / "out")
    manifest = json.loads((out / "manifest.json").read_bytes())
    for facts in ({}, {"configuration": None}, {"configuration": {"ingest": {"max_pixel": 1}}}):
        (out / "manifest.json").write_bytes(to_json({**manifest, "facts": facts}))
        with pytest.raises(IntegrityError, match=r"out: manifest\.json does not say how the submission was read"):
            restore(out, tmp_path / "restored")


def test_a_restored_copy_lies_outside_of_the_delivery(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = delivery(tmp_path / "out")
    monkeypatch.chdir(out)
    for place in (out / "restored", out / "dataset/../new/inner", pathlib.Path("here")):
        with pytest.raises(SubmissionError, match=f"{place.name}: it would lie in the delivery; name a folder outside of it"):
            restore(out, place)
    assert verify_delivery(out)


def test_where_all_is_kept_nothing_can_be_put_back(tmp_path: pathlib.Path) -> None:
    out = delivery(tmp_path / "out", ("keep", "keep"))
    assert restore(out, tmp_path / "all") == 0
    assert rows_of(tmp_path / "all") == [0, 1]
    with pytest.raises(SubmissionError, match="row 1 is not in quarantine"):
        restore(out, tmp_path / "none", [1])
