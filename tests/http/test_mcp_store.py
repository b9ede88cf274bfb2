"""StreamEventStore, asked by hand: what no client of good will asks."""

import json
import re
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any, Final

import anyio
import httpx
import pytest
from mcp.server.auth.provider import AccessToken
from mcp.server.auth.settings import AuthSettings
from mcp.server.mcpserver import Context, MCPServer
from pydantic import AnyHttpUrl
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from tests.clients.shown import shown_app
from tests.http.servers import Reading, http_to, until

from streamkeep import InMemoryStreamManager, Limits, StreamManager
from streamkeep.http import StreamsHTTP
from streamkeep.http.response import ASGIApp, Receive, Scope, Send
from streamkeep.integrations.mcp import StreamEventStore
from streamkeep.storages.memory import MemoryStorage
from streamkeep.testing.faults import FaultyStorage, Hold

VERSION: Final = "2025-11-25"
HEADERS: Final = {"accept": "application/json, text/event-stream", "mcp-protocol-version": VERSION}
Messages = list[tuple[str, Any]]


class Tokens:
    """Knows the token of each user: the user's name."""

    async def verify_token(self, token: str) -> AccessToken | None:
        return AccessToken(token=token, client_id=token, scopes=[])


def tokens() -> dict[str, Any]:
    """Give what has a server know the users of requests."""
    return {
        "auth": AuthSettings(issuer_url=AnyHttpUrl("http://localhost:1"), resource_server_url=None),
        "token_verifier": Tokens(),
    }


def server_with_tool(at: Callable[[int], object] = lambda _: None, **options: Any) -> MCPServer:
    server = MCPServer("counting", **options)

    @server.tool()
    async def count(to: int, ctx: Context) -> str:
        for number in range(abs(to)):
            at(number)
            await ctx.report_progress(number, to, "x" * number)
        await ctx.session.send_tool_list_changed()
        if to < 0:
            await anyio.sleep_forever()
        at(to)
        return "counted"

    @server.tool()
    async def note(sizes: list[int], ctx: Context) -> str:
        for number, size in enumerate(sizes):
            at(number)
            await ctx.session.send_resource_updated(f"x:///{number}" + "x" * size)
        return "noted"

    return server


def as_it_is(app: ASGIApp) -> ASGIApp:
    return app


def behind_a_copy(app: ASGIApp) -> ASGIApp:
    """Give an app with what copies the scope outside of it: who asks is not known there."""

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        await app(dict(scope), receive, send)

    return wrapped


@asynccontextmanager
async def served(
    streams: StreamManager | None = None,
    *,
    idle: timedelta = timedelta(minutes=30),
    drain: timedelta = timedelta(0),
    around: Callable[[ASGIApp], ASGIApp] = as_it_is,
    **options: Any,
) -> AsyncGenerator[httpx.AsyncClient]:
    events = StreamEventStore(streams or InMemoryStreamManager(), idle=idle, drain=drain)
    async with http_to(events.around(around(server_with_tool(**options).streamable_http_app(event_store=events)))) as http:
        http.headers.update(HEADERS)
        yield http


def messages_of(text: str) -> Messages:
    """Give the ids and the messages of an answer; None: a priming event."""
    return [
        (found[1] or "", json.loads(found[2]) if found[2].strip() else None)
        for found in re.finditer(r"(?:id: (\S*)\s+)?(?:event: message\s+)?data: ([^\n]*)\n", text.replace("\r", ""))
    ]


async def begin(http: httpx.AsyncClient, *, user: str = "") -> dict[str, str]:
    """Begin a session, and give the headers of its requests."""
    headers = {"authorization": f"Bearer {user}"} if user else {}
    params = {"protocolVersion": VERSION, "capabilities": {}, "clientInfo": {"name": "by hand", "version": "0"}}
    answer = await http.post(
        "/mcp", headers=headers, json={"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": params}
    )
    assert messages_of(answer.text)[0] == ("1/0", None)
    headers["mcp-session-id"] = answer.headers["mcp-session-id"]
    await http.post("/mcp", headers=headers, json={"jsonrpc": "2.0", "method": "notifications/initialized"})
    return headers


def a_call(tool: str, id: object = 2, **arguments: object) -> dict[str, object]:
    params = {"name": tool, "arguments": arguments, "_meta": {"progressToken": "p"}}
    return {"jsonrpc": "2.0", "id": id, "method": "tools/call", "params": params}


async def count(http: httpx.AsyncClient, session: dict[str, str], *, id: object = 2, to: int = 2) -> Messages:
    return messages_of((await http.post("/mcp", headers=session, json=a_call("count", id, to=to))).text)


