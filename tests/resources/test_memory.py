"""What is stored may be large, and who reads it slow: memory stays bounded, by limits that are told and by pages."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import anyio
import anyio.abc
import pytest
from tests.http.servers import serving, until
from tests.resources.census import objects, traced_memory
from tests.resources.clients import Client, get
from tests.resources.large import CHUNK, over_sqlite, peak_of_not_reading, peak_of_reading, read_all, write_much

from streamkeep import InMemoryStreamManager, LimitExceededError, Limits, StreamInput, StreamManager
from streamkeep.http import StreamsHTTP
from streamkeep.http.runner import Runner
from streamkeep.storage import PAGE_BYTES
from streamkeep.storages.memory import MemoryStorage
from streamkeep.testing.clock import FakeClock

CHUNKS: Final = 512
"""So that a stream has 32 MiB."""
SLOW_READERS: Final = 20

pytestmark = pytest.mark.timeout(300)


@pytest.mark.promise("P9")
async def test_a_subscriber_that_never_reads_costs_a_few_pages_however_much_goes_by(tmp_path: Path) -> None:
    assert await peak_of_not_reading(tmp_path, CHUNKS) < 8 * PAGE_BYTES


@pytest.mark.promise("P9")
async def test_a_long_stream_is_read_from_its_start_with_a_few_pages_of_memory(tmp_path: Path) -> None:
    assert await peak_of_reading(tmp_path, CHUNKS) < 8 * PAGE_BYTES


@pytest.mark.promise("P9")
async def test_clients_that_do_not_read_cost_a_few_pages_each_and_lose_nothing(tmp_path: Path) -> None:
    async with over_sqlite(tmp_path) as streams, serving(StreamsHTTP(streams)) as url:
        port = urlsplit(url).port or 0
        writer = await streams.open("much")
        with traced_memory() as memory:
            async with Client.connected(port, receive_bytes=4_096) as slow, crowd_of_slow_readers(port):
                await slow.begin(get("/much"))
                await write_much(writer, CHUNKS)
                assert memory.peak() < 4 * PAGE_BYTES * SLOW_READERS
                body = await slow.read_to_the_end()
    chunks = (f'event: chunk\ndata: "{CHUNK}"\nid: {offset}\n\n' for offset in range(CHUNKS))
    assert bytes(body) == f"retry: 2000\n{''.join(chunks)}event: done\ndata: null\nid: {CHUNKS}\n\n".encode()


async def test_a_client_that_has_caught_up_costs_nothing_for_what_it_has_read() -> None:
    event = "object streamkeep.events.StreamEvent"
    held_by_others = objects()[event]  # such as the traceback of a test that has failed
    async with (
        InMemoryStreamManager() as streams,
        serving(StreamsHTTP(streams)) as url,
        streams.open("much") as writer,
        Client.connected(urlsplit(url).port or 0) as caught_up,
    ):
        for number in range(100):
            await writer.write(number)
        await caught_up.begin(get("/much"))
        await caught_up.read_until(b"data: 99\nid: 99\n\n")
        await until(lambda: objects()[event] <= held_by_others)


@asynccontextmanager
async def crowd_of_slow_readers(port: int) -> AsyncGenerator[None]:
    """Have clients that ask, and read the head of the answer and no more."""

    async def ask(*, task_status: anyio.abc.TaskStatus[None]) -> None:
        async with Client.connected(port, receive_bytes=4_096) as client:
            await client.begin(get("/much"))
            task_status.started()
            await anyio.sleep_forever()

    async with anyio.create_task_group() as clients:
        for _ in range(SLOW_READERS):
            await clients.start(ask)
        yield
        clients.cancel_scope.cancel()


async def test_a_page_that_was_read_is_not_kept_for_long_when_nobody_wants_it_any_more(tmp_path: Path) -> None:
    async with over_sqlite(tmp_path) as streams:
        await write_much(await streams.open("much"), CHUNKS)
        await read_all(streams, "much")
        with traced_memory() as memory:
            async with streams.subscribe("much") as events:
                await events.batch()
            await until(lambda: memory.now() < PAGE_BYTES // 2)


@pytest.mark.promise("P13")
async def test_a_producer_that_never_stops_is_stopped_by_a_limit_and_its_readers_are_told() -> None:
    async def never_stop(stream: StreamInput, _stop: anyio.Event) -> None:
        while True:
            await stream.write(CHUNK)

    async with MemoryStorage() as storage, StreamManager(storage, limits=Limits(max_stream_bytes=4 << 20)) as streams:
        with traced_memory() as memory:
            async with Runner(streams) as runner:
                await runner.start("endless", never_stop)
                await read_all(streams, "endless")
            assert memory.peak() < 8 << 20
        assert (await streams.info("endless")).error == "RESOURCE_EXHAUSTED"


@pytest.mark.promise("P13")
async def test_what_waits_to_be_stored_is_bounded_in_bytes_as_well() -> None:
    limits = Limits(max_stream_bytes=4 << 20)
    async with MemoryStorage() as storage, StreamManager(storage, limits=limits) as streams, streams.open("ahead") as writer:
        with traced_memory() as memory:
            with pytest.raises(LimitExceededError, match="max_stream_bytes"):
                while True:
                    writer.write_soon(CHUNK)
            assert memory.peak() < 5 << 20


@pytest.mark.promise("P1")
async def test_a_full_memory_has_room_as_soon_as_something_in_it_has_expired() -> None:
    clock = FakeClock()
    async with MemoryStorage(max_streams=3, clock=clock) as storage, StreamManager(storage) as streams:  # one is the session's
        for stream in ("first", "second"):
            async with streams.open(stream) as writer:
                await writer.done()
        clock.advance(timedelta(minutes=5).total_seconds())

        async with streams.open("third") as writer:
            await writer.done()
