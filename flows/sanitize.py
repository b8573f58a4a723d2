"""The main job as a Prefect flow: a submission in, a delivery out; a task per stage, small references between them."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import logging
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast
from uuid import UUID

import prefect
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from flows import artifacts, findings, line
from flows.artifacts import Log, Outlet
from flows.engines import LazyEngine
from flows.line import STORE, Line, open_line, seconds_of
from flows.progress import listening, progress_of, tell
from flows.report import Results, report_html, report_json, report_pictures, report_values
from pipeline.config import RunConfig
from pipeline.errors import StageError
from pipeline.models import EMBEDDED_BASE, check_model_folder
from storage.delivery import check_place
from storage.formats import open_submission
from storage.store import StageResult

ENGINE_RETRIES = 1
"""Times that a stage is tried again on a new engine when the first died; the engine has restarted its workers before."""
_UPDATE_SECONDS = 2.0
_TEMPORARY_RETRIES = 1

P = ParamSpec("P")
R = TypeVar("R")
_LOG = logging.getLogger(__name__)
_FINISHED: contextvars.ContextVar[list[Sanitized]] = contextvars.ContextVar("byesight_finished")
_OUTLET: contextvars.ContextVar[Outlet] = contextvars.ContextVar("byesight_outlet", default=Outlet())  # noqa: B039 - each flow run has its own


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sanitized:
    """What a run gave.

    Attributes:
        delivery: the delivery folder.
        verdict: `poisoned`, `clean` or `inconclusive`.
        unsure: answers and phrases of the groups that are left to a person, whatever the verdict.
        rows: submitted, rejected, not_scored, kept and quarantined.
        seconds: time that each stage's work took when it was done.
        results: the committed stage results by stage name.
    """

    delivery: pathlib.Path
    verdict: str
    unsure: list[str]
    rows: dict[str, int]
    seconds: dict[str, float]
    results: dict[str, StageResult]


def run_sanitize(
    submission: pathlib.Path,
    out: pathlib.Path,
    *,
    base: pathlib.Path | None = None,
    config: RunConfig | None = None,
    store: pathlib.Path | None = None,
) -> Sanitized:
    """Check what can be checked at once, then run the flow; see `byesight.sanitize`."""
    settings = config or RunConfig()
    check_place(out, submission)
    check_model_folder((base or EMBEDDED_BASE).resolve())
    open_submission(submission, settings.ingest)
    tell("prefect", 0.0, "starting")
    finished: list[Sanitized] = []
    token = _FINISHED.set(finished)
    try:
        with _patience():
            sanitize(submission=submission, out=out, base=base, store=store, config=settings)
    except Exception as error:
        if not finished:
            raise
        _LOG.warning("the delivery is complete, but Prefect was not told: %s: %s", type(error).__name__, error)
    finally:
        _FINISHED.reset(token)
    return finished[0]


def _patience() -> contextlib.AbstractContextManager[Any]:
    """Prefect's settings for a run: a temporary server that is gone (an interrupt ends it too) is not waited for."""
    if PREFECT_API_URL.value():
        return contextlib.nullcontext()
    return temporary_settings({PREFECT_CLIENT_MAX_RETRIES: _TEMPORARY_RETRIES})


@prefect.flow(name="sanitize", persist_result=False)
def sanitize(
    submission: pathlib.Path,
    out: pathlib.Path,
    base: pathlib.Path | None = None,
    store: pathlib.Path | None = None,
    config: RunConfig = RunConfig(),  # noqa: B008 - frozen
) -> Sanitized:
    """Sanitize a submission.

    Args:
        submission: a folder, or one Parquet file.
        out: the delivery folder.
        base: folder of the base model; empty takes the embedded base.
        store: folder of the stage results; empty takes `.byesight/store`.
        config: everything else.
    """
    tell("prefect", 1.0, "ready")
    check_place(out, submission)
    _OUTLET.set(Outlet())
    with LazyEngine(config.engine) as engine:
        run = open_line(submission, base or EMBEDDED_BASE, config, store or STORE, engine)
        ingested = ingest(run)
        check_place(out, submission, _submission_digest(ingested))
        line.check_enough(ingested)
        looked_at = plant_canaries(run, ingested) if config.canary.share else ingested
        provisional = finetune_provisional(run, looked_at)
        extracted = extract(run, looked_at, provisional)
        scored = score(run, extracted)
        confirmed = confirm(run, looked_at, provisional, extracted, scored)
        clustered = cluster(run, ingested, looked_at, extracted, scored, confirmed)
        final = finetune_final(run, ingested, provisional, clustered)
        guarded = guard(run, ingested, clustered, final)
        verified = verify(run, ingested, provisional, clustered, final, guarded)
    results = Results.of(ingested, looked_at, provisional, extracted, scored, confirmed, clustered, final, guarded, verified)
    deliver(run, results, out.absolute())
    verdict = findings.read_json(clustered.folder / "result.json")
    sanitized = Sanitized(
        delivery=out.absolute(),
        verdict=verdict["verdict"],
        unsure=[group["text"] for group in verdict["unsure"]],
        rows=verdict["rows"],
        seconds=seconds_of(results.all()),
        results={result.stage: result for result in results.all()},
    )
    _FINISHED.get([]).append(sanitized)
    return sanitized


