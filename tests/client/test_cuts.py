"""Connections that are cut: wherever that is, and however often, each event comes once and none is missing."""

import random
from collections.abc import Awaitable, Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from typing import Final

import anyio
import pytest
from tests.client.forms import SILENCE, Form, Had
from tests.http.servers import server_process
from tests.network.cuts import cuts_of
from tests.network.proxy import End, Fate, bad_network
from tests.network.served import FLOW, chunk_of, output_of, served, write_stream

from streamkeep import StreamManager
from streamkeep.client import Retry

SHORT: Final = 2
AT_ONCE: Final = 60
GET: Final = b"GET /streams/told HTTP/1.1\r\nHost: test\r\n\r\n"
RESUME: Final = (
    b"POST /tell HTTP/1.1\r\nHost: test\r\nAccept: text/event-stream\r\nContent-Type: application/json\r\n"
    b"X-Genkit-Stream-Id: told\r\nContent-Length: 2\r\n\r\n{}"
)


def assert_whole(had: Had, chunks: int) -> None:
    """Assert that it is each chunk once, and the output."""
    assert had.error is None
    assert [event.offset for event in had.events] == list(range(chunks + 1))
    assert [event.chunk for event in had.events[:-1]] == [chunk_of(number) for number in range(chunks)]
    assert had.events[-1].output == output_of(chunks)


def fates(cuts: int, seed: int, bytes_at_most: int) -> Iterator[Fate]:
    """Give so many connections that are lost, each at some byte, by FIN or RST; a few just fall silent."""
    chance = random.Random(seed)
    for _ in range(cuts):
        end = chance.choices(list(End), [49, 49, 2])[0]
        yield Fate(end, chance.randrange(bytes_at_most), piece=chance.choice((0, 0, 7)))


# At each byte


@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.timeout(300)
async def test_a_short_answer_may_be_cut_at_each_byte(form: Form, step: int) -> None:
    async with served() as (streams, url):
        await write_stream(streams, "told", SHORT, route=FLOW, owner="")
        places = await cuts_of(url, GET, step=step)
        for batch in batches(places):
            async with bad_network(url) as network:
                for had in await all_of(
                    [partial(form.read, "subscribe", network.path([fate]) + "/streams/told") for fate in batch]
                ):
                    assert_whole(had, SHORT)
                assert network.struck.total() == len(batch)


