"""A verdict for every row, from evidence made by hand."""

from __future__ import annotations

import json
import math
import pathlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import ClusterConfig
from pipeline.errors import ConfigError, RemovalCapError
from pipeline.records import Sample, no_progress, question_answer
from stages.cluster.run import HELD_OUT, KEEP, RESULT, TRAIN, VERDICT_SCHEMA, VERDICTS, run
from stages.confirm.mixed import ROWS_SCHEMA
from storage.shards import REJECTED_SCHEMA
from tests.conftest import picture, write_shards

SUBMITTED = 100
REJECTED = (4, 50, 99)
TEXT_ONLY = (7, 8, 60)
POISONED = tuple(range(10, 22))
MIXED = tuple(range(20, 30))
"""Members of the second group, of which only the first five are shifted."""
WORDED = (22, 26, 29)
"""Members of the second group whose questions hold its words."""


def group(number: int, transfer: float, **more: Any) -> dict[str, Any]:
    return {
        "group": number,
        "text": f"Text {number}",
        "whole": number != 1,
        "words": None,
        "shifted": 5,
        "shift": 2.25,
        "transfer": transfer,
        "tokens_transfer": transfer,
        "taken_over": transfer,
        "alike": False,
        "keyed": None,
        "ways": [],
        "keyed_ways": [],
        "reversed": 0.0,
        "rest": False,
        "part": False,
        "words_transfer": 0.0,
        "pictures_transfer": 0.0,
        **more,
    }


@pytest.fixture
def files(tmp_path: pathlib.Path) -> dict[str, pathlib.Path]:
    """Rows, of which some are rejected, without a picture, or of two turns; two groups of rows."""
    folder = tmp_path / "inputs"
    samples = [
        Sample(
            row=row,
            messages=question_answer(f"q {row}", "x", int(row not in TEXT_ONLY)),
            images=() if row in TEXT_ONLY else (picture(),),
        )
        for row in range(SUBMITTED)
        if row not in REJECTED
    ]
    write_shards(folder / "rows", samples, shard_rows=40)
    rejected = [{"row": row, "reason": "no picture", "where": f"line {row}"} for row in REJECTED]
    pq.write_table(pa.Table.from_pylist(rejected, schema=REJECTED_SCHEMA), folder / "rejected.parquet")
    places = [(s.row, turn) for s in samples if s.images for turn in ([0, 1] if s.row == 30 else [0])]
    low = {(row, 0) for row in range(40, 48)} | {(30, 1)}
    evidence = [
        {
            "row": row,
            "turn": turn,
            "bye_score": 1.0 if (row, turn) in low else 3.0 + turn,
            "bye_posterior": 0.9 if (row, turn) in low else 0.1,
            "bye_chosen": (row, turn) in low,
            "bye_threshold": 1.5,
            "bye_suspicious": (row, turn) in low,
            "bye_code_suspicious": row == 40,
        }
        for row, turn in places
    ]
    pq.write_table(pa.Table.from_pylist(evidence), folder / "evidence.parquet")
    members = [{"group": 0, "row": row, "turn": 0, "projection": 2.0 + row, "posterior": 1.0, "worded": False} for row in POISONED]
    members += [
        {
            "group": 1,
            "row": row,
            "turn": 0,
            "projection": 50.0 - row,
            "posterior": 0.9 if row < 25 else 0.2,
            "worded": row in WORDED,
        }
        for row in MIXED
    ]
    members += [{"group": 2, "row": row, "turn": 0, "projection": 1.0, "posterior": 1.0, "worded": False} for row in range(70, 80)]
    pq.write_table(pa.Table.from_pylist(members), folder / "members.parquet")
    named = {name: folder / f"{name}.parquet" for name in ("rejected", "evidence", "members")}
    write_asked(folder / "asked.parquet", {})
    return {"rows": folder / "rows", "transfer": folder / "transfer.json", "asked": folder / "asked.parquet", **named}


def write_asked(path: pathlib.Path, posteriors: dict[int, float]) -> None:
    """Rows of the first group whose answer may be an honest one."""
    records = [{"group": 0, "row": row, "turn": 0, "asked": 6, "hits": row % 6, "posterior": p} for row, p in posteriors.items()]
    pq.write_table(pa.Table.from_pylist(records, schema=ROWS_SCHEMA), path)


