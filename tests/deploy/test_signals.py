"""Signals that stop a process reach those who serve streams, and stay with whoever handles them."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Generator
from datetime import timedelta
from types import FrameType
from typing import Final

import anyio
import pytest
from tests.http.servers import Reading, http_to

from streamkeep import InMemoryStreamManager, StreamInput
from streamkeep.http import StreamsHTTP, shutdown
from streamkeep.http.shutdown import Shutdown, shutdown_of

LONG: Final = timedelta(hours=1)


class Handler:
    """Somebody's signal handler: it counts."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.calls += 1


@pytest.fixture
def handler() -> Generator[Handler]:
    """Handle SIGTERM as a server does."""
    handler = Handler()
    before = signal.signal(signal.SIGTERM, handler)
    yield handler
    signal.signal(signal.SIGTERM, before)


async def begins(stopping: Shutdown) -> None:
    with anyio.fail_after(10):
        await stopping.begun.wait()


async def test_a_signal_is_heard_and_its_handler_handles_it(handler: Handler) -> None:
    stopping = Shutdown()
    with stopping.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        await begins(stopping)
    assert handler.calls == 1


async def test_a_handler_is_put_back_when_the_last_listener_leaves(handler: Handler) -> None:
    first, second = Shutdown(), Shutdown()
    with first.listening():
        with second.listening():
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        await begins(first)
    assert handler.calls == 1
    assert signal.getsignal(signal.SIGTERM) is handler
    assert not second.begun.is_set()


async def test_a_handler_that_was_put_on_top_stays_and_the_one_below_is_still_called(handler: Handler) -> None:
    calls: list[int] = []
    stopping = Shutdown()
    with stopping.listening():
        below = signal.getsignal(signal.SIGTERM)
        assert callable(below)

        def on_top(number: int, frame: FrameType | None) -> None:
            calls.append(number)
            below(number, frame)

        signal.signal(signal.SIGTERM, on_top)
    assert signal.getsignal(signal.SIGTERM) is on_top
    os.kill(os.getpid(), signal.SIGTERM)
    assert (calls, handler.calls, stopping.begun.is_set()) == ([signal.SIGTERM], 1, False)


async def test_a_server_that_takes_the_signals_later_is_heard_at_the_next_response(handler: Handler) -> None:
    stopping, later = Shutdown(), Handler()
    with stopping.listening():
        signal.signal(signal.SIGTERM, later)  # as uvicorn does, without a thought for the one before
        with Shutdown().listening():
            os.kill(os.getpid(), signal.SIGTERM)
            await begins(stopping)
        signal.signal(signal.SIGTERM, handler)
    assert later.calls == 1


@pytest.mark.parametrize("disposition", [signal.SIG_DFL, signal.SIG_IGN])
async def test_a_signal_that_nobody_handles_means_what_it_meant(handler: Handler, disposition: signal.Handlers) -> None:
    signal.signal(signal.SIGTERM, disposition)
    with Shutdown().listening():
        assert signal.getsignal(signal.SIGTERM) is disposition


def test_outside_of_the_main_thread_nothing_is_heard_and_nothing_breaks(handler: Handler) -> None:
    seen: list[object] = []

    async def serve() -> None:
        async with StreamsHTTP(InMemoryStreamManager()):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    thread.join(10)
    assert seen == [handler]


@pytest.mark.parametrize("anyio_backend", ["trio"])
async def test_on_another_event_loop_nothing_is_heard_and_nothing_breaks(handler: Handler, anyio_backend: str) -> None:
    async with StreamsHTTP(InMemoryStreamManager()):
        assert signal.getsignal(signal.SIGTERM) is handler


FORKS: Final = """
import asyncio, os, signal, time
from streamkeep.http.shutdown import Shutdown

async def main():
    stopping = Shutdown()
    signal.signal(signal.SIGTERM, lambda *_: os._exit(7) if os.getpid() != parent else None)
    with stopping.listening():
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        print(stopping.begun.is_set())

parent = os.getpid()
asyncio.run(main())
"""


def test_a_forked_process_that_is_told_to_stop_stops_alone() -> None:
    assert (
        subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True, check=True, timeout=30).stdout
        == "False\n"
    )


# Those who hear


async def test_whoever_does_not_want_to_hear_hears_nothing(handler: Handler) -> None:
    streams = InMemoryStreamManager()
    async with StreamsHTTP(streams, drain_on_signal=False) as streams_http:
        os.kill(os.getpid(), signal.SIGTERM)
        await anyio.wait_all_tasks_blocked()
        assert streams_http.is_running
        assert handler.calls == 1


async def test_all_who_serve_one_manager_drain_at_once() -> None:
    streams = InMemoryStreamManager()
    async with (
        StreamsHTTP(streams, drain=LONG) as one,
        StreamsHTTP(streams, drain=LONG) as other,
        anyio.create_task_group() as tasks,
    ):
        finish = await started(one)
        tasks.start_soon(one.drain)
        await begins(shutdown_of(streams))
        await anyio.wait_all_tasks_blocked()
        assert not other.is_running
        finish()


async def test_a_response_goes_on_until_the_producers_of_all_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutdown, "LAST_RESPONSES_SECONDS", 0)
    streams = InMemoryStreamManager()
    with anyio.fail_after(30):
        async with StreamsHTTP(streams, drain=LONG) as one, StreamsHTTP(streams, drain=LONG) as other:
            finish = await started(other)
            async with http_to(one, lifespan="off") as http, http.stream("GET", "/other") as answer:
                reading = Reading(answer)
                await reading.until()
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(other.drain)
                    await one.drain()
                    await anyio.wait_all_tasks_blocked()
                    finish()
                assert b"event: done" in await reading.whole()


async def test_a_response_of_an_app_that_was_never_entered_ends_as_well(
    handler: Handler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutdown, "LAST_RESPONSES_SECONDS", 0)
    with anyio.fail_after(30):
        async with InMemoryStreamManager() as streams:
            stream = await streams.open("open")
            await stream.write(1)
            async with http_to(StreamsHTTP(streams), lifespan="off") as http, http.stream("GET", "/open") as answer:
                reading = Reading(answer)
                await reading.until(b"data: 1\nid: 0\n\n")
                os.kill(os.getpid(), signal.SIGTERM)
                assert (await reading.cut()).endswith(b"data: 1\nid: 0\n\n")  # an EventSource comes back by itself
            await stream.done()
    assert signal.getsignal(signal.SIGTERM) is handler


async def started(streams_http: StreamsHTTP) -> Callable[[], None]:
    """Start the stream `other`, and give what lets its producer end."""
    go = anyio.Event()

    async def produce(stream: StreamInput, _: anyio.Event) -> None:
        await stream.write("begun")
        await go.wait()

    await streams_http.runner.start("other", produce)
    return go.set
