"""Retention: what a stream forgets of itself while it goes on (4). Functions from values to values, like all rules."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

import msgspec
from msgspec.structs import replace

FORGET_RECORDS: Final = 100
"""How many records an append forgets, so that none takes long; one for which there would be no room forgets all that it may."""
MARK_PART: Final = 8
"""A mark is made before an eighth of what is kept has come since the last one: so much more may be kept."""
MAX_MARKS: Final = 64


class Mark(msgspec.Struct, frozen=True, array_like=True):
    """A place in a stream's own log: how many records and bytes it ever had when it ended there, and when the last of them was appended."""

    position: int
    size: int
    at: float


@dataclass(frozen=True, slots=True)
class Retention:
    """What a stream keeps of itself while it goes on. What is beyond any of these may be forgotten, and an offset there is answered 410.

    It keeps at least so much, and up to an eighth more, or one append if that is larger. What is old is forgotten as more is appended, so a
    stream that is silent keeps what it has. One that has forks, too.

    Attributes:
        age: what was appended within this time.
        max_bytes: so many of the newest bytes.
        max_records: so many of the newest appends; one of more than a mebibyte counts as several.
    """

    age: timedelta | None = None
    max_bytes: int | None = None
    max_records: int | None = None

    def is_full(self, begin: Mark, end: Mark, part: int = 1) -> bool:
        """Say whether from one mark to another is as much as is kept, or (8) an eighth of that."""
        return (
            (self.age is not None and end.at - begin.at >= self.age.total_seconds() / part)
            or (self.max_bytes is not None and end.size - begin.size >= self.max_bytes / part)
            or (self.max_records is not None and end.position - begin.position >= self.max_records / part)
        )


@dataclass(frozen=True, slots=True)
class Kept:
    """What is kept of a log: from which record on, and marks, of which the first is where it began, or the last one that is forgotten."""

    marks: Sequence[Mark]
    first: int

    @property
    def forgotten_bytes(self) -> int:
        """How many bytes are certainly forgotten."""
        return self.marks[0].size if self.marks and self.marks[0].position <= self.first else 0


def kept_after(kept: Kept, before: Mark, after: Mark, retention: Retention, *, most: int) -> Kept:
    """Give what is kept of a log that an append takes from one end to another. `most`: how many records it may forget."""
    # Whatever a clock has said that has gone back since: what is there was appended until now.
    marks = tuple([mark if mark.at <= after.at else replace(mark, at=after.at) for mark in kept.marks])
    first = kept.first
    # Before the append with which it would be too much: the last one before a silence is not as young as the first one behind it.
    if before.position > marks[-1].position and retention.is_full(marks[-1], after, MARK_PART):
        marks = (*marks, before)
    beyond = [mark.position for mark in marks if retention.is_full(mark, after)]
    if beyond:
        first = max(first, min(beyond[-1], first + most))
    passed = sum(mark.position <= first for mark in marks)
    marks = marks[max(passed - 1, 0) :]
    if len(marks) > MAX_MARKS:  # nothing was forgotten for long: fewer places will do
        marks = (*marks[:1], *marks[1::2])
    return Kept(marks, first)
