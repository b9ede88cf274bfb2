"""Workers are replaced under load, by a reload, a rolling restart or a crash: nothing waits for open tabs, and nothing is lost."""

import os
import random
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import pytest
from tests.deploy.clients import Client
from tests.deploy.rounds import come_back, faults_after, faults_of_answers, faults_of_stories, loaded, stories
from tests.deploy.servers import (
    GRANIAN_RELOAD,
    GRANIAN_WORKERS,
    UVICORN_RELOAD,
    UVICORN_WORKERS,
    Kind,
    Server,
    granian,
    running,
    until,
    uvicorn,
)

pytestmark = pytest.mark.timeout(240)

UVICORN_PATIENT: Final = uvicorn("--workers", "2", "--timeout-worker-healthcheck", "30")
"""It gives a restart up when the new worker takes longer to start, by default 5 seconds."""
GRANIAN_BRISK: Final = granian("--workers", "2", "--respawn-interval", "1")


def name_of(kind: Kind) -> str:
    return kind.name


async def faults_while_it_runs(server: Server, clients: Sequence[Client]) -> list[str]:
    """Have the clients come back to a server that was not started again, and say what is wrong."""
    return faults_of_answers(clients) + await come_back(clients, server.url) + faults_of_stories(await stories(server), clients)


@pytest.mark.parametrize("kind", [UVICORN_RELOAD, pytest.param(GRANIAN_RELOAD, marks=pytest.mark.slow)], ids=name_of)
async def test_a_reload_does_not_wait_for_open_tabs(kind: Kind, tmp_path: Path) -> None:
    async with running(kind, tmp_path) as server:
        old = await server.workers()
        async with loaded(server, random.Random(1)) as load:
            await load.is_under_way()
            server.module.write_text(server.module.read_text() + "edited = True\n")
            await server.is_rid_of(old)
        await server.answers()
        assert await faults_while_it_runs(server, load.clients) == []
        server.interrupt()
        assert await server.exit_code() in kind.interrupted
        await server.is_gone()


@pytest.mark.parametrize("kind", [UVICORN_PATIENT, pytest.param(GRANIAN_BRISK, marks=pytest.mark.slow)], ids=name_of)
async def test_a_rolling_restart_replaces_all_workers_and_every_stream_ends(kind: Kind, tmp_path: Path) -> None:
    async with running(kind, tmp_path) as server:
        old = await server.workers()
        async with loaded(server, random.Random(1)) as load:
            await load.is_under_way()
            server.signal(signal.SIGHUP)
            await server.is_rid_of(old)
        assert await faults_while_it_runs(server, load.clients) == []


async def test_readers_of_a_worker_that_was_killed_come_back_to_the_others(tmp_path: Path) -> None:
    async with running(UVICORN_WORKERS, tmp_path) as server:
        async with loaded(server, random.Random(1)) as load:
            await load.is_under_way()
            orphans = those_with_a_stream_of(load.clients[0].process, load.clients)
            os.kill(load.clients[0].process, signal.SIGKILL)
            await until(lambda: all(client.ending for client in orphans))
            assert await come_back(orphans, server.url) == []
            server.signal(signal.SIGTERM)
        assert await server.exit_code() == 0
        assert await faults_after(server, load.clients, is_clean=False) == []


async def test_granian_ends_well_when_one_of_its_workers_was_killed(tmp_path: Path) -> None:
    async with running(GRANIAN_WORKERS, tmp_path) as server:
        async with loaded(server, random.Random(1)) as load:
            await load.is_under_way()
            os.kill(load.clients[-1].process, signal.SIGKILL)
        assert await server.exit_code() == 1
        assert await faults_after(server, load.clients, is_clean=False) == []


def those_with_a_stream_of(process: int, clients: Sequence[Client]) -> list[Client]:
    """Give the clients whose streams are produced by a process, whoever serves them."""
    streams = {client.stream for client in clients if client.way == "start" and client.process == process}
    return [client for client in clients if client.stream in streams]
