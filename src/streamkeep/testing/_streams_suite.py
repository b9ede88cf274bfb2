"""The promises of a StreamManager as tests, over any storage. Speaks nothing but the public API."""

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, TypeVar

import anyio
import pytest
from anyio.lowlevel import checkpoint

from streamkeep import (
    InvalidArgumentError,
    KeyInUseError,
    LimitExceededError,
    Limits,
    OffsetOutOfRangeError,
    PublicError,
    Recovery,
    StreamAlreadyExistsError,
    StreamBusyError,
    StreamCompletedError,
    StreamEvent,
    StreamEventType,
    StreamInput,
    StreamInputClosedError,
    StreamkeepError,
    StreamManager,
    StreamManagerClosedError,
    StreamNotFoundError,
    StreamTakenOverError,
    StreamTimeoutError,
    Subscription,
)
from streamkeep.storage import Storage
from streamkeep.testing.faults import FaultyStorage

OpenManager = Callable[..., AbstractAsyncContextManager[StreamManager]]
F = TypeVar("F", bound=Callable[..., object])

BOUND_SECONDS: Final = 20
HOUR: Final = 3_600.0
LONG: Final = timedelta(hours=2)
BRIEF: Final = timedelta(seconds=0.5)


def promise(*_: str) -> Callable[[F], F]:
    """Say which promises a test owns. (Not a pytest mark, which whoever subclasses the suite would have to register.)"""
    return lambda test: test


