"""A result is committed once, found again, checked, and never half there."""

from __future__ import annotations

import errno
import json
import logging
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from pipeline.errors import StageError
from storage.store import StageResult, Store, stage_key
from storage.store import Work as Doing

CONFIG: dict[str, Any] = {"rate": 0.5, "names": ["a", "b"]}


class Work:
    """Writes two files and counts its calls."""

    def __init__(self, text: str = "hello") -> None:
        self.text = text
        self.calls = 0

    def __call__(self, folder: pathlib.Path, _scratch: pathlib.Path) -> Mapping[str, Any]:
        self.calls += 1
        (folder / "inner").mkdir()
        (folder / "inner/a.txt").write_text(self.text)
        (folder / "b.txt").write_text("b")
        return {"rows": 3}


def run(store: Store, work: Doing, **changes: Any) -> StageResult:
    return store.run("score", **{"version": 1, "inputs": {"rows": "abc"}, "config": CONFIG, "work": work, **changes})


def test_a_result_is_found_again(tmp_path: pathlib.Path) -> None:
    work = Work()
    first, second = run(Store(tmp_path), work), run(Store(tmp_path), work)
    assert work.calls == 1
    assert (first.reused, second.reused) == (False, True)
    assert (first.key, first.digest, first.folder, first.summary) == (second.key, second.digest, second.folder, {"rows": 3})
    assert first.folder == tmp_path / "score" / first.key[:32]
    assert (first.folder / "inner/a.txt").read_text() == "hello"
    manifest = json.loads((first.folder / "manifest.json").read_bytes())
    assert set(manifest) == {"stage", "version", "key", "inputs", "config", "files", "digest", "summary", "seconds"}
    assert set(manifest["files"]) == {"b.txt", "inner/a.txt"}


@pytest.mark.parametrize(
    "change",
    [{"version": 2}, {"inputs": {"rows": "abd"}}, {"inputs": {"row": "abc"}}, {"config": {**CONFIG, "rate": 0.25}}, {"config": {}}],
    ids=repr,
)
def test_whatever_a_result_depends_on_makes_a_new_key(change: dict[str, Any], tmp_path: pathlib.Path) -> None:
    store, work = Store(tmp_path), Work()
    assert run(store, work).key != run(store, work, **change).key
    assert work.calls == 2


def test_the_order_of_names_is_no_part_of_the_key() -> None:
    one = stage_key("score", version=1, inputs={"a": "1", "b": "2"}, config={"x": 1, "y": 2})
    assert one == stage_key("score", version=1, inputs={"b": "2", "a": "1"}, config={"y": 2, "x": 1})


def test_the_digest_is_of_content_alone(tmp_path: pathlib.Path) -> None:
    store = Store(tmp_path)
    first, second = run(store, Work()), run(store, Work(), version=2)
    assert first.digest == second.digest
    assert run(store, Work("other"), version=3).digest != first.digest


def test_an_input_counts_by_its_digest(tmp_path: pathlib.Path) -> None:
    store, work = Store(tmp_path), Work()
    first, same = run(store, Work()), run(store, Work(), version=2)
    assert run(store, work, inputs={"before": first}).key == run(store, work, inputs={"before": same}).key
    assert work.calls == 1


def test_work_that_raises_leaves_nothing(tmp_path: pathlib.Path) -> None:
    def fail(folder: pathlib.Path, _scratch: pathlib.Path) -> Mapping[str, Any]:
        (folder / "half.txt").write_text("half")
        raise ZeroDivisionError

    store = Store(tmp_path)
    with pytest.raises(ZeroDivisionError):
        run(store, fail)
    assert not list(tmp_path.rglob("half.txt"))
    assert not run(store, Work()).reused


def kill_in(tmp_path: pathlib.Path, place: str) -> StageResult:
    """Run the same stage in another process that kills itself; then here."""
    code = f"""
import os, pathlib, signal, sys
from storage import atomic, store
def die(*arguments): os.kill(os.getpid(), signal.SIGKILL)
def work(folder, scratch):
    (folder / "b.txt").write_text("half")
    (scratch / "step").write_text("1")
    {"die()" if place == "work" else ""}
    return {{}}
{"atomic.sync = die" if place == "commit" else ""}
shop = store.Store(pathlib.Path(sys.argv[1]))
arguments = dict(version=1, inputs={{"rows": "abc"}}, config={CONFIG!r})
shop.run("score", **arguments, work=work)
"""
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, cwd=pathlib.Path(__file__).parents[2])
    assert killed.returncode == -signal.SIGKILL
    assert list((tmp_path / ".working").iterdir())
    return run(Store(tmp_path), Work())


@pytest.mark.parametrize("place", ["work", "commit"])
def test_a_killed_process_leaves_nothing_that_counts(place: str, tmp_path: pathlib.Path) -> None:
    result = kill_in(tmp_path, place)
    assert not result.reused
    assert (result.folder / "b.txt").read_text() == "b"
    assert not list((tmp_path / ".working").iterdir())


def test_scratch_outlives_a_failure_and_goes_with_the_commit(tmp_path: pathlib.Path) -> None:
    store = Store(tmp_path)
    seen = []

    def resumable(_folder: pathlib.Path, scratch: pathlib.Path) -> Mapping[str, Any]:
        step = scratch / "step"
        seen.append(step.exists())
        step.write_text("1")
        if len(seen) == 1:
            raise ZeroDivisionError
        return {}

    with pytest.raises(ZeroDivisionError):
        run(store, resumable)
    run(store, resumable)
    assert seen == [False, True]
    assert not list((tmp_path / ".scratch").iterdir())


def no_locks(*_: object) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


