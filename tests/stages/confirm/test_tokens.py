"""Tokens of pictures: planted, added, compared."""

from __future__ import annotations

import torch

from stages.confirm.tokens import add_residual, different_pictures, plant


def test_pictures_that_differ() -> None:
    """By more than a tenth of what other pictures differ by, or by their length."""
    others = [torch.tensor([[0.0, 0.0], [0.0, 0.0]]), torch.tensor([[6.0, 0.0], [0.0, 8.0]])]
    near, far, longer = torch.tensor([[3.0, 1.0], [0.0, 0.0]]), torch.tensor([[3.3, 1.0], [0.0, 0.0]]), torch.zeros(3, 2)
    assert different_pictures([others[0], near], others) == 1
    assert different_pictures([others[0], far, near, others[0], longer, longer], others) == 3
    assert different_pictures([near, near, others[0]], []) == 2
    assert different_pictures([torch.zeros(k, 2) for k in range(1, 9)], others) == 8


def test_plant() -> None:
    host, source = torch.zeros(4, 2), torch.arange(12.0).reshape(6, 2) + 1
    found = plant(host, source, [0, 3, 5, -1])
    assert found.tolist() == [[1, 2], [0, 0], [0, 0], [7, 8]]
    assert host.sum() == 0
    assert torch.equal(plant(host, source, []), host)
    assert plant(source, host, [1, 4]).tolist()[1] == [0, 0]
    assert plant(source, host, [1, 4]).tolist()[4] == source.tolist()[4]


def test_residual() -> None:
    hosts = [torch.zeros(3, 1), torch.full((3, 1), 2.0)]
    sources = [torch.tensor([[5.0], [1.0], [1.0]]), torch.tensor([[7.0], [1.0], [1.0]])]
    found = add_residual(hosts, sources)
    assert [tokens.flatten().tolist() for tokens in found] == [[5, 0, 0], [7, 2, 2]]
    assert torch.stack(found).mean(0).flatten().tolist() == [6, 1, 1]


def test_residual_of_pictures_of_several_sizes() -> None:
    small, large = torch.zeros(2, 1), torch.zeros(4, 1)
    sources = [torch.ones(4, 1), torch.full((2, 1), 9.0), torch.full((4, 1), 3.0)]
    found = add_residual([small, large], sources)
    assert torch.equal(found[0], small)
    assert found[1].flatten().tolist() == [2.0] * 4
    assert add_residual([small], sources[:1])[0].tolist() == small.tolist()
