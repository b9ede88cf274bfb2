"""What is attacked: apps of ours on real servers, in a thread of this process (to look inside) or in one of their own.

Servers and apps are those of `tests.http.servers` and of the command; nothing is faked, and nothing here attacks.
"""

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

import anyio
from anyio.from_thread import BlockingPortal, start_blocking_portal
from genkit import ActionRunContext
from tests.hostile.sockets import WAIT_SECONDS, Address, ask
from tests.http.servers import durable_app, server_process, serving, wrapped_app
from tests.test_cli import serving as serving_command

from streamkeep import InMemoryStreamManager, StreamInput, StreamManager
from streamkeep.http import StreamsHTTP
from streamkeep.http.response import ASGIApp, Timeouts

T = TypeVar("T")

APPS: Final[dict[str, Callable[..., ASGIApp]]] = {"durable_flow": durable_app, "DurableStreaming": wrapped_app}
PROCESSES: Final = {"durable_flow": "durable", "DurableStreaming": "wrapped"}
HASTY: Final = Timeouts(body=timedelta(milliseconds=100))
"""For tests in which a body never comes."""

STREAMING: Final = b"Accept: text/event-stream"
ID: Final = b"X-Genkit-Stream-Id: "
KNOWN: Final = "known"
"""The id of a completed stream that every server here has."""


async def echo(value: Any, ctx: ActionRunContext) -> Any:
    """Give back what came, as a chunk and as the output."""
    ctx.send_chunk(value)
    return value


async def few(to: int, ctx: ActionRunContext) -> dict[str, int]:
    """Count, not far."""
    for number in range(min(to, 20)):
        ctx.send_chunk(number)
    return {"counted": to}


@dataclass(frozen=True, slots=True)
class Target:
    """A server; `passes_on`: what a POST's body says is judged by an app that is not ours."""

    address: Address
    passes_on: bool

    def is_alive(self) -> bool:
        """Say whether an honest reader gets the known stream."""
        answer = ask(self.address, "GET", f"/streams/{KNOWN}".encode(), b"Connection: close")
        return (
            answer.code == 200 and b'event: done\ndata: "known"\nid: known/' in answer.body and answer.body.endswith(b"/0\n\n")
        )


@dataclass(frozen=True, slots=True)
class House(Target):
    """A server in a thread, which can be looked into; a stream `known` is there."""

    streams: StreamManager
    http: StreamsHTTP
    portal: BlockingPortal
    at_rest: int
    """How many tasks there are while nobody asks anything."""
    kept: list[StreamInput] = field(default_factory=list)
    """Handles of streams that are to be open for as long as it is there."""

    def run(self, function: Callable[..., Awaitable[T]], *arguments: object) -> T:
        """Run something in the server's event loop."""

        async def bounded() -> T:
            with anyio.fail_after(WAIT_SECONDS):
                return await function(*arguments)

        return self.portal.call(bounded)

    def stream_ids(self) -> list[str]:
        """Give the ids of all streams but the known one."""
        return [info.id for info in self.run(self.streams.list) if info.id != KNOWN]

    def comes_to_rest(self) -> bool:
        """Say whether all tasks end that requests have left behind."""
        return until(lambda: self.portal.call(_tasks) <= self.at_rest)


@dataclass(frozen=True, slots=True)
class Apart(Target):
    """A server in a process of its own."""

    pid: int

    def mebibytes(self) -> int:
        """Give the most memory that it has had."""
        found = re.search(r"^VmHWM:\s+(\d+) kB$", Path(f"/proc/{self.pid}/status").read_text(), re.MULTILINE)
        assert found is not None
        return int(found[1]) >> 10


def until(condition: Callable[[], bool]) -> bool:
    """Wait for what no event tells; False: it does not come."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not (is_so := condition()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return is_so


@contextmanager
def house(app: str, *, timeouts: Timeouts | None = None, server: str = "auto", **options: Any) -> Generator[House]:
    """Serve one of `APPS` in a thread; `server` is uvicorn's HTTP implementation, options are those of `StreamsHTTP`."""
    streams = InMemoryStreamManager()
    streams_http = StreamsHTTP(streams, timeouts=timeouts, drain=timedelta(0), **options)
    served = APPS[app](echo, few, streams=streams_http)
    with serve(served, streams, streams_http, server=server, passes_on=app == "DurableStreaming") as target:
        yield target


@contextmanager
def serve(
    app: ASGIApp, streams: StreamManager, streams_http: StreamsHTTP, *, server: str = "auto", passes_on: bool = False
) -> Generator[House]:
    """Serve any app over these streams in a thread."""
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(serving(app, http=server)) as url,
    ):
        portal.call(store_known, streams)
        portal.call(asyncio.sleep, 0)
        yield House(_address(url), passes_on, streams, streams_http, portal, portal.call(_tasks))


@contextmanager
def process(app: str, storage_url: str) -> Generator[Apart]:
    """Serve one of `APPS`, over streams that are shared with whoever has the storage's URL."""
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(server_process(PROCESSES[app], storage_url)) as served,
    ):
        assert served.process.pid is not None
        yield Apart(_address(served.url), app == "DurableStreaming", served.process.pid)


@contextmanager
def command(storage_url: str) -> Generator[Apart]:
    """Run `streamkeep serve`."""
    with serving_command("--storage", storage_url) as (served, url):
        yield Apart(_address(url), False, served.pid)


async def store_known(streams: StreamManager) -> None:
    """Store the stream that every server here has, as if it had been started by POST /few."""
    async with streams.open(KNOWN, metadata={"route": "/few", "owner": ""}) as stream:
        await stream.done(KNOWN)


async def store_known_at(storage_url: str) -> None:
    """Do that in a storage that others open later."""
    async with StreamManager.connect(storage_url, ttl=timedelta(hours=1)) as streams:
        await store_known(streams)


async def _tasks() -> int:
    return len(asyncio.all_tasks())


def _address(url: str) -> Address:
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    return parts.hostname, parts.port
