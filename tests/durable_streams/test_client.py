"""The client of the protocol, against servers that behave, connections that are cut, and servers that do not behave."""

import os
import random
import re
import sys
import threading
import time
import tracemalloc
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Final

import anyio
import anyio.lowlevel
import anyio.to_thread
import httpx2
import msgspec
import pytest
from msgspec import Struct
from tests.durable_streams.conftest import Open
from tests.durable_streams.served import Server
from tests.http.servers import serving, until
from tests.network.proxy import End, Fate, bad_network

from streamkeep import InMemoryStreamManager, StreamManager
from streamkeep.client import Retry, _reading
from streamkeep.client._network import Call
from streamkeep.client.durable_streams import DurableStream, Mode, _batches
from streamkeep.client.durable_streams import sync as blocking
from streamkeep.client.durable_streams._batches import Events, Pages
from streamkeep.durable_streams import DurableStreamsLimits, Retention, bridge, durable_streams
from streamkeep.errors import (
    GoneError,
    InvalidArgumentError,
    LimitExceededError,
    RefusedError,
    StorageError,
    StreamLostError,
    UnexpectedAnswerError,
)
from streamkeep.http.response import Message, Receive, Scope, Send
from streamkeep.storage import Head, Page
from streamkeep.storages.memory import MemoryStorage

BOUND_SECONDS: Final = 40
MODES: Final[tuple[Mode, ...]] = ("catch-up", "long-poll", "sse")
SOON: Final = Retry(first=timedelta(milliseconds=1), longest=timedelta(milliseconds=20), tries=200)
NO_RETRY: Final = Retry(tries=0)
TEXT: Final = "text/plain"
BYTES: Final = "application/octet-stream"


@pytest.fixture
async def url(open_client: Open) -> AsyncGenerator[str]:
    """Give where a stream may be."""
    limits = DurableStreamsLimits(long_poll=timedelta(milliseconds=300))
    async with open_client(limits=limits) as client:
        yield f"{client.base_url}/s"


async def read_all(stream: DurableStream, mode: Mode, offset: str = "-1") -> list[Any]:
    """Read until the iteration ends."""
    seen: list[Any] = []
    with anyio.fail_after(BOUND_SECONDS):
        async with stream.read(offset=offset, mode=mode) as batches:
            async for batch in batches:
                seen += batch.messages
    return seen


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.promise("P28")
async def test_a_closed_stream_is_read_to_its_end_and_no_further(url: str, mode: Mode) -> None:
    async with DurableStream(url) as stream:
        assert await stream.create({"n": 0}, [1, 2])
        assert not await stream.create()
        offset = await stream.append("é\n", None)
        assert await stream.close("last") > offset

        assert await read_all(stream, mode) == [{"n": 0}, [1, 2], "é\n", None, "last"]
        assert await read_all(stream, mode, offset) == ["last"]
        assert await read_all(stream, mode, (await stream.head()).offset) == []
        assert await read_all(stream, mode, "now") == []


@pytest.mark.parametrize("mode", ["long-poll", "sse"])
async def test_what_is_appended_comes_and_its_offset_leads_behind_it(url: str, mode: Mode) -> None:
    async with DurableStream(url) as stream:
        await stream.create(0)
        with anyio.fail_after(BOUND_SECONDS):
            async with stream.read(mode=mode) as batches:
                first = await anext(batches)
                await stream.append(1)
                second = await anext(batches)
                assert (first.messages, second.messages) == ([0], [1])
                assert batches.offset == second.offset
            await stream.close(2)
        assert await read_all(stream, mode, first.offset) == [1, 2]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("content_type", "said"), [(BYTES, bytes(range(256))), (TEXT, "ä\n\nevent: control\ndata: {}\n\n".encode())]
)
async def test_bytes_come_as_they_were_appended(url: str, mode: Mode, content_type: str, said: bytes) -> None:
    async with DurableStream(url, content_type=content_type) as stream:
        await stream.create()
        await stream.append(said[:7], said[7:])
        await stream.close(said)
        with anyio.fail_after(BOUND_SECONDS):
            async with stream.read(mode=mode) as batches:
                assert b"".join([batch.data async for batch in batches]) == said * 2
                assert batches.is_closed


async def test_messages_are_decoded_into_what_is_asked_for(url: str) -> None:
    class Point(Struct):
        x: int

    async with DurableStream(url) as stream:
        await stream.create({"x": 1}, {"x": 2})
        async with stream.read(mode="catch-up", message_type=Point) as batches:
            assert (await anext(batches)).messages == [Point(1), Point(2)]
        await stream.append("none")
        async with stream.read(mode="catch-up", message_type=Point) as batches:
            batch = await anext(batches)
            with pytest.raises(UnexpectedAnswerError):
                _ = batch.messages


async def test_the_head_says_what_was_asked_for(url: str) -> None:
    async with DurableStream(url, content_type=TEXT) as stream:
        await stream.create(ttl=timedelta(minutes=5))
        head = await stream.head()
        assert (head.content_type, head.ttl, head.is_closed) == (TEXT, timedelta(minutes=5), False)
        await stream.delete()
        await stream.create(expires_at=datetime(2100, 1, 1, tzinfo=UTC), is_closed=True)
        head = await stream.head()
        assert (head.expires_at, head.ttl, head.is_closed) == ("2100-01-01T00:00:00Z", None, True)


async def test_what_is_refused_says_why(url: str) -> None:
    async with DurableStream(url, retry=NO_RETRY) as stream:
        for ask in (stream.head, partial(stream.append, 1), stream.delete, partial(read_all, stream, "sse")):
            with pytest.raises(RefusedError) as none:
                await ask()
            assert (none.value.status, none.value.http_status) == ("NOT_FOUND", 404)
        await stream.create()
        async with DurableStream(url, content_type=TEXT) as other:
            with pytest.raises(RefusedError) as conflict:
                await other.append("text")
        assert (conflict.value.status, conflict.value.http_status) == ("FAILED_PRECONDITION", 409)
        await stream.append(1, seq="b")
        with pytest.raises(RefusedError):
            await stream.append(1, seq="a")
        await stream.close()
        await stream.close()
        with pytest.raises(RefusedError, match="closed") as closed:
            await stream.append(1)
        assert closed.value.status == "FAILED_PRECONDITION"
        assert closed.value.details == {"offset": (await stream.head()).offset}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.promise("P28")
