"""The command line: exit codes, messages without tracebacks, and the whole way as a user starts it."""

from __future__ import annotations

import json
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner, Result

from flows.cli import _interrupted, app
from flows.poison import read_truth
from flows.sanitize import Sanitized
from pipeline import __version__
from pipeline.config import RunConfig, load_config
from pipeline.errors import ConfigError
from pipeline.triggers import TRIGGERS
from storage.delivery import verify_delivery
from storage.manifests import hash_folder
from tests.flows.conftest import ROWS, TARGET
from tests.storage import deliveries

ROOT = pathlib.Path(__file__).parents[2]
COMMANDS = ("sanitize", "poison", "finetune", "evaluate", "verify", "restore", "demo")


def call(*arguments: str | pathlib.Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(result: Result, *parts: str) -> None:
    assert result.exit_code == 1, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("byesight: ")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.output
    assert all(part in result.stderr for part in parts), result.stderr


@pytest.fixture
def config_file(quick: RunConfig, tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(quick.model_dump(mode="json")))
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str) -> None:
    result = call(command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.output
    assert command in call("--help").output


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['byesight', '--help']\n"
        "from flows.cli import main\n"
        "try: main()\nexcept SystemExit as end: assert not end.code\n"
        "print([name for name in ('torch', 'ray', 'prefect', 'transformers') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip().endswith("[]")


def test_the_version() -> None:
    assert call("--version").stdout == f"{__version__}\n"


@pytest.mark.parametrize(
    "arguments", [["sanitize"], ["nothing"], ["poison", "x", "--rate", "much"], ["restore", "x"], ["demo", "--rows", "3"]]
)
def test_wrong_usage_is_two(arguments: list[str]) -> None:
    assert call(*arguments).exit_code == 2


@pytest.mark.parametrize(
    ("option", "key", "taken", "refused"),
    [
        ("--seed", "seed", ["0", "2147483647"], ["-1", "2147483648", "x"]),
        ("--workers", "engine.workers", ["1", "1024"], ["1025", "x"]),
        ("--engine", "engine.kind", ["ray", "local"], ["quantum"]),
        ("--format", "ingest.format", ["imagefolder", "llava", "parquet"], ["tarball"]),
        ("--epochs", "finetune.epochs", ["0.001", "100"], ["0", "-1", "100.5", "nan", "inf", "x"]),
    ],
)
def test_an_option_takes_what_the_configuration_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, option: str, key: str, taken: list[str], refused: list[str]
) -> None:
    """And a value that it doesn't take is refused by the option's name."""
    import byesight
    from flows import demo

    configs: list[RunConfig] = []

    def ends(*_: Any, config: RunConfig, **__: Any) -> Any:
        configs.append(config)
        raise ConfigError("that will do")

    monkeypatch.setattr(byesight, "sanitize", ends)
    monkeypatch.setattr(demo, "run_demo", ends)
    command = ["demo"] if option == "--epochs" else ["sanitize", str(tmp_path)]
    for value in taken:
        assert "that will do" in call(*command, "--out", tmp_path / "out", option, value).stderr
        section, _, name = key.rpartition(".")
        found = getattr(getattr(configs[-1], section) if section else configs[-1], name)
        assert found == type(found)(value)
        assert type(found) in (int, float, str)
    for value in refused:
        result = call(*command, "--out", tmp_path / "out", option, value)
        assert result.exit_code == 2
        assert f"'{option}'" in result.stderr
        with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
            load_config(None, **({section: {name: value}} if section else {name: value}))


@pytest.mark.parametrize("command", ["poison", "evaluate"])
def test_help_names_all_triggers(command: str) -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    (option,) = (option for option in commands[command].params if option.name == "trigger")
    assert re.findall(r"[\w-]+", option.help.rpartition(": ")[2].replace(" or ", ", ")) == list(TRIGGERS)


