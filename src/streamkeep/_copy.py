"""Copying streams from one storage to another: the heads as they are, all records, page by page.

What a stream is called goes with it: see `_names`. Sessions stay where they are.

It works on the contract alone, so it knows no engine. Nothing but the target says how far a copy has come: whatever stops it, it
can be run again, and goes on there. Until it is whole, what is at the target is an open stream that the copy writes, so that nobody else
writes to half a stream, and its readers wait for the rest. What is at the target and is not the beginning of the source's stream is
left as it is.
"""

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import anyio

from . import _lifecycle, _names
from ._guard import GuardedStorage
from ._lifecycle import Life, State
from ._naming import look_up
from ._recovering import add_entry, find_entries, first_entry
from ._recovery import sessions_of
from .errors import StorageCorruptError, StreamkeepError
from .storage import PAGE_BYTES, Head, Storage

PAGE_RECORDS: Final = 512
SCAN_IDS: Final = 100
STREAMS_AT_ONCE: Final = 16
"""A storage commits for many streams as quickly as for one. Two pages of each are in memory at most."""


class Outcome(StrEnum):
    """What became of a stream. COPIED and THERE (an earlier copy has done it): it is whole at the target."""

    COPIED = "copied"
    THERE = "there"
    WRITING = "writing"
    REFUSED = "refused"
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Copied:
    """What became of a stream.

    Attributes:
        id: the stream's id.
        outcome: in a word.
        events: how many events were copied now.
        why: in a sentence, unless it is whole at the target.
    """

    id: str
    outcome: Outcome
    events: int
    why: str = ""

    @property
    def is_whole(self) -> bool:
        """Whether all of it is at the target."""
        return self.outcome in {Outcome.COPIED, Outcome.THERE}


async def ids_with(storage: Storage, prefix: str) -> AsyncGenerator[str]:
    """Give the ids that begin with `prefix`, in code point order."""
    if prefix and await storage.read(prefix) is not None:
        yield prefix
    after = prefix or _lifecycle.AFTER_RESERVED  # what is reserved is no stream
    while page := await storage.scan(after, SCAN_IDS):
        for stream, _ in page:
            if not stream.startswith(prefix):
                return
            yield stream
        after = page[-1][0]


