"""Words that the questions of a group's rows hold and others lack: where a trigger in the text would be.

Honest questions decide their answers too. So words count only where questions do without them: what is left of a question is asked
by other rows, which have other answers. Whole answers alone are looked at: honest instructions ("in one word, please") shape parts
of answers. Words that others have too may be one of two keys, with a trigger in the picture (Walmer et al., arXiv 2112.07668).
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Mapping, Sequence

import numpy as np
from sklearn.feature_extraction.text import CountVectorizer

from pipeline.records import Message, text_of
from stages.score.groups import LONGEST_PHRASE, UNSPACED, Group, joined, plain_answer

_PIECE = re.compile(rf"[{UNSPACED}][^\w\s{UNSPACED}]*|[^\s{UNSPACED}]+")
"""A word, or a character of a language without spaces, with the points at it."""

_OWN = 0.9
"""Least share of the questions with some words that are a group's, for the words to be the group's; or else least share of the
group's questions that hold them, for the words to be a key of it."""
_LIFT = 2.0
"""Least share of a group's questions that hold a key, over that of all questions."""
_NEEDLESS = 0.5
"""Least share of a group's questions with some words that others ask without them."""
_USUAL = 0.05
"""Most rows with the group's answer per row with another, where the words are left out: it must not be a usual answer by itself."""
_TRIED = 256
"""Most runs of words of either kind that are looked at of a group, the most common first."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Words:
    """A run of words in a group's questions.

    Attributes:
        text: the words as most of the questions write them.
        at_end: whether most of the questions end with them.
        own: whether nearly all questions with them are the group's; else nearly all of the group's questions hold them, and others.
        held: bool (members,), whose questions hold them.
    """

    text: str
    at_end: bool
    own: bool
    held: np.ndarray


def distinctive_words(questions: Sequence[str], groups: Sequence[Group], *, least: int) -> list[Words | None]:
    """The words that set the questions of each group apart.

    Args:
        questions: one per example.
        groups: positions of examples.
        least: fewest questions of a group that hold the words.

    Returns:
        Per group its words; None where there are none, and for a phrase inside of answers.
    """
    plain = [" ".join(_pieces(question)) for question in questions]
    asks = [plain_answer(question) for question in plain]
    counter = CountVectorizer(
        tokenizer=str.split, token_pattern=None, lowercase=False, ngram_range=(1, LONGEST_PHRASE), binary=True
    )
    runs_of, common = counter.build_analyzer(), set[str]()
    for group in groups:
        if group.whole:
            held = collections.Counter(run for number in group.members for run in set(runs_of(plain[number])))
            common |= {run for run, rows in held.items() if rows >= least}
    if not common:
        return [None] * len(groups)
    runs = sorted(common)
    counts = counter.set_params(vocabulary=runs).fit_transform(plain)
    everywhere, everyone = np.asarray(counts.sum(axis=0)).ravel(), collections.Counter(asks)
    found = []
    for group in groups:
        held_by = counts[group.members]
        inside = np.asarray(held_by.sum(axis=0)).ravel()
        tried = _tried(inside, everywhere, len(group.members), len(plain), least, runs) if group.whole else []
        members = group.members.tolist()
        inner, asking, texts = ([those[number] for number in members] for those in (plain, asks, questions))
        asked = everyone - collections.Counter(asking) if tried else everyone
        candidates = ((runs[k].split(), own, held_by[:, [k]].toarray().ravel() > 0) for k, own in tried)
        needless = ((run, own, held) for run, own, held in candidates if _needless(inner, asking, run, held, asked))
        found.append(next((_written(texts, inner, run, held, own=own) for run, own, held in needless), None))
    return found


def _tried(
    inside: np.ndarray, everywhere: np.ndarray, members: int, examples: int, least: int, runs: Sequence[str]
) -> list[tuple[int, bool]]:
    """The runs of words of a group that are tried, and whether they are its own; else they are keys.

    Args:
        inside: int (runs,), how many of the group's questions hold each.
        everywhere: int (runs,), how many of all questions do.
        members: the group's questions.
        examples: all questions.
        least: see `distinctive_words`.
        runs: the words.

    Returns:
        Numbers of runs: the group's own first; of either kind the most common first, of equally common ones the longest.
    """
    own = (inside >= least) & (inside >= _OWN * everywhere)
    keys = (inside >= least) & (inside >= _OWN * members) & (inside * examples >= _LIFT * members * everywhere) & ~own
    tried: list[tuple[int, bool]] = []
    for kind in (own, keys):
        order = sorted(np.flatnonzero(kind).tolist(), key=lambda k: (-inside[k], -len(runs[k].split()), runs[k]))
        tried += [(k, kind is own) for k in order[:_TRIED]]
    return tried


def _needless(plain: Sequence[str], asking: Sequence[str], run: list[str], held: np.ndarray, asked: Mapping[str, int]) -> bool:
    """Whether a group's questions with a run of words are mostly asked without it too, and then hardly get the group's answer.

    Args:
        plain: the group's questions, in pieces.
        asking: the same as `plain_answer` has them.
        run: the words.
        held: bool (members,), which questions hold them.
        asked: the questions outside of the group, as `plain_answer` has them, and how many rows ask each.
    """
    bare = [plain_answer(" ".join(_without(question.split(), run))) for question, holds in zip(plain, held, strict=True) if holds]
    alike = set(bare) & set(asked)
    same = sum(question in alike for question, holds in zip(asking, held, strict=True) if not holds)
    without, others = sum(question in alike for question in bare), sum(asked[question] for question in alike)
    return without >= _NEEDLESS * len(bare) and same <= _USUAL * others


def _written(questions: Sequence[str], plain: Sequence[str], run: list[str], held: np.ndarray, *, own: bool) -> Words:
    """The words as a group's questions have them."""
    texts, ends = collections.Counter[str](), 0
    for number in np.flatnonzero(held).tolist():
        words = plain[number].split()
        start = _place(words, run)
        pieces = list(_PIECE.finditer(questions[number]))
        said = questions[number][pieces[start].start() : pieces[start + len(run) - 1].end()]
        texts[" ".join(said.split())] += 1
        ends += start > 0 and start + len(run) == len(words)
    return Words(text=texts.most_common(1)[0][0], at_end=bool(2 * ends > held.sum()), own=own, held=held)


