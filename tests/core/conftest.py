"""Managers over a faulty memory storage, on virtual time: trio's clock jumps as soon as nobody has anything to do."""

import functools
import inspect
from collections.abc import AsyncIterator, Callable, Iterator

import anyio
import pytest
import trio
from trio.testing import MockClock

from streamkeep import StreamManager
from streamkeep.storages.memory import MemoryStorage
from streamkeep.testing.faults import FaultyStorage

EPOCH = 1_800_000_000.0


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, object]]:
    return "trio", {"clock": MockClock(autojump_threshold=0)}


@pytest.fixture
def clock() -> Callable[[], float]:
    return lambda: EPOCH + trio.current_time()


@pytest.fixture
def storage() -> FaultyStorage:
    return FaultyStorage(MemoryStorage())


@pytest.fixture
async def streams(storage: FaultyStorage, clock: Callable[[], float]) -> AsyncIterator[StreamManager]:
    async with StreamManager(storage, clock=clock) as manager:
        yield manager


@pytest.fixture
async def elsewhere(storage: FaultyStorage, clock: Callable[[], float]) -> AsyncIterator[StreamManager]:
    """Another process, over the same storage."""
    async with StreamManager(storage, clock=clock) as manager:
        yield manager


@pytest.fixture
async def dead(storage: FaultyStorage, clock: Callable[[], float]) -> AsyncIterator[StreamManager]:
    """A process whose writers count as dead: its clock is an hour behind."""
    async with StreamManager(storage, clock=lambda: clock() - 3600) as manager:
        yield manager


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> None:
    """Fail a test that would wait for ever: hours pass in no time."""
    test = pyfuncitem.obj
    if inspect.iscoroutinefunction(test):

        @functools.wraps(test)
        async def in_time(**arguments: object) -> None:
            with anyio.fail_after(10_000):
                await test(**arguments)

        pyfuncitem.obj = in_time


@pytest.fixture
def quiet_logs(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level("WARNING", "streamkeep"):
        yield caplog
