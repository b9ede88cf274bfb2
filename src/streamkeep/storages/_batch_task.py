"""A task that does in one round trip all that was asked of it while the last one was under way; for drivers of asyncio.

What `BatchThread` is for a driver that blocks. Requests are done in the order in which they were asked, one batch at a time: sixty-four
writers that go on when their batch is stored are the next batch.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Generic, NoReturn, Self, TypeVar

import anyio

from streamkeep.errors import StorageError, fresh

A = TypeVar("A")
R = TypeVar("R")

_CLOSE_SECONDS: Final = 60


class BatchTask(Generic[A, R]):
    """Runs requests in batches, in a task of its own. Leaving it finishes what was asked.

    `run` gives one answer for each request of a batch, in order; a StorageError among them is raised where that request was made.
    Whatever `run` raises ends that batch, not the task: each request of it gets a StorageError of its own. A caller that is cancelled
    leaves its request in the batch: it may still be done.
    """

    def __init__(self, run: Callable[[Sequence[A]], Awaitable[Sequence[R | StorageError]]], *, max_batch: int = 512) -> None:
        self._run = run
        self._max_batch = max_batch
        self._asked: list[tuple[A, asyncio.Future[R]]] = []
        self._wanted = asyncio.Event()
        self._closing = False

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._task = self._loop.create_task(self._serve())
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._closing = True
        self._wanted.set()
        try:
            with anyio.move_on_after(_CLOSE_SECONDS, shield=True):
                await asyncio.wait([self._task])
        finally:
            self._task.cancel()

    def ask(self, request: A) -> asyncio.Future[R]:
        """Queue a request, and give the future of its answer."""
        future: asyncio.Future[R] = self._loop.create_future()
        if self._task.done():
            future.set_exception(_closed())
        else:
            self._asked.append((request, future))
            self._wanted.set()
        return future

    async def _serve(self) -> None:
        try:
            while self._asked or not self._closing:
                if self._asked:
                    await self._do_batch()
                else:
                    self._wanted.clear()
                    await self._wanted.wait()
        finally:
            _answer(self._asked, [_closed()] * len(self._asked))

    async def _do_batch(self) -> None:
        asked = self._asked[: self._max_batch]
        answers: Sequence[R | StorageError]
        try:
            answers = _counted(await self._run([request for request, _ in asked]), len(asked))
        except BaseException as error:
            if self._was_cancelled(error):
                raise
            answers = [_failure(error)] * len(asked)
            if isinstance(error, KeyboardInterrupt):
                self._loop.call_soon(_raise, error)  # it is meant for whoever runs the loop
        del self._asked[: len(asked)]
        _answer(asked, answers)

    def _was_cancelled(self, error: BaseException) -> bool:
        """Say whether this task was, and not something that a driver has waited for."""
        return isinstance(error, asyncio.CancelledError) and self._task.cancelling() > 0


def _counted(answers: Sequence[R | StorageError], count: int) -> Sequence[R | StorageError]:
    if len(answers) != count:
        raise StorageError(f"the storage has failed: {len(answers)} answers to {count} requests")
    return answers


def _answer(asked: Sequence[tuple[A, asyncio.Future[R]]], answers: Sequence[R | StorageError]) -> None:
    for (_, future), answer in zip(asked, answers, strict=True):
        if future.done():
            continue
        if isinstance(answer, BaseException):
            # One for each, because every raise makes a traceback longer.
            future.set_exception(fresh(_failure(answer)))
        else:
            future.set_result(answer)


def _failure(error: BaseException) -> StorageError:
    if isinstance(error, StorageError):
        return error
    failure = StorageError(f"the storage has failed: {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure


def _closed() -> StorageError:
    return StorageError("the storage was closed before it had answered")


def _raise(error: BaseException) -> NoReturn:
    raise error
