"""SQLite and os.fork: nothing is lost, nothing stays locked, and what was inherited says at once that it is another process's."""

# ruff: noqa: ASYNC110, ASYNC240 (these tests look at files and threads, and nobody else is on their loop)

import asyncio
import gc
import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import anyio
import pytest
from tests.storages.children import Child, Pipe
from tests.storages.failures import forked

from streamkeep import StreamManager
from streamkeep.errors import StorageError, WrongEventLoopError
from streamkeep.storage import Head
from streamkeep.storages import _before_fork
from streamkeep.storages.sqlite import SQLiteStorage

BOUND_SECONDS = 60
ROUNDS = 20

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
    pytest.mark.timeout(120),
]

# Holds the lock of the database until its input ends.
HOLDER = """
import fcntl, os, sys
fcntl.flock(os.open(sys.argv[1] + "-lock", os.O_RDWR), fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "streams.db"


@pytest.fixture
def pipe() -> Generator[Pipe]:
    pipe = Pipe()
    yield pipe
    pipe.close()


class Writer:
    """Writes numbers to one stream."""

    def __init__(self, storage: SQLiteStorage, stream: str) -> None:
        self.storage = storage
        self.stream = stream
        self.tail = 0

    async def write(self, count: int = 1) -> None:
        for _ in range(count):
            tail = self.tail + 1
            head = Head(tail, tail, b"", 9e9)
            with anyio.fail_after(BOUND_SECONDS):
                assert await self.storage.commit(self.stream, self.tail or None, head, [b"%d" % tail])
            self.tail = tail


def writes(path: Path, stream: str, count: int = 20) -> None:
    """Open a storage in an event loop of its own, and write so many records."""

    async def main() -> None:
        async with SQLiteStorage(path) as storage:
            await Writer(storage, stream).write(count)

    asyncio.run(main())


async def check(path: Path, tails: dict[str, int]) -> None:
    """All that was acknowledged is there, and SQLite finds nothing to complain of."""
    async with SQLiteStorage(path) as storage:
        for stream, tail in tails.items():
            page = await storage.read(stream, 0, 1_000_000)
            assert page is not None
            assert list(page.records) == [b"%d" % number for number in range(1, tail + 1)]
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    db.close()


async def under_way(storage: SQLiteStorage) -> None:
    """Wait until its writer does something."""
    assert storage._entered is not None
    with anyio.fail_after(BOUND_SECONDS):
        while not storage._entered.writer._turn.locked():
            await asyncio.sleep(0)


# -- a child that opens a storage of its own


@pytest.mark.parametrize("first", ["the child", "the parent", "nobody"])
async def test_what_parent_and_child_have_stored_is_there_whoever_closes_first(path: Path, pipe: Pipe, first: str) -> None:
    tails: dict[str, int] = {}
    for number in range(ROUNDS):

        async def be_a_child(stream: str) -> None:
            async with SQLiteStorage(path) as own:
                writer = Writer(own, stream)
                await writer.write(5)
                if first == "the parent":
                    pipe.receive()
                await writer.write(15)

        storage = SQLiteStorage(path)
        await storage.__aenter__()
        parent = Writer(storage, f"parent {number}")
        await parent.write(5)
        child = Child(lambda stream=f"child {number}": asyncio.run(be_a_child(stream)))  # type: ignore[misc]
        await parent.write(10)
        if first == "the child":
            assert child.wait() == 0
        await parent.write(5)
        await storage.__aexit__(None, None, None)
        if first == "the parent":
            pipe.send()
        if first != "the child":
            assert child.wait() == 0
        tails |= {f"parent {number}": 20, f"child {number}": 20}
    await check(path, tails)


async def test_processes_of_multiprocessing_store_what_they_have_acknowledged(path: Path) -> None:
    context = multiprocessing.get_context("fork")
    async with SQLiteStorage(path) as storage:
        parent = Writer(storage, "parent")
        await parent.write()
        processes = [context.Process(target=writes, args=(path, f"child {number}")) for number in range(4)]
        for process in processes:
            process.start()
            await parent.write(10)
        for process in processes:
            await asyncio.to_thread(process.join, BOUND_SECONDS)
            assert process.exitcode == 0
            process.close()
        await parent.write()
    await check(path, {"parent": 42} | {f"child {number}": 20 for number in range(4)})


@pytest.mark.parametrize("where", ["inside", "outside"])
async def test_a_child_that_exits_disturbs_nothing(sqlite_url: str, where: str) -> None:
    """It exits at once or as a program does, after it has used what it inherited, and collected it as garbage."""
    assert await forked(sqlite_url, where) == 0


async def test_sixty_four_writers_go_on_while_threads_fork(path: Path) -> None:
    async with SQLiteStorage(path) as storage:
        writers = [Writer(storage, f"parent {number}") for number in range(64)]
        is_over = False

        async def write(writer: Writer) -> None:
            while not is_over:
                await writer.write()

        def fork(stream: str) -> None:
            assert Child(lambda: writes(path, stream)).wait() == 0

        async with asyncio.TaskGroup() as tasks:
            for writer in writers:
                tasks.create_task(write(writer))
            for number in range(5):
                await asyncio.gather(*(asyncio.to_thread(fork, f"child {number} {thread}") for thread in range(2)))
            fork("child of the loop's thread")
            is_over = True
    assert min(writer.tail for writer in writers) > 5
    children = {f"child {number} {thread}": 20 for number in range(5) for thread in range(2)}
    await check(path, {writer.stream: writer.tail for writer in writers} | children | {"child of the loop's thread": 20})


async def test_readers_and_watchers_go_on_after_a_fork(path: Path) -> None:
    """The reading connection may be the first to be opened again."""
    async with SQLiteStorage(path) as storage, storage.watch("s") as doorbell:
        writer = Writer(storage, "s")
        await writer.write()
        for tail in range(1, 10):
            assert Child(lambda: None).wait() == 0
            page = await storage.read("s", 0, 100)
            assert page is not None
            assert page.head.tail == tail
            assert Child(lambda: None).wait() == 0
            await writer.write()
            with anyio.fail_after(BOUND_SECONDS):
                await doorbell.wait()


async def test_a_child_of_a_child_is_no_different(path: Path) -> None:
    async def be_a_child() -> None:
        async with SQLiteStorage(path) as own:
            writer = Writer(own, "child")
            await writer.write(10)
            assert Child(lambda: writes(path, "grandchild")).wait() == 0
            await writer.write(10)

    async with SQLiteStorage(path) as storage:
        parent = Writer(storage, "parent")
        await parent.write(10)
        child = Child(lambda: asyncio.run(be_a_child()))
        await parent.write(10)
        assert child.wait() == 0
    await check(path, {"parent": 20, "child": 20, "grandchild": 20})


async def test_a_killed_child_keeps_no_lock(path: Path, pipe: Pipe) -> None:
    def be_a_child() -> None:
        async def main() -> None:
            async with SQLiteStorage(path) as own:
                writer = Writer(own, str(os.getpid()))
                while True:
                    await writer.write()
                    pipe.send()

        asyncio.run(main())

    async with SQLiteStorage(path) as storage:
        parent = Writer(storage, "parent")
        for _ in range(10):
            child = Child(be_a_child)
            pipe.receive()
            await parent.write(5)
            child.kill()
            assert child.wait() == -9
            with anyio.fail_after(5):
                await parent.write(5)
    await check(path, {"parent": 100})


# -- what was inherited


async def refusals(calls: Sequence[Callable[[], object]]) -> None:
    """Each of these raises WrongEventLoopError, when it is called or awaited."""
    for number, call in enumerate(calls):
        try:
            with anyio.fail_after(5):
                result = call()
                if isinstance(result, Awaitable):
                    await result
        except WrongEventLoopError:
            continue
        raise AssertionError(f"call {number} was not refused")


def calls_of_a_storage(storage: SQLiteStorage) -> Sequence[Callable[[], object]]:
    return [
        lambda: storage.read("s"),
        lambda: storage.commit("s", 1, Head(2, 2, b"", 9e9), [b"2"]),
        lambda: storage.delete("s", 1),
        storage.scan,
        lambda: storage.expired(9e9),
        storage.time,
        lambda: storage.watch("s").__aenter__(),
        lambda: storage.__aexit__(None, None, None),
    ]


async def test_an_inherited_storage_is_refused_and_nothing_changes(path: Path) -> None:
    async with SQLiteStorage(path) as storage, storage.watch("s"):
        writer = Writer(storage, "s")
        await writer.write()
        assert Child(lambda: asyncio.run(refusals(calls_of_a_storage(storage)))).wait() == 0
        await writer.write()
    await check(path, {"s": 2})


def test_an_inherited_storage_is_refused_in_the_inherited_event_loop(path: Path) -> None:
    """Nothing runs in that loop while the process forks, so that the child can run it."""
    loop = asyncio.new_event_loop()
    storage = SQLiteStorage(path)
    writer = Writer(storage, "s")
    loop.run_until_complete(storage.__aenter__())
    loop.run_until_complete(writer.write())
    assert Child(lambda: loop.run_until_complete(refusals(calls_of_a_storage(storage)))).wait() == 0
    loop.run_until_complete(writer.write())
    loop.run_until_complete(storage.__aexit__(None, None, None))
    loop.close()
    asyncio.run(check(path, {"s": 2}))


async def test_an_inherited_manager_and_its_handles_are_refused_and_nothing_changes(path: Path) -> None:
    async with StreamManager.connect(f"sqlite:///{path}", lease=timedelta(seconds=1)) as streams:
        stream = await streams.open("s")
        await stream.write(1)

        async def subscribe() -> None:
            async with streams.subscribe("s"):
                pass

        calls: list[Callable[[], object]] = [
            lambda: streams.open("t"),
            subscribe,
            lambda: streams.cancel("s"),
            lambda: streams.delete("s"),
            lambda: streams.info("s"),
            streams.list,
            streams.sweep,
            lambda: stream.write(2),
            lambda: stream.write_soon(2),
            stream.flush,
            stream.done,
            stream.close,
        ]
        assert Child(lambda: asyncio.run(refusals(calls))).wait() == 0
        assert await stream.write(2) == 1
        await stream.done()
        async with streams.subscribe("s") as events:
            assert [event.offset async for event in events] == [0, 1, 2]
        assert [info.id for info in await streams.list()] == ["s"]


async def test_a_manager_goes_on_with_its_session_and_a_child_opens_one_of_its_own(path: Path) -> None:
    """The session has a thread and a storage of its own."""
    url = f"sqlite:///{path}"

    async def be_a_child(number: int) -> None:
        async with StreamManager.connect(url) as own, own.open(f"child{number}") as stream:
            await stream.write(number)
            await stream.done()

    lease = timedelta(seconds=0.3)
    async with StreamManager.connect(url, lease=lease, grace=timedelta(0)) as streams, streams.open("parent") as stream:
        for number in range(10):
            await stream.write(number)
            assert Child(lambda number=number: asyncio.run(be_a_child(number))).wait() == 0  # type: ignore[misc]
            await asyncio.sleep(0.1)  # so that the session is renewed, several times in all
        async with StreamManager.connect(url) as others:
            async with asyncio.timeout(BOUND_SECONDS):
                assert (await others.info("parent")).status == "open"
            for number in range(10):
                assert (await others.info(f"child{number}")).status == "done"
        await stream.done()


async def test_storages_that_were_left_or_dropped_are_kept_by_nothing(path: Path) -> None:
    left = SQLiteStorage(path)
    async with left:
        await Writer(left, "s").write()
    dropped = SQLiteStorage(path)
    await dropped.__aenter__()
    await Writer(dropped, "t").write()
    storages = weakref.ref(left), weakref.ref(dropped)
    assert dropped._entered is not None
    dropped_threads = (
        dropped._entered.writer,
        dropped._entered.reader,
    )  # to be ended, so that they are not there in the next test
    del left, dropped
    gc.collect()
    assert [storage() for storage in storages] == [None, None]
    assert Child(lambda: writes(path, "child")).wait() == 0
    for thread in dropped_threads:
        with anyio.fail_after(BOUND_SECONDS):
            await thread.__aexit__()


# -- what hangs


@contextmanager
def held_elsewhere(path: Path) -> Generator[None]:
    """Another process holds the lock."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        try:
            yield
        finally:
            holder.communicate()


