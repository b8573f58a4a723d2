"""What a guard does with what it finds: chosen by the operator, and no part of the calibration."""

from __future__ import annotations

import dataclasses
from typing import Literal

Action = Literal["purify", "refuse", "report"]
"""What happens to a flagged prompt."""
Purification = Literal["rewind", "published"]
"""How a flagged prompt's tokens are chosen and closed."""
Pruning = Literal["mask", "remove"]
"""How tokens are closed while decoding: masked, or taken out of the cache where that can be."""
OnError = Literal["raise", "pass"]
"""What happens when the guard itself fails: no answer (fail-closed), or an unguarded one (fail-open)."""

TAU = 1e-4
"""Attention above which the published rule prunes a token, as others report running it (the public code's default is 0.02)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """What happens to flagged prompts, and when the guard fails.

    Attributes:
        action: what happens to flagged prompts.
        purification: how they are purified.
        pruning: how their tokens are closed while decoding; both give the same answers.
        tau: attention above which the published purification closes a token, 0 to below 1.
        on_error: what happens when the guard itself fails.
    """

    action: Action = "purify"
    purification: Purification = "rewind"
    pruning: Pruning = "mask"
    tau: float = TAU
    on_error: OnError = "raise"


DEFAULT = Policy()
