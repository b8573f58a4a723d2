"""What a run shows in Prefect's UI: Markdown made by pure functions, and an outlet whose failures never fail the run."""

from __future__ import annotations

import logging
import math
import pathlib
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from flows import figures, findings
from flows.findings import Suspect
from pipeline.config import RunConfig
from storage.store import StageResult

LIMIT = 200_000
"""Largest artifact, bytes of Markdown: all of them lie in Prefect's database."""
SHOWN_REJECTS = 50
SHOWN_TEXT = 160
DASH = "\N{EN DASH}"

SCORE_LABELS = {
    "transfer": "projection on the shift shared with the same answer, deviations",
    "bye": "mean entropy of the sensitive layers, nats",
}
"""What a row's score is, by the method of the cluster stage."""

Log = logging.Logger | logging.LoggerAdapter[Any]
T = TypeVar("T")
_TRANSPORT = ("httpcore", "httpcore2", "httpx", "httpx2")
_ADDRESS = re.compile(r"[:@]|www(?=\.)", re.IGNORECASE)
_JOINER = "\N{WORD JOINER}"
_PLAIN = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789 ,")


def escape(text: object, limit: int = SHOWN_TEXT) -> str:
    """A submitted text for Markdown, where it can neither be markup, a link, HTML nor the end of a table cell.

    Everything in ASCII but letters, digits, spaces and commas gets a backslash (one of Prefect's two pages shows character
    references as they are written); control and direction characters become spaces; an invisible joiner keeps addresses from
    turning into links.

    Args:
        text: anything; its `str` is taken.
        limit: most characters before the escaping; a longer text ends in an ellipsis.
    """
    whole = str(text)
    cut = whole if len(whole) <= limit else whole[: limit - 1] + "…"
    visible = "".join(" " if unicodedata.category(character)[0] in "CZ" else character for character in cut)
    apart = _ADDRESS.sub(lambda match: match[0] + _JOINER, visible)
    return "".join(f"\\{character}" if character.isascii() and character not in _PLAIN else character for character in apart)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table of cells that are escaped already."""
    lines = [f"| {' | '.join(header)} |", "|" + " --- |" * len(header)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def number(value: object, digits: int = 3) -> str:
    """A number for people; a dash where there is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return DASH
    return f"{value:,}" if isinstance(value, int) else f"{value:.{digits}f}"


def percent(value: object) -> str:
    """A share for people."""
    return f"{100 * value:.1f}%" if isinstance(value, (int, float)) and math.isfinite(value) else DASH


def ingest_markdown(summary: Mapping[str, Any], rejected: Sequence[Mapping[str, Any]]) -> str:
    """Counts of the ingest stage, and the rejected rows with their reasons."""
    counts = [(name, number(summary.get(name))) for name in ("submitted", "accepted", "rejected", "text_only", "examples")]
    parts = [
        f"## Ingest: {escape(summary.get('format', ''))}",
        table(["rows", ""], [(escape(name), value) for name, value in counts]),
    ]
    reasons = summary.get("rejected_by_reason") or {}
    if reasons:
        parts += ["### Rejected, by reason", table(["reason", "rows"], [(escape(name), number(n)) for name, n in reasons.items()])]
    if rejected:
        cells = [(str(row["row"]), escape(row["reason"]), escape(row["where"])) for row in rejected]
        parts += [f"### The first {len(rejected)} of them", table(["row", "reason", "where"], cells)]
    return "\n\n".join(parts)


def canaries_markdown(planted: Sequence[Mapping[str, Any]]) -> str:
    """The canaries: what marks them, and what they answer."""
    cells = [(escape(kind["trigger"]), escape(kind["answer"]), number(kind["rows"])) for kind in planted]
    title = "## Canaries: rows of our own, for the provisional fine-tune alone"
    return "\n\n".join([title, table(["trigger", "answer", "rows"], cells)])


def losses_markdown(losses: figures.Losses) -> str:
    """The loss curves of the fine-tunes, and where they began and ended."""
    cells = [
        (escape(name), number(len(steps)), number(steps[0][1]), number(steps[-1][1])) for name, steps in losses.items() if steps
    ]
    header = ["fine-tune", "steps", "first loss", "last loss"]
    return "\n\n".join(["## Loss, nats per answer token", _image("loss curves", figures.plot_losses(losses)), table(header, cells)])


