"""Bulkheads: whatever a storage raises ends what it was asked for, and nothing else."""

import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, TypeVar

import anyio
import pytest
from anyio import wait_all_tasks_blocked
from tests.core.helpers import core_of

from streamkeep import (
    InvalidArgumentError,
    StorageCorruptError,
    StorageError,
    StorageFullError,
    StreamInput,
    StreamManager,
    StreamManagerClosedError,
)
from streamkeep._guard import GuardedStorage, commit_once
from streamkeep.storage import Doorbell, Head, Page, Storage
from streamkeep.storages.memory import MemoryStorage
from streamkeep.testing.faults import FaultyStorage

T = TypeVar("T")
Clock = Callable[[], float]
HEAD = Head(1, 0, b"", 1e12)


class NativeError(BaseException):
    """What some libraries written in other languages raise: no Exception."""


ERRORS = [
    RuntimeError("the sentence"),
    OSError(5, "the sentence"),
    RecursionError("the sentence"),
    KeyError("the sentence"),
    NativeError("the sentence"),
]


class RaisingStorage(FaultyStorage):
    """Raises something that is no error of ours.

    Attributes:
        raises: what.
        wherever: by whom: a method's name, `wait` (of a doorbell) or `leave` (a watch).
        only: for which stream; any, unless it is given.
    """

    def __init__(self, memory: MemoryStorage) -> None:
        super().__init__(memory)
        self.raises: BaseException | None = None
        self.wherever = ""
        self.only = ""

    def fail(self, wherever: str, stream: str = "") -> None:
        if self.raises is not None and self.wherever == wherever and self.only in {"", stream}:
            raise type(self.raises)(*self.raises.args)

    async def read(self, stream: str, start: int = 0, limit: int = 0) -> Page | None:
        self.fail("read", stream)
        return await super().read(stream, start, limit)

    async def commit(self, stream: str, seen: int | None, head: Head, records: Sequence[bytes] = ()) -> bool:
        self.fail("commit", stream)
        return await super().commit(stream, seen, head, records)

    async def delete(self, stream: str, seen: int) -> bool:
        self.fail("delete", stream)
        return await super().delete(stream, seen)

    async def scan(self, after: str = "", limit: int = 100) -> Sequence[tuple[str, Head]]:
        self.fail("scan")
        return await super().scan(after, limit)

    async def expired(self, before: float, limit: int = 100) -> Sequence[tuple[str, Head]]:
        self.fail("expired")
        return await super().expired(before, limit)

    def time(self) -> float:
        self.fail("time")
        return super().time()

    def clone(self) -> Storage | None:
        self.fail("clone")
        return None

    def watch(self, stream: str) -> AbstractAsyncContextManager[Doorbell]:
        self.fail("make watch", stream)
        return self._watching(stream)

    @asynccontextmanager
    async def _watching(self, stream: str) -> AsyncGenerator[Doorbell]:
        self.fail("watch", stream)
        async with super().watch(stream) as doorbell:
            yield _RaisingDoorbell(self, stream, doorbell)
        self.fail("leave", stream)


class _RaisingDoorbell:
    def __init__(self, storage: RaisingStorage, stream: str, doorbell: Doorbell) -> None:
        self._storage = storage
        self._stream = stream
        self._doorbell = doorbell

    async def wait(self) -> None:
        await self._doorbell.wait()
        self._storage.fail("wait", self._stream)


@pytest.fixture
def raising(memory: MemoryStorage) -> RaisingStorage:
    return RaisingStorage(memory)


@pytest.fixture(params=ERRORS, ids=lambda error: type(error).__name__)
def error(request: pytest.FixtureRequest) -> BaseException:
    found: BaseException = request.param
    return found


# What the core sees


async def in_task(call: Callable[[], T]) -> T:
    return call()


async def be_rung_for(storage: GuardedStorage) -> None:
    async with storage.watch("s") as doorbell:
        await storage.delete("s", HEAD.version)
        await storage.commit("s", None, HEAD)
        await doorbell.wait()


