"""PostgresStorage keeps the contract, and what it promises beyond."""

from collections.abc import Callable, Generator

import pytest
from tests.engines.postgres import Postgres

from streamkeep.storage import Storage
from streamkeep.storages.postgres import PostgresStorage
from streamkeep.testing import SimulationSuite, StorageSuite, StreamsSuite


@pytest.fixture(scope="module")
def server() -> Generator[Postgres]:
    with Postgres() as server:
        yield server


@pytest.fixture
def postgres(server: Postgres) -> Postgres:
    """The server, with nothing of this test's in it."""
    return server.empty()


@pytest.fixture
def open_storage(postgres: Postgres) -> Callable[[], Storage]:
    return lambda: PostgresStorage(postgres.url)


class TestPostgresStorage(StorageSuite):
    @pytest.fixture
    def open_storage(self, postgres: Postgres) -> Callable[[], Storage]:
        return lambda: PostgresStorage(postgres.url)


class TestStreamsOverPostgres(StreamsSuite):
    @pytest.fixture
    def open_storage(self, postgres: Postgres) -> Callable[[], Storage]:
        return lambda: PostgresStorage(postgres.url)


class TestSimulationOverPostgres(SimulationSuite):
    @pytest.fixture
    def open_storage(self, postgres: Postgres) -> Callable[[], Storage]:
        return lambda: PostgresStorage(postgres.url)
