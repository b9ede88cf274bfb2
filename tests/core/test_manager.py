import contextlib
import math
import re
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any
from unittest.mock import AsyncMock, patch

import anyio
import pytest
from anyio import wait_all_tasks_blocked
from anyio.lowlevel import checkpoint
from tests.core.helpers import Process, core_of, replay, resumed, running_of

import streamkeep
from streamkeep import (
    InMemoryStreamManager,
    InvalidArgumentError,
    LimitExceededError,
    Limits,
    RemoteStreamManager,
    StorageCorruptError,
    StorageError,
    StorageFullError,
    StreamAlreadyExistsError,
    StreamBusyError,
    StreamCompletedError,
    StreamInput,
    StreamkeepError,
    StreamManager,
    StreamManagerClosedError,
    StreamNotFoundError,
)
from streamkeep._core import LOOK_SECONDS
from streamkeep._feed import PAGE_RECORDS
from streamkeep._lifecycle import Beginning, begin, grow, session_id, session_of
from streamkeep._running import UNDO_PAUSES
from streamkeep.storage import Head, Page
from streamkeep.storages.memory import MemoryStorage
from streamkeep.testing.faults import FaultyStorage

Clock = Callable[[], float]


class LateStorage(FaultyStorage):
    """Its held commits may take effect when whoever asked for them has gone, as with a thread or a network between.

    Attributes:
        takes_effect: when what is asked for while `is_late` takes effect: `before` the answer, `later` (at `happen`) or `never`.
    """

    def __init__(self, memory: MemoryStorage) -> None:
        super().__init__(memory)
        self.memory = memory
        self.takes_effect = "never"
        self.is_late = False
        self._late: list[tuple[str, int | None, Head, Sequence[bytes]]] = []

    async def commit(self, stream: str, seen: int | None, head: Head, records: Sequence[bytes] = ()) -> bool:
        is_doubtful = self.is_late and not stream.startswith(".")
        if is_doubtful and self.takes_effect == "later":
            self._late.append((stream, seen, head, records))
        if is_doubtful and self.takes_effect == "before":
            await self.memory.commit(stream, seen, head, records)
        return await super().commit(stream, seen, head, records)

    def happen(self) -> None:
        """Let take effect what was asked for."""
        for late in self._late:
            with contextlib.suppress(StopIteration):
                self.memory.commit(*late).send(None)
        self._late.clear()


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
    assert info.updated_at == pytest.approx(began + 1, abs=0.001)
    assert info.session == core_of(streams).session.name
    assert info.expires_at == began + 86_400


async def test_list_gives_living_streams_page_by_page(
    streams: StreamManager, elsewhere: StreamManager, storage: FaultyStorage
) -> None:
    for number in range(250):
        await (await streams.open(f"s{number:03}")).done()
    await anyio.sleep(299)
    for number in range(0, 250, 2):
        await streams.delete(f"s{number:03}")
        await streams.open(f"s{number:03}")
    storage.ahead_seconds = 2
    storage.calls.clear()
    first = await elsewhere.list(limit=100)
    second = await elsewhere.list(first[-1].id, limit=100)

    assert [info.id for info in (*first, *second)] == [f"s{number:03}" for number in range(0, 250, 2)]
    assert len(first) == 100
    assert storage.calls["scan"] <= 6
    assert storage.calls["read"] == 0


async def test_everything_public_is_exported() -> None:
    assert all(hasattr(streamkeep, name) for name in streamkeep.__all__)
    assert sorted(streamkeep.__all__) == streamkeep.__all__


# Heads that cannot be read


async def spoil(storage: FaultyStorage, stream: str, state: bytes = b'{"version":9}', expires_at: float = math.inf) -> None:
    """Let a head be damaged, or that of a newer version."""
    page = await storage.read(stream)
    if page is None:
        assert await storage.commit(stream, None, Head(1, 0, state, expires_at))
    else:
        seen = page.head.version
        assert await storage.commit(stream, seen, Head(seen + 1, page.head.tail, state, expires_at))


