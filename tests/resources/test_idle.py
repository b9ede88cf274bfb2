"""Thousands of connections that wait for something to read, to a real server in a process of its own."""

from pathlib import Path

import pytest
from tests.resources.idle import hold_idle
from tests.resources.limits import room_for
from tests.resources.server import server

AFFORDABLE_BYTES = 100_000

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


async def test_five_thousand_idle_readers_are_all_told_what_comes_and_cost_nothing_when_they_have_gone(tmp_path: Path) -> None:
    database = tmp_path / "streams.db"
    async with server(database) as running:
        cost = await hold_idle(running, database, connections=room_for(5_000), streams=50)

    assert cost.wrong == 0
    assert cost.left_over == {}
    assert cost.bytes_each < AFFORDABLE_BYTES
