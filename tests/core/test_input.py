import contextlib
import gc
import tracemalloc
import weakref
from collections.abc import Callable
from math import inf
from threading import Thread
from typing import Any

import anyio
import pytest
from anyio import wait_all_tasks_blocked
from anyio.lowlevel import checkpoint
from tests.core.helpers import Process, core_of, frames, replay, resumed

from streamkeep import (
    ErrorInfo,
    InvalidArgumentError,
    LimitExceededError,
    Limits,
    PublicError,
    StorageCorruptError,
    StorageError,
    StorageFullError,
    StreamCompletedError,
    StreamInputClosedError,
    StreamkeepError,
    StreamManager,
    StreamManagerClosedError,
    StreamNotFoundError,
    StreamTakenOverError,
)
from streamkeep._feed import Feed
from streamkeep._outbox import Outbox
from streamkeep.storages.memory import MemoryStorage
from streamkeep.testing.faults import FaultyStorage

Clock = Callable[[], float]


# Writing


@pytest.mark.promise("P2")
async def test_write_gives_offsets_in_the_order_of_calls(streams: StreamManager) -> None:
    stream = await streams.open("s")

    assert [await stream.write(text) for text in "abc"] == [0, 1, 2]
    assert stream.write_soon("d") == 3
    assert await stream.write("e") == 4
    assert await replay(streams) == [*"abcde"]


@pytest.mark.promise("P2")
async def test_a_chunk_that_is_changed_after_the_call_is_stored_as_it_was(
    streams: StreamManager, storage: FaultyStorage
) -> None:
    stream = await streams.open("s")
    chunk = {"text": "before"}
    hold = storage.hold("commit")

    stream.write_soon(chunk)
    chunk["text"] = "after"
    hold.release()
    await stream.flush()

    assert await replay(streams) == [{"text": "before"}]


@pytest.mark.promise("P3")
async def test_what_queues_up_while_a_commit_is_under_way_goes_into_the_next_as_one(
    streams: StreamManager, storage: FaultyStorage
) -> None:
    stream = await streams.open("s")
    hold = storage.hold("commit")
    storage.calls.clear()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stream.write, "a")
        await hold.reached.wait()
        for text in "bcdef":
            tasks.start_soon(stream.write, text)
        await wait_all_tasks_blocked()
        hold.release()

    assert storage.calls["commit"] == 2
    assert sorted(await replay(streams)) == [*"abcdef"]


@pytest.mark.promise("P3")
async def test_write_soon_stores_in_the_background(streams: StreamManager, storage: FaultyStorage) -> None:
    stream = await streams.open("s")
    storage.calls.clear()

    for number in range(1_000):
        stream.write_soon(number)
    await wait_all_tasks_blocked()

    assert stream.tail == 1_000
    assert storage.calls["commit"] == 1


@pytest.mark.promise("P3")
async def test_write_soon_needs_no_further_call_when_a_write_is_under_way(
    streams: StreamManager, storage: FaultyStorage
) -> None:
    stream = await streams.open("s")
    hold = storage.hold("commit")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stream.write, "a")
        await hold.reached.wait()
        stream.write_soon("b")
        hold.release()
    await wait_all_tasks_blocked()

    assert await replay(streams) == ["a", "b"]


async def test_write_soon_goes_on_by_itself_when_the_write_it_waited_for_was_cancelled(
    streams: StreamManager, storage: FaultyStorage
) -> None:
    stream = await streams.open("s")
    hold = storage.hold("commit")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stream.write, "a")
        await hold.reached.wait()
        stream.write_soon("b")
        tasks.cancel_scope.cancel()
    await wait_all_tasks_blocked()

    assert await replay(streams) == ["a", "b"]


@pytest.mark.promise("P3", "P13")
async def test_the_queue_is_bounded(storage: FaultyStorage) -> None:
    async with StreamManager(storage, limits=Limits(max_queued_events=2)) as streams:
        stream = await streams.open("s")
        stream.write_soon("a")
        stream.write_soon("b")

        with pytest.raises(LimitExceededError, match="max_queued_events"):
            stream.write_soon("refused")
        await stream.flush()
        stream.write_soon("c")
        await stream.flush()

        assert await replay(streams) == ["a", "b", "c"]


@pytest.mark.promise("P3")
async def test_done_waits_for_what_was_written_soon(streams: StreamManager) -> None:
    stream = await streams.open("s")
    stream.write_soon("a")
    await stream.done("b")

    assert await replay(streams) == ["a", ("done", "b")]


@pytest.mark.promise("P3")
async def test_error_waits_for_what_was_written_soon(streams: StreamManager) -> None:
    stream = await streams.open("s")
    stream.write_soon("a")
    await stream.error(PublicError("ABORTED", "b"))

    assert await replay(streams) == ["a", ("ABORTED", "b")]


