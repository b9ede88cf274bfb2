"""What the protocol's text says, and its suite does not ask."""

import json
import re
from collections import Counter
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from itertools import product
from typing import Any, Final, Literal

import anyio
import httpx
import pytest
from anyio.lowlevel import checkpoint
from tests.counts import calls_of
from tests.durable_streams.conftest import Open, client_of

import streamkeep
from streamkeep import StreamManager
from streamkeep.durable_streams import Access, DurableStreamsLimits, _readers, _rules, bridge, durable_streams
from streamkeep.durable_streams._live import Live
from streamkeep.durable_streams._log import Log
from streamkeep.durable_streams._rules import Append, Config
from streamkeep.errors import InvalidArgumentError, StorageError, StorageFullError
from streamkeep.storage import Head, Page
from streamkeep.storages.memory import MemoryStorage
from streamkeep.testing.faults import FaultyStorage

BOUND_SECONDS: Final = 10
TEXT: Final = {"content-type": "text/plain"}
JSON: Final = {"content-type": "application/json"}


def producer(seq: int, epoch: int = 0, name: str = "p") -> Mapping[str, str]:
    return {"producer-id": name, "producer-epoch": str(epoch), "producer-seq": str(seq)}


async def made(client: httpx.AsyncClient, path: str = "s", headers: Mapping[str, str] = TEXT, body: str = "") -> str:
    answer = await client.put(path, headers=headers, content=body)
    assert answer.status_code == 201, answer.text
    return answer.headers["stream-next-offset"]


# What closes


@pytest.mark.parametrize("value", ["TRUE", "True", "true", "tRuE"])
async def test_stream_closed_is_true_in_any_case(client: httpx.AsyncClient, value: str) -> None:
    await made(client)
    closed = await client.post("s", headers={"stream-closed": value})
    assert (closed.status_code, closed.headers["stream-closed"]) == (204, "true")
    assert (await client.head("s")).headers["stream-closed"] == "true"


@pytest.mark.parametrize("value", ["false", "1", "yes", "", "true, true"])
async def test_any_other_value_of_stream_closed_is_as_none(client: httpx.AsyncClient, value: str) -> None:
    await made(client)
    assert (await client.post("s", headers={**TEXT, "stream-closed": value}, content="x")).status_code == 204
    assert "stream-closed" not in (await client.head("s")).headers
    assert (await client.post("s", headers={"stream-closed": value})).status_code == 400


# Precedence


@pytest.mark.parametrize(
    ("stale", "closed", "other_type", "old_seq"),
    [pytest.param(*case, id=str(case)) for case in product([True, False], repeat=4)],
)
async def test_errors_come_in_the_order_of_the_text(
    client: httpx.AsyncClient, *, stale: bool, closed: bool, other_type: bool, old_seq: bool
) -> None:
    await made(client)
    first = await client.post("s", headers={**TEXT, **producer(0, epoch=3), "stream-seq": "b"}, content="1")
    assert first.status_code == 200
    if closed:
        await client.post("s", headers={"stream-closed": "true"})
    headers = {
        "content-type": "application/x-other" if other_type else "text/plain",
        "stream-seq": "a" if old_seq else "c",
        **(producer(0, epoch=2) if stale else producer(1, epoch=3)),
    }

    answer = await client.post("s", headers=headers, content="2")

    if stale:
        assert (answer.status_code, answer.headers["producer-epoch"]) == (403, "3")
    elif closed:
        assert answer.status_code == 409
        assert answer.headers["stream-closed"] == "true"
        assert answer.headers["stream-next-offset"] == first.headers["stream-next-offset"]
    elif other_type or old_seq:
        assert answer.status_code == 409
        assert "stream-closed" not in answer.headers
    else:
        assert answer.status_code == 200
    assert (await client.get("s")).text == ("12" if answer.status_code == 200 else "1")


async def test_a_producer_that_is_refused_leaves_nothing_behind(client: httpx.AsyncClient) -> None:
    await made(client)
    assert (await client.post("s", headers={**TEXT, **producer(0), "stream-seq": "b"}, content="1")).status_code == 200
    refused = await client.post("s", headers={**TEXT, **producer(1), "stream-seq": "a"}, content="2")
    assert refused.status_code == 409
    again = await client.post("s", headers={**TEXT, **producer(1), "stream-seq": "c"}, content="2")
    assert (again.status_code, again.headers["producer-seq"]) == (200, "1")


async def test_what_is_repeated_is_answered_with_the_highest_number_that_was_accepted(client: httpx.AsyncClient) -> None:
    await made(client)
    for seq in range(5):
        assert (await client.post("s", headers={**TEXT, **producer(seq)}, content=str(seq))).status_code == 200
    again = await client.post("s", headers={**TEXT, **producer(1)}, content="1")
    assert (again.status_code, again.headers["producer-seq"]) == (204, "4")
    gap = await client.post("s", headers={**TEXT, **producer(9)}, content="9")
    assert (gap.status_code, gap.headers["producer-expected-seq"], gap.headers["producer-received-seq"]) == (409, "5", "9")
    assert (await client.get("s")).text == "01234"


# Bytes


