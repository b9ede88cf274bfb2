"""An event loop in a thread of its own: when it starts, what is called in it, and how it ends."""

import functools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from contextlib import asynccontextmanager, contextmanager
from types import FrameType
from typing import Any, Final

import anyio
import pytest
from anyio.lowlevel import checkpoint

from streamkeep import StorageUnavailableError, StreamManagerClosedError, WrongEventLoopError, _loop_thread
from streamkeep._background import loop_here
from streamkeep._loop_thread import LoopThread, LoopThreads, Outcome, _after_fork

BOUND_SECONDS = 20


class Noted:
    """What is entered, and left."""

    def __init__(self) -> None:
        self.entered: list[int] = []
        self.left: list[int] = []

    @asynccontextmanager
    async def once(self) -> AsyncGenerator[int]:
        number = len(self.entered)
        self.entered.append(number)
        yield number
        self.left.append(number)


class Slow:
    """What is entered behind a gate; `fails`: and then not at all."""

    def __init__(self) -> None:
        self.entering = threading.Event()
        self.gate = threading.Event()
        self.fails = False
        self.begun = self.left = 0

    @asynccontextmanager
    async def once(self) -> AsyncGenerator[int]:
        self.begun += 1
        self.entering.set()
        await anyio.to_thread.run_sync(self.gate.wait, BOUND_SECONDS, abandon_on_cancel=True)
        if self.fails:
            raise ValueError("broken")
        yield self.begun

    @asynccontextmanager
    async def blocking(self) -> AsyncGenerator[int]:
        self.begun += 1
        self.entering.set()
        assert self.gate.wait(BOUND_SECONDS)
        if self.fails:
            raise ValueError("broken")
        yield self.begun
        self.left += 1


@pytest.fixture
def slow() -> Slow:
    return Slow()


def raised_by(call: Callable[[], object]) -> "tuple[threading.Thread, list[Exception]]":
    """Call something in a thread; give what it raises, when the thread has ended."""
    raised: list[Exception] = []

    def run() -> None:
        try:
            call()
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, raised


@contextmanager
def at_a_signal(handler: Callable[[], object]) -> Generator[Callable[[], object]]:
    """Have something called by a signal handler in the main thread, each time that what this gives is called, in any other thread."""
    handled = threading.Event()

    def handle(_number: int, _frame: FrameType | None) -> None:
        if not handled.is_set():
            handled.set()
            handler()

    def interrupt() -> None:
        handled.clear()
        # Python forgets to look when a signal comes in the moment before its main thread waits.
        while not handled.is_set():
            os.kill(os.getpid(), signal.SIGUSR1)
            handled.wait(0.1)

    before = signal.signal(signal.SIGUSR1, handle)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.fixture
def noted() -> Noted:
    return Noted()


@pytest.fixture
def threads(noted: Noted) -> Iterator[LoopThreads[int]]:
    threads = LoopThreads(noted.once)
    yield threads
    threads.close()


@pytest.fixture
def running(threads: LoopThreads[int]) -> LoopThread[int]:
    return threads.running()


async def here() -> int:
    return threading.get_ident()


def until(condition: Callable[[], object]) -> None:
    give_up = time.monotonic() + BOUND_SECONDS
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.01)


def test_it_starts_when_it_is_used_and_again_when_it_was_closed(threads: LoopThreads[int], noted: Noted) -> None:
    assert noted.entered == []
    assert not threads.is_running
    first = threads.running()
    assert threads.running() is first
    assert threads.is_running
    assert first.call(here) != threading.get_ident()
    threads.close()
    threads.close()
    assert (noted.left, first.is_over) == ([0], True)
    assert threads.running().entered == 1


def test_it_closes_when_nothing_refers_to_it_any_more(noted: Noted) -> None:
    threads = LoopThreads(noted.once)
    running = threads.running()
    del threads
    assert (noted.left, running.is_over) == ([0], True)


def test_what_is_raised_there_is_raised_here(running: LoopThread[int]) -> None:
    async def fail(error: BaseException) -> None:
        raise error

    for error in (ValueError("x"), SystemExit(1)):
        with pytest.raises(type(error)) as raised:
            running.call(fail, error)
        assert raised.value is error
    assert running.call(here)


def test_what_cannot_be_entered_says_so_where_it_is_used() -> None:
    @asynccontextmanager
    async def broken() -> AsyncGenerator[int]:
        raise ValueError("broken")
        yield 0

    with pytest.raises(ValueError, match="broken"):
        LoopThreads(broken).running()


def test_all_who_come_while_it_starts_share_that_start(slow: Slow) -> None:
    threads = LoopThreads(slow.once)
    waiting = [raised_by(threads.running) for _ in range(10)]
    assert slow.entering.wait(BOUND_SECONDS)
    until(lambda: threads._running is not None and len(threads._running._starting) == len(waiting))
    slow.gate.set()
    for thread, raised in waiting:
        thread.join(BOUND_SECONDS)
        assert raised == []
    assert (slow.begun, threads.running().entered) == (1, 1)
    threads.close()


