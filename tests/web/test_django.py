"""`DjangoStreams` in views, by Django's own test clients; and Genkit flows."""

# pyright: reportMissingTypeStubs=false

import threading
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from contextvars import ContextVar
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import anyio.to_thread
import pytest
from asgiref.sync import sync_to_async
from django.contrib.auth import get_user_model
from django.contrib.auth.decorators import login_required
from django.core.exceptions import ImproperlyConfigured, PermissionDenied
from django.core.management import call_command
from django.db import connections
from django.http import HttpRequest, HttpResponse
from django.middleware.csrf import get_token
from django.test import AsyncClient, Client
from django.test.utils import override_settings
from django.urls import include, path
from django.views.decorators.csrf import csrf_exempt, csrf_protect
from django.views.decorators.gzip import gzip_page
from genkit import ActionRunContext
from tests.http.servers import STREAM_ID, STREAMING, flow_of, frames_of
from tests.inside import threads_of_ours
from tests.web import site
from tests.web.test_flask import BOUND_SECONDS, WORDS, Gate, awaited, messages, plain, until
from tests.web.words import CHECK_TOKEN

from streamkeep import StreamInput, StreamNotFoundError
from streamkeep.http import Access, Ended, SSEFraming, UIMessagesFraming
from streamkeep.integrations.django import DjangoStreams, durable_flow

site.configure()

GZIP: Final = "django.middleware.gzip.GZipMiddleware"
CSRF: Final = "django.middleware.csrf.CsrfViewMiddleware"
USERS: Final = [
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
]
language: Final = ContextVar[str]("language")


class URLs:
    """A URLconf."""

    def __init__(self) -> None:
        self.urlpatterns: list[Any] = []


@pytest.fixture
def streams() -> Iterator[DjangoStreams]:
    threads = threads_of_ours()
    with DjangoStreams("memory://") as streams:
        yield streams
    until(lambda: threads_of_ours() <= threads)


@pytest.fixture
def urls() -> Iterator[list[Any]]:
    """Give the site's URLs, to be added to."""
    urls = URLs()
    with override_settings(ROOT_URLCONF=urls):
        yield urls.urlpatterns


@pytest.fixture
def serve(urls: list[Any], streams: DjangoStreams) -> Callable[..., None]:
    """Serve a source under /chat/<chat> and, by views that await, /awaiting/<chat>; with what else `respond` is told."""

    def serve(source: Callable[[], Any], **options: Any) -> None:
        def chat(request: HttpRequest, chat: str) -> Any:
            match request.META["REQUEST_METHOD"]:
                case "POST":
                    return streams.respond(request, source(), key=chat, **options)
                case "GET":
                    return streams.follow(request, key=chat)
                case _:
                    return streams.cancel(request, key=chat)

        async def awaiting(request: HttpRequest, chat: str) -> Any:
            match request.META["REQUEST_METHOD"]:
                case "POST":
                    return await streams.arespond(request, source(), key=chat, **options)
                case "GET":
                    return await streams.afollow(request, key=chat)
                case _:
                    return await streams.acancel(request, key=chat)

        urls.extend([path("chat/<chat>", chat), path("awaiting/<chat>", awaiting)])

    return serve


@pytest.fixture(params=["chat", "awaiting"])
def root(request: pytest.FixtureRequest) -> str:
    """Give where the views are that do not await, and those that do."""
    return f"/{request.param}"


def client(**options: Any) -> Any:
    """Give Django's client, as type checkers do not know it."""
    return Client(**options)


def body_of(answer: Any) -> bytes:
    return b"".join(answer.streaming_content)


async def awaited_body_of(answer: Any) -> bytes:
    return b"".join([part async for part in answer.streaming_content])


def cursor_in(body: bytes) -> str:
    return body.decode().partition("\nid: ")[2].partition("\n")[0]


