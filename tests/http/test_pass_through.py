"""DurableStreaming around apps that stream in formats of their own: durable as they are, or left alone byte for byte."""

import gzip
import json
import logging
import re
import zlib
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from functools import partial, wraps
from typing import Any, Final

import anyio
import httpx
import pytest
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from fastapi.sse import EventSourceResponse as FastAPIEventSourceResponse
from fastapi.sse import ServerSentEvent
from genkit import ActionRunContext, Genkit
from genkit_fastapi import genkit_fastapi_handler, handle_genkit_request
from pydantic import BaseModel
from sse_starlette import EventSourceResponse
from starlette.middleware.gzip import GZipMiddleware
from tests.http.servers import STREAM_ID, Reading, events_of, flow_of, http_to, until, without_lives

from streamkeep import InMemoryStreamManager, PublicError, StreamManager
from streamkeep.http import DurableStreaming, SSEFraming, StreamsHTTP
from streamkeep.http.exchange import FIRST_FRAME_SECONDS, SEEN_BODY_BYTES
from streamkeep.http.response import ASGIApp, Receive, Scope, Send

SSE: Final = {"Accept": "text/event-stream"}
ANYTHING: Final = {"Accept": "*/*"}
OPENAI: Final = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\ndata: {"choices":[]}\n\ndata: [DONE]\n\n'
ANTHROPIC: Final = (
    b'event: message_start\ndata: {"type":"message_start"}\n\nevent: message_stop\ndata: {"type":"message_stop"}\n\n'
)
AI_SDK: Final = b'data: {"type":"start"}\n\ndata: {"type":"text-delta","id":"0","delta":"\xc3\xa9"}\n\ndata: [DONE]\n\n'
AG_UI: Final = b'data: {"type":"RUN_STARTED"}\n\ndata: {"type":"RUN_FINISHED"}\n\n'
SEVERAL_LINES: Final = b"data: one\ndata:  two\ndata: \n\nevent: a\ndata\n\n"


@asynccontextmanager
async def around(
    app: ASGIApp, streams: StreamManager | None = None, **options: Any
) -> AsyncGenerator[tuple[httpx.AsyncClient, StreamManager]]:
    manager = streams or InMemoryStreamManager()
    async with http_to(DurableStreaming(app, StreamsHTTP(manager), **options)) as http:
        yield http, manager


def answering(
    *packets: bytes, content_type: str = "text/event-stream", then: Exception | None = None, **headers: str
) -> FastAPI:
    """Give an app that answers POST / with these packets."""

    async def body() -> AsyncGenerator[bytes]:
        for packet in packets:
            yield packet
        if then is not None:
            raise then

    app = FastAPI()

    @app.post("/")
    async def answer(request: Request) -> StreamingResponse:
        await request.body()
        return StreamingResponse(
            body(), headers={"Content-Type": content_type, **{name.replace("_", "-"): text for name, text in headers.items()}}
        )

    return app


def without_ids(body: bytes) -> bytes:
    """Give an event stream as it was before we added our ids."""
    return b"".join(line for line in body.splitlines(keepends=True) if not line.startswith(b"id: "))


# What streams


@pytest.mark.promise("P22")
@pytest.mark.parametrize("asking", [SSE, ANYTHING, {"Accept": "application/json"}], ids=["sse", "anything", "json"])
@pytest.mark.parametrize("body", [OPENAI, ANTHROPIC, AI_SDK, AG_UI], ids=["openai", "anthropic", "ai-sdk", "ag-ui"])
async def test_an_event_stream_is_durable_in_its_own_format_whatever_was_asked_for(asking: dict[str, str], body: bytes) -> None:
    async with around(answering(body)) as (http, _):
        answer = await http.post("/", json={"messages": []}, headers=asking)
        again = await http.post("/", json={"messages": []}, headers={**asking, STREAM_ID: answer.headers[STREAM_ID]})
        mounted = await http.get("/nothing")
    assert without_ids(answer.content) == body
    assert again.content == answer.content
    assert mounted.status_code == 404