@pytest.mark.parametrize(
    "body",
    [
        '{ "a" :\t1.0e2 }',
        '"\\ud83d\\ude00"',
        "[[], [1, 2]]",
        '[{"a":1},{"a":1}]',
        "12345678901234567890123",
        " \n[1]\n ",
        '[" , "]',
    ],
)
async def test_messages_come_back_byte_for_byte(client: httpx.AsyncClient, body: str) -> None:
    await made(client, headers=JSON)
    assert (await client.post("s", headers=JSON, content=body)).status_code == 204
    inner = body.strip()[1:-1] if body.strip().startswith("[") else body
    assert re.sub(r",\s*", ",", (await client.get("s")).text) == re.sub(r",\s*", ",", f"[{inner.strip()}]")


@pytest.mark.parametrize(
    "body", [b"{", b"[1,]", b"[1 2]", b"NaN", b"'a'", b'"\xff"', b"\xef\xbb\xbf1", b"[" * 300 + b"]" * 300, b"1 2"]
)
async def test_what_is_not_json_is_refused_and_leaves_nothing(client: httpx.AsyncClient, body: bytes) -> None:
    await made(client, headers=JSON)
    assert (await client.post("s", headers=JSON, content=body)).status_code == 400
    assert (await client.get("s")).text == "[]"


async def test_an_append_of_several_mebibytes_comes_back_as_it_was(client: httpx.AsyncClient) -> None:
    body = bytes(range(256)) * (3 << 12)
    await made(client, headers={"content-type": "application/x-bytes"})
    assert (await client.post("s", headers={"content-type": "application/x-bytes"}, content=body)).status_code == 204
    got, offset = b"", "-1"
    while True:
        answer = await client.get("s", params={"offset": offset})
        got, offset = got + answer.content, answer.headers["stream-next-offset"]
        if "stream-up-to-date" in answer.headers:
            break
    assert got == body


async def test_a_fork_may_begin_anywhere_in_an_append_however_it_is_kept(client: httpx.AsyncClient) -> None:
    body, kind = bytes(range(256)) * (3 << 12), {"content-type": "application/x-bytes"}
    start = await made(client, headers=kind)
    await client.post("s", headers=kind, content=body)
    await client.post("s", headers=kind, content=b"more")
    at = len(body) - 5
    forked = {"stream-forked-from": "s", "stream-fork-offset": start, "stream-fork-sub-offset": str(at)}
    assert (await client.put("f", headers=forked, content=b"!")).status_code == 201
    got, offset = b"", "-1"
    for _ in range(5):
        answer = await client.get("f", params={"offset": offset})
        got, offset = got + answer.content, answer.headers["stream-next-offset"]
    assert got == body[:at] + b"!"
    too_far = {**forked, "stream-fork-sub-offset": str(len(body) + 1)}
    assert (await client.put("g", headers=too_far)).status_code == 400


async def test_text_that_is_appended_in_the_middle_of_a_character_is_read_whole(client: httpx.AsyncClient) -> None:
    text = "a😀b€".encode()
    await made(client)
    events: list[str] = []
    async with client.stream("GET", "s", params={"offset": "-1", "live": "sse"}) as response:
        lines = response.aiter_lines()
        with anyio.fail_after(BOUND_SECONDS):
            for byte in text:
                await client.post("s", headers=TEXT, content=bytes([byte]))
            async for line in lines:
                events += [line.removeprefix("data:")] if line.startswith("data:") and "streamNextOffset" not in line else []
                if "".join(events) == text.decode():
                    break
    assert "\ufffd" not in "".join(events)


# Lives, and other streams of the storage


async def test_an_offset_of_an_earlier_stream_is_not_one_of_this(client: httpx.AsyncClient) -> None:
    await made(client, body="1")
    await client.post("s", headers=TEXT, content="2")
    old = (await client.get("s")).headers["stream-next-offset"]
    assert (await client.delete("s")).status_code == 204
    await made(client, body="123")
    assert (await client.get("s", params={"offset": old})).status_code == 410
    assert (await client.get("s", params={"offset": "9" * 16 + old[16:]})).status_code in {400, 410}


@pytest.mark.promise("P27")
async def test_managers_of_the_same_storage_neither_see_nor_touch_these_streams(
    open_client: Open, caplog: pytest.LogCaptureFixture
) -> None:
    storage = FaultyStorage(MemoryStorage())
    async with open_client(storage) as client, StreamManager(storage) as streams:
        await made(client, headers={**TEXT, "stream-ttl": "100"}, body="x")
        async with streams.open("s") as stream:
            await stream.done("ours")
        assert [info.id for info in await streams.list()] == ["s"]
        storage.ahead_seconds = 1_000.0
        await streams.sweep()
        assert [id for id, _ in await storage.scan() if id.startswith(".ds.s")] == [".ds.s.s"]
        assert (await client.get("s")).status_code == 404
    assert caplog.records == []


async def test_a_stream_that_has_expired_is_removed_and_its_path_is_free(open_client: Open) -> None:
    storage = FaultyStorage(MemoryStorage())
    async with StreamManager(storage) as streams, durable_streams(streams) as app:
        there = app._there
        assert there is not None
        async with client_of(app) as client:
            await made(client, headers={**TEXT, "stream-ttl": "10"})
            await made(client, "kept", headers={**TEXT, "stream-ttl": "10000"})
            storage.ahead_seconds = 100.0
            await there.sweep()
            assert [id for id, _ in await storage.scan() if id.startswith(".ds.s")] == [".ds.s.kept"]
            await made(client)


