import contextlib
import gc
import math
import re
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import anyio
import pytest
from anyio import wait_all_tasks_blocked
from anyio.lowlevel import checkpoint

import streamkeep
from streamkeep import (
    InMemoryStreamManager,
    InvalidArgumentError,
    StorageCorruptError,
    StorageError,
    StorageFullError,
    StreamAlreadyExistsError,
    StreamBusyError,
    StreamCompletedError,
    StreamEventType,
    StreamInput,
    StreamManager,
    StreamManagerClosedError,
    StreamNotFoundError,
    StreamTakenOverError,
)
from streamkeep.storage import Head
from streamkeep.storages.memory import MemoryStorage
from streamkeep.testing.clock import FakeClock
from streamkeep.testing.faults import FaultyStorage

Clock = Callable[[], float]
EPOCH = 1_800_000_000.0


async def ending(streams: StreamManager, stream: str = "s") -> str | None:
    return (await streams.info(stream)).error


# Ids, options, metadata


@pytest.mark.parametrize("stream", ["a", "answer-42", "_~.:@=+-", "0" * 255, "~", "flow:user@host"])
@pytest.mark.promise("P13")
async def test_ids_that_are_taken(streams: StreamManager, stream: str) -> None:
    await streams.open(stream)

    assert [info.id for info in await streams.list()] == [stream]


@pytest.mark.parametrize(
    "stream",
    ["", "a" * 256, "a\n", "\0", "a b", "a/b", "..", ".a", "-a", "é", "a\u0301", "\ud800", "a\n\n", None, 7, b"a", ["a"]],
)
@pytest.mark.promise("P13")
async def test_ids_that_are_refused(streams: StreamManager, stream: Any) -> None:
    for call in (streams.open, streams.cancel, streams.delete, streams.info):
        with pytest.raises(InvalidArgumentError):
            await call(stream)
    with pytest.raises(InvalidArgumentError):
        streams.subscribe(stream)


@pytest.mark.parametrize("option", [{"ttl": timedelta(-1)}, {"grace": timedelta(-1)}, {"lease": timedelta(0)}])
def test_times_that_make_no_sense_are_refused(option: Any) -> None:
    with pytest.raises(InvalidArgumentError):
        StreamManager(MemoryStorage(), **option)


async def test_metadata_is_kept(streams: StreamManager, elsewhere: StreamManager) -> None:
    stream = await streams.open("s", metadata={"owner": "ann", "é\0": ""})
    await stream.done()

    assert (await elsewhere.info("s")).metadata == {"owner": "ann", "é\0": ""}


@pytest.mark.parametrize("metadata", [{"a": 1}, {1: "a"}, {"a": None}, {"a": "x" * 4_096}, {"a": "\ud800"}])
@pytest.mark.promise("P13")
async def test_metadata_that_is_refused(streams: StreamManager, metadata: Any) -> None:
    with pytest.raises(InvalidArgumentError):
        await streams.open("s", metadata=metadata)


async def test_info_says_what_is_known(streams: StreamManager, clock: Clock) -> None:
    began = clock()
    stream = await streams.open("s")
    await anyio.sleep(1)
    await stream.write("a")
    info = await streams.info("s")

    assert (info.id, info.status, info.error, info.tail, info.created_at) == ("s", "open", None, 1, began)
    assert (info.updated_at, info.lease_until) == (began + 1, began + 10)
    assert info.writer
    assert info.expires_at > began + 15


async def test_list_gives_living_streams_page_by_page(streams: StreamManager, clock: Clock) -> None:
    for number in range(250):
        await (await streams.open(f"s{number:03}")).done()
    await anyio.sleep(299)
    for number in range(0, 250, 2):
        await streams.delete(f"s{number:03}")
        await streams.open(f"s{number:03}")
    async with StreamManager(streams.storage, clock=lambda: clock() + 2) as later:
        first = await later.list(limit=100)
        second = await later.list(first[-1].id, limit=100)

    assert [info.id for info in (*first, *second)] == [f"s{number:03}" for number in range(0, 250, 2)]
    assert len(first) == 100


