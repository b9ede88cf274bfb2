"""SQLiteStorage: streams in one file that any number of processes of a machine may share.

Two threads per storage: one writes, one reads. What keeps it correct:

- *One connection per process writes and checkpoints, and one at a time among all processes.* SQLite 3.7.0 to 3.51.2 has
  the "WAL-reset bug" (https://sqlite.org/wal.html#walresetbug): while a checkpoint starts right after another one that had
  completed, a commit by another connection may reset the WAL unnoticed; a later checkpoint then skips pages, and the
  database is corrupt. Both need two connections that write or checkpoint at the same instant, so every transaction,
  checkpoint and close is made under a lock of ours. The reading connection is opened read-only: it never does either.
- *Never open the database file but through SQLite.* Closing any descriptor of it drops this process's POSIX locks on it.
- *A commit gets a number, which is written to the `-notify` file afterwards, under the lock.* Other processes watch that
  file, so it never says less than is true for long, and never what is not yet there.
"""

import asyncio
import os
import sqlite3
import stat
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from errno import EDQUOT, ENOSPC
from functools import partial
from pathlib import Path
from typing import Final, Literal, Self
from urllib.parse import quote

from streamkeep.errors import StorageCorruptError, StorageError, StorageFullError
from streamkeep.storage import PAGE_BYTES, Doorbell, Head, Page
from streamkeep.storages._batches import BatchThread, Job
from streamkeep.storages._doorbells import Doorbells
from streamkeep.storages._interlock import Interlock, open_or_create, patiently