async def test_a_big_queue_goes_out_in_several_commits(streams: StreamManager, storage: FaultyStorage) -> None:
    stream = await streams.open("s")
    storage.calls.clear()

    for number in range(2_500):
        stream.write_soon(number)
    await stream.flush()

    assert storage.calls["commit"] == 3
    assert await replay(streams) == [*range(2_500)]


async def test_big_chunks_go_out_a_mebibyte_at_a_time(streams: StreamManager, storage: FaultyStorage) -> None:
    stream = await streams.open("s")
    storage.calls.clear()

    for length in (600_000, 600_000, 2_000_000, 10):
        stream.write_soon("x" * length)
    await stream.flush()

    assert storage.calls["commit"] == 4
    assert [len(chunk) for chunk in await replay(streams)] == [600_000, 600_000, 2_000_000, 10]


async def test_a_producer_that_never_waits_lets_others_run(streams: StreamManager) -> None:
    stream = await streams.open("s")
    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(checkpoint_then, scope.cancel)
            while True:
                await stream.write("a")

    assert 0 < stream.tail <= 256


async def checkpoint_then(call: Callable[[], None]) -> None:
    await checkpoint()
    call()


# A storage that fails


async def fail(storage: FaultyStorage, fault: str) -> None:
    """Let a commit fail so that nobody knows what became of it."""
    await wait_all_tasks_blocked()  # a session that has just begun reads as well
    getattr(storage, fault)("commit")
    storage.refuse("read")


@pytest.mark.parametrize("fault", ["refuse", "lose_answer"])
@pytest.mark.promise("P3")
async def test_flush_stores_what_waited_after_a_storage_error(
    streams: StreamManager, storage: FaultyStorage, fault: str
) -> None:
    stream = await streams.open("s")
    await fail(storage, fault)

    with pytest.raises(StorageError):
        await stream.write("a")
    assert stream.write_soon("b") == 1
    await stream.flush()

    assert await replay(streams) == ["a", "b"]


@pytest.mark.parametrize("fault", ["refuse", "lose_answer"])
@pytest.mark.promise("P3")
async def test_a_failure_of_write_soon_shows_at_the_next_flush(
    streams: StreamManager, storage: FaultyStorage, fault: str, quiet_logs: pytest.LogCaptureFixture
) -> None:
    stream = await streams.open("s")
    await fail(storage, fault)
    stream.write_soon("a")
    await wait_all_tasks_blocked()
    await fail(storage, "refuse")

    with pytest.raises(StorageError):
        await stream.flush()
    await stream.flush()

    assert "queued events are not stored yet" in quiet_logs.text
    assert await replay(streams) == ["a"]


@pytest.mark.parametrize("fault", ["refuse", "lose_answer"])
@pytest.mark.promise("P4")
async def test_flush_completes_a_stream_whose_done_failed(streams: StreamManager, storage: FaultyStorage, fault: str) -> None:
    stream = await streams.open("s")
    await fail(storage, fault)

    with pytest.raises(StorageError):
        await stream.done("b")
    await stream.flush()

    assert await replay(streams) == [("done", "b")]


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.promise("P3")
async def test_all_who_wait_for_a_commit_are_told_that_it_failed_and_nothing_is_lost(
    streams: StreamManager, storage: FaultyStorage, after: bool
) -> None:
    stream = await streams.open("s")
    hold = storage.hold("commit", after=after)
    failed: list[str] = []

    async def write(text: str) -> None:
        try:
            await stream.write(text)
        except StorageError:
            failed.append(text)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(write, "a")
        await hold.reached.wait()
        for text in "bcd":
            tasks.start_soon(write, text)
        await wait_all_tasks_blocked()
        storage.refuse("read")
        hold.release(StorageError("too bad"))
    await stream.flush()

    assert sorted(failed) == [*"abcd"]
    assert sorted(await replay(streams)) == [*"abcd"]


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.promise("P2")
async def test_a_write_that_is_cancelled_in_its_commit_keeps_its_place(
    streams: StreamManager, storage: FaultyStorage, after: bool
) -> None:
    stream = await streams.open("s")
    hold = storage.hold("commit", after=after)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stream.write, "a")
        await hold.reached.wait()
        tasks.cancel_scope.cancel()
    assert await stream.write("b") == 1

    assert await replay(streams) == ["a", "b"]


