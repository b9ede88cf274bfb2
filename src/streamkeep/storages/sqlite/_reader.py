"""The one connection of a SQLiteStorage that reads, in its thread."""

import sqlite3
from collections.abc import Collection, Sequence
from contextlib import closing
from typing import Final

from streamkeep.errors import StreamkeepError
from streamkeep.storage import PAGE_BYTES, Head, Page
from streamkeep.storages._batch_thread import Done, Job
from streamkeep.storages._ids import id_bytes
from streamkeep.storages.sqlite._errors import translated
from streamkeep.storages.sqlite._files import Files
from streamkeep.storages.sqlite._inherited import Inherited

LARGE_BYTES: Final = 4 * PAGE_BYTES
"""When so much has been read, whoever asked for it shall have it before there is more."""
_MOST_JOBS: Final = 1000


class Reader:
    """Reads. `run` is for the thread, the others are for its jobs."""

    def __init__(self, files: Files, db: sqlite3.Connection, inherited: Inherited) -> None:
        self.abandon: Final = inherited.abandon
        """See `Session`."""
        self._files = files
        self._db = db
        self._size = 0
        self._pages: dict[tuple[str, int, int], Page | None] = {}

    def run(self, jobs: Collection[Job["Reader"]]) -> Done:
        """Do the first of the jobs at one moment; what fails one of them is no business of the others."""
        self._size = number = 0
        is_broken = False
        for job in jobs:
            number += 1
            is_broken = not self._run_one(job)
            if is_broken or self._size >= LARGE_BYTES or number == _MOST_JOBS:
                break
        self._pages.clear()
        try:
            # After some errors SQLite has done so already.
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
        except BaseException:
            is_broken = True
        return Done(number, is_large=self._size >= LARGE_BYTES, is_broken=is_broken)

    def _run_one(self, job: Job["Reader"]) -> bool:
        """Give a job its outcome; False if it may be the connection that has failed."""
        try:
            if not self._db.in_transaction:
                self._db.execute("BEGIN")
            job.run(self)
        except BaseException as error:
            job.fail(translated(self._files.database, error))
            return isinstance(error, StreamkeepError)
        return True

    def read(self, stream: str, start: int, limit: int) -> Page | None:
        """Do `Storage.read`; once for all in a batch who ask for the same, as readers do who replay a stream together."""
        asked = (stream, start, limit)
        if asked not in self._pages:
            self._pages[asked] = self._read(stream, start, limit)
        return self._pages[asked]

    def _read(self, stream: str, start: int, limit: int) -> Page | None:
        id_bytes(stream)
        row = self._db.execute(
            "SELECT key, version, tail, state, expires_at, first FROM streams WHERE id = ?", (stream,)
        ).fetchone()
        if row is None:
            return None
        key, version, tail, state, expires_at, first = row
        self._size += len(state)
        records = self._records(key, start, limit) if limit and first <= start < tail else ()
        return Page(Head(version, tail, state, expires_at, first), records)

    def _records(self, key: int, start: int, limit: int) -> Sequence[bytes]:
        rows = self._db.execute(
            "SELECT offset, data FROM records WHERE stream = ? AND offset >= ? ORDER BY offset LIMIT ?", (key, start, limit)
        )
        records: list[bytes] = []
        size = 0
        with closing(rows):  # a statement that is not at its end would keep the connection open, whoever closes it
            for offset, record in rows:
                if offset != start + len(records):
                    break  # one is missing, which whoever reads on from there is told
                records.append(record)
                size += len(record)
                if size >= PAGE_BYTES:
                    break
        self._size += size
        return records

    def scan(self, after: str, limit: int) -> Sequence[tuple[str, Head]]:
        """Do `Storage.scan`. (SQLite compares UTF-8 bytes, whose order is that of the code points.)"""
        id_bytes(after)
        query = "SELECT id, version, tail, state, expires_at, first FROM streams WHERE id > ? ORDER BY id LIMIT ?"
        return self._heads(self._db.execute(query, (after, limit)))

    def expired(self, before: float, limit: int) -> Sequence[tuple[str, Head]]:
        """Do `Storage.expired`."""
        query = (
            "SELECT id, version, tail, state, expires_at, first FROM streams WHERE expires_at <= ? ORDER BY expires_at LIMIT ?"
        )
        return self._heads(self._db.execute(query, (before, limit)))

    def _heads(self, rows: sqlite3.Cursor) -> Sequence[tuple[str, Head]]:
        """Give the first of these, in about as many bytes as a page of records has."""
        found: list[tuple[str, Head]] = []
        size = 0
        with closing(rows):
            for stream, version, tail, state, expires_at, first in rows:
                found.append((stream, Head(version, tail, state, expires_at, first)))
                size += len(state)
                if size >= PAGE_BYTES:
                    break
        self._size += size
        return found
