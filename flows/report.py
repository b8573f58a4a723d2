"""The report of a run: report.json for machines and one self-contained report.html for the customer of a fine-tuning service."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import pathlib
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import numpy as np

from flows import figures, findings
from flows.artifacts import SCORE_LABELS, layer_threshold, number, percent
from flows.line import Line, seconds_of
from pipeline import __version__
from storage.manifests import to_json
from storage.store import StageResult

PACKAGES = ("torch", "transformers", "peft", "accelerate", "numpy", "scipy", "scikit-learn", "pyarrow", "ray", "prefect", "pillow")
"""Whose versions the report names."""
SHOWN_REJECTS = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
    """The results that a report tells of, one per stage; `canary` where canaries were planted."""

    ingest: StageResult
    canary: StageResult | None = None
    provisional: StageResult
    extract: StageResult
    score: StageResult
    confirm: StageResult
    cluster: StageResult
    final: StageResult
    guard: StageResult
    verify: StageResult

    @classmethod
    def of(cls, *results: StageResult) -> Results:
        """One of every stage, each by its own name."""
        return cls(**{result.stage: result for result in results})

    def all(self) -> list[StageResult]:
        """In the order in which they were made."""
        known = (getattr(self, field.name) for field in dataclasses.fields(self))
        return [result for result in known if result is not None]

    def sources(self) -> findings.Sources:
        """Where the quarantined rows are found."""
        return findings.Sources(
            ingested=self.ingest.folder,
            extracted=self.extract.folder,
            scored=self.score.folder,
            confirmed=self.confirm.folder,
            clustered=self.cluster.folder,
        )


def report_values(line: Line, results: Results) -> dict[str, Any]:
    """The content of report.json: JSON values without NaN, infinity or places on this machine."""
    verdict = findings.read_json(results.cluster.folder / "result.json")
    values = {
        "verdict": verdict["verdict"],
        "method": verdict["method"],
        "threshold": verdict.get("threshold"),
        "rows": verdict["rows"],
        "unsure": [{name: group[name] for name in ("group", "text", "rows")} for group in verdict.get("unsure", [])],
        "rejected_by_reason": results.ingest.summary.get("rejected_by_reason", {}),
        "submission": {"format": results.ingest.summary.get("format"), "examples": results.ingest.summary.get("examples")},
        "base": line.identity,
        "layers": findings.read_json(results.score.folder / "layers.json"),
        "candidates": findings.read_groups(results.confirm.folder, verdict["confirmed"]),
        "plain": verdict.get("plain", {}),
        "canaries": verdict.get("canaries", []),
        "finetune": {name: getattr(results, name).summary for name in ("provisional", "final")},
        "guard": results.guard.summary,
        "verification": findings.read_json(results.verify.folder / "verification.json"),
        "timings": seconds_of(results.all()),
        "seeds": {"run": line.config.seed},
        "configuration": line.config.model_dump(mode="json", exclude={"engine"}),
        "digests": {result.stage: result.digest for result in results.all()},
        "versions": versions(),
    }
    finite: dict[str, Any] = only_finite(values)
    return finite


def report_json(values: Mapping[str, Any]) -> str:
    """The text of report.json."""
    return to_json(dict(values)).decode()


def report_html(values: Mapping[str, Any], pictures: Mapping[str, Any]) -> str:
    """The page; every value is escaped by the template engine.

    Args:
        values: the content of report.json.
        pictures: what `report_pictures` gives.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("flows", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, percent=percent, words=_words)
    return environment.get_template("report.html").render(report=values, **pictures)


def report_pictures(line: Line, results: Results) -> dict[str, Any]:
    """Plots, example rows and rejected rows, for the page alone."""
    layers = findings.read_json(results.score.folder / "layers.json")
    method = findings.read_json(results.cluster.folder / "result.json")["method"]
    scores = findings.read_scores(results.cluster.folder, method=method)
    losses = {name: findings.read_losses(getattr(results, name).folder) for name in ("provisional", "final")}
    distances = findings.read_calibration(results.guard.folder).tolist()
    groups = findings.read_groups(results.confirm.folder)
    label, limits = SCORE_LABELS.get(method, "score"), line.config.cluster
    return {
        "layer_plot": figures.plot_layers(layers, layer_threshold(line.config)),
        "transfer_plot": figures.plot_transfer(groups, planted=limits.transfer, pictures=limits.pictures) if groups else "",
        "score_plot": figures.plot_scores(scores.score.tolist(), scores.removed.tolist(), scores.cut, label=label),
        "loss_plot": figures.plot_losses(losses),
        "guard_plot": figures.plot_calibration(distances, float(results.guard.summary.get("threshold", math.nan))),
        "suspects": findings.read_suspects(results.sources()),
        "rejected": findings.read_rejected(results.ingest.folder, SHOWN_REJECTS),
    }


def versions() -> dict[str, str]:
    """Of ByeSight, Python and the libraries that decide a result."""
    found = {"byesight": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def only_finite(value: Any) -> Any:
    """JSON values with null in the place of NaN and infinity, and numpy's numbers as Python's."""
    if isinstance(value, Mapping):
        return {str(key): only_finite(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return only_finite(value.tolist())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [only_finite(item) for item in value]
    if isinstance(value, np.generic):
        return only_finite(value.item())
    if isinstance(value, pathlib.PurePath):
        return value.name
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _words(name: str) -> str:
    """A key as words."""
    return name.replace("_", " ").replace("-", " ")
