"""The stages in their places: each takes stored results and gives one, found in the store or computed by the engine. No Prefect."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from flows.progress import progress_of, tell
from pipeline.config import RunConfig
from pipeline.engine import Engine
from pipeline.errors import ConfigError, ModelError, SubmissionError
from pipeline.models import base_identity, check_model_folder
from pipeline.prompts import control_tokens
from stages.cluster.run import HELD_OUT, KEEP, TRAIN, VERDICTS
from storage.formats import digest_submission
from storage.shards import REJECTED
from storage.store import Inputs, StageResult, Store, Work

STORE = pathlib.Path(".byesight/store")
"""Where stage results lie unless another folder is named."""
STAGES = ("ingest", "provisional", "extract", "score", "confirm", "cluster", "final", "guard", "verify", "delivery")
"""Names of the stages in the order in which they run."""
NO_MATTER = {"gradient_checkpointing", "rejection_cap"}
"""Fields of the configuration that change no result, and so no key."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """One run of the line.

    Attributes:
        submission: the submitted folder or file, absolute.
        base: folder of the base model, absolute.
        identity: the base's identity.
        config: the run configuration; its engine section is in no key.
        store: where results are found and kept.
        engine: where the work runs.
    """

    submission: pathlib.Path
    base: pathlib.Path
    identity: str
    config: RunConfig
    store: Store
    engine: Engine


def open_line(submission: pathlib.Path, base: pathlib.Path, config: RunConfig, store: pathlib.Path, engine: Engine) -> Line:
    """Check the base and the store's place, and make a line.

    Raises:
        ConfigError: the store lies in the submission.
        ModelError: the base is refused.
    """
    base = base.resolve()
    if store.resolve().is_relative_to(submission.resolve()):
        raise ConfigError(f"--store {store}: results can't be kept inside of the submission; name another folder")
    check_model_folder(base)
    return Line(
        submission=submission.resolve(),
        base=base,
        identity=base_identity(base),
        config=config,
        store=Store(store.resolve()),
        engine=engine,
    )


def special_tokens(base: pathlib.Path) -> list[str]:
    """What the base's tokenizer reads as control, sorted.

    Raises:
        ModelError: there is no tokenizer in the folder.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"{base}: its tokenizer can't be loaded: {error}") from error
    return control_tokens(tokenizer)


def ingest(line: Line) -> StageResult:
    """Read the submission into canonical shards."""
    from stages.ingest.run import VERSION, run

    tokens = special_tokens(line.base)

    def work(folder: pathlib.Path, _scratch: pathlib.Path) -> Mapping[str, Any]:
        return run(line.submission, line.config.ingest, folder, special_tokens=tokens, progress=progress_of("ingest"))

    inputs = {"submission": digest_submission(line.submission)}
    return _result(
        line,
        "ingest",
        VERSION,
        inputs,
        {"ingest": line.config.ingest.model_dump(exclude=NO_MATTER), "special_tokens": tokens},
        work,
    )


def check_enough(ingested: StageResult) -> None:
    """Refuse a submission of which no delivery can come, before two fine-tunes: the guard needs rows with pictures.

    Raises:
        SubmissionError: too few of the rows that can be used have one.
    """
    from stages.guard.calibrate import LEAST_ROWS

    pictured = ingested.summary["accepted"] - ingested.summary["text_only"]
    if pictured < LEAST_ROWS:
        raise SubmissionError(
            f"{pictured} rows with pictures can be used; the guard takes its reference from {LEAST_ROWS} at least"
        )


def canaries(line: Line, ingested: StageResult) -> StageResult:
    """What the provisional model is fine-tuned on and judged by: the submitted rows, and canaries where they are asked for."""
    if not line.config.canary.share:
        return ingested
    from stages.canary.run import VERSION, run

    least = line.config.score.least_rows

    def work(folder: pathlib.Path, _scratch: pathlib.Path) -> Mapping[str, Any]:
        return run(
            rows=rows_of(ingested),
            first=int(ingested.summary["submitted"]),
            least=least,
            config=line.config.canary,
            seed=line.config.seed,
            out=folder,
            progress=progress_of("canary"),
        )

    config = {"canary": line.config.canary.model_dump(), "least": least, "seed": line.config.seed}
    return _result(line, "canary", VERSION, {"rows": ingested}, config, work)


def finetune(line: Line, stage: str, ingested: StageResult, keep: StageResult | None = None) -> StageResult:
    """Fine-tune an adapter on all rows, or on those that the cluster stage chose for training (`keep`)."""
    from stages.finetune import VERSION, run

    inputs: dict[str, StageResult | str] = {"rows": ingested, "base": line.identity}
    if keep is not None:
        inputs["keep"] = keep
    config = {"finetune": line.config.finetune.model_dump(exclude=NO_MATTER), "seed": line.config.seed, "dtype": line.config.dtype}

    def work(folder: pathlib.Path, scratch: pathlib.Path) -> Mapping[str, Any]:
        return run(
            rows_of(ingested),
            line.base,
            line.config.finetune,
            line.engine,
            folder,
            seed=line.config.seed,
            scratch=scratch,
            dtype=line.config.dtype,
            keep=keep.folder / TRAIN if keep is not None else None,
            progress=progress_of(stage),
        )

    return _result(line, stage, VERSION, inputs, config, work, resume=True)


