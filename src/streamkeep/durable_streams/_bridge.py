"""Bridge: a manager's own streams as clients of the Durable Streams protocol read them, as JSON messages. It writes nothing.

An event is one message, so positions are the offsets of events. Rules of life, ownership and expiry are the manager's; here is only how
they are said in this protocol.
"""

import logging
import re
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final, Generic, TypeVar

import anyio

from .._feed import Records
from .._info import StreamInfo
from .._manager import StreamManager
from .._subscription import Subscription
from ..errors import (
    InvalidArgumentError,
    OffsetOutOfRangeError,
    StorageError,
    StreamManagerClosedError,
    StreamNotFoundError,
)
from ..events import StreamEvent, StreamEventType, event_of, is_terminal
from ..http.access import REQUEST, Access, Authorize, owner_of
from ..http.app import path_below
from ..http.framing import error_body
from ..http.mounted import Mounted
from ..http.response import Receive, Scope, Send, disconnected, headers_of
from ..http.shutdown import shutdown_of
from . import _messages
from ._answering import Answering, DurableStreamsLimits, Manner, is_among
from ._readers import HEARTBEAT_SECONDS, STALLED_SECONDS, Readers
from ._requests import Reading, RefusedError, cursor_after, reading_of
from ._rules import Answer, Headers

logger: Final = logging.getLogger("streamkeep")

T = TypeVar("T")

METHODS: Final = "GET, HEAD, OPTIONS"
JSON: Final = "application/json"
PAGE_BYTES: Final = 1 << 20
"""How much one answer of a catch-up read has, about: its reader asks for what is behind it."""
LAST_SECONDS: Final = 2.0
"""How long the end of a response waits for a client that does not read."""
LIFE_CHARACTERS: Final = 8
LATEST_SECONDS: Final = 253_402_300_799.0
"""The last second that RFC 3339 can say."""
_OFFSET: Final = re.compile(r"([0-9]{16})_([0-9a-f]{8})")


