"""What writers and readers of a simulated history say of it, and whether it agrees with what was stored.

Each writer keeps an account of what it asked for and what it was told, each reader of what it saw. The checks are functions from
these accounts and the world's record to sentences about what was broken; none means that the promises held.

Where the storage went back, what was acknowledged after the moment it went back to may be lost; nothing else may.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Final

import msgspec

from streamkeep.events import ErrorInfo, is_terminal

from .world import Past

CHUNK: Final = b"c"
DONE: Final = b"d"


@dataclass(slots=True)
class Writing:
    """A writer's account.

    Attributes:
        name: the handle's, unique in the history; its chunks are `[name, number]`.
        stream: the stream's id.
        tail: how many events there were when it was opened.
        calls: how many chunks it has asked to be stored, in the order of the calls.
        places: of the chunks whose write returned, the offset that it gave.
        stored: how many of the chunks it has been told are stored: this many, the first ones.
        was_told: whether a write has said that the stream is somebody else's; `close` does not say so again.
        ending: `done`, `error` or `close` when that was called.
        has_ended: whether that returned.
    """

    name: str
    stream: str
    tail: int
    calls: int = 0
    places: dict[int, int] = field(default_factory=dict)
    stored: int = 0
    was_told: bool = False
    ending: str = ""
    has_ended: bool = False

    def next_chunk(self) -> list[object]:
        """Give the next chunk to be written."""
        self.calls += 1
        return [self.name, self.calls - 1]


@dataclass(slots=True)
class Reading:
    """A reader's account of one subscription.

    Attributes:
        name: the reader's.
        stream: the stream's id.
        next: the offset of the first event that it asked for.
        seen: what came: offsets and records.
        candidates: which of the streams under this id it may be, by what came.
        pasts: how many there had ever been when it was last found out.
    """

    name: str
    stream: str
    next: int
    seen: list[tuple[int, bytes]] = field(default_factory=list)
    candidates: list[Past] = field(default_factory=list)
    pasts: int = 0

    def see(self, offset: int, record: bytes, pasts: Sequence[Past]) -> str | None:
        """Take an event down, and say what is wrong with it."""
        expected = self.next + len(self.seen)
        self.seen.append((offset, record))
        if offset != expected:
            return f"{self.name} got offset {offset} of {self.stream} where {expected} comes next"
        if self.pasts == len(pasts):
            self.candidates = [past for past in self.candidates if past.records[offset : offset + 1] == [record]]
        else:
            self.pasts = len(pasts)
            self.candidates = [past for past in pasts if past.id == self.stream and self._is(past)]
        if not self.candidates:
            return f"{self.name} got {record!r} at offset {offset} of {self.stream}, where that is not stored, or after other events"
        return None

    def _is(self, past: Past) -> bool:
        records = [record for _, record in self.seen]
        return past.records[self.next : self.next + len(records)] == records


def check_all(pasts: Sequence[Past], writings: Sequence[Writing]) -> Generator[str]:
    """Give a sentence for every promise that was broken."""
    streams = [past for past in pasts if not past.is_reserved]
    for past in streams:
        yield from check_log(past)
    for writing in writings:
        yield from check_writing(writing, streams)


def check_log(past: Past) -> Generator[str]:
    """Check that a log has one end at most, and that no writer came back after another had written."""
    ends = [offset for offset, record in enumerate(past.records) if is_terminal(record)]
    if ends and ends != [len(past.records) - 1]:
        yield f"{past.id} has its ends at {ends} of {len(past.records)} events"
    turns = [writer for writer, _ in groupby(writers_of(past))]
    if len(turns) != len(set(turns)):
        yield f"the writers of {past.id} took turns: {turns}"


def writers_of(past: Past) -> list[str]:
    """Give who wrote each chunk."""
    return [msgspec.json.decode(record[1:])[0] for record in past.records if record[:1] == CHUNK]


def check_writing(writing: Writing, pasts: Sequence[Past]) -> Generator[str]:
    """Check that a writer's chunks are stored once, in order, at the offsets it was told, and all that it was told of."""
    places = [(past, places) for past in pasts if (places := places_of(writing, past))]
    name, stream = writing.name, writing.stream
    if len({id(past.root) for past, _ in places}) > 1 or any(past.id != stream for past, _ in places):
        yield f"chunks of {name} are in {[past.id for past, _ in places]}"
        return
    for _, found in places:
        numbers = [number for number, _ in found]
        if numbers != list(range(len(numbers))):
            yield f"of {name} on {stream} these chunks are stored: {numbers}"
    most = max((len(found) for _, found in places), default=0)
    if most < writing.stored:
        yield f"{name} was told that {writing.stored} of its chunks are stored in {stream}; {most} are"
    everywhere = {place for _, found in places for place in found}
    for place in writing.places.items():
        if place not in everywhere:
            yield f"{name} was told that its chunk {place[0]} is at {place[1]} of {stream}; it is not"
    if writing.has_ended and writing.ending in ("done", "error"):
        record = ending_record(writing)
        if not any(past.records[-1:] == [record] for past in pasts if past.id == stream):
            yield f"{name} was told that {stream} ended with its {writing.ending}; it did not"


def places_of(writing: Writing, past: Past) -> list[tuple[int, int]]:
    """Give number and offset of each chunk of this writer."""
    prefix = CHUNK + msgspec.json.encode([writing.name])[:-1] + b","
    return [
        (msgspec.json.decode(record[1:])[1], offset) for offset, record in enumerate(past.records) if record.startswith(prefix)
    ]


def ending_record(writing: Writing) -> bytes:
    """Give the terminal record that this writer's `done` or `error` stores."""
    if writing.ending == "done":
        return DONE + msgspec.json.encode(writing.name)
    return b"e" + msgspec.json.encode(failure_of(writing.name))


def failure_of(name: str) -> ErrorInfo:
    """Give the error with which a writer of this name ends its stream."""
    return ErrorInfo("INTERNAL", name)
