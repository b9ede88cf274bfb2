"""DurableStreaming: makes an unmodified ASGI app that streams in Genkit's framing durable, such as one of `genkit_fastapi`.

The inner app runs apart from the request and is not told of a disconnect. Its frames become events; a request that names a
stream is answered from the log, and never reaches it. All else passes through untouched.
"""

import logging
import uuid
from contextlib import AsyncExitStack
from typing import Final

import anyio
import msgspec

from .._input import StreamInput
from .._manager import StreamManager
from ..errors import InvalidArgumentError, StreamkeepError
from ..events import ErrorInfo, hidden_error
from .app import StreamsHTTP, query_of
from .response import (
    STREAM_ID_HEADER,
    ASGIApp,
    Message,
    Receive,
    Scope,
    Send,
    disconnected,
    errors_answered,
    headers_of,
    send_error,
)
from .runner import END_SECONDS, SHUT_DOWN
from .wire import Failure, GenkitDecoder, GenkitFrame, Result, wants_stream
from .wire import Message as Chunk

logger: Final = logging.getLogger("streamkeep")

NO_TERMINAL_FRAME: Final = ErrorInfo("ABORTED", "the response ended before the stream was completed")


class DurableStreaming:
    """An ASGI app around another: `app = DurableStreaming(app, streams)`.

    A POST that asks for a stream (`Accept: text/event-stream` or `?stream=true`) gets an `X-Genkit-Stream-Id` and is stored;
    with that header it resumes the stream, and DELETE with it stops the stream. Stopping is told to the inner app as a
    disconnect, and is enforced a second later. Errors in the inner app's frames are stored in full; readers get their status
    only.

    Its lifespan starts what it needs after the inner app's start-up and stops it before the inner app's shutdown.

    Args:
        app: the inner app.
        streams: a manager (entered here, unless it is running), or a `StreamsHTTP` over it, to say who is authorized.
    """

    def __init__(self, app: ASGIApp, streams: StreamManager | StreamsHTTP) -> None:
        self._app = app
        self._http = streams if isinstance(streams, StreamsHTTP) else StreamsHTTP(streams)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one connection, or the server's lifespan (ASGI)."""
        match scope["type"], scope.get("method"):
            case "lifespan", _:
                await _Lifespan(self._app, self._http).run(scope, receive, send)
            case "http", "POST" if _is_streaming(scope):
                await self._post(scope, receive, send)
            case "http", "DELETE" if STREAM_ID_HEADER in headers_of(scope):
                await self._http.stop(scope, send, {})
            case _:
                await self._app(scope, receive, send)

    async def _post(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with errors_answered(send):
            body = await self._http.read_body(scope, receive)
            stream = headers_of(scope).get(STREAM_ID_HEADER)
            if body is None:
                return
            if stream is not None:
                await self._http.resume(scope, receive, send, stream, {})
            else:
                await self._start(scope, receive, send, body)

    async def _start(self, scope: Scope, receive: Receive, send: Send, body: bytes) -> None:
        stream = str(uuid.uuid4())
        exchange = _Exchange(self._app, scope, body, send)
        await self._http.launch(scope, stream, exchange.produce, {})
        await exchange.answered.wait()
        if exchange.is_stream:
            await self._http.show(scope, receive, send, stream)
        else:
            try:
                await exchange.passed_on(receive)
            finally:
                # If the client has gone, this is also what stops the inner app.
                await _forget(self._http.streams, stream)


class _Exchange:
    """One run of the inner app: its response as events, or, if it does not stream, as it is, to the client that asked."""

    def __init__(self, app: ASGIApp, scope: Scope, body: bytes, send: Send) -> None:
        self.answered = anyio.Event()
        self.is_stream = False
        self._app = app
        self._scope = scope
        self._body: bytes | None = body
        self._send: Send = send
        self._decoder = GenkitDecoder()
        self._has_begun = False
        self._is_complete = False
        self._is_left = False
        self._over = anyio.Event()

    async def produce(self, stream: StreamInput, stop: anyio.Event) -> None:
        async def receive() -> Message:
            if self._body is not None:
                body, self._body = self._body, None
                return {"type": "http.request", "body": body, "more_body": False}
            await stop.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            await self._take(stream, message)

        try:
            await self._app(_plainly_asking(self._scope), receive, send)
            if self.is_stream and not stream.is_closed:
                await stream.error(SHUT_DOWN if stop.is_set() else NO_TERMINAL_FRAME)
        finally:
            self.answered.set()
            self._over.set()

    async def passed_on(self, receive: Receive) -> None:
        """Return when the response that is not a stream has passed, or its client has gone."""
        try:
            async with anyio.create_task_group() as waiting:
                waiting.start_soon(self._leave_on_disconnect, receive, waiting.cancel_scope)
                await self._over.wait()
                waiting.cancel_scope.cancel()
        finally:
            self._is_left = True
        if self._over.is_set() and not self._has_begun:
            await send_error(self._send, ErrorInfo("INTERNAL", "internal"))

    async def _leave_on_disconnect(self, receive: Receive, waiting: anyio.CancelScope) -> None:
        await disconnected(receive)
        if not self._is_complete:  # else it is what servers say after a response, and the inner app may have more to do
            waiting.cancel()

    async def _take(self, stream: StreamInput, message: Message) -> None:
        if message["type"] == "http.response.start":
            content_type = dict(message.get("headers", ())).get(b"content-type", b"")
            self.is_stream = message["status"] == 200 and content_type.startswith(b"text/event-stream")
            self.answered.set()
        if not self.is_stream:
            await self._pass(message)
            return
        for frame in self._decoder.feed(message.get("body", b"")):
            await _store(stream, frame)

    async def _pass(self, message: Message) -> None:
        # At the client's pace and never kept: how much an app answers is for nobody to store here.
        if self._is_left:
            raise BrokenPipeError("the client has gone")
        self._has_begun = True
        self._is_complete = message["type"] == "http.response.body" and not message.get("more_body", False)
        await self._send(message)


async def _forget(streams: StreamManager, stream: str) -> None:
    with anyio.move_on_after(END_SECONDS, shield=True):
        try:
            await streams.delete(stream)
        except StreamkeepError as error:
            logger.warning("stream %s, of an answer that was none, is left to expire: %s", stream, error)


async def _store(stream: StreamInput, frame: GenkitFrame) -> None:
    match frame:
        case Chunk(data, _):
            await stream.write(msgspec.Raw(data))
        case Result(data, _):
            await stream.done(msgspec.Raw(data))
        case Failure(error, _):
            # The inner app puts exceptions' texts into its frames; only the status is for everybody.
            await stream.error(hidden_error(error.status, error.message))


class _Lifespan:
    """The inner app's lifespan, with ours inside it: entered when the inner app has started, left before it shuts down.

    In between, because an inner app that enters the manager itself must come first. An app that knows no lifespan gets ours
    alone.
    """

    def __init__(self, app: ASGIApp, http: StreamsHTTP) -> None:
        self._app = app
        self._http = http
        self._ours = AsyncExitStack()
        self._answered = False

    async def run(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def receive_for_app() -> Message:
            message = await receive()
            if message["type"] == "lifespan.shutdown":
                await self._ours.aclose()
            return message

        async def send_for_app(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                await self._start()
            self._answered = True
            await send(message)

        async with self._ours:
            try:
                await self._app(scope, receive_for_app, send_for_app)
            except Exception:
                if self._answered:
                    raise  # it knows lifespans, and its start-up or shutdown failed
            if not self._answered:
                await self._run_alone(receive, send)

    async def _start(self) -> None:
        if not self._http.is_running:
            await self._ours.enter_async_context(self._http)

    async def _run_alone(self, receive: Receive, send: Send) -> None:
        try:
            await self._start()
        except Exception as error:
            # Only raising would be taken for an app without a lifespan, and served.
            await send({"type": "lifespan.startup.failed", "message": f"{type(error).__name__}: {error}"})
            raise
        await send({"type": "lifespan.startup.complete"})
        while (await receive())["type"] != "lifespan.shutdown":
            pass
        await self._ours.aclose()
        await send({"type": "lifespan.shutdown.complete"})


def _plainly_asking(scope: Scope) -> Scope:
    """Give the inner app `Accept` in one line and lower case: `genkit_fastapi` finds it in no other form."""
    headers = [header for header in scope["headers"] if header[0].lower() != b"accept"]
    return {**scope, "headers": [*headers, (b"accept", headers_of(scope).get("accept", "*/*").lower().encode("latin-1"))]}


def _is_streaming(scope: Scope) -> bool:
    headers = headers_of(scope)
    try:
        return STREAM_ID_HEADER in headers or wants_stream(headers.get("accept", ""), query_of(scope))
    except InvalidArgumentError:
        return False  # what its query means is the inner app's affair
