"""The run configuration: what a file may say, what is refused and by which name, and what changes do to it."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import pydantic
import pytest
import yaml

from pipeline.config import CLEANSIGHT, RunConfig, Section, load_config
from pipeline.errors import ConfigError

SECTIONS = {name: value for name, value in RunConfig() if isinstance(value, Section)}


def fields() -> Iterator[tuple[str, type[Section], str]]:
    """Dotted name, section and field of everything that a run can be told."""
    for name in RunConfig.model_fields:
        if name in SECTIONS:
            yield from ((f"{name}.{field}", type(SECTIONS[name]), field) for field in type(SECTIONS[name]).model_fields)
        else:
            yield name, RunConfig, name


@pytest.fixture
def file(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "run.yaml"


def test_every_field_is_described() -> None:
    names = [name for name, _, _ in fields()]
    assert len(names) > 35
    for name, section, field in fields():
        description = section.model_fields[field].description
        assert description, name
        assert description.strip().endswith("."), f"{name}: {description!r} is no sentence"
    assert all((type(section).__doc__ or "").strip() for section in SECTIONS.values())


def test_every_default_is_a_value_that_would_be_accepted() -> None:
    for name, section, field in fields():
        info = section.model_fields[field]
        assert not info.is_required(), name
        section.model_validate({field: info.default})
    assert RunConfig.model_validate(RunConfig().model_dump()) == RunConfig()


def test_the_configuration_goes_into_keys_and_back_through_files(file: pathlib.Path) -> None:
    """A stage's key is made of JSON; the form of `--config` is YAML."""
    values = RunConfig(seed=7).model_dump()
    assert RunConfig.model_validate(json.loads(json.dumps(values, allow_nan=False))) == RunConfig(seed=7)
    file.write_text(yaml.safe_dump(values))
    assert load_config(file) == RunConfig(seed=7)


@pytest.mark.parametrize("text", ["", "~", "{}", "# only a remark\n"], ids=repr)
def test_an_empty_file_is_the_defaults(text: str, file: pathlib.Path) -> None:
    file.write_text(text)
    assert load_config(file) == load_config() == RunConfig()


def test_a_file_may_name_a_part(file: pathlib.Path) -> None:
    file.write_text("seed: 5\nfinetune:\n  epochs: 2\n  learning_rate: 1e-3\n")
    found = load_config(file)
    assert (found.seed, found.finetune.epochs, found.finetune.learning_rate) == (5, 2, 1e-3)
    assert found.finetune.batch_size == RunConfig().finetune.batch_size
    assert found.model_copy(update={"seed": 0, "finetune": RunConfig().finetune}) == RunConfig()


