"""Genkit's exchange by POST, over sockets: what is asked, what is answered, what is kept."""

import json
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from datetime import timedelta
from typing import Annotated, Any, Final, cast

import anyio
import httpx
import pytest
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from genkit import ActionRunContext
from genkit import PublicError as GenkitPublicError
from genkit.plugin_api import Action, ActionKind
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.routing import Route
from tests.http.servers import (
    OFFSET,
    STREAM_ID,
    STREAMING,
    Reading,
    count,
    durable_app,
    events_of,
    flow_of,
    frames_of,
    http_to,
    raw_exchange,
    wrapped_app,
)

from streamkeep import InMemoryStreamManager, Limits, StreamManager
from streamkeep.errors import HTTP_CODES, PublicError, Status, StorageError
from streamkeep.http import StreamsHTTP
from streamkeep.http.response import ASGIApp, Timeouts, headers_of
from streamkeep.integrations.fastapi import durable_flow
from streamkeep.storages.memory import MemoryStorage
from streamkeep.testing.faults import FaultyStorage

SECRET: Final = "secret://db-password"

AppOf = Callable[..., ASGIApp]

both: Final = pytest.mark.parametrize("app_of", [durable_app, wrapped_app], ids=["durable_flow", "DurableStreaming"])


class Gated:
    """A flow that sends `before`, waits at the gate, and sends `after`. It counts its runs."""

    def __init__(self) -> None:
        self.gate = anyio.Event()
        self.runs = 0
        self.finished = anyio.Event()

    async def flow(self, name: str, ctx: ActionRunContext) -> str:
        self.runs += 1
        ctx.send_chunk({"before": name})
        await self.gate.wait()
        ctx.send_chunk({"after": name})
        self.finished.set()
        return f"bye {name}"

    @property
    def work(self) -> Callable[..., Any]:
        async def talk(name: str, ctx: ActionRunContext) -> str:
            return await self.flow(name, ctx)

        return talk


def frames_for(name: str) -> list[dict[str, object]]:
    return [
        {"message": {"before": name}, "offset": 0},
        {"message": {"after": name}, "offset": 1},
        {"result": f"bye {name}", "offset": 2},
    ]


async def start(http: httpx.AsyncClient, path: str, data: object = None, **headers: str) -> str:
    """Run a flow to its end, and give the stream's id."""
    answer = await http.post(path, json={"data": data}, headers={**STREAMING, **headers})
    assert answer.status_code == 200, answer.text
    return answer.headers[STREAM_ID]


def error_in(answer: httpx.Response) -> dict[str, object]:
    """Give the error of an answer that is one, in JSON."""
    assert answer.headers["content-type"] == "application/json"
    return cast("dict[str, object]", answer.json()["error"])


# Fresh streams


@both
async def test_a_streaming_answer_has_the_id_and_exactly_the_frames_chunk_chunk_result(app_of: AppOf) -> None:
    async with http_to(app_of(count)) as http:
        answer = await http.post("/count", json={"data": 2}, headers=STREAMING)
    assert answer.status_code == 200
    assert answer.headers[STREAM_ID]
    assert answer.headers["content-type"] == "text/event-stream"
    assert answer.headers["cache-control"] == "no-cache, no-transform"
    assert answer.headers["access-control-expose-headers"] == "X-Genkit-Stream-Id"
    assert answer.content == (
        b'data: {"message":0,"offset":0}\n\ndata: {"message":1,"offset":1}\n\ndata: {"result":{"counted":2},"offset":2}\n\n'
    )


@both
@pytest.mark.parametrize(
    ("headers", "query"),
    [
        ([("Accept", "text/event-stream")], ""),
        ([("Accept", "application/json, TEXT/Event-Stream;q=0.9, */*")], ""),
        ([("Accept", "application/json"), ("Accept", "text/event-stream")], ""),
        ([("Accept", "text/event-stream"), ("Accept", "application/json")], ""),
        ([("Accept", "application/json")], "?stream=true"),
        ([], "?x=1&stream=true"),
    ],
    ids=["plain", "list", "two-lines", "two-lines-reversed", "query", "query-of-two"],
)
async def test_an_accept_of_several_values_and_any_case_asks_for_a_stream(
    app_of: AppOf, headers: list[tuple[str, str]], query: str
) -> None:
    async with http_to(app_of(count)) as http:
        request = http.build_request("POST", f"/count{query}", json={"data": 1})
        del request.headers["accept"]
        request.headers = httpx.Headers([*request.headers.multi_items(), *headers])
        answer = await http.send(request)
    assert frames_of(answer.content)[-1]["result"] == {"counted": 1}


