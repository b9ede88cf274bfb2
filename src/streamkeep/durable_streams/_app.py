"""DurableStreams: the Durable Streams protocol over a manager's storage, as plain ASGI."""

import inspect
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, Final, Literal, Self
from urllib.parse import quote

import anyio

from .._background import Background
from .._guard import GuardedStorage
from .._manager import StreamManager
from ..errors import PublicError, StorageError, StreamManagerClosedError
from ..events import encode_json
from ..http.response import (
    BodyRefusedError,
    Receive,
    Scope,
    Send,
    code_of,
    disconnected,
    headers_of,
    read_body,
    refusal_of,
    shown_error,
)
from ..http.shutdown import shutdown_of
from . import _control, _messages, _paths, _rules
from ._live import Live, Piece
from ._requests import Reading, RefusedError, append_of, config_of, cursor_after, fork_of, is_true, reading_of
from ._rules import Answer, Bounds, Headers, Stream
from ._streams import Streams
from ._subscriptions import Subscriptions

logger: Final = logging.getLogger("streamkeep")

Action = Literal["create", "append", "close", "read", "head", "delete", "fork", "subscribe", "claim"]

METHODS: Final = "GET, HEAD, POST, PUT, DELETE, OPTIONS"
HEARTBEAT_SECONDS: Final = 15.0
BODY_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Access:
    """What `authorize` is asked about.

    Attributes:
        action: `create`, `append`, `close`, `read`, `head`, `delete`; `fork` is asked of the source, and then `create` of the fork.
            `subscribe` and `claim` are asked of the subscription (`__ds/subscriptions/ID`), and `subscribe` of each pattern and stream
            that it is to have as well; `append` of its wake stream.
        path: the stream's path, below the root of all streams.
        headers: the request's headers, names in lower case.
        scope: the ASGI connection scope.
    """

    action: Action
    path: str
    headers: Mapping[str, str]
    scope: Mapping[str, Any]


Authorize = Callable[[Access], "bool | Awaitable[bool]"]
"""Says whether a request is allowed; others are answered 403. It may raise `PublicError`, or Starlette's or FastAPI's `HTTPException`, to
say more."""