REFUSED: dict[str, tuple[str, str]] = {
    "unknown section": ("fintune: {epochs: 1}", r": unknown key fintune; did you mean finetune\?$"),
    "unknown key": ("finetune: {epoch: 1}", r": unknown key finetune\.epoch; did you mean finetune\.epochs\?$"),
    "unknown, like none": ("{zzz: 1, finetune: {zzz: 1}}", r": unknown key finetune\.zzz; unknown key zzz$"),
    "a key that is no text": ("1: 2", ": 1: 1: keys should be strings$"),
    "below the range": ("finetune: {epochs: 0}", r"finetune\.epochs: 0: input should be greater than 0$"),
    "above the range": ("cluster: {removal_cap: 1.01}", r"cluster\.removal_cap: 1\.01: input should be less than or equal to 1$"),
    "not one of": ("dtype: float16", "dtype: 'float16': input should be 'auto', 'float32' or 'bfloat16'$"),
    "a fraction of a row": ("guard: {reference_rows: 20.5}", r"guard\.reference_rows: 20\.5: input should be a valid integer"),
    "text for a number": ("finetune: {batch_size: abc}", r": finetune\.batch_size: 'abc': input should be a valid integer"),
    "a long text": (f"seed: {'a' * 300}", r": seed: 'a+\.\.\.a+': input should be a valid integer"),
    "neither of two kinds": ("guard: {layers: x}", r": guard\.layers: 'x': input should be 'all' or 'middle' or input .* tuple$"),
    "an item of a list": ("guard: {layers: [0, -1]}", r"guard\.layers\.1: -1: input should be greater than or equal to 0$"),
    "what the section refuses": ("cluster: {remove: [a], keep: [a]}", ": cluster: remove and keep both name 'a'$"),
    "what a key refuses": ("canary: {triggers: [any]}", r": canary\.triggers: no trigger is called 'any'; there are "),
    "not a number": ("finetune: {epochs: .nan}", r"finetune\.epochs: nan: input should be a finite number$"),
    "infinity": ("score: {bsi_threshold: .inf}", r"score\.bsi_threshold: inf: input should be a finite number$"),
    "a section without a value": ("finetune:", ": finetune: null: input should be a valid dictionary"),
    "a section that is a list": ("finetune: [1]", r": finetune: \[1\]: input should be a valid dictionary"),
    "itself": ("finetune: &a {epochs: *a}", r"finetune\.epochs: .*: input should be a valid number$"),
    "two at once": ("{seed: -1, finetune: {lora_rank: 0}}", r": seed: -1: .*; finetune\.lora_rank: 0: "),
    "a list": ("- seed", "must be a mapping of sections, not list"),
    "a word": ("seed", "must be a mapping of sections, not str"),
    "not YAML": ("seed: 1\n\na: b: c", " line 3: not YAML: mapping values are not allowed here$"),
    "cut": ("seed: [1", " line 1: not YAML: expected ',' or ']', but got '<stream end>'$"),
    "a tab": ("\tseed: 1", r" line 1: not YAML: found character '\\t' that cannot start any token$"),
    "a control character": ("seed: 1\ndtype: \x07", " line 2: not YAML: special characters are not allowed$"),
    "a tag that would run code": (
        "seed: !!python/object/apply:os.getpid []",
        " line 1: not YAML: could not determine a constructor",
    ),
    "a date that is none": ("seed: 2024-13-45", "can't be read: month must be in 1..12"),
    "a number without end": ("seed: " + "1" * 5000, "can't be read: Exceeds the limit"),
    "deep nesting": ("[" * 3000, "can't be read: maximum recursion depth"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_is_refused_by_name(name: str, file: pathlib.Path) -> None:
    text, says = REFUSED[name]
    file.write_text(text)
    with pytest.raises(ConfigError, match=says) as caught:
        load_config(file)
    assert str(caught.value).startswith((f"{file}: ", f"{file} line "))
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_opened(file: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.yaml: the configuration can't be read: No such file or directory$"):
        load_config(file)
    with pytest.raises(ConfigError, match=r"can't be read: Is a directory$"):
        load_config(file.parent)
    file.write_bytes(b"seed: \xff\n")
    with pytest.raises(ConfigError, match="can't be read: 'utf-8' codec"):
        load_config(file)


def test_changes_are_merged_into_their_section(file: pathlib.Path) -> None:
    file.write_text("seed: 5\nfinetune: {epochs: 2, lora_rank: 4}\n")
    found = load_config(file, seed=6, finetune={"epochs": 3}, engine={"kind": "local"})
    assert (found.seed, found.finetune.epochs, found.finetune.lora_rank, found.engine.kind) == (6, 3, 4, "local")
    assert load_config(file) == load_config(file, finetune={}), "what was read before is not changed"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"seeds": 1}, r"configuration: unknown key seeds; did you mean seed\?$"),
        ({"finetune": {"epochs": math.inf}}, r"finetune\.epochs: inf: "),
        ({"finetune": None}, "finetune: null: input should be a valid dictionary"),
        ({"seed": 2**31}, "seed: 2147483648: input should be less than 2147483648"),
    ],
    ids=repr,
)
def test_changes_are_checked_as_a_file_is(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_config(**changes)


def test_a_configuration_does_not_change() -> None:
    config = RunConfig()
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        config.seed = 1  # type: ignore[misc]
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        config.finetune.epochs = 1  # type: ignore[misc]


def test_the_guard_as_published() -> None:
    guard = load_config(None, guard={"policy": "cleansight", "tau": 0.02, "reference_rows": 200}).guard
    assert {name: getattr(guard, name) for name in CLEANSIGHT} == dict(CLEANSIGHT)
    assert (guard.tau, guard.reference_rows) == (0.02, 200)
    assert load_config(None, guard={"policy": "cleansight", "whitening": "full"}).guard.whitening == "full"
    assert RunConfig().guard.purification == "rewind"
    with pytest.raises(ConfigError, match="it needs layers: middle"):
        load_config(None, guard={"purification": "published"})
