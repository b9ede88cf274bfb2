"""SQLiteStorage: streams in one file, which any number of processes of a machine may share; asyncio only."""

import asyncio
import os
from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from streamkeep.errors import InvalidArgumentError, StorageError
from streamkeep.storage import Doorbell, Head, Page
from streamkeep.storages import _before_fork
from streamkeep.storages._asyncio_storage import AsyncioStorage
from streamkeep.storages._batch_thread import BatchThread, Done, Job
from streamkeep.storages._doorbells import Doorbells
from streamkeep.storages.sqlite._clock import Clock
from streamkeep.storages.sqlite._database import Synchronous, open_reader, open_writer
from streamkeep.storages.sqlite._errors import translated, translating
from streamkeep.storages.sqlite._files import Files
from streamkeep.storages.sqlite._inotify import drain, open_inotify
from streamkeep.storages.sqlite._notify import Changes, Notify, checksum
from streamkeep.storages.sqlite._reader import Reader
from streamkeep.storages.sqlite._writer import Writer

__all__ = ["SQLiteStorage"]

_POLL_SECONDS: Final = 0.025


class SQLiteStorage(AsyncioStorage["_Entered"]):
    """Keeps streams in the SQLite database at `path`, which is created, readable by this user only, if it is missing.

    Any number of processes of one machine may share the file, each through a storage of its own; so may several storages of
    one process. Names that are symbolic links lead to the same file; hard links must not be used. Beside it lie `-wal` and `-shm`,
    which are SQLite's, and `-lock` and `-notify`, which are streamkeep's: do not delete them while a process has the database
    open. The file must be on a local disk, not on a network.

    The process may fork. The parent goes on; the child opens a storage of its own.

    What a commit that has returned True survives:

    - `synchronous="FULL"`: the death of the process, of the system, and a power failure.
    - `synchronous="NORMAL"`: the death of the process. The system's takes the last moments, but nothing is damaged (unless
      the disk has refused a sync before).

    Entering raises StorageError if the file cannot be used here, and StorageCorruptError if it is no database of streamkeep's.
    Leaving waits for the commits that were asked for, and removes nothing.
    """

    def __init__(self, path: str | os.PathLike[str], *, synchronous: Synchronous = "FULL") -> None:
        if synchronous not in {"FULL", "NORMAL"}:
            raise InvalidArgumentError(f"synchronous is FULL or NORMAL, not {synchronous!r}")
        if "\0" in os.fspath(path):
            raise InvalidArgumentError("a path cannot hold a NUL character")
        self._path = _absolute(Path(path))
        super().__init__(str(self._path))
        self._synchronous: Synchronous = synchronous
        self._doorbells: Doorbells[int] = Doorbells()

    async def read(self, stream: str, start: int = 0, limit: int = 0) -> Page | None:
        """See `Storage.read`."""
        return await self._open.reader.start(lambda reader: reader.read(stream, start, limit))

    async def commit(self, stream: str, seen: int | None, head: Head, records: Sequence[bytes] = ()) -> bool:
        """See `Storage.commit`."""
        return await self._open.writer.start(lambda writer: writer.commit(stream, seen, head, records))

    async def delete(self, stream: str, seen: int) -> bool:
        """See `Storage.delete`."""
        return await self._open.writer.start(lambda writer: writer.delete(stream, seen))

    async def scan(self, after: str = "", limit: int = 100) -> Sequence[tuple[str, Head]]:
        """See `Storage.scan`."""
        return await self._open.reader.start(lambda reader: reader.scan(after, limit))

    async def expired(self, before: float, limit: int = 100) -> Sequence[tuple[str, Head]]:
        """See `Storage.expired`."""
        return await self._open.reader.start(lambda reader: reader.expired(before, limit))

    def time(self) -> float:
        """See `Storage.time`."""
        return self._open.clock.time()

    def clone(self) -> "SQLiteStorage":
        """See `Storage.clone`."""
        return SQLiteStorage(self._path, synchronous=self._synchronous)

    @asynccontextmanager
    async def watch(self, stream: str) -> AsyncGenerator[Doorbell]:
        """See `Storage.watch`."""
        self._open.listener.listen()
        async with self._doorbells.watch(checksum(stream)) as doorbell:
            yield doorbell

    async def _enter(self, stack: AsyncExitStack) -> "_Entered":
        files = Files(self._path)
        translate = partial(translated, files.database)
        listener = _Listener(asyncio.get_running_loop(), files, self._doorbells)
        writer = BatchThread(
            "streamkeep-sqlite-writer", partial(open_writer, files, self._synchronous), partial(_write, listener), translate
        )
        reader = BatchThread("streamkeep-sqlite-reader", partial(open_reader, files, self._synchronous), Reader.run, translate)
        # The writer comes first and goes last: it creates the files, and what there is to tidy up is tidied up by it.
        await stack.enter_async_context(writer)
        await stack.enter_async_context(reader)
        stack.callback(listener.stop)
        return _Entered(writer, reader, listener, await writer.start(lambda writer: writer.clock))


