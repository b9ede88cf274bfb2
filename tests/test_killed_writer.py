"""A writer's process is killed with `kill -9` in mid-stream, over SQLite: a real process, a real file."""

import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import anyio
import pytest

from streamkeep import ErrorInfo, StreamBusyError, StreamEventType, StreamInput, StreamManager
from streamkeep.storages.sqlite import SQLiteStorage

LEASE = timedelta(seconds=1)
GRACE = timedelta(seconds=1)

PRODUCER = """
import asyncio, sys
from datetime import timedelta
from streamkeep import StreamManager

async def main():
    async with StreamManager.connect(sys.argv[1], lease=timedelta(seconds=1), grace=timedelta(seconds=1)) as streams:
        async with streams.open("answer") as stream:
            for number in range(1_000_000):
                print(await stream.write(number), flush=True)

asyncio.run(main())
"""


def kill_a_producer(url: str, *, after_offset: int) -> int:
    """Run a producer, kill it when it has been told that so much is stored, and give the last offset that it was told of."""
    command = [sys.executable, "-c", PRODUCER, url]
    last = -1
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as producer:
        assert producer.stdout is not None
        for line in producer.stdout:
            last = int(line)
            if last == after_offset:
                producer.send_signal(signal.SIGKILL)
        assert producer.wait(10) == -signal.SIGKILL
    assert last >= after_offset
    return last


@pytest.mark.promise("P6")
async def test_readers_of_a_killed_writer_get_all_that_was_acknowledged_and_then_aborted(tmp_path: Path) -> None:
    path = tmp_path / "streams.db"
    last = kill_a_producer(f"sqlite:///{path}", after_offset=200)
    with anyio.fail_after(30):
        async with (
            SQLiteStorage(path) as storage,
            StreamManager(storage, lease=LEASE, grace=GRACE) as streams,
            streams.subscribe("answer") as events,
        ):
            received = [event async for event in events]
    *chunks, end = received

    assert [event.chunk for event in chunks] == list(range(len(chunks)))
    assert [event.offset for event in chunks] == list(range(len(chunks)))
    assert len(chunks) > last
    assert end.type is StreamEventType.ERROR
    assert end.error == ErrorInfo("ABORTED", "the writer went away before the stream was completed")


@pytest.mark.promise("P6")
async def test_a_new_writer_goes_on_where_a_killed_one_was(tmp_path: Path) -> None:
    path = tmp_path / "streams.db"
    last = kill_a_producer(f"sqlite:///{path}", after_offset=50)
    with anyio.fail_after(30):
        async with SQLiteStorage(path) as storage, StreamManager(storage, lease=LEASE, grace=timedelta(minutes=1)) as streams:
            stream = await open_when_lapsed(streams)
            assert stream.tail > last
            offset = await stream.write("another writer")
            await stream.done("together")
            async with streams.subscribe("answer", after=offset - 2) as events:
                seen = [(event.offset, event.data) async for event in events]
    assert seen == [(offset - 1, b"%d" % (offset - 1)), (offset, b'"another writer"'), (offset + 1, b'"together"')]


async def open_when_lapsed(streams: StreamManager) -> StreamInput:
    while True:
        try:
            return await streams.open("answer", resume=True)
        except StreamBusyError as busy:
            await anyio.sleep(max(0.01, busy.retry_after))
