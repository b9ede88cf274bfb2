"""EngineSuite: what streams stand when they are kept in a server of its own, as a pytest class; on real processes and sockets.

Subclass it and give the engine. What a storage does while all is well is StorageSuite's affair.
"""

import os
import re
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from pathlib import Path
from signal import SIGCONT, SIGKILL, SIGSTOP
from typing import Any, ClassVar, Final
from urllib.parse import urlsplit

import anyio
import anyio.to_thread
import pytest
from anyio.abc import Process
from tests.core.test_copy import write
from tests.engines.engine import Engine
from tests.engines.load import LEASE, Load, connected, load, stored
from tests.http.genkit_client_suite import AppOf, GenkitClientSuite, GenkitProcessesSuite
from tests.http.servers import durable_app
from tests.network.proxy import End, Fate, Network, bad_network
from tests.test_cli import lines_of, run_beside
from tests.test_copy import same, stop_when_it_has_begun
from tests.test_killed_writer import kill_a_producer, open_when_lapsed

from streamkeep import (
    StorageError,
    StorageUnavailableError,
    StreamInput,
    StreamManager,
    StreamManagerClosedError,
)
from streamkeep.storage import Head, Storage
from streamkeep.storages import storage_for
from streamkeep.storages.retrying import RetryingStorage

STOP_SECONDS: Final = 10
CLOSE_SECONDS: Final = 20
"""A manager says goodbye for five seconds, and a request that is under way may take five."""
CUTS: Final = (0, 1, 2, 3, 5, 8, 13, 21, 34)
"""After how many bytes of what comes next a connection is cut."""
MANY: Final = 1_000
PROCESSES: Final = int(os.environ.get("PROCESSES", "8"))

# Enters as soon as it is told to, and commits a stream of its own.
NEWCOMER: Final = """
import asyncio, sys
from streamkeep.storage import Head
from streamkeep.storages import storage_for

async def main(url, stream):
    print("ready", flush=True)
    sys.stdin.readline()
    async with storage_for(url) as storage:
        print(await storage.commit(stream, None, Head(1, 1, b"", 9e9), [b"x"]), flush=True)

asyncio.run(main(*sys.argv[1:]))
"""


