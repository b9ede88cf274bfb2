"""`streamkeep.sync`: what does not await, in threads, scripts and forked workers."""

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from tests.core.test_loop_thread import at_a_signal
from tests.inside import feeds_of, threads_of_ours

from streamkeep import (
    ErrorInfo,
    InMemoryStreamManager,
    InvalidArgumentError,
    KeyInUseError,
    PublicError,
    Recovery,
    StorageError,
    StreamAlreadyExistsError,
    StreamBusyError,
    StreamEvent,
    StreamInputClosedError,
    StreamManagerClosedError,
    StreamNotFoundError,
    StreamTimeoutError,
)
from streamkeep.sync import StreamManager

BOUND_SECONDS = 20


@pytest.fixture
def streams() -> Iterator[StreamManager]:
    with StreamManager.connect("memory://") as streams:
        yield streams


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/streams.db"


def values(streams: StreamManager, stream: str, **options: Any) -> list[object]:
    found: list[object] = []
    for event in streams.subscribe(stream, **options):
        match event.type:
            case "chunk":
                found.append(event.chunk)
            case "done":
                found.append(event.output)
            case _:
                found.append(event.error.status)
    return found


def until(condition: Callable[[], object]) -> None:
    give_up = time.monotonic() + BOUND_SECONDS
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.01)


def in_thread(call: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=call)
    thread.start()
    return thread


def joined(*threads: threading.Thread) -> None:
    for thread in threads:
        thread.join(BOUND_SECONDS)
        assert not thread.is_alive()


# The same as with `await`


def test_what_is_written_is_read_by_another_manager(url: str) -> None:
    with StreamManager.connect(url) as here, StreamManager.connect(url) as elsewhere:
        with here.open("s", metadata={"of": "test"}, key="k") as stream:
            assert [stream.write(number) for number in range(3)] == [0, 1, 2]
            assert stream.write_soon("soon") == 3
            stream.flush()
            assert (stream.tail, stream.key, stream.metadata, stream.is_closed) == (4, "k", {"of": "test"}, False)
            stream.done("end")
        assert stream.is_closed
        assert values(elsewhere, "s") == [0, 1, 2, "soon", "end"]
        assert values(elsewhere, "s", after=2) == ["soon", "end"]
        assert values(elsewhere, "s", last=1) == ["end"]
        assert [event.chunk for event in elsewhere.subscribe("s", chunk_type=str, after=2) if event.type == "chunk"] == ["soon"]


def test_streams_are_looked_up_listed_cancelled_and_deleted(streams: StreamManager) -> None:
    stream = streams.open("a", owner="ann", key="k", run="r")
    assert streams.info("a").status == "open"
    assert streams.current("k", "ann").id == streams.started_by("r", "ann").id == "a"
    assert [info.id for info in streams.list(owner="ann", key_prefix="k")] == ["a"]
    assert streams.cancel("a")
    assert not streams.cancel("a")
    assert stream.cancelled.wait(BOUND_SECONDS)
    streams.sweep()
    streams.delete("a")
    assert [*streams.list()] == []


def test_errors_are_those_of_the_methods_that_await(streams: StreamManager) -> None:
    stream = streams.open("s", key="k")
    with pytest.raises(StreamAlreadyExistsError):
        streams.open("s")
    with pytest.raises(KeyInUseError):
        streams.open("other", key="k")
    with pytest.raises(InvalidArgumentError):
        streams.open("")
    with pytest.raises(InvalidArgumentError):
        stream.write(object())
    stream.done()
    for call in (lambda: stream.write(1), lambda: stream.write_soon(1), stream.done):
        with pytest.raises(StreamInputClosedError):
            call()
    with pytest.raises(StreamNotFoundError), streams.subscribe("unknown"):
        pytest.fail("it was entered")
    with pytest.raises(StreamNotFoundError):
        next(streams.subscribe("unknown"))
    with pytest.raises(InvalidArgumentError):
        StreamManager.connect("nosuch://storage")


def test_a_storage_that_cannot_be_opened_is_told_at_each_use(tmp_path: Path) -> None:
    streams = StreamManager.connect(f"sqlite:///{tmp_path}/missing/streams.db")
    for _ in range(2):
        with pytest.raises(StorageError):
            streams.info("s")


@pytest.mark.parametrize("raised", [ValueError("secret"), PublicError("NOT_FOUND", "no model")])
def test_an_exception_completes_the_stream_and_arrives_bare(streams: StreamManager, raised: Exception) -> None:
    with pytest.raises(type(raised)) as caught, streams.open("s") as stream:
        stream.write("a")
        raise raised
    assert caught.value is raised
    assert values(streams, "s") == ["a", "NOT_FOUND" if isinstance(raised, PublicError) else "INTERNAL"]