async def test_what_the_server_does_not_keep_any_more_is_told_by_an_error_of_its_own(mode: Mode) -> None:
    gone = (410, {"content-type": "application/json"}, b'{"error":{"code":"GONE","message":"forgotten"}}')

    def without_await(there: str) -> GoneError:
        with (
            blocking.DurableStream(there, retry=SOON) as stream,
            pytest.raises(GoneError) as told,
            stream.read(offset="5", mode=mode) as batches,
        ):
            list(batches)
        return told.value

    async with scripted([gone]) as (there, asked), DurableStream(there, retry=SOON) as stream:
        with pytest.raises(GoneError) as forgotten:
            await read_all(stream, mode, "5")
        with pytest.raises(GoneError) as deleted:
            await read_all(stream, mode)
        errors = [forgotten.value, await anyio.to_thread.run_sync(without_await, there), deleted.value]
        assert [error.cursor for error in errors] == ["-1", "-1", None]
        for error in errors:
            assert (error.status, error.http_status, error.message) == ("NOT_FOUND", 410, "forgotten")
        assert len(asked) == 3
        for ask in (stream.head, partial(stream.append, 1), stream.close, stream.delete, stream.create):
            with pytest.raises(GoneError):
                await ask()
        with pytest.raises(GoneError):
            async with stream.producer("p") as producer:
                await producer.append(1)


@pytest.mark.parametrize("mode", ["long-poll", "sse"])
async def test_a_reader_that_is_overtaken_by_what_is_forgotten_is_told_where_to_go_on(mode: Mode) -> None:
    first = b'event: data\ndata: [1]\n\nevent: control\ndata: {"streamNextOffset":"2"}\n\n'
    page = (200, EVENTS, first) if mode == "sse" else (200, {**JSON, "stream-next-offset": "2"}, b"[1]")
    gone = (410, {"content-type": "text/plain"}, b"compacted\n")
    async with (
        scripted([page, gone]) as (there, _),
        DurableStream(there, retry=SOON) as stream,
        stream.read(mode=mode) as batches,
    ):
        assert (await anext(batches)).messages == [1]
        for _ in range(2):
            with pytest.raises(GoneError, match=rf"compacted \(GET {there}\)") as told:
                await anext(batches)
            assert told.value.cursor == "-1"
        assert batches.offset == "2"


@pytest.mark.parametrize("mode", MODES)
async def test_a_reader_of_a_stream_that_forgets_its_beginning_misses_nothing_without_being_told(
    open_client: Open, mode: Mode
) -> None:
    limits = DurableStreamsLimits(long_poll=timedelta(milliseconds=300), sse=timedelta(seconds=2))
    seen: list[int] = []
    async with (
        open_client(limits=limits, retention=Retention(max_records=16)) as client,
        DurableStream(f"{client.base_url}/s") as stream,
    ):
        await stream.create({"n": 0})
        with anyio.fail_after(BOUND_SECONDS), pytest.raises(GoneError) as gone:
            async with stream.read(mode=mode) as batches:
                seen += [message["n"] for message in (await anext(batches)).messages]
                for number in range(1, 400):
                    await stream.append({"n": number, "pad": "x" * 65_536})
                async for batch in batches:
                    seen += [message["n"] for message in batch.messages]
            seen += [message["n"] for message in await read_all(stream, mode, batches.offset)]
        await stream.close()
        assert gone.value.cursor is not None
        kept = [message["n"] for message in await read_all(stream, mode, gone.value.cursor)]
    assert seen == list(range(len(seen)))
    assert kept == list(range(kept[0], 400))
    assert kept[0] > len(seen)


async def test_what_is_refused_is_told_in_the_servers_words_and_with_what_was_asked() -> None:
    for kind, body, words in (
        ("text/plain; charset=utf-8", b"no such\nstr\xc3\xa9am\x1b[0m", "no such stréam [0m"),
        ("text/html", b"<p>no</p>", "HTTP 404"),
        ("application/json", b'{"message":"not here"}', "not here"),
    ):
        async with scripted([(404, {"content-type": kind}, body)]) as (there, _):
            secret = there.replace("//", "//me:secret@") + "?token=secret"
            async with DurableStream(secret, retry=SOON) as stream:
                for ask in (partial(stream.append, 1), partial(read_all, stream, "catch-up")):
                    with pytest.raises(RefusedError) as told:
                        await ask()
                    assert told.value.message == words
                    assert f" {there})" in str(told.value)
                    assert "secret" not in str(told.value)


async def test_more_streams_are_followed_at_once_than_a_client_has_connections_for_otherwise(url: str) -> None:
    async with DurableStream(url) as stream:
        await stream.create()
        seen: list[Any] = []
        follows = 0

        async def follow() -> None:
            nonlocal follows
            async with stream.read() as batches:
                follows += 1
                seen.extend([batch.messages async for batch in batches])

        with anyio.fail_after(BOUND_SECONDS):
            async with anyio.create_task_group() as tasks:
                for _ in range(120):
                    tasks.start_soon(follow)
                await until(lambda: follows == 120)
                await stream.close("end")
        assert seen == [["end"]] * 120


async def test_what_cannot_be_sent_is_not(url: str) -> None:
    async with DurableStream(url, content_type=BYTES) as stream:
        with pytest.raises(InvalidArgumentError):
            await stream.append({"a": 1})
        with pytest.raises(InvalidArgumentError):
            await stream.create(ttl=timedelta(seconds=1.5))
        with pytest.raises(InvalidArgumentError):
            await stream.create(expires_at=datetime(2100, 1, 1))  # noqa: DTZ001 - that is the point
        for id in ("", " p", "p ", "p\n"):
            with pytest.raises(InvalidArgumentError):
                stream.producer(id)