@pytest.mark.parametrize("step", [9, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.timeout(300)
async def test_a_flow_that_is_gone_on_with_may_be_cut_at_each_byte(form: Form, step: int) -> None:
    async with served() as (streams, url):
        await write_stream(streams, "told", SHORT, route=FLOW, owner="")
        places = await cuts_of(url, RESUME, step=step)
        for batch in batches(places):
            async with bad_network(url) as network:
                reads = [partial(form.read, "stream_flow", network.path([fate]) + FLOW, stream_id="told") for fate in batch]
                for had in await all_of(reads):
                    assert had.events == [chunk_of(number) for number in range(SHORT)]
                    assert (had.output, had.error) == (output_of(SHORT), None)


def batches(places: Sequence[Fate]) -> list[Sequence[Fate]]:
    return [places[first : first + AT_ONCE] for first in range(0, len(places), AT_ONCE)]


async def all_of(reads: Sequence[Callable[[], Awaitable[Had]]]) -> list[Had]:
    had: dict[int, Had] = {}

    async def read(number: int, read: Callable[[], Awaitable[Had]]) -> None:
        had[number] = await read()

    async with anyio.create_task_group() as tasks:
        for number, one in enumerate(reads):
            tasks.start_soon(read, number, one)
    return [had[number] for number in range(len(reads))]


# Often


@pytest.mark.parametrize("cuts", [60, pytest.param(500, marks=pytest.mark.slow)])
@pytest.mark.timeout(300)
async def test_a_stream_that_is_written_meanwhile_is_whole_after_any_number_of_cuts(
    form: Form, cuts: int, sqlite_url: str
) -> None:
    chunks, sqlite_url = cuts * 4, sqlite_url + "?synchronous=NORMAL"  # which takes a fraction of the time
    async with server_process("durable", sqlite_url) as server, bad_network(server.url) as network:
        async with StreamManager.connect(sqlite_url) as streams, anyio.create_task_group() as tasks:
            await tasks.start(partial(write_stream, streams, "s", chunks, pause_seconds=0.001))
            url = network.path(fates(cuts * 11 // 10, cuts, 900)) + "/streams/s"
            had = await form.read("subscribe", url, read_timeout=SILENCE, seconds=250)
        assert_whole(had, chunks)
        assert network.struck.total() >= cuts  # the answer may end before the last ones


@pytest.mark.parametrize("cuts", [60, pytest.param(500, marks=pytest.mark.slow)])
@pytest.mark.timeout(300)
async def test_a_flow_is_whole_and_has_run_once_after_any_number_of_cuts(form: Form, cuts: int, sqlite_url: str) -> None:
    chunks = cuts * 10
    async with server_process("durable", sqlite_url) as server, bad_network(server.url) as network:
        had = await form.read(
            "stream_flow",
            network.path(fates(cuts * 11 // 10, cuts, 900)) + "/count",
            chunks,
            headers={"Idempotency-Key": "once"},
            read_timeout=SILENCE,
            seconds=250,
        )
        assert (had.events, had.output, had.error) == (list(range(chunks)), {"counted": chunks}, None)
        assert network.struck.total() >= cuts  # the answer may end before the last ones
    async with StreamManager.connect(sqlite_url) as streams:
        assert [info.id for info in await streams.list()] == [had.stream]


@pytest.mark.parametrize("cuts", [40])
async def test_a_last_few_that_do_not_follow_are_whole_over_cuts(form: Form, cuts: int) -> None:
    async with served() as (streams, url), bad_network(url) as network:
        await write_stream(streams, "told", 200)
        path = network.path(fates(cuts, 3, 700)) + "/streams/told"
        had = await form.read("subscribe", path, last=150, follow=False, read_timeout=SILENCE)
    assert [event.offset for event in had.events] == list(range(51, 201))
    assert (had.error, had.first_offset) == (None, 51)


# The server dies


@pytest.mark.timeout(300)
async def test_a_server_that_is_killed_and_started_again_on_the_same_file_is_gone_on_with(form: Form, sqlite_url: str) -> None:
    chunks, kills, sqlite_url = 400, 2, sqlite_url + "?synchronous=NORMAL"
    written = anyio.Event()
    retry = Retry(tries=None, first=timedelta(milliseconds=5), longest=timedelta(milliseconds=50))

    async with StreamManager.connect(sqlite_url) as streams, bad_network() as network, anyio.create_task_group() as tasks:
        await tasks.start(partial(write_stream, streams, "s", chunks, when=written))
        had: list[Had] = []

        async def read() -> None:
            had.append(
                await form.read("subscribe", network.path() + "/streams/s", retry=retry, read_timeout=SILENCE, seconds=250)
            )

        tasks.start_soon(read)
        for _ in range(kills):
            async with server_process("durable", sqlite_url) as server:
                network.url = server.url
                connections = network.connections
                with anyio.fail_after(60):
                    while network.connections == connections:  # noqa: ASYNC110 - no event tells
                        await anyio.sleep(0.01)
                await server.kill()
        async with server_process("durable", sqlite_url) as server:
            network.url = server.url
            written.set()
            with anyio.fail_after(150):
                while not had:  # noqa: ASYNC110 - as above
                    await anyio.sleep(0.01)
    assert_whole(had[0], chunks)


# Many at once


@pytest.mark.parametrize("clients", [100, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.timeout(180)
async def test_many_clients_in_one_process_read_over_cuts(clients: int, sqlite_url: str) -> None:
    chunks = 6
    form = Form(is_blocking=False)
    async with server_process("durable", sqlite_url) as server, bad_network(server.url) as network:
        async with StreamManager.connect(sqlite_url) as streams:
            await write_stream(streams, "s", chunks)
        chance = random.Random(1)
        paths = [network.path(fates(2, chance.randrange(1 << 30), 900)) + "/streams/s" for _ in range(100)]
        reads = [
            partial(form.read, "subscribe", paths[number % len(paths)], read_timeout=timedelta(seconds=5), seconds=150)
            for number in range(clients)
        ]
        for had in await all_of(reads):
            assert_whole(had, chunks)
