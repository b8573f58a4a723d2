"""One table that every family passes: the guard reads what eager maps show, and a flagged prompt is answered as if eager attention
had never seen its tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from transformers.cache_utils import DynamicLayer

from pipeline.attention import Kept, attach, attached, detach
from pipeline.errors import ModelError
from pipeline.models import image_token_id
from stages.extract.table import AttentionTable
from stages.extract.worker import ExtractWorker, records_to_table
from stages.guard.closing import Closing, taken_out
from stages.guard.detector import FEATURES, Detector, feature_vectors
from stages.guard.guarded import GuardedModel
from stages.guard.judge import Judge
from stages.guard.policy import Action, Policy
from stages.guard.purify import rewind_layers, stealing_heads, stealing_tokens
from stages.guard.transfer import TransferTest
from tests.eager import NEVER, closed, eager_rows, eager_twin, generated, plain_vectors
from tests.families import FAMILIES, Built, build
from tests.family_parts import HEADS
from tests.stages.guard.detectors import plain_detector

FAR = 1e9
"""A threshold that nothing exceeds."""
VECTOR = 2e-3
"""How far two ways to a detection vector may lie apart: logarithms of weights that differ by 1e-6, some of them 1e-3."""


@pytest.fixture(params=FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@dataclasses.dataclass(frozen=True)
class Seen:
    """What eager attention shows of a batch: vectors (batch, dimensions), rows by layer, image tokens (batch, keys)."""

    vectors: torch.Tensor
    rows: list[torch.Tensor]
    image: torch.Tensor

    @property
    def layers(self) -> int:
        return len(self.rows)


def seen_by_eager(name: str) -> Seen:
    built = build(name)
    ids, mask, token = built.batch["input_ids"], built.batch["attention_mask"], image_token_id(built.model.config)
    rows = eager_rows(name, built.batch)
    vectors = plain_vectors(rows, ids.numpy(), mask.numpy(), token)
    return Seen(vectors=torch.from_numpy(vectors).float(), rows=rows, image=(ids == token) & mask.bool())


def harmless(layers: int) -> Detector:
    return plain_detector(layers=range(layers), heads=HEADS, threshold=FAR)


def deficits(seen: Seen) -> torch.Tensor:
    """Which dimensions of a vector are deficits of entropy, bool (dimensions,)."""
    return torch.tensor([name == "deficit" for _ in range(seen.layers) for name in FEATURES for _ in range(HEADS)])


def detector_for(seen: Seen, row: int, rewind: int) -> Detector:
    """Flags one row alone, by the quantity in which it stands out most, and rewinds it to a layer; all its heads concentrate."""
    others = [k for k in range(len(seen.vectors)) if k != row and bool(seen.image[k].any())]
    mean = seen.vectors[others].mean(dim=0)
    mean = seen.vectors[row] - torch.where(deficits(seen), (seen.vectors[row] - mean).abs(), seen.vectors[row] - mean)
    distance = (seen.vectors - mean).abs()
    lead = distance[row] - distance[others].amax(dim=0)
    most = int(lead.argmax())
    whitening = torch.zeros(len(mean), len(mean))
    whitening[0, most] = 1
    largest = distance[row].reshape(seen.layers, -1).amax(dim=1)
    return dataclasses.replace(
        harmless(seen.layers),
        mean=mean,
        whitening=whitening,
        threshold=float(distance[row, most] - lead[most] / 2),
        layer_thresholds=torch.where(torch.arange(seen.layers) >= rewind, largest / 2, FAR),
    )


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The detection vectors that guards compute."""
    found: list[torch.Tensor] = []

    def spy(*args: Any) -> torch.Tensor:
        found.append(feature_vectors(*args))
        return found[-1]

    monkeypatch.setattr("stages.guard.judge.feature_vectors", spy)
    return found


def test_the_detection_vector_is_that_of_eager_maps(name: str, spied: list[torch.Tensor]) -> None:
    built, seen = build(name), seen_by_eager(name)
    pictured = seen.image.any(1)
    with GuardedModel(built.model, harmless(seen.layers)) as guarded:
        generated(guarded, built.batch, steps=2)
    (vectors,) = spied
    assert vectors.shape == (3, seen.layers * len(FEATURES) * HEADS)
    torch.testing.assert_close(vectors, seen.vectors, atol=VECTOR, rtol=0, equal_nan=True)
    assert torch.equal(vectors.isnan().all(1), ~pictured)
    assert [record.ran for record in guarded.records] == pictured.tolist()
    expected = np.linalg.norm(seen.vectors.numpy(), axis=1)
    assert [record.distance for record in guarded.records] == pytest.approx(expected, rel=1e-3, nan_ok=True)


