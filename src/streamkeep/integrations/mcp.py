"""MCP's event store, so that a client that was cut off has each message of an answer once. For the official SDK, `mcp`.

The SDK has one store for all sessions, and names a stream by its request alone. So `StreamEventStore.around` looks at the requests on
their way to the SDK's app: they say which session it is. It also answers who comes back to a process that does not have the session.
"""

import hashlib
import json
import logging
import re
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing, suppress
from contextvars import ContextVar
from datetime import timedelta
from types import TracebackType
from typing import Final, Self, assert_never
from urllib.parse import quote, unquote

import anyio
from mcp.server.auth.middleware.bearer_auth import AuthenticatedUser, authorization_context
from mcp.server.streamable_http import (
    GET_STREAM_KEY,
    LAST_EVENT_ID_HEADER,
    MCP_SESSION_ID_HEADER,
    EventCallback,
    EventMessage,
    EventStore,
)
from mcp.types import (
    INTERNAL_ERROR,
    ErrorData,
    JSONRPCError,
    JSONRPCMessage,
    JSONRPCResponse,
    jsonrpc_message_adapter,
)
from sse_starlette import EventSourceResponse

from .._input import StreamInput
from .._manager import StreamManager
from ..errors import InvalidArgumentError, OffsetOutOfRangeError, StreamkeepError, StreamManagerClosedError, StreamNotFoundError
from ..events import ErrorInfo, StreamEvent, StreamEventType
from ..http.lifespan import Lifespan
from ..http.response import ASGIApp, Message, Receive, Scope, Send, headers_of

logger: Final = logging.getLogger("streamkeep")

EVENT_ID: Final = re.compile(r"([A-Za-z0-9_.~%-]+)/(0|[1-9][0-9]{0,14})")
MAX_REQUEST: Final = 256
"""How long a request's id may be for its answer to be kept."""

CLOSED: Final = ErrorInfo("CANCELLED", "the session has ended")
STOPPED: Final = ErrorInfo("ABORTED", "the server was stopped before it had answered")
NOT_STORED: Final = ErrorInfo("INTERNAL", "what came next could not be stored")
GONE: Final = ErrorInfo("NOT_FOUND", "the answer is not kept any more")