async def test_what_is_kept_for_forks_goes_when_the_last_of_them_expires(open_client: Open) -> None:
    storage = FaultyStorage(MemoryStorage())
    async with StreamManager(storage) as streams, durable_streams(streams) as app:
        there = app._there
        assert there is not None
        async with client_of(app) as client:
            await made(client, body="source")
            forked = {"stream-forked-from": "s", "stream-ttl": "10"}
            assert (await client.put("f", headers=forked, content="+")).status_code == 201
            assert (await client.delete("s")).status_code == 204
            assert (await client.get("s")).status_code == 410
            assert (await client.get("f")).text == "source+"
            storage.ahead_seconds = 1_000.0
            await there.sweep()
            assert [id for id, _ in await storage.scan() if id.startswith(".ds.")] == []


@pytest.mark.parametrize("failing", range(3))
async def test_a_fork_that_could_not_be_made_keeps_nothing_of_its_source(open_client: Open, failing: int) -> None:
    storage = FaultyStorage(MemoryStorage())
    async with open_client(storage) as client:
        await made(client, body="source")
        storage.skip("commit", times=failing)
        storage.refuse("commit")
        assert (await client.put("f", headers={"stream-forked-from": "s"})).status_code == 503
        assert (await client.get("f")).status_code == 404
        assert (await client.delete("s")).status_code == 204
        assert [id for id, _ in await storage.scan() if id.startswith(".ds.")] == []


@pytest.mark.promise("P27")
async def test_a_fork_that_was_made_has_all_of_its_source_whoever_deletes_that_meanwhile(open_client: Open) -> None:
    storage = MemoryStorage()
    outcomes = set[tuple[int, int]]()
    async with open_client(storage) as one, open_client(storage) as other:
        for number in range(60):
            source, fork, answers = f"s{number}", f"f{number}", dict[str, int]()
            await made(one, source, body="source")

            async def make(source: str = source, fork: str = fork, answers: dict[str, int] = answers) -> None:
                answers["fork"] = (await one.put(fork, headers={"stream-forked-from": source}, content="+")).status_code

            async def delete(source: str = source, answers: dict[str, int] = answers) -> None:
                answers["delete"] = (await other.delete(source)).status_code

            async with anyio.create_task_group() as tasks:
                if number % 2:
                    tasks.start_soon(make)
                tasks.start_soon(delete)
                if not number % 2:
                    tasks.start_soon(make)
            outcomes.add((answers["fork"], answers["delete"]))
            if answers["fork"] == 201:
                assert (await other.get(fork)).text == "source+"
                assert (await one.get(source)).status_code == 410
                assert (await other.delete(fork)).status_code == 204
            else:
                assert answers["fork"] in {404, 409}
            assert [id for id, _ in await storage.scan() if id.startswith(".ds.")] == []
    assert {delete for _, delete in outcomes} == {204}


# Answers that were lost


@pytest.mark.promise("P27")
async def test_an_append_whose_answer_was_lost_is_stored_once_and_says_so(open_client: Open) -> None:
    storage = FaultyStorage(MemoryStorage())
    async with open_client(storage) as client:
        await made(client)
        storage.lose_answer("commit")
        assert (await client.post("s", headers=TEXT, content="1")).status_code == 204
        assert (await client.post("s", headers=TEXT, content="2")).status_code == 204
        assert (await client.get("s")).text == "12"


async def test_a_create_and_a_close_whose_answers_were_lost_have_happened_once(open_client: Open) -> None:
    storage = FaultyStorage(MemoryStorage())
    async with open_client(storage) as client:
        storage.lose_answer("commit")
        assert (await client.put("s", headers=TEXT, content="1")).status_code == 201
        storage.lose_answer("commit")
        assert (await client.post("s", headers={**TEXT, "stream-closed": "true"}, content="2")).status_code == 204
        answer = await client.get("s")
        assert (answer.text, answer.headers["stream-closed"]) == ("12", "true")


async def test_what_nobody_knows_is_answered_503_and_a_producer_may_ask_again(open_client: Open) -> None:
    storage = FaultyStorage(MemoryStorage())
    async with open_client(storage) as client:
        await made(client)
        storage.lose_answer("commit")
        storage.skip("read")
        storage.refuse("read", error=StorageError("down"))
        assert (await client.post("s", headers={**TEXT, **producer(0)}, content="1")).status_code == 503
        again = await client.post("s", headers={**TEXT, **producer(0)}, content="1")
        assert (again.status_code, again.headers["producer-seq"]) == (204, "0")
        assert (await client.get("s")).text == "1"


async def test_what_the_storage_says_when_it_fails_is_not_shown(open_client: Open) -> None:
    storage = FaultyStorage(MemoryStorage())
    async with open_client(storage) as client:
        await made(client)
        storage.refuse("read", times=2, error=StorageError("password=hunter2"))
        answer = await client.get("s")
        assert answer.status_code == 503
        assert "hunter2" not in answer.text


