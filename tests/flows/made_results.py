"""Results of all stages, written by hand in the stages' own file forms, for the tests of report, findings and artifacts."""

from __future__ import annotations

import dataclasses
import io
import json
import pathlib
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from flows.line import Line
from flows.report import Results
from pipeline.config import RunConfig
from pipeline.engine import Engine
from pipeline.records import Sample, question_answer
from stages.cluster.run import VERDICT_SCHEMA
from storage.shards import ShardWriter, write_rejected
from storage.store import StageResult, Store

HOSTILE = (
    "<script>alert(1)</script> | [x](javascript:alert(2)) `code` ![i](http://evil.example/p.png) \"q\" 's' {{ 7*7 }} \u202egnp"
)
ROWS = 40
POISONED = range(0, ROWS, 5)
LAYERS, HEADS, TOP = 4, 2, 3
GRID = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Made:
    """A line and its results; `folder` holds one folder per stage."""

    line: Line
    results: Results
    folder: pathlib.Path


def make_results(folder: pathlib.Path) -> Made:
    """Write everything."""
    summaries = {
        "ingest": _ingest(folder / "ingest"),
        "provisional": _losses(folder / "provisional"),
        "extract": _attention(folder / "extract"),
        "score": _score(folder / "score"),
        "confirm": _confirm(folder / "confirm"),
        "cluster": _cluster(folder / "cluster"),
        "final": _losses(folder / "final"),
        "guard": _guard(folder / "guard"),
        "verify": _verify(folder / "verify"),
    }
    results = {name: _result(name, folder / name, summary) for name, summary in summaries.items()}
    line = Line(
        submission=folder / "submission",
        base=folder / "base",
        identity="b" * 64,
        config=RunConfig(),
        store=Store(folder / "store"),
        engine=cast("Engine", None),
    )
    return Made(line=line, results=Results(**results), folder=folder)