class StreamEventStore(EventStore):
    """An event store over a StreamManager, and what is around the SDK's app so that it knows the sessions.

        events = StreamEventStore("sqlite:///streams.db")
        app = events.around(server.streamable_http_app(event_store=events))

    Each request of a session is a stream, which ends with its response and is kept for the manager's `ttl` from then on. Who comes back
    with `Last-Event-ID` is given what it has missed and then what comes, by whichever process it reaches. Streams that
    have no response end with their session; those whose process was killed end with ABORTED, which a client is told as an error.

    The app's lifespan runs the store, and the manager unless that is running. Where an app has no lifespan, as one that is mounted: enter
    the store with `async with`.

    Args:
        streams: a manager, or its URL.
        idle: how long a session may be without a request before its streams end, when the next one begins. The SDK's own
            `session_idle_timeout`, unless that is given another value.
    """

    def __init__(self, streams: StreamManager | str, *, idle: timedelta = timedelta(minutes=30)) -> None:
        self._streams = StreamManager.connect(streams) if isinstance(streams, str) else streams
        self._idle_seconds = idle.total_seconds()
        self._sessions: dict[str, _Session] = {}
        self._ours = AsyncExitStack()

    @property
    def is_running(self) -> bool:
        """Whether its manager is running."""
        return self._streams.is_running

    async def __aenter__(self) -> Self:
        if not self._streams.is_running:
            await self._ours.enter_async_context(self._streams)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End all sessions' streams with ABORTED: no other process goes on with them."""
        async with self._ours:
            sessions = list(self._sessions.values())
            self._sessions.clear()
            for session in sessions:
                await session.end(STOPPED)

    async def store_event(self, stream_id: str, message: JSONRPCMessage | None) -> str:
        """Store a message, or None for a priming event; give its id, once it is as durable as the storage promises.

        The id is empty, and the message is sent without one, if it cannot be stored: the SDK would end the whole session by what is raised
        here. Who comes back then is told so. RuntimeError: `around` is not around the app.
        """
        return await _here().store(stream_id, message)

    async def replay_events_after(self, last_event_id: str, send_callback: EventCallback) -> str | None:
        """Give the messages of a stream of this session that come after an event, those that are stored and then live, to the response.

        It names no stream to the SDK, which would go on with it by itself, and lose what was stored meanwhile. An id that names nothing
        which is kept for this session is answered with an error in place of the response.
        """
        async with aclosing(self._messages(_here(), last_event_id)) as messages:
            async for message in messages:
                await send_callback(message)
        return None

    def around(self, app: ASGIApp) -> ASGIApp:
        """Give the SDK's app, with its sessions known, with who comes back to another process answered, and with its lifespan ours."""

        async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
            match scope["type"]:
                case "lifespan":
                    await Lifespan(app, self).run(scope, receive, send)
                case "http":
                    await self._answer(app, scope, receive, send)
                case _:
                    await app(scope, receive, send)

        return wrapped

    async def _answer(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        headers = headers_of(scope)
        name = headers.get(MCP_SESSION_ID_HEADER, "")
        session = self._sessions.get(name) or _Session(self._streams, scope, name)
        exchange = _Exchange(self, session, scope, send)
        last_event_id = headers.get(LAST_EVENT_ID_HEADER) if scope["method"] == "GET" and name else None
        token = _current.set(session)
        session.requests += 1
        try:
            await app(scope, receive, exchange.send if last_event_id is None else exchange.send_or_hold)
        finally:
            _current.reset(token)
            session.requests -= 1
            session.used_at = anyio.current_time()
        if exchange.held and last_event_id is not None:
            if await self._has_more(session, last_event_id):
                await self._replay(session, last_event_id, scope, receive, send)
            else:
                for message in exchange.held:
                    await send(message)

    async def begin(self, session: "_Session", name: str) -> None:
        """Note a session that has a name now, and end those that have been idle for too long."""
        await session.begin(name)
        self._sessions[name] = session
        now = anyio.current_time()
        idle = [each for each in self._sessions.values() if not each.requests and now - each.used_at > self._idle_seconds]
        for each in idle:
            await self.forget(each)

    async def forget(self, session: "_Session") -> None:
        """End a session's streams, if it is known here."""
        if self._sessions.pop(session.name, None) is not None:
            await session.end(CLOSED)

    async def _has_more(self, session: "_Session", last_event_id: str) -> bool:
        try:
            stream, after, _ = session.place(last_event_id)
            info = await self._streams.info(stream)
        except (InvalidArgumentError, StreamNotFoundError):
            return False
        return after < info.tail and (info.status == "open" or after < info.tail - 1)

    async def _replay(self, session: "_Session", last_event_id: str, scope: Scope, receive: Receive, send: Send) -> None:
        async def frames() -> AsyncGenerator[dict[str, str]]:
            async with aclosing(self._messages(session, last_event_id)) as messages:
                async for message in messages:
                    data = message.message.model_dump_json(by_alias=True, exclude_unset=True)
                    yield {"event": "message", "data": data, "id": message.event_id or ""}

        headers = {"cache-control": "no-cache, no-transform", MCP_SESSION_ID_HEADER: session.name}
        await EventSourceResponse(frames(), headers=headers)(scope, receive, send)

    async def _messages(self, session: "_Session", last_event_id: str) -> AsyncGenerator[EventMessage]:
        try:
            stream, after, request = session.place(last_event_id)
        except InvalidArgumentError:
            return
        try:
            async with self._streams.subscribe(stream, after) as events:
                async for event in events:
                    message = _message_of(event, request)
                    if message is not None:
                        yield EventMessage(message, _event_id(request, event.offset))
        except (StreamNotFoundError, OffsetOutOfRangeError):
            if request != GET_STREAM_KEY:
                yield EventMessage(_error_of(GONE, request), last_event_id)


class _Session:
    """A session, as far as it is known: the streams of its requests that have no response yet, by their ids."""

    def __init__(self, streams: StreamManager, scope: Scope, name: str) -> None:
        self.name = name
        self.requests = 0
        self.used_at = anyio.current_time()
        self._streams = streams
        self._scope = scope
        self._lock = anyio.Lock()
        self._writers: dict[str, StreamInput | None] = {}
        """None: what comes for it is not stored any more."""
        self._early: list[tuple[str, JSONRPCMessage | None]] = []
        self._is_over = name != ""  # one that did not begin here

    def place(self, event_id: str) -> tuple[str, int, str]:
        """Give the stream that an event's id names in this session, its offset, and the request. InvalidArgumentError: it names none."""
        if not (found := EVENT_ID.fullmatch(event_id)):
            raise InvalidArgumentError("not an event's id")
        request = unquote(found[1])
        return self._stream(request), int(found[2]), request

    async def store(self, request: str, message: JSONRPCMessage | None) -> str:
        """See `store_event`."""
        async with self._lock:
            if not 0 < len(request) <= MAX_REQUEST or self._is_over:
                return ""
            if self.name:
                return await self._store(request, message)
            self._early.append((request, message))
            return _event_id(request, sum(early == request for early, _ in self._early) - 1)

    async def begin(self, name: str) -> None:
        """Give it its name, and store what came before that."""
        async with self._lock:
            self.name = name
            early, self._early = self._early, []
            for request, message in early:
                await self._store(request, message)

    async def end(self, error: ErrorInfo) -> None:
        """End its streams, which have no response."""
        async with self._lock:
            self._is_over = True
            writers, self._writers = self._writers, {}
            for writer in writers.values():
                await _end(writer, error)

    async def _store(self, request: str, message: JSONRPCMessage | None) -> str:
        is_last = request != GET_STREAM_KEY and isinstance(message, JSONRPCResponse | JSONRPCError)
        writer: StreamInput | None = None
        try:
            writer = self._writers[request] if request in self._writers else await self._open(request)
            self._writers[request] = writer
            if writer is None:
                return ""
            offset = writer.tail
            if is_last:
                await writer.done(message)
            else:
                await writer.write(message)
        except StreamManagerClosedError:
            return ""
        except StreamkeepError:
            logger.exception("a message of MCP's could not be stored; it is sent without an id")
            self._writers[request] = None
            await _end(writer, NOT_STORED)
            return ""
        finally:
            if is_last:
                self._writers.pop(request, None)
        return _event_id(request, offset)

    async def _open(self, request: str) -> StreamInput:
        stream = self._stream(request)
        with suppress(StreamNotFoundError):
            await self._streams.info(stream)
            await self._streams.delete(
                stream
            )  # an id that is used twice in a session; its first answer is not asked for any more
        return await self._streams.open(stream, metadata={"protocol": "mcp"}, encode=_json_of)

    def _stream(self, request: str) -> str:
        """Give the id of a request's stream, which nobody finds without the session's name and its user's token."""
        user = self._scope.get("user")
        owner = dict(authorization_context(user)) if isinstance(user, AuthenticatedUser) else None
        return "mcp~" + hashlib.sha256(json.dumps([owner, self.name, request], sort_keys=True).encode()).hexdigest()


class _Exchange:
    """One request: what its answer says of its session, before that is passed on."""

    def __init__(self, store: StreamEventStore, session: _Session, scope: Scope, send: Send) -> None:
        self.held: list[Message] = []
        self._store = store
        self._session = session
        self._method = scope["method"]
        self._send = send

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            status, headers = message["status"], _headers_of_answer(message)
            if not self._session.name and status < 400 and (name := headers.get(MCP_SESSION_ID_HEADER)):
                await self._store.begin(self._session, name)
            elif _is_unknown(status, headers) or (self._method == "DELETE" and status < 300):
                await self._store.forget(self._session)
        await self._send(message)

    async def send_or_hold(self, message: Message) -> None:
        """Do so, but hold back that the session is not known here."""
        if self.held or (
            message["type"] == "http.response.start" and _is_unknown(message["status"], _headers_of_answer(message))
        ):
            self.held.append(message)
        else:
            await self.send(message)


_current: Final[ContextVar[_Session | None]] = ContextVar("streamkeep.mcp", default=None)


def _here() -> _Session:
    """Give the session of what runs here; the SDK's tasks for a session have the context of the request that has begun it."""
    session = _current.get()
    if session is None:
        raise RuntimeError("StreamEventStore does not know the session: serve `events.around(app)` in place of `app`")
    return session


def _is_unknown(status: int, headers: dict[str, str]) -> bool:
    """Say whether the SDK does not know a session. What is not found for other reasons is no JSON."""
    return status == 404 and headers.get("content-type", "").startswith("application/json")


def _headers_of_answer(start: Message) -> dict[str, str]:
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in start.get("headers", ())}