def test_who_awaits_a_start_shares_it_and_takes_no_thread(slow: Slow) -> None:
    threads = LoopThreads(slow.once)

    async def wait() -> None:
        running, before = threads.starting(), threading.active_count()
        async with anyio.create_task_group() as tasks:
            for _ in range(60):
                assert threads.starting() is running
                tasks.start_soon(running.wait_async)
            while len(running._starting) < 60:
                await checkpoint()
            assert threading.active_count() <= before + 1  # that in which entering waits
            slow.gate.set()
        await running.wait_async()

    anyio.run(wait)
    assert (slow.begun, threads.running().entered) == (1, 1)
    threads.close()


def test_who_awaits_a_start_is_told_that_it_fails_or_takes_too_long(slow: Slow, monkeypatch: pytest.MonkeyPatch) -> None:
    async def wait(threads: LoopThreads[int]) -> None:
        await threads.starting().wait_async()

    monkeypatch.setattr(_loop_thread, "LEAVE_SECONDS", 0.0)
    blocked = LoopThreads(slow.blocking, 0.05)
    with pytest.raises(StorageUnavailableError):
        anyio.run(wait, blocked)
    slow.fails = True
    slow.gate.set()
    failing = LoopThreads(slow.once)
    with pytest.raises(ValueError, match="broken"):
        anyio.run(wait, failing)


def test_who_awaits_a_start_may_end_with_its_event_loop(slow: Slow) -> None:
    running = (threads := LoopThreads(slow.once)).starting()

    async def leave() -> None:
        running._starting.add(functools.partial(loop_here().call, list))

    anyio.run(leave)
    slow.gate.set()
    assert threads.running().entered == 1
    threads.close()


def test_a_start_that_fails_is_told_to_each_who_waits_and_the_next_starts_anew(slow: Slow) -> None:
    slow.fails = True
    threads = LoopThreads(slow.once)
    waiting = [raised_by(threads.running) for _ in range(3)]
    until(lambda: threads._running is not None and len(threads._running._starting) == len(waiting))
    slow.gate.set()
    for thread, raised in waiting:
        thread.join(BOUND_SECONDS)
        assert [str(error) for error in raised] == ["broken"]
    assert len({id(raised[0]) for _, raised in waiting}) == len(waiting)
    slow.fails = False
    assert threads.running().entered == 2
    threads.close()


def test_a_start_that_takes_too_long_is_given_up_and_the_next_starts_anew(slow: Slow) -> None:
    threads = LoopThreads(slow.once, 0.05)
    with pytest.raises(StorageUnavailableError, match=r"could not be opened within 0\.05 seconds"):
        threads.running()
    slow.gate.set()
    assert threads.running().entered == 2
    threads.close()


def test_a_start_that_blocks_its_event_loop_is_waited_for_no_longer_and_counts_when_it_is_there(
    slow: Slow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_loop_thread, "LEAVE_SECONDS", 0.0)
    threads = LoopThreads(slow.blocking, 0.05)
    for _ in range(2):
        with pytest.raises(StorageUnavailableError):
            threads.running()
    assert slow.begun == 1
    slow.gate.set()
    until(lambda: threads._running is not None and (threads._running._is_started or threads._running.is_over))
    assert threads.running().call(here)
    threads.close()


