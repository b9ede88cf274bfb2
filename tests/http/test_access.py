"""Who may start, read, resume and stop what: to everybody else a stream does not exist."""

from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final
from uuid import UUID

import anyio
import httpx
import pytest
from fastapi import HTTPException
from genkit import ActionRunContext
from pydantic import SecretStr
from starlette.exceptions import HTTPException as StarletteHTTPException
from tests.http.servers import STREAM_ID, STREAMING, durable_app, http_to, wrapped_app
from werkzeug.local import LocalProxy

from streamkeep import InMemoryStreamManager
from streamkeep.errors import PublicError
from streamkeep.http import Access, StreamsHTTP

both: Final = pytest.mark.parametrize("app_of", [durable_app, wrapped_app], ids=["durable_flow", "DurableStreaming"])


class Door:
    """Lets in who says a name; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Access] = []

    async def __call__(self, access: Access) -> str:
        self.asked.append(access)
        if "authorization" not in access.headers:
            raise PublicError("UNAUTHENTICATED", "sign in")
        return access.headers["authorization"]


async def one(_: None, ctx: ActionRunContext) -> int:
    ctx.send_chunk("begun")
    return 1


async def two(_: None, ctx: ActionRunContext) -> int:
    ctx.send_chunk("begun")
    return 2


def by(name: str, stream: str = "") -> dict[str, str]:
    headers = {"Authorization": name} if name else {}
    return headers | STREAMING | ({STREAM_ID: stream} if stream else {})


@asynccontextmanager
async def guarded(app_of: Any, **options: Any) -> AsyncGenerator[tuple[httpx.AsyncClient, Door, str]]:
    """Give a client of a guarded app, the door, and the id of a stream that Ada has started through /one."""
    door = Door()
    streams_http = StreamsHTTP(InMemoryStreamManager(), authorize=door, **options)
    async with http_to(app_of(one, two, streams=streams_http)) as http:
        stream = (await http.post("/one", json={}, headers=by("Ada"))).headers[STREAM_ID]
        yield http, door, stream


async def answers(http: httpx.AsyncClient, name: str, stream: str, route: str = "/one") -> list[tuple[int, str]]:
    """Give code and body of all ways to get at a stream."""
    got = [await http.request(method, route, headers=by(name, stream)) for method in ("POST", "DELETE")]
    below = [("GET", ""), ("GET", "/info"), ("DELETE", ""), ("POST", "/cancel")]
    headers = {name: value for name, value in by(name).items() if name != "Accept"}
    got += [await http.request(method, f"/streams/{stream}{path}", headers=headers) for method, path in below]
    return [(answer.status_code, answer.text) for answer in got]


@both
async def test_an_owner_can_do_everything_with_a_stream(app_of: Any) -> None:
    async with guarded(app_of) as (http, _, stream):
        assert [code for code, _ in await answers(http, "Ada", stream)] == [200] * 6


@both
async def test_to_another_a_stream_does_not_exist_and_the_answers_are_those_of_an_unknown_id(app_of: Any) -> None:
    async with guarded(app_of) as (http, _, stream):
        refused = await answers(http, "Bob", stream)
        assert [code for code, _ in refused] == [204, 404, 404, 404, 404, 404]
        assert refused == await answers(http, "Bob", "unknown")
        assert refused == await answers(http, "Ada", "unknown")
        assert [code for code, _ in await answers(http, "Ada", stream)] == [200] * 6


@both
async def test_who_is_rejected_cannot_tell_which_ids_exist(app_of: Any) -> None:
    async with guarded(app_of) as (http, _, stream):
        rejected = await answers(http, "", stream)
        assert [code for code, _ in rejected] == [401] * 6
        assert all("UNAUTHENTICATED" in body and "sign in" in body for _, body in rejected)
        assert rejected == await answers(http, "", "unknown")


@both
async def test_a_start_is_rejected_before_anything_runs(app_of: Any) -> None:
    async with guarded(app_of) as (http, door, _):
        door.asked.clear()
        answer = await http.post("/one", json={}, headers=STREAMING)
        assert answer.status_code == 401
        assert answer.json() == {"error": {"status": "UNAUTHENTICATED", "message": "sign in", "details": None}}
        assert STREAM_ID not in answer.headers


async def test_an_answer_that_does_not_stream_is_guarded_too() -> None:
    async with guarded(durable_app) as (http, door, _):
        door.asked.clear()
        assert (await http.post("/one", json={})).status_code == 401
        assert (await http.post("/one", json={}, headers={"Authorization": "Ada"})).json() == {"result": 1}
    assert [access.action for access in door.asked] == ["start", "start"]


@both
async def test_a_stream_is_not_read_through_another_route(app_of: Any) -> None:
    async with guarded(app_of) as (http, _, stream):
        through_two = await answers(http, "Ada", stream, "/two")
        assert through_two[:2] == (await answers(http, "Ada", "unknown", "/two"))[:2]
        assert [code for code, _ in through_two[:2]] == [204, 404]
        assert (await http.post("/one", headers=by("Ada", stream))).status_code == 200


async def test_a_reading_app_may_be_for_one_route_only() -> None:
    streams = InMemoryStreamManager()
    door = Door()
    async with http_to(durable_app(one, two, streams=StreamsHTTP(streams, authorize=door, route="/one"))) as http:
        for path, code in (("/one", 200), ("/two", 404)):
            stream = (await http.post(path, json={}, headers=by("Ada"))).headers[STREAM_ID]
            assert (await http.get(f"/streams/{stream}", headers=by("Ada"))).status_code == code
            assert (await http.delete(f"/streams/{stream}", headers=by("Ada"))).status_code == code


async def test_authorize_is_told_what_is_asked_for() -> None:
    async with guarded(durable_app, route=None) as (http, door, stream):
        (start,) = door.asked
        assert (start.action, start.stream, start.scope["path"]) == ("start", None, "/one")
        door.asked.clear()
        await answers(http, "Ada", stream)
        assert [access.action for access in door.asked] == ["resume", "stop", "read", "read", "stop", "stop"]
        for access in door.asked:
            assert access.stream is not None
            assert (access.stream.id, access.stream.metadata) == (
                stream,
                {"route": "/one", "answer": "endpoint", "owner": "Ada"},
            )
        door.asked.clear()
        await answers(http, "Ada", "unknown")
        assert [access.stream for access in door.asked] == [None] * 6


async def test_authorize_is_given_the_frameworks_context_and_need_not_be_async() -> None:
    contexts: list[Mapping[str, Any]] = []

    def authorize(access: Access) -> str | None:
        contexts.append(access.context)
        name = access.context.get("name")
        return str(name) if name else None

    def context() -> dict[str, str]:
        return {"name": "Ada"}

    streams_http = StreamsHTTP(InMemoryStreamManager(), authorize=authorize)
    async with http_to(durable_app(one, streams=streams_http, context=context)) as http:
        stream = (await http.post("/one", json={}, headers=STREAMING)).headers[STREAM_ID]
        assert (await http.post("/one", headers={STREAM_ID: stream})).status_code == 200
        assert (await http.delete("/one", headers={STREAM_ID: stream})).status_code == 200
        # The reading app has no such context, and its reader is nobody.
        assert (await http.get(f"/streams/{stream}")).status_code == 404
    assert contexts == [{"name": "Ada"}] * 3 + [{}]


async def test_an_authorize_that_fails_lets_nobody_in_and_shows_nothing() -> None:
    fail = anyio.Event()

    def authorize(_: Access) -> None:
        if fail.is_set():
            raise KeyError("secret://db-password")

    streams_http = StreamsHTTP(InMemoryStreamManager(), authorize=authorize)
    async with http_to(durable_app(one, streams=streams_http)) as http:
        stream = (await http.post("/one", json={}, headers=STREAMING)).headers[STREAM_ID]
        fail.set()
        for code, body in await answers(http, "", stream):
            assert code == 500
            assert "secret" not in body


@pytest.mark.parametrize(
    "answer", [False, True, b"Ada", ["Ada"], object(), LocalProxy(object), LocalProxy(lambda: None), SecretStr("Ada")]
)
async def test_what_is_no_name_is_no_owner(answer: object) -> None:
    streams_http = StreamsHTTP(InMemoryStreamManager(), authorize=lambda _: answer)
    async with http_to(durable_app(one, streams=streams_http)) as http:
        assert (await http.post("/one", json={}, headers=STREAMING)).status_code == 500


async def test_without_authorize_whoever_knows_an_id_may() -> None:
    async with http_to(durable_app(one)) as http:
        stream = (await http.post("/one", json={}, headers=STREAMING)).headers[STREAM_ID]
        assert [code for code, _ in await answers(http, "", stream)] == [200] * 6


# As FastAPI's users write it


class RefusedError(Exception):
    """Not an HTTPException, although it has a code."""

    status_code = 418


@pytest.mark.parametrize(
    ("error", "code", "status"),
    [
        (HTTPException(401, "sign in first", {"WWW-Authenticate": "Bearer"}), 401, "UNAUTHENTICATED"),
        (StarletteHTTPException(403, "not yours"), 403, "PERMISSION_DENIED"),
        (HTTPException(402, {"plan": "free"}), 402, "UNKNOWN"),
        (RefusedError("secret"), 500, "INTERNAL"),
    ],
)
async def test_an_http_exception_of_authorize_means_what_it_says(error: Exception, code: int, status: str) -> None:
    def authorize(_: Access) -> str:
        raise error

    streams_http = StreamsHTTP(InMemoryStreamManager(), authorize=authorize)
    async with http_to(streams_http, lifespan="off") as http, streams_http:
        answer = await http.get("/s")
    assert (answer.status_code, answer.json()["error"]["status"]) == (code, status)
    detail = getattr(error, "detail", "internal")
    assert answer.json()["error"]["details" if isinstance(detail, dict) else "message"] == detail
    assert ("www-authenticate" in answer.headers) == (code == 401)


@pytest.mark.parametrize("user", [7, UUID("12345678-1234-5678-1234-567812345678")], ids=["int", "uuid"])
async def test_an_owner_is_the_text_of_whatever_names_it(user: object) -> None:
    streams_http = StreamsHTTP(InMemoryStreamManager(), authorize=lambda _: user)
    async with http_to(streams_http, lifespan="off") as http, streams_http:
        async with streams_http.streams.open("s", owner=str(user)) as stream:
            await stream.done()
        assert (await http.get("/s")).status_code == 200
        async with streams_http.streams.open("t", owner="8") as stream:
            await stream.done()
        assert (await http.get("/t")).status_code == 404


async def test_authorize_sees_what_a_browser_can_send() -> None:
    seen: list[tuple[dict[str, str], dict[str, str]]] = []

    def authorize(access: Access) -> str:
        seen.append((dict(access.cookies), dict(access.query)))
        return access.cookies.get("session") or access.query.get("token", "")

    streams_http = StreamsHTTP(InMemoryStreamManager(), authorize=authorize)
    async with http_to(streams_http, lifespan="off") as http, streams_http:
        async with streams_http.streams.open("s", owner="ann") as stream:
            await stream.done()
        by_cookie = await http.get("/s", headers={"Cookie": "a=1; session=ann; b"})
        by_query = await http.get("/s?token=ann")
        neither = await http.get("/s", headers={"Cookie": "session; =;;"})
    assert [answer.status_code for answer in (by_cookie, by_query, neither)] == [200, 200, 404]
    assert seen[1] == ({}, {"token": "ann"})
