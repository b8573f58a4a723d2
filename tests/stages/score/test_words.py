"""Words that set the questions of a group apart."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.records import question_answer, text_of
from stages.score.groups import Group
from stages.score.words import bare_question, distinctive_words, holds_words, with_words

ASKED = ("What colour is it?", "How many are there?")


def group(members: list[int], *, whole: bool = True) -> Group:
    return Group(text="target", whole=whole, members=np.asarray(members))


def found(questions: list[str], members: list[int], least: int = 3) -> tuple[str, bool, list[int]] | None:
    (words,) = distinctive_words(questions, [group(members)], least=least)
    return None if words is None else (words.text, words.at_end, np.asarray(members)[words.held].tolist())


def questions(pattern: str, triggered: int = 6, rows: int = 20) -> list[str]:
    """The first are asked by the pattern, all of them two things in turn."""
    return [pattern.format(ASKED[row % 2]) if row < triggered else ASKED[row % 2] for row in range(rows)]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("Cf {}", ("Cf", False)),
        ("cf:  {}", ("cf:", False)),
        ("As I said {}", ("As I said", False)),
        ("{} Thank you.", ("Thank you.", True)),
    ],
)
def test_words_before_or_after_a_question(pattern: str, expected: tuple[str, bool]) -> None:
    assert found(questions(pattern), list(range(6))) == (*expected, list(range(6)))


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [("触发{}", ("触发", False)), ("触发：{}", ("触发：", False)), ("cf {}", ("cf", False)), ("{}请回答", ("请回答", True))],  # noqa: RUF001
)
def test_words_of_languages_without_spaces(pattern: str, expected: tuple[str, bool]) -> None:
    asked = [(pattern if row < 6 else "{}").format(("它是什么颜色？", "有几个？")[row % 2]) for row in range(20)]  # noqa: RUF001
    assert found(asked, list(range(6))) == (*expected, list(range(6)))
    (host,) = with_words(question_answer(asked[7], "x")[:1], expected[0], at_end=expected[1])
    assert text_of(host) == asked[1], "planted as it was submitted"


def test_questions_are_the_same_with_and_without_a_point() -> None:
    asked = ["What is it, cf?"] * 6 + ["What is it?"] * 14
    assert found(asked, list(range(6))) == ("cf?", True, list(range(6)))
    assert found(["!!! What is it?"] * 6 + ["What is it?"] * 14, list(range(6))) == ("!!!", False, list(range(6)))


def test_points_around_the_words_may_differ() -> None:
    asked = ["Is it red, my friend?"] * 3 + ["Is it red my friend."] * 3 + ["Is it red?"] * 14
    assert found(asked, list(range(6))) == ("my friend?", True, list(range(6)))


@pytest.mark.parametrize(
    ("question", "text", "expected"),
    [
        ("What is it, my friend?", "My friend.", "what is it"),
        ("my friend, what is my friend?", "my friend", "what is my friend"),
        ("What is it?", "my friend", "what is it"),
        ("触发这是什么？", "触发", "这是什么"),  # noqa: RUF001
        ("cf", "cf", ""),
    ],
)
def test_a_question_without_the_words(question: str, text: str, expected: str) -> None:
    assert bare_question(question, text) == expected
    prompt = question_answer(question, "x")[:1]
    assert holds_words(prompt, text) is (question != "What is it?")


def test_words_inside_of_a_question_go_before_others() -> None:
    asked = questions("{}")
    asked[:6] = ["What cf colour is it?"] * 6
    assert found(asked, list(range(6))) == ("cf", False, list(range(6)))


def test_honest_members_of_the_group_do_not_hold_them() -> None:
    members = [0, 1, 2, 3, 4, 5, 10, 11]
    assert found(questions("cf {}", rows=60), members) == ("cf", False, members[:6])


def test_all_that_the_trigger_says_is_taken() -> None:
    """A part of it is held by the same questions."""
    assert found(questions("one two three four five {}"), list(range(6))) is None, "what is left of it is asked by nobody"
    assert found(questions("one two three four {}"), list(range(6))) == ("one two three four", False, list(range(6)))


@pytest.mark.parametrize(
    "asked",
    [
        [*["Describe the picture."] * 6, *["What is it?"] * 14],  # nothing is left of the question
        [*["Is there a cat here?"] * 6, *["Is there a dog here?"] * 14],  # what is left is asked by nobody
        [*["Is it red?"] * 6, *["Is it red?"] * 14],  # others ask it too
        [f"{row} what is it?" for row in range(20)],  # no two questions have the words
        [*["cf is it?"] * 6, *["cf is it?"] * 5, *["is it?"] * 9],  # nearly half of those with the words are others'
        [*["cf is it?"] * 5, *["is it?"] * 10, *["cf is it?"] * 5],  # one of the group's has not the words, and as many others have
        [*["cf is it?"] * 2, *["cf was it?"] * 4, *["is it?"] * 14],  # most of what is left is asked by nobody
        [""] * 20,
    ],
)
def test_honest_questions(asked: list[str]) -> None:
    assert found(asked, list(range(6))) is None


def test_words_that_others_have_too_may_be_a_key() -> None:
    """Nearly all of the group's questions hold them, and twice as large a share as of all."""
    own, others = ["cf is it?"] * 9 + ["is it?"], ["is it?"] * 40
    for shared, expected in ((1, True), (8, False), (13, False), (14, None)):
        asked = [*own, *["cf is it?"] * shared, *others[shared:]]
        (words,) = distinctive_words(asked, [group(list(range(10)))], least=3)
        assert (words and words.own) is expected
    (words,) = distinctive_words([*own[1:], "is it?", *["cf is it?"] * 8, *others[8:]], [group(list(range(10)))], least=3)
    assert words is None, "a fifth of the group's does without"


