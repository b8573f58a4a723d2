"""The schema of a submitted Parquet file: which columns hold pictures and turns, and what is refused before a row is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import SubmissionError

EXPANSION_LIMIT = 100
"""Most bytes that a byte of the file may stand for; encoded pictures hardly compress."""
EXPANSION_FLOOR = 256_000_000
"""Bytes, decompressed, that any file may have."""
ROWS_FLOOR = 100_000
"""Rows, and values of a column, that any file may have; more of them than bytes are a bomb."""

TextLayout = Literal["question", "messages", "conversations"]
_TEXTS: dict[TextLayout, tuple[str, ...]] = {
    "question": ("question", "answer"),
    "messages": ("messages",),
    "conversations": ("conversations",),
}
_TURN_FIELDS = {"messages": {"role", "content"}, "conversations": {"from", "value"}}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """The columns that are read.

    Attributes:
        image: name of the column of pictures, `image` or `images`.
        text: where the turns are: `question` and `answer`, `messages` or `conversations`.
    """

    image: str
    text: TextLayout

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        return [self.image, *_TEXTS[self.text]]


def layout_of(schema: pa.Schema, name: str) -> Layout:
    """Find the columns of pictures and turns.

    Args:
        schema: the file's schema.
        name: the file's name, for messages.

    Raises:
        SubmissionError: an extension type, a doubled name, a missing or ambiguous column, or a wrong type.
    """
    for path, field in _fields(schema):
        if isinstance(field.type, pa.BaseExtensionType) or b"ARROW:extension:name" in (field.metadata or {}):
            raise SubmissionError(f"{name}: column {path} has an extension type; write it as a plain type")
    if len(set(schema.names)) != len(schema.names):
        raise SubmissionError(f"{name}: a column name comes twice")
    images = [column for column in ("image", "images") if column in schema.names]
    texts = [layout for layout, columns in _TEXTS.items() if set(columns) <= set(schema.names)]
    if len(images) != 1:
        raise SubmissionError(f"{name}: one column of pictures is needed, image or images; it has {schema.names}")
    if len(texts) != 1:
        raise SubmissionError(
            f"{name}: the turns must be in question and answer, in messages or in conversations, and in one of them only; "
            f"it has {schema.names}"
        )
    layout = Layout(image=images[0], text=texts[0])
    _check_types(schema, layout, name)
    return layout


def check_expansion(metadata: pq.FileMetaData, size: int, name: str) -> None:
    """Refuse a file that would decompress to far more than it is.

    Args:
        metadata: the file's footer.
        size: the file's size, bytes.
        name: the file's name, for messages.

    Raises:
        SubmissionError: above EXPANSION_LIMIT times its size, or more rows, or values of a column, than bytes.
    """
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    decoded = sum(group.total_byte_size for group in groups)
    if decoded > max(EXPANSION_FLOOR, EXPANSION_LIMIT * size):
        raise SubmissionError(f"{name}: {size} bytes decompress to {decoded}; the limit is {EXPANSION_LIMIT} times")
    if metadata.num_rows > max(ROWS_FLOOR, size):
        raise SubmissionError(f"{name}: {metadata.num_rows} rows in {size} bytes")
    for index in range(metadata.num_columns):  # a list without values takes no bytes, whatever its length
        values = sum(group.column(index).num_values for group in groups if index < group.num_columns)
        if values > max(ROWS_FLOOR, size):
            path = metadata.schema.column(index).path
            raise SubmissionError(f"{name}: column {path} has {values} values in {size} bytes")


def _check_types(schema: pa.Schema, layout: Layout, name: str) -> None:
    image = schema.field(layout.image).type
    picture = image.value_type if _is_list(image) else image
    if not (_is_binary(picture) or (pa.types.is_struct(picture) and _child(picture, "bytes", _is_binary))):
        raise SubmissionError(f"{name}: column {layout.image} must hold bytes or {{bytes, path}}, or a list of them, not {image}")
    for column in layout.columns[1:]:
        kind = schema.field(column).type
        if layout.text == "question":
            right = _is_text(kind)
        else:
            turn = kind.value_type if _is_list(kind) else None
            right = turn is not None and pa.types.is_struct(turn) and {field.name for field in turn} >= _TURN_FIELDS[layout.text]
        if not right:
            raise SubmissionError(f"{name}: column {column} has the type {kind}; see the accepted formats")


def _fields(schema: pa.Schema) -> Iterator[tuple[str, Any]]:
    """Every field at any depth, with its path."""
    waiting = [(field.name, field) for field in schema]
    while waiting:
        path, field = waiting.pop()
        yield path, field
        kind = field.type
        if isinstance(kind, pa.BaseExtensionType):
            continue
        if pa.types.is_map(kind):
            waiting += [(f"{path}.key", kind.key_field), (f"{path}.value", kind.item_field)]
        elif hasattr(kind, "value_field"):
            waiting.append((f"{path}[]", kind.value_field))
        elif pa.types.is_struct(kind) or pa.types.is_union(kind):
            waiting += [(f"{path}.{kind.field(index).name}", kind.field(index)) for index in range(kind.num_fields)]


def _child(kind: Any, name: str, test: Any) -> bool:
    return any(field.name == name and test(field.type) for field in kind)


def _is_list(kind: Any) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_binary(kind: Any) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_text(kind: Any) -> bool:
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(plain) or pa.types.is_large_string(plain))
