"""Connections that drip, stall, break off, come in crowds, or do not speak HTTP: nobody else notices, and nothing is kept.

What only the server can bound (`docs/how-to/secure.md` says what that is) is shown here to harm no other client.
"""

import asyncio
import json
from collections.abc import AsyncGenerator
from datetime import timedelta
from typing import Any, Final

import anyio
import pytest
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from tests.hostile.servers import APPS, HASTY, KNOWN, STREAMING, Apart, House, Target, command, house, serve, until
from tests.hostile.sockets import Answer, Connection, ask, connections, request
from tests.inside import feeds_of

from streamkeep import InMemoryStreamManager, StreamManager
from streamkeep.http import DurableStreaming, StreamsHTTP
from streamkeep.http.response import Timeouts

both: Final = pytest.mark.parametrize("app", APPS)
implementations: Final = pytest.mark.parametrize("server", ["httptools", "h11"])

READ: Final = f"/streams/{KNOWN}".encode()
ONE_OF_OURS: Final = b"X-Genkit-Stream-Id: one"  # without it, what is inside DurableStreaming sees to its bodies itself


def error_of(answer: Answer) -> Any:
    """Give an answer's error, which is Genkit's, whole and in JSON."""
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-content-type-options"] == "nosniff"
    error = json.loads(answer.body)["error"]
    assert error.keys() == {"status", "message", "details"}
    return error


# Slow ones


@implementations
@both
def test_a_body_that_does_not_come_is_given_up_and_its_connection_closed(app: str, server: str) -> None:
    with house(app, timeouts=HASTY, server=server) as target:
        for body in (b"", b'{"data":'):
            with Connection(target.address) as slow:
                slow.send(request("POST", b"/echo", STREAMING, ONE_OF_OURS, b"Content-Length: 100") + body)
                answer = slow.answer()
                assert slow.rest() == b""
            assert (answer.code, error_of(answer)["status"]) == (408, "DEADLINE_EXCEEDED")
            assert answer.headers["connection"] == "close"
        assert target.stream_ids() == []
        assert target.comes_to_rest()


@both
def test_a_body_that_drips_is_given_up_however_steadily(app: str) -> None:
    with house(app, timeouts=HASTY) as target, Connection(target.address) as slow:
        slow.send(request("POST", b"/echo", STREAMING, ONE_OF_OURS, b"Transfer-Encoding: chunked"))
        assert until(lambda: not (slow.send(b"1\r\n \r\n") and slow.is_silent_for(0.01)))
        assert slow.answer().code == 408


def test_headers_that_never_end_hinder_nobody_and_start_nothing(served: House) -> None:
    with connections(served.address, 200) as slow:
        for connection in slow:
            connection.send(b"POST /echo HTTP/1.1\r\nHost: x\r\nX-Slow: ")
        assert served.is_alive()
        for connection in slow:
            connection.send(b"a")
        assert served.is_alive()
        assert served.comes_to_rest()  # while they are still there
    assert served.stream_ids() == []


def test_the_command_takes_no_headers_without_end(known_url: str) -> None:
    with command(known_url) as target:
        before = target.mebibytes()
        with Connection(target.address) as connection:
            connection.send(b"GET / HTTP/1.1\r\n")
            for _ in range(40):
                connection.send(b"X-A: b\r\n" * 100_000)
        assert target.is_alive()
        assert target.mebibytes() - before < 20


def test_connections_that_say_nothing_hinder_nobody(apart: Apart) -> None:
    with connections(apart.address, 200):
        assert apart.is_alive()


# Readers that do not read


async def store_long(streams: StreamManager, megabytes: int) -> None:
    async with streams.open("long", metadata={"route": "", "owner": ""}) as stream:
        for _ in range(megabytes * 10):
            await stream.write("x" * 100_000)


@both
def test_a_response_that_is_not_read_ends_when_its_time_is_up_and_others_get_theirs(app: str) -> None:
    with house(app, timeouts=Timeouts(longest=timedelta(milliseconds=300))) as target:
        target.run(store_long, target.streams, 10)
        with connections(target.address, 20, receive_buffer=4096) as idle:
            for connection in idle:
                connection.send(request("GET", b"/streams/long"))
                connection.until(b"event: chunk")
            assert target.is_alive()
            assert target.comes_to_rest()  # while they are still there


def test_readers_that_do_not_read_cost_a_page_each(apart: Apart, known_url: str) -> None:
    async def store() -> None:
        async with StreamManager.connect(known_url, ttl=timedelta(hours=1)) as streams:
            if not any(info.id == "long" for info in await streams.list()):
                await store_long(streams, 30)

    anyio.run(store)
    assert len(ask(apart.address, "GET", b"/streams/long").body) > 30_000_000
    before = apart.mebibytes()
    with connections(apart.address, 40, receive_buffer=4096) as idle:
        for connection in idle:
            connection.send(request("GET", b"/streams/long"))
            connection.until(b"event: chunk")
        assert apart.is_alive()
        # A page is a mebibyte, and is there as records, as frames, and in the server's buffer; whole it would be 1,200.
        assert apart.mebibytes() - before < 40 * 6


