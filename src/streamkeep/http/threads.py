"""StreamsHTTP for apps that are no ASGI apps, or that have no lifespan: Flask, Django.

It runs in an event loop of its own, in a thread of its own, one for each process. There its ASGI apps answer; whoever serves takes the
answer in a thread, or in another event loop. Nothing of what is answered is decided here.
"""

import asyncio
import errno
import inspect
import math
import threading
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from contextvars import Context, ContextVar, copy_context
from dataclasses import dataclass, field
from datetime import timedelta
from queue import SimpleQueue
from typing import Any, Final, Protocol, Self, TypedDict, TypeVar, Unpack
from weakref import WeakSet

import anyio

from .._background import Background, loop_here, ran
from .._info import StreamInfo
from .._loop_thread import LoopThread, LoopThreads, Outcome, check_threads
from .._manager import InMemoryStreamManager, StreamManager
from ..errors import (
    PublicError,
    StorageError,
    StorageUnavailableError,
    StreamkeepError,
    StreamManagerClosedError,
)
from ..events import is_public
from .access import Access, Authorize
from .app import Answer, FollowOptions, StartOptions, StopOptions, StreamsHTTP, TokenOptions
from .bounds import Bounds
from .ended import Ended, OnEnd
from .framing import error_body
from .recovery import Recoverable, check_new
from .response import ASGIApp, Message, Scope, Timeouts, code_of, head_of, refusal_of, shown_error
from .shutdown import hear_signals
from .sources import AS_IT_IS, Setting, Source, close, in_thread

R = TypeVar("R")
A = TypeVar("A")

BUFFER_BYTES: Final = 1 << 16
"""How much of an answer may wait for whoever takes it."""
HEARTBEAT: Final = timedelta(seconds=5)
"""A WSGI server learns that a client has gone when a write to it fails, and has no thread for others until then."""
LAST_SECONDS: Final = 2.0
"""How long answers may take to end when all else has been left."""
LAST_BYTES_SECONDS: Final = 0.5
"""How long answers may take to be told whole, and to be sent, when the producers have ended."""
HOP_BY_HOP: Final = frozenset({"connection", "keep-alive", "transfer-encoding", "upgrade"})
"""Headers that are the server's own, and that a WSGI app must not give (PEP 3333)."""

Streams = str | Callable[[], StreamManager]
"""The URL of a storage, or what makes a manager that nobody else uses, each time that it is called."""


class ServingOptions(TypedDict, total=False):
    """What a `StreamsHTTP` may be told."""

    authorize: Authorize | None
    route: str | None
    timeouts: Timeouts | None
    drain: timedelta
    drain_on_signal: bool
    max_body_bytes: int
    max_producers: int
    bounds: Bounds | None
    on_end: OnEnd | None
    token_keys: Sequence[str | bytes]


@dataclass(frozen=True, slots=True)
class Taken:
    """An answer whose head is known.

    Attributes:
        status: its HTTP code.
        headers: its headers, without those that are the server's own.
        body: all of it, if its length was known; else what streams.
        stream: the id of the stream that it shows; None if it shows none.
        started: whether this very request has started that stream.
    """

    status: int
    headers: list[tuple[str, str]]
    body: "bytes | Pipe"
    stream: str | None
    started: bool


@dataclass(frozen=True, slots=True)
class View:
    """What a view says of the code of its app that runs on its behalf in our event loop, and in threads of ours.

    Attributes:
        setting: what surrounds a source, and an `on_end`.
        within: the context variables that they have.
        asking: what surrounds an `authorize` that awaits. (One that does not is called by the view, where all is as the view has it.)
        asking_within: the context variables that it has.
    """

    setting: Setting = AS_IT_IS
    within: Context = field(default_factory=copy_context)
    asking: Setting = AS_IT_IS
    asking_within: Context = field(default_factory=copy_context)


def check_options(**options: Unpack[ServingOptions]) -> None:
    """Raise what `StreamsHTTP` raises for them: where they are given, and not at the first request."""
    StreamsHTTP(InMemoryStreamManager(), **options)


