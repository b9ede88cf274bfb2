"""A service that produces without HTTP: `python -m tests.deploy.producer URL MORE STREAM...`.

It goes on with each stream where the log ends, as soon as nobody else writes it, and completes it after so many chunks more. It
prints the offsets that it was told are stored, and at SIGTERM lets go of what is not done.
"""

import asyncio
import signal
import sys
from datetime import timedelta
from typing import Final

import anyio

from streamkeep import StreamBusyError, StreamCompletedError, StreamInput, StreamManager

LEASE: Final = timedelta(hours=1)
"""So long that whoever waited for it to lapse would be found waiting."""


async def produce(streams: StreamManager, name: str, more: int) -> None:
    """Write the next numbers, then complete the stream with how many there are."""
    try:
        stream = await taken(streams, name)
    except StreamCompletedError:
        return
    async with stream:
        for number in range(stream.tail, stream.tail + more):
            print(name, await stream.write(number), flush=True)
            await anyio.sleep(0.01)
        await stream.done(stream.tail)


async def taken(streams: StreamManager, name: str) -> StreamInput:
    """Wait until the stream is free, and take it."""
    while True:
        try:
            return await streams.open(name, resume=True)
        except StreamBusyError:
            await anyio.sleep(0.05)


async def main(url: str, more: str, *names: str) -> None:
    """Produce until all is done, or until SIGTERM."""
    async with StreamManager.connect(url, lease=LEASE) as streams, anyio.create_task_group() as producing:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, producing.cancel_scope.cancel)
        print("up", flush=True)
        for name in names:
            producing.start_soon(produce, streams, name, int(more))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
