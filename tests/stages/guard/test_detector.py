"""What the detector reads and measures."""

from __future__ import annotations

import ast
import math
import pathlib
from collections.abc import Iterator

import pytest
import torch

from pipeline.attention import LayerStatistics
from stages.guard.detector import Detector, feature_vectors, middle_layers
from tests.stages.guard.detectors import plain_detector

ROOT = pathlib.Path(__file__).parents[3]


def statistics(layer: int, rows: int = 2, heads: int = 3) -> LayerStatistics:
    """Values that say where they come from: layer, row and head."""
    base = 100 * layer + 10 * torch.arange(rows)[:, None] + torch.arange(heads)
    empty = torch.zeros(rows)
    return LayerStatistics(
        entropy=empty,
        head_entropy=base / 1000,
        image_share=base.float(),
        ratio=base.float(),
        top_positions=torch.zeros(rows, 1, dtype=torch.long),
        top_weights=torch.zeros(rows, 1),
    )


def test_features_are_ordered_by_layer_feature_and_head() -> None:
    found = feature_vectors({k: statistics(k) for k in range(4)}, torch.tensor([64, 576]), [1, 3], ["ratio", "deficit"])
    assert found.shape == (2, 2 * 2 * 3)
    assert found.dtype == torch.float32
    cells = found.reshape(2, 2, 2, 3)
    assert cells[1, 0, 0].tolist() == [110, 111, 112]
    assert cells[0, 1, 1].tolist() == pytest.approx([math.log(64) - (300 + h) / 1000 for h in range(3)], abs=1e-5)
    assert cells[1, 1, 1].tolist() == pytest.approx([math.log(576) - (310 + h) / 1000 for h in range(3)], abs=1e-5)
    ratios = feature_vectors({k: statistics(k) for k in range(4)}, torch.tensor([64, 576]), [2], ["ratio"])
    assert ratios.tolist() == [[200, 201, 202], [210, 211, 212]]


def test_distances_and_deviations() -> None:
    torch.manual_seed(0)
    size = 2 * 2 * 3
    detector = Detector(
        layers=(1, 3),
        features=("ratio", "deficit"),
        mean=torch.randn(size),
        deviation=torch.rand(size) + 0.5,
        whitening=torch.randn(size, size),
        threshold=1.0,
        layer_thresholds=torch.ones(2),
    )
    vectors = torch.randn(5, size)
    vectors[4, 2] = math.nan
    found = detector.distances(vectors)
    for k in range(4):
        assert float(found[k]) == pytest.approx(
            float(torch.linalg.vector_norm(detector.whitening @ (vectors[k] - detector.mean))), abs=1e-4
        )
    assert found[4].isnan()
    deviations = detector.deviations(vectors)
    assert deviations.shape == (5, 2, 2, 3)
    at = (1 * 2 + 0) * 3 + 2
    assert float(deviations[0, 1, 0, 2]) == pytest.approx(float((vectors[0, at] - detector.mean[at]) / detector.deviation[at]))


def test_a_detector_moves_whole() -> None:
    detector = plain_detector()
    moved = detector.to(torch.device("meta"))
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 4
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert detector.mean.device.type == "cpu"


@pytest.mark.parametrize(
    ("count", "layers"), [(32, (9, 10, 11)), (8, (2,)), (3, (0, 1)), (1, (0,)), (2, (0,)), (64, tuple(range(18, 24)))]
)
def test_the_published_layers_scaled(count: int, layers: tuple[int, ...]) -> None:
    assert middle_layers(count) == layers


FORBIDDEN = {"prefect", "ray", "pyarrow", "sklearn", "scipy", "pandas", "flows", "storage", "byesight"}
PROJECT = {"pipeline", "stages", "storage", "flows"}


def imported(path: pathlib.Path) -> Iterator[str]:
    """Modules that a file imports anywhere, those of `from x import y` as x and x.y."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)


def module_file(name: str) -> pathlib.Path | None:
    place = ROOT.joinpath(*name.split("."))
    candidates = (place.with_suffix(".py"), place / "__init__.py")
    return next((path for path in candidates if path.is_file()), None)


@pytest.mark.parametrize("start", ["stages.guard.load", "pipeline.attention", "pipeline.generation", "stages.extract.table"])
def test_a_serving_process_needs_none_of_the_heavy_libraries(start: str) -> None:
    """Follows every import of our own modules, lazy ones too."""
    waiting, seen, outside = [start], set(), set()
    while waiting:
        name = waiting.pop()
        path = module_file(name)
        if path is None or path in seen:
            continue
        seen.add(path)
        for found in imported(path):
            if found.split(".")[0] in PROJECT:
                waiting.append(found)
            outside.add(found.split(".")[0])
    assert len(seen) >= {"stages.guard.load": 5, "stages.extract.table": 1}.get(start, 2)
    allowed = {"pyarrow"} if start == "stages.extract.table" else set()
    assert outside & FORBIDDEN == allowed, "the check itself finds what is there"
