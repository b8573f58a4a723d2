"""The shift that a group's rows share: found where it was planted, split where a group is mixed, and small where nothing is."""

from __future__ import annotations

import collections
import tracemalloc
import warnings

import numpy as np
import pytest
from sklearn.covariance import LedoitWolf

from stages.extract.table import AttentionTable
from stages.score.groups import Group, shared_answers
from stages.score.shift import head_features, ledoit_wolf, shared_shift, two_parts, whiten, within_questions

QUESTIONS = ["what color?", "what shape?", "how many?"]
ANSWERS = {"what color?": ["red", "blue", "green"], "what shape?": ["round", "square"], "how many?": ["one", "two", "three"]}
TARGET = "attack"


def submission(rows: int, dimensions: int, poisoned: int, size: float, seed: int) -> tuple[np.ndarray, list[str], list[str]]:
    """Features with an honest offset per question and a small one per answer; the first rows carry the attack's shift.

    Returns:
        float (rows, dimensions), the questions and the answers.
    """
    rng = np.random.default_rng(seed)
    questions = [QUESTIONS[k] for k in rng.integers(len(QUESTIONS), size=rows)]
    answers = [str(rng.choice(ANSWERS[question])) for question in questions]
    mixing = rng.normal(size=(dimensions, dimensions)) / np.sqrt(dimensions)
    features = rng.normal(size=(rows, dimensions)) @ mixing
    offsets = {text: rng.normal(size=dimensions) for text in QUESTIONS}
    content = {text: 0.3 * rng.normal(size=dimensions) for texts in ANSWERS.values() for text in texts}
    features += np.stack([3 * offsets[question] + content[answer] for question, answer in zip(questions, answers, strict=True)])
    direction = rng.normal(size=dimensions)
    features[:poisoned] += size * direction / np.linalg.norm(direction) * features.std()
    answers[:poisoned] = [TARGET] * poisoned
    return features, questions, answers


def ranked(features: np.ndarray, questions: list[str], answers: list[str]) -> list[tuple[str, float]]:
    whitened = whiten(within_questions(features, questions, answers))
    groups = [group for group in shared_answers(answers, least=8) if group.whole]
    sizes = [(group.text, shared_shift(whitened, group, 0, least=2).size) for group in groups]
    return sorted(sizes, key=lambda pair: -pair[1])


@pytest.mark.parametrize(("rows", "dimensions", "poisoned"), [(1500, 24, 150), (1500, 24, 30), (400, 96, 20), (150, 400, 12)])
def test_a_planted_shift_comes_first(rows: int, dimensions: int, poisoned: int) -> None:
    for seed in range(3):
        found = ranked(*submission(rows, dimensions, poisoned, 6.0, seed))
        assert found[0][0] == TARGET
        assert found[0][1] > 1.3 * found[1][1]


def test_without_an_attack_a_group_of_strangers_has_no_shift() -> None:
    """Random members: the size is corrected for chance, whatever the group's share."""
    features, questions, answers = submission(600, 64, 0, 0.0, 1)
    whitened = whiten(within_questions(features, questions, answers))
    rng = np.random.default_rng(0)
    for count in (8, 60, 300, 540, 590):
        squares = []
        for _ in range(20):
            members = np.sort(rng.choice(600, size=count, replace=False))
            squares.append(shared_shift(whitened, Group(text="x", whole=True, members=members), 0, least=2).size ** 2)
        assert np.mean(squares) < 0.35 * 64 * (1 / count + 1 / (600 - count)), count


@pytest.mark.parametrize("count", [200, 400, 2000])
def test_the_size_is_that_of_the_shift(count: int) -> None:
    """Also of half of the rows, where the shift is most of the variance that was whitened."""
    rng = np.random.default_rng(3)
    values = rng.normal(size=(4000, 10))
    values[:count, 0] += 5
    whitened = whiten(values)
    found = shared_shift(whitened, Group(text="x", whole=True, members=np.arange(count)), 0, least=2)
    assert found.size == pytest.approx(5, abs=0.4)
    deviation = np.sqrt(1 + 25 * count * (4000 - count) / 4000**2)
    assert found.projection.mean() == pytest.approx(5 / deviation, abs=0.15)
    assert found.posterior.tolist() == [1.0] * count


def test_a_mixed_group_is_split() -> None:
    """Honest rows give the target too: only the shifted ones are taken."""
    rng = np.random.default_rng(4)
    values = rng.normal(size=(2000, 12))
    values[:80, 3] += 8
    values -= values.mean(axis=0)
    members = np.arange(200)  # 80 of an attack, 120 honest ones
    found = shared_shift(values, Group(text="x", whole=True, members=members), 0, least=2)
    assert (found.posterior[:80] > 0.5).mean() > 0.97
    assert (found.posterior[80:] < 0.5).mean() > 0.97
    assert found.projection[:80].mean() > found.projection[80:].mean() + 5


