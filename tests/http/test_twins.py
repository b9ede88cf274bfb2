"""Twins: requests that are sent with one Idempotency-Key, all before the first is answered. One is in the app at a time."""

import logging
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import anyio
import httpx
import pytest
from tests.http.servers import STREAM_ID, http_to, until

from streamkeep import StreamManager
from streamkeep.errors import PublicError
from streamkeep.http import DurableStreaming, StreamsHTTP, claim
from streamkeep.http.access import Access
from streamkeep.http.response import Message, Receive, Scope, Send
from streamkeep.storages.memory import MemoryStorage
from streamkeep.testing.faults import FaultyStorage

ONCE: Final = {"Idempotency-Key": "k"}
STREAMS: Final = ("text/event-stream", b"data: %d\n\n")
JSON: Final = ("application/json", b"%d")


class Told(StreamManager):
    """Counts who has begun to wait for a stream."""

    waits = 0

    def subscribe(self, *args: Any, **options: Any) -> Any:
        self.waits += 1
        return super().subscribe(*args, **options)


class Gated:
    """An app that answers when it is let, with the number of the call; and counts how many are in it at a time."""

    def __init__(
        self, *answers: tuple[str, bytes], before_head: bool = True, minds_leaving: bool = False, fails: bool = False
    ) -> None:
        self.calls = 0
        self.inside = 0
        self.most_inside = 0
        self.go = anyio.Event()
        self._answers = answers or (STREAMS,)
        self._before_head = before_head
        self._minds_leaving = minds_leaving
        self._fails = fails

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"  # it knows no lifespan
        number = self.calls = self.calls + 1
        with self._counted():
            if self._before_head and not await self._waited(receive):
                return
            if self._fails:
                raise ValueError("the app fails before its head")
            media_type, body = self._answers[min(number, len(self._answers)) - 1]
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", media_type.encode())]})
        await self.go.wait()
        await send({"type": "http.response.body", "body": body % number})

    async def _waited(self, receive: Receive) -> bool:
        if not self._minds_leaving:
            await self.go.wait()
            return True
        while (await receive())["type"] != "http.disconnect":
            pass
        return False

    @contextmanager
    def _counted(self) -> Generator[None]:
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        try:
            yield
        finally:
            self.inside -= 1


class Twins:
    """Requests that are under way."""

    def __init__(self, http: httpx.AsyncClient, tasks: anyio.abc.TaskGroup) -> None:
        self.answers: list[httpx.Response] = []
        self._http = http
        self._tasks = tasks

    def send(self, **options: Any) -> anyio.CancelScope:
        """Send one; cancelling what this gives is going away."""
        scope = anyio.CancelScope()
        self._tasks.start_soon(self._post, scope, {"headers": ONCE, **options})
        return scope

    async def _post(self, scope: anyio.CancelScope, options: dict[str, Any]) -> None:
        with scope:
            self.answers.append(await self._http.post("/", **options))


@asynccontextmanager
async def twins(app: Any, streams: StreamManager | StreamsHTTP) -> AsyncGenerator[Twins]:
    """Serve an app, and send it what is asked for; in the end all are answered, and nothing is left but streams of answers."""
    async with http_to(DurableStreaming(app, streams)) as http:
        async with anyio.create_task_group() as tasks:
            sent = Twins(http, tasks)
            yield sent
        manager = streams.streams if isinstance(streams, StreamsHTTP) else streams
        shown = {answer.headers[STREAM_ID] for answer in sent.answers if STREAM_ID in answer.headers}
        with anyio.fail_after(10):
            while {info.id for info in await manager.list()} != shown:  # noqa: ASYNC110 - claims end in the background
                await anyio.sleep(0.01)


def told() -> Told:
    return Told(MemoryStorage())


@pytest.mark.parametrize("before_head", [True, False], ids=["before the head", "behind the head"])
async def test_of_twins_that_are_sent_at_once_one_is_in_the_app_and_its_stream_is_the_answer_to_all(before_head: bool) -> None:
    app, streams = Gated(before_head=before_head), told()
    async with twins(app, streams) as sent:
        for _ in range(10):
            sent.send()
        await until(lambda: app.calls + streams.waits >= 10)
        app.go.set()
    assert app.calls == 1
    assert len({(answer.status_code, answer.content, answer.headers[STREAM_ID]) for answer in sent.answers}) == 1
    assert b"data: 1" in sent.answers[9].content


async def test_twins_whose_answer_does_not_stream_are_all_answered_by_the_app_one_after_the_other() -> None:
    app, streams = Gated(JSON), told()
    async with twins(app, streams) as sent:
        for _ in range(3):
            sent.send()
        await until(lambda: app.calls + streams.waits >= 3)
        app.go.set()
    assert sorted(answer.content for answer in sent.answers) == [b"1", b"2", b"3"]
    assert app.most_inside == 1


