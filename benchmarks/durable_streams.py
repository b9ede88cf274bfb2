"""`python -m benchmarks.durable_streams`: servers of the Durable Streams protocol, one beside the other in one run.

    python -m benchmarks.durable_streams --node DIR --rakaia PYTHON

DIR has the protocol's reference server (`npm install @durable-streams/server` there), PYTHON is an interpreter that has `rakaia-streams`
and `uvicorn[standard]`; without them only streamkeep is measured. Each server is a process of its own, a new one for each measurement;
the clients are this one, over bare sockets, and need less than the servers. Appends: 64 streams, one connection each, the next append
when the last one was answered. Catch-up: a stream of 16 MiB in appends of 64 KiB, read from its start. Delivery: 8 writers of one stream,
each as fast as it is answered, and 100 readers of server-sent events, counted until each has had every message, for 20 seconds at most.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import uvloop
from tests.engines.process import Process, answers, free_port

ROOT: Final = Path(__file__).parent.parent
STREAMS: Final = 64
READERS: Final = 100
WRITERS: Final = 8
DELIVERED: Final = 800
DELIVERY_SECONDS: Final = 20.0
READ_BYTES: Final = 16 << 20
APPENDED_BYTES: Final = 64 << 10
READINGS: Final = 4
BOUND_SECONDS: Final = 120
MARK: Final = b"streamkeep-benchmark"
MESSAGE: Final = json.dumps({"delta": f"{MARK.decode()}, a token or two of an answer", "n": 12345}).encode()
HEADER: Final = "| server | appends/s | catch-up, MB/s | SSE, deliveries/s |\n|---|---:|---:|---:|"

STREAMKEEP: Final = """
import asyncio, sys
import uvicorn
from streamkeep.durable_streams import DurableStreamsLimits, durable_streams

served = durable_streams(sys.argv[1])

async def app(scope, receive, send):
    await served({**scope, "root_path": "/v1/stream"}, receive, send)

async def main():
    async with served:
        await uvicorn.Server(uvicorn.Config(app, port=int(sys.argv[2]), lifespan="off", log_level="error", access_log=False)).serve()

import uvloop
uvloop.run(main())
"""
NODE: Final = """
const [folder, port, dataDir] = process.argv.slice(1)
const { DurableStreamTestServer } = await import(`${folder}/node_modules/@durable-streams/server/dist/index.js`)
await new DurableStreamTestServer({ port: Number(port), host: "127.0.0.1", dataDir: dataDir || undefined }).start()
"""


@dataclass(frozen=True, slots=True)
class Served:
    """A way of serving the protocol: `command` begins it on a port, with a folder of its own; its streams are under `root`."""

    name: str
    command: Callable[[int, Path], Sequence[str]]
    root: str = "/v1/stream"


@dataclass(frozen=True, slots=True)
class Figures:
    """What one server has come to in one round."""

    appends: float
    megabytes: float
    deliveries: float


@asynccontextmanager
async def running(served: Served) -> AsyncGenerator[tuple[int, str]]:
    """Give the port and the root of a new server."""
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
        command = list(served.command(port, Path(folder)))
        process = Process(command, Path(folder) / "log", lambda: answers(port), environment=environment)
        with process:
            yield port, served.root


# Clients over bare sockets


class Connection:
    """HTTP/1.1 over one connection, of answers that have a length, are chunked, or have no body."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def ask(self, method: str, path: str, body: bytes = b"", *headers: str) -> tuple[dict[str, str], bytes]:
        """Send a request, and give the head and the body of its answer. RuntimeError: it is a refusal."""
        self.send(method, path, body, *headers)
        return await self.answer()

    def send(self, method: str, path: str, body: bytes = b"", *headers: str) -> None:
        lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {len(body)}", *headers, "", ""]
        self._writer.write("\r\n".join(lines).encode() + body)

    async def head(self) -> tuple[int, dict[str, str]]:
        """Give an answer's code and headers."""
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        pairs = (line.partition(":") for line in head[1:] if line)
        return int(head[0].split()[1]), {name.lower(): value.strip() for name, _, value in pairs}

    async def answer(self) -> tuple[dict[str, str], bytes]:
        code, headers = await self.head()
        body = b""
        if headers.get("transfer-encoding") == "chunked":
            pieces: list[bytes] = []
            while size := int(await self._reader.readuntil(b"\r\n"), 16):
                pieces.append((await self._reader.readexactly(size + 2))[:-2])
            await self._reader.readexactly(2)
            body = b"".join(pieces)
        elif code not in {204, 304}:
            body = await self._reader.readexactly(int(headers.get("content-length", "0")))
        if code >= 300:
            raise RuntimeError(f"{code}: {body[:200]!r}")
        return headers, body

    async def read(self) -> bytes:
        """Give what comes next of an answer."""
        return await self._reader.read(1 << 16)

    def close(self) -> None:
        self._writer.close()


async def connect(port: int) -> Connection:
    """Give a connection."""
    return Connection(*await asyncio.open_connection("127.0.0.1", port, limit=1 << 24))


# Scenes


async def appends(port: int, root: str, seconds: float) -> float:
    """Give how many appends a second are answered."""
    done = 0
    connections = [await connect(port) for _ in range(STREAMS)]
    for number, connection in enumerate(connections):
        await connection.ask("PUT", f"{root}/a{number}", b"", "Content-Type: application/json")
    begun_at = time.perf_counter()
    until = begun_at + seconds

    async def append_on(number: int, connection: Connection) -> None:
        nonlocal done
        while time.perf_counter() < until:
            await connection.ask("POST", f"{root}/a{number}", MESSAGE, "Content-Type: application/json")
            done += 1

    async with asyncio.TaskGroup() as tasks:
        for number, connection in enumerate(connections):
            tasks.create_task(append_on(number, connection))
    taken = time.perf_counter() - begun_at
    for connection in connections:
        connection.close()
    return done / taken


