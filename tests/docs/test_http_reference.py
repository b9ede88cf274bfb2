"""The reference of HTTP: its codes and headers are the code's, and what its tables say of endings and reconnecting holds."""

import re
from collections.abc import AsyncGenerator
from datetime import timedelta
from typing import Any, Final

import httpx
import pytest
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from starlette.middleware.base import BaseHTTPMiddleware
from tests.http.servers import STREAM_ID, Reading, http_to, without_lives
from tests.test_docs import ROOT

from streamkeep import InMemoryStreamManager, PublicError
from streamkeep.errors import HTTP_CODES
from streamkeep.http import (
    AGUIFraming,
    DurableStreaming,
    Framing,
    GenkitFraming,
    LangGraphFraming,
    NDJSONFraming,
    PassThroughFraming,
    SSEFraming,
    StreamsHTTP,
    TextFraming,
    Timeouts,
    UIMessagesFraming,
)

PAGE: Final = (ROOT / "docs/reference/http.md").read_text()
FRAMINGS: Final[list[type[Framing]]] = [
    GenkitFraming,
    SSEFraming,
    PassThroughFraming,
    AGUIFraming,
    LangGraphFraming,
    UIMessagesFraming,
    NDJSONFraming,
    TextFraming,
]
WORDLESS: Final = {LangGraphFraming, UIMessagesFraming, TextFraming}
"""They have no word for a transport's error."""
TAKE_NO_204: Final = {AGUIFraming, LangGraphFraming}


def test_every_status_has_its_code() -> None:
    rows = re.findall(r"^\| (\d{3}) \| ([^|]*) \|", PAGE, re.MULTILINE)
    shown = {(int(code), status) for code, statuses in rows for status in re.findall(r"`(\w+)`", statuses)}
    assert {(code, status) for status, code in HTTP_CODES.items()} <= shown
    ours = {(408, "DEADLINE_EXCEEDED"), (413, "RESOURCE_EXHAUSTED"), (507, "RESOURCE_EXHAUSTED")}
    assert shown - ours == {(code, status) for status, code in HTTP_CODES.items()}


def app_of(framing: type[Framing], **options: Any) -> tuple[FastAPI, StreamsHTTP]:
    """Give an app with an endpoint that fails, and one that follows."""
    streams_http = StreamsHTTP(InMemoryStreamManager(), **options)
    app = FastAPI(lifespan=streams_http.lifespan)

    async def failing() -> AsyncGenerator[object]:
        yield {"type": "start"}
        raise PublicError("NOT_FOUND", "no page")

    async def whole() -> AsyncGenerator[object]:
        yield {"type": "start"}

    @app.post("/failing")
    async def fail(request: Request) -> Response:
        return await streams_http.respond(request, failing(), framing=framing())

    @app.post("/whole")
    async def end(request: Request) -> Response:
        return await streams_http.respond(request, whole(), framing=framing())

    @app.get("/follow")
    async def follow(request: Request) -> Response:
        return await streams_http.follow(request, "live", framing=framing())

    return app, streams_http


async def ending_of(http: httpx.AsyncClient, method: str, path: str) -> tuple[bytes, bool]:
    """Give what came, and whether it was cut."""
    async with http.stream(method, path) as answer:
        reading = Reading(answer)
        try:
            return await reading.whole(), False
        except httpx.RemoteProtocolError:
            return reading.body, True


@pytest.mark.parametrize("framing", FRAMINGS)
async def test_an_answer_ends_as_the_table_says(framing: type[Framing]) -> None:
    app, _ = app_of(framing)
    async with http_to(app) as http:
        whole, failed = await ending_of(http, "POST", "/whole"), await ending_of(http, "POST", "/failing")
    app, streams_http = app_of(framing, timeouts=Timeouts(longest=timedelta(milliseconds=200)))
    async with http_to(app) as http, streams_http.streams.open("live"):
        too_long = await ending_of(http, "GET", "/follow")
    assert not whole[1]
    assert failed[1] == (framing in {PassThroughFraming, TextFraming})
    assert (b"no page" in failed[0]) == (framing is not TextFraming)
    assert too_long[1] == (framing is not GenkitFraming)
    assert (b"DEADLINE_EXCEEDED" in too_long[0]) == (framing is GenkitFraming)


