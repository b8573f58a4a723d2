"""The delivery folder: where it may lie, how it takes its place, how it is checked, and how removed rows are put back.

dataset/                    the kept rows, in the submitted format
quarantine/verdicts.parquet the verdict of every submitted row
quarantine/rows/            the removed rows, in the submitted format (only if there are any)
quarantine/reasons.jsonl    row, verdict and reason of each of them, in the same order
adapter/                    the PEFT adapter and its guard
report.html, report.json
manifest.json               sha256 of every other file, and the facts of the run
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Collection
from typing import Any

import pyarrow.parquet as pq

from pipeline.config import IngestConfig
from pipeline.errors import ConfigError, IntegrityError, StageError, SubmissionError
from pipeline.records import Verdict
from storage import atomic
from storage.formats import Pick, open_submission
from storage.manifests import MANIFEST, differences

KIND = "byesight-delivery"
DATASET = "dataset"
QUARANTINE = "quarantine"
ROWS = "quarantine/rows"
VERDICTS = "quarantine/verdicts.parquet"
REASONS = "quarantine/reasons.jsonl"
ADAPTER = "adapter"
REPORTS = ("report.html", "report.json")
KEPT = (Verdict.KEEP, Verdict.NOT_SCORED)


def check_place(out: pathlib.Path, submission: pathlib.Path, digest: str | None = None) -> None:
    """Refuse a place for a delivery that can't be written, or where it would overwrite something else.

    Args:
        out: the place.
        submission: what was submitted.
        digest: what `digest_submission` gave; the delivery of another submission stays where it is.

    Raises:
        ConfigError: `out` holds something that is no delivery, or that of another submission, it lies in the submission, or the
            submission in it, or it can't be made there.
    """
    here, data = out.absolute().resolve(), submission.absolute().resolve()
    if here == data or here.is_relative_to(data) or data.is_relative_to(here):
        raise ConfigError(f"--out {out}: the delivery and the submission can't lie in one another")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ConfigError(f"--out {out}: not a folder")
    if out.is_dir() and any(out.iterdir()) and not is_delivery(out):
        raise ConfigError(f"--out {out}: the folder holds something that is no delivery; name an empty or a new folder")
    if digest is not None and is_delivery(out) and _submission_of(out) not in (None, digest):
        raise ConfigError(f"--out {out}: the folder holds the delivery of another submission; name another one, or remove it")
    above = next(folder for folder in here.parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise ConfigError(f"--out {out}: nothing can be written into {above}; name another folder")


def is_delivery(folder: pathlib.Path) -> bool:
    """Whether a folder has the manifest of a delivery, whole or not."""
    try:
        return bool(_read_manifest(folder)["kind"] == KIND)
    except (IntegrityError, LookupError, TypeError):
        return False


def _submission_of(folder: pathlib.Path) -> str | None:
    """The digest of the submission that a delivery was made of, if it says so."""
    found = _read_manifest(folder).get("submission")
    digest = found.get("digest") if isinstance(found, dict) else None
    return digest if isinstance(digest, str) else None


def commit_delivery(folder: pathlib.Path, out: pathlib.Path) -> None:
    """Put a finished folder in its place by one rename; an earlier delivery steps aside for it and is then removed.

    Raises:
        StageError: another process put something there meanwhile.
    """
    with atomic.staging(out.parent, f".{out.name}.replaced-") as aside:
        old = aside / "old"
        atomic.sync_tree(folder)
        try:
            if out.is_dir() and is_delivery(out):
                out.rename(old)
            if atomic.commit_folder(folder, out):
                return
        finally:
            if old.exists() and not out.exists():
                old.rename(out)
        raise StageError(f"{out.name}: another process has written there meanwhile; nothing was replaced")


def verify_delivery(folder: pathlib.Path) -> dict[str, Any]:
    """Hash every file of a delivery and compare with its manifest.

    Returns:
        The manifest.

    Raises:
        IntegrityError: no manifest, or files that are changed, missing or extra; the message names up to ten.
    """
    manifest = _read_manifest(folder)
    try:
        if manifest["kind"] != KIND:
            raise IntegrityError(f"{folder.name}: {MANIFEST} is not that of a delivery")
        problems = differences(folder, manifest["files"])
    except (LookupError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{folder.name}: {MANIFEST} is incomplete") from error
    if problems:
        more = f" and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise IntegrityError(f"{folder.name}: {'; '.join(problems[:10])}{more}")
    return manifest


def restore(delivery: pathlib.Path, out: pathlib.Path, rows: Collection[int] | None = None) -> int:
    """Write the kept rows with removed rows put back in their old places, in the submitted format.

    Args:
        delivery: a delivery; it is verified first and stays as it is.
        out: a new folder outside of it.
        rows: the removed rows to put back, quarantined or rejected; None: all.

    Returns:
        The number of rows put back.

    Raises:
        IntegrityError: the delivery is damaged, or does not hold the rows that its verdicts name.
        SubmissionError: a row that was not removed, one that can't be copied whole, or `out` exists or lies in the delivery.
    """
    manifest = verify_delivery(delivery)
    if out.exists():
        raise SubmissionError(f"{out.name}: already there; name a new folder")
    if out.absolute().resolve().is_relative_to(delivery.absolute().resolve()):
        raise SubmissionError(f"{out.name}: it would lie in the delivery; name a folder outside of it")
    config = _as_read(manifest, delivery.name)
    verdicts = pq.read_table(delivery / VERDICTS, columns=["verdict"])["verdict"].to_pylist()
    chosen = range(len(verdicts)) if rows is None else set(rows)
    picks = [_pick(verdict, chosen=row in chosen) for row, verdict in enumerate(verdicts)]
    wrong = [row for row in chosen if rows is not None and (not 0 <= row < len(picks) or picks[row] == "kept")]
    if wrong:
        raise SubmissionError(f"row {min(wrong)} is not in quarantine")
    kept = open_submission(delivery / DATASET, config)
    removed = open_submission(delivery / ROWS, config) if (delivery / ROWS).is_dir() else None
    for name, part, named in ((DATASET, kept, picks.count("kept")), (ROWS, removed, len(picks) - picks.count("kept"))):
        held = 0 if part is None else part.count()
        if held != named:
            raise IntegrityError(f"{delivery.name}: {name} holds {held} rows, the verdicts name {named}")
    with atomic.staging(out.absolute().parent, f".{out.name}.partial-") as folder:
        if removed is None:
            kept.write_subset(range(len(picks)), folder / "rows")
        else:
            kept.write_merged(removed, picks, folder / "rows")
        if not atomic.commit_folder(folder / "rows", out):
            raise SubmissionError(f"{out.name}: already there; name a new folder")
    return picks.count("removed") + picks.count("rejected")


def _pick(verdict: str, *, chosen: bool) -> Pick:
    if verdict in KEPT:
        return "kept"
    if not chosen:
        return "left"
    return "rejected" if verdict == Verdict.REJECTED else "removed"


def _as_read(manifest: dict[str, Any], name: str) -> IngestConfig:
    """How the run read the submission, with its limits: what was accepted under them can be copied under them."""
    try:
        limits = manifest["facts"]["configuration"]["ingest"]
        return IngestConfig.model_validate({**limits, "format": manifest["submission"]["format"]})
    except (LookupError, TypeError, ValueError) as error:
        raise IntegrityError(f"{name}: {MANIFEST} does not say how the submission was read (facts.configuration.ingest)") from error


def _read_manifest(folder: pathlib.Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError) as error:
        missing = f"{MANIFEST} is missing or can't be read" if folder.is_dir() else "there is no such folder"
        raise IntegrityError(f"{folder}: {missing}") from error
    return manifest
