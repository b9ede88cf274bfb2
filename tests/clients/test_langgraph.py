"""LangGraph's clients as their packages come, against the app that `docs/how-to/langgraph.md` shows; its table has what these tests say."""

import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import timedelta
from typing import Any, Final

import anyio
import httpx
import pytest
from langgraph_sdk import get_client
from langgraph_sdk.schema import RunCreateMetadata
from tests.clients.conftest import Start
from tests.clients.programs import Event, Program, Reading, python
from tests.clients.shown import HELD, WORDS, Paced, langgraph_app
from tests.http.servers import server_process, serving
from tests.network.cuts import exchange
from tests.network.proxy import End, Fate, bad_network

from streamkeep import InMemoryStreamManager
from streamkeep.http import StreamsHTTP, Timeouts
from streamkeep.http.response import Receive, Scope, Send

JAVASCRIPT: Final = "@langchain/langgraph-sdk"
PYTHON: Final = "langgraph-sdk"
THREAD: Final = "thread-0001"

of_each_client = pytest.mark.parametrize("client", [JAVASCRIPT, PYTHON])


async def read(reading: Reading, job: Mapping[str, Any]) -> None:
    """Do what an application writes around the client for Python; the other one is in `node/langgraph.js`."""

    def created(run: RunCreateMetadata) -> None:
        reading.take({"event": "created", "data": run["run_id"], "id": ""})

    thread = job["thread"]
    async with get_client(url=job["url"], api_key=None) as client:
        try:
            if job.get("stops"):
                await client.runs.cancel(thread, job["run"])
            else:
                parts = (
                    client.runs.join_stream(thread, job["run"], last_event_id="-1")
                    if "run" in job
                    else client.runs.stream(thread, "answer", input=job["input"], on_run_created=created)
                )
                async for part in parts:
                    reading.take({"event": part.event, "data": json.dumps(part.data), "id": part.id or ""})
        except Exception as error:
            reading.take({"event": "thrown", "data": json.dumps(repr(error)), "id": ""})


def program_of(start_node: Start, client: str) -> AbstractAsyncContextManager[Program]:
    return start_node(client, "") if client == JAVASCRIPT else python(read)


@asynccontextmanager
async def served() -> AsyncGenerator[tuple[str, Paced]]:
    paced = Paced()
    async with serving(langgraph_app(StreamsHTTP(InMemoryStreamManager()), paced)) as url:
        yield url, paced


def told(events: Sequence[Event]) -> list[tuple[str, Any]]:
    """Give names and data, but not which run it was."""
    return [(event["event"], json.loads(event["data"])) for event in events if event["event"] != "created"]


def words(number: int = len(WORDS)) -> list[tuple[str, Any]]:
    return [("values", {"word": word}) for word in WORDS[:number]]


WHOLE: Final = [*words(), ("end", None)]


def job_of(url: str, number: int = 1, *, holds: bool = True) -> dict[str, object]:
    return {"url": url, "thread": f"thread-{number:04}", "input": {"number": number, "holds": holds}}


async def held(reading: Reading, *, created: int = 1) -> str:
    """Return when it has what comes before the answer is held; give the run, if it was told."""
    await reading.until(HELD + created)
    assert told(reading.events) == words(HELD)
    return reading.events[0]["data"]


async def answer_to(url: str) -> bytes:
    """Give the answer to a POST, whole, as it is when it comes in one piece."""
    body = json.dumps({"input": {"number": 0}})
    head = f"Host: test\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return await exchange(url, f"POST /threads/thread-0000/runs/stream HTTP/1.1\r\n{head}\r\n\r\n{body}".encode())


@pytest.mark.cell("cut", "langgraph-sdk in JavaScript", "langgraph-sdk in Python")
@of_each_client
@pytest.mark.filterwarnings("ignore:Reconnecting without a Last-Event-ID")  # it has none yet, and then has all from the start
@pytest.mark.parametrize("apart", [67, pytest.param(3, marks=pytest.mark.slow)])
async def test_a_run_that_is_cut_comes_back_and_has_each_event_once(start_node: Start, client: str, apart: int) -> None:
    async with served() as (url, paced), program_of(start_node, client) as program, bad_network(url) as network:
        answer = await answer_to(url)
        head = answer.index(b"\r\n\r\n") + 4
        places = [*range(head, len(answer), apart), len(answer) - 1]
        fates = [[Fate(End.FIN, place)] for place in places]
        fates += [[Fate(End.FIN, place), Fate(End.FIN, b"data: {")] for place in places[::5]]
        jobs = [job_of(network.path(fate), number, holds=False) for number, fate in enumerate(fates, 1)]
        for fate, reading in zip(fates, await program.read(client, jobs), strict=True):
            assert told(await reading.end()) == WHOLE, fate
        assert network.struck.total() >= len(fates)
    assert paced.runs == dict.fromkeys(range(len(fates) + 1), 1)


@pytest.mark.cell("cut", "langgraph-sdk in JavaScript", "langgraph-sdk in Python")
@of_each_client
async def test_a_connection_that_is_cut_in_mid_run_loses_and_repeats_nothing(start_node: Start, client: str) -> None:
    async with served() as (url, paced), program_of(start_node, client) as program, bad_network(url) as network:
        (reading,) = await program.read(client, [job_of(network.path())])
        await held(reading)
        network.meet(Fate(End.FIN, b"data: {"))
        paced.may_go_on.set()
        assert told(await reading.end()) == WHOLE
        assert network.struck.total() == 1
    assert paced.runs == {1: 1}


