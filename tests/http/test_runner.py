"""Runner: whatever becomes of a producer, its stream gets a terminal event, and no producer harms another."""

import asyncio
import gc
import warnings
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import asynccontextmanager, suppress
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, Final

import anyio
import pytest
from anyio.lowlevel import checkpoint
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from starlette.background import BackgroundTask
from tests.http.servers import STREAMING, Reading, events_of, http_to, until

from streamkeep import InMemoryStreamManager, Limits, Recovery, StreamEvent, StreamInput, StreamManager
from streamkeep.errors import (
    LimitExceededError,
    PublicError,
    StorageUnavailableError,
    StreamAlreadyExistsError,
    StreamManagerClosedError,
)
from streamkeep.events import RESTARTED_RECORD, ErrorInfo
from streamkeep.http import DurableStreaming, Producer, Runner, StreamsHTTP
from streamkeep.http.runner import MOST_QUEUED, ChunkWriter
from streamkeep.http.sources import MOST_AHEAD, producer_of
from streamkeep.integrations.openai import OpenAIResponses, ResponseRequest
from streamkeep.storage import Head
from streamkeep.storages.memory import MemoryStorage
from streamkeep.testing.faults import FaultyStorage

SOON: Final = timedelta(milliseconds=20)
IN_TIME: Final = timedelta(seconds=10)


@asynccontextmanager
async def running(streams: StreamManager | None = None, **options: Any) -> AsyncGenerator[tuple[Runner, StreamManager]]:
    options = {"drain": IN_TIME, "stop_grace": SOON, **options}
    with anyio.fail_after(30):
        async with (
            streams or InMemoryStreamManager() as manager,
            Runner(manager, **options) as runner,
        ):
            yield runner, manager


class Waiting:
    """A producer that writes one chunk and waits to be let go."""

    def __init__(self) -> None:
        self.begun = anyio.Event()
        self.go = anyio.Event()
        self.told_to_stop = False
        self.cancelled = anyio.Event()

    async def __call__(self, stream: StreamInput, stop: anyio.Event) -> str:
        await stream.write("begun")
        self.begun.set()
        try:
            await self.go.wait()
        except BaseException:
            self.told_to_stop = stop.is_set()
            self.cancelled.set()
            raise
        return "output"


WHOLE: Final[list[tuple[str, object]]] = [("chunk", "begun"), ("done", "output")]
ABORTED: Final[list[tuple[str, object]]] = [("chunk", "begun"), ("error", "ABORTED")]


async def started(runner: Runner, stream: str = "s") -> Waiting:
    producer = Waiting()
    await runner.start(stream, producer)
    await producer.begun.wait()
    return producer


# Ends


async def test_what_a_producer_writes_and_returns_is_the_stream() -> None:
    async with running() as (runner, streams):
        producer = await started(runner)
        producer.go.set()
        assert await events_of(streams, "s") == WHOLE


async def test_what_a_producer_raises_ends_its_stream_and_is_stored_in_full(caplog: pytest.LogCaptureFixture) -> None:
    async def fails(stream: StreamInput, _: anyio.Event) -> None:
        stream.write_soon("before")
        raise ValueError("secret")

    async with running() as (runner, streams):
        await runner.start("s", fails)
        assert await events_of(streams, "s") == [("chunk", "before"), ("error", "INTERNAL")]
        async with streams.subscribe("s", after=0) as events:
            (event,) = [event async for event in events]
    assert event.error.message == "internal"
    assert "ValueError: secret" in event.error.internal
    assert "ValueError: secret" in caplog.text


async def test_a_producer_may_end_its_stream_itself() -> None:
    async def ends(stream: StreamInput, _: anyio.Event) -> str:
        await stream.done("mine")
        return "returned"

    async def raises(stream: StreamInput, _: anyio.Event) -> str:
        await stream.done("mine")
        raise ValueError

    async with running() as (runner, streams):
        for stream, producer in (("ends", ends), ("raises", raises)):
            await runner.start(stream, producer)
            assert await events_of(streams, stream) == [("done", "mine")]


