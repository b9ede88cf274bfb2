"""What SQLiteStorage does in its two threads: the tables, the writing and the reading session, and SQLite's errors.

Knows nothing of event loops. What keeps the file whole:

- *One connection at a time, among all processes, writes or checkpoints.* SQLite 3.7.0 to 3.51.2 has the "WAL-reset bug"
  (https://sqlite.org/wal.html#walresetbug; also fixed in 3.50.7 and 3.44.6): if a checkpoint starts right after another
  one has completed, and just then a different connection commits and resets the WAL, the second checkpoint misses the
  reset, a later one skips pages, and the database is corrupt. So every transaction (with the checkpoint that its COMMIT
  may run) and every close of the writing connection is made under a lock of ours. The reading connection is opened
  read-only: it can neither write nor checkpoint, not even when it is closed.
- *The database file is opened by SQLite only.* Closing any other descriptor of it would drop the POSIX locks that SQLite
  holds in this process.
- *Changes are told to other processes after the COMMIT, still under the lock.* Whoever hears of one finds it in the database,
  and they are told in the order in which they were made.
"""

import os
import sqlite3
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from errno import EDQUOT, ENOSPC
from pathlib import Path
from typing import Final, Literal
from urllib.parse import quote

from streamkeep.errors import StorageCorruptError, StorageError, StorageFullError
from streamkeep.storage import PAGE_BYTES, Head, Page
from streamkeep.storages._batch_thread import Job, Outcome
from streamkeep.storages.sqlite._clock import note, offset_of
from streamkeep.storages.sqlite._interlock import Interlock, retry_until
from streamkeep.storages.sqlite._notify import Changes, Notify, checksum

Synchronous = Literal["FULL", "NORMAL"]

_TIMEOUT_SECONDS: Final = 30
_APPLICATION_ID: Final = int.from_bytes(b"stkp", "big")
_FORMAT: Final = 2
_KEYS_KEPT: Final = 10_000
_READ_BYTES: Final = 4 << 20
"""After so many the loop gets what was read, and reading goes on when it has taken that."""

# AUTOINCREMENT: a key that was deleted never comes back, so a remembered key is right or finds nothing.
_SCHEMA: Final = """
    BEGIN IMMEDIATE;
    CREATE TABLE streams (
        key        INTEGER PRIMARY KEY AUTOINCREMENT,
        id         TEXT    NOT NULL UNIQUE,
        version    INTEGER NOT NULL,
        tail       INTEGER NOT NULL,
        state      BLOB    NOT NULL,
        expires_at REAL    NOT NULL
    );
    CREATE INDEX expiring ON streams (expires_at);
    CREATE TABLE records (
        stream     INTEGER NOT NULL, -- streams.key
        offset     INTEGER NOT NULL,
        data       BLOB    NOT NULL,
        UNIQUE (stream, offset)
    );
    CREATE TABLE clock ( -- see _clock.py
        id         INTEGER PRIMARY KEY CHECK (id = 1),
        boot       TEXT    NOT NULL,
        offset     REAL    NOT NULL,
        latest     REAL    NOT NULL
    );
"""


_HeadRow = tuple[int, int, bytes, float, int, int]
_REPLACE: Final = "UPDATE streams SET version = ?, tail = ?, state = ?, expires_at = ? WHERE key = ? AND version = ?"
_HEAD: Final = "version, tail, state, expires_at"


@dataclass(frozen=True, slots=True)
class Files:
    """Where a database lives: the file itself, and two beside it that are streamkeep's own (as `-wal` is SQLite's)."""

    database: Path

    @property
    def lock(self) -> Path:
        """The lock between processes."""
        return self.database.with_name(self.database.name + "-lock")

    @property
    def notify(self) -> Path:
        """Tells other processes what has changed."""
        return self.database.with_name(self.database.name + "-notify")

    def open(self, path: Path) -> int:
        """Give a descriptor of one of the two. A new file has the database's permissions and owner, or is private with a new one.

        Else a look at it by root would lock its owner out.
        """
        flags = os.O_RDWR | getattr(os, "O_BINARY", 0)
        try:
            return os.open(path, flags)
        except FileNotFoundError:
            pass
        try:
            there = self.database.stat()
        except FileNotFoundError:
            return os.open(path, flags | os.O_CREAT, 0o600)
        descriptor = os.open(path, flags | os.O_CREAT, 0o600)
        with suppress(PermissionError):  # not root, so it is ours anyway; or nothing can be done
            os.fchown(descriptor, there.st_uid, there.st_gid)
        with suppress(PermissionError):
            os.fchmod(descriptor, there.st_mode & 0o666)
        return descriptor


