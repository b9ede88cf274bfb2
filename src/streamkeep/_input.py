"""StreamInput: the one writer of a stream, as users have it. What it stores goes through its `_outbox`."""

import warnings
from collections.abc import Coroutine, Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Self

import anyio
import msgspec

from ._encoding import Encode
from ._lifecycle import Mark
from ._outbox import RELEASE_SECONDS, Marking, Outbox
from ._recovery import Recovery, checkpoint_of
from .errors import (
    StreamInputClosedError,
    StreamkeepError,
)
from .events import RESTARTED_RECORD, ErrorInfo, StreamEvent, chunk_record, done_record, error_info, error_record


class StreamInput:
    """The writer of a stream, as `StreamManager.open` gives it; not to be made directly.

    As a context manager: leaving the block by an exception completes the stream with that error, leaving it by
    cancellation or without `done` releases it. All methods but `write_soon` belong to the event loop that the manager was entered in:
    elsewhere they raise WrongEventLoopError, and change nothing. Whoever drops it without ending it gets a ResourceWarning, and the
    stream is released.

    Attributes:
        id: the stream's id.
        cancelled: an event that is set as soon as nothing more can be written, because the stream was cancelled, completed,
            taken over or deleted by somebody else. Wait for it, or look at it, to stop work that nobody wants.
        recovery: how the stream is gone on with, as it was given to `open`; None: not at all.
    """

    # `__dict__` is empty: tests of users' own replace methods, and tracers keep spans in it.
    __slots__ = ("__dict__", "__weakref__", "_encode", "_outbox", "cancelled", "id", "recovery")

    def __init__(self, outbox: Outbox, encode: Encode, recovery: Recovery | None = None) -> None:
        self.id = outbox.stream
        self.recovery = recovery
        self.cancelled = outbox.cancelled
        self._outbox = outbox
        self._encode = encode

    @property
    def tail(self) -> int:
        """How many events are stored: the offset of the next one. After `open(resume=True)`, how far the log had come."""
        return self._outbox.life.head.tail

    @property
    def is_closed(self) -> bool:
        """Whether nothing more can be written: it was completed, closed, or is somebody else's."""
        return not self._outbox.is_open

    @property
    def is_stopped(self) -> bool:
        """Whether somebody else has ended the stream, or deleted it: nobody wants the rest. False if it was released or taken over, for
        another writer to go on with.
        """
        return self._outbox.is_stopped

    @property
    def is_slow(self) -> bool:
        """Whether the last commit took so long that a producer should rather `write_soon` than wait for each of its chunks."""
        return self._outbox.is_slow

    @property
    def metadata(self) -> Mapping[str, str]:
        """What was given to `open`, when the stream was created; with its owner, if it has one."""
        return self._outbox.life.state.described

    @property
    def key(self) -> str:
        """What it was opened under, when it was created; empty if under nothing."""
        return self._outbox.life.state.key

    @property
    def attempt(self) -> int:
        """How many writers of the stream have died before this one; 0 if its recovery is None."""
        return self._outbox.life.state.attempt

    @property
    def checkpoint(self) -> Any:  # noqa: ANN401 - whatever JSON it was
        """The last checkpoint that is stored, by whichever writer; None: there is none, or the answer has begun again since."""
        text = self._outbox.life.state.checkpoint
        return msgspec.json.decode(text) if text else None

    @property
    def idle_since(self) -> float | None:
        """When the last chunk was stored, or this handle was made, by the event loop's clock; None while a chunk waits to be stored."""
        return self._outbox.idle_since

    @property
    def unread_since(self) -> float | None:
        """Since when nobody has followed the stream in this process, by the event loop's clock; None while somebody does.

        Who follows it in another process is not known here.
        """
        return self._outbox.unread_since

    @property
    def end(self) -> StreamEvent[Any] | None:
        """The stream's terminal event, if this handle has given it; `flush` returns when it is stored. None: it is open, or somebody
        else has ended it, or it was released.
        """
        return self._outbox.end

    def write(self, chunk: object, *, checkpoint: object = None) -> Coroutine[Any, Any, int]:
        """Queue a chunk; await what this gives for its offset, which comes once it is as durable as the storage promises.

        The chunk is encoded and takes its place at the call, whoever awaits first. One that nobody awaits is stored with whatever is
        written, flushed or completed next. A write that is cancelled, or that raises `StorageError`, keeps its place as well, so do not
        write it again.

        Args:
            chunk: the chunk.
            checkpoint: what another writer needs to go on behind this chunk, should this one die: JSON of 4 KiB at most, such as a
                provider's id of the answer and its number of this event. It is stored with the chunk, both or neither.

        Raises InvalidArgumentError (not JSON, or server-sent events already), LimitExceededError, StreamInputClosedError,
        StreamCompletedError, StreamTakenOverError, StreamNotFoundError (deleted), StreamManagerClosedError, WrongEventLoopError; when
        awaited, StorageError too.
        """
        outbox = self._outbox
        outbox.check_here()
        return outbox.stored(outbox.put(chunk_record(chunk, self._encode), mark=_marking(checkpoint)))

    def write_soon(self, chunk: object, *, checkpoint: object = None) -> int:
        """Queue a chunk and give its offset at once; from any thread, for callbacks that cannot await, such as Genkit's `send_chunk`.

        It is encoded in the thread that calls, and stored in the background, within milliseconds, in the order of the calls.
        `flush`, `done` and `error` wait for it, and raise if it could not be stored.

        Raises as `write` does, but StorageError; LimitExceededError also when the storage is `max_queued_events` behind.
        """
        return self._outbox.put_soon(chunk_record(chunk, self._encode), mark=_marking(checkpoint))

    async def save_checkpoint(self, checkpoint: object) -> None:
        """Store a checkpoint behind all that was written, without a chunk: what was learned before there is anything to show.

        Raises as `write` does.
        """
        outbox = self._outbox
        outbox.check_here()
        if (mark := _marking(checkpoint)) is not None:
            outbox.mark(mark)
            await outbox.flush()

    async def restart(self) -> None:
        """Begin the answer again: readers are told by a RESTARTED event that all before it is superseded. Its checkpoint is forgotten.

        Returns when that is stored. Raises as `write` does.
        """
        outbox = self._outbox
        outbox.check_here()
        await outbox.stored(outbox.put(RESTARTED_RECORD, mark=lambda tail: Mark(tail, None)))

    async def flush(self) -> None:
        """Return once everything that was queued is stored. Raises as `write` does.

        After a StorageError it tries again, also for an outcome given to `done` or `error`.
        """
        self._outbox.check_here()
        await self._outbox.flush()

    def flush_soon(self) -> None:
        """Have what was queued stored in the background, however often the storage fails meanwhile: for who goes on behind a StorageError.

        Raises WrongEventLoopError.
        """
        self._outbox.check_here()
        self._outbox.flush_soon()

    async def done(self, output: object = None) -> None:
        """Complete the stream with its result. Raises as `write` does; StreamInputClosedError if it was completed before."""
        outbox = self._outbox
        outbox.check_here()
        await outbox.finish(done_record(output, self._encode), None, max_bytes=outbox.max_event_bytes)

    async def error(self, error: BaseException | ErrorInfo) -> None:
        """Complete the stream with an error.

        An exception is stored in full; readers get its status, and its message only if it was marked public
        (`PublicError`). Raises as `done` does.
        """
        outbox = self._outbox
        outbox.check_here()
        if isinstance(error, ErrorInfo):
            await outbox.finish(error_record(error), error.status, max_bytes=outbox.max_event_bytes)
        else:
            # It has been cut to MAX_ERROR_TEXT; a stricter limit must not keep a stream from being told of its end.
            info = error_info(error)
            await outbox.finish(error_record(info), info.status, max_bytes=None)

    def end_soon(self, error: ErrorInfo) -> None:
        """End the stream with an error in its producer's place: for who runs producers, and stops one.

        At once nothing more can be written, as if somebody else had ended the stream: `cancelled` is set, and calls raise
        StreamCompletedError. What is queued is stored, and then the end, in the background. Does nothing on a handle that is completed or
        closed. Raises InvalidArgumentError (details that are not JSON), WrongEventLoopError.
        """
        self._outbox.check_here()
        self._outbox.end_soon(error)

    def leave_soon(self) -> None:
        """Release the stream in its producer's place, so that another one goes on: for who runs producers, and has no more time for one.

        As with `end_soon` nothing more can be written at once: calls raise StreamTakenOverError. What is queued is stored, and then the
        release, in the background. Raises WrongEventLoopError.
        """
        self._outbox.check_here()
        self._outbox.leave_soon()

    def producing(self) -> AbstractContextManager[None]:
        """Give a block for the producer to run in: for who runs producers. There its context is as the manager's hooks want it, so that its
        spans are the run's. `async with streams.open(...)` is such a block.
        """
        return self._outbox.producing()

    async def close(self) -> None:
        """Store what is queued and release the stream without completing it, so that another writer may go on at once.

        If none does, readers are told ABORTED after lease and grace. Does nothing on a handle that is completed or closed.
        Raises as `write` does if what was queued is lost, and no other call has said so.
        """
        self._outbox.check_here()
        await self._outbox.release(StreamInputClosedError("the stream input is closed"))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if exc is None:
            await self.close()
            return
        # The exception must arrive, bare, whatever becomes of the stream; so this ends in time, and says nothing of its own.
        with anyio.move_on_after(RELEASE_SECONDS, shield=True):
            try:
                if isinstance(exc, Exception) and self._outbox.is_open:
                    await self.error(exc)
                else:
                    await self.close()
            except StreamkeepError as error:
                self._outbox.warn("could not be told of its writer's end", error)

    def __del__(self) -> None:
        outbox: Outbox | None = getattr(self, "_outbox", None)
        if outbox is not None and outbox.is_open and outbox.release_soon():
            warnings.warn(f"the writer of stream {self.id} was dropped without `done`, `error` or `close`", ResourceWarning, 2)


def _marking(checkpoint: object) -> Marking:
    if checkpoint is None:
        return None
    text = checkpoint_of(checkpoint)
    return lambda tail: Mark(tail, text)