def engine_died(_task: object, _run: TaskRun, state: State[Any]) -> bool:
    """Whether a task failed because the engine's workers died; what a stage itself finds wrong is not tried again."""
    return is_engine_death(state.data)


def is_engine_death(error: object) -> bool:
    """A StageError that Ray caused."""
    return isinstance(error, StageError) and type(error.__cause__).__module__.partition(".")[0] == "ray"


def stage_task(name: str) -> Callable[[Callable[P, R]], prefect.Task[P, R]]:
    """A task whose results our own store keeps, tried again only after the engine's death."""

    def decorate(function: Callable[P, R]) -> prefect.Task[P, R]:
        return prefect.Task(
            function,
            name=name,
            cache_policy=NO_CACHE,
            retries=ENGINE_RETRIES,
            retry_condition_fn=engine_died,
            persist_result=False,
        )

    return decorate


@stage_task("ingest")
def ingest(run: Line) -> StageResult:
    """Read the submission."""
    return _perform(run, "ingest", lambda: line.ingest(run))


@stage_task("canary")
def plant_canaries(run: Line, ingested: StageResult) -> StageResult:
    """Put rows of our own beside the submitted ones."""
    return _perform(run, "canary", lambda: line.canaries(run, ingested))


@stage_task("provisional")
def finetune_provisional(run: Line, ingested: StageResult) -> StageResult:
    """Fine-tune on everything."""
    return _perform(run, "provisional", lambda: line.finetune(run, "provisional", ingested))


@stage_task("extract")
def extract(run: Line, ingested: StageResult, provisional: StageResult) -> StageResult:
    """Record the attention."""
    return _perform(run, "extract", lambda: line.extract(run, ingested, provisional))


@stage_task("score")
def score(run: Line, extracted: StageResult) -> StageResult:
    """Find the evidence."""
    return _perform(run, "score", lambda: line.score(run, extracted))


@stage_task("confirm")
def confirm(run: Line, ingested: StageResult, provisional: StageResult, extracted: StageResult, scored: StageResult) -> StageResult:
    """Test the candidate groups."""
    return _perform(
        run,
        "confirm",
        lambda: line.confirm(run, ingested=ingested, provisional=provisional, extracted=extracted, scored=scored),
    )


@stage_task("cluster")
def cluster(
    run: Line,
    ingested: StageResult,
    looked_at: StageResult,
    extracted: StageResult,
    scored: StageResult,
    confirmed: StageResult,
) -> StageResult:
    """Decide on every row."""
    result = _perform(
        run,
        "cluster",
        lambda: line.cluster(run, ingested=ingested, scored=scored, confirmed=confirmed, looked_at=looked_at),
    )
    sources = findings.Sources(
        ingested=ingested.folder,
        extracted=extracted.folder,
        scored=scored.folder,
        confirmed=confirmed.folder,
        clustered=result.folder,
    )

    def suspects() -> str:
        quarantined = findings.read_json(result.folder / "result.json")["rows"]["quarantined"]
        return artifacts.suspects_markdown(findings.read_suspects(sources), quarantined)

    _OUTLET.get().publish("quarantine", suspects, _log())
    return result


@stage_task("final")
def finetune_final(run: Line, ingested: StageResult, provisional: StageResult, clustered: StageResult) -> StageResult:
    """Fine-tune on the kept rows, if any were removed."""
    return _perform(run, "final", lambda: line.final(run, ingested=ingested, provisional=provisional, clustered=clustered))


