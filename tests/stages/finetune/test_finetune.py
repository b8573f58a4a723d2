from __future__ import annotations

import json
import pathlib
import shutil
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from transformers.models.llama.modeling_llama import LlamaMLP

from pipeline.config import EngineConfig, FinetuneConfig
from pipeline.engine.local import LocalContext, LocalEngine
from pipeline.errors import StageError, SubmissionError
from pipeline.models import load_adapter, load_base
from pipeline.records import Sample, no_progress, question_answer
from stages import finetune
from stages.finetune.train import checkpoints_activations, train_adapter
from tests.conftest import colour_samples, write_shards

ROWS = 22
CONFIG = FinetuneConfig(epochs=2, batch_size=4, lora_rank=4, lora_alpha=8, save_steps=3, learning_rate=3e-3)
STEPS = 12


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("rows")
    write_shards(folder, colour_samples(ROWS, text_only=[4, 9, 13]), shard_rows=10)
    return folder


class Folders:
    """Runs the stage with an output and a scratch folder of its own."""

    def __init__(self, path: pathlib.Path, rows: pathlib.Path, base: pathlib.Path) -> None:
        self.out = path / "out"
        self.scratch = path / "scratch"
        self.out.mkdir(parents=True)
        self._inputs = rows, base

    def run(self, config: FinetuneConfig = CONFIG, engine: Any = None, **given: Any) -> dict[str, Any]:
        rows, base = self._inputs
        with engine or LocalEngine(EngineConfig(kind="local", threads=1)) as entered:
            return finetune.run(
                given.pop("rows", rows), given.pop("base", base), config, entered, self.out, seed=0, scratch=self.scratch, **given
            )

    def files(self) -> dict[str, bytes]:
        return {str(path.relative_to(self.out)): path.read_bytes() for path in sorted(self.out.rglob("*")) if path.is_file()}

    def losses(self) -> list[dict[str, float]]:
        return [json.loads(line) for line in (self.out / "loss.jsonl").read_text().splitlines()]


@pytest.fixture
def folders(tmp_path: pathlib.Path, rows: pathlib.Path, tiny_base: pathlib.Path) -> Folders:
    return Folders(tmp_path / "a", rows, tiny_base)


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, rows: pathlib.Path, tiny_base: pathlib.Path
) -> tuple[Folders, dict[str, Any]]:
    """A run that was not disturbed."""
    folders = Folders(tmp_path_factory.mktemp("finished"), rows, tiny_base)
    return folders, folders.run()


def test_the_output(finished: tuple[Folders, dict[str, Any]], tiny_base: pathlib.Path) -> None:
    folders, summary = finished
    assert folders.files().keys() == {
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "adapter/base.json",
        "loss.jsonl",
    }
    losses = folders.losses()
    assert [entry["step"] for entry in losses] == list(range(1, STEPS + 1))
    assert losses[-1]["epoch"] == 2.0
    assert max(entry["learning_rate"] for entry in losses) == pytest.approx(3e-3)
    assert losses[-1]["learning_rate"] == pytest.approx(3e-3 / STEPS)
    adapted = load_adapter(load_base(tiny_base, device="cpu")[0], folders.out / "adapter")
    assert summary.pop("seconds_per_step") > 0
    assert summary == {
        "steps": STEPS,
        "epochs": 2.0,
        "rows": ROWS,
        "examples": ROWS,
        "first_loss": losses[0]["loss"],
        "last_loss": losses[-1]["loss"],
        "trainable_parameters": sum(
            v.numel() for v in safetensors.torch.load_file(folders.out / "adapter/adapter_model.safetensors").values()
        ),
    }
    assert losses[-1]["loss"] < 0.7 * losses[0]["loss"]
    assert adapted.peft_config["default"].r == CONFIG.lora_rank


def test_equal_runs_give_equal_bytes(finished: tuple[Folders, dict[str, Any]], folders: Folders) -> None:
    folders.run()
    assert folders.files() == finished[0].files()


def test_an_interrupted_run_goes_on_to_the_same_end(finished: tuple[Folders, dict[str, Any]], folders: Folders) -> None:
    def interrupt(share: float, text: str) -> None:
        if share > 0.7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        folders.run(progress=interrupt)
    assert folders.files() == {}
    told: list[float] = []
    folders.run(progress=lambda share, text: told.append(share))
    assert min(told) > 0.5, "started from the beginning"
    assert folders.files() == finished[0].files()


