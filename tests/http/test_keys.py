"""Keys and runs over HTTP: a repeated start joins, replaces or is refused; the newest stream of a conversation is followed and stopped."""

import subprocess
import sys
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, Final

import anyio
import httpx
import pytest
from fastapi import Depends, FastAPI, Header, Request, Response
from fastapi.responses import StreamingResponse
from tests.http.servers import STREAM_ID, STREAMING, Reading, count, flow_of, frames_of, http_to, without_lives

from streamkeep import InMemoryStreamManager, StreamManager
from streamkeep.http import (
    AGUIFraming,
    DurableStreaming,
    Framing,
    LangGraphFraming,
    PassThroughFraming,
    SSEFraming,
    StreamsHTTP,
)
from streamkeep.integrations.fastapi import durable_flow

ANN: Final = {"X-User": "ann"}
BOB: Final = {"X-User": "bob"}


class Chats:
    """An app with one conversation a path, whose answers wait to be let go on."""

    def __init__(self, streams: StreamManager | None = None, **options: Any) -> None:
        self.started = 0
        self.go = anyio.Event()
        self.http = StreamsHTTP(streams or InMemoryStreamManager())
        self.app = FastAPI(lifespan=self.http.lifespan)

        def current_user(x_user: str = Header()) -> str:
            return x_user

        @self.app.post("/chat/{chat}")
        async def ask(request: Request, chat: str, user: str = Depends(current_user)) -> Response:
            return await self.http.respond(request, self._answer(), key=chat, owner=user, framing=SSEFraming(), **options)

        @self.app.get("/chat/{chat}/stream")
        async def follow(request: Request, chat: str, user: str = Depends(current_user)) -> Response:
            return await self.http.follow(request, key=chat, owner=user)

        @self.app.delete("/chat/{chat}")
        async def stop(request: Request, chat: str, user: str = Depends(current_user)) -> Response:
            return await self.http.cancel(request, key=chat, owner=user)

    async def _answer(self) -> AsyncGenerator[str]:
        self.started += 1
        yield f"answer {self.started}"
        await self.go.wait()


async def begun(http: httpx.AsyncClient, path: str, **options: Any) -> tuple[httpx.Response, Reading]:
    """Start, and read the first chunk."""
    answer = await http.send(http.build_request("POST", path, **options), stream=True)
    reading = Reading(answer)
    if answer.status_code == 200:
        await reading.until(b"id: 0\n")
    return answer, reading


async def test_starts_of_one_conversation_join_what_runs() -> None:
    chats = Chats()
    async with http_to(chats.app) as http:
        both = [await begun(http, "/chat/c", headers=ANN) for _ in range(2)]
        other, _ = await begun(http, "/chat/d", headers=ANN)
        foreign, _ = await begun(http, "/chat/c", headers=BOB)
        chats.go.set()
        whole = [await reading.whole() for _, reading in both]
        afterwards, _ = await begun(http, "/chat/c", headers=ANN)
    ids = [answer.headers[STREAM_ID] for answer in (both[0][0], both[1][0], other, foreign, afterwards)]
    assert ids[0] == ids[1]
    assert len(set(ids)) == 4
    assert chats.started == 4
    assert whole[0] == whole[1]


async def test_fifty_starts_at_once_are_one_run() -> None:
    chats = Chats()
    answers: list[httpx.Response] = []
    async with http_to(chats.app) as http:

        async def start() -> None:
            answers.append((await begun(http, "/chat/c", headers=ANN))[0])

        async with anyio.create_task_group() as starting:
            for _ in range(50):
                starting.start_soon(start)
        assert len({answer.headers[STREAM_ID] for answer in answers}) == 1
        assert chats.started == 1
        assert len(await chats.http.streams.list()) == 1
        chats.go.set()


