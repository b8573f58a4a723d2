"""An opened submission whose rows are in a text file and whose pictures are files beside it."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from pipeline.config import IngestConfig
from pipeline.errors import SubmissionError
from pipeline.records import Message, Rejection, Sample
from storage.formats.base import Pick, RowError, merged
from storage.formats.paths import read_inside, safe_parts
from storage.formats.rowfile import RawRow, RowFile
from storage.formats.turns import encoded_alike, make_sample, read_pictures, without_tokens


class Scheme(Protocol):
    """What a row's fields mean; the modules `imagefolder` and `llava` are of this form."""

    NAME: str
    IMAGES_FIRST: bool

    def names_of(self, value: Mapping[str, Any]) -> list[str]:
        """The names of a row's pictures, in order."""

    def messages_of(self, value: Mapping[str, Any]) -> list[Message]:
        """The turns of a row."""

    def changed(self, value: Mapping[str, Any], *, names: Sequence[str], answer: str | None) -> dict[str, Any]:
        """The row with other picture names and, unless None, another first answer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextSubmission:
    """See `storage.formats.base.Submission`."""

    file: RowFile
    scheme: Scheme
    config: IngestConfig

    @property
    def format(self) -> str:
        """The format's name."""
        return self.scheme.NAME

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.file.root.name

    def count(self) -> int:
        """Number of rows."""
        return sum(1 for _ in self.file.raw_rows())

    def rows(self, special_tokens: Sequence[str] = ()) -> Iterator[Sample | Rejection]:
        """Every row in order; its pictures are read one row at a time."""
        for raw in self.file.raw_rows():
            try:
                value = self.file.parse(raw)
                yield without_tokens(self._sample(raw.row, value), special_tokens)
            except RowError as error:
                yield Rejection(row=raw.row, reason=str(error), where=raw.where)

    def write_subset(self, rows: Collection[int], out: pathlib.Path, *, rejected: Collection[int] = ()) -> None:
        """Write rows as the bytes they are, and their pictures."""
        wanted, loose = set(rows), set(rejected)
        self._write(((self, raw, raw.row not in loose) for raw in self.file.raw_rows() if raw.row in wanted), out)

    def write_merged(self, removed: TextSubmission, picks: Sequence[Pick], out: pathlib.Path) -> None:
        """Write the rows of two submissions in the order of `picks`."""
        kept = ((self, raw) for raw in self.file.raw_rows())
        others = ((removed, raw) for raw in removed.file.raw_rows())
        places = ((row, pick != "rejected") for row, pick in enumerate(picks) if pick != "left")
        rows = zip(merged(kept, others, picks), places, strict=True)
        self._write(((source, dataclasses.replace(raw, row=row), strict) for (source, raw), (row, strict) in rows), out)

    def write_changed(self, changes: Mapping[int, tuple[bytes, str]], out: pathlib.Path) -> None:
        """Write all rows, with every picture encoded and named anew."""
        out.mkdir(parents=True)
        (out / "images").mkdir()
        self.file.write_values(out / self.file.name, (self._changed(raw, changes, out) for raw in self.file.raw_rows()))

    def _sample(self, row: int, value: Mapping[str, Any]) -> Sample:
        messages = self.scheme.messages_of(value)
        images = read_pictures(self.file.root, self.scheme.names_of(value), self.config)
        return make_sample(row, messages, images, self.config, images_first=self.scheme.IMAGES_FIRST)

    def _write(self, rows: Iterable[tuple[TextSubmission, RawRow, bool]], out: pathlib.Path) -> None:
        """Write rows with their pictures; the flag says whether a row must be copied whole."""
        out.mkdir(parents=True)

        def copied() -> Iterator[RawRow]:
            for source, raw, strict in rows:
                source._copy_pictures(raw, out, strict=strict)  # noqa: SLF001
                yield raw

        self.file.write_raw(out / self.file.name, copied())

    def _copy_pictures(self, raw: RawRow, out: pathlib.Path, *, strict: bool) -> None:
        names: list[str] = []
        problems: list[Exception] = []
        try:
            names = self.scheme.names_of(self.file.parse(raw))
        except RowError as error:
            problems.append(error)
        for name in names:
            try:
                self._copy_picture(name, out)
            except (RowError, OSError) as error:
                problems.append(error)
        if strict and problems:
            raise SubmissionError(f"row {raw.row} ({raw.where}): it can't be copied: {problems[0]}") from problems[0]

    def _copy_picture(self, name: str, out: pathlib.Path) -> None:
        target = out.joinpath(*safe_parts(name))
        if target.exists() or target == out / self.file.name:
            return
        data = read_inside(self.file.root, name, max_bytes=self.config.max_image_bytes)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)

    def _changed(self, raw: RawRow, changes: Mapping[int, tuple[bytes, str]], out: pathlib.Path) -> dict[str, Any]:
        try:
            value = self.file.parse(raw)
            images = list(self._sample(raw.row, value).images)
        except RowError as error:
            raise SubmissionError(f"{raw.where}: {error}; only rows that can be used can be written anew") from error
        picture, answer = changes.get(raw.row, (None, None))
        if picture is not None:
            if not images:
                raise SubmissionError(f"{raw.where}: row {raw.row} has no picture to replace")
            images[0] = picture
        names = [f"images/{raw.row:08d}-{index:02d}.png" for index in range(len(images))]
        for name, image in zip(names, images, strict=True):
            (out / name).write_bytes(encoded_alike(image, self.config))
        return self.scheme.changed(value, names=names, answer=answer)