@pytest.mark.parametrize("state", [b"?", b'{"version":9}', b""])
@pytest.mark.promise("P17")
async def test_a_head_that_cannot_be_read_is_told_and_hinders_nobody(
    streams: StreamManager, storage: FaultyStorage, state: bytes
) -> None:
    for stream in "abc":
        await streams.open(stream)
    await spoil(storage, "b", state)

    assert [(info.id, info.status) for info in await streams.list()] == [("a", "open"), ("b", "unreadable"), ("c", "open")]
    for call in (streams.info, streams.cancel, lambda stream: streams.open(stream, resume=True)):
        with pytest.raises(StorageCorruptError, match="newer version"):
            await call("b")
    with pytest.raises(StreamAlreadyExistsError):
        await streams.open("b")
    with pytest.raises(StorageCorruptError):
        await streams.subscribe("b").__aenter__()
    await streams.sweep()
    await streams.delete("b")
    assert (await streams.open("b")).tail == 0


async def test_a_writer_whose_head_cannot_be_read_is_told_and_its_stream_left_to_whoever_can(
    streams: StreamManager, storage: FaultyStorage
) -> None:
    writing, quiet = await streams.open("a"), await streams.open("b")
    for stream in "ab":
        await spoil(storage, stream)

    for _ in range(2):
        with pytest.raises(StorageCorruptError, match="newer version"):
            await writing.write("late")
    core_of(streams).look("b")
    await quiet.cancelled.wait()
    with pytest.raises(StorageCorruptError, match="newer version"):
        await quiet.done()
    assert writing.cancelled.is_set()


async def test_a_head_that_cannot_be_read_is_listed_with_what_is_known(streams: StreamManager, storage: FaultyStorage) -> None:
    stream = await streams.open("s")
    await stream.write("a")
    before = await streams.info("s")
    await spoil(storage, "s")
    (info,) = await streams.list()

    assert (info.status, info.error, info.tail, info.session, info.metadata) == ("unreadable", "DATA_LOSS", 1, "", {})
    assert info.updated_at == pytest.approx(before.updated_at, abs=1)


async def test_a_head_that_cannot_be_read_is_not_deleted_as_one_life_of_it(
    streams: StreamManager, storage: FaultyStorage
) -> None:
    await streams.open("s")
    before = await streams.info("s")
    await spoil(storage, "s")

    with pytest.raises(StorageCorruptError):
        await streams.delete("s", life=before.life)
    assert await storage.read("s") is not None