async def test_a_start_replaces_what_runs_if_the_app_says_so() -> None:
    chats = Chats(when_running="replace")
    async with http_to(chats.app) as http:
        _, first = await begun(http, "/chat/c", headers=ANN)
        _, second = await begun(http, "/chat/c", headers=ANN)
        assert b'"status":"CANCELLED"' in await first.whole()
        chats.go.set()
        assert b"answer 2" in await second.whole()


async def test_a_start_is_refused_where_one_runs_if_the_app_says_so() -> None:
    chats = Chats(when_running="refuse")
    async with http_to(chats.app) as http:
        await begun(http, "/chat/c", headers=ANN)
        refused = await http.post("/chat/c", headers=ANN)
        chats.go.set()
    assert refused.status_code == 409
    assert chats.started == 1


@pytest.mark.parametrize("when_running", ["join", "replace", "refuse"])
async def test_a_request_that_is_sent_twice_is_one_run_whatever_the_app_says_and_also_when_it_has_ended(
    when_running: str,
) -> None:
    chats = Chats(when_running=when_running)
    once = {**ANN, "Idempotency-Key": "k1"}
    async with http_to(chats.app) as http:
        first, reading = await begun(http, "/chat/c", headers=once)
        second, again = await begun(http, "/chat/c", headers=once)
        chats.go.set()
        assert await reading.whole() == await again.whole()
        ended = await http.post("/chat/c", headers=once)
        another = await http.post("/chat/c", headers={**ANN, "Idempotency-Key": "k2"})
        of_another_route = await http.post("/chat/d", headers=once)
        foreign = await http.post("/chat/c", headers={**BOB, "Idempotency-Key": "k1"})
    ids = [answer.headers[STREAM_ID] for answer in (first, second, ended, another, of_another_route, foreign)]
    assert ids[0] == ids[1] == ids[2]
    assert len(set(ids)) == 4
    assert chats.started == 4
    assert without_lives(ended.content) == reading.body


async def test_the_newest_stream_of_a_conversation_is_followed_while_it_runs_and_stopped() -> None:
    chats = Chats()
    async with http_to(chats.app) as http:
        nothing = await http.get("/chat/c/stream", headers=ANN)
        answer, _ = await begun(http, "/chat/c", headers=ANN)
        async with http.stream("GET", "/chat/c/stream", headers=ANN) as followed:
            reading = Reading(followed)
            await reading.until(b"id: 0\n")
            cursor = reading._came.decode().partition("\nid: ")[2].partition("\n")[0]
            foreign = [await http.get("/chat/c/stream", headers=BOB), await http.delete("/chat/c", headers=BOB)]
            stopped = await http.delete("/chat/c", headers=ANN)
            assert b'"status":"CANCELLED"' in await reading.whole()
        stopped_again = await http.delete("/chat/c", headers=ANN)
        over = await http.get("/chat/c/stream", headers=ANN)
        rest = await http.get("/chat/c/stream", headers={**ANN, "Last-Event-ID": cursor})
    assert (nothing.status_code, over.status_code) == (204, 204)
    assert [answer_.status_code for answer_ in foreign] == [204, 404]
    assert (stopped.json(), stopped_again.json()) == ({"stopped": True}, {"stopped": False})
    assert cursor.startswith(f"{answer.headers[STREAM_ID]}/")
    assert rest.text.count("data: ") == 1  # who has seen some of it gets the rest


async def test_a_flow_is_run_once_for_a_request_that_is_sent_twice() -> None:
    app = FastAPI()
    app.include_router(durable_flow(flow_of(count), InMemoryStreamManager()))
    async with http_to(app) as http:
        both = [await http.post("/count", json={"data": 2}, headers={**STREAMING, "Idempotency-Key": "k"}) for _ in range(2)]
        other = await http.post("/count", json={"data": 2}, headers={**STREAMING, "Idempotency-Key": "l"})
    assert both[0].headers[STREAM_ID] == both[1].headers[STREAM_ID] != other.headers[STREAM_ID]
    assert frames_of(both[0].content) == frames_of(both[1].content)