@both
async def test_without_such_an_accept_there_is_one_answer_and_no_stream(app_of: AppOf) -> None:
    streams = InMemoryStreamManager()
    async with http_to(app_of(count, streams=streams)) as http:
        answer = await http.post("/count", json={"data": 2})
        assert not await streams.list()
    assert answer.status_code == 200
    assert answer.json() == {"result": {"counted": 2}}
    assert STREAM_ID not in answer.headers


async def test_models_go_out_by_alias_and_without_what_is_none() -> None:
    class Word(BaseModel):
        text: str
        language: str | None = None

    async def words(_: None, ctx: ActionRunContext) -> Word:
        ctx.send_chunk(Word(text="bon", language="fr"))
        return Word(text="bye")

    async with http_to(durable_app(words)) as http:
        answer = await http.post("/words", json={}, headers=STREAMING)
        once = await http.post("/words", json={})
    expected = [{"message": {"text": "bon", "language": "fr"}, "offset": 0}, {"result": {"text": "bye"}, "offset": 1}]
    assert frames_of(answer.content) == expected
    assert once.json() == {"result": {"text": "bye"}}


async def test_a_none_chunk_does_not_end_the_stream() -> None:
    async def gaps(_: None, ctx: ActionRunContext) -> None:
        chunks: list[object] = [None, 0, False, "", [], {}]
        for chunk in chunks:
            ctx.send_chunk(chunk)

    async with http_to(durable_app(gaps)) as http:
        frames = frames_of((await http.post("/gaps", json={}, headers=STREAMING)).content)
    assert [frame["message"] for frame in frames[:-1]] == [None, 0, False, "", [], {}]
    assert frames[-1] == {"result": None, "offset": 6}


async def test_a_silent_stream_is_kept_open_by_spaces_before_its_next_frame() -> None:
    gated = Gated()
    streams_http = StreamsHTTP(InMemoryStreamManager(), timeouts=Timeouts(heartbeat=timedelta(milliseconds=20)))
    async with (
        http_to(durable_app(gated.work, streams=streams_http)) as http,
        http.stream("POST", "/talk", json={"data": "Ada"}, headers=STREAMING) as answer,
    ):
        reading = Reading(answer)
        await reading.until(b"\n\ndata:   ")
        gated.gate.set()
        body = await reading.whole()
    assert body.startswith(b'data: {"message":{"before":"Ada"},"offset":0}\n\ndata:   ')
    assert frames_of(body) == frames_for("Ada")


# Resuming


@both
@pytest.mark.parametrize(
    "body", [b"", b"{}", b'{"data":"Bob"}', b'{"data":', b"\xff", b"[]"], ids=["none", "{}", "other", "cut", "binary", "list"]
)
async def test_resuming_a_completed_stream_replays_it_whole_and_ignores_the_body(app_of: AppOf, body: bytes) -> None:
    gated = Gated()
    gated.gate.set()
    async with http_to(app_of(gated.work)) as http:
        fresh = await http.post("/talk", json={"data": "Ada"}, headers=STREAMING)
        resumed = await http.post("/talk", content=body, headers={**STREAMING, STREAM_ID: fresh.headers[STREAM_ID]})
    assert frames_of(fresh.content) == frames_for("Ada")
    assert resumed.content == fresh.content
    fresh.headers["date"] = resumed.headers["date"]
    assert resumed.headers == fresh.headers
    assert gated.runs == 1


@both
async def test_resuming_a_stream_in_progress_gives_its_chunks_and_the_output(app_of: AppOf) -> None:
    gated = Gated()
    async with (
        http_to(app_of(gated.work)) as http,
        http.stream("POST", "/talk", json={"data": "Ada"}, headers=STREAMING) as one,
    ):
        await Reading(one).until()
        resuming = {**STREAMING, STREAM_ID: one.headers[STREAM_ID]}
        async with http.stream("POST", "/talk", json={}, headers=resuming) as other:
            assert other.headers[STREAM_ID] == one.headers[STREAM_ID]
            reading = Reading(other)
            assert frames_for("Ada")[0] == json.loads((await reading.until()).removeprefix(b"data: "))
            gated.gate.set()
            assert frames_of(await reading.whole()) == frames_for("Ada")
    assert gated.runs == 1


@both
async def test_two_consumers_of_one_stream_get_equal_chunks_and_output(app_of: AppOf) -> None:
    gated = Gated()
    bodies: list[bytes] = []
    async with http_to(app_of(gated.work)) as http:
        request = http.build_request("POST", "/talk", json={"data": "Ada"}, headers=STREAMING)
        fresh = await http.send(request, stream=True)

        async def listen(answer: httpx.Response) -> None:
            bodies.append(await answer.aread())

        async with anyio.create_task_group() as listeners:
            for _ in range(2):
                resuming = {**STREAMING, STREAM_ID: fresh.headers[STREAM_ID]}
                resumed = await http.send(http.build_request("POST", "/talk", headers=resuming), stream=True)
                listeners.start_soon(listen, resumed)
            listeners.start_soon(listen, fresh)
            gated.gate.set()
    assert len(bodies) == 3
    assert set(bodies) == {bodies[0]}
    assert frames_of(bodies[0]) == frames_for("Ada")


