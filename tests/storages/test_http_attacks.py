"""What could go wrong between HTTPStorage and StorageHTTP, tried: doorbells that change over, strange numbers, crowds, cuts, kills."""

import random
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, Awaitable
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import anyio
import anyio.to_thread
import httpx2
import msgspec
import pytest
from tests.engines.http import TOKEN, Server
from tests.http.servers import serving, until
from tests.network.proxy import End, Fate, bad_network
from tests.storages.failures import forked
from tests.test_killed_writer import PRODUCER

from streamkeep import RemoteStreamManager, StorageCorruptError, StorageError, StorageUnavailableError, StreamManager
from streamkeep.http import StorageHTTP
from streamkeep.http.response import Message, Receive, Scope, Send
from streamkeep.storage import Head, Storage
from streamkeep.storages._http_messages import CONTENT_TYPE, SILENCE_SECONDS
from streamkeep.storages.http import HTTPStorage, _watching
from streamkeep.storages.memory import MemoryStorage
from streamkeep.storages.sqlite import SQLiteStorage
from streamkeep.testing.faults import FaultyStorage

BOUND_SECONDS: Final = 10
FOLLOWERS: Final = 128
TRUSTED: Final = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def served() -> FaultyStorage:
    """Give what the server keeps its streams in."""
    return FaultyStorage(MemoryStorage())


@asynccontextmanager
async def server_of(storage: Storage) -> AsyncGenerator[str]:
    """Serve an open storage, and give its URL."""
    async with StreamManager(storage) as streams, StorageHTTP(streams, trust=TOKEN) as app, serving(app) as url:
        yield url


def remote(url: str) -> HTTPStorage:
    return HTTPStorage(url, headers=TRUSTED)


def a_head(version: int, tail: int = 0) -> Head:
    return Head(version, tail, b"{}", 9e9)


# Doorbells


async def test_a_stream_that_is_watched_again_while_others_begin_to_be_rings(served: FaultyStorage) -> None:
    async with server_of(served) as url, remote(url) as storage:
        with anyio.fail_after(BOUND_SECONDS):
            async with storage.watch("x") as doorbell:
                await doorbell.wait()  # it has begun to be watched
            begins = served.hold("watch")
            async with storage.watch("y") as other:
                await begins.reached.wait()
                async with storage.watch("x") as doorbell:
                    begins.release()
                    await other.wait()
                    with anyio.move_on_after(0.5):  # a ring for nothing
                        await doorbell.wait()
                    await served.commit("x", None, a_head(1))
                    await doorbell.wait()


async def test_many_who_begin_to_follow_one_after_the_other_cost_little(served: FaultyStorage) -> None:
    async with server_of(served) as url, remote(url) as storage, anyio.create_task_group() as tasks:
        for number in range(FOLLOWERS):
            watched = anyio.Event()
            tasks.start_soon(_watch, storage, f"s{number}", watched)
            with anyio.fail_after(BOUND_SECONDS):
                await watched.wait()
        tasks.cancel_scope.cancel()
    assert served.calls["watch"] <= FOLLOWERS * (FOLLOWERS.bit_length() + 1)


async def _watch(storage: Storage, stream: str, watched: anyio.Event) -> None:
    async with storage.watch(stream) as doorbell:
        await doorbell.wait()
        watched.set()
        await anyio.sleep_forever()


async def test_a_storage_that_cannot_be_watched_is_not_a_bug_of_the_server(
    served: FaultyStorage, caplog: pytest.LogCaptureFixture
) -> None:
    async with server_of(served) as url, remote(url) as storage:
        served.refuse("watch", times=2)
        async with storage.watch("x") as doorbell:
            with anyio.fail_after(BOUND_SECONDS):
                await doorbell.wait()
    assert "ExceptionGroup" not in caplog.text


async def test_a_ring_that_is_on_its_way_when_a_response_is_replaced_is_not_lost(served: FaultyStorage) -> None:
    """The first response says nothing more from some moment on; what it has to say comes too late."""
    held = anyio.Event()
    async with StreamManager(served) as streams, StorageHTTP(streams, trust=TOKEN) as app:
        responses = 0

        async def slow(scope: Scope, receive: Receive, send: Send) -> None:
            nonlocal responses
            is_first = scope["type"] == "http" and scope["path"] == "/watch" and responses == 0
            responses += scope["path"] == "/watch"

            async def hold(message: Message) -> None:
                if b'["x"]' in message.get("body", b""):
                    held.set()
                    await anyio.sleep_forever()
                await send(message)

            await app(scope, receive, hold if is_first else send)

        async with serving(slow) as url, remote(url) as storage:
            with anyio.fail_after(BOUND_SECONDS):
                async with storage.watch("x") as doorbell:
                    await doorbell.wait()
                    await served.commit("x", None, a_head(1))
                    await held.wait()
                    async with storage.watch("y"):
                        await doorbell.wait()