async def is_cut(http: httpx.AsyncClient, session: dict[str, str], *, at: str, **arguments: object) -> None:
    """Call, and leave as soon as this has come."""
    async with http.stream("POST", "/mcp", headers=session, json=a_call("count", **arguments)) as answer:
        await Reading(answer).until(at.encode())


async def first_notes(http: httpx.AsyncClient, session: dict[str, str], last: str, count: int) -> Messages:
    """Give so many messages of what the server says by itself, after an id."""
    text = b""
    async with http.stream("GET", "/mcp", headers={**session, "last-event-id": last}) as answer:
        with anyio.fail_after(10):
            async for packet in answer.aiter_bytes():
                text += packet
                if text.count(b"data: {") == count and text.endswith(b"\n"):
                    break
    return messages_of(text.decode())


async def come_back(http: httpx.AsyncClient, session: dict[str, str], last: str) -> httpx.Response:
    with anyio.fail_after(10):
        return await http.get("/mcp", headers={**session, "last-event-id": last})


async def test_an_answer_is_given_again_from_each_of_its_ids_as_it_was() -> None:
    async with served() as http:
        session = await begin(http)
        told = await count(http, session)
        assert [id_ for id_, _ in told] == [f"2/{number}" for number in range(4)]
        for number, (last, _) in enumerate(told[:-1]):
            assert messages_of((await come_back(http, session, last)).text) == told[number + 1 :]
        assert (await come_back(http, session, "2/3")).text == ""
        (initialized,) = messages_of((await come_back(http, session, "1/0")).text)
        assert initialized[1]["result"]["serverInfo"]["name"] == "counting"


async def test_an_id_of_another_session_gives_nothing_of_it() -> None:
    async with served() as http:
        theirs, ours = await begin(http), await begin(http)
        told = await count(http, theirs)
        (only,) = messages_of((await come_back(http, ours, told[0][0])).text)
        assert only[1] == {
            "jsonrpc": "2.0",
            "id": 2,
            "error": {"code": -32603, "message": "NOT_FOUND: the answer is not kept any more"},
        }
        assert messages_of((await come_back(http, theirs, told[0][0])).text) == told[1:]


@pytest.mark.parametrize("last", ["2/99", "2/999999999999999", "3/0", "%00/0", "2%0D%0Aid/0"])
async def test_an_id_that_names_nothing_is_answered_with_an_error(last: str) -> None:
    async with served() as http:
        session = await begin(http)
        await count(http, session)
        (only,) = messages_of((await come_back(http, session, last)).text)
    assert only[1]["error"]["message"].startswith("NOT_FOUND")


@pytest.mark.parametrize("last", ["x", "2/-1", "2/01", "2/1/1", "/0", "2/9999999999999999999", "%/1x"])
async def test_what_is_no_id_gives_nothing(last: str) -> None:
    async with served() as http:
        session = await begin(http)
        await count(http, session)
        answer = await come_back(http, session, last)
    assert (answer.status_code, answer.text) == (200, "")


@pytest.mark.parametrize("id", ["\r\nid: 9/9\r\n", "_GET_stream/0", "\u2028", "a/b", "x" * 256])
async def test_a_requests_id_can_be_any_text(id: str) -> None:
    async with served() as http:
        session = await begin(http)
        told = await count(http, session, id=id)
        assert messages_of((await come_back(http, session, told[0][0])).text) == told[1:]
    assert told[-1][1]["id"] == id


async def test_a_request_whose_id_is_too_long_is_answered_without_ids() -> None:
    async with served() as http:
        told = await count(http, await begin(http), id="x" * 257)
    assert [id_ for id_, _ in told if id_] == []
    assert told[-1][1]["result"]["structuredContent"] == {"result": "counted"}


async def test_an_id_that_is_used_again_has_the_later_answer() -> None:
    async with served() as http:
        session = await begin(http)
        await count(http, session, to=5)
        told = await count(http, session, to=1)
        assert messages_of((await come_back(http, session, "2/0")).text) == told[1:]


async def test_what_the_server_says_by_itself_is_kept_too() -> None:
    async with served() as http:
        session = await begin(http)
        await count(http, session)
        await count(http, session, id=3)
        text = ""
        async with http.stream("GET", "/mcp", headers={**session, "last-event-id": "_GET_stream/0"}) as answer:
            with anyio.fail_after(10):
                async for line in answer.aiter_lines():
                    text += f"{line}\n"
                    if line.startswith("data: "):
                        break
    assert messages_of(text) == [("_GET_stream/1", {"jsonrpc": "2.0", "method": "notifications/tools/list_changed"})]


