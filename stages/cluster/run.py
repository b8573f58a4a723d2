"""The cluster stage: from evidence to a verdict for every row, and one for the whole."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import ClusterConfig
from pipeline.errors import RemovalCapError
from pipeline.records import Progress, Verdict, no_progress
from stages.cluster.decide import (
    answer_of,
    check_decided,
    honest_parts,
    is_named,
    is_removed,
    is_unsure,
    removed_as_asked,
    removed_as_keyed,
    removed_as_planted,
    removed_as_worded,
    told_surely,
)
from storage.subset import canonical_shards

VERSION = 15
VERDICTS = "verdicts.parquet"
RESULT = "result.json"
KEEP = "keep.parquet"
TRAIN = "train.parquet"
HELD_OUT = "held_out.parquet"
VERDICT_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("sample_id", pa.string()),
        ("verdict", pa.string()),
        ("reason", pa.string()),
        ("score", pa.float64()),
        ("posterior", pa.float64()),
        ("threshold", pa.float64()),
        ("bye_score", pa.float64()),
        ("bye_quarantine", pa.bool_()),
        ("bye_code_quarantine", pa.bool_()),
    ]
)


@dataclasses.dataclass(kw_only=True)
class RowEvidence:
    """What is known of one row, the most suspicious of its turns counting; `bye_chosen` is by the configured layer rule."""

    score: float = float("nan")
    posterior: float = 0.0
    reason: str = ""
    suspicious: bool = False
    scored: bool = False
    bye_score: float = float("nan")
    bye_posterior: float = 0.0
    bye_threshold: float = float("nan")
    bye_chosen: bool = False
    bye: bool = False
    bye_code: bool = False

    def suspect(self, posterior: float, reason: str) -> None:
        """Count a row as a member of a confirmed group, by its posterior; the first group that holds it gives the reason."""
        self.posterior = max(self.posterior, posterior)
        if posterior > 0.5 and not self.suspicious:
            self.suspicious, self.reason = True, reason


def run(
    *,
    rows: pathlib.Path,
    rejected: pathlib.Path,
    evidence: pathlib.Path,
    members: pathlib.Path,
    transfer: pathlib.Path,
    asked: pathlib.Path,
    canaries: pathlib.Path | None = None,
    config: ClusterConfig,
    held_out_share: float,
    seed: int,
    out: pathlib.Path,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Write `verdicts.parquet`, `result.json` and the row lists `keep.parquet`, `train.parquet` and `held_out.parquet`.

    Args:
        rows: folder of canonical shards.
        rejected: the rows that ingest rejected.
        evidence: the score stage's table of rows.
        members: its table of the groups' members.
        transfer: the confirm stage's result.
        asked: its table of rows whose answer may be an honest one.
        canaries: the canary stage's list, where evidence, members and result hold canaries; they get no verdict.
        config: method, thresholds and the cap.
        held_out_share: share of the kept rows with pictures that the final fine-tune leaves out, to measure it on.
        seed: of the draw of held-out rows.
        out: folder to write into.
        progress: called once.

    Returns:
        The content of `result.json`: verdict of the whole (`poisoned`, `clean`, or `inconclusive` where a group comes close to the
        threshold or no row could be scored), counts, confirmed groups, what plain BYE would have removed, and per kind of canaries
        how many of them would have been.

    Raises:
        ConfigError: `remove` or `keep` names a group that was not tested.
        RemovalCapError: more than the configured share of the rows would be removed.
    """
    found = _plain(evidence)
    groups = [told_surely(group, config) for group in json.loads(transfer.read_text(encoding="utf-8"))]
    check_decided(groups, config)
    honest = honest_parts(groups, config)
    staying = _shared(found, members, groups, asked, honest, config)
    if config.method == "bye":
        _by_bye(found)
    planted = _take_canaries(found, canaries, members, groups)
    ours = {number for kind in planted for number in kind["groups"]}
    groups = [group for group in groups if group["group"] not in ours]
    table = _verdicts(rows, rejected, found, config)
    verdicts = np.asarray(table["verdict"].to_pylist())
    removed, accepted = int((verdicts == Verdict.QUARANTINE).sum()), int((verdicts != Verdict.REJECTED).sum())
    if removed > config.removal_cap * accepted:
        raise RemovalCapError(
            f"{removed} of {accepted} rows ({removed / accepted:.0%}) look poisoned, more than cluster.removal_cap = "
            f"{config.removal_cap:.0%}; look at the groups of the confirm stage, and raise the cap if they are an attack"
        )
    _write_lists(table["row"].to_numpy(), verdicts, held_out_share, seed, out)
    pq.write_table(table, out / VERDICTS, compression="zstd")
    tried = groups if config.method == "transfer" else []
    confirmed = [group for group in tried if is_removed(group, config)]
    undecided = [group for group in tried if group["group"] in staying and answer_of(group) not in honest.values()]
    unsure = [group for group in undecided if group not in confirmed and is_unsure(group, config)]
    threshold = next((_number(row.bye_threshold) for row in found.values()), None)
    result = {
        "verdict": "poisoned" if removed else "inconclusive" if confirmed or unsure or not found else "clean",
        "method": config.method,
        "threshold": config.transfer if config.method == "transfer" else threshold,
        "rows": {
            "submitted": len(table),
            "rejected": len(table) - accepted,
            "not_scored": int((verdicts == Verdict.NOT_SCORED).sum()),
            "kept": int((verdicts == Verdict.KEEP).sum()),
            "quarantined": removed,
        },
        "confirmed": confirmed,
        "unsure": unsure,
        "plain": {
            "bye": sum(row.bye for row in found.values()),
            "bye-public-code": sum(row.bye_code for row in found.values()),
        },
        "canaries": planted,
    }
    (out / RESULT).write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    progress(1.0, f"{removed} of {accepted} rows quarantined")
    return result


