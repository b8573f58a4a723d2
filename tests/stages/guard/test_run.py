"""The guard stage on the tiny model: what it writes is what a serving process loads."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import pathlib
import shutil
import types
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.config import GuardConfig
from pipeline.errors import ModelError, RefusedInputError, StageError
from pipeline.generation import answer
from pipeline.models import Dtype, base_identity
from pipeline.prompts import encode_prompts
from pipeline.records import Sample, examples_of, question_answer
from stages.guard.calibrate import Calibration, calibrate, rate_interval
from stages.guard.detector import FEATURES, TENSORS
from stages.guard.files import GUARD, GUARD_TENSORS, adapter_digest, load_guard
from stages.guard.load import adapter_folder, load_guarded
from stages.guard.run import CALIBRATION, _write_hosts, causal_rule, run
from stages.guard.transfer import MAJORITY, SCREEN
from stages.guard.worker import REFERENCE
from tests.conftest import write_shards
from tests.stages.samples import noise

ROWS, TEXT_ONLY, LAYERS, HEADS = 66, (5, 40), 3, 4


def samples() -> list[Sample]:
    return [
        Sample(
            row=row,
            messages=question_answer(f"what is it, number {row % 7}?", "x", int(row not in TEXT_ONLY)),
            images=() if row in TEXT_ONLY else (noise(row),),
        )
        for row in range(ROWS)
    ]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("rows")
    write_shards(folder, samples(), shard_rows=20)
    return folder


class Stage:
    """Runs the stage on kept rows, each time in a folder of its own."""

    def __init__(self, folder: pathlib.Path, rows: pathlib.Path, base: pathlib.Path, adapter: pathlib.Path, engine: Any) -> None:
        self.folder, self.engine = folder, engine
        self.inputs = {"rows": rows, "base": base, "adapter": adapter}

    def run(
        self, name: str, *, kept: range = range(ROWS), seed: int = 0, dtype: Dtype = "float32", **config: Any
    ) -> tuple[dict[str, Any], pathlib.Path]:
        out = self.folder / name
        out.mkdir()
        pq.write_table(pa.table({"row": list(kept)}), self.folder / f"{name}.parquet")
        told: list[float] = []
        summary = run(
            **self.inputs,
            keep=self.folder / f"{name}.parquet",
            config=GuardConfig(**config),
            dtype=dtype,
            engine=self.engine,
            seed=seed,
            out=out,
            scratch=self.folder / f"{name}-scratch",
            progress=lambda share, _: told.append(share),
        )
        assert told == sorted(told)
        assert told[-1] == 1.0
        return summary, out


@pytest.fixture
def stage(
    tmp_path: pathlib.Path, rows: pathlib.Path, tiny_base: pathlib.Path, tiny_adapter: pathlib.Path, local_engine: Any
) -> Stage:
    return Stage(tmp_path, rows, tiny_base, tiny_adapter, local_engine)


@pytest.mark.parametrize(("enough", "warned"), [(53, True), (52, False)])
def test_few_reference_rows_are_warned_of(
    stage: Stage, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, enough: int, warned: bool
) -> None:
    monkeypatch.setattr("stages.guard.run.SURE_ROWS", enough)
    stage.run("a", reference_rows=52, suspicion_rate=0)
    assert ("the guard has 52 reference rows" in caplog.text) == warned


def test_reference_rows_are_rows_not_turns(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    told: dict[str, Any] = {}
    turns = [dataclasses.replace(s, messages=s.messages + question_answer("and that?", "y", 0)) for s in samples()]
    write_shards(stage.folder / "turns", turns)
    stage.inputs["rows"] = stage.folder / "turns"
    shards = stage.engine.map_shards

    def watched(paths: Any, build: Any, arguments: dict[str, Any], **more: Any) -> Any:
        told.update(arguments)
        return shards(paths, build, arguments, **more)

    stage.engine = types.SimpleNamespace(map_shards=watched)
    summary, _ = stage.run("a", reference_rows=52, suspicion_rate=0, batch_size=6)
    assert summary["reference_rows"] == 52
    assert "the guard has 52 reference rows" in caplog.text
    assert told["batch_size"] == 6


def asked_often(pictures: int, questions: int) -> list[Sample]:
    """Rows of the same pictures, each asked about so many times; a picture's rows lie apart."""
    return [
        Sample(row=row, messages=question_answer(f"question {row // pictures}?", "x"), images=(noise(row % pictures),))
        for row in range(pictures * questions)
    ]


