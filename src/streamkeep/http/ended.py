"""Ended: how a run ended and what it produced, for whoever wants to be told."""

from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, Future
from contextvars import Context
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import anyio

from .._background import Loop, loop_here
from .._input import StreamInput
from .._manager import StreamManager
from ..errors import StorageError, StreamCompletedError, StreamkeepError, StreamManagerClosedError, StreamNotFoundError
from ..events import ErrorInfo, StreamEvent, StreamEventType, shown_info

STORING_SECONDS: Final = 2.0
"""How long is waited for a slow storage, before `on_end` is told what is known."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a run ended, for `on_end`.

    Attributes:
        stream: the stream's id.
        key: what it was opened under; empty if under nothing.
        status: `done` or `error`.
        output: the result, if it is done.
        error: why it failed, if it did. Its `internal` has the producer's exception in full: keep it from clients.
        metadata: what is kept with the stream, its `owner` and `route` among it.
        is_stored: whether this is the end that readers find. Not so when the storage has failed, and when the stream was deleted
            (NOT_FOUND) or taken over by another writer, who goes on (ABORTED).
    """

    stream: str
    key: str
    status: Literal["done", "error"]
    output: Any
    error: ErrorInfo | None
    metadata: Mapping[str, str]
    is_stored: bool
    _streams: StreamManager = field(repr=False)
    _tail: int | None = field(repr=False)
    _loop: Loop = field(repr=False, default_factory=loop_here)

    def chunks_here(self) -> list[Any]:
        """Do what `chunks` does, and wait for it: for an `on_end` that does not await and runs in a thread, as with Flask and Django.

        RuntimeError: this is called in the event loop, which it would wait for; await `chunks` there.
        """
        if self._loop.is_here():
            raise RuntimeError(
                "what does not await must not be called in the event loop that it waits for: `await ended.chunks()`"
            )
        read: Future[list[Any]] = Future()

        async def run() -> None:
            try:
                read.set_result(await self.chunks())
            except Exception as error:
                read.set_exception(error)

        try:
            self._loop.call(lambda: self._loop.spawn(run, Context(), read.cancel))
        except RuntimeError:
            read.cancel()  # the event loop has ended
        try:
            return read.result()
        except CancelledError:
            raise StreamManagerClosedError("the stream manager is closed") from None

    async def chunks(self) -> list[Any]:
        """Read the chunks that were produced, whole or partial, from the storage: what readers were given.

        It may be much; `streams.subscribe(ended.stream)` gives it one by one. Raises StreamNotFoundError when it is kept no more,
        StorageError, StreamManagerClosedError.
        """
        if self._tail is None:
            raise StreamNotFoundError("the stream was deleted")
        chunks: list[Any] = []
        reached = 0
        async with self._streams.subscribe(self.stream) as events:
            # An end that is not stored is not waited for.
            while (self.is_stored or reached < self._tail) and (batch := await events.batch()):
                reached = batch[-1].offset + 1
                for event in batch:
                    if event.type is StreamEventType.RESTARTED:
                        chunks.clear()
                    elif event.type is StreamEventType.CHUNK and (self.is_stored or event.offset < self._tail):
                        chunks.append(event.chunk)
        return chunks


OnEnd = Callable[[Ended], object]
"""A function, or a coroutine function, that is told once how a run has ended."""


async def ended_of(streams: StreamManager, stream: StreamInput) -> Ended:
    """Say how a stream has ended, having waited a moment for its end to be stored. Its input takes no more."""
    why: StreamkeepError | None = None
    with anyio.move_on_after(STORING_SECONDS) as waiting:
        try:
            await stream.flush()
        except StreamkeepError as error:
            why = error
    end = stream.end
    is_stored = end is not None and not waiting.cancelled_caught and not isinstance(why, StorageError)
    if isinstance(why, StreamCompletedError) and end is None:
        end = await _end_by_others(streams, stream.id)
        is_stored = end is not None
    tail = None if isinstance(why, StreamNotFoundError) else stream.tail
    if end is not None and end.type is StreamEventType.DONE:
        return Ended(stream.id, stream.key, "done", end.output, None, stream.metadata, is_stored, streams, tail)
    return Ended(stream.id, stream.key, "error", None, _error_of(end, why), stream.metadata, is_stored, streams, tail)


def _error_of(end: StreamEvent[Any] | None, why: StreamkeepError | None) -> ErrorInfo:
    if end is not None:
        return end.error
    return ErrorInfo("ABORTED", "the producer released the stream") if why is None else shown_info(why)


async def _end_by_others(streams: StreamManager, stream: str) -> StreamEvent[Any] | None:
    with anyio.move_on_after(STORING_SECONDS):
        try:
            tail = (await streams.info(stream)).tail
            async with streams.subscribe(stream, tail - 2 if tail > 1 else None) as events:
                last = (await events.batch())[-1]
        except (StreamkeepError, IndexError):  # it is kept no more, say
            return None
        return last if last.is_terminal else None
    return None