@pytest.mark.parametrize("after", [False, True])
async def test_those_who_wait_for_a_cancelled_commit_go_on_with_it(
    streams: StreamManager, storage: FaultyStorage, after: bool
) -> None:
    stream = await streams.open("s")
    hold = storage.hold("commit", after=after)

    async with anyio.create_task_group() as followers, anyio.create_task_group() as leader:
        leader.start_soon(stream.write, "a")
        await hold.reached.wait()
        for text in "bcd":
            followers.start_soon(stream.write, text)
        await wait_all_tasks_blocked()
        leader.cancel_scope.cancel()

    chunks = await replay(streams)
    assert (chunks[0], sorted(chunks)) == ("a", [*"abcd"])


async def test_a_follower_that_is_cancelled_keeps_its_place(streams: StreamManager, storage: FaultyStorage) -> None:
    stream = await streams.open("s")
    hold = storage.hold("commit")

    async with anyio.create_task_group() as leader:
        leader.start_soon(stream.write, "a")
        await hold.reached.wait()
        async with anyio.create_task_group() as follower:
            follower.start_soon(stream.write, "b")
            await wait_all_tasks_blocked()
            follower.cancel_scope.cancel()
        hold.release()
    await stream.flush()

    assert await replay(streams) == ["a", "b"]


async def test_a_cancellation_while_a_lost_answer_is_looked_for_leaves_no_doubt(
    streams: StreamManager, storage: FaultyStorage
) -> None:
    stream = await streams.open("s")
    await wait_all_tasks_blocked()
    storage.lose_answer("commit")
    hold = storage.hold("read")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stream.write, "a")
        await hold.reached.wait()
        stream.write_soon("b")
        tasks.cancel_scope.cancel()
    assert await stream.write("c") == 2

    assert await replay(streams) == ["a", "b", "c"]


@pytest.mark.parametrize("after", [False, True])
async def test_done_that_is_cancelled_is_carried_out_by_flush(
    streams: StreamManager, storage: FaultyStorage, after: bool
) -> None:
    stream = await streams.open("s")
    hold = storage.hold("commit", after=after)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stream.done, "b")
        await hold.reached.wait()
        tasks.cancel_scope.cancel()
    await stream.flush()

    assert await replay(streams) == [("done", "b")]


async def test_a_commit_is_sent_again_as_it_was_and_not_with_what_came_later(
    streams: StreamManager, storage: FaultyStorage
) -> None:
    stream = await streams.open("s")
    await wait_all_tasks_blocked()
    storage.lose_answer("commit", times=2)
    storage.refuse("read", times=3)

    for text in "ab":
        with pytest.raises(StorageError):
            await stream.write(text)
    await stream.done()

    assert await replay(streams) == ["a", "b", ("done", None)]


async def test_a_writer_whose_storage_has_gone_back_behind_what_it_acknowledged_is_told(
    streams: StreamManager, storage: FaultyStorage
) -> None:
    stream = await streams.open("s")
    await stream.write("kept")
    before = await storage.read("s", 0, 1)
    assert before is not None
    await stream.write("lost")
    after = await storage.read("s")
    assert after is not None
    assert await storage.delete("s", after.head.version)
    assert await storage.commit("s", None, before.head, before.records)

    with pytest.raises(StorageCorruptError, match="taken the last moments"):
        await stream.write("more")
    assert stream.cancelled.is_set()


@pytest.mark.promise("P4")
async def test_a_writer_whose_answer_was_lost_and_who_was_taken_over_then_is_told(
    streams: StreamManager, mortal: Process
) -> None:
    stream = await mortal.streams.open("s")
    await wait_all_tasks_blocked()
    mortal.storage.lose_answer("commit")
    mortal.storage.refuse("read")
    with pytest.raises(StorageError):
        await stream.write("a")
    mortal.die()
    successor = await resumed(streams, "s")
    mortal.come_back()

    with pytest.raises(StreamTakenOverError):
        await stream.write("b")
    await successor.done()

    assert successor.tail == 2
    assert await replay(streams) == ["a", ("done", None)]


async def test_a_full_storage_is_told_and_nothing_is_lost(streams: StreamManager, storage: FaultyStorage) -> None:
    stream = await streams.open("s")
    await anyio.sleep(1)
    storage.refuse("commit", error=StorageFullError("no space left"))

    with pytest.raises(StorageFullError):
        await stream.write("a")
    await stream.flush()

    assert await replay(streams) == ["a"]


@pytest.mark.promise("P2")
async def test_a_commit_whose_answer_was_lost_is_looked_for_and_is_no_failure_if_it_is_there(
    streams: StreamManager, storage: FaultyStorage
) -> None:
    stream = await streams.open("s")
    storage.lose_answer("commit", times=2)
    assert await stream.write("a") == 0
    await stream.done("b")

    assert await replay(streams) == ["a", ("done", "b")]


# Limits