@both
@pytest.mark.parametrize("accept", ["text/event-stream", "*/*"])
async def test_an_unknown_stream_is_204_without_a_body(app_of: AppOf, accept: str) -> None:
    async with http_to(app_of(count)) as http:
        answer = await http.post("/count", json={"data": 1}, headers={"Accept": accept, STREAM_ID: "unknown"})
    assert answer.status_code == 204
    assert answer.content == b""
    assert "content-length" not in answer.headers  # RFC 9110, 8.6


async def test_an_expired_stream_is_204_at_once() -> None:
    async with http_to(durable_app(count, streams=InMemoryStreamManager(ttl=timedelta(0)))) as http:
        answer = await http.post("/count", json={"data": 1}, headers=STREAMING)
        again = await http.post("/count", headers={**STREAMING, STREAM_ID: answer.headers[STREAM_ID]})
    assert again.status_code == 204


@both
@pytest.mark.parametrize("header", [OFFSET, "Last-Event-ID"])
async def test_a_cursor_gives_only_what_is_missing(app_of: AppOf, header: str) -> None:
    async with http_to(app_of(count)) as http:
        stream = await start(http, "/count", 3)
        for after in range(-1, 3):
            answer = await http.post("/count", headers={**STREAMING, STREAM_ID: stream, header: str(after)})
            assert [frame["offset"] for frame in frames_of(answer.content)] == list(range(after + 1, 4))


@both
@pytest.mark.parametrize("chunks", [0, 1, 3])
async def test_a_cursor_at_the_terminal_event_still_gets_a_terminal_frame(app_of: AppOf, chunks: int) -> None:
    async with http_to(app_of(count)) as http:
        stream = await start(http, "/count", chunks)
        answer = await http.post("/count", headers={**STREAMING, STREAM_ID: stream, OFFSET: str(chunks)})
    assert frames_of(answer.content) == [{"result": {"counted": chunks}, "offset": chunks}]


async def test_a_cursor_at_the_newest_chunk_of_a_running_stream_waits_for_the_next() -> None:
    gated = Gated()
    async with http_to(durable_app(gated.work)) as http:
        async with http.stream("POST", "/talk", json={"data": "Ada"}, headers=STREAMING) as one:
            await Reading(one).until()
        resuming = {**STREAMING, STREAM_ID: one.headers[STREAM_ID], OFFSET: "0"}
        async with http.stream("POST", "/talk", headers=resuming) as other:
            gated.gate.set()
            assert frames_of(await other.aread()) == frames_for("Ada")[1:]


@pytest.mark.parametrize("header", [OFFSET, "Last-Event-ID"])
async def test_an_offset_that_cannot_be_is_400_with_a_sentence(header: str) -> None:
    async with http_to(durable_app(count)) as http:
        stream = await start(http, "/count", 3)
        for offset in ("-2", "4", "9007199254740992", "9" * 400, "1.5", "one", "0x1", "1 2", "\u00b2", "1,2"):
            raw = [(STREAM_ID.encode(), stream.encode()), (header.encode(), offset.encode("latin-1"))]
            answer = await http.post("/count", headers=raw)
            assert answer.status_code == 400, offset
            assert error_in(answer)["status"] == ("OUT_OF_RANGE" if offset == "4" else "INVALID_ARGUMENT"), offset
            assert "offset" in str(error_in(answer)["message"]), offset


@both
async def test_an_id_that_cannot_be_is_400_with_a_sentence(app_of: AppOf) -> None:
    async with http_to(app_of(count)) as http:
        for stream in ("", "a" * 256, "a b", "a\tb", "a/b", "../x", "%00", "\xe9", ".", "-x", "one, two"):
            for method in ("POST", "DELETE"):
                answer = await http.request(method, "/count", headers=[(STREAM_ID.encode(), stream.encode("latin-1"))])
                assert answer.status_code == 400, stream
                assert error_in(answer)["status"] == "INVALID_ARGUMENT", stream
                assert "stream id" in str(error_in(answer)["message"]), stream


@both
async def test_control_characters_in_an_id_never_arrive_in_an_answer(app_of: AppOf) -> None:
    async with http_to(app_of(count)) as http:
        request = (
            b"POST /count HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\nX-Genkit-Stream-Id: a\x01b\r\n\r\n"
        )
        answer = await raw_exchange(http, request)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"\x01" not in answer


# What is wrong with a request


