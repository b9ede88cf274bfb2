"""What a storage does for a commit or a read, counted: it does not grow with what is kept, and many that come together share it."""

import asyncio
import sys
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Final

import anyio
import pytest
from tests.counts import calls_of, least_bytes

import streamkeep
from streamkeep.storage import Head, Storage
from streamkeep.storages.memory import MemoryStorage
from streamkeep.storages.sqlite import SQLiteStorage

Work = Callable[[], Awaitable[object]]

AT_ONCE: Final = 64
NEVER: Final = 9e9
LITTLE_BYTES: Final = 32_000
"""More than a commit or a page of a few records needs, and less than a copy of what has thousands of parts."""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(params=["memory", "sqlite"])
async def storage(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncGenerator[Storage]:
    made = MemoryStorage() if request.param == "memory" else SQLiteStorage(tmp_path / "streams.db", synchronous="NORMAL")
    async with made as storage:
        yield storage


async def in_threads(storage: Storage, work: Callable[[Any], object]) -> None:
    """Do something with each of a storage's sessions, in the thread that has it."""
    if isinstance(storage, SQLiteStorage):
        for thread in (storage._open.writer, storage._open.reader):
            await thread.start(work)


async def steps_of(storage: Storage, work: Work) -> int:
    """Count the steps of SQLite's machine that something takes, which say how much of the database it passes over."""
    steps = 0

    def step() -> int:
        nonlocal steps
        steps += 1
        return 0

    await in_threads(storage, lambda session: session._db.set_progress_handler(step, 1))
    await work()
    await in_threads(storage, lambda session: session._db.set_progress_handler(None, 0))
    return steps


async def keep(storage: Storage, tail: int, streams: int) -> None:
    """Have a stream "long" with so many records, which is at version 1, and so many others, of which some are due."""
    page = await storage.read("long")
    if page is not None:
        assert await storage.delete("long", page.head.version)
    assert await storage.commit("long", None, Head(1, tail, b"state", NEVER), [b"record"] * tail)
    creating = [storage.commit(f"other{n:06}", None, Head(1, 0, b"state", 1.0 if n < 5 else NEVER)) for n in range(streams)]
    await asyncio.gather(*creating)


async def test_no_call_costs_more_because_much_is_kept(storage: Storage) -> None:
    version = 1

    async def commit() -> None:
        nonlocal version
        page = await storage.read("long")
        assert page is not None
        version = page.head.version + 1
        assert await storage.commit("long", version - 1, Head(version, page.head.tail + 1, b"state", NEVER), [b"record"])

    async def read(first: float, count: int) -> None:
        page = await storage.read("long")
        assert page is not None
        page = await storage.read("long", int(page.head.tail * first), count)
        assert page is not None
        assert len(page.records) <= count

    async def come_and_go() -> None:
        assert await storage.commit("short", None, Head(1, 1, b"state", NEVER), [b"record"])
        assert await storage.commit("short", 1, Head(2, 1, b"state", NEVER + 1))
        assert await storage.delete("short", 2)

    async def scan(after: str) -> None:
        assert len(await storage.scan(after, 5)) == 5

    async def expired() -> None:
        assert len(await storage.expired(2.0, 5)) == 5

    calls: dict[str, Work] = {
        "commit": commit,
        "read the first": lambda: read(0, 10),
        "read the middle": lambda: read(0.5, 10),
        "read the last": lambda: read(0.999, 10),
        "read none": lambda: read(1, 10),
        "scan": lambda: scan("other000003"),
        "expired": expired,
        "come and go": come_and_go,
    }
    costs: dict[str, list[tuple[int, int]]] = {name: [] for name in calls}
    for tail, streams in ((1_000, 20), (100_000, 10_020)):
        if tail > 1_000:
            others = await storage.scan("other", 20)
            for stream, head in others:
                assert await storage.delete(stream, head.version)
        await keep(storage, tail, streams)
        for name, call in calls.items():
            await call()
            assert await least_bytes(call) < LITTLE_BYTES, name
            with calls_of(streamkeep) as called:
                steps = await steps_of(storage, call)
            costs[name].append((steps, called.total()))

    for name, (few, many) in costs.items():
        assert many[0] <= 1.5 * few[0] + 20, name
        assert many[1] <= few[1] + 20, name


async def test_a_commit_rings_only_those_who_watch_its_stream(storage: Storage) -> None:
    async with AsyncExitStack() as stack:
        doorbells = {name: await stack.enter_async_context(storage.watch(name)) for name in ("s", "t", "u")}
        assert await storage.commit("s", None, Head(1, 0, b"", NEVER))
        with anyio.fail_after(10):
            await doorbells.pop("s").wait()
        for doorbell in doorbells.values():
            # A ring for nothing would be allowed, but is not wanted.
            with pytest.raises(TimeoutError), anyio.fail_after(0):
                await doorbell.wait()


@dataclass(frozen=True, slots=True)
class Asked:
    """What threads have asked for.

    Attributes:
        statements: what SQLite was to do, once for each row.
        calls: how often SQLite and the system were called.
    """

    statements: list[str] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)


