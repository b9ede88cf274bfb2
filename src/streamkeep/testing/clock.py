"""FakeClock: a clock that moves only when told to."""

import time

__all__ = ["FakeClock"]


class FakeClock:
    """Seconds since the epoch, for `MemoryStorage(clock=...)`; they begin at the present, and stand still until `advance`.

    Attributes:
        now: what calling the clock gives.
    """

    def __init__(self, now: float | None = None) -> None:
        self.now = time.time() if now is None else now

    def __call__(self) -> float:
        """Give the time."""
        return self.now

    def advance(self, seconds: float) -> None:
        """Let so many seconds pass at once. Nobody who sleeps is woken by it."""
        self.now += seconds