@pytest.mark.parametrize("source", [plain, awaited], ids=["generator", "async generator"])
def test_views_stream_under_wsgi(serve: Callable[..., None], root: str, source: Callable[[], Any]) -> None:
    serve(source, framing=SSEFraming())
    http = client()
    answer = http.post(f"{root}/c")
    body = body_of(answer)
    rest = http.get(f"{root}/c", headers={"Last-Event-ID": cursor_in(body)})
    assert body.count(b"event: chunk") == len(WORDS)
    assert body_of(rest).count(b"event: chunk") == len(WORDS) - 1
    assert http.get(f"{root}/c").status_code == 204
    assert http.delete(f"{root}/c").json() == {"stopped": False}
    assert http.delete(f"{root}/nobodys").status_code == 404


@pytest.mark.parametrize("source", [plain, awaited], ids=["generator", "async generator"])
async def test_views_stream_under_asgi(serve: Callable[..., None], root: str, source: Callable[[], Any]) -> None:
    serve(source, framing=SSEFraming())
    http = AsyncClient()
    answer: Any = await http.post(f"{root}/c")
    body = await awaited_body_of(answer)
    rest = await http.get(f"{root}/c", headers={"Last-Event-ID": cursor_in(body)})
    assert body.count(b"event: chunk") == len(WORDS)
    assert (await awaited_body_of(rest)).count(b"event: chunk") == len(WORDS) - 1
    assert (await http.get(f"{root}/c", query_params={"x": "1"})).status_code == 204
    assert (await http.delete(f"{root}/c")).json() == {"stopped": False}
    assert (answer.stream_id, answer.started) == (answer.headers[STREAM_ID], True)


def test_who_leaves_stops_nothing_and_two_run_at_a_time(serve: Callable[..., None], root: str) -> None:
    gate = Gate()
    serve(gate.words)
    http = client()
    left, stopped = http.post(f"{root}/a"), http.post(f"{root}/b")
    left.close()
    joined = http.post(f"{root}/a")
    assert http.delete(f"{root}/b").json() == {"stopped": True}
    gate.open.set()
    assert gate.passed.wait(BOUND_SECONDS)
    assert messages(body_of(joined)) == ["before", "behind"]
    assert b'"status":"CANCELLED"' in body_of(stopped)


async def test_a_view_that_awaits_is_told_not_to_block(urls: list[Any], streams: DjangoStreams) -> None:
    async def blocking(request: HttpRequest) -> Any:
        return streams.respond(request, plain())

    urls.append(path("", blocking))
    with pytest.raises(RuntimeError, match="arespond"):
        await AsyncClient().post("/")


def test_connections_of_a_producer_are_its_own_and_are_closed(serve: Callable[..., None]) -> None:
    used, over = list[Any](), threading.Semaphore(0)

    def query() -> None:
        with connections["default"].cursor() as cursor:
            cursor.execute("select 1")
        used.append(connections["default"])

    def in_thread() -> Generator[str]:
        query()
        yield "a"

    async def in_task() -> AsyncGenerator[str]:
        await sync_to_async(query)()
        yield "a"

    def on_end(_ended: Ended) -> None:
        query()
        over.release()

    chosen: list[Callable[[], Any]] = [in_thread, in_task]

    def source() -> Any:
        return chosen.pop()()

    serve(source, on_end=on_end)
    http = client()
    for chat in "ab":
        assert messages(body_of(http.post(f"/chat/{chat}"))) == ["a"]
        assert over.acquire(timeout=BOUND_SECONDS)
    mine = connections["default"]
    assert len(used) == 4
    assert mine not in used
    until(lambda: all(connection.connection is None for connection in used))


def query() -> Any:
    """Use the database, and give the connection."""
    with connections["default"].cursor() as cursor:
        cursor.execute("select 1")
    return connections["default"]


async def aquery() -> Any:
    return await sync_to_async(query)()


def test_what_awaits_on_behalf_of_a_request_closes_its_connections(urls: list[Any]) -> None:
    used = list[Any]()

    async def authorize(_access: Access) -> str:
        used.append(await aquery())
        return "ann"

    async def on_end(_ended: Ended) -> None:
        used.append(await aquery())

    with DjangoStreams("memory://", authorize=authorize, on_end=on_end) as streams:
        urls += [
            path("", lambda request: streams.respond(request, plain())),
            path("flow", durable_flow(flow_of(talk), streams)),
        ]
        assert body_of(client().post("/"))
        assert body_of(client().post("/flow", {"data": "Ada"}, "application/json", headers=STREAMING))
        until(lambda: len(used) == 4)
        until(lambda: all(connection.connection is None for connection in used))


