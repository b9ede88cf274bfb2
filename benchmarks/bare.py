"""The bare loops: what one would write without streamkeep, as tight as it goes, with the same work done for each chunk."""

import asyncio
import sqlite3
import time
from pathlib import Path

import msgspec

from streamkeep import StreamEvent, StreamEventType

encode = msgspec.json.Encoder().encode
STATE = b'{"created_at":1795396516.8,"writer":"0123456789abcdef0123456789abcdef","lease_until":1795396526.8,"status":"open"}'


class Log:
    """A list under a condition."""

    def __init__(self) -> None:
        self.records: list[bytes] = []
        self._changed = asyncio.Condition()

    async def write(self, chunk: object) -> int:
        async with self._changed:
            self.records.append(encode(chunk))
            self._changed.notify_all()
        return len(self.records) - 1


class Database:
    """A head row a stream, a record row a chunk; a transaction a batch."""

    def __init__(self, path: Path, streams: int) -> None:
        self.db = sqlite3.connect(path, isolation_level=None)
        self.db.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; PRAGMA busy_timeout=1000;")
        self.db.executescript("""
            CREATE TABLE heads (key INTEGER PRIMARY KEY, id TEXT UNIQUE, version INTEGER, tail INTEGER, state BLOB, expires_at REAL);
            CREATE TABLE records (stream INTEGER, offset INTEGER, data BLOB, UNIQUE (stream, offset));
        """)
        rows = [(key, f"s{key}", 0, 0, STATE, 0.0) for key in range(streams)]
        self.db.executemany("INSERT INTO heads VALUES (?, ?, ?, ?, ?, ?)", rows)
        self.tails = [0] * streams

    def write_batch(self, chunk: object) -> None:
        """Write one chunk to each stream, in one transaction."""
        now = time.time()
        heads = []
        records = []
        for key, tail in enumerate(self.tails):
            records.append((key, tail, encode(chunk)))
            heads.append((tail + 1, tail + 1, STATE, now, key, tail))
            self.tails[key] = tail + 1
        self.db.execute("BEGIN IMMEDIATE")
        self.db.executemany("UPDATE heads SET version=?, tail=?, state=?, expires_at=? WHERE key=? AND version=?", heads)
        self.db.executemany("INSERT INTO records VALUES (?, ?, ?)", records)
        self.db.execute("COMMIT")

    def replay(self) -> int:
        rows = self.db.execute("SELECT offset, data FROM records WHERE stream=0 ORDER BY offset")
        return sum(1 for _ in map(_event, rows))


def replay_list(records: list[bytes], page: int = 512) -> int:
    """Take a list page by page and make the events."""
    count = 0
    for start in range(0, len(records), page):
        for row in enumerate(records[start : start + page], start):
            _event(row)
            count += 1
    return count


async def fan_out(subscribers: int, chunks: int) -> int:
    """Deliver each record of a shared list to each of N tasks, which wait on an event each."""
    records: list[bytes] = []
    bells = [asyncio.Event() for _ in range(subscribers)]
    delivered = 0

    async def follow(bell: asyncio.Event) -> None:
        nonlocal delivered
        offset = 0
        while offset < chunks:
            while offset == len(records):
                bell.clear()
                await bell.wait()
            for row in enumerate(records[offset:], offset):
                _event(row)
                delivered += 1
            offset = len(records)

    async with asyncio.TaskGroup() as tasks:
        for bell in bells:
            tasks.create_task(follow(bell))
        for number in range(chunks):
            records.append(encode(number))
            for bell in bells:
                bell.set()
            await asyncio.sleep(0)
    return delivered


def _event(row: tuple[int, bytes]) -> StreamEvent[object]:
    return StreamEvent(StreamEventType.CHUNK, row[0], row[1][1:])
