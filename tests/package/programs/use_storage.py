"""A stream on the storage that the first argument names: written by one manager, read by another."""

import asyncio
import sys

from streamkeep import StreamManager


async def main(url: str) -> None:
    async with StreamManager.connect(url) as streams, streams.open("answer") as stream:
        await stream.write("Nothing is lost")
        await stream.done()
    async with StreamManager.connect(url) as streams, streams.subscribe("answer") as events:
        assert (await anext(events)).chunk == "Nothing is lost"


asyncio.run(main(sys.argv[1]))
