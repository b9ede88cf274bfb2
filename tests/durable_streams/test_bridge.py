"""Streams that a manager writes, read through the bridge: by the protocol's own client, and by hand."""

import json
import os
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Final

import anyio
import anyio.to_thread
import httpx
import pytest
from tests.durable_streams.clients import reader
from tests.durable_streams.served import ROOT
from tests.engines.process import Process, answers, free_port
from tests.http.servers import serving, until
from tests.inside import feeds_of

from streamkeep import InMemoryStreamManager, PublicError, Recovery, StreamManager
from streamkeep.durable_streams import (
    DurableStreams,
    DurableStreamsLimits,
    _bridge,
    _readers,
    bridge,
    durable_streams,
)
from streamkeep.durable_streams._bridge import Bridge
from streamkeep.http import Access
from streamkeep.http.response import Message, Receive, Scope, Send

BOUND_SECONDS: Final = 30
LIMITS: Final = DurableStreamsLimits(long_poll=timedelta(milliseconds=300))
LIVE: Final = ("long-poll", "sse", "auto")


@asynccontextmanager
async def bridged(streams: StreamManager, **options: Any) -> AsyncGenerator[httpx.AsyncClient]:
    """Give a client of a server that has a manager's streams at its root."""
    options.setdefault("limits", LIMITS)
    async with serving(bridge(streams, **options)) as url, httpx.AsyncClient(base_url=url, timeout=BOUND_SECONDS) as client:
        yield client


async def write(streams: StreamManager, id: str, *chunks: object, **options: Any) -> None:
    async with streams.open(id, **options) as stream:
        for chunk in chunks:
            await stream.write(chunk)
        await stream.done({"all": len(chunks)})


def events_in(text: str) -> list[tuple[str, Any]]:
    """Give the server-sent events of an answer."""
    events: list[tuple[str, Any]] = []
    for block in text.replace(":\n\n", "").strip("\n").split("\n\n"):
        name, *data = block.split("\n")
        assert name.startswith("event: ")
        assert all(line.startswith("data:") for line in data)
        events.append((name[7:], json.loads("\n".join(line[5:] for line in data))))
    return events


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("mode", ["catch-up", *LIVE])
async def test_the_protocols_own_client_has_an_answer_that_is_done(mode: str) -> None:
    async with InMemoryStreamManager() as streams, bridged(streams) as client:
        await write(streams, "answer", *range(1_500), "é\u2028\n")

        async with reader(mode, f"{client.base_url}/answer") as npm:
            end = await npm.end()

    assert npm.items == [*({"chunk": number} for number in range(1_500)), {"chunk": "é\u2028\n"}, {"result": {"all": 1_501}}]
    assert end["closed"] is True


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("mode", LIVE)
@pytest.mark.promise("P28")
async def test_the_protocols_own_client_follows_an_answer_and_comes_back_where_it_was(mode: str) -> None:
    async with InMemoryStreamManager() as streams, bridged(streams) as client, streams.open("answer") as stream:
        await stream.write(0)
        async with reader(mode, f"{client.base_url}/answer") as npm:
            await npm.until(1)
            await stream.write(1)
            seen = list(await npm.until(2))
        async with reader(mode, f"{client.base_url}/answer", npm.offset) as again:
            await stream.write(2)
            await again.until(1)
            await stream.done("end")
            end = await again.end()

    assert seen == [{"chunk": 0}, {"chunk": 1}]
    assert again.items == [{"chunk": 2}, {"result": "end"}]
    assert end["closed"] is True


