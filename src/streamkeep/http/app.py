"""StreamsHTTP: a manager's streams on the web, as plain ASGI that any framework can mount or call.

By GET it is an app of its own, for `EventSource`, curl and the like. By POST it is Genkit's exchange around a piece of
`Work`, for the integrations: start or resume, then follow.
"""

import logging
import re
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Final, Literal, NotRequired, Protocol, Self, TypedDict, Unpack, cast, get_args

import anyio
import msgspec
from anyio.lowlevel import checkpoint

from .._background import not_ours
from .._durations import check_durations
from .._encoding import Encode
from .._info import StreamInfo, StreamStatus
from .._input import StreamInput
from .._manager import StreamManager
from .._recovery import Recovery
from ..errors import (
    InvalidArgumentError,
    KeyInUseError,
    OffsetOutOfRangeError,
    StorageError,
    StreamkeepError,
    StreamNotFoundError,
)
from ..events import encode_json
from ..wire import GenkitRequest, parse_body, wants_stream
from .access import REQUEST, Access, Action, Authorize, check_owner, check_route, name_of, owner_of, owner_text
from .bounds import Bounds
from .ended import OnEnd
from .framing import Framing, GenkitFraming, PassThroughFraming, SSEFraming, check_framing, result_body
from .kept import ANSWER, ENDPOINTS_OWN, kept_framing
from .place import (
    OFFSET_HEADER,
    START,
    Place,
    again,
    check_life,
    cursor_in,
    in_life,
    is_all_seen,
    place_of,
    query_of,
    reading_of,
    run_of,
    stream_named_in,
)
from .pulse import Pulse
from .recovery import Recoverable, RecoverableCall, Register, Terms, check_new, registering
from .response import (
    OWN_ANSWER,
    STREAM_ID_HEADER,
    ASGIApp,
    Receive,
    RequestRefusedError,
    Scope,
    Send,
    Timeouts,
    can_be_cut,
    disconnected,
    errors_answered,
    headers_of,
    read_body,
    send_events,
    send_head,
    send_only_head,
    send_response,
    shown_error,
)
from .runner import MAX_PRODUCERS, ChunkWriter, OpenOptions, Producer, Runner
from .shutdown import shutdown_of
from .sources import AS_IT_IS, Setting, Source, close, events_of, producer_of
from .tokens import TokenKeys, TokenUse, check_expiry, check_use, discreet, expiry, token_of, tokens_in
from .ui_messages import EXPOSED, UIMessagesFraming, start_index

if TYPE_CHECKING:
    from starlette.requests import Request

    from .starlette import ASGIResponse

logger: Final = logging.getLogger("streamkeep")

MAX_BODY_BYTES: Final = 4 << 20
MAX_SKIPPED_BYTES: Final = 32 << 20
"""The longest body of a request that resumes a stream: it is what the request was that started it, which the app has read itself."""
MAX_STARTS: Final = 5
"""How often a start is tried that finds something under its key, and then finds it gone."""
LISTED: Final = 100
MAX_LISTED: Final = 1_000
DETACHED: Final = "detached"
"""The name in a stream's metadata under which it is kept what answered the request that began it, where that was answered at once."""
WhenRunning = Literal["join", "replace", "refuse"]
PASSES_EVENTS: Final = "streamkeep.events"
"""The name in a stream's metadata that says that its chunks are server-sent events, for who goes on with it."""
STOP_SECONDS: Final = 1.0
"""How long work without a stream may go on when its client has gone and it was told to stop."""
ABANDON_SECONDS: Final = 10.0
"""How long it may take to stop work that has begun, where there can be no stream."""
_ALLOWED: Final = {None: "GET, HEAD, DELETE", "/info": "GET, HEAD", "/cancel": "POST"}
_READ_PATH: Final = re.compile(r"/(?P<stream>[^/]+)(?P<sub>/info|/cancel)?")


@dataclass(frozen=True, slots=True)
class Output:
    """What work comes to.

    Attributes:
        value: the output.
        headers: what an answer says that is the output alone.
        about: the stream that the output tells of, if its owner alone may know it.
    """

    value: object
    headers: Sequence[tuple[str, str]] = ()
    about: str | None = None


@dataclass(frozen=True, slots=True)
class Detached:
    """Work that begins when its stream is open, and is answered then.

    Attributes:
        answer: what answers the request.
        stream: the id of the stream.
        produce: begins it, writes what it gives, and gives its output.
        begun: returns when it has begun, with what came to `answer`; raises what has kept it from beginning.
        abandon: gives it up, where there can be no stream.
    """

    answer: object
    stream: str
    produce: Producer
    begun: Callable[[], Awaitable[Output]]
    abandon: Callable[[], Awaitable[None]]


Admits = Callable[[str], Awaitable[bool]]
"""Says whether who has sent a request may know of a stream: it is theirs, or there is none of this id."""


class Work(Protocol):
    """What a POST sets off."""

    def check(self, request: GenkitRequest) -> None:
        """Raise InvalidArgumentError if the request is not one for this work; nothing has been started yet."""

    def detaches(self, request: GenkitRequest) -> bool:
        """Say whether the request is to be answered as soon as the work has begun."""
        ...

    async def run(
        self,
        request: GenkitRequest,
        context: Mapping[str, Any],
        admits: Admits,
        send_chunk: Callable[[object], object],
        stop: anyio.Event,
    ) -> Output:
        """Do it. `stop` is set when nobody wants it any more; a little later it is cancelled."""
        ...

    async def detach(self, request: GenkitRequest, context: Mapping[str, Any], admits: Admits) -> Detached | Output:
        """Prepare it, where the request detaches; or give what answers the request where it cannot begin."""
        ...


class Call(Protocol):
    """What a POST sets off that never streams.

    Attributes:
        action: what `authorize` is asked.
    """

    action: Action

    def about(self, request: GenkitRequest) -> str | None:
        """Give the stream that the request names, whether there is one or not. InvalidArgumentError: it is no request for this."""

    async def run(self, request: GenkitRequest, context: Mapping[str, Any], streams: StreamManager) -> Output:
        """Do it."""
        ...

    def not_found(self, request: GenkitRequest) -> Output:
        """Give what answers a request about what does not exist; or raise it."""
        ...


Provide = Callable[[object], Awaitable[Mapping[str, Any]]]
"""Gives more of a context, by the input of a request (None: it has none, as to resume or to stop); it rejects by raising."""


class StartOptions(TypedDict, total=False):
    """What `respond` may be told of a stream, and of how it is shown."""

    id: object
    key: object
    run: object
    when_running: WhenRunning
    owner: object
    metadata: Mapping[str, str] | None
    ttl: timedelta | None
    bounds: Bounds | None
    on_end: OnEnd | None
    encode: Encode | None
    context: Mapping[str, Any] | None
    framing: Framing | None


class StopOptions(TypedDict, total=False):
    """What `cancel` may be told of a stream, beside its id."""

    key: object
    run: object
    owner: object
    context: Mapping[str, Any] | None


