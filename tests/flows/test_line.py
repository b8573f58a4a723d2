"""What a stage's key depends on, what is done again, and the folder that a stage works in; the stages themselves are made up."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import inspect
import json
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import pyarrow.parquet as pq
import pytest

from flows import line as stages
from flows.line import NO_MATTER, STAGES, Line, open_line, special_tokens
from flows.progress import listening
from pipeline.config import CanaryConfig, RunConfig, Section
from pipeline.engine import Engine
from pipeline.errors import ConfigError, ModelError, StageError, SubmissionError
from stages.cluster.run import TRAIN
from storage.formats import digest_submission
from storage.store import StageResult
from tests.storage.submissions import imagefolder, qa

MODULES = {
    name: f"stages.{name}.run" for name in ("ingest", "canary", "extract", "score", "confirm", "cluster", "guard", "verify")
} | {"finetune": "stages.finetune"}
FILES = {
    "ingest": ("rows/shard-00000.parquet", "rejected.parquet"),
    "canary": ("rows/shard-00000.parquet", "canaries.json"),
    "finetune": ("adapter/weights",),
    "extract": ("attention.parquet",),
    "score": ("groups.json", "members.parquet", "evidence.parquet"),
    "confirm": ("transfer.json", "rows.parquet"),
    "cluster": (TRAIN, "keep.parquet", "verdicts.parquet", "held_out.parquet"),
    "guard": ("guard.json",),
    "verify": ("verification.json",),
}
"""What the stages after it take from a stage's result."""
ALL = [stage for stage in STAGES if stage != "delivery"]
NOT_DATA = {"out", "scratch", "base", "engine", "progress"}


class Stages:
    """Stands in for the stages' `run`: a result is the hash of all that is given, files by their content."""

    def __init__(self) -> None:
        self.given: list[dict[str, Any]] = []
        self.names: list[str] = []
        self.scratch: list[tuple[str, list[str]]] = []
        self.fail: str | None = None
        self.constant: set[str] = set()

    def made(self, name: str, real: Callable[..., Any]) -> Callable[..., Mapping[str, Any]]:
        signature = inspect.signature(real)

        def run(*arguments: Any, **named: Any) -> Mapping[str, Any]:
            given = signature.bind(*arguments, **named).arguments
            out = given["out"]
            assert list(out.iterdir()) == []
            if "scratch" in given:
                self.scratch.append((name, sorted(path.name for path in given["scratch"].iterdir())))
                (given["scratch"] / f"left-by-{name}").touch()
            if self.fail == name:
                raise StageError(f"no {name} today")
            self.names.append(name)
            self.given.append({key: value for key, value in given.items() if key not in NOT_DATA - {"base"}})
            data = {key: fingerprint(value) for key, value in given.items() if key not in NOT_DATA}
            content = name if name in self.constant else f"{name} {sorted(data.items())}"
            for file in FILES[name]:
                (out / file).parent.mkdir(exist_ok=True)
                (out / file).write_text(f"{file}: {content}")
            given["progress"](0.5, "half")
            return {"stage": name, "submitted": 2}

        return run


def fingerprint(value: Any) -> str:
    """Of a path its files; of a configuration its values."""
    if isinstance(value, pathlib.Path):
        assert value.exists(), f"{value.name} is not where the stage before it puts it"
        files = sorted(path for path in value.rglob("*") if path.is_file()) if value.is_dir() else [value]
        return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    return repr(value)


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> Stages:
    found = Stages()
    for name, module in MODULES.items():
        monkeypatch.setattr(f"{module}.run", found.made(name, importlib.import_module(module).run))
    return found


@pytest.fixture
def opened(tmp_path: pathlib.Path, tiny_base: pathlib.Path, made_up: Stages) -> Callable[..., Line]:
    """Opens a line on the same submission and store, with another configuration if one is given."""
    submission = imagefolder(tmp_path / "submission", [qa(0), qa(1)])

    def open_it(config: RunConfig | None = None, **places: pathlib.Path) -> Line:
        places = {"submission": submission, "base": tiny_base, "store": tmp_path / "store", **places}
        return open_line(**places, config=config or RunConfig(), engine=cast("Engine", None))

    return open_it


