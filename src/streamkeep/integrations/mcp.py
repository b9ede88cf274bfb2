"""MCP's event store, so that a client that was cut off has each message of an answer once. For the official SDK, `mcp`.

The SDK has one store for all sessions, and names a stream by its request alone. So `StreamEventStore.around` looks at the requests on
their way to the SDK's app: they say which session it is, and whose. It also answers who comes back to a process that does not have the
session.
"""

import json
import re
from collections.abc import AsyncGenerator, Iterable
from contextlib import AsyncExitStack, aclosing
from contextvars import ContextVar
from datetime import timedelta
from functools import partial
from types import TracebackType
from typing import Final, Self, assert_never

import anyio

from .._durations import check_durations
from .._extras import needed_by

with needed_by(__name__, "mcp"):
    from mcp.server.auth.middleware.auth_context import auth_context_var
    from mcp.server.auth.middleware.bearer_auth import AuthenticatedUser, authorization_context

from mcp.server.streamable_http import (
    LAST_EVENT_ID_HEADER,
    MCP_SESSION_ID_HEADER,
    EventCallback,
    EventMessage,
    EventStore,
)
from mcp.types import INTERNAL_ERROR, INVALID_REQUEST, ErrorData, JSONRPCError, JSONRPCMessage, jsonrpc_message_adapter
from sse_starlette import EventSourceResponse

from .._background import Background
from .._manager import StreamManager
from ..errors import InvalidArgumentError, OffsetOutOfRangeError, StreamNotFoundError
from ..events import ErrorInfo, StreamEvent, StreamEventType
from ..http.lifespan import Lifespan
from ..http.response import ASGIApp, Message, Receive, Scope, Send, headers_of
from ._mcp_session import Owner, Place, Session, place_of, stream_of

__all__ = ["StreamEventStore"]

CLOSED: Final = ErrorInfo("CANCELLED", "the session has ended")
STOPPED: Final = ErrorInfo("ABORTED", "the server was stopped before it had answered")
GONE: Final = ErrorInfo("NOT_FOUND", "the answer is not kept any more")

MOST_SWEEP_SECONDS: Final = 5.0
LEAST_SWEEP_SECONDS: Final = 0.05
END_SECONDS: Final = 10.0
"""How long the ends of all streams may take to be stored when the store is left."""
ENDED_AT_ONCE: Final = 64