KNOWN_BY: Final[dict[str, tuple[dict[str, str], dict[str, str]]]] = {
    "a header of the app's": ({"X-User": "bob"}, {}),
    "a header that a proxy sets": ({"X-Forwarded-Email": "bob@example.com"}, {}),
    "a token": ({"Authorization": "Bearer b"}, {}),
    "a cookie": ({"Cookie": "session=b"}, {}),
    "a query token": ({}, {"token": "b"}),
    "a tenant's name": ({"Host": "bob.example"}, {}),
}
ANOTHER_TRY: Final = {
    "Traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    "X-Request-Id": "2",
    "X-Forwarded-For": "192.0.2.7",
    "X-B3-TraceId": "2",
}


def answering_nobody_known(around: str) -> Any:
    """Give an app that says nothing of who is asking, and counts its runs."""
    runs: list[int] = []
    streams_http = StreamsHTTP("memory://")
    app = FastAPI(lifespan=streams_http.lifespan)

    async def text() -> AsyncGenerator[str]:
        runs.append(1)
        yield f"data: {len(runs)}\n\n"

    @app.post("/")
    async def answer(request: Request) -> Response:
        if around == "respond":
            return await streams_http.respond(request, text(), framing=PassThroughFraming())
        return StreamingResponse(text(), media_type="text/event-stream")

    return app if around == "respond" else DurableStreaming(app, "memory://")


@pytest.mark.parametrize("around", ["respond", "DurableStreaming"])
@pytest.mark.parametrize("known_by", KNOWN_BY)
async def test_a_guessed_idempotency_key_shows_no_answer_of_somebody_else_whatever_an_app_knows_its_users_by(
    around: str, known_by: str
) -> None:
    key = {"Idempotency-Key": "1"}
    headers, query = KNOWN_BY[known_by]
    async with http_to(answering_nobody_known(around)) as http:
        anns = await http.post("/", headers=key)
        again = await http.post("/", headers={**key, **ANOTHER_TRY})
        bobs = [await http.post("/", params=query, headers={**key, **headers}) for _ in range(2)]
    assert anns.headers[STREAM_ID] == again.headers[STREAM_ID]
    assert bobs[0].headers[STREAM_ID] == bobs[1].headers[STREAM_ID] != anns.headers[STREAM_ID]
    assert "data: 2" in bobs[0].text


async def test_an_endpoint_learns_whether_it_has_started_what_is_shown() -> None:
    streams_http = StreamsHTTP("memory://")
    app = FastAPI(lifespan=streams_http.lifespan)
    begun_here: list[bool] = []
    go = anyio.Event()
    ids = iter(["named", "named", "other"])  # as an app that names them may do

    async def answer() -> AsyncGenerator[str]:
        yield "a"
        await go.wait()

    @app.post("/")
    async def ask(request: Request) -> Response:
        response = await streams_http.respond(request, answer(), id=next(ids, None), key="k", framing=SSEFraming())
        begun_here.append(response.started)
        return response

    async with http_to(app) as http:
        started, _ = await begun(http, "/")
        await begun(http, "/")
        await begun(http, "/", headers={STREAM_ID: started.headers[STREAM_ID]})
        go.set()
        await until_ended(streams_http.streams, started.headers[STREAM_ID])
        await http.post("/")
        await http.post("/", headers={STREAM_ID: "none"})
    assert begun_here == [True, False, False, True, False]


