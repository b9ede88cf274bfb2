"""Framings beside Genkit's and the native one, whose tests are in test_wire; and cursors."""

import json
from collections.abc import AsyncGenerator
from datetime import timedelta
from typing import Any, Final

import httpx
import httpx_sse
import pytest
from fastapi import FastAPI, Request, Response
from hypothesis import given
from hypothesis import strategies as st
from tests.http.servers import Reading, http_to, without_lives

from streamkeep import InMemoryStreamManager, InvalidArgumentError, PublicError
from streamkeep.events import ErrorInfo, StreamEvent, chunk_record, done_record, error_record, event_of
from streamkeep.http import (
    AGUIFraming,
    Framing,
    LangGraphFraming,
    NDJSONFraming,
    PassThroughFraming,
    SSEFraming,
    StreamsHTTP,
    TextFraming,
    UIMessagesFraming,
)
from streamkeep.http.response import Timeouts
from streamkeep.wire import Cursor, SSEDecoder, cursor_prefix, parse_cursor

FAILED = ErrorInfo("NOT_FOUND", "no page é", None, "secret")
CANCELLED = ErrorInfo("CANCELLED", "the stream was cancelled")


def events_of(*chunks: object, end: object = None, error: ErrorInfo | None = None) -> list[StreamEvent[object]]:
    records = [*map(chunk_record, chunks), done_record(end) if error is None else error_record(error)]
    return [event_of(record, offset) for offset, record in enumerate(records)]


def body_of(framing: Framing, events: list[StreamEvent[object]]) -> str:
    """Give a whole body; cursors are offsets."""
    return (framing.preamble() + b"".join(framing.event(event, str(event.offset)) for event in events)).decode()


# Cursors

NO_CURSORS: Final = [
    "",
    "0",
    "-1",
    "a/b/0",
    "a/a1a1a1a1",
    "a/a1a1a1a1/",
    "a/a1a1a1a1/-1",
    "/a1a1a1a1/0",
    "a/A1A1A1A1/0",
    "a/a1a1a1a1/9999999999999999",
]


@given(st.text("abcXYZ019_~.:@=+-", min_size=1, max_size=40), st.integers(0, 10**15 - 1))
def test_a_cursor_is_read_as_it_is_written(stream: str, offset: int) -> None:
    assert parse_cursor(f"{cursor_prefix(stream, 'a1' * 16)}{offset}") == Cursor(stream, "a1a1a1a1", offset)


@pytest.mark.parametrize("text", [None, *NO_CURSORS])
def test_what_is_no_cursor_is_somebody_elses_id(text: str | None) -> None:
    assert parse_cursor(text) is None


# Formats


def test_ui_messages_end_in_one_finish_part_and_done() -> None:
    finish = {"type": "finish", "messageMetadata": {"n": 1}}
    whole = 'data: {"type":"start"}\nid: 0\n\n'
    assert (
        body_of(UIMessagesFraming(), events_of({"type": "start"}))
        == whole + 'data: {"type":"finish"}\n\ndata: [DONE]\nid: 1\n\n'
    )
    assert body_of(UIMessagesFraming(), events_of({"type": "start"}, end=finish)) == (
        whole + f"data: {json.dumps(finish, separators=(',', ':'))}\n\ndata: [DONE]\nid: 1\n\n"
    )
    by_chunk = body_of(UIMessagesFraming(), events_of({"type": "start"}, finish, end={"text": "the output"}))
    assert by_chunk.count('"finish"') == 1
    assert "the output" not in by_chunk
    assert by_chunk.endswith("data: [DONE]\nid: 2\n\n")


@pytest.mark.parametrize(
    ("error", "part"),
    [(FAILED, {"type": "error", "errorText": "no page é"}), (CANCELLED, {"type": "abort"})],
    ids=["error", "abort"],
)
def test_ui_messages_that_fail_say_so_and_finish_too(error: ErrorInfo, part: object) -> None:
    frames = [
        frame.removeprefix("data: ")
        for frame in body_of(UIMessagesFraming(), events_of(error=error)).split("\n")
        if "data" in frame
    ]
    assert json.loads(frames[0]) == {"type": "start", "messageId": "0"}
    assert json.loads(frames[1]) == part
    assert frames[2:] == ['{"type":"finish"}', "[DONE]"]


