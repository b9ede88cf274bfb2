"""NATSStorage keeps the contract, and what it promises beyond: JetStream's limits, what it may leave behind, errors that help."""

import asyncio
import itertools
import json
import random
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import anyio
import nats
import pytest
import trio
import uvloop
from msgspec.structs import replace
from nats.aio.client import Client
from tests.engines.nats import NATSServer, running_server
from tests.engines.process import free_port
from tests.simulation.suite import SimulationSuite

from streamkeep.errors import InvalidArgumentError, StorageCorruptError, StorageError, StorageFullError, StorageUnavailableError
from streamkeep.storage import Head, Storage
from streamkeep.storages import storage_for
from streamkeep.storages.nats import NATSStorage
from streamkeep.storages.nats._commits import DELETION, encode, stream_of, token_of
from streamkeep.storages.nats._link import Connection
from streamkeep.storages.nats._log import Log
from streamkeep.storages.nats._markers import CONTENT, prefixes_until, second_of, subject_of
from streamkeep.storages.retrying import RetryingStorage
from streamkeep.testing import StorageSuite, StreamsSuite

BOUND_SECONDS: Final = 20
NUMBERS: Final = itertools.count(1)

# Alice may do all that streamkeep needs (docs/how-to/nats.md); what each of the others may not do, their name says.
ACCOUNTS: Final = """
accounts {
  S {
    jetstream: enabled
    users: [
      {user: alice, password: secret, permissions: {
        publish: ["streamkeep.s.*", "streamkeep.due.>",
                  "$JS.API.STREAM.INFO.streamkeep", "$JS.API.STREAM.CREATE.streamkeep",
                  "$JS.API.STREAM.MSG.GET.streamkeep", "$JS.API.STREAM.MSG.DELETE.streamkeep",
                  "$JS.API.STREAM.PURGE.streamkeep", "$JS.API.DIRECT.GET.streamkeep"],
        subscribe: ["_INBOX.>", "streamkeep.bell.>"]}},
      {user: unwriting, password: secret, permissions: {publish: ["$JS.API.>", "streamkeep.due.>"], subscribe: ">"}},
      {user: unlistening, password: secret, permissions: {publish: ">", subscribe: "_INBOX.>"}},
      {user: unasking, password: secret, permissions: {publish: "streamkeep.>", subscribe: ">"}},
      {user: unpurging, password: secret, permissions: {publish: {deny: "$JS.API.STREAM.PURGE.>"}}},
      {user: unanswered, password: secret, permissions: {publish: ">", subscribe: "streamkeep.>"}}
    ]
  }
  PLAIN { users: [{user: bob, password: secret}] }
}
"""


@pytest.fixture(scope="module")
def server() -> Generator[NATSServer]:
    with running_server() as server:
        yield server


@pytest.fixture
def name() -> str:
    return f"test-{next(NUMBERS)}"


@pytest.fixture
def url(server: NATSServer, name: str) -> str:
    return f"nats://127.0.0.1:{server.port}?stream={name}"


@pytest.fixture
def open_storage(url: str) -> Callable[[], Storage]:
    return lambda: storage_for(url)


@pytest.fixture
async def storage(open_storage: Callable[[], Storage]) -> AsyncGenerator[Storage]:
    async with open_storage() as storage:
        yield storage


@pytest.fixture
async def client(server: NATSServer) -> AsyncGenerator[Client]:
    async with connected(server.port) as client:
        yield client


class TestNATSStorage(StorageSuite):
    @pytest.fixture
    def open_storage(self, url: str) -> Callable[[], Storage]:
        return lambda: storage_for(url)


@pytest.mark.slow
class TestStreamsOverNATS(StreamsSuite):
    @pytest.fixture
    def open_storage(self, url: str) -> Callable[[], Storage]:
        return lambda: storage_for(url)


class TestSimulationOverNATS(SimulationSuite):
    @pytest.fixture
    def open_storage(self, url: str) -> Callable[[], Storage]:
        return lambda: storage_for(url)


# -- URLs


@pytest.mark.parametrize(
    "url",
    [
        "nats://host",
        "nats://host:4222/",
        "nats://a:4222,b,c:1?replicas=3&stream=s_1-x",
        "nats://user:p%40ss@host",
        "nats://token@host",
        "tls://host:4222?creds=/a/file",
        "nats://[::1]:4222",
    ],
)
def test_a_url_names_servers(url: str) -> None:
    found = storage_for(url)
    assert isinstance(found, RetryingStorage)
    assert isinstance(found.storage, NATSStorage)