@pytest.mark.parametrize(("piece", "seconds"), [(b"x" * 65536, 0.0), (b"x", 0.02)])
async def test_a_line_of_a_watch_that_never_ends_is_left_for_another(
    served: FaultyStorage, piece: bytes, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_watching, "MAX_LINE_BYTES", 1 << 20)
    monkeypatch.setattr(_watching, "LINE_SECONDS", 0.2)
    async with StreamManager(served) as streams, StorageHTTP(streams, trust=TOKEN) as app:
        responses = 0

        async def strange(scope: Scope, receive: Receive, send: Send) -> None:
            nonlocal responses
            responses += scope["path"] == "/watch"
            if scope["path"] != "/watch" or responses > 1:
                await app(scope, receive, send)
                return
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for _ in range(10_000):
                await send({"type": "http.response.body", "body": piece, "more_body": True})
                await anyio.sleep(seconds)

        async with serving(strange) as url, remote(url) as storage:
            with anyio.fail_after(BOUND_SECONDS):
                async with storage.watch("x") as doorbell:
                    await doorbell.wait()
                    await until(lambda: responses == 2)


async def test_what_a_stranger_says_is_not_waited_for() -> None:
    async def stranger(scope: Scope, receive: Receive, send: Send) -> None:
        del receive
        assert scope["type"] == "http"
        await send({"type": "http.response.start", "status": 502, "headers": [(b"content-type", b"text/html")]})
        for _ in range(10_000):
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
            await anyio.sleep(0.02)

    async with serving(stranger, lifespan="off") as url:
        with anyio.fail_after(BOUND_SECONDS), pytest.raises(StorageUnavailableError, match="502"):
            async with remote(url):
                pass


# Strange numbers

LARGE: Final = 2**64 - 1