@pytest.mark.promise("P22")
async def test_events_cut_anywhere_keep_their_lines_and_lose_what_is_a_connections() -> None:
    body = b": hello\r\nid: theirs\r\nretry: 9\r\ndata: one\rdata:  two\ndata: \r\n\r\n\n: ping\n\nevent: a\ndata\n\n"
    async with around(answering(*(bytes([byte]) for byte in body))) as (http, streams):
        answer = await http.post("/", json={})
        events = await events_of(streams, answer.headers[STREAM_ID])
    assert without_ids(answer.content) == b"data: one\ndata:  two\ndata: \n\nevent: a\ndata: \n\n"
    assert events == [("chunk", {"data": "one\n two\n"}), ("chunk", {"data": "", "event": "a"}), ("done", None)]


@pytest.mark.parametrize("content_type", ["text/event-stream; charset=utf-8", "Text/Event-Stream", "TEXT/EVENT-STREAM;a=b"])
async def test_a_content_type_is_known_in_any_case(content_type: str) -> None:
    async with around(answering(OPENAI, content_type=content_type)) as (http, _):
        answer = await http.post("/", json={})
    assert STREAM_ID in answer.headers
    assert answer.headers["content-type"] == content_type


class Question(BaseModel):
    prompt: str = ""


def usual_endpoints() -> FastAPI:
    app = FastAPI()

    @app.post("/yield", response_class=FastAPIEventSourceResponse)
    async def items(question: Question) -> AsyncIterator[ServerSentEvent]:
        for n in range(3):
            yield ServerSentEvent(data={"n": n, "of": question.prompt}, event="item", id=str(n))

    @app.post("/sse-starlette")
    async def sse(question: Question) -> EventSourceResponse:
        async def events() -> AsyncIterator[dict[str, str]]:
            for n in range(3):
                yield {"event": "item", "data": json.dumps({"n": n, "of": question.prompt}, separators=(",", ":"))}

        return EventSourceResponse(events())

    return app


@pytest.mark.parametrize("path", ["/yield", "/sse-starlette"])
@pytest.mark.parametrize("asking", [SSE, ANYTHING], ids=["sse", "anything"])
async def test_the_usual_endpoints_become_durable_without_a_changed_line(path: str, asking: dict[str, str]) -> None:
    async with around(usual_endpoints()) as (http, _):
        answer = await http.post(path, json={"prompt": "é"}, headers=asking)
        after = answer.text.splitlines()[2].removeprefix("id: ")
        rest = await http.post(path, json={"prompt": "é"}, headers={**asking, "Last-Event-ID": after})
    data = [json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line.startswith("data: ")]
    assert data == [{"n": n, "of": "é"} for n in range(3)]
    assert answer.content.endswith(rest.content)
    assert rest.text.count("data: ") == 2


@pytest.mark.parametrize("genkit_like", [b"", b"{}", b'{"data": {"prompt": "hi"}}'])
@pytest.mark.parametrize("body", [OPENAI, b'data: {"message":"hi","id":1}\n\n', b"data: hello\n\n", b": ping\n\ndata: 1\n\n"])
async def test_whoever_asks_as_genkits_clients_do_gets_what_the_app_answers(genkit_like: bytes, body: bytes) -> None:
    async with around(answering(body)) as (http, _):
        answer = await http.post("/", content=genkit_like, headers=SSE)
    assert without_ids(answer.content) == body.replace(b": ping\n\n", b"")


LIKE_GENKITS: Final = (
    [b'data: {"message":"Nothing"}\n\n', b'data: {"message":"is lost"}\n\n', b"data: [DONE]\n\n"],
    [b'data: {"result":"a"}\n\n', b'data: {"result":"b"}\n\n'],
)


@pytest.mark.parametrize("packets", LIKE_GENKITS, ids=["message", "result"])
@pytest.mark.parametrize("how", ["nothing is sent", "caches are told"])
async def test_what_looks_like_genkits_frames_is_not_taken_for_them(packets: list[bytes], how: str) -> None:
    headers: dict[str, Any] = {"Cache_Control": "no-cache"} if how == "caches are told" else {}
    async with around(answering(*packets, **headers)) as (http, _):
        answer = await http.post("/", content=b'{"data": 1}' if headers else b"", headers=SSE)
    assert without_ids(answer.content) == b"".join(packets)


