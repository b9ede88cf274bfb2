"""Sweeping: what goes, what stays, and what it costs."""

from collections.abc import Callable, Sequence
from functools import partial

import anyio
import pytest
from anyio import wait_all_tasks_blocked
from tests.core.helpers import Process

from streamkeep import Recovery, StorageError, StorageFullError, StreamInput, StreamManager
from streamkeep._lifecycle import FORGET_OPEN_SECONDS, PROTOCOL_PREFIX, SESSION_PREFIX
from streamkeep._recovery import entries_of
from streamkeep._sweeper import ROOM_STREAMS, SWEEP_STREAMS
from streamkeep.storage import Head
from streamkeep.storages.memory import MemoryStorage
from streamkeep.testing.faults import FaultyStorage

Clock = Callable[[], float]
HOUR = 3_600.0


async def complete(streams: StreamManager, count: int, prefix: str = "s") -> None:
    for number in range(count):
        await (await streams.open(f"{prefix}{number:05}")).done()


async def kept(storage: FaultyStorage) -> list[str]:
    """Give the streams that are still stored, expired or not."""
    return [stream for stream, _ in await storage.scan("/", 100_000)]


@pytest.mark.promise("P12")
async def test_what_has_expired_is_removed_within_a_minute_and_nothing_else(
    streams: StreamManager, storage: FaultyStorage
) -> None:
    await complete(streams, 3)
    stream = await streams.open("open")
    await anyio.sleep(299)
    assert len(await kept(storage)) == 4
    await anyio.sleep(62)

    assert await kept(storage) == ["open"]
    await stream.done()


async def test_a_sweep_of_what_has_expired_comes_to_its_end(streams: StreamManager, storage: FaultyStorage) -> None:
    await complete(streams, 2 * SWEEP_STREAMS + 1)
    storage.ahead_seconds = 301
    storage.calls.clear()
    await streams.sweep()

    assert await kept(storage) == []
    assert storage.calls["expired"] == 4  # the last one finds nothing
    assert storage.calls["read"] == 0


async def test_a_sweep_costs_what_has_expired_and_not_what_is_kept(streams: StreamManager, storage: FaultyStorage) -> None:
    await complete(streams, 10, "expires")
    storage.ahead_seconds = 200
    await complete(streams, 1_000)
    storage.ahead_seconds = 301
    storage.calls.clear()
    await streams.sweep()

    assert len(await kept(storage)) == 1_000
    assert storage.calls["scan"] == 1  # this test's own
    assert (storage.calls["expired"], storage.calls["delete"], storage.calls["read"]) == (2, 10, 0)


async def test_a_sweep_does_not_end_at_a_page_that_large_heads_have_cut_short(clock: Clock) -> None:
    class CutShort(MemoryStorage):
        async def expired(self, before: float, limit: int = 100) -> Sequence[tuple[str, Head]]:
            return await super().expired(before, min(limit, 10))

    storage = FaultyStorage(CutShort(clock=clock))
    async with StreamManager(storage) as streams:
        await complete(streams, 45)
        storage.ahead_seconds = 301
        await streams.sweep()

        assert await kept(storage) == []


async def test_sweeping_goes_on_when_the_storage_is_back(
    streams: StreamManager, storage: FaultyStorage, quiet_logs: pytest.LogCaptureFixture
) -> None:
    await complete(streams, 1)
    storage.is_down = True
    await anyio.sleep(600)
    storage.is_down = False
    await anyio.sleep(61)

    assert await kept(storage) == []
    assert "cannot be swept" in quiet_logs.text


async def test_who_sweeps_is_told_that_the_storage_failed_and_the_rest_is_swept(
    streams: StreamManager, storage: FaultyStorage
) -> None:
    await complete(streams, 3)
    storage.ahead_seconds = 301
    storage.refuse("delete")
    with pytest.raises(StorageError):
        await streams.sweep()

    assert len(await kept(storage)) == 1