@pytest.mark.parametrize(
    "url",
    [
        "nats://",
        "nats://secret:secret@",
        "nats://secret:secret@host:port",
        "nats://secret:secret@host:99999",
        "nats://secret:secret@host/path",
        "nats://secret:secret@host?stream=",
        "nats://secret:secret@host?stream=a.b",
        "nats://secret:secret@host?creds=",
        "nats://secret:secret@host?replicas=2",
        "nats://secret:secret@host?replicas=many",
        "nats://secret:secret@host?prefix=x",
        "nats://secret:secret@host#x",
        "nats://secret:secret@a,,b",
    ],
)
def test_a_url_that_names_no_servers_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(InvalidArgumentError) as raised:
        storage_for(url)
    assert "secret" not in str(raised.value)


# -- what the server says when it cannot be used


async def test_a_server_that_is_not_there_is_named() -> None:
    port = free_port()
    with pytest.raises(StorageUnavailableError, match=f"127.0.0.1:{port}"):
        async with storage_for(f"nats://127.0.0.1:{port}"):
            pass


async def test_a_server_without_jetstream_is_told_from_one_with() -> None:
    with running_server(jetstream=None) as server, pytest.raises(StorageError, match="start nats-server with -js"):
        async with storage_for(server.url):
            pass


async def test_one_of_several_servers_is_enough(server: NATSServer, name: str) -> None:
    url = f"nats://127.0.0.1:{free_port()},127.0.0.1:{server.port}?stream={name}"
    async with storage_for(url) as storage:
        assert await storage.read("s") is None


def test_another_event_loop_is_told_so(url: str) -> None:
    async def enter() -> None:
        async with storage_for(url):
            pass

    with pytest.raises(StorageError, match="NATSStorage needs asyncio"):
        trio.run(enter)


def test_uvloop_will_do(url: str) -> None:
    async def use() -> None:
        async with storage_for(url) as storage, storage.watch("s") as doorbell:
            assert await storage.commit("s", None, a_head(1), [b"x" * 500_000])
            with anyio.fail_after(BOUND_SECONDS):
                await doorbell.wait()
            assert await storage.scan() == [("s", a_head(1))]

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(use())


async def test_a_server_that_is_too_old_is_refused() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'INFO {"server_id":"x","version":"2.11.9","max_payload":1048576,"proto":1,"headers":true}\r\n')
        while line := await reader.readline():
            if line == b"PING\r\n":
                writer.write(b"PONG\r\n")
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as old:
        port = old.sockets[0].getsockname()[1]
        with pytest.raises(StorageError, match=r"2\.11\.9.*needs 2\.12 or newer: upgrade"):
            async with storage_for(f"nats://127.0.0.1:{port}"):
                pass


class TestAccounts:
    @pytest.fixture(scope="class")
    @classmethod
    def guarded(cls) -> Generator[NATSServer]:
        with running_server(more=ACCOUNTS) as server:
            yield server

    @pytest.fixture(autouse=True)
    async def alice(self, guarded: NATSServer) -> AsyncGenerator[Storage]:
        async with storage_for(f"nats://alice:secret@127.0.0.1:{guarded.port}") as storage:
            yield storage

    async def test_what_the_docs_permit_is_enough(self, alice: Storage) -> None:
        head = a_head(0)
        async with alice.watch("s") as doorbell:
            assert await alice.commit("s", None, head)
            with anyio.fail_after(BOUND_SECONDS):
                await doorbell.wait()
        assert await alice.scan() == [("s", head)]
        large = replace(head, version=head.version + 1, tail=3)
        assert await alice.commit("s", head.version, large, [b"x" * 2**20] * 3)
        page = await alice.read("s", 0, 10)
        assert page is not None
        assert page.head == large
        assert await alice.delete("s", large.version)

    @pytest.mark.parametrize("who", ["alice:wrong@", "nobody:secret@", "token@", ""])
    async def test_who_is_not_known_is_told_what_to_check(self, guarded: NATSServer, who: str) -> None:
        with pytest.raises(StorageError, match="check user, password, token or creds") as raised:
            async with storage_for(f"nats://{who}127.0.0.1:{guarded.port}"):
                pass
        assert not isinstance(raised.value, StorageUnavailableError)
        assert "wrong" not in str(raised.value)
        assert "secret" not in str(raised.value)

    async def test_an_account_without_jetstream_is_told_so(self, guarded: NATSServer) -> None:
        with pytest.raises(StorageError, match="enable"):
            async with storage_for(f"nats://bob:secret@127.0.0.1:{guarded.port}"):
                pass

    @pytest.mark.parametrize("user", ["unasking", "unanswered"])
    async def test_who_may_not_ask_jetstream_is_told_so_on_entering(self, guarded: NATSServer, user: str) -> None:
        with pytest.raises(StorageError, match=r"does not permit .* allow it in the permissions") as raised:
            async with storage_for(f"nats://{user}:secret@127.0.0.1:{guarded.port}"):
                pass
        assert not isinstance(raised.value, StorageUnavailableError)

    async def test_who_may_not_write_or_listen_is_told_so(self, guarded: NATSServer) -> None:
        async with storage_for(f"nats://unwriting:secret@127.0.0.1:{guarded.port}") as storage:
            with pytest.raises(StorageError, match=r"does not permit the publish to \"streamkeep.s.denied\""):
                await storage.commit("denied", None, a_head(0))
        async with storage_for(f"nats://unlistening:secret@127.0.0.1:{guarded.port}") as storage:
            with pytest.raises(StorageError, match=r"does not permit the subscription to \"streamkeep.bell"):
                async with storage.watch("denied"):
                    pass

    async def test_a_deletion_that_cannot_be_swept_away_has_removed_the_records(
        self, guarded: NATSServer, alice: Storage
    ) -> None:
        head = a_head(2)
        assert await alice.commit("deleted", None, head, [b"one", b"two"])
        after = replace(head, version=head.version + 1, tail=3)
        assert await alice.commit("deleted", head.version, after, [b"three"])
        who = f"nats://unpurging:secret@127.0.0.1:{guarded.port}"
        async with storage_for(who) as storage:
            with pytest.raises(StorageError, match="does not permit"):
                await storage.delete("deleted", after.version)
        async with connected(guarded.port, who) as client:
            kept = {"subjects_filter": "streamkeep.s.deleted"}
            assert (await api(client, "STREAM.INFO.streamkeep", kept))["state"]["subjects"] == {"streamkeep.s.deleted": 1}
            assert await alice.read("deleted", 0, 5) is None
            assert "subjects" not in (await api(client, "STREAM.INFO.streamkeep", kept))["state"]

    async def test_a_credentials_file_that_is_missing_is_told_so(self, guarded: NATSServer) -> None:
        with pytest.raises(StorageError, match="credentials file"):
            async with storage_for(f"nats://127.0.0.1:{guarded.port}?creds=/nowhere/user.creds"):
                pass