@pytest.mark.promise("P27")
async def test_two_servers_of_one_storage_store_each_append_once_and_in_the_order_of_its_producer(open_client: Open) -> None:
    storage = MemoryStorage()
    async with open_client(storage) as one, open_client(storage) as other:
        await made(one, headers=JSON)

        async def produce(client: httpx.AsyncClient, name: str) -> None:
            for seq in range(30):
                answer = await client.post("s", headers={**JSON, **producer(seq, name=name)}, content=f'["{name}{seq}"]')
                assert answer.status_code == 200

        async def append(client: httpx.AsyncClient, name: str) -> None:
            for seq in range(30):
                assert (await client.post("s", headers=JSON, content=f'["{name}{seq}"]')).status_code == 204

        async with anyio.create_task_group() as tasks:
            for number, client in enumerate([one, other] * 3):
                tasks.start_soon(produce if number < 4 else append, client, f"{'abcdef'[number]}")
        got = (await other.get("s")).json()
    assert [[text for text in got if text[0] == name] for name in "abcdef"] == [
        [f"{name}{seq}" for seq in range(30)] for name in "abcdef"
    ]


# Who waits


@pytest.mark.parametrize("live", ["long-poll", "sse"])
async def test_what_another_server_appends_is_read_live(open_client: Open, live: str) -> None:
    storage = MemoryStorage()
    async with open_client(storage) as one, open_client(storage) as other:
        offset = await made(one, body="1")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: other.post("s", headers=TEXT, content="news"))
            with anyio.fail_after(BOUND_SECONDS):
                async with one.stream("GET", "s", params={"offset": offset, "live": live}) as response:
                    async for line in response.aiter_lines():
                        if line in {"news", "data:news"}:
                            break


async def test_what_comes_from_elsewhere_while_something_is_appended_here_is_read_once(open_client: Open) -> None:
    storage = FaultyStorage(MemoryStorage())
    async with open_client(storage) as here, open_client(storage._storage) as there:
        await made(here, headers=JSON)
        await here.post("s", headers=JSON, content='["zero"]')
        got: list[str] = []

        async def read(began: anyio.Event) -> None:
            async with here.stream("GET", "s", params={"offset": "-1", "live": "sse"}) as response:
                async for line in response.aiter_lines():
                    began.set()
                    if line.startswith("data:["):
                        got.extend(json.loads(line.removeprefix("data:")))
                    if got[-1:] == ["end"]:
                        return

        with anyio.fail_after(BOUND_SECONDS):
            async with anyio.create_task_group() as tasks:
                began = anyio.Event()
                tasks.start_soon(read, began)
                await began.wait()
                held = storage.hold("read")  # the readers', when the first append has rung
                await here.post("s", headers=JSON, content='["first"]')
                await held.reached.wait()
                await here.post("s", headers=JSON, content='["here"]')
                await there.post("s", headers=JSON, content='["elsewhere"]')
                held.release()
                await here.post("s", headers=JSON, content='["end"]')
    assert got == ["zero", "first", "here", "elsewhere", "end"]


async def test_what_is_appended_is_read_and_framed_once_for_all_live_readers(open_client: Open) -> None:
    storage, readers, appends = FaultyStorage(MemoryStorage()), 5, 10
    async with open_client(storage) as client:
        await made(client, headers=JSON)
        got: Counter[int] = Counter()

        async def read(number: int, began: anyio.Event) -> None:
            async with client.stream("GET", "s", params={"offset": "-1", "live": "sse"}) as response:
                async for line in response.aiter_lines():
                    began.set()
                    got[number] += line.startswith("data:[")

        with anyio.fail_after(BOUND_SECONDS):
            async with anyio.create_task_group() as tasks:
                for number in range(readers):
                    tasks.start_soon(read, number, began := anyio.Event())
                    await began.wait()
                storage.calls.clear()
                with calls_of(streamkeep) as calls:
                    for number in range(appends):
                        await client.post("s", headers=JSON, content=f"[{number}]")
                        while got.total() < readers * (number + 1):
                            await checkpoint()
                assert got == dict.fromkeys(range(readers), appends)
                assert calls["data_event"] == appends
                assert storage.calls["commit"] == appends
                assert storage.calls["read"] <= appends + 1  # the first of them looks what there is
                await client.post("s", headers={"stream-closed": "true"})


async def test_a_reader_that_goes_is_noticed_at_once(open_client: Open) -> None:
    async with open_client(limits=DurableStreamsLimits(max_readers=1)) as client:
        await made(client)
        for live in ["sse", "long-poll"] * 3:
            with anyio.fail_after(BOUND_SECONDS):
                while True:  # until the server has seen that the one before has gone
                    async with client.stream("GET", "s", params={"offset": "now", "live": "sse"}) as response:
                        if response.status_code == 200:
                            second = await client.get("s", params={"offset": "now", "live": live})
                            assert (second.status_code, second.headers["retry-after"]) == (429, "1")
                            break
                    await anyio.lowlevel.checkpoint()


async def test_a_stream_with_a_live_reader_does_not_expire(open_client: Open) -> None:
    async with open_client() as client:
        await made(client, headers={**TEXT, "stream-ttl": "1"})
        beats = 0
        async with client.stream("GET", "s", params={"offset": "-1", "live": "sse"}) as response:
            with anyio.fail_after(BOUND_SECONDS):
                async for line in response.aiter_lines():
                    beats += line == ":"
                    if beats == 4:  # twice the TTL
                        break
        assert (await client.head("s")).status_code == 200


