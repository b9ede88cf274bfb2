"""Two managers over one storage on virtual time, what was asked of them and what they have acknowledged, and the promises.

Scenarios act on a World, and note in it what they were told; whatever was done to them in between, `examine` finds out whether
each promise was kept.
"""

import asyncio
import gc
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final, Literal

import anyio
import sniffio
from tests.inside import feeds_of, tasks_of, writers_of

from streamkeep import StreamEvent, StreamEventType, StreamInput, StreamManager
from streamkeep._observer import WANTED_SECONDS
from streamkeep._running import UNDO_PAUSES
from streamkeep.errors import (
    KeyInUseError,
    StreamBusyError,
    StreamCompletedError,
    StreamInputClosedError,
    StreamkeepError,
    StreamNotFoundError,
    StreamTakenOverError,
)

from .kinds import OpenStorage
from .probes import ProbedStorage
from .virtual_time import Workload

STREAM: Final = "answer"
OWNER: Final = "ann"
KEY: Final = "chat"
OUTPUT: Final = "all said"
BOUND_SECONDS: Final = 1_000.0
"""Virtual seconds that nothing here may take: many times lease and grace."""
THREAD_SECONDS: Final = 10
LEASE: Final = 10.0
GRACE: Final = 5.0
SETTLE_SECONDS: Final = max(sum(UNDO_PAUSES), WANTED_SECONDS) + 10.0
"""After this nothing is undone any more, dropped handles are released, and no session is observed for who asked once."""
OWN_TASKS: Final = 3
"""What a manager does whatever happens: it sweeps, tends its writers, and renews its session."""

RIVALS: Final = (StreamCompletedError, StreamTakenOverError, StreamNotFoundError)
"""What a writer may be told whose stream others may end, take over or delete."""

Recovery = Literal["the writer goes on", "another writer takes over", "nobody comes"]
Outcome = Literal["done", "error", "cancelled", "aborted", "deleted"]
Event = StreamEvent[Any]


@dataclass(slots=True)
class Told:
    """What the caller knows of the stream and may rely on; and which news of somebody else's doing would be no surprise to its writer."""

    is_open: bool = False
    chunks: dict[int, str] = field(default_factory=dict)
    outcome: Outcome | None = None
    may_be_deleted: bool = False
    is_void: bool = False
    news: tuple[type[StreamkeepError], ...] = ()


class Scribe:
    """A writer, who keeps account of what was given to the stream and of what was acknowledged.

    Attributes:
        given: all chunks that were given, in order.
        input: the handle, until it is dropped.
    """

    def __init__(self, name: str, told: Told) -> None:
        self.name = name
        self.input: StreamInput | None = None
        self._told = told
        self.given: Final[list[str]] = []
        self._first = 0

    @property
    def stream(self) -> StreamInput:
        """The handle."""
        assert self.input is not None
        return self.input

    async def open(self, streams: StreamManager, *, resume: bool = False) -> None:
        self.hold(await streams.open(STREAM, resume=resume))

    async def open_under_a_key(self, streams: StreamManager, *, replace: bool = False) -> None:
        self.hold(await streams.open(STREAM, owner=OWNER, key=KEY, run=KEY, replace=replace))

    def hold(self, stream: StreamInput) -> None:
        """Write to this handle, which has just been opened."""
        self.input = stream
        self._first = stream.tail
        self._told.is_open = True

    async def write(self) -> None:
        chunk = self._next()
        self._told.chunks[await self.stream.write(chunk)] = chunk

    def write_soon(self) -> None:
        self.stream.write_soon(self._next())

    async def flush(self) -> None:
        await self.stream.flush()
        self._all_is_stored()

    async def done(self) -> None:
        await self.stream.done(OUTPUT)
        self._all_is_stored()
        self._told.outcome = "done"

    async def error(self) -> None:
        await self.stream.error(ValueError("as it happens"))
        self._all_is_stored()
        self._told.outcome = "error"

    async def close(self) -> None:
        await self.stream.close()
        self._all_is_stored()

    def _next(self) -> str:
        self.given.append(f"{self.name}{len(self.given)}")
        return self.given[-1]

    def _all_is_stored(self) -> None:
        self._told.chunks |= dict(enumerate(self.given, self._first))


