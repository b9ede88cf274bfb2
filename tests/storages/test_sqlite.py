"""SQLiteStorage keeps the contract, and what it promises beyond: files, processes, threads, errors that help."""

# ruff: noqa: ASYNC110, ASYNC240 (these tests look at files and threads, and nobody else is on their loop)

import asyncio
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import asynccontextmanager, closing
from functools import partial
from pathlib import Path
from typing import TypeVar

import anyio
import pytest

from streamkeep.errors import InvalidArgumentError, StorageCorruptError, StorageError, StorageFullError
from streamkeep.storage import Head, Storage
from streamkeep.storages import sqlite, storage_for
from streamkeep.storages.sqlite import SQLiteStorage, _clock, _database, _interlock, _writer
from streamkeep.testing import StorageSuite

T = TypeVar("T")

BOUND_SECONDS = 20
NOBODY = 65534

# Commits one record to the stream in argv[2] for each line it reads, from version 0 on, and prints the tail when it is stored.
WRITER = """
import asyncio, sys
from streamkeep.storage import Head
from streamkeep.storages.sqlite import SQLiteStorage

async def main(path, stream):
    async with SQLiteStorage(path) as storage:
        page = await storage.read(stream)
        version, tail = (page.head.version, page.head.tail) if page else (None, 0)
        print("ready", flush=True)
        while await asyncio.to_thread(sys.stdin.readline):
            new = (version or 0) + 1
            assert await storage.commit(stream, version, Head(new, tail + 1, b"", 9e9), [b"%d" % tail])
            version, tail = new, tail + 1
            print(tail, flush=True)

asyncio.run(main(*sys.argv[1:]))
"""

# Commits for ever, 16 streams at once, and prints each stream's tail when it is stored.
BUSY_WRITER = """
import asyncio, sys
from streamkeep.storage import Head
from streamkeep.storages.sqlite import SQLiteStorage

async def write(storage, stream):
    version = None
    for tail in range(1, 1_000_000):
        assert await storage.commit(stream, version, Head(tail, tail, b"", 9e9), [b"%d" % tail])
        version = tail
        print(stream, tail, flush=True)

async def main(path, prefix):
    async with SQLiteStorage(path) as storage:
        await asyncio.gather(*(write(storage, f"{prefix}{i}") for i in range(16)))

asyncio.run(main(*sys.argv[1:]))
"""

# Enters as a user with no rights, if this one has them all.
ENTER = """
import asyncio, os, sys
from streamkeep.errors import StorageError
from streamkeep.storages.sqlite import SQLiteStorage

async def main(path):
    async with SQLiteStorage(path):
        pass

if os.geteuid() == 0:
    os.setgroups([int(group) for group in sys.argv[3:]])
    os.setgid(int(sys.argv[2]))
    os.setuid(int(sys.argv[2]))
try:
    asyncio.run(main(sys.argv[1]))
except StorageError as error:
    print(type(error).__name__, error)
"""


class TestSQLiteStorage(StorageSuite):
    @pytest.fixture
    def open_storage(self, tmp_path: Path) -> Callable[[], Storage]:
        return lambda: SQLiteStorage(tmp_path / "streams.db")


