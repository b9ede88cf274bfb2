"""Serving streams: the programs that the page and the README show answer as their pages say."""

from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Any, Final

import httpx
import pytest
from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from starlette.middleware.base import BaseHTTPMiddleware
from tests.http.servers import STREAM_ID, STREAMING, frames_of, http_to, without_lives
from tests.test_docs import ROOT, blocks

from streamkeep import InMemoryStreamManager, PublicError
from streamkeep.http import Access, DurableStreaming, Framing, StreamsHTTP
from streamkeep.http.response import ASGIApp, Receive, Scope, Send

PAGE: Final = ROOT / "docs/how-to/serve.md"
WORDS: Final = {"question": "Nothing is lost"}


def shown_with(*names: str, page: Any = PAGE) -> dict[str, Any]:
    """Run the page's program in which these names are, on memory, and give what it defines."""
    (program,) = [block for block in blocks(page) if all(name in block for name in names)]
    shown: dict[str, Any] = {}
    exec(compile(program.replace("sqlite:///streams.db", "memory://"), str(page), "exec", dont_inherit=True), shown)
    return shown


async def test_one_line_makes_an_app_durable_that_streams_already() -> None:
    async with http_to(shown_with("app.add_middleware(DurableStreaming", "StreamingResponse")["app"]) as http:
        first = await http.post("/chat", params=WORDS)
        ids = [line.removeprefix("id: ") for line in first.text.splitlines() if line.startswith("id: ")]
        rest = await http.post("/chat", params=WORDS, headers={"Last-Event-ID": ids[0]})
    assert without_lives(first.content) == b"data: Nothing\nid: 0\n\ndata: is\nid: 1\n\ndata: lost\nid: 2\n\n"
    assert first.content.endswith(rest.content)
    assert rest.text.count("data: ") == 2


async def test_an_endpoint_of_ones_own_is_started_followed_and_stopped() -> None:
    async with http_to(shown_with("def stop(")["app"]) as http:
        answer = await http.post("/chat/c", params=WORDS)
        nothing_runs = await http.get("/chat/c/stream")
        rest = await http.get(
            "/chat/c/stream", headers={"Last-Event-ID": answer.text.partition("\nid: ")[2].partition("\n")[0]}
        )
        stopped = await http.delete("/chat/c")
        by_get = await http.get(f"/streams/{answer.headers[STREAM_ID]}")
        nobody = await http.get("/streams/")
    assert answer.text.count("event: chunk") == 3
    assert (nothing_runs.status_code, rest.text.count("event: chunk"), stopped.json()) == (204, 2, {"stopped": False})
    assert by_get.text == answer.text
    assert nobody.status_code == 404


async def test_a_genkit_flow_streams() -> None:
    async with http_to(shown_with("durable_flow(answer")["app"]) as http:
        answer = await http.post("/answer", json={"data": "Nothing is lost"}, headers=STREAMING)
    assert [frame["offset"] for frame in frames_of(answer.content)] == [0, 1, 2, 3]


async def test_a_framing_of_ones_own_is_sent() -> None:
    framing: type[Framing] = shown_with("class CSVFraming")["CSVFraming"]
    streams_http = StreamsHTTP(InMemoryStreamManager())
    app = FastAPI(lifespan=streams_http.lifespan)

    @app.post("/")
    async def ask(request: Request) -> Response:
        return await streams_http.respond(request, [{"text": "a"}, {"text": "b"}], framing=framing())

    async with http_to(app) as http:
        answer = await http.post("/")
    assert answer.content == b"offset,text\r\n0,a\r\n1,b\r\n"
    assert answer.headers["content-type"] == "text/csv"


async def test_who_may_is_asked() -> None:
    streams_http: StreamsHTTP = shown_with("authorize=authorize")["streams_http"]
    async with http_to(streams_http, lifespan="off") as http, streams_http:
        async with streams_http.streams.open("s", owner="ann") as stream:
            await stream.done()
        mine: httpx.Response = await http.get("/", headers={"Authorization": "Bearer t0k3n"})
        refused = await http.get("/s")
    assert [found["id"] for found in mine.json()["streams"]] == ["s"]
    assert refused.status_code == 401


async def test_what_has_an_owner_is_not_in_the_mounted_app_without_an_authorize() -> None:
    shown = shown_with("def stop(")
    streams_http: StreamsHTTP = shown["streams_http"]
    async with http_to(shown["app"]) as http:
        for owner in ("ann", ""):
            async with streams_http.streams.open(f"of-{owner}", owner=owner) as stream:
                await stream.done()
        answers = [await http.get(f"/streams/of-{owner}") for owner in ("ann", "")]
    assert [answer.status_code for answer in answers] == [404, 200]


@pytest.mark.parametrize("accept", ["text/event-stream", "application/json"])
async def test_an_id_that_names_no_stream_of_that_path_does_not_reach_the_app(accept: str) -> None:
    app: FastAPI = shown_with("app.add_middleware(DurableStreaming", "StreamingResponse")["app"]
    async with http_to(app) as http:
        answer = await http.post("/chat", params=WORDS, headers={STREAM_ID: "nobodys", "Accept": accept})
    assert (answer.status_code, answer.content) == (204, b"")


