"""The reference's client of native events: it runs in Node as the page shows it, over connections that are cut."""

import json
import subprocess
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import Any, Final

import anyio
import pytest
from fastapi import FastAPI, Request, Response
from tests.clients.served import native_client
from tests.http.servers import serving
from tests.network.proxy import End, Fate, bad_network

from streamkeep import InMemoryStreamManager, PublicError
from streamkeep.http import SSEFraming, StreamsHTTP
from streamkeep.http.response import Receive, Scope, Send

PROGRAM: Final = """
import { events } from "./events.mjs";
const [url, options] = process.argv.slice(2);
try {
  for await (const event of events(url, JSON.parse(options))) console.log(JSON.stringify(event));
} catch (error) {
  console.log(JSON.stringify({ thrown: error.message }));
}
"""
WORDS: Final = ("Nothing", "is", "naïve 世界", "lost")


@pytest.fixture
def read(requires: Callable[[str], str], tmp_path: Path) -> Callable[..., Any]:
    """Give what reads a URL by the page's client, in Node, and gives what it has given; what it throws is last."""
    node = requires("node")
    (tmp_path / "events.mjs").write_text(native_client())
    (tmp_path / "read.mjs").write_text(PROGRAM)

    async def run(url: str, **options: object) -> list[dict[str, Any]]:
        command = [node, str(tmp_path / "read.mjs"), url, json.dumps(options)]
        with anyio.fail_after(60):
            ran = await anyio.run_process(command, stderr=subprocess.STDOUT, check=False)
        assert ran.returncode == 0, ran.stdout.decode()
        return [json.loads(line) for line in ran.stdout.splitlines()]

    return run


def app_of(streams_http: StreamsHTTP) -> FastAPI:
    """Give an app with an endpoint that answers, and one that fails."""
    app = FastAPI(lifespan=streams_http.lifespan)
    app.mount("/streams", streams_http)

    async def answer(*, fails: bool) -> AsyncGenerator[object]:
        for word in WORDS:
            yield {"text": word}
        if fails:
            raise PublicError("RESOURCE_EXHAUSTED", "the budget is used up")

    @app.post("/ask")
    async def ask(request: Request, *, fails: bool = False) -> Response:
        return await streams_http.respond(request, answer(fails=fails), framing=SSEFraming())

    return app


def summary_of(events: Sequence[dict[str, Any]]) -> list[object]:
    """Give what an application would have taken from events."""
    return [event["data"]["text"] if event["event"] == "chunk" else event["event"] for event in events]


CUTS: Final = [
    Fate(End.RST, after=b"retry: "),
    Fate(End.FIN, after=b"/1\n"),
    Fate(End.RST, after=b'data: {"te'),
    Fate(End.FIN),
]


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_it_has_every_event_once_over_connections_that_are_cut(read: Callable[..., Any], method: str) -> None:
    streams_http = StreamsHTTP(InMemoryStreamManager())
    async with serving(app_of(streams_http)) as url, bad_network(url) as network:
        if method == "GET":
            async with streams_http.streams.open("s") as stream:
                for word in WORDS:
                    await stream.write({"text": word})
                await stream.done()
            found = await read(network.path(CUTS) + "/streams/s")
        else:
            headers = {"Idempotency-Key": "once"}
            found = await read(network.path(CUTS) + "/ask", method=method, headers=headers)
        assert len(await streams_http.streams.list()) == 1
    assert summary_of(found) == [*WORDS, "done"]
    assert sum(network.struck.values()) == len(CUTS)
    assert [event["id"].rpartition("/")[2] for event in found] == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize("end", End)
async def test_an_error_with_an_id_ends_it_whatever_becomes_of_the_connection_then(read: Callable[..., Any], end: End) -> None:
    app, requests = app_of(StreamsHTTP(InMemoryStreamManager())), list[str]()

    async def counted(scope: Scope, receive: Receive, send: Send) -> None:
        requests.extend([scope["path"]] if scope["type"] == "http" else [])
        await app(scope, receive, send)

    async with serving(counted) as url, bad_network(url) as network:
        path = network.path([Fate(end, after=b"/4\n\n")])
        found = await read(path + "/ask?fails=true", method="POST", headers={"Idempotency-Key": "once"})
    assert summary_of(found) == [*WORDS, "error"]
    assert found[-1]["data"]["status"] == "RESOURCE_EXHAUSTED"
    assert network.struck == {end: 1}
    # What `fetch` has received and not read may be lost with its connection. Then it comes back for that.
    assert len(requests) <= (1 if end is End.STALL else 2)


async def test_an_error_without_an_id_does_not_end_it(read: Callable[..., Any]) -> None:
    last: list[str | None] = []

    async def failing_once(scope: Scope, receive: Receive, send: Send) -> None:  # as a server whose storage fails answers
        assert (await receive())["type"] in {"http.request", "lifespan.startup"}
        last.append(dict(scope["headers"]).get(b"last-event-id", b"").decode())
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        failed = b'event: chunk\ndata: "first"\nid: s/a/0\n\nevent: error\ndata: {"status":"UNAVAILABLE"}\n\n'
        body = failed if len(last) == 1 else b"event: done\ndata: null\nid: s/a/1\n\n"
        await send({"type": "http.response.body", "body": body})

    async with serving(failing_once, lifespan="off") as url:
        found = await read(url + "/streams/s")
    assert [(event["event"], event["id"]) for event in found] == [("chunk", "s/a/0"), ("done", "s/a/1")]
    assert last == ["", "s/a/0"]


async def test_a_cursor_that_names_no_stream_ends_it_also_by_post(read: Callable[..., Any]) -> None:
    streams_http = StreamsHTTP(InMemoryStreamManager())
    async with serving(app_of(streams_http)) as url:
        async with streams_http.streams.open("s", metadata={"route": "/ask"}) as stream:
            await stream.done()
        unknown = await read(f"{url}/ask", method="POST", headers={"Last-Event-ID": "unknown/a1a1a1a1/1"})
        earlier = await read(f"{url}/ask", method="POST", headers={"Last-Event-ID": "s/a1a1a1a1/1"})
    assert (unknown, earlier) == ([{"thrown": "NOT_FOUND"}], [{"thrown": "OUT_OF_RANGE"}])


async def test_the_stream_that_it_follows_is_deleted(read: Callable[..., Any]) -> None:
    streams_http = StreamsHTTP(InMemoryStreamManager())
    async with serving(app_of(streams_http)) as url, bad_network(url) as network:
        stream = await streams_http.streams.open("s")
        await stream.write({"text": "first"})
        async with anyio.create_task_group() as reading:
            found: list[dict[str, Any]] = []

            async def read_all() -> None:
                found.extend(await read(network.path() + "/streams/s"))

            reading.start_soon(read_all)
            with anyio.fail_after(30):
                while stream.unread_since is not None:  # noqa: ASYNC110 - no event tells
                    await anyio.sleep(0.05)
            await streams_http.streams.delete("s")
    assert summary_of(found[:-1]) == ["first"]
    assert found[-1] == {"thrown": "NOT_FOUND"}


async def test_a_204_ends_it_and_a_refusal_is_thrown(read: Callable[..., Any]) -> None:
    streams_http = StreamsHTTP(InMemoryStreamManager())
    async with serving(app_of(streams_http)) as url:
        async with streams_http.streams.open("s") as stream:
            await stream.done()
        assert await read(f"{url}/streams/s?after=0") == []
        assert await read(f"{url}/streams/nobodys") == [{"thrown": "HTTP 404"}]
