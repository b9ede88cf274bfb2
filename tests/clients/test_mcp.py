"""MCP's client as its package comes, against the app that `docs/how-to/mcp.md` shows; its table has what these tests say."""

import json
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import anyio
import httpx2
import pytest
from mcp.client.client import Client
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.exceptions import MCPError
from tests.clients.shown import HELD, WORDS, Paced, mcp_app, run_all
from tests.http.servers import server_process, serving, until
from tests.network.proxy import FINE, End, Fate, bad_network

from streamkeep import InMemoryStreamManager, StreamManager, StreamPage
from streamkeep.integrations.mcp import StreamEventStore

BEFORE: Final = 4
"""A client's connections before it calls: `initialize`, `notifications/initialized`, what the server says by itself, `tools/list`."""

AT_ONCE: Final = 30
"""So many clients ask at once, for none may wait as long as its client waits for an answer."""

PRIMED: Final = b"\r\nretry: 500\r\n\r\n"
"""The end of an answer's first event, which says how long a client waits."""


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

    async def _told(self, progress: float, total: float | None, message: str | None) -> None:
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
            await client.list_tools()
            yield client


@asynccontextmanager
async def served() -> AsyncGenerator[tuple[str, Paced]]:
    paced = Paced()
    async with serving(mcp_app(StreamEventStore(InMemoryStreamManager()), paced)) as url:
        yield url, paced


@dataclass(eq=False, slots=True)
class Over:
    """A call over a network that strikes once."""

    fate: Fate
    call: Call = field(default_factory=Call)
    was_struck: bool = False

    async def run(self, url: str, number: int) -> None:
        async with bad_network(url) as network, client_of(network.path([*[FINE] * BEFORE, self.fate])) as client:
            await until(lambda: network.connections == BEFORE)
            await self.call.run(client, number)
            self.was_struck = network.struck.total() > 0


async def called_over(fates: Sequence[Fate]) -> list[Over]:
    """Call over each fate, many at once; the tool has run once for each call."""
    calls = [Over(fate) for fate in fates]
    await run_all(served(), calls, AT_ONCE)
    return calls


HEAD: Final = 400
"""Within so many bytes of an answer its head is over. Who is cut in there has a transport that has failed, by the SDK's design."""
FEW: Final = range(HEAD, 1300, 39)
MANY: Final = range(HEAD, 1300, 5)


@pytest.mark.cell("cut", "MCP's client in Python")
@pytest.mark.parametrize(
    "places", [FEW, pytest.param(MANY, marks=[pytest.mark.slow, pytest.mark.timeout(180)])], ids=["few", "many"]
)
async def test_a_call_that_is_cut_comes_back_and_has_each_message_once(places: Sequence[int]) -> None:
    # Not by a reset: that may take back what has come and was not read, up to the head.
    calls = await called_over([Fate(End.FIN, place) for place in places])
    for over in calls:
        over.call.assert_whole()
    assert sum(over.was_struck for over in calls) > len(places) / 2


@pytest.mark.cell("cut", "MCP's client in Python")
async def test_a_call_that_is_cut_at_a_landmark_comes_back_and_has_each_message_once() -> None:
    landmarks = (PRIMED, b'"progress":2', b"/2\r\n", b'"structuredContent"', b"/5\r\n")
    for over in await called_over([Fate(End.FIN, mark) for mark in landmarks]):
        assert over.was_struck
        over.call.assert_whole()


@pytest.mark.parametrize("failing", [1, 2])
async def test_who_comes_back_tries_twice(failing: int) -> None:
    call, cut = Call(), Fate(End.FIN, PRIMED)
    async with served() as (url, _), bad_network(url) as network:
        path = network.path([*[FINE] * BEFORE, cut, *[Fate(End.RST, 0)] * failing])
        async with client_of(path) as client:
            await until(lambda: network.connections == BEFORE)
            await call.run(client, 1)
    if failing == 1:
        call.assert_whole()
    else:
        assert call.error is not None
        assert "attempts" in call.error.message


