"""`respond` and `follow`: streams on an app's own routes, by the means that the app has already."""

import asyncio
import sys
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, closing, contextmanager
from contextvars import ContextVar
from datetime import timedelta
from functools import partial
from typing import Any, Final, cast

import anyio
import anyio.lowlevel
import httpx
import pytest
from fastapi import BackgroundTasks, Depends, FastAPI, Header, Request, Response
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.routing import Route
from tests.http.servers import STREAM_ID, Reading, events_of, frames_of, http_to, without_lives

from streamkeep import InMemoryStreamManager, Limits, StreamInput, StreamManager
from streamkeep.http import Access, PassThroughFraming, SSEFraming, StreamsHTTP
from streamkeep.http.response import Timeouts
from streamkeep.http.sources import Source, entered, producer_of
from streamkeep.http.starlette import ASGIResponse
from streamkeep.storages.memory import MemoryStorage

WHOLE: Final = [{"message": 0, "offset": 0}, {"message": 1, "offset": 1}, {"result": None, "offset": 2}]

Made = Callable[[], Source]


async def generated() -> AsyncGenerator[int, None]:
    for number in range(2):
        yield number


class SDKStream:
    """What Anthropic's and OpenAI's SDKs give: an async iterator with `close`, which is async, and no `aclose`."""

    def __init__(self) -> None:
        self._numbers = iter(range(2))
        self.is_closed = False

    def __aiter__(self) -> AsyncIterator[int]:
        return self

    async def __anext__(self) -> int:
        await anyio.lowlevel.checkpoint()
        try:
            return next(self._numbers)
        except StopIteration:
            raise StopAsyncIteration from None

    async def close(self) -> None:
        await anyio.lowlevel.checkpoint()
        self.is_closed = True


class SyncSDKStream:
    """The same for their synchronous clients."""

    def __init__(self) -> None:
        self._numbers = iter(range(2))
        self.is_closed = False
        self.thread = ""

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        self.thread = threading.current_thread().name
        return next(self._numbers)

    def close(self) -> None:
        self.is_closed = True


class Entered(AbstractAsyncContextManager[SDKStream]):
    """What SDKs' `.stream()` gives: it asks when it is entered, and closes its stream when it is left."""

    def __init__(self) -> None:
        self.streams: list[SDKStream] = []

    async def __aenter__(self) -> SDKStream:
        self.streams.append(await sdk_call())
        return self.streams[-1]

    async def __aexit__(self, *_: object) -> None:
        await self.streams[-1].close()


@contextmanager
def entered_without_awaiting() -> Generator[SyncSDKStream]:
    with closing(SyncSDKStream()) as stream:
        yield stream


def blocking() -> Iterator[int]:
    for number in range(2):
        time.sleep(0.01)
        yield number


async def sdk_call() -> SDKStream:
    await anyio.lowlevel.checkpoint()
    return SDKStream()


async def sdk_manager() -> Entered:
    await anyio.lowlevel.checkpoint()
    return Entered()


async def writing(stream: StreamInput) -> None:
    await stream.write(0)
    await stream.write(1)


SOURCES: Final[dict[str, Made]] = {
    "async generator": generated,
    "SDK's stream": SDKStream,
    "synchronous SDK's stream": SyncSDKStream,
    "generator": blocking,
    "list": lambda: [0, 1],
    "context manager": Entered,
    "context manager that does not await": entered_without_awaiting,
    "coroutine function that makes a context manager": lambda: sdk_manager,
    "function that makes a context manager that does not await": lambda: entered_without_awaiting,
    "function that makes an async generator": lambda: generated,
    "function that makes a generator": lambda: blocking,
    "coroutine function that asks an SDK": lambda: sdk_call,
    "function that writes": lambda: writing,
}


def app_of(streams_http: StreamsHTTP, respond: Callable[..., Awaitable[Response]]) -> FastAPI:
    app = FastAPI(lifespan=streams_http.lifespan)
    app.post("/chat")(respond)
    return app


