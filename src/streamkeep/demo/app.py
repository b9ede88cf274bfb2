"""The demo's web app: what a service of your own would look like, and a page to watch it with."""

import os
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from .._extras import needed_by

with needed_by(__name__, "demo"):
    from fastapi import FastAPI, Request, Response
    from starlette.staticfiles import StaticFiles
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..http import StreamsHTTP
from ..integrations.fastapi import durable_flow
from .dialects import DIALECTS, Dialect
from .flow import TOKENS, answer_flow

PAGE: Final = Path(__file__).with_name("page")

# Nothing but our own files and our own server, and nothing from a cache unasked. The referrer would tell a stream's id to others.
DEFAULT_HEADERS: Final = {
    b"cache-control": b"no-cache",
    b"content-security-policy": (
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        b"base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    b"cross-origin-opener-policy": b"same-origin",
    b"cross-origin-resource-policy": b"same-origin",
    b"referrer-policy": b"no-referrer",
    b"x-content-type-options": b"nosniff",
}


def create_app(streams_http: StreamsHTTP, *, tokens_per_second: float = 30.0, storage: str = "memory://") -> ASGIApp:
    """Give the demo as an ASGI app over a `StreamsHTTP` that is entered by the caller.

    Args:
        streams_http: serves the streams.
        tokens_per_second: the pace of the answer.
        storage: the storage's URL, of which the page shows the kind.
    """
    app = FastAPI(openapi_url=None)
    app.include_router(durable_flow(answer_flow(tokens_per_second), streams_http, path="/answer"))
    app.mount("/streams", streams_http)

    @app.get("/answer/{stream}/as/{dialect}")
    async def answer_as(request: Request, stream: str, dialect: Dialect) -> Response:
        return await streams_http.follow(request, stream, framing=DIALECTS[dialect]())

    @app.get("/server")
    async def server() -> dict[str, object]:
        return {
            "pid": os.getpid(),
            "storage": urlsplit(storage).scheme,
            "tokensPerSecond": tokens_per_second,
            "seconds": round(len(TOKENS) / tokens_per_second),
        }

    app.mount("/", StaticFiles(directory=PAGE, html=True))
    return with_security_headers(app)


def with_security_headers(app: ASGIApp) -> ASGIApp:
    """Give the app with a strict content security policy on every response, and none of them taken from a cache unasked."""

    async def secured(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                there = {name for name, _ in message["headers"]}
                added = [header for header in DEFAULT_HEADERS.items() if header[0] not in there]
                message["headers"] = [*message["headers"], *added]
            await send(message)

        await app(scope, receive, send_secured)

    return secured
