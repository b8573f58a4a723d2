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
from stages.confirm.asking import question_types, questions_to_ask
from stages.confirm.mixed import QUESTIONS, TELLING, Mixed, judged, rows_in_doubt, write_tasks
from stages.confirm.worker import HONEST, TASK, ConfirmWorker, PictureWorker
from stages.score.groups import plain_answer
from stages.score.words import bare_question, holds_words, with_words
from storage.subset import Place, read_examples

VERSION = 13
TRANSFER = "transfer.json"
ROWS = "rows.parquet"
PICTURES = "pictures"
LEAST_HOSTS = 8
"""Hosts that must not give a group's answer anyway; on fewer nothing can be seen."""
LEAST_QUESTIONS = 32
"""Questions of another kind that must be found, half of which must not get a group's answer anyway: a smaller share of them tells,
so chance must weigh less."""
MANY = 32
"""Fewest shifted members whose mean is nobody's picture: of fewer, what they show in one place is left in it."""
_LEAST_KEPT = 0.7
"""Least share of the other rows whose answers a group's words leave as they are, for the words to be a key: instructions do not."""
_MOST_BY_WORDS = 0.5
"""Largest share of the other rows that may give the answer by the words alone, for the loss of the tokens to tell."""
_DRAW, _DOUBT = 19, 31  # streams of random numbers: what is tried on what, and what tells a group's rows apart


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
    questions, answers = ([plain_answer(text) for text in table[name].to_pylist()] for name in ("question", "answer"))
    candidates = _candidates(places, members, described)
    words = {group["group"]: group["words"]["text"] for group in described if group["words"]}
    drawn = _draw(questions, answers, candidates, words, config.hosts, seed)
    drawn += [dataclasses.replace(one, keyed=True, asked=[]) for one in drawn if one.alike and one.group in words]
    scratch.mkdir(parents=True, exist_ok=True)
    shards = _write_tasks(table, places, rows, described, drawn, config.token_share, scratch)
    model = {"base": str(base), "adapter": str(provisional), "dtype": dtype, "max_new_tokens": config.max_new_tokens}
    arguments = {**model, "pictures": str(scratch / PICTURES), "batch_size": config.batch_size, "screen": config.screen}
    results: dict[int, list[dict[str, Any]]] = collections.defaultdict(list)
    for done, finished in enumerate(engine.map_shards(shards, ConfirmWorker, arguments, batch_rows=1) if shards else (), 1):
        for result in finished.to_pylist():
            results[result["group"]].append(result)
        progress(done / len(shards), f"{done} of {len(shards)} experiments done")
    tried = [_outcome(group, results[group["group"]]) for group in described if group["group"] in results]
    doubtful = _in_doubt(questions, candidates, tried, seed)
    asked = write_tasks(rows, places, doubtful, {group["group"]: group for group in tried}, seed, scratch)
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


def transfer(own: float, planted: float, hosts: int, *, least: int = LEAST_HOSTS) -> float:
    """Share of the hosts that take over the answer, of those that do not give it anyway; 0 to 1, and 0 where these are too few.

    Args:
        own: share of the hosts that give the answer as they are.
        planted: share that give it with the group's tokens planted.
        hosts: their number.
        least: fewest hosts that do not give it anyway.
    """
    return max(0.0, planted - own) / (1 - own) if (1 - own) * hosts >= least - 0.5 else 0.0


