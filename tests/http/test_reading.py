"""Reading by GET: native server-sent events, what is known of a stream, stopping it; readers that go away, or do not read."""

import asyncio
import json
import resource
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from typing import Any, Final

import anyio
import httpx
import httpx_sse
import pytest
from anyio.abc import ByteStream
from starlette.applications import Starlette
from starlette.routing import Mount
from tests.http.servers import Reading, events_of, http_to, raw_exchange, until, without_lives
from tests.inside import feeds_of

from streamkeep import InMemoryStreamManager, StreamInput, StreamManager
from streamkeep.errors import PublicError
from streamkeep.http import StreamsHTTP
from streamkeep.http.response import ASGIApp, Timeouts
from streamkeep.storages.memory import MemoryStorage
from streamkeep.testing.faults import FaultyStorage

Event = tuple[str, str, object]


def app_of(streams: StreamManager, **options: Any) -> ASGIApp:
    streams_http = StreamsHTTP(streams, **options)
    return Starlette(routes=[Mount("/streams", streams_http)], lifespan=streams_http.lifespan)


@asynccontextmanager
async def reading(**options: Any) -> AsyncGenerator[tuple[httpx.AsyncClient, StreamManager]]:
    """Give a client of a reading app under /streams, and the manager, with a completed stream `counted` of two chunks."""
    streams = InMemoryStreamManager()
    async with http_to(app_of(streams, **options)) as http:
        async with streams.open("counted", metadata={"owner": ""}) as stream:
            await stream.write({"n": 0})
            await stream.write("é\u2028\r\n")
            await stream.done({"counted": 2})
        yield http, streams


async def events_at(http: httpx.AsyncClient, path: str, **options: Any) -> list[Event]:
    """Give id, name and data of all events that an event source dispatches."""
    async with httpx_sse.aconnect_sse(http, "GET", path, **options) as source:
        source.response.raise_for_status()
        return [(event.id.rpartition("/")[2], event.event, json.loads(event.data)) async for event in source.aiter_sse()]


COUNTED: Final[list[Event]] = [
    ("0", "chunk", {"n": 0}),
    ("1", "chunk", "é\u2028\r\n"),
    ("2", "done", {"counted": 2}),
]


# Events


async def test_a_get_gives_native_server_sent_events() -> None:
    async with reading() as (http, _):
        answer = await http.get("/streams/counted")
        assert await events_at(http, "/streams/counted") == COUNTED
    assert answer.headers["content-type"] == "text/event-stream"
    assert answer.headers["cache-control"] == "no-cache, no-transform"
    assert without_lives(answer.content).startswith(b'retry: 2000\nevent: chunk\ndata: {"n":0}\nid: 0\n\n')


@pytest.mark.parametrize("after", ["-1", "0", "1"])
async def test_a_reader_that_comes_back_gets_what_it_missed(after: str) -> None:
    missed = COUNTED[int(after) + 1 :]
    async with reading() as (http, _):
        assert await events_at(http, "/streams/counted", headers={"Last-Event-ID": after}) == missed
        assert await events_at(http, f"/streams/counted?after={after}") == missed
        # An EventSource that was begun with ?after= names what it has since seen in the header.
        assert await events_at(http, "/streams/counted?after=-1", headers={"Last-Event-ID": after}) == missed
        assert await events_at(http, "/streams/counted?after=", headers={"Last-Event-ID": ""}) == COUNTED


async def test_a_reader_that_has_seen_the_end_gets_204_so_that_an_event_source_stays_closed() -> None:
    async with reading() as (http, _):
        for answer in (
            await http.get("/streams/counted", headers={"Last-Event-ID": "2"}),
            await http.get("/streams/counted?after=2"),
        ):
            assert (answer.status_code, answer.content) == (204, b"")


