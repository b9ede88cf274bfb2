"""Answering: one request, and its answer, as the protocol wants its headers."""

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Final, Literal
from urllib.parse import quote, unquote, urlsplit

import anyio
from anyio.lowlevel import checkpoint

from .._durations import check_durations
from ..errors import InvalidArgumentError, StorageError
from ..events import encode_json
from ..http.response import (
    Message,
    Receive,
    RequestRefusedError,
    Scope,
    Send,
    code_of,
    headers_of,
    read_body,
    refusal_of,
    shown_error,
)
from . import _messages, _paths, _rules
from ._requests import Reading, RefusedError, cursor_after
from ._rules import Answer, Stream

THROWN_AWAY_BYTES: Final = 32 << 20
THROWN_AWAY_SECONDS: Final = 10.0
METHODS: Final = "GET, HEAD, POST, PUT, DELETE, OPTIONS"
_ORIGIN: Final = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^\s/?#@,A-Z]+")
"""In lower case, without a path: another one is no page's, and would be let in nowhere."""
_ROOT: Final = re.compile(r"https?://[^\s/?#]+(/[^\s?#]*)?")


@dataclass(frozen=True, slots=True)
class DurableStreamsLimits:
    """What is taken, and no more.

    Attributes:
        max_append_bytes: the body of one request; a longer one is answered 413.
        max_stream_bytes: all that is appended to a stream, as it is stored; then 413.
        max_stream_records: how many appends a stream may hold; one of more than a mebibyte counts as several. Then 413.
        max_waiting_bytes: bodies of requests that are not answered yet, all streams together; then 429.
        max_producers: idempotent producers of a stream; then 429, unless some have been silent for a week.
        max_readers: live readers of this app, all streams together; then 429.
        max_subscriptions: subscriptions of the storage; then 429.
        body: how long a request's body may take to arrive; then 408.
        long_poll: how long a long-poll waits.
        sse: how long a response of server-sent events lasts; its reader comes back (5.8).
    """

    max_append_bytes: int = 4 << 20
    max_stream_bytes: int = 256 << 20
    max_stream_records: int = 1_000_000
    max_waiting_bytes: int = 256 << 20
    max_producers: int = 1_000
    max_readers: int = 10_000
    max_subscriptions: int = 1_000
    body: timedelta = timedelta(seconds=60)
    long_poll: timedelta = timedelta(seconds=20)
    sse: timedelta = timedelta(seconds=60)

    def __post_init__(self) -> None:
        check_durations(body=self.body, long_poll=self.long_poll, sse=self.sse)


@dataclass(slots=True)
class Waiting:
    """How many bytes of bodies are held for requests that are not answered yet."""

    size: int = 0


@dataclass(frozen=True, slots=True)
class Manner:
    """How an app answers; see `durable_streams`. `forgets`: its streams forget their beginnings."""

    limits: DurableStreamsLimits
    cors: str | None
    cache: Literal["public", "private"]
    public_url: str | None
    forgets: bool = False
    waiting: Waiting = field(default_factory=Waiting)

    def __post_init__(self) -> None:
        if self.cache not in ("public", "private"):
            raise InvalidArgumentError(f"`cache` is 'public' or 'private', and not {self.cache!r}")
        if self.cors is not None and not (isinstance(self.cors, str) and _ORIGIN.fullmatch(self.cors)):
            raise InvalidArgumentError(
                f"`cors` is None, '*', or one origin as browsers send it, such as 'https://app.example', and not {self.cors!r}"
            )
        if not (self.public_url is None or (isinstance(self.public_url, str) and _ROOT.fullmatch(self.public_url))):
            raise InvalidArgumentError(
                f"`public_url` is a URL, such as 'https://api.example/v1/stream', and not {self.public_url!r}"
            )


