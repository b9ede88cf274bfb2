from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import anyio
import msgspec
import pydantic
import pytest
from anyio import wait_all_tasks_blocked
from tests.core.helpers import BackupStorage, Process, frames, resumed, running_of

from streamkeep import (
    InvalidArgumentError,
    OffsetOutOfRangeError,
    StorageCorruptError,
    StorageError,
    StreamEventType,
    StreamkeepError,
    StreamManager,
    StreamManagerClosedError,
    StreamNotFoundError,
    StreamTimeoutError,
    Subscription,
)
from streamkeep._feed import SHARED_BYTES, SHARED_RECORDS, Feed
from streamkeep.storage import Head, Page
from streamkeep.storages.memory import MemoryStorage
from streamkeep.testing.faults import FaultyStorage

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
async def test_who_does_not_follow_reads_no_further_than_what_was_stored_at_the_beginning(streams: StreamManager) -> None:
    stream = await streams.open("s")
    for number in range(700):
        stream.write_soon(number)
    await stream.flush()

    async with streams.subscribe("s", follow=False) as events:
        assert (await anext(events)).offset == 0
        for number in range(700, 2_000):
            stream.write_soon(number)
        await stream.done()

        assert [event.offset async for event in events] == [*range(1, 700)]


class Meanwhile(FaultyStorage):
    """Does something between a read of a head alone and its answer."""

    then: Callable[[], Awaitable[object]] | None = None

    async def read(self, stream: str, start: int = 0, limit: int = 0) -> Page | None:
        page = await super().read(stream, start, limit)
        if limit == 0 and (then := self.then) is not None:
            self.then = None
            await then()
        return page


@pytest.fixture
async def meanwhile(memory: MemoryStorage, elsewhere: StreamManager) -> AsyncIterator[tuple[Meanwhile, StreamManager]]:
    storage = Meanwhile(memory)
    async with StreamManager(storage) as streams:
        await fill(elsewhere, 9)
        yield storage, streams


async def test_the_last_of_a_stream_that_is_made_anew_meanwhile_are_those_of_the_new_one(
    meanwhile: tuple[Meanwhile, StreamManager], elsewhere: StreamManager
) -> None:
    async def make_anew() -> None:
        await elsewhere.delete("s")
        await fill(elsewhere, 4)

    storage, streams = meanwhile
    storage.then = make_anew
    async with streams.subscribe("s", last=2) as events:
        assert [event.offset async for event in events] == [3, 4]


async def test_the_last_of_a_stream_that_is_deleted_are_not_found(
    meanwhile: tuple[Meanwhile, StreamManager], elsewhere: StreamManager
) -> None:
    storage, streams = meanwhile
    storage.then = lambda: elsewhere.delete("s")
    for _ in range(2):
        with pytest.raises(StreamNotFoundError):
            await streams.subscribe("s", last=2).__aenter__()


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


async def test_an_adapter_reads_what_is_no_class(streams: StreamManager) -> None:
    class Deed(pydantic.BaseModel):
        deed: str

    adapter = pydantic.TypeAdapter[Deed | Answer](Deed | Answer)
    async with streams.open("s") as stream:
        await stream.write({"deed": "cut"})
        await stream.write({"text": "hi"})
        await stream.done({"text": "bye"})

    async with streams.subscribe("s", chunk_type=adapter, output_type=adapter) as events:
        assert [(await anext(events)).chunk for _ in range(2)] == [Deed(deed="cut"), Answer(text="hi")]
        assert (await anext(events)).output == Answer(text="bye")


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
    streams: StreamManager, elsewhere: StreamManager, storage: FaultyStorage
) -> None:
    stream = await elsewhere.open("s")
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
        await wait_all_tasks_blocked()  # the manager reads as well, for its session
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