async def test_a_response_of_events_ends_after_its_time_and_its_reader_comes_back(open_client: Open) -> None:
    async with open_client(limits=DurableStreamsLimits(sse=timedelta(milliseconds=50))) as client:
        await made(client)
        with anyio.fail_after(BOUND_SECONDS):
            answer = await client.get("s", params={"offset": "-1", "live": "sse"})
    assert "upToDate" in answer.text
    assert "streamClosed" not in answer.text


async def test_live_readers_end_when_the_server_is_drained(open_client: Open) -> None:
    async with StreamManager(MemoryStorage()) as streams, durable_streams(streams) as app, client_of(app) as client:
        offset = await made(client)
        answers: list[httpx.Response] = []

        async def read(live: str) -> None:
            answers.append(await client.get("s", params={"offset": offset, "live": live}))

        with anyio.fail_after(BOUND_SECONDS):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(read, "long-poll")
                async with client.stream("GET", "s", params={"offset": offset, "live": "sse"}) as response:
                    lines = response.aiter_lines()
                    assert await anext(lines) == "event: control"
                    await app.drain()
                    assert not [line async for line in lines if "streamClosed" in line]
        assert [answer.status_code for answer in answers] == [204]
        assert "stream-closed" not in answers[0].headers


# Limits and paths


async def test_what_is_too_much_is_refused_and_leaves_nothing(open_client: Open) -> None:
    limits = DurableStreamsLimits(max_append_bytes=100, max_stream_bytes=150, max_stream_records=5, max_producers=2)
    async with open_client(limits=limits) as client:
        await made(client)
        assert (await client.post("s", headers=TEXT, content="x" * 101)).status_code == 413
        assert (await client.put("t", headers=TEXT, content="x" * 101)).status_code == 413
        assert (await client.post("s", headers=TEXT, content="x" * 100)).status_code == 204
        assert (await client.post("s", headers=TEXT, content="x" * 51)).status_code == 413
        for name in "ab":
            assert (await client.post("s", headers={**TEXT, **producer(0, name=name)}, content="x")).status_code == 200
        assert (await client.post("s", headers={**TEXT, **producer(0, name="c")}, content="x")).status_code == 429
        assert (await client.post("s", headers={**TEXT, **producer(1, name="a")}, content="x")).status_code == 200
        assert (await client.post("s", headers=TEXT, content="x")).status_code == 204
        assert (await client.post("s", headers=TEXT, content="x")).status_code == 413
        assert (await client.post("s", headers={"stream-closed": "true"})).status_code == 204
        assert (await client.get("s")).text == "x" * 104


@pytest.mark.parametrize(
    "path", ["a/%2e%2e/b", "a//b", "a/", "a%2Fb", "a%00b", "a%0ab", "a%5cb", "%ff", "x" * 1_025, "a/%2e", "%2e%2e"]
)
async def test_a_path_that_two_may_take_for_different_streams_names_none(client: httpx.AsyncClient, path: str) -> None:
    for method in ["PUT", "GET", "POST", "HEAD", "DELETE"]:
        request = client.build_request(method, str(client.base_url) + "/", headers=TEXT)
        request.url = request.url.copy_with(raw_path=b"/" + path.encode())
        assert (await client.send(request)).status_code == 400


@pytest.mark.parametrize(
    "path", ["a/b/c", "über/straße", "a b", "a~~b", "x" * 400, "x" * 400 + "y", "a%2525b", "..a", ".ds.s.a"]
)
async def test_each_path_is_a_stream_of_its_own(client: httpx.AsyncClient, path: str) -> None:
    await made(client, "x" * 300)
    answer = await client.put(path, headers=TEXT, content=path.encode())
    assert answer.status_code == 201
    assert (await client.get(answer.headers["location"])).content == path.encode()


# Who may


async def test_nothing_is_done_that_is_not_allowed(open_client: Open) -> None:
    asked: list[tuple[str, str]] = []

    def authorize(access: Access) -> bool:
        asked.append((access.action, access.path))
        return False

    async with open_client(authorize=authorize) as client:
        for method in ["PUT", "GET", "HEAD", "POST", "DELETE"]:
            answer = await client.request(method, "s", headers={**TEXT, "stream-closed": "true"})
            assert answer.status_code == 403
            assert answer.headers["x-content-type-options"] == "nosniff"
        assert (await client.put("f", headers={"stream-forked-from": "s"})).status_code == 403
    assert asked == [(action, "s") for action in ["create", "read", "head", "append", "delete", "fork"]]


@pytest.mark.parametrize("said", ["ann", 1, None, object()])
@pytest.mark.parametrize("awaits", [False, True])
async def test_what_is_neither_true_nor_false_lets_nobody_in(open_client: Open, said: object, *, awaits: bool) -> None:
    async def later(_: object) -> object:
        return said

    async with open_client(authorize=later if awaits else lambda _: said) as client:
        answers = [await client.request(method, "a", headers=TEXT) for method in ("PUT", "POST", "GET", "DELETE")]
    assert [answer.status_code for answer in answers] == [500] * 4
    assert "ann" not in "".join(answer.text for answer in answers)


