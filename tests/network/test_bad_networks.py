"""Four clients on a network that splits, stalls, refuses and cuts: each chunk once, or a clear error."""

import json
import random
from collections.abc import Sequence
from contextlib import AsyncExitStack
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Final

import anyio
import httpx
import pytest
from tests.http.servers import STREAM_ID, STREAMING, server_process, until
from tests.http.servers import Reading as ReadAnswer
from tests.inside import feeds_of
from tests.network.campaign import CLIENTS, Reading, Tally, campaign, read_and_judge
from tests.network.proxy import End, Fate, Network, bad_network
from tests.network.readers import (
    Outcome,
    all_read,
    chromium_page,
    read_by_curl,
    read_by_genkit,
    read_by_httpx,
    read_flow_by_curl,
    whole_frames,
)
from tests.network.restarts import read_through_restarts
from tests.network.served import (
    FLOW,
    HEARTBEAT,
    chunk_of,
    complaint_about,
    over_bad_network,
    served,
    write_stream,
)

pytestmark = pytest.mark.timeout(300)

CHUNKS: Final = 8
CUTS: Final = 60


@pytest.fixture
def programs(genkit: None, curl: None, chromium: str) -> str:
    """Have all that the four clients need, and give Chromium's path."""
    return chromium


async def all_clients_read(programs: str, *ways: Sequence[Fate]) -> tuple[Tally, Network]:
    """Have each client read a stream over each of these ways, given by what happens on it."""
    tally = Tally()
    async with over_bad_network() as (streams, network), chromium_page(programs, f"{network.url}/openapi.json") as page:
        await write_stream(streams, "told", CHUNKS, route=FLOW, owner="")
        async with anyio.create_task_group() as tasks:
            for client in CLIENTS:
                readings = [Reading(network.path(fates), CHUNKS, fates, "told") for fates in ways]
                tasks.start_soon(read_and_judge, tally, client, page, readings)
    assert tally.streams == len(CLIENTS) * len(ways)
    return tally, network


# Splits, stalls, refusals


async def test_an_answer_in_small_packets_is_the_same_answer(programs: str) -> None:
    tally, _ = await all_clients_read(programs, *([Fate(piece=piece)] for piece in (1, 2, 3, 7, 100)))
    assert (tally.complaints, tally.clear_errors, tally.reopened) == ([], 0, 0)


async def test_a_stalled_connection_is_given_up_and_nothing_is_lost(programs: str) -> None:
    ways = [[Fate(End.STALL, after)] for after in (0, 100, b"\r\n\r\n", b"data", b"\\u4e16", b"\n\n", b"told")]
    tally, network = await all_clients_read(programs, *ways)
    assert (tally.complaints, tally.clear_errors) == ([], 0)
    assert network.struck[End.STALL] >= len(ways)  # on a slow machine a client may give up before that


async def test_a_quiet_stream_is_not_taken_for_a_stalled_one(curl: None) -> None:
    silence_seconds = 2.0
    beats = 2 * silence_seconds / HEARTBEAT.total_seconds()
    async with over_bad_network() as (streams, network):
        release = anyio.Event()
        async with anyio.create_task_group() as tasks:
            await tasks.start(partial(write_stream, streams, "told", CHUNKS, when=release))
            tasks.start_soon(set_after_heartbeats, release, f"{network.url}/streams/told", beats)
            outcomes = await all_read(
                [
                    partial(read, f"{network.path()}/streams/told", silence_seconds=silence_seconds)
                    for read in (read_by_curl, read_by_httpx)
                ]
            )
        assert network.connections == len(outcomes)
    assert [complaint_about(outcome, CHUNKS) for outcome in outcomes] == [None, None]


async def set_after_heartbeats(event: anyio.Event, url: str, beats: float) -> None:
    async with httpx.AsyncClient(verify=False, trust_env=False) as http, http.stream("GET", url) as answer:
        body = b""
        async for packet in answer.aiter_bytes():
            body += packet
            if body.count(b": \n") >= beats:
                break
    event.set()


async def test_a_server_that_cannot_be_reached_is_tried_again(programs: str) -> None:
    ways = [[Fate(End.RST, after, down_seconds=0.2)] for after in (0, b"data: ", b"\n\n")]
    tally, _ = await all_clients_read(programs, *ways)
    assert (tally.complaints, tally.clear_errors) == ([], 0)


