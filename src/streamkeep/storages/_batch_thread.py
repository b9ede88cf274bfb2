"""A thread that does in one batch all that was asked of it while the last batch was under way.

Each batch costs one wake-up of the thread and one of the event loop, however many jobs are in it. What is asked in one turn
of the loop is handed over at its end, as one list: sixty-four writers that go on when their batch is stored are the next batch.

The thread works with a *session*, such as a connection. It is opened at the start, and again for the next jobs when it broke or when the
process has forked: a fork closes it first, so that the child inherits nothing of it.
"""

import asyncio
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Protocol, Self, TypeVar

import anyio

from streamkeep.errors import StorageError, StreamkeepError, WrongEventLoopError, fresh
from streamkeep.storages import _before_fork

_CLOSE_SECONDS = 60
_NOT_RUN = StorageError("the job was not run")


class Session(Protocol):
    """What a thread works with."""

    def abandon(self) -> None:
        """Let go of it in a forked child, where it must not be closed, because it is the parent's."""


S = TypeVar("S", bound=Session)
T = TypeVar("T")


class Job(Generic[S]):
    """A function of a session, and the future of whoever waits for its result."""

    __slots__ = ("_error", "_future", "_result", "_work")

    def __init__(self, work: Callable[[S], T], future: asyncio.Future[T]) -> None:
        self._work: Callable[[S], object] | None = work
        self._future: asyncio.Future[Any] | None = future
        self._result: object = None
        self._error: StreamkeepError | None = _NOT_RUN

    @property
    def has_outcome(self) -> bool:
        """Say whether it has a result or an error."""
        return self._error is not _NOT_RUN

    def run(self, session: S) -> None:
        """Do the work, in the thread, and note its result; what it raises is the caller's to deal with."""
        assert self._work is not None
        self._result = self._work(session)
        self._error = None

    def reset(self) -> None:
        """Forget the outcome, because what was done was undone."""
        self._result, self._error = None, _NOT_RUN

    def fail(self, error: StreamkeepError) -> None:
        """Note an error as the outcome, in place of whatever was noted: one like it that no other job has."""
        self._result = None
        self._error = fresh(error)
        self._error.__cause__ = error.__cause__

    def deliver(self) -> None:
        """Give the outcome to whoever still waits, on the loop. Nothing is kept of it here."""
        future, error, result = self._future, self._error, self._result
        self._work = self._future = self._error = self._result = None
        if future is None or future.done():
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)


@dataclass(frozen=True, slots=True)
class Done:
    """What came of a batch.

    Attributes:
        jobs: how many have an outcome, from the first one on. The others are in the next batch.
        before_delivery: called on the loop, just before the outcomes are delivered.
        is_large: the loop shall take these outcomes before there are more.
        is_broken: the session is to be replaced.
    """

    jobs: int
    before_delivery: Callable[[], None] | None = None
    is_large: bool = False
    is_broken: bool = False


