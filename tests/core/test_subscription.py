from collections.abc import Callable
from datetime import timedelta
from typing import Any

import anyio
import msgspec
import pydantic
import pytest
from anyio import wait_all_tasks_blocked

from streamkeep import (
    InvalidArgumentError,
    OffsetOutOfRangeError,
    StorageCorruptError,
    StorageError,
    StreamEventType,
    StreamManager,
    StreamManagerClosedError,
    StreamNotFoundError,
    StreamTimeoutError,
    Subscription,
)
from streamkeep._feed import SHARED_BYTES, SHARED_RECORDS, Feed
from streamkeep.storage import Head
from streamkeep.testing.faults import FaultyStorage
from tests.core.helpers import Process, core_of, frames, resumed, running_of

Clock = Callable[[], float]


async def fill(streams: StreamManager, count: int, stream: str = "s") -> None:
    async with streams.open(stream) as writer:
        for number in range(count):
            writer.write_soon(number)
        await writer.done("end")


async def offsets(streams: StreamManager, after: int | None = None, stream: str = "s") -> list[int]:
    async with streams.subscribe(stream, after) as events:
        return [event.offset async for event in events]


def feed_of(streams: StreamManager) -> Feed:
    """Give the feed of the one stream that is followed."""
    (feed,) = running_of(streams).feeds._feeds.values()
    return feed


# Replay


@pytest.mark.parametrize("count", [0, 1, 99, 100, 511, 512, 513, 2_000])
@pytest.mark.promise("P8")
async def test_a_completed_stream_is_replayed_whole(streams: StreamManager, count: int) -> None:
    await fill(streams, count)

    assert await offsets(streams) == [*range(count + 1)]


@pytest.mark.promise("P8")
async def test_after_is_the_last_offset_that_was_seen(streams: StreamManager) -> None:
    await fill(streams, 600)

    for after in (0, 1, 510, 511, 512, 599):
        assert await offsets(streams, after) == [*range(after + 1, 601)]
    assert await offsets(streams, 600) == []


@pytest.mark.parametrize("ended", [False, True])
@pytest.mark.parametrize("after", [2, 3, 2**53 - 1])
@pytest.mark.promise("P8")
async def test_an_offset_that_the_stream_has_not_reached_is_out_of_range(
    streams: StreamManager, after: int, ended: bool
) -> None:
    stream = await streams.open("s")
    await stream.write("a")
    await (stream.done() if ended else stream.write("b"))

    with pytest.raises(OffsetOutOfRangeError):
        async with streams.subscribe("s", after=after):
            pytest.fail("entered")


@pytest.mark.parametrize("after", [-1, 2**53, True, "1", 1.0])
@pytest.mark.promise("P8")
async def test_an_offset_is_a_whole_number(streams: StreamManager, after: Any) -> None:
    with pytest.raises(InvalidArgumentError):
        streams.subscribe("s", after=after)


@pytest.mark.promise("P8")
async def test_an_unknown_stream_is_not_found(streams: StreamManager) -> None:
    with pytest.raises(StreamNotFoundError):
        async with streams.subscribe("s"):
            pytest.fail("entered")


async def test_a_batch_is_what_is_at_hand(streams: StreamManager) -> None:
    await fill(streams, 600)
    async with streams.subscribe("s") as events:
        first = await anext(events)
        lengths = [len(await events.batch()) for _ in range(3)]

    assert (first.offset, lengths) == (0, [511, 89, 0])


class Token(msgspec.Struct):
    text: str


class Answer(pydantic.BaseModel):
    text: str


async def test_events_are_read_as_what_is_asked_for(streams: StreamManager) -> None:
    async with streams.open("s") as stream:
        await stream.write(Token("hi"))
        await stream.done(Answer(text="hi"))

    async with streams.subscribe("s", chunk_type=Token, output_type=Answer) as events:
        assert (await anext(events)).chunk == Token("hi")
        assert (await anext(events)).output == Answer(text="hi")