async def test_everything_public_is_exported() -> None:
    assert all(hasattr(streamkeep, name) for name in streamkeep.__all__)
    assert sorted(streamkeep.__all__) == streamkeep.__all__


# Opening


@pytest.mark.promise("P1")
async def test_an_expired_stream_counts_as_absent_at_once_and_its_id_is_free(storage: FaultyStorage) -> None:
    clock = FakeClock()
    async with StreamManager(storage, clock=clock) as streams:
        stream = await streams.open("s")
        await stream.write("old")
        await stream.done()
        clock.advance(300)
        for call in (streams.info, streams.cancel, streams.delete):
            with pytest.raises(StreamNotFoundError):
                await call("s")
        with pytest.raises(StreamNotFoundError):
            async with streams.subscribe("s"):
                pytest.fail("entered")
        assert await streams.list() == []

        assert (await streams.open("s")).tail == 0


@pytest.mark.promise("P1")
async def test_of_many_who_open_an_id_exactly_one_wins(
    streams: StreamManager, elsewhere: StreamManager, storage: FaultyStorage
) -> None:
    results: list[object] = []
    holds = [storage.hold("commit") for _ in range(10)]

    async def rival(number: int) -> None:
        try:
            results.append(await (streams, elsewhere)[number % 2].open("s"))
        except StreamAlreadyExistsError as error:
            results.append(error)

    async with anyio.create_task_group() as tasks:
        for number in range(10):
            tasks.start_soon(rival, number)
        for hold in holds:
            await hold.reached.wait()
        for hold in holds:
            hold.release()

    assert sum(isinstance(result, StreamInput) for result in results) == 1


@pytest.mark.promise("P5", "P6")
async def test_of_many_who_take_over_exactly_one_wins(
    streams: StreamManager, elsewhere: StreamManager, dead: StreamManager, storage: FaultyStorage
) -> None:
    await (await dead.open("s")).write("a")
    results: list[object] = []
    holds = [storage.hold("read", after=True) for _ in range(10)]  # all see the same head

    async def rival(number: int) -> None:
        try:
            results.append(await (streams, elsewhere)[number % 2].open("s", resume=True))
        except StreamBusyError as error:
            results.append(error)

    async with anyio.create_task_group() as tasks:
        for number in range(10):
            tasks.start_soon(rival, number)
        for hold in holds:
            await hold.reached.wait()
        for hold in holds:
            hold.release()

    assert sum(isinstance(result, StreamInput) for result in results) == 1


async def test_a_stream_that_is_deleted_while_it_is_opened_is_created(
    streams: StreamManager, elsewhere: StreamManager, storage: FaultyStorage
) -> None:
    await elsewhere.open("s")
    await anyio.sleep(1)
    hold = storage.hold("read")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: streams.open("s").__aenter__())
        await hold.reached.wait()
        await elsewhere.delete("s")
        hold.release()

    assert (await elsewhere.info("s")).tail == 0


async def test_resuming_what_is_not_there_creates_it(streams: StreamManager) -> None:
    assert (await streams.open("s", resume=True)).tail == 0


@pytest.mark.promise("P5")
async def test_a_living_writer_is_not_taken_over_from(streams: StreamManager, elsewhere: StreamManager) -> None:
    stream = await streams.open("s")
    await anyio.sleep(3_600)
    with pytest.raises(StreamBusyError):
        await elsewhere.open("s", resume=True)

    assert await stream.write("a") == 0


@pytest.mark.promise("P5")
async def test_a_completed_stream_is_not_resumed(streams: StreamManager) -> None:
    await (await streams.open("s")).done()
    with pytest.raises(StreamCompletedError):
        await streams.open("s", resume=True)


# Leases