def test_leaving_without_done_releases_the_stream(streams: StreamManager) -> None:
    with streams.open("s") as stream:
        stream.write("a")
    with streams.open("s", resume=True) as stream:
        assert stream.tail == 1
        stream.error(ErrorInfo("ABORTED", "enough"))
    assert values(streams, "s") == ["a", "ABORTED"]


def test_what_native_code_raises_harms_nobody_else(streams: StreamManager) -> None:
    class Panic(BaseException):
        pass

    def encode(_: object) -> bytes:
        raise Panic

    stream = streams.open("s", encode=encode)
    with pytest.raises((Panic, InvalidArgumentError)):
        stream.write(1)
    assert streams.info("s").tail == 0


# Threads


def test_threads_write_one_stream_and_follow_it(streams: StreamManager) -> None:
    stream = streams.open("s")
    found: list[list[object]] = []
    readers = [in_thread(lambda: found.append(values(streams, "s"))) for _ in range(3)]
    writers = [in_thread(lambda name=name: [stream.write([name, number]) for number in range(50)]) for name in "abc"]  # type: ignore[misc]
    joined(*writers)
    stream.done("end")
    joined(*readers)

    assert found[0] == found[1] == found[2]
    assert found[0][-1] == "end"
    for name in "abc":
        assert [chunk for chunk in found[0][:-1] if chunk[0] == name] == [[name, number] for number in range(50)]  # type: ignore[index]


def test_a_writer_learns_that_its_stream_was_cancelled(streams: StreamManager) -> None:
    stream = streams.open("s")
    assert not stream.cancelled.wait(0.01)
    waiting = in_thread(lambda: stream.cancelled.wait(BOUND_SECONDS))
    assert streams.cancel("s")
    joined(waiting)
    assert stream.cancelled.is_set()
    assert stream.cancelled.wait()


def test_a_block_that_is_left_in_mid_stream_follows_no_more(streams: StreamManager) -> None:
    stream = streams.open("s")
    stream.write("a")
    stream.write("b")
    with streams.subscribe("s") as events:
        assert next(events).chunk == "a"
        assert events.first_offset == 0
        assert events.life == streams.info("s").life
        assert [event.chunk for event in events.batch()] == ["b"]
        assert feeds_of(inside(streams))
    assert not feeds_of(inside(streams))
    for _ in streams.subscribe("s"):
        break
    gc.collect()
    until(lambda: not feeds_of(inside(streams)))
    stream.done()
    assert len(values(streams, "s")) == 3
    assert not feeds_of(inside(streams))


def inside(streams: StreamManager) -> Any:
    """Give the manager that awaits."""
    return streams._running().entered


def test_a_reader_that_waits_may_be_interrupted_and_go_on(streams: StreamManager) -> None:
    class Interrupted(BaseException):
        pass

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise Interrupted

    stream = streams.open("s")
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with streams.subscribe("s") as events:
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            with pytest.raises(Interrupted):
                next(events)
            stream.write("a")
            assert next(events).chunk == "a"
    finally:
        signal.signal(signal.SIGALRM, before)
    with pytest.raises(StreamTimeoutError):
        values(streams, "s", after=0, idle_timeout=timedelta(seconds=0.01))
    stream.done()


