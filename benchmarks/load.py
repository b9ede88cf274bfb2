"""`python -m benchmarks.load JSON`: clients over HTTP, in a process of their own; what they have seen, and what it cost, as JSON.

It does as little as it can for each event, to be no bottleneck: it looks for the line that each event has, and counts.
"""

import asyncio
import os
import re
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import uvloop

MARK = b"\ndata: "
DATE = re.compile(rb'"at":([0-9.]+)')
GIVE_UP_SECONDS = 60.0


class Task(msgspec.Struct, frozen=True):
    """What clients are to do.

    Attributes:
        port: the server's.
        pid: the server's; its costs are read from the system.
        request: each client's, such as `GET /live`.
        clients: how many there are.
        begin: a request that is made when all are there; empty: none.
        warm_seconds: how long nothing is measured then.
        seconds: how long is measured; 0: until all answers have ended.
        is_dated: whether each event says when it was given, and latencies are wanted.
    """

    port: int
    pid: int
    request: str
    clients: int
    begin: str = ""
    warm_seconds: float = 0.0
    seconds: float = 0.0
    is_dated: bool = False

    @property
    def early(self) -> int:
        """How many come before the others, after which a server's memory grows by what a connection holds alone."""
        return max(1, self.clients // 10)


class Seen(msgspec.Struct, frozen=True):
    """What was seen while it was measured; costs are seconds of a processor."""

    events: int
    seconds: float
    server: float
    load: float
    grown_bytes: int
    """By how much the server's memory has grown while all but the early clients came."""
    latencies: tuple[float, float] = (0.0, 0.0)
    """Seconds from an event's being given to its being here: the median, and what one in a hundred takes longer than."""


@dataclass(slots=True)
class Tally:
    """What all clients have seen."""

    begun: int = 0
    ended: int = 0
    events: int = 0
    latencies: list[float] = field(default_factory=list)


class Client(asyncio.Protocol):
    """Asks for one answer."""

    def __init__(self, tally: Tally, *, is_dated: bool = False) -> None:
        self._tally = tally
        self._is_dated = is_dated
        self._rest = b""

    def data_received(self, data: bytes) -> None:
        if not self._rest:
            self._tally.begun += 1
        seen = self._rest + data
        self._tally.events += seen.count(MARK)
        self._rest = seen[1 - len(MARK) :]
        if self._is_dated:
            now = time.monotonic()
            self._tally.latencies.extend(now - float(date) for date in DATE.findall(data))

    def connection_lost(self, exc: Exception | None) -> None:
        self._tally.ended += 1


def processor_seconds(pid: int) -> float:
    """Give what a process has used of processors so far; of another one, as `clock_getcpuclockid` of Linux does."""
    return time.clock_gettime(~pid << 3 | 2)


def memory(pid: int) -> int:
    """Give a process's resident memory in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def until(count: int, seen: str, tally: Tally) -> None:
    """Wait for so many to have begun, or ended."""
    async with asyncio.timeout(GIVE_UP_SECONDS):
        while getattr(tally, seen) < count:  # noqa: ASYNC110 - to count is all that a client has time for
            await asyncio.sleep(0.002)


class Load:
    """Clients, while they are connected."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._transports: list[asyncio.WriteTransport] = []
        self.tally = Tally()

    async def connect(self, count: int, *, asks: bool = True) -> None:
        """Connect more of them, and have each ask at once, or not yet."""
        for _ in range(count):
            transport, _client = await asyncio.get_running_loop().create_connection(
                lambda: Client(self.tally, is_dated=self._task.is_dated), "127.0.0.1", self._task.port
            )
            self._transports.append(transport)
            if asks:
                ask(transport, self._task.request)

    def ask(self) -> None:
        for transport in self._transports:
            ask(transport, self._task.request)

    async def begin(self) -> None:
        """Make the request after which something comes."""
        other = Load(self._task)
        await other.connect(1, asks=False)
        ask(other._transports[0], self._task.begin)
        await until(1, "ended", other.tally)


def ask(transport: asyncio.WriteTransport, request: str) -> None:
    transport.write(f"{request} HTTP/1.1\r\nhost: benchmark\r\ncontent-length: 0\r\nconnection: close\r\n\r\n".encode())


async def run(task: Task) -> Seen:
    load = Load(task)
    grown = 0
    if task.seconds:
        await load.connect(task.early)
        await until(task.early, "begun", load.tally)
        before = memory(task.pid)
        await load.connect(task.clients - task.early)
        await until(task.clients, "begun", load.tally)
        grown = memory(task.pid) - before
        if task.begin:
            await load.begin()
        await asyncio.sleep(task.warm_seconds)
    else:
        await load.connect(task.clients, asks=False)
    load.tally.latencies.clear()
    events, at, server, own = load.tally.events, time.perf_counter(), processor_seconds(task.pid), time.process_time()
    if task.seconds:
        await asyncio.sleep(task.seconds)
        assert not load.tally.ended, f"{load.tally.ended} answers have ended"
    else:
        load.ask()
        await until(task.clients, "ended", load.tally)
    return Seen(
        load.tally.events - events,
        time.perf_counter() - at,
        processor_seconds(task.pid) - server,
        time.process_time() - own,
        grown,
        _percentiles(load.tally.latencies),
    )


def _percentiles(latencies: list[float]) -> tuple[float, float]:
    if len(latencies) < 2:
        return (0.0, 0.0)
    hundredths = statistics.quantiles(latencies, n=100)
    return (hundredths[49], hundredths[98])


def main() -> None:
    seen = uvloop.run(run(msgspec.json.decode(sys.argv[1], type=Task)))
    print(msgspec.json.encode(seen).decode(), flush=True)
    os._exit(0)  # connections that are open are nobody's business now


if __name__ == "__main__":
    main()