def test_rows_about_one_picture_are_held_out_together(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[np.ndarray] = []

    def watched(vectors: np.ndarray, **given: Any) -> Calibration:
        groups.append(given["groups"])
        return calibrate(vectors, **given)

    monkeypatch.setattr("stages.guard.run.calibrate", watched)
    write_shards(stage.folder / "often", asked_often(51, 3), shard_rows=20)
    stage.inputs["rows"] = stage.folder / "often"
    summary, out = stage.run("a", kept=range(153), reference_rows=100, suspicion_rate=0)
    assert (summary["reference_rows"], summary["independent_rows"]) == (100, 51)
    assert summary["false_positive_interval"] == list(rate_interval(51, 0.01))
    assert len(np.unique(groups[0])) == 51, "all pictures are there"
    assert set(collections.Counter(groups[0].tolist()).values()) <= {1, 2, 3}
    rows = np.asarray(pq.read_table(out / CALIBRATION)["distance"])
    assert len(rows) == len(groups[0]) == 100
    stage.run("b", kept=range(51), reference_rows=100, suspicion_rate=0)
    assert len(np.unique(groups[1])) == len(groups[1]) == 51


def test_few_pictures_are_few_rows(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    for name, pictures in (("few", 20), ("more", 60)):
        write_shards(stage.folder / name, asked_often(pictures, 4), shard_rows=20)
    stage.inputs["rows"] = stage.folder / "few"
    with pytest.raises(StageError, match=r"at least 50 kept rows with pictures .* there are 20$"):
        stage.run("a", kept=range(80), suspicion_rate=0)
    stage.inputs["rows"] = stage.folder / "more"
    stage.run("b", kept=range(240), reference_rows=120, suspicion_rate=0)
    assert "the guard has 60 reference rows that share no picture" in caplog.text


def test_what_is_written(stage: Stage, tiny_base: pathlib.Path, tiny_adapter: pathlib.Path) -> None:
    summary, out = stage.run("a", reference_rows=55, false_positive_rate=0.1, action="report")
    assert {path.name for path in out.iterdir()} == {GUARD, GUARD_TENSORS, CALIBRATION}
    dimensions = LAYERS * HEADS * 2
    assert summary["reference_rows"] == 55
    assert summary["dimensions"] == dimensions
    assert summary["layers"] == [0, 1, 2]
    assert 0 < summary["shrinkage"] < 1
    found = load_guard(out, base=base_identity(tiny_base), adapter=adapter_digest(tiny_adapter))
    assert found.policy.action == "report"
    assert found.detector.threshold == summary["threshold"]
    assert found.detector.features == FEATURES
    assert found.detector.whitening.shape == (dimensions, dimensions)
    assert found.facts["false_positive_rate"] == 0.1
    distances = np.asarray(pq.read_table(out / CALIBRATION)["distance"])
    assert len(distances) == 55
    assert (distances > summary["threshold"]).sum() == 4  # rank ceil(56 * 0.9) of 55
    json.dumps(summary, allow_nan=False)


@pytest.mark.parametrize(("dtype", "actual"), [("auto", "float32"), ("bfloat16", "bfloat16")])
def test_what_a_guard_says_of_its_calibration(
    stage: Stage, dtype: Dtype, actual: str, tiny_base: pathlib.Path, tiny_adapter: pathlib.Path
) -> None:
    """The type that the weights had, and the false positive rates that so few rows can promise."""
    summary, out = stage.run("a", dtype=dtype, reference_rows=52, suspicion_rate=0)
    found = load_guard(out, base=base_identity(tiny_base), adapter=adapter_digest(tiny_adapter)).facts
    for facts in (summary, found):
        assert facts["dtype"] == actual
        assert facts["false_positive_interval"] == list(rate_interval(52, 0.01))
    assert summary["false_positive_rate"] == 0.01


def test_the_causal_test_that_is_written(
    stage: Stage, tiny_model: tuple[Any, Any], tiny_base: pathlib.Path, tiny_adapter: pathlib.Path
) -> None:
    summary, out = stage.run("a", reference_rows=55, layers="middle", hosts=8, suspicion_rate=0.2)
    found = load_guard(out, base=base_identity(tiny_base), adapter=adapter_digest(tiny_adapter)).transfer
    assert found is not None
    assert [len(batch["input_ids"]) for batch in found.hosts] == [SCREEN, 8 - SCREEN] == [2, 6]
    prompts = encode_prompts(tiny_model[1], [example for sample in samples() for example in examples_of(sample)])
    pictures = [row for row in range(ROWS) if row not in TEXT_ONLY]
    drawn = []
    for batch in found.hosts:
        assert set(batch) == set(prompts)
        for pixels, ids, mask in zip(batch["pixel_values"], batch["input_ids"], batch["attention_mask"], strict=True):
            (place,) = (prompts["pixel_values"] == pixels).flatten(1).all(1).nonzero()[:, 0].tolist()
            drawn.append(pictures[place])
            row = prompts["input_ids"][drawn[-1]]
            assert torch.equal(ids[mask.bool()], row[prompts["attention_mask"][drawn[-1]].bool()])
    assert len(set(drawn)) == 8
    distances = np.sort(np.asarray(pq.read_table(out / CALIBRATION)["distance"]))
    assert found.distance == distances[44]  # rank ceil(56 * 0.8)
    assert found.distance < summary["threshold"]
    assert MAJORITY <= found.attended <= 1
    assert MAJORITY <= found.whole <= 1
    names = ("suspicion_rate", "suspicious_distance", "attended_transfer", "whole_transfer")
    assert [summary[name] for name in names] == [0.2, found.distance, found.attended, found.whole]
    json.dumps(summary, allow_nan=False)


def test_what_a_backdoor_says_of_kept_rows_is_not_usual(tmp_path: pathlib.Path) -> None:
    """It goes off on a third of them: these rows tell neither what is usual nor what an honest answer needs of its picture."""
    hosts = [tmp_path / "hosts.safetensors"]
    save_file({"input_ids": torch.ones(8, 3)}, hosts[0])
    rows = 90
    fires = np.arange(rows) % 3 == 0
    record = {"turn": 0, "dtype": "float32", "layers": [1], "vector": [0.0], "count": 4, "answer_tokens": [7, 2]}
    records = [
        {
            **record,
            "row": row,
            "first_token": 99 if fires[row] else 7,
            "attended": float(fires[row]),
            "whole": 0.125 + 0.875 * float(fires[row]),
            "changed": [True, True, bool(fires[row]), bool(fires[row])],
        }
        for row in range(rows)
    ]
    reference = pa.Table.from_pylist(records, schema=REFERENCE)
    vectors = np.random.default_rng(0).normal(size=(rows, 2))
    fit = calibrate(vectors, false_positive_rate=0.01, whitening="full", seed=0)
    found = causal_rule(reference, fit, hosts, GuardConfig())
    assert found.familiar.tolist() == [7]
    assert found.vocabulary.tolist() == [2, 7]
    assert (found.attended, found.whole, found.late) == (MAJORITY, MAJORITY, 2)
    various = reference.set_column(
        reference.schema.get_field_index("answer_tokens"), "answer_tokens", pa.array([[row, 200 + row] for row in range(rows)])
    )
    found = causal_rule(various, fit, hosts, GuardConfig())
    assert (len(found.familiar), len(found.vocabulary)) == (0, 0)
    assert (found.attended, found.late) == (1.0, None), "with answers as various as these all rows count"


def test_without_a_causal_test(stage: Stage, tiny_base: pathlib.Path, tiny_adapter: pathlib.Path) -> None:
    summary, out = stage.run("a", reference_rows=52, suspicion_rate=0)
    assert load_guard(out, base=base_identity(tiny_base), adapter=adapter_digest(tiny_adapter)).transfer is None
    assert set(load_file(out / GUARD_TENSORS)) == set(TENSORS)
    assert not {"suspicion_rate", "suspicious_distance", "attended_transfer", "whole_transfer"} & set(summary)


HOSTS: dict[str, tuple[list[str], int, list[int], dict[str, int]]] = {
    "rare answers too": (["yes"] * 30 + ["no", "red", "two"], 6, [2, 4], {"yes": 3, "no": 1, "red": 1, "two": 1}),
    "one of each": (["yes"] * 20 + list("abcdefgh"), 9, [2, 7], {"yes": 1, **dict.fromkeys("abcdefgh", 1)}),
    "case and spacing": ([*["Yes", "yes ", " YES", "yes"] * 3, *["no"] * 4], 6, [2, 4], {"yes": 3, "no": 3}),
    "all are the same": (["yes"] * 20, 8, [2, 6], {"yes": 8}),
    "fewer than are asked for": (["yes", "no", "yes"], 8, [2, 1], {"yes": 2, "no": 1}),
    "none for a second batch": (["yes", "no"], 8, [2], {"yes": 1, "no": 1}),
}


def asked_hosts(processor: Any, paths: list[pathlib.Path]) -> list[list[str]]:
    """What the prompts of each batch ask after `is it`."""
    texts = [processor.batch_decode(load_file(path)["input_ids"]) for path in paths]
    return [[" ".join(text.split("is it ")[1].split("?")[0].split()) for text in batch] for batch in texts]


@pytest.mark.parametrize("name", HOSTS)
def test_hosts_are_of_various_answers(
    name: str, tiny_base: pathlib.Path, tiny_model: tuple[Any, Any], tmp_path: pathlib.Path
) -> None:
    """A question names its answer; a row that is not kept is no host."""
    answers, wanted, sizes, expected = HOSTS[name]
    given = [
        Sample(row=row, messages=question_answer(f"is it {text.strip().lower()}?", text), images=(noise(row),))
        for row, text in enumerate([*answers, "lost"])
    ]
    write_shards(tmp_path / "rows", given)
    config = GuardConfig(hosts=wanted)
    paths = _write_hosts(tmp_path / "rows", np.arange(len(answers)), tiny_base, config, 0, tmp_path / "scratch")
    found = asked_hosts(tiny_model[1], paths)
    assert [len(batch) for batch in found] == sizes
    assert collections.Counter(itertools.chain(*found)) == expected
    assert len(set(found[0])) == min(2, len(expected)), "the first look is at different answers"


def test_a_turn_before_the_picture_is_no_host(tiny_base: pathlib.Path, tiny_model: tuple[Any, Any], tmp_path: pathlib.Path) -> None:
    before = question_answer("is it text?", "text", images=0)
    given = [
        Sample(row=row, messages=(*before, *question_answer("so what?", f"a {row}")), images=(noise(row),)) for row in range(3)
    ]
    write_shards(tmp_path / "rows", given)
    paths = _write_hosts(tmp_path / "rows", np.arange(3), tiny_base, GuardConfig(), 0, tmp_path / "scratch")
    texts = [text for path in paths for text in tiny_model[1].batch_decode(load_file(path)["input_ids"])]
    assert len(texts) == 3
    assert all("so what?" in text for text in texts)


def test_equal_inputs_give_equal_bytes_and_the_seed_counts(stage: Stage) -> None:
    outs = [stage.run(name, seed=seed, reference_rows=52)[1] for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    contents = [{path.name: path.read_bytes() for path in out.iterdir()} for out in outs]
    assert contents[0] == contents[1]
    assert contents[0] != contents[2]


def test_the_policies(stage: Stage) -> None:
    summary, out = stage.run("a", features="ratio", layers="middle", whitening="diagonal", reference_rows=64)
    assert (summary["layers"], summary["dimensions"], summary["shrinkage"]) == ([0, 1], 2 * HEADS, 0.0)
    content = json.loads((out / GUARD).read_text())
    assert content["features"] == ["ratio"]
    assert content["action"] == "purify"


def test_as_published(stage: Stage, tiny_base: pathlib.Path, tiny_adapter: pathlib.Path) -> None:
    _, out = stage.run("a", policy="cleansight")
    found = load_guard(out, base=base_identity(tiny_base), adapter=adapter_digest(tiny_adapter))
    assert (found.policy.purification, found.transfer, found.detector.features) == ("published", None, ("ratio",))


def test_too_few_kept_rows(stage: Stage) -> None:
    with pytest.raises(StageError, match=r"at least 50 kept rows with pictures .* there are 9"):
        stage.run("a", kept=range(10))
    with pytest.raises(StageError, match="no kept row with a picture"):
        stage.run("b", kept=range(5, 6))


@pytest.fixture
def delivered(stage: Stage, tiny_adapter: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A delivery's folder with the adapter and its guard."""
    _, out = stage.run("guard", false_positive_rate=0.1)
    adapter = tmp_path / "delivery" / "adapter"
    shutil.copytree(tiny_adapter, adapter)
    for name in (GUARD, GUARD_TENSORS):
        shutil.copy(out / name, adapter / name)
    return tmp_path / "delivery"


def test_a_loaded_guard_gives_the_calibrated_distances(
    delivered: pathlib.Path, tiny_base: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """On the reference rows themselves about the target share is flagged, and a guarded answer is the model's own elsewhere."""
    guarded, processor = load_guarded(delivered, tiny_base, dtype="float32", device="cpu")
    examples = [example for sample in samples() for example in examples_of(sample)]
    outputs = answer(guarded, processor, examples, max_new_tokens=3)
    records = guarded.records
    assert [record.ran for record in records] == [row not in TEXT_ONLY for row in range(ROWS)]
    flagged = [record.flagged for record in records]
    assert 0 <= sum(flagged) <= 12
    guarded.detach()
    plain = answer(guarded.model, processor, examples, max_new_tokens=3)
    assert [a for a, flag in zip(outputs, flagged, strict=True) if not flag] == [
        b for b, flag in zip(plain, flagged, strict=True) if not flag
    ]
    strange = np.asarray([record.distance for record in records if record.ran])
    held = np.asarray(pq.read_table(tmp_path / "guard" / CALIBRATION)["distance"])
    assert np.median(strange) < np.median(held), "a row is nearer to a reference that holds it"


def test_where_an_adapter_lies(delivered: pathlib.Path, tiny_base: pathlib.Path, tmp_path: pathlib.Path) -> None:
    assert adapter_folder(delivered) == delivered / "adapter"
    assert adapter_folder(delivered / "adapter") == delivered / "adapter"
    with pytest.raises(ModelError, match="neither a delivery nor an adapter"):
        adapter_folder(tmp_path)
    guarded, _ = load_guarded(delivered / "adapter", str(tiny_base), dtype="float32", device="cpu")
    assert guarded.policy.action == "purify"
    guarded.detach()


def test_the_stored_action_counts(delivered: pathlib.Path, tiny_base: pathlib.Path) -> None:
    path = delivered / "adapter" / GUARD
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "action": "refuse", "threshold": 1e-6}))
    guarded, processor = load_guarded(delivered, tiny_base, dtype="float32", device="cpu")
    with pytest.raises(RefusedInputError, match="1 of 1"):
        answer(guarded, processor, examples_of(samples()[0]), max_new_tokens=2)


def test_a_guard_of_other_weights_is_refused(delivered: pathlib.Path, tiny_base: pathlib.Path, tmp_path: pathlib.Path) -> None:
    shutil.copytree(tiny_base, tmp_path / "base")
    with (tmp_path / "base" / "chat_template.jinja").open("a") as file:
        file.write("{# other #}")
    with pytest.raises(ModelError, match="was calibrated on base"):
        load_guarded(delivered, tmp_path / "base")
    weights = delivered / "adapter" / "adapter_model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    with pytest.raises(ModelError, match="was calibrated on adapter"):
        load_guarded(delivered, tiny_base)
    weights.unlink()
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors: can't be read"):
        load_guarded(delivered, tiny_base)
    (delivered / "adapter" / GUARD).unlink()
    with pytest.raises(ModelError):
        load_guarded(delivered, tiny_base)
