"""Writers and readers over a server that is killed, stopped, restarted and cut off at random; every event says what it must be.

Each actor has a manager of its own, as a process would, and its way to the server is a bad network. A writer reads each stream of its own
when it is complete: it must be just what it was told. A reader leaves and comes back, and must find no gap and no repetition.
"""

import traceback
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from random import Random
from signal import SIGCONT, SIGSTOP
from typing import Final

import anyio
import anyio.to_thread
from tests.engines.engine import Engine
from tests.engines.load import BOUND_SECONDS, connected, stored
from tests.engines.suite import bad_way_to, kill_and_start
from tests.network.proxy import End, Fate, Network

from streamkeep import StreamEventType, StreamManager, StreamNotFoundError

DEEDS: Final = ("kill", "restart", "stop", "cut an answer", "cut a request", "stall")
WEIGHTS: Final = (3, 1, 1, 6, 3, 1)
STOPS: Final = (0.05, 0.5, 2.0, 6.0)
ADVANCE: Final = 10


@dataclass(slots=True)
class Actor:
    """A writer or a reader, and how far it has come."""

    name: str
    random: Random
    steps: int = 0


@dataclass(slots=True)
class Campaign:
    """Does so many deeds, one after the other, and sees that all go on after each.

    Attributes:
        counts: what was done, and what came of it.
        violations: what must not be.
    """

    engine: Engine
    rounds: int
    seed: int
    writers: int = 4
    readers: int = 4
    counts: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    _streams: list[str] = field(default_factory=list)
    _actors: list[Actor] = field(default_factory=list)
    _is_over: bool = False

    async def run(self) -> None:
        """Go through all of it."""
        random = Random(self.seed)
        async with bad_way_to(self.engine) as (network, url):
            with anyio.CancelScope() as scope:
                async with anyio.create_task_group() as tasks:
                    for number in range(self.writers):
                        tasks.start_soon(self._play, self._write, f"writer-{number}", url)
                    for number in range(self.readers):
                        tasks.start_soon(self._play, self._read, f"reader-{number}", url)
                    # Entering is told at once of a server that is not there: so first all are up.
                    await self._until(lambda: len(self._actors) == self.writers + self.readers)
                    for _ in range(self.rounds):
                        await anyio.sleep(random.expovariate(2))
                        if not self.violations:
                            await self._do(random, network)
                    self._is_over = True
                    scope.deadline = anyio.current_time() + 2 * BOUND_SECONDS
            if scope.cancelled_caught:
                self.violations.append("not all came to an end")

    async def _do(self, random: Random, network: Network) -> None:
        (deed,) = random.choices(DEEDS, WEIGHTS)
        self.counts[deed] += 1
        before = {actor.name: actor.steps for actor in self._actors}
        match deed:
            case "kill":
                await anyio.to_thread.run_sync(kill_and_start, self.engine)
            case "restart":
                await anyio.to_thread.run_sync(self.engine.restart)
            case "stop":
                self.engine.signal(SIGSTOP)
                await anyio.sleep(random.choice(STOPS))
                self.engine.signal(SIGCONT)
            case "stall":
                network.meet(Fate(End.STALL, random.randrange(50)))
            case _:
                end = random.choice([End.FIN, End.RST])
                network.meet(Fate(end, random.randrange(200), of_request=deed == "cut a request"))
        await self._all_advance(deed, before)

    async def _all_advance(self, deed: str, before: dict[str, int]) -> None:
        with anyio.move_on_after(BOUND_SECONDS):
            await self._until(lambda: all(actor.steps >= before[actor.name] + ADVANCE for actor in self._actors))
            return
        stuck = [actor.name for actor in self._actors if actor.steps < before[actor.name] + ADVANCE]
        self.violations.append(f"after {deed}: {', '.join(stuck)} did not go on")

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition() and not self.violations:  # noqa: ASYNC110 - all actors change it, all the time
            await anyio.sleep(0.02)

    async def _play(self, act: Callable[[StreamManager, Actor], Awaitable[None]], name: str, url: str) -> None:
        actor = Actor(name, Random(f"{self.seed} {name}"))
        try:
            async with connected(url) as streams:
                self._actors.append(actor)
                while not self._is_over and not self.violations:
                    await act(streams, actor)
        except Exception:
            self.violations.append(f"{name}: {traceback.format_exc()}")

    async def _write(self, streams: StreamManager, actor: Actor) -> None:
        stream = f"{actor.name}-{actor.steps}"
        count = actor.random.randrange(1, 400)
        async with _handle(streams, stream, self._streams) as write:
            for number in range(count):
                assert await write(_event(stream, number)) == number
                actor.steps += 1
                self.counts["chunks"] += 1
                await anyio.sleep(actor.random.choice([0, 0.001, 0.02]))
        chunks = [("chunk", number, b'"%s"' % _event(stream, number).encode()) for number in range(count)]
        assert await stored(streams, stream) == [*chunks, ("done", count, b"null")], stream
        self.counts["streams"] += 1
        self._streams.remove(stream)
        if actor.random.random() < 0.5:
            await streams.delete(stream)

    async def _read(self, streams: StreamManager, actor: Actor) -> None:
        if not self._streams:
            await anyio.sleep(0.01)
            return
        stream = actor.random.choice(self._streams)
        after: int | None = None
        try:
            while after is None or after >= 0:
                after = await self._read_some(streams, actor, stream, after)
                self.counts["readings"] += 1
        except StreamNotFoundError:
            self.counts["deleted under a reader"] += 1

    async def _read_some(self, streams: StreamManager, actor: Actor, stream: str, after: int | None) -> int:
        """Read until it has had enough, and give the last offset; -1 at the end of the stream."""
        enough = actor.random.randrange(1, 300)
        offset = -1 if after is None else after
        async with streams.subscribe(stream, after) as events:
            async for event in events:
                assert event.offset == offset + 1, f"{stream}: {event.offset} comes after {offset}"
                offset = event.offset
                actor.steps += 1
                if event.type is not StreamEventType.CHUNK:
                    assert event.type is StreamEventType.DONE, f"{stream}: {event}"
                    return -1
                assert event.chunk == _event(stream, offset), f"{stream}: {event}"
                enough -= 1
                if not enough:
                    return offset
        raise AssertionError(f"{stream} has ended without an end")


@asynccontextmanager
async def _handle(streams: StreamManager, stream: str, known: list[str]) -> AsyncGenerator[Callable[[object], Awaitable[int]]]:
    """Give how to write to a new stream; leaving it completes the stream."""
    async with streams.open(stream) as handle:
        known.append(stream)
        yield handle.write
        await handle.done()


def _event(stream: str, offset: int) -> str:
    return f"{stream} {offset}"
