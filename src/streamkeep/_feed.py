"""Feed: the newest records of one stream, for all who follow it here: told by its writer, if that is here too, or read once a change."""

from collections import deque
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from math import inf
from typing import Final
from weakref import WeakValueDictionary

import anyio
from anyio import CancelScope

from . import _lifecycle
from ._background import Task
from ._core import LOOK_SECONDS, Core
from ._lifecycle import Epoch, Life
from .errors import StorageCorruptError, StorageError, StreamkeepError, StreamManagerClosedError, StreamNotFoundError, fresh
from .storage import Doorbell

PAGE_RECORDS: Final = 512
RETRY_SECONDS: Final = 1.0
MAX_RETRY_SECONDS: Final = 5.0
"""How long a storage is left alone that fails while all that it is needed for is what others do to a stream that is written here."""
KEPT_SECONDS: Final = 5.0
KEPT_BYTES: Final = 4 << 20
"""About how much of what was read is kept for so long, with what was made of it: readers come together, such as after a restart."""
PER_RECORD_BYTES: Final = 48
PER_PAGE_BYTES: Final = 1_024
PER_EPOCH_BYTES: Final = 192
"""About what each needs besides: of many streams with one record there are as many pages, each known by its stream's epochs."""
SHARED_RECORDS: Final = 1_024
SHARED_BYTES: Final = 1 << 20

_PageKey = tuple[str, Sequence[Epoch], int]


class Feeds:
    """The feeds of a manager, by stream."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._feeds: dict[str, Feed] = {}
        self._pages: WeakValueDictionary[_PageKey, Records] = WeakValueDictionary()
        self._kept: deque[Records] = deque()
        self._kept_bytes = 0
        self._is_forgetting = False

    def shared(self, stream: str, life: Life, first: int, records: Sequence[bytes]) -> "Records":
        """Give the records of a page that a reader has read by itself: the same as to others who have come to it lately."""
        # What is made of records names the stream, and who may read one may not read its copy. The epochs say which log it is: a storage
        # that went back has another one.
        key = stream, life.state.epochs, first
        there = self._pages.get(key)
        if there is None or there.records != records:
            there = self._pages[key] = Records(first, records)
            self._keep(there, len(life.state.epochs))
        return there

    def page_at(self, stream: str, life: Life, first: int) -> "Records | None":
        """Give the page at an offset that others of this stream's readers have come to lately; None: read it."""
        page = self._pages.get((stream, life.state.epochs, first))
        return None if page is None or page.end > life.head.tail else page  # else a storage that went back has lost some of it

    def drop(self, stream: str, life: Life, first: int) -> None:
        """Share the page at an offset no more: it is damaged, and may be mended by the time that it is read again."""
        self._pages.pop((stream, life.state.epochs, first), None)

    def _keep(self, page: "Records", epochs: int) -> None:
        self._kept.append(page)
        page.grow = self._grow
        records = sum(map(len, page.records)) + PER_RECORD_BYTES * len(page.records)
        self._grow(page, records + PER_PAGE_BYTES + PER_EPOCH_BYTES * epochs)
        if not self._is_forgetting:
            self._is_forgetting = True
            # It is forgotten however the task ends: with the manager, or by who cancels all that asyncio has.
            pause = partial(anyio.sleep, KEPT_SECONDS)
            self._core.background.start(pause, "forgetting what was read", ended=self._forget)

    def _grow(self, page: "Records", size: int) -> None:
        page.size += size
        self._kept_bytes += size
        while self._kept_bytes > KEPT_BYTES:
            self._let_go()

    def _let_go(self) -> None:
        page = self._kept.popleft()
        page.grow = None
        self._kept_bytes -= page.size

    def _forget(self) -> None:
        while self._kept:
            self._let_go()
        self._is_forgetting = False

    def life_of(self, stream: str) -> Life | None:
        """Give a stream as those who follow it here have last seen it; None: nobody does."""
        feed = self._feeds.get(stream)
        return None if feed is None else feed.life

    def followers_of(self, stream: str) -> int:
        """Say how many follow a stream here."""
        feed = self._feeds.get(stream)
        return 0 if feed is None else feed.followers

    @contextmanager
    def following(self, stream: str, life: Life) -> "Generator[Feed]":
        """Give the feed of a stream to one more follower; the first one starts it, the last one stops it."""
        feed = self._feeds.get(stream)
        if feed is None or feed.is_failed or feed.is_behind(life):
            feed = self._feeds[stream] = Feed(self._core, stream, life)
            feed.start()
        feed.followers += 1
        try:
            yield feed
        finally:
            feed.followers -= 1
            if feed.followers == 0:
                feed.stop()
                if self._feeds.get(stream) is feed:
                    del self._feeds[stream]


