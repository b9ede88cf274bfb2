"""CheckHTTP: what `streamkeep check` asks, mounted in an app beside its endpoints.

It starts, shows, resumes and stops streams of numbered chunks through the very methods that endpoints call, so what is found about them is
true of the app's answers. It never touches a stream that it has not started.
"""

import os
import re
import socket
import time
import uuid
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

import anyio

from .._input import StreamInput
from ..errors import InvalidArgumentError, LimitExceededError, StreamNotFoundError
from ..events import encode_json
from .app import Answer, StreamsHTTP, path_below, shown_info
from .bounds import Bounds
from .ended import Ended
from .framing import SSEFraming
from .mounted import Mounted
from .place import query_of
from .response import ASGIApp, Message, Receive, Scope, Send, can_be_cut, errors_answered, headers_of, read_body, send_response
from .trust import Trust, check_trusted, trust_of

INSTANCE_HEADER: Final = "x-streamkeep-instance"
ANSWER_HEADER: Final = "x-streamkeep-answer"
"""No two answers of the app have the same here: what comes twice comes from a cache."""
OWNER: Final = "streamkeep.check"
ID_PREFIX: Final = "streamkeep.check-"
TTL: Final = timedelta(minutes=1)
MAX_STREAMS: Final = 24
"""How many streams run at a time in one process."""
TOO_MANY: Final = f"{MAX_STREAMS} streams of checks run here already"
MAX_CHUNKS: Final = 2_000
MAX_CHUNK_BYTES: Final = 64 << 10
MAX_STREAM_BYTES: Final = 8 << 20
MAX_SECONDS: Final = 600.0
MIN_PAUSE_SECONDS: Final = 0.01
SHOWN_HEADERS: Final = (
    "accept",
    "accept-encoding",
    "idempotency-key",
    "last-event-id",
    "x-genkit-stream-id",
    "x-genkit-stream-offset",
)
"""Headers of a request of which the answer says how they have arrived."""
_PATH: Final = re.compile(r"/(?:(?P<what>hello|body|broken|streams)|streams/(?P<stream>[^/]+)(?P<sub>/info|/cancel)?)")
_TEXT: Final = "a “fox” of http://localhost/ <b>runs</b>, "
"""What is on the way and rewrites links, mark-up or characters meets some here."""
_NUMBER: Final = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")


@dataclass(frozen=True, slots=True)
class Pace:
    """What a stream of a check is made of.

    Attributes:
        chunks: how many.
        pause: seconds before each but the first.
        bytes: about how long each is at least.
        quiet: seconds of silence more, in the middle.
    """

    chunks: int
    pause: float
    bytes: int
    quiet: float

    @property
    def seconds(self) -> float:
        """How long it all takes."""
        return self.chunks * self.pause + self.quiet


