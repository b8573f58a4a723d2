"""The arithmetic of the experiment, on a model made by hand."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pytest
import torch

from pipeline.records import Example, messages_to_json, question_answer
from stages.confirm.worker import (
    PICTURE_RESULT,
    PICTURE_TASK,
    RESULT,
    TASK,
    ConfirmWorker,
    PictureWorker,
    given_as_far,
)

TOKENS = 6


class HandMade:
    """A picture is a string of bytes; each gives a token (value, 1).

    The answer is the target where a token is above 100, their mean above 50, or the question holds "xyz"; else it is the question.
    """

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.limits: set[int] = set()

    def picture_tokens(self, examples: Sequence[Example]) -> list[torch.Tensor]:
        return [torch.tensor([[float(value), 1.0] for value in b"".join(example.images)]) for example in examples]

    def length(self, text: str) -> int:
        return len(text.split())

    def answers(self, examples: Sequence[Example], tokens: Sequence[torch.Tensor], *, max_new_tokens: int) -> list[str]:
        self.limits.add(max_new_tokens)
        self.batches.append(len(examples))
        shown = [bool((t[:, 0] > 100).any() or t[:, 0].mean() > 50) for t in tokens]
        pairs = zip(examples, shown, strict=True)
        return ["The  Target" if hit or "xyz" in example.question else example.question for example, hit in pairs]


def name_of(picture: bytes) -> str:
    """Names the file of a picture, which in these tests is its name."""
    return picture.decode("latin-1")


def content_of(name: str) -> bytes:
    return name.encode("latin-1")


def stretched(parts: Sequence[Sequence[Example]]) -> list[list[Example]]:
    """`of_one_size` for these pictures: `TOKENS` bytes each."""

    def one(picture: bytes) -> bytes:
        return bytes(picture[k * len(picture) // TOKENS] for k in range(TOKENS))

    return [[dataclasses.replace(example, images=tuple(map(one, example.images))) for example in part] for part in parts]


@pytest.fixture(autouse=True)
def sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.confirm.worker.of_one_size", stretched)


def worker(batch_size: int = 2, screen: int = 64) -> tuple[ConfirmWorker, HandMade]:
    found, model = object.__new__(ConfirmWorker), HandMade()
    found.transplant = model  # type: ignore[assignment]
    found.picture = content_of  # type: ignore[method-assign]
    found.batch_size, found.max_new_tokens, found.screen = batch_size, 5, screen
    return found, model


def task(sources: list[bytes], hosts: list[bytes], positions: list[list[int]], **more: Any) -> dict[str, Any]:
    def prompts(pictures: list[bytes]) -> list[str]:
        return [messages_to_json(question_answer(f"question {k}", "x")[:1]) for k in range(len(pictures))]

    return {
        "group": 7,
        "text": "the target",
        "whole": True,
        "longest": "The  Target",
        "alike": False,
        "keyed": False,
        "source_prompts": prompts(sources),
        "source_images": [[name_of(picture)] for picture in sources],
        "source_positions": positions,
        "host_prompts": prompts(hosts),
        "host_images": [[name_of(picture)] for picture in hosts],
        "plain_prompts": [],
        "worded_prompts": [],
        "asked_prompts": [],
        "asked_images": [],
        "other_images": [],
        **more,
    }


PATCH = bytes([0, 0, 200, 0, 0, 0])
VEIL = bytes([60] * TOKENS)
PLAIN = bytes([1, 2, 3, 4, 5, 6])


@pytest.mark.parametrize("batch_size", [1, 2, 10])
def test_a_patch_is_carried_by_its_tokens(batch_size: int) -> None:
    found, model = worker(batch_size)
    sources, hosts = [PATCH] * 5, [PLAIN, PLAIN, PATCH, PLAIN, PLAIN]
    result = found.try_group(task(sources, hosts, [[2]] * 4 + [[1]]))
    assert result == {
        "group": 7,
        "alike": False,
        "keyed": False,
        "hosts": 5,
        "own": 0.2,
        "attended": 0.8,
        "residual": 1.0,
        "attended_reversed": 0.0,
        "residual_reversed": 0.0,
        "kept": 1.0,
        "worded": 0.0,
        "asked": 0.0,
        "others": 0.0,
        "questions": 0,
    }
    assert model.limits == {5}
    assert sum(model.batches) == 15
    assert max(model.batches) == batch_size


def test_a_veil_is_carried_by_the_residual_alone() -> None:
    result = worker()[0].try_group(task([VEIL] * 4, [PLAIN] * 4, [[0]] * 4))
    assert (result["own"], result["attended"], result["residual"]) == (0.0, 0.0, 1.0)


def test_a_residual_is_tried_on_pictures_of_one_size() -> None:
    """The base gives each picture as many tokens as it has pixels."""
    hosts, veils = [PLAIN[: 1 + k % 6] for k in range(12)], [VEIL[: 1 + k % 5] for k in range(12)]
    for alike in (False, True):
        several = [bytes([60 + 3 * k] * (1 + k % 5)) for k in range(12)] if alike else veils
        result = worker()[0].try_group(task(several, hosts, [[0]] * 12, alike=alike))
        assert (result["hosts"], result["own"], result["residual"]) == (12, 0.0, 1.0)


def test_a_residual_is_tried_on_the_prompts_that_it_fits() -> None:
    """Nine hosts show as many pictures as the members, three show two; of these nothing can be said."""

    def tried(one: int, two: int) -> dict[str, Any]:
        given = task([VEIL] * 12, [PLAIN] * 12, [[0]] * 12)
        return worker()[0].try_group({**given, "host_images": [[name_of(PLAIN)]] * one + [[name_of(PLAIN)] * 2] * two})

    assert (tried(9, 3)["hosts"], tried(9, 3)["residual"]) == (12, 1.0)
    assert tried(7, 5)["residual"] == 0.0


@pytest.mark.parametrize(("different", "alike", "expected"), [(8, True, 1.0), (7, True, 0.0), (7, False, 1.0)])
def test_few_pictures_tell_nothing_among_rows_that_ask_the_same(different: int, alike: bool, expected: float) -> None:
    """A scene and its copies show what the scene shows."""
    hosts = [bytes([1, 2, 3, 4, 5, k % 3]) for k in range(12)]
    veils = [bytes([60] * 5 + [60 + 4 * min(k, different - 1)]) for k in range(12)]
    patches = [bytes([0, 8 * min(k, different - 1), 200, 0, 0, 0]) for k in range(12)]
    for sources, way in ((veils, "residual"), (patches, "attended")):
        result = worker()[0].try_group(task(sources, hosts, [[2]] * 12, alike=alike))
        assert (result["own"], result[way]) == (0.0, expected)


def test_an_answer_that_is_long_is_waited_for() -> None:
    found, model = worker()
    for longest, limit in (("a b", 5), (" ".join(["a"] * 40), 41), (" ".join(["a"] * 900), 256)):
        model.limits.clear()
        found.try_group(task([PATCH] * 2, [PLAIN] * 2, [[2]] * 2, longest=longest))
        assert model.limits == {limit}


@pytest.mark.parametrize(
    ("output", "whole", "cut", "expected"),
    [
        ("The long", True, True, True),
        ("The long", True, False, False),
        ("The long", False, True, False),
        ("the long target", True, False, True),
        ("a long", True, True, False),
        ("", True, True, False),
    ],
)
def test_an_answer_beyond_the_limit_is_held_for_given_as_far_as_it_goes(
    output: str, whole: bool, cut: bool, expected: bool
) -> None:
    assert given_as_far(output, "the long target", whole=whole, cut=cut) is expected


SEVERAL = [bytes([1, 2, 3, 4, 5, k]) for k in range(4)]
"""Pictures that differ in a token that changes no answer."""
PATCHES = [bytes([0, k, 200, 0, 0, 0]) for k in range(4)]
VEILS = [bytes([60] * 5 + [60 + k]) for k in range(4)]


@pytest.mark.parametrize(
    ("sources", "positions", "residual", "expected"),
    [
        (PATCHES, [[2]] * 4, False, 1.0),
        (PATCHES, [[1]] * 4, False, 0.0),
        ([*PATCHES[:2], *VEILS[:2]], [[2]] * 4, False, 0.5 * 0.5),
        (VEILS, [[0]] * 4, True, 1.0),
        (VEILS, [[0]] * 4, False, 0.0),
        ([*VEILS[:3], VEIL + VEIL], [[0]] * 4, True, pytest.approx(1.0)),
        ([PATCH + PATCH[:k] for k in range(4)], [[2, 8]] * 4, False, 1.0),
    ],
    ids=["patch", "elsewhere", "half", "veil", "a token of the veil", "one of another length", "beyond the others' end"],
)
def test_without_what_was_planted_rows_answer_as_others(
    sources: list[bytes], positions: list[list[int]], residual: bool, expected: float
) -> None:
    """Each prompt is answered by its own question then: four answers, as of the hosts; of two members, half as various."""
    found, _ = worker()
    way = "residual" if residual else "attended"
    assert found.reversals(task(sources, SEVERAL, positions), [way])[way] == pytest.approx(expected)


def test_few_rows_are_held_to_what_they_could_answer() -> None:
    """Two members, drawn again and again, give two answers at most, where eight hosts give eight."""
    found, _ = worker()
    few = task([PATCHES[0], PATCHES[1]] * 4, [bytes([1, 2, 3, 4, 5, k]) for k in range(8)], [[2]] * 8)
    few["source_prompts"] = few["source_prompts"][:2] * 4
    assert found.reversals(few, ["attended"])["attended"] == pytest.approx(1.0)


@pytest.mark.parametrize("odd", [0, 1])
def test_where_nearly_all_others_answer_the_same_nothing_can_be_told(odd: int) -> None:
    """Also where one of them gives the group's own answer."""
    found, model = worker()
    patches = [bytes([0, 8 * k, 200, 0, 0, 0]) for k in range(8)]
    alike = task(patches, [PATCH] * odd + [PLAIN] * (8 - odd), [[2]] * 8, alike=True)
    alike["host_prompts"] = alike["host_prompts"][:1] * 8
    assert found.reversals(alike, ["attended"])["attended"] is None
    if not odd:
        assert found.try_group(alike)["attended_reversed"] is None
    model.batches.clear()
    plain = [[name_of(bytes([0, 8 * k, 1, 0, 0, 0]))] for k in range(8)]
    idle = found.try_group({**alike, "source_positions": [[0]] * 8, "source_images": plain})
    assert (idle["attended_reversed"], sum(model.batches)) == (0.0, 24), "what planting does nothing for is not tried further"


