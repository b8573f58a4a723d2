"""The main job measured: `python -m benchmarks.main_job --data demo --seeds 0 1 2 --out DIR`.

Per seed: a poisoned submission is sanitized; detection (ours and plain BYE by both rules), clean performance and attack success of
the provisional, the delivered and the guarded model, of an oracle fine-tuned on the truly clean rows, and of the guard put on the
provisional model. And the same submission without poison: how many rows each filter removes. A finished cell is found again. At the
end all cells of the folder are written to DIR/table.md, with their means over the seeds.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from benchmarks.data import make_data
from flows import line
from flows.demo import detections
from flows.engines import LazyEngine
from flows.line import Line, open_line
from flows.poison import SUBMISSION, TRUTH, Attack, poison, read_truth
from pipeline.config import RunConfig, load_config
from pipeline.models import EMBEDDED_BASE
from pipeline.triggers import make_trigger
from stages.cluster.run import VERDICTS
from stages.verify.evaluate import evaluate
from stages.verify.run import Candidate
from storage.store import StageResult

TARGET = "backdoor attack"
_MODELS = ("provisional", "provisional_guarded", "delivered", "guarded", "oracle")
_FILTERS = ("default", "bye_quarantine", "bye_code_quarantine")


def measure_poisoned(run: Line, truth: set[int], attack: Attack, test: pathlib.Path, scratch: pathlib.Path) -> dict[str, Any]:
    """One poisoned cell: detection, the four models and the guard on the provisional one."""
    stages = line.until_clusters(run)
    found = detections(stages["cluster"].folder / VERDICTS, truth)
    kept = line.choose(run, stages["ingest"], sorted(set(range(stages["ingest"].summary["submitted"])) - truth))
    final = line.final(run, ingested=stages["ingest"], provisional=stages["provisional"], clustered=stages["cluster"])
    oracle = line.finetune(run, "oracle", stages["ingest"], kept)
    guards = {
        "guarded": line.guard(run, stages["ingest"], stages["cluster"], final),
        "provisional_guarded": line.guard(run, stages["ingest"], stages["cluster"], stages["provisional"]),
    }
    models = {
        "provisional": _candidate(stages["provisional"]),
        "delivered": _candidate(final),
        "guarded": _candidate(final, guards["guarded"]),
        "provisional_guarded": _candidate(stages["provisional"], guards["provisional_guarded"]),
        "oracle": _candidate(oracle),
    }
    tested = open_line(test, run.base, run.config, run.store.root, run.engine)
    rows = line.rows_of(line.ingest(tested))
    for name, candidate in models.items():
        found[name] = evaluate(
            candidate,
            rows=rows,
            base=run.base,
            trigger=make_trigger(attack.trigger, attack.seed),
            target=attack.target,
            config=run.config.verify,
            dtype=run.config.dtype,
            engine=run.engine,
            seed=attack.seed,
            scratch=scratch / name,
        )
    found["groups"] = json.loads((stages["confirm"].folder / "transfer.json").read_text(encoding="utf-8"))
    found["seconds"] = line.seconds_of([*stages.values(), final, guards["guarded"]])
    return found


def measure_clean(run: Line) -> dict[str, Any]:
    """One clean cell: the share of rows that each filter removes."""
    stages = line.until_clusters(run)
    table = pq.read_table(stages["cluster"].folder / VERDICTS)
    removed = {"default": np.asarray(table["verdict"].to_pylist()) == "quarantine"}
    removed |= {name: np.asarray(table[name].to_pylist(), bool) for name in ("bye_quarantine", "bye_code_quarantine")}
    groups = json.loads((stages["confirm"].folder / "transfer.json").read_text(encoding="utf-8"))
    return {**{name: float(rows.mean()) for name, rows in removed.items()}, "groups": groups}


def table(out: pathlib.Path) -> str:
    """All cells of a folder as Markdown: figures of the poisoned submissions, and shares of rows removed from clean ones."""
    cells = {path: json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("seed-*/*.json"))}
    poisoned = {path: cell for path, cell in cells.items() if path.stem != "clean"}
    clean = {path: cell for path, cell in cells.items() if path.stem == "clean"}
    parts = []
    for name in sorted({path.stem for path in poisoned}):
        rows = {path.parent.name: _figures(cell) for path, cell in poisoned.items() if path.stem == name}
        parts.append(f"{name}\n\n{_markdown(rows)}")
    if clean:
        rows = {path.parent.name: {key: 100 * cell[key] for key in _FILTERS} for path, cell in clean.items()}
        parts.append(f"clean: % of rows removed\n\n{_markdown(rows)}")
    return "\n\n".join(parts) + "\n"


def _figures(cell: dict[str, Any]) -> dict[str, float]:
    """A poisoned cell's row: F1 of the filters, then clean performance and attack success rate of the models, %."""
    figures = {"F1": cell["detection"]["f1"]} | {f"F1 {rule}": values["f1"] for rule, values in cell["plain"].items()}
    for name in _MODELS:
        figures |= {f"{name} clean %": 100 * cell[name]["clean"], f"{name} ASR %": 100 * cell[name]["asr"]}
    guarded = cell["provisional_guarded"]
    watched = {
        "clean inputs flagged": "flagged",
        "triggered inputs flagged": "triggered_flagged",
        "triggered inputs answered right": "triggered_right",
    }
    return figures | {f"provisional_guarded {text} %": 100 * guarded[key] for text, key in watched.items()}


