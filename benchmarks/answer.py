"""What is streamed: chunks as a model makes them. Nothing here knows of streamkeep, for the peers' servers use it too."""

import asyncio
import time
from collections.abc import AsyncGenerator

CHUNK = {"text": "It was the best of times, it was the worst of times, it was the age of wisdom", "index": 41, "role": "model"}
PER_SECOND = 50
LONGEST_SECONDS = 600


async def chunks(per_second: int = PER_SECOND, *, dated: bool = False) -> AsyncGenerator[object]:
    """Give chunks as a model does that does not wait for who takes them: one that comes late is followed by the next the sooner.

    `dated`: each says when it was given, by this machine's clock.
    """
    loop = asyncio.get_running_loop()
    due = loop.time()
    for _ in range(LONGEST_SECONDS * per_second):
        due += 1 / per_second
        await asyncio.sleep(max(0.0, due - loop.time()))
        yield {**CHUNK, "at": time.monotonic()} if dated else CHUNK