async def test_a_foreign_record_is_told(streams: StreamManager, storage: FaultyStorage) -> None:
    stream = await streams.open("s")
    await stream.write("a")
    page = await storage.read("s")
    assert page is not None
    head = page.head
    await storage.commit("s", head.version, Head(head.version + 1, 2, head.state, head.expires_at), [b"?"])

    with pytest.raises(StorageCorruptError, match="offset 1"):
        await offsets(streams)


# Tail


async def collect(events: Subscription[Any], into: list[int], ready: anyio.Event | None = None) -> None:
    async for event in events:
        into.append(event.offset)
        if ready is not None:
            ready.set()


@pytest.mark.promise("P8")
async def test_replay_and_tail_are_one_sequence(streams: StreamManager, elsewhere: StreamManager) -> None:
    stream = await streams.open("s")
    await stream.write("stored")
    seen: list[int] = []
    ready = anyio.Event()

    async with elsewhere.subscribe("s") as events, anyio.create_task_group() as tasks:
        tasks.start_soon(collect, events, seen, ready)
        await ready.wait()
        for number in range(2_000):
            stream.write_soon(number)
        await stream.done()

    assert seen == [*range(2_002)]


@pytest.mark.promise("P8")
async def test_a_chunk_that_is_written_while_the_feed_reads_is_not_missed(
    streams: StreamManager, storage: FaultyStorage
) -> None:
    stream = await streams.open("s")
    await anyio.sleep(1)
    async with streams.subscribe("s") as events:
        hold = storage.hold("read", after=True)
        await hold.reached.wait()
        await stream.write("a")
        hold.release()

        with anyio.fail_after(1):
            assert (await anext(events)).chunk == "a"


@pytest.mark.promise("P8")
async def test_a_chunk_that_is_written_while_the_feed_begins_to_watch_is_not_missed(
    streams: StreamManager, storage: FaultyStorage
) -> None:
    stream = await streams.open("s")
    await anyio.sleep(1)
    hold = storage.hold("watch")
    async with streams.subscribe("s") as events:
        await hold.reached.wait()
        await stream.write("a")
        hold.release()

        with anyio.fail_after(1):
            assert (await anext(events)).chunk == "a"


@pytest.mark.promise("P8")
async def test_a_cancelled_wait_loses_nothing(streams: StreamManager) -> None:
    stream = await streams.open("s")
    async with streams.subscribe("s") as events:
        for number in range(10):
            with anyio.move_on_after(0.01) as scope:
                await anext(events)
            assert scope.cancelled_caught
            await stream.write(number)
            assert (await anext(events)).chunk == number


async def test_a_page_that_is_cancelled_while_it_is_read_is_read_again(streams: StreamManager, storage: FaultyStorage) -> None:
    await fill(streams, 600)
    async with streams.subscribe("s") as events:
        for _ in range(512):
            await anext(events)
        hold = storage.hold("read", after=True)
        with anyio.move_on_after(1):
            await anext(events)

        assert hold.reached.is_set()
        assert [event.offset async for event in events] == [*range(512, 601)]


async def test_unsubscribing_is_leaving_the_block(streams: StreamManager) -> None:
    stream = await streams.open("s")
    async with streams.subscribe("s") as events:
        await stream.write("a")
    await stream.write("b")

    assert [event async for event in events] == []
    assert running_of(streams).feeds._feeds == {}


@pytest.mark.promise("P11")
async def test_a_reader_is_told_when_nothing_came_for_so_long_and_may_go_on(streams: StreamManager, clock: Clock) -> None:
    stream = await streams.open("s")
    async with streams.subscribe("s", idle_timeout=timedelta(seconds=40)) as events:
        await stream.write("a")
        await anyio.sleep(60)
        await anext(events)
        began = clock()
        with pytest.raises(StreamTimeoutError, match="40"):
            await anext(events)
        assert clock() - began == 40
        await stream.write("b")

        assert (await anext(events)).chunk == "b"