@pytest.mark.parametrize("wrong", [{"ttl": 30}, {"lease": 10.0}])
def test_a_number_for_a_duration_is_refused_by_name(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(TypeError, match=f"`{name}` is a timedelta"):
        StreamManager(MemoryStorage(), **wrong)


async def test_a_head_that_cannot_be_read_may_be_deleted_by_several_at_once(
    streams: StreamManager, storage: FaultyStorage
) -> None:
    await spoil(storage, "s")
    await wait_all_tasks_blocked()
    storage.skip("read")
    hold = storage.hold("read")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(streams.delete, "s")
        await hold.reached.wait()
        await streams.delete("s")
        hold.release()

    assert not await streams.list()


# Opening


@pytest.mark.promise("P1")
async def test_an_expired_stream_counts_as_absent_at_once_and_its_id_is_free(
    streams: StreamManager, storage: FaultyStorage
) -> None:
    stream = await streams.open("s")
    await stream.write("old")
    await stream.done()
    await streams.open("open")
    storage.ahead_seconds = 300
    for call in (streams.info, streams.cancel, streams.delete):
        with pytest.raises(StreamNotFoundError):
            await call("s")
    with pytest.raises(StreamNotFoundError):
        async with streams.subscribe("s"):
            pytest.fail("entered")
    assert [info.id for info in await streams.list()] == ["open"]

    assert (await streams.open("s")).tail == 0


@pytest.mark.promise("P1")
async def test_of_many_who_open_an_id_exactly_one_wins(
    streams: StreamManager, elsewhere: StreamManager, storage: FaultyStorage
) -> None:
    await (await streams.open("first-of-one")).done()
    await (await elsewhere.open("first-of-the-other")).done()
    await wait_all_tasks_blocked()
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
async def test_of_many_who_take_over_exactly_one_wins(memory: MemoryStorage) -> None:
    class Meeting(FaultyStorage):
        """Where ten who have seen the same head wait for one another, before they commit."""

        came = 0
        all_are_there = anyio.Event()

        async def commit(self, stream: str, seen: int | None, head: Head, records: Sequence[bytes] = ()) -> bool:
            if stream == "s" and seen == released and self.came < 10:
                self.came += 1
                if self.came == 10:
                    self.all_are_there.set()
                await self.all_are_there.wait()
            return await super().commit(stream, seen, head, records)

    results: list[object] = []
    released = -1
    storage = Meeting(memory)
    async with StreamManager(storage) as streams, StreamManager(storage) as elsewhere:
        async with streams.open("s") as stream:
            await stream.write("a")
        page = await memory.read("s")
        assert page is not None
        released = page.head.version

        async def rival(number: int) -> None:
            try:
                results.append(await (streams, elsewhere)[number % 2].open("s", resume=True))
            except StreamBusyError as error:
                results.append(error)

        with anyio.fail_after(1):
            async with anyio.create_task_group() as tasks:
                for number in range(10):
                    tasks.start_soon(rival, number)

    assert sum(isinstance(result, StreamInput) for result in results) == 1
    assert sum(isinstance(result, StreamBusyError) for result in results) == 9


@pytest.mark.promise("P1")
@pytest.mark.parametrize("resume", [False, True])
async def test_an_open_whose_answer_was_lost_succeeds_if_the_stream_is_there(
    streams: StreamManager, storage: FaultyStorage, resume: bool
) -> None:
    await (await streams.open("first")).done()
    if resume:
        await (await streams.open("s")).close()
        storage.skip("commit")
    storage.lose_answer("commit")
    stream = await streams.open("s", resume=resume)
    await stream.done("mine")

    assert await replay(streams) == [("done", "mine")]


@pytest.mark.promise("P1")
@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("ends_by", ["failure", "cancellation"])
@pytest.mark.parametrize("takes_effect", ["never", "before", "later"])
async def test_an_open_that_failed_or_was_cancelled_in_doubt_leaves_nothing_and_the_id_can_be_opened_at_once(
    memory: MemoryStorage, elsewhere: StreamManager, resume: bool, ends_by: str, takes_effect: str
) -> None:
    storage = LateStorage(memory)
    async with StreamManager(storage) as streams:
        await (await streams.open("first")).done()
        await wait_all_tasks_blocked()
        if resume:
            async with elsewhere.open("s") as stream:
                await stream.write("a")
            storage.skip("commit")
        storage.takes_effect = takes_effect
        storage.is_late = True
        hold = storage.hold("commit")
        async with anyio.create_task_group() as tasks:

            async def open_it() -> None:
                with contextlib.suppress(StorageError):
                    await (await streams.open("s", resume=resume)).close()

            tasks.start_soon(open_it)
            await hold.reached.wait()
            if ends_by == "cancellation":
                tasks.cancel_scope.cancel()
            else:
                hold.release(StorageError("nobody knows"))
        await wait_all_tasks_blocked()
        storage.is_late = False
        storage.happen()
        # Who is told that it failed may try again. (If it is seen to be there, it has not failed, and was closed above.)
        stream = await streams.open("s", resume=resume or (takes_effect, ends_by) == ("before", "failure"))
        assert stream.tail == resume
        await stream.done("mine")
        await anyio.sleep(60)
        assert (await replay(streams))[-1] == ("done", "mine")


@pytest.mark.promise("P1")
@pytest.mark.parametrize("resume", [False, True])
async def test_an_open_that_failed_in_doubt_leaves_nothing_although_its_commit_arrives_later(
    memory: MemoryStorage, elsewhere: StreamManager, resume: bool
) -> None:
    storage = LateStorage(memory)
    async with StreamManager(storage) as streams:
        await (await streams.open("first")).done()
        await wait_all_tasks_blocked()
        if resume:
            await (await elsewhere.open("s")).close()
            storage.skip("commit")
        storage.takes_effect, storage.is_late = "later", True
        hold = storage.hold("commit")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: streams.open("s", resume=resume).__aenter__())
            await hold.reached.wait()
            tasks.cancel_scope.cancel()
        await anyio.sleep(3)
        storage.is_late = False
        storage.happen()
        await anyio.sleep(35)

        assert (await elsewhere.open("s", resume=resume)).tail == 0


@pytest.mark.promise("P1")
async def test_an_open_in_doubt_is_undone_when_the_storage_is_back(
    streams: StreamManager, elsewhere: StreamManager, storage: FaultyStorage
) -> None:
    await (await streams.open("first")).done()
    await wait_all_tasks_blocked()
    storage.lose_answer("commit")
    storage.refuse("read", times=3)
    with pytest.raises(StorageError):
        await streams.open("s")
    await anyio.sleep(10)

    assert (await elsewhere.open("s")).tail == 0


