"""Which tokens are closed and from where, on attention made by hand."""

from __future__ import annotations

import torch

from stages.guard.purify import LEAST_DEVIATION, published_tokens, rewind_layers, stealing_heads, stealing_tokens
from tests.stages.guard.detectors import plain_detector

IMAGE = torch.tensor([[False, True, True, True, True, False], [False, False, True, False, True, False]])


def test_the_published_rule_is_a_union_over_heads() -> None:
    weights = torch.zeros(2, 2, 6)
    weights[0, 0] = torch.tensor([0.5, 0.0, 0.3, 0.01, 0.0, 0.19])
    weights[0, 1] = torch.tensor([0.5, 0.2, 0.0, 0.01, 0.0, 0.29])
    weights[1, 0] = torch.tensor([0.4, 0.4, 0.1, 0.0, 2e-4, 0.0])
    assert published_tokens(weights, IMAGE, 0.02).int().tolist() == [[0, 1, 1, 0, 0, 0], [0, 0, 1, 0, 0, 0]]
    assert published_tokens(weights, IMAGE).int().tolist() == [[0, 1, 1, 1, 0, 0], [0, 0, 1, 0, 1, 0]]


def test_rewind_to_the_first_layer_that_deviates() -> None:
    detector = plain_detector(layers=(2, 5, 7), heads=2, features=("ratio", "deficit"))
    deviations = torch.zeros(4, 3, 2, 2)
    deviations[0, 1, 0, 1] = -1.5  # both signs and both features count
    deviations[0, 2, 1, 0] = 9
    deviations[1, 0, 1, 0] = 1.01
    deviations[2, 2, 0, 0] = 0.9  # none above its threshold: the largest for its layer
    deviations[2, 0, 0, 0] = 0.5
    assert rewind_layers(detector, deviations).tolist() == [5, 2, 7, 2]
    object.__setattr__(detector, "layer_thresholds", torch.tensor([2.0, 1.0, 100.0]))
    assert rewind_layers(detector, deviations).tolist() == [5, 2, 2, 2]


def test_stealing_heads_concentrate_beyond_the_reference() -> None:
    detector = plain_detector(layers=(1, 4), heads=3, features=("ratio", "deficit"))
    deviations = torch.zeros(3, 2, 2, 3)
    deviations[0, 0, 1] = torch.tensor([LEAST_DEVIATION, LEAST_DEVIATION - 0.1, -9.0])
    deviations[0, 1, 1] = torch.tensor([0.0, 5.0, 1.0])
    deviations[0, 1, 0] = 50  # the ratio does not choose where there is an entropy
    deviations[1, 0, 1] = torch.tensor([1.0, -2.0, 0.5])
    deviations[2, :, 1] = -4
    found = stealing_heads(detector, deviations)
    assert sorted(found) == [1, 4]
    assert found[1].tolist() == [[3.0, 0.0, 0.0], [1.0, 0.0, 0.5], [0.0, 0.0, 0.0]]
    assert found[4].tolist() == [[0.0, 5.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]


def test_without_entropy_the_ratio_chooses() -> None:
    detector = plain_detector(layers=(0,), heads=2, features=("ratio",))
    assert stealing_heads(detector, torch.tensor([[[[4.0, 1.0]]]]))[0].tolist() == [[4.0, 0.0]]


def test_the_fewest_tokens_that_hold_the_share() -> None:
    weights = {0: torch.zeros(2, 2, 6), 3: torch.zeros(2, 2, 6)}
    weights[0][0, 0] = torch.tensor([0.5, 0.02, 0.30, 0.06, 0.02, 0.1])
    weights[0][0, 1] = torch.tensor([0.0, 0.9, 0.0, 0.0, 0.0, 0.1])  # does not steal
    weights[3][1, 1] = torch.tensor([0.2, 0.2, 0.1, 0.2, 0.1, 0.2])
    heads = {0: torch.tensor([[5.0, 0.0], [0.0, 0.0]]), 3: torch.tensor([[0.0, 0.0], [0.0, 1.0]])}
    assert stealing_tokens(weights, IMAGE, heads, 0.7).int().tolist() == [[0, 0, 1, 0, 0, 0], [0, 0, 1, 0, 1, 0]]
    assert stealing_tokens(weights, IMAGE, heads, 0.8)[0].int().tolist() == [0, 0, 1, 1, 0, 0]
    assert stealing_tokens(weights, IMAGE, heads, 0.95)[0].int().sum() == 3
    assert stealing_tokens(weights, IMAGE, heads, 1.0)[0].int().tolist() == [0, 1, 1, 1, 1, 0]


def test_heads_count_by_how_much_they_steal() -> None:
    """Each head's attention is taken as a share of the picture's: what it gives to the text does not matter."""
    weights = {0: torch.zeros(1, 2, 6)}
    weights[0][0, 0, 1], weights[0][0, 1, 2] = 1e-3, 0.9
    strong = {0: torch.tensor([[9.0, 1.0]])}
    assert stealing_tokens(weights, IMAGE[:1], strong, 0.8).int().tolist() == [[0, 1, 0, 0, 0, 0]]
    assert stealing_tokens(weights, IMAGE[:1], {0: torch.tensor([[1.0, 9.0]])}, 0.8).int().tolist() == [[0, 0, 1, 0, 0, 0]]


def test_nothing_is_closed_where_no_head_steals_or_no_picture_is() -> None:
    torch.manual_seed(0)
    weights = {0: torch.rand(2, 2, 6)}
    assert not stealing_tokens(weights, IMAGE, {0: torch.zeros(2, 2)}).any()
    assert not stealing_tokens(weights, torch.zeros_like(IMAGE), {0: torch.ones(2, 2)}).any()
    assert not stealing_tokens({0: torch.full((2, 2, 6), torch.nan)}, IMAGE, {0: torch.full((2, 2), torch.nan)}).any()