async def test_an_error_without_a_status_of_genkits_is_the_apps() -> None:
    error = b'data: {"error":{"message":"quota exceeded","code":"insufficient_quota"}}\n\n'
    async with around(answering(error)) as (http, _):
        answer = await http.post("/", json={"data": 1}, headers=SSE)
    assert without_ids(answer.content) == error


@pytest.mark.parametrize("late", [False, True], ids=["quick", "late"])
@pytest.mark.parametrize("around_it", ["nothing", "wraps", "partial", "caches", "own endpoint"])
async def test_what_a_flow_raises_is_hidden_wherever_its_endpoint_is_wrapped(around_it: str, late: bool) -> None:
    async def fails(_: object, ctx: ActionRunContext) -> str:
        await anyio.sleep(1.2 * FIRST_FRAME_SECONDS if late else 0)
        raise RuntimeError("secret://db-password")

    flow = flow_of(fails)
    handler: Any = genkit_fastapi_handler(Genkit())(flow)

    @wraps(handler)
    async def wrapped(request: Request) -> Any:
        return await handler(request)

    async def own(request: Request) -> Any:
        return await handle_genkit_request(request, action=flow)

    app = FastAPI()
    endpoint: Any = {"wraps": wrapped, "partial": partial(handler), "own endpoint": own}.get(around_it, handler)
    app.add_api_route("/fails", endpoint, methods=["POST"], response_model=None)
    outer: Any = _telling_caches(app) if around_it == "caches" else app
    async with around(outer) as (http, _):
        answer = await http.post("/fails", json={"data": 1}, headers=SSE)
    assert "INTERNAL" in answer.text
    assert "secret" not in answer.text


def _telling_caches(app: ASGIApp) -> ASGIApp:
    async def telling(scope: Scope, receive: Receive, send: Send) -> None:
        async def tell(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"cache-control", b"no-cache")]
            await send(message)

        await app(scope, receive, tell)

    return telling


async def test_a_first_token_that_takes_a_while_makes_nobodys_stream_genkits() -> None:
    async def body() -> AsyncGenerator[bytes]:
        await anyio.sleep(1.5 * FIRST_FRAME_SECONDS)
        yield OPENAI

    app = FastAPI()

    @app.post("/")
    async def answer(request: Request) -> StreamingResponse:
        await request.body()
        return StreamingResponse(body(), media_type="text/event-stream")

    async with around(app) as (http, _):
        answered = await http.post("/", json={"data": 1}, headers=SSE)
    assert without_ids(answered.content) == OPENAI


async def test_the_head_is_sent_before_the_first_token() -> None:
    go = anyio.Event()

    async def body() -> AsyncGenerator[bytes]:
        await go.wait()
        yield OPENAI

    app = FastAPI()

    @app.post("/")
    async def answer() -> StreamingResponse:
        return StreamingResponse(body(), media_type="text/event-stream")

    async with around(app) as (http, _):
        for asking in ({"model": "x"}, {"data": "as Genkit asks"}):
            async with http.stream("POST", "/", json=asking, headers=SSE) as response:
                assert response.headers["cache-control"] == "no-cache, no-transform"
                assert STREAM_ID in response.headers
        go.set()


async def test_headers_of_the_first_answer_are_the_apps_and_the_formats_own_come_with_every_later_one() -> None:
    app = answering(AI_SDK, X_Vercel_Ai_Ui_Message_Stream="v1", X_Any="thing", Set_Cookie="a=b")
    async with around(app) as (http, _):
        answer = await http.post("/", json={})
        again = await http.post("/", headers={STREAM_ID: answer.headers[STREAM_ID]})
    assert [answer.headers.get(name) for name in ("x-vercel-ai-ui-message-stream", "x-any", "set-cookie")] == [
        "v1",
        "thing",
        "a=b",
    ]
    assert [again.headers.get(name) for name in ("x-vercel-ai-ui-message-stream", "x-any", "set-cookie")] == ["v1", None, None]


