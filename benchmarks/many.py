"""`python -m benchmarks.many`: what it costs to have many, beside what it cost in the first edition.

There is no bare way to do the same, so absolute figures stand here. They depend on the machine; what they are beside their goals and beside
what was measured before, on a machine of the same kind, hardly does.
"""

import argparse
import asyncio
import logging
import resource
import statistics
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, MutableMapping, Sequence
from contextlib import asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Final

import uvloop
from tests.engines.running import ENGINES

from benchmarks.answer import CHUNK
from benchmarks.work import WRITERS, counted, folder
from streamkeep import StreamInput, StreamManager
from streamkeep._lifecycle import Beginning, begin, finish, grow, life_of
from streamkeep.errors import StreamkeepError
from streamkeep.events import chunk_record, done_record
from streamkeep.http import StreamsHTTP
from streamkeep.storage import Storage
from streamkeep.storages import storage_for
from streamkeep.testing.faults import FaultyStorage

HEADER: Final = "| what | now | first edition | goal |\n|---|---:|---:|---:|"
Run = Callable[[Coroutine[Any, Any, Sequence[str]]], Sequence[str]]

TTL: Final = 300.0
MAKERS: Final = 256
AT_ONCE: Final = 500
WATCHED_SECONDS: Final = 20.0


@dataclass(slots=True)
class Cost:
    """What a while has cost: seconds, seconds of a processor, and for how long the event loop did nothing else at a stretch."""

    seconds: float = 0.0
    busy: float = 0.0
    stall: float = 0.0


@asynccontextmanager
async def costing() -> AsyncGenerator[Cost]:
    """Measure a while."""
    cost = Cost()

    async def tick() -> None:
        while True:
            slept_at = time.perf_counter()
            await asyncio.sleep(0.001)
            cost.stall = max(cost.stall, time.perf_counter() - slept_at - 0.001)

    ticking = asyncio.create_task(tick())
    await asyncio.sleep(0.05)
    cost.stall = 0.0
    began_at, busy_at = time.perf_counter(), time.process_time()
    try:
        yield cost
        await asyncio.sleep(0)
    finally:
        cost.seconds, cost.busy = time.perf_counter() - began_at, time.process_time() - busy_at
        ticking.cancel()
        with suppress(asyncio.CancelledError):
            await ticking


async def in_parts(count: int, do: Callable[[int], Awaitable[object]]) -> None:
    """Do something `count` times, some at a time."""
    for first in range(0, count, AT_ONCE):
        async with asyncio.TaskGroup() as tasks:
            for number in range(first, min(first + AT_ONCE, count)):
                tasks.create_task(_await(do(number)))


async def _await(work: Awaitable[object]) -> None:
    await work


async def fill(kept: Storage, count: int, at: float) -> None:
    """Store streams that were completed at some time."""

    async def add(number: int) -> None:
        life = finish(begin(at, "benchmark", "benchmark", Beginning(TTL)), at)
        await kept.commit(f"kept{number:06}", None, life.head, [done_record(None)])

    await in_parts(count, add)


async def opened(streams: StreamManager, count: int) -> list[StreamInput]:
    """Open so many writers."""
    inputs: list[StreamInput] = []

    async def open_one(number: int) -> None:
        inputs.append(await streams.open(f"s{number}"))

    await in_parts(count, open_one)
    return inputs


async def median_seconds(do: Callable[[], Awaitable[object]]) -> float:
    """Give how long something takes that is done again and again."""
    seconds: list[float] = []
    for _ in range(21):
        began_at = time.perf_counter()
        await do()
        seconds.append(time.perf_counter() - began_at)
    return statistics.median(seconds)


async def idle_writers(url: str, count: int) -> Sequence[str]:
    """Open writers that write nothing, for two leases."""
    async with StreamManager.connect(url) as streams:
        inputs = await opened(streams, count)
        await asyncio.sleep(2)
        busy_at = time.process_time()
        await asyncio.sleep(WATCHED_SECONDS)
        share = (time.process_time() - busy_at) / WATCHED_SECONDS
        async with costing() as cost:
            await asyncio.sleep(WATCHED_SECONDS)
        await in_parts(count, lambda number: inputs[number].close())
        return [f"{share:.2%} of a core, {cost.stall * 1_000:.0f} ms at a stretch"]


async def cancel_among(url: str, count: int) -> Sequence[str]:
    """Cancel, where the process has so many open writers."""
    async with StreamManager.connect(url) as streams:
        inputs = iter(await opened(streams, count))
        return [f"{await median_seconds(lambda: streams.cancel(next(inputs).id)) * 1_000:.1f} ms"]


async def keep(url: str, count: int) -> Sequence[str]:
    """Sweep and list where so many streams are kept."""
    async with storage_for(url) as kept, StreamManager(kept) as streams:
        await fill(kept, count, kept.time() + 3_600)
        async with costing() as cost:
            for _ in range(10):
                await streams.sweep()
        each = cost.busy / 10
        listing = await median_seconds(lambda: streams.list(limit=100))
        page = await median_seconds(lambda: kept.scan("", 100))
        return [
            f"{each * 1_000:.1f} ms of CPU, {each / 60:.4%} of a core",
            f"{listing * 1_000:.1f} ms, {listing / page:.1f} pages' time",
        ]