CALLS: dict[str, Callable[[GuardedStorage], Awaitable[object]]] = {
    "read": lambda storage: storage.read("s"),
    "commit": lambda storage: storage.commit("s", None, HEAD),
    "delete": lambda storage: storage.delete("s", 1),
    "scan": lambda storage: storage.scan(),
    "expired": lambda storage: storage.expired(0),
    "time": lambda storage: in_task(storage.time),
    "clone": lambda storage: in_task(storage.clone),
    "make watch": be_rung_for,
    "watch": be_rung_for,
    "wait": be_rung_for,
    "leave": be_rung_for,
}


@pytest.mark.parametrize("wherever", CALLS)
@pytest.mark.promise("P17")
async def test_whatever_a_storage_raises_is_a_storage_error_with_its_sentence_and_its_cause(
    raising: RaisingStorage, error: BaseException, wherever: str
) -> None:
    raising.raises, raising.wherever = error, wherever
    with pytest.raises(StorageError, match="the sentence") as raised:
        await CALLS[wherever](GuardedStorage(raising))

    assert type(raised.value) is StorageError
    assert type(error).__name__ in str(raised.value)
    assert type(raised.value.__cause__) is type(error)
    raising.wherever = ""
    await CALLS[wherever](GuardedStorage(raising))


@pytest.mark.parametrize("error", [StorageCorruptError("torn"), InvalidArgumentError("odd"), KeyboardInterrupt(), SystemExit()])
@pytest.mark.parametrize("wherever", CALLS)
async def test_our_errors_and_the_programs_end_are_passed_on(
    raising: RaisingStorage, error: BaseException, wherever: str
) -> None:
    raising.raises, raising.wherever = error, wherever
    with pytest.raises(type(error)) as raised:
        await CALLS[wherever](GuardedStorage(raising))

    assert raised.value.args == error.args


@pytest.mark.parametrize("operation", ["read", "commit", "delete", "scan", "expired", "watch"])
async def test_cancellation_is_passed_on(storage: FaultyStorage, operation: Any) -> None:
    storage.hold(operation)
    with anyio.move_on_after(1) as scope:
        await CALLS[operation](GuardedStorage(storage))

    assert scope.cancelled_caught


async def test_what_is_raised_in_a_watch_is_not_the_storages(raising: RaisingStorage) -> None:
    with pytest.raises(ZeroDivisionError):
        async with GuardedStorage(raising).watch("s"):
            raise ZeroDivisionError


async def test_a_manager_whose_storage_cannot_be_opened_raises_a_storage_error(memory: MemoryStorage) -> None:
    class Broken(MemoryStorage):
        async def __aenter__(self) -> Any:
            raise OSError(24, "no more files")

    manager = StreamManager.connect("memory://")
    manager._storage = GuardedStorage(Broken())
    with pytest.raises(StorageError, match="no more files"):
        await manager.__aenter__()


async def test_a_guarded_storage_is_entered_and_left(storage: FaultyStorage) -> None:
    async with GuardedStorage(storage) as guarded:
        assert guarded.storage is storage

    assert storage.calls["enter"] == 1


async def test_a_clone_is_guarded_too() -> None:
    class Cloned(MemoryStorage):
        def clone(self) -> Any:
            return self

    storage = Cloned()
    clone = GuardedStorage(storage).clone()

    assert clone is not None
    assert clone.storage is storage


async def test_records_that_are_missing_are_told(storage: FaultyStorage, memory: MemoryStorage) -> None:
    guarded = GuardedStorage(storage)
    await guarded.commit("s", None, Head(1, 2, b"", 1e12), [b"a", b"b"])
    memory._streams["s"].records.pop()

    assert (page := await guarded.read("s", 0, 5)) is not None
    assert page.records == [b"a"]
    with pytest.raises(StorageCorruptError, match="offset 1"):
        await guarded.read("s", 1, 5)
    assert await guarded.read("s", 1) is not None
    assert await guarded.read("s", 2, 5) is not None


async def test_records_that_were_forgotten_are_not_missing(storage: FaultyStorage, memory: MemoryStorage) -> None:
    guarded = GuardedStorage(storage)
    head = Head(1, 3, b"", 1e12, first=2)
    await guarded.commit("s", None, head, [b"a", b"b", b"c"])

    assert (page := await guarded.read("s", 1, 5)) is not None
    assert (page.head, list(page.records)) == (head, [])
    memory._streams["s"].records.clear()
    with pytest.raises(StorageCorruptError, match="offset 2"):
        await guarded.read("s", 2, 5)


