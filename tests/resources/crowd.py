"""A crowd that takes every descriptor of a server, and what is left of it while and after the crowd is there."""

import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from typing import Final

import anyio
from tests.http.servers import until
from tests.resources.clients import Client, get, post
from tests.resources.server import COUNT_TO, RunningServer

from streamkeep import StreamInput

SERVERS_LIMIT: Final = 64
"""How many descriptors a server may have that meets a crowd."""


async def meet_a_crowd(running: RunningServer, writer: StreamInput, faithful: Client) -> None:
    """Take all descriptors from a server that serves; show that it goes on meanwhile, and takes new clients afterwards."""
    async with Client.connected(running.port) as early, crowd(running):
        await early.begin(post("/count"))
        assert (await early.read_to_the_end()).endswith(b'data: {"result":%d,"offset":%d}\n\n' % (COUNT_TO, COUNT_TO))
        offset = await writer.write("while nobody can come")
        await faithful.read_until(b'event: chunk\ndata: "while nobody can come"\nid: %d\n\n' % offset)
    assert await answer_of(running, get("/live/info"))


@asynccontextmanager
async def crowd(running: RunningServer) -> AsyncGenerator[None]:
    """Have so many clients come that the server has no descriptor left; they cut when the block is left."""
    async with anyio.create_task_group() as clients:
        for _ in range(2 * SERVERS_LIMIT):
            clients.start_soon(follow_as_long_as_it_goes, running.port)
        await until(lambda: running.descriptors() >= SERVERS_LIMIT)
        yield
        clients.cancel_scope.cancel()


async def follow_as_long_as_it_goes(port: int) -> None:
    async with Client.connected(port) as client:
        try:
            with suppress(OSError, EOFError):
                await client.send(get("/live"))
                while await client.receive_at_most(1_000):
                    pass
            await anyio.sleep_forever()
        finally:
            await client.cut("RST")


async def answer_of(running: RunningServer, request: bytes) -> bytes:
    """Ask on new connections until one is accepted, a while at most."""
    with anyio.fail_after(30):
        while True:
            with suppress(OSError, EOFError):
                async with Client.connected(running.port) as client:
                    return await client.ask(request)
            await anyio.sleep(0.1)


async def cpu_share_while_full(running: RunningServer, seconds: float) -> float:
    """Say how much of a processor a server uses that has no descriptor left and nothing to do."""
    async with crowd(running):
        used, began = running.cpu_seconds(), time.monotonic()
        await anyio.sleep(seconds)
        return (running.cpu_seconds() - used) / (time.monotonic() - began)
