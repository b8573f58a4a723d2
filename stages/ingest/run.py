"""The ingest stage: every row of a submission becomes a canonical row or a rejection with its reason."""

from __future__ import annotations

import collections
import pathlib
from collections.abc import Sequence
from typing import Any

from pipeline.config import IngestConfig
from pipeline.errors import SubmissionError
from pipeline.records import Progress, Rejection, Sample, no_progress, text_of
from storage.formats import Reason, digest_submission, open_submission
from storage.manifests import to_json
from storage.shards import REJECTED, ShardWriter, write_rejected

__all__ = ["REJECTED", "ROWS", "SUBMISSION", "VERSION", "digest_submission", "run"]

VERSION = 1
ROWS = "rows"
SUBMISSION = "submission.json"


def run(
    submission: pathlib.Path,
    config: IngestConfig,
    out: pathlib.Path,
    *,
    special_tokens: Sequence[str],
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Write `rows/shard-*.parquet`, `rejected.parquet` and `submission.json`.

    Args:
        submission: a folder, or one Parquet file.
        config: the format, if it is named, and the limits.
        out: folder to write into.
        special_tokens: what the tokenizer reads as control; a row that has one in its text is rejected.
        progress: called after every hundred rows.

    Returns:
        The summary: format, submitted, accepted, rejected, rejected_by_reason, text_only, examples.

    Raises:
        SubmissionError: the submission can't be read, or has no usable row.
    """
    source = open_submission(submission, config)
    submitted = source.count()
    if not submitted:
        raise SubmissionError(f"{source.name}: there are no rows")
    (out / ROWS).mkdir(parents=True)
    writer = ShardWriter(out / ROWS, rows=config.shard_rows)
    rejections: list[Rejection] = []
    counts: collections.Counter[str] = collections.Counter()
    for row in source.rows():
        checked = _without_tokens(row, special_tokens)
        if isinstance(checked, Rejection):
            rejections.append(checked)
        else:
            writer.add(checked)
            counts["text_only"] += not checked.images
            counts["examples"] += sum(message["role"] == "assistant" for message in checked.messages)
        if row.row % 100 == 99:
            progress((row.row + 1) / submitted, f"{row.row + 1} of {submitted} rows")
    writer.close()
    summary = {
        "format": source.format,
        "submitted": submitted,
        "accepted": submitted - len(rejections),
        "rejected": len(rejections),
        "rejected_by_reason": dict(sorted(collections.Counter(_kind(rejection) for rejection in rejections).items())),
        "text_only": counts["text_only"],
        "examples": counts["examples"],
    }
    if not summary["accepted"]:
        raise SubmissionError(f"{source.name}: none of {submitted} rows can be used; the first: {_first(rejections)}")
    write_rejected(out / REJECTED, rejections)
    (out / SUBMISSION).write_bytes(to_json(summary))
    progress(1.0, f"{summary['accepted']} of {submitted} rows accepted")
    return summary


def _without_tokens(row: Sample | Rejection, special_tokens: Sequence[str]) -> Sample | Rejection:
    if isinstance(row, Rejection):
        return row
    for message in row.messages:
        text = text_of(message)
        token = next((token for token in special_tokens if token and token in text), None)
        if token is not None:
            reason = f"{Reason.SPECIAL_TOKEN}: {token!a} would be read as control by the model; write it otherwise"
            return Rejection(row=row.row, reason=reason, where=f"row {row.row}, turn of the {message['role']}")
    return row


def _kind(rejection: Rejection) -> str:
    return rejection.reason.partition(":")[0]


def _first(rejections: Sequence[Rejection]) -> str:
    return "; ".join(f"{rejection.where}: {rejection.reason}" for rejection in rejections[:3])
