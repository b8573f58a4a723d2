"""The verify stage: what the provisional, the delivered and the guarded model answer on quarantined and on held-out kept rows."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.config import VerifyConfig
from pipeline.engine import Engine
from pipeline.generation import tokens_to_wait_for
from pipeline.models import Dtype, load_processor
from pipeline.prompts import token_count
from pipeline.records import Progress, Verdict, examples_of, no_progress, sample_from_record
from stages.verify.measure import share
from stages.verify.worker import ANSWERS, verify_worker
from storage.subset import copy_rows, pictured_rows

VERSION = 3
VERIFICATION = "verification.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A model under verification: its adapter folder, and the guard's folder if it is guarded."""

    adapter: pathlib.Path | None
    guard: pathlib.Path | None = None


def run(
    *,
    rows: pathlib.Path,
    base: pathlib.Path,
    provisional: pathlib.Path,
    final: pathlib.Path,
    guard: pathlib.Path,
    verdicts: pathlib.Path,
    held_out: pathlib.Path,
    config: VerifyConfig,
    dtype: Dtype,
    engine: Engine,
    seed: int,
    out: pathlib.Path,
    scratch: pathlib.Path,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Write `verification.json` and `answers.parquet`.

    Args:
        rows: folder of canonical shards.
        base: folder of the base model.
        provisional: the provisional adapter, trained on everything.
        final: the delivered adapter.
        guard: folder of the delivered adapter's guard.
        verdicts: Parquet file with `row` and `verdict`.
        held_out: Parquet file whose column `row` names kept rows that the delivered adapter was not trained on, unless it is the
            provisional one.
        config: numbers of rows, and the longest answer where those of the rows are shorter.
        dtype: type of the weights.
        engine: where the answers are given.
        seed: of the draw of rows.
        out: folder to write into.
        scratch: folder for the drawn rows' shards.
        progress: called as rows are done.

    Returns:
        Per model: the share of quarantined rows whose submitted answer it still gives (the residual), its exact match on held-out
        kept rows, whether it was trained on these (`seen`; the provisional model was), and the share that its guard flags; null
        where there are no rows. What very long answers count as, `answers_of` says.
    """
    pictured = pictured_rows(rows)
    table = pq.read_table(verdicts, columns=["row", "verdict"])
    removed = table.filter(pc.equal(table["verdict"], str(Verdict.QUARANTINE)))["row"].to_numpy()
    sets = {"quarantined": removed, "held_out": pq.read_table(held_out, columns=["row"])["row"].to_numpy()}
    rng = np.random.default_rng([seed, 13])
    sets = {name: rng.permutation(np.intersect1d(found, pictured))[: config.max_rows] for name, found in sets.items()}
    shards = copy_rows(rows, scratch / "rows", chosen=np.concatenate(list(sets.values())))
    models = {
        "provisional": Candidate(adapter=provisional),
        "delivered": Candidate(adapter=final),
        "guarded": Candidate(adapter=final, guard=guard),
    }
    found: dict[str, Any] = {}
    answers = []
    known: dict[Candidate, pa.Table] = {}
    for index, (name, candidate) in enumerate(models.items()):
        if candidate not in known:  # the delivered model is the provisional one where nothing was removed
            known[candidate] = answers_of(candidate, shards=shards, base=base, config=config, dtype=dtype, engine=engine)
        given = known[candidate]
        found[name] = {kind: _measured(given, chosen, kind) for kind, chosen in sets.items()}
        found[name]["held_out"]["seen"] = candidate.adapter == provisional
        answers.append(given.append_column("model", pa.array([name] * len(given), pa.string())))
        progress((index + 1) / len(models), f"{name} model verified")
    pq.write_table(pa.concat_tables(answers), out / "answers.parquet", compression="zstd")
    (out / VERIFICATION).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def answers_of(
    candidate: Candidate, *, shards: list[pathlib.Path], base: pathlib.Path, config: VerifyConfig, dtype: Dtype, engine: Engine
) -> pa.Table:
    """A model's answers to all rows of shards, ordered by row and turn.

    Submitted answers longer than `config.max_new_tokens` are waited for, up to 256 tokens; what is longer counts as given (`same`)
    as far as the model was let go on.
    """
    if not shards:
        return ANSWERS.empty_table()
    arguments = {
        "base": str(base),
        "adapter": None if candidate.adapter is None else str(candidate.adapter),
        "guard": None if candidate.guard is None else str(candidate.guard),
        "dtype": dtype,
        "batch_size": config.batch_size,
        "max_new_tokens": tokens_to_wait_for(_longest_answer(shards, base), config.max_new_tokens),
    }
    tables = engine.map_shards(shards, verify_worker, arguments, batch_rows=2 * config.batch_size)
    return pa.concat_tables(tables).sort_by([("row", "ascending"), ("turn", "ascending")])


def _longest_answer(shards: list[pathlib.Path], base: pathlib.Path) -> int:
    """Length of the longest submitted answer, tokens; the pictures are not read."""
    processor = load_processor(base)
    records = (record for shard in shards for record in pq.read_table(shard, columns=["row", "messages"]).to_pylist())
    samples = (sample_from_record({**record, "images": ()}) for record in records)
    return max((token_count(processor, example.answer) for sample in samples for example in examples_of(sample)), default=0)


def _measured(answers: pa.Table, rows: np.ndarray, kind: str) -> dict[str, Any]:
    chosen = answers.filter(pa.array(np.isin(answers["row"].to_numpy(), rows)))
    measure = "residual" if kind == "quarantined" else "performance"
    if not chosen.num_rows:
        return {"rows": 0, measure: None, "flagged": None}
    flags = [flag for flag in chosen["flagged"].to_pylist() if flag is not None]
    return {
        "rows": len(np.unique(chosen["row"].to_numpy())),
        measure: share(chosen["same"].to_pylist()),
        "flagged": float(np.mean(flags)) if flags else None,
    }
