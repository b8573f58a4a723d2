"""The confirm stage: are the shared shifts of attention causes of the shared answers?

Attention follows content: honest rows with one answer shift together too. What sets a backdoor apart is that it works anywhere.
So the picture tokens that a group's rows attend to, or what their picture tokens have in common, are planted into the pictures of
other rows, which keep their own questions, of another kind; if most of those then give the group's answer, the group is an attack.
They are planted into rows that ask the same, too: an attack may have one kind of question alone in view. But what shows the answer
in one picture may honestly show it in another there; so it takes more, and the group's own rows must answer as others do once it is
taken out of them. Words that set the group's questions apart are put into the questions of other rows, to the same end: these keep
their pictures, or get the tokens too, since a trigger may need both (`keyed`). And questions of another kind are asked about the
pictures of the group's rows, and about those of others. Where honest rows have an attack's answer, each row's pictures are asked
(`mixed`). Ours, after the causal reading that CleanSight gives attention stealing (arXiv 2603.12989, section 3).
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import math
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import ConfirmConfig
from pipeline.engine import Engine
from pipeline.models import Dtype
from pipeline.records import Message, Progress, messages_to_json, no_progress
from stages.confirm.draw import Candidate, Drawn, candidates, draw
from stages.confirm.mixed import QUESTIONS, TELLING, Mixed, judged, rows_in_doubt, write_tasks
from stages.confirm.outcome import outcome
from stages.confirm.worker import TASK, ConfirmWorker, PictureWorker
from stages.score.groups import plain_answer
from stages.score.words import holds_words, with_words
from storage.subset import Place, read_examples

VERSION = 15
TRANSFER = "transfer.json"
ROWS = "rows.parquet"
PICTURES = "pictures"
_DOUBT = 31  # stream of random numbers: what tells a group's rows apart


def run(
    *,
    rows: pathlib.Path,
    base: pathlib.Path,
    provisional: pathlib.Path,
    attention: pathlib.Path,
    groups: pathlib.Path,
    members: pathlib.Path,
    config: ConfirmConfig,
    dtype: Dtype,
    engine: Engine,
    seed: int,
    out: pathlib.Path,
    scratch: pathlib.Path,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Write what is a cause of what.

    Files: `transfer.json`, per group the share of other rows that give its answer, as they are and with what the group has;
    `rows.parquet` (`mixed.ROWS_SCHEMA`), of groups to which it transfers the rows whose answer may be an honest one.

    Args:
        rows: folder of canonical shards.
        base: folder of the base model.
        provisional: the provisional adapter.
        attention: the extract stage's table.
        groups: the score stage's candidates.
        members: their examples.
        config: number of hosts, share of tokens.
        dtype: type of the weights.
        engine: where the groups are tried.
        seed: of the draw of members and hosts.
        out: folder to write into.
        scratch: folder for the experiments' prompts and pictures.
        progress: called as groups are done.

    Returns:
        The summary: groups tried, and the largest transfers of what is planted and of pictures that are asked.
    """
    described = json.loads(groups.read_text(encoding="utf-8"))
    table = pq.read_table(attention, columns=["row", "turn", "question", "answer", "image_tokens", "layers", "top_positions"])
    table = table.filter(pa.array(table["image_tokens"].to_numpy() > 0))
    places: list[Place] = list(zip(table["row"].to_pylist(), table["turn"].to_pylist(), strict=True))
    submitted = table["answer"].to_pylist()
    questions, answers = ([plain_answer(text) for text in texts] for texts in (table["question"].to_pylist(), submitted))
    found = candidates(places, members, described)
    words = {group["group"]: group["words"]["text"] for group in described if group["words"]}
    drawn = draw(questions, answers, found, words, config.hosts, seed)
    scratch.mkdir(parents=True, exist_ok=True)
    shards = _write_tasks(table, places, rows, described, drawn, config.token_share, scratch)
    model = {"base": str(base), "adapter": str(provisional), "dtype": dtype, "max_new_tokens": config.max_new_tokens}
    arguments = {**model, "pictures": str(scratch / PICTURES), "batch_size": config.batch_size, "screen": config.screen}
    results: dict[int, list[dict[str, Any]]] = collections.defaultdict(list)
    for done, finished in enumerate(engine.map_shards(shards, ConfirmWorker, arguments, batch_rows=1) if shards else (), 1):
        for result in finished.to_pylist():
            results[result["group"]].append(result)
        progress(done / len(shards), f"{done} of {len(shards)} experiments done")
    tried = [outcome(group, results[group["group"]]) for group in described if group["group"] in results]
    doubtful = _in_doubt(questions, found, tried, seed)
    longest = {number: max((submitted[k] for k in found[number].shifted), key=len) for number in doubtful}
    asked = write_tasks(rows, places, doubtful, {group["group"]: group for group in tried}, longest, seed, scratch)
    hits: dict[tuple[int, int, int], tuple[int, int]] = {}
    at_once = max(1, config.batch_size // QUESTIONS)
    for finished in engine.map_shards(asked, PictureWorker, model, batch_rows=at_once) if asked else ():
        hits |= {(one["group"], one["row"], one["turn"]): (one["asked"], one["hits"]) for one in finished.to_pylist()}
    judgement, told = judged(hits, places, doubtful)
    for group in tried:
        group["mixed"] = told.get(group["group"])
    (out / TRANSFER).write_text(json.dumps(tried, indent=2) + "\n", encoding="utf-8")
    pq.write_table(judgement, out / ROWS, compression="zstd")
    largest = {name: max((group[name] for group in tried), default=0.0) for name in ("transfer", "pictures_transfer")}
    return {"groups": len(tried), **{f"largest_{name}": value for name, value in largest.items()}}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shown:
    """An example whose pictures lie in files: its prompt, its answer, and the names of the files."""

    prompt: tuple[Message, ...]
    answer: str
    pictures: list[str]


def _in_doubt(
    questions: Sequence[str], groups: Mapping[int, Candidate], tried: Sequence[Mapping[str, Any]], seed: int
) -> dict[int, Mixed]:
    """The groups to which an answer transfers, as far as honest rows may have it too."""
    telling = [group["group"] for group in tried if max(group["tokens_transfer"], group["pictures_transfer"]) >= TELLING]
    streams = {number: np.random.default_rng([seed, _DOUBT, number]) for number in telling}
    found = {
        number: rows_in_doubt(questions, groups[number].inside, groups[number].apart, groups[number].shifted, rng)
        for number, rng in streams.items()
    }
    return {number: mixed for number, mixed in found.items() if mixed is not None}


def _write_tasks(
    table: pa.Table,
    places: Sequence[Place],
    rows: pathlib.Path,
    described: Sequence[dict[str, Any]],
    drawn: Sequence[Drawn],
    share: float,
    scratch: pathlib.Path,
) -> list[pathlib.Path]:
    """One file per experiment with all that it needs, but for the pictures, which experiments share: a file each."""
    found = _write_pictures(rows, {places[k] for experiment in drawn for k in experiment.examples}, scratch / PICTURES)
    of_group = {group["group"]: group for group in described}
    shards = []
    for number, experiment in enumerate(drawn):
        group = of_group[experiment.group]
        hosts, sources = ([found[places[k]] for k in part] for part in (experiment.hosts, experiment.sources))
        plain, worded = [messages_to_json(host.prompt) for host in hosts], _worded(hosts, group["words"])
        asked = [tuple(found[places[k]] for k in three) for three in experiment.asked]
        asked = [three for three in asked if len({len(example.pictures) for example in three}) == 1]  # else a prompt does not fit
        task = {
            "group": group["group"],
            "text": group["text"],
            "whole": group["whole"],
            "longest": max((source.answer for source in sources), key=len),
            "alike": experiment.alike,
            "keyed": experiment.keyed,
            "source_prompts": [messages_to_json(source.prompt) for source in sources],
            "source_images": [source.pictures for source in sources],
            "source_positions": [_attended(r, group["layer"], share) for r in table.take(experiment.sources).to_pylist()],
            "host_prompts": worded if experiment.keyed else plain,
            "host_images": [host.pictures for host in hosts],
            "plain_prompts": plain if experiment.keyed else [],
            "worded_prompts": [] if experiment.keyed or not (group["words"] or {}).get("own") else worded,
            "asked_prompts": [messages_to_json(host.prompt) for _, host, _ in asked],
            "asked_images": [source.pictures for source, _, _ in asked],
            "other_images": [other.pictures for _, _, other in asked],
        }
        shards.append(scratch / f"experiment-{number:04d}.parquet")
        pq.write_table(pa.Table.from_pylist([task], schema=TASK), shards[-1])
    return shards


def _write_pictures(rows: pathlib.Path, wanted: Collection[Place], folder: pathlib.Path) -> dict[Place, Shown]:
    """Write the pictures of some examples under the names of their content; what is kept in memory is the rest."""
    folder.mkdir(exist_ok=True)
    found = {}
    for example in read_examples(rows, wanted):
        names = [hashlib.sha256(picture).hexdigest() for picture in example.images]
        for name, picture in zip(names, example.images, strict=True):
            (folder / name).write_bytes(picture)
        found[example.row, example.turn] = Shown(prompt=example.prompt, answer=example.answer, pictures=names)
    return found


def _worded(hosts: Sequence[Shown], words: dict[str, Any] | None) -> list[str]:
    """The hosts' prompts with a group's words in their questions, once; none where the group has none."""
    if words is None:
        return []
    text, at_end = words["text"], words["at_end"]
    prompts = (host.prompt if holds_words(host.prompt, text) else with_words(host.prompt, text, at_end=at_end) for host in hosts)
    return [messages_to_json(prompt) for prompt in prompts]


def _attended(record: dict[str, Any], layer: int, share: float) -> list[int]:
    """The most attended image tokens of an example in a layer, at most `share` of its image tokens."""
    per_layer = len(record["top_positions"]) // record["layers"]
    most = max(1, min(per_layer, math.ceil(share * record["image_tokens"])))
    return [p for p in record["top_positions"][layer * per_layer : layer * per_layer + most] if p >= 0]
