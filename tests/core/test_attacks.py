"""Attacks on readers and managers: storages that go back unnoticed, errors by the thousand, and use that is out of order."""

import asyncio
import gc
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from datetime import timedelta
from math import inf
from typing import Self, TypeVar

import anyio
import pytest
from msgspec.structs import replace
from tests.core.helpers import Process, core_of
from trio.testing import wait_all_tasks_blocked

from streamkeep import (
    OffsetOutOfRangeError,
    StorageCorruptError,
    StorageError,
    StreamInput,
    StreamManager,
    StreamManagerClosedError,
    Subscription,
)
from streamkeep._core import LOOK_SECONDS
from streamkeep._lifecycle import Beginning, Terms, begin, finish, grow, life_of, take_over
from streamkeep.storage import Head, Page
from streamkeep.storages.memory import MemoryStorage
from streamkeep.testing.faults import FaultyStorage, Operation

T = TypeVar("T")


async def page_of(memory: MemoryStorage, stream: str) -> Page:
    page = await memory.read(stream, 0, 1_000)
    assert page is not None
    return page


def put_back(memory: MemoryStorage, stream: str, page: Page) -> None:
    """Have the storage be as it was; nobody hears of that."""
    memory._streams[stream].head = page.head
    memory._streams[stream].records[:] = page.records


def diverge(memory: MemoryStorage, page: Page) -> Page:
    """Give what another process has made of an older state of the stream."""
    now = memory.time() + 1
    life = take_over(life_of(page.head), now, "s2", "w2", inf, Terms(300, 10, 5))
    return Page(grow(life, 2, 40, now).head, [*page.records, b'c"new 5"', b'c"new 6"'])


async def chunks_of(events: Subscription[object], seconds: float) -> list[object]:
    chunks: list[object] = []
    with anyio.move_on_after(seconds):
        async for event in events:
            chunks.append(event.chunk)  # noqa: PERF401 - a comprehension would give nothing when time is up
    return chunks


@pytest.fixture
async def backup(memory: MemoryStorage, streams: StreamManager) -> AsyncGenerator[Page]:
    """The stream `s` when it had 5 of its 10 events, which somebody here has read and follows."""
    stream = await streams.open("s")
    for number in range(5):
        await stream.write(f"old {number}")
    page = await page_of(memory, "s")
    async with streams.subscribe("s") as events, anyio.create_task_group() as tasks:

        async def follow() -> None:
            with suppress(OffsetOutOfRangeError):
                await chunks_of(events, inf)

        tasks.start_soon(follow)
        for number in range(5, 10):
            await stream.write(f"old {number}")
            await anyio.sleep(1)
        yield page
        tasks.cancel_scope.cancel()


async def test_a_new_reader_after_the_storage_went_back_gets_the_new_history(
    backup: Page, memory: MemoryStorage, streams: StreamManager
) -> None:
    put_back(memory, "s", diverge(memory, backup))
    async with streams.subscribe("s") as events:
        chunks = await chunks_of(events, 5)

    assert chunks == ["old 0", "old 1", "old 2", "old 3", "old 4", "new 5", "new 6"]


async def test_a_reader_of_a_storage_that_went_back_unnoticed_goes_on_with_what_there_is_and_asks_no_more(
    backup: Page, memory: MemoryStorage, streams: StreamManager, storage: FaultyStorage
) -> None:
    put_back(memory, "s", backup)
    storage.calls.clear()
    async with streams.subscribe("s") as events:
        chunks = await chunks_of(events, 5)

    assert chunks == ["old 0", "old 1", "old 2", "old 3", "old 4"]
    assert storage.calls["read"] < 5