@pytest.mark.promise("P1")
async def test_an_open_in_doubt_is_undone_however_long_the_storage_fails(
    streams: StreamManager, elsewhere: StreamManager, storage: FaultyStorage
) -> None:
    await (await streams.open("first")).done()
    await wait_all_tasks_blocked()
    storage.lose_answer("commit")
    storage.refuse("read", times=12)
    with pytest.raises(StorageError):
        await streams.open("s")
    await anyio.sleep(300)

    assert (await elsewhere.open("s")).tail == 0


@pytest.mark.promise("P1")
async def test_an_open_that_takes_over_and_then_loses_the_answer_for_good_releases_the_stream(
    streams: StreamManager, elsewhere: StreamManager, storage: FaultyStorage
) -> None:
    await (await elsewhere.open("s")).close()
    await (await streams.open("first")).done()
    await wait_all_tasks_blocked()
    storage.skip("commit")
    storage.lose_answer("commit")
    storage.skip("read", times=2)
    storage.refuse("read")
    with pytest.raises(StorageError):
        await streams.open("s", resume=True)
    await wait_all_tasks_blocked()

    await (await elsewhere.open("s", resume=True)).done()


@pytest.mark.promise("P5")
async def test_resuming_a_stream_of_a_million_events_takes_a_few_reads(streams: StreamManager, storage: FaultyStorage) -> None:
    life = begin(storage.time(), "", "w1", Beginning(300.0))  # released
    assert await storage.commit("s", None, life.head)
    for number in range(1, 125):
        seen, life = life, grow(life, 8_064, number * 8_064 * 2, storage.time())
        assert await storage.commit("s", seen.head.version, life.head, [b"c1"] * 8_064)
    storage.calls.clear()
    successor = await streams.open("s", resume=True)

    assert successor.tail == 124 * 8_064 == 999_936
    assert storage.calls["read"] < 12
    with pytest.raises(LimitExceededError, match="max_events"):
        for _ in range(65):
            successor.write_soon(2)


@pytest.mark.parametrize("size", [1, 100_000])
@pytest.mark.promise("P13")
async def test_who_resumes_knows_how_many_bytes_a_stream_has(storage: FaultyStorage, size: int) -> None:
    count = 3_000_000 // size if size > 1 else 3_000
    exact = count * (size + 3)  # a letter, and quotes
    async with StreamManager(storage, limits=Limits(max_stream_bytes=exact + 5)) as streams:
        assert streams.limits.max_stream_bytes == exact + 5
        stream = await streams.open("s")
        for number in range(count):
            stream.write_soon("x" * size)
            if number % 1_000 == 999:
                await stream.flush()
            if number % 7 == 0 and size > 1:
                await stream.close()
                stream = await streams.open("s", resume=True)
        await stream.close()
        stream = await streams.open("s", resume=True)
        with pytest.raises(LimitExceededError, match="max_stream_bytes"):
            await stream.write("xxx")
        await stream.write("xx")


async def test_a_stream_that_is_deleted_while_it_is_opened_is_created(
    streams: StreamManager, elsewhere: StreamManager, storage: FaultyStorage
) -> None:
    old = await elsewhere.open("s")
    await old.write("old")
    await (await streams.open("other")).done()
    await wait_all_tasks_blocked()
    storage.skip("read")  # whether the first head is there
    hold = storage.hold("read")
    opened: list[StreamInput] = []

    async def open_it() -> None:
        opened.append(await streams.open("s"))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(open_it)
        await hold.reached.wait()
        await elsewhere.delete("s")
        hold.release()

    assert (await elsewhere.info("s")).tail == opened[0].tail == 0
    assert old.cancelled.is_set()


@pytest.mark.promise("P1")
async def test_an_open_that_fails_in_doubt_again_and_again_can_be_tried_again(
    streams: StreamManager, storage: FaultyStorage
) -> None:
    await (await streams.open("first")).done()
    for _ in range(3):
        storage.refuse("commit")
        with pytest.raises(StorageError):
            await streams.open("s")
    await (await streams.open("s")).done()
    await anyio.sleep(sum(UNDO_PAUSES) + 1)

    assert (await streams.info("s")).status == "done"
    assert running_of(streams)._undoing == {}
    assert running_of(streams)._doubts == {}