class World:
    """A process with a manager, another process with another, and what a caller was told.

    Attributes:
        streams: the manager that the scenario uses, over `storage`.
        elsewhere: another one, over another handle of the same storage, to which nothing happens.
        told: what the caller knows.
        delivered: lists of events, one for each reader of the scenario, which must each be a part of the log.
        is_storage_well: whether nothing worse will happen than that the caller is cancelled.
        is_under_a_key: whether the stream is opened under the key.
        has_waited: whether somebody has waited to take over, and looks again only when it is time.
    """

    def __init__(self, open_storage: OpenStorage, workload: Workload) -> None:
        self.told = Told()
        self.delivered: list[list[Event]] = []
        self.is_storage_well = False
        self.has_waited = False
        self.is_under_a_key = False
        self.storage = ProbedStorage(open_storage(), workload)
        self.streams = StreamManager(self.storage)
        self._storage_elsewhere = ProbedStorage(open_storage(), workload)
        self.elsewhere = StreamManager(self._storage_elsewhere)
        self._open_storage = open_storage
        self._workload = workload
        self._scribes: list[Scribe] = []
        self._dead: list[StreamInput | None] = []  # nobody drops what a dead process had
        self._resources = AsyncExitStack()
        self._managers = [self.streams, self.elsewhere]

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None]:
        """Enter the storages and managers; on leaving them nothing of theirs may be left."""
        async with self._resources as resources:
            for resource in (self.storage, self._storage_elsewhere, self.streams, self.elsewhere):
                await resources.enter_async_context(resource)
            await anyio.sleep(1)  # until both have swept for the first time
            yield
        for manager in self._managers:
            assert tasks_of(manager) == writers_of(manager) == len(feeds_of(manager)) == 0, "a manager that is left has nothing"
        await assert_nobody_else_runs()

    # For scenarios.

    def scribe(self) -> Scribe:
        """Give one more writer, who has not opened the stream yet."""
        scribe = Scribe("abcdefgh"[len(self._scribes)], self.told)
        self._scribes.append(scribe)
        return scribe

    async def replay(self, after: int | None = None, streams: StreamManager | None = None) -> None:
        """Read the stream to its end."""
        events: list[Event] = []
        self.delivered.append(events)
        async with (streams or self.streams).subscribe(STREAM, after) as subscription:
            async for event in subscription:
                events.append(event)  # noqa: PERF401 (what was read before a strike counts)
        assert events[-1].type is not StreamEventType.CHUNK, "a reader is let go at the end"

    def one_more_storage(self) -> ProbedStorage:
        """Give a storage, not entered, whose points count as `storage`'s do."""
        storage = ProbedStorage(self._open_storage(), self._workload)
        storage.pass_point = lambda: self.storage.pass_point()  # noqa: PLW0108 (whichever it is by then)
        return storage

    def one_more_manager(self, ttl: timedelta = timedelta(minutes=5)) -> StreamManager:
        """Give a manager over `storage`, not entered."""
        manager = StreamManager(self.storage, ttl=ttl)
        self._managers.append(manager)
        return manager

    async def dead_writer(self) -> None:
        """Have the stream written by a process that then dies."""
        storage = ProbedStorage(self._open_storage(), self._workload)
        manager = StreamManager(storage)
        self._managers.append(manager)
        for resource in (storage, manager):
            await self._resources.enter_async_context(resource)
        scribe = self.scribe()
        await scribe.open(manager)
        await scribe.write()
        self._dead.append(scribe.input)
        scribe.input = None
        storage.is_down = True

    async def resume(self, successor: Scribe, streams: StreamManager | None = None) -> None:
        """Have a scribe go on with the stream, as soon as that can be."""
        with anyio.fail_after(BOUND_SECONDS):
            while True:
                try:
                    return await successor.open(streams or self.elsewhere, resume=True)
                except StreamBusyError as busy:
                    self.has_waited = True
                    await anyio.sleep(busy.retry_after)

    async def cancel_elsewhere(self) -> None:
        """Have the stream cancelled by the other process, if it is there."""
        with suppress(StreamNotFoundError):
            if await self.elsewhere.cancel(STREAM):
                self.told.outcome = "cancelled"

    async def delete_elsewhere(self) -> None:
        """Have the stream deleted by the other process, if it is there; then nothing that was told of it need be true."""
        self.told.is_void = True  # first, because the call in which this is done may be cancelled
        with suppress(StreamNotFoundError):
            await self.elsewhere.delete(STREAM)

    # After the scenario.

    async def recover(self, recovery: Recovery) -> None:
        """Go on as somebody would, until the stream has ended, will end by itself, or was found not to be there."""
        await anyio.sleep(1)  # for threads that are still at something that was cancelled
        for manager in self._managers:
            if not manager.is_running:
                await manager.aclose()  # goes on where it was stopped
        if recovery == "the writer goes on":
            await self._go_on()
        self._drop_handles()
        await self._find_out_about_deletion()
        if recovery != "nobody comes":
            await self._take_over()

    async def examine(self) -> None:
        """Assert that what was told is so, for all readers, and that the stream has ended exactly once."""
        with anyio.fail_after(BOUND_SECONDS):
            log, *same = [await self._log(manager) for manager in (self.elsewhere, self.streams) if manager.is_running]
        assert all(_values(other) == _values(log) for other in same), "readers of two processes read the same"
        if log:
            self._compare(log)
        else:
            assert not self.told.is_open or self.told.outcome == "deleted", "what was opened is there"

    async def settle(self) -> None:
        """Assert that managers whose streams are over are left with their own tasks."""
        await anyio.sleep(SETTLE_SECONDS)
        for manager in (self.streams, self.elsewhere):
            if manager.is_running:
                assert writers_of(manager) == len(feeds_of(manager)) == 0, "nobody is tended who is gone"
                assert tasks_of(manager) <= OWN_TASKS, "no task goes on"

    async def start_under_the_key(self) -> None:
        """Assert that nothing is left that is in the way of who starts under the key, for longer than it takes to find a writer dead."""
        stream = await self._started_under_the_key()
        listed = {info.id for info in await self.elsewhere.list(owner=OWNER, status="open")}
        assert listed == {stream.id} == {(await self.elsewhere.current(KEY, OWNER)).id}, "one runs, and is found"
        await stream.done()

    async def _started_under_the_key(self) -> StreamInput:
        with anyio.fail_after(LEASE + GRACE + 1):
            while True:
                try:
                    return await self.elsewhere.open("another", owner=OWNER, key=KEY)
                except KeyInUseError:
                    await anyio.sleep(1)

    async def _find_out_about_deletion(self) -> None:
        if self.told.is_void:
            self.told.is_open, self.told.outcome = False, None
            self.told.chunks.clear()
            self.delivered.clear()
        if self.told.may_be_deleted:
            with suppress(StreamNotFoundError):
                await self.elsewhere.info(STREAM)
                assert self.told.outcome != "deleted", "what was deleted is gone"
                return
            self.told.outcome = "deleted"
            self.told.chunks.clear()
            self.delivered.clear()

    async def _go_on(self) -> None:
        for scribe in self._scribes:
            if scribe.input is not None:
                try:
                    await self._go_on_with(scribe)
                except self.told.news:
                    assert scribe.stream.is_closed
                    assert scribe.stream.cancelled.is_set()

    async def _go_on_with(self, scribe: Scribe) -> None:
        await scribe.flush()
        if scribe.stream.is_closed:
            await assert_raises(StreamInputClosedError, lambda: scribe.stream.write("too late"))
            await assert_raises(StreamInputClosedError, scribe.stream.done)
        else:
            await scribe.write()
            await scribe.done()

    async def _take_over(self) -> None:
        successor = self.scribe()
        try:
            await self.resume(successor)
        except StreamCompletedError:
            return
        if self.told.outcome == "deleted":
            self.told.outcome = None
        await successor.write()
        await successor.done()
        successor.input = None

    def _drop_handles(self) -> None:
        for scribe in self._scribes:
            scribe.input = None
        gc.collect()  # the errors that were raised hold what they came through, and each other

    async def _log(self, manager: StreamManager) -> Sequence[Event]:
        with suppress(StreamNotFoundError):
            async with manager.subscribe(STREAM) as subscription:
                return [event async for event in subscription]
        return []

    def _compare(self, log: Sequence[Event]) -> None:
        *chunks, last = log
        assert [event.offset for event in log] == list(range(len(log)))
        assert last.type is not StreamEventType.CHUNK, "a stream ends"
        assert all(event.type is StreamEventType.CHUNK for event in chunks), "a stream ends once"
        assert self.told.outcome in {None, _outcome(last)}, "it ends as was acknowledged"
        written = [event.chunk for event in chunks]
        assert written == self._in_order(written), "each chunk is there at most once, in the order of calls"
        for offset, chunk in self.told.chunks.items():
            assert written[offset : offset + 1] == [chunk], "what was acknowledged is there"
        for events in filter(None, self.delivered):
            first = events[0].offset
            assert _values(events) == _values(log[first : first + len(events)]), "what was read is what is there"

    def _in_order(self, written: Sequence[str]) -> Sequence[str]:
        """Give what the log must hold, if as many chunks of each writer are in it as these."""
        return [chunk for scribe in self._scribes for chunk in scribe.given[: sum(name[0] == scribe.name for name in written)]]


async def assert_raises(expected: type[StreamkeepError], call: Callable[[], Awaitable[object]]) -> None:
    """Assert that this call says so, and nothing else."""
    found: type[StreamkeepError] | None = None
    try:
        await call()
    except StreamkeepError as error:
        found = type(error)
    assert found is expected


async def assert_nobody_else_runs() -> None:
    """Neither a task nor a thread of ours is left. (Trio lets no task outlive its nursery.)"""
    if sniffio.current_async_library() == "asyncio":
        assert asyncio.all_tasks() == {asyncio.current_task()}
    for thread in threading.enumerate():
        if thread.name.startswith("streamkeep"):
            thread.join(THREAD_SECONDS)  # one whose leaving was cut short is on its way
            assert not thread.is_alive()


def _outcome(last: Event) -> Outcome:
    if last.type is StreamEventType.DONE:
        assert last.output == OUTPUT
        return "done"
    match last.error.status:
        case "CANCELLED":
            return "cancelled"
        case "ABORTED":
            return "aborted"
        case _:
            return "error"


def _values(events: Sequence[Event]) -> Sequence[tuple[int, StreamEventType, bytes]]:
    return [(event.offset, event.type, event.data) for event in events]
