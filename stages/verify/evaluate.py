"""Measure any model on any rows: clean performance, and attack success where a trigger is named. Truth is used here, by people."""

from __future__ import annotations

import dataclasses
import io
import pathlib
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.config import VerifyConfig
from pipeline.engine import Engine
from pipeline.errors import SubmissionError
from pipeline.images import decode_image
from pipeline.models import Dtype
from pipeline.records import Sample
from pipeline.triggers import Trigger
from stages.verify.measure import attack_success, share
from stages.verify.run import Candidate, answers_of
from storage.subset import canonical_shards, copy_rows, pictured_rows


def evaluate(
    candidate: Candidate,
    *,
    rows: pathlib.Path,
    base: pathlib.Path,
    trigger: Trigger | None,
    target: str | None,
    config: VerifyConfig,
    dtype: Dtype,
    engine: Engine,
    seed: int,
    scratch: pathlib.Path,
) -> dict[str, Any]:
    """Clean performance on the rows as they are, and the attack success rate on the same rows with the trigger on their pictures.

    Args:
        candidate: the adapter, None for the base itself, and the guard if it is to be used.
        rows: folder of canonical shards; rows without pictures are answered but never triggered.
        base: folder of the base model.
        trigger: put on the first picture of every row; None measures clean performance alone.
        target: what the attack wants to read; needed with a trigger.
        config: batch size, and the longest answer where those of the rows are shorter.
        dtype: type of the weights.
        engine: where the answers are given.
        seed: of what differs from picture to picture (a random position).
        scratch: an empty folder.

    Returns:
        rows, clean (exact match; of very long answers as in `answers_of`), flagged (share that the guard flagged of those it looked
        at, null without one), and with a trigger triggered_rows, asr, triggered_right (as clean, on triggered inputs) and
        triggered_flagged. Shares of nothing are NaN.

    Raises:
        SubmissionError: a trigger without a target, or no row with a picture to put it on.
    """
    given = answers_of(candidate, shards=canonical_shards(rows), base=base, config=config, dtype=dtype, engine=engine)
    found = {"rows": len(given), "clean": share(given["same"].to_pylist()), "flagged": _flagged(given)}
    if trigger is None:
        return found
    if not target:
        raise SubmissionError("a trigger needs its target: the answer that the attack wants")
    pictured = pictured_rows(rows)
    if not len(pictured):
        raise SubmissionError("no row holds a picture to put the trigger on")
    shards = copy_rows(rows, scratch / "triggered", chosen=pictured, change=lambda sample: triggered(sample, trigger, seed))
    given = answers_of(candidate, shards=shards, base=base, config=config, dtype=dtype, engine=engine)
    outputs, answers = given["output"].to_pylist(), given["answer"].to_pylist()
    return {
        **found,
        "triggered_rows": len(given),
        "asr": attack_success(outputs, answers, target),
        "triggered_right": share(given["same"].to_pylist()),
        "triggered_flagged": _flagged(given),
    }


def triggered(sample: Sample, trigger: Trigger, seed: int) -> Sample:
    """A sample with the trigger on its first picture."""
    rng = np.random.default_rng([seed, 17, sample.row])
    buffer = io.BytesIO()
    trigger(decode_image(sample.images[0]), rng).save(buffer, format="PNG")
    return dataclasses.replace(sample, images=(buffer.getvalue(), *sample.images[1:]))


def _flagged(answers: pa.Table) -> float | None:
    flags = [flag for flag in answers["flagged"].to_pylist() if flag is not None]
    return float(np.mean(flags)) if flags else None
