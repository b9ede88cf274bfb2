"""Defects of Genkit's own durable streams and servers, each shown to be absent over HTTP: Go's, JavaScript's, then Python's."""

import asyncio
import socket
import struct
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final, cast

import anyio
import httpx
import pytest
from anyio.abc import ByteReceiveStream, SocketAttribute
from anyio.lowlevel import checkpoint
from genkit import ActionRunContext
from genkit import PublicError as GenkitPublicError
from tests.http.servers import (
    STREAM_ID,
    STREAMING,
    Reading,
    count,
    durable_app,
    events_of,
    frames_of,
    http_to,
    raw_exchange,
    server_process,
    until,
    wrapped_app,
)
from tests.inside import feeds_of

from streamkeep import InMemoryStreamManager, StreamManager
from streamkeep.http import StreamsHTTP
from streamkeep.http.response import ASGIApp
from streamkeep.storages.memory import MemoryStorage
from streamkeep.testing.clock import FakeClock
from streamkeep.testing.faults import FaultyStorage

both: Final = pytest.mark.parametrize("app_of", [durable_app, wrapped_app], ids=["durable_flow", "DurableStreaming"])
AppOf = Callable[..., ASGIApp]

SECRET: Final = "postgresql://user:password@db"


async def run(http: httpx.AsyncClient, path: str, data: object = None) -> httpx.Response:
    return await http.post(path, json={"data": data}, headers=STREAMING)


async def resume(http: httpx.AsyncClient, path: str, stream: str) -> httpx.Response:
    with anyio.fail_after(10):
        return await http.post(path, headers={**STREAMING, STREAM_ID: stream})


class Gated:
    """A flow that sends a chunk and waits at the gate."""

    def __init__(self) -> None:
        self.gate = anyio.Event()

    @property
    def work(self) -> Callable[..., Any]:
        async def talk(_: object, ctx: ActionRunContext) -> str:
            ctx.send_chunk("begun")
            await self.gate.wait()
            ctx.send_chunk("more")
            return "output"

        return talk


TALKED: Final[list[dict[str, object]]] = [
    {"message": "begun", "offset": 0},
    {"message": "more", "offset": 1},
    {"result": "output", "offset": 2},
]


# Genkit for Go


@both
async def test_subscribing_to_a_finished_stream_of_100_or_more_chunks_blocks_nobody(app_of: AppOf) -> None:
    async with http_to(app_of(count)) as http:
        for chunks in (99, 100, 101, 300, 2000):
            fresh = await run(http, "/count", chunks)
            resumed = await resume(http, "/count", fresh.headers[STREAM_ID])
            assert resumed.content == fresh.content
            assert len(frames_of(resumed.content)) == chunks + 1
        assert frames_of((await run(http, "/count", 1)).content)  # and others may still write


@both
async def test_a_slow_subscriber_loses_no_chunk_and_no_terminal_event(app_of: AppOf) -> None:
    async def long(_: None, ctx: ActionRunContext) -> str:
        ctx.send_chunk("begun")
        await gate.wait()
        for number in range(200):
            ctx.send_chunk(f"{number} {'x' * 50_000}")
            await checkpoint()
        return "output"

    gate = anyio.Event()
    streams = InMemoryStreamManager()
    async with (
        http_to(app_of(long, streams=streams)) as http,
        http.stream("POST", "/long", json={}, headers=STREAMING) as answer,
    ):
        slow = Reading(answer)
        await slow.until()
        gate.set()
        assert len(await events_of(streams, answer.headers[STREAM_ID])) == 202  # it is all written, and mostly not read
        frames = frames_of(await slow.whole())
    assert [frame["offset"] for frame in frames] == list(range(202))
    assert frames[-1]["result"] == "output"


async def test_an_expired_stream_is_gone_at_once_and_not_a_minute_later() -> None:
    clock = FakeClock()
    streams = StreamManager(MemoryStorage(clock=clock), ttl=timedelta(minutes=5))
    async with http_to(durable_app(count, streams=streams)) as http:
        stream = (await run(http, "/count", 1)).headers[STREAM_ID]
        clock.advance(299)
        assert (await resume(http, "/count", stream)).status_code == 200
        clock.advance(1)
        assert (await resume(http, "/count", stream)).status_code == 204
        assert (await http.get(f"/streams/{stream}")).status_code == 404


