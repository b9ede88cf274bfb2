"""Servers that mean no good, or are no event streams: what they can do is bounded, and told by type."""

import gzip
import tracemalloc
from datetime import timedelta

import anyio
import httpx2
import pytest
from anyio.abc import SocketStream
from tests.client.forms import FAST, HEAD, Form, answer, cut, told

from streamkeep import InvalidArgumentError, RefusedError, StreamLostError, UnexpectedAnswerError
from streamkeep.client import Retry, _reading

EVENT = b"id: 1\ndata: a\n\n"
PIECE = 1 << 16


async def endless_line(connection: SocketStream) -> None:
    await connection.send(HEAD)
    while True:
        await connection.send(b"%x\r\n" % PIECE + b"x" * PIECE + b"\r\n")


async def endless_lines(connection: SocketStream) -> None:
    await connection.send(HEAD)
    while True:
        await connection.send(b"%x\r\n" % PIECE + b"nothing\n" * (PIECE // 8) + b"\r\n")


async def endless_data(connection: SocketStream) -> None:
    await connection.send(HEAD)
    while True:
        await connection.send(b"%x\r\n" % PIECE + b"data: 1\n" * (PIECE // 8) + b"\r\n")


async def endless_head(connection: SocketStream) -> None:
    await connection.send(b"HTTP/1.1 200 OK\r\n")
    while True:
        await connection.send(b"X-A: b\r\n" * 1000)


async def endless_error(connection: SocketStream) -> None:
    await connection.send(b"HTTP/1.1 400 No\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        await connection.send(b"%x\r\n" % PIECE + b"x" * PIECE + b"\r\n")


@pytest.mark.parametrize(
    "server_", [endless_line, *(pytest.param(one, marks=pytest.mark.slow) for one in (endless_lines, endless_data))]
)
@pytest.mark.parametrize("name", ["events", "subscribe", "stream_flow"])
async def test_a_body_without_end_and_without_events_is_bounded(form: Form, name: str, server_: object) -> None:
    if name == "stream_flow" and server_ is endless_data:
        return  # each line is a frame there, and a malformed one; see below
    async with told(server_) as server:  # type: ignore[arg-type]  # of the parameters
        had = await form.read(name, server.url)
    assert isinstance(had.error, UnexpectedAnswerError)
    assert len(server.requests) == 1


async def test_a_head_without_end_is_bounded(form: Form) -> None:
    async with told(endless_head) as server:
        had = await form.read("events", server.url, retry=Retry(tries=1, first=timedelta(0)))
    assert isinstance(had.error, StreamLostError)


async def test_an_error_without_end_is_bounded(form: Form) -> None:
    tracemalloc.start()
    try:
        async with told(endless_error) as server:
            had = await form.read("events", server.url)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert isinstance(had.error, RefusedError)
    assert had.error.http_status == 400
    assert peak < 16 << 20


async def test_an_error_that_comes_slowly_or_never_is_not_waited_for(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_reading, "ERROR_SECONDS", 0.1)
    body = b'{"error":{"status":"INVALID_ARGUMENT","message":"no"}}'
    head = b"HTTP/1.1 400 No\r\nContent-Length: %d\r\n\r\n" % len(body)

    async def dribbling(connection: SocketStream) -> None:
        await connection.send(head)
        for byte in body:
            await connection.send(bytes([byte]))
            await anyio.sleep(0.05)
        await anyio.sleep_forever()

    async def silent(connection: SocketStream) -> None:
        await connection.send(head)
        await anyio.sleep_forever()

    for server_ in (dribbling, silent):
        async with told(server_) as server:
            had = await form.read("events", server.url, read_timeout=None, seconds=2)
        assert isinstance(had.error, RefusedError)
        assert had.error.http_status == 400
        assert len(server.requests) == 1


@pytest.mark.parametrize("name", ["events", "subscribe", "stream_flow"])
@pytest.mark.parametrize("content_type", [b"text/html; charset=utf-8", b"application/json", b"text/event-streams"])
async def test_what_is_no_event_stream_is_unexpected(form: Form, name: str, content_type: bytes) -> None:
    async with told(answer(b"<html>sign in</html>", content_type=content_type)) as server:
        had = await form.read(name, server.url)
    assert isinstance(had.error, UnexpectedAnswerError)
    assert "text/event-stream" in str(had.error)
    assert len(server.requests) == 1


async def test_no_compressed_answer_is_read(form: Form) -> None:
    async with told(answer(gzip.compress(EVENT), headers=b"Content-Encoding: gzip\r\n")) as server:
        had = await form.read("events", server.url)
    assert isinstance(had.error, UnexpectedAnswerError)
    assert server.header("accept-encoding") == ["identity"]


@pytest.mark.parametrize("code", [b"301", b"302", b"303", b"307", b"308"])
async def test_another_server_is_never_asked(form: Form, code: bytes) -> None:
    async with told(answer(EVENT)) as other:
        location = b"Location: %b/events\r\n" % other.url.encode()
        async with told(answer(b"", status=code + b" Away", headers=location)) as server:
            headers = {"Authorization": "Bearer secret", "X-Api-Key": "secret"}
            had = await form.read("events", server.url, headers=headers)
            assert isinstance(had.error, UnexpectedAnswerError)
            if not form.is_blocking:
                async with httpx2.AsyncClient(auth=("me", "secret"), cookies={"a": "b"}, follow_redirects=True) as own:
                    assert (await form.read("events", server.url, client=own)).error is not None
    assert other.requests == []


async def test_a_redirect_to_the_same_server_is_followed_with_all_that_was_sent(form: Form) -> None:
    moved = answer(b"", status=b"307 Moved", headers=b"Location: /new\r\n")
    async with told(moved, answer(EVENT)) as server:
        had = await form.read(
            "events", server.url, headers={"Authorization": "Bearer a", "Idempotency-Key": "k"}, method="POST", json=1
        )
    assert [event.data for event in had.events] == ["a"]
    assert [request.split()[1] for request in server.requests] == [b"/", b"/new"]
    assert server.header("authorization") == ["Bearer a"] * 2
    assert server.requests[1].endswith(b"\r\n\r\n1")


async def test_a_redirect_in_a_circle_ends(form: Form) -> None:
    async with told(answer(b"", status=b"302 Moved", headers=b"Location: /\r\n")) as server:
        had = await form.read("events", server.url)
    assert isinstance(had.error, UnexpectedAnswerError)
    assert len(server.requests) <= 6


async def test_an_id_with_a_nul_is_none(form: Form) -> None:
    async with told(cut(EVENT + b"id: 2\0\ndata: b\n\n"), answer(b"id: 3\ndata: c\n\n")) as server:
        had = await form.read("events", server.url)
    assert [(event.id, event.data) for event in had.events] == [("1", "a"), ("1", "b"), ("3", "c")]
    assert server.header("last-event-id") == [None, "1"]


@pytest.mark.parametrize("id_", [b"\x01", b"a\x7f", b" a", b"a\t"])
async def test_an_id_that_no_header_can_hold_is_given_and_not_gone_on_with(form: Form, id_: bytes) -> None:
    async with told(cut(b"id: " + id_ + b"\ndata: a\n\n"), answer(EVENT)) as server:
        had = await form.read("events", server.url)
    assert [event.id for event in had.events] == [id_.decode()]
    assert isinstance(had.error, UnexpectedAnswerError)
    assert len(server.requests) == 1


async def test_an_id_cannot_smuggle_a_header(form: Form) -> None:
    async with told(cut(b"id: 1\rX-Evil: 1\ndata: a\n\n"), answer(b"")) as server:
        await form.read("events", server.url)
    assert server.header("last-event-id") == [None, "1"]
    assert server.header("x-evil") == [None, None]
    with pytest.raises(InvalidArgumentError):
        await form.read("events", "http://127.0.0.1:1/", headers={"A": "b\nX-Evil: 1"})


async def test_a_reconnection_time_of_years_does_not_make_it_wait(form: Form) -> None:
    async with told(cut(b"retry: 999999999999999\n" + EVENT), answer(b"id: 2\ndata: b\n\n")) as server:
        assert len((await form.read("events", server.url, retry=FAST)).events) == 2


@pytest.mark.parametrize(
    "body",
    [
        b'data: {"message":',
        b"data: null",
        b"data: []",
        b'data: {"message":1,"offset":5}',
        b'data: {"message":\xff}',
        b"data: " + b"[" * 5000,
    ],
)
async def test_a_malformed_frame_of_a_flow_is_unexpected(form: Form, body: bytes) -> None:
    async with told(answer(body + b"\n\n")) as server:
        had = await form.read("stream_flow", server.url)
    assert isinstance(had.error, UnexpectedAnswerError)


@pytest.mark.parametrize("body", [b"<html>", b"{}", b"[]", b"", b'{"result"', b"[" * 9000])
async def test_a_malformed_answer_of_a_flow_is_unexpected(form: Form, body: bytes) -> None:
    async with told(answer(body, content_type=b"application/json")) as server:
        with pytest.raises(UnexpectedAnswerError):
            await form.call("run_flow", server.url)


async def test_what_a_server_says_is_not_shown_to_others_and_a_url_is_not_repeated(form: Form) -> None:
    async with told(cut(b"")) as server:
        url = server.url.replace("http://", "http://me:secret@") + "/?token=secret"
        had = await form.read("events", url, retry=Retry(tries=0))
    assert had.error is not None
    assert "secret" not in str(had.error)
    assert not had.error.public