async def test_a_running_stream_is_replayed_and_then_followed() -> None:
    async with reading() as (http, streams), streams.open("live") as stream:
        await stream.write(0)
        async with http.stream("GET", "/streams/live") as answer:
            await Reading(answer).until(b"data: 0\nid: 0\n\n")
        async with http.stream("GET", "/streams/live", headers={"Last-Event-ID": "0"}) as answer:
            one = Reading(answer)
            await one.until(b"retry: 2000\n")
            await stream.write(1)
            await one.until(b"data: 1\nid: 1\n\n")
            await stream.done()
            assert b"id: 0\n" not in await one.whole()
            assert one.body.endswith(b"event: done\ndata: null\nid: 2\n\n")


async def test_a_reader_may_begin_with_the_last_events_or_from_now_on() -> None:
    async with reading() as (http, streams):
        for last in range(1, 5):
            assert await events_at(http, f"/streams/counted?last={last}") == COUNTED[-last:]
        begins = [
            (await http.get(f"/streams/counted{query}")).headers.get("x-genkit-stream-offset")
            for query in ("?last=2", "?last=99", "?after=0", "?last=1&after=0")
        ]
        assert begins == [str(len(COUNTED) - 3), "-1", None, None]
        assert (await http.get("/streams/counted?last=0")).status_code == 204
        # Who comes back has had them.
        assert await events_at(http, "/streams/counted?last=1&after=0") == COUNTED[1:]

        async with streams.open("running") as stream:
            await stream.write("before")
            async with http.stream("GET", "/streams/running?last=0") as response:
                await until(lambda: feeds_of(streams))
                await stream.write("now")
                await stream.done()
                text = (await Reading(response).whole()).decode()
        assert "before" not in text
        assert "now" in text


async def test_a_reader_that_does_not_follow_gets_what_is_stored_and_a_clean_end() -> None:
    async with reading() as (http, streams):
        assert await events_at(http, "/streams/counted?follow=false") == COUNTED
        async with streams.open("running") as stream:
            for number in range(3):
                await stream.write(number)
            stored: list[Event] = [(str(number), "chunk", number) for number in range(3)]
            assert await events_at(http, "/streams/running?follow=false") == stored
            assert await events_at(http, "/streams/running?follow=false&last=1") == stored[2:]
            assert await events_at(http, "/streams/running?follow=false&after=1") == stored[2:]
            assert await events_at(http, "/streams/running?follow=false&after=2") == []
            assert await events_at(http, "/streams/running?follow=true&follow=false") == stored


@pytest.mark.parametrize("query", ["last=-1", "last=x", "last=9007199254740992", "last=%D9%A3", "follow=no", "follow="])
async def test_what_says_badly_where_to_begin_is_400(query: str) -> None:
    async with reading() as (http, _):
        answer = await http.get(f"/streams/counted?{query}")
        assert (answer.status_code, answer.json()["error"]["status"]) == (400, "INVALID_ARGUMENT")


async def test_an_error_is_an_event_with_an_id_and_without_internal_text() -> None:
    async with reading() as (http, streams):
        for error, shown in (
            (ValueError("secret://db-password"), {"status": "INTERNAL", "message": "internal", "details": None}),
            (PublicError("NOT_FOUND", "no page", {"n": 1}), {"status": "NOT_FOUND", "message": "no page", "details": {"n": 1}}),
        ):
            stream = await streams.open("failed")
            await stream.error(error)
            assert await events_at(http, "/streams/failed") == [("0", "error", shown)]
            await streams.delete("failed")


async def test_heartbeats_are_comments() -> None:
    async with (
        reading(timeouts=Timeouts(heartbeat=timedelta(milliseconds=5))) as (http, streams),
        streams.open("live") as stream,
        http.stream("GET", "/streams/live") as answer,
    ):
        one = Reading(answer)
        await one.until(b": \n: \n")
        await stream.done()
        *comments, end = (await one.whole()).split(b": \n")
        assert set(comments) == {b"retry: 2000\n", b""}
        assert end == b"event: done\ndata: null\nid: 0\n\n"


