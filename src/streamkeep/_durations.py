"""Durations, as they are given."""

from datetime import timedelta


def check_durations(**durations: object) -> None:
    """Raise TypeError, which names it, for a number: of what, nobody knows. None is left to who calls."""
    for name, duration in durations.items():
        if not (duration is None or isinstance(duration, timedelta)):
            raise TypeError(f"`{name}` is a timedelta, such as timedelta(seconds=30), and not {type(duration).__name__}")
