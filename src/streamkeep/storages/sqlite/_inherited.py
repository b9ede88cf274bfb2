"""Connections that a forked child has inherited although they should have been closed before.

That happens when a fork waited for a transaction until it could wait no longer, and when a library forks in C, without Python's hooks.
"""

import ctypes
import os
import sqlite3
from contextlib import suppress
from dataclasses import dataclass

from streamkeep.errors import StorageError
from streamkeep.storages.sqlite._files import Files

_inherited: set[tuple[int, int] | None] = set()


@dataclass(frozen=True, slots=True)
class Inherited:
    """What a child must let go of: a connection, and descriptors that may carry locks."""

    files: Files
    db: sqlite3.Connection
    descriptors: tuple[int, ...] = ()

    def abandon(self) -> None:
        """Let go of it without disturbing the parent; this process can open the database no more."""
        _inherited.add(self.files.identity)
        # Never to be closed, not even by the garbage collector: SQLite would take the parent's locks for its own.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.db))
        for descriptor in self.descriptors:
            with suppress(OSError):
                os.close(descriptor)


def refuse_inherited(files: Files) -> None:
    """Raise StorageError if this process has a connection of its parent's to the database.

    SQLite believes then that this process holds locks of the file, so connections of its own would lock nothing.
    """
    if files.identity in _inherited:
        raise StorageError(
            f"{files.database} was in use when this process was forked, and cannot be opened in it; fork earlier, or start a new program"
        )
