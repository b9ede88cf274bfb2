"""Readers: those who wait for what is appended, by long-poll or server-sent events (5.7, 5.8)."""

import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Final

import anyio

from ..errors import StorageError, StreamNotFoundError
from ..http.response import Receive, disconnected, shown_error
from ..http.shutdown import Shutdown
from . import _messages, _rules
from ._answering import Answering, DurableStreamsLimits
from ._live import Live, Piece
from ._requests import Reading, RefusedError, cursor_after
from ._rules import Answer, Stream
from ._streams import Streams

HEARTBEAT_SECONDS: Final = 15.0
STALLED_SECONDS: Final = 10.0
"""How long after its end a response waits for a client that does not read."""


class Readers:
    """The live readers of an app: how many there are, and whether they are to end."""

    def __init__(self, limits: DurableStreamsLimits, shutdown: Shutdown) -> None:
        self.limits = limits
        self.are_ending = False
        self._shutdown = shutdown
        self._count = 0

    @contextmanager
    def one_more(self) -> Generator[None]:
        """Count one. RefusedError: there are as many as there may be."""
        if self._count >= self.limits.max_readers:
            raise RefusedError(429, "there are as many live readers as there may be", headers=(("retry-after", "1"),))
        self._count += 1
        try:
            with (
                self._shutdown.listening(),
                self._shutdown.responding(),
            ):  # a server may have put its signal handlers on top of ours
                yield
        finally:
            self._count -= 1


async def long_poll(
    answering: Answering, there: Streams, readers: Readers, stream: Stream, position: int, reading: Reading
) -> None:
    """Answer with what comes behind the end of a stream, or that nothing did."""
    waited: list[Piece | Stream | None] = []
    async with _while_connected(answering.receive):
        waited.append(await _wait(there, readers, stream, position))
    match waited:
        case [Piece() as piece]:
            await answering.page(piece.stream, position, piece.records, reading, is_now=False)
        case [Stream() as newest]:
            is_over = newest.state.is_closed and newest.tail <= position
            await answering.nothing(newest, None if is_over else cursor_after(reading.cursor, time.time()))
        case [None]:
            gone = _rules.absence(await there.find(stream.state.path), there.storage.time())
            await answering.send(gone or Answer(404, reason="the stream was deleted, and another one is there"))
        case _:
            pass  # the client is gone


async def _wait(there: Streams, readers: Readers, stream: Stream, position: int) -> Piece | Stream | None:
    """Wait for what comes behind a position: give that, or the stream when nothing came in time; None: it is gone."""
    newest: Stream | None = stream
    with anyio.move_on_after(readers.limits.long_poll.total_seconds()):
        async with there.log(stream.state.path).following() as live:
            while True:
                changes, newest = live.changes, live.newest
                if live.is_over or newest is None or newest.state.life != stream.state.life:
                    return _unless_more(newest, stream, position) if readers.are_ending else None
                if newest.tail > position:
                    return live.piece(position) or Piece(position, await there.read(newest, position), newest)
                if newest.state.is_closed or readers.are_ending:
                    return newest
                with anyio.move_on_after(renewal_after(newest)):
                    await changes.wait()
                    continue
                if _rules.is_expired(newest, there.storage.time()):
                    return None
                await there.renew(newest)  # a stream with a live reader does not expire (5.1)
    return _unless_more(newest, stream, position)


def renewal_after(stream: Stream) -> float:
    """Give after how many seconds whoever waits for a stream has to put off its expiry."""
    ttl = stream.state.ttl
    return math.inf if ttl is None else max(ttl / 2, 0.1)


def _unless_more(newest: Stream | None, stream: Stream, position: int) -> Stream | None:
    """Give the newest stream, or, if it has what its reader would skip, the one that ended where its reader is."""
    is_same = newest is not None and newest.state.life == stream.state.life
    return stream if newest is not None and not (is_same and newest.tail <= position) else newest


@asynccontextmanager
async def _while_connected(receive: Receive, until: float = math.inf) -> AsyncGenerator[None]:
    """Leave the block when the client goes, or at a time of the event loop's. What is raised in it comes bare."""
    failure: Exception | None = None
    async with anyio.create_task_group() as tasks:
        tasks.cancel_scope.deadline = until

        async def leave() -> None:
            await disconnected(receive)
            tasks.cancel_scope.cancel()

        tasks.start_soon(leave)
        try:
            yield
        except Exception as error:
            failure = error
        tasks.cancel_scope.cancel()
    if failure is not None:
        raise failure


