"""The simulation over the storages that are built in; and that it would find what it looks for."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from streamkeep.storage import Storage
from streamkeep.storages.memory import MemoryStorage
from streamkeep.storages.sqlite import SQLiteStorage

from .histories import Outcome, simulate
from .planted import BUGS, Plant
from .suite import SimulationSuite

ENOUGH = 400
"""In so many histories a bug is found that does harm in one of fifty, but once in three thousand."""

DIGESTS = """
import hashlib
from streamkeep.storages.memory import MemoryStorage
from tests.simulation.histories import simulate
print([hashlib.sha256(simulate(seed, MemoryStorage).trace).hexdigest() for seed in range(5)])
"""


class TestMemory(SimulationSuite):
    @pytest.fixture
    def open_storage(self) -> Callable[[], Storage]:
        return MemoryStorage


class TestSQLite(SimulationSuite):
    @pytest.fixture
    def open_storage(self, tmp_path: Path) -> Callable[[], Storage]:
        return lambda: SQLiteStorage(tmp_path / "streams.db", synchronous="NORMAL")


@pytest.mark.slow
@pytest.mark.parametrize("plant", BUGS, ids=lambda plant: plant.__name__)
@pytest.mark.timeout(400)
def test_a_planted_bug_is_found(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)

    assert any(simulate(seed, MemoryStorage, BUGS[plant]).violations for seed in range(ENOUGH))


@pytest.mark.timeout(400)
def test_the_same_seed_gives_the_same_bytes_in_another_process_too() -> None:
    here = [hashlib.sha256(simulate(seed, MemoryStorage).trace).hexdigest() for seed in range(5)]
    environment = {**os.environ, "PYTHONHASHSEED": "4711"}

    there = subprocess.run(
        [sys.executable, "-c", DIGESTS],
        cwd=Path(__file__).parents[2],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        timeout=200,
        check=True,
    )

    assert there.stdout.strip() == str(here)
    assert len(set(here)) == len(here)


@pytest.mark.timeout(400)
def test_the_same_seed_gives_the_same_bytes_over_another_storage(tmp_path: Path) -> None:
    for seed in range(5):
        over_sqlite = simulate(seed, lambda: SQLiteStorage(tmp_path / "streams.db", synchronous="NORMAL"))

        assert over_sqlite.trace == simulate(seed, MemoryStorage).trace


@pytest.mark.timeout(400)
def test_histories_come_to_all_that_can_happen() -> None:
    missed = {
        "cancelled",
        "close",
        "deleted",
        "done",
        "dropped",
        "error",
        "events read",
        "killed",
        "opened",
        "read to the end",
        "resumed",
        "started",
        "told what runs",
        "timed out",
        "writer told ABORTED",
        "writer told FAILED_PRECONDITION",
        "writer told NOT_FOUND",
    }
    for seed in range(100):
        missed -= simulate(seed, MemoryStorage).reached.keys()
        if not missed:
            break
    assert not missed


def test_a_violation_is_shown_with_its_seed_and_what_led_to_it() -> None:
    outcome = Outcome(42, ("the order was lost",), {}, b"    0.000000 what happened")

    assert str(outcome) == "seed 42:\nthe order was lost\n\n    0.000000 what happened"