async def test_a_manager_that_closes_while_its_session_begins_ends_that(
    streams: StreamManager, memory: MemoryStorage, storage: FaultyStorage
) -> None:
    hold = storage.hold("commit")
    name = core_of(streams).session.name
    async with anyio.create_task_group() as tasks:

        async def open_it() -> None:
            with pytest.raises(StreamManagerClosedError):
                await streams.open("s")

        tasks.start_soon(open_it)
        await hold.reached.wait()
        tasks.start_soon(streams.aclose)
        await wait_all_tasks_blocked()
        hold.release()

    page = await memory.read(session_id(name))
    assert page is not None
    assert session_of(page.head).is_over


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


@pytest.mark.promise("P5")
async def test_a_take_over_is_allowed_when_silence_has_been_observed_for_the_lease(
    streams: StreamManager, mortal: Process, clock: Clock
) -> None:
    stream = await mortal.streams.open("s")
    await stream.write("a")
    await anyio.sleep(100)
    mortal.die()
    began = clock()
    with pytest.raises(StreamBusyError) as busy:
        await streams.open("s", resume=True)
    assert 0 < busy.value.retry_after <= 10
    successor = await resumed(streams, "s")

    assert 10 <= clock() - began <= 15
    assert successor.tail == stream.tail == 1


# Expiring


@pytest.mark.promise("P12")
async def test_an_open_stream_does_not_expire_while_its_writer_lives(streams: StreamManager, elsewhere: StreamManager) -> None:
    async with StreamManager(core_of(streams).storage.storage, ttl=timedelta(0)) as brief:
        stream = await brief.open("s")
        for _ in range(4):
            await anyio.sleep(2_000)
            await elsewhere.sweep()
            assert (await elsewhere.info("s")).status == "open"
        assert (await elsewhere.info("s")).expires_at > 0
        await stream.done()


@pytest.mark.promise("P12")
async def test_a_stream_may_have_a_ttl_of_its_own(streams: StreamManager, elsewhere: StreamManager, clock: Clock) -> None:
    stream = await streams.open("s", ttl=timedelta(hours=1))
    await stream.close()
    successor = await elsewhere.open("s", resume=True, ttl=timedelta(seconds=1))
    await successor.done()

    assert (await streams.info("s")).expires_at == clock() + 3_600  # as it was opened


@pytest.mark.parametrize("ttl", [timedelta(seconds=-1), timedelta.min])
def test_a_ttl_that_makes_no_sense_is_refused(ttl: timedelta) -> None:
    with pytest.raises(InvalidArgumentError):
        _ = StreamManager(MemoryStorage()).open("s", ttl=ttl)


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


@pytest.mark.promise("P7")
async def test_a_writer_of_the_same_process_is_cancelled_when_cancel_returns(streams: StreamManager) -> None:
    stream = await streams.open("s")
    other = await streams.open("other")
    await streams.cancel("s")

    assert stream.cancelled.is_set()
    assert not other.cancelled.is_set()


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


@pytest.mark.promise("P21")
@pytest.mark.parametrize("verb", ["cancel", "delete"])
async def test_a_verb_that_is_tried_again_never_reaches_a_later_life(
    streams: StreamManager, elsewhere: StreamManager, storage: FaultyStorage, verb: str
) -> None:
    """Its commit was refused because somebody wrote; meanwhile the id has come to live again."""
    old = await elsewhere.open("s")
    await old.write("old")
    await (await streams.open("other")).done()
    await wait_all_tasks_blocked()
    hold = storage.hold("commit" if verb == "cancel" else "delete")
    told: list[Exception] = []

    async def act() -> None:
        try:
            await getattr(streams, verb)("s")
        except StreamNotFoundError as error:
            told.append(error)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(act)
        await hold.reached.wait()
        await elsewhere.delete("s")
        successor = await elsewhere.open("s")
        hold.release()

    assert len(told) == 1
    assert old.cancelled.is_set()
    await successor.done("new")
    assert await replay(streams) == [("done", "new")]