class _ConflictError(Exception):
    """One of the commits of a batch has not seen the version."""


class Writer:
    """The one connection that writes. `run` is for the thread, `commit` and `delete` are for its jobs."""

    def __init__(self, path: Path, db: sqlite3.Connection, interlock: Interlock, notify: Notify, clock_offset: float) -> None:
        self.clock_offset = clock_offset
        self._path = path
        self._place = _place_of(path)
        self._db = db
        self._interlock = interlock
        self._notify = notify
        self._keys: dict[str, int] = {}
        self._optimistic = True
        self._heads: list[_HeadRow] = []
        self._rows: list[tuple[int, int, bytes]] = []
        self._changed: list[int] = []

    def commit(self, stream: str, seen: int | None, head: Head, records: Sequence[bytes]) -> bool:
        """Do `Storage.commit`."""
        key = self._insert(stream, head) if seen is None else self._update(stream, seen, head)
        if key is None:
            return False
        for offset, record in enumerate(records, head.tail - len(records)):
            self._rows.append((key, offset, record))
        self._changed.append(checksum(stream))
        return True

    def delete(self, stream: str, seen: int) -> bool:
        """Do `Storage.delete`."""
        key = self._find(stream, seen)
        if key is None:
            return False
        self._db.execute("DELETE FROM records WHERE stream = ?", (key,))
        self._db.execute("DELETE FROM streams WHERE key = ?", (key,))
        del self._keys[stream]
        self._changed.append(checksum(stream))
        return True

    def run(self, jobs: Sequence[Job["Writer"]]) -> Changes | None:
        """Do the jobs in one transaction and say what they changed. If one of them fails, each gets its own.

        First as if every commit had seen the version, for then all heads are replaced by one statement.
        """
        deadline = time.monotonic() + _TIMEOUT_SECONDS
        with translating(self._path), self._interlock.held(deadline):
            self._check_place()
            try:
                changed = self._transact(jobs, deadline, optimistic=True)
            except _ConflictError:
                changed = self._one_statement_each(jobs, deadline)
            except Exception:
                changed = self._one_by_one(jobs, deadline)
            return self._tell(changed) if changed else None

    def _check_place(self) -> None:
        # SQLite would not notice, and commit to a file that nobody will ever open again.
        if _place_of(self._path) != self._place:
            raise StorageError(f"{self._path} was removed or replaced while it was open; nothing can be stored in it any more")

    def _one_statement_each(self, jobs: Sequence[Job["Writer"]], deadline: float) -> Sequence[int]:
        try:
            return self._transact(jobs, deadline, optimistic=False)
        except Exception:
            return self._one_by_one(jobs, deadline)

    def _one_by_one(self, jobs: Sequence[Job["Writer"]], deadline: float) -> Sequence[int]:
        changed: list[int] = []
        for job in jobs:
            try:
                changed += self._transact([job], deadline, optimistic=False)
            except BaseException as error:
                job.fail(translated(self._path, error))
        return changed

    def _transact(self, jobs: Sequence[Job["Writer"]], deadline: float, *, optimistic: bool) -> Sequence[int]:
        self._optimistic, self._heads, self._rows, self._changed = optimistic, [], [], []
        retry_until(self._begin, deadline)
        try:
            for job in jobs:
                job.run(self)
            self._flush()
        except BaseException:
            self._roll_back()
            raise
        return self._end(jobs)

    def _end(self, jobs: Sequence[Job["Writer"]]) -> Sequence[int]:
        try:
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            # Not tried again one by one: what a failed COMMIT has left on the disk is unknown, and that is the answer.
            self._roll_back()
            for job in jobs:
                job.fail(translated(self._path, error))
            return ()
        return self._changed

    def _tell(self, changed: Sequence[int]) -> Changes:
        try:
            return self._notify.tell(changed)
        except OSError:
            # The commit has happened all the same. Nobody else hears of it before the next one; who watches here does.
            return Changes(0, 0, changed)

    def _begin(self) -> bool:
        try:
            self._db.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            # Only a foreign program can be in our way here, for ours hold the lock.
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY:
                raise
            return False
        return True

    def _roll_back(self) -> None:
        # A key from a rolled back INSERT will be another stream's.
        self._keys.clear()
        # SQLite has rolled back already after some errors, such as a full disk.
        with suppress(sqlite3.Error):
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")

    def _flush(self) -> None:
        if self._heads and self._db.executemany(_REPLACE, self._heads).rowcount != len(self._heads):
            raise _ConflictError
        self._heads.clear()
        self._db.executemany("INSERT INTO records VALUES (?, ?, ?)", self._rows)
        self._rows.clear()

    def _insert(self, stream: str, head: Head) -> int | None:
        cursor = self._db.execute(
            "INSERT INTO streams (id, version, tail, state, expires_at) VALUES (?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
            (stream, head.version, head.tail, head.state, head.expires_at),
        )
        return self._remember(stream, cursor.lastrowid) if cursor.rowcount else None

    def _update(self, stream: str, seen: int, head: Head) -> int | None:
        key = self._keys.get(stream)
        if key is not None and self._replace(key, seen, head):
            return key
        # Not remembered, or deleted and created anew by another process, or not the version.
        key = self._find(stream, seen)
        if key is not None:
            self._replace(key, seen, head)
        return key

    def _replace(self, key: int, seen: int, head: Head) -> bool:
        row = (head.version, head.tail, head.state, head.expires_at, key, seen)
        if self._optimistic:
            self._heads.append(row)
            return True
        return self._db.execute(_REPLACE, row).rowcount == 1

    def _find(self, stream: str, seen: int) -> int | None:
        self._flush()
        row = self._db.execute("SELECT key FROM streams WHERE id = ? AND version = ?", (stream, seen)).fetchone()
        return self._remember(stream, row[0]) if row else None

    def _remember(self, stream: str, key: int | None) -> int | None:
        if len(self._keys) >= _KEYS_KEPT:
            self._keys.clear()
        if key is not None:
            self._keys[stream] = key
        return key


