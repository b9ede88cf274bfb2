"""The app that is there: what its middleware, its dependencies, its proxy and its disk do must not harm a stream, nor a stream them."""

import logging
import warnings
from collections.abc import AsyncGenerator
from datetime import timedelta
from typing import Any

import anyio
import httpx
import pytest
from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from genkit import ActionRunContext
from genkit import PublicError as GenkitPublicError
from genkit_fastapi import serve_flow
from starlette.applications import Starlette
from starlette.middleware.gzip import GZipMiddleware
from tests.http.servers import STREAM_ID, STREAMING, Reading, count, flow_of, frames_of, http_to, until

from streamkeep import InMemoryStreamManager, PublicError, StorageFullError, StreamManager
from streamkeep.http import DurableStreaming, NDJSONFraming, SSEFraming, StreamsHTTP, TextFraming, Timeouts
from streamkeep.http.response import ASGIApp, Message, Receive, Scope, Send
from streamkeep.http.starlette import answer_errors
from streamkeep.integrations.fastapi import durable_flow
from streamkeep.storages.memory import MemoryStorage
from streamkeep.testing.faults import FaultyStorage, Hold


def chat_app(streams_http: StreamsHTTP, chunks: Any = None) -> FastAPI:
    """Give an app with one endpoint, `/chat`, and the streams to read."""
    app = FastAPI(lifespan=streams_http.lifespan)

    async def numbers() -> AsyncGenerator[int, None]:
        yield 0
        yield 1

    @app.post("/chat")
    async def chat(request: Request) -> Response:
        return await streams_http.respond(request, (chunks or numbers)())

    app.mount("/streams", streams_http)
    return app


@pytest.mark.parametrize("framing", [SSEFraming, NDJSONFraming, TextFraming])
@pytest.mark.parametrize("encoding", ["gzip", "identity"])
async def test_the_head_comes_before_the_first_token_through_compression_in_any_format(framing: Any, encoding: str) -> None:
    go, streams_http = anyio.Event(), StreamsHTTP(InMemoryStreamManager())
    app = FastAPI(lifespan=streams_http.lifespan)
    app.add_middleware(GZipMiddleware)

    async def late() -> AsyncGenerator[str]:
        await go.wait()
        yield "late"

    @app.post("/chat")
    async def chat(request: Request) -> Response:
        return await streams_http.respond(request, late(), framing=framing())

    async with http_to(app) as http:
        with anyio.fail_after(10):
            async with http.stream("POST", "/chat", headers={"Accept-Encoding": encoding}) as answer:
                go.set()
                assert "late" in "".join([text async for text in answer.aiter_text()])


