"""The engine on Ray: Ray Data streams rows through workers that hold a model, Ray Train runs the fine-tunes.

One `ray.init` per engine. Without an address Ray is started on this machine, reachable from it alone; nothing of it is left behind.
A thread of the driver that uses Ray after its shutdown would end the process on the spot, with nothing cleaned up: so a task of
Ray's drives a fine-tune, and streams of results are closed before.
"""

from __future__ import annotations

import logging
import os
import pathlib
import secrets
import shutil
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, Self

import joblib
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.config import EngineConfig
from pipeline.engine import TableWorker, TrainLoop, worker_count
from pipeline.engine.workers import DataWorker, ProgressLines, clear_records, recorded_error, run_loop, unpack
from pipeline.errors import StageError
from pipeline.records import Progress

RESTARTS = 3
"""Times that a dead worker, or a broken training run, is started again; Ray's own default is without end."""

_CPUS_PER_WORKER = 0.5  # workers that take all logical CPUs starve Ray Data's read tasks, and the job hangs
_ON_CPUS = {
    # glibc would give torch's buffers back to the system after every operation: page faults were 5 to 9% of a prefill's time
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
    # threads that spin while they wait starve the one that works: with a busy core, a training step took 2.8 s instead of 0.39 s
    "OMP_WAIT_POLICY": "PASSIVE",
}
_TRAIN_DEFAULTS = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25"}  # a report waits for the next poll, 2 s by default
_POLL_SECONDS = 0.5
_REMOVALS = 20
_BLOCKS_PER_WORKER = 64
_LONGEST_TEMPORARY = 40  # characters: Ray's sockets lie below, and a socket's path may have 107


class RayEngine:
    """Work on Ray, started on this machine or found at `config.address`. An already initialised Ray is used and left running."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self.workers, self._threads = _share(config, gpus=torch.cuda.device_count(), cores=joblib.cpu_count())
        self.temporary: pathlib.Path | None = None
        self._started = False
        self._streams: list[Generator[pa.Table]] = []

    def __enter__(self) -> Self:
        _settle_environment(local=self._config.address is None)
        import ray

        if ray.is_initialized():
            self._look_around()
            return self
        options: dict[str, Any] = {"address": self._config.address or "local"}
        if self._config.address is None:
            self.temporary = _short_temporary()
            options |= {
                "num_cpus": max(4, joblib.cpu_count(), self.workers + 2),
                "include_dashboard": False,
                "object_store_memory": self._config.object_store_bytes,
                "_temp_dir": str(self.temporary),
                "_node_ip_address": "127.0.0.1",
            }
        environment = {"OMP_NUM_THREADS": str(self._threads), "TOKENIZERS_PARALLELISM": "false"}
        environment |= {name: os.environ[name] for name in _TRAIN_DEFAULTS}
        if not torch.cuda.is_available():
            environment |= _ON_CPUS
        try:
            ray.init(**options, log_to_driver=False, logging_level="ERROR", runtime_env={"env_vars": environment})
            self._look_around()
        except Exception as error:  # that very class where a node doesn't start in time, RayError where a token is wrong
            ray.shutdown()
            self._remove_temporary()
            raise StageError(f"Ray ({self._config.address or 'on this machine'}) can't be used: {error}") from error
        except BaseException:  # a signal
            ray.shutdown()
            self._remove_temporary()
            raise
        self._started = True
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None, /) -> None:
        import ray

        for stream in self._streams:  # of a stage that was interrupted
            stream.close()
        self._streams.clear()
        if self._started:
            ray.shutdown()
            self._started = False
        self._remove_temporary()

    def map_shards(
        self, shards: Sequence[pathlib.Path], build: Callable[..., TableWorker], arguments: Mapping[str, Any], *, batch_rows: int
    ) -> Iterator[pa.Table]:
        import ray.data

        ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # errors come back as exceptions
        gpus = self._gpus()
        pieces = [
            {"shard": str(shard), "start": start}
            for shard in shards
            for start in range(0, pq.read_metadata(shard).num_rows, batch_rows)
        ]
        if not pieces:
            return
        with warnings.catch_warnings():
            # max_restarts is deprecated here, but there is no other way yet to bound the restarts of Ray Data's actors
            warnings.simplefilter("ignore", DeprecationWarning)
            results = ray.data.from_items(
                pieces, override_num_blocks=min(len(pieces), _BLOCKS_PER_WORKER * self.workers)
            ).map_batches(
                DataWorker,
                fn_constructor_args=(build, dict(arguments), batch_rows, self._threads),
                compute=ray.data.ActorPoolStrategy(size=self.workers),
                batch_size=1,
                batch_format="pyarrow",
                num_cpus=_CPUS_PER_WORKER,
                num_gpus=min(1.0, gpus / self.workers) if gpus else None,
                max_restarts=RESTARTS,
                max_task_retries=RESTARTS,
            )
        stream = iter(results.iter_batches(batch_size=None, batch_format="pyarrow"))
        self._streams.append(stream)
        try:
            for finished in stream:
                yield from unpack(finished)
        except ray.exceptions.RayError as error:
            raise _worker_died(error) from error
        finally:
            stream.close()
            if stream in self._streams:
                self._streams.remove(stream)

    def train(self, loop: TrainLoop, arguments: Mapping[str, Any], *, scratch: pathlib.Path, progress: Progress) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        gpus = self._gpus()
        workers = min(self.workers, gpus) if gpus else self.workers  # two ranks can't share a GPU
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        fit = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=here)(_fit)
        clear_records(scratch)
        with ProgressLines(scratch) as lines:
            local = self._config.address is None
            result = fit.remote(loop, dict(arguments), scratch, self._threads, workers, gpus=gpus > 0, local=local)
            running = True
            try:
                while running:
                    time.sleep(_POLL_SECONDS)  # not inside Ray's wait, which gives a signal's exit code away
                    running = not ray.wait([result], timeout=0)[0]
                    for share, text in lines.read():
                        progress(share, text)
            except BaseException:
                ray.cancel(result, force=True)  # a Ray that was there before would train on
                raise
        failure = None
        try:
            ray.get(result)
        except ray.exceptions.RayError as error:
            failure = error
        recorded = recorded_error(scratch)
        if recorded is not None:
            raise recorded from failure
        if failure is not None:
            raise _worker_died(failure) from failure

    def _look_around(self) -> None:
        """Count the cluster's GPUs and cores, which the driver's machine needn't have."""
        import ray

        if self._config.address is not None:
            found = ray.cluster_resources()
            self.workers, self._threads = _share(self._config, gpus=int(found.get("GPU", 0)), cores=int(found.get("CPU", 1)))

    def _gpus(self) -> int:
        """GPUs that the workers can use: on this machine torch must see them, on a cluster Ray says."""
        import ray

        if self._config.address is None and not torch.cuda.is_available():
            return 0
        return int(ray.cluster_resources().get("GPU", 0))

    def _remove_temporary(self) -> None:
        if self.temporary is None:
            return
        for _ in range(_REMOVALS):  # dying workers may still write their logs
            shutil.rmtree(self.temporary, ignore_errors=True)
            if not self.temporary.exists():
                break
            time.sleep(_POLL_SECONDS)
        self.temporary = None


