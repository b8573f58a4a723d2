"""The attention table: every example once and in order, its values those of eager attention whatever the batch."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.config import ExtractConfig
from pipeline.errors import ModelError
from pipeline.models import load_adapter, load_base
from pipeline.prompts import encode_prompts
from pipeline.records import examples_of
from stages.extract.run import TABLE, run
from stages.extract.table import AttentionTable
from stages.extract.worker import LISTS, ExtractWorker
from tests.conftest import colour_samples, write_shards
from tests.stages.samples import EXAMPLES, PICTURED, mixed_samples

LAYERS, HEADS, IMAGE_TOKENS = 3, 4, 64


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("rows")
    write_shards(folder, mixed_samples(), shard_rows=3)
    return folder


def extracted(rows: pathlib.Path, base: pathlib.Path, out: pathlib.Path, engine: Any, **given: Any) -> dict[str, Any]:
    config = ExtractConfig(batch_size=given.pop("batch_size", 4), top_tokens=given.pop("top_tokens", 5))
    settings = {"adapter": None, "dtype": "float32", **given}
    return run(rows=rows, base=base, config=config, engine=engine, out=out, **settings)


def records(folder: pathlib.Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(folder / TABLE).to_pylist()
    return found


def test_the_table(rows: pathlib.Path, tiny_base: pathlib.Path, tmp_path: pathlib.Path, local_engine: Any) -> None:
    told: list[float] = []
    summary = extracted(rows, tiny_base, tmp_path, local_engine, progress=lambda share, _: told.append(share))
    assert summary == {"examples": 9, "pictured": 6, "layers": LAYERS, "heads": HEADS}
    assert told == sorted(told)
    assert told[-1] == 1.0
    found = records(tmp_path)
    assert [(record["row"], record["turn"]) for record in found] == EXAMPLES
    by_place = {(record["row"], record["turn"]): record for record in found}
    assert by_place[2, 1]["question"] == "and what else is there to be seen?"
    assert by_place[5, 1]["answer"] == "red"
    for place, record in by_place.items():
        pictures = {(3, 0): 2}.get(place, 1 if place in PICTURED else 0)
        assert record["image_tokens"] == pictures * IMAGE_TOKENS
        shape = (LAYERS, HEADS) if pictures else (0, 0)
        assert (record["layers"], record["heads"]) == shape
        lengths = {name: len(record[name]) for name in LISTS}
        sizes = {"entropy": 1, "head_entropy": HEADS, "image_share": HEADS, "ratio": HEADS, "top_positions": 5, "top_weights": 5}
        assert lengths == {name: shape[0] * size for name, size in sizes.items()}
        assert all(math.isfinite(value) for name in LISTS for value in record[name])


def test_the_values_are_those_of_eager_attention(
    rows: pathlib.Path, tiny_base: pathlib.Path, tiny_adapter: pathlib.Path, tmp_path: pathlib.Path, local_engine: Any
) -> None:
    extracted(rows, tiny_base, tmp_path, local_engine, adapter=tiny_adapter)
    model, processor = load_base(tiny_base, dtype="float32", device="cpu")
    model.set_attn_implementation("eager")
    token = model.config.image_token_id
    model = load_adapter(model, tiny_adapter)
    by_place = {(record["row"], record["turn"]): record for record in records(tmp_path)}
    for example in (example for sample in mixed_samples() for example in examples_of(sample) if example.images):
        batch = encode_prompts(processor, [example])
        image = (batch["input_ids"][0] == token).numpy()
        text = np.arange(len(image)) > image.argmax()
        text &= ~image
        record = by_place[example.row, example.turn]
        for layer, attention in enumerate(model(**batch, output_attentions=True).attentions):
            row = attention[0, :, -1].detach().double().numpy()
            share = row[:, image] / row[:, image].sum(axis=1, keepdims=True)
            mean = row[:, image].mean(axis=0) / row[:, image].mean(axis=0).sum()
            heads = slice(layer * HEADS, (layer + 1) * HEADS)
            assert record["entropy"][layer] == pytest.approx(-(mean * np.log(mean)).sum(), abs=1e-5)
            assert record["head_entropy"][heads] == pytest.approx(-(share * np.log(share)).sum(axis=1), abs=1e-5)
            assert record["image_share"][heads] == pytest.approx(row[:, image].sum(axis=1), abs=1e-5)
            assert record["ratio"][heads] == pytest.approx(np.log(row[:, image].sum(1) / row[:, text].sum(1)), abs=1e-4)
            top = slice(layer * 5, (layer + 1) * 5)
            assert record["top_weights"][top] == pytest.approx(np.sort(mean)[::-1][:5], abs=1e-6)
            assert mean[record["top_positions"][top]] == pytest.approx(record["top_weights"][top], abs=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_batch_does_not_change_the_values(
    rows: pathlib.Path, tiny_base: pathlib.Path, tmp_path: pathlib.Path, local_engine: Any, batch_size: int
) -> None:
    for name, size in (("a", 8), ("b", batch_size)):
        (tmp_path / name).mkdir()
        extracted(rows, tiny_base, tmp_path / name, local_engine, batch_size=size, top_tokens=100)
    for a, b in zip(records(tmp_path / "a"), records(tmp_path / "b"), strict=True):
        for name in LISTS:
            assert len(a[name]) == len(b[name])
            if name != "top_positions":
                assert a[name] == pytest.approx(b[name], abs=1e-5), (a["row"], name)
        assert {name: a[name] for name in a if name not in LISTS} == {name: b[name] for name in b if name not in LISTS}


def test_bfloat16_gives_about_the_same(
    rows: pathlib.Path, tiny_base: pathlib.Path, tmp_path: pathlib.Path, local_engine: Any
) -> None:
    for dtype in ("float32", "bfloat16"):
        (tmp_path / dtype).mkdir()
        extracted(rows, tiny_base, tmp_path / dtype, local_engine, dtype=dtype)
    for a, b in zip(records(tmp_path / "float32"), records(tmp_path / "bfloat16"), strict=True):
        for name in ("entropy", "head_entropy", "image_share", "ratio"):
            assert a[name] == pytest.approx(b[name], abs=0.05), (a["row"], name)


class Backwards:
    """An engine whose workers finish in the reverse order."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def map_shards(
        self, shards: Sequence[pathlib.Path], build: Any, arguments: Mapping[str, Any], *, batch_rows: int
    ) -> Iterator[Any]:
        return iter(list(self.engine.map_shards(shards, build, arguments, batch_rows=batch_rows))[::-1])


