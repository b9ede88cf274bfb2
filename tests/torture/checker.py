"""What must hold of a stream, whoever was killed: pure functions from journals and a log to complaints, and a look at the file.

It reads the database with SQLite alone, so that it believes nothing that streamkeep says of itself. It never mends, and knows
nothing of processes: the same journals and log always give the same complaints.
"""

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import quote

from tests.torture.journal import (
    ENDED,
    NOT_FOUND,
    Began,
    Entry,
    Event,
    Left,
    Meant,
    Refused,
    Saw,
    Told,
    event_of,
)
from tests.torture.streams import BRIEF, kind_of

from streamkeep import StreamEventType

CHUNK: Final = StreamEventType.CHUNK
DONE: Final = StreamEventType.DONE
ERROR: Final = StreamEventType.ERROR
_TYPES: Final = {b"c": CHUNK, b"d": DONE, b"e": ERROR}
_ENDED_BY_OTHERS: Final = ("ABORTED", "CANCELLED")
_FLOW: Final = "flow-"


# The database


@dataclass(frozen=True, slots=True)
class Stored:
    """What the database says of a stream."""

    id: str
    key: int
    tail: int
    is_open: bool


class Database:
    """A streamkeep database, read with SQLite alone; each call opens it afresh, so that it keeps no file alive."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def streams(self) -> Mapping[str, Stored]:
        """Give all streams that are there, expired ones too; not the heads of sessions."""
        with self._opened() as db:
            rows = db.execute("SELECT id, key, tail, state FROM streams WHERE id NOT LIKE '.%'").fetchall()
        return {id_: Stored(id_, key, tail, json.loads(state)["status"] == "open") for id_, key, tail, state in rows}

    def logs(self, streams: Iterable[Stored]) -> Iterator[tuple[str, Sequence[Event]]]:
        """Give the events of streams that have ended; those that are gone by now are left out."""
        with self._opened() as db:
            for stored in streams:
                rows = db.execute("SELECT data FROM records WHERE stream = ? ORDER BY offset", (stored.key,)).fetchall()
                if rows:
                    yield stored.id, [event_of(_TYPES[data[:1]], data[1:]) for (data,) in rows]

    def complaints(self) -> list[str]:
        """Say what is wrong with the file as a whole."""
        try:
            return list(self._complaints())
        except sqlite3.DatabaseError as error:
            return [f"integrity_check: {error}"]

    def _complaints(self) -> Iterator[str]:
        with self._opened() as db:
            for (line,) in db.execute("PRAGMA integrity_check"):
                if line != "ok":
                    yield f"integrity_check: {line}"
            for id_, tail, number, last in db.execute(_MISCOUNTED):
                yield f"{id_}: its tail is {tail}, but it holds {number} records, the last at {last}"
            for (number,) in db.execute(_ORPHANS):
                if number:
                    yield f"{number} records belong to no stream"

    def _opened(self) -> closing[sqlite3.Connection]:
        return closing(sqlite3.connect(f"file:{quote(str(self._path))}?mode=ro", uri=True, timeout=60))


_MISCOUNTED: Final = """
    SELECT id, tail, count(offset) AS number, coalesce(max(offset), -1) AS last
    FROM streams LEFT JOIN records ON records.stream = streams.key
    GROUP BY streams.key HAVING number != tail OR last != tail - 1
