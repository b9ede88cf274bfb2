"""What is done for an event, counted: no busy machine disturbs that, as it disturbs every time that is measured."""

import asyncio
import gc
import tracemalloc
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from datetime import timedelta
from math import inf
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import anyio
import pytest
from tests.counts import calls_of, decoding
from tests.http.servers import until

import streamkeep
from streamkeep import ErrorInfo, StreamEvent, StreamInput, StreamManager
from streamkeep.http import SSEFraming, StreamsHTTP, shutdown
from streamkeep.http.pulse import Pulse
from streamkeep.http.response import Message, Receive, Send
from streamkeep.storages.memory import MemoryStorage
from streamkeep.testing.faults import FaultyStorage

pytestmark = pytest.mark.anyio

READERS: Final = 50
EVENTS: Final = 40
MOST_CALLS: Final = 75
MOST_CALLS_OF_A_READER: Final = 25
"""What costs most of an event is that many small functions are called: some 70, and 23 for each further reader."""
MOST_CALLS_OF_THE_LOOP: Final = 30
MOST_CALLS_OF_THE_LOOP_FOR_A_READER: Final = 12
"""What asyncio and anyio do of it: some 25 such calls, and 10 for each further reader."""
MOST_OBJECTS_OF_A_READER: Final = 130
MOST_BYTES_OF_A_READER: Final = 20_000
"""A reader that waits holds some 84 objects that the garbage collector knows, and 13 500 bytes: its request, its client and two tasks."""


class Client:
    """A client of an app in this process, which takes what it is sent at once.

    Attributes:
        events: how many it has been sent.
        sends: in how many messages.
    """

    def __init__(self) -> None:
        self.events = self.sends = 0
        self.left = asyncio.Event()

    async def receive(self) -> Message:
        """Wait until it leaves."""
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """Take a message."""
        found = message.get("body", b"").count(b"\ndata: ")
        self.events += found
        self.sends += found > 0


Show = Callable[[Receive, Send], Awaitable[None]]


@asynccontextmanager
async def following(show: Show, clients: int) -> AsyncGenerator[list[Client]]:
    """Have so many clients be shown something while within."""
    there = [Client() for _ in range(clients)]
    async with asyncio.TaskGroup() as tasks:
        for client in there:
            tasks.create_task(anyhow(show, client))
        yield there
        for client in there:
            client.left.set()


async def anyhow(show: Show, client: Client) -> None:
    await show(client.receive, client.send)


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch, *names: str) -> Generator[Counter[str]]:
    """Count what the event loop is asked for while within: for timers, for tasks, and from other threads, unless said otherwise.

    Its clock stands still meanwhile. What there is to do every second would be counted too, however little, on a machine that needs
    seconds for all of it.
    """
    calls: Counter[str] = Counter()
    loop = asyncio.get_running_loop()
    now = loop.time()
    with monkeypatch.context() as patch:
        patch.setattr(loop, "time", lambda: now)
        for name in names or ("call_at", "create_task", "call_soon_threadsafe"):
            patch.setattr(loop, name, _counting(calls, name, getattr(loop, name)))
        yield calls