@pytest.mark.promise("P17")
async def test_a_sweep_goes_on_behind_streams_that_cannot_be_read(
    streams: StreamManager, storage: FaultyStorage, quiet_logs: pytest.LogCaptureFixture
) -> None:
    for number in range(2 * SWEEP_STREAMS):
        await storage.commit(f"a{number}", None, Head(1, 0, b"?", 0.0))
    await complete(streams, 1)
    storage.ahead_seconds = 301
    await streams.sweep()

    assert len(await kept(storage)) == 2 * SWEEP_STREAMS
    assert "streams cannot be swept, such as a" in quiet_logs.text
    assert len(quiet_logs.records) < 10


async def test_a_stream_that_is_deleted_or_goes_on_while_it_is_swept_is_no_trouble(
    streams: StreamManager, storage: FaultyStorage
) -> None:
    await complete(streams, 2)
    storage.ahead_seconds = 301
    hold = storage.hold("expired", after=True)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(streams.sweep)
        await hold.reached.wait()
        stream = await streams.open("s00000")
        await stream.write("new")
        hold.release()

    assert await kept(storage) == ["s00000"]
    await stream.done()


# Open streams, and clocks that jump


@pytest.mark.promise("P6", "P12")
async def test_a_clock_that_jumps_by_days_removes_no_stream_of_a_living_writer(
    streams: StreamManager, elsewhere: StreamManager, storage: FaultyStorage
) -> None:
    stream, other = await streams.open("s"), await elsewhere.open("other")
    storage.ahead_seconds = 10 * FORGET_OPEN_SECONDS
    await anyio.sleep(1_300)

    assert sorted(await kept(storage)) == ["other", "s"]
    await stream.done()
    await other.done()


@pytest.mark.promise("P12")
async def test_an_open_stream_that_nobody_looks_at_is_removed_a_day_after_its_writer_died(
    streams: StreamManager, mortal: Process, storage: FaultyStorage
) -> None:
    stream = await mortal.streams.open("s")
    mortal.die()
    storage.ahead_seconds = FORGET_OPEN_SECONDS - HOUR
    await anyio.sleep(300)
    assert await kept(storage) == ["s"]
    storage.ahead_seconds = FORGET_OPEN_SECONDS
    await anyio.sleep(300)

    assert await kept(storage) == []
    mortal.come_back()
    assert stream.tail == 0


@pytest.mark.promise("P12")
async def test_a_stream_that_was_released_is_removed_a_day_later(streams: StreamManager, storage: FaultyStorage) -> None:
    await (await streams.open("s")).close()
    storage.ahead_seconds = FORGET_OPEN_SECONDS
    await streams.sweep()

    assert await kept(storage) == []


async def test_heads_of_sessions_are_removed_an_hour_after_their_end(
    streams: StreamManager, memory: MemoryStorage, storage: FaultyStorage
) -> None:
    async with StreamManager(memory) as brief:
        await brief.open("s")
    found = [id for id, _ in await storage.scan() if id.startswith(SESSION_PREFIX)]
    assert len(found) == 1
    await anyio.sleep(HOUR + 61)

    assert [id for id, _ in await storage.scan() if id.startswith(SESSION_PREFIX)] == []
    assert streams.is_running


class SlowToDelete(MemoryStorage):
    """Deletes only after a while.

    Attributes:
        limits: how many streams each sweep has asked for.
    """

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock=clock)
        self.limits: list[int] = []

    async def delete(self, stream: str, seen: int) -> bool:
        await anyio.sleep(0.1)
        return await super().delete(stream, seen)

    async def expired(self, before: float, limit: int = 100) -> Sequence[tuple[str, Head]]:
        self.limits.append(limit)
        return await super().expired(before, limit)


async def test_a_sweep_counts_what_it_removes_at_once(clock: Clock) -> None:
    storage = SlowToDelete(clock)
    async with StreamManager(storage) as streams:
        await complete(streams, 3 * SWEEP_STREAMS)
        await anyio.sleep(400)

    assert max(storage.limits) == SWEEP_STREAMS
    assert await storage.scan("/") == []


# A storage that is full