# Whether a commit has happened


async def test_a_commit_that_was_refused_because_it_is_there_has_happened(storage: FaultyStorage) -> None:
    assert await commit_once(storage, "s", None, HEAD)
    assert await commit_once(storage, "s", None, HEAD)
    assert not await commit_once(storage, "s", None, Head(2, 0, b"", 1e12))


async def test_a_commit_whose_answer_was_lost_has_happened_if_it_is_there(storage: FaultyStorage) -> None:
    storage.lose_answer("commit")
    assert await commit_once(storage, "s", None, HEAD)
    storage.refuse("commit")
    with pytest.raises(StorageError, match="made to fail"):
        await commit_once(storage, "s", 1, Head(2, 0, b"", 1e12))


async def test_a_commit_of_which_nobody_knows_is_told_with_its_own_error(storage: FaultyStorage) -> None:
    storage.lose_answer("commit", error=StorageError("mine"))
    storage.refuse("read", error=StorageError("another"))
    with pytest.raises(StorageError, match="mine"):
        await commit_once(storage, "s", None, HEAD)


async def test_a_full_storage_has_stored_nothing_and_is_not_asked(storage: FaultyStorage) -> None:
    storage.refuse("commit", error=StorageFullError("full"))
    with pytest.raises(StorageFullError):
        await commit_once(storage, "s", None, HEAD)

    assert storage.calls["read"] == 0


# What the others see


@pytest.mark.parametrize("wherever", ["read", "make watch", "watch", "wait", "leave"])
@pytest.mark.promise("P17")
async def test_what_is_raised_for_one_streams_readers_is_told_to_them_and_everybody_else_goes_on(
    memory: MemoryStorage, raising: RaisingStorage, error: BaseException, wherever: str, quiet_logs: pytest.LogCaptureFixture
) -> None:
    async with StreamManager(memory) as writers, StreamManager(raising) as streams:
        stream, other = await writers.open("s"), await writers.open("other")
        if wherever in {"make watch", "watch"}:  # by which a feed begins
            raising.raises, raising.wherever, raising.only = error, wherever, "s"
        async with streams.subscribe("s") as events, streams.subscribe("other") as others:
            await wait_all_tasks_blocked()
            raising.raises, raising.wherever, raising.only = error, wherever, "s"
            for number in range(2):
                await other.write(number)
                assert (await anext(others)).chunk == number
            if wherever == "leave":
                await stream.done()
                assert [event.offset async for event in events] == [0]
                await wait_all_tasks_blocked()
            else:
                told = await failure_of(events.__anext__, lambda: stream.write("a"))
                assert "the sentence" in str(told)
            await other.write(2)
            assert (await anext(others)).chunk == 2
            raising.raises = None
            assert streams.is_running

        assert "the sentence" in quiet_logs.text
        assert len([record for record in quiet_logs.records if record.exc_info]) == 1
        assert (await streams.info("s")).id == "s"
        await other.done()


async def failure_of(call: Callable[[], Awaitable[object]], meanwhile: Callable[[], Awaitable[object]]) -> StorageError:
    failures: list[StorageError] = []

    async def run() -> None:
        try:
            await call()
        except StorageError as error:
            failures.append(error)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        await wait_all_tasks_blocked()
        with contextlib.suppress(StorageError):  # a read may belong to it
            await meanwhile()
    return failures[0]


@pytest.mark.promise("P17")
async def test_what_is_raised_for_one_writer_is_told_to_it_and_everybody_else_goes_on(
    raising: RaisingStorage, error: BaseException
) -> None:
    async with StreamManager(raising) as streams:
        stream, other = await streams.open("s"), await streams.open("other")
        raising.raises, raising.wherever, raising.only = error, "commit", "s"
        stream.write_soon("a")
        for call in (lambda: stream.write("b"), stream.flush, lambda: streams.cancel("s")):
            with pytest.raises(StorageError, match="the sentence"):
                await call()
        await other.write("a")
        raising.raises = None
        await stream.done()
        await other.done()

        assert [info.tail for info in await streams.list()] == [2, 3]


