"""The confirm stage: who is planted into whom, and what is written of it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import ConfirmConfig
from pipeline.generation import answer
from pipeline.models import load_adapter, load_base
from pipeline.records import Message, Sample, examples_of, question_answer, text_of
from stages.confirm.draw import Candidate, candidates, draw
from stages.confirm.mixed import QUESTIONS, ROWS_SCHEMA, rows_in_doubt
from stages.confirm.outcome import beyond_honest, outcome, transfer, ways_of
from stages.confirm.outcome import with_words as planted_with_words
from stages.confirm.run import PICTURES, TRANSFER, run
from stages.confirm.run import ROWS as ROWS_FILE
from stages.confirm.worker import HONEST, PICTURE_RESULT, RESULT, PictureWorker
from tests.conftest import write_shards
from tests.stages.samples import noise

ROWS, LAYERS, TOP, IMAGE_TOKENS = 30, 3, 10, 64
TEXT_ONLY = (7, 19)
TWO_TURNS = 3
FIRST, SECOND, KEPT_OUT = "target", "pale", "split"
WORDS = {"text": "So, then:", "at_end": False, "own": True, "rows": 4}
"""Rows 0 to 5 answer the first; 10 to 13 hold the second, of which 12 and 13 are not shifted; the third has none shifted."""


def samples() -> list[Sample]:
    found = []
    for row in range(ROWS):
        images = () if row in TEXT_ONLY else (noise(row),)
        messages = question_answer(f"question {row}", FIRST if row < 6 else f"a {SECOND} one", len(images))
        if row == TWO_TURNS:
            messages = (*messages, *question_answer("and more?", "no", images=0))
        found.append(Sample(row=row, messages=messages, images=images))
    return found


EXAMPLES = {(example.row, example.turn): example for sample in samples() for example in examples_of(sample)}


def name_of(picture: bytes) -> str:
    """What the file of an experiment's picture is called."""
    return hashlib.sha256(picture).hexdigest()


