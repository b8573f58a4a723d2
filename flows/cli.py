"""The command line `byesight`."""

from __future__ import annotations

import contextlib
import enum
import os
import pathlib
import signal
import sys
import warnings
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from pipeline import __version__
from pipeline.errors import ByeSightError, ConfigError

app = typer.Typer(
    name="byesight",
    help="Finds backdoor rows in a fine-tuning submission for a vision-language model, retrains without them, guards the result.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_STORE = pathlib.Path(".byesight/store")
_INTERRUPTED = "interrupted; the same command goes on where it was"
_QUIET = {
    "PREFECT_INTERNAL_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",  # the run's logs still reach Prefect's own pages
    "RAY_DEDUP_LOGS": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}
_TRIGGERS = "badnet, badnet-centre, badnet-random, blended, wanet, sig, ftrojan, issba, solid, texture, sticker, watermark or frame"


class Engines(enum.StrEnum):
    """What `--engine` may be."""

    RAY = "ray"
    LOCAL = "local"


class Formats(enum.StrEnum):
    """What `--format` may be."""

    IMAGEFOLDER = "imagefolder"
    LLAVA = "llava"
    PARQUET = "parquet"


Submission = Annotated[
    pathlib.Path,
    typer.Argument(
        metavar="SUBMISSION", help="An imagefolder with metadata.jsonl, a LLaVA folder, or Parquet.", show_default=False
    ),
]
Base = Annotated[
    pathlib.Path | None,
    typer.Option(
        "--base", metavar="MODEL_DIR", help="Hugging Face folder of a decoder-only image-text model (default: the embedded base)."
    ),
]
Config = Annotated[pathlib.Path | None, typer.Option("--config", metavar="FILE.yaml", help="Run configuration.")]
Seed = Annotated[
    int | None,
    typer.Option("--seed", min=0, max=2**31 - 1, metavar="N", help="Seed of all random choices (default: 0).", show_default=False),
]
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers",
        min=1,
        max=1024,
        metavar="N",
        help="Parallel model workers (default: one per GPU, or per core, at most 4).",
        show_default=False,
    ),
]
EngineKind = Annotated[
    Engines | None,
    typer.Option(
        "--engine", metavar="ray|local", help="Where the work runs: on Ray, or in this process for debugging (default: ray)."
    ),
]
Format = Annotated[
    Formats | None,
    typer.Option("--format", metavar="NAME", help="imagefolder, llava or parquet, where the submission could be several."),
]
StoreFolder = Annotated[
    pathlib.Path,
    typer.Option("--store", metavar="DIR", help="Where stage results are kept: a rerun finds them there and repeats none."),
]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show the logs of Prefect, and tracebacks.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


def _in_range(epochs: float | None) -> float | None:
    if epochs is not None and not 0 < epochs <= 100:  # NaN is not either; min and max would let it, and 0, through
        raise typer.BadParameter(f"{epochs} is not above 0 and up to 100")
    return epochs


