"""A disk of a few megabytes, filled to the brim while streamkeep uses it: a real one, and the real storage.

Run as `python -m tests.powerloss.small_disk SCENARIO DIRECTORY` in a mount namespace of its own, in which it mounts a small disk at the
directory; the disk is gone when the process is. A scenario that fails ends in a traceback.
"""

import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from typing import Final

import anyio
import pytest

from streamkeep import StorageError, StorageFullError, StreamEventType, StreamInput, StreamManager
from streamkeep._lifecycle import AFTER_RESERVED
from streamkeep.storages.sqlite import SQLiteStorage

BOUND_SECONDS: Final = 50
MEGABYTE: Final = 1 << 20
MANY: Final = 100_000
PADDING: Final = "x" * 500
FULL: Final = "no space left.*make space"


class SmallDisk:
    """A disk that can be filled, and a database on it."""

    def __init__(self, directory: Path, megabytes: int) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", directory], check=True)
        self.database = directory / "streams.db"
        self._directory = directory
        self._ballast = directory / "ballast"

    def fill(self) -> None:
        """Leave no byte."""
        space = os.statvfs(self._directory)
        with self._ballast.open("ab") as ballast:
            ballast.write(bytes(space.f_bavail * space.f_frsize))

    def make_space(self) -> None:
        """Undo that."""
        self._ballast.unlink()

    def storage(self) -> SQLiteStorage:
        """Give a storage over the database."""
        return SQLiteStorage(self.database)


Scenario = Callable[[SmallDisk], Awaitable[None]]


async def a_writer_goes_on_when_there_is_space(disk: SmallDisk) -> None:
    """Readers go on all the while, and everybody gets every event once."""
    async with disk.storage() as storage, StreamManager(storage) as streams, anyio.create_task_group() as readers:
        seen: list[object] = []
        stream = await streams.open("answer")
        readers.start_soon(_follow, streams, seen)
        stored = await _write_until_full(disk, stream)
        assert await _tail(streams, "answer") == stored
        await _must_be_full(stream.flush())
        disk.make_space()
        await stream.flush()
        await stream.write(["after"])
        await stream.done()
    assert seen == [*range(stored + 1), "after", "done"]


async def a_log_that_finds_no_space_in_the_database_loses_nothing(disk: SmallDisk) -> None:
    """The log has its full length already, so that it is the checkpoint that fails first, which nobody is told of."""
    async with disk.storage() as storage, StreamManager(storage) as streams, anyio.create_task_group() as readers:
        async with streams.open("earlier") as earlier:
            for _ in range(6):
                await earlier.write("x" * MEGABYTE)
            await earlier.done()
        seen: list[object] = []
        stream = await streams.open("answer")
        readers.start_soon(_follow, streams, seen)
        stored = await _write_until_full(disk, stream)
        assert stored > 100, "the log had no room, so no checkpoint has failed"
        disk.make_space()
        await stream.done()
    assert seen == [*range(stored + 1), "done"]


async def sweeping_and_deleting_wait_for_space(disk: SmallDisk) -> None:
    """SQLite needs space to delete; what could not be deleted is whole, and is deleted when there is space."""
    async with disk.storage() as storage, StreamManager(storage, ttl=timedelta(seconds=1)) as streams:
        await _complete(streams, "first")
        await _complete(streams, "second")
        await _write_until_full(disk, await streams.open("answer"))
        await _must_be_full(streams.delete("first"))
        assert await _tail(streams, "first") == 1
        while (await streams.list(limit=1))[0].id != "answer":  # noqa: ASYNC110 - what expires tells nobody
            await anyio.sleep(0.1)
        await _must_be_full(streams.sweep())
        disk.make_space()
        await streams.sweep()
        assert [stream for stream, _ in await storage.scan(AFTER_RESERVED)] == ["answer"]


async def closing_and_opening_again_loses_nothing(disk: SmallDisk) -> None:
    """The log stays where it is, if the database has no room for it. Who opens it then can read; who writes is told."""
    async with disk.storage() as storage, StreamManager(storage) as streams:
        async with streams.open("long") as long:
            await long.done("x" * 300_000)
        stored = await _write_until_full(disk, await streams.open("answer"))
    async with disk.storage() as storage, StreamManager(storage) as streams:
        assert await _tail(streams, "answer") == stored
        await _must_be_full(_complete(streams, "another"))
    disk.make_space()
    async with disk.storage() as storage, StreamManager(storage) as streams:
        assert await _tail(streams, "answer") == stored
        await _complete(streams, "another")


async def a_database_that_was_closed_is_opened_when_there_is_space(disk: SmallDisk) -> None:
    """Its log and its shared memory have to be made first, which is said."""
    async with disk.storage() as storage, StreamManager(storage) as streams:
        await _complete(streams, "answer")
    disk.fill()
    with pytest.raises(StorageError, match=FULL):
        await disk.storage().__aenter__()
    disk.make_space()
    async with disk.storage() as storage, StreamManager(storage) as streams:
        assert await _tail(streams, "answer") == 1


async def a_new_database_is_made_when_there_is_space(disk: SmallDisk) -> None:
    """The one that could not be made is no hindrance."""
    disk.fill()
    await _must_be_full(disk.storage().__aenter__())
    disk.make_space()
    async with disk.storage() as storage, StreamManager(storage) as streams:
        await _complete(streams, "answer")


SCENARIOS: Final[dict[str, tuple[Scenario, int]]] = {
    scenario.__name__: (scenario, size)
    for scenario, size in [
        (a_writer_goes_on_when_there_is_space, 1),
        (a_log_that_finds_no_space_in_the_database_loses_nothing, 24),
        (sweeping_and_deleting_wait_for_space, 1),
        (closing_and_opening_again_loses_nothing, 1),
        (a_database_that_was_closed_is_opened_when_there_is_space, 1),
        (a_new_database_is_made_when_there_is_space, 1),
    ]
}


async def _follow(streams: StreamManager, seen: list[object]) -> None:
    async with streams.subscribe("answer") as events:
        seen.extend([event.chunk[0] if event.type is StreamEventType.CHUNK else "done" async for event in events])


async def _write_until_full(disk: SmallDisk, stream: StreamInput) -> int:
    """Write numbers on a full disk until one cannot be stored, and give it."""
    await stream.write([0, PADDING])
    disk.fill()
    with pytest.raises(StorageFullError, match=FULL):
        for number in range(1, MANY):
            await stream.write([number, PADDING])
    return stream.tail


async def _must_be_full(call: Awaitable[object]) -> None:
    with pytest.raises(StorageFullError, match=FULL):
        await call


async def _complete(streams: StreamManager, stream: str) -> None:
    async with streams.open(stream) as stream_input:
        await stream_input.done()


async def _tail(streams: StreamManager, stream: str) -> int:
    return (await streams.info(stream)).tail


async def _run(scenario: Scenario, disk: SmallDisk) -> None:
    with anyio.fail_after(BOUND_SECONDS):
        await scenario(disk)


if __name__ == "__main__":
    chosen, megabytes = SCENARIOS[sys.argv[1]]
    anyio.run(_run, chosen, SmallDisk(Path(sys.argv[2]), megabytes))
