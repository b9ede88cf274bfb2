"""NATSStorage where things go wrong: servers that went back, answers that nobody can use, many who wait for one failure, forks."""

import asyncio
import base64
import gc
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from signal import SIGSTOP
from typing import Any, Final

import anyio
import nats
import pytest
from msgspec.structs import replace
from nats.aio.client import Client
from nats.aio.msg import Msg
from tests.engines.nats import NATSServer, running_server

from streamkeep.errors import StorageError, StorageUnavailableError, WrongEventLoopError
from streamkeep.storage import Doorbell, Head, Storage
from streamkeep.storages import storage_for
from streamkeep.storages.nats import NATSStorage

BOUND_SECONDS: Final = 30
SOON_SECONDS: Final = 8  # before an end that is older than what is known would be believed in any case


@pytest.fixture
def server(tmp_path: Path) -> Generator[NATSServer]:
    server = NATSServer(tmp_path / "nats")
    try:
        yield server.start()
    finally:
        server.process.stop()


def unretried(server: NATSServer) -> NATSStorage:
    return NATSStorage([f"nats://127.0.0.1:{server.port}"])


# -- a server that went back


@contextmanager
def going_back(server: NATSServer, tmp_path: Path) -> Generator[None]:
    """Have the server be, at the end, as it was at the beginning: its disk was restored from a copy, or had no power."""
    server.process.stop()
    shutil.copytree(tmp_path / "nats" / "data", tmp_path / "copy")
    server.start()
    yield
    server.process.stop()
    shutil.rmtree(tmp_path / "nats" / "data")
    shutil.copytree(tmp_path / "copy", tmp_path / "nats" / "data")
    server.start()


async def test_a_server_that_went_back_is_believed_and_what_it_lost_is_no_ground_for_a_commit(
    server: NATSServer, tmp_path: Path
) -> None:
    with anyio.fail_after(BOUND_SECONDS):
        async with storage_for(server.url) as storage, storage.watch("s") as doorbell:
            kept = await written(storage, "s", a_head(0), 3)
            with going_back(server, tmp_path):
                lost = await written(storage, "s", kept, 5)
                assert await storage.commit("lost", None, a_head(0))
            with anyio.fail_after(SOON_SECONDS):
                page = await storage.read("s", 0, 100)
            assert page is not None
            assert page.head == kept
            assert list(page.records) == [b"1", b"2", b"3"]
            assert await storage.read("lost") is None
            assert [stream for stream, _ in await storage.scan()] == ["s"]
            assert not await storage.commit("s", lost.version, replace(lost, version=lost.version + 1, tail=9), [b"x"])
            assert not await storage.delete("s", lost.version)
            await rung(doorbell)
            head = await written(storage, "s", kept, 1)
            assert (await storage.read("s")) is not None
            await rung(doorbell)
            assert await storage.delete("s", head.version)


async def test_a_version_that_was_lost_is_refused_by_whoever_comes_with_it_first(server: NATSServer, tmp_path: Path) -> None:
    """Others have written since, and JetStream's sequence has come again to where the lost version was."""
    with anyio.fail_after(BOUND_SECONDS):
        async with storage_for(server.url) as storage, storage_for(server.url) as other:
            kept = await written(storage, "s", a_head(0), 1)
            with going_back(server, tmp_path):
                lost = await written(storage, "s", kept, 1)
            others = await written(other, "s", replace(kept, version=kept.version + 100), 1, seen=kept.version)
            assert not await storage.commit("s", lost.version, replace(lost, version=lost.version + 1, tail=3), [b"x"])
            page = await storage.read("s")
            assert page is not None
            assert page.head == others


async def test_a_log_that_is_another_one_is_noticed_though_the_connection_lives(server: NATSServer) -> None:
    """The JetStream stream was deleted, and created again: its sequence begins anew."""
    with anyio.fail_after(BOUND_SECONDS):
        async with storage_for(server.url) as storage, storage.watch("s") as doorbell, connected(server) as client:
            lost = await written(storage, "s", a_head(0), 20)
            config = (await api(client, "STREAM.INFO.streamkeep"))["config"]
            await api(client, "STREAM.DELETE.streamkeep")
            await api(client, "STREAM.CREATE.streamkeep", config)
            async with storage_for(server.url) as other:
                new = await written(other, "s", a_head(0, version=5), 1)
                with anyio.fail_after(SOON_SECONDS):
                    page = await storage.read("s", 0, 100)
                assert page is not None
                assert page.head == new
                assert not await storage.commit("s", lost.version, replace(lost, version=lost.version + 1))
                await written(other, "s", new, 1)
                await rung(doorbell)


