"""MCP's client as its package comes, against the app that `docs/how-to/mcp.md` shows; its table has what these tests say."""

import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Final

import anyio
import httpx2
import pytest
from mcp.client.client import Client
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.exceptions import MCPError
from tests.clients.shown import HELD, WORDS, Paced, mcp_app
from tests.http.servers import server_process, serving, until
from tests.network.proxy import FINE, End, Fate, Network, bad_network

from streamkeep import InMemoryStreamManager
from streamkeep.integrations.mcp import StreamEventStore

BEFORE: Final = 3
"""A client's connections before it calls: `initialize`, `notifications/initialized`, and what the server says by itself."""


class Call:
    """A tool that is called: what the client is told of its progress, and then its result."""

    def __init__(self) -> None:
        self.words: list[str | None] = []
        self.result = ""
        self.error: MCPError | None = None

    async def run(self, client: Client, number: int, *, holds: bool = False) -> None:
        question = json.dumps({"number": number, "holds": holds})
        try:
            result = await client.call_tool("answer", {"question": question}, progress_callback=self._told)
            self.result = (result.structured_content or {})["result"]
        except MCPError as error:
            self.error = error

    async def _told(self, _progress: float, _total: float | None, message: str | None) -> None:
        self.words.append(message)

    def assert_whole(self) -> None:
        assert self.error is None
        assert (self.words, self.result) == (list(WORDS), "".join(WORDS))


@asynccontextmanager
async def client_of(url: str) -> AsyncGenerator[Client]:
    """Give the client, each of whose requests has a connection of its own, so that it is known which one is cut."""
    limits = httpx2.Limits(max_keepalive_connections=0)
    async with httpx2.AsyncClient(limits=limits, timeout=30, verify=False) as http:
        transport = streamable_http_client(f"{url}/mcp", http_client=http)
        async with Client(transport, mode="legacy") as client:
            yield client


@asynccontextmanager
async def served() -> AsyncGenerator[tuple[str, Paced]]:
    paced = Paced()
    async with serving(mcp_app(StreamEventStore(InMemoryStreamManager()), paced)) as url:
        yield url, paced


async def call_over(network: Network, fate: Fate, number: int) -> Call:
    """Call over a network that a fate strikes once, in the answer to the call."""
    call, connected = Call(), network.connections
    async with client_of(network.path([*[FINE] * BEFORE, fate])) as client:
        await until(lambda: network.connections == connected + BEFORE)
        await call.run(client, number)
    return call


async def test_a_call_that_is_not_cut_is_answered() -> None:
    async with served() as (url, paced), bad_network(url) as network:
        (await call_over(network, FINE, 1)).assert_whole()
    assert paced.runs == {1: 1}
