"""The guard stage: CleanSight's reference on kept rows, through the delivered model itself (arXiv 2603.12989, section 4.1)."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.config import GuardConfig
from pipeline.engine import Engine
from pipeline.errors import StageError
from pipeline.models import Dtype, base_identity
from pipeline.records import Progress, no_progress
from stages.extract.table import AttentionTable
from stages.extract.worker import ExtractWorker
from stages.guard.calibrate import calibrate, layer_thresholds
from stages.guard.detector import FEATURES, Detector, middle_layers
from stages.guard.files import Guard, adapter_digest, save_guard
from storage.subset import copy_rows, pictured_rows

VERSION = 2
CALIBRATION = "calibration.parquet"
_BATCH = 32


def run(
    *,
    rows: pathlib.Path,
    base: pathlib.Path,
    adapter: pathlib.Path,
    keep: pathlib.Path,
    config: GuardConfig,
    dtype: Dtype,
    engine: Engine,
    seed: int,
    out: pathlib.Path,
    scratch: pathlib.Path,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Write `guard.json`, `guard.safetensors` and `calibration.parquet` (the reference rows' cross-validated distances).

    Args:
        rows: folder of canonical shards.
        base: folder of the base model.
        adapter: folder of the adapter that is guarded.
        keep: Parquet file whose column `row` names the rows to draw the reference from.
        config: number of reference rows, target rate, policy.
        dtype: type of the weights.
        engine: where the prompts are run.
        seed: of the draw and of the folds.
        out: folder to write into.
        scratch: folder for the reference rows' shards.
        progress: called as rows are done.

    Returns:
        The summary: reference_rows, dimensions, threshold, shrinkage and the target rate.

    Raises:
        StageError: too few kept rows with pictures, or as `calibrate`.
    """
    kept = np.intersect1d(pq.read_table(keep, columns=["row"])["row"].to_numpy(), pictured_rows(rows))
    drawn = np.random.default_rng([seed, 11]).permutation(kept)[: config.reference_rows]
    if not len(drawn):
        raise StageError("the guard has no kept row with a picture to take its reference from")
    shards = copy_rows(rows, scratch / "reference", chosen=drawn)
    arguments = {
        "base": str(base),
        "adapter": str(adapter),
        "dtype": dtype,
        "batch_size": _BATCH,
        "top_tokens": 1,
    }
    tables = []
    done = 0
    for table in engine.map_shards(shards, ExtractWorker, arguments, batch_rows=_BATCH):
        tables.append(table)
        done += len(set(table["row"].to_pylist()))
        progress(done / len(drawn), f"{done} of {len(drawn)} reference rows")
    attention = AttentionTable.from_arrow(pa.concat_tables(tables).sort_by([("row", "ascending"), ("turn", "ascending")]))
    layers = tuple(range(attention.layers)) if config.layers == "all" else middle_layers(attention.layers)
    features = FEATURES if config.features == "ratio-entropy" else FEATURES[:1]
    vectors = reference_vectors(attention, layers, features)
    fit = calibrate(vectors, false_positive_rate=config.false_positive_rate, whitening=config.whitening, seed=seed)
    detector = Detector(
        layers=layers,
        features=features,
        mean=torch.from_numpy(fit.mean).float(),
        deviation=torch.from_numpy(fit.deviation).float(),
        whitening=torch.from_numpy(fit.whitening).float(),
        threshold=fit.threshold,
        layer_thresholds=torch.from_numpy(layer_thresholds(vectors, fit, len(layers), config.false_positive_rate)).float(),
    )
    facts = {
        "reference_rows": len(vectors),
        "false_positive_rate": config.false_positive_rate,
        "whitening": config.whitening,
        "shrinkage": fit.shrinkage,
    }
    save_guard(
        Guard(detector=detector, action=config.action, base=base_identity(base), adapter=adapter_digest(adapter), facts=facts), out
    )
    pq.write_table(pa.table({"distance": fit.distances}), out / CALIBRATION)
    return {**facts, "dimensions": vectors.shape[1], "threshold": fit.threshold, "layers": list(layers)}


def reference_vectors(attention: AttentionTable, layers: tuple[int, ...], features: tuple[str, ...]) -> np.ndarray:
    """What the detector reads, for every pictured example; float (examples, layers * features * heads), layers first."""
    most = np.log(np.maximum(attention.image_tokens, 1))[:, None]
    values = {"ratio": attention.ratio, "deficit": most[:, None] - attention.head_entropy}
    return np.concatenate([values[name][:, layer] for layer in layers for name in features], axis=1).astype(np.float64)
