"""GuardedStorage: what the core sees of a storage. Whatever one raises is a StorageError here, and what it gives is whole."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Self, TypeVar

from ._background import is_cancelled_here, not_ours
from .errors import StorageCorruptError, StorageError, StorageFullError, StreamkeepError
from .storage import Doorbell, Head, Page, Storage, has

T = TypeVar("T")


Failed = Callable[[str, StorageError], object]
"""Is told which method of a storage has failed, and how; it may be called in any thread."""


def nobody(_operation: str, _error: StorageError) -> None:
    """Tell nobody."""


class GuardedStorage:
    """Does what `storage` does. Of errors that are not ours it makes a StorageError: a storage's bug ends what it was asked for.

    `failed` is told of each StorageError.
    """

    def __init__(self, storage: Storage, failed: Failed = nobody) -> None:
        self.storage = storage
        self.failed = failed

    async def __aenter__(self) -> Self:
        await self.translating("enter", self.storage.__aenter__)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.storage.__aexit__(*exc_info)

    async def read(self, stream: str, start: int = 0, limit: int = 0) -> Page | None:
        """See `Storage.read`. StorageCorruptError: records are missing behind the head."""
        try:
            page = await self.storage.read(stream, start, limit)
        except BaseException as error:
            if self._passes_on("read", error):
                raise
            raise self._translated("read", error) from error
        if page is not None and limit and not page.records and page.head.first <= start < page.head.tail:
            missing = StorageCorruptError(
                f"the records from offset {start} on are missing, and the stream should have {page.head.tail}"
            )
            self.failed("read", missing)
            raise missing
        return page

    async def commit(self, stream: str, seen: int | None, head: Head, records: Sequence[bytes] = ()) -> bool:
        """See `Storage.commit`."""
        try:
            return await self.storage.commit(stream, seen, head, records)
        except BaseException as error:
            if self._passes_on("commit", error):
                raise
            raise self._translated("commit", error) from error

    async def delete(self, stream: str, seen: int) -> bool:
        """See `Storage.delete`."""
        return await self.translating("delete", lambda: self.storage.delete(stream, seen))

    async def scan(self, after: str = "", limit: int = 100) -> Sequence[tuple[str, Head]]:
        """See `Storage.scan`."""
        return await self.translating("scan", lambda: self.storage.scan(after, limit))

    async def expired(self, before: float, limit: int = 100) -> Sequence[tuple[str, Head]]:
        """See `Storage.expired`."""
        return await self.translating("expired", lambda: self.storage.expired(before, limit))

    def time(self) -> float:
        """See `Storage.time`."""
        try:
            return self.storage.time()
        except BaseException as error:
            if self._passes_on("time", error):
                raise
            raise self._translated("time", error) from error

    def clone(self) -> "GuardedStorage | None":
        """See `Storage.clone`."""
        try:
            clone = self.storage.clone()
        except BaseException as error:
            if self._passes_on("clone", error):
                raise
            raise self._translated("clone", error) from error
        return None if clone is None else GuardedStorage(clone, self.failed)

    def watch(self, stream: str) -> AbstractAsyncContextManager[Doorbell]:
        """See `Storage.watch`."""
        return _GuardedWatch(self, stream)

    async def translating(self, operation: str, call: Callable[[], Awaitable[T]]) -> T:
        """Give what a call of the storage gives, or raise a StorageError of what it raises."""
        try:
            return await call()
        except BaseException as error:
            if self._passes_on(operation, error):
                raise
            raise self._translated(operation, error) from error

    def _passes_on(self, operation: str, error: BaseException) -> bool:
        if isinstance(error, StorageError):
            self.failed(operation, error)
        return _is_passed_on(error)

    def _translated(self, operation: str, error: BaseException) -> StorageError:
        failure = StorageError(f"the storage failed: {type(error).__qualname__}: {error}")
        self.failed(operation, failure)
        return failure


class _GuardedWatch:
    def __init__(self, storage: GuardedStorage, stream: str) -> None:
        self._storage = storage
        self._stream = stream
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Doorbell:
        watch = self._storage.storage.watch
        entered = await self._storage.translating("watch", lambda: self._stack.enter_async_context(watch(self._stream)))
        return _GuardedDoorbell(self._storage, entered)

    async def __aexit__(self, *exc_info: object) -> None:
        await self._storage.translating("watch", self._stack.aclose)


class _GuardedDoorbell:
    def __init__(self, storage: GuardedStorage, doorbell: Doorbell) -> None:
        self._storage = storage
        self._doorbell = doorbell

    async def wait(self) -> None:
        await self._storage.translating("watch", self._doorbell.wait)


def _is_passed_on(error: BaseException) -> bool:
    if isinstance(error, asyncio.CancelledError):
        return is_cancelled_here()  # else a driver has cancelled a future of its own, and nobody this task
    return isinstance(error, (StreamkeepError, *not_ours()))


async def commit_once(storage: Storage, stream: str, seen: int | None, head: Head, records: Sequence[bytes] = ()) -> bool:
    """Commit, and say whether this head is there now. The one place that asks what became of a commit whose answer was lost.

    StorageError: nobody knows, and it may still happen. Sent again as it was, it has an effect once.
    """
    try:
        return await storage.commit(stream, seen, head, records) or await has(storage, stream, head)
    except StorageFullError:
        raise  # nothing was stored
    except StorageError:
        if await _is_known_to_be_there(storage, stream, head):
            return True
        raise


async def _is_known_to_be_there(storage: Storage, stream: str, head: Head) -> bool:
    try:
        return await has(storage, stream, head)
    except StorageError:
        return False
