"""Answers over ASGI: a subscription as a response that streams, JSON, errors; and requests read within bounds.

The one rule of a stream's response: its client can tell whether it is whole. It ends with a terminal frame, or is cut. Genkit's official
clients spin or hang without that frame; most others take every clean end for success.
"""

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Final

import anyio
from anyio import CancelScope
from anyio.lowlevel import checkpoint

from .._durations import check_durations
from .._feed import NO_RECORDS, Records
from .._subscription import Subscription
from ..errors import (
    HTTP_CODES,
    KeyInUseError,
    PublicError,
    Status,
    StorageError,
    StorageFullError,
    StreamkeepError,
    StreamManagerClosedError,
)
from ..events import ErrorInfo, StreamEvent, StreamEventType, is_error, public_info, shown_info
from ..wire import cursor_prefix
from .framing import Framing, GenkitFraming, error_body
from .logged import OneLine
from .pulse import SHUTTING_DOWN, TOO_LONG, Pulse

logger: Final = logging.getLogger("streamkeep")

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

OWN_ANSWER: Final = "streamkeep.own_answer"
"""The name of an event in the scope inside `DurableStreaming`: set by an answer of ours that is not to be made a stream again."""
STREAM_ID_HEADER: Final = "x-genkit-stream-id"
LAST_FRAME_SECONDS: Final = 1.0
FIRST_PAUSE_SECONDS: Final = 0.001
LAST_PAUSE_SECONDS: Final = 1.0
FULL_CODE: Final = 507
"""For a storage without space: 429, which RESOURCE_EXHAUSTED is otherwise, says that the client has asked for too much."""
NO_SNIFFING: Final = ("x-content-type-options", "nosniff")
"""A stream holds what users have typed: no browser is to take it for a page or a script."""
NO_REFERRER: Final = (b"referrer-policy", b"no-referrer")
BODY_BYTES: Final = 1 << 16
"""About how much is sent at a time. A server takes all that it is given, and holds it for a client that does not read."""
ERROR_PAUSE_SECONDS: Final = 0.1
"""Genkit's JS client throws away chunks that its user has not read yet when an error arrives."""


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long a request's body may take, and how a response that streams keeps time.

    Attributes:
        heartbeat: how long a response may be silent before something meaningless is sent to keep it open.
        longest: how long one response may last; the reader comes back with its offset.
        idle: how long a reader waits for an event before it is told DEADLINE_EXCEEDED; None: as long as the writer lives.
        body: how long a request's body may take to arrive.
    """

    heartbeat: timedelta = timedelta(seconds=15)
    longest: timedelta = timedelta(hours=1)
    idle: timedelta | None = None
    body: timedelta = timedelta(seconds=30)

    def __post_init__(self) -> None:
        check_durations(heartbeat=self.heartbeat, longest=self.longest, idle=self.idle, body=self.body)


class RequestRefusedError(StreamkeepError):
    """A request that is refused with a code, or with headers, that its status alone does not give.

    Such as one whose body is not read to its end: 413 or 408. Genkit's code for RESOURCE_EXHAUSTED, 429, would have clients send the same
    again a little later.
    """

    def __init__(self, status: Status, code: int, message: str, headers: Iterable[tuple[str, str]] = ()) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = headers


def headers_of(scope: Scope) -> Mapping[str, str]:
    """Give a request's headers, names in lower case, repeated ones as one list (RFC 9110, 5.3)."""
    headers: dict[str, str] = {}
    for raw_name, raw_value in scope["headers"]:
        name, value = raw_name.decode("latin-1").lower(), raw_value.decode("latin-1")
        headers[name] = f"{headers[name]}{'; ' if name == 'cookie' else ', '}{value}" if name in headers else value
    return headers


def can_be_cut(scope: Scope) -> bool:
    """Say whether a server takes an app that returns without its last message for a response that is not whole, and closes the connection.

    uvicorn, hypercorn and granian do. Daphne, which alone names no version of the HTTP spec, leaves the client waiting for ever. So does
    hypercorn over HTTP/2 and HTTP/3, as long as anything else goes on in the connection; it is known by its offer to push.
    """
    return "spec_version" in scope.get("asgi", {}) and "http.response.push" not in scope.get("extensions", {})


