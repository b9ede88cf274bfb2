"""Threads, event loops, tasks and forks: what works from where, and what says that it does not."""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Sequence
from datetime import timedelta
from pathlib import Path
from threading import Event as ThreadEvent
from threading import Thread, current_thread
from typing import Any

import anyio
import pytest
from anyio import to_thread, wait_all_tasks_blocked
from anyio.lowlevel import checkpoint
from tests.core.helpers import core_of, replay

from streamkeep import (
    InMemoryStreamManager,
    LimitExceededError,
    StorageError,
    StreamCompletedError,
    StreamInput,
    StreamManager,
    StreamManagerClosedError,
    Subscription,
    WrongEventLoopError,
)
from streamkeep._background import Background, LastingExecutor, loop_here, not_ours, ran
from streamkeep._lifecycle import session_id, session_of
from streamkeep.storage import Head
from streamkeep.storages.memory import MemoryStorage
from streamkeep.storages.sqlite import SQLiteStorage
from streamkeep.testing.faults import FaultyStorage

BOUND_SECONDS = 20


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """Real time: threads know no other."""
    return str(request.param)


@pytest.fixture
async def streams() -> AsyncIterator[StreamManager]:
    async with InMemoryStreamManager() as manager:
        yield manager


async def stored(stream: StreamInput, tail: int) -> None:
    """Wait until so many events are stored."""
    with anyio.fail_after(BOUND_SECONDS):
        while stream.tail < tail:  # noqa: ASYNC110 - nothing else tells
            await anyio.sleep(0.001)


# Parking lots


async def test_all_who_wait_in_a_parking_lot_are_woken_together_and_who_comes_later_waits() -> None:
    lot, woken = loop_here().parking_lot(), list[str]()

    async def park(name: str) -> None:
        await lot.park()
        woken.append(name)

    async with anyio.create_task_group() as tasks:
        for name in ("one", "two"):
            tasks.start_soon(park, name)
        await wait_all_tasks_blocked()
        assert len(lot) == 2
        lot.unpark_all()
        tasks.start_soon(park, "later")
        await wait_all_tasks_blocked()
        assert (sorted(woken), len(lot)) == (["one", "two"], 1)
        lot.unpark_all()
    assert woken[2:] == ["later"]


async def call(function: Callable[[], object]) -> None:
    function()


@pytest.mark.parametrize("is_woken", [False, True])
async def test_who_is_cancelled_in_a_parking_lot_waits_there_no_more(*, is_woken: bool) -> None:
    lot = loop_here().parking_lot()
    async with anyio.create_task_group() as tasks:
        with anyio.CancelScope() as scope:
            tasks.start_soon(lot.park)
            await wait_all_tasks_blocked()
            tasks.start_soon(call, scope.cancel)
            if is_woken:
                tasks.start_soon(call, lot.unpark_all)
            await lot.park()
        assert len(lot) == (0 if is_woken else 1)
        lot.unpark_all()
    assert len(lot) == 0


# Threads


@pytest.mark.promise("P3", "P20")
async def test_what_is_written_soon_in_a_thread_is_stored_in_order_without_another_call(streams: StreamManager) -> None:
    stream = await streams.open("s")
    offsets = await to_thread.run_sync(lambda: [stream.write_soon(number) for number in range(1_000)])
    await stored(stream, 1_000)

    assert offsets == [*range(1_000)]
    assert await replay(streams) == [*range(1_000)]
    await stream.done()


@pytest.mark.promise("P20")
async def test_threads_and_the_loop_may_write_at_once(streams: StreamManager) -> None:
    stream = await streams.open("s")
    placed: dict[int, tuple[int, int]] = {}

    def write(thread: int) -> None:
        for number in range(500):
            placed[stream.write_soon([thread, number])] = (thread, number)

    async with anyio.create_task_group() as tasks:
        for thread in range(4):
            tasks.start_soon(to_thread.run_sync, write, thread)
        for number in range(500):
            placed[await stream.write([4, number])] = (4, number)
    await stream.flush()

    found = [tuple(chunk) for chunk in await replay(streams)]
    assert found == [placed[offset] for offset in range(2_500)]
    for thread in range(5):
        assert [number for who, number in found if who == thread] == [*range(500)]
    await stream.done()