@dataclass(frozen=True, slots=True)
class DurableStreamsLimits:
    """What is taken, and no more.

    Attributes:
        max_append_bytes: the body of one request; a longer one is answered 413.
        max_stream_bytes: all that is appended to a stream, as it is stored; then 413.
        max_stream_records: how many appends a stream may hold; one of more than a mebibyte counts as several. Then 413.
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
    max_producers: int = 1_000
    max_readers: int = 10_000
    max_subscriptions: int = 1_000
    body: timedelta = timedelta(seconds=60)
    long_poll: timedelta = timedelta(seconds=20)
    sse: timedelta = timedelta(seconds=60)


class DurableStreams:
    """Serves streams by the Durable Streams protocol; an async context manager, and an ASGI app to be mounted. See `durable_streams`."""

    def __init__(
        self,
        streams: StreamManager | str,
        *,
        authorize: Authorize | None = None,
        limits: DurableStreamsLimits | None = None,
        cors: str | None = "*",
        cache: Literal["public", "private"] = "private",
        public_url: str | None = None,
        subscriptions: Literal["off", "public", "local"] = "off",
    ) -> None:
        self.streams: Final = StreamManager.connect(streams) if isinstance(streams, str) else streams
        self._authorize = authorize
        self._limits = limits or DurableStreamsLimits()
        self._cors = cors
        self._cache = cache
        self._public_url = None if public_url is None else public_url.rstrip("/")
        self._webhooks = None if subscriptions == "off" else subscriptions
        self._shutdown = shutdown_of(self.streams)
        self._ours = AsyncExitStack()
        self._background = Background()
        self._there: Streams | None = None
        self._subscriptions: Subscriptions | None = None
        self._is_ending = False
        self._readers = 0

    @property
    def is_running(self) -> bool:
        """Whether it has been entered."""
        return self._there is not None

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            if not self.streams.is_running:
                await stack.enter_async_context(self.streams)
            drained = anyio.Event()
            drained.set()  # there are no producers here
            stack.enter_context(self._shutdown.draining(drained))
            stack.enter_context(self._shutdown.listening())
            self._is_ending = False
            self._background = Background()
            self._background.begin()
            limits = self._limits
            bounds = Bounds(limits.max_stream_bytes, limits.max_stream_records, limits.max_producers)
            storage = GuardedStorage(self.streams.storage)
            self._there = Streams(storage, self._background, bounds, self._changed)
            if self._webhooks is not None:
                self._subscriptions = Subscriptions(
                    storage,
                    self._background,
                    self._there,
                    allow_local=self._webhooks == "local",
                    max_subscriptions=limits.max_subscriptions,
                )
                self._background.start(self._subscriptions.run, "knowing all subscriptions")
            self._background.start(self._there.sweep_for_ever, "sweeping what has expired")
            self._background.start(self._end_in_time, "waiting for the end")
            stack.push_async_callback(self._end)
            self._ours = stack.pop_all()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._ours.__aexit__(exc_type, exc, traceback)

    @asynccontextmanager
    async def lifespan(self, _app: object) -> AsyncGenerator[None, None]:
        """Run while an app runs; in the form in which Starlette and FastAPI want a lifespan."""
        async with self:
            yield

    async def drain(self) -> None:
        """End live reads; their readers come back, and find another process. For servers that say when they stop."""
        self._is_ending = True
        if self._there is not None:
            self._there.wake()

    async def _end_in_time(self) -> None:
        await self._shutdown.begun.wait()
        await self.drain()

    async def _end(self) -> None:
        await self.drain()
        self._background.stop()
        with anyio.CancelScope(shield=True):
            await self._background.wait()
        self._there = None

    def _changed(self, position: int, stream: Stream) -> None:
        if self._subscriptions is not None:
            self._subscriptions.changed(_rules.offset_of(stream.state, position), stream)

    # Answering

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request (ASGI)."""
        match scope["type"]:
            case "http":
                await self._answer(scope, receive, send)
            case "websocket":
                await receive()
                await send({"type": "websocket.close", "code": 1008})
            case _:
                raise RuntimeError("DurableStreams takes HTTP only; give its `lifespan` to the outermost app")

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        answering = _Answering(self, scope, receive, send)
        try:
            if scope["method"] == "OPTIONS":
                await answering.preflight()
                return
            there = self._there
            if there is None:
                raise StreamManagerClosedError(
                    "the server is not running: enter it, or give its `lifespan` to the outermost app"
                )
            await self._route(answering, there)
        except Exception as error:
            if answering.has_begun:
                logger.error("a response was cut", exc_info=error)
                return
            await answering.refuse(error)

    async def _route(self, answering: "_Answering", there: Streams) -> None:
        path = answering.path()
        method = answering.scope["method"]
        if path.split("/")[0] == _paths.CONTROL:
            await self._control(answering, path)
            return
        answering.check_path(path)
        match method:
            case "GET":
                await self._get(answering, there, path)
            case "HEAD":
                await self._head(answering, there, path)
            case "POST":
                await self._post(answering, there, path)
            case "PUT":
                await self._put(answering, there, path)
            case "DELETE":
                await self._allow(answering, "delete", path)
                await answering.send(await there.delete(path))
            case _:
                await answering.send(Answer(405, (("allow", METHODS),), "the protocol has no such method"))

    async def _allow(self, answering: "_Answering", action: Action, path: str) -> None:
        if self._authorize is None:
            return
        allowed = self._authorize(Access(action, path, answering.headers, answering.scope))
        if not (await allowed if inspect.isawaitable(allowed) else allowed):
            raise PublicError("PERMISSION_DENIED", "this is not allowed")

    async def _control(self, answering: "_Answering", path: str) -> None:
        """Answer a request about subscriptions (6)."""
        subscriptions, method = self._subscriptions, answering.scope["method"]
        _, _, what = path.partition("/")
        if subscriptions is None or not (what == "jwks.json" or what.startswith("subscriptions/")):
            await answering.send(Answer(404, reason="there is no such thing"))
            return
        if what == "jwks.json":
            if method != "GET":
                raise RefusedError(405, "the keys are there to be read", headers=(("allow", "GET"),))
            signer = await subscriptions.signer()
            headers = (("content-type", "application/jwk-set+json"),)
            await answering.send(Answer(200, headers), encode_json(signer.jwks), "public, max-age=300")
            return
        name = what.removeprefix("subscriptions/")
        body = await answering.body()
        if body is None:
            return
        await self._allow_control(answering, method, path, name, body)
        reply = await _control.answer(
            subscriptions,
            method,
            name,
            answering.headers,
            body,
            answering.base_url(),
            allow_local=self._webhooks == "local",
        )
        headers = (("content-type", "application/json"),) if reply.value is not None else ()
        await answering.send(Answer(reply.code, headers), b"" if reply.value is None else encode_json(reply.value))

    async def _allow_control(self, answering: "_Answering", method: str, path: str, name: str, body: bytes) -> None:
        """Ask whether a request about subscriptions is allowed; those with a token of ours bring their permission."""
        if self._authorize is None:
            return
        what = name.partition("/")[2].partition("/")[0]
        if method == "POST" and what in {"callback", "ack", "release"}:
            return
        where = "/".join(path.split("/")[:3])
        await self._allow(answering, "claim" if what == "claim" else "subscribe", where)
        for action, stream in _control.streams_in(method, what, body, allow_local=self._webhooks == "local"):
            await self._allow(answering, action, stream)

    async def _put(self, answering: "_Answering", there: Streams, path: str) -> None:
        config = config_of(answering.headers, there.storage.time())
        asked = fork_of(answering.headers, answering.root)
        if asked is not None:
            if (why := _paths.why_refused(asked.source)) is not None:
                raise RefusedError(400, why)
            await self._allow(answering, "fork", asked.source)
        await self._allow(answering, "create", path)
        body = await answering.body()
        if body is None:
            return
        answer, stream = await there.create(path, config, body, asked)
        if stream is not None:
            state = stream.state
            location = (("location", answering.url(path)),) if answer.code == 201 else ()
            told = (*location, ("content-type", state.content_type), *_told(stream))
            answer = Answer(answer.code, (*answer.headers, *told))
        await answering.send(answer)

    async def _post(self, answering: "_Answering", there: Streams, path: str) -> None:
        await self._allow(answering, "append", path)
        if is_true(answering.headers, "stream-closed"):
            await self._allow(answering, "close", path)
        body = await answering.body()
        if body is not None:
            await answering.send(await there.append(path, append_of(answering.headers, body)))

    async def _head(self, answering: "_Answering", there: Streams, path: str) -> None:
        await self._allow(answering, "head", path)
        stream = await there.find(path)
        gone = _rules.absence(stream, there.storage.time())
        if gone is not None or stream is None:
            await answering.send(gone or Answer(404))
            return
        state = stream.state
        ttl = () if state.ttl is None else (("stream-ttl", str(state.ttl)),)
        expires = (("stream-expires-at", state.expires),) if state.expires else ()
        await answering.send(Answer(200, (("content-type", state.content_type), *_told(stream), *ttl, *expires)))

    async def _get(self, answering: "_Answering", there: Streams, path: str) -> None:
        reading = reading_of(answering.scope["query_string"])
        await self._allow(answering, "read", path)
        guess = int(reading.offset[:16]) if reading.offset[:16].isdigit() and len(reading.offset) > 16 else 0
        is_now = reading.offset == "now"
        stream, records = (await there.find(path), ()) if is_now else await there.find_with(path, guess)
        gone = _rules.absence(stream, there.storage.time())
        if gone is not None or stream is None:
            await answering.send(gone or Answer(404))
            return
        position = _position(stream, reading.offset)
        await there.renew(stream)
        if reading.live == "sse":
            with self._reader():
                await _SSE(answering, there, self, stream, position, reading).run(records)
            return
        if reading.live == "" or records or position < stream.tail:
            await answering.page(stream, position, records, reading, is_now=is_now)
        elif stream.state.is_closed:
            await answering.nothing(stream, None)
        else:
            with self._reader():
                await self._long_poll(answering, there, stream, position, reading)

    def _reader(self) -> "_Reader":
        if self._readers >= self._limits.max_readers:
            raise RefusedError(429, "there are as many live readers as there may be", headers=(("retry-after", "1"),))
        return _Reader(self)

    async def _long_poll(
        self, answering: "_Answering", there: Streams, stream: Stream, position: int, reading: Reading
    ) -> None:
        waited: list[Piece | Stream | None] = []
        async with anyio.create_task_group() as tasks:

            async def leave() -> None:
                await disconnected(answering.receive)
                tasks.cancel_scope.cancel()

            tasks.start_soon(leave)
            waited.append(await self._wait(there, stream, position))
            tasks.cancel_scope.cancel()
        if not waited:
            return  # the client is gone
        now = there.storage.time()
        match waited[0]:
            case Piece() as piece:
                await answering.page(piece.stream, position, piece.records, reading, is_now=False)
            case Stream() as newest:
                closed = newest.state.is_closed and newest.tail <= position
                await answering.nothing(newest, None if closed else cursor_after(reading.cursor, now))
            case None:
                await answering.send(_rules.absence(await there.find(stream.state.path), now) or Answer(404))

    async def _wait(self, there: Streams, stream: Stream, position: int) -> Piece | Stream | None:
        """Wait for what comes behind a position: give that, or the stream when nothing came in time; None: it is gone."""
        newest: Stream | None = stream
        with anyio.move_on_after(self._limits.long_poll.total_seconds()):
            async with there.log(stream.state.path).following() as live:
                while True:
                    changes, newest = live.changes, live.newest
                    if live.is_over or newest is None or newest.state.life != stream.state.life:
                        return newest if self._is_ending and newest is not None else None
                    if newest.tail > position:
                        return live.piece(position) or Piece(position, await there.read(newest, position), newest)
                    if newest.state.is_closed or self._is_ending:
                        return newest
                    await changes.wait()
        return newest


