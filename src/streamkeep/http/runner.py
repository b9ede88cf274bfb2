"""Runner: producers that outlive the requests that started them.

Each runs in a task of its own until it is done, fails, is stopped, meets a bound or the runner is left. Whatever happens to one, its stream
gets a terminal event, and the others go on. A second task sees to its end: it stops the producer, and tells who wants to be told. It
decides nothing about requests or frames.
"""

import inspect
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from contextvars import Context, ContextVar, copy_context
from datetime import timedelta
from functools import partial
from math import inf
from types import TracebackType
from typing import Final, Protocol, Self, TypedDict, Unpack
from weakref import ref

import anyio
from anyio import CancelScope

from .._background import Background, Task, loop_here, not_ours
from .._encoding import Encode
from .._input import StreamInput
from .._manager import StreamManager
from .._recovery import Recovery
from ..errors import (
    InvalidArgumentError,
    KeyInUseError,
    LimitExceededError,
    PublicError,
    StorageError,
    StorageUnavailableError,
    StreamkeepError,
    StreamManagerClosedError,
    StreamNotFoundError,
)
from ..events import ErrorInfo, error_info, hidden_error
from .bounds import Bounds, Due
from .cancellation import Cancellation
from .ended import Ended, OnEnd, ended_of
from .logged import OneLine
from .run_log import log_end, log_start

logger: Final = logging.getLogger("streamkeep")

Producer = Callable[[StreamInput, anyio.Event], Awaitable[object]]
"""Writes chunks to the stream and returns the output, or raises. The event is set when it should stop; a little later it is
cancelled."""

SHUT_DOWN: Final = ErrorInfo("ABORTED", "the server was shut down before the stream was completed")
CANCELLED_ITSELF: Final = hidden_error("INTERNAL", "the producer raised a cancellation that was nobody's")
DIED: Final = ErrorInfo("ABORTED", "the producer was cancelled before the stream was completed")

MAX_PRODUCERS: Final = 1_000
MOST_QUEUED: Final = 32
AWAY_SECONDS: Final = 0.2
END_SECONDS: Final = 5.0
END_RETRY_SECONDS: Final = 0.2
SAVE_SECONDS: Final = 5.0
"""How long a producer that is cancelled may take for what it does at its end; and at shutdown each `on_end`."""
ON_END_SECONDS: Final = 60.0
"""How long `on_end` may take otherwise."""
MOST_NAMED: Final = 3
FULL_SECONDS: Final = 10.0
"""How long nothing is said of starts that are refused, once it was said of one."""


class OpenOptions(TypedDict, total=False):
    """What `StreamManager.open` may be told of a stream that is new."""

    metadata: Mapping[str, str] | None
    ttl: timedelta | None
    encode: Encode | None
    owner: str
    key: str | None
    run: str | None
    replace: bool
    recovery: Recovery | None


class ChunkWriter:
    """Stores a producer's chunks: one by one where that is quick; where the storage is slow, as many together as have come meanwhile.

    So a producer is never held up for longer than a slow storage needs for some chunks, instead of for each. One whose storage cannot be
    reached goes on until the queue is full (`max_queued_events`), and then waits, for as long as that takes: what a model has said already
    is paid for.
    """

    __slots__ = ("_is_away", "_queued", "stream")

    def __init__(self, stream: StreamInput) -> None:
        self.stream = stream
        self._queued = 0
        self._is_away = False

    async def write(self, chunk: object) -> None:
        """Store a chunk, or queue it behind what is being stored. Raises as `StreamInput.write` does, but StorageUnavailableError."""
        stream = self.stream
        if self._is_away and stream.idle_since is not None:  # all is stored
            self._queued, self._is_away = 0, False
        if self._queued or stream.is_slow:
            await self._queue(chunk)
        else:
            await self._stored_or_queued(stream.write(chunk))

    async def restart(self) -> None:
        """Begin the answer again, as `StreamInput.restart` does; where the storage cannot be reached, as soon as it can."""
        await self._stored_or_queued(self.stream.restart())

    async def done(self, output: object = None) -> None:
        """Complete the stream, as `StreamInput.done` does; where the storage cannot be reached, as soon as it can."""
        with suppress(StorageUnavailableError):  # it is given, and is stored in the background
            await self.stream.done(output)

    async def error(self, error: ErrorInfo) -> None:
        """Complete the stream with an error, in the same way."""
        with suppress(StorageUnavailableError):
            await self.stream.error(error)

    async def _stored_or_queued(self, storing: Awaitable[object]) -> None:
        try:
            await storing
        except StorageUnavailableError:  # what was written keeps its place, and is stored in the background
            self.stream.flush_soon()
            self._queued, self._is_away = 1, True

    async def _queue(self, chunk: object) -> None:
        stream = self.stream
        try:
            stream.write_soon(chunk)
        except LimitExceededError:
            while self._queued:  # the queue may be shorter than MOST_QUEUED
                await self._flush()
            stream.write_soon(chunk)
        self._queued += 1
        if self._queued >= MOST_QUEUED and not self._is_away:
            await self._flush()

    async def _flush(self) -> None:
        try:
            await self.stream.flush()
        except StorageUnavailableError:
            self._is_away = True
            await anyio.sleep(AWAY_SECONDS)  # not every storage has tried for long
        else:
            self._queued, self._is_away = 0, False