async def test_a_fork_needs_permission_for_its_source(open_client: Open) -> None:
    async with open_client(authorize=lambda access: access.path.startswith("mine/") or access.action == "create") as client:
        await made(client, "yours/s", body="secret")
        await made(client, "mine/s")
        assert (await client.put("mine/f", headers={"stream-forked-from": "yours/s"})).status_code == 403
        assert (await client.put("mine/f", headers={"stream-forked-from": "mine/s"})).status_code == 201


async def test_a_page_of_a_stream_is_no_page_of_the_apps(client: httpx.AsyncClient) -> None:
    await made(client, headers={"content-type": "text/html"}, body="<script>alert(1)</script>")
    answer = await client.get("s")
    assert answer.headers["content-security-policy"] == "sandbox; default-src 'none'"
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("subscriptions", value) for value in (False, None, "", "Public", True)),  # on, they would send requests
        *(("cache", value) for value in ("Public", None, True)),
        *(
            ("cors", value)
            for value in ("https://app.example/", "https://App.example", "app.example", "", True, ["https://app.example"])
        ),
        *(("cors", value) for value in ("https://a.example, https://b.example", "https://app.example\r\nx: y")),
        *(("public_url", value) for value in ("api.example/v1", "", "https://api.example/v1?a=b", 1)),
    ],
)
def test_a_setting_that_can_mean_nothing_is_refused_by_name(name: str, value: Any) -> None:
    setting: Any = {name: value}
    with pytest.raises(InvalidArgumentError, match=f"`{name}`"):
        durable_streams("memory://", **setting)
    if name == "cors":
        with pytest.raises(InvalidArgumentError, match=f"`{name}`"):
            bridge(StreamManager.connect("memory://"), **setting)


@pytest.mark.parametrize(
    "cors", [None, "*", "null", "https://app.example", "http://localhost:5173", "http://[::1]:80", "tauri://localhost"]
)
def test_an_origin_is_one_as_browsers_send_it(cors: str | None) -> None:
    durable_streams("memory://", cors=cors, public_url="https://api.example/v1/stream/", cache="public", subscriptions="local")


async def test_what_is_not_of_the_protocol_is_refused(client: httpx.AsyncClient) -> None:
    await made(client)
    assert (await client.request("PATCH", "s")).status_code == 405
    for path in ["__ds/subscriptions/x", "__ds/jwks.json", "__ds", "__ds/anything"]:
        assert (await client.get(path)).status_code == 404
    for query in ["offset=", "offset=-1&offset=-1", "live=sse", "live=other&offset=-1", "offset=%00", "offset=1,2", "live="]:
        assert (await client.get(f"s?{query}")).status_code == 400, query
    for headers in [
        {"stream-ttl": "01"},
        {"stream-ttl": "+1"},
        {"stream-ttl": "1e3"},
        {"stream-ttl": "1", "stream-expires-at": "2030-01-01T00:00:00Z"},
        {"stream-expires-at": "tomorrow"},
        {"stream-expires-at": "2030-13-01T00:00:00Z"},
        {"stream-fork-offset": "-1"},
        {"content-type": "text"},
    ]:
        assert (await client.put("t", headers=headers)).status_code == 400, headers


# What was found by who wanted it to fail


@pytest.mark.parametrize("offset", [None, "tail"])
async def test_a_fork_that_is_there_is_found_again_although_its_source_was_deleted(
    client: httpx.AsyncClient, offset: str | None
) -> None:
    tail = await made(client, body="abc")
    asked = {"stream-forked-from": "/s", **({} if offset is None else {"stream-fork-offset": tail})}
    assert (await client.put("f", headers=asked)).status_code == 201
    assert (await client.delete("s")).status_code == 204
    assert (await client.put("f", headers=asked)).status_code == 200
    assert (await client.put("f", headers={**asked, "stream-ttl": "60"})).status_code == 409
    assert (await client.put("f", headers={**asked, "stream-forked-from": "/other"})).status_code == 409
    assert (await client.put("f", headers={**asked, "stream-fork-offset": "-1"})).status_code == 409
    assert (await client.put("g", headers=asked)).status_code == 409


async def test_a_fork_is_made_from_the_path_that_clients_see_behind_a_proxy(open_client: Open) -> None:
    async with open_client(public_url="https://example.com/api/my%20streams/") as client:
        await made(client, body="1")
        for number, source in enumerate(["/api/my%20streams/s", "https://example.com/api/my%20streams/s", "/s", "s"]):
            assert (await client.put(f"f{number}", headers={"stream-forked-from": source})).status_code == 201


class SlowReads(MemoryStorage):
    """Takes long for a read of records, when it is told to."""

    is_slow = False

    async def read(self, stream: str, start: int = 0, limit: int = 0) -> Page | None:
        if self.is_slow and limit:
            await anyio.sleep(1)
        return await super().read(stream, start, limit)


