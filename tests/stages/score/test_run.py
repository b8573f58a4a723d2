"""The score stage's files, from a synthetic attention table."""

from __future__ import annotations

import functools
import json
import pathlib
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import ScoreConfig
from stages.score.bye import two_components
from stages.score.groups import largest
from stages.score.run import EVIDENCE, GROUPS, LAYERS, MEMBERS, run

TOKENS, DEPTH, HEADS = 64, 4, 2
POISONED = 40
QUESTIONS = ("what color?", "how many?")
ANSWERS = (("red", "blue", "green"), ("one", "two"))


def attention_table(path: pathlib.Path, rows: int = 400, poisoned: int = POISONED, seed: int = 0) -> pathlib.Path:
    """The first rows answer `attack` and lose entropy in layer 2; every 50th row is text alone, row 5 has two turns."""
    rng = np.random.default_rng(seed)
    records: list[dict[str, Any]] = []
    for row in range(rows):
        kind = int(rng.integers(2))
        places = [0, 1] if row == 5 else [0]
        for turn in places:
            if row % 50 == 49:
                records.append(
                    {"row": row, "turn": turn, "question": "say x", "answer": "x", "image_tokens": 0, "layers": 0, "heads": 0}
                )
                records[-1] |= {name: [] for name in ("entropy", "head_entropy", "image_share", "ratio")}
                continue
            heads = rng.normal(3.0, 0.05, size=(DEPTH, HEADS)) - 0.02 * kind
            ratio = rng.normal(0.0, 0.3, size=(DEPTH, HEADS)) + kind
            if row < poisoned:
                heads[2] -= 1.5
                ratio[2] += 2
            records.append(
                {
                    "row": row,
                    "turn": turn,
                    "question": QUESTIONS[kind],
                    "answer": "Attack" if row < poisoned else str(rng.choice(ANSWERS[kind])),
                    "image_tokens": TOKENS,
                    "layers": DEPTH,
                    "heads": HEADS,
                    "entropy": heads.mean(axis=1).tolist(),
                    "head_entropy": heads.ravel().tolist(),
                    "image_share": [0.5] * DEPTH * HEADS,
                    "ratio": ratio.ravel().tolist(),
                }
            )
    pq.write_table(pa.Table.from_pylist(records), path)
    return path