def test_the_order_of_the_workers_does_not_matter(
    rows: pathlib.Path, tiny_base: pathlib.Path, tmp_path: pathlib.Path, local_engine: Any
) -> None:
    for name, engine in (("a", local_engine), ("b", Backwards(local_engine))):
        (tmp_path / name).mkdir()
        extracted(rows, tiny_base, tmp_path / name, engine, batch_size=1)
    assert (tmp_path / "a" / TABLE).read_bytes() == (tmp_path / "b" / TABLE).read_bytes()


def test_the_arrays_of_the_table(rows: pathlib.Path, tiny_base: pathlib.Path, tmp_path: pathlib.Path, local_engine: Any) -> None:
    extracted(rows, tiny_base, tmp_path, local_engine)
    found = AttentionTable.read(tmp_path / TABLE)
    assert list(zip(found.row.tolist(), found.turn.tolist(), strict=True)) == PICTURED
    assert found.ratio.shape == (6, LAYERS, HEADS)
    assert found.question[-1].startswith("a much longer question")
    assert found.answer[0] == "a thing"
    assert found.image_tokens.tolist() == [64, 64, 64, 128, 64, 64]
    pictured = [record for record in records(tmp_path) if record["image_tokens"]]
    for k, record in enumerate(pictured):
        assert found.entropy[k].tolist() == record["entropy"]
        assert found.ratio[k].ravel().tolist() == record["ratio"]
        assert found.ratio[k, 1, 2] == record["ratio"][HEADS + 2]
        assert found.head_entropy[k, 2, 3] == record["head_entropy"][-1]
        assert found.image_share[k, 0].tolist() == record["image_share"][:HEADS]


def test_text_alone_gives_an_empty_table(tiny_base: pathlib.Path, tmp_path: pathlib.Path, local_engine: Any) -> None:
    write_shards(tmp_path / "rows", colour_samples(3, text_only=[0, 1, 2]))
    summary = extracted(tmp_path / "rows", tiny_base, tmp_path, local_engine)
    assert summary == {"examples": 3, "pictured": 0, "layers": 0, "heads": 0}
    found = AttentionTable.read(tmp_path / TABLE)
    assert (len(found), found.entropy.shape) == (0, (0, 0))


def test_layers_that_do_not_run_or_do_not_match_are_told(tiny_base: pathlib.Path) -> None:
    worker = ExtractWorker(base=str(tiny_base), adapter=None, dtype="float32", batch_size=4, top_tokens=5)
    example = examples_of(mixed_samples()[0])[0]
    assert worker.statistics([example])[0]["layers"] == LAYERS
    layers = worker.model.get_decoder().layers
    layers[1].forward = lambda hidden, **_: hidden
    with pytest.raises(ModelError, match=r"attention layers \[1\] did not run"):
        worker.statistics([example])
    del layers[1].forward
    attention = layers[2].self_attn
    width = HEADS * attention.head_dim
    for name in ("q_proj", "k_proj", "v_proj"):
        setattr(attention, name, torch.nn.Linear(width, width // 2))
    attention.o_proj = torch.nn.Linear(width // 2, width)
    with pytest.raises(ModelError, match=r"the model's layers have \[2, 4\] attention heads"):
        worker.statistics([example])
