"""An event loop in a thread of its own, for code that does not await: one for each process.

What runs there is entered when it is first used, and left with the program at the latest. It knows nothing of managers.
"""

import os
import sys
from collections.abc import Awaitable, Callable
from concurrent.futures import CancelledError, Future
from contextlib import AbstractAsyncContextManager, suppress
from contextvars import Context
from threading import Lock, Thread, get_ident
from typing import Any, Final, Generic, TypeVar
from weakref import WeakSet, finalize

import anyio
from anyio.from_thread import BlockingPortal

from ._background import Loop, loop_here
from .errors import StreamManagerClosedError, WrongEventLoopError

T = TypeVar("T")
R = TypeVar("R")

Make = Callable[[], AbstractAsyncContextManager[T]]


def check_threads() -> None:
    """Raise RuntimeError where threads are none: an event loop in one that gevent has made a greenlet would be everybody's."""
    monkey = sys.modules.get("gevent.monkey")
    if monkey is not None and monkey.is_module_patched("threading"):
        raise RuntimeError(
            "streamkeep needs real threads, and gevent has patched them: use workers of processes or threads, such as gunicorn's "
            "`--worker-class gthread` with `--threads`, or an ASGI server, instead of gevent's"
        )


class LoopThreads(Generic[T]):
    """Gives the event loop of this process, in which something is entered: a new one in a forked child, and when the last was closed.

    Args:
        make: gives what is entered, each time that an event loop starts. Nobody else uses it.
    """

    def __init__(self, make: Make[T]) -> None:
        self._make = make
        self._lock = Lock()
        self._running: LoopThread[T] | None = None
        self._close: Callable[[], object] = _nothing
        _all.add(self)

    def running(self) -> "LoopThread[T]":
        """Give the event loop of this process. What a fork has left of the parent's is let be. Raises what entering raises.

        RuntimeError: threads are greenlets of gevent's.
        """
        check_threads()
        with self._lock:
            running = self._running
            if running is None or running.is_over:
                running = self._running = LoopThread(self._make)
                self._close = finalize(self, running.close)  # at the end of the program, too
            return running

    def close(self) -> None:
        """Leave what is entered, and return when nothing is left running."""
        with self._lock:
            self._running = None
            close, self._close = self._close, _nothing
        close()

    def after_fork(self) -> None:
        """Take a new lock in a forked child, where a thread that held the old one is no more. It is called there by itself."""
        self._lock = Lock()


class LoopThread(Generic[T]):
    """An event loop in a thread of its own, with something that is entered in it, in the process that has made this.

    Attributes:
        entered: what entering has given.
    """

    def __init__(self, make: Make[T]) -> None:
        started: Future[_Started[T]] = Future()
        self._process = os.getpid()
        self._is_closed = False
        self._thread = Thread(target=_run, args=(make, started), name="streamkeep", daemon=True)
        self._thread.start()
        self.entered, self._loop, self._portal, self._stop = started.result()

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

    def begin(self, function: Callable[..., Awaitable[R]], *args: object) -> "Future[Outcome[R]]":
        """Call a function there, and give what will have its outcome; to cancel that cancels the call. Raises as `check` does."""
        self.check()
        try:
            return self._portal.start_task_soon(_caught, function, args)
        except RuntimeError:
            raise StreamManagerClosedError("the stream manager is closed") from None

    def call(self, function: Callable[..., Awaitable[R]], *args: object) -> R:
        """Call a function there and wait for what it gives, or raises. One that is interrupted here is cancelled there."""
        future = self.begin(function, *args)
        try:
            outcome = future.result()
        except CancelledError:
            raise StreamManagerClosedError("the stream manager is closed") from None
        except BaseException:
            future.cancel()
            raise
        return outcome.given()

    def soon(self, function: Callable[[], object]) -> None:
        """Call a function there soon, from any thread, and wait for nothing. It does nothing in another process, or when all is over."""
        if self._process == os.getpid():
            with suppress(RuntimeError):
                self._loop.call(function)

    def spawn(self, function: Callable[[], Awaitable[object]]) -> None:
        """Run a function in a task there, which nobody owns and nobody waits for. It does nothing if this is over."""
        if not self.is_over:
            self.soon(lambda: self._loop.spawn(function, Context(), _nothing))

    def close(self) -> None:
        """Leave what is entered, and end the thread. It can be called again, and is nothing in a forked child."""
        if self.is_over:
            return
        self._is_closed = True
        with suppress(RuntimeError):  # it has ended by itself
            self._loop.call(self._stop.set)
        if self._thread.ident != get_ident():  # else the garbage collector calls
            self._thread.join()


_Started = tuple[T, Loop, BlockingPortal, anyio.Event]


def _run(make: Make[T], started: "Future[_Started[T]]") -> None:
    async def main() -> None:
        resource, stop = make(), anyio.Event()
        entered = await resource.__aenter__()
        async with BlockingPortal() as portal:
            started.set_result((entered, loop_here(), portal, stop))
            try:
                await stop.wait()
            finally:
                await resource.__aexit__(None, None, None)  # which wakes those who wait
                await portal.stop(cancel_remaining=True)

    try:
        anyio.run(main)
    except BaseException as error:
        if started.done():
            raise
        started.set_exception(error)


class Outcome(Generic[R]):
    """What a call has given, or raised."""

    def __init__(self, result: list[R], error: BaseException | None = None) -> None:
        self._result = result
        self._error = error

    def given(self) -> R:
        """Give it, or raise it."""
        if self._error is not None:
            raise self._error
        return self._result[0]


async def _caught(function: Callable[..., Awaitable[R]], args: tuple[object, ...]) -> Outcome[R]:
    """Call a function. What is no Exception would end the portal, if it was let out here."""
    try:
        return Outcome([await function(*args)])
    except anyio.get_cancelled_exc_class():
        raise
    except BaseException as error:
        return Outcome([], error)


def _nothing() -> None:
    """Close nothing: nothing runs."""


_all: Final[WeakSet[LoopThreads[Any]]] = WeakSet()


def _after_fork() -> None:
    for threads in tuple(_all):
        threads.after_fork()


os.register_at_fork(after_in_child=_after_fork)
