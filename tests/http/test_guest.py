"""DurableStreaming around apps, clients and middlewares that use all that ASGI allows, and more."""

import gzip
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from datetime import timedelta
from typing import Final

import anyio
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.background import BackgroundTask
from tests.http.servers import STREAM_ID, Reading, events_of, http_to, until
from tests.http.test_pass_through import answering, around, without_ids

from streamkeep import InMemoryStreamManager
from streamkeep.http import DurableStreaming, StreamsHTTP
from streamkeep.http.exchange import FIRST_FRAME_SECONDS
from streamkeep.http.response import ASGIApp, Message, Receive, Scope, Send, Timeouts

SSE_HEAD: Final[Message] = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"text/event-stream")],
}


def body_of(data: bytes, *, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more}


def http_only(answer: Callable[[Scope, Receive, Send], Awaitable[None]]) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        await answer(scope, receive, send)

    return app


# What the app reads


async def read_all(receive: Receive) -> AsyncGenerator[bytes]:
    while True:
        message = await receive()
        assert message["type"] == "http.request"
        yield message["body"]
        if not message["more_body"]:
            return


async def test_an_app_may_begin_its_answer_before_it_has_read_the_request() -> None:
    async def answer(_: Scope, receive: Receive, send: Send) -> None:
        await send(SSE_HEAD)
        await send(body_of(b"data: begun\n\n"))
        asked = b"".join([piece async for piece in read_all(receive)])
        await send(body_of(b"data: %b\n\n" % asked, more=False))

    async with around(http_only(answer)) as (http, _):
        whole = await http.post("/", content=b"asked")
    assert without_ids(whole.content) == b"data: begun\n\ndata: asked\n\n"


async def test_an_upload_is_read_while_its_answer_streams_and_no_faster_than_the_app_reads() -> None:
    pieces, go = 400, anyio.Event()
    sent = 0

    async def answer(_: Scope, receive: Receive, send: Send) -> None:
        await send(SSE_HEAD)
        await send(body_of(b"data: begun\n\n"))
        await go.wait()
        async for piece in read_all(receive):
            await send(body_of(b"data: %d\n\n" % len(piece)))
        await send(body_of(b"", more=False))

    async def upload() -> AsyncGenerator[bytes]:
        nonlocal sent
        for _ in range(pieces):
            sent += 65_536
            yield b"x" * 65_536

    async with around(http_only(answer)) as (http, _):

        async def ask() -> None:
            text = (await http.post("/", content=upload())).text
            sizes = [
                int(line.removeprefix("data: "))
                for line in text.splitlines()
                if line.startswith("data: ") and line != "data: begun"
            ]
            assert sum(sizes) == pieces * 65_536

        async with anyio.create_task_group() as clients:
            clients.start_soon(ask)
            await anyio.sleep(0.5)
            assert sent < pieces * 65_536
            go.set()


async def test_an_app_that_reads_a_request_whose_client_has_gone_is_told_so() -> None:
    told: list[str] = []

    async def answer(_: Scope, receive: Receive, send: Send) -> None:
        await send(SSE_HEAD)
        await send(body_of(b"data: 1\n\n"))
        while (message := await receive())["type"] == "http.request":
            pass
        told.append(message["type"])
        await send(body_of(b"data: 2\n\n", more=False))

    async def endless() -> AsyncGenerator[bytes]:
        yield b"x"
        await anyio.sleep_forever()

    async with around(http_only(answer)) as (http, streams):
        with anyio.move_on_after(1):
            await http.post("/", content=endless())
        await until(lambda: told)
        (info,) = await streams.list()
        assert [content for _, content in await events_of(streams, info.id)] == [{"data": "1"}, {"data": "2"}, None]


class TooLargeError(Exception):
    pass


async def test_what_a_middleware_outside_raises_in_receive_is_the_apps_to_handle() -> None:
    app = answering(b"data: 1\n\n")

    @app.exception_handler(TooLargeError)
    async def too_large(_: Request, error: TooLargeError) -> JSONResponse:
        return JSONResponse({"why": str(error)}, 413)

    async def refuse() -> Message:
        raise TooLargeError("too large")

    async def outside(scope: Scope, receive: Receive, send: Send) -> None:
        await durable(scope, refuse if scope["type"] == "http" else receive, send)

    durable = DurableStreaming(app, InMemoryStreamManager())
    async with http_to(outside) as http:
        answer = await http.post("/", content=b"x")
    assert (answer.status_code, answer.json()) == (413, {"why": "too large"})