class StreamsThread:
    """A `StreamsHTTP` in an event loop and a thread of its own; a context manager, which closes it.

    It starts when it is first used, closes with `close` or with the program, and drains then, and when the process gets a signal to stop.
    One that is used after it was closed, or in a forked child, starts anew. Requests that come while it starts wait for that start, some
    seconds at most; where it fails, they are answered as where the storage fails later, with a 503, and the next request tries again.

    Args:
        streams: the URL of a storage, or a function that makes a manager, each time that this starts.
        call_blocking: how a view that awaits calls what does not, as its framework has it.
        options: those of `StreamsHTTP`. Unless `timeouts` are given, a heartbeat is sent every five seconds. An `authorize` that does not
            await is called in the request's own thread, and an `on_end` in a thread; those that await in the event loop.
    """

    def __init__(
        self,
        streams: Streams,
        *,
        call_blocking: "Callable[[Callable[[], None]], Awaitable[None]]" = asyncio.to_thread,
        **options: Unpack[ServingOptions],
    ) -> None:
        check_threads()
        make: Callable[[], StreamManager] = (lambda: StreamManager.connect(streams)) if isinstance(streams, str) else streams
        if isinstance(streams, str):
            make()  # a URL that cannot be is told here
        self._call_blocking = call_blocking
        self._hears_signals = options.get("drain_on_signal", True)
        told: ServingOptions = {
            **options,
            "timeouts": options.get("timeouts") or Timeouts(heartbeat=HEARTBEAT),
            "authorize": _asked_by_caller(options.get("authorize")),
            "on_end": _in_its_setting(options.get("on_end")),
        }
        self._recoverables: list[tuple[Recoverable, Setting]] = []
        self._threads = LoopThreads(lambda: _serving(self._registered(StreamsHTTP(make(), **told))))
        self._hear()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def start(self) -> "LoopThread[Serving]":
        """Start it, unless it runs in this process; what it gives is our own affair. In the main thread, listen to signals as well.

        Raises what opening the storage raises. StorageUnavailableError: it takes too long.
        """
        self._hear()
        return self._threads.running()

    def register(self, recoverable: Recoverable, setting: Setting) -> None:
        """Do what `StreamsHTTP.register` does, for each time that this starts. Raises as it does; RuntimeError: this runs."""
        if self._threads.is_running:
            raise RuntimeError(
                "what goes on with streams is registered before this is started: by `start`, or the first request"
            )
        check_new(recoverable, [other.name for other, _ in self._recoverables])
        self._recoverables.append((recoverable, setting))

    def _registered(self, http: StreamsHTTP) -> StreamsHTTP:
        for recoverable, setting in self._recoverables:
            http.register(recoverable, setting)
        return http

    def close(self) -> None:
        """Drain, and return when nothing is left running. It can be called again, also by a signal handler."""
        self._threads.close()

    def respond(self, scope: Scope, source: Source, view: View | None = None, **options: Unpack[StartOptions]) -> Taken:
        """Do what `StreamsHTTP.respond` does, for a request whose body has been read, and give the answer when its head is known."""
        return ran(self._respond(Blocking(), scope, source, view or View(), options))

    def follow(self, scope: Scope, stream: object = None, view: View | None = None, **options: Unpack[FollowOptions]) -> Taken:
        """Do what `StreamsHTTP.follow` does."""
        return ran(self._taken(Blocking(), view or View(), _follow(scope, stream, options)))

    def cancel(self, scope: Scope, stream: object = None, view: View | None = None, **options: Unpack[StopOptions]) -> Taken:
        """Do what `StreamsHTTP.cancel` does."""
        return ran(self._taken(Blocking(), view or View(), _cancel(scope, stream, options)))

    def answer(self, scope: Scope, body: bytes, app: Callable[[StreamsHTTP], ASGIApp], view: View | None = None) -> Taken:
        """Give what an ASGI app answers that is made of the `StreamsHTTP`."""
        view = view or View()
        return ran(self._taken(Blocking(), view, _answer(scope, body, app, view)))

    def current(self, key: str, owner: str = "") -> StreamInfo:
        """Do what `StreamManager.current` does; raises as it does, and as `start`."""
        return ran(self._outcome(Blocking(), copy_context(), _current, key, owner)).given()

    def token(self, stream: object, **options: Unpack[TokenOptions]) -> str:
        """Do what `StreamsHTTP.token` does; raises as it does, and as `start`."""
        return ran(self._outcome(Blocking(), copy_context(), _token, stream, options)).given()

    async def arespond(self, scope: Scope, source: Source, view: View | None = None, **options: Unpack[StartOptions]) -> Taken:
        """Do what `respond` does, for whoever awaits it in another event loop."""
        return await self._respond(Awaiting(self._call_blocking), scope, source, view or View(), options)

    async def afollow(
        self, scope: Scope, stream: object = None, view: View | None = None, **options: Unpack[FollowOptions]
    ) -> Taken:
        """Do what `follow` does, for whoever awaits it in another event loop."""
        return await self._taken(Awaiting(self._call_blocking), view or View(), _follow(scope, stream, options))

    async def acancel(
        self, scope: Scope, stream: object = None, view: View | None = None, **options: Unpack[StopOptions]
    ) -> Taken:
        """Do what `cancel` does, for whoever awaits it in another event loop."""
        return await self._taken(Awaiting(self._call_blocking), view or View(), _cancel(scope, stream, options))

    async def acurrent(self, key: str, owner: str = "") -> StreamInfo:
        """Do what `current` does, for whoever awaits it in another event loop."""
        return (await self._outcome(Awaiting(self._call_blocking), copy_context(), _current, key, owner)).given()

    async def atoken(self, stream: object, **options: Unpack[TokenOptions]) -> str:
        """Do what `token` does, for whoever awaits it in another event loop."""
        return (await self._outcome(Awaiting(self._call_blocking), copy_context(), _token, stream, options)).given()

    def _hear(self) -> None:
        if self._hears_signals:
            hear_signals()

    async def _respond(self, here: "Waiting", scope: Scope, source: Source, view: View, options: StartOptions) -> Taken:
        given = deque([source])  # for the one who takes it: the event loop, when the call begins there, or else this
        try:
            return await self._taken(here, view, _respond(scope, given, view, options))
        finally:
            if (left := _popped(given)) is not None:
                await here.close(left, view.setting)

    async def _taken(self, here: "Waiting", view: View, do: "Do") -> Taken:
        caller = Caller(here.tell, view)
        try:
            return caller.taken(await self._outcome(here, view.within, do, caller))
        except (StorageError, StreamManagerClosedError) as error:
            return _failed(error)
        finally:
            caller.leave()

    async def _outcome(
        self, here: "Waiting", within: Context, do: "Callable[..., Awaitable[R]]", *args: object
    ) -> "Outcome[R]":
        """Start, have something done in the event loop, and give what it has given or raised, calling meanwhile what it has called here.

        It is given what runs, and the arguments. One whose wait ends before is cancelled. Raises as `start` does.
        """
        self._hear()  # here, where the main thread may be
        try:
            running = self._threads.starting()
            await here.started(running)
        except OSError as error:  # no more files, say
            raise StorageUnavailableError(f"the streams could not be started ({error})") from error
        cancel = within.run(running.begin, here.tell, do, running, *args)
        try:
            while not isinstance(outcome := await here.came(), Outcome):
                await here.call(outcome)
        except BaseException:
            cancel()
            raise
        return outcome