async def test_an_output_that_is_not_json_or_too_large_is_an_error() -> None:
    async def odd(_stream: StreamInput, _: anyio.Event) -> object:
        return object()

    async def long(_stream: StreamInput, _: anyio.Event) -> object:
        return "x" * 1001

    streams = StreamManager(MemoryStorage(), limits=Limits(max_event_bytes=1000))
    async with running(streams) as (runner, _):
        await runner.start("odd", odd)
        await runner.start("long", long)
        assert [kind for kind, _ in await events_of(streams, "odd")] == ["error"]
        assert await events_of(streams, "long") == [("error", "RESOURCE_EXHAUSTED")]


async def test_a_failure_that_is_longer_than_the_limit_still_ends_the_stream() -> None:
    async def fails(_stream: StreamInput, _: anyio.Event) -> None:
        raise PublicError("NOT_FOUND", "x" * 1000)

    streams = StreamManager(MemoryStorage(), limits=Limits(max_event_bytes=10))
    async with running(streams) as (runner, _):
        await runner.start("s", fails)
        assert await events_of(streams, "s") == [("error", "NOT_FOUND")]


@pytest.mark.parametrize(
    "raised", [ValueError("bug"), asyncio.CancelledError(), BaseExceptionGroup("many", [ValueError(), ValueError()])], ids=repr
)
async def test_no_producer_harms_another(raised: BaseException) -> None:
    async def fails(_stream: StreamInput, _: anyio.Event) -> None:
        raise raised

    async with running() as (runner, streams):
        other = await started(runner, "other")
        await runner.start("fails", fails)
        ((_, status),) = await events_of(streams, "fails")
        assert status == "INTERNAL"
        await started(runner, "third")
        other.go.set()
        assert await events_of(streams, "other") == WHOLE
        await streams.cancel("third")


class Buggy(MemoryStorage):
    """Raises what a storage never may, at every commit but a first, while `bug` is true."""

    bug = True

    async def commit(self, stream: str, seen: int | None, head: Head, records: Sequence[bytes] = ()) -> bool:
        if self.bug and stream == "unlucky" and seen is not None:
            raise RuntimeError("a bug in a driver")
        return await super().commit(stream, seen, head, records)


async def test_an_end_that_a_bug_keeps_from_being_stored_harms_no_other(caplog: pytest.LogCaptureFixture) -> None:
    async def returns(_stream: StreamInput, _: anyio.Event) -> str:
        return "output"

    storage = Buggy()
    async with running(StreamManager(storage)) as (runner, streams):
        other = await started(runner, "other")
        await runner.start("unlucky", returns)
        other.go.set()
        assert await events_of(streams, "other") == WHOLE
        await runner.drain()
        assert (await streams.info("unlucky")).status == "open"  # until its lease lapses
        storage.bug = False
    assert "a bug in a driver" in caplog.text


async def test_an_id_that_is_taken_is_refused() -> None:
    async with running() as (runner, streams):
        producer = await started(runner)
        with pytest.raises(StreamAlreadyExistsError):
            await runner.start("s", producer)
        producer.go.set()
        assert await events_of(streams, "s") == WHOLE


# Storages that fail


@pytest.mark.parametrize("how", ["refuse", "lose_answer"])
@pytest.mark.parametrize("times", [1, 3])
async def test_a_storage_that_fails_at_the_end_for_a_moment_is_asked_again(how: str, times: int) -> None:
    storage = FaultyStorage(MemoryStorage())
    async with running(StreamManager(storage)) as (runner, streams):
        producer = await started(runner)
        getattr(storage, how)("commit", times=times)
        producer.go.set()
        await runner.drain()
        assert (await streams.info("s")).status == "done"  # and not when the manager happens to commit the next time
        assert await events_of(streams, "s") == WHOLE