async def catch_up(port: int, root: str) -> float:
    """Give how many megabytes a second are read."""
    connection = await connect(port)
    kind = "Content-Type: application/octet-stream"
    await connection.ask("PUT", f"{root}/c", b"", kind)
    for _ in range(READ_BYTES // APPENDED_BYTES):
        await connection.ask("POST", f"{root}/c", os.urandom(APPENDED_BYTES), kind)
    begun_at = time.perf_counter()
    for _ in range(READINGS):
        offset, read = "-1", 0
        while read < READ_BYTES:
            headers, body = await connection.ask("GET", f"{root}/c?offset={offset}")
            offset, read = headers["stream-next-offset"], read + len(body)
    taken = time.perf_counter() - begun_at
    connection.close()
    return READINGS * READ_BYTES / taken / 1e6


async def deliveries(port: int, root: str) -> float:
    """Give how many messages a second are delivered to all readers of a stream, from the first append on."""
    writer = await connect(port)
    kind = "Content-Type: application/json"
    await writer.ask("PUT", f"{root}/d", b"", kind)
    readers = [await connect(port) for _ in range(READERS)]
    for reader in readers:
        reader.send("GET", f"{root}/d?offset=-1&live=sse", b"", "Accept: text/event-stream")
        code, _ = await reader.head()
        assert code == 200

    seen = 0

    async def read(reader: Connection) -> None:
        nonlocal seen
        had, rest = 0, b""
        while had < DELIVERED:
            data = await reader.read()
            assert data, "a reader was left"
            rest += data
            new = rest.count(MARK)
            had, seen, rest = had + new, seen + new, rest[-(len(MARK) - 1) :]

    async def write(connection: Connection) -> None:
        for _ in range(DELIVERED // WRITERS):
            await connection.ask("POST", f"{root}/d", MESSAGE, kind)

    writers = [await connect(port) for _ in range(WRITERS)]
    begun_at = time.perf_counter()
    with suppress(TimeoutError):
        async with asyncio.timeout(DELIVERY_SECONDS), asyncio.TaskGroup() as tasks:
            for reader in readers:
                tasks.create_task(read(reader))
            for each in writers:
                tasks.create_task(write(each))
    taken = time.perf_counter() - begun_at
    for each in (writer, *writers, *readers):
        each.close()
    return seen / taken


async def measured(served: Served, seconds: float) -> Figures:
    """Give one round of a server; each scene has a new one."""

    async def scene(work: Callable[[int, str], Coroutine[object, object, float]]) -> float:
        async with running(served) as (port, root), asyncio.timeout(BOUND_SECONDS):
            return await work(port, root)

    return Figures(await scene(lambda port, root: appends(port, root, seconds)), await scene(catch_up), await scene(deliveries))


# The run


def ways(node: str, rakaia: str) -> list[Served]:
    """Give the servers that are there."""

    def streamkeep(port: int, folder: Path, storage: str = "memory://") -> Sequence[str]:
        return [sys.executable, "-c", STREAMKEEP, storage.replace("FOLDER", str(folder)), str(port)]

    found = [
        Served("streamkeep, memory", streamkeep),
        Served("streamkeep, SQLite `FULL`", lambda port, folder: streamkeep(port, folder, "sqlite:///FOLDER/streams.db")),
    ]
    if node:
        run = ["node", "--input-type=module", "-e", NODE, str(Path(node).resolve())]
        found += [
            Served("Node reference, memory", lambda port, _: [*run, str(port)]),
            Served("Node reference, file", lambda port, folder: [*run, str(port), str(folder / "data")]),
        ]
    if rakaia:
        command = [rakaia, "-m", "uvicorn", "rakaia:app", "--log-level", "error", "--no-access-log", "--port"]
        found.append(Served("rakaia, memory", lambda port, _: [*command, str(port)]))
    return found


def medians(rounds: Sequence[Figures]) -> Figures:
    """Give the median of each figure."""
    return Figures(
        statistics.median([each.appends for each in rounds]),
        statistics.median([each.megabytes for each in rounds]),
        statistics.median([each.deliveries for each in rounds]),
    )


def row(name: str, middle: Figures) -> str:
    """Give a server's figures as a row."""
    return f"| {name} | {middle.appends:,.0f} | {middle.megabytes:,.0f} | {middle.deliveries:,.0f} |"


def goals(middle: dict[str, Figures]) -> list[str]:
    """Say how far the goals are reached; none is said without the reference."""

    if "Node reference, file" not in middle:
        return []
    stored = middle["streamkeep, SQLite `FULL`"].appends / middle["Node reference, file"].appends
    delivered = middle["streamkeep, memory"].deliveries / middle["Node reference, memory"].deliveries
    return [
        f"appends, SQLite FULL beside the reference's file store: {stored:.1f} (goal: 5)",
        f"SSE deliveries beside the reference's memory store: {delivered:.1f} (goal: 2)",
    ]


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--node", default="", help="a folder in which npm has installed @durable-streams/server")
    parser.add_argument("--rakaia", default="", help="an interpreter that has rakaia-streams and uvicorn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="how long appends are counted")
    arguments = parser.parse_args()
    found = ways(arguments.node, arguments.rakaia)
    seen: dict[str, list[Figures]] = {served.name: [] for served in found}
    for _ in range(arguments.rounds):
        for served in found:
            seen[served.name].append(uvloop.run(measured(served, arguments.seconds)))
    middle = {name: medians(rounds) for name, rounds in seen.items()}
    print(HEADER, *(row(name, figures) for name, figures in middle.items()), "", *goals(middle), sep="\n")


if __name__ == "__main__":
    main()