async def test_what_has_expired_is_answered_with_an_error() -> None:
    async with served(InMemoryStreamManager(ttl=timedelta(0))) as http:
        session = await begin(http)
        await count(http, session)
        (only,) = messages_of((await come_back(http, session, "2/0")).text)
    assert only[1]["error"]["message"].startswith("NOT_FOUND")


async def test_a_message_that_cannot_be_stored_is_sent_without_an_id_and_who_comes_back_is_told() -> None:
    async with StreamManager.connect("memory://", limits=Limits(max_event_bytes=300)) as streams, served(streams) as http:
        session = await begin(http)
        told = await count(http, session, to=400)
        assert told[-1][1]["result"]["structuredContent"] == {"result": "counted"}
        ids = [id_ for id_, _ in told if id_]
        again = messages_of((await come_back(http, session, "2/0")).text)
    assert len(told) == 402
    assert again[:-1] == told[1 : len(ids)]
    assert again[-1][1]["error"]["message"] == "INTERNAL: what came next could not be stored"


async def test_another_process_answers_who_comes_back_and_nobody_else() -> None:
    async with InMemoryStreamManager() as streams, served(streams, **tokens()) as http, served(streams, **tokens()) as other:
        ann = await begin(http, user="ann")
        told = await count(http, ann)
        assert messages_of((await come_back(other, ann, told[0][0])).text) == told[1:]
        bob = {**ann, "authorization": "Bearer bob"}
        nobody = {"mcp-session-id": ann["mcp-session-id"]}
        statuses = {
            "by bob": (await come_back(other, bob, told[0][0])).status_code,
            "by nobody": (await come_back(other, nobody, told[0][0])).status_code,
            "who has all": (await come_back(other, ann, told[-1][0])).status_code,
            "an id that is none": (await come_back(other, ann, "x")).status_code,
            "of no session": (await come_back(other, {**ann, "mcp-session-id": "x"}, told[0][0])).status_code,
            "at a path that is none": (await other.get("/", headers={**ann, "last-event-id": told[0][0]})).status_code,
        }
    assert statuses == {
        "by bob": 404,
        "by nobody": 401,
        "who has all": 404,
        "an id that is none": 404,
        "of no session": 404,
        "at a path that is none": 404,
    }


@pytest.mark.parametrize("how", ["deleted", "idle"])
async def test_a_session_that_ends_ends_its_streams(how: str) -> None:
    idle = timedelta(minutes=30) if how == "deleted" else timedelta(seconds=1)
    async with InMemoryStreamManager() as streams, served(streams, idle=idle) as http:
        session = await begin(http)
        await count(http, session)
        assert len(await streams.list()) == 3  # one is what the server says by itself
        if how == "deleted":
            assert (await http.delete("/mcp", headers=session)).status_code == 200
        with anyio.fail_after(20):
            while [info.error for info in await streams.list() if info.status == "error"] != ["CANCELLED"]:  # noqa: ASYNC110
                await anyio.sleep(0.01)


async def test_the_app_can_be_mounted_in_another() -> None:
    server, events = server_with_tool(), StreamEventStore("memory://")
    app = events.around(server.streamable_http_app(event_store=events))

    @asynccontextmanager
    async def lifespan(_: object) -> AsyncGenerator[None]:
        async with server.session_manager.run(), events:
            yield

    async with http_to(Starlette(routes=[Mount("/", app)], lifespan=lifespan)) as http:
        http.headers.update(HEADERS)
        session = await begin(http)
        told = await count(http, session)
        assert messages_of((await come_back(http, session, told[0][0])).text) == told[1:]
    assert not events.is_running


async def test_the_app_that_the_page_mounts_in_fastapi_answers_who_comes_back() -> None:
    app = shown_app("docs/how-to/mcp.md", StreamsHTTP("memory://"), block=1)
    async with http_to(app) as http:
        http.headers.update(HEADERS)
        session = await begin(http)
        (initialized,) = messages_of((await come_back(http, session, "1/0")).text)
        assert initialized[1]["result"]["serverInfo"]["name"] == "answers"


async def test_who_can_compute_a_streams_id_does_not_find_it_among_the_apps_streams() -> None:
    async with InMemoryStreamManager() as streams, served(streams) as http:
        await count(http, await begin(http))
        ids = [info.id for info in await streams.list()]
        assert len(ids) == 3
        async with http_to(StreamsHTTP(streams)) as reading:
            for stream in ids:
                assert (await reading.get(f"/{stream}")).status_code == 404
                assert (await reading.delete(f"/{stream}")).status_code == 404


