"""Which rows of an attack's group are the attack's, where its answer is an honest one to some questions too.

Attention does not tell them apart: both look at what shows the answer. Their pictures do. Asked what the answer does not belong to,
those of the attack give it nevertheless. Which rows are in doubt is told by what they ask (`asking.honestly_given`); how often
pictures of the attack give the answer is measured on its rows that are not in doubt, and how often other pictures do on other rows
that ask what the doubtful ones ask.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.records import examples_of, messages_to_json
from stages.confirm.asking import honestly_given
from stages.confirm.worker import PICTURE_RESULT, PICTURE_TASK
from storage.subset import Place, read_examples, read_rows

QUESTIONS = 6
"""Questions that each picture is asked."""
TELLING = 0.1
"""Transfer from which a group's rows are looked at one by one; honest groups reach 0.06."""
ROWS_SCHEMA = PICTURE_RESULT.append(pa.field("posterior", pa.float64()))
"""A doubtful example, how many questions were asked about its pictures, how many got the group's answer, and the probability that
it is the attack's."""
_LEAST = 8
"""Fewest rows that are not in doubt by which the attack is known."""
_MOST = 64
"""Most rows by which either rate is measured, and most questions that are drawn from."""
_SHARD_ROWS = 128
_ASKED = 29  # stream of random numbers: which questions a picture is asked


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixed:
    """A group with rows in doubt; all are positions in the attention table.

    Attributes:
        doubtful: shifted members that ask what the answer honestly belongs to.
        sure: shifted members that ask something else, as many as are needed.
        others: examples outside of the group that ask what the doubtful ones ask.
        hosts: examples outside of the group that ask something else: their questions are put.
    """

    doubtful: list[int]
    sure: list[int]
    others: list[int]
    hosts: list[int]


def rows_in_doubt(
    questions: Sequence[str], inside: np.ndarray, apart: np.ndarray, shifted: Sequence[int], rng: np.random.Generator
) -> Mixed | None:
    """Draw what tells the rows of a group apart.

    Args:
        questions: one per example, in plain form.
        inside: bool (examples,), which have the group's answer.
        apart: bool (examples,), which are of rows that have it in no turn.
        shifted: positions of its shifted members.
        rng: of the draw.

    Returns:
        None where none of them is in doubt, or where too few are not, so that nothing can be measured.
    """
    belongs = honestly_given(questions, inside)
    doubtful, sure = ([k for k in shifted if belongs[k] == kind] for kind in (True, False))
    others, hosts = (np.flatnonzero((belongs == kind) & apart).tolist() for kind in (True, False))
    if not doubtful or min(len(sure), len(others)) < _LEAST or len(hosts) < QUESTIONS:
        return None
    sure, others, hosts = (sorted(rng.permutation(part)[:_MOST].tolist()) for part in (sure, others, hosts))
    return Mixed(doubtful=doubtful, sure=sure, others=others, hosts=hosts)


def write_tasks(
    rows: pathlib.Path,
    places: Sequence[Place],
    mixed: Mapping[int, Mixed],
    described: Mapping[int, Mapping[str, Any]],
    longest: Mapping[int, str],
    seed: int,
    scratch: pathlib.Path,
) -> list[pathlib.Path]:
    """Shards of `PICTURE_TASK`: a record per example and group it is looked at for, but for examples without fitting questions.

    Args:
        rows: folder of canonical shards.
        places: of all examples, by position.
        mixed: what is drawn, by group.
        described: the groups' records.
        longest: the longest answer of each group, as submitted.
        seed: of the choice of questions.
        scratch: folder to write into.
    """
    shards: list[pathlib.Path] = []
    tasks = _tasks(rows, places, mixed, described, longest, seed)
    while waiting := list(itertools.islice(tasks, _SHARD_ROWS)):
        shards.append(scratch / f"pictures-{len(shards):05d}.parquet")
        pq.write_table(pa.Table.from_pylist(waiting, schema=PICTURE_TASK), shards[-1], row_group_size=len(waiting))
    return shards