@pytest.mark.promise("P6")
async def test_a_lease_is_renewed_every_third_of_it_also_while_nothing_is_written(streams: StreamManager, clock: Clock) -> None:
    stream = await streams.open("s")
    for _ in range(100):
        await anyio.sleep(9)
        assert (await streams.info("s")).lease_until >= clock() + 10 - 10 / 3 - 0.01

    await stream.done()


@pytest.mark.promise("P12")
async def test_an_open_stream_does_not_expire_while_its_writer_lives(storage: FaultyStorage, clock: Clock) -> None:
    async with StreamManager(storage, clock=clock, ttl=timedelta(seconds=1), lease=timedelta(hours=2)) as streams:
        stream = await streams.open("s")
        await anyio.sleep(7_100)

        assert (await streams.info("s")).status == "open"
        await stream.done()


@pytest.mark.promise("P12")
async def test_ttl_counts_from_completion_and_not_from_creation(streams: StreamManager) -> None:
    stream = await streams.open("s")
    await anyio.sleep(1_000)
    await stream.done()
    await anyio.sleep(299.9)
    assert (await streams.info("s")).status == "done"
    await anyio.sleep(0.1)
    with pytest.raises(StreamNotFoundError):
        await streams.info("s")


@pytest.mark.promise("P6")
async def test_a_dropped_handle_is_a_writer_that_died(streams: StreamManager, elsewhere: StreamManager, clock: Clock) -> None:
    await streams.open("s")
    gc.collect()
    began = clock()
    async with elsewhere.subscribe("s") as events:
        event = await anext(events)

    assert (event.type, event.error.status) == (StreamEventType.ERROR, "ABORTED")
    assert clock() - began == 15
    assert streams._inputs == {}


@pytest.mark.promise("P6")
async def test_a_subscriber_ends_what_was_abandoned_after_the_grace(
    dead: StreamManager, storage: FaultyStorage, clock: Clock
) -> None:
    stream = await dead.open("s")
    await stream.write("a")
    async with StreamManager(storage, clock=lambda: clock() - 3600 + 14) as streams, streams.subscribe("s") as events:
        await anext(events)
        began = clock()
        assert (await anext(events)).error.status == "ABORTED"

    assert clock() - began == pytest.approx(1)
    with pytest.raises(StreamCompletedError):
        await stream.write("b")


@pytest.mark.promise("P6")
async def test_a_subscriber_whose_clock_runs_slow_waits_as_long_as_its_clock_says(
    dead: StreamManager, storage: FaultyStorage, clock: Clock
) -> None:
    await dead.open("s")
    async with (
        StreamManager(storage, clock=lambda: (EPOCH + clock()) / 2 - 3600) as slow,
        slow.subscribe("s") as events,
    ):
        assert (await anext(events)).error.status == "ABORTED"

    assert clock() - EPOCH == pytest.approx(30)
    assert storage.calls["read"] < 100


@pytest.mark.promise("P6")
async def test_a_stream_that_was_let_go_is_aborted_if_nobody_goes_on_with_it(streams: StreamManager, clock: Clock) -> None:
    await (await streams.open("s")).close()
    began = clock()
    async with streams.subscribe("s") as events:
        assert (await anext(events)).error.status == "ABORTED"

    assert clock() - began == 15


@pytest.mark.promise("P6")
async def test_an_heir_keeps_a_stream_from_being_aborted(
    streams: StreamManager, dead: StreamManager, elsewhere: StreamManager
) -> None:
    await dead.open("s")
    heir = await streams.open("s", resume=True)
    async with elsewhere.subscribe("s") as events:
        await anyio.sleep(60)
        await heir.done("mine")

        assert (await anext(events)).output == "mine"


async def test_many_subscribers_end_an_abandoned_stream_once(
    streams: StreamManager, elsewhere: StreamManager, dead: StreamManager
) -> None:
    await dead.open("s")
    async with streams.subscribe("s") as one, elsewhere.subscribe("s") as two:
        assert [event.offset async for event in one] == [event.offset async for event in two] == [0]


