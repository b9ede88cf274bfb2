"""`python -m benchmarks`: prints the table of ratios."""

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import uvloop

from benchmarks import bare
from streamkeep import InMemoryStreamManager, StreamInput, StreamManager

CHUNK = {"text": "It was the best of times, it was the worst of times, it was the age of wisdom", "index": 41, "role": "model"}
REPLAYED = 10_000
WRITERS = 64

Measure = Callable[[Path], Awaitable[float]]
"""Does the work once, in an empty folder, and gives how many units of it a second."""

Run = Callable[[Coroutine[Any, Any, float]], float]
Connect = Callable[[Path], AbstractAsyncContextManager[StreamManager]]


@dataclass(frozen=True, slots=True)
class Work:
    """Two ways to do the same."""

    name: str
    unit: str
    ours: Measure
    bare: Measure


def on_memory(_folder: Path) -> StreamManager:
    return InMemoryStreamManager()


def on_sqlite(folder: Path) -> StreamManager:
    return StreamManager.connect(f"sqlite:///{folder / 'streams.db'}")


async def append(connect: Connect, writers: int, each: int, folder: Path) -> float:
    async with connect(folder) as streams:
        inputs = [await streams.open(f"s{number}") for number in range(writers)]
        started = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for stream in inputs:
                tasks.create_task(_write(stream, each))
        return _rate(writers * each, started)


async def _write(stream: StreamInput | bare.Log, each: int) -> None:
    for _ in range(each):
        await stream.write(CHUNK)


async def append_bare_log(writers: int, each: int, _folder: Path) -> float:
    logs = [bare.Log() for _ in range(writers)]
    started = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for log in logs:
            tasks.create_task(_write(log, each))
    return _rate(writers * each, started)


async def append_bare_database(writers: int, each: int, folder: Path) -> float:
    database = bare.Database(folder / "bare.db", writers)
    started = time.perf_counter()
    for _ in range(each):
        database.write_batch(CHUNK)
    return _rate(writers * each, started)


async def replay(connect: Connect, folder: Path) -> float:
    async with connect(folder) as streams:
        async with streams.open("s") as stream:
            for _ in range(REPLAYED):
                stream.write_soon(CHUNK)
            await stream.done()
        started = time.perf_counter()
        async with streams.subscribe("s") as events:
            count = 0
            async for _event in events:
                count += 1
        return _rate(count, started)


async def replay_bare_list(_folder: Path) -> float:
    records = [b"c" + bare.encode(CHUNK)] * REPLAYED
    started = time.perf_counter()
    return _rate(bare.replay_list(records), started)


async def replay_bare_database(folder: Path) -> float:
    database = bare.Database(folder / "bare.db", 1)
    record = b"c" + bare.encode(CHUNK)
    database.db.executemany("INSERT INTO records VALUES (0, ?, ?)", ((offset, record) for offset in range(REPLAYED)))
    started = time.perf_counter()
    return _rate(database.replay(), started)


async def fan_out(subscribers: int, chunks: int, folder: Path) -> float:
    async with on_memory(folder) as streams:
        stream = await streams.open("s")
        entered = asyncio.Barrier(subscribers + 1)

        async def follow() -> None:
            async with streams.subscribe("s") as events:
                await entered.wait()
                async for _event in events:
                    pass

        async with asyncio.TaskGroup() as tasks:
            for _ in range(subscribers):
                tasks.create_task(follow())
            await entered.wait()
            started = time.perf_counter()
            for number in range(chunks):
                await stream.write(number)
                await asyncio.sleep(0)
            await stream.done()
        return _rate(subscribers * chunks, started)


async def fan_out_bare(subscribers: int, chunks: int, _folder: Path) -> float:
    started = time.perf_counter()
    return _rate(await bare.fan_out(subscribers, chunks), started)


def all_work(scale: float) -> Sequence[Work]:
    def times(number: int) -> int:
        return max(1, int(number * scale))

    works = []
    for writers, each in ((1, times(10_000)), (WRITERS, times(200))):
        ours, plain = partial(append, on_memory, writers, each), partial(append_bare_log, writers, each)
        works.append(Work(f"memory, append, {_count(writers, 'writer')}", "writes/s", ours, plain))
    for writers, each in ((1, times(500)), (WRITERS, times(200))):
        ours, plain = partial(append, on_sqlite, writers, each), partial(append_bare_database, writers, each)
        works.append(Work(f"SQLite FULL, append, {_count(writers, 'writer')}", "writes/s", ours, plain))
    works.append(Work("memory, replay of 10,000", "events/s", partial(replay, on_memory), replay_bare_list))
    works.append(Work("SQLite, replay of 10,000", "events/s", partial(replay, on_sqlite), replay_bare_database))
    for subscribers, chunks in ((1, times(5_000)), (10, times(2_000)), (100, times(300)), (1_000, times(50))):
        ours, plain = partial(fan_out, subscribers, chunks), partial(fan_out_bare, subscribers, chunks)
        works.append(Work(f"fan-out to {_count(subscribers, 'subscriber')}", "deliveries/s", ours, plain))
    return works


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _rate(count: int, started: float) -> float:
    return count / (time.perf_counter() - started)


def measure(work: Work, rounds: int, run: Run) -> tuple[float, float, float]:
    """Give the medians of ours, of the bare loop, and of the rounds' ratios."""
    ours: list[float] = []
    plain: list[float] = []
    for _ in range(rounds):
        for way, rates in ((work.ours, ours), (work.bare, plain)):
            with tempfile.TemporaryDirectory() as folder:
                rates.append(run(_run(way, Path(folder))))
    ratios = [mine / theirs for mine, theirs in zip(ours, plain, strict=True)]
    return statistics.median(ours), statistics.median(plain), statistics.median(ratios)


async def _run(way: Measure, folder: Path) -> float:
    return await way(folder)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="how many times each is measured (7)")
    parser.add_argument(
        "--uvloop", action="store_true", help="on uvloop, which uvicorn uses where it can, instead of asyncio's own loop"
    )
    parser.add_argument("--quick", action="store_true", help="a tenth of the work")
    options = parser.parse_args()
    print("| work | unit | streamkeep | bare | ratio |\n|---|---|---:|---:|---:|")
    for work in all_work(0.1 if options.quick else 1.0):
        ours, plain, ratio = measure(work, options.rounds, uvloop.run if options.uvloop else asyncio.run)
        print(f"| {work.name} | {work.unit} | {ours:,.0f} | {plain:,.0f} | {ratio:.2f} |", flush=True)


main()
