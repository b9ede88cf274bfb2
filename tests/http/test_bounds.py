"""Bounds: what is silent, takes too long or is read by nobody ends, whatever its producer does; what is healthy goes on."""

import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Final

import anyio
import pytest
from fastapi import FastAPI, Request, Response
from tests.http.servers import content_of, durable_app, endless, frames_of, http_to, until, wrapped_app
from trio.testing import MockClock

from streamkeep import ErrorInfo, InMemoryStreamManager, InvalidArgumentError, LimitExceededError, StreamInput, StreamManager
from streamkeep.http import Bounds, Runner, StreamsHTTP
from streamkeep.http.sources import Source, producer_of
from streamkeep.storages.memory import MemoryStorage
from streamkeep.testing.faults import FaultyStorage

VIRTUAL: Final = ("trio", {"clock": MockClock(autojump_threshold=0)})
virtual_time: Final = pytest.mark.parametrize("anyio_backend", [VIRTUAL], ids=["virtual"])
"""Hours pass in no time, as soon as nobody has anything to do; so nothing may run in a thread."""

SOON: Final = timedelta(milliseconds=20)
HOUR: Final = timedelta(hours=1)
MINUTE: Final = timedelta(minutes=1)


@asynccontextmanager
async def running(streams: StreamManager | None = None, **options: Any) -> AsyncGenerator[tuple[Runner, StreamManager]]:
    options = {"drain": timedelta(0), "stop_grace": SOON, **options}
    # A long lease: to renew it costs more than all the rest where time is virtual.
    async with (
        streams or StreamManager(MemoryStorage(), lease=timedelta(days=7)) as manager,
        Runner(manager, **options) as runner,
    ):
        yield runner, manager


async def start(runner: Runner, source: Source, stream: str = "s", **options: Any) -> None:
    await runner.start(stream, producer_of(source), **options)


async def error_of(streams: StreamManager, stream: str = "s") -> ErrorInfo:
    async with streams.subscribe(stream) as events:
        error: ErrorInfo = [event async for event in events][-1].error
        return error


async def events_of(streams: StreamManager, stream: str) -> list[tuple[str, object]]:
    async with streams.subscribe(stream) as events:
        return [(event.type.value, content_of(event)) async for event in events]


async def silent() -> AsyncGenerator[str, None]:
    yield "begun"
    await anyio.sleep_forever()


async def ticking(seconds: float) -> AsyncGenerator[int, None]:
    number = 0
    while True:
        yield number
        number += 1
        await anyio.sleep(seconds)


# What is met when


@virtual_time
async def test_a_producer_that_is_silent_ends_with_words_that_say_so(caplog: pytest.LogCaptureFixture) -> None:
    async with running(bounds=Bounds(max_silence=MINUTE)) as (runner, streams):
        await start(runner, silent())
        error = await error_of(streams)
        await until(lambda: not runner._runs)
    assert (error.status, error.internal) == ("DEADLINE_EXCEEDED", "")
    assert error.message == "the producer gave nothing for 60 seconds (max_silence)"
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "stream s: the producer gave nothing for 60 seconds (max_silence), and it is stopped"
    ]


@virtual_time
async def test_a_producer_that_gives_something_now_and_then_is_ended_when_its_time_is_up_and_no_sooner() -> None:
    async with running(bounds=Bounds(max_silence=MINUTE, max_duration=HOUR)) as (runner, streams):
        await start(runner, ticking(59))
        events = await events_of(streams, "s")
        assert len(events) == 3600 // 59 + 2
        assert (await error_of(streams)).message == "the producer took longer than 3600 seconds (max_duration)"


@virtual_time
async def test_without_bounds_of_its_own_what_hangs_ends_and_a_long_run_goes_on() -> None:
    async with running() as (runner, streams):
        await start(runner, silent())
        await start(runner, ticking(1800), "agent")
        assert (await error_of(streams)).status == "DEADLINE_EXCEEDED"
        await anyio.sleep(20 * 3600)
        assert (await streams.info("agent")).status == "open"
        assert (await error_of(streams, "agent")).status == "DEADLINE_EXCEEDED"


@virtual_time
async def test_bounds_can_be_off_and_one_run_may_have_its_own() -> None:
    async with running(bounds=Bounds(max_silence=None, max_duration=None)) as (runner, streams):
        await start(runner, silent())
        await start(runner, silent(), "bounded", bounds=Bounds(max_silence=MINUTE))
        assert (await error_of(streams, "bounded")).status == "DEADLINE_EXCEEDED"
        await anyio.sleep(3 * 86400)
        assert (await streams.info("s")).status == "open"


