"""Storms of clients that cut, over a server in this process, with one client that stays and reads all."""

import random
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import anyio
from tests.http.servers import count, durable_app, serving, until
from tests.inside import tasks_of
from tests.resources.census import Census, census_in_motion, left_over, take_census
from tests.resources.clients import Client, Disconnect, get, post, storm

from streamkeep import StreamInput, StreamManager
from streamkeep.http import StreamsHTTP

LIVE: Final = "live"
COUNT_TO: Final = 80
READS: Final = tuple(
    get(f"/streams/{path}") for path in (LIVE, LIVE, f"{LIVE}?after=0", "ended", "ended?after=300", "ended/info", "none")
)


@dataclass(frozen=True, slots=True)
class Aftermath:
    """What storms have left.

    Attributes:
        left_over: what was held after each, and not before.
        is_faithful_served: whether the client that stayed got the right bytes.
    """

    left_over: list[dict[str, int]]
    is_faithful_served: bool


HEARTBEAT: Final = b": \n"


@asynccontextmanager
async def served(database: Path) -> AsyncGenerator[tuple[StreamsHTTP, int]]:
    """Serve a flow and streams over SQLite from this process, where they can be counted; give the port."""
    http = StreamsHTTP(StreamManager.connect(f"sqlite:///{database}", lease=timedelta(seconds=0.5)))
    async with serving(durable_app(count, streams=http)) as url:
        await _write_a_long_stream(http.streams)
        yield http, urlsplit(url).port or 0


def start_a_flow(**headers: str) -> bytes:
    """Give the request that starts the flow, or with a header resumes a stream."""
    return post("/count", b'{"data":%d}' % COUNT_TO, Content_Type="application/json", **headers)


async def storms(
    http: StreamsHTTP, port: int, requests: Sequence[bytes], rng: random.Random, *, rounds: int, clients: int
) -> Aftermath:
    """Let so many storms of so many clients come while a stream is written, and one storm before, that is not counted."""

    def disconnects() -> list[Disconnect]:
        return [Disconnect.at_random(requests, rng) for _ in range(clients)]

    async with http.streams.open(LIVE, metadata={"route": "/count"}) as writer, Client.connected(port) as faithful:
        await faithful.begin(get(f"/streams/{LIVE}"))
        await storm(port, disconnects())
        await until(lambda: not http.runner._runs and tasks_of(http.streams) <= 4)
        before = await census_in_motion(lambda: _census_of(http))
        left: list[dict[str, int]] = []
        for number in range(rounds):
            await _storm_and_write(port, disconnects(), writer, number)
            left.append(await _left_over(before, http))
        await writer.done()
        body = await faithful.read_to_the_end()
    return Aftermath(left, bytes(body).replace(HEARTBEAT, b"") == _body(rounds))  # where storms are slow, heartbeats come


async def _storm_and_write(port: int, disconnects: Sequence[Disconnect], writer: StreamInput, chunk: int) -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(storm, port, disconnects)
        await writer.write(chunk)


async def _left_over(before: Census, http: StreamsHTTP) -> dict[str, int]:
    """Wait until no more is held than before, a while at most; give what is left over then."""
    left: dict[str, int] = {}
    for _ in range(40):
        if not (left := left_over(before, await _census_of(http))):
            break
        await anyio.sleep(0.1)
    return left


async def _census_of(http: StreamsHTTP) -> Census:
    # A storage's thread knows what was asked of it last until it is asked again; so that is always the same.
    await http.streams.info(LIVE)
    return take_census(http)


async def _write_a_long_stream(streams: StreamManager) -> None:
    async with streams.open("ended") as writer:
        for number in range(600):
            writer.write_soon({"number": number, "text": "nothing is lost"})
        await writer.done()


def _body(chunks: int) -> bytes:
    written = [b"event: chunk\ndata: %d\nid: %d\n\n" % (number, number) for number in range(chunks)]
    return b"retry: 2000\n" + b"".join(written) + b"event: done\ndata: null\nid: %d\n\n" % chunks
