"""Shared fixtures: a tiny random base in a folder, and rows in canonical shards."""

from __future__ import annotations

import contextlib
import io
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.records import Sample, messages_to_json, question_answer

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray reads both when it is imported, which a test module may do first
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")

COLOURS = {"red": (200, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 200), "white": (250, 250, 250)}
SHARD_SCHEMA = pa.schema(
    [("row", pa.int64()), ("sample_id", pa.string()), ("messages", pa.string()), ("images", pa.list_(pa.binary()))]
)


def picture(colour: str = "red", size: tuple[int, int] = (64, 64)) -> bytes:
    """A plain PNG."""
    buffer = io.BytesIO()
    Image.new("RGB", size, COLOURS[colour]).save(buffer, format="PNG")
    return buffer.getvalue()


def colour_samples(count: int, *, first: int = 0, text_only: Sequence[int] = ()) -> list[Sample]:
    """Rows that ask for the colour of a plain picture; the rows of `text_only` have no picture."""
    samples = []
    for row in range(first, first + count):
        colour = list(COLOURS)[row % len(COLOURS)]
        images = () if row in text_only else (picture(colour),)
        question = f"say {colour}" if row in text_only else "what color is this?"
        samples.append(Sample(row=row, messages=question_answer(question, colour, len(images)), images=images))
    return samples


def write_shards(folder: pathlib.Path, samples: Sequence[Sample], shard_rows: int = 512) -> list[pathlib.Path]:
    """Canonical shards of samples."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for start in range(0, len(samples), shard_rows):
        records: list[dict[str, Any]] = [
            {"row": s.row, "sample_id": s.sample_id, "messages": messages_to_json(s.messages), "images": list(s.images)}
            for s in samples[start : start + shard_rows]
        ]
        paths.append(folder / f"shard-{start // shard_rows:05d}.parquet")
        pq.write_table(pa.Table.from_pylist(records, schema=SHARD_SCHEMA), paths[-1])
    return paths


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The embedded base's folder with random weights and a smaller decoder. Don't write into it."""
    import torch
    from transformers import LlavaForConditionalGeneration

    from pipeline.embedded.build import base_config, base_processor
    from pipeline.embedded.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("tiny-base")
    tokenizer = train_tokenizer(0)
    config = base_config(tokenizer)
    config.vision_config.num_hidden_layers = 2
    config.text_config.num_hidden_layers = 3
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    base_processor(tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tiny_base: pathlib.Path) -> tuple[Any, Any]:
    """The tiny base's model and processor, loaded once. Don't change them."""
    from pipeline.models import load_base

    return load_base(tiny_base, device="cpu")


@pytest.fixture(scope="session")
def ray_engine() -> Iterator[Any]:
    """A started RayEngine of two workers, for all tests that need Ray; at the end nothing of it may be left."""
    import psutil

    from pipeline.config import EngineConfig
    from pipeline.engine.ray import RayEngine

    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with RayEngine(EngineConfig(kind="ray", workers=2, threads=1)) as engine:
        temporary = engine.temporary
        yield engine
    assert temporary is not None
    assert not temporary.exists()
    left = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
    _, alive = psutil.wait_procs(left, timeout=10)
    with contextlib.suppress(psutil.NoSuchProcess):
        assert not [child.cmdline() for child in alive]