def test_a_plain_on_end_of_a_flow_closes_its_connections(urls: list[Any]) -> None:
    used = list[Any]()
    with DjangoStreams("memory://", on_end=lambda _ended: used.append(query())) as streams:
        urls.append(path("flow", durable_flow(flow_of(talk), streams)))
        assert body_of(client().post("/flow", {"data": "Ada"}, "application/json", headers=STREAMING))
        until(lambda: used and used[0].connection is None)


@pytest.fixture(params=["views", "views that await"])
def asking(request: pytest.FixtureRequest, urls: list[Any]) -> Iterator[list[Any]]:
    """Give the connections of `authorize` and of the view, which is asked for /."""
    seen = list[Any]()

    def authorize(access: Access) -> str:
        seen.append(query())
        if access.request.headers.get("X-User") is None:
            raise PermissionDenied
        return str(access.request.headers["X-User"])

    with DjangoStreams("memory://", authorize=authorize) as streams:

        def ask(request: HttpRequest) -> Any:
            seen.append(query())
            return streams.respond(request, plain(), key="k")

        async def aask(request: HttpRequest) -> Any:
            seen.append(await aquery())
            return await streams.arespond(request, plain(), key="k")

        urls.append(path("", ask if request.param == "views" else aask))
        yield seen


def test_authorize_has_the_request_and_its_connection_and_rejects_by_djangos_own_means(asking: list[Any]) -> None:
    http = client()
    assert http.post("/", headers={"X-User": "ann"}).status_code == 200
    assert http.post("/").status_code == 403
    assert len(asking) == 4
    assert len({id(connection) for connection in asking}) == 1
    connections["default"].close()


async def test_authorize_has_the_request_and_its_connection_under_asgi(asking: list[Any]) -> None:
    http = AsyncClient()
    assert (await http.post("/", headers={"X-User": "ann"})).status_code == 200
    assert (await http.post("/")).status_code == 403
    assert len({id(connection) for connection in asking}) == 1
    await sync_to_async(connections.close_all)()


