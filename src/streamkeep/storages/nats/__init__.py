"""NATSStorage: streams in NATS JetStream, which replicates them over several servers; asyncio only."""

import asyncio
import re
import time
from bisect import bisect_right
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

import anyio

from streamkeep.errors import InvalidArgumentError, StorageCorruptError, StorageError, StorageUnavailableError
from streamkeep.storage import Doorbell, Head, Page
from streamkeep.storages._asyncio_storage import AsyncioStorage
from streamkeep.storages._doorbells import Doorbells
from streamkeep.storages.nats._bells import Bells
from streamkeep.storages.nats._commits import DELETION, MAX_PIECES, encode, stream_of, token_of
from streamkeep.storages.nats._link import (
    WRONG_LAST_SEQUENCE,
    ApiError,
    Connection,
    Link,
    Servers,
    answer_of,
    translating_refusals,
)
from streamkeep.storages.nats._log import ChangedError, Last, Log
from streamkeep.storages.nats._setup import prepare

if TYPE_CHECKING:
    from nats.aio.msg import Msg

_PATIENCE_SECONDS: Final = 5.0
_FIRST_PAUSE_SECONDS: Final = 0.01
_STREAMS_KEPT: Final = 10_000
_SCAN_SECONDS: Final = 10.0
_FEW_IDS: Final = 10_000
_BATCHES_AT_ONCE: Final = 8
_DIRECT_ATTEMPTS: Final = 3
_LEADER_ATTEMPTS: Final = 3
_CLOSE_SECONDS: Final = 60


class NATSStorage(AsyncioStorage["_JetStream"]):
    """Keeps streams in the JetStream stream `stream` of a NATS server or cluster, which is created if it is missing.

    Any number of processes on any number of machines may share it. All streams are subjects of the one JetStream stream; nothing else
    should write to it.

    What a commit that has returned True survives:

    - the death of any process of ours, and of any server (kill -9): its data are in the kernel's hands;
    - with `replicas=3` the loss of any one machine, its power and its disk included;
    - a power failure of the only machine, or of a majority at once, only if the servers have `sync_interval: always`: else what
      was written in the last two minutes may be lost.

    Args:
        servers: URLs of some servers of one cluster, `nats://host:4222`, or `tls://host:4222` to speak over TLS only; the others are
            learned from them.
        user: with `password`; or `token`; or `creds`, the path of a credentials file, which is read whenever a connection is made.
        stream: the JetStream stream's name.
        replicas: how many servers keep it, 1 unless said otherwise when it is created. One that exists must have as many, if this is given.

    Entering raises StorageError, with the remedy, if NATS cannot be used here. Leaving waits, a minute at most, for the commits and
    deletions that were asked for, and removes nothing.
    """

    def __init__(
        self,
        servers: Sequence[str] = ("nats://127.0.0.1:4222",),
        *,
        user: str | None = None,
        password: str | None = None,
        token: str | None = None,
        creds: Path | None = None,
        stream: str = "streamkeep",
        replicas: int | None = None,
    ) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,128}", stream):
            raise InvalidArgumentError("the name of a JetStream stream is up to 128 letters, digits, _ and -")
        if replicas not in {None, 1, 3, 5}:
            raise InvalidArgumentError("replicas is 1, 3 or 5")
        if not servers:
            raise InvalidArgumentError("servers must name at least one NATS server")
        if any("@" in server for server in servers):
            raise InvalidArgumentError("user, password and token are arguments of their own, and not part of servers")
        self._servers = Servers(tuple(servers), user, password, token, creds)
        super().__init__(f"the JetStream stream {stream}")
        self._stream = stream
        self._replicas = replicas
        self._doorbells: Doorbells[str] = Doorbells()

    async def read(self, stream: str, start: int = 0, limit: int = 0) -> Page | None:
        """See `Storage.read`."""
        return await self._open.read(token_of(stream), start, limit)

    async def commit(self, stream: str, seen: int | None, head: Head, records: Sequence[bytes] = ()) -> bool:
        """See `Storage.commit`."""
        return await self._open.change(token_of(stream), seen, _Change(head, records))

    async def delete(self, stream: str, seen: int) -> bool:
        """See `Storage.delete`."""
        return await self._open.change(token_of(stream), seen, None)

    async def scan(self, after: str = "", limit: int = 100) -> Sequence[str]:
        """See `Storage.scan`. Of more than 10,000 ids, pages that are asked for in a row within ten seconds are of one moment."""
        return await self._open.scan(after, limit)

    @asynccontextmanager
    async def watch(self, stream: str) -> AsyncGenerator[Doorbell]:
        """See `Storage.watch`."""
        await self._open.listen()
        async with self._doorbells.watch(token_of(stream)) as doorbell:
            yield doorbell

    async def _enter(self, stack: AsyncExitStack) -> "_JetStream":
        entered = _JetStream(self._servers, self._stream, self._replicas, self._doorbells)
        await stack.enter_async_context(entered.open())
        return entered