async def listed(streams: StreamManager, are_so: Callable[[StreamPage], bool]) -> None:
    """Return when the streams are so."""
    with anyio.fail_after(20):
        while not are_so(await streams.list()):  # noqa: ASYNC110
            await anyio.sleep(0.01)


async def held(call: Call) -> None:
    """Return when a call that is held has what comes before that."""
    await until(lambda: len(call.words) == HELD)


@pytest.mark.cell("restart", "MCP's client in Python")
@pytest.mark.cell("kill -9", "MCP's client in Python")
@pytest.mark.parametrize("how", [pytest.param("restart", marks=pytest.mark.slow), "kill -9"])
async def test_what_was_stored_is_there_after_the_server_was_stopped_or_killed(how: str, sqlite_url: str) -> None:
    """The first process is cut off before it has shown what it has stored; the second one has that from the storage."""
    call = Call()
    async with (
        server_process("mcp", sqlite_url) as first,
        server_process("mcp", sqlite_url) as second,
        bad_network(first.url) as network,
    ):
        path = network.path([*[FINE] * BEFORE, Fate(End.FIN, PRIMED)])
        async with client_of(path) as client, anyio.create_task_group() as tasks:
            await until(lambda: network.connections == BEFORE)
            tasks.start_soon(partial(call.run, client, 1, holds=True))
            await until(lambda: network.struck.total() == 1)
            async with StreamManager.connect(sqlite_url) as streams:
                await listed(streams, lambda infos: HELD + 1 in [info.tail for info in infos])
            network.url = second.url
            await first.end(how)
    assert call.words == list(WORDS[:HELD])
    assert call.error is not None
    assert "ABORTED" in call.error.message


async def test_who_comes_back_to_another_process_is_given_what_comes_as_well() -> None:
    call, paced, streams = Call(), Paced(), InMemoryStreamManager()
    async with (
        streams,
        serving(mcp_app(StreamEventStore(streams), paced)) as url,
        serving(mcp_app(StreamEventStore(streams), Paced())) as other,
        bad_network(url) as network,
        client_of(network.path()) as client,
        anyio.create_task_group() as tasks,
    ):
        await until(lambda: network.connections == BEFORE)
        tasks.start_soon(partial(call.run, client, 1, holds=True))
        await held(call)
        network.url = other
        network.meet(Fate(End.FIN, b"d"))
        before = network.connections
        paced.may_go_on.set()
        await until(lambda: network.connections > before)
    call.assert_whole()
    assert paced.runs == {1: 1}


@pytest.mark.cell("Stop", "MCP's client in Python")
async def test_stop_ends_the_tool_and_its_stream_and_a_session_that_ends_leaves_none_open() -> None:
    call, paced, streams = Call(), Paced(), InMemoryStreamManager()
    async with streams, serving(mcp_app(StreamEventStore(streams), paced)) as url:
        async with client_of(url) as client, anyio.create_task_group() as tasks:
            tasks.start_soon(partial(call.run, client, 1, holds=True))
            await held(call)
            assert [info.status for info in await streams.list()].count("open") == 1
            tasks.cancel_scope.cancel()
        await listed(streams, lambda infos: all(info.status != "open" for info in infos))
        assert call.words == list(WORDS[:HELD])


async def test_the_client_alone_repeats_what_it_has_when_it_is_cut_a_second_time() -> None:
    # A defect of theirs: who is cut while it reads again goes on after the id with which it first came back.
    # When this fails, they have mended it.
    call, paced = Call(), Paced()
    async with serving(mcp_app(StreamEventStore(InMemoryStreamManager()), paced)) as url, bad_network(url) as network:
        again = Fate(End.FIN, b"/3\r\n")
        async with client_of(network.path([*[FINE] * BEFORE, Fate(End.FIN, PRIMED), again])) as client:
            await until(lambda: network.connections == BEFORE)
            await call.run(client, 1)
    assert call.words == [*WORDS[:2], *WORDS]
    assert call.result == "".join(WORDS)
