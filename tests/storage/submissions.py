"""Small submissions in each format, for tests."""

from __future__ import annotations

import functools
import io
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
QA_SCHEMA = pa.schema([("id", pa.int64()), ("image", STRUCT), ("question", pa.string()), ("answer", pa.string())])
HF_SCHEMA = QA_SCHEMA.with_metadata({"huggingface": '{"info": {"features": {"image": {"_type": "Image"}}}}'})


@functools.cache
def picture(seed: int = 0, size: tuple[int, int] = (8, 8), mode: str = "RGB", kind: str = "PNG") -> bytes:
    """An encoded picture of noise."""
    noise = np.random.default_rng(seed).integers(0, 256, size=(size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(buffer, format=kind)
    return buffer.getvalue()


def qa(index: int, **changes: Any) -> dict[str, Any]:
    """A row of an imagefolder."""
    row = {"id": index, "file_name": f"images/{index}.png", "question": f"What is {index}?", "answer": f"It is {index}."}
    return without_dropped({**row, **changes})


def talk(index: int, **changes: Any) -> dict[str, Any]:
    """A row of LLaVA."""
    turns = [{"from": "human", "value": f"<image>\nWhat is {index}?"}, {"from": "gpt", "value": f"It is {index}."}]
    return without_dropped({"id": str(index), "image": f"images/{index}.png", "conversations": turns, **changes})


def said(*turns: tuple[Any, Any]) -> list[dict[str, Any]]:
    """LLaVA's conversations of roles and texts."""
    return [{"from": who, "value": what} for who, what in turns]


def cell(index: int, **changes: Any) -> dict[str, Any]:
    """A row of a Parquet file with question and answer."""
    image = {"bytes": picture(index), "path": f"{index}.png"}
    return {"id": index, "image": image, "question": f"What is {index}?", "answer": f"It is {index}.", **changes}


DROP = object()
"""As a value: the row lacks the field."""


def without_dropped(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row without fields that are DROP."""
    return {name: value for name, value in row.items() if value is not DROP}


def as_line(row: Any) -> bytes:
    """A row as a JSON line; bytes stay."""
    return row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n"


def write_pictures(folder: pathlib.Path, count: int) -> None:
    """`images/0.png` and so on, all different."""
    (folder / "images").mkdir(parents=True)
    for index in range(count):
        (folder / "images" / f"{index}.png").write_bytes(picture(index))


def imagefolder(folder: pathlib.Path, rows: Sequence[Any], pictures: int = 4) -> pathlib.Path:
    """An imagefolder of rows (objects, or lines as bytes)."""
    write_pictures(folder, pictures)
    (folder / "metadata.jsonl").write_bytes(b"".join(as_line(row) for row in rows))
    return folder


def llava(folder: pathlib.Path, rows: Sequence[Any], pictures: int = 4, *, array: bool = False) -> pathlib.Path:
    """A LLaVA folder, as lines or as one array."""
    write_pictures(folder, pictures)
    lines = [as_line(row) for row in rows]
    if array:
        (folder / "data.json").write_bytes(b"[" + b", ".join(line.strip() for line in lines) + b"]")
    else:
        (folder / "data.jsonl").write_bytes(b"".join(lines))
    return folder


def parquet(folder: pathlib.Path, rows: Sequence[Mapping[str, Any]], schema: pa.Schema = HF_SCHEMA, files: int = 1) -> pathlib.Path:
    """Parquet files under `data/`, the rows in order."""
    (folder / "data").mkdir(parents=True)
    share = -(-len(rows) // files)
    for index in range(files):
        part = pa.Table.from_pylist(list(rows[index * share : (index + 1) * share]), schema=schema)
        pq.write_table(part, folder / "data" / f"train-{index:05d}-of-{files:05d}.parquet")
    return folder
