"""Files and folders appear whole or not at all."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
import threading

import pytest

from storage import atomic


def test_a_file_is_replaced_whole(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.json"
    atomic.write_file(path, b"one")
    atomic.write_file(path, b"two")
    assert path.read_bytes() == b"two"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        atomic.write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_the_loser_of_a_rename_is_told(tmp_path: pathlib.Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "who").write_text(name)
    assert atomic.commit_folder(tmp_path / "first", tmp_path / "final")
    assert not atomic.commit_folder(tmp_path / "second", tmp_path / "final")
    assert (tmp_path / "final/who").read_text() == "first"
    assert (tmp_path / "second/who").read_text() == "second"


def test_everything_is_flushed_before_the_rename(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "new/inner").mkdir(parents=True)
    (tmp_path / "new/inner/a").write_text("a")
    flushed: list[tuple[pathlib.Path, bool]] = []
    monkeypatch.setattr(atomic, "sync", lambda path: flushed.append((path, (tmp_path / "final").exists())))
    atomic.commit_folder(tmp_path / "new", tmp_path / "final")
    before = {path for path, renamed in flushed if not renamed}
    assert before == {tmp_path / "new", tmp_path / "new/inner", tmp_path / "new/inner/a"}
    assert flushed[-1] == (tmp_path, True)


def test_staging_is_gone_after_an_error(tmp_path: pathlib.Path) -> None:
    def fail() -> None:
        with atomic.staging(tmp_path, ".a-") as folder:
            (folder / "x").write_text("x")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not list(tmp_path.iterdir())


def test_leftovers_of_the_dead_are_swept_and_those_of_the_living_stay(tmp_path: pathlib.Path) -> None:
    code = """
import os, pathlib, signal, sys
from storage import atomic
with atomic.staging(pathlib.Path(sys.argv[1]), ".a-"):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, cwd=pathlib.Path(__file__).parents[2])
    assert killed.returncode == -signal.SIGKILL
    (leftover,) = tmp_path.iterdir()
    (tmp_path / ".b-other").mkdir()
    with atomic.staging(tmp_path, ".a-") as living:
        assert not leftover.exists()
        with atomic.staging(tmp_path, ".a-") as second:
            assert living.exists()
            assert second != living
    assert [entry.name for entry in tmp_path.iterdir()] == [".b-other"]


def test_a_lock_has_one_holder(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "locks/a"
    order: list[str] = []

    def second() -> None:
        with atomic.lock(path, wait=True) as held:
            order.append(f"second {held}")

    with atomic.lock(path, wait=True, create=True) as held:
        assert held
        with atomic.lock(path, wait=False) as other:
            assert not other
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.1)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second True"]


def test_where_no_lock_can_be_made_none_is_held(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("")
    with atomic.lock(tmp_path / "file/locks/a", wait=True, create=True) as held:
        assert not held
