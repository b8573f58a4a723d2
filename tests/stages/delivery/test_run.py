"""The delivery: complete, in order, checked, without a path of the machine, and never over something else."""

from __future__ import annotations

import json
import os
import pathlib
import re
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import IngestConfig
from pipeline.errors import ByeSightError, ConfigError, IntegrityError, ModelError, StageError, SubmissionError
from stages.delivery.run import run
from stages.ingest.run import digest_submission
from storage.delivery import is_delivery, restore, verify_delivery
from tests.storage.submissions import cell, imagefolder, llava, parquet, qa, talk

VERDICTS = ["keep", "quarantine", "rejected", "not_scored", "keep", "quarantine"]
KEPT, REMOVED = [0, 3, 4], [1, 2, 5]
AS_READ = {"configuration": {"ingest": IngestConfig().model_dump()}}
BUILDS: dict[str, Callable[[pathlib.Path], pathlib.Path]] = {
    "imagefolder": lambda folder: imagefolder(folder, [qa(0), qa(1), qa(2, answer=""), qa(3), qa(4), qa(5)], 6),
    "llava": lambda folder: llava(folder, [talk(0), talk(1), talk(2, image="../x"), talk(3), talk(4), talk(5)], 6, array=True),
    "parquet": lambda folder: parquet(folder, [cell(0), cell(1), cell(2, answer=""), cell(3), cell(4), cell(5)], files=2),
}


def verdict_table(verdicts: list[str], path: pathlib.Path, order: list[int] | None = None) -> pathlib.Path:
    rows = [
        {
            "row": row,
            "sample_id": f"{row:032x}",
            "verdict": verdict,
            "reason": "" if verdict == "keep" else f"reason {row}",
            "score": row / 7,
        }
        for row, verdict in enumerate(verdicts)
    ]
    pq.write_table(pa.Table.from_pylist([rows[index] for index in order or range(len(rows))]), path)
    return path


def adapter_folder(folder: pathlib.Path) -> pathlib.Path:
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    (folder / "guard.safetensors").write_bytes(b"guard")
    (folder / "guard.json").write_text(json.dumps({"made_from": str(folder / "rows")}))
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/models/of/mine/llava-7b", "r": 16}))
    (folder / "README.md").write_text("base_model: /models/of/mine/llava-7b\n")
    return folder


@pytest.fixture
def parts(tmp_path: pathlib.Path) -> dict[str, Any]:
    """Everything a delivery is made of, from an imagefolder."""
    return all_parts(tmp_path, "imagefolder")


def all_parts(tmp_path: pathlib.Path, name: str) -> dict[str, Any]:
    submission = BUILDS[name](tmp_path / "submission")
    (tmp_path / "report.html").write_text(f"<p>{submission} &amp; {tmp_path}/work</p>")
    return {
        "submission": submission,
        "config": IngestConfig(),
        "verdicts": verdict_table(VERDICTS, tmp_path / "verdicts.parquet", [3, 1, 0, 5, 4, 2]),
        "adapter": adapter_folder(tmp_path / "adapter"),
        "report_html": tmp_path / "report.html",
        "report_json": json.dumps({"rows": {"submitted": 6}, "from": str(submission)}),
        "facts": {"seed": 0, "base": {"identity": "abc", "folder": "/models/of/mine/llava-7b"}, "at": str(tmp_path / "store/x")}
        | AS_READ,
        "out": tmp_path / "delivery",
    }