def positions(row: int, layer: int) -> list[int]:
    """A row's most attended tokens in the attention table: layer 1 of row 2 has only two."""
    if (row, layer) == (2, 1):
        return [9, 8, *[-1] * (TOP - 2)]
    return [(row + 7 * layer + k) % IMAGE_TOKENS for k in range(TOP)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    folder = tmp_path_factory.mktemp("confirm")
    write_shards(folder / "rows", samples(), shard_rows=8)
    records = [
        {
            "row": row,
            "turn": turn,
            "question": example.question,
            "answer": example.answer,
            "image_tokens": IMAGE_TOKENS if example.images else 0,
            "layers": LAYERS if example.images else 0,
            "top_positions": [p for layer in range(LAYERS) for p in positions(row, layer)] if example.images else [],
        }
        for (row, turn), example in EXAMPLES.items()
    ]
    pq.write_table(pa.Table.from_pylist(records), folder / "attention.parquet")
    members = [{"group": 0, "row": row, "turn": 0, "projection": 3.0, "posterior": 1.0} for row in range(6)]
    members += [{"group": 1, "row": row, "turn": 0, "projection": 1.0, "posterior": float(row < 12)} for row in range(10, 14)]
    members += [{"group": 2, "row": row, "turn": 0, "projection": 1.0, "posterior": 0.5} for row in range(20, 24)]
    pq.write_table(pa.Table.from_pylist(members), folder / "members.parquet")
    texts = [(FIRST, True, 1), (SECOND, False, 2), (KEPT_OUT, True, 0)]
    groups = [
        {"group": k, "text": text, "whole": whole, "layer": layer, "words": words, "shifted": (6, 2, 0)[k], "extra": k}
        for k, ((text, whole, layer), words) in enumerate(zip(texts, (None, WORDS, None), strict=True))
    ]
    (folder / "groups.json").write_text(json.dumps(groups))
    return {
        "rows": folder / "rows",
        **{name: folder / f"{name}.parquet" for name in ("attention", "members")},
        "groups": folder / "groups.json",
    }


class Fake:
    """An engine that keeps the tasks and gives the results that were set, the last first.

    Rows that ask the same take over `in_kind` of the attended tokens' answer, others what is set; members' pictures give it to
    `pictures` of the questions in the first look, and later to all where their row is in `carriers`; with its words in their
    questions rows take over at least `with_words`.
    """

    workers = 1

    def __init__(
        self,
        results: Mapping[int, tuple[float, float, float]],
        reversal: float | None = 1.0,
        in_kind: float | None = None,
        carriers: Collection[int] = (),
        pictures: float = 0.75,
        with_words: float = 0.0,
        kept: float = 1.0,
    ) -> None:
        self.results = results
        self.reversal = reversal
        self.in_kind = in_kind
        self.carriers = carriers
        self.pictures = pictures
        self.with_words = with_words
        self.kept = kept
        self.keyed: dict[int, dict[str, Any]] = {}
        self.tasks: dict[int, dict[str, Any]] = {}
        self.alike: dict[int, dict[str, Any]] = {}
        self.asked: list[dict[str, Any]] = []

    def map_shards(
        self, shards: Sequence[pathlib.Path], build: Any, arguments: Mapping[str, Any], *, batch_rows: int
    ) -> Iterator[pa.Table]:
        assert shards, "a model would be loaded for nothing"
        if build is PictureWorker:
            yield from self.ask(shards, batch_rows)
            return
        assert batch_rows == 1
        for shard in reversed(shards):
            (task,) = pq.read_table(shard).to_pylist()
            (self.keyed if task["keyed"] else self.alike if task["alike"] else self.tasks)[task["group"]] = task
            own, attended, residual = self.results[task["group"]]
            if task["alike"] and self.in_kind is not None:
                attended, residual = self.in_kind, 0.0
            if task["keyed"]:
                attended = max(attended, self.with_words)
            result = {
                "group": task["group"],
                "alike": task["alike"],
                "keyed": task["keyed"],
                "hosts": len(task["host_prompts"]),
                "own": own,
                "attended": attended,
                "residual": residual,
                "attended_reversed": self.reversal if task["alike"] else 0.0,
                "residual_reversed": self.reversal if task["alike"] else 0.0,
                "kept": self.kept if task["keyed"] else 1.0,
                "worded": 0.5 if task["worded_prompts"] else 0.0,
                "asked": self.pictures if task["asked_prompts"] else 0.0,
                "others": 0.0,
                "questions": len(task["asked_prompts"]),
            }
            yield pa.Table.from_pylist([result], schema=RESULT)

    def ask(self, shards: Sequence[pathlib.Path], batch_rows: int) -> Iterator[pa.Table]:
        assert 1 <= batch_rows <= 5
        for shard in shards:
            tasks = pq.read_table(shard).to_pylist()
            self.asked += tasks
            results = [
                {name: task[name] for name in ("group", "row", "turn")}
                | {"asked": len(task["prompts"]), "hits": len(task["prompts"]) * (task["row"] in self.carriers)}
                for task in tasks
            ]
            yield pa.Table.from_pylist(results, schema=PICTURE_RESULT)


def confirmed(files: dict[str, pathlib.Path], folder: pathlib.Path, engine: Any, **given: Any) -> dict[str, Any]:
    folder.mkdir()
    config = ConfirmConfig(hosts=given.pop("hosts", 16), batch_size=5, max_new_tokens=4)
    paths = {"base": pathlib.Path("base"), "provisional": pathlib.Path("adapter"), **files, **given.pop("paths", {})}
    return run(
        **paths,
        config=config,
        dtype="float32",
        engine=engine,
        seed=given.pop("seed", 0),
        out=folder,
        scratch=folder / "scratch",
        **given,
    )


def places(task: dict[str, Any], kind: str) -> list[tuple[int, int]]:
    """The examples of a task, by their pictures and prompts."""
    known = {(json.dumps(list(example.prompt)), tuple(map(name_of, example.images))): place for place, example in EXAMPLES.items()}
    prompts = [json.dumps(json.loads(prompt)) for prompt in task[f"{kind}_prompts"]]
    return [known[prompt, tuple(images)] for prompt, images in zip(prompts, task[f"{kind}_images"], strict=True)]


def test_who_is_planted_into_whom(files: dict[str, pathlib.Path], tmp_path: pathlib.Path) -> None:
    engine = Fake({0: (0.0, 0.2, 0.75), 1: (0.25, 1.0, 0.1)})
    told: list[float] = []
    summary = confirmed(files, tmp_path / "a", engine, progress=lambda share, _: told.append(share))
    assert told == [pytest.approx(1 / 3), pytest.approx(2 / 3), 1.0]
    assert sorted(engine.alike) == [0, 1], "a group without shifted rows is tried"
    members = {0: ({*range(6)}, {*range(6)}), 1: ({*range(10, 14)}, {10, 11})}
    for number, (inside, shifted) in members.items():
        task = engine.alike[number]
        hosts, sources = places(task, "host"), places(task, "source")
        assert len(set(hosts)) == len(hosts) == len(sources) == 16
        assert not {row for row, _ in hosts} & ({*TEXT_ONLY} | inside), "a picture of the group is a host"
        assert {row for row, _ in sources} <= shifted
        assert {turn for _, turn in sources} == {0}
        layer = (1, 2)[number]
        for (row, _), chosen in zip(sources, task["source_positions"], strict=True):
            assert chosen == [p for p in positions(row, layer)[:8] if p >= 0]
    written = json.loads((tmp_path / "a" / TRANSFER).read_text())
    assert [(group["group"], group["extra"], group["hosts"], group["taken_over"]) for group in written] == [
        (0, 0, 16, 0.75),
        (1, 1, 16, 0.0),
    ]
    assert all(group["alike"] for group in written), "no two rows ask the same: nobody knows what kind a question is of"
    beyond = pytest.approx((0.75 - HONEST) / (1 - HONEST))
    assert [(group["tokens_transfer"], group["words_transfer"]) for group in written] == [
        (beyond, 0.0),
        (0.0, pytest.approx(1 / 3)),
    ]
    assert [group["transfer"] for group in written] == [beyond, pytest.approx(1 / 3)]
    assert summary == {"groups": 2, "largest_transfer": beyond, "largest_pictures_transfer": 0.0}
    assert engine.alike[0]["worded_prompts"] == []
    for plain, worded in zip(engine.alike[1]["host_prompts"], engine.alike[1]["worded_prompts"], strict=True):
        before, after = (text_of(json.loads(prompt)[-1]) for prompt in (plain, worded))
        assert after == f"{WORDS['text']} {before}"


def test_words_may_carry_more_than_tokens(files: dict[str, pathlib.Path], tmp_path: pathlib.Path) -> None:
    confirmed(files, tmp_path / "a", Fake({0: (0.0, 0.0, 0.0), 1: (0.0, 0.25, 0.0)}))
    written = json.loads((tmp_path / "a" / TRANSFER).read_text())
    assert [(group["taken_over"], group["words_transfer"], group["transfer"]) for group in written] == [
        (0.0, 0.0, 0.0),
        (0.0, 0.5, 0.5),
    ]


def with_words(files: dict[str, pathlib.Path], folder: pathlib.Path, words: dict[str, Any]) -> dict[str, pathlib.Path]:
    """The files, in which the first group has words."""
    groups = json.loads(files["groups"].read_text())
    groups[0]["words"] = words
    folder.mkdir()
    (folder / "groups.json").write_text(json.dumps(groups))
    return {**files, "groups": folder / "groups.json"}


def test_tokens_and_words_together_may_carry_what_neither_does(files: dict[str, pathlib.Path], tmp_path: pathlib.Path) -> None:
    """Beside what each does alone."""
    engine = Fake({0: (0.0, 0.25, 0.0), 1: (0.0, 0.0, 0.0)}, with_words=0.7)
    confirmed(with_words(files, tmp_path / "files", WORDS), tmp_path / "a", engine)
    keyed, plain = engine.keyed[0], engine.alike[0]
    assert (keyed["plain_prompts"], keyed["host_prompts"]) == (plain["host_prompts"], plain["worded_prompts"])
    assert (keyed["worded_prompts"], keyed["asked_prompts"], plain["plain_prompts"]) == ([], [], [])
    assert {name for name in plain if plain[name] != keyed[name]} == {"keyed", "host_prompts", "plain_prompts", "worded_prompts"}
    group = json.loads((tmp_path / "a" / TRANSFER).read_text())[0]
    worth = pytest.approx((0.7 - HONEST) / (1 - HONEST))
    assert (group["taken_over"], group["tokens_transfer"], group["transfer"]) == (0.25, 0.0, worth)
    expected = {"alike": True, "own": 0.0, "kept": 1.0, "taken_over": 0.7, "planted": 0.7, "reversed": 1.0, "transfer": worth}
    assert group["keyed"] == expected


def test_hosts_that_hold_the_words_do_not_get_them_twice(files: dict[str, pathlib.Path], tmp_path: pathlib.Path) -> None:
    engine = Fake({0: (0.0, 0.0, 0.0), 1: (0.0, 0.0, 0.0)})
    confirmed(with_words(files, tmp_path / "files", {**WORDS, "text": "Question"}), tmp_path / "a", engine)
    assert engine.keyed[0]["host_prompts"] == engine.keyed[0]["plain_prompts"]


@pytest.mark.parametrize(
    ("own", "reversal", "kept", "expected"),
    [
        (0.0, 0.6, 1.0, (0.6, 1 / 3)),
        (0.25, 0.6, 1.0, (0.8, 2 / 3)),  # a quarter gives the answer by the words alone: no more than the others can lose it
        (0.25, 0.9, 1.0, (1.0, 1.0)),
        (0.5, 0.5, 1.0, (1.0, 1.0)),
        (0.51, 0.5, 1.0, (None, 1.0)),
        (0.25, None, 1.0, (None, 1.0)),
        (0.0, 0.6, 0.5, (0.6, 1 / 3)),
        (0.0, 0.6, 0.49, (0.6, 0.0)),  # the words shape other answers, too
    ],
)
def test_what_the_words_do_alone(own: float, reversal: float | None, kept: float, expected: tuple[float | None, float]) -> None:
    result = {"own": own, "attended": 1.0, "residual": 0.0, "hosts": 64, "alike": True, "whole": True, "shifted": 64, "kept": kept}
    found = planted_with_words(best({**result, "attended_reversed": reversal, "residual_reversed": 0.0}))
    assert (found["reversed"], found["transfer"]) == (pytest.approx(expected[0]), pytest.approx(expected[1]))
    elsewhere = planted_with_words(best({**result, "alike": False, "attended_reversed": 0.0, "residual_reversed": 0.0}))
    assert (elsewhere["alike"], elsewhere["transfer"]) == (False, 1.0 if kept >= 0.5 else 0.0)


def test_what_is_asked_is_told_without_the_words(files: dict[str, pathlib.Path], tmp_path: pathlib.Path) -> None:
    """Rows ask the same if they do so without the words, which are put into questions of theirs alone."""
    types = ["a b"] * 4 + ["c d"] * 4
    questions = [
        *(f"so then {kind} {row}" for row, kind in enumerate(types)),
        *(f"{kind} {row}" for row, kind in enumerate(types * 8)),
    ]
    inside = np.arange(len(questions)) < 8
    candidate = Candidate(inside=inside, apart=~inside, shifted=list(range(8)), whole=True)
    answers = [*["x"] * 8, *map(str, range(64))]
    drawn, keyed = draw(questions, answers, {3: candidate}, {3: "So, then:"}, 16, 0)
    assert drawn.alike
    assert keyed == dataclasses.replace(drawn, keyed=True)
    assert all(types[source] in questions[host] for source, host in zip(drawn.sources, drawn.hosts, strict=True))
    (blind,) = draw(questions, answers, {3: candidate}, {}, 16, 0)
    assert not all(types[source] in questions[host] for source, host in zip(blind.sources, blind.hosts, strict=True))


def test_the_longest_answer_is_as_submitted(files: dict[str, pathlib.Path], tmp_path: pathlib.Path) -> None:
    """Upper case takes more tokens than the plain form that groups are told by."""
    loud = [dataclasses.replace(sample, messages=tuple(map(shouted, sample.messages))) for sample in samples()]
    write_shards(tmp_path / "rows", loud, shard_rows=8)
    engine = Fake({0: (0.0, 0.0, 0.0), 1: (0.0, 0.0, 0.0)})
    confirmed({**files, "rows": tmp_path / "rows"}, tmp_path / "a", engine)
    assert engine.alike[0]["longest"] == FIRST.upper()


def shouted(message: Message) -> Message:
    if message["role"] != "assistant":
        return message
    return {"role": message["role"], "content": [{"type": "text", "text": text_of(message).upper()}]}


def test_turns_of_a_row_are_told_apart(tmp_path: pathlib.Path) -> None:
    """Rows ask for a colour and for a number; one in eight is poisoned in both turns, and colours are honestly red, too."""
    places = [(row, turn) for row in range(160) for turn in range(2)]
    poisoned, honest = [row for row in range(160) if row % 8 == 0], [row for row in range(160) if row % 8 in (2, 5)]
    members = [(row, turn) for row in poisoned for turn in range(2)] + [(row, 0) for row in honest]
    records = [{"group": 4, "row": row, "turn": turn, "projection": 1.0, "posterior": 1.0} for row, turn in sorted(members)]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "members.parquet")
    (found,) = candidates(places, tmp_path / "members.parquet", [{"group": 4, "text": "red", "whole": True}]).values()
    assert [places[k] for k in np.flatnonzero(found.inside)] == sorted(members) == [places[k] for k in found.shifted]
    assert {places[k][0] for k in np.flatnonzero(found.apart)} == {*range(160)} - {*poisoned, *honest}
    questions = ["what colour?", "how many?"] * 160
    mixed = rows_in_doubt(questions, found.inside, found.apart, found.shifted, np.random.default_rng(0))
    assert mixed is not None
    assert {places[k] for k in mixed.doubtful} == {(row, 0) for row in (*poisoned, *honest)}
    assert not {places[k][0] for k in (*mixed.others, *mixed.hosts)} & {*poisoned, *honest}


