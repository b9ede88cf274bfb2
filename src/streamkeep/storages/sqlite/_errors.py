"""What callers are told when SQLite, the operating system, or anything else fails in a thread of a SQLiteStorage."""

import sqlite3
from collections.abc import Generator
from contextlib import contextmanager
from errno import EDQUOT, ENOSPC
from pathlib import Path
from typing import Final

from streamkeep.errors import StorageCorruptError, StorageError, StorageFullError, StreamkeepError

TIMEOUT_SECONDS: Final = 30
"""So long a change may wait for other programs."""


@contextmanager
def translating(path: Path) -> Generator[None]:
    """Let no error of SQLite or the operating system out of this block that is not one of ours."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise translated(path, error) from error


def translated(path: Path, error: BaseException) -> StreamkeepError:
    """Give what a caller is told of this error. Ours are given back."""
    if isinstance(error, StreamkeepError):
        return error
    kind, reason = _explained(error)
    failure = kind(f"{path}: {reason} ({str(error) or type(error).__name__})")
    failure.__cause__ = error
    return failure


def _explained(error: BaseException) -> tuple[type[StorageError], str]:
    match error:
        case TimeoutError():
            return StorageError, _HELD
        case OSError(errno=errno) if errno in {ENOSPC, EDQUOT}:
            return StorageFullError, _FULL
        case OSError():
            return StorageError, _UNUSABLE
        case sqlite3.Error(sqlite_errorcode=int(code)):
            return _EXPLAINED.get(code) or _EXPLAINED.get(code & 0xFF, (StorageError, "SQLite failed"))
        case _:
            return StorageError, f"an unexpected {type(error).__name__}"


_HELD: Final = f"another program has held the database for {TIMEOUT_SECONDS} seconds"
_UNUSABLE: Final = "cannot be opened and written; its directory must exist, and this process must be allowed to write there"
_FULL: Final = "no space left, so nothing was stored; make space and try again"
_EXPLAINED: Final[dict[int, tuple[type[StorageError], str]]] = {
    sqlite3.SQLITE_BUSY: (StorageError, _HELD),
    sqlite3.SQLITE_CANTOPEN: (StorageError, _UNUSABLE),
    sqlite3.SQLITE_PERM: (StorageError, _UNUSABLE),
    sqlite3.SQLITE_READONLY: (StorageError, _UNUSABLE),
    sqlite3.SQLITE_FULL: (StorageFullError, _FULL),
    # Not StorageFullError: when the file must grow in a COMMIT, the log holds all of it already.
    sqlite3.SQLITE_IOERR_SHMSIZE: (StorageError, "no space left for the -shm file beside it; make space and try again"),
    sqlite3.SQLITE_CORRUPT: (StorageCorruptError, "is damaged, or its disk cannot be read"),
    sqlite3.SQLITE_NOTADB: (StorageCorruptError, "is not a streamkeep database, or its first page is damaged"),
}
