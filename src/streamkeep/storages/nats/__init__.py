"""NATSStorage: streams in NATS JetStream, which replicates them over several servers; asyncio only."""

import asyncio
import re
import time
from bisect import bisect_right
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final, Self

import anyio
import msgspec

from streamkeep.errors import (
    InvalidArgumentError,
    StorageCorruptError,
    StorageError,
    StorageFullError,
    StorageUnavailableError,
)
from streamkeep.storage import Doorbell, Head, Page
from streamkeep.storages._asyncio_storage import AsyncioStorage
from streamkeep.storages._doorbells import Doorbells
from streamkeep.storages._engine_clock import EngineClock
from streamkeep.storages.nats._client import Message
from streamkeep.storages.nats._commits import DELETION, MAX_PIECES, encode, stream_of, token_of
from streamkeep.storages.nats._link import (
    WRONG_LAST_SEQUENCE,
    ApiError,
    ChangedError,
    Connection,
    Link,
    Servers,
    answer_of,
    translating_refusals,
)
from streamkeep.storages.nats._log import Last, Log
from streamkeep.storages.nats._markers import CONTENT, Marker, Markers, second_of, subject_of
from streamkeep.storages.nats._notifications import Notifications
from streamkeep.storages.nats._setup import prepare

__all__ = ["NATSStorage"]

_CHANGE_SECONDS: Final = 5.0
_FIRST_PAUSE_SECONDS: Final = 0.01
_DEPOSED_SECONDS: Final = 15.0  # a leader that nobody follows notices it in ten
_STREAMS_KEPT: Final = 10_000
_SCAN_SECONDS: Final = 10.0
_FEW_IDS: Final = 10_000
_BATCHES_AT_ONCE: Final = 8
_HEADS_AT_ONCE: Final = 200
_DIRECT_ATTEMPTS: Final = 3
_LEADER_ATTEMPTS: Final = 3
_CLOSE_SECONDS: Final = 60
_MARKER_SECONDS: Final = 60.0  # so long a marker may wait for its commit; nobody removes one that is not twice as old


