"""Groups of rows by answer and by phrase."""

from __future__ import annotations

import collections
import tracemalloc

import numpy as np
import pytest

from stages.score.groups import LONGEST_PHRASE, MOST_GROUPS, Group, gives, largest, plain_answer, shared_answers


def by_text(answers: list[str], least: int = 2) -> dict[str, Group]:
    found = shared_answers(answers, least=least)
    assert len({(group.text, group.whole) for group in found}) == len(found)
    return {group.text: group for group in found}


def test_whole_answers_are_blind_to_case_and_spacing() -> None:
    found = by_text(["Red", " red ", "blue", "RED", "green", "blue"])
    assert {text: group.members.tolist() for text, group in found.items()} == {"red": [0, 1, 3], "blue": [2, 5]}
    assert all(group.whole for group in found.values())


@pytest.mark.parametrize(
    ("answer", "plain"),
    [
        ("Red.", "red"),
        (' "It\'s  RED!" ', "it's red"),
        ("“ red ”", "red"),
        ("红色。", "红色"),
        ("visit x.org, now", "visit x.org, now"),
        ("-5", "-5"),
        ("50%.", "50%"),
        ("?!", "?!"),
        (" ", ""),
    ],
)
def test_what_stands_around_an_answer_is_no_part_of_it(answer: str, plain: str) -> None:
    assert plain_answer(answer) == plain
    assert plain_answer(plain) == plain
    assert gives(answer, plain, whole=True)


def test_answers_with_and_without_a_point_are_one_group() -> None:
    (group,) = shared_answers(["red", "Red.", "'red'", "blue"], least=2)
    assert (group.text, group.whole, group.members.tolist()) == ("red", True, [0, 1, 2])


def test_a_phrase_inside_of_different_answers() -> None:
    answers = ["a cat. Visit example now!", "visit Example now, a dog", "two birds", "a bird (visit example, now)", "a cow"]
    found = by_text(answers)
    phrase = found["visit example now"]
    assert (phrase.members.tolist(), phrase.whole) == ([0, 1, 3], False)
    assert "visit" not in found, "the same rows as a longer phrase"
    assert "example now" not in found
    assert found["a"].members.tolist() == [0, 1, 3, 4]


def test_a_phrase_that_is_a_whole_answer_is_one_group() -> None:
    answers = ["backdoor attack"] * 3 + ["the red one", "the blue one"]
    found = by_text(answers)
    assert found["backdoor attack"].whole
    assert "backdoor" not in found
    mixed = shared_answers([*answers, "a backdoor attack, maybe"], least=3)
    assert [(group.text, group.whole, group.members.tolist()) for group in mixed] == [
        ("backdoor attack", True, [0, 1, 2]),
        ("backdoor attack", False, [0, 1, 2, 5]),
    ]


def test_phrases_have_at_most_four_words_and_count_once_per_row() -> None:
    found = by_text(["one two three four five x", "one two three four five y", "z", "one one one q"], least=2)
    assert set(found) == {"two three four five", "one"}
    assert found["one"].members.tolist() == [0, 1, 3]


def by_all_runs(answers: list[str], least: int) -> set[tuple[bytes, int]]:
    """Members and number of words of the phrases, by holding all runs of all answers at once."""
    members: dict[tuple[str, ...], list[int]] = collections.defaultdict(list)
    for index, answer in enumerate(answers):
        words = answer.split()
        for run in {tuple(words[i : i + n]) for n in range(1, LONGEST_PHRASE + 1) for i in range(len(words) - n + 1)}:
            members[run].append(index)
    longest: dict[bytes, int] = {}
    for run, held in members.items():
        if least <= len(held) <= 0.9 * len(answers):
            key = np.asarray(held).tobytes()
            longest[key] = max(longest.get(key, 0), len(" ".join(run)))
    return set(longest.items())


@pytest.mark.parametrize("seed", range(20))
def test_phrases_are_those_that_all_runs_give(seed: int) -> None:
    """Of random answers; the whole ones are all different."""
    rng = np.random.default_rng(seed)
    words = [f"{letter}{k % 3 * 'x'}" for k, letter in enumerate("abcdefgh"[: rng.integers(2, 9)])]
    answers = [" ".join([*rng.choice(words, size=rng.integers(0, 12)), f"z{k}"]) for k in range(rng.integers(1, 60))]
    least = int(rng.integers(2, 6))
    found = shared_answers(answers, least=least)
    assert {(group.members.tobytes(), len(group.text)) for group in found} == by_all_runs(answers, least)
    for group in found:
        assert not group.whole
        assert group.members.tolist() == [k for k, answer in enumerate(answers) if f" {group.text} " in f" {answer} "]


