"""A short campaign, and the proof that its checker sees: each broken promise that a journal or a log can show is complained of."""

import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Final

import pytest
from tests.torture.campaign import Campaign, Options, torments
from tests.torture.checker import CHUNK, DONE, ERROR, Case, Database
from tests.torture.journal import ENDED, Began, Entry, Event, Journal, JournalReader, Left, Meant, Refused, Saw, Told
from tests.torture.ledger import Ledger
from tests.torture.stage import Stage

from streamkeep import StreamManager


@pytest.mark.timeout(300)
@pytest.mark.promise("P6", "P16")
async def test_whoever_is_killed_nothing_acknowledged_is_lost_and_every_reader_comes_to_an_end(tmp_path: Path) -> None:
    campaign = Campaign(Options(Stage(tmp_path, seed=20), kills=20))
    await campaign.run()
    assert campaign.ledger.complaints == [], f"seed 20; the evidence is in {tmp_path}"
    assert campaign.done["kill"] >= 20
    assert campaign.ledger.counts["told write"] > 0
    assert campaign.ledger.counts["seen"] > 0


def test_the_same_seed_torments_in_the_same_way() -> None:
    assert list(islice(torments(1, victims=8), 100)) == list(islice(torments(1, victims=8), 100))
    assert list(islice(torments(1, victims=8), 100)) != list(islice(torments(2, victims=8), 100))


# The checker, on a stream of two writers (the first was killed) and two readers (the second was killed, and went on)

STREAM: Final = "lasting-00-producer-0.0-0"
LOG: Final = (
    Event(CHUNK, "a", 0, 10),
    Event(CHUNK, "a", 1, 11),
    Event(CHUNK, "a", 2, 12),
    Event(CHUNK, "b", 0, 20),
    Event(CHUNK, "b", 1, 21),
    Event(DONE, "b", 2, 29),
)
ABORTED: Final = Event(ERROR, "ABORTED")


def writes(handle: str, first: int, acknowledged: int, crcs: Sequence[int]) -> list[Entry]:
    entries: list[Entry] = [Meant(1, STREAM, handle, "write", number, crc) for number, crc in enumerate(crcs)]
    return entries + [Told(1, STREAM, handle, "write", number, first + number) for number in range(acknowledged)]


def reads(reading: str, after: int, until: int) -> list[Entry]:
    return [
        Began(1, STREAM, reading, after),
        *(Saw(1, STREAM, reading, offset, LOG[offset]) for offset in range(after + 1, until)),
    ]


ENTRIES: Final = [
    Meant(1, STREAM, "a", "open"),
    Told(1, STREAM, "a", "open"),
    *writes("a", 0, 2, [10, 11, 12, 13]),
    Meant(1, STREAM, "b", "resume"),
    Told(1, STREAM, "b", "resume", offset=3),
    *writes("b", 3, 2, [20, 21]),
    Meant(1, STREAM, "b", "done", 2),
    Told(1, STREAM, "b", "done", 2),
    *reads("all", -1, 6),
    Left(1, STREAM, "all", ENDED),
    *reads("rest", 1, 4),
    *reads("rest", 3, 6),
    Left(1, STREAM, "rest", ENDED),
]
GOOD: Final = Case(STREAM, ENTRIES, LOG, is_there=True, is_over=True)


def log(*events: Event) -> Case:
    return replace(GOOD, log=events)


def without(*unwanted: Entry) -> Case:
    return replace(GOOD, entries=[entry for entry in ENTRIES if entry not in unwanted])


def plus(*more: Entry) -> Case:
    return replace(GOOD, entries=[*ENTRIES, *more])


def test_what_is_right_is_not_complained_of() -> None:
    assert GOOD.complaints() == []
    assert replace(GOOD, log=None, is_there=False, stream="doomed").complaints() == ["doomed: it has vanished"]
    deleted = [*ENTRIES, Meant(1, STREAM, "c", "delete"), Told(1, STREAM, "c", "delete")]
    assert replace(GOOD, log=None, is_there=False, entries=deleted).complaints() == []


