"""A reader process: it reads streams directly and through servers, changes from one to the other, and notes what it was given.

What it was reading when it was killed its next life goes on with. It asks for nothing twice and decides nothing: whether what
it was given was right is for the checker.
"""

import itertools
import random
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, aclosing
from typing import Final

import anyio
import httpx
from tests.http.servers import OFFSET, STREAM_ID, STREAMING
from tests.torture.journal import ENDED, Event, Journal, event_of
from tests.torture.stage import GRACE, LEASE, TTL, Part, Stage
from tests.torture.streams import BRIEF, DOOMED, FLOW, LASTING, recent_streams

from streamkeep import StorageError, StreamEventType, StreamInfo, StreamkeepError, StreamManager, StreamNotFoundError
from streamkeep.wire import Failure, GenkitDecoder, GenkitFrame, Message, SSEDecoder

READINGS: Final = 6
"""How many streams a reader reads at a time."""
TIMEOUT: Final = httpx.Timeout(3.0)
"""A server that is stopped sends nothing, not even heartbeats."""

Unfinished = tuple[str, tuple[str, int]]
Given = tuple[int, Event]
Source = Callable[[str, int], AsyncGenerator[Given]]


class _StumbledError(Exception):
    """This connection ended before the stream did."""


class EndedWithoutAnEndError(StreamkeepError):
    """A subscription ended although there was no terminal event."""


async def read(part: Part) -> None:
    """Play a reader until it is calm, which is when everything that it began to read has ended."""
    async with AsyncExitStack() as stack:
        streams = await stack.enter_async_context(StreamManager.connect(part.stage.url, ttl=TTL, lease=LEASE, grace=GRACE))
        http = await stack.enter_async_context(httpx.AsyncClient(timeout=TIMEOUT, verify=False, trust_env=False))
        reader = _Reader(part, streams, _Servers(part.stage, part.choices(), http))
        readings = await stack.enter_async_context(anyio.create_task_group())
        for unfinished in itertools.islice(itertools.chain(part.unfinished.items(), itertools.repeat(None)), READINGS):
            readings.start_soon(reader.run, unfinished)


class _Servers:
    """The servers that are up, as far as one knows, for a reader to read through."""

    def __init__(self, stage: Stage, choices: random.Random, http: httpx.AsyncClient) -> None:
        self._stage = stage
        self._random = choices
        self._http = http

    def _one(self) -> str:
        try:
            return self._random.choice(self._stage.servers.read_text().split())
        except (FileNotFoundError, IndexError):
            raise _StumbledError("no server") from None

    async def begin(self) -> AsyncGenerator[tuple[str, int, Event]]:
        """Have a server start a stream of its own; give its id with each event."""
        numbers = self._random.randrange(1, 120)
        async with self._http.stream("POST", f"{self._one()}/recite", headers=STREAMING, json={"data": numbers}) as answer:
            stream = answer.headers[STREAM_ID] if answer.is_success else ""
            async with aclosing(_frames(answer)) as given:
                async for offset, event in given:
                    yield stream, offset, event

    async def by_genkit(self, stream: str, after: int) -> AsyncGenerator[Given]:
        """Resume a stream as Genkit's clients do."""
        headers = {**STREAMING, STREAM_ID: stream} | ({OFFSET: str(after)} if after >= 0 else {})
        async with (
            self._http.stream("POST", f"{self._one()}/recite", headers=headers) as answer,
            aclosing(_frames(answer)) as given,
        ):
            async for one in given:
                yield one

    async def by_sse(self, stream: str, after: int) -> AsyncGenerator[Given]:
        """Read a stream as EventSource does."""
        headers = {"Last-Event-ID": str(after)} if after >= 0 else {}
        async with self._http.stream("GET", f"{self._one()}/streams/{stream}", headers=headers) as answer:
            _check(answer)
            decoder = SSEDecoder()
            last = ""
            async for packet in answer.aiter_bytes():
                for sent in decoder.feed(packet):
                    if sent.id == last and sent.event == StreamEventType.ERROR:
                        raise _StumbledError("this server's error")
                    last = sent.id
                    yield int(sent.id.rpartition("/")[2]), event_of(StreamEventType(sent.event), sent.data.encode())


async def _frames(answer: httpx.Response) -> AsyncGenerator[Given]:
    _check(answer)
    decoder = GenkitDecoder()
    async for packet in answer.aiter_bytes():
        for frame in decoder.feed(packet):
            if frame.offset is None:
                raise _StumbledError("this server's error")
            yield frame.offset, _event_of_frame(frame)