@pytest.mark.promise("P8")
async def test_who_has_read_alone_what_the_feed_has_not_read_yet_waits_for_it_and_for_more(
    streams: StreamManager, elsewhere: StreamManager, storage: FaultyStorage
) -> None:
    stream = await elsewhere.open("s")
    async with streams.subscribe("s") as first, anyio.create_task_group() as tasks:
        await wait_all_tasks_blocked()
        hold = storage.hold("read", after=True)
        await stream.write("a")
        await hold.reached.wait()  # the feed's, which has no more than that
        for chunk in ("b", "c"):
            await stream.write(chunk)
        async with streams.subscribe("s") as second:
            seen = [(await anext(second)).offset for _ in range(3)]
            tasks.start_soon(collect, second, seen)
            await wait_all_tasks_blocked()
            assert seen == [0, 1, 2]
            assert feed_of(streams).tail == 0
            hold.release()
            await wait_all_tasks_blocked()
            await stream.done()
            assert [event.offset async for event in first] == [0, 1, 2, 3]
            await wait_all_tasks_blocked()
    assert seen == [0, 1, 2, 3]


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


async def test_the_follower_of_a_stream_that_was_created_anew_is_told_when_somebody_follows_the_new_one(
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
            with pytest.raises(StreamNotFoundError):
                await anext(old)

        tasks.start_soon(wait)
        async with streams.subscribe("s"):
            await wait_all_tasks_blocked()
            hold.release()
            await wait_all_tasks_blocked()


async def test_a_late_answer_about_an_earlier_stream_ends_nothing_for_those_who_follow_the_new_one(
    streams: StreamManager, elsewhere: StreamManager, storage: FaultyStorage
) -> None:
    """It may look like the newer one, where a clock went back between them."""
    storage.ahead_seconds = 3600
    await streams.open("s")
    await anyio.sleep(1)
    late = storage.hold("read", after=True)

    async def read_the_old_one() -> None:
        with pytest.raises(StreamNotFoundError):
            async with streams.subscribe("s") as old:
                await anext(old)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(read_the_old_one)
        await late.reached.wait()
        await elsewhere.delete("s")
        storage.ahead_seconds = 0
        new = await elsewhere.open("s")
        async with streams.subscribe("s") as events:
            await wait_all_tasks_blocked()
            late.release()
            await wait_all_tasks_blocked()
            await new.write("new")
            assert (await anext(events)).chunk == "new"


@pytest.mark.parametrize("operation", ["read", "watch"])
async def test_a_failing_storage_is_told_to_those_who_follow_and_who_subscribes_again_goes_on(
    streams: StreamManager, elsewhere: StreamManager, storage: FaultyStorage, operation: Any
) -> None:
    stream = await elsewhere.open("s")
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
    with pytest.raises(RuntimeError, match="async with"):
        await anext(streams.subscribe("s"))


async def test_a_reader_waits_as_long_as_the_writer_lives(streams: StreamManager, elsewhere: StreamManager) -> None:
    stream = await streams.open("s")
    async with elsewhere.subscribe("s") as events:
        await anyio.sleep(600)
        await stream.done()

        assert (await anext(events)).type is StreamEventType.DONE


# The price of a failure


async def follow_and_tell(streams: StreamManager, stream: str, told: list[BaseException]) -> None:
    async with streams.subscribe(stream) as events:
        await tell(events, told)


async def tell(events: Subscription[Any], told: list[BaseException]) -> None:
    try:
        await anext(events)
    except StreamkeepError as error:
        told.append(error)


def tracebacks(logs: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in logs.records if record.exc_info]


@pytest.mark.promise("P17", "P18")
async def test_a_read_that_fails_gives_each_follower_a_small_exception_of_its_own_and_the_log_one_traceback(
    streams: StreamManager, elsewhere: StreamManager, storage: FaultyStorage, quiet_logs: pytest.LogCaptureFixture
) -> None:
    stream = await elsewhere.open("s")
    told: list[BaseException] = []
    async with anyio.create_task_group() as tasks:
        for _ in range(400):
            tasks.start_soon(follow_and_tell, streams, "s", told)
        await wait_all_tasks_blocked()
        storage.refuse("read", error=StorageError("the disk is on fire"))
        await stream.write("a")

    assert {type(error) for error in told} == {StorageError}
    assert len(set(map(id, told))) == 400
    assert max(map(frames, told)) < 15
    assert len(tracebacks(quiet_logs)) == len(quiet_logs.records) == 1
    assert quiet_logs.text.count("the disk is on fire") < 10


@pytest.mark.promise("P18")
async def test_deleting_a_stream_gives_each_follower_a_small_exception_of_its_own_and_logs_nothing(
    streams: StreamManager, quiet_logs: pytest.LogCaptureFixture
) -> None:
    stream = await streams.open("s")
    told: list[BaseException] = []
    async with anyio.create_task_group() as tasks:
        for _ in range(400):
            tasks.start_soon(follow_and_tell, streams, "s", told)
        await wait_all_tasks_blocked()
        await streams.delete("s")

    assert {type(error) for error in told} == {StreamNotFoundError}
    assert len(set(map(id, told))) == 400
    assert max(map(frames, told)) < 15
    assert not quiet_logs.records
    assert stream.cancelled.is_set()


@pytest.mark.promise("P18")
async def test_a_storage_that_fails_for_six_hundred_streams_at_once_is_logged_once(
    streams: StreamManager, elsewhere: StreamManager, storage: FaultyStorage, quiet_logs: pytest.LogCaptureFixture
) -> None:
    told: list[BaseException] = []
    writers = [await elsewhere.open(f"s{number}") for number in range(600)]
    async with anyio.create_task_group() as tasks:
        for writer in writers:
            tasks.start_soon(follow_and_tell, streams, writer.id, told)
        await wait_all_tasks_blocked()
        storage.refuse("read", times=600, error=StorageError("it is away"))
        for writer in writers:
            await writer.write("a")

    assert len(told) == 600
    assert len(tracebacks(quiet_logs)) == 1


async def test_a_failure_of_another_kind_or_a_second_later_is_logged_again(
    streams: StreamManager, elsewhere: StreamManager, storage: FaultyStorage, quiet_logs: pytest.LogCaptureFixture
) -> None:
    stream = await elsewhere.open("s")
    told: list[BaseException] = []
    for sentence in ("one", "two", "two"):
        after = stream.tail - 1 if stream.tail else None
        async with streams.subscribe("s", after) as events, anyio.create_task_group() as tasks:
            tasks.start_soon(tell, events, told)
            await wait_all_tasks_blocked()
            storage.refuse("read", error=StorageError(sentence))
            await stream.write("a")
        await anyio.sleep(1)

    assert [str(error) for error in told] == ["one", "two", "two"]
    assert len(tracebacks(quiet_logs)) == 3


# A storage that went back


@dataclass
class Backup:
    """Managers over a storage that can go back."""

    storage: BackupStorage
    here: StreamManager
    elsewhere: StreamManager


@pytest.fixture
async def backup(clock: Clock) -> AsyncIterator[Backup]:
    storage = BackupStorage(clock=clock)
    async with StreamManager(storage) as here, StreamManager(storage) as elsewhere:
        yield Backup(storage, here, elsewhere)


async def released(backup: Backup, chunks: int) -> None:
    """Make a stream that nobody writes to, and a backup of it."""
    async with backup.elsewhere.open("s") as stream:
        for number in range(chunks):
            await stream.write(number)
    backup.storage.back_up()


async def written_on(backup: Backup, chunks: int) -> None:
    async with backup.elsewhere.open("s", resume=True) as stream:
        for number in range(chunks):
            await stream.write(f"more {number}")


@pytest.mark.parametrize("then", ["a shorter log", "a longer log", "cancelled", "cancelled at the same length", "done"])
@pytest.mark.promise("P19")
async def test_followers_of_a_stream_whose_storage_went_back_are_told_at_the_next_change(backup: Backup, then: str) -> None:
    await released(backup, 10)
    await written_on(backup, 1 if then == "cancelled at the same length" else 5)
    reached = (await backup.here.info("s")).tail
    async with backup.here.subscribe("s") as events:
        for _ in range(reached):
            await anext(events)
        await wait_all_tasks_blocked()
        backup.storage.go_back()
        match then:
            case "a shorter log":
                await written_on(backup, 1)
            case "a longer log":
                await written_on(backup, 50)
            case "done":
                await (await backup.elsewhere.open("s", resume=True)).done()
            case _:
                await backup.elsewhere.cancel("s")

        with anyio.fail_after(1), pytest.raises(OffsetOutOfRangeError, match="has lost"):
            await anext(events)


@pytest.mark.promise("P19")
async def test_a_reader_of_pages_is_told_as_well_that_the_storage_went_back(backup: Backup) -> None:
    await released(backup, 600)
    async with backup.elsewhere.open("s", resume=True) as stream:
        for number in range(1_000):
            stream.write_soon(number)
        await stream.done()
    async with backup.here.subscribe("s") as events:
        for _ in range(700):
            await anext(events)
        backup.storage.go_back()
        async with backup.elsewhere.open("s", resume=True) as stream:
            for number in range(2_000):
                stream.write_soon(-number)
            await stream.done()

        with pytest.raises(OffsetOutOfRangeError):
            async for event in events:
                assert event.offset < 1_024  # what its page holds


@pytest.mark.promise("P19")
async def test_who_does_not_follow_and_had_not_read_what_was_lost_ends_where_the_stream_does_now(backup: Backup) -> None:
    await released(backup, 600)
    await written_on(backup, 700)
    async with backup.here.subscribe("s", follow=False) as events:
        for number in range(512):  # a page
            assert (await anext(events)).chunk == number
        backup.storage.go_back()

        assert [event.offset async for event in events] == [*range(512, 600)]


@pytest.mark.promise("P19")
async def test_a_reader_who_had_not_read_what_was_lost_goes_on(backup: Backup) -> None:
    await released(backup, 600)
    await written_on(backup, 5)
    async with backup.here.subscribe("s") as events:
        for number in range(512):  # a page
            assert (await anext(events)).chunk == number
        backup.storage.go_back()
        async with backup.elsewhere.open("s", resume=True) as stream:
            await stream.write("instead")
            await stream.done("end")

        assert [event.data async for event in events] == [
            *(b"%d" % number for number in range(512, 600)),
            b'"instead"',
            b'"end"',
        ]


@pytest.mark.promise("P19")
async def test_a_reader_of_pages_never_takes_what_was_lost_from_what_is_shared(backup: Backup, clock: Clock) -> None:
    """What is shared is still of the history that was lost; a reader behind it has read on in the new one."""
    await released(backup, 0)
    async with backup.elsewhere.open("s", resume=True) as stream, backup.here.subscribe("s") as fast:
        slow = backup.here.subscribe("s")
        async with slow:
            for _ in range(20):
                await stream.write("lost " + "x" * 300_000)
                await anext(fast)
            await wait_all_tasks_blocked()
            assert 0 < feed_of(backup.here).base < 20
            backup.storage.go_back()
            backup.storage._doorbells = type(backup.storage._doorbells)()  # the feed does not know yet
            async with backup.elsewhere.open("s", resume=True) as other:
                for _ in range(40):
                    await other.write("new " + "x" * 200_000)
            kinds: list[str] = []
            with pytest.raises(OffsetOutOfRangeError):
                while True:
                    kinds += [event.chunk.split()[0] for event in await slow.batch()]
        await stream.close()

    assert set(kinds) == {"new"}


@pytest.mark.promise("P19")
async def test_a_reader_of_an_ended_stream_whose_storage_went_back_to_before_its_end_follows_it(backup: Backup) -> None:
    await released(backup, 512)  # a page
    async with backup.elsewhere.open("s", resume=True) as stream:
        await stream.write("lost")
        await stream.done()
    async with backup.here.subscribe("s") as events:
        for _ in range(512):
            await anext(events)
        backup.storage.go_back()
        async with anyio.create_task_group() as tasks:

            async def cancel() -> None:
                await wait_all_tasks_blocked()
                await backup.elsewhere.cancel("s")

            tasks.start_soon(cancel)
            with anyio.fail_after(1):
                last = await anext(events)

    assert (last.offset, last.error.status) == (512, "CANCELLED")


@pytest.mark.promise("P19")
async def test_a_reader_whose_page_was_of_another_history_than_what_is_shared_is_told(backup: Backup) -> None:
    """The storage went back while the page was on its way: what is shared has ended before where the reader is."""
    await released(backup, 3)
    short = backup.storage._backup
    await written_on(backup, 12)
    backup.storage.back_up()
    long = backup.storage._backup
    backup.storage._backup = short
    backup.storage.go_back()
    async with backup.here.subscribe("s") as slow:
        await anyio.sleep(1)
        await backup.elsewhere.cancel("s")
        await wait_all_tasks_blocked()
        assert feed_of(backup.here).is_complete
        backup.storage._backup = long
        backup.storage.go_back()

        async with backup.here.subscribe("s", 14) as ahead:
            with anyio.fail_after(1), pytest.raises(OffsetOutOfRangeError):
                await anext(ahead)

        assert [event.offset async for event in slow] == [0, 1, 2, 3]


@pytest.mark.parametrize("lost", ["chunks", "the end"])
@pytest.mark.promise("P19")
async def test_who_comes_when_the_storage_has_gone_back_goes_on_whatever_others_have_read(backup: Backup, lost: str) -> None:
    """Nothing has changed since then: what is shared is still of the history that was lost."""
    await released(backup, 3)
    async with backup.here.subscribe("s") as before, anyio.create_task_group() as tasks:
        for _ in range(3):
            await anext(before)
        tasks.start_soon(anext, before)
        await wait_all_tasks_blocked()
        if lost == "chunks":
            await written_on(backup, 2)
        else:
            await (await backup.elsewhere.open("s", resume=True)).done()
        await wait_all_tasks_blocked()
        assert feed_of(backup.here).base == 3
        assert feed_of(backup.here).tail > 3
        feed_of(backup.here)._drop_all()  # as when all who follow have it
        backup.storage.go_back()
        async with backup.here.subscribe("s") as events:
            for _ in range(3):
                await anext(events)
            tasks.start_soon(backup.elsewhere.cancel, "s")
            with anyio.fail_after(1):
                last = await anext(events)

    assert (last.offset, last.error.status) == (3, "CANCELLED")


# Damaged logs


async def damage(storage: MemoryStorage, stream: str, kept: int) -> None:
    """Let the last records be missing behind the head."""
    del storage._streams[stream].records[kept:]


@pytest.mark.parametrize("is_open", [False, True])
@pytest.mark.promise("P17")
async def test_records_that_are_missing_behind_a_head_are_told_in_a_few_reads(
    streams: StreamManager, storage: FaultyStorage, memory: MemoryStorage, is_open: bool
) -> None:
    stream = await streams.open("s")
    for number in range(10):
        await stream.write(number)
    if not is_open:
        await stream.done()
    await damage(memory, "s", 5)
    storage.calls.clear()
    seen: list[int] = []

    async with streams.subscribe("s") as events:
        with pytest.raises(StorageCorruptError, match="offset 5"):
            await collect(events, seen)

    assert seen == [*range(5)]
    assert storage.calls["read"] < 5


@pytest.mark.parametrize("last", [0, 1])
async def test_records_that_are_left_behind_an_end_are_not_given(
    streams: StreamManager, memory: MemoryStorage, last: int
) -> None:
    stream = await streams.open("s")
    await stream.write(0)
    await stream.write(1)
    memory._streams["s"].records.append(b"c2")
    async with streams.subscribe("s", last=last, follow=False) as events:
        assert [event.offset async for event in events] == [1] * last
        assert await events.batch() == []


@pytest.mark.promise("P17")
async def test_a_head_that_cannot_be_read_is_told_to_its_followers_and_to_nobody_else(
    streams: StreamManager, storage: FaultyStorage
) -> None:
    stream, other = await streams.open("s"), await streams.open("other")
    async with streams.subscribe("s") as events, streams.subscribe("other") as others:
        page = await storage.read("s")
        assert page is not None
        await storage.commit("s", page.head.version, Head(page.head.version + 1, 0, b'{"new":1}', page.head.expires_at))
        with pytest.raises(StorageCorruptError, match="newer version"):
            await anext(events)
        await other.write("a")
        assert (await anext(others)).chunk == "a"

    with pytest.raises(StorageCorruptError):
        await stream.write("a")


# What is shared


@pytest.mark.promise("P9")
async def test_what_everybody_has_read_is_not_kept(streams: StreamManager) -> None:
    stream = await streams.open("s")
    async with streams.subscribe("s") as one, streams.subscribe("s") as two, anyio.create_task_group() as tasks:
        seen: list[int] = []
        for events in (one, two):
            tasks.start_soon(collect, events, seen)
        for _ in range(100):
            await stream.write("x" * 1_000)
            await wait_all_tasks_blocked()
            assert feed_of(streams)._records == []
        await stream.done()

    assert sorted(seen) == sorted([*range(101)] * 2)


# A writer that dies


@pytest.mark.promise("P6")
async def test_a_reader_of_a_killed_processs_stream_is_told_after_lease_and_grace_and_not_before(
    streams: StreamManager, mortal: Process, clock: Clock
) -> None:
    stream = await mortal.streams.open("s")
    await stream.write("a")
    async with streams.subscribe("s") as events:
        await anext(events)
        await anyio.sleep(100)
        mortal.die()
        died = clock()
        event = await anext(events)

    assert event.error.status == "ABORTED"
    assert clock() - died + 10 / 3 >= 15  # its last sign of life was up to a third of its lease ago
    assert clock() - died <= 15 + 2 * 2 + 1


@pytest.mark.promise("P6")
async def test_readers_of_one_dead_session_share_its_observation(
    streams: StreamManager, mortal: Process, storage: FaultyStorage
) -> None:
    writers = [await mortal.streams.open(f"s{number}") for number in range(50)]
    mortal.die()
    ends: list[str] = []

    async def follow(stream: str) -> None:
        async with streams.subscribe(stream) as events:
            ends.extend([event.error.status async for event in events])

    storage.calls.clear()
    async with anyio.create_task_group() as tasks:
        for writer in writers:
            tasks.start_soon(follow, writer.id)
        await wait_all_tasks_blocked()
        storage.calls.clear()
        await anyio.sleep(13)
        assert storage.calls["read"] <= 8

    assert ends == ["ABORTED"] * 50


@pytest.mark.promise("P6")
async def test_a_successor_keeps_a_stream_from_being_aborted(
    streams: StreamManager, mortal: Process, elsewhere: StreamManager
) -> None:
    await mortal.streams.open("s")
    mortal.die()
    successor = await resumed(streams, "s")
    async with elsewhere.subscribe("s") as events:
        await anyio.sleep(60)
        await successor.done("mine")

        assert (await anext(events)).output == "mine"


async def test_a_subscription_says_which_life_of_an_id_it_reads(streams: StreamManager) -> None:
    lives: list[str] = []
    for _ in range(2):
        async with streams.open("s") as stream:
            await stream.done()
        subscription = streams.subscribe("s")
        for name in ("life", "first_offset", "updated_at"):
            with pytest.raises(RuntimeError, match="enter the subscription"):
                getattr(subscription, name)
        async with subscription:
            lives.append(subscription.life)
        assert (await streams.info("s")).life == lives[-1]
        await streams.delete("s")
    assert lives[0] != lives[1]