# -- the JetStream stream


async def test_any_number_of_processes_may_create_it_at_once(url: str, server: NATSServer, name: str, client: Client) -> None:
    opened = anyio.Event()
    count = 0

    async def enter() -> None:
        nonlocal count
        async with storage_for(url) as storage:
            count += 1
            if count == 50:
                opened.set()
            await opened.wait()
            assert await storage.read("s") is None

    with anyio.fail_after(BOUND_SECONDS * 2):
        async with anyio.create_task_group() as tasks:
            for _ in range(50):
                tasks.start_soon(enter)
    assert (await api(client, f"STREAM.INFO.{name}"))["config"]["discard"] == "new"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"max_age": 600_000_000_000}, "max_age"),
        ({"max_msgs_per_subject": 5}, "max_msgs_per_subject"),
        ({"discard": "old"}, "discard"),
        ({"allow_direct": False}, "allow_direct"),
        ({"allow_rollup_hdrs": False}, "allow_rollup_hdrs"),
        ({"allow_atomic": False}, "allow_atomic"),
        ({"republish": None}, "republish"),
        ({"storage": "memory"}, "storage"),
        ({"retention": "interest"}, "retention"),
        ({"subjects": ["other.>"], "republish": None}, "subjects"),
        ({"deny_purge": True, "allow_rollup_hdrs": False}, "deny_purge"),
        ({"no_ack": True, "allow_atomic": False}, "no_ack"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_one_that_would_lose_what_is_promised_is_refused(
    url: str, name: str, client: Client, change: Mapping[str, object], complaint: str
) -> None:
    config = await a_config(url, client, name)
    await api(client, f"STREAM.DELETE.{name}")
    await api(client, f"STREAM.CREATE.{name}", {**config, **change})
    with pytest.raises(StorageError, match=rf"{complaint}.*nats stream edit {name}"):
        async with storage_for(url):
            pass


async def test_one_with_limits_and_a_description_of_its_own_is_taken(url: str, name: str, client: Client) -> None:
    config = await a_config(url, client, name)
    await api(client, f"STREAM.UPDATE.{name}", {**config, "max_bytes": 2**20, "description": "ours", "max_msgs": 1000})
    async with storage_for(url) as storage:
        assert await storage.commit("s", None, a_head(0))


async def test_one_with_other_replicas_than_the_url_says_is_refused(url: str, name: str, client: Client) -> None:
    await a_config(url, client, name)
    with pytest.raises(StorageError, match="num_replicas is 1 and the URL says 3"):
        async with storage_for(f"{url}&replicas=3"):
            pass


async def test_replicas_without_a_cluster_are_refused(url: str) -> None:
    with pytest.raises(StorageError, match="replicas > 1 not supported"):
        async with storage_for(f"{url}&replicas=3"):
            pass


async def test_one_of_a_newer_format_is_refused(url: str, name: str, client: Client) -> None:
    config = await a_config(url, client, name)
    await api(client, f"STREAM.UPDATE.{name}", {**config, "metadata": {"streamkeep": "2"}})
    with pytest.raises(StorageCorruptError, match="format 2"):
        async with storage_for(url):
            pass


@pytest.mark.parametrize("message", [b"", b"hello", b"\x03\0\0\0\0", b"\x01\0\0\0\0", b"\x01\0\0\0\0abcd\0\0\0\x04"])
async def test_a_message_that_is_not_ours_is_found_corrupt(storage: Storage, name: str, client: Client, message: bytes) -> None:
    await client.request(f"{name}.s.s", message)
    for attempt in (storage.read("s"), storage.read("s", 0, 5), storage.commit("s", None, a_head(0)), storage.delete("s", 1)):
        with pytest.raises(StorageCorruptError, match=r"message \d of the JetStream stream"):
            await attempt


async def test_one_that_is_deleted_while_it_is_open_is_missed(storage: Storage, name: str, client: Client) -> None:
    await api(client, f"STREAM.DELETE.{name}")
    with pytest.raises(StorageError, match="has been deleted"):
        await storage.read("s")


# -- full


@pytest.mark.parametrize("limit", [{"max_bytes": 20_000}, {"max_msgs": 3}], ids=str)
async def test_at_its_limits_nothing_is_stored_and_nothing_is_lost(
    url: str, name: str, client: Client, limit: Mapping[str, int]
) -> None:
    config = await a_config(url, client, name)
    await api(client, f"STREAM.UPDATE.{name}", {**config, **limit})
    async with storage_for(url) as storage:
        head = await fill(storage)
        # To delete makes room, also where there is none for the message that says so.
        with pytest.raises(StorageFullError):
            for number in range(10_000):
                assert await storage.commit(f"small-{number}", None, replace(a_head(0), state=b""))
        assert await storage.delete("s", head.version)
        assert await storage.read("s") is None
        assert await storage.commit("s", None, a_head(0))


async def test_a_server_that_has_no_space_left_is_full() -> None:
    with running_server(jetstream="max_file_store: 100KB") as server:
        async with storage_for(server.url) as storage:
            await fill(storage)


async def fill(storage: Storage) -> Head:
    """Write until nothing goes any more; give the head of the stream `s`."""
    head = a_head(0)
    assert await storage.commit("s", None, head)
    with pytest.raises(StorageFullError, match="delete streams, or raise"):
        for _ in range(100):
            new = replace(head, version=head.version + 1, tail=head.tail + 1)
            assert await storage.commit("s", head.version, new, [b"x" * 5000])
            head = new
    page = await storage.read("s", 0, 1000)
    assert page is not None
    assert page.head == head
    assert list(page.records) == [b"x" * 5000] * head.tail
    with pytest.raises(StorageFullError):
        await storage.commit("other", None, a_head(1), [b"x" * 30_000])
    assert await storage.read("other") is None
    return head


# -- commits that are larger than a message


async def test_a_commit_may_be_many_times_as_large_as_a_message() -> None:
    with running_server(more="max_payload: 4096\n") as server:
        async with storage_for(server.url) as storage, storage_for(server.url) as second:
            records = [bytes([number]) * (1000 * number) for number in range(20)]
            head = a_head(len(records))
            assert await storage.commit("s", None, head, records)
            assert not await second.commit("s", None, replace(head, version=5), records)
            for start in range(0, 20, 3):
                page = await second.read("s", start, 2)
                assert page is not None
                assert (page.head, list(page.records)) == (head, records[start : start + 2])
            more = Head(head.version + 1, 22, b"state" * 2000, head.expires_at)
            assert await second.commit("s", head.version, more, [b"y" * 9000, b"z"])
            page = await storage.read("s", 18, 9)
            assert page is not None
            assert (page.head, list(page.records)) == (more, [*records[18:], b"y" * 9000, b"z"])
            with pytest.raises(StorageError, match="raise its max_payload"):
                await storage.commit("large", None, a_head(1), [b"x" * 4_000_000])
            assert await storage.read("large") is None
            assert await storage.delete("s", more.version)
            assert await storage.scan() == []


async def test_the_beginning_of_a_commit_that_was_never_finished_is_nothing(
    storage: Storage, name: str, client: Client
) -> None:
    """A server that is killed while it stores a batch may have stored some of it."""
    head = a_head(1)
    assert await storage.commit("s", None, head, [b"one"])
    subject = f"{name}.s.s"
    pieces = encode(replace(head, version=head.version + 1, tail=2), [b"x" * 3000], 0, 1, 1000)
    for piece in pieces[:2]:
        await client.request(subject, piece)
    page = await storage.read("s", 0, 10)
    assert page is not None
    assert (page.head, list(page.records)) == (head, [b"one"])
    after = replace(head, version=head.version + 2, tail=2)
    assert await storage.commit("s", head.version, after, [b"two"])
    await client.request(subject, pieces[0])
    last = replace(head, version=head.version + 3, tail=3)
    assert await storage.commit("s", after.version, last, [b"three"])
    page = await storage.read("s", 0, 10)
    assert page is not None
    assert (page.head, list(page.records)) == (last, [b"one", b"two", b"three"])


async def test_a_stream_that_never_began_is_absent_whatever_is_left_of_it(storage: Storage, name: str, client: Client) -> None:
    piece = encode(a_head(1), [b"x" * 3000], 0, 0, 1000)[0]
    await client.request(f"{name}.s.s", piece)
    assert await storage.read("s", 0, 10) is None
    head = a_head(1)
    assert await storage.commit("s", None, head, [b"one"])
    page = await storage.read("s", 0, 10)
    assert page is not None
    assert (page.head, list(page.records)) == (head, [b"one"])


# -- deletion


async def test_a_deletion_that_was_not_swept_away_is_one_all_the_same(storage: Storage, name: str, client: Client) -> None:
    """The process that deleted died before it removed the message that says so."""
    head = a_head(1)
    for reads in (True, False):
        assert await storage.commit("s", None, head, [b"old"])
        await client.request(f"{name}.s.s", DELETION, headers={"Nats-Rollup": "sub"})
        if reads:
            assert await storage.read("s", 0, 5) is None
            assert await storage.scan() == []
        assert not await storage.commit("s", head.version, replace(head, version=head.version + 1))
        assert not await storage.delete("s", head.version)
        head = replace(head, version=head.version + 2)
        assert await storage.commit("s", None, head, [b"new"])
        page = await storage.read("s", 0, 5)
        assert page is not None
        assert (page.head, list(page.records)) == (head, [b"new"])
        assert await storage.delete("s", head.version)


async def test_what_a_log_forgets_is_not_in_jetstream_any_more(storage: Storage, name: str, client: Client) -> None:
    """Messages are removed whole: the one in which the first record that is kept lies stays."""

    async def messages() -> dict[str, int]:
        info = await api(client, f"STREAM.INFO.{name}", {"subjects_filter": f"{name}.s.>"})
        return dict(info["state"]["subjects"])

    head = a_head(3)
    for stream in ("s", "other"):
        assert await storage.commit(stream, None, head, [b"a", b"b", b"c"])
    for number in range(1, 8):
        new = replace(head, version=head.version + 1, tail=head.tail + 3)
        assert await storage.commit("s", head.version, new, [b"a", b"b", b"%d" % number])
        head = new
    new = replace(head, version=head.version + 1, tail=head.tail + 1, first=14)
    assert await storage.commit("s", head.version, new, [b"end"])
    assert await messages() == {f"{name}.s.s": 5, f"{name}.s.other": 1}
    page = await storage.read("s", 14, 3)
    assert page is not None
    assert (page.head, list(page.records)) == (new, [b"4", b"a", b"b"])
    assert await storage.commit("s", new.version, last := replace(new, version=new.version + 1, first=new.tail))
    assert await messages() == {f"{name}.s.s": 1, f"{name}.s.other": 1}
    assert await storage.delete("s", last.version)
    assert await messages() == {f"{name}.s.other": 1}


async def test_heads_that_come_with_much_data_are_all_scanned(storage: Storage) -> None:
    heads = {f"s{number:02}": replace(a_head(1), expires_at=1.5e9) for number in range(20)}
    for stream, head in heads.items():
        assert await storage.commit(stream, None, head, [b"x" * 900_000])
    before = requests_of(storage)
    assert dict(await storage.scan()) == heads
    assert requests_of(storage) - before < 6
    assert dict(await storage.expired(1.5e9)) == heads


# -- expiry


async def markers_of(client: Client, name: str) -> list[str]:
    info = await api(client, f"STREAM.INFO.{name}", {"subjects_filter": f"{name}.due.>"})
    return sorted(info["state"].get("subjects") or {})


async def until_markers(client: Client, name: str, expected: Sequence[str]) -> None:
    """Wait until these are all: what is needed no more is removed soon after."""
    with anyio.fail_after(BOUND_SECONDS):
        while await markers_of(client, name) != expected:
            await anyio.lowlevel.checkpoint()


async def messages_of(client: Client, name: str) -> int:
    last: int = (await api(client, f"STREAM.INFO.{name}"))["state"]["last_seq"]
    return last


async def test_only_a_commit_that_moves_the_expiry_pays_for_it(storage: Storage, name: str, client: Client) -> None:
    head = a_head(0)
    costs: list[int] = []
    for expires_at in (4e9, 4e9, 4e9 + 0.5, 4e9 + 1, 4e9 + 1, 3e9, 4e9):
        before = await messages_of(client, name)
        new = replace(head, version=head.version + 1, expires_at=expires_at)
        assert await storage.commit("s", head.version if costs else None, new)
        head = new
        costs.append(await messages_of(client, name) - before)
        await until_markers(client, name, [subject_of(name, int(expires_at), "s")])
    assert costs == [2, 1, 1, 2, 1, 2, 2]
    assert await storage.delete("s", head.version)
    await until_markers(client, name, [])


async def test_what_has_expired_is_found_in_two_requests_whatever_is_kept(storage: Storage, name: str, client: Client) -> None:
    for number in range(3000):
        await client.publish(subject_of(name, 4_000_000_000 + number // 7, f"kept-{number}"), CONTENT)
        await client.publish(f"{name}.s.kept-{number}", encode(a_head(0), [], 0, 0, 10_000)[0])
    await client.flush()
    heads = {f"s{number}": replace(a_head(0), expires_at=1.5e9 + number) for number in range(20)}
    for stream, head in heads.items():
        assert await storage.commit(stream, None, head)
    before = requests_of(storage)
    assert dict(await storage.expired(1.5e9 + 9.5)) == {f"s{number}": heads[f"s{number}"] for number in range(10)}
    assert requests_of(storage) - before == 2
    assert await storage.expired(1.4e9) == []
    assert requests_of(storage) - before == 3


@pytest.mark.parametrize("a_second", [1, 50, 3000], ids=lambda count: f"{count} a second")
async def test_any_number_may_expire_at_once(storage: Storage, name: str, client: Client, a_second: int) -> None:
    for number in range(3000):
        head = replace(a_head(0), expires_at=1.5e9 + number // a_second)
        await client.publish(subject_of(name, int(head.expires_at), f"s{number}"), CONTENT)
        await client.publish(f"{name}.s.s{number}", encode(head, [], 0, 0, 10_000)[0])
    await client.flush()
    await client.request(f"{name}.s.last", encode(a_head(0), [], 0, 0, 10_000)[0], timeout=BOUND_SECONDS)
    assert len(await storage.expired(1.6e9, 10)) == 10
    assert {stream for stream, _ in await storage.expired(1.6e9, 5000)} == {f"s{number}" for number in range(3000)}


async def test_a_marker_that_no_head_confirms_is_removed_when_its_commit_cannot_be_under_way_any_more(
    storage: Storage, name: str, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever wrote it died, before or after the commit; or its stream expires later now."""
    later = replace(a_head(0), expires_at=4e9)
    assert await storage.commit("later", None, later)
    for stream in ("later", "absent", "odd%20id"):
        await client.request(subject_of(name, 1_500_000_000, stream), CONTENT)
    assert await storage.expired(1.6e9) == []
    assert len(await markers_of(client, name)) == 4
    monkeypatch.setattr("streamkeep.storages.nats._MARKER_SECONDS", -2.0)  # JetStream's time is read in whole seconds
    assert await storage.expired(1.6e9) == []
    await until_markers(client, name, [subject_of(name, 4_000_000_000, "later")])
    assert dict(await storage.expired(4e9)) == {"later": later}


async def test_a_commit_that_came_late_confirms_its_marker(
    storage: Storage, name: str, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process was stopped in between, and somebody may have removed the marker."""
    monkeypatch.setattr("streamkeep.storages.nats._MARKER_SECONDS", -1.0)
    before = await messages_of(client, name)
    assert await storage.commit("s", None, a_head(0))
    assert await messages_of(client, name) - before == 3


async def test_a_commit_that_was_refused_leaves_no_marker(storage: Storage, url: str, name: str, client: Client) -> None:
    head = a_head(0)
    assert await storage.commit("s", None, head)
    async with storage_for(url) as other:
        assert not await other.commit("s", None, replace(head, expires_at=3e9))
        assert not await other.commit("s", 5, replace(head, expires_at=3e9))
    await until_markers(client, name, [subject_of(name, 4_000_000_000, "s")])


async def test_a_damaged_stream_hides_no_other(storage: Storage, name: str, client: Client) -> None:
    heads = {stream: replace(a_head(0), expires_at=1.5e9) for stream in ("a", "b", "c")}
    for stream, head in heads.items():
        assert await storage.commit(stream, None, head)
    await client.request(f"{name}.s.b", b"damaged")
    del heads["b"]
    assert dict(await storage.scan()) == heads
    assert dict(await storage.expired(1.6e9)) == heads
    with pytest.raises(StorageCorruptError):
        await storage.read("b")


@pytest.mark.parametrize("second", [0, 1, 15, 16, 255, 1_764_300_000, 0x6FFFFFFF, 0xFFFFFFFE, 0xFFFFFFFF])
def test_prefixes_say_all_seconds_up_to_one(second: int) -> None:
    pick = random.Random(second)
    prefixes = prefixes_until(second)
    assert len(prefixes) <= 120
    near = [second + difference for difference in range(-300, 300)]
    for other in [*near, *(pick.randrange(16**8) for _ in range(1000))]:
        if 0 <= other < 16**8:
            matching = [prefix for prefix in prefixes if f"{other:08x}".startswith(prefix)]
            assert len(matching) == (other <= second)


@pytest.mark.parametrize(
    ("expires_at", "second"),
    [(0.0, 0), (-5.0, 0), (1.9, 1), (1e300, 0xFFFFFFFF), (float("inf"), 0xFFFFFFFF), (float("nan"), 0), (float("-inf"), 0)],
)
def test_any_expiry_has_a_second(expires_at: float, second: int) -> None:
    assert second_of(expires_at) == second


# -- reading from anywhere


@pytest.mark.parametrize("leader", [False, True], ids=["any replica", "leader"])
@pytest.mark.parametrize("seed", range(3))
async def test_any_page_of_any_stream_is_what_was_written(
    storage: Storage, seed: int, *, leader: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streams of commits of many sizes, mixed with one another; then pages at random, by readers that know places and that do not."""
    if leader:
        monkeypatch.setattr("streamkeep.storages.nats._DIRECT_ATTEMPTS", 0)  # as if no replica but the leader had anything
        monkeypatch.setattr("streamkeep.storages.nats._LEADER_ATTEMPTS", 1)
    pick = random.Random(seed)
    heads: dict[str, Head] = {}
    logs: dict[str, list[bytes]] = {}
    for _ in range(150):
        stream = pick.choice("abc")
        size = pick.choice([0, 0, 1, 1, 1, 2, 40])
        records = [pick.randbytes(pick.choice([0, 5, 300])) for _ in range(size)]
        seen = heads.get(stream)
        head = a_head(size) if seen is None else replace(seen, version=seen.version + 1, tail=seen.tail + size)
        assert await storage.commit(stream, seen.version if seen else None, head, records)
        heads[stream] = head
        logs.setdefault(stream, []).extend(records)
    for _ in range(100):
        stream = pick.choice("abc")
        start, limit = pick.randrange(len(logs[stream]) + 2), pick.choice([1, 3, 50, 1000])
        if pick.random() < 0.5:
            log_of(storage).forget()
        page = await storage.read(stream, start, limit)
        assert page is not None
        assert page.head == heads[stream]
        assert list(page.records) == logs[stream][start : start + limit]


async def test_an_offset_is_found_in_few_requests(storage: Storage) -> None:
    head = a_head(0)
    assert await storage.commit("s", None, head)
    for number in range(2000):
        new = replace(head, version=head.version + 1, tail=head.tail + 1)
        assert await storage.commit("s", head.version, new, [b"%d" % number])
        head = new
        if number % 500 == 0:
            await storage.commit(f"other-{number}", None, a_head(500), [b""] * 500)
    for start in (1, 777, 1500, 1998):
        log_of(storage).forget()
        before = requests_of(storage)
        page = await storage.read("s", start, 1)
        assert page is not None
        assert list(page.records) == [b"%d" % start]
        assert requests_of(storage) - before < 30
    before = requests_of(storage)
    await storage.read("s", 1999, 1)
    assert requests_of(storage) - before == 1, "who reads on where the log ended asks once"


async def test_who_has_read_a_head_replaces_it_in_one_request(storage: Storage, url: str) -> None:
    head = a_head(1)
    assert await storage.commit("s", None, head, [b"x"])
    async with storage_for(url) as other:  # a cancel, from another process
        before = requests_of(other)
        assert await other.read("s") is not None
        assert await other.commit("s", head.version, replace(head, version=head.version + 1, tail=2), [b"y"])
        assert requests_of(other) - before == 2


# -- bells


async def test_a_bell_that_was_lost_is_made_up_for(storage: Storage, url: str, name: str, client: Client) -> None:
    """Nothing is republished for a while, as when a leader dies between the storing and the telling."""
    async with storage_for(url) as writer:
        config = (await api(client, f"STREAM.INFO.{name}"))["config"]
        async with storage.watch("s") as doorbell:
            await api(client, f"STREAM.UPDATE.{name}", {**config, "republish": None})
            assert await writer.commit("s", None, a_head(0))
            with anyio.fail_after(BOUND_SECONDS):
                await doorbell.wait()
            await api(client, f"STREAM.UPDATE.{name}", config)


async def test_a_gap_in_the_bells_rings_everybody(storage: Storage, url: str, name: str, client: Client) -> None:
    async with storage_for(url) as writer:
        config = (await api(client, f"STREAM.INFO.{name}"))["config"]
        async with storage.watch("unheard") as doorbell:
            await api(client, f"STREAM.UPDATE.{name}", {**config, "republish": None})
            assert await writer.commit("unheard", None, a_head(0))
            await api(client, f"STREAM.UPDATE.{name}", config)
            assert await writer.commit("told", None, a_head(0))
            with anyio.fail_after(BOUND_SECONDS):
                await doorbell.wait()


async def test_a_watcher_is_rung_also_by_what_came_while_its_connection_was_lost(storage: Storage, url: str) -> None:
    async with storage_for(url) as writer:
        head = a_head(0)
        assert await writer.commit("s", None, head)
        async with storage.watch("s") as doorbell:
            for _ in range(3):
                connection = connection_of(storage)
                connection.fail()
                new = replace(head, version=head.version + 1)
                assert await writer.commit("s", head.version, new)
                head = new
                with anyio.fail_after(BOUND_SECONDS):
                    while True:
                        await doorbell.wait()
                        page = await storage.read("s")
                        if page is not None and page.head == head:
                            break
            # And by what comes when it is there again.
            assert await writer.commit("s", head.version, replace(head, version=head.version + 1))
            with anyio.fail_after(BOUND_SECONDS):
                await doorbell.wait()


async def test_an_end_that_is_older_than_what_was_heard_of_is_not_believed(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A leader that was deposed while it was stopped may answer for a moment when it goes on."""
    monkeypatch.setattr("streamkeep.storages.nats._CHANGE_SECONDS", 0.1)
    found = storage_for(url)
    assert isinstance(found, RetryingStorage)
    async with found.storage as storage:
        head = a_head(0)
        assert await storage.commit("s", None, head)
        assert isinstance(storage, NATSStorage)
        storage._open._notifications.expect("s", 3)
        with pytest.raises(StorageUnavailableError, match="behind what it has acknowledged"):
            await storage.read("s")
        assert await storage.commit("s", head.version, replace(head, version=head.version + 1))
        assert await storage.read("s") is not None


# -- ids


@pytest.mark.parametrize("stream", ["a", "a.b", "*", ">", "$JS.API", "a b", "\N{GRINNING FACE}" * 255, "%2E", "é", "a~b_c-d"])
async def test_an_id_is_one_token_and_comes_back(storage: Storage, stream: str) -> None:
    token = token_of(stream)
    assert not set(token) & set(".*> \t\r\n")
    assert token.isascii()
    assert stream_of(token) == stream
    assert await storage.commit(stream, None, a_head(1), [b"x"])
    assert [found for found, _ in await storage.scan()] == [stream]


async def test_an_id_that_is_no_text_is_refused(storage: Storage) -> None:
    with pytest.raises(InvalidArgumentError, match="Unicode text"):
        await storage.read("\ud800")


async def test_ten_thousand_ids_and_more_are_scanned(storage: Storage, name: str, client: Client) -> None:
    message = encode(a_head(0), [], 0, 0, 10_000)[0]
    for number in range(12_000):
        await client.publish(f"{name}.s.id-{number:05}", message)
    await client.flush(BOUND_SECONDS)
    await client.request(f"{name}.s.last", message, timeout=BOUND_SECONDS)
    found: list[str] = []
    while page := await storage.scan(found[-1] if found else "", 1000):
        found.extend(stream for stream, _ in page)
    assert found == [*(f"id-{number:05}" for number in range(12_000)), "last"]


# -- the words of the tests


def a_head(tail: int) -> Head:
    return Head(1_700_000_000_000_000, tail, b"state", 4e9)


def log_of(storage: Storage) -> Log:
    assert isinstance(storage, RetryingStorage)
    assert isinstance(storage.storage, NATSStorage)
    return storage.storage._open._log


def requests_of(storage: Storage) -> int:
    """Say how many requests it has made."""
    return connection_of(storage)._count


def connection_of(storage: Storage) -> Connection:
    """Give the connection that it has."""
    assert isinstance(storage, RetryingStorage)
    assert isinstance(storage.storage, NATSStorage)
    connection = storage.storage._open._link._connection
    assert connection is not None
    return connection


@asynccontextmanager
async def connected(port: int, url: str | None = None) -> AsyncGenerator[Client]:
    client = await nats.connect(url or f"nats://127.0.0.1:{port}")
    try:
        yield client
    finally:
        await client.close()


async def a_config(url: str, client: Client, name: str) -> dict[str, Any]:
    """Have the JetStream stream created, and give its configuration."""
    async with storage_for(url):
        pass
    config: dict[str, Any] = (await api(client, f"STREAM.INFO.{name}"))["config"]
    return config


async def api(client: Client, subject: str, body: object = None) -> dict[str, Any]:
    payload = b"" if body is None else json.dumps(body).encode()
    answer: dict[str, Any] = json.loads((await client.request(f"$JS.API.{subject}", payload, timeout=5)).data)
    assert "error" not in answer, answer
    return answer