class StreamsSuite:
    """Subclass it, say how your storage is opened, and pytest runs every promise of a StreamManager over it.

        class TestStreamsOverMyStorage(StreamsSuite):
            @pytest.fixture
            def open_storage(self, tmp_path):
                return lambda: MyStorage(tmp_path / "streams")

    `open_storage` is the one of `StorageSuite`. Every manager here has a storage handle of its own, and so plays a process of
    its own. A process that dies is played by a manager whose storage fails from some moment on, and time that passes by a storage whose
    clock is put forward.
    """

    pytestmark = [  # noqa: RUF012 - pytest's
        pytest.mark.anyio,
        # Handles are dropped here when a test has seen what it wants.
        pytest.mark.filterwarnings("ignore:the writer of stream:ResourceWarning"),
    ]

    @pytest.fixture
    def anyio_backend(self) -> str:
        """Say which event loop the tests run on."""
        return "asyncio"

    @pytest.fixture
    def open_storage(self) -> Callable[[], Storage]:
        """Give a function whose every call gives a storage, not entered, over this test's data."""
        raise NotImplementedError("override the fixture open_storage")

    @pytest.fixture
    def open_manager(self, open_storage: Callable[[], Storage]) -> OpenManager:
        """Give a function that opens a manager, with StreamManager's options, over this test's data."""

        @asynccontextmanager
        async def open_manager(**options: Any) -> AsyncGenerator[StreamManager]:  # noqa: ANN401 - StreamManager's own
            async with open_storage() as storage, StreamManager(storage, **options) as manager:
                yield manager

        return open_manager

    @pytest.fixture
    async def streams(self, open_manager: OpenManager) -> AsyncGenerator[StreamManager]:
        """Give a manager whose streams are left for another writer for a long time."""
        async with open_manager(grace=LONG) as manager:
            yield manager

    @pytest.fixture
    async def elsewhere(self, streams: StreamManager, open_manager: OpenManager) -> AsyncGenerator[StreamManager]:
        """Give a manager over the same streams in another process."""
        async with open_manager(grace=LONG) as manager:
            yield manager

    @pytest.fixture
    async def mortal(self, streams: StreamManager, open_storage: Callable[[], Storage]) -> AsyncGenerator["Mortal"]:
        """Give a manager that can be killed, after which it takes half a second to be taken for dead, and no grace is given."""
        async with FaultyStorage(open_storage()) as storage:
            async with StreamManager(storage, lease=BRIEF, grace=timedelta(0)) as manager:
                yield Mortal(manager, storage)
            storage.is_down = False

    @pytest.fixture
    def open_later(self, open_storage: Callable[[], Storage]) -> OpenManager:
        """Give a function that opens a manager whose storage says that it is `seconds` later."""

        @asynccontextmanager
        async def open_later(seconds: float, **options: Any) -> AsyncGenerator[StreamManager]:  # noqa: ANN401 - StreamManager's own
            async with FaultyStorage(open_storage()) as storage:
                storage.ahead_seconds = seconds
                async with StreamManager(storage, **options) as manager:
                    yield manager

        return open_later

    # -- opening

    @promise("P1")
    async def test_a_stream_that_was_opened_is_seen_everywhere(self, streams: StreamManager, elsewhere: StreamManager) -> None:
        stream = await streams.open("s", metadata={"owner": "ann"})
        info = await elsewhere.info("s")
        assert (info.id, info.status, info.tail, info.metadata) == ("s", "open", 0, {"owner": "ann"})
        assert [info.id for info in await elsewhere.list()] == ["s"]
        assert stream.tail == 0

    @promise("P1")
    async def test_an_id_that_is_taken_cannot_be_opened_again(self, streams: StreamManager, elsewhere: StreamManager) -> None:
        stream = await streams.open("s")
        for manager in (streams, elsewhere):
            with pytest.raises(StreamAlreadyExistsError):
                await manager.open("s")
        await stream.done()
        for manager in (streams, elsewhere):
            with pytest.raises(StreamAlreadyExistsError):
                await manager.open("s")

    @promise("P1", "P8")
    async def test_an_expired_stream_is_absent_at_once_and_its_id_is_free(
        self, streams: StreamManager, open_later: OpenManager
    ) -> None:
        await complete(streams, "s", ["old"])
        async with open_later(301) as later:
            with pytest.raises(StreamNotFoundError):
                await later.info("s")
            with pytest.raises(StreamNotFoundError):
                await values(later, "s")
            assert not await later.list()
            await complete(later, "s", ["new"])
            assert await values(later, "s") == ["new", "end"]

    @promise("P1")
    async def test_of_many_who_open_an_id_exactly_one_wins(self, streams: StreamManager, elsewhere: StreamManager) -> None:
        outcomes = await race(10, lambda number: (streams, elsewhere)[number % 2].open("s").__aenter__())
        assert sum(isinstance(outcome, StreamInput) for outcome in outcomes) == 1
        assert sum(isinstance(outcome, StreamAlreadyExistsError) for outcome in outcomes) == 9

    # -- writing

    @promise("P2")
    async def test_chunks_come_back_in_order_with_their_offsets(self, streams: StreamManager, elsewhere: StreamManager) -> None:
        async with streams.open("s") as stream:
            assert [await stream.write(text) for text in ("a", "b", "c")] == [0, 1, 2]
            await stream.done({"text": "abc"})
        events = await replay(elsewhere, "s")
        assert [(event.offset, event.type) for event in events] == [(0, "chunk"), (1, "chunk"), (2, "chunk"), (3, "done")]
        assert [event.chunk for event in events[:3]] == ["a", "b", "c"]
        assert events[3].data == b'{"text":"abc"}'

    @promise("P2")
    async def test_any_json_value_may_be_a_chunk_and_a_result(self, streams: StreamManager, elsewhere: StreamManager) -> None:
        odd: list[Any] = [None, 0, False, "", [], {}, 1.5, {"a": [None]}, "\u2028\0é\N{GRINNING FACE}"]
        await complete(streams, "s", odd, output=None)
        assert await values(elsewhere, "s") == [*odd, None]

    @promise("P2")
    async def test_equal_chunks_are_all_kept(self, streams: StreamManager) -> None:
        await complete(streams, "s", ["same"] * 5)
        assert await values(streams, "s") == ["same"] * 5 + ["end"]

    @promise("P2")
    async def test_a_chunk_is_stored_when_its_write_returns(self, streams: StreamManager, elsewhere: StreamManager) -> None:
        stream = await streams.open("s")
        for number in range(10):
            await stream.write(number)
            assert (await elsewhere.info("s")).tail == number + 1 == stream.tail

    @promise("P2")
    async def test_a_chunk_that_is_changed_after_the_call_is_stored_as_it_was(self, streams: StreamManager) -> None:
        chunk = {"text": "before"}
        async with streams.open("s") as stream:
            stream.write_soon(chunk)
            chunk["text"] = "after"
            await stream.done(chunk)
        assert await values(streams, "s") == [{"text": "before"}, {"text": "after"}]

    @promise("P2")
    async def test_what_is_not_json_is_refused_and_the_stream_goes_on(self, streams: StreamManager) -> None:
        async with streams.open("s") as stream:
            for value in (object(), float("nan"), "\ud800", {1, object()}):
                with pytest.raises(InvalidArgumentError):
                    await stream.write(value)
            await stream.done("end")
        assert await values(streams, "s") == ["end"]

    @promise("P2")
    async def test_writes_of_many_tasks_are_all_kept_once(self, streams: StreamManager, elsewhere: StreamManager) -> None:
        async with streams.open("s") as stream:
            offsets = await race(50, stream.write)
            await stream.done("end")
        found = await values(elsewhere, "s")
        assert {offset: value for value, offset in enumerate(offsets)} == dict(enumerate(found[:-1]))

    @promise("P3")
    async def test_write_soon_keeps_order_and_needs_no_further_call(
        self, streams: StreamManager, elsewhere: StreamManager
    ) -> None:
        stream = await streams.open("s")
        offsets = [stream.write_soon(number) for number in range(100)]
        with anyio.fail_after(BOUND_SECONDS):
            async with elsewhere.subscribe("s") as events:
                assert [(await anext(events)).chunk for _ in range(100)] == offsets == [*range(100)]

    @promise("P3")
    @pytest.mark.parametrize("end", ["flush", "done", "error", "close"])
    async def test_all_that_ends_a_stream_waits_for_what_was_written_soon(self, streams: StreamManager, end: str) -> None:
        stream = await streams.open("s")
        for number in range(100):
            stream.write_soon(number)
        await (stream.error(ValueError("x")) if end == "error" else getattr(stream, end)())
        async with streams.subscribe("s") as events:
            assert [(await anext(events)).chunk for _ in range(100)] == [*range(100)]

    @promise("P3", "P13")
    async def test_what_write_soon_may_be_ahead_is_bounded(self, open_manager: OpenManager) -> None:
        async with open_manager(limits=Limits(max_queued_events=3)) as streams, streams.open("s") as stream:
            for number in range(3):
                stream.write_soon(number)
            with pytest.raises(LimitExceededError):
                stream.write_soon("refused")
            await stream.done("end")
            assert await values(streams, "s") == [0, 1, 2, "end"]

    @promise("P3")
    async def test_a_failure_of_write_soon_is_not_swallowed(self, streams: StreamManager, elsewhere: StreamManager) -> None:
        for end in ("flush", "done", "close"):
            stream = await streams.open(end)
            await elsewhere.cancel(end)
            try:
                stream.write_soon("lost")
            except StreamCompletedError:
                continue
            with pytest.raises(StreamCompletedError):
                await getattr(stream, end)()

    # -- ends

    @promise("P4")
    @pytest.mark.parametrize("end", ["done", "error", "close"])
    async def test_after_its_end_a_writer_is_closed(self, streams: StreamManager, end: str) -> None:
        stream = await streams.open("s")
        await (stream.error(ValueError("x")) if end == "error" else getattr(stream, end)())
        for call in (lambda: stream.write("late"), stream.done, lambda: stream.error(ValueError("late"))):
            with pytest.raises(StreamInputClosedError):
                await call()
        with pytest.raises(StreamInputClosedError):
            stream.write_soon("late")
        await stream.close()
        assert (await streams.info("s")).tail == (0 if end == "close" else 1)

    @promise("P4")
    async def test_of_many_who_complete_a_stream_exactly_one_does(self, streams: StreamManager) -> None:
        stream = await streams.open("s")
        outcomes = await race(10, stream.done)
        assert sum(outcome is None for outcome in outcomes) == 1
        assert len(await replay(streams, "s")) == 1

    @promise("P4", "P7")
    async def test_a_writer_whose_stream_was_cancelled_is_told_so(
        self, streams: StreamManager, elsewhere: StreamManager
    ) -> None:
        stream = await streams.open("s")
        await elsewhere.cancel("s")
        with pytest.raises(StreamCompletedError):
            await stream.write("late")
        with pytest.raises(StreamCompletedError):
            await stream.done()

    @promise("P4")
    async def test_a_writer_that_was_taken_over_from_cannot_write(self, streams: StreamManager, mortal: "Mortal") -> None:
        stream = await mortal.streams.open("s")
        await stream.write("first")
        mortal.die()
        successor = await resumed(streams, "s")
        mortal.come_back()
        with pytest.raises(StreamTakenOverError):
            await stream.write("stale")
        with pytest.raises(StreamTakenOverError):
            await stream.done("stale")
        await successor.done("end")
        assert await values(streams, "s") == ["first", "end"]

    @promise("P4")
    async def test_a_writer_whose_stream_was_deleted_is_told_so(self, streams: StreamManager, elsewhere: StreamManager) -> None:
        stream = await streams.open("s")
        await elsewhere.delete("s")
        with pytest.raises(StreamNotFoundError):
            await stream.write("late")

    @promise("P15")
    async def test_an_exception_is_shown_as_internal_and_arrives_bare(
        self, streams: StreamManager, elsewhere: StreamManager
    ) -> None:
        error = ValueError("postgres://user:secret@db")
        with pytest.raises(ValueError, match="secret") as raised:
            async with streams.open("s"):
                raise error
        shown = (await replay(elsewhere, "s"))[0].error
        assert raised.value is error
        assert (shown.status, shown.message, shown.details) == ("INTERNAL", "internal", None)

    @promise("P15")
    async def test_a_public_error_is_shown_with_its_status(self, streams: StreamManager, elsewhere: StreamManager) -> None:
        async with streams.open("s") as stream:
            await stream.write("first")
            await stream.error(PublicError("RESOURCE_EXHAUSTED", "try later", {"after": 5}))
        events = await replay(elsewhere, "s")
        shown = events[1].error
        assert (events[0].chunk, events[1].type) == ("first", StreamEventType.ERROR)
        assert (shown.status, shown.message, shown.details) == ("RESOURCE_EXHAUSTED", "try later", {"after": 5})
        assert (await elsewhere.info("s")).error == "RESOURCE_EXHAUSTED"

    # -- letting go, dying, taking over

    @promise("P5")
    async def test_after_close_another_writer_goes_on_where_the_log_ends(
        self, streams: StreamManager, elsewhere: StreamManager
    ) -> None:
        first = await streams.open("s")
        await first.write("a")
        await first.close()
        second = await elsewhere.open("s", resume=True)
        assert second.tail == 1
        assert await second.write("b") == 1
        await second.done("end")
        assert await values(streams, "s") == ["a", "b", "end"]

    @promise("P5")
    async def test_leaving_the_block_without_done_or_by_cancellation_releases_the_stream(
        self, streams: StreamManager, elsewhere: StreamManager
    ) -> None:
        async with streams.open("s") as stream:
            await stream.write("a")
        with anyio.CancelScope() as scope:
            async with elsewhere.open("s", resume=True) as stream:
                await stream.write("b")
                scope.cancel()
                await checkpoint()
        assert (await streams.open("s", resume=True)).tail == 2

    @promise("P5")
    async def test_a_living_writer_is_not_taken_over_from(self, streams: StreamManager, elsewhere: StreamManager) -> None:
        stream = await streams.open("s")
        with pytest.raises(StreamBusyError) as busy:
            await elsewhere.open("s", resume=True)
        assert 0 < busy.value.retry_after <= 10
        assert await stream.write("a") == 0

    @promise("P5")
    async def test_resuming_creates_what_is_not_there_and_refuses_what_has_ended(self, streams: StreamManager) -> None:
        async with streams.open("s", resume=True) as stream:
            await stream.done()
        with pytest.raises(StreamCompletedError):
            await streams.open("s", resume=True)

    @promise("P5", "P8")
    async def test_a_subscriber_follows_from_one_writer_to_the_next(
        self, streams: StreamManager, elsewhere: StreamManager
    ) -> None:
        stream = await streams.open("s")
        async with streams.subscribe("s") as events:
            await stream.write("a")
            assert await next_of(events) == "a"
            await stream.close()
            successor = await elsewhere.open("s", resume=True)
            await successor.write("b")
            assert await next_of(events) == "b"
            await successor.done("end")
            assert await next_of(events) == "end"

    @promise("P6")
    async def test_of_many_who_take_over_exactly_one_wins(self, streams: StreamManager, elsewhere: StreamManager) -> None:
        await (await streams.open("s")).close()
        outcomes = await race(10, lambda number: (streams, elsewhere)[number % 2].open("s", resume=True).__aenter__())
        assert sum(isinstance(outcome, StreamInput) for outcome in outcomes) == 1
        assert sum(isinstance(outcome, StreamBusyError) for outcome in outcomes) == 9

    @promise("P6")
    async def test_a_dead_writers_stream_is_ended_by_its_subscribers(self, streams: StreamManager, mortal: "Mortal") -> None:
        stream = await mortal.streams.open("s")
        await stream.write("a")
        mortal.die()
        events = await replay(streams, "s")
        assert [event.offset for event in events] == [0, 1]
        assert events[1].error.status == "ABORTED"
        mortal.come_back()
        with pytest.raises(StreamCompletedError):
            await stream.write("late")

    @promise("P6")
    async def test_a_dead_writers_stream_is_ended_by_whoever_asks_for_it(
        self, streams: StreamManager, mortal: "Mortal"
    ) -> None:
        stream = await mortal.streams.open("s")
        mortal.die()
        with anyio.fail_after(BOUND_SECONDS):
            while (await streams.info("s")).status == "open":  # noqa: ASYNC110 - whoever asks is not told when to ask again
                await anyio.sleep(BRIEF.total_seconds() / 10)
        assert (await streams.info("s")).error == "ABORTED"
        assert stream.tail == 0

    @promise("P6")
    async def test_a_living_writer_is_not_declared_dead_however_long_it_is_silent(
        self, streams: StreamManager, mortal: "Mortal"
    ) -> None:
        stream = await mortal.streams.open("s")
        async with streams.subscribe("s", idle_timeout=3 * BRIEF) as events:
            with pytest.raises(StreamTimeoutError):
                await next_of(events)
            await stream.done("end")
            assert await next_of(events) == "end"

    # -- cancelling and deleting

    @promise("P7")
    async def test_cancelling_ends_the_stream_for_writer_and_readers(
        self, streams: StreamManager, elsewhere: StreamManager
    ) -> None:
        stream = await streams.open("s")
        await stream.write("a")
        async with streams.subscribe("s") as events:
            assert await next_of(events) == "a"
            assert await elsewhere.cancel("s") is True
            assert await next_of(events) == "CANCELLED"
        with anyio.fail_after(BOUND_SECONDS):
            await stream.cancelled.wait()
        assert await elsewhere.cancel("s") is False
        assert await values(elsewhere, "s") == ["a", "CANCELLED"]

    @promise("P21")
    async def test_cancelling_a_stream_by_its_life_ends_no_later_one_under_its_id(self, streams: StreamManager) -> None:
        await streams.open("s")
        life = (await streams.info("s")).life
        await streams.delete("s")
        with pytest.raises(StreamNotFoundError):
            await streams.cancel("s", life=life)
        await streams.open("s")
        with pytest.raises(StreamNotFoundError):
            await streams.cancel("s", life=life)
        later = await streams.info("s")
        assert later.status == "open"
        assert await streams.cancel("s", life=later.life) is True

    @promise("P7")
    async def test_cancelling_a_writer_that_never_stops_writing_comes_to_an_end(
        self, streams: StreamManager, elsewhere: StreamManager
    ) -> None:
        stream = await streams.open("s")
        started = anyio.Event()

        async def write() -> None:
            while isinstance(await attempt(stream.write, "a"), int):
                started.set()

        with anyio.fail_after(BOUND_SECONDS):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(write)
                await started.wait()
                await elsewhere.cancel("s")
        assert (await elsewhere.info("s")).error == "CANCELLED"

    @promise("P7")
    async def test_a_completed_stream_is_not_cancelled_any_more(self, streams: StreamManager, elsewhere: StreamManager) -> None:
        await complete(streams, "s", [])
        assert await elsewhere.cancel("s") is False
        assert await values(elsewhere, "s") == ["end"]

    @promise("P8")
    async def test_a_deleted_stream_is_gone_for_those_who_follow_it(
        self, streams: StreamManager, elsewhere: StreamManager
    ) -> None:
        stream = await streams.open("s")
        await stream.write("old")
        async with streams.subscribe("s") as events:
            assert await next_of(events) == "old"
            await elsewhere.delete("s")
            await complete(elsewhere, "s", ["new"] * 3)
            with pytest.raises(StreamNotFoundError):
                await next_of(events)
        assert await values(streams, "s") == ["new"] * 3 + ["end"]

    # -- reading

    @promise("P8")
    async def test_what_is_not_there_is_not_found(self, streams: StreamManager) -> None:
        for call in (streams.info, streams.cancel, streams.delete):
            with pytest.raises(StreamNotFoundError):
                await call("s")
        with pytest.raises(StreamNotFoundError):
            await values(streams, "s")

    @promise("P8")
    @pytest.mark.parametrize("count", [0, 1, 99, 100, 101, 300])
    async def test_a_completed_stream_of_any_length_is_replayed_and_does_not_block_the_manager(
        self, streams: StreamManager, elsewhere: StreamManager, count: int
    ) -> None:
        await complete(streams, "s", [*range(count)])
        for manager in (streams, elsewhere):
            assert await values(manager, "s") == [*range(count), "end"]
        await streams.sweep()
        await complete(streams, "other", [])

    @promise("P3", "P8")
    async def test_a_hundred_thousand_chunks_are_replayed(self, streams: StreamManager, elsewhere: StreamManager) -> None:
        async with streams.open("s") as stream:
            for number in range(100_000):
                stream.write_soon(number)
                if number % 10_000 == 9_999:
                    await stream.flush()
            await stream.done("end")
        seen = 0
        async with elsewhere.subscribe("s") as events:
            while batch := await events.batch():
                assert [event.offset for event in batch] == [*range(seen, seen + len(batch))]
                assert batch[0].data == (b"%d" % seen if seen < 100_000 else b'"end"')
                seen += len(batch)
        assert seen == 100_001

    @promise("P8")
    async def test_a_failed_stream_is_replayed_with_its_error(self, streams: StreamManager, elsewhere: StreamManager) -> None:
        async with streams.open("s") as stream:
            await stream.write("a")
            await stream.error(PublicError("NOT_FOUND", "no such model"))
        assert await values(elsewhere, "s") == ["a", "NOT_FOUND"]

    @promise("P8")
    async def test_after_gives_exactly_what_was_missed(self, streams: StreamManager, elsewhere: StreamManager) -> None:
        await complete(streams, "s", [*range(20)])
        for after in range(21):
            assert await values(elsewhere, "s", after) == [*range(after + 1, 20), "end"][: 20 - after]
        with pytest.raises(OffsetOutOfRangeError):
            await values(elsewhere, "s", 21)
        for odd in (-1, 2**53):
            with pytest.raises(InvalidArgumentError):
                elsewhere.subscribe("s", odd)

    @promise("P8")
    async def test_last_gives_the_newest_of_what_is_stored_and_then_what_comes(
        self, streams: StreamManager, elsewhere: StreamManager
    ) -> None:
        stream = await streams.open("s")
        for number in range(5):
            await stream.write(number)
        for last in (0, 1, 5, 6):
            stored = stream.tail
            async with elsewhere.subscribe("s", last=last) as events:
                assert events.first_offset == max(0, stored - last)
                await stream.write(stored)
                assert [await next_of(events) for _ in range(min(last, stored) + 1)] == [
                    *range(events.first_offset, stored + 1)
                ]
        await stream.done("end")
        async with elsewhere.subscribe("s", last=2) as events:
            assert [value_of(event) async for event in events] == [stream.tail - 2, "end"]
        async with elsewhere.subscribe("s", last=0) as events:
            assert [event async for event in events] == []
        for odd in (-1, 2**53):
            with pytest.raises(InvalidArgumentError):
                elsewhere.subscribe("s", last=odd)
        with pytest.raises(InvalidArgumentError):
            elsewhere.subscribe("s", 1, last=1)

    @promise("P8")
    async def test_who_does_not_follow_gets_what_is_stored_and_waits_for_nothing(
        self, streams: StreamManager, elsewhere: StreamManager
    ) -> None:
        stream = await streams.open("s")
        for number in range(5):
            await stream.write(number)
        for after, last, expected in (
            (None, None, [0, 1, 2, 3, 4]),
            (2, None, [3, 4]),
            (4, None, []),
            (None, 2, [3, 4]),
            (None, 0, []),
        ):
            async with elsewhere.subscribe("s", after, last=last, follow=False) as events:
                with anyio.fail_after(BOUND_SECONDS):
                    assert [value_of(event) async for event in events] == expected
        await stream.done("end")
        async with elsewhere.subscribe("s", 3, follow=False) as events:
            assert [value_of(event) async for event in events] == [4, "end"]

    @promise("P8")
    async def test_a_late_subscriber_gets_what_was_stored_and_then_what_comes(
        self, streams: StreamManager, elsewhere: StreamManager
    ) -> None:
        stream = await streams.open("s")
        for number in range(3):
            await stream.write(number)
        for manager in (streams, elsewhere):
            async with manager.subscribe("s") as events:
                assert [await next_of(events) for _ in range(stream.tail)] == [*range(stream.tail)]
                await stream.write(stream.tail)
                assert await next_of(events) == stream.tail - 1

    @promise("P8")
    async def test_each_chunk_reaches_a_waiting_subscriber(self, streams: StreamManager, elsewhere: StreamManager) -> None:
        stream = await streams.open("s")
        for manager in (streams, elsewhere):
            async with manager.subscribe("s", after=stream.tail - 1 if stream.tail else None) as events:
                for number in range(10):
                    with anyio.fail_after(BOUND_SECONDS):
                        async with anyio.create_task_group() as tasks:
                            tasks.start_soon(write_later, stream, number)
                            assert (await anext(events)).chunk == number

    @promise("P8")
    async def test_unsubscribing_ends_the_subscription_and_hinders_nobody(self, streams: StreamManager) -> None:
        stream = await streams.open("s")
        async with streams.subscribe("s") as stays:
            async with streams.subscribe("s") as leaves:
                await stream.write("a")
                assert await next_of(leaves) == "a"
            await stream.done("end")
            assert [event async for event in leaves] == []
            assert [await next_of(stays), await next_of(stays)] == ["a", "end"]

    @promise("P8")
    async def test_a_cancelled_wait_loses_nothing(self, streams: StreamManager, elsewhere: StreamManager) -> None:
        stream = await streams.open("s")
        async with elsewhere.subscribe("s") as events:
            for number in range(5):
                with anyio.move_on_after(0):
                    await anext(events)
                await stream.write(number)
                assert await next_of(events) == number

    @promise("P9", "P10")
    async def test_many_subscribers_all_get_all(self, streams: StreamManager, elsewhere: StreamManager) -> None:
        stream = await streams.open("s")
        entered: list[int] = []
        all_entered = anyio.Event()
        found: list[list[object]] = []

        async def follow(number: int) -> None:
            async with (streams, elsewhere)[number % 2].subscribe("s") as events:
                entered.append(number)
                if len(entered) == 10:
                    all_entered.set()
                found.append([value_of(event) async for event in events])

        with anyio.fail_after(BOUND_SECONDS):
            async with anyio.create_task_group() as tasks:
                for number in range(10):
                    tasks.start_soon(follow, number)
                await all_entered.wait()
                for number in range(10):
                    await stream.write(number)
                await stream.done("end")
        assert found == [[*range(10), "end"]] * 10

    @promise("P9")
    async def test_a_subscriber_that_reads_nothing_delays_nobody_and_loses_nothing(
        self, streams: StreamManager, elsewhere: StreamManager
    ) -> None:
        stream = await streams.open("s")
        async with elsewhere.subscribe("s") as slow, elsewhere.subscribe("s") as fast:
            for number in range(300):
                await stream.write(number)
                assert await next_of(fast) == number
            await stream.done("end")
            assert [await next_of(slow) for _ in range(301)] == [*range(300), "end"]

    @promise("P9")
    async def test_a_subscriber_that_fails_hinders_nobody(self, streams: StreamManager) -> None:
        stream = await streams.open("s")
        async with streams.subscribe("s") as stays:
            with pytest.raises(ZeroDivisionError):  # noqa: PT012 - it comes out of the block
                async with streams.subscribe("s") as events:
                    await stream.write("a")
                    await next_of(events)
                    raise ZeroDivisionError
            await stream.done("end")
            assert [await next_of(stays), await next_of(stays)] == ["a", "end"]

    @promise("P11")
    async def test_a_reader_may_ask_to_be_told_when_nothing_comes(self, streams: StreamManager) -> None:
        stream = await streams.open("s")
        await stream.write("a")
        async with streams.subscribe("s", idle_timeout=timedelta(0)) as events:
            assert await next_of(events) == "a"
            with pytest.raises(StreamTimeoutError) as told:
                await next_of(events)
        assert told.value.status == "DEADLINE_EXCEEDED"

    # -- keeping

    @promise("P12")
    async def test_a_completed_stream_lives_for_its_ttl_after_completion(
        self, open_storage: Callable[[], Storage], streams: StreamManager, open_later: OpenManager
    ) -> None:
        async with open_storage() as clock, open_later(HOUR, ttl=timedelta(hours=1)) as later:
            before = clock.time()
            await complete(later, "s", [])
            expires_at = (await later.info("s")).expires_at
            assert before + 2 * HOUR - 1 <= expires_at <= clock.time() + 2 * HOUR + 1
        assert (await streams.info("s")).status == "done"

    @promise("P12")
    async def test_a_stream_may_have_a_ttl_of_its_own(self, streams: StreamManager, open_later: OpenManager) -> None:
        for stream, ttl in (("brief", timedelta(seconds=1)), ("long", timedelta(hours=3))):
            async with streams.open(stream, ttl=ttl) as writer:
                await writer.done()
        async with open_later(HOUR) as later:
            assert [info.id for info in await later.list()] == ["long"]
        with pytest.raises(InvalidArgumentError):
            await streams.open("odd", ttl=timedelta(-1))

    @promise("P12")
    async def test_an_open_stream_does_not_expire(self, streams: StreamManager, open_later: OpenManager) -> None:
        stream = await streams.open("s")
        async with open_later(1_000 * HOUR) as later:
            await later.sweep()
            assert (await later.info("s")).status == "open"
        await stream.done("end")
        assert await values(streams, "s") == ["end"]

    @promise("P12")
    async def test_a_sweep_removes_what_has_expired_and_nothing_else(
        self, streams: StreamManager, open_later: OpenManager
    ) -> None:
        await complete(streams, "expires", [])
        stream = await streams.open("open")
        async with open_later(301) as later:
            await later.sweep()
        assert stream.tail == 0
        assert [info.id for info in await streams.list()] == ["open"]

    @promise("P13")
    @pytest.mark.parametrize("stream", ["", "a" * 256, "a/b", ".a", "a\n", "a\0", "a b", "é", "\ud800", None, 7])
    async def test_ids_that_are_refused(self, streams: StreamManager, stream: str) -> None:
        for call in (streams.open, streams.info, streams.cancel, streams.delete):
            with pytest.raises(InvalidArgumentError):
                await call(stream)
        with pytest.raises(InvalidArgumentError):
            streams.subscribe(stream)

    @promise("P13")
    @pytest.mark.parametrize("stream", ["a", "0" * 255, "_~.:@=+-", "flow:ann@example.org"])
    async def test_ids_that_are_taken(self, streams: StreamManager, stream: str) -> None:
        await complete(streams, stream, ["a"])
        assert await values(streams, stream) == ["a", "end"]

    @promise("P13")
    @pytest.mark.parametrize(
        "limits",
        [Limits(max_event_bytes=9), Limits(max_events=1), Limits(max_stream_bytes=20)],
        ids=["event", "events", "bytes"],
    )
    async def test_a_limit_is_told_and_nothing_is_stored_beyond_it(self, open_manager: OpenManager, limits: Limits) -> None:
        async with open_manager(limits=limits) as streams, streams.open("s") as stream:
            await stream.write("a")
            with pytest.raises(LimitExceededError):
                await stream.write("x" * 20)
            await stream.done("end")
            assert await values(streams, "s") == ["a", "end"]

    @promise("P13")
    async def test_list_gives_all_streams_page_by_page(self, streams: StreamManager, elsewhere: StreamManager) -> None:
        ids = [f"s{number:02}" for number in range(25)]
        for stream in ids:
            await complete(streams, stream, [])
        page = await elsewhere.list(limit=10)
        found = [info.id for info in page]
        assert len(found) == 10
        while page.next is not None:
            page = await elsewhere.list(page.next, limit=10)
            found += [info.id for info in page]
        assert found == ids

    # -- keys and runs

    @promise("P23")
    async def test_who_starts_again_what_runs_is_told_what_to_follow(
        self, streams: StreamManager, elsewhere: StreamManager
    ) -> None:
        stream = await streams.open("a", owner="ann", key="chat/ä 1", run="r1")
        for manager in (streams, elsewhere):
            for key, run in (("chat/ä 1", None), (None, "r1"), ("chat/ä 1", "r2"), ("other", "r1")):
                assert await told_of(manager.open("b", owner="ann", key=key, run=run)) == "a"
        await stream.done("end")
        assert await values(elsewhere, "a") == ["end"]
        assert [info.id for info in await elsewhere.list()] == ["a"]

    @promise("P23")
    async def test_what_has_ended_or_is_gone_is_in_nobodys_way_but_a_run_is_made_once(
        self, streams: StreamManager, elsewhere: StreamManager, open_later: OpenManager
    ) -> None:
        for number, manager in enumerate((streams, elsewhere, streams)):
            async with manager.open(f"s{number}", key="chat", run=f"r{number}") as stream:
                await stream.done()
            assert (await elsewhere.current("chat")).id == stream.id
            assert await told_of(elsewhere.open("again", key="chat", run=f"r{number}", replace=True)) == stream.id
        await streams.delete("s2")
        with pytest.raises(StreamNotFoundError):
            await elsewhere.current("chat")
        deleted = await elsewhere.open("s3", key="chat", run="r2")
        await deleted.done()
        async with open_later(301) as later:
            with pytest.raises(StreamNotFoundError):
                await later.current("chat")
            expired = await later.open("s4", key="chat", run="r2")
            assert (await later.current("chat")).id == "s4"
            await expired.done()

    @promise("P23")
    async def test_who_replaces_cancels_what_runs_and_runs(self, streams: StreamManager, elsewhere: StreamManager) -> None:
        old = await streams.open("a", key="chat")
        new = await elsewhere.open("b", key="chat", replace=True)
        with anyio.fail_after(BOUND_SECONDS):
            await old.cancelled.wait()
        assert (await streams.info("a")).error == "CANCELLED"
        assert (await streams.current("chat")).id == "b"
        await new.done("end")
        assert await values(streams, "b") == ["end"]

    @promise("P23")
    @pytest.mark.parametrize("names", ["key", "run", "both"])
    async def test_of_many_who_start_at_once_one_runs(
        self, streams: StreamManager, elsewhere: StreamManager, names: str
    ) -> None:
        options: dict[str, Any] = {name: "chat" for name in ("key", "run") if names in {name, "both"}}
        outcomes = await race(
            20, lambda number: (streams, elsewhere)[number % 2].open(f"s{number}", owner="ann", **options).__aenter__()
        )
        (winner,) = [outcome for outcome in outcomes if isinstance(outcome, StreamInput)]
        told = [outcome.stream for outcome in outcomes if isinstance(outcome, KeyInUseError)]
        assert told == [winner.id] * 19
        assert [info.id for info in await streams.list()] == [winner.id]
        assert [info.id for info in await streams.list(owner="ann")] == [winner.id]

    @promise("P23")
    async def test_of_many_who_replace_at_once_one_runs_in_the_end(
        self, streams: StreamManager, elsewhere: StreamManager
    ) -> None:
        outcomes = await race(
            8, lambda number: (streams, elsewhere)[number % 2].open(f"s{number}", key="chat", replace=True).__aenter__()
        )
        opened = [outcome for outcome in outcomes if isinstance(outcome, StreamInput)]
        assert len(opened) == 8
        (running,) = await elsewhere.list(status="open")
        assert (await streams.current("chat")).id == running.id
        with anyio.fail_after(BOUND_SECONDS):
            for stream in opened:
                if stream.id != running.id:
                    await stream.cancelled.wait()
        (writer,) = [stream for stream in opened if stream.id == running.id]
        assert await writer.write("still mine") == 0

    @promise("P23")
    async def test_a_key_outlives_the_manager_and_a_dead_process_holds_it_for_a_while(
        self, streams: StreamManager, mortal: "Mortal"
    ) -> None:
        stream = await mortal.streams.open("a", owner="ann", key="chat")
        await stream.write("a")
        mortal.die()
        successor = await started(streams, "b", owner="ann", key="chat")
        assert (await streams.info("a")).error == "ABORTED"
        assert (await streams.current("chat", "ann")).id == "b"
        await successor.done("end")
        mortal.come_back()

    @promise("P23")
    async def test_a_stream_that_is_gone_on_with_keeps_its_key(self, streams: StreamManager, open_manager: OpenManager) -> None:
        async with open_manager(grace=LONG) as before:
            await before.open("a", owner="ann", key="chat")
        stream = await streams.open("a", resume=True)
        info = await streams.current("chat", "ann")
        assert (info.id, info.owner, info.key, info.status) == ("a", "ann", "chat", "open")
        await stream.done()
        assert [info.id for info in await streams.list(owner="ann", key_prefix="ch")] == ["a"]

    # -- going on when a writer has died

    @promise("P24")
    async def test_a_dead_writers_stream_is_gone_on_with_behind_its_checkpoint(
        self, streams: StreamManager, elsewhere: StreamManager, mortal: "Mortal"
    ) -> None:
        stream = await mortal.streams.open("s", owner="ann", recovery=at_once("go", {"question": "why"}))
        await stream.write("a", checkpoint={"after": 1})
        found: list[object] = []
        async with elsewhere.subscribe("s") as events, anyio.create_task_group() as tasks:
            tasks.start_soon(take_all, events, found)
            mortal.die()
            successor = await gone_on_with(streams, "go")
            assert (await elsewhere.info("s")).attempt == successor.attempt == 1
            assert (successor.id, successor.checkpoint, successor.tail) == ("s", {"after": 1}, 2)
            assert successor.recovery == at_once("go", {"question": "why"})
            assert successor.metadata == {"owner": "ann"}
            await successor.write("b")
            await successor.done("end")
        assert found == ["a", ("recovering", 1), "b", "end"]
        mortal.come_back()
        with pytest.raises((StreamTakenOverError, StreamCompletedError)):
            await stream.write("late")

    @promise("P24")
    async def test_a_stream_that_is_released_is_gone_on_with_at_once_and_no_death_is_counted(
        self, streams: StreamManager, open_manager: OpenManager
    ) -> None:
        async with open_manager(grace=LONG) as before:
            stream = await before.open("s", recovery=Recovery("go", attempts=1, backoff=LONG))
            await stream.write("a")
        successor = await gone_on_with(streams, "go")
        assert (successor.attempt, successor.checkpoint, successor.recovery) == (
            0,
            None,
            Recovery("go", attempts=1, backoff=LONG),
        )
        await successor.done("end")
        assert await values(streams, "s") == ["a", ("recovering", 0), "end"]

    @promise("P24")
    async def test_of_all_who_ask_one_goes_on_with_a_stream(
        self, streams: StreamManager, elsewhere: StreamManager, open_manager: OpenManager
    ) -> None:
        async with open_manager(grace=LONG) as before:
            for number in range(20):
                await before.open(f"s{number}", recovery=at_once("go" if number else "another"))
        got: list[str] = []
        async with anyio.create_task_group() as tasks:

            async def go_on(manager: StreamManager) -> None:
                async with manager.recoveries("go") as lost:
                    async for stream in lost:
                        got.append(stream.id)
                        await stream.done()
                        if len(got) == 19:
                            tasks.cancel_scope.cancel()

            tasks.cancel_scope.deadline = anyio.current_time() + BOUND_SECONDS
            for number in range(4):
                tasks.start_soon(go_on, (streams, elsewhere)[number % 2])
        assert sorted(got) == sorted(f"s{number}" for number in range(1, 20))
        assert (await streams.info("s0")).is_recovering
        with anyio.move_on_after(BRIEF.total_seconds()):
            await gone_on_with(streams, "go")
            raise AssertionError("nothing is left to go on with")

    @promise("P24")
    async def test_nobody_goes_on_with_what_has_ended_meanwhile(
        self, streams: StreamManager, open_manager: OpenManager
    ) -> None:
        async with open_manager(grace=LONG) as before:
            for stream in ("cancelled", "deleted", "resumed", "left"):
                await before.open(stream, recovery=at_once("go", stream))
        assert await streams.cancel("cancelled")
        await streams.delete("deleted")
        resumed = await streams.open("resumed", resume=True)
        assert resumed.recovery == at_once("go", "resumed")
        left = await gone_on_with(streams, "go")
        assert left.id == "left"
        with anyio.move_on_after(BRIEF.total_seconds()):
            await gone_on_with(streams, "go")
            raise AssertionError("nothing is left to go on with")
        assert await values(streams, "cancelled") == [("recovering", 0), "CANCELLED"]

    @promise("P24")
    async def test_a_stream_that_nobody_goes_on_with_ends_in_time(
        self, streams: StreamManager, open_manager: OpenManager, open_later: OpenManager
    ) -> None:
        async with open_manager() as before:
            await before.open("s", recovery=Recovery("go", within=timedelta(minutes=5)))
        async with open_later(299 - 10) as later:
            assert (await later.info("s")).is_recovering
        async with open_later(301) as later:
            assert (await later.info("s")).error == "ABORTED"
        assert await values(streams, "s") == [("recovering", 0), "ABORTED"]

    @promise("P25")
    async def test_a_checkpoint_is_stored_with_its_chunk_and_forgotten_by_a_restart(
        self, streams: StreamManager, elsewhere: StreamManager
    ) -> None:
        stream = await streams.open("s", recovery=at_once("go"))
        stream.write_soon("a", checkpoint=1)
        stream.write_soon("b", checkpoint=[2])
        stream.write_soon("c")
        await stream.flush()
        assert stream.checkpoint == [2]
        await stream.save_checkpoint({"three": 3})
        assert (stream.checkpoint, stream.tail) == ({"three": 3}, 3)
        await stream.restart()
        assert stream.checkpoint is None
        await stream.write("d")
        await stream.done("end")
        assert await values(elsewhere, "s") == ["a", "b", "c", "restarted", "d", "end"]
        assert (await elsewhere.info("s")).superseded == 3
        async with elsewhere.subscribe("s", superseded=False) as events:
            assert [value_of(event) async for event in events] == ["restarted", "d", "end"]
        async with elsewhere.subscribe("s", 0, superseded=False) as events:
            assert [value_of(event) async for event in events] == ["b", "c", "restarted", "d", "end"]

    @promise("P25")
    @pytest.mark.parametrize("checkpoint", [object(), "a" * 5_000, float("nan")])
    async def test_what_is_no_checkpoint_is_refused_and_its_chunk_with_it(
        self, streams: StreamManager, checkpoint: object
    ) -> None:
        stream = await streams.open("s", recovery=at_once("go"))
        for write in (stream.write, stream.write_soon):
            with pytest.raises(InvalidArgumentError):
                write("a", checkpoint=checkpoint)
        with pytest.raises(InvalidArgumentError):
            await stream.save_checkpoint(checkpoint)
        await stream.done("end")
        assert await values(streams, "s") == ["end"]

    @promise("P24")
    async def test_what_is_no_recovery_is_refused(self, streams: StreamManager) -> None:
        for recovery in (
            Recovery(""),
            Recovery("a" * 256),
            Recovery("\ud800"),
            Recovery("go", attempts=0),
            Recovery("go", backoff=-BRIEF),
            Recovery("go", within=timedelta(0)),
            Recovery("go", object()),
            Recovery("go", "a" * 70_000),
        ):
            with pytest.raises(InvalidArgumentError):
                await streams.open("s", recovery=recovery)
        for names in ((), ("",)):
            with pytest.raises(InvalidArgumentError):
                streams.recoveries(*names)

    @promise("P23")
    async def test_names_go_with_their_streams_and_no_sooner(
        self, open_storage: Callable[[], Storage], streams: StreamManager, open_later: OpenManager
    ) -> None:
        stream = await streams.open("open", owner="ann", key="open", run="open")
        async with streams.open("done", owner="ann", key="done", run="done") as ended:
            await ended.done()
        async with open_later(301) as later:
            await later.sweep()
        async with open_storage() as storage:
            reserved = [id for id, _ in await storage.scan("", 100) if id.startswith((".key.", ".own.", ".run."))]
        assert len(reserved) == 3
        assert [info.id for info in await streams.list(owner="ann")] == ["open"]
        assert (await streams.current("open", "ann")).id == "open"
        await stream.done()

    @promise("P23")
    async def test_streams_are_found_by_owner_key_prefix_and_status_page_by_page(
        self, streams: StreamManager, elsewhere: StreamManager
    ) -> None:
        for number in range(12):
            for owner in ("ann", "bob"):
                async with streams.open(f"{owner}{number:02}", owner=owner, key=f"chat/{number % 4}") as stream:
                    await stream.done()
        running = await streams.open("annrunning", owner="ann", key="other")

        async def all_of(**wanted: Any) -> list[str]:  # noqa: ANN401 - what `list` takes
            page = await elsewhere.list(limit=3, **wanted)
            found = [info.id for info in page]
            while page.next is not None:
                page = await elsewhere.list(page.next, limit=3, **wanted)
                found += [info.id for info in page]
            return found

        assert await all_of(owner="ann") == [*(f"ann{number:02}" for number in range(12)), "annrunning"]
        assert await all_of(owner="ann", key_prefix="chat/") == ["ann08", "ann09", "ann10", "ann11"]
        assert await all_of(owner="ann", key_prefix="") == ["ann08", "ann09", "ann10", "ann11", "annrunning"]
        assert await all_of(owner="ann", status="open") == await all_of(status="open") == ["annrunning"]
        assert await all_of(owner="eve") == await all_of(key_prefix="chat/") == await all_of(owner="") == []
        assert len(await all_of()) == 25
        await running.done()

    # -- closing

    @promise("P14")
    async def test_closing_tells_waiting_subscribers_and_writers_and_may_be_repeated(
        self, streams: StreamManager, open_manager: OpenManager
    ) -> None:
        async with open_manager() as manager:
            stream = await manager.open("s")
            outcomes: list[object] = []

            async def wait() -> None:
                outcomes.append(await attempt(events.__anext__))

            with anyio.fail_after(BOUND_SECONDS):
                async with manager.subscribe("s") as events, anyio.create_task_group() as tasks:
                    tasks.start_soon(wait)
                    await anyio.wait_all_tasks_blocked()
                    await race(3, lambda _: manager.aclose())
            assert isinstance(outcomes[0], StreamManagerClosedError)
            assert stream.cancelled.is_set()
            for call in (lambda: manager.open("t"), lambda: manager.info("s"), lambda: stream.write("late")):
                with pytest.raises(StreamManagerClosedError):
                    await call()
        assert (await streams.open("s", resume=True)).tail == 0

    @promise("P14")
    async def test_what_leaves_the_managers_block_arrives_bare(self, open_manager: OpenManager) -> None:
        with pytest.raises(ZeroDivisionError):  # noqa: PT012 - it comes out of the block
            async with open_manager() as manager:
                await manager.open("s")
                raise ZeroDivisionError