@pytest.mark.parametrize("name", ["max_silence", "max_duration", "max_unread"])
def test_a_bound_that_nothing_could_keep_is_refused(name: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"{name} must be positive"):
        Bounds(**{name: timedelta(0)})


@virtual_time
async def test_a_slow_storage_is_not_the_producers_silence() -> None:
    storage = FaultyStorage(MemoryStorage())

    async def writes(stream: StreamInput) -> str:
        await stream.write("waits")
        await anyio.sleep(59)
        return "output"

    async with running(StreamManager(storage, lease=timedelta(days=7)), bounds=Bounds(max_silence=MINUTE)) as (runner, streams):
        await start(runner, writes)
        hold = storage.hold("commit")
        await anyio.sleep(1000)
        assert hold.reached.is_set()
        hold.release()
        assert await events_of(streams, "s") == [("chunk", "waits"), ("done", "output")]


@virtual_time
async def test_after_a_slow_storage_silence_counts_again() -> None:
    storage = FaultyStorage(MemoryStorage())

    async def writes(stream: StreamInput) -> None:
        await stream.write("waits")
        await anyio.sleep_forever()

    async with running(StreamManager(storage, lease=timedelta(days=7)), bounds=Bounds(max_silence=MINUTE)) as (runner, streams):
        await start(runner, writes)
        hold = storage.hold("commit")
        await anyio.sleep(90)
        hold.release()
        await anyio.sleep(58)
        assert (await streams.info("s")).status == "open"
        await anyio.sleep(3)
        assert (await streams.info("s")).error == "DEADLINE_EXCEEDED"


@virtual_time
@pytest.mark.filterwarnings("ignore:coroutine")
async def test_a_chunk_whose_write_nobody_awaits_keeps_no_silent_producer_alive() -> None:
    async def forgets(stream: StreamInput) -> None:
        stream.write("forgotten")  # type: ignore[unused-coroutine]
        await anyio.sleep_forever()

    async with running(bounds=Bounds(max_silence=MINUTE, max_duration=None)) as (runner, streams):
        await start(runner, forgets)
        assert await events_of(streams, "s") == [("chunk", "forgotten"), ("error", "DEADLINE_EXCEEDED")]


@virtual_time
async def test_an_output_that_is_being_stored_wins_over_a_bound(caplog: pytest.LogCaptureFixture) -> None:
    storage = FaultyStorage(MemoryStorage())

    async def returns() -> str:
        await anyio.sleep(50)
        return "output"

    async with running(StreamManager(storage, lease=timedelta(days=7)), bounds=Bounds(max_duration=MINUTE)) as (
        runner,
        streams,
    ):
        await start(runner, returns)
        hold = storage.hold("commit")
        await anyio.sleep(1000)
        hold.release()
        assert await events_of(streams, "s") == [("done", "output")]
        await until(lambda: not runner._runs)
    assert "Traceback" not in caplog.text


@virtual_time
@pytest.mark.parametrize("first", ["stop", "bound", "output"])
async def test_of_a_stop_a_bound_and_an_output_of_one_moment_one_wins(first: str, caplog: pytest.LogCaptureFixture) -> None:
    async def returns() -> str:
        await anyio.sleep(60 if first == "output" else 60.000001)
        return "output"

    async with running(bounds=Bounds(max_duration=timedelta(seconds=60, microseconds=first == "stop"))) as (runner, streams):
        async with anyio.create_task_group() as tasks:
            await start(runner, returns)

            async def stop() -> None:
                await anyio.sleep(60)
                await streams.cancel("s")

            tasks.start_soon(stop)
            ((_, end),) = await events_of(streams, "s")
        await until(lambda: not runner._runs)
    assert end in ("CANCELLED", "DEADLINE_EXCEEDED", "output")
    assert "Traceback" not in caplog.text


# Nobody reads


@virtual_time
async def test_what_nobody_follows_is_stopped_after_a_while() -> None:
    async with running(bounds=Bounds(max_unread=MINUTE)) as (runner, streams):
        await start(runner, ticking(1))
        await anyio.sleep(30)
        async with streams.subscribe("s"):
            await anyio.sleep(1000)
        async with streams.subscribe("s"):
            await anyio.sleep(5)
        await anyio.sleep(59)
        assert (await streams.info("s")).status == "open"
        await anyio.sleep(2)
        assert await error_of(streams) == ErrorInfo("CANCELLED", "nobody followed the stream for 60 seconds (max_unread)")