@dataclass(frozen=True, slots=True)
class _Entered:
    """What a storage has while it is open."""

    writer: BatchThread[Writer]
    reader: BatchThread[Reader]
    listener: "_Listener"
    clock: Clock


def _absolute(path: Path) -> Path:
    try:
        return path.absolute()
    except FileNotFoundError:
        raise StorageError(f"{path}: the current working directory does not exist any more; use an absolute path") from None


def _write(listener: "_Listener", writer: Writer, jobs: Collection[Job[Writer]]) -> Done:
    number, changes = writer.run(jobs)
    return Done(number, partial(listener.ring, changes) if changes else None, is_broken=writer.is_broken)


class _Listener:
    """Rings the doorbells: for this storage's own commits as they happen, for others' when the `-notify` file says so.

    Changes are counted, and all up to `_seen` have been rung. It is set before somebody watches, and what is committed later
    has a greater count; so a watcher misses nothing, whoever is the first to see it.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, files: Files, doorbells: Doorbells[int]) -> None:
        self._loop = loop
        self._files = files
        self._doorbells = doorbells
        self._seen = 0
        self._file: int | None = None
        self._inotify: int | None = None
        self._timer: asyncio.TimerHandle | None = None

    def ring(self, changes: Changes) -> None:
        """Ring for these changes."""
        if changes.checksums is None:
            self._doorbells.ring_all()
        else:
            self._doorbells.ring(changes.checksums)
        if changes.since <= self._seen:
            self._seen = max(self._seen, changes.count)

    def listen(self) -> None:
        """Ring from now on for the commits of others too; to be called before somebody watches."""
        notify = Notify(self._start() if self._file is None else self._file)
        if not self._doorbells:
            self._seen = max(self._seen, notify.count())
        if self._inotify is None and self._timer is None:
            self._timer = self._loop.call_later(_POLL_SECONDS, self._tick, notify)

    def stop(self) -> None:
        """Let go of everything."""
        if self._timer is not None:
            self._timer.cancel()
        if self._inotify is not None:
            self._loop.remove_reader(self._inotify)
        if self._file is not None:
            _before_fork.unregister(self._fork_number)
        self._close()

    def before_fork(self, deadline: float) -> None:
        """See `Forkable`. These descriptors carry no locks, so the parent keeps them."""

    def after_fork(self) -> None:
        """See `Forkable`."""

    def in_child(self) -> None:
        """See `Forkable`."""
        self._close()

    def _close(self) -> None:
        inotify, file = self._inotify, self._file
        self._inotify = self._file = None
        for descriptor in (inotify, file):
            if descriptor is not None:
                os.close(descriptor)

    def _start(self) -> int:
        self._fork_number = _before_fork.register(self)
        with translating(self._files.database):
            self._file = self._files.open(self._files.notify)
        self._inotify = open_inotify(self._files.notify)
        if self._inotify is not None:
            self._loop.add_reader(self._inotify, self._written, self._inotify, Notify(self._file))
        return self._file

    def _written(self, inotify: int, notify: Notify) -> None:
        drain(inotify)
        self._look(notify)

    def _tick(self, notify: Notify) -> None:
        # Only where there is no inotify. If nothing has changed it costs one read of eight bytes.
        self._look(notify)
        self._timer = self._loop.call_later(_POLL_SECONDS, self._tick, notify) if self._doorbells else None

    def _look(self, notify: Notify) -> None:
        if self._doorbells and notify.count() > self._seen:
            self.ring(notify.since(self._seen))