class Answering:
    """One request, and its answer."""

    def __init__(self, manner: Manner, scope: Scope, receive: Receive, send: Send) -> None:
        self._manner = manner
        self.scope = scope
        self._receive = receive
        self._has_all = False  # of the request's body
        self._held = 0  # of its bytes
        self.headers = headers_of(scope)
        self.root: str = scope.get("root_path", "")
        self.has_begun = False
        self._send = send

    def path(self) -> str:
        """Give the path of the stream that is asked for. RefusedError: it is none."""
        path: str = self.scope["path"]
        path = path[len(self.root) :] if self.root and path.startswith(self.root) else path
        path = path.removeprefix("/")
        if (why := _paths.why_refused(path)) is not None:
            raise RefusedError(400, why)
        return path

    def check_path(self) -> None:
        """Refuse what two parties may take for different streams. Raises RefusedError."""
        raw: bytes = self.scope.get("raw_path") or b""
        if b"%2f" in raw.lower():
            raise RefusedError(400, "a stream's path has no encoded slashes")

    def url(self, path: str) -> str:
        """Give the URL of a stream, as the client knows it."""
        return f"{self.base_url()}/{quote(path)}"

    def roots(self) -> Sequence[str]:
        """Give the paths that all streams are under: as clients know it, and as it is here, if a proxy has changed it."""
        public = self._manner.public_url
        return (self.root,) if public is None else (unquote(urlsplit(public).path), self.root)

    def base_url(self) -> str:
        """Give the URL of the root of all streams, as the client knows it."""
        base = self._manner.public_url
        if base is None:
            host = self.headers.get("host", "localhost")
            base = f"{self.scope.get('scheme', 'http')}://{host}{quote(self.root)}"
        return base

    async def body(self) -> bytes | None:
        """Give the request's body; None: the client has gone. RequestRefusedError: it is too long, or takes too long, or too many wait."""
        limits = self._manner.limits
        try:
            return await read_body(self.scope, self._hold, max_bytes=limits.max_append_bytes, within=limits.body)
        except RequestRefusedError as error:
            self.let_go()
            if error.code in {413, 429}:
                await self._throw_away_the_rest()
            raise

    async def _hold(self) -> Message:
        message, waiting = await self.receive(), self._manner.waiting
        size = len(message.get("body", b""))
        self._held += size
        waiting.size += size
        if waiting.size > self._manner.limits.max_waiting_bytes and waiting.size > self._held:
            raise RequestRefusedError("RESOURCE_EXHAUSTED", 429, "too many bytes wait to be stored", [("retry-after", "1")])
        return message

    def let_go(self) -> None:
        """Hold the request's body no longer: it is answered."""
        self._manner.waiting.size -= self._held
        self._held = 0

    async def receive(self) -> Message:
        """Receive a message of the server's (ASGI)."""
        message = await self._receive()
        self._has_all = not message.get("more_body", False)
        return message

    async def _throw_away_the_rest(self) -> None:
        """Read what is left of a body, within bounds: a client that still sends may not see its answer before it is cut."""
        size = 0
        with anyio.move_on_after(THROWN_AWAY_SECONDS):
            while size < THROWN_AWAY_BYTES and not self._has_all:
                size += len((await self.receive()).get("body", b""))
                await checkpoint()

    # Whole answers

    async def send(self, answer: Answer, body: bytes = b"", cache: str = "no-store", name: str = "") -> None:
        """Send an answer; a refusal with its reason."""
        headers = [*answer.headers, ("cache-control", cache)]
        if answer.reason:
            body = encode_json({"error": {"code": name or _NAMES.get(answer.code, "ERROR"), "message": answer.reason}})
            headers = [*headers, ("content-type", "application/json")]
        if answer.code not in {204, 304} and not (self.scope["method"] == "HEAD" and answer.code == 200):
            headers.append(("content-length", str(len(body))))
        await self.start(answer.code, headers)
        is_bodiless = answer.code in {204, 304} or self.scope["method"] == "HEAD"
        await self._send({"type": "http.response.body", "body": b"" if is_bodiless else body})

    async def start(self, code: int, headers: Sequence[tuple[str, str]]) -> None:
        """Begin an answer."""
        self.has_begun = True
        cors = self._manner.cors
        ours = [
            ("x-content-type-options", "nosniff"),
            ("cross-origin-resource-policy", "same-origin" if cors is None else "cross-origin"),
        ]
        if cors is not None:
            ours += [("access-control-allow-origin", cors), ("access-control-expose-headers", _EXPOSED)]
            if cors != "*":
                ours.append(("vary", "origin"))
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in [*headers, *ours]]
        await self._send({"type": "http.response.start", "status": code, "headers": raw})

    async def write(self, body: bytes, *, more: bool = True) -> None:
        """Send a part of the body."""
        await self._send({"type": "http.response.body", "body": body, "more_body": more})

    async def preflight(self, methods: str = METHODS) -> None:
        """Answer what a browser asks before it asks for something."""
        asked = (
            ("access-control-allow-methods", methods),
            ("access-control-allow-headers", _ALLOWED),
            ("access-control-max-age", "86400"),
        )
        await self.send(Answer(204, (("allow", methods), *(asked if self._manner.cors is not None else ()))))

    async def refuse(self, error: Exception) -> None:
        """Answer with an error."""
        match error:
            case RefusedError():
                await self.send(Answer(error.code, error.headers, str(error)), name=error.name)
            case RequestRefusedError():
                await self.send(Answer(error.code, tuple(error.headers), str(error)))
            case _:
                refusal = refusal_of(error)
                if refusal is not None:
                    info, code, headers = refusal
                    await self.send(Answer(code, tuple(headers), info.message or "the request was refused"))
                    return
                info = shown_error(error)
                code = code_of(error) or (503 if isinstance(error, StorageError) else _code(error))
                retry = (("retry-after", "1"),) if code == 503 else ()
                await self.send(Answer(code, retry, info.message or "internal"))

    # Reads

    async def page(self, stream: Stream, position: int, records: Sequence[bytes], reading: Reading, *, is_now: bool) -> None:
        """Answer with what is behind a position."""
        state, end = stream.state, position + len(records)
        json = _messages.is_json(state.content_type)
        is_whole = end >= stream.tail
        is_over = is_whole and state.is_closed
        headers: list[tuple[str, str]] = [
            ("content-type", state.content_type),
            ("stream-next-offset", _rules.offset_of(state, end)),
            ("content-security-policy", "sandbox; default-src 'none'"),
        ]
        if is_whole:
            headers.append(("stream-up-to-date", "true"))
        if is_over:
            headers.append(("stream-closed", "true"))
        elif reading.live:
            headers.append(("stream-cursor", cursor_after(reading.cursor, time.time())))
        cache = "no-store"
        if not is_now:
            etag = f'"{state.life}:{position}:{end}{":c" if is_over else ""}"'
            headers.append(("etag", etag))
            # What is empty, of an open stream, is so for no time. Where a stream begins that forgets is another place soon: a reader that
            # was kept an old beginning would be led to an offset that is gone, and from there to the beginning again.
            is_passing = (not records and not is_over) or (reading.offset == "-1" and (self._manner.forgets or position > 0))
            cache = f"{self._manner.cache}, {'no-cache' if is_passing else 'max-age=60, stale-while-revalidate=300'}"
            if is_among(etag, self.headers.get("if-none-match", "")):
                await self.send(Answer(304, tuple(headers)), cache=cache)
                return
        await self.send(Answer(200, tuple(headers)), _messages.body_of(records, json=json), cache)

    async def nothing(self, stream: Stream, cursor: str | None) -> None:
        """Answer a long-poll for which nothing came; no cursor: nothing will."""
        closed = (
            [("stream-closed", "true")] if stream.state.is_closed and cursor is None else [("stream-cursor", cursor or "0")]
        )
        headers = [("stream-next-offset", _rules.offset_of(stream.state, stream.tail)), ("stream-up-to-date", "true"), *closed]
        await self.send(Answer(204, tuple(headers)))