@pytest.mark.parametrize("content_type", ["text/plain; charset=utf-8", "application/x-ndjson"])
async def test_text_is_durable_if_it_is_named(content_type: str) -> None:
    body = '0:"é"\n{"a": 1}\n'.encode()
    app = answering(*(bytes([byte]) for byte in body), content_type=content_type)
    async with around(app) as (http, _):
        assert STREAM_ID not in (await http.post("/", json={})).headers
    async with around(app, media_types=["Text/Plain", "application/x-ndjson"]) as (http, _):
        answer = await http.post("/", json={})
        again = await http.post("/", headers={STREAM_ID: answer.headers[STREAM_ID]})
    assert answer.content == again.content == body
    assert answer.headers["content-type"] == again.headers["content-type"] == content_type


@pytest.mark.parametrize(
    ("encoding", "compress"), [("gzip", gzip.compress), ("deflate", zlib.compress), ("GZip", gzip.compress)]
)
async def test_a_compressed_answer_is_kept_as_it_was_before(encoding: str, compress: Any) -> None:
    packed = compress(OPENAI)
    async with around(answering(packed[:7], packed[7:], Content_Encoding=encoding)) as (http, _):
        answer = await http.post("/", json={})
    assert "content-encoding" not in answer.headers
    assert without_ids(answer.content) == OPENAI


async def test_around_compression_as_apps_have_it() -> None:
    app = answering(OPENAI)
    app.add_middleware(GZipMiddleware, minimum_size=1)
    async with around(app) as (http, _):
        answer = await http.post("/", json={}, headers={"Accept-Encoding": "gzip"})
    assert without_ids(answer.content) == OPENAI


async def test_an_encoding_that_is_not_known_passes_and_is_told_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async with around(answering(b"any bytes", Content_Encoding="br")) as (http, streams):
        async with http.stream("POST", "/", json={}) as answer:
            raw = b"".join([piece async for piece in answer.aiter_raw()])
        assert not await streams.list()
    assert raw == b"any bytes"
    assert "put what compresses around DurableStreaming" in caplog.text


# Answers that are not whole


