"""The demonstration: its measures, its places, and the whole of it on the tiny base."""

from __future__ import annotations

import io
import json
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from flows import demo
from flows.demo import demo_table, detection, detections, run_demo
from pipeline.config import RunConfig
from pipeline.errors import ConfigError
from storage.delivery import verify_delivery


@pytest.mark.parametrize(
    ("removed", "poisoned", "expected"),
    [
        ({1, 2}, {1, 2}, (1.0, 1.0, 1.0)),
        ({1, 2, 3, 4}, {1, 2}, (0.5, 1.0, 2 / 3)),
        ({1}, {1, 2}, (1.0, 0.5, 2 / 3)),
        ({3}, {1}, (0.0, 0.0, 0.0)),
        (set(), {1}, (0.0, 0.0, 0.0)),
        ({1}, set(), (0.0, 0.0, 0.0)),
        (set(), set(), (1.0, 1.0, 1.0)),
    ],
)
def test_detection(removed: set[int], poisoned: set[int], expected: tuple[float, float, float]) -> None:
    found = detection(removed, poisoned)
    assert (found["precision"], found["recall"], found["f1"]) == pytest.approx(expected)
    assert found["removed"] == len(removed)


def test_detections_read_the_verdicts_of_all_methods(tmp_path: pathlib.Path) -> None:
    table = pa.table(
        {
            "row": [0, 1, 2, 3],
            "verdict": ["quarantine", "keep", "quarantine", "rejected"],
            "bye_quarantine": [False, True, True, None],
            "bye_code_quarantine": [False, False, False, None],
        }
    )
    pq.write_table(table, tmp_path / "verdicts.parquet")
    found = detections(tmp_path / "verdicts.parquet", {0, 2})
    assert found["detection"]["f1"] == 1.0
    assert found["plain"]["bye"]["f1"] == 0.5
    assert found["plain"]["bye-public-code"]["removed"] == 0


def test_a_folder_with_something_else_is_refused(tmp_path: pathlib.Path, quick: RunConfig) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="no demonstration"):
        run_demo(tmp_path, rows=100, seed=0, base=None, config=quick)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_server")
def test_the_whole_demonstration(
    tmp_path: pathlib.Path, tiny_base: pathlib.Path, quick: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "TEST_ROWS", 24)
    out = tmp_path / "demo"
    found = run_demo(out, rows=100, seed=2, base=tiny_base, config=quick.model_copy(update={"seed": 2}))
    assert json.loads((out / "demo.json").read_text()) == found
    assert set(found["detection"]) >= {"precision", "recall", "f1"}
    assert set(found["plain"]) == {"bye", "bye-public-code"}
    for model in ("provisional", "delivered", "guarded"):
        assert 0 <= found[model]["clean"] <= 1
        assert 0 <= found[model]["asr"] <= 1
        assert found[model]["rows"] == 24
    assert found["guarded"]["guarded"] is True
    assert found["provisional"]["flagged"] is None
    assert all(np.isfinite(list(found["seconds"].values())))
    assert verify_delivery(out / "delivery")["rows"]
    assert not [path for path in (out / "delivery").rglob("*") if "truth" in path.name]
    text = io.StringIO()
    Console(file=text, width=120).print(*demo_table(found))
    assert "attack success rate" in text.getvalue()
    again = run_demo(out, rows=100, seed=2, base=tiny_base, config=quick.model_copy(update={"seed": 2}))
    assert {**again, "seconds": None} == {**found, "seconds": None}
