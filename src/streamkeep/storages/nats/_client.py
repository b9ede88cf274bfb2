"""A small client of NATS: what JetStream needs of the protocol, and nothing else. One connection, which is never made anew here.

The protocol is lines, some of which announce bytes: https://docs.nats.io/reference/reference-protocols/nats-protocol. Messages are handed
over in the order in which they come, within the turn of the event loop in which they came; what is sent in one turn goes out at once.
"""

import asyncio
import re
import ssl
from collections import deque
from collections.abc import Callable, Mapping
from typing import Final
from urllib.parse import urlsplit

import anyio
import msgspec

_REACH_SECONDS: Final = 2.0
_LOG_IN_SECONDS: Final = 5.0
_CLOSE_SECONDS: Final = 1.0
_LONGEST_LINE: Final = 1 << 20
_PORT: Final = 4222
_VERSION: Final = re.compile(r"v?(\d+)\.(\d+)")


class RefusedError(ConnectionError):
    """The server does not let us in, and says why."""


class NoTLSError(ConnectionError):
    """The URL says TLS, and the server does not."""


class Info(msgspec.Struct, frozen=True):
    """What a server says of itself."""

    version: str = ""
    max_payload: int = 1 << 20
    tls_required: bool = False
    nonce: str = ""
    connect_urls: list[str] = []

    @property
    def major_minor(self) -> tuple[int, int]:
        """Its version, to compare; (0, 0) if it is no number."""
        found = _VERSION.match(self.version)
        return (int(found[1]), int(found[2])) if found else (0, 0)


class Message:
    """What somebody has published."""

    __slots__ = ("_head", "data", "subject")

    def __init__(self, subject: str, head: bytes, data: bytes) -> None:
        self.subject: Final = subject
        self._head: Final = head
        self.data: Final = data

    @property
    def status(self) -> str:
        """With how many hundreds a server answers instead of a message; nothing if it is one."""
        return self._head[9:12].decode("ascii", "replace") if self._head[8:9] == b" " else ""

    @property
    def headers(self) -> Mapping[str, str]:
        """Its headers."""
        lines = (line.partition(b":") for line in self._head.split(b"\r\n")[1:])
        return {
            name.decode("ascii", "replace"): value.strip().decode("utf-8", "replace") for name, colon, value in lines if colon
        }


