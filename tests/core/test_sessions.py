"""Who is alive: what a session costs, what kills it, what does not, and who is told."""

import contextlib
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from math import inf
from types import FrameType
from typing import Any

import anyio
import pytest
import trio
from anyio import wait_all_tasks_blocked
from hypothesis import given
from hypothesis import strategies as st
from tests.core.helpers import BackupStorage, Process, core_of, replay, resumed
from trio.testing import MockClock

from streamkeep import (
    StorageError,
    StreamBusyError,
    StreamCompletedError,
    StreamInput,
    StreamManager,
    StreamNotFoundError,
    StreamTakenOverError,
)
from streamkeep._core import LOOK_PAUSES, LOOK_SECONDS
from streamkeep._lifecycle import (
    ABSENT,
    FORGET_OPEN_SECONDS,
    MAX_MAIL,
    Mail,
    SessionState,
    Terms,
    challenge,
    mailbox_id,
    post,
    session_id,
    session_of,
)
from streamkeep._observer import CHALLENGES, READS_A_LEASE, Observed
from streamkeep.storage import Head
from streamkeep.storages.memory import MemoryStorage
from streamkeep.testing.faults import FaultyStorage

Clock = Callable[[], float]
HOUR = 3_600.0
TERMS = Terms(300.0, 10.0, 5.0)


class SlowStorage(FaultyStorage):
    """Each of its commits takes a while: a slow disk, a loaded server.

    Attributes:
        commit_seconds: how long.
    """

    def __init__(self, memory: MemoryStorage) -> None:
        super().__init__(memory)
        self.commit_seconds = 0.0

    async def commit(self, stream: str, seen: int | None, head: Head, records: Sequence[bytes] = ()) -> bool:
        await anyio.sleep(self.commit_seconds / 2)
        is_there = await super().commit(stream, seen, head, records)
        await anyio.sleep(self.commit_seconds / 2)
        return is_there


@pytest.fixture
def slow(memory: MemoryStorage) -> SlowStorage:
    """What everybody has."""
    return SlowStorage(memory)


async def still_open(streams: StreamManager, *ids: str) -> bool:
    return all([(await streams.info(stream)).status == "open" for stream in ids])


# What it costs


@pytest.mark.promise("P6")
async def test_idle_writers_cost_one_renewal_however_many_they_are(memory: MemoryStorage) -> None:
    commits: list[int] = []
    for count in (1, 200):
        storage = FaultyStorage(memory)
        async with StreamManager(storage) as streams:
            handles = [await streams.open(f"{count}-{number}") for number in range(count)]
            storage.calls.clear()
            await anyio.sleep(HOUR)
            commits.append(storage.calls["commit"])
            looks = HOUR / LOOK_SECONDS * count
            assert storage.calls["read"] <= 2 * storage.calls["commit"] + looks + 10
            for handle in handles:
                await handle.close()

    assert abs(commits[0] - commits[1]) <= 2
    assert commits[0] == pytest.approx(HOUR / (10 / 3), rel=0.05)


async def test_a_manager_that_only_reads_has_no_session(streams: StreamManager, mortal: Process) -> None:
    await (await mortal.streams.open("s")).done()
    assert [event.offset async for event in await streams.subscribe("s").__aenter__()] == [0]

    assert core_of(streams).session._renewal is None


async def test_of_many_who_open_at_once_one_begins_the_session(streams: StreamManager, storage: FaultyStorage) -> None:
    hold = storage.hold("commit")
    opened: list[StreamInput] = []

    async def open_one(number: int) -> None:
        opened.append(await streams.open(f"s{number}"))

    async with anyio.create_task_group() as tasks:
        for number in range(10):
            tasks.start_soon(open_one, number)
        await hold.reached.wait()
        await wait_all_tasks_blocked()
        assert storage.calls["commit"] == 1
        hold.release()

    assert len(opened) == 10
    assert storage.calls["commit"] == 11


