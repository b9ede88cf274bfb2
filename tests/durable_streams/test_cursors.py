"""Subscriptions of many streams: each event is given to a worker, and the head does not grow with them."""

import random
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Final

import anyio
import httpx
import pytest
from anyio.lowlevel import checkpoint
from tests.durable_streams.conftest import Open

from streamkeep.durable_streams import _paths, _subscriptions, _wakes
from streamkeep.durable_streams._wakes import Config, Place, Subscription
from streamkeep.storages.memory import MemoryStorage
from streamkeep.testing.faults import FaultyStorage

BOUND_SECONDS: Final = 40
TEXT: Final = {"content-type": "text/plain"}
JSON: Final = {"content-type": "application/json"}
PULL: Final = {"type": "pull-wake", "pattern": "events/*", "wake_stream": "wake"}
SUBSCRIPTION: Final = "__ds/subscriptions/s"


@dataclass
class Worker:
    """Claims, notes what it is given, and says that it is done."""

    client: httpx.AsyncClient
    given: dict[str, list[tuple[str, str]]] = field(default_factory=lambda: defaultdict(list))
    most: int = 0

    async def work(self) -> bool:
        """Do what there is; False: there is nothing."""
        claimed = await self.client.post(f"{SUBSCRIPTION}/claim", json={"worker": "w"})
        if claimed.status_code != 200:
            assert claimed.json()["error"]["code"] == "NO_PENDING_WORK", claimed.text
            return False
        wake = claimed.json()
        self.most = max(self.most, len(wake["streams"]))
        pending = [stream for stream in wake["streams"] if stream["has_pending"]]
        ack = {
            "wake_id": wake["wake_id"],
            "generation": wake["generation"],
            "acks": [{"stream": stream["path"], "offset": stream["tail_offset"]} for stream in pending],
            "done": True,
        }
        acked = await self.client.post(f"{SUBSCRIPTION}/ack", json=ack, headers={"authorization": f"Bearer {wake['token']}"})
        assert acked.status_code == 200, acked.text
        for stream in pending:
            self.given[stream["path"]].append((stream["acked_offset"], stream["tail_offset"]))
        return True


async def size_of(storage: MemoryStorage | FaultyStorage) -> int:
    page = await storage.read(_paths.subscription_id("s"))
    assert page is not None
    return len(_wakes.subscription_of(page.head).links)


@pytest.mark.promise("P27")
@pytest.mark.parametrize("seed", range(4))
async def test_however_many_streams_wait_each_event_is_given_once_and_the_head_is_bounded(
    open_client: Open, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(_wakes, "MAX_LINKS", 8)
    chance, storage = random.Random(seed), MemoryStorage()
    paths = [f"events/{number}" for number in range(60)]
    begins, ends = dict[str, str](), dict[str, str]()
    async with open_client(storage, subscriptions="local") as one, open_client(storage, subscriptions="local") as other:
        clients, worker = [one, other], Worker(one)
        await one.put("wake", headers=JSON)
        for path in paths[:40]:  # they are there before the subscription, and so is what is in them
            begins[path] = (await one.put(path, headers=TEXT, content="old")).headers["stream-next-offset"]
        assert (await one.put(SUBSCRIPTION, json=PULL)).status_code == 201
        with anyio.fail_after(BOUND_SECONDS):
            for step in range(300):
                path = chance.choice(paths)
                client = chance.choice(clients)
                if path not in begins:
                    begins[path] = (await client.put(path, headers=TEXT)).headers["stream-next-offset"]
                ends[path] = (await client.post(path, headers=TEXT, content="new")).headers["stream-next-offset"]
                if chance.random() < 0.05:
                    worker.client = chance.choice(clients)
                    await worker.work()
                if step % 10 == 0:
                    assert await size_of(storage) <= 8
            while {path: given[-1][1] for path, given in worker.given.items()} != ends:
                await worker.work()
    assert worker.most <= 8
    for path, given in worker.given.items():
        assert given[0][0] == begins[path]
        assert [end for _, end in given[:-1]] == [begin for begin, _ in given[1:]]  # nothing is left out, or given again


async def test_a_stream_that_begins_through_two_servers_is_processed_from_its_beginning() -> None:
    there = Subscription("s", "life", "by", Config("pull-wake", "**", (), "", "wake", 1_000), 0.0, is_backfilled=True)
    for tail in [2, 1]:  # whoever has appended what came last may tell of it first
        there = _wakes.notice(there, {"a": Place("l", f"{0:016d}_l", f"{tail:016d}_l")}, {}).there
    assert there.links["a"].acked == f"{0:016d}_l"
    assert there.links["a"].tail == f"{2:016d}_l"


async def test_a_fork_that_takes_the_place_of_another_one_has_events_of_its_own(open_client: Open) -> None:
    async with open_client(subscriptions="local") as client:
        worker = Worker(client)
        await client.put("wake", headers=JSON)
        await client.put("source", headers=TEXT, content="1")
        assert (await client.put(SUBSCRIPTION, json=PULL)).status_code == 201
        forked = {"stream-forked-from": "source"}
        await client.put("events/a", headers=forked)
        for text in "23":
            await client.post("events/a", headers=TEXT, content=text)
        with anyio.fail_after(BOUND_SECONDS):
            while not worker.given["events/a"] or worker.given["events/a"][-1][1][:16] != f"{3:016d}":
                await worker.work()
            worker.given.clear()
            await client.delete("events/a")
            await client.put("events/a", headers=forked)
            await client.post("events/a", headers=TEXT, content="2")
            while not worker.given["events/a"]:
                await worker.work()
    assert [(begin[:16], end[:16]) for begin, end in worker.given["events/a"]] == [(f"{1:016d}", f"{2:016d}")]


async def test_what_was_appended_by_who_died_before_it_could_tell_wakes_somebody(
    open_client: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_subscriptions, "AGAIN_SECONDS", 0.05)
    storage = MemoryStorage()
    async with open_client(storage, subscriptions="local") as client, open_client(storage) as silent:
        await client.put("wake", headers=JSON)
        await client.put("events/old", headers=TEXT)
        assert (await client.put(SUBSCRIPTION, json=PULL)).status_code == 201
        await silent.post("events/old", headers=TEXT, content="1")
        await silent.put("events/new", headers=TEXT, content="1")
        worker = Worker(client)
        with anyio.fail_after(BOUND_SECONDS):
            assert (await client.get("wake?offset=-1&live=long-poll")).json()[0]["type"] == "wake"
            while worker.given.keys() != {"events/old", "events/new"}:
                await worker.work()


async def test_nothing_is_left_of_a_subscription_of_many_streams(open_client: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_wakes, "MAX_LINKS", 3)
    storage = MemoryStorage()

    async def parked() -> list[str]:
        return [id for id, _ in await storage.scan(_paths.CURSOR, 100) if id.startswith(_paths.CURSOR)]

    async with open_client(storage, subscriptions="local") as client:
        await client.put("wake", headers=JSON)
        for number in range(20):
            await client.put(f"events/{number}", headers=TEXT, content="1")
        for name in ["s", "kept"]:
            assert (await client.put(f"__ds/subscriptions/{name}", json=PULL)).status_code == 201
        assert len(await parked()) == 34
        assert (await client.delete(SUBSCRIPTION)).status_code == 204
        with anyio.fail_after(BOUND_SECONDS):
            while len(await parked()) > 17:
                await checkpoint()
        assert (await client.get("__ds/subscriptions/kept")).status_code == 200
    assert len(await parked()) == 17
