"""RetryingStorage: a storage that goes on where another one cannot be reached for a while; for engines behind a network.

It knows no engine. All it relies on is the contract: heads are unique, so "is the head that is there the one I wrote?" tells whether a
commit whose answer was lost has happened. That makes writing exactly-once, however often a commit is sent.
"""

import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from datetime import timedelta
from typing import Final, Self, TypeVar

import anyio

from streamkeep.errors import StorageFullError, StorageUnavailableError
from streamkeep.storage import Doorbell, Head, Page, Storage, has

__all__ = ["RetryingStorage"]

T = TypeVar("T")

Retried = Callable[[str, StorageUnavailableError], object]

_FIRST_PAUSE_SECONDS: Final = 0.05
_LONGEST_PAUSE_SECONDS: Final = 1.0


class RetryingStorage:
    """Does what `storage` does, and tries again what raised StorageUnavailableError, for as long as `timeout`.

    Every other error is raised at once, and so is what entering raises: a program that starts while its engine is down is told so. Only
    entering a clone, whose original could be entered, is tried again too. The wrapped storage is entered and left with this one.

    Args:
        storage: not yet entered.
        timeout: so long after the first StorageUnavailableError the last one is raised. Longer than a restart of the engine takes.

    Attributes:
        storage: the wrapped one.
        retried: functions that are told of each attempt that has failed and is made again, by the name of the method and the error; in
            whatever thread it was made, also of clones.
    """

    def __init__(self, storage: Storage, *, timeout: timedelta = timedelta(seconds=30)) -> None:
        self.storage: Final = storage
        self.retried: Final[list[Retried]] = []
        self._timeout_seconds = timeout.total_seconds()
        self._is_clone = False

    async def __aenter__(self) -> Self:
        if self._is_clone:
            await self._try("enter", self.storage.__aenter__)
        else:
            await self.storage.__aenter__()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.storage.__aexit__(*exc_info)

    async def read(self, stream: str, start: int = 0, limit: int = 0) -> Page | None:
        """See `Storage.read`."""
        return await self._try("read", lambda: self.storage.read(stream, start, limit))

    async def commit(self, stream: str, seen: int | None, head: Head, records: Sequence[bytes] = ()) -> bool:
        """See `Storage.commit`."""
        return await self._change(
            "commit",
            lambda: self.storage.commit(stream, seen, head, records),
            lambda: has(self.storage, stream, head),
        )

    async def delete(self, stream: str, seen: int) -> bool:
        """See `Storage.delete`."""
        return await self._change("delete", lambda: self.storage.delete(stream, seen), lambda: self._is_gone(stream))

    async def scan(self, after: str = "", limit: int = 100) -> Sequence[tuple[str, Head]]:
        """See `Storage.scan`."""
        return await self._try("scan", lambda: self.storage.scan(after, limit))

    async def expired(self, before: float, limit: int = 100) -> Sequence[tuple[str, Head]]:
        """See `Storage.expired`."""
        return await self._try("expired", lambda: self.storage.expired(before, limit))

    def time(self) -> float:
        """See `Storage.time`."""
        return self.storage.time()

    def clone(self) -> "RetryingStorage | None":
        """See `Storage.clone`."""
        storage = self.storage.clone()
        if storage is None:
            return None
        clone = RetryingStorage(storage, timeout=timedelta(seconds=self._timeout_seconds))
        clone._is_clone = True
        clone.retried.extend(self.retried)
        return clone

    def watch(self, stream: str) -> AbstractAsyncContextManager[Doorbell]:
        """See `Storage.watch`."""
        return self._watch(stream)

    @asynccontextmanager
    async def _watch(self, stream: str) -> AsyncGenerator[Doorbell]:
        async with AsyncExitStack() as stack:
            yield await self._try("watch", lambda: stack.enter_async_context(self.storage.watch(stream)))

    def _tell(self, operation: str, error: StorageUnavailableError) -> None:
        for retried in self.retried:
            retried(operation, error)

    async def _is_gone(self, stream: str) -> bool:
        return await self.storage.read(stream) is None

    async def _change(
        self, operation: str, change: Callable[[], Awaitable[bool]], is_done: Callable[[], Awaitable[bool]]
    ) -> bool:
        """Make a change, which may have been made by an attempt whose answer was lost: then it is refused, and there."""
        trouble: _Trouble | None = None
        while True:
            try:
                return await change() or (trouble is not None and await is_done())
            except StorageUnavailableError as error:
                trouble = trouble or _Trouble(self._timeout_seconds)
                trouble.check(error)
                self._tell(operation, error)
                await trouble.passing()
            except StorageFullError:
                # Nothing of this attempt was stored; an earlier one may have been.
                if trouble is None or not await self._try("read", is_done):
                    raise
                return True

    async def _try(self, operation: str, attempt: Callable[[], Awaitable[T]]) -> T:
        trouble: _Trouble | None = None
        while True:
            try:
                return await attempt()
            except StorageUnavailableError as error:
                trouble = trouble or _Trouble(self._timeout_seconds)
                trouble.check(error)
                self._tell(operation, error)
                await trouble.passing()


class _Trouble:
    """That an engine cannot be reached, from the first error on."""

    def __init__(self, timeout_seconds: float) -> None:
        self._give_up_at = anyio.current_time() + timeout_seconds
        self._pause = _FIRST_PAUSE_SECONDS

    def check(self, error: StorageUnavailableError) -> None:
        """Raise the error if the time is over before it is worth another attempt."""
        if anyio.current_time() + self._pause > self._give_up_at:
            raise error

    async def passing(self) -> None:
        """Wait until it is worth another attempt, each time longer."""
        await anyio.sleep(self._pause * random.uniform(0.5, 1))  # noqa: S311 - so that not all come back at once
        self._pause = min(2 * self._pause, _LONGEST_PAUSE_SECONDS)
