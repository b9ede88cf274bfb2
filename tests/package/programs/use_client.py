"""Reads the stream that the first argument names from another server, awaited and blocking."""

import asyncio
import sys

from streamkeep import StreamEventType
from streamkeep.client import subscribe
from streamkeep.client.sync import subscribe as subscribe_blocking


async def read(url: str) -> list[object]:
    async with subscribe(url) as events:
        return [event.chunk async for event in events if event.type is StreamEventType.CHUNK]


with subscribe_blocking(sys.argv[1]) as events:
    chunks = [event.chunk for event in events if event.type is StreamEventType.CHUNK]
assert asyncio.run(read(sys.argv[1])) == chunks
assert chunks == ["Nothing is lost"]
