"""Three NATS servers keep streams together: whichever dies, nothing that was acknowledged is lost or doubled, and readers go on."""

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from signal import SIGCONT, SIGSTOP
from typing import Final

import anyio
import pytest
from tests.engines.nats import NATSCluster, NATSServer, running_cluster

from streamkeep import StreamManager
from streamkeep.storages import storage_for

BOUND_SECONDS: Final = 100
STREAMS: Final = 8
BEFORE: Final = 20
AFTER: Final = 20

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(150)]


@pytest.fixture(scope="module")
def cluster() -> Generator[NATSCluster]:
    with running_cluster() as cluster:
        yield cluster


class Load:
    """Writers in one process, readers in another. Each writer notes what was acknowledged, and each reader what it was given."""

    def __init__(self, streams: StreamManager, elsewhere: StreamManager, name: str) -> None:
        self.streams = streams
        self.elsewhere = elsewhere
        self.ids = [f"{name}-{number}" for number in range(STREAMS)]
        self.acknowledged = dict.fromkeys(self.ids, 0)
        self.read: dict[str, list[object]] = {stream: [] for stream in self.ids}
        self.ends_at: int | None = None
        self._changed = anyio.Event()

    async def write(self, stream: str) -> None:
        async with self.streams.open(stream) as to:
            while self.ends_at is None or to.tail < self.ends_at:
                assert await to.write(to.tail) == self.acknowledged[stream]
                self.acknowledged[stream] += 1
                self._changed.set()
                self._changed = anyio.Event()
            await to.done("end")

    async def follow(self, stream: str) -> None:
        while self.acknowledged[stream] == 0:
            await self._changed.wait()
        async with self.elsewhere.subscribe(stream) as events:
            async for event in events:
                self.read[stream].append(event.chunk if event.type == "chunk" else event.type)

    async def until_all_have(self, count: int) -> None:
        """Wait until that many chunks of each stream are acknowledged."""
        while min(self.acknowledged.values()) < count:
            await self._changed.wait()

    @property
    def most(self) -> int:
        return max(self.acknowledged.values())


@contextmanager
def dead(server: NATSServer) -> Generator[None]:
    server.kill()
    try:
        yield
    finally:
        server.start()


@contextmanager
def stopped(server: NATSServer) -> Generator[None]:
    server.signal(SIGSTOP)
    try:
        yield
    finally:
        server.signal(SIGCONT)


@pytest.mark.parametrize(
    ("name", "happens"),
    [("leader-killed", dead), ("follower-killed", dead), ("leader-stopped", stopped)],
    ids=["leader killed", "follower killed", "leader stopped"],
)
async def test_while_a_server_is_away_nothing_is_lost_or_doubled_and_readers_go_on(
    cluster: NATSCluster, name: str, happens: Callable[[NATSServer], AbstractContextManager[None]]
) -> None:
    with anyio.fail_after(BOUND_SECONDS):
        async with StreamManager.connect(cluster.url) as streams, StreamManager.connect(cluster.url) as elsewhere:
            load = Load(streams, elsewhere, name)
            async with anyio.create_task_group() as tasks:
                for stream in load.ids:
                    tasks.start_soon(load.write, stream)
                    tasks.start_soon(load.follow, stream)
                await load.until_all_have(BEFORE)
                leader = cluster.leader()
                victim = leader if name.startswith("leader") else next(s for s in cluster.servers if s is not leader)
                with happens(victim):
                    await load.until_all_have(load.most + AFTER)
                await load.until_all_have(load.most + AFTER)
                load.ends_at = end = load.most + AFTER
    for stream in load.ids:
        assert load.acknowledged[stream] == end
        assert load.read[stream] == [*range(end), "done"]


async def test_what_was_acknowledged_survives_the_leader_for_good(cluster: NATSCluster) -> None:
    with anyio.fail_after(BOUND_SECONDS):
        async with StreamManager.connect(cluster.url) as streams, streams.open("kept") as stream:
            for number in range(50):
                await stream.write(number)
            await stream.done("end")
        leader = cluster.leader()
        async with storage_for(others(cluster, leader)[0].url) as storage:
            with dead(leader):
                page = await storage.read("kept", 0, 100)
                assert page is not None
                assert page.head.tail == len(page.records) == 51


async def test_a_client_that_knows_one_server_learns_of_the_others(cluster: NATSCluster) -> None:
    with anyio.fail_after(BOUND_SECONDS):
        async with storage_for(cluster.servers[0].url) as storage:
            with dead(cluster.servers[0]):
                assert await storage.read("learned") is None


def others(cluster: NATSCluster, server: NATSServer) -> list[NATSServer]:
    return [other for other in cluster.servers if other is not server]
