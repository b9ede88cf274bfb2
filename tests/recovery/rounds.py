"""Rounds of kills: answers are read from two processes of an app, and one after the other is killed in the middle of them."""

import random
import signal
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import anyio
import httpx
import msgspec
from tests.deploy.servers import Server, running, until, uvicorn
from tests.recovery.provider import words_of
from tests.recovery.served import WAYS, Way

from streamkeep.wire import SSEDecoder

BOUND_SECONDS: Final = 120
READERS: Final = 2
"""Of each answer."""
PAUSE_SECONDS: Final = 0.1


@dataclass(eq=False)
class Reading:
    """What a reader of an answer has.

    Attributes:
        stream: the answer's id.
        events: each with its offset, its name and its data.
        is_over: whether it has the end.
    """

    stream: str
    events: list[tuple[int, str, Any]] = field(default_factory=list[tuple[int, str, Any]])
    is_over: bool = False
    last_id: str = ""

    def take(self, kind: str, data: str, id: str) -> None:
        self.last_id = id
        self.events.append((int(id.rpartition("/")[2]), kind, msgspec.json.decode(data)))
        self.is_over = kind in {"done", "error"}

    @property
    def recoveries(self) -> int:
        """How often it was told that the answer's writer was gone."""
        return sum(kind == "recovering" for _, kind, _ in self.events)

    def fault(self, question: str) -> str:
        """Say what is wrong with what it has been given; empty if nothing is."""
        offsets = [offset for offset, _, _ in self.events]
        first = offsets[0] if offsets else 0
        if offsets != list(range(first, first + len(offsets))):
            return f"{self.stream}: offsets {offsets}"
        if first and self.events[0][1] != "restarted":
            return f"{self.stream}: begins with {self.events[0]}"
        chunks: list[str] = []
        for _, kind, data in self.events:
            match kind:
                case "chunk":
                    chunks.append(data)
                case "restarted":
                    chunks.clear()
                case _:
                    pass
        if self.events[-1][1] != "done" or chunks != words_of(question):
            return f"{self.stream}: {self.events}"
        return ""


@dataclass(eq=False)
class Rounds:
    """A provider, and two processes of an app that uses it."""

    provider: Server
    servers: Sequence[Server]
    random: random.Random
    kills: int = 0
    stops: int = 0
    answers: int = 0
    recoveries: int = 0
    faults: list[str] = field(default_factory=list[str])

    async def round(self, kills: int, *, ways: Sequence[Way] = WAYS) -> None:
        """Ask, kill so many times while the answers come, and note what is wrong with what the readers have in the end."""
        number = self.answers
        asked: dict[str, Way] = {f"q{number}-{place}": way for place, way in enumerate(ways)}
        self.answers += len(asked)
        readings = [(question, Reading(f"{way}-{question}")) for question, way in asked.items() for _ in range(READERS)]
        with anyio.move_on_after(BOUND_SECONDS) as bound:
            async with anyio.create_task_group() as tasks:
                for question, way in asked.items():
                    await self._ask(self.random.choice(self.servers), way, question)
                for _, reading in readings:
                    tasks.start_soon(self._read, reading)
                for _ in range(kills):
                    seen = [len(reading.events) for _, reading in readings]
                    await until(partial(_all_have_more, readings, seen))
                    if all(reading.is_over for _, reading in readings):
                        break
                    await self._end(self.random.choice(self.servers))
        if bound.cancelled_caught:
            self.faults.append(f"round at {number}: not over: {[r.stream for _, r in readings if not r.is_over]}")
        self.faults += [fault for question, reading in readings if reading.is_over and (fault := reading.fault(question))]
        self.recoveries += sum(reading.recoveries for _, reading in readings[::READERS])

    async def generations(self) -> dict[str, int]:
        """Give how often the provider's model was asked each question."""
        async with httpx.AsyncClient(base_url=self.provider.url) as http:
            return dict((await http.get("/generations")).json())

    async def _end(self, server: Server) -> None:
        """Kill a process, or have it stop, and start another one in its place."""
        if self.random.random() < 0.2:
            self.stops += 1
            server.signal(signal.SIGTERM)
            await server.exit_code()
        else:
            self.kills += 1
            server.kill()
        await server.start()

    async def _ask(self, server: Server, way: Way, question: str) -> None:
        async with (
            httpx.AsyncClient(base_url=server.url, timeout=BOUND_SECONDS) as http,
            http.stream("POST", f"/ask/{way}/{question}") as response,
        ):
            response.raise_for_status()  # and it leaves

    async def _read(self, reading: Reading) -> None:
        while not reading.is_over:
            server = self.random.choice(self.servers)
            headers = {"last-event-id": reading.last_id} if reading.last_id else {}
            try:
                async with (
                    httpx.AsyncClient(base_url=server.url, timeout=BOUND_SECONDS) as http,
                    http.stream("GET", f"/answers/{reading.stream}", headers=headers) as response,
                ):
                    decoder = SSEDecoder()
                    async for data in response.aiter_bytes():
                        for event in decoder.decode(data):
                            if event.id and event.id != reading.last_id:
                                reading.take(event.event, event.data, event.id)
            except httpx.TransportError:
                pass  # killed, or not up again yet
            await anyio.sleep(PAUSE_SECONDS)


def _all_have_more(readings: Sequence[tuple[str, Reading]], than: Sequence[int]) -> bool:
    return all(reading.is_over or len(reading.events) > before for before, (_, reading) in zip(than, readings, strict=True))


@asynccontextmanager
async def rounds(directory: Path, seed: int) -> AsyncGenerator[Rounds]:
    """Run the provider and the app's two processes below a directory."""
    kind, database = uvicorn(), directory / "streams.db"
    factory = "from tests.recovery.provider import provider\n\napp = provider()\n"
    async with running(kind, directory / "provider", factory) as provider:
        app = f"from tests.recovery.served import app_of\n\napp = app_of({provider.url!r})\n"
        async with (
            running(kind, directory / "one", app, database=database) as one,
            running(kind, directory / "two", app, database=database) as two,
        ):
            yield Rounds(provider, (one, two), random.Random(seed))
