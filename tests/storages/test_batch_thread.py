"""BatchThread: everything that is asked is answered, in order, many at a time; whatever is raised ends that job; forks find no session."""

import asyncio
import gc
import os
import threading
import time
import weakref
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Collection, Generator
from contextlib import asynccontextmanager, contextmanager
from itertools import islice

import anyio
import pytest
from tests.storages.failures import assert_each_has_its_own

from streamkeep.errors import StorageError
from streamkeep.storages import _batch_thread, _before_fork
from streamkeep.storages._batch_thread import BatchThread, Done, Job

BOUND_SECONDS = 20

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")


class OddError(BaseException):
    """No Exception, as native libraries raise them."""


class Session:
    """Notes what happens to it. A batch waits until it may `go`; at most `most` jobs are done at a time."""

    def __init__(self) -> None:
        self.opened = 0
        self.is_open = False
        self.batches: list[int] = []
        self.begun = threading.Event()
        self.go = threading.Event()
        self.go.set()
        self.most = 1_000_000
        self.is_large = True
        self.is_lost = False
        self.first: Callable[[], None] | None = None
        self.fails_to_open: BaseException | None = None
        self.fails_to_run: BaseException | None = None

    @contextmanager
    def open(self) -> Generator["Session"]:
        if self.fails_to_open is not None:
            raise self.fails_to_open
        self.opened += 1
        self.is_open = True
        try:
            yield self
        finally:
            self.is_open = False

    def run(self, session: "Session", jobs: Collection[Job["Session"]]) -> Done:
        self.begun.set()
        self.wait()
        assert self.is_open
        if self.fails_to_run is not None:
            raise self.fails_to_run
        done = list(islice(jobs, self.most))
        for job in done:
            try:
                job.run(session)
            except BaseException as error:
                job.fail(translate(error))
        self.batches.append(len(done))
        return Done(len(done), self.first, is_large=self.is_large and len(done) == self.most)

    def wait(self) -> None:
        assert self.go.wait(BOUND_SECONDS)

    def abandon(self) -> None:
        self.is_lost = True


class PoliteSession(Session):
    """Lets a fork go first while it waits."""

    def wait(self) -> None:
        while not self.go.wait(0.001):
            _before_fork.check()


def translate(error: BaseException) -> StorageError:
    failure = StorageError(f"failed: {error!r}")
    failure.__cause__ = error
    return failure


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@asynccontextmanager
async def running(session: Session) -> AsyncGenerator[BatchThread[Session]]:
    with anyio.fail_after(BOUND_SECONDS):
        async with BatchThread("tested", session.open, session.run, translate) as thread:
            yield thread


async def begun(session: Session) -> None:
    """Wait until a batch is under way."""
    with anyio.fail_after(BOUND_SECONDS):
        assert await asyncio.to_thread(session.begun.wait, BOUND_SECONDS)


def raising(error: BaseException) -> Callable[[Session], None]:
    def work(session: Session) -> None:
        raise error

    return work


# -- batches


async def test_what_is_asked_while_a_batch_is_under_way_is_the_next_one() -> None:
    session = Session()
    async with running(session) as thread:
        session.go.clear()
        first = thread.start(lambda _: -1)
        await begun(session)
        rest: list[asyncio.Future[int]] = []
        for turn in range(8):
            rest += [thread.start(lambda _, number=number: number) for number in range(8 * turn, 8 * turn + 8)]  # type: ignore[misc]
            await asyncio.sleep(0)  # handed over at the end of each turn
        session.go.set()
        assert await asyncio.gather(first, *rest) == [-1, *range(64)]
    assert session.batches == [1, 64]


