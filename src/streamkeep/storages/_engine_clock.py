"""The clock of an engine behind a network, as it is known here: measured now and then, and interpolated in between."""

import time
from collections.abc import Callable

from streamkeep.errors import StorageError


class EngineClock:
    """Gives the engine's time without asking it: what it said last, and what has passed since by a clock of this machine that nobody sets.

    Args:
        monotonic: gives seconds that never jump; for tests.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._offset: float | None = None

    def start(self) -> float:
        """Give what `set` wants to know: when the engine was asked."""
        return self._monotonic()

    def set(self, engine_seconds: float, asked_at: float | None = None) -> None:
        """Believe an answer that came just now.

        With `asked_at` the engine is taken to have read its clock in the middle between question and answer, so an answer that took
        long is wrong by half of that at most. An answer of another server, after a failover, replaces what the last one has said.
        """
        now = self._monotonic()
        self._offset = engine_seconds - (now if asked_at is None else (asked_at + now) / 2)

    def time(self) -> float:
        """Give the engine's time, in seconds since the epoch, as an estimate. StorageError: it has never been asked."""
        if self._offset is None:
            raise StorageError("the engine's clock has never been asked")
        return self._offset + self._monotonic()
