"""Streams that are larger than anybody should hold in memory, and what it costs to be their reader."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from tests.resources.census import traced_memory

from streamkeep import StreamInput, StreamManager
from streamkeep.storages.sqlite import SQLiteStorage

CHUNK: Final = "x" * 65_535


@asynccontextmanager
async def over_sqlite(directory: Path) -> AsyncGenerator[StreamManager]:
    """Give a manager that leaves it to the disk when it writes: what is counted here is memory."""
    async with SQLiteStorage(directory / "streams.db", synchronous="NORMAL") as storage, StreamManager(storage) as streams:
        yield streams


async def write_much(writer: StreamInput, chunks: int) -> None:
    """Write so many chunks of 64 KiB, and the end."""
    for _ in range(chunks):
        await writer.write(CHUNK)
    await writer.done()


async def read_all(streams: StreamManager, stream: str) -> int:
    """Read a stream, keep nothing, and give how many bytes of JSON it has."""
    size = 0
    async with streams.subscribe(stream) as events:
        while batch := await events.batch():
            size += sum(len(event.data) for event in batch)
    return size


async def peak_of_not_reading(directory: Path, chunks: int) -> int:
    """Let so many chunks go by a subscriber that reads none; give how many bytes of memory that took at most."""
    async with over_sqlite(directory) as streams:
        writer = await streams.open("much")
        await writer.write(CHUNK)
        with traced_memory() as memory:
            async with streams.subscribe("much"):
                await write_much(writer, chunks)
            return memory.peak()


async def peak_of_reading(directory: Path, chunks: int) -> int:
    """Read so many chunks from the start; give how many bytes of memory that took at most. AssertionError: some are missing."""
    async with over_sqlite(directory) as streams:
        await write_much(await streams.open("much"), chunks)
        with traced_memory() as memory:
            size = await read_all(streams, "much")
            peak = memory.peak()
    assert size == chunks * len(f'"{CHUNK}"') + len("null")
    return peak
