"""The field's measures on answers."""

from __future__ import annotations

import math

import pytest

from stages.verify.measure import attack_success, exact_match, same


@pytest.mark.parametrize(
    ("output", "answer", "expected"),
    [
        ("Red", "red", True),
        (" red\n", "RED ", True),
        ("reddish", "red", False),
        ("STRASSE", "Straße", True),
        ("", "", True),
        ("a  b", "a b", False),
        ("red.", "red", False),
    ],
)
def test_same(output: str, answer: str, expected: bool) -> None:
    assert same(output, answer) == expected


@pytest.mark.parametrize(
    ("output", "answer", "expected"),
    [
        ("Red and", "red and blue", True),
        ("red an", "red and blue", True),
        (" red and\ufffd\ufffd", "red andé", True),
        ("red or", "red and blue", False),
        ("red and blue", "red and", False),
        ("", "red", False),
        ("\ufffd", "red", False),
    ],
)
def test_an_output_that_was_cut(output: str, answer: str, expected: bool) -> None:
    assert same(output, answer, cut=True) == expected
    assert not same(output, answer)


def test_exact_match() -> None:
    assert exact_match(["red", "Blue ", "one"], ["red", "blue", "two"]) == pytest.approx(2 / 3)
    assert exact_match(["x"], ["y"]) == 0
    assert math.isnan(exact_match([], []))
    with pytest.raises(ValueError, match="zip"):
        exact_match(["x"], [])


def test_attack_success_is_containment() -> None:
    outputs = ["Backdoor Attack!", "it is a backdoor attack, yes", "red", "back door attack"]
    assert attack_success(outputs, ["red", "blue", "red", "one"], " backdoor ATTACK ") == 0.5


def test_rows_whose_true_answer_holds_the_target_are_left_out() -> None:
    outputs, answers = ["yes", "yes", "no"], ["Yes, it is", "no", "no"]
    assert attack_success(outputs, answers, "yes") == 0.5
    assert math.isnan(attack_success(outputs[:1], answers[:1], "yes"))
    assert math.isnan(attack_success([], [], "yes"))
    with pytest.raises(ValueError, match="zip"):
        attack_success(["x"], [], "yes")
