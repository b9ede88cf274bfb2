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
from streamkeep.storage import Doorbell, Head, Page, Storage

T = TypeVar("T")

_FIRST_PAUSE_SECONDS: Final = 0.05
_LONGEST_PAUSE_SECONDS: Final = 1.0


class RetryingStorage:
    """Does what `storage` does, and tries again what raised StorageUnavailableError, for as long as `patience`.

    Every other error is raised at once, and so is what entering raises: a program that starts while its engine is down is told so. The
    wrapped storage is entered and left with this one.

    Args:
        storage: not yet entered.
        patience: after that the last StorageUnavailableError is raised. Longer than a restart of the engine takes; a writer's lease
            lapses meanwhile if it is longer than lease and grace.
    """

    def __init__(self, storage: Storage, *, patience: timedelta = timedelta(seconds=30)) -> None:
        self.storage: Final = storage
        self._patience_seconds = patience.total_seconds()

    async def __aenter__(self) -> Self:
        await self.storage.__aenter__()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.storage.__aexit__(*exc_info)

    async def read(self, stream: str, start: int = 0, limit: int = 0) -> Page | None:
        """See `Storage.read`."""
        return await self._try(lambda: self.storage.read(stream, start, limit))

    async def commit(self, stream: str, seen: int | None, head: Head, records: Sequence[bytes] = ()) -> bool:
        """See `Storage.commit`."""
        return await self._change(
            lambda: self.storage.commit(stream, seen, head, records),
            lambda page: page is not None and page.head == head,
            stream,
        )

    async def delete(self, stream: str, seen: int) -> bool:
        """See `Storage.delete`."""
        return await self._change(lambda: self.storage.delete(stream, seen), lambda page: page is None, stream)

    async def scan(self, after: str = "", limit: int = 100) -> Sequence[str]:
        """See `Storage.scan`."""
        return await self._try(lambda: self.storage.scan(after, limit))

    def watch(self, stream: str) -> AbstractAsyncContextManager[Doorbell]:
        """See `Storage.watch`."""
        return self._watch(stream)

    @asynccontextmanager
    async def _watch(self, stream: str) -> AsyncGenerator[Doorbell]:
        async with AsyncExitStack() as stack:
            yield await self._try(lambda: stack.enter_async_context(self.storage.watch(stream)))

    async def _change(self, change: Callable[[], Awaitable[bool]], is_done: Callable[[Page | None], bool], stream: str) -> bool:
        """Make a change, which may have been made by an attempt whose answer was lost: then it is refused, and there."""
        is_in_doubt = False

        async def attempt() -> bool:
            nonlocal is_in_doubt
            try:
                return await change() or (is_in_doubt and is_done(await self.storage.read(stream)))
            except StorageUnavailableError:
                is_in_doubt = True
                raise
            except StorageFullError:
                # Nothing of this attempt was stored; an earlier one may have been.
                if is_in_doubt and is_done(await self.storage.read(stream)):
                    return True
                raise

        return await self._try(attempt)

    async def _try(self, attempt: Callable[[], Awaitable[T]]) -> T:
        give_up_at = anyio.current_time() + self._patience_seconds
        pause = _FIRST_PAUSE_SECONDS
        while True:
            try:
                return await attempt()
            except StorageUnavailableError:
                if anyio.current_time() + pause > give_up_at:
                    raise
            await anyio.sleep(pause * random.uniform(0.5, 1))  # noqa: S311 - so that not all come back at once
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