@pytest.mark.promise("P13")
async def test_an_event_may_have_so_many_bytes_and_not_one_more(storage: FaultyStorage) -> None:
    async with StreamManager(storage, limits=Limits(max_event_bytes=10)) as streams:
        stream = await streams.open("s")
        await stream.write("x" * 8)
        with pytest.raises(LimitExceededError, match="max_event_bytes"):
            await stream.write("x" * 9)
        with pytest.raises(LimitExceededError, match="max_event_bytes"):
            stream.write_soon("x" * 9)
        with pytest.raises(LimitExceededError, match="max_event_bytes"):
            await stream.done("x" * 9)
        await stream.done("x" * 8)

        assert stream.tail == 2


@pytest.mark.promise("P13")
async def test_a_stream_may_hold_so_many_events_and_not_one_more(storage: FaultyStorage) -> None:
    async with StreamManager(storage, limits=Limits(max_events=2)) as streams:
        stream = await streams.open("s")
        await stream.write("a")
        await stream.close()
        stream = await streams.open("s", resume=True)
        await stream.write("b")
        with pytest.raises(LimitExceededError, match="max_events"):
            await stream.write("refused")
        await stream.done()

        assert await replay(streams) == ["a", "b", ("done", None)]


@pytest.mark.promise("P13")
async def test_a_stream_may_hold_so_many_bytes_and_not_one_more(storage: FaultyStorage) -> None:
    async with StreamManager(storage, limits=Limits(max_stream_bytes=8)) as streams:
        stream = await streams.open("s")
        await stream.write("a")
        await stream.close()
        stream = await streams.open("s", resume=True)
        with pytest.raises(LimitExceededError, match="max_stream_bytes"):
            await stream.write("bcd")
        await stream.write("b")
        await stream.done("as long as it likes")

        assert await replay(streams) == ["a", "b", ("done", "as long as it likes")]


@pytest.mark.promise("P13", "P15")
async def test_an_exception_is_stored_however_small_events_must_be(storage: FaultyStorage) -> None:
    async with StreamManager(storage, limits=Limits(max_event_bytes=100)) as streams:
        with pytest.raises(ValueError, match="too long"):
            async with streams.open("s"):
                raise ValueError("too long " * 1_000)

        assert await replay(streams) == [("INTERNAL", "internal")]


# Ends


@pytest.mark.parametrize("end", ["done", "close", "error"])
@pytest.mark.promise("P4")
async def test_after_its_end_a_handle_says_that_it_is_closed(streams: StreamManager, end: str) -> None:
    stream = await streams.open("s")
    await (stream.error(ValueError("x")) if end == "error" else getattr(stream, end)())

    assert stream.is_closed
    for call in (lambda: stream.write("x"), stream.done, lambda: stream.error(ValueError("x"))):
        with pytest.raises(StreamInputClosedError):
            await call()
    with pytest.raises(StreamInputClosedError):
        stream.write_soon("x")
    await stream.flush()
    await stream.close()
    assert not stream.cancelled.is_set()


async def test_an_error_may_be_told_in_words(streams: StreamManager) -> None:
    stream = await streams.open("s")
    await stream.error(ErrorInfo("NOT_FOUND", "no such model"))

    assert await replay(streams) == [("NOT_FOUND", "no such model")]


@pytest.mark.parametrize(("status", "message"), [("BOGUS", "x"), ("INTERNAL", None), (["INTERNAL"], "x")])
async def test_an_error_that_nobody_could_read_is_refused(streams: StreamManager, status: Any, message: Any) -> None:
    stream = await streams.open("s")
    with pytest.raises(InvalidArgumentError, match="not an ErrorInfo"):
        await stream.error(ErrorInfo(status, message))
    await stream.done()

    assert (await streams.info("s")).status == "done"


async def test_a_result_that_is_not_json_leaves_the_stream_open(streams: StreamManager) -> None:
    stream = await streams.open("s")
    with pytest.raises(InvalidArgumentError):
        await stream.done(object())
    await stream.done("better")

    assert await replay(streams) == [("done", "better")]


@pytest.mark.promise("P4")
async def test_a_handle_says_what_somebody_else_did(streams: StreamManager, elsewhere: StreamManager, mortal: Process) -> None:
    cancelled = await streams.open("cancelled")
    deleted = await streams.open("deleted")
    taken = await mortal.streams.open("taken")
    await elsewhere.cancel("cancelled")
    await elsewhere.delete("deleted")
    mortal.die()
    successor = await resumed(elsewhere, "taken")
    mortal.come_back()

    for stream, why in ((cancelled, StreamCompletedError), (deleted, StreamNotFoundError), (taken, StreamTakenOverError)):
        for call in (lambda: stream.write("x"), stream.done, stream.flush):  # noqa: B023
            with pytest.raises(why):
                await call()
        assert stream.cancelled.is_set()
        await stream.close()
    await successor.close()