def calls_of(run: Callable[[], None]) -> int:
    """Count the calls of Python functions."""
    count = 0

    def profile(frame: FrameType, event: str, _: object) -> None:
        nonlocal count
        count += event == "call" and "streamkeep" in frame.f_code.co_filename

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.promise("P7")
async def test_cancelling_does_no_work_for_each_writer(streams: StreamManager, storage: FaultyStorage) -> None:
    costs: list[tuple[int, int]] = []
    handles: list[StreamInput] = []
    for count in (10, 5_000):
        while len(handles) < count:
            handles.append(await streams.open(f"s{len(handles)}"))
        await wait_all_tasks_blocked()
        storage.calls.clear()
        # Memory does not suspend, so that it runs in one go.
        with contextlib.suppress(StopIteration):
            calls = calls_of(lambda: run_to_end(streams.cancel(f"s{count - 1}")))  # noqa: B023
            costs.append((storage.calls.total(), calls))

    (storage_calls, calls), (storage_calls_of_many, calls_of_many) = costs
    assert storage_calls_of_many == storage_calls
    assert calls_of_many < 2 * calls  # Python itself may have something to tidy up
    assert handles[-1].cancelled.is_set()


def run_to_end(coroutine: Any) -> None:
    with contextlib.suppress(StopIteration):
        coroutine.send(None)
        coroutine.throw(AssertionError("it has suspended"))


# What does not kill it


@pytest.mark.parametrize("seconds", [16.0, -16.0, HOUR, -HOUR, 3 * FORGET_OPEN_SECONDS])
@pytest.mark.promise("P6")
async def test_a_clock_that_jumps_does_nothing_to_living_writers(
    streams: StreamManager, elsewhere: StreamManager, storage: FaultyStorage, seconds: float
) -> None:
    stream = await streams.open("s")
    async with streams.subscribe("s") as here, elsewhere.subscribe("s") as there:
        await anyio.sleep(20)
        storage.ahead_seconds = seconds
        await anyio.sleep(60)
        with pytest.raises(StreamBusyError):
            await elsewhere.open("s", resume=True)
        await elsewhere.sweep()
        await streams.sweep()
        assert await still_open(elsewhere, "s")
        await stream.write("a")
        await stream.done("end")

        for events in (here, there):
            assert [event.offset async for event in events] == [0, 1]


@pytest.mark.parametrize("ahead", [8.0, 13.0, -13.0, HOUR, -HOUR, 301.0])
@pytest.mark.promise("P6")
async def test_a_machine_whose_clock_is_another_takes_nothing_from_living_writers(
    streams: StreamManager, memory: MemoryStorage, ahead: float
) -> None:
    storage = FaultyStorage(memory)
    storage.ahead_seconds = ahead
    async with StreamManager(storage) as others:
        stream = await streams.open("s")
        async with others.subscribe("s") as events:
            await anyio.sleep(100)
            await others.sweep()
            with pytest.raises(StreamBusyError):
                await others.open("s", resume=True)
            await stream.done("end")
            assert [event.offset async for event in events] == [0]


@pytest.mark.parametrize("seconds", [4.0, 12.0, 40.0])
@pytest.mark.promise("P6")
async def test_a_storage_that_is_slow_for_everybody_kills_no_idle_writer(
    slow: SlowStorage, memory: MemoryStorage, seconds: float
) -> None:
    there = SlowStorage(memory)
    async with StreamManager(slow) as streams, StreamManager(there) as elsewhere:
        stream = await streams.open("s")
        other = await elsewhere.open("other")
        async with elsewhere.subscribe("s") as events, streams.subscribe("other") as others:
            slow.commit_seconds = there.commit_seconds = seconds
            await anyio.sleep(1_000)
            assert await still_open(elsewhere, "s")
            assert await still_open(streams, "other")
            slow.commit_seconds = there.commit_seconds = 0
            await anyio.sleep(100)
            await stream.done()
            await other.done()

            assert [event.offset async for event in events] == [event.offset async for event in others] == [0]


@pytest.mark.promise("P6")
async def test_a_renewal_that_is_overdue_is_logged_once_and_not_begun_again(
    slow: SlowStorage, quiet_logs: pytest.LogCaptureFixture
) -> None:
    async with StreamManager(slow) as streams:
        stream = await streams.open("s")
        slow.commit_seconds = 30
        slow.calls.clear()
        await anyio.sleep(30)

        assert slow.calls["commit"] == 1
        assert [record.getMessage() for record in quiet_logs.records] == [
            "the session was not renewed for 13.3 seconds: the storage is slow"
        ]
        slow.commit_seconds = 0
        await stream.done()


async def test_a_process_that_did_not_run_says_so_and_blames_nobody(
    slow: SlowStorage, quiet_logs: pytest.LogCaptureFixture
) -> None:
    async with StreamManager(slow) as streams:
        stream = await streams.open("s")
        slow.commit_seconds = 1
        clock = trio.lowlevel.current_clock()
        assert isinstance(clock, MockClock)
        clock.jump(30)
        await anyio.sleep(2)

        (record,) = quiet_logs.records
        assert "nothing ran here" in record.getMessage()
        await stream.done()