class Bridge(Mounted):
    """Serves a manager's streams by the Durable Streams protocol, to be read only; an ASGI app. See `bridge`."""

    _lifespan_hint = "the manager is entered by the outermost app"

    def __init__(
        self,
        streams: StreamManager,
        *,
        authorize: Authorize | None = None,
        limits: DurableStreamsLimits | None = None,
        cors: str | None = "*",
    ) -> None:
        self.streams: Final = streams
        self._authorize = authorize
        self._limits = limits or DurableStreamsLimits()
        self._manner = Manner(self._limits, cors, "private", None)
        self._shutdown = shutdown_of(streams)
        self._readers = Readers(self._limits, self._shutdown)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        answering = Answering(self._manner, scope, receive, send)
        try:
            match scope["method"]:
                case "OPTIONS":
                    await answering.preflight(METHODS)
                case "HEAD":
                    await answering.send(Answer(200, _head_of(await self._admit(scope))))
                case "GET":
                    await self._read(answering)
                case _:
                    await answering.refuse(_READ_ONLY)
        except Exception as error:
            if not answering.has_begun:
                await answering.refuse(error)
            elif not isinstance(error, OSError):  # which says that the client is gone (ASGI 2.4)
                logger.exception("a response was cut")

    async def _admit(self, scope: Scope) -> StreamInfo:
        """Give the stream that is asked for. StreamNotFoundError: there is none, for whoever asks."""
        info: StreamInfo | None = None
        with suppress(StreamNotFoundError, InvalidArgumentError):
            info = await self.streams.info(path_below(scope).removeprefix("/"))
        await owner_of(self._authorize, Access("read", scope, headers_of(scope), info, {}, scope.get(REQUEST)))
        if info is None:
            raise StreamNotFoundError("stream not found")
        return info

    async def _read(self, answering: Answering) -> None:
        reading = reading_of(answering.scope.get("query_string", b""))
        info = await self._admit(answering.scope)
        position = position_of(info, reading.offset)
        if reading.live == "sse":
            with self._readers.one_more():
                await self._sse(answering, info, position, reading)
        elif reading.live == "" or position < info.tail:
            records = await self._stored(info, position) if position < info.tail else ()
            await self._page(answering, info, position, records, reading)
        elif info.status != "open":
            await answering.send(Answer(204, (*_at(info, position), ("stream-closed", "true"))))
        else:
            await self._long_poll(answering, info, position, reading)

    def _subscribe(self, info: StreamInfo, position: int, *, follow: bool = True) -> Subscription[Any]:
        return self.streams.subscribe(info.id, position - 1 if position else None, follow=follow)

    async def _stored(self, info: StreamInfo, position: int) -> Sequence[bytes]:
        async with self._subscribe(info, position, follow=False) as events:
            _check_life(info, events)
            records: list[bytes] = []
            size = 0
            while size < PAGE_BYTES and (got := await events.records()):
                records += got.records
                size += sum(map(len, got.records))
            return records

    async def _page(
        self, answering: Answering, info: StreamInfo, position: int, records: Sequence[bytes], reading: Reading
    ) -> None:
        """Answer with what is behind a position."""
        end = position + len(records)
        is_over = _ends(records) or (not records and info.status != "open")
        headers = [("content-type", JSON), ("stream-next-offset", offset_of(info, end)), ("vary", "authorization, cookie")]
        if end >= info.tail:
            headers.append(("stream-up-to-date", "true"))
        if is_over:
            headers.append(("stream-closed", "true"))
        elif reading.live:
            headers.append(("stream-cursor", self._cursor(reading)))
        if reading.offset == "now":  # which is another place at each time, so nobody keeps the answer
            await answering.send(Answer(200, tuple(headers)), _messages.body_of(messages_of(records, position), json=True))
            return
        etag = f'"{info.life}:{position}:{end}{":c" if is_over else ""}"'
        headers.append(("etag", etag))
        # What is empty, of an open stream, is so for no time. Who asks next in the same browser may be somebody else (`vary`).
        cache = "private, max-age=60, stale-while-revalidate=300" if records or is_over else "no-cache"
        if is_among(etag, answering.headers.get("if-none-match", "")):
            await answering.send(Answer(304, tuple(headers)), cache=cache)
            return
        await answering.send(Answer(200, tuple(headers)), _messages.body_of(messages_of(records, position), json=True), cache)

    async def _long_poll(self, answering: Answering, info: StreamInfo, position: int, reading: Reading) -> None:
        async def wait() -> Records | None:
            got: Records | None = None
            async with self._subscribe(info, position) as events:
                _check_life(info, events)
                with anyio.move_on_after(self._limits.long_poll.total_seconds()):
                    got = await events.records()
            return got

        waiting = _Doing(wait)
        with self._readers.one_more():
            await waiting.until(lambda: disconnected(answering.receive), self._shutdown.time_to_end)
        got = waiting.result
        if got is None:  # nothing came in time
            await answering.send(Answer(204, (*_at(info, position), ("stream-cursor", self._cursor(reading)))))
        elif got:
            await self._page(answering, info, position, got.records, reading)
        else:
            await answering.send(Answer(204, (*_at(info, position), ("stream-closed", "true"))))

    async def _sse(self, answering: Answering, info: StreamInfo, position: int, reading: Reading) -> None:
        async def follow() -> None:
            async with self._subscribe(info, position) as events:
                _check_life(info, events)
                await answering.start(200, _EVENT_STREAM)
                # Whoever is told no end comes back, and is told why there is no more.
                with suppress(StreamNotFoundError, OffsetOutOfRangeError, StreamManagerClosedError, StorageError):
                    await self._follow(answering, info, events, position, reading)

        following = _Doing(follow)
        # Whoever does not read what is sent is no reader for longer than others are.
        longest = partial(anyio.sleep, self._limits.sse.total_seconds() + STALLED_SECONDS)
        await following.until(lambda: disconnected(answering.receive), self._shutdown.time_to_end, longest)
        if not answering.has_begun:
            raise StreamManagerClosedError("the server is shutting down")
        with anyio.move_on_after(LAST_SECONDS):
            await answering.write(b"", more=False)

    async def _follow(
        self, answering: Answering, info: StreamInfo, events: Subscription[Any], position: int, reading: Reading
    ) -> None:
        """Send what there is, and what comes, until the stream has ended or it is time to end."""
        ends_at = anyio.current_time() + self._limits.sse.total_seconds()
        is_told = False  # that it has all there is
        while True:
            if not is_told and not events.lag and info.status == "open":
                is_told = True
                await answering.write(self._control(info, position, reading, is_whole=True, is_over=False))
            rest = ends_at - anyio.current_time()
            with anyio.move_on_after(min(rest, HEARTBEAT_SECONDS)) as waiting:
                got = await events.records()
            if waiting.cancelled_caught:
                if rest <= HEARTBEAT_SECONDS:
                    return
                await answering.write(b":\n\n")
                continue
            if not got:
                await answering.write(self._control(info, position, reading, is_whole=True, is_over=True))
                return
            position = got.end
            is_over, is_told = _ends(got.records), not events.lag
            await answering.write(self._event(info, got, reading, is_whole=is_told, is_over=is_over))
            if is_over:
                return

    def _event(self, info: StreamInfo, got: Records, reading: Reading, *, is_whole: bool, is_over: bool) -> bytes:
        """Give records as one event, and the control event behind it. Readers that are equally far share it."""
        control = self._control(info, got.end, reading, is_whole=is_whole, is_over=is_over)
        data = got.made.get(Bridge)
        if data is None:
            data = got.make(Bridge, _messages.data_event(messages_of(got.records, got.first), JSON))
        return data + control

    def _control(self, info: StreamInfo, position: int, reading: Reading, *, is_whole: bool, is_over: bool) -> bytes:
        cursor = None if is_over else self._cursor(reading)
        return _messages.control_event(offset_of(info, position), cursor, is_up_to_date=is_whole, is_closed=is_over)

    def _cursor(self, reading: Reading) -> str:
        return cursor_after(reading.cursor, self.streams.storage.time())


