"""DurableStreaming around apps that know nothing of it."""

import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any, Final

import anyio
import httpx
import pytest
from anyio.lowlevel import checkpoint
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from genkit import ActionRunContext
from genkit_fastapi import serve_flow
from pydantic import BaseModel
from tests.http.servers import STREAM_ID, STREAMING, Reading, count, events_of, flow_of, frames_of, http_to, serving
from tests.http.test_pass_through import answering

from streamkeep import InMemoryStreamManager, Limits, StreamManager
from streamkeep.errors import StorageError
from streamkeep.http import DurableStreaming, StreamsHTTP
from streamkeep.http.app import MAX_BODY_BYTES
from streamkeep.http.response import ASGIApp, Message, Receive, Scope, Send, Timeouts
from streamkeep.storages.memory import MemoryStorage
from streamkeep.testing.faults import FaultyStorage

SECRET: Final = "secret://db-password"


@asynccontextmanager
async def around(app: ASGIApp, streams: StreamManager | None = None) -> AsyncGenerator[tuple[httpx.AsyncClient, StreamManager]]:
    manager = streams or InMemoryStreamManager()
    async with http_to(DurableStreaming(app, manager)) as http:
        yield http, manager


# What streams


async def test_frames_that_are_cut_anywhere_become_events() -> None:
    body = 'data: {"message":"é\u2028"}\n\ndata: {"message": null}\n\ndata: {"result":{"n":1}}\n\n'.encode()
    async with around(answering(*(bytes([byte]) for byte in body))) as (http, streams):
        answer = await http.post("/", json={"data": 1}, headers=STREAMING)
        events = await events_of(streams, answer.headers[STREAM_ID])
    assert events == [("chunk", "é\u2028"), ("chunk", None), ("done", {"n": 1})]
    assert frames_of(answer.content)[-1] == {"result": {"n": 1}, "offset": 2}


async def test_what_follows_the_terminal_frame_is_left_out() -> None:
    packets = (b'data: {"result":1}\n\n', b'data: {"message":2}\n\n', b'data: {"result":3}\n\n')
    async with around(answering(*packets)) as (http, _):
        answer = await http.post("/", json={"data": 1}, headers=STREAMING)
    assert frames_of(answer.content) == [{"result": 1, "offset": 0}]


async def test_errors_in_frames_are_stored_in_full_and_only_their_status_is_shown() -> None:
    frame = b'data: {"error":{"status":"NOT_FOUND","message":"%b","details":{"stack":"%b"}}}\n\n' % ((SECRET.encode(),) * 2)
    async with around(answering(b'data: {"message":1}\n\n', frame)) as (http, streams):
        answer = await http.post("/", json={"data": 1}, headers=STREAMING)
        async with streams.subscribe(answer.headers[STREAM_ID], after=0) as events:
            (event,) = await events.batch()
    assert frames_of(answer.content)[-1]["error"] == {"status": "NOT_FOUND", "message": "not found", "details": None}
    assert "secret" not in answer.text
    assert event.error.internal == SECRET


@pytest.mark.parametrize(
    ("app", "status"),
    [
        (answering(b'data: {"message":1}\n\n'), "ABORTED"),
        (answering(b'data: {"message":1}\n\n', b'data: {"mess'), "ABORTED"),
        (answering(b'data: {"message":1}\n\n', then=ValueError(SECRET)), "INTERNAL"),
        (answering(b'data: {"message":1}\n\n', b"data: no json\n\n"), "INTERNAL"),
    ],
    ids=["no-terminal-frame", "cut", "crash", "malformed"],
)
async def test_an_answer_that_ends_otherwise_ends_the_stream_with_an_error(app: ASGIApp, status: str) -> None:
    async with around(app) as (http, _):
        answer = await http.post("/", json={"data": 1}, headers=STREAMING)
    first, last = frames_of(answer.content)
    assert first["message"] == 1
    assert isinstance(last["error"], dict)
    assert last["error"]["status"] == status
    assert "secret" not in answer.text