class NATSStorage(AsyncioStorage["_JetStream"]):
    """Keeps streams in the JetStream stream `stream` of a NATS server or cluster, which is created if it is missing.

    Any number of processes on any number of machines may share it. All streams are subjects of the one JetStream stream; nothing else
    should write to it.

    What a commit that has returned True survives:

    - the death of any process of ours, and of any server (kill -9): its data are in the kernel's hands;
    - with `replicas=3` the loss of any one disk, and of any one machine that does not come back;
    - a power failure, or the crash of a machine's kernel, only if the servers have `sync_interval: always`, also with three replicas. Else
      what was acknowledged in the last two minutes may be lost: by one server for certain, by three if the one that lost power comes
      back, without its last moments, while another is away or behind.

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

    async def scan(self, after: str = "", limit: int = 100) -> Sequence[tuple[str, Head]]:
        """See `Storage.scan`.

        Of more than 10,000 ids, pages that are asked for in a row within ten seconds give the ids of one moment. What is damaged is left
        out; `read` says so.
        """
        return await self._open.scan(after, limit)

    async def expired(self, before: float, limit: int = 100) -> Sequence[tuple[str, Head]]:
        """See `Storage.expired`."""
        return await self._open.expired(before, limit)

    def time(self) -> float:
        """See `Storage.time`: the clock of the server that leads the JetStream stream."""
        return self._open.clock.time()

    def clone(self) -> "NATSStorage":
        """See `Storage.clone`."""
        return NATSStorage(
            self._servers.urls,
            user=self._servers.user,
            password=self._servers.password,
            token=self._servers.token,
            creds=self._servers.creds,
            stream=self._stream,
            replicas=self._replicas,
        )

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
    """A version that was seen, and where it is: the swap compares places, not versions. And when it expires, and the marker of that."""

    version: int | None
    sequence: int
    first: int = 0
    second: int = -1
    marker: int = 0
    kept: int = 0

    @classmethod
    def at(cls, last: Last) -> Self:
        """Give what the end of a stream says."""
        if last.commit is None:
            return cls(None, last.sequence)
        head = last.commit.head
        second = second_of(head.expires_at)
        return cls(head.version, last.sequence, last.commit.first, second, last.commit.marker, head.first)


_NEVER_SEEN: Final = _Known(None, 0)


class _JetStream:
    """What a storage does while it is open."""

    def __init__(self, servers: Servers, name: str, replicas: int | None, doorbells: Doorbells[str]) -> None:
        self._name = name
        self._replicas = replicas
        self._link = Link(servers, self._connected)
        self._log = Log(name)
        self._markers = Markers(name)
        self._turns: dict[str, _Turn] = {}
        self._known: dict[str, _Known] = {}
        self._behind_since: dict[str, float] = {}
        self._scans: dict[str, tuple[Sequence[str], float]] = {}
        self._batches = asyncio.Semaphore(_BATCHES_AT_ONCE)
        self._notifications = Notifications(name, doorbells)
        self.clock: Final = EngineClock()

    @asynccontextmanager
    async def open(self) -> AsyncGenerator[None]:
        """Connect, and stay connected until the changes that were asked for are done."""
        async with self._link.open(self._check):
            try:
                yield
            finally:
                with anyio.move_on_after(_CLOSE_SECONDS, shield=True):
                    for turn in tuple(self._turns.values()):
                        async with turn.lock:  # after all who have asked for it
                            pass

    async def listen(self) -> None:
        """Return when every commit from now on rings."""
        with translating_refusals():
            await self._notifications.listen(await self._link.connection())

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

    async def scan(self, after: str, limit: int) -> Sequence[tuple[str, Head]]:
        """Do `Storage.scan`."""
        connection = await self._link.connection()
        with translating_refusals():
            while ids := await self._ids(connection, after, limit):
                ends = await self._ends(connection, [token_of(stream) for stream in ids])
                page = [(stream, end.commit.head) for stream in ids if (end := ends.get(token_of(stream))) and end.commit]
                if page:
                    return page
                after = ids[-1]  # all of these have been deleted since
        return []

    async def expired(self, before: float, limit: int) -> Sequence[tuple[str, Head]]:
        """Do `Storage.expired`."""
        connection = await self._link.connection()
        found: dict[str, Head] = {}
        with translating_refusals():
            async with aclosing(self._markers.until(connection, second_of(before))) as groups:
                async for group in groups:
                    for begin in range(0, len(group), _HEADS_AT_ONCE):
                        await self._add_expired(connection, group[begin : begin + _HEADS_AT_ONCE], before, found)
                        if len(found) >= limit:
                            return list(found.items())[:limit]
        return list(found.items())

    async def _add_expired(
        self, connection: Connection, markers: Sequence[Marker], before: float, found: dict[str, Head]
    ) -> None:
        ends = await self._ends(connection, [marker.token for marker in markers])
        for marker in markers:
            known = _Known.at(ends.get(marker.token, Last(0)))
            if known.second != marker.second:
                await self._remove_stale(connection, marker)
            elif (commit := ends[marker.token].commit) is not None and commit.head.expires_at <= before:
                found[stream_of(marker.token)] = commit.head
                self._remember(marker.token, known)  # it is about to be deleted

    async def _remove_stale(self, connection: Connection, marker: Marker) -> None:
        """Remove a marker that no head confirms; not while its commit may be under way."""
        if self.clock.time() < marker.stored_at + 2 * _MARKER_SECONDS:
            return
        try:
            known = await self._look(connection, marker.token)
        except StorageCorruptError:
            return
        if known.second != marker.second:
            self._remove(connection, marker.sequence)

    async def _ids(self, connection: Connection, after: str, limit: int) -> Sequence[str]:
        # JetStream gives all subjects at once, in no order. That is dear when there are very many: then who goes on where a page ended
        # gets the rest of what was there.
        ids, until = self._scans.pop(after, ((), 0.0))
        if time.monotonic() >= until:
            prefix = len(self._subject(""))
            subjects = connection.subjects(self._name, self._subject("*"))
            ids = sorted([stream_of(subject[prefix:]) async for subject in subjects])
            until = time.monotonic() + _SCAN_SECONDS
        begin = bisect_right(ids, after)
        page = ids[begin : begin + limit]
        self._scans = {last: kept for last, kept in self._scans.items() if kept[1] > time.monotonic()}
        if page and len(ids) > _FEW_IDS:
            self._scans[page[-1]] = (ids, until)
        return page

    async def _ends(self, connection: Connection, tokens: Sequence[str]) -> Mapping[str, Last]:
        """Give the ends of those streams that exist, and are not damaged."""
        ends: dict[str, Last] = {}
        subjects = [self._subject(token) for token in tokens]
        found = await self._log.ends(connection, subjects)
        for token, subject in zip(tokens, subjects, strict=True):
            end = found.get(subject)
            # What a replica does not have, or only in part, the leader may.
            if end is None or end.sequence < self._notifications.expected(token):
                try:
                    end = await self._last(connection, token)
                except StorageCorruptError:
                    continue
            if end.commit is not None:
                ends[token] = end
        return ends

    async def _change(self, token: str, seen: int | None, change: _Change | None) -> bool:
        connection = await self._link.connection()
        known = self._known.pop(token, _NEVER_SEEN)
        give_up_at = time.monotonic() + _CHANGE_SECONDS
        pause = 0.0
        marker = _NewMarker(connection, self._name, token)
        with translating_refusals():
            while True:
                if known.version != seen:
                    known = await self._look(connection, token)
                    if known.version != seen:
                        self._remove(connection, marker.sequence)
                        self._remember(token, known)
                        return False
                try:
                    if change is None:
                        await self._delete(connection, token, known)
                        return True
                    await self._commit(connection, token, known, change, marker)
                except ApiError as error:
                    if error.code not in WRONG_LAST_SEQUENCE:
                        self._remove(connection, marker.sequence)
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

    async def _commit(
        self, connection: Connection, token: str, known: _Known, change: _Change, new_marker: "_NewMarker"
    ) -> None:
        second = second_of(change.head.expires_at)
        moves = second != known.second
        if moves:
            await new_marker.store(second)
        marker = new_marker.sequence if moves else known.marker
        pieces = encode(change.head, change.records, marker, known.first, connection.room)
        headers = {"Nats-Expected-Last-Subject-Sequence": str(known.sequence)}
        subject = self._subject(token)
        if len(pieces) == 1:
            sequence = _sequence(await connection.request(subject, pieces[0], headers))
        else:
            sequence = await self._write_batch(connection, subject, pieces, headers)
        self._notifications.expect(token, sequence)
        first = known.first or sequence - len(pieces) + 1
        self._remember(token, _Known(change.head.version, sequence, first, second, marker, change.head.first))
        if moves:
            await new_marker.confirm()
            self._remove(connection, known.marker)
        else:
            self._remove(connection, new_marker.sequence)
        if change.head.first > known.kept:
            await self._forget_before(connection, token)

    async def _forget_before(self, connection: Connection, token: str) -> None:
        """Remove what the head no longer counts as the log. Should that fail, it is removed when more of it is."""
        subject = self._subject(token)
        with suppress(ApiError, ChangedError, StorageError):
            last = (await self._log.last(connection, subject)).commit
            if last is not None:
                begin = await self._log.begin_of(connection, subject, last, last.head.first)
                await connection.api(f"STREAM.PURGE.{self._name}", {"filter": subject, "seq": begin})

    async def _delete(self, connection: Connection, token: str, known: _Known) -> None:
        headers = {"Nats-Expected-Last-Subject-Sequence": str(known.sequence), "Nats-Rollup": "sub"}
        subject = self._subject(token)
        try:
            sequence = _sequence(await connection.request(subject, DELETION, headers))
        except ApiError as error:
            if not (known.marker and isinstance(error.translated(), StorageFullError)):
                raise
            # The deletion takes the place of the marker, which is the larger one.
            with suppress(ApiError):
                await connection.api(f"STREAM.MSG.DELETE.{self._name}", {"seq": known.marker, "no_erase": True})
            sequence = _sequence(await connection.request(subject, DELETION, headers))
        self._notifications.expect(token, sequence)
        await self._purge(connection, subject, sequence)
        self._remove(connection, known.marker)

    async def _write_batch(
        self, connection: Connection, subject: str, pieces: Sequence[bytes], headers: Mapping[str, str]
    ) -> int:
        if len(pieces) > MAX_PIECES:
            raise StorageError("the commit is larger than a thousand messages of the NATS server: raise its max_payload")
        async with self._batches:
            batch = {"Nats-Batch-Id": f"{id(pieces):x}-{time.time_ns():x}"}
            for number, piece in enumerate(pieces[:-1], 1):
                expected = headers if number == 1 else {}
                connection.publish(subject, piece, {**expected, **batch, "Nats-Batch-Sequence": str(number)})
            end = {**batch, "Nats-Batch-Sequence": str(len(pieces)), "Nats-Batch-Commit": "1"}
            return _sequence(await connection.request(subject, pieces[-1], end))

    def _remove(self, connection: Connection, sequence: int) -> None:
        """Ask for the removal of a marker that no head needs, if there is one. Should that fail, it is removed when its second has come."""
        if sequence:
            body = msgspec.json.encode({"seq": sequence, "no_erase": True})
            connection.publish(f"$JS.API.STREAM.MSG.DELETE.{self._name}", body)

    async def _look(self, connection: Connection, token: str) -> _Known:
        return _Known.at(await self._last(connection, token))

    async def _last(self, connection: Connection, token: str) -> Last:
        """Give the end of a stream, as new as anything that is known of it: a leader that was deposed may not know it yet."""
        subject = self._subject(token)
        began = time.monotonic()
        while True:
            is_late = time.monotonic() > began + _CHANGE_SECONDS
            try:
                last = await self._log.last(connection, subject)
            except ChangedError:
                if is_late:
                    raise
                continue
            if last.commit is None and last.sequence:
                await self._purge(connection, subject, last.sequence)
            if not last.sequence or last.sequence >= self._notifications.expected(token) or self._has_gone_back(token):
                self._behind_since.pop(token, None)
                return last
            if is_late:
                raise StorageUnavailableError("the leader of the JetStream stream is behind what it has acknowledged")
            await asyncio.sleep(_FIRST_PAUSE_SECONDS)

    def _has_gone_back(self, token: str) -> bool:
        """Say whether the end of a stream has been older than what is known of it for so long that no deposed leader can have said so."""
        now = time.monotonic()
        since = self._behind_since.get(token, 0.0)
        if now - since > 2 * _DEPOSED_SECONDS:
            since = self._behind_since[token] = now
        if now - since < _DEPOSED_SECONDS:
            return False
        self._notifications.forget(token)
        self._forget()
        return True

    async def _purge(self, connection: Connection, subject: str, sequence: int) -> None:
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
        self._forget()
        self._behind_since.clear()
        with translating_refusals():
            asked_at = self.clock.start()
            info = await prepare(connection, self._name, self._replicas)
            self._set_clock(info, asked_at)
            await self._notifications.connected(connection, info)

    def _forget(self) -> None:
        """Forget where things are. JetStream may have lost the last of them: a server that had no power has forgotten its last moments."""
        self._known.clear()
        self._scans.clear()
        self._log.forget()

    async def _check(self, connection: Connection) -> None:
        asked_at = self.clock.start()
        try:
            info = await connection.api(f"STREAM.INFO.{self._name}")
        except (StorageUnavailableError, ApiError):
            return  # there is no leader for now, and perhaps notifications were lost with it: the next look will tell
        self._set_clock(info, asked_at)
        if self._notifications.check(connection, info):
            self._forget()

    def _set_clock(self, info: Mapping[str, Any], asked_at: float) -> None:
        self.clock.set(datetime.fromisoformat(info["ts"]).timestamp(), asked_at)


class _NewMarker:
    """The marker of a change that moves a stream's expiry; stored once, however often the change is tried."""

    def __init__(self, connection: Connection, name: str, token: str) -> None:
        self._connection = connection
        self._name = name
        self._token = token
        self._subject = ""
        self._stored_at = 0.0
        self.sequence = 0

    async def store(self, second: int) -> None:
        """Have it stored, before the commit."""
        if not self.sequence:
            self._stored_at = time.monotonic()
            self._subject = subject_of(self._name, second, self._token)
            self.sequence = _sequence(await self._connection.request(self._subject, CONTENT))

    async def confirm(self) -> None:
        """Have it stored once more, after the commit, if that took so long that somebody may have removed it."""
        if time.monotonic() > self._stored_at + _MARKER_SECONDS:
            await self._connection.request(self._subject, CONTENT)


class _Turn:
    """Changes of one stream are made one after the other, in the order in which they were asked for."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.users = 0


def _sequence(message: Message) -> int:
    sequence: int = answer_of(message)["seq"]
    return sequence
