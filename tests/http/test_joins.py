"""Who joins what is there: at a server that is full, on another path, with what was seen of an earlier stream, in an app inside
`DurableStreaming`.
"""

import gzip
from collections.abc import AsyncGenerator
from typing import Any
from uuid import uuid4

import anyio
import httpx
import pytest
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import StreamingResponse
from tests.http.servers import STREAM_ID, STREAMING, Reading, count, flow_of, http_to, without_lives

from streamkeep import StreamManager
from streamkeep.http import DurableStreaming, PassThroughFraming, SSEFraming, StreamsHTTP
from streamkeep.http.response import Message, Receive, Scope, Send
from streamkeep.integrations.fastapi import durable_flow


class Chat:
    """An app whose conversations go on until `go` is set."""

    def __init__(self, **options: Any) -> None:
        self.go = anyio.Event()
        self.http = StreamsHTTP("memory://", **options)
        self.app = FastAPI(lifespan=self.http.lifespan)
        self.app.add_api_route("/chat/{chat}", self.ask, methods=["POST"])
        self.app.add_api_route("/chat/{chat}/again/{message}", self.ask, methods=["POST"])
        self.app.add_api_route("/chat/{chat}", self.follow, methods=["GET"])

    async def ask(self, request: Request, chat: int, run: str | None = None, message: str = "") -> Response:
        return await self.http.respond(request, self._answer(), key=chat, run=run, framing=SSEFraming())

    async def follow(self, request: Request, chat: int) -> Response:
        return await self.http.follow(request, key=chat)

    async def _answer(self) -> AsyncGenerator[str]:
        yield "a"
        await self.go.wait()
        yield "b"


async def begun(http: httpx.AsyncClient, path: str, **headers: str) -> tuple[str, Reading]:
    answer = await http.send(http.build_request("POST", path, headers=headers), stream=True)
    reading = Reading(answer)
    await reading.until(b"id: 0\n")
    return answer.headers[STREAM_ID], reading


async def test_a_full_server_refuses_who_starts_and_nobody_who_joins() -> None:
    chat = Chat(max_producers=1)
    async with http_to(chat.app) as http:
        stream, _ = await begun(http, "/chat/1?run=r")
        by_key, _ = await begun(http, "/chat/1")
        by_run, _ = await begun(http, "/chat/2?run=r")
        refused = await http.post("/chat/2")
        chat.go.set()
    assert stream == by_key == by_run
    assert refused.status_code == 429


async def test_many_starts_under_one_key_take_one_place_together() -> None:
    chat = Chat(max_producers=2)
    joined: set[str] = set()
    async with http_to(chat.app) as http:

        async def start() -> None:
            joined.add((await begun(http, "/chat/1"))[0])

        async with anyio.create_task_group() as tasks:
            for _ in range(30):
                tasks.start_soon(start)
        chat.go.set()
    assert len(joined) == 1


async def test_what_was_joined_through_another_path_is_resumed_there() -> None:
    chat = Chat()
    async with http_to(chat.app) as http:
        stream, _ = await begun(http, "/chat/1?run=r")
        joined, reading = await begun(http, "/chat/1/again/5")
        by_run, _ = await begun(http, "/chat/2?run=r")
        cursor = reading._came.decode().partition("\nid: ")[2].partition("\n")[0]
        chat.go.set()
        whole = await http.post("/chat/1/again/5", headers={STREAM_ID: stream})
        rest = await http.post("/chat/1/again/5", headers={"Last-Event-ID": cursor})
        rest_by_run = await http.post("/chat/2?run=r", headers={"Last-Event-ID": cursor})
        of_another_chat = await http.post("/chat/3", headers={"Last-Event-ID": cursor})
    assert stream == joined == by_run
    assert whole.text.count("\ndata: ") == 3
    assert rest.text.count("\ndata: ") == 2
    assert rest_by_run.text == rest.text
    assert "NOT_FOUND" in of_another_chat.text


async def test_a_stream_is_followed_to_its_end_though_its_conversation_has_a_newer_one() -> None:
    chat = Chat()
    async with http_to(chat.app) as http:
        first, reading = await begun(http, "/chat/1")
        cursor = reading._came.decode().partition("\nid: ")[2].partition("\n")[0]
        chat.go.set()
        await http.get("/chat/1")
        await reading.whole()
        second = (await http.post("/chat/1")).headers[STREAM_ID]
        rest = await http.get("/chat/1", headers={"Last-Event-ID": cursor})
        elsewhere = await http.get("/chat/2", headers={"Last-Event-ID": cursor})
        unknown = await http.get("/chat/1", headers={"Last-Event-ID": f"gone/{'0' * 8}/0"})
    assert first != second
    assert rest.headers[STREAM_ID] == first
    assert rest.text.count("\ndata: ") == 2
    assert (elsewhere.status_code, unknown.status_code) == (204, 204)


async def test_a_refused_start_names_what_runs_and_answers_are_not_kept_by_caches() -> None:
    streams_http = StreamsHTTP("memory://")
    app = FastAPI(lifespan=streams_http.lifespan)

    @app.post("/")
    async def ask(request: Request) -> Response:
        return await streams_http.respond(request, ["a"], id=uuid4(), key="k", when_running="refuse")

    async with http_to(app) as http, streams_http.streams.open("running", key="k"):
        refused = await http.post("/")
    assert refused.status_code == 409
    assert refused.json()["error"]["details"] == {"stream": "running"}
    assert refused.headers["cache-control"] == "no-store"


