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

import os
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from contextvars import Context
from datetime import timedelta
from functools import partial
from threading import Lock, Thread, get_ident
from types import TracebackType
from typing import Any, Final, Generic, Self, TypeVar, overload
from weakref import WeakSet, finalize

import anyio
from anyio.from_thread import BlockingPortal

from ._background import Loop, loop_here
from ._core import Limits
from ._encoding import Encode
from ._input import StreamInput as AsyncStreamInput
from ._listing import StreamInfo, StreamPage, StreamStatus
from ._manager import StreamManager as AsyncStreamManager
from ._subscription import Subscription as AsyncSubscription
from .errors import StreamManagerClosedError, WrongEventLoopError
from .events import ErrorInfo, StreamEvent

T = TypeVar("T")
R = TypeVar("R")

Make = Callable[[], AsyncStreamManager]


class StreamManager:
    """Durable streams, for code that does not await; see `streamkeep.StreamManager`.

    It starts when it is first used, or entered with `with`, and closes with `close`, at the end of that block, or with the program. One
    that is used after it was closed starts anew; so does one that is used in a forked child, which makes it fit for workers that fork. (A
    forked child shares nothing with its parent but what the storage keeps; `memory://` is empty there.)

    Args:
        make: gives a manager that nobody else uses, each time that this starts.
    """

    def __init__(self, make: Make) -> None:
        self._make = make
        self._lock = Lock()
        self._loop: _Loop | None = None
        self._close: Callable[[], object] = _nothing
        _managers.add(self)

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
    ) -> "StreamManager":
        """Give a manager over the storage that a URL names, as `streamkeep.StreamManager.connect` does."""
        make = partial(AsyncStreamManager.connect, url, ttl=ttl, lease=lease, grace=grace, limits=limits, encode=encode)
        make()  # a URL that cannot be is told here
        return cls(make)

    def __enter__(self) -> Self:
        self._running()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the writers' streams, end all waits with StreamManagerClosedError, and return when nothing is left running."""
        with self._lock:
            self._loop = None
            close, self._close = self._close, _nothing
        close()

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
    ) -> "StreamInput":
        """Create a stream and give its one writer. Arguments and errors are those of `streamkeep.StreamManager.open`."""
        loop = self._running()

        async def opened() -> AsyncStreamInput:
            return await loop.manager.open(
                stream,
                resume=resume,
                metadata=metadata,
                ttl=ttl,
                encode=encode,
                owner=owner,
                key=key,
                run=run,
                replace=replace,
            )

        return StreamInput(loop, loop.call(opened))

    @overload
    def subscribe(
        self,
        stream: str,
        after: int | None = None,
        *,
        last: int | None = None,
        follow: bool = True,
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
        chunk_type: type[T],
        output_type: type[Any] | None = None,
        idle_timeout: timedelta | None = None,
    ) -> "Subscription[T]": ...

    def subscribe(
        self,
        stream: str,
        after: int | None = None,
        *,
        last: int | None = None,
        follow: bool = True,
        chunk_type: Any = None,
        output_type: type[Any] | None = None,
        idle_timeout: timedelta | None = None,
    ) -> "Subscription[Any]":
        """Give the events of a stream, first those that are stored, then live. Arguments and errors are those of
        `streamkeep.StreamManager.subscribe`.
        """
        loop = self._running()
        return Subscription(
            loop,
            loop.manager.subscribe(
                stream,
                after,
                last=last,
                follow=follow,
                chunk_type=chunk_type,
                output_type=output_type,
                idle_timeout=idle_timeout,
            ),
        )

    def cancel(self, stream: str) -> bool:
        """See `streamkeep.StreamManager.cancel`."""
        loop = self._running()
        return loop.call(loop.manager.cancel, stream)

    def delete(self, stream: str) -> None:
        """See `streamkeep.StreamManager.delete`."""
        loop = self._running()
        loop.call(loop.manager.delete, stream)

    def info(self, stream: str) -> StreamInfo:
        """See `streamkeep.StreamManager.info`."""
        loop = self._running()
        return loop.call(loop.manager.info, stream)

    def current(self, key: str, owner: str = "") -> StreamInfo:
        """See `streamkeep.StreamManager.current`."""
        loop = self._running()
        return loop.call(loop.manager.current, key, owner)

    def started_by(self, run: str, owner: str = "") -> StreamInfo:
        """See `streamkeep.StreamManager.started_by`."""
        loop = self._running()
        return loop.call(loop.manager.started_by, run, owner)

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
        return loop.call(partial(loop.manager.list, after, limit, owner=owner, key_prefix=key_prefix, status=status))

    def sweep(self) -> None:
        """See `streamkeep.StreamManager.sweep`."""
        loop = self._running()
        loop.call(loop.manager.sweep)

    def _running(self) -> "_Loop":
        """Give the event loop of this process. What a fork has left of the parent's is let be."""
        with self._lock:
            loop = self._loop
            if loop is None or loop.is_over:
                loop = self._loop = _Loop(self._make)
                self._close = finalize(self, loop.close)  # at the end of the program, too
            return loop

    def after_fork(self) -> None:
        """Take a new lock in a forked child, where a thread that held the old one is no more. It is called there by itself."""
        self._lock = Lock()


