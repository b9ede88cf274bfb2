"""Live: what the live readers of one stream share: its newest records, told by who commits them here, or read once a change.

A notification is a hint to look; what is read is the log. A reader that is slower than what is kept here reads pages of its own.
"""

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import anyio
from msgspec.structs import replace

from .._background import Background, Event, Task
from .._guard import GuardedStorage
from ..errors import StorageError, fresh
from . import _rules
from ._rules import Stream

logger: Final = logging.getLogger("streamkeep")

RECENT_BYTES: Final = 1 << 20
RECENT_PIECES: Final = 256
PAGE_RECORDS: Final = 1_024
RETRY_SECONDS: Final = 1.0
LOOK_SECONDS: Final = 60.0
"""How often a stream is looked at that does not change: nobody rings when one expires."""


@dataclass(slots=True, eq=False)
class Piece:
    """Records one behind the other, from position `first` on, and the stream as it was behind them. `made` is what was made of them."""

    first: int
    records: Sequence[bytes]
    stream: Stream
    made: dict[object, bytes] = field(default_factory=dict)

    @property
    def end(self) -> int:
        """The position behind the last one."""
        return self.first + len(self.records)


class Live:
    """One stream that has live readers here.

    Attributes:
        followers: how many readers there are.
        newest: the stream as far as it is known; None before `begun`, and if there is none.
        is_over: nothing more comes, because the stream was deleted, or cannot be read.
    """

    def __init__(self, storage: GuardedStorage, background: Background, id: str) -> None:
        self.followers = 0
        self.newest: Stream | None = None
        self.is_over = False
        self._storage = storage
        self._background = background
        self._id = id
        self._begun = background.loop.event()
        self._has_begun = False
        self._failure: StorageError | None = None
        self._changes = background.loop.event()
        self._recent: deque[Piece] = deque()
        self._recent_bytes = 0
        self._task: Task | None = None

    def start(self) -> None:
        """Begin to follow."""
        self._task = self._background.start(self._follow, "following a stream", ended=self._end)

    def stop(self) -> None:
        """End it."""
        if self._task is not None:
            self._task.cancel()

    async def begun(self) -> None:
        """Return when the stream was read, and nothing that is appended since will be missed. Raises StorageError."""
        await self._begun.wait()
        if self._failure is not None:
            raise fresh(self._failure)

    @property
    def changes(self) -> Event:
        """What is set at the next change, or when nothing more comes. Get it, look, and wait."""
        return self._changes

    def piece(self, position: int) -> Piece | None:
        """Give what is behind a position, if that is known here; readers at the same one are given the same piece."""
        if not self._recent or position < self._recent[0].first:
            return None
        for piece in reversed(self._recent):
            if piece.first == position:
                return piece
            if piece.first < position:
                skipped = position - piece.first
                return Piece(position, piece.records[skipped:], piece.stream) if position < piece.end else None
        return None

    def take(self, before: Stream, after: Stream, records: Sequence[bytes]) -> None:
        """Take what was committed here: it need not be read."""
        newest = self.newest
        if newest is not None and newest.head.version == before.head.version:
            self._add(newest, after, records)

    def end(self) -> None:
        """Have readers look for themselves: the stream is gone."""
        self.is_over = True
        self.wake()

    def wake(self) -> None:
        """Wake all who wait for a change."""
        changes, self._changes = self._changes, self._background.loop.event()
        changes.set()

    async def _follow(self) -> None:
        while True:
            try:
                async with self._storage.watch(self._id) as doorbell:
                    while await self._read_new():
                        self._has_begun = True
                        self._begun.set()
                        with anyio.move_on_after(LOOK_SECONDS):
                            await doorbell.wait()
                    return
            except StorageError as error:
                if not self._has_begun:
                    self._failure = error
                    return
                logger.warning("a stream cannot be followed now: %s", error)
                await anyio.sleep(RETRY_SECONDS)

    def _end(self) -> None:
        self.is_over = True
        self._begun.set()
        self.wake()

    async def _read_new(self) -> bool:
        """Read what is new; False: the stream is gone."""
        while True:
            old = self.newest
            start = 0 if old is None else old.head.tail
            page = await self._storage.read(self._id, start, 0 if old is None else PAGE_RECORDS)
            if page is None:
                return False
            stream = _rules.stream_of(page.head)
            there = self.newest  # while it was read, more may have been committed here
            if old is None or there is None:
                self.newest = stream
                return True
            if stream.state.life != there.state.life:
                return False
            if stream.head.version > there.head.version:
                if there.head.tail < stream.head.first:
                    self._begin_anew(stream)
                    return True
                self._add(there, stream, page.records[there.head.tail - start :])
            if start + len(page.records) >= stream.head.tail:
                return True

    def _begin_anew(self, stream: Stream) -> None:
        """Go on from the end of a stream that has already forgotten what comes next here."""
        self._recent.clear()
        self._recent_bytes = 0
        self.newest = stream
        self.wake()

    def _add(self, old: Stream, stream: Stream, records: Sequence[bytes]) -> None:
        end = old.head.tail + len(records)
        if end < stream.head.tail:  # a page of more: until the rest is read, the stream is known as if it ended here
            head = replace(stream.head, version=old.head.version, tail=end)
            stream = Stream(head, _rules.before_its_end(stream.state))
        if records:
            self._recent.append(Piece(old.tail, records, stream))
            self._recent_bytes += sum(map(len, records))
            while len(self._recent) > 1 and (self._recent_bytes > RECENT_BYTES or len(self._recent) > RECENT_PIECES):
                self._recent_bytes -= sum(map(len, self._recent.popleft().records))
        self.newest = stream
        self.wake()