@pytest.mark.parametrize("then", [ValueError("secret"), None], ids=["crash", "half an answer"])
async def test_an_answer_that_is_not_whole_is_cut_and_says_so_to_who_comes_back(
    then: Exception | None, caplog: pytest.LogCaptureFixture
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        if then is not None:
            raise then

    async with around(app) as (http, streams):
        async with http.stream("POST", "/", json={"model": "x"}) as answer:
            whole = await Reading(answer).cut()
        stream = answer.headers[STREAM_ID]
        (*_, last) = [line.removeprefix("id: ") for line in whole.decode().splitlines() if line.startswith("id: ")]
        info = await streams.info(stream)
        resumed = await http.post("/", json={}, headers={"Last-Event-ID": f"{stream}/{info.life[:8]}/{last}"})
    assert whole.startswith(b"data: 1\nid: 0\n\nevent: error\n")
    assert b"secret" not in whole
    assert info.error == ("ABORTED" if then is None else "INTERNAL")
    assert (resumed.status_code, resumed.content) == (200, b"")
    failures = [record for record in caplog.records if record.levelno >= logging.ERROR and record.exc_info]
    assert len(failures) == (then is not None)


async def test_stopping_cuts_the_answer_and_is_told_to_the_app() -> None:
    told = anyio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        assert (await receive())["type"] == "http.disconnect"
        told.set()

    async with around(app) as (http, _), http.stream("POST", "/", json={"model": "x"}) as answer:
        reading = Reading(answer)
        await reading.until(b"data: 1\nid: 0\n\n")
        stopped = await http.delete("/", headers={STREAM_ID: answer.headers[STREAM_ID]})
        assert stopped.json() == {"stopped": True}
        with anyio.fail_after(5):
            await told.wait()
        assert b'"status":"CANCELLED"' in await reading.cut()


# Who comes back


async def test_a_post_that_is_sent_again_with_its_cursor_goes_on_and_starts_nothing() -> None:
    starts: list[int] = []

    async def body() -> AsyncGenerator[bytes]:
        for n in range(4):
            yield b"event: item\ndata: %d\n\n" % n

    app = FastAPI()

    @app.post("/")
    async def answer() -> StreamingResponse:
        starts.append(1)
        return StreamingResponse(body(), media_type="text/event-stream")

    async with around(app) as (http, streams):
        first = await http.post("/", json={})
        ids = [line.removeprefix("id: ") for line in first.text.splitlines() if line.startswith("id: ")]
        rests = [await http.post("/", json={}, headers={"Last-Event-ID": id_}) for id_ in ids]
        by_query = await http.post("/", json={}, params={"lastEventId": ids[1]})
        stream = first.headers[STREAM_ID]
        await streams.delete(stream)
        async with streams.open(stream, metadata={"route": "/", "answer": ""}) as again:
            await again.done()
        earlier_life = await http.post("/", json={}, headers={"Last-Event-ID": ids[0]})
        await streams.delete(stream)
        gone = await http.post("/", json={}, headers={"Last-Event-ID": ids[0]})
        of_another_route = await http.post("/other", json={}, headers={"Last-Event-ID": ids[0]})
        theirs = await http.post("/", json={}, headers={"Last-Event-ID": "41"})
    assert starts == [1, 1]  # the last one: an id that is not ours is the app's
    assert STREAM_ID in theirs.headers
    assert [rest.text.count("data: ") for rest in rests] == [3, 2, 1, 0]
    assert all(first.content.endswith(rest.content) for rest in rests)
    assert by_query.content == rests[1].content
    for answer_ in (earlier_life, gone, of_another_route):
        assert answer_.status_code == 200
        assert answer_.headers["content-type"].startswith("text/event-stream")
        assert answer_.text.startswith("event: error\n")


@pytest.mark.parametrize("body", [OPENAI, b": nothing\n\n"], ids=["events", "none"])
async def test_an_event_source_that_has_all_events_is_told_so(body: bytes) -> None:
    """It knows no end of ours, for the format has none: it comes back with the id of the last event that it was shown."""
    app = answering(body)
    streams_http = StreamsHTTP(InMemoryStreamManager())
    app.mount("/streams", streams_http)
    async with http_to(DurableStreaming(app, streams_http)) as http:
        stream = (await http.post("/", json={})).headers[STREAM_ID]
        whole = await http.get(f"/streams/{stream}")
        ids = re.findall(rb"id: (.*)\n", whole.content)
        seen = {"Last-Event-ID": ids[-1].decode()} if ids else {}
        all_seen = await http.get(f"/streams/{stream}", headers=seen)
        not_all = await http.get(f"/streams/{stream}", headers={"Last-Event-ID": ids[-2].decode()}) if ids else None
    assert whole.status_code == (200 if ids else 204)
    assert all_seen.status_code == 204
    assert not_all is None or without_ids(not_all.content) == b"data: [DONE]\n\n"


async def test_ids_come_first_for_clients_that_need_them_so() -> None:
    async with around(answering(AG_UI)) as (http, _):
        answer = await http.post("/", json={}, headers={"X-Run-Id": "r1"})
    lines = without_lives(answer.content).splitlines()
    assert lines[:3] == [b"id: 0", b'data: {"type":"RUN_STARTED"}', b""]


async def test_the_app_goes_on_when_its_client_has_gone() -> None:
    go, ended = anyio.Event(), anyio.Event()

    async def body(request: Request) -> AsyncGenerator[bytes]:
        yield b"data: 1\n\n"
        await go.wait()
        assert not await request.is_disconnected()
        yield b"data: 2\n\n"
        ended.set()

    app = FastAPI()

    @app.post("/")
    async def answer(request: Request) -> StreamingResponse:
        return StreamingResponse(body(request), media_type="text/event-stream")

    async with around(app) as (http, streams):
        async with http.stream("POST", "/", json={}) as response:
            await Reading(response).until(b"data: 1")
        go.set()
        with anyio.fail_after(5):
            await ended.wait()
        assert await events_of(streams, response.headers[STREAM_ID]) == [
            ("chunk", {"data": "1"}),
            ("chunk", {"data": "2"}),
            ("done", None),
        ]


# What passes


MCP: Final = {"method": "tools/call", "params": {}, "jsonrpc": "2.0", "id": 1}


@pytest.mark.promise("P22")
@pytest.mark.parametrize(
    "request_",
    [
        {"json": MCP},
        {"json": [MCP]},
        {"json": {"method": "m", "params": {"text": "x" * (2 * SEEN_BODY_BYTES)}, "jsonrpc": "2.0", "id": 1}},
        {"content": b"", "headers": {"MCP-Protocol-Version": "2025-06-18"}},
    ],
    ids=["one", "batch", "long", "header"],
)
async def test_json_rpc_passes_byte_for_byte(request_: dict[str, Any]) -> None:
    body = b"id: theirs\r\nevent: message\r\ndata: {}\r\n\r\n: ping\r\n\r\n"
    async with around(answering(body)) as (http, streams):
        headers = {**SSE, **request_.get("headers", {})}
        answer = await http.post("/", content=request_.get("content"), json=request_.get("json"), headers=headers)
        assert not await streams.list()
    assert answer.content == body
    assert STREAM_ID not in answer.headers


@pytest.mark.promise("P22")
async def test_what_the_app_has_made_durable_itself_is_the_apps() -> None:
    streams_http = StreamsHTTP(InMemoryStreamManager())
    app = FastAPI()
    starts: list[int] = []

    async def numbers() -> AsyncGenerator[int]:
        starts.append(1)
        yield 0
        yield 1

    @app.post("/chat/{chat}")
    async def ask(request: Request, chat: str) -> Response:
        return await streams_http.respond(request, numbers(), id=chat, owner="ann", framing=SSEFraming())

    @app.delete("/chat/{chat}")
    async def stop(request: Request, chat: str) -> Response:
        return await streams_http.cancel(request, chat, owner="ann")

    async with http_to(DurableStreaming(app, streams_http)) as http:
        first = await http.post("/chat/c", headers={"Idempotency-Key": "k"})
        again = await http.post("/chat/c", headers={"Idempotency-Key": "k"})
        named = await http.post("/chat/c", headers={STREAM_ID: "c"})
        rest = await http.post("/chat/c", headers={"Last-Event-ID": first.text.split("id: ")[1].partition("\n")[0]})
        stopped = await http.delete("/chat/c", headers={STREAM_ID: "c"})
        assert [info.id for info in await streams_http.streams.list()] == ["c"]
    assert first.headers.get_list(STREAM_ID) == ["c"]
    assert first.content == again.content == named.content
    assert first.content.endswith(rest.content.removeprefix(b"retry: 2000\n"))
    assert stopped.json() == {"stopped": False}
    assert starts == [1]


async def test_text_about_json_rpc_is_no_json_rpc() -> None:
    async with around(answering(OPENAI)) as (http, _):
        assert STREAM_ID in (await http.post("/", json={"prompt": json.dumps(MCP), "state": {"last": MCP}})).headers


@pytest.mark.promise("P22")
async def test_what_is_not_wanted_passes_byte_for_byte() -> None:
    async with around(answering(OPENAI), when=lambda scope: scope["path"] != "/") as (http, streams):
        answer = await http.post("/", json={})
        assert not await streams.list()
    assert answer.content == OPENAI


@pytest.mark.promise("P22")
async def test_an_upload_is_answered_while_it_comes() -> None:
    """What the app reads is what has come, and it may answer before it has read all."""
    read: list[bytes] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        read.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"early", "more_body": False})

    async def pieces() -> AsyncGenerator[bytes]:
        for _ in range(3):
            yield b"x" * 70_000
            await until(lambda: bool(read))

    async with around(app) as (http, _):
        assert (await http.post("/", content=pieces())).content == b"early"
    assert len(read[0]) < 210_000


async def test_a_client_that_goes_away_is_told_to_an_app_that_does_not_stream() -> None:
    told = anyio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": b"[", "more_body": True})
        assert (await receive())["type"] == "http.disconnect"
        told.set()

    async with around(app) as (http, _):
        async with http.stream("POST", "/", json={}) as answer:
            await anext(answer.aiter_bytes())
        with anyio.fail_after(5):
            await told.wait()


async def test_who_is_not_authorized_gets_no_stream_and_the_app_is_told_that_its_client_has_gone() -> None:
    told = anyio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        try:
            await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        except OSError:
            told.set()

    def authorize(_: object) -> str:
        raise PublicError("PERMISSION_DENIED", "no")

    streams_http = StreamsHTTP(InMemoryStreamManager(), authorize=authorize)
    async with http_to(DurableStreaming(app, streams_http)) as http:
        refused = await http.post("/", json={})
        with anyio.fail_after(5):
            await told.wait()
        assert not await streams_http.streams.list()
    assert refused.status_code == 403