@pytest.mark.parametrize("mode", ["long-poll", "sse"])
async def test_an_answer_of_a_manager_is_followed_over_the_bridge(mode: Mode) -> None:
    async with InMemoryStreamManager() as streams, serving(bridge(streams)) as url, DurableStream(f"{url}/answer") as stream:
        async with streams.open("answer") as answer:
            await answer.write("hello")
            with anyio.fail_after(BOUND_SECONDS):
                async with stream.read(mode=mode) as batches:
                    assert (await anext(batches)).messages == [{"chunk": "hello"}]
                    await answer.done("end")
                    assert [batch.messages async for batch in batches] == [[{"result": "end"}]]
        with pytest.raises(RefusedError):
            await stream.append(1)


# Over bad networks


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.promise("P28")
async def test_a_read_that_is_cut_again_and_again_gives_each_message_once(url: str, mode: Mode) -> None:
    async with bad_network(url.removesuffix("/s")) as network, DurableStream(url) as there:
        await there.create(*range(500))
        for start in range(500, 1_000, 50):
            await there.append(*range(start, start + 50))
        await there.close()
        fates = [Fate(end, after=100 + 700 * number) for number in range(6) for end in (End.FIN, End.RST)]
        async with DurableStream(network.path(fates) + "/s", retry=SOON) as stream:
            assert await read_all(stream, mode) == list(range(1_000))
        assert network.struck.total() > 3


@pytest.mark.promise("P28")
async def test_a_producer_whose_connections_are_cut_has_each_message_there_once(url: str) -> None:
    def fates() -> Iterator[Fate]:
        for number in range(30):
            of_request = number % 3 == 0
            yield Fate(
                (End.FIN, End.RST)[number % 2],
                after=150 + 37 * number if of_request else 20 * (number % 7),
                of_request=of_request,
            )

    async with bad_network(url.removesuffix("/s")) as network, DurableStream(url) as there:
        await there.create()
        async with DurableStream(network.path(fates()) + "/s", retry=SOON) as stream:
            with anyio.fail_after(BOUND_SECONDS):
                async with stream.producer("p", max_batch_bytes=40) as producer:
                    for number in range(600):
                        await producer.append(number)
                        if number % 50 == 0:
                            await producer.flush()
                    await producer.close("end")
        assert network.struck.total() > 10
        assert await read_all(there, "catch-up") == [*range(600), "end"]


async def test_an_append_whose_answer_is_lost_is_not_sent_again(url: str) -> None:
    async with bad_network(url.removesuffix("/s")) as network, DurableStream(url) as there:
        await there.create()
        async with DurableStream(network.path([Fate(End.RST, after=0)]) + "/s", retry=SOON) as stream:
            with pytest.raises(StreamLostError):
                await stream.append("once")
        assert await read_all(there, "catch-up") in ([], ["once"])


@pytest.mark.promise("P28")
async def test_a_producers_session_outlives_a_server_that_is_killed(tmp_path: Path) -> None:
    with Server(f"sqlite:///{tmp_path / 'streams.db'}", tmp_path / "server") as server:
        async with DurableStream(f"{server.url}/s", retry=Retry(tries=None, longest=timedelta(milliseconds=200))) as stream:
            await stream.create()
            sent = 0
            stops = anyio.Event()

            async def append_on() -> None:
                nonlocal sent
                async with stream.producer("p", max_batch_bytes=64) as producer:
                    while not stops.is_set():
                        await producer.append(sent)
                        sent += 1
                        if sent % 20 == 0:
                            await producer.flush()
                    await producer.close()

            with anyio.fail_after(BOUND_SECONDS):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(append_on)
                    for kills in range(1, 4):
                        await until(lambda kills=kills: sent > 100 * kills)  # type: ignore[misc]  # it is inferred where it is called
                        await anyio.to_thread.run_sync(server.kill)
                        await anyio.to_thread.run_sync(server.start)
                    stops.set()
            assert await read_all(stream, "sse") == list(range(sent))


@pytest.mark.parametrize("code", [500, 502, 503, 504])
async def test_an_append_that_may_have_been_done_is_not_sent_again_and_not_called_refused(code: int) -> None:
    async with scripted([(code, {"retry-after": "0"})]) as (there, asked), DurableStream(there, retry=SOON) as stream:
        with pytest.raises(StreamLostError, match=str(code)):
            await stream.append(1)
        assert len(asked) == 1


async def test_an_answer_of_503_is_asked_again_when_it_says_and_one_of_400_is_not(url: str) -> None:
    answers = [(503, {"retry-after": "0"}), (429, {}), (503, {}), (200, {"stream-next-offset": "1_a"}), (400, {})]
    async with scripted(answers) as (there, asked), DurableStream(there, retry=SOON) as stream:
        assert (await stream.head()).offset == "1_a"
        assert len(asked) == 4
        with pytest.raises(RefusedError):
            await stream.append(1)
        assert len(asked) == 5
    async with scripted([(503, {"retry-after": "600"})]) as (there, _), DurableStream(there, retry=SOON) as stream:
        with pytest.raises(StreamLostError) as lost:
            await stream.head()
        assert lost.value.retry_after == 600


# Producers


async def test_a_producer_that_was_restarted_claims_its_id_and_fences_the_one_before(url: str) -> None:
    async with DurableStream(url) as stream:
        await stream.create()
        old = stream.producer("p")
        with pytest.raises(RefusedError):
            async with old:
                await old.append("a")
                await old.flush()
                async with stream.producer("p") as new:
                    for number in range(10):
                        await new.append(number)
                    await new.flush()
                    assert new.epoch > old.epoch
                await old.append("b")
                for ask in (old.flush, partial(old.append, "c"), old.close):
                    with pytest.raises(RefusedError) as fenced:
                        await ask()
                    assert (fenced.value.status, fenced.value.details) == ("ABORTED", {"epoch": new.epoch})
        assert await read_all(stream, "catch-up") == ["a", *range(10)]


