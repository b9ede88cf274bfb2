"""The contract of a storage: eight methods over ids, heads and bytes.

A storage keeps heads and logs, and knows nothing else: no sessions, no events, no expiry rules. All that decides who may
write lives above it, once, in `_lifecycle`. `streamkeep.testing.StorageSuite` is this page as tests.
"""

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import Final, Protocol, Self

import msgspec

__all__ = ["Doorbell", "Head", "Page", "Storage"]

PAGE_BYTES: Final = 1 << 20
"""About how many bytes of records a page may hold; the record that reaches it is the last."""


class Head(msgspec.Struct, frozen=True):
    """The small value that is swapped at each commit."""

    version: int
    """Names this commit. An id never sees the same version twice, not even after deletion. Positive, below 2**63."""
    tail: int
    """How many records the log holds, which is the offset of the next one."""
    state: bytes
    """Opaque to storages."""
    expires_at: float
    """Seconds since the epoch, by the storage's clock (`Storage.time`): from then on the storage may forget the stream."""
    first: int = 0
    """The offset of the oldest record that the log still holds, or its tail if it holds none. The commit that raises it forgets what is
    before it. It is never lowered."""


class Page(msgspec.Struct, frozen=True):
    """A head and some records, read at one moment."""

    head: Head
    records: Sequence[bytes]


class Doorbell(Protocol):
    """Says that something changed, never what."""

    async def wait(self) -> None:
        """Return when it has rung since the last `wait` returned (or since `watch` was entered), else wait until it does.

        One task at a time may wait. A cancelled wait loses no ring.
        """


class Storage(Protocol):
    """Where heads and logs are kept; an async context manager, because it owns connections and threads.

    Leaving waits for the commits and deletions that are under way, even when it is cancelled, though not for ever.

    Every method raises `StorageError` (or a subclass) when the engine fails, whatever the driver calls it. After a
    `StorageError` from `commit` or `delete` (but `StorageFullError`), or after its cancellation, whether it happened is
    unknown; comparing the head that is there with the one that was to be written answers it, because heads are unique.
    """

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *exc_info: object) -> None: ...

    async def read(self, stream: str, start: int = 0, limit: int = 0) -> Page | None:
        """Give the head and at most `limit` records from offset `start` on, or None if the stream does not exist.

        Head and records are of one moment. When there are records from `start` on and `limit` is not 0, at least one comes;
        fewer than `limit` may, to keep a page within about a mebibyte. Where one is missing, the page ends before it, and the next one is
        empty: so is one from before the log's `first` record.
        """
        ...

    async def commit(self, stream: str, seen: int | None, head: Head, records: Sequence[bytes] = ()) -> bool:
        """Replace the head, append the records and forget those before `head.first`, all or nothing, if `seen` is still the version.

        `seen=None`: the stream must not exist. `head.tail` counts the new records too. True: they are as durable
        as the storage promises. False: somebody else was first, and nothing changed. Commits that are started in
        order by one task take effect in that order.
        """
        ...

    async def delete(self, stream: str, seen: int) -> bool:
        """Forget head and log if `seen` is still the version."""
        ...

    async def scan(self, after: str = "", limit: int = 100) -> Sequence[tuple[str, Head]]:
        """Give at most `limit` ids greater than `after`, in code point order, with their heads; empty when there are no more.

        It costs a few round trips, not one for each stream.
        """
        ...

    async def expired(self, before: float, limit: int = 100) -> Sequence[tuple[str, Head]]:
        """Give at most `limit` streams whose `expires_at` is `before` or earlier, with their heads; in any order, and at least one if
        there are any.

        It costs what it gives, and not what is kept. What the engine forgets by itself need not be given.
        """
        ...

    def time(self) -> float:
        """Give the seconds since the epoch by the one clock that all who share these streams have in common: the engine's.

        It never waits, so over a network it is an estimate; it is never compared with any clock but itself. Sessions are not
        judged by it, only expiry.
        """
        ...

    def clone(self) -> "Storage | None":
        """Give another storage over the same data, not entered, for the event loop of another thread.

        None: no other event loop can reach the data, so nobody outside this one waits for a sign of life from it.
        """
        ...

    def watch(self, stream: str) -> AbstractAsyncContextManager[Doorbell]:
        """Ring soon after every commit or deletion, by any process, since it was entered.

        Rings may merge, and may come for nothing. *Enter watch, read, wait* loses no wake-up.
        """
        ...


async def has(storage: Storage, stream: str, head: Head) -> bool:
    """Say whether this very head is there: what became of a commit that was refused, or whose answer was lost, if heads are unique."""
    page = await storage.read(stream)
    return page is not None and page.head == head
