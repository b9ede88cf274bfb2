"""Subscriptions: which streams, who may be woken where, and what fences whom."""

import asyncio
import base64
import gc
import ipaddress
import json
import random
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import anyio
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hypothesis import given
from hypothesis import strategies as st
from tests.durable_streams.conftest import Open
from tests.durable_streams.test_processes import webhook

from streamkeep.durable_streams import Access, _paths, _wakes, _webhooks
from streamkeep.durable_streams._wakes import Config, Place, Refusal, Subscription
from streamkeep.errors import StorageError
from streamkeep.storage import Page
from streamkeep.storages.memory import MemoryStorage

BOUND_SECONDS: Final = 10
TEXT: Final = {"content-type": "text/plain"}
JSON: Final = {"content-type": "application/json"}
PULL: Final = {"type": "pull-wake", "pattern": "events/*", "wake_stream": "wake", "lease_ttl_ms": 1_000}


# Patterns


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("events/*", "events/a", True),
        ("events/*", "events/a/b", False),
        ("events/*", "events", False),
        ("events/**", "events", True),
        ("events/**", "events/a/b", True),
        ("**/b", "b", True),
        ("**/b", "a/c/b", True),
        ("a/**/b/**/c", "a/b/b/x/c", True),
        ("a/**/b/**/c", "a/b/x", False),
        ("*", "a", True),
        ("**", "a/b", True),
        ("a.c", "abc", False),
    ],
)
def test_a_star_is_one_segment_and_two_are_any_number(pattern: str, path: str, *, expected: bool) -> None:
    assert _wakes.matches(_wakes.segments_of(pattern), path) is expected


def test_a_pattern_takes_no_longer_than_it_is_long() -> None:
    assert not _wakes.matches(_wakes.segments_of("**/a/" * 30 + "b"), "a/" * 500 + "c")


# Where webhooks may go


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/hook",
        "https://10.0.0.1/",
        "https://172.16.0.1/",
        "https://192.168.1.1/",
        "https://169.254.169.254/latest/meta-data",
        "https://127.0.0.1/",
        "https://[::1]/",
        "https://[fe80::1]/",
        "https://[::ffff:10.0.0.1]/",
        "https://[64:ff9b::a00:1]/",
        "https://[2002:a00:1::]/",
        "https://0.0.0.0/",
        "https://100.64.0.1/",
        "https://224.0.0.1/",
        "https://localhost/",
        "https://a.localhost/",
        "https://metadata.google.internal/",
        "https://user@example.com/",
        "https://example.com/#x",
        "https:///x",
        "https://example.com:99999/",
        "ftp://example.com/",
        "https://exa mple.com/",
        "https://example.com/\r\nX: y",
        "http://localhost/hook",
        "http://127.0.0.1/hook",
        "not a url",
    ],
)
def test_a_webhook_goes_to_https_and_public_hosts_only(url: str) -> None:
    with pytest.raises(_webhooks.WebhookRejectedError):
        _webhooks.check_url(url, allow_local=False)


@pytest.mark.parametrize(
    "url", ["http://10.0.0.1/", "http://127.0.1.1/", "https://[::1]/", "http://0.0.0.0/", "http://localhost.evil.com/"]
)
def test_development_lets_this_machine_be_reached_and_nothing_else(url: str) -> None:
    _webhooks.check_url("http://localhost:8080/hook", allow_local=True)
    _webhooks.check_url("http://127.0.0.1:8080/hook", allow_local=True)
    with pytest.raises(_webhooks.WebhookRejectedError):
        _webhooks.check_url(url, allow_local=True)


async def test_a_name_that_leads_into_this_network_is_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def resolve(*_: object, **__: object) -> list[tuple[Any, ...]]:
        return [(0, 0, 0, "", ("93.184.216.34", 443)), (0, 0, 0, "", ("10.0.0.7", 443))]

    monkeypatch.setattr("anyio.getaddrinfo", resolve)
    with pytest.raises(_webhooks.WebhookRejectedError):
        await _webhooks.post("https://rebound.example.com/", b"{}", {}, within=BOUND_SECONDS, allow_local=True)


