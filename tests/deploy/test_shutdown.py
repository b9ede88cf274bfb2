"""A server under load is told to stop: each client gets an end that it understands, each stream its own, and the next start works."""

import random
import signal
from pathlib import Path
from typing import Final

import anyio
import httpx
import pytest
from tests.deploy.clients import Client, Ending
from tests.deploy.rounds import faults_after, faults_of_answers, faults_of_file, loaded, open_streams
from tests.deploy.servers import (
    DEMO,
    GRANIAN,
    GRANIAN_WORKERS,
    GRANIAN_WORKERS_BOUNDED,
    SERVE,
    UVICORN,
    UVICORN_BOUNDED,
    UVICORN_WORKERS,
    WAIT_SECONDS,
    Kind,
    granian,
    running,
    uvicorn,
)

from streamkeep import StreamManager

pytestmark = pytest.mark.timeout(240)

GENKIT: Final = "from tests.deploy.genkit_apps import durable, wrapped\n"
ENOUGH: Final = 40


def chance() -> random.Random:
    return random.Random(1)


def name_of(kind: Kind) -> str:
    return kind.name


@pytest.mark.parametrize(
    "kind",
    [UVICORN_WORKERS, GRANIAN, *(pytest.param(kind, marks=pytest.mark.slow) for kind in (UVICORN, GRANIAN_WORKERS))],
    ids=name_of,
)
async def test_at_sigterm_every_stream_ends_every_client_is_told_and_the_server_exits(kind: Kind, tmp_path: Path) -> None:
    async with running(kind, tmp_path) as server:
        async with loaded(server, chance()) as load:
            await load.is_under_way()
            server.signal(signal.SIGTERM)
        assert await server.exit_code() == kind.terminated
        assert {client.ending for client in load.clients} == {Ending.DONE, Ending.ERROR}  # nobody has to come back
        assert await faults_after(server, load.clients) == []


# Granian's workers get each Ctrl-C twice, from the terminal and from their parent, and may hang in their handler of signals.
@pytest.mark.parametrize("kind", [UVICORN, pytest.param(GRANIAN_WORKERS_BOUNDED, marks=pytest.mark.slow)], ids=name_of)
async def test_ctrl_c_does_what_sigterm_does(kind: Kind, tmp_path: Path) -> None:
    async with running(kind, tmp_path) as server:
        async with loaded(server, chance()) as load:
            await load.is_under_way()
            server.interrupt()
        assert await server.exit_code() in kind.interrupted
        assert await faults_after(server, load.clients, is_clean=kind is UVICORN) == []


@pytest.mark.parametrize(
    "kind",
    [uvicorn(app="served:durable", terminated=UVICORN.terminated), granian(app="served:wrapped")],
    ids=["durable_flow", "DurableStreaming"],
)
async def test_genkit_flows_end_as_well(kind: Kind, tmp_path: Path) -> None:
    async with running(kind, tmp_path, GENKIT) as server:
        async with loaded(server, chance()) as load:
            await load.is_under_way()
            server.signal(signal.SIGTERM)
        assert await server.exit_code() == kind.terminated
        assert await faults_after(server, load.clients) == []


@pytest.mark.parametrize("kind", [UVICORN_BOUNDED, pytest.param(GRANIAN_WORKERS_BOUNDED, marks=pytest.mark.slow)], ids=name_of)
async def test_a_client_that_reads_nothing_holds_a_server_with_a_bound_up_no_longer_than_that(
    kind: Kind, tmp_path: Path
) -> None:
    async with running(kind, tmp_path) as server:
        async with loaded(server, chance()) as load:
            await load.stall()
            await load.is_under_way()
            server.signal(signal.SIGTERM)
            assert await server.exit_code() == kind.terminated
        assert await faults_after(server, load.clients) == []


async def test_a_second_ctrl_c_ends_uvicorn_at_once_and_nothing_is_lost(tmp_path: Path) -> None:
    async with running(UVICORN, tmp_path) as server:
        async with loaded(server, chance()) as load:
            await load.is_under_way()
            server.interrupt()
            await server.says("Waiting for connections to close")
            server.interrupt()
        await server.exit_code()
        assert await faults_after(server, load.clients, is_clean=False) == []


async def test_a_server_that_stops_without_a_signal_tells_its_clients_at_its_bound(tmp_path: Path) -> None:
    kind = uvicorn("--limit-max-requests", str(ENOUGH), "--timeout-graceful-shutdown", "1")
    async with running(kind, tmp_path) as server:
        async with loaded(server, chance()) as load:
            await load.is_under_way()
            async with httpx.AsyncClient(base_url=server.url, timeout=WAIT_SECONDS) as http:
                with pytest.raises(httpx.TransportError), anyio.fail_after(WAIT_SECONDS):
                    while True:  # the server looks at its count ten times a second
                        await http.get("/process")
        assert await server.exit_code() == 0
        assert await faults_after(server, load.clients, is_clean=False) == []


async def test_a_reader_whose_answer_the_server_cancels_is_told_so_in_a_last_frame(tmp_path: Path) -> None:
    kind = uvicorn("--timeout-graceful-shutdown", "1", terminated=UVICORN.terminated)  # sooner than answers end by themselves
    async with running(kind, tmp_path) as server, StreamManager.connect(server.storage) as streams:
        stream = await streams.open("a", metadata={"route": "/quiet"})
        await stream.write(0)
        readers = [Client("quiet", way, "a") for way in ("resume", "get")]
        async with anyio.create_task_group() as reading:
            for reader in readers:
                reading.start_soon(reader.read, server.url)
                await reader.begun.wait()
            server.signal(signal.SIGTERM)
        assert await server.exit_code() == kind.terminated
        assert [(reader.ending, reader.status) for reader in readers] == [
            (Ending.COME_BACK, "UNAVAILABLE"),
            (Ending.CUT, None),
        ]
        await stream.done()


async def test_readers_of_other_processes_streams_come_back_to_streamkeep_serve_and_get_the_rest(tmp_path: Path) -> None:
    readers = [Client("answer", "get", name, pause_seconds=pause) for name in ("a", "b") for pause in (0.0, 0.05)]
    async with running(SERVE, tmp_path) as server, StreamManager.connect(server.storage) as streams:
        written = [await streams.open(name) for name in ("a", "b")]
        for stream in written:
            await stream.write(0)
        async with anyio.create_task_group() as reading:
            for reader in readers:
                reading.start_soon(reader.read, server.url)
                await reader.begun.wait()
            server.signal(signal.SIGTERM)
        assert await server.exit_code() == SERVE.terminated
        assert {reader.ending for reader in readers} == {Ending.CUT}
        for stream in written:
            await stream.write(1)
            await stream.done(2)
        assert await faults_after(server, readers, is_clean=False) == []


async def test_streamkeep_demo_ends_its_streams_and_tells_its_clients(tmp_path: Path) -> None:
    clients = [Client("answer", "start", counts=False) for _ in range(10)]
    async with running(DEMO, tmp_path) as server:
        async with anyio.create_task_group() as reading:
            for client in clients:
                reading.start_soon(client.read, server.url)
            for client in clients:
                await client.begun.wait()
            server.signal(signal.SIGTERM)
        assert await server.exit_code() == DEMO.terminated
        assert [(client.ending, client.status) for client in clients] == [(Ending.ERROR, "ABORTED")] * len(clients)
        assert await open_streams(server) == []
        assert faults_of_file(server) + faults_of_answers(clients) == []