@pytest.mark.parametrize("options", [{"when_running": "restart", "key": "k"}, {"when_running": "refuse"}])
async def test_what_cannot_be_meant_is_a_mistake_of_the_endpoints(
    options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    streams_http = StreamsHTTP("memory://")
    app = FastAPI(lifespan=streams_http.lifespan)

    @app.post("/")
    async def ask(request: Request) -> Response:
        return await streams_http.respond(request, ["a"], **options)

    async with http_to(app) as http:
        assert (await http.post("/")).status_code == 500
    assert "TypeError: when_running is" in caplog.text


async def test_metadata_make_nobody_an_owner() -> None:
    streams_http = StreamsHTTP("memory://")
    app = FastAPI(lifespan=streams_http.lifespan)
    app.mount("/streams", streams_http)

    @app.post("/")
    async def ask(request: Request) -> Response:
        return await streams_http.respond(request, ["a"], metadata={"owner": "bob"})

    async with http_to(app) as http:
        stream = (await http.post("/")).headers[STREAM_ID]
        assert (await http.get(f"/streams/{stream}")).status_code == 200


async def test_who_leaves_in_the_middle_of_a_request_starts_nothing() -> None:
    streams_http = StreamsHTTP("memory://")
    app = FastAPI(lifespan=streams_http.lifespan)

    @app.post("/")
    async def ask(request: Request) -> Response:
        return await streams_http.respond(request, ["a"])

    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "path": "/", "headers": []}
    messages: list[Message] = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]

    async def receive() -> Message:
        return messages.pop(0)

    async def send(_message: Message) -> None:
        pass

    async with streams_http:
        await app({**scope, "query_string": b"", "root_path": "", "scheme": "http", "server": None}, receive, send)
        assert list(await streams_http.streams.list()) == []


# Inside `DurableStreaming`


def door(access_token: str | None) -> dict[str, Any]:
    if access_token != "ann":
        raise HTTPException(401)
    return {}


async def test_a_durable_flow_inside_is_the_apps_with_all_that_it_asks() -> None:
    streams_http = StreamsHTTP("memory://")

    def context(request: Request) -> dict[str, Any]:
        return door(request.headers.get("X-User"))

    app = FastAPI()
    app.include_router(durable_flow(flow_of(count), streams_http, context=context))
    ann = {**STREAMING, "X-User": "ann"}
    async with http_to(DurableStreaming(app, streams_http)) as http:
        whole = await http.post("/count", json={"data": 2}, headers=ann)
        named = {STREAM_ID: whole.headers[STREAM_ID]}
        strangers = [await http.post("/count", headers={**STREAMING, **named}), await http.delete("/count", headers=named)]
        again = await http.post("/count", headers={**ann, **named})
        stopped = await http.delete("/count", headers={**ann, **named})
    assert [answer.status_code for answer in strangers] == [401, 401]
    assert again.content == whole.content
    assert stopped.json() == {"stopped": False}


async def test_what_respond_tells_who_comes_with_a_cursor_is_no_stream() -> None:
    streams_http = StreamsHTTP("memory://", authorize=lambda access: access.headers.get("x-user"))
    app = FastAPI(lifespan=streams_http.lifespan)

    @app.post("/")
    async def ask(request: Request) -> Response:
        return await streams_http.respond(request, ["a"], framing=SSEFraming())

    async with http_to(DurableStreaming(app, streams_http)) as http:
        whole = await http.post("/", headers={"X-User": "ann"})
        last = whole.text.rpartition("\nid: ")[2].strip()
        unknown = f"unknown/{last.partition('/')[2]}"
        seen = await http.post("/", headers={"X-User": "ann", "Last-Event-ID": last})
        told = [await http.post("/", headers={"X-User": "bob", "Last-Event-ID": cursor}) for cursor in (last, unknown)]
        assert len(await streams_http.streams.list()) == 1
    assert (seen.status_code, seen.content) == (200, b"")
    assert told[0].content == told[1].content
    assert STREAM_ID not in told[0].headers
    assert "\nid: " not in told[0].text


async def test_a_request_that_is_long_is_resumed_as_it_was_sent() -> None:
    app = FastAPI()

    @app.post("/")
    async def answer(request: Request) -> StreamingResponse:
        await request.body()

        async def events() -> AsyncGenerator[str]:
            for number in range(3):
                yield f"data: {number}\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    body = b"x" * (5 << 20)
    async with http_to(DurableStreaming(app, "memory://")) as http:
        whole = await http.post("/", content=body)
        cursor = whole.text.partition("\nid: ")[2].partition("\n")[0]
        rest = await http.post("/", content=body, headers={"Last-Event-ID": cursor})
    assert without_lives(rest.content) == b"data: 1\nid: 1\n\ndata: 2\nid: 2\n\n"


@pytest.mark.parametrize("keeps", [1.0, 0.5])
async def test_a_compressed_answer_that_ends_too_early_is_not_whole(keeps: float) -> None:
    packed = gzip.compress(b"".join(b"data: %d\n\n" % (number**9) for number in range(1000)))
    packed = packed[: int(len(packed) * keeps)]

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        await receive()
        headers = [(b"content-type", b"text/event-stream"), (b"content-encoding", b"gzip")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": packed})

    async with StreamManager.connect("memory://") as streams, http_to(DurableStreaming(app, streams)) as http:
        with pytest.raises(httpx.RemoteProtocolError) if keeps < 1 else anyio.CancelScope():
            await http.post("/")
        (info,) = await streams.list()
    assert info.status == ("done" if keeps == 1 else "error")


async def test_a_chunk_with_more_than_a_blocks_fields_is_shown_whole() -> None:
    streams_http = StreamsHTTP("memory://")
    app = FastAPI(lifespan=streams_http.lifespan)

    @app.post("/")
    async def ask(request: Request) -> Response:
        return await streams_http.respond(request, [{"data": "hi", "role": "user"}], framing=PassThroughFraming())

    async with http_to(app) as http:
        assert b'data: {"data":"hi","role":"user"}\n' in (await http.post("/")).content