@pytest.mark.promise("P20")
async def test_a_thread_is_told_at_the_call_what_is_refused_and_nothing_is_kept_of_it(streams: StreamManager) -> None:
    stream = await streams.open("s")

    def wrong() -> None:
        with pytest.raises(LimitExceededError):
            stream.write_soon("x" * (5 << 20))

    await to_thread.run_sync(wrong)
    await to_thread.run_sync(stream.write_soon, "right")
    await stored(stream, 1)
    await streams.cancel("s")

    def late() -> None:
        with pytest.raises(StreamCompletedError):
            stream.write_soon("late")

    await to_thread.run_sync(late)
    assert (await replay(streams))[0] == "right"


async def refusals(streams: StreamManager, stream: StreamInput) -> list[str]:
    """Call everything that belongs to the event loop, from where this runs; give what did not say so."""
    calls: dict[str, Callable[[], Awaitable[object]]] = {
        "write": lambda: stream.write("wrong"),
        "flush": stream.flush,
        "done": lambda: stream.done("wrong"),
        "error": lambda: stream.error(ValueError("wrong")),
        "close": stream.close,
        "open": lambda: streams.open("new"),
        "enter": lambda: streams.open("new").__aenter__(),
        "resume": lambda: streams.open("s", resume=True),
        "cancel": lambda: streams.cancel("s"),
        "delete": lambda: streams.delete("s"),
        "info": lambda: streams.info("s"),
        "list": streams.list,
        "sweep": streams.sweep,
        "subscribe": lambda: streams.subscribe("s").__aenter__(),
        "aclose": streams.aclose,
        "enter the manager": streams.__aenter__,
    }
    wrong: list[str] = []
    for name, call in calls.items():
        try:
            await call()
        except WrongEventLoopError:
            continue
        except BaseException as error:
            wrong.append(f"{name}: {error!r}")
        else:
            wrong.append(name)
    return wrong


@pytest.mark.promise("P20")
@pytest.mark.parametrize("other", ["asyncio", "trio"])
async def test_another_event_loop_is_told_at_the_call_and_nothing_is_changed(streams: StreamManager, other: str) -> None:
    stream = await streams.open("s")
    await stream.write("a")
    wrong = await to_thread.run_sync(lambda: anyio.run(refusals, streams, stream, backend=other))

    assert wrong == []
    await stream.write("b")
    await stream.done("c")
    assert await replay(streams) == ["a", "b", ("done", "c")]
    assert [info.id for info in await streams.list()] == ["s"]


@pytest.mark.promise("P20")
async def test_a_thread_without_an_event_loop_is_told_at_the_call_too(streams: StreamManager) -> None:
    stream = await streams.open("s")

    def wrong() -> None:
        for call in (lambda: stream.write("wrong"), lambda: streams.info("s").send(None), lambda: stream.flush().send(None)):
            with pytest.raises(WrongEventLoopError):
                call()

    await to_thread.run_sync(wrong)
    await stream.done()
    assert stream.tail == 1


@pytest.mark.promise("P20")
async def test_a_subscription_is_left_where_it_was_entered(streams: StreamManager) -> None:
    stream = await streams.open("s")
    async with streams.subscribe("s") as events:
        with pytest.raises(WrongEventLoopError):
            await to_thread.run_sync(lambda: asyncio.run(leave(events)))
        await stream.done("all of it")
        assert (await anext(events)).output == "all of it"
    left = streams.subscribe("s")
    await left.__aenter__()
    await streams.aclose()
    await to_thread.run_sync(lambda: asyncio.run(leave(left)))  # there is nothing any more that it could disturb


async def leave(events: Subscription[object]) -> None:
    await events.__aexit__(None, None, None)


