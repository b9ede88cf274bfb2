"""Bounds: how long a run may go on. They are looked at when one could be met, and never in between."""

from dataclasses import dataclass, fields
from datetime import timedelta
from typing import Final

from .._durations import check_durations
from .._input import StreamInput
from ..errors import InvalidArgumentError, Status
from ..events import ErrorInfo

_ENDS: Final[dict[str, tuple[Status, str]]] = {
    "max_silence": ("DEADLINE_EXCEEDED", "the producer gave nothing for {:g} seconds (max_silence)"),
    "max_duration": ("DEADLINE_EXCEEDED", "the producer took longer than {:g} seconds (max_duration)"),
    "max_unread": ("CANCELLED", "nobody followed the stream for {:g} seconds (max_unread)"),
}


@dataclass(frozen=True, slots=True)
class Bounds:
    """How long a run may go on; None: for ever. `Bounds()` ends what hangs, and no run that gives a chunk now and then.

    A run that meets a bound is stopped as if somebody had cancelled its stream, which ends at once: `stream.cancelled` is set, a second
    later the producer is cancelled, and what it does at its end has five seconds.

    Attributes:
        max_silence: how long a producer may give no chunk; then its stream ends with DEADLINE_EXCEEDED. While a chunk waits to be stored
            this does not count: it is the storage that is slow.
        max_duration: how long a run may take; then DEADLINE_EXCEEDED.
        max_unread: how long nobody may follow the stream; then CANCELLED. Only readers in the producer's own process are seen.

    Raises InvalidArgumentError for what is not positive.
    """

    max_silence: timedelta | None = timedelta(hours=1)
    max_duration: timedelta | None = timedelta(days=1)
    max_unread: timedelta | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            bound: timedelta | None = getattr(self, field.name)
            check_durations(**{field.name: bound})
            if bound is not None and bound <= timedelta(0):
                raise InvalidArgumentError(f"{field.name} must be positive, or None")


class Due:
    """When a run meets a bound."""

    def __init__(self, bounds: Bounds, stream: StreamInput, began_at: float) -> None:
        self._seconds = {
            field.name: bound.total_seconds() for field in fields(bounds) if (bound := getattr(bounds, field.name)) is not None
        }
        self._stream = stream
        self._began_at = began_at

    def first(self, now: float) -> tuple[float, ErrorInfo | None]:
        """Give when the first bound is met if nothing happens until then, and how the stream ends; in times of the event loop."""
        since = {
            "max_silence": self._stream.idle_since,
            "max_duration": self._began_at,
            "max_unread": self._stream.unread_since,
        }
        # A chunk that is on its way to the storage, or a reader, will be gone now at the earliest.
        due = {name: (now if (at := since[name]) is None else at) + seconds for name, seconds in self._seconds.items()}
        if not due:
            return float("inf"), None
        name = min(due, key=lambda name: due[name])
        status, words = _ENDS[name]
        return due[name], ErrorInfo(status, words.format(self._seconds[name]))
