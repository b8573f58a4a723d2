"""Bad rows, pictures and paths: each gives a rejection of its own kind, and the rows around it stay usable and writable."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pathlib
import socket
import struct
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image

from pipeline.config import IngestConfig
from pipeline.records import Rejection, Sample
from storage.formats import Reason, open_submission
from tests.storage.submissions import DROP, HF_SCHEMA, STRUCT, cell, imagefolder, llava, parquet, picture, qa, said, talk

Prepare = Callable[[pathlib.Path], object]


def png(width: int, height: int) -> bytes:
    """A PNG whose header promises a size and whose pixels are missing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")


def text_bomb() -> bytes:
    """A PNG with a comment that decompresses to 80 MB."""
    data = b"Comment\0\0" + zlib.compress(b"A" * 80_000_000, 9)
    chunk = struct.pack(">I", len(data)) + b"zTXt" + data + struct.pack(">I", zlib.crc32(b"zTXt" + data))
    whole = picture(1)
    return whole[:33] + chunk + whole[33:]


def other_format(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, format=kind)
    return buffer.getvalue()


def put(name: str, data: bytes) -> Prepare:
    return lambda folder: (folder / name).write_bytes(data)


PICTURES: dict[str, tuple[bytes, Reason, str]] = {
    "empty": (b"", Reason.PICTURE_REFUSED, "empty"),
    "one byte": (b"\x89", Reason.PICTURE_REFUSED, "not a PNG"),
    "zeros": (bytes(1000), Reason.PICTURE_REFUSED, "not a PNG"),
    "html": (b"<!DOCTYPE html><html><script>alert(1)</script></html>", Reason.PICTURE_REFUSED, "not a PNG"),
    "svg": (
        b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        Reason.PICTURE_REFUSED,
        "not a PNG",
    ),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", Reason.PICTURE_REFUSED, "not a PNG"),
    "pdf": (b"%PDF-1.7\n", Reason.PICTURE_REFUSED, "not a PNG"),
    "tiff": (other_format("TIFF"), Reason.PICTURE_REFUSED, "not a PNG"),
    "gif": (other_format("GIF"), Reason.PICTURE_REFUSED, "not a PNG"),
    "bmp": (other_format("BMP"), Reason.PICTURE_REFUSED, "not a PNG"),
    "ppm": (other_format("PPM"), Reason.PICTURE_REFUSED, "not a PNG"),
    "zip": (b"PK\x03\x04" + bytes(30), Reason.PICTURE_REFUSED, "not a PNG"),
    "png, truncated": (picture(1, (64, 64))[:2000], Reason.PICTURE_REFUSED, "damaged"),
    "png, header only": (picture(1)[:33], Reason.PICTURE_REFUSED, "not a PNG"),
    "png, signature only": (picture(1)[:8], Reason.PICTURE_REFUSED, ""),
    "png, header changed": (picture(1)[:20] + b"\xff" + picture(1)[21:], Reason.PICTURE_REFUSED, ""),
    "png, pixels missing": (png(64, 64), Reason.PICTURE_REFUSED, "damaged"),
    "png, no width": (png(0, 8), Reason.PICTURE_REFUSED, ""),
    "png, text bomb": (text_bomb(), Reason.PICTURE_REFUSED, ""),
    "jpeg, truncated": (picture(1, (64, 64), kind="JPEG")[:900], Reason.PICTURE_REFUSED, "damaged"),
    "jpeg, start only": (b"\xff\xd8\xff\xe0\x00\x10JFIF\x00", Reason.PICTURE_REFUSED, ""),
    "webp, truncated": (picture(1, (64, 64), kind="WEBP")[:300], Reason.PICTURE_REFUSED, ""),
    "bomb of 169 megapixels": (png(13_000, 13_000), Reason.PICTURE_TOO_LARGE, "13000 x 13000 pixels; the limit is 25000000"),
    "bomb of 4 gigapixels": (png(65_535, 65_535), Reason.PICTURE_TOO_LARGE, "the limit is 25000000"),
    "one pixel too many": (png(5001, 5000), Reason.PICTURE_TOO_LARGE, "5001 x 5000"),
    "one pixel wide": (png(1, 65_535), Reason.PICTURE_TOO_LARGE, "1 x 65535"),
    "one pixel high": (png(65_535, 1), Reason.PICTURE_TOO_LARGE, "65535 x 1"),
    "too many bytes": (picture(1) + bytes(10_000_000), Reason.PICTURE_TOO_LARGE, "the limit is 10000000"),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One bad row between two good ones."""

    name: str
    row: Any
    reason: Reason
    says: str = ""
    kind: str = "imagefolder"
    prepare: Prepare | None = None
    schema: pa.Schema = HF_SCHEMA
    limits: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def bind_socket(folder: pathlib.Path) -> None:
    """A socket named `s.png`; bound by a short relative name, for long ones are refused."""
    here = pathlib.Path.cwd()
    os.chdir(folder)
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("s.png")
    finally:
        os.chdir(here)


def named(name: Any, reason: Reason, says: str = "", prepare: Prepare | None = None) -> list[Case]:
    """The same picture name in both text formats."""
    label = f"name {name!a:.40}"
    return [
        Case(label, qa(1, file_name=name), reason, says, "imagefolder", prepare),
        Case(label, talk(1, image=name), reason, says, "llava", prepare),
    ]


def outside(folder: pathlib.Path) -> pathlib.Path:
    (folder.parent / "outside").mkdir(exist_ok=True)
    (folder.parent / "outside" / "a.png").write_bytes(picture(9))
    return folder.parent / "outside"


PATHS = [
    *named("../outside/a.png", Reason.UNSAFE_PATH, "leaves the folder", outside),
    *named("images/../../outside/a.png", Reason.UNSAFE_PATH, "leaves the folder", outside),
    *named("images/../images/0.png", Reason.UNSAFE_PATH, "leaves the folder"),
    *named("..", Reason.UNSAFE_PATH, "leaves the folder"),
    *named("/etc/passwd", Reason.UNSAFE_PATH, "absolute"),
    *named("//server/share/a.png", Reason.UNSAFE_PATH, "absolute"),
    *named("C:\\a.png", Reason.UNSAFE_PATH, "drive letter"),
    *named("C:a.png", Reason.UNSAFE_PATH, "drive letter"),
    *named("images\\0.png", Reason.UNSAFE_PATH, "backslash"),
    *named("images/0.png\0.txt", Reason.UNSAFE_PATH, "control character"),
    *named("images/\n0.png", Reason.UNSAFE_PATH, "control character"),
    *named("images/" + "a" * 300 + ".png", Reason.UNSAFE_PATH, "304 bytes; the limit is 255"),
    *named("a/" * 50 + "0.png", Reason.UNSAFE_PATH, "51 folders deep; the limit is 32"),
    *named("", Reason.UNSAFE_PATH, "names no file"),
    *named("./.", Reason.UNSAFE_PATH, "names no file"),
    *named("images/", Reason.UNSAFE_PATH, "names no file"),
    *named("images", Reason.NOT_A_FILE, "a folder"),
    *named("images/none.png", Reason.MISSING_PICTURE, "'images/none.png' is not in the folder"),
    *named("IMAGES/0.PNG", Reason.MISSING_PICTURE, "not in the folder"),
    *named("~/0.png", Reason.MISSING_PICTURE, "not in the folder"),
    *named("images/0.png/1.png", Reason.UNSAFE_PATH, "through a file"),
    *named("\ud800.png", Reason.LONE_SURROGATE, "picture's name"),
    *named("http://127.0.0.1:1/a.png", Reason.URL, "not fetched"),
    *named("HTTPS://example.org/a.png", Reason.URL, "not fetched"),
    *named("file:///etc/passwd", Reason.URL, "not fetched"),
    *named("ftp://example.org/a.png", Reason.URL, "not fetched"),
    *named("data:image/png;base64,iVBORw0KGgo=", Reason.URL, "not fetched"),
    *named("javascript:alert(1)", Reason.URL, "not fetched"),
    *named("link.png", Reason.UNSAFE_PATH, "a link", lambda folder: (folder / "link.png").symlink_to(outside(folder) / "a.png")),
    *named("inner.png", Reason.UNSAFE_PATH, "a link", lambda folder: (folder / "inner.png").symlink_to("images/0.png")),
    *named("far/a.png", Reason.UNSAFE_PATH, "a link", lambda folder: (folder / "far").symlink_to(outside(folder))),
    *named("loop.png", Reason.UNSAFE_PATH, "a link", lambda folder: (folder / "loop.png").symlink_to("loop.png")),
    *named("pipe.png", Reason.NOT_A_FILE, "a pipe", lambda folder: os.mkfifo(folder / "pipe.png")),
    *named("s.png", Reason.NOT_A_FILE, "a socket", bind_socket),
]

LINES = [
    Case("cut short", b'{"file_name": "images/1.png", "quest\n', Reason.NOT_JSON, "at character"),
    Case("plain text", b"hello\n", Reason.NOT_JSON),
    Case("single quotes", b"{'file_name': 'images/1.png'}\n", Reason.NOT_JSON),
    Case("two objects", b"{} {}\n", Reason.NOT_JSON, "Extra data"),
    Case("trailing comma", b'{"a": 1,}\n', Reason.NOT_JSON),
    Case("list", b"[1]\n", Reason.WRONG_TYPE, "not list"),
    Case("text", b'"a"\n', Reason.WRONG_TYPE, "not str"),
    Case("null", b"null\n", Reason.WRONG_TYPE, "not NoneType"),
    Case("NaN", json.dumps(qa(1, extra=float("nan"))).encode() + b"\n", Reason.NOT_JSON, "NaN"),
    Case("infinity", json.dumps(qa(1, extra=float("-inf"))).encode() + b"\n", Reason.NOT_JSON, "-Infinity"),
    Case("doubled key", b'{"file_name": "images/1.png", "answer": "a", "answer": "b"}\n', Reason.DUPLICATE_KEY, "'answer'"),
    Case("doubled inner key", b'{"file_name": "images/1.png", "extra": {"a": 1, "a": 2}}\n', Reason.DUPLICATE_KEY, "'a'"),
    Case("nested 100,000 deep", b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"\n", Reason.NOT_JSON, "nested too deep"),
    Case("lists 100,000 deep", b"[" * 100_000 + b"]" * 100_000 + b"\n", Reason.NOT_JSON, "nested too deep"),
    Case("number of 9,999 digits", b'{"a": ' + b"1" * 9999 + b"}\n", Reason.NOT_JSON, "digits"),
    Case("Latin-1", '{"file_name": "caf\xe9"}\n'.encode("latin-1"), Reason.NOT_UTF8, "byte 18"),
    Case("UTF-16 line", json.dumps(qa(1)).encode("utf-16-le") + b"\n", Reason.NOT_JSON),
    Case("byte order mark inside", b"\xef\xbb\xbf" + json.dumps(qa(1)).encode() + b"\n", Reason.NOT_JSON),
    Case("5 MB", json.dumps(qa(1, extra="a" * 5_000_000)).encode() + b"\n", Reason.ROW_TOO_LONG, "the limit is 4000000"),
    Case("text above the limit", qa(1, answer="a" * 200), Reason.TEXT_TOO_LONG, "the limit is 100", limits={"max_text": 100}),
    Case("surrogate in question", qa(1, question="a \ud800"), Reason.LONE_SURROGATE),
    Case("surrogate in answer", qa(1, answer="\udfff"), Reason.LONE_SURROGATE),
    Case("no file_name", qa(1, file_name=DROP), Reason.MISSING_FIELD, "file_name"),
    Case("file_name null", qa(1, file_name=None), Reason.MISSING_FIELD, "file_name"),
    Case("file_name a list", qa(1, file_name=["images/1.png"]), Reason.WRONG_TYPE, "not list"),
    Case("file_name a struct", qa(1, file_name={"path": "images/1.png"}), Reason.WRONG_TYPE, "not dict"),
    Case("file_name a number", qa(1, file_name=1), Reason.WRONG_TYPE, "not int"),
    Case("no question", qa(1, question=DROP), Reason.MISSING_FIELD, "question"),
    Case("question null", qa(1, question=None), Reason.MISSING_FIELD, "question"),
    Case("question a number", qa(1, question=7), Reason.WRONG_TYPE, "question must be text"),
    Case("question blank", qa(1, question=" \n"), Reason.EMPTY_QUESTION),
    Case("question only a mark", qa(1, question="<image>"), Reason.EMPTY_QUESTION),
    Case("no answer", qa(1, answer=DROP), Reason.MISSING_FIELD, "answer"),
    Case("answer a list", qa(1, answer=["yes"]), Reason.WRONG_TYPE, "answer must be text"),
    Case("answer empty", qa(1, answer=""), Reason.EMPTY_ANSWER),
    Case("answer blank", qa(1, answer="\t "), Reason.EMPTY_ANSWER),
    Case("mark in the answer", qa(1, answer="a <image>"), Reason.IMAGE_PLACES, "assistant"),
    Case("two marks", qa(1, question="<image> <image> same?"), Reason.IMAGE_PLACES, "2 places for 1"),
]


def turns(*spoken: tuple[Any, Any]) -> dict[str, Any]:
    return talk(1, conversations=said(*spoken))


TURNS = [
    Case("no conversations", talk(1, conversations=DROP), Reason.MISSING_FIELD, "conversations", "llava"),
    Case("conversations null", talk(1, conversations=None), Reason.MISSING_FIELD, "conversations", "llava"),
    Case("conversations a struct", talk(1, conversations={}), Reason.WRONG_TYPE, "not dict", "llava"),
    Case("conversations a text", talk(1, conversations="hi"), Reason.WRONG_TYPE, "not str", "llava"),
    Case("no turns", turns(), Reason.TURN_ORDER, "", "llava"),
    Case("a turn is a text", talk(1, conversations=["hi"]), Reason.WRONG_TYPE, "a turn must be an object", "llava"),
    Case("turn without role", talk(1, conversations=[{"value": "a"}]), Reason.MISSING_FIELD, "from", "llava"),
    Case("turn without text", talk(1, conversations=[{"from": "human"}]), Reason.MISSING_FIELD, "value", "llava"),
    Case("turn of a number", turns(("human", 3), ("gpt", "a")), Reason.WRONG_TYPE, "value must be text", "llava"),
    Case("unknown role", turns(("Human", "<image>"), ("gpt", "a")), Reason.UNKNOWN_ROLE, "'Human'", "llava"),
    Case("role of another format", turns(("user", "<image>"), ("assistant", "a")), Reason.UNKNOWN_ROLE, "'user'", "llava"),
    Case("role a number", turns((1, "a")), Reason.WRONG_TYPE, "from must be text", "llava"),
    Case("answer first", turns(("gpt", "a"), ("human", "<image>")), Reason.TURN_ORDER, "", "llava"),
    Case("no answer at the end", turns(("human", "<image>"), ("gpt", "a"), ("human", "b")), Reason.TURN_ORDER, "", "llava"),
    Case("two questions", turns(("human", "<image>"), ("human", "a"), ("gpt", "b")), Reason.TURN_ORDER, "", "llava"),
    Case("system only", turns(("system", "a")), Reason.TURN_ORDER, "", "llava"),
    Case("system late", turns(("human", "<image>"), ("system", "a"), ("gpt", "b")), Reason.TURN_ORDER, "", "llava"),
    Case("empty answer", turns(("human", "<image>"), ("gpt", " ")), Reason.EMPTY_ANSWER, "", "llava"),
    Case(
        "second answer empty",
        turns(("human", "<image>"), ("gpt", "a"), ("human", "b"), ("gpt", "")),
        Reason.EMPTY_ANSWER,
        "",
        "llava",
    ),
    Case("empty question", turns(("human", ""), ("gpt", "a")), Reason.EMPTY_QUESTION, "", "llava"),
    Case("mark in an answer", turns(("human", "<image>"), ("gpt", "<image>")), Reason.IMAGE_PLACES, "assistant", "llava"),
    Case("mark for the system", turns(("system", "<image>"), ("human", "a"), ("gpt", "b")), Reason.IMAGE_PLACES, "system", "llava"),
    Case("picture without a mark", turns(("human", "a"), ("gpt", "b")), Reason.IMAGE_PLACES, "0 places for 1", "llava"),
    Case(
        "two marks, one picture", turns(("human", "<image><image>"), ("gpt", "b")), Reason.IMAGE_PLACES, "2 places for 1", "llava"
    ),
    Case("mark without picture", talk(1, image=DROP), Reason.IMAGE_PLACES, "1 places for 0", "llava"),
    Case("image null", talk(1, image=None), Reason.IMAGE_PLACES, "1 places for 0", "llava"),
    Case("no pictures in the list", talk(1, image=[]), Reason.IMAGE_PLACES, "1 places for 0", "llava"),
    Case("two pictures, one mark", talk(1, image=["images/1.png", "images/2.png"]), Reason.IMAGE_PLACES, "1 places for 2", "llava"),
    Case("image a number", talk(1, image=1), Reason.WRONG_TYPE, "image is a name", "llava"),
    Case("image a struct", talk(1, image={"path": "images/1.png"}), Reason.WRONG_TYPE, "image is a name", "llava"),
    Case("list with null", talk(1, image=["images/1.png", None]), Reason.WRONG_TYPE, "image is a name", "llava"),
    Case("list with a missing one", talk(1, image=["images/1.png", "x.png"]), Reason.MISSING_PICTURE, "'x.png'", "llava"),
    Case("65 pictures", talk(1, image=["images/1.png"] * 65), Reason.TOO_MANY_PICTURES, "65; the limit is 64", "llava"),
    Case("element null", b"null", Reason.WRONG_TYPE, "NoneType", "llava array"),
    Case("element a list", b"[[]]", Reason.WRONG_TYPE, "list", "llava array"),
    Case("element with NaN", b'{"a": NaN}', Reason.NOT_JSON, "NaN", "llava array"),
    Case("element with doubled key", b'{"a": 1, "a": 1}', Reason.DUPLICATE_KEY, "'a'", "llava array"),
    Case("element without turns", b'{"id": 1}', Reason.MISSING_FIELD, "conversations", "llava array"),
]

CSV = [
    Case("too few values", b"images/1.png,what?\n", Reason.NOT_CSV, "2 values for 3", "csv"),
    Case("too many values", b"images/1.png,what?,a,b\n", Reason.NOT_CSV, "4 values for 3", "csv"),
    Case("text after a quote", b'images/1.png,"what"?,a\n', Reason.NOT_CSV, "", "csv"),
    Case("not UTF-8", b"images/1.png,what\xff?,a\n", Reason.NOT_UTF8, "", "csv"),
    Case("empty answer", b"images/1.png,what?,\n", Reason.EMPTY_ANSWER, "", "csv"),
    Case("unsafe path", b"../1.png,what?,a\n", Reason.UNSAFE_PATH, "", "csv"),
]

IMAGES_SCHEMA = pa.schema([("images", pa.list_(STRUCT)), ("question", pa.string()), ("answer", pa.string())])
PART = pa.struct([("type", pa.string()), ("text", pa.string())])
MESSAGES_SCHEMA = pa.schema(
    [("images", pa.list_(pa.binary())), ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.list_(PART))])))]
)
TALK_SCHEMA = pa.schema(
    [("image", pa.binary()), ("conversations", pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())])))]
)


def many(count: int, **changes: Any) -> dict[str, Any]:
    return {"images": [{"bytes": picture(1), "path": None}] * count, "question": "what?", "answer": "a", **changes}


def chat(*said: tuple[str | None, list[dict[str, Any]] | None]) -> dict[str, Any]:
    return {"images": [picture(1)], "messages": [{"role": role, "content": content} for role, content in said]}


def spoken(*turns: tuple[str, str | None]) -> dict[str, Any]:
    return {"image": picture(1), "conversations": said(*turns)}


ASK = ("user", [{"type": "image"}, {"type": "text", "text": "what?"}])
SAY = ("assistant", [{"type": "text", "text": "a"}])

CELLS = [
    Case("bytes null, a path", cell(1, image={"bytes": None, "path": "images/1.png"}), Reason.MISSING_PICTURE, "bytes are null"),
    Case(
        "bytes null, an absolute path",
        cell(1, image={"bytes": None, "path": "/etc/passwd"}),
        Reason.MISSING_PICTURE,
        "not followed",
    ),
    Case(
        "bytes null, a URL",
        cell(1, image={"bytes": None, "path": "http://127.0.0.1:1/a.png"}),
        Reason.MISSING_PICTURE,
        "not followed",
    ),
    Case("struct of nulls", cell(1, image={"bytes": None, "path": None}), Reason.MISSING_PICTURE, "bytes are null"),
    Case("null in the list", many(1, images=[None]), Reason.MISSING_PICTURE, "bytes are null", schema=IMAGES_SCHEMA),
    Case("65 pictures", many(65), Reason.TOO_MANY_PICTURES, "65; the limit is 64", schema=IMAGES_SCHEMA),
    Case("two pictures, one mark", many(2, question="<image> what?"), Reason.IMAGE_PLACES, "1 places for 2", schema=IMAGES_SCHEMA),
    Case("question null", cell(1, question=None), Reason.MISSING_FIELD, "question"),
    Case("question blank", cell(1, question=" "), Reason.EMPTY_QUESTION),
    Case("answer null", cell(1, answer=None), Reason.MISSING_FIELD, "answer"),
    Case("answer blank", cell(1, answer="\n"), Reason.EMPTY_ANSWER),
    Case("mark in the answer", cell(1, answer="<image>"), Reason.IMAGE_PLACES, "assistant"),
    Case("mark, but no picture", cell(1, image=None, question="<image> what?"), Reason.IMAGE_PLACES, "1 places for 0"),
    Case("text above the limit", cell(1, answer="a" * 200), Reason.TEXT_TOO_LONG, limits={"max_text": 100}),
    Case("messages null", {"images": [picture(1)], "messages": None}, Reason.MISSING_FIELD, "messages", schema=MESSAGES_SCHEMA),
    Case("messages empty", chat(), Reason.TURN_ORDER, schema=MESSAGES_SCHEMA),
    Case("unknown role", chat(ASK, ("tool", [])), Reason.UNKNOWN_ROLE, "'tool'", schema=MESSAGES_SCHEMA),
    Case("no role", chat((None, [])), Reason.MISSING_FIELD, "role", schema=MESSAGES_SCHEMA),
    Case("no content", chat(("user", None), SAY), Reason.MISSING_FIELD, "content", schema=MESSAGES_SCHEMA),
    Case("part of a URL", chat(("user", [{"type": "image_url"}]), SAY), Reason.URL, "not fetched", schema=MESSAGES_SCHEMA),
    Case("unknown part", chat(("user", [{"type": "audio"}]), SAY), Reason.WRONG_TYPE, "a part of a turn", schema=MESSAGES_SCHEMA),
    Case("part without text", chat(("user", [{"type": "text"}]), SAY), Reason.MISSING_FIELD, "text", schema=MESSAGES_SCHEMA),
    Case("typed mark", chat(("user", [{"type": "text", "text": "<image>"}]), SAY), Reason.IMAGE_PLACES, schema=MESSAGES_SCHEMA),
    Case("picture in an answer", chat(ASK, ("assistant", ASK[1])), Reason.IMAGE_PLACES, "assistant", schema=MESSAGES_SCHEMA),
    Case("two places", chat(("user", [*ASK[1], {"type": "image"}]), SAY), Reason.IMAGE_PLACES, "2 places", schema=MESSAGES_SCHEMA),
    Case("empty part of an answer", chat(ASK, ("assistant", [])), Reason.EMPTY_ANSWER, schema=MESSAGES_SCHEMA),
    Case("no mark", spoken(("human", "what?"), ("gpt", "a")), Reason.IMAGE_PLACES, "0 places for 1", schema=TALK_SCHEMA),
    Case("value null", spoken(("human", "<image>"), ("gpt", None)), Reason.MISSING_FIELD, "value", schema=TALK_SCHEMA),
    Case(
        "role of another format", spoken(("user", "<image>"), ("assistant", "a")), Reason.UNKNOWN_ROLE, "'user'", schema=TALK_SCHEMA
    ),
]

CASES = [
    *LINES,
    *TURNS,
    *PATHS,
    *CSV,
    *(dataclasses.replace(case, kind="parquet") for case in CELLS),
    *(
        Case(f"picture, {name}", qa(1, file_name="bad.jpg"), reason, says, "imagefolder", put("bad.jpg", data))
        for name, (data, reason, says) in PICTURES.items()
    ),
    *(
        Case(f"picture, {name}", cell(1, image={"bytes": data, "path": "bad.jpg"}), reason, says, "parquet")
        for name, (data, reason, says) in PICTURES.items()
    ),
]

GOOD = {
    "messages": chat(ASK, SAY),
    "conversations": spoken(("human", "<image> what?"), ("gpt", "a")),
    "images": many(1),
    "question": cell(0),
}


def build(folder: pathlib.Path, case: Case) -> pathlib.Path:
    """A good row, the bad one, and a good row."""
    if case.kind == "imagefolder":
        imagefolder(folder, [qa(0), case.row, qa(2)])
    elif case.kind == "csv":
        imagefolder(folder, [])
        (folder / "metadata.jsonl").unlink()
        head = b"file_name,question,answer\nimages/0.png,what?,a\n"
        (folder / "metadata.csv").write_bytes(head + case.row + b"images/2.png,what?,a\n")
    elif case.kind == "parquet":
        good = next(row for name, row in GOOD.items() if name in case.schema.names)
        parquet(folder, [good, case.row, good], case.schema)
    else:
        llava(folder, [talk(0), case.row, talk(2)], array=case.kind == "llava array")
    if case.prepare is not None:
        case.prepare(folder)
    return folder


def test_there_are_more_than_a_hundred_cases() -> None:
    assert len({(case.kind, case.name) for case in CASES}) == len(CASES) > 200


@pytest.mark.parametrize("case", CASES, ids=[f"{case.kind}: {case.name}" for case in CASES])
def test_bad_row(case: Case, tmp_path: pathlib.Path) -> None:
    source = open_submission(build(tmp_path / "submission", case), IngestConfig(**case.limits))
    before, bad, after = source.rows()
    assert isinstance(bad, Rejection)
    assert bad.reason.split(":")[0] == case.reason
    assert case.says in bad.reason
    assert str(tmp_path) not in bad.reason + bad.where
    assert bad.row == 1
    assert any(bad.where.endswith(f" {number}") for number in (1, 2, 3))
    assert isinstance(before, Sample)
    assert isinstance(after, Sample)
    assert (before.row, after.row) == (0, 2)
    source.write_subset([0, 2], tmp_path / "kept")
    kept = list(open_submission(tmp_path / "kept", IngestConfig(format=source.format)).rows())
    assert [row.sample_id for row in kept if isinstance(row, Sample)] == [before.sample_id, after.sample_id]
    source.write_subset([1], tmp_path / "removed", rejected=[1])
    (removed,) = open_submission(tmp_path / "removed", IngestConfig(format=source.format, **case.limits)).rows()
    assert isinstance(removed, Rejection)
    assert not (tmp_path / "removed" / "outside").exists()
    assert not list((tmp_path / "removed").rglob("a.png"))
