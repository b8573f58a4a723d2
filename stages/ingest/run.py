"""The ingest stage: every row of a submission becomes a canonical row or a rejection with its reason."""

from __future__ import annotations

import collections
import pathlib
from collections.abc import Sequence
from typing import Any

from pipeline.config import IngestConfig
from pipeline.errors import SubmissionError
from pipeline.records import Progress, Rejection, no_progress
from storage.formats import digest_submission, open_submission
from storage.manifests import to_json
from storage.shards import REJECTED, ShardWriter, write_rejected

__all__ = ["REJECTED", "ROWS", "SUBMISSION", "VERSION", "digest_submission", "run"]

VERSION = 2
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
        SubmissionError: the submission can't be read, more of its rows than the configured share can't be used, or none can.
    """
    source = open_submission(submission, config)
    submitted = source.count()
    if not submitted:
        raise SubmissionError(f"{source.name}: there are no rows")
    (out / ROWS).mkdir(parents=True)
    writer = ShardWriter(out / ROWS, rows=config.shard_rows)
    rejections: list[Rejection] = []
    counts: collections.Counter[str] = collections.Counter()
    for row in source.rows(special_tokens):
        if isinstance(row, Rejection):
            rejections.append(row)
        else:
            writer.add(row)
            counts["text_only"] += not row.images
            counts["examples"] += sum(message["role"] == "assistant" for message in row.messages)
        if row.row % 100 == 99:
            progress((row.row + 1) / submitted, f"{row.row + 1} of {submitted} rows")
    writer.close()
    summary = {
        "format": source.format,
        "submitted": submitted,
        "accepted": submitted - len(rejections),
        "rejected": len(rejections),
        "rejected_by_reason": dict(sorted(_kinds(rejections).items())),
        "text_only": counts["text_only"],
        "examples": counts["examples"],
    }
    if not summary["accepted"]:
        raise SubmissionError(f"{source.name}: none of {submitted} rows can be used; {_told(rejections)}")
    if len(rejections) > config.rejection_cap * submitted:
        raise SubmissionError(
            f"{source.name}: {len(rejections)} of {submitted} rows can't be used, more than ingest.rejection_cap = "
            f"{config.rejection_cap:.0%}; {_told(rejections)}"
        )
    write_rejected(out / REJECTED, rejections)
    (out / SUBMISSION).write_bytes(to_json(summary))
    progress(1.0, f"{summary['accepted']} of {submitted} rows accepted")
    return summary


def _kinds(rejections: Sequence[Rejection]) -> collections.Counter[str]:
    """How many rows were rejected for each kind of reason."""
    return collections.Counter(rejection.reason.partition(":")[0] for rejection in rejections)


def _told(rejections: Sequence[Rejection]) -> str:
    """How many for what, and the first ones, for a message."""
    counts = ", ".join(f"{rows} {kind}" for kind, rows in _kinds(rejections).most_common())
    return f"{counts}; the first: " + "; ".join(f"{rejection.where}: {rejection.reason}" for rejection in rejections[:3])