@given(st.ip_addresses())
def test_no_address_is_public_that_is_not_global(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    if _webhooks._is_public(address):
        assert address.is_global
        assert not address.is_private


# Webhooks


async def test_a_webhook_is_signed_and_its_worker_may_answer_later(open_client: Open) -> None:
    async with open_client(subscriptions="local") as client, webhook(b"{}") as (url, taken, came):
        config = {"type": "webhook", "pattern": "events/*", "webhook": {"url": url}}
        assert (await client.put("__ds/subscriptions/s", json=config)).status_code == 201
        await client.put("events/a", headers=TEXT, content="1")
        with anyio.fail_after(BOUND_SECONDS):
            await came.wait()
        headers, body = taken[0]
        said, woken = dict(part.split("=", 1) for part in headers["webhook-signature"].split(",")), json.loads(body)
        keys = (await client.get("__ds/jwks.json")).json()["keys"]
        assert keys[0]["kid"] == said["kid"]
        public = Ed25519PublicKey.from_public_bytes(_decoded(keys[0]["x"]))
        public.verify(_decoded(said["ed25519"]), said["t"].encode() + b"." + body)

        ack = {"wake_id": woken["wake_id"], "generation": woken["generation"], "done": True}
        acks = [{"stream": "events/a", "offset": woken["streams"][0]["tail_offset"]}]
        authorized = {"authorization": f"Bearer {woken['callback_token']}"}
        callback = woken["callback_url"]
        for token in ["", "Bearer x.y", f"Bearer {woken['callback_token'][:-2]}AA", f"Basic {woken['callback_token']}"]:
            assert (await client.post(callback, json=ack, headers={"authorization": token})).status_code == 401
        assert (await client.post("__ds/subscriptions/other/callback", json=ack, headers=authorized)).status_code == 401
        assert (await client.post("__ds/subscriptions/s/ack", json=ack, headers=authorized)).status_code == 401
        beyond = [{"stream": "events/a", "offset": "9" * 16 + acks[0]["offset"][16:]}]
        refused = await client.post(callback, json={**ack, "acks": beyond}, headers=authorized)
        assert refused.json()["error"]["code"] == "INVALID_OFFSET"
        done = await client.post(callback, json={**ack, "acks": acks}, headers=authorized)
        assert done.json() == {"ok": True, "next_wake": False}
        assert (await client.post(callback, json={**ack, "acks": acks}, headers=authorized)).json()["error"]["code"] == "FENCED"


def _decoded(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


async def test_what_comes_while_a_wake_is_in_flight_makes_the_next_one(open_client: Open) -> None:
    async with open_client(subscriptions="local") as client, webhook(b'{"done":true}') as (url, taken, _):
        config = {"type": "webhook", "streams": ["a"], "webhook": {"url": url}}
        await client.put("a", headers=TEXT)
        assert (await client.put("__ds/subscriptions/s", json=config)).status_code == 201
        for number in range(20):
            assert (await client.post("a", headers=TEXT, content=str(number))).status_code == 204
        tail = (await client.head("a")).headers["stream-next-offset"]
        with anyio.fail_after(BOUND_SECONDS):
            while (await client.get("__ds/subscriptions/s")).json()["streams"][0]["acked_offset"] != tail:
                pass
    generations = [json.loads(body)["generation"] for _, body in taken]
    assert generations == sorted(set(generations))


async def test_an_append_through_another_server_wakes_as_well(open_client: Open) -> None:
    storage = MemoryStorage()
    async with (
        open_client(storage, subscriptions="local") as one,
        open_client(storage, subscriptions="local") as other,
        webhook(b'{"done":true}') as (url, taken, came),
    ):
        config = {"type": "webhook", "pattern": "**", "webhook": {"url": url}}
        assert (await one.put("__ds/subscriptions/s", json=config)).status_code == 201
        with anyio.fail_after(BOUND_SECONDS):
            number = 0
            while not came.is_set():
                number += 1
                await other.put(f"a{number}", headers=TEXT, content="1")
    assert {stream["path"] for _, body in taken for stream in json.loads(body)["streams"]} >= {"a1"} or taken


async def test_what_was_there_before_the_subscription_wakes_nobody(open_client: Open) -> None:
    async with open_client(subscriptions="local") as client:
        await client.put("events/old", headers=TEXT, content="1")
        await client.put("wake", headers=JSON)
        assert (await client.put("__ds/subscriptions/s", json=PULL)).status_code == 201
        answer = await client.post("__ds/subscriptions/s/claim", json={"worker": "w"})
        assert answer.json()["error"]["code"] == "NO_PENDING_WORK"


# Pull-wake


async def test_a_lease_that_is_over_fences_its_worker_and_wakes_another_one(open_client: Open) -> None:
    async with open_client(subscriptions="local") as client:
        await client.put("wake", headers=JSON)
        assert (await client.put("__ds/subscriptions/s", json=PULL)).status_code == 201
        await client.put("events/a", headers=TEXT, content="1")
        first = (await client.post("__ds/subscriptions/s/claim", json={"worker": "one"})).json()
        with anyio.fail_after(BOUND_SECONDS):
            while (second := await client.post("__ds/subscriptions/s/claim", json={"worker": "two"})).status_code != 200:
                assert second.json()["error"]["current_holder"] == "one"
        assert second.json()["generation"] > first["generation"]
        for what in ["ack", "release"]:
            late = await client.post(
                f"__ds/subscriptions/s/{what}",
                json={"wake_id": first["wake_id"], "generation": first["generation"], "done": True},
                headers={"authorization": f"Bearer {first['token']}"},
            )
            assert (late.status_code, late.json()["error"]["code"]) == (409, "FENCED")
        with anyio.fail_after(BOUND_SECONDS):
            while len((await client.get("wake")).json()) < 1:
                pass


async def test_a_deleted_subscriptions_worker_changes_nothing(open_client: Open) -> None:
    async with open_client(subscriptions="local") as client:
        await client.put("wake", headers=JSON)
        await client.put("__ds/subscriptions/s", json=PULL)
        await client.put("events/a", headers=TEXT, content="1")
        claimed = (await client.post("__ds/subscriptions/s/claim", json={"worker": "one"})).json()
        assert (await client.delete("__ds/subscriptions/s")).status_code == 204
        ack = {"wake_id": claimed["wake_id"], "generation": claimed["generation"], "done": True}
        authorized = {"authorization": f"Bearer {claimed['token']}"}
        assert (await client.post("__ds/subscriptions/s/ack", json=ack, headers=authorized)).status_code == 404
        await client.put("__ds/subscriptions/s", json=PULL)
        again = await client.post("__ds/subscriptions/s/ack", json=ack, headers=authorized)
        assert again.json()["error"]["code"] == "FENCED"


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[]",
        b'{"type":"other","pattern":"a"}',
        b'{"type":"webhook","pattern":"a"}',
        b'{"type":"pull-wake","pattern":"a"}',
        b'{"type":"pull-wake","wake_stream":"w"}',
        b'{"type":"pull-wake","wake_stream":"w","pattern":"a","lease_ttl_ms":999}',
        b'{"type":"pull-wake","wake_stream":"w","pattern":"a","lease_ttl_ms":600001}',
        b'{"type":"pull-wake","wake_stream":"w","pattern":"a","lease_ttl_ms":1000.5}',
        b'{"type":"pull-wake","wake_stream":"../w","pattern":"a"}',
        b'{"type":"pull-wake","wake_stream":"__ds/w","pattern":"a"}',
        b'{"type":"pull-wake","wake_stream":"w","streams":["a//b"]}',
        b'{"type":"pull-wake","wake_stream":"w","pattern":"' + b"a/" * 100 + b'a"}',
    ],
)
async def test_what_can_be_no_subscription_is_refused(open_client: Open, body: bytes) -> None:
    async with open_client(subscriptions="local") as client:
        assert (await client.put("__ds/subscriptions/s", content=body)).status_code == 400
        assert (await client.get("__ds/subscriptions/s")).status_code == 404


