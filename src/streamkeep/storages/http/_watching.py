"""The doorbells of a process, over few responses of the server's that never end.

A request says which streams are watched, and nothing is kept on the server, so any server may answer it. When there are more, the next
request is for those; and also for all of a response that has no more of them, which it replaces. So a thousand who come one after the
other are ten responses, and each of them was asked for ten times. Whatever a response begins with is rung: nobody else can know that the
last words of the one before have arrived.
"""

import asyncio
import random
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from typing import Final, Self

import httpx2
import msgspec

from streamkeep.storage import Doorbell
from streamkeep.storages._doorbells import Doorbells
from streamkeep.storages._http_messages import CONTENT_TYPE, HEARTBEAT_SECONDS

GATHER_SECONDS: Final = 0.01
"""How long those who begin to watch are waited for, so that a thousand of them are a few requests."""
FIRST_PAUSE_SECONDS: Final = 0.05
LONGEST_PAUSE_SECONDS: Final = 2.0
LINE_SECONDS: Final = 3 * HEARTBEAT_SECONDS
MAX_LINE_BYTES: Final = 32 << 20
"""More than a server says in a line, where it watches as much as it takes."""
AT_ONCE: Final = 10_000
"""How many streams a request names at most, beside those that it takes over."""


class Watching:
    """Gives out doorbells, and rings them; a task while it is entered."""

    def __init__(self, client: httpx2.AsyncClient, url: str) -> None:
        self._client = client
        self._url = url
        self._bells = Doorbells[str]()
        self._wanted = asyncio.Event()
        self._heard: dict[str, _Listener] = {}  # by stream: whoever hears of it
        self._listeners: set[_Listener] = set()

    async def __aenter__(self) -> Self:
        self._task = asyncio.get_running_loop().create_task(self._serve())
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        tasks = [self._task, *(listener.task for listener in self._listeners)]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

    @asynccontextmanager
    async def watch(self, stream: str) -> AsyncGenerator[Doorbell]:
        """See `Storage.watch`. It rings when the server has begun to watch: what was committed meanwhile may be from before."""
        async with self._bells.watch(stream) as doorbell:
            if stream not in self._heard:
                self._wanted.set()
            yield doorbell

    async def _serve(self) -> None:
        pause = FIRST_PAUSE_SECONDS
        while True:
            await self._wanted.wait()
            await asyncio.sleep(GATHER_SECONDS)
            self._wanted.clear()
            streams, replaced = self._due()
            if not streams or await self._listen(frozenset(streams)):
                pause = FIRST_PAUSE_SECONDS
                for listener in replaced:
                    listener.task.cancel()
            else:
                await asyncio.sleep(pause * random.uniform(0.5, 1))  # noqa: S311 - so that not all come back at once
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
                self._wanted.set()

    def _due(self) -> "tuple[set[str], list[_Listener]]":
        """Give what is to be listened to next, and which listeners are not needed then."""
        streams = {stream for stream in self._bells if stream not in self._heard}
        if len(streams) > AT_ONCE:
            streams = set(sorted(streams)[:AT_ONCE])
            self._wanted.set()
        replaced: list[_Listener] = []
        watched = {listener: self._watched(listener) for listener in self._listeners}
        for listener in sorted(watched, key=lambda listener: len(watched[listener])):
            if len(watched[listener]) <= len(streams) or listener.is_worn(len(watched[listener])):
                streams |= watched[listener]
                replaced.append(listener)
        return streams, replaced

    def _watched(self, listener: "_Listener") -> set[str]:
        return {stream for stream in listener.streams if stream in self._bells and self._heard.get(stream) is listener}

    async def _listen(self, streams: frozenset[str]) -> bool:
        """Return when the server watches these: True; or when it does not."""
        listener = _Listener(self, streams)
        self._listeners.add(listener)
        is_ready = await listener.begin(self._client, self._url)
        if not is_ready or listener not in self._listeners:
            return False
        self._heard.update(dict.fromkeys(streams, listener))
        self._bells.ring(streams)
        return True

    def rung(self, listener: "_Listener", streams: list[str]) -> None:
        """Ring the doorbells of these streams. Where most are not watched any more, the server need not watch them either."""
        self._bells.ring(streams)
        if not streams and listener.is_worn(len(self._watched(listener))):
            self._wanted.set()

    def lost(self, listener: "_Listener") -> None:
        """Begin anew with what is not heard of any more."""
        self._listeners.discard(listener)
        gone = [stream for stream in listener.streams if self._heard.get(stream) is listener]
        for stream in gone:
            del self._heard[stream]
        self._bells.ring(gone)  # they look, and are told by what they meet then
        if any(stream in self._bells for stream in gone):
            self._wanted.set()


class _Listener:
    """One response."""

    def __init__(self, watching: Watching, streams: frozenset[str]) -> None:
        self.streams = streams
        self._watching = watching

    def is_worn(self, watched: int) -> bool:
        """Say whether most of its streams are not among those that are watched."""
        return 2 * watched < len(self.streams)

    async def begin(self, client: httpx2.AsyncClient, url: str) -> bool:
        """Return when the server watches: True; or when it does not."""
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[bool] = loop.create_future()
        self.task = loop.create_task(self._listen(client, url, ready))
        return await ready

    async def _listen(self, client: httpx2.AsyncClient, url: str, ready: "asyncio.Future[bool]") -> None:
        timeout = httpx2.Timeout(5, read=LINE_SECONDS, pool=None)
        content = msgspec.msgpack.encode(sorted(self.streams))
        try:
            with suppress(httpx2.HTTPError, ValueError, TimeoutError):
                async with client.stream(
                    "POST", url, content=content, headers={"content-type": CONTENT_TYPE}, timeout=timeout
                ) as response:
                    if response.status_code != 200:
                        return
                    async for line in _lines(response):
                        streams = msgspec.json.decode(line, type=list[str])
                        if not ready.done():
                            ready.set_result(True)
                        self._watching.rung(self, streams)
        finally:
            if not ready.done():
                ready.set_result(False)
            self._watching.lost(self)


async def _lines(response: httpx2.Response) -> AsyncGenerator[bytes]:
    """Give an answer's lines. ValueError: one has no end. TimeoutError: one comes too slowly, or none."""
    line, searched = bytearray(), 0
    pieces = response.aiter_bytes()
    try:
        while True:
            async with asyncio.timeout(LINE_SECONDS):
                while (end := line.find(b"\n", searched)) < 0:
                    searched = len(line)
                    if not (piece := await anext(pieces, b"")):
                        return
                    line += piece
                    if len(line) > MAX_LINE_BYTES:
                        raise ValueError("the server has sent a line without an end")
            yield bytes(line[:end])
            del line[: end + 1]
            searched = 0
    finally:
        await pieces.aclose()
