"""MemoryStorage: streams that live as long as the object; the smallest complete storage, and the fastest."""

import heapq
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Final, Self

from streamkeep.errors import StorageFullError
from streamkeep.storage import PAGE_BYTES, Doorbell, Head, Page
from streamkeep.storages._doorbells import Doorbells

__all__ = ["MemoryStorage"]

OUT_OF_DATE: Final = 100
"""How much more of what is due may be out of date than there are streams: an open stream's day would keep it for as long."""


@dataclass(slots=True)
class _Stream:
    head: Head
    first: int
    records: list[bytes] = field(default_factory=list)


class MemoryStorage:
    """Keeps streams in this process's memory: nothing survives the process, and no other process sees them.

    Runs under asyncio and trio. The content belongs to the object: leaving the context loses nothing, and several managers
    may share one storage. No method but a doorbell's `wait` ever suspends, so each is atomic.

    Args:
        max_streams: how many streams it holds at most; a commit that would create one more raises StorageFullError. Ids that begin with a
            dot are the package's own, and not counted.
        clock: gives seconds since the epoch; for tests. Unless given, it is one that never jumps.
    """

    def __init__(self, *, max_streams: int | None = None, clock: Callable[[], float] | None = None) -> None:
        self._max_streams = max_streams
        self._clock = clock or _steady_clock()
        self._streams: dict[str, _Stream] = {}
        self._reserved = 0
        self._sorted_ids: list[str] | None = []
        self._due: list[tuple[float, str]] = []  # a heap; what is out of date in it is dropped when it is met
        self._doorbells: Doorbells[str] = Doorbells()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        pass

    async def read(self, stream: str, start: int = 0, limit: int = 0) -> Page | None:
        """See `Storage.read`."""
        found = self._streams.get(stream)
        return None if found is None else Page(found.head, _page(found.records, start - found.first, limit))

    async def commit(self, stream: str, seen: int | None, head: Head, records: Sequence[bytes] = ()) -> bool:
        """See `Storage.commit`."""
        if self._version(stream) != seen:
            return False
        if seen is None:
            self._create(stream, head, head.tail - len(records))
        found = self._streams[stream]
        is_due_anew = seen is None or found.head.expires_at != head.expires_at
        found.records.extend(records)
        if head.first > found.first:
            del found.records[: head.first - found.first]
            found.first = head.first
        found.head = head
        if is_due_anew:
            self._note_due(stream, head.expires_at)
        self._doorbells.ring((stream,))
        return True

    async def delete(self, stream: str, seen: int) -> bool:
        """See `Storage.delete`."""
        if self._version(stream) != seen:
            return False
        del self._streams[stream]
        self._reserved -= stream.startswith(".")
        self._sorted_ids = None
        self._doorbells.ring((stream,))
        return True

    async def scan(self, after: str = "", limit: int = 100) -> Sequence[tuple[str, Head]]:
        """See `Storage.scan`."""
        # Sorted when somebody asks: whoever scans asks for many pages, and creating a stream must not pay for it.
        if self._sorted_ids is None:
            self._sorted_ids = sorted(self._streams)
        first = bisect_right(self._sorted_ids, after)
        return [(stream, self._streams[stream].head) for stream in self._sorted_ids[first : first + limit]]

    async def expired(self, before: float, limit: int = 100) -> Sequence[tuple[str, Head]]:
        """See `Storage.expired`."""
        found: dict[str, Head] = {}
        due: list[tuple[float, str]] = []
        while self._due and self._due[0][0] <= before and len(found) < limit:
            expires_at, stream = heapq.heappop(self._due)
            there = self._streams.get(stream)
            if there is not None and there.head.expires_at == expires_at and stream not in found:
                found[stream] = there.head
                due.append((expires_at, stream))
        for entry in due:  # until they are deleted they are still due
            heapq.heappush(self._due, entry)
        return list(found.items())

    def time(self) -> float:
        """See `Storage.time`."""
        return self._clock()

    def clone(self) -> None:
        """See `Storage.clone`: this memory belongs to one event loop."""

    def watch(self, stream: str) -> AbstractAsyncContextManager[Doorbell]:
        """See `Storage.watch`."""
        return self._doorbells.watch(stream)

    def _note_due(self, stream: str, expires_at: float) -> None:
        heapq.heappush(self._due, (expires_at, stream))
        if len(self._due) > 2 * len(self._streams) + OUT_OF_DATE:
            self._due = [(there.head.expires_at, id) for id, there in self._streams.items()]
            heapq.heapify(self._due)

    def _version(self, stream: str) -> int | None:
        found = self._streams.get(stream)
        return None if found is None else found.head.version

    def _create(self, stream: str, head: Head, first: int) -> None:
        is_reserved = stream.startswith(".")
        if self._max_streams is not None and not is_reserved and len(self._streams) - self._reserved >= self._max_streams:
            raise StorageFullError(f"this storage keeps {self._max_streams} streams in memory, and no more")
        self._streams[stream] = _Stream(head, first)
        self._reserved += is_reserved
        self._sorted_ids = None


def _steady_clock() -> Callable[[], float]:
    """Give the time from a clock that nobody sets: this process has no other to agree with."""
    began = time.time() - time.monotonic()
    return lambda: began + time.monotonic()


def _page(records: list[bytes], start: int, limit: int) -> Sequence[bytes]:
    if start < 0:
        return ()
    page = records[start : start + limit]
    size = 0
    for end, record in enumerate(page, 1):
        size += len(record)
        if size >= PAGE_BYTES:
            return page[:end]
    return page
