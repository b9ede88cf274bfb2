"""The one connection of a SQLiteStorage that writes, in its thread."""

import sqlite3
import time
from collections.abc import Collection, Sequence
from itertools import islice
from typing import Final

from streamkeep.errors import StorageError
from streamkeep.storage import Head
from streamkeep.storages import _before_fork
from streamkeep.storages._batch_thread import Job
from streamkeep.storages.sqlite import _clock
from streamkeep.storages.sqlite._clock import Clock
from streamkeep.storages.sqlite._errors import TIMEOUT_SECONDS, translated
from streamkeep.storages.sqlite._files import Files
from streamkeep.storages.sqlite._inherited import Inherited
from streamkeep.storages.sqlite._interlock import Interlock, retry_until
from streamkeep.storages.sqlite._notify import Changes, Notify, checksum

_MOST_JOBS: Final = 1000
_KEYS_KEPT: Final = 10_000

# Two statements, because one that names `expires_at` changes its index too, even if the value stays.
_KEEP_EXPIRY: Final = (
    "UPDATE streams SET version = ?, tail = ?, state = ?, first = ? WHERE key = ? AND version = ? AND expires_at = ?"
)
_SET_EXPIRY: Final = (
    "UPDATE streams SET version = ?, tail = ?, state = ?, first = ?, expires_at = ? WHERE key = ? AND version = ?"
)
_HeadRow = tuple[int, int, bytes, int, int, int, float]
_ExpiryRow = tuple[int, int, bytes, int, float, int, int]


class _ConflictError(Exception):
    """One of the commits of a batch has not seen the version."""