@dataclass(frozen=True, slots=True)
class Mortal:
    """A process that can be killed: from then on it does nothing that others could see. Whether it knows is another matter."""

    streams: StreamManager
    storage: FaultyStorage

    def die(self) -> None:
        """Do nothing more that others could see."""
        self.storage.is_down = True

    def come_back(self) -> None:
        """Go on, as a process that was stopped for long."""
        self.storage.is_down = False


def at_once(name: str, input: object = None) -> Recovery:
    """Give a recovery that waits for nothing."""
    return Recovery(name, input, backoff=timedelta(0))


async def gone_on_with(streams: StreamManager, name: str) -> StreamInput:
    """Take over the next stream that is to be gone on with."""
    with anyio.fail_after(BOUND_SECONDS):
        async with streams.recoveries(name) as lost:
            return await anext(lost)


async def take_all(events: Subscription[Any], found: list[object]) -> None:
    """Note what all events carry."""
    async for event in events:
        found.append(value_of(event))  # noqa: PERF401 - it is looked at while it grows


async def resumed(streams: StreamManager, stream: str) -> StreamInput:
    """Take a stream over as soon as that is allowed."""
    with anyio.fail_after(BOUND_SECONDS):
        while True:
            try:
                return await streams.open(stream, resume=True)
            except StreamBusyError as busy:
                await anyio.sleep(busy.retry_after)