async def test_what_is_added_later_is_outside_and_sees_a_resume_which_a_dependency_does_not() -> None:
    app, seen = FastAPI(), list[str]()

    @app.post("/chat", dependencies=[Depends(lambda: seen.append("dependency"))])
    async def chat() -> StreamingResponse:
        return StreamingResponse(iter(["data: 1\n\n"]), media_type="text/event-stream")

    class Noting:
        def __init__(self, app: ASGIApp, name: str) -> None:
            self.app, self.name = app, name

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http":
                seen.append(self.name)
            await self.app(scope, receive, send)

    app.add_middleware(Noting, name="added before")
    app.add_middleware(DurableStreaming, streams="memory://")
    app.add_middleware(Noting, name="added later")
    async with http_to(app) as http:
        first = await http.post("/chat")
        started, seen[:] = list(seen), []
        await http.post("/chat", headers={STREAM_ID: first.headers[STREAM_ID]})
    assert started == ["added later", "added before", "dependency"]
    assert seen == ["added later"]


async def test_a_key_where_nobody_is_known_counts_with_the_same_query_and_headers_whatever_the_body() -> None:
    async with http_to(shown_with("app.add_middleware(DurableStreaming", "StreamingResponse")["app"]) as http:
        key = {"Idempotency-Key": "k"}
        first = await http.post("/chat", params=WORDS, headers=key)
        streams = [
            (await http.post("/chat", params=params, headers={**key, **headers}, content=body)).headers[STREAM_ID]
            for params, headers, body in (
                (WORDS, {"Traceparent": "00-1", "X-Forwarded-For": "192.0.2.1"}, b""),
                ({**WORDS, "user": "bob"}, {}, b""),
                (WORDS, {"X-User": "bob"}, b""),
                (WORDS, {"Cookie": "visit=1"}, b""),
            )
        ]
        json = {**key, "Content-Type": "application/json"}
        by_body = [await http.post("/chat", params=WORDS, headers=json, content=body) for body in (b'{"u":1}', b'{"u":2}')]
    assert [stream == first.headers[STREAM_ID] for stream in streams] == [True, False, False, False]
    assert by_body[0].headers[STREAM_ID] == by_body[1].headers[STREAM_ID]


async def test_a_middleware_that_wraps_the_response_inside_makes_a_failure_in_mid_answer_a_good_end() -> None:
    async def failing() -> AsyncGenerator[str]:
        yield "data: 1\n\n"
        raise ValueError

    async def pass_on(request: Request, call_next: Any) -> Response:
        response: Response = await call_next(request)
        return response

    async def status_with(*wraps: Any) -> str:
        app, streams = FastAPI(), InMemoryStreamManager()
        app.post("/chat")(lambda: StreamingResponse(failing(), media_type="text/event-stream"))
        for wrap in wraps:
            app.add_middleware(BaseHTTPMiddleware, dispatch=wrap)
        app.add_middleware(DurableStreaming, streams=streams)
        async with http_to(app) as http:
            with suppress(httpx.RemoteProtocolError):
                await http.post("/chat")
            (info,) = await streams.list()
            return info.status

    assert [await status_with(), await status_with(pass_on)] == ["error", "done"]


async def test_inside_durable_streaming_authorize_is_asked_when_the_app_has_begun_to_stream() -> None:
    app, began = FastAPI(), list[str]()

    @app.post("/chat")
    async def chat() -> StreamingResponse:
        began.append("app")
        return StreamingResponse(iter(["data: 1\n\n"]), media_type="text/event-stream")

    def nobody(access: Access) -> str:
        began.append(access.action)
        raise PublicError("UNAUTHENTICATED", "sign in first")

    app.add_middleware(DurableStreaming, streams=StreamsHTTP("memory://", authorize=nobody))
    async with http_to(app) as http:
        answer = await http.post("/chat")
    assert (answer.status_code, began) == (401, ["app", "start"])


@pytest.mark.parametrize("is_shared", [True, False])
async def test_respond_works_inside_durable_streaming_over_the_same_storage(*, is_shared: bool) -> None:
    streams_http = StreamsHTTP(InMemoryStreamManager())
    app = FastAPI(lifespan=streams_http.lifespan)

    @app.post("/chat")
    async def chat(request: Request) -> Response:
        return await streams_http.respond(request, ["Nothing"])

    app.add_middleware(DurableStreaming, streams=streams_http if is_shared else "memory://")
    async with http_to(app) as http:
        first = await http.post("/chat")
        again = await http.post("/chat", headers={STREAM_ID: first.headers[STREAM_ID]})
    assert (again.status_code, again.content) == ((200, first.content) if is_shared else (204, b""))


@pytest.mark.parametrize(
    "options", [{"when_running": "stop", "key": "c"}, {"when_running": "refuse"}, {"when_running": "replace"}]
)
async def test_what_cannot_be_meant_of_what_runs_is_a_type_error(options: dict[str, Any]) -> None:
    streams_http = StreamsHTTP(InMemoryStreamManager())
    request = Request({"type": "http", "method": "POST", "path": "/chat", "headers": []})
    async with streams_http:
        with pytest.raises(TypeError):
            await streams_http.respond(request, ["Nothing"], **options)


async def test_the_readmes_two_lines() -> None:
    async with http_to(shown_with("streams_http.respond(", page=ROOT / "README.md")["app"]) as http:
        answer = await http.post("/ask", params=WORDS)
    assert len(frames_of(answer.content)) == 4