class Client(asyncio.Protocol):
    """A connection to a server.

    Args:
        on_error: called with each error that the server sends once we are connected.
        on_lost: called once, when the connection has ended, however it has.
    """

    def __init__(self, on_error: Callable[[str], None], on_lost: Callable[[], None]) -> None:
        loop = asyncio.get_running_loop()
        self._on_error = on_error
        self._on_lost = on_lost
        self._is_connected = False
        self._error = ""
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._info: asyncio.Future[Info] = loop.create_future()
        self._ended: asyncio.Future[None] = loop.create_future()
        self._pings: deque[asyncio.Future[None]] = deque()
        self._subscriptions: dict[bytes, Callable[[Message], None]] = {}
        self._received = bytearray()
        self._needed = 0
        self._to_send: list[bytes] = []
        self.info = Info()

    async def connect(self, url: str, log_in: Callable[[Info], Mapping[str, str]]) -> None:
        """Connect, over TLS if the URL or the server says so, and log in with what `log_in` gives.

        Raises OSError, of which TimeoutError is one, and whatever `log_in` raises.
        """
        parts = urlsplit(url)
        try:
            async with asyncio.timeout(_REACH_SECONDS):
                await self._loop.create_connection(lambda: self, parts.hostname or "", parts.port or _PORT)
                self.info = await self._info
            async with asyncio.timeout(_LOG_IN_SECONDS):
                await self._secure(parts.scheme, parts.hostname)
                options = {
                    "verbose": False,
                    "pedantic": False,
                    "tls_required": self.info.tls_required,
                    "name": "streamkeep",
                    "lang": "python",
                    "version": "1",
                    "protocol": 1,
                    "headers": True,
                    "no_responders": True,
                    **log_in(self.info),
                }
                self._send(b"CONNECT ", msgspec.json.encode(options), b"\r\n")
                await self.ping()
        except BaseException:
            await self.close(abort=True)
            raise
        self._is_connected = True

    def subscribe(self, subject: str, received: Callable[[Message], None]) -> None:
        """Have `received` called with every message."""
        number = b"%d" % (len(self._subscriptions) + 1)
        self._subscriptions[number] = received
        self._send(b"SUB ", subject.encode(), b" ", number, b"\r\n")

    def publish(self, subject: str, payload: bytes, reply: str = "", headers: Mapping[str, str] | None = None) -> None:
        """Send a message. Subjects and headers are ours, without blanks and line ends."""
        to = f"{subject} {reply}" if reply else subject
        if headers:
            lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
            head = f"NATS/1.0\r\n{lines}\r\n".encode()
            self._send(f"HPUB {to} {len(head)} {len(head) + len(payload)}\r\n".encode(), head, payload, b"\r\n")
        else:
            self._send(f"PUB {to} {len(payload)}\r\n".encode(), payload, b"\r\n")

    async def ping(self) -> None:
        """Return when the server has answered, which it does after all that was sent before."""
        if self._ended.done():
            raise ConnectionResetError(self._error or "the connection is lost")
        pong: asyncio.Future[None] = self._loop.create_future()
        self._pings.append(pong)
        self._send(b"PING\r\n")
        await pong

    async def close(self, *, abort: bool = False) -> None:
        """End the connection; with `abort` without sending what has not been sent, which a stopped server would never take."""
        if self._transport is None:
            return
        with anyio.CancelScope(shield=True):
            if not abort:
                self._flush()
                self._transport.close()
                await asyncio.wait([self._ended], timeout=_CLOSE_SECONDS)
            self._transport.abort()
            await asyncio.wait([self._ended], timeout=_CLOSE_SECONDS)
            await asyncio.sleep(0)  # the transport lets go of its socket in the next turn of the loop

    # -- what asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        self._transport = transport  # type: ignore[assignment]  # a Transport, but to uvloop that is no class  # pyright: ignore[reportAttributeAccessIssue]

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        if self._received:
            self._received += data
            if len(self._received) < self._needed:
                return
            data = bytes(self._received)
            self._received.clear()
        try:
            self._received += data[self._parse(data) :]
        except Exception as error:  # whoever answers is no NATS server, or a broken one
            self._error = f"what the server says cannot be understood: {type(error).__name__}"
            self._abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        if self._ended.done():
            return
        self._ended.set_result(None)
        waiting: list[asyncio.Future[Info] | asyncio.Future[None]] = [self._info, *self._pings]
        for future in waiting:
            if not future.done():
                future.set_exception(self._loss(exc))
                future.exception()  # nobody may be waiting for it
        self._on_lost()

    # -- what the server says

    def _parse(self, data: bytes) -> int:
        """Do what is said in whole lines and messages, and give where they end."""
        position = 0
        while (end := data.find(b"\r\n", position)) >= 0:
            operation = data[position : position + 4]
            if operation in {b"MSG ", b"HMSG"}:
                words = data[position:end].split()
                begin = end + 2
                last = begin + int(words[-1])
                if len(data) < last + 2:
                    self._needed = last + 2 - position
                    return position
                body = begin + int(words[-2]) if operation == b"HMSG" else begin
                received = self._subscriptions.get(words[2])
                if received is not None:
                    received(Message(words[1].decode(), data[begin:body], data[body:last]))
                position = last + 2
            else:
                self._line_received(data[position:end])
                position = end + 2
        self._needed = 0
        if len(data) - position > _LONGEST_LINE:
            raise ValueError("a line without an end")
        return position

    def _line_received(self, line: bytes) -> None:
        operation, _, rest = line.partition(b" ")
        match operation.upper():
            case b"PING":
                self._send(b"PONG\r\n")
            case b"PONG":
                if self._pings and not (pong := self._pings.popleft()).done():
                    pong.set_result(None)
            case b"INFO":
                self.info = msgspec.json.decode(rest, type=Info)
                if not self._info.done():
                    self._info.set_result(self.info)
            case b"-ERR":
                self._error = rest.decode("utf-8", "replace").strip(" '")
                if self._is_connected:
                    self._on_error(self._error)
            case b"+OK":
                pass
            case _:
                raise ValueError("an unknown operation")

    # -- sending

    async def _secure(self, scheme: str, host: str | None) -> None:
        assert self._transport is not None
        if not self.info.tls_required:
            if scheme == "tls":
                raise NoTLSError  # before we say who we are
            return
        if self._received:
            raise ConnectionError("the server went on in the clear where it had asked for TLS")
        context = ssl.create_default_context()
        try:
            transport = await self._loop.start_tls(self._transport, self, context, server_hostname=host)
        except BaseException:
            self._transport.abort()
            self.connection_lost(None)  # asyncio says it only of connections that are whole
            raise
        assert transport is not None
        self._transport = transport

    def _send(self, *parts: bytes) -> None:
        if not self._to_send:
            self._loop.call_soon(self._flush)
        self._to_send += parts

    def _flush(self) -> None:
        if self._to_send and self._transport is not None and not self._transport.is_closing():
            self._transport.write(b"".join(self._to_send))
        self._to_send.clear()

    def _abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _loss(self, error: Exception | None) -> ConnectionError:
        sentence = self._error or str(error or "") or "the connection was closed"
        loss = ConnectionResetError(sentence) if self._is_connected or not self._error else RefusedError(sentence)
        loss.__cause__ = error
        return loss