async def test_pages_lead_from_one_to_the_next_and_say_where_the_end_is() -> None:
    async with InMemoryStreamManager() as streams, bridged(streams) as client:
        long = "x" * 1_000
        await write(streams, "answer", *([long] * 3_000))

        offset, items, offsets = "-1", list[Any](), list[str]()
        for _ in range(10):
            page = await client.get("/answer", params={"offset": offset})
            items += page.json()
            offset = page.headers["stream-next-offset"]
            offsets.append(offset)
            if "stream-closed" in page.headers:
                break
            assert "stream-up-to-date" not in page.headers
        head = await client.head("/answer")
        rest = await client.get("/answer", params={"offset": offset})

    assert items == [{"chunk": long}] * 3_000 + [{"result": {"all": 3_000}}]
    assert offsets == sorted(set(offsets))
    assert len(offsets) > 1
    assert head.headers["stream-next-offset"] == offset == rest.headers["stream-next-offset"]
    assert head.headers["stream-closed"] == "true" == rest.headers["stream-closed"]
    assert head.headers["cache-control"] == "no-store"
    assert "stream-expires-at" in head.headers
    assert (rest.status_code, rest.json()) == (200, [])


async def test_what_was_read_is_not_sent_again_unless_it_has_ended_since() -> None:
    async with InMemoryStreamManager() as streams, bridged(streams) as client:
        async with streams.open("answer") as stream:
            await stream.write(0)
            first = await client.get("/answer")
            tag = {"If-None-Match": first.headers["etag"]}
            same = await client.get("/answer", headers=tag)
            await stream.done()
        ended = await client.get("/answer", headers=tag)

    assert same.status_code == 304
    assert same.headers["stream-next-offset"] == first.headers["stream-next-offset"]
    assert ended.json() == [{"chunk": 0}, {"result": None}]
    assert ended.headers["cache-control"].startswith("private")
    assert "authorization" in ended.headers["vary"]


async def test_a_long_poll_waits_and_says_when_nothing_came() -> None:
    async with InMemoryStreamManager() as streams, bridged(streams) as client:
        async with streams.open("answer") as stream:
            await stream.write(0)
            tail = (await client.head("/answer")).headers["stream-next-offset"]
            nothing = await client.get("/answer", params={"offset": tail, "live": "long-poll", "cursor": "999999999"})
            await stream.write(1)
            one = await client.get("/answer", params={"offset": tail, "live": "long-poll"})
            await stream.done()
        tail = (await client.head("/answer")).headers["stream-next-offset"]
        closed = await client.get("/answer", params={"offset": tail, "live": "long-poll"})

    assert nothing.status_code == 204
    assert nothing.headers["stream-up-to-date"] == "true"
    assert int(nothing.headers["stream-cursor"]) > 999_999_999
    assert one.json() == [{"chunk": 1}]
    assert closed.status_code == 204
    assert closed.headers["stream-closed"] == "true"


