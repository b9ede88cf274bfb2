"""PostgresStorage: streams in a PostgreSQL that any number of processes and machines may share; asyncio only."""

import asyncio
import re
from collections.abc import AsyncGenerator, Awaitable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Final
from urllib.parse import SplitResult, parse_qsl, urlencode, urlsplit

from streamkeep.errors import InvalidArgumentError, StorageError, StorageUnavailableError
from streamkeep.storage import Doorbell, Head, Page
from streamkeep.storages._asyncio_storage import AsyncioStorage
from streamkeep.storages._batch_task import BatchTask
from streamkeep.storages._engine_clock import EngineClock
from streamkeep.storages._ids import id_bytes
from streamkeep.storages.postgres._errors import may_be_of_one
from streamkeep.storages.postgres._link import Place
from streamkeep.storages.postgres._notifications import Listening, Notifications, Polling
from streamkeep.storages.postgres._statements import Change, Commit, Deletion, Reader, Reading, Ring, Session

__all__ = ["PostgresStorage"]

_SCHEMES: Final = {"postgresql", "postgres"}
_DRIVERS_OPTIONS: Final = {
    "host",
    "port",
    "passfile",
    "sslmode",
    "sslrootcert",
    "sslcert",
    "sslkey",
    "sslcrl",
    "sslnegotiation",
}
_HOSTS: Final = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[^\[\]:,]*)(:[0-9]{1,5})?(,(\[[0-9A-Fa-f:.%]+\]|[^\[\]:,]+)(:[0-9]{1,5})?)*")
_SCHEMA_BYTES: Final = 63

_WRITERS: Final = 2
_MOST_CHANGES: Final = 512  # a notification names that many, and has room for 900
_MOST_READINGS: Final = 64
_MOST_BYTES: Final = 4 << 20