async def sweep_expired(url: str, count: int) -> Sequence[str]:
    """Delete what has expired, while others write."""
    async with storage_for(url) as kept:
        await fill(kept, count, kept.time() - 2 * TTL)
        async with costing() as cost, StreamManager(kept) as streams, asyncio.TaskGroup() as tasks:

            async def write(number: int) -> None:
                async with streams.open(f"s{number}") as stream:
                    for _ in range(1_000_000):
                        await stream.write(CHUNK)
                        await asyncio.sleep(0.05)

            writing = [tasks.create_task(write(number)) for number in range(WRITERS)]
            await streams.sweep()
            for task in writing:
                task.cancel()
        assert not await kept.expired(kept.time(), 1)
        return [f"{count / cost.seconds:,.0f} streams/s, {cost.stall * 1_000:.0f} ms at a stretch"]


async def make_and_expire(url: str, count: int) -> Sequence[str]:
    """Open and complete streams that expire at once, as fast as one process can, and sweep every second meanwhile."""
    numbers = iter(range(count))
    async with StreamManager.connect(url, ttl=timedelta(0)) as streams, asyncio.TaskGroup() as tasks:

        async def make() -> None:
            for number in numbers:
                await (await streams.open(f"s{number}")).done()

        async def sweep() -> None:
            while True:
                await asyncio.sleep(1)
                await streams.sweep()

        sweeping = tasks.create_task(sweep())
        began = time.perf_counter()
        async with asyncio.TaskGroup() as making:
            for _ in range(MAKERS):
                making.create_task(make())
        await streams.sweep()
        seconds = time.perf_counter() - began
        sweeping.cancel()
        assert not await streams.list(limit=1)
        return [f"{count / seconds:,.0f} streams/s"]


async def resume_long(url: str, events: int) -> Sequence[str]:
    """Go on with a stream that has so many events, and count the storage's calls."""
    async with storage_for(url) as kept:
        now = kept.time()
        life = begin(now, "", "", Beginning(TTL))
        await kept.commit("long", None, life.head)
        record = chunk_record({"text": "word"})
        while life.head.tail < events:
            grown = grow(life, 1_000, 1_000 * len(record), now)
            await kept.commit("long", life.head.version, grown.head, [record] * 1_000)
            life = grown
        counted = FaultyStorage(kept)
        async with StreamManager(counted) as streams:
            await asyncio.sleep(0.5)
            before = counted.calls.total()
            began_at = time.perf_counter()
            stream = await streams.open("long", resume=True)
            seconds = time.perf_counter() - began_at
            calls = counted.calls.total() - before
            await stream.done()
        return [f"{seconds * 1_000:.1f} ms, {calls} calls"]


async def tell_readers(url: str, readers: int, streams: int, *, by_delete: bool = False) -> Sequence[str]:
    """Have readers over HTTP be told that a read has failed, or that their stream was deleted."""
    async with storage_for(url) as kept:
        faulty = FaultyStorage(kept)
        # Readers of what is written in their own process are not told while they miss nothing: the writers are elsewhere.
        async with StreamManager(kept) as elsewhere, StreamsHTTP(StreamManager(faulty)) as served:
            inputs = [await elsewhere.open(f"s{number}") for number in range(streams)]
            for stream in inputs:
                await stream.write("first")
            begun = asyncio.Barrier(readers + 1)
            async with asyncio.TaskGroup() as tasks:
                answers = [tasks.create_task(read_sse(served, f"s{number % streams}", begun)) for number in range(readers)]
                await begun.wait()
                await asyncio.sleep(0.5)
                async with costing() as cost:
                    if by_delete:
                        await served.streams.delete("s0")
                    else:
                        faulty.is_down = True
                        await in_parts(streams, lambda number: ring(kept, f"s{number}"))
                    await asyncio.gather(*answers)
            faulty.is_down = False
            await in_parts(streams, lambda number: _release(inputs[number]))
        return [f"{cost.seconds:.2f} s, {cost.stall * 1_000:.0f} ms at a stretch"]


async def _release(stream: StreamInput) -> None:
    with suppress(StreamkeepError):
        await stream.close()


async def ring(kept: Storage, stream: str) -> None:
    """Let those who follow a stream read it again."""
    page = await kept.read(stream)
    assert page is not None
    life = grow(life_of(page.head), 1, 10, kept.time())
    await kept.commit(stream, page.head.version, life.head, [chunk_record("next")])


async def read_sse(app: StreamsHTTP, stream: str, begun: asyncio.Barrier) -> None:
    """Follow a stream to its end, calling the app as a server does."""
    scope = {"type": "http", "method": "GET", "path": f"/{stream}", "headers": [], "query_string": b""}
    has_begun = False

    async def receive() -> dict[str, object]:
        await asyncio.sleep(3_600)
        return {"type": "http.disconnect"}

    async def send(message: MutableMapping[str, Any]) -> None:
        nonlocal has_begun
        if message.get("body") and not has_begun:
            has_begun = True
            await begun.wait()

    with suppress(StreamkeepError):
        await app(scope, receive, send)