@pytest.mark.parametrize(
    ("what", "question"),
    [
        ("read", {"stream": "s", "start": -1, "limit": 1}),
        ("read", {"stream": "s", "start": LARGE, "limit": 1}),
        ("read", {"stream": "s", "start": 0, "limit": LARGE}),
        ("watch", ["s", 5]),
        ("read", {"stream": "s", "start": 0, "limit": -1}),
        ("scan", {"after": "", "limit": -1}),
        ("scan", {"after": "", "limit": LARGE}),
        ("expired", {"before": 9e18, "limit": -1}),
        ("expired", {"before": float("nan"), "limit": 1}),
        ("change", [{"stream": "s", "seen": 1, "head": {"version": LARGE, "tail": 3, "state": b"", "expires_at": 9e9}}]),
        ("change", [{"stream": "s", "seen": 1, "head": {"version": -LARGE // 2, "tail": 3, "state": b"", "expires_at": 9e9}}]),
        ("change", [{"stream": "s", "seen": 1, "head": {"version": 2, "tail": -1, "state": b"", "expires_at": 9e9}}]),
        ("change", [{"stream": "s", "seen": 1, "head": {"version": 2, "tail": 3, "state": b"", "expires_at": float("nan")}}]),
        ("change", [{"stream": "s", "seen": 1, "head": {"version": 2, "tail": 3, "state": b"", "expires_at": float("inf")}}]),
        (
            "change",
            [{"stream": "s", "seen": 1, "head": {"version": 2, "tail": 0, "state": b"", "expires_at": 9e9}, "records": [b"x"]}],
        ),
        (
            "change",
            [{"stream": "s", "seen": 1, "head": {"version": 2, "tail": 3, "state": b"", "expires_at": 9e9, "first": -1}}],
        ),
        (
            "change",
            [{"stream": "s", "seen": 1, "head": {"version": 2, "tail": 3, "state": b"", "expires_at": 9e9, "first": 4}}],
        ),
        ("change", [{"stream": "s", "seen": LARGE, "head": None}]),
    ],
)
async def test_numbers_that_cannot_be_are_refused(what: str, question: object, tmp_path: Path) -> None:
    async with SQLiteStorage(tmp_path / "streams.db") as storage, server_of(storage) as url:
        await storage.commit("s", None, a_head(1, 3), [b"a", b"b", b"c"])
        async with httpx2.AsyncClient(base_url=url, headers={**TRUSTED, "content-type": CONTENT_TYPE}) as asking:
            answer = await asking.post(what, content=msgspec.msgpack.encode(question))
        assert answer.status_code == 400, msgspec.msgpack.decode(answer.content)
        page = await storage.read("s", 0, 10)
        assert page is not None
        assert (page.head, list(page.records)) == (a_head(1, 3), [b"a", b"b", b"c"])


# Bad networks


@pytest.mark.slow
async def test_a_writer_whose_connections_lead_nowhere_any_more_is_not_taken_for_dead(tmp_path: Path) -> None:
    """A machine is gone without a word, and others answer in its place: what is connected stays silent, and new connections work."""
    lease = timedelta(seconds=6)
    with Server(tmp_path / "server") as server:
        async with bad_network(f"http://127.0.0.1:{server.port}") as network, anyio.create_task_group() as tasks:
            url = server.through(int(network.path().rpartition(":")[2]))
            seen: list[Any] = []
            async with (
                SQLiteStorage(tmp_path / "server" / f"{server.name}.db") as storage,
                StreamManager(storage, lease=lease) as reading,
                RemoteStreamManager(url, lease=lease) as writing,
                writing.open("s") as stream,
            ):

                async def follow() -> None:
                    async with reading.subscribe("s") as events:
                        seen.extend([event.data async for event in events])

                tasks.start_soon(follow)
                for number in range(45):  # long enough for the session to be renewed over a connection that it has
                    if number == 30:
                        network.meet(Fate(End.STALL))
                    with anyio.fail_after(30):
                        await stream.write(number)
                    await anyio.sleep(0.1)
                await stream.done("end")
            assert network.struck[End.STALL] > 1
    assert seen == [*(b"%d" % number for number in range(45)), b'"end"']


@pytest.mark.slow
async def test_a_storage_that_is_slow_is_waited_for_whatever_comes_of_it(served: FaultyStorage) -> None:
    async with server_of(served) as url, remote(url) as storage:
        answers: dict[str, object] = {}

        async def ask(what: str, question: Awaitable[object]) -> None:
            try:
                answers[what] = await question
            except StorageError as error:
                answers[what] = type(error)

        commit, read, corrupt = served.hold("commit"), served.hold("read"), served.hold("scan")
        async with anyio.create_task_group() as tasks:
            for what, question in {
                "commit": storage.commit("s", None, a_head(1)),
                "read": storage.read("t"),
                "corrupt": storage.scan(),
            }.items():
                tasks.start_soon(ask, what, question)
            for hold in (commit, read, corrupt):
                await hold.reached.wait()
            await anyio.sleep(SILENCE_SECONDS + 1)
            commit.release()
            read.release()
            corrupt.release(StorageCorruptError("as it happens"))
    assert answers == {"commit": True, "read": None, "corrupt": StorageCorruptError}


@pytest.mark.slow
@pytest.mark.timeout(180)
async def test_hundreds_of_cuts_double_and_lose_nothing(tmp_path: Path) -> None:
    cuts, seed = 300, random.randrange(10**9)
    print("seed", seed)
    chance = random.Random(seed)
    with Server(tmp_path / "server") as server:
        async with bad_network(f"http://127.0.0.1:{server.port}") as network:
            url = server.through(int(network.path().rpartition(":")[2]))
            is_over, opened = anyio.Event(), {0: anyio.Event(), 1: anyio.Event()}
            read: dict[int, list[tuple[int, Any]]] = {number: [] for number in range(4)}
            offsets: dict[int, list[int]] = {0: [], 1: []}

            async def write(streams: StreamManager, number: int) -> None:
                async with streams.open(f"s{number}") as stream:
                    opened[number].set()
                    while not is_over.is_set():
                        offsets[number].append(await stream.write(len(offsets[number])))
                    await stream.done("end")

            async def follow(streams: StreamManager, number: int) -> None:
                await opened[number % 2].wait()
                async with streams.subscribe(f"s{number % 2}") as events:
                    read[number] = [(event.offset, event.chunk) async for event in events if event.type == "chunk"]

            async with RemoteStreamManager(url) as writing, RemoteStreamManager(url) as reading:
                async with anyio.create_task_group() as tasks:
                    for number in offsets:
                        tasks.start_soon(write, writing, number)
                    for number in read:
                        tasks.start_soon(follow, reading if number < 2 else writing, number)
                    while network.struck.total() < cuts:
                        end = chance.choice([End.FIN, End.RST])
                        network.meet(Fate(end, chance.randrange(400), of_request=chance.random() < 0.5))
                        await anyio.sleep(chance.random() / 10)
                    is_over.set()
                with anyio.fail_after(60):
                    assert (await reading.info("s0")).status == "done"
    for number, chunks in read.items():
        count = len(offsets[number % 2])
        assert offsets[number % 2] == list(range(count))
        assert chunks == [(offset, offset) for offset in range(count)]
        assert count > 20


# Processes that die


async def test_a_killed_client_is_seen_to_be_dead_by_who_reads_the_servers_storage(tmp_path: Path) -> None:
    with Server(tmp_path / "server") as server:
        last = await anyio.to_thread.run_sync(_kill_a_producer, server.url)
        path = tmp_path / "server" / f"{server.name}.db"
        second = timedelta(seconds=1)
        async with SQLiteStorage(path) as storage, StreamManager(storage, lease=second, grace=second) as streams:
            with anyio.fail_after(30):
                async with streams.subscribe("answer") as events:
                    *chunks, end = [event async for event in events]
    assert [event.chunk for event in chunks] == list(range(len(chunks)))
    assert len(chunks) > last
    assert end.error.status == "ABORTED"


@pytest.mark.slow
@pytest.mark.parametrize("where", ["inside", "outside"])
async def test_a_forked_child_can_neither_use_nor_harm_what_its_parent_has(where: str, tmp_path: Path) -> None:
    with Server(tmp_path / "server") as server:
        assert await forked(server.url, where) == 0


def _kill_a_producer(url: str) -> int:
    last = -1
    with subprocess.Popen([sys.executable, "-c", PRODUCER, url], stdout=subprocess.PIPE, text=True) as producer:
        assert producer.stdout is not None
        for line in producer.stdout:
            last = int(line)
            if last == 50:
                producer.send_signal(signal.SIGKILL)
    return last