async def read_body(scope: Scope, receive: Receive, *, max_bytes: int, within: timedelta, keeps: bool = True) -> bytes | None:
    """Give a request's body (b"" unless it `keeps` it), or None if the client went away.

    RequestRefusedError: it is too long, or takes too long.
    """
    with anyio.move_on_after(within.total_seconds()):
        return await _whole_body(receive, max_bytes, keeps=keeps)
    # The rest may come for ever. (HTTP/2 has no such header: there only this stream ends.)
    close = [("connection", "close")] if scope["http_version"].startswith("1") else []
    sentence = f"the request's body took more than {within.total_seconds():g} seconds to arrive"
    raise RequestRefusedError("DEADLINE_EXCEEDED", 408, sentence, close)


async def _whole_body(receive: Receive, max_bytes: int, *, keeps: bool) -> bytes | None:
    body, size = bytearray(), 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        size += len(message.get("body", b""))
        if size > max_bytes:
            raise RequestRefusedError("RESOURCE_EXHAUSTED", 413, f"the request's body has more than {max_bytes} bytes")
        if keeps:
            body += message.get("body", b"")
        if not message.get("more_body", False):
            return bytes(body)
        await checkpoint()  # a middleware's `receive` may always have an answer, and an empty one


async def send_response(send: Send, code: int, body: bytes = b"", headers: Iterable[tuple[str, str]] = ()) -> None:
    """Send a whole answer, which nobody is to keep; JSON if it has a body."""
    length = [] if code == 204 else [("content-length", str(len(body)))]  # which must not have one
    await send({"type": "http.response.start", "status": code, "headers": _raw([*head_of(body), *headers, *length])})
    await send({"type": "http.response.body", "body": body})


def head_of(body: bytes) -> list[tuple[str, str]]:
    """Give the headers of a whole answer, but for its length."""
    kind = [("content-type", "application/json"), NO_SNIFFING] if body else []
    return [*kind, ("cache-control", "no-store")]


def code_of(error: Exception) -> int | None:
    """Give an error's HTTP code where it is not its status's."""
    return FULL_CODE if isinstance(error, StorageFullError) else None


async def send_error(
    send: Send,
    error: ErrorInfo,
    code: int | None = None,
    headers: Iterable[tuple[str, str]] = (),
    *,
    body: Callable[[ErrorInfo], bytes] = error_body,
) -> None:
    """Send an error as JSON, under its status's HTTP code unless another is given."""
    await send_response(send, code or HTTP_CODES[error.status], body(error), headers)


def shown_error(error: Exception) -> ErrorInfo:
    """Say of an error what a client may know, and write the rest to the log."""
    info = shown_info(error)
    if isinstance(error, KeyInUseError):
        info = replace(info, details={"stream": error.stream})
    if isinstance(error, StreamManagerClosedError):
        logger.info("a request came too late: %s", error)  # at every shutdown under load, and its client is told
    elif isinstance(error, PublicError):
        logger.info("a request was refused: %s", OneLine(error))
    elif isinstance(error, StorageFullError):
        logger.error("a request failed: %s", error)
    elif info.status in ("INTERNAL", "UNKNOWN", "DATA_LOSS", "UNAVAILABLE"):
        logger.error("a request failed", exc_info=error)
    return info


@asynccontextmanager
async def errors_answered(send: Send, body: Callable[[ErrorInfo], bytes] = error_body) -> AsyncGenerator[None]:
    """Answer what is raised within as a JSON error; for all that happens before an answer has begun. `body` makes one of another shape."""
    try:
        yield
    except RequestRefusedError as error:
        await send_error(send, shown_error(error), error.code, error.headers, body=body)
    except Exception as error:
        refusal = refusal_of(error)
        if refusal is None:
            await send_error(send, shown_error(error), code_of(error), body=body)
        else:
            await send_error(send, *refusal, body=body)


_STATUSES: Final[Mapping[int, Status]] = {code: status for status, code in [*HTTP_CODES.items()][::-1]}


def refusal_of(error: Exception) -> tuple[ErrorInfo, int, Iterable[tuple[str, str]]] | None:
    """Give what Starlette's and FastAPI's `HTTPException` says: known by its name and attributes, for neither need be installed."""
    code: object = getattr(error, "status_code", None)
    if (
        not isinstance(code, int)
        or not 400 <= code <= 599
        or "HTTPException" not in {class_.__name__ for class_ in type(error).__mro__}
    ):
        return None
    status = _STATUSES.get(code, "UNKNOWN")
    detail, headers = getattr(error, "detail", ""), getattr(error, "headers", None) or {}
    logger.info("a request was refused: %s", OneLine(error))
    info = public_info(status, detail) if isinstance(detail, str) else public_info(status, "", detail)
    return info, code, headers.items()


