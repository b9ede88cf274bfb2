"""One round of a deployment: a server under load is told to stop, and everything that may be wrong afterwards is looked for.

What tests and the campaign share. A round finds faults, as sentences, and judges nothing else.
"""

import random
import sqlite3
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, closing
from datetime import timedelta
from typing import Any, Final

import anyio
import anyio.to_thread
from anyio.abc import TaskGroup
from tests.deploy.clients import UNDERSTOOD, Client, Stalled, Way
from tests.deploy.flows import number_of
from tests.deploy.servers import WAIT_SECONDS, Server, until

from streamkeep import StreamEvent, StreamEventType, StreamManager

FOREVER: Final = timedelta(days=1)
GRACE: Final = timedelta(seconds=1)
STARTED: Final = ("short", "endless", "endless", "quiet", "minding", "tidy")
FOLLOWERS: Final = 3
"""How many follow each of the streams that were started."""


class Load:
    """Clients at work on one server, a few dozen; which of them do what is chosen by `chance`."""

    def __init__(self, server: Server, chance: random.Random, tasks: TaskGroup) -> None:
        self.clients: list[Client] = []
        self._server = server
        self._chance = chance
        self._tasks = tasks
        self._stalled: list[Stalled] = []

    def begin(self) -> None:
        """Start the streams, each with its followers."""
        for flow in STARTED:
            self._tasks.start_soon(self._start, flow)

    async def goes_on(self) -> None:
        """Have more and more clients come, so that whatever happens to the server meets some in any state; for ever."""
        while True:
            self._add(Client(self._chance.choice(STARTED), "start"))
            await anyio.sleep(self._chance.uniform(0, 0.1))

    async def stall(self) -> None:
        """Have one more who does not read."""
        self._stalled.append(await anyio.to_thread.run_sync(Stalled, self._server.url))

    async def is_under_way(self) -> None:
        """Return when all have got something."""
        await until(lambda: len(self.clients) == len(STARTED) * (1 + FOLLOWERS))
        await until(lambda: all(client.begun.is_set() for client in self.clients))

    async def _start(self, flow: str) -> None:
        client = Client(flow, "start")
        self._add(client)
        await client.begun.wait()
        if client.stream is not None:
            ways: Sequence[Way] = ("get", "resume", "get")
            for way in ways:
                pause = self._chance.choice([0.0, 0.0, 0.05])
                self._add(Client(flow, way, client.stream, pause_seconds=pause))

    def _add(self, client: Client) -> None:
        self.clients.append(client)
        self._tasks.start_soon(client.read, self._server.url)

    def close(self) -> None:
        """Let go of those who do not read."""
        for stalled in self._stalled:
            stalled.close()


@asynccontextmanager
async def loaded(server: Server, chance: random.Random) -> AsyncGenerator[Load]:
    """Put a server under load. Leaving the block waits for the clients' answers to end; one that never does has no ending."""
    async with anyio.create_task_group() as tasks:
        load = Load(server, chance, tasks)
        load.begin()
        try:
            yield load
        finally:
            load.close()
            tasks.cancel_scope.deadline = anyio.current_time() + WAIT_SECONDS


# What may be wrong afterwards


async def faults_after(server: Server, clients: Sequence[Client], *, is_clean: bool = True) -> list[str]:
    """Look at what a server has left behind, start it again, have its clients come back, and say all that is wrong.

    One that was stopped cleanly has ended its streams itself; those of one that was killed are ended by whoever looks.
    """
    await server.is_gone()
    faults = faults_of_file(server) + faults_of_answers(clients)
    if is_clean:
        faults += [f"{stream}: the server has left it open" for stream in await open_streams(server)]
        _, traceback, rest = server.log.partition("Traceback")
        faults += [traceback + rest] if traceback else []
    await server.start()
    return faults + await come_back(clients, server.url) + faults_of_stories(await stories(server), clients)


def faults_of_answers(clients: Iterable[Client]) -> list[str]:
    """Say which clients were not told how their answer ended, or were told what is not so."""
    faults = [fault for client in clients for fault in client.faults]
    return faults + [f"{client}: an ending that nobody understands" for client in clients if client.ending not in UNDERSTOOD]


def faults_of_file(server: Server) -> list[str]:
    """Say what is wrong with the file that a server has left behind: it must be whole, and nobody's."""
    with closing(sqlite3.connect(server.database, timeout=0)) as connection:
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            return [f"the file is still locked: {error}"]
        found = [str(row[0]) for row in connection.execute("PRAGMA integrity_check")]
    return [] if found == ["ok"] else found


async def open_streams(server: Server) -> list[str]:
    """Give the streams that have no end yet, without giving them one."""
    async with StreamManager.connect(server.storage, grace=FOREVER) as streams:
        return [info.id for info in await streams.list(limit=10_000) if info.status == "open"]


async def stories(server: Server) -> Mapping[str, Sequence[StreamEvent[Any]]]:
    """Read all streams to their ends, ending as a reader does what was abandoned. TimeoutError: one has no end."""
    with anyio.fail_after(WAIT_SECONDS):
        async with StreamManager.connect(server.storage, grace=GRACE) as streams:
            return {info.id: await _story(streams, info.id) for info in await streams.list(limit=10_000)}


async def _story(streams: StreamManager, stream: str) -> Sequence[StreamEvent[Any]]:
    async with streams.subscribe(stream) as events:
        return [event async for event in events]


def faults_of_stories(told: Mapping[str, Sequence[StreamEvent[Any]]], clients: Iterable[Client]) -> list[str]:
    """Say where what is stored is not what the flows did, or not what clients were shown."""
    faults = [f"{stream}: {fault}" for stream, events in told.items() for fault in _faults_of_story(events)]
    for client in clients:
        events = told.get(client.stream or "", ())
        if client.offset >= len(events):
            faults.append(f"{client}: has seen what is not stored, {len(events)} events")
        elif client.knows_the_end and (client.offset, client.status) != (len(events) - 2, _status(events[-1])):
            faults.append(f"{client}: the stream ended otherwise, {events[-1]}")
    return faults


def _faults_of_story(events: Sequence[StreamEvent[Any]]) -> list[str]:
    *chunks, end = events
    faults = [f"{event} in place {place}" for place, event in enumerate(chunks) if number_of(event.chunk) != place]
    if _status(end) not in (None, "ABORTED"):
        faults.append(f"it ended as {end}")
    if end.type is StreamEventType.DONE and end.output != len(chunks):
        faults.append(f"{len(chunks)} chunks are taken for the whole: {end.output}")
    return faults


def _status(event: StreamEvent[Any]) -> str | None:
    return event.error.status if event.type is StreamEventType.ERROR else None


async def come_back(clients: Iterable[Client], url: str) -> list[str]:
    """Have those who were not told the end come back, until they are; say who never is, and who then gets what it must not get."""
    late = [client for client in clients if client.stream is not None and not client.knows_the_end]
    with anyio.fail_after(WAIT_SECONDS):
        async with anyio.create_task_group() as reading:
            for client in late:
                client.faults.clear()
                reading.start_soon(client.read, url)
    faults = [fault for client in late for fault in client.faults]
    return faults + [f"{client}: came back, and still has no end" for client in late if not client.knows_the_end]