async def test_a_fork_does_not_wait_for_another_process_that_holds_the_lock(path: Path) -> None:
    async with SQLiteStorage(path) as storage:
        writer = Writer(storage, "s")
        await writer.write()
        with held_elsewhere(path):
            write = asyncio.create_task(writer.write())
            await under_way(storage)
            began_at = time.monotonic()
            child = Child(lambda: asyncio.run(refusals(calls_of_a_storage(storage))))
            assert time.monotonic() - began_at < 1
            assert child.wait() == 0
            assert not write.done()
        with anyio.fail_after(BOUND_SECONDS):
            await write
    await check(path, {"s": 2})


async def test_a_child_that_was_forked_in_the_middle_of_a_transaction_cannot_use_the_database(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_before_fork, "FORK_SECONDS", 0.2)
    go = threading.Event()

    async def be_a_child() -> None:
        for name in (path, path.parent / "." / path.name):
            with pytest.raises(StorageError, match="was in use when this process was forked"):
                async with SQLiteStorage(name):
                    pass
        async with SQLiteStorage(path.with_name("another.db")) as another:
            await Writer(another, "s").write()
        gc.collect()

    async with SQLiteStorage(path) as storage:
        writer = Writer(storage, "s")
        await writer.write()
        assert storage._entered is not None
        hanging = storage._entered.writer.start(lambda _: go.wait(BOUND_SECONDS))
        await under_way(storage)
        began_at = time.monotonic()
        child = Child(lambda: asyncio.run(be_a_child()))
        assert time.monotonic() - began_at < 2
        assert child.wait() == 0
        go.set()
        await hanging
        await writer.write(10)
        assert Child(lambda: writes(path, "child")).wait() == 0
    await check(path, {"s": 11, "child": 20})


