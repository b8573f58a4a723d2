"""The extract stage: attention statistics of every example under the provisional model (BYE, section 3.3)."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from pipeline.config import ExtractConfig
from pipeline.engine import Engine
from pipeline.records import Progress, no_progress
from stages.extract.worker import ExtractWorker
from storage.ordered import rows_of_shards, write_ordered
from storage.subset import canonical_shards

VERSION = 2
TABLE = "attention.parquet"


def run(
    *,
    rows: pathlib.Path,
    base: pathlib.Path,
    adapter: pathlib.Path | None,
    config: ExtractConfig,
    dtype: str,
    engine: Engine,
    out: pathlib.Path,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Write `attention.parquet`: one record per example, ordered by row and turn.

    Args:
        rows: folder of canonical shards.
        base: folder of the base model.
        adapter: folder of the provisional adapter; None reads the base itself.
        config: batch size and the number of image tokens kept per layer.
        dtype: type of the weights, as in RunConfig.
        engine: where the workers run.
        out: folder to write into.
        progress: called as rows are done.

    Returns:
        The summary: examples, examples with pictures, layers, heads.
    """
    shards = canonical_shards(rows)
    order = rows_of_shards(shards)
    arguments = {
        "base": str(base),
        "adapter": None if adapter is None else str(adapter),
        "dtype": dtype,
        "batch_size": config.batch_size,
        "top_tokens": config.top_tokens,
    }
    counts = {"examples": 0, "pictured": 0, "layers": 0, "heads": 0}

    def watched() -> Iterator[pa.Table]:
        done = 0
        for table in engine.map_shards(shards, ExtractWorker, arguments, batch_rows=4 * config.batch_size):
            done += len(set(table["row"].to_pylist()))
            counts["examples"] += table.num_rows
            for record in table.select(["image_tokens", "layers", "heads"]).to_pylist():
                counts["pictured"] += record["image_tokens"] > 0
                counts["layers"] = max(counts["layers"], record["layers"])
                counts["heads"] = max(counts["heads"], record["heads"])
            progress(done / max(1, len(order)), f"{done} of {len(order)} rows")
            yield table

    write_ordered(watched(), order, out / TABLE)
    return counts
