"""Which server keeps what, and how commands get there and back: one server, whoever the sentinels call the primary, or a cluster."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar
from zlib import crc32

from redis.crc import key_slot
from redis.exceptions import AskError, ClusterDownError, MovedError, NoScriptError, ReadOnlyError, ResponseError

from streamkeep.errors import StorageError, StorageUnavailableError, fresh
from streamkeep.storages._engine_clock import EngineClock
from streamkeep.storages.redis._net import Command, Line, OnMessage, Reply, translated
from streamkeep.storages.redis._url import Address, Options, shown

T = TypeVar("T")

BUCKETS: Final = 16
"""Streams are spread over so many hash tags. In a cluster so many nodes can share the work; a scan looks into each."""

_REDIRECTIONS: Final = 5
_WAIT_MILLISECONDS: Final = 1000


def bucket_of(stream: bytes) -> int:
    """Say which bucket a stream is in; for ever the same."""
    return crc32(stream) % BUCKETS


class Shared(Generic[T]):
    """Work that one does and many wait for: whoever asks while it is under way gets the same outcome."""

    def __init__(self, work: Callable[[], Awaitable[T]]) -> None:
        self._work = work
        self._task: asyncio.Task[T] | None = None

    async def get(self) -> T:
        """Do it, or wait for who does."""
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._do())
        task = self._task  # when that is done, somebody may have begun anew before this one wakes
        # Whoever is cancelled leaves it to the others.
        await asyncio.wait([task])
        if task.cancelled():
            raise StorageError("the storage was closed meanwhile")
        error = task.exception()
        if isinstance(error, StorageError):
            raise fresh(error)  # many may wait, and every raise makes a traceback longer
        if error is not None:
            raise StorageError(f"the storage has failed: {type(error).__name__}: {error}") from error
        return task.result()

    async def close(self) -> None:
        """Do no more of it."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            _ = self._task.cancelled() or self._task.exception()

    async def _do(self) -> T:
        return await self._work()


