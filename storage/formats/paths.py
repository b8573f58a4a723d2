"""Files that a submission names: opened only inside its folder, through no link, and only if they are regular files."""

from __future__ import annotations

import errno
import os
import pathlib
import re
import stat
from typing import BinaryIO

from pipeline.errors import SubmissionError
from storage.formats.base import Reason, RowError, quote

MAX_DEPTH = 32
MAX_NAME = 255
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|(?:data|file|javascript|mailto|blob):", re.IGNORECASE)
_DRIVE = re.compile(r"[A-Za-z]:")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def safe_parts(name: str) -> tuple[str, ...]:
    """The folders and the file that a relative name goes through.

    Raises:
        RowError: UNSAFE_PATH or URL.
    """
    if _URL.match(name):
        raise RowError(Reason.URL, f"{quote(name)}: URLs are not fetched; put the picture into the folder")
    if name.startswith("/"):
        raise RowError(Reason.UNSAFE_PATH, f"{quote(name)} is an absolute path; name the picture relative to the folder")
    if _DRIVE.match(name) or "\\" in name:
        raise RowError(Reason.UNSAFE_PATH, f"{quote(name)} has a drive letter or a backslash; separate folders by /")
    if _CONTROL.search(name):
        raise RowError(Reason.UNSAFE_PATH, f"{quote(name)} has a control character")
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    if not parts or name.endswith("/"):
        raise RowError(Reason.UNSAFE_PATH, f"{quote(name)} names no file")
    if ".." in parts:
        raise RowError(Reason.UNSAFE_PATH, f"{quote(name)} leaves the folder")
    if len(parts) > MAX_DEPTH:
        raise RowError(Reason.UNSAFE_PATH, f"{len(parts)} folders deep; the limit is {MAX_DEPTH}")
    try:
        longest = max(len(part.encode()) for part in parts)
    except UnicodeEncodeError:
        raise RowError(Reason.LONE_SURROGATE, "in a picture's name") from None
    if longest > MAX_NAME:
        raise RowError(Reason.UNSAFE_PATH, f"a name of {longest} bytes; the limit is {MAX_NAME}")
    return parts


def read_inside(root: pathlib.Path, name: str, *, max_bytes: int) -> bytes:
    """Read a file that a row names.

    Raises:
        RowError: UNSAFE_PATH, URL, MISSING_PICTURE, NOT_A_FILE or PICTURE_TOO_LARGE.
    """
    with _open_inside(root, safe_parts(name), name) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise RowError(Reason.PICTURE_TOO_LARGE, f"{quote(name)} has {size} bytes; the limit is {max_bytes}")
        try:
            return file.read(max_bytes)
        except OSError as error:
            raise RowError(Reason.MISSING_PICTURE, f"{quote(name)}: {error.strerror}") from error


def open_file(root: pathlib.Path, name: str) -> BinaryIO:
    """Open one of the submission's own files.

    Raises:
        SubmissionError: it is a link, a pipe, a folder, or can't be read.
    """
    try:
        return _open_inside(root, tuple(name.split("/")), name)
    except RowError as error:
        raise SubmissionError(f"{root.name}: {name}: {error}") from error


def _open_inside(root: pathlib.Path, parts: tuple[str, ...], name: str) -> BinaryIO:
    """Walk down from folder to folder, following no link (a path is never looked up twice)."""
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for part in parts[:-1]:
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
            os.close(folder)
            folder = inner
        handle = os.open(parts[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    except OSError as error:
        raise _refusal(error, name) from error
    finally:
        os.close(folder)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise RowError(Reason.NOT_A_FILE, f"{quote(name)} is a folder, a pipe or a device")
    return os.fdopen(handle, "rb")


def _refusal(error: OSError, name: str) -> RowError:
    if error.errno == errno.ENOENT:
        return RowError(Reason.MISSING_PICTURE, f"{quote(name)} is not in the folder")
    if error.errno in (errno.ELOOP, errno.ENOTDIR):
        return RowError(
            Reason.UNSAFE_PATH, f"{quote(name)} goes through a link or through a file; put the picture itself into the folder"
        )
    if error.errno == errno.ENXIO:
        return RowError(Reason.NOT_A_FILE, f"{quote(name)} is a socket or a device")
    return RowError(Reason.MISSING_PICTURE, f"{quote(name)}: {error.strerror}")