async def test_a_receive_that_fails_while_the_answer_streams_is_a_client_that_has_gone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    go, ended = anyio.Event(), anyio.Event()

    async def answer(_: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send(SSE_HEAD)
        await send(body_of(b"data: 1\n\n"))
        await go.wait()
        await send(body_of(b"data: 2\n\n", more=False))
        ended.set()

    async def outside(scope: Scope, receive: Receive, send: Send) -> None:
        asked = 0

        async def receive_once() -> Message:
            nonlocal asked
            asked += 1
            if asked > 1 and scope["type"] == "http":
                raise TooLargeError("too slow")
            return await receive()

        await durable(scope, receive_once, send)

    streams = InMemoryStreamManager()
    durable = DurableStreaming(http_only(answer), streams)
    async with http_to(outside) as http:
        async with http.stream("POST", "/", content=b"x") as response:
            await Reading(response).cut()
        go.set()
        with anyio.fail_after(5):
            await ended.wait()
        assert [content for _, content in await events_of(streams, response.headers[STREAM_ID])][-1] is None
    assert not [record for record in caplog.records if record.name == "streamkeep" and record.levelno >= logging.WARNING]


# What the app sends


async def test_what_an_app_does_behind_its_answer_holds_nobody_up_and_spoils_nothing(caplog: pytest.LogCaptureFixture) -> None:
    go, failed = anyio.Event(), anyio.Event()

    async def later() -> None:
        await go.wait()
        failed.set()
        raise ValueError("behind the answer")

    async def lines() -> AsyncGenerator[bytes]:
        yield b"data: 1\n\n"

    app = FastAPI()

    @app.post("/")
    async def answer() -> StreamingResponse:
        return StreamingResponse(lines(), media_type="text/event-stream", background=BackgroundTask(later))

    async with around(app) as (http, streams):
        with anyio.fail_after(5):
            whole = await http.post("/", json={})
        assert without_ids(whole.content) == b"data: 1\n\n"
        go.set()
        await failed.wait()
        await until(lambda: "behind the answer" in caplog.text)
        assert (await streams.info(whole.headers[STREAM_ID])).status == "done"
    assert caplog.text.count("Traceback") >= 1
    assert len([record for record in caplog.records if record.levelno >= logging.ERROR]) == 1


async def test_what_is_sent_behind_the_end_is_refused_and_is_in_no_stream() -> None:
    refused: list[BaseException] = []

    async def answer(_: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send(SSE_HEAD)
        await send(body_of(b"data: 1\n\n", more=False))
        try:
            await send(body_of(b"data: 2\n\n", more=False))
        except Exception as error:
            refused.append(error)

    async with around(http_only(answer)) as (http, _):
        whole = await http.post("/", json={})
        await until(lambda: refused)
    assert without_ids(whole.content) == b"data: 1\n\n"


async def test_the_first_words_of_a_text_are_shown_at_once() -> None:
    go = anyio.Event()

    async def answer(_: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({**SSE_HEAD, "headers": [(b"content-type", b"text/plain")]})
        await send(body_of(b"first "))
        await go.wait()
        await send(body_of(b"last", more=False))

    async with around(http_only(answer), media_types=["text/plain"]) as (http, _):
        for asking in ({"model": "x"}, {"data": "as Genkit asks"}):
            headers = {"Accept": "text/event-stream, */*"}
            async with http.stream("POST", "/", json=asking, headers=headers) as response:
                reading = Reading(response)
                await reading.until(b"first ")
                go.set()
                assert await reading.whole() == b"first last"
            go = anyio.Event()


async def test_headers_may_be_any_iterable() -> None:
    async def answer(_: Scope, receive: Receive, send: Send) -> None:
        await receive()
        headers: Iterator[tuple[bytes, bytes]] = iter([(b"content-type", b"application/json"), (b"x-any", b"thing")])
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send(body_of(b"{}", more=False))

    async with around(http_only(answer)) as (http, _):
        assert (await http.post("/", json={})).headers["x-any"] == "thing"


async def test_an_answer_begins_once() -> None:
    """A second head is the server's to refuse, as it would be without us."""
    refused: list[BaseException] = []

    async def answer(_: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({**SSE_HEAD, "headers": [(b"content-type", b"application/json"), (b"content-length", b"2")]})
        try:
            await send(SSE_HEAD)
        except Exception as error:
            refused.append(error)
        await send(body_of(b"{}", more=False))

    async with around(http_only(answer)) as (http, streams):
        assert (await http.post("/", json={})).content == b"{}"
        assert refused
        assert not await streams.list()


async def test_a_compressed_answer_may_be_of_several_members() -> None:
    packed = gzip.compress(b"data: 1\n\n") + gzip.compress(b"data: 2\n\n")
    async with around(answering(packed, gzip.compress(b"data: 3\n\n"), Content_Encoding="gzip")) as (http, _):
        answer = await http.post("/", json={})
    assert without_ids(answer.content) == b"data: 1\n\ndata: 2\n\ndata: 3\n\n"


@pytest.mark.parametrize(("asked", "headers"), [(b"", []), (b"{}", [(b"cache-control", b"no-cache")])], ids=["no body", "head"])
async def test_who_thinks_for_long_before_the_first_event_is_not_taken_for_genkits(
    asked: bytes, headers: list[tuple[bytes, bytes]]
) -> None:
    async def answer(_: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({**SSE_HEAD, "headers": [*SSE_HEAD["headers"], *headers]})
        await anyio.sleep(FIRST_FRAME_SECONDS + 0.2)
        await send(body_of(b"data: [DONE]\n\n", more=False))

    async with around(http_only(answer)) as (http, _):
        whole = await http.post("/", content=asked, headers={"Accept": "text/event-stream"})
    assert without_ids(whole.content) == b"data: [DONE]\n\n"


# Around each other, and who is asking


async def test_around_another_an_answer_has_one_name() -> None:
    inner, outer = InMemoryStreamManager(), InMemoryStreamManager()
    async with around(DurableStreaming(answering(b"data: 1\n\n"), inner), outer) as (http, _):
        answer = await http.post("/", json={})
        assert [info.id for info in await inner.list()] == answer.headers.get_list(STREAM_ID)
        assert without_ids(answer.content) == b"data: 1\n\n"


async def test_who_cannot_be_told_by_authorize_is_refused_streams_only() -> None:
    def authorize(_: object) -> str:
        raise KeyError("session")

    app = FastAPI()

    @app.post("/pay")
    async def pay() -> dict[str, int]:
        return {"paid": 1}

    streams_http = StreamsHTTP(InMemoryStreamManager(), authorize=authorize)
    async with http_to(DurableStreaming(app, streams_http)) as http:
        answer = await http.post("/pay", json={}, headers={"Idempotency-Key": "k"})
    assert (answer.status_code, answer.json()) == (200, {"paid": 1})


async def test_a_key_that_was_guessed_gives_nobody_the_answer_of_somebody_else() -> None:
    """The app signs users in, and is not asked when a request comes again."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        who = dict(scope["headers"]).get(b"authorization")
        if who is None:
            await send({"type": "http.response.start", "status": 401, "headers": []})
            await send(body_of(b"", more=False))
            return
        await send(SSE_HEAD)
        await send(body_of(b"data: for %b\n\n" % who, more=False))

    key = {"Idempotency-Key": "1"}
    async with around(http_only(answer)) as (http, streams):
        ann, again, bob = [await http.post("/", headers={**key, "Authorization": who}) for who in ("ann", "ann", "bob")]
        nobody = await http.post("/", headers=key)
        assert len(await streams.list()) == 2
    assert without_ids(ann.content) == b"data: for ann\n\n"
    assert again.content == ann.content
    assert without_ids(bob.content) == b"data: for bob\n\n"
    assert nobody.status_code == 401


async def test_where_a_server_cannot_cut_an_answer_that_is_not_whole_it_is_told_in_words() -> None:
    streams = InMemoryStreamManager()
    streams_http = StreamsHTTP(streams, timeouts=Timeouts(longest=timedelta(milliseconds=10)))
    sent: list[Message] = []

    async def silent() -> Message:
        await anyio.sleep_forever()
        raise AssertionError

    async def send(message: Message) -> None:
        sent.append(message)

    async with streams_http, streams.open("s"):
        scope = {"type": "http", "asgi": {"version": "3.0"}, "method": "GET", "path": "/s", "headers": [], "query_string": b""}
        await streams_http(scope, silent, send)
    assert b"DEADLINE_EXCEEDED" in b"".join(message.get("body", b"") for message in sent)
    assert not sent[-1].get("more_body", False)