@stage_task("guard")
def guard(run: Line, ingested: StageResult, clustered: StageResult, final: StageResult) -> StageResult:
    """Calibrate the guard."""
    return _perform(run, "guard", lambda: line.guard(run, ingested, clustered, final))


@stage_task("verify")
def verify(
    run: Line, ingested: StageResult, provisional: StageResult, clustered: StageResult, final: StageResult, guarded: StageResult
) -> StageResult:
    """Try the delivery before it leaves."""
    return _perform(
        run,
        "verify",
        lambda: line.verify(run, ingested=ingested, provisional=provisional, clustered=clustered, final=final, guarded=guarded),
    )


@stage_task("delivery")
def deliver(run: Line, results: Results, out: pathlib.Path) -> dict[str, Any]:
    """Write the delivery folder."""
    log = _log()
    tell("delivery", 0.0, "")
    started = time.monotonic()
    summary = deliver_results(run, results, out)
    tell("delivery", 1.0, f"done in {time.monotonic() - started:.1f} s")
    log.info("delivery: %s", summary)
    _OUTLET.get().publish("delivery", lambda: artifacts.delivery_markdown(out, summary), log)
    return summary


def deliver_results(run: Line, results: Results, out: pathlib.Path) -> dict[str, Any]:
    """Put the adapter and its guard together, write the report, and commit the delivery."""
    from stages.delivery.run import run as commit
    from stages.guard.files import GUARD, GUARD_TENSORS

    values = report_values(run, results)
    with tempfile.TemporaryDirectory(prefix="byesight-") as name:
        adapter = pathlib.Path(name) / "adapter"
        adapter.mkdir()
        sources = sorted((results.final.folder / "adapter").iterdir())
        sources += [results.guard.folder / GUARD, results.guard.folder / GUARD_TENSORS]
        for source in sources:
            (adapter / source.name).write_bytes(source.read_bytes())
        return commit(
            submission=run.submission,
            config=run.config.ingest,
            verdicts=results.cluster.folder / "verdicts.parquet",
            adapter=adapter,
            report_html=report_html(values, report_pictures(run, results)),
            report_json=report_json(values),
            facts={name: values[name] for name in ("verdict", "base", "configuration", "digests", "seeds", "versions")},
            out=out,
            digest=_submission_digest(results.ingest),
            progress=progress_of("delivery"),
        )


def _perform(run: Line, stage: str, work: Callable[[], StageResult]) -> StageResult:
    """Do a stage's work inside its task: progress and artifacts to Prefect, a new engine after a death."""
    log = _log()
    with listening(_PrefectProgress(stage, log)):
        try:
            result = work()
        except StageError as error:
            if is_engine_death(error) and isinstance(run.engine, LazyEngine):
                run.engine.close()
            raise
    log.info("%s: %s in %.1f s: %s", stage, "found" if result.reused else "done", result.seconds, result.summary)
    for key, build in artifacts.builders(stage, result, run.config).items():
        _OUTLET.get().publish(key, build, log)
    return result


class _PrefectProgress:
    """Shows a stage's progress as an artifact of its task run, and in its log."""

    def __init__(self, stage: str, log: Log) -> None:
        self._stage = stage
        self._log = log
        self._artifact: UUID | None = None
        self._last = 0.0

    def __call__(self, stage: str, share: float, text: str) -> None:
        now = time.monotonic()
        if stage != self._stage or (share < 1 and now - self._last < _UPDATE_SECONDS):
            return
        self._last = now
        if text:
            self._log.info("%s: %3.0f%% %s", stage, 100 * share, text)
        self._artifact = _OUTLET.get().attempt("the progress", lambda: self._shown(100 * share, text or None), self._log)

    def _shown(self, percent: float, text: str | None) -> UUID:
        if self._artifact is None:
            return cast("UUID", create_progress_artifact(progress=percent, key=f"{self._stage}-progress", description=text))
        update_progress_artifact(self._artifact, progress=percent, description=text)
        return self._artifact


def _submission_digest(ingested: StageResult) -> str | None:
    """What the submission's files hashed to when they were read."""
    manifest = findings.read_json(ingested.folder / "manifest.json")
    digest: str | None = manifest["inputs"].get("submission")
    return digest


def _log() -> Log:
    """The run's logger; a plain one outside of a run."""
    with contextlib.suppress(prefect.exceptions.MissingContextError):
        return prefect.get_run_logger()
    return _LOG