def whole(line: Line) -> dict[str, StageResult]:
    """All stages but the delivery."""
    found = stages.until_clusters(line)
    ingested, provisional, clustered = found["ingest"], found["provisional"], found["cluster"]
    final = stages.finetune(line, "final", ingested, clustered)
    guarded = stages.guard(line, ingested, clustered, final)
    verified = stages.verify(line, ingested=ingested, provisional=provisional, clustered=clustered, final=final, guarded=guarded)
    return {**found, "final": final, "guard": guarded, "verify": verified}


def redone(line: Line) -> list[str]:
    return [stage for stage, result in whole(line).items() if not result.reused]


@pytest.mark.parametrize("quarantined", [0, 1])
def test_the_provisional_adapter_is_the_final_one_where_nothing_was_removed(
    quarantined: int, opened: Callable[..., Line], made_up: Stages
) -> None:
    line = opened()
    found = stages.until_clusters(line)
    ingested, provisional = found["ingest"], found["provisional"]
    clustered = dataclasses.replace(found["cluster"], summary={"rows": {"quarantined": quarantined}})
    before = len(made_up.given)
    final = stages.final(line, ingested=ingested, provisional=provisional, clustered=clustered)
    assert final.stage == "final"
    assert len(made_up.given) == before + quarantined
    if quarantined:
        assert final.digest == stages.finetune(line, "final", ingested, clustered).digest != provisional.digest
    else:
        assert (final.folder, final.digest, final.seconds) == (provisional.folder, provisional.digest, 0.0)


@pytest.mark.parametrize(("accepted", "text_only"), [(50, 0), (60, 10), (49, 0), (200, 151)])
def test_too_few_rows_with_pictures_are_told_before_the_first_fine_tune(
    accepted: int, text_only: int, opened: Callable[..., Line]
) -> None:
    found = stages.ingest(opened())
    ingested = dataclasses.replace(found, summary={**found.summary, "accepted": accepted, "text_only": text_only})
    if accepted - text_only >= 50:
        stages.check_enough(ingested)
    else:
        with pytest.raises(
            SubmissionError, match="49 rows with pictures can be used; the guard takes its reference from 50 at least"
        ):
            stages.check_enough(ingested)


def test_canaries_are_for_the_provisional_model_alone(opened: Callable[..., Line], made_up: Stages) -> None:
    line = opened(RunConfig(canary=CanaryConfig(share=0.01, triggers=("sig",))))
    found = stages.until_clusters(line)
    given = dict(zip(made_up.names, made_up.given, strict=True))
    planted = found["canary"]
    assert (given["canary"]["first"], given["canary"]["least"]) == (2, 8)
    for name in ("finetune", "extract", "confirm"):
        assert given[name]["rows"] == planted.folder / "rows"
    assert given["cluster"]["rows"] == found["ingest"].folder / "rows"
    assert given["cluster"]["canaries"] == planted.folder / "canaries.json"
    clustered = dataclasses.replace(found["cluster"], summary={"rows": {"quarantined": 0}})
    final = stages.final(line, ingested=found["ingest"], provisional=found["provisional"], clustered=clustered)
    assert final.folder != found["provisional"].folder
    assert made_up.given[-1]["rows"] == found["ingest"].folder / "rows"
    plain = stages.until_clusters(opened())
    assert "canary" not in plain
    assert plain["ingest"].reused
    assert not plain["provisional"].reused
    assert made_up.given[-1]["canaries"] is None


def test_a_second_run_repeats_nothing(opened: Callable[..., Line]) -> None:
    first = whole(opened())
    assert list(first) == ALL
    assert not any(result.reused for result in first.values())
    second = whole(opened())
    assert all(result.reused for result in second.values())
    for stage in ALL:
        assert (first[stage].key, first[stage].digest, first[stage].folder) == (
            second[stage].key,
            second[stage].digest,
            second[stage].folder,
        )
    assert stages.seconds_of(list(first.values())) == stages.seconds_of(list(second.values()))