@pytest.mark.promise("P6")
async def test_a_session_that_cannot_be_renewed_is_renewed_when_the_storage_is_back(
    streams: StreamManager, mortal: Process, quiet_logs: pytest.LogCaptureFixture
) -> None:
    stream = await mortal.streams.open("s")
    async with streams.subscribe("s") as events:
        await anyio.sleep(4)
        mortal.die()
        await anyio.sleep(8)
        mortal.come_back()
        await anyio.sleep(100)
        with pytest.raises(StreamBusyError):
            await streams.open("s", resume=True)
        await stream.done()
        assert [event.offset async for event in events] == [0]

    assert quiet_logs.text.count("could not be renewed") == 1


@pytest.mark.promise("P6")
async def test_a_reader_whose_own_storage_was_away_begins_to_look_anew(
    streams: StreamManager, mortal: Process, storage: FaultyStorage, quiet_logs: pytest.LogCaptureFixture
) -> None:
    """What cannot be read is no silence."""
    stream = await streams.open("s")
    async with mortal.streams.subscribe("s") as events:
        await anyio.sleep(5)
        mortal.die()
        await anyio.sleep(200)
        mortal.come_back()
        await anyio.sleep(30)
        await stream.done()
        assert [event.offset async for event in events] == [0]

    assert quiet_logs.text.count("cannot be observed") == 1
    assert storage.calls["commit"] > 50


@pytest.mark.promise("P6", "P19")
async def test_a_session_whose_head_is_gone_is_stored_again(
    streams: StreamManager, elsewhere: StreamManager, storage: FaultyStorage
) -> None:
    stream = await streams.open("s")
    id = session_id(core_of(streams).session.name)
    async with elsewhere.subscribe("s") as events:
        await anyio.sleep(20)
        page = await storage.read(id)
        assert page is not None
        await storage.delete(id, page.head.version)
        await anyio.sleep(60)
        assert await storage.read(id) is not None
        await stream.done()

        assert [event.offset async for event in events] == [0]


@pytest.mark.promise("P6")
async def test_a_manager_never_judges_its_own_writers(streams: StreamManager, storage: FaultyStorage) -> None:
    stream = await streams.open("s")
    async with streams.subscribe("s") as events:
        hold = storage.hold("commit")
        await hold.reached.wait()
        for _ in range(20):
            await anyio.sleep(5)
            assert await still_open(streams, "s")
            with pytest.raises(StreamBusyError):
                await streams.open("s", resume=True)
        hold.release()
        await stream.done()

        assert [event.offset async for event in events] == [0]


@pytest.mark.promise("P6")
async def test_a_session_that_answers_a_challenge_lives(
    streams: StreamManager, elsewhere: StreamManager, storage: FaultyStorage
) -> None:
    stream = await streams.open("s")
    id = session_id(core_of(streams).session.name)
    for _ in range(20):
        page = await storage.read(id)
        assert page is not None
        await storage.commit(id, page.head.version, challenge(page.head, session_of(page.head), storage.time(), "who"))
        await anyio.sleep(3.4)
        page = await storage.read(id)
        assert page is not None
        assert not session_of(page.head).is_challenged
    await stream.done()


# What kills it


@pytest.mark.promise("P6")
async def test_a_session_that_has_said_that_it_is_over_is_dead_at_once(
    streams: StreamManager, memory: MemoryStorage, clock: Clock
) -> None:
    storage = FaultyStorage(memory)
    async with StreamManager(storage) as others:
        stream = await others.open("s")
        await anyio.sleep(1)
        storage.refuse("commit")  # the stream cannot be released; the session can be ended
        storage.refuse("read")
        storage.hold("commit")
        began = clock()
    async with streams.subscribe("s") as events:
        assert (await anext(events)).error.status == "ABORTED"

    assert clock() - began < 15
    assert stream.cancelled.is_set()


async def test_a_session_that_cannot_be_ended_is_seen_to_end(
    streams: StreamManager, memory: MemoryStorage, quiet_logs: pytest.LogCaptureFixture
) -> None:
    storage = FaultyStorage(memory)
    async with StreamManager(storage) as others:
        await (await others.open("s")).close()
        await anyio.sleep(1)
        storage.is_down = True

    assert "the session could not be ended" in quiet_logs.text
    async with streams.subscribe("s") as events:
        assert (await anext(events)).error.status == "ABORTED"