def test_without_locks_every_driver_has_a_scratch_of_its_own(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.atomic.fcntl.flock", no_locks)
    store, together, seen = Store(tmp_path), threading.Barrier(2, timeout=30), []

    def checkpointing(_folder: pathlib.Path, scratch: pathlib.Path) -> Mapping[str, Any]:
        assert not list(scratch.iterdir())
        (scratch / "step").write_text("1")
        seen.append(scratch)
        together.wait()
        if scratch == seen[0]:
            return {}
        deadline = time.monotonic() + 30
        while not list(tmp_path.glob("score/*")) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        assert (scratch / "step").exists(), "the winner has removed the loser's"
        return {}

    with ThreadPoolExecutor(2) as pool:
        results = [future.result(60) for future in [pool.submit(run, store, checkpointing) for _ in range(2)]]
    assert len(set(seen)) == 2
    assert sorted(result.reused for result in results) == [False, True]
    assert not list((tmp_path / ".scratch").iterdir())


def test_without_locks_nothing_is_left_that_no_run_would_find(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.atomic.fcntl.flock", no_locks)

    def fail(_folder: pathlib.Path, scratch: pathlib.Path) -> Mapping[str, Any]:
        (scratch / "step").write_text("1")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(Store(tmp_path), fail)
    assert not list((tmp_path / ".scratch").iterdir())


def flip(path: pathlib.Path) -> None:
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)


def become_link(path: pathlib.Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


DAMAGE: dict[str, tuple[str, Callable[[pathlib.Path], object]]] = {
    "changed byte": ("changed: inner/a.txt", lambda folder: flip(folder / "inner/a.txt")),
    "missing file": ("missing: b.txt", lambda folder: (folder / "b.txt").unlink()),
    "extra file": ("extra: c.txt", lambda folder: (folder / "c.txt").write_text("")),
    "no manifest": ("manifest.json can't be read", lambda folder: (folder / "manifest.json").unlink()),
    "manifest cut short": ("manifest.json can't be read", lambda folder: (folder / "manifest.json").write_text("{")),
    "manifest of nothing": ("manifest.json can't be read", lambda folder: (folder / "manifest.json").write_text("{}")),
    "a link": ("b.txt: neither a regular file", lambda folder: become_link(folder / "b.txt")),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_result_is_kept_aside_and_computed_again(
    name: str, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    says, damage = DAMAGE[name]
    store, work = Store(tmp_path), Work()
    first = run(store, work)
    damage(first.folder)
    with caplog.at_level(logging.WARNING):
        again = run(store, work)
    assert work.calls == 2
    assert not again.reused
    assert again.digest == first.digest
    assert says in caplog.text
    assert len(list((tmp_path / ".damaged").iterdir())) == 1
    assert run(store, work).reused


def test_another_result_in_its_place_is_known(tmp_path: pathlib.Path) -> None:
    store = Store(tmp_path)
    first, other = run(store, Work()), run(store, Work("other"), version=2)
    shutil.rmtree(first.folder)
    shutil.copytree(other.folder, first.folder)
    assert not run(store, Work()).reused


def test_two_drivers_at_once_do_the_work_once(tmp_path: pathlib.Path) -> None:
    work, results = Work(), []

    def slow(folder: pathlib.Path, scratch: pathlib.Path) -> Mapping[str, Any]:
        time.sleep(0.2)
        return work(folder, scratch)

    threads = [threading.Thread(target=lambda: results.append(run(Store(tmp_path), slow))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert work.calls == 1
    assert sorted(result.reused for result in results) == [False, True, True]
    assert len({result.digest for result in results}) == 1


def test_without_locks_the_loser_takes_the_winners_result(tmp_path: pathlib.Path) -> None:
    winner = run(Store(tmp_path / "elsewhere"), Work("winner"))

    def slow(folder: pathlib.Path, scratch: pathlib.Path) -> Mapping[str, Any]:
        shutil.copytree(winner.folder, tmp_path / "store/score" / winner.key[:32])
        return Work("loser")(folder, scratch)

    result = run(Store(tmp_path / "store"), slow)
    assert result.reused
    assert result.digest == winner.digest
    assert (result.folder / "inner/a.txt").read_text() == "winner"
    assert not list((tmp_path / "store/.working").iterdir())


def test_a_root_that_cannot_be_written(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StageError, match="results can't be stored here: Not a directory"):
        run(Store(tmp_path / "file/root"), Work())


def test_a_root_that_cannot_be_written_still_gives_what_it_has(tmp_path: pathlib.Path) -> None:
    run(Store(tmp_path), Work())
    for name in (".locks", ".working"):
        shutil.rmtree(tmp_path / name)
        (tmp_path / name).write_text("no folder can be made here")
    assert run(Store(tmp_path), Work()).reused
    with pytest.raises(StageError, match="can't be stored"):
        run(Store(tmp_path), Work(), version=2)


def test_a_full_disk_at_the_commit(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: pathlib.Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("storage.atomic.sync", full)
        with pytest.raises(StageError, match="can't be committed: No space left"):
            run(Store(tmp_path), Work())
    assert not run(Store(tmp_path), Work()).reused


@pytest.mark.parametrize("summary", [{"loss": float("nan")}, {"path": pathlib.Path()}], ids=["NaN", "object"])
def test_a_summary_must_be_json(summary: dict[str, Any], tmp_path: pathlib.Path) -> None:
    with pytest.raises(StageError, match="summary can't be written as JSON"):
        run(Store(tmp_path), lambda *_: summary)


@pytest.mark.parametrize("stage", ["", "../x", "Score", "a/b", ".locks"])
def test_a_stage_has_a_plain_name(stage: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(StageError, match="a stage's name"):
        Store(tmp_path).run(stage, version=1, inputs={}, config={}, work=Work())
