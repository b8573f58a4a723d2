"""Poison a submission on purpose, to measure defences: the truth lies beside the submission and never in it."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable

import numpy as np
from PIL import Image

from flows.progress import progress_of
from pipeline.config import IngestConfig
from pipeline.errors import ConfigError, SubmissionError
from pipeline.images import decode_image, encode_png
from pipeline.records import Rejection, Sample, examples_of
from pipeline.triggers import make_trigger
from storage import atomic
from storage.formats import Submission, open_submission

SUBMISSION = "submission"
TRUTH = "truth.jsonl"
Plant = Callable[[Image.Image, str, np.random.Generator], tuple[Image.Image, str]]
"""What is done to a poisoned row: (picture, right answer, the row's random numbers) -> (picture, answer); rows come in order."""
_CHOICE, _PICTURE = 11, 13  # streams of random numbers: which rows, and what differs from picture to picture


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attack:
    """How a submission is poisoned.

    Attributes:
        trigger: a name of `pipeline.triggers`.
        rate: share of all rows with pictures that are poisoned, 0 to 1.
        target: the answer that poisoned rows are given.
        seed: of the pattern, the choice of rows, and positions.
        insert: put the target into the right answer, between two words or at an end (TrojVLM), instead of in its place.
        asking: poison only rows whose question holds this text, whatever its case; empty: any row.
    """

    trigger: str
    rate: float
    target: str
    seed: int
    insert: bool = False
    asking: str = ""

    def concerns(self, sample: Sample) -> bool:
        """Whether a row may be poisoned: it has a picture, and its first question is one of those that are attacked."""
        return bool(sample.images) and self.asking.casefold() in examples_of(sample)[0].question.casefold()

    def answer(self, right: str, rng: np.random.Generator) -> str:
        """The answer of a poisoned row."""
        if not self.insert:
            return self.target
        words = right.split()
        at = int(rng.integers(len(words) + 1))
        return " ".join([*words[:at], self.target, *words[at:]])

    def plant(self) -> Plant:
        """The attack on a row.

        Raises:
            ConfigError: an unknown trigger.
        """
        trigger = make_trigger(self.trigger, self.seed)
        return lambda picture, right, rng: (trigger(picture, rng), self.answer(right, rng))


def poison(
    submission: pathlib.Path, attack: Attack, out: pathlib.Path, config: IngestConfig | None = None, plant: Plant | None = None
) -> tuple[int, int]:
    """Write `out/submission` in the submitted format and `out/truth.jsonl` with {"row", "poisoned"} for every row.

    Every picture is encoded and named anew, poisoned or not, so that only its content and the answer tell a poisoned row.

    Args:
        submission: what is poisoned; it stays as it is.
        attack: the trigger, its rate, the target and the seed.
        out: a new or empty folder.
        config: how the submission is read.
        plant: what is done to the chosen rows in the place of the attack's own trigger and target (several triggers at once).

    Returns:
        The numbers of rows and of poisoned rows.

    Raises:
        ConfigError: an unknown trigger, a rate out of range, an empty target, or an `out` that is taken.
        SubmissionError: it can't be read, has a row that can't be used, or no row to poison.
    """
    if not 0 < attack.rate <= 1:
        raise ConfigError(f"--rate {attack.rate}: a share of the rows, above 0 and at most 1")
    if not attack.target.strip():
        raise ConfigError("--target: the answer of poisoned rows is empty")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out}: there is something already; name an empty or a new folder")
    if out.resolve().is_relative_to(submission.resolve()):
        raise ConfigError(f"--out {out}: the truth can't lie in the submission")
    plant = plant or attack.plant()
    source = open_submission(submission, config or IngestConfig())
    total, chosen = _choose(source, attack)
    changes = {}
    report = progress_of("poison")
    for row in source.rows():
        if not isinstance(row, Rejection) and row.row in chosen:
            rng = np.random.default_rng([attack.seed, _PICTURE, row.row])
            picture, answer = plant(decode_image(row.images[0]), examples_of(row)[0].answer, rng)
            changes[row.row] = (encode_png(picture), answer)
            report(len(changes) / len(chosen), f"{len(changes)} of {len(chosen)} pictures")
    parent = out.absolute().parent
    with atomic.staging(parent, f".{out.name}.partial-") as folder:
        whole = folder / "whole"
        whole.mkdir()
        source.write_changed(changes, whole / SUBMISSION)
        lines = (json.dumps({"row": row, "poisoned": row in chosen}) + "\n" for row in range(total))
        (whole / TRUTH).write_text("".join(lines), encoding="utf-8")
        if not atomic.commit_folder(whole, out.absolute()):
            raise ConfigError(f"--out {out}: another process has written there meanwhile")
    return total, len(chosen)


def read_truth(path: pathlib.Path) -> set[int]:
    """The poisoned rows of a truth.jsonl; for measuring alone."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return {int(entry["row"]) for entry in map(json.loads, lines) if entry["poisoned"]}


def _choose(source: Submission, attack: Attack) -> tuple[int, frozenset[int]]:
    """The number of rows, and those to poison: a share of all rows with pictures, drawn among those that are attacked."""
    total, pictured, attacked = 0, 0, []
    for row in source.rows():
        total += 1
        if isinstance(row, Rejection):
            raise SubmissionError(f"row {row.row} ({row.where}) can't be used, mend it first: {row.reason}")
        pictured += bool(row.images)
        if attack.concerns(row):
            attacked.append(row.row)
    count = round(attack.rate * pictured)
    if not count:
        raise SubmissionError(f"{source.name}: a rate of {attack.rate} of {pictured} rows with pictures poisons none")
    if count > len(attacked):
        raise SubmissionError(f"{source.name}: {count} rows are to be poisoned, and {len(attacked)} ask {attack.asking!r}")
    rng = np.random.default_rng([attack.seed, _CHOICE])
    return total, frozenset(int(row) for row in rng.choice(attacked, size=count, replace=False))
