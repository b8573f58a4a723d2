"""What the confirm stage tries on what: members of a group, and other rows that ask something else, or the same."""

from __future__ import annotations

import collections
import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from stages.confirm.asking import question_types, questions_to_ask
from stages.score.groups import MANY
from stages.score.words import bare_question
from storage.subset import Place

LEAST_HOSTS = 8
"""Hosts that must not give a group's answer anyway; on fewer nothing can be seen."""
LEAST_QUESTIONS = 32
"""Questions of another kind that must be found, half of which must not get a group's answer anyway: a smaller share of them tells,
so chance must weigh less."""
_DRAW = 19  # stream of random numbers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """The examples of a group, as positions in the attention table.

    Attributes:
        inside: bool (examples,), all with the group's text, also where the group is but a part of these.
        apart: bool (examples,), those of other rows than these: no turn about their pictures has the text.
        shifted: its shifted members.
        whole: whether they share their whole answer.
    """

    inside: np.ndarray
    apart: np.ndarray
    shifted: list[int]
    whole: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawn:
    """The examples of one experiment, as positions in the attention table.

    Attributes:
        group: the group that is tried.
        alike: whether hosts may ask what the group's rows ask; else each asks something of another kind than its source.
        keyed: whether the hosts' questions are given the group's words.
        hosts: examples outside of the group.
        sources: as many of its shifted members.
        asked: a shifted member, whose picture is asked about; an example outside of the group, whose question is put; and another
            one that asks as the member does, about whose picture it is put to compare.
    """

    group: int
    alike: bool
    keyed: bool = False
    hosts: list[int]
    sources: list[int]
    asked: list[tuple[int, int, int]] = dataclasses.field(default_factory=list)

    @property
    def examples(self) -> set[int]:
        """All of them."""
        return {*self.hosts, *self.sources, *(k for three in self.asked for k in three)}


def candidates(places: Sequence[Place], members: pathlib.Path, described: Sequence[dict[str, Any]]) -> dict[int, Candidate]:
    """The groups; those without a shifted member, or with examples of all rows, are left out."""
    place = np.asarray(places, dtype=np.int64).reshape(-1, 2)
    table = pq.read_table(members, columns=["group", "row", "turn", "posterior"])
    of, row, turn, posterior = (table[name].to_numpy() for name in table.column_names)
    turns = 1 + max(place[:, 1].max(initial=0), turn.max(initial=0))
    keys = place @ (turns, 1)
    order = np.argsort(keys)
    texts = {group["group"]: (group["text"], group["whole"]) for group in described}
    inside: dict[tuple[str, bool], list[np.ndarray]] = collections.defaultdict(list)  # positions
    shifted: dict[int, list[int]] = {}
    for number, text in texts.items():
        own = of == number
        positions = order[np.searchsorted(keys[order], row[own] * turns + turn[own])]
        inside[text].append(positions)
        shifted[number] = positions[posterior[own] > 0.5].tolist()
    found = {
        number: _candidate(place[:, 0], np.concatenate(inside[text]), shifted[number], whole=text[1])
        for number, text in texts.items()
        if shifted[number]
    }
    return {number: group for number, group in found.items() if group.apart.any()}


def _candidate(rows: np.ndarray, positions: np.ndarray, shifted: list[int], *, whole: bool) -> Candidate:
    """A group of the examples at `positions`. rows: int (examples,), the row that each example is of."""
    inside = np.zeros(len(rows), bool)
    inside[positions] = True
    return Candidate(inside=inside, apart=~np.isin(rows, rows[positions]), shifted=shifted, whole=whole)


def draw(
    questions: Sequence[str],
    answers: Sequence[str],
    groups: Mapping[int, Candidate],
    words: Mapping[int, str],
    most: int,
    seed: int,
) -> list[Drawn]:
    """What is tried on what: on rows that ask something of another kind, where there are any, and on rows that ask the same.

    The latter tells nothing of a phrase that few rows share. What a group with words (by its number) asks is told without them, and
    all is tried once more with them.
    """
    drawn, usual = [], question_types(questions)
    for number, group in groups.items():
        rng = np.random.default_rng([seed, _DRAW, number])
        texts, types = questions, usual
        if number in words:
            bare = {question: bare_question(question, words[number]) for question in set(questions)}
            texts = [bare[question] for question in questions]
            types = question_types(texts)
        asked = questions_to_ask(texts, answers, group.inside, group.apart, np.asarray(group.shifted), most=most, rng=rng)
        if len(asked) >= min(LEAST_QUESTIONS, most):
            sources, hosts = [source for source, _, _ in asked], [host for _, host, _ in asked]
            drawn.append(Drawn(group=number, alike=False, hosts=hosts, sources=sources, asked=asked))
            asked = []
            if not group.whole and len(group.shifted) < MANY:
                continue
        sources, hosts = _alike(types, group, most, rng)
        drawn.append(Drawn(group=number, alike=True, hosts=hosts, sources=sources, asked=asked))
    return drawn + [dataclasses.replace(one, keyed=True, asked=[]) for one in drawn if one.group in words]


def _alike(types: Sequence[str], group: Candidate, most: int, rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """Shifted members, and as many examples outside of the group that ask questions of their types; of any type, if too few do."""
    outside = rng.permutation(np.flatnonzero(group.apart)).tolist()
    of_type = collections.defaultdict(list)
    for k in outside:
        of_type[types[k]].append(k)
    pairs: list[tuple[int, int]] = []
    waiting = collections.deque(rng.permutation(group.shifted).tolist())
    while waiting and len(pairs) < most:
        source = waiting.popleft()
        if of_type[types[source]]:
            pairs.append((source, of_type[types[source]].pop()))
            waiting.append(source)
    if len(pairs) >= min(LEAST_HOSTS, len(outside)):
        return [source for source, _ in pairs], [host for _, host in pairs]
    hosts = outside[:most]
    return rng.choice(group.shifted, size=len(hosts), replace=len(group.shifted) < len(hosts)).tolist(), hosts
