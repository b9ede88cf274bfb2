"""A writer that never stops writing, and those who want to end its stream, and are slower."""

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta

import anyio
import pytest
from tests.core.helpers import core_of, replay

from streamkeep import StreamCompletedError, StreamInput, StreamkeepError, StreamManager, StreamNotFoundError
from streamkeep._lifecycle import life_of
from streamkeep.storage import Head, Page
from streamkeep.storages.memory import MemoryStorage
from streamkeep.testing.faults import FaultyStorage

pytestmark = pytest.mark.anyio

Clock = Callable[[], float]
CANCELLED = ("CANCELLED", "the stream was cancelled")


class FarStorage(FaultyStorage):
    """The way to it takes a while, and back."""

    def __init__(self, memory: MemoryStorage, seconds: float) -> None:
        super().__init__(memory)
        self._seconds = seconds

    async def read(self, stream: str, start: int = 0, limit: int = 0) -> Page | None:
        page = await super().read(stream, start, limit)
        await anyio.sleep(self._seconds)
        return page

    async def commit(self, stream: str, seen: int | None, head: Head, records: Sequence[bytes] = ()) -> bool:
        await anyio.sleep(self._seconds)
        return await super().commit(stream, seen, head, records)

    async def delete(self, stream: str, seen: int) -> bool:
        await anyio.sleep(self._seconds)
        return await super().delete(stream, seen)


@pytest.fixture(params=[(0.001, 0.05), (0.01, 1.0), (4.0, 4.0)], ids=["far", "very far", "all slow"])
def seconds(request: pytest.FixtureRequest) -> tuple[float, float]:
    """How far the storage is for the writer, and for who wants to end its stream."""
    times: tuple[float, float] = request.param
    return times


@pytest.fixture
async def near(memory: MemoryStorage, seconds: tuple[float, float]) -> AsyncIterator[StreamManager]:
    async with StreamManager(FarStorage(memory, seconds[0])) as manager:
        yield manager


@pytest.fixture
async def far(memory: MemoryStorage, seconds: tuple[float, float]) -> AsyncIterator[StreamManager]:
    async with StreamManager(FarStorage(memory, seconds[1])) as manager:
        yield manager


@asynccontextmanager
async def writing(stream: StreamInput) -> AsyncGenerator[list[StreamkeepError]]:
    """Write all the time; give, at the end, what the writer was told."""
    told: list[StreamkeepError] = []

    async def write() -> None:
        try:
            while True:
                await stream.write("a")
        except StreamkeepError as error:
            told.append(error)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(write)
        await anyio.sleep(0.5)
        yield told


@pytest.mark.promise("P7")
async def test_who_is_slower_than_a_writer_can_cancel_its_stream(
    near: StreamManager, far: StreamManager, seconds: tuple[float, float], clock: Clock
) -> None:
    stream = await near.open("s")
    async with writing(stream) as told:
        began = clock()
        assert await far.cancel("s") is True
        assert clock() - began < 20 * seconds[1] + 1
        assert stream.cancelled.is_set()

    assert isinstance(told[0], StreamCompletedError)
    assert (await replay(near))[-1] == CANCELLED
    assert await far.cancel("s") is False


async def test_who_is_slower_than_a_writer_can_delete_its_stream(
    near: StreamManager, far: StreamManager, seconds: tuple[float, float], clock: Clock
) -> None:
    stream = await near.open("s")
    async with writing(stream) as told:
        began = clock()
        await far.delete("s")
        assert clock() - began < 20 * seconds[1] + 1

    assert isinstance(told[0], StreamCompletedError | StreamNotFoundError)
    with pytest.raises(StreamNotFoundError):
        await far.info("s")


async def test_a_stream_that_expires_before_who_cancels_it_sees_its_end_was_cancelled(
    near: StreamManager, far: StreamManager
) -> None:
    async with writing(await near.open("s", ttl=timedelta(milliseconds=20))):
        assert await far.cancel("s") is True


async def test_all_that_wait_for_a_stream_to_be_cancelled_are_told_that_it_is(near: StreamManager, far: StreamManager) -> None:
    stream = await near.open("s")
    answers: list[bool] = []

    async def cancel(streams: StreamManager) -> None:
        answers.append(await streams.cancel("s"))

    async with writing(stream), anyio.create_task_group() as tasks:
        for _ in range(5):
            tasks.start_soon(cancel, far)
        tasks.start_soon(cancel, near)

    assert any(answers)
    assert (await replay(near))[-1] == CANCELLED


async def test_what_was_queued_before_a_writer_cancels_its_stream_is_stored(streams: StreamManager) -> None:
    stream = await streams.open("s")
    for number in range(3):
        stream.write_soon(number)
    for outbox in core_of(streams).outboxes("s"):
        outbox.cancel(await streams_life(streams))
    with pytest.raises(StreamCompletedError, match="CANCELLED"):
        await stream.write("too late")
    with pytest.raises(StreamCompletedError, match="CANCELLED"):
        await stream.flush()

    assert await replay(streams) == [0, 1, 2, CANCELLED]


async def test_a_writer_that_completes_its_stream_does_not_cancel_it_as_well(
    streams: StreamManager, storage: FaultyStorage
) -> None:
    stream = await streams.open("s")
    life = await streams_life(streams)
    hold = storage.hold("commit")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stream.done, "end")
        await hold.reached.wait()
        for outbox in core_of(streams).outboxes("s"):
            outbox.cancel(life)
        hold.release()

    assert await replay(streams) == [("done", "end")]


async def test_a_writer_loses_nothing_if_its_stream_was_cancelled_before_it_has_done_so_itself(
    streams: StreamManager, elsewhere: StreamManager, storage: FaultyStorage
) -> None:
    async with streams.open("s") as stream:
        await stream.write("a")
        life = await streams_life(streams)
        hold = storage.hold("commit")
        for outbox in core_of(streams).outboxes("s"):
            outbox.cancel(life)
        await hold.reached.wait()
        assert await elsewhere.cancel("s") is True
        hold.release()
        await anyio.sleep(1)

    assert await replay(streams) == ["a", CANCELLED]


async def test_a_wish_to_cancel_an_earlier_stream_of_the_same_id_does_no_harm(
    streams: StreamManager, elsewhere: StreamManager
) -> None:
    await (await streams.open("s")).done()
    life = await streams_life(streams)
    await streams.delete("s")
    stream = await streams.open("s")
    await core_of(elsewhere).observer.tell(core_of(streams).session.name, "s", cancel=life)
    await anyio.sleep(10)
    await stream.done("end")

    assert await replay(streams) == [("done", "end")]


async def streams_life(streams: StreamManager) -> str:
    """Give what tells stream `s` from others that lived under its id."""
    page = await core_of(streams).storage.read("s")
    assert page is not None
    return life_of(page.head).state.life
