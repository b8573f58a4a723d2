"""What the committed results say, read into small records for the report and the artifacts."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from flows.figures import thumbnail, token_grid
from pipeline.images import ImageError, decode_image
from pipeline.records import Example, Verdict, examples_of
from storage.subset import read_rows

SUSPECTS = 12
"""Quarantined rows that are shown."""
SQUARE = 1.25
"""Longest side over shortest up to which a picture's tokens are taken for a grid over the whole of it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """The evidence of every scored row, in order.

    Attributes:
        score: float (rows,), NaN where there is none.
        removed: bool (rows,), quarantined.
        cut: the score between the removed rows and those kept, None where nothing was removed.
    """

    score: np.ndarray
    removed: np.ndarray
    cut: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suspect:
    """A quarantined row to be shown.

    Attributes:
        row: position in the submission.
        question, answer: of the turn that its group holds, the one that is shifted most; of its first answer where no group does.
        reason, score, posterior: its verdict's.
        picture: data URI of a thumbnail with the attended tokens framed; empty if there is none.
        marked: whether tokens are framed.
    """

    row: int
    question: str
    answer: str
    reason: str
    score: float | None
    posterior: float | None
    picture: str
    marked: bool


def read_json(path: pathlib.Path) -> Any:
    """A stage's JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_losses(finetuned: pathlib.Path) -> list[tuple[int, float]]:
    """Step and loss of a fine-tune."""
    lines = (finetuned / "loss.jsonl").read_text(encoding="utf-8").splitlines()
    return [(int(entry["step"]), float(entry["loss"])) for entry in map(json.loads, lines)]


def read_rejected(ingested: pathlib.Path, limit: int) -> list[dict[str, Any]]:
    """The first rejected rows: row, reason, where."""
    rejected: list[dict[str, Any]] = pq.read_table(ingested / "rejected.parquet").slice(0, limit).to_pylist()
    return rejected


def read_scores(clustered: pathlib.Path, *, method: str) -> Scores:
    """The scores of the rows that were scored; by the method `bye` low scores are removed, by others high ones."""
    table = pq.read_table(clustered / "verdicts.parquet", columns=["verdict", "score"])
    scored = table.filter(pc.is_in(table["verdict"], pa.array([str(Verdict.KEEP), str(Verdict.QUARANTINE)])))
    score = _floats(scored["score"])
    removed = np.asarray([verdict == Verdict.QUARANTINE for verdict in scored["verdict"].to_pylist()], dtype=bool)
    taken = score[removed & np.isfinite(score)]
    cut = None if not len(taken) else float(taken.max() if method == "bye" else taken.min())
    return Scores(score=score, removed=removed, cut=cut)