def bridge(
    streams: StreamManager,
    *,
    authorize: Authorize | None = None,
    limits: DurableStreamsLimits | None = None,
    cors: str | None = "*",
) -> Bridge:
    """Give an ASGI app through which clients of the Durable Streams protocol read a manager's streams; mount it anywhere.

        app.mount("/answers", bridge(streams, authorize=who_asks))

    `GET /answers/ID` is a stream of JSON messages, one an event, with one field each: `{"chunk": …}`; at its end `{"result": …}`, or
    `{"error": {"status", "message", "details"}}`, and the stream is closed. Of a stream that is gone on with when its writer has died also
    `{"recovering": {"attempt": 1}}` and `{"restarted": {}}`: what came before the latter is superseded, and is not read from the start any
    more. All reads of the protocol: catch-up, long-poll and server-sent events. What would write is refused with 405.

    Args:
        streams: the manager, which has to be running.
        authorize: says who asks, and rejects who may not, as for `StreamsHTTP`: a stream of somebody else does not exist. None: everybody
            may read what nobody owns.
        limits: `max_readers`, `long_poll` and `sse` count here.
        cors: whom browsers let read the answers (`Access-Control-Allow-Origin`), without cookies; None: only pages of this origin.
    """
    return Bridge(streams, authorize=authorize, limits=limits, cors=cors)


# Rules


def offset_of(info: StreamInfo, position: int) -> str:
    """Give the offset of a position. All are equally long, so that they have the order of positions."""
    return f"{position:016d}_{info.life[:LIFE_CHARACTERS]}"


def position_of(info: StreamInfo, offset: str) -> int:
    """Give the position of an offset. RefusedError: the stream has not got it."""
    if offset == "-1":
        return info.superseded
    if offset == "now":
        return info.tail
    named = _OFFSET.fullmatch(offset)
    if named is None or (named[2] == info.life[:LIFE_CHARACTERS] and int(named[1]) > info.tail):
        raise RefusedError(400, "the stream has no such offset")
    if named[2] != info.life[:LIFE_CHARACTERS]:
        raise RefusedError(410, "the offset is of another stream, such as one that was here before")
    return int(named[1])


def messages_of(records: Sequence[bytes], first: int) -> Sequence[bytes]:
    """Give records, the first of which has this offset, as JSON messages. StorageCorruptError: one is none of ours."""
    return [_message_of(record, offset) for offset, record in enumerate(records, first)]


def _message_of(record: bytes, offset: int) -> bytes:
    event: StreamEvent[object] = event_of(record, offset)
    match event.type:
        case StreamEventType.CHUNK:
            return b'{"chunk":%b}' % event.data
        case StreamEventType.DONE:
            return b'{"result":%b}' % event.data
        case StreamEventType.ERROR:
            return error_body(event.error)
        case StreamEventType.RECOVERING | StreamEventType.RESTARTED:
            return b'{"%b":%b}' % (event.type.encode(), event.data)


def _ends(records: Sequence[bytes]) -> bool:
    return bool(records) and is_terminal(records[-1])


def _check_life(info: StreamInfo, events: Subscription[Any]) -> None:
    if events.life != info.life:
        raise StreamNotFoundError("the stream was deleted, and another one has its id now")


def _at(info: StreamInfo, position: int) -> Headers:
    return ("stream-next-offset", offset_of(info, position)), ("stream-up-to-date", "true")


def _head_of(info: StreamInfo) -> Headers:
    """Give what is known of a stream, as headers."""
    headers = [("content-type", JSON), ("stream-next-offset", offset_of(info, info.tail))]
    if info.status != "open":
        headers.append(("stream-closed", "true"))
        if info.expires_at <= LATEST_SECONDS:
            expires = datetime.fromtimestamp(info.expires_at, UTC).isoformat(timespec="milliseconds")
            headers.append(("stream-expires-at", expires.replace("+00:00", "Z")))
    return tuple(headers)


_READ_ONLY: Final = RefusedError(405, "this stream is written elsewhere; here it is read", headers=(("allow", METHODS),))
_EVENT_STREAM: Final = (
    ("content-type", "text/event-stream"),
    ("cache-control", "no-cache, no-transform"),
    ("x-accel-buffering", "no"),
)


# One request


class _Doing(Generic[T]):
    """Something that is done until one of some others returns. `result`: what it gave; None: it was ended."""

    def __init__(self, work: Callable[[], Awaitable[T]]) -> None:
        self.result: T | None = None
        self._work = work

    async def until(self, *others: Callable[[], Awaitable[None]]) -> None:
        """Do it. Raises what it raises, as it is."""
        failures: list[Exception] = []
        async with anyio.create_task_group() as tasks:

            async def wait_for(other: Callable[[], Awaitable[None]]) -> None:
                await other()
                tasks.cancel_scope.cancel()

            for other in others:
                tasks.start_soon(wait_for, other)
            try:
                self.result = await self._work()
            except Exception as failure:  # in a group it would be another one
                failures.append(failure)
            tasks.cancel_scope.cancel()
        if failures:
            raise failures[0]