class _Run:
    """One producer at work.

    Its place is taken until the producer is `over`, whoever wants that has been `told`, and no thread of its goes on.
    """

    def __init__(self, stream: StreamInput, due: Due, on_end: OnEnd | None, forget: Callable[["_Run"], object]) -> None:
        self.stream = stream
        self.began_at = time.monotonic()
        self.due = due
        self.on_end = on_end
        self.task: Task | None = None
        self.stop = anyio.Event()
        self.cancellation = Cancellation()
        self.is_producing = True
        self.is_leaving = False
        self.over = anyio.Event()
        self.free = anyio.Event()
        """Nobody waits for its producer any more: it is over, or has been given up."""
        self.listening = CancelScope()
        self.telling = CancelScope()
        self.told = anyio.Event()
        self.threads = 0
        self.is_left_alone = False
        self.end_as = DIED
        self._leave: Callable[[], object] = lambda: None
        self._forget = forget

    @property
    def is_handed_on(self) -> bool:
        """Whether another process goes on, if this one ends it now, instead of telling readers of an end."""
        return self.stream.recovery is not None and self.end_as in (SHUT_DOWN, DIED)

    def end_soon(self) -> None:
        """End the stream, if its producer has not, or release it for who goes on."""
        if self.is_handed_on:
            self.stream.leave_soon()
        else:
            self.stream.end_soon(self.end_as)

    async def end(self) -> None:
        """Do so, and return when that is stored. Raises StreamkeepError."""
        if self.is_handed_on:
            await self.stream.close()
        else:
            await self.stream.error(self.end_as)

    @property
    def is_left(self) -> bool:
        """Whether somebody has to wait for it."""
        return not (self.free.is_set() and self.told.is_set())

    async def finished(self) -> None:
        """Return when nobody has to wait for it any more."""
        await self.free.wait()
        await self.told.wait()

    def cancel(self) -> None:
        """Cancel it; what is left to do when it has produced as a scope does."""
        if self.is_producing:
            self.cancellation.cancel()
        else:
            self.cancellation.scope.cancel()

    def give_up(self) -> None:
        """Wait no longer for its producer's end."""
        self.free.set()
        self.listening.cancel()

    def enter(self, context: Context) -> None:
        """Have hooks make of the producer's context what they want."""
        within = self.stream.producing()
        context.run(within.__enter__)

        def leave() -> None:
            try:
                context.run(within.__exit__, None, None, None)
            except RuntimeError:  # it is the one that this runs in
                within.__exit__(None, None, None)

        self._leave = leave

    def set_over(self) -> None:
        """Note that the producer's task is over."""
        self.over.set()
        self.free.set()
        self.listening.cancel()
        self.let_go()

    def set_told(self) -> None:
        """Note that nobody is to be told any more."""
        self.told.set()
        self.let_go()

    def end_thread(self) -> None:
        """Note that a thread of the producer's is over."""
        self.threads -= 1
        self.let_go()

    def let_go(self) -> None:
        """Give its place back, if nothing of it goes on."""
        if self.over.is_set() and self.told.is_set() and not self.threads:
            self._leave()
            self._forget(self)


_run_here: Final[ContextVar["ref[_Run] | None"]] = ContextVar("streamkeep_run", default=None)
"""Which producer runs here. What a producer leaves behind, such as a timer, has a copy of its context, and must not keep all of the run."""