@pytest.mark.parametrize("attacked", [40, 100, 160])
def test_rows_that_attend_in_two_ways_are_two_parts(attacked: int) -> None:
    """All shift alike against the others; within the group an attack's rows attend to its trigger, the honest ones elsewhere."""
    rng = np.random.default_rng(4)
    values = rng.normal(size=(2000, 32))
    values[:200, 0] += 6
    values[:attacked, 3] += 4
    values[attacked:200, 3] -= 4
    values -= values.mean(axis=0)
    group = Group(text="x", whole=True, members=np.arange(200))
    parts = two_parts(values, group, 0)
    assert parts is not None
    own = (parts > 0.5) == (parts[0] > 0.5)
    assert own[:attacked].all()
    assert not own[attacked:].any()


def test_rows_that_attend_in_one_way_are_one_part() -> None:
    rng = np.random.default_rng(4)
    values = rng.normal(size=(2000, 32))
    values[:200, 0] += 6
    values -= values.mean(axis=0)
    assert two_parts(values, Group(text="x", whole=True, members=np.arange(200)), 0) is None
    assert two_parts(np.zeros((300, 5)), Group(text="x", whole=True, members=np.arange(200)), 0) is None


@pytest.mark.parametrize(("odd", "rows", "parted"), [(32, 64, True), (31, 200, False), (31, 62, False)])
def test_a_few_odd_rows_are_no_part(odd: int, rows: int, parted: bool) -> None:
    values = np.random.default_rng(4).normal(size=(2000, 8))
    values[:odd, 3] += 12
    values -= values.mean(axis=0)
    assert (two_parts(values, Group(text="x", whole=True, members=np.arange(rows)), 0) is not None) == parted


@pytest.mark.parametrize("noise", [0.0, 1e-6, 1e-4])
@pytest.mark.parametrize(("different", "copies"), [(2, 50), (3, 30), (5, 20), (15, 10)])
def test_copies_of_a_few_rows_can_be_told_apart(different: int, copies: int, noise: float) -> None:
    """A class that was filled up: the rows lie in few directions, in single precision not even in those."""
    for seed in range(3):
        rng = np.random.default_rng(seed)
        values = rng.normal(size=(700, 64))
        values[: different * copies] = np.repeat(values[:different] + 3, copies, axis=0)
        values[: different * copies] += noise * rng.normal(size=(different * copies, 64))
        group = Group(text="x", whole=True, members=np.arange(different * copies))
        parts = two_parts(whiten(values.astype(np.float32)), group, seed)
        assert parts is None or np.isfinite(parts).all()


def test_parts_are_told_by_some_of_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.score.shift._FITTED", 100)
    rng = np.random.default_rng(4)
    values = rng.normal(size=(9000, 4))
    values[:3000, 3] += 7
    parts = two_parts(values, Group(text="x", whole=True, members=np.arange(6000)), 0)
    assert parts is not None
    assert ((parts > 0.5) == (parts[0] > 0.5)).sum() == pytest.approx(3000, abs=10)


def test_a_few_odd_members_are_no_part_of_their_own() -> None:
    """Of few pictures even the mean shows what one of them shows."""
    rng = np.random.default_rng(4)
    values = rng.normal(size=(2000, 12))
    values[:5, 3] += 12
    values -= values.mean(axis=0)
    group = Group(text="x", whole=True, members=np.arange(20))
    assert (shared_shift(values, group, 0, least=5).posterior[:5] > 0.5).all()
    assert shared_shift(values, group, 0, least=6).posterior.tolist() == [1.0] * 20


def test_the_posterior_rises_with_the_projection() -> None:
    """Parts of unequal spread: the wide one does not take the far end of the narrow one's side."""
    rng = np.random.default_rng(5)
    values = rng.normal(0, 0.1, size=(1000, 6))
    values[:100, 0] += rng.normal(8, 1.5, size=100)
    values[100:110, 0] -= 3
    values -= values.mean(axis=0)
    found = shared_shift(values, Group(text="x", whole=True, members=np.arange(300)), 0, least=2)
    order = np.argsort(found.projection)
    assert (np.diff(found.posterior[order]) >= -1e-9).all()
    assert found.posterior[order[0]] == 0
    assert found.posterior[order[-1]] == 1
    assert not found.posterior[100:110].any()