async def test_a_response_that_lasts_too_long_is_cut_so_that_its_client_comes_back() -> None:
    async with (
        reading(timeouts=Timeouts(longest=timedelta(milliseconds=500))) as (http, streams),
        streams.open("live") as stream,
    ):
        await stream.write(0)
        async with http.stream("GET", "/streams/live") as answer:
            assert (await Reading(answer).cut()).endswith(b"event: chunk\ndata: 0\nid: 0\n\n")


async def test_a_server_that_shuts_down_cuts_its_answers_so_that_their_clients_come_back() -> None:
    async with InMemoryStreamManager() as streams, streams.open("live") as stream:
        await stream.write(0)
        async with httpx.AsyncClient() as http, anyio.create_task_group() as tasks:
            bodies: list[bytes] = []

            async def read(one: Reading) -> None:
                bodies.append(await one.cut())

            async with http_to(app_of(streams)) as server:
                answer = await http.send(http.build_request("GET", f"{server.base_url}/streams/live"), stream=True)
                one = Reading(answer)
                await one.until(b"data: 0\nid: 0\n\n")
                tasks.start_soon(read, one)
    assert bodies == [b"retry: 2000\nevent: chunk\ndata: 0\nid: 0\n\n"]


async def test_a_manager_that_is_closed_under_its_readers_cuts_their_answers() -> None:
    async with reading() as (http, streams):
        stream = await streams.open("live")
        await stream.write(0)
        async with http.stream("GET", "/streams/live") as answer:
            one = Reading(answer)
            await one.until(b"data: 0\nid: 0\n\n")
            await streams.aclose()
            assert (await one.cut()).endswith(b"data: 0\nid: 0\n\n")
        after = await http.get("/streams/live")
    assert after.status_code == 503
    assert after.json()["error"]["status"] == "UNAVAILABLE"


async def test_a_storage_that_fails_ends_the_answer_with_an_error_that_has_no_id() -> None:
    memory = MemoryStorage()
    storage = FaultyStorage(memory)
    async with StreamManager(memory) as elsewhere, http_to(app_of(StreamManager(storage))) as http:
        stream = await elsewhere.open("live")
        await stream.write(0)
        async with http.stream("GET", "/streams/live") as answer:
            one = Reading(answer)
            await one.until(b"data: 0\nid: 0\n\n")
            storage.refuse("read")
            await stream.write(1)
            shown = b'{"status":"UNAVAILABLE","message":"unavailable","details":null}'
            assert (await one.cut()).endswith(b"data: 0\nid: 0\n\nevent: error\ndata: %b\n\n" % shown)


async def test_a_stream_that_is_deleted_under_its_reader_ends_as_not_found() -> None:
    async with reading() as (http, streams):
        stream = await streams.open("live")
        await stream.write(0)
        async with http.stream("GET", "/streams/live") as answer:
            one = Reading(answer)
            await one.until(b"data: 0\nid: 0\n\n")
            await streams.delete("live")
            assert b'event: error\ndata: {"status":"NOT_FOUND"' in await one.cut()


# What is known of a stream; stopping it


async def test_info_says_how_a_stream_stands_but_not_its_metadata_nor_its_writer() -> None:
    async with reading() as (http, streams):
        answer = await http.get("/streams/counted/info")
        stream = await streams.open("live", metadata={"owner": "", "note": "secret"})
        live = await http.get("/streams/live/info")
        await stream.close()
    assert answer.headers["cache-control"] == "no-store"
    known = answer.json()
    assert {key: known[key] for key in ("id", "status", "error", "tail")} == {
        "id": "counted",
        "status": "done",
        "error": None,
        "tail": 3,
    }
    assert known["createdAt"] <= known["updatedAt"] < known["expiresAt"]
    assert live.json()["status"] == "open"
    assert live.json().keys() == known.keys()
    assert not known.keys() & {"metadata", "writer"}
    assert "secret" not in live.text