async def test_who_shares_a_history_that_is_no_more_is_told_when_somebody_else_sees_that(
    memory: MemoryStorage, streams: StreamManager
) -> None:
    stream = await streams.open("s")
    await stream.write(1)
    backup = await page_of(memory, "s")
    await stream.write(2)
    async with streams.subscribe("s") as told:
        assert [(await anext(told)).chunk, (await anext(told)).chunk] == [1, 2]
        await wait_all_tasks_blocked()
        put_back(memory, "s", diverge(memory, backup))
        async with streams.subscribe("s"):
            with pytest.raises(OffsetOutOfRangeError), anyio.fail_after(1):
                await anext(told)


async def test_a_stream_that_had_ended_and_is_open_again_is_followed_to_its_end(
    memory: MemoryStorage, streams: StreamManager
) -> None:
    stream = await streams.open("s")
    for number in range(600):
        stream.write_soon(number)
    await stream.flush()
    page = await memory.read("s", 0, 1_000)
    assert page is not None
    records = memory._streams["s"].records[:]
    await stream.done()
    async with streams.subscribe("s") as events:
        assert (await anext(events)).offset == 0
        put_back(memory, "s", Page(page.head, records))
        with anyio.fail_after(1_000):
            rest = [event async for event in events]

    assert [event.offset for event in rest] == [*range(1, 601)]
    assert rest[-1].error.status == "ABORTED"


async def test_a_damaged_record_leaves_no_gap(memory: MemoryStorage, streams: StreamManager) -> None:
    stream = await streams.open("s")
    for number in range(5):
        await stream.write(number)
    memory._streams["s"].records[2] = b"?"
    async with streams.subscribe("s") as events:
        with pytest.raises(StorageCorruptError):
            await anext(events)
        await stream.write(5)
        with pytest.raises(StorageCorruptError):
            await anext(events)


async def test_a_subscription_is_entered_once(streams: StreamManager) -> None:
    await (await streams.open("s")).done()
    events = streams.subscribe("s")
    async with events:
        assert [event.offset async for event in events] == [0]
    with pytest.raises(RuntimeError, match="entered already"):
        await events.__aenter__()


async def test_two_tasks_cannot_iterate_at_once(streams: StreamManager) -> None:
    stream = await streams.open("s")
    async with streams.subscribe("s") as events, anyio.create_task_group() as tasks:
        tasks.start_soon(anext, events)
        await wait_all_tasks_blocked()
        with pytest.raises(RuntimeError, match="one at a time"):
            await anext(events)
        await stream.write(1)
        await wait_all_tasks_blocked()
        await stream.write(2)
        assert (await anext(events)).chunk == 2


async def test_memory_forgets_streams_that_have_gone(memory: MemoryStorage) -> None:
    async with StreamManager(memory, ttl=timedelta(seconds=1)) as streams:
        for number in range(2_000):
            await (await streams.open(f"s{number}")).done()
            await anyio.sleep(0.1)

    assert len(memory._due) < 2 * len(memory._streams) + 101 < 2_500


async def test_a_storage_that_is_away_is_not_told_once_a_second_for_each_writer(
    mortal: Process, quiet_logs: pytest.LogCaptureFixture
) -> None:
    inputs = [await mortal.streams.open(f"s{number}") for number in range(30)]
    mortal.die()
    for stream in inputs:
        stream.write_soon(1)
    await anyio.sleep(600)
    mortal.come_back()
    await anyio.sleep(10)

    assert len(quiet_logs.records) < 60
    assert "not stored yet" in quiet_logs.text


