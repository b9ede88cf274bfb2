"""A rolling deployment: the old process and the new one side by side on one file, and the old one is told to go under load."""

import random
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import anyio
import pytest
from anyio.abc import Process
from anyio.streams.text import TextReceiveStream
from tests.deploy.clients import Client, Ending
from tests.deploy.producer import LEASE
from tests.deploy.rounds import come_back, faults_of_answers, faults_of_stories, loaded, open_streams, stories
from tests.deploy.servers import (
    GRANIAN,
    GRANIAN_WORKERS,
    SERVE,
    UVICORN,
    UVICORN_WORKERS,
    WAIT_SECONDS,
    Kind,
    environment,
    running,
    until,
)

from streamkeep import StreamEvent, StreamManager

pytestmark = pytest.mark.timeout(240)

NAMES: Final = [f"answer-{number}" for number in range(8)]
MORE: Final = 20
UNREACHED: Final = 1_000_000


class Service:
    """A producer's process, and the offsets that it was told are stored."""

    def __init__(self, process: Process) -> None:
        self.acknowledged: dict[str, list[int]] = {name: [] for name in NAMES}
        self.up = anyio.Event()
        self._process = process

    async def listen(self) -> None:
        """Note what it is told, until it ends."""
        assert self._process.stdout is not None
        rest = ""
        async for text in TextReceiveStream(self._process.stdout):
            *lines, rest = (rest + text).split("\n")
            for line in lines:
                if line == "up":
                    self.up.set()
                else:
                    name, offset = line.split()
                    self.acknowledged[name].append(int(offset))

    async def has_written_all(self) -> None:
        """Return when it has written to each of its streams."""
        await until(lambda: all(self.acknowledged.values()))

    async def ends(self, number: signal.Signals | None = None) -> int:
        """Give its exit code when it has ended, by itself or by a signal."""
        if number is not None:
            self._process.send_signal(number)
        with anyio.fail_after(WAIT_SECONDS):
            return await self._process.wait()


@asynccontextmanager
async def service(storage: str, more: int) -> AsyncGenerator[Service]:
    command = [sys.executable, "-m", "tests.deploy.producer", storage, str(more), *NAMES]
    async with await anyio.open_process(command, stderr=None, stdin=subprocess.DEVNULL, env=environment()) as process:
        try:
            async with anyio.create_task_group() as listening:
                service = Service(process)
                listening.start_soon(service.listen)
                yield service
        finally:
            if process.returncode is None:
                process.kill()


async def test_what_a_producer_lets_go_of_at_sigterm_another_goes_on_with_and_readers_notice_nothing(tmp_path: Path) -> None:
    over_http = [Client("answer", "get", name, pause_seconds=pause) for name in NAMES for pause in (0.0, 0.02)]
    async with (
        running(SERVE, tmp_path) as server,
        service(server.storage, UNREACHED) as old,
        StreamManager.connect(server.storage, lease=LEASE) as streams,
        anyio.create_task_group() as reading,
    ):
        await old.has_written_all()
        for client in over_http:
            reading.start_soon(client.read, server.url)
            await client.begun.wait()
        async with service(server.storage, MORE) as new:
            await new.up.wait()
            assert await old.ends(signal.SIGTERM) == 0
            assert await new.ends() == 0
        with anyio.fail_after(WAIT_SECONDS):
            logs = {name: await log_of(streams, name) for name in NAMES}

    assert [client.ending for client in over_http] == [Ending.DONE] * len(over_http)
    assert faults_of_stories(logs, over_http) == []
    for name, events in logs.items():
        taken_at = len(events) - 1 - MORE
        assert new.acknowledged[name] == list(range(taken_at, taken_at + MORE))
        # A write that was under way at the signal is stored, and nobody was left to be told.
        assert old.acknowledged[name] in (list(range(taken_at)), list(range(taken_at - 1)))


async def log_of(streams: StreamManager, name: str) -> Sequence[StreamEvent[Any]]:
    async with streams.subscribe(name) as events:
        return [event async for event in events]


@pytest.mark.parametrize(
    ("before", "after"),
    [(UVICORN, GRANIAN_WORKERS), pytest.param(GRANIAN, UVICORN_WORKERS, marks=pytest.mark.slow)],
    ids=["uvicorn", "granian"],
)
async def test_a_new_server_beside_the_old_one_has_the_ends_of_its_streams_and_all_its_clients(
    before: Kind, after: Kind, tmp_path: Path
) -> None:
    async with running(before, tmp_path / "old") as old, running(after, tmp_path / "new", database=old.database) as new:
        async with loaded(old, random.Random(1)) as load, anyio.create_task_group() as reading:
            await load.is_under_way()
            followers = [Client(client.flow, "get", client.stream) for client in load.clients]
            for client in followers:
                reading.start_soon(client.read, new.url)
                await client.begun.wait()
            old.signal(signal.SIGTERM)
        assert await old.exit_code() == before.terminated
        assert await open_streams(new) == []
        assert {client.ending for client in followers} == {Ending.DONE, Ending.ERROR}
        assert faults_of_answers([*load.clients, *followers]) == []
        assert await come_back(load.clients, new.url) == []
        assert faults_of_stories(await stories(new), [*load.clients, *followers]) == []
