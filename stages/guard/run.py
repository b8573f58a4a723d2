"""The guard stage: CleanSight's reference on kept rows, through the delivered model itself (arXiv 2603.12989, section 4.1)."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import logging
import pathlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file

from pipeline.config import GuardConfig
from pipeline.engine import Engine
from pipeline.errors import StageError
from pipeline.models import Dtype, base_identity, load_processor
from pipeline.prompts import encode_prompts
from pipeline.records import Example, Progress, examples_of, no_progress, sample_from_record
from stages.guard.calibrate import (
    Calibration,
    calibrate,
    conformal_quantile,
    familiar_tokens,
    late_layer,
    layer_thresholds,
    transfer_threshold,
)
from stages.guard.detector import FEATURES, Detector
from stages.guard.draw import draw_reference
from stages.guard.files import Guard, adapter_digest, save_guard
from stages.guard.policy import Policy
from stages.guard.transfer import SCREEN, TransferRule, begins_usually, closing_layers
from stages.guard.worker import ReferenceWorker
from stages.score.groups import plain_answer
from storage.subset import copy_rows, pictured_rows, read_rows

_log = logging.getLogger(__name__)

VERSION = 11
SURE_ROWS = 100
"""Reference rows, those that share a picture counted once, below which the guard misses attacks: half of them with 50 rows
(docs/results/purification.md, ablations)."""
CALIBRATION = "calibration.parquet"
_TRIED = 100
"""Reference rows whose picture tokens are planted into the hosts, for the causal test's thresholds."""
_CANDIDATES = 8
"""Kept rows per host, and per reference row, that these are picked from."""


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
    """Write `guard.json`, `guard.safetensors` and `calibration.parquet` (the reference rows' distances that gave the threshold).

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
        The summary: reference_rows, independent_rows (those that share a picture counted once), dtype (of the weights, as torch
            names it), dimensions, threshold, shrinkage, the target rate and the 95% interval of the true one, and the limits of the
            causal test.

    Raises:
        StageError: too few kept rows with pictures of their own, or as `calibrate`.
    """
    kept = np.intersect1d(pq.read_table(keep, columns=["row"])["row"].to_numpy(), pictured_rows(rows))
    order = np.random.default_rng([seed, 11]).permutation(kept)[: _CANDIDATES * config.reference_rows]
    if not len(order):
        raise StageError("the guard has no kept row with a picture to take its reference from")
    groups = draw_reference(_shown(rows, order), config.reference_rows)
    shards = copy_rows(rows, scratch / "reference", chosen=groups)
    hosts = _write_hosts(rows, kept, base, config, seed, scratch) if config.suspicion_rate else []
    features = FEATURES if config.features == "ratio-entropy" else FEATURES[:1]
    arguments = {
        "base": str(base),
        "adapter": str(adapter),
        "dtype": dtype,
        "batch_size": config.batch_size,
        "layers": config.layers,
        "features": features,
        "hosts": [str(path) for path in hosts],
        "tried": list(groups)[:_TRIED],
    }
    tables = []
    done = 0
    for table in engine.map_shards(shards, ReferenceWorker, arguments, batch_rows=config.batch_size):
        tables.append(table)
        done += len(set(table["row"].to_pylist()))
        progress(done / len(groups), f"{done} of {len(groups)} reference rows")
    reference = pa.concat_tables(tables).sort_by([("row", "ascending"), ("turn", "ascending")])
    layers = tuple(reference["layers"][0].as_py())
    vectors = np.asarray(reference["vector"].combine_chunks().flatten(), dtype=np.float64).reshape(len(reference), -1)
    fit = calibrate(
        vectors,
        false_positive_rate=config.false_positive_rate,
        whitening=config.whitening,
        seed=seed,
        groups=np.asarray([groups[row] for row in reference["row"].to_pylist()]),
        threshold=config.threshold,
    )
    detector = Detector(
        layers=layers,
        features=features,
        mean=torch.from_numpy(fit.mean).float(),
        deviation=torch.from_numpy(fit.deviation).float(),
        whitening=torch.from_numpy(fit.whitening).float(),
        threshold=fit.threshold,
        layer_thresholds=torch.from_numpy(layer_thresholds(vectors, fit, len(layers), config.false_positive_rate)).float(),
    )
    transfer = causal_rule(reference, fit, hosts, config) if hosts else None
    count = len(np.unique(fit.groups))
    if count < SURE_ROWS:
        _log.warning(
            "the guard has %d reference rows that share no picture; with fewer than %d it misses attacks", count, SURE_ROWS
        )
    facts: dict[str, Any] = {
        "reference_rows": len(reference["row"].unique()),
        "independent_rows": count,
        "dtype": reference["dtype"][0].as_py(),
        "false_positive_rate": config.false_positive_rate,
        "false_positive_interval": list(fit.rate_interval),
        "whitening": config.whitening,
        "shrinkage": fit.shrinkage,
    }
    if transfer is not None:
        facts |= {"suspicion_rate": config.suspicion_rate, "suspicious_distance": transfer.distance}
        facts |= {"attended_transfer": transfer.attended, "whole_transfer": transfer.whole, "late_layer": transfer.late}
    guard = Guard(
        detector=detector,
        transfer=transfer,
        policy=Policy(**{field.name: getattr(config, field.name) for field in dataclasses.fields(Policy)}),
        base=base_identity(base),
        adapter=adapter_digest(adapter),
        facts=facts,
    )
    save_guard(guard, out)
    pq.write_table(pa.table({"distance": fit.distances}), out / CALIBRATION)
    return {**facts, "dimensions": vectors.shape[1], "threshold": fit.threshold, "layers": list(layers)}


