"""A TCP proxy that is a bad network: it cuts, splits, stalls and refuses connections as told, and never on its own account.

It knows bytes, not HTTP. What becomes of each connection is a `Fate`, given beforehand; where one strikes is counted in bytes of
the answer (or of the request), never in time. What is sent and not cut arrives unchanged and in order.
"""

import asyncio
import socket
import struct
from collections import Counter
from collections.abc import AsyncGenerator, Generator, Iterable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Final
from urllib.parse import urlsplit

import anyio
from anyio.abc import TaskGroup

RECEIVE_BYTES: Final = 65_536


class End(StrEnum):
    """How a connection is lost."""

    FIN = "fin"
    """Closed in good order, at a bad moment."""
    RST = "rst"
    """Reset: a peer may even lose what it has received but not read."""
    STALL = "stall"
    """Left open with nothing more coming, until the client gives up."""


@dataclass(frozen=True, slots=True)
class Fate:
    """What becomes of one connection; without arguments: nothing.

    Attributes:
        end: how it is lost; None: it is not.
        after: so many bytes of the answer, or all up to and including these bytes, arrive before that.
        of_request: `after` speaks of the request.
        piece: forward the answer in packets of so many bytes; 0: as it comes.
        pause_seconds: wait before each packet.
        down_seconds: after the end, refuse connections for so long.
    """

    end: End | None = None
    after: int | bytes = 0
    of_request: bool = False
    piece: int = 0
    pause_seconds: float = 0.0
    down_seconds: float = 0.0


FINE: Final = Fate()


class Network:
    """Leads to the server at `url`, if there is one; counts its connections, and what struck them.

    Attributes:
        url: where the server is now.
        waits: connect clients and let them wait where there is no server, in place of refusing them: until there is one.
    """

    def __init__(self, url: str | None, tasks: TaskGroup, sockets: ExitStack) -> None:
        self.url = url
        self.waits = False
        self.connections = 0
        self.struck: Counter[End] = Counter()
        self._tasks = tasks
        self._sockets = sockets
        self._ways: set[_Way] = set()

    def meet(self, fate: Fate) -> None:
        """Let all connections that are open meet a fate, counted from now on; those that come later do not."""
        for way in self._ways:
            if way.is_request == fate.of_request:
                way.fate = fate

    @contextmanager
    def way(self, fate: Fate, *, is_request: bool) -> Generator["_Way"]:
        """Note that there is one more way, while the block runs."""
        way = _Way(fate if fate.of_request == is_request else FINE, is_request)
        self._ways.add(way)
        try:
            yield way
        finally:
            self._ways.remove(way)

    def path(self, fates: Iterable[Fate] = ()) -> str:
        """Give a URL that leads to the server. Its connections meet these fates one after the other, and then none."""
        path = _Path(self, iter(fates), self._tasks, self._sockets)
        self._tasks.start_soon(path.serve)
        return f"http://127.0.0.1:{path.port}"

    async def connect(self, server: socket.socket) -> None:
        """Connect a socket with the server. OSError: there is none."""
        while self.waits and self.url is None:  # noqa: ASYNC110 - no event tells
            await anyio.sleep(0.02)
        if self.url is None:
            raise ConnectionRefusedError
        await asyncio.get_running_loop().sock_connect(server, ("127.0.0.1", urlsplit(self.url).port))


@asynccontextmanager
async def bad_network(url: str | None = None) -> AsyncGenerator[Network]:
    """Give a network that leads to the server at `url`; leaving it ends all its connections."""
    with ExitStack() as sockets:
        async with anyio.create_task_group() as tasks:
            yield Network(url, tasks, sockets)
            tasks.cancel_scope.cancel()


@dataclass(eq=False, slots=True)
class _Way:
    """One direction of a connection, and what is to become of it."""

    fate: Fate
    is_request: bool