class _Reader:
    """Counts one live reader."""

    def __init__(self, app: DurableStreams) -> None:
        self._app = app

    def __enter__(self) -> None:
        self._app._readers += 1  # noqa: SLF001

    def __exit__(self, *exc_info: object) -> None:
        self._app._readers -= 1  # noqa: SLF001


def durable_streams(
    streams: StreamManager | str,
    *,
    authorize: Authorize | None = None,
    limits: DurableStreamsLimits | None = None,
    cors: str | None = "*",
    cache: Literal["public", "private"] = "private",
    public_url: str | None = None,
    subscriptions: Literal["off", "public", "local"] = "off",
) -> DurableStreams:
    """Give an ASGI app that serves streams by the Durable Streams protocol, over a manager's storage; mount it anywhere.

        app.mount("/v1/stream", durable_streams("sqlite:///streams.db", authorize=allow))

    Enter it, or have `lifespan` do so; entering it enters the manager, unless that is running already. Its streams are its own: the
    manager's are neither seen nor touched by it.

    Args:
        streams: the manager, or the URL that `StreamManager.connect` makes one of.
        authorize: says whether a request is allowed; see `Access`. None: all are. A stream's path is not a permission.
        limits: see `DurableStreamsLimits`.
        cors: whom browsers let read the answers (`Access-Control-Allow-Origin`), without cookies; None: only pages of this origin.
        cache: who may keep what was read: `public` only where everybody may read all streams.
        public_url: the URL of the root of all streams as clients know it; None: what the request says.
        subscriptions: `public`: workers may be woken by webhooks, which go to https and public addresses only, or by events in a stream.
            `local`: also by webhooks to http://localhost and http://127.0.0.x, for development. Extra: `streamkeep[durable-streams]`.
    """
    return DurableStreams(
        streams,
        authorize=authorize,
        limits=limits,
        cors=cors,
        cache=cache,
        public_url=public_url,
        subscriptions=subscriptions,
    )


