"""The confirm stage: are the shared shifts of attention causes of the shared answers?

Attention follows content: honest rows with one answer shift together too. What sets a backdoor apart is that it works anywhere.
So the picture tokens that a group's rows attend to, or what their picture tokens have in common, are planted into the pictures of
other rows, which keep their own questions, of another kind; if most of those then give the group's answer, the group is an attack.
Where all ask one kind of question, or nobody knows, what shows the answer in one picture may honestly show it in another: there it
takes more, and the group's own rows must answer as others do once it is taken out of them. Words that set
the group's questions apart are put into the questions of other rows, which keep their pictures, to the same end; and questions of
another kind are asked about the pictures of the group's rows, and about those of others. Ours, after the causal reading that
CleanSight gives attention stealing (arXiv 2603.12989, section 3).
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import ConfirmConfig
from pipeline.engine import Engine
from pipeline.models import Dtype
from pipeline.records import Example, Progress, examples_of, messages_to_json, no_progress
from stages.confirm.asking import questions_to_ask
from stages.confirm.worker import TASK, ConfirmWorker
from stages.score.groups import plain_answer
from stages.score.words import with_words
from storage.subset import read_rows

VERSION = 8
TRANSFER = "transfer.json"
LEAST_HOSTS = 8
"""Hosts that must not give a group's answer anyway; on fewer nothing can be seen."""
LEAST_QUESTIONS = 32
"""The same of questions of another kind: a smaller share of them tells, so chance must weigh less."""
HONEST = 0.4
"""Share of rows that ask the same which an honest group may change: counted is what is beyond it."""
Place = tuple[int, int]
"""Row and turn of an example."""


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
    """Write `transfer.json`: per group the share of other rows that give its answer, as they are and with what the group has.

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
        scratch: folder for the experiments' prompts.
        progress: called as groups are done.

    Returns:
        The summary: groups tried, and the largest transfers of what is planted and of pictures that are asked.
    """
    described = json.loads(groups.read_text(encoding="utf-8"))
    table = pq.read_table(attention, columns=["row", "turn", "question", "answer", "image_tokens", "layers", "top_positions"])
    table = table.filter(pa.array(table["image_tokens"].to_numpy() > 0))
    drawn = _draw(table, members, described, config.hosts, seed)
    scratch.mkdir(parents=True, exist_ok=True)
    shards = _write_tasks(table, rows, described, drawn, config.token_share, scratch)
    arguments = {
        "base": str(base),
        "adapter": str(provisional),
        "dtype": dtype,
        "batch_size": config.batch_size,
        "max_new_tokens": config.max_new_tokens,
        "screen": config.screen,
    }
    results: dict[int, dict[str, Any]] = {}
    for finished in engine.map_shards(shards, ConfirmWorker, arguments, batch_rows=1) if shards else ():
        results |= {result["group"]: result for result in finished.to_pylist()}
        progress(len(results) / len(shards), f"{len(results)} of {len(shards)} groups tried")
    tried = [
        {**group, **results[group["group"]], "alike": drawn[group["group"]].alike}
        for group in described
        if group["group"] in results
    ]
    for group in tried:
        group.update(_planted(group))
        group["words_transfer"] = transfer(group["own"], group["worded"], group["hosts"])
        group["pictures_transfer"] = transfer(group["others"], group["asked"], group["questions"], least=LEAST_QUESTIONS)
        group["transfer"] = max(group["tokens_transfer"], group["words_transfer"])
    (out / TRANSFER).write_text(json.dumps(tried, indent=2) + "\n", encoding="utf-8")
    largest = {name: max((group[name] for group in tried), default=0.0) for name in ("transfer", "pictures_transfer")}
    return {"groups": len(tried), **{f"largest_{name}": value for name, value in largest.items()}}


def transfer(own: float, planted: float, hosts: int, *, least: int = LEAST_HOSTS) -> float:
    """Share of the hosts that take over the answer, of those that do not give it anyway; 0 to 1, and 0 where these are too few.

    Args:
        own: share of the hosts that give the answer as they are.
        planted: share that give it with the group's tokens planted.
        hosts: their number.
        least: fewest hosts that do not give it anyway.
    """
    return max(0.0, planted - own) / (1 - own) if (1 - own) * hosts >= least - 0.5 else 0.0


def _planted(group: dict[str, Any]) -> dict[str, Any]:
    """Of the two ways to plant the one that tells more: what it takes over, its reversal, and what that is worth."""
    ways = []
    for name in ("attended", "residual"):
        taken_over, reversal = transfer(group["own"], group[name], group["hosts"]), group[f"{name}_reversed"]
        worth = beyond_honest(taken_over, reversal) if group["alike"] else taken_over
        ways.append({"taken_over": taken_over, "reversed": reversal, "tokens_transfer": worth})
    return max(ways, key=lambda way: (way["tokens_transfer"], way["taken_over"]))