async def test_each_event_of_data_is_followed_by_one_that_says_where_its_reader_is() -> None:
    async with InMemoryStreamManager() as streams, bridged(streams) as client:
        await write(streams, "answer", *range(1_100), 'data: {"streamClosed": true}')
        answer = await client.get("/answer", params={"offset": "-1", "live": "sse"})
        events = events_in(answer.text)

    assert answer.headers["content-type"] == "text/event-stream"
    assert [name for name, _ in events] == ["data", "control"] * (len(events) // 2)
    assert sum(len(data) for name, data in events if name == "data") == 1_102
    closed = [data.get("streamClosed", False) for name, data in events if name == "control"]
    assert closed == [False] * (len(closed) - 1) + [True]
    assert "streamCursor" not in events[-1][1]


async def test_a_response_of_events_ends_in_time_and_its_reader_goes_on() -> None:
    limits = DurableStreamsLimits(sse=timedelta(milliseconds=200))
    async with InMemoryStreamManager() as streams, bridged(streams, limits=limits) as client:
        async with streams.open("answer") as stream:
            await stream.write(0)
            first = events_in((await client.get("/answer?offset=-1&live=sse")).text)
            at = first[-1][1]["streamNextOffset"]
            still = events_in((await client.get(f"/answer?offset={at}&live=sse")).text)
            await stream.done()
        rest = events_in((await client.get(f"/answer?offset={at}&live=sse")).text)

    assert first[0] == ("data", [{"chunk": 0}])
    assert first[1][1]["upToDate"] is True
    assert still == [("control", still[0][1])]
    assert still[0][1]["upToDate"] is True
    assert rest[0] == ("data", [{"result": None}])


async def test_an_answer_that_has_begun_again_is_read_from_its_new_beginning() -> None:
    async with InMemoryStreamManager() as streams, bridged(streams) as client:
        recovery = Recovery("again", attempts=2)
        async with streams.open("answer", recovery=recovery) as stream:
            await stream.write("old")
            before = await client.get("/answer")
            await stream.restart()
            await stream.write("new")
            await stream.done()
        from_start = await client.get("/answer")
        went_on = await client.get("/answer", params={"offset": before.headers["stream-next-offset"]})

    assert before.json() == [{"chunk": "old"}]
    assert from_start.json()[-2:] == [{"chunk": "new"}, {"result": None}]
    assert {"chunk": "old"} not in from_start.json()
    assert went_on.json() == [{"restarted": {}}, {"chunk": "new"}, {"result": None}]


@pytest.mark.promise("P28")
async def test_of_a_failure_readers_see_what_is_for_them_and_never_the_exceptions_text() -> None:
    async with InMemoryStreamManager() as streams, bridged(streams) as client:
        for id, error in (
            ("secret", ValueError("the password is swordfish")),
            ("told", PublicError("NOT_FOUND", "no page", [7])),
        ):
            async with streams.open(id) as stream:
                await stream.error(error)
        secret, told = await client.get("/secret"), await client.get("/told")
        live = await client.get("/secret?offset=-1&live=sse")

    assert secret.json() == [{"error": {"status": "INTERNAL", "message": "internal", "details": None}}]
    assert told.json() == [{"error": {"status": "NOT_FOUND", "message": "no page", "details": [7]}}]
    assert secret.headers["stream-closed"] == "true"
    assert "swordfish" not in secret.text + live.text
    assert "ValueError" not in secret.text + live.text


@pytest.mark.parametrize("mode", ["long-poll", "sse"])
async def test_who_follows_a_writer_that_dies_is_told_that_it_did(mode: str, sqlite_url: str) -> None:
    second = timedelta(seconds=1)
    async with StreamManager.connect(sqlite_url, lease=second, grace=second) as streams, bridged(streams) as client:
        await write(streams, "other", 0)
        await leave_open(sqlite_url)
        offset, items = "-1", list[Any]()
        with anyio.fail_after(BOUND_SECONDS):
            while {"error"} != {key for item in items[-1:] for key in item}:
                answer = await client.get("/answer", params={"offset": offset, "live": mode})
                if mode == "sse":
                    events = events_in(answer.text)
                    items += [item for name, data in events if name == "data" for item in data]
                    offset = events[-1][1]["streamNextOffset"]
                else:
                    items += answer.json() if answer.status_code == 200 else []
                    offset = answer.headers["stream-next-offset"]

    assert items[0] == {"chunk": 0}
    assert items[-1]["error"]["status"] == "ABORTED"


async def leave_open(url: str) -> None:
    """Have a process write a chunk of `answer`, and die."""
    program = f"""
import asyncio, os
from datetime import timedelta
from streamkeep import StreamManager

async def main():
    async with StreamManager.connect({url!r}, lease=timedelta(seconds=1), grace=timedelta(seconds=1)) as streams:
        stream = await streams.open("answer")
        await stream.write(0)
        os.kill(os.getpid(), 9)

asyncio.run(main())
"""
    done = await anyio.run_process([sys.executable, "-c", program], check=False)
    assert done.returncode == -9, done.stderr.decode()


@pytest.mark.promise("P28")
async def test_a_stream_of_somebody_else_does_not_exist() -> None:
    def authorize(access: Access) -> object:
        if "authorization" not in access.headers:
            raise PublicError("UNAUTHENTICATED", "who are you?")
        return access.headers["authorization"]

    async with InMemoryStreamManager() as streams, bridged(streams, authorize=authorize) as client:
        await write(streams, "hers", 0, owner="ann")
        answers = [
            [
                await client.request(method, path, headers={"Authorization": who} if who else {})
                for method, path in (("GET", f"/{id}"), ("GET", f"/{id}?offset=-1&live=sse"), ("HEAD", f"/{id}"))
            ]
            for who, id in (("ann", "hers"), ("bob", "hers"), ("bob", "nobodys"), ("", "hers"), ("", "nobodys"))
        ]

    assert [[answer.status_code for answer in some] for some in answers] == [
        [200] * 3,
        [404] * 3,
        [404] * 3,
        [401] * 3,
        [401] * 3,
    ]
    assert [answer.content for answer in answers[1]] == [answer.content for answer in answers[2]]
    assert [answer.content for answer in answers[3]] == [answer.content for answer in answers[4]]


async def test_without_authorize_nobody_reads_what_somebody_owns() -> None:
    async with InMemoryStreamManager() as streams, bridged(streams) as client:
        await write(streams, "hers", 0, owner="ann")
        assert (await client.get("/hers")).status_code == 404


@pytest.mark.parametrize("method", ["PUT", "POST", "DELETE", "PATCH"])
@pytest.mark.promise("P28")
async def test_nothing_can_be_written_through_it(method: str) -> None:
    async with InMemoryStreamManager() as streams, bridged(streams) as client:
        await write(streams, "answer", 0)
        for id in ("answer", "other"):
            answer = await client.request(method, f"/{id}", content=b"[1]", headers={"Content-Type": "application/json"})
            assert answer.status_code == 405
            assert answer.headers["allow"] == "GET, HEAD, OPTIONS"
        assert len((await client.get("/answer")).json()) == 2


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ("offset=", 400),
        ("offset=0", 400),
        ("offset=-1&offset=-1", 400),
        ("offset=9999999999999999_00000000", 410),
        ("offset=0000000000000000_0000000g", 400),
        ("offset=-1&live=poll", 400),
        ("live=sse", 400),
        ("live=long-poll", 400),
    ],
)
async def test_a_place_that_is_none_is_refused(query: str, code: int) -> None:
    async with InMemoryStreamManager() as streams, bridged(streams) as client:
        await write(streams, "answer", 0)
        assert (await client.get(f"/answer?{query}")).status_code == code