def _plain(evidence: pathlib.Path) -> dict[int, RowEvidence]:
    """BYE's evidence by row."""
    found: dict[int, RowEvidence] = {}
    for record in pq.read_table(evidence).to_pylist():
        row = found.setdefault(record["row"], RowEvidence(scored=True, score=0.0))
        row.bye_chosen |= record["bye_chosen"]
        row.bye_threshold = record["bye_threshold"]
        row.bye |= record["bye_suspicious"]
        row.bye_code |= record["bye_code_suspicious"]
        row.bye_posterior = max(row.bye_posterior, record["bye_posterior"])
        row.bye_score = float(np.fmin(row.bye_score, record["bye_score"]))
    return found


def _shared(
    found: dict[int, RowEvidence],
    members: pathlib.Path,
    groups: list[dict[str, Any]],
    asked: pathlib.Path,
    honest: Mapping[int, str],
    config: ClusterConfig,
) -> set[int]:
    """Add the evidence of the groups: score is a row's projection on its group's shift, posterior holds for confirmed groups.

    `honest` are the parts of answers whose rows stay (`honest_parts`).

    Returns:
        The groups of which a shifted row stays.
    """
    by_number = {group["group"]: group for group in groups if not is_named(group, config.keep)}
    decided = {number for number, group in by_number.items() if is_named(group, config.remove)}
    looked_at = {(one["group"], one["row"], one["turn"]): one for one in pq.read_table(asked).to_pylist()}
    records = pq.read_table(members).to_pylist()
    spared = {(honest[one["group"]], one["row"], one["turn"]) for one in records if one["group"] in honest}
    for record in records:
        row, group = found[record["row"]], by_number.get(record["group"])
        row.score = max(row.score, record["projection"])
        if group is None:
            continue
        what = "answer" if group["whole"] else "phrase"
        own = looked_at.get((record["group"], record["row"], record["turn"]))
        posterior = record["posterior"] if own is None else min(record["posterior"], own["posterior"])
        alike = (
            f"one of {group['shifted']} rows with the {what} {group['text']!a} whose attention shifts alike "
            f"({group['shift']:.1f} deviations)"
        )
        also = "" if own is None else f"; its own picture makes {own['hits']} of {own['asked']} other questions give it"
        if group["group"] in decided:
            row.suspect(
                posterior,
                f"{alike}; a person has found it to be an attack's (cluster.remove){also}",
            )
        if group["alike"] and (answer_of(group), record["row"], record["turn"]) in spared:
            continue
        if removed_as_planted(group, config):
            row.suspect(
                posterior,
                f"{alike}; what they attend to, planted into other pictures, turns {group['taken_over']:.0%} of the answers into it"
                f"{_undone(group)}{also}",
            )
        if removed_as_asked(group, config):
            row.suspect(
                posterior,
                f"one of {group['shifted']} rows with the {what} {group['text']!a}; asked questions of another kind about their "
                f"pictures, the provisional model gives it to {group['asked']:.0%} of them (to {group['others']:.0%} about others)"
                f"{also}",
            )
        if record["worded"] and removed_as_keyed(group, config):
            row.suspect(
                posterior,
                f"{alike}; what they attend to, planted where questions hold {group['words']['text']!a}, turns "
                f"{group['keyed']['taken_over']:.0%} of the answers into it, beyond what the words do alone"
                f"{_undone(group['keyed'])}{also}",
            )
        if record["worded"] and removed_as_worded(group, config):
            row.suspect(
                1.0,
                f"one of {group['words']['rows']} rows with the answer {group['text']!a} whose questions hold "
                f"{group['words']['text']!a}; put into other questions these words turn {group['words_transfer']:.0%} "
                "of the answers into it",
            )
    return {record["group"] for record in records if record["posterior"] > 0.5 and not found[record["row"]].suspicious}


