"""StreamEventStore, asked by hand: what no client of good will asks."""

import json
import re
from collections.abc import AsyncGenerator
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
from starlette.routing import Mount
from tests.http.servers import http_to

from streamkeep import InMemoryStreamManager, Limits, StreamManager
from streamkeep.integrations.mcp import StreamEventStore

VERSION: Final = "2025-11-25"
HEADERS: Final = {"accept": "application/json, text/event-stream", "mcp-protocol-version": VERSION}
Messages = list[tuple[str, Any]]


class Tokens:
    """Knows the token of each user: the user's name."""

    async def verify_token(self, token: str) -> AccessToken | None:
        return AccessToken(token=token, client_id=token, scopes=[])


def server_with_tool(**options: Any) -> MCPServer:
    server = MCPServer("counting", **options)

    @server.tool()
    async def count(to: int, ctx: Context) -> str:
        for number in range(to):
            await ctx.report_progress(number, to, "x" * number)
        await ctx.session.send_tool_list_changed()
        if to < 0:
            await anyio.sleep_forever()
        return "counted"

    return server


@asynccontextmanager
async def served(
    streams: StreamManager | None = None, *, idle: timedelta = timedelta(minutes=30), **options: Any
) -> AsyncGenerator[httpx.AsyncClient]:
    events = StreamEventStore(streams or InMemoryStreamManager(), idle=idle)
    async with http_to(events.around(server_with_tool(**options).streamable_http_app(event_store=events))) as http:
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


async def count(http: httpx.AsyncClient, session: dict[str, str], *, id: object = 2, to: int = 2) -> Messages:
    params = {"name": "count", "arguments": {"to": to}, "_meta": {"progressToken": "p"}}
    call = {"jsonrpc": "2.0", "id": id, "method": "tools/call", "params": params}
    return messages_of((await http.post("/mcp", headers=session, json=call)).text)


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
    auth = AuthSettings(issuer_url=AnyHttpUrl("http://localhost:1"), resource_server_url=None)
    options: dict[str, Any] = {"auth": auth, "token_verifier": Tokens()}
    async with InMemoryStreamManager() as streams, served(streams, **options) as http, served(streams, **options) as other:
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
    async with InMemoryStreamManager() as streams, served(streams, idle=timedelta(0)) as http:
        session = await begin(http)
        await count(http, session)
        assert [info.status for info in await streams.list()].count("open") == 1  # what the server says by itself
        if how == "deleted":
            assert (await http.delete("/mcp", headers=session)).status_code == 200
        else:
            await begin(http)
        ended = [info.error for info in await streams.list() if info.status == "error"]
    assert ended == ["CANCELLED"]


async def test_the_app_can_be_mounted_in_another() -> None:
    server, events = server_with_tool(), StreamEventStore("memory://")
    app = events.around(server.streamable_http_app(event_store=events))

    @asynccontextmanager
    async def lifespan(_: object) -> AsyncGenerator[None]:
        async with events, server.session_manager.run():
            yield

    async with http_to(Starlette(routes=[Mount("/", app)], lifespan=lifespan)) as http:
        http.headers.update(HEADERS)
        session = await begin(http)
        told = await count(http, session)
        assert messages_of((await come_back(http, session, told[0][0])).text) == told[1:]
    assert not events.is_running


async def test_a_store_that_is_not_around_the_app_says_so() -> None:
    with pytest.raises(RuntimeError, match=r"serve `events.around\(app\)`"):
        await StreamEventStore("memory://").store_event("1", None)