class Writer:
    """Writes. `run` is for the thread, `commit` and `delete` are for its jobs."""

    def __init__(
        self,
        files: Files,
        db: sqlite3.Connection,
        interlock: Interlock,
        notify: Notify,
        clock: Clock,
        inherited: Inherited,
    ) -> None:
        self.clock: Final = clock
        self.abandon: Final = inherited.abandon
        """See `Session`."""
        self.is_broken = False
        """Whether this connection is of no use any more."""
        self._files = files
        self._db = db
        self._interlock = interlock
        self._notify = notify
        self._time_saved = clock.time()
        # Of each stream: its key, and when it expires as far as is known here.
        self._known: dict[str, tuple[int, float]] = {}
        self._is_optimistic = True
        self._heads: list[_HeadRow] = []
        self._expiries: list[_ExpiryRow] = []
        self._expiring: set[int] = set()
        self._rows: list[tuple[int, int, bytes]] = []
        self._forgotten: list[tuple[int, int]] = []
        self._changed: list[int] = []

    def commit(self, stream: str, seen: int | None, head: Head, records: Sequence[bytes]) -> bool:
        """Do `Storage.commit`."""
        changed = checksum(stream)
        key = self._insert(stream, head) if seen is None else self._update(stream, seen, head)
        if key is None:
            return False
        for offset, record in enumerate(records, head.tail - len(records)):
            self._rows.append((key, offset, record))
        if head.first:
            self._forgotten.append((key, head.first))
        self._changed.append(changed)
        return True

    def delete(self, stream: str, seen: int) -> bool:
        """Do `Storage.delete`."""
        changed = checksum(stream)
        key = self._find(stream, seen)
        if key is None:
            return False
        self._db.execute("DELETE FROM records WHERE stream = ?", (key,))
        self._db.execute("DELETE FROM streams WHERE key = ?", (key,))
        self._known.pop(stream, None)
        self._changed.append(changed)
        return True

    def run(self, jobs: Collection[Job["Writer"]]) -> tuple[int, Changes | None]:
        """Do the first of the jobs in one transaction, and say how many and what they changed. If one of them fails, each gets its own."""
        batch = list(islice(jobs, _MOST_JOBS))
        deadline = time.monotonic() + TIMEOUT_SECONDS
        try:
            with self._interlock.held(deadline):
                changed = self._run_all(batch, deadline)
                return len(batch), self._publish(changed) if changed else None
        except _before_fork.ForkUnderWayError:
            raise  # nothing was done; all of it comes again
        except TimeoutError as error:
            self._fail(batch, error)
            return len(batch), None

    def _run_all(self, jobs: Sequence[Job["Writer"]], deadline: float) -> Sequence[int]:
        try:
            self._files.check()
            self._begin(deadline)
        except (sqlite3.Error, OSError, StorageError) as error:
            self._fail(jobs, error)
            return ()
        # First as if every commit had seen the version, for then all heads are replaced by one statement.
        try:
            return self._transact(jobs, is_optimistic=True)
        except _ConflictError:
            return self._run_carefully(jobs, deadline)
        except BaseException:
            return self._run_one_by_one(jobs, deadline)

    def _run_carefully(self, jobs: Sequence[Job["Writer"]], deadline: float) -> Sequence[int]:
        try:
            self._begin(deadline)
            return self._transact(jobs, is_optimistic=False)
        except BaseException:
            return self._run_one_by_one(jobs, deadline)

    def _run_one_by_one(self, jobs: Sequence[Job["Writer"]], deadline: float) -> Sequence[int]:
        changed: list[int] = []
        for job in jobs:
            try:
                self._begin(deadline)
                changed += self._transact([job], is_optimistic=False)
            except BaseException as error:
                self._fail([job], error)
        return changed

    def _transact(self, jobs: Sequence[Job["Writer"]], *, is_optimistic: bool) -> Sequence[int]:
        """Do the jobs and commit. What is raised has undone them all; when it is the COMMIT that fails, nothing is raised."""
        self._is_optimistic = is_optimistic
        try:
            for job in jobs:
                job.run(self)
            self._flush()
            self._save_time()
        except BaseException:
            for job in jobs:
                job.reset()
            self._roll_back()
            raise
        return self._end(jobs)

    def _end(self, jobs: Sequence[Job["Writer"]]) -> Sequence[int]:
        try:
            self._db.execute("COMMIT")
        except BaseException as error:
            # Not tried again one by one: what a failed COMMIT has left on the disk is unknown, and that is the answer.
            self._roll_back()
            self._fail(jobs, error)
            return ()
        return self._changed

    def _fail(self, jobs: Sequence[Job["Writer"]], error: BaseException) -> None:
        failure = translated(self._files.database, error)
        for job in jobs:
            job.fail(failure)

    def _publish(self, changed: Sequence[int]) -> Changes:
        try:
            return self._notify.publish(changed)
        except OSError:
            # The commit has happened all the same. No other process hears of it before the next one; who watches here does.
            return Changes(0, 0, changed)

    def _begin(self, deadline: float) -> None:
        self._heads, self._expiries, self._expiring = [], [], set()
        self._rows, self._forgotten, self._changed = [], [], []
        retry_until(deadline, self._try_to_begin)

    def _try_to_begin(self) -> bool:
        try:
            self._db.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            # Only a foreign program can be in our way here, for ours hold the lock.
            if error.sqlite_errorcode == sqlite3.SQLITE_BUSY:
                return False
            self.is_broken = True
            raise
        return True

    def _roll_back(self) -> None:
        # A key from a rolled back INSERT will be another stream's.
        self._known.clear()
        try:
            # SQLite has rolled back already after some errors, such as a full disk.
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
        except BaseException:
            self.is_broken = True

    def _save_time(self) -> None:
        now = self.clock.time()
        if now - self._time_saved >= _clock.SAVE_SECONDS:
            _clock.save(self._db, now)
            self._time_saved = now

    def _flush(self) -> None:
        if self._heads and self._db.executemany(_KEEP_EXPIRY, self._heads).rowcount != len(self._heads):
            raise _ConflictError
        if self._expiries and self._db.executemany(_SET_EXPIRY, self._expiries).rowcount != len(self._expiries):
            raise _ConflictError
        self._heads.clear()
        self._expiries.clear()
        self._expiring.clear()
        self._db.executemany("INSERT INTO records VALUES (?, ?, ?)", self._rows)
        self._rows.clear()
        self._db.executemany("DELETE FROM records WHERE stream = ? AND offset < ?", self._forgotten)
        self._forgotten.clear()

    def _insert(self, stream: str, head: Head) -> int | None:
        cursor = self._db.execute(
            "INSERT INTO streams (id, version, tail, state, expires_at, first) VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
            (stream, head.version, head.tail, head.state, head.expires_at, head.first),
        )
        return self._remember(stream, cursor.lastrowid, head.expires_at) if cursor.rowcount else None

    def _update(self, stream: str, seen: int, head: Head) -> int | None:
        known = self._known.get(stream)
        if known is None or not self._replace(*known, seen, head):
            # Not remembered, or deleted and created anew by another process, or not the version.
            if self._find(stream, seen) is None:
                return None
            known = self._known[stream]
            self._replace(*known, seen, head)
        key, _ = known
        self._known[stream] = (key, head.expires_at)
        return key

    def _replace(self, key: int, expires_at: float, seen: int, head: Head) -> bool:
        if expires_at == head.expires_at:
            if self._is_optimistic:
                if key in self._expiring:  # what is kept is flushed before what is set
                    self._flush()
                self._heads.append((head.version, head.tail, head.state, head.first, key, seen, expires_at))
                return True
            row = (head.version, head.tail, head.state, head.first, key, seen, expires_at)
            if self._db.execute(_KEEP_EXPIRY, row).rowcount == 1:
                return True
        elif self._is_optimistic:
            self._expiring.add(key)
            self._expiries.append((head.version, head.tail, head.state, head.first, head.expires_at, key, seen))
            return True
        return (
            self._db.execute(
                _SET_EXPIRY, (head.version, head.tail, head.state, head.first, head.expires_at, key, seen)
            ).rowcount
            == 1
        )

    def _find(self, stream: str, seen: int) -> int | None:
        self._flush()
        query = "SELECT key, expires_at FROM streams WHERE id = ? AND version = ?"
        row = self._db.execute(query, (stream, seen)).fetchone()
        return self._remember(stream, *row) if row else None

    def _remember(self, stream: str, key: int | None, expires_at: float) -> int | None:
        if len(self._known) >= _KEYS_KEPT:
            self._known.clear()
        if key is not None:
            self._known[stream] = (key, expires_at)
        return key
