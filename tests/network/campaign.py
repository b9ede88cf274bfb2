"""Random cuts: four clients read streams that are complete or being written, and come back until each has its stream whole.

All choices come from one seed. What they meet does not, such as how far a writer has come when a connection is cut: a seed
repeats a campaign's cuts, not its schedule.
"""

import random
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import anyio
from anyio.abc import TaskGroup
from playwright.async_api import Page
from tests.http.servers import until
from tests.inside import feeds_of
from tests.network.proxy import End, Fate, Network
from tests.network.readers import (
    HANG,
    Outcome,
    Reader,
    all_read,
    chromium_page,
    read_by_curl,
    read_by_event_source,
    read_by_genkit,
    read_by_httpx,
    read_flow_by_curl,
)
from tests.network.served import FLOW, complaint_about, over_bad_network, write_stream

from streamkeep import StreamManager

MOST_CHUNKS: Final = 40
MOST_CUTS: Final = 6
HEAD_BYTES: Final = 360
CHUNK_BYTES: Final = 90
REQUEST_BYTES: Final = 200
"""About how long the head of an answer, a chunk in it, and a request are."""
LANDMARKS: Final = (
    b"HTTP/1.1 2",
    b"\r\n\r\n",
    b"retry: ",
    b"data",
    b'"text":"',
    b"\\ud83",
    b"\n",
    b"\n\n",
    b"told",
    b"0\r\n\r\n",
)
SILENCE_SECONDS: Final = 1.0
PAGE_SILENCE_SECONDS: Final = 4.0
"""More than an EventSource takes to come back by itself."""
PAUSE_SECONDS: Final = 0.02
TRIES: Final = 20


@dataclass(frozen=True, slots=True)
class Reading:
    """What one client is to read, and what it will meet."""

    url: str
    chunks: int
    fates: Sequence[Fate]
    stream: str | None = None
    """None: the client starts a flow itself."""
    flow: str = FLOW
    """The path of the flow to which the stream belongs."""


@dataclass(slots=True)
class Tally:
    """What came of it."""

    streams: int = 0
    chunks: int = 0
    duplicates: int = 0
    gaps: int = 0
    clear_errors: int = 0
    hangs: int = 0
    reopened: int = 0
    complaints: list[str] = field(default_factory=list[str])

    def add(self, client: str, reading: Reading, outcome: Outcome) -> None:
        """Judge what a client has read."""
        numbers = Counter(chunk["n"] for chunk in outcome.chunks)
        self.streams += 1
        self.chunks += numbers.total()
        self.duplicates += numbers.total() - len(numbers)
        self.gaps += len(set(range(max(numbers, default=0))) - set(numbers))
        self.clear_errors += outcome.error not in (None, HANG)
        self.hangs += outcome.error == HANG
        self.reopened += outcome.reopened
        complaint = complaint_about(outcome, reading.chunks)
        if complaint is None and outcome.error and (reading.stream or outcome.stream):
            complaint = f"it gave up, though it knew the stream's id: {outcome.error}"
        if complaint:
            self.complaints.append(f"{client} over {reading.fates}: {complaint}")


def random_fate(choices: random.Random, chunks: int) -> Fate:
    """Give a fate that an exchange with an answer of so many chunks will probably meet."""
    of_request = choices.random() < 0.05
    anywhere = choices.randrange(HEAD_BYTES + chunks * CHUNK_BYTES)
    places: list[int | bytes] = [0, choices.randrange(HEAD_BYTES), choices.choice(LANDMARKS), anywhere, anywhere]
    return Fate(
        end=choices.choices([End.FIN, End.RST, End.STALL], [10, 10, 1])[0],
        after=choices.randrange(REQUEST_BYTES) if of_request else choices.choice(places),
        of_request=of_request,
        piece=choices.choice([0, 0, 1, choices.randint(2, 50)]),
        down_seconds=choices.choice([0, 0, 0, 0.05]),
    )


async def _read_with_genkit(_: Page, readings: Sequence[Reading]) -> list[Outcome]:
    silence_ms = round(SILENCE_SECONDS * 1000)
    return await read_by_genkit(
        [
            {
                "url": f"{reading.url}{reading.flow}",
                "input": reading.chunks,
                "streamId": reading.stream,
                "silenceMs": silence_ms,
                "tries": TRIES,
            }
            for reading in readings
        ]
    )


async def _read_with_event_source(page: Page, readings: Sequence[Reading]) -> list[Outcome]:
    urls = [f"{reading.url}/streams/{reading.stream}" for reading in readings]
    return await read_by_event_source(page, urls, silence_seconds=PAGE_SILENCE_SECONDS)