"""
_ORPHANS: Final = "SELECT count(*) FROM records WHERE stream NOT IN (SELECT key FROM streams)"


# The journals


@dataclass(slots=True)
class Reading:
    """What one reader was given of a stream, in all its lives."""

    name: str
    first: int
    after: int
    saw: list[Saw] = field(default_factory=list)
    left: Left | None = None


def readings_of(entries: Iterable[Entry]) -> Mapping[str, Reading]:
    """Give what the readers of a stream were given."""
    readings: dict[str, Reading] = {}
    for entry in entries:
        match entry:
            case Began(reading=name, after=after):
                readings.setdefault(name, Reading(name, after + 1, after))
            case Saw(reading=name, offset=offset):
                readings[name].saw.append(entry)
                readings[name].after = offset
            case Left(reading=name):
                readings[name].left = entry
            case _:
                pass
    return readings


@dataclass(frozen=True)
class Case:
    """All that is known of one stream.

    Attributes:
        stream: its id.
        entries: what the journals say, in the order of each journal.
        log: its events, if it was found in the database after its end.
        is_there: whether the database holds it now.
        is_over: whether everybody had all the time that they need, so that who has not come to an end hangs.
    """

    stream: str
    entries: Sequence[Entry]
    log: Sequence[Event] | None
    is_there: bool
    is_over: bool

    def complaints(self) -> list[str]:
        """Say what is wrong; nothing if every promise was kept."""
        rules = (_of_the_evidence, _of_the_log, _of_its_end, _of_acknowledgements, _of_refusals, _of_readers, _of_existence)
        return [f"{self.stream}: {complaint}" for rule in rules for complaint in rule(self)]

    def events(self) -> Mapping[int, Event]:
        """Give the log; of a stream that is gone what was acknowledged and seen of it, by offset."""
        if self.log is not None:
            return dict(enumerate(self.log))
        known = {offset: event for _, offset, event in _evidence(self.entries)}
        return {offset: known[offset] for offset in sorted(known)}

    def told(self, *acts: str) -> list[Told]:
        """Give what was acknowledged of these acts."""
        return [entry for entry in self.entries if isinstance(entry, Told) and entry.act in acts]

    def meant(self, *acts: str) -> list[Meant]:
        """Give what was intended of these acts."""
        return [entry for entry in self.entries if isinstance(entry, Meant) and entry.act in acts]

    def may_be_gone(self, at: float) -> bool:
        """Say whether the stream may not have existed at this time: because of a deletion, or of its short life after its end."""
        if any(meant.at <= at for meant in self.meant("delete")):
            return True
        # One whose writer was killed may have been ended by any reader, which tells nobody.
        return kind_of(self.stream) == BRIEF


def _evidence(entries: Iterable[Entry]) -> Iterator[tuple[str, int, Event]]:
    """Give who knows which event at which offset."""
    crcs = {(meant.handle, meant.number): meant.crc for meant in entries if isinstance(meant, Meant) and meant.act == "write"}
    for entry in entries:
        match entry:
            case Told(act="write", handle=handle, number=number, offset=offset):
                yield f"writer {handle}", offset, Event(CHUNK, handle, number, crcs.get((handle, number), 0))
            case Saw(reading=reading, offset=offset, event=event):
                yield f"reader {reading}", offset, event
            case _:
                pass


# The rules


def _of_the_evidence(case: Case) -> Iterator[str]:
    """What was acknowledged or seen is there, where it was said to be, and is the same for everybody."""
    events = case.events()
    for who, offset, event in _evidence(case.entries):
        if events.get(offset) != event:
            yield f"{who} has {event} at {offset}, but there is {events.get(offset, 'nothing')}"


def _of_the_log(case: Case) -> Iterator[str]:
    """Each writer's chunks are there once, in its order and without a gap, and no writer comes back after the next one's first."""
    chunks = [event for event in case.events().values() if event.type == CHUNK]
    last: dict[str, int] = {}
    writer = ""
    for chunk in chunks:
        if chunk.handle != writer and chunk.handle in last:
            yield f"{chunk.handle} has written {chunk.number} after {writer}, who had taken over"
        writer = chunk.handle
        before = last.get(writer, -1)
        if chunk.number <= before or (case.log is not None and chunk.number != before + 1):
            yield f"of {writer}, {chunk.number} follows {before}"
        last[writer] = chunk.number


def _of_its_end(case: Case) -> Iterator[str]:
    """One terminal event at most, which is the last, and which somebody meant."""
    events = list(case.events().values())
    if any(event.is_terminal for event in events[:-1]):
        yield f"something follows its terminal event: {[event for event in events if event.is_terminal]}"
    if case.log is not None and not events[-1].is_terminal:
        yield "it has ended without a terminal event"
    ends = {(told.act, told.handle) for told in case.told("done", "error")}
    if len(ends) > 1:
        yield f"several have ended it: {ends}"
    if events and events[-1].is_terminal:
        yield from _of_the_terminal_event(case, events)
    elif case.log is not None and ends:
        yield f"{ends} were told that it had ended"


def _of_the_terminal_event(case: Case, events: Sequence[Event]) -> Iterator[str]:
    *chunks, end = events
    meant = {(m.act, m.handle) for m in case.meant("done", "error", "cancel")}
    for told in case.told("done", "error"):
        if end.type != str(told.act) or (told.act == "done" and end.handle != told.handle):
            yield f"{told.handle} was told {told.act}, but the end is {end}"
    if any(told.offset for told in case.told("cancel")) and end != Event(ERROR, "CANCELLED"):
        yield f"its cancelling was acknowledged, but the end is {end}"
    if end == Event(ERROR, "CANCELLED") and "cancel" not in {act for act, _ in meant}:
        yield "it was cancelled by nobody"
    if end.type == DONE and not end.handle.startswith(_FLOW) and ("done", end.handle) not in meant:
        yield f"nobody has ended it with {end}"
    if end.type == DONE and case.log is not None and end.number != sum(chunk.handle == end.handle for chunk in chunks):
        yield f"{end.handle} had written {end.number} chunks when it was done"
    if end.type == ERROR and end.handle not in _ENDED_BY_OTHERS and "error" not in {act for act, _ in meant}:
        yield f"it failed with {end.handle}, which nobody meant"


def _of_acknowledgements(case: Case) -> Iterator[str]:
    """Nothing is there that nobody wrote, and who went on with a stream did so at the tail that it was told."""
    written = {(meant.handle, meant.number, meant.crc) for meant in case.meant("write")}
    starts: dict[str, int] = {}
    for offset, event in case.events().items():
        if event.type != CHUNK:
            continue
        starts.setdefault(event.handle, offset)
        if not event.handle.startswith(_FLOW) and (event.handle, event.number, event.crc) not in written:
            yield f"nobody has written {event}, which is at {offset}"
    for told in case.told("open", "resume"):
        start = starts.get(told.handle, told.offset)
        if start < told.offset or (start > told.offset and case.log is not None):
            yield f"{told.handle} began at {start}, but was told that the tail is {told.offset}"


def _of_refusals(case: Case) -> Iterator[str]:
    """Who was refused was refused for a reason."""
    successors = {meant.handle for meant in case.meant("resume")}
    for entry in case.entries:
        match entry:
            case Refused(why="StreamTakenOverError", handle=handle) if not successors - {handle}:
                yield f"{handle} was taken over from by nobody"
            case Refused(why="StreamNotFoundError", handle=handle, at=at) if not case.may_be_gone(at):
                yield f"{handle} did not find it"
            case Refused(why=why, handle=handle) if why not in _REFUSALS:
                yield f"{handle} was refused with {why}"
            case _:
                pass


_REFUSALS: Final = (
    NOT_FOUND,
    "StreamTakenOverError",
    "StreamCompletedError",
    "StreamBusyError",
    "StorageError",
)


def _of_readers(case: Case) -> Iterator[str]:
    """Every reader was given each event once, in order, from its first offset to the terminal event, or told why not."""
    for reading in readings_of(case.entries).values():
        expected = reading.first
        for saw in reading.saw:
            if saw.offset != expected:
                yield f"reader {reading.name} was given {saw.offset} in place of {expected}"
            expected = saw.offset + 1
        yield from _of_a_readers_end(case, reading)


def _of_a_readers_end(case: Case, reading: Reading) -> Iterator[str]:
    match reading.left:
        case None:
            if case.is_over:
                yield f"reader {reading.name} hangs after {reading.after}"
        case Left(why=why) if why == ENDED:
            if not reading.saw or not reading.saw[-1].event.is_terminal:
                yield f"reader {reading.name} has ended before the stream"
        case Left(why=why, at=at):
            if why != NOT_FOUND or not case.may_be_gone(at):
                yield f"reader {reading.name} was told {why} after {reading.after}"


def _of_existence(case: Case) -> Iterator[str]:
    """What was deleted is gone, and nothing else vanishes."""
    if case.is_there and case.told("delete"):
        yield "it was deleted, and is still there"
    if not case.is_there and case.log is None and case.told("open") and not case.may_be_gone(float("inf")):
        yield "it has vanished"
    if case.is_there and case.log is None and case.is_over:
        yield "it has never ended"