async def test_a_storage_that_fails_while_chunks_are_written_soon_loses_none() -> None:
    storage = FaultyStorage(MemoryStorage())

    async def soon(stream: StreamInput, _: anyio.Event) -> str:
        storage.refuse("commit", times=2)
        stream.write_soon(0)
        stream.write_soon(1)
        return "output"

    async with running(StreamManager(storage)) as (runner, streams):
        await runner.start("s", soon)
        assert await events_of(streams, "s") == [("chunk", 0), ("chunk", 1), ("done", "output")]


async def test_a_producer_whose_write_fails_ends_its_stream_as_unavailable() -> None:
    storage = FaultyStorage(MemoryStorage())

    async def writes(stream: StreamInput, _: anyio.Event) -> None:
        storage.refuse("commit")
        await stream.write(0)

    async with running(StreamManager(storage)) as (runner, streams):
        await runner.start("s", writes)
        assert await events_of(streams, "s") == [("chunk", 0), ("error", "UNAVAILABLE")]


# Being stopped


async def test_a_stream_that_is_cancelled_tells_its_producer_and_cancels_it() -> None:
    async with running() as (runner, streams):
        producer = await started(runner)
        await streams.cancel("s")
        await producer.cancelled.wait()
        assert producer.told_to_stop
        assert await events_of(streams, "s") == [("chunk", "begun"), ("error", "CANCELLED")]


async def test_a_stream_that_is_cancelled_elsewhere_tells_its_producer() -> None:
    storage = MemoryStorage()
    async with running(StreamManager(storage)) as (runner, _), StreamManager(storage) as elsewhere:
        producer = await started(runner)
        await elsewhere.cancel("s")
        await producer.cancelled.wait()


async def test_a_stream_that_is_deleted_tells_its_producer() -> None:
    async with running() as (runner, streams):
        producer = await started(runner)
        await streams.delete("s")
        await producer.cancelled.wait()
        assert not await streams.list()


async def test_a_producer_that_is_told_to_stop_has_a_moment_for_it() -> None:
    begun, ended = anyio.Event(), anyio.Event()

    async def minds(_stream: StreamInput, stop: anyio.Event) -> None:
        begun.set()
        await stop.wait()
        ended.set()

    async with running(stop_grace=IN_TIME) as (runner, streams):
        await runner.start("s", minds)
        await begun.wait()
        await streams.cancel("s")
        await ended.wait()


async def swallows(stream: StreamInput, _: anyio.Event) -> None:
    await stream.write("begun")
    for _again in range(3):
        try:
            await anyio.sleep_forever()
        except anyio.get_cancelled_exc_class():
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.02)
    await anyio.sleep_forever()


@pytest.mark.parametrize("way", ["stopped", "left"])
async def test_what_a_producer_does_at_its_end_is_not_cancelled_as_well(way: str) -> None:
    waits, saved = anyio.Event(), anyio.Event()

    async def produce(stream: StreamInput, _stop: anyio.Event) -> None:
        try:
            await stream.write("a")
            waits.set()
            await anyio.sleep_forever()
        finally:
            await anyio.sleep(0.2)
            saved.set()

    async with InMemoryStreamManager() as streams:
        async with Runner(streams, drain=timedelta(), stop_grace=timedelta()) as runner:
            await runner.start("s", produce)
            await waits.wait()
            if way == "stopped":
                await streams.cancel("s")
                with anyio.fail_after(5):
                    await saved.wait()
        assert saved.is_set()
        assert (await streams.info("s")).error == ("CANCELLED" if way == "stopped" else "ABORTED")