@pytest.mark.promise("P6")
async def test_a_sweep_ends_what_was_abandoned_and_removes_what_has_expired(
    streams: StreamManager, storage: FaultyStorage
) -> None:
    await (await streams.open("done")).done()
    handle = streams.open("abandoned")
    await handle
    gc.collect()
    await anyio.sleep(61)
    assert await ending(streams, "abandoned") == "ABORTED"
    await anyio.sleep(300)

    assert await storage.scan() == []


async def test_a_sweep_leaves_alone_what_lives(streams: StreamManager) -> None:
    stream = await streams.open("s")
    await anyio.sleep(600)
    await stream.done()
    await streams.sweep()

    assert await ending(streams) is None


async def test_a_sweep_goes_on_behind_a_damaged_stream(
    streams: StreamManager, storage: FaultyStorage, clock: Clock, quiet_logs: pytest.LogCaptureFixture
) -> None:
    await storage.commit("a", None, Head(1, 0, b"?", math.inf))
    await (await streams.open("b")).done()
    await anyio.sleep(361)

    assert await storage.scan() == ["a"]
    assert "stream a" in quiet_logs.text


async def test_a_stream_that_is_deleted_while_it_is_swept_is_no_trouble(streams: StreamManager, storage: FaultyStorage) -> None:
    await streams.open("s")
    await anyio.sleep(1)
    hold = storage.hold("read")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(streams.sweep)
        await hold.reached.wait()
        await streams.delete("s")
        hold.release()

    assert await streams.list() == []


async def test_sweeping_goes_on_when_the_storage_is_back(
    streams: StreamManager, storage: FaultyStorage, quiet_logs: pytest.LogCaptureFixture
) -> None:
    await (await streams.open("s")).done()
    storage.is_down = True
    await anyio.sleep(600)
    storage.is_down = False
    await anyio.sleep(61)

    assert await storage.scan() == []
    assert "cannot be swept" in quiet_logs.text


@pytest.mark.promise("P6")
async def test_a_lease_that_cannot_be_renewed_is_renewed_when_the_storage_is_back(
    streams: StreamManager, elsewhere: StreamManager, storage: FaultyStorage, quiet_logs: pytest.LogCaptureFixture
) -> None:
    stream = await streams.open("s")
    await anyio.sleep(4)
    storage.is_down = True
    await anyio.sleep(4)
    storage.is_down = False
    await anyio.sleep(6)
    with pytest.raises(StreamBusyError):
        await elsewhere.open("s", resume=True)

    assert "not renewed" in quiet_logs.text
    await stream.done()


async def test_a_renewal_that_hangs_holds_up_no_other(streams: StreamManager, storage: FaultyStorage, clock: Clock) -> None:
    handles = [await streams.open(stream) for stream in "ab"]
    storage.hold("commit")
    await anyio.sleep(9)

    assert all([(await streams.info(handle.id)).lease_until > clock() for handle in handles])


async def test_the_lease_of_a_writer_in_doubt_is_renewed(streams: StreamManager, storage: FaultyStorage, clock: Clock) -> None:
    stream = await streams.open("s")
    storage.lose("commit")
    with pytest.raises(StorageError):
        await stream.write("a")
    await anyio.sleep(600)

    assert (await streams.info("s")).lease_until > clock()
    assert stream.tail == 1


async def test_a_renewal_carries_out_what_close_could_not(streams: StreamManager, storage: FaultyStorage) -> None:
    stream = await streams.open("s")
    hold = storage.hold("commit")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stream.write, "a")
        await hold.reached.wait()
        tasks.start_soon(stream.close)
        await wait_all_tasks_blocked()
        tasks.cancel_scope.cancel()
    await anyio.sleep(4)

    assert (await streams.info("s")).writer == ""
    assert stream.tail == 1


# Cancelling


