"""How often, and how fast, a client comes back. Reads no clock and draws no lot but those that it is given."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from .._durations import check_durations
from ..errors import InvalidArgumentError

_BIGGEST_EXPONENT: Final = 40
LIVED_SECONDS: Final = 5.0
"""A connection that has brought something, be it heartbeats, for so long is progress: what is silent may be at work."""


@dataclass(frozen=True, slots=True)
class Retry:
    """When a client comes back, and when it gives up.

    The pause before try number n is a random part of `first` times 2 to the n (full jitter), and of `longest` at most. A server's `retry:`
    takes the place of `first`. What a server asks for by `Retry-After` is waited in any case, and the pause after that.

    Attributes:
        tries: so many in a row may bring nothing new; then it gives up. 0: it never comes back. None: any number. A try whose connection
            has brought heartbeats for five seconds does not count.
        within: it gives up when nothing new has come for so long, nor such a heartbeat; None: however long that is.
        first: the pause before the first try is shorter than this.
        longest: so is every pause.
        longest_asked: it gives up at once if a server asks for more than that.
    """

    tries: int | None = 15
    within: timedelta | None = None
    first: timedelta = timedelta(milliseconds=250)
    longest: timedelta = timedelta(seconds=10)
    longest_asked: timedelta = timedelta(minutes=2)

    def __post_init__(self) -> None:
        check_durations(within=self.within, first=self.first, longest=self.longest, longest_asked=self.longest_asked)
        if self.tries is not None and self.tries < 0:
            raise InvalidArgumentError("a number of tries is not negative")
        if min(self.first, self.longest, self.longest_asked, self.within or timedelta(0)) < timedelta(0):
            raise InvalidArgumentError("a pause is not negative")


class Budget:
    """What is left of a `Retry`, which all progress renews.

    Args:
        retry: what it is at first, and after each progress.
        now: a clock that never goes back, in seconds.
        part: gives a random number from 0 to 1.
    """

    def __init__(
        self, retry: Retry, now: Callable[[], float] = time.monotonic, part: Callable[[], float] = random.random
    ) -> None:
        self.failures = 0
        """How many tries in a row have brought nothing."""
        self._retry = retry
        self._now = now
        self._part = part
        self._progress_at = now()
        self._begun_at = now()

    def connected(self) -> None:
        """Note that a connection has begun."""
        self._begun_at = self._now()

    def heard(self) -> None:
        """Note that something has come over it, be it nothing new."""
        if self._now() - self._begun_at >= LIVED_SECONDS:
            self.progress()

    def progress(self) -> None:
        """Note that something new has come."""
        self.failures = 0
        self._progress_at = self._now()

    def next_pause(self, first_seconds: float | None = None, asked_seconds: float = 0.0) -> float | None:
        """Note that a try has brought nothing, and give how many seconds to wait before the next one. None: there is to be none.

        `first_seconds` is what the server has said by `retry:`, `asked_seconds` what it asks for by `Retry-After`.
        """
        retry, exponent = self._retry, min(self.failures, _BIGGEST_EXPONENT)
        self.failures += 1
        if asked_seconds > retry.longest_asked.total_seconds() or (retry.tries is not None and self.failures > retry.tries):
            return None
        first = retry.first.total_seconds() if first_seconds is None else first_seconds
        pause: float = asked_seconds + self._part() * min(retry.longest.total_seconds(), first * 2**exponent)
        if retry.within is not None and self._now() - self._progress_at + pause > retry.within.total_seconds():
            return None
        return pause
