"""Hashes, and what differs from a manifest."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable

import pytest

from pipeline.errors import IntegrityError
from storage.manifests import content_digest, differences, digest_folder, hash_folder, to_json


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    (tmp_path / "data/inner").mkdir(parents=True)
    (tmp_path / "data/inner/a").write_text("a")
    (tmp_path / "data/b").write_text("b")
    (tmp_path / "data/manifest.json").write_text("{}")
    (tmp_path / "data/inner/manifest.json").write_text("{}")
    return tmp_path / "data"


def test_the_manifest_itself_is_not_listed(folder: pathlib.Path) -> None:
    files = hash_folder(folder)
    assert list(files) == ["b", "inner/a", "inner/manifest.json"]
    assert files["b"] == {"sha256": "3e23e8160039594a33894f6564e1b1348bbd7a0088d42c4acb73eeaed59c009d", "bytes": 1}
    assert not differences(folder, files)


def test_what_differs_is_named(folder: pathlib.Path) -> None:
    files = hash_folder(folder)
    (folder / "b").write_text("c")
    (folder / "inner/a").unlink()
    (folder / "inner/new").write_text("")
    assert differences(folder, files) == ["missing: inner/a", "extra: inner/new", "changed: b"]
    assert content_digest(hash_folder(folder)) != content_digest(files)


@pytest.mark.parametrize(
    "make",
    [lambda path: path.symlink_to("b"), lambda path: path.symlink_to("inner"), os.mkfifo],
    ids=["link", "folder link", "pipe"],
)
def test_only_regular_files_are_hashed(folder: pathlib.Path, make: Callable[[pathlib.Path], None]) -> None:
    make(folder / "odd")
    with pytest.raises(IntegrityError, match="odd: neither a regular file nor a folder"):
        hash_folder(folder)


def renamed(folder: pathlib.Path) -> None:
    (folder / "b").rename(folder / "c")


def emptied(folder: pathlib.Path) -> None:
    (folder / "inner/a").write_text("")


def turned(folder: pathlib.Path) -> None:
    (folder / "link").unlink()
    (folder / "link").symlink_to("inner")


def emptier(folder: pathlib.Path) -> None:
    (folder / "new").mkdir()


@pytest.mark.parametrize("change", [renamed, emptied, turned, emptier])
def test_any_change_changes_the_digest_of_a_folder(folder: pathlib.Path, change: Callable[[pathlib.Path], None]) -> None:
    (folder / "link").symlink_to("/etc/passwd")
    os.mkfifo(folder / "pipe")
    before = digest_folder(folder)
    assert digest_folder(folder) == before
    folder.rename(folder.parent / "other name")
    assert digest_folder(folder.parent / "other name") == before
    change(folder.parent / "other name")
    assert digest_folder(folder.parent / "other name") != before


def test_a_file_name_that_is_no_text_is_hashed(folder: pathlib.Path) -> None:
    (folder / os.fsdecode(b"\xff")).write_text("x")
    files = hash_folder(folder)
    assert b"\\udcff" in to_json(dict(files))
    assert not differences(folder, files)


def test_json_has_one_form() -> None:
    assert (
        to_json({"b": 1, "a": [1.5, None]})
        == to_json({"a": [1.5, None], "b": 1})
        == b'{\n "a": [\n  1.5,\n  null\n ],\n "b": 1\n}\n'
    )
    with pytest.raises(ValueError, match="JSON"):
        to_json({"a": float("inf")})
