"""Listeners hear what is told inside their block, from any thread."""

from __future__ import annotations

import threading

from flows.progress import listening, progress_of, tell

Heard = list[tuple[str, float, str]]


def test_listeners_add_up_and_end_with_their_block() -> None:
    outer: Heard = []
    inner: Heard = []
    with listening(lambda *event: outer.append(event)):
        tell("a", 0.0, "one")
        with listening(lambda *event: inner.append(event)):
            tell("b", 0.5, "two")
        tell("c", 1.0, "three")
    tell("d", 1.0, "nobody")
    assert outer == [("a", 0.0, "one"), ("b", 0.5, "two"), ("c", 1.0, "three")]
    assert inner == [("b", 0.5, "two")]


def test_a_stage_may_report_from_another_thread() -> None:
    heard: Heard = []
    with listening(lambda *event: heard.append(event)):
        progress = progress_of("stage")
        thread = threading.Thread(target=progress, args=(1.5, "text"))
        thread.start()
        thread.join()
    assert heard == [("stage", 1.0, "text")]
