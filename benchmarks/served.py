"""`python -m benchmarks.served PORT URL`: an app on uvicorn, durable over that storage; or, with `bare` for the URL, without durability.

Both answer the same requests with the same frames:

- `POST /answer`: an answer of 50 tokens a second.
- `POST /dated`: the same, and each chunk says when it was given.
- `GET /live`: what is written live; `POST /live/N` begins to write so many chunks a second, each with when it was given.
- `GET /kept`: 10,000 chunks and the end of a stream that is complete.
- `GET /idle`: nothing, ever.
"""

import asyncio
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from benchmarks.answer import CHUNK, chunks
from benchmarks.bare import encode
from benchmarks.work import REPLAYED
from streamkeep.http import SSEFraming, StreamsHTTP
from streamkeep.http.response import ASGIApp, Receive, Scope, Send

PREFIX = b"b41d2bb2-5dd6-4a7a-9d7f-4f5d8bcb3b6e/0123456789ab/"
AT_ONCE = 64

Write = Callable[[bytes], Awaitable[None]]
Answer = Callable[[Write], Awaitable[None]]


def durable(url: str) -> ASGIApp:
    """Give the app as users write it."""
    streams_http = StreamsHTTP(url)
    writing: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncGenerator[None]:
        async with streams_http, streams_http.streams.open("live") as live, streams_http.streams.open("idle"):
            async with streams_http.streams.open("kept") as kept:
                for _ in range(REPLAYED):
                    kept.write_soon(CHUNK)
                await kept.done()

            async def write(per_second: int) -> None:
                async for chunk in chunks(per_second, dated=True):
                    await live.write(chunk)

            _app.state.write = write
            yield

    async def answer(request: Request) -> Response:
        dated = request.url.path == "/dated"
        return await streams_http.respond(request, chunks(dated=dated), framing=SSEFraming())

    async def follow(request: Request) -> Response:
        return await streams_http.follow(request, request.path_params["stream"])

    async def begin(request: Request) -> Response:
        writing.add(asyncio.create_task(request.app.state.write(request.path_params["per_second"])))
        return Response(status_code=204)

    routes = [
        Route("/answer", answer, methods=["POST"]),
        Route("/dated", answer, methods=["POST"]),
        Route("/live/{per_second:int}", begin, methods=["POST"]),
        Route("/{stream}", follow),
    ]
    return Starlette(routes=routes, lifespan=lifespan)


class Bare:
    """The same as tight as it goes: it makes what is live a frame once, sends all that there is, and notices that a client has gone."""

    def __init__(self) -> None:
        self._live: list[bytes] = []
        self._changed = asyncio.Event()
        self._kept = [encode(CHUNK) for _ in range(REPLAYED)]
        self._writing: set[asyncio.Task[None]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await run_lifespan(receive, send)
        path = scope["path"]
        if path.startswith("/live/"):
            self._writing.add(asyncio.create_task(self._write(int(path.removeprefix("/live/")))))
            await send({"type": "http.response.start", "status": 204, "headers": []})
            return await send({"type": "http.response.body"})
        answers: dict[str, Answer] = {
            "/answer": self._answer,
            "/dated": partial(self._answer, dated=True),
            "/live": self._follow,
            "/kept": self._replay,
            "/idle": self._wait,
        }
        return await streamed(receive, send, answers[path])

    async def _answer(self, write: Write, *, dated: bool = False) -> None:
        number = 0
        async for chunk in chunks(dated=dated):
            await write(frame(number, encode(chunk)))
            number += 1

    async def _follow(self, write: Write) -> None:
        await write(b"retry: 2000\n")
        seen = 0
        while True:
            while seen == len(self._live):
                await self._changed.wait()
            fresh = self._live[seen:]
            seen += len(fresh)
            await write(b"".join(fresh))

    async def _replay(self, write: Write) -> None:
        for first in range(0, REPLAYED, AT_ONCE):
            await write(
                b"".join([frame(first + number, data) for number, data in enumerate(self._kept[first : first + AT_ONCE])])
            )
            await asyncio.sleep(0)
        await write(b"event: done\ndata: null\n\n")

    async def _wait(self, write: Write) -> None:
        await write(b"retry: 2000\n")
        await asyncio.Event().wait()

    async def _write(self, per_second: int) -> None:
        async for chunk in chunks(per_second, dated=True):
            self._live.append(frame(len(self._live), encode(chunk)))
            changed, self._changed = self._changed, asyncio.Event()
            changed.set()


def frame(number: int, data: bytes) -> bytes:
    return b"event: chunk\ndata: %b\nid: %b%d\n\n" % (data, PREFIX, number)


async def streamed(receive: Receive, send: Send, answer: Answer) -> None:
    """Answer until all is said, or the client has gone."""
    await receive()

    async def write(body: bytes) -> None:
        await send({"type": "http.response.body", "body": body, "more_body": True})

    task = asyncio.current_task()
    assert task is not None
    gone = asyncio.ensure_future(receive())
    gone.add_done_callback(lambda done: done.cancelled() or task.cancel())
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
    with suppress(asyncio.CancelledError):
        await answer(write)
        gone.cancel()
        await send({"type": "http.response.body"})


async def run_lifespan(receive: Receive, send: Send) -> None:
    for phase in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{phase}.complete"})


def main() -> None:
    port, url = int(sys.argv[1]), sys.argv[2]
    app = Bare() if url == "bare" else durable(url)
    uvicorn.run(app, port=port, loop="uvloop", http="httptools", log_level="warning", access_log=False, backlog=4_096)


if __name__ == "__main__":
    main()