async def test_a_subscription_needs_permission_for_each_stream_and_for_its_wake_stream(open_client: Open) -> None:
    asked: list[tuple[str, str]] = []

    def allow(access: Access) -> bool:
        asked.append((access.action, access.path))
        return True

    async with open_client(subscriptions="local", authorize=allow) as client:
        await client.put("__ds/subscriptions/s", json={**PULL, "streams": ["b", "a"]})
        await client.post("__ds/subscriptions/s/claim", json={"worker": "w"})
    assert asked == [
        ("subscribe", "__ds/subscriptions/s"),
        ("subscribe", "events/*"),
        ("subscribe", "a"),
        ("subscribe", "b"),
        ("append", "wake"),
        ("claim", "__ds/subscriptions/s"),
    ]


# The rules


def test_a_lease_that_is_over_is_no_lease_although_nobody_has_another_one() -> None:
    there = Subscription("s", "life", "by", Config("pull-wake", "**", (), "", "wake", 1_000), 0.0, is_backfilled=True)
    there = _wakes.notice(there, {"a": _place(1)}, {}).there
    claimed = _wakes.claim(there, "worker", 10.0, "w")
    assert isinstance(claimed, Subscription)
    assert isinstance(_wakes.ack(claimed, "w", 1, {"a": _offset(1)}, 10.9, done=False), Subscription)
    assert _wakes.ack(claimed, "w", 1, {"a": _offset(1)}, 11.1, done=True) == _wakes.FENCED
    assert _wakes.release(claimed, "w", 1, 11.1) == _wakes.FENCED


