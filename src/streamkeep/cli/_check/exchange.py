"""One request, and its answer as it arrives: when which bytes came, and how it ended. It decides nothing about what that means.

It speaks HTTP/1.1 by itself, because a client library would hide what is looked for: when bytes arrive, which headers came twice, what
cut the connection.
"""

import re
import socket
import ssl
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal
from urllib.parse import urlsplit

import anyio
import h11
import msgspec
from anyio.abc import ByteStream, SocketAttribute
from anyio.streams.tls import TLSStream

from ...errors import LimitExceededError
from ...wire import ServerSentEvent, SSEDecoder, parse_cursor

End = Literal["whole", "cut", "left", "late", "failed"]
"""`whole`: as the server meant it. `cut`: the connection broke in the answer. `left`: we went. `late`: it took longer than it may.
`failed`: there was no answer.
"""

CONNECT_SECONDS: Final = 10.0
READ_BYTES: Final = 1 << 16
_ID: Final = re.compile(r"[A-Za-z0-9_~.:@=+-]{1,255}")
MAX_ANSWER_BYTES: Final = 32 << 20
MAX_HEAD_BYTES: Final = 128 << 10
MAX_EVENTS: Final = 10_000
SMALL_BUFFER_BYTES: Final = 64 << 10
"""What a slow reader's system takes for it; less makes TCP crawl."""
BODY_PART_BYTES: Final = 1 << 16
CLEANING_UP: Final = "cleaning up"
BROWSERS_ENCODINGS: Final = "gzip, deflate, br, zstd"


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go.

    Attributes:
        url: where the app has mounted its `CheckHTTP`, without a slash at the end.
        headers: what each request has, such as a token. They are in no report.
        tls: how to speak TLS, where the URL says so.
    """

    url: str
    headers: Sequence[tuple[str, str]] = ()
    tls: ssl.SSLContext | None = None

    @property
    def host(self) -> str:
        """The host's name or address."""
        return urlsplit(self.url).hostname or ""

    @property
    def port(self) -> int:
        """Its port."""
        return urlsplit(self.url).port or (443 if self.tls else 80)

    @property
    def path(self) -> str:
        """What each request's path begins with."""
        return urlsplit(self.url).path


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked.

    Attributes:
        method: the method.
        path: the path below the target's.
        headers: headers of this request.
        body: its body.
        about: what it is for, in the history.
        is_anonymous: whether it goes without the target's headers, as browsers send what they ask before a page's own request.
    """

    method: str
    path: str
    headers: Sequence[tuple[str, str]] = ()
    body: bytes = b""
    about: str = ""
    is_anonymous: bool = False


class Told(msgspec.Struct, frozen=True):
    """Why an app says that it breaks an answer off."""

    status: str
    message: str = ""

    def __str__(self) -> str:
        return f"{self.status}: {self.message[:200]}"


class Made(msgspec.Struct, frozen=True):
    """What a chunk of a check says of itself: its number, seconds since the first, seconds that storing the one before took."""

    n: int
    at: float
    took: float


class _Sent(Made, frozen=True):
    text: str
    crc: int


_told: Final = msgspec.json.Decoder(Told)
_sent: Final = msgspec.json.Decoder(_Sent)


@dataclass(frozen=True, slots=True)
class Event:
    """An event as it came.

    Attributes:
        name: `chunk`, `done`, `error` or what else.
        offset: what its id says; None without a cursor.
        id: its id as it is.
        came: seconds since the request was sent.
        made: what a chunk says of itself; None if it is none, or was altered.
        data: what it carries; empty for a chunk.
    """

    name: str
    offset: int | None
    id: str
    came: float
    made: Made | None
    data: str = ""


@dataclass(slots=True)
class Exchange:
    """A request, and what came of it. Times are seconds since the request began to be sent.

    Attributes:
        request: what was asked.
        began: when, since the check began.
        status: the answer's code; 0 as long as there is none.
        version: the HTTP version that the answer names.
        headers: its headers as they came, names in lower case.
        head: when they had come.
        reads: when how many bytes of the body came.
        body: its beginning, decoded.
        events: of an event stream.
        end: how it ended.
        ended: when.
        why: what the network said, where it broke.
    """

    request: Request
    began: float = 0.0
    status: int = 0
    version: str = ""
    headers: list[tuple[str, str]] = field(default_factory=list)
    head: float = 0.0
    reads: list[tuple[float, int]] = field(default_factory=list)
    body: bytearray = field(default_factory=bytearray)
    events: list[Event] = field(default_factory=list)
    end: End = "failed"
    ended: float = 0.0
    why: str = ""

    def header(self, name: str) -> str:
        """Give a header's value; empty if it is not there."""
        return ", ".join(self.all_of(name))

    def all_of(self, name: str) -> list[str]:
        """Give a header's values, one for each time that it came."""
        return [value for known, value in self.headers if known == name]

    @property
    def is_success(self) -> bool:
        """Whether its code says that it was done."""
        return 200 <= self.status <= 299

    @property
    def instance(self) -> str:
        """Which process has answered; empty if the answer does not say."""
        return self.header("x-streamkeep-instance")

    @property
    def chunks(self) -> list[Made]:
        """The chunks that came, in the order in which they did."""
        return [event.made for event in self.events if event.made is not None]

    @property
    def last_id(self) -> str:
        """The cursor of the last event that has one."""
        return next((event.id for event in reversed(self.events) if event.offset is not None), "")

    @property
    def stream(self) -> str:
        """The id of the stream that it shows, by its events or by its headers."""
        cursor = parse_cursor(self.last_id)
        named = self.header("x-genkit-stream-id")
        return cursor.stream if cursor else named if _ID.fullmatch(named) else ""

    @property
    def terminal(self) -> Event | None:
        """The event that ends the stream, if it came. An `error` without a cursor is of the answer alone."""
        return next(
            (each for each in self.events if each.name == "done" or (each.name == "error" and each.offset is not None)), None
        )

    @property
    def told(self) -> Told | None:
        """Why the app has broken this answer off, if it says so: the stream itself goes on, and the event has no cursor."""
        last = self.events[-1] if self.events else None
        if last is None or last.name != "error" or last.offset is not None:
            return None
        try:
            return _told.decode(last.data)
        except (msgspec.MsgspecError, ValueError):
            return None

    @property
    def is_delimited(self) -> bool:
        """Whether the end of the answer can be told from the end of its connection."""
        return bool(self.header("content-length")) or "chunked" in self.header("transfer-encoding").lower()

    @property
    def silence(self) -> float:
        """Seconds between the last byte and the end."""
        return self.ended - (self.reads[-1][0] if self.reads else self.head)

    @property
    def bytes(self) -> int:
        """How many bytes the body had, as they travelled."""
        return sum(size for _, size in self.reads)