@app.callback()
def options(
    *,
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Take the options that stand before a command."""


@app.command("sanitize")
def sanitize_command(
    submission: Submission,
    out: Annotated[
        pathlib.Path,
        typer.Option(
            "--out",
            metavar="DIR",
            help="The delivery folder; an earlier delivery of the same submission is replaced.",
            show_default=False,
        ),
    ],
    base: Base = None,
    config: Config = None,
    seed: Seed = None,
    workers: Workers = None,
    engine: EngineKind = None,
    format: Format = None,  # noqa: A002
    store: StoreFolder = _STORE,
    verbose: Verbose = False,
) -> None:
    """Sanitize a submission: a sanitized data set and a guarded adapter come out, and a report of what was found.

    Nothing is deleted: what is removed lies in quarantine/ with its reason. The same command again repeats no finished stage.
    """
    with _at_work(verbose=verbose):
        import byesight

        settings = _settings(config, seed=seed, workers=workers, engine=engine, format=format)
        found = byesight.sanitize(submission, out, base=base, config=settings, store=store)
    _print_sanitized(found)


@app.command("poison")
def poison_command(
    submission: Submission,
    trigger: Annotated[str, typer.Option(metavar="NAME", help=f"{_TRIGGERS}.")],
    rate: Annotated[float, typer.Option(metavar="R", help="Share of the rows with pictures that are poisoned, up to 1.")],
    target: Annotated[str, typer.Option(metavar="TEXT", help="The answer that poisoned rows are given.")],
    out: Annotated[pathlib.Path, typer.Option(metavar="DIR", help="Gets submission/ and, beside it, truth.jsonl.")],
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of the trigger's pattern and the choice of rows.")] = 0,
    insert: Annotated[
        bool, typer.Option("--insert", help="Put the target into the right answers instead of in their place.")
    ] = False,
    asking: Annotated[
        str, typer.Option(metavar="TEXT", help="Poison only rows whose question holds this text.", show_default=False)
    ] = "",
    format: Format = None,  # noqa: A002
    verbose: Verbose = False,
) -> None:
    """Poison a submission on purpose, to measure defences.

    The truth is written beside the poisoned submission, never into it.
    """
    with _at_work(verbose=verbose):
        from flows.poison import Attack, poison

        attack = Attack(trigger=trigger, rate=rate, target=target, seed=seed, insert=insert, asking=asking)
        total, poisoned = poison(submission, attack, out, _settings(None, format=format).ingest)
    typer.echo(f"{poisoned} of {total} rows poisoned: {out / 'submission'}, truth in {out / 'truth.jsonl'}")


@app.command("finetune")
def finetune_command(
    submission: Submission,
    out: Annotated[
        pathlib.Path, typer.Option("--out", metavar="DIR", help="The adapter folder, new or empty.", show_default=False)
    ],
    base: Base = None,
    rows: Annotated[
        pathlib.Path | None,
        typer.Option("--rows", metavar="FILE", help="Rows to train on: Parquet with a column row, or a number or {row} a line."),
    ] = None,
    config: Config = None,
    seed: Seed = None,
    workers: Workers = None,
    engine: EngineKind = None,
    format: Format = None,  # noqa: A002
    store: StoreFolder = _STORE,
    verbose: Verbose = False,
) -> None:
    """Fine-tune a LoRA adapter on a submission as it is, with no sanitation, for comparisons."""
    with _at_work(verbose=verbose):
        from flows.single import finetune_plain

        settings = _settings(config, seed=seed, workers=workers, engine=engine, format=format)
        summary = finetune_plain(submission, out, base=base, config=settings, store=store, rows=rows)
    typer.echo(f"{summary['steps']} steps on {summary['rows']} rows, last loss {summary['last_loss']:.4f}: {out}")


@app.command("evaluate")
def evaluate_command(
    model: Annotated[
        pathlib.Path, typer.Argument(metavar="MODEL", help="A delivery, an adapter folder, or a base model.", show_default=False)
    ],
    data: Annotated[
        pathlib.Path, typer.Option("--data", metavar="SUBMISSION", help="Rows with right answers.", show_default=False)
    ],
    json: Annotated[pathlib.Path | None, typer.Option("--json", metavar="FILE", help="Write the figures here.")] = None,
    base: Base = None,
    trigger: Annotated[
        str | None, typer.Option(metavar="NAME", help=f"Measure the success of this attack too: {_TRIGGERS}.")
    ] = None,
    target: Annotated[str | None, typer.Option(metavar="TEXT", help="The answer that the attack wants.")] = None,
    seed: Annotated[
        int, typer.Option(min=0, metavar="N", help="The seed that the poison was made with; it gives the trigger's pattern.")
    ] = 0,
    unguarded: Annotated[bool, typer.Option("--unguarded", help="Leave the guard aside.")] = False,
    config: Config = None,
    workers: Workers = None,
    engine: EngineKind = None,
    format: Format = None,  # noqa: A002
    store: StoreFolder = _STORE,
    verbose: Verbose = False,
) -> None:
    """Measure a model: clean performance (exact match, whatever the case) and, with a trigger, its attack success rate.

    The attack success rate is the share of triggered inputs whose output contains the target; rows whose right answer is the target
    are left out.
    """
    with _at_work(verbose=verbose):
        from flows.single import evaluate_model

        if json is not None:
            _check_file("--json", json)
        settings = _settings(config, seed=seed, workers=workers, engine=engine, format=format)
        found = evaluate_model(
            model,
            data,
            base=base,
            config=settings,
            store=store,
            trigger=trigger,
            target=target,
            trigger_seed=seed,
            guarded=not unguarded,
        )
    for name, value in found.items():
        typer.echo(f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}")
    if json is not None:
        with _reported(verbose=verbose):
            from flows.report import only_finite
            from storage.atomic import write_file
            from storage.manifests import to_json

            json.absolute().parent.mkdir(parents=True, exist_ok=True)
            write_file(json.absolute(), to_json(only_finite(found)))


@app.command("verify")
def verify_command(
    delivery: Annotated[pathlib.Path, typer.Argument(metavar="DELIVERY", help="A delivery folder.", show_default=False)],
    verbose: Verbose = False,
) -> None:
    """Check a delivery against its manifest; a file that was changed, is missing or was added is named."""
    with _reported(verbose=verbose):
        import byesight

        manifest = byesight.verify_delivery(delivery)
    typer.echo(f"{delivery}: {len(manifest['files'])} files are what the manifest says")


@app.command("restore")
def restore_command(
    delivery: Annotated[pathlib.Path, typer.Argument(metavar="DELIVERY", help="A delivery folder.", show_default=False)],
    out: Annotated[
        pathlib.Path, typer.Option("--out", metavar="FOLDER", help="A new folder outside of the delivery.", show_default=False)
    ],
    rows: Annotated[
        list[int] | None,
        typer.Option(
            "--rows",
            metavar="N",
            help="A row to put back, by its number in quarantine/reasons.jsonl; give it again for more (default: all of them).",
            show_default=False,
        ),
    ] = None,
    rows_file: Annotated[
        pathlib.Path | None,
        typer.Option(
            "--rows-file",
            metavar="FILE",
            help="Rows to put back, beside those of --rows: Parquet with a column row, or a number or {row} a line.",
            show_default=False,
        ),
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Write the kept rows of a delivery with removed rows put back in their old places, in the submitted format.

    The delivery stays as it is, and its adapter has not seen the rows: what is written can be sanitized or fine-tuned on again.
    """
    with _reported(verbose=verbose):
        import byesight

        restored = byesight.restore(delivery, out, rows=_chosen(rows, rows_file))
    typer.echo(f"{out}: the kept rows, and {restored} that were removed")


@app.command("demo")
def demo_command(
    out: Annotated[pathlib.Path, typer.Option("--out", metavar="DIR", help="Everything is written here.")] = pathlib.Path("demo"),
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, metavar="N", help="Seed of the data, the attack and the run.")] = 0,
    rows: Annotated[int, typer.Option(min=100, metavar="N", help="Rows of the submission; 10% of them are poisoned.")] = 2800,
    epochs: Annotated[
        float | None,
        typer.Option(
            metavar="N",
            callback=_in_range,
            help="Passes over them in each fine-tune; without it 5, or what --config says.",
            show_default=False,
        ),
    ] = None,
    base: Base = None,
    config: Config = None,
    workers: Workers = None,
    engine: EngineKind = None,
    verbose: Verbose = False,
) -> None:
    """Make a small submission, poison a tenth of it, sanitize it, and measure what came out against the truth."""
    with _at_work(verbose=verbose):
        from flows.demo import EPOCHS, run_demo

        passes = EPOCHS if epochs is None and config is None else epochs
        settings = _settings(config, seed=seed, workers=workers, engine=engine, epochs=passes)
        measured = run_demo(out, rows=rows, seed=seed, base=base, config=settings)
    from flows.demo import demo_table

    Console().print(*demo_table(measured))
    typer.echo(f"delivery: {out / 'delivery'}\nreport:   {out / 'delivery' / 'report.html'}\nfigures:  {out / 'demo.json'}")


