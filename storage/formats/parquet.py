"""Rows of Parquet files as Hugging Face writes them: pictures as bytes in a column, turns in others."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import IngestConfig
from pipeline.errors import SubmissionError
from pipeline.records import Message, Rejection, Sample
from storage.formats import llava
from storage.formats.base import Pick, Reason, RowError, merged
from storage.formats.columns import Layout, check_expansion, layout_of
from storage.formats.paths import open_file
from storage.formats.turns import conversation, encoded_alike, make_sample, question_and_answer, without_tokens

NAME = "parquet"
ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
BATCH_ROWS = 16
_BUFFER = 1 << 20
"""Bytes of a column that are read at a time: without it that of a whole row group is, pictures and all."""
GROUP_ROWS = 1000
GROUP_BYTES = 64_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParquetSubmission:
    """See `storage.formats.base.Submission`.

    Attributes:
        root: the folder.
        files: names relative to it, in order.
        layout: the columns that are read.
        config: the limits.
    """

    root: pathlib.Path
    files: tuple[str, ...]
    layout: Layout
    config: IngestConfig
    format: str = NAME

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.root.name

    def count(self) -> int:
        """Number of rows."""
        return sum(self._rows_in(name) for name in self.files)

    def rows(self, special_tokens: Sequence[str] = ()) -> Iterator[Sample | Rejection]:
        """Every row in order, read in small batches; all columns, so that damage shows before any work is done."""
        row = 0
        for name in self.files:
            for index, record in enumerate(_records(self.root, name)):
                try:
                    yield without_tokens(self._sample(row, record), special_tokens)
                except RowError as error:
                    yield Rejection(row=row, reason=str(error), where=f"{name} row {index}")
                row += 1

    def write_subset(self, rows: Collection[int], out: pathlib.Path, *, rejected: Collection[int] = ()) -> None:  # noqa: ARG002 - pictures are in the rows
        """Write rows of the same values and schema, in files of the same names."""
        wanted, start = set(rows), 0
        for name in self.files:
            records = enumerate(_records(self.root, name), start)
            self._write(name, out, (record for row, record in records if row in wanted))
            start += self._rows_in(name)

    def write_merged(self, removed: ParquetSubmission, picks: Sequence[Pick], out: pathlib.Path) -> None:
        """Write the rows of two submissions, file by file, in the order of `picks`."""
        start = 0
        for name in self.files:
            end = start + self._rows_in(name) + removed._rows_in(name)
            kept, others = _records(self.root, name), _records(removed.root, name)
            self._write(name, out, merged(kept, others, picks[start:end]))
            start = end

    def write_changed(self, changes: Mapping[int, tuple[bytes, str]], out: pathlib.Path) -> None:
        """Write all rows, with every picture encoded and named anew."""
        start = 0
        for name in self.files:
            records = enumerate(_records(self.root, name), start)
            self._write(name, out, (self._changed(row, record, changes.get(row)) for row, record in records))
            start += self._rows_in(name)

    def _rows_in(self, name: str) -> int:
        with open_parquet(self.root, name) as file:
            return int(file.metadata.num_rows)

    def _sample(self, row: int, record: pa.RecordBatch) -> Sample:
        value = _value(record, self.layout.columns)
        images = _pictures(value[self.layout.image])
        return make_sample(row, self._messages(value), images, self.config, images_first=self.layout.text != "conversations")

    def _messages(self, value: Mapping[str, Any]) -> list[Message]:
        if self.layout.text == "question":
            return question_and_answer(value)
        if value[self.layout.text] is None:
            raise RowError(Reason.MISSING_FIELD, self.layout.text)
        if self.layout.text == "messages":
            return conversation(value["messages"], roles=ROLES, who="role", what="content")
        return conversation(value["conversations"], roles=llava.ROLES, who="from", what="value")

    def _changed(self, row: int, record: pa.RecordBatch, change: tuple[bytes, str] | None) -> pa.RecordBatch:
        try:
            images = list(self._sample(row, record).images)
        except RowError as error:
            raise SubmissionError(f"row {row}: {error}; only rows that can be used can be written anew") from error
        if change is not None:
            if not images:
                raise SubmissionError(f"row {row} has no picture to replace")
            images[0] = change[0]
        value = _value(record, self.layout.columns)
        alike = [encoded_alike(image, self.config) for image in images]
        kind = record.schema.field(self.layout.image).type
        new = {self.layout.image: _with_pictures(value[self.layout.image], alike, row, named=_has_names(kind))}
        if change is not None:
            new |= _with_answer(value, self.layout, change[1])
        for column, item in new.items():
            index = record.schema.get_field_index(column)
            field = record.schema.field(index)
            record = record.set_column(index, field, pa.array([item], type=field.type))
        return record

    def _write(self, name: str, out: pathlib.Path, records: Iterable[pa.RecordBatch]) -> None:
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_parquet(self.root, name) as file:
            schema, codec = file.schema_arrow, _codec(file.metadata)
        with pq.ParquetWriter(path, schema, compression=codec) as writer:
            group: list[pa.RecordBatch] = []
            size = 0
            for record in records:
                group.append(record)
                size += record.nbytes
                if len(group) >= GROUP_ROWS or size >= GROUP_BYTES:
                    writer.write_table(pa.Table.from_batches(group, schema))
                    group, size = [], 0
            if group:
                writer.write_table(pa.Table.from_batches(group, schema))


def open_files(root: pathlib.Path, names: Sequence[str], config: IngestConfig) -> ParquetSubmission:
    """Open Parquet files of one schema.

    Raises:
        SubmissionError: a file that is no Parquet, of another schema, with unsafe types, or that decompresses too far.
    """
    first: pa.Schema | None = None
    for name in names:
        with open_parquet(root, name) as file:
            schema = file.schema_arrow
            layout = layout_of(schema, name)
        if first is not None and not schema.equals(first):
            raise SubmissionError(f"{name}: its columns differ from those of {names[0]}")
        first = first or schema
    return ParquetSubmission(root=root, files=tuple(names), layout=layout, config=config)


@contextlib.contextmanager
def open_parquet(root: pathlib.Path, name: str) -> Iterator[pq.ParquetFile]:
    """Open one Parquet file, streaming; what is wrong with it while it is open is a SubmissionError.

    Raises:
        SubmissionError: not a regular file, not Parquet, damaged, or it decompresses too far.
    """
    with open_file(root, name) as source:
        try:
            with pq.ParquetFile(source, pre_buffer=False, buffer_size=_BUFFER, page_checksum_verification=True) as file:
                check_expansion(file.metadata, os.fstat(source.fileno()).st_size, name)
                yield file
        except (pa.ArrowException, OSError) as error:
            raise SubmissionError(f"{name}: not Parquet, or damaged: {str(error).splitlines()[0]}") from error


def _records(root: pathlib.Path, name: str) -> Iterator[pa.RecordBatch]:
    """The rows of a file, one record batch each."""
    with open_parquet(root, name) as file:
        for batch in file.iter_batches(batch_size=BATCH_ROWS, use_threads=False):
            for index in range(batch.num_rows):
                yield batch.slice(index, 1)


def _value(record: pa.RecordBatch, columns: Sequence[str]) -> dict[str, Any]:
    try:
        value: dict[str, Any] = record.select(columns).to_pylist()[0]
    except UnicodeDecodeError as error:
        raise RowError(Reason.NOT_UTF8, "in a column of text") from error
    return value


def _pictures(value: object) -> list[bytes]:
    if value is None:
        return []
    items: list[Any] = value if isinstance(value, list) else [value]
    pictures = [item["bytes"] if isinstance(item, dict) else item for item in items]
    if any(picture is None for picture in pictures):
        raise RowError(Reason.MISSING_PICTURE, "its bytes are null; paths are not followed")
    return pictures


def _has_names(kind: pa.DataType) -> bool:
    """Whether pictures of a column's type (Hugging Face's Image, or a list of them) have a path; one of type null holds none."""
    item = kind if pa.types.is_struct(kind) else getattr(kind, "value_type", kind)
    return pa.types.is_struct(item) and item.get_field_index("path") >= 0 and not pa.types.is_null(item.field("path").type)


def _with_pictures(value: Any, images: Sequence[bytes], row: int, *, named: bool) -> Any:
    """The value of the picture column with other bytes and, where it has any, neutral names."""
    if value is None:
        return None
    old = value if isinstance(value, list) else [value]
    new: list[Any] = []
    for index, (item, image) in enumerate(zip(old, images, strict=True)):
        name = {"path": f"{row:08d}-{index:02d}.png"} if named else {}
        new.append({**item, "bytes": image, **name} if isinstance(item, dict) else image)
    return new if isinstance(value, list) else new[0]


def _with_answer(value: Mapping[str, Any], layout: Layout, answer: str) -> dict[str, Any]:
    """The column that holds the first answer, with that answer replaced."""
    if layout.text == "question":
        return {"answer": answer}
    who, what, name = ("role", "content", "assistant") if layout.text == "messages" else ("from", "value", "gpt")
    turns = [dict(turn) for turn in value[layout.text]]
    turn = next(turn for turn in turns if turn[who] == name)
    turn[what] = [{"type": "text", "text": answer}] if isinstance(turn[what], list) else answer
    return {layout.text: turns}


def _codec(metadata: pq.FileMetaData) -> str:
    """The file's compression, as a writer names it."""
    if not metadata.num_row_groups or not metadata.num_columns:
        return "snappy"
    name = str(metadata.row_group(0).column(0).compression).lower()
    return {"uncompressed": "none", "lz4_raw": "lz4", "lzo": "snappy"}.get(name, name)