@asynccontextmanager
async def chat(source: Made, streams: StreamManager | None = None, **options: Any) -> AsyncGenerator[httpx.AsyncClient]:
    """Serve an app whose `/chat` responds with a source."""
    streams_http = StreamsHTTP(streams or InMemoryStreamManager())

    async def respond(request: Request) -> Response:
        return await streams_http.respond(request, source(), **options)

    async with http_to(app_of(streams_http, respond)) as http:
        yield http


# What can be a stream


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
async def test_whatever_can_be_iterated_is_a_stream(source: Made) -> None:
    async with chat(source) as http:
        answer = await http.post("/chat")
        again = await http.post("/chat", headers={STREAM_ID: answer.headers[STREAM_ID]})
    assert frames_of(answer.content) == WHOLE
    assert again.content == answer.content


@pytest.mark.parametrize("make", [SDKStream, SyncSDKStream])
async def test_an_sdks_stream_is_closed_at_its_end_and_when_it_is_not_wanted(make: Callable[[], Any]) -> None:
    made: list[Any] = []

    def source() -> Source:
        made.append(make())
        sdk: Source = made[-1]
        return sdk

    async with chat(source) as http:
        answer = await http.post("/chat")
        await http.post("/chat", headers={STREAM_ID: answer.headers[STREAM_ID]})
    assert [sdk.is_closed for sdk in made] == [True, True]


async def test_a_context_manager_is_left_at_its_end_and_not_entered_when_it_is_not_wanted() -> None:
    made: list[Entered] = []

    def source() -> Source:
        made.append(Entered())
        return made[-1]

    async with chat(source) as http:
        answer = await http.post("/chat")
        await http.post("/chat", headers={STREAM_ID: answer.headers[STREAM_ID]})
    assert [[sdk.is_closed for sdk in manager.streams] for manager in made] == [[True], []]


async def test_what_a_context_manager_gives_is_closed_before_it_is_left() -> None:
    """A generator that is left open ends at some time, when it is collected."""
    left: list[str] = []

    async def words() -> AsyncGenerator[str]:
        try:
            while True:
                yield "word"
        finally:
            left.append("words")

    @asynccontextmanager
    async def connection() -> AsyncGenerator[AsyncGenerator[str]]:
        try:
            yield given
        finally:
            left.append("connection")

    given = words()
    async with aclosing(cast("AsyncGenerator[object]", entered(connection()))) as chunks:
        assert await anext(chunks) == "word"
    assert left == ["words", "connection"]


