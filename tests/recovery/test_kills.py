"""Processes that are killed in the middle of answers: each reader has one whole answer, and no token is paid twice."""

from pathlib import Path

import pytest
from tests.recovery.rounds import rounds


@pytest.mark.promise("P24")
@pytest.mark.timeout(240)
@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
async def test_readers_of_killed_processes_have_one_whole_answer_each(tmp_path: Path, seed: int) -> None:
    async with rounds(tmp_path, seed) as campaign:
        for _ in range(2):
            await campaign.round(3)
        generations = await campaign.generations()
    assert campaign.faults == []
    assert campaign.recoveries
    assert set(generations.values()) == {1}, "the provider has generated an answer twice"
