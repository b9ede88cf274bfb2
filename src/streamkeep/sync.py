"""Streams for code that does not await: scripts, threads, Celery and RQ workers, notebooks.

    from streamkeep.sync import StreamManager

    streams = StreamManager.connect("sqlite:///streams.db")

    with streams.open("answer-42") as stream:
        stream.write({"text": "Hello"})
        stream.done({"text": "Hello"})

    for event in streams.subscribe("answer-42"):
        print(event)

Nothing is done twice here: a `streamkeep.StreamManager` runs in an event loop of its own, in a thread of its own, and each call waits for
what it does there. So all that is said of the methods of the same names holds, but that they may be called from any thread.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from types import TracebackType
from typing import Any, Final, Generic, Self, TypeVar, overload

import anyio

from ._core import Limits
from ._encoding import Encode
from ._info import StreamInfo, StreamStatus
from ._input import StreamInput as AsyncStreamInput
from ._listing import StreamPage
from ._loop_thread import LoopThread, LoopThreads
from ._manager import StreamManager as AsyncStreamManager
from ._recoveries import Recoveries as AsyncRecoveries
from ._recovery import Recovery
from ._subscription import Subscription as AsyncSubscription
from .errors import StreamManagerClosedError, WrongEventLoopError
from .events import ErrorInfo, ReadAs, StreamEvent
from .hooks import Hooks

__all__ = ["Cancelled", "Recoveries", "StreamInput", "StreamManager", "Subscription"]

T = TypeVar("T")

Make = Callable[[], AsyncStreamManager]
Loop = LoopThread[AsyncStreamManager]


class StreamManager:
    """Durable streams, for code that does not await; see `streamkeep.StreamManager`.

    It starts when it is first used, or entered with `with`, and closes with `close`, at the end of that block, or with the program. One
    that is used after it was closed starts anew; so does one that is used in a forked child, which makes it fit for workers that fork. (A
    forked child shares nothing with its parent but what the storage keeps; `memory://` is empty there.) Threads that come while it starts
    share that start. Its first use raises what opening the storage raises, StorageUnavailableError after 15 seconds; the next tries again.

    An exception that a signal handler raises, such as KeyboardInterrupt, cancels the call that waits. Events that came meanwhile are those
    that its subscription gives next, and a stream that was opened meanwhile is released. A handler may call `close`.

    Args:
        make: gives a manager that nobody else uses, each time that this starts.
    """

    def __init__(self, make: Make) -> None:
        self._threads = LoopThreads(make)

    @classmethod
    def connect(
        cls,
        url: str,
        *,
        ttl: timedelta = timedelta(minutes=5),
        lease: timedelta = timedelta(seconds=10),
        grace: timedelta = timedelta(seconds=5),
        limits: Limits | None = None,
        encode: Encode | None = None,
        hooks: Sequence[Hooks] = (),
    ) -> "StreamManager":
        """Give a manager over the storage that a URL names, as `streamkeep.StreamManager.connect` does."""
        make = partial(
            AsyncStreamManager.connect, url, ttl=ttl, lease=lease, grace=grace, limits=limits, encode=encode, hooks=hooks
        )
        make()  # a URL that cannot be is told here
        return cls(make)

    def __enter__(self) -> Self:
        self._running()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the writers' streams, end all waits with StreamManagerClosedError, and return when nothing is left running."""
        self._threads.close()

    def open(
        self,
        stream: str,
        *,
        resume: bool = False,
        metadata: Mapping[str, str] | None = None,
        ttl: timedelta | None = None,
        encode: Encode | None = None,
        owner: str = "",
        key: str | None = None,
        run: str | None = None,
        replace: bool = False,
        recovery: Recovery | None = None,
    ) -> "StreamInput":
        """Create a stream and give its one writer. Arguments and errors are those of `streamkeep.StreamManager.open`."""
        loop, opened = self._running(), list[AsyncStreamInput]()

        async def open_there() -> None:
            opened.append(
                await loop.entered.open(
                    stream,
                    resume=resume,
                    metadata=metadata,
                    ttl=ttl,
                    encode=encode,
                    owner=owner,
                    key=key,
                    run=run,
                    replace=replace,
                    recovery=recovery,
                )
            )

        try:
            loop.call(open_there)
            return StreamInput(loop, opened[0])
        except BaseException:
            for unwanted in opened:  # it was opened when this was interrupted
                loop.spawn(unwanted.close)
            raise

    @overload
    def subscribe(
        self,
        stream: str,
        after: int | None = None,
        *,
        last: int | None = None,
        follow: bool = True,
        superseded: bool = True,
        idle_timeout: timedelta | None = None,
    ) -> "Subscription[Any]": ...

    @overload
    def subscribe(
        self,
        stream: str,
        after: int | None = None,
        *,
        last: int | None = None,
        follow: bool = True,
        superseded: bool = True,
        chunk_type: ReadAs[T],
        output_type: ReadAs[Any] | None = None,
        idle_timeout: timedelta | None = None,
    ) -> "Subscription[T]": ...

    def subscribe(
        self,
        stream: str,
        after: int | None = None,
        *,
        last: int | None = None,
        follow: bool = True,
        superseded: bool = True,
        chunk_type: Any = None,
        output_type: ReadAs[Any] | None = None,
        idle_timeout: timedelta | None = None,
    ) -> "Subscription[Any]":
        """Give the events of a stream, first those that are stored, then live. Arguments and errors are those of
        `streamkeep.StreamManager.subscribe`.
        """
        loop = self._running()
        return Subscription(
            loop,
            loop.entered.subscribe(
                stream,
                after,
                last=last,
                follow=follow,
                superseded=superseded,
                chunk_type=chunk_type,
                output_type=output_type,
                idle_timeout=idle_timeout,
            ),
        )

    def recoveries(self, *names: str, encode: Encode | None = None) -> "Recoveries":
        """Give streams to go on with, in a `with` block: `for stream in lost`. See `streamkeep.StreamManager.recoveries`."""
        loop = self._running()
        return Recoveries(loop, loop.entered.recoveries(*names, encode=encode))

    def cancel(self, stream: str, *, life: str | None = None) -> bool:
        """See `streamkeep.StreamManager.cancel`."""
        loop = self._running()
        return loop.call(partial(loop.entered.cancel, stream, life=life))

    def delete(self, stream: str, *, life: str | None = None) -> None:
        """See `streamkeep.StreamManager.delete`."""
        loop = self._running()
        loop.call(partial(loop.entered.delete, stream, life=life))

    def info(self, stream: str) -> StreamInfo:
        """See `streamkeep.StreamManager.info`."""
        loop = self._running()
        return loop.call(loop.entered.info, stream)

    def current(self, key: str, owner: str = "") -> StreamInfo:
        """See `streamkeep.StreamManager.current`."""
        loop = self._running()
        return loop.call(loop.entered.current, key, owner)

    def started_by(self, run: str, owner: str = "") -> StreamInfo:
        """See `streamkeep.StreamManager.started_by`."""
        loop = self._running()
        return loop.call(loop.entered.started_by, run, owner)

    def list(
        self,
        after: str = "",
        limit: int = 100,
        *,
        owner: str | None = None,
        key_prefix: str | None = None,
        status: StreamStatus | None = None,
    ) -> StreamPage:
        """See `streamkeep.StreamManager.list`."""
        loop = self._running()
        return loop.call(partial(loop.entered.list, after, limit, owner=owner, key_prefix=key_prefix, status=status))

    def sweep(self) -> None:
        """See `streamkeep.StreamManager.sweep`."""
        loop = self._running()
        loop.call(loop.entered.sweep)

    def _running(self) -> Loop:
        return self._threads.running()