async def replay_at_once(url: str, readers: int) -> Sequence[str]:
    """Have readers replay 40 MB at once."""
    async with StreamManager.connect(url) as streams:
        async with streams.open("big") as stream:
            for _ in range(40):
                await stream.write("x" * 1_000_000)
            await stream.done()

        async def replay() -> None:
            async with streams.subscribe("big") as events:
                async for _event in events:
                    pass

        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        async with costing() as cost:
            await asyncio.gather(*(replay() for _ in range(readers)))
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        return [f"{cost.stall * 1_000:.0f} ms at a stretch, +{grown / 1_024:.0f} MB"]


@dataclass(frozen=True, slots=True)
class Row:
    """Something that is measured, and what stands beside it: one first edition's figure and one goal for each figure."""

    names: Sequence[str]
    measure: Callable[[str], Awaitable[Sequence[str]]]
    first_edition: Sequence[str]
    goals: Sequence[str]

    def print(self, run: Run, url: str) -> None:
        for row in zip(self.names, run(_measured(self.measure, url)), self.first_edition, self.goals, strict=True):
            print(f"| {' | '.join(row)} |", flush=True)


async def _measured(measure: Callable[[str], Awaitable[Sequence[str]]], url: str) -> Sequence[str]:
    return await measure(url)


def all_rows(scale: float) -> Sequence[Row]:
    """Give what is measured; the first edition's figures are those of SQLite or of memory, whichever is said."""

    def times(number: int) -> int:
        return max(1, int(number * scale))

    def writers(number: int, before: str, goal: str) -> Row:
        name = f"{counted(times(number), 'writer')} that write nothing"
        return Row([name], partial(idle_writers, count=times(number)), [before], [f"{goal}, 20 ms"])

    return [
        Row(["no writers, for comparison"], partial(idle_writers, count=0), [""], [""]),
        writers(1_000, "3 %, 27 ms", "1 %"),
        writers(5_000, "14 %, 376 ms", "2 %"),
        writers(20_000, "63 %, 1,600 ms", "5 %"),
        Row(
            [f"`cancel` among {times(50_000):,} open writers"], partial(cancel_among, count=times(50_000)), ["47 ms"], ["flat"]
        ),
        Row(
            [f"a sweep where {times(100_000):,} streams are kept", "`list(limit=100)` there"],
            partial(keep, count=times(100_000)),
            ["10 s of CPU", "12 ms"],
            ["0.1 % of a core", "3 pages' time"],
        ),
        Row(
            [f"{times(60_000):,} streams that have expired are deleted, beside 64 writers"],
            partial(sweep_expired, count=times(60_000)),
            ["3,600 ms (memory)"],
            ["5,000/s"],
        ),
        Row(
            ["streams are made, end, expire at once, and are deleted, by one process"],
            partial(make_and_expire, count=times(40_000)),
            [""],
            ["5,000/s"],
        ),
        Row(
            [f"`open(resume=True)` of {times(1_000_000):,} events"],
            partial(resume_long, events=times(1_000_000)),
            ["reads them all"],
            ["a few calls"],
        ),
        Row(
            [f"{times(400):,} readers are told that a read failed"],
            partial(tell_readers, readers=times(400), streams=1),
            ["16 s"],
            ["ms"],
        ),
        Row(
            [f"{times(400):,} readers are told that their stream is deleted"],
            partial(tell_readers, readers=times(400), streams=1, by_delete=True),
            ["8 s"],
            ["ms"],
        ),
        Row(
            [f"{times(600):,} readers of {times(600):,} streams are told that the storage is away"],
            partial(tell_readers, readers=times(600), streams=times(600)),
            ["17 s"],
            ["ms"],
        ),
        Row(
            [f"{times(400):,} readers replay 40 MB at once"],
            partial(replay_at_once, readers=times(400)),
            ["2,700 ms, 856 MB"],
            ["20 ms"],
        ),
    ]


def print_rows(run: Run, *, quick: bool, engine: str | None = None) -> None:
    """Measure all, over SQLite with `FULL` or an engine, and print a table."""
    logging.disable(logging.CRITICAL)  # what is told to 600 readers is told to nobody here
    print(HEADER)
    with ENGINES[engine]() if engine else nullcontext() as empty:
        for row in all_rows(0.1 if quick else 1.0):
            if empty is not None:
                row.print(run, empty().url)
            else:
                with folder() as path:
                    row.print(run, f"sqlite:///{path / 'streams.db'}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.many", description=__doc__)
    parser.add_argument("engine", choices=["sqlite", *ENGINES])
    parser.add_argument("--uvloop", action="store_true", help="on uvloop instead of asyncio's own loop")
    parser.add_argument("--quick", action="store_true", help="a tenth of what there is many of")
    options = parser.parse_args()
    engine = None if options.engine == "sqlite" else options.engine
    print_rows(uvloop.run if options.uvloop else asyncio.run, quick=options.quick, engine=engine)


if __name__ == "__main__":
    main()
