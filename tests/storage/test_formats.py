"""The three formats, in and out: what is read, what is written back untouched, what is put back, what a changed copy gives away."""

from __future__ import annotations

import csv
import io
import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import IngestConfig
from pipeline.errors import SubmissionError
from pipeline.images import decode_image
from pipeline.records import Rejection, Sample, examples_of, question_answer, text_of
from storage.formats import Pick, Submission, detect, open_submission
from tests.storage.submissions import HF_SCHEMA, STRUCT, cell, imagefolder, llava, parquet, picture, qa, said, talk, write_pictures

ROWS = 7
Build = Callable[[pathlib.Path], pathlib.Path]

TURN = pa.struct([("role", pa.string()), ("content", pa.string())])
PARTS = pa.struct([("role", pa.string()), ("content", pa.list_(pa.struct([("type", pa.string()), ("text", pa.string())])))])
SAID = pa.struct([("from", pa.string()), ("value", pa.string())])
EXTRA = [("when", pa.timestamp("ns")), ("kind", pa.dictionary(pa.int32(), pa.string())), ("score", pa.float32())]


def csv_folder(folder: pathlib.Path) -> pathlib.Path:
    imagefolder(folder, [], ROWS)
    (folder / "metadata.jsonl").unlink()
    rows = [f'images/{index}.png,"What is ""{index}"",\nplease?",It is {index}.\n' for index in range(ROWS)]
    (folder / "metadata.csv").write_text("file_name,question,answer\n" + "".join(rows))
    return folder


def messages_rows(content: Callable[[str, bool], Any]) -> list[dict[str, Any]]:
    return [
        {
            "images": [{"bytes": picture(index), "path": None}],
            "messages": [
                {"role": "user", "content": content(f"What is {index}?", True)},
                {"role": "assistant", "content": content(f"It is {index}.", False)},
            ],
        }
        for index in range(ROWS)
    ]


def as_parts(text: str, asks: bool) -> list[dict[str, str]]:
    return [*([{"type": "image"}] if asks else []), {"type": "text", "text": text}]


def talk_rows() -> list[dict[str, Any]]:
    return [{"image": picture(index), "conversations": talk(index)["conversations"]} for index in range(ROWS)]


def extra_cells() -> list[dict[str, Any]]:
    return [cell(index, when=index, kind="ab"[index % 2], score=float("nan") if index == 3 else index / 3) for index in range(ROWS)]


IMAGES = ("images", pa.list_(STRUCT))
EXTRA_SCHEMA = pa.schema([*HF_SCHEMA, *EXTRA], metadata=HF_SCHEMA.metadata)
CHAT_SCHEMA = pa.schema([IMAGES, ("messages", pa.list_(TURN))])
PARTS_SCHEMA = pa.schema([IMAGES, ("messages", pa.list_(PARTS))])
TALK_SCHEMA = pa.schema([("image", pa.binary()), ("conversations", pa.list_(SAID))])
BUILDS: dict[str, Build] = {
    "imagefolder": lambda folder: imagefolder(folder, [qa(index) for index in range(ROWS)], ROWS),
    "csv": csv_folder,
    "llava lines": lambda folder: llava(folder, [talk(index) for index in range(ROWS)], ROWS),
    "llava array": lambda folder: llava(folder, [talk(index) for index in range(ROWS)], ROWS, array=True),
    "parquet": lambda folder: parquet(folder, [cell(index) for index in range(ROWS)], files=3),
    "parquet, more columns": lambda folder: parquet(folder, extra_cells(), EXTRA_SCHEMA, files=2),
    "parquet, messages": lambda folder: parquet(folder, messages_rows(lambda text, _: text), CHAT_SCHEMA),
    "parquet, parts": lambda folder: parquet(folder, messages_rows(as_parts), PARTS_SCHEMA),
    "parquet, talk": lambda folder: parquet(folder, talk_rows(), TALK_SCHEMA),
}


def raw_rows(folder: pathlib.Path) -> list[Any]:
    """The rows as they lie in the files: lines, elements or values."""
    shards = sorted(folder.rglob("*.parquet"))
    if shards:
        return [repr(row) for shard in shards for row in pq.read_table(shard).to_pylist()]
    (path,) = (path for path in folder.iterdir() if path.suffix in {".jsonl", ".json", ".csv"})
    if path.suffix == ".json":
        return list(json.loads(path.read_bytes()))
    if path.suffix == ".csv":
        return re.findall(rb"images/[^.]+\.png,(?:\"(?:[^\"]|\"\")*\"),.*\n", path.read_bytes())
    return path.read_bytes().splitlines(keepends=True)


