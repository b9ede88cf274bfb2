"""Where to strike: at a suspension of a coroutine, or at a point of a storage; found by counting, not by listing.

A storage has two points in each call: before it has done anything, and after it has done it and before it answers.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any, Final, Generic, Self, TypeVar

from anyio.lowlevel import checkpoint

from streamkeep.errors import StorageError
from streamkeep.storage import Doorbell, Head, Page, Storage

from .virtual_time import Workload, clock

T = TypeVar("T")

MANY_POINTS: Final = 20_000
"""More than any history here comes to; a livelock on virtual time, which never passes, must fail and not hang."""


class Countdown:
    """Calls `strike` at the one point whose number was given, from 1 on, and never again."""

    def __init__(self, number: int, strike: Callable[[], None]) -> None:
        self._left = number
        self._strike = strike

    @property
    def has_struck(self) -> bool:
        """Whether the point was reached."""
        return self._left <= 0

    def pass_point(self) -> None:
        """Count one point."""
        self._left -= 1
        if self._left == 0:
            self._strike()


class Counted(Awaitable[T], Generic[T]):
    """Awaits a coroutine, and passes a point of the countdown each time that it suspends."""

    def __init__(self, coroutine: Coroutine[Any, Any, T], countdown: Countdown) -> None:
        self._coroutine = coroutine
        self._countdown = countdown

    def __await__(self) -> Generator[Any, Any, T]:
        answer: Any = None
        error: BaseException | None = None
        while True:
            try:
                asked = self._coroutine.send(answer) if error is None else self._coroutine.throw(error)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]  # what the coroutine returns is a T
            finally:
                answer = error = None  # an error that we held would hold all that it came through, which must be free to go
            self._countdown.pass_point()
            try:
                answer = yield asked
            except BaseException as thrown:
                error = thrown


class ProbedStorage:
    """Does what `storage` does, and passes two points in each call; what is raised there is raised to the caller.

    It also suspends at both points, so that a storage which never suspends can be cancelled there, and tells the workload when a
    thread has work to do.

    Attributes:
        is_down: while it is true every call raises StorageError and does nothing.
        pass_point: called at each point.
        clock: gives its time; virtual, as the event loop's, unless it is given.
        meanwhile: done at the next point, once, before the call goes on.
    """

    def __init__(self, storage: Storage, workload: Workload, clock: Callable[[], float] = clock) -> None:
        self.is_down = False
        self.pass_point: Callable[[], None] = lambda: None
        self.meanwhile: Callable[[], Awaitable[None]] | None = None
        self._points = 0
        self._storage = storage
        self._workload = workload
        self._clock = clock
        self._catching_up: set[asyncio.Future[None]] = set()

    async def __aenter__(self) -> Self:
        with self._workload:
            await self._storage.__aenter__()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        with self._workload:
            await self._storage.__aexit__(*exc_info)

    async def read(self, stream: str, start: int = 0, limit: int = 0) -> Page | None:
        return await self._do(lambda: self._storage.read(stream, start, limit))

    async def commit(self, stream: str, seen: int | None, head: Head, records: Sequence[bytes] = ()) -> bool:
        return await self._do(lambda: self._storage.commit(stream, seen, head, records))

    async def delete(self, stream: str, seen: int) -> bool:
        return await self._do(lambda: self._storage.delete(stream, seen))

    async def scan(self, after: str = "", limit: int = 100) -> Sequence[tuple[str, Head]]:
        return await self._do(lambda: self._storage.scan(after, limit))

    async def expired(self, before: float, limit: int = 100) -> Sequence[tuple[str, Head]]:
        return await self._do(lambda: self._storage.expired(before, limit))

    def time(self) -> float:
        return self._clock()

    def clone(self) -> None:
        """All that a manager does is done in its event loop, whose time is virtual."""

    def watch(self, stream: str) -> AbstractAsyncContextManager[Doorbell]:
        return self._watch(stream)

    @asynccontextmanager
    async def _watch(self, stream: str) -> AsyncGenerator[Doorbell]:
        await self._come_to_a_point()
        async with self._storage.watch(stream) as doorbell:
            await self._come_to_a_point()
            yield doorbell

    async def _do(self, call: Callable[[], Awaitable[T]]) -> T:
        await self._come_to_a_point()
        answer = await self._work(call)
        await self._come_to_a_point()
        return answer

    async def _come_to_a_point(self) -> None:
        self._points += 1
        assert self._points < MANY_POINTS, "the storage is called without end"
        self.pass_point()
        if self.is_down:
            raise StorageError("the storage was made to be down")
        if self.meanwhile is not None:
            meanwhile, self.meanwhile = self.meanwhile, None
            await meanwhile()
        await checkpoint()

    async def _work(self, call: Callable[[], Awaitable[T]]) -> T:
        with self._workload:
            try:
                return await call()
            except asyncio.CancelledError:
                self._catch_up()
                raise

    def _catch_up(self) -> None:
        # A thread may be at what was cancelled, and time must not jump meanwhile. Calls are answered in order.
        catching_up = asyncio.ensure_future(self._answer_to_nothing())
        self._catching_up.add(catching_up)
        catching_up.add_done_callback(self._catching_up.discard)

    async def _answer_to_nothing(self) -> None:
        with self._workload, suppress(StorageError):
            await self._storage.delete("nothing", 0)
            await self._storage.read("nothing")