SEEN: Final = Saw(1, STREAM, "rest", 2, LOG[2])
DOCTORED: Final = {
    "an acknowledged chunk is lost": (log(*LOG[:1], *LOG[2:]), "writer a has"),
    "all acknowledged chunks are lost": (log(ABORTED), "writer b has"),
    "a chunk is there twice": (log(*LOG[:2], *LOG[1:]), "of a, 1 follows 1"),
    "a chunk is there twice, the other one later": (log(*LOG[:4], LOG[0], *LOG[4:]), "a has written 0 after b"),
    "a chunk is missing that was not acknowledged": (log(*LOG[:2], *LOG[3:]), "b began at 2"),
    "two chunks have changed places": (log(LOG[1], LOG[0], *LOG[2:]), "of a, 1 follows -1"),
    "a writer goes on after its successor": (log(*LOG[:5], Event(CHUNK, "a", 3, 13), LOG[5]), "a has written 3 after b"),
    "a chunk's content has changed": (log(*LOG[:3], Event(CHUNK, "b", 0, 99), *LOG[4:]), "nobody has written"),
    "nobody has written a chunk": (log(*LOG[:5], Event(CHUNK, "c", 0, 1), LOG[5]), "nobody has written"),
    "two terminal events": (log(*LOG, ABORTED), "something follows its terminal event"),
    "no terminal event": (log(*LOG[:5]), "it has ended without a terminal event"),
    "a chunk after the terminal event": (log(*LOG[:4], LOG[5], LOG[4]), "something follows its terminal event"),
    "done, but it ends otherwise": (log(*LOG[:5], ABORTED), "b was told done"),
    "done by somebody else": (log(*LOG[:5], Event(DONE, "a", 3, 1)), "nobody has ended it"),
    "failed by nobody": (log(*LOG[:5], Event(ERROR, "INTERNAL")), "it failed with INTERNAL"),
    "cancelled by nobody": (log(*LOG[:5], Event(ERROR, "CANCELLED")), "it was cancelled by nobody"),
    "cancelled, but it ends otherwise": (plus(Told(1, STREAM, "c", "cancel", offset=1)), "its cancelling was acknowledged"),
    "ended by two": (plus(Told(1, STREAM, "c", "error")), "several have ended it"),
    "the successor was told another tail": (
        replace(GOOD, entries=[*without(ENTRIES[9]).entries, Told(1, STREAM, "b", "resume", offset=4)]),
        "b began at 3, but was told that the tail is 4",
    ),
    "taken over by nobody": (
        replace(
            without(ENTRIES[8]),
            entries=[*without(ENTRIES[8]).entries, Refused(1, STREAM, "a", "write", "StreamTakenOverError")],
        ),
        "a was taken over from by nobody",
    ),
    "not found by its writer": (plus(Refused(1, STREAM, "a", "write", "StreamNotFoundError")), "a did not find it"),
    "refused for no reason": (plus(Refused(1, STREAM, "a", "write", "StorageCorruptError")), "a was refused with"),
    "a reader misses an event": (without(SEEN), "reader rest was given 3 in place of 2"),
    "a reader is given an event twice": (
        plus(Began(1, STREAM, "all", 4), Saw(1, STREAM, "all", 5, LOG[5])),
        "given 5 in place of 6",
    ),
    "a reader is given something else": (plus(*reads("third", -1, 3), Saw(1, STREAM, "third", 3, ABORTED)), "reader third has"),
    "a reader hangs": (plus(*reads("third", -1, 3)), "reader third hangs after 2"),
    "a reader stops early": (plus(*reads("third", -1, 3), Left(1, STREAM, "third", ENDED)), "reader third has ended before"),
    "a reader is told nonsense": (
        plus(Began(1, STREAM, "third", 2), Left(1, STREAM, "third", "OffsetOutOfRangeError")),
        "was told",
    ),
    "a reader does not find it": (
        plus(Began(1, STREAM, "third", 2), Left(1, STREAM, "third", "StreamNotFoundError")),
        "was told",
    ),
    "it is there after its deletion": (plus(Told(1, STREAM, "c", "delete")), "it was deleted, and is still there"),
    "it has vanished": (replace(GOOD, log=None, is_there=False), "it has vanished"),
    "it never ends": (replace(GOOD, log=None), "it has never ended"),
}


