from __future__ import annotations

import math
import types
from typing import Any

import pytest
import torch
from transformers.loss.loss_utils import ForCausalLMLoss

from pipeline.engine.local import LocalContext
from pipeline.errors import StageError
from stages.finetune.recorder import FLUSH_STEPS, Recorder, answer_loss, step_losses


def test_answer_loss_is_the_models_own() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 7, generator=generator)
    labels = torch.tensor([[-100, -100, 3, 4, -100], [-100, 1, 2, 6, 5]])
    torch.testing.assert_close(answer_loss(logits, labels, 6), ForCausalLMLoss(logits, labels, vocab_size=7, num_items_in_batch=6))


def test_a_share_without_answers_adds_nothing() -> None:
    logits = torch.randn(1, 3, 7, requires_grad=True)
    loss = answer_loss(logits, torch.full((1, 3), -100), 6)
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == 0.0
    assert logits.grad is not None
    assert not logits.grad.any()


class Run:
    """What the Trainer would do, without a model: a step per loss."""

    def __init__(self, tmp_path: Any) -> None:
        self.told: list[tuple[float, str]] = []
        self.recorder = Recorder(LocalContext(tmp_path, lambda share, text: self.told.append((share, text))), 10, "mend it")
        self.state = types.SimpleNamespace(global_step=0, max_steps=25, log_history=[])
        self.control = types.SimpleNamespace(should_save=False)
        self.recorder.on_train_begin(None, self.state, self.control)

    def step(self, target: float, rate: float) -> None:
        logits = torch.zeros(1, 2, 2)
        logits[0, 0, 1] = target
        loss = self.recorder.loss(types.SimpleNamespace(logits=logits), torch.tensor([[-100, 1]]), torch.tensor(1))
        loss *= 2.0  # as the Trainer does with two workers
        schedule = types.SimpleNamespace(get_last_lr=lambda: [rate])
        self.recorder.on_pre_optimizer_step(None, self.state, self.control, lr_scheduler=schedule)
        self.state.global_step += 1
        self.recorder.on_step_end(None, self.state, self.control)


def test_every_step_is_recorded(tmp_path: Any) -> None:
    run = Run(tmp_path)
    for number in range(25):
        run.step(float(number), 0.5)
    history = step_losses([*run.state.log_history, {"train_runtime": 3.0, "step": 25}])
    assert [entry["step"] for entry in history] == list(range(1, 26))
    assert history[9]["epoch"] == 1.0
    assert history[0]["loss"] == pytest.approx(math.log(2))
    assert history[4]["loss"] == pytest.approx(math.log1p(math.exp(-4)), rel=1e-5)
    assert [share for share, _ in run.told] == [0.4, 0.8, 1.0]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Any) -> None:
    run = Run(tmp_path)
    for _ in range(3):
        run.step(0.0, 0.5)
    run.step(math.nan, 0.5)
    for _ in range(FLUSH_STEPS - 5):
        run.step(0.0, 0.5)
    with pytest.raises(StageError, match="the loss is nan at step 4 of 25; mend it"):
        run.step(0.0, 0.5)