async def test_no_two_producers_claim_the_same_epoch() -> None:
    other = 2**53 - 2**30
    answers: Script = [(403, {"producer-epoch": str(other)}), (200, {"stream-next-offset": "1"})] * 2
    async with scripted(answers) as (url, _), DurableStream(url) as stream:
        producers = [stream.producer("p") for _ in range(2)]
        for producer in producers:
            async with producer:
                await producer.append(1)
    epochs = [producer.epoch for producer in producers]
    assert other < min(epochs) < max(epochs)


@pytest.mark.parametrize("there", [3, 2**53 - 2**30])
@pytest.mark.promise("P28")
async def test_what_is_appended_in_an_epoch_that_was_used_is_not_taken_for_what_is_there(url: str, there: int) -> None:
    async with DurableStream(url) as stream:
        await stream.create()
        async with stream.producer("p", epoch=there) as first:
            await first.append("first")
        with pytest.raises(RefusedError) as used:
            async with stream.producer("p", epoch=there) as second:
                await second.append("second")
        async with stream.producer("p") as third:
            await third.append("third")
        assert used.value.status == "ABORTED"
        assert third.epoch > there
        assert await read_all(stream, "catch-up") == ["first", "third"]


async def test_what_a_producer_could_not_store_is_told_when_it_is_left(url: str) -> None:
    async with DurableStream(url) as stream:
        await stream.create(is_closed=True)
        with pytest.raises(RefusedError) as closed:
            async with stream.producer("p") as producer:
                await producer.append(1)
        assert closed.value.status == "FAILED_PRECONDITION"


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 8))])
async def test_producers_that_take_an_id_from_one_another_store_all_that_they_were_told_is_stored_once_and_in_order(
    seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    chance = random.Random(seed)
    told: list[str] = []
    print("seed", seed)

    async with InMemoryStreamManager() as streams, durable_streams(streams) as served:

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            """Answer late, not at all, that it is busy, or that it failed when it has not."""
            is_told = scope["method"] != "POST" or chance.random() < 0.7

            async def unheard(message: Message) -> None:
                pass

            if scope["method"] == "POST":
                await anyio.sleep(chance.random() / 100)
            if is_told or chance.random() < 0.5:
                await served(scope, receive, send if is_told else unheard)
            if is_told:
                return
            code = chance.choice([None, 500, 503])
            if code is None:
                raise ConnectionResetError
            await send({"type": "http.response.start", "status": code, "headers": []})
            await send({"type": "http.response.body"})

        async def produce(stream: DurableStream, name: str) -> None:
            await anyio.sleep(chance.random() / 2)
            number = 0
            with suppress(RefusedError):
                async with stream.producer("p", max_batch_bytes=40, max_in_flight=chance.choice([1, 5])) as producer:
                    for _ in range(chance.randrange(1, 12)):
                        waiting = [f"{name}-{number + more}" for more in range(chance.randrange(1, 9))]
                        number += len(waiting)
                        for message in waiting:
                            await producer.append(message)
                        await producer.flush()
                        told.extend(waiting)

        async with serving(app) as url, DurableStream(f"{url}/s", retry=SOON) as stream:
            await stream.create()
            with anyio.fail_after(BOUND_SECONDS):
                async with anyio.create_task_group() as tasks:
                    for number in range(12):
                        tasks.start_soon(produce, stream, str(number))
            there = await read_all(stream, "catch-up")
    caplog.clear()
    assert told
    assert set(told) <= set(there)
    for name in range(12):
        numbers = [int(message.partition("-")[2]) for message in there if message.startswith(f"{name}-")]
        assert numbers == list(range(len(numbers)))


async def test_a_server_that_forgets_what_it_has_stored_is_noticed(open_client: Open) -> None:
    async with open_client() as client, DurableStream(f"{client.base_url}/s") as stream:
        await stream.create()
        with pytest.raises(UnexpectedAnswerError, match="lost"):
            async with stream.producer("p") as producer:
                await producer.append(0)
                await producer.flush()
                await producer.append(1)
                await producer.flush()
                await stream.delete()
                await stream.create()
                await producer.append(2)


async def test_batches_that_overtake_one_another_are_stored_in_order() -> None:
    codes: list[int] = []
    overtaken = anyio.Event()

    async with InMemoryStreamManager() as streams, durable_streams(streams) as served:

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            """Hold every third batch back until another one was refused because of that."""
            nonlocal overtaken
            seq = int(dict(scope["headers"]).get(b"producer-seq", b"0"))
            if seq % 3 == 1 and not overtaken.is_set():
                await overtaken.wait()
                overtaken = anyio.Event()

            async def noted(message: Message) -> None:
                if message["type"] == "http.response.start":
                    codes.append(message["status"])
                    if message["status"] == 409:
                        overtaken.set()
                await send(message)

            await served(scope, receive, noted)

        async with serving(app) as url, DurableStream(f"{url}/s", retry=SOON) as stream:
            await stream.create()
            with anyio.fail_after(BOUND_SECONDS):
                async with stream.producer("p", max_batch_bytes=2) as producer:
                    for number in range(30):
                        await producer.append(number)
                    await producer.append(*range(30, 60))
            assert await read_all(stream, "catch-up") == list(range(60))
    assert codes.count(409) > 5


async def test_an_answer_that_was_overtaken_by_what_it_asks_for_does_not_mean_that_it_was_lost() -> None:
    is_refused, goes_on = anyio.Event(), anyio.Event()

    async with InMemoryStreamManager() as streams, durable_streams(streams) as served:

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            """Refuse batch 2 because 1 is not there, and say so when the client has heard that 1 is."""
            seq = dict(scope["headers"]).get(b"producer-seq")
            if seq == b"1":
                await is_refused.wait()
            elif seq == b"3":
                goes_on.set()

            async def held(message: Message) -> None:
                if message.get("status") == 409 and not is_refused.is_set():
                    is_refused.set()
                    await goes_on.wait()
                await send(message)

            await served(scope, receive, held)

        async with serving(app) as url, DurableStream(f"{url}/s", retry=SOON) as stream:
            await stream.create()
            with anyio.fail_after(BOUND_SECONDS):
                async with stream.producer("p", max_batch_bytes=1, max_in_flight=2) as producer:
                    await producer.append(0)
                    await producer.flush()
                    await producer.append(1, 2, 3)
            assert await read_all(stream, "catch-up") == [0, 1, 2, 3]


class _LosesAnswers(MemoryStorage):
    """Commits, and then cannot be asked whether it has."""

    loses_next = False
    is_away = False

    async def commit(self, stream: str, seen: int | None, head: Head, records: Sequence[bytes] = ()) -> bool:
        is_there = await super().commit(stream, seen, head, records)
        if self.loses_next:
            self.loses_next, self.is_away = False, True
            raise StorageError("the answer was lost")
        return is_there

    async def read(self, stream: str, start: int = 0, limit: int = 0) -> Page | None:
        if self.is_away:
            self.is_away = False
            raise StorageError("away")
        return await super().read(stream, start, limit)


async def test_what_a_server_has_stored_that_does_not_know_it_is_not_stored_twice() -> None:
    storage = _LosesAnswers()
    async with (
        StreamManager(storage) as streams,
        durable_streams(streams) as app,
        serving(app) as url,
        DurableStream(f"{url}/s", retry=SOON) as stream,
    ):
        await stream.create()
        storage.loses_next = True
        with pytest.raises(StreamLostError):
            await stream.append("a")
        storage.loses_next = True
        async with stream.producer("p") as producer:
            await producer.append("b")
        assert await read_all(stream, "catch-up") == ["a", "b"]


async def test_who_waits_for_what_was_appended_does_not_wait_for_what_others_go_on_appending(url: str) -> None:
    async with DurableStream(url) as stream:
        await stream.create()
        async with stream.producer("p", max_batch_bytes=100) as producer, anyio.create_task_group() as tasks:

            async def append_on() -> None:
                while True:
                    await producer.append(*range(100))
                    await anyio.lowlevel.checkpoint()

            tasks.start_soon(append_on)
            with anyio.fail_after(BOUND_SECONDS):
                await producer.append("mine")
                offset = await producer.flush()
                tasks.cancel_scope.cancel()
        assert "mine" not in await read_all(stream, "catch-up", offset)


async def test_what_is_nothing_does_not_end_a_producer(url: str) -> None:
    async with DurableStream(url, content_type=TEXT) as stream:
        await stream.create()
        async with stream.producer("p") as producer:
            for text in ("a", "", "b", ""):
                await producer.append(text)
                await producer.flush()

        def without_await() -> None:
            with blocking.DurableStream(url, content_type=TEXT) as stream, stream.producer("q") as producer:
                for text in ("c", "", "d", ""):
                    producer.append(text)
                    producer.flush()

        await anyio.to_thread.run_sync(without_await)
        async with stream.read(mode="catch-up") as batches:
            assert b"".join([batch.data async for batch in batches]) == b"abcd"


async def test_a_stream_whose_closing_was_not_waited_for_is_closed_when_the_producer_is_left(url: str) -> None:
    async with DurableStream(url, retry=SOON) as stream:
        await stream.create()
        async with stream.producer("p") as producer:
            await producer.append(1)
            await producer.flush()
            with anyio.move_on_after(0):
                await producer.close("end")
            with pytest.raises(RuntimeError):
                await producer.append(2)
        assert (await stream.head()).is_closed
        assert await read_all(stream, "catch-up") == [1, "end"]


async def test_a_producer_that_is_left_by_an_exception_does_not_wait(url: str) -> None:
    async with DurableStream(url, retry=SOON) as stream:
        await stream.create()
        with anyio.fail_after(BOUND_SECONDS), pytest.raises(ZeroDivisionError):
            async with stream.producer("p") as producer:
                await producer.append(1)
                raise ZeroDivisionError


async def test_what_a_client_of_the_users_raises_ends_its_producer_and_no_other_task(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(httpx2.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
            raise ZeroDivisionError("of the user's transport")

    async with httpx2.AsyncClient(transport=Broken()) as client, DurableStream(url, client=client) as stream:
        with anyio.fail_after(BOUND_SECONDS), pytest.raises(StreamLostError, match="of the user's transport") as lost:
            async with stream.producer("p") as producer:
                await producer.append(1)
                with pytest.raises(StreamLostError):
                    await producer.flush()
    assert isinstance(lost.value.__cause__, ZeroDivisionError)
    assert "ZeroDivisionError" in caplog.text
    caplog.clear()


# Servers that do not behave


Script = Sequence[tuple[int, dict[str, str]] | tuple[int, dict[str, str], bytes]]


@asynccontextmanager
async def scripted(answers: Script) -> AsyncGenerator[tuple[str, list[str]]]:
    """Give a server that answers so, the last of it again and again; and what it was asked."""
    asked: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        while (await receive()).get("more_body"):
            pass
        code, headers, *body = answers[min(len(asked), len(answers) - 1)]
        asked.append(f"{scope['method']} {scope['query_string'].decode()}")
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": code, "headers": raw})
        await send({"type": "http.response.body", "body": body[0] if body else b""})

    async with serving(app) as url:
        yield f"{url}/s", asked


JSON: Final = {"content-type": "application/json", "stream-next-offset": "1"}
EVENTS: Final = {"content-type": "text/event-stream"}


@pytest.mark.parametrize(
    ("mode", "answer"),
    [
        ("catch-up", (200, {"content-type": "application/json"}, b"[1]")),
        ("catch-up", (200, JSON, b"[]")),
        ("catch-up", (200, {**JSON, "stream-next-offset": "now"}, b"[1]")),
        ("long-poll", (200, {**JSON, "stream-next-offset": "-1"}, b"[]")),
        ("sse", (200, EVENTS, b'event: data\ndata: [1]\n\nevent: control\ndata: {"streamNextOffset":"now"}\n\n')),
        ("sse", (200, EVENTS, b'event: data\ndata: words\n\nevent: control\ndata: {"streamNextOffset":"2"}\n\n')),
        ("catch-up", (200, JSON, b"[1")),
        ("long-poll", (200, JSON, b"{}")),
        ("sse", (200, JSON, b"[1]")),
        ("sse", (204, {}, b"")),
        ("sse", (200, EVENTS, b"event: control\ndata: nonsense\n\n")),
        ("sse", (200, EVENTS, b"event: control\ndata: {}\n\n")),
        ("sse", (200, EVENTS, b'event: data\ndata: [1\n\nevent: control\ndata: {"streamNextOffset":"2"}\n\n')),
        (
            "sse",
            (
                200,
                {**EVENTS, "stream-sse-data-encoding": "base64"},
                b'event: data\ndata: %\n\nevent: control\ndata: {"streamNextOffset":"2"}\n\n',
            ),
        ),
        ("sse", (200, {**EVENTS, "stream-sse-data-encoding": "rot13"}, b"")),
    ],
)
async def test_an_answer_that_is_none_of_the_protocol_is_told_and_not_asked_for_again(
    mode: Mode, answer: tuple[int, dict[str, str], bytes]
) -> None:
    async with scripted([answer]) as (url, asked), DurableStream(url, retry=SOON) as stream:
        with pytest.raises(UnexpectedAnswerError):
            await read_all(stream, mode, "1" if mode == "catch-up" else "-1")
        assert len(asked) == 1


@pytest.mark.parametrize(
    ("mode", "answer"),
    [
        ("long-poll", (204, {"stream-next-offset": "1", "stream-up-to-date": "true"}, b"")),
        ("sse", (200, EVENTS, b'event: control\ndata: {"streamNextOffset":"1","upToDate":true}\n\n')),
    ],
)
async def test_a_server_that_answers_at_once_with_nothing_is_not_asked_for_ever(
    mode: Mode, answer: tuple[int, dict[str, str], bytes]
) -> None:
    async with scripted([answer]) as (url, asked), DurableStream(url, retry=SOON) as stream:
        with anyio.move_on_after(1.5):
            await read_all(stream, mode, "1")
        assert 1 <= len(asked) <= 3


@pytest.mark.parametrize("mode", MODES)
async def test_a_server_that_leads_from_nothing_to_nothing_is_not_asked_for_ever(mode: Mode) -> None:
    def answer(number: int) -> tuple[int, dict[str, str], bytes]:
        if mode == "sse":
            return 200, EVENTS, b'event: control\ndata: {"streamNextOffset":"%04d"}\n\n' % number
        return 200, {**JSON, "stream-next-offset": f"{number:04d}"}, b"[]"

    async with scripted([answer(number) for number in range(1_000)]) as (url, asked):
        async with DurableStream(url, retry=SOON) as stream:
            with anyio.move_on_after(1.5):
                await read_all(stream, mode)
        assert len(asked) <= 20


@pytest.mark.parametrize("mode", MODES)
async def test_a_stream_that_ends_before_what_was_read_is_noticed(mode: Mode) -> None:
    said = b'event: control\ndata: {"streamNextOffset":"3","upToDate":true}\n\n'
    page = (200, {**JSON, "stream-next-offset": "3", "stream-up-to-date": "true"}, b"[]")
    async with scripted([(200, EVENTS, said) if mode == "sse" else page]) as (url, asked):
        async with DurableStream(url, retry=SOON) as stream:
            with pytest.raises(UnexpectedAnswerError, match="before '5'"):
                await read_all(stream, mode, "5")
        assert len(asked) == 1


async def test_what_comes_between_the_end_of_a_long_poll_and_its_answer_is_not_skipped() -> None:
    closed = {"stream-closed": "true", "stream-up-to-date": "true"}
    answers: Script = [
        (200, {**JSON, "stream-up-to-date": "true"}, b"[1]"),
        (204, {"stream-next-offset": "3", **closed}),  # nothing came in time, and then this did
        (200, {**JSON, "stream-next-offset": "3", **closed}, b"[2]"),
    ]
    async with scripted(answers) as (url, asked), DurableStream(url, retry=SOON) as stream:
        assert await read_all(stream, "long-poll") == [1, 2]
    assert asked == ["GET offset=-1", "GET live=long-poll&offset=1", "GET offset=1"]


async def test_an_event_may_be_as_long_as_an_append_of_a_large_server() -> None:
    body = b'event: data\ndata: ["%s"]\n\nevent: control\ndata: {"streamNextOffset":"2","streamClosed":true}\n\n'
    async with scripted([(200, EVENTS, body % (b"x" * (20 << 20)))]) as (url, _), DurableStream(url, retry=SOON) as stream:
        assert [len(message) for message in await read_all(stream, "sse")] == [20 << 20]


async def test_a_body_that_never_ends_holds_up_nobody_who_has_what_its_head_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_reading, "ERROR_SECONDS", 0.3)
    sent, is_answered = 0, False

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal sent
        assert scope["type"] == "http"
        await send({"type": "http.response.start", "status": 200, "headers": [(b"stream-next-offset", b"1")]})
        while not is_answered:
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
            sent += 1
            await anyio.sleep(0.01)
        await send({"type": "http.response.body"})

    async with serving(app) as url, DurableStream(f"{url}/s") as stream:
        with anyio.fail_after(BOUND_SECONDS):
            assert await stream.append(1) == "1"
        is_answered = True
        assert sent < 50


async def test_what_no_server_of_the_protocol_says_is_not_taken_for_done() -> None:
    page = (200, {"content-type": "text/html"}, b"<html>Log in</html>")
    async with scripted([page]) as (url, _), DurableStream(url, retry=SOON) as stream:
        with pytest.raises(UnexpectedAnswerError):
            async with stream.producer("p") as producer:
                await producer.append(1)
        for ask in (stream.create, partial(stream.append, 1), stream.close, stream.head, stream.delete):
            with pytest.raises(UnexpectedAnswerError):
                await ask()


@pytest.mark.parametrize("data", [b"event: data\ndata: [1]\n\n", b"event: data\ndata:\n\n"])
def test_events_without_a_place_to_go_on_cost_no_more_than_there_are_and_are_bounded(
    monkeypatch: pytest.MonkeyPatch, data: bytes
) -> None:
    monkeypatch.setattr(_batches, "MAX_PAGE_BYTES", 4 << 20)
    events = Events(Call("GET", "http://server"), "-1", msgspec.json.decode, is_json=True)
    begun_at = time.process_time()
    with pytest.raises(LimitExceededError):
        for _ in range(70):
            assert list(events.feed(data * 1_000)) == []
    assert time.process_time() - begun_at < BOUND_SECONDS / 4


async def test_no_body_is_longer_than_a_batch_may_be_and_many_that_wait_cost_no_more_each() -> None:
    lengths: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        size, more = 0, True
        while more:
            message = await receive()
            size, more = size + len(message.get("body", b"")), message.get("more_body", False)
        lengths.append(size)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"stream-next-offset", b"1")]})
        await send({"type": "http.response.body"})

    def without_await(url: str) -> None:
        with blocking.DurableStream(url) as stream, stream.producer("p", max_batch_bytes=100) as producer:
            for number in range(200):
                producer.append(number)

    async with serving(app) as url, DurableStream(url) as stream:
        async with stream.producer("p", max_batch_bytes=100) as producer:
            await producer.append(*range(200))
        await anyio.to_thread.run_sync(without_await, url)
        assert 90 < max(lengths) <= 100
        begun_at = time.process_time()
        with suppress(ZeroDivisionError):
            async with stream.producer("p", max_batch_bytes=2) as producer:
                await producer.append(*range(300_000))
                for _ in range(20_000):
                    producer._batch()  # over a network it takes longer
                raise ZeroDivisionError
        assert time.process_time() - begun_at < BOUND_SECONDS / 4


