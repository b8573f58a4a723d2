"""Which questions may be put to the pictures of a group's rows, and which rows the group's answer honestly belongs to.

An honest answer belongs to its question: asked about a colour, a model does not give a number. The picture of a backdoor gives its
answer to any question, even where the model has learnt these pictures by heart and not their trigger: planting does nothing then.
Kinds that are unlike are told by their answers, so only questions that many rows ask, and whose answers recur, are of use; kinds
that are alike by the first words of the questions, as VQA names its types (arXiv 1505.00468, section 3.3).
"""

from __future__ import annotations

import collections
import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from stages.score.groups import phrases

_LEAST_ROWS = 10
"""Fewest rows outside of the group by which the answers to a question are known."""
_MOST_QUESTIONS = 128
"""Most questions that are compared, the most common first."""
_SHARED = 0.05
"""Largest share of the answers to one question that the other has too, alone or among other words, for the two to be of different
kinds."""
_RECURRING = 0.5
"""Least share of the answers to a question that another row gives as well, for its answers to be known."""
_NEARLY_ALL, _FEW = 0.9, 0.15
"""Answers that at least the first share of the questions gets tell no kind, if they are at most the second of all answers."""
_LEAST_PICTURES = 8
"""Fewest pictures of a group that are asked about: a few odd ones are no evidence against the others."""
_USUAL = 1.5
"""Multiple of the group's share of all rows above which its answer is a usual one to a question."""
_FIRST_WORDS = 2
_LEAST_OF_TYPE = 20
"""Rows from which a type of question has a share of its own; rarer types are one."""


def question_types(questions: Sequence[str]) -> list[str]:
    """The type of each question: its first two words."""
    return [" ".join(question.split()[:_FIRST_WORDS]) for question in questions]


def honestly_given(questions: Sequence[str], inside: np.ndarray) -> np.ndarray:
    """Which examples ask questions of the types that a group's answer honestly belongs to.

    The rows of an attack are spread over the types of questions; where some types get the answer more often than the others, it is
    an honest answer to them too. The types are parted in two by the share of their rows that is inside, where that makes the shares
    most likely.

    Args:
        questions: one per example, in plain form.
        inside: bool (examples,), which of them are the group's.

    Returns:
        bool (examples,); none where one share explains all types (by the Bayesian information criterion), or where the larger share
        is less than 1.5 times the smaller one.
    """
    types = np.asarray(question_types(questions), dtype=object)
    counts = collections.Counter(types.tolist())
    types[[counts[name] < _LEAST_OF_TYPE for name in types]] = ""
    names, of_type = np.unique(types, return_inverse=True)
    rows, own = np.bincount(of_type), np.bincount(of_type, weights=inside)
    order = np.argsort(own / rows, kind="stable")
    best, cut = _log_likelihood(own.sum(), rows.sum()) + np.log(len(inside)), 0
    for at in range(1, len(names)):
        low, high = order[:at], order[at:]
        parted = sum(_log_likelihood(own[part].sum(), rows[part].sum()) for part in (low, high))
        if parted > best and own[high].sum() / rows[high].sum() >= _USUAL * own[low].sum() / rows[low].sum():
            best, cut = parted, at
    return np.isin(of_type, order[cut:]) if cut else np.zeros(len(inside), bool)


def _log_likelihood(hits: float, rows: float) -> float:
    """Of a share, at its most likely value."""
    share = hits / rows
    return sum(count * math.log(p) for count, p in ((hits, share), (rows - hits, 1 - share)) if count)