async def _read_with_curl(_: Page, readings: Sequence[Reading]) -> list[Outcome]:
    def reader(number: int, reading: Reading) -> Reader:
        if reading.stream is None or number % 2:
            return partial(read_flow_by_curl, f"{reading.url}{reading.flow}", reading.chunks, reading.stream, SILENCE_SECONDS)
        url = f"{reading.url}/streams/{reading.stream}"
        return partial(read_by_curl, url, by_header=number % 4 == 0, silence_seconds=SILENCE_SECONDS)

    return await all_read([reader(number, reading) for number, reading in enumerate(readings)])


async def _read_with_httpx(_: Page, readings: Sequence[Reading]) -> list[Outcome]:
    return await all_read(
        [
            partial(read_by_httpx, f"{reading.url}/streams/{reading.stream}", silence_seconds=SILENCE_SECONDS)
            for reading in readings
        ]
    )


Client = Callable[[Page, Sequence[Reading]], Awaitable[list[Outcome]]]
CLIENTS: Final[dict[str, tuple[Client, bool]]] = {
    "genkit": (_read_with_genkit, True),
    "EventSource": (_read_with_event_source, False),
    "curl": (_read_with_curl, True),
    "httpx": (_read_with_httpx, False),
}
"""Each client, and whether it starts flows too."""


class Campaign:
    """Four clients and a server with a bad network between them."""

    def __init__(self, seed: int, streams: StreamManager, network: Network, page: Page) -> None:
        self.tally = Tally()
        self._choices = random.Random(seed)
        self._streams = streams
        self._network = network
        self._page = page

    @property
    def cuts(self) -> int:
        """How many connections have been cut."""
        return self._network.struck[End.FIN] + self._network.struck[End.RST]

    def counts(self) -> dict[str, int]:
        """Give what is reported."""
        tally = self.tally
        return {
            "cuts": self.cuts,
            "stalls": self._network.struck[End.STALL],
            "resumes": self._network.connections - tally.streams,
            "streams": tally.streams,
            "chunks": tally.chunks,
            "duplicates": tally.duplicates,
            "gaps": tally.gaps,
            "clear_errors": tally.clear_errors,
            "reopened_by_page": tally.reopened,
            "hangs": tally.hangs,
        }

    async def round(self, readings_each: int) -> None:
        """Have each client read so many streams, all at once."""
        async with anyio.create_task_group() as tasks:
            for client, (_, starts_flows) in CLIENTS.items():
                kinds = ("complete", "live", "flow") if starts_flows else ("complete", "live")
                readings = [await self._reading(self._choices.choice(kinds), tasks) for _ in range(readings_each)]
                tasks.start_soon(read_and_judge, self.tally, client, self._page, readings)
        await until(lambda: not feeds_of(self._streams))

    async def _reading(self, kind: str, tasks: TaskGroup) -> Reading:
        choices = self._choices
        chunks = choices.randint(1, MOST_CHUNKS)
        fates = [random_fate(choices, chunks) for _ in range(choices.randint(1, MOST_CUTS))]
        if kind == "flow":
            return Reading(self._network.path(fates), chunks, fates)
        stream = f"{kind}-{choices.getrandbits(64):x}"
        connected = anyio.Event()
        writing = partial(write_stream, self._streams, stream, chunks, route=FLOW, owner="")
        if kind == "live":
            await tasks.start(partial(writing, when=connected, pause_seconds=PAUSE_SECONDS))
        else:
            await writing()
        return Reading(self._network.path(_telling(connected, fates)), chunks, fates, stream)


async def read_and_judge(tally: Tally, client: str, page: Page, readings: Sequence[Reading]) -> None:
    """Have a client read, and add to the tally what it has."""
    read, _ = CLIENTS[client]
    for reading, outcome in zip(readings, await read(page, readings), strict=True):
        tally.add(client, reading, outcome)


def _telling(connected: anyio.Event, fates: Iterable[Fate]) -> Iterator[Fate]:
    """Give the fates, and say when the first connection asks for its own."""
    connected.set()
    yield from fates


@asynccontextmanager
async def campaign(seed: int, chromium: str) -> AsyncGenerator[Campaign]:
    """Give a campaign with a server, a network and a browser of its own."""
    async with (
        over_bad_network() as (streams, network),
        chromium_page(chromium, f"{network.url}/openapi.json") as page,
    ):
        yield Campaign(seed, streams, network, page)