async def test_a_batch_wakes_the_thread_once_and_the_loop_once(monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session()
    async with running(session) as thread:
        woken: Counter[str] = Counter()
        with monkeypatch.context() as patch:
            for there, name in ((thread._queue, "put"), (asyncio.get_running_loop(), "call_soon_threadsafe")):
                patch.setattr(there, name, counting(woken, name, getattr(there, name)))
            for _ in range(10):
                await asyncio.gather(*(thread.start(lambda _: 1) for _ in range(64)))
    assert session.batches == [64] * 10
    assert woken == {"put": 10, "call_soon_threadsafe": 10}


def counting(calls: Counter[str], name: str, call: Callable[..., object]) -> Callable[..., object]:
    def count(*args: object, **options: object) -> object:
        calls[name] += 1
        return call(*args, **options)

    return count


async def test_leaving_finishes_what_was_asked() -> None:
    session = Session()
    async with running(session) as thread:
        asked = [thread.start(lambda _, number=number: number) for number in range(3)]  # type: ignore[misc]
    assert [future.result() for future in asked] == [0, 1, 2]
    assert not session.is_open


async def test_no_more_is_done_than_the_loop_has_taken() -> None:
    """What was done in part goes on when the loop has it, so that results do not pile up before a loop that is busy."""
    session = Session()
    session.most = 2
    async with running(session) as thread:
        done: list[int] = []
        asked = [thread.start(lambda _, number=number: done.append(number)) for number in range(10)]  # type: ignore[misc]
        await asyncio.sleep(0)
        deadline = time.monotonic() + 0.2
        while time.monotonic() < deadline:  # the loop stands still
            assert len(done) <= 2
        await asyncio.gather(*asked)
    assert done == list(range(10))
    assert session.batches == [2] * 5


# -- failures


@pytest.mark.parametrize(
    "error", [RuntimeError("bug"), RecursionError(), MemoryError(), OddError("odd"), StopIteration(), SystemExit(3)]
)
async def test_whatever_a_batch_raises_those_who_asked_are_told_and_the_thread_goes_on(error: BaseException) -> None:
    session = Session()
    async with running(session) as thread:
        session.fails_to_run = error
        assert_each_has_its_own(await asyncio.gather(*(thread.start(lambda _: 1) for _ in range(300)), return_exceptions=True))
        session.fails_to_run = None
        assert await thread.start(lambda _: 1) == 1


@pytest.mark.parametrize("error", [OSError("no"), OddError("odd"), StorageError("no")])
async def test_whatever_opening_raises_whoever_enters_is_told(error: BaseException) -> None:
    session = Session()
    session.fails_to_open = error
    with pytest.raises(StorageError, match=r"no|odd"):
        async with running(session):
            pass


async def test_what_is_raised_before_delivery_keeps_nobody_waiting() -> None:
    session = Session()
    reported: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(str(context["exception"])))
    async with running(session) as thread:

        def first() -> None:
            raise RuntimeError("a bug")

        session.first = first
        assert await thread.start(lambda _: 1) == 1
    assert reported == ["a bug"]