@pytest.mark.parametrize("framing", FRAMINGS)
async def test_a_stream_that_is_deleted_under_its_reader_ends_as_the_table_says(framing: type[Framing]) -> None:
    app, streams_http = app_of(framing)
    async with http_to(app) as http:
        stream = await streams_http.streams.open("live")
        await stream.write({"type": "start"})
        async with http.stream("GET", "/follow") as answer:
            reading = Reading(answer)
            await reading.until(b"start")
            await streams_http.streams.delete("live")
            body = await (reading.whole() if framing is GenkitFraming else reading.cut())
    assert (b"NOT_FOUND" in body) == (framing not in WORDLESS)


async def test_a_middleware_that_wraps_the_response_makes_a_cut_a_clean_end() -> None:
    app, _ = app_of(TextFraming)

    async def pass_on(request: Request, call_next: Any) -> Response:
        response: Response = await call_next(request)
        return response

    app.add_middleware(BaseHTTPMiddleware, dispatch=pass_on)
    async with http_to(app) as http:
        assert await ending_of(http, "POST", "/failing") == (b'{"type":"start"}', False)


@pytest.mark.parametrize("framing", FRAMINGS)
async def test_who_comes_back_is_answered_as_the_table_says(framing: type[Framing]) -> None:
    app, streams_http = app_of(framing)
    async with http_to(app) as http:
        first = await http.post("/whole")
        stream = first.headers[STREAM_ID]
        life = (await streams_http.streams.info(stream)).life[:8]
        by_id = await http.post("/whole", headers={STREAM_ID: stream, "X-Genkit-Stream-Offset": "1"})
        by_cursor = await http.post("/whole", headers={"Last-Event-ID": f"{stream}/{life}/1"})
        unknown_by_id = await http.post("/whole", headers={STREAM_ID: "unknown"})
        unknown_by_cursor = await http.post("/whole", headers={"Last-Event-ID": "unknown/a1a1a1a1/1"})
        empty = await http.post("/whole", headers={STREAM_ID: ""})
    assert by_id.status_code == (200 if framing is GenkitFraming or framing in TAKE_NO_204 else 204)
    assert by_cursor.status_code == unknown_by_cursor.status_code == 200
    assert (b"result" in by_cursor.content) == (framing is GenkitFraming)
    assert b"start" not in by_cursor.content
    assert (unknown_by_id.status_code, empty.status_code) == (200 if framing in TAKE_NO_204 else 204, 400)
    assert (b"NOT_FOUND" in unknown_by_cursor.content) == (framing not in WORDLESS)


@pytest.mark.parametrize("framing", FRAMINGS)
async def test_who_has_all_that_is_shown_has_seen_all(framing: type[Framing]) -> None:
    app, streams_http = app_of(framing)
    async with http_to(app) as http:
        async with streams_http.streams.open("live") as stream:
            await stream.write({"type": "start"})
            await stream.done()
        answers = [await http.get("/follow", headers={"Last-Event-ID": offset}) for offset in ("0", "1")]
    shows_done = framing in {GenkitFraming, SSEFraming, UIMessagesFraming, AGUIFraming, LangGraphFraming}
    assert framing().shows_done == shows_done
    assert (answers[0].content == b"") != shows_done
    nothing_is_left = 200 if framing in TAKE_NO_204 else 204
    assert answers[0].status_code == (200 if shows_done else nothing_is_left)
    assert answers[1].status_code == (200 if framing is GenkitFraming else nothing_is_left)
    assert (answers[1].content == b"") == (framing is not GenkitFraming)


async def test_a_stream_is_written_while_a_writer_holds_it() -> None:
    app, streams_http = app_of(SSEFraming)
    app.mount("/streams", streams_http)
    async with http_to(app) as http:

        async def is_written() -> bool:
            written: bool = (await http.get("/streams/s/info")).json()["isWritten"]
            return written

        stream = await streams_http.streams.open("s")
        held = await is_written()
        await stream.close()
        released = await is_written()
        async with streams_http.streams.open("s", resume=True) as stream:
            resumed = await is_written()
            await stream.done()
        assert (held, released, resumed, await is_written()) == (True, False, True, False)


async def test_durable_streaming_is_a_middleware_like_any_other() -> None:
    app = FastAPI()

    async def events() -> AsyncGenerator[bytes]:
        yield b"data: 1\n\n"

    @app.post("/")
    async def ask() -> StreamingResponse:
        return StreamingResponse(events(), media_type="text/event-stream")

    app.add_middleware(DurableStreaming, streams=InMemoryStreamManager())
    async with http_to(app) as http:
        answer = await http.post("/")
        again = await http.post("/", headers={STREAM_ID: answer.headers[STREAM_ID]})
    assert without_lives(answer.content) == b"data: 1\nid: 0\n\n"
    assert again.content == answer.content
