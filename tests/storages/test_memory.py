"""MemoryStorage keeps the contract, under asyncio and trio, and what it promises beyond."""

from collections.abc import Callable

import pytest

from streamkeep.errors import StorageFullError
from streamkeep.storage import Head, Storage
from streamkeep.storages.memory import MemoryStorage
from streamkeep.testing import StorageSuite


class TestMemoryStorage(StorageSuite):
    @pytest.fixture(params=["asyncio", "trio"])
    def anyio_backend(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    @pytest.fixture
    def open_storage(self) -> Callable[[], Storage]:
        storage = MemoryStorage()
        return lambda: storage

    async def test_its_content_outlives_leaving_it(self) -> None:
        storage = MemoryStorage()
        async with storage:
            await storage.commit("s", None, Head(1, 1, b"", 9e9), [b"one"])
        async with storage:
            assert [stream for stream, _ in await storage.scan()] == ["s"]

    async def test_a_full_storage_creates_nothing_but_goes_on_writing(self) -> None:
        storage = MemoryStorage(max_streams=1)
        assert await storage.commit("s", None, Head(1, 0, b"", 9e9))
        with pytest.raises(StorageFullError, match="1 streams"):
            await storage.commit("t", None, Head(1, 0, b"", 9e9))
        assert await storage.commit("s", 1, Head(2, 1, b"", 9e9), [b"one"])
        assert await storage.delete("s", 2)
        assert await storage.commit("t", None, Head(1, 0, b"", 9e9))

    async def test_what_was_due_and_is_deleted_is_not_kept_until_it_would_have_been(self) -> None:
        storage = MemoryStorage()
        for number in range(1, 2_000):
            assert await storage.commit("s", None, Head(number, 0, b"", 9e9))
            assert await storage.delete("s", number)
        assert len(storage._due) < 200

    async def test_a_commit_that_keeps_the_expiry_is_not_noted_as_due_anew(self) -> None:
        storage = MemoryStorage()
        assert await storage.commit("s", None, Head(1, 0, b"", 9e9))
        for version in range(1, 50):
            assert await storage.commit("s", version, Head(version + 1, version, b"", 9e9), [b"one"])
        assert len(storage._due) == 1

    async def test_a_first_record_that_goes_back_loses_nothing_and_brings_nothing_back(self) -> None:
        storage = MemoryStorage()
        assert await storage.commit("s", None, Head(1, 4, b"", 9e9, first=3), [b"0", b"1", b"2", b"3"])
        assert await storage.commit("s", 1, Head(2, 6, b"", 9e9, first=1), [b"4", b"5"])
        for start, records in ((0, []), (1, []), (3, [b"3", b"4", b"5"])):
            page = await storage.read("s", start, 10)
            assert page is not None
            assert list(page.records) == records