async def disconnected(receive: Receive) -> None:
    """Return when the client has gone, or nothing more can be heard of it. Nothing else may read the request's body meanwhile."""
    pause = 0.0
    try:
        while (await receive())["type"] != "http.disconnect":
            # A server has nothing more to say before; a middleware that keeps bodies may give the same one at once, again and again.
            await anyio.sleep(pause)
            pause = longer(pause)
    except Exception as error:  # a middleware's; what it is about, whoever is outside knows
        logger.info("a client is taken for gone, because receiving failed", exc_info=error)


def longer(pause: float) -> float:
    """Give the seconds to wait the next time that a `receive` has said nothing new."""
    return min(2 * pause + FIRST_PAUSE_SECONDS, LAST_PAUSE_SECONDS)


async def send_events(
    receive: Receive,
    send: Send,
    events: Subscription[Any],
    framing: Framing,
    pulse: Pulse,
    headers: Iterable[tuple[str, str]] = (),
    *,
    after: int = -1,
    can_cut: bool = True,
    before_error: Callable[[], Awaitable[None]] = checkpoint,
) -> None:
    """Answer with an entered subscription's events until the terminal one, or the client goes away, or the `pulse` ends it.

    `after`: events up to this offset are seen by the framing, and not sent. `can_cut`: whether the server takes a return without the last
    message for a response that is not whole. `before_error`: awaited before the framing is asked for the frame of an ERROR.
    """
    async with anyio.create_task_group() as tasks:
        response = _Response(send, events, framing, tasks.cancel_scope, after=after, can_cut=can_cut, before_error=before_error)
        pulse.add(response)
        try:
            # In a task of its own, which does not wake through all that is around an app for each event.
            tasks.start_soon(response.run, headers)
            # A server's `send` may say nothing when the client has gone: without this a response to nobody goes on for ever.
            await disconnected(receive)
            tasks.cancel_scope.cancel()
        finally:
            pulse.remove(response)


async def send_head(send: Send, framing: Framing, headers: Iterable[tuple[str, str]] = ()) -> None:
    """Begin an answer that streams. The framing's own headers are among those that are given."""
    # `no-transform` because compression holds back what is small, and what is small is all there is.
    ours = [
        ("content-type", framing.content_type),
        NO_SNIFFING,
        ("cache-control", "no-cache, no-transform"),
        ("x-accel-buffering", "no"),
        *headers,
    ]
    await send({"type": "http.response.start", "status": 200, "headers": _raw(ours)})


async def send_only_head(send: Send, framing: Framing, headers: Iterable[tuple[str, str]] = ()) -> None:
    """Answer a HEAD with what an answer that streams begins with."""
    await send_head(send, framing, headers)
    await send({"type": "http.response.body"})


