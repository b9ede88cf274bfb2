"""Doorbells by pub/sub: a channel a stream, and one connection for all (in a cluster, one to each node that keeps a watched stream).

A subscription dies with its connection, and what was published meanwhile came to nobody. So who is subscribed again is rung.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Final, Self

from redis.exceptions import MovedError, ResponseError

from streamkeep.errors import StorageError, StorageUnavailableError
from streamkeep.storage import Doorbell
from streamkeep.storages._doorbells import Doorbells
from streamkeep.storages.redis._net import BROKEN, Line, Reply, translated
from streamkeep.storages.redis._servers import Servers, Shared, bucket_of
from streamkeep.storages.redis._url import Address

logger: Final = logging.getLogger("streamkeep")

CHANNEL: Final = b":bell:"

_PAUSE_SECONDS: Final = 0.25
_REDIRECTIONS: Final = 5


class _Watched:
    """A channel that somebody watches: how many do, over which line it is subscribed to, once it is, and which was asked to."""

    __slots__ = ("asked", "bucket", "channel", "line", "watchers")

    def __init__(self, bucket: int, channel: bytes) -> None:
        self.bucket = bucket
        self.channel = channel
        self.line: Line | None = None
        self.asked: Line | None = None
        self.watchers = 0

    @property
    def is_live(self) -> bool:
        return self.line is not None and not self.line.is_broken


class Bells:
    """Gives out doorbells, and rings them for what every process commits."""

    def __init__(self, servers: Servers) -> None:
        self._servers = servers
        # In a cluster plain messages go from node to node over its bus, which may drop them; a shard's stay on the node that commits.
        self._kind = "S" if servers.options.topology == "cluster" else ""
        self._doorbells: Doorbells[bytes] = Doorbells()
        self._watched: dict[bytes, _Watched] = {}
        self._lines: dict[Address, Line] = {}
        self._opening: dict[Address, Shared[Line]] = {}
        self._missed: set[bytes] = set()  # channels whose watchers may have missed something
        self._is_lost = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._resubscriber = asyncio.get_running_loop().create_task(self._resubscribe())
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._resubscriber.cancel()
        await asyncio.wait([self._resubscriber])
        for opening in self._opening.values():
            await opening.close()
        for line in list(self._lines.values()):
            await line.close()

    @asynccontextmanager
    async def watch(self, stream: bytes) -> AsyncGenerator[Doorbell]:
        """See `Storage.watch`. When it is entered the subscription is live."""
        bucket = bucket_of(stream)
        channel = self._servers.tag(bucket) + CHANNEL + stream
        watched = self._watched.setdefault(channel, _Watched(bucket, channel))
        watched.watchers += 1
        try:
            async with self._doorbells.watch(channel) as doorbell:
                if not watched.is_live:
                    await self._subscribe([watched])
                yield doorbell
        finally:
            watched.watchers -= 1
            if not watched.watchers:
                del self._watched[channel]
                if watched.asked is not None:
                    watched.asked.send((self._kind + "UNSUBSCRIBE", channel))

    async def _subscribe(self, lost: Sequence[_Watched]) -> None:
        """Subscribe to these, and return when the servers have done so."""
        for _ in range(_REDIRECTIONS):
            asked: list[tuple[_Watched, Line, asyncio.Future[list[Reply]]]] = []
            for watched in lost:
                line = await self._line(await self._servers.of(watched.bucket))
                if watched.watchers:  # nobody would leave what is subscribed to after the last has left
                    watched.asked = line
                    asked.append((watched, line, line.ask([(self._kind + "SUBSCRIBE", watched.channel)])))
            lost = [watched for watched, line, future in asked if not self._has_subscribed(watched, line, await future)]
            if not lost:
                return
        raise StorageUnavailableError(f"{self._servers.options.name}: the nodes of the cluster do not agree where a slot is")

    def _has_subscribed(self, watched: _Watched, line: Line, replies: list[Reply]) -> bool:
        match replies[0]:
            case MovedError(host=str(host), port=port) if self._kind and host:
                self._servers.moved(watched.bucket, (host, port))
                return False
            case ResponseError() as error:
                raise translated(line.address, error)
            case _:
                watched.line = line
                return watched.is_live

    async def _line(self, address: Address) -> Line:
        line = self._lines.get(address)
        if line is not None and not line.is_broken:
            return line
        return await self._opening.setdefault(address, Shared(partial(self._open, address))).get()

    async def _open(self, address: Address) -> Line:
        line = self._lines[address] = await self._servers.open(address, self._on_message)
        return line

    def _on_message(self, kind: bytes, channel: bytes) -> None:
        if kind.endswith(b"message"):
            self._doorbells.ring((channel,))
        elif kind == BROKEN:
            self._servers.forget()
            self._missed.update(watched.channel for watched in self._watched.values() if not watched.is_live)
            self._is_lost.set()
        elif (watched := self._watched.get(channel)) is not None and watched.line is not None:
            # No more messages of this channel come: its slot has moved to another node. (Or this answers what was asked for earlier.)
            watched.line = watched.asked = None
            self._missed.add(channel)
            self._is_lost.set()

    async def _resubscribe(self) -> None:
        """Subscribe again to what was lost, as long as it takes."""
        while True:
            await self._is_lost.wait()
            self._is_lost.clear()
            lost: dict[int, list[_Watched]] = {}
            for channel in self._missed:
                if (watched := self._watched.get(channel)) is not None:
                    lost.setdefault(watched.bucket, []).append(watched)
            await asyncio.gather(*map(self._resubscribe_some, lost.values()))
            self._ring()
            if self._missed:
                await asyncio.sleep(_PAUSE_SECONDS)
                self._is_lost.set()

    async def _resubscribe_some(self, lost: Sequence[_Watched]) -> None:
        """Subscribe again to these, of one bucket; a node that is away keeps nobody waiting who watches at another."""
        try:
            await self._subscribe([watched for watched in lost if not watched.is_live])
        except StorageError:
            pass  # it is tried again
        except Exception:
            logger.exception("Doorbells cannot be subscribed to again; trying again")
        self._ring()

    def _ring(self) -> None:
        """Ring for what is subscribed to again, whoever has done that, and forget what nobody watches any more."""
        live = {channel for channel in self._missed if (watched := self._watched.get(channel)) is None or watched.is_live}
        self._missed -= live
        self._doorbells.ring(live)