async def test_twins_that_have_waited_are_shown_a_stream_while_it_runs() -> None:
    app, streams = Gated(), told()
    end = anyio.Event()

    async def going_on(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_and_wait(message: Message) -> None:
            if message["type"] == "http.response.body":
                await end.wait()
            await send(message)

        await app(scope, receive, send_and_wait)

    async with http_to(DurableStreaming(going_on, streams)) as http, anyio.create_task_group() as tasks:
        shown: list[str] = []

        async def post() -> None:
            async with http.stream("POST", "/", headers=ONCE) as answer:
                shown.append(answer.headers[STREAM_ID])
                await answer.aread()

        for _ in range(2):
            tasks.start_soon(post)
        await until(lambda: app.calls + streams.waits >= 2)
        app.go.set()
        await until(lambda: len(shown) == 2)
        end.set()
    assert shown[0] == shown[1]
    assert app.calls == 1


async def test_a_twin_that_finds_no_claim_any_more_looks_again_for_what_was_started() -> None:
    storage = FaultyStorage(MemoryStorage())
    app, streams = Gated(), StreamManager(storage)
    async with twins(app, streams) as sent:
        sent.send()
        await until(lambda: app.calls)
        storage.skip("read")  # which finds that nothing was started
        hold = storage.hold("read")  # which is to find the claim
        sent.send()
        await hold.reached.wait()
        app.go.set()
        await until(lambda: sent.answers)
        while len(await streams.list(status="open")) > 0:  # noqa: ASYNC110 - the claim ends in the background
            await anyio.sleep(0.01)
        hold.release()
    assert app.calls == 1
    assert sent.answers[0].content == sent.answers[1].content


async def test_an_answer_that_does_not_stream_is_waited_for_until_its_head_and_no_longer() -> None:
    app, streams = Gated(JSON, before_head=False), told()
    async with twins(app, streams) as sent:
        sent.send()
        sent.send()
        await until(lambda: app.calls == 2)  # the first one has not ended
        app.go.set()
    assert sorted(answer.content for answer in sent.answers) == [b"1", b"2"]


async def test_a_twin_of_an_answer_that_does_not_stream_may_start_a_stream_for_the_others() -> None:
    app, streams = Gated(JSON, STREAMS), told()
    async with twins(app, streams) as sent:
        for _ in range(4):
            sent.send()
        await until(lambda: app.calls + streams.waits >= 4)
        app.go.set()
    assert app.calls == 2
    assert len({answer.headers[STREAM_ID] for answer in sent.answers if STREAM_ID in answer.headers}) == 1
    assert sum(STREAM_ID in answer.headers for answer in sent.answers) == 3


async def test_twins_of_an_app_that_fails_before_its_head_are_all_told_so(caplog: pytest.LogCaptureFixture) -> None:
    app, streams = Gated(fails=True), told()
    async with twins(app, streams) as sent:
        sent.send()
        sent.send()
        await until(lambda: app.calls + streams.waits >= 2)
        app.go.set()
    assert [answer.status_code for answer in sent.answers] == [500, 500]
    assert (app.calls, app.most_inside) == (2, 1)


async def test_what_a_client_that_has_left_has_set_off_is_its_twins_answer() -> None:
    app, streams = Gated(), told()
    async with twins(app, streams) as sent:
        first = sent.send()
        await until(lambda: app.calls)
        sent.send()
        await until(lambda: app.calls + streams.waits >= 2)
        first.cancel()
        app.go.set()
    assert app.calls == 1
    assert b"data: 1" in sent.answers[0].content


async def test_where_the_app_stops_for_a_client_that_has_left_its_twin_goes_on() -> None:
    app, streams = Gated(minds_leaving=True), told()
    async with twins(app, streams) as sent:
        first = sent.send()
        await until(lambda: app.calls)
        second = sent.send()
        await until(lambda: app.calls + streams.waits >= 2)
        assert app.calls == 1
        first.cancel()
        await until(lambda: app.calls == 2)
        assert app.most_inside == 1
        second.cancel()


@pytest.mark.parametrize("size", [0, 10_000])
async def test_a_twin_that_leaves_while_it_waits_is_never_in_the_app(size: int) -> None:
    app, streams = Gated(JSON), told()
    ended = 0

    async def counting(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal ended
        await durable(scope, receive, send)
        ended += scope["type"] == "http"

    durable = DurableStreaming(app, streams)
    async with http_to(counting) as http, anyio.create_task_group() as tasks:
        sent = Twins(http, tasks)
        sent.send(content=b"x" * size)
        await until(lambda: app.calls)
        second = sent.send(content=b"x" * size)
        await until(lambda: app.calls + streams.waits >= 2)
        second.cancel()
        await until(lambda: ended == 1)  # the first one is still in the app
        app.go.set()
    assert app.calls == 1
    assert [answer.content for answer in sent.answers] == [b"1"]


@pytest.mark.parametrize("operation", ["read", "commit"])
async def test_a_storage_that_fails_at_the_claim_keeps_nobody_from_the_app(
    operation: Any, caplog: pytest.LogCaptureFixture
) -> None:
    storage = FaultyStorage(MemoryStorage())
    app, streams = Gated(), StreamManager(storage)
    app.go.set()
    async with twins(app, streams) as sent:
        sent.send(headers={})
        await until(lambda: sent.answers)  # the session has begun
        storage.refuse(operation)
        sent.send()
    assert [b"data: %d" % number in answer.content for number, answer in enumerate(sent.answers, 1)] == [True, True]
    assert [record.levelno for record in caplog.records if "it may run twice" in record.message] == [logging.WARNING]


async def test_twins_that_are_both_in_the_app_because_the_storage_failed_are_one_stream() -> None:
    storage = FaultyStorage(MemoryStorage())
    app, streams = Gated(), StreamManager(storage)
    async with twins(app, streams) as sent:
        storage.refuse("read", times=2)
        sent.send()
        sent.send()
        await until(lambda: app.calls == 2)
        app.go.set()
    assert sent.answers[0].headers[STREAM_ID] == sent.answers[1].headers[STREAM_ID]
    assert sent.answers[0].content == sent.answers[1].content


async def test_a_storage_that_is_slow_at_the_claim_keeps_nobody_from_the_app(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "STORAGE_SECONDS", 0.05)
    storage = FaultyStorage(MemoryStorage())
    app, streams = Gated(), StreamManager(storage)
    async with twins(app, streams) as sent:
        sent.send(headers={})
        await until(lambda: app.calls)
        app.go.set()
        await until(lambda: sent.answers)
        hold = storage.hold("commit")
        sent.send()
        await hold.reached.wait()
        await until(lambda: app.calls == 2)
        hold.release()
    assert b"data: 2" in sent.answers[1].content


async def test_where_nobody_may_start_a_stream_the_app_answers_as_it_would() -> None:
    def nobody(_: Access) -> str:
        raise PublicError("UNAUTHENTICATED", "sign in")

    app, streams = Gated(JSON), told()
    async with twins(app, StreamsHTTP(streams, authorize=nobody)) as sent:
        sent.send()
        sent.send()
        await until(lambda: app.calls == 2)
        app.go.set()
    assert streams.waits == 0
    assert sorted(answer.content for answer in sent.answers) == [b"1", b"2"]


async def test_twins_of_one_owner_are_told_by_the_owner_and_those_of_two_owners_apart() -> None:
    app, streams = Gated(), told()
    async with twins(app, StreamsHTTP(streams, authorize=lambda access: access.headers["x-user"])) as sent:
        for user, token in (("ann", "1"), ("bob", "1"), ("ann", "2"), ("bob", "2")):
            sent.send(headers={**ONCE, "X-User": user, "Authorization": token})
        await until(lambda: app.calls + streams.waits >= 4)
        app.go.set()
    assert app.calls == 2
    assert len({answer.headers[STREAM_ID] for answer in sent.answers}) == 2


async def test_who_wraps_an_app_twice_does_not_wait_for_itself() -> None:
    app, streams = Gated(), told()
    async with twins(DurableStreaming(app, streams), streams) as sent:
        for _ in range(3):
            sent.send()
        await until(lambda: app.calls + streams.waits >= 3)
        app.go.set()
    assert app.calls == 1
    assert len({answer.headers[STREAM_ID] for answer in sent.answers}) == 1


async def test_what_a_middleware_raises_for_a_body_is_the_apps_also_where_it_has_waited() -> None:
    """Such as that it is too long: the app says so, as it would."""
    streams = told()
    app = Gated(JSON)
    raised: list[str] = []

    async def reading(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        if app.calls:
            try:
                await receive()
            except ValueError as error:
                raised.append(str(error))
        await app(scope, receive, send)

    async def too_long() -> Message:
        raise ValueError("too long")

    async def whole() -> Message:
        return {"type": "http.request", "body": b""}

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def post(receive: Receive) -> None:
        headers = [(b"idempotency-key", b"k")]
        await durable({"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": headers}, receive, send)

    streams_http = StreamsHTTP(streams)
    durable = DurableStreaming(reading, streams_http)
    async with streams_http, anyio.create_task_group() as tasks:
        tasks.start_soon(post, whole)
        await until(lambda: app.calls)
        tasks.start_soon(post, too_long)
        await until(lambda: app.calls + streams.waits >= 2)
        app.go.set()
    assert raised == ["too long"]
    assert app.calls == 2


# In two processes

SERVER: Final = """
import os, sys
from datetime import timedelta
import anyio, uvicorn
from streamkeep import StreamManager
from streamkeep.http import DurableStreaming
from streamkeep.storages import storage_for

url, port, log, go = sys.argv[1:]

def note(what):
    with open(log, "a") as file:
        file.write(f"{what} {port}\\n")

class Told(StreamManager):
    def subscribe(self, *args, **options):
        note("waits")
        return super().subscribe(*args, **options)

async def app(scope, receive, send):
    assert scope["type"] == "http"
    note("call")
    while not os.path.exists(go):
        await anyio.sleep(0.01)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
    await send({"type": "http.response.body", "body": f"data: {port}\\n\\n".encode()})

async def main():
    second = timedelta(seconds=1)
    async with storage_for(url) as storage:
        durable = DurableStreaming(app, Told(storage, lease=second, grace=second))
        await uvicorn.Server(uvicorn.Config(durable, port=int(port), log_level="error")).serve()

anyio.run(main)
"""


class Processes:
    """Two servers of one app over one file."""

    def __init__(self, tmp_path: Path, ports: list[int]) -> None:
        self.ports = ports
        self._log = tmp_path / "log"
        self._go = tmp_path / "go"
        self._url = f"sqlite:///{tmp_path}/streams.db"
        self.processes = [self._start(port) for port in ports]

    def _start(self, port: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", SERVER, self._url, str(port), str(self._log), str(self._go)])

    def noted(self, what: str) -> list[int]:
        """Give the ports of those that have noted something."""
        if not self._log.exists():
            return []
        words = [line.split() for line in self._log.read_text().splitlines()]
        return [int(port) for noted, port in words if noted == what]

    def go(self) -> None:
        """Let the app answer."""
        self._go.touch()

    async def left(self) -> list[str]:
        """Give the ids of what is kept, as another process sees it."""
        async with StreamManager.connect(self._url, lease=timedelta(seconds=1)) as streams:
            return [info.id for info in await streams.list()]


@pytest.fixture
async def processes(tmp_path: Path, free_tcp_port_factory: Callable[[], int]) -> AsyncGenerator[Processes]:
    both = Processes(tmp_path, [free_tcp_port_factory() for _ in range(2)])
    try:
        for port in both.ports:
            await _served(port)
        yield both
    finally:
        for process in both.processes:
            process.kill()
            process.wait()


async def _served(port: int) -> None:
    with anyio.fail_after(30):
        while True:
            try:
                async with await anyio.connect_tcp("127.0.0.1", port):
                    return
            except OSError:
                await anyio.sleep(0.05)


class Sent:
    """Requests to processes, whose answers come, or not."""

    def __init__(self, tasks: anyio.abc.TaskGroup, http: httpx.AsyncClient) -> None:
        self.answers: dict[int, httpx.Response] = {}
        self._tasks = tasks
        self._http = http

    def send(self, port: int) -> None:
        self._tasks.start_soon(self._post, port)

    async def _post(self, port: int) -> None:
        try:
            # The same host for both, as behind a proxy: nobody says who is asking, and so it counts.
            answer = await self._http.post(f"http://127.0.0.1:{port}/", headers={**ONCE, "Host": "app.example"})
        except httpx.TransportError:
            return
        self.answers[port] = answer


async def test_of_twins_at_two_processes_one_is_in_the_app(processes: Processes) -> None:
    one, other = processes.ports
    async with httpx.AsyncClient(timeout=30) as http, anyio.create_task_group() as tasks:
        sent = Sent(tasks, http)
        sent.send(one)
        await until(lambda: processes.noted("call"))
        sent.send(other)
        await until(lambda: len(processes.noted("call")) == 2 or processes.noted("waits"))
        processes.go()
    answers = sent.answers
    assert processes.noted("call") == [one]
    assert answers[one].content == answers[other].content
    assert answers[one].headers[STREAM_ID] == answers[other].headers[STREAM_ID]
    assert await processes.left() == [answers[one].headers[STREAM_ID]]


async def test_a_twin_goes_on_when_the_process_that_has_the_other_in_its_app_is_killed(processes: Processes) -> None:
    one, other = processes.ports
    async with httpx.AsyncClient(timeout=30) as http, anyio.create_task_group() as tasks:
        sent = Sent(tasks, http)
        sent.send(one)
        await until(lambda: processes.noted("call"))
        sent.send(other)
        await until(lambda: len(processes.noted("call")) == 2 or processes.noted("waits"))
        assert processes.noted("call") == [one]
        processes.processes[0].kill()
        processes.go()
    assert processes.noted("call") == [one, other]
    assert f"data: {other}" in sent.answers[other].text
    assert await processes.left() == [sent.answers[other].headers[STREAM_ID]]
