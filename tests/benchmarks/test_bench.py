"""The bench: figures with their intervals, records that are made once, and every suite in miniature from the grid to the files."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, ClassVar, Self

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from benchmarks import __main__, bench, suites
from benchmarks.attacks import ATTACKS
from benchmarks.bench import (
    Cell,
    Record,
    Setting,
    Suite,
    cell_text,
    interval,
    nothing_asked,
    read_records,
    run_suite,
    take_over,
    write_results,
)
from benchmarks.clean import CLEAN, CLEAN_SUITE
from benchmarks.data import VARIANTS
from benchmarks.detection import DETECTION, RATES, RETRAINED, figures_of
from benchmarks.filters import FILTERS, Filtered, last_hidden
from benchmarks.purification import PURIFICATION
from flows.engines import LazyEngine
from flows.line import open_line
from pipeline.errors import ConfigError
from pipeline.generation import encode_on
from pipeline.models import load_adapter, load_base
from pipeline.records import examples_of, sample_from_record

ROWS, TEST_ROWS = 60, 2


class Serial:
    """In the place of a pool of processes: the work is done here and now; `pools` tells what pools were asked for."""

    pools: ClassVar[list[tuple[int, int | None]]] = []

    def __init__(self, workers: int, *, max_tasks_per_child: int | None, **_: Any) -> None:
        self.pools.append((workers, max_tasks_per_child))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, work: Callable[..., int], *given: Any) -> Future[int]:
        future: Future[int] = Future()
        try:
            future.set_result(work(*given))
        except Exception as error:  # noqa: BLE001 - as a pool keeps it
            future.set_exception(error)
        return future


@pytest.fixture(autouse=True)
def _serial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "ProcessPoolExecutor", Serial)


def test_interval() -> None:
    assert interval([0.5])[0] == 0.5
    assert math.isnan(interval([0.5])[1])
    mean, half = interval([1.0, 2.0, 3.0, None, math.nan])
    assert mean == 2
    assert half == pytest.approx(2.4841, abs=1e-4)  # t(0.975, 2) / sqrt(3) = 4.3027 / 1.7321
    assert all(math.isnan(value) for value in interval([None]))


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([0.5], "50.0"),
        ([0.4, 0.5, 0.6], "50.0 ± 24.8"),
        ([1.0, 1.0], "100.0 ± 0.0"),
        ([0.1, 0.2, 0.3], "20.0 [0.0, 44.8]"),
        ([0.0, 1.0, 1.0], "66.7 [0.0, 100.0]"),
        ([None], "-"),
        ([], "-"),
    ],
)
def test_cell_text(values: list[float | None], text: str) -> None:
    assert cell_text(values) == text


def test_cell_text_of_what_is_no_share() -> None:
    assert cell_text([1.0, 2.0, 3.0], share=False) == "2.0 ± 2.5"


def base_of(folder: pathlib.Path, weights: bytes = b"weights") -> pathlib.Path:
    """A base in a folder, as far as the bench looks at it."""
    base = folder / "base"
    base.mkdir(parents=True, exist_ok=True)
    (base / "model.safetensors").write_bytes(weights)
    return base


class Counted:
    """A suite whose records are counted as they are made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[str] = []
        self.stop_at = ""
        self.suite = Suite(
            name="counted",
            key="what",
            grid=lambda _setting, seeds: [Cell(fields={"seed": seed}) for seed in seeds],
            keys=lambda _cell, _setting: ["a", "b", "c"],
            measure=self.measure,
            report=lambda frame: f"{len(frame)} records",
            asked=lambda _cell, _setting: ["d"],
            figures=lambda _frame: {"counted.png": b"a picture"},
        )
        monkeypatch.setitem(suites.SUITES, "counted", self.suite)

    def measure(self, cell: Cell, _setting: Setting, _folder: pathlib.Path, names: Sequence[str]) -> Iterator[Record]:
        for name in names:
            if name == self.stop_at:
                raise RuntimeError("stopped")
            self.made.append(f"{cell.fields['seed']}{name}")
            yield {"what": name, "value": 1.0}

    def run(self, out: pathlib.Path, *only: str, seeds: Sequence[int] = (0,), workers: int = 1, command: str = "") -> list[str]:
        setting = Setting(out=out, base=base_of(out), data="demo", rows=1, test_rows=1, epochs=1)
        self.made = []
        return run_suite(self.suite, setting, self.suite.grid(setting, seeds), workers=workers, only=only, command=command)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


