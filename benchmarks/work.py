"""What is measured, over whatever a StreamManager can be had of; and how: ours and the bare way in turn, and the medians."""

import asyncio
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from benchmarks.answer import CHUNK
from streamkeep import StreamManager

REPLAYED = 10_000
WRITERS = 64

P = TypeVar("P")
"""Where something is measured: an empty folder, the URL of an empty storage."""

Run = Callable[[Coroutine[Any, Any, float]], float]
Connect = Callable[[P], AbstractAsyncContextManager[StreamManager]]
HEADER = "| work | unit | streamkeep | bare | ratio |\n|---|---|---:|---:|---:|"


class Log(Protocol):
    """What can be written to."""

    async def write(self, chunk: object) -> int: ...


@dataclass(frozen=True, slots=True)
class Work(Generic[P]):
    """Two ways to do the same, once, in an empty place; each gives how many units of it a second, or how many units it took."""

    name: str
    unit: str
    ours: Callable[[P], Awaitable[float]]
    bare: Callable[[P], Awaitable[float]]
    digits: int = 0

    def measure(self, rounds: int, run: Run, place: Callable[[], AbstractContextManager[P]]) -> str:
        """Measure both in turn, and give a row: the medians of ours, of the bare way, and of the rounds' ratios."""
        ours: list[float] = []
        plain: list[float] = []
        for _ in range(rounds):
            for way, figures in ((self.ours, ours), (self.bare, plain)):
                with place() as somewhere:
                    figures.append(run(_go(way, somewhere)))
        ratio = statistics.median(one / other for one, other in zip(ours, plain, strict=True))
        mine, theirs = (f"{statistics.median(some):,.{self.digits}f}" for some in (ours, plain))
        return f"| {self.name} | {self.unit} | {mine} | {theirs} | {ratio:.2f} |"


async def append(connect: Connect[P], writers: int, each: int, place: P) -> float:
    async with connect(place) as streams:
        return await append_to([await streams.open(f"s{number}") for number in range(writers)], each)


async def append_to(logs: list[Any], each: int) -> float:
    started = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for log in logs:
            tasks.create_task(_write(log, each))
    return rate(len(logs) * each, started)


async def _write(log: Log, each: int) -> None:
    for _ in range(each):
        await log.write(CHUNK)


async def replay(connect: Connect[P], place: P) -> float:
    async with connect(place) as streams:
        async with streams.open("s") as stream:
            for _ in range(REPLAYED):
                stream.write_soon(CHUNK)
            await stream.done()
        started = time.perf_counter()
        async with streams.subscribe("s") as events:
            count = 0
            async for _event in events:
                count += 1
        return rate(count, started)


@contextmanager
def folder() -> Generator[Path]:
    """Give an empty folder."""
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


def counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def rate(count: int, started: float) -> float:
    return count / (time.perf_counter() - started)


async def _go(way: Callable[[P], Awaitable[float]], place: P) -> float:
    return await way(place)