class BodyKeeping:
    """A middleware that keeps the body, as those do that log it: its `receive` gives the same message at once, again and again."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        first = await receive()

        async def kept() -> Message:
            return first

        await self._app(scope, kept, send)


async def test_a_middleware_whose_receive_answers_at_once_freezes_nothing() -> None:
    async def slow() -> AsyncGenerator[int, None]:
        yield 0
        await anyio.sleep(0.3)
        yield 1

    async with http_to(BodyKeeping(chat_app(StreamsHTTP(InMemoryStreamManager()), slow))) as http:
        with anyio.fail_after(10):
            answer = await http.post("/chat", json={})
    assert len(frames_of(answer.content)) == 3


async def test_a_body_of_empty_pieces_without_end_is_given_up_and_freezes_nothing() -> None:
    timeouts = Timeouts(body=timedelta(milliseconds=50))
    inner = chat_app(StreamsHTTP(InMemoryStreamManager(), timeouts=timeouts), lambda: iter(()))

    async def without_end(scope: Scope, receive: Receive, send: Send) -> None:
        async def more() -> Message:
            return {"type": "http.request", "body": b"", "more_body": True}

        await inner(scope, more if scope["type"] == "http" else receive, send)

    async with http_to(without_end) as http:
        with anyio.fail_after(10):
            answer = await http.post("/chat", json={})
    assert answer.status_code == 408


async def test_a_middleware_whose_receive_answers_at_once_is_asked_seldom_while_the_storage_is_slow() -> None:
    asked, hold = 0, Hold()
    storage = FaultyStorage(MemoryStorage())
    inner = FastAPI()

    async def numbers() -> AsyncGenerator[str, None]:
        yield "data: 0\n\n"

    @inner.post("/chat")
    async def chat(request: Request) -> StreamingResponse:
        nonlocal hold
        assert await request.body() == b"{}"
        hold = storage.hold("commit")  # the stream is not opened before
        return StreamingResponse(numbers(), media_type="text/event-stream")

    durable = DurableStreaming(inner, StreamManager(storage))

    async def counting(scope: Scope, receive: Receive, send: Send) -> None:
        async def counted() -> Message:
            nonlocal asked
            asked += 1
            return {"type": "http.request", "body": b"{}", "more_body": False}

        await durable(scope, counted if scope["type"] == "http" else receive, send)

    async with http_to(counting) as http, anyio.create_task_group() as tasks:

        async def release() -> None:
            await until(lambda: asked > 1)
            await hold.reached.wait()
            await anyio.sleep(0.5)
            hold.release()

        tasks.start_soon(release)
        with anyio.fail_after(20):
            answer = await http.post("/chat", content=b"{}")
    assert answer.text.count("data:") == 1
    assert asked < 100


async def test_a_head_leaves_at_once_although_a_middleware_compresses() -> None:
    go_on = anyio.Event()

    async def waiting() -> AsyncGenerator[int, None]:
        await go_on.wait()
        yield 0

    app = chat_app(StreamsHTTP(InMemoryStreamManager()), waiting)
    app.add_middleware(GZipMiddleware, minimum_size=1)
    async with http_to(app) as http:
        with anyio.fail_after(10):
            async with http.stream("POST", "/chat", headers={"Accept-Encoding": "gzip"}) as answer:
                assert answer.headers[STREAM_ID]
                assert answer.headers["cache-control"] == "no-cache, no-transform"
                go_on.set()
                assert len(frames_of(await Reading(answer).whole())) == 2


def test_an_app_of_a_module_is_tested_twice() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Starlette's, of the HTTP library that it will have
        from fastapi.testclient import TestClient

    app = chat_app(StreamsHTTP(InMemoryStreamManager()))
    for _ in range(2):
        with TestClient(app) as client:
            assert len(frames_of(client.post("/chat").content)) == 3


async def test_an_app_that_has_run_and_lacks_its_lifespan_says_what_is_missing_too(caplog: pytest.LogCaptureFixture) -> None:
    streams_http = StreamsHTTP("memory://")
    app = FastAPI(lifespan=streams_http.lifespan)

    @app.post("/")
    async def start(request: Request) -> Response:
        return await streams_http.respond(request, [1])

    async with http_to(app) as http:
        assert (await http.post("/")).status_code == 200
    async with http_to(app, lifespan="off") as http:
        assert (await http.post("/")).status_code == 500
    assert "give its `lifespan` to the app" in caplog.text


async def test_an_app_without_its_lifespan_says_what_is_missing(caplog: pytest.LogCaptureFixture) -> None:
    app = chat_app(StreamsHTTP(InMemoryStreamManager()))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        assert (await http.get("/streams/s")).status_code == 500
        assert "give its `lifespan` to the app" in caplog.text
        assert (await http.post("/chat")).status_code == 500


# Errors


async def test_what_endpoints_and_dependencies_raise_of_our_errors_is_answered_by_its_status(
    caplog: pytest.LogCaptureFixture,
) -> None:
    streams = InMemoryStreamManager()
    app = FastAPI(lifespan=StreamsHTTP(streams).lifespan)
    answer_errors(app)

    def sign_in() -> None:
        raise PublicError("UNAUTHENTICATED", "sign in first")

    @app.get("/info/{stream}")
    async def info(stream: str) -> int:
        return (await streams.info(stream)).tail

    @app.get("/mine", dependencies=[Depends(sign_in)])
    async def mine() -> None:
        pass

    @app.get("/full")
    async def full() -> None:
        raise StorageFullError("no space left")

    async with http_to(app) as http:
        unknown, mine_, full_ = [await http.get(path) for path in ("/info/unknown", "/mine", "/full")]
    assert (unknown.status_code, unknown.json()["error"]["status"]) == (404, "NOT_FOUND")
    assert (mine_.status_code, mine_.json()["error"]["message"]) == (401, "sign in first")
    assert full_.status_code == 507
    assert "sign in first" not in [record.message for record in caplog.records if record.levelno > logging.INFO]


async def test_a_full_disk_is_not_the_clients_fault_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    storage = FaultyStorage(MemoryStorage())
    async with http_to(chat_app(StreamsHTTP(StreamManager(storage)))) as http:
        storage.refuse("commit", times=10, error=StorageFullError("no space left"))
        answer = await http.post("/chat")
    assert answer.status_code == 507
    assert "a request failed: no space left" in caplog.text


async def test_a_chunk_that_is_not_json_is_the_producers_fault(caplog: pytest.LogCaptureFixture) -> None:
    async def strange() -> AsyncGenerator[object, None]:
        yield object()

    async with http_to(chat_app(StreamsHTTP(InMemoryStreamManager()), strange)) as http:
        answer = await http.post("/chat")
    assert frames_of(answer.content)[-1]["error"] == {"status": "INTERNAL", "message": "internal", "details": None}
    assert "the value is not JSON" in caplog.text


async def test_a_public_error_of_a_producer_is_no_failure_of_the_server(caplog: pytest.LogCaptureFixture) -> None:
    async def refusing() -> AsyncGenerator[object, None]:
        yield 0
        raise PublicError("RESOURCE_EXHAUSTED", "enough for today")

    async with http_to(chat_app(StreamsHTTP(InMemoryStreamManager()), refusing)) as http:
        answer = await http.post("/chat")
    assert frames_of(answer.content)[-1]["error"]["message"] == "enough for today"  # type: ignore[index]
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_no_stack_of_genkits_reaches_a_client() -> None:
    async def failing(_input: str) -> str:
        raise GenkitPublicError("NOT_FOUND", "no such model", {"stack": "secret.py, line 1", "model": "m"})

    app = FastAPI()
    app.include_router(durable_flow(flow_of(failing), InMemoryStreamManager()))
    async with http_to(app) as http:
        answer = await http.post("/failing", json={"data": "x"})
    assert "secret.py" not in answer.text
    assert answer.json()["error"]["details"] == {"model": "m"}


async def test_a_flow_without_a_stream_that_panics_is_answered_as_any_failure(caplog: pytest.LogCaptureFixture) -> None:
    class Panic(BaseException):
        """What native libraries raise."""

    async def flow(_input: str, _ctx: Any) -> str:
        raise Panic("secret")

    app = FastAPI()
    app.include_router(durable_flow(flow_of(flow), InMemoryStreamManager()))
    async with http_to(app) as http:
        answer = await http.post("/flow", json={"data": "x"})
    assert (answer.status_code, answer.json()["error"]["status"]) == (500, "INTERNAL")
    assert "secret" not in answer.text
    assert "Panic: secret" in caplog.text


# Requests


async def test_head_gives_the_headers_of_get() -> None:
    streams = InMemoryStreamManager()
    async with http_to(chat_app(StreamsHTTP(streams))) as http:
        stream = (await http.post("/chat")).headers[STREAM_ID]
        for path in (f"/streams/{stream}", f"/streams/{stream}/info", f"/streams/{stream}?after=2", "/streams/unknown"):
            got, head = await http.get(path), await http.head(path)
            assert head.content == b""
            assert head.status_code == got.status_code
            assert head.headers.get("content-type") == got.headers.get("content-type")
        async with streams.open("open"):
            with anyio.fail_after(5):
                assert (await http.head("/streams/open")).status_code == 200


@pytest.mark.parametrize("prefix", ["/api", "/api/v1"])
async def test_streams_are_read_behind_a_proxy_that_takes_a_prefix_off(prefix: str) -> None:
    app = chat_app(StreamsHTTP(InMemoryStreamManager()))

    async def prefixed(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "root_path": prefix}, receive, send)  # what an app does that is told its prefix

    async with http_to(prefixed) as http:
        stream = (await http.post("/chat")).headers[STREAM_ID]
        assert (await http.get(f"/streams/{stream}")).status_code == 200
        assert (await http.get(f"/streams/{stream}/info")).json()["id"] == stream


async def test_streams_are_read_in_apps_that_are_mounted_in_one_another() -> None:
    inner = StreamsHTTP(InMemoryStreamManager())
    app, middle = Starlette(lifespan=inner.lifespan), Starlette()
    middle.mount("/streams", inner)
    app.mount("/api", middle)
    async with http_to(app) as http, inner.streams.open("s"):
        assert (await http.get("/api/streams/s/info")).json()["id"] == "s"


async def test_a_client_that_leaves_a_flow_without_a_stream_is_its_signal_first_and_cancellation_later() -> None:
    told: list[str] = []
    over = anyio.Event()

    async def flow(_input: str, ctx: Any) -> str:
        try:
            await ctx.abort_signal.wait()
            told.append("signal")
            await anyio.sleep(0.2)  # to save what it has
            told.append("saved")
        except anyio.get_cancelled_exc_class():
            told.append("cancelled")
            raise
        finally:
            over.set()
        return "late"

    app = FastAPI()
    app.include_router(durable_flow(flow_of(flow), InMemoryStreamManager()))
    async with http_to(app) as http:
        with pytest.raises(httpx.ReadTimeout):
            await http.post("/flow", json={"data": "x"}, timeout=0.3)
        with anyio.fail_after(5):
            await over.wait()
    assert told == ["signal", "saved"]


async def test_a_client_that_is_gone_at_the_first_send_ends_quietly(caplog: pytest.LogCaptureFixture) -> None:
    streams_http = StreamsHTTP(InMemoryStreamManager())
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)
        raise OSError("the client has gone")

    async with streams_http:
        await (await streams_http.streams.open("s")).done()
        scope = {"type": "http", "method": "GET", "path": "/s", "headers": [], "query_string": b"", "http_version": "1.1"}
        await streams_http(scope, anyio.sleep_forever, send)  # type: ignore[arg-type]
    assert len(sent) == 1
    assert caplog.records == []


async def test_a_flow_of_an_app_that_is_wrapped_counts_too() -> None:
    inner = FastAPI()
    inner.include_router(durable_flow(flow_of(count), InMemoryStreamManager()))
    async with http_to(BodyKeeping(DurableStreaming(inner, InMemoryStreamManager()))) as http:
        with anyio.fail_after(10):
            answer = await http.post("/count", json={"data": 2}, headers={"Accept": "text/event-stream"})
    assert frames_of(answer.content)[-1]["result"] is not None


# Dependencies of a flow


def flow_app(flow: Any, context: Any) -> FastAPI:
    """Give an app that serves one flow, with a dependency for its context."""
    app = FastAPI()
    app.include_router(durable_flow(flow_of(flow), InMemoryStreamManager(), context=context))
    return app


async def test_a_context_dependency_that_keeps_nothing_of_the_body_is_told_so(caplog: pytest.LogCaptureFixture) -> None:
    async def context(request: Request) -> dict[str, bytes]:
        return {"body": b"".join([piece async for piece in request.stream()])}

    async with http_to(flow_app(count, context)) as http:
        with anyio.fail_after(10):
            answer = await http.post("/count", json={"data": 1}, headers=STREAMING)
    assert answer.status_code == 500
    assert "use `request.body()`" in caplog.text


async def test_a_context_dependency_may_read_the_body() -> None:
    """Genkit's context providers are given method, headers and input."""

    async def as_json(request: Request) -> dict[str, Any]:
        return {"asked": (await request.json())["data"]}

    async def told(_: int, ctx: ActionRunContext) -> object:
        return ctx.context["asked"]

    async with http_to(flow_app(told, as_json)) as http:
        whole = await http.post("/told", json={"data": 3})
        streamed = await http.post("/told", json={"data": 4}, headers=STREAMING)
        resumed = await http.post("/told", json={"data": 5}, headers={STREAM_ID: streamed.headers[STREAM_ID]})
    assert whole.json() == {"result": 3}
    assert frames_of(streamed.content) == frames_of(resumed.content) == [{"result": 4, "offset": 0}]


