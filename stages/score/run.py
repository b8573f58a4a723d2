"""The score stage: BYE's layer profile and score, and the candidate groups that attention proposes."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import ScoreConfig
from pipeline.records import Progress, no_progress
from stages.extract.table import AttentionTable
from stages.score.bye import RULES, bye, layer_profiles
from stages.score.groups import Group, largest, shared_answers
from stages.score.shift import SharedShift, head_features, shared_shift, shift_size, two_parts, whiten, within_questions
from stages.score.words import Words, distinctive_words

VERSION = 13
LAYERS = "layers.json"
EVIDENCE = "evidence.parquet"
GROUPS = "groups.json"
MEMBERS = "members.parquet"
_MEMBER_SCHEMA = pa.schema(
    [
        ("group", pa.int64()),
        ("row", pa.int64()),
        ("turn", pa.int32()),
        ("projection", pa.float64()),
        ("posterior", pa.float64()),
        ("worded", pa.bool_()),
    ]
)


def run(
    *, attention: pathlib.Path, config: ScoreConfig, seed: int, out: pathlib.Path, progress: Progress = no_progress
) -> dict[str, Any]:
    """Write what the attention says.

    Files: `layers.json` (BYE's profile by the configured rule); `evidence.parquet`, a record per pictured example (row, turn;
    bye_score, bye_posterior, bye_chosen and bye_threshold by the configured rule; bye_suspicious by the paper's,
    bye_code_suspicious by the public code's); `groups.json`, the candidates with the largest shared shift, and the words
    that set their questions apart; after them what is left of the groups of which only a part is shifted (`rest`), and the parts
    of those that attend in two ways (`part`); `members.parquet`
    (group, row, turn, projection, posterior, worded: whether its question holds these words), their examples.

    Args:
        attention: the extract stage's table.
        config: BYE's rule, and the number of candidates.
        seed: of the mixtures.
        out: folder to write into.
        progress: called as groups are measured.

    Returns:
        The summary: examples, sensitive layers, largest separation, groups measured, those left out as too many, and those kept.
    """
    table = AttentionTable.read(attention)
    by_rule = {rule: layer_profiles(table.entropy, rule, config.bsi_threshold, seed) for rule in RULES}
    plain = {rule: bye(table.entropy, profiles, seed) for rule, profiles in by_rule.items()}
    profiles = by_rule[config.layer_rule]
    (out / LAYERS).write_text(json.dumps([dataclasses.asdict(profile) for profile in profiles], indent=2) + "\n", encoding="utf-8")
    chosen = plain[config.layer_rule]
    evidence = {
        "row": table.row,
        "turn": table.turn,
        "bye_score": chosen.score,
        "bye_posterior": chosen.posterior,
        "bye_chosen": chosen.suspicious,
        "bye_threshold": np.full(len(table), chosen.threshold),
        "bye_suspicious": plain["bsi"].suspicious,
        "bye_code_suspicious": plain["public-code"].suspicious,
    }
    pq.write_table(pa.table(evidence), out / EVIDENCE, compression="zstd")
    found = shared_answers(table.answer, least=config.least_rows)
    groups, sizes = largest(found), list[float]()
    if groups:
        whitened = whiten(within_questions(head_features(table), table.question, table.answer))
        for index, group in enumerate(groups):
            sizes.append(shift_size(whitened, group))
            progress((index + 1) / len(groups), f"{index + 1} of {len(groups)} groups of answers")
    first = sorted(range(len(groups)), key=lambda index: (-sizes[index], groups[index].text))[: config.candidates]
    kept = [(groups[index], shared_shift(whitened, groups[index], seed, least=config.least_rows)) for index in first]
    words = distinctive_words(table.question, [group for group, _ in kept], least=config.least_rows)
    others = [rest for group, shift in kept if len((rest := _unshifted(group, shift)).members) >= config.least_rows]
    parts = [part for group, _ in kept for part in _parts(group, whitened, config.least_rows, seed)]
    kinds = [None] * len(kept) + ["rest"] * len(others) + ["part"] * len(parts)
    more = [(group, shared_shift(whitened, group, seed, least=config.least_rows)) for group in others] + parts
    kept += more
    words += distinctive_words(table.question, [group for group, _ in more], least=config.least_rows)
    described = [
        {**_describe(number, *found, words[number], table.entropy), "rest": kind == "rest", "part": kind == "part"}
        for number, (found, kind) in enumerate(zip(kept, kinds, strict=True))
    ]
    (out / GROUPS).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    pq.write_table(_members(kept, words, table), out / MEMBERS, compression="zstd")
    return {
        "examples": len(table),
        "sensitive_layers": [profile.layer for profile in profiles if profile.sensitive],
        "largest_separation": max((profile.separation for profile in profiles), default=0.0),
        "groups": len(groups),
        "groups_left_out": len(found) - len(groups),
        "candidates": len(kept),
        "largest_shift": kept[0][1].size if kept else 0.0,
    }


def _unshifted(group: Group, shift: SharedShift) -> Group:
    """The members of a group that are not in its shifted part; one attack may shift attention in two ways."""
    return dataclasses.replace(group, members=group.members[shift.posterior <= 0.5])


def _parts(group: Group, whitened: np.ndarray, least: int, seed: int) -> list[tuple[Group, SharedShift]]:
    """The two parts of an answer's rows, where these attend in two ways."""
    first = two_parts(whitened, group, seed) if group.whole else None
    if first is None:
        return []
    found = []
    for own in (first, 1 - first):
        part = dataclasses.replace(group, members=group.members[own > 0.5])
        found.append((part, dataclasses.replace(shared_shift(whitened, part, seed, least=least), posterior=own[own > 0.5])))
    return found


def _describe(number: int, group: Group, shift: SharedShift, words: Words | None, entropy: np.ndarray) -> dict[str, Any]:
    """A candidate's record; `layer` is where the entropy of its shifted rows falls most below that of all rows."""
    shifted = shift.posterior > 0.5
    drop = entropy[group.members[shifted]].mean(axis=0) - np.median(entropy, axis=0)
    return {
        "group": number,
        "text": group.text,
        "whole": group.whole,
        "rows": len(group.members),
        "shifted": int(shifted.sum()),
        "shift": shift.size,
        "words": None
        if words is None
        else {"text": words.text, "at_end": words.at_end, "own": words.own, "rows": int(words.held.sum())},
        "layer": int(drop.argmin()),
        "entropy_shift": float(drop.min()),
    }


def _members(kept: Sequence[tuple[Group, SharedShift]], words: Sequence[Words | None], table: AttentionTable) -> pa.Table:
    """The candidates' examples, group after group."""
    parts = [
        pa.table(
            {
                "group": pa.array(np.full(len(group.members), number), pa.int64()),
                "row": pa.array(table.row[group.members], pa.int64()),
                "turn": pa.array(table.turn[group.members], pa.int32()),
                "projection": pa.array(shift.projection, pa.float64()),
                "posterior": pa.array(shift.posterior, pa.float64()),
                "worded": pa.array(np.zeros(len(group.members), bool) if found is None else found.held),
            },
            schema=_MEMBER_SCHEMA,
        )
        for number, ((group, shift), found) in enumerate(zip(kept, words, strict=True))
    ]
    return pa.concat_tables([_MEMBER_SCHEMA.empty_table(), *parts])
