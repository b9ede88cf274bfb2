"""What streamkeep does to its files: SQLite under a VFS that notes every write, sync, truncation, creation and deletion.

Python's own `sqlite3` cannot be given a VFS, so `recorded` lends streamkeep's SQLite storage a driver that is apsw underneath and
behaves as `sqlite3` does in the few methods that are used there. All else is streamkeep's own code: its statements, pragmas, threads and
locks. What is written afterwards is read and judged with the real `sqlite3`. Nothing is decided here about what survives.
"""

import os
import sqlite3
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any, Final

import apsw
import pytest
from tests.powerloss.disk import Create, Delete, Disk, FailedSync, Operation, Sync, Truncate, Write

from streamkeep.storages.sqlite import _database

CHECKPOINT_PAGES: Final = 8
"""SQLite checkpoints when its log has a thousand pages; here sooner, so that a short workload sees many checkpoints and resets."""

_FULL_PATH: Final = apsw.SQLITE_OPEN_MAIN_DB | apsw.SQLITE_OPEN_WAL | apsw.SQLITE_OPEN_MAIN_JOURNAL
_SYNCS_DIRECTORY: Final = apsw.SQLITE_OPEN_WAL | apsw.SQLITE_OPEN_MAIN_JOURNAL | apsw.SQLITE_OPEN_SUPER_JOURNAL
_serial: Final = count(1)

Obstacle = Callable[[Operation], None]
"""Is shown each operation before it happens; what it raises becomes the operation's failure."""


class Tape:
    """What happened, in order: operations on files, and the marks that others leave between them.

    It begins with a disk as it is now, for which names and files are known.
    """

    def __init__(self, disk: Disk, obstacle: Obstacle | None = None) -> None:
        self.entries: list[object] = []
        self._disk = disk
        self._obstacle = obstacle

    def mark(self, mark: object) -> None:
        """Leave a mark."""
        self.entries.append(mark)

    def file(self, name: str) -> int:
        """Give the number of the file that has this name; one that is new to the disk has just been created."""
        number = self._disk.file(name)
        if number is None:
            number = self._disk.new_number()
            self.note(Create(number, name))
        return number

    def perform(self, operation: Operation, really: Callable[[], None]) -> None:
        """Do it, unless there is an obstacle, and note it."""
        if self._obstacle is not None:
            self._obstacle(operation)
        really()
        self.note(operation)

    def note(self, operation: Operation) -> None:
        """Note what was done."""
        self._disk.do(operation)
        self.entries.append(operation)


@contextmanager
def recorded(tape: Tape, checkpoint_pages: int = CHECKPOINT_PAGES) -> Generator[None]:
    """Have every SQLite storage that is opened and closed in this block note on the tape what it does to its files."""
    vfs = _VFS(f"streamkeep-recorder-{next(_serial)}", tape)
    try:
        with driven_by(vfs.vfs_name, checkpoint_pages):
            yield
    finally:
        vfs.unregister()


@contextmanager
def driven_by(vfs: str, checkpoint_pages: int) -> Generator[None]:
    """Have every SQLite storage that is opened and closed in this block use this VFS."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_database, "sqlite3", _Driver(vfs, checkpoint_pages))
        yield


class _VFS(apsw.VFS):
    """SQLite's own, with a note of everything."""

    def __init__(self, name: str, tape: Tape) -> None:
        super().__init__(name, "")
        self.vfs_name = name
        self._tape = tape

    def xOpen(self, name: str | apsw.URIFilename | None, flags: list[int]) -> apsw.VFSFile:  # noqa: N802 (SQLite's name)
        if name is None or not flags[0] & _FULL_PATH:
            return apsw.VFSFile("", name, flags)
        return _File(self._tape, name, flags)

    def xDelete(self, filename: str, syncdir: bool) -> None:  # noqa: N802
        delete = super().xDelete
        self._tape.perform(Delete(Path(filename).name, bool(syncdir)), lambda: delete(filename, syncdir))


