"""Leaving a reading from another task, or another thread, in whatever it waits for."""

import signal
import sys
import threading
from datetime import timedelta
from typing import Any

import anyio
import pytest
from anyio.abc import SocketStream
from tests.client.forms import HEAD, Answering, Form, answer, cut, silent, told
from tests.http.servers import until

from streamkeep import client
from streamkeep.client import Retry, sync

EVENT = b"id: 1\ndata: a\n\n"
BUSY = answer(b"", status=b"503 Busy", headers=b"Retry-After: 100\r\n")


async def one_event(connection: SocketStream) -> None:
    await connection.send(HEAD + b"%x\r\n%b\r\n" % (len(EVENT), EVENT))
    await connection.receive()


async def headless(connection: SocketStream) -> None:
    await connection.receive()


class Reader:
    """Somebody who reads, in a task or a thread of its own."""

    def __init__(self, form: Form, name: str, url: str, **options: Any) -> None:
        module = sync if form.is_blocking else client
        self.handle: Any = getattr(module, name)(url, read_timeout=None, **options)
        self.had: list[Any] = []
        self.error: BaseException | None = None
        self.is_done = False
        self._is_blocking = form.is_blocking
        self._thread: int | None = None

    async def run(self) -> None:
        if self._is_blocking:
            await anyio.to_thread.run_sync(self._block, abandon_on_cancel=True, limiter=anyio.CapacityLimiter(1))
        else:
            try:
                async with self.handle:
                    async for event in self.handle:
                        self.had.append(event)
            except RuntimeError as error:
                self.error = error
        self.is_done = True

    def _block(self) -> None:
        self._thread = threading.get_ident()
        try:
            with self.handle:
                self.had.extend(self.handle)
        except RuntimeError as error:
            self.error = error

    async def waits(self) -> None:
        """Return when it waits for the network, or for its next try."""
        if self._is_blocking:
            await until(self._is_in_a_wait)
        else:
            await anyio.wait_all_tasks_blocked()

    def _is_in_a_wait(self) -> bool:
        frame = sys._current_frames().get(self._thread or 0)
        return frame is not None and (frame.f_code.co_name, frame.f_code.co_filename.split("/")[-1]) in {
            ("read", "sync.py"),
            ("sleep", "_network.py"),
        }

    async def leave(self) -> None:
        if self._is_blocking:
            self.handle.close()
        else:
            await self.handle.aclose()


@pytest.mark.parametrize(
    ("name", "answers"),
    [
        ("events", [one_event]),
        ("events", [headless]),
        ("events", [cut(EVENT), headless]),
        ("events", [BUSY]),
        ("subscribe", [silent]),
        ("stream_flow", [silent]),
    ],
)
async def test_who_waits_is_woken_and_told_when_another_leaves(form: Form, name: str, answers: list[bytes | Answering]) -> None:
    with anyio.fail_after(20):
        async with told(*answers) as server, anyio.create_task_group() as tasks:
            reader = Reader(form, name, server.url, retry=Retry(first=timedelta(0)))
            tasks.start_soon(reader.run)
            await until(lambda: len(server.requests) == len(answers))
            await reader.waits()
            await reader.leave()
            await until(lambda: reader.is_done)
            await reader.leave()
    assert isinstance(reader.error, RuntimeError)
    assert "left" in str(reader.error)
    assert len(server.requests) == len(answers)


async def test_when_it_was_left_its_connection_is_closed(form: Form) -> None:
    gone = anyio.Event()

    async def watched(connection: SocketStream) -> None:
        try:
            await one_event(connection)
        finally:
            gone.set()

    with anyio.fail_after(20):
        async with told(watched) as server, anyio.create_task_group() as tasks:
            reader = Reader(form, "events", server.url)
            tasks.start_soon(reader.run)
            await until(lambda: server.requests and reader.had)
            await reader.waits()
            await reader.leave()
            await gone.wait()
    assert [event.data for event in reader.had] == ["a"]
    assert reader.handle.cursor == "1"


async def test_who_leaves_goes_on_behind_what_was_given_and_not_behind_what_had_come(form: Form) -> None:
    async with told(answer(EVENT + b"id: 2\ndata: b\n\n")) as server:
        if form.is_blocking:
            cursor = await anyio.to_thread.run_sync(_cursor_behind_one, server.url)
        else:
            async with client.events(server.url) as events:
                await anext(events)
            cursor = events.cursor
    assert cursor == "1"


def _cursor_behind_one(url: str) -> str | None:
    with sync.events(url) as events:
        next(events)
    return events.cursor


async def test_what_was_never_entered_can_be_left() -> None:
    await client.events("http://127.0.0.1:1/").aclose()
    sync.events("http://127.0.0.1:1/").close()


PROGRAM = """
import signal, sys
from streamkeep.client.sync import events
read = events(sys.argv[1], read_timeout=None)
signal.signal(signal.SIGTERM, lambda *_: read.close())
try:
    with read:
        for event in read:
            print(event.data, flush=True)
except RuntimeError as error:
    print(error)
"""


async def test_a_signal_handler_may_leave_what_its_own_thread_reads() -> None:
    with anyio.fail_after(30):
        async with told(one_event) as server, await anyio.open_process([sys.executable, "-c", PROGRAM, server.url]) as process:
            assert process.stdout is not None
            said = await process.stdout.receive()
            process.send_signal(signal.SIGTERM)
            async for more in process.stdout:
                said += more
            await process.wait()
    assert said.splitlines()[0] == b"a"
    assert b"left" in said
    assert process.returncode == 0


@pytest.mark.parametrize("name", ["events", "subscribe", "stream_flow"])
async def test_who_enters_what_was_closed_is_told_so(form: Form, name: str) -> None:
    async with told() as server:
        reader = Reader(form, name, server.url)
        await reader.leave()
        await reader.run()
        assert "closed before it was entered" in str(reader.error)
    assert server.requests == []


async def test_who_enters_while_another_thread_closes_it_is_told_so(form: Form) -> None:
    async with told() as server:
        reader = Reader(form, "events", server.url)
        read = reader.handle._read

        def closed_meanwhile() -> Any:
            reader.handle._is_left = True  # by who has found nothing to leave
            return read()

        reader.handle._read = closed_meanwhile
        await reader.run()
        assert "this has been left" in str(reader.error)
    assert server.requests == []
