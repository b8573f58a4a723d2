"""What a purifying prefill leaves in memory."""

from __future__ import annotations

import types
import weakref
from typing import Any

import pytest
import torch

from stages.guard.judge import Judge
from stages.guard.policy import Policy


class Output:
    """Stands for a model's output; a large one, of a real model."""

    logits = torch.ones(1, 2, 3)
    past_key_values = None

    def get(self, _: str) -> None:
        return None


def test_the_last_prefill_is_gone_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Output]] = []

    def prefill(*_: Any) -> Output:
        assert all(earlier() is None for earlier in made)
        output = Output()
        made.append(weakref.ref(output))
        return output

    monkeypatch.setattr(Judge, "_prefill", staticmethod(prefill))
    one = torch.tensor([True])
    closing: Any = types.SimpleNamespace(tokens=one[:, None], block=None, widen=lambda rows: rows & torch.tensor(len(made) < 3))
    detector: Any = None
    judge = Judge(detector=detector, rule=None, test=None, policy=Policy(action="purify"), layers=1)
    call: Any = None
    judge._run_again(call, torch.nn.Identity(), {}, Output(), closing, torch.tensor([0]))
    assert len(made) == 3