class _File(apsw.VFSFile):
    """A file of SQLite's own VFS, with a note of what is done to it."""

    def __init__(self, tape: Tape, name: str | apsw.URIFilename, flags: list[int]) -> None:
        super().__init__("", name, flags)
        path = name.filename() if isinstance(name, apsw.URIFilename) else name
        self._tape = tape
        self._number = tape.file(Path(path).name)
        # So does SQLite's VFS for Unix: the directory is synced with the first sync of a log or journal that was opened to be created.
        self._syncs_directory = bool(flags[0] & apsw.SQLITE_OPEN_CREATE and flags[0] & _SYNCS_DIRECTORY)

    def xWrite(self, data: Any, offset: int) -> None:  # noqa: N802
        content = bytes(data)
        write = super().xWrite
        self._tape.perform(Write(self._number, offset, content), lambda: write(content, offset))

    def xTruncate(self, newsize: int) -> None:  # noqa: N802
        truncate = super().xTruncate
        self._tape.perform(Truncate(self._number, newsize), lambda: truncate(newsize))

    def xSync(self, flags: int) -> None:  # noqa: N802
        sync = super().xSync
        try:
            self._tape.perform(Sync(self._number, self._syncs_directory), lambda: sync(flags))
        except apsw.Error:
            self._tape.note(FailedSync(self._number))
            raise
        self._syncs_directory = False


class _Driver:
    """The module `sqlite3`, but for `connect`."""

    def __init__(self, vfs: str, checkpoint_pages: int) -> None:
        self._vfs = vfs
        self._checkpoint_pages = checkpoint_pages

    def __getattr__(self, name: str) -> object:
        return getattr(sqlite3, name)

    def connect(
        self,
        database: str | os.PathLike[str],
        *,
        isolation_level: None = None,
        timeout: float = 5.0,
        uri: bool = False,
        check_same_thread: bool = True,
    ) -> "_Connection":
        flags = apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE | (apsw.SQLITE_OPEN_URI if uri else 0)
        with _as_sqlite3():
            db = apsw.Connection(os.fspath(database), flags=flags, vfs=self._vfs)
            db.set_busy_timeout(int(timeout * 1000))
            db.set_wal_hook(self._after_commit)
        return _Connection(db)

    def _after_commit(self, db: apsw.Connection, name: str, pages: int) -> int:
        # What SQLite does here on its own account. It minds no failure, the commit having happened; but apsw would have one that came
        # from a VFS in Python out of the COMMIT, so that it must be left behind here.
        if pages >= self._checkpoint_pages:
            with suppress(apsw.Error):
                db.wal_checkpoint(name, apsw.SQLITE_CHECKPOINT_PASSIVE)
        return apsw.SQLITE_OK


class _Connection:
    """What streamkeep uses of a `sqlite3.Connection` in autocommit mode."""

    def __init__(self, db: apsw.Connection) -> None:
        self._db = db

    @property
    def in_transaction(self) -> bool:
        return self._db.in_transaction

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> "_Cursor":
        with _as_sqlite3():
            rows = list(self._db.execute(sql, parameters))
            return _Cursor(rows, self._db.changes(), self._db.last_insert_rowid())

    def executemany(self, sql: str, parameters: Iterable[Sequence[Any]]) -> "_Cursor":
        before = self._db.total_changes()
        with _as_sqlite3():
            rows = list(self._db.executemany(sql, parameters))
        return _Cursor(rows, self._db.total_changes() - before, None)

    def executescript(self, sql: str) -> None:
        self.execute(sql)

    def close(self) -> None:
        # SQLite closes whether or not it could checkpoint and tidy up.
        with suppress(apsw.Error):
            self._db.close(True)


class _Cursor:
    """The rows of a statement that has run to its end."""

    def __init__(self, rows: Iterable[tuple[Any, ...]], rowcount: int, lastrowid: int | None) -> None:
        self._rows = iter(rows)
        self.rowcount = rowcount
        self.lastrowid = lastrowid

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return self._rows

    def fetchone(self) -> tuple[Any, ...] | None:
        return next(self._rows, None)


@contextmanager
def _as_sqlite3() -> Generator[None]:
    try:
        yield
    except apsw.Error as error:
        code: int = getattr(error, "extendedresult", apsw.SQLITE_ERROR)
        translated = _class_of(code)(str(error) or type(error).__name__)
        translated.sqlite_errorcode = code
        raise translated from error


def _class_of(code: int) -> type[sqlite3.DatabaseError]:
    match code & 0xFF:
        case apsw.SQLITE_CORRUPT | apsw.SQLITE_NOTADB:
            return sqlite3.DatabaseError
        case apsw.SQLITE_CONSTRAINT:
            return sqlite3.IntegrityError
        case _:
            return sqlite3.OperationalError