class PostgresStorage(AsyncioStorage["_Entered"]):
    """Keeps streams in the PostgreSQL database (version 12 or newer) that `url` names, in tables of a schema of their own.

    `postgresql://user:password@host:port/database`, with further hosts after commas if there are standbys: the one that can be written
    to is used. What is left out comes from `PGHOST`, `PGPASSWORD` and so on, as in every program of PostgreSQL's. Options, after `?`:

    - `schema=streamkeep`: where the tables are. Schema and tables are created if they are missing, by whichever process comes first.
    - `notify=off`: notify nobody. Other processes look at the streams that they watch instead, every 50 to 250 ms. Needed behind a
      pooler in transaction mode; and NOTIFY makes all commits of a database that notify go one after the other.
    - `host`, `port`, `passfile`, `sslmode`, `sslrootcert`, `sslcert`, `sslkey`, `sslcrl`, `sslnegotiation`: as in every URL of
      PostgreSQL's.

    Four connections a storage at most: one reads, two write, and one listens. Each is made when it is needed, and again when it was lost:
    a storage, or a clone, that reads and writes one stream has two, and a third when it watches.

    A commit that has returned True survives what the server's `synchronous_commit` promises; by default the death of the
    process, of the server, and of its machine, but not the loss of its disk.

    Entering raises StorageError, with the remedy, if the database cannot be used, and StorageCorruptError if the schema is not ours or from
    a newer version. Leaving waits for the commits that were asked for, and removes nothing.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._place = _place(url)
        super().__init__(str(self._place))

    async def read(self, stream: str, start: int = 0, limit: int = 0) -> Page | None:
        """See `Storage.read`."""
        return await self._open.reads.ask(Reading(id_bytes(stream), start, limit))

    async def commit(self, stream: str, seen: int | None, head: Head, records: Sequence[bytes] = ()) -> bool:
        """See `Storage.commit`."""
        return await self._open.change(Commit(id_bytes(stream), seen, head, records))

    async def delete(self, stream: str, seen: int) -> bool:
        """See `Storage.delete`."""
        return await self._open.change(Deletion(id_bytes(stream), seen))

    async def scan(self, after: str = "", limit: int = 100) -> Sequence[tuple[str, Head]]:
        """See `Storage.scan`."""
        return await self._open.reader.scan(id_bytes(after), limit)

    async def expired(self, before: float, limit: int = 100) -> Sequence[tuple[str, Head]]:
        """See `Storage.expired`."""
        return await self._open.reader.expired(before, limit)

    def time(self) -> float:
        """See `Storage.time`."""
        return self._open.clock.time()

    def clone(self) -> "PostgresStorage":
        """See `Storage.clone`."""
        return PostgresStorage(self._url)

    def watch(self, stream: str) -> AbstractAsyncContextManager[Doorbell]:
        """See `Storage.watch`."""
        return self._watch(stream)

    @asynccontextmanager
    async def _watch(self, stream: str) -> AsyncGenerator[Doorbell]:
        async with self._open.notifications.watch(id_bytes(stream)) as doorbell:
            yield doorbell

    async def _enter(self, stack: AsyncExitStack) -> "_Entered":
        clock = EngineClock()
        reader = Reader(self._place, clock)
        stack.push_async_callback(reader.aclose)
        await reader.prepare()  # a process that only reads has no connection that writes
        notifications: Notifications = Listening(self._place) if self._place.notify else Polling(reader.changed)
        await stack.enter_async_context(_running(notifications))
        reads = await stack.enter_async_context(BatchTask(reader.read, max_batch=_MOST_READINGS))
        writers = [await _writer(stack, Session(self._place, clock), notifications) for _ in range(_WRITERS)]
        return _Entered(writers, reads, reader, notifications, clock)


@dataclass(frozen=True, slots=True)
class _Entered:
    """What a storage has while it is open.

    Two connections write, each the changes of its own half of the streams: while the server is busy with a batch of one, this process is
    with what the other's brought.
    """

    writers: Sequence[BatchTask[Change, bool]]
    reads: BatchTask[Reading, Page | None]
    reader: Reader
    notifications: Notifications
    clock: EngineClock

    def change(self, change: Change) -> Awaitable[bool]:
        """Have it made after all that was asked for the same stream before."""
        return self.writers[hash(change.id) % len(self.writers)].ask(change)


async def _writer(stack: AsyncExitStack, session: Session, notifications: Notifications) -> BatchTask[Change, bool]:
    stack.push_async_callback(session.aclose)
    return await stack.enter_async_context(BatchTask(partial(_change, session, notifications), max_batch=_MOST_CHANGES))


@asynccontextmanager
async def _running(notifications: Notifications) -> AsyncGenerator[None]:
    task = asyncio.create_task(notifications.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


async def _change(writer: Session, notifications: Notifications, changes: Sequence[Change]) -> Sequence[bool | StorageError]:
    """Make the changes in as few transactions as keep their order; what is wrong with one does not fail the others."""
    answers: dict[int, bool | StorageError] = {}
    for run in _runs(changes):
        try:
            done = await _transact(writer, notifications, [changes[number] for number in run])
        except StorageError as error:
            # The server cannot be had, so the runs after this one are not tried.
            return [answers.get(number, error) for number in range(len(changes))]
        answers.update(zip(run, done, strict=True))
    return [answers[number] for number in range(len(changes))]


async def _transact(writer: Session, notifications: Notifications, run: Sequence[Change]) -> Sequence[bool | StorageError]:
    ids = [change.id for change in run]
    try:
        done = await _send(writer, run, notifications.ring_for(ids))
    except StorageUnavailableError:
        notifications.in_doubt(ids)
        raise
    except StorageError as error:
        if not may_be_of_one(error):
            raise
        if len(run) == 1:
            return [error]
        return [answer for change in run for answer in await _transact(writer, notifications, [change])]
    notifications.changed(id for id, is_done in zip(ids, done, strict=True) if is_done)
    return done


async def _send(writer: Session, run: Sequence[Change], ring: Ring | None) -> Sequence[bool]:
    commits = [change for change in run if isinstance(change, Commit)]
    if commits:
        return await writer.commit(commits, ring)
    return await writer.delete([change for change in run if isinstance(change, Deletion)], ring)


def _runs(changes: Sequence[Change]) -> Iterator[Sequence[int]]:
    """Give the numbers of those that can be made together: of different streams, of one kind, and not too big for one message.

    Only changes of one stream need keep their order, so commits and deletions that come by turns are two runs and not hundreds.
    """
    runs: dict[type[Change], list[int]] = {Commit: [], Deletion: []}
    ids: set[bytes] = set()
    size = 0
    for number, change in enumerate(changes):
        if change.id in ids or size >= _MOST_BYTES:
            yield from filter(None, runs.values())
            runs, ids, size = {Commit: [], Deletion: []}, set(), 0
        runs[type(change)].append(number)
        ids.add(change.id)
        size += change.size
    yield from filter(None, runs.values())


def _place(url: str) -> Place:
    try:
        parts = urlsplit(url)
        options = dict(pairs := parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
    except ValueError:
        raise _bad("is no URL") from None
    if len(options) < len(pairs):
        raise _bad("has an option twice")
    schema, notify = options.pop("schema", "streamkeep"), options.pop("notify", "on")
    if not 0 < len(schema.encode()) <= _SCHEMA_BYTES or "\0" in schema:
        raise _bad(f"has a schema whose name is not of 1 to {_SCHEMA_BYTES} bytes")
    if notify not in {"on", "off"}:
        raise _bad("has another notify than on and off")
    if options.keys() - _DRIVERS_OPTIONS:
        raise _bad(f"has an option that is none of schema, notify, {', '.join(sorted(_DRIVERS_OPTIONS))}")
    return Place(_urls(parts, urlencode(options)), schema, notify=notify == "on")


def _urls(parts: SplitResult, query: str) -> Sequence[str]:
    """Give a URL for each host: the driver would wait for one that does not answer until no time is left for the next."""
    user, at, hosts = parts.netloc.rpartition("@")
    if parts.scheme not in _SCHEMES or parts.fragment or "@" in user or not _HOSTS.fullmatch(hosts):
        raise _bad(
            "is not like postgresql://user:password@host:port/database; in user and password, :/?#@ must be percent-encoded"
        )
    return [f"{parts.scheme}://{user}{at}{host}{parts.path}?{query}".rstrip("?") for host in hosts.split(",")]


def _bad(what: str) -> InvalidArgumentError:
    # Whatever is in the URL may be a password, and a message goes to terminals and logs.
    return InvalidArgumentError(f"the URL of a PostgresStorage {what}")