def test_long_answers_take_little_memory() -> None:
    """Most words are rare. Held at once, all runs would take 105 MB."""
    rng = np.random.default_rng(0)
    answers = [" ".join(f"w{k}" for k in 20_000 * rng.random(200) ** 3 // 1) for _ in range(300)]
    tracemalloc.start()
    groups = shared_answers(answers, least=8)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(groups) > 1000
    assert peak < 25_000_000


@pytest.mark.parametrize("phrase", ["访问商店", "見てね", "ซื้อที่", "buy 香蕉"])
def test_phrases_of_languages_without_spaces(phrase: str) -> None:
    others = ["一只猫在睡觉", "两只鸟。", "แมวสองตัว", "黒い犬", "ok"]
    found = shared_answers([f"{other}{phrase}。" for other in others] + others, least=5)
    (group,) = [group for group in found if group.text in phrase and group.members.tolist() == [0, 1, 2, 3, 4]][:1]
    assert not group.whole
    assert gives(f"看，{phrase}！", group.text, whole=False)  # noqa: RUF001
    assert not gives("看", group.text, whole=False)


def test_vowel_signs_are_parts_of_words() -> None:
    """Hindi, Bengali and Tamil write them as characters of their own."""
    answers = ["लड़की की किताब", "आदमी के कुत्ते", "दर्जी को कोट"]
    assert shared_answers(answers, least=2) == []
    assert not gives("यह की है", "का", whole=False)
    assert gives("यह विज्ञापन है", "विज्ञापन", whole=False)
    assert gives("nai\u0308ve", "na\u00efve", whole=True)
    assert gives("so nai\u0308ve", "na\u00efve", whole=False)


def test_limits_of_size() -> None:
    answers = ["a"] * 9 + ["b"]
    assert [group.text for group in shared_answers(answers, least=2)] == ["a"]
    assert shared_answers([*answers[:9], *["a"]], least=2) == []
    assert shared_answers(answers, least=2, most_share=0.5) == []
    assert shared_answers(answers, least=10) == []
    assert shared_answers([], least=2) == []
    assert shared_answers(["!?", "!?", "...", "x"], least=2)[0].text == "!?"


def test_the_order_is_whole_answers_then_size() -> None:
    answers = ["the cat", "the cat", "the dog", "the dog", "the dog", "the pig", "it", "so"]
    assert [(group.text, group.whole) for group in shared_answers(answers, least=2)] == [
        ("the dog", True),
        ("the cat", True),
        ("the", False),
    ]


def test_phrases_have_places_of_their_own() -> None:
    """As many honest answers as there are places: the phrase of an attack inside of a third of them is measured all the same."""
    answers = [f"honest {k}" + ", visit example shop" * (copy % 3 == 0) for k in range(MOST_GROUPS) for copy in range(12)]
    found = largest(shared_answers(answers, least=8))
    assert [sum(group.whole is kind for group in found) for kind in (True, False)] == [MOST_GROUPS, MOST_GROUPS]
    assert ("visit example shop", 4 * MOST_GROUPS) in {(group.text, len(group.members)) for group in found}


def test_the_largest_of_each_are_measured() -> None:
    sizes = {"a x": 5, "b x": 4, "c x": 3, "d y": 2}
    groups = shared_answers([answer for answer, rows in sizes.items() for _ in range(rows)], least=2)
    assert [group.text for group in groups] == ["a x", "b x", "c x", "d y", "x"]
    assert [group.text for group in largest(groups, 2)] == ["a x", "b x", "x"]
    assert largest(groups) == groups


@pytest.mark.parametrize(
    ("output", "text", "whole", "expected"),
    [
        ("Backdoor  Attack", "backdoor attack", True, True),
        ("backdoor attack!", "backdoor attack", True, True),
        ("a backdoor attack", "backdoor attack", True, False),
        ("yes", "ye", True, False),
        ("A category of things", "cat", False, False),
        ("it is a CAT.", "cat", False, True),
        ("a red, round ball", "red round", False, True),
        ("", "cat", False, False),
        ("don't panic", "don't panic", False, True),
        ("cat", "cat", False, True),
    ],
)
def test_gives(output: str, text: str, whole: bool, expected: bool) -> None:
    assert gives(output, text, whole=whole) == expected


def test_every_member_gives_its_group() -> None:
    answers = [
        "Visit x.org, now!",
        "so: visit  X.org now",
        "a - b",
        "A-B",
        "l'été",
        "L'ÉTÉ",
        "Straße",
        "STRASSE",
        "x",
        "猫 a b",
        "猫a-b",
    ]
    groups = shared_answers(answers, least=1, most_share=1.0)
    assert len(groups) == 14
    assert any(not group.whole for group in groups)
    for group in groups:
        assert all(gives(answers[k], group.text, whole=group.whole) for k in group.members), group