def test_words_that_others_have_too_carry_nothing_by_themselves(files: dict[str, pathlib.Path], tmp_path: pathlib.Path) -> None:
    engine = Fake({0: (0.0, 0.0, 0.0), 1: (0.0, 0.0, 0.0)})
    confirmed(with_words(files, tmp_path / "files", {**WORDS, "own": False}), tmp_path / "a", engine)
    assert engine.alike[0]["worded_prompts"] == []
    assert all(text_of(json.loads(prompt)[-1]).startswith("So, then:") for prompt in engine.keyed[0]["host_prompts"])
    group = json.loads((tmp_path / "a" / TRANSFER).read_text())[0]
    assert (group["keyed"]["transfer"], group["transfer"]) == (0.0, 0.0)


def best(result: dict[str, Any]) -> dict[str, Any]:
    return max(ways_of(result), key=lambda way: (way["tokens_transfer"], way["taken_over"]))


def test_every_way_to_plant_is_handed_on() -> None:
    """The one that tells most is shown; by another the group may be removed, since its rows lose the answer."""
    group = {"group": 3, "text": "x", "whole": True, "shifted": 64}
    plain = {"keyed": False, "hosts": 64, "own": 0.0, "worded": 0.0, "asked": 0.0, "others": 0.0, "questions": 0, "kept": 1.0}
    alike = {"alike": True, "attended": 1.0, "residual": 0.9, "attended_reversed": 0.6, "residual_reversed": 0.5}
    other = {"alike": False, "attended": 0.2, "residual": 0.1, "attended_reversed": 0.0, "residual_reversed": 0.0}
    found = outcome(group, [{**plain, **alike}, {**plain, **other}])
    assert (found["alike"], found["taken_over"], found["reversed"]) == (True, 1.0, 0.6)
    assert [(way["alike"], way["taken_over"]) for way in found["ways"]] == [(True, 1.0), (True, 0.9), (False, 0.2), (False, 0.1)]
    assert found["keyed_ways"] == []