class StreamInput:
    """The writer of a stream, as `StreamManager.open` gives it; see `streamkeep.StreamInput`. Any thread may call it.

    As a context manager: leaving the block by an exception completes the stream with that error, leaving it without `done` releases it.

    Attributes:
        id: the stream's id.
        cancelled: is set as soon as nothing more can be written, because of somebody else: `cancelled.is_set()`, `cancelled.wait(timeout)`.
    """

    def __init__(self, loop: Loop, stream: AsyncStreamInput) -> None:
        self.id: Final = stream.id
        self.cancelled: Final = Cancelled(loop, stream.cancelled)
        self._loop = loop
        self._stream = stream

    @property
    def tail(self) -> int:
        """How many events are stored: the offset of the next one."""
        return self._stream.tail

    @property
    def is_closed(self) -> bool:
        """Whether nothing more can be written."""
        return self._stream.is_closed

    @property
    def metadata(self) -> Mapping[str, str]:
        """What was given to `open`, when the stream was created."""
        return self._stream.metadata

    @property
    def key(self) -> str:
        """What it was opened under; empty if under nothing."""
        return self._stream.key

    @property
    def recovery(self) -> Recovery | None:
        """How it is gone on with, as it was given to `open`; None: not at all."""
        return self._stream.recovery

    @property
    def attempt(self) -> int:
        """How many writers of the stream have died before this one."""
        return self._stream.attempt

    @property
    def checkpoint(self) -> Any:  # noqa: ANN401 - whatever JSON it was
        """The last checkpoint that is stored: see `streamkeep.StreamInput.checkpoint`."""
        return self._stream.checkpoint

    def write(self, chunk: object, *, checkpoint: object = None) -> int:
        """Store a chunk, and give its offset when it is as durable as the storage promises. Raises as `streamkeep.StreamInput.write`."""
        return self._loop.call(partial(self._stream.write, chunk, checkpoint=checkpoint))

    def write_soon(self, chunk: object, *, checkpoint: object = None) -> int:
        """Queue a chunk and give its offset at once: see `streamkeep.StreamInput.write_soon`."""
        self._loop.check()
        return self._stream.write_soon(chunk, checkpoint=checkpoint)

    def save_checkpoint(self, checkpoint: object) -> None:
        """Store a checkpoint without a chunk: see `streamkeep.StreamInput.save_checkpoint`."""
        self._loop.call(self._stream.save_checkpoint, checkpoint)

    def restart(self) -> None:
        """Begin the answer again: see `streamkeep.StreamInput.restart`."""
        self._loop.call(self._stream.restart)

    def flush(self) -> None:
        """Return once everything that was queued is stored. Raises as `write` does."""
        self._loop.call(self._stream.flush)

    def done(self, output: object = None) -> None:
        """Complete the stream with its result. Raises as `write` does; StreamInputClosedError if it was completed before."""
        self._loop.call(self._stream.done, output)

    def error(self, error: BaseException | ErrorInfo) -> None:
        """Complete the stream with an error: see `streamkeep.StreamInput.error`."""
        self._loop.call(self._stream.error, error)

    def close(self) -> None:
        """Store what is queued and release the stream, so that another writer may go on: see `streamkeep.StreamInput.close`."""
        self._loop.call(self._stream.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._loop.call(self._stream.__aexit__, exc_type, exc, traceback)
        except (StreamManagerClosedError, WrongEventLoopError):
            if exc is None:
                raise


class Recoveries:
    """Streams to be gone on with here, as `StreamManager.recoveries` gives them; see `streamkeep.Recoveries`."""

    def __init__(self, loop: Loop, lost: AsyncRecoveries) -> None:
        self._loop = loop
        self._lost = lost

    def __enter__(self) -> Self:
        self._loop.call(self._lost.__aenter__)
        return self

    def __exit__(self, *exc_info: object) -> None:
        if not self._loop.is_over:
            self._loop.call(self._lost.__aexit__)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> StreamInput:
        return StreamInput(self._loop, self._loop.call(self._lost.__anext__))


class Cancelled:
    """An event that others may set, as `threading.Event` has it."""

    def __init__(self, loop: Loop, event: anyio.Event) -> None:
        self._loop = loop
        self._event = event

    def is_set(self) -> bool:
        """Say whether it is set."""
        return self._event.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        """Return when it is set, or after so many seconds; say whether it is. StreamManagerClosedError: the manager was closed."""
        if not self._event.is_set():
            self._loop.call(self._wait, timeout)
        return self._event.is_set()

    async def _wait(self, timeout: float | None) -> None:  # noqa: ASYNC109 - as `threading.Event` has it
        with anyio.move_on_after(timeout):
            await self._event.wait()


class Subscription(Generic[T]):
    """The events of a stream in order, as `StreamManager.subscribe` gives it; see `streamkeep.Subscription`.

    Iterate; `with` leaves it at the end of the block, and raises there what is raised when it begins, such as StreamNotFoundError. Without
    that it begins with the first event, and is left when the last one was given or nothing refers to it any more. One thread at a time
    may iterate.
    """

    def __init__(self, loop: Loop, events: AsyncSubscription[T]) -> None:
        self.id: Final = events.id
        self._loop = loop
        self._events = events
        self._is_entered = False
        self._ends_itself = False
        self._ready: deque[StreamEvent[T]] = deque()

    @property
    def life(self) -> str:
        """What tells this stream from others that live under its id before and after. RuntimeError: this has not begun."""
        return self._events.life

    @property
    def first_offset(self) -> int:
        """The offset of the first event that this gives, or will give when there is one. RuntimeError: this has not begun."""
        return self._events.first_offset

    def __enter__(self) -> Self:
        self._loop.call(self._events.__aenter__)
        self._is_entered = True
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._ready.clear()
        self._leave()

    def __del__(self) -> None:
        if getattr(self, "_is_entered", False):
            self._loop.spawn(
                self._events.__aexit__
            )  # by the garbage collector, which may come in any thread, and waits for nothing

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> StreamEvent[T]:
        if not self._ready:
            self._wait_for_more()
            if not self._ready:
                raise StopIteration
        return self._ready.popleft()

    def batch(self) -> list[StreamEvent[T]]:
        """Give all events that are at hand, waiting for at least one; an empty list after the last one."""
        if not self._ready:
            self._wait_for_more()
        ready, self._ready = self._ready, deque()
        return list(ready)

    def _wait_for_more(self) -> None:
        if not self._is_entered:
            self._ends_itself = True
            self.__enter__()
        self._loop.call(self._take)
        if not self._ready and self._ends_itself:
            self._leave()

    async def _take(self) -> None:
        self._ready.extend(await self._events.batch())  # here, or what is interrupted would lose it

    def _leave(self) -> None:
        """Leave it, unless it has ended with the manager."""
        if not self._loop.is_over:
            self._loop.call(self._events.__aexit__)