def test_a_long_answer_costs_about_its_length() -> None:
    pages = Pages(Call("GET", "http://server"), "-1", msgspec.json.decode, polls=False)
    body = b"[" + b"1," * 500_000 + b"1]"
    tracemalloc.start()
    try:
        pages.begin(Whole(200, {"content-type": "application/json", "stream-next-offset": "5"}))
        assert list(pages.feed(body)) == []
        [(batch, _)] = pages.end(has_end=True)
        assert tracemalloc.get_traced_memory()[1] < 8 * len(body)
    finally:
        tracemalloc.stop()
    assert batch.data == body


@dataclass
class Whole:
    """The head of an answer whose body is fed by hand."""

    status: int
    headers: Mapping[str, str]
    has_end: bool = True

    async def read(self) -> bytes:
        return b""

    def hasten(self, seconds: float) -> None:
        pass

    async def close(self) -> None:
        pass


async def test_what_comes_after_reading_from_now_on_has_begun_comes_whatever_is_lost() -> None:
    async with InMemoryStreamManager() as streams, durable_streams(streams) as served:
        is_cut = False

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            async def cut(message: Message) -> None:
                nonlocal is_cut
                if message.get("body") and b"live" in scope["query_string"] and not is_cut:
                    is_cut = True
                    raise ConnectionResetError
                await send(message)

            await served(scope, receive, cut)

        async with serving(app) as url, DurableStream(f"{url}/s", retry=SOON) as stream:
            for mode in ("long-poll", "sse"):
                is_cut = False
                await stream.create("before")
                with anyio.fail_after(BOUND_SECONDS):
                    async with stream.read(offset="now", mode=mode) as batches:
                        await stream.append(mode)
                        assert (await anext(batches)).messages == [mode]
                assert is_cut
                await stream.delete()