class Servers:
    """Knows where each bucket is; once something went wrong (`forget`) it finds out anew."""

    def __init__(self, options: Options) -> None:
        self.options: Final = options
        self._tags = [b"{%s:%d}" % (options.prefix.encode(), bucket) for bucket in range(BUCKETS)]
        self._places: dict[int, Address] = {}
        self._known: set[Address] = set()
        self._found = Shared(self._find)
        self.clock: Final = EngineClock()
        """That of the server which has the first bucket: one for all, also where there are many servers."""

    def tag(self, bucket: int) -> bytes:
        """Give what all keys and channels of a bucket begin with, which puts them into one slot of a cluster."""
        return self._tags[bucket]

    def known(self, bucket: int) -> Address | None:
        """Say where a bucket is, if that was found before."""
        return self._places.get(bucket)

    async def of(self, bucket: int) -> Address:
        """Say where a bucket is."""
        while (address := self.known(bucket)) is None:  # again, when another lost connection has made it be forgotten
            await self._found.get()
        return address

    async def all(self) -> set[Address]:
        """Give every server that has a bucket."""
        return {await self.of(bucket) for bucket in range(BUCKETS)}

    def forget(self) -> None:
        """Drop what was found, because it may be out of date."""
        self._places.clear()

    def moved(self, bucket: int, address: Address) -> None:
        """Note where a bucket is, as a node has said."""
        self._places[bucket] = address

    async def open(self, address: Address, on_message: OnMessage | None = None) -> Line:
        """Connect to one of them. StorageUnavailableError also if it is not what the sentinels say."""
        try:
            line = await Line.open(address, self.options, on_message)
            if self.options.topology == "sentinel":
                await _must_be_primary(line)
        except StorageError:
            self.forget()
            raise
        return line

    def has_clock(self, address: Address) -> bool:
        """Say whether it is this server's clock that everybody goes by."""
        return self._places.get(0) == address

    def measured(self, reply: Reply, asked_at: float) -> None:
        """Take in what that server has answered to TIME."""
        match reply:
            case [bytes() as seconds, bytes() as microseconds]:
                self.clock.set(int(seconds) + int(microseconds) / 1e6, asked_at)
            case _:
                pass  # it will be asked again

    async def close(self) -> None:
        """Find nothing any more."""
        await self._found.close()

    async def _find(self) -> None:
        match self.options.topology:
            case "single":
                self._places = dict.fromkeys(range(BUCKETS), self.options.addresses[0])
            case "sentinel":
                self._places = dict.fromkeys(range(BUCKETS), await self._ask_sentinels())
            case "cluster":
                self._places = await self._ask_cluster()

    async def _ask_sentinels(self) -> Address:
        command = ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.options.primary)
        _, reply = await self._first_answer(self.options.addresses, command)
        if not isinstance(reply, list):
            raise StorageError(
                f"{self.options.name}: the sentinels watch no primary of that name; `SENTINEL MASTERS` lists theirs"
            )
        host, port = reply
        return host.decode(), int(port)

    async def _ask_cluster(self) -> dict[int, Address]:
        # Nodes that were met are asked first: those in the URL may have left long ago.
        asked, reply = await self._first_answer((*self._known, *self.options.addresses), ("CLUSTER", "SLOTS"))
        if isinstance(reply, ResponseError):
            raise StorageError(f"{self.options.name}: not a cluster; use redis://HOST:PORT") from translated(asked, reply)
        assert isinstance(reply, list)
        ranges = [(first, last, (node[0].decode() if node[0] else asked[0], node[1])) for first, last, node, *_ in reply]
        self._known.update(address for _, _, address in ranges)
        places: dict[int, Address] = {}
        for bucket, tag in enumerate(self._tags):
            slot = key_slot(tag)
            places.update((bucket, address) for first, last, address in ranges if first <= slot <= last)
        if len(places) < BUCKETS:
            raise StorageUnavailableError(f"{self.options.name}: the cluster does not serve all slots; see `CLUSTER INFO`")
        return places

    async def _first_answer(self, addresses: Iterable[Address], command: Command) -> tuple[Address, Reply]:
        failure: StorageError | None = None
        credentials = self.options.sentinel_credentials if self.options.topology == "sentinel" else None
        answer: tuple[Address, Reply] | None = None
        for address in dict.fromkeys(addresses):
            try:
                line = await Line.open(address, self.options, credentials=credentials)
                try:
                    (reply,) = await line.ask([command])
                finally:
                    await line.close()
            except StorageError as error:
                # What only one of them says is worth less than an answer; what is wrong with the login is said by all.
                failure = error
                continue
            answer = address, reply
            if isinstance(reply, list):
                return answer
            # It does not know; perhaps it has lost its memory, and another one does.
        if answer is not None:
            return answer
        assert failure is not None
        raise failure


async def _must_be_primary(line: Line) -> None:
    role: Reply = None
    try:
        (role,) = await line.ask([("ROLE",)])
    finally:
        # A server that does not say is taken for the primary; if it takes no writes, it will say that.
        is_other = not isinstance(role, ResponseError) and (not isinstance(role, list) or role[0] != b"master")
        if is_other:
            await line.close()
    if is_other:
        raise StorageUnavailableError(f"Redis at {shown(line.address)}: it is not the primary now; a failover is under way")


@dataclass(frozen=True, slots=True)
class Request:
    """A command for the keys of one bucket; with `script`, an EVALSHA of that; with `is_page`, one that lacks how big a page may be."""

    bucket: int
    command: Command
    script: bytes = b""
    is_page: bool = False

    def of_size(self, size: int) -> "Request":
        """Give the request with what it lacks."""
        return Request(self.bucket, (*self.command, size), self.script)


class _Exchange:
    """A request on its way, perhaps redirected."""

    __slots__ = ("address", "command", "is_asking", "reply", "request")

    def __init__(self, request: Request, address: Address) -> None:
        self.request = request
        self.command = request.command
        self.address = address
        self.is_asking = False
        self.reply: Reply | StorageError = None