async def test_a_place_beyond_the_end_and_one_of_an_earlier_stream_are_refused() -> None:
    async with InMemoryStreamManager() as streams, bridged(streams) as client:
        await write(streams, "answer", 0)
        tail = (await client.head("/answer")).headers["stream-next-offset"]
        beyond = "0000000000000009" + tail[16:]
        assert (await client.get("/answer", params={"offset": beyond})).status_code == 400
        await streams.delete("answer")
        assert (await client.get("/answer", params={"offset": tail})).status_code == 404
        await write(streams, "answer", 0)
        assert (await client.get("/answer", params={"offset": tail})).status_code == 410


async def test_from_now_on_gives_only_what_comes() -> None:
    async with InMemoryStreamManager() as streams, bridged(streams) as client, streams.open("answer") as stream:
        await stream.write(0)
        now = await client.get("/answer?offset=now")
        await stream.write(1)
        assert (now.status_code, now.json(), now.headers["cache-control"]) == (200, [], "no-store")
        assert "etag" not in now.headers
        rest = await client.get("/answer", params={"offset": now.headers["stream-next-offset"]})
        await stream.done()

    assert rest.json() == [{"chunk": 1}]


async def test_a_long_poll_from_now_on_is_answered_with_what_comes() -> None:
    limits = DurableStreamsLimits(long_poll=timedelta(seconds=BOUND_SECONDS))
    answers: list[httpx.Response] = []
    async with InMemoryStreamManager() as streams, bridged(streams, limits=limits) as client, streams.open("answer") as stream:
        await stream.write(0)

        async def poll() -> None:
            answers.append(await client.get("/answer?offset=now&live=long-poll"))

        with anyio.fail_after(BOUND_SECONDS):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(poll)
                await until(lambda: bool(streams_followed(streams)))
                await stream.write(1)
        rest = await client.get("/answer", params={"offset": answers[0].headers["stream-next-offset"]})
        await stream.done()

    assert (answers[0].status_code, answers[0].json(), rest.json()) == (200, [{"chunk": 1}], [])
    assert "etag" not in answers[0].headers


