"""The doorbells of one process, where the suite of the contract does not reach."""

import asyncio

import pytest

from streamkeep.storages._doorbells import Doorbells


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_a_wait_that_asyncio_cancels_in_the_step_in_which_it_rings_loses_no_ring() -> None:
    doorbells: Doorbells[str] = Doorbells()
    async with doorbells.watch("s") as doorbell:
        waiting = asyncio.ensure_future(doorbell.wait())
        await asyncio.sleep(0)
        doorbells.ring(["s"])
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        async with asyncio.timeout(10):
            await doorbell.wait()


async def test_nobody_is_left_when_the_watchers_have_gone() -> None:
    doorbells: Doorbells[str] = Doorbells()
    async with doorbells.watch("s"), doorbells.watch("s"):
        assert doorbells
    assert not doorbells
    doorbells.ring(["s"])
    doorbells.ring_all()