def test_a_key_covers_everything_that_a_stage_is_given(opened: Callable[..., Line], made_up: Stages) -> None:
    """A file that a stage reads is of an input, a value that it is told is in the configuration that the key is made of."""
    line = opened(RunConfig.model_validate({"seed": 41, "dtype": "float32", "verify": {"held_out_share": 0.125}}))
    results = whole(line)
    places = {result.folder: result.digest for result in results.values()}
    places |= {line.base: line.identity, line.submission: digest_submission(line.submission)}
    assert len(made_up.given) == len(ALL)
    for stage, given in zip(ALL, made_up.given, strict=True):
        manifest = json.loads((results[stage].folder / "manifest.json").read_bytes())
        for name, value in given.items():
            if isinstance(value, pathlib.Path):
                (digest,) = [digest for folder, digest in places.items() if value.is_relative_to(folder)]
                assert digest in manifest["inputs"].values(), f"{stage} reads {name}, which its key doesn't know"
            elif value is not None:
                told = value.model_dump(mode="json", exclude=NO_MATTER) if isinstance(value, Section) else value
                assert told in manifest["config"].values(), f"{stage} is told {name}, which its key doesn't know"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"ingest": {"shard_rows": 3}}, ALL),
        ({"canary": {"share": 0.1}}, ["canary", *ALL[1:]]),
        ({"finetune": {"epochs": 1}}, ALL[1:]),
        ({"finetune": {"gradient_checkpointing": True}}, []),
        ({"seed": 1}, ALL[1:]),
        ({"dtype": "bfloat16"}, ALL[1:]),
        ({"extract": {"top_tokens": 4}}, ALL[2:]),
        ({"score": {"least_rows": 9}}, ALL[3:]),
        ({"confirm": {"hosts": 32}}, ALL[4:]),
        ({"cluster": {"transfer": 0.5}}, ALL[5:]),
        ({"verify": {"held_out_share": 0.1}}, ALL[5:]),
        ({"guard": {"action": "refuse"}}, ALL[7:]),
        ({"verify": {"max_rows": 8}}, ALL[8:]),
        ({"engine": {"kind": "local", "workers": 3, "threads": 2}}, []),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_change_redoes_its_stage_and_the_later_ones(
    change: dict[str, Any], expected: Sequence[str], opened: Callable[..., Line]
) -> None:
    whole(opened())
    changed = RunConfig.model_validate(change)
    assert redone(opened(changed)) == list(expected)
    assert redone(opened(changed)) == []
    assert redone(opened()) == [], "what was there before is kept"


