"""An app whose answers end before their streams do, for servers of any kind, also those that know no lifespan."""

import os
from contextlib import AsyncExitStack
from datetime import timedelta
from typing import Final

import anyio
from tests.deploy.app import connected

from streamkeep.http import DurableStreaming, StreamsHTTP
from streamkeep.http.response import ASGIApp, Receive, Scope, Send, Timeouts, send_response

streams: Final = connected()
brief: Final = StreamsHTTP(streams, timeouts=Timeouts(longest=timedelta(milliseconds=500)), drain=timedelta(milliseconds=200))
patient: Final = StreamsHTTP(streams, drain=timedelta(milliseconds=200))


async def answers(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with two events, and at `/endless` with no end."""
    while (await receive()).get("more_body"):
        pass  # over HTTP/2 hypercorn 0.18 loses the connection if an answer has ended before its request
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
    await send({"type": "http.response.body", "body": b"data: 0\n\ndata: 1\n\n", "more_body": True})
    if scope["path"].endswith("/endless"):
        await anyio.sleep_forever()
    await send({"type": "http.response.body"})


class App:
    """What is served: below `/brief` answers last half a second at most, below `/patient` as long as the stream does."""

    def __init__(self) -> None:
        self._apps: dict[str, tuple[StreamsHTTP, ASGIApp]] = {
            name: (http, DurableStreaming(answers, http)) for name, http in {"brief": brief, "patient": patient}.items()
        }
        self._starting = anyio.Lock()
        self._resources = AsyncExitStack()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one connection, or the server's lifespan."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        async with self._starting:
            if not patient.is_running:
                await self._start()
        if scope["path"] == "/process":
            await send_response(send, 200, str(os.getpid()).encode())
            return
        name = scope["path"].split("/")[1]
        reading, posting = self._apps[name]
        if scope["method"] == "POST":
            await posting(scope, receive, send)
        else:
            await reading({**scope, "root_path": f"/{name}"}, receive, send)

    async def _start(self) -> None:
        for streams_http in (brief, patient):
            await self._resources.enter_async_context(streams_http)

    async def _live(self, receive: Receive, send: Send) -> None:
        while True:
            match (await receive())["type"]:
                case "lifespan.startup":
                    await self._start()
                    await send({"type": "lifespan.startup.complete"})
                case _:
                    await self._resources.aclose()
                    await send({"type": "lifespan.shutdown.complete"})
                    return


app: Final = App()
