"""AG-UI's client and TanStack AI's as they come, against the app that `docs/how-to/ag-ui.md` shows; its table has what these tests say."""

import json
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, cast

import httpx
import pytest
from fastapi import FastAPI, Request, Response
from pydantic_ai.ui.ag_ui import AGUIAdapter
from tests.clients.conftest import Start
from tests.clients.programs import Event, Reading
from tests.clients.shown import HELD, WORDS, Paced, ag_ui_app, agent_of, pydantic_ai_app
from tests.http.servers import server_process, serving
from tests.network.cuts import exchange
from tests.network.proxy import End, Fate, bad_network

from streamkeep import InMemoryStreamManager
from streamkeep.http import DurableStreaming, StreamsHTTP
from streamkeep.http.response import ASGIApp

AG_UI: Final = "@ag-ui/client"
TANSTACK: Final = "@tanstack/ai-client"

of_each_client = pytest.mark.parametrize("client", [AG_UI, TANSTACK])


Make = Callable[[StreamsHTTP, Paced], ASGIApp]


@asynccontextmanager
async def served(make: Make = ag_ui_app) -> AsyncGenerator[tuple[str, Paced]]:
    paced = Paced()
    async with serving(make(StreamsHTTP(InMemoryStreamManager()), paced)) as url:
        yield url, paced


def durable_agent(streams_http: StreamsHTTP, paced: Paced) -> ASGIApp:
    """Give an endpoint as Pydantic AI's documentation has it, with one line of ours around it."""
    app, agent = FastAPI(), agent_of(paced)

    @app.post("/agent")
    async def ask(request: Request) -> Response:
        return await AGUIAdapter.dispatch_request(request, agent=agent)

    durable: Any = DurableStreaming(app, streams_http)
    return cast("ASGIApp", durable)


def question_of(number: int, *, holds: bool) -> str:
    return json.dumps({"number": number, "holds": holds})


def job_of(client: str, url: str, number: int = 1, *, holds: bool = True) -> dict[str, object]:
    """Give what it is to ask. AG-UI's names its run; TanStack AI's client makes a name itself."""
    job: dict[str, object] = {"url": url, "threadId": f"t{number}", "question": question_of(number, holds=holds)}
    return {**job, "runId": f"r{number}"} if client == AG_UI else job


async def held(reading: Reading) -> str:
    """Return when it has what comes before the answer is held; give the run, if it was told."""
    while texts_in(reading.events) != list(WORDS[:HELD]):
        await reading.until(len(reading.events) + 1)
    return next((event["data"] for event in reading.events if event["event"] == "run"), "r1")


def texts_in(events: Sequence[Event]) -> list[str]:
    return [event["data"] for event in events if event["event"] == "text"]


def ends_in(events: Sequence[Event]) -> list[tuple[str, str]]:
    return [(event["event"], event["data"]) for event in events if event["event"] in {"failed", "finished", "thrown"}]


def messages_in(events: Sequence[Event]) -> Any:
    assert events[-1]["event"] == "messages"
    return json.loads(events[-1]["data"])


def assert_whole(events: Sequence[Event], number: int = 1, *, holds: bool = True) -> None:
    """Assert that it shows the question and the answer, each once. An agent that was cut behind the end is told of that again."""
    assert set(ends_in(events)) == {("finished", "")}, events
    assert messages_in(events) == [["user", question_of(number, holds=holds)], ["assistant", "".join(WORDS)]]


def assert_failed(events: Sequence[Event], code: str) -> None:
    """Assert that it shows the part that there was, and has been told why there is no more."""
    assert ("failed", code) in ends_in(events), events
    assert "finished" not in {event["event"] for event in events}
    assert messages_in(events) == [["user", question_of(1, holds=True)], ["assistant", "".join(WORDS[:HELD])]]


async def answer_to(url: str) -> bytes:
    """Give the answer to a POST, whole, as it is when it comes in one piece."""
    message = {"id": "question", "role": "user", "content": question_of(0, holds=False)}
    body = json.dumps({"threadId": "t0", "runId": "r0", "messages": [message]})
    head = f"Host: test\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return await exchange(url, f"POST /agent HTTP/1.1\r\n{head}\r\n\r\n{body}".encode())


@pytest.mark.cell("cut", "AG-UI HttpAgent", "TanStack AI")
@of_each_client
@pytest.mark.parametrize("apart", [61, pytest.param(23, marks=pytest.mark.slow)])
async def test_a_run_that_is_cut_is_shown_once_and_has_run_once(start_node: Start, client: str, apart: int) -> None:
    async with served() as (url, paced), start_node(client, "") as program, bad_network(url) as network:
        answer = await answer_to(url)
        # TanStack AI's client comes back when it has an event's id. Its run has a longer one, and so a longer first event.
        first = 0 if client == AG_UI else answer.index(b"\n\n", answer.index(b"\r\n\r\n") + 4) + 64
        end = len(answer) if client == AG_UI else answer.index(b"RUN_FINISHED")
        places = range(first, end, apart)
        fates = [[Fate(End.FIN, place)] for place in places]
        fates += [[Fate(End.FIN, place), Fate(End.FIN, b"data: {")] for place in places[::5]]
        jobs = [job_of(client, network.path(fate), number, holds=False) for number, fate in enumerate(fates, 1)]
        for number, reading in enumerate(await program.read(client, jobs), 1):
            assert_whole(await reading.end(), number, holds=False)
        assert network.struck.total() >= len(fates)
    assert paced.runs == dict.fromkeys(range(len(fates) + 1), 1)