@virtual_time
async def test_what_somebody_follows_is_not_stopped_because_others_have_left() -> None:
    async with running(bounds=Bounds(max_unread=MINUTE)) as (runner, streams):
        await start(runner, ticking(1))
        async with streams.subscribe("s"):
            async with streams.subscribe("s"):
                pass
            await anyio.sleep(1000)
            assert (await streams.info("s")).status == "open"


# Whatever the producer does


class Kind:
    """A producer that hangs in a way of its own, until it is let go."""

    def __init__(self) -> None:
        self.lock = threading.Event()
        self.go_on = anyio.Event()

    def let_go(self) -> None:
        self.lock.set()
        self.go_on.set()

    async def generator(self) -> AsyncGenerator[str, None]:
        yield "begun"
        await self.go_on.wait()

    def thread(self) -> Iterator[str]:
        yield "begun"
        self.lock.wait(60)
        yield "after its end"

    def function(self, stream: StreamInput) -> str:
        stream.write_soon("begun")
        self.lock.wait(60)
        return "after its end"

    async def swallows(self, stream: StreamInput) -> str:
        await stream.write("begun")
        while not self.go_on.is_set():
            with suppress(anyio.get_cancelled_exc_class()):
                await anyio.sleep(0.01)
        return "after its end"


def in_memory(_: Path) -> StreamManager:
    return InMemoryStreamManager()


def in_a_file(path: Path) -> StreamManager:
    return StreamManager.connect(f"sqlite:///{path}/streams.db")