class StreamEventStore(EventStore):
    """An event store over a StreamManager, and what is around the SDK's app so that it knows the sessions.

        events = StreamEventStore("sqlite:///streams.db")
        app = events.around(server.streamable_http_app(event_store=events))

    Each request of a session is a stream, which ends with its response and is kept for the manager's `ttl` from then on. Who comes back
    with `Last-Event-ID` is given what it has missed and then what comes, by whichever process it reaches. Streams that
    have no response end with their session; those whose process was killed end with ABORTED, which a client is told as an error.

    The app's lifespan runs the store, and the manager unless that is running. Where an app has no lifespan, as one that is mounted: enter
    the store with `async with`, behind the SDK's `session_manager.run()`, so that it is left before that ends the tools. Leaving it waits
    for the tools that run, at most `drain`; then it ends all streams.

    Args:
        streams: a manager, or its URL.
        idle: how long a session may be without a request before its streams end, within five seconds. The SDK's own
            `session_idle_timeout`, unless that is given another value.
        drain: how long to wait for responses when the store is left.
    """

    def __init__(
        self,
        streams: StreamManager | str,
        *,
        idle: timedelta = timedelta(minutes=30),
        drain: timedelta = timedelta(seconds=10),
    ) -> None:
        check_durations(idle=idle, drain=drain)
        self._streams = StreamManager.connect(streams) if isinstance(streams, str) else streams
        self._idle_seconds = idle.total_seconds()
        self._drain_seconds = drain.total_seconds()
        self._sessions: dict[str, Session] = {}  # those that were used last at the end
        self._tasks = Background()
        self._is_running = False
        self._ours = AsyncExitStack()

    @property
    def is_running(self) -> bool:
        """Whether it has been entered."""
        return self._is_running

    async def __aenter__(self) -> Self:
        if not self._streams.is_running:
            await self._ours.enter_async_context(self._streams)
        self._is_running = True
        self._tasks.begin()
        self._tasks.start(self._sweep, "ending idle sessions of MCP's")
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Wait for the responses of requests, then end all sessions' streams with ABORTED: no other process goes on with them."""
        async with self._ours:
            try:
                with anyio.move_on_after(self._drain_seconds):
                    for session in list(self._sessions.values()):
                        await session.answered()
            finally:
                self._is_running = False
                self._tasks.stop()
                with anyio.move_on_after(END_SECONDS, shield=True):
                    await self._tasks.wait()
                    sessions = list(self._sessions.values())
                    self._sessions.clear()
                    await _end_all(sessions, STOPPED)

    async def store_event(self, stream_id: str, message: JSONRPCMessage | None) -> str:
        """Store a message, or None for a priming event; give its id, once it is as durable as the storage promises.

        Where the storage takes long, or fails for a while, messages have their ids before they are stored, but for the response. They are
        stored in order, and soon. If the process is killed before that, who comes back with such an id is told ABORTED in place of the
        response.

        The id is empty, and the message is sent without one, if it cannot be stored: the SDK would end the whole session by what is raised
        here. Who comes back then is told so. RuntimeError: `around` is not around the app.
        """
        session = _here().session
        return "" if session is None else await session.store(stream_id, message)

    async def replay_events_after(self, last_event_id: str, send_callback: EventCallback) -> str | None:
        """Give the messages of a stream of this session that come after an event, those that are stored and then live, to the response.

        It names no stream to the SDK, which would go on with it by itself, and lose what was stored meanwhile. An id that names nothing
        which is kept for this session, and for who asks, is answered with an error in place of the response.
        """
        here = _here()
        async with aclosing(self._messages(here.owner, here.name, last_event_id)) as messages:
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
        exchange = _Exchange(self._streams, self._sessions, scope)
        token = _current.set(exchange)
        try:
            await app(scope, receive, partial(exchange.pass_on, send))
        finally:
            _current.reset(token)
            exchange.end()
        if exchange.is_over and (session := exchange.session) is not None:
            del self._sessions[session.name]
            await session.end(CLOSED)
        if exchange.held:
            last_event_id = exchange.last_event_id
            if exchange.is_unknown and last_event_id and await self._has_more(exchange.owner, exchange.name, last_event_id):
                await self._replay(exchange, last_event_id, receive, send)
            else:
                for message in exchange.held:
                    await send(message)

    async def _sweep(self) -> None:
        """End the sessions that have been idle for too long, again and again."""
        pause = max(LEAST_SWEEP_SECONDS, min(self._idle_seconds / 10, MOST_SWEEP_SECONDS))
        while True:
            await anyio.sleep(pause)
            since = anyio.current_time() - self._idle_seconds
            idle: list[Session] = []
            for session in self._sessions.values():
                if session.used_at > since:
                    break
                if not session.requests:
                    idle.append(session)
            for session in idle:
                del self._sessions[session.name]
            await _end_all(idle, CLOSED)

    async def _has_more(self, owner: Owner | None, session: str, last_event_id: str) -> bool:
        """Say whether who comes back can be given anything."""
        try:
            place = place_of(last_event_id)
            info = await self._streams.info(stream_of(owner, session, place))
            while place.is_get and info.status != "open" and place.after >= info.tail - 2:
                place = place.next
                info = await self._streams.info(stream_of(owner, session, place))
        except (InvalidArgumentError, StreamNotFoundError):
            return False
        return place.is_get or info.status != "done" or place.after < info.tail - 1

    async def _replay(self, exchange: "_Exchange", last_event_id: str, receive: Receive, send: Send) -> None:
        async def frames() -> AsyncGenerator[dict[str, str]]:
            async with aclosing(self._messages(exchange.owner, exchange.name, last_event_id)) as messages:
                async for message in messages:
                    data = message.message.model_dump_json(by_alias=True, exclude_unset=True)
                    yield {"event": "message", "data": data, "id": message.event_id or ""}

        headers = {"cache-control": "no-cache, no-transform", MCP_SESSION_ID_HEADER: exchange.name}
        await EventSourceResponse(frames(), headers=headers)(exchange.scope, receive, send)

    async def _messages(self, owner: Owner | None, session: str, last_event_id: str) -> AsyncGenerator[EventMessage]:
        try:
            place = place_of(last_event_id)
        except InvalidArgumentError:
            return
        try:
            while True:
                async with aclosing(self._of_one(stream_of(owner, session, place), place)) as messages:
                    async for message in messages:
                        yield message
                if not place.is_get:
                    return
                place = place.next
        except (StreamNotFoundError, OffsetOutOfRangeError):
            if not place.is_get:
                yield EventMessage(_error_of(GONE, place.request), last_event_id)

    async def _of_one(self, stream: str, place: Place) -> AsyncGenerator[EventMessage]:
        """Give the messages of one stream that come after a place; at least how it ends.

        An id may be further than what is stored: it is about to be, or its process was killed before.
        """
        after = min(place.after, (await self._streams.info(stream)).tail - 2)
        async with self._streams.subscribe(stream, after if after >= 0 else None) as events:
            async for event in events:
                if event.type is StreamEventType.DONE and event.offset < place.after:
                    raise OffsetOutOfRangeError("the stream has ended before")
                if event.type is StreamEventType.ERROR or event.offset > place.after:
                    message = _message_of(event, place)
                    if message is not None:
                        yield EventMessage(message, place.id_of(event.offset))