@pytest.mark.parametrize(
    "answers",
    [
        [(403, {"producer-epoch": str(2**52 + number)}) for number in range(100)],
        [(204, {"stream-next-offset": "1"})],
        [(200, {"stream-next-offset": "1"}), (409, {"producer-expected-seq": "0"})],
        [(409, {"producer-expected-seq": "7"})],
        [(403, {"producer-epoch": "9" * 400})],
        [(409, {"producer-expected-seq": "-1"})],
    ],
)
async def test_a_server_that_never_takes_a_batch_is_not_asked_for_ever(answers: Script) -> None:
    async with scripted(answers) as (url, asked), DurableStream(url, retry=SOON) as stream:
        with anyio.fail_after(BOUND_SECONDS), pytest.raises((RefusedError, UnexpectedAnswerError)):
            async with stream.producer("p") as producer:
                await producer.append(0)
                await producer.flush()
                await producer.append(1)
        assert len(asked) < 20


async def test_data_that_is_not_followed_by_where_to_go_on_comes_again(url: str) -> None:
    data = b"event: data\ndata: [1]\n\n"
    control = b'event: control\ndata: {"streamNextOffset":"2","streamCursor":"7"}\n\n'
    closed = b'event: data\ndata: [2]\n\nevent: control\ndata: {"streamNextOffset":"3","streamClosed":true}\n\n'
    answers: Script = [(200, EVENTS, data), (200, EVENTS, data + control + data), (200, EVENTS, closed)]
    async with scripted(answers) as (there, asked), DurableStream(there, retry=SOON) as stream:
        assert await read_all(stream, "sse") == [1, 2]
    assert asked == ["GET live=sse&offset=-1", "GET live=sse&offset=-1", "GET cursor=7&live=sse&offset=2"]