@pytest.mark.parametrize("seed", range(20))
def test_generations_only_grow_and_nobody_acks_in_the_place_of_another(seed: int) -> None:
    chance = random.Random(seed)
    there = Subscription("s", "life", "by", Config("pull-wake", "**", (), "", "wake", 1_000), 0.0, is_backfilled=True)
    tails, now, holders = dict[str, int](), 0.0, list[tuple[str, str, int]]()
    for step in range(500):
        before, now = there, now + chance.random() * 0.4
        match chance.randrange(5):
            case 0 | 1:
                path = chance.choice("abc")
                old = tails.get(path, 0)
                tails[path] = old + 1
                there = _wakes.notice(there, {path: _place(old + 1)}, {}).there
            case 2:
                there = _wakes.advance(there, now, f"w{step}")
            case 3:
                claimed = _wakes.claim(there, f"worker{step}", now, f"w{step}")
                if isinstance(claimed, Subscription):
                    assert claimed.wake is not None
                    assert not _wakes.is_leased(there, now)
                    there = claimed
                    holders.append((f"worker{step}", claimed.wake.id, claimed.generation))
            case _ if holders:
                worker, wake_id, generation = chance.choice(holders)
                acks = {path: link.tail for path, link in there.links.items()}
                acked = _wakes.ack(there, wake_id, generation, acks, now, done=chance.random() < 0.5)
                if isinstance(acked, Refusal):
                    assert acked.name == "FENCED"
                else:
                    assert before.wake is not None
                    assert before.wake.holder == worker
                    there = acked
            case _:
                pass
        assert there.generation >= before.generation
        for path, link in before.links.items():
            assert there.links[path].acked >= link.acked
            assert there.links[path].tail == _offset(tails[path])


def _offset(position: int) -> str:
    return f"{position:016d}_{'a' * 16}"


def _place(tail: int, life: str = "life", base: int = 0) -> Place:
    return Place(life, _offset(base), _offset(tail))


# What was found by who wanted it to fail


async def test_a_stream_that_is_added_wakes_although_it_was_written_to_before(open_client: Open) -> None:
    async with open_client(subscriptions="local") as client:
        for path, headers in [("wake", JSON), ("a", TEXT), ("b", TEXT)]:
            await client.put(path, headers=headers)
        subscription = {"type": "pull-wake", "streams": ["a"], "wake_stream": "wake"}
        assert (await client.put("__ds/subscriptions/s", json=subscription)).status_code == 201
        await client.post("b", headers=TEXT, content="1")
        assert (await client.post("__ds/subscriptions/s/streams", json={"streams": ["b"]})).status_code == 204
        await client.post("b", headers=TEXT, content="2")
        with anyio.fail_after(BOUND_SECONDS):
            assert (await client.get("wake?offset=-1&live=long-poll")).json()[0]["stream"] == "b"


class Away(MemoryStorage):
    """Cannot read a stream, once."""

    def __init__(self) -> None:
        super().__init__()
        self.failed = anyio.Event()
        self.failed.set()

    async def read(self, stream: str, start: int = 0, limit: int = 0) -> Page | None:
        if not self.failed.is_set() and stream == _paths.stream_id("a"):
            self.failed.set()
            raise StorageError("the storage is away")
        return await super().read(stream, start, limit)


