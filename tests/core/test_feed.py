"""What a manager's own writer stores goes straight to those who follow it here; all else is read."""

import asyncio
import tracemalloc
from collections.abc import Callable
from datetime import timedelta
from unittest.mock import AsyncMock

import anyio
import msgspec
import pytest
from anyio.lowlevel import checkpoint
from tests.core.helpers import BackupStorage, core_of, running_of
from trio.testing import wait_all_tasks_blocked

from streamkeep import (
    OffsetOutOfRangeError,
    StorageCorruptError,
    StorageError,
    StreamEventType,
    StreamInput,
    StreamManager,
    StreamNotFoundError,
    StreamTimeoutError,
    _feed,
)
from streamkeep._feed import (
    KEPT_BYTES,
    KEPT_SECONDS,
    PAGE_RECORDS,
    PER_EPOCH_BYTES,
    PER_PAGE_BYTES,
    PER_RECORD_BYTES,
    Feed,
    Records,
)
from streamkeep._lifecycle import Epoch, Life, State
from streamkeep._outbox import QUIET_SECONDS
from streamkeep.http import SSEFraming
from streamkeep.storages.memory import MemoryStorage
from streamkeep.testing.faults import FaultyStorage

pytestmark = pytest.mark.anyio


async def opened(streams: StreamManager, id: str = "s") -> StreamInput:
    """Open a stream, and wait until the manager's session has begun as well, which reads and commits too."""
    stream = await streams.open(id)
    await wait_all_tasks_blocked()
    return stream


async def test_what_is_written_here_is_neither_listened_for_nor_read(streams: StreamManager, storage: FaultyStorage) -> None:
    stream = await opened(streams)
    async with streams.subscribe("s") as first, streams.subscribe("s") as second:
        await wait_all_tasks_blocked()
        storage.calls.clear()
        for number in range(100):
            await stream.write(number)
            assert [(await anext(events)).chunk for events in (first, second)] == [number, number]
        await stream.done()
        assert [(await anext(events)).type for events in (first, second)] == [StreamEventType.DONE] * 2

    assert (storage.calls["commit"], storage.calls["read"], storage.calls["watch"]) == (101, 0, 0)


async def test_who_follows_when_the_writer_is_made_listens_no_longer(
    streams: StreamManager, elsewhere: StreamManager, storage: FaultyStorage
) -> None:
    async with elsewhere.open("s"):
        pass
    async with streams.subscribe("s") as events, await streams.open("s", resume=True) as stream:
        await wait_all_tasks_blocked()
        storage.calls.clear()
        await stream.write("a")
        assert (await anext(events)).chunk == "a"
        assert storage.calls["read"] == 0


async def test_a_writer_that_is_released_is_listened_for_again(streams: StreamManager, elsewhere: StreamManager) -> None:
    stream = await opened(streams)
    async with streams.subscribe("s") as events:
        await stream.write("here")
        await stream.close()
        async with await elsewhere.open("s", resume=True) as other:
            await other.write("there")
            assert [(await anext(events)).chunk for _ in range(2)] == ["here", "there"]
            await other.done()
        assert (await anext(events)).type is StreamEventType.DONE


@pytest.mark.parametrize("reads_late", [False, True])
async def test_a_writer_that_was_taken_over_elsewhere_is_followed_there(
    streams: StreamManager, elsewhere: StreamManager, clock: object, reads_late: bool
) -> None:
    stream = await opened(streams)
    async with streams.subscribe("s") as events:
        await stream.write("here")
        if not reads_late:
            assert (await anext(events)).chunk == "here"
        core_of(elsewhere).observer.silence_of = lambda session: (1e9, core_of(elsewhere).terms)  # type: ignore[method-assign]
        other = await elsewhere.open("s", resume=True)
        await other.write("there")
        with anyio.fail_after(1):
            if reads_late:
                assert (await anext(events)).chunk == "here"
            assert (await anext(events)).chunk == "there"
        assert stream.cancelled.is_set()


