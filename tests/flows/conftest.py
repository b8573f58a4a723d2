"""Fixtures of the flow tests: a temporary Prefect server, a small poisoned submission, and results with hostile texts."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import pytest

from flows.demo_data import write_scenes
from flows.poison import Attack, poison
from pipeline.config import RunConfig
from tests.flows.made_results import Made, make_results

ROWS = 72
TARGET = "backdoor attack"


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    """Prefect's own temporary server and database, one for all tests."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture(scope="session")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with submission/ and truth.jsonl."""
    folder = tmp_path_factory.mktemp("data")
    write_scenes(folder / "clean", rows=ROWS, seed=0)
    poison(folder / "clean", Attack(trigger="badnet", rate=0.2, target=TARGET, seed=0), folder / "poisoned")
    return folder / "poisoned"


@pytest.fixture(scope="session")
def quick() -> RunConfig:
    """One epoch, few rows, this process."""
    return RunConfig.model_validate(
        {
            "finetune": {"epochs": 1, "batch_size": 16},
            "score": {"candidates": 2},
            "confirm": {"hosts": 16, "max_new_tokens": 2},
            "guard": {"reference_rows": 60},
            "verify": {"max_rows": 16, "max_new_tokens": 2},
            "engine": {"kind": "local", "threads": 1},
        }
    )


@pytest.fixture
def made(tmp_path: pathlib.Path) -> Made:
    """A line and its results, written by hand, with hostile texts wherever a submission's text goes."""
    return make_results(tmp_path)
