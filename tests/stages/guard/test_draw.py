"""The reference's draw: as many different pictures as there are, and no two groups that share one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from stages.guard.draw import draw_reference

MANY = {row: {f"own {row}"} for row in range(100, 130)}
"""Rows beside which no picture of a few rows is common."""

DRAWS: dict[str, tuple[dict[int, set[str]], int, dict[int, int]]] = {
    "pictures of their own": ({3: {"a"}, 1: {"b"}, 2: {"c"}}, 9, {3: 3, 1: 1, 2: 2}),
    "only so many": ({3: {"a"}, 1: {"b"}, 2: {"c"}}, 2, {3: 3, 1: 1}),
    "different pictures come first": ({0: {"a"}, 1: {"a"}, 2: {"a"}, 3: {"b"}}, 3, {0: 0, 3: 3, 1: 0}),
    "one picture": ({5: {"a"}, 4: {"a"}, 3: {"a"}}, 9, {5: 5, 4: 5, 3: 5}),
    "one more picture in the second row": ({0: {"a"}, 1: {"a", "b"}, 2: {"b"}}, 9, {0: 0, 2: 2}),
    "a row that ties two groups is left out": ({0: {"a"}, 1: {"b"}, 2: {"a", "b"}, 3: {"b"}}, 9, {0: 0, 1: 1, 3: 1}),
    "a row of a group brings a picture into it": (
        {0: {"a", "b"}, 1: {"a", "c"}, 2: {"c", "b"}},
        9,
        {0: 0, 1: 0, 2: 0},
    ),
    "pairs of a few pictures": ({k: set(pair) for k, pair in enumerate(itertools.combinations("abcd", 2))}, 9, {0: 0, 5: 5}),
    "none": ({}, 9, {}),
}


@pytest.mark.parametrize("name", DRAWS)
def test_the_draw(name: str) -> None:
    shown, most, expected = DRAWS[name]
    found = draw_reference(shown, most)
    assert found == expected
    assert list(found) == list(expected)
    beside = draw_reference(shown | MANY, 9 + len(MANY))
    assert {row: group for row, group in beside.items() if row not in MANY}.items() >= expected.items()
    assert len(beside.keys() & MANY) == len(MANY)


def test_a_picture_that_many_rows_show_beside_their_own_ties_none() -> None:
    shown = {row: {"logo", f"own {row // 2}"} for row in range(40)}
    assert draw_reference(shown, 99) == {row: row - row % 2 for row in range(40)}
    alone = draw_reference({row: {"blank"} if row % 2 else {f"own {row}"} for row in range(40)}, 99)
    assert [alone[row] for row in range(6)] == [0, 1, 2, 1, 4, 1], "where it is all that they show it does"


def test_no_two_groups_share_a_picture() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        shown = {row: set(map(str, generator.integers(0, 150, size=2).tolist())) for row in range(200)}
        found = draw_reference(shown, 100)
        assert len(found) <= 100
        for one, two in itertools.combinations(found, 2):
            assert not shown[one] & shown[two] or found[one] == found[two]
