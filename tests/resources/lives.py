"""All the ways in which a stream may live and be read, to be gone through by the thousand; chosen by a seed."""

import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import reduce
from itertools import count
from operator import or_
from pathlib import Path
from typing import Final

import anyio
from tests.http.servers import until
from tests.inside import storage_of, tasks_of, writers_of
from tests.resources.census import CENSUS_SECONDS, CENSUSES, Census, left_over, take_census

from streamkeep import StreamInput, StreamManager, StreamNotFoundError, StreamTimeoutError
from streamkeep._lifecycle import AFTER_RESERVED
from streamkeep.storage import Storage

CHUNK: Final = {"text": "nothing is lost " * 8}
AT_A_TIME: Final = 100
TTL: Final = timedelta(seconds=0.5)
OWN_TASKS: Final = 3
"""A manager sweeps, tends its writers, and renews its session, if no thread does that."""

Fate = Callable[[StreamManager, StreamInput], Coroutine[object, object, None]]
Visit = Callable[[StreamManager, str], Coroutine[object, object, None]]


# What becomes of a stream


async def _completed(streams: StreamManager, writer: StreamInput) -> None:
    async with writer:
        await _write(writer)
        await writer.done({"text": "nothing is lost"})


async def _failed(streams: StreamManager, writer: StreamInput) -> None:
    with suppress(LookupError):
        async with writer:
            await _write(writer)
            raise LookupError("the producer's own")


async def _let_go(streams: StreamManager, writer: StreamInput) -> None:
    async with writer:
        await _write(writer)


async def _dropped(streams: StreamManager, writer: StreamInput) -> None:
    await _write(writer)


async def _stopped(streams: StreamManager, writer: StreamInput) -> None:
    await _write(writer)
    await streams.cancel(writer.id)
    await writer.cancelled.wait()


async def _deleted(streams: StreamManager, writer: StreamInput) -> None:
    await _write(writer)
    await streams.delete(writer.id)
    await writer.cancelled.wait()


async def _taken_over(streams: StreamManager, writer: StreamInput) -> None:
    await _let_go(streams, writer)
    async with streams.open(writer.id, resume=True) as successor:
        await _completed(streams, successor)


async def _cancelled_in_mid_write(streams: StreamManager, writer: StreamInput) -> None:
    with anyio.CancelScope() as producing:
        async with writer:
            writer.write_soon(CHUNK)
            producing.cancel()
            await _write(writer)


async def _write(writer: StreamInput) -> None:
    await writer.write(CHUNK)
    writer.write_soon(CHUNK)
    await writer.flush()


FATES: Final[tuple[Fate, ...]] = (
    _completed, _failed, _let_go, _dropped, _stopped, _deleted, _taken_over, _cancelled_in_mid_write,
)  # fmt: skip


# Who comes to read it


async def _times_out(streams: StreamManager, stream: str) -> None:
    with suppress(StreamTimeoutError):
        async with streams.subscribe(stream, idle_timeout=timedelta(milliseconds=1)) as events:
            async for _ in events:
                pass


async def _is_cancelled(streams: StreamManager, stream: str) -> None:
    with anyio.move_on_after(0.001):
        async with streams.subscribe(stream) as events:
            async for _ in events:
                pass


async def _leaves_early(streams: StreamManager, stream: str) -> None:
    async with streams.subscribe(stream, idle_timeout=timedelta(seconds=1)) as events:
        async for _ in events:
            break


async def _fails(streams: StreamManager, stream: str) -> None:
    with suppress(LookupError):
        async with streams.subscribe(stream, idle_timeout=timedelta(seconds=1)) as events:
            async for _ in events:
                raise LookupError("the reader's own")


async def _only_looks_in(streams: StreamManager, stream: str) -> None:
    events = streams.subscribe(stream)
    await events.__aenter__()
    await events.__aexit__(None, None, None)


VISITS: Final[tuple[Visit, ...]] = (_times_out, _is_cancelled, _leaves_early, _fails, _only_looks_in)


# All of it


async def come_and_go(streams: StreamManager, names: Iterable[str], rng: random.Random) -> None:
    """Open each of these streams, and let it have one fate while a visitor comes; return when everybody has left."""
    places = anyio.CapacityLimiter(AT_A_TIME)

    async def live(stream: str, fate: Fate, visit: Visit) -> None:
        async with places, anyio.create_task_group() as life:
            # No name is kept of the writer: one of the fates is that everybody drops it.
            life.start_soon(fate, streams, await streams.open(stream))
            life.start_soon(_come, visit, streams, stream)

    async with anyio.create_task_group() as lives:
        for name in names:
            lives.start_soon(live, name, rng.choice(FATES), rng.choice(VISITS))


async def _come(visit: Visit, streams: StreamManager, stream: str) -> None:
    with suppress(StreamNotFoundError, StreamTimeoutError):  # it has been deleted already, or nothing was written in time
        await visit(streams, stream)


async def let_all_expire(streams: StreamManager) -> None:
    """Let the abandoned be ended, which takes somebody who looks, and all that has ended be swept away."""
    while there := await streams.list():
        for info in there:
            with suppress(StreamNotFoundError):
                await streams.info(info.id)
        await anyio.sleep(TTL.total_seconds() / 5)
    await streams.sweep()


# Rounds of it


@asynccontextmanager
async def manager_over(storage: Storage) -> AsyncGenerator[StreamManager]:
    """Give a manager that soon ends what was dropped, and soon forgets what has ended; over a storage that listens, as it does for good."""
    async with storage, StreamManager(storage, ttl=TTL, lease=TTL, grace=timedelta(0)) as streams, storage.watch("any"):
        yield streams


def rounds_of_streams(streams: StreamManager, number: int, seed: int) -> Callable[[], Awaitable[None]]:
    """Give work that opens so many streams, and returns when they have expired and all background work on them has ended."""
    rng = random.Random(seed)
    rounds = count()

    async def one_round() -> None:
        name = next(rounds)
        await come_and_go(streams, (f"stream-{name}-{n}" for n in range(number)), rng)
        await let_all_expire(streams)
        await until(lambda: not writers_of(streams) and tasks_of(streams) <= OWN_TASKS)

    return one_round


@dataclass(frozen=True, slots=True)
class Aftermath:
    """What thousands of streams have left.

    Attributes:
        left_over: what was held after the last round, and not after any of the first half.
        rows: what was in the storage after the last round.
        file_bytes: the size of its files after each round; zeroes for a storage in memory.
    """

    left_over: dict[str, int]
    rows: int
    file_bytes: list[int]


async def live_and_count(streams: StreamManager, files: Path, *, number: int, rounds: int, seed: int) -> Aftermath:
    """Let so many streams a round come and go, and count after each what is held, and how large the storage's files are."""
    work = rounds_of_streams(streams, number, seed)
    censuses: list[Census] = []
    sizes: list[int] = []
    for _ in range(rounds + 1):
        await work()
        censuses.append(take_census(streams))
        sizes.append(_size(files))
    for _ in range(CENSUSES):  # what the storage has just been asked, for the session, is no leftover
        await anyio.sleep(CENSUS_SECONDS)
        censuses[-1] &= take_census(streams)
    kept = await storage_of(streams).scan(AFTER_RESERVED)
    before = reduce(or_, censuses[: len(censuses) // 2])
    return Aftermath(left_over(before, censuses[-1]), len(kept), sizes)


def _size(files: Path) -> int:
    return sum(file.stat().st_size for file in files.iterdir())