class FollowOptions(StopOptions, total=False):
    """What `follow` may be told of a stream, beside its id."""

    framing: Framing | None


class TokenOptions(TypedDict):
    """What `token` is told, beside a stream's id."""

    can: TokenUse
    expires_in: timedelta
    owner: NotRequired[object]
    holder: NotRequired[object]


@dataclass(frozen=True, slots=True)
class Answer:
    """What answers a request, as an ASGI app.

    Attributes:
        app: sends it.
        stream: the id of the stream that it shows; None if it shows none.
        started: whether this very request has started that stream.
    """

    app: ASGIApp
    stream: str | None = None
    started: bool = False


class StreamsHTTP:
    """Serves a manager's streams; an async context manager, and an ASGI app for reading.

    As an app, mounted anywhere (ids are those of `StreamManager.open`):

        GET    /             the streams of who is asking, if `authorize` says who, as JSON: `?key=` (a prefix), `?status=`, `?limit=`, and
                             `?after=` with the `next` of the page before
        GET    /{id}         the events as native SSE; `Last-Event-ID` or `?after=` to go on, 204 when there is nothing left
        GET    /{id}/info    what is known of the stream, as JSON
        DELETE /{id}         stop it; POST /{id}/cancel is the same

    Entering it enters the manager too, unless that is running already, and leaving it drains the producers it has started. It may be
    entered again when it has been left, as tests of an app do. As a lifespan: `FastAPI(lifespan=streams_http.lifespan)`.

    Args:
        streams: the manager, or the URL that `StreamManager.connect` makes one of.
        authorize: asked before every start, read, resume and stop, unless a token allows it; see `Authorize`.
        route: read only streams that were started through this route (a request path); None: those of all routes.
        timeouts: heartbeat and time bounds of requests and responses.
        drain: how long producers may go on when this is left.
        drain_on_signal: begin to drain when the process gets SIGTERM or SIGINT. Servers leave this only when the last response has
            ended, which may be never. The server's own handling of the signals goes on as it would.
        max_body_bytes: the longest request body that is read here; a longer one is answered 413. Inside a `DurableStreaming` over it the
            app reads its own, and this is for requests that resume a stream.
        max_producers: how many streams may be produced here at a time; who wants to start one more is answered 429. A producer that goes
            on although its stream has ended (a thread cannot be cancelled) is counted until it ends.
        bounds: how long each run may go on; see `Bounds`.
        on_end: told once how each run has ended: a function, or a coroutine function, of an `Ended`. It is called when the end is stored,
            in the context of the producer, also after a stop, a failure and a shutdown; not when the process is killed.
        token_keys: secrets of at least 32 random bytes, for `token`: the first one signs, all are believed, so that keys can be changed.
            All processes of an app need the same. Without any, tokens mean nothing here.
    """

    _path_routing: Final = True
    """For Channels' `URLRouter`: a `path()` to this is where it is mounted, and not all of a URL."""

    def __init__(
        self,
        streams: StreamManager | str,
        *,
        authorize: Authorize | None = None,
        route: str | None = None,
        timeouts: Timeouts | None = None,
        drain: timedelta = timedelta(seconds=10),
        drain_on_signal: bool = True,
        max_body_bytes: int = MAX_BODY_BYTES,
        max_producers: int = MAX_PRODUCERS,
        bounds: Bounds | None = None,
        on_end: OnEnd | None = None,
        token_keys: Sequence[str | bytes] = (),
    ) -> None:
        check_durations(drain=drain)
        self._token_keys = TokenKeys(token_keys)
        self.streams = StreamManager.connect(streams) if isinstance(streams, str) else streams
        self._authorize = authorize
        self._route = route
        self._timeouts = timeouts or Timeouts()
        self._drain = drain
        self._shutdown = shutdown_of(self.streams)
        self._pulse = Pulse(self._timeouts.heartbeat, self._timeouts.longest, self._shutdown.is_time_to_end)
        self._listening = self._shutdown.listening if drain_on_signal else nullcontext
        self._max_body_bytes = max_body_bytes
        self._max_producers = max_producers
        self._bounds = bounds
        self._on_end = on_end
        self._runner: Runner | None = None
        self._resources = AsyncExitStack()
        self._is_entered = False
        self._recoverables: dict[str, tuple[Recoverable, Setting]] = {}

    async def __aenter__(self) -> Self:
        if self._is_entered:
            raise RuntimeError("this StreamsHTTP was entered already; leave it first")
        async with AsyncExitStack() as stack:
            if not self.streams.is_running:
                await stack.enter_async_context(self.streams)
            runner = Runner(
                self.streams, drain=self._drain, max_producers=self._max_producers, bounds=self._bounds, on_end=self._on_end
            )
            self._runner = await stack.enter_async_context(runner)
            stack.enter_context(self._shutdown.draining(runner.drained))
            runner.drain_at(self._shutdown.begun)
            if self._recoverables:
                runner.recover(self._recoverables, self._going_on)
            stack.enter_context(self._listening())
            self._resources = stack.pop_all()
        self._is_entered = True
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            await self._resources.__aexit__(exc_type, exc, traceback)
        finally:
            self._is_entered, self._runner = False, None
        await self._shutdown.responses_ended()

    def recoverable(self, name: str, **terms: Unpack[Terms]) -> Register:
        """Register a function that makes a stream's chunks, and the rest of them when the process has died that was at it.

            @streams_http.recoverable("answer")
            async def answer(stream: StreamInput, question: str):
                ...

            @app.post("/chat/{chat}")
            async def ask(request: Request, chat: str, question: Question):
                return await streams_http.respond(request, answer(question=question.text), key=chat)

        The function is one that `respond` takes as a source, which may want the stream, and takes all else by keyword. What it is called
        with is kept with the stream as JSON, 64 KiB at most, and made anew of that according to its annotations, the first time as well.

        When the process dies, or is shut down before the function has ended, another one that has registered a function of this name calls
        it with the same arguments; at most one at a time, and at most `attempts` times after a death. `stream.checkpoint` is what was last
        kept, by `stream.write(chunk, checkpoint=…)`, and `stream.attempt` is not 0. Where no checkpoint was kept the answer begins again:
        its readers are told that what they have is superseded. A function that cannot go on where it was does so itself, by
        `await stream.restart()`.

        A run that goes on has the `bounds`, the `on_end` and the manager's `encode` of this, whatever `respond` was given.

        Args:
            name: the same in all processes and all versions of the app.
            terms: `attempts`, how often a stream may be gone on with after a death (3), before it ends with ABORTED; `backoff`, how long it
                waits after the first death (a second), twice as long after each one more, up to an hour; `within`, how long it then waits
                for a process that goes on (five minutes), before it ends with ABORTED.

        Raises (when it is given the function) RuntimeError: this was entered already. InvalidArgumentError: there is one of this name, or
        these are no terms. TypeError: the function's parameters cannot be kept.
        """
        return registering(self.register, name, **terms)

    def register(self, recoverable: Recoverable, setting: Setting = AS_IT_IS) -> Recoverable:
        """Have this go on with the streams of a function that was made recoverable, and give it; it runs in this setting then.

        Raises RuntimeError: this was entered already. InvalidArgumentError: there is one of its name.
        """
        if self._is_entered:
            raise RuntimeError("what goes on with streams is registered before this is entered")
        check_new(recoverable, self._recoverables)
        self._recoverables[recoverable.name] = recoverable, setting
        return recoverable

    def _going_on(self, stream: StreamInput) -> Producer:
        assert stream.recovery is not None
        recoverable, setting = self._recoverables[stream.recovery.name]
        expand = events_of() if stream.metadata.get(PASSES_EVENTS) else None
        produce = producer_of(recoverable.going_on(stream), expand=expand, setting=setting)

        async def go_on(stream: StreamInput, stop: anyio.Event) -> object:
            if stream.checkpoint is None:
                await ChunkWriter(stream).restart()
            return await produce(stream, stop)

        return go_on

    async def drain(self) -> None:
        """Do what a signal sets off: take no more producers, and return when those that run have ended, as at the end.

        For servers that stop otherwise, before they wait for responses: those end soon after. The same goes for all others who
        serve the same manager.
        """
        self._shutdown.begun.set()
        await self.runner.drain()

    @asynccontextmanager
    async def lifespan(self, _app: object) -> AsyncGenerator[None, None]:
        """Run while an app runs; in the form in which Starlette and FastAPI want a lifespan."""
        async with self:
            yield

    @property
    def timeouts(self) -> Timeouts:
        """How its responses keep time."""
        return self._timeouts

    @property
    def max_body_bytes(self) -> int:
        """The longest request body that it reads."""
        return self._max_body_bytes

    @property
    def is_running(self) -> bool:
        """Whether it has been entered, and takes producers."""
        return self._runner is not None and self._runner.is_running

    @property
    def runner(self) -> Runner:
        """What runs the producers. RuntimeError: this has not been entered."""
        if self._runner is None:
            raise RuntimeError("StreamsHTTP is not running: enter it, or give its `lifespan` to the app")
        return self._runner

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one connection of the reading app (ASGI)."""
        match scope["type"]:
            case "http":
                send = discreet(scope, send)
                async with errors_answered(send):
                    await self._read(scope, receive, send)
            case "websocket":
                await receive()
                await send({"type": "websocket.close", "code": 1008})  # before it is accepted: servers answer 403
            case _:
                raise RuntimeError("StreamsHTTP takes HTTP only; give its `lifespan` to the outermost app")

    async def post(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        work: Work,
        context: Mapping[str, Any],
        provide: Provide | None = None,
    ) -> None:
        """Answer a POST by Genkit's exchange: resume the stream that a header names, or do the work, streaming if asked to.

        What `provide` gives is added to the context, before anything else is done.
        """
        send = discreet(scope, send)
        async with errors_answered(send):
            await self._post(scope, receive, send, work, context, provide)

    async def call(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        call: Call,
        context: Mapping[str, Any],
        provide: Provide | None = None,
    ) -> None:
        """Answer a POST by what a call gives, as JSON. What tells of a stream that is somebody else's does not exist."""
        send = discreet(scope, send)
        async with errors_answered(send):
            body = await self.read_body(scope, receive)
            if body is None:
                return
            request = parse_body(body)
            context = await _with_provided(context, provide, request.data)
            try:
                await self._admit_about(call.action, scope, call.about(request), context)
                output = await call.run(request, context, self.streams)
                if output.about is not None:
                    await self._admit_about(call.action, scope, output.about, context)
            except StreamNotFoundError:
                output = call.not_found(request)
            await send_response(send, 200, result_body(encode_json(output.value)), output.headers)

    async def stop(self, scope: Scope, send: Send, context: Mapping[str, Any], provide: Provide | None = None) -> None:
        """Answer a DELETE on a POST's URL: stop the stream that the header names."""
        send = discreet(scope, send)
        async with errors_answered(send):
            context = await _with_provided(context, provide, None)
            stream = headers_of(scope).get(STREAM_ID_HEADER, "")
            await self._cancel(send, await self.admit("stop", scope, stream, scope["path"], context))

    async def respond(
        self,
        request: "Request",
        source: Source,
        *,
        id: object = None,
        key: object = None,
        run: object = None,
        when_running: WhenRunning = "join",
        owner: object = None,
        metadata: Mapping[str, str] | None = None,
        ttl: timedelta | None = None,
        bounds: Bounds | None = None,
        on_end: OnEnd | None = None,
        encode: Encode | None = None,
        context: Mapping[str, Any] | None = None,
        framing: Framing | None = None,
    ) -> "ASGIResponse":
        """Make an iterable a durable stream, and give the Starlette or FastAPI response that shows it.

            @app.post("/chat/{chat}")
            async def ask(request: Request, chat: str, question: Question, user: CurrentUser):
                return await streams_http.respond(request, answer(question), key=chat, owner=user.id)

        The stream is open, and its producer has begun apart from the request, when this returns: `response.stream` is its id, and
        `response.started` whether this request began it. Headers, cookies and background tasks of the response count.

        A request that names a stream, by `X-Genkit-Stream-Id` or by the cursor that `Last-Event-ID` or `?lastEventId=` is, gets that one
        instead, and the source is closed without being used; so it is where a stream runs under the key, unless `when_running` says
        otherwise, and where the request is one that was sent before. What goes wrong is answered as JSON, by its status; to who came with
        a cursor, as an event stream with an `error`, for such clients repeat their request until they get one.

        `await request.is_disconnected()` is false from here on: a reader that goes away ends nothing.

        Args:
            request: the request; not a GET, which browsers repeat.
            source: the chunks. An async iterable, as SDKs give them; or any other, which is iterated in a thread; or a context manager
                that gives one of these, and is entered when the producer runs; or a function: a generator function, or one that
                returns an iterator or such a context manager. A function is called when the producer runs, so what it opens lives as
                long as the stream; in a thread if it is a plain one. If it requires an argument, that is the `StreamInput`: it has the
                `id`, `cancelled`, and `done` for a result. What it returns, if that is no iterator, is the result; so is what a generator
                returns that does not await.
            id: the stream's id; a new one unless given.
            key: what the app calls the conversation: of an owner's streams one at a time runs under it, and `follow` finds the newest.
            run: the client's name of this very start, which starts one stream however often it is sent; its `Idempotency-Key` header
                unless given.
            when_running: what happens where a stream runs under the key: `join` it; `replace` it, which stops it; `refuse`, which is
                answered 409.
            owner: who may read, resume and stop it, as text; unless given, who `authorize` says.
            metadata: text that is kept with the stream, beside its `route`.
            ttl: how long it is kept when it has ended, if not as long as the manager says.
            bounds: how long the run may go on, if not as long as this `StreamsHTTP` says.
            on_end: told how the run has ended, instead of the `on_end` of this `StreamsHTTP`.
            encode: makes JSON of the chunks; the manager's unless given.
            context: what `authorize` gets.
            framing: how the events travel: `GenkitFraming()` unless given. With `PassThroughFraming()` chunks may be text of server-sent
                events, cut anywhere, as generators of streaming responses give it.

        Raises TypeError: that is no source. RuntimeError: the request is a GET, or this has not been entered.
        """
        from .starlette import take_over

        scope = request.scope
        answer = await self.respond_to(
            scope,
            source,
            lambda: take_over(request, lambda: self.read_body(scope, request.receive)),
            id=id,
            key=key,
            run=run,
            when_running=when_running,
            owner=owner,
            metadata=metadata,
            ttl=ttl,
            bounds=bounds,
            on_end=on_end,
            encode=encode,
            context=context,
            framing=framing,
        )
        return _response(answer)

    async def respond_to(
        self,
        scope: Scope,
        source: Source,
        take_over: Callable[[], Awaitable[bool]],
        *,
        setting: Setting = AS_IT_IS,
        **options: Unpack[StartOptions],
    ) -> Answer:
        """Do what `respond` does, for whatever framework; raises as it does.

        Args:
            scope: the request.
            source: as for `respond`.
            take_over: sees to it that what is left of the request's body is read before the producer starts; False: its client has gone.
            setting: what the source runs in.
            options: as for `respond`.
        """
        key, run, owner = _text_of(options.get("key")), _text_of(options.get("run")), options.get("owner")
        when_running = options.get("when_running", "join")
        if scope["method"] in {"GET", "HEAD"}:
            await close(source, setting)
            raise RuntimeError(
                "respond() starts a stream, and a GET is repeated by whoever lost its answer: start it by POST, and follow() it by GET"
            )
        if when_running not in get_args(WhenRunning) or (when_running != "join" and key is None):
            await close(source, setting)
            raise TypeError('when_running is "join", or with a key "replace" or "refuse"')
        try:
            check_framing(options.get("framing"))
        except TypeError:
            await close(source, setting)
            raise
        frames, known = options.get("framing") or GenkitFraming(), options.get("context") or {}
        recovery: Recovery | None = None
        if isinstance(source, RecoverableCall):
            recovery, source = source.recovery, source.function
        expand = events_of() if isinstance(frames, PassThroughFraming) else None
        passes_events = {} if expand is None or recovery is None else {PASSES_EVENTS: "true"}
        runner, produce = self.runner, producer_of(source, expand=expand, setting=setting)
        try:
            named, by_cursor = stream_named_in(scope)
            if named is not None:
                await close(source, setting)
                route = None if await self._is_called(named, key, run) else scope["path"]
                rest = await self._rest(scope, named, known, owner=owner, route=route, by_cursor=by_cursor, framing=frames)
                return Answer(*rest)
            stream = str(uuid.uuid4() if (id_ := options.get("id")) is None else id_)
            known_owner = await self._owner_or(owner, "start", scope, known)
            opening: OpenOptions = {
                "metadata": {
                    **(options.get("metadata") or {}),
                    "route": scope["path"],
                    ANSWER: ENDPOINTS_OWN,
                    **passes_events,
                },
                "ttl": options.get("ttl"),
                "encode": options.get("encode"),
                "owner": known_owner,
                "key": key,
                "run": run_of(scope, known_owner) if run is None else run,
                "replace": when_running == "replace",
                "recovery": recovery,
            }
            if not await take_over():
                await close(source, setting)  # its client left before it had sent all of its request
                return Answer(_nothing)
            shown, started = await self._start_or_join(
                runner, stream, produce, opening, options.get("bounds"), options.get("on_end"), refuses=when_running == "refuse"
            )
        except BaseException as error:
            await close(source, setting)
            if not isinstance(error, Exception):
                raise  # the endpoint was cancelled
            return Answer(_failed(error))
        if not started:
            await close(source, setting)
        return Answer(self._showing(shown, START, frames), shown, started)

    async def _start_or_join(
        self,
        runner: Runner,
        stream: str,
        produce: Producer,
        opening: OpenOptions,
        bounds: Bounds | None,
        on_end: OnEnd | None,
        *,
        refuses: bool,
    ) -> tuple[str, bool]:
        """Start the stream, or give the one that is there under its key or was started by its run; and say whether it was started."""
        for _ in range(MAX_STARTS):
            try:
                await runner.start(stream, produce, bounds=bounds, on_end=on_end, **opening)
            except KeyInUseError as error:
                if refuses and not error.is_same_run:
                    raise
                with suppress(StreamNotFoundError):  # it was taken back, or has expired
                    return (await self.streams.info(error.stream)).id, False
            else:
                return stream, True
        raise StorageError("streams under this key are started, and taken back, faster than they can be followed")

    async def follow(
        self,
        request: "Request",
        stream: object = None,
        *,
        key: object = None,
        run: object = None,
        owner: object = None,
        context: Mapping[str, Any] | None = None,
        framing: Framing | None = None,
    ) -> "ASGIResponse":
        """Give the Starlette or FastAPI response that shows a stream, on a route of the app's own.

            @app.get("/chat/{chat}/stream")
            async def stream(request: Request, chat: str, user: CurrentUser):
                return await streams_http.follow(request, key=chat, owner=user.id)

        It begins behind what `Last-Event-ID`, `?lastEventId=`, `X-Genkit-Stream-Offset` or `?after=` names. It is an empty 204 when there
        is no such stream, when it is somebody else's, and when nothing is left of it to show. What else goes wrong is answered as JSON.
        In a framing whose clients take no 204 it is an empty answer instead; and a 404 where an id or a run names no stream.

        Args:
            request: the request.
            stream: the stream's id; whether it runs or has ended, it is shown.
            key: instead of an id, or where there is no stream of that id: the newest stream that its owner has started under this key, if
                it runs. One that has ended is shown to who has seen some of it only: a page that opens has the answer from elsewhere; and
                in a framing that `replays`, whose clients do not say what they have seen.
            run: instead of both: the stream that its owner's run has started, as `respond` was given it; shown as by its id.
            owner: who is asking, as text; unless given, who `authorize` says.
            context: what `authorize` gets.
            framing: how the events travel; unless given, in the format that `DurableStreaming` has stored it in, or `SSEFraming()`, what
                an EventSource reads.

        Raises RuntimeError: this has not been entered. TypeError: neither an id was given, nor a key, nor a run; or a run beside another.
        """
        answer = await self.follow_to(request.scope, stream, key=key, run=run, owner=owner, context=context, framing=framing)
        return _response(answer)

    async def follow_to(self, scope: Scope, stream: object = None, **options: Unpack[FollowOptions]) -> Answer:
        """Do what `follow` does, for whatever framework; raises as it does."""
        self.runner  # noqa: B018 - raises if this was not entered
        stream, key, run = _which(stream, options.get("key"), options.get("run"))
        check_framing(options.get("framing"))
        owner, known, framing = options.get("owner"), options.get("context") or {}, options.get("framing")
        takes_tokens = stream is not None  # a token is for a stream: by a key alone whoever asks is asked for
        try:
            if key is not None and (cursor := cursor_in(scope)) is not None:
                # A stream of this key that is not the newest any more is gone on with all the same.
                found = await self.admit("resume", scope, cursor.stream, None, known, owner, takes_tokens=takes_tokens)
                if found.key != key and found.id != stream:
                    return Answer(_nothing_in(framing))
            else:
                found = await self._found(stream, key, run, "resume", scope, known, owner)
            shown = framing or framing_of(found.metadata.get(ANSWER), scope)
            is_over = key is not None and found.id != stream and found.status != "open" and not shown.replays
            if is_over and place_of(scope, found) == START:
                return Answer(_nothing_in(shown))
            rest = await self._rest(
                scope, found.id, known, owner=owner, route=None, by_cursor=False, framing=shown, takes_tokens=takes_tokens
            )
            return Answer(*rest)
        except StreamNotFoundError as error:
            return Answer(_not_found(framing, scope, error, is_by_key=key is not None))
        except Exception as error:
            return Answer(_failed(error))

    async def cancel(
        self,
        request: "Request",
        stream: object = None,
        *,
        key: object = None,
        run: object = None,
        owner: object = None,
        context: Mapping[str, Any] | None = None,
    ) -> "ASGIResponse":
        """Stop a stream, on a route of the app's own; and give the response that says whether it ran, `{"stopped": true}`.

            @app.delete("/chat/{chat}")
            async def stop(request: Request, chat: str, user: CurrentUser):
                return await streams_http.cancel(request, key=chat, owner=user.id)

        It is a 404 when there is no such stream, and when it is somebody else's. Arguments are as for `follow`.

        Raises TypeError: as `follow` does.
        """
        answer = await self.cancel_to(request.scope, stream, key=key, run=run, owner=owner, context=context)
        return _response(answer)

    async def cancel_to(self, scope: Scope, stream: object = None, **options: Unpack[StopOptions]) -> Answer:
        """Do what `cancel` does, for whatever framework; raises as it does."""
        stream, key, run = _which(stream, options.get("key"), options.get("run"))
        try:
            found = await self._found(stream, key, run, "stop", scope, options.get("context") or {}, options.get("owner"))
            stopped = await self.streams.cancel(found.id, life=found.life)
        except Exception as error:
            return Answer(_failed(error))

        async def answer(scope: Scope, _receive: Receive, send: Send) -> None:
            await send_response(discreet(scope, send), 200, encode_json({"stopped": stopped}))

        return Answer(answer)

    async def token(
        self,
        stream: object,
        *,
        can: TokenUse,
        expires_in: timedelta,
        owner: object = None,
        holder: object = None,
    ) -> str:
        """Give a token that lets whoever has it read a stream, or stop it, by this or any `StreamsHTTP` with the same keys.

            token = await streams_http.token(response.stream, can="read", expires_in=timedelta(minutes=5))

        It goes as `?token=`, for `EventSource`, `sendBeacon` and links, or as `Authorization: Bearer`. It stands in for `authorize`, which
        is not asked then; not for what an app checks itself, nor for an `owner` that an endpoint gives. It is for this stream, and for no
        later one under its id. Who is given one, the app decides; this asks nobody.

        Args:
            stream: the stream's id.
            can: `read`, whatever shows the stream or says how it stands; or `stop`, and nothing else.
            expires_in: a week at most. A connection that is open by then goes on; who comes back is told 401.
            owner: whose the stream has to be; not checked unless given.
            holder: who alone may use it, by the name that `authorize` gives; that is asked then. A token that leaks is nobody else's.

        Raises RuntimeError: this has no `token_keys`. StreamNotFoundError: there is no such stream, of this owner. InvalidArgumentError;
        TypeError: an owner or a holder has no name. And as `StreamManager.info` does.
        """
        if not self._token_keys:
            raise RuntimeError("give StreamsHTTP `token_keys`: a token is signed with the first one")
        check_use(can)
        who = None if holder is None else owner_text(holder)
        if who == "" or (who is not None and self._authorize is None):
            raise InvalidArgumentError("a holder is somebody, whom `authorize` knows by a name")
        info = await self.streams.info(str(stream))
        if owner is not None:
            check_owner(info, owner_text(owner))
        expires_at = expiry(self.streams.storage.time(), expires_in)
        return self._token_keys.sign(can, expires_at, info.id, info.life, who)

    async def _found(
        self,
        stream: str | None,
        key: str | None,
        run: str | None,
        action: Action,
        scope: Scope,
        context: Mapping[str, Any],
        owner: object,
    ) -> StreamInfo:
        """Give what is known of the stream that an endpoint means. StreamNotFoundError: there is none, for who is asking."""
        if stream is not None:
            try:
                return await self.admit(action, scope, stream, None, context, owner)
            except (StreamNotFoundError, InvalidArgumentError):
                # A token that is refused is not made good by who asks, nor by a stream that it is not for.
                if key is None or self._bears_token(scope, owner):
                    raise
        asking = await self._owner_or(owner, action, scope, context)
        if run is not None:
            return await self.streams.started_by(run, asking)
        assert key is not None
        return await self.streams.current(key, asking)

    async def _is_called(self, stream: str, key: str | None, run: str | None) -> bool:
        """Say whether a stream has this key, or was started by this run, and so is the endpoint's whatever path it was started through."""
        if key is None and run is None:
            return False
        try:
            info = await self.streams.info(stream)
            if key is not None and info.key == key:
                return True
            return run is not None and (await self.streams.started_by(run, info.owner)).id == stream
        except StreamNotFoundError:
            return False

    async def _rest(
        self,
        scope: Scope,
        stream: str,
        context: Mapping[str, Any],
        *,
        owner: object = None,
        route: str | None,
        by_cursor: bool,
        framing: Framing | None,
        default: Callable[[], Framing] = SSEFraming,
        takes_tokens: bool = True,
    ) -> tuple[ASGIApp, str | None]:
        """Give what answers a request with the rest of a stream, and the id of the stream that it shows, if it shows one.

        Where there is none, or nothing is left of it, it is a 204; an event stream to who takes no 204, or came with a cursor, for that one
        repeats its request until it gets one.
        """
        try:
            info = await self.admit("resume", scope, stream, route, context, owner, takes_tokens=takes_tokens)
            place = place_of(scope, info)
            if place.after is not None and place.after >= info.tail:  # such as of a storage that was restored
                raise _beyond(place.after, info.tail)
        except (StreamNotFoundError, OffsetOutOfRangeError, RequestRefusedError) as error:
            if by_cursor:
                framing = framing or default()
                return _told(framing, framing.error(shown_error(error))), None
            if not isinstance(error, StreamNotFoundError):
                raise
            return _nothing_in(framing), None
        framing = framing or framing_of(info.metadata.get(ANSWER), scope, default)
        if not is_all_seen(info, place, framing):
            return self._showing(stream, in_life(place, info), framing), stream
        if isinstance(framing, GenkitFraming):
            return self._showing(stream, in_life(again(place), info), framing), stream
        return _told(framing, b"") if by_cursor else _nothing_in(framing), None

    def _showing(self, stream: str, place: Place, framing: Framing) -> ASGIApp:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            send = discreet(scope, send)
            async with errors_answered(send):
                if scope["method"] == "HEAD":
                    headers = [*framing.head(stream, query_of(scope)), *naming(stream)]
                    await send_only_head(send, framing, headers)
                else:
                    await self.show(scope, receive, send, stream, place, framing=framing)

        return app

    async def start(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        produce: Producer,
        context: Mapping[str, Any],
        *,
        owner: object = None,
    ) -> None:
        """Run a producer under a new id, and answer with what it writes. Raises before the answer has begun only.

        Its owner is who `authorize` says, unless one is given.
        """
        stream = str(uuid.uuid4())
        try:
            await self.launch(scope, stream, produce, context, {ANSWER: ENDPOINTS_OWN}, owner=owner)
        except KeyInUseError as error:
            await self.show_again(scope, receive, send, error.stream)
        else:
            await self.show(scope, receive, send, stream)

    async def who_starts(self, scope: Scope) -> str:
        """Give who starts a stream by a request, empty if nobody in particular. Raises what `authorize` raises."""
        return await self._owner("start", scope, None, {})

    async def show_again(self, scope: Scope, receive: Receive, send: Send, stream: str) -> None:
        """Answer a start that was sent twice with what it has started, from its beginning. Raises before the answer has begun only."""
        info = await self.streams.info(stream)
        await self.show(scope, receive, send, stream, framing=framing_of(info.metadata.get(ANSWER), scope, GenkitFraming))

    async def read_body(self, scope: Scope, receive: Receive) -> bytes | None:
        """Give a request's body, or None if the client went away. Raises RequestRefusedError."""
        return await read_body(scope, receive, max_bytes=self._max_body_bytes, within=self._timeouts.body)

    async def skip_body(self, scope: Scope, receive: Receive) -> bool:
        """Read a request's body, which means nothing here and is not kept; False if the client went away. Raises RequestRefusedError."""
        most = max(MAX_SKIPPED_BYTES, self._max_body_bytes)
        return await read_body(scope, receive, max_bytes=most, within=self._timeouts.body, keeps=False) is not None

    async def launch(
        self,
        scope: Scope,
        stream: str,
        produce: Producer,
        context: Mapping[str, Any],
        metadata: Mapping[str, str] = MappingProxyType({}),
        *,
        owner: object = None,
    ) -> None:
        """Run a producer under an id, for the route and the run that the request comes from, and its owner unless one is given.

        KeyInUseError: this run has started another one.
        """
        known = await self._owner_or(owner, "start", scope, context)
        await self.runner.start(
            stream, produce, metadata={"route": scope["path"], **metadata}, owner=known, run=run_of(scope, known)
        )

    async def resume(self, scope: Scope, receive: Receive, send: Send, context: Mapping[str, Any]) -> None:
        """Answer with the stream that a POST names instead of starting one. Raises before the answer has begun only."""
        stream, by_cursor = stream_named_in(scope)
        assert stream is not None
        default = SSEFraming if by_cursor else GenkitFraming
        app, _ = await self._rest(
            scope, stream, context, route=scope["path"], by_cursor=by_cursor, framing=None, default=default
        )
        await app(scope, receive, send)

    async def show(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        stream: str,
        place: Place | None = None,
        *,
        framing: Framing | None = None,
        headers: Iterable[tuple[str, str]] | None = None,
        before_error: Callable[[], Awaitable[None]] = checkpoint,
    ) -> None:
        """Answer with a stream's events, in Genkit's framing unless told otherwise. Raises before the answer has begun only.

        The headers name the stream, unless others are given. `before_error` is awaited before the framing is asked for the frame of an
        ERROR; what it raises ends the answer as a transport that fails does.
        """
        place, framing = place or START, framing or GenkitFraming()
        headers = [*(naming(stream) if headers is None else headers)]
        # Those of an app that says them itself count; but what either exposes is exposed.
        given = {name.lower() for name, _ in headers} - {EXPOSED[0]}
        # The query of a POST is the app's: who starts a stream has none of it.
        query = query_of(scope) if scope["method"] == "GET" else {}
        headers = [*(header for header in framing.head(stream, query) if header[0] not in given), *headers]
        if framing.reads_all and place.after is not None:
            await self._check_reached(stream, place.after)
        after = None if framing.reads_all else place.after
        async with self.streams.subscribe(
            stream,
            after,
            last=place.last,
            follow=place.follow,
            superseded=framing.counts or place.after is not None,
            idle_timeout=self._timeouts.idle,
        ) as events:
            check_life(place, events.life)
            if place.last is not None:
                headers.append((OFFSET_HEADER, str(events.first_offset - 1)))
            with self._listening(), self._shutdown.responding():
                await send_events(
                    receive,
                    send,
                    events,
                    framing,
                    self._pulse,
                    headers,
                    after=-1 if place.after is None else place.after,
                    can_cut=can_be_cut(scope),
                    before_error=before_error,
                )

    async def _check_reached(self, stream: str, offset: int) -> None:
        if offset >= (tail := (await self.streams.info(stream)).tail):
            raise _beyond(offset, tail)

    async def _post(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        work: Work,
        context: Mapping[str, Any],
        provide: Provide | None,
    ) -> None:
        headers = headers_of(scope)
        if STREAM_ID_HEADER in headers and provide is None:
            if await self.skip_body(scope, receive):
                await self.resume(scope, receive, send, context)
            return
        body = await self.read_body(scope, receive)
        if body is None:
            return
        if STREAM_ID_HEADER in headers:
            context = await _with_provided(context, provide, _input_in(body))
            await self.resume(scope, receive, send, context)
            return
        request = parse_body(body)
        context = await _with_provided(context, provide, request.data)
        work.check(request)
        streaming = wants_stream(headers.get("accept", ""), query_of(scope))
        owner = await self._owner("start", scope, None, context)
        admits = partial(self._admits, owner)
        if work.detaches(request):
            await self._detach(scope, receive, send, work, request, context, admits, owner, streaming=streaming)
        elif streaming:
            await self.start(scope, receive, send, partial(_produce, work, request, context, admits), context, owner=owner)
        else:
            await _run_once(receive, send, work, request, context, admits)

    async def _detach(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        work: Work,
        request: GenkitRequest,
        context: Mapping[str, Any],
        admits: Admits,
        owner: str,
        *,
        streaming: bool,
    ) -> None:
        """Begin work that goes on as a stream, and answer; where the same request was sent before, as that was answered.

        The stream is its owner's before anything of the work can be seen.
        """
        if (run := run_of(scope, owner)) is not None:
            with suppress(StreamNotFoundError):
                await self._answer_again(scope, receive, send, await self.streams.started_by(run, owner), streaming=streaming)
                return
        self.runner.check_room()
        detached = await work.detach(request, context, admits)
        if isinstance(detached, Output):
            await _answer(send, encode_json(detached.value), (), detached.headers, streaming=streaming)
            return
        try:
            answer = encode_json(detached.answer)
            kept = {ANSWER: ENDPOINTS_OWN, DETACHED: answer.decode()}
            await self.launch(scope, detached.stream, detached.produce, context, kept, owner=owner)
        except KeyInUseError as error:
            await detached.abandon()
            await self._answer_again(scope, receive, send, await self.streams.info(error.stream), streaming=streaming)
            return
        except BaseException:
            with anyio.move_on_after(ABANDON_SECONDS, shield=True):
                await detached.abandon()
                await self._forget(detached.stream)
            raise
        try:
            begun = await detached.begun()
        except BaseException:  # or the request was cancelled; without its stream what has begun is stopped
            with anyio.move_on_after(ABANDON_SECONDS, shield=True):
                await self._forget(detached.stream)
            raise
        await _answer(send, answer, naming(detached.stream), begun.headers, streaming=streaming)

    async def _forget(self, stream: str) -> None:
        """Delete the stream of what did not begin: who sends the same again has it tried again."""
        try:
            with suppress(StreamNotFoundError):
                await self.streams.delete(stream)
        except StreamkeepError as error:
            logger.warning("stream %s, of what did not begin, could not be deleted: %s", stream, error)

    async def _answer_again(self, scope: Scope, receive: Receive, send: Send, info: StreamInfo, *, streaming: bool) -> None:
        answer = info.metadata.get(DETACHED)
        if answer is None:
            await self.show_again(scope, receive, send, info.id)
        else:
            await _answer(send, answer.encode(), naming(info.id), (), streaming=streaming)

    async def _admits(self, owner: str, stream: str) -> bool:
        try:
            return (await self.streams.info(stream)).owner == owner
        except (StreamNotFoundError, InvalidArgumentError):
            return True

    async def _admit_about(self, action: Action, scope: Scope, stream: str | None, context: Mapping[str, Any]) -> None:
        """Ask who is asking. StreamNotFoundError: it is about a stream that is there, and somebody else's."""
        info = None
        if stream is not None:
            with suppress(StreamNotFoundError, InvalidArgumentError):
                info = await self.streams.info(stream)
        await self._owner(action, scope, info, context)

    async def _read(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._runner is None and not self.streams.is_running:
            raise RuntimeError(
                "neither StreamsHTTP nor its manager is running: enter one of them, or give its `lifespan` to the app"
            )
        below = path_below(scope)
        if below in {"", "/"} and scope["method"] in {"GET", "HEAD"}:
            await self._list(scope, send)
            return
        path = _READ_PATH.fullmatch(below)
        if path is None:
            raise StreamNotFoundError("not found")
        stream = path["stream"]
        match scope["method"], path["sub"]:
            case ("GET" | "HEAD", None):
                await self._read_events(scope, receive, send, stream)
            case ("GET" | "HEAD", "/info"):
                info = await self.admit("read", scope, stream, self._route, {})
                await send_response(send, 200, msgspec.json.encode(shown_info(info)))
            case ("DELETE", None) | ("POST", "/cancel"):
                await self._cancel(send, await self.admit("stop", scope, stream, self._route, {}))
            case _:
                await send_response(send, 405, headers=[("allow", _ALLOWED[path["sub"]])])

    async def _list(self, scope: Scope, send: Send) -> None:
        owner = await self._owner("list", scope, None, {})
        if not owner:
            # Nobody in particular has no streams; to list everybody's would give ids away.
            raise StreamNotFoundError("not found")
        query = query_of(scope)
        status, limit = query.get("status"), query.get("limit", str(LISTED))
        if status not in {None, "open", "done", "error"}:
            raise InvalidArgumentError("a status is open, done or error")
        if not (limit.isascii() and limit.isdigit() and 1 <= int(limit[:9]) <= MAX_LISTED):
            raise InvalidArgumentError(f"a limit is a whole number from 1 to {MAX_LISTED}")
        page = await self.streams.list(
            query.get("after", ""),
            int(limit),
            owner=owner,
            key_prefix=query.get("key"),
            status=cast("StreamStatus | None", status),
        )
        found = [shown_info(info) for info in page if self._route is None or info.metadata.get("route", "") == self._route]
        body = encode_json({"streams": found, "next": page.next})
        await send_response(send, 200, body)

    async def _read_events(self, scope: Scope, receive: Receive, send: Send, stream: str) -> None:
        info = await self.admit("read", scope, stream, self._route, {})
        place, framing = reading_of(scope, info), framing_of(info.metadata.get(ANSWER), scope)
        if is_all_seen(info, place, framing):
            # What an EventSource that has seen the end is told, so that it does not come back for ever.
            await send_response(send, 204)
        elif scope["method"] == "HEAD":
            await send_only_head(send, framing, framing.head(stream, query_of(scope)))
        else:
            await self.show(scope, receive, send, stream, in_life(place, info), framing=framing, headers=())

    async def _cancel(self, send: Send, info: StreamInfo) -> None:
        stopped = await self.streams.cancel(info.id, life=info.life)
        await send_response(send, 200, encode_json({"stopped": stopped}))

    async def admit(
        self,
        action: Action,
        scope: Scope,
        stream: str,
        route: str | None,
        context: Mapping[str, Any],
        owner: object = None,
        *,
        takes_tokens: bool = True,
    ) -> StreamInfo:
        """Give what is known of a stream that the caller may use. StreamNotFoundError: there is none, for this caller.

        A request that bears a token of ours is judged by that alone, unless the endpoint says who is asking.
        """
        if takes_tokens and self._bears_token(scope, owner):
            return await self._admit_bearer(tokens_in(scope), action, scope, stream, route, context)
        try:
            info = await self.streams.info(stream)
            check_route(info, route)
        except StreamNotFoundError:
            # Who would be rejected is rejected here too, or the difference would tell which ids exist.
            await self._owner_or(owner, action, scope, context)
            raise
        await self._owner_or(owner, action, scope, context, info)
        return info

    def _bears_token(self, scope: Scope, owner: object) -> bool:
        return owner is None and bool(self._token_keys) and bool(tokens_in(scope))

    async def _admit_bearer(
        self, borne: Iterable[str], action: Action, scope: Scope, stream: str, route: str | None, context: Mapping[str, Any]
    ) -> StreamInfo:
        """Give what is known of the stream that a token is for.

        StreamNotFoundError: it is not for this. RequestRefusedError: it is not any more.
        """
        token = token_of(borne)
        if token is None or not token.allows(action):
            raise StreamNotFoundError("stream not found")
        info = None
        with suppress(StreamNotFoundError):
            found = await self.streams.info(stream)
            check_route(found, route)
            info = found
        # Who holds it is asked also where there is no stream, or the difference would tell which ids exist.
        holder = await name_of(self._authorize, self._access(action, scope, info, context)) if token.is_held else None
        if info is None or not self._token_keys.has_signed(token, info.id, info.life, holder):
            raise StreamNotFoundError("stream not found")
        check_expiry(token, self.streams.storage.time())
        return info

    async def _owner_or(
        self, owner: object, action: Action, scope: Scope, context: Mapping[str, Any], info: StreamInfo | None = None
    ) -> str:
        """Give who is asking: who the endpoint says, or else `authorize`. StreamNotFoundError: the stream is somebody else's."""
        if owner is None:
            return await self._owner(action, scope, info, context)
        name = owner_text(owner)
        check_owner(info, name)
        return name

    async def _owner(self, action: Action, scope: Scope, info: StreamInfo | None, context: Mapping[str, Any]) -> str:
        return await owner_of(self._authorize, self._access(action, scope, info, context))

    def _access(self, action: Action, scope: Scope, info: StreamInfo | None, context: Mapping[str, Any]) -> Access:
        return Access(action, scope, headers_of(scope), info, context, scope.get(REQUEST))


def naming(stream: str) -> list[tuple[str, str]]:
    """Give the headers that tell a client the stream's id."""
    return [(STREAM_ID_HEADER, stream), ("access-control-expose-headers", "X-Genkit-Stream-Id")]


def framing_of(kept: str | None, scope: Scope, default: Callable[[], Framing] = SSEFraming) -> Framing:
    """Give the framing that a stream was passed through in, by what is kept as its ANSWER; the default if it was not."""
    return kept_framing(kept, id_first="x-run-id" in headers_of(scope)) if kept and kept != ENDPOINTS_OWN else default()


def _which(stream: object, key: object, run: object) -> tuple[str | None, str | None, str | None]:
    if (stream is None and key is None) == (run is None):
        raise TypeError("give a stream's id, a key, or both; or a run")
    return _text_of(stream), _text_of(key), _text_of(run)


def _text_of(name: object) -> str | None:
    """Give what an app calls something as text, such as a number or a UUID."""
    return None if name is None else str(name)


def _response(answer: Answer) -> "ASGIResponse":
    from .starlette import ASGIResponse  # only who has Starlette asks for one

    return ASGIResponse(answer.app, answer.stream, started=answer.started, status=204 if answer.app is _nothing else 200)


def _beyond(offset: int, tail: int) -> OffsetOutOfRangeError:
    return OffsetOutOfRangeError(f"offset {offset} is beyond the stream's last event, {tail - 1}")


def _told(framing: Framing, body: bytes) -> ASGIApp:
    """Give a whole answer in a framing. Some clients repeat their request until they get one."""

    async def app(scope: Scope, _receive: Receive, send: Send) -> None:
        if (mark := scope.get(OWN_ANSWER)) is not None:
            mark.set()
        send = discreet(scope, send)
        await send_head(send, framing, framing.head("", {}))
        await send({"type": "http.response.body", "body": body})

    return app


def _nothing_in(framing: Framing | None) -> ASGIApp:
    """Give what says that there is nothing to be shown, or nothing more."""
    return _nothing if framing is None or framing.takes_no_content else _told(framing, b"")


def _not_found(framing: Framing | None, scope: Scope, error: StreamNotFoundError, *, is_by_key: bool) -> ASGIApp:
    """Give what answers a reader whose stream is not there. Who counts parts gets an end, or is told that there is none any more."""
    if isinstance(framing, UIMessagesFraming):
        try:
            index = start_index(query_of(scope))
        except InvalidArgumentError as invalid:
            return _failed(invalid)
        if index is not None:
            return _failed(error) if index > 0 else _told(framing, framing.end())
    return _nothing_in(framing) if is_by_key or framing is None or framing.takes_no_content else _failed(error)


async def _nothing(scope: Scope, _receive: Receive, send: Send) -> None:
    await send_response(discreet(scope, send), 204)


def _failed(error: Exception) -> ASGIApp:
    async def app(scope: Scope, _receive: Receive, send: Send) -> None:
        async with errors_answered(discreet(scope, send)):
            raise error

    return app


def shown_info(info: StreamInfo) -> dict[str, object]:
    """Give what a reader may know of a stream: not its writer's session, nor its metadata."""
    return {
        "id": info.id,
        "key": info.key,
        "status": info.status,
        "error": info.error,
        "tail": info.tail,
        "createdAt": info.created_at,
        "updatedAt": info.updated_at,
        "isWritten": bool(info.session),
        "isRecovering": info.is_recovering,
        "expiresAt": info.expires_at,
    }


async def _with_provided(context: Mapping[str, Any], provide: Provide | None, data: object) -> Mapping[str, Any]:
    return context if provide is None else {**context, **await provide(data)}


def _input_in(body: bytes) -> object:
    """Give the input that a request to resume has as well, which may have anything for a body."""
    try:
        return parse_body(body).data
    except InvalidArgumentError:
        return None


async def _produce(
    work: Work, request: GenkitRequest, context: Mapping[str, Any], admits: Admits, stream: StreamInput, stop: anyio.Event
) -> object:
    return (await work.run(request, context, admits, stream.write_soon, stop)).value


async def _answer(
    send: Send, output: bytes, headers: Iterable[tuple[str, str]], of_output: Iterable[tuple[str, str]], *, streaming: bool
) -> None:
    """Give an output as JSON, with its own headers; or as a stream of Genkit's that is nothing but it."""
    body = result_body(output)
    if not streaming:
        await send_response(send, 200, body, [*headers, *of_output])
        return
    await send_head(send, GenkitFraming(), headers)
    await send({"type": "http.response.body", "body": b"data: %b\n\n" % body})


async def _run_once(
    receive: Receive, send: Send, work: Work, request: GenkitRequest, context: Mapping[str, Any], admits: Admits
) -> None:
    """Do the work for one answer without a stream; a client that goes away stops it."""
    stop = anyio.Event()
    failure: Exception | None = None
    output = Output(None)
    async with anyio.create_task_group() as exchange:
        exchange.start_soon(_stop_on_disconnect, receive, stop, exchange.cancel_scope)
        try:
            output = await work.run(request, context, admits, _ignore, stop)
        except Exception as error:
            failure = error
        except not_ours():
            raise
        except BaseException as error:  # what native libraries raise may be no Exception
            failure = RuntimeError(f"it ended by a {type(error).__name__}")
            failure.__cause__ = error
        exchange.cancel_scope.cancel()
    if failure is not None:
        raise failure
    if not stop.is_set():
        await send_response(send, 200, result_body(encode_json(output.value)), output.headers)


async def _stop_on_disconnect(receive: Receive, stop: anyio.Event, exchange: anyio.CancelScope) -> None:
    await disconnected(receive)
    stop.set()
    await anyio.sleep(STOP_SECONDS)
    exchange.cancel()


def _ignore(_chunk: object) -> None:
    """Take a chunk that nobody asked for."""


def path_below(scope: Scope) -> str:
    """Give the path below where the app is mounted.

    ASGI has `path` begin with `root_path`. Behind a proxy that takes a prefix off it begins with the end of that only. Routers of Channels
    leave both as they are, and give what is left in `path_remaining`. Of two who mount, the inner one leaves less.
    """
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    while root and not f"{path}/".startswith(f"{root}/"):
        _, slash, rest = root[1:].partition("/")
        root = slash + rest
    below, remaining = path.removeprefix(root), scope.get("path_remaining")
    return below if remaining is None else min(below, "/" + remaining.lstrip("/"), key=len)