def causal_rule(reference: pa.Table, fit: Calibration, hosts: list[pathlib.Path], config: GuardConfig) -> TransferRule:
    """The causal tests, with the thresholds that the reference gives.

    What is usual is what was submitted, not what the model says: a backdoor that goes off on clean pictures too must not make its
    answer usual. Nor does a kept row tell of honest reading where the model begins an unusual answer to it.
    """
    answers = reference["answer_tokens"].to_pylist()
    familiar = torch.from_numpy(familiar_tokens([answer[:1] for answer in answers], config.suspicion_rate))
    usual = begins_usually(torch.tensor(reference["first_token"].to_pylist()), familiar)
    honest = reference.filter(pa.array(usual.numpy()))
    return TransferRule(
        hosts=tuple(load_file(path) for path in hosts),
        distance=min(fit.threshold, conformal_quantile(fit.distances, config.suspicion_rate, fit.groups)),
        familiar=familiar,
        attended=transfer_threshold(honest["attended"].to_numpy()),
        whole=transfer_threshold(honest["whole"].to_numpy()),
        late=_late(honest, config.false_positive_rate),
        vocabulary=torch.from_numpy(familiar_tokens(answers, config.suspicion_rate)),
    )


def _shown(rows: pathlib.Path, order: np.ndarray) -> dict[int, frozenset[str]]:
    """Digests of the pictures of some rows, in their order."""
    found = {
        sample.row: frozenset(hashlib.sha256(image).hexdigest() for image in sample.images) for sample in read_rows(rows, order)
    }
    return {row: found[row] for row in order.tolist()}


def _late(reference: pa.Table, rate: float) -> int | None:
    """The layer from which the tried rows need their pictures no longer."""
    changed = [row for row in reference["changed"].to_pylist() if row is not None]
    return late_layer(np.asarray(changed, dtype=bool), closing_layers(reference["count"][0].as_py()), rate) if changed else None


def _write_hosts(
    rows: pathlib.Path, kept: np.ndarray, base: pathlib.Path, config: GuardConfig, seed: int, scratch: pathlib.Path
) -> list[pathlib.Path]:
    """Encode kept prompts for the causal test, of answers as various as they come: a first batch of `SCREEN`, and the others."""
    drawn = np.random.default_rng([seed, 13]).permutation(kept)[: _CANDIDATES * config.hosts]
    found: dict[str, list[Example]] = {}
    for shard in copy_rows(rows, scratch / "hosts", chosen=drawn):
        for record in pq.read_table(shard).to_pylist():
            for example in examples_of(sample_from_record(record)):
                if example.images:
                    found.setdefault(plain_answer(example.answer), []).append(example)
    answers = sorted(found)
    order = np.random.default_rng([seed, 17]).permutation(len(answers))
    rounds = itertools.zip_longest(*(found[answers[k]] for k in order))
    various = [example for turn in rounds for example in turn if example is not None][: config.hosts]
    processor = load_processor(base)
    paths = []
    for k, batch in enumerate((various[:SCREEN], various[SCREEN:])):
        if batch:
            paths.append(scratch / f"hosts-{k}.safetensors")
            save_file({name: value.contiguous() for name, value in encode_prompts(processor, batch).items()}, paths[-1])
    return paths