@both
async def test_a_flow_that_crashes_leaves_no_reader_waiting(app_of: AppOf) -> None:
    async def crashes(_: None, ctx: ActionRunContext) -> None:
        ctx.send_chunk("before")
        await gate.wait()
        raise RuntimeError

    gate = anyio.Event()
    async with http_to(app_of(crashes)) as http, http.stream("POST", "/crashes", json={}, headers=STREAMING) as answer:
        one = Reading(answer)
        await one.until()
        gate.set()
        assert "error" in frames_of(await one.whole())[-1]


async def test_a_chunk_that_is_changed_after_it_was_sent_is_stored_as_it_was() -> None:
    async def reuses(_: None, ctx: ActionRunContext) -> dict[str, int]:
        chunk = {"n": 0}
        for number in range(3):
            chunk["n"] = number
            ctx.send_chunk(chunk)
        return chunk

    async with http_to(durable_app(reuses)) as http:
        frames = frames_of((await run(http, "/reuses")).content)
    assert [frame.get("message", frame.get("result")) for frame in frames] == [{"n": 0}, {"n": 1}, {"n": 2}, {"n": 2}]


@both
async def test_an_empty_id_is_refused(app_of: AppOf) -> None:
    async with http_to(app_of(count)) as http:
        answer = await http.post("/count", json={"data": 1}, headers={**STREAMING, STREAM_ID: ""})
    assert answer.status_code == 400


async def test_there_are_limits() -> None:
    async def floods(_: None, ctx: ActionRunContext) -> None:
        while True:
            ctx.send_chunk("x")

    async with http_to(durable_app(floods, streams=StreamsHTTP(InMemoryStreamManager(), max_body_bytes=100))) as http:
        last = frames_of((await run(http, "/floods")).content)[-1]
        assert cast("dict[str, Any]", last["error"])["status"] == "RESOURCE_EXHAUSTED"
        assert (await http.post("/floods", content=b" " * 101)).status_code == 413


@both
async def test_a_resumer_that_goes_away_is_forgotten_without_waiting_for_the_next_write(app_of: AppOf) -> None:
    gated = Gated()
    streams = InMemoryStreamManager()
    async with http_to(app_of(gated.work, streams=streams)) as http:
        async with http.stream("POST", "/talk", json={}, headers=STREAMING) as answer:
            await Reading(answer).until()
        stream = answer.headers[STREAM_ID]
        await until(lambda: not feeds_of(streams))
        before = len(asyncio.all_tasks())
        for _ in range(50):
            async with http.stream("POST", "/talk", headers={**STREAMING, STREAM_ID: stream}) as resumed:
                await Reading(resumed).until()
        await until(lambda: not feeds_of(streams))
        await until(lambda: len(asyncio.all_tasks()) <= before)
        gated.gate.set()
        assert len(await events_of(streams, stream)) == 3


# Genkit for JavaScript


@both
@pytest.mark.parametrize("operation", ["open", "done"])
async def test_a_storage_that_fails_once_kills_nothing(app_of: AppOf, operation: str) -> None:
    gated = Gated()
    storage = FaultyStorage(MemoryStorage())
    async with http_to(app_of(gated.work, streams=StreamManager(storage))) as http:
        if operation == "open":
            storage.refuse("commit")
            assert (await run(http, "/talk")).status_code == 503
            gated.gate.set()
        else:
            async with http.stream("POST", "/talk", json={}, headers=STREAMING) as answer:
                one = Reading(answer)
                await one.until()
                storage.refuse("commit", times=2)
                gated.gate.set()
                frames = frames_of(await one.whole())
                # A wrapped app is told that its chunk could not be stored, and fails.
                assert (frames if app_of is durable_app else frames[:2]) == (TALKED if app_of is durable_app else TALKED[:2])
        assert frames_of((await run(http, "/talk")).content) == TALKED