async def test_stopping_is_told_to_the_inner_app_as_a_disconnect() -> None:
    told = anyio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        assert (await receive())["type"] == "http.request"
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        await send({"type": "http.response.body", "body": b'data: {"message":1}\n\n', "more_body": True})
        assert (await receive())["type"] == "http.disconnect"
        told.set()

    async with around(app) as (http, streams):
        async with http.stream("POST", "/", json={"data": 1}, headers=STREAMING) as answer:
            await Reading(answer).until()
        stream = answer.headers[STREAM_ID]
        assert not told.is_set()  # of the client's own disconnect
        stopped = await http.delete("/", headers={STREAM_ID: stream})
        assert stopped.json() == {"stopped": True}
        with anyio.fail_after(5):
            await told.wait()
        assert await events_of(streams, stream) == [("chunk", 1), ("error", "CANCELLED")]


async def test_the_inner_app_gets_the_request_as_it_came() -> None:
    seen: list[tuple[str, str, str, bytes]] = []
    app = FastAPI()

    @app.post("/a/{name}")
    async def answer(name: str, request: Request) -> StreamingResponse:
        seen.append((name, request.headers["x-any"], request.url.query, await request.body()))
        return StreamingResponse(iter([b'data: {"result":1}\n\n']), media_type="text/event-stream")

    async with around(app) as (http, _):
        body = b'{"data": "%b"}' % (b"x" * 300_000)
        answer_ = await http.post("/a/b%20c?q=1&q=2", content=body, headers={**STREAMING, "X-Any": "thing"})
    assert frames_of(answer_.content)
    assert seen == [("b c", "thing", "q=1&q=2", body)]


# What does not


async def test_answers_that_do_not_stream_come_through_as_they_are_and_leave_no_stream() -> None:
    app = FastAPI()

    class Body(BaseModel):
        n: int

    @app.post("/json")
    async def as_json(body: Body) -> JSONResponse:
        return JSONResponse({"n": body.n}, 201, {"X-Any": "thing", "Set-Cookie": "a=b"})

    @app.post("/text")
    async def as_text() -> PlainTextResponse:
        return PlainTextResponse("é" * 1000)

    @app.post("/event-stream-of-an-error")
    async def refused() -> PlainTextResponse:
        return PlainTextResponse("data: no\n\n", 403, media_type="text/event-stream")

    streams = InMemoryStreamManager()
    async with http_to(app) as bare, around(app, streams) as (http, _):
        requests: list[tuple[str, Any]] = [("/json", {"n": 1}), ("/json", {"n": "x"}), ("/text", None), ("/unknown", None)]
        requests += [("/event-stream-of-an-error", None)]
        for path, body in requests:
            expected = await bare.post(path, json=body, headers=STREAMING)
            answer = await http.post(path, json=body, headers=STREAMING)
            assert (answer.status_code, answer.content) == (expected.status_code, expected.content), path
            assert without_date(answer) == without_date(expected), path
        with anyio.fail_after(5):
            while await streams.list():  # the stream that was none is forgotten after its answer
                await checkpoint()


def without_date(answer: httpx.Response) -> list[tuple[str, str]]:
    return [(name, value) for name, value in answer.headers.multi_items() if name != "date"]


async def test_all_else_passes_through_untouched() -> None:
    app = FastAPI()
    app.include_router(serve_flow(flow_of(count)))

    @app.get("/get")
    @app.delete("/delete")
    async def answer(request: Request) -> dict[str, str]:
        return {"accept": request.headers["accept"], "query": request.url.query}

    async with around(app) as (http, streams):
        accept = "Text/Event-Stream, A/B"
        assert (await http.get("/get?a=1", headers={"Accept": accept})).json() == {"accept": accept, "query": "a=1"}
        assert (await http.delete("/delete", headers={"Accept": accept})).json() == {"accept": accept, "query": ""}
        assert (await http.post("/count", json={"data": 2})).json() == {"result": {"counted": 2}}
        many = "&".join(f"a{n}=1" for n in range(200))
        assert (await http.post(f"/count?{many}", json={"data": 2})).json() == {"result": {"counted": 2}}
        assert not await streams.list()


async def test_what_an_inner_app_raises_before_it_answers_is_the_servers_to_answer() -> None:
    async def app(scope: Scope, _receive: Receive, _send: Send) -> None:
        assert scope["type"] == "http"
        raise ValueError(SECRET)

    async with around(app) as (http, streams):
        answer = await http.post("/", json={"data": 1}, headers=STREAMING)
        await_list = await streams.list()
    assert (answer.status_code, answer.text) == (500, "Internal Server Error")
    assert not await_list


