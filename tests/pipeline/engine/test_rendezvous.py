"""Workers of a fine-tune meet in a folder and talk over loopback alone. Two real processes; Ray's part is played."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import types
from typing import Any

import pytest
import torch
from ray.train.backend import Backend
from ray.train.torch import TorchConfig

from pipeline.engine.rendezvous import FileTorchConfig, process_group

ROOT = pathlib.Path(__file__).parents[3]
PLAY = """
import json, os, pathlib, sys, time, types
import psutil, ray.train, ray.train.collective, torch
from pipeline.engine.rendezvous import process_group

scratch = pathlib.Path(sys.argv[1])
child = os.fork()
rank = 0 if child else 1
ranks = dict(get_world_rank=rank, get_world_size=2, get_local_rank=rank, get_local_world_size=2)
context = types.SimpleNamespace(**{name: lambda value=value: value for name, value in ranks.items()})

def from_rank_zero(value):
    note = scratch / "note"
    if rank == 0:
        (scratch / "note.part").write_text(value)
        (scratch / "note.part").rename(note)
    while not note.exists():
        time.sleep(0.01)
    return note.read_text()

ray.train.get_context = lambda: context
ray.train.collective.broadcast_from_rank_zero = from_rank_zero
found = {}
try:
    with process_group(scratch, local=True):
        total = torch.tensor([rank + 1.0])
        torch.distributed.all_reduce(total)
        ports = [c.laddr.ip for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN]
        names = [*"RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_PORT GLOO_SOCKET_IFNAME".split()]
        found = {"total": total.item(), "ports": ports, "env": {name: os.environ.get(name) for name in names},
                 "rank": torch.distributed.get_rank(), "backend": torch.distributed.get_backend()}
        if rank == 1:
            raise ZeroDivisionError("a bug")
except ZeroDivisionError as error:
    found["error"] = str(error)
found["initialised"] = torch.distributed.is_initialized()
(scratch / f"found-{rank}").write_text(json.dumps(found))
os._exit(0) if not child else os.waitpid(child, 0)
"""


def test_two_workers_meet(tmp_path: pathlib.Path) -> None:
    """And part, although one of them fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME"):
        environment.pop(name, None)
    subprocess.run([sys.executable, "-c", PLAY, str(tmp_path)], cwd=ROOT, env=environment, check=True, timeout=120)
    loopback = next(name for name in os.listdir("/sys/class/net") if name.startswith("lo"))  # noqa: PTH208
    for rank in (0, 1):
        found = json.loads((tmp_path / f"found-{rank}").read_text())
        assert (found["rank"], found["total"], found["backend"]) == (rank, 3.0, "gloo")
        assert found["env"] == {
            **{name: str(rank) for name in ("RANK", "LOCAL_RANK")},
            **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), "2"),
            "MASTER_PORT": None,
            "GLOO_SOCKET_IFNAME": loopback,
        }
        assert found["ports"]
        assert all(address.removeprefix("::ffff:") in {"127.0.0.1", "::1"} for address in found["ports"])
        assert not found["initialised"], "the group outlives the block"
        assert found.get("error") == (None, "a bug")[rank]
    (meeting,) = tmp_path.glob("meeting-*")
    assert (tmp_path / "note").read_text() == str(meeting)
    assert meeting.stat().st_mode & 0o077 == 0, "others on the machine could join"


def test_one_worker_meets_nobody(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray.train

    context: Any = types.SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1)
    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    before = dict(os.environ)
    with process_group(tmp_path, local=True):
        assert not torch.distributed.is_initialized()
    assert dict(os.environ) == before
    assert list(tmp_path.iterdir()) == []


def test_rays_own_rendezvous_is_off() -> None:
    """Ray calls its backend's `on_start`, which would open a port on all interfaces."""
    backend = FileTorchConfig().backend_cls
    assert issubclass(backend, Backend)
    assert backend.on_start is Backend.on_start
    assert TorchConfig().backend_cls.on_start is not Backend.on_start
    assert backend.share_cuda_visible_devices
