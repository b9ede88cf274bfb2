"""`stream_flow` and `run_flow`: flows of ours, of Genkit's own Python server, and of servers that replay from the start."""

import json
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

import anyio
import pytest
from fastapi import FastAPI
from genkit import ActionRunContext, GenkitError
from genkit_fastapi import serve_flow
from tests.client.forms import FAST, Form, answer, cut, told
from tests.http.servers import count, durable_app, endless, flow_of, serving

from streamkeep import (
    InMemoryStreamManager,
    InvalidArgumentError,
    PublicError,
    RefusedError,
    StreamLostError,
    StreamManager,
    UnexpectedAnswerError,
    client,
)
from streamkeep.http.response import ASGIApp


@dataclass(frozen=True)
class Counted:
    counted: int


async def fail(message: str, ctx: ActionRunContext) -> None:
    """Send a chunk, and fail."""
    ctx.send_chunk("begun")
    raise PublicError("RESOURCE_EXHAUSTED", message, {"a": 1})


async def nothing(_: object, ctx: ActionRunContext) -> None:
    """Send null, and give null."""
    ctx.send_chunk(None)


@pytest.fixture
def streams() -> StreamManager:
    return InMemoryStreamManager()


@pytest.fixture
async def ours(streams: StreamManager) -> AsyncGenerator[str]:
    async with serving(durable_app(count, endless, fail, nothing, streams=streams)) as url:
        yield url


async def refuse(_: object) -> None:
    """Fail without a chunk, as Genkit's flows do."""
    raise GenkitError(status="PERMISSION_DENIED", message="not you")


def genkits_app() -> ASGIApp:
    app = FastAPI()
    for flow in (count, refuse):
        app.include_router(serve_flow(flow_of(flow)))
    return app


# Ours


async def test_it_gives_the_chunks_the_output_and_the_id(form: Form, ours: str, streams: StreamManager) -> None:
    had = await form.read("stream_flow", f"{ours}/count", 5, output_type=Counted)
    assert (had.events, had.output, had.error) == ([0, 1, 2, 3, 4], Counted(5), None)
    assert [info.id for info in await streams.list()] == [had.stream]


async def test_a_run_is_gone_on_with_behind_what_was_seen_and_not_started(
    form: Form, ours: str, streams: StreamManager
) -> None:
    first = await form.read("stream_flow", f"{ours}/count", 5)
    again = await form.read("stream_flow", f"{ours}/count", stream_id=first.stream, seen=3)
    all_seen = await form.read("stream_flow", f"{ours}/count", stream_id=first.stream, seen=5)
    assert [(had.events, had.output, had.stream) for had in (again, all_seen)] == [
        ([3, 4], {"counted": 5}, first.stream),
        ([], {"counted": 5}, first.stream),
    ]
    assert len(await streams.list()) == 1


async def test_null_is_a_chunk_and_an_output(form: Form, ours: str) -> None:
    had = await form.read("stream_flow", f"{ours}/nothing", 1)
    assert (had.events, had.output, had.error) == ([None], None, None)


async def test_a_flow_that_has_failed_is_refused_with_its_status(form: Form, ours: str) -> None:
    had = await form.read("stream_flow", f"{ours}/fail", "used up")
    assert had.events == ["begun"]
    assert isinstance(had.error, RefusedError)
    assert (had.error.status, had.error.message, had.error.details) == ("RESOURCE_EXHAUSTED", "used up", {"a": 1})
    assert (had.error.events, had.error.stream) == (1, had.stream)


async def test_an_unknown_run_is_not_found(form: Form, ours: str) -> None:
    had = await form.read("stream_flow", f"{ours}/count", stream_id="unknown")
    assert isinstance(had.error, RefusedError)
    assert str(had.error) == "NOT_FOUND: Stream not found."