def _told(stream: Stream) -> Headers:
    closed = (("stream-closed", "true"),) if stream.state.is_closed else ()
    return (("stream-next-offset", _rules.offset_of(stream.state, stream.tail)), *closed)


def _position(stream: Stream, offset: str) -> int:
    match offset:
        case "-1":
            return 0
        case "now":
            return stream.tail
        case _:
            position = _rules.position_of(stream.state, offset)
            if position is None and len(offset) == 33 and offset[:16].isdigit() and offset[16] == "_":
                raise RefusedError(410, "the offset is of another stream, such as one that was here before")
            if position is None or position > stream.tail:
                raise RefusedError(400, "the stream has no such offset")
            return position


class _Answering:
    """One request, and its answer."""

    def __init__(self, app: DurableStreams, scope: Scope, receive: Receive, send: Send) -> None:
        self.app = app
        self.scope = scope
        self.receive = receive
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

    def check_path(self, path: str) -> None:
        """Refuse what two parties may take for different streams. Raises RefusedError."""
        raw: bytes = self.scope.get("raw_path") or b""
        if b"%2f" in raw.lower():
            raise RefusedError(400, "a stream's path has no encoded slashes")

    def url(self, path: str) -> str:
        """Give the URL of a stream, as the client knows it."""
        return f"{self.base_url()}/{quote(path)}"

    def base_url(self) -> str:
        """Give the URL of the root of all streams, as the client knows it."""
        base = self.app._public_url  # noqa: SLF001
        if base is None:
            host = self.headers.get("host", "localhost")
            base = f"{self.scope.get('scheme', 'http')}://{host}{quote(self.root)}"
        return base

    async def body(self) -> bytes | None:
        """Give the request's body; None: the client has gone."""
        limits = self.app._limits  # noqa: SLF001
        return await read_body(self.scope, self.receive, max_bytes=limits.max_append_bytes, within=limits.body)

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
        cors = self.app._cors  # noqa: SLF001
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

    async def preflight(self) -> None:
        """Answer what a browser asks before it asks for something."""
        asked = (
            ("access-control-allow-methods", METHODS),
            ("access-control-allow-headers", _ALLOWED),
            ("access-control-max-age", "86400"),
        )
        await self.send(Answer(204, (("allow", METHODS), *(asked if self.app._cors is not None else ()))))  # noqa: SLF001

    async def refuse(self, error: Exception) -> None:
        """Answer with an error."""
        match error:
            case RefusedError():
                await self.send(Answer(error.code, error.headers, str(error)), name=error.name)
            case BodyRefusedError():
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
            now = self.app._there.storage.time() if self.app._there is not None else 0.0  # noqa: SLF001
            headers.append(("stream-cursor", cursor_after(reading.cursor, now)))
        cache = "no-store"
        if not is_now:
            etag = f'"{state.life}:{position}:{end}{":c" if is_over else ""}"'
            headers.append(("etag", etag))
            # What is empty, of an open stream, is so for no time.
            cache = f"{self.app._cache}, max-age=60, stale-while-revalidate=300" if records or is_over else "no-cache"  # noqa: SLF001
            if _is_among(etag, self.headers.get("if-none-match", "")):
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