@pytest.mark.parametrize("headers", [{}, STREAMING], ids=["once", "streaming"])
async def test_a_body_that_is_not_genkits_is_400_in_json_and_starts_nothing(headers: dict[str, str]) -> None:
    deep = b'{"data":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    streams = InMemoryStreamManager()
    async with http_to(durable_app(count, streams=streams)) as http:
        for body in (b'{"data":', b"\xff\xfe", b"[]", b'"data"', b"null", b'{"input":1}', deep):
            answer = await http.post("/count", content=body, headers=headers)
            assert answer.status_code == 400, body[:20]
            assert error_in(answer)["status"] == "INVALID_ARGUMENT", body[:20]
            assert "body" in str(error_in(answer)["message"]), body[:20]
        assert not await streams.list()


async def test_a_body_that_is_too_large_is_4xx_in_json_and_the_connection_goes_on() -> None:
    streams_http = StreamsHTTP(InMemoryStreamManager(), max_body_bytes=1000)
    async with http_to(durable_app(count, streams=streams_http)) as http:
        for size in (1001, 3_000_000):
            answer = await http.post("/count", content=b" " * size, headers=STREAMING)
            assert answer.status_code == 413
            assert error_in(answer)["status"] == "RESOURCE_EXHAUSTED"
            assert "1000 bytes" in str(error_in(answer)["message"])
        assert (await http.post("/count", json={"data": 1})).json() == {"result": {"counted": 1}}


@pytest.mark.parametrize("headers", [{}, STREAMING], ids=["once", "streaming"])
async def test_an_init_for_an_action_that_takes_none_is_400_before_anything_starts(headers: dict[str, str]) -> None:
    gated = Gated()
    streams = InMemoryStreamManager()
    async with http_to(durable_app(gated.work, streams=streams)) as http:
        for init in ({}, None, {"sessionId": "s"}):
            answer = await http.post("/talk", json={"data": "Ada", "init": init}, headers=headers)
            assert answer.status_code == 400
            assert error_in(answer) == {
                "status": "INVALID_ARGUMENT",
                "message": "the action talk takes no init",
                "details": None,
            }
        assert not await streams.list()
    assert gated.runs == 0


async def test_an_action_that_takes_an_init_gets_it() -> None:
    class Session(BaseModel):
        name: str = "nobody"

    async def greet(_: None, ctx: ActionRunContext) -> str:
        session = ctx.init
        assert isinstance(session, Session)
        return session.name

    action: Action[Any, Any, Any, Any] = Action(ActionKind.FLOW, "greet", greet, init_schema=Session)
    streams = InMemoryStreamManager()
    app = FastAPI()
    app.include_router(durable_flow(action, streams))
    async with http_to(app) as http:
        assert (await http.post("/greet", json={"init": {"name": "Ada"}})).json() == {"result": "Ada"}
        assert (await http.post("/greet", json={})).json() == {"result": "nobody"}
        streamed = await http.post("/greet", json={"init": {"name": "Bob"}}, headers=STREAMING)
        assert frames_of(streamed.content) == [{"result": "Bob", "offset": 0}]


# Errors


async def test_an_error_outside_a_stream_has_its_statuss_http_code() -> None:
    async def ours(status: Status) -> None:
        raise PublicError(status, "told to all", {"seat": 12})

    async def genkits(status: Status) -> None:
        raise GenkitPublicError(status, "told to all", {"seat": 12})

    async with http_to(durable_app(ours, genkits)) as http:
        for status, code in HTTP_CODES.items():
            for path in ("/ours", "/genkits"):
                answer = await http.post(path, json={"data": status})
                assert answer.status_code == code, (status, path)
                error = error_in(answer)
                assert (error["status"], error["message"]) == (status, "told to all"), path
                assert cast("dict[str, object]", error["details"])["seat"] == 12, path


@pytest.mark.parametrize(
    ("app_of", "headers"),
    # The fourth, an answer of genkit_fastapi that does not stream, is passed through untouched.
    [(durable_app, {}), (durable_app, STREAMING), (wrapped_app, STREAMING)],
    ids=["durable_flow-once", "durable_flow-streaming", "DurableStreaming-streaming"],
)
async def test_a_flows_exception_is_never_shown(app_of: AppOf, headers: dict[str, str]) -> None:
    async def fails(_: None, ctx: ActionRunContext) -> None:
        ctx.send_chunk("before")
        raise ValueError(SECRET)

    streams = InMemoryStreamManager()
    async with http_to(app_of(fails, streams=streams)) as http:
        answer = await http.post("/fails", json={}, headers=headers)
        everything = [answer]
        if headers:
            stream = answer.headers[STREAM_ID]
            everything.append(await http.post("/fails", headers={STREAM_ID: stream}))
            everything += [await http.get(f"/streams/{stream}"), await http.get(f"/streams/{stream}/info")]
            async with streams.subscribe(stream) as events:
                (stored,) = [event.error async for event in events if event.type.value == "error"]
            assert SECRET in stored.internal
    for one in everything:
        assert SECRET not in str(one.headers) + one.text
        assert "secret" not in one.text
        assert "Traceback" not in one.text
    error = {"status": "INTERNAL", "message": "internal", "details": None}
    if headers:
        assert frames_of(answer.content) == [{"message": "before", "offset": 0}, {"error": error, "offset": 1}]
        assert answer.content.endswith(b'\n\nerror: {"error":{"status":"INTERNAL","message":"internal","details":null}}\n\n')
    else:
        assert (answer.status_code, answer.json()) == (500, {"error": error})