def test_a_record_that_is_there_is_not_made_again(counted: Counted, tmp_path: pathlib.Path) -> None:
    counted.stop_at = "c"
    assert counted.run(tmp_path) == ["seed=0: RuntimeError: stopped"]
    assert counted.made == ["0a", "0b"]
    counted.stop_at = ""
    assert counted.run(tmp_path, seeds=(0, 1)) == []
    assert counted.made == ["0c", "1a", "1b", "1c"]
    assert counted.run(tmp_path, seeds=(0, 1)) == []
    assert counted.made == []
    assert read_records("counted", tmp_path)["what"].tolist() == ["a", "b", "c"] * 2


def test_another_setting_needs_another_folder(counted: Counted, tmp_path: pathlib.Path) -> None:
    counted.run(tmp_path)
    setting = Setting(out=tmp_path, base=base_of(tmp_path), data="demo", rows=2, test_rows=1, epochs=1)
    with pytest.raises(ConfigError, match=r"'rows': 1.*not with .*'rows': 2.*--out"):
        run_suite(counted.suite, setting, [], workers=1)
    sizes_of_its_own = dataclasses.replace(counted.suite, name="sizes", rows=0)
    for rows in (1, 2):
        assert run_suite(sizes_of_its_own, dataclasses.replace(setting, rows=rows), [], workers=1) == []
    assert len(read_records("counted", tmp_path)) == 3


def test_another_base_or_other_data_of_a_name_need_another_folder(counted: Counted, tmp_path: pathlib.Path) -> None:
    """Where they lie does not matter; those of another name may come into the same folder, and what knows no names is taken."""
    out = tmp_path / "out"
    for folder, rows in (("here", "{}"), ("there", "{}"), ("other", "{} {}")):
        (tmp_path / folder / "photos").mkdir(parents=True)
        (tmp_path / folder / "photos" / "metadata.jsonl").write_text(rows)

    def run(base: pathlib.Path, data: str) -> list[str]:
        told = Setting(out=out, base=base, data=data, rows=1, test_rows=1, epochs=1)
        return run_suite(counted.suite, told, [], workers=1)

    first, moved, other = base_of(tmp_path / "a"), base_of(tmp_path / "b"), base_of(tmp_path / "c", b"others")
    (out / "counted").mkdir(parents=True)
    (out / "counted" / "setting.json").write_text('{"test_rows": 1, "epochs": 1, "quick": false, "rows": 1}')
    for base in (first, moved):
        for data in ("demo", str(tmp_path / "here/photos"), str(tmp_path / "there/photos")):
            assert run(base, data) == []
    with pytest.raises(ConfigError, match=r"other data of the name photos.*--out"):
        run(first, str(tmp_path / "other/photos"))
    with pytest.raises(ConfigError, match=r"other bases of the name base.*--out"):
        run(other, "demo")
    assert run(other.rename(tmp_path / "another"), "demo") == []
    with pytest.raises(ConfigError, match="nowhere: no data of this name"):
        run(first, str(tmp_path / "nowhere"))


