"""The power fails at every write, sync, truncation and deletion of a workload, and while streamkeep recovers from that."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest
from tests.powerloss.cuts import Examiner, Findings, Plan, PowerCuts, record, run_workload
from tests.powerloss.disk import Disk, Image, Sync
from tests.powerloss.ledger import Begun, Unwanted, Written
from tests.powerloss.recorder import Tape
from tests.powerloss.workload import Size

from streamkeep.storages.sqlite._database import Synchronous

SEED: Final = 1
SHORT: Final = Size(sessions=2, steps=3)
NOTHING_SURVIVES: Final = 0

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]  # many small steps, on a machine that may have other things to do


@pytest.mark.parametrize("synchronous", ["FULL", "NORMAL"])
@pytest.mark.promise("P16")
async def test_a_power_cut_takes_nothing_acknowledged_and_with_normal_only_a_suffix(
    synchronous: Synchronous, tmp_path: Path
) -> None:
    findings = Findings()
    plan = Plan(SEED, synchronous, Size(sessions=2, steps=2), variants=1, recoveries=1)
    await PowerCuts(plan, tmp_path, findings).run()
    assert findings.complaints == []
    assert findings.counts["cuts"] > 80
    assert findings.counts["recoveries"] == 2


@pytest.mark.promise("P16")
async def test_what_is_shown_of_a_killed_process_survives_a_power_cut(tmp_path: Path) -> None:
    """It had written a commit, and not synced it yet; the one that comes after it reads that."""
    findings = Findings()
    plan = Plan(SEED, "FULL", Size(sessions=1, steps=2), NOTHING_SURVIVES)
    await PowerCuts(plan, tmp_path, findings).run_kills()
    assert findings.complaints == []
    assert findings.counts["recoveries"] > 5


async def test_a_disk_that_ignores_syncs_loses_what_was_acknowledged_and_is_found_out(tmp_path: Path) -> None:
    complaints = await complaints_without_syncs(Plan(SEED, "FULL", SHORT, NOTHING_SURVIVES), tmp_path)
    assert any("changes are sure" in complaint for complaint in complaints)


async def test_a_disk_that_ignores_syncs_damages_the_database_and_is_found_out(tmp_path: Path) -> None:
    complaints = await complaints_without_syncs(Plan(SEED, "NORMAL", SHORT, variants=1), tmp_path)
    assert any("damaged" in complaint or "not whole" in complaint for complaint in complaints)


async def test_the_same_seed_asks_for_the_same(tmp_path: Path) -> None:
    """How it is grouped into commits, and when a checkpoint comes, is chance's on a machine that is busy."""
    asked = [
        await asked_by(Plan(seed, "FULL", SHORT), tmp_path / str(number)) for number, seed in enumerate([SEED, SEED, SEED + 1])
    ]
    assert asked[0] == asked[1] != asked[2]


async def test_the_model_of_a_disk_with_power_holds_what_the_disk_holds(tmp_path: Path) -> None:
    disk = Disk()
    await run_workload(Plan(SEED, "FULL", SHORT), Tape(disk), tmp_path)
    assert disk.with_power() == sqlite_files(tmp_path)


def sqlite_files(directory: Path) -> Image:
    return {path.name: path.read_bytes() for path in directory.iterdir() if not path.name.endswith(("-lock", "-notify"))}


async def complaints_without_syncs(plan: Plan, directory: Path) -> Sequence[str]:
    findings = Findings()
    recording = await record(plan, directory / "workload")
    without = [entry for entry in recording.entries if not isinstance(entry, Sync)]
    await Examiner(plan, directory / "survived", findings).cut_everywhere(replace(recording, entries=without))
    return findings.complaints


async def asked_by(plan: Plan, directory: Path) -> Sequence[object]:
    recording = await record(plan, directory)
    return [entry for entry in recording.entries if isinstance(entry, Begun | Written | Unwanted)]
