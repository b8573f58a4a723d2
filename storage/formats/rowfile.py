"""Text files of rows: JSON lines, CSV, or one JSON array, read row by row as the bytes they are."""

from __future__ import annotations

import codecs
import csv
import dataclasses
import functools
import io
import json
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO, Literal

from pipeline.errors import SubmissionError
from storage.formats.base import Reason, RowError, quote
from storage.formats.paths import open_file

MAX_ROW_BYTES = 4_000_000
"""A longer row is rejected: its text could not be within any limit, and pictures are named, not embedded."""
MAX_LINE_BYTES = 256_000_000
"""A longer line refuses the submission, for it would have to be held in memory to be copied."""

_SPACE = re.compile(r"[ \t\n\r]*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RawRow:
    """One row as submitted: its bytes with their line break, and the file and line it starts at."""

    row: int
    data: bytes
    where: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowFile:
    """A file of rows in a submission's folder."""

    root: pathlib.Path
    name: str
    kind: Literal["lines", "csv", "array"]

    def raw_rows(self) -> Iterator[RawRow]:
        """Every row in order; blank lines are no rows.

        Raises:
            SubmissionError: UTF-16, a line above MAX_LINE_BYTES, or an array that isn't JSON.
        """
        if self.kind == "array":
            return self._elements()
        return self._records()

    def parse(self, raw: RawRow) -> dict[str, Any]:
        """The row's value.

        Raises:
            RowError: not UTF-8, not JSON or CSV, a doubled key, not an object, or above MAX_ROW_BYTES.
        """
        if len(raw.data) > MAX_ROW_BYTES:
            raise RowError(Reason.ROW_TOO_LONG, f"{len(raw.data)} bytes; the limit is {MAX_ROW_BYTES}")
        try:
            text = raw.data.decode("utf-8-sig" if raw.row == 0 else "utf-8")
        except UnicodeDecodeError as error:
            raise RowError(Reason.NOT_UTF8, f"byte {error.start} of the row") from error
        return self._parse_csv(text) if self.kind == "csv" else parse_json(text)

    def write_raw(self, path: pathlib.Path, rows: Iterable[RawRow]) -> None:
        """Write rows as the bytes they are."""
        with path.open("wb") as file:
            file.write(self._header if self.kind == "csv" else b"[\n" if self.kind == "array" else b"")
            joint, last = b"", b"\n"
            for raw in rows:
                if self.kind != "array" and not last.endswith(b"\n"):
                    joint = b"\n"
                file.write(joint + raw.data)
                joint, last = (b",\n" if self.kind == "array" else b""), raw.data
            file.write(b"\n]\n" if self.kind == "array" else b"")

    def write_values(self, path: pathlib.Path, values: Iterable[Mapping[str, Any]]) -> None:
        """Write values, all encoded in the same way."""
        self.write_raw(path, (RawRow(row=row, data=self._encode(value), where="") for row, value in enumerate(values)))

    def _encode(self, value: Mapping[str, Any]) -> bytes:
        if self.kind == "csv":
            buffer = io.StringIO(newline="")
            csv.writer(buffer, lineterminator="\n").writerow([value[field] for field in self._fields])
            return buffer.getvalue().encode()
        return (json.dumps(value, ensure_ascii=False) + ("\n" if self.kind == "lines" else "")).encode()

    def _records(self) -> Iterator[RawRow]:
        row = -1 if self.kind == "csv" else 0
        for line, data in self._lines():
            if row >= 0:
                yield RawRow(row=row, data=data, where=f"{self.name} line {line}")
            row += 1

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """Line number, from 1, and bytes; in CSV a record goes on until its quotes are closed."""
        number = 0
        with open_file(self.root, self.name) as file:
            while data := file.readline(MAX_LINE_BYTES + 1):
                first = number = number + 1
                if self.kind == "csv" and _ends_quoted(data.removeprefix(codecs.BOM_UTF8) if first == 1 else data, quoted=False):
                    rest = list(_until_quotes_close(file, MAX_LINE_BYTES - len(data)))
                    data, number = b"".join([data, *rest]), number + len(rest)
                if len(data) > MAX_LINE_BYTES:
                    raise SubmissionError(f"{self.name} line {first}: longer than {MAX_LINE_BYTES} bytes")
                if first == 1 and data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                    raise SubmissionError(f"{self.name}: UTF-16; save it as UTF-8")
                if data.strip():
                    yield first, data

    def _elements(self) -> Iterator[RawRow]:
        """The elements of the array; the text is held whole, the values are not."""
        with open_file(self.root, self.name) as file:
            try:
                text = file.read().decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise SubmissionError(f"{self.name}: not UTF-8 at byte {error.start}; save it as UTF-8") from error
        decoder = json.JSONDecoder()
        try:
            for row, (start, end) in enumerate(_spans(text, decoder)):
                yield RawRow(row=row, data=text[start:end].encode(), where=f"{self.name} element {row}")
        except json.JSONDecodeError as error:
            raise SubmissionError(f"{self.name} line {error.lineno} column {error.colno}: not a JSON array: {error.msg}") from error
        except (RecursionError, ValueError) as error:
            raise SubmissionError(f"{self.name}: not a JSON array that can be read: {error}") from error

    @functools.cached_property
    def _header(self) -> bytes:
        for _, data in self._lines():
            return data if data.endswith(b"\n") else data + b"\n"
        return b""

    @functools.cached_property
    def _fields(self) -> list[str]:
        try:
            fields = next(csv.reader([self._header.decode("utf-8-sig")]), [])
        except (UnicodeDecodeError, csv.Error) as error:
            raise SubmissionError(f"{self.name} line 1: the column names can't be read: {error}") from error
        if len(set(fields)) != len(fields):
            raise SubmissionError(f"{self.name} line 1: a column name comes twice")
        return fields

    def _parse_csv(self, text: str) -> dict[str, Any]:
        fields = self._fields
        try:
            records = list(csv.reader(io.StringIO(text, newline=""), strict=True))
        except csv.Error as error:
            raise RowError(Reason.NOT_CSV, str(error)) from error
        if len(records) != 1 or len(records[0]) != len(fields):
            raise RowError(Reason.NOT_CSV, f"{len(records[0])} values for {len(fields)} columns")
        return dict(zip(fields, records[0], strict=True))


def parse_json(text: str) -> dict[str, Any]:
    """A JSON object, read strictly.

    Raises:
        RowError: NOT_JSON (NaN and infinity included), DUPLICATE_KEY or WRONG_TYPE.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except RowError:
        raise
    except RecursionError:
        raise RowError(Reason.NOT_JSON, "nested too deep") from None
    except json.JSONDecodeError as error:
        raise RowError(Reason.NOT_JSON, f"{error.msg} at character {error.pos}") from error
    except ValueError as error:
        raise RowError(Reason.NOT_JSON, "a number of too many digits") from error
    if not isinstance(value, dict):
        raise RowError(Reason.WRONG_TYPE, f"a row must be an object, not {type(value).__name__}")
    return value


def _until_quotes_close(file: BinaryIO, limit: int) -> Iterator[bytes]:
    """The lines after one that leaves a quote open, up to the line that closes it."""
    size = 0
    while size <= limit and (line := file.readline(MAX_LINE_BYTES + 1)):
        yield line
        if not _ends_quoted(line, quoted=True):
            return
        size += len(line)


def _ends_quoted(line: bytes, *, quoted: bool) -> bool:
    """Whether a line of CSV ends inside of a quoted value. quoted: whether it begins in one.

    A quote opens a value only where the value begins: that of 27" is a character.
    """
    at = 0
    while True:
        if not quoted and line[at : at + 1] == b'"':
            quoted, at = True, at + 1
        while quoted:
            end = line.find(b'"', at)
            if end < 0:
                return True
            quoted, at = line[end + 1 : end + 2] == b'"', end + 1  # a doubled one opens the value again
            at += quoted
        at = line.find(b",", at) + 1
        if not at:
            return False


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for name, item in pairs:
        if name in value:
            raise RowError(Reason.DUPLICATE_KEY, quote(name))
        value[name] = item
    return value


def _refuse_constant(name: str) -> None:
    raise RowError(Reason.NOT_JSON, f"{name} is no JSON number")


def _spans(text: str, decoder: json.JSONDecoder) -> Iterator[tuple[int, int]]:
    """Start and end of each element of a JSON array."""
    position = _skip(text, 0)
    if text[position : position + 1] != "[":
        raise json.JSONDecodeError("it doesn't start with [", text, position)
    position = _skip(text, position + 1)
    closed = text[position : position + 1] == "]"
    while not closed:
        _, end = decoder.raw_decode(text, position)
        yield position, end
        position = _skip(text, end)
        closed = text[position : position + 1] == "]"
        if not closed and text[position : position + 1] != ",":
            raise json.JSONDecodeError("a comma or ] is missing", text, position)
        if not closed:
            position = _skip(text, position + 1)
    if _skip(text, position + 1) != len(text):
        raise json.JSONDecodeError("there is text after the array", text, position + 1)


def _skip(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position
