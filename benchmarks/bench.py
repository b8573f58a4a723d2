"""What all suites share: a grid of cells that resumes, records as Parquet, tables with 95% intervals.

A cell is one trained model (or one filtered submission) under one set of fields; it gives a record per defence or filter. Records
are appended to the cell's own JSON lines as they are made, so a bench that is stopped goes on where it was, and a record that is
there is never made again.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import multiprocessing
import os
import pathlib
import platform
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
from scipy.stats import t

from benchmarks.data import data_identity
from pipeline.config import RunConfig, load_config
from pipeline.errors import ConfigError
from pipeline.models import base_identity
from storage import atomic

Record = dict[str, Any]
_COMMANDS, _MACHINES, _SETTING = "commands.txt", "machines.txt", "setting.json"
"""Beside the records: the commands that made them and the kinds of machine that did, a line each, and what they were told."""
_NAMED = ("bases", "data")
_HOW = b"byesight"
"""In the metadata of a results Parquet: these three."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One place of the grid; `fields` name it (attack, rate, data, base, seed)."""

    fields: Mapping[str, str | float | int]

    @property
    def name(self) -> str:
        """A file name that tells the fields."""
        return ",".join(f"{key}={str(value).replace('/', '_')}" for key, value in self.fields.items())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What a run of a suite is told.

    Attributes:
        out: folder of the bench's results.
        base: folder of the base model.
        data: `demo`, another name of `benchmarks.data`, or a folder with splits.
        rows: rows of a submission; 0 where none are named and the suite has sizes of its own.
        test_rows: rows of the test.
        epochs: passes of a fine-tune.
        quick: everything in miniature.
    """

    out: pathlib.Path
    base: pathlib.Path
    data: str
    rows: int
    test_rows: int
    epochs: int
    quick: bool = False


def run_config(setting: Setting, seed: int) -> RunConfig:
    """The configuration of a cell's line: the defaults, in this process, and no cap on removals: a filter's excess is measured."""
    changes: dict[str, dict[str, Any]] = {
        "engine": {"kind": "local", "threads": 1},
        "finetune": {"epochs": setting.epochs},
        "cluster": {"removal_cap": 1.0},
    }
    if setting.quick:
        changes |= {"score": {"candidates": 2}, "confirm": {"hosts": 16, "max_new_tokens": 4}, "verify": {"max_new_tokens": 4}}
    return load_config(None, seed=seed, **changes)


def poisoned_cells(setting: Setting, seeds: Sequence[int], *, attacks: Sequence[str], rates: Sequence[float]) -> list[Cell]:
    """A cell for every attack at every rate on the setting's data and base, seed by seed and rate by rate."""
    data = pathlib.Path(setting.data).name
    return [
        Cell(fields={"attack": attack, "rate": rate, "data": data, "base": setting.base.name, "seed": seed})
        for seed in seeds
        for rate in rates
        for attack in attacks
    ]


def seeds_of(frame: pd.DataFrame) -> str:
    """The seeds of some records as a page names them."""
    return ", ".join(str(seed) for seed in sorted(frame["seed"].unique()))


def percent(rate: Any) -> str:
    """A poison rate as a table shows it."""
    return f"{100 * float(rate):g}%"


def nothing_asked(_cell: Cell, _setting: Setting) -> Sequence[str]:
    """The `asked` of a suite whose records are all made by themselves."""
    return ()