@pytest.mark.parametrize(("module", "expected"), [("stages.score.run", ["score"]), ("stages.finetune", ["provisional", "final"])])
def test_what_comes_out_the_same_ends_the_redoing(
    module: str, expected: list[str], opened: Callable[..., Line], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole(opened())
    monkeypatch.setattr(f"{module}.VERSION", 99)
    assert redone(opened()) == expected


def test_a_stage_whose_result_ignores_a_setting_is_redone_alone(opened: Callable[..., Line], made_up: Stages) -> None:
    made_up.constant = {"extract"}
    whole(opened())
    assert redone(opened(RunConfig.model_validate({"extract": {"batch_size": 3}}))) == ["extract"]


def test_the_submission_counts_by_its_content(opened: Callable[..., Line], tmp_path: pathlib.Path) -> None:
    line = opened()
    whole(line)
    moved = pathlib.Path(shutil.copytree(line.submission, tmp_path / "elsewhere"))
    assert redone(opened(submission=moved)) == []
    (moved / "images/0.png").write_bytes((moved / "images/1.png").read_bytes())
    assert redone(opened(submission=moved))[0] == "ingest"


def test_another_base_redoes_all_but_the_ingest(
    opened: Callable[..., Line], tiny_base: pathlib.Path, tmp_path: pathlib.Path, made_up: Stages
) -> None:
    """The rows depend on the base only through its special tokens."""
    made_up.constant = {*MODULES}
    whole(opened())
    other = pathlib.Path(shutil.copytree(tiny_base, tmp_path / "base"))
    assert redone(opened(base=other)) == []
    with (other / "chat_template.jinja").open("a") as file:
        file.write("{# other #}")
    assert redone(opened(base=other)) == ["provisional", "extract", "confirm", "final", "guard", "verify"]


def test_only_a_fine_tune_finds_what_a_failed_run_left(opened: Callable[..., Line], made_up: Stages) -> None:
    for failing in ("finetune", "confirm", "guard", "verify"):
        made_up.fail = failing
        with pytest.raises(StageError, match=f"no {failing} today"):
            whole(opened())
    made_up.fail = None
    whole(opened())
    seen = [(stage, left) for stage, left in made_up.scratch if left]
    assert seen == [("finetune", ["left-by-finetune"])]
    assert [stage for stage, _ in made_up.scratch] == [
        *("finetune", "finetune", "confirm", "confirm", "finetune", "guard", "guard", "verify", "verify")
    ]
    assert not list((opened().store.root / ".scratch").iterdir()), "it goes with the commit"


def test_every_stage_tells_that_it_begins_and_ends(opened: Callable[..., Line]) -> None:
    heard: list[tuple[str, float, str]] = []
    with listening(lambda *event: heard.append(event)):
        whole(opened())
        first, heard[:] = list(heard), []
        whole(opened())
    for stage in ALL:
        shares = [share for name, share, _ in first if name == stage]
        assert shares == [0.0, 0.5, 1.0]
        assert next(text for name, share, text in first if (name, share) == (stage, 1.0)).startswith("done in ")
    assert heard == [event for stage in ALL for event in ((stage, 0.0, ""), (stage, 1.0, "found in the store"))]


def test_rows_that_a_person_chose(opened: Callable[..., Line]) -> None:
    line = opened()
    ingested = stages.ingest(line)
    chosen = stages.choose(line, ingested, [0, 2, 5])
    assert pq.read_table(chosen.folder / TRAIN).to_pydict() == {"row": [0, 2, 5]}
    assert chosen.summary == {"rows": 3}
    assert stages.choose(line, ingested, [0, 2, 5]).reused
    assert stages.choose(line, ingested, [0, 2]).key != chosen.key
    trained = stages.finetune(line, "oracle", ingested, chosen)
    assert trained.key != stages.finetune(line, "oracle", ingested).key


def test_results_are_not_kept_in_the_submission(opened: Callable[..., Line], tmp_path: pathlib.Path) -> None:
    submission = opened().submission
    (tmp_path / "link").symlink_to(submission, target_is_directory=True)
    for place in (submission, submission / "store", submission / "images" / "..", tmp_path / "link" / "store"):
        with pytest.raises(ConfigError, match=r"--store .*: results can't be kept inside of the submission; name another folder"):
            opened(store=place)
    for place in (tmp_path, tmp_path / "submission-store", submission / ".." / "store"):
        assert opened(store=place).store.root == place.resolve()
    assert sorted(path.name for path in submission.iterdir()) == ["images", "metadata.jsonl"]


def test_a_refused_base_is_refused_before_anything_is_read(opened: Callable[..., Line], tmp_path: pathlib.Path) -> None:
    (tmp_path / "base").mkdir()
    with pytest.raises(ModelError, match=r"no \*\.safetensors"):
        opened(base=tmp_path / "base")


def test_special_tokens(tiny_base: pathlib.Path, tmp_path: pathlib.Path) -> None:
    assert special_tokens(tiny_base) == ["</s>", "<image>", "<pad>", "<s>"]
    with pytest.raises(ModelError, match="its tokenizer can't be loaded"):
        special_tokens(tmp_path)