class SSE:
    """A response of server-sent events (5.8). Each data event is followed by a control event, which says where its reader is."""

    def __init__(
        self, answering: Answering, there: Streams, readers: Readers, stream: Stream, position: int, reading: Reading
    ) -> None:
        self._answering = answering
        self._there = there
        self._readers = readers
        self._stream = stream
        self._position = position
        self._reading = reading
        self._is_told = False  # its reader knows where it is
        self._takes_all = False  # also the beginning of a character
        self._has_ended = False  # its reader knows that nothing more comes
        self._ends_at = 0.0

    async def run(self, records: Sequence[bytes]) -> None:
        """Send what there is, and what comes, until the stream is closed, or it is time to end."""
        headers = [
            ("content-type", "text/event-stream"),
            ("cache-control", "no-cache, no-transform"),
            ("x-accel-buffering", "no"),
        ]
        if not _messages.is_text(self._stream.state.content_type):
            headers.append(("stream-sse-data-encoding", "base64"))
        self._ends_at = anyio.current_time() + self._readers.limits.sse.total_seconds()
        with suppress(OSError):  # the client is gone (ASGI 2.4)
            await self._answering.start(200, headers)
            # Whoever does not read what is sent is no reader for longer than others are.
            async with _while_connected(self._answering.receive, self._ends_at + STALLED_SECONDS):
                try:
                    await self._follow(records)
                except StorageError as error:
                    shown_error(error)  # its reader comes back, and is told
                except (StreamNotFoundError, RefusedError):
                    pass  # what came next is gone
                # It ends like that for whoever is to come back, too: only a control event says that a stream is closed.
                await self._answering.write(b"", more=False)

    async def _follow(self, records: Sequence[bytes]) -> None:
        if records:
            await self._give(Piece(self._position, records, self._stream), self._stream)
            if self._has_ended:
                return
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
            if await self._give(piece, newest):
                return not self._has_ended
        elif newest.state.is_closed:
            await self._say(newest)
            return False
        elif not self._is_told:
            await self._say(newest)
        if live.is_over or self._readers.are_ending:
            return False
        return await self._wait(changes.wait, newest)

    async def _wait(self, changed: Callable[[], Awaitable[object]], newest: Stream) -> bool:
        """Wait for a change, as long as may be; False: this response has lasted long enough, or the stream has."""
        pause = min(self._ends_at - anyio.current_time(), HEARTBEAT_SECONDS, renewal_after(newest))
        with anyio.move_on_after(pause):
            await changed()
            return True
        if self._ends_at <= anyio.current_time() or _rules.is_expired(newest, self._there.storage.time()):
            return False
        await self._there.renew(newest)  # a stream with a live reader does not expire (5.1)
        await self._answering.write(b":\n\n")
        self._takes_all = True
        return True

    async def _give(self, piece: Piece, newest: Stream) -> bool:
        """Send some records; False: it is better to wait for more."""
        state = piece.stream.state
        is_over = newest.state.is_closed or state.is_closed
        if not (self._takes_all or is_over):
            whole = await self._whole(piece, newest)
            if whole is None:
                return False
            piece = whole
        is_whole = piece.end >= max(newest.tail, piece.stream.tail)
        is_over = is_whole and is_over
        cursor = None if is_over else cursor_after(self._reading.cursor, time.time())
        key = (cursor, is_whole, is_over)
        body = piece.made.get(key)
        if body is None:
            offset = _rules.offset_of(state, piece.end)
            control = _messages.control_event(offset, cursor, is_up_to_date=is_whole, is_closed=is_over)
            body = piece.made[key] = _messages.data_event(piece.records, state.content_type) + control
        await self._answering.write(body)
        self._position, self._is_told, self._takes_all, self._has_ended = piece.end, True, False, is_over
        return True

    async def _whole(self, piece: Piece, newest: Stream) -> Piece | None:
        """Give so many records that they do not end within a character, which an event cannot; None: there are not enough."""
        kind = piece.stream.state.content_type
        count = _messages.whole_text(piece.records, kind)
        if count == len(piece.records):
            return piece
        if not count and piece.end < newest.tail:
            piece = Piece(piece.first, await self._there.read(newest, piece.first), newest)
            count = _messages.whole_text(piece.records, kind)
        return Piece(piece.first, piece.records[:count], piece.stream) if count else None

    async def _say(self, stream: Stream) -> None:
        is_over = stream.state.is_closed
        cursor = None if is_over else cursor_after(self._reading.cursor, time.time())
        offset = _rules.offset_of(stream.state, self._position)
        await self._answering.write(_messages.control_event(offset, cursor, is_up_to_date=True, is_closed=is_over))
        self._is_told = True