async def test_a_flow_goes_on_while_whoever_started_it_is_cut_off(genkit: None, curl: None) -> None:
    cuts = [Fate(end, after) for end in (End.FIN, End.RST) for after in (b"\n\n", b'"n":7', b'"n":20')]
    async with served() as (_, url), bad_network(url) as network:
        by_curl = await all_read([partial(read_flow_by_curl, network.path([cut]) + FLOW, 24) for cut in cuts])
        jobs = [{"url": network.path([cut]) + FLOW, "input": 24, "silenceMs": 10_000, "tries": 20} for cut in cuts]
        by_genkit = await read_by_genkit(jobs)
    assert network.struck == {End.FIN: 6, End.RST: 6}
    assert [(outcome.error, complaint_about(outcome, 24)) for outcome in by_curl + by_genkit] == [(None, None)] * 12


async def test_the_server_forgets_readers_that_were_cut_while_the_stream_goes_on() -> None:
    async with served() as (streams, url), streams.open("told") as stream:
        await stream.write(chunk_of(0))
        async with bad_network(url) as network, anyio.create_task_group() as tasks:
            for fate in (Fate(End.FIN, b"\n\n"), Fate(End.RST, b"\n\n"), Fate(End.RST, b": \n"), Fate(End.STALL, b"\n\n")):
                tasks.start_soon(read_by_httpx, f"{network.path(repeat(fate))}/streams/told")
            await until(lambda: network.struck.total() >= 20)
            tasks.cancel_scope.cancel()
        await until(lambda: not feeds_of(streams))
        assert (await streams.info("told")).status == "open"


async def test_curl_may_retry_by_itself_into_a_file(curl: None, tmp_path: Path) -> None:
    file = tmp_path / "told"
    async with over_bad_network() as (streams, network):
        await write_stream(streams, "told", CHUNKS)
        url = network.path([Fate(End.FIN, b'"text":"'), Fate(End.RST, 0)])
        retrying = ["curl", "--silent", "--noproxy", "*", "--retry", "5", "--retry-all-errors", "--retry-delay", "1"]
        await anyio.run_process([*retrying, "--output", str(file), f"{url}/streams/told"])
    # Each try begins the file anew. On a pipe the pieces would follow each other, the last of them in the middle of a frame.
    outcome = Outcome()
    for frame in whole_frames(file.read_bytes()):
        outcome.take(frame["event"], json.loads(frame["data"]))
    assert complaint_about(outcome, CHUNKS) is None


# Cuts at random, and the server's death


@pytest.mark.promise("P8")
async def test_after_any_cuts_every_client_has_each_chunk_once(programs: str) -> None:
    seed = random.randrange(1 << 32)
    async with campaign(seed, programs) as cutting:
        while cutting.cuts < CUTS:
            await cutting.round(5)
    assert cutting.tally.complaints == [], f"seed {seed}"
    assert (cutting.tally.duplicates, cutting.tally.gaps, cutting.tally.hangs) == (0, 0, 0)


async def test_readers_come_through_a_restart_of_the_server(programs: str, sqlite_url: str) -> None:
    seed = random.randrange(1 << 32)
    tally = await read_through_restarts(seed, 1, sqlite_url, programs)
    assert (tally.complaints, tally.clear_errors) == ([], 0), f"seed {seed}"


async def test_who_reads_a_flow_that_died_with_its_server_is_told_so_by_the_next(
    genkit: None, curl: None, sqlite_url: str
) -> None:
    async with bad_network() as network, AsyncExitStack() as processes:
        server = await processes.enter_async_context(server_process("durable", sqlite_url))
        stream = await begin_endless_flow(server.url)
        network.url = server.url
        url = f"{network.path()}/streams/{stream}"
        job = {"url": f"{network.path()}/endless", "streamId": stream, "silenceMs": 10_000, "tries": 20}
        outcomes: list[Outcome] = []

        async def read() -> None:
            outcomes.extend(await all_read([partial(read_by_curl, url), partial(read_by_httpx, url)]))

        async def read_with_genkit() -> None:
            outcomes.extend(await read_by_genkit([job]))

        async with anyio.create_task_group() as readers:
            readers.start_soon(read)
            readers.start_soon(read_with_genkit)
            await until(lambda: network.connections >= 3)
            await server.kill()
            server = await processes.enter_async_context(server_process("durable", sqlite_url))
            network.url = server.url
    assert [outcome.chunks for outcome in outcomes] == [["begun"]] * 3
    assert all(outcome.error and "ABORTED" in outcome.error for outcome in outcomes)


async def begin_endless_flow(url: str) -> str:
    """Start it, and give its stream's id when its chunk is stored."""
    async with (
        httpx.AsyncClient(verify=False, trust_env=False) as http,
        http.stream("POST", f"{url}/endless", json={"data": 1}, headers=STREAMING) as answer,
    ):
        await ReadAnswer(answer).until()
        return answer.headers[STREAM_ID]