class Reader:
    """The one connection that reads. `run` is for the thread, the others are for its jobs."""

    def __init__(self, path: Path, db: sqlite3.Connection) -> None:
        self._path = path
        self._db = db

    def run(self, jobs: Sequence[Job["Reader"]]) -> Outcome:
        """Do the jobs, at one moment, until they have brought some mebibytes; what fails one of them is no business of the others."""
        done = size = 0
        with translating(self._path):
            self._db.execute("BEGIN")
        try:
            while done < len(jobs) and size < _READ_BYTES:
                size += self._run_one(jobs[done])
                done += 1
        finally:
            self._roll_back()
        return done, None

    def _run_one(self, job: Job["Reader"]) -> int:
        """Do one, and say how many bytes it has brought."""
        try:
            result = job.run(self)
        except BaseException as error:
            job.fail(translated(self._path, error))
            return 0
        return sum(map(len, result.records)) if isinstance(result, Page) else 0

    def _roll_back(self) -> None:
        # After an error of the disk SQLite has done so by itself.
        with suppress(sqlite3.Error):
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")

    def read(self, stream: str, start: int, limit: int) -> Page | None:
        """Do `Storage.read`."""
        row = self._db.execute("SELECT key, version, tail, state, expires_at FROM streams WHERE id = ?", (stream,)).fetchone()
        if row is None:
            return None
        key, version, tail, state, expires_at = row
        records = self._records(key, start, limit) if limit and start < tail else ()
        return Page(Head(version, tail, state, expires_at), records)

    def _records(self, key: int, start: int, limit: int) -> Sequence[bytes]:
        rows = self._db.execute(
            "SELECT data FROM records WHERE stream = ? AND offset >= ? ORDER BY offset LIMIT ?", (key, start, limit)
        )
        records: list[bytes] = []
        size = 0
        for (record,) in rows:
            records.append(record)
            size += len(record)
            if size >= PAGE_BYTES:
                break
        return records

    def scan(self, after: str, limit: int) -> Sequence[tuple[str, Head]]:
        """Do `Storage.scan`. (SQLite compares UTF-8 bytes, whose order is that of the code points.)"""
        rows = self._db.execute(f"SELECT id, {_HEAD} FROM streams WHERE id > ? ORDER BY id LIMIT ?", (after, limit))  # noqa: S608
        return [(stream, Head(*head)) for stream, *head in rows]

    def expired(self, before: float, limit: int) -> Sequence[tuple[str, Head]]:
        """Do `Storage.expired`."""
        rows = self._db.execute(
            f"SELECT id, {_HEAD} FROM streams WHERE expires_at <= ? ORDER BY expires_at LIMIT ?",  # noqa: S608
            (before, limit),
        )
        return [(stream, Head(*head)) for stream, *head in rows]