@of_each_client
async def test_a_join_that_is_cut_loses_and_repeats_nothing_either(start_node: Start, client: str) -> None:
    async with served() as (url, paced), program_of(start_node, client) as program, bad_network(url) as network:
        (reading,) = await program.read(client, [job_of(url)])
        run = await held(reading)
        (joined,) = await program.read(client, [{"url": network.path(), "thread": THREAD, "run": run}])
        await held(joined, created=0)
        network.meet(Fate(End.FIN, b"data: {"))
        paced.may_go_on.set()
        for each in (reading, joined):
            assert told(await each.end()) == WHOLE
        assert network.struck.total() == 1
    assert paced.runs == {1: 1}


@of_each_client
async def test_an_answer_that_ends_in_good_order_too_early_is_gone_on_with(start_node: Start, client: str) -> None:
    # As a proxy may end it, or a server that cannot cut: such a one names no version of the HTTP spec.
    paced, asked = Paced(), anyio.Event()
    app = langgraph_app(StreamsHTTP(InMemoryStreamManager(), timeouts=Timeouts(longest=timedelta(milliseconds=200))), paced)

    async def cannot_cut(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "GET" and not scope["path"].endswith("/stream"):
            asked.set()
        await app({**scope, "asgi": {}}, receive, send)

    async with serving(cannot_cut) as url, program_of(start_node, client) as program:
        (reading,) = await program.read(client, [job_of(url)])
        await held(reading)
        await asked.wait()
        paced.may_go_on.set()
        assert told(await reading.end()) == WHOLE
    assert paced.runs == {1: 1}


@pytest.mark.cell("reload", "langgraph-sdk in JavaScript", "langgraph-sdk in Python")
@pytest.mark.cell("second tab", "langgraph-sdk in JavaScript", "langgraph-sdk in Python")
@of_each_client
async def test_who_joins_has_all_from_the_start(start_node: Start, client: str) -> None:
    async with served() as (url, paced), program_of(start_node, client) as second:
        async with program_of(start_node, client) as first:
            (reading,) = await first.read(client, [job_of(url)])
            run = await held(reading)
            (joined,) = await second.read(client, [{"url": url, "thread": THREAD, "run": run}])
            await held(joined, created=0)
        # The first has gone.
        paced.may_go_on.set()
        assert told(await joined.end()) == WHOLE
        (late, unknown) = await second.read(client, [{"url": url, "thread": THREAD, "run": each} for each in (run, "other")])
        assert told(await late.end()) == WHOLE
        assert [event["event"] for event in await unknown.end()] == ["thrown"]
    assert paced.runs == {1: 1}


@pytest.mark.cell("Stop", "langgraph-sdk in JavaScript", "langgraph-sdk in Python")
@of_each_client
async def test_stop_ends_the_run_and_all_its_readers(start_node: Start, client: str) -> None:
    async with served() as (url, paced), program_of(start_node, client) as program:
        (reading,) = await program.read(client, [job_of(url)])
        run = await held(reading)
        (joined, stopped) = await program.read(
            client, [{"url": url, "thread": THREAD, "run": run}, {"url": url, "thread": THREAD, "run": run, "stops": True}]
        )
        assert await stopped.end() == []
        for each in (reading, joined):
            assert_failed(await each.end(), "CANCELLED")
    assert paced.runs == {1: 1}


def assert_failed(events: Sequence[Event], status: str) -> None:
    *before, (name, data) = told(events)
    assert before == words(HELD)
    assert (name, data["error"]) == ("error", status)


@pytest.mark.cell("restart", "langgraph-sdk in JavaScript", "langgraph-sdk in Python")
@pytest.mark.cell("kill -9", "langgraph-sdk in JavaScript", "langgraph-sdk in Python")
@pytest.mark.slow
@of_each_client
@pytest.mark.parametrize("how", ["restart", "kill -9"])
async def test_a_server_that_comes_back_has_what_was_stored_and_says_why_there_is_no_more(
    start_node: Start, client: str, how: str, sqlite_url: str
) -> None:
    async with bad_network() as network, server_process("langgraph", sqlite_url) as server:
        network.url = server.url
        async with program_of(start_node, client) as program:
            (reading,) = await program.read(client, [job_of(network.path())])
            await held(reading)
            await server.end(how)
            async with server_process("langgraph", sqlite_url) as again:
                network.url = again.url
                assert_failed(await reading.end(), "ABORTED")


async def test_the_state_of_a_run_is_what_its_clients_ask_for() -> None:
    async with served() as (url, paced), httpx.AsyncClient(base_url=url) as http:
        async with http.stream("POST", f"/threads/{THREAD}/runs/stream", json=job_of(url)) as answer:
            run = answer.headers["content-location"]
            running = (await http.get(run)).json()["status"]
            paced.may_go_on.set()
            await answer.aread()
        ended = (await http.get(run)).json()["status"]
        again = await http.post(f"/threads/{THREAD}/runs/stream", json=job_of(url))
    assert answer.headers["location"] == f"{run}/stream"
    assert (running, ended, again.status_code) == ("running", "success", 200)