async def started(streams: StreamManager, stream: str, *, owner: str, key: str) -> StreamInput:
    """Start under a key as soon as nothing runs there."""
    with anyio.fail_after(BOUND_SECONDS):
        while True:
            try:
                return await streams.open(stream, owner=owner, key=key)
            except KeyInUseError:
                await anyio.sleep(0.1)


async def told_of(opening: Awaitable[object]) -> str:
    """Give the stream that whoever starts is told of."""
    with pytest.raises(KeyInUseError) as told:
        await opening
    return told.value.stream


async def complete(streams: StreamManager, stream: str, chunks: Sequence[object], *, output: object = "end") -> None:
    """Write a whole stream."""
    async with streams.open(stream) as writer:
        for chunk in chunks:
            await writer.write(chunk)
        await writer.done(output)


async def write_later(stream: StreamInput, chunk: object) -> None:
    """Write once everybody else waits."""
    await anyio.wait_all_tasks_blocked()
    await stream.write(chunk)


async def replay(streams: StreamManager, stream: str, after: int | None = None) -> list[StreamEvent[Any]]:
    """Give all events up to the terminal one."""
    with anyio.fail_after(BOUND_SECONDS):
        async with streams.subscribe(stream, after) as events:
            return [event async for event in events]


async def values(streams: StreamManager, stream: str, after: int | None = None) -> list[object]:
    """Give what all events carry, up to the terminal one."""
    return [value_of(event) for event in await replay(streams, stream, after)]