@pytest.mark.promise("P20")
async def test_another_event_loop_may_write_soon(streams: StreamManager) -> None:
    stream = await streams.open("s")

    async def write() -> None:
        for number in range(10):
            stream.write_soon(number)

    await to_thread.run_sync(lambda: asyncio.run(write()))
    await stored(stream, 10)
    assert await replay(streams) == [*range(10)]
    await stream.done()


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.promise("P20")
async def test_a_handle_whose_event_loop_has_ended_says_so(backend: str) -> None:
    kept: list[StreamInput] = []

    async def abandon() -> None:
        manager = InMemoryStreamManager()
        await manager.__aenter__()
        kept.append(await manager.open("s"))

    await to_thread.run_sync(lambda: anyio.run(abandon, backend=backend))
    with pytest.raises(WrongEventLoopError):
        kept[0].write_soon("late")
    with pytest.raises(WrongEventLoopError):
        await kept[0].done()
    kept.clear()


@pytest.mark.promise("P20")
async def test_a_handle_may_be_dropped_in_another_thread(streams: StreamManager) -> None:
    held = [await streams.open("s")]
    with pytest.warns(ResourceWarning, match="was dropped"):
        await to_thread.run_sync(held.clear)
    with anyio.fail_after(BOUND_SECONDS):
        while (await streams.info("s")).session:  # noqa: ASYNC110 - nothing else tells
            await anyio.sleep(0.001)

    await (await streams.open("s", resume=True)).done()


# Tasks


@pytest.mark.promise("P14", "P20")
async def test_a_manager_may_be_entered_in_one_task_and_left_in_another(anyio_backend: str) -> None:
    manager = InMemoryStreamManager()
    kept: list[StreamInput] = []

    async def enter() -> None:
        await manager.__aenter__()
        kept.append(await manager.open("s"))

    async def leave() -> None:
        await manager.__aexit__(None, None, None)

    for run in (enter, leave):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run)

    assert kept[0].cancelled.is_set()
    assert not manager.is_running


@pytest.mark.promise("P14", "P20")
async def test_a_manager_that_was_left_may_be_entered_again_also_in_another_event_loop() -> None:
    kept, forgetful = StreamManager(MemoryStorage()), InMemoryStreamManager()

    async def use(number: int) -> None:
        for manager, offset in ((kept, number), (forgetful, 0)):
            async with manager as streams:
                stream = await streams.open("s", resume=True)
                assert await stream.write("a") == offset
                await stream.close()

    for number in range(2):
        await use(number)
    for number, backend in ((2, "trio"), (3, "asyncio")):
        await to_thread.run_sync(lambda: anyio.run(use, number, backend=backend))  # noqa: B023
    with pytest.raises(StreamManagerClosedError):
        await kept.open("s")


async def test_a_manager_that_is_entered_cannot_be_entered_again(streams: StreamManager) -> None:
    with pytest.raises(RuntimeError, match="entered already"):
        await streams.__aenter__()
    await (await streams.open("s")).done()


async def test_a_background_task_that_fails_is_logged_with_its_traceback_and_ends_no_other(
    streams: StreamManager, quiet_logs: pytest.LogCaptureFixture
) -> None:
    class NativeError(BaseException):
        pass

    async def fail(error: BaseException) -> None:
        raise error

    background = core_of(streams).background
    for error in (ValueError("mine"), NativeError("mine"), ExceptionGroup("mine", [ValueError("mine")])):
        background.start(lambda: fail(error), "a test")  # noqa: B023
        await wait_all_tasks_blocked()

    assert [record.getMessage() for record in quiet_logs.records] == ["a test ended by an error"] * 3
    assert all(record.exc_info for record in quiet_logs.records)
    await (await streams.open("s")).done()


async def test_a_task_may_be_cancelled_before_it_begins_and_ends_all_the_same(streams: StreamManager) -> None:
    background = core_of(streams).background
    ended = anyio.Event()
    never_began: list[bool] = []

    async def run() -> None:
        pytest.fail("it ran")

    background.start(run_when_not_cancelled(run), "a test", ended=ended.set).cancel()
    with anyio.fail_after(BOUND_SECONDS):
        await ended.wait()
    await streams.aclose()
    background.start(run, "a test", ended=lambda: never_began.append(True))

    assert never_began == [True]