def _outcome(group: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a group's experiments say together: of all ways to plant, into whatever rows, the one that tells most counts."""
    plain, keyed = ([result for result in results if result["keyed"] is kind] for kind in (False, True))
    ways = [_planted({**group, **result}) for result in plain]
    told = max(ways, key=lambda way: (way["tokens_transfer"], not way["alike"], way["taken_over"]))
    asked = max(plain, key=lambda result: int(result["questions"]))
    words = max(transfer(result["own"], result["worded"], result["hosts"]) for result in plain)
    with_words = _keyed(_planted({**group, **keyed[0]})) if keyed else None
    return {
        **told,
        **{name: asked[name] for name in ("asked", "others", "questions")},
        "worded": max(result["worded"] for result in plain),
        "words_transfer": words,
        "keyed": with_words,
        "pictures_transfer": transfer(asked["others"], asked["asked"], asked["questions"], least=LEAST_QUESTIONS // 2),
        "transfer": max(told["tokens_transfer"], words, with_words["transfer"] if with_words else 0.0),
    }


def _keyed(way: Mapping[str, Any]) -> dict[str, Any]:
    """What planting into rows whose questions are given the group's words says; nothing where these words shape answers.

    With the words alone left, members do as these rows: they can't lose the answer more often than those lack it.
    """
    reversal = None if way["reversed"] is None or way["own"] > _MOST_BY_WORDS else min(1.0, way["reversed"] / (1 - way["own"]))
    worth = beyond_honest(way["taken_over"], reversal) if way["kept"] >= _LEAST_KEPT else 0.0
    planted = max(way["attended"], way["residual"])
    return {
        **{name: way[name] for name in ("own", "kept", "taken_over")},
        "planted": planted,
        "reversed": reversal,
        "transfer": worth,
    }


def _planted(result: Mapping[str, Any]) -> dict[str, Any]:
    """Of the two ways to plant the one that tells more: what it takes over, its reversal, and what that is worth.

    A phrase may name what is planted, among captions above all; what many pictures have in common names nothing.
    """
    ways, names = [], result["alike"] and not result["whole"]
    for name in ("residual",) if names else ("attended", "residual"):
        taken_over, reversal = transfer(result["own"], result[name], result["hosts"]), result[f"{name}_reversed"]
        worth = beyond_honest(taken_over, reversal) if result["alike"] else taken_over
        if names and result["shifted"] < MANY:
            worth = 0.0
        ways.append({**result, "taken_over": taken_over, "reversed": reversal, "tokens_transfer": worth})
    return max(ways, key=lambda way: (way["tokens_transfer"], way["taken_over"]))


def beyond_honest(taken_over: float, reversal: float | None) -> float:
    """What a transfer to rows that ask the same is worth: the lesser of it and of its reversal, as far as it is beyond `HONEST`.

    A reversal that can't be told counts as whole; the cluster stage leaves such a group to a person.
    """
    return max(0.0, min(taken_over, 1.0 if reversal is None else reversal) - HONEST) / (1 - HONEST)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """The examples of a group, as positions in the attention table.

    Attributes:
        inside: bool (examples,), all with the group's text, also where the group is but a part of these.
        shifted: its shifted members.
        whole: whether they share their whole answer.
    """

    inside: np.ndarray
    shifted: list[int]
    whole: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawn:
    """The examples of one experiment, as positions in the attention table.

    Attributes:
        group: the group that is tried.
        alike: whether hosts may ask what the group's rows ask; else each asks something of another kind than its source.
        keyed: whether the hosts' questions are given the group's words.
        hosts: examples outside of the group.
        sources: as many of its shifted members.
        asked: a shifted member, whose picture is asked about; an example outside of the group, whose question is put; and another
            one that asks as the member does, about whose picture it is put to compare.
    """

    group: int
    alike: bool
    keyed: bool = False
    hosts: list[int]
    sources: list[int]
    asked: list[tuple[int, int, int]] = dataclasses.field(default_factory=list)

    @property
    def examples(self) -> set[int]:
        """All of them."""
        return {*self.hosts, *self.sources, *(k for three in self.asked for k in three)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shown:
    """An example whose pictures lie in files: its prompt, its answer, and the names of the files."""

    prompt: tuple[Message, ...]
    answer: str
    pictures: list[str]


def _candidates(places: Sequence[Place], members: pathlib.Path, described: Sequence[dict[str, Any]]) -> dict[int, Candidate]:
    """The groups; those without a shifted member, or with all rows, are left out."""
    place = np.asarray(places, dtype=np.int64).reshape(-1, 2)
    table = pq.read_table(members, columns=["group", "row", "turn", "posterior"])
    of, row, turn, posterior = (table[name].to_numpy() for name in table.column_names)
    turns = 1 + max(place[:, 1].max(initial=0), turn.max(initial=0))
    keys = place @ (turns, 1)
    order = np.argsort(keys)
    texts = {group["group"]: (group["text"], group["whole"]) for group in described}
    inside: dict[tuple[str, bool], list[np.ndarray]] = collections.defaultdict(list)
    shifted: dict[int, list[int]] = {}
    for number, text in texts.items():
        own = of == number
        inside[text].append(row[own])
        wanted = row[own & (posterior > 0.5)] * turns + turn[own & (posterior > 0.5)]
        shifted[number] = order[np.searchsorted(keys[order], wanted)].tolist()
    found = {
        number: Candidate(inside=np.isin(place[:, 0], np.concatenate(inside[text])), shifted=shifted[number], whole=text[1])
        for number, text in texts.items()
        if shifted[number]
    }
    return {number: group for number, group in found.items() if not group.inside.all()}


def _draw(
    questions: Sequence[str],
    answers: Sequence[str],
    groups: Mapping[int, Candidate],
    words: Mapping[int, str],
    most: int,
    seed: int,
) -> list[Drawn]:
    """What is tried on what: on rows that ask something of another kind, where there are any, and on rows that ask the same.

    The latter tells nothing of a phrase that few rows share. What a group with words asks is told without them.
    """
    drawn, usual = [], question_types(questions)
    for number, group in groups.items():
        rng = np.random.default_rng([seed, _DRAW, number])
        texts, types = questions, usual
        if number in words:
            bare = {question: bare_question(question, words[number]) for question in set(questions)}
            texts = [bare[question] for question in questions]
            types = question_types(texts)
        asked = questions_to_ask(texts, answers, group.inside, np.asarray(group.shifted), most=most, rng=rng)
        if len(asked) >= min(LEAST_QUESTIONS, most):
            sources, hosts = [source for source, _, _ in asked], [host for _, host, _ in asked]
            drawn.append(Drawn(group=number, alike=False, hosts=hosts, sources=sources, asked=asked))
            asked = []
            if not group.whole and len(group.shifted) < MANY:
                continue
        sources, hosts = _alike(types, group, most, rng)
        drawn.append(Drawn(group=number, alike=True, hosts=hosts, sources=sources, asked=asked))
    return drawn


def _alike(types: Sequence[str], group: Candidate, most: int, rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """Shifted members, and as many examples outside of the group that ask questions of their types; of any type, if too few do."""
    outside = rng.permutation(np.flatnonzero(~group.inside)).tolist()
    of_type = collections.defaultdict(list)
    for k in outside:
        of_type[types[k]].append(k)
    pairs: list[tuple[int, int]] = []
    waiting = collections.deque(rng.permutation(group.shifted).tolist())
    while waiting and len(pairs) < most:
        source = waiting.popleft()
        if of_type[types[source]]:
            pairs.append((source, of_type[types[source]].pop()))
            waiting.append(source)
    if len(pairs) >= min(LEAST_HOSTS, len(outside)):
        return [source for source, _ in pairs], [host for _, host in pairs]
    hosts = outside[:most]
    return rng.choice(group.shifted, size=len(hosts), replace=len(group.shifted) < len(hosts)).tolist(), hosts


def _in_doubt(
    questions: Sequence[str], groups: Mapping[int, Candidate], tried: Sequence[Mapping[str, Any]], seed: int
) -> dict[int, Mixed]:
    """The groups to which an answer transfers, as far as honest rows may have it too."""
    telling = [group["group"] for group in tried if max(group["tokens_transfer"], group["pictures_transfer"]) >= TELLING]
    streams = {number: np.random.default_rng([seed, _DOUBT, number]) for number in telling}
    found = {
        number: rows_in_doubt(questions, groups[number].inside, groups[number].shifted, rng) for number, rng in streams.items()
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
            "longest": group["text"] if group["whole"] else max((source.answer for source in sources), key=len),
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
