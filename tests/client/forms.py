"""The client's two forms behind one, so that a test is written once; and servers that answer what they are told to, byte for byte."""

import socket
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any, Final, TypeVar

import anyio
import anyio.to_thread
from anyio.abc import SocketStream

from streamkeep import RemoteError, StreamEvent, client
from streamkeep.client import Retry, sync

FAST: Final = Retry(tries=50, first=timedelta(milliseconds=1), longest=timedelta(milliseconds=5))
T = TypeVar("T")
READ_SECONDS: Final = 40
SILENCE: Final = timedelta(seconds=0.4)


@dataclass(slots=True)
class Had:
    """What a reader has had."""

    events: list[Any] = field(default_factory=list[Any])
    error: RemoteError | None = None
    stream: str | None = None
    cursor: str | None = None
    first_offset: int | None = None
    output: Any = None


@dataclass(frozen=True, slots=True)
class Form:
    """One form of the client."""

    is_blocking: bool

    async def read(self, name: str, *args: Any, seconds: float = READ_SECONDS, **options: Any) -> Had:
        """Read all that `events`, `subscribe` or `stream_flow` gives. A RemoteError is given, any other is raised."""
        with anyio.fail_after(seconds):
            options = {"retry": FAST, **options}
            if self.is_blocking:
                return await _in_thread(partial(_read, name, *args, **options))
            return await _read_awaited(name, *args, **options)

    async def call(self, name: str, *args: Any, **options: Any) -> Any:
        """Call `run_flow` or `stop`."""
        with anyio.fail_after(READ_SECONDS):
            if self.is_blocking:
                return await _in_thread(partial(getattr(sync, name), *args, **options))
            return await getattr(client, name)(*args, **options)


async def _in_thread(call: Callable[[], T]) -> T:
    # Not by the limiter that all share: a server in this process would find no thread when all of those read from it.
    return await anyio.to_thread.run_sync(call, abandon_on_cancel=True, limiter=anyio.CapacityLimiter(1))


async def _read_awaited(name: str, *args: Any, **options: Any) -> Had:
    had = Had()
    try:
        async with getattr(client, name)(*args, **options) as events:
            try:
                async for event in events:
                    had.events.append(event)
                if name == "stream_flow":
                    had.output = await events.output()
            finally:
                _note(had, events)
    except RemoteError as error:
        had.error = error
    return had


def _read(name: str, *args: Any, **options: Any) -> Had:
    had = Had()
    try:
        with getattr(sync, name)(*args, **options) as events:
            try:
                for event in events:
                    had.events.append(event)
                if name == "stream_flow":
                    had.output = events.output()
            finally:
                _note(had, events)
    except RemoteError as error:
        had.error = error
    return had


def _note(had: Had, events: Any) -> None:
    if hasattr(events, "stream_id"):
        had.stream = events.stream_id
    else:
        had.stream, had.cursor, had.first_offset = events.stream, events.cursor, events.first_offset


def offsets_of(had: Had) -> list[int]:
    return [event.offset for event in had.events if isinstance(event, StreamEvent)]


# Servers that say what they are told to

HEAD: Final = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def answer(
    body: bytes, *, headers: bytes = b"", status: bytes = b"200 OK", content_type: bytes = b"text/event-stream"
) -> bytes:
    """Give a whole answer."""
    length = b"Content-Length: %d\r\n" % len(body) if status[:3] != b"204" else b""
    return b"HTTP/1.1 %b\r\nContent-Type: %b\r\n%b%b\r\n%b" % (status, content_type, length, headers, body)


def cut(body: bytes, *, headers: bytes = b"", content_type: bytes = b"text/event-stream") -> bytes:
    """Give the beginning of an answer; the connection is closed behind it."""
    return b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nContent-Length: 9999999\r\n%b\r\n%b" % (content_type, headers, body)


@dataclass(slots=True)
class Told:
    """A server that was told what to answer."""

    url: str
    requests: list[bytes] = field(default_factory=list[bytes])

    def header(self, name: str) -> list[str | None]:
        """Give a header of each request."""
        return [_header(request, name) for request in self.requests]


def _header(request: bytes, name: str) -> str | None:
    for line in request.split(b"\r\n\r\n")[0].split(b"\r\n")[1:]:
        key, _, value = line.partition(b": ")
        if key.lower() == name.lower().encode():
            return value.decode()
    return None


Answering = Callable[[SocketStream], Awaitable[None]]


@asynccontextmanager
async def told(*answers: bytes | Answering) -> AsyncGenerator[Told]:
    """Serve these answers, one for each connection, which is closed then; the last one for all that follow."""
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    port = listener.extra(anyio.abc.SocketAttribute.local_port)
    server = Told(f"http://127.0.0.1:{port}")

    async def serve(connection: SocketStream) -> None:
        async with connection:
            try:
                number = len(server.requests)
                server.requests.append(await _request(connection))
                given = answers[min(number, len(answers) - 1)]
                if isinstance(given, bytes):
                    await connection.send(given)
                else:
                    await given(connection)
            except (anyio.BrokenResourceError, anyio.EndOfStream, anyio.ClosedResourceError):
                pass

    async with listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, serve)
        yield server
        tasks.cancel_scope.cancel()


async def _request(connection: SocketStream) -> bytes:
    request = b""
    while b"\r\n\r\n" not in request:
        request += await connection.receive()
    head, _, body = request.partition(b"\r\n\r\n")
    length = int(_header(head, "content-length") or 0)
    while len(body) < length:
        body += await connection.receive()
    return head + b"\r\n\r\n" + body


async def silent(connection: SocketStream) -> None:
    """Answer with a head, and then nothing."""
    await connection.send(HEAD)
    await anyio.sleep_forever()


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port: int = bound.getsockname()[1]
        return port