def test_a_view_may_be_atomic(serve: Callable[..., None], users: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    names = list[str]()

    def source() -> Generator[int]:
        yield len(names)
        names.append(get_user_model().objects.get(pk=users[0].pk).get_username())

    serve(source)
    connection = connections["default"]
    monkeypatch.setitem(connection.settings_dict, "ATOMIC_REQUESTS", True)
    for number in range(2):
        assert messages(body_of(client().post(f"/chat/{number}"))) == [number]
    assert names == ["ann"] * 2
    assert not connection.in_atomic_block
    connection.close()


async def test_the_newest_stream_of_a_key_can_be_asked_for(serve: Callable[..., None], streams: DjangoStreams) -> None:
    serve(plain)
    answer: Any = await AsyncClient().post("/awaiting/7")
    assert (await streams.acurrent(7)).id == answer.stream_id
    assert (await sync_to_async(streams.current)(7)).key == "7"
    with pytest.raises(RuntimeError, match="would block"):
        streams.current(7)
    with pytest.raises(StreamNotFoundError):
        await streams.acurrent(7, "somebody else")


async def test_a_storage_that_cannot_be_opened_is_a_503_and_the_next_request_tries_again(
    urls: list[Any], tmp_path: Path
) -> None:
    streams = DjangoStreams(f"sqlite:///{tmp_path}/later/streams.db")

    async def ask(request: HttpRequest) -> Any:
        return await streams.arespond(request, plain())

    urls.append(path("", ask))
    refused: Any = await AsyncClient().post("/")
    (tmp_path / "later").mkdir()
    assert (refused.status_code, refused.json()["error"]["status"]) == (503, "UNAVAILABLE")
    assert (await AsyncClient().post("/")).status_code == 200
    await sync_to_async(streams.close)()


def test_a_source_that_awaits_has_threads_that_outlive_the_request(serve: Callable[..., None], root: str) -> None:
    gate = threading.Event()

    async def source() -> AsyncGenerator[bool]:
        for _ in range(2):
            yield await sync_to_async(threading.get_ident)() != threading.get_ident()
            await anyio.to_thread.run_sync(gate.wait, BOUND_SECONDS)

    serve(source)
    answer = client().post(f"{root}/c")
    gate.set()
    assert messages(body_of(answer)) == [True, True]


def test_context_variables_are_as_in_the_view(urls: list[Any], streams: DjangoStreams) -> None:
    def ask(request: HttpRequest) -> Any:
        language.set("en")
        return streams.respond(request, (language.get() for _ in "a"))

    urls.append(path("", ask))
    assert messages(body_of(client().post("/"))) == ["en"]


@pytest.fixture(scope="session")
def users() -> tuple[Any, Any]:
    """Give two users in the site's database."""
    call_command("migrate", verbosity=0)
    create: Any = get_user_model().objects.create_user
    return create("ann"), create("bob")


def test_views_are_guarded_by_djangos_own_means(urls: list[Any], streams: DjangoStreams, users: tuple[Any, Any]) -> None:
    def chat(request: Any) -> Any:
        if request.method == "POST":
            return streams.respond(request, plain(), key="k", owner=request.user.pk, framing=SSEFraming())
        return streams.follow(request, key="k", owner=request.user.pk)

    urls.append(path("", login_required(chat)))
    ann, bob = client(), client()
    with override_settings(MIDDLEWARE=USERS):
        for http, user in zip((ann, bob), users, strict=True):
            http.force_login(user)
        seen = {"Last-Event-ID": cursor_in(body_of(ann.post("/")))}
        codes = [http.get("/", headers=seen).status_code for http in (ann, bob)]
        stranger = client().post("/")
    connections["default"].close()
    assert (codes, stranger.status_code) == ([200, 204], 302)


def test_csrf_is_djangos_affair(serve: Callable[..., None]) -> None:
    serve(plain)
    with override_settings(MIDDLEWARE=[CSRF]):
        assert client(enforce_csrf_checks=True).post("/chat/c").status_code == 403
        assert client().post("/chat/c").status_code == 200


def test_a_check_is_for_who_has_its_token_and_needs_no_csrf_token(urls: list[Any], streams: DjangoStreams) -> None:
    urls.append(path("check/", include((streams.check_urls(trust=CHECK_TOKEN), "check"))))
    trusted = {"Authorization": f"Bearer {CHECK_TOKEN}"}
    with override_settings(MIDDLEWARE=[CSRF]):
        http = client(enforce_csrf_checks=True)
        assert [http.get("/check/hello", headers=headers).status_code for headers in ({}, trusted)] == [401, 200]
        assert http.post("/check/streams?chunks=2&pause=0.01").status_code == 401
        assert body_of(http.post("/check/streams?chunks=2&pause=0.01", headers=trusted)).count(b"event: chunk") == 2
        assert http.put("/check/hello", headers=trusted).status_code == 405


def test_compression_holds_nothing_back(serve: Callable[..., None]) -> None:
    serve(plain)
    with override_settings(MIDDLEWARE=[GZIP]):
        answer = client().post("/chat/c", headers={"Accept-Encoding": "gzip"})
    assert messages(body_of(answer)) == [*WORDS]


def test_the_urls_read_any_stream_of_who_may(urls: list[Any]) -> None:
    def authorize(access: Access) -> str:
        return access.headers.get("x-user", "")

    with DjangoStreams("memory://", authorize=authorize) as streams:
        urls += [
            path("api/streams/", include((streams.urls, "streams"))),
            path("", lambda request: streams.respond(request, plain(), id="t")),
        ]
        http, mine = client(), {"X-User": "ann"}
        http.post("/", headers=mine)
        assert body_of(http.get("/api/streams/t", headers=mine)).count(b"event: chunk") == len(WORDS)
        assert http.get("/api/streams/t").status_code == 404
        assert [found["id"] for found in http.get("/api/streams/", headers=mine).json()["streams"]] == ["t"]
        assert http.delete("/api/streams/t", headers=mine).json() == {"stopped": False}
        assert http.put("/api/streams/t", headers=mine).status_code == 405


@pytest.mark.parametrize("middleware", [[], [CSRF]], ids=["without the middleware", "with it"])
def test_who_has_no_token_stops_nothing_by_the_urls(urls: list[Any], streams: DjangoStreams, middleware: list[str]) -> None:
    def page(request: HttpRequest) -> HttpResponse:
        return HttpResponse(get_token(request).encode())

    gate = Gate()
    urls += [
        path("streams/", include((streams.urls, "streams"))),
        path("page", csrf_protect(page)),
        path("", csrf_exempt(lambda request: streams.respond(request, gate.words(), id="s"))),
    ]
    with override_settings(MIDDLEWARE=middleware):
        http = client(enforce_csrf_checks=True)
        http.post("/")
        refused = [http.delete("/streams/s"), http.post("/streams/s/cancel")]
        read = http.get("/streams/s/info")
        stopped = http.delete("/streams/s", headers={"X-CSRFToken": http.get("/page").content.decode()})
    gate.open.set()
    assert [answer.status_code for answer in refused] == [403, 403]
    assert (read.json()["status"], stopped.json()) == ("open", {"stopped": True})


def test_the_url_may_be_a_setting() -> None:
    streams = DjangoStreams()
    with pytest.raises(ImproperlyConfigured, match="STREAMKEEP_URL"):
        streams.start()
    streams.close()
    with override_settings(STREAMKEEP_URL="memory://"), streams:
        assert streams._here().start().entered.http.is_running


# Genkit


async def talk(name: str, ctx: ActionRunContext) -> dict[str, object]:
    """Say some words, and who was asking."""
    for word in ("hello", name):
        ctx.send_chunk(word)
    return {"user": (ctx.context or {}).get("user")}


def test_a_flow_is_durable_by_one_line(urls: list[Any], streams: DjangoStreams) -> None:
    def context(request: Any) -> dict[str, object]:
        return {"user": request.headers["X-User"]}

    urls.append(path("talk", csrf_exempt(durable_flow(flow_of(talk), streams, context=context))))
    http, mine = client(), {"X-User": "ann"}
    answer = http.post("/talk", {"data": "Ada"}, "application/json", headers={**STREAMING, **mine})
    body = body_of(answer)
    named = {STREAM_ID: answer.headers[STREAM_ID]}
    assert frames_of(body)[-1]["result"] == {"user": "ann"}
    assert body_of(http.post("/talk", headers={**STREAMING, **named, **mine})) == body
    assert http.post("/talk", {"data": "Ada"}, "application/json", headers=mine).json() == {"result": {"user": "ann"}}
    assert http.delete("/talk", headers={**named, **mine}).json() == {"stopped": False}
    assert http.get("/talk").status_code == 405


def test_what_compresses_one_view_leaves_a_stream_alone(urls: list[Any], streams: DjangoStreams) -> None:
    urls.append(
        path("chat", gzip_page(csrf_exempt(lambda request: streams.respond(request, WORDS, framing=UIMessagesFraming()))))
    )
    answer: Any = Client().post("/chat", headers={"Accept-Encoding": "gzip"})
    assert answer["Content-Encoding"] == "identity"
    exposed = {name.strip().lower() for name in answer["Access-Control-Expose-Headers"].split(",")}
    assert exposed >= {"x-genkit-stream-id", "x-workflow-run-id", "x-resumable-stream-id"}
    assert b"".join(answer).count(b"text-delta") == len(WORDS)


def leaving(stream: StreamInput, word: str) -> Iterator[str]:
    """Say a word, and then wait until another process is to go on."""
    if stream.checkpoint is None:
        stream.write_soon(word, checkpoint="said")
        until(stream.cancelled.is_set)
    yield "last"


def test_what_a_process_leaves_another_one_makes_the_rest_of(tmp_path: Path, urls: list[Any]) -> None:
    url = f"sqlite:///{tmp_path}/streams.db"
    one, two = (DjangoStreams(url, drain=timedelta(0)) for _ in range(2))
    answer, again = (streams.recoverable("answer", backoff=timedelta(0))(leaving) for streams in (one, two))

    def ask(request: HttpRequest) -> Any:
        return one.respond(request, answer(word="first"), id="s", key="chat", framing=SSEFraming())

    def follow(request: HttpRequest) -> Any:
        return two.follow(request, "s")

    urls.extend([path("ask", ask), path("follow", follow)])
    with one:
        response = client().post("/ask")
        until(lambda: one.current("chat").tail == 1)
        response.close()
    with two:
        body = body_of(client().get("/follow")).decode()
    assert [line for line in body.splitlines() if line.startswith("data")] == [
        'data: "first"',
        'data: {"attempt":0}',
        'data: "last"',
        "data: null",
    ]
    assert again.name == "answer"


@pytest.mark.parametrize("middleware", [[], [CSRF]])
async def test_a_token_of_a_holder_whom_a_cookie_names_is_checked_for_csrf(urls: list[Any], middleware: list[str]) -> None:
    """Who has found it could have the holder's browser send it otherwise."""

    def page(request: HttpRequest) -> HttpResponse:
        return HttpResponse(get_token(request).encode())

    def who(access: Access) -> str:
        return access.cookies.get("user", "")

    with DjangoStreams("memory://", authorize=who, token_keys=["django-key-ZGphbmdvLTAxMjM0NTY3ODlhYmM"]) as streams:
        urls.append(path("streams/", include((streams.urls, "streams"))))
        urls.append(path("ask", csrf_exempt(lambda request: streams.respond(request, WORDS, id="s"))))
        urls.append(path("page", csrf_protect(page)))
        with override_settings(MIDDLEWARE=middleware):
            http: Any = AsyncClient(enforce_csrf_checks=True)
            http.cookies["user"] = "bob"
            await http.post("/ask")
            held = await streams.atoken("s", can="stop", expires_in=timedelta(minutes=1), holder="bob")
            forged = await http.post(f"/streams/s/cancel?token={held}")
            csrf = (await http.get("/page")).content.decode()
            sound = await http.post(f"/streams/s/cancel?token={held}", headers={"X-CSRFToken": csrf})
    assert (forged.status_code, sound.status_code) == (403, 200)


@pytest.mark.parametrize("middleware", [[], [CSRF]])
async def test_a_token_stops_by_the_urls_without_a_csrf_token_and_nothing_else_does(
    urls: list[Any], middleware: list[str]
) -> None:
    minute = timedelta(minutes=1)
    with DjangoStreams(
        "memory://", authorize=lambda _: "ann", token_keys=["django-key-ZGphbmdvLTAxMjM0NTY3ODlhYmM"]
    ) as streams:
        urls.append(path("streams/", include((streams.urls, "streams"))))
        urls.append(path("ask", csrf_exempt(lambda request: streams.respond(request, WORDS, id="s"))))
        with override_settings(MIDDLEWARE=middleware):
            http: Any = AsyncClient(enforce_csrf_checks=True)
            await http.post("/ask")
            stop = await streams.atoken("s", can="stop", expires_in=minute)
            read = await sync_to_async(streams.token)("s", can="read", expires_in=minute, owner="ann")
            codes = [
                (await http.post(f"/streams/s/cancel?{query}")).status_code
                for query in ("", "token=mine", "token=skt1.forged", f"token={read}", f"token={stop}")
            ]
            by_header = await http.delete("/streams/s", headers={"Authorization": f"Bearer {stop}"})
            shown = await http.get(f"/streams/s/info?token={read}")
        with override_settings(MIDDLEWARE=middleware), DjangoStreams("memory://") as without_keys:
            urls[:] = [path("streams/", include((without_keys.urls, "streams")))]
            unknown = await http.post(f"/streams/s/cancel?token={stop}")
    assert unknown.status_code == 403
    assert codes == [403, 403, 404, 404, 200]
    assert (by_header.status_code, shown.status_code) == (200, 200)
    assert shown["Referrer-Policy"] == "no-referrer"
