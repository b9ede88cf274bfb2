"""Where a SQLite database lives: the file itself, and what streamkeep keeps beside it."""

import os
import stat
import sys
from contextlib import suppress
from pathlib import Path
from typing import Final
from urllib.parse import quote

from streamkeep.errors import StorageError

_OWN: Final = os.O_RDWR | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
_PRIVATE: Final = 0o600


class Files:
    """The file that this path leads to now, and two beside it that are streamkeep's own (as `-wal` is SQLite's).

    All names of one file lead to the same place, except hard links.
    """

    def __init__(self, path: Path) -> None:
        self.database: Final = Path(os.path.realpath(path))
        self.lock: Final = self.database.with_name(self.database.name + "-lock")
        self.notify: Final = self.database.with_name(self.database.name + "-notify")
        self._identity: tuple[int, int] | None = None

    def uri(self, query: str) -> str:
        """Give the URI by which SQLite opens the database."""
        # The empty authority keeps SQLite from taking a part of the path for one.
        return f"file://{'' if os.name == 'posix' else '/'}{quote(os.fsencode(self.database))}?{query}"

    def create(self) -> None:
        """Make the database an empty file, unless it is there; to be called under the lock. It must not come to be while it is in use.

        It is private, because streams are people's conversations.
        """
        # Only if it is new, so no connection of this process has it open, whose locks closing the descriptor would drop.
        if self._identity is None:
            with suppress(FileExistsError):
                os.close(os.open(self.database, os.O_CREAT | os.O_EXCL, _PRIVATE))
        self.check()

    def check(self) -> None:
        """Raise StorageError if the path leads to another file than at the first call, or to none.

        SQLite would not notice, and commit to a file that nobody will ever open again.
        """
        identity = self._current_identity()
        if self._identity is None:
            self._identity = identity
        if identity is None or identity != self._identity:
            raise StorageError(
                f"{self.database} was removed or replaced while it was open; nothing can be stored in it any more"
            )

    @property
    def identity(self) -> tuple[int, int] | None:
        """What the system knows the database by: at the first `check`, or now; None if there is none."""
        return self._identity or self._current_identity()

    def open(self, path: Path) -> int:
        """Give a descriptor of one of the two others. If it is made here, whoever may use the database may use it."""
        while True:
            with suppress(FileNotFoundError):
                return os.open(path, _OWN)
            with suppress(FileExistsError):
                descriptor = os.open(path, _OWN | os.O_CREAT | os.O_EXCL, _PRIVATE)
                self._share(descriptor)
                return descriptor

    def _share(self, descriptor: int) -> None:
        if sys.platform == "win32":
            return
        with suppress(FileNotFoundError):
            database, own = self.database.stat(), os.fstat(descriptor)
            if database.st_gid != own.st_gid:
                with suppress(PermissionError):  # a group that one belongs to
                    os.fchown(descriptor, -1, database.st_gid)
            if database.st_uid != own.st_uid:
                with suppress(PermissionError):  # only root may give files away
                    os.fchown(descriptor, database.st_uid, -1)
            os.fchmod(descriptor, database.st_mode & 0o666)  # whatever the umask is

    def _current_identity(self) -> tuple[int, int] | None:
        try:
            status = self.database.stat()
        except FileNotFoundError:
            return None
        return status.st_dev, status.st_ino

    def size(self) -> int:
        """Give the size of the database, 0 if there is none. StorageError: it is something else than a file, or not ours to write.

        What is made beside a database by somebody who may not write it would only lock out those who may.
        """
        try:
            status = self.database.stat()
        except FileNotFoundError:
            return 0
        if not stat.S_ISREG(status.st_mode):
            raise StorageError(f"{self.database}: cannot be opened, because it is no ordinary file")
        if not os.access(self.database, os.R_OK | os.W_OK, effective_ids=os.access in os.supports_effective_ids):
            raise StorageError(
                f"{self.database}: cannot be opened and written; this process must be allowed to read and write it"
            )
        return status.st_size

    def has(self, suffix: str) -> bool:
        """Say whether there is such a file beside the database."""
        return self.database.with_name(self.database.name + suffix).exists()