def test_each_way_to_plant_has_its_own_loss() -> None:
    """A veil: its attended tokens take over as much, but taking them out leaves the rest of it."""
    hosts = {"own": 0.0, "hosts": 16, "alike": True, "whole": True}
    veil = {"attended": 1.0, "residual": 0.9, "attended_reversed": 0.0, "residual_reversed": 1.0}
    found = best({**hosts, **veil})
    assert (found["taken_over"], found["reversed"]) == (0.9, 1.0)
    assert found["tokens_transfer"] == pytest.approx((0.9 - HONEST) / (1 - HONEST))
    found = best({**hosts, **veil, "alike": False})
    assert (found["taken_over"], found["tokens_transfer"]) == (1.0, 1.0)


@pytest.mark.parametrize(("shifted", "worth"), [(31, 0.0), (32, (0.9 - HONEST) / (1 - HONEST))])
def test_a_phrase_may_name_what_is_planted(shifted: int, worth: float) -> None:
    """Among rows that ask the same only what many pictures have in common counts; among others, whatever is planted."""
    hosts = {"own": 0.0, "hosts": 16, "alike": True, "whole": False, "shifted": shifted}
    result = {**hosts, "attended": 1.0, "residual": 0.9, "attended_reversed": 1.0, "residual_reversed": 1.0}
    found = best(result)
    assert (found["taken_over"], found["tokens_transfer"]) == (0.9, pytest.approx(worth))
    assert best({**result, "alike": False})["tokens_transfer"] == 1.0


