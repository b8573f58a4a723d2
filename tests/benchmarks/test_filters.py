"""The filters on made evidence: what each finds, what it can't, and that nothing is removed where nothing stands out."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from sklearn.metrics import roc_auc_score

from benchmarks.filters import FILTERS, Evidence, allocation, head_votes, joined_votes
from stages.extract.table import AttentionTable
from stages.score.bye import RULES, bye, layer_profiles

ROWS, POISONED, LAYERS, HEADS, WIDTH = 400, 40, 4, 3, 16
TRUTH = np.arange(ROWS) < POISONED


def made(seed: int = 0, *, drop: float = 0.0, away: float = 0.0, pull: float = 0.0, rows: np.ndarray | None = None) -> Evidence:
    """Rows of one kind; the first POISONED of them differ.

    Args:
        seed: of the numbers.
        drop: entropy that they lack in layer 2, deviations.
        away: how far their hidden states lie from the others', deviations.
        pull: how far two heads' attention moves from the question to the picture, deviations.
        rows: the row of each example; one each by default.
    """
    rng = np.random.default_rng(seed)
    entropy = rng.normal(3.0, 0.1, (ROWS, LAYERS))
    entropy[TRUTH, 2] -= 0.1 * drop
    image = rng.normal(0.4, 0.02, (ROWS, LAYERS, HEADS))
    question = rng.normal(0.3, 0.02, (ROWS, LAYERS, HEADS))
    image[TRUTH, 1, :2] += 0.02 * pull
    question[TRUTH, 1, :2] -= 0.02 * pull
    hidden = rng.normal(size=(ROWS, WIDTH))
    hidden[TRUTH, 0] += away
    row = np.arange(ROWS) if rows is None else rows
    count = int(row.max()) + 1
    table = AttentionTable(
        row=row,
        turn=np.zeros(ROWS, np.int32),
        question=["q"] * ROWS,
        answer=["a"] * ROWS,
        image_tokens=np.full(ROWS, 64),
        entropy=entropy,
        head_entropy=np.repeat(entropy[:, :, None], HEADS, axis=2),
        image_share=image,
        ratio=np.log(image / question),
    )
    plain = {rule: bye(entropy, layer_profiles(entropy, rule, 2.0, seed), seed).suspicious for rule in RULES}
    verdicts = pa.table(
        {
            "row": np.arange(count),
            "verdict": ["quarantine" if k < 3 else "keep" for k in range(count)],
            "score": [5.0 if k < 5 else None if k == 5 else 0.0 for k in range(count)],
            "posterior": [0.9 if k < 3 else None if k == 5 else 0.0 for k in range(count)],
            "bye_quarantine": _by_row(plain["bsi"], row, count),
            "bye_code_quarantine": _by_row(plain["public-code"], row, count),
        }
    )
    asking = verdicts.set_column(1, "verdict", pa.array(["quarantine" if k < 5 else "keep" for k in range(count)]))
    return Evidence(
        rows=count,
        table=table,
        hidden=hidden.astype(np.float32),
        verdicts=verdicts,
        verdict="inconclusive",
        asking=(asking, "poisoned"),
        threshold=2.0,
        seed=seed,
    )


def _by_row(examples: np.ndarray, row: np.ndarray, count: int) -> list[bool]:
    return [bool(examples[row == k].any()) for k in range(count)]


@pytest.mark.parametrize("name", FILTERS)
def test_the_form_of_what_a_filter_says(name: str) -> None:
    found, again = (FILTERS[name](made(drop=8.0, away=8.0, pull=8.0)) for _ in range(2))
    assert found.removed.shape == (ROWS,)
    assert found.removed.dtype == bool
    assert found.removed.tolist() == again.removed.tolist()
    assert found.score is not None
    assert found.score.shape == (ROWS,)
    assert np.isfinite(found.score).all()


@pytest.mark.parametrize(
    ("name", "planted"),
    [
        ("bye, paper's rule", {"drop": 8.0}),
        ("bye, public code's rule", {"drop": 8.0}),
        ("k-means on entropy", {"drop": 8.0}),
        ("fixed threshold on entropy", {"drop": 8.0}),
        ("activation clustering", {"away": 12.0}),
        ("tcap", {"pull": 8.0}),
    ],
)
def test_planted_rows_are_found(name: str, planted: dict[str, Any]) -> None:
    found = FILTERS[name](made(**planted))
    assert (found.removed == TRUTH).mean() > 0.98
    assert found.removed[TRUTH].mean() > 0.95
    assert found.score is not None
    assert roc_auc_score(TRUTH, found.score) > 0.99


@pytest.mark.parametrize(
    "name", ["bye, paper's rule", "bye, public code's rule", "activation clustering", "tcap", "fixed threshold on entropy"]
)
def test_where_nothing_stands_out(name: str) -> None:
    removed = [FILTERS[name](made(seed)).removed.mean() for seed in range(3)]
    assert max(removed) == pytest.approx(0, abs=0.05 if "threshold" in name else 0)


def test_spectral_signatures_remove_outliers_and_a_set_share() -> None:
    found = FILTERS["spectral signatures"](made(away=10.0))
    assert found.removed.sum() == 60  # 1.5 x 10% of 400
    assert found.removed[TRUTH].all()
    assert FILTERS["spectral signatures"](made()).removed.sum() == 60
    assert found.score is not None
    assert roc_auc_score(TRUTH, found.score) > 0.99


def test_random_rows_are_a_share_and_the_seed_counts() -> None:
    first, other = (FILTERS["random, 20%"](made(seed)).removed for seed in (0, 1))
    assert first.sum() == other.sum() == 80
    assert first.tolist() != other.tolist()


def test_a_trigger_that_raises_entropy() -> None:
    """BYE and its ablations remove the others, as published."""
    evidence = made(drop=-8.0)
    for name in ("bye, paper's rule", "k-means on entropy"):
        assert (FILTERS[name](evidence).removed == ~TRUTH).mean() > 0.98


def test_the_lines_verdicts_are_taken_as_they_are() -> None:
    found = FILTERS["ours"](made())
    assert np.flatnonzero(found.removed).tolist() == [0, 1, 2]
    assert found.score is not None
    order = found.score
    assert order[:3].min() == order[:3].max() > order[3:5].max()  # a confirmed group, then a mere shift, then nothing
    assert order[3:5].min() > order[5:].max() == order[5]
    assert found.verdict == "inconclusive"
    asking = FILTERS["ours, asking removes"](made())
    assert (np.flatnonzero(asking.removed).tolist(), asking.verdict) == ([0, 1, 2, 3, 4], "poisoned")


def test_byes_columns_count_and_no_layer_gives_no_score() -> None:
    evidence = made()
    assert FILTERS["bye, paper's rule"](evidence).score is None
    rejected = evidence.verdicts.set_column(4, "bye_quarantine", pa.array([True, None] + [False] * (ROWS - 2)))
    assert FILTERS["bye, paper's rule"](dataclasses.replace(evidence, verdicts=rejected)).removed.sum() == 1


def test_rows_of_several_turns_and_rows_without_pictures() -> None:
    """Two examples a row; the last ten rows show no picture."""
    evidence = dataclasses.replace(made(drop=8.0, rows=np.arange(ROWS) // 2), rows=ROWS // 2 + 10)
    found = FILTERS["fixed threshold on entropy"](evidence)
    assert np.flatnonzero(found.removed).tolist() == list(range(POISONED // 2))
    assert found.score is not None
    assert (found.score[-10:] == found.score.min()).all()


def test_a_cluster_below_the_silhouette_stays() -> None:
    weak = made(away=2.0)
    assert not FILTERS["activation clustering"](weak).removed.any()


def test_equal_rows_are_no_error() -> None:
    evidence = made()
    table = dataclasses.replace(
        evidence.table, **{name: np.full_like(getattr(evidence.table, name), 0.25) for name in ("entropy", "image_share", "ratio")}
    )
    flat = dataclasses.replace(evidence, table=table, hidden=np.zeros_like(evidence.hidden))
    for name in set(FILTERS) - {"ours", "ours, asking removes", "random, 20%", "spectral signatures"}:
        assert not FILTERS[name](flat).removed.any(), name


def test_shares_of_attention() -> None:
    shares = allocation(made().table)
    assert shares.shape == (ROWS, LAYERS, HEADS, 3)
    assert shares.sum(-1) == pytest.approx(np.ones((ROWS, LAYERS, HEADS)))
    assert shares[..., 1].mean() == pytest.approx(0.4, abs=0.01)
    assert shares[..., 2].mean() == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize("pull", [8.0, -8.0])
def test_only_heads_that_separate_vote_and_the_smaller_part_is_suspicious(pull: float) -> None:
    votes = head_votes(allocation(made(pull=pull).table), 0)
    assert votes.shape == (ROWS, 2)
    assert (votes == TRUTH[:, None]).mean() > 0.98


def test_votes_of_good_heads_outweigh_others() -> None:
    rng = np.random.default_rng(0)
    good = np.stack([TRUTH ^ (rng.random(ROWS) < 0.05) for _ in range(5)], axis=1)
    blind = rng.random((ROWS, 6)) < 0.4
    odds = joined_votes(np.concatenate([good, blind], axis=1))
    assert ((odds > 0) == TRUTH).mean() > 0.99
    assert (np.concatenate([good, blind], axis=1).mean(axis=1)[TRUTH] > 0.5).mean() < 0.95  # plain majority misses some