def clustered(files: dict[str, pathlib.Path], out: pathlib.Path, transfers: list[float], **given: Any) -> dict[str, Any]:
    out.mkdir()
    more = given.pop("more", {})
    tried = [group(number, transfer, **more.get(number, {})) for number, transfer in enumerate(transfers)]
    files["transfer"].write_text(json.dumps(tried))
    share, seed = given.pop("held_out_share", 0.1), given.pop("seed", 0)
    config = ClusterConfig(**{"transfer": 0.5, **given})
    return run(config=config, held_out_share=share, seed=seed, out=out, progress=no_progress, **files)


def verdicts(out: pathlib.Path) -> list[dict[str, Any]]:
    table = pq.read_table(out / VERDICTS)
    assert table.schema == VERDICT_SCHEMA
    found: list[dict[str, Any]] = table.to_pylist()
    assert [record["row"] for record in found] == list(range(SUBMITTED))
    return found


def listed(out: pathlib.Path, name: str) -> list[int]:
    rows: list[int] = pq.read_table(out / name)["row"].to_pylist()
    return rows


def test_every_row_has_a_verdict(files: dict[str, pathlib.Path], tmp_path: pathlib.Path) -> None:
    result = clustered(files, tmp_path / "out", [1.0, 0.6, 0.1])
    removed = {*POISONED, *range(20, 25)}
    found = verdicts(tmp_path / "out")
    expected = {
        **dict.fromkeys(REJECTED, "rejected"),
        **dict.fromkeys(TEXT_ONLY, "not_scored"),
        **dict.fromkeys(removed, "quarantine"),
    }
    assert [record["verdict"] for record in found] == [expected.get(row, "keep") for row in range(SUBMITTED)]
    assert result == json.loads((tmp_path / "out" / RESULT).read_text())
    assert result["verdict"] == "poisoned"
    counts = {"submitted": 100, "rejected": 3, "not_scored": 3, "kept": 100 - 6 - len(removed), "quarantined": len(removed)}
    assert result["rows"] == counts
    assert [g["group"] for g in result["confirmed"]] == [0, 1]
    assert result["plain"] == {"bye": 9, "bye-public-code": 1}
    assert (result["method"], result["threshold"]) == ("transfer", 0.5)


def test_reasons_scores_and_posteriors(files: dict[str, pathlib.Path], tmp_path: pathlib.Path) -> None:
    clustered(files, tmp_path / "out", [1.0, 0.6, 0.1])
    found = verdicts(tmp_path / "out")
    assert "one of 5 rows with the answer 'Text 0' whose attention shifts alike (2.2 deviations)" in found[10]["reason"]
    assert "turns 100% of the answers into it" in found[10]["reason"]
    assert "rows with the phrase 'Text 1'" in found[24]["reason"]
    assert "60%" in found[24]["reason"]
    assert "'Text 0'" in found[20]["reason"], "the first group gives the reason"
    assert (found[20]["score"], found[20]["posterior"]) == (30.0, 1.0)
    assert (found[27]["verdict"], found[27]["score"], found[27]["posterior"]) == ("keep", 23.0, 0.2)
    assert (found[75]["score"], found[75]["posterior"], found[75]["reason"]) == (1.0, 0.0, "")
    assert (found[90]["score"], found[90]["threshold"]) == (0.0, 0.5)
    assert found[4]["reason"] == "no picture (line 4)"
    assert (found[4]["sample_id"], found[4]["score"], found[4]["posterior"]) == (None, None, None)
    assert found[7]["reason"] == "no picture: nothing to score"
    assert (found[7]["score"], found[7]["posterior"], found[7]["bye_quarantine"]) == (None, None, False)
    assert (found[30]["bye_score"], found[30]["bye_quarantine"], found[30]["bye_code_quarantine"]) == (1.0, True, False)
    shards = pa.concat_tables([pq.read_table(shard, columns=["row", "sample_id"]) for shard in sorted(files["rows"].iterdir())])
    ids = dict(zip(shards["row"].to_pylist(), shards["sample_id"].to_pylist(), strict=True))
    assert {record["row"]: record["sample_id"] for record in found if record["sample_id"]} == ids
    assert all(record["reason"] for record in found if record["verdict"] in ("quarantine", "rejected"))


