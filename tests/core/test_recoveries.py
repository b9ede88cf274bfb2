"""Going on with streams whose writers have died: how often, how soon, by whom; and what each failure leaves. On virtual time."""

import itertools
import pickle
from collections.abc import Callable, Sequence
from datetime import timedelta

import anyio
import msgspec
import pytest
from tests.core.helpers import Process, core_of, replay

from streamkeep import (
    Recovery,
    StorageError,
    StreamEvent,
    StreamEventType,
    StreamInput,
    StreamManager,
    StreamManagerClosedError,
    StreamTakenOverError,
)
from streamkeep._guard import GuardedStorage
from streamkeep._lifecycle import FORGET_OPEN_SECONDS, MAX_BACKOFF_SECONDS, RecoveryTerms, life_of
from streamkeep._recovering import Found, add_entry, find_entries, first_entry, hand_on
from streamkeep._recovery import BELL, PREFIX, Entry, entry_for, entry_id, entry_of, sessions_of
from streamkeep.storage import Head
from streamkeep.storages.memory import MemoryStorage
from streamkeep.testing.faults import FaultyStorage, Operation

GO = Recovery("go", {"question": "why"}, attempts=2, backoff=timedelta(seconds=8), within=timedelta(minutes=5))


async def entries(memory: MemoryStorage) -> list[str]:
    """Give the ids of all entries."""
    return [id for id, _ in await memory.scan(PREFIX, 1_000) if id.startswith(PREFIX)]


async def next_of(streams: StreamManager) -> StreamInput:
    async with streams.recoveries("go") as lost:
        return await anext(lost)


async def died(memory: MemoryStorage, stream: str = "s", recovery: Recovery = GO) -> None:
    """Have a process open a stream, write a chunk, and die."""
    storage = FaultyStorage(memory)
    async with StreamManager(storage) as streams:
        handle = await streams.open(stream, recovery=recovery)
        await handle.write("a", checkpoint=1)
        storage.is_down = True


async def left(streams: StreamManager) -> None:
    """Return when the stream has no writer any more."""
    while (await streams.info("s")).session:  # noqa: ASYNC110 - whoever asks is not told when to ask again
        await anyio.sleep(0.1)


@pytest.mark.promise("P24")
async def test_so_many_deaths_are_survived_with_a_longer_pause_each_time_and_one_more_is_the_end(
    streams: StreamManager, memory: MemoryStorage, caplog: pytest.LogCaptureFixture
) -> None:
    await died(memory)
    pauses: list[float] = []
    for _ in range(2):
        await left(streams)
        left_at = anyio.current_time()
        storage = FaultyStorage(memory)
        async with StreamManager(storage) as other:
            _kept = await next_of(other)
            pauses.append(anyio.current_time() - left_at)
            storage.is_down = True
    await left(streams)
    assert pauses == [pytest.approx(8, abs=0.5), pytest.approx(16, abs=0.5)]
    assert await replay(streams) == [
        "a",
        ("recovering", 1),
        ("recovering", 2),
        ("ABORTED", "the writer went away before the stream was completed"),
    ]
    with anyio.move_on_after(60):
        await next_of(streams)
    assert await entries(memory) == []
    # Whoever runs this finds what it was that has killed his processes.
    told = [(record.levelname, record.message) for record in caplog.records if "has died" in record.message]
    assert told == [
        ("WARNING", "stream s (go): its writer has died, 1 so far; it waits for another one"),
        ("WARNING", "stream s (go): its writer has died, 2 so far; it waits for another one"),
        ("ERROR", "stream s (go): its writer has died, 3 so far, and it is ended with ABORTED"),
    ]


@pytest.mark.promise("P24")
async def test_a_death_is_found_although_nobody_reads_the_stream(streams: StreamManager, memory: MemoryStorage) -> None:
    began_at = anyio.current_time()
    await died(memory)
    stream = await next_of(streams)
    assert stream.attempt == 1
    assert anyio.current_time() - began_at < 10 + 5 + 8 + 10 + 4  # lease, grace, backoff; a look a lease; the first renewal
    await stream.done()


