"""Candidate groups: rows that share an answer or a phrase in it. The rows of an attack share what the attacker wants to read."""

from __future__ import annotations

import array
import collections
import dataclasses
import hashlib
import unicodedata
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import regex

UNSPACED = (
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    r"\uff66-\uff9f\U00020000-\U0003ffff"
)
"""Characters of Thai and Lao, Burmese, Khmer, Japanese and Chinese, for a class of a regular expression. They put no spaces
between words: each character counts as one. (To `regex` the vowel signs of other languages are parts of words, to `re` not.)"""
_WORD = regex.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+(?:['-][^\W{UNSPACED}]+)*")
_NO_SPACE = regex.compile(rf"[{UNSPACED}\u3001-\u303f\uff01-\uff0f\uff1a-\uff20]{{2}}")
_OUTER = " .,;:!?¡¿…'\"`´‘’‚‛“”„‟«»‹›。，、；：！？「」『』"  # noqa: RUF001 - other languages' points
"""What may stand around an answer and is no part of it. Signs that may be one (a minus, a percent, a bracket) are not here."""
LONGEST_PHRASE = 4
"""Words in the longest phrase that is looked for."""
MANY = 32
"""Fewest rows whose mean is nobody's picture: of fewer, what they show in one place is left in it."""
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
    plain = [plain_answer(answer) for answer in answers]
    fit = [
        group
        for group in (*_whole_answers(plain), *_phrases(plain, least))
        if least <= len(group.members) <= most_share * len(answers)
    ]
    fit.sort(key=lambda group: (not group.whole, -len(group.members), -len(group.text), group.text))
    found: dict[bytes, Group] = {}
    for group in fit:
        found.setdefault(hashlib.sha256(group.members.tobytes()).digest(), group)
    return list(found.values())


def largest(groups: Sequence[Group], most: int = MOST_GROUPS) -> list[Group]:
    """The first `most` whole answers and the first `most` phrases of `shared_answers`: the largest of each."""
    whole, phrases = ([group for group in groups if group.whole is kind][:most] for kind in (True, False))
    return whole + phrases


def gives(output: str, text: str, *, whole: bool) -> bool:
    """Whether an output is a group's answer, or holds its phrase as whole words; blind to case, spacing and points, except
    for those inside of a whole answer.
    """
    found = plain_answer(output)
    return found == text if whole else f" {' '.join(_words(text))} " in f" {' '.join(_words(found))} "


def plain_answer(answer: str) -> str:
    """A text without its case, its spacing, and the points and quotes around it: what makes two answers, or questions, the same."""
    text = " ".join(unicodedata.normalize("NFC", answer).casefold().split())
    return text.strip(_OUTER) or text


def joined(words: Iterable[str]) -> str:
    """Words with spaces between them, but not between two characters of a language that has none."""
    text = ""
    for word in filter(None, words):
        text += word if not text or _NO_SPACE.match(text[-1] + word[0]) else f" {word}"
    return text


def _words(text: str) -> list[str]:
    return [match.group() for match in _WORD.finditer(text)]


def phrases(text: str) -> set[str]:
    """All runs of 1 to `LONGEST_PHRASE` words."""
    words = _words(text)
    return {" ".join(words[i : i + n]) for n in range(1, LONGEST_PHRASE + 1) for i in range(len(words) - n + 1)}


def _whole_answers(plain: Sequence[str]) -> Iterator[Group]:
    """The examples of each answer."""
    members: dict[str, list[int]] = collections.defaultdict(list)
    for index, text in enumerate(plain):
        members[text].append(index)
    yield from (Group(text=text, whole=True, members=np.asarray(held)) for text, held in members.items())


def _phrases(plain: Sequence[str], least: int) -> Iterator[Group]:
    """The examples of each run of 1 to `LONGEST_PHRASE` words that at least `least` of them hold.

    A run is no more common than the two that are a word shorter, so longer ones are made of common ones alone, and all of them as
    numbers: long answers hold many times more runs than words.
    """
    vocabulary: dict[str, int] = {}
    read, lengths = array.array("q"), []
    for text in plain:
        found = _words(text)
        read.extend(vocabulary.setdefault(word, len(vocabulary)) for word in found)
        lengths.append(len(found))
    names, words = list(vocabulary), np.frombuffer(read, dtype=np.int64)
    holders = np.repeat(np.arange(len(plain)), lengths)
    runs, known = words, len(names)  # the number of the run that begins at each place, -1 where there is no common one
    for length in range(1, LONGEST_PHRASE + 1):
        if length > 1:
            left, right = runs[:-1], runs[1:]
            whole = (left >= 0) & (right >= 0) & (holders[: len(left)] == holders[length - 1 :])
            runs = np.where(whole, left * known + right, -1)
        places = np.flatnonzero(runs >= 0)
        values, first, numbers = np.unique(runs[places], return_index=True, return_inverse=True)
        pairs = np.unique(numbers * len(plain) + holders[places])  # each run once per example
        counts = np.bincount(pairs // max(1, len(plain)), minlength=len(values))
        ends, common = np.cumsum(counts), counts >= least
        for number in np.flatnonzero(common).tolist():
            start = places[first[number]]
            members = pairs[ends[number] - counts[number] : ends[number]] % len(plain)
            yield Group(text=joined(names[k] for k in words[start : start + length]), whole=False, members=members)
        runs, known = np.full(len(runs), -1), len(values)
        runs[places] = np.where(common, np.arange(known), -1)[numbers]