def _code(error: Exception) -> int:
    code = getattr(error, "http_code", 500)
    return code if isinstance(code, int) else 500


def is_among(etag: str, given: str) -> bool:
    """Say whether an If-None-Match names an entity tag (RFC 9110, 13.1.2)."""
    return given.strip() == "*" or etag in {part.strip().removeprefix("W/") for part in given.split(",")}


_NAMES: Final[Mapping[int, str]] = {
    400: "BAD_REQUEST",
    403: "FORBIDDEN",
    404: "NOT_FOUND",
    405: "METHOD_NOT_ALLOWED",
    408: "TIMEOUT",
    409: "CONFLICT",
    410: "GONE",
    413: "PAYLOAD_TOO_LARGE",
    429: "RATE_LIMITED",
    503: "UNAVAILABLE",
}
_PROTOCOL: Final = (
    "Stream-TTL, Stream-Expires-At, Stream-Seq, Stream-Closed, Stream-Forked-From, Stream-Fork-Offset, Stream-Fork-Sub-Offset, "
    "Producer-Id, Producer-Epoch, Producer-Seq"
)
_ALLOWED: Final = f"Content-Type, Authorization, If-None-Match, {_PROTOCOL}"
_EXPOSED: Final = (
    "Stream-Next-Offset, Stream-Cursor, Stream-Up-To-Date, Stream-Closed, Stream-TTL, Stream-Expires-At, Stream-SSE-Data-Encoding, "
    "Producer-Epoch, Producer-Seq, Producer-Expected-Seq, Producer-Received-Seq, ETag, Location, Retry-After"
)
