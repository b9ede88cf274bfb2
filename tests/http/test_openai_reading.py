"""The Responses API as it is read: what that costs, and what is told while a Response changes, is deleted, or is lost."""

import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import anyio
import httpx
import pytest
from tests.core.helpers import BackupStorage
from tests.http.servers import http_to
from tests.http.test_openai import Holding, Json, Produce, events_in, served, text_of, words

from streamkeep import StreamManager
from streamkeep.http import StreamsHTTP
from streamkeep.integrations.openai import OpenAIResponses, ResponseRequest
from streamkeep.storage import Head, Page, Storage
from streamkeep.storages.memory import MemoryStorage

DELTAS = 2_000


class CountingStorage(MemoryStorage):
    """Counts the records that are read."""

    records = 0

    async def read(self, stream: str, start: int = 0, limit: int = 0) -> Page | None:
        page = await super().read(stream, start, limit)
        self.records += 0 if page is None else len(page.records)
        return page

    def taken(self) -> int:
        """Give how many they were since this was last asked."""
        records, self.records = self.records, 0
        return records


class SlowStorage(MemoryStorage):
    """Stores no event before it may."""

    def __init__(self) -> None:
        super().__init__()
        self.reached, self.may_store = anyio.Event(), anyio.Event()

    async def commit(self, stream: str, seen: int | None, head: Head, records: Sequence[bytes] = ()) -> bool:
        if records:
            self.reached.set()
            await self.may_store.wait()
        return await super().commit(stream, seen, head, records)


@asynccontextmanager
async def over(storage: Storage, produce: Produce) -> AsyncGenerator[tuple[httpx.AsyncClient, StreamManager]]:
    async with (
        StreamManager(storage) as streams,
        StreamsHTTP(streams, drain=timedelta(0)) as streams_http,
        http_to(OpenAIResponses(streams_http, produce)) as http,
    ):
        yield http, streams


class Talking:
    """Says many words, and then waits; then it says one more, as often as it may."""

    def __init__(self, deltas: int = DELTAS) -> None:
        self.deltas = deltas
        self.send, self.receive = anyio.create_memory_object_stream[str]()

    async def words(self, _: ResponseRequest) -> AsyncGenerator[str]:
        for _number in range(self.deltas):
            yield "x"
        with self.send, self.receive:
            async for word in self.receive:
                yield word

    async def begun(self, http: httpx.AsyncClient, streams: StreamManager) -> str:
        stream: str = (await http.post("/responses", json={"input": "hi", "background": True})).json()["id"]
        await stored(streams, stream, self.deltas + 4)
        return stream


async def stored(streams: StreamManager, stream: str, events: int) -> None:
    with anyio.fail_after(30):
        async with streams.subscribe(stream) as found:
            while events > 0:
                events -= len(await found.batch())


async def test_a_response_that_is_looked_at_again_is_not_read_again() -> None:
    storage, talking = CountingStorage(), Talking()
    async with over(storage, talking.words) as (http, streams):
        id = await talking.begun(http, streams)
        storage.taken()
        assert text_of((await http.get(f"/responses/{id}")).json()) == "x" * DELTAS
        assert storage.taken() >= DELTAS
        await talking.send.send("y")
        await stored(streams, id, DELTAS + 5)
        storage.taken()
        assert text_of((await http.get(f"/responses/{id}")).json()) == "x" * DELTAS + "y"
        assert storage.taken() <= 1
        stopped = (await http.post(f"/responses/{id}/cancel")).json()
        assert (stopped["status"], text_of(stopped)) == ("cancelled", "x" * DELTAS + "y")
        storage.taken()
        assert (await http.get(f"/responses/{id}")).json() == stopped
        assert storage.taken() <= 2


async def test_of_a_response_that_has_ended_its_last_event_is_read_and_of_the_rest_what_is_asked_for() -> None:
    storage, talking = CountingStorage(), Talking()
    talking.send.close()
    async with over(storage, talking.words) as (http, _):
        whole = (await http.post("/responses", json={"input": "hi"})).json()
        storage.taken()
        assert (await http.get(f"/responses/{whole['id']}")).json() == whole
        assert storage.taken() <= 2
        last = DELTAS + 7
        events = events_in((await http.get(f"/responses/{whole['id']}?stream=true&starting_after={last - 1}")).text)
        assert storage.taken() <= 2
    assert [(event["sequence_number"], event["response"]) for event in events] == [(last, whole)]


async def test_a_response_that_the_storage_has_lost_a_part_of_is_what_is_left() -> None:
    for then in ("running", "cancelled"):
        storage, talking = BackupStorage(), Talking(1)
        async with over(storage, talking.words) as (http, streams):
            id = await talking.begun(http, streams)
            storage.back_up()
            await talking.send.send("y")
            await stored(streams, id, 6)
            before = (await http.get(f"/responses/{id}")).json()
            storage.go_back()
            if then == "cancelled":
                await streams.cancel(id)
            after = (await http.get(f"/responses/{id}")).json()
        assert (text_of(before), text_of(after)) == ("xy", "x")


@pytest.mark.parametrize("long", [False, True])
async def test_a_response_in_the_background_is_what_its_client_has_said_before_anything_of_it_is_stored(*, long: bool) -> None:
    storage = SlowStorage()
    metadata = {f"{number}": "x" * 500 for number in range(16)} if long else {"a": "b"}
    said = {"model": "any", "metadata": metadata, "background": True, "previous_response_id": "resp_before"}
    begun: list[Json] = []

    async def begin(http: httpx.AsyncClient) -> None:
        begun.append((await http.post("/responses", json={"input": "hi", **said})).json())

    async with over(storage, words) as (http, _), anyio.create_task_group() as tasks:
        with anyio.fail_after(10):
            tasks.start_soon(begin, http)
            await storage.reached.wait()
            if long:  # then it is not known before it is stored
                await anyio.wait_all_tasks_blocked()
                assert not begun
                storage.may_store.set()
            while not begun:
                await anyio.lowlevel.checkpoint()
            found = (await http.get(f"/responses/{begun[0]['id']}")).json()
            storage.may_store.set()
    if not long:
        assert (found, found["status"]) == (begun[0], "queued")
    assert {name: found[name] for name in said} == said


async def test_who_waits_for_a_response_that_is_deleted_is_told_that_it_is_not_there() -> None:
    holding, found = Holding(), list[Any]()

    async def words_of(request: ResponseRequest) -> AsyncGenerator[str]:
        found.append(request.id)
        async for word in holding.words(request):
            yield word

    async def wait(http: httpx.AsyncClient) -> None:
        found.append(await http.post("/v1/responses", json={"input": "hi"}))

    async with served(words_of) as http, anyio.create_task_group() as tasks:
        with anyio.fail_after(10):
            tasks.start_soon(wait, http)
            await holding.is_stored.wait()
            await http.delete(f"/v1/responses/{found[0]}")
    assert found[1].status_code == 404
    assert found[1].json()["error"]["type"] == "invalid_request_error"


async def test_who_waits_for_a_response_when_its_manager_closes_is_told_so(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    holding, found = Holding(), list[httpx.Response]()

    async def wait(http: httpx.AsyncClient) -> None:
        found.append(await http.post("/responses", json={"input": "hi"}))

    async with over(MemoryStorage(), holding.words) as (http, streams), anyio.create_task_group() as tasks:
        with anyio.fail_after(10):
            tasks.start_soon(wait, http)
            await holding.is_stored.wait()
            await streams.aclose()
    assert (found[0].status_code, found[0].json()["error"]["code"]) == (503, "unavailable")
