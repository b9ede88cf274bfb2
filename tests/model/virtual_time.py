"""Event loops whose time is not the world's: it jumps when nobody has anything to do, or stands still until it is told to pass.

Trio has one of its own; this is asyncio's. Other threads' work is real, so time does not jump while somebody waits for it: whoever
waits says so in a Workload.
"""

import asyncio
import selectors
from collections.abc import Awaitable, Callable
from typing import Any, Final, Literal, TypeVar

import anyio
import sniffio
import trio
import trio.testing
from trio.testing import MockClock

T = TypeVar("T")
Backend = Literal["asyncio", "trio"]

EPOCH: Final = 1_800_000_000.0
MANY_TURNS: Final = 25
"""More turns of asyncio's loop than anything here takes between two calls of the storage."""


class Workload:
    """How much other threads have to do for us."""

    def __init__(self) -> None:
        self._jobs = 0

    def __bool__(self) -> bool:
        return self._jobs > 0

    def __enter__(self) -> None:
        self._jobs += 1

    def __exit__(self, *exc_info: object) -> None:
        self._jobs -= 1


class JumpingLoop(asyncio.SelectorEventLoop):
    """Asyncio's, on virtual time: when nobody has anything to do, it is the time of the next timer."""

    def __init__(self, workload: Workload) -> None:
        self._now = 0.0
        super().__init__(_JumpingSelector(workload, self.pass_time))

    def time(self) -> float:
        """Give the virtual time."""
        return self._now

    def pass_time(self, seconds: float) -> None:
        """Let it be so much later."""
        self._now += seconds


class _JumpingSelector(selectors.DefaultSelector):
    def __init__(self, workload: Workload, pass_time: Callable[[float], None]) -> None:
        super().__init__()
        self._workload = workload
        self._pass_time = pass_time

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if ready or timeout == 0:
            return ready
        if self._workload or timeout is None:
            return super().select(None)
        self._pass_time(timeout)
        return []


def run_virtually(backend: Backend, workload: Workload, main: Callable[[], Awaitable[T]]) -> T:
    """Run `main` on a new event loop with virtual time, which begins at 0."""
    options: dict[Backend, dict[str, Any]] = {
        "asyncio": {"loop_factory": lambda: JumpingLoop(workload)},
        "trio": {"clock": MockClock(autojump_threshold=0)},
    }
    return anyio.run(main, backend=backend, backend_options=options[backend])


def still_time(backend: Backend) -> dict[str, Any]:
    """Give the options of a backend for an event loop whose time stands still until `pass_time`."""
    if backend == "trio":
        return {"clock": MockClock()}
    never_idle = Workload()
    never_idle.__enter__()
    return {"loop_factory": lambda: JumpingLoop(never_idle)}


def pass_time(seconds: float) -> None:
    """Let it be so much later on the loop that is running."""
    if sniffio.current_async_library() == "trio":
        clock_of_trio = trio.lowlevel.current_clock()
        assert isinstance(clock_of_trio, MockClock)
        clock_of_trio.jump(seconds)
    else:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, JumpingLoop)
        loop.pass_time(seconds)


async def until_quiet(workload: Workload) -> None:
    """Return when nobody has anything to do before time passes, neither here nor in the threads of this workload."""
    if sniffio.current_async_library() == "trio":
        await trio.testing.wait_all_tasks_blocked()
        return
    quiet_turns = 0
    while quiet_turns < MANY_TURNS:
        await asyncio.sleep(0)
        quiet_turns = 0 if workload else quiet_turns + 1


def clock() -> float:
    """Give the seconds since the epoch on the loop that is running."""
    return EPOCH + anyio.current_time()
