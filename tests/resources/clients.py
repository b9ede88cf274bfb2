"""Clients of raw sockets, which do what no HTTP library would: cut a connection at any byte, or hold thousands of them.

An answer is taken apart as far as these tests need it: head, and the body by `content-length` or in chunks.
"""

import asyncio
import random
import socket
import struct
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Final, Literal, Self

import anyio
from tests.http.servers import without_lives

HOST: Final = "127.0.0.1"
AT_A_TIME: Final = 100
"""How many connections are being made at one moment; what waits to be accepted is bounded by the kernel."""
LONGEST_WAIT_SECONDS: Final = 30
MOST_OF_AN_ID: Final = 600

Cut = Literal["RST", "FIN"]


def get(path: str, *, keep_alive: bool = False) -> bytes:
    """Give the bytes of a GET."""
    connection = "keep-alive" if keep_alive else "close"
    return f"GET {path} HTTP/1.1\r\nHost: {HOST}\r\nConnection: {connection}\r\n\r\n".encode()


def post(path: str, body: bytes = b"", **headers: str) -> bytes:
    """Give the bytes of a POST that asks for a stream."""
    more = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    head = f"POST {path} HTTP/1.1\r\nHost: {HOST}\r\nAccept: text/event-stream\r\nContent-Length: {len(body)}\r\n{more}\r\n"
    return head.encode() + body


class Client:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.body = bytearray()

    @classmethod
    @asynccontextmanager
    async def connected(cls, port: int, *, receive_bytes: int | None = None) -> AsyncGenerator[Self]:
        """Connect, and close at the end; `receive_bytes` is how much the kernel may take for who does not read."""
        connection = socket.socket()
        if receive_bytes is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        connection.setblocking(False)
        try:
            with anyio.fail_after(LONGEST_WAIT_SECONDS):
                await asyncio.get_running_loop().sock_connect(connection, (HOST, port))
            reader, writer = await asyncio.open_connection(sock=connection)
        except BaseException:
            connection.close()
            raise
        client = cls(reader, writer)
        try:
            yield client
        finally:
            await client.cut("FIN")

    async def send(self, request: bytes) -> None:
        """Send bytes."""
        self._writer.write(request)
        await self._writer.drain()

    async def ask(self, request: bytes) -> bytes:
        """Send a request, and give the body of an answer that has a `content-length`."""
        await self.send(request)
        with anyio.fail_after(LONGEST_WAIT_SECONDS):
            head = await self._reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 "), head
            length = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
            return await self._reader.readexactly(int(length))

    async def begin(self, request: bytes) -> None:
        """Send a request that is answered by a stream, and wait for the head of the answer."""
        await self.send(request)
        with anyio.fail_after(LONGEST_WAIT_SECONDS):
            head = await self._reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 "), head
        assert b"transfer-encoding: chunked" in head.lower(), head

    async def read_until(self, text: bytes) -> bytes:
        """Read on until the body ends like this, and give all of the body so far; of cursors the offset."""
        with anyio.fail_after(LONGEST_WAIT_SECONDS):
            while not without_lives(bytes(self.body[-len(text) - MOST_OF_AN_ID :])).endswith(text):
                self.body += await self._chunk()
        return without_lives(bytes(self.body))

    async def read_to_the_end(self) -> bytes:
        """Read on until the answer ends as it should, and give all of its body; of cursors the offset."""
        with anyio.fail_after(LONGEST_WAIT_SECONDS):
            while chunk := await self._chunk():
                self.body += chunk
        return without_lives(bytes(self.body))

    async def receive_at_most(self, number: int) -> int:
        """Take what comes, up to so many bytes; give how many it were."""
        return len(await self._reader.read(number))

    async def cut(self, how: Cut) -> None:
        """End the connection, so that the server is told by a FIN, or by a RST that throws away what is under way."""
        if how == "RST":
            linger = struct.pack("ii", 1, 0)
            with suppress(OSError):  # the server may have cut it already
                self._writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self._writer.transport.abort()
        self._writer.close()
        with suppress(OSError):
            await self._writer.wait_closed()

    async def _chunk(self) -> bytes:
        size = int(await self._reader.readuntil(b"\r\n"), 16)
        return (await self._reader.readexactly(size + 2))[:-2]


@dataclass(frozen=True, slots=True)
class Disconnect:
    """When and how a client goes: after so much of its request, or of the answer to it."""

    request: bytes
    sent: int
    received: int
    how: Cut

    @classmethod
    def at_random(cls, requests: Sequence[bytes], rng: random.Random) -> Self:
        """Choose a request and a moment: nothing sent, a part of it, all of it, and then more or less of the answer."""
        request = rng.choice(requests)
        sent = rng.choice((0, rng.randrange(len(request)), len(request), len(request)))
        received = rng.choice((0, 1, rng.randrange(400), rng.randrange(40_000))) if sent == len(request) else 0
        return cls(request, sent, received, rng.choice(("RST", "FIN")))

    async def happen(self, port: int) -> None:
        """Connect, ask, take what was to be taken, and go."""
        async with Client.connected(port) as client:
            with suppress(OSError):
                await client.send(self.request[: self.sent])
                await self._take(client)
            await client.cut(self.how)

    async def _take(self, client: Client) -> None:
        left = self.received
        with anyio.move_on_after(0.1):  # of a live stream there may come no more
            while left > 0 and (taken := await client.receive_at_most(left)):
                left -= taken


async def storm(port: int, disconnects: Sequence[Disconnect]) -> None:
    """Let all of this happen, much of it at the same time."""
    places = anyio.CapacityLimiter(AT_A_TIME)

    async def one(disconnect: Disconnect) -> None:
        async with places:
            await disconnect.happen(port)

    async with anyio.create_task_group() as clients:
        for disconnect in disconnects:
            clients.start_soon(one, disconnect)
