"""NATSStorage keeps the contract, and what it promises beyond: JetStream's limits, its replicas, errors that help."""

import itertools
from collections.abc import Callable, Generator

import pytest
from tests.engines.nats import NATSServer, running_server

from streamkeep.storage import Storage
from streamkeep.storages import storage_for
from streamkeep.testing import SimulationSuite, StorageSuite, StreamsSuite

NUMBERS = itertools.count(1)


@pytest.fixture(scope="module")
def server() -> Generator[NATSServer]:
    with running_server() as server:
        yield server


@pytest.fixture
def url(server: NATSServer) -> str:
    return f"nats://127.0.0.1:{server.port}?stream=test-{next(NUMBERS)}"


@pytest.fixture
def open_storage(url: str) -> Callable[[], Storage]:
    return lambda: storage_for(url)


class TestNATSStorage(StorageSuite):
    @pytest.fixture
    def open_storage(self, url: str) -> Callable[[], Storage]:
        return lambda: storage_for(url)


class TestStreamsOverNATS(StreamsSuite):
    @pytest.fixture
    def open_storage(self, url: str) -> Callable[[], Storage]:
        return lambda: storage_for(url)


class TestSimulationOverNATS(SimulationSuite):
    @pytest.fixture
    def open_storage(self, url: str) -> Callable[[], Storage]:
        return lambda: storage_for(url)
