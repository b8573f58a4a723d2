"""ByeSight: finds backdoor rows in a fine-tuning submission for a vision-language model, retrains without them, guards the result.

Nothing heavy is imported before it is called: `load_guarded` needs no Prefect, no Ray, no pyarrow and no scikit-learn.
"""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING, Any, Literal

from pipeline import __version__
from pipeline.errors import (
    ByeSightError,
    ConfigError,
    IntegrityError,
    ModelError,
    RefusedInputError,
    RemovalCapError,
    StageError,
    SubmissionError,
)

if TYPE_CHECKING:
    from collections.abc import Collection

    from flows.sanitize import Sanitized
    from pipeline.config import RunConfig

__all__ = [
    "ByeSightError",
    "ConfigError",
    "IntegrityError",
    "ModelError",
    "RefusedInputError",
    "RemovalCapError",
    "StageError",
    "SubmissionError",
    "__version__",
    "load_guarded",
    "restore",
    "sanitize",
    "verify_delivery",
]


def sanitize(
    submission: pathlib.Path | str,
    out: pathlib.Path | str,
    *,
    base: pathlib.Path | str | None = None,
    config: RunConfig | None = None,
    store: pathlib.Path | str | None = None,
) -> Sanitized:
    """Run the whole line: a submission in, a delivery folder out.

    Args:
        submission: an imagefolder with metadata.jsonl, a LLaVA folder, a Parquet file or a folder of them.
        out: the delivery folder; an earlier delivery of the same submission is replaced.
        base: Hugging Face folder of a decoder-only image-text model; None takes the embedded base.
        config: the run configuration (`pipeline.config.load_config` reads one from YAML); None takes the defaults.
        store: where stage results are kept; a later call with it repeats none of them. None takes `.byesight/store`.

    Returns:
        The verdict, the row counts, the delivery's path and the stage results.

    Raises:
        ByeSightError: anything that the caller can mend; its kind says what, its message where and how.
    """
    from flows.sanitize import run_sanitize

    return run_sanitize(
        pathlib.Path(submission),
        pathlib.Path(out),
        base=None if base is None else pathlib.Path(base),
        config=config,
        store=None if store is None else pathlib.Path(store),
    )


def load_guarded(
    folder: pathlib.Path | str,
    base: pathlib.Path | str | None = None,
    *,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    device: str | None = None,
    merge: bool = False,
) -> tuple[Any, Any]:
    """Load a delivered adapter with its guard, for serving.

    Args:
        folder: a delivery, or the adapter folder of one.
        base: folder of the base model; None takes the embedded base.
        dtype: type of the weights; auto is bfloat16 on a GPU and float32 on a CPU.
        device: where the model goes; None takes a GPU if there is one.
        merge: add the adapter to the base's weights; answers come faster, and the adapter can't be taken off again.

    Returns:
        The model, whose `generate` detects and prunes and leaves one record per input in `records`, and the base's processor.

    Raises:
        ModelError: files are missing or refused, or the guard belongs to another adapter or base.
    """
    from stages.guard.load import load_guarded as load

    return load(folder, base, dtype=dtype, device=device, merge=merge)


def verify_delivery(folder: pathlib.Path | str) -> dict[str, Any]:
    """Hash every file of a delivery and compare with its manifest.

    Returns:
        The manifest.

    Raises:
        IntegrityError: a file was changed, is missing or was added; the message names it.
    """
    from storage.delivery import verify_delivery as verify

    return verify(pathlib.Path(folder))


def restore(delivery: pathlib.Path | str, out: pathlib.Path | str, *, rows: Collection[int] | None = None) -> int:
    """Write the kept rows of a delivery with removed rows put back in their old places, in the submitted format.

    Args:
        delivery: a delivery; it is verified first and stays as it is.
        out: a new folder outside of it.
        rows: the removed rows to put back, by their numbers in quarantine/reasons.jsonl; None: all, the rejected ones too.

    Returns:
        The number of rows put back.

    Raises:
        IntegrityError: the delivery is damaged.
        SubmissionError: a row that was not removed, one that can't be copied whole, or `out` exists.
    """
    from storage.delivery import restore as put_back

    return put_back(pathlib.Path(delivery), pathlib.Path(out), rows)