def beyond_honest(taken_over: float, reversal: float | None) -> float:
    """What a transfer to rows that ask the same is worth: the lesser of it and of its reversal, as far as it is beyond `HONEST`.

    A reversal that can't be told counts as whole; the cluster stage leaves such a group to a person.
    """
    return max(0.0, min(taken_over, 1.0 if reversal is None else reversal) - HONEST) / (1 - HONEST)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawn:
    """The examples of one group's experiment, as positions in the attention table.

    Attributes:
        hosts: examples outside of the group.
        sources: as many of its shifted members.
        alike: whether hosts may ask what the group's rows ask; else each asks something of another kind than its source.
        asked: a shifted member, whose picture is asked about; an example outside of the group, whose question is put; and another
            one that asks as the member does, about whose picture it is put to compare.
    """

    hosts: list[int]
    sources: list[int]
    alike: bool
    asked: list[tuple[int, int, int]]

    @property
    def examples(self) -> set[int]:
        """All of them."""
        return {*self.hosts, *self.sources, *(k for three in self.asked for k in three)}


def _draw(table: pa.Table, members: pathlib.Path, described: Sequence[dict[str, Any]], most: int, seed: int) -> dict[int, Drawn]:
    """Per group what is tried on what; groups without a shifted member, or with all rows, are left out.

    No row with the text of a group is a host of it, also where the group is but a part of these rows.
    """
    rows = table["row"].to_numpy()
    index = {place: k for k, place in enumerate(_places(table))}
    questions, answers = ([plain_answer(text) for text in table[name].to_pylist()] for name in ("question", "answer"))
    texts = {group["group"]: (group["text"], group["whole"]) for group in described}
    inside: dict[tuple[str, bool], set[int]] = collections.defaultdict(set)
    shifted: dict[int, list[int]] = collections.defaultdict(list)
    for member in pq.read_table(members).to_pylist():
        if (text := texts.get(member["group"])) is None:
            continue
        inside[text].add(member["row"])
        if member["posterior"] > 0.5:
            shifted[member["group"]].append(index[member["row"], member["turn"]])
    drawn = {}
    for number, text in texts.items():
        rng = np.random.default_rng([seed, 19, number])
        own, of_group = shifted[number], np.isin(rows, sorted(inside[text]))
        outside = np.flatnonzero(~of_group)
        if own and len(outside):
            asked = questions_to_ask(questions, answers, of_group, np.asarray(own), most=most, rng=rng)
            if alike := len(asked) < min(LEAST_QUESTIONS, most):
                hosts = rng.choice(outside, size=min(most, len(outside)), replace=False).tolist()
                sources = rng.choice(own, size=len(hosts), replace=len(own) < len(hosts)).tolist()
            else:
                sources, hosts = [source for source, _, _ in asked], [host for _, host, _ in asked]
            drawn[number] = Drawn(hosts=hosts, sources=sources, alike=alike, asked=asked)
    return drawn


def _write_tasks(
    table: pa.Table,
    rows: pathlib.Path,
    described: Sequence[dict[str, Any]],
    drawn: dict[int, Drawn],
    share: float,
    scratch: pathlib.Path,
) -> list[pathlib.Path]:
    """One file per drawn group with all that its experiment needs."""
    places = _places(table)
    found = _examples(rows, {places[k] for experiment in drawn.values() for k in experiment.examples})
    shards = []
    for group in described:
        if group["group"] not in drawn:
            continue
        experiment = drawn[group["group"]]
        hosts, sources = ([found[places[k]] for k in part] for part in (experiment.hosts, experiment.sources))
        asked = [tuple(found[places[k]] for k in three) for three in experiment.asked]
        asked = [three for three in asked if len({len(example.images) for example in three}) == 1]  # else a prompt does not fit
        task = {
            "group": group["group"],
            "text": group["text"],
            "whole": group["whole"],
            "alike": experiment.alike,
            "source_prompts": [messages_to_json(source.prompt) for source in sources],
            "source_images": [list(source.images) for source in sources],
            "source_positions": [_attended(r, group["layer"], share) for r in table.take(experiment.sources).to_pylist()],
            "host_prompts": [messages_to_json(host.prompt) for host in hosts],
            "host_images": [list(host.images) for host in hosts],
            "worded_prompts": _worded(hosts, group["words"]),
            "asked_prompts": [messages_to_json(host.prompt) for _, host, _ in asked],
            "asked_images": [list(source.images) for source, _, _ in asked],
            "other_images": [list(other.images) for _, _, other in asked],
        }
        shards.append(scratch / f"group-{group['group']:04d}.parquet")
        pq.write_table(pa.Table.from_pylist([task], schema=TASK), shards[-1])
    return shards


def _worded(hosts: Sequence[Example], words: dict[str, Any] | None) -> list[str]:
    """The hosts' prompts with a group's words in their questions; none where the group has none."""
    if words is None:
        return []
    return [messages_to_json(with_words(host.prompt, words["text"], at_end=words["at_end"])) for host in hosts]


def _places(table: pa.Table) -> list[Place]:
    return list(zip(table["row"].to_pylist(), table["turn"].to_pylist(), strict=True))


def _attended(record: dict[str, Any], layer: int, share: float) -> list[int]:
    """The most attended image tokens of an example in a layer, at most `share` of its image tokens."""
    per_layer = len(record["top_positions"]) // record["layers"]
    most = max(1, min(per_layer, math.ceil(share * record["image_tokens"])))
    return [p for p in record["top_positions"][layer * per_layer : layer * per_layer + most] if p >= 0]


def _examples(rows: pathlib.Path, wanted: Iterable[Place]) -> dict[Place, Example]:
    """The wanted examples, read shard by shard."""
    places = set(wanted)
    read = (example for sample in read_rows(rows, {row for row, _ in places}) for example in examples_of(sample))
    return {place: example for example in read if (place := (example.row, example.turn)) in places}
