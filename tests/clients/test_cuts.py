"""Clients of server-sent events as their packages come, over connections that are cut: each event once, the end, and one run.

The slow ones are cut at every byte of an answer of ours; of one that has passed through, at every byte about the ends of lines, which are
the seams of frames and of packets, at every third of the rest, and at every seventh of the rest of the head.
"""

import json
from collections.abc import Callable, Sequence
from typing import Final

import httpx
import pytest
from tests.clients.conftest import Start
from tests.clients.programs import Event
from tests.clients.served import ROUTES, Served, assert_whole, served
from tests.http.servers import STREAM_ID
from tests.network.cuts import exchange, seams_in
from tests.network.proxy import FINE, End, Fate, bad_network

AT_ONCE: Final = 400
"""So many listen at a time; most of them wait to come back, so that a browser, which keeps 256 connections, queues none for long."""
BY_GET: Final = ("EventSource", "event-source-polyfill", "eventsource")
LAST: Final = {ROUTES[0]: b"event: done", ROUTES[1]: b"[DONE]"}
END: Final = b"\r\n0\r\n\r"
"""All but the last byte of an answer, wherever that is in one that comes as it is made."""

Places = Callable[[bytes], Sequence[int]]


def few(answer: bytes) -> Sequence[int]:
    return sorted({*range(0, len(answer), 37), *sorted(seams_in(answer))[-12:]})


def many(answer: bytes) -> Sequence[int]:
    body = answer.index(b"\r\n\r\n")
    return sorted({*range(0, body, 7), *range(body, len(answer), 3), *seams_in(answer)})


def every(answer: bytes) -> Sequence[int]:
    return range(len(answer))


def cuts_at(places: Sequence[int]) -> list[Fate]:
    """Give a cut at each of these bytes, and some that may also destroy what came before."""
    return [Fate(End.FIN, place) for place in places] + [Fate(End.RST, place) for place in places[::10]]


def again(places: Places, number: int) -> list[Fate]:
    """Give another cut for when it comes back, to every second of few."""
    return [Fate(End.FIN, b"data: {")] if places is few and number % 2 else []


EACH_ROUTE: Final = pytest.mark.parametrize(
    ("route", "places"),
    [
        pytest.param(ROUTES[0], few, id="few"),
        pytest.param(ROUTES[0], every, id="every byte", marks=pytest.mark.slow),
        pytest.param(ROUTES[1], few, id="passed through, few", marks=pytest.mark.slow),
        pytest.param(ROUTES[1], many, id="passed through, many", marks=pytest.mark.slow),
    ],
)


async def read_over(
    start: Start, client: str, server: Served, fates: Sequence[Sequence[Fate]], path: str, *, key: str = ""
) -> list[list[Event]]:
    """Have a client read once over each fate, many at a time. All that can strike do."""
    found: list[list[Event]] = []
    async with start(client, server.url) as program:
        for first in range(0, len(fates), AT_ONCE):
            batch = fates[first : first + AT_ONCE]
            async with bad_network(server.url) as network:
                jobs = [
                    {"url": network.path(each) + path, "key": f"{key}{number}", "body": {"number": number}}
                    for number, each in enumerate(batch, first)
                ]
                found += [await reading.end() for reading in await program.read(client, jobs)]
            assert network.struck.total() >= len(batch)
    return found


@pytest.mark.cell("cut", "EventSource", "eventsource", "event-source-polyfill")
@EACH_ROUTE
@pytest.mark.parametrize("client", BY_GET)
async def test_who_follows_by_get_has_each_event_once(start: Start, client: str, route: str, places: Places) -> None:
    async with served() as server:
        async with httpx.AsyncClient(base_url=server.url, verify=False) as http:
            stream = (await http.post(route, json={})).headers[STREAM_ID]
        path = f"{route}/{stream}"
        origin = "" if client == "eventsource" else f"Origin: {server.url}\r\n"
        answer = await exchange(server.url, f"GET {path} HTTP/1.1\r\nHost: test\r\n{origin}\r\n".encode())
        cuts = [[cut, *again(places, number)] for number, cut in enumerate(cuts_at(places(answer)))]
        for number, events in enumerate(await read_over(start, client, server, cuts, path)):
            assert_whole(route, events, cuts[number])
    assert server.runs == {0: 1}


def request_of(route: str, number: int) -> bytes:
    body = json.dumps({"number": number})
    head = f"Host: test\r\nOrigin: null\r\nContent-Type: application/json\r\nIdempotency-Key: {number}\r\nContent-Length: {len(body)}"
    return f"POST {route} HTTP/1.1\r\n{head}\r\n\r\n{body}".encode()


async def answer_of(server: Served, route: str) -> bytes:
    """Give the answer to a POST as it is when the stream has ended, at its shortest: it all comes in one piece."""
    request = request_of(route, -1)
    await exchange(server.url, request)
    return await exchange(server.url, request)


@pytest.mark.cell("cut", "fetch-event-source")
@EACH_ROUTE
async def test_fetch_event_source_has_each_event_once(start: Start, route: str, places: Places) -> None:
    async with served() as server:
        landmarks = [Fate(End.FIN, LAST[route]), Fate(End.FIN, END)]
        cuts = [[cut, *again(places, number)] for number, cut in enumerate(cuts_at(places(await answer_of(server, route))))]
        # The first connection is the preflight's.
        fates = [[FINE, *cut] for cut in [*cuts, *([landmark] for landmark in landmarks)]]
        for number, events in enumerate(await read_over(start, "fetch-event-source", server, fates, route)):
            assert_whole(route, events, fates[number])
    assert set(server.runs.values()) == {1}
    assert len(server.runs) == len(fates) + 1


async def test_fetch_event_source_alone_loses_an_event_whose_last_byte_is_cut_off(start: Start) -> None:
    # A defect of theirs: an id counts from its own line on, the event from the empty line behind it. Our application therefore names what
    # it was given, in `fetch`. When this fails, they have mended it.
    async with served() as server:
        cuts = [
            [FINE, Fate(End.FIN, b"/1\n")]
        ] * 10  # a browser that is slow sees the cut before the line, and then loses nothing
        alone = await read_over(start, "fetch-event-source alone", server, cuts, ROUTES[0])
        named = await read_over(start, "fetch-event-source", server, cuts, ROUTES[0], key="named")
    assert ["0", "2", "3"] in [[event["id"].rpartition("/")[2] for event in events] for events in alone]
    for events in named:
        assert_whole(ROUTES[0], events, cuts[0])
