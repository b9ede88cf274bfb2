"""A fork of a process that has SQLite storages open: nothing is lost, and the child has nothing of its parent's.

Each test runs a program of its own, which forks for real. Python 3.12 and later warn of forks in processes with threads; apps do it all the
same, so these programs do not listen.
"""

import asyncio
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from streamkeep.storages.sqlite import SQLiteStorage

BOUND_SECONDS = 50

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")

WORDS = """
import asyncio, fcntl, gc, multiprocessing, os, signal, sqlite3, sys, threading, time, warnings, weakref
from streamkeep.errors import StorageError, WrongEventLoopError
from streamkeep.storage import Head
from streamkeep.storages import _before_fork
from streamkeep.storages.sqlite import SQLiteStorage

warnings.simplefilter("ignore", DeprecationWarning)
path = sys.argv[1]

async def write(storage, stream, first, last):
    for tail in range(first, last):
        assert await storage.commit(stream, tail or None, Head(tail + 1, tail + 1, b"", 9e9), [b"%d" % tail])

async def write_own(stream, number):
    async with SQLiteStorage(path) as storage:
        await write(storage, stream, 0, number)

def child(function, exit=os._exit):
    # Gives the child's pid; the child calls the function and exits, with 1 if it raises.
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        function()
        code = 0
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        exit(code)

def succeeded(pid):
    _, status = os.waitpid(pid, 0)
    assert status == 0, status

def in_loop(coroutine):
    # A forked child's own event loop.
    asyncio.events._set_running_loop(None)
    asyncio.set_event_loop(None)
    return asyncio.run(coroutine)

def descriptors():
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue
        if path in target or "inotify" in target:
            found.append(target)
    return found
"""