def test_the_machines_that_measured_are_named(counted: Counted, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seeds, kind in (((0,), "an old one"), ((0, 1), "a new one"), ((0, 1), "one that finds all measured")):
        monkeypatch.setattr(bench, "machine", lambda kind=kind: kind)
        counted.run(tmp_path, seeds=seeds, command="a command")
    text = write_results(counted.suite, tmp_path)
    assert text.endswith("    a command\n\nan old one.\na new one.\n")
    (tmp_path / "counted/machines.txt").unlink()
    assert write_results(counted.suite, tmp_path).endswith("    a command\n\none that finds all measured.\n")


@pytest.mark.parametrize("cut", [1, 5])
def test_a_line_that_was_cut_off_is_made_again(counted: Counted, tmp_path: pathlib.Path, cut: int) -> None:
    """And what comes after it is not joined to it."""
    counted.run(tmp_path, "a", "b")
    path = tmp_path / "counted/seed=0.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    counted.run(tmp_path)
    assert counted.made == ["0b", "0c"]
    assert [json.loads(line)["what"] for line in path.read_text().splitlines()] == ["a", "b", "c"]


def test_records_on_request(counted: Counted, tmp_path: pathlib.Path) -> None:
    counted.run(tmp_path, "b")
    assert counted.made == ["0b"]
    counted.run(tmp_path, "d", "b")
    assert counted.made == ["0d"]
    counted.run(tmp_path)
    assert counted.made == ["0a", "0c"]


def test_a_timed_cell_is_measured_alone_and_whole(counted: Counted, tmp_path: pathlib.Path) -> None:
    """Timings of two runs are not put together, and those of a run that failed are not kept."""
    counted.suite = dataclasses.replace(counted.suite, timed=True, asked=nothing_asked)
    counted.stop_at = "c"
    assert counted.run(tmp_path, workers=2) == ["seed=0: RuntimeError: stopped"]
    assert read_records("counted", tmp_path).empty
    counted.stop_at = ""
    counted.run(tmp_path, "b", seeds=(0, 1))
    assert counted.made == ["0a", "0b", "0c", "1a", "1b", "1c"]
    path = tmp_path / "counted/seed=1.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    counted.run(tmp_path, seeds=(0, 1))
    assert counted.made == ["1a", "1b", "1c"]
    assert read_records("counted", tmp_path)["what"].tolist() == ["a", "b", "c"] * 2
    assert set(Serial.pools[-3:]) == {(1, 1)}


def test_results_are_written_beside_the_records_and_to_the_docs(counted: Counted, tmp_path: pathlib.Path) -> None:
    out, docs, notes = tmp_path / "out", tmp_path / "docs", tmp_path / "notes.md"
    out.mkdir()
    notes.write_text("## What it says\n\nNothing.\n")
    assert write_results(counted.suite, out, docs) == "No records yet."
    for command in ("a command", "another", "a command", ""):
        counted.run(out, command=command)
    text = write_results(counted.suite, out, docs, notes)
    assert text.startswith("3 records\n\n## What it says\n\nNothing.\n\n## Made by\n\n    a command\n    another\n\n")
    for folder in ("out", "docs"):
        assert (tmp_path / folder / "counted.md").read_text() == text
        assert (tmp_path / folder / "counted.png").read_bytes() == b"a picture"
        assert len(pd.read_parquet(tmp_path / folder / "counted.parquet")) == 3


def test_records_in_the_docs_are_gone_on_from(counted: Counted, tmp_path: pathlib.Path) -> None:
    """They count as made, and are told with the commands and machines that made them."""
    first, second, docs = tmp_path / "first", tmp_path / "second", tmp_path / "docs"
    counted.run(first, seeds=(0, 1), command="a command")
    write_results(counted.suite, first, docs)
    counted.run(second, "a", command="another")
    assert take_over(counted.suite, docs / "counted.parquet", second) == 1
    counted.run(second, seeds=(0, 1, 2))
    assert counted.made == ["0b", "0c", "2a", "2b", "2c"]
    assert read_records("counted", second).sort_values(["seed", "what"])["what"].tolist() == ["a", "b", "c"] * 3
    assert "    another\n    a command\n" in write_results(counted.suite, second)
    assert take_over(counted.suite, docs / "counted.parquet", second) == 0


def test_what_a_record_lacks_it_lacks_when_it_is_taken_over(counted: Counted, tmp_path: pathlib.Path) -> None:
    records = [{"seed": 0, "what": "a", "value": None}, {"seed": 0, "what": "b", "value": 0.5, "count": 2}]
    (tmp_path / "out/counted").mkdir(parents=True)
    (tmp_path / "out/counted/seed=0.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    write_results(counted.suite, tmp_path / "out")
    assert take_over(counted.suite, tmp_path / "out/counted.parquet", tmp_path / "other") == 1
    lines = (tmp_path / "other/counted/seed=0.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"seed": 0, "what": "a"}, {"seed": 0, "what": "b", "value": 0.5, "count": 2}]


def test_records_of_another_kind_are_not_taken_over(counted: Counted, tmp_path: pathlib.Path) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    counted.run(out)
    write_results(counted.suite, out)
    made = out / "counted.parquet"
    with pytest.raises(ConfigError, match="no records of another"):
        take_over(dataclasses.replace(counted.suite, name="another", key="filter"), made, other)
    setting = Setting(out=other, base=base_of(other), data="demo", rows=2, test_rows=1, epochs=1)
    run_suite(counted.suite, setting, [], workers=1)
    with pytest.raises(ConfigError, match=r"with .*'rows': 2.*not with .*'rows': 1.*--out"):
        take_over(counted.suite, made, other)
    pd.DataFrame({"what": ["a"]}).to_parquet(made)
    with pytest.raises(ConfigError, match="no records of a bench"):
        take_over(counted.suite, made, tmp_path / "third")
    with pytest.raises(ConfigError, match="no records of a bench"):
        take_over(counted.suite, tmp_path / "nowhere.parquet", tmp_path / "third")


def test_a_command_is_told_without_this_machine() -> None:
    given = ["run", "clean", "--out", "/a/place", "--workers=3", "--docs", "docs", "--seeds", "2", "--only", "filter=random, 20%"]
    assert __main__.told(given) == "python -m benchmarks run clean --out DIR --seeds 2 --only 'filter=random, 20%'"
    assert __main__.told(["run", "clean", "--out=/a/place"]) == "python -m benchmarks run clean --out DIR"


def test_grids() -> None:
    setting = Setting(out=pathlib.Path("out"), base=pathlib.Path("a/base"), data="demo", rows=1, test_rows=1, epochs=1)
    cells = DETECTION.grid(setting, (0, 1))
    assert len({cell.name for cell in cells}) == len(cells) == 2 * len(ATTACKS) * len(RATES)
    for cell in cells:
        unasked, asked = set(DETECTION.keys(cell, setting)), set(DETECTION.asked(cell, setting))
        assert unasked == {*FILTERS, *(RETRAINED if cell.fields["rate"] == 0.1 else ())}
        assert unasked | asked == {*FILTERS, *RETRAINED}
    assert [cell.fields["data"] for cell in CLEAN_SUITE.grid(setting, (0,))] == list(CLEAN)
    assert set(CLEAN) <= set(VARIANTS)


def test_figures_of_a_filter() -> None:
    removed, poisoned = np.array([True, True, False, False]), np.array([True, False, True, False])
    found = figures_of(Filtered(removed=removed, score=np.array([4.0, 1.0, 3.0, 2.0])), poisoned)
    assert found == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "auroc": 1.0, "removed": 0.5}
    assert figures_of(Filtered(removed=removed, score=None), poisoned)["auroc"] is None


def miniature(suite: Suite, out: pathlib.Path, base: pathlib.Path, cells: int, *only: str) -> pd.DataFrame:
    """Run some cells of a suite and write its results."""
    setting = Setting(out=out, base=base, data="demo", rows=ROWS, test_rows=TEST_ROWS, epochs=1, quick=True)
    assert run_suite(suite, setting, suite.grid(setting, (0,))[:cells], workers=1, only=only) == []
    write_results(suite, out)
    return read_records(suite.name, out)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("bench")


@pytest.mark.slow
def test_detection_in_miniature(place: pathlib.Path, tiny_base: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = miniature(DETECTION, place, tiny_base, 2).set_index(["attack", "filter"])
    assert {attack for attack, _ in found.index} == {"badnet", "text prefix"}
    assert [name for attack, name in found.index if attack == "badnet"] == list(FILTERS)
    assert found[["precision", "recall", "f1", "removed"]].map(lambda share: 0 <= share <= 1).all(axis=None)
    assert (found.xs("random, 20%", level=1)["removed"] == 0.2).all()
    text = (place / "detection.md").read_text()
    assert "| text prefix | 10% | - |" in text
    rates, attacks = (f"detection-{what}-demo-{tiny_base.name}.png" for what in ("rates", "attacks"))
    assert rates not in text, "there is one rate"
    assert text.count(f"]({attacks})") == 1
    assert Image.open(place / attacks).size == (960, 234)
    records = read_records("detection", place)
    several = pd.concat([records, records.assign(rate=0.5)])
    assert DETECTION.report(several).count(f"]({rates})") == 1
    assert Image.open(io.BytesIO(DETECTION.figures(several)[rates])).size == (960, 540)
    own = records[records["filter"] == "ours"]
    assert "All filters" not in DETECTION.report(own)
    assert list(DETECTION.figures(own[own["attack"] == "badnet"])) == []

    trained = miniature(DETECTION, place, tiny_base, 1, "truth, retrained", "no filter, retrained").set_index("filter")
    assert len(trained) == 2 * len(FILTERS) + 2
    assert trained.loc["truth, retrained", "removed"] == 0.1
    assert trained.loc["no filter, retrained", "removed"] == 0
    assert trained.loc[list(RETRAINED[::4]), ["clean", "asr"]].map(lambda share: 0 <= share <= 1).all(axis=None)
    (final,) = (place / "store/final").glob("*/manifest.json")
    assert json.loads(final.read_text())["summary"]["rows"] == 0.9 * ROWS
    assert "Attack success rate of the retrained model, 10% poison" in (place / "detection.md").read_text()

    def unwanted(*_: Any, **__: Any) -> Any:
        raise AssertionError("made again")

    monkeypatch.setattr("benchmarks.detection.make_data", unwanted)
    assert len(miniature(DETECTION, place, tiny_base, 2)) == len(trained)


@pytest.mark.slow
def test_hidden_states_are_the_last_layers_at_the_last_position(place: pathlib.Path, tiny_base: pathlib.Path) -> None:
    """Of one row alone, without padding, by transformers' own output."""
    setting = Setting(out=place, base=tiny_base, data="demo", rows=ROWS, test_rows=TEST_ROWS, epochs=1, quick=True)
    (adapter, *_) = sorted((place / "store/provisional").glob("*/adapter"))
    (rows, *_) = [path for path in sorted((place / "store/ingest").glob("*/rows")) if len(pd.read_parquet(path)) == ROWS]
    config = bench.run_config(setting, 0)
    with LazyEngine(config.engine) as engine:
        run = open_line(place / "data", tiny_base, config, place / "store", engine)
        hidden, numbers = last_hidden(run, rows, adapter)
    assert hidden.shape == (ROWS, 128)
    assert hidden.dtype == np.float32
    assert numbers.tolist() == list(range(ROWS))
    model, processor = load_base(tiny_base)
    model = load_adapter(model, adapter)
    records = pd.read_parquet(rows).to_dict("records")
    for row in (0, 37, ROWS - 1):
        batch = encode_on(model, processor, examples_of(sample_from_record(records[row])))  # type: ignore[arg-type]
        with torch.inference_mode():
            output = model(**batch, output_hidden_states=True)
        assert hidden[row] == pytest.approx(output.hidden_states[-1][0, -1].numpy(), abs=1e-4)


@pytest.mark.slow
def test_clean_in_miniature(place: pathlib.Path, tiny_base: pathlib.Path) -> None:
    found = miniature(CLEAN_SUITE, place, tiny_base, 1)
    assert found["filter"].tolist() == list(FILTERS)
    assert set(found.columns) == {"data", "base", "seed", "filter", "removed", "verdict"}
    assert found["verdict"].notna().sum() == 2
    assert found["removed"].between(0, 1).all()
    assert found.set_index("filter")["removed"]["spectral signatures"] == 0.15
    assert "| mixed-sizes: pictures of 24 to 256 pixels a side" in (place / "clean.md").read_text()
    assert len(list(place.glob("clean-*.png"))) == 1


@pytest.mark.slow
def test_purification_in_miniature(place: pathlib.Path, tiny_base: pathlib.Path) -> None:
    tried = ["none", "ours", "bdmae", "zip", "sampdetox"]
    found = miniature(PURIFICATION, place, tiny_base, 1, *tried).set_index("defence")
    assert found.index.tolist() == tried
    assert found[["asr", "clean"]].map(lambda share: 0 <= share <= 1).all(axis=None)
    assert found["flagged"].notna().tolist() == [False, True, False, False, False]
    assert len(list((place / "restorers").glob("*.safetensors"))) == 2
    assert "## The guard" in (place / "purification.md").read_text()


ORPHAN = """
import multiprocessing, os, time
from benchmarks.bench import _set_up_worker

def cell(said):
    _set_up_worker()
    said.send(os.getpid())
    time.sleep(120)

if __name__ == "__main__":
    heard, said = multiprocessing.Pipe(duplex=False)
    multiprocessing.get_context("spawn").Process(target=cell, args=(said,)).start()
    print(heard.recv(), flush=True)
    time.sleep(120)
"""


def test_a_cell_ends_with_the_bench(tmp_path: pathlib.Path) -> None:
    """Also with one that is killed: its pipes close, and that of its worker's output with them."""
    (tmp_path / "orphan.py").write_text(ORPHAN)
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(bench.__file__).parents[1])}
    command = [sys.executable, str(tmp_path / "orphan.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as whole:
        assert whole.stdout is not None
        assert int(whole.stdout.readline()) != whole.pid
        whole.kill()
        whole.communicate(timeout=60)  # returns when nobody holds the pipe any more