def test_a_child_that_was_forked_in_the_middle_of_a_transaction_keeps_no_lock(
    path: Path, pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_before_fork, "FORK_SECONDS", 0.2)
    alive = Pipe()

    def be_a_grandchild() -> None:
        pipe.send(str(os.getpid()))
        alive.receive()

    async def be_a_parent() -> None:
        storage = SQLiteStorage(path)
        await storage.__aenter__()
        assert storage._entered is not None
        begun = threading.Event()

        def hang(_: object) -> None:
            begun.set()
            time.sleep(BOUND_SECONDS)

        hanging = storage._entered.writer.start(hang)
        await asyncio.to_thread(begun.wait, BOUND_SECONDS)
        Child(be_a_grandchild)
        await hanging

    parent = Child(lambda: asyncio.run(be_a_parent()))
    grandchild = int(pipe.receive())
    try:
        parent.kill()
        assert parent.wait() == -9
        os.kill(grandchild, 0)  # it lives
        began_at = time.monotonic()
        writes(path, "s")
        assert time.monotonic() - began_at < 5
    finally:
        os.kill(grandchild, signal.SIGKILL)
        alive.close()
    asyncio.run(check(path, {"s": 20}))


async def test_a_database_that_is_replaced_during_a_fork_takes_nothing_more(path: Path) -> None:
    """The storage has closed the database then, and would else go on with whatever it finds."""
    async with SQLiteStorage(path) as storage:
        writer = Writer(storage, "s")
        await writer.write()
        assert Child(lambda: None).wait() == 0
        path.rename(path.with_name("moved.db"))
        with pytest.raises(StorageError, match="removed or replaced"):
            await storage.read("s")
        with pytest.raises(StorageError, match="removed or replaced"):
            await writer.write()
        assert not path.exists()
        path.with_name("moved.db").rename(path)
        await writer.write()
    await check(path, {"s": 2})