async def test_of_errors_that_name_their_streams_each_is_a_line_and_one_is_a_traceback(
    memory: MemoryStorage, quiet_logs: pytest.LogCaptureFixture
) -> None:
    class Naming(FaultyStorage):
        async def read(self, stream: str, start: int = 0, limit: int = 0) -> Page | None:
            if self.is_down and limit:
                raise RuntimeError(f"no answer for {stream}")
            return await self._storage.read(stream, start, limit)

    storage = Naming(memory)
    async with StreamManager(memory) as writers, StreamManager(storage) as streams, anyio.create_task_group() as readers:
        inputs: list[StreamInput] = []

        async def follow(id: str) -> None:
            async with streams.subscribe(id) as events:
                with pytest.raises(StorageError, match=id):
                    await anext(events)

        for number in range(300):
            inputs.append(await writers.open(f"s{number}"))
            readers.start_soon(follow, f"s{number}")
        await wait_all_tasks_blocked()
        storage.is_down = True
        for stream in inputs:
            memory._doorbells.ring([stream.id])
        await wait_all_tasks_blocked()
        storage.is_down = False

    assert len(quiet_logs.records) == 300
    assert sum(bool(record.exc_info) for record in quiet_logs.records) == 1


@pytest.mark.parametrize("end", ["closing", "leaving", "dropping"])
async def test_writers_by_the_hundred_that_end_while_the_storage_is_away_are_a_few_lines(
    storage: FaultyStorage, end: str, quiet_logs: pytest.LogCaptureFixture
) -> None:
    async def leave(stream: StreamInput) -> None:
        with pytest.raises(RuntimeError):
            async with stream:
                raise RuntimeError

    async with StreamManager(storage) as streams, anyio.create_task_group() as tasks:
        inputs = [await streams.open(f"s{number}") for number in range(300)]
        storage.is_down = True
        match end:
            case "closing":
                await streams.aclose()
            case "leaving":
                for stream in inputs:
                    tasks.start_soon(leave, stream)
            case _:
                inputs.clear()
                gc.collect()
        await wait_all_tasks_blocked()
        storage.is_down = False

    assert "could not be" in quiet_logs.text
    assert len(quiet_logs.records) < 5


async def test_who_closes_over_a_storage_that_is_too_slow_is_told_that_something_is_left(
    storage: FaultyStorage, quiet_logs: pytest.LogCaptureFixture
) -> None:
    async with StreamManager(storage) as streams:
        stream = await streams.open("s")
        hold = storage.hold("commit")
        stream.write_soon(1)
        await hold.reached.wait()
    assert "1 streams, such as s, could not be released in time" in quiet_logs.text


class OwnedStorage(FaultyStorage):
    """Says whether it is open."""

    is_open = False

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        self.is_open = True
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        assert self.is_open
        self.is_open = False


@pytest.mark.parametrize("fails", [False, True])
async def test_a_manager_that_is_closed_while_it_is_being_entered_leaves_nothing_open(
    memory: MemoryStorage, monkeypatch: pytest.MonkeyPatch, *, fails: bool
) -> None:
    storage = OwnedStorage(memory)
    monkeypatch.setattr("streamkeep._manager.storage_for", lambda _: storage)
    streams = StreamManager.connect("owned://")
    entering = storage.hold("enter")
    async with anyio.create_task_group() as tasks:

        async def enter() -> None:
            with suppress(StorageError):
                await streams.__aenter__()

        tasks.start_soon(enter)
        await entering.reached.wait()
        tasks.start_soon(streams.aclose)
        await wait_all_tasks_blocked()
        entering.release(StorageError("cannot be opened") if fails else None)

    assert not storage.is_open
    assert not streams.is_running
    async with streams:
        assert storage.is_open


class Cancelling(FaultyStorage):
    """Awaits a future of its own that was cancelled, as a driver does whose connection is closed under it."""

    async def _do(self, operation: Operation, call: Callable[[], Awaitable[T]]) -> T:
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        future.cancel()
        return await future


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_driver_that_cancels_a_future_of_its_own_cancels_nobody_here(memory: MemoryStorage) -> None:
    async with StreamManager(Cancelling(memory)) as streams:
        with pytest.raises(StorageError, match="CancelledError"):
            await streams.open("s")
        with pytest.raises(StorageError, match="CancelledError"):
            await streams.info("s")


