"""Which groups are removed, which are left to a person, and which of their rows stay, by what the confirm stage has measured.

A group is a record of its `transfer.json`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.config import ClusterConfig
from pipeline.errors import ConfigError
from stages.score.groups import plain_answer

_UNSURE = 0.7
"""Share of a threshold of the transfer from which a group makes the verdict of a run without removals inconclusive."""
_REVERSED = 0.7
"""Least reversal among rows that ask the same by which a group is removed: where fewer rows lose the answer, many may be honest."""
_REST = 0.5
"""Least transfer by which what is left of a group, or a part of one, is removed: most of its rows are the attack's then."""
_PURE = 0.9
"""Least share of the rows that ask the same which a part takes over: it is an attack's alone or honest, and what honest rows that
look alike have in common takes over some, too."""


def check_decided(groups: Sequence[dict[str, Any]], config: ClusterConfig) -> None:
    """Refuse decisions of a person that can't be carried out.

    Raises:
        ConfigError: `remove` or `keep` names a group that was not tested, or both name one.
    """
    known = {plain_answer(group["text"]) for group in groups}
    both = set(map(plain_answer, config.remove)) & set(map(plain_answer, config.keep))
    if both:
        raise ConfigError(f"cluster: remove and keep both name {min(both)!r}")
    for name in ("remove", "keep"):
        for text in getattr(config, name):
            if plain_answer(text) not in known:
                raise ConfigError(
                    f"cluster.{name}: no group with the answer or phrase {text!r} was tested; the report names those that were"
                )


def is_named(group: dict[str, Any], texts: Sequence[str]) -> bool:
    """Whether a person's list names a group."""
    return plain_answer(group["text"]) in map(plain_answer, texts)


def answer_of(group: dict[str, Any]) -> str | None:
    """What all rows of a group answer; None where it is a phrase that they share."""
    return group["text"] if group["whole"] else None


def is_removed(group: dict[str, Any], config: ClusterConfig) -> bool:
    """Whether a person says so, or else a test."""
    if is_named(group, config.keep):
        return False
    tests = (removed_as_planted, removed_as_keyed, removed_as_worded, removed_as_asked)
    return is_named(group, config.remove) or any(test(group, config) for test in tests)


def is_unsure(group: dict[str, Any], config: ClusterConfig) -> bool:
    """Whether a group comes near a threshold, and no person has decided on it."""
    return _nearness(group, config) >= _UNSURE and not is_named(group, config.keep)


def told_surely(group: dict[str, Any], config: ClusterConfig) -> dict[str, Any]:
    """A group with the way of planting by which it is removed in the place of the one that tells most, where that is another."""
    for way in sorted(group["ways"], key=lambda way: -float(way["tokens_transfer"])):
        if removed_as_planted({**group, **way}, config):
            group = {**group, **way}
            break
    for way in sorted(group["keyed_ways"], key=lambda way: -float(way["transfer"])):
        if removed_as_keyed({**group, "keyed": way}, config):
            return {**group, "keyed": way}
    return group


def honest_parts(groups: Sequence[dict[str, Any]], config: ClusterConfig) -> dict[int, str]:
    """By number the answers of parts that do nothing, where the other part of the answer's rows is removed.

    Their rows stay where only rows that ask the same tell of the whole; else each picture is asked (`stages.confirm.mixed`).
    """
    parts = [group for group in groups if group["part"]]
    removed = {answer_of(group) for group in parts if is_removed(group, config)}
    return {group["group"]: group["text"] for group in parts if answer_of(group) in removed and _nearness(group, config) < _UNSURE}


def removed_as_planted(group: dict[str, Any], config: ClusterConfig) -> bool:
    """By what its rows attend to, or have in common, planted into others' pictures.

    Not where all other rows ask the same and answer the same: an object that is asked for looks like a trigger there. Nor where
    too few of its rows lose the answer, so that honest ones may have it too. What is left of a group needs more: a second trigger's
    rows may be mixed with honest ones in it. So does a part of one: its rows look alike, whyever that is.
    """
    limit = max(_REST, config.transfer) if group["rest"] or group["part"] else config.transfer
    pure = not (group["part"] and group["alike"]) or group["taken_over"] >= _PURE
    return bool(group["tokens_transfer"] >= limit and _told(group) and pure)


def removed_as_keyed(group: dict[str, Any], config: ClusterConfig) -> bool:
    """By the same, planted where questions hold the group's words."""
    keyed = group["keyed"]
    return bool(keyed is not None and _told(keyed) and keyed["transfer"] >= config.transfer)


def removed_as_worded(group: dict[str, Any], config: ClusterConfig) -> bool:
    """By the group's words in others' questions."""
    return bool(group["words_transfer"] >= config.transfer)


def removed_as_asked(group: dict[str, Any], config: ClusterConfig) -> bool:
    """By questions of another kind about its pictures, where the configuration lets these decide."""
    return config.asked == "remove" and bool(group["pictures_transfer"] >= config.pictures)


def _told(way: dict[str, Any]) -> bool:
    """Whether the rows lose the answer without what was planted, where that was asked for."""
    return not way["alike"] or (way["reversed"] is not None and way["reversed"] >= _REVERSED)


def _nearness(group: dict[str, Any], config: ClusterConfig) -> float:
    """How near a group comes to its nearest threshold; 1 and more where it reaches it."""
    limit = max(_REST, config.transfer) if group["part"] and group["alike"] else config.transfer
    return float(max(group["transfer"] / limit, group["pictures_transfer"] / config.pictures))