@pytest.mark.promise("P7")
async def test_a_quiet_writer_learns_at_once_that_it_was_cancelled_elsewhere(
    streams: StreamManager, elsewhere: StreamManager, clock: Clock
) -> None:
    stream = await streams.open("s")
    await anyio.sleep(60)
    began = clock()
    assert await elsewhere.cancel("s") is True
    await stream.cancelled.wait()

    assert clock() - began < 0.5
    assert await ending(streams) == "CANCELLED"
    assert await elsewhere.cancel("s") is False


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.promise("P7")
async def test_a_writer_that_gave_up_on_a_write_learns_at_once_that_it_was_cancelled(
    streams: StreamManager, elsewhere: StreamManager, storage: FaultyStorage, clock: Clock, after: bool
) -> None:
    stream = await streams.open("s")
    hold = storage.hold("commit", after=after)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stream.write, "a")
        await hold.reached.wait()
        tasks.cancel_scope.cancel()
    began = clock()
    assert await elsewhere.cancel("s") is True
    await stream.cancelled.wait()

    assert clock() - began < 0.5
    with pytest.raises(StreamCompletedError):
        await stream.flush()


@pytest.mark.promise("P7")
async def test_a_writer_of_the_same_process_is_cancelled_when_cancel_returns(streams: StreamManager) -> None:
    stream = await streams.open("s")
    other = await streams.open("other")
    await streams.cancel("s")

    assert stream.cancelled.is_set()
    assert not other.cancelled.is_set()


@pytest.mark.promise("P4", "P7")
async def test_a_quiet_writer_learns_that_it_was_taken_over_from(dead: StreamManager, streams: StreamManager) -> None:
    stream = await dead.open("s")
    heir = await streams.open("s", resume=True)
    await stream.cancelled.wait()

    with pytest.raises(StreamTakenOverError):
        await stream.write("a")
    await heir.done()


@pytest.mark.promise("P7")
async def test_cancelling_a_writer_that_never_stops_writing_comes_to_an_end(
    streams: StreamManager, elsewhere: StreamManager
) -> None:
    stream = await streams.open("s")
    started = anyio.Event()

    async def write() -> None:
        with contextlib.suppress(StreamCompletedError):
            while True:
                await stream.write("a")
                started.set()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(write)
        await started.wait()
        assert await elsewhere.cancel("s")

    assert stream.tail > 0
    assert stream.cancelled.is_set()


async def test_cancel_tries_again_when_a_write_came_between(streams: StreamManager, storage: FaultyStorage) -> None:
    stream = await streams.open("s")
    await anyio.sleep(1)
    hold = storage.hold("read", after=True)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(streams.cancel, "s")
        await hold.reached.wait()
        await stream.write("a")
        hold.release()

    assert await ending(streams) == "CANCELLED"
    assert (await streams.info("s")).tail == 2


async def test_delete_tries_again_when_a_write_came_between(streams: StreamManager, storage: FaultyStorage) -> None:
    stream = await streams.open("s")
    await anyio.sleep(1)
    hold = storage.hold("read", after=True)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(streams.delete, "s")
        await hold.reached.wait()
        await stream.write("a")
        hold.release()

    assert await storage.read("s") is None
    assert stream.cancelled.is_set()


async def test_a_cancel_that_was_stored_is_a_success_even_if_the_writer_cannot_be_told(
    streams: StreamManager, storage: FaultyStorage
) -> None:
    stream = await streams.open("s")
    await anyio.sleep(1)
    storage.skip("read")
    storage.refuse("read")

    assert await streams.cancel("s")
    await stream.cancelled.wait()


@pytest.mark.promise("P7")
async def test_listening_goes_on_when_the_storage_is_back(
    streams: StreamManager, elsewhere: StreamManager, storage: FaultyStorage, quiet_logs: pytest.LogCaptureFixture
) -> None:
    storage.refuse("watch", times=3)
    stream = await streams.open("s")
    await anyio.sleep(10)
    await elsewhere.cancel("s")
    await stream.cancelled.wait()

    assert "cannot listen" in quiet_logs.text