@pytest.mark.promise("P6")
async def test_whoever_asks_for_a_stream_ends_it_when_its_session_is_dead(streams: StreamManager, mortal: Process) -> None:
    stream = await mortal.streams.open("s")
    mortal.die()
    assert (await streams.info("s")).status == "open"
    await anyio.sleep(18)

    assert (await streams.info("s")).error == "ABORTED"
    mortal.come_back()
    assert await woken(stream)


@pytest.mark.promise("P6")
async def test_what_a_writer_has_stored_and_told_nobody_before_it_died_is_read_before_its_stream_is_ended(
    streams: StreamManager, mortal: Process, memory: MemoryStorage
) -> None:
    stream = await mortal.streams.open("s")
    async with streams.subscribe("s") as events:
        await wait_all_tasks_blocked()
        told, memory._doorbells = memory._doorbells, type(memory._doorbells)()
        await stream.write("stored")
        memory._doorbells = told
        mortal.die()

        with anyio.fail_after(20):
            assert [event.data async for event in events if event.offset == 0] == [b'"stored"']
    assert (await streams.info("s")).error == "ABORTED"


@pytest.mark.promise("P6")
async def test_of_a_session_that_is_known_to_be_dead_the_next_reader_is_told_at_once(
    streams: StreamManager, mortal: Process, clock: Clock
) -> None:
    handles = [await mortal.streams.open(stream) for stream in "ab"]
    mortal.die()
    async with streams.subscribe("a") as events:
        assert (await anext(events)).error.status == "ABORTED"
    began = clock()
    async with streams.subscribe("b") as events:
        assert (await anext(events)).error.status == "ABORTED"

    assert clock() - began < 0.1
    mortal.come_back()
    assert all([await woken(stream) for stream in handles])


@pytest.mark.promise("P6")
async def test_a_reader_that_learns_of_its_writers_death_while_it_reads_ends_the_stream(
    streams: StreamManager, mortal: Process, storage: FaultyStorage
) -> None:
    handles = [await mortal.streams.open(stream) for stream in "ab"]
    mortal.die()
    async with streams.subscribe("a") as events:
        assert (await anext(events)).error.status == "ABORTED"
    await wait_all_tasks_blocked()  # the writer is told as well
    storage.skip("read")  # by which it is entered
    hold = storage.hold("read", after=True)
    async with streams.subscribe("b") as events:
        await hold.reached.wait()
        await wait_all_tasks_blocked()
        hold.release()
        with anyio.fail_after(1):
            assert (await anext(events)).error.status == "ABORTED"

    mortal.come_back()
    assert all([await woken(stream) for stream in handles])


async def test_a_clock_that_goes_back_puts_off_the_end_of_what_was_released(
    streams: StreamManager, storage: FaultyStorage, clock: Clock
) -> None:
    await (await streams.open("s")).close()
    began = clock()
    async with streams.subscribe("s") as events:
        await wait_all_tasks_blocked()
        storage.calls.clear()
        storage.ahead_seconds = -100
        assert (await anext(events)).error.status == "ABORTED"

    assert clock() - began == pytest.approx(115)
    assert storage.calls["read"] < 100


# A storage that went back to where a stream was open


@dataclass(frozen=True)
class Reopened:
    """A stream that its writer has ended, and that is open again, of a session that lives and knows nothing of it."""

    here: StreamManager
    elsewhere: StreamManager
    storage: FaultyStorage


@pytest.fixture
async def reopened(clock: Clock) -> AsyncIterator[Reopened]:
    backup = BackupStorage(clock=clock)
    storage = FaultyStorage(backup)
    async with StreamManager(backup) as here, StreamManager(storage) as elsewhere:
        stream = await here.open("s")
        await stream.write("a")
        backup.back_up()
        await stream.done()
        backup.go_back()
        yield Reopened(here, elsewhere, storage)


@pytest.mark.parametrize("where", ["here", "elsewhere"])
@pytest.mark.promise("P6", "P19")
async def test_a_stream_that_nobody_writes_although_its_session_lives_is_ended_for_its_readers(
    reopened: Reopened, where: str, clock: Clock
) -> None:
    began = clock()
    streams: StreamManager = getattr(reopened, where)
    async with streams.subscribe("s") as events:
        assert (await anext(events)).chunk == "a"
        assert (await anext(events)).error.status == "ABORTED"

    assert clock() - began < LOOK_SECONDS + 5


