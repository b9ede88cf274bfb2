"""A census: what this process holds at one moment, counted by kind, so that what is left over later has a name.

It counts objects, tasks, threads, descriptors, the entries of a manager's registries and the rows of a database. It knows no
times, and takes no part in deciding what is too much: `left_over` gives a difference, and a test says what that may be.
"""

import asyncio
import ctypes
import gc
import os
import sqlite3
import threading
import tracemalloc
from collections import Counter
from collections.abc import Awaitable, Callable, Generator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

import anyio
from tests.inside import feeds_of, storage_of, tasks_of, writers_of

from streamkeep import StreamManager
from streamkeep.http import StreamsHTTP
from streamkeep.storages.memory import MemoryStorage
from streamkeep.storages.sqlite import SQLiteStorage

Census = Counter[str]

WATCHED_PACKAGES: Final = ("streamkeep", "anyio", "asyncio", "_asyncio", "uvicorn", "uvloop", "starlette", "fastapi")
CENSUSES: Final = 5
CENSUS_SECONDS: Final = 0.1
VALUES: Final = ("Head", "Life", "State", "StreamInfo")
"""Of a stream's values there may be one or two of the same, depending on when they were read; what holds them is counted."""


def take_census(held: StreamManager | StreamsHTTP | None = None) -> Census:
    """Count what this process holds; of a manager or of endpoints over one also what they keep account of."""
    census = objects() + threads() + descriptors()
    match held:
        case StreamsHTTP():
            return census + registries(held.streams) + Census({"producer": len(held.runner._runs)})
        case StreamManager():
            return census + registries(held)
        case None:
            return census


async def census_in_motion(take: Callable[[], Awaitable[Census]]) -> Census:
    """Take a few censuses, and give the most there was of each kind: background tasks sleep, wait and look by turns."""
    census = Census()
    for _ in range(CENSUSES):
        census |= await take()
        await anyio.sleep(CENSUS_SECONDS)
    return census


def left_over(before: Census, after: Census) -> dict[str, int]:
    """Say of what there is more than there was, and how much more."""
    return dict(after - before)


def objects() -> Census:
    """Count what the garbage collector knows of our classes, the event loop's and the server's, and of async generators."""
    gc.collect()
    types = Counter(type(thing) for thing in gc.get_objects() if not _is_cancelled_timer(thing))
    return Census(
        {
            f"object {type_.__module__}.{type_.__qualname__}": count
            for type_, count in types.items()
            if (str(type_.__module__).split(".")[0] in WATCHED_PACKAGES and type_.__name__ not in VALUES)
            or type_.__name__ == "async_generator"
        }
    )


def _is_cancelled_timer(thing: object) -> bool:
    # An event loop keeps those until their time comes, or until they are too many. `type`, because a lazy object of Django's makes itself
    # when it is asked for its class.
    return type(thing) is asyncio.TimerHandle and thing.cancelled()


def threads() -> Census:
    """Count threads, Python's by name and all by the kernel's book."""
    named = Census(f"thread {thread.name}" for thread in threading.enumerate())
    return named + Census({"thread of the kernel": len(list(Path("/proc/self/task").iterdir()))})


def descriptors() -> Census:
    """Count open descriptors by what they are open on, and what inotify watches."""
    census = Census()
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the one that lists them
            target = str(descriptor.readlink())
            census[f"descriptor {target.partition(':[')[0].rpartition('/')[2] or target}"] += 1
            census["inotify watch"] += _inotify_watches(descriptor.name)
    del census["descriptor fd"]
    return +census


def _inotify_watches(descriptor: str) -> int:
    return Path(f"/proc/self/fdinfo/{descriptor}").read_text().count("inotify wd:")


def registries(streams: StreamManager) -> Census:
    """Count what a manager, and its storage's doorbells, keep account of."""
    feeds, storage = feeds_of(streams), storage_of(streams)
    census = Census(
        {
            "background task": tasks_of(streams),
            "writer": writers_of(streams),
            "feed": len(feeds),
            "follower": sum(feed.followers for feed in feeds.values()),
        }
    )
    if isinstance(storage, MemoryStorage | SQLiteStorage):
        watchers = storage._doorbells._by_stream
        census.update({"watched stream": len(watchers), "watcher": sum(map(len, watchers.values()))})
    if isinstance(storage, MemoryStorage):
        kept = storage._streams.values()
        census.update({"row of streams": len(kept), "row of records": sum(len(stream.records) for stream in kept)})
    return census


def rows(database: Path) -> Census:
    """Count the rows of a SQLite database; best after it was closed, since SQLite keeps a descriptor for other connections."""
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as db:
        return Census(
            {f"row of {table}": db.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in ("streams", "records")}
        )


def resident_bytes() -> int:
    """Give the memory of this process as the kernel counts it, after giving back what is free; for reports, being noisy."""
    gc.collect()
    with suppress(AttributeError, OSError):  # glibc has it
        ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@dataclass
class Traced:
    """Python's memory since a moment, in bytes.

    Attributes:
        base: what there was at that moment.
    """

    base: int

    def now(self) -> int:
        """Say how much more there is now, garbage not counted."""
        gc.collect()
        return tracemalloc.get_traced_memory()[0] - self.base

    def peak(self) -> int:
        """Say how much more there was at most."""
        return tracemalloc.get_traced_memory()[1] - self.base


@contextmanager
def traced_memory() -> Generator[Traced]:
    """Count the memory of all that is allocated within the block."""
    gc.collect()
    tracemalloc.start(1)
    try:
        yield Traced(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()


async def growth_by_round(work: Callable[[], Awaitable[object]], *, rounds: int) -> list[int]:
    """Do the work a few times over, after a first time that does not count; give the bytes that each time left behind."""
    with traced_memory() as memory:
        await work()
        sizes = [memory.now()]
        for _ in range(rounds):
            await work()
            sizes.append(memory.now())
    return [after - before for before, after in pairwise(sizes)]
