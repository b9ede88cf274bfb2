"""A process dies, or is stopped, between its commit and the ring that tells others of it: what they hear, and when."""

import os
import signal
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, Final

import anyio
import anyio.to_thread
import pytest
from tests.http.servers import until
from tests.torture.checker import Database
from tests.torture.stage import LEASE, Part, Stage, pipe, process_of

from streamkeep import StreamBusyError, StreamEventType, StreamInput, StreamManager, StreamNotFoundError
from streamkeep._subscription import Subscription
from streamkeep.storages.sqlite._notify import Changes, Notify

STREAM: Final = "answer"
DEEDS: Final[dict[str, Callable[[StreamManager, StreamInput], Awaitable[object]]]] = {
    "write": lambda _, stream: stream.write("unheard"),
    "done": lambda _, stream: stream.done("unheard"),
    "cancel": lambda streams, stream: streams.cancel(stream.id),
    "delete": lambda streams, stream: streams.delete(stream.id),
}


NEVER: Final = timedelta(hours=1)
WAIT_SECONDS: Final = 45
"""Generous, but less than the minute after which managers sweep: what is promised here must come without that."""


# In the process that is struck


def be_struck(part: Part, deed: str, blow: signal.Signals, go: Connection) -> None:
    """Write a chunk; when told to go, do the deed, and be struck when it is committed, nobody knows, and the lock is held."""
    anyio.run(_be_struck, part.stage, deed, blow, go)


async def _be_struck(stage: Stage, deed: str, blow: signal.Signals, go: Connection) -> None:
    async with short_lived(stage) as streams:
        stream = await streams.open(STREAM)
        await stream.write("first")
        await anyio.to_thread.run_sync(go.recv)
        _await_the_blow(Database(stage.database), blow)
        await DEEDS[deed](streams, stream)
        await anyio.sleep_forever()


def _await_the_blow(database: Database, blow: signal.Signals) -> None:
    publish, before = Notify.publish, database.streams()

    def publish_no_more(notify: Notify, checksums: Sequence[int]) -> Changes:
        if database.streams() != before:  # or else it was only a lease that was renewed
            Notify.publish = publish  # type: ignore[method-assign]  # the next one is told as ever
            signal.pthread_kill(threading.get_ident(), blow)  # a process's signal another thread may take, a little later
        return publish(notify, checksums)

    Notify.publish = publish_no_more  # type: ignore[method-assign,assignment]  # nothing else is called between the two


# In the test's


def short_lived(stage: Stage, grace: timedelta = timedelta(seconds=3)) -> StreamManager:
    return StreamManager.connect(stage.url, lease=LEASE, grace=grace)


@dataclass(frozen=True, slots=True)
class Victim:
    """The process that is struck as soon as `strike` is called."""

    stage: Stage
    process: ForkServerProcess
    strike: Callable[[], None]

    @property
    def is_stopped(self) -> bool:
        """Whether it was stopped and not killed."""
        stat = Path(f"/proc/{self.process.pid}/stat").read_text()
        return stat.rpartition(")")[2].split()[0] == "T"

    def go_on(self) -> None:
        """End its being stopped."""
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGCONT)


@asynccontextmanager
async def victim(directory: Path, deed: str, blow: signal.Signals) -> AsyncGenerator[Victim]:
    stage = Stage(directory, seed=0)
    theirs, ours = pipe()
    process = process_of(Part(stage, "victim"), be_struck, deed, blow, theirs)
    process.start()
    try:
        with ours, theirs:
            yield Victim(stage, process, lambda: ours.send("go"))
    finally:
        process.kill()
        process.join()
        process.close()


@asynccontextmanager
async def following(streams: StreamManager) -> AsyncGenerator[Subscription[Any]]:
    """Follow the victim's stream, from when it has written its first chunk, which is read already."""
    with anyio.fail_after(WAIT_SECONDS):
        while not await streams.list():  # noqa: ASYNC110 - it is written in another process
            await anyio.sleep(0.05)
    async with streams.subscribe(STREAM) as events:
        assert (await anext(events)).chunk == "first"
        yield events


async def the_rest(events: Subscription[Any]) -> list[object]:
    """Read to the end; give what was read."""
    with anyio.fail_after(WAIT_SECONDS):
        try:
            return [event.error.status if event.type is StreamEventType.ERROR else event.data async for event in events]
        except StreamNotFoundError:
            return ["deleted"]


async def take_over(streams: StreamManager) -> StreamInput:
    with anyio.fail_after(WAIT_SECONDS):
        while True:
            try:
                return await streams.open(STREAM, resume=True)
            except StreamBusyError as busy:
                await anyio.sleep(max(0.01, busy.retry_after))


@pytest.mark.timeout(180)
@pytest.mark.promise("P6")
async def test_what_a_process_died_over_telling_is_heard_when_its_lease_and_grace_have_passed(tmp_path: Path) -> None:
    read: dict[str, list[object]] = {}

    async def hear_of(deed: str) -> None:
        async with (
            victim(tmp_path / deed, deed, signal.SIGKILL) as writer,
            short_lived(writer.stage) as streams,
            following(streams) as events,
        ):
            writer.strike()
            read[deed] = await the_rest(events)

    async with anyio.create_task_group() as tasks:
        for deed in DEEDS:
            (tmp_path / deed).mkdir()
            tasks.start_soon(hear_of, deed)
    assert read == {
        "write": [b'"unheard"', "ABORTED"],
        "done": [b'"unheard"'],
        "cancel": ["CANCELLED"],
        "delete": ["deleted"],
    }


@pytest.mark.timeout(180)
async def test_what_a_process_died_over_telling_is_heard_with_the_next_change(tmp_path: Path) -> None:
    async with (
        victim(tmp_path, "write", signal.SIGKILL) as writer,
        short_lived(writer.stage, grace=NEVER) as streams,
        short_lived(writer.stage, grace=NEVER) as elsewhere,
        following(streams) as events,
    ):
        writer.strike()
        await anyio.to_thread.run_sync(writer.process.join, WAIT_SECONDS)
        successor = await take_over(elsewhere)
        assert successor.tail == 2
        with anyio.fail_after(WAIT_SECONDS):
            assert (await anext(events)).chunk == "unheard"


@pytest.mark.timeout(180)
async def test_while_a_process_is_stopped_that_holds_the_lock_readers_read_and_writers_wait(tmp_path: Path) -> None:
    opened = anyio.Event()

    async def open_another() -> None:
        async with streams.open("another"):
            opened.set()

    async with (
        victim(tmp_path, "write", signal.SIGSTOP) as writer,
        short_lived(writer.stage, grace=NEVER) as streams,
        following(streams) as events,
        anyio.create_task_group() as tasks,
    ):
        writer.strike()
        await until(lambda: writer.is_stopped)
        tasks.start_soon(open_another)
        for _ in range(50):
            async with streams.subscribe(STREAM, after=0) as replay:
                assert (await anext(replay)).chunk == "unheard"
        assert not opened.is_set()
        writer.go_on()
        with anyio.fail_after(WAIT_SECONDS):
            await opened.wait()
            assert (await anext(events)).chunk == "unheard"
