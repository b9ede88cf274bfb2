"""`WorkflowChatTransport` of `@ai-sdk/workflow` as its package comes: it comes back by itself, and has each answer whole and once."""

import json
import random
from datetime import timedelta
from typing import Final

import httpx
import pytest
from tests.clients.chats import HELD_ON, PART, WHOLE, Chats, answers, app_of, job_of, post, served
from tests.clients.programs import NODE, Reading, node
from tests.http.servers import server_process, serving, until
from tests.network.cuts import exchange
from tests.network.proxy import End, Fate, bad_network

from streamkeep import InMemoryStreamManager
from streamkeep.http import StreamsHTTP, Timeouts
from streamkeep.http.response import Receive, Scope, Send

SEED: Final = 20261128
CLIENT: Final = "WorkflowChatTransport"

pytestmark = pytest.mark.usefixtures("packages")


async def shown_at_the_end(reading: Reading) -> tuple[str, list[str]]:
    event = (await reading.end())[-1]
    return event["event"], answers(event)


async def lengths(url: str) -> tuple[int, int]:
    """Give how long the head of an answer is, and all of it."""
    body = json.dumps({"id": "measured", "messages": [{"parts": [{"type": "text", "text": "measured"}]}]})
    head = f"Host: test\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: {len(body)}"
    answer = await exchange(url, f"POST /api/chat HTTP/1.1\r\n{head}\r\n\r\n{body}".encode())
    return answer.index(b"\r\n\r\n") + 4, len(answer)


@pytest.mark.cell("cut", "WorkflowChatTransport")
async def test_sixty_answers_are_whole_and_once_under_random_cuts() -> None:
    chance = random.Random(SEED)
    async with served() as server, node(NODE, "workflow.js") as program, bad_network(server.url) as network:
        head, whole = await lengths(server.url)

        def cuts() -> list[Fate]:
            # One in a head is fatal to it, and so are three connections that break after the first.
            return [Fate(End.FIN, chance.randrange(head, whole - 200)) for _ in range(chance.randrange(1, 4))]

        jobs = [job_of(network.path(cuts()), chat=f"c-{number}", ask=f"{number}") for number in range(60)]
        for reading in await program.read(CLIENT, jobs):
            assert await shown_at_the_end(reading) == ("ready", [WHOLE]), SEED
        assert network.struck.total() > 60
    assert set(server.runs.values()) == {1}
    assert server.requests["GET"] < 3 * 60


@pytest.mark.cell("cut", "WorkflowChatTransport")
@pytest.mark.parametrize("places", [97, pytest.param(5, marks=pytest.mark.slow)], ids=["few", "many"])
async def test_wherever_an_answer_is_cut_it_is_whole_and_once(places: int) -> None:
    async with served() as server, node(NODE, "workflow.js") as program, bad_network(server.url) as network:
        head, whole = await lengths(server.url)
        cuts = range(head, whole - len("connection: close\r\n"), places)
        jobs = [job_of(network.path([Fate(End.FIN, cut)]), chat=f"c-{cut}", ask=f"{cut}") for cut in cuts]
        for reading in await program.read(CLIENT, jobs):
            assert await shown_at_the_end(reading) == ("ready", [WHOLE])
        assert network.struck.total() == len(cuts)


@pytest.mark.cell("Stop", "WorkflowChatTransport")
@pytest.mark.parametrize("how", ["stop", "fail"])
async def test_a_stream_that_was_stopped_or_has_failed_is_asked_for_no_more(how: str) -> None:
    async with served() as server, node(NODE, "workflow.js") as program, bad_network(server.url) as network:
        ask = HELD_ON if how == "stop" else "fail"
        (reading,) = await program.read(CLIENT, [job_of(network.path([Fate(End.FIN, b'"text-delta"')]), ask=ask)])
        if how == "stop":
            await until(lambda: server.requests["GET"])
            assert await post(server.url, "/api/chat/c/stop") == {"stopped": True}
        assert await shown_at_the_end(reading) == ("ready" if how == "stop" else "error", [PART])
    assert server.requests["GET"] == 1


@pytest.mark.cell("reload", "WorkflowChatTransport")
@pytest.mark.cell("second tab", "WorkflowChatTransport")
async def test_a_page_that_is_reloaded_follows_what_runs_and_shows_the_end_of_what_does_not() -> None:
    async with served() as server, node(NODE, "workflow.js") as program:
        (nothing,) = await program.read(CLIENT, [job_of(server.url)])
        assert await shown_at_the_end(nothing) == ("ready", [])
        (left,) = await program.read(CLIENT, [job_of(server.url, ask=HELD_ON)])
        await until(lambda: server.runs)
        readings = await program.read(CLIENT, [job_of(server.url), job_of(server.url, initialStartIndex=-2)])
        await until(lambda: server.requests["GET"] == 3)
        server.may_go_on.set()
        for reading in [left, *readings]:
            assert await shown_at_the_end(reading) == ("ready", [WHOLE])
        (over,) = await program.read(CLIENT, [job_of(server.url, initialStartIndex=-2)])
        assert await shown_at_the_end(over) == ("ready", [WHOLE])
    assert server.requests["GET"] == 4
    assert server.runs == {HELD_ON: 1}


async def test_answers_that_end_in_good_order_too_early_are_gone_on_with() -> None:
    # As a server ends them that cannot cut: such a one names no version of the HTTP spec. Who has begun by POST is told of an error.
    streams, chats = InMemoryStreamManager(), Chats()
    app = app_of(chats, StreamsHTTP(streams, timeouts=Timeouts(longest=timedelta(milliseconds=300))))

    async def cannot_cut(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "asgi": {}}, receive, send)

    async with serving(cannot_cut) as url, node(NODE, "workflow.js") as program:
        (begun,) = await program.read(CLIENT, [job_of(url, ask=HELD_ON)])
        assert await shown_at_the_end(begun) == ("error", [PART])
        (reading,) = await program.read(CLIENT, [job_of(url)])
        await until(lambda: chats.requests["GET"] == 4)
        chats.may_go_on.set()
        assert await shown_at_the_end(reading) == ("ready", [WHOLE])
    assert chats.runs == {HELD_ON: 1}


async def test_who_has_some_of_a_stream_that_is_gone_is_told() -> None:
    async with served() as server, httpx.AsyncClient(base_url=server.url) as http:
        answers = [await http.get(f"/api/chat/gone/stream?startIndex={index}") for index in ("3", "0", "-1", "x")]
    assert [answer.status_code for answer in answers] == [404, 200, 200, 400]
    assert answers[1].text == answers[2].text == 'data: {"type":"finish"}\n\ndata: [DONE]\n\n'


@pytest.mark.cell("restart", "WorkflowChatTransport")
@pytest.mark.cell("kill -9", "WorkflowChatTransport")
@pytest.mark.slow
@pytest.mark.parametrize("how", ["restart", "kill -9"])
async def test_a_server_that_comes_back_says_that_there_is_no_more(how: str, sqlite_url: str) -> None:
    async with (
        server_process("chats", sqlite_url) as server,
        server_process("chats", sqlite_url) as other,
        node(NODE, "workflow.js") as program,
        bad_network(server.url) as network,
    ):
        (reading,) = await program.read(CLIENT, [job_of(network.path(), ask=HELD_ON)])
        await reading.when(lambda event: answers(event) == [PART])
        network.url = other.url
        await server.end(how)
        assert await shown_at_the_end(reading) == ("error", [PART])
