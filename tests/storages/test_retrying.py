"""RetryingStorage: whatever it is asked is done once, and answered, if the storage can be reached in time."""

from collections.abc import Callable
from datetime import timedelta

import anyio
import pytest
from trio.testing import MockClock

from streamkeep.errors import StorageError, StorageFullError, StorageUnavailableError
from streamkeep.storage import Head, Storage
from streamkeep.storages.memory import MemoryStorage
from streamkeep.storages.retrying import RetryingStorage
from streamkeep.testing import StorageSuite
from streamkeep.testing.faults import FaultyStorage

FIRST = Head(1, 1, b"", 9e9)
SECOND = Head(2, 2, b"", 9e9)
GONE = StorageUnavailableError("gone")


class TestRetryingStorage(StorageSuite):
    @pytest.fixture
    def open_storage(self) -> Callable[[], Storage]:
        storage = MemoryStorage()
        return lambda: RetryingStorage(storage)


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, object]]:
    return "trio", {"clock": MockClock(autojump_threshold=0)}


@pytest.fixture
def faulty() -> FaultyStorage:
    return FaultyStorage(MemoryStorage())


@pytest.fixture
def storage(faulty: FaultyStorage) -> RetryingStorage:
    return RetryingStorage(faulty)


@pytest.mark.parametrize("times", [1, 3])
async def test_a_commit_whose_answers_are_lost_happens_once_and_is_acknowledged(
    faulty: FaultyStorage, storage: RetryingStorage, times: int
) -> None:
    faulty.lose_answer("commit", times=times, error=GONE)
    assert await storage.commit("s", None, FIRST, [b"one"])
    faulty.lose_answer("commit", times=times, error=GONE)
    assert await storage.commit("s", 1, SECOND, [b"two"])
    page = await faulty.read("s", 0, 10)
    assert page is not None
    assert (page.head, list(page.records)) == (SECOND, [b"one", b"two"])


async def test_a_commit_that_never_arrived_is_made(faulty: FaultyStorage, storage: RetryingStorage) -> None:
    faulty.refuse("commit", times=2, error=GONE)
    assert await storage.commit("s", None, FIRST, [b"one"])


async def test_who_was_overtaken_while_its_answer_was_lost_is_refused(faulty: FaultyStorage, storage: RetryingStorage) -> None:
    await faulty.commit("s", None, FIRST, [b"one"])
    faulty.refuse("commit", error=GONE)
    hold = faulty.hold("commit")
    answers: list[bool] = []

    async def commit() -> None:
        answers.append(await storage.commit("s", 1, SECOND, [b"ours"]))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(commit)
        await hold.reached.wait()
        assert await faulty.commit("s", 1, Head(3, 2, b"", 9e9), [b"theirs"])
        hold.release()
    assert answers == [False]


async def test_a_refusal_without_a_lost_answer_is_believed(faulty: FaultyStorage, storage: RetryingStorage) -> None:
    await faulty.commit("s", None, FIRST, [b"one"])
    assert not await storage.commit("s", None, FIRST, [b"one"])  # another's, and the same head: it was not us
    assert faulty.calls["read"] == 0


async def test_a_read_that_loses_its_connection_after_a_lost_commit_is_made_again(
    faulty: FaultyStorage, storage: RetryingStorage
) -> None:
    faulty.lose_answer("commit", error=GONE)
    faulty.refuse("read", times=2, error=GONE)
    assert await storage.commit("s", None, FIRST, [b"one"])


async def test_a_full_storage_does_not_deny_what_was_stored_before(faulty: FaultyStorage, storage: RetryingStorage) -> None:
    faulty.lose_answer("commit", error=GONE)
    faulty.refuse("commit", error=StorageFullError("full"))
    assert await storage.commit("s", None, FIRST, [b"one"])
    faulty.refuse("commit", error=GONE)
    faulty.refuse("commit", error=StorageFullError("full"))
    with pytest.raises(StorageFullError):
        await storage.commit("s", 1, SECOND, [b"two"])


async def test_a_deletion_whose_answer_is_lost_is_acknowledged(faulty: FaultyStorage, storage: RetryingStorage) -> None:
    await faulty.commit("s", None, FIRST, [b"one"])
    faulty.lose_answer("delete", error=GONE)
    assert await storage.delete("s", 1)
    assert not await storage.delete("s", 1)


async def test_a_deletion_that_was_overtaken_while_its_answer_was_lost_is_refused(
    faulty: FaultyStorage, storage: RetryingStorage
) -> None:
    await faulty.commit("s", None, FIRST, [b"one"])
    faulty.refuse("delete", error=GONE)
    hold = faulty.hold("delete")
    answers: list[bool] = []

    async def delete() -> None:
        answers.append(await storage.delete("s", 1))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(delete)
        await hold.reached.wait()
        assert await faulty.commit("s", 1, SECOND, [b"two"])
        hold.release()
    assert answers == [False]
    assert await faulty.read("s") is not None


async def test_reading_scanning_and_watching_are_tried_again(faulty: FaultyStorage, storage: RetryingStorage) -> None:
    await faulty.commit("s", None, FIRST, [b"one"])
    for operation in ("read", "scan", "expired", "watch"):
        faulty.refuse(operation, times=2, error=GONE)
    assert await storage.read("s") is not None
    assert list(await storage.scan()) == [("s", FIRST)]
    assert list(await storage.expired(9e9)) == [("s", FIRST)]
    async with storage.watch("s") as doorbell:
        await storage.commit("s", 1, SECOND, [b"two"])
        await doorbell.wait()


async def test_the_timeout_ends_it(faulty: FaultyStorage) -> None:
    storage = RetryingStorage(faulty, timeout=timedelta(seconds=30))
    faulty.refuse("read", times=10_000, error=GONE)
    began = anyio.current_time()
    with pytest.raises(StorageUnavailableError):
        await storage.read("s")
    assert 28 <= anyio.current_time() - began <= 30
    assert faulty.calls["read"] < 100


async def test_a_clone_is_entered_although_its_engine_is_away_at_that_moment() -> None:
    class Away(MemoryStorage):
        def clone(self) -> Storage:  # type: ignore[override]  # memory itself has none
            faulty = FaultyStorage(MemoryStorage())
            faulty.refuse("enter", times=3, error=StorageUnavailableError("away"))
            return faulty

    clone = RetryingStorage(Away()).clone()
    assert clone is not None
    async with clone:
        assert await clone.read("s") is None


def test_a_clone_is_one_of_the_wrapped_storage_with_the_same_timeout() -> None:
    class Cloneable(MemoryStorage):
        def clone(self) -> Storage:  # type: ignore[override]  # memory itself has none
            return Cloneable()

    assert RetryingStorage(MemoryStorage()).clone() is None
    clone = RetryingStorage(Cloneable(), timeout=timedelta(seconds=7)).clone()
    assert clone is not None
    assert isinstance(clone.storage, Cloneable)
    assert clone._timeout_seconds == 7


@pytest.mark.parametrize("error", [StorageError("no"), StorageFullError("full")])
async def test_other_errors_are_raised_at_once(faulty: FaultyStorage, storage: RetryingStorage, error: StorageError) -> None:
    faulty.refuse("commit", error=error)
    with pytest.raises(type(error)):
        await storage.commit("s", None, FIRST, [b"one"])
    assert faulty.calls["commit"] == 1


async def test_entering_is_not_tried_again(faulty: FaultyStorage, storage: RetryingStorage) -> None:
    faulty.refuse("enter", error=GONE)
    with pytest.raises(StorageUnavailableError):
        await storage.__aenter__()