class Pipelines:
    """Sends requests together, over one connection to each server that has to do with them. One batch at a time.

    With `wait`, an answer 1 means that so many replicas have what was written; if they have not said so within a second, it is
    StorageUnavailableError instead: it is written, it is not taken back, and whether a failover keeps it is unknown.
    """

    def __init__(self, servers: Servers, *, wait: int = 0) -> None:
        self._servers = servers
        self._is_cluster = servers.options.topology == "cluster"
        self._wait = wait
        self._lines: dict[Address, Line] = {}

    async def run(self, requests: Sequence[Request]) -> list[Reply | StorageError]:
        """Give each request its reply, or its StorageError."""
        at, found = self._servers.known, self._servers.of
        exchanges = [_Exchange(request, at(request.bucket) or await found(request.bucket)) for request in requests]
        under_way = exchanges
        for _ in range(_REDIRECTIONS):
            by_server: dict[Address, list[_Exchange]] = {}
            for exchange in under_way:
                by_server.setdefault(exchange.address, []).append(exchange)
            await asyncio.gather(*(self._exchange_with(address, some) for address, some in by_server.items()))
            under_way = self._redirected(under_way)
            if not under_way:
                break
        return [
            await self._outcome(reply, exchange.address) if isinstance(reply := exchange.reply, ResponseError) else reply
            for exchange in exchanges
        ]

    async def close(self) -> None:
        """Close every connection."""
        while self._lines:
            _, line = self._lines.popitem()
            await line.close()

    async def _exchange_with(self, address: Address, exchanges: Sequence[_Exchange]) -> None:
        commands: list[Command] = []
        is_new = address not in self._lines
        asks_time = self._servers.has_clock(address) and (is_new or self._servers.clock.is_stale)
        if asks_time:
            commands.append(("TIME",))
        for exchange in exchanges:
            if exchange.is_asking:
                commands.append(("ASKING",))
            commands.append(exchange.command)
        if self._wait:
            commands.append(("WAIT", self._wait, _WAIT_MILLISECONDS))
        try:
            line = await self._line(address)
            asked_at = self._servers.clock.start()
            replies = await line.ask(commands)
        except StorageError as error:
            self._servers.forget()
            self._lines.pop(address, None)
            for exchange in exchanges:
                exchange.reply = error
            return
        following = replies[-1]
        answers = iter(replies)
        if asks_time:
            self._servers.measured(next(answers), asked_at)
        for exchange in exchanges:
            if exchange.is_asking:
                next(answers)
            answer = next(answers)
            exchange.reply = self._confirmed(address, answer, following) if self._wait else answer

    def _confirmed(self, address: Address, reply: Reply, following: Reply) -> Reply | StorageError:
        if reply != 1:
            return reply
        if isinstance(following, int) and following >= self._wait:
            return reply
        if isinstance(following, ResponseError):
            return translated(address, following)
        return StorageUnavailableError(
            f"Redis at {shown(address)}: stored, but in time only {following} of {self._wait} replicas (wait) have confirmed it"
        )

    async def _line(self, address: Address) -> Line:
        line = self._lines.get(address)
        if line is None:
            line = self._lines[address] = await self._servers.open(address)
        return line

    def _redirected(self, exchanges: Sequence[_Exchange]) -> list[_Exchange]:
        """Give what is to be sent again, to where it should have gone, in order.

        With it goes what was refused after it (0, and so nothing changed): perhaps only because that came before it.
        """
        again: list[_Exchange] = []
        for exchange in exchanges:
            match exchange.reply:
                case NoScriptError():
                    exchange.command = ("EVAL", exchange.request.script, *exchange.request.command[2:])
                case AskError(host=host, port=port) if self._is_cluster and host:
                    exchange.address = (host, port)
                    exchange.is_asking = not isinstance(exchange.reply, MovedError)
                    if not exchange.is_asking:
                        self._servers.moved(exchange.request.bucket, exchange.address)
                case 0 if again:
                    pass
                case _:
                    continue
            again.append(exchange)
        return again

    async def _outcome(self, reply: ResponseError, address: Address) -> StorageError:
        if isinstance(reply, (ReadOnlyError, ClusterDownError)):
            # Perhaps the name, the sentinels or the cluster lead to another server by now.
            self._servers.forget()
            if (line := self._lines.pop(address, None)) is not None:
                await line.close()
        if isinstance(reply, AskError) and self._is_cluster:
            return StorageUnavailableError(f"{self._servers.options.name}: the nodes do not agree where a slot is")
        return translated(address, reply)
