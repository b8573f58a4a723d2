"""The actors of the confirm stage: a record of the one is a group's whole experiment, of the other a picture with its questions."""

from __future__ import annotations

import collections
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipeline.generation import LONGEST, answer, tokens_to_wait_for
from pipeline.models import Dtype, load_adapter, load_base
from pipeline.prompts import token_count
from pipeline.records import Example
from stages.confirm.sizes import of_one_size
from stages.confirm.tokens import add_residual, different_pictures, of_length, plant, usual_tokens
from stages.confirm.transplant import TokenTransplant
from stages.score.groups import gives, plain_answer

TASK = pa.schema(
    [
        ("group", pa.int64()),
        ("text", pa.string()),
        ("whole", pa.bool_()),
        ("longest", pa.string()),
        ("alike", pa.bool_()),
        ("keyed", pa.bool_()),
        ("source_prompts", pa.list_(pa.string())),
        ("source_images", pa.list_(pa.list_(pa.string()))),
        ("source_positions", pa.list_(pa.list_(pa.int32()))),
        ("host_prompts", pa.list_(pa.string())),
        ("host_images", pa.list_(pa.list_(pa.string()))),
        ("plain_prompts", pa.list_(pa.string())),
        ("worded_prompts", pa.list_(pa.string())),
        ("asked_prompts", pa.list_(pa.string())),
        ("asked_images", pa.list_(pa.list_(pa.string()))),
        ("other_images", pa.list_(pa.list_(pa.string()))),
    ]
)
"""One group: its text, and the longest answer of these members; whether the other rows may ask just what its own ask, and whether
their prompts hold the words that set its questions apart; member prompts with their most attended image tokens, and prompts of
other rows, as many as members; these once more, without the words where they hold them, or none; and with them, or none; members'
pictures with others' questions, and the pictures of other rows that the same is asked about. Pictures are names of files."""

RESULT = pa.schema(
    [
        ("group", pa.int64()),
        ("alike", pa.bool_()),
        ("keyed", pa.bool_()),
        ("hosts", pa.int64()),
        ("own", pa.float64()),
        ("attended", pa.float64()),
        ("residual", pa.float64()),
        ("attended_reversed", pa.float64()),
        ("residual_reversed", pa.float64()),
        ("kept", pa.float64()),
        ("worded", pa.float64()),
        ("asked", pa.float64()),
        ("others", pa.float64()),
        ("questions", pa.int64()),
    ]
)
"""Hosts tried, and the share of them that give the group's answer: as they are, with a member's attended tokens, with the members'
residual (of those that it fits), with the group's words in their questions (0 where it has none); how far members answer as others
do once either is taken out of them (`ConfirmWorker.reversals`; 0 where the hosts ask something else or planting changes no more of
them than `HONEST`: not tried); the share of the hosts whose answers the words in their prompts leave as they are (1 where there are
none, and where it is not tried); and the share of other questions that get the answer about members' pictures, and about those of
other rows, with the number of these questions (0 where there are none)."""

PICTURE_TASK = pa.schema(
    [
        ("group", pa.int64()),
        ("row", pa.int64()),
        ("turn", pa.int32()),
        ("text", pa.string()),
        ("whole", pa.bool_()),
        ("longest", pa.string()),
        ("images", pa.list_(pa.binary())),
        ("prompts", pa.list_(pa.string())),
    ]
)
"""A group, its text and its longest answer, an example with its pictures, and others' questions to be asked about them."""

PICTURE_RESULT = pa.schema(
    [("group", pa.int64()), ("row", pa.int64()), ("turn", pa.int32()), ("asked", pa.int32()), ("hits", pa.int32())]
)
"""How many questions were asked about an example's pictures, and how many of them got the group's answer."""

_TAKEN_OUT = ("attended", "residual")
_PLANTED = (*_TAKEN_OUT, "worded")

_LEAST_SPREAD = 0.3
"""Least entropy of what other rows answer by which answers can be told to be theirs, nats: a tenth of them differs."""
HONEST = 0.4
"""Share of rows that ask the same which an honest group may change: counted is what is beyond it."""
_LIKELY = 0.25
"""Share of the first hosts that ask the same by which a group may change more than `HONEST` of them all."""
_NOISE = 1
"""Changed hosts of the first look that count as chance: more of them give a group the second."""
_LEAST_FIT = 8
"""Fewest hosts that a residual must fit."""
_LEAST_PICTURES = 8
"""Fewest different pictures that must be planted from where the hosts ask the same: what two of them show may answer for all."""