async def test_a_public_error_in_a_stream_is_shown_with_its_details() -> None:
    async def refuses(_: None, ctx: ActionRunContext) -> None:
        ctx.send_chunk("before")
        raise GenkitPublicError("FAILED_PRECONDITION", "the café is closed", {"opens": 9})

    async with http_to(durable_app(refuses)) as http:
        *_, last = frames_of((await http.post("/refuses", json={}, headers=STREAMING)).content)
    error = cast("dict[str, Any]", last["error"])
    assert (error["status"], error["message"], error["details"]["opens"]) == ("FAILED_PRECONDITION", "the café is closed", 9)


@pytest.mark.parametrize("headers", [{}, STREAMING], ids=["once", "streaming"])
async def test_the_input_that_a_flow_refuses_is_invalid_argument(headers: dict[str, str]) -> None:
    async with http_to(durable_app(count)) as http:
        answer = await http.post("/count", json={"data": SECRET}, headers=headers)
    assert "INVALID_ARGUMENT" in answer.text
    assert SECRET not in answer.text
    assert answer.status_code == (200 if headers else 400)


async def test_development_mode_shows_errors_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fails(_: None) -> None:
        raise ValueError(SECRET)

    async with http_to(durable_app(fails)) as http:
        monkeypatch.setenv("GENKIT_ENV", "dev")
        once = await http.post("/fails", json={})
        streamed = await http.post("/fails", json={}, headers=STREAMING)
    assert once.status_code == 500
    for error in (error_in(once), cast("dict[str, object]", frames_of(streamed.content)[0]["error"])):
        assert error["status"] == "INTERNAL"
        assert SECRET in str(error["message"])
        assert "Traceback" in str(error["details"])


@pytest.mark.parametrize("headers", [{}, STREAMING], ids=["once", "streaming"])
async def test_an_output_that_is_not_json_is_an_error_at_the_end(headers: dict[str, str]) -> None:
    async def odd(_: None, ctx: ActionRunContext) -> object:
        ctx.send_chunk("before")
        return {"handle": object()}

    async with http_to(durable_app(odd)) as http:
        answer = await http.post("/odd", json={}, headers=headers)
    if headers:
        first, last = frames_of(answer.content)
        assert first["message"] == "before"
        assert "error" in last
    else:
        assert 400 <= answer.status_code <= 500
        assert error_in(answer)


@pytest.mark.parametrize("chunk", [object(), float("nan"), "\ud800", {1, object()}], ids=["object", "nan", "surrogate", "set"])
async def test_a_chunk_that_is_not_json_ends_the_stream_with_an_error(chunk: object) -> None:
    async def odd(_: None, ctx: ActionRunContext) -> None:
        ctx.send_chunk("before")
        ctx.send_chunk(chunk)

    async with http_to(durable_app(odd)) as http:
        first, last = frames_of((await http.post("/odd", json={}, headers=STREAMING)).content)
    assert first["message"] == "before"
    assert "error" in last


@both
async def test_a_chunk_over_the_limit_ends_the_stream_with_resource_exhausted(app_of: AppOf) -> None:
    async def long(_: None, ctx: ActionRunContext) -> str:
        ctx.send_chunk("before")
        ctx.send_chunk("x" * 5000)
        return "done"

    streams = StreamManager(MemoryStorage(), limits=Limits(max_event_bytes=2000))
    async with http_to(app_of(long, streams=streams)) as http:
        first, last = frames_of((await http.post("/long", json={}, headers=STREAMING)).content)
    assert first["message"] == "before"
    assert cast("dict[str, object]", last["error"])["status"] == "RESOURCE_EXHAUSTED"


async def test_a_storage_that_cannot_be_read_is_nothing_to_who_is_shown_what_is_written_here() -> None:
    gated = Gated()
    storage = FaultyStorage(MemoryStorage())
    streams = StreamManager(storage)
    async with http_to(durable_app(gated.work, streams=streams)) as http:
        async with http.stream("POST", "/talk", json={"data": "Ada"}, headers=STREAMING) as answer:
            reading = Reading(answer)
            await reading.until()
            storage.refuse("read", times=2)
            gated.gate.set()
            assert frames_of(await reading.whole()) == frames_for("Ada")
        await until_it_works(storage)