async def test_a_write_that_fails_is_neither_swallowed_nor_lost() -> None:
    storage = FaultyStorage(MemoryStorage())
    streams = StreamManager(storage)

    async def talk(_: None, ctx: ActionRunContext) -> str:
        storage.refuse("commit", times=2)
        ctx.send_chunk("begun")
        ctx.send_chunk("more")
        return "output"

    async with http_to(durable_app(talk, streams=streams)) as http:
        assert frames_of((await run(http, "/talk")).content) == TALKED


@both
async def test_a_bogus_id_kills_nothing(app_of: AppOf) -> None:
    async with http_to(app_of(count)) as http:
        for stream in (b"", b"bogus", b"\xff", b"../../etc/passwd", b"a" * 5000, b"{}", b"null", b"__proto__"):
            request = (
                b"POST /count HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\nX-Genkit-Stream-Id: %b\r\n\r\n"
            )
            assert (await raw_exchange(http, request % stream)).startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 204 "))
        assert frames_of((await run(http, "/count", 1)).content)


@both
async def test_a_clients_disconnect_does_not_abort_the_run(app_of: AppOf) -> None:
    gated = Gated()
    streams = InMemoryStreamManager()
    async with http_to(app_of(gated.work, streams=streams)) as http:
        async with http.stream("POST", "/talk", json={}, headers=STREAMING) as answer:
            await Reading(answer).until()
        gated.gate.set()
        await events_of(streams, answer.headers[STREAM_ID])
        assert frames_of((await resume(http, "/talk", answer.headers[STREAM_ID])).content) == TALKED


@both
async def test_a_subscriber_whose_connection_breaks_starves_no_other(app_of: AppOf) -> None:
    gated = Gated()
    async with http_to(app_of(gated.work)) as http, http.stream("POST", "/talk", json={}, headers=STREAMING) as answer:
        one = Reading(answer)
        await one.until()
        request = f"POST /talk HTTP/1.1\r\nHost: x\r\n{STREAM_ID}: {answer.headers[STREAM_ID]}\r\nContent-Length: 0\r\n\r\n"
        for _ in range(5):
            broken = await anyio.connect_tcp(http.base_url.host, http.base_url.port or 80)
            await broken.send(request.encode())
            assert b"begun" in await receive_until(broken, b"begun")
            broken.extra(SocketAttribute.raw_socket).setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            await anyio.aclose_forcefully(broken)  # a reset, not a goodbye
        gated.gate.set()
        assert frames_of(await one.whole()) == TALKED


async def receive_until(connection: ByteReceiveStream, text: bytes) -> bytes:
    received = b""
    with anyio.fail_after(10):
        while text not in received:
            received += await connection.receive()
    return received


async def test_starting_a_stream_does_not_look_at_the_others() -> None:
    storage = FaultyStorage(MemoryStorage())
    async with http_to(durable_app(count, streams=StreamManager(storage))) as http:
        costs: list[int] = []
        for _ in range(30):
            before = sum(storage.calls.values())
            await run(http, "/count", 1)
            costs.append(sum(storage.calls.values()) - before)
        assert max(costs[10:]) <= max(costs[:10])


# Genkit for Python


@both
async def test_streams_are_durable(app_of: AppOf) -> None:
    async with http_to(app_of(count)) as http:
        fresh = await run(http, "/count", 3)
        for _ in range(3):
            assert (await resume(http, "/count", fresh.headers[STREAM_ID])).content == fresh.content


@both
async def test_the_output_of_a_flow_whose_client_has_gone_is_not_lost(app_of: AppOf) -> None:
    gated = Gated()
    async with http_to(app_of(gated.work)) as http:
        async with http.stream("POST", "/talk", json={}, headers=STREAMING) as answer:
            await Reading(answer).until()
        gated.gate.set()
        assert frames_of((await resume(http, "/talk", answer.headers[STREAM_ID])).content)[-1]["result"] == "output"


@both
async def test_concurrent_streams_of_one_handler_do_not_hinder_each_other(app_of: AppOf) -> None:
    gated = Gated()
    async with http_to(app_of(gated.work)) as http:
        answers = [
            await http.send(http.build_request("POST", "/talk", json={}, headers=STREAMING), stream=True) for _ in range(10)
        ]
        readings = [Reading(answer) for answer in answers]
        for one in readings:
            await one.until()
        gated.gate.set()
        for one in readings:
            assert frames_of(await one.whole()) == TALKED