async def test_how_long_a_body_may_be_is_the_inner_apps_affair() -> None:
    sizes: list[int] = []
    app = FastAPI()

    @app.post("/upload")
    async def upload(request: Request) -> JSONResponse:
        sizes.append(sum([len(piece) async for piece in request.stream()]))
        return JSONResponse(sizes)

    async with around(app) as (http, _):
        answer = await http.post("/upload", content=b"x" * (MAX_BODY_BYTES + 1), headers=STREAMING)
        resuming = await http.post("/upload", content=b"x" * (MAX_BODY_BYTES + 1), headers={**STREAMING, STREAM_ID: "one"})
    assert answer.json() == [MAX_BODY_BYTES + 1]
    assert resuming.status_code == 204  # there is no such stream; what was sent before is read and thrown away


async def test_a_storage_that_is_down_is_503_in_json_and_the_inner_app_is_told_that_its_client_has_gone() -> None:
    storage, told = FaultyStorage(MemoryStorage()), anyio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        try:
            await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        except OSError:
            told.set()

    async with around(app, StreamManager(storage)) as (http, _):
        storage.is_down = True
        answer = await http.post("/", json={"data": 1}, headers=STREAMING)
        storage.is_down = False
        with anyio.fail_after(5):
            await told.wait()
    assert answer.status_code == 503
    assert answer.json()["error"]["message"] == "unavailable"


# Lifespans


async def test_around_an_app_that_enters_the_manager_itself() -> None:
    streams = InMemoryStreamManager()
    order: list[str] = []

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None, None]:
        async with streams:
            order.append("up")
            yield
            order.append("down")
            assert streams.is_running

    app = FastAPI(lifespan=lifespan)
    app.include_router(serve_flow(flow_of(count)))
    async with http_to(DurableStreaming(app, streams)) as http:
        assert frames_of((await http.post("/count", json={"data": 2}, headers=STREAMING)).content)
    assert order == ["up", "down"]
    assert not streams.is_running


async def test_around_an_app_that_enters_the_same_streams_http_itself() -> None:
    streams_http = StreamsHTTP(InMemoryStreamManager())
    app = FastAPI(lifespan=streams_http.lifespan)
    app.include_router(serve_flow(flow_of(count)))
    async with http_to(DurableStreaming(app, streams_http)) as http:
        assert frames_of((await http.post("/count", json={"data": 2}, headers=STREAMING)).content)
    assert not streams_http.streams.is_running


async def raises(scope: Scope, receive: Receive, send: Send) -> None:
    assert scope["type"] == "http"
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
    await send({"type": "http.response.body", "body": b'data: {"result":1}\n\n'})


async def returns(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "http":
        await raises(scope, receive, send)


async def raises_late(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "lifespan":
        await receive()
    await raises(scope, receive, send)


@pytest.mark.parametrize("app", [raises, returns, raises_late], ids=["raises", "returns", "raises-late"])
async def test_around_an_app_without_lifespan(app: ASGIApp) -> None:
    streams = InMemoryStreamManager()
    async with around(app, streams) as (http, _):
        assert frames_of((await http.post("/", json={"data": 1}, headers=STREAMING)).content) == [{"result": 1, "offset": 0}]
    assert not streams.is_running


class Lifespan:
    """A server's side of a lifespan."""

    def __init__(self, app: ASGIApp) -> None:
        self.said: list[str] = []
        self._app = app

    async def run(self) -> None:
        messages = iter([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])

        async def receive() -> Message:
            return next(messages)

        async def send(message: Message) -> None:
            self.said.append(message["type"])

        await self._app({"type": "lifespan"}, receive, send)


async def test_an_app_whose_start_up_fails_is_not_served() -> None:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None, None]:
        raise ValueError("no database")
        yield

    streams = InMemoryStreamManager()
    server = Lifespan(DurableStreaming(FastAPI(lifespan=lifespan), streams))
    with pytest.raises(ValueError, match="no database"):
        await server.run()
    assert server.said == ["lifespan.startup.failed"]
    assert not streams.is_running


@pytest.mark.parametrize("app", [FastAPI(), raises], ids=["with-lifespan", "without"])
async def test_a_manager_that_cannot_start_is_a_failed_start_up(app: ASGIApp) -> None:
    storage = FaultyStorage(MemoryStorage())
    storage.is_down = True
    streams = StreamManager(storage)
    streams._make_storage = lambda: storage
    server = Lifespan(DurableStreaming(app, streams))
    with pytest.raises(StorageError):
        await server.run()
    assert server.said == ["lifespan.startup.failed"]
    assert not streams.is_running


async def test_an_app_whose_shutdown_fails_has_its_streams_ended_first() -> None:
    streams = InMemoryStreamManager()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None, None]:
        yield
        assert not streams.is_running
        raise ValueError("no goodbye")

    server = Lifespan(DurableStreaming(FastAPI(lifespan=lifespan), streams))
    with pytest.raises(ValueError, match="no goodbye"):
        await server.run()
    assert server.said == ["lifespan.startup.complete", "lifespan.shutdown.failed"]