def test_activations_that_are_computed_again_give_the_same_adapter(
    finished: tuple[Folders, dict[str, Any]], folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[None] = []
    forward = LlamaMLP.forward

    def counted(self: Any, hidden: torch.Tensor) -> Any:
        calls.append(None)
        return forward(self, hidden)

    monkeypatch.setattr(LlamaMLP, "forward", counted)
    folders.run(CONFIG.model_copy(update={"gradient_checkpointing": True}))
    assert len(calls) == 2 * 3 * STEPS, "three layers, each step, twice"
    assert folders.losses() == [pytest.approx(entry) for entry in finished[0].losses()]
    one, other = (safetensors.torch.load_file(one.out / "adapter/adapter_model.safetensors") for one in (finished[0], folders))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("asked", "device", "parameters", "expected"),
    [
        (None, "cuda", 7e9, True),
        (None, "cuda", 3e6, False),
        (None, "cpu", 7e9, False),
        (True, "cpu", 3e6, True),
        (False, "cuda", 7e9, False),
    ],
)
def test_activations_of_large_bases_are_computed_again_on_a_gpu(
    asked: bool | None, device: str, parameters: float, expected: bool
) -> None:
    config = FinetuneConfig(gradient_checkpointing=asked)
    assert checkpoints_activations(config, torch.device(device), int(parameters)) == expected


def test_the_order_and_the_weights_follow_the_seed(
    finished: tuple[Folders, dict[str, Any]], folders: Folders, rows: pathlib.Path, tiny_base: pathlib.Path
) -> None:
    with LocalEngine(EngineConfig(kind="local", threads=1)) as engine:
        finetune.run(rows, tiny_base, CONFIG, engine, folders.out, seed=1, scratch=folders.scratch)
    assert folders.files()["adapter/adapter_model.safetensors"] != finished[0].files()["adapter/adapter_model.safetensors"]


def test_only_kept_rows_are_trained_on(folders: Folders, tmp_path: pathlib.Path) -> None:
    pq.write_table(pa.table({"row": [1, 2, 3, 4, 5]}), tmp_path / "keep.parquet")
    summary = folders.run(keep=tmp_path / "keep.parquet")
    assert (summary["rows"], summary["steps"]) == (5, 4)


def test_bfloat16(folders: Folders) -> None:
    summary = folders.run(dtype="bfloat16")
    assert summary["last_loss"] < summary["first_loss"]
    tensors = safetensors.torch.load_file(folders.out / "adapter/adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_a_loss_of_nan_is_an_error_that_names_the_step(folders: Folders, tiny_base: pathlib.Path, tmp_path: pathlib.Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    tensors = safetensors.torch.load_file(base / "model.safetensors")
    next(value for name, value in tensors.items() if "lm_head" in name)[5] = torch.nan
    safetensors.torch.save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(StageError, match=r"the loss is nan at step 1 of 12; lower finetune\.learning_rate"):
        folders.run(base=base)
    assert folders.files() == {}


def test_a_row_that_is_too_long_is_named(folders: Folders) -> None:
    with pytest.raises(SubmissionError, match=r"row \d+, answer 0: \d+ tokens .* limit is 20"):
        folders.run(CONFIG.model_copy(update={"max_length": 20}))


def test_a_row_that_can_not_be_trained_on_is_named_before_any_step(folders: Folders, tmp_path: pathlib.Path) -> None:
    long = Sample(row=ROWS - 1, messages=question_answer("why? " * 200, "so", 0), images=())
    write_shards(tmp_path / "rows", [*colour_samples(ROWS - 1), long])
    with pytest.raises(SubmissionError, match=rf"row {ROWS - 1}, answer 0: \d+ tokens without its pictures, the limit is 200"):
        folders.run(CONFIG.model_copy(update={"max_length": 200, "epochs": 0.1}), rows=tmp_path / "rows")


def test_it_can_be_called_without_an_engine(
    finished: tuple[Folders, dict[str, Any]], folders: Folders, rows: pathlib.Path, tiny_base: pathlib.Path
) -> None:
    summary = train_adapter(
        rows=rows,
        base=tiny_base,
        config=CONFIG.model_copy(update={"epochs": 0.5}),
        out=folders.out,
        seed=0,
        dtype="float32",
        keep=None,
        scratch=folders.scratch,
        context=LocalContext(folders.scratch, no_progress),
    )
    assert summary["steps"] == 3
    assert summary["first_loss"] == finished[1]["first_loss"]


@pytest.mark.ray
def test_two_workers_train_as_one(finished: tuple[Folders, dict[str, Any]], folders: Folders, ray_engine: Any) -> None:
    told: list[float] = []
    rows, base = folders._inputs
    finetune.run(
        rows,
        base,
        CONFIG,
        ray_engine,
        folders.out,
        seed=0,
        scratch=folders.scratch,
        progress=lambda share, text: told.append(share),
    )
    one, two = finished[0].losses(), folders.losses()
    assert [entry["loss"] for entry in two] == pytest.approx([entry["loss"] for entry in one], rel=2e-3)
    assert [entry["learning_rate"] for entry in two] == [entry["learning_rate"] for entry in one]
    assert told[-1] == 1.0
    assert folders.files().keys() == finished[0].files().keys()