async def test_who_cannot_be_asked_for_a_writer_is_asked_again(
    reopened: Reopened, quiet_logs: pytest.LogCaptureFixture
) -> None:
    async with reopened.elsewhere.subscribe("s") as events:
        assert (await anext(events)).chunk == "a"
        await anyio.sleep(LOOK_SECONDS - 1)
        reopened.storage.refuse("commit")
        assert (await anext(events)).error.status == "ABORTED"

    assert "could not be told" in quiet_logs.text


async def test_a_session_that_cannot_see_whether_it_has_a_writer_for_a_stream_says_so(
    streams: StreamManager, storage: FaultyStorage, quiet_logs: pytest.LogCaptureFixture
) -> None:
    await (await streams.open("s")).done()
    await wait_all_tasks_blocked()
    storage.refuse("read")
    core_of(streams).look(["s", "never-was"])
    await wait_all_tasks_blocked()

    assert "cannot see whether it still has a writer" in quiet_logs.text
    assert (await streams.info("s")).status == "done"


async def test_a_stream_that_is_being_opened_has_a_writer(streams: StreamManager, storage: FaultyStorage) -> None:
    await (await streams.open("other")).done()
    hold = storage.hold("commit", after=True)
    async with anyio.create_task_group() as tasks:

        async def open_it() -> None:
            await (await streams.open("s")).done("mine")

        tasks.start_soon(open_it)
        await hold.reached.wait()
        core_of(streams).look(["s"])
        await wait_all_tasks_blocked()
        hold.release()

    assert await replay(streams) == [("done", "mine")]


async def test_a_stream_that_was_released_and_goes_nowhere_is_not_asked_for(
    streams: StreamManager, storage: FaultyStorage
) -> None:
    async with StreamManager(storage, grace=timedelta(hours=1)) as lenient:
        await (await lenient.open("s")).close()
        async with lenient.subscribe("s") as events:
            await wait_all_tasks_blocked()
            storage.calls.clear()
            await anyio.sleep(LOOK_SECONDS * 2)
            stream = await lenient.open("s", resume=True)
            await stream.done()
            assert [event.offset async for event in events] == [0]


async def woken(stream: StreamInput, seconds: float = 10) -> bool:
    with anyio.move_on_after(seconds):
        await stream.cancelled.wait()
    return stream.cancelled.is_set()


async def test_a_session_is_observed_only_while_somebody_wants_to_know(
    streams: StreamManager, elsewhere: StreamManager, storage: FaultyStorage
) -> None:
    stream = await streams.open("s")
    await elsewhere.info("s")
    await anyio.sleep(300)
    assert core_of(elsewhere).observer._observations == {}
    async with elsewhere.subscribe("s"):
        await anyio.sleep(300)
        assert len(core_of(elsewhere).observer._observations) == 1
    await anyio.sleep(200)

    assert core_of(elsewhere).observer._observations == {}
    await stream.done()


async def test_terms_are_those_of_the_session_and_not_of_who_looks(storage: FaultyStorage, clock: Clock) -> None:
    mine = FaultyStorage(storage)
    async with (
        StreamManager(mine, lease=timedelta(seconds=60), grace=timedelta(seconds=60)) as patient,
        StreamManager(storage, lease=timedelta(seconds=1), grace=timedelta(0)) as hasty,
    ):
        stream = await patient.open("s")
        await anyio.sleep(100)
        mine.is_down = True
        began = clock()
        async with hasty.subscribe("s") as events:
            assert (await anext(events)).error.status == "ABORTED"
        mine.is_down = False

    assert 100 <= clock() - began <= 160
    assert stream.is_closed


# Who is told


@pytest.mark.parametrize("verb", ["cancel", "delete"])
@pytest.mark.promise("P7")
async def test_a_quiet_writer_learns_at_once_what_another_process_did(
    streams: StreamManager, elsewhere: StreamManager, clock: Clock, verb: str
) -> None:
    stream, other = await streams.open("s"), await streams.open("other")
    await anyio.sleep(60)
    began = clock()
    await getattr(elsewhere, verb)("s")
    await stream.cancelled.wait()

    assert clock() - began < 0.5
    assert not other.cancelled.is_set()
    with pytest.raises(StreamCompletedError if verb == "cancel" else StreamNotFoundError):
        await stream.write("late")


