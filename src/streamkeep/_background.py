"""Background: the tasks that a manager has running, and the event loop that they and it belong to.

They belong to no task group, so a manager may be entered in one task and left in another. Each has a bulkhead: whatever one raises is
logged, once, and ends that one.
"""

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import Context
from typing import Any, Final, ParamSpec, Protocol, TypeVar

import anyio
from anyio import CancelScope

from .errors import WrongEventLoopError

logger: Final = logging.getLogger("streamkeep")

P = ParamSpec("P")
R = TypeVar("R")

Run = Callable[[], Awaitable[None]]

_running_loop: Final = asyncio._get_running_loop  # noqa: SLF001 - documented, and quicker than raising


class Event(Protocol):
    """The event loop's own: what is done for every chunk does not ask each time which event loop runs, as anyio's does."""

    def set(self) -> object:
        """Wake all who wait."""
        ...

    async def wait(self) -> object:
        """Return when it is set."""
        ...


class ParkingLot(Protocol):
    """Where tasks wait until they are woken together: trio's, and the same for asyncio."""

    def __len__(self) -> int:
        """Say how many wait."""
        ...

    async def park(self) -> None:
        """Wait for the next `unpark_all`."""
        ...

    def unpark_all(self) -> object:
        """Wake all who wait."""
        ...


class Loop(Protocol):
    """What is needed of an event loop."""

    def time(self) -> float:
        """Give its time in seconds, as `anyio.current_time` does."""
        ...

    def event(self) -> Event:
        """Make an event."""
        ...

    def parking_lot(self) -> ParkingLot:
        """Make a parking lot."""
        ...

    def is_here(self) -> bool:
        """Say whether it runs in this thread, and in the process that it was started in."""
        ...

    def spawn(self, run: Callable[[], Any], context: Context, ended: Callable[[], object]) -> None:
        """Run a task that nobody owns, and call `ended` when it is over, also if it never began."""
        ...

    def call(self, function: Callable[[], object]) -> None:
        """Call a function soon, from any thread. RuntimeError: the loop is closed."""
        ...

    @property
    def is_closed(self) -> bool:
        """Whether it is known to have ended."""
        ...


class _Asyncio:
    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._process = os.getpid()
        self._tasks: set[asyncio.Task[None]] = set()  # a loop has no more than weak references
        self.time: Final = self._loop.time
        self.event: Final = asyncio.Event

    def is_here(self) -> bool:
        # A forked child may run the very loop that it has inherited.
        return _running_loop() is self._loop and os.getpid() == self._process

    def parking_lot(self) -> ParkingLot:
        return _ParkingLot(self._loop)

    def spawn(self, run: Callable[[], Any], context: Context, ended: Callable[[], object]) -> None:
        task = self._loop.create_task(run(), context=context)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: ended())

    def call(self, function: Callable[[], object]) -> None:
        self._loop.call_soon_threadsafe(function)

    @property
    def is_closed(self) -> bool:
        return self._loop.is_closed()


class _ParkingLot:
    """What trio has, for asyncio: an `asyncio.Event` serves once, and one for each change costs more than all who wait for it."""

    __slots__ = ("_loop", "_parked")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._parked: dict[asyncio.Future[None], None] = {}

    def __len__(self) -> int:
        return len(self._parked)

    async def park(self) -> None:
        future: asyncio.Future[None] = self._loop.create_future()
        self._parked[future] = None
        try:
            await future
        except BaseException:
            self._parked.pop(future, None)
            raise

    def unpark_all(self) -> None:
        parked, self._parked = self._parked, {}
        for future in parked:
            if not future.done():  # whoever waits is about to be cancelled
                future.set_result(None)


class _Trio:
    def __init__(self) -> None:
        import trio

        self._trio = trio.lowlevel
        self._token = trio.lowlevel.current_trio_token()
        self._process = os.getpid()
        self.time: Final = trio.current_time
        self.event: Final = trio.Event
        self.parking_lot: Final = trio.lowlevel.ParkingLot

    def is_here(self) -> bool:
        try:
            return self._trio.current_trio_token() is self._token and os.getpid() == self._process
        except RuntimeError:
            return False

    def spawn(self, run: Callable[[], Any], context: Context, ended: Callable[[], object]) -> None:
        async def run_to_end() -> None:  # trio begins every task
            try:
                await run()
            finally:
                ended()

        self._trio.spawn_system_task(run_to_end, context=context)

    def call(self, function: Callable[[], object]) -> None:
        try:
            self._token.run_sync_soon(function)
        except Exception as error:
            raise RuntimeError("the event loop has ended") from error

    is_closed = False  # trio does not tell; `call` does


class Task:
    """A task that was started; what can be done about it is to cancel it. Unlike anyio's scopes it can be made outside of any task."""

    def __init__(self) -> None:
        self._scope: CancelScope | None = None
        self._is_cancelled = False

    def cancel(self) -> None:
        """Cancel it, also before it has begun."""
        self._is_cancelled = True
        if self._scope is not None:
            self._scope.cancel()

    def begin(self) -> CancelScope:
        """Give the scope that the task is to run in."""
        self._scope = CancelScope()
        if self._is_cancelled:
            self._scope.cancel()
        return self._scope