def context_without(is_gone: Callable[[str], bool]) -> Context:
    """Give a copy of the context without the variables of some names: what goes with a request, and is torn down while a producer runs."""
    context = Context()
    for variable, value in copy_context().items():
        if not is_gone(variable.name):
            context.run(variable.set, value)
    return context


class Serving:
    """What runs in the event loop."""

    def __init__(self, http: StreamsHTTP) -> None:
        self.http = http
        self.tasks = Background()
        self.bodies = WeakSet[Pipe]()
        """What streams, or is still being sent."""


@asynccontextmanager
async def _serving(http: StreamsHTTP) -> AsyncGenerator[Serving]:
    serving = Serving(http)
    serving.tasks.begin()
    try:
        async with http:
            yield serving
            # A server that is asked to stop waits for its responses first; at the end of a program nobody does.
            await http.drain()
            with anyio.move_on_after(LAST_BYTES_SECONDS):
                for body in tuple(serving.bodies):
                    await body.sent()
    finally:
        with anyio.move_on_after(LAST_SECONDS, shield=True):
            serving.tasks.stop()
            await serving.tasks.wait()


Running = LoopThread[Serving]
Came = Outcome[Any] | Callable[[], None]
"""What a view waits for: its answer, or what it is to call meanwhile."""


class Waiting(Protocol):
    """How a view waits."""

    def tell(self, what: Came) -> None:
        """Have it come, from any thread."""
        ...

    async def started(self, running: Running) -> None:
        """Return when it has started. Raises as its `wait` does."""
        ...

    async def came(self) -> Came:
        """Give what comes next."""
        ...

    async def call(self, function: Callable[[], None]) -> None:
        """Call what does not await, where the view would."""
        ...

    async def close(self, source: Source, setting: Setting) -> None:
        """Close a source."""
        ...


