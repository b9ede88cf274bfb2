"""`FlaskStreams` in views, by Flask's own test client; and Genkit flows."""

import gc
import io
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Mapping
from contextvars import ContextVar
from datetime import timedelta
from pathlib import Path
from typing import Any, Final
from weakref import ref

import anyio
import anyio.lowlevel
import pytest
from flask import Flask, Request, Response, abort, current_app, g, has_request_context, request, session
from flask.testing import FlaskClient
from genkit import ActionRunContext
from tests.http.servers import STREAM_ID, STREAMING, flow_of, frames_of
from tests.inside import threads_of_ours
from tests.web.words import CHECK_TOKEN

from streamkeep import (
    InvalidArgumentError,
    PublicError,
    StreamInput,
    StreamNotFoundError,
)
from streamkeep.http import Access, Ended, SSEFraming
from streamkeep.http.check import MAX_STREAMS
from streamkeep.integrations.flask import FlaskStreams, StreamResponse, durable_flow

BOUND_SECONDS: Final = 20
WORDS: Final = ("Nothing", "is", "lost")


class Gate:
    """Words that go on behind a gate."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.passed = threading.Event()

    def words(self) -> Generator[str]:
        yield "before"
        assert self.open.wait(BOUND_SECONDS)
        yield "behind"
        self.passed.set()


@pytest.fixture
def app() -> Flask:
    return Flask(__name__)


@pytest.fixture
def streams(app: Flask) -> Iterator[FlaskStreams]:
    threads = threads_of_ours()
    with FlaskStreams("memory://", app) as streams:
        yield streams
    until(lambda: threads_of_ours() <= threads)


@pytest.fixture
def http(app: Flask, streams: FlaskStreams) -> FlaskClient:
    return app.test_client()


@pytest.fixture
def serve(app: Flask, streams: FlaskStreams) -> Callable[..., None]:
    """Serve a source under /chat/<chat>, with what else `respond` is told."""

    def serve(source: Callable[[], Any], **options: Any) -> None:
        @app.post("/chat/<chat>")
        def ask(chat: str) -> Response:
            return streams.respond(source(), key=chat, **options)

        @app.get("/chat/<chat>")
        def follow(chat: str) -> Response:
            return streams.follow(key=chat)

        @app.delete("/chat/<chat>")
        def stop(chat: str) -> Response:
            return streams.cancel(key=chat)

    return serve


def until(condition: Callable[[], object]) -> None:
    give_up = time.monotonic() + BOUND_SECONDS
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.01)


def messages(body: bytes) -> list[object]:
    return [frame["message"] for frame in frames_of(body) if "message" in frame]


def cursor_of(answer: Any) -> str:
    """Give the cursor of the first event."""
    return str(answer.text.partition("\nid: ")[2].partition("\n")[0])


async def awaited() -> AsyncGenerator[str]:
    for word in WORDS:
        yield word


def plain() -> Generator[str]:
    yield from WORDS


def with_stream(stream: StreamInput) -> Generator[str]:
    assert stream.id
    yield from WORDS


SOURCES: Final[dict[str, Callable[[], Any]]] = {
    "list": lambda: WORDS,
    "generator": plain,
    "async generator": awaited,
    "function": lambda: plain,
    "async function": lambda: awaited,
    "function of the stream": lambda: with_stream,
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_any_source_is_a_stream(serve: Callable[..., None], http: FlaskClient, source: Callable[[], Any]) -> None:
    serve(source)
    answer = http.post("/chat/c")
    assert messages(answer.data) == [*WORDS]
    assert isinstance(answer, Response)
    assert answer.content_type == "text/event-stream"
    assert answer.headers[STREAM_ID]


def test_who_leaves_stops_nothing_and_comes_back_behind_a_cursor(serve: Callable[..., None], http: FlaskClient) -> None:
    gate = Gate()
    serve(gate.words, framing=SSEFraming())
    answer = http.post("/chat/c", buffered=False)
    seen = str(next(iter(answer.response)))
    answer.close()
    joined = http.post("/chat/c", buffered=False)
    gate.open.set()
    assert gate.passed.wait(BOUND_SECONDS)
    whole = joined.text
    rest = http.get("/chat/c", headers={"Last-Event-ID": whole.partition("\nid: ")[2].partition("\n")[0]})
    assert "retry:" in seen
    assert whole.count("event: chunk") == 2
    assert rest.text.count("event: chunk") == 1
    assert http.get("/chat/c").status_code == 204


def test_two_streams_run_at_a_time_and_each_is_stopped_alone(serve: Callable[..., None], http: FlaskClient) -> None:
    gate = Gate()
    serve(gate.words)
    first, second = (http.post(f"/chat/{chat}", buffered=False) for chat in "ab")
    assert http.delete("/chat/a").json == {"stopped": True}
    gate.open.set()
    assert b'"status":"CANCELLED"' in first.data
    assert messages(second.data) == ["before", "behind"]
    assert http.delete("/chat/b").json == {"stopped": False}
    assert http.delete("/chat/nobodys").status_code == 404


language: Final = ContextVar[str]("language")


def seen() -> list[object]:
    found: list[object] = [current_app.name, "name" in g, has_request_context(), language.get()]
    g.name = "the source's"
    return found


def in_thread() -> Generator[object]:
    yield seen()


async def in_task() -> AsyncGenerator[object]:
    yield seen()


@pytest.mark.parametrize("source", [in_thread, in_task], ids=lambda source: source.__name__)
def test_a_source_has_an_app_context_of_its_own_and_no_request(
    app: Flask, serve: Callable[..., None], http: FlaskClient, source: Callable[[], Any]
) -> None:
    torn_down = list[str]()

    @app.before_request
    def begin() -> None:
        g.name = "the request's"
        language.set("en")

    @app.teardown_appcontext
    def tear_down(_error: BaseException | None) -> None:
        torn_down.append(f"{g.get('name')} in {threading.current_thread().name.partition('-')[0]}")

    serve(source)
    answer = http.post("/chat/c")
    assert messages(answer.data) == [[app.name, False, False, "en"]]
    until(lambda: len(torn_down) == 2)
    assert any(name.startswith("the source's in streamkeep") for name in torn_down)


def test_a_plain_on_end_is_told_in_a_thread_with_the_app(serve: Callable[..., None], http: FlaskClient) -> None:
    told, came = list[tuple[str, str, bool]](), threading.Event()

    def on_end(ended: Ended) -> None:
        told.append((ended.status, current_app.name, "on_end" in threading.current_thread().name))
        came.set()

    serve(plain, on_end=on_end)
    http.post("/chat/c")
    assert came.wait(BOUND_SECONDS)
    assert told == [("done", __name__, True)]


def test_a_function_and_what_it_makes_have_one_app_context(app: Flask, streams: FlaskStreams, http: FlaskClient) -> None:
    torn_down = list[str]()

    @app.teardown_appcontext
    def tear_down(_error: BaseException | None) -> None:
        torn_down.append(g.get("name", "the request's"))

    def made() -> Iterator[str]:
        g.name = "the source's"
        return (f"{g.name} {word}" for word in ("a", "b") if "the source's" not in torn_down)

    async def awaited_made() -> object:
        g.name = "the source's"

        async def words() -> AsyncGenerator[str]:
            for word in ("a", "b"):
                yield f"{g.name} {word}"

        return words()

    sources = {"/made": made, "/awaited": awaited_made}
    for url in sources:
        app.add_url_rule(url, url, lambda: streams.respond(sources[request.path]), methods=["POST"])
    for url in sources:
        torn_down.clear()
        assert messages(http.post(url).data) == ["the source's a", "the source's b"]
        until(lambda: len(torn_down) == 2)


def test_an_on_end_that_awaits_has_an_app_context(app: Flask, serve: Callable[..., None], http: FlaskClient) -> None:
    told, torn_down = list[str](), list[str]()

    @app.teardown_appcontext
    def tear_down(_error: BaseException | None) -> None:
        torn_down.append(g.get("name", ""))

    async def on_end(ended: Ended) -> None:
        g.name = "the end's"
        told.append(f"{current_app.name} {await ended.chunks()}")

    serve(plain, on_end=on_end)
    http.post("/chat/c")
    until(lambda: "the end's" in torn_down)
    assert told == [f"{__name__} {[*WORDS]}"]


def test_a_plain_on_end_reads_what_was_produced(serve: Callable[..., None], http: FlaskClient) -> None:
    told = list[object]()
    serve(plain, on_end=lambda ended: told.append(ended.chunks_here()))
    http.post("/chat/c")
    until(lambda: told)
    assert told == [[*WORDS]]


def test_the_newest_stream_of_a_key_can_be_asked_for(app: Flask, streams: FlaskStreams, http: FlaskClient) -> None:
    app.add_url_rule("/", "ask", lambda: streams.respond(plain(), key=7, owner=42), methods=["POST"])
    answer = http.post("/")
    with app.app_context():
        found = streams.current(7, 42)
        with pytest.raises(StreamNotFoundError):
            streams.current(7, "somebody else")
    assert (found.id, found.key) == (answer.headers[STREAM_ID], "7")


def who_asks(access: Access) -> str | None:
    """Be an `authorize` that takes its time, and has all of the request."""
    assert isinstance(access.request, Request)
    g.asked.append((access.action, threading.get_ident()))
    if access.request.headers.get("X-User") == "mallory":
        abort(403, "not you")
    if request.headers.get("X-User") == "nobody":
        raise PublicError("UNAUTHENTICATED", "who are you?")
    return session.get("user")


async def who_asks_awaiting(access: Access) -> str | None:
    await anyio.lowlevel.checkpoint()
    return who_asks(access)


@pytest.mark.parametrize("authorize", [who_asks, who_asks_awaiting], ids=lambda authorize: authorize.__name__)
def test_authorize_has_the_request_and_rejects_by_flasks_own_means(app: Flask, authorize: Any) -> None:
    asked = list[tuple[str, int]]()
    app.secret_key = "-"

    @app.before_request
    def begin() -> None:
        g.asked = asked
        session["user"] = request.headers.get("X-User")

    with FlaskStreams("memory://", app, authorize=authorize) as streams:
        app.register_blueprint(streams.blueprint(), url_prefix="/streams")
        app.register_blueprint(durable_flow(flow_of(talk), streams))
        app.add_url_rule("/", "ask", lambda: streams.respond(plain(), id="s", key="k"), methods=["POST"])
        app.add_url_rule("/", "follow", lambda: streams.follow("s"))
        app.add_url_rule("/", "stop", lambda: streams.cancel("s"), methods=["DELETE"])
        http = app.test_client()
        codes = {
            user: [
                http.post("/", headers={"X-User": user}).status_code,
                http.get("/", headers={"X-User": user}).status_code,
                http.delete("/", headers={"X-User": user}).status_code,
                http.get("/streams/s", headers={"X-User": user}).status_code,
                http.post("/talk", json={"data": "a"}, headers={"X-User": user}).status_code,
            ]
            for user in ("ann", "bob", "mallory", "nobody")
        }
        refused = http.get("/streams/s", headers={"X-User": "mallory"})
    assert codes == {"ann": [200] * 5, "bob": [409, 204, 404, 404, 200], "mallory": [403] * 5, "nobody": [401] * 5}
    assert "not you" in refused.text
    assert {action for action, _ in asked} == {"start", "read", "resume", "stop"}
    if authorize is who_asks:
        assert {thread for _, thread in asked} == {threading.get_ident()}


def test_a_storage_that_cannot_be_opened_is_a_503_and_the_next_request_tries_again(
    app: Flask, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    closed = list[str]()

    class Source:
        def __iter__(self) -> Iterator[str]:
            return iter("a")

        def close(self) -> None:
            closed.append(threading.current_thread().name)

    streams = FlaskStreams(f"sqlite:///{tmp_path}/later/streams.db", app)
    app.register_blueprint(streams.blueprint(), url_prefix="/streams")
    app.add_url_rule("/", "ask", lambda: streams.respond(Source(), id="s"), methods=["POST"])
    http = app.test_client()
    refused = [http.post("/"), http.get("/streams/s")]
    assert len(closed) == 1
    (tmp_path / "later").mkdir()
    answer = http.post("/")
    assert answer.status_code == 200
    assert messages(answer.data) == ["a"]
    streams.close()
    assert [answer.status_code for answer in refused] == [503, 503]
    assert refused[0].json["error"]["status"] == "UNAVAILABLE"  # type: ignore[index]
    assert refused[0].headers["Cache-Control"] == "no-store"
    assert caplog.text.count("a request failed") == len(refused)


def test_views_are_guarded_by_flasks_own_means(app: Flask, streams: FlaskStreams, http: FlaskClient) -> None:
    @app.before_request
    def guard() -> None:
        if "X-User" not in request.headers:
            abort(401)

    @app.post("/")
    def ask() -> Response:
        return streams.respond(plain(), key="k", owner=request.headers["X-User"])

    @app.get("/")
    def follow() -> Response:
        return streams.follow(key="k", owner=request.headers["X-User"])

    assert http.post("/").status_code == 401
    cursor = {"Last-Event-ID": f"{http.post('/', headers={'X-User': 'ann'}).headers[STREAM_ID]}/00000000/0"}
    codes = [http.get("/", headers={"X-User": user, **cursor}).status_code for user in ("bob", "ann")]
    assert codes[0] == 204
    assert http.get("/", headers=cursor).status_code == 401


def test_headers_cookies_and_attributes_of_the_response_count(app: Flask, streams: FlaskStreams, http: FlaskClient) -> None:
    started: list[tuple[str | None, bool]] = []

    @app.post("/")
    def ask() -> StreamResponse:
        response = streams.respond(plain(), run="1")
        response.set_cookie("seen", "yes")
        response.headers["X-Mine"] = "mine"
        started.append((response.stream_id, response.started))
        return response

    answers = [http.post("/"), http.post("/")]
    assert [answer.headers["X-Mine"] for answer in answers] == ["mine", "mine"]
    assert "seen=yes" in answers[0].headers["Set-Cookie"]
    ids = [answer.headers[STREAM_ID] for answer in answers]
    assert started == [(ids[0], True), (ids[0], False)]


def test_what_is_refused_is_json(serve: Callable[..., None], http: FlaskClient) -> None:
    gate = Gate()
    serve(gate.words, when_running="refuse")
    http.post("/chat/c", buffered=False)
    refused = http.post("/chat/c")
    gate.open.set()
    assert (refused.status_code, refused.json["error"]["status"]) == (409, "ALREADY_EXISTS")  # type: ignore[index]


def test_a_get_starts_nothing(app: Flask, streams: FlaskStreams, http: FlaskClient) -> None:
    app.testing = True
    app.add_url_rule("/", "ask", lambda: streams.respond(plain()))
    with pytest.raises(RuntimeError, match="start it by POST"):
        http.get("/")


def test_a_failure_of_the_source_is_shown_as_far_as_it_is_public(serve: Callable[..., None], http: FlaskClient) -> None:
    def failing() -> Generator[str]:
        yield "a"
        raise PublicError("RESOURCE_EXHAUSTED", "no more words")

    serve(failing)
    assert b"no more words" in http.post("/chat/c").data


def test_the_blueprint_reads_any_stream_of_who_may(app: Flask) -> None:
    async def authorize(access: Access) -> str:
        return access.headers.get("x-user", "")

    with FlaskStreams("memory://", authorize=authorize) as streams:
        app.register_blueprint(streams.blueprint(), url_prefix="/api/streams")

        @app.post("/")
        def ask() -> Response:
            return streams.respond(plain(), id="s/1")

        @app.post("/t")
        def ask_t() -> Response:
            return streams.respond(plain(), id="t")

        http, mine = app.test_client(), {"X-User": "ann"}
        http.post("/t", headers=mine)
        read = http.get("/api/streams/t", headers=mine)
        assert read.text.count("event: chunk") == 3
        assert http.get("/api/streams/t").status_code == 404
        assert [found["id"] for found in http.get("/api/streams/", headers=mine).json["streams"]] == ["t"]  # type: ignore[index]
        assert http.get("/api/streams/t/info", headers=mine).json["status"] == "done"  # type: ignore[index]
        assert http.delete("/api/streams/t", headers=mine).json == {"stopped": False}
        assert http.put("/api/streams/t", headers=mine).status_code == 405


def test_each_app_has_streams_of_its_own_by_its_configuration(tmp_path: Path) -> None:
    streams = FlaskStreams()
    clients = []
    for name in "ab":
        app = Flask(name)
        app.config["STREAMKEEP_URL"] = f"sqlite:///{tmp_path}/{name}.db"
        streams.init_app(app)
        app.add_url_rule("/", "ask", lambda: streams.respond(plain(), id="s"), methods=["POST"])
        app.add_url_rule("/", "follow", lambda: streams.follow("s"))
        clients.append(app.test_client())
    assert messages(clients[0].post("/").data) == [*WORDS]
    assert clients[1].get("/").status_code == 204
    assert messages(clients[1].post("/").data) == [*WORDS]
    streams.close()
    assert clients[0].get("/").text.count("event: chunk") == 3  # it starts anew
    streams.close()


def test_one_with_a_url_of_its_own_keeps_to_it(app: Flask, streams: FlaskStreams, http: FlaskClient) -> None:
    with FlaskStreams("memory://") as others:
        app.add_url_rule("/ours", "ours", lambda: streams.respond(plain(), id="s"), methods=["POST"])
        app.add_url_rule("/others", "others", lambda: others.follow("s"))
        assert http.post("/ours").status_code == 200
        assert http.get("/others").status_code == 204


def test_an_app_without_streams_says_so(app: Flask) -> None:
    streams = FlaskStreams()
    app.testing = True
    app.add_url_rule("/", "follow", lambda: streams.follow("s"))
    with pytest.raises(RuntimeError, match="init_app"):
        app.test_client().get("/")
    with pytest.raises(KeyError):
        streams.init_app(app)


def test_a_url_that_cannot_be_is_told_at_once() -> None:
    with pytest.raises(InvalidArgumentError, match="nonsense"):
        FlaskStreams("nonsense://")


def test_threads_that_gevent_has_made_greenlets_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkey = type(sys)("gevent.monkey")
    monkey.is_module_patched = lambda name: name == "threading"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gevent.monkey", monkey)
    with pytest.raises(RuntimeError, match="gthread"):
        FlaskStreams("memory://")


def test_a_body_that_nobody_asked_for_is_not_read_and_a_long_one_is_refused(app: Flask) -> None:
    class Body(io.BytesIO):
        read_bytes = 0

        def read(self, size: int | None = -1, /) -> bytes:
            given = super().read(size)
            self.read_bytes += len(given)
            return given

    async def flow(data: str, _: ActionRunContext) -> str:
        return data

    with FlaskStreams("memory://", app, max_body_bytes=1 << 20) as streams:
        app.register_blueprint(streams.blueprint(), url_prefix="/streams")
        app.register_blueprint(durable_flow(flow_of(flow), streams))
        for path, code in (("/streams/x/cancel", 404), ("/flow", 413)):
            body = Body(bytes(4 << 20))
            answer = app.test_client().post(path, input_stream=body)
            assert answer.status_code == code
            assert body.read_bytes <= 1 << 20


# Genkit


async def talk(name: str, ctx: ActionRunContext) -> dict[str, object]:
    """Say some words, and who was asking."""
    for word in ("hello", name):
        ctx.send_chunk(word)
    return {"app": current_app.name, "user": (ctx.context or {}).get("user")}


def test_a_flow_is_durable_by_one_line(app: Flask, streams: FlaskStreams, http: FlaskClient) -> None:
    def context() -> Mapping[str, Any]:
        if "X-User" not in request.headers:
            abort(401)
        return {"user": request.headers["X-User"]}

    app.register_blueprint(durable_flow(flow_of(talk), streams, path="/talk", context=context))
    mine = {"X-User": "ann"}
    answer = http.post("/talk", json={"data": "Ada"}, headers={**STREAMING, **mine})
    assert frames_of(answer.data)[-1]["result"] == {"app": __name__, "user": "ann"}
    named = {STREAM_ID: answer.headers[STREAM_ID]}
    assert http.post("/talk", headers={**STREAMING, **named, **mine}).data == answer.data
    assert http.post("/talk", json={"data": "Ada"}, headers=mine).json == {"result": {"app": __name__, "user": "ann"}}
    assert http.post("/talk", data="{", headers=mine).status_code == 400
    assert http.delete("/talk", headers={**named, **mine}).json == {"stopped": False}
    assert http.delete("/talk", headers=named).status_code == 401


def test_a_plain_on_end_of_a_flow_does_not_block_the_event_loop(app: Flask) -> None:
    names, came = list[str](), threading.Event()

    def on_end(_ended: Ended) -> None:
        names.append(threading.current_thread().name)
        came.set()

    with FlaskStreams("memory://", on_end=on_end) as streams:
        app.register_blueprint(durable_flow(flow_of(talk), streams))
        assert app.test_client().post("/talk", json={"data": "Ada"}, headers=STREAMING).status_code == 200
        assert came.wait(BOUND_SECONDS)
    assert "on_end" in names[0]


def leaving(stream: StreamInput, word: str) -> Iterator[str]:
    """Say a word, and then wait until another process is to go on; there, say which app it is."""
    if stream.checkpoint is None:
        stream.write_soon(word, checkpoint="said")
        until(stream.cancelled.is_set)
    yield current_app.name


@pytest.mark.parametrize("is_of_app", [True, False])
def test_what_a_process_leaves_another_one_makes_the_rest_of_in_an_app_context(tmp_path: Path, *, is_of_app: bool) -> None:
    url = f"sqlite:///{tmp_path}/streams.db"
    served: list[FlaskStreams] = []
    apps = [Flask("one"), Flask("two")]
    for app in apps:
        app.config["STREAMKEEP_URL"] = url
        streams = FlaskStreams(None if is_of_app else url, drain=timedelta(0))
        if app.name == "one":
            streams.init_app(app)
        answer = streams.recoverable("answer", backoff=timedelta(0))(leaving)
        if app.name == "two":
            streams.init_app(app)
        served.append(streams)
        app.add_url_rule(
            "/ask",
            view_func=lambda streams=streams, answer=answer: streams.respond(
                answer(word="first"), id="s", framing=SSEFraming()
            ),
            methods=["POST"],
        )
    one, two = served
    with one:
        response = apps[0].test_client().post("/ask", buffered=False)
        assert response.status_code == 200
        until(lambda: tail_of(apps[0], one) == 1)
        response.close()
    with two, apps[1].test_request_context("/"):
        body = two.follow("s").get_data(as_text=True)
    assert [line for line in body.splitlines() if line.startswith("data")] == [
        'data: "first"',
        'data: {"attempt":0}',
        'data: "two"',
        "data: null",
    ]


def tail_of(app: Flask, streams: FlaskStreams) -> int:
    with app.app_context():
        loop = streams._here().start()
        return loop.call(loop.entered.http.streams.info, "s").tail


def test_an_app_is_not_kept_by_the_functions_that_go_on_in_it() -> None:
    streams, gone = FlaskStreams(), Flask("gone")
    streams.recoverable("before")(leaving)
    for app in (gone, Flask("newer")):
        app.config["STREAMKEEP_URL"] = "memory://"
        streams.init_app(app)
    streams.recoverable("behind")(leaving)
    is_there = ref(gone)
    del gone, app
    gc.collect()
    assert is_there() is None


def test_what_goes_on_with_streams_is_registered_once_and_before_it_would_be_too_late() -> None:
    def answer(question: str) -> Iterator[str]:
        yield question

    streams = FlaskStreams("memory://")
    streams.recoverable("one")(answer)
    with pytest.raises(InvalidArgumentError):
        streams.recoverable("one")(answer)
    with streams, pytest.raises(RuntimeError):
        streams.recoverable("two")(answer)
    streams.recoverable("two")(answer)
    with streams:
        pass


def test_a_token_reads_and_stops_by_the_blueprint_and_the_views(app: Flask) -> None:
    def authorize(_: Access) -> str:
        raise PublicError("UNAUTHENTICATED", "sign in")

    minute = timedelta(minutes=1)
    key = "flask-key-Zmxhc2stMDEyMzQ1Njc4OWFiY2RlZg"
    gate = Gate()
    with FlaskStreams("memory://", app, authorize=authorize, token_keys=[key]) as streams:
        app.register_blueprint(streams.blueprint(), url_prefix="/streams")
        app.add_url_rule("/", "ask", lambda: streams.respond(gate.words(), id="s", owner="ann"), methods=["POST"])
        app.add_url_rule("/", "follow", lambda: streams.follow("s"))
        app.add_url_rule("/", "stop", lambda: streams.cancel("s"), methods=["DELETE"])
        http = app.test_client()
        started = http.post("/")
        read = streams.token("s", can="read", expires_in=minute, owner="ann")
        stop = streams.token("s", can="stop", expires_in=minute)
        with pytest.raises(StreamNotFoundError):
            streams.token("s", can="stop", expires_in=minute, owner="bob")
        codes = [
            http.open(path, method=method, query_string={"token": token, "follow": "false"}).status_code
            for method, path in [
                ("GET", "/streams/s"),
                ("GET", "/streams/s/info"),
                ("DELETE", "/"),
                ("POST", "/streams/s/cancel"),
            ]
            for token in ("mine", stop, read)
        ]
        by_header = http.delete("/", headers={"Authorization": f"Bearer {stop}"})
        again = http.get("/", query_string={"token": read})
        gate.open.set()
        started.close()
        again.close()
    assert codes == [401, 404, 200, 401, 404, 200, 401, 200, 404, 401, 200, 404]
    assert by_header.json == {"stopped": False}
    assert (again.status_code, again.headers["Referrer-Policy"]) == (200, "no-referrer")


@pytest.mark.parametrize("streams", ["memory://", None])
def test_a_setting_that_is_none_is_told_before_the_first_request(streams: str | None) -> None:
    misspelled: Any = {"drian": timedelta(seconds=1)}
    with pytest.raises(TypeError, match="drian"):
        FlaskStreams(streams, **misspelled)


def test_a_check_is_for_who_has_its_token_and_for_its_own_streams(
    app: Flask, streams: FlaskStreams, serve: Callable[..., None]
) -> None:
    serve(lambda: iter("ab"))
    app.register_blueprint(streams.check_blueprint(trust=CHECK_TOKEN), url_prefix="/check")
    http = app.test_client()
    other = http.post("/chat/c").headers["X-Genkit-Stream-Id"]
    trusted = {"Authorization": f"Bearer {CHECK_TOKEN}"}
    assert [http.get("/check/hello", headers=headers).status_code for headers in ({}, trusted)] == [401, 200]
    assert http.get(f"/check/streams/{other}", headers=trusted).status_code == 404
    paces = "chunks=2&pause=60&bytes=10"
    answers = [http.post(f"/check/streams?{paces}", headers=trusted) for _ in range(MAX_STREAMS + 1)]
    assert [answer.status_code for answer in answers] == [200] * MAX_STREAMS + [429]  # of all requests together
    for answer in answers[:-1]:
        http.delete(f"/check/streams/{answer.headers['X-Genkit-Stream-Id']}", headers=trusted)
        answer.close()
    with pytest.raises(InvalidArgumentError, match="16 characters"):
        streams.check_blueprint(trust="short")


def test_a_weak_key_is_told_before_the_first_request() -> None:
    with pytest.raises(InvalidArgumentError, match="key of tokens"):
        FlaskStreams("memory://", token_keys=["weak"])
