"""Candidate groups: rows that share an answer or a phrase in it. The rows of an attack share what the attacker wants to read."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Sequence

import numpy as np

_WORD = re.compile(r"\w+(?:['-]\w+)*", re.UNICODE)
LONGEST_PHRASE = 4
"""Words in the longest phrase that is looked for."""
MOST_GROUPS = 5000
"""Whole answers that are measured at most, and as many phrases: each group costs a pass over its rows' features, 10,000 of them
minutes. Apart, since an honest submission may have any number of answers, and the phrase of an attack must not wait behind them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Examples that share an answer or a phrase.

    Attributes:
        text: the answer, or the phrase, in lower case.
        whole: True where it is the whole answer.
        members: int (size,), positions of the examples, ascending.
    """

    text: str
    whole: bool
    members: np.ndarray


def shared_answers(answers: Sequence[str], *, least: int, most_share: float = 0.9) -> list[Group]:
    """Groups of examples by whole answer and by phrase of up to `LONGEST_PHRASE` words.

    A phrase whose rows are those of a longer phrase, or of a whole answer, is left out.

    Args:
        answers: the submitted answers.
        least: fewest examples of a group.
        most_share: largest share of all examples; a group needs others to be compared with.

    Returns:
        The groups, whole answers first, larger ones first.
    """
    members: dict[tuple[bool, str], list[int]] = collections.defaultdict(list)
    for index, answer in enumerate(answers):
        text = plain_answer(answer)
        members[True, text].append(index)
        for phrase in phrases(text):
            members[False, phrase].append(index)
    most = most_share * len(answers)
    found: dict[bytes, Group] = {}
    ordered = sorted(members.items(), key=lambda item: (not item[0][0], -len(item[1]), -len(item[0][1]), item[0][1]))
    for (whole, text), indices in ordered:
        if least <= len(indices) <= most:
            array = np.asarray(indices, dtype=np.int64)
            found.setdefault(array.tobytes(), Group(text=text, whole=whole, members=array))
    return list(found.values())


def largest(groups: Sequence[Group], most: int = MOST_GROUPS) -> list[Group]:
    """The first `most` whole answers and the first `most` phrases of `shared_answers`: the largest of each."""
    whole, phrases = ([group for group in groups if group.whole is kind][:most] for kind in (True, False))
    return whole + phrases


def gives(output: str, text: str, *, whole: bool) -> bool:
    """Whether an output is a group's answer, or holds its phrase as whole words; blind to case, spacing and a phrase's points."""
    found = plain_answer(output)
    return found == text if whole else f" {text} " in f" {' '.join(_words(found))} "


def plain_answer(answer: str) -> str:
    """An answer without its case and spacing: what makes two answers the same."""
    return " ".join(answer.casefold().split())


def _words(text: str) -> list[str]:
    return [match.group() for match in _WORD.finditer(text)]


def phrases(text: str) -> set[str]:
    """All runs of 1 to `LONGEST_PHRASE` words."""
    words = _words(text)
    return {" ".join(words[i : i + n]) for n in range(1, LONGEST_PHRASE + 1) for i in range(len(words) - n + 1)}
