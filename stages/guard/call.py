"""What one guarded `generate` call knows of itself; nothing of it lives on the model."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from pipeline.attention import LayerStatistics, PromptRegions, Tap
from stages.guard.records import GuardRecord


@dataclasses.dataclass(kw_only=True)
class Call:
    """The state of one `generate` call.

    Attributes:
        owner: the guarded model that is called.
        inputs, prompt: number of inputs, and tokens of their prompts.
        mask: the prompts' attention mask, int (inputs, prompt), if one was given.
        says_late: bool (inputs,), which are known to say what they would not say with their pictures closed late.
        tap: reads and closes attention while the model runs.
        regions: where image and text lie in the prefill's batch.
        empty_cache: a copy of the cache before the prefill.
        embeddings: (batch, keys, width), the prefill's prompts as the decoder takes them.
        weights, statistics: by layer, what the prefill's last row attends to.
        records: what was found, one per input.
        done: whether the prefill is over.
        seconds: time that was spent on reading attention.
    """

    owner: object
    inputs: int
    prompt: int
    mask: torch.Tensor | None
    says_late: torch.Tensor
    tap: Tap = dataclasses.field(default_factory=Tap)
    regions: PromptRegions | None = None
    empty_cache: Any = None
    embeddings: torch.Tensor | None = None
    weights: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)
    statistics: dict[int, LayerStatistics] = dataclasses.field(default_factory=dict)
    records: list[GuardRecord] = dataclasses.field(default_factory=list)
    done: bool = False
    seconds: float = 0.0

    def forget(self) -> None:
        """Let go of what the prefill alone needs."""
        self.weights.clear()
        self.statistics.clear()
        self.embeddings = self.empty_cache = None

    def afresh(self) -> Call:
        """The same call before it ran, with what is known of its answers."""
        return Call(owner=self.owner, inputs=self.inputs, prompt=self.prompt, mask=self.mask, says_late=self.says_late)

    @property
    def beams(self) -> int:
        """Rows of the prefill's batch per input."""
        return 1 if self.regions is None else len(self.regions.image) // self.inputs