def test_an_answer_without_chunks_is_an_empty_message() -> None:
    assert body_of(UIMessagesFraming(), events_of()) == (
        'data: {"type":"start","messageId":"0"}\n\ndata: {"type":"finish"}\n\ndata: [DONE]\nid: 0\n\n'
    )


async def test_the_query_of_a_post_is_the_apps_and_that_of_a_get_says_how_many_parts_a_reader_has() -> None:
    streams_http = StreamsHTTP(InMemoryStreamManager())
    app = FastAPI(lifespan=streams_http.lifespan)

    @app.post("/chat")
    async def ask(request: Request) -> Response:
        return await streams_http.respond(request, iter(["a"]), key="c", framing=UIMessagesFraming())

    @app.get("/chat")
    async def follow(request: Request) -> Response:
        return await streams_http.follow(request, key="c", framing=UIMessagesFraming())

    async with http_to(app) as http:
        started = await http.post("/chat?startIndex=abc")
        refused = await http.get("/chat?startIndex=abc")
        rest = await http.get("/chat?startIndex=2")
    assert (started.status_code, refused.status_code) == (200, 400)
    assert started.text.endswith(rest.text)
    assert started.text.count("data: ") == rest.text.count("data: ") + 2
    exposed = started.headers.get_list("access-control-expose-headers")
    assert exposed == ["X-Workflow-Run-Id, X-Resumable-Stream-Id", "X-Genkit-Stream-Id"]


def test_who_counts_parts_is_told_of_no_transport_that_fails() -> None:
    counting, other = UIMessagesFraming(), UIMessagesFraming()
    counting.head("s", {"startIndex": "0"})
    other.head("s", {})
    assert counting.error(FAILED) == b""
    assert other.error(FAILED) == b'data: {"type":"error","errorText":"no page \\u00e9"}\n\n'


@pytest.mark.parametrize("chunk", [{"data": "[DONE]"}, {"data": '{"type":"finish"}'}, {"event": "x", "data": "hi"}])
def test_what_looks_like_an_event_of_somebodys_is_data_of_a_ui_message(chunk: object) -> None:
    first = body_of(UIMessagesFraming(), events_of(chunk)).split("\n\n")[1]
    assert json.loads(first.removeprefix("data: ").partition("\n")[0]) == {"type": "data-chunk", "data": chunk}


FINISHED: Final = {"type": "RUN_FINISHED", "threadId": "t", "runId": "r"}


def test_a_run_of_ag_uis_is_its_events_with_the_id_first_and_ends_as_it_says() -> None:
    assert body_of(AGUIFraming(), events_of({"type": "CUSTOM", "value": "é\n"}, FINISHED, end="not sent")) == (
        'id: 0\ndata: {"type":"CUSTOM","value":"\\u00e9\\n"}\n\n'
        'id: 1\ndata: {"type":"RUN_FINISHED","threadId":"t","runId":"r"}\n\n'
    )
    assert body_of(AGUIFraming(), events_of(FINISHED, error=FAILED)).count("\n\n") == 1


@pytest.mark.parametrize(("error", "code"), [(FAILED, "NOT_FOUND"), (CANCELLED, "CANCELLED"), (None, "ABORTED")])
def test_a_run_of_ag_uis_that_does_not_say_how_it_ends_has_failed(error: ErrorInfo | None, code: str) -> None:
    # Neither an event without a type nor what is none at all ends it.
    body = body_of(AGUIFraming(), events_of({"type": 1}, "text", error=error))
    cursor, _, data = body.split("\n\n")[2].partition("\ndata: ")
    assert cursor == "id: 2"
    told = json.loads(data)
    assert (told.pop("type"), told.pop("code")) == ("RUN_ERROR", code)
    assert told.keys() == {"message"}
    assert "secret" not in body


def test_of_two_runs_of_ag_uis_the_last_says_how_it_ends() -> None:
    started = {"type": "RUN_STARTED", "threadId": "t", "runId": "r"}
    for end in (FAILED, None):
        body = body_of(AGUIFraming(), events_of(started, FINISHED, started, error=end))
        assert body.count('"RUN_ERROR"') == 1


def test_nulls_of_ag_uis_events_are_left_out_but_where_they_are_values() -> None:
    events = events_of({"type": "RUN_STARTED", "parentRunId": None}, {"type": "CUSTOM", "name": "x", "value": None}, FINISHED)
    body = body_of(AGUIFraming(), events)
    assert "parentRunId" not in body
    assert '"value":null' in body


