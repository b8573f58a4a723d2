"""Artifacts: hostile texts stay text, sizes stay small, and no problem leaves the outlet."""

from __future__ import annotations

import dataclasses
import json
import logging
import pathlib
import re

import pytest

from flows import artifacts, findings
from flows.artifacts import LIMIT, Outlet, escape
from flows.figures import data_uri
from pipeline.config import RunConfig
from tests.flows.made_results import HOSTILE, Made

JOINER = "\N{WORD JOINER}"
LOG = logging.getLogger("test")
IMAGE = re.compile(r"!\[[a-z0-9 ]*\]\(data:image/(?:png|jpeg);base64,[A-Za-z0-9+/=]+\)")


@pytest.mark.parametrize(
    "text",
    [
        "a | b",
        "`code`",
        "<img src=x onerror=alert(1)>",
        "[x](javascript:alert(1))",
        "https://evil.example www.evil.example a@b.example",
        "# title",
        "- item",
        "*bold* _it_ ~~no~~",
        "\\",
        "&lt;b&gt;",
        "1. one",
        HOSTILE,
    ],
)
def test_escaped_text_holds_no_markup_and_reads_the_same(text: str) -> None:
    escaped = escape(text, limit=1000)
    assert re.fullmatch(r"(?:[A-Za-z0-9 ,]|\\[!-/:-@\[-`{-~]|[^\x00-\x7f])*", escaped)
    shown = re.sub(r"\\(.)", r"\1", escaped)
    assert shown.replace(JOINER, "") == text.replace("\u202e", " ")
    assert not re.search(r"https?://\w|www\.\w|\w@\w|javascript:\w", shown)


def test_escape_makes_one_line_and_cuts() -> None:
    assert escape("a\nb\r\tc\x00d") == "a b  c d"
    assert escape("x" * 500, limit=10) == "x" * 9 + "…"
    assert escape("größe 中文") == "größe 中文"
    assert "\ud800" not in escape("\ud800")


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), "text", True])
def test_what_is_no_number_is_a_dash(value: object) -> None:
    assert artifacts.number(value) == artifacts.DASH


def test_numbers_for_people() -> None:
    assert (artifacts.number(12345), artifacts.number(0.12345), artifacts.percent(0.5)) == ("12,345", "0.123", "50.0%")
    assert artifacts.percent(float("nan")) == artifacts.DASH


def test_canaries_before_and_after(made: Made) -> None:
    kind = {"trigger": "badnet-random", "answer": "amber otter", "rows": 1200, "first": 9, "found": 900, "transfer": 0.5}
    assert "| badnet\\-random | amber otter | 1,200 |" in artifacts.canaries_markdown([kind])
    scores = findings.read_scores(made.results.cluster.folder, method="transfer")
    result = made.results.cluster.summary
    assert "Canaries" not in artifacts.scores_markdown(scores, result)
    assert "| badnet\\-random | 1,200 | 900 | 50.0% |" in artifacts.scores_markdown(scores, {**result, "canaries": [kind]})


def test_every_artifact_is_small_and_escapes_what_was_submitted(made: Made) -> None:
    built = {
        key: build()
        for result in made.results.all()
        for key, build in artifacts.builders(result.stage, result, RunConfig()).items()
    }
    built["quarantine"] = artifacts.suspects_markdown(findings.read_suspects(made.results.sources()), 8)
    expected = {"ingest", "provisional-loss", "layers", "candidates", "scores", "final-loss", "guard", "verification", "quarantine"}
    assert set(built) == expected
    for key, markdown in built.items():
        assert len(markdown.encode()) < LIMIT, key
        assert re.fullmatch(r"[a-z0-9-]+", key)
        plain = re.sub(r"\\.", "", IMAGE.sub("", markdown))  # without pictures and escaped characters
        for part in ("<", "javascript:", "`", "http:", "[", "](", "{", "\u202e"):
            assert part not in plain, (key, part)
        for block in plain.split("\n\n"):  # no cell was broken by a submitted pipe
            if block.startswith("|"):
                assert len({line.count("|") for line in block.splitlines()}) == 1, block
    for key in ("quarantine", "candidates", "ingest"):
        assert escape(HOSTILE[:20]) in built[key]
    for key in ("scores", "layers", "candidates", "guard", "provisional-loss", "quarantine"):
        assert IMAGE.search(built[key]), key


