"""A thread that does in one batch all that was asked of it while the last batch was under way.

Each batch costs one wake-up of the thread and one of the event loop, however many jobs are in it. What is asked in one turn
of the loop is handed over at its end, as one list: sixty-four writers that go on when their batch is stored are the next batch.

A fork finds no session open, because what a session has, such as SQLite's locks, must not be in two processes at once: the fork
waits for the batch under way, though not for ever, and closes the session, which the next batch opens again.
"""

import asyncio
import ctypes
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any, Final, Generic, Self, TypeVar

import anyio

from streamkeep.errors import StorageError, fresh

logger: Final = logging.getLogger("streamkeep")

S = TypeVar("S")
T = TypeVar("T")
Outcome = tuple[int, Callable[[], None] | None]

_CLOSE_SECONDS: Final = 60
_FORK_SECONDS: Final = 10
_NOT_RUN: Final = StorageError("the job was not run")


class ForkPendingError(Exception):
    """Raised by a session that waited for something while a fork waits for it. It has done nothing yet, and is asked again afterwards."""


class Job(Generic[S]):
    """A function of a session, and the future of whoever waits for its result."""

    __slots__ = ("_error", "_future", "_result", "_work")

    def __init__(self, work: Callable[[S], T], future: asyncio.Future[T]) -> None:
        self._work: Callable[[S], object] = work
        self._future: asyncio.Future[Any] = future
        self._result: object = None
        self._error: Exception | None = _NOT_RUN

    def run(self, session: S) -> None:
        """Do the work, in the thread, and note its result; what it raises is the caller's to deal with."""
        self._result = self._work(session)
        self._error = None

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

    The thread is a daemon: a program whose loop was killed does not hang on it.

    Args:
        name: the thread's.
        session: opens a session. It is given a function that says whether a fork waits; whoever waits for something in the session asks it
            now and then, and raises ForkPendingError if nothing was done yet.
        run: gives each job of a batch an outcome, or the first of them only. It returns how many, and what is to be called on the
            loop just before those are delivered. It goes on with the others when the loop has taken these.
        lost: called in a forked child if a batch did not end in time, so that the child has an open session that it must not touch.
    """

    def __init__(
        self,
        name: str,
        session: Callable[[Callable[[], bool]], AbstractContextManager[S]],
        run: Callable[[S, Sequence[Job[S]]], Outcome],
        lost: Callable[[], None],
    ) -> None:
        self._open_session = session
        self._run = run
        self._lost = lost
        self._queue: queue.Queue[list[Job[S]] | None] = queue.Queue()
        self._asked: list[Job[S]] = []
        self._turn = threading.Lock()  # held while the session is used, and during a fork
        self._no_fork = threading.Event()  # a lock is not fair: without it, a busy thread would not let a fork have its turn
        self._no_fork.set()
        self._resources = ExitStack()
        self._session: S | None = None
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._opened: asyncio.Future[None] = self._loop.create_future()
        try:
            self._thread.start()
        except RuntimeError as error:
            raise StorageError(f"the storage's thread cannot be started: {error}") from error
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
            return
        logger.error("%s has not ended in %d seconds, and is left alone", self._thread.name, _CLOSE_SECONDS)

    def start(self, work: Callable[[S], T]) -> asyncio.Future[T]:
        """Queue `work`; give the future of what it returns or raises. If that is cancelled, the work may still be done."""
        future: asyncio.Future[T] = self._loop.create_future()
        if not self._asked:
            self._loop.call_soon(self._hand_over)
        self._asked.append(Job(work, future))
        return future

    def _hand_over(self) -> None:
        if self._asked:
            asked, self._asked = self._asked, []
            self._queue.put(asked)

    # In the thread

    def _main(self) -> None:
        with _forks.lock:
            _forks.threads.add(self)
        error: BaseException | None = None
        try:
            self._in_turn(lambda _: None)
            self._post(partial(_settle, self._opened, None))
            self._serve()
        except BaseException as failure:  # whatever it is, whoever waits is told
            error = failure
        finally:
            with self._turn:
                self._close_session()
            with _forks.lock:
                _forks.threads.discard(self)
            self._post(partial(_settle, self._opened, error))
            self._post(partial(_settle, self._ended, None))

    def _serve(self) -> None:
        jobs: list[Job[S]] = []
        is_last = False
        while jobs or not is_last:
            if not jobs:
                jobs, is_last = self._take()
            if jobs:
                jobs = self._do_batch(jobs)

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

    def _do_batch(self, jobs: list[Job[S]]) -> list[Job[S]]:
        """Do the jobs, or the first of them, and give those that are left; not before the loop has taken what was done."""
        done, first = self._outcomes(jobs)
        taken = threading.Event()
        if self._post(partial(_deliver, jobs[:done], first, taken)) and done < len(jobs):
            taken.wait(_CLOSE_SECONDS)
        return jobs[done:]

    def _outcomes(self, jobs: Sequence[Job[S]]) -> Outcome:
        try:
            return self._in_turn(lambda session: self._run(session, jobs))
        except BaseException as error:  # whatever it is, the thread goes on, and who has asked is told
            failure = _as_storage_error(error)
            for job in jobs:
                job.fail(failure)
            return len(jobs), None

    def _in_turn(self, use: Callable[[S], T]) -> T:
        """Use the session while no fork is under way."""
        while True:
            self._no_fork.wait()
            with self._turn:
                try:
                    return use(self._opened_session())
                except ForkPendingError:
                    continue

    def _opened_session(self) -> S:
        if self._session is None:
            no_fork = self._no_fork
            self._session = self._resources.enter_context(self._open_session(lambda: not no_fork.is_set()))
        return self._session

    def _close_session(self) -> None:
        self._session = None
        try:
            self._resources.close()
        except Exception:
            logger.exception("a session could not be closed in good order")

    def _post(self, callback: Callable[[], None]) -> bool:
        try:
            self._loop.call_soon_threadsafe(callback)
        except RuntimeError:
            # The loop was closed under us: nobody is left to tell, and nothing more will be asked.
            self._queue.put(None)
            return False
        return True

    # In whichever thread forks

    def announce_fork(self) -> None:
        """Let no batch begin any more."""
        self._no_fork.clear()

    def suspend(self, deadline: float) -> bool:
        """Wait for the batch under way, and close the session; False if it has not ended at `deadline` (of `time.monotonic`)."""
        if not self._turn.acquire(timeout=max(0.0, deadline - time.monotonic())):
            logger.error("a fork did not wait for %s any longer: the child cannot use what it uses", self._thread.name)
            return False
        self._close_session()
        return True

    def resume(self, *, was_suspended: bool) -> None:
        """Go on, in the parent."""
        if was_suspended:
            self._turn.release()
        self._no_fork.set()

    def lose(self) -> None:
        """Never touch the session again, in the child: it is in the middle of something, and the parent goes on with it."""
        # Not even when the interpreter is torn down.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._resources))
        self._lost()


def _deliver(jobs: Sequence[Job[S]], first: Callable[[], None] | None, taken: threading.Event) -> None:
    taken.set()
    try:
        if first is not None:
            first()
    except Exception:  # those who wait for the jobs are told all the same
        logger.exception("what was to be called before a batch is delivered failed")
    for job in jobs:
        job.deliver()


def _as_storage_error(error: BaseException) -> StorageError:
    if isinstance(error, StorageError):
        return error
    failure = StorageError(f"the storage's thread failed: {error!r}")
    failure.__cause__ = error
    return failure


def _settle(future: asyncio.Future[None], error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(_as_storage_error(error))


class _Forks:
    """The threads of this process that may have a session open, and what a fork does to them."""

    def __init__(self) -> None:
        self.lock = threading.Lock()  # held during a fork, and while a thread comes or goes
        self.threads: set[BatchThread[Any]] = set()
        self._suspended: set[BatchThread[Any]] = set()

    def before(self) -> None:
        self.lock.acquire()
        deadline = time.monotonic() + _FORK_SECONDS
        for thread in self.threads:
            thread.announce_fork()
        for thread in self.threads:
            if thread.suspend(deadline):
                self._suspended.add(thread)

    def after_in_parent(self) -> None:
        for thread in self.threads:
            thread.resume(was_suspended=thread in self._suspended)
        self._suspended.clear()
        self.lock.release()

    def after_in_child(self) -> None:
        for thread in self.threads - self._suspended:
            thread.lose()
        self.threads.clear()
        self._suspended.clear()
        self.lock.release()


_forks: Final = _Forks()

if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(before=_forks.before, after_in_parent=_forks.after_in_parent, after_in_child=_forks.after_in_child)
