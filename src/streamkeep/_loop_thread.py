"""An event loop in a thread of its own, for code that does not await: one for each process.

What runs there is entered when it is first used, and left with the program at the latest. It knows nothing of managers.

A signal handler may come at any time, also into a thread that waits here, and may close what is waited for. So nobody who waits holds a
lock, and what is waited by takes none: a SimpleQueue.
"""

import asyncio
import math
import os
import sys
import time
from collections.abc import Awaitable, Callable, Generator
from contextlib import AbstractAsyncContextManager, contextmanager, suppress
from contextvars import Context, copy_context
from functools import partial
from queue import Empty, SimpleQueue
from threading import RLock, Thread, get_ident
from typing import Any, Final, Generic, TypeVar
from weakref import WeakSet, finalize

import anyio

from ._background import Background, LastingExecutor, Loop, Task, is_programs_end, loop_here
from .errors import StorageUnavailableError, StreamManagerClosedError, WrongEventLoopError, fresh

T = TypeVar("T")
R = TypeVar("R")

Make = Callable[[], AbstractAsyncContextManager[T]]
START_SECONDS: Final = 15.0
"""How long entering may take. Storages give up sooner, but for one that blocks its event loop."""
LEAVE_SECONDS: Final = 1.0
"""How long a start that was given up may take to say so."""


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
        start_seconds: how long entering may take.
    """

    def __init__(self, make: Make[T], start_seconds: float = START_SECONDS) -> None:
        self._make = make
        self._start_seconds = start_seconds
        self._lock = RLock()  # for a signal handler in the very thread that holds it
        self._running: LoopThread[T] | None = None
        self._at_end: Callable[[], object] = _nothing
        _all.add(self)

    @property
    def is_running(self) -> bool:
        """Whether this process has one, which has not been closed; it may still be starting."""
        running = self._running
        return running is not None and not running.is_over

    def running(self) -> "LoopThread[T]":
        """Give the event loop of this process. What a fork has left of the parent's is let be.

        All who come while it starts wait for that one start, and are told when it fails, each by what entering raises; who comes behind
        that starts anew. StorageUnavailableError: it takes too long. RuntimeError: threads are greenlets of gevent's.
        """
        running = self.starting()
        running.wait()
        return running

    def starting(self) -> "LoopThread[T]":
        """Do what `running` does, but wait for nothing: it has started when its `wait`, or `wait_async`, returns."""
        check_threads()
        with self._lock:
            running = self._running
            if running is None or running.is_over:
                self._at_end()
                running = self._running = LoopThread(self._make, self._start_seconds)
                closing = finalize(self, running.close)  # at the end of the program, too
                self._at_end = closing.detach
            running.start()
        return running

    def close(self) -> None:
        """Leave what is entered, and return when nothing is left running. A signal handler may call it."""
        with self._lock:
            running, self._running = self._running, None
            at_end, self._at_end = self._at_end, _nothing
            at_end()
        if running is not None:
            running.close()

    def after_fork(self) -> None:
        """Take a new lock in a forked child, where a thread that held the old one is no more. It is called there by itself."""
        self._lock = RLock()


class LoopThread(Generic[T]):
    """An event loop in a thread of its own, with something that is entered in it, in the process that has made this.

    Attributes:
        entered: what entering has given.
    """

    entered: T

    def __init__(self, make: Make[T], start_seconds: float) -> None:
        self._make = make
        self._start_seconds = start_seconds
        self._give_up_at = math.inf
        self._process = os.getpid()
        self._thread = Thread(target=self._run, name="streamkeep", daemon=True)
        self._loop: Loop | None = None
        self._tasks = Background()
        self._leave: Callable[[], object] = _nothing
        self._is_started = self._is_closed = self._is_left = False
        self._failure: BaseException | None = None
        self._starting: set[Callable[[], object]] = set()  # those who are told when that is over, in any thread
        self._calls: set[_Call] = set()

    @property
    def is_over(self) -> bool:
        """Whether nothing can be called here any more."""
        return self._is_closed or self._is_left or self._failure is not None or self._process != os.getpid()

    def start(self) -> None:
        """Start the thread, unless it was."""
        if self._thread.ident is None and not self._is_closed:
            self._give_up_at = time.monotonic() + self._start_seconds + LEAVE_SECONDS
            self._thread.start()

    def wait(self) -> None:
        """Return when something is entered. Raises what entering raises; StorageUnavailableError: that takes too long."""
        told = SimpleQueue[None]()
        with self._told_of_start(lambda: told.put(None)) as is_starting:
            if is_starting:
                with suppress(Empty):
                    told.get(timeout=self._seconds_left())
        self._check_started()

    async def wait_async(self) -> None:
        """Do what `wait` does, in another event loop, and without a thread."""
        told, loop = anyio.Event(), loop_here()
        with self._told_of_start(lambda: loop.call(told.set)) as is_starting:
            if is_starting:
                with anyio.move_on_after(self._seconds_left()):
                    await told.wait()
        self._check_started()

    @contextmanager
    def _told_of_start(self, tell: Callable[[], object]) -> Generator[bool]:
        """Have something called when the start is over, while within; False: it is already, or will not be."""
        self._starting.add(tell)
        try:
            never = self._is_closed and self._thread.ident is None  # by a signal's handler, before it was started
            yield not (self._is_started or self._is_left or never)
        finally:
            self._starting.discard(tell)

    def _seconds_left(self) -> float:
        return max(0.0, self._give_up_at - time.monotonic())

    def _check_started(self) -> None:
        match self._failure:
            case None if self._is_started:
                return
            case None:
                raise _closed() if self._thread.ident is None else self._too_slow()
            case Exception() as failure:
                raise fresh(failure) from failure
            case failure:
                raise RuntimeError("what runs in the event loop could not be started") from failure

    def check(self) -> None:
        """Raise WrongEventLoopError in another process, StreamManagerClosedError if this is over, RuntimeError in its own thread."""
        if self._process != os.getpid():
            raise WrongEventLoopError("this was opened in another process; a forked child opens its own")
        if self._thread.ident == get_ident():
            raise RuntimeError("what does not await must not be called in the event loop that it waits for")
        if self.is_over:
            raise _closed()

    def begin(
        self, told: "Callable[[Outcome[R]], object]", function: Callable[..., Awaitable[R]], *args: object
    ) -> Callable[[], object]:
        """Call a function there, and have a function of the caller's told its outcome; the first that it is told counts. It is called in
        any thread, and must not block. Gives what cancels the call. Raises as `check` does.
        """
        self.check()
        call = _Call(lambda: told(Outcome([], _closed())))
        self._calls.add(call)
        context = copy_context()

        def start() -> None:
            run = partial(_tell, told, function, args)
            call.task = self._tasks.start(run, "a call", context, partial(self._end, call))

        try:
            self._call(start)
        except RuntimeError:
            self._end(call)
        if self._is_left:  # and nobody else would say so
            self._end(call)
        return lambda: self.soon(call.cancel)

    def call(self, function: Callable[..., Awaitable[R]], *args: object) -> R:
        """Call a function there and wait for what it gives, or raises. One that is interrupted here is cancelled there, and over when this
        raises, unless that takes more than a second.
        """
        outcomes, told = list[Outcome[R]](), SimpleQueue[None]()

        def tell(outcome: Outcome[R]) -> None:
            outcomes.append(outcome)
            told.put(None)

        cancel = self.begin(tell, function, *args)
        try:
            told.get()
        except BaseException:
            cancel()
            with suppress(Empty):
                told.get(timeout=0 if outcomes else LEAVE_SECONDS)
            raise
        return outcomes[0].given()

    def soon(self, function: Callable[[], object]) -> None:
        """Call a function there soon, from any thread, and wait for nothing. It does nothing in another process, or when all is over."""
        if self._process == os.getpid():
            with suppress(RuntimeError):
                self._call(function)

    def spawn(self, function: Callable[[], Awaitable[object]]) -> None:
        """Run a function in a task there, which nobody owns and nobody waits for. It does nothing if this is over."""
        if not self.is_over and (loop := self._loop) is not None:
            self.soon(lambda: loop.spawn(function, Context(), _nothing))

    def close(self) -> None:
        """Leave what is entered, and end the thread. It can be called again, and is nothing in a forked child.

        A start that blocks its event loop is waited for a second, no longer: the program may be at its end. What it enters is left then.
        """
        if self.is_over:
            return
        self._is_closed = True
        self.soon(self._leave_now)
        if self._thread.ident not in {None, get_ident()}:  # it may be the garbage collector that calls
            self._thread.join(None if self._is_started else LEAVE_SECONDS)
            if self._is_started:  # by now
                self._thread.join()

    def _leave_now(self) -> None:
        self._leave()  # what it is by now

    def _call(self, function: Callable[[], object]) -> None:
        """Call a function in the event loop. RuntimeError: there is none yet, or none any more."""
        if self._loop is None:
            raise RuntimeError("the event loop has not begun")
        self._loop.call(function)

    def _end(self, call: "_Call") -> None:
        self._calls.discard(call)
        call.end()

    def _run(self) -> None:
        try:
            anyio.run(self._main)
        except BaseException as error:
            if not self._is_started:
                self._failure = error
            elif not is_programs_end(error):
                raise
        finally:
            self._is_left = True
            self._tell_of_start()
            for call in tuple(self._calls):
                self._end(call)

    async def _main(self) -> None:
        stop = anyio.Event()
        with anyio.move_on_after(self._start_seconds) as starting:
            self._leave = starting.cancel
            self._loop = loop_here()
            asyncio.get_running_loop().set_default_executor(LastingExecutor())
            if self._is_closed:  # which had nobody to tell
                starting.cancel()
            resource = self._make()
            entered = await resource.__aenter__()
            self._leave = stop.set
        if starting.cancelled_caught:
            raise _closed() if self._is_closed else self._too_slow()
        self._tasks.begin()
        self.entered = entered
        self._is_started = True
        self._tell_of_start()
        try:
            if not self._is_closed:
                await stop.wait()
        finally:
            try:
                await resource.__aexit__(None, None, None)  # which wakes those who wait
            finally:
                self._tasks.stop()
                await self._tasks.wait()

    def _tell_of_start(self) -> None:
        for tell in tuple(self._starting):
            with suppress(RuntimeError):  # whoever waits has ended with its event loop
                tell()

    def _too_slow(self) -> StorageUnavailableError:
        return StorageUnavailableError(f"the storage could not be opened within {self._start_seconds:g} seconds")


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


class _Call:
    """A call that may have no outcome: when all is over first, say."""

    def __init__(self, end: Callable[[], object]) -> None:
        self.task: Task | None = None
        self.end = end

    def cancel(self) -> None:
        assert self.task is not None  # it was started before this is called
        self.task.cancel()


async def _tell(told: Callable[[Outcome[R]], object], function: Callable[..., Awaitable[R]], args: tuple[object, ...]) -> None:
    try:
        outcome = Outcome([await function(*args)])
    except anyio.get_cancelled_exc_class():
        raise
    except BaseException as error:  # what is no Exception would end the event loop, if it was let out here
        outcome = Outcome[R]([], error)
    told(outcome)


def _closed() -> StreamManagerClosedError:
    return StreamManagerClosedError("the stream manager is closed")


def _nothing() -> None:
    """Close nothing: nothing runs."""


_all: Final[WeakSet[LoopThreads[Any]]] = WeakSet()


def _after_fork() -> None:
    for threads in tuple(_all):
        threads.after_fork()


os.register_at_fork(after_in_child=_after_fork)
