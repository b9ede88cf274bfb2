"""SQLiteStorage: streams in one file, which any number of processes of a machine may share; asyncio only."""

import asyncio
import os
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final, Self, get_args

from streamkeep.errors import InvalidArgumentError, StorageError
from streamkeep.storage import Doorbell, Head, Page
from streamkeep.storages import _inotify
from streamkeep.storages._batches import BatchThread, Job
from streamkeep.storages._doorbells import Doorbells
from streamkeep.storages._sqlite import (
    Changes,
    Files,
    Reader,
    Synchronous,
    Writer,
    open_reader,
    open_writer,
    read_number,
    translating,
)

_POLL_SECONDS: Final = 0.025


class SQLiteStorage:
    """Keeps streams in the SQLite database at `path`, which is created, readable by this user only, if it is missing.

    Any number of processes of one machine may share the file, each through a storage of its own; so may several storages of
    one process. Beside it lie `-wal` and `-shm`, which are SQLite's, and `-lock` and `-notify`, which are streamkeep's: do not
    delete them while a process has the database open. The file must be on a local disk, not on a network.

    What a commit that has returned True survives:

    - `synchronous="FULL"`: the death of the process, of the system, and a power failure.
    - `synchronous="NORMAL"`: the death of the process. The system's takes the last moments, but nothing is damaged.

    Entering raises StorageError if the file cannot be used here, and StorageCorruptError if it is no database of streamkeep's.
    Leaving waits for the commits that were asked for, and removes nothing.
    """

    def __init__(self, path: str | os.PathLike[str], *, synchronous: Synchronous = "FULL") -> None:
        if synchronous not in get_args(Synchronous):
            raise InvalidArgumentError(f"synchronous is FULL or NORMAL, not {synchronous!r}")
        self._files = Files(Path(path))
        self._synchronous = synchronous
        self._doorbells = Doorbells()
        self._entered: _Entered | None = None

    async def __aenter__(self) -> Self:
        if self._entered is not None:
            raise StorageError(f"{self._files.database} is open already: enter a storage once, or make another one")
        async with AsyncExitStack() as stack:
            self._entered = await _enter(stack, self._files, self._synchronous, self._doorbells)
            self._exit_stack = stack.pop_all()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._entered = None
        await self._exit_stack.aclose()

    async def read(self, stream: str, start: int = 0, limit: int = 0) -> Page | None:
        """See `Storage.read`."""
        return await self._open.reader.start(lambda reader: reader.read(stream, start, limit))

    async def commit(self, stream: str, seen: int | None, head: Head, records: Sequence[bytes] = ()) -> bool:
        """See `Storage.commit`."""
        return await self._open.writer.start(lambda writer: writer.commit(stream, seen, head, records))

    async def delete(self, stream: str, seen: int) -> bool:
        """See `Storage.delete`."""
        return await self._open.writer.start(lambda writer: writer.delete(stream, seen))

    async def scan(self, after: str = "", limit: int = 100) -> Sequence[str]:
        """See `Storage.scan`."""
        return await self._open.reader.start(lambda reader: reader.scan(after, limit))

    @asynccontextmanager
    async def watch(self, stream: str) -> AsyncGenerator[Doorbell]:
        """See `Storage.watch`."""
        self._open.news.listen()
        async with self._doorbells.watch(stream) as doorbell:
            yield doorbell

    @property
    def _open(self) -> "_Entered":
        if self._entered is None:
            raise StorageError(f"{self._files.database} is not open: use the storage inside 'async with'")
        return self._entered


class _Entered:
    """What an open storage works with."""

    def __init__(self, writer: BatchThread[Writer], reader: BatchThread[Reader], news: "_News") -> None:
        self.writer = writer
        self.reader = reader
        self.news = news


async def _enter(stack: AsyncExitStack, files: Files, synchronous: Synchronous, doorbells: Doorbells) -> _Entered:
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        raise StorageError("SQLiteStorage needs asyncio, and this is another event loop; use MemoryStorage here") from None
    news = _News(loop, doorbells)
    # The writer creates the files, and is the last to leave, so that a reader never is the one who has to tidy up.
    opening_writer = partial(open_writer, files, synchronous)
    writer = await stack.enter_async_context(BatchThread("streamkeep-sqlite-writer", opening_writer, news.after(Writer.run)))
    reader = await stack.enter_async_context(BatchThread("streamkeep-sqlite-reader", partial(open_reader, files), _read))
    stack.callback(news.stop)
    return _Entered(writer, reader, news)
