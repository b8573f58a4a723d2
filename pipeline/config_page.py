"""The page of all configuration keys: `python -m pipeline.config_page > docs/configuration.md`."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.config import RunConfig, Section

_NAMES = {"integer": "whole number", "number": "number", "string": "text", "boolean": "`true` or `false`", "null": "`null`"}
_PLURALS = {"integer": "whole numbers", "string": "names"}
_LIMITS = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "up to", "exclusiveMaximum": "below"}

HEAD = """\
# Configuration

What a run can be told, with the defaults. A YAML file names what shall differ, and nothing else:

```yaml
# run.yaml
seed: 1
ingest: {max_image_bytes: 20000000}
finetune:
  epochs: 3
  batch_size: 32
guard: {action: refuse}
```

    byesight sanitize SUBMISSION --base MODEL_DIR --out DELIVERY --config run.yaml

On the command line `--seed`, `--workers`, `--engine` and `--format` override the file. In Python:

    import pathlib
    import byesight
    from pipeline.config import load_config

    byesight.sanitize("SUBMISSION", "DELIVERY", base="MODEL_DIR", config=load_config(pathlib.Path("run.yaml"), seed=2))

An unknown key, or a value out of its range, is an error that names it. What a run used is in `report.json` (`configuration`) and
`manifest.json` (`facts.configuration`), all but the section `engine`, which is in no stage's key. A run with another value repeats
the stages that depend on it and finds the others in the store: with another `guard`, the guard and the verification alone.

This page is made by `python -m pipeline.config_page > docs/configuration.md`; the descriptions are those of `pipeline/config.py`.
"""


def page() -> str:
    """The whole page, Markdown."""
    sections = {name: value for name, value in RunConfig() if isinstance(value, Section)}
    parts = [HEAD, "## Top level\n", *_table(RunConfig, leave_out=sections)]
    for name, section in sections.items():
        parts += [f"\n## {name}\n", f"{inspect.getdoc(section)}\n", *_table(type(section))]
    return "\n".join(parts) + "\n"


def allowed(schema: Mapping[str, Any]) -> str:
    """What a key may be, in words.

    Args:
        schema: the JSON schema that pydantic gives for it.
    """
    if "anyOf" in schema:
        return " or ".join(allowed(kind) for kind in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if schema["type"] == "array":
        return f"a list of {_PLURALS[schema['items']['type']]}"
    return " ".join([_NAMES[schema["type"]], *_bounds(schema)])


def _bounds(schema: Mapping[str, Any]) -> Iterator[str]:
    limits = dict(schema)
    if schema["type"] == "integer":
        for exclusive, name, step in (("exclusiveMinimum", "minimum", 1), ("exclusiveMaximum", "maximum", -1)):
            if exclusive in limits:
                limits[name] = limits.pop(exclusive) + step
    for name, words in _LIMITS.items():
        if name in limits:
            yield f"{words} {_value(limits[name])}"


def _table(section: type[Section], leave_out: Mapping[str, Any] | None = None) -> Iterator[str]:
    """The table of a section's keys, line by line."""
    yield "| key | default | may be | meaning |"
    yield "|---|---|---|---|"
    for name, schema in section.model_json_schema()["properties"].items():
        if name not in (leave_out or {}):
            cells = (f"`{name}`", f"`{_value(schema['default'])}`", allowed(schema), schema["description"])
            yield "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def _value(value: Any) -> str:
    """A value as YAML reads it."""
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return value if isinstance(value, str) else json.dumps(value)


if __name__ == "__main__":
    sys.stdout.write(page())