@pytest.mark.promise("P4", "P7")
async def test_a_process_that_was_stopped_learns_when_it_goes_on_what_it_has_lost(
    streams: StreamManager, mortal: Process
) -> None:
    names = ["cancelled", "deleted", "taken", "aborted", "kept"]
    handles = {name: await mortal.streams.open(name) for name in names[:-1]}
    mortal.die()
    await streams.cancel("cancelled")
    await streams.delete("deleted")
    successor = await resumed(streams, "taken")
    await anyio.sleep(10)
    assert (await streams.info("aborted")).error == "ABORTED"
    mortal.come_back()
    whys = [StreamCompletedError, StreamNotFoundError, StreamTakenOverError, StreamCompletedError]

    for (name, stream), why in zip(handles.items(), whys, strict=True):
        assert await woken(stream, 5), name
        with pytest.raises(why):
            await stream.write("late")
    await successor.done()


@pytest.mark.promise("P7")
async def test_a_process_learns_of_more_than_fits_into_its_mail(streams: StreamManager, mortal: Process) -> None:
    handles = [await mortal.streams.open(f"s{number:03}") for number in range(MAX_MAIL + 20)]
    kept = await mortal.streams.open("kept")
    mortal.die()
    for stream in handles:
        await streams.cancel(stream.id)
    mortal.come_back()
    for stream in handles:
        assert await woken(stream, 6)

    assert not kept.cancelled.is_set()
    await kept.done()


@pytest.mark.promise("P7")
async def test_mail_is_not_lost_with_the_answer_of_the_renewal_that_takes_it(
    streams: StreamManager, mortal: Process, clock: Clock
) -> None:
    stream = await mortal.streams.open("s")
    await anyio.sleep(60)
    mortal.storage.lose_answer("commit")
    mortal.storage.skip("read", times=2)  # it looks for mail, and takes it
    mortal.storage.refuse("read")  # and cannot see what became of that
    began = clock()
    await streams.cancel("s")
    await stream.cancelled.wait()

    assert clock() - began < 5


async def test_mail_that_cannot_be_taken_out_is_looked_at_once(mortal: Process, memory: MemoryStorage) -> None:
    """As when the disk is full: nothing can be changed, and everything be read."""
    handles = [await mortal.streams.open(f"{number}") for number in range(100)]
    await wait_all_tasks_blocked()
    mortal.storage.refuse("delete", times=60)
    mortal.storage.calls.clear()
    name = core_of(mortal.streams).session.name
    await memory.commit(mailbox_id(name), None, post(None, Mail(("*",)), memory.time(), "who"))
    await anyio.sleep(50)

    assert mortal.storage.calls["read"] < 100 + 2 * 50 + 20
    await anyio.sleep(20)
    assert await memory.read(mailbox_id(name)) is None
    for stream in handles:
        await stream.done()


@pytest.mark.promise("P7")
async def test_a_writer_that_could_not_be_told_is_told_a_little_later(
    streams: StreamManager, elsewhere: StreamManager, storage: FaultyStorage, quiet_logs: pytest.LogCaptureFixture
) -> None:
    stream = await streams.open("s")
    await (await elsewhere.open("other")).done()
    await anyio.sleep(60)
    storage.skip("read")
    storage.refuse("read")
    await elsewhere.cancel("s")
    assert "could not be told" in quiet_logs.text

    assert await woken(stream, 2)


@pytest.mark.promise("P7")
async def test_listening_goes_on_when_the_storage_is_back(
    streams: StreamManager, elsewhere: StreamManager, storage: FaultyStorage, quiet_logs: pytest.LogCaptureFixture
) -> None:
    storage.refuse("watch", times=3)
    stream = await streams.open("s")
    await anyio.sleep(10)
    await elsewhere.cancel("s")

    assert await woken(stream, 1)
    assert quiet_logs.text.count("noticed late") == 1


async def test_a_session_that_is_not_there_is_told_all_the_same(
    streams: StreamManager, elsewhere: StreamManager, memory: MemoryStorage
) -> None:
    """A clock that jumped has expired it, and it is not renewed yet."""
    stream = await streams.open("s")
    id = session_id(core_of(streams).session.name)
    page = await memory.read(id)
    assert page is not None
    assert await memory.delete(id, page.head.version)
    await elsewhere.cancel("s")

    assert await woken(stream, 1)


