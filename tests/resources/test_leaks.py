"""What was used is given back: streams, managers and subscribers come and go, and a census finds nothing left over.

Rounds of the same work are compared with one another, after a first one that fills whatever is filled once.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
from anyio.lowlevel import checkpoint
from tests.resources.census import growth_by_round, left_over, rows, take_census
from tests.resources.lives import come_and_go, live_and_count, manager_over, rounds_of_streams

from streamkeep import StorageError, StreamManager
from streamkeep.storage import Storage
from streamkeep.storages.memory import MemoryStorage
from streamkeep.storages.sqlite import SQLiteStorage

STREAMS: Final = 2_000
ROUNDS: Final = 10
SEED: Final = 20_240_229
BYTES_PER_STREAM: Final = 100
"""What a stream may seem to leave behind; an entry in a registry would be more. (The last batch of a thread is still there.)"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore:the writer of stream:ResourceWarning"),
]


async def test_thousands_of_streams_in_memory_leave_nothing_behind(tmp_path: Path) -> None:
    async with manager_over(MemoryStorage()) as streams:
        aftermath = await live_and_count(streams, tmp_path, number=STREAMS // ROUNDS, rounds=ROUNDS - 1, seed=SEED)

    assert (aftermath.left_over, aftermath.rows) == ({}, 0), f"seed {SEED}"


async def test_thousands_of_streams_in_sqlite_leave_nothing_behind_and_their_space_is_used_again(tmp_path: Path) -> None:
    database = tmp_path / "streams.db"
    async with manager_over(SQLiteStorage(database, synchronous="NORMAL")) as streams:
        aftermath = await live_and_count(streams, tmp_path, number=STREAMS // ROUNDS, rounds=ROUNDS - 1, seed=SEED)

    assert aftermath.left_over == {}, f"seed {SEED}"
    assert rows(database) == {"row of streams": 1, "row of records": 0}  # its session's, for an hour
    assert max(aftermath.file_bytes) < 2 * aftermath.file_bytes[0]


@pytest.mark.parametrize("make", [lambda _: MemoryStorage(), SQLiteStorage], ids=["memory", "sqlite"])
async def test_no_stream_leaves_bytes_behind(tmp_path: Path, make: Callable[[Path], Storage]) -> None:
    streams_a_round, rounds = 100, 6
    async with manager_over(make(tmp_path / "streams.db")) as streams:
        growth = await growth_by_round(rounds_of_streams(streams, streams_a_round, SEED), rounds=rounds)

    # What a table that has just grown takes in one round, it gives back in another: it is the sum that tells.
    assert sum(growth) < rounds * streams_a_round * BYTES_PER_STREAM, growth


async def test_a_hundred_managers_leave_no_thread_and_no_descriptor_behind(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'streams.db'}"
    rng = random.Random(SEED)

    async def enter_and_leave(number: int) -> None:
        async with StreamManager.connect(url) as streams:
            await come_and_go(streams, (f"stream-{number}-{n}" for n in range(2)), rng)

    await enter_and_leave(0)
    before = take_census()
    for number in range(1, 101):
        await enter_and_leave(number)

    assert left_over(before, take_census()) == {}


async def test_managers_that_cannot_be_entered_leave_nothing_behind(tmp_path: Path) -> None:
    not_ours = tmp_path / "not ours.db"
    not_ours.write_text("a text, and no database" * 1000)

    async def fail_to_enter() -> None:
        for database in (not_ours, tmp_path / "no directory" / "streams.db", tmp_path):
            with pytest.raises(StorageError):
                await StreamManager.connect(f"sqlite:///{database}").__aenter__()
        await checkpoint()  # in this turn of the loop, what woke this task still holds the error

    await fail_to_enter()
    before = take_census()
    for _ in range(50):
        await fail_to_enter()

    assert left_over(before, take_census()) == {}