class BatchThread(Generic[S]):
    """Runs jobs in order, in a thread of its own. Entering opens the session; leaving finishes the queue and closes it.

    Whatever is raised in the thread ends the jobs that it concerns and nothing else. It is a daemon: a program whose loop was killed does
    not hang on it.

    Args:
        name: the thread's.
        open_session: opens a session.
        run: gives the first of the jobs their outcomes. What it raises becomes the outcome of all that have none.
        translate: gives what a waiting caller is told of an error.
    """

    def __init__(
        self,
        name: str,
        open_session: Callable[[], AbstractContextManager[S]],
        run: Callable[[S, Collection[Job[S]]], Done],
        translate: Callable[[BaseException], StreamkeepError],
    ) -> None:
        self._open_session = open_session
        self._run = run
        self._translate = translate
        self._queue: queue.Queue[list[Job[S]] | None] = queue.Queue()
        self._asked: list[Job[S]] = []
        self._pending: deque[Job[S]] = deque()
        self._is_stopping = False
        self._is_inherited = False
        # Whoever has the turn may use, open or close the session: the thread during a batch, or who is about to fork.
        self._turn = threading.Lock()
        self._is_turn_forks = False
        self._context: AbstractContextManager[S] | None = None
        self._session: S | None = None
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._opened: asyncio.Future[None] = self._loop.create_future()
        self._fork_number = _before_fork.register(self)
        try:
            self._thread.start()
        except RuntimeError as error:
            _before_fork.unregister(self._fork_number)
            raise self._translate(error) from error
        try:
            await self._opened
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._hand_over()
        self._queue.put(None)
        with anyio.move_on_after(_CLOSE_SECONDS, shield=True):
            await self._ended
            self._thread.join()  # it has nothing left to do

    def start(self, work: Callable[[S], T]) -> asyncio.Future[T]:
        """Queue `work`; give the future of what it returns or raises. If that is cancelled, the work may still be done."""
        if self._is_inherited:
            raise WrongEventLoopError("this was opened in another process, from which this one was forked")
        future: asyncio.Future[T] = self._loop.create_future()
        if not self._asked:
            self._loop.call_soon(self._hand_over)
        self._asked.append(Job(work, future))
        return future

    # -- forks; called by whichever thread forks

    def before_fork(self, deadline: float) -> None:
        """See `Forkable`."""
        self._is_turn_forks = self._turn.acquire(timeout=max(0.0, deadline - time.monotonic()))
        if self._is_turn_forks:
            self._close()

    def after_fork(self) -> None:
        """See `Forkable`. The next job opens the session again."""
        if self._is_turn_forks:
            self._is_turn_forks = False
            self._turn.release()

    def in_child(self) -> None:
        """See `Forkable`."""
        self._is_inherited = True
        if self._session is not None:
            self._session.abandon()

    # -- on the loop

    def _hand_over(self) -> None:
        if self._asked:
            asked, self._asked = self._asked, []
            self._queue.put(asked)

    # -- in the thread

    def _main(self) -> None:
        try:
            self._open_first()
            self._post(partial(_settle, self._opened, None))
            while not self._is_over:
                self._serve()
        except BaseException as error:
            self._post(partial(_settle, self._opened, self._translate(error)))
        finally:
            with self._turn:
                self._close()
            _before_fork.unregister(self._fork_number)
            self._post(partial(_settle, self._ended, None))

    def _open_first(self) -> None:
        while True:
            _before_fork.wait()
            with suppress(_before_fork.ForkUnderWayError), self._turn:
                self._open()
                return

    def _serve(self) -> None:
        try:
            self._take()
            if self._pending:
                self._do_batch()
        except BaseException as error:
            self._fail_pending(self._translate(error))
            self._hand_back(len(self._pending), None)

    def _take(self) -> None:
        """Take all that was asked for, and wait for something if there is nothing."""
        with suppress(queue.Empty):
            while not self._is_stopping:
                asked = self._queue.get(block=not self._pending)
                if asked is None:
                    self._is_stopping = True
                else:
                    self._pending.extend(asked)

    @property
    def _is_over(self) -> bool:
        return self._is_stopping and not self._pending

    def _do_batch(self) -> None:
        _before_fork.wait()
        with self._turn:
            done = self._outcomes()
        taken = threading.Event() if done.is_large else None
        is_posted = self._hand_back(done.jobs, done.before_delivery, taken)
        if taken is not None and is_posted:
            taken.wait()

    def _outcomes(self) -> Done:
        try:
            done = self._run(self._session or self._open(), self._pending)
        except _before_fork.ForkUnderWayError:
            return Done(0)
        except BaseException as error:
            self._fail_pending(self._translate(error))
            done = Done(len(self._pending), is_broken=True)
        if done.is_broken:
            self._close()
        return done

    def _fail_pending(self, error: StreamkeepError) -> None:
        for job in self._pending:
            if not job.has_outcome:
                job.fail(error)

    def _hand_back(self, number: int, before_delivery: Callable[[], None] | None, taken: threading.Event | None = None) -> bool:
        jobs = [self._pending.popleft() for _ in range(number)]
        return self._post(partial(self._deliver, jobs, before_delivery, taken))

    def _deliver(
        self, jobs: Iterable[Job[S]], before_delivery: Callable[[], None] | None, taken: threading.Event | None
    ) -> None:
        try:
            if before_delivery is not None:
                before_delivery()
        finally:
            for job in jobs:
                job.deliver()
            if taken is not None:
                # After those who waited: they were put in the loop's queue just now.
                self._loop.call_soon(taken.set)

    def _post(self, callback: Callable[[], None]) -> bool:
        try:
            self._loop.call_soon_threadsafe(callback)
        except RuntimeError:
            # The loop was closed under us: nobody is left to tell, and nothing more will be asked.
            self._queue.put(None)
            return False
        return True

    # -- by whoever has the turn

    def _open(self) -> S:
        context = self._open_session()
        self._session = context.__enter__()
        self._context = context
        return self._session

    def _close(self) -> None:
        context, self._context, self._session = self._context, None, None
        if context is not None:
            # Nobody waits for it, and the next session does not need it.
            with suppress(BaseException):
                context.__exit__(None, None, None)


def _settle(future: asyncio.Future[None], error: Exception | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
