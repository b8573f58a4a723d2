"""The main job's measurement in miniature, from its command line to its cells: what is compared with what, and once only."""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import yaml

from benchmarks import main_job
from flows.line import STAGES
from flows.poison import read_truth
from stages.verify.evaluate import evaluate
from stages.verify.run import Candidate

ROWS, TEST_ROWS, RATE = 64, 6, 0.125
CONFIG = {
    "finetune": {"epochs": 1, "batch_size": 16},
    "score": {"candidates": 1},
    "confirm": {"hosts": 16, "max_new_tokens": 2},
    "cluster": {"removal_cap": 1.0},
    "guard": {"reference_rows": 60},
    "verify": {"max_new_tokens": 2},
    "engine": {"kind": "local", "threads": 1},
}
MODELS = {
    "provisional": "provisional",
    "delivered": "final",
    "guarded": "final",
    "provisional_guarded": "provisional",
    "oracle": "oracle",
}
"""The fine-tune of each measured model."""
CELL = f"badnet-{RATE}-a_secret"


class Measured:
    """A finished measurement: its folder, what was evaluated, and a way to run it again."""

    def __init__(self, folder: pathlib.Path, base: pathlib.Path) -> None:
        self.folder = folder
        self.base = base
        self.evaluated: dict[str, Any] = {}
        (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))

    def run(self, patch: pytest.MonkeyPatch, *more: str) -> None:
        patch.setattr(main_job, "evaluate", self.watched)
        given: Sequence[object] = [
            *("--out", self.folder / "out", "--seeds", 2, "--rows", ROWS, "--test-rows", TEST_ROWS, "--rate", RATE),
            *("--target", "a secret", "--base", self.base, "--config", self.folder / "config.yaml"),
        ]
        patch.setattr(sys, "argv", ["main_job", *map(str, given), *more])
        main_job.main()

    def watched(self, candidate: Candidate, **given: Any) -> dict[str, Any]:
        self.evaluated[given["scratch"].name] = {**given, "candidate": candidate}
        return evaluate(candidate, **given)

    def cell(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "out/seed-2" / f"{name}.json").read_text())
        return found

    def manifest(self, stage: str) -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in (self.folder / "out/seed-2/store" / stage).glob("*/manifest.json")]