class Blocking:
    """A view that blocks its thread, for `ran`: what of this is awaited never waits."""

    def __init__(self) -> None:
        self._came = SimpleQueue[Came]()

    def tell(self, what: Came) -> None:
        """See `Waiting`."""
        self._came.put(what)

    async def started(self, running: Running) -> None:
        """See `Waiting`."""
        running.wait()

    async def came(self) -> Came:
        """See `Waiting`."""
        return self._came.get()

    async def call(self, function: Callable[[], None]) -> None:
        """See `Waiting`."""
        function()

    async def close(self, source: Source, setting: Setting) -> None:
        """See `Waiting`. It is closed in an event loop of its own: one may run in this thread."""
        closing = threading.Thread(target=anyio.run, args=[close, source, setting])
        closing.start()
        closing.join()


class Awaiting:
    """A view that awaits, in an event loop of asyncio's.

    Args:
        call_blocking: as for `StreamsThread`.
    """

    def __init__(self, call_blocking: Callable[[Callable[[], None]], Awaitable[None]]) -> None:
        self._call_blocking = call_blocking
        self._loop = asyncio.get_running_loop()
        self._came = asyncio.Queue[Came]()

    def tell(self, what: Came) -> None:
        """See `Waiting`."""
        with suppress(RuntimeError):  # whoever waits has ended with its event loop
            self._loop.call_soon_threadsafe(self._came.put_nowait, what)

    async def started(self, running: Running) -> None:
        """See `Waiting`."""
        await running.wait_async()

    async def came(self) -> Came:
        """See `Waiting`."""
        return await self._came.get()

    async def call(self, function: Callable[[], None]) -> None:
        """See `Waiting`."""
        await self._call_blocking(function)

    async def close(self, source: Source, setting: Setting) -> None:
        """See `Waiting`."""
        await close(source, setting)


CALLER: Final = "streamkeep.caller"
"""Where a scope has the caller."""


