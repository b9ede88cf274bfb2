"""Cancellation and failure, injected at every await of the commit and read paths, one by one."""

from collections.abc import Iterator

import pytest

from .injection import RECOVERIES, strike_everywhere, ways_for
from .kinds import KINDS, Kind
from .scenarios import SCENARIOS, Scenario
from .world import Recovery


def one_recovery(number: int) -> Iterator[Recovery]:
    """Give one at each point, each in its turn; the campaign takes them all at every point."""
    yield RECOVERIES[number % len(RECOVERIES)]


@pytest.mark.promise("P2", "P4", "P6", "P8", "P14")
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_promises_are_kept_wherever_a_call_is_cancelled_or_the_storage_fails(kind: Kind, scenario: Scenario) -> None:
    struck = {way: strike_everywhere(kind, scenario, way, one_recovery) for way in ways_for(kind)}
    for way, count in struck.items():
        print(f"{kind.name}, {scenario.__name__}, {way.name}: {count}")
        assert count.points > 0
    assert sum(count.deflected for count in struck.values()) > 0, "it makes a difference"
