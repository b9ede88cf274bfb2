"""The StreamsSuite over the storages that come with the package."""

from collections.abc import Callable
from pathlib import Path

import pytest

from streamkeep.storage import Storage
from streamkeep.storages.memory import MemoryStorage
from streamkeep.storages.sqlite import SQLiteStorage
from streamkeep.testing import StreamsSuite


class TestStreamsOverMemory(StreamsSuite):
    @pytest.fixture(params=["asyncio", "trio"])
    def anyio_backend(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    @pytest.fixture
    def open_storage(self) -> Callable[[], Storage]:
        storage = MemoryStorage()
        return lambda: storage


class TestStreamsOverSQLite(StreamsSuite):
    @pytest.fixture
    def anyio_backend(self) -> str:
        return "asyncio"

    @pytest.fixture
    def open_storage(self, tmp_path: Path) -> Callable[[], Storage]:
        return lambda: SQLiteStorage(tmp_path / "streams.db")