def final(line: Line, *, ingested: StageResult, provisional: StageResult, clustered: StageResult) -> StageResult:
    """The adapter that is delivered: fine-tuned on the kept rows, or the provisional one where it has seen no others.

    The same fine-tune on the same rows would give that one again.
    """
    if clustered.summary["rows"]["quarantined"] or line.config.canary.share:
        return finetune(line, "final", ingested, clustered)
    tell("final", 0.0, "")
    tell("final", 1.0, "done: nothing was removed, the provisional adapter is the final one")
    return dataclasses.replace(provisional, stage="final", seconds=0.0, reused=True)


def choose(line: Line, ingested: StageResult, rows: Sequence[int]) -> StageResult:
    """Rows that a person names for training and to keep, in the place of those that the cluster stage chooses.

    Args:
        line: the run.
        ingested: what the rows are of.
        rows: positions in the submission, ascending.
    """

    def work(folder: pathlib.Path, _scratch: pathlib.Path) -> Mapping[str, Any]:
        for name in (TRAIN, KEEP):
            pq.write_table(pa.table({"row": pa.array(rows, pa.int64())}), folder / name)
        return {"rows": len(rows)}

    digest = hashlib.sha256(json.dumps(list(rows)).encode()).hexdigest()
    return _result(line, "chosen", 2, {"rows": ingested, "chosen": digest}, {}, work)


def extract(line: Line, ingested: StageResult, provisional: StageResult) -> StageResult:
    """The attention statistics of every example under the provisional model."""
    from stages.extract.run import VERSION, run

    def work(folder: pathlib.Path, _scratch: pathlib.Path) -> Mapping[str, Any]:
        return run(
            rows=rows_of(ingested),
            base=line.base,
            adapter=provisional.folder / "adapter",
            config=line.config.extract,
            dtype=line.config.dtype,
            engine=line.engine,
            out=folder,
            progress=progress_of("extract"),
        )

    inputs: Inputs = {"rows": ingested, "base": line.identity, "adapter": provisional}
    config = {"extract": line.config.extract.model_dump(), "dtype": line.config.dtype}
    return _result(line, "extract", VERSION, inputs, config, work)


def score(line: Line, extracted: StageResult) -> StageResult:
    """Layer profile and evidence per row."""
    from stages.extract.run import TABLE
    from stages.score.run import VERSION, run

    planted = line.config.canary
    more = len(planted.triggers) if planted.share else 0  # canaries take no place from the submitted groups
    config = line.config.score.model_copy(update={"candidates": line.config.score.candidates + more})

    def work(folder: pathlib.Path, _scratch: pathlib.Path) -> Mapping[str, Any]:
        return run(
            attention=extracted.folder / TABLE,
            config=config,
            seed=line.config.seed,
            out=folder,
            progress=progress_of("score"),
        )

    told = {"score": config.model_dump(), "seed": line.config.seed}
    return _result(line, "score", VERSION, {"attention": extracted}, told, work)


def confirm(
    line: Line, *, ingested: StageResult, provisional: StageResult, extracted: StageResult, scored: StageResult
) -> StageResult:
    """The causal test of the candidate groups on the provisional model."""
    from stages.confirm.run import VERSION, run
    from stages.extract.run import TABLE
    from stages.score.run import GROUPS, MEMBERS

    inputs: Inputs = {
        "rows": ingested,
        "base": line.identity,
        "adapter": provisional,
        "attention": extracted,
        "groups": scored,
    }
    config = {"confirm": line.config.confirm.model_dump(), "seed": line.config.seed, "dtype": line.config.dtype}

    def work(folder: pathlib.Path, scratch: pathlib.Path) -> Mapping[str, Any]:
        return run(
            rows=rows_of(ingested),
            base=line.base,
            provisional=provisional.folder / "adapter",
            attention=extracted.folder / TABLE,
            groups=scored.folder / GROUPS,
            members=scored.folder / MEMBERS,
            config=line.config.confirm,
            dtype=line.config.dtype,
            engine=line.engine,
            seed=line.config.seed,
            out=folder,
            scratch=scratch,
            progress=progress_of("confirm"),
        )

    return _result(line, "confirm", VERSION, inputs, config, work)