@pytest.mark.parametrize("connect", [in_memory, in_a_file])
@pytest.mark.parametrize("kind", ["generator", "thread", "function", "swallows"])
async def test_a_bound_ends_the_stream_whatever_its_producer_does(
    kind: str, connect: Callable[[Path], StreamManager], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamkeep.http.runner.SAVE_SECONDS", 0.05)
    monkeypatch.setattr("streamkeep.http.runner.END_SECONDS", 0.5)
    hangs = Kind()
    source: Any = getattr(hangs, kind)
    with anyio.fail_after(30):
        async with running(connect(tmp_path), max_producers=1) as (runner, streams):
            bounds = Bounds(max_silence=timedelta(milliseconds=200))
            await start(runner, source() if kind in ("generator", "thread") else source, bounds=bounds)
            assert await events_of(streams, "s") == [("chunk", "begun"), ("error", "DEADLINE_EXCEEDED")]
            if kind != "generator":
                # Its stream has ended; it has not, and keeps its place until it does.
                with pytest.raises(LimitExceededError):
                    await start(runner, ["next"], "next")
            hangs.let_go()
            await until(lambda: not runner._runs)
            await start(runner, ["next"], "next")
            assert await events_of(streams, "next") == [("chunk", "next"), ("done", None)]


@pytest.mark.parametrize("kind", ["thread", "function"])
async def test_a_thread_keeps_its_place_also_when_its_stream_was_stopped_by_a_reader(kind: str) -> None:
    hangs = Kind()
    source: Any = getattr(hangs, kind)
    with anyio.fail_after(30):
        async with running(max_producers=1) as (runner, streams):
            await start(runner, source() if kind == "thread" else source)
            await until(lambda: any(run.threads for run in runner._runs))
            await streams.cancel("s")
            await until(lambda: not any(run.is_left for run in runner._runs))
            with pytest.raises(LimitExceededError):
                await start(runner, ["next"], "next")
            hangs.let_go()
            await until(lambda: not runner._runs)


async def test_a_bound_leaves_a_producer_time_for_what_it_does_at_its_end() -> None:
    saved: list[str] = []

    async def saves(stream: StreamInput) -> AsyncGenerator[str, None]:
        try:
            yield "partial"
            await anyio.sleep_forever()
        finally:
            await anyio.sleep(0.1)
            saved.append(f"cancelled: {stream.cancelled.is_set()}")

    with anyio.fail_after(30):
        async with running(bounds=Bounds(max_silence=timedelta(milliseconds=200))) as (runner, streams):
            await start(runner, saves)
            assert (await error_of(streams)).status == "DEADLINE_EXCEEDED"
            await until(lambda: not runner._runs)
    assert saved == ["cancelled: True"]


async def test_no_bound_harms_another_run() -> None:
    go_on = anyio.Event()

    async def waits() -> str:
        await go_on.wait()
        return "whole"

    with anyio.fail_after(30):
        async with running(bounds=Bounds(max_silence=timedelta(milliseconds=100))) as (runner, streams):
            await start(runner, waits, "other", bounds=Bounds())
            for number in range(50):
                await start(runner, silent(), f"s{number}")
            for number in range(50):
                assert (await error_of(streams, f"s{number}")).status == "DEADLINE_EXCEEDED"
            go_on.set()
            assert await events_of(streams, "other") == [("done", "whole")]


@virtual_time
async def test_a_thousand_runs_are_looked_at_a_few_times_however_much_they_say() -> None:
    looks = 0

    async with running(bounds=Bounds(max_silence=MINUTE, max_duration=HOUR)) as (runner, _):
        for number in range(1000):
            await start(runner, ticking(7), f"s{number}")
        for run in runner._runs:
            first = run.due.first

            def counted(now: float, first: Any = first) -> Any:
                nonlocal looks
                looks += 1
                return first(now)

            run.due.first = counted  # type: ignore[method-assign]
        await anyio.sleep(60)
        assert 0 < looks <= 2 * 1000


# Being left


@pytest.mark.parametrize("kind", ["thread", "function", "swallows"])
async def test_draining_ends_in_time_whatever_a_producer_does_and_says_for_whom_it_waited(
    kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("streamkeep.http.runner.SAVE_SECONDS", 0.05)
    monkeypatch.setattr("streamkeep.http.runner.END_SECONDS", 0.5)
    hangs = Kind()
    source: Any = getattr(hangs, kind)
    with anyio.fail_after(30):
        async with running() as (runner, streams):
            for number in range(4):
                await start(runner, source() if kind == "thread" else partial(source), f"s{number}")
            for number in range(4):
                async with streams.subscribe(f"s{number}") as events:
                    await anext(events)
            await runner.drain()
            for number in range(4):
                assert (await events_of(streams, f"s{number}"))[-1] == ("error", "ABORTED")
        hangs.let_go()
    assert "4 streams (s0, s1, s2, …) took longer than the 0 seconds of `drain`, and must stop" in caplog.text
    assert ("does not end" in caplog.text) == (kind == "swallows")
    assert caplog.text.count("a thread of 4 streams") == (kind != "swallows")  # once, though it is drained again as it is left


BLOCKED: Final = """
import asyncio, threading
from datetime import timedelta
from streamkeep import InMemoryStreamManager
from streamkeep.http import Runner
from streamkeep.http.sources import producer_of

def blocks():
    begun.set()
    threading.Event().wait()

async def main():
    async with InMemoryStreamManager() as streams, Runner(streams, drain=timedelta(0), stop_grace=timedelta(0)) as runner:
        await runner.start("s", producer_of(blocks))
        await asyncio.to_thread(begun.wait)

begun = threading.Event()
asyncio.run(main())
"""


def test_a_function_that_blocks_for_ever_keeps_no_process_from_ending() -> None:
    subprocess.run([sys.executable, "-c", BLOCKED], check=True, timeout=40)


# Through an app


async def test_an_app_bounds_its_runs_and_an_endpoint_its_own() -> None:
    short = Bounds(max_silence=timedelta(milliseconds=200))
    streams_http = StreamsHTTP(InMemoryStreamManager(), bounds=short)
    app = FastAPI(lifespan=streams_http.lifespan)

    async def slow() -> AsyncGenerator[int, None]:
        await anyio.sleep(0.6)
        yield 0

    @app.post("/default")
    async def default(request: Request) -> Response:
        return await streams_http.respond(request, slow())

    @app.post("/patient")
    async def patient(request: Request) -> Response:
        return await streams_http.respond(request, slow(), bounds=Bounds())

    async with http_to(app) as http:
        (frame,) = frames_of((await http.post("/default")).content)
        assert frame["error"] == {
            "status": "DEADLINE_EXCEEDED",
            "message": "the producer gave nothing for 0.2 seconds (max_silence)",
            "details": None,
        }
        assert frames_of((await http.post("/patient")).content)[0]["message"] == 0


@pytest.mark.parametrize("make", [durable_app, wrapped_app])
async def test_flows_of_genkit_are_bounded_too(make: Callable[..., Any]) -> None:
    bounds = Bounds(max_silence=timedelta(milliseconds=200))
    async with http_to(make(endless, streams=StreamsHTTP(InMemoryStreamManager(), bounds=bounds))) as http:
        chunk, end = frames_of((await http.post("/endless?stream=true", json={"data": 0})).content)
    assert chunk["message"] == "begun"
    assert end["error"]["status"] == "DEADLINE_EXCEEDED"  # type: ignore[index]