class _SSE:
    """A response of server-sent events (5.8)."""

    def __init__(
        self, answering: _Answering, there: Streams, app: DurableStreams, stream: Stream, position: int, reading: Reading
    ) -> None:
        self._answering = answering
        self._there = there
        self._app = app
        self._stream = stream
        self._position = position
        self._reading = reading
        self._says = True  # its reader is to be told where it is
        self._ends_at = 0.0

    async def run(self, records: Sequence[bytes]) -> None:
        """Send what there is, and what comes, until the stream is closed, or it is time to end."""
        kind = self._stream.state.content_type
        encoding = [] if _messages.is_text(kind) else [("stream-sse-data-encoding", "base64")]
        await self._answering.start(
            200,
            [
                ("content-type", "text/event-stream"),
                ("cache-control", "no-cache, no-transform"),
                ("x-accel-buffering", "no"),
                *encoding,
            ],
        )
        self._ends_at = anyio.current_time() + self._app._limits.sse.total_seconds()  # noqa: SLF001
        with suppress(OSError):  # the client is gone (ASGI 2.4)
            async with anyio.create_task_group() as tasks:

                async def follow() -> None:
                    with suppress(OSError):
                        await self._follow(records)
                        await self._answering.write(b"", more=False)
                    tasks.cancel_scope.cancel()

                tasks.start_soon(follow)
                await disconnected(self._answering.receive)
                tasks.cancel_scope.cancel()

    async def _follow(self, records: Sequence[bytes]) -> None:
        if records:
            await self._give(Piece(self._position, records, self._stream), self._stream)
        async with self._there.log(self._stream.state.path).following() as live:
            while await self._go_on(live):
                pass

    async def _go_on(self, live: Live) -> bool:
        """Send what is new, or wait for it; False: nothing more is to be sent."""
        changes, newest = live.changes, live.newest
        if newest is None or newest.state.life != self._stream.state.life:
            return False
        if self._position < newest.tail:
            piece = live.piece(self._position)
            if piece is None:
                piece = Piece(self._position, await self._there.read(newest, self._position), newest)
            await self._give(piece, newest)
            return not (newest.state.is_closed and self._position >= newest.tail)
        if newest.state.is_closed:
            await self._say(newest)
            return False
        if self._says:
            await self._say(newest)
        rest = self._ends_at - anyio.current_time()
        if live.is_over or self._app._is_ending or rest <= 0:  # noqa: SLF001
            return False
        with anyio.move_on_after(min(rest, HEARTBEAT_SECONDS)) as wait:
            await changes.wait()
        if wait.cancelled_caught and rest > HEARTBEAT_SECONDS:
            await self._answering.write(b":\n\n")
        return True

    async def _give(self, piece: Piece, newest: Stream) -> None:
        state = piece.stream.state
        tail = max(newest.tail, piece.stream.tail)
        is_whole = piece.end >= tail
        is_over = is_whole and (newest.state.is_closed or state.is_closed)
        cursor = None if is_over else cursor_after(self._reading.cursor, self._there.storage.time())
        key = (cursor, is_whole, is_over)
        body = piece.made.get(key)
        if body is None:
            offset = _rules.offset_of(state, piece.end)
            control = _messages.control_event(offset, cursor, is_up_to_date=is_whole, is_closed=is_over)
            body = piece.made[key] = _messages.data_event(piece.records, state.content_type) + control
        await self._answering.write(body)
        self._position, self._says = piece.end, False

    async def _say(self, stream: Stream) -> None:
        is_over = stream.state.is_closed
        cursor = None if is_over else cursor_after(self._reading.cursor, self._there.storage.time())
        offset = _rules.offset_of(stream.state, self._position)
        await self._answering.write(_messages.control_event(offset, cursor, is_up_to_date=True, is_closed=is_over))
        self._says = False


def _code(error: Exception) -> int:
    code = getattr(error, "http_code", 500)
    return code if isinstance(code, int) else 500


def _is_among(etag: str, given: str) -> bool:
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