@pytest.mark.promise("P24")
async def test_who_looks_for_the_dead_costs_what_runs_and_not_what_is_kept(memory: MemoryStorage) -> None:
    async with StreamManager(memory, ttl=timedelta(days=2)) as before:
        for number in range(300):
            await (await before.open(f"done{number}", recovery=GO)).done()
        alive = [await before.open(f"open{number}", recovery=GO) for number in range(150)]
        storage = FaultyStorage(memory)
        async with StreamManager(storage) as streams:
            with anyio.move_on_after(600):
                await next_of(streams)
        assert storage.calls["scan"] < 2 * 600 / 8 + 10
        assert storage.calls["read"] < 600 / 2 + 100
        for stream in alive:
            await stream.done()
    assert await entries(memory) == []


@pytest.mark.promise("P24")
async def test_of_what_lives_one_entry_a_session_is_read_and_of_what_is_found_the_ids_are_kept(memory: MemoryStorage) -> None:
    long = Recovery("go", "x" * 60_000)
    async with StreamManager(memory) as other:
        alive = [await other.open(f"s{number}", recovery=long) for number in range(100)]
        sizes: list[int] = []

        class Counting(FaultyStorage):
            async def scan(self, after: str = "", limit: int = 100) -> Sequence[tuple[str, Head]]:
                found = await super().scan(after, limit)
                sizes.append(sum(len(head.state) for _, head in found))
                return found

        async with StreamManager(Counting(memory)) as streams:
            lost = streams.recoveries("go")
            async with lost:
                with anyio.move_on_after(1):
                    await anext(lost)
                assert 60_000 <= sum(sizes) < 3 * 60_000  # it looks twice at first: its bell may have rung before
                for stream in alive:
                    await stream.close()
                await anyio.sleep(1)
                await (await anext(lost)).done()
                assert len(pickle.dumps(lost._found)) < 100 * 200


@pytest.mark.promise("P24")
async def test_a_storage_that_fails_is_asked_again(memory: MemoryStorage, caplog: pytest.LogCaptureFixture) -> None:
    storage = FaultyStorage(memory)
    async with StreamManager(storage) as streams:
        await (await streams.open("first")).done()
        await died(memory)
        found: list[StreamInput] = []

        async def find() -> None:
            found.append(await next_of(streams))

        async with anyio.create_task_group() as tasks:
            storage.is_down = True
            tasks.start_soon(find)
            await anyio.sleep(30)
            storage.is_down = False
        assert found[0].id == "s"
        await found[0].done()
    assert len([record for record in caplog.records if "gone on with" in record.message]) == 1


@pytest.mark.promise("P24")
async def test_who_waits_is_told_that_the_manager_is_closed(memory: MemoryStorage) -> None:
    async with StreamManager(memory) as streams, anyio.create_task_group() as tasks:

        async def wait() -> None:
            with pytest.raises(StreamManagerClosedError):
                await next_of(streams)

        tasks.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        await streams.aclose()


@pytest.mark.promise("P24")
async def test_a_writer_that_was_taken_for_dead_leaves_its_stream_to_be_gone_on_with(
    streams: StreamManager, mortal: Process
) -> None:
    stream = await mortal.streams.open("s", recovery=GO)
    mortal.storage.is_down = True
    await left(streams)
    mortal.storage.is_down = False
    with pytest.raises(StreamTakenOverError):
        await stream.write("late")
    successor = await next_of(streams)
    assert (successor.attempt, successor.recovery) == (1, GO)
    await successor.done()


@pytest.mark.promise("P24")
async def test_an_entry_lives_as_long_as_its_stream(
    streams: StreamManager, memory: MemoryStorage, storage: FaultyStorage
) -> None:
    stream = await streams.open("s", recovery=GO)
    (entry,) = await entries(memory)
    for _ in range(12):
        storage.ahead_seconds += FORGET_OPEN_SECONDS / 3
        await stream.write("a")
        await anyio.sleep(1)
        page = await memory.read(entry)
        assert page is not None
        assert page.head.expires_at > storage.time() + FORGET_OPEN_SECONDS
    await stream.done()
    await anyio.sleep(1)
    assert await entries(memory) == []