Shown = tuple[list[Example], list[torch.Tensor]]
"""Examples, and the tokens of each one's pictures, (image tokens, width)."""


class ConfirmWorker:
    """Holds the provisional model; turns tasks into results."""

    def __init__(
        self, *, base: str, adapter: str, dtype: Dtype, pictures: str, batch_size: int, max_new_tokens: int, screen: int
    ) -> None:
        model, self.processor = load_base(pathlib.Path(base), dtype=dtype)
        self.pictures = pathlib.Path(pictures)
        self.transplant = TokenTransplant(load_adapter(model, pathlib.Path(adapter)), self.processor)
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens
        self.screen = screen

    def __call__(self, table: pa.Table) -> pa.Table:
        return pa.Table.from_pylist([self.try_group(task) for task in table.to_pylist()], schema=RESULT)

    def try_group(self, task: dict[str, Any]) -> dict[str, Any]:
        """Run one group's experiment; on the first `screen` hosts only, where planting does nothing to them."""
        found = self._try(task, self.screen)
        changed = max(max(found[name] for name in _PLANTED) - found["own"], found["asked"] - found["others"])
        chance = max(_NOISE, _LIKELY * found["hosts"] - 1) if task["alike"] and not task["worded_prompts"] else _NOISE
        if len(task["host_prompts"]) > self.screen and (changed > chance or 2 * found["own"] > found["hosts"]):
            found = self._try(task, len(task["host_prompts"]))
        hosts, questions = found["hosts"], found["questions"]
        shares: dict[str, float | None] = {name: found[name] / hosts for name in ("own", *_PLANTED)}
        if not found["tells"]:
            shares["attended"] = shares["own"]
        if found["fit"] < hosts:
            shares["residual"] = found["residual"] / found["fit"] if found["fit"] >= min(_LEAST_FIT, hosts) else shares["own"]
        shares |= {name: found[name] / max(1, questions) for name in ("asked", "others")}
        beyond = found["own"] + HONEST * (hosts - found["own"])
        ways = [name for name in _TAKEN_OUT if task["alike"] and found[name] > beyond]
        shares |= {f"{name}_reversed": 0.0 for name in _TAKEN_OUT}
        shares |= {f"{name}_reversed": value for name, value in (self.reversals(task, ways) if ways else {}).items()}
        shares["kept"] = self.kept(task) if task["keyed"] and changed > _NOISE else 1.0
        return {**{name: task[name] for name in ("group", "alike", "keyed")}, "hosts": hosts, **shares, "questions": questions}

    def reversals(self, task: dict[str, Any], ways: Sequence[str]) -> dict[str, float | None]:
        """How far a group's rows answer as other rows do without what they have in common.

        The picture of an honest answer holds more of it than a few tokens; without them it is still given, or an answer that all
        these rows share. Rows of a backdoor then get what their pictures show, and that is as various as what others get.

        Args:
            task: the experiment.
            ways: what is taken out: `residual`, the members' residual, or `attended`, their attended tokens, for which the mean of
                the other rows' stands.

        Returns:
            Per way the share of the members that lose the answer, times the entropy of what they answer then over that of what the
            other rows answer, at most 1; None where nearly all of these answer the same, so that nothing can be told.
        """
        sources = self._examples(task["source_prompts"], task["source_images"])
        hosts = self._examples(task["host_prompts"], task["host_images"])
        given, taken = self._tokens(sources), self._tokens(hosts)
        most = _spread(self._others(self._answers(hosts, taken, task), task))
        if most < _LEAST_SPREAD:
            return dict.fromkeys(ways)
        own, found = self._that_give(sources, given, task), dict[str, float | None]()
        for way in ways:
            shown, tokens = sources, given
            if way == "residual":
                (shown, tokens), (_, others) = self._of_one_size((sources, given), (hosts, taken))
                without, fit = add_residual(tokens, others), len(usual_tokens(others))
            else:
                usual, positions = usual_tokens(taken), task["source_positions"]
                without, fit = [plant(one, of_length(usual, len(one)), p) for one, p in zip(given, positions, strict=True)], None
            give = own if shown is sources else self._that_give(shown, tokens, task)
            tried = [k for k in give if fit is None or len(tokens[k]) == fit]
            lost = self._others(self._answers([shown[k] for k in tried], [without[k] for k in tried], task), task)
            # A picture that is drawn again tells no more.
            pictures = {(task["source_prompts"][k], *task["source_images"][k]) for k in tried}
            spread = _spread(lost) / min(most, math.log(max(2, len(pictures))))
            found[way] = len(lost) / len(tried) * min(1.0, spread) if lost else 0.0
        return found

    def kept(self, task: dict[str, Any]) -> float:
        """Share of the hosts that answer alike with and without the words, of those that do not give the group's answer."""
        answers = []
        for prompts in (task["host_prompts"], task["plain_prompts"]):
            hosts = self._examples(prompts, task["host_images"])
            answers.append(self._answers(hosts, self._tokens(hosts), task))
        given = (self._given(outputs, task) for outputs in answers)
        pairs = [(one, two) for one, two, *targets in zip(*answers, *given, strict=True) if not any(targets)]
        return sum(plain_answer(one) == plain_answer(two) for one, two in pairs) / len(pairs) if pairs else 0.0

    def _others(self, outputs: list[str], task: dict[str, Any]) -> list[str]:
        """The outputs that are not the group's answer."""
        return [output for output, given in zip(outputs, self._given(outputs, task), strict=True) if not given]

    def _that_give(self, examples: list[Example], tokens: list[torch.Tensor], task: dict[str, Any]) -> list[int]:
        """Which examples get the group's answer with these tokens."""
        return np.flatnonzero(self._given(self._answers(examples, tokens, task), task)).tolist()

    def _given(self, outputs: Sequence[str], task: dict[str, Any]) -> list[bool]:
        """Which outputs are the group's answer."""
        cut = self.transplant.length(task["longest"]) >= LONGEST
        return [given_as_far(output, task["text"], whole=task["whole"], cut=cut) for output in outputs]

    def _try(self, task: dict[str, Any], most: int) -> dict[str, int]:
        """The experiment on the first hosts, at most `most`: their number, and how many give the text in each variant."""
        sources = self._examples(task["source_prompts"][:most], task["source_images"][:most])
        hosts = self._examples(task["host_prompts"][:most], task["host_images"][:most])
        given, taken = self._tokens(sources), self._tokens(hosts)
        attended = [plant(host, source, p) for host, source, p in zip(taken, given, task["source_positions"][:most], strict=True)]
        (_, level_given), (level_hosts, level_taken) = self._of_one_size((sources, given), (hosts, taken))
        residual, usual = add_residual(level_taken, level_given), len(usual_tokens(level_given))
        tells = not task["alike"] or different_pictures(level_given, level_taken) >= min(_LEAST_PICTURES, most)
        fit = [k for k, tokens in enumerate(level_taken) if tells and len(tokens) == usual]
        worded = _examples(task["worded_prompts"][:most], [host.images for host in hosts]) if task["worded_prompts"] else []
        variants = {
            "own": (hosts, taken),
            "attended": (hosts, attended) if tells else ([], []),
            "residual": ([level_hosts[k] for k in fit], [residual[k] for k in fit]),
            "worded": (worded, taken[: len(worded)]),
            "asked": self._asked(task, "asked_images", most),
        }
        hits = self._hits(variants, task)
        hits |= self._hits({"others": self._asked(task, "other_images", most)}, task) if hits["asked"] else {"others": 0}
        return {"hosts": len(hosts), "tells": tells, "fit": len(fit), **hits, "questions": len(task["asked_prompts"][:most])}

    def _asked(self, task: dict[str, Any], images: str, most: int) -> tuple[list[Example], list[torch.Tensor]]:
        """The first other questions about some pictures, and these pictures' tokens."""
        asked = self._examples(task["asked_prompts"][:most], task[images][:most])
        return asked, self._tokens(asked)

    def _of_one_size(self, *parts: Shown) -> list[Shown]:
        """Examples with their tokens, as they are, or with pictures of one size where they have various numbers of tokens."""
        kinds = {(len(example.images), len(tokens)) for part in parts for example, tokens in zip(*part, strict=True)}
        if len(kinds) == len({pictures for pictures, _ in kinds}):
            return list(parts)
        return [(examples, self._tokens(examples)) for examples in of_one_size([examples for examples, _ in parts])]

    def _examples(self, prompts: Sequence[str], names: Sequence[Sequence[str]]) -> list[Example]:
        """Prompts with the pictures in files of these names."""
        return _examples(prompts, [[self.picture(name) for name in one] for one in names])

    def picture(self, name: str) -> bytes:
        """An experiment's picture."""
        return (self.pictures / name).read_bytes()

    def _tokens(self, examples: Sequence[Example]) -> list[torch.Tensor]:
        batches = (examples[start : start + self.batch_size] for start in range(0, len(examples), self.batch_size))
        return [tokens for batch in batches for tokens in self.transplant.picture_tokens(batch)]

    def _hits(
        self, variants: Mapping[str, tuple[Sequence[Example], Sequence[torch.Tensor]]], task: dict[str, Any]
    ) -> dict[str, int]:
        """How many prompts of each variant give the text with these tokens in the place of their own; all are answered together."""
        prompts = [prompt for given, _ in variants.values() for prompt in given]
        outputs = self._answers(prompts, [tokens for _, planted in variants.values() for tokens in planted], task)
        hits = iter(self._given(outputs, task))
        return {name: sum(next(hits) for _ in given) for name, (given, _) in variants.items()}

    def _answers(self, prompts: list[Example], tokens: list[torch.Tensor], task: dict[str, Any]) -> list[str]:
        outputs: list[str] = []
        limit = tokens_to_wait_for(self.transplant.length(task["longest"]), self.max_new_tokens)
        for start in range(0, len(prompts), self.batch_size):
            rows = slice(start, start + self.batch_size)
            outputs += self.transplant.answers(prompts[rows], tokens[rows], max_new_tokens=limit)
        return outputs