async def test_a_writer_at_work_is_not_looked_after(streams: StreamManager, storage: FaultyStorage) -> None:
    stream = await streams.open("s")
    await anyio.sleep(1)
    storage.calls.clear()
    for _ in range(100):
        await stream.write("a")
        await anyio.sleep(0.05)

    assert storage.calls["read"] <= 2


async def test_a_handle_that_is_dropped_while_its_storage_fails_is_no_longer_listened_for(
    streams: StreamManager, storage: FaultyStorage
) -> None:
    storage.refuse("watch", times=1_000)
    await streams.open("s")
    await wait_all_tasks_blocked()
    gc.collect()
    await anyio.sleep(2)
    storage.calls.clear()
    await anyio.sleep(60)

    assert storage.calls["watch"] == 0


async def test_a_handle_that_was_dropped_is_no_longer_listened_for_when_its_stream_changes(
    streams: StreamManager, elsewhere: StreamManager
) -> None:
    stream = await streams.open("s")
    await anyio.sleep(1)
    del stream
    gc.collect()
    await elsewhere.cancel("s")
    await anyio.sleep(1)

    assert len(streams._scopes) == 2  # one renews, one sweeps


# Beginning and closing


async def test_a_manager_that_is_not_entered_says_so() -> None:
    streams = StreamManager(MemoryStorage())
    for call in (streams.open, streams.info, streams.cancel, streams.delete, streams.list):
        with pytest.raises(StreamManagerClosedError, match="async with"):
            await call("s")
    with pytest.raises(StreamManagerClosedError, match="async with"):
        await streams.subscribe("s").__aenter__()
    await streams.aclose()
    with pytest.raises(StreamManagerClosedError, match="closed"):
        await streams.open("s")


async def test_a_manager_is_entered_once(streams: StreamManager) -> None:
    with pytest.raises(RuntimeError):
        await streams.__aenter__()


@pytest.mark.promise("P14")
async def test_closing_lets_go_of_the_writers_streams(storage: FaultyStorage, clock: Clock, elsewhere: StreamManager) -> None:
    async with StreamManager(storage, clock=clock) as streams:
        stream = await streams.open("s")
        stream.write_soon("a")

    assert stream.cancelled.is_set()
    assert (await elsewhere.open("s", resume=True)).tail == 1


@pytest.mark.promise("P14")
async def test_closing_ends_all_background_work_and_can_be_done_twice(streams: StreamManager, storage: FaultyStorage) -> None:
    await streams.open("s")
    await streams.aclose()
    await streams.aclose()
    storage.calls.clear()
    await anyio.sleep(3_600)

    assert not streams.is_running
    assert storage.calls.total() == 0


@pytest.mark.promise("P14")
async def test_closing_from_several_tasks_returns_to_each_when_all_is_done(
    streams: StreamManager, storage: FaultyStorage
) -> None:
    stream = await streams.open("s")
    hold = storage.hold("commit")
    returned: list[bool] = []

    async def close() -> None:
        await streams.aclose()
        returned.append(hold.reached.is_set() and stream.cancelled.is_set())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(close)
        await hold.reached.wait()
        tasks.start_soon(close)
        await wait_all_tasks_blocked()
        assert returned == []
        hold.release()

    assert returned == [True, True]


async def test_closing_is_carried_on_by_another_when_the_first_is_cancelled(
    streams: StreamManager, elsewhere: StreamManager, storage: FaultyStorage
) -> None:
    stream = await streams.open("s")
    hold = storage.hold("commit")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(streams.aclose)
        await hold.reached.wait()
        tasks.cancel_scope.cancel()
    await streams.aclose()

    assert (await elsewhere.info("s")).writer == ""
    assert stream.is_closed
    assert not streams._scopes