async def test_a_long_poll_whose_time_is_over_while_it_reads_skips_nothing(
    open_client: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, following = SlowReads(), Log.following
    async with open_client(storage, limits=DurableStreamsLimits(long_poll=timedelta(seconds=0.2))) as client:
        offset = await made(client, body="1")

        @asynccontextmanager
        async def late(log: Log) -> AsyncGenerator[Live]:
            await client.post("s", headers=TEXT, content="2")  # since the head was read
            storage.is_slow = True
            async with following(log) as live:
                yield live

        monkeypatch.setattr(Log, "following", late)
        answer = await client.get("s", params={"offset": offset, "live": "long-poll"})
        assert (answer.status_code, answer.headers["stream-next-offset"]) == (204, offset)
        storage.is_slow = False
        assert (await client.get("s", params={"offset": offset})).text == "2"


@pytest.mark.parametrize("body", ["", "1"])
async def test_nothing_follows_the_event_that_says_that_a_stream_is_closed(client: httpx.AsyncClient, body: str) -> None:
    await made(client, headers={**TEXT, "stream-closed": "true"}, body=body)
    events = (await client.get("s", params={"offset": "-1", "live": "sse"})).text
    assert events.count("event: control") == events.count("streamClosed") == 1


@pytest.mark.parametrize("text", ['"\\ud83d"', '{"\\uDC00": "\\\\ud800 \\ud83d\\ude00"}', '"\\\\\\ud800"'])
async def test_half_a_character_is_json_as_javascript_writes_it(client: httpx.AsyncClient, text: str) -> None:
    await made(client, headers=JSON, body=f"[ {text} , 1,{text}]")
    await client.post("s", headers=JSON, content=text)
    assert (await client.get("s")).text == f"[{text},1,{text},{text}]"
    fork = {"stream-forked-from": "s", "stream-fork-offset": "-1", "stream-fork-sub-offset": "1"}
    assert (await client.put("f", headers=fork)).status_code == 201
    assert (await client.get("f")).text == f"[{text}]"
    assert (await client.post("s", headers=JSON, content='"\\ud83d\\q"')).status_code == 400


@pytest.mark.parametrize("cursor", ["9" * 16, "9" * 255])
async def test_no_cursor_is_answered_with_an_older_one(client: httpx.AsyncClient, cursor: str) -> None:
    await made(client, body="1")
    answer = await client.get("s", params={"offset": "-1", "live": "long-poll", "cursor": cursor})
    assert int(answer.headers["stream-cursor"]) > int(cursor)


class StuckCommits(MemoryStorage):
    """Stores nothing until it may."""

    may = anyio.Event()

    async def commit(self, stream: str, seen: int | None, head: Head, records: Sequence[bytes] = ()) -> bool:
        await self.may.wait()
        return await super().commit(stream, seen, head, records)


async def test_bodies_that_wait_are_bounded_all_streams_together(open_client: Open) -> None:
    storage, codes = StuckCommits(), Counter[int]()
    storage.may = anyio.Event()
    storage.may.set()
    async with open_client(storage, limits=DurableStreamsLimits(max_waiting_bytes=250_000)) as client:
        for number in range(6):
            await made(client, f"s{number}")
        storage.may = anyio.Event()

        async def append(number: int) -> None:
            codes[(await client.post(f"s{number}", headers=TEXT, content="x" * 100_000)).status_code] += 1
            if codes[429] == 4:
                storage.may.set()

        with anyio.fail_after(BOUND_SECONDS):
            async with anyio.create_task_group() as tasks:
                for number in range(6):
                    tasks.start_soon(append, number)
        assert codes == {204: 2, 429: 4}
        assert (await client.post("s0", headers=TEXT, content="x" * 300_000)).status_code == 204  # alone


async def test_who_does_not_read_is_no_reader_for_longer_than_others(
    open_client: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_readers, "STALLED_SECONDS", 0.1)
    async with open_client(limits=DurableStreamsLimits(max_readers=1, sse=timedelta(seconds=0.1))) as client:
        await made(client, body="x" * (4 << 20))
        await client.post("s", headers=TEXT, content="x" * (4 << 20))
        live = "s?offset=-1&live=sse"
        url = client.base_url.join(live)
        with anyio.fail_after(BOUND_SECONDS):
            async with await anyio.connect_tcp(url.host, url.port or 80) as stream:
                await stream.send(b"GET " + url.raw_path + b" HTTP/1.1\r\nhost: x\r\n\r\n")
                await stream.receive(1)
                while True:
                    async with client.stream("GET", live) as response:
                        if response.status_code == 200:
                            break


async def test_a_stream_does_not_expire_while_a_long_poll_waits_for_it(open_client: Open) -> None:
    async with open_client(limits=DurableStreamsLimits(long_poll=timedelta(seconds=2))) as client:
        offset = await made(client, headers={**TEXT, "stream-ttl": "1"})
        assert (await client.get("s", params={"offset": offset, "live": "long-poll"})).status_code == 204
        assert (await client.head("s")).status_code == 200


class Late(MemoryStorage):
    """Its clock stands still, and one of its commits, that has failed, happens when the next one comes."""

    def __init__(self) -> None:
        super().__init__()
        self.is_next_late = False
        self._late: tuple[str, int | None, Head, Sequence[bytes]] | None = None

    def time(self) -> float:
        return 1_000_000.0

    async def commit(self, stream: str, seen: int | None, head: Head, records: Sequence[bytes] = ()) -> bool:
        if self.is_next_late:
            self.is_next_late, self._late = False, (stream, seen, head, records)
            raise StorageError("the storage is away")
        if self._late is not None:
            late, self._late = self._late, None
            await super().commit(*late)
        return await super().commit(stream, seen, head, records)


@pytest.mark.promise("P27")
async def test_an_append_that_happens_late_is_not_taken_for_the_one_that_follows(open_client: Open) -> None:
    storage = Late()
    async with open_client(storage) as client:
        await made(client)
        storage.is_next_late = True
        assert (await client.post("s", headers=TEXT, content="1")).status_code == 503
        assert (await client.post("s", headers=TEXT, content="2")).status_code == 204
        assert (await client.get("s")).text == "12"


@pytest.mark.promise("P27")
async def test_a_deletion_that_has_failed_is_not_taken_for_one_of_another_stream(open_client: Open) -> None:
    storage = FaultyStorage(MemoryStorage())
    async with open_client(storage) as one, open_client(storage) as other:
        await made(one, body="1")
        assert (await one.post("s", headers=TEXT, content="2")).status_code == 204  # so that it is known there
        assert (await other.delete("s")).status_code == 204
        await made(other, body="3")
        storage.refuse("delete")
        assert (await one.delete("s")).status_code == 503
        assert (await other.get("s")).text == "3"
        assert (await one.delete("s")).status_code == 204
        assert (await other.get("s")).status_code == 404


@pytest.mark.parametrize(
    ("operation", "done"), [("delete", 1), ("delete", 2), ("delete", 3), ("delete", 4), ("scan", 0), ("scan", 1)]
)
async def test_nothing_is_kept_for_a_fork_whose_server_died_while_it_removed_it(
    operation: Literal["delete", "scan"], done: int
) -> None:
    storage = FaultyStorage(MemoryStorage())
    async with StreamManager(storage) as streams, durable_streams(streams) as app, client_of(app) as client:
        there = app._there
        assert there is not None
        await made(client, body="source")
        for path, source in [("f", "s"), ("g", "f")]:
            assert (await client.put(path, headers={"stream-forked-from": source}, content="+")).status_code == 201
        for path in "sf":
            assert (await client.delete(path)).status_code == 204
        storage.skip(operation, times=done)
        storage.refuse(operation)
        assert (await client.delete("g")).status_code == 503
        assert [id for id, _ in await storage.scan() if id.startswith(".ds.")] != []
        storage.ahead_seconds = 100.0
        await there.follow_links()
        assert [id for id, _ in await storage.scan() if id.startswith(".ds.")] == []


async def test_a_fork_that_took_very_long_to_be_made_has_its_source_or_is_not_there(open_client: Open) -> None:
    storage = FaultyStorage(MemoryStorage())
    async with open_client(storage) as one, open_client(storage) as other:
        await made(one, body="source")
        storage.skip("commit", times=2)
        hold = storage.hold("commit")
        codes: list[int] = []

        async def fork() -> None:
            codes.append((await one.put("f", headers={"stream-forked-from": "s"}, content="+")).status_code)

        with anyio.fail_after(BOUND_SECONDS):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(fork)
                await hold.reached.wait()
                storage.ahead_seconds = 100.0
                assert (await other.delete("s")).status_code == 204
                assert (await other.head("s")).status_code == 404  # it has no fork that anybody knows of
                hold.release()
        assert codes == [404]
        assert (await other.get("f")).status_code == 404
        assert [id for id, _ in await storage.scan() if id.startswith(".ds.")] == []


@pytest.mark.parametrize("live", ["", "long-poll", "sse"])
async def test_what_is_in_a_full_storage_can_be_read(open_client: Open, live: str) -> None:
    storage = FaultyStorage(MemoryStorage())
    async with open_client(storage) as client:
        await made(client, headers={**TEXT, "stream-ttl": "100", "stream-closed": "true"}, body="1")
        storage.ahead_seconds = 50.0
        storage.refuse("commit", times=3, error=StorageFullError("the disk is full"))
        answer = await client.get("s", params={"offset": "-1", **({"live": live} if live else {})})
        assert answer.status_code == 200
        assert "1" in answer.text
        assert (await client.delete("s")).status_code == 204


@pytest.mark.parametrize("method", ["append", "create"])
async def test_nobody_waits_while_millions_of_messages_are_taken_apart(method: str) -> None:
    body = b"[" + b"1," * 1_000_000 + b"1]"
    async with StreamManager(MemoryStorage()) as streams, durable_streams(streams) as app:
        there = app._there
        assert there is not None
        config = Config("application/json", None, "", _rules.NEVER, is_closed=False)
        await there.create("s", config, b"", None)
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                await checkpoint()
                turns += 1

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(count)
            if method == "append":
                assert (await there.append("s", Append(body, "application/json"))).code == 204
            else:
                assert (await there.create("other", config, body, None))[0].code == 201
            tasks.cancel_scope.cancel()
        assert turns > 100


async def test_a_deletion_whose_client_goes_is_done_to_its_end(open_client: Open) -> None:
    storage = FaultyStorage(MemoryStorage())
    async with StreamManager(storage) as streams, durable_streams(streams) as app, client_of(app) as client:
        there = app._there
        assert there is not None
        await made(client, body="source")
        assert (await client.put("f", headers={"stream-forked-from": "s"}, content="+")).status_code == 201
        assert (await client.delete("s")).status_code == 204
        hold = storage.hold("delete", after=True)
        with anyio.fail_after(BOUND_SECONDS):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(there.delete, "f")
                await hold.reached.wait()
                tasks.cancel_scope.cancel()
            hold.release()
            while [id for id, _ in await storage.scan() if id.startswith(".ds.")]:
                await checkpoint()
