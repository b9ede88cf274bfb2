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
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec
from tests.engines.process import Process, free_port
from tests.engines.running import ENGINES, Empty

from benchmarks import page
from benchmarks.answer import PER_SECOND
from benchmarks.load import Seen, Task
from benchmarks.work import REPLAYED, counted, folder

HEADER = "| work | unit | streamkeep | bare | ratio | the clients' share of a core |\n|---|---|---:|---:|---:|---:|"
ROOT = Path(__file__).parent.parent
LOAD_SECONDS = 120
LOG_SHOWN = 4_000
PEERS = ("fastapi-resumable-stream", "assistant-stream")
"""See `benchmarks.peers`, which needs an interpreter that has them."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A number that is read from what was seen."""

    unit: str
    of: Callable[[Seen], float]
    digits: int = 0


@dataclass(frozen=True, slots=True)
class Row:
    """What one way of serving a scene comes to, and the bare app: medians.

    Attributes:
        share: the most that the clients have used of a core in any round.
    """

    scene: str
    way: str
    figure: Figure
    ours: float
    bare: float
    ratio: float
    share: float

    def __str__(self) -> str:
        mine, theirs = (f"{value:,.{self.figure.digits}f}" for value in (self.ours, self.bare))
        return f"| {self.scene}, {self.way} | {self.figure.unit} | {mine} | {theirs} | {self.ratio:.2f} | {self.share:.0%} |"


@dataclass(frozen=True, slots=True)
class Scene:
    """What clients do, over which storages, and what is read from that. A server's port and process are not known yet."""

    name: str
    task: Task
    storages: Sequence[str]
    figures: Sequence[Figure]
    has_peers: bool = False


@dataclass(frozen=True, slots=True)
class Servers:
    """Where each way of serving is begun: a new process for each measurement. `peers`: an interpreter that has the other libraries."""

    empty_redis: Empty
    peers: str

    def rows(self, scene: Scene, rounds: int) -> Iterator[Row]:
        """Measure each way and the bare app in turn, and give a row for each way and figure."""
        ways = [*scene.storages, *(PEERS if scene.has_peers and self.peers else ()), "bare"]
        seen: dict[str, list[Seen]] = {way: [] for way in ways}
        for _ in range(rounds):
            for way in ways:
                seen[way].append(self._measure(way, scene))
        for way in ways[:-1]:
            share = max(each.load / each.seconds for each in [*seen[way], *seen["bare"]])
            for figure in scene.figures:
                ours, bare = ([figure.of(each) for each in seen[one]] for one in (way, "bare"))
                ratio = statistics.median(one / other if other else 0.0 for one, other in zip(ours, bare, strict=True))
                yield Row(scene.name, way, figure, statistics.median(ours), statistics.median(bare), ratio, share)

    def _measure(self, way: str, scene: Scene) -> Seen:
        with folder() as path:
            port = free_port()
            server = Process(
                self._command(way, port, path), path / "server", partial(answers, port), environment={"PYTHONPATH": str(ROOT)}
            )
            task = msgspec.structs.replace(scene.task, port=port, pid=server.start().pid)
            try:
                load = [sys.executable, "-m", "benchmarks.load", msgspec.json.encode(task).decode()]
                done = subprocess.run(load, cwd=ROOT, capture_output=True, timeout=LOAD_SECONDS, check=False)
            finally:
                server.kill()
            if done.returncode:
                raise RuntimeError(f"{scene.name}, {way}: {done.stderr.decode()}\nThe server: {server.log[-LOG_SHOWN:]}")
        return msgspec.json.decode(done.stdout, type=Seen)

    def _command(self, way: str, port: int, path: Path) -> Sequence[str]:
        if way in PEERS:
            return [self.peers, "-m", "benchmarks.peers", str(port), way, self.empty_redis().url.partition("?")[0]]
        urls = {"bare": "bare", "memory": "memory://", "SQLite `FULL`": f"sqlite:///{path / 'streams.db'}"}
        url = urls[way] if way in urls else self.empty_redis().url
        return [sys.executable, "-m", "benchmarks.served", str(port), url]


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
    late = [
        Figure("ms until it is read, median", lambda seen: 1e3 * seen.latencies[0], 2),
        Figure("ms until it is read, 99 %", lambda seen: 1e3 * seen.latencies[1], 2),
    ]
    scenes: list[Scene] = []
    for answers in (200, 400):
        asked = task("POST /answer", answers)
        name = f"{asked.clients} answers that ask for {counted(asked.clients * PER_SECOND, 'event')}/s"
        scenes.append(Scene(name, asked, everywhere, [cost, delivered], has_peers=True))
    for readers, per_second in ((100, 50), (1_000, 10)):
        live = task("GET /live", readers, begin=f"POST /live/{per_second}")
        # A thousand who come make some 200,000 objects, and Python looks once through all of them: 0.1 s, which is not what an event takes.
        live = msgspec.structs.replace(live, is_dated=readers == 1_000, warm_seconds=3 * warm)
        figures = [cost, *late] if live.is_dated else [cost]
        scenes.append(Scene(f"one stream live to {counted(live.clients, 'reader')}", live, ["SQLite `FULL`"], figures))
    few = msgspec.structs.replace(task("POST /dated", 20), is_dated=True)
    scenes.append(Scene(counted(few.clients, "answer"), few, everywhere, late))
    replay = msgspec.structs.replace(task("GET /kept", 100), seconds=0.0)
    name = f"replay of {REPLAYED:,} to {counted(replay.clients, 'reader')}"
    scenes.append(Scene(name, replay, ["memory", "SQLite `FULL`"], [replayed]))
    idle = task("GET /idle", 5_000)
    came_later = idle.clients - idle.early
    each = Figure("KiB", lambda seen: seen.grown_bytes / 1_024 / came_later, 1)
    scenes.append(Scene("an idle connection", idle, ["SQLite `FULL`"], [each]))
    return scenes


def print_rows(rounds: int, *, quick: bool, peers: str = "") -> Sequence[Row]:
    """Measure all, print a table, and give its rows."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # for a thousand clients; the processes inherit it
    print(HEADER)
    rows: list[Row] = []
    with ENGINES["redis"]() as empty_redis:
        for scene in all_scenes(quick=quick):
            for row in Servers(empty_redis, peers).rows(scene, rounds):
                print(row, flush=True)
                rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.over_http", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="how many times each is measured (7)")
    parser.add_argument("--quick", action="store_true", help="a tenth of the clients, and a second of each")
    parser.add_argument("--peers", default="", metavar="PYTHON", help="an interpreter that has what `benchmarks.peers` wants")
    parser.add_argument(
        "--page", action="store_true", help="put the table, and plots of it, into docs/explanation/performance.md"
    )
    options = parser.parse_args()
    rows = print_rows(options.rounds, quick=options.quick, peers=options.peers)
    if options.page:
        page.write([HEADER, *map(str, rows)], charts_of(rows))


def charts_of(rows: Sequence[Row]) -> Iterator[tuple[str, str, Sequence[tuple[str, float]]]]:
    """Give what is drawn: a name, a title, and bars."""
    for name, figure in dict.fromkeys((row.scene, row.figure.unit) for row in rows):
        those = [row for row in rows if (row.scene, row.figure.unit) == (name, figure)]
        yield name, f"{name}: {figure}", [("bare", those[0].bare), *((row.way, row.ours) for row in those)]


if __name__ == "__main__":
    main()
