"""Submissions that are refused as a whole: each with a message that says what and where."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from collections.abc import Callable

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import IngestConfig
from pipeline.errors import SubmissionError
from stages.ingest.run import run
from storage.formats import columns, open_submission, rowfile
from tests.storage.submissions import HF_SCHEMA, QA_SCHEMA, STRUCT, cell, imagefolder, llava, parquet, qa, talk

Build = Callable[[pathlib.Path], object]


def file(name: str, content: bytes | str = b"") -> Build:
    """A folder with one file."""

    def build(folder: pathlib.Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return build


def both(*builds: Build) -> Build:
    """What several builds leave in one folder."""

    def build(folder: pathlib.Path) -> None:
        for index, part in enumerate(builds):
            part(folder.parent / f"part-{index}")
            shutil.copytree(folder.parent / f"part-{index}", folder, dirs_exist_ok=True)

    return build


def table(values: dict[str, pa.Array], names: str = "data/a.parquet") -> Build:
    def build(folder: pathlib.Path) -> None:
        (folder / names).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(values), folder / names)

    return build


def replaced_by(make: Build, name: str, replace: Build) -> Build:
    """A submission whose file `name` is moved away and something else put there."""

    def build(folder: pathlib.Path) -> None:
        make(folder)
        (folder / name).rename(folder.parent / "moved")
        replace(folder / name)

    return build


def cut(make: Build, name: str, size: int) -> Build:
    def build(folder: pathlib.Path) -> None:
        make(folder)
        (folder / name).write_bytes((folder / name).read_bytes()[:size])

    return build


def damaged_page(folder: pathlib.Path) -> None:
    parquet(folder, [cell(index) for index in range(4)], QA_SCHEMA)
    path = folder / SHARD
    data = bytearray(path.read_bytes())
    data[4:40] = bytes(36)
    path.write_bytes(data)


def extension() -> pa.Array:
    return pa.ExtensionArray.from_storage(pa.uuid(), pa.array([bytes(16)], pa.binary(16)))


def unknown_extension(folder: pathlib.Path) -> None:
    """The tag of an extension type that is registered nowhere, deep in a struct."""
    tag = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": "cos\nsystem\n"}
    inner = pa.field("x", pa.binary(), metadata=tag)
    schema = pa.schema([*QA_SCHEMA, pa.field("extra", pa.list_(pa.struct([inner])))])
    parquet(folder, [cell(0, extra=[])], schema)


def doubled_column(folder: pathlib.Path) -> None:
    folder.mkdir()
    text = pa.array(["a"])
    pq.write_table(pa.Table.from_arrays([text, text, text], names=["image", "answer", "answer"]), folder / "a.parquet")


def two_schemas(folder: pathlib.Path) -> None:
    parquet(folder, [cell(0)])
    other = pa.schema([*QA_SCHEMA, ("extra", pa.string())])
    pq.write_table(pa.Table.from_pylist([cell(1)], schema=other), folder / "data/z.parquet")


def null_rows(folder: pathlib.Path) -> None:
    folder.mkdir()
    names = ("image", "question", "answer")
    arrays = [pa.nulls(500_000, kind) for kind in (pa.binary(), pa.string(), pa.string())]
    pq.write_table(pa.Table.from_arrays(arrays, names=names), folder / "a.parquet")


SHARD = "data/train-00000-of-00001.parquet"
BYTES = pa.array([b"a"])
TEXT = pa.array(["a"])
GOOD_FOLDER: Build = lambda folder: imagefolder(folder, [qa(0)])  # noqa: E731
GOOD_LLAVA: Build = lambda folder: llava(folder, [talk(0)])  # noqa: E731
GOOD_ARRAY: Build = lambda folder: llava(folder, [talk(0)], array=True)  # noqa: E731
GOOD_PARQUET: Build = lambda folder: parquet(folder, [cell(0)])  # noqa: E731
GOOD_LINE = json.dumps(qa(0)) + "\n"
DEEP = b"[" + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"]"

CASES: list[tuple[str, str, Build, str | None]] = [
    ("nothing there", "there is no such folder", lambda folder: None, None),
    ("a pipe", "neither a folder nor a file", os.mkfifo, None),
    ("an archive", "a single file is read only if it is Parquet", lambda folder: folder.write_bytes(b"PK"), None),
    ("an empty folder", "no metadata.jsonl, no JSON file", pathlib.Path.mkdir, None),
    ("pictures only", "no metadata.jsonl", file("a.png"), None),
    ("one folder down", "give train itself", file("train/metadata.jsonl", GOOD_LINE), None),
    ("Arrow folder", "write it as Parquet", file("data-00000-of-00001.arrow"), None),
    ("only its state", "no metadata.jsonl", file("state.json", "{}"), None),
    ("no rows", "there are no rows", file("metadata.jsonl"), None),
    ("blank lines only", "there are no rows", file("metadata.jsonl", "\n\r\n \n"), None),
    ("no elements", "there are no rows", file("data.json", "[]"), "llava"),
    ("no Parquet rows", "there are no rows", lambda folder: parquet(folder, []), None),
    (
        "all rows bad",
        "none of 2 rows can be used; 2 not JSON; the first: metadata.jsonl line 1: not JSON",
        file("metadata.jsonl", "a\nb\n"),
        None,
    ),
    ("all pictures missing", "none of 1 rows", file("metadata.jsonl", GOOD_LINE), None),
    ("UTF-16", "UTF-16; save it as UTF-8", file("metadata.jsonl", GOOD_LINE.encode("utf-16")), None),
    ("UTF-16 columns", "UTF-16", file("metadata.csv", "file_name,question,answer\n".encode("utf-16")), None),
    ("two metadata files", "metadata.csv, metadata.jsonl", both(GOOD_FOLDER, file("metadata.csv", "file_name\n")), None),
    ("doubled column name", "a column name comes twice", file("metadata.csv", "a,a\n1,2\n"), None),
    ("imagefolder and Parquet", "imagefolder or parquet; say which with --format", both(GOOD_FOLDER, GOOD_PARQUET), None),
    ("imagefolder and LLaVA", "imagefolder or llava; say which", both(GOOD_FOLDER, GOOD_LLAVA), None),
    ("LLaVA and Parquet", "llava or parquet; say which", both(GOOD_LLAVA, GOOD_PARQUET), None),
    ("all three", "imagefolder or llava or parquet", both(GOOD_FOLDER, GOOD_LLAVA, GOOD_PARQUET), None),
    ("keys of both", "imagefolder or llava", file("metadata.jsonl", json.dumps({**qa(0), **talk(0)})), None),
    ("two LLaVA files", "several files of rows (data.json, data.jsonl)", both(GOOD_LLAVA, GOOD_ARRAY), None),
    ("another format asked for", "no file in it can be of the format parquet", GOOD_FOLDER, "parquet"),
    ("LLaVA asked for", "no file in it can be of the format llava", GOOD_FOLDER, "llava"),
    ("imagefolder asked for", "no file in it can be of the format imagefolder", GOOD_PARQUET, "imagefolder"),
    ("array cut short", "data.json line 1 column 75: not a JSON array", cut(GOOD_ARRAY, "data.json", 80), None),
    ("array not closed", "a comma or ] is missing", file("data.json", '[{"conversations": []}'), None),
    ("text after the array", "text after the array", file("data.json", '[{"conversations": []}] x'), None),
    ("array without comma", "a comma or ] is missing", file("data.json", '[{"conversations": []} {}]'), None),
    ("array with a last comma", "not a JSON array", file("data.json", '[{"conversations": []},]'), None),
    ("array 100,000 deep", "not a JSON array", file("data.json", DEEP), None),
    (
        "array in Latin-1",
        "data.json: not UTF-8 at byte 19",
        file("data.json", '[{"conversations":"\xe9"}]'.encode("latin-1")),
        None,
    ),
    (
        "metadata is a link",
        "goes through a link",
        replaced_by(GOOD_FOLDER, "metadata.jsonl", lambda path: path.symlink_to("../moved")),
        None,
    ),
    ("metadata is a pipe", "a pipe", replaced_by(GOOD_FOLDER, "metadata.jsonl", os.mkfifo), None),
    ("metadata is a folder", "a folder", replaced_by(GOOD_FOLDER, "metadata.jsonl", pathlib.Path.mkdir), None),
    ("rows are a pipe", "a pipe", replaced_by(GOOD_LLAVA, "data.jsonl", os.mkfifo), None),
    (
        "Parquet is a link",
        "goes through a link",
        replaced_by(GOOD_PARQUET, SHARD, lambda path: path.symlink_to("../../moved")),
        None,
    ),
    ("Parquet is a pipe", "a pipe", replaced_by(GOOD_PARQUET, SHARD, os.mkfifo), None),
    ("Parquet is empty", "not Parquet, or damaged", file("a.parquet"), None),
    ("Parquet is text", "not Parquet, or damaged", file("a.parquet", b"PAR1" + b"a" * 100 + b"PAR1"), None),
    ("Parquet cut short", "not Parquet, or damaged", cut(GOOD_PARQUET, SHARD, 500), None),
    ("Parquet with a damaged page", "not Parquet, or damaged", damaged_page, None),
    (
        "extension type",
        "column id has an extension type",
        table({"id": extension(), "image": BYTES, "question": TEXT, "answer": TEXT}),
        None,
    ),
    ("unknown extension type", "column extra[].x has an extension type", unknown_extension, None),
    ("column twice", "a column name comes twice", doubled_column, None),
    ("two schemas", "its columns differ from those of data/train", two_schemas, None),
    ("no pictures", "one column of pictures is needed", table({"question": TEXT, "answer": TEXT}), None),
    (
        "two picture columns",
        "one column of pictures",
        table({"image": BYTES, "images": BYTES, "question": TEXT, "answer": TEXT}),
        None,
    ),
    ("no texts", "the turns must be in question and answer", table({"image": BYTES}), None),
    ("question only", "the turns must be in question and answer", table({"image": BYTES, "question": TEXT}), None),
    ("texts twice", "in one of them only", table({"image": BYTES, "question": TEXT, "answer": TEXT, "messages": TEXT}), None),
    ("pictures as text", "column image must hold bytes", table({"image": TEXT, "question": TEXT, "answer": TEXT}), None),
    (
        "pictures as numbers",
        "column image must hold bytes",
        table({"image": pa.array([[1]]), "question": TEXT, "answer": TEXT}),
        None,
    ),
    (
        "struct without bytes",
        "column image must hold bytes",
        table({"image": pa.array([{"path": "a"}]), "question": TEXT, "answer": TEXT}),
        None,
    ),
    (
        "answer a number",
        "column answer has the type int64",
        table({"image": BYTES, "question": TEXT, "answer": pa.array([1])}),
        None,
    ),
    ("messages as text", "column messages has the type string", table({"image": BYTES, "messages": TEXT}), None),
    (
        "turns without role",
        "column messages has the type list",
        table({"image": BYTES, "messages": pa.array([[{"content": "a"}]])}),
        None,
    ),
    ("bomb of rows", "500000 rows in", null_rows, None),
    (
        "bomb of pictures in a row",
        "column images.list.element has 2000000 values in",
        table({"images": pa.array([[None] * 2_000_000], pa.list_(pa.binary())), "question": TEXT, "answer": TEXT}),
        None,
    ),
]


@pytest.mark.parametrize(("says", "build", "forced"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_bad_submission(says: str, build: Build, forced: str | None, tmp_path: pathlib.Path) -> None:
    build(tmp_path / "submission")
    (tmp_path / "out").mkdir()
    with pytest.raises(SubmissionError) as raised:
        run(tmp_path / "submission", IngestConfig.model_validate({"format": forced}), tmp_path / "out", special_tokens=[])
    assert says in str(raised.value)
    assert str(tmp_path) not in str(raised.value)


def test_a_line_that_memory_may_not_hold_is_refused(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rowfile, "MAX_LINE_BYTES", 50)
    with pytest.raises(SubmissionError, match="line 1: longer than 50 bytes"):
        run(imagefolder(tmp_path / "submission", [qa(0)]), IngestConfig(), tmp_path, special_tokens=[])


def test_a_file_that_decompresses_too_far_is_refused(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "EXPANSION_FLOOR", 1_000_000)
    (tmp_path / "submission").mkdir()
    bomb = pa.Table.from_pylist([cell(0, image={"bytes": bytes(5_000_000), "path": None})], schema=HF_SCHEMA)
    pq.write_table(bomb, tmp_path / "submission/a.parquet", compression="zstd")
    with pytest.raises(SubmissionError, match=r"a\.parquet: .* the limit is 100 times"):
        open_submission(tmp_path / "submission", IngestConfig())


def test_schema_metadata_may_differ_from_file_to_file(tmp_path: pathlib.Path) -> None:
    parquet(tmp_path / "submission", [cell(0)], HF_SCHEMA)
    pq.write_table(pa.Table.from_pylist([cell(1)], schema=QA_SCHEMA), tmp_path / "submission/data/z.parquet")
    summary = run(tmp_path / "submission", IngestConfig(), tmp_path / "out", special_tokens=[])
    assert summary["accepted"] == 2
    assert pq.read_schema(tmp_path / "submission" / SHARD).field("image").type == STRUCT