async def test_two_cancellations_of_one_moment_under_one_id_are_both_told(
    streams: StreamManager, elsewhere: StreamManager
) -> None:
    await anyio.sleep(1)
    for _ in range(2):
        stream = await streams.open("s")
        await wait_all_tasks_blocked()
        await elsewhere.cancel("s")
        await wait_all_tasks_blocked()
        assert stream.cancelled.is_set()
        await elsewhere.delete("s")


async def test_telling_a_session_that_is_over_does_nothing(
    streams: StreamManager, memory: MemoryStorage, storage: FaultyStorage
) -> None:
    async with StreamManager(memory) as brief:
        name = core_of(brief).session.name
        await (await brief.open("s")).close()
    await core_of(streams).observer.tell(name, "s")

    assert await storage.read(mailbox_id(name)) is None


async def test_telling_goes_on_when_somebody_else_was_first(
    streams: StreamManager, elsewhere: StreamManager, memory: MemoryStorage, storage: FaultyStorage
) -> None:
    stream = await streams.open("s")
    await anyio.sleep(1)
    page = await memory.read("s")
    assert page is not None
    await memory.delete("s", page.head.version)
    name = core_of(streams).session.name
    hold = storage.hold("commit")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(core_of(elsewhere).observer.tell, name, "s")
        await hold.reached.wait()
        await memory.commit(mailbox_id(name), None, post(None, Mail(("another",)), memory.time(), "who"))
        hold.release()

    assert await woken(stream, 1)


async def test_a_session_whose_head_others_change_all_the_time_is_told(memory: MemoryStorage) -> None:
    class Rival(FaultyStorage):
        async def commit(self, stream: str, seen: int | None, head: Head, records: Sequence[bytes] = ()) -> bool:
            return not stream.startswith(".") and await super().commit(stream, seen, head, records)

    async with StreamManager(Rival(memory)) as streams:
        with pytest.raises(StorageError, match="all the time"):
            await streams.open("s")


# Observing, as a pure function


def seen(beat: int, *, is_challenged: bool = False, is_over: bool = False) -> SessionState:
    return SessionState(beat, 10.0, 5.0, is_over, is_challenged)


PAUSE = 10.0 / READS_A_LEASE


def watched(observed: Observed, state: SessionState, seconds: float) -> None:
    """Look for so long at a session that stays as it is."""
    for _ in range(round(seconds / PAUSE)):
        observed.see(state, PAUSE)


def test_what_has_not_been_looked_at_yet_is_not_dead() -> None:
    observed = Observed(TERMS)
    observed.see(seen(7), 1_000_000.0)

    assert (observed.silent, observed.proven, observed.is_dead) == (0, 0, False)


def test_a_session_that_is_silent_for_lease_and_grace_and_leaves_a_challenge_unanswered_is_dead() -> None:
    observed = Observed(TERMS)
    observed.see(seen(7), 0)
    watched(observed, seen(7), 6)
    assert observed.is_to_be_challenged
    observed.challenge_took = 0.01
    watched(observed, seen(7, is_challenged=True), 8)
    assert (observed.proven, observed.is_dead) == (14, False)
    watched(observed, seen(7, is_challenged=True), 2)

    assert observed.is_dead


def test_a_session_that_was_not_challenged_is_never_dead_and_never_taken_over_from() -> None:
    observed = Observed(TERMS)
    observed.see(seen(7), 0)
    watched(observed, seen(7), 1_000)

    assert observed.proven < 10
    assert not observed.is_dead


def test_a_challenge_that_took_long_gives_as_much_more_time_for_the_answer() -> None:
    observed = Observed(TERMS)
    observed.see(seen(7), 0)
    watched(observed, seen(7), 6)
    observed.challenge_took = 4.0
    watched(observed, seen(7, is_challenged=True), 4 * CHALLENGES)
    assert not observed.is_dead
    watched(observed, seen(7, is_challenged=True), 4)

    assert observed.is_dead


def test_a_challenge_of_somebody_elses_does_not_show_how_slow_commits_are() -> None:
    observed = Observed(TERMS)
    observed.see(seen(7, is_challenged=True), 0)
    watched(observed, seen(7, is_challenged=True), 1_000)

    assert observed.is_to_be_challenged
    assert not observed.is_dead


def test_an_answer_makes_everything_begin_anew() -> None:
    observed = Observed(TERMS)
    observed.see(seen(7), 0)
    watched(observed, seen(7), 6)
    observed.challenge_took = 0.01
    watched(observed, seen(7, is_challenged=True), 8)
    observed.see(seen(8), PAUSE)
    assert (observed.silent, observed.proven) == (0, 0)
    watched(observed, seen(8), 1_000)

    assert not observed.is_dead


