"""A handle that everybody has dropped is gone at once, also after a failure: it must not wait for the garbage collector.

Until it is gone its lease is renewed, and nobody can take its stream over.
"""

import gc
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from weakref import ref

import anyio
import pytest
from anyio.lowlevel import checkpoint

from streamkeep import StreamInput, StreamManager
from streamkeep.errors import StorageError
from streamkeep.storages.memory import MemoryStorage
from streamkeep.testing.faults import FaultyStorage

from .probes import ProbedStorage
from .virtual_time import Workload


@pytest.fixture
def no_garbage_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


async def write(stream: StreamInput) -> None:
    with suppress(StorageError):
        await stream.write("a chunk")


async def write_soon(stream: StreamInput) -> None:
    stream.write_soon("a chunk")
    for _ in range(10):
        await checkpoint()


async def several_write_at_once(stream: StreamInput) -> None:
    async with anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(write, stream)


@pytest.mark.promise("P6")
@pytest.mark.filterwarnings("ignore:the writer of stream:ResourceWarning")
@pytest.mark.parametrize("fail", [write, write_soon, several_write_at_once])
async def test_a_handle_that_is_dropped_after_a_failure_is_gone_at_once(
    fail: Callable[[StreamInput], Awaitable[None]], no_garbage_collector: None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("CRITICAL", "streamkeep")  # what is captured would be kept, with all that its errors hold
    faulty = FaultyStorage(MemoryStorage())
    async with StreamManager(
        ProbedStorage(faulty, Workload())
    ) as streams:  # whose calls suspend, so that several are under way
        stream = await streams.open("answer")
        before = faulty.calls["commit"]
        faulty.refuse("commit")
        await fail(stream)
        assert faulty.calls["commit"] == before + 1
        handle = ref(stream)
        del stream
        assert handle() is None
