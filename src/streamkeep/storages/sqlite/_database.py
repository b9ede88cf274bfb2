"""How the two threads of a SQLiteStorage open its file: the tables, the writing and the reading connection.

Knows nothing of event loops. What keeps the file whole:

- *One connection at a time, among all processes, writes or checkpoints.* SQLite 3.7.0 to 3.51.2 has the "WAL-reset bug"
  (https://sqlite.org/wal.html#walresetbug; also fixed in 3.50.7 and 3.44.6): if a checkpoint starts right after another
  one has completed, and just then a different connection commits and resets the WAL, the second checkpoint misses the
  reset, a later one skips pages, and the database is corrupt. So every transaction (with the checkpoint that its COMMIT
  may run) and every close of the writing connection is made under a lock of ours. The reading connection is opened
  read-only: it can neither write nor checkpoint, not even when it is closed.
- *The database file is opened by SQLite only.* Closing any other descriptor of it would drop the POSIX locks that SQLite
  holds in this process.
- *No connection is open while the process forks.* The child would inherit what SQLite notes in memory about the locks of the file, none of
  which the child has; its own connections would then lock nothing.
- *Other processes are notified after the COMMIT, still under the lock.* Whoever is notified of a change finds it in the database,
  and notifications come in the order in which the changes were made.
"""

import os
import sqlite3
import time
from collections.abc import Generator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Final, Literal

from streamkeep.errors import StorageCorruptError, StorageError
from streamkeep.storages.sqlite import _clock
from streamkeep.storages.sqlite._clock import open_clock
from streamkeep.storages.sqlite._errors import TIMEOUT_SECONDS
from streamkeep.storages.sqlite._files import Files
from streamkeep.storages.sqlite._inherited import Inherited, refuse_inherited
from streamkeep.storages.sqlite._interlock import Interlock
from streamkeep.storages.sqlite._notify import Notify
from streamkeep.storages.sqlite._reader import Reader
from streamkeep.storages.sqlite._writer import Writer

Synchronous = Literal["FULL", "NORMAL"]

_APPLICATION_ID: Final = int.from_bytes(b"stkp", "big")
_FORMAT: Final = 3

# AUTOINCREMENT: a key that was deleted never comes back, so a remembered key is right or finds nothing.
_SCHEMA: Final = f"""
    BEGIN IMMEDIATE;
    CREATE TABLE streams (
        key        INTEGER PRIMARY KEY AUTOINCREMENT,
        id         TEXT    NOT NULL UNIQUE,
        version    INTEGER NOT NULL,
        tail       INTEGER NOT NULL,
        state      BLOB    NOT NULL,
        expires_at REAL    NOT NULL,
        first      INTEGER NOT NULL
    );
    CREATE INDEX expiry ON streams (expires_at);
    CREATE TABLE records (
        stream     INTEGER NOT NULL, -- streams.key
        offset     INTEGER NOT NULL,
        data       BLOB    NOT NULL,
        UNIQUE (stream, offset)
    );
    {_clock.TABLE};
    PRAGMA application_id = {_APPLICATION_ID};
    PRAGMA user_version = {_FORMAT};
    COMMIT;
"""


@contextmanager
def open_writer(files: Files, synchronous: Synchronous) -> Generator[Writer]:
    """Open the database to write to it, creating what is missing; on leaving, close it and let go of its files."""
    refuse_inherited(files)  # before it waits for the lock, which the parent may hold for long
    if files.size():
        _refuse_foreign(files)  # before anything is made beside it
    with ExitStack() as stack:
        lock = _opened(stack, files, files.lock)
        notify_file = _opened(stack, files, files.notify)
        notify = Notify(notify_file)
        interlock = Interlock(turnstile=notify_file, lock=lock)
        with interlock.held(time.monotonic() + TIMEOUT_SECONDS):
            notify.repair()
            db = _connect(files, synchronous)
            stack.callback(_close, db, interlock)
            clock = open_clock(db)
        yield Writer(files, db, interlock, notify, clock, Inherited(files, db, (lock, notify_file)))


@contextmanager
def open_reader(files: Files, synchronous: Synchronous) -> Generator[Reader]:
    """Open the database to read it. What it shows is on the disk, as far as `synchronous` promises."""
    with open_writer(files, synchronous):  # which syncs what a killed process may have left in the log
        # A hot journal of a killed process may make a reader wait, for microseconds; SQLite's own waiting is good enough here.
        uri = files.uri("mode=ro")
        db = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=TIMEOUT_SECONDS, check_same_thread=False)
        try:
            db.execute("PRAGMA user_version").fetchone()  # from here on it has the log open
        except BaseException:
            db.close()
            raise
    try:
        yield Reader(files, db, Inherited(files, db))
    finally:
        db.close()


def _opened(stack: ExitStack, files: Files, path: Path) -> int:
    descriptor = files.open(path)
    stack.callback(os.close, descriptor)
    return descriptor


def _connect(files: Files, synchronous: Synchronous) -> sqlite3.Connection:
    files.create()
    # Another thread closes it when it forks; never do two use it at once.
    db = sqlite3.connect(files.database, isolation_level=None, timeout=TIMEOUT_SECONDS, check_same_thread=False)
    try:
        _prepare(db, files.database, synchronous)
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
        db.executescript(_SCHEMA)
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


def _refuse_foreign(files: Files) -> None:
    """Raise StorageCorruptError if this is certainly no database of ours; look at it without leaving a trace."""
    try:
        is_undecided = _look(files, "mode=ro&immutable=1")
    except sqlite3.DatabaseError:
        # A log or journal may hold what is missing, or damaged, in the file itself. Or another process was just writing to it, which this
        # look does not wait for: where there is a lock, the file is looked at again under it.
        if not files.has("-wal") and not files.has("-journal") and not files.has("-lock"):
            raise
        is_undecided = True
    # Its log can be read too, without leaving a trace, if somebody has it open.
    if is_undecided and files.has("-wal") and files.has("-shm"):
        with suppress(sqlite3.Error):
            _look(files, "mode=ro")


def _look(files: Files, query: str) -> bool:
    with closing(sqlite3.connect(files.uri(query), uri=True, isolation_level=None, timeout=TIMEOUT_SECONDS)) as db:
        return _is_new(db, files.database)


def _is_new(db: sqlite3.Connection, path: Path) -> bool:
    application_id, version, tables = _marks(db)
    if application_id == 0 and version == 0 and tables == 0:
        return True
    if application_id != _APPLICATION_ID:
        raise StorageCorruptError(f"{path} is not a streamkeep database")
    if version < _FORMAT:
        raise StorageCorruptError(f"{path} was written by a streamkeep from before the first release; delete it")
    if version > _FORMAT:
        raise StorageCorruptError(f"{path} was written by a newer streamkeep (format {version}, this one knows {_FORMAT})")
    return False


def _marks(db: sqlite3.Connection) -> tuple[int, int, int]:
    db.execute("BEGIN")  # all of one moment: another process may be creating the database
    try:
        (application_id,) = db.execute("PRAGMA application_id").fetchone()
        (version,) = db.execute("PRAGMA user_version").fetchone()
        (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
    finally:
        if db.in_transaction:  # some errors end it
            db.execute("ROLLBACK")
    return application_id, version, tables


def _close(db: sqlite3.Connection, interlock: Interlock) -> None:
    # If it is the last connection of all, SQLite checkpoints here. Should another process hold the lock for so long (or a fork be unable
    # to wait for it), then it is not the last one, and nothing is written.
    try:
        with suppress(TimeoutError), interlock.held(time.monotonic() + TIMEOUT_SECONDS):
            db.close()
    finally:
        db.close()