def _fit(
    loop: TrainLoop, arguments: Mapping[str, Any], scratch: pathlib.Path, threads: int, workers: int, *, gpus: bool, local: bool
) -> None:
    """Run a training loop on Ray Train; a task of Ray's."""
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from pipeline.engine.rendezvous import FileTorchConfig

    logging.getLogger("ray.train").setLevel(logging.CRITICAL)
    TorchTrainer(
        lambda: run_loop(loop, arguments, scratch, threads, local=local),
        torch_config=FileTorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=gpus,
            resources_per_worker={"CPU": _CPUS_PER_WORKER, **({"GPU": 1} if gpus else {})},
        ),
        run_config=RunConfig(
            name="train",
            storage_path=str(scratch / "ray"),
            failure_config=FailureConfig(max_failures=RESTARTS),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    ).fit()


def _settle_environment(*, local: bool) -> None:
    """Set what Ray reads when it is imported or started, where the user has not: no usage reports; tokens and loopback here."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    for name, value in _TRAIN_DEFAULTS.items():
        os.environ.setdefault(name, value)
    if not local:  # whether it asks for a token, the cluster's owner has said
        return
    if "ray" not in sys.modules:  # an imported Ray has read it already, and would then refuse its own servers' tokens
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # for one machine Ray then keeps every port on loopback
    own_token = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
    if not own_token and not (pathlib.Path.home() / ".ray" / "auth_token").exists():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # else Ray would leave a token file in the home folder


def _share(config: EngineConfig, *, gpus: int, cores: int) -> tuple[int, int]:
    """Workers, and torch threads of each."""
    workers = worker_count(config, gpus=gpus, cores=cores)
    return workers, config.threads or max(1, cores // workers)


def _short_temporary() -> pathlib.Path:
    folder = tempfile.gettempdir()
    return pathlib.Path(tempfile.mkdtemp(prefix="bs", dir=folder if len(folder) <= _LONGEST_TEMPORARY else "/tmp"))  # noqa: S108 - mkdtemp is safe there


def _worker_died(error: BaseException) -> StageError:
    """A StageError that says in one line what Ray says in many."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return StageError(
        f"a Ray worker died {RESTARTS + 1} times ({type(error).__name__}: {lines[-1] if lines else 'no message'}); "
        "if it was killed for its memory, lower engine.workers or the batch size"
    )