class _Path:
    """A port of a network."""

    def __init__(self, network: Network, fates: Iterator[Fate], tasks: TaskGroup, sockets: ExitStack) -> None:
        self._network = network
        self._fates = fates
        self._tasks = tasks
        self._sockets = sockets
        self._listener = sockets.enter_context(_listening())
        self._up = anyio.CancelScope()
        self._down_seconds = 0.0
        self.port: int = self._listener.getsockname()[1]

    async def serve(self) -> None:
        while True:
            with anyio.CancelScope() as self._up:
                await self._accept()
            with _bound(self.port):  # keeps the port ours while connections are refused
                self._listener.close()
                await anyio.sleep(self._down_seconds)
                self._listener = self._sockets.enter_context(_listening(self.port))

    async def _accept(self) -> None:
        while True:
            # Not asyncio's sock_accept: what that has accepted when it is cancelled is lost, and never closed.
            await anyio.wait_readable(self._listener)
            client, _ = self._listener.accept()
            self._sockets.enter_context(client)
            self._network.connections += 1
            self._tasks.start_soon(self._carry, client, next(self._fates, FINE))

    async def _carry(self, client: socket.socket, fate: Fate) -> None:
        with client, socket.socket() as server:
            for end in (client, server):
                end.setblocking(False)
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                await self._network.connect(server)
            except OSError:
                _reset_when_closed(client)
                return
            with self._network.way(fate, is_request=True) as request, self._network.way(fate, is_request=False) as answer:
                async with anyio.create_task_group() as link:
                    link.start_soon(self._forward, client, server, request, link)
                    link.start_soon(self._forward, server, client, answer, link)

    async def _forward(self, source: socket.socket, sink: socket.socket, way: _Way, link: TaskGroup) -> None:
        try:
            if await _forward_until_struck(source, sink, way):
                await self._strike(source, sink, way.fate)
        except OSError:  # reset by one, it is reset for the other
            _reset_when_closed(source, sink)
        link.cancel_scope.cancel()

    async def _strike(self, source: socket.socket, sink: socket.socket, fate: Fate) -> None:
        assert fate.end is not None
        self._network.struck[fate.end] += 1
        if fate.end is End.RST:
            _reset_when_closed(source, sink)
        elif fate.end is End.STALL:
            await anyio.sleep_forever()
        if fate.down_seconds:
            self._down_seconds = fate.down_seconds
            self._up.cancel()


async def _forward_until_struck(source: socket.socket, sink: socket.socket, way: _Way) -> bool:
    """Forward as far as the fate allows; False if the source ends before."""
    loop = asyncio.get_running_loop()
    fate = way.fate
    seen = bytearray()
    sent = 0
    while data := await loop.sock_recv(source, RECEIVE_BYTES):
        if fate is not way.fate or fate.end is None:
            fate, seen, sent = way.fate, bytearray(), 0
        seen += data
        strikes_at = _strikes_at(seen, fate)
        until = len(seen) if strikes_at is None else strikes_at
        while sent < until:
            await anyio.sleep(fate.pause_seconds)
            packet = seen[sent : min(until, sent + (fate.piece or until))]
            await loop.sock_sendall(sink, packet)
            sent += len(packet)
        if strikes_at is not None:
            return True
    return False


def _strikes_at(seen: bytearray, fate: Fate) -> int | None:
    match fate.end, fate.after:
        case None, _:
            return None
        case _, int(after):
            return after if len(seen) >= after else None
        case _, bytes(after):
            found = seen.find(after)
            return None if found < 0 else found + len(after)


def _bound(port: int = 0) -> socket.socket:
    bound = socket.socket()
    bound.setblocking(False)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    bound.bind(("127.0.0.1", port))
    return bound


def _listening(port: int = 0) -> socket.socket:
    listener = _bound(port)
    listener.listen(64)
    return listener


def _reset_when_closed(*sockets: socket.socket) -> None:
    for end in sockets:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