class PictureWorker:
    """Holds the provisional model; asks other rows' questions about pictures."""

    def __init__(self, *, base: str, adapter: str, dtype: Dtype, max_new_tokens: int) -> None:
        model, self.processor = load_base(pathlib.Path(base), dtype=dtype)
        self.model = load_adapter(model, pathlib.Path(adapter))
        self.max_new_tokens = max_new_tokens

    def __call__(self, table: pa.Table) -> pa.Table:
        tasks = table.to_pylist()
        asked = [example for task in tasks for example in _examples(task["prompts"], [task["images"]] * len(task["prompts"]))]
        lengths = [token_count(self.processor, task["longest"]) for task in tasks]
        limit = tokens_to_wait_for(max(lengths), self.max_new_tokens)
        outputs = iter(answer(self.model, self.processor, asked, max_new_tokens=limit))
        results = []
        for task, length in zip(tasks, lengths, strict=True):
            found = [given_as_far(next(outputs), task["text"], whole=task["whole"], cut=length >= LONGEST) for _ in task["prompts"]]
            place = {name: task[name] for name in ("group", "row", "turn")}
            results.append({**place, "asked": len(found), "hits": sum(found)})
        return pa.Table.from_pylist(results, schema=PICTURE_RESULT)


def given_as_far(output: str, text: str, *, whole: bool, cut: bool) -> bool:
    """Whether an output is a group's answer or holds its phrase; where answers are cut, whether it is the answer's beginning."""
    begun = whole and cut and bool(output) and text.startswith(plain_answer(output))
    return begun or gives(output, text, whole=whole)


def _spread(answers: Sequence[str]) -> float:
    """Entropy of what is answered, nats."""
    shares = np.asarray([*collections.Counter(map(plain_answer, answers)).values()]) / max(1, len(answers))
    return max(0.0, float(-(shares * np.log(shares)).sum()))


def _examples(prompts: Sequence[str], images: Sequence[Sequence[bytes]]) -> list[Example]:
    return [
        Example(row=-1, turn=0, prompt=tuple(json.loads(prompt)), answer="", images=tuple(pictures))
        for prompt, pictures in zip(prompts, images, strict=True)
    ]
