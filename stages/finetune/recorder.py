"""The loss of every step: computed, watched, reported, and kept through checkpoints."""

from __future__ import annotations

import math
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import TrainerCallback

from pipeline.engine import TrainContext
from pipeline.errors import StageError
from pipeline.prompts import IGNORED

COLUMNS = ("step", "epoch", "loss", "learning_rate")
FLUSH_STEPS = 10
"""Steps between looks at the loss: each look waits for the GPU."""


def answer_loss(logits: torch.Tensor, labels: torch.Tensor, tokens: torch.Tensor | int) -> torch.Tensor:
    """Cross-entropy of the answers' tokens, summed and divided by `tokens`, nats.

    Args:
        logits: (batch, tokens, vocabulary).
        labels: (batch, tokens), `IGNORED` where nothing is predicted.
        tokens: answer tokens of the whole step, over all workers.
    """
    targets = labels[:, 1:]
    chosen = targets != IGNORED
    return torch.nn.functional.cross_entropy(logits[:, :-1][chosen].float(), targets[chosen], reduction="sum") / tokens


class Recorder(TrainerCallback):  # type: ignore[misc]
    """Follows one run of transformers' Trainer; `loss` is its loss function.

    The steps stand in the trainer's own log history ({step, epoch, loss, learning_rate}), which its checkpoints hold.

    Args:
        context: the engine's.
        steps_per_epoch: to tell the epoch of a step.
        hint: how to mend a loss that isn't finite.
    """

    def __init__(self, context: TrainContext, steps_per_epoch: int, hint: str) -> None:
        self._context = context
        self._steps_per_epoch = steps_per_epoch
        self._hint = hint
        self._losses: list[torch.Tensor] = []
        self._rates: list[float] = []
        self._first_step = 0
        self._started = time.perf_counter()
        self.seconds_per_step = 0.0

    def loss(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor) -> torch.Tensor:
        """The Trainer's `compute_loss_func`."""
        loss = answer_loss(outputs.logits, labels, num_items_in_batch)
        self._losses.append(loss.detach().clone())  # the Trainer scales the loss in place
        return loss

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        del args, control
        self._first_step = state.global_step
        self._started = time.perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        del args, state, control
        self._rates.append(float(given["lr_scheduler"].get_last_lr()[0]))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        del args
        if state.global_step % FLUSH_STEPS == 0 or state.global_step >= state.max_steps or control.should_save:
            self._flush(state)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Hand the trainer's checkpoint to the engine, once every worker has written its part."""
        del control
        if self._context.world_size > 1:
            torch.distributed.barrier()
        folder = pathlib.Path(args.output_dir) / f"checkpoint-{state.global_step}"
        loss = next(entry["loss"] for entry in reversed(state.log_history) if "learning_rate" in entry)
        self._context.report({"step": float(state.global_step), "loss": loss}, folder if self._context.rank == 0 else None)

    def _flush(self, state: Any) -> None:
        """Sum the workers' shares of the losses since the last look, and put them into the log history."""
        if not self._losses:
            return
        values = torch.stack(self._losses).double()
        if self._context.world_size > 1:
            torch.distributed.all_reduce(values)
        losses = values.tolist()
        start = state.global_step - len(losses)
        for step, (loss, rate) in enumerate(zip(losses, self._rates, strict=True), start=start + 1):
            if not math.isfinite(loss):
                raise StageError(f"the loss is {loss} at step {step} of {state.max_steps}; {self._hint}")
            state.log_history.append({"step": step, "epoch": step / self._steps_per_epoch, "loss": loss, "learning_rate": rate})
        self._losses.clear()
        self._rates.clear()
        self.seconds_per_step = (time.perf_counter() - self._started) / (state.global_step - self._first_step)
        self._context.progress(
            state.global_step / state.max_steps, f"step {state.global_step} of {state.max_steps}, loss {losses[-1]:.4f}"
        )


def step_losses(history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries of a trainer's log history that `Recorder` made, one per step, their keys in the order of `COLUMNS`."""
    return [{name: entry[name] for name in COLUMNS} for entry in history if entry.keys() == set(COLUMNS)]