class StreamInput:
    """The writer of a stream, as `StreamManager.open` gives it; see `streamkeep.StreamInput`. Any thread may call it.

    As a context manager: leaving the block by an exception completes the stream with that error, leaving it without `done` releases it.

    Attributes:
        id: the stream's id.
        cancelled: is set as soon as nothing more can be written, because of somebody else: `cancelled.is_set()`, `cancelled.wait(timeout)`.
    """

    def __init__(self, loop: "_Loop", stream: AsyncStreamInput) -> None:
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

    def write(self, chunk: object) -> int:
        """Store a chunk, and give its offset when it is as durable as the storage promises. Raises as `streamkeep.StreamInput.write`."""
        return self._loop.call(self._stream.write, chunk)

    def write_soon(self, chunk: object) -> int:
        """Queue a chunk and give its offset at once: see `streamkeep.StreamInput.write_soon`."""
        self._loop.check()
        return self._stream.write_soon(chunk)

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


class Cancelled:
    """An event that others may set, as `threading.Event` has it."""

    def __init__(self, loop: "_Loop", event: anyio.Event) -> None:
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

    def __init__(self, loop: "_Loop", events: AsyncSubscription[T]) -> None:
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
        self._loop.leave(self._events)

    def __del__(self) -> None:
        if getattr(self, "_is_entered", False):
            self._loop.drop(self._events)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> StreamEvent[T]:
        if not self._ready:
            self._ready.extend(self.batch())
            if not self._ready:
                raise StopIteration
        return self._ready.popleft()

    def batch(self) -> list[StreamEvent[T]]:
        """Give all events that are at hand, waiting for at least one; an empty list after the last one."""
        if self._ready:
            ready = list(self._ready)
            self._ready.clear()
            return ready
        if not self._is_entered:
            self._ends_itself = True
            self.__enter__()
        events = self._loop.call(self._events.batch)
        if not events and self._ends_itself:
            self._loop.leave(self._events)
        return events


class _Loop:
    """An event loop in a thread of its own, with a manager that is open in it, in the process that has made this."""

    def __init__(self, make: Make) -> None:
        started: Future[_Started] = Future()
        self._process = os.getpid()
        self._is_closed = False
        self._thread = Thread(target=_run, args=(make, started), name="streamkeep", daemon=True)
        self._thread.start()
        self.manager, self._loop, self._portal, self._stop = started.result()

    @property
    def is_over(self) -> bool:
        """Whether nothing can be called here any more."""
        return self._is_closed or self._process != os.getpid() or not self._thread.is_alive()

    def check(self) -> None:
        """Raise WrongEventLoopError in another process, StreamManagerClosedError if this is over, RuntimeError in its own thread."""
        if self._process != os.getpid():
            raise WrongEventLoopError("this was opened in another process; a forked child opens its own")
        if self._thread.ident == get_ident():
            raise RuntimeError("what does not await must not be called in the event loop that it waits for")
        if self.is_over:
            raise StreamManagerClosedError("the stream manager is closed")

    def call(self, function: Callable[..., Awaitable[R]], *args: object) -> R:
        """Call a function there and wait for what it gives, or raises. One that is interrupted here is cancelled there."""
        self.check()
        try:
            future: Future[_Outcome[R]] = self._portal.start_task_soon(_caught, function, args)
        except RuntimeError:
            raise StreamManagerClosedError("the stream manager is closed") from None
        try:
            outcome = future.result()
        except CancelledError:
            raise StreamManagerClosedError("the stream manager is closed") from None
        except BaseException:
            future.cancel()
            raise
        return outcome.given()

    def leave(self, events: AsyncSubscription[Any]) -> None:
        """Leave a subscription, unless it has ended with the manager."""
        if not self.is_over:
            self.call(events.__aexit__)

    def drop(self, events: AsyncSubscription[Any]) -> None:
        """Leave it soon. For the garbage collector, which may come in any thread, and waits for nothing."""
        if not self.is_over:
            with suppress(RuntimeError):
                self._loop.call(lambda: self._loop.spawn(events.__aexit__, Context(), _nothing))

    def close(self) -> None:
        """Close the manager, and end the thread. It can be called again, and is nothing in a forked child."""
        if self.is_over:
            return
        self._is_closed = True
        with suppress(RuntimeError):  # it has ended by itself
            self._loop.call(self._stop.set)
        if self._thread.ident != get_ident():  # else the garbage collector calls
            self._thread.join()


_Started = tuple[AsyncStreamManager, Loop, BlockingPortal, anyio.Event]


def _run(make: Make, started: "Future[_Started]") -> None:
    async def main() -> None:
        manager, stop = await make().__aenter__(), anyio.Event()
        async with BlockingPortal() as portal:
            started.set_result((manager, loop_here(), portal, stop))
            try:
                await stop.wait()
            finally:
                await manager.aclose()  # which wakes those who wait
                await portal.stop(cancel_remaining=True)

    try:
        anyio.run(main)
    except BaseException as error:
        if started.done():
            raise
        started.set_exception(error)


class _Outcome(Generic[R]):
    """What a call has given, or raised."""

    def __init__(self, result: list[R], error: BaseException | None = None) -> None:
        self._result = result
        self._error = error

    def given(self) -> R:
        """Give it, or raise it."""
        if self._error is not None:
            raise self._error
        return self._result[0]


async def _caught(function: Callable[..., Awaitable[R]], args: tuple[object, ...]) -> _Outcome[R]:
    """Call a function. What is no Exception would end the portal, if it was let out here."""
    try:
        return _Outcome([await function(*args)])
    except anyio.get_cancelled_exc_class():
        raise
    except BaseException as error:
        return _Outcome([], error)


def _nothing() -> None:
    """Close nothing: nothing runs."""


_managers: Final[WeakSet[StreamManager]] = WeakSet()


def _after_fork() -> None:
    for manager in tuple(_managers):
        manager.after_fork()


os.register_at_fork(after_in_child=_after_fork)
