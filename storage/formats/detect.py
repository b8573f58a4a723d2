"""Which format a submission is in, told by its files and their keys; where two fit, it must be named."""

from __future__ import annotations

import codecs
import itertools
import pathlib
import stat
from typing import Literal

from pipeline.config import IngestConfig
from pipeline.errors import SubmissionError
from storage.formats import imagefolder, llava, parquet
from storage.formats.base import RowError, Submission
from storage.formats.paths import open_file
from storage.formats.rowfile import RowFile
from storage.formats.textrows import TextSubmission
from storage.manifests import digest_folder, hash_file

METADATA = ("metadata.jsonl", "metadata.csv")
PEEKED_ROWS = 20
_NO_ROWS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_ARCHIVES = {".zip", ".tar", ".gz", ".tgz", ".zst", ".xz", ".bz2", ".7z", ".rar"}


def detect(path: pathlib.Path, forced: str | None = None) -> str:
    """The format's name: `imagefolder`, `llava` or `parquet`.

    Args:
        path: a folder, or one Parquet file.
        forced: the format that was asked for; it must fit.

    Raises:
        SubmissionError: none fits, or several do and none was asked for.
    """
    _check_path(path)
    if forced is not None:
        if not (_parquet_files(path)[1] if forced == parquet.NAME else _files_of(path, forced)):
            raise SubmissionError(f"{path.name}: no file in it can be of the format {forced}")
        return forced
    found = {name for file in _row_files(path) for name in _schemes(file)}
    fitting = sorted(found | ({parquet.NAME} if _parquet_files(path)[1] else set()))
    if not fitting:
        raise SubmissionError(f"{path.name}: {_advice(path)}")
    if len(fitting) > 1:
        raise SubmissionError(f"{path.name}: it could be {' or '.join(fitting)}; say which with --format")
    return fitting[0]


def open_submission(path: pathlib.Path, config: IngestConfig) -> Submission:
    """Open a submission for reading; see `storage.formats.base.Submission`.

    Raises:
        SubmissionError: no such path, no known format, an ambiguous one, or files that can't be read.
    """
    name = detect(path, config.format)
    if name == parquet.NAME:
        root, names = _parquet_files(path)
        return parquet.open_files(root, names, config)
    files = _files_of(path, name)
    if len(files) != 1:
        raise SubmissionError(f"{path.name}: several files of rows ({', '.join(file.name for file in files)}); keep one")
    return TextSubmission(file=files[0], scheme=imagefolder if name == imagefolder.NAME else llava, config=config)


def digest_submission(path: pathlib.Path) -> str:
    """SHA-256 over the relative names and contents of a submission, read once; a folder's own name is no part of it.

    Raises:
        SubmissionError: there is no such path, or a file can't be read.
    """
    _check_path(path)
    try:
        return digest_folder(path) if path.is_dir() else hash_file(path)
    except OSError as error:
        raise SubmissionError(f"{path.name}: it can't be read: {error.strerror}") from error


def _check_path(path: pathlib.Path) -> None:
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise SubmissionError(f"{path.name}: there is no such folder") from error
    if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
        raise SubmissionError(f"{path.name}: neither a folder nor a file")
    if stat.S_ISREG(mode) and path.suffix != ".parquet":
        advice = "unpack it first" if path.suffix.lower() in _ARCHIVES else "give the folder of rows and pictures"
        raise SubmissionError(f"{path.name}: a single file is read only if it is Parquet; {advice}")


def _files_of(path: pathlib.Path, name: str) -> list[RowFile]:
    """The files whose keys tell the format; where none does, those that could be of it."""
    files = _row_files(path)
    telling = [file for file in files if name in _schemes(file)]
    return telling or [file for file in files if (file.name in METADATA) == (name == imagefolder.NAME)]


def _row_files(folder: pathlib.Path) -> list[RowFile]:
    if folder.is_file():
        return []
    files = []
    for name in sorted(entry.name for entry in folder.iterdir()):
        if name in METADATA:
            files.append(RowFile(root=folder, name=name, kind="csv" if name.endswith(".csv") else "lines"))
        elif name.endswith((".json", ".jsonl")) and name not in _NO_ROWS and not name.startswith("."):
            files.append(RowFile(root=folder, name=name, kind=_container(folder, name)))
    return files


def _container(folder: pathlib.Path, name: str) -> Literal["lines", "array"]:
    with open_file(folder, name) as file:
        start = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
    return "array" if start.startswith(b"[") else "lines"


def _schemes(file: RowFile) -> set[str]:
    """The formats whose keys the first rows have; the metadata file of an imagefolder says it by its name."""
    keys: set[str] = set()
    for raw in itertools.islice(file.raw_rows(), PEEKED_ROWS):
        try:
            keys |= file.parse(raw).keys()
        except RowError:
            continue
    found = {llava.NAME} if "conversations" in keys else set()
    if file.name in METADATA and ("file_name" in keys or not found):
        found.add(imagefolder.NAME)
    return found


def _parquet_files(path: pathlib.Path) -> tuple[pathlib.Path, list[str]]:
    """The folder and the names of its Parquet files, at any depth, in order."""
    if path.is_file():
        return path.parent, [path.name]
    names = [file.relative_to(path) for file in sorted(path.rglob("*.parquet"))]
    return path, [name.as_posix() for name in names if not any(part.startswith(".") for part in name.parts)]


def _advice(path: pathlib.Path) -> str:
    inner = sorted(file.parent.name for name in METADATA for file in path.glob(f"*/{name}"))
    if inner:
        return f"the rows are one folder down; give {inner[0]} itself"
    if any(path.rglob("*.arrow")):
        return "an Arrow folder; write it as Parquet (Dataset.to_parquet)"
    return "no metadata.jsonl, no JSON file with conversations and no Parquet file in it"
