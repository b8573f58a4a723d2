"""What the formats share: the reasons a row is rejected for, and the plain interface of an opened submission."""

from __future__ import annotations

import enum
import pathlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Literal, Protocol, Self, TypeVar

from pipeline.records import Rejection, Sample


class Reason(enum.StrEnum):
    """The kind of a rejection: what stands before the colon in `Rejection.reason`."""

    ROW_TOO_LONG = "row too long"
    NOT_UTF8 = "not UTF-8"
    NOT_JSON = "not JSON"
    NOT_CSV = "not CSV"
    DUPLICATE_KEY = "duplicate key"
    WRONG_TYPE = "wrong type"
    MISSING_FIELD = "missing field"
    EMPTY_QUESTION = "empty question"
    EMPTY_ANSWER = "empty answer"
    UNKNOWN_ROLE = "unknown role"
    TURN_ORDER = "turn order"
    IMAGE_PLACES = "image places"
    LONE_SURROGATE = "lone surrogate"
    TEXT_TOO_LONG = "text too long"
    SPECIAL_TOKEN = "special token"
    UNSAFE_PATH = "unsafe path"
    URL = "URL"
    MISSING_PICTURE = "missing picture"
    NOT_A_FILE = "not a regular file"
    TOO_MANY_PICTURES = "too many pictures"
    PICTURE_TOO_LARGE = "picture too large"
    PICTURE_REFUSED = "picture refused"


class RowError(ValueError):
    """Why one row can't be used; never leaves `storage` but as a Rejection."""

    def __init__(self, kind: Reason, detail: str = "") -> None:
        super().__init__(f"{kind}: {detail}" if detail else str(kind))
        self.kind = kind


Pick = Literal["kept", "removed", "rejected", "left"]
"""Where a merge's next row comes from: `rejected` is a removed one whose pictures may be missing, `left` one that stays out."""


class Submission(Protocol):
    """An opened submission. Rows are counted from 0 in the order of the files; nothing is held in memory but the row at hand."""

    @property
    def format(self) -> str:
        """`imagefolder`, `llava` or `parquet`."""

    @property
    def name(self) -> str:
        """Name of the submitted folder or file; it may tell of ground truth and is for people only."""

    def count(self) -> int:
        """Number of rows, usable or not."""

    def rows(self, special_tokens: Sequence[str] = ()) -> Iterator[Sample | Rejection]:
        """Every row in order.

        Args:
            special_tokens: what no turn of a row may spell out.

        Raises:
            SubmissionError: a file that can't be read on.
        """

    def write_subset(self, rows: Collection[int], out: pathlib.Path, *, rejected: Collection[int] = ()) -> None:
        """Write some rows, untouched and in order, with the pictures they need, in the submitted format.

        Args:
            rows: positions.
            out: a folder that is made.
            rejected: those of them whose pictures are left out where they can't be copied.

        Raises:
            SubmissionError: another row that can't be copied whole; the message names it.
        """

    def write_changed(self, changes: Mapping[int, tuple[bytes, str]], out: pathlib.Path) -> None:
        """Write all rows with the first picture and the first answer of some replaced.

        Every picture of every row is encoded and named anew in the same way, so that nothing but its content tells a changed row.

        Args:
            changes: row -> (encoded picture, answer).
            out: a folder that is made.

        Raises:
            SubmissionError: a row that is rejected, or one to change that has no picture.
        """

    def write_merged(self, removed: Self, picks: Sequence[Pick], out: pathlib.Path) -> None:
        """Write the rows of this submission and of another of the same format, in the order of `picks`.

        Raises:
            SubmissionError: a row that can't be copied whole; the message names it by its place in `picks`.
        """


_T = TypeVar("_T")


def merged(kept: Iterable[_T], removed: Iterable[_T], picks: Iterable[Pick]) -> Iterator[_T]:
    """Take from two ordered sources in turn; what is `left` is taken from `removed` and dropped."""
    sources = {"kept": iter(kept), "removed": iter(removed)}
    for pick in picks:
        item = next(sources["kept" if pick == "kept" else "removed"])
        if pick != "left":
            yield item


def quote(text: str) -> str:
    """A submitted text for a message: printable ASCII in quotes, cut at 60 characters."""
    return ascii(text if len(text) <= 60 else text[:60] + "...")
