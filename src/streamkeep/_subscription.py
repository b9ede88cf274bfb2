"""Subscription: a stream's events from an offset on, replay and tail as one sequence.

It is an offset and a loop: take the newest records from the stream's feed if that reaches back so far, read a page of its own if not,
wait if there are none. It holds one page at most, and nobody ever waits for it. A stream that had ended when it was entered needs no
feed. What a stream may become is decided in `_lifecycle`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from operator import length_hint
from typing import Generic, Self, TypeVar

import anyio
from anyio.lowlevel import checkpoint

from . import _lifecycle
from ._feed import NO_RECORDS, PAGE_RECORDS, Feed, Records
from ._lifecycle import Life
from ._running import Running
from .errors import OffsetOutOfRangeError, StorageCorruptError, StorageError, StreamNotFoundError, StreamTimeoutError
from .events import StreamEvent, event_of, is_terminal
from .hooks import Delivery, Reader
from .storage import Page

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class From:
    """Where in a stream a subscription begins, and whether it goes on.

    Attributes:
        after: only those with a greater offset.
        last: only so many of those that are stored, and all that come; not with `after`.
        follow: also those that come.
        superseded: also those of an answer that has begun again, if it begins at the start.
    """

    after: int | None = None
    last: int | None = None
    follow: bool = True
    superseded: bool = True


class Subscription(Generic[T]):
    """The events of a stream in order, without gap or repeat, until the terminal one; as `StreamManager.subscribe` gives it.

    Enter it with `async with`, which raises StreamNotFoundError if no stream lives under the id, and iterate. Leaving the block is
    unsubscribing. One task at a time may iterate; a cancelled wait loses nothing.

    Iterating raises StreamTimeoutError when nothing came for `idle_timeout`, StreamManagerClosedError when the manager is
    closed, StreamNotFoundError when the stream is deleted meanwhile, OffsetOutOfRangeError when the storage has lost events that were
    given already (it went back to a backup, or to a standby that was behind), StorageError.
    """

    __slots__ = (
        "__dict__",  # empty: tests of users' own replace methods, and tracers keep spans here
        "__weakref__",
        "_begin",
        "_check_running",
        "_decode_chunk",
        "_decode_output",
        "_end",
        "_feed",
        "_first",
        "_following",
        "_idle_at",
        "_idle_seconds",
        "_is_over",
        "_is_read",
        "_life",
        "_next",
        "_page",
        "_reader",
        "_ready",
        "_running",
        "id",
    )

    def __init__(
        self,
        check_running: Callable[[], Running],
        stream: str,
        begin: From,
        idle_seconds: float | None,
        decode_chunk: Callable[[bytes], T],
        decode_output: Callable[[bytes], object],
    ) -> None:
        self.id = stream
        self._check_running = check_running
        self._begin = begin
        self._next = 0 if begin.after is None else begin.after + 1
        self._first = 0
        self._end: int | None = None  # where one that does not follow ends
        self._idle_seconds = idle_seconds
        self._idle_at: float | None = None  # a wait may be interrupted, and go on
        self._decode_chunk = decode_chunk
        self._decode_output = decode_output
        self._ready: Iterator[StreamEvent[T]] = iter(())
        self._page: Sequence[bytes] = ()
        self._running: Running | None = None
        self._life: Life | None = None
        self._feed: Feed | None = None
        self._following: AbstractContextManager[Feed] | None = None  # which leaves it also when this is dropped
        self._reader: Reader | None = None
        self._is_read = False
        self._is_over = False

    @property
    def life(self) -> str:
        """What tells this stream from others that live under its id before and after. RuntimeError: this was not entered."""
        if self._life is None:
            raise RuntimeError("enter the subscription with `async with` first")
        return self._life.state.life

    @property
    def first_offset(self) -> int:
        """The offset of the first event that this gives, or will give when there is one. RuntimeError: this was not entered."""
        if self._life is None:
            raise RuntimeError("enter the subscription with `async with` first")
        return self._first

    @property
    def updated_at(self) -> float:
        """About when the stream was last written to, as far as this has read; seconds since the epoch, by the storage's clock.

        RuntimeError: this was not entered.
        """
        if self._life is None:
            raise RuntimeError("enter the subscription with `async with` first")
        return _lifecycle.committed_at(self._life.head)

    @property
    def lag(self) -> int:
        """How many events this has not given that are known to be stored."""
        if self._life is None:
            return 0
        life = self._life if self._feed is None else self._feed.life
        tail = life.head.tail if self._end is None else self._end
        return length_hint(self._ready) + (0 if self._is_over else max(0, tail - self._next))

    async def __aenter__(self) -> Self:
        if self._life is not None:
            raise RuntimeError("this subscription was entered already; subscribe again")
        running = self._check_running()
        core = running.core
        page = await self._read_first(running)
        if page is None:
            raise StreamNotFoundError("stream not found")
        life = _lifecycle.life_of(page.head, running.feeds.life_of(self.id))
        if _lifecycle.is_expired(life, core.now()):
            raise StreamNotFoundError("stream not found")
        if self._next > page.head.tail:
            raise OffsetOutOfRangeError(f"offset {self._next - 1} is beyond the stream's last event, {page.head.tail - 1}")
        self._running = running
        self._life = life
        self._first = self._next
        if not self._begin.follow:
            self._end = page.head.tail
        self._page = self._wanted(page.records)
        if self._begin.follow and life.state.status == "open":
            self._follow(running)
        if core.telling is not None:
            self._reader = core.telling.reader(self, self.id, life, self._first - 1 if self._first else None)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        if self._running is not None and not self._running.is_closed:
            self._running.background.check_here()
        self._is_over = True
        self._ready = iter(())
        self._unfollow()
        if self._reader is not None and self._running is not None and self._running.telling is not None:
            self._running.telling.reader_left(self._reader)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> StreamEvent[T]:
        event = next(self._ready, None)
        if event is None:
            self._ready = iter(await self.batch())
            event = next(self._ready, None)
            if event is None:
                raise StopAsyncIteration
        return event

    async def batch(self) -> list[StreamEvent[T]]:
        """Give all events that are at hand (512 at most), waiting for at least one; an empty list after the terminal event.

        The same sequence as iterating, for those who can use many at a time. Raises as iterating does.
        """
        if ready := list(self._ready):
            return ready
        got = await self._records()
        events = self.events_of(got)
        self._pass(got)  # now that none of them is damaged, which would leave a gap
        return events

    async def records(self) -> Records:
        """Give the same as records, for those who make the same of them as others do; not while somebody iterates."""
        got = await self._records()
        self._pass(got)
        return got

    def events_of(self, got: Records) -> list[StreamEvent[T]]:
        """Give the events that records hold. StorageCorruptError: one holds none."""
        decode_chunk, decode_output = self._decode_chunk, self._decode_output
        try:
            return [
                event_of(record, offset, decode_chunk, decode_output) for offset, record in enumerate(got.records, got.first)
            ]
        except StorageCorruptError:
            assert self._running is not None  # it has given records
            assert self._life is not None
            self._running.feeds.drop(self.id, self._life, got.first)
            raise

    def _pass(self, got: Records) -> None:
        if got is not NO_RECORDS:
            self._idle_at = None
            self._next = got.end
            self._is_over = self._is_over or is_terminal(got.records[-1])
            if self._reader is not None:
                self._tell_of(got, self._reader)

    def _tell_of(self, got: Records, reader: Reader) -> None:
        running = self._running
        assert running is not None
        assert running.telling is not None
        if not running.telling.of_deliveries:
            return
        feed, seconds = self._feed, None
        if feed is not None and got.first >= reader.stream.tail and got.end == feed.life.head.tail:
            with suppress(StorageError):  # a reader does not need the storage's time
                seconds = max(0.0, running.core.now() - _lifecycle.committed_at(feed.life.head))
        running.telling.delivered(Delivery(reader, got.first, len(got.records), seconds))

    async def _records(self) -> Records:
        if self._is_read:
            raise RuntimeError("another task iterates over this subscription; one at a time may")
        self._is_read = True
        try:
            running = self._check_running() if self._running is None else self._running.check()
            while not self._is_over:
                if self._page:
                    page, self._page = self._page, ()
                    assert self._life is not None
                    return running.feeds.shared(self.id, self._life, self._next, page)
                feed = self._feed
                if feed is None:
                    if not await self._go_on_alone(running):
                        break
                    continue
                got = feed.since(self._next)
                if got is None:
                    await self._read_page(running)
                elif got is not NO_RECORDS:
                    self._go_on_with(feed.life)
                    return got
                elif feed.is_complete:
                    # Whoever has read the end does not come here: a page was of another history than the feed.
                    raise _lifecycle.lost(self._next)
                elif self._idle_seconds is None:
                    await feed.changed()
                else:
                    await self._wait(feed, self._idle_seconds)
        finally:
            self._is_read = False
        return NO_RECORDS

    async def _read_first(self, running: Running) -> Page | None:
        """Read the first page of what is wanted."""
        core, last = running.core, self._begin.last
        if last is None:
            page = await core.storage.read(self.id, self._next, PAGE_RECORDS)
            if self._next or self._begin.superseded or page is None:
                return page
            self._next = _lifecycle.life_of(page.head, running.feeds.life_of(self.id)).state.superseded
            return page if not self._next else await core.storage.read(self.id, self._next, PAGE_RECORDS)
        while (page := await core.storage.read(self.id)) is not None:
            self._next = max(0, page.head.tail - last)
            page = await core.storage.read(self.id, self._next, PAGE_RECORDS)
            if page is None or self._next <= page.head.tail:
                return page
        return None

    async def _go_on_alone(self, running: Running) -> bool:
        """Read a page, or begin to follow; False: there is no more."""
        if self._life is None:
            raise RuntimeError("enter the subscription with `async with` first")
        if self._end is None and self._life.state.status == "open":  # the storage went back to before the stream's end
            self._follow(running)
            return True
        tail = self._life.head.tail
        if self._next >= (tail if self._end is None else min(tail, self._end)):
            return False
        await self._read_page(running)
        return True

    def _follow(self, running: Running) -> None:
        assert self._life is not None
        self._following = running.feeds.following(self.id, self._life)
        self._feed = self._following.__enter__()

    def _unfollow(self) -> None:
        if self._following is not None:
            self._following.__exit__(None, None, None)
            self._following = self._feed = None

    async def _read_page(self, running: Running) -> None:
        assert self._life is not None
        # Neither what is shared nor every storage suspends, and a long replay must not freeze everybody else, nor outlive its cancellation.
        await checkpoint()
        if (known := running.feeds.page_at(self.id, self._life, self._next)) is not None:
            self._page = self._wanted(known.records)
            return
        try:
            page = await running.core.storage.read(self.id, self._next, PAGE_RECORDS)
        except StorageError as error:
            running.check()  # it was closed meanwhile
            running.core.report(f"stream {self.id} cannot be read, and a reader is told", error)
            raise
        if page is None:
            raise StreamNotFoundError("the stream was deleted, or expired, while it was read")
        if page.head.version != self._life.head.version:
            self._go_on_with(_lifecycle.life_of(page.head, self._life))
        if self._feed is not None and not page.records:
            # Others were given more, which the storage has lost, and this reader nothing.
            self._feed.lose()
            self._unfollow()
        self._page = self._wanted(page.records)

    def _wanted(self, records: Sequence[bytes]) -> Sequence[bytes]:
        """Give the records of a page, but for those behind the end: also a damaged log may go on there."""
        return records if self._end is None else records[: self._end - self._next]

    def _go_on_with(self, life: Life) -> None:
        """Take what comes next from the stream as it was at some moment. Pages and what is shared may be of two histories."""
        assert self._life is not None  # there are records, so it was entered
        if life.state is not self._life.state or life.head.tail < self._next:
            _lifecycle.check_history(self._life, self._next, life)
        self._life = life

    async def _wait(self, feed: Feed, idle_seconds: float) -> None:
        now = anyio.current_time()
        if self._idle_at is None:
            self._idle_at = now + idle_seconds
        with anyio.move_on_after(self._idle_at - now) as timeout:
            await feed.changed()
        if timeout.cancelled_caught:
            self._idle_at = None
            raise StreamTimeoutError(f"nothing came for {idle_seconds} seconds")
