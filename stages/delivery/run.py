"""The delivery stage: the sanitized rows, what was removed and why, the guarded adapter and the report in one folder."""

from __future__ import annotations

import collections
import hashlib
import json
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import IngestConfig
from pipeline.errors import ModelError, StageError, SubmissionError
from pipeline.records import Progress, Verdict, no_progress
from stages.guard.files import GUARD
from storage import atomic
from storage.delivery import ADAPTER, DATASET, KEPT, KIND, REASONS, REPORTS, ROWS, VERDICTS, check_place, commit_delivery
from storage.formats import Submission, digest_submission, open_submission
from storage.manifests import MANIFEST, hash_folder, names_under, to_json

VERSION = 1
REFUSED = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".py"}
_TEXT = {".json", ".jsonl", ".md", ".txt", ".jinja", ".html"}


def run(
    *,
    submission: pathlib.Path,
    config: IngestConfig,
    verdicts: pathlib.Path,
    adapter: pathlib.Path,
    report_html: pathlib.Path | str,
    report_json: pathlib.Path | str,
    facts: Mapping[str, Any],
    out: pathlib.Path,
    digest: str | None = None,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Write the delivery (see `storage.delivery`) beside `out` and rename it there; an earlier delivery is replaced.

    Args:
        submission: what was submitted.
        config: how it was read.
        verdicts: Parquet with `row`, `sample_id`, `verdict`, `reason` and more, for every submitted row.
        adapter: folder of the adapter and its guard (`guard.json`).
        report_html: a file, or the page itself.
        report_json: a file, or the text itself.
        facts: JSON values for the manifest: the base's identity, configuration, versions, seeds.
        out: the delivery folder.
        digest: what `digest_submission` gave at ingest; it is compared.
        progress: called after each part.

    Returns:
        The summary: keep, quarantine, not_scored and rejected rows, files, and the manifest's sha256.

    Raises:
        ConfigError: as `check_place`.
        SubmissionError: the submission has changed.
        ModelError: the adapter folder holds pickled files or code, or no weights or guard.
        StageError: the verdicts don't fit the submission, a report is no JSON, or the disk can't be written.
    """
    check_place(out, submission, digest)
    if digest is not None and digest_submission(submission) != digest:
        raise SubmissionError(f"{submission.name}: it has changed since it was read; run again")
    source = open_submission(submission, config)
    table = read_verdicts(verdicts, source.count())
    machine = _machine_paths([submission, out, adapter, pathlib.Path.cwd(), pathlib.Path.home(), *_base_of(adapter)])
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        with atomic.staging(out.absolute().parent, f".{out.name}.partial-") as folder:
            counts = _write_rows(source, table, folder)
            progress(0.6, "rows written")
            _copy_adapter(adapter, folder / ADAPTER, machine)
            for name, report in zip(REPORTS, (report_html, report_json), strict=True):
                _write_report(folder / name, report, machine)
            manifest = _manifest(folder, source, counts, facts, digest, machine)
            (folder / MANIFEST).write_bytes(manifest)
            progress(0.9, "delivery hashed")
            files = len(json.loads(manifest)["files"])
            commit_delivery(folder, out.absolute())
    except OSError as error:
        raise StageError(f"{out}: the delivery can't be written: {error.strerror}") from error
    progress(1.0, "delivery committed")
    return {**counts, "files": files, "manifest_sha256": hashlib.sha256(manifest).hexdigest()}


def read_verdicts(path: pathlib.Path, rows: int) -> pa.Table:
    """The verdicts in row order.

    Args:
        path: the Parquet file.
        rows: number of submitted rows.

    Raises:
        StageError: not one verdict per row, an unknown verdict, or a row that isn't kept without a reason.
    """
    table = pq.read_table(path).sort_by("row")
    if table["row"].to_pylist() != list(range(rows)):
        raise StageError(f"{path.name}: {table.num_rows} verdicts for {rows} rows; each row needs exactly one")
    for row, (verdict, reason) in enumerate(zip(table["verdict"].to_pylist(), table["reason"].to_pylist(), strict=True)):
        if verdict not in set(Verdict):
            raise StageError(f"{path.name}: row {row} has the unknown verdict {verdict!r}")
        if verdict != Verdict.KEEP and not reason:
            raise StageError(f"{path.name}: row {row} is {verdict} without a reason")
    return table


def _write_rows(source: Submission, table: pa.Table, folder: pathlib.Path) -> dict[str, int]:
    verdicts = table["verdict"].to_pylist()
    kept = [row for row, verdict in enumerate(verdicts) if verdict in KEPT]
    removed = [row for row, verdict in enumerate(verdicts) if verdict not in KEPT]
    source.write_subset(kept, folder / DATASET)
    (folder / VERDICTS).parent.mkdir()
    pq.write_table(table, folder / VERDICTS, compression="zstd")
    if removed:
        source.write_subset(removed, folder / ROWS, rejected=[row for row in removed if verdicts[row] == Verdict.REJECTED])
        reasons = table["reason"].to_pylist()
        lines = [json.dumps({"row": row, "verdict": verdicts[row], "reason": reasons[row]}) + "\n" for row in removed]
        (folder / REASONS).write_text("".join(lines), encoding="utf-8")
    found = collections.Counter(verdicts)
    return {str(verdict): found[verdict] for verdict in Verdict}


def _copy_adapter(adapter: pathlib.Path, target: pathlib.Path, machine: re.Pattern[str]) -> None:
    names = names_under(adapter)
    refused = [name for name in names if pathlib.Path(name).suffix.lower() in REFUSED]
    if refused:
        raise ModelError(f"adapter: {refused[0]} is pickled or code; only safetensors are delivered")
    if GUARD not in names or not any(name.endswith(".safetensors") for name in names):
        raise ModelError(f"adapter: its weights (safetensors) or its guard ({GUARD}) are missing")
    for name in names:
        data = (adapter / name).read_bytes()
        path = target / name
        if path.suffix in _TEXT:
            data = machine.sub("", data.decode(errors="surrogateescape")).encode(errors="surrogateescape")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def _write_report(path: pathlib.Path, report: pathlib.Path | str, machine: re.Pattern[str]) -> None:
    text = machine.sub("", report if isinstance(report, str) else report.read_text(encoding="utf-8"))
    if path.suffix == ".json":
        try:
            to_json(json.loads(text))
        except ValueError as error:
            raise StageError(f"{path.name}: not JSON: {error}") from error
    path.write_text(text, encoding="utf-8")


def _manifest(
    folder: pathlib.Path,
    source: Submission,
    counts: Mapping[str, int],
    facts: Mapping[str, Any],
    digest: str | None,
    machine: re.Pattern[str],
) -> bytes:
    try:
        told = json.loads(machine.sub("", to_json(dict(facts)).decode()))  # the facts alone: a file's name is as submitted
    except (TypeError, ValueError) as error:
        raise StageError(f"the facts for the manifest can't be written as JSON: {error}") from error
    return to_json(
        {
            "kind": KIND,
            "version": VERSION,
            "submission": {"format": source.format, "rows": sum(counts.values()), "digest": digest},
            "rows": dict(counts),
            "facts": told,
            "files": hash_folder(folder),
        }
    )


def _base_of(adapter: pathlib.Path) -> list[pathlib.Path]:
    """The folder of the base model that PEFT wrote down, if it did."""
    try:
        name = json.loads((adapter / "adapter_config.json").read_bytes())["base_model_name_or_path"]
    except (OSError, ValueError, LookupError, TypeError):
        return []
    return [pathlib.Path(name)] if isinstance(name, str) and name.startswith("/") else []


def _machine_paths(paths: Iterable[pathlib.Path]) -> re.Pattern[str]:
    """Matches the folders that the paths lie in, as they are and as JSON escapes them, so that only relative names are left."""
    places = {str(place) for path in paths for place in (path.absolute().parent, path.resolve().parent, path.absolute())} - {"/"}
    places |= {json.dumps(place)[1:-1] for place in places}
    longest_first = sorted(places, key=lambda place: (-len(place), place))
    bare = [place for place in longest_first if place.count("/") > 1]  # "/data" alone may be anyone's
    within, alone = ("|".join(map(re.escape, names)) for names in (longest_first, bare))
    return re.compile(rf"(?<![\w.~-])(?:(?:{within})/|(?:{alone})(?![\w.~-]))")