async def test_a_stream_that_is_cancelled_or_deleted_elsewhere_ends_here(
    streams: StreamManager, elsewhere: StreamManager
) -> None:
    for id in ("cancelled", "deleted"):
        await streams.open(id)
    async with streams.subscribe("cancelled") as cancelled, streams.subscribe("deleted") as deleted:
        await wait_all_tasks_blocked()
        await elsewhere.cancel("cancelled")
        await elsewhere.delete("deleted")
        with anyio.fail_after(1):
            assert (await anext(cancelled)).error.status == "CANCELLED"
            with pytest.raises(StreamNotFoundError):
                await anext(deleted)


async def test_a_commit_whose_answer_comes_when_it_was_read_already_is_given_once(
    streams: StreamManager, storage: FaultyStorage
) -> None:
    stream = await opened(streams)
    async with streams.subscribe("s") as early, anyio.create_task_group() as tasks:
        await wait_all_tasks_blocked()
        hold = storage.hold("commit", after=True)
        tasks.start_soon(stream.write, "a")
        await hold.reached.wait()
        core_of(streams)._tell_feeds("s")
        async with streams.subscribe("s") as late:  # reads it, and has the feed read
            assert (await anext(late)).chunk == "a"
            await wait_all_tasks_blocked()
            storage.calls.clear()
            hold.release()
            await wait_all_tasks_blocked()
            await stream.write("b")
            assert [(await anext(early)).chunk for _ in range(2)] == ["a", "b"]
            assert (await anext(late)).chunk == "b"
        assert storage.calls["read"] == 0


async def test_what_was_written_before_somebody_followed_is_read_before_what_comes_next(
    streams: StreamManager, storage: FaultyStorage
) -> None:
    stream = await opened(streams)
    events = streams.subscribe("s")
    first = storage.hold("read", after=True)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(events.__aenter__)
        await first.reached.wait()
        await stream.write("a")
        feeds = storage.hold("read")
        first.release()
        await feeds.reached.wait()
        await stream.write("b")
        feeds.release()
        assert [(await anext(events)).chunk for _ in range(2)] == ["a", "b"]
        await events.__aexit__()


async def test_who_follows_before_the_handle_is_there_listens_no_longer_when_it_is(
    streams: StreamManager, storage: FaultyStorage
) -> None:
    await opened(streams, "other")
    hold = storage.hold("commit", after=True)
    async with anyio.create_task_group() as tasks:
        handles: list[StreamInput] = []

        async def open_stream() -> None:
            handles.append(await streams.open("s"))

        tasks.start_soon(open_stream)
        await hold.reached.wait()
        async with streams.subscribe("s") as events:
            await wait_all_tasks_blocked()
            hold.release()
            await wait_all_tasks_blocked()
            storage.calls.clear()
            await handles[0].write("a")
            assert (await anext(events)).chunk == "a"
            await wait_all_tasks_blocked()
            assert storage.calls["read"] == 0


async def test_what_is_told_while_a_page_is_read_is_not_taken_for_that_page(
    streams: StreamManager, storage: FaultyStorage
) -> None:
    stream = await opened(streams)
    async with streams.subscribe("s") as events:
        hold = storage.hold("read")
        await hold.reached.wait()  # the feed's first
        await stream.write("a")
        hold.release()
        await stream.write("b")
        assert [(await anext(events)).chunk for _ in range(2)] == ["a", "b"]
        hold = storage.hold("read", after=True)
        core_of(streams)._tell_feeds("s")
        await hold.reached.wait()
        await stream.write("c")
        hold.release()
        await stream.write("d")
        assert [(await anext(events)).chunk for _ in range(2)] == ["c", "d"]


async def test_what_the_storage_loses_of_what_was_written_here_is_told_at_the_next_write(
    streams: StreamManager, memory: MemoryStorage
) -> None:
    stream = await opened(streams)
    before = memory._streams["s"].head
    async with streams.subscribe("s") as events:
        await stream.write("a")
        assert (await anext(events)).chunk == "a"
        memory._streams["s"].head = before
        memory._streams["s"].records.clear()
        with pytest.raises(Exception, match="has not what it had acknowledged"):
            await stream.write("b")
        with pytest.raises(OffsetOutOfRangeError):
            await anext(events)


