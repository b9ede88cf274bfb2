"""The doorbells of a process, over one response of the server's that never ends.

A request says which streams are watched. When there are more, another one with all of them takes its place: nothing is kept on the server,
so any server may answer the next one. What is not known to have been watched all the time is rung.
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
from streamkeep.storages.http._messages import CONTENT_TYPE, HEARTBEAT_SECONDS

GATHER_SECONDS: Final = 0.01
"""How long those who begin to watch are waited for, so that a thousand of them are a few requests."""
FIRST_PAUSE_SECONDS: Final = 0.05
LONGEST_PAUSE_SECONDS: Final = 2.0


class Watching:
    """Gives out doorbells, and rings them; a task while it is entered."""

    def __init__(self, client: httpx2.AsyncClient, url: str) -> None:
        self._client = client
        self._url = url
        self._bells = Doorbells[str]()
        self._wanted = asyncio.Event()
        self._heard: _Listener | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.get_running_loop().create_task(self._serve())
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        tasks = [self._task] if self._heard is None else [self._task, self._heard.task]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

    @asynccontextmanager
    async def watch(self, stream: str) -> AsyncGenerator[Doorbell]:
        """See `Storage.watch`. It rings when the server has begun to watch: what was committed meanwhile may be from before."""
        async with self._bells.watch(stream) as doorbell:
            if self._heard is None or stream not in self._heard.streams:
                self._wanted.set()
            yield doorbell

    async def _serve(self) -> None:
        pause = FIRST_PAUSE_SECONDS
        while True:
            await self._wanted.wait()
            await asyncio.sleep(GATHER_SECONDS)
            self._wanted.clear()
            if not self._bells:
                continue
            before, listener = self._heard, _Listener(self, frozenset(self._bells))
            if await listener.begin(self._client, self._url) and not listener.task.done():
                pause = FIRST_PAUSE_SECONDS
                self._heard = listener
                self._bells.ring(listener.streams - before.streams if before and not before.task.done() else listener.streams)
                if before is not None:
                    before.task.cancel()
            else:
                await asyncio.sleep(pause * random.uniform(0.5, 1))  # noqa: S311 - so that not all come back at once
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
                self._wanted.set()

    def rung(self, listener: "_Listener", streams: list[str]) -> None:
        """Ring the doorbells of these streams. Where most are not watched any more, the server need not be either."""
        self._bells.ring(streams)
        if not streams and listener is self._heard and not self._bells:
            listener.task.cancel()

    def lost(self, listener: "_Listener") -> None:
        """Begin anew, if that was the one which was listened to."""
        if listener is self._heard:
            self._heard = None
            self._bells.ring_all()  # they look, and are told by what they meet then
            self._wanted.set()


class _Listener:
    """One response."""

    def __init__(self, watching: Watching, streams: frozenset[str]) -> None:
        self.streams = streams
        self._watching = watching

    async def begin(self, client: httpx2.AsyncClient, url: str) -> bool:
        """Return when the server watches: True; or when it does not."""
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[bool] = loop.create_future()
        self.task = loop.create_task(self._listen(client, url, ready))
        try:
            return await ready
        except asyncio.CancelledError:
            self.task.cancel()
            raise

    async def _listen(self, client: httpx2.AsyncClient, url: str, ready: "asyncio.Future[bool]") -> None:
        timeout = httpx2.Timeout(5, read=3 * HEARTBEAT_SECONDS, pool=None)
        content = msgspec.msgpack.encode(sorted(self.streams))
        try:
            with suppress(httpx2.HTTPError, ValueError):
                async with client.stream(
                    "POST", url, content=content, headers={"content-type": CONTENT_TYPE}, timeout=timeout
                ) as response:
                    if response.status_code != 200:
                        return
                    async for line in response.aiter_lines():
                        if not ready.done():
                            ready.set_result(True)
                        self._watching.rung(self, msgspec.json.decode(line, type=list[str]))
        finally:
            if not ready.done():
                ready.set_result(False)
            self._watching.lost(self)
