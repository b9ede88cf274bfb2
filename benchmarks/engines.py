"""`python -m benchmarks.engines redis`: an engine's storage beside the bare driver, which does the same as one would write it by hand.

The engine is started as tests start it; `--url` names one that runs, and each measurement uses a namespace of its own there.
"""

import argparse
import asyncio
import importlib
import statistics
import time
import uuid
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, Protocol

import uvloop
from tests.engines.running import ENGINES, in_namespace

from benchmarks.answer import CHUNK
from benchmarks.work import HEADER, REPLAYED, WRITERS, Work, append, append_to, counted, replay
from streamkeep import StreamManager
from streamkeep._lifecycle import Beginning, Life, begin, grow
from streamkeep.events import chunk_record
from streamkeep.storage import Storage
from streamkeep.storages import storage_for


class Bare(Protocol):
    """The bare driver: what `benchmarks/bare_ENGINE.py` has under this name, made of a URL."""

    async def append(self, writers: int, each: int) -> float:
        """Let writers append, batching what they ask for at the same time; commits a second."""
        ...

    async def replay(self, count: int) -> float:
        """Read so many records; events a second."""
        ...

    async def deliver(self, count: int) -> list[float]:
        """Write one after the other, and give the seconds until each is there in another connection."""
        ...


OpenBare = Callable[[str], AbstractAsyncContextManager[Bare]]


class BareLog:
    """A stream without a StreamManager: the next head, and a commit."""

    def __init__(self, storage: Storage, stream: str, life: Life) -> None:
        self._storage = storage
        self._stream = stream
        self._life = life

    async def write(self, chunk: object) -> int:
        record = chunk_record(chunk)
        life = grow(self._life, 1, len(record), self._storage.time())
        assert await self._storage.commit(self._stream, self._life.head.version, life.head, [record])
        self._life = life
        return life.head.tail - 1


async def append_to_storage(writers: int, each: int, url: str) -> float:
    async with storage_for(url) as storage:
        logs: list[BareLog] = []
        for number in range(writers):
            life = begin(storage.time(), "benchmark", "benchmark", Beginning(300))
            assert await storage.commit(f"s{number}", None, life.head)
            logs.append(BareLog(storage, f"s{number}", life))
        return await append_to(logs, each)


async def deliver(count: int, url: str) -> list[float]:
    """Write one after the other, and give the seconds until each has been delivered by another manager."""
    seconds: list[float] = []
    async with StreamManager.connect(url) as writing, StreamManager.connect(url) as reading:
        stream = await writing.open("s")
        async with reading.subscribe("s") as events:
            for _ in range(count):
                started = time.perf_counter()
                writer = asyncio.ensure_future(stream.write(CHUNK))
                await anext(events)
                seconds.append(time.perf_counter() - started)
                await writer
    return seconds


def milliseconds(percent: int, seconds: Sequence[float]) -> float:
    """Give a percentile."""
    return 1000 * statistics.quantiles(seconds, n=100)[percent - 1]


def all_work(open_bare: OpenBare, scale: float) -> Sequence[Work[str]]:
    def times(number: int) -> int:
        return max(20, int(number * scale))

    def bare(measure: Callable[[Bare], Awaitable[Any]]) -> Callable[[str], Awaitable[Any]]:
        async def measured(url: str) -> Any:
            async with open_bare(url) as driver:
                return await measure(driver)

        return measured

    works: list[Work[str]] = []
    for writers, each in ((1, times(1_000)), (WRITERS, times(200))):
        plain = bare(partial(Bare.append, writers=writers, each=each))
        name = f"append, {counted(writers, 'writer')}"
        works.append(Work(name, "commits/s", partial(append, StreamManager.connect, writers, each), plain))
        works.append(Work(f"{name}, the storage alone", "commits/s", partial(append_to_storage, writers, each), plain))
    for percent in (50, 99):

        async def ours(url: str, percent: int = percent) -> float:
            return milliseconds(percent, await deliver(times(500), url))

        async def theirs(url: str, percent: int = percent) -> float:
            return milliseconds(percent, await bare(lambda driver: driver.deliver(times(500)))(url))

        works.append(Work(f"write to delivery, p{percent}", "ms", ours, theirs, digits=2))
    works.append(
        Work(
            f"replay of {REPLAYED:,}",
            "events/s",
            partial(replay, StreamManager.connect),
            bare(lambda driver: driver.replay(REPLAYED)),
        )
    )
    return works


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engines", description=__doc__)
    parser.add_argument("engine", choices=[*ENGINES])
    parser.add_argument("--url", help="of a storage on a server that runs already")
    parser.add_argument("--rounds", type=int, default=7, help="how many times each is measured (7)")
    parser.add_argument("--uvloop", action="store_true", help="on uvloop instead of asyncio's own loop")
    parser.add_argument("--quick", action="store_true", help="a tenth of the work")
    options = parser.parse_args()
    open_bare: OpenBare = importlib.import_module(f"benchmarks.bare_{options.engine}").Bare
    with ExitStack() as stack:
        empty = None if options.url else stack.enter_context(ENGINES[options.engine]())

        @contextmanager
        def place() -> Generator[str]:
            yield empty().url if empty else in_namespace(options.url, f"benchmark_{uuid.uuid4().hex[:8]}")

        print(HEADER)
        for work in all_work(open_bare, 0.1 if options.quick else 1.0):
            print(work.measure(options.rounds, uvloop.run if options.uvloop else asyncio.run, place), flush=True)


if __name__ == "__main__":
    main()
