"""The disk refuses at a write or a sync, once or until there is space, and the power fails at some moment afterwards."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import pytest
from tests.powerloss.cuts import Findings, Plan
from tests.powerloss.disk import Disk, Image
from tests.powerloss.faults import KINDS, NEVER, Kind, Refusals, Trouble
from tests.powerloss.recorder import Tape, recorded
from tests.powerloss.recovery import DATABASE, recover
from tests.powerloss.workload import Size

from streamkeep import StorageError, StorageFullError, StreamManager
from streamkeep.storages.sqlite import SQLiteStorage
from streamkeep.storages.sqlite._database import Synchronous

SEED: Final = 1
SHORT: Final = Size(sessions=2, steps=3)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("synchronous", ["FULL", "NORMAL"])
@pytest.mark.promise("P16")
async def test_who_tries_again_after_a_refusal_has_everything_stored_once(
    kind: Kind, synchronous: Synchronous, tmp_path: Path
) -> None:
    findings = Findings()
    await Refusals(Plan(SEED, synchronous, SHORT), tmp_path, findings).run(kind, times=2)
    assert findings.complaints == []
    assert findings.counts["refusals"] == 2


@pytest.mark.promise("P16")
async def test_a_commit_that_could_not_be_synced_is_not_acknowledged_until_it_has_been_synced_again(tmp_path: Path) -> None:
    """Linux says once that a sync has failed, and takes what was not written for clean; so it must be written again."""
    trouble, disk = Trouble("a sync fails", first=NEVER), Disk()
    tape = Tape(disk, trouble)
    with recorded(tape):
        async with SQLiteStorage(tmp_path / DATABASE) as storage, StreamManager(storage) as streams:
            stream = await streams.open("answer")
            trouble.first = trouble.met
            with pytest.raises(StorageError) as raised:
                await stream.write("kept")
            assert not isinstance(raised.value, StorageFullError)
            assert stream.tail == 0
            refused = disk.without_power()
            await stream.flush()
            assert stream.tail == 1
            tried_again = disk.without_power()
    assert await records_in(refused, tmp_path / "refused") == ()
    assert await records_in(tried_again, tmp_path / "tried again") == (b'c"kept"',)


async def records_in(image: Image, directory: Path) -> Sequence[bytes]:
    state = await recover(image, directory)
    return state["answer"][1]