@pytest.mark.parametrize(
    ("chunk", "frame"),
    [
        ([[], "updates", {"a": 1}], 'event: updates\ndata: {"a":1}\n'),
        ([["outer:1", "inner:2"], "messages", [1, 2]], "event: messages|outer:1|inner:2\ndata: [1,2]\n"),
        ({"type": "values", "ns": [], "data": {"a": 1}, "interrupts": []}, 'event: values\ndata: {"a":1}\n'),
        ({"type": "messages", "ns": ["outer:1"], "data": [1]}, "event: messages|outer:1\ndata: [1]\n"),
        ([["outer"], "end", 1], "event: end|outer\ndata: 1\n"),
        ([[], "end", 1], 'event: custom\ndata: [[],"end",1]\n'),
        ({"type": "messages", "ns": "outer", "data": 1}, "event: custom\n"),
        ({"type": "step", "data": 1}, "event: custom\n"),
    ],
)
def test_what_langgraph_gives_of_subgraphs_and_of_its_second_version_is_named_as_its_server_does(
    chunk: object, frame: str
) -> None:
    assert body_of(LangGraphFraming(), events_of(chunk)).startswith(frame)


@pytest.mark.parametrize("name", ["end", "error", "", " ", "é", "a\nb"])
def test_a_name_that_would_end_a_run_of_langgraphs_or_is_none_is_custom(name: str) -> None:
    assert body_of(LangGraphFraming(), events_of([name, 1])).startswith("event: custom\n")


@pytest.mark.parametrize(("last", "code"), [(FINISHED, None), ({"type": "CUSTOM"}, "ABORTED")])
async def test_who_comes_back_is_told_how_a_run_of_ag_uis_has_ended(last: object, code: str | None) -> None:
    streams_http = StreamsHTTP(InMemoryStreamManager())
    app = FastAPI(lifespan=streams_http.lifespan)

    @app.get("/run")
    async def run(request: Request) -> Response:
        return await streams_http.follow(request, "s", framing=AGUIFraming())

    async with http_to(app) as http:
        async with streams_http.streams.open("s") as stream:
            await stream.write({"type": "RUN_STARTED"})
            await stream.write(last)
            await stream.done()
        rest = (await http.get("/run", headers={"Last-Event-ID": "1"})).text
        beyond = await http.get("/run", headers={"Last-Event-ID": "7"})
    assert ("RUN_ERROR" in rest, "RUN_STARTED" in rest) == (code is not None, False)
    assert beyond.status_code == 400


@pytest.mark.parametrize("replays", [False, True])
async def test_who_connects_to_a_thread_of_ag_uis_is_shown_its_newest_run_when_that_has_ended_only_if_it_begins_anew(
    *, replays: bool
) -> None:
    streams_http = StreamsHTTP(InMemoryStreamManager())
    app = FastAPI(lifespan=streams_http.lifespan)

    @app.post("/connect")
    async def connect(request: Request) -> Response:
        return await streams_http.follow(request, key="thread", framing=AGUIFraming(replays=replays))

    async with http_to(app) as http:
        for message in ("first", "newest"):
            async with streams_http.streams.open(message, key="thread") as stream:
                await stream.write({"type": "RUN_STARTED", "runId": message})
                await stream.done()
        shown = (await http.post("/connect")).text
    assert ("newest" in shown, "first" in shown) == (replays, False)


def test_a_run_of_langgraphs_is_named_events_and_an_end() -> None:
    events = events_of(("values", {"a": "é\n"}), ["messages", [1, 2]], {"step": 1}, [1, 2], ("a\nb", None), end="not sent")
    assert body_of(LangGraphFraming(), events) == (
        'event: values\ndata: {"a":"\\u00e9\\n"}\nid: 0\n\n'
        "event: messages\ndata: [1,2]\nid: 1\n\n"
        'event: custom\ndata: {"step":1}\nid: 2\n\n'
        "event: custom\ndata: [1,2]\nid: 3\n\n"
        'event: custom\ndata: ["a\\nb",null]\nid: 4\n\n'
        "event: end\ndata: null\nid: 5\n\n"
    )


