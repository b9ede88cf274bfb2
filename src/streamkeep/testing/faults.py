"""FaultyStorage: a storage around another, which fails on demand; for tests of what must survive a failing storage."""

from collections import Counter, defaultdict, deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Final, Literal, Self, TypeVar

import anyio

from streamkeep.errors import StorageError
from streamkeep.storage import Doorbell, Head, Page, Storage

__all__ = ["FaultyStorage", "Hold"]

T = TypeVar("T")
Operation = Literal["enter", "read", "commit", "delete", "scan", "expired", "watch"]
Step = Callable[[Callable[[], Awaitable[None]]], Awaitable[None]]


class Hold:
    """Where an operation was made to stop.

    Attributes:
        reached: an event that is set when the operation has come here.
    """

    def __init__(self) -> None:
        self.reached = anyio.Event()
        self._released = anyio.Event()
        self._error: StorageError | None = None

    async def pause(self) -> None:
        """Stop here until released."""
        self.reached.set()
        await self._released.wait()
        if self._error is not None:
            raise self._error

    def release(self, error: StorageError | None = None) -> None:
        """Let the operation go on, or fail."""
        self._error = error
        self._released.set()


class FaultyStorage:
    """Does what `storage` does, but for what was said before; what is said of an operation holds for its next calls, in order.

        storage = FaultyStorage(MemoryStorage())
        storage.lose_answer("commit")                      # the next commit happens, and then raises StorageError
        hold = storage.hold("commit")               # the one after it waits for hold.release() before it begins

    Operations are `enter`, `read`, `commit`, `delete`, `scan`, `expired` and `watch` (its entering). The wrapped storage is entered and
    left with this one.

    Attributes:
        calls: how often each operation was called.
        is_down: while it is true every operation raises StorageError, and the script stands still.
        ahead_seconds: by how much its `time` is ahead of that of the wrapped storage.
    """

    def __init__(self, storage: Storage) -> None:
        self.calls: Final = Counter[Operation]()
        self.is_down = False
        self.ahead_seconds = 0.0
        self._storage = storage
        self._steps: defaultdict[Operation, deque[Step]] = defaultdict(deque)

    def refuse(self, operation: Operation, *, times: int = 1, error: StorageError | None = None) -> None:
        """Let it raise `error` (a StorageError by default), having done nothing."""

        async def step(_: Callable[[], Awaitable[None]]) -> None:
            raise error or StorageError(f"{operation} was made to fail")

        self._steps[operation].extend([step] * times)

    def lose_answer(self, operation: Operation, *, times: int = 1, error: StorageError | None = None) -> None:
        """Let it happen, and raise `error` (a StorageError by default) instead of answering."""

        async def step(do: Callable[[], Awaitable[None]]) -> None:
            await do()
            raise error or StorageError(f"the answer of {operation} was made to get lost")

        self._steps[operation].extend([step] * times)

    def skip(self, operation: Operation, *, times: int = 1) -> None:
        """Let it happen as ever."""

        async def step(do: Callable[[], Awaitable[None]]) -> None:
            await do()

        self._steps[operation].extend([step] * times)

    def hold(self, operation: Operation, *, after: bool = False) -> Hold:
        """Let it stop before it begins, or (`after`) when it has happened and before it answers, until the Hold is released.

        Cancelling a call that is held has the effect that the place says: nothing was done, or the answer was lost.
        """
        hold = Hold()

        async def step(do: Callable[[], Awaitable[None]]) -> None:
            if not after:
                await hold.pause()
            await do()
            if after:
                await hold.pause()

        self._steps[operation].append(step)
        return hold

    async def __aenter__(self) -> Self:
        await self._do("enter", self._storage.__aenter__)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._storage.__aexit__(*exc_info)

    async def read(self, stream: str, start: int = 0, limit: int = 0) -> Page | None:
        """See `Storage.read`."""
        return await self._do("read", lambda: self._storage.read(stream, start, limit))

    async def commit(self, stream: str, seen: int | None, head: Head, records: Sequence[bytes] = ()) -> bool:
        """See `Storage.commit`."""
        return await self._do("commit", lambda: self._storage.commit(stream, seen, head, records))

    async def delete(self, stream: str, seen: int) -> bool:
        """See `Storage.delete`."""
        return await self._do("delete", lambda: self._storage.delete(stream, seen))

    async def scan(self, after: str = "", limit: int = 100) -> Sequence[tuple[str, Head]]:
        """See `Storage.scan`."""
        return await self._do("scan", lambda: self._storage.scan(after, limit))

    async def expired(self, before: float, limit: int = 100) -> Sequence[tuple[str, Head]]:
        """See `Storage.expired`."""
        return await self._do("expired", lambda: self._storage.expired(before, limit))

    def time(self) -> float:
        """See `Storage.time`."""
        return self._storage.time() + self.ahead_seconds

    def clone(self) -> Storage | None:
        """See `Storage.clone`: what is said of it is said on one event loop."""
        return None

    def watch(self, stream: str) -> AbstractAsyncContextManager[Doorbell]:
        """See `Storage.watch`."""
        return self._watch(stream)

    @asynccontextmanager
    async def _watch(self, stream: str) -> AsyncGenerator[Doorbell]:
        async with AsyncExitStack() as stack:
            yield await self._do("watch", lambda: stack.enter_async_context(self._storage.watch(stream)))

    async def _do(self, operation: Operation, call: Callable[[], Awaitable[T]]) -> T:
        self.calls[operation] += 1
        if self.is_down:
            raise StorageError("the storage was made to be down")
        if not self._steps[operation]:
            return await call()
        answers: list[T] = []

        async def do() -> None:
            answers.append(await call())

        await self._steps[operation].popleft()(do)
        return answers[0]