async def until_it_works(storage: FaultyStorage) -> None:
    while True:
        with suppress(StorageError):
            await storage.read("any")
            return


async def test_a_storage_that_is_down_is_503_in_json() -> None:
    storage = FaultyStorage(MemoryStorage())
    async with http_to(durable_app(count, streams=StreamManager(storage))) as http:
        storage.is_down = True
        for headers in (STREAMING, {STREAM_ID: "some"}):
            answer = await http.post("/count", json={"data": 1}, headers=headers)
            assert answer.status_code == 503
            assert error_in(answer) == {"status": "UNAVAILABLE", "message": "unavailable", "details": None}
        storage.is_down = False


async def test_who_comes_while_the_server_stops_is_told_so_and_the_log_takes_it_for_no_failure(
    caplog: pytest.LogCaptureFixture,
) -> None:
    streams_http = StreamsHTTP(InMemoryStreamManager(), drain=timedelta(0))
    async with http_to(durable_app(count, streams=streams_http)) as http:
        await streams_http.drain()
        answer = await http.post("/count", json={"data": 1}, headers=STREAMING)
    assert answer.status_code == 503
    assert error_in(answer)["status"] == "UNAVAILABLE"
    assert not [record for record in caplog.records if record.exc_info or record.levelname == "ERROR"]


async def test_a_response_that_lasts_too_long_is_cut_with_a_terminal_frame_and_the_stream_goes_on() -> None:
    gated = Gated()
    streams = InMemoryStreamManager()
    streams_http = StreamsHTTP(streams, timeouts=Timeouts(longest=timedelta(milliseconds=50)))
    async with http_to(durable_app(gated.work, streams=streams_http)) as http:
        cut = await http.post("/talk", json={"data": "Ada"}, headers=STREAMING)
        gated.gate.set()
        assert len(await events_of(streams, cut.headers[STREAM_ID])) == 3
    *chunks, last = frames_of(cut.content)  # no chunk, if the machine was so slow that the time was over before the first
    assert chunks in ([], [{"message": {"before": "Ada"}, "offset": 0}])
    assert "offset" not in last
    assert cast("dict[str, object]", last["error"])["status"] == "DEADLINE_EXCEEDED"


async def test_a_reader_who_hears_nothing_for_the_idle_time_is_told_deadline_exceeded() -> None:
    gated = Gated()
    streams_http = StreamsHTTP(InMemoryStreamManager(), timeouts=Timeouts(idle=timedelta(milliseconds=50)))
    async with http_to(durable_app(gated.work, streams=streams_http)) as http:
        *_, last = frames_of((await http.post("/talk", json={"data": "Ada"}, headers=STREAMING)).content)
        gated.gate.set()
    assert cast("dict[str, object]", last["error"])["status"] == "DEADLINE_EXCEEDED"


# The run outlives its request


@both
async def test_the_flow_goes_on_when_its_client_has_gone_and_the_stream_replays_whole(app_of: AppOf) -> None:
    gated = Gated()
    streams = InMemoryStreamManager()
    async with http_to(app_of(gated.work, streams=streams)) as http:
        async with http.stream("POST", "/talk", json={"data": "Ada"}, headers=STREAMING) as answer:
            await Reading(answer).until()
        stream = answer.headers[STREAM_ID]
        assert not gated.finished.is_set()
        gated.gate.set()
        assert len(await events_of(streams, stream)) == 3
        replayed = await http.post("/talk", headers={**STREAMING, STREAM_ID: stream})
    assert frames_of(replayed.content) == frames_for("Ada")
    assert gated.runs == 1


async def test_a_client_of_a_single_answer_that_goes_away_stops_the_flow() -> None:
    begun, cancelled = anyio.Event(), anyio.Event()

    async def long(_: None) -> None:
        begun.set()
        try:
            await anyio.sleep_forever()
        finally:
            cancelled.set()

    async with http_to(durable_app(long)) as http:
        async with anyio.create_task_group() as requests:
            requests.start_soon(lambda: http.post("/long", json={}))
            await begun.wait()
            requests.cancel_scope.cancel()
        with anyio.fail_after(5):
            await cancelled.wait()