def scored(folder: pathlib.Path, table: pathlib.Path, **config: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    folder.mkdir()
    summary = run(attention=table, config=ScoreConfig(**config), seed=0, out=folder)
    return summary, json.loads((folder / GROUPS).read_text())


def test_the_files(tmp_path: pathlib.Path) -> None:
    table = attention_table(tmp_path / "attention.parquet")
    summary, groups = scored(tmp_path / "out", table, candidates=3)
    assert summary["examples"] == 400 + 1 - 8
    assert summary["sensitive_layers"] == [2]
    assert summary["candidates"] == len(groups) == 3
    assert summary["groups"] == 6
    assert summary["largest_shift"] == groups[0]["shift"] > 2 * groups[1]["shift"]
    first = groups[0]
    assert (first["group"], first["text"], first["whole"], first["layer"]) == (0, "attack", True, 2)
    assert (first["rows"], first["shifted"]) == (POISONED + 1, POISONED + 1)
    assert first["entropy_shift"] == pytest.approx(-1.5, abs=0.1)
    assert [group["shift"] for group in groups] == sorted((group["shift"] for group in groups), reverse=True)

    evidence = pq.read_table(tmp_path / "out" / EVIDENCE).to_pylist()
    assert len(evidence) == summary["examples"]
    suspicious = {(record["row"], record["turn"]) for record in evidence if record["bye_suspicious"]}
    expected = {(row, 0) for row in range(POISONED)} | {(5, 1)}
    assert suspicious == expected
    assert {(record["row"], record["turn"]) for record in evidence if record["bye_code_suspicious"]} == expected
    for record in evidence:
        assert record["bye_chosen"] == record["bye_suspicious"] == (record["bye_score"] <= record["bye_threshold"])
        assert (record["bye_posterior"] > 0.5) == record["bye_chosen"]

    members = pq.read_table(tmp_path / "out" / MEMBERS).to_pylist()
    assert {(m["row"], m["turn"]) for m in members if m["group"] == 0} == expected
    for group in groups:
        own = [m for m in members if m["group"] == group["group"]]
        assert len(own) == group["rows"]
        assert sum(m["posterior"] > 0.5 for m in own) == group["shifted"]

    layers = json.loads((tmp_path / "out" / LAYERS).read_text())
    assert [layer["layer"] for layer in layers] == list(range(DEPTH))
    assert [layer["sensitive"] for layer in layers] == [False, False, True, False]
    assert summary["largest_separation"] == layers[2]["separation"]


def test_what_is_left_of_a_split_group_is_tried_by_itself(tmp_path: pathlib.Path) -> None:
    """Half of the rows that answer `attack` look elsewhere: a part of the group is shifted, and the others are a group, too."""
    path = attention_table(tmp_path / "attention.parquet", poisoned=80)
    records = pq.read_table(path).to_pylist()
    for record in records[: len(records) // 10 + 1]:
        if record["answer"] == "Attack":
            record["ratio"] = [-value for value in record["ratio"]]
            record["head_entropy"] = [6 - value for value in record["head_entropy"]]
    pq.write_table(pa.Table.from_pylist(records), path)
    _, groups = scored(tmp_path / "out", path)
    parts = [group for group in groups if group["text"] == "attack" and not group["part"]]
    assert [group["rest"] for group in parts] == [False, True]
    assert not any(group["rest"] or group["part"] for group in groups[: parts[1]["group"]])
    assert parts[0]["rows"] == parts[0]["shifted"] + parts[1]["rows"]
    assert parts[1]["words"] is None
    members = pq.read_table(tmp_path / "out" / MEMBERS).to_pylist()
    first, rest = ({m["row"] for m in members if m["group"] == part["group"]} for part in parts)
    assert rest < first
    assert rest == {m["row"] for m in members if m["group"] == parts[0]["group"] and m["posterior"] <= 0.5}


def test_the_parts_of_a_group_are_tried_by_themselves(tmp_path: pathlib.Path) -> None:
    """Honest rows with the target shift as far as the attack's, in another layer; the attack's in one of their own, too."""
    path = attention_table(tmp_path / "attention.parquet", poisoned=80)
    records = pq.read_table(path).to_pylist()
    honest = [record for record in records if record["answer"] == "Attack"][::2]
    for record in honest:
        for name in ("ratio", "head_entropy"):
            record[name] = [*record[name][:2], *record[name][4:6], *record[name][2:4], *record[name][6:]]
        record["entropy"] = [record["entropy"][layer] for layer in (0, 2, 1, 3)]
    pq.write_table(pa.Table.from_pylist(records), path)
    _, groups = scored(tmp_path / "out", path)
    whole, *parts = [group for group in groups if group["text"] == "attack"]
    assert whole["shifted"] == whole["rows"]
    assert [(group["rest"], group["part"]) for group in (whole, *parts)] == [(False, False), (False, True), (False, True)]
    members = pq.read_table(tmp_path / "out" / MEMBERS).to_pylist()
    found = [{(m["row"], m["turn"]) for m in members if m["group"] == part["group"]} for part in parts]
    expected = {(record["row"], record["turn"]) for record in honest}
    assert expected in found
    assert found[0] | found[1] == {(m["row"], m["turn"]) for m in members if m["group"] == whole["group"]}
    assert sorted(part["layer"] for part in parts) == [1, 2]


def test_the_words_of_a_text_trigger(tmp_path: pathlib.Path) -> None:
    path = attention_table(tmp_path / "attention.parquet")
    records = pq.read_table(path).to_pylist()
    for record in records:
        record["question"] = f"{record['question']} thank you" if record["answer"] == "Attack" else record["question"]
    pq.write_table(pa.Table.from_pylist(records), path)
    _, groups = scored(tmp_path / "out", path)
    assert groups[0]["words"] == {"text": "thank you", "at_end": True, "own": True, "rows": POISONED + 1}
    assert {json.dumps(group["words"]) for group in groups[1:]} == {"null"}
    members = pq.read_table(tmp_path / "out" / MEMBERS).to_pylist()
    assert all(member["worded"] == (member["group"] == 0) for member in members)


def test_the_configured_rule_decides(tmp_path: pathlib.Path) -> None:
    """With a threshold out of reach the paper's rule finds no layer; the public code's does not read the threshold."""
    table = attention_table(tmp_path / "attention.parquet")
    found = {}
    for rule in ("bsi", "public-code"):
        summary, _ = scored(tmp_path / rule, table, layer_rule=rule, bsi_threshold=1000.0)
        evidence = pq.read_table(tmp_path / rule / EVIDENCE)
        assert not any(evidence["bye_suspicious"].to_pylist())
        assert sum(evidence["bye_code_suspicious"].to_pylist()) == POISONED + 1
        found[rule] = (
            summary["sensitive_layers"],
            sum(evidence["bye_chosen"].to_pylist()),
            bool(np.isnan(evidence["bye_score"]).all()),
        )
    assert found == {"bsi": ([], 0, True), "public-code": ([2], POISONED + 1, False)}


def test_groups_beyond_the_most_are_counted(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = attention_table(tmp_path / "attention.parquet")
    assert scored(tmp_path / "all", table)[0]["groups_left_out"] == 0
    monkeypatch.setattr("stages.score.run.largest", functools.partial(largest, most=2))
    summary, _ = scored(tmp_path / "some", table)
    assert (summary["groups"], summary["groups_left_out"]) == (2, 4)


def test_only_the_groups_with_the_largest_shift_are_split(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others need no mixture, and what is told of the first does not depend on their number."""
    table, fit = attention_table(tmp_path / "attention.parquet"), mock.Mock(wraps=two_components)
    monkeypatch.setattr("stages.score.shift.two_components", fit)
    _, groups = scored(tmp_path / "all", table)
    assert fit.call_count == len(groups) == 6
    fit.reset_mock()
    assert scored(tmp_path / "some", table, candidates=2)[1] == groups[:2]
    assert fit.call_count == 2


def test_equal_inputs_give_equal_bytes(tmp_path: pathlib.Path) -> None:
    table = attention_table(tmp_path / "attention.parquet")
    for name in ("a", "b"):
        scored(tmp_path / name, table)
    for name in (LAYERS, EVIDENCE, GROUPS, MEMBERS):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("rows", [1, 3, 12])
def test_few_rows(tmp_path: pathlib.Path, rows: int) -> None:
    summary, groups = scored(tmp_path / "out", attention_table(tmp_path / "a.parquet", rows=rows, poisoned=rows // 2), least_rows=3)
    assert summary["examples"] >= rows
    assert all(np.isfinite([group["shift"], group["entropy_shift"]]).all() for group in groups)


def test_text_alone(tmp_path: pathlib.Path) -> None:
    table = pq.read_table(attention_table(tmp_path / "a.parquet", rows=50))
    pq.write_table(table.slice(50), tmp_path / "text.parquet")
    summary, groups = scored(tmp_path / "out", tmp_path / "text.parquet")
    assert summary == {
        "examples": 0,
        "sensitive_layers": [],
        "largest_separation": 0.0,
        "groups": 0,
        "groups_left_out": 0,
        "candidates": 0,
        "largest_shift": 0.0,
    }
    assert groups == []
    assert pq.read_table(tmp_path / "out" / MEMBERS).num_rows == 0
    assert pq.read_table(tmp_path / "out" / EVIDENCE).num_rows == 0