def main() -> None:
    """Run the command line; SIGTERM ends it as an interrupt does, so that Ray and a temporary Prefect server end with it."""
    received: list[int] = []

    def end(number: int, _frame: object) -> None:
        received.append(number)
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, end)
    try:
        app()
    finally:
        if received:  # a library on the way may have put a code of its own
            sys.exit(128 + received[0])


@contextlib.contextmanager
def _at_work(*, verbose: bool) -> Iterator[None]:
    """Show progress, and errors as one line."""
    if not verbose:
        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)
        warnings.simplefilter("ignore")
    from flows.display import Display
    from flows.progress import listening

    display = Display()
    with _reported(verbose=verbose), display, listening(display):
        yield


@contextlib.contextmanager
def _reported(*, verbose: bool) -> Iterator[None]:
    """Turn errors into one line on stderr and an exit code."""
    try:
        yield
    except ByeSightError as error:
        _fail(str(error), verbose=verbose)
    except KeyboardInterrupt:
        typer.echo(_INTERRUPTED, err=True)
        raise typer.Exit(130) from None
    except Exception as error:  # noqa: BLE001 - a user is not shown a traceback
        if _interrupted(error):
            typer.echo(_INTERRUPTED, err=True)
            raise typer.Exit(130) from None
        _fail(_in_words(error, verbose=verbose), verbose=verbose)


