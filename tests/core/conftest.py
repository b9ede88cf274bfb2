"""Managers over a faulty memory storage, on virtual time: trio's clock jumps as soon as nobody has anything to do."""

import functools
import inspect
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import anyio
import pytest
import trio
from tests.core.helpers import Process
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
def memory(clock: Callable[[], float]) -> MemoryStorage:
    """What all processes share."""
    return MemoryStorage(clock=clock)


@pytest.fixture
def storage(memory: MemoryStorage) -> FaultyStorage:
    return FaultyStorage(memory)


@pytest.fixture
async def streams(storage: FaultyStorage) -> AsyncIterator[StreamManager]:
    async with StreamManager(storage) as manager:
        yield manager


@pytest.fixture
async def elsewhere(storage: FaultyStorage) -> AsyncIterator[StreamManager]:
    """Another process, over the same storage."""
    async with StreamManager(storage) as manager:
        yield manager


@pytest.fixture
async def mortal(memory: MemoryStorage) -> AsyncIterator[Process]:
    storage = FaultyStorage(memory)
    async with StreamManager(storage) as manager:
        yield Process(manager, storage)
        storage.is_down = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            # Handles are dropped here when a test has seen what it wants.
            item.add_marker(pytest.mark.filterwarnings("ignore:the writer of stream:ResourceWarning"))


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