@pytest.mark.parametrize("by", ["DELETE /long", "DELETE /streams/{}", "POST /streams/{}/cancel"])
async def test_stopping_sets_the_abort_signal_then_cancels_and_ends_the_stream_as_cancelled(by: str) -> None:
    seen: list[str] = []
    over = anyio.Event()

    async def long(_: None, ctx: ActionRunContext) -> None:
        ctx.send_chunk("begun")
        assert ctx.abort_signal is not None
        try:
            await ctx.abort_signal.wait()
            seen.append("signal")
            await anyio.sleep_forever()
        finally:
            seen.append("cancelled")
            over.set()

    async with (
        http_to(durable_app(long)) as http,
        http.stream("POST", "/long", json={}, headers=STREAMING) as answer,
    ):
        reading = Reading(answer)
        await reading.until()
        stream = answer.headers[STREAM_ID]
        method, path = by.split()
        stopped = await http.request(method, path.format(stream), headers={STREAM_ID: stream})
        assert (stopped.status_code, stopped.json()) == (200, {"stopped": True})
        _, last = frames_of(await reading.whole())
        assert last == {
            "error": {"status": "CANCELLED", "message": "the stream was cancelled", "details": None},
            "offset": 1,
        }
        with anyio.fail_after(5):
            await over.wait()
        again = await http.request(method, path.format(stream), headers={STREAM_ID: stream})
        assert (again.status_code, again.json()) == (200, {"stopped": False})
    assert seen == ["signal", "cancelled"]


async def test_a_flow_that_minds_its_abort_signal_is_not_cancelled() -> None:
    ended = anyio.Event()

    async def minds(_: None, ctx: ActionRunContext) -> str:
        ctx.send_chunk("begun")
        assert ctx.abort_signal is not None
        await ctx.abort_signal.wait()
        ended.set()
        return "partial"

    async with http_to(durable_app(minds)) as http, http.stream("POST", "/minds", json={}, headers=STREAMING) as answer:
        reading = Reading(answer)
        await reading.until()
        await http.delete("/minds", headers={STREAM_ID: answer.headers[STREAM_ID]})
        with anyio.fail_after(5):
            await ended.wait()
        await reading.whole()


@pytest.mark.parametrize("path", ["/count", "/streams/unknown"])
async def test_stopping_what_is_unknown_is_404(path: str) -> None:
    async with http_to(durable_app(count)) as http:
        answer = await http.delete(path, headers={STREAM_ID: "unknown"})
    assert answer.status_code == 404
    assert error_in(answer)["status"] == "NOT_FOUND"


async def test_stopping_without_naming_a_stream_is_400() -> None:
    async with http_to(durable_app(count)) as http:
        answer = await http.delete("/count")
    assert answer.status_code == 400
    assert error_in(answer)["status"] == "INVALID_ARGUMENT"


# The context


async def test_a_context_dependency_runs_before_a_start_a_resume_and_a_stop_in_order_and_can_reject() -> None:
    ran: list[str] = []

    def first(request: Request) -> str:
        ran.append("first")
        if "authorization" not in request.headers:
            raise HTTPException(401, "sign in")
        return request.headers["authorization"]

    async def second(name: Annotated[str, Depends(first)]) -> dict[str, object]:
        ran.append("second")
        return {"auth": {"name": name}}

    async def whoami(_: None, ctx: ActionRunContext) -> object:
        ran.append("flow")
        return ctx.context["auth"]["name"]

    async with http_to(durable_app(whoami, context=second)) as http:
        signed = {"Authorization": "Ada"}
        fresh = await http.post("/whoami", json={}, headers={**STREAMING, **signed})
        assert frames_of(fresh.content) == [{"result": "Ada", "offset": 0}]
        assert ran == ["first", "second", "flow"]
        ran.clear()
        stream = {STREAM_ID: fresh.headers[STREAM_ID]}
        resumed = await http.post("/whoami", headers={**STREAMING, **signed, **stream})
        assert resumed.content == fresh.content
        await http.delete("/whoami", headers={**signed, **stream})
        assert ran == ["first", "second"] * 2
        ran.clear()
        for method, headers in (("POST", STREAMING), ("POST", {}), ("POST", stream), ("DELETE", stream)):
            rejected = await http.request(method, "/whoami", json={}, headers=headers)
            assert (rejected.status_code, rejected.json()) == (401, {"detail": "sign in"})
            assert STREAM_ID not in rejected.headers
        assert ran == ["first"] * 4


# Any async generator


def generator_app(streams_http: StreamsHTTP, chunks: Callable[[], AsyncGenerator[object, None]], framework: str) -> ASGIApp:
    async def endpoint(request: Request) -> Response:
        response: Response = await streams_http.respond(request, chunks())
        return response

    if framework == "starlette":
        return Starlette(routes=[Route("/count", endpoint, methods=["POST"])], lifespan=streams_http.lifespan)
    app = FastAPI(lifespan=streams_http.lifespan)
    app.post("/count")(endpoint)
    return app


frameworks: Final = pytest.mark.parametrize("framework", ["starlette", "fastapi"])