Until = Callable[[Exchange], bool]
"""Says whether we leave, having seen so much of an answer."""


@dataclass(frozen=True, slots=True)
class Reading:
    """How an answer is read.

    Attributes:
        within: seconds that it may take.
        until: when we leave; None: at its end.
        stops_for: seconds for which nothing is read, once some has come.
    """

    within: float = 30.0
    until: Until | None = None
    stops_for: float = 0.0


PLAIN: Final = Reading()

BROKEN: Final = (
    OSError,
    anyio.EndOfStream,
    anyio.BrokenResourceError,
    anyio.ClosedResourceError,
    h11.ProtocolError,
    ssl.SSLError,
    zlib.error,
    LimitExceededError,
)
"""What ends an exchange, and is kept with it."""


class Asking:
    """Asks a target, each request over a connection of its own, and keeps all exchanges."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.exchanges: list[Exchange] = []
        self._began = time.monotonic()

    async def ask(self, request: Request, reading: Reading = PLAIN) -> Exchange:
        """Ask, and give what came, whatever it is: no error of the network is raised."""
        exchange = Exchange(request, time.monotonic() - self._began)
        self.exchanges.append(exchange)
        sent_at = time.monotonic()
        with anyio.move_on_after(reading.within) as waiting:
            try:
                async with await self._connected(small=reading.stops_for > 0) as stream:
                    sent_at = time.monotonic()
                    await _exchange(self.target, stream, exchange, reading, sent_at)
            except BROKEN as error:
                exchange.end, exchange.why = "cut" if exchange.status else "failed", str(error) or type(error).__name__
        if waiting.cancelled_caught:
            exchange.end = "late"
        exchange.ended = time.monotonic() - sent_at
        return exchange

    async def _connected(self, *, small: bool) -> ByteStream:
        target = self.target
        with anyio.fail_after(CONNECT_SECONDS):
            stream = await anyio.connect_tcp(target.host, target.port)
            if small:
                raw = stream.extra(SocketAttribute.raw_socket)  # noqa: S610 - of a socket
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER_BYTES)
            if target.tls is None:
                return stream
            return await TLSStream.wrap(
                stream, hostname=target.host, ssl_context=target.tls, server_side=False, standard_compatible=False
            )


async def _exchange(target: Target, stream: ByteStream, exchange: Exchange, reading: Reading, sent_at: float) -> None:
    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD_BYTES)
    failure: Exception | None = None
    async with anyio.create_task_group() as tasks:
        # An answer may come before all of the request is sent, such as a 413.
        tasks.start_soon(_send, target, stream, connection, exchange)
        try:
            await _receive(stream, connection, exchange, reading, sent_at)
        except BROKEN as error:
            failure = error
        tasks.cancel_scope.cancel()
    if failure is not None:
        raise failure


async def _send(target: Target, stream: ByteStream, connection: h11.Connection, exchange: Exchange) -> None:
    request = exchange.request
    own = {name.lower() for name, _ in request.headers}
    length = [("content-length", str(len(request.body)))] if request.body or request.method == "POST" else []
    given = {name.lower(): text for name, text in target.headers}
    usual = {"host": urlsplit(target.url).netloc, "user-agent": "streamkeep-check", "accept": "*/*"}
    headers = [
        *((name, given.get(name, text)) for name, text in usual.items() if name not in own),
        *length,
        *(
            header
            for header in target.headers
            if not request.is_anonymous and header[0].lower() not in own and header[0].lower() not in usual
        ),
        *request.headers,
    ]
    body = request.body
    try:
        await stream.send(
            connection.send(h11.Request(method=request.method, target=target.path + request.path, headers=headers)) or b""
        )
        for start in range(0, len(body), BODY_PART_BYTES):
            await stream.send(connection.send(h11.Data(body[start : start + BODY_PART_BYTES])) or b"")
        await stream.send(connection.send(h11.EndOfMessage()) or b"")
    except (OSError, anyio.BrokenResourceError, anyio.ClosedResourceError, h11.LocalProtocolError) as error:
        exchange.why = str(error) or type(error).__name__  # what answers, if anything does, is read all the same


async def _receive(
    stream: ByteStream, connection: h11.Connection, exchange: Exchange, reading: Reading, sent_at: float
) -> None:
    body, pause = _Body(exchange), reading.stops_for
    while True:
        event = connection.next_event()
        now = time.monotonic() - sent_at
        match event:
            case h11.NEED_DATA:
                connection.receive_data(await _received(stream))
            case h11.InformationalResponse():
                pass
            case h11.Response():
                exchange.status, exchange.version = event.status_code, event.http_version.decode("latin-1")
                exchange.headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in event.headers]
                exchange.head = now
                if reading.until is not None:
                    reading.until(exchange)  # who waits for the stream's id has it
            case h11.Data():
                body.feed(bytes(event.data), now)
                if reading.until is not None and reading.until(exchange):
                    exchange.end = "left"
                    return
                await anyio.sleep(pause)
                pause = 0.0
            case h11.EndOfMessage():
                exchange.end = "whole"
                return
            case _:
                raise OSError("the connection was closed without an answer")


async def _received(stream: ByteStream) -> bytes:
    try:
        return await stream.receive(READ_BYTES)
    except anyio.EndOfStream:
        return b""


class _Body:
    """What the bytes of a body say."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._events: SSEDecoder | None = SSEDecoder()
        self._inflate: Callable[[bytes, int], bytes] | None = None
        self._size = 0

    def feed(self, data: bytes, now: float) -> None:
        """Take a piece of it. OSError: it is more than anybody should send; BROKEN: it is not what its headers say."""
        exchange = self._exchange
        if not exchange.reads:
            self._look(exchange.header("content-encoding").lower())
        exchange.reads.append((now, len(data)))
        if self._inflate is not None:
            data = self._inflate(data, MAX_ANSWER_BYTES)
        if len(exchange.body) < READ_BYTES:
            exchange.body += data
        self._size += len(data)
        if self._events is not None and exchange.status == 200:
            self._take(self._events.feed(data), now)
        if self._size > MAX_ANSWER_BYTES or len(exchange.events) > MAX_EVENTS:
            raise OSError(f"the answer has more than {MAX_ANSWER_BYTES} bytes, or {MAX_EVENTS} events")

    def _look(self, coding: str) -> None:
        if coding in {"gzip", "deflate", "x-gzip"}:
            self._inflate = zlib.decompressobj(zlib.MAX_WBITS | 32).decompress
        elif coding not in {"", "identity"}:
            self._events = None  # br and zstd: the times of the bytes are all there is

    def _take(self, events: Sequence[ServerSentEvent], now: float) -> None:
        for event in events:
            # An event without an id of its own has that of the one before. Of a stream's own no two have the same.
            has_id = event.event != "error" or not (self._exchange.events and event.id == self._exchange.events[-1].id)
            cursor = parse_cursor(event.id) if has_id else None
            made = _made_of(event.data) if event.event == "chunk" else None
            kept = "" if made else event.data[:500]
            self._exchange.events.append(Event(event.event, cursor.offset if cursor else None, event.id, now, made, kept))


def _made_of(data: str) -> Made | None:
    try:
        sent = _sent.decode(data)
    except (msgspec.MsgspecError, ValueError):
        return None
    return Made(sent.n, sent.at, sent.took) if zlib.crc32(sent.text.encode()) == sent.crc else None
