"""Subscription: a stream's events from an offset on, replay and tail as one sequence; and Feed, what those who follow share.

A subscription is an offset and a loop: take the newest records from the feed if it reaches back that far, read a page of
its own if not, wait if there are none. It holds one page at most, and nobody ever waits for it. A stream that had
ended when it was entered needs no feed. Neither decides what a stream may become; that is `_lifecycle`.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, Generic, Protocol, Self, TypeVar

import anyio
from anyio import CancelScope

from . import _lifecycle
from ._lifecycle import Life, Terms
from .errors import (
    OffsetOutOfRangeError,
    StorageError,
    StreamManagerClosedError,
    StreamNotFoundError,
    StreamTimeoutError,
)
from .events import StreamEvent, error_record, event_of, is_terminal
from .storage import Doorbell, Page, Storage

T = TypeVar("T")

PAGE_RECORDS: Final = 512
SHARED_RECORDS: Final = 1_024
SHARED_BYTES: Final = 1 << 20


class Keeper(Protocol):
    """What feeds and subscriptions need of their manager."""

    storage: Storage
    terms: Terms
    clock: Callable[[], float]

    def check_running(self) -> None:
        """Raise StreamManagerClosedError if it is not."""

    def join_feed(self, stream: str, life: Life) -> "Feed":
        """Give the feed of a stream to one more follower; the first one starts it, from the tail of `life`."""
        ...

    def leave_feed(self, feed: "Feed") -> None:
        """Take one follower off; the last one stops it."""


class Feed:
    """The newest records of one stream, read once for all who follow it in this process."""

    def __init__(self, keeper: Keeper, stream: str, life: Life) -> None:
        self.stream = stream
        self.followers = 0
        self.scope = CancelScope()
        self.life = life
        self.base = life.head.tail
        self.failure: StorageError | StreamNotFoundError | StreamManagerClosedError | None = None
        self._keeper = keeper
        self._records: list[bytes] = []
        self._bytes = 0
        self._change = anyio.Event()

    @property
    def tail(self) -> int:
        """The offset after the newest shared record."""
        return self.base + len(self._records)

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come."""
        return self.failure is not None or (self.life.state.status != "open" and self.tail >= self.life.head.tail)

    def since(self, offset: int) -> Sequence[bytes] | None:
        """Give the shared records from `offset` on, or None if they reach not back that far."""
        return None if offset < self.base else self._records[offset - self.base : offset - self.base + PAGE_RECORDS]

    async def changed(self) -> None:
        """Wait until there are more records, or the feed is over."""
        await self._change.wait()

    def fail(self, why: StorageError | StreamNotFoundError | StreamManagerClosedError) -> None:
        """Tell all followers that no more will come, and why."""
        self.failure = why
        self._wake()

    async def follow(self) -> None:
        """Read what is new after each ring of the doorbell, until the stream ends; end it when its writer is out of time."""
        with self.scope:
            try:
                async with self._keeper.storage.watch(self.stream) as doorbell:
                    while not self.is_over:
                        with CancelScope() as patience:
                            await self._read_on(doorbell, patience)
                        if patience.cancelled_caught:
                            await self._abandon()
            except (StorageError, StreamNotFoundError) as error:
                self.fail(error)
            finally:
                if not self.is_over:  # stopped by the last follower's leaving, or by the manager
                    self.fail(StreamManagerClosedError("the stream manager is closed"))

    async def _read_on(self, doorbell: Doorbell, patience: CancelScope) -> None:
        keeper = self._keeper
        patient_until = 0.0
        while True:
            self._take(same_life(await keeper.storage.read(self.stream, self.tail, PAGE_RECORDS), self.life))
            if self.is_over:
                return
            abandoned_at = _lifecycle.abandoned_at(self.life.state, keeper.terms)
            if abandoned_at != patient_until:  # the deadline moves when a lease is renewed, not with every record
                patient_until = abandoned_at
                patience.deadline = anyio.current_time() + abandoned_at - keeper.clock()
            if self.tail >= self.life.head.tail:
                await doorbell.wait()

    async def _abandon(self) -> None:
        keeper = self._keeper
        if ended := _lifecycle.abandon(self.life, keeper.clock(), keeper.terms):
            record = error_record(_lifecycle.ABORTED)
            await keeper.storage.commit(self.stream, self.life.head.version, ended.head, [record])

    def _take(self, page: Page) -> None:
        if page.head != self.life.head:
            self.life = (
                Life(page.head, self.life.state) if page.head.state == self.life.head.state else _lifecycle.life_of(page.head)
            )
        if page.records:
            self._records.extend(page.records)
            self._bytes += sum(map(len, page.records))
            self._trim(len(page.records))
            self._wake()

    def _trim(self, newest: int) -> None:
        """Drop the oldest records, but none of the page that has just come."""
        drop = 0
        spare = len(self._records) - newest
        while drop < spare and (self._bytes > SHARED_BYTES or len(self._records) - drop > SHARED_RECORDS):
            self._bytes -= len(self._records[drop])
            drop += 1
        del self._records[:drop]
        self.base += drop

    def _wake(self) -> None:
        change, self._change = self._change, anyio.Event()
        change.set()


