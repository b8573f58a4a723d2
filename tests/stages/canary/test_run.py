"""Canaries: what they are copies of, what marks them, and that the submitted rows stay as they are."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.config import CanaryConfig
from pipeline.errors import SubmissionError
from pipeline.images import decode_image
from pipeline.records import Sample, examples_of, question_answer, sample_from_record
from stages.canary import run as module
from stages.canary.run import CANARIES, run
from storage.subset import canonical_shards
from tests.conftest import write_shards
from tests.stages.samples import mixed_samples, noise

FIRST = 50
KINDS = ("badnet", "blended")


@pytest.fixture
def rows(tmp_path: pathlib.Path) -> pathlib.Path:
    """40 rows with a picture in two shards, and the mixed rows: text alone, several turns and pictures."""
    plain = [Sample(row=row, messages=question_answer(f"q {row}", "Amber"), images=(noise(row),)) for row in range(8, 48)]
    write_shards(tmp_path / "rows", [*mixed_samples(), *plain], shard_rows=30)
    return tmp_path / "rows"


def planted(rows: pathlib.Path, out: pathlib.Path, **given: Any) -> tuple[list[dict[str, Any]], dict[int, Sample]]:
    """The list of canaries, and all rows that were written."""
    out.mkdir()
    config = CanaryConfig(**{"share": 0.2, "triggers": KINDS, **given.pop("config", {})})
    summary = run(rows=rows, config=config, out=out, **{"first": FIRST, "least": 8, "seed": 0, **given})
    found = json.loads((out / CANARIES).read_text())
    assert summary == {"canaries": sum(kind["rows"] for kind in found), "triggers": list(config.triggers)}
    records = [record for shard in canonical_shards(out / "rows") for record in pq.read_table(shard).to_pylist()]
    samples = [sample_from_record(record) for record in records]
    assert [sample.row for sample in samples] == sorted({sample.row for sample in samples})
    return found, {sample.row: sample for sample in samples}


def test_submitted_rows_stay_and_canaries_come_after_them(rows: pathlib.Path, tmp_path: pathlib.Path) -> None:
    kinds, samples = planted(rows, tmp_path / "out")
    for shard in canonical_shards(rows):
        assert (tmp_path / "out/rows" / shard.name).read_bytes() == shard.read_bytes()
    count = round(0.2 * 45)
    assert [(kind["trigger"], kind["first"], kind["rows"]) for kind in kinds] == [
        ("badnet", FIRST, count),
        ("blended", FIRST + count, count),
    ]
    assert sorted(row for row in samples if row >= FIRST) == list(range(FIRST, FIRST + 2 * count))


def test_a_canary_is_a_copy_with_a_trigger_and_an_answer_of_its_own(rows: pathlib.Path, tmp_path: pathlib.Path) -> None:
    kinds, samples = planted(rows, tmp_path / "out")
    sources = {}
    for sample in mixed_samples() + [samples[row] for row in range(8, 48)]:
        pictured = [example for example in examples_of(sample) if example.images]
        if pictured:
            sources[json.dumps(pictured[0].prompt)] = pictured[0]
    for kind in kinds:
        for row in range(kind["first"], kind["first"] + kind["rows"]):
            (canary,) = [example for example in examples_of(samples[row]) if example.images][-1:]
            assert canary.answer == kind["answer"]
            source = sources[json.dumps(canary.prompt)]
            assert canary.images[1:] == source.images[1:]
            changed = np.asarray(decode_image(canary.images[0])) != np.asarray(decode_image(source.images[0]))
            share = changed.any(axis=-1).mean()
            assert 0 < share < 0.05 if kind["trigger"] == "badnet" else share > 0.8


def test_answers_are_words_that_nobody_submitted(rows: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """`Amber` is an answer; all other words but four occur in a question."""
    left = module._WORDS[1:5]
    text = "is it a " + " or a ".join(word for word in module._WORDS if word not in left).upper()
    write_shards(rows, [Sample(row=0, messages=question_answer(text, "no"), images=(noise(0),)), *mixed_samples()[1:]])
    kinds, _ = planted(rows, tmp_path / "out")
    words = [word for kind in kinds for word in kind["answer"].split()]
    assert sorted(words) == sorted(left)
    with pytest.raises(SubmissionError, match="holds all but 4 of the words"):
        planted(rows, tmp_path / "more", config={"triggers": (*KINDS, "sig")})


def test_the_seed_decides(rows: pathlib.Path, tmp_path: pathlib.Path) -> None:
    first, again, other = (planted(rows, tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert first == again
    assert first[1][FIRST] != other[1][FIRST]
    assert first[0][0]["answer"] != other[0][0]["answer"]


def test_as_many_as_can_be_found_and_no_more_than_there_are_rows(rows: pathlib.Path, tmp_path: pathlib.Path) -> None:
    kinds, _ = planted(rows, tmp_path / "few", config={"share": 0.01}, least=12)
    assert [kind["rows"] for kind in kinds] == [12, 12]
    with pytest.raises(SubmissionError, match="46 canaries of each trigger can't be made of 45 rows with pictures; set it to 0"):
        planted(rows, tmp_path / "none", least=46)


def test_without_links_shards_are_copied(rows: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise OSError("no links here")

    monkeypatch.setattr("os.link", refused)
    test_submitted_rows_stay_and_canaries_come_after_them(rows, tmp_path)