async def test_tanstack_ai_alone_takes_a_cut_behind_the_last_event_for_a_failure(start_node: Start) -> None:
    # It asks for what comes behind that, and minds that there is nothing. When this fails, they have mended it.
    async with served() as (url, _), start_node(TANSTACK, "") as program, bad_network(url) as network:
        path = network.path([Fate(End.FIN, b"\r\n0\r\n\r")])
        (reading,) = await program.read(TANSTACK, [job_of(TANSTACK, path, holds=False)])
        events = await reading.end()
    assert [name for name, _ in ends_in(events)] == ["finished", "thrown"]
    assert messages_in(events)[1] == ["assistant", "".join(WORDS)]


@pytest.mark.cell("cut", "AG-UI HttpAgent", "TanStack AI")
@pytest.mark.parametrize(
    ("client", "make"),
    [
        (AG_UI, ag_ui_app),
        (TANSTACK, ag_ui_app),
        (AG_UI, pydantic_ai_app),
        (TANSTACK, pydantic_ai_app),
        (AG_UI, durable_agent),
        (TANSTACK, durable_agent),
    ],
)
async def test_a_connection_that_is_cut_in_mid_run_loses_and_repeats_nothing(
    start_node: Start, client: str, make: Make
) -> None:
    async with served(make) as (url, paced), start_node(client, "") as program, bad_network(url) as network:
        job = {**job_of(client, network.path()), "isKeyed": make is durable_agent}
        (reading,) = await program.read(client, [job])
        await held(reading)
        network.meet(Fate(End.FIN, b"data: {"))
        paced.may_go_on.set()
        assert_whole(await reading.end())
        assert network.struck.total() == 1
    assert paced.runs == {1: 1}


@pytest.mark.cell("reload", "AG-UI HttpAgent", "TanStack AI")
@of_each_client
async def test_a_page_that_is_reloaded_has_the_run_once(start_node: Start, client: str) -> None:
    async with served() as (url, paced):
        async with start_node(client, "") as program:
            (reading,) = await program.read(client, [job_of(client, url)])
            run = await held(reading)
        async with start_node(client, "") as program:
            job = {**job_of(client, url), "runId": run}
            (reading,) = await program.read(client, [job])
            await held(reading)
            paced.may_go_on.set()
            assert_whole(await reading.end())
            (reading,) = await program.read(client, [job])  # what has ended is still there
            assert_whole(await reading.end())
    assert paced.runs == {1: 1}


@pytest.mark.cell("second tab", "AG-UI HttpAgent", "TanStack AI")
@of_each_client
async def test_a_second_tab_has_all_of_it_too(start_node: Start, client: str) -> None:
    async with served() as (url, paced), start_node(client, "") as first, start_node(client, "") as second:
        readings = await first.read(client, [job_of(client, url)])
        run = await held(readings[0])
        readings += await second.read(
            client, [{"url": url, "threadId": "t1"} if client == AG_UI else {**job_of(client, url), "runId": run}]
        )
        await held(readings[1])
        paced.may_go_on.set()
        for reading in readings:
            assert_whole(await reading.end())
    assert paced.runs == {1: 1}


async def test_an_agent_that_is_connected_to_a_thread_where_nothing_runs_is_shown_nothing(start_node: Start) -> None:
    async with served() as (url, _), start_node(AG_UI, "") as program:
        (reading,) = await program.read(AG_UI, [{"url": url, "threadId": "other"}])
        assert [(event["event"], event["data"]) for event in await reading.end()] == [("messages", "[]")]


async def test_an_agent_that_is_connected_when_a_run_has_ended_has_it_once(start_node: Start) -> None:
    async with served() as (url, paced), start_node(AG_UI, "") as program:
        (reading,) = await program.read(AG_UI, [job_of(AG_UI, url, holds=False)])
        await reading.end()
        (reading,) = await program.read(AG_UI, [{"url": url, "threadId": "t1"}])
        assert_whole(await reading.end(), holds=False)
    assert paced.runs == {1: 1}


@pytest.mark.cell("Stop", "AG-UI HttpAgent", "TanStack AI")
@of_each_client
async def test_stop_ends_the_run_and_keeps_what_there_was(start_node: Start, client: str) -> None:
    async with served() as (url, paced), start_node(client, "") as program, httpx.AsyncClient(base_url=url) as http:
        (reading,) = await program.read(client, [job_of(client, url)])
        await held(reading)
        assert (await http.post("/agent/stop/t1")).json() == {"stopped": True}
        assert_failed(await reading.end(), "CANCELLED")
    assert paced.runs == {1: 1}


@pytest.mark.cell("restart", "AG-UI HttpAgent", "TanStack AI")
@pytest.mark.cell("kill -9", "AG-UI HttpAgent", "TanStack AI")
@pytest.mark.slow
@of_each_client
@pytest.mark.parametrize("how", ["restart", "kill -9"])
async def test_a_server_that_comes_back_has_what_was_stored_and_says_why_there_is_no_more(
    start_node: Start, client: str, how: str, sqlite_url: str
) -> None:
    async with bad_network() as network, server_process("ag-ui", sqlite_url) as server:
        network.url = server.url
        async with start_node(client, "") as program:
            (reading,) = await program.read(client, [job_of(client, network.path())])
            await held(reading)
            network.url, network.waits = None, True  # how often clients try is not what this is about
            await server.end(how)
            async with server_process("ag-ui", sqlite_url) as again:
                network.url = again.url
                assert_failed(await reading.end(), "ABORTED")