@pytest.mark.promise("P3")
async def test_closing_does_not_swallow_that_what_was_written_soon_is_lost(
    streams: StreamManager, elsewhere: StreamManager
) -> None:
    stream = await streams.open("s")
    await elsewhere.cancel("s")
    stream.write_soon("lost")
    await wait_all_tasks_blocked()

    with pytest.raises(StreamCompletedError):
        await stream.close()


# Leaving the block


@pytest.mark.promise("P15")
async def test_leaving_the_block_by_an_exception_ends_the_stream_with_it_and_it_arrives_bare(streams: StreamManager) -> None:
    error = ValueError("secret")
    with pytest.raises(ValueError, match="secret") as raised:
        async with streams.open("s") as stream:
            await stream.write("a")
            raise error

    assert raised.value is error
    assert await replay(streams) == ["a", ("INTERNAL", "internal")]


@pytest.mark.promise("P5")
async def test_leaving_the_block_without_done_releases_the_stream(streams: StreamManager, elsewhere: StreamManager) -> None:
    async with streams.open("s") as stream:
        stream.write_soon("a")

    async with elsewhere.open("s", resume=True) as successor:
        assert successor.tail == 1


@pytest.mark.promise("P5")
async def test_leaving_the_block_by_cancellation_releases_the_stream(streams: StreamManager, elsewhere: StreamManager) -> None:
    with anyio.CancelScope() as scope:
        async with streams.open("s") as stream:
            stream.write_soon("a")
            scope.cancel()
            await checkpoint()

    async with elsewhere.open("s", resume=True) as successor:
        assert successor.tail == 1


async def test_a_handle_that_was_awaited_may_be_entered_too(streams: StreamManager) -> None:
    stream = await streams.open("s")
    async with stream as entered:
        await entered.done("a")

    assert entered is stream
    assert await replay(streams) == [("done", "a")]


async def test_leaving_the_block_by_an_exception_says_what_the_stream_has_not(
    streams: StreamManager, memory: MemoryStorage, storage: FaultyStorage, quiet_logs: pytest.LogCaptureFixture
) -> None:
    async with StreamManager(memory) as elsewhere:
        with pytest.raises(ZeroDivisionError):
            async with streams.open("s") as stream:
                hold = storage.hold("commit")
                stream.write_soon("lost")
                await hold.reached.wait()
                await elsewhere.cancel("s")
                hold.release()
                raise ZeroDivisionError

    assert "could not be told of its writer's end: the stream was completed by somebody else" in quiet_logs.text


async def test_leaving_the_block_by_cancellation_in_done_carries_it_out(streams: StreamManager, storage: FaultyStorage) -> None:
    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as tasks, streams.open("s") as stream:
            hold = storage.hold("commit")
            tasks.start_soon(wait_then, hold.reached, scope.cancel)
            await stream.done("b")

    assert scope.cancelled_caught
    assert await replay(streams) == [("done", "b")]


async def wait_then(event: anyio.Event, call: Callable[[], None]) -> None:
    await event.wait()
    call()


async def test_the_exception_arrives_even_if_the_storage_cannot_be_told(
    streams: StreamManager, storage: FaultyStorage, quiet_logs: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ValueError, match="mine"):
        async with streams.open("s"):
            storage.is_down = True
            raise ValueError("mine")

    assert "could not be told of its writer's end" in quiet_logs.text


async def test_the_exception_arrives_in_time_even_if_the_storage_hangs(
    streams: StreamManager, storage: FaultyStorage, clock: Clock
) -> None:
    with pytest.raises(ValueError, match="mine"):
        async with streams.open("s"):
            began = clock()
            storage.hold("commit")
            raise ValueError("mine")

    assert clock() - began == 5


async def test_leaving_the_block_after_losing_the_stream_says_what_the_block_said(
    streams: StreamManager, elsewhere: StreamManager
) -> None:
    with pytest.raises(StreamCompletedError):
        async with streams.open("s") as stream:
            await elsewhere.cancel("s")
            await stream.write("a")

    assert await replay(streams) == [("CANCELLED", "the stream was cancelled")]


async def test_a_block_that_cannot_be_entered_raises_why(streams: StreamManager) -> None:
    await streams.open("s")
    with pytest.raises(StreamkeepError, match="already exists"):
        async with streams.open("s"):
            pytest.fail("entered")


# Looking


async def test_looking_while_a_commit_is_in_doubt_sends_it_again(streams: StreamManager, storage: FaultyStorage) -> None:
    stream = await streams.open("s")
    storage.refuse("commit")
    with pytest.raises(StorageError):
        await stream.write("a")

    await outbox_of(streams).look()

    assert stream.tail == 1