@both
def test_an_endless_stream_that_is_not_read_is_not_kept_for_its_reader(app: str) -> None:
    async def forever(stream: Any) -> None:
        with anyio.CancelScope() as target_scope:
            scopes.append(target_scope)
            while True:
                await stream.write("x" * 10_000)
                await asyncio.sleep(0)

    scopes: list[anyio.CancelScope] = []
    with house(app, timeouts=Timeouts(longest=timedelta(milliseconds=300))) as target:
        stream = target.run(lambda: open_for_all(target.streams, "endless"))
        with connections(target.address, 10, receive_buffer=4096) as idle:
            for connection in idle:
                connection.send(request("GET", b"/streams/endless"))
            target.portal.start_task_soon(forever, stream)
            for connection in idle:
                connection.until(b"event: chunk")
            assert until(lambda: not feeds_of(target.streams))
            assert target.is_alive()
        target.portal.call(scopes[0].cancel)
        target.run(stream.close)


async def open_for_all(streams: StreamManager, stream: str) -> Any:
    return await streams.open(stream, metadata={"route": "", "owner": ""})


# Answers that are no streams: a client that asks for a stream where there is none must not have them kept either


async def endless_text() -> AsyncGenerator[bytes, None]:
    while True:
        yield b"x" * 65_536
        await asyncio.sleep(0)


def wrapping(body: Any) -> tuple[DurableStreaming, StreamManager, StreamsHTTP]:
    app = FastAPI()
    streams = InMemoryStreamManager()
    streams_http = StreamsHTTP(streams, drain=timedelta(0))

    @app.post("/text")
    async def text() -> StreamingResponse:
        return StreamingResponse(body(), media_type="text/plain")

    app.mount("/streams", streams_http)
    return DurableStreaming(app, streams_http), streams, streams_http


def test_an_answer_that_is_no_stream_comes_at_its_readers_pace_and_ends_when_that_one_goes() -> None:
    sent = 0

    async def counted() -> AsyncGenerator[bytes, None]:
        nonlocal sent
        async for packet in endless_text():
            sent += len(packet)
            yield packet

    with serve(*wrapping(counted)) as target:
        with Connection(target.address, receive_buffer=4096) as slow:
            slow.send(request("POST", b"/text?stream=true", body=b""))
            slow.until(b"xxxx")
            assert all(target.is_alive() for _ in range(20))
            assert sent < 32 << 20  # what the buffers of two sockets hold, and not all that there is
        assert target.comes_to_rest()
        assert target.stream_ids() == []