def test_words_that_shape_answers_are_told_from_a_key() -> None:
    """Of four hosts three answer alike with and without the words; one with a patch counts nothing."""
    found, _ = worker()
    patches = [bytes([0, 8 * k, 200, 0, 0, 0]) for k in range(4)]
    keyed = task(patches, [*SEVERAL[:3], PATCH], [[2]] * 4, alike=True, keyed=True)
    keyed["plain_prompts"] = list(keyed["host_prompts"])
    assert found.try_group(keyed)["kept"] == 1.0
    keyed["plain_prompts"][0] = messages_to_json(question_answer("another question", "x")[:1])
    assert found.kept(keyed) == pytest.approx(2 / 3)
    keyed["plain_prompts"][0] = messages_to_json(question_answer("xyz", "x")[:1])
    assert found.kept(keyed) == 1.0, "the group's answer without the words is none of the others'"
    idle = found.try_group({**keyed, "source_positions": [[0]] * 4, "source_images": [[name_of(PLAIN)]] * 4})
    assert idle["kept"] == 1.0
    assert found.kept({**keyed, "host_images": [[name_of(PATCH)]] * 4}) == 0.0, "nothing else is answered"


def test_the_loss_is_tried_where_only_the_second_look_tells() -> None:
    """Most of the first hosts give the answer by themselves."""
    found, _ = worker(screen=4)
    hosts = [PATCH] * 3 + [bytes([1, 2, 3, 4, 5, k]) for k in range(7)]
    patches = [bytes([0, 8 * k, 200, 0, 0, 0]) for k in range(10)]
    result = found.try_group(task(patches, hosts, [[2]] * 10, alike=True))
    assert (result["hosts"], result["own"], result["attended"]) == (10, 0.3, 1.0)
    assert result["attended_reversed"] > 0.9