@pytest.mark.promise("P14")
async def test_closing_takes_no_longer_than_it_may_when_the_storage_hangs_or_fails(
    storage: FaultyStorage, clock: Clock, quiet_logs: pytest.LogCaptureFixture
) -> None:
    async with StreamManager(storage, clock=clock) as streams:
        handles = [await streams.open(stream) for stream in "ab"]
        await anyio.sleep(1)
        storage.hold("commit")
        storage.refuse("commit")
        began = clock()

    assert clock() - began == 5
    assert all(handle.cancelled.is_set() for handle in handles)
    assert "could not be let go of" in quiet_logs.text


async def test_what_is_opened_while_the_manager_closes_is_let_go_of(streams: StreamManager, storage: FaultyStorage) -> None:
    hold = storage.hold("commit", after=True)
    async with anyio.create_task_group() as tasks:

        async def open_it() -> None:
            with pytest.raises(StreamManagerClosedError):
                await streams.open("s")

        tasks.start_soon(open_it)
        await hold.reached.wait()
        await streams.aclose()
        hold.release()


@pytest.mark.promise("P14")
async def test_who_subscribes_while_the_manager_closes_is_told(streams: StreamManager, storage: FaultyStorage) -> None:
    await streams.open("s")
    await anyio.sleep(1)
    hold = storage.hold("read", after=True)
    async with anyio.create_task_group() as tasks:

        async def subscribe() -> None:
            async with streams.subscribe("s") as events:
                with pytest.raises(StreamManagerClosedError):
                    await anext(events)

        tasks.start_soon(subscribe)
        await hold.reached.wait()
        await streams.aclose()
        hold.release()


@pytest.mark.promise("P14")
async def test_what_leaves_the_managers_block_arrives_bare(storage: FaultyStorage) -> None:
    error = ValueError("mine")
    with pytest.raises(ValueError, match="mine") as raised:
        async with StreamManager(storage):
            raise error

    assert raised.value is error


async def test_a_cancelled_block_closes_the_manager(storage: FaultyStorage) -> None:
    with anyio.CancelScope() as scope:
        async with StreamManager(storage) as streams:
            await streams.open("s")
            scope.cancel()
            await checkpoint()

    assert scope.cancelled_caught
    assert not streams._scopes


async def test_a_storage_of_its_own_is_opened_and_closed(storage: FaultyStorage) -> None:
    async with StreamManager.connect("memory://") as streams:
        await (await streams.open("s")).done()

    assert not streams.is_running


async def test_a_storage_that_cannot_be_opened_is_told_and_the_manager_may_try_again(storage: FaultyStorage) -> None:
    streams = StreamManager(storage)
    streams._owns_storage = True
    storage.refuse("enter")
    with pytest.raises(StorageError):
        await streams.__aenter__()
    async with streams:
        assert streams.is_running


async def test_an_unknown_url_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match=re.escape("nothing://")):
        StreamManager.connect("nothing://")


@pytest.mark.promise("P13")
async def test_a_manager_in_memory_holds_so_many_streams_and_not_one_more() -> None:
    async with InMemoryStreamManager(ttl=timedelta(minutes=1), max_streams=1) as streams:
        await streams.open("a")
        with pytest.raises(StorageFullError):
            await streams.open("b")
        await streams.delete("a")
        await streams.open("b")


async def test_a_full_storage_is_swept_when_it_refuses_and_once_a_second_at_most(
    streams: StreamManager, storage: FaultyStorage
) -> None:
    storage.refuse("commit", error=StorageFullError("full"))
    await streams.open("a")
    swept = storage.calls["scan"]
    for _ in range(3):
        storage.refuse("commit", times=2, error=StorageFullError("full"))
        with pytest.raises(StorageFullError):
            await streams.open("b")
    assert storage.calls["scan"] == swept
    await anyio.sleep(1)
    storage.refuse("commit", error=StorageFullError("full"))
    await streams.open("c")
    assert storage.calls["scan"] > swept


async def test_a_damaged_stream_is_told(streams: StreamManager, storage: FaultyStorage) -> None:
    await storage.commit("s", None, Head(1, 0, b"?", math.inf))
    with pytest.raises(StorageCorruptError):
        await streams.info("s")