@pytest.mark.parametrize("mode", ["long-poll", "sse"])
async def test_who_follows_a_stream_that_is_deleted_is_not_left_waiting(mode: str) -> None:
    limits = DurableStreamsLimits(long_poll=timedelta(seconds=BOUND_SECONDS))
    async with InMemoryStreamManager() as streams, bridged(streams, limits=limits) as client:
        stream = await streams.open("answer")
        answers: list[httpx.Response] = []

        async def follow() -> None:
            answers.append(await client.get(f"/answer?offset=now&live={mode}"))

        with anyio.fail_after(BOUND_SECONDS):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(follow)
                await until(lambda: bool(streams_followed(streams)))
                await streams.delete("answer")
        again = await client.get("/answer?offset=now")
        await stream.close()

    assert answers[0].status_code == (404 if mode == "long-poll" else 200)
    assert "streamClosed" not in answers[0].text
    assert again.status_code == 404


def streams_followed(streams: StreamManager) -> object:
    return feeds_of(streams)


@pytest.mark.parametrize("mode", ["long-poll", "sse"])
async def test_a_reader_that_leaves_is_noticed_at_once(mode: str) -> None:
    limits = DurableStreamsLimits(max_readers=1, long_poll=timedelta(seconds=BOUND_SECONDS))
    async with InMemoryStreamManager() as streams, streams.open("answer") as stream:
        app = bridge(streams, limits=limits)
        served = 0

        async def counting(scope: Scope, receive: Receive, send: Send) -> None:
            nonlocal served
            served += 1
            try:
                await app(scope, receive, send)
            finally:
                served -= 1

        async with serving(counting) as url, httpx.AsyncClient(base_url=url, timeout=BOUND_SECONDS) as client:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(client.get, f"/answer?offset=now&live={mode}")
                await until(lambda: bool(streams_followed(streams)))
                busy = await client.get(f"/answer?offset=now&live={mode}")
                tasks.cancel_scope.cancel()
            await until(lambda: served == 0)
        await stream.done()

    assert busy.status_code == 429
    assert busy.headers["retry-after"] == "1"


@pytest.mark.parametrize("live", ["long-poll", "sse"])
@pytest.mark.parametrize("served", [bridge, durable_streams])
async def test_who_does_not_take_what_is_sent_holds_no_place_of_others(
    monkeypatch: pytest.MonkeyPatch, served: Callable[..., Bridge | DurableStreams], live: str
) -> None:
    for module in (_bridge, _readers):
        monkeypatch.setattr(module, "STALLED_SECONDS", 0.1)
    monkeypatch.setattr(_bridge, "LAST_SECONDS", 0.1)
    limits = DurableStreamsLimits(max_readers=1, long_poll=timedelta(seconds=BOUND_SECONDS), sse=timedelta(seconds=0.1))
    codes: list[int] = []
    is_stuck = anyio.Event()

    async with InMemoryStreamManager() as streams, AsyncExitStack() as stack, anyio.create_task_group() as tasks:
        app = served(streams, limits=limits)
        if isinstance(app, DurableStreams):
            await stack.enter_async_context(app)
            await asked(app, codes, "PUT", "content-type: text/plain", body=b"")
            write: Callable[[], Awaitable[object]] = partial(asked, app, codes, "POST", "content-type: text/plain", body=b"x")
        else:
            stream = await stack.enter_async_context(streams.open("answer"))
            write = partial[Coroutine[Any, Any, object]](stream.write, "x")
        await write()

        async def stuck(message: Message) -> None:
            if message.get("body"):
                is_stuck.set()
                await anyio.sleep_forever()

        with anyio.fail_after(BOUND_SECONDS):
            tasks.start_soon(partial(asked, app, codes, "GET", query=f"offset=now&live={live}", send=stuck))
            while not is_stuck.is_set():
                await write()
                await anyio.sleep(0.01)
            codes.clear()
            while 200 not in codes:
                tasks.start_soon(partial(asked, app, codes, "GET", query=f"offset=now&live={live}"))
                await write()
                await anyio.sleep(0.01)
        tasks.cancel_scope.cancel()


