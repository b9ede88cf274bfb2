"""The doorbells of one process: who watches which stream.

Used on one event loop only; a storage that learns of a commit in another thread brings the news to its loop first.
"""

from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import asynccontextmanager
from typing import Generic, TypeVar

import anyio

from streamkeep.storage import Doorbell

K = TypeVar("K")


class Doorbells(Generic[K]):
    """Gives out doorbells and rings them, by the ids of streams or whatever stands for those. False while nobody watches."""

    def __init__(self) -> None:
        self._by_stream: dict[K, set[_Doorbell]] = {}

    def __bool__(self) -> bool:
        return bool(self._by_stream)

    def __iter__(self) -> Iterator[K]:
        """Give what is watched."""
        return iter(self._by_stream)

    def __contains__(self, stream: K) -> bool:
        """Say whether somebody watches it."""
        return stream in self._by_stream

    @asynccontextmanager
    async def watch(self, stream: K) -> AsyncGenerator[Doorbell]:
        """Give a doorbell that is rung by every `ring` for this stream from now on."""
        doorbell = _Doorbell()
        watchers = self._by_stream.setdefault(stream, set())
        watchers.add(doorbell)
        try:
            yield doorbell
        finally:
            watchers.remove(doorbell)
            if not watchers:
                del self._by_stream[stream]

    def ring(self, streams: Iterable[K]) -> None:
        """Ring the doorbells of these streams."""
        for stream in streams:
            for doorbell in self._by_stream.get(stream, ()):
                doorbell.ring()

    def ring_all(self) -> None:
        """Ring every doorbell, because nobody can say whose stream has changed."""
        self.ring(self._by_stream)


class _Doorbell:
    def __init__(self) -> None:
        self._rung = False
        self._waiter: anyio.Event | None = None

    def ring(self) -> None:
        self._rung = True
        if self._waiter is not None:
            self._waiter.set()

    async def wait(self) -> None:
        if not self._rung:
            self._waiter = anyio.Event()
            try:
                await self._waiter.wait()
            finally:
                self._waiter = None
        # Only here, after the last point where a cancellation can strike: a cancelled wait loses no ring.
        self._rung = False