async def test_a_store_that_is_not_around_the_app_says_so() -> None:
    with pytest.raises(RuntimeError, match=r"serve `events.around\(app\)`"):
        await StreamEventStore("memory://").store_event("1", None)


@pytest.mark.parametrize("around", [as_it_is, behind_a_copy])
async def test_a_session_is_its_users_alone(around: Callable[[ASGIApp], ASGIApp]) -> None:
    async with InMemoryStreamManager() as streams, served(streams, around=around, **tokens()) as http:
        ann = await begin(http, user="ann")
        told = await count(http, ann)
        await is_cut(http, ann, at="id: 3/1", id=3, to=-1)
        bob = {**ann, "authorization": "Bearer bob"}
        statuses = {
            "comes back": (await come_back(http, bob, told[0][0])).status_code,
            "to what runs": (await come_back(http, bob, "3/0")).status_code,
            "to what the server says by itself": (await come_back(http, bob, "_GET_stream/0")).status_code,
            "reads": (await http.get("/mcp", headers=bob)).status_code,
            "calls": (await http.post("/mcp", headers=bob, json=a_call("count", 9, to=1))).status_code,
            "repeats a call": (await http.post("/mcp", headers=bob, json=a_call("count", 3, to=1))).status_code,
            "ends": (await http.delete("/mcp", headers=bob)).status_code,
        }
        assert set(statuses.values()) == {404}, statuses
        assert [info.status for info in await streams.list()].count("open") == 2
        assert messages_of((await come_back(http, ann, told[0][0])).text) == told[1:]
        assert [id_ for id_, _ in await count(http, ann, id=4)] == [f"4/{number}" for number in range(4)]


async def test_what_the_app_answers_elsewhere_ends_no_session_and_gives_nothing_of_it() -> None:
    async def not_here(request: Request) -> Response:
        return JSONResponse({"detail": "Not Found"}, 204 if request.method == "DELETE" else 404)

    server, events = server_with_tool(), StreamEventStore("memory://", drain=timedelta(0))
    sdk = server.streamable_http_app(event_store=events)

    async def refused_by_us(scope: Scope, receive: Receive, send: Send) -> None:
        """The app knows by itself who may ask what, and says so as if nothing were there."""
        answering = sdk if b"refused" not in scope["query_string"] else JSONResponse({"detail": "Not Found"}, 404)
        await answering(scope, receive, send)

    @asynccontextmanager
    async def lifespan(_: object) -> AsyncGenerator[None]:
        async with server.session_manager.run(), events:
            yield

    everything = Route("/nothing", not_here, methods=["GET", "POST", "DELETE"])
    async with http_to(events.around(Starlette(routes=[everything, Mount("/", refused_by_us)], lifespan=lifespan))) as http:
        http.headers.update(HEADERS)
        session = await begin(http)
        told = await count(http, session)
        back = {**session, "last-event-id": told[0][0]}
        assert (await http.get("/nothing", headers=back)).json() == {"detail": "Not Found"}
        assert (await http.get("/mcp?refused", headers=back)).json() == {"detail": "Not Found"}
        assert (await http.post("/nothing", headers=session)).status_code == 404
        assert (await http.post("/mcp?refused", headers=session)).status_code == 404
        assert (await http.delete("/nothing", headers=session)).status_code == 204
        assert [id_ for id_, _ in await count(http, session, id=3)] == [f"3/{number}" for number in range(4)]


async def test_a_session_that_the_sdk_has_ended_ends_when_its_user_asks_for_it() -> None:
    async with InMemoryStreamManager() as streams:
        server, events = server_with_tool(), StreamEventStore(streams, drain=timedelta(0))
        app = events.around(server.streamable_http_app(event_store=events))
        server.session_manager.session_idle_timeout = 1
        async with http_to(app) as http:
            http.headers.update(HEADERS)
            session = await begin(http)
            await is_cut(http, session, at="id: 2/1", to=-1)
            await until(lambda: not server.session_manager._server_instances)
            assert "open" in {info.status for info in await streams.list()}  # what the server says by itself
            messages = messages_of((await come_back(http, session, "2/0")).text)
            assert [id_ for id_, _ in messages[:-1]] == ["2/1"]
            assert "error" in messages[-1][1]
            assert "open" not in {info.status for info in await streams.list()}


async def test_who_comes_back_for_what_the_server_said_by_itself_is_told_that_the_session_is_gone() -> None:
    async with InMemoryStreamManager() as streams, served(streams) as other:
        async with served(streams) as http:
            session = await begin(http)
            await count(http, session)
            await count(http, session, id=3)
        (note,) = messages_of((await come_back(other, session, "_GET_stream/0")).text)
        assert note[0] == "_GET_stream/1"
        assert (await come_back(other, session, "_GET_stream/1")).status_code == 404