def test_extract_and_guard_read_the_same_layers(name: str) -> None:
    built, seen = build(name), seen_by_eager(name)
    pictured = [example for example in built.examples if example.images]
    worker = ExtractWorker.__new__(ExtractWorker)  # its constructor loads from a folder
    worker.model, worker.processor, worker.batch_size, worker.top_tokens, worker.layers = (
        built.model,
        built.processor,
        8,
        4,
        seen.layers,
    )
    before = attach(built.model)
    try:
        found = dict(zip([(e.row, e.turn) for e in pictured], worker.statistics(pictured), strict=True))
    finally:
        detach(built.model, before)
    table = AttentionTable.from_arrow(records_to_table(pictured, found))
    assert table.ratio.shape[1:] == (seen.layers, HEADS)
    assert table.image_tokens.tolist() == seen.image.sum(1)[seen.image.any(1)].tolist()
    values = {"ratio": table.ratio, "deficit": np.log(table.image_tokens)[:, None, None] - table.head_entropy}
    vectors = np.concatenate([values[name][:, layer] for layer in range(seen.layers) for name in FEATURES], axis=1)
    np.testing.assert_allclose(vectors, seen.vectors[seen.image.any(1)], atol=VECTOR)


def test_planting_every_picture_token_gives_the_other_prompt_its_answer(name: str) -> None:
    """A host that is given its own picture answers as it did; one that is given nothing takes nothing over."""
    built = build(name)
    test = TransferTest(built.model, [built.batch])
    (host,) = test._hosts
    with torch.inference_mode():
        for k in host.image.any(1).nonzero()[:, 0].tolist():
            tokens = host.embeddings[k, host.image[k]]
            everything = torch.ones(len(tokens), dtype=torch.bool)
            planted = host.planted(tokens, everything)
            assert torch.equal(planted[k], host.embeddings[k])
            assert test._first_tokens(host, planted)[k] == host.own[k]
            assert torch.equal(host.planted(tokens, ~everything), host.embeddings)


def plain_run(built: Built, **more: Any) -> Any:
    with attached(built.model), torch.inference_mode():
        return generated(built.model, built.batch, **more)


@pytest.mark.parametrize(("row", "rewind"), [(0, 1), (1, 0)])
def test_a_flagged_row_is_that_of_an_eager_run_without_its_tokens(name: str, row: int, rewind: int) -> None:
    built, seen, noise = build(name), seen_by_eager(name), FAMILIES[name].noise
    detector = detector_for(seen, row, rewind)
    deviations = detector.deviations(seen.vectors)
    tokens = stealing_tokens(dict(enumerate(seen.rows)), seen.image, stealing_heads(detector, deviations))
    tokens &= (torch.arange(len(tokens)) == row)[:, None]
    assert rewind_layers(detector, deviations)[row] == rewind
    assert 0 < tokens.sum() < seen.image[row].sum()
    with closed(eager_twin(name), tokens, [rewind if k == row else NEVER for k in range(len(tokens))]), torch.no_grad():
        reference = generated(eager_twin(name), built.batch)
    plain = plain_run(built)
    with GuardedModel(built.model, detector) as guarded:
        found = generated(guarded, built.batch)
    record = guarded.records[row]
    assert (record.flagged, record.tokens_pruned, record.rewind_layer) == (True, int(tokens.sum()), rewind)
    assert [other.flagged for other in guarded.records] == [k == row for k in range(len(tokens))]
    assert torch.equal(found.sequences[row], reference.sequences[row])
    others = [k for k in range(len(tokens)) if k != row]
    for a, b, c in zip(found.scores, reference.scores, plain.scores, strict=True):
        torch.testing.assert_close(a[row], b[row], atol=noise, rtol=noise)
        torch.testing.assert_close(a[others], c[others], atol=1e-5, rtol=0)
    assert torch.equal(found.scores[0][others], plain.scores[0][others])
    assert not torch.allclose(found.scores[0][row], plain.scores[0][row], atol=10 * noise), "nothing was closed"