class _Response:
    """One response that streams; see `pulse.Response`."""

    __slots__ = (
        "__weakref__",
        "_after",
        "_before_error",
        "_can_cut",
        "_cursor_prefix",
        "_events",
        "_framing",
        "_is_failed",
        "_scope",
        "_send",
        "_wait",
        "_why_ended",
        "began_at",
        "seen_at",
        "seen_sends",
        "sends",
    )

    def __init__(
        self,
        send: Send,
        events: Subscription[Any],
        framing: Framing,
        scope: CancelScope,
        *,
        after: int,
        can_cut: bool,
        before_error: Callable[[], Awaitable[None]],
    ) -> None:
        self.sends = self.seen_sends = 0
        self.began_at = self.seen_at = anyio.current_time()
        self._scope = scope
        self._send = send
        self._events = events
        self._cursor_prefix = cursor_prefix(events.id, events.life)
        self._framing = framing
        self._after = after
        self._can_cut = can_cut
        self._before_error = before_error
        self._is_failed = False
        self._wait: CancelScope | None = None
        self._why_ended = SHUTTING_DOWN

    def break_silence(self) -> None:
        if self._wait is not None:
            self._wait.cancel()

    def end(self, why: ErrorInfo) -> None:
        self._why_ended = why
        self._scope.cancel()

    async def run(self, headers: Iterable[tuple[str, str]]) -> None:
        try:
            await send_head(self._send, self._framing, headers)
        except OSError:
            self._scope.cancel()  # the client is gone (ASGI 2.4)
            return
        final_error: ErrorInfo | None = None
        is_ended = False
        try:
            final_error = await self._send_all()
            is_ended = True
        finally:
            # Also when this is cancelled, by the pulse or by a server that shuts down: then it is the last chance to say so.
            with anyio.move_on_after(LAST_FRAME_SECONDS, shield=True):
                await self._end(final_error if is_ended else self._why_ended)
        self._scope.cancel()

    async def _send_all(self) -> ErrorInfo | None:
        """Send all events; if something else than the terminal event ends them, say what."""
        try:
            # Also if it is empty: granian, and middleware that compresses, keep a head until some body comes.
            await self._write(self._framing.preamble())
            while await self._pass_on():
                pass
        except OSError:
            return None  # the client is gone (ASGI 2.4)
        except StreamManagerClosedError:
            return SHUTTING_DOWN
        except StorageError as error:
            return shown_info(error)  # whoever read the storage for all its readers has logged it
        except Exception as error:
            return shown_error(error)
        return None

    async def _pass_on(self) -> bool:
        """Send events until it has been silent for too long, and a heartbeat then; False after the terminal one."""
        got = NO_RECORDS
        try:
            with CancelScope() as wait:
                # What strikes while it waits loses nothing; what struck in a `send` might.
                while not wait.cancel_called:
                    if got is not NO_RECORDS:
                        await self._write_records(got)
                        got = NO_RECORDS  # who waits for more must cost little
                    self._wait = wait
                    got = await self._events.records()
                    self._wait = None
                    if got is NO_RECORDS:
                        return False
        finally:
            self._wait = None
        if got is not NO_RECORDS:
            await self._write_records(got)
        elif heartbeat := self._framing.heartbeat():
            await self._write(heartbeat)
        else:
            self.sends += 1
        return True

    async def _write_records(self, got: Records) -> None:
        body = self._shared(got)
        if body is None:
            await self._write_one_by_one(self._events.events_of(got))
        elif body:
            await self._write(body)

    def _shared(self, got: Records) -> bytes | None:
        """Give the frames of records, made once for all readers that want the same; None: they are not to be sent at once."""
        kind = self._framing.kind
        if kind is None or got.first <= self._after:
            return None
        body = got.made.get(kind)
        if body is None:
            if is_error(got.records[-1]) or sum(map(len, got.records)) > BODY_BYTES:
                return None
            body = got.make(kind, self._frames(self._events.events_of(got)))
        return body

    def _frames(self, events: Sequence[StreamEvent[Any]]) -> bytes:
        frame, prefix = self._framing.event, self._cursor_prefix
        return b"".join([frame(event, f"{prefix}{event.offset}") for event in events])

    async def _write_one_by_one(self, events: Sequence[StreamEvent[Any]]) -> None:
        seen = self._after + 1 - events[0].offset
        if seen > 0:
            self._frames(events[:seen])
            events = events[seen:]
        failure = [event for event in events[-1:] if event.type is StreamEventType.ERROR]
        for some in _in_bodies(events[:-1] if failure else events):
            if body := self._frames(some):
                await self._write(body)
            await checkpoint()
        if failure:
            await self._pause()
            await self._before_error()
            self._is_failed = True
            if body := self._frames(failure):
                await self._write(body)

    async def _pause(self) -> None:
        if isinstance(self._framing, GenkitFraming):
            await anyio.sleep(ERROR_PAUSE_SECONDS)

    def _write(self, body: bytes) -> Awaitable[None]:
        self.sends += 1
        return self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def _end(self, final_error: ErrorInfo | None) -> None:
        framing, is_broken = self._framing, final_error is not None
        is_cut = self._can_cut and (framing.cut_when_broken if is_broken else self._is_failed and framing.cut_when_failed)
        # A client that is cut comes back, and needs no word; Genkit's clients spin without one.
        comes_back = is_cut and (framing.replays or final_error in (SHUTTING_DOWN, TOO_LONG))
        body = b"" if final_error is None or comes_back else framing.error(final_error)
        with suppress(OSError):
            try:
                if body:
                    await self._pause()
            finally:
                # An event loop that is closing cancels the pause too.
                if body or not is_cut:
                    await self._send({"type": "http.response.body", "body": body, "more_body": is_cut})
            if is_cut and (body or self._is_failed):
                # A client may forget what it has not read yet when it is cut (`fetch` may), and this is the last word.
                await anyio.sleep(ERROR_PAUSE_SECONDS)


def _in_bodies(events: Sequence[StreamEvent[Any]]) -> Iterator[Sequence[StreamEvent[Any]]]:
    """Give events a few at a time, as many as are sent at once."""
    first = size = 0
    for end, event in enumerate(events, 1):
        size += len(event.data)
        if size >= BODY_BYTES:
            yield events[first:end]
            first, size = end, 0
    yield events[first:]


def _raw(headers: Iterable[tuple[str, str]]) -> list[tuple[bytes, bytes]]:
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