def run(program: str, path: Path) -> None:
    command = [sys.executable, "-c", WORDS + program, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=BOUND_SECONDS, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr


async def check(path: Path, **tails: int) -> None:
    """All of these streams are there, whole, and SQLite finds nothing to complain of."""
    async with SQLiteStorage(path) as storage:
        for stream, tail in tails.items():
            page = await storage.read(stream, 0, 10_000)
            assert page is not None
            assert list(page.records) == [b"%d" % number for number in range(tail)], stream
    db = sqlite3.connect(path)
    assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    db.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "streams.db"


async def test_a_child_with_a_storage_of_its_own_and_its_parent_lose_nothing(path: Path) -> None:
    run(
        """
async def main():
    go, gone = os.pipe(), os.pipe()
    async with SQLiteStorage(path) as storage, storage.watch("parent"):
        await write(storage, "parent", 0, 20)
        def in_child():
            async def main():
                async with SQLiteStorage(path) as own:
                    await write(own, "child", 0, 20)
                    os.write(go[1], b"x")
                    os.read(gone[0], 1)  # the parent has closed
                    await write(own, "child", 20, 40)
            in_loop(main())
        pid = child(in_child)
        await asyncio.to_thread(os.read, go[0], 1)
        await write(storage, "parent", 20, 40)
    os.write(gone[1], b"x")
    succeeded(pid)

asyncio.run(main())
""",
        path,
    )
    await check(path, parent=40, child=40)


async def test_a_child_that_ends_as_programs_do_takes_nothing_from_its_parent(path: Path) -> None:
    """All that it has inherited is collected at its end."""
    run(
        """
loop = asyncio.new_event_loop()
storage = SQLiteStorage(path)
loop.run_until_complete(storage.__aenter__())
loop.run_until_complete(write(storage, "parent", 0, 20))
pid = os.fork()
if not pid:
    asyncio.run(write_own("child", 20))
    sys.exit(0)
loop.run_until_complete(write(storage, "parent", 20, 40))
succeeded(pid)
loop.run_until_complete(write(storage, "parent", 40, 60))
loop.run_until_complete(storage.__aexit__(None, None, None))
loop.close()
""",
        path,
    )
    await check(path, parent=60, child=20)


async def test_a_child_that_closes_first_takes_nothing_from_its_parent(path: Path) -> None:
    """Closing the last connection tidies the log away; the child's is not the last."""
    run(
        """
async def main():
    async with SQLiteStorage(path) as storage:
        await write(storage, "parent", 0, 20)
        for number in range(5):
            succeeded(child(lambda: in_loop(write_own(f"child{number}", 20))))
            await write(storage, "parent", 20 + number * 10, 30 + number * 10)

asyncio.run(main())
""",
        path,
    )
    await check(path, parent=70, child0=20, child4=20)


async def test_what_a_child_has_inherited_refuses_every_call_at_once(path: Path) -> None:
    run(
        """
async def refused(storage, watching):
    calls = [
        lambda: storage.read("s"), lambda: storage.commit("s", None, Head(1, 0, b"", 9e9)), lambda: storage.delete("s", 1),
        lambda: storage.scan(), lambda: storage.expired(9e9), lambda: storage.__aenter__(), lambda: storage.__aexit__(None, None, None),
        lambda: storage.watch("s").__aenter__(), lambda: asyncio.sleep(0, storage.time()),
    ]
    for call in calls:
        try:
            await call()
        except WrongEventLoopError:
            continue
        raise AssertionError("not refused")

async def main():
    async with SQLiteStorage(path) as storage, storage.watch("s") as watching:
        await write(storage, "s", 0, 3)
        succeeded(child(lambda: in_loop(refused(storage, watching))))
        loop = asyncio.get_running_loop()
        def go_on_with_the_same_coroutine():
            async def main():
                await refused(storage, watching)
            try:
                main().send(None)
            except StopIteration:
                pass
        succeeded(child(go_on_with_the_same_coroutine))
        await write(storage, "s", 3, 6)

asyncio.run(main())

# A program that makes itself a daemon, and goes on with the loop that it has inherited.
loop = asyncio.new_event_loop()
storage = SQLiteStorage(path)
loop.run_until_complete(storage.__aenter__())
succeeded(child(lambda: loop.run_until_complete(refused(storage, None))))
loop.run_until_complete(write(storage, "s", 6, 9))
loop.run_until_complete(storage.__aexit__(None, None, None))
loop.close()
""",
        path,
    )
    await check(path, s=9)


async def test_a_child_has_none_of_its_parents_descriptors_and_locks(path: Path) -> None:
    run(
        """
async def main():
    async with SQLiteStorage(path) as storage, storage.watch("s"):
        await write(storage, "s", 0, 3)
        assert descriptors()
        def look():
            assert descriptors() == [], descriptors()
        succeeded(child(look))
        # One that lives on and is killed while it holds what is its own.
        ready = os.pipe()
        def hold():
            async def main():
                async with SQLiteStorage(path) as own:
                    lock = own._entered.writer._session._interlock._lock
                    fcntl.flock(lock, fcntl.LOCK_EX)
                    os.write(ready[1], b"x")
                    time.sleep(60)
            in_loop(main())
        pid = child(hold)
        await asyncio.to_thread(os.read, ready[0], 1)
        writing = asyncio.create_task(write(storage, "s", 3, 6))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        await asyncio.wait_for(writing, 20)

asyncio.run(main())
""",
        path,
    )
    await check(path, s=6)


async def test_forks_from_any_thread_while_many_storages_are_busy_lose_nothing(path: Path) -> None:
    run(
        """
async def main():
    storages = [SQLiteStorage(path) for _ in range(4)]
    for storage in storages:
        await storage.__aenter__()
    def fork_often(name):
        for number in range(8):
            if number % 2:
                succeeded(child(lambda: in_loop(write_own(f"{name}{number}", 5))))
            else:
                succeeded(child(lambda: None))
    writes = [write(storage, f"s{number}-{i}", 0, 60) for number, storage in enumerate(storages) for i in range(8)]
    forks = [asyncio.to_thread(fork_often, name) for name in ("a", "b")]
    async def read():
        for _ in range(200):
            for storage in storages:
                await storage.read("s0-0", 0, 100)
    await asyncio.gather(*writes, *forks, read())
    succeeded(child(lambda: None))
    await asyncio.gather(*(write(storage, f"s{number}-0", 60, 70) for number, storage in enumerate(storages)))
    for storage in storages:
        await storage.__aexit__(None, None, None)

asyncio.run(main())
""",
        path,
    )
    await check(path, **{f"s{number}-{i}": 70 if i == 0 else 60 for number in range(4) for i in range(8)}, a1=5, b7=5)


async def test_a_fork_does_not_wait_for_the_lock_that_another_process_holds(path: Path) -> None:
    """The writer waits for it; the fork lets it begin again."""
    run(
        """
async def main():
    async with SQLiteStorage(path) as storage:
        await write(storage, "s", 0, 3)
        lock = os.open(path + "-lock", os.O_RDWR)
        fcntl.flock(lock, fcntl.LOCK_EX)
        writing = asyncio.create_task(write(storage, "s", 3, 6))
        while not storage._entered.writer._turn.locked():
            await asyncio.sleep(0)
        began = time.monotonic()
        succeeded(child(lambda: os.close(lock)))
        assert time.monotonic() - began < 10
        os.close(lock)
        await asyncio.wait_for(writing, 20)

asyncio.run(main())
""",
        path,
    )
    await check(path, s=6)


async def test_what_was_asked_for_before_a_fork_is_done_after_it(path: Path) -> None:
    run(
        """
async def main():
    async with SQLiteStorage(path) as storage:
        await write(storage, "s0", 0, 1)
        tasks = [asyncio.create_task(write(storage, f"s{i}", 0, 1)) for i in range(1, 300)]
        reads = [asyncio.create_task(storage.read("s0", 0, 9)) for i in range(300)]
        await asyncio.sleep(0)
        succeeded(child(lambda: None))
        await asyncio.gather(*tasks)
        assert all(page.head.tail == 1 for page in await asyncio.gather(*reads))
    # Left while jobs are queued.
    async with SQLiteStorage(path) as storage:
        task = asyncio.create_task(write(storage, "last", 0, 1))
        await asyncio.sleep(0)
        succeeded(child(lambda: None))
    await task

asyncio.run(main())
""",
        path,
    )
    await check(path, **{f"s{i}": 1 for i in range(300)}, last=1)


async def test_multiprocessing_by_fork_works(path: Path) -> None:
    run(
        """
def work(name):
    asyncio.events._set_running_loop(None)
    asyncio.run(write_own(name, 10))
    return name

async def main():
    async with SQLiteStorage(path) as storage:
        await write(storage, "parent", 0, 10)
        with multiprocessing.get_context("fork").Pool(2) as pool:
            names = [f"child{i}" for i in range(6)]
            asked = pool.map_async(work, names)
            await write(storage, "parent", 10, 60)
            assert await asyncio.to_thread(asked.get, 30) == names
            pool.close()
            pool.join()

asyncio.run(main())
""",
        path,
    )
    await check(path, parent=60, child0=10, child5=10)


async def test_a_database_that_is_gone_when_the_parent_goes_on_takes_nothing(path: Path) -> None:
    run(
        """
async def main():
    async with SQLiteStorage(path) as storage:
        await write(storage, "s", 0, 3)
        os.rename(path, path + "-moved")
        succeeded(child(lambda: None))
        for call in (lambda: write(storage, "s", 3, 4), lambda: storage.read("s")):
            try:
                await call()
            except StorageError as error:
                assert "removed or replaced" in str(error), error
            else:
                raise AssertionError
        assert not os.path.exists(path)
        os.rename(path + "-moved", path)
        await write(storage, "s", 3, 6)

asyncio.run(main())
""",
        path,
    )
    await check(path, s=6)


async def test_what_was_closed_or_forgotten_is_not_kept_alive(path: Path) -> None:
    run(
        """
async def main():
    alive = []
    for _ in range(3):
        async with SQLiteStorage(path) as storage, storage.watch("s"):
            alive += [weakref.ref(storage), weakref.ref(storage._entered.writer), weakref.ref(storage._entered.listener)]
        del storage
    gc.collect()
    assert [ref for ref in alive if ref()] == [], alive
    assert len(_before_fork._forks._registered) == 0
    succeeded(child(lambda: None))

asyncio.run(main())
""",
        path,
    )


async def test_a_fork_in_c_leaves_a_child_that_cannot_open_the_database_and_a_parent_that_loses_nothing(path: Path) -> None:
    """It calls no hook before it forks. (uWSGI forks so, and calls the hook of the child.)"""
    run(
        """
import ctypes

def fork_in_c(function):
    pid = ctypes.PyDLL(None).fork()
    if pid:
        return pid
    ctypes.pythonapi.PyOS_AfterFork_Child()
    code = 1
    try:
        function()
        code = 0
    finally:
        os._exit(code)

async def main():
    async with SQLiteStorage(path) as storage:
        await write(storage, "s", 0, 20)
        def refused():
            try:
                in_loop(write_own("child", 1))
            except StorageError as error:
                assert "was in use when this process was forked" in str(error), error
            else:
                raise AssertionError
        succeeded(fork_in_c(refused))
        await write(storage, "s", 20, 40)

asyncio.run(main())
""",
        path,
    )
    await check(path, s=40)


def test_a_process_that_is_forked_before_it_opens_anything_is_like_any_other(path: Path) -> None:
    run("succeeded(child(lambda: asyncio.run(write_own('s', 10))))", path)
    asyncio.run(check(path, s=10))