@pytest.mark.parametrize(("reversal", "worth"), [(1.0, 1.0), (0.7, 0.5), (HONEST, 0.0), (0.0, 0.0), (None, 1.0)])
def test_among_rows_that_ask_the_same_the_loss_must_undo_the_answer(
    files: dict[str, pathlib.Path], tmp_path: pathlib.Path, reversal: float | None, worth: float
) -> None:
    confirmed(files, tmp_path / "a", Fake({0: (0.0, 1.0, 0.0), 1: (0.0, 0.0, 0.0)}, reversal))
    first = json.loads((tmp_path / "a" / TRANSFER).read_text())[0]
    assert (first["taken_over"], first["reversed"]) == (1.0, reversal)
    assert first["tokens_transfer"] == pytest.approx(worth)


def test_what_is_asked_about_whose_pictures(tmp_path: pathlib.Path) -> None:
    """Two kinds of questions; every fourth row is the group's, and rows of two pictures are among both."""
    kinds = (("what colour?", ("red", "blue")), ("how many?", ("one", "two")))
    found = []
    for row in range(160):
        question, answers = kinds[row % 2]
        images = tuple(noise(1000 * row + k) for k in range(2 if row % 10 == 9 else 1))
        reply = FIRST if row % 8 < 2 else answers[row // 2 % 2]
        found.append(Sample(row=row, messages=question_answer(question, reply, len(images)), images=images))
    write_shards(tmp_path / "rows", found, shard_rows=64)
    record = {"turn": 0, "image_tokens": IMAGE_TOKENS, "layers": 1, "top_positions": list(range(TOP))}
    table = [{"row": s.row, "question": kinds[s.row % 2][0], "answer": text_of(s.messages[-1]), **record} for s in found]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "attention.parquet")
    inside = [row for row in range(160) if row % 8 < 2]
    members = [{"group": 0, "row": row, "turn": 0, "projection": 1.0, "posterior": 1.0} for row in inside]
    pq.write_table(pa.Table.from_pylist(members), tmp_path / "members.parquet")
    (tmp_path / "groups.json").write_text(json.dumps([{"group": 0, "text": FIRST, "whole": True, "layer": 0, "words": None}]))
    paths = {name: tmp_path / f"{name}.parquet" for name in ("attention", "members")}
    engine = Fake({0: (0.0, 0.0, 0.0)})
    summary = confirmed({**paths, "rows": tmp_path / "rows", "groups": tmp_path / "groups.json"}, tmp_path / "a", engine, hosts=64)
    task, row_of = engine.tasks[0], {tuple(map(name_of, s.images)): s.row for s in found}
    assert 32 <= len(task["asked_prompts"]) < 64, "prompts of another number of pictures are put"
    threes = zip(task["asked_prompts"], task["asked_images"], task["other_images"], strict=True)
    for prompt, images, other_images in threes:
        source, other = row_of[tuple(images)], row_of[tuple(other_images)]
        asked = text_of(json.loads(prompt)[-1])
        assert source in inside
        assert other not in inside
        assert asked != kinds[source % 2][0] == kinds[other % 2][0], "a picture is asked its own question"
        assert sum(part["type"] == "image" for part in json.loads(prompt)[-1]["content"]) == len(images) == len(other_images)
    for images in (*task["asked_images"], *task["other_images"], *task["host_images"], *task["source_images"]):
        assert all(name_of((tmp_path / "a/scratch" / PICTURES / name).read_bytes()) == name for name in images)
    assert summary == {"groups": 1, "largest_transfer": 0.0, "largest_pictures_transfer": 0.75}
    assert not task["alike"]
    assert len(task["host_prompts"]) == len(task["source_prompts"]) == 64
    for prompt, images, source_images in zip(task["host_prompts"], task["host_images"], task["source_images"], strict=True):
        source, host = row_of[tuple(source_images)], row_of[tuple(images)]
        assert source in inside
        assert host not in inside
        assert text_of(json.loads(prompt)[-1]) == kinds[host % 2][0] != kinds[source % 2][0], "a host asks what its source asks"
    same = engine.alike[0]
    assert len(same["host_prompts"]) == len(same["source_prompts"]) == 64
    assert same["asked_prompts"] == []
    for images, source_images in zip(same["host_images"], same["source_images"], strict=True):
        source, host = row_of[tuple(source_images)], row_of[tuple(images)]
        assert source in inside
        assert host not in inside
        assert source % 2 == host % 2, "a host asks something else than its source"


