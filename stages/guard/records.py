"""What the guard tells of its work: a record per input, and totals for monitoring. Neither holds anything of a user's content."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence

TOTALS = (
    "byesight_guard_inputs_total",
    "byesight_guard_looked_at_total",
    "byesight_guard_tried_total",
    "byesight_guard_flagged_total",
    "byesight_guard_refused_total",
    "byesight_guard_failed_total",
    "byesight_guard_tokens_pruned_total",
    "byesight_guard_seconds_total",
)
"""Names of the totals; the last is the guard's own time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuardRecord:
    """What the guard did with one input; holds nothing of the user's content.

    Attributes:
        ran: whether the detector looked at it (an input without pictures is not looked at).
        flagged: whether its distance is above the threshold, or not a number, or its answer reads its picture late, or is carried
            by it into other prompts.
        distance, threshold: in whitened standard deviations; distance is NaN where it did not run.
        tried: whether it was suspicious, and so tried causally.
        late: whether its answer began otherwise, or left its unusual words out, with its picture closed in the layers in which kept
            rows need theirs no longer.
        transfer: share of kept prompts that took over its answer; NaN where that was not tried, or can't be told.
        tokens_pruned: image tokens closed.
        rewind_layer: the layer from which they are closed; -1 where nothing is.
        milliseconds: time of the guard's own work for the whole batch: reduction, detection, causal tests and what was run again.
        failed: whether the guard itself failed and the input was answered unguarded (`on_error` is `pass`).
    """

    ran: bool
    flagged: bool
    distance: float
    threshold: float
    tried: bool
    late: bool
    transfer: float
    tokens_pruned: int
    rewind_layer: int
    milliseconds: float
    failed: bool = False

    def after(self, first: GuardRecord) -> GuardRecord:
        """Of an input that was answered again, with the time and the trials of its first answer."""
        return dataclasses.replace(self, tried=self.tried or first.tried, milliseconds=self.milliseconds + first.milliseconds)

    @classmethod
    def of_failure(cls, threshold: float) -> GuardRecord:
        """Of an input that the guard could not look at."""
        nothing = float("nan")
        return cls(
            ran=False,
            flagged=False,
            distance=nothing,
            threshold=threshold,
            tried=False,
            late=False,
            transfer=nothing,
            tokens_pruned=0,
            rewind_layer=-1,
            milliseconds=0.0,
            failed=True,
        )


class Counters:
    """Totals over all calls of one guard, from any thread.

    Names and meaning follow Prometheus: they only grow, and an exporter's `collect` can hand them on as counters.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._totals = dict.fromkeys(TOTALS, 0.0)

    def add(self, records: Sequence[GuardRecord], *, refuses: bool) -> None:
        """Count the inputs of a call."""
        flagged = sum(record.flagged for record in records)
        with self._lock:
            self._totals["byesight_guard_inputs_total"] += len(records)
            self._totals["byesight_guard_looked_at_total"] += sum(record.ran for record in records)
            self._totals["byesight_guard_tried_total"] += sum(record.tried for record in records)
            self._totals["byesight_guard_flagged_total"] += flagged
            self._totals["byesight_guard_refused_total"] += flagged if refuses else 0
            self._totals["byesight_guard_failed_total"] += sum(record.failed for record in records)
            self._totals["byesight_guard_tokens_pruned_total"] += sum(record.tokens_pruned for record in records)
            self._totals["byesight_guard_seconds_total"] += records[0].milliseconds / 1000 if records else 0.0

    def totals(self) -> dict[str, float]:
        """All totals by name."""
        with self._lock:
            return dict(self._totals)
