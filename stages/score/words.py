"""Words that the questions of a group's rows hold and others lack: where a trigger in the text would be.

Honest questions decide their answers too. So words count only where questions do without them: what is left of a question is asked
by other rows, which have other answers. Whole answers alone are looked at: honest instructions ("in one word, please") shape parts
of answers.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np
from sklearn.feature_extraction.text import CountVectorizer

from pipeline.records import Message
from stages.score.groups import LONGEST_PHRASE, Group, plain_answer

_OWN = 0.9
"""Least share of the questions with some words that are a group's, for the words to be the group's."""
_NEEDLESS = 0.5
"""Least share of a group's questions with some words that others ask without them."""
_TRIED = 32
"""Most runs of words of a group that are looked at, the most common first."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Words:
    """A run of words in a group's questions.

    Attributes:
        text: the words as most of the questions write them.
        at_end: whether most of the questions end with them.
        held: bool (members,), whose questions hold them.
    """

    text: str
    at_end: bool
    held: np.ndarray


class QuestionWords:
    """All runs of up to `LONGEST_PHRASE` words in some questions, counted once.

    Args:
        questions: one per example.
        least: fewest questions that hold a run.
    """

    def __init__(self, questions: Sequence[str], *, least: int) -> None:
        self._questions = questions
        self._plain = [plain_answer(question) for question in questions]
        self._least = least
        counter = CountVectorizer(
            tokenizer=str.split, token_pattern=None, lowercase=False, ngram_range=(1, LONGEST_PHRASE), min_df=least, binary=True
        )
        holding = collections.Counter(word for question in self._plain for word in set(question.split()))
        common = max(holding.values(), default=0) >= least
        self._counts = counter.fit_transform(self._plain) if common else None
        self._runs: list[str] = counter.get_feature_names_out().tolist() if common else []

    def of(self, group: Group) -> Words | None:
        """The words that set a group's questions apart; None where there are none, and for a phrase inside of answers."""
        if self._counts is None or not group.whole:
            return None
        inside = np.asarray(self._counts[group.members].sum(axis=0)).ravel()
        everywhere = np.asarray(self._counts.sum(axis=0)).ravel()
        own = np.flatnonzero((inside >= self._least) & (inside >= _OWN * everywhere)).tolist()
        members = set(group.members.tolist())
        asked = {question for number, question in enumerate(self._plain) if number not in members} if own else set()
        for k in sorted(own, key=lambda k: (-inside[k], -len(self._runs[k].split()), self._runs[k]))[:_TRIED]:
            held = self._counts[group.members][:, [k]].toarray().ravel() > 0
            run, holding = self._runs[k].split(), group.members[held].tolist()
            if sum(" ".join(_without(self._plain[n].split(), run)) in asked for n in holding) >= _NEEDLESS * len(holding):
                return self._words(run, holding, held)
        return None

    def _words(self, run: list[str], holding: list[int], held: np.ndarray) -> Words:
        size = len(run)
        written, ends = collections.Counter[str](), 0
        for number in holding:
            words, plain = self._questions[number].split(), self._plain[number].split()
            start = _place(plain, run)
            written[" ".join(words[start : start + size])] += 1
            ends += start > 0 and start + size == len(plain)
        return Words(text=written.most_common(1)[0][0], at_end=2 * ends > len(holding), held=held)


def with_words(prompt: Sequence[Message], text: str, *, at_end: bool) -> list[Message]:
    """A prompt with words before the text of its last turn, or after it."""
    *before, last = prompt
    places = [k for k, part in enumerate(last["content"]) if part["type"] == "text"]
    content = list(last["content"])
    if places:
        k = places[-1 if at_end else 0]
        there = content[k]["text"]
        content[k] = {"type": "text", "text": f"{there} {text}" if at_end else f"{text} {there}"}
    else:
        content.append({"type": "text", "text": text})
    return [*before, {"role": last["role"], "content": content}]


def _place(words: Sequence[str], run: Sequence[str]) -> int:
    """Where a run first begins among some words, which hold it."""
    return next(k for k in range(len(words)) if list(words[k : k + len(run)]) == list(run))


def _without(words: list[str], run: list[str]) -> list[str]:
    """Some words without the first occurrence of a run."""
    start = _place(words, run)
    return words[:start] + words[start + len(run) :]