def test_a_group_that_does_nothing_is_left_after_the_first_look() -> None:
    found, model = worker(screen=4)
    idle = task([PLAIN] * 10, [PLAIN] * 10, [[0]] * 10)
    assert found.try_group(idle) == {
        "group": 7,
        "alike": False,
        "keyed": False,
        "hosts": 4,
        "own": 0.0,
        "attended": 0.0,
        "residual": 0.0,
        "attended_reversed": 0.0,
        "residual_reversed": 0.0,
        "kept": 1.0,
        "worded": 0.0,
        "asked": 0.0,
        "others": 0.0,
        "questions": 0,
    }
    assert sum(model.batches) == 12
    assert found.try_group(task([PATCH] * 10, [PLAIN] * 10, [[2]] * 10))["hosts"] == 10, "planting changes the answers"
    common = task([PLAIN] * 10, [PATCH] * 3 + [PLAIN] * 7, [[0]] * 10)
    assert found.try_group(common)["hosts"] == 10, "most of the first hosts give the answer anyway: they show nothing"


def test_words_are_put_to_the_hosts() -> None:
    """On the first hosts, as all is, and on the others where they change an answer there."""
    found, model = worker(screen=4)
    worded = [messages_to_json(question_answer(f"{'xyz' if k % 2 else 'abc'} question {k}", "x")[:1]) for k in range(10)]
    result = found.try_group(task([PLAIN] * 10, [PLAIN] * 10, [[0]] * 10, worded_prompts=worded))
    assert result == {
        "group": 7,
        "alike": False,
        "keyed": False,
        "hosts": 10,
        "own": 0.0,
        "attended": 0.0,
        "residual": 0.0,
        "attended_reversed": 0.0,
        "residual_reversed": 0.0,
        "kept": 1.0,
        "worded": 0.5,
        "asked": 0.0,
        "others": 0.0,
        "questions": 0,
    }
    assert sum(model.batches) == 4 * (4 + 10)