async def test_a_server_that_stops_lets_flows_finish() -> None:
    begun, finished = anyio.Event(), anyio.Event()

    async def slow(_: None, ctx: ActionRunContext) -> str:
        ctx.send_chunk("begun")
        begun.set()
        await stopping.wait()
        finished.set()
        return "output"

    stopping = anyio.Event()
    app = FastAPI()
    app.include_router(serve_flow(flow_of(slow)))
    async with InMemoryStreamManager() as streams:
        async with serving(DurableStreaming(app, streams)) as url, httpx.AsyncClient() as http:
            async with http.stream("POST", f"{url}/slow", json={}, headers=STREAMING) as answer:
                await begun.wait()
            stopping.set()
        assert finished.is_set()
        assert await events_of(streams, answer.headers[STREAM_ID]) == [("chunk", "begun"), ("done", "output")]


async def test_websockets_reach_the_inner_app() -> None:
    seen: list[str] = []

    async def app(scope: Scope, _receive: Receive, _send: Send) -> None:
        seen.append(scope["type"])

    async def unused(*_: object) -> Any:
        raise AssertionError

    await DurableStreaming(app, InMemoryStreamManager())({"type": "websocket"}, unused, unused)
    assert seen == ["websocket"]


async def test_a_heartbeat_fills_the_gaps_of_the_inner_app() -> None:
    go = anyio.Event()

    async def slow(_: None, ctx: ActionRunContext) -> str:
        await go.wait()
        return "output"

    app = FastAPI()
    app.include_router(serve_flow(flow_of(slow)))
    streams_http = StreamsHTTP(InMemoryStreamManager(), timeouts=Timeouts(heartbeat=timedelta(milliseconds=5)))
    async with (
        http_to(DurableStreaming(app, streams_http)) as http,
        http.stream("POST", "/slow", json={}, headers=STREAMING) as answer,
    ):
        reading = Reading(answer)
        await reading.until(b"data:   ")
        go.set()
        assert json.loads((await reading.whole()).removeprefix(b"data:")) == {"result": "output", "offset": 0}


# Long frames, and other scripts


async def test_a_frame_may_be_as_long_as_an_event_of_the_manager() -> None:
    text = "x" * (9 << 20)
    streams = StreamManager(MemoryStorage(), limits=Limits(max_event_bytes=10 << 20))
    frames = [b'data: {"message":"%b"}\n\n' % text.encode(), b'data: {"result":1}\n\n']
    async with around(answering(*frames), streams) as (http, _):
        answer = await http.post("/", json={"data": 1}, headers=STREAMING)
    assert frames_of(answer.content)[0]["message"] == text
    async with around(answering(*frames)) as (http, _):
        refused = await http.post("/", json={"data": 1}, headers=STREAMING)
    (error,) = frames_of(refused.content)
    assert isinstance(error["error"], dict)
    assert error["error"]["status"] == "RESOURCE_EXHAUSTED"


@pytest.mark.parametrize("framing", ["genkit", "own"])
async def test_text_is_stored_as_utf_8_however_it_was_escaped(framing: str) -> None:
    frame = (
        b'data: {"message":"\\u4e16\\u754c"}\n\ndata: {"result":1}\n\n' if framing == "genkit" else "data: 世界\n\n".encode()
    )
    async with around(answering(frame)) as (http, streams):
        answer = await http.post("/", json={"data": 1}, headers=STREAMING)
        async with streams.subscribe(answer.headers[STREAM_ID]) as events:
            first, *_ = await events.batch()
    assert "世界".encode() in first.data