def test_taking_tokens_out_of_the_cache_is_masking_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token more in every other row, so that some rows are filled up."""
    built, noise = build(name), FAMILIES[name].noise
    seen = built.batch["attention_mask"].bool()
    tokens = torch.zeros_like(seen)
    tokens[:, -3] = True
    tokens[::2, -5] = seen[::2, -5]
    found: list[dict[int, Kept]] = []

    def close(*_: Any) -> Closing:
        return Closing(
            tokens=tokens,
            layers=torch.ones(len(tokens), dtype=torch.int64),
            proven=seen[:, 0] & False,
            begun=seen[:, 0] & False,
            image=seen,
            fewest=tokens,
        )

    def spy(*args: Any) -> dict[int, Kept]:
        found.append(taken_out(*args))
        return found[-1]

    monkeypatch.setattr(Judge, "_closing", close)
    monkeypatch.setattr("stages.guard.judge.taken_out", spy)
    flags = plain_detector(layers=range(FAMILIES[name].attention_layers), heads=HEADS, threshold=1e-6)
    with GuardedModel(built.model, flags) as guarded:
        masked = generated(guarded, built.batch)
    assert found == []
    with GuardedModel(built.model, flags, policy=Policy(pruning="remove")) as guarded:
        removed = generated(guarded, built.batch)
    kept = found[0]
    kinds = [type(layer) for layer in removed.past_key_values.layers]
    assert len(kept) == max(0, kinds.count(DynamicLayer) - 1)
    assert all(layer.columns.shape[1] == seen.shape[1] - 1 for layer in kept.values())
    assert torch.equal(removed.sequences, masked.sequences)
    for a, b in zip(removed.scores, masked.scores, strict=True):
        torch.testing.assert_close(a, b, atol=noise, rtol=noise)
    plain = plain_run(built)
    assert not torch.allclose(removed.scores[1], plain.scores[1], atol=10 * noise), "nothing was closed"


def test_with_a_static_cache(name: str) -> None:
    built, seen, noise = build(name), seen_by_eager(name), FAMILIES[name].noise
    if not FAMILIES[name].static:  # as of transformers 5.23; when it works, test it
        with pytest.raises(AttributeError, match="'dict' object has no attribute 'ndim'"):
            generated(built.model, built.batch, cache_implementation="static")
        return
    detector = detector_for(seen, 1, 0)
    with GuardedModel(built.model, detector) as guarded:
        dynamic = generated(guarded, built.batch)
        records = guarded.records
        static = generated(guarded, built.batch, cache_implementation="static")
    assert [r.tokens_pruned for r in guarded.records] == [r.tokens_pruned for r in records]
    assert torch.equal(static.sequences, dynamic.sequences)
    for a, b in zip(static.scores, dynamic.scores, strict=True):
        torch.testing.assert_close(a, b, atol=noise, rtol=noise)


def test_a_guard_for_more_layers_than_there_are() -> None:
    model = build("qwen3_5").model  # four layers, two with attention
    with pytest.raises(ModelError, match="reads attention layer 2, but Qwen3_5ForConditionalGeneration has 2"):
        GuardedModel(model, harmless(3))
    assert model.config.text_config._attn_implementation == "sdpa"


@pytest.mark.parametrize(("name", "action", "warned"), [("qwen3_5", "purify", 1), ("qwen3_5", "refuse", 0), ("llava", "purify", 0)])
def test_layers_without_attention_are_warned_of(name: str, action: Action, warned: int, caplog: pytest.LogCaptureFixture) -> None:
    with GuardedModel(build(name).model, harmless(2), policy=Policy(action=action)):
        assert sum("layers without attention" in record.message for record in caplog.records) == warned


def test_a_guard_that_sees_nothing_does_not_pass_anything(name: str) -> None:
    """Somebody else put the model's own attention back."""
    built = build(name)
    with GuardedModel(built.model, harmless(FAMILIES[name].attention_layers)) as guarded:
        detach(built.model, FAMILIES[name].own)
        with pytest.raises(ModelError, match=r"attention layers \[0, 1.* did not run"):
            generated(guarded, built.batch)
        assert guarded.records == []