class CheckHTTP(Mounted):
    """Has an app be checked by `streamkeep check`, through its own proxy and storage; an ASGI app to be mounted.

        app.mount("/check", CheckHTTP(streams_http, trust=os.environ["STREAMKEEP_CHECK_TOKEN"]))

    Mount it where the app's middleware is around it, as it is around the endpoints. It starts streams of its own, at most 24 at a time in
    each process, of at most ten minutes and 8 MiB, which are kept for a minute; they count among the `max_producers` of `streams_http`, and
    belong to an owner of their own, `streamkeep.check`. It cannot read, stop or name any other stream.

    Args:
        streams_http: what the app serves its streams by; it has to be entered, as for the endpoints.
        trust: a token of at least 16 characters, which who checks sends as `Authorization: Bearer`; or a function that says of a
            request's headers whether who sent them is trusted. Others are answered 401.

    Raises InvalidArgumentError: the token is shorter.
    """

    _path_routing: Final = True
    _lifespan_hint = "give the `lifespan` of its StreamsHTTP to the outermost app"

    def __init__(self, streams_http: StreamsHTTP, *, trust: str | Trust) -> None:
        self._streams_http = streams_http
        self._trust = trust_of(trust)
        self._running: set[str] = set()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with errors_answered(send):
            await check_trusted(self._trust, headers_of(scope))
            named = _named(send)
            async with errors_answered(named):
                await self._answer_trusted(scope, receive, named)

    async def _answer_trusted(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = _PATH.fullmatch(path_below(scope))
        if path is None or not (path["stream"] or ID_PREFIX).startswith(ID_PREFIX):
            raise StreamNotFoundError("not found")
        what = path["what"] or f"stream{path['sub'] or ''}"
        match scope["method"], what:
            case ("GET" | "HEAD", "hello"):
                await send_response(send, 200, encode_json(self._hello(scope)), [("retry-after", "0")])
            case ("GET", "broken"):
                await _break_off(scope, send)
            case ("POST", "body"):
                await self._measure_body(scope, receive, send)
            case ("POST", "streams"):
                await self._start(scope, receive, send)
            case ("GET" | "HEAD", "stream"):
                await self._shown(await self._streams_http.follow_to(scope, path["stream"], owner=OWNER), scope, receive, send)
            case ("GET" | "HEAD", "stream/info"):
                info = await self._streams_http.admit("read", scope, path["stream"], None, {}, OWNER)
                await send_response(send, 200, encode_json(shown_info(info)))
            case ("DELETE", "stream") | ("POST", "stream/cancel"):
                await self._shown(await self._streams_http.cancel_to(scope, path["stream"], owner=OWNER), scope, receive, send)
            case _:
                await send_response(send, 405, headers=[("allow", "GET, HEAD, POST, DELETE")])

    def _hello(self, scope: Scope) -> Mapping[str, object]:
        headers, timeouts = headers_of(scope), self._streams_http.timeouts
        return {
            "check": 1,
            "instance": instance(),
            "time": time.time(),
            "path": scope["path"],
            "scheme": scope["scheme"],
            "httpVersion": scope["http_version"],
            "headers": {name: headers[name][:200] for name in SHOWN_HEADERS if name in headers},
            "query": {name: text[:200] for name, text in query_of(scope).items() if name in {"lastEventId", "after"}},
            "heartbeat": timeouts.heartbeat.total_seconds(),
            "longest": timeouts.longest.total_seconds(),
            "maxBodyBytes": self._streams_http.max_body_bytes,
        }

    async def _measure_body(self, scope: Scope, receive: Receive, send: Send) -> None:
        most, within = self._streams_http.max_body_bytes, self._streams_http.timeouts.body
        body = await read_body(scope, receive, max_bytes=most, within=within)
        if body is not None:
            await send_response(send, 200, encode_json({"bytes": len(body)}))

    async def _start(self, scope: Scope, receive: Receive, send: Send) -> None:
        pace = pace_of(query_of(scope))
        if len(self._running) >= MAX_STREAMS:
            raise LimitExceededError(TOO_MANY)
        stream = f"{ID_PREFIX}{uuid.uuid4()}"
        self._running.add(stream)

        async def take_over() -> bool:
            return await self._streams_http.skip_body(scope, receive)

        def forget(_ended: Ended) -> None:
            self._running.discard(stream)

        async def source(stream: StreamInput) -> object:
            return await produce(stream, pace)

        started = False
        try:
            answer = await self._streams_http.respond_to(
                scope,
                source,
                take_over,
                id=stream,
                owner=OWNER,
                ttl=TTL,
                bounds=Bounds(max_duration=timedelta(seconds=MAX_SECONDS + 60)),
                on_end=forget,
                framing=SSEFraming(),
            )
            started = answer.started
        finally:
            if not started:
                self._running.discard(stream)
        await self._shown(answer, scope, receive, send)

    async def _shown(self, answer: Answer, scope: Scope, receive: Receive, send: Send) -> None:
        app: ASGIApp = answer.app
        await app(scope, receive, send)


def checks(trust: str | Trust) -> Callable[[StreamsHTTP], CheckHTTP]:
    """Give what has a `StreamsHTTP` be checked that may be started anew: one CheckHTTP for each, so that it knows what it has started.

    Raises InvalidArgumentError: the token is too short.
    """
    trust_of(trust)
    newest: list[tuple[StreamsHTTP, CheckHTTP]] = []

    def checked(http: StreamsHTTP) -> CheckHTTP:
        if not newest or newest[0][0] is not http:
            newest[:] = [(http, CheckHTTP(http, trust=trust))]
        return newest[0][1]

    return checked


def instance() -> str:
    """Give the name of this process among all that answer: its machine's or container's name, and its number there."""
    host = re.sub(r"[^A-Za-z0-9_.-]", "-", socket.gethostname())[:64]
    return f"{host}/{os.getpid()}"


def pace_of(query: Mapping[str, str]) -> Pace:
    """Give the pace that a query asks for. InvalidArgumentError: that is none, or too much."""
    chunks, pause = _number(query, "chunks", 20), _number(query, "pause", 0.1)
    pace = Pace(int(chunks), pause, int(_number(query, "bytes", 0)), _number(query, "quiet", 0))
    if not 1 <= pace.chunks <= MAX_CHUNKS or pace.pause < MIN_PAUSE_SECONDS or pace.bytes > MAX_CHUNK_BYTES:
        raise InvalidArgumentError(
            f"from 1 to {MAX_CHUNKS} chunks, of at most {MAX_CHUNK_BYTES} bytes, at least {MIN_PAUSE_SECONDS} seconds apart"
        )
    if pace.seconds > MAX_SECONDS or pace.chunks * pace.bytes > MAX_STREAM_BYTES:
        raise InvalidArgumentError(f"a stream of a check takes at most {MAX_SECONDS:g} seconds and {MAX_STREAM_BYTES} bytes")
    return pace


async def produce(stream: StreamInput, pace: Pace) -> object:
    """Write numbered chunks.

    Each says when it was made, by a clock that does not jump, how long it took to store the one before, and the CRC-32 of its text.
    """
    began, took = anyio.current_time(), 0.0
    text = (_TEXT * (pace.bytes // len(_TEXT) + 1))[: pace.bytes]
    check = zlib.crc32(text.encode())
    for number in range(pace.chunks):
        if number:
            await anyio.sleep(pace.pause)
        if number == (pace.chunks + 1) // 2:
            await anyio.sleep(pace.quiet)
        at = anyio.current_time()
        await stream.write({"n": number, "at": round(at - began, 4), "took": round(took, 4), "text": text, "crc": check})
        took = anyio.current_time() - at
    return {"chunks": pace.chunks}


def _number(query: Mapping[str, str], name: str, default: float) -> float:
    text = query.get(name)
    if text is None:
        return default
    if not _NUMBER.fullmatch(text):
        raise InvalidArgumentError(f"`{name}` is a number in ASCII digits")
    return float(text)


async def _break_off(scope: Scope, send: Send) -> None:
    """Send a part of an answer, as one is cut that is not whole; where the server cannot cut, it ends, as such an answer does."""
    headers = [
        (b"content-type", b"text/event-stream"),
        (b"cache-control", b"no-cache, no-transform"),
        (b"x-accel-buffering", b"no"),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b": it breaks off here\n\n", "more_body": can_be_cut(scope)})


def _named(send: Send) -> Send:
    ours = [(INSTANCE_HEADER.encode(), instance().encode()), (ANSWER_HEADER.encode(), uuid.uuid4().hex.encode())]

    async def send_named(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], *ours]}
        await send(message)

    return send_named
