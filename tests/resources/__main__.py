"""The long form of the tests of resources: `python -m tests.resources [--seed N] [--connections N] [--streams N] [--rounds N]`.

What was counted and measured is one JSON object on the last line of stdout; exit code 1 if anything was left over, lost or
unbounded. Figures of memory are the kernel's, and of the server's process.
"""

import argparse
import asyncio
import json
import logging
import random
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Final

from tests.resources.census import resident_bytes
from tests.resources.crowd import SERVERS_LIMIT, cpu_share_while_full
from tests.resources.idle import hold_idle
from tests.resources.large import peak_of_not_reading, peak_of_reading
from tests.resources.limits import room_for
from tests.resources.lives import live_and_count, manager_over
from tests.resources.server import server
from tests.resources.storms import READS, served, storms

from streamkeep.storage import PAGE_BYTES, Storage
from streamkeep.storages.memory import MemoryStorage
from streamkeep.storages.sqlite import SQLiteStorage

WATCH_SECONDS: Final = 30.0
LARGE_CHUNKS: Final = 3_200
"""200 MB of them."""

Counted = dict[str, object]


class Campaign:
    """The attacks, each of which gives what it has counted, and whether that is right."""

    def __init__(self, arguments: argparse.Namespace, directory: Path) -> None:
        self._arguments = arguments
        self._directory = directory

    def attacks(self) -> dict[str, Callable[[], Awaitable[tuple[Counted, bool]]]]:
        """Give them by name."""
        return {
            "streams in memory": lambda: self._lives(MemoryStorage(), "memory"),
            "streams in SQLite": lambda: self._lives(SQLiteStorage(self._folder("sqlite") / "streams.db"), "sqlite"),
            "storms": self._storms,
            "idle connections": self._idle,
            "no descriptor left": self._full,
            "a stream of 200 MB": self._large,
        }

    def _folder(self, name: str) -> Path:
        folder = self._directory / name
        folder.mkdir(exist_ok=True)
        return folder

    async def _lives(self, storage: Storage, name: str) -> tuple[Counted, bool]:
        arguments = self._arguments
        a_round = arguments.streams // arguments.rounds
        before = resident_bytes()
        async with manager_over(storage) as streams:
            aftermath = await live_and_count(
                streams, self._folder(name), number=a_round, rounds=arguments.rounds - 1, seed=arguments.seed
            )
        first, *_, last = aftermath.file_bytes
        counted: Counted = {"streams": a_round * arguments.rounds, "left_over": aftermath.left_over, "rows": aftermath.rows}
        counted |= {"file_bytes": [first, last], "resident_growth_bytes": resident_bytes() - before}
        return counted, not aftermath.left_over and not aftermath.rows and last <= 2 * first

    async def _storms(self) -> tuple[Counted, bool]:
        rng = random.Random(self._arguments.seed)
        rounds = self._arguments.rounds
        async with served(self._folder("storms") / "streams.db") as (http, port):
            aftermath = await storms(http, port, READS, rng, rounds=rounds, clients=400)
        left_over = [left for left in aftermath.left_over if left]
        return {"cuts": 400 * rounds, "left_over": left_over}, not left_over and aftermath.is_faithful_served

    async def _idle(self) -> tuple[Counted, bool]:
        database = self._folder("idle") / "streams.db"
        async with server(database) as running:
            connections = room_for(self._arguments.connections)
            cost = await hold_idle(running, database, connections, streams=50, watch_seconds=WATCH_SECONDS)
        return asdict(cost), not cost.left_over and not cost.wrong

    async def _full(self) -> tuple[Counted, bool]:
        database = self._folder("full") / "streams.db"
        shares: Counted = {}
        for loop, backlog in (("uvloop", 2048), ("asyncio", 16), ("asyncio", 2048)):
            async with server(database, loop=loop, backlog=backlog, descriptors=SERVERS_LIMIT) as running:
                shares[f"cpu share, {loop}, backlog {backlog}"] = round(await cpu_share_while_full(running, 5.0), 3)
        return shares, True

    async def _large(self) -> tuple[Counted, bool]:
        never_read = await peak_of_not_reading(self._folder("never read"), LARGE_CHUNKS)
        read = await peak_of_reading(self._folder("read"), LARGE_CHUNKS)
        return {"peak_of_not_reading": never_read, "peak_of_reading": read}, max(never_read, read) < 8 * PAGE_BYTES


async def _run(arguments: argparse.Namespace) -> dict[str, object]:
    began = time.monotonic()
    result: dict[str, object] = {"campaign": "resources", "seed": arguments.seed}
    violations = 0
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for name, attack in Campaign(arguments, directory).attacks().items():
            started = time.monotonic()
            counted, is_right = await attack()
            print(f"{name}: {counted}, {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
            result[name] = counted
            violations += not is_right
    return result | {"violations": violations, "seconds": round(time.monotonic() - began, 1)}


def main() -> int:
    """Run all attacks, and give the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.resources")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--connections", type=int, default=5_000)
    parser.add_argument("--streams", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=10)
    logging.disable()
    result = asyncio.run(_run(parser.parse_args()))
    print(json.dumps(result))
    return 1 if result["violations"] else 0


if __name__ == "__main__":
    sys.exit(main())