async def test_a_thread_that_hangs_is_left_alone(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(_batch_thread, "_CLOSE_SECONDS", 0.05)
    session = Session()
    async with running(session) as thread:
        session.go.clear()
        asked = thread.start(lambda _: 1)
        await begun(session)
    assert not asked.done()
    assert "left to itself" in caplog.text
    session.go.set()
    assert await asked == 1


# -- forks


def forked(child: Callable[[], bool]) -> None:
    """Fork a child that must find this to be true."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = 0 if child() else 1
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@needs_fork
async def test_a_fork_finds_the_session_closed_and_the_next_batch_opens_it() -> None:
    session = Session()
    async with running(session) as thread:
        assert await thread.start(lambda _: 1) == 1
        forked(lambda: not session.is_open and not session.is_lost)
        assert await thread.start(lambda session: session.is_open)
        assert session.opened == 2


@needs_fork
@pytest.mark.parametrize("from_thread", [False, True])
async def test_a_fork_waits_for_the_batch_under_way(from_thread: bool) -> None:
    session = Session()
    async with running(session) as thread:
        session.go.clear()
        asked = thread.start(lambda _: 1)
        await begun(session)
        timer = threading.Timer(0.1, session.go.set)
        timer.start()
        if from_thread:
            await asyncio.to_thread(forked, lambda: session.batches == [1] and not session.is_open)
        else:
            forked(lambda: session.batches == [1] and not session.is_open)
        assert await asked == 1
        timer.join()


@needs_fork
async def test_a_busy_thread_lets_a_fork_have_its_turn() -> None:
    """A lock goes to whoever comes first, which is the thread that has just released it."""
    session = Session()
    session.most, session.is_large = 1, False  # so that one batch follows on the other
    async with running(session) as thread:
        asked = [thread.start(lambda _: time.sleep(0.002)) for _ in range(1000)]
        await begun(session)
        for _ in range(5):
            forked(lambda: not session.is_open)
        assert len(session.batches) < 500
        await asyncio.gather(*asked)


@needs_fork
async def test_a_fork_does_not_wait_longer_than_its_bound_for_all_threads_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_before_fork, "FORK_SECONDS", 0.2)
    sessions = [Session() for _ in range(5)]
    async with running(sessions[0]) as a, running(sessions[1]) as b, running(sessions[2]) as c, running(sessions[3]) as d:
        asked = []
        for session, thread in zip(sessions, (a, b, c, d), strict=False):
            session.go.clear()
            asked.append(thread.start(lambda _: 1))
            await begun(session)
        began_at = time.monotonic()
        forked(lambda: [session.is_lost for session in sessions] == [True] * 4 + [False])
        assert time.monotonic() - began_at < 0.7
        assert not any(session.is_lost for session in sessions)
        for session in sessions:
            session.go.set()
        assert await asyncio.gather(*asked) == [1] * 4
        for thread in (a, b, c, d):
            assert await thread.start(lambda session: session.is_open)
    assert [session.opened for session in sessions] == [1, 1, 1, 1, 0]


@needs_fork
async def test_a_session_that_waits_for_others_lets_a_fork_go_first() -> None:
    session = PoliteSession()
    async with running(session) as thread:
        session.go.clear()
        asked = thread.start(lambda _: 1)
        await begun(session)
        forked(lambda: not session.is_open and not session.is_lost)
        session.go.set()
        assert await asked == 1
    assert session.opened == 2
    assert session.batches == [1]


@needs_fork
async def test_forks_of_many_threads_at_once_get_on_with_threads_that_come_and_go() -> None:
    session = Session()
    async with running(session) as thread:

        async def come_and_go() -> None:
            for _ in range(20):
                other = Session()
                async with running(other) as another:
                    assert await another.start(lambda _: 1) == 1

        async def fork() -> None:
            for _ in range(10):
                await asyncio.to_thread(forked, lambda: not session.is_open)

        async def work() -> None:
            for number in range(300):
                assert await thread.start(lambda _: 1) == 1, number

        await asyncio.gather(*(run() for run in (fork, fork, fork, come_and_go, come_and_go, work)))
    assert not _before_fork._forks._registered


@needs_fork
async def test_a_child_that_forks_and_opens_is_a_process_like_any_other() -> None:
    session = Session()
    async with running(session) as thread:

        def child() -> bool:
            async def main() -> None:
                own = Session()
                async with running(own) as another:
                    assert await another.start(lambda _: 1) == 1
                    forked(lambda: not own.is_open)
                    assert await another.start(lambda _: 1) == 1

            asyncio.run(main())
            return True

        forked(child)
        assert await thread.start(lambda _: 1) == 1


async def test_a_thread_that_has_ended_is_kept_by_nobody() -> None:
    session = Session()
    thread = BatchThread("tested", session.open, session.run, translate)
    async with thread:
        assert await thread.start(lambda _: 1) == 1
    gone = weakref.ref(thread)
    del thread
    gc.collect()
    assert gone() is None
