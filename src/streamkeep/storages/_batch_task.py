"""A task that does in one round trip all that was asked of it while the last one was under way; for drivers of asyncio.

What `BatchThread` is for a driver that blocks. Requests are done in the order in which they were asked, one batch at a time: sixty-four
writers that go on when their batch is stored are the next batch.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Generic, Self, TypeVar

import anyio

from streamkeep.errors import StorageError

A = TypeVar("A")
R = TypeVar("R")

_CLOSE_SECONDS: Final = 60


class BatchTask(Generic[A, R]):
    """Runs requests in batches, in a task of its own. Leaving it finishes what was asked.

    `run` gives one answer for each request of a batch, in order; a StorageError among them is raised where that request was made, and one
    that `run` raises is raised for all. A caller that is cancelled leaves its request in the batch: it may still be done.
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
            self._answer(self._asked, [StorageError("the storage was closed before it had answered")] * len(self._asked))

    async def _do_batch(self) -> None:
        asked = self._asked[: self._max_batch]
        answers: Sequence[R | Exception]
        try:
            answers = await self._run([request for request, _ in asked])
        except Exception as error:
            answers = [error] * len(asked)
        del self._asked[: len(asked)]
        self._answer(asked, answers)

    def _answer(self, asked: Sequence[tuple[A, asyncio.Future[R]]], answers: Sequence[R | Exception]) -> None:
        for (_, future), answer in zip(asked, answers, strict=True):
            if future.done():
                continue
            if isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                future.set_result(answer)
