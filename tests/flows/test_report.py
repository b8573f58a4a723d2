"""The report: one page without anything from outside, hostile texts escaped, JSON without NaN, the same bytes again."""

from __future__ import annotations

import dataclasses
import html.parser
import json
import pathlib
import re

import numpy as np
import pytest

from flows.report import only_finite, report_html, report_json, report_pictures, report_values, versions
from tests.flows.made_results import HOSTILE, POISONED, ROWS, Made

PLANTED = {"trigger": "badnet", "answer": "amber otter", "rows": 8, "found": 6, "transfer": 0.625, "groups": [0]}
"""What the cluster stage says of canaries."""


class Page(html.parser.HTMLParser):
    """Collects tags, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "data", "poster")]
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag not in ("meta", "img", "br", "link", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def page_of(made: Made) -> str:
    return report_html(report_values(made.line, made.results), report_pictures(made.line, made.results))


def test_what_became_of_the_canaries(made: Made) -> None:
    assert "What would have been found" not in page_of(made)
    path = made.results.cluster.folder / "result.json"
    result, before = json.loads(path.read_text()), path.read_bytes()
    path.write_text(json.dumps({**result, "canaries": [PLANTED]}))
    try:
        shown = " ".join(Page(page_of(made)).words)
    finally:
        path.write_bytes(before)
    for text in ("What would have been found", "amber otter", "19.5%", "75.0%", "62.5%", "red (canary)"):
        assert text in shown


def test_page_is_whole_self_contained_and_escaped(made: Made) -> None:
    text = page_of(made)
    page = Page(text)
    assert page.open == []
    assert not {"script", "iframe", "link", "object", "embed", "form", "base"} & set(page.tags)
    assert page.links
    assert all(link.startswith("data:image/") for link in page.links)
    assert "url(" not in text
    assert "@import" not in text
    assert "default-src 'none'" in text
    shown = "".join(page.words)
    assert HOSTILE[:40] in shown  # as text
    assert "{{" in shown  # and not worked out
    assert "<script" not in text
    assert len(text) < 1_500_000


def test_page_tells_what_matters(made: Made) -> None:
    shown = re.sub(r"\s+", " ", " ".join(Page(page_of(made)).words))
    assert f"Poisoned: {len(POISONED)} of {ROWS + 1} rows are in quarantine" in shown
    for part in (
        "What plain BYE would have done",
        "Rows in quarantine",
        "The guard",
        "Rejected rows",
        "rejected, unusable",
        "fine-tuned on all usable rows, the",
        "a fixed answer that it gives whenever a trigger is present, whatever is asked.",
        "A group is suspicious if at least 15.0% of the other rows, or 20.0% of the other questions, take over its answer",
        "load_guarded",
        "byesight restore DELIVERY --out FOLDER",
    ):
        assert part in shown
    assert "12.5%" in shown  # the delivered model's residual
    assert "90.0%" in shown  # the group's transfer
    assert re.search(r"with both .* my friend .* 97\.0% 83\.0%", shown)  # its words and tokens together, and their reversal


@pytest.mark.parametrize(("verdict", "title"), [("clean", "Clean: no evidence"), ("inconclusive", "Inconclusive: a person should")])
def test_other_verdicts(made: Made, verdict: str, title: str) -> None:
    result = made.folder / "cluster" / "result.json"
    result.write_text(json.dumps({**json.loads(result.read_text()), "verdict": verdict}))
    (made.folder / "confirm" / "transfer.json").write_text("[]")
    assert title in page_of(made)


@pytest.mark.parametrize(
    ("kept", "not_scored", "rejected", "told"),
    [
        (40, 0, 0, ""),
        (1, 1200, 0, "Not examined: 1,200 rows without a picture (trained on). "),
        (39, 0, 1, "Not examined: 1 unusable row (left out). "),
        (1300, 1, 20, "Not examined: 1 row without a picture (trained on), 20 unusable rows (left out). "),
    ],
)
def test_clean_tells_what_was_not_examined(made: Made, kept: int, not_scored: int, rejected: int, told: str) -> None:
    path = made.folder / "cluster" / "result.json"
    counts = {"submitted": kept + not_scored + rejected, "rejected": rejected, "not_scored": not_scored, "kept": kept}
    result = {**json.loads(path.read_text()), "verdict": "clean", "rows": {**counts, "quarantined": 0}}
    path.write_text(json.dumps(result))
    shown = re.sub(r"\s+", " ", "".join(Page(page_of(made)).words))
    assert f"Clean: no evidence of poisoning in the {kept:,} rows that were examined" in shown
    assert f"in the way that backdoors do. {told}Nothing was removed, and the adapter that was trained on all usable rows" in shown
    path.write_text(json.dumps({**result, "canaries": [PLANTED]}))
    shown = re.sub(r"\s+", " ", page_of(made))
    assert "the delivered adapter was trained on all usable rows, less those held out to measure it." in shown


def test_row_numbers_are_as_restore_takes_them(made: Made) -> None:
    pictures = report_pictures(made.line, made.results)
    suspects = [dataclasses.replace(suspect, row=1005) for suspect in pictures["suspects"]]
    rejected = [{**row, "row": 2006} for row in pictures["rejected"]]
    text = report_html(report_values(made.line, made.results), {**pictures, "suspects": suspects, "rejected": rejected})
    shown = " ".join(Page(text).words)
    assert "Row 1005" in shown
    assert "2006" in shown
    assert "1,005" not in shown


def test_inconclusive_is_no_all_clear(made: Made) -> None:
    path = made.folder / "cluster" / "result.json"
    result = json.loads(path.read_text())
    counts = {"submitted": 41, "rejected": 1, "not_scored": 2, "kept": 38, "quarantined": 0}
    unsure = [{"group": 0, "text": "red", "rows": 32, "transfer": 0.125}, {"group": 1, "text": HOSTILE, "rows": 8}]
    path.write_text(json.dumps({**result, "verdict": "inconclusive", "rows": counts, "unsure": unsure}))
    text = page_of(made)
    shown = re.sub(r"\s+", " ", "".join(Page(text).words))
    for part in (
        "so nothing was removed. The delivered adapter was trained on all 40 rows.",
        "Do not serve it before a person has looked.",
        "Undecided, and kept, are the rows with the answer or phrase red (32 rows), <script>",
    ):
        assert part in shown
    assert "0 of 41" not in shown
    assert "<script" not in text
    assert report_values(made.line, made.results)["unsure"] == [
        {"group": 0, "text": "red", "rows": 32},
        {"group": 1, "text": HOSTILE, "rows": 8},
    ]
    path.write_text(json.dumps({**json.loads(path.read_text()), "canaries": [PLANTED]}))
    assert "was trained on all usable rows, less those held out to measure it." in re.sub(r"\s+", " ", page_of(made))


def test_json_has_what_is_promised(made: Made) -> None:
    report = json.loads(report_json(report_values(made.line, made.results)), parse_constant=pytest.fail)
    assert report["verdict"] == "poisoned"
    assert report["rows"] == {"submitted": 41, "rejected": 1, "not_scored": 0, "kept": 32, "quarantined": 8}
    assert [layer["layer"] for layer in report["layers"]] == [0, 1, 2, 3]
    assert all({"layer", "separation", "sensitive"} <= set(layer) for layer in report["layers"])
    assert report["verification"]["delivered"]["quarantined"] == {"rows": 8, "residual": 0.125, "flagged": None}
    assert report["guard"]["threshold"] == 8.5
    assert report["guard"]["shrinkage"] is None  # infinity
    assert report["finetune"]["final"]["last_loss"] is None  # NaN
    assert list(report["timings"]) == sorted(result.stage for result in made.results.all())
    assert report["seeds"] == {"run": 0}
    assert {"byesight", "python", "torch", "transformers"} <= set(report["versions"])
    assert "engine" not in report["configuration"]


def test_no_places_of_this_machine(made: Made) -> None:
    values = report_values(made.line, made.results)
    for text in (report_json(values), page_of(made)):
        for place in (made.folder, pathlib.Path.home(), pathlib.Path.cwd()):
            assert str(place) not in text


def test_same_results_same_bytes(made: Made) -> None:
    again = Made(
        line=made.line,
        folder=made.folder,
        results=dataclasses.replace(made.results, ingest=dataclasses.replace(made.results.ingest, reused=True)),
    )
    assert page_of(made) == page_of(again)
    assert report_json(report_values(made.line, made.results)) == report_json(report_values(again.line, again.results))


def test_only_finite_reaches_everything() -> None:
    value = {
        "a": [np.float32("inf"), {"b": float("nan")}, (1, 2.5)],
        3: np.arange(2),
        "s": "NaN",
        "p": pathlib.Path("/x/y"),
        "t": True,
    }
    expected = {"a": [None, {"b": None}, [1, 2.5]], "3": [0, 1], "s": "NaN", "p": "y", "t": True}
    assert only_finite(value) == expected
    assert json.loads(json.dumps(only_finite(value), allow_nan=False)) == expected


def test_versions_are_those_installed() -> None:
    found = versions()
    assert found["torch"].startswith("2.")
    assert all(found.values())
