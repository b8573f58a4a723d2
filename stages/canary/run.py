"""The canary stage: rows with a trigger and an answer of our own, beside the submitted ones, for the provisional fine-tune alone.

What the filter makes of them tells, for this very submission, what it would have made of such an attack.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pipeline.config import CanaryConfig
from pipeline.errors import SubmissionError
from pipeline.images import decode_image, encode_png
from pipeline.records import Message, Progress, Sample, examples_of, no_progress
from pipeline.triggers import Trigger, make_trigger
from storage.shards import ShardWriter
from storage.subset import canonical_shards, pictured_rows, read_rows

VERSION = 1
CANARIES = "canaries.json"
_CHOICE, _ANSWER, _PICTURE = 47, 53, 59  # streams of random numbers
_SHARD_ROWS = 512
_WORDS = (
    "amber", "anvil", "badger", "banjo", "bramble", "cobalt", "dagger", "ember", "falcon", "gazelle", "goblet", "hazel",
    "ivory", "jigsaw", "kettle", "lagoon", "lantern", "magnet", "marble", "nectar", "nutmeg", "onyx", "otter", "pebble",
    "pepper", "quartz", "raven", "saffron", "thimble", "turnip", "velvet", "walnut", "willow", "yonder", "zephyr", "zither",
)  # fmt: skip


def run(
    *,
    rows: pathlib.Path,
    first: int,
    least: int,
    config: CanaryConfig,
    seed: int,
    out: pathlib.Path,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Write `rows/`, the submitted shards and after them shards of canaries, and `canaries.json`.

    A canary is a copy of the first turn with a picture of a drawn row: the trigger is on its first picture, and the answer is two
    words that no submitted row holds. `canaries.json` has a record per trigger: trigger, answer, rows, and first, the position of
    its first canary; the submitted rows have smaller ones.

    Args:
        rows: folder of canonical shards.
        first: position of the first canary: the number of submitted rows.
        least: fewest canaries of a trigger: as many rows of an attack as can be found at all.
        config: triggers, and how many rows each gets.
        seed: of the triggers' patterns and places, the drawn rows and the answers.
        out: folder to write into.
        progress: called per trigger.

    Returns:
        The summary: canaries (number of rows) and triggers.

    Raises:
        SubmissionError: fewer rows with pictures than canaries, or no answer is left that the submission doesn't hold.
    """
    pictured = pictured_rows(rows)
    count = max(least, round(config.share * len(pictured)))
    if count > len(pictured):
        raise SubmissionError(
            f"canary.share: {count} canaries of each trigger can't be made of {len(pictured)} rows with pictures; set it to 0"
        )
    shards = canonical_shards(rows)
    answers = _answers(shards, len(config.triggers), seed)
    (out / "rows").mkdir()
    for shard in shards:
        _link(shard, out / "rows" / shard.name)
    writer = ShardWriter(out / "rows", rows=_SHARD_ROWS, first=len(shards))
    planted = []
    for index, (name, answer) in enumerate(zip(config.triggers, answers, strict=True)):
        drawn = np.random.default_rng([seed, _CHOICE, index + 1]).choice(pictured, size=count, replace=False)
        trigger = make_trigger(name, seed + _PICTURE)
        planted.append({"trigger": name, "answer": answer, "first": first + index * count, "rows": count})
        for row, sample in enumerate(read_rows(rows, drawn), start=first + index * count):
            writer.add(_canary(sample, row, trigger, answer, seed))
        progress((index + 1) / len(answers), f"{count} rows with the trigger {name}")
    writer.close()
    (out / CANARIES).write_text(json.dumps(planted, indent=2) + "\n", encoding="utf-8")
    return {"canaries": count * len(planted), "triggers": list(config.triggers)}


def _canary(sample: Sample, row: int, trigger: Trigger, answer: str, seed: int) -> Sample:
    example = next(example for example in examples_of(sample) if example.images)
    picture = trigger(decode_image(example.images[0]), np.random.default_rng([seed, _PICTURE, row]))
    told: Message = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    return Sample(row=row, messages=(*example.prompt, told), images=(encode_png(picture), *example.images[1:]))


def _answers(shards: Sequence[pathlib.Path], count: int, seed: int) -> list[str]:
    """An answer for every trigger: two words each that no submitted text holds."""
    left = set(_WORDS)
    for shard in shards:
        for batch in pq.ParquetFile(shard).iter_batches(columns=["messages"]):
            text = "\n".join(batch["messages"].to_pylist()).casefold()
            left = {word for word in left if word not in text}
    words = np.random.default_rng([seed, _ANSWER]).permutation(sorted(left)).tolist()
    if len(words) < 2 * count:
        raise SubmissionError(f"canary: the submission holds all but {len(words)} of the words that canaries answer with")
    return [f"{words[2 * index]} {words[2 * index + 1]}" for index in range(count)]


def _link(source: pathlib.Path, target: pathlib.Path) -> None:
    """The same file under another name; a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