def no_figures(_frame: pd.DataFrame) -> Mapping[str, bytes]:
    """The `figures` of a suite without any."""
    return {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suite:
    """A part of the bench.

    Attributes:
        name: on the command line, and of its files.
        key: the field of a record that tells it from the others of its cell.
        grid: the cells for a setting and seeds.
        keys: what records a cell gives, in order.
        measure: makes the missing records of a cell: (cell, setting, folder of the cell's work, keys) -> records.
        report: Markdown of all records.
        asked: what records a cell gives beside `keys` where they are asked for by name.
        figures: PNG by file name of all records; the report shows them.
        rows: rows of a submission where none are named; 0: the grid has sizes of its own.
        timed: the records of a cell are timings of one run: cells are measured one at a time, each in a process of its own, and a
            cell that lacks a record is measured again whole.
    """

    name: str
    key: str
    grid: Callable[[Setting, Sequence[int]], list[Cell]]
    keys: Callable[[Cell, Setting], Sequence[str]]
    measure: Callable[[Cell, Setting, pathlib.Path, Sequence[str]], Iterator[Record]]
    report: Callable[[pd.DataFrame], str]
    asked: Callable[[Cell, Setting], Sequence[str]] = nothing_asked
    figures: Callable[[pd.DataFrame], Mapping[str, bytes]] = no_figures
    rows: int = 2800
    timed: bool = False


def run_suite(
    suite: Suite, setting: Setting, cells: Sequence[Cell], *, workers: int, only: Sequence[str] = (), command: str = ""
) -> list[str]:
    """Measure what is missing in some cells, several at a time.

    Args:
        suite: what is measured.
        setting: how.
        cells: which.
        workers: processes; each takes one torch thread. A timed suite takes one, whatever is said.
        only: keys to measure; empty measures all.
        command: what the results name as having made them.

    Returns:
        The cells that failed, each with its error.

    Raises:
        ConfigError: the suite has records in this folder that were measured in another setting, or on another base or data of the
            same name.
    """
    _hold_to(setting, suite)
    if command:
        _note(setting.out / suite.name / _COMMANDS, command)
    failed = []
    context = multiprocessing.get_context("spawn")
    number_of, tasks = (1, 1) if suite.timed else (workers, None)
    with ProcessPoolExecutor(number_of, mp_context=context, initializer=_set_up_worker, max_tasks_per_child=tasks) as pool:
        running = {pool.submit(_run_cell, suite, setting, cell, tuple(only)): cell for cell in cells}
        for number, future in enumerate(as_completed(running), 1):
            cell = running[future]
            error = future.exception()
            told = f"{future.result()} new records" if error is None else f"{type(error).__name__}: {error}"
            if error is not None:
                failed.append(f"{cell.name}: {told}")
            print(f"{number}/{len(cells)} {cell.name}: {told}", flush=True)
    return failed


def read_records(suite: str, out: pathlib.Path) -> pd.DataFrame:
    """All records of a suite, one a row, fields and figures as columns."""
    records = [record for path in sorted((out / suite).glob("*.jsonl")) for record in _read(path)]
    return pd.DataFrame.from_records(records)


def take_over(suite: Suite, made: pathlib.Path, out: pathlib.Path) -> int:
    """Put the records of a results Parquet among those of a folder; a cell that has records there keeps these.

    Args:
        suite: whose records.
        made: the Parquet, as `write_results` has written it.
        out: folder of the bench's results.

    Returns:
        The number of cells that were taken over.

    Raises:
        ConfigError: it holds no records of the suite, or they were measured in another setting, or on another base or data of the
            same name.
    """
    try:
        table = pq.read_table(made)
        how = json.loads((table.schema.metadata or {})[_HOW])
    except (OSError, pa.ArrowInvalid, KeyError) as error:
        raise ConfigError(f"{made}: no records of a bench: {error}") from error
    if suite.key not in table.column_names:
        raise ConfigError(f"{made}: no records of {suite.name}")
    folder = (out / suite.name).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    told = how["setting"]
    named = {name: told.pop(name, {}) for name in _NAMED}
    _settle(folder / _SETTING, told, named)
    for name in (_COMMANDS, _MACHINES):
        for line in how[name]:
            _note(folder / name, line)
    place = table.column_names[: table.column_names.index(suite.key)]
    cells: dict[str, list[Record]] = {}
    for record in table.to_pylist():
        known = {name: value for name, value in record.items() if value is not None}
        cells.setdefault(Cell(fields={name: known[name] for name in place}).name, []).append(known)
    taken = {folder / f"{name}.jsonl": records for name, records in cells.items() if not (folder / f"{name}.jsonl").exists()}
    for path, records in taken.items():
        atomic.write_file(path, "".join(f"{json.dumps(record)}\n" for record in records).encode())
    return len(taken)


def write_results(suite: Suite, out: pathlib.Path, docs: pathlib.Path | None = None, notes: pathlib.Path | None = None) -> str:
    """Write `SUITE.parquet`, `SUITE.md` and the figures, to the docs too, if named.

    Args:
        suite: whose records.
        out: folder of the bench's results.
        docs: a second folder for all of these.
        notes: Markdown that tells what was found; it stands after the tables.

    Returns:
        The Markdown, with the commands that made the records and the kinds of machine at its end: this one's where none is noted.
    """
    frame = read_records(suite.name, out)
    if frame.empty:
        return "No records yet."
    told = [suite.report(frame), *([notes.read_text(encoding="utf-8").strip()] if notes else [])]
    commands = "".join(f"    {command}\n" for command in _noted(out / suite.name / _COMMANDS))
    machines = "".join(f"{kind}.\n" for kind in _noted(out / suite.name / _MACHINES) or [machine()])
    text = "\n\n".join([*told, f"## Made by\n\n{commands}\n{machines}"])
    files = {f"{suite.name}.md": text.encode(), f"{suite.name}.parquet": _packed(frame, out / suite.name), **suite.figures(frame)}
    for folder in (out, docs):
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            for name, data in files.items():
                (folder / name).write_bytes(data)
    return text


def machine() -> str:
    """The kind of machine and the versions that figures depend on."""
    kind = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} cores of {platform.machine()}"
    return f"{kind}; Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"


def interval(values: Iterable[float | None]) -> tuple[float, float]:
    """Mean and half of its 95% interval over seeds (Student's t); NaN for fewer than two."""
    known = [float(value) for value in values if value is not None and math.isfinite(value)]
    if not known:
        return math.nan, math.nan
    mean = sum(known) / len(known)
    if len(known) < 2:
        return mean, math.nan
    deviation = math.sqrt(sum((value - mean) ** 2 for value in known) / (len(known) - 1))
    return mean, float(t.ppf(0.975, len(known) - 1)) * deviation / math.sqrt(len(known))


