"""Suite `cost`: what its cells are, what a run of the whole line gives, and what the tables say of known figures."""

from __future__ import annotations

import pathlib
import sys
from typing import Any

import pandas as pd
import pytest

from benchmarks import __main__ as command
from benchmarks import cost
from benchmarks.bench import Cell, Setting, Suite, run_config
from benchmarks.cost import COST, ENGINE, PLAIN, RECORDS, WHOLE
from flows.line import STAGES, Line
from flows.report import Results
from flows.sanitize import deliver_results
from pipeline.config import RunConfig


def setting(out: pathlib.Path, base: pathlib.Path, *, rows: int = 0, quick: bool = False) -> Setting:
    return Setting(out=out, base=base, data="demo", rows=rows, test_rows=2, epochs=1, quick=quick)


def test_cells() -> None:
    place = pathlib.Path("out")
    cells = COST.grid(setting(place, place), (0, 1))
    assert {(c.fields["rows"], c.fields["workers"], c.fields["submission"]) for c in cells} == {
        (rows, workers, submission) for rows in (1000, 3000, 10_000) for workers in (1, 2) for submission in ("poisoned", "clean")
    }
    assert len({cell.name for cell in cells}) == len(cells) == 2 * 12
    assert {cell.fields["rows"] for cell in COST.grid(setting(place, place, rows=500), (0,))} == {500}
    (cell,) = COST.grid(setting(place, place, quick=True), (0,))
    assert int(cell.fields["rows"]) < 100


@pytest.mark.parametrize("workers", [1, 2])
def test_a_cell_runs_on_as_many_workers_of_one_thread(workers: int) -> None:
    place = pathlib.Path("out")
    config = cost.configuration(setting(place, place), 7, workers)
    assert (config.engine.kind, config.engine.workers, config.engine.threads) == ("ray", workers, 1)
    assert config.model_copy(update={"engine": RunConfig().engine}) == run_config(setting(place, place), 7).model_copy(
        update={"engine": RunConfig().engine}
    )


@pytest.mark.parametrize(
    ("suite", "given", "rows"),
    [("cost", [], 0), ("cost", ["--quick"], 0), ("cost", ["--rows", "500"], 500), ("clean", [], 2800), ("clean", ["--quick"], 120)],
)
def test_rows_of_the_command_line(
    suite: str, given: list[str], rows: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Setting] = []

    def run(_suite: Suite, setting: Setting, *_: Any, **__: Any) -> list[str]:
        told.append(setting)
        return []

    monkeypatch.setattr(command, "run_suite", run)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "run", suite, "--out", str(tmp_path), *given])
    command.main()
    assert [one.rows for one in told] == [rows]


@pytest.fixture
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The local engine in the place of Ray: it starts in no time, and the line is the same."""
    monkeypatch.setattr(cost, "configuration", lambda setting, seed, _workers: run_config(setting, seed))


@pytest.mark.slow
@pytest.mark.usefixtures("_in_this_process")
def test_a_cell_in_miniature(tmp_path: pathlib.Path, tiny_base: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Results] = []
    left = tmp_path / "work/run/store/left-by-a-killed-run"
    left.mkdir(parents=True)

    def deliver(run: Line, results: Results, out: pathlib.Path) -> dict[str, Any]:
        seen.append(results)
        assert not left.exists()
        return deliver_results(run, results, out)

    monkeypatch.setattr(cost, "deliver_results", deliver)
    told = setting(tmp_path, tiny_base, quick=True)
    (cell,) = COST.grid(told, (0,))
    records = list(COST.measure(cell, told, tmp_path / "work", RECORDS))
    (results,) = seen
    removed = results.cluster.summary["rows"]["quarantined"]
    assert [result.stage for result in results.all() if result.reused] == ([] if removed else ["final"])
    assert not (tmp_path / "work/run").exists()
    assert tuple(record["stage"] for record in records) == RECORDS
    found = {record["stage"]: record for record in records}
    assert found[PLAIN] == {**found["provisional"], "stage": PLAIN}
    assert found[WHOLE]["seconds"] == pytest.approx(sum(found[name]["seconds"] for name in (ENGINE, *STAGES)), abs=0.01)
    assert found[WHOLE]["processor"] == pytest.approx(sum(found[name]["processor"] for name in (ENGINE, *STAGES)), abs=0.01)
    assert found["provisional"]["processor"] > 0.5
    assert found[WHOLE]["memory"] == max(found[name]["memory"] for name in (ENGINE, *STAGES)) > 200e6
    assert found["provisional"]["seconds"] >= results.provisional.seconds


def records_of(cell: Cell, **seconds: float) -> list[dict[str, Any]]:
    """Records of a cell; the whole line takes 2 GiB, all else 1."""
    names = {"plain": PLAIN, "whole": WHOLE}
    return [
        {
            **cell.fields,
            "stage": names.get(name, name),
            "seconds": value,
            "processor": 2 * value,
            "memory": (1 + (name == "whole")) * 2**30,
        }
        for name, value in seconds.items()
    ]


def test_tables_of_known_figures() -> None:
    place = pathlib.Path("out")
    cells = [
        cell
        for cell in COST.grid(setting(place, place), (0, 1))
        if cell.fields["rows"] != 10_000 and cell.fields["workers"] == 2 and cell.fields["submission"] == "poisoned"
    ]
    records = []
    for cell in cells:
        scale = float(cell.fields["rows"]) / 1000 * (1 + float(cell.fields["seed"]))
        records += records_of(cell, extract=3 * scale, plain=10 * scale, whole=20 * scale)
    text = cost.report(pd.DataFrame.from_records(records))
    assert (
        "| poisoned | 2 | 2.00 ± 0.00 | 2.00 ± 0.00 | 2.00 ± 0.00 | 2.00 ± 0.00 |" in text
    )  # fine-tunes, the same for either seed
    assert "| poisoned | 2 | 3.00 ± 0.00 | 1.00 ± 0.00 |" in text  # 3000 rows against 1000: seconds, memory
    stage = next(row for row in text.splitlines() if row.startswith("| extract |"))
    small, large = (
        f"{seconds} | 0.30 ± 0.00 | {processor} | 0.30 ± 0.00 | 1.00 ± 0.00"
        for seconds, processor in (("4.5 ± 19.1", "9.0 ± 38.1"), ("13.5 ± 57.2", "27.0 ± 114.4"))
    )
    assert stage == f"| extract | {small} | {large} |"
    assert "| ingest | - | - | - |" in text