def _undone(way: dict[str, Any]) -> str:
    """What became of the group's rows without what was planted, where that was asked for."""
    return f"; taken out, these rows answer as others do, by {way['reversed']:.0%}" if way["alike"] else ""


def _take_canaries(
    found: dict[int, RowEvidence], canaries: pathlib.Path | None, members: pathlib.Path, groups: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Take the canaries out of the evidence; per kind: how many would have been removed, its groups and their largest transfer."""
    if canaries is None:
        return []
    of_group: dict[int, set[int]] = {}
    for record in pq.read_table(members, columns=["group", "row"]).to_pylist():
        of_group.setdefault(record["group"], set()).add(record["row"])
    kinds = []
    for kind in json.loads(canaries.read_text(encoding="utf-8")):
        rows = range(kind["first"], kind["first"] + kind["rows"])
        evidence = [found.pop(row) for row in rows]
        own = [group for group in groups if of_group.get(group["group"], {-1}) <= set(rows)]
        kinds.append(
            {
                **{name: kind[name] for name in ("trigger", "answer", "rows")},
                "found": sum(row.suspicious for row in evidence),
                "transfer": max((group["transfer"] for group in own), default=None),
                "groups": [group["group"] for group in own],
            }
        )
    return kinds


def _by_bye(found: dict[int, RowEvidence]) -> None:
    """Let BYE alone decide, by the configured layer rule."""
    for row in found.values():
        row.suspicious, row.score, row.posterior = row.bye_chosen, row.bye_score, row.bye_posterior
        row.reason = (
            f"BYE: mean entropy of the sensitive layers is {row.bye_score:.3f} nats, in the lower cluster (up to "
            f"{row.bye_threshold:.3f})"
            if row.suspicious
            else ""
        )


def _verdicts(rows: pathlib.Path, rejected: pathlib.Path, found: dict[int, RowEvidence], config: ClusterConfig) -> pa.Table:
    """One record per submitted row, in order."""
    records: list[dict[str, Any]] = []
    for shard in canonical_shards(rows):
        for record in pq.read_table(shard, columns=["row", "sample_id"]).to_pylist():
            row = found.get(record["row"], RowEvidence())
            verdict = Verdict.QUARANTINE if row.suspicious else Verdict.KEEP if row.scored else Verdict.NOT_SCORED
            records.append(
                {
                    **record,
                    "verdict": str(verdict),
                    "reason": row.reason or ("" if row.scored else "no picture: nothing to score"),
                    "score": _number(row.score),
                    "posterior": row.posterior if row.scored else None,
                    "threshold": config.transfer if config.method == "transfer" else _number(row.bye_threshold),
                    "bye_score": _number(row.bye_score),
                    "bye_quarantine": row.bye,
                    "bye_code_quarantine": row.bye_code,
                }
            )
    for record in pq.read_table(rejected).to_pylist():
        reason = f"{record['reason']} ({record['where']})"
        records.append({"row": record["row"], "sample_id": None, "verdict": str(Verdict.REJECTED), "reason": reason})
    return pa.Table.from_pylist(sorted(records, key=lambda record: int(record["row"])), schema=VERDICT_SCHEMA)


def _write_lists(numbers: np.ndarray, verdicts: np.ndarray, held_out_share: float, seed: int, out: pathlib.Path) -> None:
    """Write the kept rows, and their split into rows to train on and rows to measure on."""
    kept = numbers[(verdicts == Verdict.KEEP) | (verdicts == Verdict.NOT_SCORED)]
    scored = np.random.default_rng([seed, 23]).permutation(numbers[verdicts == Verdict.KEEP])
    held = np.sort(scored[: round(held_out_share * len(scored))])
    for name, chosen in ((KEEP, kept), (TRAIN, np.setdiff1d(kept, held)), (HELD_OUT, held)):
        pq.write_table(pa.table({"row": pa.array(chosen, pa.int64())}), out / name)


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