@pytest.mark.parametrize("anyio_backend", ["asyncio"])  # SQLite's
async def test_a_manager_that_is_left_at_once_has_no_complaints(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        async with StreamManager.connect(f"sqlite:///{tmp_path}/streams.db"):
            pass
    assert not caplog.records


def run_when_not_cancelled(run: Callable[[], Awaitable[None]]) -> Callable[[], Awaitable[None]]:
    async def wait_and_run() -> None:
        await checkpoint()
        await run()

    return wait_and_run


async def test_what_belongs_to_no_event_loop_yet_starts_nothing() -> None:
    background = Background()
    background.check_here()

    assert not background.is_here
    with pytest.raises(WrongEventLoopError):
        background.check_callable()


async def test_a_task_that_is_left_alone_is_neither_cancelled_nor_waited_for(anyio_backend: str) -> None:
    background, go_on, ended = Background(), anyio.Event(), anyio.Event()
    background.begin()
    task = background.start(go_on.wait, "a test", ended=ended.set)
    await wait_all_tasks_blocked()
    background.leave_alone(task)
    background.stop()
    with anyio.fail_after(BOUND_SECONDS):
        await background.wait()

    assert not ended.is_set()
    go_on.set()
    with anyio.fail_after(BOUND_SECONDS):
        await ended.wait()


# Forks


def in_child(call: Callable[[], object]) -> str:
    """Run something in a forked child; give what it raised, or gave."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            answer = repr(call())
        except BaseException as error:
            answer = type(error).__name__
        with contextlib.suppress(OSError):
            os.write(write, answer.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return answer


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.promise("P20")
async def test_a_forked_child_that_uses_what_it_has_inherited_is_told_and_its_parent_goes_on(streams: StreamManager) -> None:
    stream = await streams.open("s")
    await stream.write("a")
    calls: dict[str, Callable[[], object]] = {
        "write_soon": lambda: stream.write_soon("wrong"),
        "write": lambda: stream.write("wrong"),
        "done": lambda: anyio.run(stream.done),
        "info": lambda: anyio.run(streams.info, "s"),
        "open": lambda: anyio.run(open_new, streams),
        "aclose": lambda: anyio.run(streams.aclose),
    }
    told = {name: in_child(lambda: fresh_loop(call)) for name, call in calls.items()}  # noqa: B023
    # As the loop that it has inherited would call them, if it ran on in the child.
    told |= {f"{name}, as its parent": in_child(calls[name]) for name in ("write_soon", "write")}

    assert set(told.values()) == {"WrongEventLoopError"}, told
    await stream.write("b")
    await stream.done()
    assert await replay(streams) == ["a", "b", ("done", None)]


async def open_new(streams: StreamManager) -> None:
    await streams.open("new")


def fresh_loop(call: Callable[[], object]) -> object:
    """Call it as if this child had no event loop: a fork copies that there is one."""
    thread_result: list[object] = []

    def run() -> None:
        try:
            thread_result.append(call())
        except BaseException as error:
            thread_result.append(error)

    thread = Thread(target=run)
    thread.start()
    thread.join(BOUND_SECONDS)
    if isinstance(thread_result[0], BaseException):
        raise thread_result[0]
    return thread_result[0]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.promise("P20")
async def test_a_forked_child_may_open_a_manager_of_its_own_and_drop_what_it_has_inherited(streams: StreamManager) -> None:
    held = [await streams.open("s")]

    async def use() -> str:
        held.clear()  # says and does nothing: the stream is the parent's
        async with InMemoryStreamManager() as own:
            await (await own.open("s")).done("mine")
            return (await own.info("s")).status

    assert in_child(lambda: fresh_loop(lambda: anyio.run(use))) == "'done'"
    await held[0].done()
    assert (await streams.info("s")).status == "done"


# Loops that are blocked


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.promise("P6")
async def test_a_producer_that_blocks_its_event_loop_is_not_taken_for_dead(tmp_path: Path, anyio_backend: str) -> None:
    path = tmp_path / "streams.db"
    terms: dict[str, Any] = {"lease": timedelta(seconds=1), "grace": timedelta(seconds=0.5)}
    ends: list[str] = []

    async def follow() -> None:
        async with SQLiteStorage(path) as storage, StreamManager(storage, **terms) as others, others.subscribe("s") as events:
            ends.extend([event.type async for event in events])

    async with SQLiteStorage(path) as storage, StreamManager(storage, **terms) as streams:
        stream = await streams.open("s")
        reader = Thread(target=lambda: asyncio.run(follow()))
        reader.start()
        async with streams.subscribe("s") as events:
            await stream.write("before")
            time.sleep(4)  # noqa: ASYNC251 - that is the point
            await stream.write("after")
            await stream.done()
            ends.extend([event.type async for event in events])
        await to_thread.run_sync(reader.join, BOUND_SECONDS)

    assert ends == ["chunk", "chunk", "done"] * 2


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.promise("P6")
async def test_an_event_loop_that_is_dead_for_good_keeps_no_reader_waiting(
    tmp_path: Path, anyio_backend: str, monkeypatch: pytest.MonkeyPatch, quiet_logs: pytest.LogCaptureFixture
) -> None:
    """The bound is a minute; here it is a second."""
    monkeypatch.setattr("streamkeep._sessions.LOOP_SECONDS", 1.0)
    path = tmp_path / "streams.db"
    terms: dict[str, Any] = {"lease": timedelta(seconds=1), "grace": timedelta(seconds=0.5)}
    ends: list[str] = []

    async def follow() -> None:
        async with SQLiteStorage(path) as storage, StreamManager(storage, **terms) as others, others.subscribe("s") as events:
            ends.extend([event.error.status async for event in events])

    async with SQLiteStorage(path) as storage, StreamManager(storage, **terms) as streams:
        stream = await streams.open("s")
        reader = Thread(target=lambda: asyncio.run(follow()))
        reader.start()
        reader.join(BOUND_SECONDS)  # blocks this loop
        with anyio.fail_after(BOUND_SECONDS):
            await stream.cancelled.wait()

    assert ends == ["ABORTED"]
    assert "the event loop is blocked" in quiet_logs.text


class Interrupting(FaultyStorage):
    """A storage whose clones have a clock that may end the program."""

    def __init__(self, path: Path, shared: "list[BaseException]") -> None:
        super().__init__(SQLiteStorage(path))
        self._path = path
        self._shared = shared

    def time(self) -> float:
        if self._shared and "session" in current_thread().name:
            raise self._shared.pop()
        return super().time()

    def clone(self) -> "Interrupting":
        return Interrupting(self._path, self._shared)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.promise("P6", "P17")
async def test_a_session_whose_thread_was_ended_by_an_error_is_begun_again(
    tmp_path: Path, anyio_backend: str, quiet_logs: pytest.LogCaptureFixture
) -> None:
    shared: list[BaseException] = []
    async with (
        Interrupting(tmp_path / "streams.db", shared) as storage,
        SQLiteStorage(tmp_path / "streams.db") as other,
        StreamManager(storage, lease=timedelta(seconds=2), grace=timedelta(seconds=2)) as streams,
        StreamManager(other) as elsewhere,
    ):
        stream = await streams.open("s")
        async with elsewhere.subscribe("s") as events:
            shared.append(SystemExit("mine"))
            await anyio.sleep(5)
            assert shared == []
            await stream.done()
            assert [event.type async for event in events] == ["done"]

    assert [record.getMessage() for record in quiet_logs.records if record.name == "streamkeep"] == [
        "the session ended by an error, and is begun again"
    ]


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_session_that_can_have_no_more_threads_at_the_end_of_the_program_ends_without_a_word(
    tmp_path: Path, anyio_backend: str, quiet_logs: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As asyncio has it from Python 3.12 on."""

    async def shut_down(_: object, timeout: float | None = None) -> None:  # noqa: ASYNC109 - asyncio's
        raise RuntimeError("can't create new thread at interpreter shutdown")

    async with SQLiteStorage(tmp_path / "streams.db") as storage, StreamManager(storage) as streams:
        await (await streams.open("s")).done()
        with monkeypatch.context() as patch:
            patch.setattr(asyncio.BaseEventLoop, "shutdown_default_executor", shut_down)
            await streams.aclose()
    assert [record.getMessage() for record in quiet_logs.records if record.name == "streamkeep"] == []


class Cloned(MemoryStorage):
    """A memory whose clone, for the session's thread, waits in its commits until it is let go on, or fails."""

    def __init__(self, go_on: ThreadEvent | None = None, error: OSError | None = None) -> None:
        super().__init__()
        self.reached = ThreadEvent()
        self._go_on = go_on
        self._error = error

    async def commit(self, stream: str, seen: int | None, head: Head, records: Sequence[bytes] = ()) -> bool:
        if "session" in current_thread().name:
            self.reached.set()
            if self._error is not None:
                raise self._error
            assert self._go_on is None or self._go_on.wait(BOUND_SECONDS)
        return await super().commit(stream, seen, head, records)

    def clone(self) -> Any:
        return self


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_session_that_cannot_begin_in_its_thread_is_told_and_begun_again_by_the_next(anyio_backend: str) -> None:
    storage = Cloned(error=OSError(5, "the sentence"))
    async with StreamManager(storage) as streams:
        for _ in range(2):
            with anyio.fail_after(BOUND_SECONDS), pytest.raises(StorageError, match="the sentence"):
                await streams.open("s")
        storage._error = None
        await (await streams.open("s")).done()

        assert (await streams.info("s")).status == "done"


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.promise("P14")
async def test_a_manager_that_closes_while_its_session_begins_in_its_thread_ends_that_too(anyio_backend: str) -> None:
    go_on = ThreadEvent()
    storage = Cloned(go_on)
    streams = StreamManager(storage)
    await streams.__aenter__()
    session = core_of(streams).session
    async with anyio.create_task_group() as tasks:

        async def open_it() -> None:
            with pytest.raises(StreamManagerClosedError):
                await streams.open("s")

        tasks.start_soon(open_it)
        await to_thread.run_sync(storage.reached.wait, BOUND_SECONDS)
        tasks.start_soon(streams.aclose)
        await wait_all_tasks_blocked()
        go_on.set()

    assert session._thread is not None
    assert not session._thread.is_alive()
    page = await storage.read(session_id(session.name))
    assert page is not None
    assert session_of(page.head).is_over


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.promise("P14")
async def test_a_session_that_is_about_to_be_begun_again_is_not_when_its_manager_closes(
    tmp_path: Path, anyio_backend: str, quiet_logs: pytest.LogCaptureFixture
) -> None:
    shared: list[BaseException] = []
    async with (
        Interrupting(tmp_path / "streams.db", shared) as storage,
        StreamManager(storage, lease=timedelta(seconds=1)) as streams,
    ):
        await (await streams.open("s")).done()
        session = core_of(streams).session
        shared.append(SystemExit("mine"))
        with anyio.fail_after(BOUND_SECONDS):
            while "begun again" not in quiet_logs.text:  # noqa: ASYNC110 - nothing else tells
                await anyio.sleep(0.001)

    assert session._thread is not None
    assert not session._thread.is_alive()


def test_what_never_waits_is_run_without_an_event_loop() -> None:
    async def add(one: int, two: int) -> int:
        return one + two

    async def add_twice() -> int:
        return await add(1, 2) + await add(3, 4)

    assert ran(add_twice()) == 10


def test_what_waits_although_it_must_not_is_told_so() -> None:
    class Pause:
        def __await__(self) -> Generator[None]:
            yield

    async def wait() -> None:
        await Pause()

    with pytest.raises(RuntimeError, match="does not block"):
        ran(wait())


def test_what_blocks_is_done_at_the_end_of_the_program_too() -> None:
    executor = LastingExecutor()
    executor.shutdown()
    assert executor.submit(max, 1, 2).result(BOUND_SECONDS) == 2
    with pytest.raises(ZeroDivisionError):
        executor.submit(divmod, 1, 0).result(BOUND_SECONDS)


def test_what_is_left_of_a_task_is_closed_without_an_event_loop() -> None:
    assert GeneratorExit in not_ours()