@pytest.mark.promise("P9")
async def test_a_slow_subscriber_loses_nothing_and_its_memory_is_bounded(streams: StreamManager) -> None:
    stream = await streams.open("s")
    async with streams.subscribe("s") as slow, streams.subscribe("s") as fast:
        for number in range(5_000):
            await stream.write(number)
            assert (await anext(fast)).chunk == number
        assert len(feed_of(streams)._records) <= SHARED_RECORDS
        await stream.done()

        assert [event.offset async for event in slow] == [*range(5_001)]


@pytest.mark.promise("P9")
async def test_what_is_shared_is_bounded_in_bytes(streams: StreamManager) -> None:
    stream = await streams.open("s")
    async with streams.subscribe("s") as slow, streams.subscribe("s") as fast:
        for number in range(30):
            await stream.write(str(number) * 100_000)
            await anext(fast)
        feed = feed_of(streams)
        assert sum(map(len, feed._records)) == feed._bytes <= SHARED_BYTES
        await stream.done()

        assert [event.offset async for event in slow] == [*range(31)]


async def test_a_chunk_that_is_bigger_than_what_is_shared_reaches_all(streams: StreamManager) -> None:
    stream = await streams.open("s")
    async with streams.subscribe("s") as one, streams.subscribe("s") as two:
        for _ in range(2):
            await stream.write("x" * 2 * SHARED_BYTES)
            for events in (one, two):
                assert len((await anext(events)).chunk) == 2 * SHARED_BYTES
        assert len(feed_of(streams)._records) == 1


@pytest.mark.promise("P9", "P10")
async def test_a_thousand_subscribers_of_which_one_sleeps_cost_one_read_a_change(
    streams: StreamManager, storage: FaultyStorage
) -> None:
    stream = await streams.open("s")
    seen: list[list[int]] = [[] for _ in range(1_000)]
    awake = anyio.Event()

    async def follow(mine: list[int], sleeps: bool) -> None:
        async with streams.subscribe("s") as events:
            async for event in events:
                mine.append(event.offset)
                if sleeps and event.offset == 0:
                    await awake.wait()

    async with anyio.create_task_group() as tasks:
        for number, mine in enumerate(seen):
            tasks.start_soon(follow, mine, number == 0)
        await wait_all_tasks_blocked()
        storage.calls.clear()
        for number in range(20):
            await stream.write(number)
            await wait_all_tasks_blocked()
        assert [len(mine) for mine in seen] == [1] + [20] * 999
        assert storage.calls["read"] <= 20
        awake.set()
        await stream.done()

    assert seen == [[*range(21)]] * 1_000


async def test_who_is_ahead_of_the_feed_waits_for_what_is_new(streams: StreamManager, storage: FaultyStorage) -> None:
    stream = await streams.open("s")
    await anyio.sleep(1)
    async with streams.subscribe("s") as first:
        await wait_all_tasks_blocked()
        hold = storage.hold("read", after=True)
        await stream.write("a")
        await hold.reached.wait()
        await stream.write("b")
        async with streams.subscribe("s") as second:
            seen = [(await anext(second)).offset, (await anext(second)).offset]
            await stream.write("c")
            hold.release()
            seen.append((await anext(second)).offset)
        assert [(await anext(first)).offset for _ in range(3)] == seen == [0, 1, 2]


async def test_who_saw_all_but_the_end_while_the_feed_was_over_gets_the_end(
    streams: StreamManager, storage: FaultyStorage
) -> None:
    stream = await streams.open("s")
    await stream.write("a")
    await anyio.sleep(1)
    seen: list[int] = []
    async with streams.subscribe("s"), anyio.create_task_group() as tasks:
        await wait_all_tasks_blocked()
        hold = storage.hold("read", after=True)
        late = streams.subscribe("s", after=0)

        async def follow() -> None:
            async with late:
                await collect(late, seen)

        tasks.start_soon(follow)
        await hold.reached.wait()
        await stream.done()
        await wait_all_tasks_blocked()
        hold.release()

    assert seen == [1]


# What goes wrong meanwhile


