"""The page of configuration keys: current, complete, and an example that is read."""

from __future__ import annotations

import pathlib
import re
from typing import Any

import pytest

from pipeline.config import RunConfig, Section, load_config
from pipeline.config_page import HEAD, allowed, page

DOCS = pathlib.Path(__file__).parents[2] / "docs" / "configuration.md"


def test_the_committed_page_is_current() -> None:
    assert DOCS.read_text(encoding="utf-8") == page(), "run: python -m pipeline.config_page > docs/configuration.md"


def test_every_key_has_a_line_under_its_section() -> None:
    parts = dict(re.findall(r"^## (.+)\n((?:(?!## ).*\n)*)", page(), flags=re.MULTILINE))
    sections = {name: type(value) for name, value in RunConfig() if isinstance(value, Section)}
    assert list(parts) == ["Top level", *sections]
    for name, section in sections.items():
        keys = re.findall(r"^\| `(\w+)` \|", parts[name], flags=re.MULTILINE)
        assert keys == list(section.model_fields)
    assert "| `seed` | `0` |" in parts["Top level"]


def test_every_line_of_a_table_has_four_cells() -> None:
    lines = [line for line in page().splitlines() if line.startswith("|")]
    assert len(lines) > 50
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {5}


def test_the_example_is_read(tmp_path: pathlib.Path) -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", HEAD, flags=re.DOTALL)
    (tmp_path / "run.yaml").write_text(example)
    found = load_config(tmp_path / "run.yaml")
    assert (found.seed, found.ingest.max_image_bytes, found.finetune.epochs, found.guard.action) == (1, 20_000_000, 3, "refuse")


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 8}, "whole number from 1 up to 7"),
        ({"type": "integer", "minimum": 0}, "whole number from 0"),
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}, "number above 0 up to 0.5"),
        ({"type": "number", "minimum": 0.0, "exclusiveMaximum": 1}, "number from 0 below 1"),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "text or `null`"),
        ({"enum": ["a", "b"], "type": "string"}, "`a`, `b`"),
        ({"items": {"type": "string"}, "type": "array"}, "a list of names"),
        ({"type": "boolean"}, "`true` or `false`"),
    ],
    ids=str,
)
def test_what_a_key_may_be(schema: dict[str, Any], expected: str) -> None:
    assert allowed(schema) == expected