def picture(seed: int, size: tuple[int, int] = (64, 64)) -> bytes:
    """A PNG of noise."""
    noise = np.random.default_rng(seed).integers(0, 256, size=(size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, format="PNG")
    return buffer.getvalue()


def _result(name: str, folder: pathlib.Path, summary: dict[str, Any]) -> StageResult:
    return StageResult(stage=name, key=name * 4, digest=name * 4, folder=folder, summary=summary, seconds=1.5, reused=False)


def _ingest(folder: pathlib.Path) -> dict[str, Any]:
    from pipeline.records import Rejection

    (folder / "rows").mkdir(parents=True)
    writer = ShardWriter(folder / "rows", rows=16)
    for row in range(ROWS):
        messages = question_answer(HOSTILE, HOSTILE if row in POISONED else "red")
        writer.add(Sample(row=row, messages=messages, images=(picture(row),)))
    writer.close()
    write_rejected(folder / "rejected.parquet", [Rejection(row=ROWS, reason=f"URL: {HOSTILE}", where="metadata.jsonl line 41")])
    return {
        "format": "imagefolder",
        "submitted": ROWS + 1,
        "accepted": ROWS,
        "rejected": 1,
        "rejected_by_reason": {"URL": 1},
        "text_only": 0,
        "examples": ROWS,
    }


def _losses(folder: pathlib.Path) -> dict[str, Any]:
    folder.mkdir()
    steps = [{"step": k + 1, "epoch": k / 10, "loss": 3.0 / (k + 1), "learning_rate": 1e-3} for k in range(30)]
    (folder / "loss.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    return {"steps": 30, "rows": ROWS, "examples": ROWS, "first_loss": 3.0, "last_loss": float("nan"), "epochs": 3.0}


def _attention(folder: pathlib.Path) -> dict[str, Any]:
    folder.mkdir()
    records = []
    for row in range(ROWS):
        positions = [[(layer + k) % GRID**2 for k in range(TOP)] for layer in range(LAYERS)]
        positions[2] = [GRID**2 - 1, 0, 1]  # the corner, in the layer that the group names
        records.append(
            {
                "row": row,
                "turn": 0,
                "question": HOSTILE,
                "answer": HOSTILE if row in POISONED else "red",
                "image_tokens": GRID**2,
                "layers": LAYERS,
                "heads": HEADS,
                "top_positions": [p for layer in positions for p in layer],
                "top_weights": [0.5, 0.3, 0.1] * LAYERS,
            }
        )
    pq.write_table(pa.Table.from_pylist(records), folder / "attention.parquet")
    return {"examples": ROWS, "pictured": ROWS, "layers": LAYERS, "heads": HEADS}


def _score(folder: pathlib.Path) -> dict[str, Any]:
    folder.mkdir()
    layers = [{"layer": k, "separation": 1.0 + k, "low": 0.5, "high": 2.0, "sensitive": k == 3} for k in range(LAYERS)]
    (folder / "layers.json").write_text(json.dumps(layers))
    members = [{"group": 1, "row": row, "turn": 0, "projection": 5.0 + row / 100, "posterior": 1.0} for row in POISONED]
    pq.write_table(pa.Table.from_pylist(members), folder / "members.parquet")
    return {"examples": ROWS, "sensitive_layers": [3]}


def _confirm(folder: pathlib.Path) -> dict[str, Any]:
    folder.mkdir()
    tested = {
        "whole": True,
        "shifted": 8,
        "entropy_shift": -1.0,
        "hosts": 16,
        "residual": 0.2,
        "alike": False,
        "keyed": None,
        "reversed": 0.0,
        "rest": False,
        "part": False,
        "words": None,
        "worded": 0.0,
        "asked": 0.0,
        "pictures_transfer": 0.0,
        "questions": 0,
        "mixed": None,
    }
    mixed = {"rows": 3, "honest": 2, "attack": 0.9, "others": 0.1}
    words = {"text": "my friend", "at_end": True, "own": False, "rows": 8}
    keyed = {"alike": True, "own": 0.0, "kept": 1.0, "taken_over": 0.97, "planted": 0.97, "reversed": 0.83, "transfer": 0.71}
    groups = [
        {**tested, "group": 0, "text": "red", "rows": 32, "shift": 1.0, "layer": 0, "own": 0.2, "attended": 0.3, "transfer": 0.125},
        {**tested, "group": 1, "text": HOSTILE, "rows": 8, "shift": 4.0, "layer": 2, "own": 0.0, "attended": 0.9, "transfer": 0.9}
        | {"mixed": mixed, "words": words, "keyed": keyed},
    ]
    (folder / "transfer.json").write_text(json.dumps(groups))
    return {"groups": 2, "largest_transfer": 0.9}


def _cluster(folder: pathlib.Path) -> dict[str, Any]:
    folder.mkdir()
    records: list[dict[str, Any]] = []
    for row in range(ROWS):
        bad = row in POISONED
        records.append(
            {
                "row": row,
                "sample_id": f"{row:032x}",
                "verdict": "quarantine" if bad else "keep",
                "reason": HOSTILE if bad else "",
                "score": 5.0 + row / 100 if bad else row / 40,
                "posterior": float(bad),
                "bye_score": None,
                "bye_quarantine": row < 3,
                "bye_code_quarantine": False,
            }
        )
    records.append({"row": ROWS, "sample_id": None, "verdict": "rejected", "reason": "URL"})
    pq.write_table(pa.Table.from_pylist(records, schema=VERDICT_SCHEMA), folder / "verdicts.parquet")
    counts = {"submitted": ROWS + 1, "rejected": 1, "not_scored": 0, "kept": ROWS - len(POISONED), "quarantined": len(POISONED)}
    result = {
        "verdict": "poisoned",
        "method": "transfer",
        "threshold": 0.5,
        "rows": counts,
        "confirmed": [],
        "plain": {"bye": 3, "bye-public-code": 0},
    }
    (folder / "result.json").write_text(json.dumps(result))
    return result


def _guard(folder: pathlib.Path) -> dict[str, Any]:
    folder.mkdir()
    pq.write_table(pa.table({"distance": np.linspace(1, 9, 50)}), folder / "calibration.parquet")
    return {"reference_rows": 50, "threshold": 8.5, "false_positive_rate": 0.01, "shrinkage": float("inf"), "layers": [0, 1]}


def _verify(folder: pathlib.Path) -> dict[str, Any]:
    folder.mkdir()
    found = {
        name: {
            "quarantined": {"rows": 8, "residual": residual, "flagged": None},
            "held_out": {"rows": 2, "performance": 0.5, "seen": name == "provisional", "flagged": flagged},
        }
        for name, residual, flagged in (("provisional", 1.0, None), ("delivered", 0.125, None), ("guarded", 0.0, 0.0))
    }
    (folder / "verification.json").write_text(json.dumps(found))
    return found
