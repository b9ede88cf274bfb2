"""Random histories of all that streams may be asked, by rivals through two servers, against a model (`model`)."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Final, Literal

import anyio
import anyio.to_thread
import httpx
import pytest
from tests.durable_streams.conftest import Open
from tests.durable_streams.model import Asked, Request, answer_of, why_impossible
from tests.durable_streams.served import Server

from streamkeep.durable_streams import DurableStreamsLimits
from streamkeep.storages.memory import MemoryStorage
from streamkeep.testing.faults import FaultyStorage

BOUND_SECONDS: Final = 50
PATHS: Final = ("a", "b", "c")
OPERATIONS: Final[Sequence[Literal["commit", "read", "delete", "scan"]]] = ("commit", "commit", "read", "delete", "scan")
METHODS: Final = {"fork": "put", "long-poll": "get"}
KINDS: Final = ("application/json", "text/plain")


@dataclass
class History:
    """What happens, in one order."""

    random: random.Random
    requests: list[Request] = field(default_factory=list)
    moment: int = 0
    offsets: list[str] = field(default_factory=list)

    def next_moment(self) -> int:
        """Count what happens."""
        self.moment += 1
        return self.moment

    async def ask(self, client: httpx.AsyncClient, asked: Asked) -> Request:
        """Send a request, and note what becomes of it."""
        request = Request(len(self.requests), asked, self.next_moment())
        self.requests.append(request)
        try:
            response = await client.request(
                METHODS.get(asked.what, asked.what).upper(),
                asked.path,
                headers=headers_of(asked),
                content=f'"{asked.text}"' if asked.text else b"",
                params=params_of(asked),
            )
        except httpx.ConnectError:
            request.is_nothing = True
            await anyio.sleep(0.05)
            return request
        except httpx.TransportError:
            return request
        if response.status_code != 503:
            assert response.status_code < 500, response.text
            texts = tuple(re.findall(r'"([^"]*)"', response.text)) if asked.what in {"get", "long-poll"} else None
            is_body = response.status_code == 200 and texts is not None
            request.answer = answer_of(response.status_code, response.headers, texts if is_body else None)
            if "stream-next-offset" in response.headers:
                self.offsets.append(response.headers["stream-next-offset"])
        request.answered = self.next_moment() if request.answer is not None else float("inf")
        return request


def headers_of(asked: Asked) -> dict[str, str]:
    headers = {} if asked.what == "fork" else {"content-type": asked.kind}
    if asked.closes:
        headers["stream-closed"] = "true"
    if asked.seq:
        headers["stream-seq"] = asked.seq
    if asked.tag is not None:
        headers |= {f"producer-{name}": str(value) for name, value in zip(("id", "epoch", "seq"), asked.tag, strict=True)}
    if asked.what == "fork":
        headers["stream-forked-from"] = asked.source
        if asked.offset is not None:
            headers["stream-fork-offset"] = asked.offset
    return headers


def params_of(asked: Asked) -> dict[str, str]:
    if asked.what not in {"get", "long-poll"}:
        return {}
    live = {"live": "long-poll"} if asked.what == "long-poll" else {}
    return {"offset": asked.offset or "-1", **live}


@dataclass
class Client:
    """One who asks: for anything, and as an idempotent producer of its own for what it has no answer to, again."""

    history: History
    servers: Sequence[httpx.AsyncClient]
    name: str
    producers: dict[str, tuple[int, int]] = field(default_factory=dict)
    again: Asked | None = None

    async def run(self, steps: int) -> None:
        """Ask for something, again and again."""
        for step in range(steps):
            asked = self.again or self.next(f"{self.name}{step}")
            request = await self.history.ask(self.history.random.choice(self.servers), asked)
            self.again = asked if asked.tag is not None and request.answer is None else None
            if asked.tag is not None and request.answer is not None:
                producer, epoch, seq = asked.tag
                self.producers[producer + asked.path] = (epoch, seq + 1 if request.answer.code in {200, 204} else seq)

    def next(self, text: str) -> Asked:
        """Choose what to ask for."""
        chance = self.history.random
        path, kind = chance.choice(PATHS), KINDS[chance.random() < 0.95]
        offset = chance.choice(self.history.offsets) if self.history.offsets and chance.random() < 0.5 else None
        what = chance.choices(
            ["put", "fork", "post", "produce", "close", "delete", "head", "get", "long-poll"], [15, 15, 20, 25, 4, 5, 5, 20, 5]
        )[0]
        match what:
            case "put":
                return Asked("put", path, chance.choice([text, ""]), closes=chance.random() < 0.1, kind=kind)
            case "fork":
                body, source = chance.choice([text, ""]), chance.choice(PATHS)
                return Asked("fork", path, body, closes=chance.random() < 0.1, source=source, offset=offset)
            case "post":
                seq = f"{chance.randrange(30):02}" if chance.random() < 0.3 else ""
                return Asked("post", path, text, closes=chance.random() < 0.05, kind=kind, seq=seq)
            case "produce":
                return self._produced(path, text, kind)
            case "close":
                return Asked("post", path, closes=True)
            case "get" | "long-poll":
                return Asked(what, path, offset=offset)
            case _:
                return Asked("delete" if what == "delete" else "head", path)

    def _produced(self, path: str, text: str, kind: str) -> Asked:
        chance = self.history.random
        producer = chance.choice([self.name, "shared"])
        epoch, seq = self.producers.get(producer + path, (0, 0))
        match chance.randrange(12):
            case 0:
                epoch, seq = epoch + 1, chance.choice([0, 0, 1])
            case 1:
                seq += 1
            case 2:
                seq = max(0, seq - 1)
            case 3:
                epoch = max(0, epoch - 1)
            case _:
                pass
        closes = chance.random() < 0.05
        body = "" if closes and chance.random() < 0.5 else text
        return Asked("post", path, body, closes=closes, kind=kind, tag=(producer, epoch, seq))


def check(history: History) -> None:
    """Check that what was answered is possible."""
    reads = {"get", "head", "long-poll"}
    some = [
        request for request in history.requests if request.answer or not (request.is_nothing or request.asked.what in reads)
    ]
    why = why_impossible(some)
    assert why is None, f"no order of these is possible:\n{why}"


async def fail(storage: FaultyStorage, chance: random.Random) -> None:
    """Have the storage fail, in each way that a storage may, until this is cancelled; not each time that it is asked."""
    due = dict.fromkeys(OPERATIONS, 0)
    while True:
        operation = chance.choice(OPERATIONS)
        if storage.calls[operation] >= due[operation]:
            if chance.random() < 0.5:
                storage.lose_answer(operation)
                due[operation] = storage.calls[operation] + 3
            else:
                storage.refuse(operation, times=2)
                due[operation] = storage.calls[operation] + 4
        await anyio.sleep(0.01)


async def live(history: History, servers: Sequence[httpx.AsyncClient], clients: int, steps: int) -> None:
    async with anyio.create_task_group() as tasks:
        for number in range(clients):
            tasks.start_soon(Client(history, servers, "pqrs"[number]).run, steps)


@pytest.mark.promise("P27")
@pytest.mark.parametrize("seed", [pytest.param(seed, marks=pytest.mark.slow if seed > 2 else []) for seed in range(30)])
async def test_whatever_is_asked_at_once_is_answered_as_if_it_was_one_after_the_other(open_client: Open, seed: int) -> None:
    storage, history = FaultyStorage(MemoryStorage()), History(random.Random(seed))
    limits = DurableStreamsLimits(long_poll=timedelta(seconds=0.02))
    async with open_client(storage, limits=limits) as one, open_client(storage, limits=limits) as other:
        with anyio.fail_after(BOUND_SECONDS):
            async with anyio.create_task_group() as faults:
                if seed % 3:
                    faults.start_soon(fail, storage, history.random)
                await live(history, [one, other], 3, 40)
                faults.cancel_scope.cancel()
            await read_all(history, one)
    check(history)


async def read_all(history: History, client: httpx.AsyncClient) -> None:
    for path in PATHS:
        while (await history.ask(client, Asked("get", path))).answer is None:
            pass


async def killing(servers: Sequence[Server], chance: random.Random) -> None:
    """Kill servers, and start them again, until this is cancelled."""
    while True:
        await anyio.sleep(0.1 + chance.random() * 0.4)
        server = chance.choice(servers)
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(server.kill)
            await anyio.to_thread.run_sync(server.start)


@pytest.mark.promise("P27")
@pytest.mark.parametrize("seed", [pytest.param(seed, marks=pytest.mark.slow if seed else []) for seed in range(8)])
async def test_servers_that_are_killed_have_answered_nothing_that_is_not_so(tmp_path: Path, seed: int) -> None:
    history, url = History(random.Random(seed)), f"sqlite:///{tmp_path / 'streams.db'}"
    options = '{"long_poll": 0.02}'
    with Server(url, tmp_path / "one", options) as one, Server(url, tmp_path / "other", options) as other:
        async with (
            httpx.AsyncClient(base_url=one.url, timeout=20) as first,
            httpx.AsyncClient(base_url=other.url, timeout=20) as second,
        ):
            with anyio.fail_after(BOUND_SECONDS):
                async with anyio.create_task_group() as kills:
                    kills.start_soon(killing, [one, other], history.random)
                    await live(history, [first, second], 3, 80)
                    kills.cancel_scope.cancel()
                await read_all(history, first)
    check(history)
