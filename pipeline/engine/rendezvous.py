"""How Ray Train's workers find each other: through a file in the scratch folder.

Ray's own torch backend opens torch's TCPStore, which listens on all interfaces and asks nobody for a token.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import socket
import tempfile
from collections.abc import Iterator

import ray.train
import ray.train.collective
import torch
from ray.train.backend import Backend
from ray.train.torch import TorchConfig


class _NoBackend(Backend):  # type: ignore[misc]
    """Sets up nothing but the visible GPUs; `process_group` does the rest inside the training function."""

    share_cuda_visible_devices = True


@dataclasses.dataclass
class FileTorchConfig(TorchConfig):  # type: ignore[misc]
    """Ray's torch configuration without its rendezvous."""

    @property
    def backend_cls(self) -> type[Backend]:
        return _NoBackend


@contextlib.contextmanager
def process_group(scratch: pathlib.Path, *, local: bool) -> Iterator[None]:
    """Join torch's process group of a training run, and the environment by which accelerate knows it; one worker needs none.

    Args:
        scratch: a folder that all workers see.
        local: all workers are on this machine and talk over its loopback interface.
    """
    context = ray.train.get_context()
    rank, world_size = int(context.get_world_rank()), int(context.get_world_size())
    if world_size == 1:
        yield
        return
    if local:
        loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if loopback else ():
            os.environ.setdefault(variable, str(loopback))
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(context.get_local_rank()),
        "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
        "MASTER_ADDR": "127.0.0.1",  # accelerate wants it set, nothing connects to it
    }
    meeting = tempfile.mkdtemp(prefix="meeting-", dir=scratch) if rank == 0 else None
    meeting = ray.train.collective.broadcast_from_rank_zero(meeting)
    store = torch.distributed.FileStore(str(pathlib.Path(meeting) / "store"), world_size)  # type: ignore[attr-defined]
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