@dataclass(frozen=True, slots=True)
class _Change:
    """What a commit writes."""

    head: Head
    records: Sequence[bytes]


@dataclass(frozen=True, slots=True)
class _Known:
    """A version that was seen, and where it is: the swap compares places, not versions."""

    version: int | None
    sequence: int
    first: int

    @classmethod
    def at(cls, last: Last) -> Self:
        """Give what the end of a stream says."""
        if last.commit is None:
            return cls(None, last.sequence, 0)
        return cls(last.commit.foot.version, last.sequence, last.commit.first)


_NEVER_SEEN: Final = _Known(None, 0, 0)


class _JetStream:
    """What a storage does while it is open."""

    def __init__(self, servers: Servers, name: str, replicas: int | None, doorbells: Doorbells[str]) -> None:
        self._name = name
        self._replicas = replicas
        self._link = Link(servers, self._connected)
        self._log = Log(name)
        self._turns: dict[str, _Turn] = {}
        self._known: dict[str, _Known] = {}
        self._scans: dict[str, tuple[Sequence[str], float]] = {}
        self._batches = asyncio.Semaphore(_BATCHES_AT_ONCE)
        self._bells = Bells(name, doorbells)

    @asynccontextmanager
    async def open(self) -> AsyncGenerator[None]:
        """Connect, and stay connected until the changes that were asked for are done."""
        async with self._link.kept(self._bells.check):
            try:
                yield
            finally:
                with anyio.move_on_after(_CLOSE_SECONDS, shield=True):
                    for turn in tuple(self._turns.values()):
                        async with turn.lock:  # after all who have asked for it
                            pass

    async def listen(self) -> None:
        """Return when bells are heard."""
        await self._bells.listen(await self._link.connection())

    async def read(self, token: str, start: int, limit: int) -> Page | None:
        """Do `Storage.read`."""
        connection = await self._link.connection()
        subject = self._subject(token)
        with translating_refusals():
            for attempt in range(_DIRECT_ATTEMPTS + _LEADER_ATTEMPTS):
                try:
                    last = await self._last(connection, token)
                    if last.commit is None:
                        return None
                    leader = attempt >= _DIRECT_ATTEMPTS
                    records = await self._log.records(connection, subject, last, start, limit, leader=leader)
                    self._remember(token, _Known.at(last))  # who reads a head may be about to replace it
                    return Page(last.commit.head, records)
                except ChangedError:
                    self._log.forget()
        raise StorageCorruptError("records are missing in the JetStream stream, or it changed all the time while it was read")

    async def change(self, token: str, seen: int | None, change: _Change | None) -> bool:
        """Do `Storage.commit`, or with None `Storage.delete`."""
        turn = self._turns.setdefault(token, _Turn())
        turn.users += 1
        try:
            async with turn.lock:
                return await self._change(token, seen, change)
        finally:
            turn.users -= 1
            if not turn.users:
                del self._turns[token]

    async def scan(self, after: str, limit: int) -> Sequence[str]:
        """Do `Storage.scan`."""
        # JetStream gives all subjects at once, in no order. That is dear when there are very many: then who goes on where a page ended
        # gets the rest of what was there.
        ids, until = self._scans.pop(after, ((), 0.0))
        if time.monotonic() >= until:
            ids, until = await self._ids(), time.monotonic() + _SCAN_SECONDS
        begin = bisect_right(ids, after)
        page = ids[begin : begin + limit]
        self._scans = {last: kept for last, kept in self._scans.items() if kept[1] > time.monotonic()}
        if page and len(ids) > _FEW_IDS:
            self._scans[page[-1]] = (ids, until)
        return page

    async def _ids(self) -> Sequence[str]:
        connection = await self._link.connection()
        prefix = len(self._subject(""))
        subjects: dict[str, int] = {}
        with translating_refusals():
            while True:
                body = {"subjects_filter": self._subject("*"), "offset": len(subjects)}
                info = await connection.api(f"STREAM.INFO.{self._name}", body)
                page: dict[str, int] = info["state"].get("subjects") or {}
                subjects.update(page)
                if not page or len(subjects) >= info.get("total", 0):
                    return sorted(stream_of(subject[prefix:]) for subject in subjects)

    async def _change(self, token: str, seen: int | None, change: _Change | None) -> bool:
        connection = await self._link.connection()
        known = self._known.pop(token, _NEVER_SEEN)
        give_up_at = time.monotonic() + _PATIENCE_SECONDS
        pause = 0.0
        with translating_refusals():
            while True:
                if known.version != seen:
                    known = await self._look(connection, token)
                    if known.version != seen:
                        self._remember(token, known)
                        return False
                try:
                    await self._write(connection, token, known, change)
                except ApiError as error:
                    if error.code not in WRONG_LAST_SEQUENCE:
                        raise
                else:
                    return True
                # Somebody was first; or what is there is not what it was taken for; or another change is still under way to the replicas.
                if time.monotonic() > give_up_at:
                    raise StorageUnavailableError(
                        "another change of the same stream has been under way in JetStream for too long"
                    )
                known = await self._look(connection, token)
                if known.version == seen:
                    await asyncio.sleep(pause)
                    pause = 2 * pause or _FIRST_PAUSE_SECONDS

    async def _write(self, connection: Connection, token: str, known: _Known, change: _Change | None) -> None:
        headers = {"Nats-Expected-Last-Subject-Sequence": str(known.sequence)}
        subject = self._subject(token)
        if change is None:
            headers["Nats-Rollup"] = "sub"
            sequence = _sequence(await connection.request(subject, DELETION, headers))
            self._bells.expect(token, sequence)
            await self._sweep(connection, subject, sequence)
            return
        pieces = encode(change.head, change.records, known.first, connection.room)
        if len(pieces) == 1:
            sequence = _sequence(await connection.request(subject, pieces[0], headers))
        else:
            sequence = await self._write_batch(connection, subject, pieces, headers)
        self._bells.expect(token, sequence)
        self._remember(token, _Known(change.head.version, sequence, known.first or sequence - len(pieces) + 1))

    async def _write_batch(
        self, connection: Connection, subject: str, pieces: Sequence[bytes], headers: Mapping[str, str]
    ) -> int:
        if len(pieces) > MAX_PIECES:
            raise StorageError("the commit is larger than a thousand messages of the NATS server: raise its max_payload")
        async with self._batches:
            batch = {"Nats-Batch-Id": f"{id(pieces):x}-{time.time_ns():x}"}
            for number, piece in enumerate(pieces[:-1], 1):
                expected = headers if number == 1 else {}
                await connection.tell(subject, piece, {**expected, **batch, "Nats-Batch-Sequence": str(number)})
            end = {**batch, "Nats-Batch-Sequence": str(len(pieces)), "Nats-Batch-Commit": "1"}
            return _sequence(await connection.request(subject, pieces[-1], end))

    async def _look(self, connection: Connection, token: str) -> _Known:
        return _Known.at(await self._last(connection, token))

    async def _last(self, connection: Connection, token: str) -> Last:
        """Give the end of a stream, as new as anything that was heard of it: a leader that was deposed may not know it yet."""
        subject = self._subject(token)
        give_up_at = time.monotonic() + _PATIENCE_SECONDS
        while True:
            last = await self._log.last(connection, subject)
            if last.commit is None and last.sequence:
                await self._sweep(connection, subject, last.sequence)
            if not last.sequence or last.sequence >= self._bells.expected(token):
                return last
            if time.monotonic() > give_up_at:
                raise StorageUnavailableError("the leader of the JetStream stream is behind what it has acknowledged")
            await asyncio.sleep(_FIRST_PAUSE_SECONDS)

    async def _sweep(self, connection: Connection, subject: str, sequence: int) -> None:
        """Remove what a deletion left, and itself; nothing that came later. Whoever meets a deletion does it, should this one fail."""
        try:
            await connection.api(f"STREAM.PURGE.{self._name}", {"filter": subject, "seq": sequence + 1})
        except (ApiError, StorageUnavailableError):
            return

    def _subject(self, token: str) -> str:
        return f"{self._name}.s.{token}"

    def _remember(self, token: str, known: _Known) -> None:
        if known.sequence <= self._known.get(token, _NEVER_SEEN).sequence:
            return
        self._known[token] = known
        if len(self._known) > _STREAMS_KEPT:
            del self._known[next(iter(self._known))]

    async def _connected(self, connection: Connection) -> None:
        # Whatever was known may be lost: a lone server that had no power has forgotten its last moments.
        self._known.clear()
        self._scans.clear()
        self._log.forget()
        with translating_refusals():
            await prepare(connection, self._name, self._replicas)
            await self._bells.connected(connection)


class _Turn:
    """Changes of one stream are made one after the other, in the order in which they were asked for."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.users = 0


def _sequence(message: "Msg") -> int:
    sequence: int = answer_of(message)["seq"]
    return sequence