async def test_it_is_run_without_a_stream(form: Form, ours: str, streams: StreamManager) -> None:
    assert await form.call("run_flow", f"{ours}/count", 3, output_type=Counted) == Counted(3)
    with pytest.raises(RefusedError, match="RESOURCE_EXHAUSTED: used up") as failed:
        await form.call("run_flow", f"{ours}/fail", "used up")
    assert failed.value.http_status == 429
    assert not await streams.list()


async def test_a_run_is_stopped_by_its_id(ours: str) -> None:
    async with client.stream_flow(f"{ours}/endless", 1) as run:
        assert await anext(run) == "begun"
        assert await client.stop(f"{ours}/endless", stream_id=run.stream_id) is True
        with pytest.raises(RefusedError, match="CANCELLED"):
            await run.output()


async def test_leaving_it_stops_nothing(ours: str, streams: StreamManager) -> None:
    async with client.stream_flow(f"{ours}/endless", 1) as run:
        await anext(run)
    assert run.stream_id is not None
    assert (await streams.info(run.stream_id)).status == "open"
    await streams.cancel(run.stream_id)


async def test_the_output_can_be_waited_for_without_the_chunks(ours: str) -> None:
    async with client.stream_flow(f"{ours}/count", 600) as run:
        assert await anext(run) == 0
        assert await run.output() == {"counted": 600}
        assert run.seen == 600
        assert await run.output() == {"counted": 600}


async def test_a_server_need_not_say_of_what_type_the_rest_of_a_run_is(form: Form) -> None:
    """As Genkit's Express handler does not."""
    first = answer(b'data: {"message":1}\n\n', headers=b"X-Genkit-Stream-Id: s\r\n", content_type=b"text/plain")
    body = b'data: {"message":1}\n\ndata: {"message":2}\n\ndata: {"result":3}\n\n'
    async with told(first, b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)) as server:
        had = await form.read("stream_flow", server.url, "in")
    assert (had.events, had.output, had.error) == ([1, 2], 3, None)


async def test_an_error_of_the_transport_is_none_of_the_flow(form: Form) -> None:
    failing = (
        b'data: {"message":1,"offset":0}\n\ndata: {"error":{"status":"UNAVAILABLE","message":"m"}}\n\nerror: {"error":{}}\n\n'
    )
    rest = b'data: {"result":2,"offset":1}\n\n'
    named = b"X-Genkit-Stream-Id: s\r\n"
    async with told(answer(failing, headers=named), answer(rest, headers=named)) as server:
        had = await form.read("stream_flow", server.url, "in")
    assert (had.events, had.output, had.error) == ([1], 2, None)
    assert server.header("x-genkit-stream-id") == [None, "s"]
    assert server.header("x-genkit-stream-offset") == [None, "0"]
    assert [request.partition(b"\r\n\r\n")[2] for request in server.requests] == [b'{"data":"in"}', b"{}"]


@pytest.mark.parametrize("options", [{"seen": 1}, {"seen": -1, "stream_id": "s"}])
async def test_what_was_seen_is_of_a_run(form: Form, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError):
        await form.read("stream_flow", "http://host/flow", **options)


async def test_a_chunk_that_is_not_of_the_type_is_unexpected(form: Form, ours: str) -> None:
    had = await form.read("stream_flow", f"{ours}/count", 2, chunk_type=str)
    assert isinstance(had.error, UnexpectedAnswerError)


# A start whose answer is lost


async def test_a_start_whose_answer_was_lost_is_sent_again_only_with_a_key(form: Form) -> None:
    whole = answer(b'data: {"result":1}\n\n')
    async with told(b"", whole) as server:
        had = await form.read("stream_flow", server.url, 1)
    assert isinstance(had.error, StreamLostError)
    assert len(server.requests) == 1
    async with told(b"", whole) as server:
        had = await form.read("stream_flow", server.url, 1, headers={"Idempotency-Key": "k"})
    assert (had.output, len(server.requests)) == (1, 2)


# Genkit's own


