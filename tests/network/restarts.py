"""Readers whose server is killed, stays away for a while, and comes back on the same storage, while the streams go on.

The writer is in this process, on the server's SQLite file: what is killed is the way to the streams, not the streams. To the
readers the server has one address, the network's.
"""

import random
from contextlib import AsyncExitStack
from typing import Final

import anyio
from playwright.async_api import Page
from tests.http.servers import ServerProcess, server_process, until
from tests.network.campaign import CLIENTS, PAUSE_SECONDS, Reading, Tally, random_fate, read_and_judge
from tests.network.proxy import FINE, Fate, Network, bad_network
from tests.network.readers import chromium_page
from tests.network.served import chunk_of, output_of

from streamkeep import StreamInput, StreamManager

APP: Final = "durable"
FLOW: Final = "/count"
READINGS_EACH: Final = 3
CUTS_EACH: Final = 2
CHUNKS_BETWEEN: Final = 20
"""How many chunks are written before each kill, while the server is away, and after the last start."""


async def read_through_restarts(seed: int, restarts: int, storage_url: str, chromium: str) -> Tally:
    """Have four clients read while their server is killed so many times."""
    async with StreamManager.connect(storage_url) as streams, AsyncExitStack() as processes, bad_network() as network:
        play = _Play(random.Random(seed), storage_url, streams, processes, network)
        await play.start_server()
        # A page may only read from where it came: its streams share a path, on which nothing happens while it loads.
        page_url = network.path([FINE, FINE, *play.fates(), *play.fates(), *play.fates()])
        async with chromium_page(chromium, f"{page_url}/openapi.json") as page:
            await play.play(restarts, page, page_url)
    return play.tally


class _Play:
    def __init__(
        self, choices: random.Random, storage_url: str, streams: StreamManager, processes: AsyncExitStack, network: Network
    ) -> None:
        self.tally = Tally()
        self._choices = choices
        self._storage_url = storage_url
        self._streams = streams
        self._processes = processes
        self._network = network
        self._server: ServerProcess | None = None

    def fates(self) -> list[Fate]:
        return [random_fate(self._choices, CHUNKS_BETWEEN) for _ in range(CUTS_EACH)]

    async def start_server(self) -> None:
        self._server = await self._processes.enter_async_context(server_process(APP, self._storage_url))
        self._network.url = self._server.url

    async def play(self, restarts: int, page: Page, page_url: str) -> None:
        chunks = CHUNKS_BETWEEN * (2 * restarts + 1)
        async with AsyncExitStack() as writing, anyio.create_task_group() as tasks:
            inputs: list[StreamInput] = []
            for client in CLIENTS:
                readings: list[Reading] = []
                for number in range(READINGS_EACH):
                    opening = self._streams.open(f"{client}-{number}", metadata={"route": FLOW, "owner": ""})
                    inputs.append(await writing.enter_async_context(opening))
                    url = page_url if client == "EventSource" else self._network.path(self.fates())
                    readings.append(Reading(url, chunks, (), inputs[-1].id, FLOW))
                tasks.start_soon(read_and_judge, self.tally, client, page, readings)
            await until(lambda: self._network.connections > len(inputs))
            await _write_more(inputs)
            for _ in range(restarts):
                await self._kill_server()
                await _write_more(inputs)
                await self.start_server()
                await _write_more(inputs)
            for stream in inputs:
                await stream.done(output_of(chunks))

    async def _kill_server(self) -> None:
        assert self._server is not None
        await self._server.kill()
        self._network.url = None


async def _write_more(inputs: list[StreamInput]) -> None:
    for _ in range(CHUNKS_BETWEEN):
        for stream in inputs:
            await stream.write(chunk_of(stream.tail))
        await anyio.sleep(PAUSE_SECONDS)
