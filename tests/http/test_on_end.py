"""`on_end`: whoever asks is told once how a run has ended, and may read what it has produced, whatever has become of it."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import anyio
import pytest
from fastapi import FastAPI, Request, Response
from tests.core.helpers import resumed
from tests.http.servers import STREAM_ID, count, durable_app, events_of, frames_of, http_to, until, wrapped_app
from tests.http.test_bounds import SOON, virtual_time

from streamkeep import InMemoryStreamManager, PublicError, StreamInput, StreamManager, StreamNotFoundError
from streamkeep.http import Bounds, Ended, OnEnd, Runner, StreamsHTTP
from streamkeep.http.sources import Source, producer_of
from streamkeep.storages.memory import MemoryStorage
from streamkeep.testing.faults import FaultyStorage

USER: Final[ContextVar[str]] = ContextVar("user", default="nobody")


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


only_asyncio: Final = pytest.mark.parametrize("anyio_backend", ["asyncio"])


class Told:
    """An `on_end` that reads what was produced."""

    def __init__(self) -> None:
        self.ends: list[Ended] = []
        self.chunks: list[list[Any]] = []
        self.users: list[str] = []
        self._told = anyio.Event()

    async def __call__(self, ended: Ended) -> None:
        self.users.append(USER.get())
        self.ends.append(ended)
        self.chunks.append(await ended.chunks())
        self._told.set()

    async def one(self) -> Ended:
        with anyio.fail_after(20):
            await self._told.wait()
        (ended,) = self.ends
        return ended


@asynccontextmanager
async def running(
    on_end: OnEnd, streams: StreamManager | None = None, **options: Any
) -> AsyncGenerator[tuple[Runner, StreamManager]]:
    options = {"drain": timedelta(0), "stop_grace": SOON, **options}
    async with streams or InMemoryStreamManager() as manager, Runner(manager, on_end=on_end, **options) as runner:
        yield runner, manager


async def start(runner: Runner, source: Source, stream: str = "s", **options: Any) -> None:
    await runner.start(stream, producer_of(source), **options)


async def partly(stream: StreamInput) -> AsyncGenerator[str, None]:
    yield "a"
    yield "b"
    await anyio.sleep_forever()


async def seen(streams: StreamManager, chunks: int = 2, stream: str = "s") -> None:
    async with streams.subscribe(stream) as events:
        for _ in range(chunks):
            await anext(events)


class Panic(BaseException):
    """As pyo3 raises when Rust panics."""


# Each end


async def test_a_run_that_is_done_is_told_whole_with_its_output_and_what_is_kept_with_it() -> None:
    async def whole(stream: StreamInput) -> AsyncGenerator[str, None]:
        USER.set("set by the producer")
        yield "a"
        yield "b"
        await stream.done({"tokens": 2})

    told = Told()
    async with running(told) as (runner, _):
        await start(runner, whole, metadata={"owner": "ann"})
        ended = await told.one()
    assert (ended.stream, ended.status, ended.output, ended.error) == ("s", "done", {"tokens": 2}, None)
    assert (ended.metadata, ended.is_stored) == ({"owner": "ann"}, True)
    assert (told.chunks, told.users) == ([["a", "b"]], ["set by the producer"])


async def test_a_run_without_a_chunk_is_told_with_what_it_returns() -> None:
    async def returns(stream: StreamInput) -> list[str]:
        return ["whole"]

    told = Told()
    async with running(told) as (runner, _):
        await start(runner, returns)
        assert (await told.one()).output == ["whole"]
    assert told.chunks == [[]]


@pytest.mark.parametrize(
    ("raised", "status"),
    [(ValueError("secret"), "INTERNAL"), (PublicError("NOT_FOUND", "no"), "NOT_FOUND"), (Panic(), "INTERNAL")],
)
async def test_a_run_that_fails_is_told_with_what_was_produced_until_then(raised: BaseException, status: str) -> None:
    async def fails() -> AsyncGenerator[str, None]:
        yield "a"
        raise raised

    told = Told()
    async with running(told) as (runner, _):
        await start(runner, fails)
        ended = await told.one()
    assert ended.error is not None
    assert (ended.status, ended.output, ended.error.status, ended.is_stored) == ("error", None, status, True)
    assert type(raised).__name__ in ended.error.internal
    assert told.chunks == [["a"]]


async def test_a_run_that_is_stopped_is_told_when_its_producer_has_saved_what_it_has() -> None:
    order: list[str] = []

    async def saves() -> AsyncGenerator[str, None]:
        try:
            yield "a"
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.05)
            order.append("saved")

    def on_end(ended: Ended) -> None:
        assert ended.error is not None
        order.append(ended.error.status)

    async with running(on_end) as (runner, streams):
        await start(runner, saves)
        await seen(streams, 1)
        await streams.cancel("s")
        await until(lambda: len(order) == 2)
    assert order == ["saved", "CANCELLED"]


@pytest.mark.parametrize("chunks", [0, 2])
async def test_a_run_that_another_process_stops_is_told(chunks: int) -> None:
    async def quiet(stream: StreamInput) -> None:
        await anyio.sleep_forever()

    told, storage = Told(), MemoryStorage()
    async with running(told, StreamManager(storage)) as (runner, streams), StreamManager(storage) as elsewhere:
        await start(runner, partly if chunks else quiet)
        await seen(streams, chunks)
        await elsewhere.cancel("s")
        ended = await told.one()
    assert ended.error is not None
    assert (ended.error.status, ended.is_stored) == ("CANCELLED", True)
    assert told.chunks == [["a", "b"][:chunks]]


async def test_a_run_that_meets_a_bound_is_told() -> None:
    told = Told()
    async with running(told, bounds=Bounds(max_silence=timedelta(milliseconds=200))) as (runner, _):
        await start(runner, partly)
        ended = await told.one()
    assert ended.error is not None
    assert (ended.error.status, told.chunks) == ("DEADLINE_EXCEEDED", [["a", "b"]])


@pytest.mark.parametrize("drain", ["drained", "left"])
async def test_a_run_that_a_shutdown_ends_is_told_while_streams_can_be_read(drain: str) -> None:
    told = Told()
    async with running(told) as (runner, streams):
        await start(runner, partly)
        await seen(streams)
        if drain == "drained":
            await runner.drain()
            await told.one()
    ended = await told.one()
    assert ended.error is not None
    assert (ended.error.status, told.chunks) == ("ABORTED", [["a", "b"]])


@only_asyncio
@pytest.mark.parametrize("way", ["native", "scope"])
async def test_a_run_is_told_also_when_the_shutdown_itself_is_cancelled(way: str) -> None:
    told, ready = Told(), anyio.Event()

    async def serve() -> None:
        async with InMemoryStreamManager() as streams, Runner(streams, drain=timedelta(hours=1), on_end=told) as runner:
            await start(runner, partly)
            await seen(streams)
            ready.set()

    with anyio.fail_after(20):
        if way == "native":
            task = asyncio.create_task(serve())
            await ready.wait()
            await anyio.wait_all_tasks_blocked()
            task.cancel()
            await asyncio.wait([task])
        else:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(serve)
                await ready.wait()
                await anyio.wait_all_tasks_blocked()
                tasks.cancel_scope.cancel()
    ended = await told.one()
    assert ended.error is not None
    assert (ended.error.status, told.chunks) == ("ABORTED", [["a", "b"]])


async def test_a_run_whose_producer_does_not_end_is_told_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamkeep.http.runner.SAVE_SECONDS", 0.2)
    monkeypatch.setattr("streamkeep.http.runner.END_SECONDS", 0.5)
    go_on = anyio.Event()

    async def swallows(stream: StreamInput, _: anyio.Event) -> None:
        await stream.write("a")
        while not go_on.is_set():
            try:
                await anyio.sleep(0.01)
            except anyio.get_cancelled_exc_class():
                pass

    told = Told()
    async with running(told) as (runner, streams):
        await runner.start("s", swallows)
        await seen(streams, 1)
        await streams.cancel("s")
        ended = await told.one()
        go_on.set()
        await until(lambda: not runner._runs)
    assert ended.error is not None
    assert (ended.error.status, told.chunks) == ("CANCELLED", [["a"]])


async def test_a_run_whose_stream_is_deleted_is_told_that_there_is_nothing() -> None:
    ends: list[Ended] = []

    async def on_end(ended: Ended) -> None:
        with pytest.raises(StreamNotFoundError):
            await ended.chunks()
        ends.append(ended)

    async with running(on_end) as (runner, streams):
        await start(runner, partly)
        await seen(streams)
        await streams.delete("s")
        await until(lambda: ends)
    (ended,) = ends
    assert ended.error is not None
    assert (ended.error.status, ended.error.message, ended.is_stored) == ("NOT_FOUND", "the stream was deleted", False)


async def test_a_run_whose_producer_releases_its_stream_is_told() -> None:
    async def releases(stream: StreamInput) -> None:
        await stream.write("a")
        await stream.close()

    told = Told()
    async with running(told) as (runner, streams):
        await start(runner, releases)
        ended = await told.one()
        assert (await streams.info("s")).status == "open"  # another may go on
    assert ended.error is not None
    assert (ended.error.status, ended.is_stored, told.chunks) == ("ABORTED", False, [["a"]])


@virtual_time
async def test_a_run_that_is_taken_over_is_told_what_was_its_own() -> None:
    told, memory = Told(), MemoryStorage()
    storage = FaultyStorage(memory)
    go_on = anyio.Event()

    async def writes(stream: StreamInput) -> None:
        await stream.write("a")
        await go_on.wait()
        await stream.write("never")

    async with running(told, StreamManager(storage)) as (runner, streams), StreamManager(memory) as elsewhere:
        await start(runner, writes)
        await seen(streams, 1)
        storage.is_down = True
        other = await resumed(elsewhere, "s")
        await other.write("theirs")
        storage.is_down = False
        go_on.set()
        ended = await told.one()
        await other.done()
    assert ended.error is not None
    assert (ended.error.status, ended.is_stored, told.chunks) == ("ABORTED", False, [["a"]])


async def test_an_end_that_cannot_be_stored_is_told_as_such() -> None:
    ends: list[Ended] = []
    storage = FaultyStorage(MemoryStorage())

    async def returns() -> AsyncGenerator[str, None]:
        yield "a"
        storage.is_down = True

    async with running(ends.append, StreamManager(storage)) as (runner, _):
        await start(runner, returns)
        await until(lambda: ends)
        storage.is_down = False
    (ended,) = ends
    assert (ended.status, ended.is_stored) == ("done", False)


async def test_a_stream_that_expires_at_once_is_told_all_the_same() -> None:
    ends: list[Ended] = []
    async with running(ends.append) as (runner, _):
        await start(runner, ["a"], ttl=timedelta(0), key="k")
        await until(lambda: ends)
    assert (ends[0].key, ends[0].status, ends[0].is_stored) == ("k", "done", True)
    with pytest.raises(StreamNotFoundError):
        async with InMemoryStreamManager() as streams:
            await Ended("s", "", "done", None, None, {}, True, streams, 1).chunks()


async def test_what_was_produced_is_given_whole_however_long_it_is() -> None:
    told = Told()
    async with running(told) as (runner, _):
        await start(runner, list(range(2_000)))
        await told.one()
    assert told.chunks == [[*range(2_000)]]


# Hooks that misbehave


@pytest.mark.promise("P17")
@pytest.mark.parametrize("raised", [ValueError("a bug"), Panic("a bug")])
async def test_an_on_end_that_raises_is_logged_once_and_harms_nobody(
    raised: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    def on_end(ended: Ended) -> None:
        raise raised

    async with running(on_end, max_producers=1) as (runner, streams):
        for stream in ("s", "next"):
            await start(runner, ["a"], stream)
            assert await events_of(streams, stream) == [("chunk", "a"), ("done", None)]
            await until(lambda: not runner._runs)
    assert caplog.text.count("Traceback") == 2
    assert "stream s: `on_end` failed" in caplog.text


@only_asyncio
async def test_an_on_end_that_is_cancelled_harms_nobody() -> None:
    def on_end(ended: Ended) -> None:
        raise asyncio.CancelledError

    async with running(on_end) as (runner, streams):
        await start(runner, ["a"])
        await until(lambda: not runner._runs)
        await start(runner, ["b"], "next")
        assert await events_of(streams, "next") == [("chunk", "b"), ("done", None)]


@virtual_time
@pytest.mark.parametrize("way", ["a minute", "shutdown"])
async def test_an_on_end_that_never_returns_is_cancelled(way: str, caplog: pytest.LogCaptureFixture) -> None:
    calls = 0

    async def on_end(ended: Ended) -> None:
        nonlocal calls
        calls += 1
        await anyio.sleep_forever()

    async def once() -> AsyncGenerator[str, None]:
        yield "a"

    async with running(on_end, StreamManager(MemoryStorage(), lease=timedelta(days=1))) as (runner, _):
        await start(runner, once)
        await start(runner, partly, "b")
        await anyio.sleep(30)
        assert calls == 1
        assert len(runner._runs) == 2  # it keeps its place
        if way == "a minute":
            await anyio.sleep(31)
            assert len(runner._runs) == 1
        began_at = anyio.current_time()
    assert anyio.current_time() - began_at < 20
    assert (calls, caplog.text.count("`on_end` took too long, and is cancelled")) == (2, 2)


@only_asyncio
async def test_an_on_end_that_swallows_cancellation_holds_nothing_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("ON_END_SECONDS", "SAVE_SECONDS", "END_SECONDS"):
        monkeypatch.setattr(f"streamkeep.http.runner.{name}", 0.3)
    go_on, times = anyio.Event(), 0

    async def on_end(_ended: Ended) -> None:
        nonlocal times
        while not go_on.is_set():
            try:
                await anyio.sleep(0.01)
            except asyncio.CancelledError:
                times += 1

    with anyio.fail_after(20):
        async with running(on_end) as (runner, _):
            await start(runner, ["a"])
            await until(lambda: not runner._runs)
    go_on.set()
    assert "`on_end` does not end, whatever is done" in caplog.text
    assert 0 < times < 10  # it is not cancelled all the time


# Through an app


@asynccontextmanager
async def serving(streams_http: StreamsHTTP, **options: Any) -> AsyncGenerator[Any]:
    app = FastAPI(lifespan=streams_http.lifespan)

    @app.post("/chat")
    async def chat(request: Request) -> Response:
        USER.set("ann")
        return await streams_http.respond(
            request, partly if "partly" in request.query_params else ["a", "b"], owner="ann", **options
        )

    async with http_to(app) as http:
        yield http


@only_asyncio
@pytest.mark.parametrize("url", ["memory://", "sqlite:///{path}/streams.db"])
async def test_an_app_is_told_of_its_runs_and_an_endpoint_of_its_own(url: str, tmp_path: Path) -> None:
    all_, own = Told(), Told()
    with_all: Callable[[], StreamsHTTP] = lambda: StreamsHTTP(StreamManager.connect(url.format(path=tmp_path)), on_end=all_)  # noqa: E731
    async with serving(with_all()) as http:
        answer = await http.post("/chat")
        assert len(frames_of(answer.content)) == 3
        ended = await all_.one()
    assert (ended.stream, ended.metadata) == (
        answer.headers[STREAM_ID],
        {"route": "/chat", "answer": "endpoint", "owner": "ann"},
    )
    assert (all_.chunks, all_.users) == ([["a", "b"]], ["ann"])
    async with serving(with_all(), on_end=own) as http:
        await http.post("/chat")
        assert (await own.one()).status == "done"
    assert len(all_.ends) == 1


@only_asyncio
async def test_an_app_that_stops_tells_what_was_produced_also_when_it_starts_again() -> None:
    told: list[list[Any]] = []

    async def on_end(ended: Ended) -> None:
        told.append(await ended.chunks())

    streams_http = StreamsHTTP(InMemoryStreamManager(), drain=timedelta(0), on_end=on_end)
    for number in (1, 2):
        async with serving(streams_http) as http, http.stream("POST", "/chat?partly") as answer:
            await seen(streams_http.streams, 2, answer.headers[STREAM_ID])
        assert told == number * [["a", "b"]]


@only_asyncio
@pytest.mark.parametrize("make", [durable_app, wrapped_app])
async def test_flows_of_genkit_are_told_too(make: Callable[..., Any]) -> None:
    told = Told()
    async with http_to(make(count, streams=StreamsHTTP(InMemoryStreamManager(), on_end=told))) as http:
        await http.post("/count?stream=true", json={"data": 3})
        assert (await told.one()).output == {"counted": 3}
    assert told.chunks == [[0, 1, 2]]