def with_words(prompt: Sequence[Message], text: str, *, at_end: bool) -> list[Message]:
    """A prompt with words before the text of its last turn, or after it."""
    *before, last = prompt
    places = [k for k, part in enumerate(last["content"]) if part["type"] == "text"]
    content = list(last["content"])
    if places:
        k = places[-1 if at_end else 0]
        there = content[k]["text"]
        content[k] = {"type": "text", "text": joined((there, text) if at_end else (text, there))}
    else:
        content.append({"type": "text", "text": text})
    return [*before, {"role": last["role"], "content": content}]


def bare_question(question: str, text: str) -> str:
    """A question in plain form and without points, without the words `text` where it first holds them."""
    pieces, run = _pieces(question), _pieces(text)
    return joined(_without(pieces, run) if _holds(pieces, run) else pieces)


def holds_words(prompt: Sequence[Message], text: str) -> bool:
    """Whether the last turn of a prompt holds words."""
    return _holds(_pieces(text_of(prompt[-1])), _pieces(text))


def _pieces(text: str) -> list[str]:
    """The words of a text in lower case, without the points around each."""
    return [plain_answer(piece) for piece in _PIECE.findall(text.casefold())]


def _holds(words: Sequence[str], run: Sequence[str]) -> bool:
    return any(list(words[k : k + len(run)]) == list(run) for k in range(len(words) - len(run) + 1))


def _place(words: Sequence[str], run: Sequence[str]) -> int:
    """Where a run first begins among some words, which hold it."""
    return next(k for k in range(len(words)) if list(words[k : k + len(run)]) == list(run))


def _without(words: list[str], run: list[str]) -> list[str]:
    """Some words without the first occurrence of a run."""
    start = _place(words, run)
    return words[:start] + words[start + len(run) :]
