"""Outbox: what a writer has to store. Everything that a stream's writer stores goes through one commit loop.

An outbox is in one of three states:

    open     takes records
    ending   takes no more; what is queued is stored, and then the ending: completing the stream, or releasing it
    over     nothing more is committed: the ending is stored, or the stream has become somebody else's

Records queue up; whichever task finds no commit under way commits all that is queued, for itself and for the others, so that what
arrives while one commit is under way goes into the next as one. It never decides who may write (that is `_lifecycle`), and never
leaves a doubt behind: a commit whose answer was lost is noted, and sent again as it was, before anything else.
"""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from enum import Enum, auto
from functools import partial
from math import inf
from threading import Lock
from typing import Any, Final

import anyio
from anyio.lowlevel import checkpoint

from . import _lifecycle
from ._background import Loop
from ._core import Core
from ._lifecycle import Life, Mark
from ._recovery import records_of
from ._telling import Telling
from .errors import (
    LimitExceededError,
    Status,
    StorageError,
    StreamCompletedError,
    StreamInputClosedError,
    StreamkeepError,
    StreamNotFoundError,
    StreamTakenOverError,
    WrongEventLoopError,
    fresh,
)
from .events import ErrorInfo, StreamEvent, error_record, event_of, is_terminal
from .hooks import Commit
from .storage import Head

Change = Callable[[Life, float], Life]
Marking = Callable[[int], Mark] | None
"""What is to be noted with a record, when it is known how many records there are then."""

logger: Final = logging.getLogger("streamkeep")

BATCH_RECORDS: Final = 1_024
BATCH_BYTES: Final = 1 << 20
YIELD_WRITES: Final = 64
"""A storage may answer without suspending; a producer that never waits must let readers run all the same."""
QUIET_SECONDS: Final = 1.0
SLOW_SECONDS: Final = 0.005
RELEASE_SECONDS: Final = 5.0
"""How long leaving the block may hold up a cancellation, for releasing the stream or storing its error."""
RETRY_SECONDS: Final = 1.0
MAX_RETRY_SECONDS: Final = 5.0


class _State(Enum):
    OPEN = auto()
    ENDING = auto()
    OVER = auto()


class _Round:
    """One commit under way, for those who wait for it; most have none."""

    __slots__ = ("_error", "_is_over")

    def __init__(self, loop: Loop) -> None:
        self._is_over = loop.event()
        self._error: StorageError | None = None

    async def wait(self) -> None:
        """Return when the commit is over. Raises a StorageError like the one that it raised."""
        await self._is_over.wait()
        if self._error is not None:
            raise fresh(self._error)

    def end(self, error: StorageError | None) -> None:
        """Wake those who wait."""
        self._error = error and fresh(error)
        self._is_over.set()


class _Task:
    """A task that waits for more to store. One for each record would cost as much as storing it."""

    __slots__ = ("_loop", "_more", "rests")

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._more = loop.event()
        self.rests = False

    def wake(self) -> None:
        """Have it look."""
        self._more.set()

    async def wait(self) -> None:
        """Return when it was woken since the last time."""
        await self._more.wait()
        self._more = self._loop.event()