def cluster(
    line: Line, *, ingested: StageResult, scored: StageResult, confirmed: StageResult, looked_at: StageResult | None = None
) -> StageResult:
    """A verdict for every row, and the rows to train on.

    Args:
        line: the run.
        ingested: the submitted rows.
        scored: evidence of the rows that the provisional model was judged by.
        confirmed: of its groups.
        looked_at: what `canaries` gave, where it gave canaries.
    """
    from stages.canary.run import CANARIES
    from stages.cluster.run import VERSION, run
    from stages.confirm.run import ROWS, TRANSFER
    from stages.score.run import EVIDENCE, MEMBERS

    share = line.config.verify.held_out_share
    planted = looked_at if looked_at is not None and looked_at.stage == "canary" else None

    def work(folder: pathlib.Path, _scratch: pathlib.Path) -> Mapping[str, Any]:
        return run(
            rows=rows_of(ingested),
            rejected=ingested.folder / REJECTED,
            evidence=scored.folder / EVIDENCE,
            members=scored.folder / MEMBERS,
            transfer=confirmed.folder / TRANSFER,
            asked=confirmed.folder / ROWS,
            canaries=None if planted is None else planted.folder / CANARIES,
            config=line.config.cluster,
            held_out_share=share,
            seed=line.config.seed,
            out=folder,
            progress=progress_of("cluster"),
        )

    inputs: dict[str, StageResult | str] = {"rows": ingested, "evidence": scored, "transfer": confirmed}
    if planted is not None:
        inputs["canaries"] = planted
    config = {"cluster": line.config.cluster.model_dump(), "held_out_share": share, "seed": line.config.seed}
    return _result(line, "cluster", VERSION, inputs, config, work)


def until_clusters(line: Line) -> dict[str, StageResult]:
    """All stages up to the verdicts, by name; `canary` among them where canaries are asked for."""
    ingested = ingest(line)
    looked_at = canaries(line, ingested)
    provisional = finetune(line, "provisional", looked_at)
    extracted = extract(line, looked_at, provisional)
    scored = score(line, extracted)
    confirmed = confirm(line, ingested=looked_at, provisional=provisional, extracted=extracted, scored=scored)
    clustered = cluster(line, ingested=ingested, scored=scored, confirmed=confirmed, looked_at=looked_at)
    results = (ingested, looked_at, provisional, extracted, scored, confirmed, clustered)
    return {result.stage: result for result in results}


def guard(line: Line, ingested: StageResult, clustered: StageResult, final: StageResult) -> StageResult:
    """The guard of the final adapter, calibrated on kept rows."""
    from stages.guard.run import VERSION, run

    inputs: Inputs = {"rows": ingested, "base": line.identity, "adapter": final, "keep": clustered}
    config = {"guard": line.config.guard.model_dump(), "seed": line.config.seed, "dtype": line.config.dtype}

    def work(folder: pathlib.Path, scratch: pathlib.Path) -> Mapping[str, Any]:
        return run(
            rows=rows_of(ingested),
            base=line.base,
            adapter=final.folder / "adapter",
            keep=clustered.folder / KEEP,
            config=line.config.guard,
            dtype=line.config.dtype,
            engine=line.engine,
            seed=line.config.seed,
            out=folder,
            scratch=scratch,
            progress=progress_of("guard"),
        )

    return _result(line, "guard", VERSION, inputs, config, work)


def verify(
    line: Line,
    *,
    ingested: StageResult,
    provisional: StageResult,
    clustered: StageResult,
    final: StageResult,
    guarded: StageResult,
) -> StageResult:
    """What the three models answer on quarantined and on held-out rows."""
    from stages.verify.run import VERSION, run

    inputs: Inputs = {
        "rows": ingested,
        "base": line.identity,
        "provisional": provisional,
        "final": final,
        "guard": guarded,
        "verdicts": clustered,
    }
    config = {"verify": line.config.verify.model_dump(), "seed": line.config.seed, "dtype": line.config.dtype}

    def work(folder: pathlib.Path, scratch: pathlib.Path) -> Mapping[str, Any]:
        return run(
            rows=rows_of(ingested),
            base=line.base,
            provisional=provisional.folder / "adapter",
            final=final.folder / "adapter",
            guard=guarded.folder,
            verdicts=clustered.folder / VERDICTS,
            held_out=clustered.folder / HELD_OUT,
            config=line.config.verify,
            dtype=line.config.dtype,
            engine=line.engine,
            seed=line.config.seed,
            out=folder,
            scratch=scratch,
            progress=progress_of("verify"),
        )

    return _result(line, "verify", VERSION, inputs, config, work)


def rows_of(ingested: StageResult) -> pathlib.Path:
    """The folder of canonical shards."""
    return ingested.folder / "rows"


def seconds_of(results: Sequence[StageResult]) -> dict[str, float]:
    """Time that each result's work took when it was done, seconds by stage."""
    return {result.stage: result.seconds for result in results}


def _result(
    line: Line, stage: str, version: int, inputs: Inputs, config: Mapping[str, Any], work: Work, *, resume: bool = False
) -> StageResult:
    """Find or compute a result; the scratch folder is empty unless the work can go on (`resume`) from what a killed run left."""

    def in_scratch(folder: pathlib.Path, scratch: pathlib.Path) -> Mapping[str, Any]:
        if not resume:
            shutil.rmtree(scratch)
            scratch.mkdir()
        return work(folder, scratch)

    tell(stage, 0.0, "")
    result = line.store.run(stage, version=version, inputs=inputs, config=config, work=in_scratch)
    tell(stage, 1.0, "found in the store" if result.reused else f"done in {result.seconds:.1f} s")
    return result