def test_a_run_of_langgraphs_that_fails_ends_with_an_error() -> None:
    assert body_of(LangGraphFraming(), events_of(error=FAILED)) == (
        'event: error\ndata: {"error":"NOT_FOUND","message":"no page \\u00e9"}\nid: 0\n\n'
    )


def test_a_transport_that_fails_is_a_runs_end_for_ag_ui_and_no_event_for_langgraph() -> None:
    # A client of LangGraph's that has been given no end asks for the run.
    assert AGUIFraming().error(FAILED) == (b'data: {"type":"RUN_ERROR","message":"no page \\u00e9","code":"NOT_FOUND"}\n\n')
    assert LangGraphFraming().error(FAILED) == b""


@pytest.mark.parametrize("framing", [AGUIFraming(), LangGraphFraming()])
def test_a_run_begins_with_nothing_and_its_heartbeat_is_a_comment(framing: Framing) -> None:
    assert (framing.preamble(), framing.heartbeat()) == (b"", b": \n")


def test_lines_of_json_are_the_chunks_and_an_error() -> None:
    assert body_of(NDJSONFraming(), events_of({"a": 1}, "é\n", end={"not": "sent"})) == '{"a":1}\n"\\u00e9\\n"\n'
    lines = body_of(NDJSONFraming(), events_of(1, error=FAILED)).splitlines()
    assert json.loads(lines[1]) == {"error": {"status": "NOT_FOUND", "message": "no page é", "details": None}}


def test_text_is_what_strings_say() -> None:
    assert body_of(TextFraming(), events_of("é", "\n", {"a": 1}, end="not sent")) == 'é\n{"a":1}'
    assert body_of(TextFraming(), events_of("é", error=FAILED)) == "é"


lines = st.text(st.characters(codec="utf-8", exclude_characters="\0")) | st.text(st.sampled_from("\r\n: \u2028é"))


@given(st.lists(st.tuples(lines, lines)), st.booleans())
def test_nothing_in_a_block_breaks_out_of_it(blocks: list[tuple[str, str]], id_first: bool) -> None:
    body = body_of(PassThroughFraming(id_first=id_first), events_of(*({"data": data, "event": name} for data, name in blocks)))
    got = SSEDecoder().feed(body.encode())
    assert [event.id for event in got] == [str(number) for number in range(len(blocks))]
    assert [event.data for event in got] == [data.replace("\r\n", "\n").replace("\r", "\n") for data, _ in blocks]


def test_a_chunk_that_is_no_block_is_a_data_line() -> None:
    assert body_of(PassThroughFraming(), events_of({"n": 1})) == 'data: {"n":1}\nid: 0\n\n'


def test_a_stream_of_events_that_fails_says_so_without_what_is_secret() -> None:
    body = body_of(PassThroughFraming(), events_of({"data": "1"}, error=FAILED))
    assert body.endswith(
        'event: error\ndata: {"error":{"status":"NOT_FOUND","message":"no page \\u00e9","details":null}}\nid: 1\n\n'
    )


def test_a_heartbeat_can_be_an_event_that_a_page_sees() -> None:
    framing = SSEFraming(heartbeat_event="alive")
    assert framing.heartbeat() == b"event: alive\ndata: \n\n"
    with pytest.raises(InvalidArgumentError):
        SSEFraming(heartbeat_event="a\nb")


# Over HTTP


@pytest.mark.parametrize(
    ("framing", "content_type", "whole"),
    [
        (
            UIMessagesFraming,
            "text/event-stream",
            b'data: {"type":"start"}\nid: 0\n\ndata: {"type":"finish"}\n\ndata: [DONE]\nid: 1\n\n',
        ),
        (NDJSONFraming, "application/x-ndjson", b'{"type":"start"}\n'),
        (TextFraming, "text/plain; charset=utf-8", b'{"type":"start"}'),
        (PassThroughFraming, "text/event-stream", b'data: {"type":"start"}\nid: 0\n\n'),
        (
            LangGraphFraming,
            "text/event-stream",
            b'event: custom\ndata: {"type":"start"}\nid: 0\n\nevent: end\ndata: null\nid: 1\n\n',
        ),
    ],
)
async def test_the_first_answer_and_the_reconnect_speak_alike(framing: type[Framing], content_type: str, whole: bytes) -> None:
    streams_http = StreamsHTTP(InMemoryStreamManager())
    app = FastAPI(lifespan=streams_http.lifespan)

    async def parts() -> AsyncGenerator[object]:
        yield {"type": "start"}

    @app.post("/chat/{chat}")
    async def start(request: Request, chat: str) -> Response:
        return await streams_http.respond(request, parts(), id=chat, framing=framing())

    @app.get("/chat/{chat}/stream")
    async def follow(request: Request, chat: str) -> Response:
        return await streams_http.follow(request, chat, framing=framing())

    async with http_to(app) as http:
        first, again = await http.post("/chat/c"), await http.get("/chat/c/stream")
    assert without_lives(first.content) == without_lives(again.content) == whole
    assert first.headers["content-type"] == again.headers["content-type"] == content_type
    assert ("x-vercel-ai-ui-message-stream" in first.headers) == (framing is UIMessagesFraming)