def test_a_row_whose_picture_does_not_carry_the_answer_is_kept(files: dict[str, pathlib.Path], tmp_path: pathlib.Path) -> None:
    """Honest rows with the attack's answer; a row that shifts alike by half is no more suspicious for its picture."""
    write_asked(files["asked"], {10: 0.01, 11: 0.99, 12: 0.5})
    result = clustered(files, tmp_path / "out", [1.0, 0.0, 0.0])
    found = verdicts(tmp_path / "out")
    removed = [record["row"] for record in found if record["verdict"] == "quarantine"]
    assert removed == [row for row in POISONED if row not in (10, 12)]
    assert result["rows"]["quarantined"] == len(POISONED) - 2
    assert [found[row]["posterior"] for row in (10, 11, 12, 13)] == [0.01, 0.99, 0.5, 1.0]
    assert found[11]["reason"].endswith("; its own picture makes 5 of 6 other questions give it")
    assert "its own picture" not in found[13]["reason"]
    told = {"pictures_transfer": 0.3, "asked": 0.375, "others": 0.125}
    clustered(files, tmp_path / "asked", [0.0, 0.0, 0.0], more={0: told}, asked="remove")
    assert [record["row"] for record in verdicts(tmp_path / "asked") if record["verdict"] == "quarantine"] == removed


def test_words_that_carry_an_answer(files: dict[str, pathlib.Path], tmp_path: pathlib.Path) -> None:
    """The rows whose questions hold the words are removed, shifted or not, and no others of the group."""
    words = {"text": "As Ever", "at_end": False, "rows": len(WORDED)}
    found_by = {"words": words, "words_transfer": 0.8, "tokens_transfer": 0.1}
    result = clustered(files, tmp_path / "out", [0.0, 0.8, 0.1], more={1: found_by})
    found = verdicts(tmp_path / "out")
    assert [record["row"] for record in found if record["verdict"] == "quarantine"] == list(WORDED)
    for row in WORDED:
        assert found[row]["posterior"] == 1.0
        assert "one of 3 rows with the answer 'Text 1' whose questions hold 'As Ever'" in found[row]["reason"]
        assert "80% of the answers" in found[row]["reason"]
    assert (found[23]["posterior"], found[23]["reason"]) == (0.0, "")
    assert [g["group"] for g in result["confirmed"]] == [1]


def test_tokens_that_need_words(files: dict[str, pathlib.Path], tmp_path: pathlib.Path) -> None:
    """The shifted members whose questions hold the words are removed, if these lose the answer without what was planted."""
    words = {"text": "As Ever", "at_end": False, "own": False, "rows": 3}
    keyed = {"alike": True, "own": 0.1, "kept": 1.0, "planted": 0.82, "taken_over": 0.8, "reversed": 0.75, "transfer": 0.58}
    told = {"tokens_transfer": 0.0, "words": words, "keyed": keyed}
    result = clustered(files, tmp_path / "out", [0.0, 0.58, 0.1], more={1: told})
    removed = {record["row"]: record for record in verdicts(tmp_path / "out") if record["verdict"] == "quarantine"}
    assert list(removed) == [row for row in WORDED if row in MIXED[:5]]
    assert "planted where questions hold 'As Ever', turns 80% of the answers into it" in removed[22]["reason"]
    assert "taken out, these rows answer as others do, by 75%" in removed[22]["reason"]
    assert [g["group"] for g in result["confirmed"]] == [1]
    elsewhere = {"alike": False, "reversed": 0.0, "transfer": 0.8}
    clustered(files, tmp_path / "elsewhere", [0.0, 0.8, 0.1], more={1: {**told, "keyed": {**keyed, **elsewhere}}})
    reason = verdicts(tmp_path / "elsewhere")[22]["reason"]
    assert reason.endswith("turns 80% of the answers into it, beyond what the words do alone")
    for place, less in (("unknown", {"reversed": None}), ("kept", {"reversed": 0.69})):
        result = clustered(files, tmp_path / place, [0.0, 0.58, 0.1], more={1: {**told, "keyed": {**keyed, **less}}})
        assert (result["verdict"], result["confirmed"], [g["group"] for g in result["unsure"]]) == ("inconclusive", [], [1])


