"""What the clients read: an answer of `respond`, and one of OpenAI's shape that passes through `DurableStreaming`."""

import json
import re
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import anyio
from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, HTMLResponse, StreamingResponse
from pydantic import BaseModel
from starlette.middleware.cors import CORSMiddleware
from tests.clients.programs import PACKAGES, Event
from tests.http.servers import serving, until
from tests.inside import feeds_of
from tests.network.served import TEXTS, chunk_of, output_of
from tests.test_docs import ROOT

from streamkeep import InMemoryStreamManager, StreamInput
from streamkeep.http import DurableStreaming, SSEFraming, StreamsHTTP
from streamkeep.http.response import ASGIApp, Message, Receive, Scope, Send

CHUNKS: Final = 3
HELD: Final = 2
RETRY_SECONDS: Final = 0.01
ROUTES: Final = ("/ask", "/v1/chat/completions")
"""Our own events, and somebody's."""
PAGE: Final = """<!doctype html>
<script src="/packages/event-source-polyfill/src/eventsource.js"></script>
<script type="module" src="/page.js"></script>
"""


class Question(BaseModel):
    """What is asked.

    Attributes:
        number: which question it is.
        holds: whether the answer stops after `HELD` chunks, until it may go on.
    """

    number: int = 0
    holds: bool = False


@dataclass(eq=False, slots=True)
class Served:
    """A server, and how often it has run the producer for each question."""

    url: str = ""
    runs: Counter[int] = field(default_factory=Counter[int])
    may_go_on: anyio.Event = field(default_factory=anyio.Event)

    async def tell(self, question: Question, stream: StreamInput) -> AsyncGenerator[object]:
        self.runs[question.number] += 1
        for number in range(CHUNKS):
            if question.holds and number == HELD:
                await self.may_go_on.wait()
            yield chunk_of(number)
        await stream.done(output_of(CHUNKS))

    async def complete(self, question: Question) -> AsyncGenerator[str]:
        self.runs[question.number] += 1
        for number in range(CHUNKS):
            yield f"data: {json.dumps(completion_of(number))}\n\n"
        yield "data: [DONE]\n\n"


def completion_of(number: int) -> dict[str, object]:
    """Give a chunk of OpenAI's shape."""
    return {"choices": [{"index": 0, "delta": {"content": TEXTS[number % len(TEXTS)]}}]}


def assert_whole(route: str, events: Sequence[Event], what: object) -> None:
    """Assert that a client was given the whole answer of a route, each event once."""
    if route == ROUTES[0]:
        expected: list[tuple[str, Any]] = [("chunk", chunk_of(number)) for number in range(CHUNKS)]
        expected.append(("done", output_of(CHUNKS)))
    else:
        expected = [*(("message", completion_of(number)) for number in range(CHUNKS)), ("message", ["DONE"])]
    given = [(event["event"], ["DONE"] if event["data"] == "[DONE]" else json.loads(event["data"])) for event in events]
    assert given == expected, what
    assert [event["id"].rpartition("/")[2] for event in events] == [str(number) for number in range(CHUNKS + 1)], what


def app_of(served: Served, streams_http: StreamsHTTP) -> ASGIApp:
    """Give the app, for pages of any origin, with a page that has the clients."""
    app = FastAPI(lifespan=streams_http.lifespan)
    app.mount("/streams", streams_http)

    @app.post("/ask")
    async def ask(request: Request, question: Question) -> Response:
        framing = SSEFraming(retry_seconds=RETRY_SECONDS)
        return await streams_http.respond(request, lambda stream: served.tell(question, stream), framing=framing)

    @app.get("/ask/{stream}")
    async def follow(request: Request, stream: str) -> Response:
        return await streams_http.follow(request, stream, framing=SSEFraming(retry_seconds=RETRY_SECONDS))

    @app.post("/v1/chat/completions")
    async def complete(question: Question) -> StreamingResponse:
        return StreamingResponse(served.complete(question), media_type="text/event-stream")

    @app.get("/v1/chat/completions/{stream}")
    async def follow_completion(request: Request, stream: str) -> Response:
        return await streams_http.follow(request, stream)

    add_page(app)
    durable: Any = DurableStreaming(app, streams_http)
    headers = ["Idempotency-Key", "Last-Event-ID"]
    return closing_preflights(CORSMiddleware(durable, allow_origins=["*"], allow_methods=["*"], allow_headers=headers))


def add_page(app: FastAPI) -> None:
    """Add the page, and the packages as they are. They import their modules without `.js`, as bundlers have it."""

    @app.get("/page")
    async def page() -> Response:
        return HTMLResponse(PAGE)

    @app.get("/packages/{path:path}")
    async def package(path: str) -> Response:
        return FileResponse(PACKAGES / "node_modules" / (path if path.endswith(".js") else f"{path}.js"))

    @app.get("/events.js")
    async def events() -> Response:
        return Response(native_client(), media_type="text/javascript")

    @app.get("/{name}.js")
    async def program(name: str) -> Response:
        return FileResponse(PACKAGES / f"{name}.js")


def native_client() -> str:
    """Give the client of native events that the reference shows."""
    page = (ROOT / "docs/reference/http.md").read_text()
    shown: str
    (shown,) = re.findall(r"^```js\n(export async function\* events.*?)^```$", page, re.MULTILINE | re.DOTALL)
    return shown


def closing_preflights(app: ASGIApp) -> ASGIApp:
    """Give a preflight, and what is answered with nothing, a connection of its own: so what the network does to a connection is done to the
    request that counts.
    """

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        async def closing(message: Message) -> None:
            if message["type"] == "http.response.start" and (scope["method"] == "OPTIONS" or message["status"] == 204):
                message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
            await send(message)

        await app(scope, receive, closing if scope["type"] == "http" else send)

    return wrapped


@asynccontextmanager
async def served() -> AsyncGenerator[Served]:
    """Serve it; at the end no reader has left anything behind in the server."""
    streams, found = InMemoryStreamManager(), Served()
    async with serving(app_of(found, StreamsHTTP(streams))) as found.url:
        yield found
        await until(lambda: not feeds_of(streams))