def keep_place() -> Callable[[], object]:
    """Have the producer that runs here keep its place, whatever becomes of its task, until what this gives is called in the event loop.

    For a thread of its, which cannot be cancelled.
    """
    here = _run_here.get()
    run = None if here is None else here()
    if run is None:
        return lambda: None
    run.threads += 1
    return run.end_thread


def leave() -> None:
    """Note that the producer that runs here has no more to give, and does what it does at its end: it is not cancelled for a while."""
    here = _run_here.get()
    if here is not None and (run := here()) is not None:
        run.is_leaving = True


class Runner:
    """Runs producers apart from requests; an async context manager.

    Leaving it waits for the producers, at most `drain`; those that are left are told to stop, then cancelled, and their streams
    end with ABORTED, whatever they do.

    Args:
        streams: a running manager.
        drain: how long to wait for producers when the runner is left.
        stop_grace: how long a producer that was told to stop may take before it is cancelled. Then it has five seconds more for what it
            does at its end (on asyncio, where one cancellation is one).
        max_producers: how many may run at a time. A server bounds what lives as long as its connection; these do not. One that goes on
            although its stream has ended (in a thread, which cannot be cancelled, or because it swallows that) is counted until it ends.
        bounds: how long each may go on, unless `start` says otherwise.
        on_end: told of each run's end, unless `start` names another. It is called when the end is stored, in the producer's context, and
            may take a minute; at shutdown five seconds.

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
        bounds: Bounds | None = None,
        on_end: OnEnd | None = None,
    ) -> None:
        self._streams = streams
        self._drain_seconds = drain.total_seconds()
        self._stop_seconds = stop_grace.total_seconds()
        self._max_producers = max_producers
        self._bounds = bounds or Bounds()
        self._on_end = on_end
        self._tasks = Background()
        self._is_entered = False
        self._starting = 0
        self._has_changed = anyio.Event()
        """One more start is known to run, or not to; or one more run has ended."""
        self._runs: dict[_Run, None] = {}  # the oldest first
        self._unfinished: set[StreamInput] = set()
        self._recovering = Task()
        self._closing = False
        self._says_full_at = -inf
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
            with anyio.move_on_after(3 * END_SECONDS, shield=True):
                for run in self._left():
                    await run.told.wait()
            with anyio.move_on_after(END_SECONDS, shield=True):
                await self._tasks.wait()

    @property
    def is_running(self) -> bool:
        """Whether it has been entered, and takes producers."""
        return self._is_entered and not self._closing

    async def start(
        self,
        stream: str,
        produce: Producer,
        *,
        bounds: Bounds | None = None,
        on_end: OnEnd | None = None,
        **opening: Unpack[OpenOptions],
    ) -> None:
        """Open a stream and run its producer in the background; with bounds and an `on_end` of its own, if they are given.

        Raises as `StreamManager.open` does, StreamManagerClosedError when the runner is not running or is being left, and
        LimitExceededError when `max_producers` run.
        """
        self._check_running()
        await self._take_place(opening)
        try:
            stream_input = await self._streams.open(stream, **opening)
        finally:
            self._starting -= 1
            self._tell_of_change()
        if not self.is_running:
            await stream_input.error(SHUT_DOWN)
        self._check_running()
        self.adopt(stream_input, produce, bounds=bounds, on_end=on_end)

    def adopt(
        self, stream: StreamInput, produce: Producer, *, bounds: Bounds | None = None, on_end: OnEnd | None = None
    ) -> None:
        """Run the producer of a stream that is open already, however many run, and see to its end."""
        due = Due(bounds or self._bounds, stream, anyio.current_time())
        run = _Run(stream, due, on_end or self._on_end, self._forget)
        self._runs[run] = None
        log_start(stream)
        what, context = f"the producer of stream {stream.id}", copy_context()
        run.enter(context)
        run.task = self._tasks.start(partial(self._run, run, produce), what, context, run.set_over)
        self._tasks.start(partial(self._see_to_its_end, run), f"seeing to the end of stream {stream.id}", context, run.set_told)

    def recover(self, names: Collection[str], produce_of: Callable[[StreamInput], Producer]) -> None:
        """Go on, in the background until this is drained, with streams whose writers have died: with those of these recoveries.

        What `produce_of` raises ends its stream in failure.
        """
        self._recovering = self._tasks.start(partial(self._recover, names, produce_of), "going on with streams")

    async def _recover(self, names: Collection[str], produce_of: Callable[[StreamInput], Producer]) -> None:
        async with self._streams.recoveries(*names) as lost:
            while True:
                while len(self._runs) + self._starting >= self._max_producers:
                    await self._has_changed.wait()
                stream = await anext(lost)
                self.adopt(stream, _going_on(produce_of))

    def drain_at(self, shutdown: anyio.Event) -> None:
        """Drain when an event is set, without waiting to be left."""
        self._tasks.start(partial(self._drain_at, shutdown), "draining")

    async def drain(self) -> None:
        """Take no more producers, wait for those that run, and end those that take too long. It can be called again."""
        self._closing = True
        self._recovering.cancel()
        with anyio.move_on_after(self._drain_seconds):
            await self._all_over()
        if late := [run for run in self._left() if run.end_as is not SHUT_DOWN]:  # and not those of an earlier call
            logger.warning("%s took longer than the %g seconds of `drain`, and must stop", _named(late), self._drain_seconds)
        for run in late:
            run.end_as = SHUT_DOWN
            run.stop.set()
        with anyio.move_on_after(self._stop_seconds):
            await self._all_over()
        for run in self._left():
            if not run.is_leaving:
                run.cancel()
        with anyio.move_on_after(SAVE_SECONDS):
            await self._all_over()
        await self._end_those_left()
        self.drained.set()

    async def _end_those_left(self) -> None:
        """End what has had its time, whatever it does, and see that all are told."""
        for run in self._left():
            if not run.over.is_set():
                run.end_soon()
            run.telling.deadline = min(run.telling.deadline, anyio.current_time() + SAVE_SECONDS)
        with anyio.move_on_after(END_SECONDS, shield=True):
            await _cancel_for_good(self._left())
        if endless := [run for run in self._left() if not run.free.is_set()]:
            logger.error("the producer of %s does not end, whatever is done, and is left alone", _named(endless))
            for run in endless:
                self._give_up(run)
        with anyio.move_on_after(END_SECONDS + SAVE_SECONDS, shield=True):
            for run in self._left():
                await run.told.wait()
        if threads := [run for run in self._runs if run.threads and not run.is_left_alone]:  # and not those of an earlier call
            for run in threads:
                run.is_left_alone = True
            logger.warning("a thread of %s goes on, and is left alone", _named(threads))

    async def _drain_at(self, shutdown: anyio.Event) -> None:
        await shutdown.wait()
        if left := self._left():
            logger.warning("the server is stopping; %s may take %g seconds to end", _named(left), self._drain_seconds)
        await self.drain()

    def check_room(self) -> None:
        """Raise what `start` would, where no producer is taken at all: for who has begun something before it starts."""
        self._check_running()
        if len(self._runs) + self._starting >= self._max_producers:
            raise self._no_room()

    def _no_room(self) -> LimitExceededError:
        now = time.monotonic()
        if now >= self._says_full_at:  # thousands may be refused
            self._says_full_at = now + FULL_SECONDS
            logger.warning("%d streams are being produced here (max_producers), and more are refused", self._max_producers)
        return LimitExceededError(f"{self._max_producers} streams are being produced here; try again later")

    def _check_running(self) -> None:
        if not self.is_running:
            raise StreamManagerClosedError("the server is shutting down" if self._closing else "the runner is not running")

    async def _take_place(self, opening: OpenOptions) -> None:
        """Count one more start. LimitExceededError: as many run as may. KeyInUseError: it would only join what is there."""
        is_named = (opening.get("key"), opening.get("run")) != (None, None)
        while len(self._runs) + self._starting >= self._max_producers:
            if is_named and len(self._runs) < self._max_producers:
                await self._has_changed.wait()  # of a thousand starts under one key one runs
                continue
            if is_named:
                await self._check_joins(opening)
            raise self._no_room()
        self._starting += 1

    async def _check_joins(self, opening: OpenOptions) -> None:
        """Raise KeyInUseError where `open` would, as far as can be said without starting anything."""
        owner, key, run = opening.get("owner", ""), opening.get("key"), opening.get("run")
        with suppress(StreamNotFoundError):
            if run is not None:
                stream = (await self._streams.started_by(run, owner)).id
                raise KeyInUseError("this run was started already", stream=stream, is_same_run=True)
        with suppress(StreamNotFoundError):
            if key is not None and not opening.get("replace"):
                info = await self._streams.current(key, owner)
                if info.status == "open":
                    raise KeyInUseError("a stream is being written under this key", stream=info.id)

    def _give_up(self, run: _Run) -> None:
        """Let a producer that swallows cancellation go on. When the runner is left, its scope would cancel it without a pause."""
        if run.task is not None:
            self._tasks.leave_alone(run.task)
        run.give_up()

    def _forget(self, run: _Run) -> None:
        if run in self._runs:
            del self._runs[run]
            log_end(run.stream, time.monotonic() - run.began_at, run.end_as)
        self._tell_of_change()

    def _tell_of_change(self) -> None:
        changed, self._has_changed = self._has_changed, anyio.Event()
        changed.set()

    def _left(self) -> list[_Run]:
        """Give the runs that have to be waited for."""
        return [run for run in self._runs if run.is_left]

    async def _all_over(self) -> None:
        for run in self._left():
            await run.finished()

    async def _run(self, run: _Run, produce: Producer) -> None:
        _run_here.set(ref(run))
        try:
            with run.cancellation:
                await self._produce(run, produce)
        except anyio.get_cancelled_exc_class():
            # From outside, or raised by the producer itself. The task ends here either way; let out, it would end all others.
            task = run.cancellation.task
            is_its_own = task is not None and not task.cancelling() and not (run.stop.is_set() or run.stream.cancelled.is_set())
            while task is not None and task.cancelling():
                task.uncancel()
            if is_its_own:  # such as that of a task that it waited for
                run.end_as = CANCELLED_ITSELF
                logger.exception("stream %s: its producer raised a cancellation that is nobody's", run.stream.id)
            else:
                logger.info("stream %s: its producer was cancelled", run.stream.id)
        except not_ours():
            raise
        except BaseException:
            logger.exception("stream %s could not be completed", run.stream.id)
        finally:
            with anyio.move_on_after(END_SECONDS, shield=True):
                await self._end_anyway(run)

    async def _end_anyway(self, run: _Run) -> None:
        """Tell readers of the end, whatever has happened. If even that fails, it is released or abandoned in the end."""
        try:
            await self._end(run.stream, run.end)
        except Exception:
            logger.exception("stream %s could not be ended", run.stream.id)

    async def _produce(self, run: _Run, produce: Producer) -> None:
        stream = run.stream
        try:
            try:
                output = await produce(stream, run.stop)
            finally:
                run.is_producing = False
            await self._end(stream, lambda: stream.done(output))
        except not_ours():
            raise
        except BaseException as error:  # what native libraries raise may be no Exception
            # What a producer raises because it was told to stop says less than why it was told.
            if isinstance(error, PublicError):
                logger.info("stream %s failed: %s", stream.id, OneLine(error))
            else:
                expected = run.stop.is_set() or stream.cancelled.is_set()
                logger.log(logging.DEBUG if expected else logging.ERROR, "stream %s failed", stream.id, exc_info=error)
            await self._end(stream, run.end if run.stop.is_set() else partial(_fail, stream, error))

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
        is_flushed = False
        try:
            with anyio.move_on_after(END_SECONDS):
                while not is_flushed:
                    await anyio.sleep(END_RETRY_SECONDS)
                    is_flushed = await _is_flushed(stream)
        finally:
            self._unfinished.discard(stream)
            if not self._unfinished:
                logger.warning(
                    "no stream waits to be completed any more"
                    if is_flushed
                    else "what cannot be completed yet is completed in the background, as soon as the storage can; its readers wait"
                )

    # Ends

    async def _see_to_its_end(self, run: _Run) -> None:
        try:
            with run.listening:
                await self._stop_when_unwanted(run)
        finally:
            if run.on_end is not None:
                # Also when the runner is left by a cancellation, which comes here too.
                with CancelScope(shield=True):
                    await self._tell(run, run.on_end)

    async def _stop_when_unwanted(self, run: _Run) -> None:
        """Stop a producer whose stream somebody else has ended, or that meets a bound. It is over when this returns, or given up."""
        await self._unwanted(run)
        run.stop.set()
        await anyio.sleep(self._stop_seconds)
        if not run.is_leaving:
            run.cancel()
        await anyio.sleep(SAVE_SECONDS)
        with anyio.move_on_after(END_SECONDS):
            await _cancel_for_good([run])
        if not run.over.is_set():  # else this is about to be cancelled
            logger.error("the producer of %s does not end, whatever is done, and keeps its place", _named([run]))
            self._give_up(run)

    async def _unwanted(self, run: _Run) -> None:
        """Return when somebody else has ended the stream, or when it has been ended because a bound is met."""
        stream = run.stream
        while True:
            now = anyio.current_time()
            at, why = run.due.first(now)
            if at <= now and why is not None:
                break
            with CancelScope(deadline=at):
                await stream.cancelled.wait()
                return
            if stream.idle_since is None:  # perhaps by a write that failed, or that nobody awaits
                self._tasks.start(partial(_flush, stream), f"storing what waits for stream {stream.id}")
        logger.warning("stream %s: %s, and it is stopped", stream.id, why.message)
        run.end_as = why
        stream.end_soon(why)  # does nothing if the producer was quicker

    async def _tell(self, run: _Run, on_end: OnEnd) -> None:
        with anyio.move_on_after(END_SECONDS):
            await run.free.wait()
        run.end_soon()  # it has ended, unless its producer never began, or does not end
        telling = _Telling(run.stream.id, on_end, await ended_of(self._streams, run.stream))
        # Not one of `_tasks`, which start no more when the runner is left by a cancellation.
        loop_here().spawn(telling.run, copy_context(), telling.over.set)
        run.telling.deadline = anyio.current_time() + (SAVE_SECONDS if self._closing else ON_END_SECONDS)
        with run.telling:
            await telling.over.wait()
        if not telling.over.is_set():
            logger.warning("stream %s: `on_end` took too long, and is cancelled", run.stream.id)
            with anyio.move_on_after(END_SECONDS):
                await _cancel_for_good([telling])
            if not telling.over.is_set():
                logger.error("stream %s: `on_end` does not end, whatever is done, and is left alone", run.stream.id)


class _Telling:
    """A call of `on_end`, in a task of its own."""

    def __init__(self, stream: str, on_end: OnEnd, ended: Ended) -> None:
        self.over = anyio.Event()
        self._stream = stream
        self._on_end = on_end
        self._ended = ended
        self._cancellation = Cancellation()
        self.cancel = self._cancellation.cancel

    async def run(self) -> None:
        """Make the call. Whatever it raises ends there."""
        try:
            with self._cancellation:
                told = self._on_end(self._ended)
                if inspect.isawaitable(told):
                    await told
        except not_ours():
            raise
        except BaseException:  # what native libraries raise may be no Exception
            logger.exception("stream %s: `on_end` failed", self._stream)


def _going_on(produce_of: Callable[[StreamInput], Producer]) -> Producer:
    async def produce(stream: StreamInput, stop: anyio.Event) -> object:
        return await produce_of(stream)(stream, stop)

    return produce


async def _fail(stream: StreamInput, error: BaseException) -> None:
    # A chunk or an output that is not JSON is the producer's fault; its readers have given no argument.
    is_argument = isinstance(error, InvalidArgumentError)
    await stream.error(hidden_error("INTERNAL", error_info(error).internal) if is_argument else error)


async def _is_flushed(stream: StreamInput) -> bool:
    try:
        await stream.flush()
    except StreamkeepError as error:
        return not isinstance(error, StorageError)  # else it was ended by somebody else meanwhile
    return True


async def _flush(stream: StreamInput) -> None:
    with suppress(StreamkeepError):  # whoever writes is told
        await stream.flush()


class _Endable(Protocol):
    @property
    def over(self) -> anyio.Event: ...

    def cancel(self) -> None: ...


async def _cancel_for_good(those: Sequence[_Endable]) -> None:
    """Cancel again and again, until all are over. A cancelled scope would do so all the time, and take the processor for itself."""
    while left := [one for one in those if not one.over.is_set()]:
        for one in left:
            one.cancel()
        with anyio.move_on_after(END_RETRY_SECONDS):
            for one in left:
                await one.over.wait()


def _named(runs: Sequence[_Run]) -> str:
    ids = [run.stream.id for run in runs]
    if len(ids) == 1:
        return f"stream {ids[0]}"
    return f"{len(ids)} streams ({', '.join(ids[:MOST_NAMED])}{', …' if len(ids) > MOST_NAMED else ''})"
