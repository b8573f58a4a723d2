"""The bench: `python -m benchmarks run SUITE --seeds 5 --out DIR`."""

from __future__ import annotations

import argparse
import pathlib
import shlex
import sys

from benchmarks.bench import Setting, Suite, run_suite, take_over, write_results
from benchmarks.suites import SUITES
from pipeline.errors import ConfigError
from pipeline.models import EMBEDDED_BASE

_NO_MATTER = ("--docs", "--known", "--notes", "--workers")
"""Options that change no figure."""


def main() -> None:
    """Measure a suite's missing cells and write its tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure what is missing, then write the tables")
    report = commands.add_parser("report", help="write the tables of what was measured")
    for command in (run, report):
        command.add_argument("suite", choices=sorted(SUITES))
        command.add_argument("--out", type=pathlib.Path, required=True, help="folder of the results")
        command.add_argument("--docs", type=pathlib.Path, default=None, help="write tables and records there too (docs/results)")
        command.add_argument("--notes", type=pathlib.Path, default=None, help="Markdown to put after the tables (docs/findings)")
        command.add_argument("--known", type=pathlib.Path, help="a SUITE.parquet of docs/results whose records are not made again")
    run.add_argument("--seeds", type=int, default=5, help="number of seeds, from --first-seed on")
    run.add_argument("--first-seed", type=int, default=0)
    run.add_argument("--workers", type=int, default=2, help="cells at a time; each takes one core (cost: always one)")
    run.add_argument("--data", default="demo", help="a name of `benchmarks.data`, or an imagefolder with splits train and test")
    run.add_argument("--base", type=pathlib.Path, default=EMBEDDED_BASE)
    run.add_argument("--rows", type=int, default=None, help="rows of a submission; each suite has its own default")
    run.add_argument("--test-rows", type=int, default=None)
    run.add_argument("--epochs", type=int, default=None)
    run.add_argument("--quick", action="store_true", help="everything in miniature")
    run.add_argument(
        "--only", action="append", default=[], metavar="FIELD=VALUE", help="cells or records of this value; repeatable"
    )
    args = parser.parse_args()
    suite = SUITES[args.suite]
    failed: list[str] = []
    try:
        if args.known:
            print(f"{take_over(suite, args.known, args.out)} cells taken over", flush=True)
        if args.command == "run":
            failed = measure(suite, args)
    except ConfigError as error:
        parser.error(str(error))
    print(write_results(suite, args.out, args.docs, args.notes))
    if failed:
        sys.exit("\n".join(failed))


def measure(suite: Suite, args: argparse.Namespace) -> list[str]:
    """Make the missing records of the cells that are asked for; the cells that failed."""
    small = args.quick
    setting = Setting(
        out=args.out,
        base=args.base,
        data=args.data,
        rows=args.rows or (min(120, suite.rows) if small else suite.rows),
        test_rows=args.test_rows or (16 if small else 300),
        epochs=args.epochs or (1 if small else 5),
        quick=small,
    )
    wanted: dict[str, set[str]] = {}
    for text in args.only:
        field, _, value = text.partition("=")
        wanted.setdefault(field, set()).add(value)
    keys = tuple(wanted.pop(suite.key, ()))
    cells = [
        cell
        for cell in suite.grid(setting, range(args.first_seed, args.first_seed + args.seeds))
        if all(str(cell.fields.get(field)) in values for field, values in wanted.items())
    ]
    return run_suite(suite, setting, cells, workers=args.workers, only=keys, command=told(sys.argv[1:]))


def told(arguments: list[str]) -> str:
    """The command as another machine can repeat it: without this one's folder and what changes no figure."""
    told, given = [], iter(arguments)
    for argument in given:
        option, _, value = argument.partition("=")
        if option not in ("--out", *_NO_MATTER):
            told.append(argument)
            continue
        if not value:
            next(given)
        if option == "--out":
            told += ["--out", "DIR"]
    return shlex.join(["python", "-m", "benchmarks", *told])


if __name__ == "__main__":
    main()