def _event_of_frame(frame: GenkitFrame) -> Event:
    if isinstance(frame, Failure):
        return Event(StreamEventType.ERROR, frame.error.status)
    return event_of(StreamEventType.CHUNK if isinstance(frame, Message) else StreamEventType.DONE, frame.data)


def _check(answer: httpx.Response) -> None:
    if answer.status_code in (204, 404):
        raise StreamNotFoundError("stream not found")
    if not answer.is_success:
        raise _StumbledError(f"HTTP {answer.status_code}")


class _Reading:
    """One stream, read once, in however many pieces."""

    def __init__(self, journal: Journal, name: str, stream: str, after: int) -> None:
        self.name = name
        self.stream = stream
        self.after = after
        self.is_over = False
        self._journal = journal
        journal.began(stream, name, after)

    def saw(self, offset: int, event: Event) -> None:
        """Note what was given."""
        self._journal.saw(self.stream, self.name, offset, event)
        self.after = offset
        if event.is_terminal:
            self.left(ENDED)

    def stumbled(self, why: Exception) -> None:
        """Note that this has to be tried again."""
        self._journal.stumbled(self.stream, self.name, str(why) if isinstance(why, _StumbledError) else type(why).__name__)

    def left(self, why: str) -> None:
        """Note that this is over."""
        self._journal.left(self.stream, self.name, why)
        self.is_over = True


class _Reader:
    def __init__(self, part: Part, streams: StreamManager, servers: _Servers) -> None:
        self._part = part
        self._random = part.choices()
        self._journal = Journal(part.journal)
        self._streams = streams
        self._servers = servers
        self._serial = itertools.count()

    async def run(self, unfinished: Unfinished | None) -> None:
        """Read one stream after the other, first the one that the last life did not finish."""
        if unfinished is not None:
            name, (stream, after) = unfinished
            await self._finish(_Reading(self._journal, name, stream, after))
        while not self._part.stage.is_calm:
            if self._random.random() < 0.1:
                await self._have_one_started()
            elif (info := await self._some_stream()) is not None:
                after = self._random.choice((-1, -1, self._somewhere_in(info)))
                await self._finish(_Reading(self._journal, self._name(), info.id, after))
            await anyio.sleep(self._random.uniform(0, 0.1))

    def _name(self) -> str:
        return f"{self._part.name}-{next(self._serial)}"

    async def _some_stream(self) -> StreamInfo | None:
        kind = self._random.choice((LASTING, LASTING, LASTING, BRIEF, DOOMED, FLOW))
        try:
            there = await recent_streams(self._streams, kind, self._random)
        except StorageError:
            return None
        if self._random.random() < 0.8:
            there = [info for info in there if info.status == "open"]
        return self._random.choice(there) if there else None

    def _somewhere_in(self, info: StreamInfo) -> int:
        return self._random.randrange(-1, max(0, info.tail - 1))

    async def _have_one_started(self) -> None:
        """Have a server start a stream, and read that to its end, wherever the answer to this comes to its own."""
        reading: _Reading | None = None
        try:
            async with aclosing(self._servers.begin()) as given:
                async for stream, offset, event in given:
                    reading = reading or _Reading(self._journal, self._name(), stream, -1)
                    reading.saw(offset, event)
        except (_StumbledError, httpx.HTTPError) as error:
            if reading is not None:
                reading.stumbled(error)
        if reading is not None:
            await self._finish(reading)

    async def _finish(self, reading: _Reading) -> None:
        while not reading.is_over:
            source = self._random.choice((self._directly, self._servers.by_sse, self._servers.by_genkit))
            try:
                await self._take(reading, source)
            except (_StumbledError, httpx.HTTPError, StorageError) as error:
                reading.stumbled(error)
                await anyio.sleep(self._random.uniform(0.02, 0.2))
            except StreamkeepError as error:
                reading.left(type(error).__name__)

    async def _take(self, reading: _Reading, source: Source) -> None:
        """Read from one source until the stream or the connection ends, or one has enough of it."""
        haste = self._random.choice((0, 0, 0, 0.02))
        async with aclosing(source(reading.stream, reading.after)) as given:
            async for offset, event in given:
                reading.saw(offset, event)
                if reading.is_over or self._random.random() < 0.01:
                    return
                await anyio.sleep(haste)
        raise _StumbledError("ended early")

    async def _directly(self, stream: str, after: int) -> AsyncGenerator[Given]:
        async with self._streams.subscribe(stream, None if after < 0 else after) as events:
            async for event in events:
                yield event.offset, event_of(event.type, event.data)
        raise EndedWithoutAnEndError
