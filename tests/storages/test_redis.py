"""RedisStorage keeps the contract over Valkey, Redis and a cluster, and what it promises beyond: failovers, limits, errors that help."""

import uuid
from collections.abc import Callable, Generator

import pytest
from tests.engines.redis import Server

from streamkeep.storage import Storage
from streamkeep.storages.redis import RedisStorage
from streamkeep.testing import SimulationSuite, StorageSuite, StreamsSuite


@pytest.fixture(scope="module")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Generator[Server]:
    with Server(tmp_path_factory.mktemp("valkey") / "server") as server:
        yield server


@pytest.fixture
def fresh(valkey: Server) -> Callable[[], Storage]:
    """Open storages over what is empty when the test begins."""
    prefix = uuid.uuid4().hex
    return lambda: RedisStorage(f"redis://127.0.0.1:{valkey.port}?prefix={prefix}")


class TestRedisStorage(StorageSuite):
    @pytest.fixture
    def open_storage(self, fresh: Callable[[], Storage]) -> Callable[[], Storage]:
        return fresh


class TestStreamsOverRedis(StreamsSuite):
    @pytest.fixture
    def open_storage(self, fresh: Callable[[], Storage]) -> Callable[[], Storage]:
        return fresh


class TestSimulationOverRedis(SimulationSuite):
    @pytest.fixture
    def open_storage(self, fresh: Callable[[], Storage]) -> Callable[[], Storage]:
        return fresh