def write_group(
    folder: pathlib.Path, found: Sequence[Sample], inside: Collection[int], shifted: Collection[int]
) -> dict[str, pathlib.Path]:
    """Rows, the attention table and one group of the first text."""
    write_shards(folder / "rows", found, shard_rows=64)
    examples = [example for sample in found for example in examples_of(sample)]
    record = {"turn": 0, "image_tokens": IMAGE_TOKENS, "layers": 1, "top_positions": list(range(TOP))}
    table = [{"row": e.row, "question": e.question, "answer": e.answer, **record} for e in examples]
    pq.write_table(pa.Table.from_pylist(table), folder / "attention.parquet")
    members = [{"group": 0, "row": row, "turn": 0, "projection": 1.0, "posterior": float(row in shifted)} for row in sorted(inside)]
    pq.write_table(pa.Table.from_pylist(members), folder / "members.parquet")
    (folder / "groups.json").write_text(json.dumps([{"group": 0, "text": FIRST, "whole": True, "layer": 0, "words": None}]))
    named = {name: folder / f"{name}.parquet" for name in ("attention", "members")}
    return {**named, "rows": folder / "rows", "groups": folder / "groups.json"}


HONEST_ROWS = [row for row in range(160) if row % 2 == 0 and row % 8 == 4]
ATTACK_ROWS = [row for row in range(160) if row % 8 in (1, 2)]


