"""No descriptor left: what is open goes on, what cannot be opened is told clearly, and nothing is lost or leaked by it."""

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Final

import anyio
import pytest
from anyio.lowlevel import checkpoint
from tests.resources.census import left_over, take_census
from tests.resources.clients import Client, get, post
from tests.resources.crowd import SERVERS_LIMIT, meet_a_crowd
from tests.resources.limits import descriptors_left
from tests.resources.server import given_back, server

from streamkeep import StorageError, StreamEventType, StreamManager
from streamkeep.storages.sqlite import SQLiteStorage

MOST_NEEDED: Final = 24
"""With so many descriptors a manager over SQLite can do everything."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def whole(database: Path) -> bool:
    """Say whether SQLite finds nothing wrong with a database."""
    with closing(sqlite3.connect(database)) as db:
        return bool(db.execute("PRAGMA integrity_check").fetchone() == ("ok",))


async def use(streams: StreamManager, stream: str) -> list[int]:
    """Write a stream, and read it from another subscription meanwhile; give what was read."""
    async with streams.open(stream) as writer:
        await writer.write(0)
        async with streams.subscribe(stream) as events:
            await writer.write(1)
            await writer.done(2)
            return [event.output if event.type is StreamEventType.DONE else event.chunk async for event in events]


@pytest.mark.parametrize("left", range(MOST_NEEDED + 1))
async def test_a_manager_with_few_descriptors_left_works_or_says_why_and_leaks_nothing(tmp_path: Path, left: int) -> None:
    database = tmp_path / "streams.db"

    async def try_to_use(stream: str) -> bool:
        async with StreamManager.connect(f"sqlite:///{database}") as streams:
            return await use(streams, stream) == [0, 1, 2]

    assert await try_to_use("before")
    before = take_census()
    with descriptors_left(left):
        try:
            worked = await try_to_use("meanwhile")
        except StorageError:
            worked = False
    await checkpoint()  # in this turn of the loop, what woke this task still holds the error
    assert left_over(before, take_census()) == {}

    assert worked or left < MOST_NEEDED
    assert await try_to_use("after")
    assert left_over(before, take_census()) == {}
    assert whole(database)


@pytest.mark.parametrize("left", range(4))
async def test_a_manager_that_was_entered_in_time_stores_without_a_descriptor_left(tmp_path: Path, left: int) -> None:
    async with SQLiteStorage(tmp_path / "streams.db") as storage, StreamManager(storage) as streams:
        assert await use(streams, "before") == [
            0,
            1,
            2,
        ]  # its session has a connection of its own, and begins with the first writer
        with descriptors_left(left):
            writer = await streams.open("stream")
            await writer.write("stored")
            with anyio.CancelScope():
                try:
                    async with streams.subscribe("stream") as events:
                        assert (await anext(events)).chunk == "stored"
                except StorageError:
                    pass
        await writer.done()
        async with streams.subscribe("stream") as events:
            assert [event.offset async for event in events] == [0, 1]


# asyncio tries, and fails, to accept as many connections as the backlog is long, again and again: with uvicorn's 2048 it does
# little else (on Linux and Python 3.11). uvloop, which uvicorn takes where it is installed, does better.
@pytest.mark.parametrize(("loop", "backlog"), [("uvloop", 2048), ("asyncio", 16)])
async def test_a_server_without_a_descriptor_left_goes_on_with_what_it_has_and_recovers(
    tmp_path: Path, loop: str, backlog: int
) -> None:
    database = tmp_path / "streams.db"
    async with (
        server(database, loop=loop, backlog=backlog, descriptors=SERVERS_LIMIT) as running,
        StreamManager.connect(f"sqlite:///{database}") as streams,
        streams.open("live") as writer,
        Client.connected(running.port) as faithful,
    ):
        async with Client.connected(
            running.port
        ) as first:  # with whose flow the server's session begins, which has a connection of its own
            await first.begin(post("/count"))
            await first.read_to_the_end()
        await faithful.begin(get("/live"))
        await meet_a_crowd(running, writer, faithful)
        before = await running.report_in_motion()
        await meet_a_crowd(running, writer, faithful)
        assert left_over(before.holds, (await given_back(running, before)).holds) == {}
        await writer.done()
        assert (await faithful.read_to_the_end()).rpartition(b"event: ")[2].startswith(b"done\ndata: null\n")
    assert whole(database)