class _Exchange:
    """One request: which session it is of, and whose; and what its answer says of that, before it is passed on.

    Attributes:
        scope: the request's.
        name: the session that it names; empty if none.
        last_event_id: what it comes back with; empty if it does not.
        held: an answer that may say that its session is not known; it has not been passed on.
        is_over: whether the session has ended, for who asks and where it was begun.
    """

    def __init__(self, streams: StreamManager, sessions: dict[str, Session], scope: Scope) -> None:
        headers = headers_of(scope)
        self.scope = scope
        self.name = headers.get(MCP_SESSION_ID_HEADER, "")
        self.last_event_id = headers.get(LAST_EVENT_ID_HEADER, "") if scope["method"] == "GET" else ""
        self.held: list[Message] = []
        self.is_over = False
        self._path = f"{scope.get('root_path', '')} {scope['path']}"
        self._sessions = sessions
        self._owner: Owner | None = None
        self._new = None if self.name else Session(streams)
        self._in_use = sessions.get(self.name)
        if self._in_use is not None:
            self._in_use.requests += 1

    @property
    def owner(self) -> Owner | None:
        """Whose token it has, as far as that is known by now: the SDK looks at it inside its app."""
        user = self.scope.get("user")
        if not isinstance(user, AuthenticatedUser):
            user = auth_context_var.get()  # where something between us and the SDK has copied the scope
        if isinstance(user, AuthenticatedUser):
            self._owner = authorization_context(user)
        return self._owner

    @property
    def session(self) -> Session | None:
        """Its session, if that is known here, and is of the same user: the id alone gives nobody anything."""
        owner = self.owner  # also of a new one's: it is known here, and may not be where the answer is passed on
        if self._new is not None:
            return self._new
        session = self._sessions.get(self.name)
        return session if session is not None and session.owner == owner else None

    @property
    def is_unknown(self) -> bool:
        """Whether what is held is the SDK's, and says that it does not have the session, or has it for somebody else."""
        body = b"".join(message.get("body", b"") for message in self.held)
        try:
            answer = json.loads(body)
        except ValueError:
            return False
        match answer:
            case {"jsonrpc": "2.0", "id": None, "error": {"code": code}}:
                return bool(code == INVALID_REQUEST)
            case _:
                return False

    async def pass_on(self, send: Send, message: Message) -> None:
        """Pass a message on, when it is known what it says of the session; an answer that may say it is not known is held."""
        if message["type"] == "http.response.start":
            status, headers = message["status"], _headers_of_answer(message)
            owner = self.owner
            if self.name and status == 404 and headers.get("content-type", "").startswith("application/json"):
                self.held.append(message)
                return
            named = headers.get(MCP_SESSION_ID_HEADER, "")
            if self._new is not None and named and status < 400 and named not in self._sessions:
                await self._new.begin(named, owner, self._path)
                self._sessions[named] = self._in_use = self._new
                self._in_use.requests += 1
            self.is_over = self.scope["method"] == "DELETE" and status < 300 and named == self.name and self._is_where_it_began
        elif self.held:
            self.held.append(message)
            return
        await send(message)

    def end(self) -> None:
        """Note that it has been answered."""
        self.is_over = self.is_over or (bool(self.held) and self.is_unknown and self._is_where_it_began)
        session = self._in_use
        if session is None:
            return
        session.requests -= 1
        if self.session is session and self._sessions.get(session.name) is session:
            session.used_at = anyio.current_time()
            self._sessions[session.name] = self._sessions.pop(session.name)

    @property
    def _is_where_it_began(self) -> bool:
        session = self.session
        return self._new is None and session is not None and session.path == self._path


_current: Final[ContextVar[_Exchange | None]] = ContextVar("streamkeep.mcp", default=None)


def _here() -> _Exchange:
    """Give the request that runs here; the SDK's tasks for a session have the context of the one that has begun it."""
    exchange = _current.get()
    if exchange is None:
        raise RuntimeError("StreamEventStore does not know the session: serve `events.around(app)` in place of `app`")
    return exchange


async def _end_all(sessions: Iterable[Session], error: ErrorInfo) -> None:
    limit = anyio.Semaphore(ENDED_AT_ONCE)

    async def end(session: Session) -> None:
        async with limit:
            await session.end(error)

    async with anyio.create_task_group() as tasks:
        for session in sessions:
            tasks.start_soon(end, session)


def _headers_of_answer(start: Message) -> dict[str, str]:
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in start.get("headers", ())}


def _message_of(event: StreamEvent[object], place: Place) -> JSONRPCMessage | None:
    """Give what a client is told by an event; None: nothing."""
    match event.type:
        case StreamEventType.CHUNK | StreamEventType.DONE:
            return None if event.data == b"null" else jsonrpc_message_adapter.validate_json(event.data, by_name=False)
        case StreamEventType.RECOVERING | StreamEventType.RESTARTED:
            return None
        case StreamEventType.ERROR:
            return None if place.is_get else _error_of(event.error, place.request)
        case _:
            assert_never(event.type)


def _error_of(error: ErrorInfo, request: str) -> JSONRPCError:
    """Give an error in place of a response. The SDK names streams by text, whatever a request's id was."""
    id_ = int(request) if re.fullmatch(r"0|-?[1-9][0-9]{0,15}", request) else request
    return JSONRPCError(jsonrpc="2.0", id=id_, error=ErrorData(code=INTERNAL_ERROR, message=f"{error.status}: {error.message}"))
