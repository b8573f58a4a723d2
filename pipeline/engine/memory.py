"""A GPU that is too small for a call of a worker, told in the words of the configuration."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from pipeline.errors import StageError


@contextlib.contextmanager
def memory_watched(build: Callable[..., Any], arguments: Mapping[str, Any], *, building: bool = False) -> Iterator[None]:
    """Run a worker, or build it.

    Args:
        build: makes the worker; the package that it lies in has the name of the stage, and so of its section of the configuration.
        arguments: what it is called with; `batch_size` among them, where the worker batches by itself.
        building: the worker is made in the block, where it loads its model, and not called.

    Raises:
        StageError: the GPU's memory was too small; names the setting to lower.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        stage, size = build.__module__.split(".")[-2:][0], arguments.get("batch_size")
        if building:
            mend = f"it can't hold what a worker of the {stage} stage loads; take a smaller base or a larger GPU"
        elif size == 1:
            mend = f"{stage}.batch_size is 1 already; take a smaller base or a larger GPU"
        else:
            mend = f"lower {stage}.batch_size" + (f" (now {size})" if size else "")
        raise StageError(f"the GPU's memory is too small: {mend}") from error
