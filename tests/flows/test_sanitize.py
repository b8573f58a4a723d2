"""The flow, whole: on the tiny base in this process, against a temporary Prefect server."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import shutil
from typing import Any

import pyarrow.parquet as pq
import pytest

import byesight
import flows.engines
from flows.engines import LazyEngine
from flows.line import STAGES, Line
from flows.poison import read_truth
from flows.progress import listening
from flows.sanitize import Sanitized, engine_died, is_engine_death, run_sanitize, stage_task
from pipeline.config import CanaryConfig, RunConfig
from pipeline.errors import ConfigError, ModelError, RemovalCapError, StageError
from storage.delivery import verify_delivery
from storage.store import StageResult, Store
from tests.flows.conftest import ROWS

pytestmark = pytest.mark.usefixtures("prefect_server")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run: what it gave, and what was told on the way."""

    sanitized: Sanitized
    heard: list[tuple[str, float, str]]
    folder: pathlib.Path


@pytest.fixture(scope="module")
def run(
    prefect_server: None,
    poisoned: pathlib.Path,
    tiny_base: pathlib.Path,
    quick: RunConfig,
    tmp_path_factory: pytest.TempPathFactory,
) -> Run:
    folder = tmp_path_factory.mktemp("run")
    heard: list[tuple[str, float, str]] = []
    with listening(lambda *event: heard.append(event)):
        sanitized = run_sanitize(poisoned / "submission", folder / "delivery", base=tiny_base, config=quick, store=folder / "store")
    return Run(sanitized=sanitized, heard=heard, folder=folder)


def files(folder: pathlib.Path) -> dict[str, str]:
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def test_delivery_is_whole_and_counts_add_up(run: Run, poisoned: pathlib.Path) -> None:
    manifest = verify_delivery(run.sanitized.delivery)
    rows = run.sanitized.rows
    assert rows["submitted"] == ROWS == sum(rows[name] for name in ("rejected", "not_scored", "kept", "quarantined"))
    report = json.loads((run.sanitized.delivery / "report.json").read_text())
    assert report["rows"] == rows
    assert report["verdict"] == run.sanitized.verdict
    assert report["digests"] == {name: result.digest for name, result in run.sanitized.results.items()}
    assert manifest["facts"]["base"] == report["base"]
    assert {"adapter/guard.json", "adapter/guard.safetensors", "report.html", "quarantine/verdicts.parquet"} <= set(
        manifest["files"]
    )
    submitted = (poisoned / "submission" / "metadata.jsonl").read_bytes().splitlines()
    verdicts = pq.read_table(run.sanitized.delivery / "quarantine" / "verdicts.parquet").to_pylist()
    kept = [submitted[verdict["row"]] for verdict in verdicts if verdict["verdict"] in ("keep", "not_scored")]
    assert (run.sanitized.delivery / "dataset" / "metadata.jsonl").read_bytes().splitlines() == kept


def test_no_place_of_this_machine_and_no_truth_in_it(run: Run, poisoned: pathlib.Path) -> None:
    for name in files(run.sanitized.delivery):
        if name.endswith((".json", ".jsonl", ".html")):
            text = (run.sanitized.delivery / name).read_text()
            for place in (run.folder, poisoned, pathlib.Path.home()):
                assert str(place) not in text, name
    assert read_truth(poisoned / "truth.jsonl")
    for path in (run.folder / "store").rglob("*"):
        assert "truth" not in path.name
        assert path.suffix != ".jsonl" or b"poisoned" not in path.read_bytes()


def test_every_stage_told_its_progress(run: Run) -> None:
    stages = list(dict.fromkeys(stage for stage, _, _ in run.heard))
    assert stages == ["prefect", *STAGES]
    for stage in STAGES:
        shares = [share for name, share, _ in run.heard if name == stage]
        assert shares[0] == 0
        assert shares[-1] == 1


