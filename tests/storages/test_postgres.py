"""PostgresStorage keeps the contract, and what it promises beyond: URLs, remedies, batches, doorbells, migrations, poolers, standbys."""

# ruff: noqa: ASYNC110 (these tests wait for what the server shows, and nobody else is on their loop)

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import asyncpg  # type: ignore[import-untyped]  # it has no types
import asyncpg.prepared_stmt  # type: ignore[import-untyped]  # as above
import pytest
from tests.engines.pgbouncer import PgBouncer
from tests.engines.postgres import SYSTEM, Postgres
from tests.simulation.suite import SimulationSuite
from tests.storages.failures import assert_each_has_its_own, forked

from streamkeep.errors import (
    InvalidArgumentError,
    StorageCorruptError,
    StorageError,
    StorageFullError,
    StorageUnavailableError,
)
from streamkeep.storage import Head, Storage
from streamkeep.storages import postgres, storage_for
from streamkeep.storages.postgres import PostgresStorage, _link, _schema
from streamkeep.storages.postgres._notifications import Polling
from streamkeep.storages.retrying import RetryingStorage
from streamkeep.testing import StorageSuite, StreamsSuite
from streamkeep.testing._storage_suite import ODD_IDS, ids_of

BOUND_SECONDS = 20


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def server() -> Generator[Postgres]:
    with Postgres() as server:
        yield server


@pytest.fixture(scope="module")
def older_server() -> Generator[Postgres]:
    if not SYSTEM.exists():
        pytest.skip("PostgreSQL 15 is not installed here")
    with Postgres(SYSTEM) as server:
        yield server


@pytest.fixture(scope="class")  # and gone after it, with its sessions, which are kept for those who come next
def pooler(server: Postgres, requires: Callable[[str], str]) -> Generator[PgBouncer]:
    with PgBouncer(requires("pgbouncer"), server) as pooler:
        yield pooler


@pytest.fixture
def here(server: Postgres) -> Postgres:
    """The server, with nothing of this test's in it."""
    return server.empty()


class TestPostgresStorage(StorageSuite):
    @pytest.fixture
    def open_storage(self, here: Postgres) -> Callable[[], Storage]:
        return lambda: PostgresStorage(here.url)


@pytest.mark.slow
class TestOlderPostgresStorage(StorageSuite):
    @pytest.fixture
    def open_storage(self, older_server: Postgres) -> Callable[[], Storage]:
        url = older_server.empty().url
        return lambda: PostgresStorage(url)


@pytest.mark.slow
class TestPostgresStorageBehindAPooler(StorageSuite):
    @pytest.fixture
    def open_storage(self, here: Postgres, pooler: PgBouncer) -> Callable[[], Storage]:
        return lambda: PostgresStorage(here.url_of(port=pooler.port, options="&notify=off"))


class TestStreamsOverPostgres(StreamsSuite):
    @pytest.fixture
    def open_storage(self, here: Postgres) -> Callable[[], Storage]:
        return lambda: PostgresStorage(here.url)


class TestSimulationOverPostgres(SimulationSuite):
    @pytest.fixture
    def open_storage(self, here: Postgres) -> Callable[[], Storage]:
        return lambda: PostgresStorage(here.url)


# -- URLs


@pytest.mark.parametrize(
    "url",
    [
        "http://user:secret@host/db",
        "postgresql://user:secret@host/db#x",
        "postgresql://user:sec/ret@host/db",
        "postgresql://user:sec#ret@host/db",
        "postgresql://user:sec@ret@host/db",
        "postgresql://user:secret@host:port/db",
        "postgresql://user:secret@one,,two/db",
        "postgresql://user:secret@[::1/db",
        "postgresql://user:secret@host/db?secret",
        "postgresql://user:secret@host/db?secret=1",
        "postgresql://user:secret@host/db?schema=a&schema=b",
        "postgresql://user:secret@host/db?schema=",
        "postgresql://user:secret@host/db?schema=" + "x" * 64,
        "postgresql://user:secret@host/db?schema=a%00b",
        "postgresql://user:secret@host/db?notify=maybe",
        "postgresql://user:secret@host/db?target_session_attrs=any",
    ],
)
def test_a_url_that_cannot_be_meant_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        PostgresStorage(url)
    assert "secret" not in str(refused.value)
    assert "ret@" not in str(refused.value)


@pytest.mark.parametrize(
    ("url", "urls"),
    [
        ("postgresql://", ["postgresql://"]),
        ("postgres:///db", ["postgres:///db"]),
        ("postgresql://u:p%40%2F@h:1/db?schema=s&notify=off", ["postgresql://u:p%40%2F@h:1/db"]),
        (
            "postgresql://u@one:1,two,[::1]:3/db",
            ["postgresql://u@one:1/db", "postgresql://u@two/db", "postgresql://u@[::1]:3/db"],
        ),
        ("postgresql:///db?host=%2Ftmp&sslmode=disable", ["postgresql:///db?host=%2Ftmp&sslmode=disable"]),
    ],
)
def test_each_host_is_a_url_for_the_driver(url: str, urls: list[str]) -> None:
    assert postgres._place(url).urls == urls


async def test_storage_for_gives_one_that_tries_again(here: Postgres) -> None:
    storage = storage_for(here.url)
    assert isinstance(storage, RetryingStorage)
    async with storage:
        assert await storage.commit("s", None, a_head(1, 0))


async def test_a_unix_socket_is_a_host(here: Postgres) -> None:
    host = str(here.directory).replace("/", "%2F")
    await enter(f"postgresql://streamkeep@/postgres?schema={here.schema}&host={host}&port={here.port}")


@pytest.mark.parametrize("schema", ["Ünïcode", 'quote"d', "sp ace", "semi;colon", "{braces}", "x" * 63, "select"])
async def test_any_schema_is_just_a_name(here: Postgres, schema: str) -> None:
    url = f"postgresql://streamkeep@127.0.0.1:{here.port}/postgres?schema={schema.replace(' ', '+').replace(';', '%3B')}"
    try:
        async with PostgresStorage(url) as storage, storage.watch("s") as doorbell:
            assert await storage.commit("s", None, a_head(1, 1), [b"x"])
            await soon(doorbell.wait())
        assert here.run(f"SELECT count(*) FROM pg_namespace WHERE nspname = '{schema}'") == "1"
    finally:
        quoted = schema.replace('"', '""')
        here.run(f'DROP SCHEMA IF EXISTS "{quoted}" CASCADE')