async def test_looking_while_a_commit_is_under_way_leaves_it_to_the_commit(
    streams: StreamManager, storage: FaultyStorage
) -> None:
    stream = await streams.open("s")
    hold = storage.hold("commit")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stream.write, "a")
        await hold.reached.wait()
        storage.calls.clear()
        await outbox_of(streams).look()
        assert storage.calls.total() == 0
        hold.release()


async def test_looking_does_not_mistake_its_own_end_for_a_loss(streams: StreamManager, storage: FaultyStorage) -> None:
    stream = await streams.open("s")
    await wait_all_tasks_blocked()
    hold = storage.hold("read")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(outbox_of(streams).look)
        await hold.reached.wait()
        await stream.done()
        hold.release()

    assert not stream.cancelled.is_set()


async def test_looking_does_not_mistake_what_was_written_meanwhile_for_a_loss(
    streams: StreamManager, storage: FaultyStorage
) -> None:
    stream = await streams.open("s")
    await wait_all_tasks_blocked()
    hold = storage.hold("read", after=True)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(outbox_of(streams).look)
        await hold.reached.wait()
        assert await stream.write("a") == 0
        hold.release()

    assert await stream.write("b") == 1


async def test_looking_at_what_has_ended_costs_nothing(streams: StreamManager, storage: FaultyStorage) -> None:
    stream = await streams.open("s")
    outbox = outbox_of(streams)
    await stream.done()
    storage.calls.clear()
    await outbox.look()

    assert storage.calls.total() == 0


async def test_looking_sees_that_the_stream_is_somebody_elses(streams: StreamManager, storage: FaultyStorage) -> None:
    stream = await streams.open("s")
    there = await storage.read("s")
    assert there is not None
    assert await storage.delete("s", there.head.version)
    await outbox_of(streams).look()

    assert stream.cancelled.is_set()
    with pytest.raises(StreamNotFoundError):
        await stream.write("a")


async def test_a_handle_of_a_closed_manager_says_so(streams: StreamManager) -> None:
    stream = await streams.open("s")
    await streams.aclose()

    assert stream.cancelled.is_set()
    with pytest.raises(StreamManagerClosedError):
        await stream.write("a")


def outbox_of(streams: StreamManager) -> Outbox:
    """Give the outbox of a manager's one writer."""
    (outbox,) = core_of(streams).outboxes()
    assert isinstance(outbox, Outbox)
    return outbox


# Order of calls


@pytest.mark.promise("P2")
async def test_chunks_take_their_places_at_the_calls_whoever_awaits_first(streams: StreamManager) -> None:
    stream = await streams.open("s")
    chunk = {"text": "before"}
    first, second, third = stream.write(1), stream.write(2), stream.write(chunk)
    chunk["text"] = "after"

    assert (await third, await second, await first) == (2, 1, 0)
    assert await replay(streams) == [1, 2, {"text": "before"}]


@pytest.mark.promise("P2")
async def test_a_call_that_is_refused_is_refused_at_the_call_and_takes_no_place(streams: StreamManager) -> None:
    stream = await streams.open("s")
    with pytest.raises(InvalidArgumentError):
        stream.write(object()).close()
    await stream.write("a")
    await stream.done()
    with pytest.raises(StreamInputClosedError):
        stream.write("late").close()

    assert await replay(streams) == ["a", ("done", None)]


@pytest.mark.promise("P2")
async def test_a_write_that_nobody_awaits_is_stored_with_what_comes_next(streams: StreamManager) -> None:
    stream = await streams.open("s")
    stream.write("a").close()
    await stream.done("b")

    assert await replay(streams) == ["a", ("done", "b")]


@pytest.mark.promise("P2")
async def test_chunks_of_one_writer_go_out_together(streams: StreamManager, storage: FaultyStorage) -> None:
    stream = await streams.open("s")
    storage.calls.clear()
    for chunk in [stream.write(number) for number in range(1_000)]:
        await chunk

    assert storage.calls["commit"] == 1


# Handles that are dropped


@pytest.mark.promise("P5")
@pytest.mark.filterwarnings("always:the writer of stream:ResourceWarning")
async def test_a_handle_that_is_dropped_is_warned_of_and_its_stream_is_released(
    streams: StreamManager, elsewhere: StreamManager
) -> None:
    held = [await streams.open("s")]
    held[0].write("a").close()
    with pytest.warns(ResourceWarning, match="the writer of stream s was dropped"):
        held.clear()
    await wait_all_tasks_blocked()

    assert (await elsewhere.open("s", resume=True)).tail == 1
    assert list(core_of(streams).outboxes()) == []