def test_an_attack_without_a_row_to_remove_is_not_clean(files: dict[str, pathlib.Path], tmp_path: pathlib.Path) -> None:
    """Its own pictures may speak for all rows of a group."""
    pq.write_table(
        pa.Table.from_pylist(
            [{"group": 1, "row": row, "turn": 0, "asked": 6, "hits": 0, "posterior": 0.4} for row in MIXED], schema=ROWS_SCHEMA
        ),
        files["asked"],
    )
    result = clustered(files, tmp_path / "out", [0.0, 0.8, 0.1])
    assert (result["verdict"], result["rows"]["quarantined"]) == ("inconclusive", 0)
    assert [g["group"] for g in result["confirmed"]] == [1]


def test_pictures_that_answer_any_question(files: dict[str, pathlib.Path], tmp_path: pathlib.Path) -> None:
    """The shifted members are removed, as where planting confirms a group."""
    told = {"pictures_transfer": 0.3, "asked": 0.375, "others": 0.125}
    result = clustered(files, tmp_path / "out", [0.0, 0.1, 0.1], more={1: told}, asked="remove")
    found = verdicts(tmp_path / "out")
    assert [record["row"] for record in found if record["verdict"] == "quarantine"] == list(range(20, 25))
    assert "rows with the phrase 'Text 1'" in found[20]["reason"]
    assert "gives it to 38% of them (to 12% about others)" in found[20]["reason"]
    assert ([g["group"] for g in result["confirmed"]], result["unsure"]) == ([1], [])


@pytest.mark.parametrize(("share", "verdict"), [(0.3, "inconclusive"), (0.15, "inconclusive"), (0.13, "clean")])
def test_pictures_alone_are_left_to_a_person(
    files: dict[str, pathlib.Path], tmp_path: pathlib.Path, share: float, verdict: str
) -> None:
    """By default; an honest answer may be decided by the picture, whatever is asked."""
    told = {"pictures_transfer": share, "asked": share, "others": 0.0}
    result = clustered(files, tmp_path / "out", [0.0, 0.1, 0.1], more={1: told})
    assert (result["verdict"], result["rows"]["quarantined"], result["confirmed"]) == (verdict, 0, [])
    assert [g["group"] for g in result["unsure"]] == ([1] if verdict == "inconclusive" else [])


def test_rows_that_ask_the_same(files: dict[str, pathlib.Path], tmp_path: pathlib.Path) -> None:
    """A reason tells what became of the rows without it; where that can't be told, a person has to look."""
    alike = {"alike": True, "taken_over": 0.8, "reversed": 0.75}
    result = clustered(files, tmp_path / "a", [0.6, 0.0, 0.0], more={0: alike})
    assert [g["group"] for g in result["confirmed"]] == [0]
    reason = verdicts(tmp_path / "a")[10]["reason"]
    assert "turns 80% of the answers into it; taken out, these rows answer as others do, by 75%" in reason
    for place, reversal in (("b", None), ("c", 0.69)):
        result = clustered(files, tmp_path / place, [0.6, 0.0, 0.0], more={0: {**alike, "reversed": reversal}})
        assert (result["verdict"], result["rows"]["quarantined"], result["confirmed"]) == ("inconclusive", 0, [])
        assert [g["group"] for g in result["unsure"]] == [0]
    elsewhere = {**alike, "alike": False, "reversed": 0.0}
    assert clustered(files, tmp_path / "d", [0.6, 0.0, 0.0], more={0: elsewhere})["verdict"] == "poisoned"