# Without await


@pytest.mark.parametrize("mode", MODES)
async def test_it_is_the_same_without_await(url: str, mode: Mode) -> None:
    def work() -> list[Any]:
        with blocking.DurableStream(url, retry=SOON) as stream:
            assert stream.create("first")
            with stream.producer("p", max_batch_bytes=30) as producer:
                producer.append(*range(100))
                producer.flush()
            with stream.producer("p") as producer:
                producer.append("claimed")
                producer.close("last")
            assert stream.head().is_closed
            with pytest.raises(RefusedError):
                stream.append(1)
            with stream.read(mode=mode) as batches:
                seen = [message for batch in batches for message in batch.messages]
                assert batches.is_closed
            stream.delete()
            return seen

    assert await anyio.to_thread.run_sync(work) == ["first", *range(100), "claimed", "last"]


async def test_a_producer_without_await_whose_connections_are_cut_has_each_message_there_once(url: str) -> None:
    async with bad_network(url.removesuffix("/s")) as network, DurableStream(url) as there:
        await there.create()
        fates = [Fate((End.FIN, End.RST)[number % 2], after=20 * (number % 9)) for number in range(20)]
        path = network.path(fates) + "/s"

        def work() -> None:
            with blocking.DurableStream(path, retry=SOON) as stream, stream.producer("p", max_batch_bytes=40) as producer:
                for number in range(300):
                    producer.append(number)

        with anyio.fail_after(BOUND_SECONDS):
            await anyio.to_thread.run_sync(work)
        assert network.struck.total() > 10
        assert await read_all(there, "catch-up") == list(range(300))