@pytest.mark.parametrize("enters", [True, False])
def test_closing_does_not_wait_for_a_start_that_blocks_its_event_loop(
    slow: Slow, enters: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the end of a program, say; and what is entered in spite of that is left."""
    monkeypatch.setattr(_loop_thread, "LEAVE_SECONDS", 0.05)
    slow.fails = not enters
    threads = LoopThreads(slow.blocking)
    waiting, raised = raised_by(threads.running)
    assert slow.entering.wait(BOUND_SECONDS)
    running = threads._running
    closing, failed = raised_by(threads.close)
    closing.join(BOUND_SECONDS)
    assert (closing.is_alive(), failed) == (False, [])
    assert running is not None
    assert running.is_over
    assert running._thread.is_alive()
    slow.gate.set()
    for thread in (waiting, running._thread):
        thread.join(BOUND_SECONDS)
        assert not thread.is_alive()
    assert slow.left == enters
    assert raised == [] if enters else [type(error) for error in raised] == [ValueError]


def test_what_is_no_exception_ends_a_start_and_not_who_waits() -> None:
    @asynccontextmanager
    async def broken() -> AsyncGenerator[int]:
        raise SystemExit(1)
        yield 0

    with pytest.raises(RuntimeError, match="could not be started"):
        LoopThreads(broken).running()


def test_closing_ends_a_start(slow: Slow) -> None:
    threads = LoopThreads(slow.once)
    thread, raised = raised_by(threads.running)
    assert slow.entering.wait(BOUND_SECONDS)
    threads.close()
    thread.join(BOUND_SECONDS)
    assert [type(error) for error in raised] == [StreamManagerClosedError]


def test_one_that_is_closed_before_its_event_loop_runs_is_left_at_once(noted: Noted) -> None:
    running = LoopThread(noted.once, BOUND_SECONDS)
    running._is_closed = True  # by who has found no event loop to tell
    running._thread.start()
    running._thread.join(BOUND_SECONDS)
    assert noted.left == noted.entered


def test_a_signal_handler_may_close_what_its_thread_waits_for(slow: Slow) -> None:
    threads = LoopThreads(slow.once)
    with at_a_signal(threads.close) as interrupt:
        _, failed = raised_by(lambda: slow.entering.wait(BOUND_SECONDS) and interrupt())
        with pytest.raises(StreamManagerClosedError):
            threads.running()
        slow.gate.set()

        running = threads.running()
        interrupting, failed_too = raised_by(interrupt)
        with pytest.raises(StreamManagerClosedError):
            running.call(anyio.sleep_forever)
        with threads._lock:
            threads.close()  # as if it came in between
    interrupting.join(BOUND_SECONDS)
    assert failed == failed_too == []
    assert not any(thread.name == "streamkeep" for thread in threading.enumerate())


def test_who_is_interrupted_while_it_starts_leaves_no_thread_behind_its_closing(slow: Slow) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    threads = LoopThreads(slow.once)
    with at_a_signal(interrupt) as send:
        raised_by(lambda: slow.entering.wait(BOUND_SECONDS) and send())
        with pytest.raises(KeyboardInterrupt):
            threads.running()
    slow.gate.set()
    assert threads.running().entered == 1
    running = threads.running()
    threads.close()
    assert not running._thread.is_alive()


def test_a_call_that_is_begun_when_all_is_over_is_told_so(running: LoopThread[int], threads: LoopThreads[int]) -> None:
    told: list[Outcome[int]] = []
    threads.close()
    running._is_closed = running._is_left = False  # as who has looked a moment before
    running.begin(told.append, here)
    with pytest.raises(StreamManagerClosedError):
        told[0].given()
    running._is_left = True


def test_a_call_that_is_begun_while_all_ends_is_told_so(running: LoopThread[int], monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Outcome[int]] = []
    monkeypatch.setattr(running, "_call", lambda _: setattr(running, "_is_left", True))  # the event loop takes it, and ends
    running.begin(told.append, here)
    with pytest.raises(StreamManagerClosedError):
        told[0].given()
    monkeypatch.setattr(running, "_is_left", False)


def test_a_call_that_the_event_loop_has_not_begun_is_told_of_its_end(
    running: LoopThread[int], threads: LoopThreads[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Outcome[int]] = []
    monkeypatch.setattr(running, "_call", lambda _: None)
    running.begin(told.append, here)
    monkeypatch.undo()
    threads.close()
    with pytest.raises(StreamManagerClosedError):
        told[0].given()


def test_what_starts_while_somebody_looks_is_not_waited_for(running: LoopThread[int]) -> None:
    class Meanwhile(set[Any]):
        def add(self, told: Any) -> None:
            super().add(told)
            running._is_started = True

    running._starting = Meanwhile()
    running._is_started = False
    running.wait()
    assert not running._starting


def test_nothing_is_called_before_there_is_an_event_loop(noted: Noted) -> None:
    running, called = LoopThread(noted.once, BOUND_SECONDS), list[int]()
    running.soon(lambda: called.append(1))
    running.spawn(checkpoint)
    running.close()
    running.start()
    assert (called, noted.entered, running._thread.ident) == ([], [], None)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_cannot_be_left_ends_its_thread() -> None:
    @asynccontextmanager
    async def broken() -> AsyncGenerator[int]:
        yield 0
        raise ValueError("broken")

    threads = LoopThreads(broken)
    running = threads.running()
    threads.close()
    assert not running._thread.is_alive()


def test_a_forked_child_is_told_that_it_is_its_parents(running: LoopThread[int], threads: LoopThreads[int]) -> None:
    running._process -= 1  # what it looks like in a child
    assert running.is_over
    with pytest.raises(WrongEventLoopError):
        running.call(here)
    running.close()
    running.soon(lambda: None)
    running.spawn(checkpoint)
    assert running._thread.is_alive()
    running._process = os.getpid()
    with threads._lock:
        _after_fork()
        assert threads.running() is running  # by a lock of its own


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_forked_child_starts_one_of_its_own(threads: LoopThreads[int], running: LoopThread[int]) -> None:
    ident = running.call(here)
    child = os.fork()
    if not child:
        try:
            own = threads.running()
            os._exit(0 if own is not running and own.entered == 1 and own.call(here) else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert running.call(here) == ident


def test_who_is_in_the_event_loop_cannot_wait_for_it(running: LoopThread[int]) -> None:
    async def inside() -> None:
        running.call(here)

    with pytest.raises(RuntimeError, match="must not be called in the event loop"):
        running.call(inside)


def test_closing_tells_those_who_wait_and_those_who_come_later(threads: LoopThreads[int], running: LoopThread[int]) -> None:
    begun, raised = threading.Event(), list[Exception]()

    async def sleep() -> None:
        begun.set()
        await anyio.sleep_forever()

    def wait() -> None:
        try:
            running.call(sleep)
        except StreamManagerClosedError as error:
            raised.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    assert begun.wait(BOUND_SECONDS)
    threads.close()
    waiting.join(BOUND_SECONDS)
    assert len(raised) == 1
    with pytest.raises(StreamManagerClosedError):
        running.call(here)


def test_who_comes_while_it_is_being_closed_is_told_so(running: LoopThread[int]) -> None:
    running.soon(running._tasks.stop)
    with pytest.raises(StreamManagerClosedError):
        running.call(here)


def test_a_call_that_is_interrupted_is_cancelled_there_and_over(
    running: LoopThread[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_loop_thread, "LEAVE_SECONDS", BOUND_SECONDS)  # a busy machine may need more than a second
    ended = threading.Event()

    async def sleep() -> None:
        try:
            await anyio.to_thread.run_sync(os.kill, os.getpid(), signal.SIGINT)
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.05)
            ended.set()

    with pytest.raises(KeyboardInterrupt):
        running.call(sleep)
    assert ended.is_set()


def test_what_is_called_soon_is_not_waited_for(running: LoopThread[int]) -> None:
    called, spawned = threading.Event(), threading.Event()

    async def set_spawned() -> None:
        spawned.set()

    running.soon(called.set)
    running.spawn(set_spawned)
    assert called.wait(BOUND_SECONDS)
    assert spawned.wait(BOUND_SECONDS)


def test_it_can_be_closed_in_its_own_thread(running: LoopThread[int], noted: Noted) -> None:
    running.soon(running.close)  # as the garbage collector may
    until(lambda: not running._thread.is_alive())
    assert noted.left == [0]


def test_a_call_is_made_in_the_context_of_who_makes_it(running: LoopThread[int]) -> None:
    from contextvars import ContextVar

    name: ContextVar[Any] = ContextVar("name")

    async def read() -> object:
        return name.get()

    name.set("mine")
    assert running.call(read) == "mine"


def test_threads_that_gevent_has_made_greenlets_are_refused(noted: Noted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkey: Any = type(sys)("gevent.monkey")
    monkey.is_module_patched = lambda name: name == "threading"
    monkeypatch.setitem(sys.modules, "gevent.monkey", monkey)
    with pytest.raises(RuntimeError, match="needs real threads"):
        LoopThreads(noted.once).running()
    assert noted.entered == []


def test_one_that_is_closed_before_it_was_started_is_closed() -> None:
    """As by a signal's handler, between its making and its start."""
    loop = LoopThread(Noted().once, 1.0)
    loop._is_closed = True
    with pytest.raises(StreamManagerClosedError):
        loop.wait()


AT_THE_END: Final = """
import asyncio
from contextlib import asynccontextmanager

from streamkeep._loop_thread import LoopThreads


@asynccontextmanager
async def connecting():
    yield
    await asyncio.get_running_loop().getaddrinfo("localhost", 1)
    print("found")
    try:
        await asyncio.to_thread(int, "a")
    except ValueError:
        print("raised")


threads = LoopThreads(connecting)
threads.running()
"""


def test_what_is_left_at_the_end_of_the_program_may_connect_by_a_name() -> None:
    ran = subprocess.run([sys.executable, "-c", AT_THE_END], capture_output=True, text=True, timeout=BOUND_SECONDS, check=False)
    assert (ran.returncode, ran.stdout.split(), ran.stderr) == (0, ["found", "raised"], "")


@pytest.mark.parametrize("is_end", [True, False])
def test_that_there_are_no_more_threads_at_the_end_of_the_program_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, *, is_end: bool
) -> None:
    raised: list[object] = []
    monkeypatch.setattr(threading, "excepthook", lambda told: raised.append(told.exc_value))

    @asynccontextmanager
    async def entered() -> AsyncGenerator[int]:
        yield 1
        raise RuntimeError("can't create new thread at interpreter shutdown" if is_end else "something else")

    threads = LoopThreads(entered)
    threads.running()
    threads.close()
    assert [str(error) for error in raised] == ([] if is_end else ["something else"])