SYSTEM_CALLS: Final = {
    "execute",
    "executemany",
    "fetchone",
    "read",
    "write",
    "lseek",
    "flock",
    "fcntl",
    "stat",
    "fstat",
    "fsync",
}


@asynccontextmanager
async def asked_in_threads(storage: Storage) -> AsyncGenerator[Asked]:
    """Note what a storage's threads ask for while within."""
    asked = Asked()

    def note(_frame: FrameType, what: str, function: Any) -> None:
        if what == "c_call" and function.__name__ in SYSTEM_CALLS:
            asked.calls[function.__name__] += 1

    def begin(session: Any) -> None:
        session._db.set_trace_callback(asked.statements.append)
        sys.setprofile(note)

    def end(session: Any) -> None:
        session._db.set_trace_callback(None)
        sys.setprofile(None)

    await in_threads(storage, begin)
    asked.statements.clear()  # of what has begun it
    asked.calls.clear()
    yield asked
    statements, calls = tuple(asked.statements), asked.calls.copy()
    await in_threads(storage, end)
    asked.statements[:] = statements
    asked.calls.clear()
    asked.calls.update(calls)


async def test_what_is_committed_at_once_is_one_transaction_and_few_calls_of_the_database(tmp_path: Path) -> None:
    async with SQLiteStorage(tmp_path / "streams.db") as storage:

        async def commit(count: int, version: int) -> None:
            head, seen = Head(version, version, b"state", NEVER), version - 1 or None
            done = await asyncio.gather(*[storage.commit(f"s{number}", seen, head, [b"record"]) for number in range(count)])
            assert all(done)

        await commit(AT_ONCE, 1)
        costs: list[Counter[str]] = []
        for count, version in ((AT_ONCE, 2), (1, 3)):
            async with asked_in_threads(storage) as asked:
                await commit(count, version)
            kinds = Counter(statement.split()[0] for statement in asked.statements)
            assert kinds["BEGIN"] == kinds["COMMIT"] == 1
            assert kinds["UPDATE"] == kinds["INSERT"] == count
            assert kinds["SELECT"] == 0
            assert not any(
                "expires_at =" in statement.partition("WHERE")[0] for statement in asked.statements
            )  # which has an index
            costs.append(asked.calls)

    assert costs[0].total() <= costs[1].total() + 2  # now and then the time is saved


@pytest.mark.parametrize("pages", [1, AT_ONCE])
async def test_what_is_read_at_once_is_one_transaction_and_each_page_is_read_once(tmp_path: Path, pages: int) -> None:
    async with SQLiteStorage(tmp_path / "streams.db") as storage:
        assert await storage.commit("s", None, Head(1, AT_ONCE, b"state", NEVER), [b"record"] * AT_ONCE)
        async with asked_in_threads(storage) as asked:
            await asyncio.gather(*[storage.read("s", number % pages, 5) for number in range(AT_ONCE)])

    kinds = Counter(statement.split()[0] for statement in asked.statements)
    assert kinds == {"BEGIN": 1, "SELECT": 2 * pages, "ROLLBACK": 1}
