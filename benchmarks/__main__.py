"""`python -m benchmarks`: prints the tables of ratios, in process and over HTTP, and what it costs to have many."""

import argparse
import asyncio
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import uvloop

from benchmarks import bare, many, over_http
from benchmarks.answer import CHUNK
from benchmarks.work import HEADER, REPLAYED, WRITERS, Work, append, append_to, counted, folder, rate, replay
from streamkeep import InMemoryStreamManager, StreamManager


def on_memory(_folder: Path) -> StreamManager:
    return InMemoryStreamManager()


def on_sqlite(folder: Path) -> StreamManager:
    return StreamManager.connect(f"sqlite:///{folder / 'streams.db'}")


async def append_bare_log(writers: int, each: int, _folder: Path) -> float:
    return await append_to([bare.Log() for _ in range(writers)], each)


async def append_bare_database(writers: int, each: int, folder: Path) -> float:
    database = bare.Database(folder / "bare.db", writers)
    started = time.perf_counter()
    for _ in range(each):
        database.write_batch(CHUNK)
    return rate(writers * each, started)


async def replay_bare_list(_folder: Path) -> float:
    records = [b"c" + bare.encode(CHUNK)] * REPLAYED
    started = time.perf_counter()
    return rate(bare.replay_list(records), started)


async def replay_bare_database(folder: Path) -> float:
    database = bare.Database(folder / "bare.db", 1)
    record = b"c" + bare.encode(CHUNK)
    database.db.executemany("INSERT INTO records VALUES (0, ?, ?)", ((offset, record) for offset in range(REPLAYED)))
    started = time.perf_counter()
    return rate(database.replay(), started)


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
        return rate(subscribers * chunks, started)


async def fan_out_bare(subscribers: int, chunks: int, _folder: Path) -> float:
    started = time.perf_counter()
    return rate(await bare.fan_out(subscribers, chunks), started)


def all_work(scale: float) -> Sequence[Work[Path]]:
    def times(number: int) -> int:
        return max(1, int(number * scale))

    works: list[Work[Path]] = []
    for writers, each in ((1, times(10_000)), (WRITERS, times(200))):
        ours, plain = partial(append, on_memory, writers, each), partial(append_bare_log, writers, each)
        works.append(Work(f"memory, append, {counted(writers, 'writer')}", "writes/s", ours, plain))
    for writers, each in ((1, times(500)), (WRITERS, times(200))):
        ours, plain = partial(append, on_sqlite, writers, each), partial(append_bare_database, writers, each)
        works.append(Work(f"SQLite FULL, append, {counted(writers, 'writer')}", "writes/s", ours, plain))
    works.append(Work("memory, replay of 10,000", "events/s", partial(replay, on_memory), replay_bare_list))
    works.append(Work("SQLite, replay of 10,000", "events/s", partial(replay, on_sqlite), replay_bare_database))
    for subscribers, chunks in ((1, times(5_000)), (10, times(2_000)), (100, times(300)), (1_000, times(50))):
        ours, plain = partial(fan_out, subscribers, chunks), partial(fan_out_bare, subscribers, chunks)
        works.append(Work(f"fan-out to {counted(subscribers, 'subscriber')}", "deliveries/s", ours, plain))
    return works


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="how many times each is measured (7)")
    parser.add_argument(
        "--uvloop", action="store_true", help="on uvloop, which uvicorn uses where it can, instead of asyncio's own loop"
    )
    parser.add_argument("--quick", action="store_true", help="a tenth of the work")
    options = parser.parse_args()
    run = uvloop.run if options.uvloop else asyncio.run
    print(HEADER)
    for work in all_work(0.1 if options.quick else 1.0):
        print(work.measure(options.rounds, run, folder), flush=True)
    print()
    over_http.print_rows(options.rounds, quick=options.quick)
    print()
    many.print_rows(run, quick=options.quick)


if __name__ == "__main__":
    main()