@contextmanager
def open_writer(files: Files, synchronous: Synchronous) -> Generator[Writer]:
    """Open the database to write to it, creating what is missing; on leaving, close it and let go of its files."""
    with ExitStack() as stack:
        with translating(files.database):
            _refuse_foreign(files.database)
            lock = _opened(stack, files, files.lock)
            notify_file = _opened(stack, files, files.notify)
            notify = Notify(notify_file)
            interlock = Interlock(turnstile=notify_file, lock=lock)
            with interlock.held(time.monotonic() + _TIMEOUT_SECONDS):
                notify.mend()
                db = _connect(files.database, synchronous)
                stack.callback(_close, db, interlock)
                clock_offset = offset_of(db)
                note(db, clock_offset)
        yield Writer(files.database, db, interlock, notify, clock_offset)


@contextmanager
def open_reader(files: Files) -> Generator[Reader]:
    """Open a database that a writer of this process has open, to read it."""
    # A hot journal of a killed process may make a reader wait, for microseconds; SQLite's own waiting is good enough here.
    with translating(files.database):
        db = sqlite3.connect(
            _url(files.database, ""), uri=True, isolation_level=None, timeout=_TIMEOUT_SECONDS, check_same_thread=False
        )
    try:
        yield Reader(files.database, db)
    finally:
        db.close()


def _refuse_foreign(path: Path) -> None:
    """Raise before anything is made beside a file that is none of ours.

    Read by SQLite, which leaves the locks alone that others in this process hold on the file; and as one that nobody changes, so that
    nothing is made for it either. Of a database of ours whose first commits are in its log only, the file may say nothing yet.
    """
    if not path.is_file():
        return
    with closing(sqlite3.connect(_url(path, "immutable=1"), uri=True)) as db:
        try:
            (application_id,) = db.execute("PRAGMA application_id").fetchone()
            (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        except sqlite3.DatabaseError as error:
            # A crash, or a full disk, may have left half a checkpoint in the file: with its log it is whole.
            if error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_CORRUPT:
                return
            raise
    if application_id not in {0, _APPLICATION_ID} or (tables and not application_id):
        raise StorageCorruptError(f"{path} is not a streamkeep database")


def _url(path: Path, options: str) -> str:
    return f"file:{quote(os.fspath(path))}?mode=ro&{options}".rstrip("&")


def _opened(stack: ExitStack, files: Files, path: Path) -> int:
    descriptor = files.open(path)
    stack.callback(os.close, descriptor)
    return descriptor


def _connect(path: Path, synchronous: Synchronous) -> sqlite3.Connection:
    # A new file is private: streams are people's conversations. Under the lock and only if it is new, so no connection of
    # this process has it open, whose locks closing the descriptor would drop.
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o600))
    # A fork closes it from whichever thread forks, while this one waits.
    db = sqlite3.connect(path, isolation_level=None, timeout=_TIMEOUT_SECONDS, check_same_thread=False)
    try:
        _prepare(db, path, synchronous)
    except BaseException:
        db.close()
        raise
    return db