async def next_of(events: Subscription[Any]) -> object:
    """Wait for one event, and give what it carries."""
    with anyio.fail_after(BOUND_SECONDS):
        return value_of(await anext(events))


def value_of(event: StreamEvent[Any]) -> object:
    """Give what an event carries: the chunk, the output, or the error's status."""
    match event.type:
        case StreamEventType.CHUNK:
            return event.chunk
        case StreamEventType.DONE:
            return event.output
        case StreamEventType.ERROR:
            return event.error.status
        case StreamEventType.RECOVERING:
            return ("recovering", event.attempt)
        case StreamEventType.RESTARTED:
            return "restarted"


async def attempt(call: Callable[..., Awaitable[object]], *arguments: object) -> object:
    """Give what it gives, or the error that it raises."""
    try:
        return await call(*arguments)
    except StreamkeepError as error:
        return error


async def race(count: int, call: Callable[[int], Awaitable[object]]) -> list[object]:
    """Make so many calls at once, and give their outcomes. None begins before all are ready."""
    outcomes: list[object] = [None] * count
    ready: list[int] = []
    start = anyio.Event()

    async def run(number: int) -> None:
        ready.append(number)
        await start.wait()
        outcomes[number] = await attempt(call, number)

    with anyio.fail_after(BOUND_SECONDS):
        async with anyio.create_task_group() as tasks:
            for number in range(count):
                tasks.start_soon(run, number)
            await anyio.wait_all_tasks_blocked()
            assert len(ready) == count
            start.set()
    return outcomes