@pytest.mark.slow
class TestSQLiteStorageWithoutInotify(StorageSuite):
    @pytest.fixture
    def open_storage(self, tmp_path: Path, without_inotify: None) -> Callable[[], Storage]:
        return lambda: SQLiteStorage(tmp_path / "streams.db", synchronous="NORMAL")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def without_inotify(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on every system but Linux."""
    monkeypatch.setattr(sqlite, "open_inotify", lambda path: None)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "streams.db"


@pytest.fixture
def short_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_writer, "TIMEOUT_SECONDS", 0.2)


# -- what the file is


async def test_the_file_of_another_program_is_refused_and_left_alone(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE theirs (x)")
    db.close()
    before = path.read_bytes()
    with pytest.raises(StorageCorruptError, match="not a streamkeep database"):
        await enter(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"text, and no database at all" * 100, b"SQLite format 3\0" + b"\xff" * 4080])
async def test_a_file_that_is_no_database_is_refused_and_left_alone(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(StorageCorruptError, match="is not a streamkeep database"):
        await enter(path)
    assert path.read_bytes() == content


async def test_an_empty_file_becomes_a_database(path: Path) -> None:
    path.touch()
    await enter(path)
    await enter(path)


def test_a_database_that_is_being_created_is_never_taken_for_a_foreign_one(tmp_path: Path) -> None:
    for number in range(100):
        path = tmp_path / f"{number}.db"
        path.touch()
        with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as db:
            db.execute("PRAGMA journal_mode = WAL")
            creating = threading.Thread(target=db.executescript, args=(_database._SCHEMA,))
            with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, isolation_level=None)) as reader:
                creating.start()
                while _database._is_new(reader, path):
                    pass
            creating.join()


async def test_a_damaged_header_is_reported(path: Path) -> None:
    await fill(path)
    with path.open("r+b") as file:
        file.write(b"\0" * 100)
    with pytest.raises(StorageCorruptError, match="first page is damaged"):
        await enter(path)


async def test_damage_inside_is_reported_to_who_meets_it(path: Path) -> None:
    await fill(path, records=10_000)
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (size - 4096))
    with pytest.raises(StorageCorruptError, match="damaged"):
        async with SQLiteStorage(path) as storage:
            await storage.read("s", 0, 10)
    with pytest.raises(StorageCorruptError, match="damaged"):
        async with SQLiteStorage(path) as storage:
            await storage.commit("s", 1, a_head(2, 10_001), [b"x"])


async def test_what_is_behind_missing_records_does_not_take_their_place(path: Path) -> None:
    async with SQLiteStorage(path) as storage:
        records = [b"%d" % number for number in range(10)]
        assert await storage.commit("s", None, a_head(1, 10), records)
        with sqlite3.connect(path) as db:
            db.execute("DELETE FROM records WHERE offset BETWEEN 3 AND 5")
        db.close()
        pages = [await storage.read("s", start, 100) for start in (0, 3, 6)]

    assert [page and list(page.records) for page in pages] == [records[:3], [], records[6:]]


async def test_a_database_of_a_newer_streamkeep_is_refused(path: Path) -> None:
    await fill(path)
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 4")
    db.close()
    with pytest.raises(StorageCorruptError, match="newer streamkeep"):
        await enter(path)


async def test_what_a_log_forgets_is_not_in_the_file_any_more(path: Path) -> None:
    async with SQLiteStorage(path) as storage:
        for stream in ("s", "other"):
            assert await storage.commit(stream, None, a_head(1, 10), [b"record"] * 10)
        assert await storage.commit("s", 1, Head(2, 12, b"", 9e9, first=11), [b"record"] * 2)
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT count(*) FROM records").fetchone() == (11,)


async def test_a_directory_is_refused(path: Path) -> None:
    path.mkdir()
    with pytest.raises(StorageError, match="cannot be opened"):
        await enter(path)


async def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"missing/streams\.db: cannot be opened.*directory must exist"):
        await enter(tmp_path / "missing" / "streams.db")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no modes")
def test_a_directory_without_permission_is_named(tmp_path: Path) -> None:
    let_others_through_to(tmp_path)
    tmp_path.chmod(0o555)
    assert "cannot be opened and written" in enter_as_nobody(tmp_path / "streams.db")
    tmp_path.chmod(0o755)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no modes")
def test_a_file_without_permission_is_named(path: Path) -> None:
    asyncio.run(fill(path))
    let_others_through_to(path.parent)
    path.parent.chmod(0o777)
    for file in path.parent.iterdir():
        file.chmod(0o444)
    assert "cannot be opened and written" in enter_as_nobody(path)


async def test_a_path_where_there_can_be_no_write_ahead_log_is_refused() -> None:
    with pytest.raises(StorageError):
        await enter(Path("/proc/streams.db"))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no modes")
async def test_new_files_are_private_and_others_keep_their_mode(path: Path) -> None:
    async with SQLiteStorage(path) as storage, storage.watch("s"):
        assert await storage.commit("s", None, a_head(1, 0))
        files = {file.name: file.stat().st_mode & 0o777 for file in path.parent.iterdir()}
    assert set(files) == {"streams.db" + suffix for suffix in ("", "-wal", "-shm", "-lock", "-notify")}
    assert set(files.values()) == {0o600}
    path.chmod(0o640)
    await enter(path)
    assert path.stat().st_mode & 0o777 == 0o640


async def test_paths_with_odd_names_are_just_names(tmp_path: Path) -> None:
    for name in ("a?mode=memory", "100% #1.db", "ünï;'\".db", "file:x"):
        await fill(tmp_path / name)
        assert (tmp_path / name).is_file()


async def test_a_path_that_begins_with_two_slashes_or_takes_a_detour_is_the_same_file(tmp_path: Path) -> None:
    real = tmp_path / "real"
    (real / "deep").mkdir(parents=True)
    link = tmp_path / "link.db"
    link.symlink_to(real / "streams.db")
    (tmp_path / "folder").symlink_to(real / "deep")
    names: list[Path | str] = [
        real / "streams.db",
        f"/{real}/streams.db",
        f"//{real}/streams.db",
        link,
        tmp_path / "folder" / ".." / "streams.db",
    ]
    for number, name in enumerate(names):
        async with SQLiteStorage(name) as storage, SQLiteStorage(names[0]) as other:
            assert await storage.commit(f"s{number}", None, a_head(1, 0))
            assert len(await other.scan()) == number + 1
    assert {file.name for file in tmp_path.iterdir()} == {"real", "link.db", "folder"}
    assert {file.name for file in real.iterdir()} == {"deep", "streams.db", "streams.db-lock", "streams.db-notify"}


@pytest.mark.skipif(sys.platform != "linux", reason="names are bytes on Linux")
async def test_a_name_that_is_no_text_is_just_a_name(tmp_path: Path) -> None:
    name = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe.db")
    await fill(Path(name))
    async with SQLiteStorage(name) as storage:
        assert await tail_of(storage, "s") == (1, 1)


async def test_a_name_with_a_nul_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="NUL"):
        SQLiteStorage("a\0b")


async def test_a_clone_is_over_the_same_file_wherever_the_process_is_by_then(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.chdir(path.parent)
    storage = SQLiteStorage(path.name, synchronous="NORMAL")
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    async with storage:
        assert await storage.commit("s", None, a_head(1, 1), [b"x"])

        async def use() -> tuple[int, int] | None:
            async with storage.clone() as clone:
                assert abs(clone.time() - storage_time) < 5
                return await tail_of(clone, "s")

        storage_time = storage.time()
        assert await asyncio.to_thread(lambda: asyncio.run(use())) == (1, 1)
    assert path.is_file()


# -- who else has the file


FOREIGN = {
    "text": lambda path: path.write_bytes(b"text, and no database at all" * 100),
    "a database": lambda path: foreign(path, "DELETE").close(),
    "a database with a log": lambda path: foreign(path, "WAL").close(),
}


def foreign(path: Path, mode: str) -> sqlite3.Connection:
    db = sqlite3.connect(path, isolation_level=None)
    db.execute(f"PRAGMA journal_mode = {mode}")
    db.execute("CREATE TABLE theirs (x)")
    return db


@pytest.mark.parametrize("make", FOREIGN.values(), ids=FOREIGN)
async def test_nothing_is_left_beside_a_foreign_file(path: Path, make: Callable[[Path], object]) -> None:
    make(path)
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    with pytest.raises(StorageCorruptError, match="not a streamkeep database"):
        await enter(path)
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before


async def test_nothing_is_left_beside_a_foreign_database_that_is_in_use(path: Path) -> None:
    """All of it may be in its log."""
    db = foreign(path, "WAL")
    before = {file.name for file in path.parent.iterdir()}
    with pytest.raises(StorageCorruptError, match="not a streamkeep database"):
        await enter(path)
    assert {file.name for file in path.parent.iterdir()} == before
    db.execute("INSERT INTO theirs VALUES (1)")
    db.close()


async def test_a_pipe_is_refused_without_waiting_for_it(path: Path) -> None:
    os.mkfifo(path)
    with pytest.raises(StorageError, match="no ordinary file"):
        await enter(path)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def remove_what_is_beside(path: Path) -> None:
    for suffix in ("-lock", "-notify"):
        path.with_name(path.name + suffix).unlink()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can be several users")
async def test_who_may_only_read_a_database_leaves_nothing_that_locks_its_owner_out(path: Path) -> None:
    await fill(path)
    let_others_through_to(path.parent)
    path.parent.chmod(0o777)
    remove_what_is_beside(path)
    for mode in (0o644, 0o444, 0o600):
        path.chmod(mode)
        assert "allowed to read and write" in enter_as_nobody(path)
        assert {file.name for file in path.parent.iterdir()} == {"streams.db"}
    path.parent.chmod(0o755)
    await fill(path, "another")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can be several users")
async def test_what_a_member_of_the_group_makes_beside_a_database_is_the_groups(path: Path) -> None:
    await fill(path)
    let_others_through_to(path.parent)
    path.parent.chmod(0o777)
    remove_what_is_beside(path)
    os.chown(path, NOBODY, NOBODY)
    path.chmod(0o660)
    assert not enter_as(path, NOBODY - 1, groups=[NOBODY])
    assert path.with_name("streams.db-lock").stat().st_uid == NOBODY - 1
    assert not enter_as_nobody(path)
    path.parent.chmod(0o755)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files away")
async def test_what_root_makes_beside_a_users_database_is_the_users(path: Path) -> None:
    await fill(path)
    let_others_through_to(path.parent)
    path.parent.chmod(0o777)
    for mode in (0o600, 0o660):
        for file in path.parent.iterdir():
            if file != path:
                file.unlink()
        os.chown(path, NOBODY, NOBODY)
        path.chmod(mode)
        mask = os.umask(0o077)
        try:
            async with SQLiteStorage(path) as storage, storage.watch("s"):
                status = [file.stat() for file in path.parent.iterdir()]
                assert len(status) == 5
                assert {(s.st_uid, s.st_gid, s.st_mode & 0o777) for s in status} == {(NOBODY, NOBODY, mode)}
                assert not enter_as_nobody(path)
        finally:
            os.umask(mask)
        assert not enter_as_nobody(path)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such links")
async def test_a_lock_file_that_is_a_link_is_not_followed(path: Path) -> None:
    """Who may write in the directory could otherwise have root write anywhere."""
    await fill(path)
    victim = path.with_name("victim")
    lock = path.with_name("streams.db-notify")
    lock.unlink()
    lock.symlink_to(victim)
    with pytest.raises(StorageError):
        await enter(path)
    assert not victim.exists()


# -- the clock

CLOCK = """
import asyncio, sys, time
from streamkeep.storages.sqlite import SQLiteStorage

real, ahead = time.time, float(sys.argv[2])
time.time = lambda: real() + ahead

async def main():
    async with SQLiteStorage(sys.argv[1]) as storage:
        print(storage.time())

asyncio.run(main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="no other system says which boot this is")
@pytest.mark.parametrize("hours", [1, -1, 24 * 365])
async def test_all_processes_have_one_time_whatever_their_clocks_say(
    path: Path, hours: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with SQLiteStorage(path) as here:
        before = here.time()
        wall = time.time
        monkeypatch.setattr(time, "time", lambda: wall() + hours * 3600)
        async with SQLiteStorage(path) as there:
            assert before <= there.time() <= here.time() <= before + BOUND_SECONDS
        command = [sys.executable, "-c", CLOCK, str(path), str(-hours * 3600)]
        run = partial(subprocess.run, command, check=True, capture_output=True, text=True, timeout=BOUND_SECONDS)
        other = await asyncio.to_thread(run)
        assert before <= float(other.stdout) <= here.time() <= before + BOUND_SECONDS
    async with SQLiteStorage(path) as again:
        assert before <= again.time() <= before + BOUND_SECONDS


async def test_time_does_not_go_back_when_the_machine_boots_with_an_earlier_one(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_clock, "_boot_id", lambda: "one")
    monkeypatch.setattr(_clock, "SAVE_SECONDS", 0)
    async with SQLiteStorage(path) as storage:
        assert await storage.commit("s", None, a_head(1, 0))
        before = storage.time()
    wall = time.time
    monkeypatch.setattr(time, "time", lambda: wall() - 3600)
    monkeypatch.setattr(_clock, "_boot_id", lambda: "two")
    async with SQLiteStorage(path) as storage:
        assert before - 1 <= storage.time() <= before + BOUND_SECONDS
    monkeypatch.setattr(time, "time", lambda: wall() + 3600)
    monkeypatch.setattr(_clock, "_boot_id", lambda: "three")
    async with SQLiteStorage(path) as storage:
        assert storage.time() >= before + 3000


@pytest.mark.parametrize("hours", [1, -1])
async def test_where_no_boot_can_be_told_from_another_a_time_does_not_jump_either(
    path: Path, hours: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_clock, "_boot_id", lambda: None)
    async with SQLiteStorage(path) as storage:
        before = storage.time()
        wall = time.time
        monkeypatch.setattr(time, "time", lambda: wall() + hours * 3600)
        assert before <= storage.time() <= before + BOUND_SECONDS


async def test_a_commit_is_on_the_disk_unless_somebody_has_said_otherwise(path: Path) -> None:
    levels: list[int] = []
    for storage in (SQLiteStorage(path), storage_for(f"sqlite:///{path}"), SQLiteStorage(path, synchronous="NORMAL")):
        assert isinstance(storage, SQLiteStorage)
        async with storage:
            levels += await in_writer(storage, lambda writer: writer._db.execute("PRAGMA synchronous").fetchone())
    assert levels == [2, 2, 1]  # FULL, FULL, NORMAL


async def test_synchronous_is_one_of_two(path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="FULL or NORMAL"):
        SQLiteStorage(path, synchronous="OFF")  # type: ignore[arg-type]  # that is the point


# -- a full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Generator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("only root may mount a small disk; the test with a bounded database runs everywhere")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


async def test_a_full_disk_stores_nothing_and_goes_on_when_there_is_space(small_disk: Path) -> None:
    ballast = small_disk / "ballast"
    async with SQLiteStorage(small_disk / "streams.db") as storage:
        assert await storage.commit("s", None, a_head(1, 1), [b"kept"])
        space = os.statvfs(small_disk)
        ballast.write_bytes(b"x" * (space.f_bavail * space.f_bsize - 16_384))
        with pytest.raises(StorageFullError, match="no space left"):
            await storage.commit("s", 1, a_head(2, 2), [b"x" * 500_000])
        assert await tail_of(storage, "s") == (1, 1)
        ballast.unlink()
        assert await storage.commit("s", 1, a_head(2, 2), [b"x" * 100_000])
    async with SQLiteStorage(small_disk / "streams.db") as storage:
        assert await tail_of(storage, "s") == (2, 2)


async def test_a_commit_that_does_not_fit_harms_no_other(path: Path) -> None:
    async with SQLiteStorage(path) as storage:
        assert await storage.commit("small", None, a_head(1, 0))
        assert await storage.commit("big", None, a_head(1, 0))
        await in_writer(storage, lambda writer: writer._db.execute("PRAGMA max_page_count = 50").fetchall())
        async with paused(path, storage):
            big = asyncio.create_task(storage.commit("big", 1, a_head(2, 1), [b"x" * 1_000_000]))
            small = [asyncio.create_task(storage.commit("small", 1, a_head(2, 1), [b"x"])) for _ in range(2)]
            await queued(storage, 3)
        with pytest.raises(StorageFullError):
            await big
        assert [await task for task in small] == [True, False]
        assert await tail_of(storage, "big") == (1, 0)
        assert await tail_of(storage, "small") == (2, 1)


# -- one batch, many callers


async def test_a_value_that_cannot_be_stored_fails_its_caller_only(path: Path) -> None:
    async with SQLiteStorage(path) as storage:
        async with paused(path, storage):
            bad = asyncio.create_task(storage.commit("bad", None, a_head(2**63, 0)))
            good = [asyncio.create_task(storage.commit(f"s{i}", None, a_head(1, 1), [b"x"])) for i in range(5)]
            surrogate = asyncio.create_task(storage.commit("\ud800", None, a_head(1, 0)))
            await queued(storage, 7)
        assert all([await task for task in good])
        with pytest.raises(StorageError, match="OverflowError"):
            await bad
        with pytest.raises(InvalidArgumentError, match="surrogates"):
            await surrogate
        assert [stream for stream, _ in await storage.scan()] == [f"s{i}" for i in range(5)]
        # Keys that were given out in the batch that was rolled back must be forgotten.
        assert all([await storage.commit(f"s{i}", 1, a_head(2, 2), [b"y%d" % i]) for i in range(5)])
        for i in range(5):
            page = await storage.read(f"s{i}", 0, 9)
            assert page is not None
            assert list(page.records) == [b"x", b"y%d" % i]


async def test_a_stream_whose_creation_failed_is_not_mistaken_for_the_next_one(path: Path) -> None:
    """The next one gets the key that SQLite had given to the first."""
    async with SQLiteStorage(path) as storage:
        with pytest.raises(StorageError):
            await storage.commit("failed", None, a_head(1, 1), [object()])  # type: ignore[list-item]  # that is the point
        assert await storage.commit("next", None, a_head(1, 1), [b"kept"])
        assert not await storage.commit("failed", 1, a_head(2, 2), [b"lost"])
        assert await tail_of(storage, "next") == (1, 1)
        assert await tail_of(storage, "failed") is None


async def test_a_stream_that_others_deleted_is_not_mistaken_for_the_next_one(path: Path) -> None:
    """The next one must not get its key, which is remembered here."""
    async with SQLiteStorage(path) as here, SQLiteStorage(path) as there:
        assert await here.commit("deleted", None, a_head(1, 0))
        assert await there.delete("deleted", 1)
        assert await there.commit("next", None, a_head(1, 1), [b"kept"])
        assert not await here.commit("deleted", 1, a_head(2, 2), [b"lost"])
        assert await tail_of(here, "next") == (1, 1)


async def test_what_one_batch_does_to_one_stream_happens_in_order(path: Path) -> None:
    async with SQLiteStorage(path) as storage:
        async with paused(path, storage):
            asked = [
                storage.commit("s", None, a_head(1, 1), [b"old"]),
                storage.commit("s", 1, a_head(2, 2), [b"older"]),
                storage.delete("s", 1),
                storage.delete("s", 2),
                storage.commit("s", None, a_head(3, 1), [b"new"]),
                storage.commit("s", 2, a_head(4, 2), [b"lost"]),
                storage.commit("s", 3, a_head(5, 2), [b"newer"]),
            ]
            tasks = [asyncio.create_task(coroutine) for coroutine in asked]
            await queued(storage, len(tasks))
        assert [await task for task in tasks] == [True, True, False, True, True, False, True]
        page = await storage.read("s", 0, 9)
        assert page is not None
        assert list(page.records) == [b"new", b"newer"]
        orphans = await in_writer(storage, lambda writer: writer._db.execute("SELECT count(*) FROM records").fetchone())
        assert orphans == (2,)


async def test_a_cancelled_caller_disturbs_nobody(path: Path) -> None:
    async with SQLiteStorage(path) as storage:
        async with paused(path, storage):
            tasks = [asyncio.create_task(storage.commit(f"s{i}", None, a_head(1, 0))) for i in range(10)]
            await queued(storage, 10)
            for task in tasks[::2]:
                task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert outcomes[1::2] == [True] * 5
        assert all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes[::2])


async def test_readers_do_not_wait_for_writers(path: Path) -> None:
    async with SQLiteStorage(path) as storage:
        assert await storage.commit("s", None, a_head(1, 1), [b"one"])
        async with paused(path):
            write = asyncio.create_task(storage.commit("s", 1, a_head(2, 2), [b"two"]))
            with anyio.fail_after(BOUND_SECONDS):
                assert await tail_of(storage, "s") == (1, 1)
            assert not write.done()
        assert await write


# -- entering and leaving


async def test_a_storage_that_is_not_open_says_so(path: Path) -> None:
    storage = SQLiteStorage(path)
    calls: list[Callable[[], object]] = [
        lambda: storage.read("s"),
        lambda: storage.commit("s", None, a_head(1, 0)),
        lambda: storage.delete("s", 1),
        storage.scan,
    ]
    for _ in range(2):
        for call in calls:
            with pytest.raises(StorageError, match="is not open"):
                await call()  # type: ignore[misc]  # a coroutine
        with pytest.raises(StorageError, match="is not open"):
            async with storage.watch("s"):
                pass
        async with storage:
            assert await storage.read("s") is None


async def test_a_storage_is_entered_once_at_a_time(path: Path) -> None:
    async with SQLiteStorage(path) as storage:
        with pytest.raises(StorageError, match="open already"):
            await storage.__aenter__()
        assert await storage.read("s") is None


async def test_of_two_who_enter_a_storage_at_once_one_is_refused_and_no_thread_is_left(path: Path) -> None:
    threads = threading.active_count()
    storage = SQLiteStorage(path)
    entered = await asyncio.gather(storage.__aenter__(), storage.__aenter__(), return_exceptions=True)
    await storage.__aexit__()

    assert [type(one) for one in entered] == [SQLiteStorage, StorageError]
    assert threading.active_count() == threads


def test_trio_is_refused_with_advice(path: Path) -> None:
    async def main() -> None:
        async with SQLiteStorage(path):
            pass

    with pytest.raises(StorageError, match="needs asyncio"):
        anyio.run(main, backend="trio")


async def test_leaving_lets_go_of_every_thread_and_descriptor(path: Path) -> None:
    await enter(path)
    before = open_files(), threading.active_count()
    for version in range(20):
        async with SQLiteStorage(path) as storage, storage.watch("s") as doorbell:
            assert await storage.commit("s", version or None, a_head(version + 1, 0))
            await doorbell.wait()
    assert (open_files(), threading.active_count()) == before


async def test_a_failed_entering_lets_go_of_every_thread_and_descriptor(path: Path) -> None:
    path.write_bytes(b"no database" * 1000)
    with pytest.raises(StorageCorruptError):
        await enter(path)
    before = open_files(), threading.active_count()
    for _ in range(20):
        with pytest.raises(StorageCorruptError):
            await enter(path)
    assert (open_files(), threading.active_count()) == before


async def test_leaving_last_tidies_up_the_write_ahead_log(path: Path) -> None:
    await fill(path, records=1000)
    assert {file.name for file in path.parent.iterdir()} == {"streams.db", "streams.db-lock", "streams.db-notify"}


def test_a_loop_that_was_closed_over_an_open_storage_does_not_hang_the_process(path: Path) -> None:
    script = """
import asyncio, sys
from streamkeep.storages.sqlite import SQLiteStorage
loop = asyncio.new_event_loop()
storage = SQLiteStorage(sys.argv[1])
loop.run_until_complete(storage.__aenter__())
loop.close()
"""
    subprocess.run([sys.executable, "-c", script, str(path)], check=True, timeout=BOUND_SECONDS)


# -- doorbells


async def test_very_many_changes_at_once_ring_too(path: Path) -> None:
    async with SQLiteStorage(path) as here, SQLiteStorage(path) as there, here.watch("s") as doorbell:
        async with paused(path, there):
            streams = [f"other{i}" for i in range(5000)] + ["s"]
            tasks = [asyncio.create_task(there.commit(stream, None, a_head(1, 0))) for stream in streams]
            await queued(there, len(tasks))
        assert all([await task for task in tasks])
        with anyio.fail_after(BOUND_SECONDS):
            await doorbell.wait()


async def test_a_commit_elsewhere_rings_only_those_who_watch_its_stream(path: Path) -> None:
    async with (
        SQLiteStorage(path) as here,
        SQLiteStorage(path) as there,
        here.watch("s") as concerned,
        here.watch("t") as other,
    ):
        assert await there.commit("s", None, a_head(1, 0))
        with anyio.fail_after(BOUND_SECONDS):
            await concerned.wait()
        # A ring for nothing would be allowed, but is not wanted.
        with pytest.raises(TimeoutError), anyio.fail_after(0):
            await other.wait()


async def test_a_database_restored_from_an_older_copy_rings_as_before(path: Path) -> None:
    await fill(path, stream="first")
    copy = path.read_bytes()
    for i in range(10):
        await fill(path, stream=f"later{i}")
    path.write_bytes(copy)
    async with SQLiteStorage(path) as here, SQLiteStorage(path) as there, here.watch("s") as doorbell:
        assert await there.commit("s", None, a_head(1, 0))
        with anyio.fail_after(BOUND_SECONDS):
            await doorbell.wait()


# -- other processes


async def test_a_commit_by_another_process_rings_here(path: Path) -> None:
    async with SQLiteStorage(path) as storage, storage.watch("s") as doorbell, process(WRITER, path, "s") as other:
        for tail in range(1, 11):
            write_line(other)
            with anyio.fail_after(BOUND_SECONDS):
                while await tail_of(storage, "s") != (tail, tail):
                    await doorbell.wait()
            assert await line_of(other) == str(tail)


async def test_a_commit_by_another_process_rings_here_without_inotify(path: Path, without_inotify: None) -> None:
    await test_a_commit_by_another_process_rings_here(path)


async def test_two_busy_processes_lose_nothing_and_both_get_on(path: Path) -> None:
    async with process(BUSY_WRITER, path, "a") as one, process(BUSY_WRITER, path, "b") as two:
        acknowledged: dict[str, int] = {}
        counts = [0, 0]

        async def follow(which: int, other: asyncio.subprocess.Process) -> None:
            while min(counts) < 500:
                stream, tail = (await line_of(other)).split()
                acknowledged[stream] = int(tail)
                counts[which] += 1

        with anyio.fail_after(BOUND_SECONDS):
            await asyncio.gather(follow(0, one), follow(1, two))
        one.kill()
        two.kill()
        await one.wait()
        await two.wait()
    await check_whole(path, acknowledged)


async def test_what_a_killed_process_had_acknowledged_is_there(path: Path) -> None:
    acknowledged: dict[str, int] = {}
    dice = random.Random(os.environ.get("SEED", "7"))
    for attempt in range(5):
        async with process(BUSY_WRITER, path, f"{attempt}-") as other:
            for _ in range(dice.randrange(50, 400)):
                stream, tail = (await line_of(other)).split()
                acknowledged[stream] = int(tail)
            other.send_signal(signal.SIGKILL)
            await other.wait()
    await check_whole(path, acknowledged)


async def test_a_process_that_holds_the_database_too_long_is_named(path: Path, short_timeout: None) -> None:
    async with SQLiteStorage(path) as storage:
        async with paused(path):
            with pytest.raises(StorageError, match="another program has held the database"):
                await storage.commit("s", None, a_head(1, 0))
        assert await storage.commit("s", None, a_head(1, 0))


async def test_a_foreign_program_that_writes_delays_us_only(path: Path) -> None:
    async with SQLiteStorage(path) as storage:
        foreign = sqlite3.connect(path, isolation_level=None)
        foreign.execute("BEGIN IMMEDIATE")
        write = asyncio.create_task(storage.commit("s", None, a_head(1, 0)))
        await queued(storage, 0)
        assert await storage.read("s") is None
        assert not write.done()
        foreign.execute("ROLLBACK")
        foreign.close()
        with anyio.fail_after(BOUND_SECONDS):
            assert await write


# -- the words of the tests


def a_head(version: int, tail: int) -> Head:
    return Head(version, tail, b"", 9e9)


async def enter(path: Path) -> None:
    async with SQLiteStorage(path):
        pass


async def fill(path: Path, stream: str = "s", records: int = 1) -> None:
    async with SQLiteStorage(path) as storage:
        assert await storage.commit(stream, None, a_head(1, records), [b"record"] * records)


async def tail_of(storage: Storage, stream: str) -> tuple[int, int] | None:
    """The version and the tail."""
    page = await storage.read(stream)
    return None if page is None else (page.head.version, page.head.tail)


async def in_writer(storage: SQLiteStorage, work: Callable[[_writer.Writer], T]) -> T:
    assert storage._entered is not None
    return await storage._entered.writer.start(work)


@asynccontextmanager
async def paused(path: Path, storage: SQLiteStorage | None = None) -> AsyncGenerator[None]:
    """Hold the lock as another process would; if the storage's writer already waits for it, all that comes now is one batch."""
    waiting: list[asyncio.Future[None]] = []
    lock = os.open(f"{path}-lock", os.O_RDWR)
    try:
        while not _interlock._try_lock(lock):
            await asyncio.sleep(0)
        if storage is not None and storage._entered is not None:
            waiting.append(storage._entered.writer.start(lambda writer: None))
            await queued(storage, 0)
        yield
    finally:
        os.close(lock)
    await asyncio.gather(*waiting)


async def queued(storage: SQLiteStorage, jobs: int) -> None:
    """Wait until so many jobs are queued, and no batch but the one under way has taken any."""
    assert storage._entered is not None
    with anyio.fail_after(BOUND_SECONDS):
        await asyncio.sleep(0)
        batches = storage._entered.writer._queue.queue
        while sum(len(batch or ()) for batch in tuple(batches)) != jobs:
            await asyncio.sleep(0)


@asynccontextmanager
async def process(script: str, path: Path, argument: str) -> AsyncGenerator[asyncio.subprocess.Process]:
    """Another process with the database open; killed at the end, if it has not gone by itself."""
    other = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, str(path), argument, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        if script is WRITER:
            assert await line_of(other) == "ready"
        yield other
    finally:
        if other.returncode is None:
            other.kill()
        await other.communicate()


async def line_of(other: asyncio.subprocess.Process) -> str:
    assert other.stdout is not None
    with anyio.fail_after(BOUND_SECONDS):
        line = await other.stdout.readline()
    assert line.endswith(b"\n"), "the other process has died"
    return line.decode().strip()


def write_line(other: asyncio.subprocess.Process) -> None:
    assert other.stdin is not None
    other.stdin.write(b"\n")


async def check_whole(path: Path, acknowledged: dict[str, int]) -> None:
    """Every record that was acknowledged is there, every log is whole, and SQLite finds nothing to complain of."""
    async with SQLiteStorage(path) as storage:
        for stream, tail in acknowledged.items():
            page = await storage.read(stream, 0, 1_000_000)
            assert page is not None
            assert page.head.tail >= tail
            assert list(page.records) == [b"%d" % i for i in range(1, page.head.tail + 1)]
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    db.close()


def open_files() -> int:
    return len(list(Path("/dev/fd").iterdir()))


def enter_as_nobody(path: Path) -> str:
    """Give the error."""
    return enter_as(path, NOBODY)


def enter_as(path: Path, user: int, groups: Sequence[int] = ()) -> str:
    """Give the error; as another user, if this one may."""
    command = [sys.executable, "-c", ENTER, str(path), str(user), *map(str, groups)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=BOUND_SECONDS).stdout


def let_others_through_to(directory: Path) -> None:
    """Let other users pass through pytest's private directories. It is not undone: other workers' tests have the same parents."""
    for parent in directory.parents:
        if parent.stat().st_uid == os.geteuid() and parent != parent.parent:
            parent.chmod(parent.stat().st_mode | 0o011)