@pytest.mark.parametrize("by", [("DELETE", "/streams/live"), ("POST", "/streams/live/cancel")], ids=["delete", "cancel"])
async def test_a_stream_is_stopped_once(by: tuple[str, str]) -> None:
    async with reading() as (http, streams):
        stream = await streams.open("live")
        assert (await http.request(*by)).json() == {"stopped": True}
        with anyio.fail_after(5):
            await stream.cancelled.wait()
        assert await events_of(streams, "live") == [("error", "CANCELLED")]
        assert (await http.request(*by)).json() == {"stopped": False}
        assert (await http.delete("/streams/counted")).json() == {"stopped": False}


# What is wrong with a request


async def test_what_does_not_exist_is_404_in_json() -> None:
    async with reading() as (http, _):
        for path in (
            "unknown",
            "unknown/info",
            "",
            "counted/",
            "counted/x",
            "counted/info/",
            "a/b/c",
            "..%2fcounted",
            "..",
            "%2e%2e/x",
        ):
            answer = await http.get(f"/streams/{path}", follow_redirects=True)
            assert answer.status_code in {400, 404}, path
            if path.startswith("unknown"):
                assert answer.json()["error"]["status"] == "NOT_FOUND"
        for method, path in (("DELETE", "unknown"), ("POST", "unknown/cancel")):
            answer = await http.request(method, f"/streams/{path}")
            assert (answer.status_code, answer.json()["error"]["status"]) == (404, "NOT_FOUND")


async def test_an_id_that_cannot_be_is_400_with_a_sentence() -> None:
    async with reading() as (http, _):
        for stream in ("%00", "a%00b", "a" * 256, "a" * 300, "%20", "%ff", "%c3%a9", "-x", ".", "%2e%2e", "a%5cb"):
            for path in (f"/streams/{stream}", f"/streams/{stream}/info"):
                raw = await raw_exchange(http, f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
                head, _, body = raw.partition(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 400 "), (path, head)
                assert "stream id" in json.loads(body)["error"]["message"]


@pytest.mark.parametrize(
    "path",
    [
        "/streams/..%2fcounted",
        "/streams/..%2f..%2fetc%2fpasswd",
        "/streams/%2e%2e/counted",
        "/streams/../x",
        "/streams/a%0d%0aSet-Cookie:%20x",
    ],
)
async def test_a_path_leads_nowhere_else(path: str) -> None:
    async with reading() as (http, _):
        raw = await raw_exchange(http, f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    assert raw.startswith((b"HTTP/1.1 404 ", b"HTTP/1.1 400 "))
    assert b'"n":0' not in raw
    assert b"set-cookie" not in raw.lower()


async def test_an_offset_that_cannot_be_is_400_with_a_sentence() -> None:
    async with reading() as (http, _):
        for offset in ("-2", "3", "9007199254740992", "9" * 400, "1.5", "one", "0x1", "1,2", "+1", "%C2%B2", "%00"):
            answers = [await http.get(f"/streams/counted?after={offset}")]
            if "%" not in offset:
                answers.append(await http.get("/streams/counted", headers={"Last-Event-ID": offset}))
            for answer in answers:
                assert answer.status_code == 400, offset
                assert answer.json()["error"]["status"] == ("OUT_OF_RANGE" if offset == "3" else "INVALID_ARGUMENT"), offset
                assert "offset" in answer.json()["error"]["message"], offset


async def test_a_query_of_whatever_kind_hinders_nobody() -> None:
    """The app's own endpoint has taken it."""
    async with reading() as (http, _):
        for query in (b"a=1&" * 200, b"%ff=%ff&%=&=&after=0"):
            raw = await raw_exchange(http, b"GET /streams/counted?%b HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" % query)
            assert raw.startswith(b"HTTP/1.1 200 "), query


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "counted", "GET, HEAD, DELETE"),
        ("POST", "counted", "GET, HEAD, DELETE"),
        ("GET", "counted/cancel", "POST"),
        ("POST", "counted/info", "GET, HEAD"),
    ],
)
async def test_another_method_is_405_and_says_which_are_allowed(method: str, path: str, allowed: str) -> None:
    async with reading() as (http, _):
        answer = await http.request(method, f"/streams/{path}")
    assert answer.status_code == 405
    assert answer.headers["allow"] == allowed