async def test_genkits_own_server_is_read_and_names_no_stream(form: Form) -> None:
    async with serving(genkits_app()) as url:
        had = await form.read("stream_flow", f"{url}/count", 4)
        assert (had.events, had.output, had.stream, had.error) == ([0, 1, 2, 3], {"counted": 4}, None, None)
        assert await form.call("run_flow", f"{url}/count", 4) == {"counted": 4}
        had = await form.read("stream_flow", f"{url}/refuse", 1)
        assert isinstance(had.error, RefusedError)
        with pytest.raises(RefusedError):
            await form.call("run_flow", f"{url}/refuse", 1)


async def test_a_run_that_nobody_keeps_is_lost_with_its_connection_and_what_was_had_is_said(form: Form) -> None:
    async with told(cut(b'data: {"message":1}\n\ndata: {"message":2}\n\n'), answer(b"")) as server:
        had = await form.read("stream_flow", server.url, 1)
    assert had.events == [1, 2]
    assert isinstance(had.error, StreamLostError)
    assert (had.error.stream, had.error.events) == (None, 2)
    assert len(server.requests) == 1


def replaying(chunks: Sequence[object], *, named_again: bool) -> list[bytes]:
    """Give what a server of Genkit's for JavaScript answers that is cut behind each chunk in turn: always from the start."""
    frames = [b"data: %b\n\n" % json.dumps({"message": chunk}).encode() for chunk in chunks]
    named = b"X-Genkit-Stream-Id: s\r\n"
    cuts = [
        cut(b"".join(frames[: number + 1]), headers=named if named_again or not number else b"", content_type=b"text/plain")
        for number in range(len(frames))
    ]
    return [*cuts, answer(b"".join(frames) + b'data: {"result":"all"}\n\n', content_type=b"text/plain")]


@pytest.mark.parametrize("named_again", [True, False])
async def test_what_is_replayed_from_the_start_is_given_once(form: Form, *, named_again: bool) -> None:
    chunks = ["same", "same", None, {"a": 1}]
    async with told(*replaying(chunks, named_again=named_again)) as server:
        had = await form.read("stream_flow", server.url, 1)
    assert (had.events, had.output, had.error) == (chunks, "all", None)
    assert server.header("x-genkit-stream-id") == [None, *["s"] * 4]


async def test_a_replay_is_gone_on_with_later_by_how_much_was_seen(form: Form) -> None:
    async with told(replaying([1, 2, 3], named_again=True)[-1]) as server:
        had = await form.read("stream_flow", server.url, stream_id="s", seen=2)
    assert (had.events, had.output) == ([3], "all")


async def test_who_gave_up_can_go_on_with_the_same_run(form: Form) -> None:
    first, *_, last = replaying([1, 2, 3], named_again=True)
    async with told(first, cut(b"")) as server:
        error = (await form.read("stream_flow", server.url, 1)).error
    assert isinstance(error, StreamLostError)
    assert (error.stream, error.events) == ("s", 1)
    async with told(last) as server:
        had = await form.read("stream_flow", server.url, stream_id=error.stream, seen=error.events)
    assert had.events == [2, 3]


async def test_a_flow_that_failed_at_a_server_that_keeps_it_is_refused(form: Form) -> None:
    body = b'data: {"message":1}\n\nerror: {"error":{"status":"UNAVAILABLE","message":"of the flow"}}\n\n'
    async with told(answer(body, headers=b"X-Genkit-Stream-Id: s\r\n")) as server:
        had = await form.read("stream_flow", server.url, 1)
    assert isinstance(had.error, RefusedError)
    assert len(server.requests) == 1


async def test_a_connection_that_is_cut_while_a_flow_runs_is_no_end(ours: str, streams: StreamManager) -> None:
    async with client.stream_flow(f"{ours}/endless", 1, retry=FAST) as run:
        assert await anext(run) == "begun"
        assert run.stream_id is not None
        with anyio.move_on_after(0.05):
            await anext(run)
        await streams.cancel(run.stream_id)
        with pytest.raises(RefusedError, match="CANCELLED"):
            await anext(run)
