"""Random histories: producers that lose answers, take over from one another, and close, through two servers of one storage that fails."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import anyio
import httpx
import pytest
from tests.durable_streams.conftest import Open

from streamkeep.storages.memory import MemoryStorage
from streamkeep.testing.faults import FaultyStorage

JSON: Final = {"content-type": "application/json"}
STEPS: Final = 25
TRIES: Final = 200


@dataclass
class History:
    """What was asked for, and what was answered."""

    random: random.Random
    certain: list[str] = field(default_factory=list)
    """What was accepted, or known to be there already."""
    uncertain: set[str] = field(default_factory=set)
    refused: set[str] = field(default_factory=set)
    is_closed: bool = False
    unknown_answers: int = 0


def headers_of(name: str, epoch: int, seq: int) -> Mapping[str, str]:
    return {**JSON, "producer-id": name, "producer-epoch": str(epoch), "producer-seq": str(seq)}


async def produce(client: httpx.AsyncClient, history: History, name: str) -> None:
    """Append as an idempotent producer: what is not answered is sent again, and a new epoch may begin at any time."""
    epoch, seq = 0, 0
    for step in range(STEPS):
        if history.random.random() < 0.1:
            epoch, seq = epoch + 1, 0
        text = f"{name}.{epoch}.{seq}.{step}"
        closes = {"stream-closed": "true"} if history.random.random() < 0.005 else {}
        tries = 0
        while (
            answer := await client.post("s", headers={**headers_of(name, epoch, seq), **closes}, content=f'["{text}"]')
        ).status_code == 503:
            tries += 1
            assert tries < TRIES
        history.unknown_answers += tries
        if answer.status_code in {200, 204}:
            history.certain.append(text)
            history.is_closed |= answer.headers.get("stream-closed") == "true"
            seq += 1
        else:
            assert answer.status_code == 409, answer.text
            assert answer.headers["stream-closed"] == "true"
            # The text has a closed stream refuse also what it has taken before (5.2.1): who had no answer then does not know.
            (history.uncertain if tries else history.refused).add(text)
            return


async def append(client: httpx.AsyncClient, history: History, name: str) -> None:
    """Append as anybody: what is not answered is not sent again."""
    for step in range(STEPS):
        text = f"{name}.{step}"
        answer = await client.post("s", headers=JSON, content=f'["{text}"]')
        match answer.status_code:
            case 204:
                history.certain.append(text)
            case 503:
                history.uncertain.add(text)
                history.unknown_answers += 1
            case code:
                assert (code, answer.headers["stream-closed"]) == (409, "true")
                history.refused.add(text)


async def fail(storage: FaultyStorage, history: History) -> None:
    """Have the storage fail, in each way that a storage may, until this is cancelled."""
    while True:
        match history.random.randrange(5):
            case 0 | 1:
                storage.lose_answer("commit")
            case 2:
                storage.refuse("commit")
            case 3:
                storage.lose_answer("commit")
                storage.refuse("read", times=2)
            case _:
                storage.skip("commit", times=2)
        await anyio.sleep(0.004)


async def follow(client: httpx.AsyncClient, seen: list[str]) -> None:
    """Read by long-polls, as a client does that knows nothing else."""
    offset = "-1"
    while True:
        answer = await client.get("s", params={"offset": offset, "live": "long-poll"})
        if answer.status_code not in {200, 204}:
            assert answer.status_code == 503
            continue
        seen += answer.json() if answer.status_code == 200 else []
        before, offset = offset, answer.headers["stream-next-offset"]
        assert before <= offset
        if answer.headers.get("stream-closed") == "true":
            return


@pytest.mark.promise("P27")
@pytest.mark.parametrize("seed", [pytest.param(seed, marks=pytest.mark.slow if seed > 2 else []) for seed in range(12)])
async def test_each_append_is_stored_once_in_its_producers_order_whatever_is_lost(open_client: Open, seed: int) -> None:
    storage, history = FaultyStorage(MemoryStorage()), History(random.Random(seed))
    seen: list[str] = []
    async with open_client(storage) as one, open_client(storage) as other:
        assert (await one.put("s", headers=JSON)).status_code == 201
        with anyio.fail_after(50):
            async with anyio.create_task_group() as readers:
                readers.start_soon(follow, other, seen)
                async with anyio.create_task_group() as faults:
                    faults.start_soon(fail, storage, history)
                    async with anyio.create_task_group() as writers:
                        for number, client in enumerate([one, other] * 3):
                            writers.start_soon(produce if number < 4 else append, client, history, "pqrsab"[number])
                    faults.cancel_scope.cancel()
                while (await one.post("s", headers={"stream-closed": "true"})).status_code == 503:
                    pass
        stored = (await one.get("s")).json()

    assert history.unknown_answers
    assert seen == stored  # as it was read live, so it stays
    assert len(set(stored)) == len(stored)
    assert set(history.certain) <= set(stored) <= set(history.certain) | history.uncertain
    assert not history.refused & set(stored)
    for name in "pqrsab":
        own = [text for text in stored if text[0] == name]
        assert [text for text in own if text in set(history.certain)] == [text for text in history.certain if text[0] == name]