async def test_a_subscription_goes_on_when_a_storage_was_away_while_its_streams_were_looked_at(open_client: Open) -> None:
    storage = Away()
    async with open_client(storage, subscriptions="local") as client:
        await client.put("wake", headers=JSON)
        await client.put("a", headers=TEXT)
        subscription = {"type": "pull-wake", "streams": ["a"], "wake_stream": "wake"}
        assert (await client.put("__ds/subscriptions/s", json=subscription)).status_code == 201
    storage.failed = anyio.Event()
    async with open_client(storage, subscriptions="local") as client:
        with anyio.fail_after(BOUND_SECONDS):
            await storage.failed.wait()
            await client.post("a", headers=TEXT, content="1")
            assert (await client.get("wake?offset=-1&live=long-poll")).json()[0]["stream"] == "a"
        storage.failed = anyio.Event()
        assert (await client.post("__ds/subscriptions/s/streams", json={"streams": ["a"]})).status_code == 503


async def test_the_streams_of_a_subscription_are_bounded(open_client: Open) -> None:
    async with open_client(subscriptions="local") as client:
        subscription = {"type": "pull-wake", "streams": ["a"], "wake_stream": "wake"}
        assert (await client.put("__ds/subscriptions/s", json=subscription)).status_code == 201
        streams = "__ds/subscriptions/s/streams"
        assert (await client.post(streams, json={"streams": [f"b{number}" for number in range(999)]})).status_code == 204
        assert (await client.post(streams, json={"streams": ["a", "b1"]})).status_code == 204
        assert (await client.post(streams, json={"streams": ["c"]})).status_code == 429


async def test_nothing_is_read_of_who_may_not_subscribe(open_client: Open) -> None:
    async with open_client(subscriptions="local", authorize=lambda _: False) as client:
        assert (await client.put("__ds/subscriptions/s", content=b"x" * (8 << 20))).status_code == 403


@pytest.mark.parametrize("host", ["2130706433", "0x7f000001", "127.1", "0177.0.0.1", "localhost.", "a.local.", "10.0.0.1."])
def test_a_host_of_this_network_is_refused_however_it_is_written(host: str) -> None:
    with pytest.raises(_webhooks.WebhookRejectedError):
        _webhooks.check_url(f"https://{host}/", allow_local=False)