class Caller:
    """A view that waits for its answer, and calls `authorize` and the like meanwhile: there the request is, its database connections, its
    transaction.

    Args:
        tell: has the view call something, from any thread.
        view: what it says of its code.
    """

    def __init__(self, tell: Callable[[Came], object], view: View) -> None:
        self._tell = tell
        self._view = view
        self._raised: Exception | None = None
        self._over: Callable[[], object] = lambda: None
        self._body: Pipe | None = None
        self._is_answered = self._has_left = False

    async def ask(self, function: Callable[[A], object], about: A) -> object:
        """Call a function, `authorize` say: in the view, and in the event loop what it gives to be awaited.

        What it raises is raised by the view, as the framework knows it, unless we know it. StreamManagerClosedError: the view has gone.
        """
        try:
            awaits = inspect.iscoroutinefunction(function)
            answer = function(about) if awaits else await self._call(lambda: function(about))
            if not inspect.isawaitable(answer):
                return answer
            return await asyncio.create_task(_awaited(answer, self._view.asking), context=self._view.asking_within)
        except Exception as error:
            if isinstance(error, StreamkeepError) or is_public(error) or refusal_of(error) is not None:
                raise
            self._raised = error
            raise PublicError("PERMISSION_DENIED", f"who was asked has raised {type(error).__name__}") from error

    async def _call(self, function: Callable[[], R]) -> R:
        loop, over, outcomes = loop_here(), anyio.Event(), list[Outcome[R]]()

        def end() -> None:
            with suppress(RuntimeError):
                loop.call(over.set)

        def call() -> None:
            try:
                outcomes.append(Outcome([function()]))
            except Exception as error:
                outcomes.append(Outcome([], error))
            end()

        self._over = end
        self._tell(call)
        if self._has_left:
            end()
        await over.wait()
        if not outcomes:
            raise StreamManagerClosedError("who has asked has gone")
        return outcomes[0].given()

    def hand_over(self, body: "Pipe") -> None:
        """Have the view take a body. Of one that has left, or leaves before it has taken it, the client is gone."""
        self._body = body
        if self._has_left:
            body.leave()

    def leave(self) -> None:
        """Note that the view waits no more, and calls nothing."""
        self._has_left = True
        self._over()
        if self._body is not None and not self._is_answered:  # its answer came when it was being ended
            self._body.leave()

    def taken(self, outcome: Outcome[Taken]) -> Taken:
        """Give the answer, or raise what the view is to raise."""
        if self._raised is not None:
            raise self._raised
        taken = outcome.given()
        self._is_answered = True
        return taken


async def _awaited(what: Awaitable[R], setting: Setting) -> R:
    async with setting.in_task():
        return await what


def _asked_by_caller(authorize: Authorize | None) -> Authorize | None:
    if authorize is None:
        return None

    async def ask(access: Access) -> object:
        caller: Caller = access.scope[CALLER]
        return await caller.ask(authorize, access)

    return ask


Do = Callable[[Running, Caller], Awaitable[Taken]]
_setting: Final = ContextVar[Setting]("streamkeep_setting", default=AS_IT_IS)
"""What an `on_end` runs in, which is called in the context of what it is the end of."""


def _respond(scope: Scope, given: deque[Source], view: View, options: StartOptions) -> Do:
    async def do(running: Running, caller: Caller) -> Taken:
        if (source := _popped(given)) is None:
            raise StreamManagerClosedError("who has asked has gone")
        _setting.set(view.setting)
        told: StartOptions = {**options, "on_end": _in_its_setting(options.get("on_end"))}
        http, asked = running.entered.http, {**scope, CALLER: caller}
        return await _taken(running, asked, await http.respond_to(asked, source, _was_read, setting=view.setting, **told))

    return do


def _popped(given: deque[Source]) -> Source | None:
    try:
        return given.pop()
    except IndexError:
        return None


def _follow(scope: Scope, stream: object, options: FollowOptions) -> Do:
    async def do(running: Running, caller: Caller) -> Taken:
        asked = {**scope, CALLER: caller}
        return await _taken(running, asked, await running.entered.http.follow_to(asked, stream, **options))

    return do


def _cancel(scope: Scope, stream: object, options: StopOptions) -> Do:
    async def do(running: Running, caller: Caller) -> Taken:
        asked = {**scope, CALLER: caller}
        return await _taken(running, asked, await running.entered.http.cancel_to(asked, stream, **options))

    return do


def _answer(scope: Scope, body: bytes, app: Callable[[StreamsHTTP], ASGIApp], view: View) -> Do:
    async def do(running: Running, caller: Caller) -> Taken:
        _setting.set(view.setting)
        return await _taken(running, {**scope, CALLER: caller}, Answer(app(running.entered.http)), body)

    return do


async def _current(running: Running, key: str, owner: str) -> StreamInfo:
    return await running.entered.http.streams.current(key, owner)


async def _token(running: Running, stream: object, options: TokenOptions) -> str:
    return await running.entered.http.token(stream, **options)


def _failed(error: StorageError | StreamManagerClosedError) -> Taken:
    """Give what is answered where nothing runs that could answer."""
    body = error_body(shown_error(error))
    return Taken(code_of(error) or error.http_code, head_of(body), body, None, started=False)