def _counting(calls: Counter[str], name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def count(*args: Any, **options: Any) -> Any:
        calls[name] += 1
        return call(*args, **options)

    return count


def scope_of() -> dict[str, Any]:
    return {"type": "http", "asgi": {"spec_version": "2.3"}, "method": "GET", "query_string": b"", "headers": []}


@asynccontextmanager
async def shown(streams: StreamManager) -> AsyncGenerator[tuple[StreamInput, Show]]:
    """Give a stream, and what shows it."""
    http = StreamsHTTP(streams)
    async with http:
        stream = await streams.open("s")

        async def show(receive: Receive, send: Send) -> None:
            await http.show(scope_of(), receive, send, "s", framing=SSEFraming())

        yield stream, show


async def write(stream: StreamInput, readers: list[Client], count: int = EVENTS) -> None:
    """Write so many chunks, each when all readers have had the one before."""
    for number in range(count):
        before = readers[0].events
        await stream.write(number)
        while min(reader.events for reader in readers) == before:  # noqa: ASYNC110 - a turn of the loop is all that is waited for
            await asyncio.sleep(0)


async def test_a_live_event_is_read_by_nobody_framed_once_and_sets_no_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    framed: list[int] = []
    event = SSEFraming.event

    def note(self: SSEFraming, what: StreamEvent[object], cursor: str) -> bytes:
        framed.append(what.offset)
        return event(self, what, cursor)

    monkeypatch.setattr(SSEFraming, "event", note)
    storage = FaultyStorage(MemoryStorage())
    async with shown(StreamManager(storage)) as (stream, show), following(show, READERS) as readers:
        await write(stream, readers, 1)
        await asyncio.sleep(0.05)
        framed.clear()
        storage.calls.clear()
        with counted(monkeypatch) as calls:
            await write(stream, readers)
        assert framed == [*range(1, EVENTS + 1)]
        assert storage.calls == {"commit": EVENTS}
        assert calls == {}
        assert {reader.sends for reader in readers} == {EVENTS + 1}


async def test_an_event_passes_through_few_calls_and_through_fewer_for_each_reader() -> None:
    per_event, of_a_reader = await calls_for_an_event(streamkeep)
    assert per_event <= MOST_CALLS
    assert of_a_reader <= MOST_CALLS_OF_A_READER


async def calls_for_an_event(*packages: ModuleType) -> tuple[float, float]:
    """Say how many functions of these packages are called for an event with one reader, and for each further one."""
    per_event: dict[int, float] = {}
    for count in (1, 1 + READERS):
        async with shown(StreamManager(MemoryStorage())) as (stream, show), following(show, count) as readers:
            await write(stream, readers, 1)
            await asyncio.sleep(0.05)
            with calls_of(*packages) as calls:
                await write(stream, readers)
        per_event[count] = calls.total() / EVENTS
    return per_event[1], (per_event[1 + READERS] - per_event[1]) / READERS


async def test_an_event_has_little_done_by_the_event_loop_and_less_for_each_reader() -> None:
    per_event, of_a_reader = await calls_for_an_event(asyncio, anyio)
    assert per_event <= MOST_CALLS_OF_THE_LOOP
    assert of_a_reader <= MOST_CALLS_OF_THE_LOOP_FOR_A_READER


async def test_a_live_event_wakes_each_reader_once_and_makes_nothing_to_wait_with(monkeypatch: pytest.MonkeyPatch) -> None:
    async with shown(StreamManager(MemoryStorage())) as (stream, show), following(show, READERS) as readers:
        await write(stream, readers, 1)
        await asyncio.sleep(0.05)
        with counted(monkeypatch, "call_soon") as steps, calls_of(asyncio, anyio) as calls:
            await write(stream, readers)
    made = {name for name in calls if name.endswith(("__init__", "__new__"))}
    assert made <= {"Handle.__init__"}  # of what runs next, and neither of an event nor of a scope
    assert EVENTS * READERS <= steps["call_soon"] <= EVENTS * (READERS + 3)  # the others are this test's


async def test_what_happens_to_a_stream_costs_nothing_for_the_readers_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    costs: list[tuple[int, int]] = []
    for others in (1, READERS):
        streams = StreamManager(MemoryStorage())
        async with shown(streams) as (stream, show), following(show, 1) as (reader,), AsyncExitStack() as stack:
            for number in range(others):
                await stack.enter_async_context(streams.open(f"other{number}"))
                await stack.enter_async_context(streams.subscribe(f"other{number}"))
            await write(stream, [reader], 1)
            await asyncio.sleep(0.05)
            with counted(monkeypatch, "call_soon") as steps, calls_of(streamkeep) as calls:
                await write(stream, [reader])
        costs.append((steps.total(), calls.total()))
    assert costs[1] == costs[0]


class Louder(SSEFraming):
    """One of an app's own, whose frames depend on what it was made with."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name.encode()

    def event(self, event: StreamEvent[Any], cursor: str) -> bytes:
        return super().event(event, cursor).replace(b"chunk", self._name)


async def test_readers_are_shown_what_their_own_framing_makes() -> None:
    streams = StreamManager(MemoryStorage())
    async with StreamsHTTP(streams) as http:
        stream = await streams.open("s")
        bodies: dict[str, bytes] = {"one": b"", "two": b""}
        left = asyncio.Event()

        async def show(name: str) -> None:
            async def send(message: Message) -> None:
                bodies[name] += message.get("body", b"")

            async def receive() -> Message:
                await left.wait()
                return {"type": "http.disconnect"}

            await http.show(scope_of(), receive, send, "s", framing=Louder(name))

        async with asyncio.TaskGroup() as tasks:
            for name in bodies:
                tasks.create_task(show(name))
            await asyncio.sleep(0.05)
            await stream.write(1)
            await until(lambda: all(b"data: 1" in body for body in bodies.values()))
            left.set()
    assert all(f"event: {name}\n".encode() in body for name, body in bodies.items())


class Silent:
    """A response that has been silent for long."""

    sends = seen_sends = 0
    began_at, seen_at = inf, 0.0
    broken = 0

    def break_silence(self) -> None:
        self.broken += 1

    def end(self, why: ErrorInfo) -> None: ...


def test_responses_are_seen_to_in_the_next_event_loop_when_one_has_ended_without_a_word() -> None:
    pulse = Pulse(timedelta(milliseconds=5), timedelta(hours=1), lambda: False)

    async def show() -> None:
        pulse.add(Silent())
        await asyncio.sleep(0)

    loop = asyncio.new_event_loop()
    loop.run_until_complete(show())
    loop.close()

    async def show_again() -> None:
        pulse.add(there := Silent())
        await until(lambda: there.broken > 0)
        pulse.remove(there)

    asyncio.run(show_again())


async def test_a_reader_is_one_task_more_than_its_requests_own() -> None:
    async with shown(StreamManager(MemoryStorage())) as (_, show), following(show, 1):
        await asyncio.sleep(0.05)
        before = len(asyncio.all_tasks())
        async with following(show, READERS):
            await asyncio.sleep(0.05)
            assert len(asyncio.all_tasks()) - before == 2 * READERS


async def test_a_reader_that_waits_holds_little_and_sets_no_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    async with shown(StreamManager(MemoryStorage())) as (stream, show), following(show, 1) as readers:
        await write(stream, readers)
        gc.collect()
        objects = len(gc.get_objects())
        tracemalloc.start(1)
        try:
            with counted(monkeypatch) as calls:
                async with following(show, 4 * READERS):
                    for _ in range(20):
                        await asyncio.sleep(0)
                    gc.collect()
                    objects = len(gc.get_objects()) - objects
                    size, _ = tracemalloc.get_traced_memory()
                    timers = calls["call_at"]
        finally:
            tracemalloc.stop()
    assert objects / (4 * READERS) <= MOST_OBJECTS_OF_A_READER
    assert size / (4 * READERS) <= MOST_BYTES_OF_A_READER
    assert timers < 5  # the feed may set one


async def test_who_comes_reads_one_page_and_decodes_no_head_that_is_known_here() -> None:
    storage = FaultyStorage(MemoryStorage())
    async with shown(StreamManager(storage)) as (stream, show), following(show, 1) as (reader,):
        await write(stream, [reader])
        storage.calls.clear()
        with decoding() as decoded:
            async with following(show, READERS) as readers:
                await until(lambda: min(there.events for there in readers) == EVENTS)
        assert storage.calls == {"read": READERS}
        assert decoded.total() == 0


async def test_a_live_event_is_encoded_once_and_decoded_by_nobody() -> None:
    async with shown(StreamManager(MemoryStorage())) as (stream, show), following(show, READERS) as readers:
        await write(stream, readers, 1)
        await asyncio.sleep(0.05)
        with decoding() as calls:
            await write(stream, readers)
    assert calls == {"encode": EVENTS}


async def test_what_is_behind_is_sent_together() -> None:
    async with shown(StreamManager(MemoryStorage())) as (stream, show), following(show, 1) as (reader,):
        await write(stream, [reader], 1)
        for number in range(400):
            stream.write_soon(number)
        await until(lambda: reader.events == 401)
        assert reader.sends <= 3


async def stored(stream: StreamInput, *chunks: object) -> None:
    """Queue chunks, and let the loop go on for a little while after they are stored."""
    last = [stream.write_soon(chunk) for chunk in chunks][-1]
    while stream.tail <= last:  # noqa: ASYNC110 - as above
        await asyncio.sleep(0)
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_replay_to_many_who_are_equally_far_is_read_and_framed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    framed: Counter[int] = Counter()
    event = SSEFraming.event

    def note(self: SSEFraming, what: StreamEvent[object], cursor: str) -> bytes:
        framed[what.offset] += 1
        return event(self, what, cursor)

    monkeypatch.setattr(SSEFraming, "event", note)
    storage = FaultyStorage(MemoryStorage())
    streams, replayed = StreamManager(storage), 3_000
    async with shown(streams) as (stream, show):
        for number in range(replayed):
            stream.write_soon(number)
        await stream.done("end")
        framed.clear()
        async with following(show, 1) as (reader,):
            await until(lambda: reader.events == replayed + 1)
        storage.calls.clear()
        async with following(show, READERS) as readers:
            await until(lambda: min(reader.events for reader in readers) == replayed + 1)
        assert set(framed.values()) == {1}
        assert set(framed) == {*range(replayed + 1)}
        assert storage.calls == {"read": READERS}


class Saying(SSEFraming):
    """One of an app's own, with frames that are what it was made with."""

    def __init__(self, frame: bytes) -> None:
        super().__init__()
        self.kind = type(self), frame
        self._frame = frame

    def event(self, event: StreamEvent[Any], cursor: str) -> bytes:
        return self._frame


@pytest.mark.parametrize("frame", [b"data: 1\n\n", b""])
async def test_a_long_replay_lets_others_run_between_its_pages_also_if_nothing_of_it_is_sent(frame: bytes) -> None:
    pages = 20
    streams = StreamManager(MemoryStorage())
    async with StreamsHTTP(streams) as http:
        stream = await streams.open("s")
        for number in range(pages * 512):
            stream.write_soon(number)
            if number % 5_000 == 0:
                await stream.flush()
        await stream.done()
        client = Client()
        showing = asyncio.create_task(http.show(scope_of(), client.receive, client.send, "s", framing=Saying(frame)))
        turns = 0
        while not showing.done():
            await asyncio.sleep(0)
            turns += 1
        await showing
        assert turns >= pages


async def test_a_slow_storage_is_given_what_has_queued_by_one_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    streams = StreamManager.connect(f"sqlite:///{tmp_path}/s.db", lease=timedelta(hours=1))  # no sign of life meanwhile
    async with shown(streams) as (stream, show), following(show, 1) as (reader,):
        await write(stream, [reader], 1)
        await stored(stream, 0)
        with counted(monkeypatch) as calls:
            for number in range(EVENTS):
                await stored(stream, *[number] * 10)
        assert calls["create_task"] == 0
        assert calls["call_at"] < 5  # the feed sets one when the machine was so slow that the writer counts as quiet
        # Each commit is one wake-up of the event loop, however many records are in it, and no commit is of one record alone.
        assert calls["call_soon_threadsafe"] <= 2 * EVENTS


@pytest.mark.parametrize("turns", range(5))
async def test_a_response_that_begins_as_the_last_one_is_over_is_seen_to(turns: int) -> None:
    late = Silent()
    loop = asyncio.get_running_loop()

    class Watched(Pulse):
        def _look(self, now: float) -> None:
            super()._look(now)
            if not self._responses and not late.broken:
                begin(turns)

    pulse = Watched(timedelta(milliseconds=5), timedelta(hours=1), lambda: False)

    def begin(after: int) -> None:
        if after:
            loop.call_soon(begin, after - 1)
        else:
            pulse.add(late)

    pulse.add(first := Silent())
    await asyncio.sleep(0)
    pulse.remove(first)
    await until(lambda: late.broken > 0)
    pulse.remove(late)


async def test_responses_end_at_the_shutdown_that_comes_after_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutdown, "LAST_RESPONSES_SECONDS", 0.05)
    both = shutdown.Shutdown()
    first, second = anyio.Event(), anyio.Event()
    with both.draining(first):
        both.begun.set()
        assert not both.is_time_to_end()  # a producer is at work
    with both.draining(second):
        second.set()
        await asyncio.sleep(0.1)
        assert not both.is_time_to_end()  # nobody has said so since
        both.begun.set()
        await until(both.is_time_to_end)