@pytest.fixture
def authority(tmp_path: Path, requires: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> ssl.SSLContext:
    """Give a certificate for localhost, of an authority that is trusted here."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = [requires("openssl"), "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=DNS:localhost"]
    subprocess.run([*command, *names, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context


@pytest.mark.parametrize("is_trusted", [True, False])
async def test_a_webhook_goes_over_tls_to_whom_it_can_trust(
    authority: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch, *, is_trusted: bool
) -> None:
    _webhooks._trusted.cache_clear()  # pyright: ignore[reportPrivateUsage]
    if not is_trusted:
        monkeypatch.delenv("SSL_CERT_FILE")
    ended: list[bytes] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ended.append(await reader.readuntil(b"{}"))
        writer.write(b'HTTP/1.1 200 OK\r\ncontent-length: 13\r\n\r\n{"done":true}')
        await writer.drain()
        writer.close()

    try:
        server = await asyncio.start_server(handle, "127.0.0.1", 0, ssl=authority)
        async with server:
            url = f"https://localhost:{server.sockets[0].getsockname()[1]}/hook"
            if is_trusted:
                assert await _webhooks.post(url, b"{}", {}, within=BOUND_SECONDS, allow_local=True) == b'{"done":true}'
                assert ended[0].startswith(b"POST /hook HTTP/1.1\r\nhost: localhost:")
            else:
                with pytest.raises(_webhooks.WebhookFailedError, match="SSLCertVerificationError"):  # and no socket is left
                    await _webhooks.post(url, b"{}", {}, within=BOUND_SECONDS, allow_local=True)
                gc.collect()
    finally:
        _webhooks._trusted.cache_clear()  # pyright: ignore[reportPrivateUsage]


# Streams that are gone


async def test_a_stream_that_was_deleted_is_no_work(open_client: Open) -> None:
    async with open_client(subscriptions="local") as client:
        await client.put("wake", headers=JSON)
        config = {**PULL, "streams": ["named"]}
        assert (await client.put("__ds/subscriptions/s", json=config)).status_code == 201
        for path in ["events/a", "events/b", "named"]:
            await client.put(path, headers=TEXT, content="1")
        with anyio.fail_after(BOUND_SECONDS):
            while not (await client.get("wake")).json():
                pass
        for path in ["events/a", "named"]:
            await client.delete(path)
        lease = (await client.post("__ds/subscriptions/s/claim", json={"worker": "w"})).json()
        assert {link["path"]: link["has_pending"] for link in lease["streams"]} == {"events/b": True, "named": False}

        authorized = {"authorization": f"Bearer {lease['token']}"}
        body = {"wake_id": lease["wake_id"], "generation": lease["generation"], "done": True}
        assert (await client.post("__ds/subscriptions/s/ack", json=body, headers=authorized)).status_code == 200
        await client.delete("events/b")
        again = await client.post("__ds/subscriptions/s/claim", json={"worker": "w"})
        assert again.json()["error"]["code"] == "NO_PENDING_WORK"
        for path in ["events/a", "named"]:  # later streams are
            await client.put(path, headers=TEXT, content="2")
        lease = (await client.post("__ds/subscriptions/s/claim", json={"worker": "w"})).json()
        assert {link["path"] for link in lease["streams"] if link["has_pending"]} == {"events/a", "named"}


async def test_an_empty_stream_in_place_of_one_that_was_deleted_is_no_work(open_client: Open) -> None:
    async with open_client(subscriptions="local") as client:
        await client.put("wake", headers=JSON)
        assert (await client.put("__ds/subscriptions/s", json=PULL)).status_code == 201
        await client.put("events/a", headers=TEXT, content="1")
        with anyio.fail_after(BOUND_SECONDS):
            while not (await client.get("wake")).json():
                pass
        await client.delete("events/a")
        await client.put("events/a", headers=TEXT)
        claimed = await client.post("__ds/subscriptions/s/claim", json={"worker": "w"})
        assert claimed.json()["error"]["code"] == "NO_PENDING_WORK"


async def test_a_worker_may_say_how_far_it_came_in_a_stream_that_was_deleted_meanwhile(open_client: Open) -> None:
    async with open_client(subscriptions="local") as client:
        await client.put("wake", headers=JSON)
        assert (await client.put("__ds/subscriptions/s", json={**PULL, "lease_ttl_ms": 60_000})).status_code == 201
        for path in ["events/a", "events/b"]:
            await client.put(path, headers=TEXT, content="1")
        lease = (await client.post("__ds/subscriptions/s/claim", json={"worker": "w"})).json()
        await client.delete("events/a")
        other = await client.post("__ds/subscriptions/s/claim", json={"worker": "other"})
        assert other.json()["error"]["code"] == "ALREADY_CLAIMED"
        acks = [{"stream": link["path"], "offset": link["tail_offset"]} for link in lease["streams"]]
        answer = await client.post(
            "__ds/subscriptions/s/ack",
            json={"wake_id": lease["wake_id"], "generation": lease["generation"], "acks": acks, "done": True},
            headers={"authorization": f"Bearer {lease['token']}"},
        )
        assert (answer.status_code, answer.json()) == (200, {"ok": True, "next_wake": False})


async def test_a_webhook_is_not_called_for_ever_for_a_stream_that_was_deleted(open_client: Open) -> None:
    async with open_client(subscriptions="local") as client, webhook(b"{}") as (url, taken, came):
        config = {"type": "webhook", "pattern": "events/*", "webhook": {"url": url}, "lease_ttl_ms": 1_000}
        assert (await client.put("__ds/subscriptions/s", json=config)).status_code == 201
        await client.put("events/a", headers=TEXT, content="1")
        with anyio.fail_after(BOUND_SECONDS):
            await came.wait()
            await client.delete("events/a")
            while (await client.get("__ds/subscriptions/s")).json()["streams"]:  # until the lease is over
                pass
        assert {json.loads(body)["generation"] for _, body in taken} == {1}


async def test_a_webhook_goes_to_another_address_of_its_host_where_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    async def resolve(host: str, port: int, **_: object) -> list[tuple[Any, ...]]:
        return [(0, 0, 0, "", (address, port)) for address in ("::1", "127.0.0.2", "127.0.0.1")]

    async with webhook(b'{"done":true}') as (url, taken, _):
        local = url.replace("127.0.0.1", "localhost")
        monkeypatch.setattr("anyio.getaddrinfo", resolve)
        assert await _webhooks.post(local, b"{}", {}, within=BOUND_SECONDS, allow_local=True) == b'{"done":true}'
    assert len(taken) == 1
