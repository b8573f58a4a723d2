"""What the guard counts."""

from __future__ import annotations

import concurrent.futures

from stages.guard.records import TOTALS, Counters, GuardRecord


def record(*, flagged: bool = False, transfer: float = float("nan"), tokens: int = 0, failed: bool = False) -> GuardRecord:
    return GuardRecord(
        ran=not failed,
        flagged=flagged,
        distance=2.0,
        threshold=1.0,
        tried=transfer == transfer,
        late=False,
        transfer=transfer,
        tokens_pruned=tokens,
        rewind_layer=-1,
        milliseconds=250.0,
        failed=failed,
    )


def test_totals() -> None:
    counters = Counters()
    assert counters.totals() == dict.fromkeys(TOTALS, 0.0)
    counters.add([record(), record(flagged=True, transfer=1.0, tokens=3)], refuses=False)
    counters.add([record(transfer=0.0), record(flagged=True)], refuses=True)
    counters.add([record(failed=True)], refuses=True)
    counters.add([], refuses=True)
    expected = {
        "inputs": 5,
        "looked_at": 4,
        "tried": 2,
        "flagged": 2,
        "refused": 1,
        "failed": 1,
        "tokens_pruned": 3,
        "seconds": 0.75,
    }
    assert counters.totals() == {f"byesight_guard_{name}_total": value for name, value in expected.items()}


def test_totals_are_a_copy() -> None:
    counters = Counters()
    counters.totals()[TOTALS[0]] = 7
    assert counters.totals()[TOTALS[0]] == 0


def test_many_threads() -> None:
    counters = Counters()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for _ in range(400):
            pool.submit(counters.add, [record(tokens=1)], refuses=False)
    assert counters.totals()["byesight_guard_tokens_pruned_total"] == 400


def test_of_a_failure() -> None:
    failure = GuardRecord.of_failure(3.0)
    assert (failure.ran, failure.flagged, failure.failed, failure.threshold) == (False, False, True, 3.0)