def _tasks(
    rows: pathlib.Path,
    places: Sequence[Place],
    mixed: Mapping[int, Mixed],
    described: Mapping[int, Mapping[str, Any]],
    longest: Mapping[int, str],
    seed: int,
) -> Iterator[dict[str, Any]]:
    """The records of `write_tasks`, in order of the rows."""
    prompts = _prompts(rows, places, mixed)
    of_row: dict[int, list[tuple[int, int]]] = collections.defaultdict(list)
    for number, drawn in mixed.items():
        for k in (*drawn.doubtful, *drawn.sure, *drawn.others):
            of_row[places[k][0]].append((number, k))
    for sample in read_rows(rows, of_row):
        turns = {example.turn: example for example in examples_of(sample)}
        for number, k in of_row[sample.row]:
            example, group = turns[places[k][1]], described[number]
            fitting = prompts[number, len(example.images)]
            if len(fitting) < QUESTIONS:
                continue
            chosen = np.random.default_rng([seed, _ASKED, number, k]).choice(len(fitting), size=QUESTIONS, replace=False)
            yield {
                "group": number,
                "row": example.row,
                "turn": example.turn,
                "text": group["text"],
                "whole": group["whole"],
                "longest": longest[number] if group["whole"] else example.answer,
                "images": list(example.images),
                "prompts": [fitting[h] for h in chosen.tolist()],
            }


def _prompts(rows: pathlib.Path, places: Sequence[Place], mixed: Mapping[int, Mixed]) -> dict[tuple[int, int], list[str]]:
    """The hosts' prompts by group and number of pictures."""
    hosts: dict[Place, tuple[int, str]] = {}
    for example in read_examples(rows, (places[k] for drawn in mixed.values() for k in drawn.hosts)):
        hosts[example.row, example.turn] = len(example.images), messages_to_json(example.prompt)
    found: dict[tuple[int, int], list[str]] = collections.defaultdict(list)
    for number, drawn in mixed.items():
        for pictures, prompt in (hosts[places[k]] for k in drawn.hosts):
            found[number, pictures].append(prompt)
    return found


def judged(
    results: Mapping[tuple[int, int, int], tuple[int, int]], places: Sequence[Place], mixed: Mapping[int, Mixed]
) -> tuple[pa.Table, dict[int, dict[str, Any]]]:
    """What the answers say of the doubtful rows.

    Args:
        results: (questions, hits) by group, row and turn.
        places: of all examples, by position.
        mixed: what was drawn, by group.

    Returns:
        A table of `ROWS_SCHEMA`, and by group: the number of doubtful rows that were looked at, how many of them are honest, and
        the share of the questions that got the answer about pictures of the attack and about others.
    """
    records, told = [], {}
    for number, drawn in mixed.items():
        sure, others = (_rate(results.get((number, *places[k])) for k in part) for part in (drawn.sure, drawn.others))
        looked_at = [(places[k], found) for k in drawn.doubtful if (found := results.get((number, *places[k]))) is not None]
        own = [
            {
                "group": number,
                "row": row,
                "turn": turn,
                "asked": asked,
                "hits": hits,
                "posterior": attack_posterior(hits, asked, sure, others),
            }
            for (row, turn), (asked, hits) in looked_at
        ]
        honest = sum(record["posterior"] <= 0.5 for record in own)
        told[number] = {"rows": len(own), "honest": honest, "attack": sure, "others": others}
        records += own
    return pa.Table.from_pylist(records, schema=ROWS_SCHEMA), told


def attack_posterior(hits: int, asked: int, sure: float, others: float) -> float:
    """Probability that pictures which give the answer to `hits` of `asked` questions are the attack's, both being as likely before.

    Args:
        hits: questions that got the answer.
        asked: questions.
        sure: share of the questions that get it about pictures of the attack, above 0 and below 1.
        others: the same about other pictures; where it is not the smaller one nothing can be told, and the row is held for honest.
    """
    if sure <= others:
        return 0.0
    odds = hits * math.log(sure / others) + (asked - hits) * math.log((1 - sure) / (1 - others))
    return 1 / (1 + math.exp(-odds))


def _rate(results: Iterable[tuple[int, int] | None]) -> float:
    """Share of the questions that got the answer, with one more that did and one that did not."""
    known = [found for found in results if found is not None]
    return (sum(hits for _, hits in known) + 1) / (sum(asked for asked, _ in known) + 2)