def samples(folder: pathlib.Path) -> list[Sample]:
    rows = list(open_submission(folder, IngestConfig()).rows())
    assert not [row for row in rows if isinstance(row, Rejection)]
    return [row for row in rows if isinstance(row, Sample)]


def opened(folder: pathlib.Path) -> Submission:
    return open_submission(folder, IngestConfig())


@pytest.fixture(params=BUILDS)
def submission(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> pathlib.Path:
    return BUILDS[request.param](tmp_path / "submission")


def test_rows_are_the_same_in_every_format(submission: pathlib.Path) -> None:
    rows = samples(submission)
    assert [row.row for row in rows] == list(range(ROWS))
    assert opened(submission).count() == ROWS
    assert [row.images for row in rows] == [(picture(index),) for index in range(ROWS)]
    asked = "What is {}?" if submission.joinpath("metadata.csv").exists() is False else 'What is "{}",\nplease?'
    assert [row.messages for row in rows] == [question_answer(asked.format(index), f"It is {index}.") for index in range(ROWS)]


def test_a_subset_is_untouched_and_in_order(submission: pathlib.Path, tmp_path: pathlib.Path) -> None:
    opened(submission).write_subset([5, 0, 3], tmp_path / "subset")
    before, after = raw_rows(submission), raw_rows(tmp_path / "subset")
    assert len(before) == ROWS
    assert after == [before[row] for row in (0, 3, 5)]
    all_rows, kept = samples(submission), samples(tmp_path / "subset")
    assert [row.sample_id for row in kept] == [all_rows[row].sample_id for row in (0, 3, 5)]
    pictures = sorted(path.name for path in (tmp_path / "subset").rglob("*.png"))
    assert pictures == ([] if detect(submission) == "parquet" else ["0.png", "3.png", "5.png"])


def test_parquet_keeps_schema_and_metadata(submission: pathlib.Path, tmp_path: pathlib.Path) -> None:
    opened(submission).write_subset([1], tmp_path / "subset")
    names = [path.relative_to(submission) for path in sorted(submission.rglob("*.parquet"))]
    assert [path.relative_to(tmp_path / "subset") for path in sorted((tmp_path / "subset").rglob("*.parquet"))] == names
    for name in names:
        assert pq.read_schema(tmp_path / "subset" / name).equals(pq.read_schema(submission / name), check_metadata=True)


def test_the_same_rows_give_the_same_bytes(submission: pathlib.Path, tmp_path: pathlib.Path) -> None:
    for name in ("first", "second"):
        opened(submission).write_subset([1, 2, 6], tmp_path / name)
    first, second = sorted((tmp_path / "first").rglob("*.*")), sorted((tmp_path / "second").rglob("*.*"))
    assert [path.name for path in first] == [path.name for path in second] != []
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_removed_rows_are_put_back_in_their_places(submission: pathlib.Path, tmp_path: pathlib.Path) -> None:
    opened(submission).write_subset([0, 2, 3], tmp_path / "kept")
    opened(submission).write_subset([1, 4, 5, 6], tmp_path / "removed")
    picks: list[Pick] = ["kept", "removed", "kept", "kept", "removed", "left", "removed"]
    opened(tmp_path / "kept").write_merged(opened(tmp_path / "removed"), picks, tmp_path / "merged")
    before = raw_rows(submission)
    assert raw_rows(tmp_path / "merged") == [before[row] for row in (0, 1, 2, 3, 4, 6)]
    assert len(samples(tmp_path / "merged")) == 6


def test_a_changed_copy_differs_in_content_only(submission: pathlib.Path, tmp_path: pathlib.Path) -> None:
    new = picture(99, (16, 12), "L", "JPEG")
    opened(submission).write_changed({2: (new, "banana"), 5: (new, "cherry")}, tmp_path / "changed")
    before, after = samples(submission), samples(tmp_path / "changed")
    assert [text_of(row.messages[-1]) for row in after] == [
        {2: "banana", 5: "cherry"}.get(row.row, text_of(row.messages[-1])) for row in before
    ]
    for old, changed in zip(before, after, strict=True):
        expected = decode_image(new if changed.row in (2, 5) else old.images[0])
        assert np.array_equal(np.asarray(decode_image(changed.images[0])), np.asarray(expected))
        assert re.findall(rb"IHDR|tEXt|eXIf|iCCP|PLTE|IEND", changed.images[0]) == [b"IHDR", b"IEND"]
        assert changed.images[0][24:29] == b"\x08\x02\x00\x00\x00"  # 8 bits, RGB
        assert changed.messages[0] == old.messages[0]
    names = [path.relative_to(tmp_path / "changed").as_posix() for path in sorted((tmp_path / "changed").rglob("*.png"))]
    expected_names = [] if detect(submission) == "parquet" else [f"images/{row:08d}-00.png" for row in range(ROWS)]
    assert names == expected_names


def test_a_changed_parquet_row_has_a_neutral_path(tmp_path: pathlib.Path) -> None:
    source = parquet(tmp_path / "submission", [cell(index) for index in range(3)])
    opened(source).write_changed({1: (picture(9), "b")}, tmp_path / "changed")
    (shard,) = (tmp_path / "changed").rglob("*.parquet")
    assert [row["image"]["path"] for row in pq.read_table(shard).to_pylist()] == [f"{row:08d}-00.png" for row in range(3)]


def test_a_changed_parquet_row_stays_without_a_path_where_no_row_has_one(tmp_path: pathlib.Path) -> None:
    source = tmp_path / "submission"
    source.mkdir()
    rows = [{"image": {"bytes": picture(index), "path": None}, "question": "q", "answer": "a"} for index in range(2)]
    pq.write_table(pa.Table.from_pylist(rows), source / "rows.parquet")
    assert pa.types.is_null(pq.read_schema(source / "rows.parquet").field("image").type.field("path").type)
    opened(source).write_changed({1: (picture(9), "b")}, tmp_path / "changed")
    assert [(row["image"]["path"], row["answer"]) for row in pq.read_table(tmp_path / "changed").to_pylist()] == [
        (None, "a"),
        (None, "b"),
    ]


def test_changing_refuses_what_it_cannot_do(tmp_path: pathlib.Path) -> None:
    bad = imagefolder(tmp_path / "bad", [qa(0), qa(1, answer="")])
    with pytest.raises(SubmissionError, match="line 2: empty answer; only rows that can be used"):
        opened(bad).write_changed({}, tmp_path / "a")
    text = parquet(tmp_path / "text", [cell(0), cell(1, image=None)])
    with pytest.raises(SubmissionError, match="row 1 has no picture to replace"):
        opened(text).write_changed({1: (picture(1), "a")}, tmp_path / "b")


LINE = json.dumps(qa(0)).encode()
LAST = json.dumps(qa(2)).encode()


@pytest.mark.parametrize(
    ("content", "kept"),
    [
        (LINE + b"\r\n" + LINE + b"\r\n" + LAST + b"\r\n", LINE + b"\r\n" + LAST + b"\r\n"),
        (b"\xef\xbb\xbf" + LINE + b"\n" + LINE + b"\n" + LAST + b"\n", b"\xef\xbb\xbf" + LINE + b"\n" + LAST + b"\n"),
        (b"\n" + LINE + b"\n \n\t\n" + LINE + b"\n" + LAST, LINE + b"\n" + LAST),
        (b"  " + LINE + b"  \n" + LINE + b"\n" + LAST + b"\n\n", b"  " + LINE + b"  \n" + LAST + b"\n"),
    ],
    ids=["CRLF", "byte order mark", "blank lines and no last break", "spaces"],
)
def test_lines_keep_their_bytes(content: bytes, kept: bytes, tmp_path: pathlib.Path) -> None:
    source = imagefolder(tmp_path / "submission", [content])
    assert len(samples(source)) == 3
    opened(source).write_subset([0, 2], tmp_path / "kept")
    assert (tmp_path / "kept/metadata.jsonl").read_bytes() == kept


def test_a_row_that_ended_the_file_gets_a_break_before_another(tmp_path: pathlib.Path) -> None:
    first, second = imagefolder(tmp_path / "a", [LINE]), imagefolder(tmp_path / "b", [LAST])
    opened(first).write_merged(opened(second), ["kept", "removed"], tmp_path / "merged")
    assert (tmp_path / "merged/metadata.jsonl").read_bytes() == LINE + b"\n" + LAST


def test_array_elements_keep_their_text(tmp_path: pathlib.Path) -> None:
    element = json.dumps(talk(1, id=1))[:-1] + ', "n": 1.00, "e": "\\u00e9\\/"}'
    source = llava(tmp_path / "submission", [talk(0), element.encode(), talk(2)], array=True)
    opened(source).write_subset([1], tmp_path / "kept")
    assert (tmp_path / "kept/data.json").read_text() == f"[\n{element}\n]\n"
    opened(source).write_subset([], tmp_path / "none")
    assert json.loads((tmp_path / "none/data.json").read_text()) == []


@pytest.mark.parametrize("value", [None, "1", 1, "../../x", "<b>&", ["a"], {"a": {}}], ids=repr)
def test_ids_mean_nothing(value: Any, tmp_path: pathlib.Path) -> None:
    source = imagefolder(tmp_path / "submission", [qa(0, id=value), qa(0, id=value)])
    first, second = samples(source)
    assert first.sample_id == second.sample_id
    assert (first.row, second.row) == (0, 1)


def parts(*content: Any) -> list[Any]:
    return [{"type": "image"} if part is None else {"type": "text", "text": part} for part in content]


PAIR = ["images/0.png", "images/1.png"]
PLACES: dict[str, tuple[dict[str, Any], list[list[Any]]]] = {
    "two pictures": (
        {"image": PAIR, "conversations": said(("human", "<image> and <image>\nsame?"), ("gpt", "no"))},
        [parts(None, "and", None, "same?")],
    ),
    "dots and slashes": ({"image": "./images//0.png"}, [parts(None, "What is 0?")]),
    "mark at the end": ({"conversations": said(("human", "What?\n<image>"), ("gpt", "a"))}, [parts("What?", None)]),
    "system": (
        {"conversations": said(("system", "Be kind."), ("human", "<image>"), ("gpt", "a"))},
        [parts("Be kind."), parts(None)],
    ),
    "two questions": (
        {"conversations": said(("human", "a <image>"), ("gpt", "b"), ("human", " c "), ("gpt", "d"))},
        [parts("a", None), parts("b"), parts(" c ")],
    ),
    "text only": ({"image": None, "conversations": said(("human", "Hi"), ("gpt", "a"))}, [parts("Hi")]),
}


@pytest.mark.parametrize("name", PLACES)
def test_places_of_pictures(name: str, tmp_path: pathlib.Path) -> None:
    changes, content = PLACES[name]
    (sample,) = samples(llava(tmp_path / "submission", [talk(0, **changes)]))
    assert len(sample.images) == {"two pictures": 2, "text only": 0}.get(name, 1)
    assert [message["content"] for message in sample.messages[:-1]] == content
    assert sample.messages[-1]["role"] == "assistant"


def test_parquet_rows_may_have_no_picture_or_several(tmp_path: pathlib.Path) -> None:
    pictures = [{"bytes": picture(index), "path": None} for index in range(3)]
    rows = [{"images": pictures[:count], "question": "what?", "answer": "a"} for count in range(3)] + [
        {"images": None, "question": "what?", "answer": "a"}
    ]
    schema = pa.schema([IMAGES, ("question", pa.large_string()), ("answer", pa.dictionary(pa.int8(), pa.string()))])
    found = samples(parquet(tmp_path / "submission", rows, schema))
    assert [len(row.images) for row in found] == [0, 1, 2, 0]
    assert [row.messages for row in found] == [question_answer("what?", "a", count) for count in (0, 1, 2, 0)]


def test_parquet_text_that_is_not_utf8_is_rejected(tmp_path: pathlib.Path) -> None:
    bad = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff\xfe"]).buffers())
    table = pa.Table.from_pylist([cell(0)], schema=HF_SCHEMA).set_column(2, "question", bad)
    (tmp_path / "submission").mkdir()
    pq.write_table(table, tmp_path / "submission/a.parquet")
    (row,) = opened(tmp_path / "submission").rows()
    assert isinstance(row, Rejection)
    assert row.reason == "not UTF-8: in a column of text"


def test_one_parquet_file_is_a_submission(tmp_path: pathlib.Path) -> None:
    parquet(tmp_path / "submission", [cell(0)])
    (path,) = (tmp_path / "submission").rglob("*.parquet")
    assert len(samples(path)) == 1
    assert detect(path) == "parquet"


def test_a_named_format_settles_what_is_ambiguous(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "submission"
    imagefolder(folder, [qa(0)])
    parquet(folder, [cell(0), cell(1)])
    (folder / "data.jsonl").write_text("".join(json.dumps(talk(index)) + "\n" for index in range(3)))
    counts = {
        name: open_submission(folder, IngestConfig.model_validate({"format": name})).count()
        for name in ("imagefolder", "llava", "parquet")
    }
    assert counts == {"imagefolder": 1, "llava": 3, "parquet": 2}


def test_a_kept_picture_that_vanished_is_an_error(tmp_path: pathlib.Path) -> None:
    source = imagefolder(tmp_path / "submission", [qa(0), qa(1)])
    (source / "images/1.png").unlink()
    with pytest.raises(SubmissionError, match=r"row 1 \(metadata\.jsonl line 2\): it can't be copied: missing picture"):
        opened(source).write_subset([0, 1], tmp_path / "kept", rejected=[0])
    opened(source).write_subset([0, 1], tmp_path / "removed", rejected=[1])
    assert len(raw_rows(tmp_path / "removed")) == 2


def test_a_merged_row_is_named_by_its_place(tmp_path: pathlib.Path) -> None:
    kept, removed = imagefolder(tmp_path / "kept", [qa(1), qa(2)]), imagefolder(tmp_path / "removed", [qa(0), qa(3)])
    picks: list[Pick] = ["removed", "kept", "kept", "removed"]
    (kept / "images/2.png").unlink()
    (removed / "images/3.png").unlink()
    with pytest.raises(SubmissionError, match=r"row 2 \(metadata\.jsonl line 2\): it can't be copied: missing picture"):
        opened(kept).write_merged(opened(removed), picks, tmp_path / "merged")
    (kept / "images/2.png").write_bytes(picture(2))
    with pytest.raises(SubmissionError, match=r"row 3 \(metadata\.jsonl line 2\): it can't be copied: missing picture"):
        opened(kept).write_merged(opened(removed), picks, tmp_path / "again")
    opened(kept).write_merged(opened(removed), [*picks[:3], "rejected"], tmp_path / "whole")
    assert len(raw_rows(tmp_path / "whole")) == 4


def test_a_row_cannot_overwrite_the_rows(tmp_path: pathlib.Path) -> None:
    source = imagefolder(tmp_path / "submission", [qa(0, file_name="metadata.jsonl"), qa(1)])
    opened(source).write_subset([0], tmp_path / "removed", rejected=[0])
    assert raw_rows(tmp_path / "removed") == raw_rows(source)[:1]


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_quotes_in_csv_are_read_as_csv_reads_them(tmp_path: pathlib.Path, bom: bytes) -> None:
    """A quote opens a value only where it begins, so that of 27" takes no other row along; a quoted value may hold line breaks."""
    rows = [
        b'images/0.png,Is this a 27" monitor?,yes',
        b"images/1.png,what?,a",
        b'images/2.png,"two\nlines, and ""quotes"" and a 27"" screen",b',
        b'images/3.png,"""quoted""",5" by 7"',
        b'images/0.png,"ends ""so""","""\n"""',
        b"images/1.png,last?,c",
    ]
    write_pictures(tmp_path, 4)
    text = bom + b"\r\n".join([b'"file_name",question,answer', *rows]) + b"\n"
    (tmp_path / "metadata.csv").write_bytes(text)
    expected = list(csv.reader(io.StringIO(text.removeprefix(bom).decode(), newline="")))[1:]
    found = list(open_submission(tmp_path, IngestConfig()).rows())
    assert len(found) == len(rows) == len(expected)
    for sample, (_, question, answer) in zip(found, expected, strict=True):
        assert not isinstance(sample, Rejection)
        (example,) = examples_of(sample)
        assert (example.question, example.answer) == (question.strip(), answer.strip())