def _prepare(db: sqlite3.Connection, path: Path, synchronous: Synchronous) -> None:
    is_new = _is_new(db, path)
    (mode,) = db.execute("PRAGMA journal_mode = WAL").fetchone()
    if mode != "wal":
        raise StorageError(f"{path}: SQLite cannot use its write-ahead log here; use a file on a local disk")
    if is_new:
        db.executescript(f"{_SCHEMA} PRAGMA application_id = {_APPLICATION_ID}; PRAGMA user_version = {_FORMAT}; COMMIT;")
    db.execute(f"PRAGMA synchronous = {synchronous}")
    # Without it, macOS's fsync leaves data in the drive's cache; elsewhere it does nothing.
    db.execute(f"PRAGMA fullfsync = {synchronous == 'FULL'}")
    _sync_log(db)
    db.execute("PRAGMA busy_timeout = 0")


def _sync_log(db: sqlite3.Connection) -> None:
    # A killed process may have left a commit in the log that it had not synced yet. Whoever reads now sees it, so it must not be
    # lost any more. A checkpoint syncs the log first; if there is no space for the rest of it, it does that another time.
    try:
        db.execute("PRAGMA wal_checkpoint(PASSIVE)")
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_FULL:
            raise


def _is_new(db: sqlite3.Connection, path: Path) -> bool:
    (application_id,) = db.execute("PRAGMA application_id").fetchone()
    (version,) = db.execute("PRAGMA user_version").fetchone()
    (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if application_id == 0 and version == 0 and tables == 0:
        return True
    if application_id != _APPLICATION_ID:
        raise StorageCorruptError(f"{path} is not a streamkeep database")
    if version < _FORMAT:
        raise StorageCorruptError(f"{path} was written by a streamkeep from before the first release; delete it")
    if version > _FORMAT:
        raise StorageCorruptError(f"{path} was written by a newer streamkeep (format {version}, this one knows {_FORMAT})")
    return False


def _place_of(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _close(db: sqlite3.Connection, interlock: Interlock) -> None:
    # If it is the last connection of all, SQLite checkpoints here. Should another process hold the lock for so long, then it
    # is not the last one, and nothing is written.
    try:
        with suppress(TimeoutError), interlock.held(time.monotonic() + _TIMEOUT_SECONDS):
            db.close()
    finally:
        db.close()


@contextmanager
def translating(path: Path) -> Generator[None]:
    """Let no error of SQLite or the operating system out of this block that is not one of ours."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise translated(path, error) from error


def translated(path: Path, error: BaseException) -> StorageError:
    """Give the StorageError for an error of SQLite or the operating system, or for a bug."""
    if isinstance(error, StorageError):
        return error
    kind, reason = _explained(error)
    failure = kind(f"{path}: {reason} ({type(error).__name__}: {error})")
    failure.__cause__ = error
    return failure


def _explained(error: BaseException) -> tuple[type[StorageError], str]:
    match error:
        case TimeoutError():
            return StorageError, f"another program has held the database for {_TIMEOUT_SECONDS} seconds"
        case OSError(errno=errno) if errno in {ENOSPC, EDQUOT}:
            return StorageFullError, _FULL
        case OSError():
            return StorageError, _UNUSABLE
        case sqlite3.Error(sqlite_errorcode=int(code)):
            return _EXPLAINED.get(code) or _EXPLAINED.get(code & 0xFF, (StorageError, "SQLite failed"))
        case _:
            return StorageError, "failed"


_UNUSABLE: Final = "cannot be opened and written; its directory must exist, and this process must be allowed to write there"
_FULL: Final = "no space left, so nothing was stored; make space and try again"
_EXPLAINED: Final[dict[int, tuple[type[StorageError], str]]] = {
    sqlite3.SQLITE_BUSY: (StorageError, f"another program has held the database for {_TIMEOUT_SECONDS} seconds"),
    sqlite3.SQLITE_CANTOPEN: (StorageError, _UNUSABLE),
    sqlite3.SQLITE_PERM: (StorageError, _UNUSABLE),
    sqlite3.SQLITE_READONLY: (StorageError, _UNUSABLE),
    sqlite3.SQLITE_FULL: (StorageFullError, _FULL),
    # Not StorageFullError: when the file must grow in a COMMIT, the log holds all of it already.
    sqlite3.SQLITE_IOERR_SHMSIZE: (StorageError, "no space left for the -shm file beside it; make space and try again"),
    sqlite3.SQLITE_CORRUPT: (StorageCorruptError, "is damaged"),
    sqlite3.SQLITE_NOTADB: (StorageCorruptError, "is not a streamkeep database, or its first page is damaged"),
}