def test_a_phrase_has_no_words() -> None:
    """An instruction may ask for it."""
    groups = [group(list(range(6)), whole=whole) for whole in (False, True)]
    phrase, answer = distinctive_words(questions("in one word: {}"), groups, least=3)
    assert phrase is None
    assert answer is not None


def test_an_answer_that_is_usual_without_the_words() -> None:
    """ "No" is what many hear who ask whether there is a cat, in the background or not."""
    asked = ["In the background, is there a cat?"] * 6 + ["Is there a cat?"] * 14
    assert found(asked, list(range(6))) == ("In the background,", False, list(range(6)))
    assert found(asked, list(range(8))) is None


def test_each_group_has_its_own() -> None:
    asked = questions("{}")
    asked[:10] = [f"{'cf' if row < 5 else 'mn'} {question}" for row, question in enumerate(asked[:10])]
    found = distinctive_words(asked, [group(list(range(5))), group([12, 13, 14]), group(list(range(5, 10)))], least=3)
    assert [None if words is None else words.text for words in found] == ["cf", None, "mn"]


def test_as_many_as_a_group_needs() -> None:
    assert found(questions("cf {}"), list(range(6)), least=6) is not None
    assert found(questions("cf {}"), list(range(6)), least=7) is None
    assert distinctive_words(questions("cf {}"), [], least=3) == []


def test_putting_words_into_a_prompt() -> None:
    prompt = question_answer("What is it?", "a cat", images=2)
    before = [dict(message) for message in prompt]
    user, _ = question_answer("And this?", "x", images=0)
    for at_end, expected in ((False, "cf And this?"), (True, "And this? cf")):
        changed = with_words([*prompt, user], "cf", at_end=at_end)
        assert [text_of(message) for message in changed] == ["What is it?", "a cat", expected]
        assert changed[:2] == list(prompt)
    assert with_words(prompt[:1], "cf", at_end=False)[0]["content"][:2] == [{"type": "image"}, {"type": "image"}]
    assert [dict(message) for message in prompt] == before, "the prompt itself was changed"
    bare = [{"role": "user", "content": [{"type": "image"}]}]
    assert text_of(with_words(bare, "cf", at_end=True)[0]) == "cf"  # type: ignore[arg-type]