@pytest.fixture(scope="module")
def measured(tiny_base: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """A group is said to transfer, whatever it does: without removed rows there would be no final fine-tune."""
    found = Measured(tmp_path_factory.mktemp("measured"), tiny_base)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stages.confirm.outcome.transfer", lambda *_, **__: 1.0)
        patch.setattr("stages.confirm.outcome.beyond_honest", lambda *_: 1.0)
        patch.setattr("stages.cluster.decide._REVERSED", 0.0)
        found.run(patch)
    return found


pytestmark = pytest.mark.slow


def test_the_cells(measured: Measured) -> None:
    poisoned, clean = measured.cell(CELL), measured.cell("clean")
    for method in (poisoned["detection"], *poisoned["plain"].values()):
        assert set(method) >= {"precision", "recall", "f1", "removed"}
    for name in MODELS:
        found = poisoned[name]
        assert (found["rows"], found["triggered_rows"]) == (TEST_ROWS, TEST_ROWS)
        assert all(0 <= found[share] <= 1 for share in ("clean", "asr"))
        assert (found["flagged"] is not None) == ("guarded" in name)
    assert {group["text"] for group in poisoned["groups"]} == {"a secret"}
    assert set(poisoned["seconds"]) == {*STAGES} - {"verify", "delivery"}
    assert {"default", "bye_quarantine", "bye_code_quarantine", "groups"} == set(clean)
    assert all(0 <= clean[name] <= 1 for name in ("default", "bye_quarantine", "bye_code_quarantine"))


def test_what_is_compared(measured: Measured) -> None:
    """Each model is the one that its name says, on one test, with the attack's trigger and target."""
    assert list(measured.evaluated) == list(MODELS)
    adapters = {entry["key"][:32]: entry["digest"] for stage in set(MODELS.values()) for entry in measured.manifest(stage)}
    calibrated = {entry["key"][:32]: entry["inputs"]["adapter"] for entry in measured.manifest("guard")}
    for name, tuned in MODELS.items():
        given = measured.evaluated[name]
        adapter, guard = given["candidate"].adapter.parent, given["candidate"].guard
        assert adapter.parent.name == tuned
        assert (guard is not None) == ("guarded" in name)
        assert guard is None or calibrated[guard.name] == adapters[adapter.name]
        assert (given["target"], given["seed"], given["base"]) == ("a secret", 2, measured.base.resolve())
    assert len({given["rows"] for given in measured.evaluated.values()}) == 1
    assert {entry["summary"]["submitted"] for entry in measured.manifest("ingest")} == {ROWS, TEST_ROWS}


def test_the_oracle_is_tuned_on_the_clean_rows_and_only_it_knows_them(measured: Measured) -> None:
    truth = read_truth(measured.folder / "out/seed-2" / CELL / "truth.jsonl")
    assert len(truth) == ROWS * RATE
    (oracle,) = measured.manifest("oracle")
    assert oracle["summary"]["rows"] == ROWS - len(truth)
    assert {entry["summary"]["rows"] for entry in measured.manifest("provisional")} == {ROWS}
    for path in (measured.folder / "out/seed-2/store").rglob("*"):
        assert "truth" not in path.name
        assert path.suffix not in {".json", ".jsonl"} or 'poisoned":' not in path.read_text().replace(" ", "")


def test_finished_cells_are_found_again(
    measured: Measured, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unwanted(*_: Any, **__: Any) -> Any:
        raise AssertionError("done again")

    for name in ("measure_poisoned", "measure_clean", "poison"):
        monkeypatch.setattr(main_job, name, unwanted)
    measured.run(monkeypatch)
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[0].rpartition("/")[2] for line in told[:2]] == [f"{CELL}.json", "clean.json"]
    assert "groups" not in told[0]
    measured.run(monkeypatch, "--skip-clean")
    assert "clean.json" not in capsys.readouterr().out
    measured.run(monkeypatch, "--skip-poisoned")
    assert f"{CELL}.json" not in capsys.readouterr().out


def test_the_table_has_every_cell_and_its_mean(tmp_path: pathlib.Path) -> None:
    model = {"clean": 0.5, "asr": 0.25, "flagged": 0.0, "triggered_flagged": 1.0, "triggered_right": 0.75}
    for seed, f1 in ((0, 1.0), (1, 0.5)):
        folder = tmp_path / f"seed-{seed}"
        folder.mkdir()
        cell = {"detection": {"f1": f1}, "plain": {"bye": {"f1": 0.1}}, **dict.fromkeys(MODELS, model)}
        (folder / "badnet-0.1-x.json").write_text(json.dumps(cell))
        (folder / "clean.json").write_text(json.dumps({"default": 0.01 * seed, "bye_quarantine": 0.5, "bye_code_quarantine": 0.0}))
    lines = main_job.table(tmp_path).splitlines()
    assert lines[0] == "badnet-0.1-x"
    assert "| F1 | 1 | 0.5 | 0.75 |" in lines
    assert "| F1 bye | 0.1 | 0.1 | 0.1 |" in lines
    assert "| provisional_guarded triggered inputs answered right % | 75 | 75 | 75 |" in lines
    assert lines[lines.index("clean: % of rows removed") + 2] == "| | seed-0 | seed-1 | mean |"
    assert "| default | 0 | 1 | 0.5 |" in lines


def test_an_unfinished_cell_goes_on_from_the_store(measured: Measured, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stages are not done again."""
    path = measured.folder / "out/seed-2/clean.json"
    before = path.read_text()
    path.unlink()
    from flows import engines

    def no_engine(*_: Any) -> Any:
        raise AssertionError("an engine was started")

    monkeypatch.setattr(engines, "open_engine", no_engine)
    measured.run(monkeypatch)
    assert path.read_text() == before