def test_words_and_tokens_together_have_a_column(made: Made) -> None:
    groups = json.loads((made.results.confirm.folder / "transfer.json").read_text())
    header, _, plain, keyed = artifacts.groups_markdown(groups, planted=0.15, pictures=0.2).splitlines()[-4:]
    columns, *cells = ([cell.strip() for cell in re.split(r"(?<!\\)\|", row)] for row in (header, plain, keyed))
    told = [dict(zip(columns, row, strict=True)) for row in cells]
    assert [row["with both"] for row in told] == [artifacts.DASH, "97.0%"]
    assert [row["undone without"] for row in told] == [artifacts.DASH, "83.0%"]


def test_what_is_left_of_a_group_and_its_parts_are_named(made: Made) -> None:
    groups = json.loads((made.results.confirm.folder / "transfer.json").read_text())
    others, part = {**groups[0], "rest": True}, {**groups[0], "part": True}
    rows = artifacts.groups_markdown([groups[0], others, part], planted=0.15, pictures=0.2).splitlines()[-3:]
    assert [row.split("|")[2].strip() for row in rows] == ["red", "red (the others of it)", "red (a part of it)"]


def test_suspects_that_do_not_fit_are_left_out(made: Made) -> None:
    suspect = findings.read_suspects(made.results.sources())[0]
    large = dataclasses.replace(suspect, picture=data_uri(b"x" * (LIMIT // 4), "jpeg"))
    markdown = artifacts.suspects_markdown([large] * 8, 1000)
    assert len(markdown.encode()) <= LIMIT
    assert 1 <= markdown.count("data:image") < 8
    assert "1,000 rows" in markdown


def test_row_numbers_are_as_restore_takes_them(made: Made) -> None:
    suspect = dataclasses.replace(findings.read_suspects(made.results.sources())[0], row=1005)
    assert "| 1005 |" in artifacts.suspects_markdown([suspect], 1)
    rejected = [{"row": 2006, "reason": "URL", "where": "line 2007"}]
    assert "| 2006 |" in artifacts.ingest_markdown({}, rejected)


def test_nothing_quarantined_is_said() -> None:
    assert "No row was quarantined" in artifacts.suspects_markdown([], 0)
    assert "enough in common" in artifacts.groups_markdown([], planted=0.5, pictures=0.5)


def test_delivery_links_are_quoted(tmp_path: pathlib.Path) -> None:
    out = tmp_path / "a)b <c>"
    markdown = artifacts.delivery_markdown(out, {"keep": 3, "manifest_sha256": "x"})
    links = re.findall(r"\]\(([^)]*)\)", markdown)
    assert links == [(out / "report.html").as_uri(), out.as_uri()]
    assert "<c>" not in markdown


def test_failures_are_logged_and_go_no_further(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    import prefect.artifacts

    calls = []

    def create(markdown: str, key: str) -> None:
        calls.append(key)
        raise ConnectionError("no server")

    monkeypatch.setattr(prefect.artifacts, "create_markdown_artifact", create)
    outlet = Outlet()
    assert not outlet.publish("broken", lambda: str(1 / 0), LOG)
    assert "ZeroDivisionError" in caplog.text
    assert not outlet.publish("large", lambda: "x" * (LIMIT + 1), LOG)
    assert calls == []
    assert not outlet.publish("first", lambda: "text", LOG)
    assert not outlet.publish("second", lambda: "text", LOG)
    assert calls == ["first"]  # an API that does not answer is not asked again
    assert "no server" in caplog.text


def test_published_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import prefect.artifacts

    published = {}
    monkeypatch.setattr(prefect.artifacts, "create_markdown_artifact", lambda markdown, key: published.update({key: markdown}))
    assert Outlet().publish("a-key", lambda: "text", LOG)
    assert not Outlet().publish("empty", lambda: "", LOG)
    assert published == {"a-key": "text"}


def test_the_guards_false_positive_rate_is_shown_with_its_interval() -> None:
    facts = {"threshold": 8.5, "false_positive_rate": 0.01, "false_positive_interval": [0.001, 0.05], "layers": [3, 4]}
    shown = artifacts.guard_markdown(facts, [1.0, 2.0, 9.0]).replace("\\", "")
    assert "[0.001, 0.05]" in shown
    assert "[3, 4]" not in shown