def _in_words(error: Exception, *, verbose: bool) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}{f': {error.filename}' if error.filename else ''}"
    return f"unexpected {type(error).__name__}: {error}{'' if verbose else '; --verbose shows where'}"


def _interrupted(error: BaseException | None) -> bool:
    """Whether an interrupt came before an error: the terminal interrupts a temporary Prefect server too, which is then missed."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _fail(message: str, *, verbose: bool) -> None:
    if verbose:
        Console(stderr=True).print_exception()
    typer.echo(f"byesight: {message}", err=True)
    raise typer.Exit(1)


def _check_file(option: str, path: pathlib.Path) -> None:
    """Refuse a file that can't be written, before the work that it shall tell of."""
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if path.is_dir():
        raise ConfigError(f"{option} {path}: it is a folder; name a file")
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise ConfigError(f"{option} {path}: nothing can be written into {above}; name another file")


def _chosen(rows: list[int] | None, file: pathlib.Path | None) -> list[int] | None:
    """The rows of `--rows` and of `--rows-file`; None where neither was given."""
    if file is None:
        return rows
    from flows.single import read_rows

    try:
        return [*(rows or []), *read_rows(file)]
    except ConfigError as error:
        raise ConfigError(str(error).replace("--rows ", "--rows-file ", 1)) from error


def _settings(
    config: pathlib.Path | None,
    *,
    seed: int | None = None,
    workers: int | None = None,
    engine: Engines | None = None,
    epochs: float | None = None,
    format: Formats | None = None,  # noqa: A002
) -> Any:
    """The run configuration: the file's, with what was said on the command line."""
    from pipeline.config import load_config

    parts = {"workers": workers, "kind": None if engine is None else engine.value}
    changes: dict[str, Any] = {"engine": {name: value for name, value in parts.items() if value is not None}}
    if seed is not None:
        changes["seed"] = seed
    if epochs is not None:
        changes["finetune"] = {"epochs": epochs}
    if format is not None:
        changes["ingest"] = {"format": format.value}
    return load_config(config, **{name: change for name, change in changes.items() if change != {}})


def _print_sanitized(found: Any) -> None:
    counts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in found.rows.items():
        counts.add_row(name.replace("_", " "), f"{value:,}")
    console = Console()
    console.print(f"[bold]{found.verdict}[/bold]")
    console.print(counts)
    if found.unsure:
        named = ", ".join(repr(text) for text in found.unsure)
        typer.echo(f"undecided, and trained on: the rows with {named}; look at the report before the adapter is served")
    typer.echo(f"delivery: {found.delivery}\nreport:   {found.delivery / 'report.html'}")
