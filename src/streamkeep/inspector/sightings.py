"""Sightings: when this process has seen the events of one stream arrive. Pure, and bounded.

Stored events have no time of their own. What is known of their pace is what somebody has seen who followed the stream live.
"""

from collections import deque
from collections.abc import Sequence
from typing import Final

import msgspec

MAX_RUNS: Final = 20_000
SAME_SECONDS: Final = 0.01
"""What arrives within so short a time counts as one arrival, so that a stream that is written very fast needs no more room than others."""


class Run(msgspec.Struct, frozen=True, array_like=True):
    """Events that arrived together.

    Attributes:
        first: the offset of the first one.
        count: how many there are.
        at: when they arrived, in seconds since the epoch, by the storage's clock; it never goes back from one run to the next.
        latency: how many seconds before the newest of them had been stored.
    """

    first: int
    count: int
    at: float
    latency: float

    @property
    def end(self) -> int:
        """The offset behind the last one."""
        return self.first + self.count


class Sightings:
    """When events of one stream arrived: runs, by offset, the newest ones that there is room for."""

    def __init__(self, life: str, max_runs: int = MAX_RUNS) -> None:
        self.life = life
        self._runs: deque[Run] = deque(maxlen=max_runs)

    def see(self, first: int, count: int, at: float, latency: float) -> Sequence[Run]:
        """Take in that events have arrived, and give what is new of that: others who follow may have seen them already."""
        last = self._runs[-1] if self._runs else Run(first, 0, at, 0.0)
        seen = max(0, last.end - first) if self._runs else 0
        if seen >= count:
            return ()
        run = Run(first + seen, count - seen, max(at, last.at), max(0.0, latency))
        if self._runs and run.first == last.end and run.at - last.at < SAME_SECONDS:
            self._runs[-1] = Run(last.first, last.count + run.count, last.at, max(last.latency, run.latency))
        else:
            self._runs.append(run)
        return (run,)

    def since(self, first: int) -> Sequence[Run]:
        """Give the runs that reach to this offset or beyond it, oldest first."""
        return [run for run in self._runs if run.end > first]

    def times(self, first: int, count: int) -> Sequence[float | None]:
        """Give when so many events from this offset on arrived; None for those that nobody has seen arrive."""
        times: list[float | None] = [None] * count
        for run in reversed(self._runs):
            if run.end <= first:
                break
            for offset in range(max(run.first, first), min(run.end, first + count)):
                times[offset - first] = run.at
        return times