@pytest.mark.parametrize("flaw", DOCTORED)
def test_the_checker_sees(flaw: str) -> None:
    case, complaint = DOCTORED[flaw]
    assert any(complaint in line for line in case.complaints()), case.complaints()


def test_of_a_stream_that_is_gone_the_checker_sees_that_two_have_seen_different_things() -> None:
    gone = replace(GOOD, stream="doomed", log=None, is_there=False)
    doctored = [replace_event(entry) if entry == SEEN else entry for entry in ENTRIES]
    assert any("reader all has" in line or "reader rest has" in line for line in replace(gone, entries=doctored).complaints())


def replace_event(seen: Entry) -> Entry:
    assert isinstance(seen, Saw)
    return Saw(seen.at, seen.stream, seen.reading, seen.offset, Event(CHUNK, "a", 2, 99))


def test_an_entry_that_death_cut_short_is_no_entry(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(path)
    with JournalReader(path) as reader:
        journal.told(STREAM, "a", "open")
        with path.open("ab") as file:
            file.write(b'["Told",1,')
        assert [type(entry) for entry in reader.read()] == [Told]
        assert reader.read() == []


# The ledger and the database, on a file that streamkeep has written, and somebody has been at


@pytest.fixture
async def stage(tmp_path: Path) -> Stage:
    """A database with one stream: a chunk, and its output."""
    stage = Stage(tmp_path, seed=0)
    async with StreamManager.connect(stage.url) as streams, streams.open(STREAM) as stream:
        await stream.write(["a", 0, ""])
        await stream.done(["a", 1, ""])
    return stage


def doctor(stage: Stage, statement: str) -> None:
    with closing(sqlite3.connect(stage.database)) as db, db:
        db.execute(statement)


@pytest.mark.parametrize(
    ("statement", "complaint"),
    [
        ("DELETE FROM records WHERE offset = 1", "its tail is 2, but it holds 1 records"),
        ("UPDATE records SET offset = 2 WHERE offset = 1", "the last at 2"),
        ("UPDATE streams SET tail = 1", "its tail is 1, but it holds 2"),
        ("DELETE FROM streams", "2 records belong to no stream"),
    ],
)
async def test_the_look_at_the_database_sees(stage: Stage, statement: str, complaint: str) -> None:
    assert Database(stage.database).complaints() == []
    doctor(stage, statement)
    assert any(complaint in line for line in Database(stage.database).complaints())


async def test_the_look_at_the_database_sees_a_damaged_page(stage: Stage) -> None:
    doctor(stage, "PRAGMA wal_checkpoint(TRUNCATE)")
    size = stage.database.stat().st_size
    with stage.database.open("r+b") as file:
        file.seek(4096)
        file.write(bytes(size - 4096))
    assert any("integrity_check" in line for line in Database(stage.database).complaints())


def of_acknowledgement(ledger: Ledger, stage: Stage) -> None:
    journal = Journal(stage.directory / "producer-0.0.journal")
    journal.meant(STREAM, "a", "write", 1, 5)
    journal.told(STREAM, "a", "write", 1, offset=1)


def of_change(ledger: Ledger, stage: Stage) -> None:
    ledger.judge()
    doctor(stage, 'UPDATE records SET data = CAST(\'c["a",0,"other"]\' AS BLOB) WHERE offset = 0')


@pytest.mark.parametrize(("flaw", "complaint"), [(of_acknowledgement, "writer a has"), (of_change, "its log has changed")])
async def test_the_ledger_sees(stage: Stage, flaw: Callable[[Ledger, Stage], None], complaint: str) -> None:
    ledger = Ledger(Database(stage.database))
    ledger.open("producer-0", stage.directory / "producer-0.0.journal")
    flaw(ledger, stage)
    ledger.close("producer-0")
    ledger.judge(is_over=True)
    assert any(complaint in line for line in ledger.complaints)
    assert [stream for stream, _ in ledger.evidence()] == [STREAM]