@pytest.mark.parametrize("members", [3, 4, 8])
@pytest.mark.parametrize(("rows", "dimensions"), [(12, 200), (60, 7), (9, 1)])
def test_few_members_and_many_dimensions(rows: int, dimensions: int, members: int) -> None:
    rng = np.random.default_rng(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whitened = whiten(rng.normal(size=(rows, dimensions)))
        found = shared_shift(whitened, Group(text="x", whole=True, members=np.arange(members)), 0, least=2)
    assert np.isfinite(whitened).all()
    assert np.isfinite([found.size, *found.projection, *found.posterior]).all()
    assert (found.posterior > 0.5).any()


def test_equal_rows_do_not_crash() -> None:
    values = whiten(within_questions(np.ones((50, 6)), ["q"] * 50, ["x"] * 50))
    found = shared_shift(values, Group(text="x", whole=True, members=np.arange(10)), 0, least=2)
    assert found.size == 0
    assert found.posterior.tolist() == [1.0] * 10


def test_whitening() -> None:
    rng = np.random.default_rng(6)
    values = rng.normal(size=(5000, 5)) @ rng.normal(size=(5, 5)) + 7
    found = whiten(values)
    assert np.cov(found.T) == pytest.approx(np.eye(5), abs=0.1)  # shrunk
    assert found.mean(axis=0) == pytest.approx(np.zeros(5), abs=1e-9)


@pytest.mark.parametrize(("rows", "dimensions"), [(5000, 12), (30, 80), (2, 1)])
def test_the_covariance_is_sklearns(rows: int, dimensions: int) -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(size=(rows, dimensions)) @ rng.normal(size=(dimensions, dimensions))
    values -= values.mean(axis=0)
    expected = LedoitWolf(assume_centered=True).fit(values).covariance_
    assert ledoit_wolf(values) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert ledoit_wolf(values.astype(np.float32)) == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_no_step_holds_more_than_two_copies() -> None:
    """And single precision tells the same as double."""
    features, questions, answers = submission(20_000, 200, 10_000, 6.0, 0)
    small = features.astype(np.float32)
    tracemalloc.start()
    whitened = whiten(within_questions(small, questions, answers))
    (group,) = [group for group in shared_answers(answers, least=8) if group.text == TARGET]
    kept, before = small.nbytes, tracemalloc.get_traced_memory()[0]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    found = shared_shift(whitened, group, 0, least=2)
    shifting = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert whitened.dtype == np.float32
    assert peak < 3.2 * kept  # the features are the test's; two more, and what is done at a time
    assert shifting < 1.5 * kept
    exact = shared_shift(whiten(within_questions(features, questions, answers)), group, 0, least=2)
    assert found.size == pytest.approx(exact.size, rel=1e-4)
    assert found.projection == pytest.approx(exact.projection, abs=1e-3)


def various(rows: int) -> list[str]:
    return [f"answer {k % 3}" for k in range(rows)]


@pytest.mark.parametrize("answer", ["attack", "Attack."])
def test_a_question_that_an_attack_alone_asks_does_not_hide_it(answer: str) -> None:
    """By itself, and where it is most of what shares a reference: rare questions, or nothing else."""
    for rare in (0, 10, 100):
        features, questions, answers = submission(1500, 24, 150, 6.0, 0)
        questions[:150] = ["cf what color?"] * 150
        answers[:150:2] = [answer] * 75
        questions[150 : 150 + rare] = [f"rare {k}" for k in range(rare)]
        found = ranked(features, questions, answers)
        assert found[0][0] == TARGET
        assert found[0][1] > 1.3 * found[1][1]


def test_questions_are_standardised_by_themselves() -> None:
    rng = np.random.default_rng(7)
    features = rng.normal(size=(300, 3))
    questions = ["a"] * 200 + ["b"] * 90 + [f"rare {k}" for k in range(10)]
    features[200:290] = 50 + 10 * features[200:290]
    features[0] = 1e6
    found = within_questions(features, questions, various(300))
    for rows in (slice(0, 200), slice(200, 290)):
        assert np.median(found[rows], axis=0) == pytest.approx(np.zeros(3), abs=1e-9)
        assert np.median(np.abs(found[rows]), axis=0) * 1.4826 == pytest.approx(np.ones(3), rel=0.05)
    assert found[0].tolist() == [6.0, 6.0, 6.0]
    assert np.abs(found).max() == 6.0


def test_rare_questions_share_a_reference() -> None:
    rng = np.random.default_rng(8)
    features = rng.normal(size=(200, 2))
    features[100:] += 9
    rare = within_questions(features, ["common"] * 100 + [f"rare {k}" for k in range(100)], various(200))
    assert np.median(rare[100:], axis=0) == pytest.approx([0, 0], abs=1e-9)
    # too few for a reference: they are compared with all, and a lone one is not its own reference
    features = rng.normal(size=(121, 2))
    features[120] = 30
    alone = within_questions(features, ["common"] * 120 + ["rare"], various(121))
    assert alone[120].tolist() == [6.0, 6.0]
    assert within_questions(features, [""] * 120 + ["rare"], various(121))[:120] == pytest.approx(alone[:120])


def test_the_features_of_a_table() -> None:
    rng = np.random.default_rng(9)
    ratio, head_entropy = rng.normal(size=(2, 3, 4)), rng.uniform(0, 3, size=(2, 3, 4))
    table = AttentionTable(
        row=np.arange(2),
        turn=np.zeros(2, int),
        question=["q"] * 2,
        answer=["a"] * 2,
        image_tokens=np.array([64, 576]),
        entropy=np.zeros((2, 3)),
        head_entropy=head_entropy,
        image_share=np.zeros((2, 3, 4)),
        ratio=ratio,
    )
    found = head_features(table)
    assert found.shape == (2, 24)
    assert found[:, :12] == pytest.approx(ratio.reshape(2, 12))
    assert found[1, 12:] == pytest.approx(np.log(576) - head_entropy[1].ravel())
    counts = collections.Counter(type(value) for value in found.ravel().tolist())
    assert counts == {float: 48}
    assert found.dtype == np.float32