async def test_a_producer_that_never_ends_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("streamkeep.http.runner.SAVE_SECONDS", 0.1)
    monkeypatch.setattr("streamkeep.http.runner.END_SECONDS", 0.2)
    go_on = anyio.Event()

    async def produce(_stream: StreamInput, _stop: anyio.Event) -> None:
        while not go_on.is_set():
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(0.01)

    async with InMemoryStreamManager() as streams:
        with anyio.fail_after(5):
            async with Runner(streams, drain=timedelta(), stop_grace=timedelta()) as runner:
                await runner.start("s", produce)
        assert "the producer of stream s does not end" in caplog.text
        assert (await streams.info("s")).error == "ABORTED"  # and its stream has ended all the same
        go_on.set()
        await anyio.wait_all_tasks_blocked()


@pytest.mark.parametrize("way", ["stopped", "drained", "left"])
async def test_a_producer_that_never_ends_is_cancelled_some_times_and_waited_for_once(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamkeep.http.runner.SAVE_SECONDS", 0.1)
    monkeypatch.setattr("streamkeep.http.runner.END_SECONDS", 0.5)
    go_on, over = anyio.Event(), anyio.Event()
    cancelled = 0

    async def produce(_stream: StreamInput, _stop: anyio.Event) -> None:
        nonlocal cancelled
        while not go_on.is_set():
            try:
                await go_on.wait()
            except asyncio.CancelledError:
                cancelled += 1
        over.set()

    async with InMemoryStreamManager() as streams:
        async with Runner(streams, drain=timedelta(), stop_grace=timedelta()) as runner:
            await runner.start("s", produce)
            if way == "stopped":
                await streams.cancel("s")
                await until(lambda: all(run.free.is_set() for run in runner._runs))
            elif way == "drained":
                await runner.drain()
            before = cancelled
        assert 1 <= cancelled <= 10
        if way != "left":
            assert cancelled == before
        go_on.set()
        await over.wait()
        await until(lambda: not runner._runs)


async def test_a_producer_that_swallows_cancellation_for_a_while_is_ended_all_the_same() -> None:
    async with running(drain=timedelta(0)) as (runner, streams):
        for stream in ("cancelled", "left"):
            await runner.start(stream, swallows)
        await streams.cancel("cancelled")
        await runner.drain()
        assert (await events_of(streams, "cancelled"))[-1] == ("error", "CANCELLED")
        assert (await events_of(streams, "left"))[-1] == ("error", "ABORTED")


# Being left


async def test_leaving_waits_for_the_producers() -> None:
    async with InMemoryStreamManager() as streams:
        async with Runner(streams, drain=IN_TIME) as runner:
            producer = await started(runner)
            asyncio.get_running_loop().call_later(0.05, producer.go.set)
        assert producer.go.is_set()
        assert await events_of(streams, "s") == WHOLE


async def test_leaving_ends_as_aborted_what_takes_too_long() -> None:
    async with InMemoryStreamManager() as streams:
        async with Runner(streams, drain=SOON, stop_grace=SOON) as runner:
            producer = await started(runner)
        assert producer.told_to_stop
        assert await events_of(streams, "s") == ABORTED
        async with streams.subscribe("s", after=0) as events:
            assert (await events.batch())[0].error.message == "the server was shut down before the stream was completed"


async def test_leaving_tells_producers_to_stop_before_it_cancels_them() -> None:
    async def minds(stream: StreamInput, stop: anyio.Event) -> str:
        await stream.write("begun")
        await stop.wait()
        return "output"

    async with InMemoryStreamManager() as streams:
        async with Runner(streams, drain=SOON, stop_grace=IN_TIME) as runner:
            await runner.start("s", minds)
        assert await events_of(streams, "s") == WHOLE


async def test_it_can_be_left_and_drained_twice_and_takes_no_more_producers() -> None:
    async with InMemoryStreamManager() as streams:
        runner = Runner(streams)
        with pytest.raises(StreamManagerClosedError, match="not running"):
            await runner.start("early", Waiting())
        async with runner:
            assert runner.is_running
            await runner.drain()
            await runner.drain()
            assert not runner.is_running
        await runner.__aexit__(None, None, None)
        await runner.drain()
        with pytest.raises(StreamManagerClosedError, match="shutting down"):
            await runner.start("late", Waiting())
        assert not await streams.list()


async def test_a_producer_whose_stream_is_being_opened_as_it_is_left_never_runs_and_its_stream_ends() -> None:
    storage = FaultyStorage(MemoryStorage())
    producer: Producer = Waiting()
    async with StreamManager(storage) as streams:

        async def start_late() -> None:
            with pytest.raises(StreamManagerClosedError, match="shutting down"):
                await runner.start("s", producer)

        async with anyio.create_task_group() as tasks:
            async with Runner(streams, drain=SOON) as runner:
                hold = storage.hold("commit")
                tasks.start_soon(start_late)
                await hold.reached.wait()
            hold.release()
        assert await events_of(streams, "s") == [("error", "ABORTED")]


@pytest.mark.parametrize("backend", ["native", "scope"])
async def test_leaving_that_is_cancelled_ends_all_producers_at_once(backend: str) -> None:
    draining = anyio.Event()

    class Watched(Runner):
        async def drain(self) -> None:
            draining.set()
            await super().drain()

    async with InMemoryStreamManager() as streams:
        ready = anyio.Event()

        async def serve() -> None:
            async with Watched(streams, drain=timedelta(hours=1)) as runner:
                await started(runner)
                ready.set()

        with anyio.fail_after(10):
            if backend == "native":
                task = asyncio.create_task(serve())
                await draining.wait()
                task.cancel()
                await asyncio.wait([task])
                assert task.cancelled()
            else:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(serve)
                    await draining.wait()
                    tasks.cancel_scope.cancel()
        assert await events_of(streams, "s") == ABORTED


async def test_an_error_that_leaves_the_block_arrives_bare() -> None:
    async with InMemoryStreamManager() as streams:
        with pytest.raises(ZeroDivisionError):
            async with Runner(streams, drain=SOON, stop_grace=SOON) as runner:
                await started(runner)
                raise ZeroDivisionError
        assert await events_of(streams, "s") == ABORTED


async def complete(streams: StreamManager, stream: str) -> None:
    async with streams.open(stream) as writer:
        await writer.done()


async def test_a_panic_of_a_native_library_ends_its_flow_and_no_other(caplog: pytest.LogCaptureFixture) -> None:
    class Panic(BaseException):
        """As pyo3 raises when Rust panics."""

    async def panics(stream: StreamInput, _stop: anyio.Event) -> None:
        raise Panic("a tokenizer")

    gate = anyio.Event()

    async def waits(stream: StreamInput, _stop: anyio.Event) -> str:
        await gate.wait()
        return "whole"

    async with InMemoryStreamManager() as streams, Runner(streams, drain=SOON, stop_grace=SOON) as runner:
        await runner.start("waits", waits)
        await runner.start("panics", panics)
        assert (await last_of(streams, "panics")).error.status == "INTERNAL"
        await runner.start("after", waits)
        gate.set()
        for stream in ("waits", "after"):
            assert (await last_of(streams, stream)).output == "whole"
    assert "a tokenizer" in caplog.text


async def last_of(streams: StreamManager, stream: str) -> StreamEvent[Any]:
    with anyio.fail_after(10):
        async with streams.subscribe(stream) as events:
            return [event async for event in events][-1]


async def test_where_the_storage_is_slow_chunks_go_out_together_and_where_it_is_quick_one_by_one() -> None:
    class Slow(FaultyStorage):
        seconds = 0.0

        async def commit(self, stream: str, seen: int | None, head: Head, records: Sequence[bytes] = ()) -> bool:
            await anyio.sleep(self.seconds)
            return await super().commit(stream, seen, head, records)

    async with Slow(MemoryStorage()) as storage, StreamManager(storage) as streams:
        for seconds, most in ((0.0, 101), (0.02, 20)):
            async with streams.open(f"after {seconds}".replace(" ", "-")) as stream:
                storage.seconds = seconds
                storage.calls.clear()
                writer = ChunkWriter(stream)
                for number in range(100):
                    await writer.write(number)
                await stream.done()
                assert storage.calls["commit"] <= most
            async with streams.subscribe(stream.id) as events:
                assert [event.chunk async for event in events if event.type == "chunk"] == [*range(100)]


class AwayStorage(FaultyStorage):
    """One that cannot be reached for a while, or is slow."""

    is_away = False
    leaves_at: bytes | None = None
    refused = 0
    seconds = 0.0

    async def commit(self, stream: str, seen: int | None, head: Head, records: Sequence[bytes] = ()) -> bool:
        if self.leaves_at in records:
            self.is_away, self.leaves_at = True, None
        if self.is_away:
            self.refused += bool(records)
            raise StorageUnavailableError("it cannot be reached")
        await anyio.sleep(self.seconds)
        return await super().commit(stream, seen, head, records)

    async def come_back(self) -> None:
        """Be reached again, when something was to be stored meanwhile."""
        await until(lambda: self.refused > 0)
        self.is_away = False


async def test_a_storage_that_is_away_for_long_holds_an_answer_up_and_ends_nothing() -> None:
    """For as long as there is room in the queue, the model is read on; what it has said is stored once, and in order, afterwards."""

    async with AwayStorage(MemoryStorage()) as storage, StreamManager(storage, limits=Limits(max_queued_events=100)) as streams:
        stream = await streams.open("s")
        writer = ChunkWriter(stream)
        written = 0

        async def write_all() -> None:
            nonlocal written
            for number in range(300):
                await writer.write(number)
                written = number + 1
                await checkpoint()

        await writer.write("first")
        storage.is_away = True
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(write_all)
            await until(lambda: written >= 100)
            assert stream.tail == 1
            storage.is_away = False
        await stream.done()
        async with streams.subscribe("s") as events:
            assert [event.chunk async for event in events if event.type == "chunk"] == ["first", *range(300)]


async def test_when_a_storage_is_back_a_producer_is_as_far_ahead_of_it_as_ever() -> None:
    async with AwayStorage(MemoryStorage()) as storage, StreamManager(storage) as streams:
        stream = await streams.open("s")
        writer = ChunkWriter(stream)
        storage.is_away = True
        for number in range(100):
            await writer.write(number)
        storage.is_away = False
        await stream.flush()
        storage.seconds = 0.01
        for number in range(500):
            await writer.write(number)
            assert 100 + number - stream.tail < 2 * MOST_QUEUED
        await stream.done()


async def test_what_does_not_await_goes_on_as_well_while_a_storage_is_away() -> None:
    read: list[int] = []

    def numbers() -> Generator[int]:
        for number in range(8 * MOST_AHEAD):
            read.append(number)
            yield number

    limits = Limits(max_queued_events=3 * MOST_AHEAD)
    async with AwayStorage(MemoryStorage()) as storage, running(StreamManager(storage, limits=limits)) as (runner, streams):
        await runner.start("s", producer_of(numbers))
        storage.is_away = True
        await until(lambda: len(read) >= 3 * MOST_AHEAD)
        assert len(read) < 8 * MOST_AHEAD  # there is no more room
        storage.is_away = False
        async with streams.subscribe("s") as events:
            assert [event.chunk async for event in events if event.type == "chunk"] == [*range(8 * MOST_AHEAD)]


@pytest.mark.parametrize("end", ["done", "error"])
async def test_a_restart_and_an_end_that_met_a_storage_that_was_away_are_stored_in_order(end: str) -> None:
    async with AwayStorage(MemoryStorage()) as storage, StreamManager(storage) as streams:
        stream = await streams.open("s")
        await stream.write("old")
        storage.is_away = True
        writer = ChunkWriter(stream)
        await writer.restart()
        await writer.write("new")
        await (writer.done(1) if end == "done" else writer.error(ErrorInfo("ABORTED", "it ends")))
        storage.is_away = False
        with anyio.fail_after(10):
            async with streams.subscribe("s") as events:
                assert [event.type async for event in events][-3:] == ["restarted", "chunk", end]


@pytest.mark.parametrize("is_genkits", [True, False])
@pytest.mark.parametrize("frames", [['{"message":1}', '{"result":2}'], ['{"result":2}'], ['{"error":{"status":"ABORTED"}}']])
async def test_a_storage_that_is_away_breaks_off_no_answer_of_an_app_that_knows_nothing_of_streams(
    frames: list[str], *, is_genkits: bool
) -> None:
    gate, is_whole = anyio.Event(), anyio.Event()
    app = FastAPI()

    @app.post("/answer")
    async def answer(request: Request) -> StreamingResponse:
        if is_genkits:  # and then it has looked at what was asked
            await request.body()

        async def sent() -> AsyncGenerator[str]:
            yield 'data: {"message":0}\n\n'
            await gate.wait()
            for frame in frames:
                yield f"data: {frame}\n\n"

        # What is done behind an answer is not done where sending it has failed.
        return StreamingResponse(sent(), media_type="text/event-stream", background=BackgroundTask(is_whole.set))

    async with AwayStorage(MemoryStorage()) as storage, http_to(DurableStreaming(app, StreamManager(storage))) as http:
        async with http.stream("POST", "/answer", json={"data": None}, headers=STREAMING) as shown:
            reading = Reading(shown)
            await reading.until()
            storage.is_away = True
            gate.set()
            with anyio.fail_after(5):
                await is_whole.wait()  # while it is away
            await storage.come_back()
            whole = await reading.whole()
        assert whole.count(b"data: ") == 1 + len(frames)


async def test_a_storage_that_is_away_as_a_response_of_openais_api_is_completed_makes_no_failure_of_it() -> None:
    gate = anyio.Event()

    async def words(_: ResponseRequest) -> AsyncGenerator[str]:
        yield "one"
        await gate.wait()

    async with AwayStorage(MemoryStorage()) as storage:
        serve = StreamsHTTP(StreamManager(storage))
        app = FastAPI(lifespan=serve.lifespan)
        app.mount("/v1", OpenAIResponses(serve, words))
        async with http_to(app) as http:
            begun = await http.post("/v1/responses", json={"model": "m", "input": "", "background": True})
            storage.is_away = True
            gate.set()
            await storage.come_back()
            with anyio.fail_after(10):
                async with serve.streams.subscribe(begun.json()["id"]) as events:
                    end = [event async for event in events][-1]
            assert (end.type, end.output["status"]) == ("done", "completed")


async def test_a_storage_that_is_away_as_a_stream_is_gone_on_with_ends_nothing() -> None:
    async with AwayStorage(MemoryStorage()) as storage, StreamManager(storage) as streams:
        serve = StreamsHTTP(streams)

        @serve.recoverable("answer")
        async def answer() -> AsyncGenerator[str]:
            yield "new"

        lost = await streams.open("s", recovery=Recovery("answer", {}, backoff=timedelta(0)))
        await lost.write("old")
        await lost.close()
        storage.leaves_at = RESTARTED_RECORD
        async with serve:
            await storage.come_back()
            with anyio.fail_after(10):
                async with streams.subscribe("s", 0) as events:
                    types = [event.type async for event in events]
        assert types[-3:] == ["restarted", "chunk", "done"]


async def test_a_chunk_that_met_a_storage_that_was_away_is_stored_although_nothing_follows_it() -> None:
    async with FaultyStorage(MemoryStorage()) as storage, StreamManager(storage) as streams:
        stream = await streams.open("s")
        storage.refuse("commit", error=StorageUnavailableError("it cannot be reached"))
        await ChunkWriter(stream).write("a")
        with anyio.fail_after(10):
            async with streams.subscribe("s") as events:
                assert (await anext(events)).chunk == "a"
        await stream.done()


async def test_what_a_stream_may_not_hold_is_refused_also_where_the_storage_was_away() -> None:
    async with FaultyStorage(MemoryStorage()) as storage, StreamManager(storage, limits=Limits(max_events=3)) as streams:
        stream = await streams.open("s")
        writer = ChunkWriter(stream)
        storage.refuse("commit", times=2, error=StorageUnavailableError("it cannot be reached"))
        with anyio.fail_after(10):
            for _ in range(3):
                await writer.write("a")
            with pytest.raises(LimitExceededError, match="max_events"):
                await writer.write("one too many")
        await stream.done()


async def test_what_a_producer_reads_of_its_context_is_what_its_request_has_set() -> None:
    async def produce(stream: StreamInput, _stop: anyio.Event) -> str:
        return USER.get()

    async with InMemoryStreamManager() as streams, Runner(streams, drain=SOON, stop_grace=SOON) as runner:
        USER.set("ann")
        await runner.start("s", produce)
        assert (await last_of(streams, "s")).output == "ann"


USER: ContextVar[str] = ContextVar("user", default="nobody")


async def test_it_leaves_no_task_behind() -> None:
    async with InMemoryStreamManager() as streams:
        await complete(streams, "first")  # with the first writer the manager's session begins
        await events_of(streams, "first")  # and with the first reader what forgets, soon, what was read
        before = asyncio.all_tasks()
        async with Runner(streams, drain=SOON, stop_grace=SOON) as runner:
            await runner.start("s", swallows)
        await events_of(streams, "s")
        assert not runner._runs
        await anyio.wait_all_tasks_blocked()
        assert len(asyncio.all_tasks()) <= len(before)


@pytest.mark.parametrize("turns", range(20))
@pytest.mark.promise("P14")
def test_a_loop_that_cancels_all_its_tasks_at_any_moment_comes_to_its_end(turns: int) -> None:
    """What asyncio does with tasks that are left: servers that are told twice to stop come to that, and some never began."""

    async def serve(serving: asyncio.Event) -> None:
        async with InMemoryStreamManager() as streams, Runner(streams, drain=SOON, stop_grace=SOON) as runner:
            serving.set()
            for _ in range(5):
                await asyncio.sleep(0)
            await runner.start("s", lambda stream, stop: _write_soon_and_wait(stream))
            await anyio.sleep_forever()

    async def main() -> asyncio.Task[None]:
        serving = asyncio.Event()
        task = asyncio.create_task(serve(serving))
        await serving.wait()
        for _ in range(turns):
            await asyncio.sleep(0)
        return task

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of a task that never began: its coroutine was never awaited
        with asyncio.Runner() as loop:
            task = loop.run(main())
        gc.collect()
    assert task.done()


async def _write_soon_and_wait(stream: StreamInput) -> None:
    for number in range(1_000):
        stream.write_soon(number)
        await asyncio.sleep(0)


# StreamsHTTP around it


async def _say_hello(stream: StreamInput, _: anyio.Event) -> None:
    await stream.write("hello")


async def test_streams_http_can_be_left_twice_and_entered_again() -> None:
    streams = InMemoryStreamManager()
    streams_http = StreamsHTTP(streams, drain=SOON)
    with pytest.raises(RuntimeError, match="not running"):
        _ = streams_http.runner
    assert not streams_http.is_running
    async with streams_http:
        assert streams.is_running
        assert streams_http.is_running
        with pytest.raises(RuntimeError, match="entered already"):
            await streams_http.__aenter__()
    await streams_http.__aexit__(None, None, None)
    assert not streams_http.is_running
    assert not streams.is_running
    async with streams_http:  # as the next test of an app does
        await streams_http.runner.start("again", _say_hello)
        async with streams.subscribe("again") as events:
            assert [event.data async for event in events] == [b'"hello"', b"null"]