async def test_a_run_is_followed_and_stopped_by_its_owner_and_for_nobody_else() -> None:
    streams_http = StreamsHTTP(InMemoryStreamManager())
    app = FastAPI(lifespan=streams_http.lifespan)

    async def answer() -> AsyncGenerator[str]:
        yield "begun"
        await anyio.sleep_forever()

    @app.api_route("/runs/{run}", methods=["GET", "POST", "DELETE"])
    async def run(request: Request, run: int, x_user: str = Header()) -> Response:
        match request.method:
            case "GET":
                return await streams_http.follow(request, run=run, owner=x_user)
            case "POST":
                return await streams_http.respond(request, answer(), run=run, owner=x_user, framing=SSEFraming())
            case _:
                return await streams_http.cancel(request, run=run, owner=x_user)

    async with http_to(app) as http:
        started, first = await begun(http, "/runs/1", headers=ANN)
        foreign = [await http.request(method, "/runs/1", headers=BOB) for method in ("GET", "DELETE")]
        stopped = await http.delete("/runs/1", headers=ANN)
        whole = await first.whole()
        again = await http.get("/runs/1", headers=ANN)  # it is shown also when it has ended
    assert [answer.status_code for answer in foreign] == [204, 404]
    assert stopped.json() == {"stopped": True}
    assert b'"status":"CANCELLED"' in whole
    assert without_lives(again.content) == whole
    assert again.headers[STREAM_ID] == started.headers[STREAM_ID]


@pytest.mark.parametrize("framing", [LangGraphFraming, AGUIFraming])
async def test_a_client_that_takes_no_204_is_told_in_its_own_way_that_nothing_is_left(framing: type[Framing]) -> None:
    streams_http = StreamsHTTP(InMemoryStreamManager())
    app = FastAPI(lifespan=streams_http.lifespan)

    async def answer() -> AsyncGenerator[object]:
        yield {"type": "RUN_FINISHED"}

    @app.api_route("/chats/{chat}", methods=["GET", "POST"])
    async def chat(request: Request, chat: str) -> Response:
        if request.method == "GET":
            return await streams_http.follow(request, key=chat, framing=framing())
        return await streams_http.respond(request, answer(), key=chat, framing=framing())

    @app.get("/streams/{stream}")
    async def show(request: Request, stream: str) -> Response:
        return await streams_http.follow(request, stream, framing=framing())

    async with http_to(app) as http:
        nothing = await http.get("/chats/c")
        started = await http.post("/chats/c")
        ended = await http.get("/chats/c")
        stream = started.headers[STREAM_ID]
        last = [line.removeprefix("id: ") for line in started.text.splitlines() if line.startswith("id: ")][-1]
        seen = await http.get(f"/streams/{stream}", headers={"Last-Event-ID": last})
        named = await http.post("/chats/c", headers={STREAM_ID: stream, "X-Genkit-Stream-Offset": "1"})
        other = await http.get("/chats/d", headers={"Last-Event-ID": last})
        unknown = await http.get("/streams/other")
    for empty in (nothing, ended, seen, named, other):
        assert (empty.status_code, empty.text) == (200, "")
        assert empty.headers["content-type"] == "text/event-stream"
    assert (unknown.status_code, unknown.json()["error"]["status"]) == (404, "NOT_FOUND")


async def test_what_names_no_stream_is_a_mistake_of_the_endpoints(caplog: pytest.LogCaptureFixture) -> None:
    chats = Chats()

    @chats.app.api_route("/wrong", methods=["GET", "DELETE"])
    async def wrong(request: Request) -> Response:
        return await (chats.http.follow if request.method == "GET" else chats.http.cancel)(request)

    async with http_to(chats.app) as http:
        for method in ("GET", "DELETE"):
            assert (await http.request(method, "/wrong")).status_code == 500
    assert caplog.text.count("TypeError: give a stream's id, a key, or both; or a run") == 2


async def test_one_route_finds_a_stream_by_its_id_and_else_by_its_key() -> None:
    streams_http = StreamsHTTP("memory://")
    app = FastAPI(lifespan=streams_http.lifespan)

    @app.get("/{name}")
    async def follow(request: Request, name: str) -> Response:
        return await streams_http.follow(request, name, key=name)

    @app.delete("/{name}")
    async def stop(request: Request, name: str) -> Response:
        return await streams_http.cancel(request, name, key=name)

    async with http_to(app) as http:
        nothing = [(await http.request(method, name)).status_code for method in ("GET", "DELETE") for name in ("/k", "/a b")]
        first = await streams_http.streams.open("s", key="a b")
        await first.write("one")
        stopped = await http.delete("/a b")
        ended_by_key, ended_by_id = await http.get("/a b"), await http.get("/s")
        rest = await http.get("/a b", headers={"Last-Event-ID": ended_by_id.text.partition("id: ")[2].partition("\n")[0]})
    assert nothing == [204, 204, 404, 404]
    assert stopped.json() == {"stopped": True}
    assert ended_by_key.status_code == 204
    assert ("one" in ended_by_id.text, "CANCELLED" in ended_by_id.text) == (True, True)
    assert ("one" in rest.text, "CANCELLED" in rest.text) == (False, True)