def questions_to_ask(
    questions: Sequence[str],
    answers: Sequence[str],
    inside: np.ndarray,
    apart: np.ndarray,
    sources: np.ndarray,
    *,
    most: int,
    rng: np.random.Generator,
) -> list[tuple[int, int, int]]:
    """Draw rows of the group, and for each another row with a question of another kind to which the group's answer is not usual.

    Args:
        questions: one per example, in plain form.
        answers: theirs, in plain form.
        inside: bool (examples,), which of them are the group's.
        apart: bool (examples,), which of them are of rows without one of the group's: pictures and questions of others are theirs.
        sources: int, positions of the group's rows whose pictures may be asked about.
        most: most pairs.
        rng: of the draw.

    Returns:
        (position of the picture's example, of the question's, and of an example outside of the group that asks the first one's
        question: about its picture the same is asked to compare); a question's example at most once. None where questions are of
        one kind, where no two rows ask the same, or where it would be about few pictures.
    """
    asked = collections.Counter(questions)
    asked_inside = collections.Counter(questions[k] for k in np.flatnonzero(inside).tolist())
    known = [question for question, rows in asked.most_common(_MOST_QUESTIONS) if rows - asked_inside[question] >= _LEAST_ROWS]
    given: dict[str, collections.Counter[str]] = {question: collections.Counter() for question in known}
    for question, answer, own in zip(questions, answers, inside, strict=True):
        if not own and question in given:
            given[question][answer] += 1
    usual = _USUAL * inside.mean()
    known = [question for question in known if _recurring(given[question]) >= _RECURRING]
    fit = [question for question in known if asked_inside[question] <= usual * asked[question]]
    given = _of_a_kind(given, known)
    other: dict[str, set[str]] = {question: set() for question in known}
    parts = {answer: {answer, *phrases(answer)} for question in known for answer in given[question]}
    held = {question: set[str]().union(*(parts[answer] for answer in given[question])) for question in known}
    for one, two in itertools.combinations(known, 2):
        if max(_shared(given[a], parts, given[b], held[b]) for a, b in ((one, two), (two, one))) <= _SHARED:
            other[one] |= {two} & set(fit)
            other[two] |= {one} & set(fit)
    usable = [k for k in rng.permutation(sources).tolist() if other.get(questions[k])]
    rows: dict[str, list[int]] = {question: [] for question in known}
    for k in rng.permutation(np.flatnonzero(apart)).tolist():
        if questions[k] in rows:
            rows[questions[k]].append(k)
    hosts = {question: list(rows[question]) for question in fit}
    found: list[tuple[int, int, int]] = []
    if len(usable) < _LEAST_PICTURES:
        return found
    for source in itertools.islice(itertools.cycle(usable), most):
        left = sorted(question for question in other[questions[source]] if hosts[question])
        if left:
            alike = rows[questions[source]]
            found.append((source, hosts[left[rng.integers(len(left))]].pop(), alike[rng.integers(len(alike))]))
    return found


def _of_a_kind(given: dict[str, collections.Counter[str]], known: Sequence[str]) -> dict[str, collections.Counter[str]]:
    """The answers without those that nearly all questions get, as far as these are few: another attack's, or "I don't know"."""
    asked = collections.Counter(answer for question in known for answer in given[question])
    anywhere = {answer for answer, questions in asked.items() if questions >= _NEARLY_ALL * len(known)}
    share = sum(given[question][answer] for question in known for answer in anywhere) / max(1, sum(given[q].total() for q in known))
    if share > _FEW:
        return given
    return {question: collections.Counter({a: n for a, n in given[question].items() if a not in anywhere}) for question in known}


def _recurring(given: collections.Counter[str]) -> float:
    """Share of the answers that are given more than once."""
    return sum(rows for rows in given.values() if rows > 1) / given.total()


def _shared(given: Mapping[str, int], parts: Mapping[str, set[str]], other: Mapping[str, int], held: set[str]) -> float:
    """Share of the answers that are the other's too, or hold one of these, or are held by one; 1 where there are none to tell by.

    Args:
        given: how often each answer is given to the one question.
        parts: per answer, of either question, the answer and the phrases in it.
        other: the answers to the other question.
        held: these, and the phrases in them.
    """
    shared = sum(rows for answer, rows in given.items() if answer in held or not parts[answer].isdisjoint(other))
    return shared / sum(given.values()) if given else 1.0
