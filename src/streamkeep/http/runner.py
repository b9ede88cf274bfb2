"""Runner: producers that outlive the requests that started them.

Each runs in a task of its own until it is done, fails, is stopped or the runner is left. Whatever happens to one, its stream
gets a terminal event, and the others go on. It decides nothing about requests or frames.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from contextvars import copy_context
from datetime import timedelta
from functools import partial
from types import TracebackType
from typing import Final, Self

import anyio
from anyio import CancelScope

from .._background import Background, is_asyncio_here, not_ours
from .._input import StreamInput
from .._manager import StreamManager
from ..errors import (
    InvalidArgumentError,
    LimitExceededError,
    PublicError,
    StorageError,
    StreamkeepError,
    StreamManagerClosedError,
)
from ..events import ErrorInfo, error_info, hidden_error

logger: Final = logging.getLogger("streamkeep")

Producer = Callable[[StreamInput, anyio.Event], Awaitable[object]]
"""Writes chunks to the stream and returns the output, or raises. The event is set when it should stop; a little later it is
cancelled."""

SHUT_DOWN: Final = ErrorInfo("ABORTED", "the server was shut down before the stream was completed")
DIED: Final = ErrorInfo("ABORTED", "the producer was cancelled before the stream was completed")

MAX_PRODUCERS: Final = 1_000
SLOW_SECONDS: Final = 0.005
MOST_QUEUED: Final = 32
END_SECONDS: Final = 5.0
END_RETRY_SECONDS: Final = 0.2
SAVE_SECONDS: Final = 5.0
"""How long a producer that is cancelled may take for what it does at its end."""


class ChunkWriter:
    """Stores a producer's chunks: one by one where that is quick; where the storage is slow, as many together as have come meanwhile.

    So a producer is never held up for longer than a slow storage needs for some chunks, instead of for each.
    """

    def __init__(self, stream: StreamInput) -> None:
        self._stream = stream
        self._is_slow = False
        self._queued = 0

    async def write(self, chunk: object) -> None:
        """Store a chunk, or queue it behind what is being stored. Raises as `StreamInput.write` and `flush` do."""
        if self._is_slow:
            try:
                self._stream.write_soon(chunk)
            except LimitExceededError:
                await self._stream.flush()  # the queue may be shorter than MOST_QUEUED
                self._stream.write_soon(chunk)
            self._queued += 1
            if self._queued < MOST_QUEUED:
                return
        began_at = anyio.current_time()
        await (self._stream.flush() if self._is_slow else self._stream.write(chunk))
        self._is_slow = anyio.current_time() - began_at > SLOW_SECONDS
        self._queued = 0


class _Run:
    """One producer at work."""

    def __init__(self, stream: StreamInput) -> None:
        self.stream = stream
        self.stop = anyio.Event()
        self.scope = CancelScope()
        self.listening = CancelScope()
        self.over = anyio.Event()
        self.end_as = DIED
        self.task: asyncio.Task[object] | None = None

    def cancel(self) -> None:
        """Cancel it. On asyncio once, so that what a producer does at its end (`finally: await save(partial)`) is not cancelled as well."""
        if self.task is not None:
            self.task.cancel()
        else:
            self.scope.cancel()


class Runner:
    """Runs producers apart from requests; an async context manager.

    Leaving it waits for the producers, at most `drain`; those that are left are told to stop, then cancelled, and their streams
    end with ABORTED.

    Args:
        streams: a running manager.
        drain: how long to wait for producers when the runner is left.
        stop_grace: how long a producer that was told to stop may take before it is cancelled. Then it has five seconds more for what it
            does at its end (on asyncio, where one cancellation is one).
        max_producers: how many may run at a time. A server bounds what lives as long as its connection; these do not.

    Attributes:
        drained: set when it has been drained.
    """

    def __init__(
        self,
        streams: StreamManager,
        *,
        drain: timedelta = timedelta(seconds=10),
        stop_grace: timedelta = timedelta(seconds=1),
        max_producers: int = MAX_PRODUCERS,
    ) -> None:
        self._streams = streams
        self._drain_seconds = drain.total_seconds()
        self._stop_seconds = stop_grace.total_seconds()
        self._max_producers = max_producers
        self._tasks = Background()
        self._is_entered = False
        self._starting = 0
        self._runs: set[_Run] = set()
        self._unfinished: set[StreamInput] = set()
        self._closing = False
        self.drained = anyio.Event()

    async def __aenter__(self) -> Self:
        self._tasks.begin()
        self._is_entered = True
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            await self.drain()
        finally:
            self.drained.set()
            self._is_entered = False
            self._tasks.stop()  # nobody is left, unless this has been cancelled
        with anyio.move_on_after(END_SECONDS, shield=True):
            await self._tasks.wait()

    @property
    def is_running(self) -> bool:
        """Whether it has been entered, and takes producers."""
        return self._is_entered and not self._closing

    async def start(
        self, stream: str, produce: Producer, *, metadata: Mapping[str, str] | None = None, ttl: timedelta | None = None
    ) -> None:
        """Open a stream and run its producer in the background.

        Raises as `StreamManager.open` does, StreamManagerClosedError when the runner is not running or is being left, and
        LimitExceededError when `max_producers` run.
        """
        self._check_running()
        self._check_room()
        self._starting += 1
        try:
            stream_input = await self._streams.open(stream, metadata=metadata, ttl=ttl)
        finally:
            self._starting -= 1
        if not self.is_running:
            await stream_input.error(SHUT_DOWN)
        self._check_running()
        self.adopt(stream_input, produce)

    def adopt(self, stream: StreamInput, produce: Producer) -> None:
        """Run the producer of a stream that is open already, however many run, and see to its end."""
        run = _Run(stream)
        self._runs.add(run)
        what = f"the producer of stream {stream.id}"
        self._tasks.start(partial(self._run, run, produce), what, copy_context(), partial(self._forget, run))
        self._tasks.start(partial(self._stop_when_unwanted, run), what)

    def drain_at(self, shutdown: anyio.Event) -> None:
        """Drain when an event is set, without waiting to be left."""
        self._tasks.start(partial(self._drain_at, shutdown), "draining")

    async def drain(self) -> None:
        """Take no more producers, wait for those that run, and end those that take too long. It can be called again."""
        self._closing = True
        with anyio.move_on_after(self._drain_seconds):
            await self._all_over()
        for run in tuple(self._runs):
            run.end_as = SHUT_DOWN
            run.stop.set()
        with anyio.move_on_after(self._stop_seconds):
            await self._all_over()
        for run in tuple(self._runs):
            run.cancel()
        with anyio.move_on_after(SAVE_SECONDS):
            await self._all_over()
        for run in tuple(self._runs):
            run.scope.cancel()
        with anyio.move_on_after(2 * END_SECONDS, shield=True):
            await self._all_over()
        for run in self._runs:
            logger.error("stream %s: its producer does not end, whatever is done, and is left alone", run.stream.id)
        self.drained.set()

    async def _drain_at(self, shutdown: anyio.Event) -> None:
        await shutdown.wait()
        if self._runs:
            sentence = "the server is stopping; its streams in flight, %d, may take %g seconds to end"
            logger.warning(sentence, len(self._runs), self._drain_seconds)
        await self.drain()

    def _check_running(self) -> None:
        if not self.is_running:
            raise StreamManagerClosedError("the server is shutting down" if self._closing else "the runner is not running")

    def _check_room(self) -> None:
        if len(self._runs) + self._starting >= self._max_producers:
            raise LimitExceededError(f"{self._max_producers} streams are being produced here; try again later")

    async def _all_over(self) -> None:
        for run in tuple(self._runs):
            await run.over.wait()

    async def _run(self, run: _Run, produce: Producer) -> None:
        run.task = asyncio.current_task() if is_asyncio_here() else None
        try:
            with run.scope:
                await self._produce(run, produce)
        except anyio.get_cancelled_exc_class():
            # From outside, or raised by the producer itself. The task ends here either way; let out, it would end all others.
            while run.task is not None and run.task.cancelling():
                run.task.uncancel()
            logger.info("stream %s: its producer was cancelled", run.stream.id)
        except not_ours():
            raise
        except BaseException:
            logger.exception("stream %s could not be completed", run.stream.id)
        finally:
            with anyio.move_on_after(END_SECONDS, shield=True):
                await self._end_anyway(run)

    def _forget(self, run: _Run) -> None:
        self._runs.discard(run)
        run.listening.cancel()
        run.over.set()

    async def _end_anyway(self, run: _Run) -> None:
        """Tell readers of the end, whatever has happened. If even that fails, it is released or abandoned in the end."""
        try:
            await self._end(run.stream, lambda: run.stream.error(run.end_as))
        except Exception:
            logger.exception("stream %s could not be ended", run.stream.id)

    async def _produce(self, run: _Run, produce: Producer) -> None:
        stream = run.stream
        try:
            output = await produce(stream, run.stop)
            await self._end(stream, lambda: stream.done(output))
        except not_ours():
            raise
        except BaseException as error:  # what native libraries raise may be no Exception
            # What a producer raises because it was told to stop says less than why it was told.
            failure = run.end_as if run.stop.is_set() else _told_to_readers(error)
            if isinstance(error, PublicError):
                logger.info("stream %s failed: %s", stream.id, error)
            else:
                expected = run.stop.is_set() or stream.cancelled.is_set()
                logger.log(logging.DEBUG if expected else logging.ERROR, "stream %s failed", stream.id, exc_info=error)
            await self._end(stream, lambda: stream.error(failure))

    async def _end(self, stream: StreamInput, end: Callable[[], Awaitable[None]]) -> None:
        """Complete the stream if it is not, in spite of a storage that fails for a while."""
        if stream.is_closed:
            return
        try:
            await end()
        except StorageError as error:
            await self._end_later(stream, error)
        except StreamkeepError as error:
            if not stream.is_closed:
                raise  # the output is not JSON, or too large
            logger.info("stream %s was ended by somebody else: %s", stream.id, error)

    async def _end_later(self, stream: StreamInput, error: StorageError) -> None:
        if not self._unfinished:  # told of one, whatever thousands have met the same
            logger.warning("stream %s cannot be completed yet, and any that end meanwhile: %s", stream.id, error)
        self._unfinished.add(stream)
        try:
            with anyio.move_on_after(END_SECONDS):
                while True:
                    await anyio.sleep(END_RETRY_SECONDS)
                    if await _is_flushed(stream):
                        return
        finally:
            self._unfinished.discard(stream)
            if not self._unfinished:
                logger.warning("no stream waits to be completed any more")

    async def _stop_when_unwanted(self, run: _Run) -> None:
        with run.listening:
            await run.stream.cancelled.wait()
            run.stop.set()
            await anyio.sleep(self._stop_seconds)
            run.cancel()
            await anyio.sleep(SAVE_SECONDS)
            run.scope.cancel()


def _told_to_readers(error: BaseException) -> BaseException | ErrorInfo:
    # A chunk or an output that is not JSON is the producer's fault; its readers have given no argument.
    return hidden_error("INTERNAL", error_info(error).internal) if isinstance(error, InvalidArgumentError) else error


async def _is_flushed(stream: StreamInput) -> bool:
    try:
        await stream.flush()
    except StreamkeepError as error:
        return not isinstance(error, StorageError)  # else it was ended by somebody else meanwhile
    return True
