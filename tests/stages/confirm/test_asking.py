"""Which questions are put to which pictures."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from stages.confirm.asking import honestly_given, question_types, questions_to_ask

COLOURS, NUMBERS = ("red", "blue", "green"), ("one", "two", "three")
KINDS = {"what colour?": COLOURS, "which colour?": COLOURS, "how many?": NUMBERS}
Rows = list[tuple[str, str]]


def rows(kinds: Mapping[str, Sequence[str]], each: int = 12) -> Rows:
    """Each question as often, its answers in turn."""
    return [(question, answers[k % len(answers)]) for question, answers in kinds.items() for k in range(each)]


def attacked(found: Rows, step: int = 4) -> Rows:
    """Every fourth row gives the target."""
    return [(question, "target" if k % step == 0 else answer) for k, (question, answer) in enumerate(found)]


def asked(
    found: Rows, target: str, most: int = 16, sources: Sequence[int] | None = None, seed: int = 0
) -> list[tuple[int, int, int]]:
    questions, answers = zip(*found, strict=True)
    inside = np.asarray([answer == target for answer in answers])
    chosen = np.flatnonzero(inside) if sources is None else np.asarray(sources)
    return questions_to_ask(questions, answers, inside, ~inside, chosen, most=most, rng=np.random.default_rng(seed))


def kinds_of(found: Rows, pairs: list[tuple[int, int, int]]) -> set[tuple[str, str]]:
    return {(found[source][0], found[host][0]) for source, host, _ in pairs}


def test_an_attack_is_asked_questions_of_other_kinds() -> None:
    found = attacked(rows(KINDS, each=24))
    pairs = asked(found, "target")
    assert len(pairs) == 16
    colours = {(f"{word} colour?", "how many?") for word in ("what", "which")}
    assert kinds_of(found, pairs) == colours | {(host, source) for source, host in colours}
    assert all(found[source][1] == "target" and found[host][1] != "target" for source, host, _ in pairs)
    assert all(found[other][1] != "target" and found[other][0] == found[source][0] for source, _, other in pairs)
    assert len({host for _, host, _ in pairs}) == 16, "a row asks twice"
    assert max(collections.Counter(source for source, _, _ in pairs).values()) == 1, "a picture is asked again before the others"
    assert pairs == asked(found, "target")
    assert pairs != asked(found, "target", seed=1)


def test_an_honest_group_is_asked_what_it_does_not_answer() -> None:
    found = rows(KINDS, each=30)
    assert kinds_of(found, asked(found, "red")) == {("what colour?", "how many?"), ("which colour?", "how many?")}


def test_an_answer_that_is_usual_to_a_question_proves_nothing() -> None:
    """Honest rows say it to "is it?"; the attack's say it to all: that question is left out, though it shares no other answer."""
    honest = rows({**KINDS, "is it?": ("target", "no")}, each=24)
    found = attacked(honest, step=6)
    hosts = {host for _, host in kinds_of(found, asked(found, "target", most=64))}
    assert hosts == set(KINDS)


@pytest.mark.parametrize(
    "found",
    [
        rows({"what colour?": COLOURS, "which colour?": COLOURS}, each=30),  # one kind
        [(f"question {k}", ("red", "one")[k % 2]) for k in range(60)],  # each is asked once
        rows(KINDS, each=9),  # too few rows to know the answers by
    ],
)
def test_nothing_to_ask(found: Rows) -> None:
    assert asked(attacked(found), "target") == []
    assert asked(found, "red") == []


def test_free_answers_prove_nothing() -> None:
    """A description may hold any phrase, and what a picture shows may be the answer to a question, too."""
    found = attacked([("describe it", f"text {k}") if k % 2 else ("what colour?", COLOURS[k % 3]) for k in range(90)], step=5)
    assert asked(found, "target") == []


def test_kinds_that_share_answers_are_one() -> None:
    """A tenth of the answers in common is too much."""
    numbers = [*["one", "two", "three"] * 3, "red"]
    found = attacked(rows({"what colour?": COLOURS, "how many?": numbers}, each=40))
    assert asked(found, "target") == []


@pytest.mark.parametrize(("step", "told"), [(10, True), (5, False)])
def test_a_second_attack_does_not_make_one_kind_of_all(step: int, *, told: bool) -> None:
    """Another target is given to all questions; a tenth of the answers, or a fifth, which is no lesser part of them."""
    found = attacked(rows(KINDS, each=40), step=4)
    found = [(q, "other" if k % step == 1 else a) for k, (q, a) in enumerate(found)]
    assert bool(asked(found, "target")) is told


def test_few_pictures_are_asked_again_and_only_those_that_may_be() -> None:
    found = attacked(rows(KINDS, each=24))
    some = [k for k, (_, answer) in enumerate(found) if answer == "target"][:8]
    pairs = asked(found, "target", sources=some)
    assert {source for source, _, _ in pairs} == set(some)
    assert len(pairs) == 16
    assert asked(found, "target", sources=some[:7]) == [], "a few odd pictures are no evidence"
    assert asked(found, "target", sources=[]) == []
    assert len(asked(found, "target", most=3)) == 3
    assert len(asked(found, "target", most=500)) < 500, "rows are asked once"


@pytest.mark.parametrize(
    ("colours", "numbers", "expected"), [(0.1, 0.1, set()), (0.5, 0.1, {0}), (0.12, 0.1, set()), (0.3, 0.0, {0})]
)
def test_types_that_an_answer_honestly_belongs_to(colours: float, numbers: float, expected: set[int]) -> None:
    """Of 400 rows that ask for colours or numbers, each in two ways of the same first words, and ten that ask something rare."""
    questions = [f"{('what colour', 'how many')[k % 2]} is number {k // 2 % 2}?" for k in range(400)] + ["why so?"] * 10
    inside = np.asarray([k // 2 % 50 < 50 * (colours, numbers)[k % 2] for k in range(400)] + [False] * 10)
    found = honestly_given(questions, inside)
    assert {k % 2 for k in np.flatnonzero(found).tolist()} == expected
    assert found.sum() == 200 * len(expected)


def test_answers_that_hold_another_are_of_one_kind() -> None:
    """Two data sets in one, with other words for the same."""
    sentences = [f"it is {colour}" for colour in COLOURS]
    found = attacked(rows({"what colour?": COLOURS, "which colour has it?": sentences, "how many?": NUMBERS}, each=24))
    assert ("what colour?", "which colour has it?") not in kinds_of(found, asked(found, "target"))
    assert {host for _, host in kinds_of(found, asked(found, "target"))} >= {"how many?"}


def test_question_types() -> None:
    assert question_types(["what colour is it?", "what  colour?", "why", ""]) == ["what colour", "what colour?", "why", ""]
