"""What is read over the bad network, and what readers are to have in the end.

Chunk number `n` of every stream is `chunk_of(n)`, so that whatever a reader has can be judged by itself.
"""

import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any, Final

import anyio
from anyio.abc import TaskStatus
from genkit import ActionRunContext
from starlette.middleware.cors import CORSMiddleware
from tests.http.servers import durable_app, serving, until
from tests.inside import feeds_of
from tests.network.proxy import Network, bad_network
from tests.network.readers import HANG, READ_SECONDS, Outcome

from streamkeep import InMemoryStreamManager, StreamManager
from streamkeep.http import StreamsHTTP
from streamkeep.http.response import ASGIApp, Timeouts

FLOW: Final = "/tell"
HEARTBEAT: Final = timedelta(milliseconds=20)
TEXTS: Final = ("plain", "naïve 世界", "\U0001f44b\U0001f3fd\u200d\U0001f9b0", "\u2028\x85\\ \"'", "\r\n\r\n\n\ndata: \x00", "")
PAUSE_EVERY: Final = 4
PAUSE_SECONDS: Final = 0.02


def chunk_of(number: int) -> dict[str, object]:
    """Give a chunk that tells its own offset, with text that is awkward to cut."""
    return {"n": number, "text": TEXTS[number % len(TEXTS)]}


def output_of(chunks: int) -> dict[str, object]:
    """Give the output of a stream of so many chunks."""
    return {"told": chunks, "text": TEXTS[2]}


async def tell(chunks: int, ctx: ActionRunContext) -> dict[str, object]:
    """Send so many chunks, as a flow; slowly enough that its readers come and go meanwhile."""
    for number in range(chunks):
        ctx.send_chunk(chunk_of(number))
        if number % PAUSE_EVERY == PAUSE_EVERY - 1:
            await anyio.sleep(PAUSE_SECONDS)
    return output_of(chunks)


async def write_stream(
    streams: StreamManager,
    stream: str,
    chunks: int,
    *,
    when: anyio.Event | None = None,
    pause_seconds: float = 0.0,
    task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED,
    **metadata: str,
) -> None:
    """Write a stream of so many chunks, from the moment `when` on. As a task, it has started when the stream is there."""
    async with streams.open(stream, metadata=metadata) as writer:
        task_status.started()
        if when is not None:
            with anyio.fail_after(READ_SECONDS):
                await when.wait()
        for number in range(chunks):
            await writer.write(chunk_of(number))
            if number % PAUSE_EVERY == PAUSE_EVERY - 1:
                await anyio.sleep(pause_seconds)
        await writer.done(output_of(chunks))


def app_of(streams: StreamManager) -> ASGIApp:
    """Give an app with the flow at /tell and all streams under /streams, for pages of any origin."""
    app: Any = durable_app(tell, streams=StreamsHTTP(streams, timeouts=Timeouts(heartbeat=HEARTBEAT)))
    return CORSMiddleware(app, allow_origins=["*"])


@asynccontextmanager
async def served() -> AsyncGenerator[tuple[StreamManager, str]]:
    """Serve it; at the end no reader has left anything behind in the server."""
    streams = InMemoryStreamManager()
    async with serving(app_of(streams)) as url:
        yield streams, url
        await until(lambda: not feeds_of(streams))


@asynccontextmanager
async def over_bad_network() -> AsyncGenerator[tuple[StreamManager, Network]]:
    """Serve it over a bad network."""
    async with served() as (streams, url), bad_network(url) as network:
        yield streams, network


def complaint_about(outcome: Outcome, chunks: int) -> str | None:
    """Say what is wrong with what a reader of a stream of so many chunks was given; None: nothing.

    Right is each chunk once, in order, and then the output; or a clear error after a beginning of them.
    """
    expected = [chunk_of(number) for number in range(chunks)]
    if outcome.error == HANG:
        return "it hung"
    if outcome.chunks != expected[: len(outcome.chunks)]:
        return f"not the stream's beginning: {json.dumps(outcome.chunks)}"
    if outcome.error is None and (len(outcome.chunks), outcome.output) != (chunks, output_of(chunks)):
        return f"{len(outcome.chunks)} of {chunks} chunks, then {outcome.output!r}, taken for the end"
    return None