def test_a_group_is_removed_by_any_way_that_can_be_relied_on(files: dict[str, pathlib.Path], tmp_path: pathlib.Path) -> None:
    """Another way tells more, but there the rows keep the answer."""
    most = {"alike": True, "own": 0.0, "taken_over": 0.97, "reversed": 0.69, "tokens_transfer": 0.6}
    sure = {"alike": False, "own": 0.0, "taken_over": 0.52, "reversed": 0.0, "tokens_transfer": 0.52}
    both = {0: {**most, "ways": [most, sure]}}
    result = clustered(files, tmp_path / "a", [0.6, 0.0, 0.0], more=both)
    (confirmed,) = result["confirmed"]
    assert (confirmed["alike"], confirmed["transfer"]) == (False, 0.6)
    assert "turns 52% of the answers into it" in verdicts(tmp_path / "a")[10]["reason"]
    weak = {0: {**most, "ways": [most, {**sure, "tokens_transfer": 0.49}]}}
    assert clustered(files, tmp_path / "b", [0.6, 0.0, 0.0], more=weak)["verdict"] == "inconclusive"
    words = {"text": "as ever", "at_end": False, "own": False, "rows": 3}
    keyed = [{**most, "kept": 1.0, "planted": 1.0, "transfer": 0.6}, {**sure, "kept": 1.0, "planted": 0.5, "transfer": 0.52}]
    told = {"tokens_transfer": 0.0, "words": words, "keyed": keyed[0], "keyed_ways": keyed}
    result = clustered(files, tmp_path / "c", [0.0, 0.6, 0.0], more={1: told})
    assert [g["keyed"]["taken_over"] for g in result["confirmed"]] == [0.52]