def layers_markdown(layers: Sequence[Mapping[str, Any]], threshold: float | None) -> str:
    """The separation of every layer, as a plot and a table."""
    values = [[number(layer.get(name)) for name in ("layer", "separation", "low", "high")] for layer in layers]
    cells = [[*numbers, "yes" if layer["sensitive"] else ""] for numbers, layer in zip(values, layers, strict=True)]
    header = ["layer", "separation", "lower mean, nats", "upper mean, nats", "sensitive"]
    plot = _image("separation per layer", figures.plot_layers(layers, threshold))
    return "\n\n".join(["## Bimodal separation of the layers", plot, table(header, cells)])


def _undone(group: Mapping[str, Any]) -> float | None:
    """How far the group's rows lose their answer without what was planted, where that was tried."""
    way = group["keyed"] if group["keyed"] and group["keyed"]["transfer"] else group
    undone = way["reversed"] if way["alike"] else None
    return None if undone is None else float(undone)


def groups_markdown(groups: Sequence[Mapping[str, Any]], *, planted: float, pictures: float) -> str:
    """The candidate groups and the outcome of their test: do their tokens, words or pictures carry the answer?"""
    if not groups:
        return "## Candidates\n\nNo answer's rows have enough in common to be tried."
    header = [
        "candidate",
        "answer",
        "rows",
        "honest among them",
        "shift",
        "words",
        "others give it",
        "with its tokens or words",
        "with both",
        "undone without",
        "transfer",
        "its pictures give it",
    ]
    cells = [
        (
            number(place),
            escape(group["text"], 80) + (" (the others of it)" if group["rest"] else " (a part of it)" if group["part"] else ""),
            number(group["rows"]),
            number(group["mixed"]["honest"]) if group["mixed"] else "",
            number(group["shift"]),
            escape(group["words"]["text"], 40) if group["words"] else "",
            percent(group["own"]),
            percent(max(group["attended"], group["residual"], group["worded"])),
            percent(group["keyed"]["planted"] if group["keyed"] else None),
            percent(_undone(group)),
            percent(group["transfer"]),
            percent(group["pictures_transfer"] if group["questions"] else None),
        )
        for place, group in enumerate(groups, start=1)
    ]
    plot = _image("transfer", figures.plot_transfer(groups, planted=planted, pictures=pictures))
    title = f"## Candidates; suspicious from {percent(planted)} of other rows, or {percent(pictures)} of other questions on"
    return "\n\n".join([title, plot, table(header, cells)])


def scores_markdown(scores: findings.Scores, result: Mapping[str, Any]) -> str:
    """The score histogram with the cut, and the verdict."""
    label = SCORE_LABELS.get(str(result["method"]), "score")
    plot = figures.plot_scores(scores.score.tolist(), scores.removed.tolist(), scores.cut, label=label)
    counts = [(escape(name), number(n)) for name, n in result["rows"].items()]
    parts = [f"## Verdict: {escape(result['verdict'])}", _image("scores", plot), table(["rows", ""], counts)]
    if planted := result.get("canaries"):
        cells = [
            (escape(kind["trigger"]), number(kind["rows"]), number(kind["found"]), percent(kind["transfer"])) for kind in planted
        ]
        parts += ["### Canaries: rows of our own that were planted", table(["trigger", "rows", "found", "transfer"], cells)]
    return "\n\n".join(parts)


def suspects_markdown(suspects: Sequence[Suspect], quarantined: int) -> str:
    """Quarantined rows with thumbnails and the attended tokens marked; as many as fit into an artifact."""
    if not suspects:
        return "## Quarantine\n\nNo row was quarantined."
    header = ["row", "picture", "question", "answer", "score", "posterior", "reason"]
    title = f"## Quarantine: {number(quarantined)} rows"
    for shown in range(len(suspects), 0, -1):
        cells = [
            (
                str(suspect.row),
                _image(f"row {suspect.row}", suspect.picture) if suspect.picture else DASH,
                escape(suspect.question),
                escape(suspect.answer),
                number(suspect.score),
                number(suspect.posterior),
                escape(suspect.reason),
            )
            for suspect in suspects[:shown]
        ]
        text = "\n\n".join([title, f"{shown} of them; framed is what the model looks at.", table(header, cells)])
        if len(text.encode()) <= LIMIT:
            return text
    return title


def guard_markdown(facts: Mapping[str, Any], distances: Sequence[float]) -> str:
    """The guard's threshold and the distances that it was taken from."""
    shown = (name for name, value in facts.items() if not isinstance(value, (list, dict)) or name == "false_positive_interval")
    cells = [(escape(name), escape(facts[name])) for name in shown]
    plot = figures.plot_calibration(distances, float(facts.get("threshold", float("nan"))))
    return "\n\n".join(["## Guard calibration on kept rows", _image("distances", plot), table(["", ""], cells)])