async def copy_streams(
    source: Storage,
    target: Storage,
    ids: AsyncGenerator[str],
    *,
    report: Callable[[Copied], None],
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Copy streams from one entered storage to another.

    Args:
        source: is only read.
        target: may hold other streams, and what an earlier copy has left.
        ids: which streams; each once.
        report: is told what became of each, in no order.
        progress: is told how many events have just been copied.

    Raises StorageError if a storage fails; what was copied until then is kept, as it is when this is cancelled.
    """
    source, target = GuardedStorage(source), GuardedStorage(target)
    failures: list[StreamkeepError] = []
    places = anyio.Semaphore(STREAMS_AT_ONCE)
    async with aclosing(ids), anyio.create_task_group() as tasks:

        def fail(error: StreamkeepError) -> None:
            failures.append(error)
            tasks.cancel_scope.cancel()

        async def copy(stream: str) -> None:
            try:
                report(await _Copy(source, target, stream, progress).run())
            except StreamkeepError as error:
                fail(error)
            finally:
                places.release()

        try:
            async for stream in ids:
                await places.acquire()
                tasks.start_soon(copy, stream)
        except StreamkeepError as error:
            fail(error)
    if failures:
        raise failures[0]


class _Copy:
    """The copy of one stream."""

    def __init__(self, source: GuardedStorage, target: GuardedStorage, stream: str, progress: Callable[[int], None]) -> None:
        self._source = source
        self._target = target
        self._stream = stream
        self._progress = progress
        self._events = 0

    async def run(self) -> Copied:
        """Copy it, and say what became of it."""
        try:
            while True:  # once more when somebody else, another copy perhaps, has changed it at the target meanwhile
                if copied := await self._try():
                    if copied.is_whole:
                        await self._name()
                    return copied
        except StorageCorruptError as error:
            return self._end(Outcome.REFUSED, str(error))

    async def _try(self) -> Copied | None:
        original = await self._source.read(self._stream)
        if original is None or _lifecycle.is_expired(life := _lifecycle.life_of(original.head), self._source.time()):
            return self._end(Outcome.MISSING, "there is no such stream")
        there = await self._read_target()
        if there is None:
            return await self._copy_on(life, None, 0)
        if there == original.head:
            return self._end(Outcome.COPIED if self._events else Outcome.THERE)
        if why := await self._why_not(original.head, there):
            return self._end(Outcome.REFUSED, why)
        return await self._copy_on(life, there.version, there.tail)

    async def _read_target(self) -> Head | None:
        page = await self._target.read(self._stream)
        if page is not None and _lifecycle.is_expired(_lifecycle.life_of(page.head), self._target.time()):
            await self._target.delete(self._stream, page.head.version)
            return await self._read_target()
        return None if page is None else page.head

    async def _why_not(self, original: Head, there: Head) -> str | None:
        """Say why the copy cannot go on from what is at the target; None if that is the beginning of the source's stream."""
        state = _lifecycle.life_of(there).state
        if state.life != _lifecycle.life_of(original).state.life:
            return "there is another stream under this id at the target"
        if state.status != "open":
            return "it has ended at the target in another way than at the source"
        if await _is_written(self._target, state):
            return "it is being written at the target"
        if not await self._begins_alike(there.tail):
            return "other events were written to it at the target"
        return None

    async def _begins_alike(self, tail: int) -> bool:
        start = 0
        while start < tail:
            here = await self._source.read(self._stream, start, min(PAGE_RECORDS, tail - start))
            there = await self._target.read(self._stream, start, PAGE_RECORDS)
            count = min(len(page.records) if page else 0 for page in (here, there))
            if here is None or there is None or not count or here.records[:count] != there.records[:count]:
                return False
            start += count
        return True

    async def _copy_on(self, original: Life, seen: int | None, tail: int) -> Copied | None:
        """Copy from an offset on; None if somebody else has changed the stream at the target."""
        goal = original.head.tail
        while True:
            page = await self._source.read(self._stream, tail, PAGE_RECORDS)
            if page is None or (life := _lifecycle.life_of(page.head)).state.life != original.state.life:
                return await self._take_back()
            records = _as_one_commit(page.records)
            tail += len(records)
            is_written = await _is_written(self._source, life.state)
            is_whole = tail == life.head.tail and not is_written
            if records or is_whole:
                head = (
                    life.head
                    if is_whole
                    else _lifecycle.copy_under_way(life, tail, self._target.time(), after_version=seen or 0)
                )
                if not await self._target.commit(self._stream, seen, head, records):
                    return None
                seen = head.version
                self._events += len(records)
                self._progress(len(records))
            if is_whole:
                return self._end(Outcome.COPIED)
            if is_written and tail >= goal:
                return self._end(Outcome.WRITING, f"it is still being written, and its first {tail} events are copied")

    async def _take_back(self) -> Copied:
        """Delete half a copy of a stream that is no more: nobody would ever complete it."""
        there = await self._read_target()
        if there is not None and _lifecycle.is_copy(_lifecycle.life_of(there).state, self._target.time()):
            await self._target.delete(self._stream, there.version)
        return self._end(Outcome.MISSING, "it was deleted while it was copied")

    async def _name(self) -> None:
        """Have the names that name the stream at the source name it at the target too, but those that name a newer one there."""
        page = await self._target.read(self._stream)
        if page is None:
            return
        life = _lifecycle.life_of(page.head)
        await self._have_recovered(life.state)
        for name in _names.names_for(self._stream, life.state):
            with suppress(StorageCorruptError):  # a name that cannot be read is none
                named = (await look_up(self._source, name)).life
                while named is not None and named.state.life == life.state.life and not await self._claim(name, life):
                    pass

    async def _have_recovered(self, state: State) -> None:
        """Have an open stream that is to be gone on with found at the target by who does that."""
        sessions = sessions_of(state)
        if state.recovery is None or state.status != "open" or await find_entries(self._target, sessions, state.life):
            return
        if (entry := first_entry(await find_entries(self._source, sessions, state.life))) is not None:
            await add_entry(self._target, state.session, entry)

    async def _claim(self, name: str, life: Life) -> bool:
        """Name the stream at the target, if that is still to be done; False if somebody else has changed the name meanwhile."""
        there = await look_up(self._target, name)
        if there.life is not None and there.life.state.created_at >= life.state.created_at:
            return True
        return await self._target.commit(
            name, there.version, _names.naming(there.head, self._stream, life, self._target.time())
        )

    def _end(self, outcome: Outcome, why: str = "") -> Copied:
        return Copied(self._stream, outcome, self._events, why)


async def _is_written(storage: Storage, state: State) -> bool:
    """Say whether a stream seems to have a living writer, by the last sign of life of its session."""
    if not _lifecycle.is_written(state):
        return False
    page = await storage.read(_lifecycle.session_id(state.session))
    return page is not None and _lifecycle.seems_alive(page.head, storage.time())


def _as_one_commit(records: Sequence[bytes]) -> Sequence[bytes]:
    """Give the records of a page without the one that made it full: no writer commits more than a mebibyte at once, but one event."""
    return records[:-1] if len(records) > 1 and sum(map(len, records)) > PAGE_BYTES else records
