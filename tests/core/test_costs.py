"""What a manager does for an event, counted: it does not grow with what is queued, kept or open."""

from collections.abc import Callable

import anyio
import pytest
from tests.core.helpers import core_of
from tests.counts import calls_of, decoding, least_bytes
from trio.testing import wait_all_tasks_blocked

import streamkeep
from streamkeep import Limits, StreamInput, StreamManager
from streamkeep._outbox import Outbox
from streamkeep.storage import Head
from streamkeep.testing.faults import FaultyStorage

pytestmark = pytest.mark.anyio

LITTLE_BYTES = 16_000
"""More than an event needs, and less than a copy of what has thousands of parts."""


async def test_a_chunk_costs_the_same_however_many_are_queued(storage: FaultyStorage) -> None:
    async with StreamManager(storage, limits=Limits(max_queued_events=20_000)) as streams:
        stream = await streams.open("s")
        await wait_all_tasks_blocked()

        async def queue() -> None:
            stream.write_soon("a")

        costs: list[int] = []
        for queued in (0, 10_000):
            for _ in range(queued):
                stream.write_soon("a")
            assert await least_bytes(queue) < LITTLE_BYTES
            with calls_of(streamkeep) as calls:
                await queue()
            costs.append(calls.total())
        await stream.flush()

    assert costs[1] <= costs[0]  # the first one began a task


async def test_a_commit_takes_what_it_stores_from_the_queue_and_looks_at_no_more(
    streams: StreamManager, storage: FaultyStorage
) -> None:
    stream = await streams.open("s")
    calls: list[int] = []
    for commits in (1, 9):
        for _ in range(commits * 1_024):
            stream.write_soon("a")
        storage.calls.clear()
        with calls_of(streamkeep) as done:
            await stream.flush()
        assert storage.calls["commit"] == commits
        calls.append(done.total())

    assert calls[1] <= 9 * calls[0]


class Looked(bytes):
    """A record that knows how often the records of a test were asked for their lengths, by whatever code."""

    times = 0

    def __len__(self) -> int:
        Looked.times += 1
        return super().__len__()


async def test_a_record_is_looked_at_a_few_times_however_many_are_queued(streams: StreamManager) -> None:
    await streams.open("s")
    (outbox,) = core_of(streams).outboxes("s")
    assert isinstance(outbox, Outbox)
    Looked.times = 0
    for _ in range(8 * 1_024):
        outbox.put(Looked(b"c1"))
    await outbox.flush()

    assert outbox.life.head.tail == 8 * 1_024
    assert Looked.times <= 4 * 8 * 1_024


async def fill(stream: StreamInput, tail: int) -> None:
    """Write until it has so many chunks."""
    while stream.tail < tail:
        for _ in range(min(5_000, tail - stream.tail)):
            stream.write_soon("a")
        await stream.flush()


async def test_an_event_costs_the_same_however_long_its_stream_is(streams: StreamManager) -> None:
    stream = await streams.open("s")
    seen: list[int] = []

    async def follow() -> None:
        async with streams.subscribe("s") as events:
            while batch := await events.batch():
                seen.append(batch[-1].offset)

    async def pass_one() -> None:
        offset = await stream.write("a")
        await wait_all_tasks_blocked()
        assert seen[-1] == offset

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(follow)
        costs: list[int] = []
        for tail in (1_000, 100_000):
            await fill(stream, tail)
            await wait_all_tasks_blocked()
            assert await least_bytes(pass_one) < LITTLE_BYTES
            with calls_of(streamkeep) as calls:
                for _ in range(10):
                    await pass_one()
            costs.append(calls.total())
        tasks.cancel_scope.cancel()

    assert costs[1] == costs[0]


async def test_an_event_costs_the_same_however_much_is_kept_for_a_slow_reader(streams: StreamManager) -> None:
    stream = await streams.open("s")

    async def write_one() -> None:
        await stream.write("a")
        await wait_all_tasks_blocked()

    async with streams.subscribe("s"):  # who takes nothing
        await wait_all_tasks_blocked()
        least: list[int] = []
        costs: list[int] = []
        for kept in (5, 1_000):
            await fill(stream, kept)
            await wait_all_tasks_blocked()
            least.append(await least_bytes(write_one))
            with calls_of(streamkeep) as calls:
                await write_one()
            costs.append(calls.total())

    assert least[1] <= least[0] + 4_000  # a list of a thousand has twice as many
    assert costs[1] == costs[0]


async def test_a_reader_that_comes_costs_the_same_however_long_the_stream_is(
    streams: StreamManager, storage: FaultyStorage
) -> None:
    stream = await streams.open("s")

    async def look_at_the_last() -> None:
        async with streams.subscribe("s", after=stream.tail - 2) as events:
            await anext(events)

    costs: list[tuple[int, int]] = []
    for tail in (1_000, 100_000):
        await fill(stream, tail)
        await look_at_the_last()
        assert await least_bytes(look_at_the_last) < LITTLE_BYTES
        storage.calls.clear()
        with calls_of(streamkeep) as calls:
            await look_at_the_last()
        costs.append((storage.calls.total(), calls.total()))

    assert costs[1] == costs[0]


async def test_a_stream_costs_the_same_however_many_are_kept_and_written(
    streams: StreamManager, storage: FaultyStorage, clock: Callable[[], float]
) -> None:
    handles = [await streams.open("first")]
    await handles[0].write("a")

    async def live(id: str = "s") -> None:
        async with streams.open(id) as stream, streams.subscribe(id) as events:
            await wait_all_tasks_blocked()
            await stream.write("a")
            await anext(events)
            await stream.done()
        await streams.delete(id)

    least: list[int] = []
    costs: list[tuple[int, int]] = []
    for kept, written in ((10, 1), (10_000, 1_000)):
        for number in range(kept):
            await storage.commit(f"kept{kept}-{number}", None, Head(1, 0, b"", clock() + 3_600))
        while len(handles) < written:
            handles.append(await streams.open(f"written{len(handles)}"))
        await wait_all_tasks_blocked()
        least.append(await least_bytes(live))
        some: list[tuple[int, int]] = []
        for _ in range(5):
            await wait_all_tasks_blocked()
            storage.calls.clear()
            with calls_of(streamkeep) as calls:
                await live()
                await handles[0].write("a")
            some.append((storage.calls.total(), calls.total()))
        costs.append(min(some))  # now and then a session is renewed, or garbage collected

    assert least[1] <= least[0] + 5_000  # a list of all writers has twice as many
    assert costs[1] == costs[0]


async def test_a_change_elsewhere_is_read_once_and_only_where_its_stream_is_followed(
    streams: StreamManager, elsewhere: StreamManager, storage: FaultyStorage
) -> None:
    handles = [await elsewhere.open(f"s{number}") for number in range(50)]
    async with anyio.create_task_group() as tasks:
        seen: list[str] = []

        async def follow(id: str) -> None:
            async with streams.subscribe(id) as events:
                while await events.batch():
                    seen.append(id)

        for handle in handles:
            for _ in range(3):
                tasks.start_soon(follow, handle.id)
        await wait_all_tasks_blocked()
        storage.calls.clear()
        with decoding() as decoded:
            for _ in range(10):
                await handles[0].write("a")
                await wait_all_tasks_blocked()
        assert seen == [handles[0].id] * 30
        assert storage.calls == {"commit": 10, "read": 10}
        assert decoded == {"encode": 10}
        tasks.cancel_scope.cancel()