class EngineSuite:
    """Faults on real processes; see the module."""

    pytestmark = pytest.mark.timeout(180)
    connections: ClassVar[int] = 2
    """How many a manager has that only reads, whatever it reads."""

    @pytest.fixture
    def engine(self) -> Engine:
        """Give a running engine, with an empty storage in it."""
        raise NotImplementedError("override the fixture engine")

    # The server dies

    @pytest.mark.parametrize("how", ["restarted", "killed"])
    async def test_streams_go_on_by_themselves_when_the_server_was(self, engine: Engine, how: str) -> None:
        async with load(engine.url, engine.url) as under_way:
            for _ in range(2):
                await anyio.to_thread.run_sync(engine.restart if how == "restarted" else lambda: kill_and_start(engine))
                await under_way.advances()

    async def test_streams_go_on_by_themselves_when_the_server_was_stopped_for_ten_seconds(self, engine: Engine) -> None:
        async with load(engine.url, engine.url) as under_way:
            engine.signal(SIGSTOP)
            try:
                await anyio.sleep(STOP_SECONDS / 2)
                before = acknowledged(under_way)
                await anyio.sleep(STOP_SECONDS / 2)
                assert acknowledged(under_way) == before, "it was to be stopped"
            finally:
                engine.signal(SIGCONT)
            await under_way.advances()

    async def test_what_a_killed_server_had_acknowledged_is_there_for_those_who_come_later(self, engine: Engine) -> None:
        async with load(engine.url, engine.url, streams=1) as under_way:
            await anyio.to_thread.run_sync(engine.kill)
            (count,) = acknowledged(under_way)
            await anyio.to_thread.run_sync(engine.start)
            async with connected(engine.url) as streams, streams.subscribe("stream-0") as events:
                with anyio.fail_after(CLOSE_SECONDS):
                    assert [(await anext(events)).data for _ in range(count)] == [b"%d" % offset for offset in range(count)]

    # The server is down

    async def test_a_manager_closes_in_time_and_tells_its_readers_while_the_server_is_down(self, engine: Engine) -> None:
        async with connected(engine.url) as streams:
            stream = await streams.open("s")
            async with streams.subscribe("s") as events, down(engine):
                stream.write_soon("never stored")
                with anyio.fail_after(CLOSE_SECONDS):
                    await streams.aclose()
                with pytest.raises(StreamManagerClosedError):
                    await anext(events)

    @pytest.mark.slow
    async def test_leaving_a_manager_while_the_server_is_down_ends_in_time(self, engine: Engine) -> None:
        async with AsyncExitStack() as outage:
            with anyio.CancelScope() as bound:
                async with connected(engine.url) as streams:
                    stream = await streams.open("s")
                    await outage.enter_async_context(down(engine))
                    stream.write_soon("never stored")
                    bound.deadline = anyio.current_time() + CLOSE_SECONDS
            assert not bound.cancel_called

    async def test_a_manager_that_is_entered_while_the_server_is_down_is_told_so_in_a_sentence(self, engine: Engine) -> None:
        async with down(engine):
            with anyio.fail_after(CLOSE_SECONDS), pytest.raises(StorageError) as raised:
                await connected(engine.url).__aenter__()
        assert re.search(r"\w+ \w+ \w+", str(raised.value))
        async with connected(engine.url) as streams:
            await (await streams.open("s")).done()

    # The connection is lost

    @pytest.mark.parametrize("end", [End.FIN, End.RST])
    @pytest.mark.parametrize("of_request", [False, True], ids=["answer", "request"])
    async def test_what_is_cut_at_any_byte_is_written_and_read_exactly_once(
        self, engine: Engine, end: End, of_request: bool
    ) -> None:
        async with bad_way_to(engine) as (network, url), load(url, url, streams=2, readers=1) as under_way:
            for after in CUTS:
                struck = network.struck[end]
                network.meet(Fate(end, after, of_request=of_request))
                await under_way.advances(3)
                assert network.struck[end] > struck

    async def test_a_connection_that_stalls_is_given_up(self, engine: Engine) -> None:
        async with bad_way_to(engine) as (network, url), load(url, url, streams=2, readers=1) as under_way:
            network.meet(Fate(End.STALL, 3))
            await under_way.advances(3)
            assert network.struck[End.STALL]

    async def test_a_lost_connection_is_an_error_of_ours_and_the_next_calls_work(self, engine: Engine) -> None:
        async with bad_way_to(engine) as (network, url), unretried(url) as storage:
            for number, after in enumerate(CUTS):
                for name, call in calls_to(storage, f"s{number}").items():
                    network.meet(Fate(End.RST if number % 2 else End.FIN, after))
                    with anyio.fail_after(CLOSE_SECONDS):
                        await succeeds(name, call)
            assert network.struck.total() >= len(CUTS)

    async def test_a_commit_whose_ring_is_lost_with_the_connection_rings_all_the_same(self, engine: Engine) -> None:
        async with (
            bad_way_to(engine) as (network, url),
            unretried(url) as storage,
            unretried(engine.url) as elsewhere,
            storage.watch("s") as doorbell,
        ):
            network.meet(Fate(End.FIN, 0))
            await elsewhere.commit("s", None, a_head(1))
            with anyio.fail_after(CLOSE_SECONDS):
                await doorbell.wait()
                # And later commits ring on the new connection.
                await elsewhere.commit("s", a_head(1).version, a_head(2))
                await doorbell.wait()
            assert network.struck[End.FIN]

    # The writer dies

    async def test_a_killed_writers_stream_keeps_what_was_acknowledged_and_ends_with_aborted(self, engine: Engine) -> None:
        second = timedelta(seconds=1)
        last = await anyio.to_thread.run_sync(lambda: kill_a_producer(engine.url, after_offset=100))
        async with connected(engine.url, lease=second, grace=second) as streams:
            *chunks, end = await stored(streams, "answer")
            assert (await streams.info("answer")).error == "ABORTED"
        assert chunks == [("chunk", offset, b"%d" % offset) for offset in range(len(chunks))]
        assert len(chunks) > last
        assert end[:2] == ("error", len(chunks))

    async def test_another_process_takes_over_from_a_killed_writer(self, engine: Engine) -> None:
        last = await anyio.to_thread.run_sync(lambda: kill_a_producer(engine.url, after_offset=50))
        async with connected(engine.url, lease=timedelta(seconds=1), grace=LEASE) as streams:
            with anyio.fail_after(CLOSE_SECONDS):
                stream = await open_when_lapsed(streams)
            tail = stream.tail
            assert tail > last
            assert await stream.write("another writer") == tail
            await stream.done("together")
            seen = await stored(streams, "answer")
        assert seen[tail - 1 :] == [
            ("chunk", tail - 1, b"%d" % (tail - 1)),
            ("chunk", tail, b'"another writer"'),
            ("done", tail + 1, b'"together"'),
        ]

    # Moving house

    async def test_streams_are_copied_into_it_and_out_of_it_though_the_copy_is_killed(
        self, engine: Engine, tmp_path: Path
    ) -> None:
        source, target = (f"sqlite:///{tmp_path / name}.db" for name in ("source", "target"))
        async with StreamManager.connect(source, ttl=timedelta(hours=1)) as streams:
            for number in range(40):
                await write(streams, f"s{number:02}", 1000)

        code, _ = await anyio.to_thread.run_sync(lambda: stop_when_it_has_begun(source, engine.url, SIGKILL))
        assert code == -SIGKILL
        into = lines_of(await run_beside("copy", source, engine.url, "--json"))[-1]
        out = lines_of(await run_beside("copy", engine.url, target, "--json"))[-1]

        assert into["there"] + into["copied"] == 40
        assert into["events"] < 40 * 1001, "it was to be killed when something had been copied"
        assert (out["copied"], out["events"]) == (40, 40 * 1001)
        assert len(await same(source, engine.url)) == len(await same(source, target)) == 40

    # Many

    async def test_many_processes_may_be_the_first_at_once(self, engine: Engine) -> None:
        ids = [f"s{number:02}" for number in range(PROCESSES)]
        async with AsyncExitStack() as stack:
            newcomers = [
                await stack.enter_async_context(await anyio.open_process([sys.executable, "-c", NEWCOMER, engine.url, id]))
                for id in ids
            ]
            with anyio.fail_after(CLOSE_SECONDS + 5 * PROCESSES):
                for newcomer in newcomers:
                    assert await said(newcomer) == b"ready\n"
                for newcomer in newcomers:
                    assert newcomer.stdin is not None
                    await newcomer.stdin.send(b"\n")
                for newcomer in newcomers:
                    assert await said(newcomer) == b"True\n"
                    assert await newcomer.wait() == 0
        async with unretried(engine.url) as storage:
            assert [stream for stream, _ in await storage.scan()] == ids

    async def test_a_thousand_subscribers_of_a_thousand_streams_use_few_connections(self, engine: Engine) -> None:
        ids = [f"s{number}" for number in range(MANY)]
        received = dict.fromkeys(ids, 0)
        following: set[str] = set()
        all_follow = anyio.Event()

        async def follow(streams: StreamManager, stream: str) -> None:
            async with streams.subscribe(stream) as events:
                following.add(stream)
                if len(following) == MANY:
                    all_follow.set()
                async for event in events:
                    assert event.offset == received[stream]
                    received[stream] += 1

        async with connected(engine.url) as writing:
            inputs: list[StreamInput] = []
            await all_at_once(*(lambda stream=stream: opened(writing, stream, inputs) for stream in ids))
            before = connections_to(engine.port)
            async with connected(engine.url) as reading, anyio.create_task_group() as tasks:
                for stream in ids:
                    tasks.start_soon(follow, reading, stream)
                for number in range(3):
                    await all_at_once(*(lambda stream=stream, n=number: stream.write(n) for stream in inputs))
                with anyio.fail_after(CLOSE_SECONDS):
                    await all_follow.wait()
                at_most = connections_to(engine.port)
                await all_at_once(*(stream.done for stream in inputs))
                tasks.cancel_scope.deadline = anyio.current_time() + 2 * CLOSE_SECONDS
        assert set(received.values()) == {4}
        assert at_most - before <= self.connections


