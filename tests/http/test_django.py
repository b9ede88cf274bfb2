"""Django's ASGI application: streams are read below one of its URLs, and what its views stream becomes durable."""

# pyright: reportMissingTypeStubs=false

from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any, Final

import httpx
import pytest
from channels.routing import ProtocolTypeRouter, URLRouter
from django.core.asgi import get_asgi_application
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.test.utils import override_settings
from django.urls import path, re_path
from starlette.applications import Starlette
from starlette.routing import Mount
from tests.http.servers import STREAM_ID, Reading, http_to
from tests.web import site

from streamkeep import InMemoryStreamManager
from streamkeep.http import Access, DurableStreaming, StreamsHTTP
from streamkeep.http.response import Receive, Scope, Send


async def hello(_request: HttpRequest) -> HttpResponse:
    return HttpResponse(b"hello")


async def chat(_request: HttpRequest) -> StreamingHttpResponse:
    async def words() -> AsyncGenerator[str]:
        for word in ("a", "b", "c"):
            yield f"data: {word}\n\n"

    return StreamingHttpResponse(words(), content_type="text/event-stream")


urlpatterns: Final = [path("hello", hello), path("chat", chat)]
site.configure()


@pytest.fixture(autouse=True)
def _urls() -> Iterator[None]:
    with override_settings(ROOT_URLCONF=__name__):
        yield


def routed(*routes: Any) -> Any:
    return ProtocolTypeRouter({"http": URLRouter([*routes])})


def below_a_path(streams_http: StreamsHTTP) -> Any:
    return routed(path("streams/", streams_http), re_path("", get_asgi_application()))


def below_a_pattern(streams_http: StreamsHTTP) -> Any:
    return routed(re_path("^api/streams", streams_http), re_path("", get_asgi_application()))


def below_nested_routers(streams_http: StreamsHTTP) -> Any:
    inner: list[Any] = [path("streams/", streams_http)]
    return routed(path("api/", URLRouter(inner)), re_path("", get_asgi_application()))


def below_an_app_below_a_router(streams_http: StreamsHTTP) -> Any:
    inner = Starlette(routes=[Mount("/api/streams", streams_http)])
    return routed(path("hello", get_asgi_application()), re_path("", inner))


def by_hand(streams_http: StreamsHTTP) -> Any:
    django = get_asgi_application()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/streams/"):
            await streams_http({**scope, "root_path": scope["root_path"] + "/streams"}, receive, send)
        else:
            await django(scope, receive, send)

    return app


MOUNTED: Final[dict[Callable[[StreamsHTTP], Any], str]] = {
    below_a_path: "/streams",
    below_a_pattern: "/api/streams",
    below_nested_routers: "/api/streams",
    below_an_app_below_a_router: "/api/streams",
    by_hand: "/streams",
}


async def authorize(access: Access) -> str:
    return access.headers.get("x-user", "")


@asynccontextmanager
async def served(mounted: Callable[[StreamsHTTP], Any]) -> AsyncGenerator[tuple[httpx.AsyncClient, InMemoryStreamManager]]:
    streams = InMemoryStreamManager()
    streams_http = StreamsHTTP(streams, authorize=authorize)
    # Neither Django nor Channels has a lifespan: this has one for them.
    async with http_to(DurableStreaming(mounted(streams_http), streams_http)) as http:
        http.headers["X-User"] = "ann"
        yield http, streams


@pytest.mark.parametrize("mounted", MOUNTED, ids=lambda mounted: mounted.__name__)
async def test_streams_are_read_listed_and_stopped_beside_django(mounted: Callable[[StreamsHTTP], Any]) -> None:
    async with served(mounted) as (http, streams):
        root = MOUNTED[mounted]
        async with streams.open("s", owner="ann") as stream:
            for number in range(3):
                await stream.write(number)
            async with http.stream("GET", f"{root}/s") as answer:
                seen = await Reading(answer).until(b"id: 2\n\n")
            life = (await streams.info("s")).life[:8]
            async with http.stream("GET", f"{root}/s", headers={"Last-Event-ID": f"s/{life}/1"}) as answer:
                rest = await Reading(answer).until(b"\n\n")
            listed = await http.get(f"{root}/")
            stopped = await http.delete(f"{root}/s")
            info = await http.get(f"{root}/s/info")
        theirs = await http.get("/hello")
    assert seen.count(b"event: chunk") == 3
    assert rest.endswith(b"event: chunk\ndata: 2\nid: 2\n\n")
    assert rest.count(b"event: chunk") == 1
    assert [stream["id"] for stream in listed.json()["streams"]] == ["s"]
    assert stopped.json() == {"stopped": True}
    assert info.json()["error"] == "CANCELLED"
    assert theirs.text == "hello"


async def test_what_a_view_of_django_streams_is_durable() -> None:
    async with served(below_a_path) as (http, _):
        answer = await http.post("/chat")
        again = await http.post("/chat", headers={STREAM_ID: answer.headers[STREAM_ID]})
        read = await http.get(f"/streams/{answer.headers[STREAM_ID]}")
    assert [line for line in answer.text.splitlines() if line.startswith("data")] == ["data: a", "data: b", "data: c"]
    assert again.content == read.content == answer.content