def verification_markdown(verification: Mapping[str, Any]) -> str:
    """What the models answer on quarantined and on held-out rows."""
    header = [
        "model",
        "still gives the quarantined answer",
        "of rows",
        "right on held-out rows",
        "of rows",
        "trained on them",
        "flagged",
    ]
    cells = []
    for name, found in verification.items():
        quarantined, held_out = found.get("quarantined") or {}, found.get("held_out") or {}
        cells.append(
            (
                escape(name),
                percent(quarantined.get("residual")),
                number(quarantined.get("rows")),
                percent(held_out.get("performance")),
                number(held_out.get("rows")),
                "yes" if held_out.get("seen") else "no",
                percent(held_out.get("flagged")),
            )
        )
    return "\n\n".join(["## Verification", table(header, cells)])


def delivery_markdown(out: pathlib.Path, summary: Mapping[str, Any]) -> str:
    """Where the delivery lies and what is in it."""
    counts = [(escape(name), number(value)) for name, value in summary.items() if isinstance(value, int)]
    place = escape(out, 1000)
    links = f"[report.html]({(out / 'report.html').as_uri()}) in [the delivery folder]({out.as_uri()}): {place}"
    return "\n\n".join(["## Delivery", links, table(["", ""], counts), "Check it: byesight verify " + place])


class Outlet:
    """Publishes artifacts of one flow run; whatever goes wrong is logged and goes no further.

    Where Prefect's API doesn't answer, one warning is enough: nothing more is tried, since every try would wait for it.
    """

    def __init__(self) -> None:
        self._down = False

    def publish(self, key: str, build: Callable[[], str], log: Log) -> bool:
        """Build Markdown and publish it with the current run.

        Args:
            key: the artifact's key in the UI, `[a-z0-9-]`.
            build: makes the Markdown; nothing is published where it gives none.
            log: where problems are told.

        Returns:
            True if it was published.
        """

        def create() -> bool:
            from prefect.artifacts import create_markdown_artifact

            markdown = build()
            if len(markdown.encode()) > LIMIT:
                log.warning("the artifact %s is left out: above the limit of %d bytes", key, LIMIT)
            elif markdown:
                create_markdown_artifact(markdown, key=key)
                return True
            return False

        return bool(self.attempt(f"the artifact {key}", create, log))

    def attempt(self, what: str, call: Callable[[], T], log: Log) -> T | None:
        """Call Prefect's API; None where it fails or has failed to answer before."""
        if self._down:
            return None
        try:
            return call()
        except Exception as error:  # noqa: BLE001 - an artifact is not worth a run
            self._down = isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _TRANSPORT
            after = "; no more are tried, Prefect's API does not answer" if self._down else ""
            log.warning("%s could not be published (%s: %s)%s", what, type(error).__name__, error, after)
            return None


def builders(stage: str, result: StageResult, config: RunConfig) -> dict[str, Callable[[], str]]:
    """The artifacts of a stage's result, by key; those that need several results are the flow's."""
    folder, summary = result.folder, result.summary
    known: dict[str, dict[str, Callable[[], str]]] = {
        "ingest": {"ingest": lambda: ingest_markdown(summary, findings.read_rejected(folder, SHOWN_REJECTS))},
        "canary": {"canaries": lambda: canaries_markdown(findings.read_json(folder / "canaries.json"))},
        "provisional": {"provisional-loss": lambda: losses_markdown({stage: findings.read_losses(folder)})},
        "score": {"layers": lambda: layers_markdown(findings.read_json(folder / "layers.json"), layer_threshold(config))},
        "confirm": {
            "candidates": lambda: groups_markdown(
                findings.read_groups(folder), planted=config.cluster.transfer, pictures=config.cluster.pictures
            )
        },
        "cluster": {"scores": lambda: _scores(folder)},
        "final": {"final-loss": lambda: losses_markdown({stage: findings.read_losses(folder)})},
        "guard": {"guard": lambda: guard_markdown(summary, findings.read_calibration(folder).tolist())},
        "verify": {"verification": lambda: verification_markdown(findings.read_json(folder / "verification.json"))},
    }
    return known.get(stage, {})


def layer_threshold(config: RunConfig) -> float | None:
    """The separation from which a layer is sensitive; None where the rule compares something else."""
    return config.score.bsi_threshold if config.score.layer_rule == "bsi" else None


def _scores(clustered: pathlib.Path) -> str:
    result = findings.read_json(clustered / "result.json")
    return scores_markdown(findings.read_scores(clustered, method=result["method"]), result)


def _image(name: str, uri: str) -> str:
    return f"![{name}]({uri})"
