"""What goes wrong in a thread of a SQLiteStorage ends what it concerns, as StorageError to whoever asked, and nothing else."""

# ruff: noqa: ASYNC240 (these tests handle files, and nobody else is on their loop)

import asyncio
import os
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, Final

import anyio
import apsw
import pytest
from tests.powerloss.recorder import driven_by

from streamkeep.errors import InvalidArgumentError, StorageCorruptError, StorageError
from streamkeep.storage import Head, Page
from streamkeep.storages.sqlite import SQLiteStorage

BOUND_SECONDS: Final = 20
_serial: Final = count(1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "streams.db"


class FaultyVFS(apsw.VFS):
    """SQLite's own, whose reads and shared-memory locks fail while `is_failing`."""

    def __init__(self, name: str) -> None:
        super().__init__(name, "")
        self.vfs_name = name
        self.is_failing = False
        self.failed = 0

    def xOpen(self, name: str | apsw.URIFilename | None, flags: list[int]) -> apsw.VFSFile:  # noqa: N802 (SQLite's name)
        return _FaultyFile(self, name, flags)


class _FaultyFile(apsw.VFSFile):
    def __init__(self, vfs: FaultyVFS, name: str | apsw.URIFilename | None, flags: list[int]) -> None:
        super().__init__("", name, flags)
        self._vfs = vfs

    def xRead(self, amount: int, offset: int) -> bytes:  # noqa: N802
        if self._vfs.is_failing:
            self._vfs.failed += 1
            raise apsw.exception_for(apsw.SQLITE_IOERR_READ)
        return super().xRead(amount, offset)


@contextmanager
def faulty() -> Generator[FaultyVFS]:
    vfs = FaultyVFS(f"streamkeep-faulty-{next(_serial)}")
    try:
        with driven_by(vfs.vfs_name, checkpoint_pages=1000):
            yield vfs
    finally:
        vfs.unregister()


async def test_reads_that_the_disk_refuses_fail_and_the_next_one_works(path: Path) -> None:
    """SQLite ends the transaction by itself then."""
    async with SQLiteStorage(path) as storage:
        await fill(storage, "s", 300)
    with faulty() as disk:
        async with SQLiteStorage(path) as storage, SQLiteStorage(path) as other:
            for number in range(3):
                assert await other.commit(f"other{number}", None, a_head(1, 0))  # so that nothing is read from a cache
                disk.is_failing = True
                reads = [storage.read("s", start, 10) for start in range(0, 300, 10)]
                outcomes = await asyncio.gather(*reads, return_exceptions=True)
                disk.is_failing = False
                assert disk.failed
                assert any(isinstance(outcome, StorageError) for outcome in outcomes)
                assert all(isinstance(outcome, StorageError | Page) for outcome in outcomes), outcomes
                await check(storage, "s", 300)
            disk.is_failing = True
            with pytest.raises(StorageError):
                await asyncio.gather(other.scan(), other.expired(9e9), other.read("s", 100, 100))
            disk.is_failing = False
            assert "s" in dict(await other.scan())


async def test_a_commit_for_which_the_disk_cannot_be_read_fails_and_the_next_one_works(path: Path) -> None:
    async with SQLiteStorage(path) as storage:
        await fill(storage, "s", 300)
    with faulty() as disk:
        async with SQLiteStorage(path) as storage:
            disk.is_failing = True
            with pytest.raises(StorageError):
                await asyncio.gather(storage.commit("s", 1, a_head(2, 301), [b"x"]), storage.delete("s", 1))
            disk.is_failing = False
            assert await storage.commit("s", 1, a_head(2, 301), [b"300"])
            await check(storage, "s", 301)


async def test_a_file_that_was_cut_off_fails_readers_and_works_when_it_is_whole_again(path: Path) -> None:
    async with SQLiteStorage(path) as storage:
        await fill(storage, "s", 3000)
    content = path.read_bytes()
    async with SQLiteStorage(path) as storage:
        os.truncate(path, 8192)
        with pytest.raises(StorageError):
            await storage.read("s", 2000, 500)
        path.write_bytes(content)
        await check(storage, "s", 3000)


async def test_damage_in_one_stream_is_told_to_its_reader_only(path: Path) -> None:
    async with SQLiteStorage(path) as storage:
        await fill(storage, "whole", 10)
        await fill(storage, "damaged", 3000)
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size // 2)
        file.write(b"\xff" * (size // 2))
    async with SQLiteStorage(path) as storage:
        damaged, whole = await asyncio.gather(
            storage.read("damaged", 2500, 400), storage.read("whole", 0, 10), return_exceptions=True
        )
        assert isinstance(damaged, StorageCorruptError)
        assert isinstance(whole, Page)


class OddError(Exception):
    """Not one that anybody expects."""


@pytest.mark.parametrize(
    "raised", [RuntimeError, MemoryError, RecursionError, OSError, SystemExit, KeyboardInterrupt, GeneratorExit, OddError]
)
async def test_whatever_is_raised_in_a_thread_ends_what_it_concerns(path: Path, raised: type[BaseException]) -> None:
    class Records(Sequence[bytes]):
        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: object) -> Any:
            raise raised("out of the blue")

    async with SQLiteStorage(path) as storage:
        for version in range(1, 4):
            bad, good, worse = await asyncio.gather(
                storage.commit("bad", None, a_head(1, 1), Records()),
                storage.commit(
                    "good", None if version == 1 else version - 1, a_head(version, version), [b"%d" % (version - 1)]
                ),
                storage.commit("bad", None, a_head(1, 1), Records()),
                return_exceptions=True,
            )
            assert good is True
            assert isinstance(bad, StorageError)
            assert isinstance(worse, StorageError)
            assert bad is not worse
            assert isinstance(bad.__cause__, raised)
        await check(storage, "good", 3)
        assert await storage.read("bad") is None


async def test_an_id_that_is_no_text_is_refused_everywhere(path: Path) -> None:
    async with SQLiteStorage(path) as storage:
        calls: Sequence[Callable[[], Any]] = [
            lambda: storage.read("\ud800"),
            lambda: storage.commit("\ud800", None, a_head(1, 0)),
            lambda: storage.delete("\ud800", 1),
            lambda: storage.scan("\ud800"),
            storage.watch("\ud800").__aenter__,
        ]
        for call in calls:
            with pytest.raises(InvalidArgumentError, match="surrogates"):
                await call()


async def test_a_failure_that_many_wait_for_is_another_exception_for_each(path: Path) -> None:
    async with SQLiteStorage(path) as storage:
        assert await storage.commit("s", None, a_head(1, 0))
        path.rename(path.with_name("moved"))
        commits = [storage.commit("s", 1, a_head(2, 0)) for _ in range(400)]
        began = time.process_time()
        outcomes = await asyncio.gather(*commits, return_exceptions=True)
        assert time.process_time() - began < 2
        assert len({id(outcome) for outcome in outcomes}) == 400
        assert all(isinstance(outcome, StorageError) and "removed or replaced" in str(outcome) for outcome in outcomes)
        path.with_name("moved").rename(path)
        assert await storage.commit("s", 1, a_head(2, 0))


async def test_what_many_read_at_once_comes_in_turns_of_the_loop(path: Path) -> None:
    """Not all of it in one: whoever reads a page can work on it, and let go of it, before there are too many of them."""
    async with SQLiteStorage(path) as storage:
        for number in range(40):
            assert await storage.commit(f"s{number}", None, a_head(1, 16), [b"x" * 65_536] * 16)
        held = most = 0

        async def read(number: int) -> None:
            nonlocal held, most
            page = await storage.read(f"s{number}", 0, 100)
            assert page is not None
            held += sum(map(len, page.records))
            most = max(most, held)
            asyncio.get_running_loop().call_soon(release, sum(map(len, page.records)))

        def release(size: int) -> None:
            nonlocal held
            held -= size

        with anyio.fail_after(BOUND_SECONDS):
            await asyncio.gather(*(read(number) for number in range(40)))
        assert most <= 8 << 20


# -- the words of the tests


def a_head(version: int, tail: int) -> Head:
    return Head(version, tail, b"", 9e9)


async def fill(storage: SQLiteStorage, stream: str, number: int) -> None:
    records = [b"%d" % i if i % 2 else b"%d" % i + bytes(900) for i in range(number)]
    assert await storage.commit(stream, None, a_head(1, number), records)


async def check(storage: SQLiteStorage, stream: str, number: int) -> None:
    """All of its records are there."""
    found: list[bytes] = []
    while len(found) < number:
        page = await storage.read(stream, len(found), number)
        assert page is not None
        assert page.records
        found += page.records
    assert [int(record.rstrip(b"\0")) for record in found] == list(range(number))