async def test_a_full_storage_makes_room_for_who_opens_a_stream(clock: Clock) -> None:
    storage = FaultyStorage(MemoryStorage(max_streams=1_000, clock=clock))
    async with StreamManager(storage) as streams:
        await complete(streams, 1_000)
        storage.ahead_seconds = 301
        storage.calls.clear()
        await (await streams.open("new")).done()

        assert storage.calls["delete"] == ROOM_STREAMS[0]
        assert storage.calls["expired"] == 1
        for number in range(ROOM_STREAMS[0] - 1):
            await (await streams.open(f"new{number}")).done()
        assert storage.calls["expired"] == 1


async def test_of_many_who_find_the_storage_full_one_makes_room(clock: Clock) -> None:
    storage = FaultyStorage(MemoryStorage(max_streams=1_000, clock=clock))
    async with StreamManager(storage) as streams:
        await complete(streams, 1_000)
        storage.ahead_seconds = 301
        hold = storage.hold("expired", after=True)
        storage.calls.clear()
        opened: list[str] = []

        async def open_one(number: int) -> None:
            stream = await streams.open(f"new{number}")
            await stream.done()
            opened.append(stream.id)

        async with anyio.create_task_group() as tasks:
            for number in range(50):
                tasks.start_soon(open_one, number)
            await hold.reached.wait()
            await wait_all_tasks_blocked()
            hold.release()

        assert len(opened) == 50
        assert storage.calls["expired"] == 1


async def test_hundreds_who_find_the_storage_full_at_once_all_get_room(clock: Clock) -> None:
    storage = FaultyStorage(MemoryStorage(max_streams=2_000, clock=clock))
    async with StreamManager(storage) as streams:
        await complete(streams, 2_000)
        storage.ahead_seconds = 301
        inputs: list[StreamInput] = []

        async def open_one(number: int) -> None:
            inputs.append(await streams.open(f"new{number}"))

        async with anyio.create_task_group() as tasks:
            for number in range(1_000):
                tasks.start_soon(open_one, number)

        assert len(inputs) == 1_000


async def test_room_is_made_for_who_writes_and_ends_too(streams: StreamManager, storage: FaultyStorage) -> None:
    stream = await streams.open("new")
    for store in (partial(stream.write, 1), stream.done):
        await complete(streams, 1)
        storage.ahead_seconds += 301
        storage.refuse("commit", error=StorageFullError("full"))
        await store()

    assert [info.tail for info in await streams.list() if info.id == "new"] == [2]


async def test_room_is_made_for_who_is_to_be_gone_on_with(streams: StreamManager, storage: FaultyStorage) -> None:
    for resume in (False, True):
        await complete(streams, 1)
        storage.ahead_seconds += 301
        storage.refuse("commit", error=StorageFullError("full"))
        stream = await streams.open("new", recovery=Recovery("go", "why"), resume=resume)
        assert stream.recovery is not None
        assert stream.recovery.input == "why"
        await complete(streams, 1, "t")
        storage.ahead_seconds += 301
        storage.skip("commit")  # the release
        storage.refuse("commit", error=StorageFullError("full"))
        await stream.close()
        await anyio.sleep(0.5)
        assert [id for id, _ in await storage.scan(entries_of(""), 10) if id.startswith(entries_of(""))]


async def test_what_an_absent_session_has_left_is_removed_from_a_storage_that_has_no_room_to_ask_it(
    mortal: Process, elsewhere: StreamManager, storage: FaultyStorage, memory: MemoryStorage
) -> None:
    """As Redis at its maxmemory: it removes, and stores nothing."""
    await mortal.streams.open("s")
    mortal.die()
    storage.ahead_seconds = FORGET_OPEN_SECONDS + 1
    storage.refuse("commit", times=1_000, error=StorageFullError("full"))
    await anyio.sleep(300)

    assert await memory.read("s") is None


