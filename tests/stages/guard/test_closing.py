"""What is closed in flagged prompts, step by step."""

from __future__ import annotations

import torch

from stages.guard.closing import Closing


def test_steps_of_widening() -> None:
    """Rows: begun at layer 5, at 1, at 0, at the end, with a layer of its own; not asked for, not proven, nothing closed."""
    image = torch.tensor([[False, True, True, True]]).repeat(8, 1)
    part = torch.tensor([[False, True, False, False]]).repeat(8, 1)
    part[3], part[7] = image[3], False
    closing = Closing(
        tokens=part.clone(),
        layers=torch.tensor([5, 1, 0, 0, 2, 5, 5, -1]),
        proven=torch.tensor([True, True, True, True, True, True, False, False]),
        begun=torch.tensor([True, True, True, True, False, True, True, False]),
        image=image,
        fewest=part,
        tried=(0, 1, 3, 5),
    )
    rows = torch.tensor([True, True, True, True, True, False, True, False])
    steps = [
        ([5, 1, 0, 0, 2, 5, 5, -1], [1, 1, 1, 3, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0, 1, 0]),
        ([5, 1, 0, 0, 5, 5, 5, -1], [3, 3, 3, 3, 1, 1, 1, 0], [1, 1, 1, 0, 1, 0, 0, 0]),
        ([3, 0, 0, 0, 5, 5, 5, -1], [1, 1, 3, 3, 3, 1, 1, 0], [1, 1, 0, 0, 1, 0, 0, 0]),
        ([3, 0, 0, 0, 3, 5, 5, -1], [3, 3, 3, 3, 1, 1, 1, 0], [1, 1, 0, 0, 1, 0, 0, 0]),
        ([1, 0, 0, 0, 3, 5, 5, -1], [1, 3, 3, 3, 3, 1, 1, 0], [1, 0, 0, 0, 1, 0, 0, 0]),
        ([1, 0, 0, 0, 1, 5, 5, -1], [3, 3, 3, 3, 1, 1, 1, 0], [1, 0, 0, 0, 1, 0, 0, 0]),
        ([0, 0, 0, 0, 1, 5, 5, -1], [1, 3, 3, 3, 3, 1, 1, 0], [1, 0, 0, 0, 1, 0, 0, 0]),
        ([0, 0, 0, 0, 0, 5, 5, -1], [3, 3, 3, 3, 1, 1, 1, 0], [1, 0, 0, 0, 1, 0, 0, 0]),
        ([0, 0, 0, 0, 0, 5, 5, -1], [3, 3, 3, 3, 3, 1, 1, 0], [0, 0, 0, 0, 1, 0, 0, 0]),
        ([0, 0, 0, 0, 0, 5, 5, -1], [3, 3, 3, 3, 3, 1, 1, 0], [0, 0, 0, 0, 0, 0, 0, 0]),
    ]
    for number, (layers, tokens, wider) in enumerate(steps):
        if number:
            rows = closing.widen(rows)
        assert closing.layers.tolist() == layers
        assert closing.tokens.sum(-1).tolist() == tokens
        assert rows.int().tolist() == wider
    assert torch.equal(closing.tokens[0], image[0])
    assert torch.equal(closing.tokens[5], part[5])
