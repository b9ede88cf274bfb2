"""Thousands of readers that have nothing to read: connect them, tell them one thing more and the end, and count what they cost."""

import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import anyio
from tests.resources.census import left_over
from tests.resources.clients import AT_A_TIME, Client, get
from tests.resources.server import RunningServer, given_back

from streamkeep import StreamInput, StreamManager
from streamkeep.storages.sqlite import SQLiteStorage

LAST_CHUNK: Final = {"text": "nothing is lost"}
HEARTBEAT: Final = b": \n"
BODY: Final = (
    b"retry: 2000\n"
    b'event: chunk\ndata: "begun"\nid: 0\n\n'
    b'event: chunk\ndata: {"text":"nothing is lost"}\nid: 1\n\n'
    b"event: done\ndata: null\nid: 2\n\n"
)


@dataclass(frozen=True, slots=True)
class Cost:
    """What so many idle connections were seen to cost.

    Attributes:
        connections: how many there were.
        bytes_each: memory of the server's process, divided by them.
        cpu_share: how much of one processor the server used while they were idle.
        seconds_to_tell: from the last write to when the last of them had read it, and its end.
        wrong: how many have read anything but the right bytes.
        left_over: what the server held after they had gone, and not before they came.
    """

    connections: int
    bytes_each: int
    cpu_share: float
    seconds_to_tell: float
    wrong: int
    left_over: dict[str, int]


async def hold_idle(running: RunningServer, database: Path, connections: int, streams: int, watch_seconds: float = 0) -> Cost:
    """Hold half of so many connections on one stream, the others on so many; another process, this one, writes them."""
    async with SQLiteStorage(database) as storage, StreamManager(storage) as manager, AsyncExitStack() as open_clients:
        writers = [await manager.open(f"idle-{connections}-{number}") for number in range(streams)]
        for writer in writers:
            await writer.write("begun")
        await _read_once(running, writers)
        before = await running.report_in_motion()
        spread = [writers[0 if n % 2 else n % streams].id for n in range(connections)]
        clients = await _connect(open_clients, running.port, spread)
        idle = await running.report()
        share = await _cpu_share(running, watch_seconds)
        began = time.monotonic()
        wrong = await _tell_all(clients, writers)
        seconds = time.monotonic() - began
        await open_clients.aclose()
        after = await given_back(running, before)
    each = (idle.resident_bytes - before.resident_bytes) // connections
    return Cost(connections, each, share, seconds, wrong, left_over(before.holds, after.holds))


async def _read_once(running: RunningServer, writers: Sequence[StreamInput]) -> None:
    """Have the server do what it does once: find its modules, and watch for the first time."""
    async with Client.connected(running.port) as client:
        await client.begin(get(f"/{writers[0].id}"))
        await client.read_until(b"\n\n")


async def _connect(stack: AsyncExitStack, port: int, streams: Sequence[str]) -> list[Client]:
    places = anyio.CapacityLimiter(AT_A_TIME)
    clients: list[Client] = []

    async def connect(stream: str) -> None:
        async with places:
            client = await stack.enter_async_context(Client.connected(port))
            await client.begin(get(f"/{stream}"))
            await client.read_until(b"\n\n")
            clients.append(client)

    async with anyio.create_task_group() as connecting:
        for stream in streams:
            connecting.start_soon(connect, stream)
    return clients


async def _cpu_share(running: RunningServer, seconds: float) -> float:
    used, began = running.cpu_seconds(), time.monotonic()
    await anyio.sleep(seconds)
    return (running.cpu_seconds() - used) / (time.monotonic() - began) if seconds else 0.0


async def _tell_all(clients: Sequence[Client], writers: Sequence[StreamInput]) -> int:
    for writer in writers:
        await writer.write(LAST_CHUNK)
        await writer.done()
    wrong = 0

    async def read(client: Client) -> None:
        nonlocal wrong
        body = await client.read_to_the_end()
        wrong += bytes(body).replace(HEARTBEAT, b"") != BODY

    async with anyio.create_task_group() as reading:
        for client in clients:
            reading.start_soon(read, client)
    return wrong