def test_figures_that_cannot_be_written_are_printed(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    from flows import single
    from storage import atomic

    def full(path: pathlib.Path, _: bytes) -> None:
        raise OSError(28, "No space left on device", str(path))

    figures = tmp_path / "new" / "figures.json"
    monkeypatch.setattr(single, "evaluate_model", lambda *_, **__: {"clean": 0.5, "rows": 7, "asr": math.nan})
    arguments: list[str | pathlib.Path] = ["evaluate", tmp_path, "--data", tmp_path, "--json"]
    assert call(*arguments, figures).exit_code == 0
    assert json.loads(figures.read_text()) == {"clean": 0.5, "rows": 7, "asr": None}
    monkeypatch.setattr(atomic, "write_file", full)
    result = call(*arguments, figures)
    refused(result, f"No space left on device: {figures}")
    assert "clean: 0.5000\nrows: 7\n" in result.stdout
    monkeypatch.setattr(single, "evaluate_model", lambda *_, **__: pytest.fail("it is told before"))
    refused(call(*arguments, figures / "inner.json"), f"--json {figures / 'inner.json'}: nothing can be written into {figures}")


def test_refusals_of_each_command(tmp_path: pathlib.Path, tiny_base: pathlib.Path, poisoned: pathlib.Path) -> None:
    submission, out, store = poisoned / "submission", tmp_path / "out", tmp_path / "store"
    (tmp_path / "unknown.yaml").write_text("finetune: {epoch: 1}\n")
    attack: list[str | pathlib.Path] = ["--trigger", "badnet", "--rate", "0.1", "--target", "t", "--out", out]
    refused(call("sanitize", tmp_path / "nothing", "--out", out, "--base", tiny_base), "nothing")
    refused(call("sanitize", submission, "--out", out, "--base", tmp_path), "safetensors")
    refused(call("sanitize", submission, "--out", submission, "--base", tiny_base), "--out")
    refused(call("sanitize", submission, "--out", out, "--config", tmp_path / "unknown.yaml"), "finetune.epoch")
    refused(call("sanitize", submission, "--out", out, "--config", tmp_path / "missing.yaml"), "missing.yaml")
    refused(call("poison", submission, *attack, "--trigger", "nothing"), "nothing")
    refused(call("poison", tmp_path / "nothing", *attack), "nothing")
    refused(call("finetune", submission, "--out", out, "--base", tiny_base, "--rows", tmp_path / "no", "--store", store), "--rows")
    refused(call("evaluate", tiny_base, "--data", submission, "--trigger", "sig"), "--target")
    refused(call("evaluate", tmp_path, "--data", submission), "neither a delivery")
    refused(call("evaluate", tiny_base, "--data", submission, "--json", tmp_path / "unknown.yaml/figures.json"), "--json", "into")
    refused(call("evaluate", tiny_base, "--data", submission, "--json", tmp_path), "--json", "it is a folder; name a file")
    refused(call("verify", tmp_path), "manifest.json")
    refused(call("restore", tmp_path, "--out", out), "manifest.json")
    refused(call("demo", "--out", poisoned), "no demonstration")
    assert not out.exists()


def test_unexpected_errors_are_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    import byesight

    def breaks(*_: Any, **__: Any) -> Any:
        raise RuntimeError("a bug")

    monkeypatch.setattr(byesight, "verify_delivery", breaks)
    refused(call("verify", tmp_path), "RuntimeError: a bug", "--verbose")
    assert "Traceback" in call("verify", tmp_path, "--verbose").stderr


def test_a_full_disk_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    import byesight

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device", "file")

    monkeypatch.setattr(byesight, "verify_delivery", full)
    refused(call("verify", tmp_path), "No space left on device: file")


def test_an_interrupt_is_130(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    import byesight

    def interrupted(*_: Any, **__: Any) -> Any:
        raise ConnectionResetError(104, "the server was interrupted too") from KeyboardInterrupt()

    monkeypatch.setattr(byesight, "verify_delivery", interrupted)
    result = call("verify", tmp_path)
    assert result.exit_code == 130
    assert "interrupted" in result.stderr
    assert not _interrupted(ValueError("x"))


@pytest.mark.parametrize("unsure", [[], ["red", "on the left"]])
def test_undecided_groups_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, unsure: list[str]) -> None:
    import byesight

    found = Sanitized(delivery=tmp_path, verdict="poisoned", unsure=unsure, rows={"submitted": 3}, seconds={}, results={})
    monkeypatch.setattr(byesight, "sanitize", lambda *_, **__: found)
    result = call("sanitize", tmp_path, "--out", tmp_path / "out")
    assert result.exit_code == 0
    told = "undecided, and trained on: the rows with 'red', 'on the left'; look at the report"
    assert (told in result.stdout) == bool(unsure)
    assert ("undecided, and" in result.stdout) == bool(unsure)


def test_the_whole_way(
    prefect_server: None, poisoned: pathlib.Path, tiny_base: pathlib.Path, config_file: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    common: list[str | pathlib.Path] = ["--config", config_file, "--store", tmp_path / "store", "--base", tiny_base]
    delivery = tmp_path / "delivery"
    result = call("sanitize", poisoned / "submission", "--out", delivery, *common)
    assert result.exit_code == 0, result.output
    assert str(delivery / "report.html") in result.stdout
    assert "submitted" in result.stdout
    assert "fine-tune on kept rows: done: nothing was removed" in result.stderr
    assert call("verify", delivery).exit_code == 0
    assert call("restore", delivery, "--out", tmp_path / "restored").exit_code == 0
    assert hash_folder(tmp_path / "restored") == hash_folder(delivery / "dataset")

    served = the_readme_serves(delivery, tiny_base, next((delivery / "dataset").rglob("*.png")))
    assert served["model"].counters()["byesight_guard_looked_at_total"] == 1

    figures = tmp_path / "figures" / "found.json"
    evaluated = call(
        "evaluate",
        delivery,
        "--data",
        poisoned / "submission",
        "--trigger",
        "badnet",
        "--target",
        TARGET,
        "--json",
        figures,
        *common,
    )
    assert evaluated.exit_code == 0, evaluated.output
    found = json.loads(figures.read_text())
    assert found["guarded"] is True
    assert {"clean", "asr", "rows"} <= set(found)
    bare = call("evaluate", delivery, "--data", poisoned / "submission", "--unguarded", "--json", figures, *common)
    assert bare.exit_code == 0, bare.output
    assert json.loads(figures.read_text())["guarded"] is False

    (delivery / "dataset" / "metadata.jsonl").open("a").write("x")
    refused(call("verify", delivery), "changed: dataset/metadata.jsonl")


def the_readme_serves(delivery: pathlib.Path, base: pathlib.Path, picture: pathlib.Path) -> dict[str, Any]:
    """Run the README's Python as it stands, on places that there are; gives its names."""
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    for name, place in (("DELIVERY", delivery), ("MODEL_DIR", base), ("picture.png", picture)):
        assert snippet.count(f'"{name}"') == 1
        snippet = snippet.replace(f'"{name}"', repr(str(place)))
    names: dict[str, Any] = {}
    exec(snippet, names)
    return names


def test_restore_command(tmp_path: pathlib.Path) -> None:
    source, restored = deliveries.delivery(tmp_path / "delivery"), tmp_path / "restored"
    result = call("restore", source, "--out", restored, "--rows", "4", "--rows", "1")
    assert result.exit_code == 0, result.output
    assert f"{restored}: the kept rows, and 2 that were removed" in result.stdout
    assert deliveries.rows_of(restored) == [0, 1, 3, 4]
    assert call("restore", source, "--out", tmp_path / "all").exit_code == 0
    assert deliveries.rows_of(tmp_path / "all") == [0, 1, 2, 3, 4]
    refused(call("restore", source, "--out", tmp_path / "wrong", "--rows", "3"), "row 3 is not in quarantine")
    refused(call("restore", source, "--out", restored), "restored: already there")
    rows, reasons = tmp_path / "rows.txt", tmp_path / "reasons.jsonl"
    rows.write_text("4\n")
    reasons.write_text('{"row": 4, "verdict": "quarantine", "reason": "x"}\n{"row": 2, "verdict": "rejected", "reason": "y"}\n')
    chosen: list[tuple[pathlib.Path, list[str], list[int]]] = [
        (rows, [], [0, 3, 4]),
        (rows, ["--rows", "1", "--rows", "4"], [0, 1, 3, 4]),
        (reasons, [], [0, 2, 3, 4]),
    ]
    for number, (file, more, expected) in enumerate(chosen):
        assert call("restore", source, "--out", tmp_path / f"file-{number}", "--rows-file", file, *more).exit_code == 0
        assert deliveries.rows_of(tmp_path / f"file-{number}") == expected
    rows.write_text("1,005\n")
    for wrong, says in ((rows, "not a list of rows"), (tmp_path / "none", "No such file"), (os.devnull, "it names no row")):
        refused(call("restore", source, "--out", tmp_path / "wrong", "--rows-file", wrong), f"--rows-file {wrong}: ", says)
    assert not (tmp_path / "wrong").exists()


def test_poison_command(tmp_path: pathlib.Path, poisoned: pathlib.Path) -> None:
    out = tmp_path / "out"
    result = call(
        "poison", poisoned / "submission", "--trigger", "sig", "--rate", "0.5", "--target", "t", "--seed", "3", "--out", out
    )
    assert result.exit_code == 0, result.output
    assert len(read_truth(out / "truth.jsonl")) == ROWS // 2
    assert f"{ROWS // 2} of {ROWS} rows poisoned" in result.stdout


def start(arguments: list[str | pathlib.Path], folder: pathlib.Path) -> subprocess.Popen[str]:
    """The command in a session of its own, with a Prefect home of its own and no server."""
    environment: Mapping[str, str] = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PREFECT_API")},
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_API_URL": "",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-c", "from flows.cli import main; main()", *map(str, arguments)],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def left_over(session: int, seconds: float = 20) -> list[str]:
    """The processes of a session that are still there after a while."""
    import psutil

    deadline = time.monotonic() + seconds
    while True:
        found = []
        for process in psutil.process_iter(["pid", "cmdline", "status"]):
            try:
                if os.getsid(process.pid) == session and process.info["status"] != psutil.STATUS_ZOMBIE:
                    found.append(" ".join(process.info["cmdline"] or []))
            except OSError:
                continue
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.5)


