"""A server in a process of its own, which says what it holds: `async with server(database) as running: await running.census()`.

It serves the streams of a SQLite file by uvicorn, as `python -m uvicorn` would, and two paths more: `POST /count` starts a flow,
`GET /census` answers with a census of the process. The census goes over a connection that is kept, so that it can still be
had when the server has no descriptor left for another one.
"""

import argparse
import asyncio
import json
import logging
import os
import resource
import signal
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, cast

import anyio
import uvicorn
from tests.resources.census import Census, census_in_motion, left_over, resident_bytes, take_census
from tests.resources.clients import Client, get

from streamkeep import StreamInput, StreamManager
from streamkeep.http import StreamsHTTP
from streamkeep.http.response import Receive, Scope, Send, Timeouts, send_response

ROOT: Final = Path(__file__).parents[2]
COUNT_TO: Final = 200
LEASE: Final = timedelta(seconds=0.5)


@dataclass(frozen=True, slots=True)
class Report:
    """What a server says of itself.

    Attributes:
        holds: a census of its process.
        resident_bytes: its memory, as the kernel counts it.
    """

    holds: Census
    resident_bytes: int


class RunningServer:
    """A server that runs, for its client."""

    def __init__(self, port: int, pid: int, kept: Client) -> None:
        self.port = port
        self._pid = pid
        self._kept = kept

    async def report_in_motion(self) -> Report:
        """Ask it a few times, and give the most there was of each kind of thing that it held."""
        last = await self.report()

        async def holds() -> Census:
            return (await self.report()).holds

        return Report(await census_in_motion(holds), last.resident_bytes)

    async def report(self) -> Report:
        """Ask it what it holds."""
        said = json.loads(await self._kept.ask(get("/census", keep_alive=True)))
        return Report(Census(said["holds"]), said["resident_bytes"])

    def cpu_seconds(self) -> float:
        """Say what it has used of the processor since it began."""
        user, system = Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def descriptors(self) -> int:
        """Say how many descriptors it has open; for when it has none left to say so itself."""
        return len(list(Path(f"/proc/{self._pid}/fd").iterdir()))


@asynccontextmanager
async def server(
    database: Path,
    *,
    loop: str = "auto",
    backlog: int = 2048,
    descriptors: int | None = None,
    heartbeat: timedelta = timedelta(seconds=15),
) -> AsyncGenerator[RunningServer]:
    """Run a server over a SQLite file, with no more descriptors than so many; its process is gone when the block is left."""
    options = ["--loop", loop, "--backlog", str(backlog), "--heartbeat", str(heartbeat.total_seconds())]
    if descriptors is not None:
        options += ["--descriptors", str(descriptors)]
    command = [sys.executable, "-m", __name__, str(database), *options]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdin=pipe, stdout=pipe)
    try:
        assert process.stdout is not None
        with anyio.fail_after(40):
            port = int(await process.stdout.readline())
        async with Client.connected(port) as kept:
            yield RunningServer(port, process.pid, kept)
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGKILL)
        with anyio.CancelScope(shield=True):
            await process.wait()


async def given_back(running: RunningServer, before: Report) -> Report:
    """Wait until the server holds no more than before, a while at most; give its last report."""
    report = await running.report()
    for _ in range(40):
        if not left_over(before.holds, report.holds):
            break
        await anyio.sleep(0.1)
        report = await running.report()
    return report


# In the process


class _App:
    """The streams, and the two paths more."""

    def __init__(self, streams: StreamsHTTP) -> None:
        self._streams = streams

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        match scope["type"], scope.get("path"):
            case "lifespan", _:
                await self._live(receive, send)
            case _, "/census":
                await send_response(send, 200, json.dumps(await self._report()).encode())
            case _, "/count":
                await self._streams.start(scope, receive, send, _count, {})
            case _:
                await self._streams(scope, receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        async with self._streams:
            await send({"type": "lifespan.startup.complete"})
            await receive()
        await send({"type": "lifespan.shutdown.complete"})

    async def _report(self) -> dict[str, object]:
        # A storage's thread knows what was asked of it last until it is asked again; so that is always the same.
        await self._streams.streams.list(limit=1)
        return {"holds": take_census(self._streams), "resident_bytes": resident_bytes()}


async def _count(stream: StreamInput, _stop: anyio.Event) -> int:
    for number in range(COUNT_TO):
        await stream.write(number)
    return COUNT_TO


class _Server(uvicorn.Server):
    async def startup(self, sockets: list[Any] | None = None) -> None:
        await super().startup(sockets)
        print(self.servers[0].sockets[0].getsockname()[1], flush=True)
        # Nothing is ever written to it: it ends when whoever started this server has died, of whatever.
        asyncio.get_running_loop().add_reader(sys.stdin, self._orphaned)

    def _orphaned(self) -> None:
        os._exit(1)


def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.resources.server")
    parser.add_argument("database", type=Path)
    parser.add_argument("--loop", default="auto")
    parser.add_argument("--backlog", type=int, default=2048)
    parser.add_argument("--descriptors", type=int)
    parser.add_argument("--heartbeat", type=float, default=15.0)
    arguments = parser.parse_args()
    logging.disable()  # asyncio says of each accept() without a descriptor that it failed, thousands of times a second
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (arguments.descriptors or hard, hard))
    timeouts = Timeouts(heartbeat=timedelta(seconds=arguments.heartbeat))
    streams = StreamManager.connect(f"sqlite:///{arguments.database}", lease=LEASE, grace=timedelta(minutes=1))
    app = _App(StreamsHTTP(streams, timeouts=timeouts))
    config = uvicorn.Config(
        cast("Any", app),
        port=0,
        loop=arguments.loop,
        backlog=arguments.backlog,
        log_config=None,
        access_log=False,
        timeout_keep_alive=600,
        timeout_graceful_shutdown=1,
    )
    _Server(config).run()


if __name__ == "__main__":
    _main()
