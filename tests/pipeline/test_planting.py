"""Planting: tokens keep their places where there are such, and go to places in proportion where there are none."""

from __future__ import annotations

import pytest
import torch

from pipeline.planting import planted


def tokens(*values: float) -> torch.Tensor:
    return torch.tensor(values)[:, None]


@pytest.mark.parametrize(
    ("source", "chosen", "expected"),
    [
        ((1, 2, 3, 4), (0, 1, 0, 1), (-1, 2, -3, 4)),
        ((1, 2), (1, 1), (1, 2, -3, -4)),
        ((1, 2, 3, 4, 5, 6, 7, 8), (0, 0, 0, 0, 0, 0, 1, 0), (-1, -2, -3, 7)),
        ((1, 2, 3, 4, 5, 6, 7, 8), (0, 0, 0, 1, 0, 0, 1, 0), (-1, -2, -3, 4)),
        ((1, 2, 3, 4), (0, 0, 0, 0), (-1, -2, -3, -4)),
    ],
    ids=["same size", "smaller source", "in proportion", "its place is taken", "nothing"],
)
def test_places(source: tuple[float, ...], chosen: tuple[int, ...], expected: tuple[float, ...]) -> None:
    host = tokens(-1, -2, -3, -4)
    found = planted(host, tokens(*source), torch.tensor(chosen).bool())
    assert found[:, 0].tolist() == list(expected)
    assert host[:, 0].tolist() == [-1, -2, -3, -4]


def test_a_host_without_a_picture_takes_nothing() -> None:
    assert planted(torch.empty(0, 1), tokens(1, 2), torch.tensor([True, True])).shape == (0, 1)


def test_the_host_keeps_its_type() -> None:
    found = planted(tokens(1, 2).bfloat16(), tokens(3, 4), torch.tensor([True, False]))
    assert (found.dtype, found[:, 0].tolist()) == (torch.bfloat16, [3.0, 2.0])
