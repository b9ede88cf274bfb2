"""Attacks on sessions: many observers, slow commits, mail by the thousand, heads that are damaged or whose answers get lost."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from typing import TypeVar

import anyio
import pytest
from msgspec.structs import replace
from tests.core.helpers import Process, core_of
from trio.testing import wait_all_tasks_blocked

from streamkeep import StorageError, StreamInput, StreamManager
from streamkeep._lifecycle import LOOK_AT_ALL
from streamkeep.storage import Head, Page, Storage
from streamkeep.storages.memory import MemoryStorage
from streamkeep.testing.faults import FaultyStorage, Operation

T = TypeVar("T")


class SlowStorage(FaultyStorage):
    """Each commit takes `seconds`, and happens in the middle of them."""

    def __init__(self, storage: Storage, seconds: float) -> None:
        super().__init__(storage)
        self._seconds = seconds

    async def _do(self, operation: Operation, call: Callable[[], Awaitable[T]]) -> T:
        half = self._seconds / 2 if operation == "commit" else 0.05
        await anyio.sleep(half)
        answer = await super()._do(operation, call)
        await anyio.sleep(half)
        return answer


async def session_id(memory: MemoryStorage) -> str:
    ((session, _),) = await memory.scan(".session.", 1)
    return session


async def damage(memory: MemoryStorage, stream: str, state: bytes = b"?") -> None:
    page = await memory.read(stream)
    assert page is not None
    assert await memory.commit(stream, page.head.version, replace(page.head, version=page.head.version + 1, state=state))


@pytest.mark.parametrize("seconds", [4, 20])
async def test_no_number_of_observers_makes_a_slow_storage_the_death_of_a_writer(memory: MemoryStorage, seconds: int) -> None:
    async with AsyncExitStack() as stack, anyio.create_task_group() as readers:
        streams = await stack.enter_async_context(StreamManager(SlowStorage(memory, seconds)))
        stream = await streams.open("s")
        for _ in range(10):
            reader = await stack.enter_async_context(StreamManager(SlowStorage(memory, seconds)))
            readers.start_soon(anext, await stack.enter_async_context(reader.subscribe("s")))
        await anyio.sleep(1_000)  # they ask whether it still has its writer, all at once

        assert (await streams.info("s")).status == "open"
        assert not stream.cancelled.is_set()
        readers.cancel_scope.cancel()


async def test_a_thousand_producers_are_told_at_once_that_they_were_cancelled_elsewhere(
    streams: StreamManager, elsewhere: StreamManager, storage: FaultyStorage
) -> None:
    inputs = [await streams.open(f"s{number}") for number in range(1_000)]
    storage.calls.clear()

    with anyio.fail_after(1):
        async with anyio.create_task_group() as tasks:
            for stream in inputs:
                tasks.start_soon(elsewhere.cancel, stream.id)
        for stream in inputs:
            await stream.cancelled.wait()
    assert storage.calls["commit"] < 1_100  # their own, and a few for the mail


async def test_a_producer_is_told_although_the_mail_could_not_be_posted_at_first(
    streams: StreamManager, memory: MemoryStorage
) -> None:
    faulty = FaultyStorage(memory)
    async with StreamManager(faulty) as elsewhere:
        stream = await streams.open("s")
        faulty.skip("commit")
        faulty.refuse("commit", times=3)
        await elsewhere.cancel("s")

        with anyio.fail_after(10):
            await stream.cancelled.wait()


@pytest.mark.parametrize("fault", ["lose_answer", "refuse"])
async def test_a_producer_is_told_although_its_session_has_trouble_with_its_mail(
    streams: StreamManager, storage: FaultyStorage, memory: MemoryStorage, fault: str
) -> None:
    async with StreamManager(memory) as elsewhere:
        stream = await streams.open("s")
        for operation in ("read", "delete"):
            getattr(storage, fault)(operation)
        await elsewhere.cancel("s")

        with anyio.fail_after(10):
            await stream.cancelled.wait()


@pytest.fixture
async def writing(streams: StreamManager) -> AsyncIterator[StreamInput]:
    async with streams.open("s") as stream:
        yield stream


@pytest.mark.parametrize("state", [b"?", b'{"beat":"new"}', b"[" * 100_000], ids=["noise", "newer", "deep"])
async def test_a_session_whose_head_was_damaged_is_renewed_all_the_same(
    writing: StreamInput, elsewhere: StreamManager, memory: MemoryStorage, state: bytes
) -> None:
    async with elsewhere.subscribe("s") as events:
        session = await session_id(memory)
        await damage(memory, session, state)
        with anyio.move_on_after(100):
            await anext(events)

        page = await memory.read(session)
        assert page is not None
        assert page.head.state != state
        await writing.write(1)
        assert (await anext(events)).chunk == 1


async def test_a_session_that_died_with_a_damaged_head_is_seen_to_be_dead(
    mortal: Process, elsewhere: StreamManager, memory: MemoryStorage, quiet_logs: pytest.LogCaptureFixture
) -> None:
    stream = await mortal.streams.open("s")
    mortal.die()
    await damage(memory, await session_id(memory))

    async with elsewhere.subscribe("s") as events:
        with anyio.fail_after(30):
            assert (await anext(events)).error.status == "ABORTED"
    assert not stream.cancelled.is_set()


async def test_a_head_that_only_a_newer_version_can_read_is_alive_while_it_changes(
    mortal: Process, elsewhere: StreamManager, memory: MemoryStorage
) -> None:
    stream = await mortal.streams.open("s")
    mortal.die()
    session = await session_id(memory)
    async with elsewhere.subscribe("s") as events:
        for number in range(30):
            await damage(memory, session, b"newer %d" % number)
            with anyio.move_on_after(5):
                await anext(events)
        assert (await elsewhere.info("s")).status == "open"
    assert not stream.cancelled.is_set()


async def test_a_session_that_cannot_be_observed_is_mentioned_once(
    streams: StreamManager, memory: MemoryStorage, quiet_logs: pytest.LogCaptureFixture
) -> None:
    class Blind(FaultyStorage):
        async def read(self, stream: str, start: int = 0, limit: int = 0) -> Page | None:
            if stream.startswith(".session."):
                raise StorageError("nothing to see")
            return await super().read(stream, start, limit)

    async with StreamManager(Blind(memory)) as blind:
        stream = await streams.open("s")
        async with blind.subscribe("s") as events:
            with anyio.move_on_after(200):
                await anext(events)
        assert not stream.cancelled.is_set()
    assert len([record for record in quiet_logs.records if "observed" in record.message]) == 1


async def test_mail_that_cannot_be_read_has_all_writers_look(
    streams: StreamManager, elsewhere: StreamManager, memory: MemoryStorage
) -> None:
    stream = await streams.open("s")
    page = await memory.read("s")
    assert page is not None
    await memory.delete("s", page.head.version)
    await memory.commit(await session_id(memory) + ".mail", None, Head(1, 0, b"?", 2e9))

    with anyio.fail_after(10):
        await stream.cancelled.wait()


class BusyMailbox(FaultyStorage):
    """Somebody else is faster to post, `times` times."""

    times = 0

    async def commit(self, stream: str, seen: int | None, head: Head, records: Sequence[bytes] = ()) -> bool:
        if self.times and stream.endswith(".mail"):
            self.times -= 1
            self.calls["commit"] += 1
            return False
        return await super().commit(stream, seen, head, records)


async def test_a_producer_is_told_however_busy_its_mailbox_is(streams: StreamManager, memory: MemoryStorage) -> None:
    busy = BusyMailbox(memory)
    async with StreamManager(busy) as elsewhere:
        stream = await streams.open("s")
        busy.times = 50
        await elsewhere.cancel("s")

        with anyio.fail_after(10):
            await stream.cancelled.wait()
        assert busy.times == 0


async def test_who_cannot_post_for_as_long_as_a_writer_needs_to_find_out_by_itself_gives_up(
    streams: StreamManager, memory: MemoryStorage
) -> None:
    busy = BusyMailbox(memory)
    async with StreamManager(busy) as elsewhere:
        stream = await streams.open("s")
        busy.times = 1_000_000
        await elsewhere.cancel("s")
        await anyio.sleep(1_000)
        busy.calls.clear()
        await anyio.sleep(1_000)

        assert stream.cancelled.is_set()
        assert busy.calls["commit"] < 1_000  # it renews its session


async def test_who_asks_for_a_look_at_all_during_one_gets_another_and_no_more(
    streams: StreamManager, storage: FaultyStorage
) -> None:
    inputs = [await streams.open(f"s{number}") for number in range(5)]
    hold = storage.hold("read")
    core_of(streams).look([LOOK_AT_ALL])
    await hold.reached.wait()
    storage.calls.clear()
    for _ in range(3):
        core_of(streams).look([LOOK_AT_ALL])
    await wait_all_tasks_blocked()
    hold.release()
    await wait_all_tasks_blocked()

    assert storage.calls["read"] == len(inputs)


async def test_a_manager_that_is_closed_has_nothing_to_tell(streams: StreamManager, storage: FaultyStorage) -> None:
    observer = core_of(streams).observer
    await streams.aclose()
    storage.calls.clear()
    await observer.tell("s2", "s")

    assert not storage.calls
