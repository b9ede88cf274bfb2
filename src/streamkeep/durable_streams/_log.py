"""Log: one stream as this process knows it. Its requests are decided upon one after the other, many in one commit.

Nothing here is true because this process says so: a decision holds when it was committed on the head that it was made from, or when that
head was read after the request had come.
"""

import uuid
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from .._background import Background, Event
from .._guard import GuardedStorage, commit_once
from ..errors import StorageError, StreamkeepError, StreamManagerClosedError, fresh
from . import _rules
from ._live import Live
from ._rules import Answer, Decide, Stream

MAX_QUEUED: Final = 10_000
COMMIT_REQUESTS: Final = 1_000
COMMIT_BYTES: Final = 4 << 20
"""How much goes into one commit at most; a single request may have more."""


@dataclass(slots=True, eq=False)
class _Request:
    decide: Decide
    done: Event
    answer: Answer | None = None
    error: StreamkeepError | None = None


class Log:
    """One stream, while anybody asks for it here. `changed` is told when it has grown."""

    def __init__(self, storage: GuardedStorage, background: Background, id: str, changed: Callable[[Stream], object]) -> None:
        self.id: Final = id
        self._storage = storage
        self._background = background
        self._changed = changed
        self._queue: deque[_Request] = deque()
        self._is_deciding = False
        self._round = 0
        self._seen: Stream | None = None  # as it was when it was last read, or committed here
        self._is_known = False
        self._live: Live | None = None

    @property
    def is_idle(self) -> bool:
        """Whether nobody needs it."""
        return self._live is None and not self._is_deciding and not self._queue

    async def decide(self, decide: Decide) -> Answer:
        """Have a request decided upon, and what follows of it stored; give its answer. If this is cancelled, it goes on.

        StorageError: it is not known whether it was stored.
        """
        if len(self._queue) >= MAX_QUEUED:
            return Answer(429, (("retry-after", "1"),), "too many requests wait for this stream")
        request = _Request(decide, self._background.loop.event())
        self._queue.append(request)
        if not self._is_deciding:
            self._is_deciding = True
            self._round += 1
            ended = partial(self._ended, self._round)
            self._background.start(self._decide_all, "deciding upon a stream's requests", ended=ended)
        await request.done.wait()
        if request.error is not None:
            raise fresh(request.error)
        assert request.answer is not None
        return request.answer

    @asynccontextmanager
    async def following(self) -> AsyncGenerator[Live]:
        """Give what its live readers share. Raises StorageError."""
        live = self._live
        if live is None or live.is_over:
            live = self._live = Live(self._storage, self._background, self.id)
            live.start()
        live.followers += 1
        try:
            await live.begun()
            yield live
        finally:
            live.followers -= 1
            if not live.followers:
                live.stop()
                if self._live is live:
                    self._live = None

    def wake(self) -> None:
        """Have live readers look what else there is."""
        if self._live is not None:
            self._live.wake()

    def _ended(self, round_: int) -> None:
        """Note that a task has ended: one that never began has left all to be done."""
        if self._is_deciding and round_ == self._round:
            self._is_deciding = False
            self._refuse_all()

    def _refuse_all(self) -> None:
        _fail(self._queue, StreamManagerClosedError("the server is shutting down"))
        self._queue.clear()

    async def _decide_all(self) -> None:
        try:
            while self._queue:
                some = [self._queue.popleft() for _ in range(min(len(self._queue), COMMIT_REQUESTS))]
                self._queue.extendleft(reversed(await self._decide_or_fail(some)))
        except BaseException:
            self._refuse_all()
            raise
        finally:
            self._is_deciding = False  # at once: who comes next begins another task

    async def _decide_or_fail(self, some: Sequence[_Request]) -> Sequence[_Request]:
        try:
            return await self._decide_some(some)
        except BaseException as error:
            self._is_known = False
            # Also when this is cancelled, because the server shuts down: who waits is told.
            _fail(some, error if isinstance(error, StreamkeepError) else StorageError("a request was not completed"))
            if isinstance(error, StorageError):
                return ()
            raise

    async def _decide_some(self, some: Sequence[_Request]) -> Sequence[_Request]:
        """Decide upon the first of some requests, and commit; give the rest, whose turn is next."""
        is_fresh = False
        while True:
            if not self._is_known:
                page = await self._storage.read(self.id)
                self._seen = None if page is None else _rules.stream_of(page.head)
                self._is_known = is_fresh = True
            before = self._seen
            batch = self._fold(before, some)
            if await self._store(before, batch) if batch.changes else is_fresh:
                for request in some[: batch.count]:
                    request.done.set()
                return some[batch.count :]
            self._is_known = False  # somebody else was first; and what is refused, is refused by what is there now

    def _fold(self, stream: Stream | None, some: Iterable[_Request]) -> "_Batch":
        """Decide upon requests one after the other, each on what the one before has made of the stream."""
        now, batch = self._storage.time(), _Batch()
        for request in some:
            decision = request.decide(stream, now)
            if decision.deletes and batch.after is not None:
                return batch  # first what came before it
            request.answer = decision.answer
            batch.count += 1
            if decision.deletes:
                batch.deletes = True
                return batch
            if decision.stream is not None:
                stream = batch.after = decision.stream
                batch.records.extend(decision.records)
                batch.size += sum(map(len, decision.records))
                if batch.size > COMMIT_BYTES:
                    return batch
        return batch

    async def _store(self, before: Stream | None, batch: "_Batch") -> bool:
        assert before is not None
        if batch.deletes:
            if not await self._delete(before):
                return False
            self._seen = None
            if self._live is not None:
                self._live.end()
            return True
        assert batch.after is not None
        # A commit of which nobody knows may still happen: no other one may have its head, whatever the clock says.
        after = _rules.sealed(batch.after, uuid.uuid4().hex[:16])
        if not await commit_once(self._storage, self.id, before.head.version, after.head, batch.records):
            return False
        self._seen = after
        if self._live is not None:
            self._live.take(before, after, batch.records)
        if after.tail > before.tail:
            self._changed(after)
        return True

    async def _delete(self, stream: Stream) -> bool:
        try:
            return await self._storage.delete(self.id, stream.head.version)
        except StorageError:
            # Another stream there may be one that came before this request, and was not known here: it is not deleted then.
            if await self._storage.read(self.id) is not None:
                raise
            return True


@dataclass(slots=True)
class _Batch:
    """What requests make of a stream together."""

    after: Stream | None = None
    records: list[bytes] = field(default_factory=list)
    size: int = 0
    count: int = 0
    deletes: bool = False

    @property
    def changes(self) -> bool:
        return self.deletes or self.after is not None


def _fail(requests: Iterable[_Request], error: StreamkeepError) -> None:
    for request in requests:
        request.error = error
        request.done.set()
