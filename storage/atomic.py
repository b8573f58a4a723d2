"""Files and folders that appear whole or not at all: written beside their place, flushed to disk, renamed once."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import logging
import os
import pathlib
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

_LOG = logging.getLogger(__name__)


def sync(path: pathlib.Path) -> None:
    """Flush a file's bytes, or a folder's list of names, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: pathlib.Path) -> None:
    """Flush everything under a folder; in parallel, because a file system flushes many files at once in the time of one."""
    paths = [folder]
    for root, folders, files in os.walk(folder):
        paths.extend(pathlib.Path(root, name) for name in (*folders, *files))
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(sync, paths))


def write_file(path: pathlib.Path, data: bytes) -> None:
    """Write a file so that a reader finds the old bytes or the new ones, never a part."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def commit_folder(folder: pathlib.Path, final: pathlib.Path) -> bool:
    """Flush a finished folder and rename it to its place; False if that place is already taken (the folder then stays)."""
    sync_tree(folder)
    folder.chmod(0o755)
    try:
        folder.rename(final)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            return False
        raise
    sync(final.parent)
    return True


@contextlib.contextmanager
def staging(parent: pathlib.Path, prefix: str) -> Iterator[pathlib.Path]:
    """A new temporary folder in `parent`, gone at the end unless it was renamed; leftovers of dead processes are swept.

    The folder is locked while its process lives, so a leftover is known by its free lock.
    """
    parent.mkdir(parents=True, exist_ok=True)
    for leftover in parent.glob(f"{glob.escape(prefix)}*"):
        with lock(leftover, wait=False) as free:
            if free:
                shutil.rmtree(leftover, ignore_errors=True)
    while True:
        folder = pathlib.Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        with lock(folder, wait=True):
            if not folder.exists():  # a sweep took it between its making and its locking
                continue
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            return


@contextlib.contextmanager
def lock(path: pathlib.Path, *, wait: bool, create: bool = False) -> Iterator[bool]:
    """Hold the lock of a file or folder until the block ends or the process dies.

    Args:
        path: what to lock; it stays.
        wait: wait for another holder; otherwise yield False at once.
        create: make the file first.

    Yields:
        True if the lock is held; False where another has it, or where there can be none (a read-only or a remote folder).
    """
    try:
        if create:
            path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT if create else os.O_RDONLY | os.O_NOFOLLOW, 0o644)
    except OSError:
        yield False
        return
    try:
        yield _try_lock(handle) or (wait and _wait_for_lock(handle, path))
    finally:
        os.close(handle)


def _try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _wait_for_lock(handle: int, path: pathlib.Path) -> bool:
    _LOG.info("waiting for another process that has %s", path.name)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError:
        return False
    return True