def test_an_app_is_entered_in_the_next_event_loop_though_the_last_one_ended_without_a_word() -> None:
    streams = StreamManager(MemoryStorage())
    http = StreamsHTTP(streams)

    async def answer() -> None:
        async with http:
            async with streams.open("s", resume=False) as stream:
                await stream.write(1)
                await stream.done()
            client = Client()
            await http.show(scope_of(), client.receive, client.send, "s", framing=SSEFraming())
            assert client.events == 2
            await streams.delete("s")

    for _ in range(3):
        loop = asyncio.new_event_loop()
        loop.run_until_complete(answer())
        loop.close()


async def test_all_who_wait_for_the_last_responses_go_on_when_they_are_over() -> None:
    both = shutdown.Shutdown()
    began_at = asyncio.get_running_loop().time()
    async with asyncio.TaskGroup() as tasks:
        with both.responding():
            for _ in range(2):
                tasks.create_task(both.responses_ended())
            await asyncio.sleep(0.05)
    assert asyncio.get_running_loop().time() - began_at < shutdown.LAST_FRAME_SECONDS


async def test_writers_that_have_ended_leave_nothing_behind() -> None:
    async with StreamManager(MemoryStorage()) as streams:
        first = await streams.open("first", key="first", owner="ada")
        await asyncio.sleep(0.05)
        before = len(asyncio.all_tasks())
        for number in range(50):
            stream = await streams.open(f"s{number}", key=str(number), owner="ada")
            for chunk in range(10):
                stream.write_soon(chunk)
                await asyncio.sleep(0)
            await stream.done()
        await asyncio.sleep(0.05)
        assert len(asyncio.all_tasks()) == before
        await first.done()
