"""A thread that does in one batch all that was asked of it while the last batch was under way.

Each batch costs one wake-up of the thread and one of the event loop, however many jobs are in it. What is asked in one turn
of the loop is handed over at its end, as one list: sixty-four writers that go on when their batch is stored are the next batch.

A fork finds no session open: it waits for the batch under way, closes the session, and the next batch opens it again. What a session
has, such as SQLite's locks, must not be in two processes at once.
"""

import asyncio
import logging
import os
import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any, Final, Generic, Self, TypeVar
from weakref import WeakSet

import anyio

from streamkeep.errors import StorageError, fresh

logger: Final = logging.getLogger("streamkeep")

S = TypeVar("S")
T = TypeVar("T")
Outcome = tuple[int, Callable[[], None] | None]

_CLOSE_SECONDS: Final = 60
_FORK_SECONDS: Final = 30
_NOT_RUN: Final = StorageError("the job was not run")


class Job(Generic[S]):
    """A function of a session, and the future of whoever waits for its result."""

    __slots__ = ("_error", "_future", "_result", "_work")

    def __init__(self, work: Callable[[S], T], future: asyncio.Future[T]) -> None:
        self._work: Callable[[S], object] = work
        self._future: asyncio.Future[Any] = future
        self._result: object = None
        self._error: Exception | None = _NOT_RUN

    def run(self, session: S) -> object:
        """Do the work, in the thread, note its result and give it; what it raises is the caller's to deal with."""
        self._result = self._work(session)
        self._error = None
        return self._result

    def fail(self, error: Exception) -> None:
        """Note an error as the outcome, in place of whatever was noted."""
        self._error = error

    def deliver(self) -> None:
        """Give the outcome to whoever still waits, on the loop. Several jobs may have failed with the same error."""
        if self._future.done():
            return
        if self._error is None:
            self._future.set_result(self._result)
        else:
            self._future.set_exception(fresh(self._error))


class BatchThread(Generic[S]):
    """Runs jobs in order, in a thread of its own. Entering opens the session; leaving finishes the queue and closes it.

    `run` gives each job of a batch an outcome, or the first of them only: it returns how many, and what is to be called on the loop just
    before those are delivered. It goes on with the others when the loop has taken these.
    The thread is a daemon: a program whose loop was killed does not hang on it.
    """

    def __init__(
        self,
        name: str,
        session: Callable[[], AbstractContextManager[S]],
        run: Callable[[S, Sequence[Job[S]]], Outcome],
    ) -> None:
        self._open_session = session
        self._run = run
        self._queue: queue.Queue[list[Job[S]] | None] = queue.Queue()
        self._asked: list[Job[S]] = []
        self._turn = threading.Lock()  # held during a batch, and during a fork
        self._delivered = threading.Event()
        self._resources = ExitStack()
        self._session: S | None = None
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._opened: asyncio.Future[None] = self._loop.create_future()
        _threads.add(self)
        self._thread.start()
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
        _threads.discard(self)

    def start(self, work: Callable[[S], T]) -> asyncio.Future[T]:
        """Queue `work`; give the future of what it returns or raises. If that is cancelled, the work may still be done."""
        future: asyncio.Future[T] = self._loop.create_future()
        if not self._asked:
            self._loop.call_soon(self._hand_over)
        self._asked.append(Job(work, future))
        return future

    def before_fork(self) -> None:
        """Wait for the batch under way, and close the session."""
        if not self._turn.acquire(timeout=_FORK_SECONDS):
            logger.error("a fork did not wait for a storage any longer; the child must not use its file")
            return
        self._close_session()

    def after_fork(self) -> None:
        """Go on, in the parent."""
        if self._turn.locked():
            self._turn.release()

    def _hand_over(self) -> None:
        if self._asked:
            asked, self._asked = self._asked, []
            self._queue.put(asked)

    def _main(self) -> None:
        error: Exception | None = None
        try:
            with self._turn:
                self._session_now()
            self._post(partial(_settle, self._opened, None))
            self._serve()
        except Exception as failure:
            error = failure
        finally:
            with self._turn:
                self._close_session()
            self._post(partial(_settle, self._opened, error))
            self._post(partial(_settle, self._ended, None))

    def _session_now(self) -> S:
        if self._session is None:
            self._session = self._resources.enter_context(self._open_session())
        return self._session

    def _close_session(self) -> None:
        self._session = None
        try:
            self._resources.close()
        except Exception:
            logger.exception("a session could not be closed in good order")

    def _serve(self) -> None:
        jobs: list[Job[S]] = []
        is_last = False
        while jobs or not is_last:
            if not jobs:
                jobs, is_last = self._take()
            jobs = self._do_batch(jobs)

    def _do_batch(self, jobs: list[Job[S]]) -> list[Job[S]]:
        """Do the jobs, or the first of them, and give those that are left."""
        if not jobs:
            return jobs
        with self._turn:
            done, first = self._outcomes(jobs)
        self._delivered.clear()
        self._post(partial(self._deliver, jobs[:done], first))
        if len(jobs) > done:
            self._delivered.wait(_CLOSE_SECONDS)
        return jobs[done:]

    def _take(self) -> tuple[list[Job[S]], bool]:
        jobs: list[Job[S]] = []
        asked = self._queue.get()
        while asked is not None:
            jobs += asked
            try:
                asked = self._queue.get_nowait()
            except queue.Empty:
                return jobs, False
        return jobs, True

    def _outcomes(self, jobs: Sequence[Job[S]]) -> Outcome:
        try:
            return self._run(self._session_now(), jobs)
        except BaseException as error:  # whatever it is, the thread goes on, and who has asked is told
            failure = error if isinstance(error, StorageError) else StorageError(f"the storage's thread failed: {error!r}")
            failure.__cause__ = None if failure is error else error
            for job in jobs:
                job.fail(failure)
            return len(jobs), None

    def _deliver(self, jobs: Sequence[Job[S]], first: Callable[[], None] | None) -> None:
        self._delivered.set()
        if first is not None:
            first()
        for job in jobs:
            job.deliver()

    def _post(self, callback: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(callback)
        except RuntimeError:
            # The loop was closed under us: nobody is left to tell, and nothing more will be asked.
            self._delivered.set()
            self._queue.put(None)


def _settle(future: asyncio.Future[None], error: Exception | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)


_threads: "WeakSet[BatchThread[Any]]" = WeakSet()
_forking: list[BatchThread[Any]] = []


def _before_fork() -> None:
    _forking.extend(_threads)
    for thread in _forking:
        thread.before_fork()


def _after_fork_in_parent() -> None:
    while _forking:
        _forking.pop().after_fork()


def _after_fork_in_child() -> None:
    # Nothing of them is open here, and their threads are the parent's.
    _forking.clear()
    _threads.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
