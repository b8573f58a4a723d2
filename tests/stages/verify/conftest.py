"""Two adapters, a guard that flags every picture, and one that flags none."""

from __future__ import annotations

import pathlib

import pytest

from pipeline.models import base_identity
from stages.guard.files import Guard, adapter_digest, save_guard
from stages.guard.policy import Action, Policy
from tests.stages.conftest import make_adapter
from tests.stages.guard.detectors import plain_detector


@pytest.fixture(scope="session")
def other_adapter(tiny_base: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """An adapter that learnt less. Don't write into it."""
    return make_adapter(tmp_path_factory.mktemp("other"), tiny_base, seed=1, epochs=1)


def write_guard(
    folder: pathlib.Path, base: pathlib.Path, adapter: pathlib.Path | None, *, threshold: float, action: Action
) -> pathlib.Path:
    """A guard made by hand for an adapter, None for the base itself."""
    folder.mkdir()
    digest = "" if adapter is None else adapter_digest(adapter)
    save_guard(
        Guard(
            detector=plain_detector(threshold=threshold),
            policy=Policy(action=action),
            base=base_identity(base),
            adapter=digest,
            facts={},
        ),
        folder,
    )
    return folder