@pytest.mark.promise("P24")
async def test_an_entry_that_has_expired_goes_unless_its_stream_is_open(
    streams: StreamManager, memory: MemoryStorage, storage: FaultyStorage
) -> None:
    stream = await streams.open("s", recovery=GO)
    (kept,) = await entries(memory)
    await died(memory, "gone")
    await streams.delete("gone")
    assert len(await entries(memory)) == 2
    storage.ahead_seconds = 3 * FORGET_OPEN_SECONDS
    await streams.sweep()
    assert await entries(memory) == [kept]
    await stream.done()


@pytest.mark.promise("P24")
@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("is_lost", [True, False])
async def test_wherever_a_taking_over_fails_the_stream_is_gone_on_with_in_the_end(
    memory: MemoryStorage, number: int, *, is_lost: bool
) -> None:
    await died(memory)
    storage = FaultyStorage(memory)
    async with StreamManager(storage) as streams:
        await (await streams.open("first")).done()
        await left(streams)
        storage.skip("commit", times=number)
        (storage.lose_answer if is_lost else storage.refuse)("commit")
        with anyio.fail_after(600):
            stream = await next_of(streams)
        await stream.write("b")
        await stream.done("end")
        assert await replay(streams) == ["a", ("recovering", 1), "b", ("done", "end")]
        await anyio.sleep(60)
    assert [id for id in await entries(memory) if id.startswith(PREFIX + "0.")] == []


@pytest.mark.promise("P24")
async def test_what_is_damaged_is_passed_over(
    streams: StreamManager, memory: MemoryStorage, caplog: pytest.LogCaptureFixture
) -> None:
    await died(memory, "a")
    await died(memory, "b")
    id, *_ = await entries(memory)
    page = await memory.read(id)
    assert page is not None
    damaged = type(page.head)(page.head.version + 1, 0, b"?", page.head.expires_at)
    await memory.commit(id, page.head.version, damaged)
    assert (await next_of(streams)).id in {"a", "b"}
    assert [record for record in caplog.records if "damaged" in record.message]


async def test_the_bell_and_damaged_entries_expire(
    streams: StreamManager, memory: MemoryStorage, storage: FaultyStorage
) -> None:
    await (await streams.open("s", recovery=GO)).close()
    await anyio.sleep(1)
    assert await memory.read(BELL) is not None
    (id,) = await entries(memory)
    page = await memory.read(id)
    assert page is not None
    await memory.commit(id, page.head.version, type(page.head)(page.head.version + 1, 0, b"?", page.head.expires_at))
    storage.ahead_seconds = 3 * FORGET_OPEN_SECONDS
    await streams.sweep()
    assert await memory.read(BELL) is None
    assert await entries(memory) == []


async def test_a_stream_without_its_entry_is_resumed_without_its_input(streams: StreamManager, memory: MemoryStorage) -> None:
    await (await streams.open("s", recovery=GO)).close()
    await anyio.sleep(1)
    (id,) = await entries(memory)
    page = await memory.read(id)
    assert page is not None
    await memory.delete(id, page.head.version)
    stream = await streams.open("s", resume=True)
    assert stream.recovery is not None
    assert stream.recovery.input is None
    there = await memory.read("s")
    assert there is not None
    assert await entries(memory) == [entry_id(core_of(streams).session.name, life_of(there.head).state.life)]
    await stream.done()


async def test_an_open_that_fails_leaves_no_entry(memory: MemoryStorage) -> None:
    storage = FaultyStorage(memory)
    async with StreamManager(storage) as streams:
        await (await streams.open("s")).done()
        storage.is_down = True
        with pytest.raises(StorageError):
            await streams.open("t", recovery=GO)
        storage.is_down = False
        await anyio.sleep(200)
        assert await entries(memory) == []


async def test_an_open_that_fails_in_doubt_leaves_no_entry_either(memory: MemoryStorage) -> None:
    storage = FaultyStorage(memory)
    async with StreamManager(storage) as streams:
        await (await streams.open("s")).done()
        storage.skip("commit")  # of the entry
        storage.lose_answer("commit")
        storage.skip("read")  # before the entry
        storage.refuse("read")
        with pytest.raises(StorageError):
            await streams.open("t", recovery=GO)
        await anyio.sleep(200)
        assert await memory.read("t") is None
        assert await entries(memory) == []


