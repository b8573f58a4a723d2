"""Hashes of files and folders, and the comparison of a folder with what its manifest says."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, TypedDict

from pipeline.errors import IntegrityError

MANIFEST = "manifest.json"


class FileEntry(TypedDict):
    """What a manifest says of one file."""

    sha256: str
    bytes: int


def hash_file(path: pathlib.Path) -> str:
    """SHA-256 of a file's bytes, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_folder(folder: pathlib.Path) -> dict[str, FileEntry]:
    """Every file under a folder but its own manifest, by relative name in order.

    Raises:
        IntegrityError: something that is neither a folder nor a regular file.
    """
    return {name: FileEntry(sha256=hash_file(folder / name), bytes=(folder / name).stat().st_size) for name in names_under(folder)}


def content_digest(files: Mapping[str, FileEntry]) -> str:
    """SHA-256 over names and hashes: equal for equal content, wherever and whenever it was made."""
    listing = json.dumps(sorted((name, entry["sha256"]) for name, entry in files.items()))
    return hashlib.sha256(listing.encode()).hexdigest()


def differences(folder: pathlib.Path, files: Mapping[str, FileEntry]) -> list[str]:
    """What differs between a folder and its manifest's `files`: `changed: NAME`, `missing: NAME`, `extra: NAME`."""
    present = set(names_under(folder))
    problems = [f"missing: {name}" for name in files if name not in present]
    problems += [f"extra: {name}" for name in sorted(present.difference(files))]
    for name in sorted(present.intersection(files)):
        path = folder / name
        if path.stat().st_size != files[name]["bytes"] or hash_file(path) != files[name]["sha256"]:
            problems.append(f"changed: {name}")
    return problems


def names_under(folder: pathlib.Path) -> list[str]:
    """Relative names of all files under a folder but its own manifest, sorted.

    Raises:
        IntegrityError: a link, a pipe or a device among them.
    """
    return sorted(name for name in _walk(folder) if name != MANIFEST)


def digest_folder(folder: pathlib.Path) -> str:
    """SHA-256 over the relative names and contents of a folder that others made: links by their target, pipes by their name."""
    digest = hashlib.sha256()
    for root, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted((*folders, *files)):
            path = pathlib.Path(root, name)
            if path.is_symlink():
                entry = ("link", str(path.readlink()))
            elif path.is_file():
                entry = ("file", hash_file(path))
            else:
                entry = ("folder" if path.is_dir() else "special", "")
            digest.update(json.dumps([path.relative_to(folder).as_posix(), *entry]).encode())
    return digest.hexdigest()


def to_json(value: Any) -> bytes:
    """JSON as our files hold it: keys sorted, one line break at the end, the same bytes for the same value.

    Raises:
        ValueError, TypeError: a value that JSON can't hold (NaN, infinity, an object).
    """
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def _walk(folder: pathlib.Path) -> Iterator[str]:
    for root, folders, files in os.walk(folder):
        for names, found in ((folders, pathlib.Path.is_dir), (files, pathlib.Path.is_file)):
            for name in names:
                path = pathlib.Path(root, name)
                relative = path.relative_to(folder).as_posix()
                if path.is_symlink() or not found(path):
                    raise IntegrityError(f"{relative}: neither a regular file nor a folder")
                if names is files:
                    yield relative