async def _was_read() -> bool:
    """Leave a request's body alone: who calls has read it."""
    return True


def _in_its_setting(on_end: OnEnd | None) -> OnEnd | None:
    """Have a plain function called in a thread: it may block, and would block everybody's event loop."""
    if on_end is None:
        return None

    async def told(ended: Ended) -> None:
        setting, awaits = _setting.get(), inspect.iscoroutinefunction(on_end)
        answer = on_end(ended) if awaits else await in_thread(f"{ended.stream}-on_end", lambda: on_end(ended), setting)
        if inspect.isawaitable(answer):
            await _awaited(answer, setting)

    return told


async def _taken(running: Running, scope: Scope, answer: Answer, body: bytes = b"") -> Taken:
    """Have an ASGI app answer, apart from who has asked, and give its answer when the head is known."""
    pipe = Pipe(running, body)
    running.entered.tasks.start(
        lambda: answer.app(scope, pipe.receive, pipe.send), "an answer", copy_context(), ended=pipe.set_over
    )
    try:
        status, headers = await pipe.head()
        if status in {204, 304} or any(name == "content-length" for name, _ in headers):
            return Taken(status, headers, await pipe.whole(), answer.stream, answer.started)
    except BaseException:
        pipe.leave()
        raise
    running.entered.bodies.add(pipe)
    caller: Caller = scope[CALLER]
    caller.hand_over(pipe)
    return Taken(status, headers, pipe, answer.stream, answer.started)