async def test_an_endpoint_inside_durable_streaming_runs_once_for_a_request_that_is_sent_twice() -> None:
    runs: list[int] = []
    go = anyio.Event()
    app = FastAPI()

    async def body() -> AsyncGenerator[bytes]:
        runs.append(1)
        yield b"data: 1\n\n"
        await go.wait()
        yield b"data: 2\n\n"

    @app.post("/")
    async def answer() -> StreamingResponse:
        return StreamingResponse(body(), media_type="text/event-stream")

    once = {"Idempotency-Key": "k"}
    async with http_to(DurableStreaming(app, InMemoryStreamManager())) as http:
        first, reading = await begun(http, "/", headers=once)
        second, again = await begun(http, "/", headers=once)
        go.set()
        assert await reading.whole() == await again.whole()
        ended = await http.post("/", headers=once)
        await http.post("/", headers={"Idempotency-Key": "another"})
    assert first.headers[STREAM_ID] == second.headers[STREAM_ID] == ended.headers[STREAM_ID]
    assert without_lives(ended.content) == reading.body
    assert len(runs) == 2


# What an endpoint's source may be

SSE_TEXT: Final = 'event: a\ndata: é\n\n: ping\n\ndata: {"n":1}\n\n'


@pytest.mark.parametrize("kind", ["async", "sync", "function", "bytes"])
async def test_text_of_server_sent_events_is_taken_with_the_framing_that_passes_it_on(kind: str) -> None:
    async def text() -> AsyncGenerator[str]:
        for character in SSE_TEXT:
            yield character

    async def raw() -> AsyncGenerator[bytes]:
        for byte in SSE_TEXT.encode():
            yield bytes([byte])

    sources: dict[str, Any] = {"async": text, "sync": lambda: iter(SSE_TEXT), "function": text, "bytes": raw}
    streams_http = StreamsHTTP(InMemoryStreamManager())
    app = FastAPI(lifespan=streams_http.lifespan)

    @app.post("/")
    async def start(request: Request) -> Response:
        source = sources[kind] if kind == "function" else sources[kind]()
        return await streams_http.respond(request, source, framing=PassThroughFraming())

    async with http_to(app) as http:
        answer = await http.post("/")
    assert without_lives(answer.content) == 'event: a\ndata: é\nid: 0\n\ndata: {"n":1}\nid: 1\n\n'.encode()


async def test_what_a_reader_does_is_nothing_that_a_producer_can_ask_for() -> None:
    """Tutorials have `if await request.is_disconnected(): break`, which would end the run with its first reader."""
    go = anyio.Event()
    bodies: list[object] = []
    streams_http = StreamsHTTP(InMemoryStreamManager())
    app = FastAPI(lifespan=streams_http.lifespan)

    async def chunks(request: Request) -> AsyncGenerator[int]:
        yield 0
        await go.wait()
        bodies.append(await request.json())
        for n in range(1, 20):
            if await request.is_disconnected():
                break
            yield n

    @app.post("/")
    async def start(request: Request) -> Response:
        return await streams_http.respond(request, chunks(request), id="s", framing=SSEFraming())

    async with http_to(app) as http:
        async with http.stream("POST", "/", json={"prompt": "hi"}) as answer:
            await Reading(answer).until(b"id: 0\n")
        go.set()
        await until_ended(streams_http.streams, "s")
        info = await streams_http.streams.info("s")
    assert (info.status, info.tail) == ("done", 21)
    assert bodies == [{"prompt": "hi"}]


