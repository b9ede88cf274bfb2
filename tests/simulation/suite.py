"""SimulationSuite: random histories over a storage, as a pytest class to subclass."""

from collections.abc import Callable
from typing import Final

import pytest

from streamkeep.storage import Storage

from .histories import simulate

HISTORIES_A_TEST: Final = 5


class SimulationSuite:
    """Subclass it like `StorageSuite`, and pytest lives through fifty random histories over your storage; see `simulate`.

    The storage runs on asyncio, whatever the histories run on.
    """

    @pytest.fixture
    def open_storage(self) -> Callable[[], Storage]:
        """Give a function whose every call gives a storage, not entered, over this test's data."""
        raise NotImplementedError("override the fixture open_storage")

    @pytest.mark.timeout(300)  # a storage that is a server takes some ten seconds for them, where it has a core for itself
    @pytest.mark.parametrize(
        "first_seed",
        [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(HISTORIES_A_TEST, 50, HISTORIES_A_TEST))],
    )
    def test_the_promises_hold_in_random_histories(self, open_storage: Callable[[], Storage], first_seed: int) -> None:
        opened = 0
        for seed in range(first_seed, first_seed + HISTORIES_A_TEST):
            outcome = simulate(seed, open_storage)  # which leaves nothing behind, if the promises hold
            assert not outcome.violations, outcome
            opened += outcome.reached.get("opened", 0)
        assert opened