@pytest.mark.promise("P24")
async def test_who_is_released_in_its_producers_place_is_told_and_another_goes_on(
    streams: StreamManager, memory: MemoryStorage
) -> None:
    stream = await streams.open("s", recovery=GO)
    stream.write_soon("a")
    stream.leave_soon()
    assert stream.cancelled.is_set()
    assert stream.end is None
    with pytest.raises(StreamTakenOverError):
        await stream.write("b")
    successor = await next_of(streams)
    stream.leave_soon()
    await successor.done("end")
    assert await replay(streams) == ["a", ("recovering", 0), ("done", "end")]


@pytest.mark.promise("P24")
async def test_a_stream_whose_key_is_anothers_by_now_is_not_gone_on_with(
    streams: StreamManager, memory: MemoryStorage, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    storage = FaultyStorage(memory)
    async with StreamManager(storage) as other:
        await (await other.open("first")).done()
        storage.skip("commit", times=2)  # of the entry and of the stream
        claiming = storage.hold("commit")
        async with anyio.create_task_group() as tasks:

            async def start() -> None:
                with pytest.raises(StorageError):
                    await other.open("s", key="chat", recovery=GO)

            tasks.start_soon(start)
            await claiming.reached.wait()
            storage.is_down = True
            claiming.release(StorageError("killed"))
    successor = await streams.open("t", key="chat")
    with anyio.move_on_after(60):
        await next_of(streams)
    await successor.done()
    assert [record for record in caplog.records if "stream s is not gone on with" in record.message]


@pytest.mark.promise("P24")
@pytest.mark.parametrize(("operation", "number"), [*(("read", number) for number in range(4)), ("delete", 0)])
async def test_what_is_taken_over_again_while_it_is_handed_on_keeps_its_entry(
    streams: StreamManager, storage: FaultyStorage, memory: MemoryStorage, operation: Operation, number: int
) -> None:
    stream = await streams.open("s", recovery=GO)
    storage.skip(operation, times=number)
    late = storage.hold(operation)
    await stream.close()
    await anyio.sleep(1)
    again = await streams.open("s", resume=True)
    late.release()
    await anyio.sleep(1)
    there = await memory.read("s")
    assert there is not None
    assert entry_id(core_of(streams).session.name, life_of(there.head).state.life) in await entries(memory)
    await again.done()


@pytest.mark.promise("P24")
@pytest.mark.parametrize("operation", ["read", "delete"])
async def test_what_is_released_before_its_old_entry_is_forgotten_keeps_its_new_one(
    streams: StreamManager, storage: FaultyStorage, memory: MemoryStorage, mortal: Process, operation: Operation
) -> None:
    await (await mortal.streams.open("s", recovery=GO)).close()
    await anyio.sleep(1)
    stream = await streams.open("s", resume=True)
    late = storage.hold(operation)
    await anyio.sleep(1)
    await stream.close()
    await anyio.sleep(1)
    late.release()
    await anyio.sleep(1)
    assert len(await entries(memory)) == 1
    await (await next_of(streams)).done()


@pytest.mark.promise("P24")
async def test_who_takes_a_stream_over_and_lets_go_of_it_again_and_again_does_so_once_a_second(
    streams: StreamManager, memory: MemoryStorage, elsewhere: StreamManager
) -> None:
    await (await elsewhere.open("s", recovery=GO)).close()
    taken_at: list[float] = []

    async def work(manager: StreamManager) -> None:
        async with manager.recoveries("go") as lost:
            async for stream in lost:
                taken_at.append(anyio.current_time())
                await stream.write("a")
                await stream.close()

    began_at = anyio.current_time()
    with anyio.move_on_after(10):
        async with anyio.create_task_group() as tasks:
            for manager in (streams, elsewhere):
                tasks.start_soon(work, manager)
    assert taken_at[0] == pytest.approx(began_at, abs=1)
    assert all(later - earlier >= 0.9 for earlier, later in itertools.pairwise(taken_at))
    assert len(taken_at) > 5
    stream = await next_of(streams)
    await anyio.sleep(1)
    left_at = anyio.current_time()
    await stream.close()  # it had it for long enough
    await (await next_of(streams)).done()
    assert anyio.current_time() == pytest.approx(left_at, abs=0.5)


@pytest.mark.promise("P24")
@pytest.mark.parametrize("is_dead", [True, False])
async def test_an_app_may_be_down_for_days_if_its_streams_wait_so_long(
    memory: MemoryStorage, clock: Callable[[], float], *, is_dead: bool
) -> None:
    recovery = Recovery("go", 1, within=timedelta(days=5))
    if is_dead:
        await died(memory, recovery=recovery)
    else:
        async with StreamManager(memory) as before:
            await (await before.open("s", recovery=recovery)).close()
    days = 4 * FORGET_OPEN_SECONDS
    for id, head in await memory.scan("", 100):
        if id != BELL and not id.startswith(".session."):
            assert head.expires_at > clock() + days  # some storages forget by themselves
    storage = FaultyStorage(memory)
    storage.ahead_seconds = days
    async with StreamManager(storage) as streams:
        await streams.sweep()
        await (await next_of(streams)).done()


@pytest.mark.promise("P24")
@pytest.mark.parametrize("is_dead", [True, False])
async def test_a_clock_that_went_back_keeps_nobody_from_going_on(
    streams: StreamManager, storage: FaultyStorage, memory: MemoryStorage, *, is_dead: bool
) -> None:
    if is_dead:
        await died(memory)
        await left(streams)
    else:
        await (await streams.open("s", recovery=GO)).close()
    storage.ahead_seconds = -3_600
    with anyio.fail_after(60):
        await (await next_of(streams)).done()


@pytest.mark.promise("P24")
async def test_a_clock_that_goes_back_while_a_stream_is_taken_over_is_waited_for(
    streams: StreamManager, storage: FaultyStorage, memory: MemoryStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    await died(memory)
    await left(streams)
    await anyio.sleep(8)
    core, start = core_of(streams), core_of(streams).session.start

    async def start_and_go_back() -> None:
        await start()
        storage.ahead_seconds = -2

    monkeypatch.setattr(core.session, "start", start_and_go_back)  # what it awaits may take as long as that
    with anyio.fail_after(60):
        await (await next_of(streams)).done()


@pytest.mark.promise("P24")
async def test_who_goes_on_is_called_also_while_it_has_what_it_cannot_go_on_with_yet(memory: MemoryStorage) -> None:
    async with StreamManager(memory) as other, StreamManager(memory, lease=timedelta(hours=1)) as streams:
        await died(memory, "waits", Recovery("go", backoff=timedelta(hours=1)))
        while not (await other.info("waits")).is_recovering:  # noqa: ASYNC110 - whoever asks is not told when to ask again
            await anyio.sleep(0.1)
        async with streams.recoveries("go") as lost:
            for number in range(20):  # in an order that is random
                await (await other.open(f"s{number}", recovery=GO)).close()
                await anyio.sleep(1)
                await (await other.open(f"t{number}", recovery=GO)).close()
                await anyio.sleep(1)
                with anyio.fail_after(60):
                    await (await anext(lost)).done()
                    await (await other.open(f"late{number}", recovery=GO)).close()
                    await anyio.sleep(1)
                    await (await anext(lost)).done()
                    await (await anext(lost)).done()


@pytest.mark.promise("P24")
async def test_an_entry_whose_input_is_damaged_is_passed_over(
    streams: StreamManager, memory: MemoryStorage, caplog: pytest.LogCaptureFixture
) -> None:
    await died(memory, "a")
    (id,) = await entries(memory)
    page = await memory.read(id)
    assert page is not None
    damaged = msgspec.json.encode(msgspec.structs.replace(entry_of(page.head), input="{"))
    await memory.commit(id, page.head.version, type(page.head)(page.head.version + 1, 0, damaged, page.head.expires_at))
    await died(memory, "b")
    assert (await next_of(streams)).id == "b"
    assert [record for record in caplog.records if "damaged" in record.message]


@pytest.mark.parametrize("recovery", [Recovery("go", within=timedelta.max), Recovery("go", backoff=timedelta.max)])
async def test_it_may_be_waited_for_ever(streams: StreamManager, recovery: Recovery) -> None:
    async with streams.open("s", recovery=recovery) as stream:
        assert stream.recovery is not None
        assert stream.recovery.within >= timedelta(minutes=5)


def test_of_thousands_of_deaths_none_has_a_pause_that_cannot_be_told() -> None:
    assert [RecoveryTerms("go", 5_000, backoff, 1).pause(4_000) for backoff in (0.0, 1.0)] == [0, MAX_BACKOFF_SECONDS]


async def test_an_entry_that_cannot_be_forgotten_yet_is_reported(
    streams: StreamManager, storage: FaultyStorage, memory: MemoryStorage, caplog: pytest.LogCaptureFixture
) -> None:
    one, two = await streams.open("one", recovery=GO), await streams.open("two", recovery=GO)
    await one.done()
    storage.refuse("read")
    await anyio.sleep(1.5)  # with the next attempt, a second later
    storage.skip("read", times=1)
    await two.close()
    storage.refuse("read", times=2)
    await anyio.sleep(0.5)
    assert len([record for record in caplog.records if "the entry of its recovery" in record.message]) == 2


async def test_a_stream_that_is_written_here_keeps_its_entry_whoever_thinks_it_has_gone(
    streams: StreamManager, memory: MemoryStorage
) -> None:
    stream = await streams.open("s", recovery=GO)
    there = await memory.read("s")
    assert there is not None
    core_of(streams).let_recovery_go("s", life_of(there.head))
    await anyio.sleep(1)
    assert len(await entries(memory)) == 1
    await stream.done()


def test_an_event_says_whether_its_stream_ends_with_it() -> None:
    types = StreamEventType
    assert [type_ for type_ in types if StreamEvent(type_, 0, b"{}").is_terminal] == [types.DONE, types.ERROR]


@pytest.mark.promise("P24")
async def test_a_stream_whose_creation_was_slow_is_gone_on_with_although_its_entry_was_looked_at_before(
    streams: StreamManager, memory: MemoryStorage
) -> None:
    storage = FaultyStorage(memory)
    async with StreamManager(storage) as other:
        await (await other.open("first")).done()
        storage.skip("commit")  # of the entry
        creating = storage.hold("commit")
        async with anyio.create_task_group() as tasks:
            opened: list[StreamInput] = []

            async def start() -> None:
                opened.append(await other.open("s", recovery=GO))

            tasks.start_soon(start)
            await creating.reached.wait()
            storage.is_down = True
            with anyio.move_on_after(60):
                await next_of(streams)
            assert len(await entries(memory)) == 1
            storage.is_down = False
            creating.release()
        await opened[0].close()
    stream = await next_of(streams)
    assert (stream.id, stream.recovery) == ("s", GO)
    await stream.done()


@pytest.mark.promise("P24")
async def test_an_entry_whose_stream_is_gone_is_forgotten_in_the_end(streams: StreamManager, memory: MemoryStorage) -> None:
    await died(memory)
    await streams.delete("s")
    for seconds, left in ((60, 1), (700, 0)):
        with anyio.move_on_after(seconds):
            await next_of(streams)
        assert len(await entries(memory)) == left


@pytest.mark.promise("P24")
async def test_a_stream_that_is_written_and_has_its_entry_in_another_place_gets_one_where_it_belongs(
    streams: StreamManager, mortal: Process, memory: MemoryStorage
) -> None:
    stream = await mortal.streams.open("s", recovery=GO)
    (id,) = await entries(memory)
    page = await memory.read(id)
    assert page is not None
    await memory.delete(id, page.head.version)
    await memory.commit(PREFIX + "0." + entry_of(page.head).life, None, page.head)
    with anyio.move_on_after(30):
        await next_of(streams)
    assert await entries(memory) == [id]
    mortal.storage.is_down = True
    successor = await next_of(streams)
    assert (successor.id, successor.recovery) == (stream.id, GO)
    await successor.done()


async def test_an_entry_that_is_damaged_is_not_handed_on_and_its_stream_is_resumed_without_its_input(
    streams: StreamManager, memory: MemoryStorage
) -> None:
    stream = await streams.open("s", recovery=GO)
    (id,) = await entries(memory)
    page = await memory.read(id)
    assert page is not None
    await memory.commit(id, page.head.version, type(page.head)(page.head.version + 1, 0, b"?", page.head.expires_at))
    await stream.close()
    await anyio.sleep(1)
    assert await entries(memory) == [id]
    resumed = await streams.open("s", resume=True)
    assert resumed.recovery is not None
    assert resumed.recovery.input is None
    await resumed.done()
    await anyio.sleep(1)
    assert await entries(memory) == []


@pytest.mark.promise("P24")
async def test_a_stream_that_cannot_be_handed_on_yet_is_handed_on_when_the_storage_is_back(
    streams: StreamManager, storage: FaultyStorage
) -> None:
    stream = await streams.open("s", recovery=GO)
    await stream.write("a")
    storage.skip("read")  # of the entry
    storage.refuse("read")
    await stream.close()
    with anyio.fail_after(60):
        successor = await next_of(streams)
    assert successor.recovery == GO
    await successor.done()


@pytest.mark.promise("P24")
async def test_a_stream_that_can_never_be_handed_on_ends_in_time(streams: StreamManager, storage: FaultyStorage) -> None:
    stream = await streams.open("s", recovery=GO)
    await stream.close()
    storage.is_down = True
    await anyio.sleep(600)
    storage.is_down = False
    assert (await streams.info("s")).error == "ABORTED"


@pytest.mark.promise("P24")
async def test_who_comes_too_late_to_take_a_stream_over_leaves_its_input_as_it_is(
    streams: StreamManager, storage: FaultyStorage, memory: MemoryStorage, mortal: Process
) -> None:
    await (await streams.open("first")).done()
    await (await mortal.streams.open("s", recovery=GO)).close()
    await anyio.sleep(1)
    storage.skip("read", times=3)  # of what is found, before its entries are looked for
    late, later = storage.hold("read"), storage.hold("commit")

    async def go_on() -> None:
        stream = await next_of(streams)
        assert stream.recovery == GO
        await stream.done()

    async with StreamManager(memory) as quicker, anyio.create_task_group() as tasks:
        tasks.start_soon(go_on)
        await anyio.sleep(1)
        other = await quicker.open("s", resume=True)
        await anyio.sleep(1)
        late.release()
        await anyio.sleep(1)
        await other.close()
        await anyio.sleep(1)
        later.release()


async def test_an_entry_that_others_change_at_the_same_moment_is_stored_all_the_same(
    streams: StreamManager, memory: MemoryStorage, storage: FaultyStorage
) -> None:
    hold = storage.hold("commit")
    entry = Entry("s", "life", 1.0, "go", "")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(add_entry, core_of(streams).storage, "one", entry)
        await hold.reached.wait()
        await anyio.sleep(1)  # two of one moment would be the same
        await add_entry(core_of(streams).storage, "one", entry)
        hold.release()
    assert await entries(memory) == [entry_id("one", "life")]


async def test_an_entry_that_is_handed_on_while_it_is_looked_for_is_found(
    memory: MemoryStorage, storage: FaultyStorage
) -> None:
    async with StreamManager(memory) as streams:
        stream = await streams.open("s", recovery=GO)
        state = stream._outbox.life.state
        entry = entry_for("s", state, '"why"')
        left = msgspec.structs.replace(state, session="", left_by="dead")
        await add_entry(GuardedStorage(memory), "dead", entry)
        found: list[Found] = []

        async def find() -> None:
            found.extend(await find_entries(GuardedStorage(storage), sessions_of(left), state.life))

        async with anyio.create_task_group() as tasks:
            hold = storage.hold("read", after=True)
            tasks.start_soon(find)
            await hold.reached.wait()
            theirs = await find_entries(GuardedStorage(memory), ["dead"], state.life)
            await hand_on(GuardedStorage(memory), theirs, memory.commit)
            hold.release()
        assert first_entry(found) == entry