async def until_ended(streams: StreamManager, stream: str) -> None:
    async with streams.subscribe(stream) as events:
        async for _ in events:
            pass


# From several processes


SERVER: Final = """
import sys, uvicorn
from fastapi import FastAPI, Request
from streamkeep import StreamManager
from streamkeep.http import StreamsHTTP
import anyio, os

serve = StreamsHTTP(StreamManager.connect(sys.argv[1]))
app = FastAPI(lifespan=serve.lifespan)

@app.post("/chat/{chat}")
async def ask(request: Request, chat: str):
    async def answer():
        yield os.getpid()
        await anyio.sleep(0.5)
        yield "end"
    return await serve.respond(request, answer(), key=chat, owner="ann")

@app.get("/chat/{chat}/stream")
async def follow(request: Request, chat: str):
    return await serve.follow(request, key=chat, owner="ann")

uvicorn.run(app, port=int(sys.argv[2]), log_level="error")
"""


async def test_starts_at_three_processes_are_one_run(tmp_path: Path, free_tcp_port_factory: Any) -> None:
    url, ports = f"sqlite:///{tmp_path}/streams.db", [free_tcp_port_factory() for _ in range(3)]
    processes = [subprocess.Popen([sys.executable, "-c", SERVER, url, str(port)]) for port in ports]  # noqa: ASYNC220
    try:
        async with httpx.AsyncClient(timeout=30) as http:
            for port in ports:
                await until_served(http, port)
            answers: list[httpx.Response] = []

            async def start(port: int) -> None:
                answers.append(await http.post(f"http://127.0.0.1:{port}/chat/c"))

            async with anyio.create_task_group() as starting:
                for port in ports * 3:
                    starting.start_soon(start, port)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert len({answer.content for answer in answers}) == 1
    assert len({answer.headers[STREAM_ID] for answer in answers}) == 1


async def until_served(http: httpx.AsyncClient, port: int) -> None:
    with anyio.fail_after(30):
        while True:
            try:
                await http.get(f"http://127.0.0.1:{port}/chat/none/stream")
            except httpx.TransportError:
                await anyio.sleep(0.05)
            else:
                return


async def test_who_is_signed_in_finds_streams_of_their_own_page_by_page_and_nobody_those_of_others() -> None:
    streams_http = StreamsHTTP(InMemoryStreamManager(), authorize=lambda access: access.headers.get("x-user"))
    async with http_to(streams_http, lifespan="off") as http, streams_http:
        for owner, key in (("ann", "chat/1"), ("ann", "chat/2"), ("ann", "draft"), ("bob", "chat/1"), ("", "chat/3")):
            stream = await streams_http.streams.open(f"{owner}-{key.replace('/', '-')}".lstrip("-"), owner=owner, key=key)
            await (stream.done() if key == "chat/2" else stream.close())
        everything = await http.get("/", headers=ANN)
        chats = [await http.get("/", params={"key": "chat/", "limit": 1}, headers=ANN)]
        while (after := chats[-1].json()["next"]) is not None:
            chats.append(await http.get("/", params={"key": "chat/", "limit": 1, "after": after}, headers=ANN))
        running = await http.get("/", params={"status": "open"}, headers=BOB)
        refused = [await http.get("/", params=bad, headers=ANN) for bad in ({"status": "x"}, {"limit": "0"}, {"limit": "1001"})]
        nobody = await http.get("/")
    assert {found["id"] for found in everything.json()["streams"]} == {"ann-chat-1", "ann-chat-2", "ann-draft"}
    assert [found["key"] for page in chats for found in page.json()["streams"]] == ["chat/1", "chat/2"]
    assert [found["id"] for found in running.json()["streams"]] == ["bob-chat-1"]
    assert [answer.status_code for answer in refused] == [400] * 3
    assert nobody.status_code == 404
    assert "metadata" not in everything.text