def read_calibration(guarded: pathlib.Path) -> np.ndarray:
    """Cross-validated distances of the guard's reference rows, float (rows,)."""
    return _floats(pq.read_table(guarded / "calibration.parquet", columns=["distance"])["distance"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sources:
    """Where the quarantined rows' pictures, attention and verdicts lie: folders of the stages' results."""

    ingested: pathlib.Path
    extracted: pathlib.Path
    scored: pathlib.Path
    confirmed: pathlib.Path
    clustered: pathlib.Path


def read_suspects(sources: Sources, limit: int = SUSPECTS) -> list[Suspect]:
    """Quarantined rows to show: half with the highest scores, half with the lowest, in order of their rows.

    The attended tokens are those of the layer in which the row's group shifts most, or of the sensitive layers.
    """
    columns = ["row", "verdict", "reason", "score", "posterior"]
    verdicts = pq.read_table(sources.clustered / "verdicts.parquet", columns=columns)
    removed = verdicts.filter(pc.equal(verdicts["verdict"], str(Verdict.QUARANTINE))).to_pylist()
    removed.sort(key=lambda verdict: (-(verdict["score"] if verdict["score"] is not None else -np.inf), verdict["row"]))
    if len(removed) > limit:
        removed = removed[: (limit + 1) // 2] + removed[len(removed) - limit // 2 :]
    chosen = {verdict["row"]: verdict for verdict in sorted(removed, key=lambda verdict: verdict["row"])}
    if not chosen:
        return []
    wanted = [("row", "in", set(chosen))]
    attention = pq.read_table(sources.extracted / "attention.parquet", filters=wanted).to_pylist()
    records = {(record["row"], record["turn"]): record for record in attention}
    telling = _telling(sources, set(chosen))
    suspects = []
    for sample in read_rows(sources.ingested / "rows", chosen):
        turn, layers = telling[sample.row]
        example = examples_of(sample)[turn]
        suspects.append(_suspect(chosen[sample.row], example, records.get((sample.row, turn), {}), layers))
    return suspects


def read_groups(confirmed: pathlib.Path, removed: Sequence[dict[str, Any]] = ()) -> list[dict[str, Any]]:
    """The candidate groups with the outcome of their test, the largest transfer first.

    Args:
        confirmed: the confirm stage's folder.
        removed: groups as the cluster stage tells of them: by what they are removed may not be what tells most.
    """
    told = {group["group"]: group for group in removed}
    groups: list[dict[str, Any]] = [told.get(group["group"], group) for group in read_json(confirmed / "transfer.json")]
    return sorted(groups, key=lambda group: (-max(group["transfer"], group["pictures_transfer"]), group["group"]))


def attended_tokens(record: Mapping[str, Any], layers: Sequence[int]) -> list[int]:
    """Positions of a record's most attended image tokens over some layers, the most attended first.

    Args:
        record: one of attention.parquet.
        layers: the layers to look at; none means all.
    """
    count = record.get("layers") or 0
    if not count:
        return []
    positions = np.asarray(record["top_positions"]).reshape(count, -1)
    weights = np.asarray(record["top_weights"], dtype=float).reshape(count, -1)
    looked_at = [layer for layer in layers if layer < count] or list(range(count))
    total: dict[int, float] = {}
    for position, weight in zip(positions[looked_at].ravel().tolist(), weights[looked_at].ravel().tolist(), strict=True):
        if position >= 0:
            total[position] = total.get(position, 0.0) + weight
    return sorted(total, key=lambda position: (-total[position], position))


def _telling(sources: Sources, rows: set[int]) -> dict[int, tuple[int, list[int]]]:
    """Per row the turn that is shown, and the layers whose attended tokens are."""
    sensitive = [layer["layer"] for layer in read_json(sources.scored / "layers.json") if layer["sensitive"]]
    columns = ["group", "row", "turn", "projection"]
    members = pq.read_table(sources.scored / "members.parquet", columns=columns, filters=[("row", "in", rows)]).to_pylist()
    members.sort(key=lambda member: member["projection"])  # where a row is in a group with several turns, the last counts
    found = dict.fromkeys(rows, (0, sensitive))
    for group in reversed(read_groups(sources.confirmed)):  # where a row is in several, the largest transfer comes last and counts
        found |= {member["row"]: (member["turn"], [group["layer"]]) for member in members if member["group"] == group["group"]}
    return found


def _suspect(verdict: Mapping[str, Any], example: Example, record: Mapping[str, Any], layers: Sequence[int]) -> Suspect:
    picture, marked = _picture(example.images, record, layers)
    return Suspect(
        row=verdict["row"],
        question=example.question,
        answer=example.answer,
        reason=verdict["reason"] or "",
        score=verdict["score"],
        posterior=verdict["posterior"],
        picture=picture,
        marked=marked,
    )


def _picture(images: Sequence[bytes], record: Mapping[str, Any], layers: Sequence[int]) -> tuple[str, bool]:
    """The thumbnail of the picture that is looked at most, and whether tokens are framed on it."""
    if not images:
        return "", False
    tokens, rest = divmod(record.get("image_tokens") or 0, len(images))
    grid = 0 if rest else token_grid(tokens)
    positions = attended_tokens(record, layers)
    shown = positions[0] // tokens if grid and positions else 0
    marks = [position % tokens for position in positions if position // tokens == shown] if grid else []
    try:
        image = decode_image(images[shown])
    except ImageError:
        return "", False
    if max(image.size) > SQUARE * min(image.size):  # the base may have cropped it: nobody knows where its tokens lie
        marks, grid = [], 0
    return thumbnail(image, marks, grid), bool(marks)


def _floats(column: pa.ChunkedArray) -> np.ndarray:
    return np.asarray([np.nan if value is None else value for value in column.to_pylist()], dtype=float)
