"""Storages and streams behave as their models do, through random histories. More of them: `python -m tests.model`."""

from collections import Counter

import pytest

from .histories import run_histories
from .kinds import KINDS, Kind
from .storage_machine import StorageMachine
from .stream_machine import StreamMachine

SEED = 20_250_101

# Every error that a call can come to without the storage's help. Histories are added until each has been met: which ones a seed
# leads to changes with Hypothesis and with the machine.
OUTCOMES = {
    "InvalidArgumentError",
    "LimitExceededError",
    "OffsetOutOfRangeError",
    "StreamAlreadyExistsError",
    "StreamBusyError",
    "StreamCompletedError",
    "StreamInputClosedError",
    "StreamManagerClosedError",
    "StreamNotFoundError",
    "StreamTakenOverError",
    "success",
}
MARKED_KINDS = [pytest.param(kind, id=kind.name, marks=pytest.mark.slow if kind.name == "sqlite" else []) for kind in KINDS]


@pytest.mark.timeout(400)  # telling a failure as a short story takes its time
@pytest.mark.parametrize("kind", MARKED_KINDS)
def test_a_storage_behaves_as_its_model(kind: Kind) -> None:
    assert run_histories(StorageMachine, kind, examples=15, seed_number=SEED)["steps"] > 150


@pytest.mark.timeout(400)
@pytest.mark.promise("P1", "P4", "P5", "P6", "P7", "P8", "P12")
@pytest.mark.parametrize("kind", MARKED_KINDS)
def test_streams_behave_as_their_model(kind: Kind) -> None:
    met: Counter[str] = Counter()
    for seed_number in range(SEED, SEED + 20):
        met.update(run_histories(StreamMachine, kind, examples=15, seed_number=seed_number))
        if met.keys() >= OUTCOMES:
            break
    assert met.keys() >= OUTCOMES