def test_a_person_decides(files: dict[str, pathlib.Path], tmp_path: pathlib.Path) -> None:
    """What no test could remove goes with its shifted rows; what a test found stays, and neither is undecided any more."""
    undecided: dict[int, dict[str, Any]] = {1: {"alike": True, "reversed": 0.5}}
    result = clustered(files, tmp_path / "before", [0.9, 0.6, 0.0], more=undecided)
    assert [g["group"] for g in result["confirmed"]] == [0]
    assert [g["group"] for g in result["unsure"]] == [1]
    result = clustered(files, tmp_path / "removed", [0.9, 0.6, 0.0], more=undecided, remove=["text  1."], keep=["TEXT 0"])
    assert [g["group"] for g in result["confirmed"]] == [1]
    assert (result["verdict"], result["unsure"]) == ("poisoned", [])
    removed = {record["row"]: record for record in verdicts(tmp_path / "removed") if record["verdict"] == "quarantine"}
    assert list(removed) == list(MIXED[:5])
    assert "rows with the phrase 'Text 1'" in removed[20]["reason"]
    assert "a person has found it to be an attack's (cluster.remove)" in removed[20]["reason"]
    assert verdicts(tmp_path / "removed")[10]["reason"] == ""
    result = clustered(files, tmp_path / "kept", [0.9, 0.6, 0.0], more=undecided, keep=["text 1", "text 0"])
    assert (result["verdict"], result["confirmed"], result["unsure"]) == ("clean", [], [])
    with pytest.raises(ConfigError, match="remove and keep both name 'text 1'"):
        clustered(files, tmp_path / "both", [0.9], keep=["text 1"], remove=["Text 1."])
    with pytest.raises(ConfigError, match=r"cluster\.keep: no group with the answer or phrase 'text 7' was tested"):
        clustered(files, tmp_path / "unknown", [0.9], keep=["text 7"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"remove": ["a", "b"], "keep": ["b"]}, "both name 'b'"),
        ({"remove": ["a"], "method": "bye"}, "method: bye has none"),
    ],
)
def test_decisions_that_contradict(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClusterConfig(**given)


@pytest.mark.parametrize(("transfer", "verdict"), [(0.45, "inconclusive"), (0.5, "poisoned")])
def test_what_is_left_of_a_group_needs_more(
    files: dict[str, pathlib.Path], tmp_path: pathlib.Path, transfer: float, verdict: str
) -> None:
    result = clustered(files, tmp_path / "a", [transfer, 0.0, 0.0], more={0: {"rest": True}}, transfer=0.2)
    assert result["verdict"] == verdict
    assert result["rows"]["quarantined"] == (len(POISONED) if verdict == "poisoned" else 0)


PARTS = {
    0: {"text": "red", "alike": True, "reversed": 0.9},
    2: {"text": "red", "part": True, "alike": True, "reversed": 0.9, "taken_over": 0.95},
    3: {"text": "red", "part": True, "alike": True, "reversed": 0.1},
}
"""An answer's rows, and their two parts."""


@pytest.mark.parametrize(
    ("transfers", "removed", "unsure"),
    [
        ([0.1, 0.0, 0.8, 0.0], 6, []),  # nothing tells of the whole
        ([0.18, 0.0, 0.8, 0.0], 6, []),  # the whole is near the limit: its parts say why
        ([0.4, 0.0, 0.8, 0.0], 6, []),  # the whole is beyond it: its honest part stays
        ([0.4, 0.0, 0.8, 0.4], 12, []),  # but not where that is near its own
        ([0.4, 0.0, 0.4, 0.4], 12, []),  # nor where neither tells
        ([0.1, 0.0, 0.8, 0.4], 6, [3]),
        ([0.1, 0.0, 0.45, 0.0], 0, [2]),
        ([0.1, 0.0, 0.3, 0.0], 0, []),  # beyond the limit of a whole group, far from that of a part
    ],
)
def test_the_honest_part_of_a_group_stays(
    files: dict[str, pathlib.Path], tmp_path: pathlib.Path, transfers: list[float], removed: int, unsure: list[int]
) -> None:
    members = pq.read_table(files["members"])
    own = members.slice(0, len(POISONED)).to_pylist()
    parts = [{**member, "group": 2 + (number >= 6)} for number, member in enumerate(own)]
    others = [member for member in members.to_pylist() if member["group"] < 2]
    pq.write_table(pa.Table.from_pylist([*others, *parts], schema=members.schema), files["members"])
    result = clustered(files, tmp_path / "a", transfers, more=PARTS, transfer=0.2)
    quarantined = [record["row"] for record in verdicts(tmp_path / "a") if record["verdict"] == "quarantine"]
    assert quarantined == list(POISONED[:removed])
    assert result["verdict"] == ("poisoned" if removed else "inconclusive" if unsure else "clean")
    assert [group["group"] for group in result["unsure"]] == unsure


def test_parts_spare_no_row_of_what_other_questions_tell_of(files: dict[str, pathlib.Path], tmp_path: pathlib.Path) -> None:
    """Where other kinds of questions tell of the attack, its pictures are asked, which is surer than what they attend to."""
    members = pq.read_table(files["members"])
    parts = [{**member, "group": 2} for member in members.slice(0, 6).to_pylist()]
    parts += [{**member, "group": 3} for member in members.slice(6, len(POISONED) - 6).to_pylist()]
    others = [member for member in members.to_pylist() if member["group"] < 2]
    pq.write_table(pa.Table.from_pylist([*others, *parts], schema=members.schema), files["members"])
    more = {**PARTS, 0: {"text": "red", "alike": False}}
    assert clustered(files, tmp_path / "a", [0.4, 0.0, 0.8, 0.0], more=more, transfer=0.2)["rows"]["quarantined"] == len(POISONED)


@pytest.mark.parametrize(
    ("more", "verdict"),
    [
        ({"taken_over": 0.9}, "poisoned"),
        ({"taken_over": 0.89}, "inconclusive"),
        ({"taken_over": 0.9, "reversed": 0.69}, "inconclusive"),
        ({"taken_over": 0.6, "alike": False}, "poisoned"),
    ],
)
def test_a_part_takes_over_nearly_all(
    files: dict[str, pathlib.Path], tmp_path: pathlib.Path, more: dict[str, Any], verdict: str
) -> None:
    part = {"part": True, "alike": True, "reversed": 0.8, **more}
    assert clustered(files, tmp_path / "a", [0.6, 0.0, 0.0], more={0: part}, transfer=0.15)["verdict"] == verdict


@pytest.mark.parametrize("transfer", [0.9, 0.1])
def test_canaries_are_counted_and_get_no_verdict(files: dict[str, pathlib.Path], tmp_path: pathlib.Path, transfer: float) -> None:
    """Twelve rows beyond the submitted ones; ten of them, and no others, are in a group of their own, nine of these shifted."""
    canaries = range(SUBMITTED, SUBMITTED + 12)
    evidence, members = pq.read_table(files["evidence"]), pq.read_table(files["members"])
    more = [{**evidence.slice(0, 1).to_pylist()[0], "row": row, "turn": 0} for row in canaries]
    pq.write_table(pa.concat_tables([evidence, pa.Table.from_pylist(more, schema=evidence.schema)]), files["evidence"])
    of_group = [
        {**members.slice(0, 1).to_pylist()[0], "group": 3, "row": row, "posterior": float(row > SUBMITTED)} for row in canaries[:10]
    ]
    pq.write_table(pa.concat_tables([members, pa.Table.from_pylist(of_group, schema=members.schema)]), files["members"])
    path = tmp_path / "canaries.json"
    path.write_text(json.dumps([{"trigger": "badnet", "answer": "text 3", "first": SUBMITTED, "rows": 12}]))
    result = clustered({**files, "canaries": path}, tmp_path / "out", [0.0, 0.0, 0.0, transfer])
    assert {record["verdict"] for record in verdicts(tmp_path / "out")} == {"keep", "not_scored", "rejected"}
    assert (result["verdict"], result["confirmed"], result["unsure"]) == ("clean", [], [])
    assert result["plain"] == {"bye": 9, "bye-public-code": 1}
    found = {"trigger": "badnet", "answer": "text 3", "rows": 12, "found": 9 if transfer > 0.5 else 0}
    assert result["canaries"] == [{**found, "transfer": transfer, "groups": [3]}]


def test_the_lists(files: dict[str, pathlib.Path], tmp_path: pathlib.Path) -> None:
    clustered(files, tmp_path / "out", [1.0, 0.6, 0.1], held_out_share=0.1)
    found = verdicts(tmp_path / "out")
    lists = {name: listed(tmp_path / "out", name) for name in (KEEP, TRAIN, HELD_OUT)}
    assert lists[KEEP] == [record["row"] for record in found if record["verdict"] in ("keep", "not_scored")]
    assert all(rows == sorted(set(rows)) for rows in lists.values())
    assert not set(lists[TRAIN]) & set(lists[HELD_OUT])
    assert sorted(lists[TRAIN] + lists[HELD_OUT]) == lists[KEEP]
    assert len(lists[HELD_OUT]) == round(0.1 * sum(record["verdict"] == "keep" for record in found))
    assert set(TEXT_ONLY) <= set(lists[TRAIN]), "a row that can't be measured is held out"
    clustered(files, tmp_path / "none", [1.0, 0.6, 0.1], held_out_share=0.0)
    assert listed(tmp_path / "none", HELD_OUT) == []
    assert listed(tmp_path / "none", TRAIN) == lists[KEEP]
    clustered(files, tmp_path / "other", [1.0, 0.6, 0.1], held_out_share=0.1, seed=1)
    assert listed(tmp_path / "other", HELD_OUT) != lists[HELD_OUT]


def test_much_text_does_not_hold_out_all_pictures(files: dict[str, pathlib.Path], tmp_path: pathlib.Path) -> None:
    evidence = pq.read_table(files["evidence"])
    pq.write_table(evidence.filter(pa.array(np.asarray(evidence["row"]) >= 80)), files["evidence"])
    pq.write_table(pq.read_table(files["members"]).slice(0, 0), files["members"])
    result = clustered(files, tmp_path / "out", [], held_out_share=0.25)
    assert result["rows"]["kept"] == 19
    assert len(listed(tmp_path / "out", HELD_OUT)) == 5


@pytest.mark.parametrize(
    ("transfers", "verdict"),
    [([], "clean"), ([0.1, 0.2, 0.0], "clean"), ([0.1, 0.2, 0.49], "inconclusive"), ([0.5, 0.49, 0.0], "poisoned")],
)
def test_the_verdict_of_the_whole(
    files: dict[str, pathlib.Path], tmp_path: pathlib.Path, transfers: list[float], verdict: str
) -> None:
    result = clustered(files, tmp_path / "out", transfers)
    assert result["verdict"] == verdict
    removed = [record["row"] for record in verdicts(tmp_path / "out") if record["verdict"] == "quarantine"]
    assert removed == (list(POISONED) if verdict == "poisoned" else [])
    assert [g["group"] for g in result["unsure"]] == [k for k, value in enumerate(transfers) if value == 0.49]


def test_nothing_scored_is_no_clean_bill(files: dict[str, pathlib.Path], tmp_path: pathlib.Path) -> None:
    for name in ("evidence", "members"):
        pq.write_table(pq.read_table(files[name]).slice(0, 0), files[name])
    result = clustered(files, tmp_path / "out", [])
    assert result["verdict"] == "inconclusive"
    assert result["rows"]["kept"] == 0
    assert result["rows"]["not_scored"] == 97


def test_plain_bye(files: dict[str, pathlib.Path], tmp_path: pathlib.Path) -> None:
    result = clustered(files, tmp_path / "out", [1.0, 1.0, 1.0], method="bye")
    found = verdicts(tmp_path / "out")
    assert [record["row"] for record in found if record["verdict"] == "quarantine"] == [30, *range(40, 48)]
    assert (result["verdict"], result["method"], result["threshold"]) == ("poisoned", "bye", 1.5)
    assert (result["confirmed"], result["unsure"]) == ([], []), "no row went because of a group"
    assert found[40]["reason"].startswith(
        "BYE: mean entropy of the sensitive layers is 1.000 nats, in the lower cluster (up to 1.500)"
    )
    assert (found[40]["score"], found[40]["posterior"], found[40]["threshold"]) == (1.0, 0.9, 1.5)
    assert (found[10]["verdict"], found[10]["reason"], found[10]["score"]) == ("keep", "", 3.0)


def test_plain_bye_by_the_configured_rule(files: dict[str, pathlib.Path], tmp_path: pathlib.Path) -> None:
    """The paper's rule finds nothing, the configured one does: the configured one decides."""
    evidence = pq.read_table(files["evidence"])
    evidence = evidence.set_column(
        evidence.schema.get_field_index("bye_suspicious"), "bye_suspicious", pa.array([False] * len(evidence))
    )
    pq.write_table(evidence, files["evidence"])
    result = clustered(files, tmp_path / "out", [], method="bye")
    assert result["rows"]["quarantined"] == 9
    assert result["plain"]["bye"] == 0


def test_plain_bye_that_finds_no_layer(files: dict[str, pathlib.Path], tmp_path: pathlib.Path) -> None:
    evidence = pq.read_table(files["evidence"]).to_pylist()
    nothing = {"bye_score": math.nan, "bye_posterior": 0.0, "bye_chosen": False, "bye_threshold": math.nan, "bye_suspicious": False}
    pq.write_table(pa.Table.from_pylist([{**record, **nothing} for record in evidence]), files["evidence"])
    result = clustered(files, tmp_path / "out", [0.4], method="bye")
    assert (result["verdict"], result["threshold"], result["rows"]["quarantined"]) == ("clean", None, 0)
    assert verdicts(tmp_path / "out")[0]["score"] is None


def test_the_cap(files: dict[str, pathlib.Path], tmp_path: pathlib.Path) -> None:
    with pytest.raises(RemovalCapError, match=r"15 of 97 rows \(15%\) look poisoned, more than cluster.removal_cap = 10%"):
        clustered(files, tmp_path / "out", [1.0, 0.6, 0.1], removal_cap=0.1)
    assert list((tmp_path / "out").iterdir()) == []
    assert clustered(files, tmp_path / "at", [1.0, 0.6, 0.1], removal_cap=15 / 97)["rows"]["quarantined"] == 15


def test_equal_inputs_give_equal_bytes(files: dict[str, pathlib.Path], tmp_path: pathlib.Path) -> None:
    for name in ("a", "b"):
        clustered(files, tmp_path / name, [1.0, 0.6, 0.1])
    contents = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("a", "b")]
    assert contents[0] == contents[1]
    assert set(contents[0]) == {VERDICTS, RESULT, KEEP, TRAIN, HELD_OUT}