def test_a_session_that_is_over_is_dead_at_once() -> None:
    observed = Observed(TERMS)
    observed.see(seen(7, is_over=True), 0)

    assert (observed.proven, observed.is_dead, observed.is_to_be_challenged) == (inf, True, False)


def test_a_session_that_is_not_there_is_dead_when_it_was_not_there_for_lease_and_grace() -> None:
    observed = Observed(TERMS)
    observed.see(observed.absent, 0)
    watched(observed, observed.absent, 8)
    assert observed.is_to_be_challenged
    observed.challenge_took = 0.01
    watched(observed, seen(ABSENT, is_challenged=True), 6)
    assert not observed.is_dead
    watched(observed, seen(ABSENT, is_challenged=True), 2)
    assert observed.is_dead
    observed.see(seen(1), PAUSE)

    assert not observed.is_dead


def test_a_session_whose_head_is_removed_while_it_is_looked_at_has_as_long_to_come_back() -> None:
    observed = Observed(TERMS)
    observed.see(seen(7), 0)
    watched(observed, seen(7), 8)
    watched(observed, observed.absent, 8)
    assert observed.is_to_be_challenged
    observed.challenge_took = 0.01
    watched(observed, seen(ABSENT, is_challenged=True), 6)
    assert not observed.is_dead
    watched(observed, seen(ABSENT, is_challenged=True), 4)

    assert observed.is_dead


def test_a_session_that_is_not_there_is_not_dead_before_it_was_asked() -> None:
    """The storage has lost it, and its renewal may be on a slow way."""
    observed = Observed(TERMS)
    watched(observed, observed.absent, 1_000)

    assert not observed.is_dead


@pytest.mark.parametrize("beat", [ABSENT, 1])
def test_a_challenge_that_the_storage_has_lost_is_made_again(beat: int) -> None:
    observed = Observed(TERMS)
    observed.see(seen(beat), 0)
    watched(observed, seen(beat), 8)
    observed.challenge_took = 0.01
    watched(observed, seen(beat), 2)
    assert observed.is_to_be_challenged
    observed.challenge_took = 0.01
    watched(observed, seen(beat, is_challenged=True), 8)

    assert observed.is_dead


def test_terms_are_those_that_the_session_has_told() -> None:
    observed = Observed(TERMS)
    observed.see(SessionState(1, 100.0, 50.0), 0)

    assert (observed.terms.lease, observed.terms.grace) == (100, 50)


def test_terms_are_not_those_of_who_asks_a_session_that_is_not_there() -> None:
    observed = Observed(TERMS)
    observed.see(SessionState(ABSENT, 3_600.0, 5.0, is_challenged=True), 0)

    assert observed.terms == TERMS


READS = st.lists(
    st.builds(seen, st.one_of(st.just(ABSENT), st.integers(1, 3)), is_challenged=st.booleans()),
    min_size=1,
    max_size=60,
)


@given(reads=READS, took=st.one_of(st.none(), st.floats(0, 5)))
def test_only_what_was_the_same_in_all_reads_for_lease_and_grace_is_dead(reads: list[SessionState], took: float | None) -> None:
    observed = Observed(TERMS)
    same = 0
    last: object = object()
    for read in reads:
        observed.see(read, PAUSE)
        if observed.is_to_be_challenged:
            observed.challenge_took = took
        same = same + 1 if read.beat == last else 0
        last = read.beat

        if observed.is_dead:
            assert same * PAUSE >= 15 - PAUSE  # what is not there at first counts from the first read on
            assert took is not None
        if observed.proven >= 10:
            assert same * PAUSE >= 10 - PAUSE


async def test_a_look_that_fails_is_repeated_for_a_while_and_not_by_each_who_asks_for_it(
    streams: StreamManager, elsewhere: StreamManager, storage: FaultyStorage
) -> None:
    stream = await streams.open("s")
    core = core_of(streams)
    storage.refuse("read", times=1_000)
    for _ in range(3):
        core.look(["s"])
    await anyio.sleep(sum(LOOK_PAUSES) + 1)
    assert not core._unsure  # it has given up, until somebody asks again
    assert not stream.cancelled.is_set()
    storage._steps["read"].clear()

    await elsewhere.cancel("s")
    await stream.cancelled.wait()