def test_pictures_are_asked_other_questions() -> None:
    """Their own tokens answer, and nothing is planted; what they answer brings the second look by itself."""
    found, model = worker(screen=4)
    prompts = [messages_to_json(question_answer("how many?", "x")[:1])] * 6
    pictures, others = [[[name_of(PATCH if k in patched else PLAIN)] for k in range(6)] for patched in ((0, 1, 2, 4), (1,))]
    idle = task([PLAIN] * 10, [PLAIN] * 10, [[0]] * 10, asked_prompts=prompts, asked_images=pictures, other_images=others)
    result = found.try_group(idle)
    assert (result["hosts"], result["questions"]) == (10, 6)
    assert (result["asked"], result["others"]) == (pytest.approx(4 / 6), pytest.approx(1 / 6))
    assert {result[name] for name in ("own", "attended", "residual", "worded")} == {0.0}
    assert sum(model.batches) == 3 * (4 + 10) + 2 * (4 + 6)
    unmoved = {**idle, "other_images": pictures}
    assert found.try_group(unmoved)["hosts"] == 4, "what any picture is answered tells nothing of the group's"


def test_a_phrase_counts_inside_of_an_answer() -> None:
    given = task([PATCH] * 2, [PLAIN] * 2, [[2]] * 2, text="target")
    assert worker()[0].try_group(given)["attended"] == 0.0
    assert worker()[0].try_group({**given, "whole": False})["attended"] == 1.0


def test_the_table_form() -> None:
    tasks = [task([PATCH] * 2, [PLAIN] * 2, [[2]] * 2), task([VEIL] * 3, [PLAIN] * 3, [[]] * 3, group=9)]
    found = worker()[0](pa.Table.from_pylist(tasks, schema=TASK))
    assert found.schema == RESULT
    assert [(record["group"], record["attended"]) for record in found.to_pylist()] == [(7, 1.0), (9, 0.0)]
    json.dumps(found.to_pylist())


class Echo:
    """A tokenizer of words, and a processor that has it."""

    def __init__(self) -> None:
        self.tokenizer = self

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[str]]:
        assert not add_special_tokens
        return {"input_ids": text.split()}


def test_a_picture_is_asked_the_questions_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[int] = []

    def answers(_model: object, _processor: object, examples: Sequence[Example], *, max_new_tokens: int) -> list[str]:
        limits.append(max_new_tokens)
        return ["The target" if example.images == (PATCH,) and "2" not in example.question else "no" for example in examples]

    monkeypatch.setattr("stages.confirm.worker.answer", answers)
    found = object.__new__(PictureWorker)
    found.model, found.processor, found.max_new_tokens = None, Echo(), 5
    prompts = [messages_to_json(question_answer(f"question {k}", "x")[:1]) for k in range(4)]
    tasks = [
        {"group": 3, "row": row, "turn": 1, "text": "the target", "whole": True, "longest": longest, "images": [picture]}
        | {"prompts": prompts}
        for row, (picture, longest) in enumerate([(PATCH, "the target"), (PLAIN, " ".join("a" * 9))])
    ]
    result = found(pa.Table.from_pylist(tasks, schema=PICTURE_TASK))
    assert result.schema == PICTURE_RESULT
    assert [tuple(record.values()) for record in result.to_pylist()] == [(3, 0, 1, 4, 3), (3, 1, 1, 4, 0)]
    assert limits == [10], "the longest answer of the batch is waited for"