@frameworks
async def test_a_generator_is_a_durable_stream(framework: str) -> None:
    made: list[AsyncGenerator[object, None]] = []
    runs: list[str] = []

    async def numbers() -> AsyncGenerator[object, None]:
        runs.append("run")
        for n in range(2):
            yield {"n": n}

    def chunks() -> AsyncGenerator[object, None]:
        made.append(numbers())
        return made[-1]

    async with http_to(generator_app(StreamsHTTP(InMemoryStreamManager()), chunks, framework)) as http:
        fresh = await http.post("/count")
        resumed = await http.post("/count", headers={STREAM_ID: fresh.headers[STREAM_ID]})
        missed = await http.post("/count", headers={STREAM_ID: fresh.headers[STREAM_ID], OFFSET: "0"})
        unknown = await http.post("/count", headers={STREAM_ID: "unknown"})
    assert frames_of(fresh.content) == [
        {"message": {"n": 0}, "offset": 0},
        {"message": {"n": 1}, "offset": 1},
        {"result": None, "offset": 2},
    ]
    assert resumed.content == fresh.content
    assert frames_of(missed.content) == frames_of(fresh.content)[1:]
    assert unknown.status_code == 204
    assert runs == ["run"]
    for generator in made:  # those that never ran are closed too
        with pytest.raises(StopAsyncIteration):
            await anext(generator)
    assert runs == ["run"]


@frameworks
async def test_a_generators_exception_ends_its_stream_and_is_not_shown(framework: str) -> None:
    async def numbers() -> AsyncGenerator[object, None]:
        yield 0
        raise ValueError(SECRET)

    async with http_to(generator_app(StreamsHTTP(InMemoryStreamManager()), numbers, framework)) as http:
        answer = await http.post("/count")
    assert SECRET not in answer.text
    assert [frame.get("message", frame.get("error")) for frame in frames_of(answer.content)] == [
        0,
        {"status": "INTERNAL", "message": "internal", "details": None},
    ]


@frameworks
async def test_a_generator_goes_on_without_its_client_and_is_closed_when_stopped(framework: str) -> None:
    closed = anyio.Event()
    streams = InMemoryStreamManager()

    async def numbers() -> AsyncGenerator[object, None]:
        try:
            yield 0
            await anyio.sleep_forever()
        finally:
            closed.set()

    async with http_to(generator_app(StreamsHTTP(streams), numbers, framework)) as http:
        async with http.stream("POST", "/count", json={"any": "body"}) as answer:
            await Reading(answer).until()
        assert not closed.is_set()
        await streams.cancel(answer.headers[STREAM_ID])
        with anyio.fail_after(5):
            await closed.wait()


# Several apps, one manager


async def test_two_routers_over_one_manager_and_a_mounted_reader_share_it() -> None:
    streams = InMemoryStreamManager()
    gated = Gated()
    gated.gate.set()
    app = FastAPI()
    app.include_router(durable_flow(flow_of(gated.work), streams), prefix="/one")
    app.include_router(durable_flow(flow_of(gated.work), streams), prefix="/two")
    app.mount("/read", StreamsHTTP(streams))
    async with http_to(app) as http:
        stream = await start(http, "/one/talk", "Ada")
        assert (await http.post("/one/talk", headers={STREAM_ID: stream})).status_code == 200
        assert (await http.post("/two/talk", headers={STREAM_ID: stream})).status_code == 204
        assert (await http.delete("/two/talk", headers={STREAM_ID: stream})).status_code == 404
        assert (await http.get(f"/read/{stream}/info")).json()["tail"] == 3
        assert await start(http, "/two/talk", "Bob")
    assert not streams.is_running


async def test_a_manager_that_the_app_has_entered_is_left_running() -> None:
    async with InMemoryStreamManager() as streams:
        async with http_to(durable_app(count, streams=streams)) as http:
            stream = await start(http, "/count", 1)
        assert streams.is_running
        assert len(await events_of(streams, stream)) == 2


async def test_a_streams_http_that_was_not_entered_says_so(caplog: pytest.LogCaptureFixture) -> None:
    app = FastAPI()
    async with InMemoryStreamManager() as streams:
        app.include_router(durable_flow(flow_of(count), StreamsHTTP(streams)))
        async with http_to(app) as http:
            answer = await http.post("/count", json={"data": 1}, headers=STREAMING)
    assert answer.status_code == 500
    assert "StreamsHTTP is not running" in caplog.text


def test_headers_of_a_request_are_joined() -> None:
    raw = [(b"Accept", b"a"), (b"cookie", b"x=1"), (b"accept", b"b"), (b"Cookie", b"y=2"), (b"x", b"\xe9")]
    assert headers_of({"headers": raw}) == {"accept": "a, b", "cookie": "x=1; y=2", "x": "\xe9"}