def _event_id(request: str, offset: int) -> str:
    return f"{quote(request, safe='', errors='surrogatepass')}/{offset}"


def _json_of(message: object) -> bytes:
    """Give a message as the SDK sends it."""
    if message is None:
        return b"null"
    assert isinstance(message, JSONRPCMessage)
    return message.model_dump_json(by_alias=True, exclude_unset=True).encode()


def _message_of(event: StreamEvent[object], request: str) -> JSONRPCMessage | None:
    """Give what a client is told by an event; None: nothing."""
    match event.type:
        case StreamEventType.CHUNK | StreamEventType.DONE:
            return None if event.data == b"null" else jsonrpc_message_adapter.validate_json(event.data, by_name=False)
        case StreamEventType.ERROR:
            return None if request == GET_STREAM_KEY else _error_of(event.error, request)
        case _:
            assert_never(event.type)


def _error_of(error: ErrorInfo, request: str) -> JSONRPCError:
    """Give an error in place of a response. The SDK names streams by text, whatever a request's id was."""
    id_ = int(request) if re.fullmatch(r"0|-?[1-9][0-9]{0,15}", request) else request
    return JSONRPCError(jsonrpc="2.0", id=id_, error=ErrorData(code=INTERNAL_ERROR, message=f"{error.status}: {error.message}"))


async def _end(writer: StreamInput | None, error: ErrorInfo) -> None:
    """End a stream, if that can be stored."""
    if writer is not None and not writer.is_closed:
        with suppress(StreamkeepError):
            await writer.error(error)
