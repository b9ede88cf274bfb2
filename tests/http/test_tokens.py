"""Signed tokens: who has one may do one thing with one stream for a while, and nothing else lets a token in."""

import re
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any, Final

import httpx
import pytest
from fastapi import FastAPI, Request, Response
from starlette.types import ASGIApp
from tests.http.servers import STREAM_ID, STREAMING, http_to

from streamkeep import StreamManager
from streamkeep.errors import InvalidArgumentError, PublicError, StreamNotFoundError
from streamkeep.http import Access, SSEFraming, StreamsHTTP
from streamkeep.http.tokens import MAX_EXPIRES_IN, TokenKeys, token_of
from streamkeep.storages.memory import MemoryStorage
from streamkeep.testing.clock import FakeClock

KEY: Final = "the-first-key-Zmlyc3QtMDEyMzQ1Njc4OWFiY2RlZg"
OLD_KEY: Final = b"the-second-key-c2Vjb25kLTAxMjM0NTY3ODlhYmNkZWY"
MINUTE: Final = timedelta(minutes=1)
NOT_FOUND: Final = {"error": {"status": "NOT_FOUND", "message": "stream not found", "details": None}}


def authorize(access: Access) -> str:
    """Know who says a name; nobody else may come."""
    name = access.headers.get("x-name")
    if name is None:
        raise PublicError("UNAUTHENTICATED", "sign in")
    return name


class House:
    """A server whose streams are under /streams, and under /chat in endpoints of the app's own."""

    def __init__(self, http: httpx.AsyncClient, serve: StreamsHTTP, clock: FakeClock) -> None:
        self.http = http
        self.serve = serve
        self.streams = serve.streams
        self.clock = clock

    async def stored(self, stream: str = "s", *, owner: str = "Ada", route: str = "/chat") -> str:
        """Store a stream that runs."""
        async with self.streams.open(stream, owner=owner, metadata={"route": route}) as writing:
            await writing.write({"n": 0})
        return stream

    async def codes(self, token: str, stream: str = "s", **headers: str) -> list[int]:
        """Give the codes of all ways to get at a stream with a token in the query, and then with one in a header."""
        by_query = await self.answers(stream, {"token": token}, headers)
        by_header = await self.answers(stream, {}, {"Authorization": f"Bearer {token}", **headers})
        assert [answer.status_code for answer in by_query] == [answer.status_code for answer in by_header]
        return [answer.status_code for answer in by_query]

    async def answers(self, stream: str, query: dict[str, str], headers: dict[str, str]) -> list[httpx.Response]:
        shown = {**query, "follow": "false"}
        named = {**headers, STREAM_ID: stream}
        return [
            await self.http.get(f"/streams/{stream}", params=shown, headers=headers),
            await self.http.head(f"/streams/{stream}", params=query, headers=headers),
            await self.http.get(f"/streams/{stream}/info", params=query, headers=headers),
            await self.http.head(f"/chat/{stream}", params=query, headers=headers),
            await self.http.delete(f"/chat/{stream}", params=query, headers=headers),
            await self.http.post(f"/streams/{stream}/cancel", params=query, headers=headers),
            await self.http.delete(f"/streams/{stream}", params=query, headers=headers),
            await self.http.get("/streams/", params=query, headers=named),
        ]


READS: Final = [200, 200, 200, 200, 404, 404, 404, 401]
STOPS: Final = [404, 404, 404, 204, 200, 200, 200, 401]
REFUSED: Final = [404, 404, 404, 204, 404, 404, 404, 401]
EXPIRED: Final = [401, 401, 401, 401, 404, 404, 404, 401]


def app_of(serve: StreamsHTTP) -> ASGIApp:
    app = FastAPI(lifespan=serve.lifespan)
    app.mount("/streams", serve)

    async def chunks() -> AsyncGenerator[int]:
        yield 0

    @app.post("/chat")
    async def ask(request: Request) -> Response:
        return await serve.respond(request, chunks(), framing=SSEFraming())

    @app.api_route("/chat/{stream}", methods=["GET", "HEAD"])
    async def show(request: Request, stream: str) -> Response:
        return await serve.follow(request, stream)

    @app.delete("/chat/{stream}")
    async def stop(request: Request, stream: str) -> Response:
        return await serve.cancel(request, stream)

    @app.get("/mine/{stream}")
    async def mine(request: Request, stream: str) -> Response:
        return await serve.follow(request, stream, owner=request.headers.get("x-name", ""))

    return app


@asynccontextmanager
async def house(**options: Any) -> AsyncGenerator[House]:
    """Serve streams by a clock that stands still."""
    clock = FakeClock(1_000_000.0)
    options = {"authorize": authorize, "token_keys": [KEY], **options}
    async with MemoryStorage(clock=clock) as storage:
        serve = StreamsHTTP(StreamManager(storage), **options)
        async with http_to(app_of(serve)) as http:
            yield House(http, serve, clock)


async def test_a_token_reads_one_stream_in_every_way_that_shows_it_and_does_nothing_else() -> None:
    async with house() as at:
        token = await at.serve.token(await at.stored(), can="read", expires_in=MINUTE)
        assert await at.codes(token) == READS
        assert (await at.streams.info("s")).status == "open"
        answer = await at.http.get("/streams/s", params={"token": token, "follow": "false"})
        assert answer.text.count("event: chunk") == 1


async def test_a_token_stops_one_stream_and_does_nothing_else() -> None:
    async with house() as at:
        token = await at.serve.token(await at.stored(), can="stop", expires_in=MINUTE)
        assert await at.codes(token) == STOPS
        assert (await at.streams.info("s")).error == "CANCELLED"
