"""`python -m benchmarks.over_http`: what an event costs a server that streams over HTTP, beside the same app without durability.

Three processes: this one; the server, `benchmarks.served`, a new one for each measurement; and the clients, `benchmarks.load`. What the
server has used of processors is read from the system (Linux): a busy machine disturbs that less than it does how many were delivered.
"""

import argparse
import resource
import socket
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec
from tests.engines.process import Process, free_port
from tests.engines.running import ENGINES, Empty

from benchmarks.load import Seen, Task
from benchmarks.served import PER_SECOND
from benchmarks.work import REPLAYED, counted, folder

HEADER = "| work | unit | streamkeep | bare | ratio | the clients' share of a core |\n|---|---|---:|---:|---:|---:|"
ROOT = Path(__file__).parent.parent
LOAD_SECONDS = 120


@dataclass(frozen=True, slots=True)
class Figure:
    """A number that is read from what was seen."""

    unit: str
    of: Callable[[Seen], float]
    digits: int = 0


@dataclass(frozen=True, slots=True)
class Scene:
    """What clients do, over which storages, and what is read from that. A server's port and process are not known yet."""

    name: str
    task: Task
    storages: Sequence[str]
    figures: Sequence[Figure]

    def print(self, rounds: int, empty_redis: Empty) -> None:
        """Measure each storage and the bare app in turn, and print a row for each storage and figure, with medians."""
        ways = [*self.storages, "bare"]
        seen: dict[str, list[Seen]] = {way: [] for way in ways}
        for _ in range(rounds):
            for way in ways:
                seen[way].append(self._measure(way, empty_redis))
        for storage in self.storages:
            for figure in self.figures:
                ours, bare = ([figure.of(each) for each in seen[way]] for way in (storage, "bare"))
                mine, theirs = (f"{statistics.median(some):,.{figure.digits}f}" for some in (ours, bare))
                ratio = statistics.median(one / other if other else 0.0 for one, other in zip(ours, bare, strict=True))
                share = max(each.load / each.seconds for each in [*seen[storage], *seen["bare"]])
                print(f"| {self.name}, {storage} | {figure.unit} | {mine} | {theirs} | {ratio:.2f} | {share:.0%} |", flush=True)

    def _measure(self, way: str, empty_redis: Empty) -> Seen:
        with folder() as path:
            urls = {"bare": "bare", "memory": "memory://", "SQLite `FULL`": f"sqlite:///{path / 'streams.db'}"}
            url = urls[way] if way in urls else empty_redis().url
            port = free_port()
            command = [sys.executable, "-m", "benchmarks.served", str(port), url]
            server = Process(command, path / "server", partial(answers, port), environment={"PYTHONPATH": str(ROOT)})
            task = msgspec.structs.replace(self.task, port=port, pid=server.start().pid)
            try:
                load = [sys.executable, "-m", "benchmarks.load", msgspec.json.encode(task).decode()]
                done = subprocess.run(load, cwd=ROOT, capture_output=True, timeout=LOAD_SECONDS, check=False)
            finally:
                server.kill()
            if done.returncode:
                raise RuntimeError(f"{self.name}, {way}: {done.stderr.decode()}\nThe server: {server.log}")
        return msgspec.json.decode(done.stdout, type=Seen)


def answers(port: int) -> bool:
    """Say whether a server listens."""
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def all_scenes(*, quick: bool) -> Sequence[Scene]:
    scale, warm, seconds = (0.1, 0.5, 1.0) if quick else (1.0, 1.0, 3.0)

    def task(request: str, clients: int, *, begin: str = "") -> Task:
        return Task(0, 0, request, int(clients * scale), begin, warm, seconds)

    cost = Figure("µs of CPU an event", lambda seen: 1e6 * seen.server / seen.events, 1)
    delivered = Figure("events/s", lambda seen: seen.events / seen.seconds)
    replayed = Figure("events a second of CPU", lambda seen: seen.events / seen.server)
    everywhere = ["memory", "SQLite `FULL`", "Redis"]
    scenes: list[Scene] = []
    for answers in (200, 400):
        asked = task("POST /answer", answers)
        name = f"{asked.clients} answers that ask for {counted(asked.clients * PER_SECOND, 'event')}/s"
        scenes.append(Scene(name, asked, everywhere, [cost, delivered]))
    for readers, per_second in ((100, 50), (1_000, 10)):
        live = task("GET /live", readers, begin=f"POST /live/{per_second}")
        scenes.append(Scene(f"one stream live to {counted(live.clients, 'reader')}", live, ["SQLite `FULL`"], [cost]))
    replay = msgspec.structs.replace(task("GET /kept", 100), seconds=0.0)
    name = f"replay of {REPLAYED:,} to {counted(replay.clients, 'reader')}"
    scenes.append(Scene(name, replay, ["memory", "SQLite `FULL`"], [replayed]))
    idle = task("GET /idle", 1_000)
    came_later = idle.clients - idle.early
    each = Figure("KiB", lambda seen: seen.grown_bytes / 1_024 / came_later, 1)
    scenes.append(Scene("an idle connection", idle, ["SQLite `FULL`"], [each]))
    return scenes


def print_rows(rounds: int, *, quick: bool) -> None:
    """Measure all, and print a table."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # for a thousand clients; the processes inherit it
    print(HEADER)
    with ENGINES["redis"]() as empty_redis:
        for scene in all_scenes(quick=quick):
            scene.print(rounds, empty_redis)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.over_http", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="how many times each is measured (7)")
    parser.add_argument("--quick", action="store_true", help="a tenth of the clients, and a second of each")
    options = parser.parse_args()
    print_rows(options.rounds, quick=options.quick)


if __name__ == "__main__":
    main()