async def test_it_serves_as_an_app_of_its_own_too() -> None:
    async with InMemoryStreamManager() as streams:
        await (await streams.open("s")).done(1)
        async with http_to(StreamsHTTP(streams)) as http:
            assert await events_at(http, "/s") == [("0", "done", 1)]
            assert (await http.get("/")).status_code == 404


# Readers that go away, or do not read


async def test_readers_that_have_gone_leave_no_task_and_no_subscription_behind() -> None:
    async with reading() as (http, streams):
        stream = await streams.open("live", metadata={"route": "", "owner": ""})
        await stream.write(0)
        async with http.stream("GET", "/streams/live") as answer:  # whatever is made once
            await Reading(answer).until(b"data: 0\nid: 0\n\n")
        await until(lambda: not feeds_of(streams))
        before = len(asyncio.all_tasks())
        answers = [await http.send(http.build_request("GET", "/streams/live"), stream=True) for _ in range(50)]
        readings = [Reading(answer) for answer in answers]
        for one in readings:
            await one.until(b"data: 0\nid: 0\n\n")
        assert feeds_of(streams)["live"].followers == 50
        assert len(asyncio.all_tasks()) >= before + 100
        for answer in answers:
            await answer.aclose()
        await until(lambda: not feeds_of(streams))
        await until(lambda: len(asyncio.all_tasks()) <= before)
        await stream.done()


async def test_readers_of_finished_streams_that_have_gone_in_mid_replay_leave_nothing_behind() -> None:
    streams = InMemoryStreamManager()
    async with http_to(app_of(streams)) as http:
        async with streams.open("long") as stream:
            for _ in range(200):
                await stream.write("x" * 100_000)
            await stream.done()
        before = len(asyncio.all_tasks())
        for _ in range(10):
            async with http.stream("GET", "/streams/long") as answer:
                await Reading(answer).until(b"event: chunk")
        await until(lambda: len(asyncio.all_tasks()) <= before)


@asynccontextmanager
async def not_reading(http: httpx.AsyncClient, path: str) -> AsyncGenerator[ByteStream]:
    """Ask for a stream, and read none of the answer."""
    async with await anyio.connect_tcp(http.base_url.host, http.base_url.port or 80) as connection:
        await connection.send(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        yield connection


async def write_megabytes(stream: StreamInput, megabytes: int) -> None:
    for _ in range(megabytes * 10):
        await stream.write("x" * 100_000)


async def test_readers_that_do_not_read_delay_nobody_and_cost_bounded_memory() -> None:
    streams = InMemoryStreamManager()
    async with http_to(app_of(streams)) as http, AsyncExitStack() as connections:
        stream = await streams.open("live")
        for _ in range(20):
            await connections.enter_async_context(not_reading(http, "/streams/live"))
        await until(lambda: "live" in feeds_of(streams) and feeds_of(streams)["live"].followers == 20)
        async with http.stream("GET", "/streams/live") as answer:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            fast = Reading(answer)
            await write_megabytes(stream, 20)
            await stream.done()
            assert (await fast.whole()).count(b"event: chunk") == 200
            grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory)
        assert feeds_of(streams)["live"].followers == 20  # who are where they were
    # The stream's own 20 MB and the fast reader's copies of it, and not 20 MB for each of those who do not read.
    assert grown < 200_000_000