def test_a_reader_that_is_interrupted_when_events_come_has_them_next(
    streams: StreamManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with streams.open("s") as stream, at_a_signal(interrupt), streams.subscribe("s") as events:
        batch = events._events.batch

        async def come() -> list[StreamEvent[Any]]:
            came = await batch()
            os.kill(os.getpid(), signal.SIGUSR1)
            return came

        monkeypatch.setattr(events._events, "batch", come)
        stream.write("a")
        with pytest.raises(KeyboardInterrupt):
            next(events)
        assert next(events).chunk == "a"
        stream.done()


def test_a_stream_that_is_opened_while_who_opens_it_is_interrupted_is_released(
    streams: StreamManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    open_there = inside(streams).open

    async def opened(stream: str, **options: Any) -> object:
        opened = await open_there(stream, **options)
        os.kill(os.getpid(), signal.SIGUSR1)
        return opened

    def go_on() -> bool:
        with suppress(StreamBusyError):
            streams.open("s", resume=True).done()
        return streams.info("s").status == "done"

    with at_a_signal(interrupt), monkeypatch.context() as patch:
        patch.setattr(inside(streams), "open", opened)
        with pytest.raises(KeyboardInterrupt):
            streams.open("s")
    until(go_on)


async def test_it_may_be_used_where_an_event_loop_runs_as_in_a_notebook(streams: StreamManager) -> None:
    with streams.open("s") as stream:
        stream.done("end")
    assert values(streams, "s") == ["end"]
    await asyncio.sleep(0)


def test_what_is_called_in_its_own_event_loop_is_refused_and_not_waited_for(streams: StreamManager) -> None:
    told: list[object] = []

    def encode(chunk: object) -> bytes:
        with pytest.raises(RuntimeError) as refused:
            streams.info("s")
        told.append(refused.value)
        return b"1"

    streams.open("s", encode=encode).write(1)
    assert told


# Its life


def test_it_starts_when_it_is_used_and_again_when_it_was_closed(url: str) -> None:
    threads = threads_of_ours()
    streams = StreamManager.connect(url)
    assert threads_of_ours() <= threads
    stream = streams.open("s")
    stream.write("a")
    streams.close()
    streams.close()
    assert threads_of_ours() <= threads
    with pytest.raises(StreamManagerClosedError):
        stream.write("b")
    with streams.open("s", resume=True) as stream:
        assert stream.tail == 1
    streams.close()
    assert threads_of_ours() <= threads


def test_closing_tells_those_who_wait(streams: StreamManager) -> None:
    stream = streams.open("s")
    stream.write("a")
    told: list[BaseException] = []
    begun = threading.Semaphore(0)

    def tell(call: Callable[[], object]) -> None:
        try:
            begun.release()
            call()
        except StreamManagerClosedError as error:
            told.append(error)

    waiting = [in_thread(lambda: tell(lambda: values(streams, "s"))), in_thread(lambda: tell(stream.cancelled.wait))]
    for _ in waiting:
        begun.acquire(timeout=BOUND_SECONDS)
    until(lambda: feeds_of(inside(streams)))
    time.sleep(0.1)
    streams.close()
    joined(*waiting)
    assert len(told) == 1
    assert stream.cancelled.is_set()


def test_one_that_is_dropped_leaves_no_thread(url: str) -> None:
    threads = threads_of_ours()
    for by_url in (True, False):
        streams = StreamManager.connect(url) if by_url else StreamManager(InMemoryStreamManager)
        assert [*streams.list()] == []
        assert threads_of_ours() > threads
        del streams
        gc.collect()
        until(lambda: threads_of_ours() <= threads)


PROGRAM = """
import sys
from streamkeep.sync import StreamManager

streams = StreamManager.connect(sys.argv[1])
stream = streams.open("s")
stream.write("a")
"""


def test_the_end_of_a_program_releases_what_it_writes(url: str) -> None:
    subprocess.run([sys.executable, "-W", "error", "-c", PROGRAM, url], check=True, timeout=60)
    with StreamManager.connect(url) as streams, streams.open("s", resume=True) as stream:
        assert stream.tail == 1


# Forks


def in_child(call: Callable[[], object]) -> str:
    """Run something in a forked child; give what it raised, or gave."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            answer = repr(call())
        except BaseException as error:
            answer = type(error).__name__
        os.write(write, answer.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return answer


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_forked_child_starts_anew(url: str) -> None:
    streams = StreamManager.connect(url)

    def use() -> object:
        with streams.open("child") as other:
            other.write("c")
            other.done()
        found = values(streams, "child")
        streams.close()
        return found

    stream = streams.open("s")
    stream.write("a")
    with streams.subscribe("s") as events:
        next(events)
        assert in_child(lambda: stream.write("b")) == "WrongEventLoopError"
        assert in_child(lambda: stream.write_soon("b")) == "WrongEventLoopError"
        assert in_child(lambda: next(events)) == "WrongEventLoopError"
        assert in_child(lambda: streams.info("s").status) == repr("open")
        assert in_child(use) == repr(["c", None])
        stream.write("b")
        assert next(events).chunk == "b"
    streams.close()


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_child_that_was_forked_while_another_thread_was_starting_starts_anew(url: str) -> None:
    streams = StreamManager.connect(url)
    with streams._threads._lock:
        assert in_child(lambda: [*streams.list()]) == "[]"
    assert [*streams.list()] == []
    streams.close()


def test_streams_that_were_left_are_gone_on_with(url: str) -> None:
    with StreamManager.connect(url) as before, before.open("s", recovery=Recovery("go", {"question": "why"})) as stream:
        stream.write("a", checkpoint=1)
        stream.save_checkpoint(2)
    with StreamManager.connect(url) as streams:
        with streams.recoveries("go") as lost:
            stream = next(lost)
        assert (stream.id, stream.recovery, stream.attempt) == ("s", Recovery("go", {"question": "why"}), 0)
        assert (stream.checkpoint, stream.tail) == (2, 2)
        stream.restart()
        stream.write_soon("b", checkpoint=1)
        stream.done("end")
        types = [str(event.type) for event in streams.subscribe("s")]
        assert types == ["chunk", "recovering", "restarted", "chunk", "done"]
        assert values(streams, "s", after=2) == ["b", "end"]
        assert [str(event.type) for event in streams.subscribe("s", superseded=False)] == ["restarted", "chunk", "done"]


def test_who_waits_for_streams_to_go_on_with_is_told_that_the_manager_is_closed(streams: StreamManager) -> None:
    with streams.recoveries("go") as lost:
        threading.Timer(0.2, streams.close).start()
        with pytest.raises(StreamManagerClosedError):
            next(lost)