class Pipe:
    """A body on its way out of the event loop that it is made in. One end is an ASGI server's; the other gives what has come."""

    def __init__(self, running: Running, request_body: bytes) -> None:
        self._running = running
        self._request = [request_body]
        self._head: tuple[int, list[tuple[str, str]]] | None = None
        self._head_known = anyio.Event()
        self._lock = threading.Lock()
        self._ready: list[bytes] = []
        self._size = 0
        self._most: float = BUFFER_BYTES
        self._waiting: Future[bytes] | None = None
        self._room = anyio.Event()
        self._is_left = False
        self._left = anyio.Event()
        self._is_whole = False
        self._is_over = False
        self._over = anyio.Event()

    # In the event loop

    async def receive(self) -> Message:
        """Give the request's body, and then that the client has gone, when it has."""
        if self._request:
            return {"type": "http.request", "body": self._request.pop(), "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """Take a part of the answer, when there is room for it. OSError: nobody wants it any more (ASGI 2.4)."""
        if self._is_left:
            raise _gone()
        if message["type"] == "http.response.start":
            headers = [(name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in message["headers"]]
            self._head = message["status"], [header for header in headers if header[0] not in HOP_BY_HOP]
            self._head_known.set()
        elif message["type"] == "http.response.body":
            self._is_whole = not message.get("more_body", False)
            if body := message.get("body", b""):
                self._put(body)
                await self._wait_for_room()

    def set_over(self) -> None:
        """Note that the app has returned."""
        self._over.set()
        self._head_known.set()
        with self._lock:
            self._is_over = True
            waiting, self._waiting = self._waiting, None
        if waiting is not None and waiting.set_running_or_notify_cancel():
            self._end(waiting)

    async def head(self) -> tuple[int, list[tuple[str, str]]]:
        """Give the status and the headers when they are known. RuntimeError: the app has given none; why is in the log."""
        await self._head_known.wait()
        if self._head is None:
            raise RuntimeError("there was no answer; see the log for why")
        return self._head

    async def whole(self) -> bytes:
        """Give all of it, when the app has returned."""
        self._most = math.inf
        self._make_room()
        await self._over.wait()
        return b"".join(self._ready)

    async def sent(self) -> None:
        """Return when all of it has been sent, or it is cut, or nobody wants it. Servers close what they have sent (PEP 3333)."""
        await self._over.wait()
        if self._is_whole:
            await self._left.wait()

    def _put(self, body: bytes) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting, None
            if waiting is None or not waiting.set_running_or_notify_cancel():
                self._ready.append(body)
                self._size += len(body)
                return
        waiting.set_result(body)

    async def _wait_for_room(self) -> None:
        while self._size >= self._most and not self._is_left:
            self._room = anyio.Event()
            await self._room.wait()

    # Anywhere

    def take(self) -> "Future[bytes]":
        """Give what will have what comes next, and nothing at the end. ConnectionResetError: what is left of the answer is cut."""
        future: Future[bytes] = Future()
        with self._lock:
            if not self._ready and not self._is_over:
                self._waiting = future
                return future
            body = b"".join(self._ready)
            self._ready.clear()
            self._size = 0
        if body:
            future.set_result(body)
            self._running.soon(self._make_room)
        else:
            self._end(future)
        return future

    def leave(self) -> None:
        """Have the app know that its client has gone. It takes no lock: the garbage collector may come at any time."""
        self._is_left = True
        self._running.soon(self._leave)

    def _leave(self) -> None:
        self._left.set()
        self._make_room()

    def _make_room(self) -> None:
        self._room.set()

    def _end(self, future: "Future[bytes]") -> None:
        if self._is_whole:
            future.set_result(b"")
        else:
            future.set_exception(_gone("the answer is cut here, so that its client knows that it is not whole"))


def _gone(why: str = "the client has gone") -> ConnectionResetError:
    return ConnectionResetError(errno.ECONNRESET, why)


class Body:
    """What streams, as WSGI has it: an iterable, which is closed when its client has gone. That ends nothing but the answer."""

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> bytes:
        if body := self._pipe.take().result():
            return body
        raise StopIteration

    def close(self) -> None:
        """Take no more of it."""
        self._pipe.leave()

    def __del__(self) -> None:
        self.close()


class AsyncBody:
    """What streams, for another event loop; an async iterable, which is closed when its client has gone."""

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        if body := await asyncio.wrap_future(self._pipe.take()):
            return body
        raise StopAsyncIteration

    def close(self) -> None:
        """Take no more of it."""
        self._pipe.leave()

    def __del__(self) -> None:
        self.close()


# WSGI


def scope_of(environ: Mapping[str, Any]) -> Scope:
    """Give the ASGI scope of a WSGI request."""
    root = _text(environ.get("SCRIPT_NAME", ""))
    protocol = environ.get("SERVER_PROTOCOL", "HTTP/1.0")
    return {
        "type": "http",
        # Who cannot break a response off says so by naming no version; see `can_be_cut`.
        "asgi": {"version": "3.0", "spec_version": "2.5"} if _can_be_cut(environ) else {"version": "3.0"},
        "http_version": protocol.partition("/")[2],
        "method": environ["REQUEST_METHOD"],
        "scheme": environ.get("wsgi.url_scheme", "http"),
        "path": root + _text(environ.get("PATH_INFO", "")),
        "root_path": root,
        "query_string": environ.get("QUERY_STRING", "").encode("latin-1"),
        "headers": [*_headers(environ)],
        "client": (environ.get("REMOTE_ADDR", ""), 0),
    }


def _can_be_cut(environ: Mapping[str, Any]) -> bool:
    """Say whether a body that breaks off can be told from one that is whole: not where closing the connection is how any ends."""
    is_wsgiref = environ.get("SERVER_SOFTWARE", "").startswith("WSGIServer")
    return not is_wsgiref and environ.get("SERVER_PROTOCOL") == "HTTP/1.1"


def _headers(environ: Mapping[str, Any]) -> "list[tuple[bytes, bytes]]":
    found = {name[5:]: value for name, value in environ.items() if name.startswith("HTTP_")}
    for name in ("CONTENT_TYPE", "CONTENT_LENGTH"):
        if environ.get(name):
            found[name] = environ[name]
    return [(name.lower().replace("_", "-").encode("latin-1"), str(value).encode("latin-1")) for name, value in found.items()]


def _text(wsgi: str) -> str:
    """Give a WSGI string's text: its characters are the bytes of UTF-8 (PEP 3333)."""
    return wsgi.encode("latin-1").decode("utf-8", "replace")