class GenkitOverEngineSuite(GenkitClientSuite, GenkitProcessesSuite):
    """Genkit's client, over one way to make an app: that both behave alike is shown over memory."""

    @pytest.fixture
    def app_of(self) -> AppOf:
        """Give apps of `durable_flow`."""
        return durable_app

    @pytest.fixture
    def app(self) -> str:
        """Give its name in `APPS`."""
        return "durable"


def kill_and_start(engine: Engine) -> None:
    """Kill the server, and start it again over its data."""
    engine.kill()
    engine.start()


@asynccontextmanager
async def down(engine: Engine) -> AsyncGenerator[None]:
    """Have no server while the block runs."""
    await anyio.to_thread.run_sync(engine.kill)
    try:
        yield
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(engine.start)


@asynccontextmanager
async def bad_way_to(engine: Engine) -> AsyncGenerator[tuple[Network, str]]:
    """Give a network that leads to the engine, and the URL of its storage by way of that."""
    async with bad_network(f"http://127.0.0.1:{engine.port}") as network:
        yield network, engine.through(urlsplit(network.path()).port or 0)


@asynccontextmanager
async def unretried(url: str) -> AsyncGenerator[Storage]:
    """Give the storage as its driver's errors are translated, before anything is tried again."""
    storage = storage_for(url)
    async with storage.storage if isinstance(storage, RetryingStorage) else storage as bare:
        yield bare


