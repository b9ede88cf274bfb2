"""What clients of server-sent events survive, as `docs/how-to/browsers.md` has it in a table; of cuts see `test_cuts.py`."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

import httpx
import pytest
from tests.clients.conftest import Start
from tests.clients.programs import Event, Reading
from tests.clients.served import HELD, ROUTES, assert_whole, served
from tests.http.servers import STREAM_ID, server_process
from tests.network.proxy import End, Fate, bad_network
from tests.network.served import chunk_of

BY_POST: Final = ("fetch-event-source", "no package")
CLIENTS: Final = (*BY_POST, "EventSource", "event-source-polyfill", "eventsource")
QUESTION: Final = {"number": 1, "holds": True}

of_each_client = pytest.mark.parametrize("client", CLIENTS)


async def job_of(client: str, url: str) -> Mapping[str, object]:
    """Give what a client is to read; for those that read by GET the question has been asked."""
    if client in BY_POST:
        return {"url": f"{url}/ask", "key": "1", "body": QUESTION}
    async with (
        httpx.AsyncClient(base_url=url, verify=False) as http,
        http.stream("POST", "/ask", json=QUESTION, headers={"Idempotency-Key": "1"}) as answer,
    ):
        return {"url": f"{url}/ask/{answer.headers[STREAM_ID]}"}


async def held(readings: Sequence[Reading]) -> None:
    """Return when each has what comes before the answer is held."""
    for reading in readings:
        await reading.until(HELD)
        assert len(reading.events) == HELD
        assert not reading.stopped.is_set()


def assert_failed(events: Sequence[Event], status: str) -> None:
    """Assert that a client was given what was stored, each event once, and then why there is no more."""
    told: list[Any] = [(event["event"], json.loads(event["data"])) for event in events]
    assert told[:-1] == [("chunk", chunk_of(number)) for number in range(HELD)]
    assert (told[-1][0], told[-1][1]["status"]) == ("error", status)


@pytest.mark.cell("cut", "fetch-event-source", "EventSource", "eventsource", "event-source-polyfill")
@of_each_client
async def test_a_connection_that_is_cut_in_mid_answer_loses_and_repeats_nothing(start: Start, client: str) -> None:
    async with served() as server, start(client, server.url) as program, bad_network(server.url) as network:
        readings = await program.read(client, [await job_of(client, network.path())])
        await held(readings)
        network.meet(Fate(End.FIN, b"data: {"))
        server.may_go_on.set()
        assert_whole(ROUTES[0], await readings[0].end(), client)
    assert network.struck.total() == 1
    assert server.runs == {1: 1}


@pytest.mark.cell("reload", "fetch-event-source", "EventSource", "eventsource", "event-source-polyfill")
@of_each_client
async def test_who_begins_again_after_a_reload_has_all_from_the_start(start: Start, client: str) -> None:
    async with served() as server:
        job = await job_of(client, server.url)
        async with start(client, server.url) as program:
            await held(await program.read(client, [job]))
        async with start(client, server.url) as program:
            readings = await program.read(client, [job])
            await held(readings)
            server.may_go_on.set()
            assert_whole(ROUTES[0], await readings[0].end(), client)
    assert server.runs == {1: 1}


@pytest.mark.cell("second tab", "fetch-event-source", "EventSource", "eventsource", "event-source-polyfill")
@of_each_client
async def test_a_second_tab_has_all_of_it_too(start: Start, client: str) -> None:
    async with served() as server, start(client, server.url) as first, start(client, server.url) as second:
        job = await job_of(client, server.url)
        readings = await first.read(client, [job])
        await held(readings)
        readings += await second.read(client, [job])
        await held(readings)
        server.may_go_on.set()
        for reading in readings:
            assert_whole(ROUTES[0], await reading.end(), client)
    assert server.runs == {1: 1}


@pytest.mark.cell("Stop", "fetch-event-source", "EventSource", "eventsource", "event-source-polyfill")
@of_each_client
async def test_stop_ends_the_answer_and_the_client(start: Start, client: str) -> None:
    async with served() as server, start(client, server.url) as program:
        readings = await program.read(client, [await job_of(client, server.url)])
        await held(readings)
        stream = readings[0].events[0]["id"].partition("/")[0]
        async with httpx.AsyncClient(base_url=server.url, verify=False) as http:
            assert (await http.delete(f"/streams/{stream}")).json() == {"stopped": True}
        assert_failed(await readings[0].end(), "CANCELLED")
    assert server.runs == {1: 1}


@pytest.mark.cell("restart", "fetch-event-source", "EventSource", "eventsource", "event-source-polyfill")
@pytest.mark.cell("kill -9", "fetch-event-source", "EventSource", "eventsource", "event-source-polyfill")
@pytest.mark.slow
@of_each_client
@pytest.mark.parametrize("how", ["restart", "kill -9"])
async def test_a_server_that_comes_back_has_what_was_stored_and_says_why_there_is_no_more(
    start: Start, client: str, how: str, sqlite_url: str
) -> None:
    async with bad_network() as network, server_process("clients", sqlite_url) as server:
        network.url = server.url
        url = network.path()
        async with start(client, url) as program:
            readings = await program.read(client, [await job_of(client, url)])
            await held(readings)
            await server.end(how)
            async with server_process("clients", sqlite_url) as again:
                network.url = again.url
                assert_failed(await readings[0].end(), "ABORTED")