async def test_a_producer_without_await_that_was_interrupted_does_not_give_its_batchs_number_to_another(url: str) -> None:
    class Interruption(BaseException):
        pass

    def work() -> None:
        class Interrupted(httpx2.BaseTransport):
            """Interrupts whoever waits for the first answer, when the server has given it."""

            def __init__(self) -> None:
                self.inner, self.is_done = httpx2.HTTPTransport(), False

            def handle_request(self, request: httpx2.Request) -> httpx2.Response:
                response = self.inner.handle_request(request)
                if not self.is_done:
                    self.is_done = True
                    response.close()
                    raise Interruption
                return response

        with (
            httpx2.Client(transport=Interrupted()) as client,
            blocking.DurableStream(url, client=client) as stream,
            pytest.raises(StreamLostError, match="unknown"),
            stream.producer("p") as producer,
        ):
            producer.append(1)
            with pytest.raises(Interruption):
                producer.flush()
            producer.append(2)

    async with DurableStream(url) as there:
        await there.create()
        await anyio.to_thread.run_sync(work)
        assert await read_all(there, "catch-up") == [1]


def test_a_producer_without_await_that_is_interrupted_anywhere_in_sending_gives_no_number_twice() -> None:
    numbers: list[str] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        numbers.append(request.headers["producer-seq"])
        return httpx2.Response(200, headers={"stream-next-offset": "1"}, stream=httpx2.ByteStream(b""))

    class Interruption(BaseException):
        pass

    def interrupted_at(line: int) -> bool:
        """Say whether there was such a line."""
        lines = 0

        def trace(frame: FrameType, event: str, _arg: object) -> Any:
            nonlocal lines
            if frame.f_code is not blocking.Producer._send.__code__:
                return None
            lines += event == "line"
            if lines == line and event == "line":
                raise Interruption
            return trace

        is_interrupted = False
        with suppress(StreamLostError), stream.producer("p") as producer:
            producer.append(1)
            before = sys.gettrace()
            sys.settrace(trace)
            try:
                producer.flush()
            except Interruption:
                is_interrupted = True
            finally:
                sys.settrace(before)
            producer.append(2)
        return is_interrupted

    with (
        httpx2.Client(transport=httpx2.MockTransport(answer)) as client,
        blocking.DurableStream("http://server/s", client=client) as stream,
    ):
        for line in range(1, 100):
            numbers.clear()
            if not interrupted_at(line):
                break
            assert len(numbers) == len(set(numbers)), line
    assert 5 < line < 100


async def test_a_producer_without_await_is_for_one_thread_and_entered_once(url: str) -> None:
    is_asked, goes_on = threading.Event(), threading.Event()

    def answer(request: httpx2.Request) -> httpx2.Response:
        is_asked.set()
        assert goes_on.wait(BOUND_SECONDS)
        return httpx2.Response(200, headers={"stream-next-offset": "1"}, stream=httpx2.ByteStream(b""))

    def work() -> None:
        with (
            httpx2.Client(transport=httpx2.MockTransport(answer)) as client,
            blocking.DurableStream(url, client=client) as stream,
            ThreadPoolExecutor() as threads,
        ):
            with stream.producer("p") as producer:
                producer.append(1)
                flushed = threads.submit(producer.flush)
                assert is_asked.wait(BOUND_SECONDS)
                for ask in (partial(producer.append, 2), producer.flush, producer.close):
                    with pytest.raises(RuntimeError, match="in use"):
                        ask()
                goes_on.set()
                assert flushed.result(BOUND_SECONDS) == "1"
            with pytest.raises(RuntimeError, match="entered"), producer:
                pass
            with pytest.raises(RuntimeError):
                producer.append(3)

    await anyio.to_thread.run_sync(work)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_process_has_connections_and_producers_of_its_own(tmp_path: Path) -> None:
    with (
        Server(f"sqlite:///{tmp_path / 'streams.db'}", tmp_path / "server") as server,
        blocking.DurableStream(f"{server.url}/s", retry=SOON) as stream,
        stream.producer("p") as producer,
    ):
        stream.create()
        producer.append("before")
        producer.flush()
        child = os.fork()
        if not child:
            is_right = False
            try:
                with suppress(RuntimeError):
                    producer.append("in the wrong process")
                    producer.flush()
                    os._exit(1)
                for number in range(50):
                    stream.append(f"child {number}")
                is_right = True
            finally:
                os._exit(0 if is_right else 2)
        for number in range(50):
            stream.append(f"parent {number}")
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        producer.append("after")
        producer.flush()
        with stream.read(mode="catch-up") as batches:
            seen = [message for batch in batches for message in batch.messages]
    assert len(seen) == 102
    assert [message for message in seen if message.startswith("child")] == [f"child {number}" for number in range(50)]
    assert [message for message in seen if message.startswith("parent")] == [f"parent {number}" for number in range(50)]


def test_offsets_are_the_servers_and_none_is_made_here() -> None:
    sources = (Path(blocking.__file__).parent).glob("*.py")
    assert not any(re.search(r"int\([a-z_.]*offset|offset\[", source.read_text()) for source in sources)
