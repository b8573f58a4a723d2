"""The content-addressed store: a stage result is committed by one rename, found again by its key, checked by its hashes."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import pathlib
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pipeline.errors import IntegrityError, StageError
from storage import atomic
from storage.manifests import MANIFEST, content_digest, differences, hash_folder, to_json

_LOG = logging.getLogger(__name__)
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
_KEY_DIGITS = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageResult:
    """A small reference to a committed result.

    Attributes:
        stage: name of the stage.
        key: SHA-256 of stage, version, inputs and configuration.
        digest: SHA-256 of the files' names and contents; what the next stage's key depends on.
        folder: where the files lie.
        summary: what the stage says of its result.
        seconds: time that the work took when it was done.
        reused: True if it was found and not computed.
    """

    stage: str
    key: str
    digest: str
    folder: pathlib.Path
    summary: dict[str, Any]
    seconds: float
    reused: bool


Inputs = Mapping[str, StageResult | str]
Work = Callable[[pathlib.Path, pathlib.Path], Mapping[str, Any]]
"""Writes a result's files into the first folder, with the second to work in, and returns a summary of JSON values."""


def stage_key(stage: str, *, version: int, inputs: Inputs, config: Mapping[str, Any]) -> str:
    """SHA-256 that names a result: the same stage, version, input digests and configuration give the same key."""
    content = {"stage": stage, "version": version, "inputs": _digests(inputs), "config": config}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


class Store:
    """Stage results under one root folder: `<stage>/<key>/`, with a manifest in each.

    Several drivers may share a root. They take turns at one key, so that the second finds what the first has committed; where
    locks don't work both compute, each in folders of its own, and the loser of the rename takes the winner's result.
    """

    def __init__(self, root: pathlib.Path) -> None:
        self.root = root.absolute()

    def run(self, stage: str, *, version: int, inputs: Inputs, config: Mapping[str, Any], work: Work) -> StageResult:
        """Find the committed result, or do the work and commit it.

        Args:
            stage: lower-case name.
            version: the stage's own version; a new one makes all its results new.
            inputs: results of other stages, or digests.
            config: JSON values that the result depends on.
            work: see `Work`. Its second folder outlives a failure or a killed process, for the next call to go on from, and goes
                at the commit; where locks don't work it is new, and gone afterwards.

        Raises:
            StageError: the store can't be written, or the summary isn't JSON. Whatever `work` raises passes through.
        """
        if not _NAME.fullmatch(stage):
            raise StageError(f"{stage!r}: a stage's name is lower-case letters, digits and dashes")
        key = stage_key(stage, version=version, inputs=inputs, config=config)
        with atomic.lock(self.root / ".locks" / _place(stage, key), wait=True, create=True) as alone:
            own = _place(stage, key) if alone else f"{_place(stage, key)}-{secrets.token_hex(4)}"
            scratch = self.root / ".scratch" / own
            result = self._find(stage, key)
            if result is None:
                facts = {"stage": stage, "version": version, "key": key, "inputs": _digests(inputs), "config": dict(config)}
                try:
                    with self._working(stage, key, scratch) as folder:
                        result = _compute(folder, scratch, self._final(stage, key), facts, work) or self._winner(stage, key)
                finally:
                    if not alone:
                        shutil.rmtree(scratch, ignore_errors=True)
            shutil.rmtree(scratch, ignore_errors=True)
            return result

    @contextlib.contextmanager
    def _working(self, stage: str, key: str, scratch: pathlib.Path) -> Iterator[pathlib.Path]:
        with contextlib.ExitStack() as stack:
            try:
                self._final(stage, key).parent.mkdir(parents=True, exist_ok=True)
                scratch.mkdir(parents=True, exist_ok=True)
                folder = stack.enter_context(atomic.staging(self.root / ".working", _place(stage, key) + "-"))
            except OSError as error:
                raise StageError(f"{self.root}: results can't be stored here: {error.strerror}") from error
            yield folder

    def _final(self, stage: str, key: str) -> pathlib.Path:
        return self.root / stage / key[:_KEY_DIGITS]

    def _find(self, stage: str, key: str) -> StageResult | None:
        folder = self._final(stage, key)
        if not folder.is_dir():
            return None
        try:
            manifest = _read_manifest(folder)
            if manifest["key"] != key:
                raise IntegrityError(f"{MANIFEST} has another key")  # noqa: TRY301
        except IntegrityError as error:
            aside = self.root / ".damaged" / f"{_place(stage, key)}-{secrets.token_hex(4)}"
            _LOG.warning("%s: a stored result is damaged (%s); it is kept as %s and computed again", stage, error, aside.name)
            try:
                aside.parent.mkdir(parents=True, exist_ok=True)
                folder.rename(aside)
            except OSError as failure:
                raise StageError(f"{stage}: its stored result is damaged and can't be moved aside: {failure.strerror}") from failure
            return None
        return _result(manifest, folder, reused=True)

    def _winner(self, stage: str, key: str) -> StageResult:
        found = self._find(stage, key)
        if found is None:
            raise IntegrityError(f"{stage}: another driver committed a damaged result; run again")
        return found


def _compute(
    folder: pathlib.Path, scratch: pathlib.Path, final: pathlib.Path, facts: Mapping[str, Any], work: Work
) -> StageResult | None:
    """Do the work and commit it; None if another driver's result already lies there."""
    started = time.monotonic()
    summary = dict(work(folder, scratch))
    seconds = round(time.monotonic() - started, 3)
    files = hash_folder(folder)
    manifest = {**facts, "files": files, "digest": content_digest(files), "summary": summary, "seconds": seconds}
    try:
        content = to_json(manifest)
    except (TypeError, ValueError) as error:
        raise StageError(f"{facts['stage']}: its summary can't be written as JSON: {error}") from error
    try:
        (folder / MANIFEST).write_bytes(content)
        if not atomic.commit_folder(folder, final):
            return None
    except OSError as error:
        raise StageError(f"{facts['stage']}: its result can't be committed: {error.strerror}") from error
    return _result(json.loads(content), final, reused=False)


def _read_manifest(folder: pathlib.Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes())
        problems = differences(folder, manifest["files"])
        if content_digest(manifest["files"]) != manifest["digest"]:
            problems.append(f"changed: {MANIFEST}")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise IntegrityError(f"{MANIFEST} can't be read: {type(error).__name__}") from error
    if problems:
        raise IntegrityError("; ".join(problems[:10]))
    return manifest


def _result(manifest: Mapping[str, Any], folder: pathlib.Path, *, reused: bool) -> StageResult:
    values = {name: manifest[name] for name in ("stage", "key", "digest", "summary", "seconds")}
    return StageResult(folder=folder, reused=reused, **values)


def _digests(inputs: Inputs) -> dict[str, str]:
    return {name: value if isinstance(value, str) else value.digest for name, value in inputs.items()}


def _place(stage: str, key: str) -> str:
    return f"{stage}-{key[:_KEY_DIGITS]}"