def lines(folder: pathlib.Path) -> list[Any]:
    shards = sorted(folder.rglob("*.parquet"))
    if shards:
        return [row for shard in shards for row in pq.read_table(shard).to_pylist()]
    (path,) = folder.glob("*.json*")
    return list(json.loads(path.read_bytes())) if path.suffix == ".json" else path.read_bytes().splitlines(keepends=True)


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", BUILDS)
def test_a_whole_delivery(name: str, tmp_path: pathlib.Path) -> None:
    parts = all_parts(tmp_path, name)
    summary = run(**parts, digest=digest_submission(parts["submission"]))
    out, before = parts["out"], lines(parts["submission"])
    assert {key: summary[key] for key in ("keep", "quarantine", "not_scored", "rejected")} == {
        "keep": 2,
        "quarantine": 2,
        "not_scored": 1,
        "rejected": 1,
    }
    assert lines(out / "dataset") == [before[row] for row in KEPT]
    assert lines(out / "quarantine/rows") == [before[row] for row in REMOVED]
    reasons = [json.loads(line) for line in (out / "quarantine/reasons.jsonl").read_text().splitlines()]
    assert reasons == [{"row": row, "verdict": VERDICTS[row], "reason": f"reason {row}"} for row in REMOVED]
    table = pq.read_table(out / "quarantine/verdicts.parquet").to_pylist()
    assert [(row["row"], row["verdict"]) for row in table] == list(enumerate(VERDICTS))
    manifest = verify_delivery(out)
    assert manifest["submission"]["format"] == name
    assert manifest["rows"] == {"keep": 2, "quarantine": 2, "not_scored": 1, "rejected": 1}
    assert len(manifest["files"]) == summary["files"] == len(contents(out)) - 1
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


@pytest.mark.parametrize("name", BUILDS)
def test_the_same_inputs_give_the_same_bytes(name: str, tmp_path: pathlib.Path) -> None:
    parts = all_parts(tmp_path, name)
    run(**parts)
    first = contents(parts["out"])
    run(**parts)
    assert contents(parts["out"]) == first