# -- errors and remedies


async def test_a_wrong_password_is_said_and_not_repeated(here: Postgres) -> None:
    here.run("DROP ROLE IF EXISTS careful; CREATE ROLE careful LOGIN PASSWORD 'right'")
    here.run(f"CREATE SCHEMA {here.schema} AUTHORIZATION careful")
    with pytest.raises(StorageError, match="check user and password") as refused:
        await enter(here.url_of("careful:hunter2"))
    assert not isinstance(refused.value, StorageUnavailableError)
    assert "hunter2" not in str(refused.value)
    await enter(here.url_of("careful:right"))
    here.run(f"DROP SCHEMA {here.schema} CASCADE")


async def test_who_is_not_let_in_is_told_where_that_is_written(here: Postgres) -> None:
    with pytest.raises(StorageError, match=r"pg_hba\.conf"):
        await enter(here.url_of("banned"))


async def test_a_database_that_does_not_exist_is_named(here: Postgres) -> None:
    with pytest.raises(StorageError, match=r'no such database; create it.*"nowhere"'):
        await enter(here.url_of(database="nowhere"))


async def test_a_missing_permission_is_named_until_all_are_there(here: Postgres) -> None:
    here.run("DROP ROLE IF EXISTS poor; CREATE ROLE poor LOGIN")
    url = here.url_of("poor")
    with pytest.raises(StorageError, match="GRANT CREATE ON DATABASE to create the schema"):
        await enter(url)
    await enter(here.url)
    with pytest.raises(StorageError, match="GRANT USAGE ON SCHEMA"):
        await enter(url)
    here.run(f"GRANT USAGE ON SCHEMA {here.schema} TO poor; GRANT SELECT ON ALL TABLES IN SCHEMA {here.schema} TO poor")
    with pytest.raises(
        StorageError,
        match=r"lacks INSERT on streams,.* DELETE on records; .*GRANT SELECT, INSERT, UPDATE",
    ):
        await enter(url)
    here.run(f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA {here.schema} TO poor")
    async with PostgresStorage(url) as storage:
        assert await storage.commit("s", None, a_head(1, 1), [b"x"])
        assert await storage.delete("s", 1)
    here.run("DROP OWNED BY poor; DROP ROLE poor")


async def test_a_server_that_is_too_old_is_named(here: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_schema, "_OLDEST_SERVER", 99)
    with pytest.raises(StorageError, match="the server is version 18; upgrade it to 99 or newer"):
        await enter(here.url)


async def test_a_server_that_is_not_there_is_unavailable(here: Postgres) -> None:
    with pytest.raises(StorageUnavailableError, match="cannot be reached"):
        await enter(here.through(1))


async def test_a_host_that_does_not_exist_is_unavailable(here: Postgres) -> None:
    with pytest.raises(StorageUnavailableError, match="cannot be reached"):
        await enter(here.url_of(host="nowhere.invalid"))


async def test_no_connection_left_is_unavailable(here: Postgres) -> None:
    here.run("DROP ROLE IF EXISTS few; CREATE ROLE few LOGIN CONNECTION LIMIT 1")
    await enter(here.url)
    here.run(f"GRANT ALL ON SCHEMA {here.schema} TO few; GRANT ALL ON ALL TABLES IN SCHEMA {here.schema} TO few")
    async with PostgresStorage(here.url_of("few")) as storage:
        with pytest.raises(StorageUnavailableError, match="raise its max_connections"):
            await storage.commit("s", None, a_head(1, 0))
        assert await storage.read("s") is None
    here.run("DROP OWNED BY few; DROP ROLE few")


async def test_another_event_loop_is_named(here: Postgres) -> None:
    async def enter_here() -> None:
        with pytest.raises(StorageError, match="needs asyncio"):
            await enter(here.url)

    await anyio.to_thread.run_sync(lambda: anyio.run(enter_here, backend="trio"))


def test_a_missing_package_is_named() -> None:
    script = """
import sys
sys.modules["asyncpg"] = None
from streamkeep.errors import StorageError
from streamkeep.storages import storage_for
try:
    storage_for("postgresql://host/db")
except StorageError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=BOUND_SECONDS)
    assert "pip install 'streamkeep[postgres]'" in done.stdout


async def test_a_full_disk_fails_whom_it_meets_and_nobody_else(here: Postgres) -> None:
    """The server is made to say so of one record."""
    async with PostgresStorage(here.url) as storage:
        here.run(f"""
            CREATE FUNCTION {here.schema}.full() RETURNS trigger LANGUAGE plpgsql AS
                $$ BEGIN RAISE EXCEPTION 'could not extend file: No space left on device' USING ERRCODE = '53100'; END $$;
            CREATE TRIGGER t BEFORE INSERT ON {here.schema}.records
                FOR EACH ROW WHEN (NEW.data = 'big') EXECUTE FUNCTION {here.schema}.full();
        """)
        records = [b"one", b"big", b"three"]
        asked = [storage.commit(f"s{i}", None, a_head(1, 1), [record]) for i, record in enumerate(records)]
        one, big, three = await asyncio.gather(*asked, return_exceptions=True)
        assert (one, three) == (True, True)
        assert isinstance(big, StorageFullError)
        assert "make space" in str(big)
        assert await storage.read("s1") is None
        here.run(f"DROP TRIGGER t ON {here.schema}.records")
        assert await storage.commit("s1", None, a_head(1, 1), [b"big"])


async def test_a_value_that_cannot_be_stored_fails_its_caller_only(here: Postgres) -> None:
    async with PostgresStorage(here.url) as storage:
        bad = storage.commit("bad", None, a_head(2**63, 1), [b"confidential"])
        good = [storage.commit(f"s{i}", None, a_head(1, 1), [b"x"]) for i in range(5)]
        failure, *done = await asyncio.gather(bad, *good, return_exceptions=True)
        assert done == [True] * 5
        assert isinstance(failure, StorageError)
        assert "a value cannot be stored" in str(failure)
        with pytest.raises(InvalidArgumentError, match="Unicode"):
            await storage.commit("\ud800", None, a_head(1, 0))
        assert await ids_of(storage) == [f"s{i}" for i in range(5)]


async def test_a_storage_that_is_not_open_says_so(here: Postgres) -> None:
    storage = PostgresStorage(here.url)
    for _ in range(2):
        with pytest.raises(StorageError, match="is not open"):
            await storage.read("s")
        with pytest.raises(StorageError, match="is not open"):
            async with storage.watch("s"):
                pass
        async with storage:
            assert await storage.read("s") is None
            with pytest.raises(StorageError, match="is open already"):
                await storage.__aenter__()


async def test_leaving_leaves_no_connection(here: Postgres) -> None:
    async with PostgresStorage(here.url) as storage, storage.watch("s"):
        await storage.read("s")
        assert len(connections(here)) == 2
        assert await storage.commit("s", None, a_head(1, 0))
        assert len(connections(here)) == 3
    await until(lambda: not connections(here))


@pytest.mark.parametrize("how", ["task", "scope"])
async def test_leaving_that_is_cancelled_leaves_no_connection_and_no_task(here: Postgres, how: str) -> None:
    asked: list[asyncio.Task[bool]] = []
    scope = anyio.CancelScope()

    async def use() -> None:
        with scope:
            async with PostgresStorage(here.url) as storage, storage.watch("s"):
                asked.append(asyncio.create_task(storage.commit("s", 1, a_head(2, 0))))
                await until(lambda: waiting(here) == 1)
                asked.append(asyncio.create_task(storage.commit("t", None, a_head(1, 0))))

    async with PostgresStorage(here.url) as storage:
        assert await storage.commit("s", None, a_head(1, 0))
    await until(lambda: not connections(here))
    async with raw(here) as other:
        before = asyncio.all_tasks()
        async with other.transaction():
            await other.execute("UPDATE streams SET tail = tail")
            leaving = asyncio.create_task(use())
            await until_async(lambda: len(asked) == 2)
            await asyncio.sleep(0)
            if how == "task":
                leaving.cancel()
            else:
                scope.cancel()
            with suppress(asyncio.CancelledError):
                await soon(leaving)
        for outcome in await soon(asyncio.gather(*asked, return_exceptions=True)):
            assert outcome is True or isinstance(outcome, StorageError)
        await until(lambda: not connections(here))
        await until_async(lambda: asyncio.all_tasks() == before)


async def test_a_failed_entering_leaves_no_connection(here: Postgres) -> None:
    here.run(f"CREATE SCHEMA {here.schema}; CREATE TABLE {here.schema}.format (theirs int)")
    with pytest.raises(StorageCorruptError):
        await enter(here.url)
    await until(lambda: not connections(here))


# -- ids


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
async def test_the_databases_encoding_is_no_matter(here: Postgres, encoding: str) -> None:
    here.run(f"CREATE DATABASE {encoding.lower()} ENCODING '{encoding}' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0")
    ids = [*ODD_IDS, "a\0b", "\uffff", "\U00010000"]
    async with PostgresStorage(here.url_of(database=encoding.lower())) as storage, storage.watch("a\0b") as doorbell:
        for stream in ids:
            assert await storage.commit(stream, None, a_head(1, 1), [stream.encode()])
        assert await ids_of(storage, limit=1000) == sorted(ids)
        await soon(doorbell.wait())
    here.run(f"DROP DATABASE {encoding} WITH (FORCE)")


# -- batches


async def test_what_one_batch_does_to_one_stream_happens_in_order(here: Postgres) -> None:
    async with PostgresStorage(here.url) as storage:
        asked = [
            storage.commit("s", None, a_head(1, 1), [b"old"]),
            storage.commit("s", 1, a_head(2, 2), [b"older"]),
            storage.delete("s", 1),
            storage.delete("s", 2),
            storage.commit("s", None, a_head(3, 1), [b"new"]),
            storage.commit("s", 2, a_head(4, 2), [b"lost"]),
            storage.commit("s", 3, a_head(5, 2), [b"newer"]),
        ]
        assert await asyncio.gather(*asked) == [True, True, False, True, True, False, True]
        page = await storage.read("s", 0, 9)
        assert page is not None
        assert list(page.records) == [b"new", b"newer"]
    assert here.run(f"SELECT count(*) FROM {here.schema}.records") == "2"


async def test_very_many_commits_at_once_are_few_transactions(here: Postgres) -> None:
    count = 2000
    async with PostgresStorage(here.url) as storage:
        asked = [storage.commit(f"s{i}", None, a_head(1, 2), [b"a", b"%d" % i]) for i in range(count)]
        assert all(await asyncio.gather(*asked))
        asked = [storage.commit(f"s{i}", 1 if i % 2 else 7, a_head(2, 3), [b"c"]) for i in range(count)]
        assert await asyncio.gather(*asked) == [bool(i % 2) for i in range(count)]
        asked_pages = [storage.read(f"s{i}", 1, 9) for i in range(count)]
        for i, page in enumerate(await asyncio.gather(*asked_pages)):
            assert page is not None
            assert list(page.records) == ([b"%d" % i, b"c"] if i % 2 else [b"%d" % i])
    transactions = f"SELECT xmin::text FROM {here.schema}.streams UNION SELECT xmin::text FROM {here.schema}.records"
    assert len(here.run(transactions).split()) < 20


async def test_big_commits_at_once_are_stored_whole(here: Postgres) -> None:
    size = 3 << 20
    async with PostgresStorage(here.url) as storage:
        asked = [storage.commit(f"s{i}", None, a_head(1, 2), [bytes([i]) * size] * 2) for i in range(8)]
        assert all(await asyncio.gather(*asked))
        pages = await asyncio.gather(*(storage.read(f"s{i}", 1, 9) for i in range(8)))
        assert [list(page.records) for page in pages if page] == [[bytes([i]) * size] for i in range(8)]


async def test_readers_share_what_a_page_may_hold(here: Postgres) -> None:
    """Sixty-four readers at once must not be sixty-four mebibytes."""
    async with PostgresStorage(here.url) as storage:
        assert await storage.commit("s", None, a_head(1, 100), [b"x" * 30_000] * 100)
        pages = await asyncio.gather(*(storage.read("s", 0, 100) for _ in range(64)))
        assert 64 <= sum(len(page.records) for page in pages if page) < 64 * 10
        page = await storage.read("s", 0, 100)
        assert page is not None
        assert len(page.records) > 30


@pytest.mark.parametrize("tail", [0, 1, 9_999, 10_000, 10_001, 25_000])
async def test_a_deletion_leaves_nothing(here: Postgres, tail: int) -> None:
    async with PostgresStorage(here.url) as storage:
        assert await storage.commit("s", None, a_head(1, tail), [b"x"] * tail)
        assert await storage.commit("kept", None, a_head(1, 1), [b"x"])
        assert await storage.delete("s", 1)
    assert here.run(f"SELECT count(*) FROM {here.schema}.records") == "1"


async def test_a_deletion_that_waited_for_a_commit_is_refused(here: Postgres) -> None:
    async with PostgresStorage(here.url) as storage, raw(here) as other:
        assert await storage.commit("s", None, a_head(1, 1), [b"x"])
        async with other.transaction():
            await other.execute("UPDATE streams SET version = 2, tail = 2")
            await other.execute("INSERT INTO records SELECT key, 1, 'y' FROM streams")
            deletion = asyncio.create_task(storage.delete("s", 1))
            await until(lambda: waiting(here) == 1)
        assert not await deletion
        page = await storage.read("s", 0, 9)
        assert page is not None
        assert (page.head.version, list(page.records)) == (2, [b"x", b"y"])


async def test_two_who_commit_the_same_streams_in_different_order_do_not_deadlock(here: Postgres) -> None:
    streams = [f"s{i}" for i in range(40)]
    deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = 'postgres'"
    before = here.run(deadlocks)
    async with PostgresStorage(here.url) as one, PostgresStorage(here.url) as two:
        for version in range(30):
            seen = version or None
            head = a_head(version + 1, 0)
            ones = [one.commit(stream, seen, head) for stream in streams]
            twos = [two.commit(stream, seen, head) for stream in reversed(streams)]
            async with asyncio.timeout(BOUND_SECONDS):
                done = await asyncio.gather(*ones, *twos)
            assert [a + b for a, b in zip(done[:40], reversed(done[40:]), strict=True)] == [1] * 40
    assert here.run(deadlocks) == before


async def test_whoever_is_picked_in_a_deadlock_tries_again(here: Postgres) -> None:
    async with PostgresStorage(here.url) as storage, raw(here) as other:
        assert await asyncio.gather(*(storage.commit(stream, None, a_head(1, 0)) for stream in "ab")) == [True, True]
        await other.execute("SET deadlock_timeout = '60s'")  # so the other one is picked
        transaction = other.transaction()
        await transaction.start()
        await other.execute("UPDATE streams SET tail = tail WHERE id = 'b'")
        both = [asyncio.create_task(storage.commit(stream, 1, a_head(2, 0))) for stream in "ab"]
        await until(lambda: waiting(here) == 1)
        await other.execute("UPDATE streams SET tail = tail WHERE id = 'a'")
        await transaction.rollback()
        assert [await soon(task) for task in both] == [True, True]


async def test_another_isolation_level_by_default_is_no_matter(here: Postgres) -> None:
    here.run("CREATE DATABASE strict")
    here.run("ALTER DATABASE strict SET default_transaction_isolation = 'serializable'")
    url = here.url_of(database="strict")
    async with PostgresStorage(url) as one, PostgresStorage(url) as two:
        for version in range(30):
            head = a_head(version + 1, 0)
            asked = [each.commit("s", version or None, head) for each in (one, two) for _ in range(3)]
            assert sum(await asyncio.gather(*asked)) == 1
    here.run("DROP DATABASE strict WITH (FORCE)")


async def test_a_row_that_somebody_holds_makes_nobody_wait_for_ever(here: Postgres) -> None:
    async with PostgresStorage(here.url) as storage, raw(here) as other:
        assert await storage.commit("s", None, a_head(1, 0))
        async with other.transaction():
            await other.execute("UPDATE streams SET tail = tail")
            with pytest.raises(StorageUnavailableError, match="kept the server busy"):
                await soon(storage.commit("s", 1, a_head(2, 0)))
        assert await storage.commit("s", 1, a_head(2, 0))


async def test_tables_that_grow_from_little_are_read_by_their_indexes(here: Postgres) -> None:
    """A table that was analysed when it was small is read as a whole by the planner, however much it has grown since."""
    few = 64
    async with PostgresStorage(here.url) as storage, raw(here) as other:
        asked = [storage.commit(f"s{i}", None, a_head(1, 1), [b"x"]) for i in range(few)]
        assert all(await asyncio.gather(*asked))
        await other.execute("ANALYZE streams; ANALYZE records")
    statistics = f"FROM pg_stat_user_tables WHERE schemaname = '{here.schema}' AND relname <> 'format'"
    await until(lambda: int(here.run(f"SELECT sum(idx_scan) {statistics}")) >= few)  # they come a little later
    before = int(here.run(f"SELECT sum(idx_tup_fetch) {statistics}"))
    async with PostgresStorage(here.url) as storage:
        for version in range(1, 10):
            records = [b"x"] * (version % 3)
            tail = 1 + sum(version % 3 for version in range(1, version + 1))
            assert await storage.commit("s0", version, a_head(version + 1, tail), records)
            assert await storage.read("s0", tail, 100)
    await until(lambda: int(here.run(f"SELECT sum(idx_scan) {statistics}")) >= few + 2 * 9)
    assert int(here.run(f"SELECT sum(idx_tup_fetch) {statistics}")) - before < few
    assert here.run(f"SELECT sum(seq_scan) {statistics}") == "4"  # which made the indexes


async def test_a_plan_that_was_made_for_few_rows_is_not_kept_when_there_are_many(here: Postgres) -> None:
    few, many, runs = 3, 2_000, 3 * _link._RUNS_A_PLAN
    async with PostgresStorage(here.url) as storage, raw(here) as other:
        asked = [storage.commit(f"s{i}", None, a_head(1, 0)) for i in range(few)]
        assert all(await asyncio.gather(*asked))
        await other.execute("ANALYZE streams; ANALYZE records")
    async with PostgresStorage(here.url) as storage:
        assert await storage.commit("s0", 1, a_head(2, 0))
        asked = [storage.commit(f"more-{i}", None, a_head(1, 0)) for i in range(many)]
        assert all(await asyncio.gather(*asked))
        for version in range(2, 2 + runs):
            assert await storage.commit("s0", version, a_head(version + 1, 0))
    statistics = f"FROM pg_stat_user_tables WHERE schemaname = '{here.schema}' AND relname = 'streams'"
    await until(lambda: int(here.run(f"SELECT n_tup_upd {statistics}")) == 1 + runs)
    assert int(here.run(f"SELECT idx_tup_fetch {statistics}")) < runs * many / 2


# -- deletions


async def test_commits_and_deletions_that_come_by_turns_are_few_transactions(here: Postgres) -> None:
    count = 400
    async with PostgresStorage(here.url) as storage:
        assert all(await asyncio.gather(*[storage.commit(f"s{i}", None, a_head(1, 1), [b"x"]) for i in range(2 * count)]))
        counted = "SELECT xact_commit FROM pg_stat_database WHERE datname = 'postgres'"
        await asyncio.sleep(0)
        before = int(here.run(f"SELECT pg_stat_clear_snapshot(); {counted}").split()[-1])
        asked: list[Awaitable[bool]] = []
        for i in range(count):
            asked += [storage.delete(f"s{2 * i}", 1), storage.commit(f"s{2 * i + 1}", 1, a_head(2, 2), [b"y"])]
        assert all(await asyncio.gather(*asked))
    after = int(here.run(f"SELECT pg_stat_clear_snapshot(); {counted}").split()[-1])
    assert after - before < count / 4
    assert here.run(f"SELECT count(*) FROM {here.schema}.records") == str(2 * count)


@pytest.mark.parametrize("tail", [63, 64, 65])
async def test_short_logs_and_long_ones_are_deleted_together(here: Postgres, tail: int) -> None:
    async with PostgresStorage(here.url) as storage:
        tails = {f"s{i}": i % 3 * tail for i in range(90)}
        asked = [storage.commit(stream, None, a_head(1, each), [b"x"] * each) for stream, each in tails.items()]
        assert all(await asyncio.gather(*asked))
        assert all(await asyncio.gather(*[storage.delete(stream, 1) for stream in tails]))
    assert here.run(f"SELECT count(*) FROM {here.schema}.records") == "0"


@pytest.mark.parametrize("kept", [10, 64, 65, 30_000])
async def test_a_log_that_has_forgotten_its_beginning_is_deleted(here: Postgres, kept: int) -> None:
    """What is forgotten is not looked for: a stream that goes on for years has had any number of records."""
    async with PostgresStorage(here.url) as storage:
        assert await storage.commit("s", None, a_head(1, 0))
        tail = 40_000
        head = Head(2, tail, b"", 1e11, tail - kept)
        assert await storage.commit("s", 1, head, [b"x"] * tail)
        here.run(f'UPDATE {here.schema}.streams SET tail = tail + 10^15::bigint, "first" = "first" + 10^15::bigint')
        here.run(f'UPDATE {here.schema}.records SET "offset" = "offset" + 10^15::bigint')
        with anyio.fail_after(BOUND_SECONDS):
            assert await storage.delete("s", 2)
    assert here.run(f"SELECT count(*) FROM {here.schema}.records") == "0"


async def test_what_was_forgotten_earlier_is_not_passed_over_again(here: Postgres) -> None:
    """It is in the index until there is a vacuum."""
    tail = 30_000
    async with PostgresStorage(here.url) as storage:
        here.run(f"ALTER TABLE {here.schema}.records SET (autovacuum_enabled = off)")
        assert await storage.commit("s", None, a_head(1, tail), [b"x"] * tail)
        for version in (2, 3):
            tail += 1
            assert await storage.commit("s", version - 1, Head(version, tail, b"", 1e11, tail - 10), [b"x"])
    table = f"FROM pg_statio_user_tables WHERE schemaname = '{here.schema}' AND relname = 'records'"
    inserted = f"SELECT n_tup_ins FROM pg_stat_user_tables WHERE schemaname = '{here.schema}' AND relname = 'records'"
    await until(lambda: here.run(inserted) == str(tail))
    before = int(here.run(f"SELECT idx_blks_hit + idx_blks_read {table}"))
    async with PostgresStorage(here.url) as storage:
        for version in range(4, 24):
            tail += 1
            assert await storage.commit("s", version - 1, Head(version, tail, b"", 1e11, tail - 10), [b"x"])
    await until(lambda: here.run(inserted) == str(tail))
    after = int(here.run(f"SELECT idx_blks_hit + idx_blks_read {table}"))
    assert after - before < 20 * 20
    assert here.run(f"SELECT count(*) FROM {here.schema}.records") == "10"


# -- what is due


async def test_commits_that_keep_the_expiry_touch_no_index(here: Postgres) -> None:
    """What PostgreSQL calls HOT: without it, each commit would leave an entry in three indexes to be cleaned up."""
    streams = [f"s{i}" for i in range(20)]
    async with PostgresStorage(here.url) as storage:
        assert all(await asyncio.gather(*[storage.commit(stream, None, a_head(1, 0)) for stream in streams]))
        for version in range(1, 51):
            done = [storage.commit(stream, version, a_head(version + 1, version), [b"x" * 100]) for stream in streams]
            assert all(await asyncio.gather(*done))
    updates = f"FROM pg_stat_user_tables WHERE schemaname = '{here.schema}' AND relname = 'streams'"
    await until(lambda: here.run(f"SELECT n_tup_upd {updates}") == "1000")
    assert int(here.run(f"SELECT n_tup_hot_upd {updates}")) >= 950


async def test_what_is_due_is_found_by_an_index(here: Postgres) -> None:
    many = 3000
    async with PostgresStorage(here.url) as storage, raw(here) as other:
        await other.execute("ANALYZE streams")  # while it is empty
        asked = [storage.commit(f"s{i}", None, Head(1, 0, b"", float(i))) for i in range(many)]
        assert all(await asyncio.gather(*asked))
        assert [head.expires_at for _, head in await storage.expired(9.0)] == [float(i) for i in range(10)]
        assert len(await storage.expired(1e9, 100)) == 100
    statistics = f"FROM pg_stat_user_indexes WHERE schemaname = '{here.schema}' AND indexrelname = 'streams_expires_at'"
    await until(lambda: int(here.run(f"SELECT idx_scan {statistics}")) == 2)
    assert int(here.run(f"SELECT idx_tup_read {statistics}")) <= 2 * 110


async def test_tables_that_were_made_before_there_was_that_index_and_that_column_get_them(here: Postgres) -> None:
    await enter(here.url)
    here.run(
        f"DROP INDEX {here.schema}.streams_expires_at; ALTER TABLE {here.schema}.streams DROP COLUMN first;"
        f" UPDATE {here.schema}.format SET version = 1"
    )
    await asyncio.gather(*[enter(here.url) for _ in range(4)])
    assert here.run(f"SELECT version FROM {here.schema}.format") == "3"
    assert here.run(f"SELECT count(*) FROM pg_indexes WHERE schemaname = '{here.schema}'") == "4"


async def test_what_a_log_forgets_is_not_in_the_table_any_more(here: Postgres) -> None:
    async with PostgresStorage(here.url) as storage:
        for stream in ("s", "other"):
            assert await storage.commit(stream, None, a_head(1, 10), [b"record"] * 10)
        assert await storage.commit("s", 1, Head(2, 12, b"", 9e9, first=11), [b"record"] * 2)
        assert here.run(f"SELECT count(*) FROM {here.schema}.records") == "11"
        assert await storage.commit("s", 2, Head(3, 13, b"", 9e9, first=12), [b"record"])
        assert here.run(f"SELECT count(*) FROM {here.schema}.records") == "11"


# -- the clock


async def test_the_clock_is_the_servers_whatever_the_local_one_says(here: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = time.time()
    monkeypatch.setattr(time, "time", lambda: truth + 3600)
    async with PostgresStorage(here.url) as storage:
        assert abs(storage.time() - truth) < 10
        monkeypatch.setattr(time, "time", lambda: truth - 3600)
        assert abs(storage.time() - truth) < 10


async def test_the_clock_is_measured_anew_with_another_connection(here: Postgres) -> None:
    async with PostgresStorage(here.url) as storage:
        storage._open.clock.set(1.0)  # as another server's
        assert storage.time() < 10
        here.run("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'streamkeep'")
        for _ in range(2):  # at the first time it may turn out that the connection is lost
            with suppress(StorageUnavailableError):
                await storage.read("s")
        assert abs(storage.time() - time.time()) < 10


# -- clones


async def test_a_clone_that_reads_and_writes_one_stream_has_two_connections(here: Postgres) -> None:
    async with PostgresStorage(here.url) as storage:
        before = len(connections(here))
        async with storage.clone() as clone:
            for version in range(10):
                assert await clone.commit("s", version or None, a_head(version + 1, 0))
                assert await clone.read("s") is not None
                await clone.expired(0.0)
            assert len(connections(here)) == before + 2


# -- one failure, many who wait


async def test_a_failure_that_hundreds_wait_for_is_one_exception_for_each(here: Postgres) -> None:
    async def watch(storage: Storage, stream: str) -> None:
        async with storage.watch(stream):
            pass

    with Postgres() as server:
        async with PostgresStorage(server.empty().url) as storage:
            assert await storage.read("s") is None
            server.kill()
            for _ in range(2):
                asked: list[Awaitable[object]] = [storage.read(f"s{i}") for i in range(400)]
                asked += [storage.commit(f"s{i}", None, a_head(1, 0)) for i in range(400)]
                asked += [watch(storage, f"s{i}") for i in range(400)]
                assert_each_has_its_own(await asyncio.gather(*asked, return_exceptions=True))


async def test_what_a_driver_may_not_raise_ends_one_batch(here: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    class Panic(BaseException):
        """What a native library raises."""

    async def panic(*_args: object, **_options: object) -> None:
        raise Panic("at the disco")

    async with PostgresStorage(here.url) as storage, storage.watch("s") as doorbell:
        assert await storage.commit("s", None, a_head(1, 0))
        assert await storage.read("s") is not None
        await taken(doorbell)
        with monkeypatch.context() as patch:
            patch.setattr(asyncpg.prepared_stmt.PreparedStatement, "fetch", panic)
            asked: list[Awaitable[object]] = [storage.read("s") for _ in range(100)]
            asked += [storage.commit(f"t{i}", None, a_head(1, 0)) for i in range(100)]
            failures = await asyncio.gather(*asked, return_exceptions=True)
        assert_each_has_its_own(failures)
        assert "Panic" in str(failures[0])
        assert await storage.read("s") is not None
        assert await storage.commit("s", 1, a_head(2, 0))
        await soon(doorbell.wait())


# -- forks


@pytest.mark.parametrize("where", ["inside", "outside"])
async def test_a_forked_child_can_neither_use_nor_harm_what_its_parent_has(here: Postgres, where: str) -> None:
    assert await forked(here.url, where) == 0


# -- doorbells


async def test_a_commit_elsewhere_rings_only_those_who_watch_its_stream(here: Postgres) -> None:
    async with (
        PostgresStorage(here.url) as one,
        PostgresStorage(here.url) as two,
        one.watch("s") as concerned,
        one.watch("t") as other,
    ):
        await taken(concerned, other)
        assert await two.commit("s", None, a_head(1, 0))
        await soon(concerned.wait())
        with pytest.raises(TimeoutError), anyio.fail_after(0):
            await other.wait()


async def test_ones_own_commit_rings_once(here: Postgres) -> None:
    async with (
        PostgresStorage(here.url) as one,
        PostgresStorage(here.url) as two,
        one.watch("s") as mine,
        one.watch("t") as theirs,
    ):
        await taken(mine, theirs)
        assert await one.commit("s", None, a_head(1, 0))
        await soon(mine.wait())
        assert await two.commit("t", None, a_head(1, 0))
        await soon(theirs.wait())  # notifications come in the order of commits, so that of the first is through
        with pytest.raises(TimeoutError), anyio.fail_after(0):
            await mine.wait()


async def test_very_many_changes_at_once_ring_too(here: Postgres) -> None:
    async with PostgresStorage(here.url) as one, PostgresStorage(here.url) as two, one.watch("s") as doorbell:
        await taken(doorbell)
        streams = [f"other{i}" for i in range(2000)] + ["s"]
        assert all(await asyncio.gather(*(two.commit(stream, None, a_head(1, 0)) for stream in streams)))
        await soon(doorbell.wait())


async def test_what_was_committed_while_the_listening_connection_was_lost_rings(here: Postgres) -> None:
    async with PostgresStorage(here.url) as one, PostgresStorage(here.url) as two, one.watch("s") as doorbell:
        await taken(doorbell)
        for version in range(3):
            here.run("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'LISTEN%'")
            assert await two.commit("s", version or None, a_head(version + 1, 0))
            await soon(doorbell.wait())
        assert await two.commit("s", 3, a_head(4, 0))
        await soon(doorbell.wait())


async def test_a_watch_without_a_server_fails_instead_of_never_ringing(here: Postgres) -> None:
    with Postgres() as server:
        async with PostgresStorage(server.empty().url) as storage:
            server.stop()
            with pytest.raises(StorageUnavailableError):
                async with storage.watch("s"):
                    pass
            server.start()
            async with storage.watch("s") as doorbell:
                await taken(doorbell)
                async with PostgresStorage(server.url) as other:
                    assert await other.commit("s", None, a_head(1, 0))
                await soon(doorbell.wait())


async def test_notifications_can_be_off(here: Postgres) -> None:
    url = here.url_of(options="&notify=off")
    async with PostgresStorage(url) as one, PostgresStorage(url) as two, raw(here) as listener:
        notified: list[str] = []
        for channel in ("streamkeep", one._place.schema):
            await listener.add_listener(channel, lambda *said: notified.append(said[-1]))
        async with one.watch("s") as doorbell, one.watch("t") as other:
            for version in range(5):
                assert await two.commit("s", version or None, a_head(version + 1, 0))
                while (page := await one.read("s")) is None or page.head.version <= version:
                    await soon(doorbell.wait())
            assert await two.delete("s", 5)
            while await one.read("s"):
                await soon(doorbell.wait())
            await soon(other.wait())  # the first look rings
        # It was not behind a pooler, so nothing of the server's was in its way: two connections each at most.
        assert len(connections(here)) <= 4
        assert not notified


async def test_watching_without_notifications_costs_one_query_whatever_is_watched(here: Postgres) -> None:
    async with PostgresStorage(here.url_of(options="&notify=off")) as storage, anyio.create_task_group() as tasks:
        entered = 0

        async def watch(stream: str) -> None:
            nonlocal entered
            async with storage.watch(stream) as doorbell:
                await doorbell.wait()
                entered += 1
                await anyio.sleep_forever()

        for i in range(1000):
            tasks.start_soon(watch, f"s{i}")
        await until_async(lambda: entered == 1000)
        assert len(connections(here)) == 1
        tasks.cancel_scope.cancel()


async def test_what_a_look_has_found_is_no_notifications_to_the_next(here: Postgres) -> None:
    asked: list[int | None] = []

    async def look(versions: Mapping[bytes, int | None]) -> Mapping[bytes, int | None]:
        asked.append(versions[b"s"])
        return {} if versions[b"s"] == 5 else {b"s": 5}

    polling = Polling(look)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(polling.run)
        async with polling.watch(b"s") as doorbell:
            await soon(doorbell.wait())
            await until_async(lambda: len(asked) >= 3)
        tasks.cancel_scope.cancel()
    assert asked[0] not in {None, 5}
    assert set(asked[1:]) == {5}


# -- poolers


async def test_a_pooler_and_notifications_do_not_go_together(here: Postgres, pooler: PgBouncer) -> None:
    with pytest.raises(StorageError, match="add notify=off to the URL"):
        await enter(here.through(pooler.port))


async def test_more_storages_than_sessions_share_a_pooler(here: Postgres, pooler: PgBouncer) -> None:
    url = here.url_of(port=pooler.port, options="&notify=off")
    count = 12
    async with asyncio.timeout(BOUND_SECONDS * 2):

        async def write(name: str) -> None:
            async with PostgresStorage(url) as storage:
                for version in range(10):
                    assert await storage.commit(name, version or None, a_head(version + 1, version + 1), [b"%d" % version])
                    page = await storage.read(name, 0, 99)
                    assert page is not None
                    assert list(page.records) == [b"%d" % i for i in range(version + 1)]

        await asyncio.gather(*(write(f"s{i}") for i in range(count)))
    # What others get of the pooler's sessions is as if we had never been there.
    other: Any = await asyncpg.connect(f"postgresql://streamkeep@127.0.0.1:{pooler.port}/postgres", statement_cache_size=0)
    async with other.transaction():
        assert await other.fetchval("SHOW enable_seqscan") == "on"
        assert await other.fetchval("SELECT count(*) FROM pg_prepared_statements WHERE name <> ''") == 0
    await other.close()


# -- migrations


async def test_processes_go_on_under_a_newer_one_that_has_added_something(here: Postgres) -> None:
    async with PostgresStorage(here.url) as running:
        assert await running.commit("s", None, a_head(1, 1), [b"x"])
        here.run(f"ALTER TABLE {here.schema}.streams ADD COLUMN more integer NOT NULL DEFAULT 1")
        here.run(f"ALTER TABLE {here.schema}.records ADD COLUMN more integer NOT NULL DEFAULT 1")
        here.run(f"UPDATE {here.schema}.format SET version = 4")
        assert await running.commit("s", 1, a_head(2, 2), [b"x"])
        async with PostgresStorage(here.url) as newcomer:
            page = await newcomer.read("s", 0, 9)
            assert page is not None
            assert list(page.records) == [b"x", b"x"]
            assert await newcomer.delete("s", 2)


async def test_what_a_newer_one_has_changed_is_refused(here: Postgres) -> None:
    await enter(here.url)
    here.run(f"UPDATE {here.schema}.format SET version = 5, oldest = 4")
    with pytest.raises(StorageCorruptError, match=r"written by a newer streamkeep \(format 5.*upgrade streamkeep"):
        await enter(here.url)


async def test_a_schema_of_somebody_elses_is_refused_and_left_alone(here: Postgres) -> None:
    here.run(f"CREATE SCHEMA {here.schema}; CREATE TABLE {here.schema}.format (theirs int)")
    with pytest.raises(StorageCorruptError, match="not as they were made"):
        await enter(here.url)
    assert here.run(f"SELECT count(*) FROM pg_tables WHERE schemaname = '{here.schema}'") == "1"


async def test_other_tables_in_the_schema_are_left_alone(here: Postgres) -> None:
    here.run(f"CREATE SCHEMA {here.schema}; CREATE TABLE {here.schema}.theirs (x int)")
    await enter(here.url)
    assert here.run(f"SELECT count(*) FROM pg_tables WHERE schemaname = '{here.schema}'") == "4"


async def test_what_is_behind_missing_records_does_not_take_their_place(here: Postgres) -> None:
    async with PostgresStorage(here.url) as storage:
        records = [b"%d" % number for number in range(10)]
        assert await storage.commit("s", None, a_head(1, 10), records)
        here.run(f'DELETE FROM {here.schema}.records WHERE "offset" BETWEEN 3 AND 5')
        pages = [await storage.read("s", start, 100) for start in (0, 3, 6)]

    assert [page and list(page.records) for page in pages] == [records[:3], [], records[6:]]


async def test_tables_that_are_dropped_under_us_are_named(here: Postgres) -> None:
    async with PostgresStorage(here.url) as storage:
        assert await storage.commit("s", None, a_head(1, 0))
        here.run(f"DROP SCHEMA {here.schema} CASCADE")
        with pytest.raises(StorageCorruptError, match="tables are missing"):
            await storage.commit("s", 1, a_head(2, 0))
        with pytest.raises(StorageCorruptError, match="tables are missing"):
            await storage.read("s")


# -- standbys


async def test_a_standby_takes_over(tmp_path: Path) -> None:
    with Postgres() as primary, Postgres(standby_of=primary) as standby:
        primary.run("ALTER SYSTEM SET synchronous_standby_names = '*'; ", "postgres")
        primary.run("SELECT pg_reload_conf()")
        with pytest.raises(StorageUnavailableError, match=r"it is a standby.*name the primary, or all hosts"):
            await enter(standby.url)
        hosts = f"127.0.0.1:{standby.port},127.0.0.1:{primary.port}"
        async with storage_for(primary.url_of(host=hosts)) as storage, storage.watch("s") as doorbell:
            for version in range(10):
                assert await storage.commit("s", version or None, a_head(version + 1, version + 1), [b"%d" % version])
            await taken(doorbell)
            primary.kill()
            going_on = asyncio.create_task(storage.commit("s", 10, a_head(11, 11), [b"10"]))
            standby.run("SELECT pg_promote()")
            assert await soon(going_on)
            await soon(doorbell.wait())
            page = await storage.read("s", 0, 99)
            assert page is not None
            assert list(page.records) == [b"%d" % i for i in range(11)]


async def test_a_standby_that_lacks_the_last_commits_is_believed() -> None:
    with Postgres() as primary, Postgres(standby_of=primary) as standby:
        hosts = f"127.0.0.1:{primary.port},127.0.0.1:{standby.port}"
        async with storage_for(primary.url_of(host=hosts)) as storage, storage.watch("s") as doorbell:
            for version in range(3):
                assert await storage.commit("s", version or None, a_head(version + 1, version + 1), [b"%d" % version])
            assert await storage.commit("deleted", None, a_head(1, 0))
            count = f"SELECT count(*) FROM {primary.schema}.streams WHERE version = 3 OR id = 'deleted'"
            await until(lambda: standby.run("SELECT to_regclass('" + primary.schema + ".streams') IS NOT NULL") == "t")
            await until(lambda: standby.run(count) == "2")
            standby.stop()
            for version in range(3, 6):
                assert await storage.commit("s", version, a_head(version + 1, version + 1), [b"%d" % version])
            assert await storage.commit("later", None, a_head(1, 1), [b"x"])
            assert await storage.delete("deleted", 1)
            await taken(doorbell)
            primary.kill()
            standby.start()
            standby.run("SELECT pg_promote()")
            page = await soon(storage.read("s", 0, 9))
            assert page is not None
            assert (page.head, list(page.records)) == (a_head(3, 3), [b"0", b"1", b"2"])
            await soon(doorbell.wait())  # a reader looks, and sees it
            assert not await storage.commit("s", 6, a_head(7, 7), [b"lost"])
            assert not await storage.delete("s", 6)
            assert not await storage.commit("later", 1, a_head(2, 2), [b"lost"])
            assert await ids_of(storage) == ["deleted", "s"]
            assert await storage.commit("s", 3, a_head(9, 4), [b"other"])
            page = await storage.read("s", 0, 9)
            assert page is not None
            assert list(page.records) == [b"0", b"1", b"2", b"other"]


# -- the words of the tests


def a_head(version: int, tail: int) -> Head:
    return Head(version, tail, b"", 9e9)


async def enter(url: str) -> None:
    async with PostgresStorage(url):
        pass


async def soon(awaitable: Any) -> Any:
    """Wait for it, but not for ever."""
    async with asyncio.timeout(BOUND_SECONDS):
        return await awaitable


async def taken(*doorbells: Any) -> None:
    """Take what has rung because somebody began to watch."""
    for doorbell in doorbells:
        with anyio.move_on_after(0):
            await doorbell.wait()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(BOUND_SECONDS):
        while not await asyncio.to_thread(condition):
            pass


async def until_async(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(BOUND_SECONDS):
        while not condition():
            await asyncio.sleep(0)


def connections(server: Postgres) -> list[str]:
    """The server processes that storages of now are connected to."""
    return server.run("SELECT pid FROM pg_stat_activity WHERE application_name = 'streamkeep'").split()


def waiting(server: Postgres) -> int:
    """How many statements wait for a row."""
    return int(server.run("SELECT count(*) FROM pg_locks WHERE NOT granted"))


@asynccontextmanager
async def raw(server: Postgres) -> AsyncGenerator[Any]:
    """A connection of the bare driver's, in the storage's schema."""
    db = await asyncpg.connect(f"postgresql://streamkeep@127.0.0.1:{server.port}/postgres")
    try:
        await db.execute(f"SET search_path = {server.schema}")
        yield db
    finally:
        await db.close()