def test_what_an_app_does_after_its_answer_is_not_cut_short() -> None:
    finished: list[str] = []
    go_on = anyio.Event()

    async def briefly() -> AsyncGenerator[bytes, None]:
        yield b"all"

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await StreamingResponse(briefly(), media_type="text/plain")(scope, receive, send)
        await go_on.wait()
        finished.append("yes")

    streams = InMemoryStreamManager()
    streams_http = StreamsHTTP(streams)

    async def with_streams(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/streams/"):
            return await streams_http({**scope, "root_path": "/streams"}, receive, send)
        return await app(scope, receive, send) if scope["type"] == "http" else None

    with serve(DurableStreaming(with_streams, streams_http), streams, streams_http) as target:
        answer = ask(target.address, "POST", b"/text", STREAMING, b"Connection: close", body=b"")
        assert (answer.code, answer.body) == (200, b"all")
        assert all(target.is_alive() for _ in range(20))
        target.portal.call(go_on.set)
        assert target.comes_to_rest()
        assert finished == ["yes"]
        assert target.stream_ids() == []


# Connections that are used in odd ways


@implementations
@both
def test_a_client_that_closes_its_half_leaves_nothing_behind(app: str, server: str) -> None:
    with house(app, server=server) as target:
        for asked in (request("GET", READ), request("POST", b"/echo", STREAMING, body=b'{"data":1}')):
            for cut in (len(asked), len(asked) // 2, 1):
                with Connection(target.address) as connection:
                    connection.send(asked[:cut])
                    connection.finish_sending()
                    connection.rest()
        assert target.is_alive()
        assert target.comes_to_rest()


@implementations
@both
def test_requests_that_come_before_their_turn_are_answered_in_turn(app: str, server: str) -> None:
    with house(app, server=server) as target, Connection(target.address) as connection:
        stream = request("POST", b"/few", STREAMING, b"Content-Type: application/json", body=b'{"data":3}')
        connection.send((stream + request("GET", READ + b"/info") + request("GET", b"/streams/nobodys")) * 5)
        for _ in range(5):
            streamed, info, unknown = connection.answer(), connection.answer(), connection.answer()
            assert streamed.body.endswith(b'data: {"result":{"counted":3},"offset":3}\n\n')
            assert json.loads(info.body)["id"] == KNOWN
            assert (unknown.code, error_of(unknown)["status"]) == (404, "NOT_FOUND")


@implementations
@both
def test_a_body_that_waits_to_be_asked_for_is_asked_for(app: str, server: str) -> None:
    with house(app, timeouts=HASTY, server=server) as target, Connection(target.address) as connection:
        head = (STREAMING, b"Content-Type: application/json", b"Expect: 100-continue", b"Content-Length: 10")
        connection.send(request("POST", b"/echo", *head))
        connection.until(b"100 Continue\r\n\r\n")
        connection.send(b'{"data":1}')
        assert connection.answer().body.endswith(b'data: {"result":1,"offset":1}\n\n')


@both
def test_http_1_0_gets_the_whole_stream_and_then_the_end_of_the_connection(app: str) -> None:
    with house(app) as target, Connection(target.address) as connection:
        asked = request("POST", b"/echo", STREAMING, b"Content-Type: application/json", body=b'{"data":1}')
        connection.send(asked.replace(b"HTTP/1.1", b"HTTP/1.0"))
        assert b'data: {"result":1,"offset":1}\n\n' in connection.rest()


# What is not HTTP, or says two things at once

LYING: Final = {
    "a chunk of all the bytes there are": (b"Transfer-Encoding: chunked", b"ffffffffffffffff\r\nx"),
    "a chunk of more than that": (b"Transfer-Encoding: chunked", b"1" + b"0" * 40 + b"\r\nx"),
    "a chunk of fewer than none": (b"Transfer-Encoding: chunked", b"-1\r\nx\r\n"),
    "a chunk of words": (b"Transfer-Encoding: chunked", b"ten\r\nx\r\n"),
    "a chunk size with a name": (b"Transfer-Encoding: chunked", b"0x1\r\nx\r\n0\r\n\r\n"),
    "a chunk with an endless extension": (b"Transfer-Encoding: chunked", b"1;" + b"e" * 200_000 + b"\r\nx\r\n"),
    "two lengths": (b"Content-Length: 1\r\nContent-Length: 10", b'{"data":1}'),
    "a list of lengths": (b"Content-Length: 10, 20", b'{"data":1}'),
    "a length and chunks": (b"Content-Length: 5\r\nTransfer-Encoding: chunked", b"0\r\n\r\nGET / HTTP/1.1\r\n\r\n"),
    "chunks in disguise": (b"Transfer-Encoding: xchunked", b"0\r\n\r\n"),
    "chunks twice": (b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity", b"0\r\n\r\n"),
    "a negative length": (b"Content-Length: -1", b""),
    "a length in words": (b"Content-Length: ten", b""),
    "a length of more than there is": (b"Content-Length: " + b"9" * 30, b"x"),
    "a name with a space": (b"X Y: z\r\nContent-Length: 10", b'{"data":1}'),
    "a line end alone": (b"X-A: b\nX-C: d\r\nContent-Length: 10", b'{"data":1}'),
    "a null": (b"X-A: \x00\r\nContent-Length: 10", b'{"data":1}'),
    "a folded line": (b"X-A: b\r\n c\r\nContent-Length: 10", b'{"data":1}'),
    "64 KiB of headers": (b"X-A: " + b"a" * 65_000 + b"\r\nContent-Length: 10", b'{"data":1}'),
    "a thousand headers": (b"X-A: b\r\n" * 1000 + b"Content-Length: 10", b'{"data":1}'),
}
NO_HTTP: Final = (
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"GET\r\n\r\n",
    b"\r\n\r\n\r\nx\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
)


@pytest.mark.parametrize(("field", "body"), LYING.values(), ids=LYING)
def test_a_request_that_contradicts_itself_is_refused_or_read_in_one_way_only(served: House, field: bytes, body: bytes) -> None:
    expect_no_server_error(served, request("POST", b"/echo", STREAMING, field) + body)
    assert served.is_alive()


@pytest.mark.parametrize("data", NO_HTTP)
def test_what_is_not_http_is_refused(apart: Apart, data: bytes) -> None:
    expect_no_server_error(apart, data)
    assert apart.is_alive()


def expect_no_server_error(target: Target, data: bytes) -> None:
    """Send this, wait a moment for an answer, hang up; any answer must say that it is the client's fault, or be one."""
    with Connection(target.address) as connection:
        connection.send(data)
        connection.is_silent_for(0.2)
        connection.finish_sending()
        answers = connection.rest()
    codes = [line[9:12] for line in answers.split(b"\r\n") if line.startswith(b"HTTP/1.1 ")]
    assert all(code[:1] in b"24" for code in codes), answers
    assert b"Traceback" not in answers
