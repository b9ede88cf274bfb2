"""The clock of an engine behind a network, as it is known here: measured now and then, and interpolated in between."""

import time
from collections.abc import Callable
from typing import Final

from streamkeep.errors import StorageError

REFRESH_SECONDS: Final = 10.0
"""So long after an engine was asked it is worth asking again."""

_DRIFT: Final = 1e-4
"""Two clocks lose or gain at most so many seconds in a second on one another."""


class EngineClock:
    """Gives the engine's time without asking it: what it said last, and what has passed since by a clock that nobody sets.

    The local wall clock plays no part, so it may jump.

    Args:
        monotonic: gives seconds that never jump; for tests.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._offset: float | None = None
        self._width = 0.0
        self._measured_at = 0.0
        self._asked_at = 0.0

    @property
    def is_stale(self) -> bool:
        """Say whether it should be measured (anew)."""
        return self._offset is None or self._monotonic() - self._asked_at > REFRESH_SECONDS

    def start(self) -> float:
        """Give what `set` wants to know as `asked_at`; call it right before the engine is asked."""
        return self._monotonic()

    def set(self, engine_seconds: float, asked_at: float | None = None) -> None:
        """Take in an answer that came just now.

        With `asked_at`, the engine may have read its clock at any time between question and answer, and the middle is taken. An answer
        that took longer than an earlier one did, and agrees with it, adds nothing and is ignored; one that cannot agree is believed: the
        engine's clock was set, or another server answers now.
        """
        now = self._asked_at = self._monotonic()
        asked_at = now if asked_at is None else asked_at
        lowest, highest, width = engine_seconds - now, engine_seconds - asked_at, now - asked_at
        drift = (now - self._measured_at) * _DRIFT
        agrees = self._offset is not None and lowest - drift <= self._offset <= highest + drift
        if not agrees or width <= self._width + drift:
            self._offset = (lowest + highest) / 2
            self._width = width
            self._measured_at = now

    def time(self) -> float:
        """Give the engine's time, in seconds since the epoch, as an estimate. StorageError: it was never measured."""
        if self._offset is None:
            raise StorageError("the engine's clock was never measured")
        return self._offset + self._monotonic()