async def test_an_end_that_stays_older_than_what_is_known_is_believed_in_the_end(
    server: NATSServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamkeep.storages.nats._CHANGE_SECONDS", 0.1)
    monkeypatch.setattr("streamkeep.storages.nats._DEPOSED_SECONDS", 0.5)
    with anyio.fail_after(BOUND_SECONDS):
        async with storage_for(server.url) as storage:
            head = await written(storage, "s", a_head(0), 1)
            inner = storage.storage  # type: ignore[attr-defined]  # it retries
            assert isinstance(inner, NATSStorage)
            inner._open._notifications.expect("s", 1000)
            page = await storage.read("s")
            assert page is not None
            assert page.head == head


# -- many who wait for one failure


async def test_each_who_waits_is_told_by_an_exception_of_his_own(server: NATSServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamkeep.storages.nats._link._ANSWER_SECONDS", 1.0)
    errors: list[StorageError] = []

    async def told(use: Callable[[], Awaitable[object]]) -> None:
        with pytest.raises(StorageUnavailableError) as raised:
            await use()
        errors.append(raised.value)

    with anyio.fail_after(BOUND_SECONDS):
        async with unretried(server) as storage:
            assert await storage.read("s") is None
            server.signal(SIGSTOP)  # it keeps its connections
            for wave in range(3):
                async with anyio.create_task_group() as tasks:
                    for number in range(100):
                        tasks.start_soon(told, lambda stream=f"s{number}": storage.read(stream))
                        tasks.start_soon(told, lambda stream=f"s{number}": storage.commit(stream, None, a_head(0)))
                    tasks.start_soon(told, storage.scan)
                    tasks.start_soon(told, lambda: storage.expired(9e9))
                if wave == 0:
                    server.kill()
            assert len({id(error) for error in errors}) == len(errors) == 3 * 202
            assert max(depth(error) for error in errors) < 30
            server.start()
            await until_it_works(storage)


def depth(error: BaseException) -> int:
    traceback, count = error.__traceback__, 0
    while traceback is not None:
        traceback, count = traceback.tb_next, count + 1
    return count


# -- answers that nobody can use


class FakeJetStream:
    """Answers in JetStream's name, on a server that has none."""

    def __init__(self) -> None:
        self.answers: dict[str, bytes] = {}
        self.default: dict[str, bytes] = {}

    async def answer(self, request: Msg) -> None:
        kind = next(kind for kind in ("STREAM.INFO", "MSG.GET", "DIRECT.GET", "PURGE", "DELETE", "") if kind in request.subject)
        await request.respond(self.answers.get(kind) or self.default[kind])


@pytest.fixture
async def fake() -> AsyncGenerator[tuple[NATSStorage, FakeJetStream]]:
    """Give a storage, and who answers it."""
    with running_server() as real:
        async with unretried(real), connected(real) as client:
            info = json.dumps(await api(client, "STREAM.INFO.streamkeep")).encode()
    with running_server(jetstream=None) as server:
        async with connected(server) as client:
            jetstream = FakeJetStream()
            absent = json.dumps({"error": {"code": 404, "err_code": 10037, "description": "no message found"}}).encode()
            stored = json.dumps({"stream": "streamkeep", "seq": 1}).encode()
            jetstream.default = {
                "STREAM.INFO": info,
                "MSG.GET": absent,
                "DIRECT.GET": b"",
                "PURGE": stored,
                "DELETE": stored,
                "": stored,
            }
            await client.subscribe("$JS.API.>", cb=jetstream.answer)
            await client.subscribe("streamkeep.s.*", cb=jetstream.answer)
            await client.subscribe("streamkeep.due.>", cb=jetstream.answer)
            await client.flush()
            async with unretried(server) as storage:
                yield storage, jetstream


@pytest.mark.parametrize(
    "answer",
    [
        b"no JSON",
        b"[]",
        b"5",
        b"null",
        b"{}",
        b"[" * 100_000,
        b'{"message": {"seq": "one"}}',
        b'{"message": {"seq": 1, "data": "no base64"}}',
        b'{"message": {"seq": 1, "data": "%s"}}' % base64.b64encode(b"\x01\0\0\0\0\xff\xff\xff\xff"),
        b'{"error": 5}',
        b'{"error": {"err_code": "x"}}',
        b'{"seq": "x", "state": {}, "ts": "yesterday", "created": 5, "config": 5}',
    ],
    ids=range(12),
)
async def test_whatever_is_answered_whoever_asked_is_told_and_the_next_one_works(
    fake: tuple[NATSStorage, FakeJetStream], answer: bytes
) -> None:
    storage, jetstream = fake
    uses: dict[str, Callable[[], Awaitable[object]]] = {
        "read": lambda: storage.read("s"),
        "commit": lambda: storage.commit("s", None, a_head(0)),
        "delete": lambda: storage.delete("s", 5),
        "scan": storage.scan,
    }
    with anyio.fail_after(BOUND_SECONDS):
        for kind in ("MSG.GET", "STREAM.INFO", ""):
            for name, use in uses.items():
                jetstream.answers = {kind: answer}
                try:
                    await use()
                except StorageError:
                    pass
                except BaseException as error:
                    raise AssertionError(f"{name} raised {error!r}") from error
                jetstream.answers = {}
                await until_it_works(storage)


async def test_a_server_that_speaks_no_nats_is_an_error_of_ours() -> None:
    for says in (
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"INFO {]\r\n",
        b"INFO\r\n",
        b"\0" * 3_000_000,
        b"",
        b"MSG a b c d e\r\n",
        b"INFO 5\r\n",
    ):

        async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter, says: bytes = says) -> None:
            writer.write(says)
            writer.close()

        async with await asyncio.start_server(serve, "127.0.0.1", 0) as stranger:
            port = stranger.sockets[0].getsockname()[1]
            with anyio.fail_after(BOUND_SECONDS), pytest.raises(StorageError, match=f"127.0.0.1:{port}"):
                async with NATSStorage([f"nats://127.0.0.1:{port}"]):
                    pass


def test_no_other_client_is_needed() -> None:
    program = """
import sys
sys.modules["nats"] = sys.modules["nkeys"] = None  # as if they were not installed
from streamkeep.storages import storage_for
storage_for("nats://localhost")
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=BOUND_SECONDS)


# -- forks


async def test_a_forked_child_is_told_and_its_parent_goes_on(server: NATSServer) -> None:
    with anyio.fail_after(BOUND_SECONDS):
        async with unretried(server) as storage, storage.watch("s") as doorbell:
            head = await written(storage, "s", a_head(0), 1)
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore", DeprecationWarning
                )  # of a fork where there are threads, which is what is tested
                child = os.fork()
            if not child:
                os._exit(outcome_in_child(storage))
            _, status = await anyio.to_thread.run_sync(os.waitpid, child, 0)
            assert os.waitstatus_to_exitcode(status) == 0
            await rung(doorbell)
            await written(storage, "s", head, 1)
            await rung(doorbell)


def outcome_in_child(storage: NATSStorage) -> int:
    """Say how many uses of the storage did not raise WrongEventLoopError."""

    async def use() -> int:
        async def watch() -> None:
            async with storage.watch("s"):
                pass

        uses: list[Callable[[], Awaitable[object]]] = [
            lambda: storage.read("s"),
            lambda: storage.commit("s", None, a_head(0)),
            lambda: storage.delete("s", 1),
            storage.scan,
            lambda: storage.expired(9e9),
            watch,
            storage.__aexit__,
        ]
        failed = 0
        for call in uses:
            try:
                await call()
            except WrongEventLoopError:
                continue
            except BaseException:
                pass
            failed += 1
        gc.collect()
        return failed

    try:
        asyncio._set_running_loop(None)
        with asyncio.Runner() as runner:
            return runner.run(use())
    except BaseException:
        return 100


# -- the words of the tests


def a_head(tail: int, version: int = 1_700_000_000_000_000) -> Head:
    return Head(version, tail, b"state", 4e9)


async def written(storage: Storage, stream: str, head: Head, count: int, seen: int | None = None) -> Head:
    """Write so many commits of a record each, the first one as the stream's first if `head` has none; give the last head."""
    before = seen if seen is not None else (head.version if head.tail else None)
    for _ in range(count):
        head = replace(head, version=head.version + 1, tail=head.tail + 1)
        assert await storage.commit(stream, before, head, [b"%d" % head.tail])
        before = head.version
    return head


async def rung(doorbell: Doorbell) -> None:
    with anyio.fail_after(BOUND_SECONDS):
        await doorbell.wait()


async def until_it_works(storage: NATSStorage) -> None:
    while True:
        try:
            await storage.read("s")
        except StorageUnavailableError:
            await asyncio.sleep(0)
        else:
            return


@asynccontextmanager
async def connected(server: NATSServer) -> AsyncGenerator[Client]:
    client = await nats.connect(f"nats://127.0.0.1:{server.port}")
    try:
        yield client
    finally:
        await client.close()


async def api(client: Client, subject: str, body: object = None) -> dict[str, Any]:
    payload = b"" if body is None else json.dumps(body).encode()
    answer: dict[str, Any] = json.loads((await client.request(f"$JS.API.{subject}", payload, timeout=5)).data)
    assert "error" not in answer, answer
    return answer
