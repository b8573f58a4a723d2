"""One LoRA fine-tune, on whatever engine: `train_adapter` is the whole of it."""

from __future__ import annotations

import json
import pathlib
import shutil
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

from pipeline.config import FinetuneConfig
from pipeline.engine import TrainContext
from pipeline.errors import ModelError, StageError
from pipeline.models import Dtype, base_identity, hidden_size, load_base, pick_device
from pipeline.prompts import Batch, check_lengths
from stages.finetune.data import Schedule, StepBatches, open_rows
from stages.finetune.lora import add_lora, learning_rate, write_adapter
from stages.finetune.recorder import Recorder, step_losses

ADAPTER = "adapter"
LOSS = "loss.jsonl"
_LARGE = 1_000_000_000
"""Parameters above which a GPU needs its activations' memory: a layer keeps some 34 bytes per token and dimension (Korthikanti et
al., 2022, section 4.1), so that 16 examples of 600 tokens take 16 GB with 24 layers of 2048 dimensions."""


def train_adapter(
    *,
    rows: pathlib.Path,
    base: pathlib.Path,
    config: FinetuneConfig,
    out: pathlib.Path,
    seed: int,
    dtype: Dtype,
    keep: pathlib.Path | None,
    scratch: pathlib.Path,
    context: TrainContext,
) -> dict[str, Any]:
    """Fine-tune a base on rows and write the adapter; every worker of the engine calls it.

    Args:
        rows: folder with canonical shards.
        base: folder of the base model.
        config: hyperparameters; `batch_size` is over all workers.
        out: rank 0 writes adapter/ and loss.jsonl here.
        seed: of the initial LoRA weights and the order of the examples.
        dtype: type of the base's weights; bfloat16 trains under autocast, the trained weights are float32.
        keep: Parquet file whose column `row` names the rows to train on; None trains on all.
        scratch: checkpoints and the memory-mapped rows; a call after an interrupted one goes on from its last checkpoint.
        context: the engine's.

    Returns:
        steps, epochs, rows, examples, first_loss, last_loss (nats per answer token), trainable_parameters, seconds_per_step.

    Raises:
        StageError: nothing to train on, a loss that isn't finite, or too little GPU memory.
        SubmissionError: a row that can't be encoded, or is too long.
        ModelError: the base is refused.
    """
    data = open_rows(rows, scratch / "rows", keep)
    schedule = Schedule(examples=len(data), batch_size=config.batch_size, epochs=config.epochs, seed=seed)
    work = scratch / "work"
    if context.rank == 0:
        shutil.rmtree(work, ignore_errors=True)
    set_seed(seed)
    arguments = _arguments(config, work, schedule.steps, seed, dtype, context.world_size)
    model, processor = load_base(base, dtype=dtype, device=arguments.device)
    check_lengths(processor, data.longest(), config.max_length)
    model.config.get_text_config().use_cache = False
    arguments.learning_rate = learning_rate(config, hidden_size(model))
    adapted = add_lora(model, config)
    if checkpoints_activations(config, arguments.device, sum(p.numel() for p in model.parameters())):
        _checkpoint_activations(model)
    recorder = Recorder(
        context,
        schedule.steps_per_epoch,
        f"lower finetune.learning_rate (now {arguments.learning_rate:.2g}) or look at the rows of that step",
    )
    batches = StepBatches(
        rows=data, schedule=schedule, processor=processor, max_length=config.max_length, world_size=context.world_size
    )
    trainer = Trainer(
        model=adapted,
        args=arguments,
        train_dataset=batches,
        data_collator=_only_item,
        compute_loss_func=recorder.loss,
        callbacks=[recorder],
    )
    trainer.model_accepts_loss_kwargs = False  # the loss is ours: the model needn't know of it
    trainer.remove_callback(PrinterCallback)
    try:
        with context.resume_from() as checkpoint:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except torch.OutOfMemoryError as error:
        raise StageError(
            f"the GPU's memory is too small: lower finetune.batch_size (now {config.batch_size}) "
            "or set finetune.gradient_checkpointing"
        ) from error
    history = step_losses(trainer.state.log_history)
    if context.rank == 0:
        write_adapter(adapted, out / ADAPTER, base_identity(base))
        (out / LOSS).write_text("".join(json.dumps(entry) + "\n" for entry in history), encoding="utf-8")
    return {
        "steps": schedule.steps,
        "epochs": schedule.steps / schedule.steps_per_epoch,
        "rows": data.rows,
        "examples": len(data),
        "first_loss": history[0]["loss"],
        "last_loss": history[-1]["loss"],
        "trainable_parameters": sum(p.numel() for p in adapted.parameters() if p.requires_grad),
        "seconds_per_step": recorder.seconds_per_step,
    }


def checkpoints_activations(config: FinetuneConfig, device: torch.device, parameters: int) -> bool:
    """Whether the activations of a base of so many parameters are computed again rather than kept."""
    if config.gradient_checkpointing is None:
        return device.type == "cuda" and parameters > _LARGE
    return config.gradient_checkpointing


def _checkpoint_activations(model: Any) -> None:
    try:  # not re-entrant: that would need embeddings with gradients, and a batch may be without pictures
        model.gradient_checkpointing_enable({"use_reentrant": False})
    except ValueError as error:
        raise ModelError(
            f"{type(model).__name__} can't compute its activations again; set finetune.gradient_checkpointing: false"
        ) from error


def _arguments(
    config: FinetuneConfig, work: pathlib.Path, steps: int, seed: int, dtype: Dtype, world_size: int
) -> TrainingArguments:
    """The trainer's settings; the learning rate is set when the base's width is known."""
    device = pick_device()
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=steps,
        per_device_train_batch_size=1,  # an item of StepBatches is a batch already
        train_sampling_strategy="sequential",
        lr_scheduler_type="linear",
        warmup_steps=round(config.warmup_ratio * steps),
        weight_decay=0.0,
        optim="adamw_torch_fused",
        bf16=dtype == "bfloat16" or (dtype == "auto" and device.type == "cuda"),
        use_cpu=device.type == "cpu",
        ddp_backend="gloo" if device.type == "cpu" and world_size > 1 else None,
        ddp_find_unused_parameters=world_size > 1,  # a batch may be without pictures
        dataloader_num_workers=0,
        dataloader_pin_memory=device.type == "cuda",
        remove_unused_columns=False,
        save_strategy="steps",
        save_steps=config.save_steps,
        save_total_limit=1,
        logging_strategy="no",
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        seed=seed,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # noqa: SLF001 - one worker uses one GPU; more would mean torch.nn.DataParallel
    return arguments


def _only_item(items: list[Batch]) -> Batch:
    return items[0]