async def asked(
    app: Bridge | DurableStreams,
    codes: list[int],
    method: str,
    *headers: str,
    query: str = "",
    body: bytes = b"",
    send: Send | None = None,
) -> None:
    """Ask an app itself, and note the code of its answer."""
    has_sent = False

    async def receive() -> Message:
        nonlocal has_sent
        if has_sent:
            await anyio.sleep_forever()
        has_sent = True
        return {"type": "http.request", "body": body}

    async def noted(message: Message) -> None:
        if "status" in message:
            codes.append(message["status"])

    raw = [(name.encode(), value.encode()) for name, _, value in (header.partition(": ") for header in headers)]
    scope: Scope = {"type": "http", "method": method, "path": "/answer", "query_string": query.encode(), "headers": raw}
    await app(scope, receive, send or noted)


async def test_a_browser_may_ask_and_others_are_told_nothing_of_the_manager() -> None:
    async with InMemoryStreamManager() as streams, bridged(streams) as client:
        preflight = await client.options("/answer", headers={"Origin": "https://a.example"})
        answer = await client.get("/answer")

    assert preflight.status_code == 204
    assert preflight.headers["access-control-allow-origin"] == "*"
    assert answer.status_code == 404
    assert answer.headers["x-content-type-options"] == "nosniff"


async def test_a_manager_that_does_not_run_is_a_503() -> None:
    async with bridged(InMemoryStreamManager()) as client:
        answer = await client.get("/answer")
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"


async def test_what_authorize_raises_for_a_connection_of_its_own_is_answered(caplog: pytest.LogCaptureFixture) -> None:
    def authorize(_access: Access) -> object:
        raise TimeoutError("the directory at 10.0.0.9 does not answer")

    async with InMemoryStreamManager() as streams, bridged(streams, authorize=authorize) as client:
        answer = await client.get("/answer")

    assert answer.status_code == 500
    assert "10.0.0.9" not in answer.text
    assert "10.0.0.9" in caplog.text


SERVER: Final = """
import asyncio, sys
import uvicorn
from streamkeep import InMemoryStreamManager
from streamkeep.durable_streams import bridge

async def main():
    async with InMemoryStreamManager() as streams:
        async with streams.open("answer") as stream:
            await uvicorn.Server(uvicorn.Config(bridge(streams), port=int(sys.argv[1]), lifespan="off", log_level="error")).serve()
            await stream.done()

asyncio.run(main())
"""


async def test_a_server_with_open_readers_stops_at_once_when_it_is_told_to(tmp_path: Path) -> None:
    port = free_port()
    environment = {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    process = Process([sys.executable, "-c", SERVER, str(port)], tmp_path, lambda: answers(port), environment=environment)
    await anyio.to_thread.run_sync(process.start)
    try:
        url = f"http://127.0.0.1:{port}/answer?offset=now&live=sse"
        async with httpx.AsyncClient(timeout=BOUND_SECONDS) as client, client.stream("GET", url) as answer:
            with anyio.fail_after(BOUND_SECONDS):
                lines = answer.aiter_lines()
                assert await anext(lines) == "event: control"
                await anyio.to_thread.run_sync(process.stop)
                rest = [line async for line in lines]
        assert "streamClosed" not in "".join(rest)
    finally:
        await anyio.to_thread.run_sync(process.kill)
