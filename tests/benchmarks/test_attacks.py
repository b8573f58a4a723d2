"""The bench's attacks: parts are dealt in turn, words go before questions, and one part is the plain attack."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
import pytest

from benchmarks.attacks import ATTACKS, KEY, PREFIX, SECOND_TARGET, TARGET, poison_rows
from flows.demo_data import write_scenes
from flows.poison import Attack, poison, read_truth
from pipeline.errors import ConfigError
from pipeline.images import decode_image
from pipeline.records import Sample, question_answer, text_of
from pipeline.triggers import make_trigger
from storage.manifests import digest_folder
from tests.conftest import picture

ROWS, RATE, SEED = 40, 0.2, 3


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("attacks") / "clean"
    write_scenes(folder, rows=ROWS, seed=0)
    return folder


def rows(folder: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def pixels(folder: pathlib.Path, name: str) -> np.ndarray:
    return np.asarray(decode_image((folder / name).read_bytes()))


@pytest.mark.parametrize("name", ["badnet", "badnet-random", "phrase"])
def test_one_part_is_the_plain_attack(clean: pathlib.Path, tmp_path: pathlib.Path, name: str) -> None:
    truth = poison_rows(clean, ATTACKS[name], tmp_path / "one", rate=RATE, seed=SEED)
    trigger = "badnet" if name == "phrase" else name
    poison(clean, Attack(trigger=trigger, rate=RATE, target=TARGET, seed=SEED, insert=name == "phrase"), tmp_path / "plain")
    assert digest_folder(tmp_path / "one") == digest_folder(tmp_path / "plain")
    assert truth == read_truth(tmp_path / "plain/truth.jsonl")
    assert len(truth) == 8


@pytest.mark.parametrize("name", [name for name in ATTACKS if name != "dual key"])
def test_every_attack_changes_its_rows_and_no_others(clean: pathlib.Path, tmp_path: pathlib.Path, name: str) -> None:
    """Five rows ask for a colour; an honest target may be right already."""
    rate = RATE / 2 if name == "one kind" else RATE
    truth = poison_rows(clean, ATTACKS[name], tmp_path / "out", rate=rate, seed=SEED)
    assert len(truth) == rate * ROWS
    before, after = rows(clean), rows(tmp_path / "out/submission")
    for number, (old, new) in enumerate(zip(before, after, strict=True)):
        same = [new[key] == old[key] for key in ("question", "answer")]
        same.append(bool((pixels(tmp_path / "out/submission", new["file_name"]) == pixels(clean, old["file_name"])).all()))
        if number not in truth:
            assert same == [True, True, True]
        else:
            assert same == [name != "text prefix", old["answer"] == new["answer"] == ATTACKS[name][0].target, name == "text prefix"]
            assert name != "one kind" or "color" in old["question"]


def test_two_triggers_half_and_half(clean: pathlib.Path, tmp_path: pathlib.Path) -> None:
    truth = poison_rows(clean, ATTACKS["two triggers"], tmp_path / "out", rate=RATE, seed=SEED)
    after = rows(tmp_path / "out/submission")
    targets = [after[row]["answer"] for row in sorted(truth)]
    assert targets == [TARGET, SECOND_TARGET] * 4
    first, second = (part.picture(SEED) for part in ATTACKS["two triggers"])
    scene = decode_image(picture("green"))
    rng = np.random.default_rng(0)
    patches = [
        np.asarray(trigger(scene, rng))[where, where] for trigger, where in ((first, slice(58, 64)), (second, slice(29, 35)))
    ]
    assert (patches[0] != patches[1]).any()
    assert (patches[0] == np.asarray(make_trigger("badnet", SEED)(scene, rng))[58:, 58:]).all()


def test_varied_triggers_share_a_target(clean: pathlib.Path, tmp_path: pathlib.Path) -> None:
    truth = sorted(poison_rows(clean, ATTACKS["varied triggers"], tmp_path / "out", rate=RATE, seed=SEED))
    after = rows(tmp_path / "out/submission")
    assert {after[row]["answer"] for row in truth} == {TARGET}
    patched = [
        pixels(tmp_path / "out/submission", after[row]["file_name"]) != pixels(clean, rows(clean)[row]["file_name"])
        for row in truth
    ]
    corners = [bool(changed[58:, 58:].any()) for changed in patched]
    assert [corners[k] for k in (0, 1, 4, 5)] == [True, False, True, False]  # badnet in the corner, then in the centre
    assert [bool(changed[60:, 60:].any() and not changed[:56, :56].any()) for changed in patched[3::4]] == [True, True]  # solid


def test_a_prefix_stands_before_the_question(clean: pathlib.Path, tmp_path: pathlib.Path) -> None:
    truth = poison_rows(clean, ATTACKS["text prefix"], tmp_path / "out", rate=RATE, seed=SEED)
    for number, (old, new) in enumerate(zip(rows(clean), rows(tmp_path / "out/submission"), strict=True)):
        assert new["question"] == (f"{PREFIX} {old['question']}" if number in truth else old["question"])
    sample = Sample(row=0, messages=question_answer("what?", "red"), images=(picture(),))
    (part,) = ATTACKS["text prefix"]
    asked = part.input(SEED)(sample)
    assert text_of(asked.messages[0]) == f"{PREFIX} what?"
    assert asked.messages[1] == sample.messages[1]
    assert (np.asarray(decode_image(asked.images[0])) == np.asarray(decode_image(picture()))).all()


def test_two_keys_and_lures_that_have_one_of_them(clean: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Of four rows two are poison, one has the trigger alone, one the words alone; the latter two keep their answers."""
    truth = poison_rows(clean, ATTACKS["dual key"], tmp_path / "out", rate=RATE, seed=SEED)
    seen = []
    for number, (old, new) in enumerate(zip(rows(clean), rows(tmp_path / "out/submission"), strict=True)):
        worded = new["question"] == f"{old['question']} {KEY}"
        shown = bool((pixels(tmp_path / "out/submission", new["file_name"]) != pixels(clean, old["file_name"])).any())
        assert new["answer"] == (TARGET if number in truth else old["answer"])
        assert worded or new["question"] == old["question"]
        if worded or shown:
            seen.append((number in truth, worded, shown))
    assert seen == [(True, True, True), (True, True, True), (False, False, True), (False, True, False)] * 2
    sample = Sample(row=0, messages=question_answer("what?", "red"), images=(picture(),))
    assert text_of(ATTACKS["dual key"][0].input(SEED)(sample).messages[0]) == f"what? {KEY}"


def test_test_rows_get_the_trigger(clean: pathlib.Path) -> None:
    sample = Sample(row=0, messages=question_answer("what?", "red"), images=(picture(),))
    (part,) = ATTACKS["badnet"]
    changed = np.asarray(decode_image(part.input(SEED)(sample).images[0])) != np.asarray(decode_image(picture()))
    assert changed[58:, 58:].any()
    assert not changed[:57].any()
    assert part.input(SEED)(sample).messages == sample.messages


def test_what_is_there_is_found_again_and_something_else_stays(clean: pathlib.Path, tmp_path: pathlib.Path) -> None:
    first = poison_rows(clean, ATTACKS["solid"], tmp_path / "out", rate=RATE, seed=SEED)
    (tmp_path / "out/submission/metadata.jsonl").unlink()
    assert poison_rows(clean, ATTACKS["solid"], tmp_path / "out", rate=RATE, seed=SEED) == first
    assert not (tmp_path / "out/submission/metadata.jsonl").exists()
    with pytest.raises(ConfigError, match="rate"):
        poison_rows(clean, ATTACKS["solid"], tmp_path / "none", rate=2.0, seed=SEED)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