def test_no_path_of_the_machine_is_in_a_text(parts: dict[str, Any], tmp_path: pathlib.Path) -> None:
    run(**parts)
    for name, data in contents(parts["out"]).items():
        if not name.endswith((".parquet", ".png", ".safetensors")):
            assert not re.search(rb"/models/of|/tmp/|" + re.escape(str(tmp_path).encode()), data), name
    assert (parts["out"] / "report.html").read_text() == "<p>submission &amp; work</p>"
    assert json.loads((parts["out"] / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == "llava-7b"
    assert json.loads((parts["out"] / "manifest.json").read_text())["facts"]["at"] == "store/x"


def test_a_picture_whose_name_holds_a_path_of_the_machine_keeps_it(parts: dict[str, Any], tmp_path: pathlib.Path) -> None:
    name = f"images/C++{tmp_path}/0.png"
    (tmp_path / "submission" / name).parent.mkdir(parents=True)
    (tmp_path / "submission/images/0.png").rename(tmp_path / "submission" / name)
    metadata = tmp_path / "submission/metadata.jsonl"
    metadata.write_text(metadata.read_text().replace("images/0.png", name))
    run(**parts)
    assert f"dataset/{name}" in verify_delivery(parts["out"])["files"]


def test_nothing_removed_leaves_no_quarantined_rows(parts: dict[str, Any], tmp_path: pathlib.Path) -> None:
    run(
        **{
            **parts,
            "submission": imagefolder(tmp_path / "clean", [qa(0), qa(1)]),
            "verdicts": verdict_table(["keep"] * 2, tmp_path / "v.parquet"),
        }
    )
    assert [path.name for path in (parts["out"] / "quarantine").iterdir()] == ["verdicts.parquet"]
    assert restore(parts["out"], tmp_path / "restored") == 0
    assert contents(tmp_path / "restored") == contents(parts["out"] / "dataset")


def test_a_quarantined_row_is_delivered_whole(parts: dict[str, Any]) -> None:
    """A rejected one may lack its pictures; that is why it was rejected."""
    (parts["submission"] / "images/2.png").unlink()
    assert run(**parts)["rejected"] == 1
    (parts["submission"] / "images/1.png").unlink()
    with pytest.raises(SubmissionError, match=r"row 1 \(metadata\.jsonl line 2\): it can't be copied: missing picture"):
        run(**parts)
    assert verify_delivery(parts["out"])


@pytest.mark.parametrize("name", BUILDS)
def test_removed_rows_can_be_restored(name: str, tmp_path: pathlib.Path) -> None:
    parts = all_parts(tmp_path, name)
    run(**parts)
    before = lines(parts["submission"])
    assert restore(parts["out"], tmp_path / "all") == 3
    assert lines(tmp_path / "all") == before
    assert restore(parts["out"], tmp_path / "one", [5]) == 1
    assert lines(tmp_path / "one") == [before[row] for row in (0, 3, 4, 5)]
    verify_delivery(parts["out"])


@pytest.mark.parametrize("row", [0, 3, 6, -1])
def test_only_removed_rows_can_be_restored(row: int, parts: dict[str, Any], tmp_path: pathlib.Path) -> None:
    run(**parts)
    with pytest.raises(SubmissionError, match=f"row {row} is not in quarantine"):
        restore(parts["out"], tmp_path / "restored", [row])
    with pytest.raises(SubmissionError, match="already there"):
        restore(parts["out"], parts["submission"])


def test_an_earlier_delivery_is_replaced_whole(parts: dict[str, Any], tmp_path: pathlib.Path) -> None:
    run(**parts)
    (parts["out"] / "stray").write_text("x")
    run(**{**parts, "verdicts": verdict_table(["keep"] * 6, tmp_path / "v.parquet")})
    assert verify_delivery(parts["out"])["rows"]["keep"] == 6
    assert not (parts["out"] / "quarantine/rows").exists()


def test_an_empty_folder_is_taken(parts: dict[str, Any]) -> None:
    parts["out"].mkdir()
    run(**parts)
    verify_delivery(parts["out"])


PLACES: dict[str, tuple[str, Callable[[dict[str, Any]], pathlib.Path]]] = {
    "a file": ("not a folder", lambda parts: parts["report_html"]),
    "other data": ("holds something that is no delivery", lambda parts: parts["adapter"]),
    "the submission": ("can't lie in one another", lambda parts: parts["submission"]),
    "in the submission": ("can't lie in one another", lambda parts: parts["submission"] / "out"),
    "around the submission": ("can't lie in one another", lambda parts: parts["submission"].parent),
}


@pytest.mark.parametrize("name", PLACES)
def test_a_delivery_overwrites_nothing_else(name: str, parts: dict[str, Any], tmp_path: pathlib.Path) -> None:
    says, place = PLACES[name]
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=says):
        run(**{**parts, "out": place(parts)})
    assert contents(tmp_path) == before


def with_file(folder: pathlib.Path, name: str, text: str = "x") -> pathlib.Path:
    (folder / name).write_text(text)
    return folder


def without_file(folder: pathlib.Path, name: str) -> pathlib.Path:
    (folder / name).unlink()
    return folder


def with_link(folder: pathlib.Path) -> pathlib.Path:
    (folder / "x.json").symlink_to("guard.json")
    return folder


Change = Callable[[dict[str, Any], pathlib.Path], dict[str, Any]]


def other_verdicts(*arguments: Any) -> Change:
    return lambda parts, folder: {"verdicts": verdict_table(arguments[0], folder / "v.parquet", *arguments[1:])}


def other_adapter(change: Callable[[pathlib.Path], pathlib.Path]) -> Change:
    return lambda parts, folder: {"adapter": change(parts["adapter"])}


def without_picture(parts: dict[str, Any], folder: pathlib.Path) -> dict[str, Any]:
    return {"submission": without_file(parts["submission"], "images/4.png")}


BAD: dict[str, tuple[type[ByeSightError], str, Change]] = {
    "too few verdicts": (StageError, "5 verdicts for 6 rows", other_verdicts(VERDICTS[:5])),
    "a row twice": (StageError, "6 verdicts for 6 rows", other_verdicts(VERDICTS, [0, 1, 2, 3, 4, 4])),
    "unknown verdict": (StageError, "unknown verdict 'maybe'", other_verdicts([*VERDICTS[:5], "maybe"])),
    "pickled adapter": (
        ModelError,
        "adapter_model.bin is pickled",
        other_adapter(lambda folder: with_file(folder, "adapter_model.bin")),
    ),
    "code": (ModelError, "modeling.py is pickled or code", other_adapter(lambda folder: with_file(folder, "modeling.py"))),
    "no guard": (ModelError, "guard", other_adapter(lambda folder: without_file(folder, "guard.json"))),
    "a link": (IntegrityError, "x.json: neither", other_adapter(with_link)),
    "report is no JSON": (StageError, "report.json: not JSON", lambda parts, folder: {"report_json": "{"}),
    "report holds NaN": (StageError, "report.json: not JSON", lambda parts, folder: {"report_json": '{"a": NaN}'}),
    "facts are no JSON": (StageError, "facts", lambda parts, folder: {"facts": {"seed": float("inf")}}),
    "submission changed": (SubmissionError, "it has changed", lambda parts, folder: {"digest": "0" * 64}),
    "a kept picture vanished": (SubmissionError, "missing picture", without_picture),
    "no report": (StageError, "can't be written: No such file", lambda parts, folder: {"report_html": folder / "none.html"}),
}


@pytest.mark.parametrize("name", BAD)
def test_a_failed_delivery_leaves_the_old_one(name: str, parts: dict[str, Any], tmp_path: pathlib.Path) -> None:
    kind, says, change = BAD[name]
    run(**parts)
    before = contents(parts["out"])
    with pytest.raises(kind, match=says):
        run(**{**parts, **change(parts, tmp_path)})
    assert contents(parts["out"]) == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_reason_is_needed_for_what_is_removed(parts: dict[str, Any], tmp_path: pathlib.Path) -> None:
    table = pq.read_table(parts["verdicts"])
    pq.write_table(table.set_column(3, "reason", pa.array([""] * 6)), tmp_path / "v.parquet")
    with pytest.raises(StageError, match="row 1 is quarantine without a reason"):
        run(**{**parts, "verdicts": tmp_path / "v.parquet"})


def test_a_full_disk_leaves_the_old_delivery(parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    run(**parts)
    before = contents(parts["out"])

    def full(*paths: pathlib.Path) -> None:
        raise OSError(28, "No space left on device")

    for failing in ("sync", "sync_tree", "commit_folder"):
        with monkeypatch.context() as patch:
            patch.setattr(f"storage.atomic.{failing}", full)
            with pytest.raises(StageError, match="can't be written: No space left"):
                run(**parts)
        assert contents(parts["out"]) == before


TAMPER: dict[str, tuple[str, Callable[[pathlib.Path], object]]] = {
    "changed byte": ("changed: adapter/guard.safetensors", lambda out: (out / "adapter/guard.safetensors").write_bytes(b"guarD")),
    "changed row": ("changed: dataset/metadata.jsonl", lambda out: (out / "dataset/metadata.jsonl").write_bytes(b"")),
    "missing": ("missing: quarantine/verdicts.parquet", lambda out: (out / "quarantine/verdicts.parquet").unlink()),
    "extra": ("extra: adapter/adapter_model.bin", lambda out: (out / "adapter/adapter_model.bin").write_bytes(b"x")),
    "link": ("dataset/x: neither", lambda out: (out / "dataset/x").symlink_to("/etc/passwd")),
    "pipe": ("dataset/x: neither", lambda out: os.mkfifo(out / "dataset/x")),
    "no manifest": ("manifest.json is missing", lambda out: (out / "manifest.json").unlink()),
    "manifest of something else": ("not that of a delivery", lambda out: (out / "manifest.json").write_text('{"kind": "x"}')),
    "manifest without files": ("incomplete", lambda out: (out / "manifest.json").write_text('{"kind": "byesight-delivery"}')),
    "manifest a list": ("incomplete", lambda out: (out / "manifest.json").write_text("[]")),
}


@pytest.mark.parametrize("name", TAMPER)
def test_verify_names_what_was_tampered_with(name: str, parts: dict[str, Any], tmp_path: pathlib.Path) -> None:
    says, tamper = TAMPER[name]
    run(**parts)
    assert is_delivery(parts["out"])
    tamper(parts["out"])
    with pytest.raises(IntegrityError, match=re.escape(says)):
        verify_delivery(parts["out"])
    with pytest.raises(IntegrityError):
        restore(parts["out"], tmp_path / "restored")
    assert not (tmp_path / "restored").exists()