class Outbox:
    """What a writer has to store.

    Attributes:
        stream: the id.
        life: the stream, as this writer last committed it.
        writer: the name of this writer, as the stream's head has it.
        cancelled: set when nothing more can be written, because of somebody else.
        committed_at: when it has last committed, by the event loop's clock.
        stored_at: when it has last stored a record, or began.
        is_slow: whether its last commit took so long that more should be queued behind one than one record.
        max_event_bytes: how many bytes an event may have.
    """

    __slots__ = (
        "__weakref__",
        "_began_at",
        "_bytes",
        "_committed_before",
        "_core",
        "_doubt",
        "_end",
        "_ending",
        "_has_untold_loss",
        "_imposed",
        "_is_committing",
        "_left_at",
        "_limits",
        "_lock",
        "_loop",
        "_marks",
        "_next",
        "_of_commits",
        "_queue",
        "_round",
        "_state",
        "_stored_bytes",
        "_task",
        "_telling",
        "_why_closed",
        "cancelled",
        "check_here",
        "committed_at",
        "is_slow",
        "life",
        "max_event_bytes",
        "stored_at",
        "stream",
        "writer",
    )

    def __init__(self, core: Core, stream: str, life: Life, size: int) -> None:
        self.stream = stream
        self.life = life
        self.cancelled = anyio.Event()
        self.check_here: Final = core.background.check_here
        """Raises WrongEventLoopError if this is another event loop than the manager's."""
        self._core = core
        self._telling = core.telling
        self._of_commits = core.telling if core.telling is not None and core.telling.of_commits else None
        self._loop = core.background.loop
        self._limits = core.limits
        self.max_event_bytes = core.limits.max_event_bytes
        self.writer = life.state.writer
        self._state = _State.OPEN
        self._why_closed: StreamkeepError | None = None  # copied for each who is told
        self._lock = Lock()  # callbacks in other threads queue records too
        self._queue: list[bytes] = []
        self._marks: list[Mark] = []  # what is to be noted with them
        self._next = life.head.tail  # the offset of the next record to be queued
        self._bytes = size  # of all records, queued ones included
        self._stored_bytes = size
        self._ending: tuple[Change, list[bytes]] | None = None
        self._end: bytes | None = None  # the record that ends the stream, if that is this writer's
        self._imposed: list[bytes] = []  # the last record, if its producer has not written it
        self._doubt: tuple[Life, list[bytes]] | None = None  # a commit whose answer is not known
        self._is_committing = False
        self._round: _Round | None = None
        self.is_slow = False
        self._task: _Task | None = None  # commits what is queued, in the background
        self._has_untold_loss = False  # whether records were lost, and no call has said so yet
        self.committed_at = self._committed_before = self.stored_at = self._left_at = self._began_at = self._loop.time()
        core.keep(self)

    @property
    def is_open(self) -> bool:
        """Whether it takes records."""
        return self._state is _State.OPEN

    @property
    def busy_until(self) -> float:
        """Until when it counts as busy, if it stores nothing: it has stored twice within a second, or has begun within it; else -inf."""
        is_busy = self.committed_at - self._committed_before <= QUIET_SECONDS
        return self.committed_at + QUIET_SECONDS if is_busy else -inf

    @property
    def queued(self) -> int:
        """How many records wait to be stored; also those that a storage has been given, and has not acknowledged."""
        return self._next - self.life.head.tail

    def producing(self) -> AbstractContextManager[None]:
        """Give what hooks want its producer to run in."""
        return nullcontext() if self._telling is None else self._telling.producing(self.stream, self.life)

    @property
    def is_stopped(self) -> bool:
        """Whether somebody else has ended the stream, or deleted it, so that nobody goes on with it."""
        return isinstance(self._why_closed, StreamCompletedError | StreamNotFoundError)

    @property
    def _is_over(self) -> bool:
        return self._state is _State.OVER

    @property
    def end(self) -> StreamEvent[Any] | None:
        """The stream's terminal event, if that is this writer's; it may still be on its way to the storage."""
        return None if self._end is None else event_of(self._end, self._next)

    @property
    def idle_since(self) -> float | None:
        """When the last record was stored, by the event loop's clock; None while any waits for that."""
        return None if self._next > self.life.head.tail else self.stored_at

    @property
    def unread_since(self) -> float | None:
        """Since when nobody has followed the stream in this process, by the event loop's clock; None while somebody does."""
        return None if self._core.is_followed(self.stream) else self._left_at

    def left(self) -> None:
        """Note that the last who followed the stream here has left."""
        if self._core.background.is_here:  # a subscription that was dropped ends in any thread
            self._left_at = anyio.current_time()

    def check_open(self) -> None:
        """Raise why it takes no records, if it does not."""
        if self._why_closed is not None:
            self._has_untold_loss = False
            raise fresh(self._why_closed)

    def put(self, record: bytes, max_queued: int | None = None, *, mark: Marking = None) -> int:
        """Queue a record, from any thread, and give its offset; `mark`: what is noted with it."""
        limits = self._limits
        size = len(record)
        if size - 1 > limits.max_event_bytes:
            raise _too_large(size - 1, limits.max_event_bytes)
        with self._lock:
            if self._state is not _State.OPEN:
                self.check_open()
            if max_queued is not None and len(self._queue) >= max_queued:
                raise LimitExceededError(f"{len(self._queue)} events wait to be stored (max_queued_events)")
            offset = self._next
            if offset >= limits.max_events:
                raise LimitExceededError(f"the stream holds {offset} events (max_events)")
            size += self._bytes
            if size > limits.max_stream_bytes:
                raise LimitExceededError(f"the stream would hold more than {limits.max_stream_bytes} bytes (max_stream_bytes)")
            self._bytes = size
            self._next = offset + 1
            self._queue.append(record)
            if mark is not None:
                self._marks.append(mark(self._next))
        return offset

    def mark(self, mark: Callable[[int], Mark]) -> None:
        """Queue what is to be noted when all that is queued is stored."""
        with self._lock:
            self.check_open()
            self._marks.append(mark(self._next))

    def put_soon(self, record: bytes, *, mark: Marking = None) -> int:
        """Queue a record, from any thread, and have it committed by a background task."""
        background = self._core.background
        if background.is_here:
            offset = self.put(record, self._limits.max_queued_events, mark=mark)
            self._start_task()
        else:
            background.check_callable()
            offset = self.put(record, self._limits.max_queued_events, mark=mark)
            if not background.call(self._start_task):
                raise WrongEventLoopError("the event loop that this belongs to has ended")
        return offset

    async def stored(self, offset: int) -> int:
        """Return the offset when the record there is stored."""
        while self.life.head.tail <= offset:
            await self._advance()
        if offset % YIELD_WRITES == 0:
            await checkpoint()
        return offset

    async def flush(self) -> None:
        """Return when all that was queued is stored, the ending included."""
        await self._commit_all()
        if not isinstance(self._why_closed, StreamInputClosedError):
            self.check_open()

    def flush_soon(self) -> None:
        """Have what was queued stored in the background."""
        self._start_task()

    async def finish(self, record: bytes, status: Status | None, *, max_bytes: int | None) -> None:
        """Complete the stream with its last record."""
        self.check_open()
        if max_bytes is not None and len(record) - 1 > max_bytes:
            raise _too_large(len(record) - 1, max_bytes)
        self._close(
            StreamInputClosedError("the stream input has completed the stream"),
            (lambda life, now: _lifecycle.finish(life, now, status), [record]),
        )
        await self._store_ending()
        if not isinstance(self._why_closed, StreamInputClosedError):
            self.check_open()

    async def release(self, why: StreamkeepError) -> None:
        """Store what is queued and release the stream; further calls raise errors like `why`."""
        if self._state is _State.OPEN:
            self._begin_release(why)
        await self._store_ending()
        if self._has_untold_loss:
            self.check_open()

    def release_soon(self) -> bool:
        """Release the stream in the background, from any thread; False if its manager can do that no more, or is another process's."""
        background = self._core.background
        return not background.is_forked and background.call(
            lambda: background.start(self._release_dropped, f"releasing stream {self.stream}")
        )

    async def _release_dropped(self) -> None:
        try:
            await self.release(StreamInputClosedError("the stream input was dropped"))
        except StreamkeepError as error:
            self.warn("could not be released", error)

    def warn(self, what: str, error: StreamkeepError) -> None:
        """Log what could not be done. If it is the storage that failed, that may concern thousands of streams, and is logged once."""
        if isinstance(error, StorageError):
            self._core.report(f"stream {self.stream} {what}", error)
        else:
            logger.warning("stream %s %s: %s", self.stream, what, error)

    def cancel(self, life: str) -> None:
        """End the stream with CANCELLED, soon, if it is the one that has this `life`."""
        if self.life.state.life == life:
            self.end_soon(_lifecycle.CANCELLED)

    def end_soon(self, error: ErrorInfo) -> None:
        """End the stream with an error in its producer's place, if it is open: after what is queued, in the background."""
        if self._state is _State.OPEN:
            self._imposed = [error_record(error)]
            self._close(
                StreamCompletedError(f"the stream was completed by somebody else ({error.status})"),
                (lambda life, now: _lifecycle.finish(life, now, error.status), self._imposed),
            )
            self.cancelled.set()
            self._start_task()

    def leave_soon(self) -> None:
        """Release the stream in its producer's place, if it is open, for another one to go on: after what is queued, in the background."""
        if self._state is _State.OPEN:
            self._begin_release(
                StreamTakenOverError("the stream was released in its writer's place, for another one to go on with it")
            )
            self.cancelled.set()
            self._start_task()

    async def look(self) -> None:
        """Find out whether the stream is still this writer's. A commit under way finds out by itself."""
        self._rest()
        if self._is_committing or self._is_over:
            return
        if self._doubt is not None:  # sent again, it finds out too
            await self._advance()
            return
        life = self.life
        head = await self._read_head()
        # What has been committed meanwhile has found out by itself, and the head that was read may be older.
        if self._is_over or self._doubt is not None or self._is_committing or self.life is not life:
            return
        if head is None or head.version != self.life.head.version:
            self._fence(_lifecycle.why_refused(head, self.life.state))
        elif _lifecycle.is_to_be_extended(life, self._core.now()) and self._ending is None:
            self._doubt = (_lifecycle.extend(self.life, self._core.now()), [])
            await self._advance()

    def _begin_release(self, why: StreamkeepError) -> None:
        self._imposed = records_of(self.life.state)
        self._close(why, (partial(_lifecycle.release, held=anyio.current_time() - self._began_at), self._imposed))

    def _close(self, why: StreamkeepError, ending: tuple[Change, list[bytes]]) -> None:
        with self._lock:
            self._state = _State.ENDING
            self._why_closed = why
            self._ending = ending
            self._end = ending[1][0] if ending[1] and is_terminal(ending[1][0]) else None

    def _start_task(self) -> None:
        if self._task is not None:
            self._task.wake()
        else:
            self._task = _Task(self._loop)
            what = f"storing what is queued for stream {self.stream}"
            # `ended`, because asyncio may cancel it before it begins.
            ended = partial(self._end_task, self._task)
            self._core.background.start(partial(self._commit_queued, self._task), what, ended=ended)

    def _end_task(self, task: "_Task") -> None:
        if self._task is task:  # else there is another one by now
            self._task = None

    def _rest(self) -> None:
        """Have no task wait for more to store."""
        if self._task is not None:
            self._task.rests = True
            self._task.wake()

    async def _commit_queued(self, task: "_Task") -> None:
        is_told, pause = False, RETRY_SECONDS
        try:
            while True:
                try:
                    await self._commit_all()
                except StorageError as error:
                    if not is_told:
                        is_told = True
                        self._core.report(f"stream {self.stream}: queued events are not stored yet", error)
                    await anyio.sleep(pause)
                    pause = min(2 * pause, MAX_RETRY_SECONDS)
                else:
                    if self._is_over or task.rests:
                        return
                    is_told, pause = False, RETRY_SECONDS
                    await task.wait()
        finally:
            self._end_task(task)

    async def _store_ending(self) -> None:
        """Return when all is stored, the ending included. If that fails, or is cancelled, it goes on in the background: nobody else can
        write to the stream before, and nobody may ask again.
        """
        try:
            await self._commit_all()
        except BaseException:
            self._start_task()
            raise

    async def _commit_all(self) -> None:
        while not self._is_over and (self._queue or self._marks or self._doubt or self._ending):
            await self._advance()

    async def _advance(self) -> None:
        """Make one commit, or wait for the one that is under way. Raises what it raised, or why there can be none."""
        if self._state is _State.OVER:
            self.check_open()
        if self._is_committing:
            if self._round is None:
                self._round = _Round(self._loop)
            await self._round.wait()
            return
        self._is_committing = True
        failure: StorageError | None = None
        try:
            await self._commit()
        except StorageError as error:
            failure = error
            raise
        finally:
            self._is_committing = False
            if self._round is not None:
                self._round.end(failure)
                self._round = None
            del failure  # its traceback holds this frame

    async def _commit(self) -> None:
        if self._doubt is None:
            self._doubt = self._plan()
        life, records = self._doubt
        began_at = self._loop.time()
        if not await self._core.sweeper.commit(self.stream, self.life.head.version, life.head, records):
            self._fence(_lifecycle.why_refused(await self._read_head(), self.life.state))
            return
        self._doubt = None
        is_over = life.state is not self.life.state and not _lifecycle.is_written(life.state)
        if life.head.expires_at != self.life.head.expires_at and not is_over:
            self._core.keep_names_soon(self.stream, life)
        self.life = life
        self._committed_before, self.committed_at = self.committed_at, self._loop.time()
        self.is_slow = self.committed_at - began_at > SLOW_SECONDS
        if records:
            self.stored_at = self.committed_at
        self._core.stored(self.stream, life, records)
        if is_over:
            self._stop()
        if self._of_commits is not None:
            self._tell(self._of_commits, life, records, self.committed_at - began_at)
        if is_over and self._telling is not None:
            self._telling.finished(self.stream, life)

    def _tell(self, telling: Telling, life: Life, records: list[bytes], seconds: float) -> None:
        first, size, is_end = life.head.tail - len(records), sum(map(len, records)), life.state.status != "open"
        telling.committed(Commit(self.stream, self.writer, first, len(records), size, seconds, len(self._queue), is_end))

    def _plan(self) -> tuple[Life, list[bytes]]:
        """Take what goes into the next commit off the queue, and say what becomes of the head."""
        now = self._core.now()
        records, marks, is_all = self._take()
        life = self.life
        if records or marks:
            self._stored_bytes += sum(map(len, records))
            life = _lifecycle.grow(life, len(records), self._stored_bytes, now, marks)
        if self._ending is not None and is_all:
            change, last = self._ending
            self._ending = None
            return change(life, now), records + last
        return life, records

    def _take(self) -> tuple[list[bytes], list[Mark], bool]:
        with self._lock:
            queue = self._queue
            if len(queue) <= 1:
                self._queue = []
                return queue, self._take_marks(len(queue)), True
            size = count = 0
            for record in queue[:BATCH_RECORDS]:
                size += len(record)
                if size > BATCH_BYTES and count:
                    break
                count += 1
            self._queue = queue[count:]
            return queue[:count], self._take_marks(count), not self._queue

    def _take_marks(self, count: int) -> list[Mark]:
        """Take what is noted with the next records."""
        if not (marks := self._marks):
            return marks
        tail = self.life.head.tail + count
        self._marks = [mark for mark in marks if mark.tail > tail]
        return [mark for mark in marks if mark.tail <= tail]

    async def _read_head(self) -> Head | None:
        page = await self._core.storage.read(self.stream)
        return None if page is None else page.head

    def _fence(self, why: StreamkeepError) -> None:
        """Write no more: the stream is somebody else's now (Kafka's word)."""
        with self._lock:
            self._why_closed = why
            # Whoever asked this writer to end the stream may have been quicker after all: nothing of its own is lost by that.
            self._has_untold_loss = bool(self._queue or (self._doubt and self._doubt[1] not in ([], self._imposed)))
            self._queue.clear()
            self._marks.clear()
            self._doubt = self._ending = self._end = None
            self._state = _State.OVER
        self.cancelled.set()
        self._rest()
        self._core.forget(self)
        self._core.let_recovery_go(self.stream, self.life)
        if self._telling is not None:
            self._telling.fenced(self.stream, self.life, why)

    def _stop(self) -> None:
        self._state = _State.OVER
        self._rest()
        self._core.forget(self)
        self._core.let_recovery_go(self.stream, self.life)


def _too_large(size: int, limit: int) -> LimitExceededError:
    return LimitExceededError(f"the event has {size} bytes, {limit} are allowed (max_event_bytes)")
