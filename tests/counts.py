"""What is done, counted: no busy machine disturbs that, as it disturbs every time that is measured."""

import sys
import tracemalloc
from collections import Counter
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

Profile = Callable[[FrameType, str, Any], object]


@contextmanager
def calls_of(*packages: ModuleType) -> Generator[Counter[str]]:
    """Count the calls of these packages' functions in this thread while within; a coroutine that goes on counts as called."""
    calls: Counter[str] = Counter()
    there = tuple(str(Path(package.__file__ or "").parent) for package in packages)

    def note(frame: FrameType, what: str, _: object) -> None:
        if what == "call" and frame.f_code.co_filename.startswith(there):
            calls[frame.f_code.co_qualname] += 1

    with _profiled(note):
        yield calls


@contextmanager
def decoding() -> Generator[Counter[str]]:
    """Count what of JSON is decoded and encoded in this thread while within."""
    calls: Counter[str] = Counter()

    def note(frame: FrameType, what: str, function: Any) -> None:
        if what == "call" and str(frame.f_globals.get("__name__")).startswith("json"):
            calls[frame.f_code.co_name] += 1
        elif what == "c_call" and (function.__module__ or type(function.__self__).__module__).startswith("msgspec"):
            calls[function.__name__] += 1

    with _profiled(note):
        yield calls


@contextmanager
def _profiled(note: Profile) -> Generator[None]:
    before = sys.getprofile()
    sys.setprofile(note)
    try:
        yield
    finally:
        sys.setprofile(before)


async def least_bytes(work: Callable[[], Awaitable[object]], times: int = 5) -> int:
    """Do the work a few times, and say how many bytes more there were at most in the time that needed the least.

    So a list that is copied each time is seen, and one that has to grow now and then is not.
    """
    needed: list[int] = []
    tracemalloc.start(1)
    try:
        for _ in range(times):
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            await work()
            needed.append(tracemalloc.get_traced_memory()[1] - before)
    finally:
        tracemalloc.stop()
    return min(needed)