@pytest.mark.promise("P14")
async def test_a_waiting_subscriber_of_a_closed_manager_is_told(streams: StreamManager) -> None:
    await streams.open("s")
    async with streams.subscribe("s") as events, anyio.create_task_group() as tasks:

        async def wait() -> None:
            with pytest.raises(StreamManagerClosedError):
                await anext(events)

        tasks.start_soon(wait)
        await wait_all_tasks_blocked()
        await streams.aclose()


@pytest.mark.parametrize("is_behind", [False, True])
@pytest.mark.parametrize("is_anew", [False, True])
async def test_a_subscriber_of_a_deleted_stream_is_told(
    streams: StreamManager, elsewhere: StreamManager, is_behind: bool, is_anew: bool
) -> None:
    stream = await streams.open("s")
    for number in range(600):
        await stream.write(number)
    async with streams.subscribe("s", after=None if is_behind else 598) as events:
        await anext(events)
        await anyio.sleep(1)
        await elsewhere.delete("s")
        if is_anew:
            await fill(elsewhere, 700)

        with pytest.raises(StreamNotFoundError):
            async for _ in events:
                pass


async def test_a_reader_of_a_completed_stream_that_is_deleted_meanwhile_is_told(streams: StreamManager) -> None:
    await fill(streams, 600)
    async with streams.subscribe("s") as events:
        await streams.delete("s")

        with pytest.raises(StreamNotFoundError):
            async for _ in events:
                pass


async def test_a_new_subscriber_of_a_stream_that_was_created_anew_follows_the_new_one(
    streams: StreamManager, elsewhere: StreamManager, storage: FaultyStorage
) -> None:
    await streams.open("s")
    await anyio.sleep(1)
    async with streams.subscribe("s") as old:
        hold = storage.hold("read")
        await hold.reached.wait()
        await elsewhere.delete("s")
        successor = await elsewhere.open("s")
        await successor.write("new")
        async with streams.subscribe("s") as new:
            hold.release()
            assert (await anext(new)).chunk == "new"
            await successor.write("newer")
            assert (await anext(new)).chunk == "newer"
            with pytest.raises(StreamNotFoundError):
                await anext(old)


async def test_the_follower_of_a_stream_that_was_created_anew_is_told_when_the_manager_closes(
    streams: StreamManager, elsewhere: StreamManager, storage: FaultyStorage
) -> None:
    await streams.open("s")
    await anyio.sleep(1)
    async with streams.subscribe("s") as old, anyio.create_task_group() as tasks:
        hold = storage.hold("read")
        await hold.reached.wait()
        await elsewhere.delete("s")
        await elsewhere.open("s")

        async def wait() -> None:
            with pytest.raises(StreamManagerClosedError):
                await anext(old)

        tasks.start_soon(wait)
        async with streams.subscribe("s"):
            await wait_all_tasks_blocked()
            await streams.aclose()


@pytest.mark.parametrize("operation", ["read", "watch"])
async def test_a_failing_storage_is_told_to_those_who_follow_and_who_subscribes_again_goes_on(
    streams: StreamManager, storage: FaultyStorage, operation: Any
) -> None:
    stream = await streams.open("s")
    await stream.write("a")
    await anyio.sleep(1)
    async with streams.subscribe("s") as events:
        storage.refuse(operation)
        await anext(events)
        for _ in range(2):
            with pytest.raises(StorageError):
                await anext(events)
        async with streams.subscribe("s", after=0) as again:
            await stream.done()
            assert (await anext(again)).type is StreamEventType.DONE


async def test_a_subscription_that_was_not_entered_says_so(streams: StreamManager) -> None:
    with pytest.raises(AssertionError, match="async with"):
        await anext(streams.subscribe("s"))


async def test_a_reader_waits_as_long_as_the_writer_lives(streams: StreamManager, elsewhere: StreamManager) -> None:
    stream = await streams.open("s")
    async with elsewhere.subscribe("s") as events:
        await anyio.sleep(600)
        await stream.done()

        assert (await anext(events)).type is StreamEventType.DONE