async def test_while_the_writer_here_is_quiet_it_is_seen_what_others_do_though_nobody_is_told(
    streams: StreamManager, elsewhere: StreamManager, storage: FaultyStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = await streams.open("s")
    monkeypatch.setattr(core_of(elsewhere), "tell_writer", AsyncMock())
    async with streams.subscribe("s") as events:
        await stream.write("a")
        assert (await anext(events)).chunk == "a"
        await anyio.sleep(QUIET_SECONDS)
        await elsewhere.cancel("s")
        with anyio.fail_after(0.1):
            assert (await anext(events)).error.status == "CANCELLED"


async def test_a_writer_that_is_heard_again_is_no_longer_listened_for(streams: StreamManager, storage: FaultyStorage) -> None:
    stream = await streams.open("s")
    async with streams.subscribe("s") as events:
        for _ in range(3):
            await anyio.sleep(10 * QUIET_SECONDS)
            await stream.write("late")
            assert (await anext(events)).chunk == "late"
            await wait_all_tasks_blocked()
            storage.calls.clear()
            for number in range(100):
                await anyio.sleep(QUIET_SECONDS / 2)
                await stream.write(number)
                assert (await anext(events)).chunk == number
            assert storage.calls["watch"] == 0
            assert storage.calls["read"] < 20  # of sessions


async def test_followers_that_are_equally_far_are_given_the_same_records(streams: StreamManager) -> None:
    stream = await streams.open("s")
    async with streams.subscribe("s") as first, streams.subscribe("s") as second:
        await wait_all_tasks_blocked()
        for number in range(3):
            await stream.write(number)
        given = await first.records()
        assert given is await second.records()
        assert ([event.chunk for event in first.events_of(given)], given.first, given.end) == ([0, 1, 2], 0, 3)
        await stream.write(3)
        assert (await first.records()).first == 3
        await stream.done()
        assert [event.chunk for event in second.events_of(await second.records())[:1]] == [3]
        while await second.records():
            pass
        assert not await second.records()


async def filled(streams: StreamManager, records: int, *, resume: bool = False, word: object = "word") -> None:
    """Make a stream of so many chunks, or go on with it, and complete it."""
    async with streams.open("s", resume=resume) as stream:
        for _ in range(records):
            stream.write_soon(word)
        await stream.done()


async def pages_of(streams: StreamManager, after: int | None = None) -> list[Records]:
    """Give what a reader is given who comes now."""
    pages: list[Records] = []
    async with streams.subscribe("s", after) as events:
        while got := await events.records():
            pages.append(got)
    return pages


async def test_who_replays_behind_another_is_given_the_same_records_and_reads_them_no_more(
    streams: StreamManager, storage: FaultyStorage
) -> None:
    await filled(streams, 3 * PAGE_RECORDS)
    first = await pages_of(streams)
    storage.calls.clear()
    assert [id(page) for page in await pages_of(streams)] == [id(page) for page in first]
    assert storage.calls["read"] == 1  # by which it was entered
    assert [page.first for page in await pages_of(streams, after=0)] == [1, *[1 + number * PAGE_RECORDS for number in (1, 2)]]


async def test_no_more_pages_are_kept_than_so_many_bytes(streams: StreamManager, monkeypatch: pytest.MonkeyPatch) -> None:
    await filled(streams, 8 * PAGE_RECORDS)
    page = PAGE_RECORDS * (PER_RECORD_BYTES + len(b'c"word"')) + PER_PAGE_BYTES + PER_EPOCH_BYTES
    monkeypatch.setattr(_feed, "KEPT_BYTES", 3 * page)
    await pages_of(streams)
    assert [first for _, _, first in running_of(streams).feeds._pages] == [number * PAGE_RECORDS for number in (6, 7, 8)]


async def test_nothing_that_was_read_is_kept_for_long(streams: StreamManager) -> None:
    await filled(streams, 2 * PAGE_RECORDS)
    for _ in range(2):
        await pages_of(streams)
        await anyio.sleep(KEPT_SECONDS / 2)
        assert running_of(streams).feeds._pages
        await anyio.sleep(KEPT_SECONDS)
        assert not running_of(streams).feeds._pages
        assert running_of(streams).feeds._kept_bytes == 0


async def test_what_is_kept_of_many_small_streams_is_bounded_with_all_that_they_are_known_by(streams: StreamManager) -> None:
    feeds, record = running_of(streams).feeds, b"d"
    async with streams.open("s") as stream:
        await stream.done()
    async with streams.subscribe("s") as events:
        assert events._life is not None
        life = events._life

    def kept(epochs: int) -> int:
        state = msgspec.structs.replace(life.state, epochs=tuple(Epoch(f"{number:032}", number) for number in range(epochs)))
        tracemalloc.start()
        try:
            for number in range(KEPT_BYTES // 1_000):
                # Each reader has read the head by itself.
                alike = Life(life.head, msgspec.json.decode(msgspec.json.encode(state), type=State))
                feeds.shared(f"stream {number}", alike, 0, [record]).make(SSEFraming, bytes(number % 2 * 1_000))
            return tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()

    assert max(kept(1), kept(64)) < 2 * KEPT_BYTES


async def test_what_is_made_of_what_is_kept_counts_as_well(streams: StreamManager) -> None:
    await filled(streams, 3 * PAGE_RECORDS)
    feeds = running_of(streams).feeds
    given = await pages_of(streams)
    assert len(feeds._kept) == len(given)
    before = feeds._kept_bytes
    assert given[-1].make("a kind", bytes(1_000)) == given[-1].made["a kind"]
    assert feeds._kept_bytes == before + 1_000
    given[-1].make("a long one", bytes(KEPT_BYTES + 1 - feeds._kept_bytes))
    assert [*feeds._kept] == given[1:]
    given[0].make("a kind", bytes(KEPT_BYTES))  # is kept by who holds it, and by nobody else
    assert 0 < feeds._kept_bytes <= KEPT_BYTES
    given[-1].make("another kind", bytes(KEPT_BYTES))
    assert (len(feeds._kept), feeds._kept_bytes) == (0, 0)


async def test_what_was_read_is_forgotten_when_the_manager_is_closed(storage: FaultyStorage) -> None:
    async with StreamManager(storage) as streams:
        await filled(streams, 1)
        await pages_of(streams)
        feeds = running_of(streams).feeds
        assert feeds._kept
    assert not feeds._pages


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_what_was_read_is_forgotten_also_when_the_task_that_does_that_was_cancelled_by_somebody() -> None:
    async with StreamManager(MemoryStorage()) as streams:
        await filled(streams, 1)
        for _ in range(2):  # also what is read later
            await pages_of(streams)
            feeds = running_of(streams).feeds
            assert feeds._kept
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                if "Background._run" in repr(task.get_coro()):
                    task.cancel()
            for _ in range(10):
                await asyncio.sleep(0)
            assert not feeds._pages


@pytest.mark.promise("P8")
@pytest.mark.parametrize("is_shared", [False, True])
async def test_a_long_replay_lets_others_run_and_can_be_cancelled_between_its_pages(
    streams: StreamManager, *, is_shared: bool
) -> None:
    pages = 8
    await filled(streams, pages * PAGE_RECORDS)
    if is_shared:
        await pages_of(streams)
    turns = seen = 0

    async def count() -> None:
        nonlocal turns
        while True:
            await checkpoint()
            turns += 1

    async with anyio.create_task_group() as tasks, streams.subscribe("s") as events:
        tasks.start_soon(count)
        async for _ in events:
            pass
        assert turns >= pages - 2
        tasks.cancel_scope.cancel()
    async with streams.subscribe("s") as events:
        with anyio.CancelScope() as scope:
            async for _ in events:
                scope.cancel()
                seen += 1
        assert seen == PAGE_RECORDS
        assert [event.offset async for event in events] == [*range(seen, pages * PAGE_RECORDS + 1)]


async def test_a_damaged_record_that_was_mended_is_read_anew(streams: StreamManager, memory: MemoryStorage) -> None:
    await filled(streams, 2 * PAGE_RECORDS)
    records = memory._streams["s"].records
    whole, records[PAGE_RECORDS] = records[PAGE_RECORDS], b"?"
    async with streams.subscribe("s") as events:
        assert len(await events.batch()) == PAGE_RECORDS
        with pytest.raises(StorageCorruptError) as kept:  # with all that its traceback keeps
            await events.batch()
        records[PAGE_RECORDS] = whole
        assert [event.chunk for event in (await events.batch())[:2]] == ["word"] * 2
    assert kept.value.__traceback__ is not None


async def test_a_copy_under_another_id_is_given_its_own_records_also_where_its_writers_are_called_the_same(
    streams: StreamManager, memory: MemoryStorage
) -> None:
    await filled(streams, 2 * PAGE_RECORDS, word="secret")
    original = memory._streams["s"]
    records = [record.replace(b"secret", b"------") for record in original.records]
    assert await memory.commit("copy", None, original.head, records)
    first = (await pages_of(streams))[0]
    async with streams.subscribe("copy") as events:
        assert {event.chunk async for event in events if event.type is StreamEventType.CHUNK} == {"------"}
    assert await memory.delete("copy", original.head.version)
    assert await memory.commit("copy", None, original.head, original.records)
    async with streams.subscribe("copy") as events:
        same = await events.records()
        assert same.records == first.records
        assert same is not first  # what is made of them names the stream


@pytest.mark.promise("P19")
async def test_pages_of_a_log_that_the_storage_has_lost_are_given_to_nobody_who_comes_later(clock: Callable[[], float]) -> None:
    storage = BackupStorage(clock=clock)
    async with StreamManager(storage) as streams:
        async with streams.open("s") as stream:
            for number in range(PAGE_RECORDS):
                stream.write_soon(number)
        storage.back_up()
        for word in ("before", "after"):
            await filled(streams, 2 * PAGE_RECORDS, resume=True, word=word)
            async with streams.subscribe("s", PAGE_RECORDS - 1) as events:
                assert {event.chunk async for event in events if event.type is StreamEventType.CHUNK} == {word}
            storage.go_back()


@pytest.mark.promise("P19")
async def test_the_end_of_a_page_that_the_storage_has_lost_is_given_to_nobody_who_comes_later(
    clock: Callable[[], float],
) -> None:
    storage = BackupStorage(clock=clock)
    async with StreamManager(storage) as streams, StreamManager(storage) as elsewhere, elsewhere.open("s") as stream:
        for number in range(PAGE_RECORDS + 10):
            stream.write_soon(number)
        await stream.flush()
        storage.back_up()
        for number in range(10):
            stream.write_soon(number)
        await stream.flush()
        async with streams.subscribe("s", follow=False) as events:
            assert [(await events.records()).end for _ in range(2)] == [PAGE_RECORDS, PAGE_RECORDS + 20]
            storage.go_back()
            async with streams.subscribe("s") as later:
                assert [(await later.records()).end for _ in range(2)] == [PAGE_RECORDS, PAGE_RECORDS + 10]


async def test_of_two_histories_each_reader_is_given_the_records_of_its_own(clock: Callable[[], float]) -> None:
    storage = BackupStorage(clock=clock)
    async with StreamManager(storage) as streams:
        storage.back_up()
        given = []
        for word in ("before", "after"):
            async with streams.open("s") as stream:
                await stream.write(word)
                await stream.done()
            async with streams.subscribe("s") as events:
                given.append(await events.records())
                assert events.events_of(given[-1])[0].chunk == word
            storage.go_back()
        assert given[0] is not given[1]


async def test_the_same_records_of_another_life_are_others(streams: StreamManager) -> None:
    given = []
    for _ in range(2):
        async with streams.open("s") as stream:
            await stream.write("the same")
            await stream.done()
        async with streams.subscribe("s") as events:
            given.append(await events.records())
        await streams.delete("s")
    assert given[0].records == given[1].records
    assert given[0] is not given[1]


async def test_what_a_follower_has_lost_is_told_to_it_and_not_to_who_writes(clock: Callable[[], float]) -> None:
    storage = BackupStorage(clock=clock)
    async with StreamManager(storage) as here, StreamManager(storage) as elsewhere:
        async with elsewhere.open("s") as stream:
            for number in range(5):
                await stream.write(number)
        storage.back_up()
        async with elsewhere.open("s", resume=True) as stream:
            for number in range(5):
                await stream.write(number)
        async with here.subscribe("s") as events:
            assert [(await anext(events)).offset for _ in range(10)] == [*range(10)]
            await wait_all_tasks_blocked()
            storage.go_back()
            async with here.open("s", resume=True) as stream:
                for number in range(8):
                    assert await stream.write(number) == 5 + number
                with pytest.raises(OffsetOutOfRangeError):
                    await anext(events)
                await stream.done()
        assert (await here.info("s")).status == "done"


async def test_a_storage_that_is_away_while_the_writer_here_pauses_is_nothing_to_its_followers(
    streams: StreamManager, storage: FaultyStorage, quiet_logs: pytest.LogCaptureFixture
) -> None:
    stream = await streams.open("s")
    async with streams.subscribe("s") as events:
        await stream.write("a")
        assert (await anext(events)).chunk == "a"
        storage.is_down = True
        await anyio.sleep(5 * QUIET_SECONDS)
        storage.is_down = False
        await stream.write("b")
        assert (await anext(events)).chunk == "b"
        storage.refuse("watch", times=5)
        storage.refuse("read", times=5)
        await stream.close()
        with pytest.raises(StorageError):  # nobody writes it here any more
            await anext(events)
            await anext(events)


async def test_a_writer_that_stores_now_and_then_is_listened_for(streams: StreamManager, storage: FaultyStorage) -> None:
    stream = await streams.open("s")
    async with streams.subscribe("s") as events:
        await anyio.sleep(2 * QUIET_SECONDS)
        storage.calls.clear()
        for number in range(10):
            await stream.write(number)
            assert (await anext(events)).chunk == number
            await anyio.sleep(1.5 * QUIET_SECONDS)
        assert storage.calls["watch"] == 0
        assert storage.calls["read"] < 20


async def test_an_idle_timeout_is_not_put_off_by_who_interrupts_the_wait(streams: StreamManager) -> None:
    stream = await streams.open("s")
    async with streams.subscribe("s", idle_timeout=timedelta(seconds=1)) as events:
        for _ in range(2):
            for _ in range(2):
                with anyio.move_on_after(0.4):
                    await anext(events)
            await stream.write("a")
            assert (await anext(events)).chunk == "a"
        began_at = anyio.current_time()
        for _ in range(2):
            with anyio.move_on_after(0.4):
                await anext(events)
        with pytest.raises(StreamTimeoutError):
            await anext(events)
        assert anyio.current_time() - began_at == pytest.approx(1)


async def test_who_is_behind_a_writer_here_is_told_what_cannot_be_read(
    streams: StreamManager, storage: FaultyStorage, quiet_logs: pytest.LogCaptureFixture
) -> None:
    stream = await opened(streams)
    events = streams.subscribe("s")
    first = storage.hold("read", after=True)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(events.__aenter__)
        await first.reached.wait()
        await stream.write("a")
        storage.refuse("read", times=20)
        first.release()
        await wait_all_tasks_blocked()
        await stream.write("b")
        with anyio.fail_after(5), pytest.raises(StorageError):
            await anext(events)
        await events.__aexit__()


async def test_lasting_damage_is_told_to_who_follows_a_writer_here(
    streams: StreamManager, storage: FaultyStorage, quiet_logs: pytest.LogCaptureFixture
) -> None:
    stream = await streams.open("s")
    async with streams.subscribe("s") as events:
        await stream.write("a")
        assert (await anext(events)).chunk == "a"
        storage.refuse("read", times=5, error=StorageCorruptError("damaged"))
        with anyio.fail_after(5 * QUIET_SECONDS), pytest.raises(StorageCorruptError):
            await anext(events)


async def test_an_outage_is_told_once_while_the_writer_here_pauses(
    streams: StreamManager, storage: FaultyStorage, quiet_logs: pytest.LogCaptureFixture
) -> None:
    stream = await streams.open("s")
    async with streams.subscribe("s") as events:
        await stream.write("a")
        assert (await anext(events)).chunk == "a"
        storage.refuse("watch", times=6)
        await anyio.sleep(60)
        await stream.write("b")
        assert (await anext(events)).chunk == "b"
    assert quiet_logs.text.count("only what is written here") == 1


async def test_what_a_writer_tells_of_another_history_ends_the_feed_alone(streams: StreamManager) -> None:
    stream = await streams.open("s")
    for number in range(3):
        await stream.write(number)
    life = stream._outbox.life
    old = msgspec.structs.replace(
        life, state=msgspec.structs.replace(life.state, epochs=(*life.state.epochs, Epoch("lost", 1)))
    )
    core = core_of(streams)
    feed = Feed(core, "s", old)
    head = msgspec.structs.replace(life.head, version=life.head.version + 1, tail=4)
    feed.take(msgspec.structs.replace(life, head=head), [b"c3"])
    assert feed.is_failed
    with pytest.raises(OffsetOutOfRangeError):
        await feed.changed()