@pytest.mark.promise("P17")
async def test_what_is_raised_by_a_verb_is_told_to_who_asked_and_everybody_else_goes_on(
    raising: RaisingStorage, error: BaseException
) -> None:
    async with StreamManager(raising) as streams:
        stream = await streams.open("s")
        verbs: list[tuple[str, Callable[[], Awaitable[object]]]] = [
            ("delete", lambda: streams.delete("s")),
            ("scan", streams.list),
            ("expired", streams.sweep),
            ("read", lambda: streams.info("s")),
            ("read", lambda: streams.subscribe("s").__aenter__()),
            ("commit", lambda: streams.open("new")),
            ("time", lambda: streams.open("new")),
            ("time", lambda: streams.cancel("s")),
            ("time", lambda: stream.write("a")),
        ]
        for wherever, verb in verbs:
            raising.raises, raising.wherever = error, wherever
            with pytest.raises(StorageError, match="the sentence"):
                await verb()
            raising.raises = None
            await streams.info("s")
        await stream.done()
        await (await streams.open("new")).done()

        assert (await streams.info("s")).tail == 2


@pytest.mark.parametrize("wherever", ["expired", "time", "commit", "read", "watch", "wait", "delete"])
@pytest.mark.promise("P17")
async def test_background_work_goes_on_when_the_storage_raises_no_more(
    raising: RaisingStorage, clock: Clock, error: BaseException, wherever: str, quiet_logs: pytest.LogCaptureFixture
) -> None:
    elsewhere = FaultyStorage(raising._storage)
    async with StreamManager(raising) as streams, StreamManager(elsewhere) as others:
        raising.raises, raising.wherever = (error if wherever == "watch" else None), wherever
        await (await streams.open("expires")).done()
        stream = await streams.open("s")
        await wait_all_tasks_blocked()
        raising.raises = error
        raising.ahead_seconds = 301
        if wherever == "wait":
            elsewhere.ahead_seconds = 301
            await others.cancel("s")
        await anyio.sleep(61 if wherever in {"expired", "delete"} else 8)
        raising.raises = None
        await anyio.sleep(70)

        assert [info.id for info in await streams.list()] == ["s"]
        if wherever == "wait":
            await anyio.sleep(600)
            assert stream.cancelled.is_set()
        else:
            await stream.done()
    assert "the sentence" in quiet_logs.text


@pytest.mark.parametrize("wherever", ["commit", "read", "time"])
async def test_a_session_that_cannot_begin_is_told_to_all_who_wait_for_it_and_begun_again_by_the_next(
    raising: RaisingStorage, error: BaseException, wherever: str
) -> None:
    async with StreamManager(raising) as streams:
        raising.raises, raising.wherever = error, wherever
        told: list[StorageError] = []

        async def open_one(number: int) -> None:
            try:
                await streams.open(f"s{number}")
            except StorageError as failure:
                told.append(failure)

        async with anyio.create_task_group() as tasks:
            for number in range(10):
                tasks.start_soon(open_one, number)
        raising.raises = None

        assert len(set(map(id, told))) == 10
        assert all("the sentence" in str(failure) for failure in told)
        stream: StreamInput = await streams.open("s")
        await stream.done()


async def test_who_waits_for_a_session_while_the_manager_closes_is_told(raising: RaisingStorage) -> None:
    hold = raising.hold("commit")
    async with StreamManager(raising) as streams, anyio.create_task_group() as tasks:

        async def open_it() -> None:
            with pytest.raises(StreamManagerClosedError):
                await streams.open("s")

        tasks.start_soon(open_it)
        await hold.reached.wait()
        await streams.aclose()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_session_for_which_no_clone_can_be_made_is_told_and_begun_again_by_the_next(
    error: BaseException,
) -> None:
    raising = RaisingStorage(MemoryStorage())
    async with StreamManager(raising) as streams:
        raising.raises, raising.wherever = error, "clone"
        for _ in range(2):
            with anyio.fail_after(5), pytest.raises(StorageError, match="the sentence"):
                await streams.open("s")
        raising.raises = None
        stream = await streams.open("s")
        assert core_of(streams).session.name
        await stream.done()