async def test_a_writer_whose_session_a_full_storage_cannot_renew_is_not_taken_for_dead(
    streams: StreamManager, elsewhere: StreamManager, storage: FaultyStorage
) -> None:
    stream = await streams.open("s")
    storage.refuse("commit", times=1_000, error=StorageFullError("full"))
    async with elsewhere.subscribe("s") as events:
        with anyio.move_on_after(300):
            await anext(events)
        storage._steps["commit"].clear()
        await stream.done("end")

        assert [event.output async for event in events] == ["end"]


async def test_who_finds_the_storage_full_and_nothing_expired_is_told(clock: Clock) -> None:
    async with StreamManager(MemoryStorage(max_streams=2, clock=clock)) as streams:
        await complete(streams, 2)
        for _ in range(3):
            with pytest.raises(StorageFullError):
                await streams.open("new")
        await streams.delete("s00000")
        await (await streams.open("new")).done()


async def test_who_finds_the_storage_full_while_others_make_room_tries_again(
    streams: StreamManager, storage: FaultyStorage
) -> None:
    stream = await streams.open("new")
    await complete(streams, 1)
    storage.ahead_seconds = 301
    hold = storage.hold("commit")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stream.write, 1)
        await hold.reached.wait()
        await streams.sweep()
        hold.release(StorageFullError("full"))

    assert stream.tail == 1


async def test_many_who_find_the_storage_full_and_nothing_expired_look_for_room_once(
    streams: StreamManager, storage: FaultyStorage
) -> None:
    inputs = [await streams.open(f"new{number}") for number in range(50)]
    refused: list[int] = []

    async def write(stream: StreamInput) -> None:
        with pytest.raises(StorageFullError):
            await stream.write(1)
        refused.append(1)

    await wait_all_tasks_blocked()
    storage.calls.clear()
    storage.refuse("commit", times=1_000, error=StorageFullError("full"))
    hold = storage.hold("expired", after=True)
    async with anyio.create_task_group() as tasks:
        for stream in inputs:
            tasks.start_soon(write, stream)
        await hold.reached.wait()
        await wait_all_tasks_blocked()
        hold.release()

    assert len(refused) == 50
    assert (storage.calls["expired"], storage.calls["commit"]) == (1, 50)
    storage._steps["commit"].clear()


async def test_who_needs_room_does_not_wait_until_everything_is_swept(streams: StreamManager, storage: FaultyStorage) -> None:
    await complete(streams, 4 * SWEEP_STREAMS)
    storage.ahead_seconds = 301
    hold = storage.hold("expired")
    storage.skip("expired", times=1)
    second = storage.hold("expired")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(streams.sweep)
        await hold.reached.wait()
        storage.refuse("commit", error=StorageFullError("full"))
        opened = anyio.Event()

        async def open_it() -> None:
            await (await streams.open("new")).done()
            opened.set()

        tasks.start_soon(open_it)
        await wait_all_tasks_blocked()
        hold.release()
        with anyio.fail_after(1):
            await opened.wait()
        assert len(await kept(storage)) > SWEEP_STREAMS
        second.release()


async def test_sweeps_do_not_overlap(streams: StreamManager, storage: FaultyStorage) -> None:
    await complete(streams, 10)
    storage.ahead_seconds = 301
    hold = storage.hold("expired")
    storage.calls.clear()
    async with anyio.create_task_group() as tasks:
        for _ in range(5):
            tasks.start_soon(streams.sweep)
        await hold.reached.wait()
        await wait_all_tasks_blocked()
        assert storage.calls["expired"] == 1
        hold.release()

    assert storage.calls["delete"] == 10


async def test_what_belongs_to_another_part_is_left_to_it_and_hides_nothing(
    streams: StreamManager, storage: FaultyStorage
) -> None:
    theirs = [f"{PROTOCOL_PREFIX}{number:05}" for number in range(2 * SWEEP_STREAMS)]
    for stream in theirs:
        assert await storage.commit(stream, None, Head(1, 0, b"theirs", 0.0))
    await complete(streams, 1)
    await anyio.sleep(HOUR)
    await streams.sweep()

    assert await kept(storage) == []
    assert [stream for stream, _ in await storage.scan(PROTOCOL_PREFIX, len(theirs))] == theirs
