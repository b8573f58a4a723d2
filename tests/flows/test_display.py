"""The display: bars on a terminal, lines elsewhere, and no markup from outside."""

from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console

from flows.display import Display


def test_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    now = iter([0.0, 1.0, 11.0, 12.0, 13.0])
    monkeypatch.setattr("flows.display.time.monotonic", lambda: next(now))
    with Display(Console(file=out, force_terminal=False, width=100)) as display:
        display("ingest", 0.0, "")
        display("ingest", 0.2, "2 of 10 rows")
        display("ingest", 0.5, "5 of 10 [bold]rows")
        display("ingest", 1.0, "done in 1.0 s")
        display("unknown", 0.0, "")
    assert out.getvalue().splitlines() == [
        "read the submission ...",
        "read the submission: 50%, 5 of 10 [bold]rows",
        "read the submission: done in 1.0 s",
        "unknown ...",
    ]


def test_bars_on_a_terminal_show_text_as_it_is() -> None:
    out = io.StringIO()
    with Display(Console(file=out, force_terminal=True, width=120)) as display:
        display("provisional", 0.5, "step 1 [red]of[/red] 2")
        display("provisional", 1.0, "[/nonsense] done")
    assert "fine-tune on all rows" in out.getvalue()
    assert "[/nonsense] done" in out.getvalue()


def test_warnings_of_the_stages_are_shown_while_it_runs() -> None:
    out = io.StringIO()
    with Display(Console(file=out, force_terminal=False, width=200)):
        logging.getLogger("storage.store").warning("a stored result is [damaged]")
    logging.getLogger("storage.store").warning("later")
    assert "a stored result is [damaged]" in out.getvalue()
    assert "later" not in out.getvalue()