async def test_what_the_server_says_by_itself_is_kept_again_behind_what_could_not_be_stored() -> None:
    async with StreamManager.connect("memory://", limits=Limits(max_event_bytes=300)) as streams, served(streams) as other:
        async with served(streams) as http:
            session = await begin(http)
            await http.post("/mcp", headers=session, json=a_call("note", sizes=[0, 0, 400, 400, 0, 0, 400]))
            told = [id_ for id_, _ in await first_notes(http, session, "_GET_stream/0", 3)]
        again = messages_of((await come_back(other, session, "_GET_stream/0")).text)
        assert [id_ for id_, _ in again] == told == ["_GET_stream/1", "_GET_stream:1/0", "_GET_stream:1/1"]
        assert [message["params"]["uri"] for _, message in again] == ["x:///1", "x:///4", "x:///5"]
        assert (await come_back(other, session, told[-1])).status_code == 404


@pytest.mark.parametrize("tool", ["count", "note"])
async def test_a_storage_that_fails_for_a_moment_loses_no_message(tool: str) -> None:
    storage = FaultyStorage(MemoryStorage())

    def at(number: int) -> None:
        storage.is_down = number in {2, 3, 5}

    async with StreamManager(storage) as streams, served(streams, at=at) as http:
        session = await begin(http)
        if tool == "count":
            told = await count(http, session, to=5)  # it has failed when the response is to be stored
            storage.is_down = False
            assert [id_ for id_, _ in told] == [f"2/{number}" for number in range(7)]
            again = messages_of((await come_back(http, session, "2/0")).text)
            assert again == told[1:]
        else:
            await http.post("/mcp", headers=session, json=a_call("note", sizes=[0] * 7))
            notes = await first_notes(http, session, "_GET_stream/0", 6)
            assert [id_ for id_, _ in notes] == [f"_GET_stream/{number}" for number in range(1, 7)]
            assert [message["params"]["uri"] for _, message in notes] == [f"x:///{number}" for number in range(1, 7)]


async def test_a_slow_storage_is_not_waited_for_with_each_message_and_who_comes_back_has_each_once() -> None:
    storage, held = FaultyStorage(MemoryStorage()), list[Hold]()

    def at(number: int) -> None:
        storage.is_down = number == 1
        if number == 2:
            held.append(storage.hold("commit"))

    async with StreamManager(storage) as streams, served(streams, at=at) as http:
        session = await begin(http)
        async with http.stream("POST", "/mcp", headers=session, json=a_call("count", to=20)) as answer:
            text = await Reading(answer).until(b"id: 2/20")
        assert {info.tail for info in await streams.list() if info.status == "open"} <= {0, 1, 2}
        told = messages_of(text.decode())
        held[0].release()
        again = messages_of((await come_back(http, session, "2/0")).text)
        assert again[:-1] == [*told[1:20], again[19]]
        assert [id_ for id_, _ in again] == [f"2/{number}" for number in range(1, 22)]
        assert messages_of((await come_back(http, session, "2/20")).text) == again[-1:]


@pytest.mark.parametrize("last", ["2/1", "2/2", "2/3", "2/9"])
async def test_who_comes_back_with_an_id_that_was_never_stored_is_told_how_the_answer_ended(last: str) -> None:
    async with InMemoryStreamManager() as streams, served(streams) as other:
        async with served(streams) as http:
            session = await begin(http)
            await is_cut(http, session, at="id: 2/2", to=-2)
        messages = messages_of((await come_back(other, session, last)).text)
    assert [id_ for id_, _ in messages] == (["2/2"] if last == "2/1" else []) + ["2/3"]
    assert messages[-1][1]["error"]["message"] == "ABORTED: the server was stopped before it had answered"


async def test_tools_may_end_before_the_store_is_left() -> None:
    stopping, streams = anyio.Event(), InMemoryStreamManager()
    server, events = MCPServer("slow"), StreamEventStore(streams)

    @server.tool()
    async def count(ctx: Context) -> str:
        await ctx.report_progress(0)
        await stopping.wait()
        return "counted"

    @asynccontextmanager
    async def lifespan(_: object) -> AsyncGenerator[None]:
        async with server.session_manager.run(), events:
            yield
            stopping.set()

    app = Starlette(routes=[Mount("/", events.around(server.streamable_http_app(event_store=events)))], lifespan=lifespan)
    async with streams:
        async with http_to(app) as http:
            http.headers.update(HEADERS)
            await is_cut(http, await begin(http), at="id: 2/1")
        assert [info.status for info in await streams.list()] == ["done", "done"]