def cell_text(values: Iterable[float | None], *, share: bool = True, digits: int = 1) -> str:
    """A table's cell: mean and half of the 95% interval; a dash where nothing is known.

    Args:
        values: one per seed.
        share: they are shares, written in percent; an interval that goes beyond 0 or 1 is cut there and written by its ends.
        digits: behind the point.
    """
    mean, half = interval(values)
    if math.isnan(mean):
        return "-"
    scale = 100 if share else 1
    text = f"{scale * mean:.{digits}f}"
    if math.isnan(half):
        return text
    if share and not half <= mean <= 1 - half:
        return f"{text} [{scale * max(0.0, mean - half):.{digits}f}, {scale * min(1.0, mean + half):.{digits}f}]"
    return f"{text} ± {scale * half:.{digits}f}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(
        ["| " + " | ".join(header) + " |", "|---" * len(header) + "|", *("| " + " | ".join(row) + " |" for row in rows)]
    )


def _packed(frame: pd.DataFrame, folder: pathlib.Path) -> bytes:
    """The records as Parquet, with how they were made in its metadata."""
    setting = folder / _SETTING
    how: dict[str, Any] = {"setting": json.loads(setting.read_bytes()) if setting.exists() else {}}
    how |= {name: _noted(folder / name) for name in (_COMMANDS, _MACHINES)}
    table = pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata({_HOW: json.dumps(how)})
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def _hold_to(setting: Setting, suite: Suite) -> None:
    """Note the setting beside the records, and what the names of base and data stand for; ConfigError where others are noted."""
    told: dict[str, Any] = {"test_rows": setting.test_rows, "epochs": setting.epochs, "quick": setting.quick}
    told |= {"rows": setting.rows} if suite.rows else {}
    path = (setting.out / suite.name / _SETTING).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    bases, data = {setting.base.name: base_identity(setting.base)}, {pathlib.Path(setting.data).name: data_identity(setting.data)}
    _settle(path, told, {"bases": bases, "data": data})


def _settle(path: pathlib.Path, told: Mapping[str, Any], stands_for: Mapping[str, Mapping[str, str]]) -> None:
    """Add to a noted setting what names of bases and data stand for; ConfigError where another setting or other ones are noted."""
    known = json.loads(path.read_bytes()) if path.exists() else {}
    named = {name: known.pop(name, {}) for name in _NAMED}
    if known and known != told:
        raise ConfigError(f"{path}: the records here were measured with {known}, not with {told}; name another --out")
    for kind, names in stands_for.items():
        for name, identity in names.items():
            if named[kind].setdefault(name, identity) != identity:
                raise ConfigError(f"{path}: records here were measured with other {kind} of the name {name}; name another --out")
    atomic.write_file(path, json.dumps({**told, **named}).encode())


def _note(path: pathlib.Path, line: str) -> None:
    """Add a line to a file, once."""
    known = _noted(path)
    if line not in known:
        atomic.write_file(path.absolute(), "".join(f"{each}\n" for each in (*known, line)).encode())


def _noted(path: pathlib.Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def _set_up_worker() -> None:
    """Workers of one bench share the cores; more threads than cores make training several times slower. They end with the bench."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Without a bench to take its result a cell would go on for minutes, beside one that makes it anew."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run_cell(suite: Suite, setting: Setting, cell: Cell, only: Sequence[str]) -> int:
    """Make a cell's missing records; the number of new ones."""
    path = setting.out / suite.name / f"{cell.name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    _end_line(path)
    done = {record[suite.key] for record in _read(path)} if path.exists() else set()
    known = [*suite.keys(cell, setting), *(suite.asked(cell, setting) if only else ())]
    missing = [key for key in known if key not in done and (not only or key in only)]
    if not missing:
        return 0
    _note(path.parent / _MACHINES, machine())
    measured = suite.measure(cell, setting, setting.out / "work" / cell.name, known if suite.timed else missing)
    lines = (json.dumps({**cell.fields, **record}) + "\n" for record in measured)
    if suite.timed:
        whole = list(lines)
        atomic.write_file(path.absolute(), "".join(whole).encode())
        return len(whole)
    count = 0
    for line in lines:
        with path.open("a", encoding="utf-8") as file:
            file.write(line)
        count += 1
    return count


def _end_line(path: pathlib.Path) -> None:
    """Drop a last line that was cut off: what is appended must not become a part of it."""
    data = path.read_bytes() if path.exists() else b""
    if data and not data.endswith(b"\n"):
        atomic.write_file(path, data[: data.rfind(b"\n") + 1])


def _read(path: pathlib.Path) -> list[Record]:
    """The records of a file; a last line that was cut off is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records
