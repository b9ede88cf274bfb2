"""Cancellation and failure, injected at every await of the commit and read paths, one by one. In all ways: `python -m tests.model`."""

from collections.abc import Callable, Sequence

import pytest

from .injection import CANCELLED, RECOVERIES, WAYS, Way, strike_everywhere
from .kinds import KINDS, Kind
from .scenarios import SCENARIOS, Scenario
from .world import Recovery

WAYS_OVER: dict[str, Sequence[Way]] = {
    "memory": WAYS,
    "memory-trio": (CANCELLED,),
    "sqlite": (CANCELLED,),
}
QUICK = {"memory-trio"}


def some(way: Way) -> Callable[[int], Sequence[Recovery]]:
    """Cancel at each point and fail in other ways at every third; with one recovery at each, each in its turn."""
    every = 1 if way is CANCELLED else 3

    def recoveries(number: int) -> Sequence[Recovery]:
        turn, rest = divmod(number + WAYS.index(way), every)
        return [] if rest else [RECOVERIES[turn % len(RECOVERIES)]]

    return recoveries


@pytest.mark.timeout(400)  # hundreds of runs
@pytest.mark.promise("P2", "P4", "P6", "P8", "P14")
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, id=kind.name, marks=[] if kind.name in QUICK else pytest.mark.slow) for kind in KINDS]
)
def test_promises_are_kept_wherever_a_call_is_cancelled_or_the_storage_fails(kind: Kind, scenario: Scenario) -> None:
    counts = [strike_everywhere(kind, scenario, way, some(way)) for way in WAYS_OVER[kind.name]]
    for way, count in zip(WAYS_OVER[kind.name], counts, strict=True):
        print(f"{kind.name}, {scenario.__name__}, {way.name}: {count}")
        assert count.points > 0, "it was struck"
    assert any(count.deflected for count in counts), "and felt it"
