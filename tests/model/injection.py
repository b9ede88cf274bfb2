"""Strikes a scenario at every point, one by one, in every way, and finds out each time whether the promises were kept.

Points are found by counting: a scenario is run and struck at its first point, run anew and struck at its second, and so on, until a
run ends before the point is reached.
"""

import asyncio
import gc
import logging
import tempfile
import warnings
from collections.abc import Awaitable, Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args

import anyio
from anyio import CancelScope
from anyio.abc import TaskGroup

from streamkeep.errors import StorageError, StreamkeepError, StreamManagerClosedError

from .kinds import Kind, OpenStorage
from .probes import Countdown, Counted
from .scenarios import Act, Scenario
from .virtual_time import Backend, Workload, run_virtually
from .world import BOUND_SECONDS, RIVALS, Recovery, World

OUTAGE_SECONDS: Final = 5.0
SOON_SECONDS: Final = 2.0
"""Of virtual time: less than a renewal takes to come, or a lease to lapse, so that it is the doorbell that was heard."""
MANY_POINTS: Final = 1_000
RECOVERIES: Final[tuple[Recovery, ...]] = get_args(Recovery)


@dataclass(slots=True)
class Attempt:
    """A run of a scenario that is to be struck; `struck_at` is when it was, by somebody whom it should soon hear of."""

    world: World
    tasks: TaskGroup
    scope: CancelScope
    struck_at: float | None = None
    task: "asyncio.Future[object] | None" = None


@dataclass(frozen=True, slots=True)
class Way:
    """A way to strike: what happens, where points are counted, and which errors it may lead to."""

    name: str
    points: Literal["suspensions of the caller", "points of the storage"]
    strike: Callable[[Attempt], None]
    errors: tuple[type[StreamkeepError], ...] = ()
    backends: tuple[Backend, ...] = ("asyncio", "trio")
    is_native: bool = False


def _cancel(attempt: Attempt) -> None:
    attempt.scope.cancel()


def _cancel_natively(attempt: Attempt) -> None:
    assert attempt.task is not None, "asyncio's tasks only"
    attempt.task.cancel()


def _fail(_: Attempt) -> None:
    raise StorageError("the storage was made to fail here")


def _go_down(attempt: Attempt) -> None:
    async def come_back() -> None:
        await anyio.sleep(OUTAGE_SECONDS)
        attempt.world.storage.is_down = False

    attempt.world.storage.is_down = True
    attempt.tasks.start_soon(come_back)


def _close_the_manager(attempt: Attempt) -> None:
    attempt.tasks.start_soon(attempt.world.streams.aclose)


def _cancel_elsewhere(attempt: Attempt) -> None:
    attempt.struck_at = anyio.current_time()
    attempt.world.storage.meanwhile = attempt.world.cancel_elsewhere


def _delete_elsewhere(attempt: Attempt) -> None:
    attempt.struck_at = anyio.current_time()
    attempt.world.storage.meanwhile = attempt.world.delete_elsewhere


CANCELLED: Final = Way("the caller is cancelled", "suspensions of the caller", _cancel)
CANCELLED_NATIVELY: Final = Way(
    "the caller's task is cancelled", "suspensions of the caller", _cancel_natively, backends=("asyncio",), is_native=True
)
CANCELLED_AT_THE_STORAGE: Final = Way("the caller is cancelled while the storage works", "points of the storage", _cancel)
FAILED: Final = Way("the storage fails", "points of the storage", _fail, (StorageError,))
DOWN: Final = Way("the storage goes down", "points of the storage", _go_down, (StorageError,))
CLOSED: Final = Way("the manager is closed", "points of the storage", _close_the_manager, (StreamManagerClosedError,))
CANCELLED_ELSEWHERE: Final = Way("the stream is cancelled elsewhere", "points of the storage", _cancel_elsewhere, RIVALS)
DELETED_ELSEWHERE: Final = Way("the stream is deleted elsewhere", "points of the storage", _delete_elsewhere, RIVALS)

WAYS: Final = (
    CANCELLED,
    CANCELLED_NATIVELY,
    CANCELLED_AT_THE_STORAGE,
    FAILED,
    DOWN,
    CLOSED,
    CANCELLED_ELSEWHERE,
    DELETED_ELSEWHERE,
)