@pytest.mark.promise("P21")
@pytest.mark.parametrize("verb", ["cancel", "delete"])
@pytest.mark.parametrize("lives_again", [False, True])
async def test_a_verb_whose_answer_was_lost_has_been_carried_out_once(
    streams: StreamManager, elsewhere: StreamManager, storage: FaultyStorage, verb: str, lives_again: bool
) -> None:
    old = await elsewhere.open("s")
    await old.write("old")
    await (await streams.open("other")).done()
    await wait_all_tasks_blocked()
    operation: Any = "commit" if verb == "cancel" else "delete"
    hold = storage.hold(operation, after=True)
    outcomes: list[object] = []

    async def act() -> None:
        try:
            outcomes.append(await getattr(streams, verb)("s"))
        except StreamkeepError as error:
            outcomes.append(type(error))

    successor: StreamInput | None = None
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(act)
        await hold.reached.wait()
        if lives_again:
            if verb == "cancel":
                await elsewhere.delete("s")
            successor = await elsewhere.open("s")
            await successor.done("new")
        hold.release(StorageError("the answer was lost"))

    if successor is not None:
        assert outcomes == [StorageError if verb == "cancel" else None]  # nobody knows how the old one ended; gone it is
        assert await replay(streams) == [("done", "new")]
    elif verb == "cancel":
        assert outcomes == [True]
        assert await replay(streams) == ["old", ("CANCELLED", "the stream was cancelled")]
    else:
        assert outcomes == [None]
        assert [*await streams.list()] == [await streams.info("other")]


async def test_a_stream_that_somebody_else_deletes_meanwhile_is_deleted(
    streams: StreamManager, elsewhere: StreamManager, storage: FaultyStorage
) -> None:
    stream = await elsewhere.open("s")
    hold = storage.hold("delete")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(streams.delete, "s")
        await hold.reached.wait()
        await elsewhere.delete("s")
        hold.release()

    assert stream.cancelled.is_set()


@pytest.mark.parametrize("verb", ["cancel", "delete"])
@pytest.mark.parametrize("is_here", [True, False])
async def test_a_verb_that_was_stored_is_a_success_even_if_the_writer_cannot_be_told(
    streams: StreamManager,
    mortal: Process,
    storage: FaultyStorage,
    quiet_logs: pytest.LogCaptureFixture,
    verb: str,
    is_here: bool,
) -> None:
    stream = await (streams if is_here else mortal.streams).open("s")
    await (await streams.open("other")).done()
    await wait_all_tasks_blocked()
    storage.skip("read")
    storage.refuse("read")
    await getattr(streams, verb)("s")

    assert ("could not be told" if not is_here else "cannot see whether") in quiet_logs.text
    await anyio.sleep(2 * LOOK_SECONDS + 1)
    assert stream.cancelled.is_set()


# Beginning and closing


async def test_a_manager_that_is_not_entered_says_so() -> None:
    streams = StreamManager(MemoryStorage())
    for call in (streams.open, streams.info, streams.cancel, streams.delete, streams.list):
        with pytest.raises(StreamManagerClosedError, match="async with"):
            await call("s")
    with pytest.raises(StreamManagerClosedError, match="async with"):
        await streams.subscribe("s").__aenter__()
    await streams.aclose()
    async with streams:
        pass
    with pytest.raises(StreamManagerClosedError, match="closed"):
        await streams.open("s")


@pytest.mark.promise("P14")
async def test_closing_releases_the_writers_streams(storage: FaultyStorage, clock: Clock, elsewhere: StreamManager) -> None:
    async with StreamManager(storage) as streams:
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
    running = running_of(streams)
    hold = storage.hold("commit")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(streams.aclose)
        await hold.reached.wait()
        tasks.cancel_scope.cancel()
    await streams.aclose()

    assert (await elsewhere.info("s")).session == ""
    assert stream.is_closed
    assert not running.background._tasks


@pytest.mark.promise("P14")
async def test_closing_takes_no_longer_than_it_may_when_the_storage_hangs_or_fails(
    storage: FaultyStorage, clock: Clock, quiet_logs: pytest.LogCaptureFixture
) -> None:
    async with StreamManager(storage) as streams:
        handles = [await streams.open(stream) for stream in "ab"]
        await anyio.sleep(1)
        storage.hold("commit")
        storage.refuse("commit")
        began = clock()

    assert 5 <= clock() - began < 5.1
    assert all(handle.cancelled.is_set() for handle in handles)
    assert "could not be released" in quiet_logs.text


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.promise("P14")
async def test_what_is_opened_while_the_manager_closes_is_released(
    streams: StreamManager, elsewhere: StreamManager, storage: FaultyStorage, is_first: bool
) -> None:
    if not is_first:  # or else its session begins with it
        await (await streams.open("first")).done()
    hold = storage.hold("commit", after=True)
    async with anyio.create_task_group() as tasks:

        async def open_it() -> None:
            with pytest.raises(StreamManagerClosedError):
                await streams.open("s")

        tasks.start_soon(open_it)
        await hold.reached.wait()
        await streams.aclose()
        hold.release()

    assert (await elsewhere.open("s", resume=True)).tail == 0


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