async def test_a_writer_that_is_never_quiet_keeps_its_stream_from_being_forgotten(
    streams: StreamManager, storage: FaultyStorage, memory: MemoryStorage
) -> None:
    stream = await streams.open("s")
    for number in range(30):
        storage.ahead_seconds += 3_600
        await anyio.sleep(100)
        await stream.write(number)
        assert (await page_of(memory, "s")).head.expires_at > storage.time()  # else a storage may forget it


def put_head(memory: MemoryStorage, stream: str, head: Head) -> None:
    memory._streams[stream].head = head


async def test_a_writer_whose_stream_a_newer_version_has_taken_over_is_told_so_for_good(
    streams: StreamManager, memory: MemoryStorage, storage: FaultyStorage
) -> None:
    stream, quiet = await streams.open("s"), await streams.open("quiet")
    for id in ("s", "quiet"):
        head = (await page_of(memory, id)).head
        put_head(memory, id, replace(head, version=head.version + 10_000_000, state=b'{"format":3}'))
    with pytest.raises(StorageCorruptError, match="newer version"):
        await stream.write(1)
    await anyio.sleep(3 * LOOK_SECONDS)

    assert (stream.cancelled.is_set(), quiet.cancelled.is_set()) == (True, True)
    storage.calls.clear()
    with pytest.raises(StorageCorruptError, match="newer version"):
        await stream.write(1)
    assert storage.calls["commit"] == 0


def test_a_reader_whose_feed_was_cancelled_before_it_began_is_told() -> None:
    async def main() -> None:
        async with StreamManager(MemoryStorage()) as streams:
            stream = await streams.open("s")
            await stream.write(1)
            async with streams.subscribe("s") as events:
                assert (await anext(events)).offset == 0
                for task in asyncio.all_tasks() - {asyncio.current_task()}:
                    task.cancel()  # as some programs do when they are to end
                with anyio.fail_after(5), pytest.raises(StreamManagerClosedError):
                    await anext(events)

    asyncio.run(main())


def test_who_cancels_a_stream_is_not_kept_waiting_by_mail_that_was_cancelled_before_it_began() -> None:
    async def main() -> None:
        memory = MemoryStorage()
        async with StreamManager(memory) as streams, StreamManager(memory) as elsewhere:
            await streams.open("s")
            await anyio.sleep(0.01)  # until its session's tasks have begun
            core_of(elsewhere).observer.tell_soon(core_of(streams).session.name, "s")
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()
            with anyio.fail_after(5):
                assert await elsewhere.cancel("s")

    asyncio.run(main())


def test_what_is_written_soon_is_stored_although_an_earlier_task_was_cancelled_before_it_began() -> None:
    async def main() -> None:
        async with StreamManager(MemoryStorage()) as streams:
            stream = await streams.open("s")
            await anyio.sleep(0.01)  # until its session's tasks have begun
            stream.write_soon(1)
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()
            await anyio.sleep(0.01)
            stream.write_soon(2)
            await anyio.sleep(0.1)
            assert stream.tail == 2

    asyncio.run(main())


async def test_who_follows_a_new_stream_under_an_id_is_not_told_of_the_old_ones_end_whatever_clocks_say(
    memory: MemoryStorage, streams: StreamManager
) -> None:
    old = await streams.open("s")
    async with streams.subscribe("s"):
        await old.write("old")
        await wait_all_tasks_blocked()
        new = begin(memory.time() - 3_600, "s2", "w2", Beginning(300))
        memory._streams["s"].head = new.head
        memory._streams["s"].records.clear()
        offsets: list[int] = []

        async def read() -> None:
            async with streams.subscribe("s") as events:
                offsets.extend([event.offset async for event in events])

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read)
            await wait_all_tasks_blocked()
            put_back(memory, "s", Page(finish(grow(new, 1, 5, memory.time()), memory.time()).head, [b'c"new"', b"dnull"]))
            memory._doorbells.ring(["s"])

    assert offsets == [0, 1]