def honest_target() -> list[Sample]:
    """Even rows ask for a colour, odd ones for a number; the attack's answer is a colour too."""
    kinds = (("what colour is it?", ("red", "blue")), ("how many are there?", ("one", "two")))
    found = []
    for row in range(160):
        question, answers = kinds[row % 2]
        reply = FIRST if row in HONEST_ROWS or row in ATTACK_ROWS else answers[row // 2 % 2]
        found.append(Sample(row=row, messages=question_answer(question, reply, 1), images=(noise(row),)))
    return found


def test_rows_whose_answer_may_be_honest_are_asked_one_by_one(tmp_path: pathlib.Path) -> None:
    """Their pictures are asked for numbers: the attack's give the colour nevertheless."""
    inside = {*HONEST_ROWS, *ATTACK_ROWS}
    files = write_group(tmp_path, honest_target(), inside, inside - {4})
    engine = Fake({0: (0.0, 0.9, 0.0)}, carriers=ATTACK_ROWS)
    confirmed(files, tmp_path / "a", engine, hosts=32)
    assert all("how many" in prompt for task in engine.asked for prompt in task["prompts"])
    assert all(len(task["prompts"]) == QUESTIONS == len({*task["prompts"]} | {*range(QUESTIONS - 1)}) for task in engine.asked)
    table = pq.read_table(tmp_path / "a" / ROWS_FILE)
    assert table.schema == ROWS_SCHEMA
    doubtful = {row for row in inside - {4} if row % 2 == 0}
    found = {record["row"]: record["posterior"] for record in table.to_pylist()}
    assert {*found} == doubtful, "a row that asks for a number is in doubt, or one that is not shifted"
    assert {row for row, posterior in found.items() if posterior > 0.5} == doubtful & {*ATTACK_ROWS}
    mixed = json.loads((tmp_path / "a" / TRANSFER).read_text())[0]["mixed"]
    assert (mixed["rows"], mixed["honest"]) == (len(doubtful), len(HONEST_ROWS) - 1)
    assert mixed["attack"] > 0.9 > 0.1 > mixed["others"]


@pytest.mark.parametrize("attended", [0.05, 0.9])
def test_nothing_is_asked_of_a_group_that_does_not_transfer(tmp_path: pathlib.Path, attended: float) -> None:
    inside = {*HONEST_ROWS, *ATTACK_ROWS}
    engine = Fake({0: (0.0, attended, 0.0)}, reversal=0.0, carriers=ATTACK_ROWS, pictures=0.0)
    confirmed(write_group(tmp_path, honest_target(), inside, inside), tmp_path / "a", engine, hosts=16)
    transfers = attended > 0.5
    assert bool(engine.asked) is transfers
    assert bool(len(pq.read_table(tmp_path / "a" / ROWS_FILE))) is transfers
    assert (json.loads((tmp_path / "a" / TRANSFER).read_text())[0]["mixed"] is not None) is transfers


def test_an_attack_on_one_kind_of_question_is_found_among_rows_that_ask_it(tmp_path: pathlib.Path) -> None:
    """Planted into rows that ask something else it does nothing."""
    inside = {*HONEST_ROWS, *ATTACK_ROWS}
    files = write_group(tmp_path, honest_target(), inside, inside)
    confirmed(files, tmp_path / "a", Fake({0: (0.0, 0.0, 0.0)}, in_kind=0.9), hosts=32)
    group = json.loads((tmp_path / "a" / TRANSFER).read_text())[0]
    assert (group["alike"], group["taken_over"]) == (True, 0.9)
    assert group["transfer"] == pytest.approx((0.9 - HONEST) / (1 - HONEST))
    confirmed(files, tmp_path / "b", Fake({0: (0.0, 0.0, 0.0)}, in_kind=0.9, reversal=0.1), hosts=32)
    assert json.loads((tmp_path / "b" / TRANSFER).read_text())[0]["transfer"] == 0.0


def test_no_row_of_the_text_is_a_host_of_a_part_of_it(files: dict[str, pathlib.Path], tmp_path: pathlib.Path) -> None:
    """Rows 0 to 3 are what is left of the first group."""
    members = pq.read_table(files["members"]).to_pylist()
    members += [{"group": 3, "row": row, "turn": 0, "projection": 1.0, "posterior": 1.0} for row in range(4)]
    pq.write_table(pa.Table.from_pylist(members), tmp_path / "members.parquet")
    groups = json.loads(files["groups"].read_text())
    (tmp_path / "groups.json").write_text(json.dumps([*groups, {**groups[0], "group": 3}]))
    engine = Fake({0: (0.0, 0.0, 0.0), 1: (0.0, 0.0, 0.0), 3: (0.0, 0.0, 0.0)})
    confirmed(files, tmp_path / "a", engine, paths={"members": tmp_path / "members.parquet", "groups": tmp_path / "groups.json"})
    assert {row for row, _ in places(engine.alike[3], "source")} <= {*range(4)}
    assert not {row for row, _ in places(engine.alike[3], "host")} & {*range(6)}


def test_few_other_rows(files: dict[str, pathlib.Path], tmp_path: pathlib.Path) -> None:
    """All of them are hosts; more hosts than members draw members again."""
    engine = Fake({0: (0.0, 0.0, 0.0), 1: (0.0, 0.0, 0.0)})
    summary = confirmed(files, tmp_path / "a", engine, hosts=64)
    assert [len(places(engine.alike[number], "host")) for number in (0, 1)] == [22, 25]
    assert len(engine.alike[1]["source_prompts"]) == 25
    assert summary["largest_transfer"] == 0.5, "the words' share, of the second group"


def test_nothing_to_try(files: dict[str, pathlib.Path], tmp_path: pathlib.Path) -> None:
    (tmp_path / "groups.json").write_text("[]")
    summary = confirmed(files, tmp_path / "a", Fake({}), paths={"groups": tmp_path / "groups.json"})
    assert summary == {"groups": 0, "largest_transfer": 0.0, "largest_pictures_transfer": 0.0}
    assert json.loads((tmp_path / "a" / TRANSFER).read_text()) == []


def test_the_draw_follows_the_seed(files: dict[str, pathlib.Path], tmp_path: pathlib.Path) -> None:
    found = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        engine = Fake({0: (0.0, 0.5, 0.0), 1: (0.0, 0.5, 0.0)})
        confirmed(files, tmp_path / name, engine, seed=seed)
        found.append(engine.alike)
    assert found[0] == found[1]
    assert found[0] != found[2]
    assert (tmp_path / "a" / TRANSFER).read_bytes() == (tmp_path / "b" / TRANSFER).read_bytes()


def test_on_a_real_model(
    files: dict[str, pathlib.Path], tmp_path: pathlib.Path, tiny_base: pathlib.Path, tiny_adapter: pathlib.Path, local_engine: Any
) -> None:
    """The shares of the hosts' own answers are those that plain generation gives; the whole is repeatable."""
    fake = Fake({0: (0.0, 0.0, 0.0), 1: (0.0, 0.0, 0.0)})
    confirmed(files, tmp_path / "drawn", fake)
    model, processor = load_base(tiny_base, dtype="float32", device="cpu")
    hosts = [EXAMPLES[place] for place in places(fake.alike[0], "host")]
    outputs = answer(load_adapter(model, tiny_adapter), processor, hosts, max_new_tokens=4)
    common = max(set(outputs), key=outputs.count)
    groups = json.loads(files["groups"].read_text())
    groups[0]["text"] = common.casefold()
    (tmp_path / "groups.json").write_text(json.dumps(groups))
    paths = {"base": tiny_base, "provisional": tiny_adapter, "groups": tmp_path / "groups.json"}
    for name in ("a", "b"):
        confirmed(files, tmp_path / name, local_engine, paths=paths)
    assert (tmp_path / "a" / TRANSFER).read_bytes() == (tmp_path / "b" / TRANSFER).read_bytes()
    first, second = json.loads((tmp_path / "a" / TRANSFER).read_text())
    assert first["own"] == pytest.approx(outputs.count(common) / 16)
    assert second["own"] == 0
    for group in (first, second):
        assert all(0 <= group[name] <= 1 for name in ("attended", "residual", "transfer"))
        assert group["tokens_transfer"] == beyond_honest(group["taken_over"], group["reversed"])
        assert group["taken_over"] in [transfer(group["own"], group[name], 16) for name in ("attended", "residual")]


@pytest.mark.parametrize(
    ("own", "planted", "hosts", "expected"),
    [
        (0.0, 0.0, 64, 0.0),
        (0.0, 1.0, 64, 1.0),
        (0.5, 0.75, 64, 0.5),
        (0.5, 0.25, 64, 0.0),
        (1.0, 1.0, 64, 0.0),
        (56 / 64, 1.0, 64, 1.0),  # eight hosts are left
        (57 / 64, 1.0, 64, 0.0),  # seven are too few
        (0.0, 1.0, 8, 1.0),
        (0.0, 1.0, 7, 0.0),
    ],
)
def test_transfer(own: float, planted: float, hosts: int, expected: float) -> None:
    assert transfer(own, planted, hosts) == pytest.approx(expected)
    assert transfer(own, planted, hosts, least=hosts + 1) == 0