def calls_to(storage: Storage, stream: str) -> dict[str, Callable[[], Awaitable[object]]]:
    """Give a call of each method; each can be made again."""

    async def commit() -> bool:
        return await storage.commit(stream, None, a_head(1)) or await storage.read(stream) is not None

    async def watch() -> None:
        async with storage.watch(stream):
            pass

    return {
        "commit": commit,
        "read": lambda: storage.read(stream, 0, 10),
        "scan": storage.scan,
        "watch": watch,
        "delete": lambda: storage.delete(stream, a_head(1).version),
    }


async def succeeds(name: str, call: Callable[[], Awaitable[object]]) -> None:
    """Make a call until it succeeds; its connections have been told to be cut, each of them once."""
    for _ in range(10):
        try:
            await call()
        except StorageUnavailableError:
            continue
        return
    raise AssertionError(f"{name} does not work again")


def a_head(number: int) -> Head:
    """Give the head of a stream's commit, in order."""
    return Head(1_700_000_000_000_000 + number, 0, b"{}", 4_000_000_000.0)


def acknowledged(under_way: Load) -> list[int]:
    """Say how many chunks of each stream the writers were told of."""
    return [account.acknowledged for account in under_way.accounts]


async def said(process: Process) -> bytes:
    """Give the next line that a process prints."""
    assert process.stdout is not None
    line = b""
    while not line.endswith(b"\n"):
        line += await process.stdout.receive(1)
    return line


async def opened(streams: StreamManager, stream: str, inputs: list[StreamInput]) -> None:
    """Open a stream."""
    inputs.append(await streams.open(stream))


async def all_at_once(*calls: Callable[[], Coroutine[Any, Any, object]]) -> None:
    """Make many calls, and return when all have."""
    with anyio.fail_after(2 * CLOSE_SECONDS):
        async with anyio.create_task_group() as tasks:
            for call in calls:
                tasks.start_soon(call)


def connections_to(port: int) -> int:
    """Count this process's TCP connections to a port."""
    ours = {str(entry.readlink()) for entry in Path("/proc/self/fd").iterdir() if entry.is_socket()}
    rows = [line.split() for table in ("tcp", "tcp6") for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]]
    return sum(int(row[2].rpartition(":")[2], 16) == port and f"socket:[{row[9]}]" in ours for row in rows)