def test_artifacts_reached_the_server(run: Run) -> None:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        artifacts = client.request("POST", "/artifacts/filter", json={}).json()
        flow_runs = client.request("POST", "/flow_runs/filter", json={}).json()
        task_runs = client.request("POST", "/task_runs/filter", json={}).json()
    keys = {artifact["key"] for artifact in artifacts}
    shown = {"ingest", "provisional-loss", "layers", "candidates", "scores", "quarantine", "final-loss", "guard", "verification"}
    assert shown | {"delivery"} <= keys
    assert {f"{stage}-progress" for stage in STAGES if stage != "delivery"} <= keys
    assert all(len(str(artifact["data"])) < 200_000 for artifact in artifacts)
    assert "COMPLETED" in {flow_run["state_type"] for flow_run in flow_runs}
    assert {task_run["name"].rpartition("-")[0] for task_run in task_runs} >= set(STAGES)
    assert run.sanitized.verdict


def test_a_rerun_repeats_nothing_and_gives_the_same_bytes(
    run: Run, poisoned: pathlib.Path, tiny_base: pathlib.Path, quick: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_engine(*_: Any) -> Any:
        raise AssertionError("an engine was started")

    before = files(run.sanitized.delivery)
    monkeypatch.setattr(flows.engines, "open_engine", no_engine)
    again = run_sanitize(poisoned / "submission", run.folder / "delivery", base=tiny_base, config=quick, store=run.folder / "store")
    assert all(result.reused for result in again.results.values())
    assert files(again.delivery) == before
    assert again.seconds == run.sanitized.seconds


@pytest.mark.slow
def test_canaries_are_measured_and_not_delivered(
    run: Run, poisoned: pathlib.Path, tiny_base: pathlib.Path, quick: RunConfig
) -> None:
    config = quick.model_copy(update={"canary": CanaryConfig(share=0.1)})
    out = run.folder / "with-canaries"
    found = run_sanitize(poisoned / "submission", out, base=tiny_base, config=config, store=run.folder / "store")
    assert found.results["ingest"].reused
    assert found.results["canary"].summary == {"canaries": 8, "triggers": ["badnet"]}
    assert found.results["provisional"].summary["rows"] == ROWS + 8
    assert found.results["final"].summary["rows"] <= ROWS
    (kind,) = json.loads((out / "report.json").read_text())["canaries"]
    assert (kind["trigger"], kind["rows"]) == ("badnet", 8)
    assert kind["found"] in (0, 8), "canaries share one answer and go together, or stay"
    assert found.rows["submitted"] == ROWS == sum(found.rows[name] for name in ("rejected", "not_scored", "kept", "quarantined"))
    assert pq.read_table(out / "quarantine" / "verdicts.parquet")["row"].to_pylist() == list(range(ROWS))
    for name in files(out):
        if name.startswith(("dataset", "quarantine")) and name.endswith(".jsonl"):
            assert kind["answer"] not in (out / name).read_text()
    verify_delivery(out)


def test_the_engine_is_in_no_key(
    run: Run, poisoned: pathlib.Path, tiny_base: pathlib.Path, quick: RunConfig, tmp_path: pathlib.Path
) -> None:
    other = quick.model_copy(update={"engine": quick.engine.model_copy(update={"kind": "ray", "workers": 7})})
    again = run_sanitize(poisoned / "submission", tmp_path / "out", base=tiny_base, config=other, store=run.folder / "store")
    assert all(result.reused for result in again.results.values())
    assert (again.delivery / "report.json").read_bytes() == (run.sanitized.delivery / "report.json").read_bytes()


def test_a_refusal_of_a_stage_reaches_the_caller_and_delivers_nothing(
    run: Run,
    poisoned: pathlib.Path,
    tiny_base: pathlib.Path,
    quick: RunConfig,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import stages.cluster.run

    def refuse(**_: Any) -> Any:
        raise RemovalCapError("too many rows")

    monkeypatch.setattr(stages.cluster.run, "run", refuse)
    shutil.copytree(run.folder / "store", tmp_path / "store", ignore=shutil.ignore_patterns("cluster"))
    with pytest.raises(RemovalCapError, match="too many rows"):
        run_sanitize(poisoned / "submission", tmp_path / "out", base=tiny_base, config=quick, store=tmp_path / "store")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "store" / "cluster").exists() or not list((tmp_path / "store" / "cluster").iterdir())


def test_refused_before_prefect_is_started(
    poisoned: pathlib.Path, tiny_base: pathlib.Path, quick: RunConfig, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    heard: list[str] = []
    with listening(lambda stage, *_: heard.append(stage)):
        with pytest.raises(ConfigError, match="no delivery"):
            byesight.sanitize(poisoned / "submission", tmp_path / "taken", base=tiny_base, config=quick)
        with pytest.raises(ModelError):
            byesight.sanitize(poisoned / "submission", tmp_path / "out", base=tmp_path, config=quick)
        with pytest.raises(byesight.SubmissionError):
            byesight.sanitize(tmp_path / "nothing", tmp_path / "out", base=tiny_base, config=quick)
    assert heard == []


def died() -> StageError:
    """An error as the engine raises it when Ray's workers die."""
    cause = type("ActorDiedError", (Exception,), {"__module__": "ray.exceptions"})("gone")
    error = StageError("a worker died")
    error.__cause__ = cause
    return error


def test_only_an_engine_death_is_tried_again() -> None:
    from prefect import flow

    calls: list[str] = []

    @stage_task("dies once")
    def dies_once() -> str:
        calls.append("dies")
        if calls.count("dies") == 1:
            raise died()
        return "done"

    @stage_task("refuses")
    def refuses() -> str:
        calls.append("refuses")
        raise StageError("the loss is nan")

    @flow
    def both() -> str:
        result = dies_once()
        with pytest.raises(StageError, match="the loss is nan"):
            refuses()
        return result

    assert both() == "done"
    assert calls == ["dies", "dies", "refuses"]


def test_what_an_engine_death_is() -> None:
    from prefect.states import Failed

    assert is_engine_death(died())
    assert engine_died(None, None, Failed(data=died()))  # type: ignore[arg-type]
    for error in (StageError("x"), ValueError("x"), None):
        assert not is_engine_death(error)
    assert not is_engine_death(RemovalCapError("x"))


def test_a_new_engine_after_a_death(run: Run, quick: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows import sanitize as module

    closed: list[bool] = []
    monkeypatch.setattr(LazyEngine, "close", lambda _self: closed.append(True))
    line = Line(
        submission=run.folder,
        base=run.folder,
        identity="",
        config=quick,
        store=Store(run.folder / "other"),
        engine=LazyEngine(quick.engine),
    )

    def dies() -> StageResult:
        raise died()

    def refuses() -> StageResult:
        raise StageError("no")

    with pytest.raises(StageError, match="a worker died"):
        module._perform(line, "extract", dies)
    assert closed == [True]
    with pytest.raises(StageError, match="no"):
        module._perform(line, "extract", refuses)
    assert closed == [True]


def test_broken_artifacts_do_not_fail_the_run(
    run: Run,
    poisoned: pathlib.Path,
    tiny_base: pathlib.Path,
    quick: RunConfig,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import prefect.artifacts

    from flows import artifacts, sanitize

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no artifacts today")

    monkeypatch.setattr(prefect.artifacts, "create_markdown_artifact", broken)
    monkeypatch.setattr(sanitize, "create_progress_artifact", broken)
    monkeypatch.setattr(artifacts, "verification_markdown", broken)
    again = run_sanitize(poisoned / "submission", tmp_path / "out", base=tiny_base, config=quick, store=run.folder / "store")
    assert verify_delivery(again.delivery)["rows"]


def test_a_finished_delivery_counts_even_if_prefect_was_not_told(
    run: Run,
    poisoned: pathlib.Path,
    tiny_base: pathlib.Path,
    quick: RunConfig,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from flows import sanitize as module

    whole = module.sanitize.fn

    def loses_the_server(**given: Any) -> None:
        whole(**given)
        raise ConnectionError("Prefect is gone")

    monkeypatch.setattr(module, "sanitize", loses_the_server)
    again = run_sanitize(poisoned / "submission", tmp_path / "out", base=tiny_base, config=quick, store=run.folder / "store")
    assert verify_delivery(again.delivery)["rows"]
    assert "Prefect is gone" in caplog.text