@pytest.mark.filterwarnings("error::ResourceWarning", "error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("end", ["done", "close", "cancel", "aclose"])
async def test_a_handle_whose_stream_has_ended_may_be_dropped(streams: StreamManager, end: str) -> None:
    stream = await streams.open("s")
    match end:
        case "cancel":
            await streams.cancel("s")
        case "aclose":
            await streams.aclose()
        case _:
            await getattr(stream, end)()
    dropped = weakref.ref(stream)
    del stream
    gc.collect()

    assert dropped() is None


async def test_a_stream_that_cannot_be_released_when_its_handle_is_dropped_is_logged(
    streams: StreamManager, storage: FaultyStorage, quiet_logs: pytest.LogCaptureFixture
) -> None:
    await streams.open("s")
    storage.is_down = True
    gc.collect()
    await wait_all_tasks_blocked()
    storage.is_down = False

    assert "stream s could not be released" in quiet_logs.text


# Refusals cost nothing


@pytest.mark.promise("P18")
async def test_a_callback_that_goes_on_writing_to_a_cancelled_stream_keeps_nothing_alive(streams: StreamManager) -> None:
    stream = await streams.open("s")
    await streams.cancel("s")

    def refused(count: int) -> int:
        for _ in range(count):
            with contextlib.suppress(StreamCompletedError):
                stream.write_soon("x" * 1_000)
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        before = refused(100)
        after = refused(20_000)
    finally:
        tracemalloc.stop()

    assert after - before < 100_000  # one chunk each would be 20,000,000


@pytest.mark.promise("P18")
async def test_each_who_is_refused_gets_an_exception_of_its_own(streams: StreamManager) -> None:
    stream = await streams.open("s")
    await streams.cancel("s")
    told: list[StreamCompletedError] = []
    for _ in range(50):
        with pytest.raises(StreamCompletedError) as refused:
            stream.write_soon("late")
        told.append(refused.value)

    assert len(set(map(id, told))) == 50
    assert len({frames(error) for error in told}) == 1


@pytest.mark.promise("P18")
async def test_a_commit_that_fails_gives_each_who_waits_for_it_an_exception_of_its_own(
    streams: StreamManager, storage: FaultyStorage
) -> None:
    stream = await streams.open("s")
    hold = storage.hold("commit")
    told: list[StorageError] = []

    async def write(number: int) -> None:
        try:
            await stream.write(number)
        except StorageError as error:
            told.append(error)

    async with anyio.create_task_group() as tasks:
        for number in range(100):
            tasks.start_soon(write, number)
        await hold.reached.wait()
        await wait_all_tasks_blocked()
        hold.release(StorageError("too bad"))

    assert len(set(map(id, told))) == 100
    assert max(map(frames, told)) < 20
    await stream.flush()
    assert stream.tail == 100


# For who runs producers


async def test_a_handle_knows_what_was_given_to_open(streams: StreamManager) -> None:
    stream = await streams.open("s", metadata={"owner": "ann"})
    await stream.close()
    assert (await streams.open("s", resume=True)).metadata == {"owner": "ann"}


async def test_a_handle_is_idle_since_the_last_chunk_was_stored(streams: StreamManager, storage: FaultyStorage) -> None:
    stream = await streams.open("s")
    opened_at = anyio.current_time()
    await anyio.sleep(9)  # between two signs of life
    assert stream.idle_since == opened_at
    hold = storage.hold("commit")
    stream.write_soon("a")
    await hold.reached.wait()
    assert stream.idle_since is None
    await anyio.sleep(1)
    hold.release()
    await stream.flush()
    stored_at = anyio.current_time()
    await anyio.sleep(10)
    assert stream.idle_since == stored_at


async def test_that_a_quiet_writer_is_kept_from_being_forgotten_is_no_chunk(
    streams: StreamManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = await streams.open("s")
    await stream.write("a")
    stored_at = anyio.current_time()
    await anyio.sleep(10)
    monkeypatch.setattr("streamkeep._lifecycle.EXTEND_SECONDS", inf)
    (outbox,) = core_of(streams).outboxes("s")
    await outbox.look()
    assert stream.idle_since == stored_at < outbox.committed_at


async def test_a_handle_knows_since_when_nobody_follows_its_stream_here(
    streams: StreamManager, elsewhere: StreamManager
) -> None:
    stream = await streams.open("s")
    opened_at = anyio.current_time()
    await anyio.sleep(10)
    async with elsewhere.subscribe("s"):
        assert stream.unread_since == opened_at
    async with streams.subscribe("s"):
        async with streams.subscribe("s"):
            assert stream.unread_since is None
        await anyio.sleep(10)
        assert stream.unread_since is None
    assert stream.unread_since == anyio.current_time() == opened_at + 20


async def test_a_follower_that_is_let_go_of_in_a_thread_harms_nobody(streams: StreamManager) -> None:
    stream = await streams.open("s")
    opened_at = anyio.current_time()
    core, life = core_of(streams), stream._outbox.life
    core.add_feed("s", feed := Feed(core, "s", life))
    assert stream.unread_since is None
    thread = Thread(target=core.remove_feed, args=("s", feed))
    thread.start()
    thread.join()
    assert stream.unread_since == opened_at


async def test_a_handle_knows_how_it_has_ended_its_stream(streams: StreamManager) -> None:
    done, failed, released = [await streams.open(stream) for stream in ("done", "failed", "released")]
    assert done.end is None
    await done.write("a")
    await done.done("output")
    await failed.error(PublicError("NOT_FOUND", "no"))
    await released.close()
    assert done.end is not None
    assert (done.end.output, done.end.offset) == ("output", 1)
    assert failed.end is not None
    assert failed.end.error.status == "NOT_FOUND"
    assert released.end is None


async def test_an_end_that_somebody_else_was_quicker_with_is_not_the_handles(
    streams: StreamManager, elsewhere: StreamManager, storage: FaultyStorage
) -> None:
    stream = await streams.open("s")
    await elsewhere.cancel("s")
    with pytest.raises(StreamCompletedError):
        await stream.done("output")
    assert stream.end is None


async def test_who_runs_a_producer_can_end_its_stream(streams: StreamManager, storage: FaultyStorage) -> None:
    stream = await streams.open("s")
    hold = storage.hold("commit")
    stream.write_soon("a")

    stream.end_soon(ErrorInfo("DEADLINE_EXCEEDED", "too long"))

    assert stream.cancelled.is_set()
    for call in (lambda: stream.write("b"), lambda: stream.write_soon("b")):
        with pytest.raises(StreamCompletedError, match=r"completed by somebody else \(DEADLINE_EXCEEDED"):
            call()
    hold.release()
    with pytest.raises(StreamCompletedError):
        await stream.flush()
    assert await replay(streams) == ["a", ("DEADLINE_EXCEEDED", "too long")]
    assert stream.end is not None
    assert stream.end.error == ErrorInfo("DEADLINE_EXCEEDED", "too long")


async def test_who_runs_a_producer_is_too_late_when_its_stream_has_ended(streams: StreamManager) -> None:
    stream = await streams.open("s")
    await stream.done("output")
    stream.end_soon(ErrorInfo("DEADLINE_EXCEEDED", "too long"))
    assert not stream.cancelled.is_set()
    assert await replay(streams) == [("done", "output")]


async def test_an_end_in_the_producers_place_is_stored_when_the_storage_is_back(
    streams: StreamManager, storage: FaultyStorage
) -> None:
    stream = await streams.open("s")
    storage.is_down = True
    stream.end_soon(ErrorInfo("DEADLINE_EXCEEDED", "too long"))
    await anyio.sleep(60)
    storage.is_down = False
    await anyio.sleep(60)
    assert await replay(streams) == [("DEADLINE_EXCEEDED", "too long")]


async def test_a_handle_knows_whether_it_was_stopped_for_good(streams: StreamManager, elsewhere: StreamManager) -> None:
    cancelled, deleted, closed, left, ours = [
        await streams.open(stream) for stream in ("cancelled", "deleted", "closed", "left", "ours")
    ]
    await elsewhere.cancel("cancelled")
    await elsewhere.delete("deleted")
    await closed.close()
    left._outbox.leave_soon()
    await wait_all_tasks_blocked()
    assert left.cancelled.is_set()
    assert [handle.is_stopped for handle in (cancelled, deleted, closed, left, ours)] == [True, True, False, False, False]


async def test_a_handle_knows_whether_its_storage_is_slow(streams: StreamManager, storage: FaultyStorage) -> None:
    stream = await streams.open("s")
    await stream.write("a")
    assert not stream.is_slow
    hold = storage.hold("commit")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stream.write, "b")
        await hold.reached.wait()
        await anyio.sleep(0.01)
        hold.release()
    assert stream.is_slow


async def test_what_met_a_failing_storage_is_stored_in_the_background_if_that_is_asked(
    streams: StreamManager, storage: FaultyStorage
) -> None:
    stream = await streams.open("s")
    storage.refuse("commit", times=3)
    with pytest.raises(StorageError):
        await stream.write("a")
    stream.flush_soon()

    with anyio.fail_after(60):
        async with streams.subscribe("s") as events:
            assert (await anext(events)).chunk == "a"