async def test_headers_and_cookies_that_a_dependency_sets_are_sent_with_whatever_is_answered() -> None:
    def setting(response: Response) -> dict[str, Any]:
        response.headers["X-Budget"] = "7"
        response.set_cookie("seen", "yes")
        return {}

    async with http_to(flow_app(count, setting)) as http:
        answers = [
            await http.post("/count", json={"data": 1}),
            await http.post("/count", json={"data": 1}, headers=STREAMING),
            await http.delete("/count", headers={STREAM_ID: "nobodys"}),
        ]
    assert [answer.headers["x-budget"] for answer in answers] == ["7"] * 3
    assert all(answer.headers["set-cookie"].startswith("seen=yes") for answer in answers)
    assert frames_of(answers[1].content)[-1]["result"] == {"counted": 1}
    assert STREAM_ID in answers[1].headers


async def test_what_a_flow_raises_is_logged_with_what_it_comes_from(caplog: pytest.LogCaptureFixture) -> None:
    async def fails(_: int) -> None:
        raise KeyError("the very cause")

    async with http_to(flow_app(fails, None)) as http:
        answer = await http.post("/fails", json={"data": 1}, headers=STREAMING)
    assert "very cause" not in answer.text
    (record,) = [record for record in caplog.records if record.levelno >= logging.ERROR and record.exc_info]
    assert "KeyError: 'the very cause'" in logging.Formatter().formatException(record.exc_info)  # type: ignore[arg-type]


async def test_a_flow_that_fails_inside_durable_streaming_is_a_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def fails(_: int) -> None:
        raise KeyError("the very cause")

    app = FastAPI()
    app.include_router(serve_flow(flow_of(fails)))
    async with http_to(DurableStreaming(app, InMemoryStreamManager())) as http:
        answer = await http.post("/fails", json={"data": 1}, headers=STREAMING)
    assert "very cause" not in answer.text
    assert [
        record.message for record in caplog.records if record.levelno >= logging.ERROR and "the very cause" in record.message
    ]
