"""`subscribe`: the streams of a real server, as its own manager gives them."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
import httpx2
import pytest
from anyio.lowlevel import checkpoint
from fastapi import FastAPI, Request, Response
from pydantic import TypeAdapter
from tests.client.forms import FAST, Form, answer, cut, free_port, offsets_of, silent, told
from tests.http.servers import serving, until
from tests.inside import feeds_of

from streamkeep import (
    InMemoryStreamManager,
    InvalidArgumentError,
    PublicError,
    RefusedError,
    StreamEventType,
    StreamLostError,
    StreamManager,
    UnexpectedAnswerError,
    client,
)
from streamkeep.client import Retry, subscribe, sync
from streamkeep.http import SSEFraming, StreamsHTTP
from streamkeep.http.access import Access


@dataclass(frozen=True)
class Token:
    text: str


@pytest.fixture
def streams() -> StreamManager:
    return InMemoryStreamManager()


@pytest.fixture
async def url(streams: StreamManager) -> AsyncGenerator[str]:
    """Give a server with a stream `s` of three chunks and an output, which needs a token."""

    def authorize(access: Access) -> None:
        if access.headers.get("authorization") not in {None, "Bearer right"}:
            raise PublicError("PERMISSION_DENIED", "not you")

    streams_http = StreamsHTTP(streams, authorize=authorize)
    app = FastAPI(lifespan=streams_http.lifespan)

    async def words() -> AsyncGenerator[object]:
        for text in ("a", "b", "c"):
            yield {"text": text}

    @app.post("/ask")
    async def ask(request: Request) -> Response:
        return await streams_http.respond(request, words(), framing=SSEFraming())

    @app.get("/chats/{chat}")
    async def chat(request: Request, chat: str) -> Response:
        return await streams_http.follow(request, key=chat)

    app.mount("/streams", streams_http)
    async with serving(app) as url:
        async with streams.open("s") as stream:
            for text in ("a", "b", "c"):
                await stream.write({"text": text})
            await stream.done({"text": "abc"})
        yield url


async def test_it_gives_what_the_manager_gives(form: Form, streams: StreamManager, url: str) -> None:
    async with streams.subscribe("s") as events:
        expected = [(event.type, event.offset, event.data) async for event in events]
    had = await form.read("subscribe", f"{url}/streams/s")
    assert [(event.type, event.offset, event.data) for event in had.events] == expected
    assert had.events[-1].output == {"text": "abc"}
    assert (had.stream, had.first_offset, had.error) == ("s", 0, None)


async def test_chunks_are_of_the_type_that_was_asked_for(form: Form, url: str) -> None:
    had = await form.read("subscribe", f"{url}/streams/s", chunk_type=Token, output_type=Token)
    assert [had.events[0].chunk, had.events[-1].output] == [Token("a"), Token("abc")]
    adapter = TypeAdapter(Token | int)
    had = await form.read("subscribe", f"{url}/streams/s", chunk_type=adapter, output_type=adapter)
    assert [had.events[0].chunk, had.events[-1].output] == [Token("a"), Token("abc")]


@pytest.mark.parametrize(
    ("start", "offsets"),
    [
        ({"after": 1}, [2, 3]),
        ({"after": -1}, [0, 1, 2, 3]),
        ({"after": 3}, []),
        ({"last": 2}, [2, 3]),
        ({"last": 0}, []),
        ({"last": 9}, [0, 1, 2, 3]),
    ],
)
async def test_it_begins_where_it_is_told_to(form: Form, url: str, start: dict[str, int], offsets: list[int]) -> None:
    had = await form.read("subscribe", f"{url}/streams/s", **start)
    assert offsets_of(had) == offsets
    if offsets:
        assert had.first_offset == offsets[0]


async def test_a_cursor_goes_on_and_in_no_later_stream_of_its_id(form: Form, streams: StreamManager, url: str) -> None:
    cursor = (await form.read("subscribe", f"{url}/streams/s")).cursor
    assert cursor is not None
    middle = cursor.rpartition("/")[0] + "/1"
    assert offsets_of(await form.read("subscribe", f"{url}/streams/s", after=middle)) == [2, 3]
    await streams.delete("s")
    async with streams.open("s") as stream:
        for number in range(5):
            await stream.write(number)
        await stream.done()
    had = await form.read("subscribe", f"{url}/streams/s", after=middle)
    assert (had.events, had.error and had.error.status) == ([], "OUT_OF_RANGE")


async def test_one_that_does_not_follow_ends_behind_what_is_stored(form: Form, streams: StreamManager, url: str) -> None:
    stream = await streams.open("open")
    await stream.write(1)
    had = await form.read("subscribe", f"{url}/streams/open", follow=False)
    assert (offsets_of(had), had.error) == ([0], None)
    await stream.done()


@pytest.mark.parametrize(
    ("query", "offsets"),
    [
        ("last=2", [1, 2]),
        ("last=0", []),
        ("after=1", [2]),
        ("follow=false", [0, 1, 2]),
        ("last=1&x=1", [2]),
        ("lastEventId=0", [1, 2]),
    ],
)
async def test_a_url_may_say_where_to_begin_and_whether_to_follow(
    form: Form, streams: StreamManager, url: str, query: str, offsets: list[int]
) -> None:
    stream = await streams.open("open")
    for number in range(3):
        await stream.write(number)
    had = await form.read("subscribe", f"{url}/streams/open?{query}", follow="follow" in query)
    assert (offsets_of(had), had.error) == (offsets, None)
    if offsets:
        assert had.first_offset == offsets[0]
    await stream.done()


async def test_a_cut_answer_that_does_not_follow_is_gone_on_with_and_ends(form: Form) -> None:
    one, two = b"event: chunk\ndata: 1\nid: s/a1a1a1a1/0\n\n", b"event: chunk\ndata: 2\nid: s/a1a1a1a1/1\n\n"
    async with told(cut(one), answer(two)) as server:
        had = await form.read("subscribe", f"{server.url}/s?follow=false&last=9")
    assert (offsets_of(had), had.error, len(server.requests)) == ([0, 1], None, 2)
    assert all(b"follow=false" in request for request in server.requests)


@pytest.mark.parametrize(
    ("query", "arguments"),
    [
        ("last=1", {"after": 1}),
        ("last=1", {"last": 2}),
        ("after=1", {"after": 1}),
        ("lastEventId=s/a1a1a1a1/0", {"last": 0}),
        ("last=1&after=1", {}),
        ("follow=true", {"follow": False}),
    ],
)
async def test_a_url_and_arguments_that_say_different_things_are_refused(
    form: Form, query: str, arguments: dict[str, Any]
) -> None:
    with pytest.raises(InvalidArgumentError, match="the URL"):
        await form.read("subscribe", f"http://127.0.0.1:1/?{query}", **arguments)


async def test_what_a_url_has_of_its_own_under_these_names_is_its_servers_affair(form: Form) -> None:
    done = b"event: done\ndata: 1\nid: s/a1a1a1a1/0\n\n"
    async with told(answer(done)) as server:
        for query in ("last=Smith", "follow=alice", "after=noon", "last="):
            assert offsets_of(await form.read("subscribe", f"{server.url}/?{query}")) == [0]


async def test_a_stream_that_has_failed_ends_in_its_error(form: Form, streams: StreamManager, url: str) -> None:
    async with streams.open("failed") as stream:
        await stream.error(PublicError("RESOURCE_EXHAUSTED", "used up", {"a": 1}))
    (event,) = (await form.read("subscribe", f"{url}/streams/failed")).events
    assert event.type is StreamEventType.ERROR
    assert (event.error.status, event.error.message, event.error.details) == ("RESOURCE_EXHAUSTED", "used up", {"a": 1})


async def test_a_post_starts_what_it_reads_once(form: Form, streams: StreamManager, url: str) -> None:
    had = await form.read("subscribe", f"{url}/ask", method="POST", json={}, headers={"Idempotency-Key": "k"})
    again = await form.read("subscribe", f"{url}/ask", method="POST", json={}, headers={"Idempotency-Key": "k"})
    assert [event.offset for event in had.events] == [event.offset for event in again.events] == [0, 1, 2, 3]
    assert had.stream == again.stream
    assert len(await streams.list()) == 2


async def test_where_nothing_runs_there_is_nothing(form: Form, url: str) -> None:
    had = await form.read("subscribe", f"{url}/chats/none")
    assert (had.events, had.error) == ([], None)


@pytest.mark.parametrize(
    ("path", "options", "status", "code"),
    [
        ("/streams/none", {}, "NOT_FOUND", 404),
        ("/streams/s", {"after": 17}, "OUT_OF_RANGE", 400),
        ("/streams/s", {"headers": {"Authorization": "Bearer wrong"}}, "PERMISSION_DENIED", 403),
    ],
)
async def test_a_refusal_is_told_at_once(form: Form, url: str, path: str, options: Any, status: str, code: int) -> None:
    had = await form.read("subscribe", url + path, **options)
    assert isinstance(had.error, RefusedError)
    assert (had.error.status, had.error.http_status, had.events) == (status, code, [])


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("ftp://host/streams/s", {}),
        ("/streams/s", {}),
        ("http://", {}),
        ("http://host/s", {"after": 1, "last": 1}),
        ("http://host/s", {"after": "17"}),
        ("http://host/s", {"after": -2}),
        ("http://host/s", {"last": -1}),
        ("http://127.0.0.1:1/s", {"headers": {"A": "b\r\nC: d"}}),
    ],
)
async def test_what_cannot_be_asked_is_an_invalid_argument(form: Form, url: str, options: Any) -> None:
    with pytest.raises(InvalidArgumentError):
        await form.read("subscribe", url, **options)


async def test_from_now_on_is_from_the_first_answer_on(form: Form) -> None:
    # The first connection is lost before an event; those that came in between are not missed.
    first = cut(b"retry: 1\n", headers=b"X-Genkit-Stream-Offset: 6\r\n")
    rest = answer(b"event: done\ndata: 1\nid: s/a1a1a1a1/7\n\n")
    async with told(first, rest) as server:
        had = await form.read("subscribe", f"{server.url}/s", last=0)
    assert [request.split()[1] for request in server.requests] == [b"/s?last=0", b"/s?after=6"]
    assert (offsets_of(had), had.first_offset) == ([7], 7)


async def test_a_refusal_for_now_is_waited_for(form: Form) -> None:
    busy = answer(b'{"error":{"status":"UNAVAILABLE","message":"soon"}}', status=b"503 Busy", headers=b"Retry-After: 0\r\n")
    async with told(busy, busy, answer(b"event: done\ndata: 1\nid: s/a1a1a1a1/0\n\n")) as server:
        assert offsets_of(await form.read("subscribe", server.url)) == [0]
    assert len(server.requests) == 3


@pytest.mark.parametrize("asked", [b"3600", b"Fri, 31 Dec 2999 23:59:59 GMT"])
async def test_who_is_asked_to_wait_too_long_gives_up_and_says_how_long(form: Form, asked: bytes) -> None:
    async with told(answer(b"", status=b"429 Many", headers=b"Retry-After: %b\r\n" % asked)) as server:
        had = await form.read("subscribe", server.url)
    assert isinstance(had.error, StreamLostError)
    assert (had.error.retry_after or 0) >= 3600
    assert isinstance(had.error.__cause__, RefusedError)
    assert len(server.requests) == 1


async def test_it_gives_up_with_what_is_known_and_who_knows_it_goes_on(form: Form, url: str) -> None:
    lost = b"event: chunk\ndata: 1\nid: s/a1a1a1a1/0\n\nevent: chunk\ndata: 2\nid: s/a1a1a1a1/1\n\n"
    retry = Retry(tries=3, first=timedelta(0))
    async with told(cut(lost), cut(b"")) as server:
        had = await form.read("subscribe", server.url, retry=retry)
    error = had.error
    assert isinstance(error, StreamLostError)
    assert (error.stream, error.cursor, error.events) == ("s", "s/a1a1a1a1/1", 2)
    assert error.__cause__ is not None
    assert "127.0.0.1" in str(error)
    assert server.header("last-event-id") == [None, *["s/a1a1a1a1/1"] * 3]
    async with told(answer(b"event: done\ndata: 1\nid: s/a1a1a1a1/2\n\n")) as server:
        assert offsets_of(await form.read("subscribe", server.url, after=error.cursor)) == [2]


async def test_where_nobody_listens_it_gives_up(form: Form) -> None:
    had = await form.read("subscribe", f"http://127.0.0.1:{free_port()}/s", retry=Retry(tries=2, first=timedelta(0)))
    assert isinstance(had.error, StreamLostError)
    assert isinstance(had.error.__cause__, httpx2.ConnectError)


async def test_a_connection_that_brings_nothing_is_taken_for_lost(form: Form) -> None:
    async with told(silent, answer(b"event: done\ndata: 1\nid: s/a1a1a1a1/0\n\n")) as server:
        assert offsets_of(await form.read("subscribe", server.url, read_timeout=timedelta(seconds=0.2))) == [0]


async def test_an_error_without_an_id_is_the_connections(form: Form) -> None:
    failing = b'event: chunk\ndata: 1\nid: s/a1a1a1a1/0\n\nevent: error\ndata: {"status":"UNAVAILABLE","message":"x"}\n\n'
    async with told(answer(failing), answer(b"event: done\ndata: 1\nid: s/a1a1a1a1/1\n\n")) as server:
        assert offsets_of(await form.read("subscribe", server.url)) == [0, 1]


async def test_what_comes_before_an_error_is_given_first(form: Form) -> None:
    failing = b'event: chunk\ndata: 1\nid: s/a1a1a1a1/0\n\nevent: error\ndata: {"status":"NOT_FOUND","message":"gone"}\n\n'
    async with told(answer(failing)) as server:
        had = await form.read("subscribe", server.url)
    assert offsets_of(had) == [0]
    assert isinstance(had.error, RefusedError)
    assert (had.error.status, had.error.events, had.error.cursor) == ("NOT_FOUND", 1, "s/a1a1a1a1/0")


@pytest.mark.parametrize(
    "body",
    [
        b"event: chunk\ndata: 1\nid: s/a1a1a1a1/1\n\n",  # a gap
        b"event: chunk\ndata: 1\nid: s/a1a1a1a1/0\n\nevent: chunk\ndata: 2\nid: t/a1a1a1a1/1\n\n",  # of another stream
        b"event: chunk\ndata: 1\nid: s/a1a1a1a1/0\n\nevent: chunk\ndata: 2\nid: s/b1b1b1b1/1\n\n",  # of another life
        b"event: chunk\ndata: {\nid: s/a1a1a1a1/0\n\n",  # no JSON
        b"event: chunk\ndata: 1\n\n",  # no id
        b"event: chunk\ndata: 1\nid: 17\n\n",  # no cursor
        b"data: 1\nid: s/a1a1a1a1/0\n\n",  # an app's own event
        b"event: error\ndata: oh\nid: s/a1a1a1a1/0\n\n",
    ],
)
async def test_what_is_no_stream_of_ours_is_unexpected(form: Form, body: bytes) -> None:
    async with told(answer(body)) as server:
        had = await form.read("subscribe", server.url)
    assert isinstance(had.error, UnexpectedAnswerError)
    assert len(had.events) <= 1
    assert len(server.requests) == 1


async def test_what_comes_again_is_given_once(form: Form) -> None:
    two = b"event: chunk\ndata: 1\nid: s/a1a1a1a1/0\n\nevent: chunk\ndata: 2\nid: s/a1a1a1a1/1\n\n"
    async with told(cut(two), answer(two + b"event: done\ndata: 1\nid: s/a1a1a1a1/2\n\n")) as server:
        assert offsets_of(await form.read("subscribe", server.url)) == [0, 1, 2]


async def test_it_is_read_inside_of_its_block_and_entered_once(url: str) -> None:
    events = subscribe(f"{url}/streams/s")
    with pytest.raises(RuntimeError, match="enter"):
        await anext(events)
    async with events:
        await anext(events)
        with pytest.raises(RuntimeError, match="already"):
            await events.__aenter__()
    with pytest.raises(RuntimeError, match="left"):
        await anext(events)


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_a_cancelled_wait_loses_nothing_and_a_cancelled_reader_leaves_nothing(streams: StreamManager, url: str) -> None:
    stream = await streams.open("live")
    await stream.write(0)
    before = descriptors()
    async with subscribe(f"{url}/streams/live", retry=FAST) as events:
        assert (await anext(events)).offset == 0
        for number in range(1, 6):
            with anyio.move_on_after(0.02):
                await anext(events)
                raise AssertionError("there was nothing to be read")
            await stream.write(number)
            with anyio.fail_after(10):
                assert (await anext(events)).offset == number
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anext, events)
            await checkpoint()
            with pytest.raises(RuntimeError, match="another task"):
                await anext(events)
            tasks.cancel_scope.cancel()
    await until(lambda: not feeds_of(streams))

    async def read() -> None:
        async with subscribe(f"{url}/streams/live", after=5) as events:
            await anext(events)

    async with anyio.create_task_group() as tasks:
        for _ in range(5):
            tasks.start_soon(read)
        await until(lambda: feeds_of(streams))
        tasks.cancel_scope.cancel()
    await until(lambda: not feeds_of(streams))
    await until(lambda: descriptors() <= before)
    await stream.done()


async def test_a_client_of_ones_own_is_used_as_it_is_and_stays_open(form: Form, url: str) -> None:
    headers = {"Authorization": "Bearer wrong"}
    if form.is_blocking:
        with httpx2.Client(headers=headers) as own:
            had = await form.read("subscribe", f"{url}/streams/s", client=own)
            assert not own.is_closed
    else:
        async with httpx2.AsyncClient(headers=headers) as own:
            had = await form.read("subscribe", f"{url}/streams/s", client=own)
            assert not own.is_closed
    assert had.error is not None
    assert had.error.status == "PERMISSION_DENIED"


async def test_a_run_is_stopped_by_its_stream(form: Form, streams: StreamManager, url: str) -> None:
    written = [await streams.open(stream) for stream in ("a", "b")]
    assert await form.call("stop", f"{url}/streams/a") is True
    assert await form.call("stop", f"{url}/streams/a") is False
    assert await form.call("stop", f"{url}/streams/b/cancel", method="POST") is True
    with pytest.raises(RefusedError, match="NOT_FOUND"):
        await form.call("stop", f"{url}/streams/none")
    assert all(stream.cancelled.is_set() for stream in written)


async def test_a_stop_whose_answer_was_lost_is_sent_again(form: Form) -> None:
    stopped = answer(b'{"stopped":true}', content_type=b"application/json")
    async with told(b"", cut(b'{"st', content_type=b"application/json"), stopped) as server:
        assert await form.call("stop", server.url, retry=FAST) is True
    assert len(server.requests) == 3


def test_the_names_of_both_forms_are_the_same() -> None:
    assert client.__all__ == sync.__all__