@both
async def test_an_exceptions_text_does_not_reach_clients(app_of: AppOf) -> None:
    async def connects(_: None) -> None:
        raise ConnectionError(SECRET)

    async with http_to(app_of(connects)) as http:
        answer = await run(http, "/connects")
        replay = await resume(http, "/connects", answer.headers[STREAM_ID])
    assert "password" not in answer.text + replay.text
    assert "error" in frames_of(answer.content)[-1]


async def test_a_public_errors_message_and_status_arrive() -> None:
    async def refuses(_: None) -> None:
        raise GenkitPublicError("FAILED_PRECONDITION", "for all")

    async with http_to(durable_app(refuses)) as http:
        streamed = cast("dict[str, Any]", frames_of((await run(http, "/refuses")).content)[-1]["error"])
        once = (await http.post("/refuses", json={})).json()["error"]
    for error in (streamed, once):
        assert (error["status"], error["message"]) == ("FAILED_PRECONDITION", "for all")


async def test_a_none_chunk_does_not_end_the_stream() -> None:
    async def gaps(_: None, ctx: ActionRunContext) -> str:
        ctx.send_chunk(None)
        ctx.send_chunk("more")
        return "output"

    async with http_to(durable_app(gaps)) as http:
        frames = frames_of((await run(http, "/gaps")).content)
    assert frames == [{"message": None, "offset": 0}, *TALKED[1:]]


async def test_malformed_json_is_400_in_json() -> None:
    async with http_to(durable_app(count)) as http:
        answer = await http.post("/count", content=b'{"data":', headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["status"] == "INVALID_ARGUMENT"


async def test_errors_outside_streams_are_not_always_500() -> None:
    async def refuses(_: None) -> None:
        raise GenkitPublicError("NOT_FOUND", "for all")

    async with http_to(durable_app(refuses, count)) as http:
        assert (await http.post("/refuses", json={})).status_code == 404
        assert (await http.post("/count", json={"data": "no number"})).status_code == 400


# And of all of them: a server's end


apps: Final = pytest.mark.parametrize("app", ["durable", "wrapped"], ids=["durable_flow", "DurableStreaming"])


@apps
async def test_a_server_that_is_stopped_ends_every_answer_and_every_stream(app: str, sqlite_url: str) -> None:
    async with server_process(app, sqlite_url) as server, httpx.AsyncClient(base_url=server.url, timeout=20) as http:
        async with http.stream("POST", "/endless", json={"data": 1}, headers=STREAMING) as answer:
            stream = answer.headers[STREAM_ID]
            async with http.stream("GET", f"/streams/{stream}") as native:
                genkits, natives = Reading(answer), Reading(native)
                await genkits.until()
                await natives.until(b"begun")
                server.stop()
                last = frames_of(await genkits.whole())[-1]
                assert b'event: error\ndata: {"status":"ABORTED"' in await natives.whole()
        await server.wait()
    assert cast("dict[str, Any]", last["error"])["status"] == "ABORTED"
    async with StreamManager.connect(sqlite_url) as streams:
        assert await events_of(streams, stream) == [("chunk", "begun"), ("error", "ABORTED")]


@apps
async def test_a_reader_of_another_server_is_told_when_the_writers_process_was_killed(app: str, sqlite_url: str) -> None:
    async with (
        server_process(app, sqlite_url) as server,
        server_process(app, sqlite_url) as other,
        httpx.AsyncClient(timeout=20) as http,
        http.stream("POST", f"{server.url}/endless", json={"data": 1}, headers=STREAMING) as answer,
    ):
        headers = {**STREAMING, STREAM_ID: answer.headers[STREAM_ID]}
        async with http.stream("POST", f"{other.url}/endless", headers=headers) as elsewhere:
            reading = Reading(elsewhere)
            await reading.until(b"begun")
            await server.kill()
            *_, last = frames_of(await reading.whole())
        with pytest.raises(httpx.RemoteProtocolError):
            await Reading(answer).whole()
    assert cast("dict[str, Any]", last["error"])["status"] == "ABORTED"
