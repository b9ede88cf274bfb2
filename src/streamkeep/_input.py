"""StreamInput: the one writer of a stream. Everything it stores goes through one commit loop.

Writes are queued; whichever task finds no commit under way commits all that is queued, for itself and for the others,
so that what arrives while one commit is under way goes into the next as one. It never decides who may write (that is
`_lifecycle`), and never leaves a doubt behind: a commit whose answer was lost is noted, and sent again as it was, before
anything else. Being sent twice is harmless, since the second is refused and the head that is there is the noted one.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Protocol, Self

import anyio
from anyio.lowlevel import checkpoint

from . import _lifecycle
from ._lifecycle import Life, Terms
from .errors import (
    LimitExceededError,
    Status,
    StorageError,
    StreamInputClosedError,
    StreamkeepError,
)
from .events import ErrorInfo, chunk_record, done_record, error_info, error_record
from .storage import Storage

Change = Callable[[Life, float], Life]

logger: Final = logging.getLogger("streamkeep")

BATCH_RECORDS: Final = 1_024
BATCH_BYTES: Final = 1 << 20
YIELD_WRITES: Final = 64
"""A storage may answer without suspending; a producer that never waits must let readers run all the same."""
GOODBYE_SECONDS: Final = 5.0
"""How long leaving the block may hold up a cancellation, for letting go of the stream or storing its error."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one stream may hold. Reaching a limit raises `LimitExceededError`, and stores nothing.

    Attributes:
        max_event_bytes: the JSON of one chunk, output or ErrorInfo. (What is kept of an exception is 64 KiB of text.)
        max_events: events in a stream, the terminal one not counted.
        max_stream_bytes: all events of a stream together, the terminal one not counted.
        max_queued_events: what `write_soon` may be ahead of the storage.
    """

    max_event_bytes: int = 4 << 20
    max_events: int = 1_000_000
    max_stream_bytes: int = 256 << 20
    max_queued_events: int = 10_000


class Keeper(Protocol):
    """What a StreamInput needs of its manager."""

    storage: Storage
    terms: Terms
    limits: Limits
    clock: Callable[[], float]

    def start_commit(self, stream_input: "StreamInput") -> None:
        """Commit what is queued from a background task."""

    def forget_input(self, stream_input: "StreamInput") -> None:
        """Stop renewing and watching for it."""


class _Round:
    """One commit under way, for those whose records wait for it."""

    __slots__ = ("_over", "error")

    def __init__(self) -> None:
        self._over: anyio.Event | None = None  # made when somebody waits: most commits have nobody who does
        self.error: StorageError | None = None

    async def wait(self) -> None:
        """Return when the commit is over. Raises the StorageError that it raised."""
        self._over = self._over or anyio.Event()
        await self._over.wait()
        if self.error is not None:
            try:
                raise self.error
            finally:
                del self  # as in StreamInput._advance

    def end(self) -> None:
        """Wake those who wait."""
        if self._over is not None:
            self._over.set()


class StreamInput:
    """The writer of a stream, as `StreamManager.open` gives it; not to be made directly.

    As a context manager: leaving the block by an exception completes the stream with that error, leaving it by
    cancellation or without `done` lets go of it. All methods belong to the event loop that the manager runs in.

    Attributes:
        id: the stream's id.
        cancelled: an event that is set as soon as nothing more can be written, because the stream was cancelled, completed,
            taken over or deleted by somebody else. Wait for it, or look at it, to stop work that nobody wants.
    """

    def __init__(self, keeper: Keeper, stream: str, life: Life, stored_bytes: int = 0) -> None:
        self.id = stream
        self.cancelled = anyio.Event()
        self._keeper = keeper
        self._limits = keeper.limits
        self._storage = keeper.storage
        self._life = life
        self._writer = life.state.writer
        self._queue: list[bytes] = []
        self._bytes = stored_bytes
        self._next = life.head.tail  # the offset of the next record to be queued
        self._sealed: StreamkeepError | None = None  # why nothing more may be queued
        self._over = False  # whether nothing more is to be committed
        self._ending: tuple[Change, list[bytes]] | None = None  # what comes once the queue is empty
        self._renewal_due = False
        self._doubt: tuple[Life, list[bytes]] | None = None  # a commit whose answer is not known
        self._in_background = False  # whether a background task commits what is queued
        self._unheard = False  # whether events were lost and no call has said so yet
        self._round: _Round | None = None

    @property
    def tail(self) -> int:
        """How many events are stored: the offset of the next one. After `open(resume=True)`, how far the log had come."""
        return self._life.head.tail

    @property
    def is_closed(self) -> bool:
        """Whether nothing more can be written: it was completed, closed, or is somebody else's."""
        return self._sealed is not None

    async def write(self, chunk: object) -> int:
        """Store a chunk and give its offset, once it is as durable as the storage promises.

        The chunk is encoded at the call, and order is the order of calls. A write that is cancelled, or that raises `StorageError`,
        keeps its place: the chunk goes out first with whatever is written, flushed or completed next, so do not write it again.

        Raises InvalidArgumentError (not JSON), LimitExceededError, StreamInputClosedError, StreamCompletedError,
        StreamTakenOverError, StreamNotFoundError (deleted), StorageError.
        """
        offset = self._put(chunk_record(chunk))
        while self._life.head.tail <= offset:
            await self._advance()
        if offset % YIELD_WRITES == 0:
            await checkpoint()
        return offset

    def write_soon(self, chunk: object) -> int:
        """Queue a chunk and give its offset at once; for callbacks that cannot await, such as Genkit's `send_chunk`.

        It is stored in the background. `flush`, `done` and `error` wait for it, and raise if it could not be stored.

        Raises as `write` does, but StorageError; LimitExceededError also when the storage is `max_queued_events` behind.
        """
        if len(self._queue) >= self._limits.max_queued_events:
            raise LimitExceededError(f"{len(self._queue)} events wait to be stored (max_queued_events)")
        offset = self._put(chunk_record(chunk))
        if not self._in_background:
            self._in_background = True
            self._keeper.start_commit(self)
        return offset

    async def flush(self) -> None:
        """Return once everything that was queued is stored. Raises as `write` does.

        After a StorageError it tries again, also for an outcome given to `done` or `error`.
        """
        await self._commit_all()
        if not isinstance(self._sealed, StreamInputClosedError):
            self._check_open()

    async def done(self, output: object = None) -> None:
        """Complete the stream with its result. Raises as `write` does; StreamInputClosedError if it was completed before."""
        await self._finish(done_record(output), None)

    async def error(self, error: BaseException | ErrorInfo) -> None:
        """Complete the stream with an error.

        An exception is stored in full; readers get its status, and its message only if it was marked public
        (`PublicError`). Raises as `done` does.
        """
        if isinstance(error, ErrorInfo):
            await self._finish(error_record(error), error.status)
        else:
            # It has been cut to MAX_ERROR_TEXT; a stricter limit must not keep a stream from being told of its end.
            info = error_info(error)
            await self._finish(error_record(info), info.status, is_limited=False)

    async def close(self) -> None:
        """Store what is queued and let go of the stream without completing it, so that another writer may go on at once.

        If none does, readers are told ABORTED after lease and grace. Does nothing on a handle that is completed or closed.
        Raises as `write` does if what was queued is lost, and no other call has said so.
        """
        await self.let_go(StreamInputClosedError("the stream input is closed"))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if exc is None:
            await self.close()
            return
        # The exception must arrive, bare, whatever becomes of the stream; so this ends in time, and says nothing of its own.
        with anyio.move_on_after(GOODBYE_SECONDS, shield=True):
            try:
                if isinstance(exc, Exception) and self._sealed is None:
                    await self.error(exc)
                else:
                    await self.close()
            except StreamkeepError as error:
                logger.warning("stream %s could not be told of its writer's end: %s", self.id, error)

    def _check_open(self) -> None:
        if self._sealed is not None:
            self._unheard = False
            raise self._sealed

    def _put(self, record: bytes) -> int:
        if self._sealed is not None:
            self._check_open()
        self._check_size(record)
        limits = self._limits
        offset = self._next
        size = self._bytes + len(record)
        if offset >= limits.max_events:
            raise LimitExceededError(f"the stream holds {offset} events (max_events)")
        if size > limits.max_stream_bytes:
            raise LimitExceededError(f"the stream would hold more than {limits.max_stream_bytes} bytes (max_stream_bytes)")
        self._bytes = size
        self._next = offset + 1
        self._queue.append(record)
        return offset

    def _check_size(self, record: bytes) -> None:
        limit = self._limits.max_event_bytes
        if len(record) - 1 > limit:
            raise LimitExceededError(f"the event has {len(record) - 1} bytes, {limit} are allowed (max_event_bytes)")

    async def _finish(self, record: bytes, status: Status | None, *, is_limited: bool = True) -> None:
        self._check_open()
        if is_limited:
            self._check_size(record)
        self._sealed = StreamInputClosedError("the stream input has completed the stream")
        self._ending = (lambda life, now: _lifecycle.finish(life, now, self._keeper.terms, status), [record])
        await self.flush()

    def _release(self, life: Life, now: float) -> Life:
        return _lifecycle.release(life, now, self._keeper.terms)

    async def _commit_all(self) -> None:
        while not self._over and (self._queue or self._doubt or self._ending or self._renewal_due):
            await self._advance()

    async def _advance(self) -> None:
        """Make one commit, or wait for the one that is under way. Raises what it raised, or why there can be none."""
        if self._over:
            self._check_open()
        if self._round is not None:
            await self._round.wait()
            return
        under_way = self._round = _Round()
        try:
            await self._commit()
        except StorageError as error:
            under_way.error = error
            raise
        finally:
            self._round = None
            under_way.end()
            # Its error holds this frame; without a cycle a handle that is dropped is gone at once, and its lease lapses.
            del under_way

    async def _commit(self) -> None:
        if self._doubt is None:
            self._doubt = self._plan()
        life, records = self._doubt
        if not await self._storage.commit(self.id, self._life.head.version, life.head, records):
            there = await self._read_life()
            if there is None or there.head != life.head:
                self.lose(_lifecycle.why_refused(there, self._writer))
                return
        self._doubt = None
        self._life = life
        if life.state.writer != self._writer:
            self._stop()

    def _plan(self) -> tuple[Life, list[bytes]]:
        """Take what goes into the next commit off the queue, and say what becomes of the head."""
        now = self._keeper.clock()
        records = self._take()
        life = _lifecycle.grow(self._life, len(records), now)
        if self._ending is not None and not self._queue:
            change, last = self._ending
            self._ending = None
            return change(life, now), records + last
        if self._renewal_due:
            self._renewal_due = False
            life = _lifecycle.extend(life, now, self._keeper.terms)
        return life, records

    def _take(self) -> list[bytes]:
        if len(self._queue) <= 1:
            taken, self._queue = self._queue, []
            return taken
        size = count = 0
        for record in self._queue[:BATCH_RECORDS]:
            size += len(record)
            if size > BATCH_BYTES and count:
                break
            count += 1
        taken, self._queue = self._queue[:count], self._queue[count:]
        return taken

    async def _read_life(self) -> Life | None:
        page = await self._storage.read(self.id)
        return None if page is None else _lifecycle.life_of(page.head)

    async def commit_queued(self) -> None:
        """Commit until nothing is queued; for the manager, once for each `start_commit`. Raises StorageError."""
        try:
            await self._commit_all()
        finally:
            self._in_background = False

    async def renew(self) -> None:
        """Renew the lease; for the manager. Raises as `flush` does."""
        self._renewal_due = True
        while self._renewal_due and not self._over:
            await self._advance()

    async def look(self) -> None:
        """Find out whether the stream is still this writer's; for the manager. A commit under way finds out by itself.

        So does one whose answer was lost, by being sent again.
        """
        if self._round is not None or self._over:
            return
        if self._doubt is not None:
            await self._advance()
            return
        there = await self._read_life()
        if self._over or self._doubt is not None:
            return
        if there is None or there.state.writer != self._writer:
            self.lose(_lifecycle.why_refused(there, self._writer))

    @property
    def commits(self) -> int:
        """A number that changes with every commit of this handle; for the manager, which looks only at those that are quiet."""
        return self._life.head.version

    async def let_go(self, why: StreamkeepError) -> None:
        """Close, so that further calls raise `why`."""
        if self._sealed is None:
            self._sealed = why
            self._ending = (self._release, [])
        await self._commit_all()
        if self._unheard:
            self._check_open()

    def lose(self, why: StreamkeepError) -> None:
        """Give the stream up, because it is somebody else's now."""
        self._sealed = why
        self._unheard = bool(self._queue or (self._doubt and self._doubt[1]))
        self._queue.clear()
        self._doubt = self._ending = None
        self._stop()
        self.cancelled.set()

    def _stop(self) -> None:
        self._over = True
        self._keeper.forget_input(self)
