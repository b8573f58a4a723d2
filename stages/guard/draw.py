"""Which kept rows the guard's reference is taken from, and which of them tell the same: those that share a picture."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Mapping
from collections.abc import Set as AbstractSet

_COMMON = 0.1
"""Share of the rows above which a picture that they show beside others is as much a part of the prompt as its words are."""


def draw_reference(shown: Mapping[int, AbstractSet[str]], most: int) -> dict[int, int]:
    """Rows of as many different pictures as there are, then more rows about these.

    Rows about one picture are no independent draws, nor are two that have a third one's pictures in common. A row that would so tie
    groups together is left out. Pictures that more than a tenth of the rows show (a logo, examples that come with every question)
    tie none together, unless a row has no other.

    Args:
        shown: per row the digests of its pictures, at least one, in the order that they are drawn in.
        most: rows to take, at most.

    Returns:
        The rows taken, each with its group: the first row taken that it shares a picture with, itself for one.
    """
    counts = collections.Counter(itertools.chain.from_iterable(shown.values()))
    common = {picture for picture, rows in counts.items() if rows > _COMMON * len(shown)}
    groups: dict[int, int] = {}
    holders: dict[str, int] = {}
    for ties in (0, 1):
        for row, pictures in shown.items():
            own = pictures - common or pictures
            held = {holders[picture] for picture in own if picture in holders}
            if row not in groups and len(held) == ties and len(groups) < most:
                groups[row] = held.pop() if held else row
                holders |= dict.fromkeys(own, groups[row])
    return groups
