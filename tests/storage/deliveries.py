"""A small delivery made by hand, for tests."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import IngestConfig
from storage.delivery import KIND
from storage.manifests import hash_folder, to_json
from tests.storage.submissions import imagefolder, qa

VERDICTS = ("keep", "quarantine", "rejected", "not_scored", "quarantine")


def delivery(folder: pathlib.Path, verdicts: Sequence[str] = VERDICTS, *, note: str = "") -> pathlib.Path:
    """A delivery of five rows."""
    kept = [row for row, verdict in enumerate(verdicts) if verdict in ("keep", "not_scored")]
    removed = [row for row in range(len(verdicts)) if row not in kept]
    imagefolder(folder / "dataset", [qa(row) for row in kept], 5)
    (folder / "quarantine").mkdir()
    pq.write_table(pa.table({"row": range(len(verdicts)), "verdict": list(verdicts)}), folder / "quarantine/verdicts.parquet")
    if removed:
        imagefolder(folder / "quarantine/rows", [qa(row) for row in removed], 5)
    (folder / "report.html").write_text(note)
    return sealed(folder)


def sealed(folder: pathlib.Path, **limits: Any) -> pathlib.Path:
    """The folder with a manifest of what is in it, and of limits that the submission was read with."""
    read = IngestConfig(**limits).model_dump()
    manifest = {
        "kind": KIND,
        "files": hash_folder(folder),
        "submission": {"format": "imagefolder"},
        "facts": {"configuration": {"ingest": read}},
    }
    (folder / "manifest.json").write_bytes(to_json(manifest))
    return folder


def rows_of(folder: pathlib.Path) -> list[int]:
    """The numbers of the rows in an imagefolder."""
    return [json.loads(line)["id"] for line in (folder / "metadata.jsonl").read_text().splitlines()]
