"""HTTPStorage keeps the contract over a server in another process, which has its streams in SQLite."""

import uuid
from collections.abc import Callable, Generator

import pytest
from tests.engines.http import Server

from streamkeep.storage import Storage
from streamkeep.storages.http import HTTPStorage
from streamkeep.testing import StorageSuite, StreamsSuite


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Generator[Server]:
    with Server(tmp_path_factory.mktemp("http") / "server") as server:
        yield server


@pytest.fixture
def url(server: Server) -> str:
    server.name = f"test-{uuid.uuid4().hex[:8]}"
    return server.url


class TestHTTPStorage(StorageSuite):
    @pytest.fixture
    def open_storage(self, url: str) -> Callable[[], Storage]:
        return lambda: HTTPStorage(url)


class TestStreamsOverHTTP(StreamsSuite):
    @pytest.fixture
    def open_storage(self, url: str) -> Callable[[], Storage]:
        return lambda: HTTPStorage(url)