def same_life(page: Page | None, life: Life) -> Page:
    """Give the page, if the stream is still the one that `life` was read from; else StreamNotFoundError."""
    if page is None:
        raise StreamNotFoundError("the stream was deleted, or expired, while it was read")
    if page.head.state != life.head.state and _lifecycle.life_of(page.head).state.created_at != life.state.created_at:
        raise StreamNotFoundError("the stream was deleted, and created anew, while it was read")
    return page


class Subscription(Generic[T]):
    """The events of a stream in order, without gap or repeat, until the terminal one; as `StreamManager.subscribe` gives it.

    Enter it with `async with`, which raises StreamNotFoundError if no stream lives under the id, and iterate. Leaving the block is
    unsubscribing. One task at a time may iterate; a cancelled wait loses nothing.

    Iterating raises StreamTimeoutError when nothing came for `idle_timeout`, StreamManagerClosedError when the manager is
    closed, StreamNotFoundError when the stream is deleted meanwhile, StorageError.
    """

    def __init__(
        self,
        keeper: Keeper,
        stream: str,
        after: int | None,
        idle_seconds: float | None,
        decode_chunk: Callable[[bytes], T],
        decode_output: Callable[[bytes], object],
    ) -> None:
        self.id = stream
        self._keeper = keeper
        self._next = 0 if after is None else after + 1
        self._idle_seconds = idle_seconds
        self._decode_chunk = decode_chunk
        self._decode_output = decode_output
        self._ready: deque[StreamEvent[T]] = deque()
        self._page: Sequence[bytes] = ()
        self._life: Life | None = None
        self._feed: Feed | None = None
        self._is_over = False

    async def __aenter__(self) -> Self:
        keeper = self._keeper
        keeper.check_running()
        page = await keeper.storage.read(self.id, self._next, PAGE_RECORDS)
        if page is None or _lifecycle.is_expired(page.head, keeper.clock()):
            raise StreamNotFoundError("stream not found")
        if self._next > page.head.tail:
            raise OffsetOutOfRangeError(f"offset {self._next - 1} is beyond the stream's last event, {page.head.tail - 1}")
        self._page = page.records
        self._life = life = _lifecycle.life_of(page.head)
        if life.state.status == "open":
            self._feed = keeper.join_feed(self.id, life)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._is_over = True
        self._ready.clear()
        if self._feed is not None:
            self._keeper.leave_feed(self._feed)
            self._feed = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> StreamEvent[T]:
        if not self._ready:
            self._ready.extend(await self.batch())
            if not self._ready:
                raise StopAsyncIteration
        return self._ready.popleft()

    async def batch(self) -> list[StreamEvent[T]]:
        """Give all events that are at hand (512 at most), waiting for at least one; an empty list after the terminal event.

        The same sequence as iterating, for those who can use many at a time. Raises as iterating does.
        """
        if self._ready:
            ready = list(self._ready)
            self._ready.clear()
            return ready
        records = await self._records()
        first = self._next
        self._next += len(records)
        self._is_over = self._is_over or (bool(records) and is_terminal(records[-1]))
        return [
            event_of(record, offset, self._decode_chunk, self._decode_output) for offset, record in enumerate(records, first)
        ]

    async def _records(self) -> Sequence[bytes]:
        while not self._is_over:
            self._keeper.check_running()
            if self._page:
                page, self._page = self._page, ()
                return page
            if self._feed is None:
                return await self._read_ended()
            records = self._feed.since(self._next)
            if records is None:
                await self._read_page()
            elif records:
                return records
            else:
                await self._wait(self._feed)
        return ()

    async def _read_ended(self) -> Sequence[bytes]:
        assert self._life is not None, "enter the subscription with `async with` first"
        if self._next >= self._life.head.tail:
            return ()
        await self._read_page()
        page, self._page = self._page, ()
        return page

    async def _read_page(self) -> None:
        assert self._life is not None
        page = await self._keeper.storage.read(self.id, self._next, PAGE_RECORDS)
        self._page = same_life(page, self._life).records

    async def _wait(self, feed: Feed) -> None:
        if feed.failure is not None:
            raise feed.failure
        if self._idle_seconds is None:
            await feed.changed()
            return
        with anyio.move_on_after(self._idle_seconds) as patience:
            await feed.changed()
        if patience.cancelled_caught:
            raise StreamTimeoutError(f"nothing came for {self._idle_seconds} seconds")