CUT: Final[dict[type[Framing], bool]] = {
    AGUIFraming: False,
    UIMessagesFraming: False,
    LangGraphFraming: False,
    NDJSONFraming: False,
    SSEFraming: False,
    TextFraming: True,
    PassThroughFraming: True,
}


@pytest.mark.parametrize(("framing", "is_cut"), CUT.items())
async def test_a_stream_that_fails_is_cut_where_no_frame_tells(framing: type[Framing], is_cut: bool) -> None:
    streams_http = StreamsHTTP(InMemoryStreamManager())
    app = FastAPI(lifespan=streams_http.lifespan)

    async def fails() -> AsyncGenerator[object]:
        yield {"type": "start"}
        raise PublicError("NOT_FOUND", "no page")

    @app.post("/chat")
    async def start(request: Request) -> Response:
        return await streams_http.respond(request, fails(), framing=framing())

    async with http_to(app) as http, http.stream("POST", "/chat") as answer:
        reading = Reading(answer)
        body = await (reading.cut() if is_cut else reading.whole())
    assert b"start" in body
    assert (b"no page" in body) == (framing is not TextFraming)


@pytest.mark.parametrize("framing", CUT)
async def test_an_answer_that_may_last_no_longer_is_cut_in_every_framing_but_genkits(framing: type[Framing]) -> None:
    streams_http = StreamsHTTP(InMemoryStreamManager(), timeouts=Timeouts(longest=timedelta(seconds=1)))
    app = FastAPI(lifespan=streams_http.lifespan)

    @app.get("/follow")
    async def follow(request: Request) -> Response:
        return await streams_http.follow(request, "live", framing=framing())

    async with http_to(app) as http, streams_http.streams.open("live") as stream:
        await stream.write({"type": "start"})
        async with http.stream("GET", "/follow") as answer:
            assert b"start" in await Reading(answer).cut()
        await stream.done()


# Cursors over HTTP


@pytest.mark.promise("P21")
@pytest.mark.parametrize("how", ["header", "polyfill", "query"])
async def test_a_cursor_goes_on_in_the_life_that_it_is_of_and_in_no_other(how: str) -> None:
    streams_http = StreamsHTTP(InMemoryStreamManager())

    def named(cursor: str) -> dict[str, Any]:
        match how:
            case "header":
                return {"headers": {"Last-Event-ID": cursor}}
            case "polyfill":
                return {"params": {"lastEventId": cursor}}
            case _:
                return {"params": {"after": cursor}}

    async with http_to(streams_http, lifespan="off") as http, streams_http:
        streams = streams_http.streams
        async with streams.open("s") as stream:
            await stream.write("old")
            await stream.write("older")
            await stream.done()
        first, *_ = [event.id async for event in httpx_sse.EventSource(await http.get("/s")).aiter_sse()]
        rest = await http.get("/s", **named(first))
        await streams.delete("s")
        async with streams.open("s") as stream:
            for number in range(5):
                await stream.write(f"new {number}")
            await stream.done()
        another_life = await http.get("/s", **named(first))
        async with streams.open("t") as stream:
            await stream.done()
        another_stream = await http.get("/t", **named(first))
    assert isinstance(rest, httpx.Response)
    assert ("older" in rest.text, '"old"' in rest.text) == (True, False)
    assert (another_life.status_code, another_life.json()["error"]["status"]) == (400, "OUT_OF_RANGE")
    assert "new" not in another_life.text
    assert another_stream.status_code == 400