class Records:
    """Records of a stream, one behind the other. Readers that are equally far are given the same ones.

    Attributes:
        first: the offset of the first one.
        end: the offset behind the last one.
        records: the records.
        made: what was made of them, by what it is, for the next one who needs it; see `make`.
        size: about how many bytes all that needs, while it is kept.
        grow: is told how many bytes more that are, while it is kept.
    """

    __slots__ = ("__weakref__", "end", "first", "grow", "made", "records", "size")

    def __init__(self, first: int, records: Sequence[bytes]) -> None:
        self.first = first
        self.end = first + len(records)
        self.records = records
        self.made: dict[object, bytes] = {}
        self.size = 0
        self.grow: Callable[[Records, int], object] | None = None

    def make(self, what: object, made: bytes) -> bytes:
        """Keep what was made of them as long as them, and give it."""
        self.made[what] = made
        if self.grow is not None:
            self.grow(self, len(made))
        return made

    def __bool__(self) -> bool:
        return bool(self.records)


NO_RECORDS: Final = Records(0, ())


class Feed:
    """What followers of one stream share.

    Attributes:
        followers: how many there are.
        life: the stream as it was when it was last read.
        base: the offset of the first shared record.
        tail: the offset behind the newest one.
    """

    __slots__ = (
        "__weakref__",
        "_bytes",
        "_core",
        "_failure",
        "_given",
        "_hears",
        "_is_behind_writer",
        "_is_doubted",
        "_listening",
        "_pause",
        "_reading",
        "_records",
        "_stream",
        "_waiting",
        "base",
        "followers",
        "life",
        "tail",
    )

    def __init__(self, core: Core, stream: str, life: Life) -> None:
        self.followers = 0
        self.life = life
        self.base = self.tail = life.head.tail
        self._core = core
        self._stream = stream
        self._records: list[bytes] = []
        self._bytes = 0
        self._given = NO_RECORDS
        self._waiting = core.background.loop.parking_lot()
        self._failure: StreamkeepError | None = None
        self._reading = Task()
        self._listening = CancelScope()
        self._is_doubted = False
        self._hears = False
        self._is_behind_writer = False
        self._pause = RETRY_SECONDS

    @property
    def is_failed(self) -> bool:
        """Whether it stopped before the stream's end."""
        return self._failure is not None

    @property
    def is_complete(self) -> bool:
        """Whether the stream has ended, and all of it was read."""
        return self.life.state.status != "open" and self.tail >= self.life.head.tail

    @property
    def _is_over(self) -> bool:
        return self._failure is not None or self.is_complete

    def is_behind(self, life: Life) -> bool:
        """Say whether who has just read the stream needs another feed: the storage went back, or the stream is another one.

        If what was read of the stream is newer, the followers here are told so. Of two streams under one id nobody can say which is newer:
        clocks may have gone back, and answers may be late. Then this feed looks for itself.
        """
        if life.state.life != self.life.state.life:
            self.look()
            return True
        if life.head.version > self.life.head.version:
            try:
                _lifecycle.check_history(self.life, self.tail, life)
            except StreamkeepError as error:
                self._give_up(error)
        return self.is_failed

    def lose(self) -> None:
        """Tell the followers that the storage has not all that is shared any more."""
        self._give_up(_lifecycle.lost(self.tail))

    def start(self) -> None:
        """Read on in the background."""
        self._core.add_feed(self._stream, self)
        self._reading = self._core.background.start(self._follow, f"following stream {self._stream}", ended=self._ended)

    def stop(self) -> None:
        """Read no more."""
        if not self._is_over:  # else nothing is read, and perhaps there is no event loop any more: a reader may be dropped late
            self._reading.cancel()
        self._core.remove_feed(self._stream, self)

    def take(self, life: Life, records: Sequence[bytes]) -> None:
        """Take what this process's own writer has just stored, unless something is missing before: then that is read."""
        if life.head.version <= self.life.head.version or self._is_over:
            return
        if life.state.life == self.life.state.life and life.head.tail - len(records) == self.tail:
            try:
                self._add(life, records)
            except StreamkeepError as error:  # of the followers, and not of who writes
                self._give_up(error)
        self._is_behind_writer = self.tail < life.head.tail
        if self._is_behind_writer or (not self._hears and self._is_told):
            self.look()

    def look(self) -> None:
        """Read the stream, and see who writes it."""
        self._is_doubted = True
        self._listening.cancel()

    def since(self, offset: int) -> Records | None:
        """Give the shared records from `offset` on, 512 at most, or None if they do not reach back that far.

        NO_RECORDS: there are none. Who has read a page alone may be ahead.
        """
        if offset >= self.tail:
            return NO_RECORDS
        start = offset - self.base
        if start < 0:
            return None
        given = self._given
        if given.first != offset or given.end != min(self.tail, offset + PAGE_RECORDS):
            given = self._given = Records(offset, self._records[start : start + PAGE_RECORDS])
        return given

    def changed(self) -> Awaitable[None]:
        """Give what waits, for who has taken all that is shared, until there is more. Raises why there will be none, anew for each."""
        if self._failure is not None:
            raise fresh(self._failure)
        if len(self._waiting) + 1 == self.followers:  # everybody has them
            self._drop_all()
        return self._waiting.park()

    async def _follow(self) -> None:
        try:
            while not self._is_over:
                await self._go_on()
        except StreamkeepError as error:
            if self._core.background.is_stopping:  # a cancellation that comes late has let it read what is closed
                return
            if isinstance(error, StorageError):
                self._core.report(f"stream {self._stream} cannot be read, and its readers are told", error)
            self._fail(error)

    async def _go_on(self) -> None:
        try:
            if self._is_told:
                await self._hear()
                return
            async with self._core.storage.watch(self._stream) as doorbell:
                while not (self._is_over or self._is_told):
                    await self._read_on(doorbell)
        except StorageError as error:
            is_needed = self._is_behind_writer or self.tail < self.life.head.tail
            is_lasting = isinstance(error, StorageCorruptError)
            if is_needed or is_lasting or self._core.writer_of(self._stream, self.life) is None:
                raise
            if self._pause == RETRY_SECONDS:  # once an outage
                self._core.report(f"stream {self._stream}: only what is written here is seen of it", error)
            await anyio.sleep(self._pause)
            self._pause = min(2 * self._pause, MAX_RETRY_SECONDS)

    @property
    def _quiet_at(self) -> float:
        writer = self._core.writer_of(self._stream, self.life)
        return -inf if writer is None else writer.busy_until

    @property
    def _is_told(self) -> bool:
        """Whether a writer of this manager's stores often, and tells what it stores: then the storage need not be listened to.

        Whatever somebody else does to the stream meanwhile, that writer finds out at its next commit.
        """
        return anyio.current_time() < self._quiet_at

    async def _hear(self) -> None:
        """Take what the writer tells (`take`), until it is quiet for a while, or there is something to be read."""
        self._hears, self._is_doubted = True, False
        try:
            await self._read()
            while self._is_told and not (self._is_doubted or self._is_over or self.tail < self.life.head.tail):
                with CancelScope(deadline=self._quiet_at) as self._listening:
                    await anyio.sleep_forever()
        finally:
            self._hears = False

    def _ended(self) -> None:
        # Stopped by the last follower's leaving, or with the manager; or by a bug, or by asyncio, which may be before it began.
        if not self._is_over:
            self._fail(StreamManagerClosedError("the stream manager is closed"))

    async def _read_on(self, doorbell: Doorbell) -> None:
        """Read until the stream is over, or has another writer, or one that tells; meanwhile, see whether the one that it has is alive."""
        session = self.life.state.session
        is_dead = False

        def die() -> None:
            nonlocal is_dead
            is_dead = True
            self._listening.cancel()

        with self._core.observer.calling_when_dead(session, die):
            while True:
                # Whatever is known of the writer, the stream is read first: it may be another's by now, or deleted.
                self._is_doubted = False
                await self._read()
                if self._is_over or self.life.state.session != session or self._is_told:
                    return
                if self.tail < self.life.head.tail:
                    continue
                if not (is_dead or self._is_doubted):
                    with CancelScope(deadline=self._deadline()) as self._listening:
                        await doorbell.wait()
                if self._is_doubted or not (is_dead or self._listening.cancelled_caught):
                    continue
                # If it has changed, it may be by what the writer had stored, and not told anybody, before it died: once more then.
                if not await self._core.end_if_abandoned(self._stream, self.life):
                    is_dead = False
                    await self._core.ask_for_writer(self._stream, self.life)

    def _deadline(self) -> float:
        at = _lifecycle.abandoned_at(self.life.state, self._core.terms)
        return anyio.current_time() + (LOOK_SECONDS if at is None else at - self._core.now())

    async def _read(self) -> None:
        """Read what there is, unless the writer has told more meanwhile."""
        life, tail = self.life, self.tail
        page = await self._core.storage.read(self._stream, tail, PAGE_RECORDS)
        self._pause = RETRY_SECONDS
        if self.life is not life or self.tail != tail:
            return
        if page is None:
            raise StreamNotFoundError("the stream was deleted, or expired, while it was read")
        self._add(life if page.head.version == life.head.version else _lifecycle.life_of(page.head, life), page.records)

    def _add(self, life: Life, records: Sequence[bytes]) -> None:
        if life is not self.life:
            if life.state is not self.life.state or life.head.tail < self.tail:
                _lifecycle.check_history(self.life, self.tail, life)
            self.life = life
        if records:
            self._records.extend(records)
            self.tail += len(records)
            self._bytes += sum(map(len, records))
            if self._bytes > SHARED_BYTES or len(self._records) > SHARED_RECORDS:
                self._trim(len(records))
            self._waiting.unpark_all()

    def _trim(self, newest: int) -> None:
        """Drop the oldest records, but none of the page that has just come."""
        drop = 0
        spare = len(self._records) - newest
        while drop < spare and (self._bytes > SHARED_BYTES or len(self._records) - drop > SHARED_RECORDS):
            self._bytes -= len(self._records[drop])
            drop += 1
        del self._records[:drop]
        self.base += drop

    def _drop_all(self) -> None:
        self._records.clear()
        self._bytes, self.base, self._given = 0, self.tail, NO_RECORDS

    def _give_up(self, why: StreamkeepError) -> None:
        self._fail(why)
        self._reading.cancel()

    def _fail(self, why: StreamkeepError) -> None:
        self._failure = why
        self._waiting.unpark_all()
