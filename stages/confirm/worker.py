"""The actor of the confirm stage: one record is one group's whole experiment."""

from __future__ import annotations

import collections
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import torch

from pipeline.models import Dtype, load_adapter, load_base
from pipeline.planting import planted
from pipeline.records import Example
from stages.confirm.transplant import TokenTransplant
from stages.score.groups import gives

TASK = pa.schema(
    [
        ("group", pa.int64()),
        ("text", pa.string()),
        ("whole", pa.bool_()),
        ("source_prompts", pa.list_(pa.string())),
        ("source_images", pa.list_(pa.list_(pa.binary()))),
        ("source_positions", pa.list_(pa.list_(pa.int32()))),
        ("host_prompts", pa.list_(pa.string())),
        ("host_images", pa.list_(pa.list_(pa.binary()))),
        ("worded_prompts", pa.list_(pa.string())),
        ("asked_prompts", pa.list_(pa.string())),
        ("asked_images", pa.list_(pa.list_(pa.binary()))),
        ("other_images", pa.list_(pa.list_(pa.binary()))),
    ]
)
"""One group: its text, member prompts with their most attended image tokens, and prompts of other rows, as many as members; these
prompts once more with the words that set the group's questions apart, or none; members' pictures with others' questions, and the
pictures of other rows that the same is asked about."""

RESULT = pa.schema(
    [
        ("group", pa.int64()),
        ("hosts", pa.int64()),
        ("own", pa.float64()),
        ("attended", pa.float64()),
        ("residual", pa.float64()),
        ("worded", pa.float64()),
        ("asked", pa.float64()),
        ("others", pa.float64()),
        ("questions", pa.int64()),
    ]
)
"""Hosts tried, and the share of them that give the group's answer: as they are, with a member's attended tokens, with the members'
residual, with the group's words in their questions (0 where it has none); and the share of other questions that get it about
members' pictures, and about those of other rows, with the number of these questions (0 where there are none)."""
_PLANTED = ("attended", "residual", "worded")

_NOISE = 1
"""Hosts by which planting must change the count of the first look for a group to get the second."""


class ConfirmWorker:
    """Holds the provisional model; turns tasks into results."""

    def __init__(self, *, base: str, adapter: str, dtype: Dtype, batch_size: int, max_new_tokens: int, screen: int) -> None:
        model, self.processor = load_base(pathlib.Path(base), dtype=dtype)
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
        if len(task["host_prompts"]) > self.screen and (changed > _NOISE or 2 * found["own"] > found["hosts"]):
            found = self._try(task, len(task["host_prompts"]))
        hosts, questions = found["hosts"], found["questions"]
        shares = {name: found[name] / hosts for name in ("own", *_PLANTED)}
        shares |= {name: found[name] / max(1, questions) for name in ("asked", "others")}
        return {"group": task["group"], "hosts": hosts, **shares, "questions": questions}

    def _try(self, task: dict[str, Any], most: int) -> dict[str, int]:
        """The experiment on the first hosts, at most `most`: their number, and how many give the text in each variant."""
        sources = _examples(task["source_prompts"][:most], task["source_images"][:most])
        hosts = _examples(task["host_prompts"][:most], task["host_images"][:most])
        given, taken = self._tokens(sources), self._tokens(hosts)
        attended = [plant(host, source, p) for host, source, p in zip(taken, given, task["source_positions"][:most], strict=True)]
        variants = {"own": taken, "attended": attended, "residual": add_residual(taken, given)}
        hits = {name: self._hits(hosts, tokens, task["text"], whole=task["whole"]) for name, tokens in variants.items()}
        worded = _examples(task["worded_prompts"][:most], task["host_images"][:most]) if task["worded_prompts"] else []
        hits["worded"] = self._hits(worded, taken, task["text"], whole=task["whole"])
        hits["asked"] = self._asked(task, "asked_images", most)
        hits["others"] = self._asked(task, "other_images", most) if hits["asked"] else 0
        return {"hosts": len(hosts), **hits, "questions": len(task["asked_prompts"][:most])}

    def _asked(self, task: dict[str, Any], images: str, most: int) -> int:
        """How many of the first other questions get the text about some pictures."""
        asked = _examples(task["asked_prompts"][:most], task[images][:most])
        return self._hits(asked, self._tokens(asked), task["text"], whole=task["whole"])

    def _tokens(self, examples: Sequence[Example]) -> list[torch.Tensor]:
        batches = (examples[start : start + self.batch_size] for start in range(0, len(examples), self.batch_size))
        return [tokens for batch in batches for tokens in self.transplant.picture_tokens(batch)]

    def _hits(self, hosts: list[Example], tokens: list[torch.Tensor], text: str, *, whole: bool) -> int:
        """How many hosts give the text with these tokens in the place of their own."""
        hits = 0
        for start in range(0, len(hosts), self.batch_size):
            rows = slice(start, start + self.batch_size)
            outputs = self.transplant.answers(hosts[rows], tokens[rows], max_new_tokens=self.max_new_tokens)
            hits += sum(gives(output, text, whole=whole) for output in outputs)
        return hits


def plant(host: torch.Tensor, source: torch.Tensor, positions: Sequence[int]) -> torch.Tensor:
    """The host's tokens (image tokens, width) with the source's at `positions` planted; what is not there counts nothing."""
    chosen = torch.zeros(len(source), dtype=torch.bool, device=source.device)
    chosen[[p for p in positions if 0 <= p < len(source)]] = True
    return planted(host, source, chosen)


def add_residual(hosts: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The hosts' tokens plus what the sources have on average more than they.

    Only pictures of the number of tokens that is most common among the sources count; hosts of another number stay as they are.
    """
    length = collections.Counter(map(len, sources)).most_common(1)[0][0]
    given, taken = ([tokens for tokens in part if len(tokens) == length] for part in (sources, hosts))
    if not taken:
        return list(hosts)
    residual = torch.stack(given).mean(0) - torch.stack(taken).mean(0)
    return [tokens + residual if len(tokens) == length else tokens for tokens in hosts]


def _examples(prompts: Sequence[str], images: Sequence[Sequence[bytes]]) -> list[Example]:
    return [
        Example(row=-1, turn=0, prompt=tuple(json.loads(prompt)), answer="", images=tuple(pictures))
        for prompt, pictures in zip(prompts, images, strict=True)
    ]
