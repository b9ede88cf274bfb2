"""A thread that does in one batch all that was asked of it while the last batch was under way.

Each batch costs one wake-up of the thread and one of the event loop, however many jobs are in it. What is asked in one turn
of the loop is handed over at its end, as one list: sixty-four writers that go on when their batch is stored are the next batch.
"""

import asyncio
import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Generic, Self, TypeVar

import anyio

S = TypeVar("S")
T = TypeVar("T")

_CLOSE_SECONDS = 60
_NOT_RUN = RuntimeError("the job was not run")


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
        """Give the outcome to whoever still waits, on the loop."""
        if self._future.done():
            return
        if self._error is None:
            self._future.set_result(self._result)
        else:
            self._future.set_exception(self._error)


class BatchThread(Generic[S]):
    """Runs jobs in order, in a thread of its own. Entering opens the session; leaving finishes the queue and closes it.

    `run` gives each job of a batch an outcome; what it returns is called on the loop, just before those are delivered.
    The thread is a daemon: a program whose loop was killed does not hang on it.
    """

    def __init__(
        self,
        name: str,
        session: Callable[[], AbstractContextManager[S]],
        run: Callable[[S, Sequence[Job[S]]], Callable[[], None] | None],
    ) -> None:
        self._open_session = session
        self._run = run
        self._queue: queue.Queue[list[Job[S]] | None] = queue.Queue()
        self._asked: list[Job[S]] = []
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._opened: asyncio.Future[None] = self._loop.create_future()
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

    def _main(self) -> None:
        try:
            with self._open_session() as session:
                self._post(partial(_settle, self._opened, None))
                self._serve(session)
        except Exception as error:
            self._post(partial(_settle, self._opened, error))
        finally:
            self._post(partial(_settle, self._ended, None))

    def _serve(self, session: S) -> None:
        while self._do_batch(session):
            pass

    def _do_batch(self, session: S) -> bool:
        """Wait for jobs and do them; False when no more will come. Nothing of them is kept while the next are awaited."""
        jobs, stopping = self._take()
        if jobs:
            self._post(partial(_deliver, jobs, self._outcomes(session, jobs)))
        return not stopping

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

    def _outcomes(self, session: S, jobs: Sequence[Job[S]]) -> Callable[[], None] | None:
        try:
            return self._run(session, jobs)
        except Exception as error:
            for job in jobs:
                job.fail(error)
            return None

    def _post(self, callback: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(callback)
        except RuntimeError:
            # The loop was closed under us: nobody is left to tell, and nothing more will be asked.
            self._queue.put(None)


def _deliver(jobs: Sequence[Job[S]], first: Callable[[], None] | None) -> None:
    if first is not None:
        first()
    for job in jobs:
        job.deliver()


def _settle(future: asyncio.Future[None], error: Exception | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