@pytest.mark.parametrize("source", [anyio.create_task_group, anyio.Lock, threading.Lock])
async def test_a_context_manager_that_gives_no_chunks_ends_its_stream_with_an_error(
    source: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async with chat(source) as http:
        answer = await http.post("/chat")
    assert frames_of(answer.content)[-1]["error"] == {"status": "INTERNAL", "message": "internal", "details": None}
    assert "entered, it gives no chunks" in caplog.text


class Unclosable(SDKStream):
    async def close(self) -> None:
        await super().close()
        raise OSError("the connection is closed already")


class SyncUnclosable(SyncSDKStream):
    def close(self) -> None:
        super().close()
        raise OSError("the connection is closed already")


@pytest.mark.parametrize("source", [Unclosable, SyncUnclosable])
async def test_a_source_that_cannot_be_closed_spoils_no_answer(source: Made, caplog: pytest.LogCaptureFixture) -> None:
    async with chat(source, id="a1") as http:
        answer = await http.post("/chat")
        again = await http.post("/chat", headers={STREAM_ID: "a1"})
        taken = await http.post("/chat")
    assert (frames_of(answer.content), again.content) == (WHOLE, answer.content)
    assert taken.status_code == 409
    assert "could not be closed" in caplog.text


async def test_a_source_is_closed_when_its_endpoint_is_cancelled_before_the_stream_is_open() -> None:
    async def authorize(_access: Access) -> str:
        await anyio.sleep_forever()
        return ""

    sdk = SDKStream()
    request = Request({"type": "http", "method": "POST", "headers": [], "path": "/chat"})
    async with StreamsHTTP(InMemoryStreamManager(), authorize=authorize) as streams_http:
        with anyio.move_on_after(0.1):
            await streams_http.respond(request, sdk)
    assert sdk.is_closed


async def test_who_sends_a_cursor_that_lies_beyond_the_end_is_told_so_in_an_event_stream() -> None:
    """Such as after a storage was restored: clients like fetch-event-source repeat their request until they get one."""
    async with chat(lambda: iter([0]), framing=SSEFraming()) as http:
        last = (await http.post("/chat")).text.splitlines()[3].removeprefix("id: ")
        answer = await http.post("/chat", headers={"Last-Event-ID": f"{last}99"})
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/event-stream")
    assert answer.text.startswith('event: error\ndata: {"status":"OUT_OF_RANGE"')


async def test_what_blocks_runs_in_a_thread_with_the_context_of_its_request() -> None:
    user = ContextVar[str]("user")
    seen: list[tuple[str, bool]] = []

    def source() -> Source:
        user.set("Ada")

        def blocking() -> Iterator[int]:
            seen.append((user.get(), threading.current_thread() is threading.main_thread()))
            yield 0

        return blocking()

    async with chat(source) as http:
        await http.post("/chat")
    assert seen == [("Ada", False)]


async def test_a_generator_that_notices_a_stop_by_itself_has_time_to_save() -> None:
    saved = anyio.Event()

    async def talks() -> AsyncGenerator[int]:
        try:
            while True:
                yield 0
                await anyio.sleep(0.01)
        finally:
            await anyio.sleep(1.5)  # longer than the second that all have
            saved.set()

    streams = InMemoryStreamManager()
    async with chat(talks, streams) as http, http.stream("POST", "/chat") as answer:
        await streams.cancel(answer.headers[STREAM_ID])
        with anyio.fail_after(20):
            await saved.wait()


async def test_what_would_end_a_program_ends_its_producer_only_where_it_runs_in_a_thread() -> None:
    def quits() -> Iterator[int]:
        yield 0
        sys.exit(1)

    async with chat(quits) as http:
        *_, last = frames_of((await http.post("/chat")).content)
    assert last["error"]["status"] == "INTERNAL"  # type: ignore[index]


async def test_a_plain_function_is_called_in_a_thread_for_it_may_block() -> None:
    threads: list[bool] = []

    def client_create() -> Iterator[int]:  # as a synchronous client's, which waits for the head of its answer
        threads.append(threading.current_thread() is threading.main_thread())
        return iter([0, 1])

    async with chat(lambda: client_create) as http:
        answer = await http.post("/chat")
    assert (threads, frames_of(answer.content)) == ([False], WHOLE)


async def test_a_thread_that_is_faster_than_the_storage_waits_for_it() -> None:
    async with chat(lambda: iter(range(30_000))) as http:
        answer = await http.post("/chat")
    assert len(frames_of(answer.content)) == 30_001


async def test_a_thread_waits_although_the_queue_is_shorter_than_what_it_may_be_ahead() -> None:
    streams = StreamManager(MemoryStorage(), limits=Limits(max_queued_events=2, max_events=500))
    async with chat(lambda: iter(range(500)), streams) as http:
        answer = await http.post("/chat")
    assert frames_of(answer.content)[-1] == {"result": None, "offset": 500}
    async with chat(lambda: iter(range(501)), streams) as http:
        answer = await http.post("/chat")
    assert frames_of(answer.content)[-1]["error"]["status"] == "RESOURCE_EXHAUSTED"  # type: ignore[index]


async def test_a_slow_storage_with_a_short_queue_holds_a_producer_up_and_does_not_end_it() -> None:
    class Slow(MemoryStorage):
        async def commit(self, *args: Any, **options: Any) -> Any:
            await anyio.sleep(0.02)
            return await super().commit(*args, **options)

    async def numbers() -> AsyncGenerator[int, None]:
        for number in range(50):
            yield number

    async with chat(numbers, StreamManager(Slow(), limits=Limits(max_queued_events=5))) as http:
        answer = await http.post("/chat")
    assert frames_of(answer.content)[-1] == {"result": None, "offset": 50}


async def test_a_generator_in_a_thread_that_fails_ends_its_stream() -> None:
    def failing() -> Iterator[int]:
        yield 0
        raise ValueError("secret")

    async with chat(failing) as http:
        answer = await http.post("/chat")
    assert [frame.get("error") for frame in frames_of(answer.content)][1] == {
        "status": "INTERNAL",
        "message": "internal",
        "details": None,
    }
    assert "secret" not in answer.text


async def test_a_thread_that_waits_for_ever_holds_up_neither_a_stop_nor_the_end(caplog: pytest.LogCaptureFixture) -> None:
    streams = InMemoryStreamManager()
    go_on = threading.Event()

    def waiting() -> Iterator[int]:
        yield 0
        go_on.wait(30)
        yield 1

    async with chat(waiting, streams) as http:
        async with http.stream("POST", "/chat") as answer:
            await Reading(answer).until()
        stream = answer.headers[STREAM_ID]
        with anyio.fail_after(10):
            await streams.cancel(stream)
            async with http.stream("POST", "/chat") as answer:  # and one more runs when all ends
                await Reading(answer).until()
            await streams.cancel(answer.headers[STREAM_ID])
    go_on.set()
    assert "Traceback" not in caplog.text


class Answer(BaseModel):
    text: str = "yes"


NO_SOURCES: Final[Sequence[tuple[Callable[[], Any], str]]] = [
    (lambda: "text", "not of a str"),
    (lambda: b"bytes", "not of a bytes"),
    (lambda: {"a": 1}, "not of a dict"),
    (lambda: None, "not of a NoneType"),
    (lambda: 7, "not of a int"),
    (sdk_call, "await it first"),
    (asyncio.Future, "not of a Future: await it first"),
    (Answer, "not of a Answer"),
    (lambda: SDKStream, "not of a type"),
    (lambda: lambda _a, _b: [], "takes one argument, the stream, or none"),
    (lambda: lambda *, _session: [], "that makes a stream.s chunks takes one argument"),
    (lambda: partial(lambda _question, _stream: [], _question="why?"), "takes one argument, the stream"),
]


@pytest.mark.parametrize(("make", "sentence"), NO_SOURCES)
async def test_what_cannot_be_a_stream_is_a_type_error_at_the_call(make: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(TypeError, match=sentence):
        producer_of(make())


# What a function may do


async def test_a_function_gets_the_stream_and_gives_its_result() -> None:
    ids: list[str] = []

    async def answer(stream: StreamInput) -> AsyncGenerator[str, None]:
        ids.append(stream.id)
        yield "a"
        await stream.done({"tokens": 1})

    async def returning(stream: StreamInput) -> list[str]:
        await stream.write("a")
        return ["whole"]

    async with chat(lambda: answer, id="answer-1") as http:
        yielded = await http.post("/chat")
    async with chat(lambda: returning) as http:
        returned = await http.post("/chat")
    assert (ids, yielded.headers[STREAM_ID]) == (["answer-1"], "answer-1")
    assert frames_of(yielded.content)[-1] == {"result": {"tokens": 1}, "offset": 1}
    assert frames_of(returned.content)[-1] == {"result": ["whole"], "offset": 1}


@pytest.mark.parametrize(
    ("chunk", "framing"), [("a", None), ("data: a\n\n", PassThroughFraming())], ids=["chunks", "server-sent events"]
)
async def test_what_a_generator_returns_that_does_not_await_is_the_result(
    chunk: str, framing: PassThroughFraming | None
) -> None:
    def answer() -> Generator[str, None, dict[str, int]]:
        yield chunk
        return {"tokens": 1}

    async def ask(request: Request) -> Response:
        source = answer if request.query_params else answer()
        return await streams_http.respond(request, source, framing=framing)

    async with StreamsHTTP(InMemoryStreamManager()) as streams_http:
        async with http_to(Starlette(routes=[Route("/", ask, methods=["POST"])])) as http:
            streams = [(await http.post(path)).headers[STREAM_ID] for path in ("/", "/?function")]
        for stream in streams:
            async with streams_http.streams.subscribe(stream) as events:
                *_, end = [event async for event in events]
            assert end.output == {"tokens": 1}


async def test_what_a_function_opens_lives_as_long_as_the_stream() -> None:
    events: list[str] = []

    @asynccontextmanager
    async def session() -> AsyncGenerator[str, None]:
        events.append("opened")
        yield "rows"
        events.append("closed")

    async def answer() -> AsyncGenerator[str, None]:
        async with session() as rows:
            yield rows
            await anyio.sleep(0.2)
            events.append("used")
            yield rows

    streams = InMemoryStreamManager()
    async with chat(lambda: answer, streams) as http:
        async with http.stream("POST", "/chat") as response:
            await Reading(response).until()
        assert events == ["opened"]
        with anyio.fail_after(10):
            assert [data for _, data in await events_of(streams, response.headers[STREAM_ID])] == ["rows", "rows", None]
    assert events == ["opened", "used", "closed"]


# What the endpoint knows and says


async def test_the_endpoint_names_the_stream_and_says_whose_it_is_and_how_long_it_lives() -> None:
    streams = InMemoryStreamManager()
    async with chat(
        generated, streams, id="a1", owner=7, metadata={"chat": "c", "owner": "mallory"}, ttl=timedelta(seconds=50)
    ) as http:
        await http.post("/chat")
        info = await streams.info("a1")
        refused = await http.post("/chat")
    assert info.metadata == {"chat": "c", "owner": "7", "route": "/chat", "answer": "endpoint"}
    assert info.expires_at - info.updated_at == pytest.approx(50, abs=1)
    assert (refused.status_code, refused.json()["error"]["status"]) == (409, "ALREADY_EXISTS")


async def test_the_endpoint_knows_the_id_and_its_headers_cookies_and_background_tasks_count() -> None:
    streams_http = StreamsHTTP(InMemoryStreamManager())
    known: list[str | None] = []
    ran = anyio.Event()

    async def respond(request: Request, tasks: BackgroundTasks) -> ASGIResponse:
        tasks.add_task(ran.set)
        response = await streams_http.respond(request, generated())
        known.append(response.stream)
        response.headers["X-Chat"] = "c1"
        response.headers["Cache-Control"] = "no-store"
        response.set_cookie("last", str(response.stream))
        response.status_code = 201
        return response

    async with http_to(app_of(streams_http, respond)) as http:
        answer = await http.post("/chat")
        with anyio.fail_after(5):
            await ran.wait()
    assert known == [answer.headers[STREAM_ID]]
    assert (answer.status_code, answer.headers["x-chat"]) == (201, "c1")
    assert answer.headers.get_list("cache-control") == ["no-store"]
    assert answer.cookies["last"] == known[0]
    assert frames_of(answer.content) == WHOLE


async def test_a_background_task_of_the_response_itself_runs_when_it_has_ended() -> None:
    streams_http = StreamsHTTP(InMemoryStreamManager())
    ran = anyio.Event()

    async def respond(request: Request) -> Response:
        response = await streams_http.respond(request, generated())
        response.background = BackgroundTask(ran.set)
        return response

    async with http_to(app_of(streams_http, respond)) as http:
        await http.post("/chat")
        with anyio.fail_after(5):
            await ran.wait()


async def test_respond_by_get_is_refused_in_words(caplog: pytest.LogCaptureFixture) -> None:
    streams_http = StreamsHTTP(InMemoryStreamManager())
    app = FastAPI(lifespan=streams_http.lifespan)

    @app.get("/chat")
    async def chat(request: Request) -> Response:
        return await streams_http.respond(request, generated())

    async with http_to(app) as http:
        answer = await http.get("/chat")
    assert answer.status_code == 500
    assert "start it by POST, and follow() it by GET" in caplog.text


# Following


def following(streams_http: StreamsHTTP) -> FastAPI:
    """Give an app that starts and shows streams for who is signed in, by means of its own."""
    app = FastAPI(lifespan=streams_http.lifespan)

    def current_user(x_user: str = Header()) -> str:
        return x_user

    @app.post("/chat/{chat}")
    async def start(request: Request, chat: str, user: str = Depends(current_user)) -> Response:
        return await streams_http.respond(request, generated(), id=chat, owner=user, framing=SSEFraming())

    @app.get("/chat/{chat}/stream")
    async def follow(request: Request, chat: str, user: str = Depends(current_user)) -> Response:
        response = await streams_http.follow(request, chat, owner=user)
        response.headers["X-Shown"] = str(response.stream)
        return response

    return app


async def test_a_stream_is_followed_on_a_route_of_the_apps_own_by_whom_it_belongs_to() -> None:
    async with http_to(following(StreamsHTTP(InMemoryStreamManager()))) as http:
        ada, eve = {"X-User": "ada"}, {"X-User": "eve"}
        started = await http.post("/chat/c1", headers=ada)
        shown = await http.get("/chat/c1/stream", headers=ada)
        rest = await http.get("/chat/c1/stream", headers={**ada, "Last-Event-ID": "0"})
        by_query = await http.get("/chat/c1/stream?after=0", headers=ada)
        nothing_left = await http.get("/chat/c1/stream", headers={**ada, "Last-Event-ID": "2"})
        foreign = await http.get("/chat/c1/stream", headers=eve)
        unknown = await http.get("/chat/c2/stream", headers=ada)
        anonymous = await http.get("/chat/c1/stream")
        malformed = await http.get("/chat/c1/stream?after=x", headers=ada)
    assert shown.headers["content-type"].startswith("text/event-stream")
    assert (shown.content, shown.headers["x-shown"]) == (started.content, "c1")
    assert without_lives(rest.content) == without_lives(started.content).replace(b"event: chunk\ndata: 0\nid: 0\n\n", b"")
    assert by_query.content == rest.content
    assert [answer.status_code for answer in (nothing_left, foreign, unknown)] == [204, 204, 204]
    assert (foreign.content, foreign.headers["x-shown"]) == (b"", "None")
    assert (anonymous.status_code, malformed.status_code) == (422, 400)


async def test_a_stream_is_followed_while_it_comes() -> None:
    streams = InMemoryStreamManager()
    streams_http = StreamsHTTP(streams, timeouts=Timeouts(heartbeat=timedelta(seconds=0.1)))
    async with http_to(following(streams_http)) as http:
        stream = await streams.open("live", owner="ada", metadata={"route": "/elsewhere"})
        async with http.stream("GET", "/chat/live/stream", headers={"X-User": "ada"}) as answer:
            reading = Reading(answer)
            await stream.write("first")
            await reading.until(b"first")
            await stream.done("last")
            body = await reading.whole()
    assert b"event: done" in body


async def test_a_head_of_what_is_followed_does_not_wait_for_the_streams_end() -> None:
    streams = InMemoryStreamManager()
    streams_http = StreamsHTTP(streams)

    async def follow(request: Request) -> Response:
        return await streams_http.follow(request, "live")

    app = Starlette(routes=[Route("/stream", follow)], lifespan=streams_http.lifespan)  # HEAD comes with GET there
    async with http_to(app) as http, streams.open("live"):
        with anyio.fail_after(5):
            await http.head("/stream")
            head = await http.head("/stream")  # on the same connection, which the first one would occupy
    assert (head.status_code, head.headers[STREAM_ID], head.content) == (200, "live", b"")
    assert head.headers["content-type"].startswith("text/event-stream")


async def test_respond_and_follow_say_that_they_are_not_entered() -> None:
    streams_http = StreamsHTTP(InMemoryStreamManager())
    request = Request({"type": "http", "method": "POST", "headers": [], "path": "/chat"})
    with pytest.raises(RuntimeError, match="is not running"):
        await streams_http.respond(request, [1])
    with pytest.raises(RuntimeError, match="is not running"):
        await streams_http.follow(request, "s")