class Background:
    """Starts tasks, and ends them all; for one event loop at a time."""

    def __init__(self) -> None:
        self._loop: Loop | None = None
        self._process = 0
        self._tasks: set[Task] = set()
        self._is_stopping = True
        self._is_idle = anyio.Event()

    def begin(self) -> None:
        """Belong to the event loop that runs here."""
        self._loop = loop_here()
        self._process = os.getpid()
        self._tasks.clear()
        self._is_stopping = False
        self._is_idle = anyio.Event()

    @property
    def loop(self) -> Loop:
        """The event loop that it belongs to; it must have begun."""
        assert self._loop is not None
        return self._loop

    @property
    def is_here(self) -> bool:
        """Whether this is called in the event loop, and in the process, that it belongs to."""
        return self._loop is not None and self._loop.is_here()

    @property
    def is_stopping(self) -> bool:
        """Whether no more tasks are started."""
        return self._is_stopping

    @property
    def is_forked(self) -> bool:
        """Whether this process is a child of the one that it belongs to."""
        return self._process != os.getpid()

    def check_here(self) -> None:
        """Raise WrongEventLoopError if this is called in another event loop, thread or process."""
        if self._loop is not None and not self._loop.is_here():
            raise WrongEventLoopError(
                "this stream manager was entered in another event loop, thread or process: call it there (in a thread, with "
                "`asyncio.run_coroutine_threadsafe`; `write_soon` may be called in any), or open another one here"
            )

    def check_callable(self) -> None:
        """Raise WrongEventLoopError if nothing can be called in the event loop from here, because it ended or is another process's."""
        if self._loop is None or self.is_forked or self._loop.is_closed:
            raise WrongEventLoopError("the event loop that this belongs to has ended, or is another process's")

    def start(self, run: Run, what: str, context: Context | None = None, ended: Callable[[], object] = lambda: None) -> Task:
        """Start a task, which is called `what` in the log; give what cancels it. After `stop` none is started.

        It runs in `context`, or in an empty one: what many share is not done in the name of whoever happened to come first. `ended` is
        called when it is over, whatever becomes of it: asyncio may cancel a task before it begins.
        """
        task = Task()
        if self._loop is not None and not self._is_stopping:
            self._loop.spawn(lambda: self._run(run, what, task), context or Context(), ended)
        else:
            ended()
        return task

    def call(self, function: Callable[[], object]) -> bool:
        """Call a function in the event loop soon, from any thread; False if the loop is no more."""
        assert self._loop is not None
        try:
            self._loop.call(function)
        except RuntimeError:
            return False
        return True

    def stop(self) -> None:
        """Cancel all tasks."""
        self._is_stopping = True
        for task in tuple(self._tasks):
            task.cancel()

    def leave_alone(self, task: Task) -> None:
        """Have `stop` and `wait` not concern themselves with a task that has begun, and does not end."""
        self._tasks.discard(task)

    async def wait(self) -> None:
        """Return when, after `stop`, no task is left."""
        if self._tasks:
            await self._is_idle.wait()

    async def _run(self, run: Run, what: str, task: Task) -> None:
        # Counted from here on: a task that asyncio cancels before it begins has no end that could be waited for.
        self._tasks.add(task)
        if self._is_stopping:
            task.cancel()
        try:
            with task.begin():
                await run()
        except not_ours():
            raise
        except BaseException:  # what native libraries raise may be no Exception
            logger.exception("%s ended by an error", what)
        finally:
            self._tasks.discard(task)
            if self._is_stopping and not self._tasks:
                self._is_idle.set()


def not_ours() -> tuple[type[BaseException], ...]:
    """Give what is passed on by whoever catches everything else: the end of the program, and cancellation."""
    try:
        return (KeyboardInterrupt, SystemExit, GeneratorExit, anyio.get_cancelled_exc_class())
    except RuntimeError:  # what is left of a task is closed when its event loop is no more
        return (KeyboardInterrupt, SystemExit, GeneratorExit)


def loop_here() -> Loop:
    """Give the event loop that runs here."""
    return _Asyncio() if is_asyncio_here() else _Trio()


def is_asyncio_here() -> bool:
    """Say whether the event loop that runs here is asyncio's."""
    return _running_loop() is not None


def is_cancelled_here() -> bool:
    """Say whether somebody has cancelled the task of asyncio's that runs here; True where there is none."""
    task = asyncio.current_task() if is_asyncio_here() else None
    return task is None or task.cancelling() > 0


def ran(coroutine: Coroutine[object, object, R]) -> R:
    """Run what awaits nothing but what blocks its thread instead, and so never waits as tasks do; give what it gives.

    So what is done is written once, for those who await and those who do not. It may be called where an event loop runs.
    """
    try:
        coroutine.send(None)
    except StopIteration as end:
        result: R = end.value
        return result
    raise RuntimeError("this awaits something that does not block")


class LastingExecutor(ThreadPoolExecutor):
    """What asyncio asks for addresses, and for whatever else blocks. Unlike another it does so at the end of the program, too."""

    def submit(self, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        """See `Executor.submit`."""
        try:
            return super().submit(fn, *args, **kwargs)
        except RuntimeError:  # `concurrent.futures` has ended with the main thread, and what is entered is only left behind it
            future = Future[R]()
            try:
                future.set_result(fn(*args, **kwargs))  # here: there are no more threads
            except BaseException as error:  # which is for who waits
                future.set_exception(error)
            return future


def is_programs_end(error: BaseException) -> bool:
    """Say whether there can be no more threads. From Python 3.12 on an event loop that has had such an executor wants one to be closed."""
    return isinstance(error, RuntimeError) and "interpreter shutdown" in str(error)