def _markdown(rows: dict[str, dict[str, float]]) -> str:
    """A row per figure and a column per seed, with the mean at the end."""
    names = list(next(iter(rows.values())))
    lines = ["| | " + " | ".join([*rows, "mean"]) + " |", "|---" * (len(rows) + 2) + "|"]
    for name in names:
        values = [cell[name] for cell in rows.values()]
        lines.append(f"| {name} | " + " | ".join(f"{value:.3g}" for value in [*values, float(np.mean(values))]) + " |")
    return "\n".join(lines)


def _candidate(result: StageResult, guard: StageResult | None = None) -> Candidate:
    return Candidate(adapter=result.folder / "adapter", guard=None if guard is None else guard.folder)


def main() -> None:
    """Measure the cells that are not there yet and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="demo", help="`demo`, or an imagefolder with splits train and test")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", type=int, default=2800)
    parser.add_argument("--test-rows", type=int, default=300)
    parser.add_argument("--trigger", default="badnet")
    parser.add_argument("--rate", type=float, default=0.1)
    parser.add_argument("--target", default=TARGET)
    parser.add_argument("--base", type=pathlib.Path, default=EMBEDDED_BASE)
    parser.add_argument("--config", type=pathlib.Path, default=None)
    parser.add_argument("--skip-clean", action="store_true", help="no cell without poison")
    parser.add_argument("--skip-poisoned", action="store_true", help="only the cells without poison")
    args = parser.parse_args()
    for seed in args.seeds:
        attack = Attack(trigger=args.trigger, rate=args.rate, target=args.target, seed=seed)
        measure_seed(args, attack, load_config(args.config, seed=seed))
    figures = table(args.out)
    (args.out / "table.md").write_text(figures, encoding="utf-8")
    print(figures)


def measure_seed(args: argparse.Namespace, attack: Attack, config: RunConfig) -> None:
    """Both cells of a seed."""
    folder = args.out / f"seed-{attack.seed}"
    data = make_data(args.data, folder / "data", rows=args.rows, test_rows=args.test_rows, seed=attack.seed)
    name = f"{attack.trigger}-{attack.rate}-{attack.target.replace(' ', '_')}"
    with LazyEngine(config.engine) as engine, tempfile.TemporaryDirectory() as scratch:

        def poisoned() -> dict[str, Any]:
            if not (folder / name).exists():
                poison(data.train, attack, folder / name)
            run = open_line(folder / name / SUBMISSION, args.base, config, folder / "store", engine)
            return measure_poisoned(run, read_truth(folder / name / TRUTH), attack, data.test, pathlib.Path(scratch))

        if not args.skip_poisoned:
            _cell(folder / f"{name}.json", poisoned)
        if not args.skip_clean:
            _cell(folder / "clean.json", lambda: measure_clean(open_line(data.train, args.base, config, folder / "store", engine)))


def _cell(path: pathlib.Path, measure: Callable[[], dict[str, Any]]) -> None:
    if not path.exists():
        path.write_text(json.dumps(measure(), indent=2) + "\n", encoding="utf-8")
    print(path, json.dumps({k: v for k, v in json.loads(path.read_text(encoding="utf-8")).items() if k != "groups"}), flush=True)


if __name__ == "__main__":
    main()
