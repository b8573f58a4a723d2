"""What runs inside Ray's workers, and how their progress and errors come back to the driver. Only `pipeline.engine.ray` uses it."""

from __future__ import annotations

import contextlib
import json
import pathlib
import re
import shutil
import traceback
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import errors
from pipeline.engine import TableWorker, TrainLoop
from pipeline.engine.memory import memory_watched
from pipeline.errors import ByeSightError, StageError

_PROGRESS = "progress.jsonl"
_ERROR = "error.json"
_LINK = re.compile(r"\b(gloo|nccl)\b|closed by peer|reset by peer", re.IGNORECASE)

RESULTS = pa.schema([("table", pa.large_binary()), ("kind", pa.string()), ("message", pa.string()), ("trace", pa.string())])
"""What a DataWorker gives per piece: the worker's table as an Arrow stream, or the kind, message and trace of its error."""


class DataWorker:
    """Ray Data's view of a TableWorker: reads the piece of a shard that it is told of; a call holds the same rows on any engine.

    Errors travel as results: Ray would wrap one of a call, and start a worker again and again that can't be built.
    """

    def __init__(self, build: Callable[..., TableWorker], arguments: Mapping[str, Any], batch_rows: int, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._build = build
        self._arguments = arguments
        self._batch_rows = batch_rows
        self._worker: TableWorker | None = None
        self._shard: tuple[str, pa.Table] | None = None

    def __call__(self, piece: pa.Table) -> pa.Table:
        """One row of `RESULTS` for one piece: `shard` (path) and `start` (row in it)."""
        try:
            result = self._work(piece.column("shard")[0].as_py(), piece.column("start")[0].as_py())
        except Exception as error:  # noqa: BLE001 - the driver raises it
            kind, message = _told(error)
            return pa.table([[None], [kind], [message], [traceback.format_exc()]], schema=RESULTS)
        return pa.table([[_to_bytes(result)], [None], [None], [None]], schema=RESULTS)

    def _work(self, path: str, start: int) -> pa.Table:
        if self._worker is None:
            with memory_watched(self._build, self._arguments, building=True):
                self._worker = self._build(**self._arguments)
        if self._shard is None or self._shard[0] != path:
            self._shard = path, pq.read_table(path)
        with memory_watched(self._build, self._arguments):
            return self._worker(self._shard[1].slice(start, self._batch_rows))


def unpack(results: pa.Table) -> Iterator[pa.Table]:
    """The workers' own tables from rows of `RESULTS`.

    Raises:
        ByeSightError: the first error among them, with the worker's traceback as a note.
    """
    for result in results.to_pylist():
        if result["kind"] is not None:
            error = own_error(result["kind"], result["message"])
            error.add_note(result["trace"])
            raise error
        with pa.ipc.open_stream(result["table"]) as stream:
            yield stream.read_all()


def _told(error: Exception) -> tuple[str, str]:
    """The kind and the message by which the driver raises an error again."""
    if isinstance(error, ByeSightError):
        return type(error).__name__, str(error)
    return "StageError", f"{type(error).__name__}: {error}"


def own_error(kind: str, message: str) -> ByeSightError:
    """An error of `pipeline.errors` by its name."""
    made: ByeSightError = getattr(errors, kind, StageError)(message)
    return made


def _to_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


class RayContext:
    """The training context of one of Ray Train's workers."""

    def __init__(self, scratch: pathlib.Path) -> None:
        import ray.train

        context = ray.train.get_context()
        self.rank = int(context.get_world_rank())
        self.world_size = int(context.get_world_size())
        self._lines = scratch / _PROGRESS

    def report(self, metrics: Mapping[str, float], checkpoint: pathlib.Path | None) -> None:
        import ray.train

        if checkpoint is None:
            ray.train.report(dict(metrics))
            return
        ray.train.report(dict(metrics), checkpoint=ray.train.Checkpoint.from_directory(str(checkpoint)))
        shutil.rmtree(checkpoint)

    @contextlib.contextmanager
    def resume_from(self) -> Iterator[pathlib.Path | None]:
        import ray.train

        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            yield None
            return
        with checkpoint.as_directory() as folder:
            yield pathlib.Path(folder)

    def progress(self, share: float, text: str) -> None:
        if self.rank == 0:
            with self._lines.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"share": share, "text": text}) + "\n")


def run_loop(loop: TrainLoop, arguments: Mapping[str, Any], scratch: pathlib.Path, threads: int, *, local: bool) -> None:
    """Run a training loop in one of Ray Train's workers.

    An error is recorded for the driver before it is raised; the workers that Ray then restarts see it and end at once. Not so one
    of Ray, or of the link to a worker that has died: after those the loop goes on from its last checkpoint.
    """
    import torch

    from pipeline.engine.rendezvous import process_group

    torch.set_num_threads(threads)
    if (scratch / _ERROR).exists():
        return
    context = RayContext(scratch)
    try:
        with process_group(scratch, local=local):
            loop(arguments, context)
    except Exception as error:
        if not _of_the_engine(error):
            kind, message = _told(error)
            record = scratch / f"{_ERROR}.{context.rank}"
            told = {"kind": kind, "message": message, "trace": traceback.format_exc()}
            record.write_text(json.dumps(told), encoding="utf-8")
            record.replace(scratch / _ERROR)
        raise


def _of_the_engine(error: Exception) -> bool:
    """Whether an error is Ray's, or says that the other workers can't be reached: gloo raises a bare RuntimeError for that."""
    import torch

    if isinstance(error, torch.distributed.DistError) or type(error).__module__.split(".")[0] == "ray":
        return True
    return isinstance(error, RuntimeError) and _LINK.search(str(error)) is not None


def clear_records(scratch: pathlib.Path) -> None:
    """Forget what an earlier run told."""
    for name in (_PROGRESS, _ERROR):
        (scratch / name).unlink(missing_ok=True)


def recorded_error(scratch: pathlib.Path) -> ByeSightError | None:
    """The error that a training loop ended with, the worker's traceback as a note."""
    if not (scratch / _ERROR).exists():
        return None
    record = json.loads((scratch / _ERROR).read_text(encoding="utf-8"))
    error = own_error(record["kind"], record["message"])
    error.add_note(record["trace"])
    return error


class ProgressLines:
    """Reads what rank 0 has written since the last look; a context manager."""

    def __init__(self, scratch: pathlib.Path) -> None:
        path = scratch / _PROGRESS
        path.touch()
        self._file = path.open(encoding="utf-8")
        self._rest = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None, /) -> None:
        self._file.close()

    def read(self) -> list[tuple[float, str]]:
        """The share done and the text of every whole new line."""
        *lines, self._rest = (self._rest + self._file.read()).split("\n")
        return [(record["share"], record["text"]) for record in map(json.loads, lines)]