@dataclass(frozen=True, slots=True)
class Struck:
    """At how many points a scenario was struck, in how many runs, and in how many of these its action did not end as it would have."""

    points: int
    runs: int
    deflected: int


def strike_everywhere(kind: Kind, scenario: Scenario, way: Way, recoveries: Callable[[int], Iterable[Recovery]]) -> Struck:
    """Strike at every point, once for each recovery that is given for its number. AssertionError: a promise was broken."""
    endings: list[bool] = []
    with _undisturbed(), tempfile.TemporaryDirectory(prefix="streamkeep model ") as directory:
        for number in range(1, MANY_POINTS):
            for recovery in recoveries(number):
                open_storage = kind.at(Path(directory) / f"{number} {recovery}")
                struck, ended = _strike_once(kind.backend, open_storage, scenario, way, recovery, number)
                if not struck:
                    return Struck(number - 1, len(endings), endings.count(False))
                endings.append(ended)
    raise AssertionError("the scenario has no end")


@contextmanager
def _undisturbed() -> Generator[None]:
    """Let nobody keep the errors, as who captures logs does, and the garbage collector have little to do, whom each strike calls."""
    logger = logging.getLogger("streamkeep")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    gc.collect()
    gc.freeze()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # of handles that are dropped on purpose
            yield
    finally:
        gc.unfreeze()
        logger.setLevel(level)


def _strike_once(
    backend: Backend, open_storage: OpenStorage, scenario: Scenario, way: Way, recovery: Recovery, number: int
) -> tuple[bool, bool]:
    workload = Workload()

    async def main() -> tuple[bool, bool]:
        return await _attempt(World(open_storage, workload), scenario, way, recovery, number)

    try:
        return run_virtually(backend, workload, main)
    except BaseException as error:
        error.add_note(f"{scenario.__name__}: {way.name} at point {number} of the {way.points}; then {recovery}")
        raise


async def _attempt(world: World, scenario: Scenario, way: Way, recovery: Recovery, number: int) -> tuple[bool, bool]:
    async with world.running():
        act = await scenario(world)
        world.has_waited = False
        world.is_storage_well = way in {CANCELLED, CANCELLED_AT_THE_STORAGE}
        async with anyio.create_task_group() as tasks:
            attempt = Attempt(world, tasks, CancelScope())
            countdown = Countdown(number, lambda: way.strike(attempt))
            with anyio.fail_after(BOUND_SECONDS):
                ended = await _struck(attempt, act, way, countdown)
            if attempt.struck_at is not None and not world.has_waited:
                assert anyio.current_time() - attempt.struck_at <= SOON_SECONDS, "what happens elsewhere is told"
            world.storage.pass_point, world.storage.meanwhile = lambda: None, None
        world.told.news += tuple(error for error in way.errors if error is not StorageError)
        await world.recover(recovery)
        await world.examine()
        if world.is_under_a_key:
            await world.start_under_the_key()
        await world.settle()
    return countdown.has_struck, ended


async def _struck(attempt: Attempt, act: Act, way: Way, countdown: Countdown) -> bool:
    """Run the action under the countdown; give whether it has ended as if nothing had happened."""

    async def run() -> None:
        if way.points == "points of the storage":
            attempt.world.storage.pass_point = countdown.pass_point
            await act()
        else:
            await Counted(_coroutine(act), countdown)

    try:
        if way.is_native:
            return await _run_in_a_task(attempt, run)
        with attempt.scope:
            await run()
        return not attempt.scope.cancelled_caught
    except (StreamkeepError, ExceptionGroup) as error:
        _check(error, way)
        return False


async def _run_in_a_task(attempt: Attempt, run: Callable[[], Any]) -> bool:
    attempt.task = task = asyncio.ensure_future(run())
    await asyncio.wait([task])
    attempt.task = None
    if task.cancelled():
        return False
    task.result()
    return True


async def _coroutine(act: Callable[[], Awaitable[object]]) -> None:
    await act()


def _check(error: Exception, way: Way) -> None:
    """Raise the error unless it is one, or some, that this way leads to."""
    _, unexpected = error.split(way.errors) if isinstance(error, ExceptionGroup) else (None, error)
    if unexpected is not None and not isinstance(unexpected, way.errors):
        raise error