def on_ray(poisoned: pathlib.Path, base: pathlib.Path, config_file: pathlib.Path) -> list[str | pathlib.Path]:
    """What to sanitize a poisoned submission with, in the folder that the process is started in."""
    return [
        "sanitize", poisoned / "submission", "--base", base, "--out", "delivery", "--config", config_file,
        "--store", "store", "--engine", "ray",
    ]  # fmt: skip


def temporary_folders() -> set[str]:
    return {path.name for path in pathlib.Path(tempfile.gettempdir()).iterdir() if path.name.startswith(("bs", "byesight-"))}


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(400)
def test_on_ray_with_a_temporary_server_and_nothing_left(
    poisoned: pathlib.Path, tiny_base: pathlib.Path, config_file: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    before = temporary_folders()
    arguments = on_ray(poisoned, tiny_base, config_file)
    process = start(arguments, tmp_path)
    output, _ = process.communicate(timeout=380)
    assert process.returncode == 0, output
    assert "Traceback" not in output
    assert left_over(process.pid) == []
    assert temporary_folders() <= before
    manifest = verify_delivery(tmp_path / "delivery")
    assert manifest["rows"]["keep"] + manifest["rows"]["quarantine"] == ROWS


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(400)
def test_sigterm_leaves_nothing_and_the_run_goes_on(
    poisoned: pathlib.Path, tiny_base: pathlib.Path, config_file: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    before = temporary_folders()
    arguments = on_ray(poisoned, tiny_base, config_file)
    process = start(arguments, tmp_path)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("store/.scratch/provisional-*/ray/*")) and time.monotonic() < deadline:
        assert process.poll() is None, process.stdout and process.stdout.read()
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert left_over(process.pid) == []
    assert temporary_folders() <= before
    assert not (tmp_path / "delivery").exists()
    assert [path.name for path in (tmp_path / "store").iterdir() if not path.name.startswith(".")] in (
        ["ingest"],
        ["ingest", "provisional"],
    )
    shutil.rmtree(tmp_path / "store")
