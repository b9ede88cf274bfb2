"""Storms of clients that connect and cut, at any byte and by RST or FIN: the server goes on, and gives everything back."""

import random
from pathlib import Path
from typing import Final

import pytest
from tests.http.servers import events_of
from tests.resources.clients import Client
from tests.resources.storms import COUNT_TO, LIVE, READS, Aftermath, served, start_a_flow, storms

SEED: Final = 19_991_231
ROUNDS: Final = 4
CLIENTS: Final = 200
NOTHING: Final = Aftermath([{}] * ROUNDS, is_faithful_served=True)

pytestmark = pytest.mark.timeout(300)


async def test_storms_of_readers_that_cut_leave_nothing_behind(tmp_path: Path) -> None:
    async with served(tmp_path / "streams.db") as (http, port):
        aftermath = await storms(http, port, READS, random.Random(SEED), rounds=ROUNDS, clients=CLIENTS)

    assert aftermath == NOTHING, f"seed {SEED}"


@pytest.mark.slow
async def test_storms_of_those_who_start_and_resume_leave_nothing_behind_and_each_flow_runs_to_its_end(tmp_path: Path) -> None:
    async with served(tmp_path / "streams.db") as (http, port):
        async with Client.connected(port) as client:
            await client.begin(start_a_flow())
            await client.read_to_the_end()
        ended = next(info.id for info in await http.streams.list() if info.id != "ended")
        requests = [start_a_flow(), *(start_a_flow(X_Genkit_Stream_Id=stream) for stream in (ended, LIVE, "none"))]

        aftermath = await storms(http, port, requests, random.Random(SEED), rounds=ROUNDS, clients=CLIENTS // 2)

        assert aftermath == NOTHING, f"seed {SEED}"
        flows = [info.id for info in await http.streams.list(limit=10_000) if info.id not in {LIVE, "ended"}]
        assert len(flows) > CLIENTS // 8
        for flow in flows:
            events = await events_of(http.streams, flow)
            assert events == [*(("chunk", number) for number in range(COUNT_TO)), ("done", {"counted": COUNT_TO})]