class LateReadStorage(FaultyStorage):
    """One whose reads of `s` end late, as they do when a cancellation meets what was just done."""

    async def read(self, stream: str, start: int = 0, limit: int = 0) -> Page | None:
        """See `Storage.read`."""
        if stream != "s":
            return await self._storage.read(stream, start, limit)
        with anyio.CancelScope(shield=True):
            page = await super().read(stream, start, limit)
        return page  # noqa: RET504 - mypy cannot know that nothing is swallowed


@pytest.mark.parametrize("has_ended", [False, True])
@pytest.mark.promise("P14")
async def test_a_read_that_fails_since_the_manager_closes_is_no_failure_of_the_storage(
    has_ended: bool, quiet_logs: pytest.LogCaptureFixture
) -> None:
    storage = LateReadStorage(MemoryStorage())
    async with StreamManager(storage) as streams, anyio.create_task_group() as tasks:
        stream = await streams.open("s")
        for chunk in range(2 * PAGE_RECORDS if has_ended else 1):
            stream.write_soon(chunk)
        await (stream.done() if has_ended else stream.flush())
        events = await streams.subscribe("s").__aenter__()

        async def read() -> None:
            with pytest.raises(StreamManagerClosedError):
                for _ in range(3):
                    await events.batch()

        await wait_all_tasks_blocked()  # also what the session has to read is read
        hold = storage.hold("read")
        tasks.start_soon(read)
        await hold.reached.wait()
        tasks.start_soon(streams.aclose)
        await wait_all_tasks_blocked()
        hold.release(StorageError("it is not open"))

    assert "cannot be read" not in quiet_logs.text


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
            running = running_of(streams)
            scope.cancel()
            await checkpoint()

    assert scope.cancelled_caught
    assert not running.background._tasks


async def test_a_storage_of_its_own_is_opened_and_closed(storage: FaultyStorage) -> None:
    async with StreamManager.connect("memory://") as streams:
        await (await streams.open("s")).done()

    assert not streams.is_running


async def test_a_storage_that_cannot_be_opened_is_told_and_the_manager_may_try_again(storage: FaultyStorage) -> None:
    streams = StreamManager(storage)
    streams._make_storage = lambda: storage
    storage.refuse("enter")
    with pytest.raises(StorageError):
        await streams.__aenter__()
    async with streams:
        assert streams.is_running


async def test_the_storage_of_a_manager_is_given_while_it_runs(storage: FaultyStorage) -> None:
    streams = StreamManager(storage)
    with pytest.raises(StreamManagerClosedError):
        _ = streams.storage
    async with streams:
        await (await streams.open("s")).done()
        assert await streams.storage.read("s") == await storage.read("s")


async def test_a_remote_manager_is_one_over_a_storage_that_speaks_http() -> None:
    streams = RemoteStreamManager("https://host/storage", limits=Limits(max_events=1))
    assert streams.limits.max_events == 1
    with pytest.raises(StorageError, match="HTTPStorage needs asyncio"):  # which these tests do without
        await streams.__aenter__()
    assert not streams.is_running


async def test_what_users_tests_and_tracers_put_on_a_writer_and_a_reader_is_kept_there(streams: StreamManager) -> None:
    async with streams.open("s") as stream, streams.subscribe("s") as events:
        for handle in (stream, events):
            handle.__dict__["span"] = handle.id
            assert vars(handle) == {"span": "s"}
        with (
            patch.object(stream, "write", AsyncMock(return_value=7)),
            patch.object(events, "batch", AsyncMock(return_value=[])),
        ):
            assert await stream.write("a") == 7
            assert await events.batch() == []
        assert await stream.write("a") == 0
        assert [event.chunk for event in await events.batch()] == ["a"]
        await stream.done()


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
