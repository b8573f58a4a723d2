"""Seconds and memory of stages: of all processes, what they share once, each stage by itself."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from benchmarks.usage import Usage

MIB = 2**20
SIZE = 160


@contextlib.contextmanager
def holder(forks: int) -> Iterator[None]:
    """A process that holds `SIZE` MiB, and as many forks of it that share them."""
    script = f"""
import os, signal, sys, time
held = bytearray(os.urandom({MIB})) * {SIZE}
children = []
for _ in range({forks}):
    child = os.fork()
    if not child:
        time.sleep(60)
        os._exit(0)
    children.append(child)
print("ready", flush=True)
sys.stdin.read()
for child in children:
    os.kill(child, signal.SIGKILL)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield
        process.communicate()


@pytest.mark.parametrize("forks", [0, 3])
def test_memory_of_all_processes_and_what_they_share_once(forks: int) -> None:
    with Usage() as usage:
        with usage.stage("before"):
            pass
        with holder(forks), usage.stage("held"):
            pass
        with usage.stage("after"):
            pass
    before, held, after = (usage.stages[name].memory / MIB for name in ("before", "held", "after"))
    assert SIZE <= held - before < 1.5 * SIZE
    assert abs(after - before) < SIZE / 4


def test_a_peak_that_is_over_before_the_stage_ends_is_seen() -> None:
    with Usage(interval=0.01) as usage:
        with usage.stage("held"), holder(0):
            time.sleep(0.3)
        with usage.stage("after"):
            pass
    assert usage.stages["held"].memory - usage.stages["after"].memory >= SIZE * MIB


def test_processor_seconds_of_a_process_that_ended_within_a_stage() -> None:
    busy = "import time\nwhile time.process_time() < 1: pass\ntime.sleep(0.2)"
    with Usage(interval=0.05) as usage:
        with usage.stage("idle"):
            time.sleep(0.3)
        with usage.stage("busy"):
            subprocess.run([sys.executable, "-c", busy], check=True)
    assert usage.stages["idle"].processor < 0.3
    assert 1 <= usage.stages["busy"].processor < 1.5


def test_blocks_of_one_name_add_up() -> None:
    with Usage() as usage:
        with usage.stage("a"):
            time.sleep(0.1)
        with usage.stage("b"):
            pass
        with holder(0), usage.stage("a"):
            time.sleep(0.1)
    assert 0.2 <= usage.stages["a"].seconds < 1
    assert usage.stages["b"].seconds < 0.05
    assert usage.stages["a"].memory - usage.stages["b"].memory >= SIZE * MIB
