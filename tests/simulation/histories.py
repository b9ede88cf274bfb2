"""Random histories of streams, over any storage, on virtual time; and whether the promises held in them.

A history is several processes, whose way to one storage loses, delays and repeats; in them rival writers, take-overs, cancels and
deletions, readers that are slow, that come back, that die, and sometimes hundreds of them. Processes are blocked, stopped and killed; the
storage's clock jumps by hours, its commits are slow, it goes back to what it was a while ago. All of it follows from a seed: the same
seed gives the same history, to the byte. Hours pass in milliseconds, because time jumps to the next thing that is to happen.

    outcome = simulate(42, MemoryStorage)
    assert not outcome.violations, outcome

What is checked of each history: nothing that was acknowledged is lost, unless the storage went back to before it; nothing is stored or
shown twice; order is kept; no reader is shown two histories as one; no writer comes back after another took over, and none that lives is
declared dead; there is one terminal event at most, and every reader comes to it or is told why not; a writer is told that its stream is no
longer its own; under a key one stream runs; who goes on with what a dead writer has left is given its last checkpoint; all streams end, and
all that has expired is removed, sessions and names included.
"""

import gc
import logging
import traceback
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from importlib import import_module
from random import Random
from types import SimpleNamespace
from typing import Any, Final
from unittest.mock import patch
from uuid import UUID

import trio
import trio.testing

from streamkeep import _core, _recoveries, _sessions, _sweeper
from streamkeep._core import LOOK_SECONDS
from streamkeep._lifecycle import FORGET_OPEN_SECONDS, KEEP_SESSION_SECONDS, life_of, session_id
from streamkeep._names import is_name
from streamkeep._recovery import BELL
from streamkeep._running import UNDO_PAUSES
from streamkeep.storage import Storage

from .accounts import check_all
from .actors import Actor, Meddler, Process, Reader, Starter, Story, Successor, Writer
from .world import CALM, LONGEST_STALL, Weather, World, asking

# The one way to have trio's order of tasks from a seed: it is there for Hypothesis, and is not documented.
_trio_run: Final[Any] = import_module("trio._core._run")

STORM_SECONDS: Final = 120.0
SETTLE_SECONDS: Final = 900.0
"""How long all may take to come to its end when the storm is over, if the clock was not put back by more than this."""
TELL_SECONDS: Final = 3 * LOOK_SECONDS + 2 * LONGEST_STALL
"""Within this a writer that nobody could tell has found out that its stream is no longer its own."""
JUMPS: Final = (16.0, 3_600.0, 5 * 3_600.0, 30 * 3_600.0, -20.0, -3_600.0)
UNDO_SECONDS: Final = 2 * sum(UNDO_PAUSES)
SLOW: Final = (4.0, 40.0)
QUICK: Final = (0.0, 0.0)
CROWD: Final = (200, 400)


@dataclass(frozen=True, slots=True)
class Climate:
    """How probable it is, in a history, that this comes over the storage or its processes."""

    slow_commits: float = 0.15
    jumps: float = 0.25
    goes_back: float = 0.2
    calm: float = 1 / 3
    """For each process: that its way to the storage is good."""
    holds: float = 0.5
    """For each process: that it is blocked or stopped now and then."""
    crowds: float = 0.01
    """For each process."""
    starts: float = 0.4
    """For each process: that somebody in it starts streams under a key."""
    recovers: float = 0.4
    """That streams are to be gone on with."""


TEMPERATE: Final = Climate()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a history.

    Attributes:
        seed: what it followed from.
        violations: the promises that were broken, a sentence each; empty if all is well.
        reached: how often the history came to this or that (`opened`, `resumed`, `cancelled`, `events read`, …).
        trace: all that happened, a line each with its virtual time.
    """

    seed: int
    violations: tuple[str, ...]
    reached: dict[str, int]
    trace: bytes

    def __str__(self) -> str:
        if not self.violations:
            return f"seed {self.seed}: the promises held"
        return "\n".join([f"seed {self.seed}:", *self.violations, "", self.trace.decode()])


def simulate(seed: int, open_storage: Callable[[], Storage], climate: Climate = TEMPERATE) -> Outcome:
    """Live through the history that follows from a seed and a climate, and give what became of it.

    Args:
        seed: any whole number.
        open_storage: gives a storage that holds nothing, not entered. It runs on asyncio, in a thread of its own.
        climate: what is likely in it.

    An exception that nothing here expects, of the storage or of streamkeep, is a violation too.
    """
    random = Random(seed)
    with asking(open_storage) as (ask, storage), _deterministic(seed):
        world = World(ask, storage, random)
        story = Story(world, random, ["a", "b"][: random.randint(1, 2)], timedelta(seconds=random.choice([1, 20, 300])))
        story.recovers = random.random() < climate.recovers
        clock = trio.testing.MockClock(autojump_threshold=0)
        try:
            trio.run(partial(_tell, story, climate), clock=clock)
        except Exception as error:  # whatever breaks a history is reported with its seed
            story.violations.append("".join(traceback.format_exception(error)))
    broken = [*story.violations, *world.surprises, *check_all(world.pasts, story.writings)]
    return Outcome(seed, tuple(broken), story.reached, "\n".join(world.trace).encode())


@contextmanager
def _deterministic(seed: int) -> Generator[None]:
    """Let what happens in the block follow from the seed: the order of tasks, and when dropped objects die."""
    logger = logging.getLogger("streamkeep")
    before = _trio_run._r.getstate(), logger.disabled
    random = Random(seed + 1)
    names = SimpleNamespace(uuid4=lambda: UUID(int=random.getrandbits(128), version=4))
    gc.freeze()  # what is there already is not looked at: collecting after each dropped handle is quick
    gc.disable()
    scheduling = patch.object(_trio_run, "_ALLOW_DETERMINISTIC_SCHEDULING", new=True)
    logger.disabled = True  # thousands of lines on what is meant to fail
    _trio_run._r.seed(seed)
    try:
        with (
            scheduling,
            patch.object(_core, "uuid", names),
            patch.object(_sessions, "uuid", names),
            patch.object(_sweeper, "random", random),
            patch.object(_recoveries, "random", random),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore", ResourceWarning)  # of handles that are dropped on purpose
            yield
    finally:
        state, logger.disabled = before
        _trio_run._r.setstate(state)
        gc.enable()
        gc.unfreeze()


async def _tell(story: Story, climate: Climate) -> None:
    random = story.random
    async with story.world.network(), trio.open_nursery() as nursery:
        processes = [
            Process(story, f"p{number}", Weather.random(random, climate.calm)) for number in range(random.randint(2, 4))
        ]
        storm = trio.CancelScope()
        nursery.start_soon(_storm, story, storm, climate)
        for process in processes:
            nursery.start_soon(_live, story, process, _cast(story, process.name, climate), climate)
        await trio.sleep(STORM_SECONDS)
        storm.cancel()
        for process in processes:
            process.calm_down()
        story.world.commit_seconds = QUICK
        last = Process(story, "last", CALM)
        nursery.start_soon(last.run, [Reader(story, f"the last reader of {stream}", stream) for stream in story.ids])
        await last.up.wait()
        await _settle(story, last, nursery)
        for process in processes:
            if process.is_alive:
                await process.leave()
        await _see_all_removed(story)
        await last.leave()
        nursery.cancel_scope.cancel()


async def _storm(story: Story, scope: trio.CancelScope, climate: Climate) -> None:
    """Let come over the storage what can, until the storm is over."""
    random, world = story.random, story.world
    with scope:
        async with trio.open_nursery() as nursery:
            if random.random() < climate.slow_commits:
                story.count("slow commits")
                world.commit_seconds = SLOW
            if random.random() < climate.jumps:
                nursery.start_soon(_jump, story)
            if random.random() < climate.goes_back:
                nursery.start_soon(_go_back, story, nursery)


async def _jump(story: Story) -> None:
    for _ in range(story.random.randint(1, 3)):
        await trio.sleep(story.random.uniform(0, STORM_SECONDS / 2))
        seconds = story.random.choice(JUMPS)
        story.may_forget = story.may_forget or seconds > FORGET_OPEN_SECONDS / 2
        story.count("jumped")
        story.world.jump(seconds)


async def _go_back(story: Story, nursery: trio.Nursery) -> None:
    for _ in range(story.random.randint(1, 2)):
        await trio.sleep(story.random.uniform(0, STORM_SECONDS / 2))
        if story.random.random() < 0.5:
            with trio.move_on_after(STORM_SECONDS / 4):
                await story.released.wait()
        moment = {} if story.random.random() < 0.3 else story.world.moment()
        await trio.sleep(story.random.choice([0.1, 2.0, 30.0, 90.0]) * story.random.random())
        story.count("went back")
        story.world.go_back(moment)
        for process in story.processes:
            if process.is_alive and story.random.random() < 0.5:  # somebody goes on at once with what is now there
                nursery.start_soon(
                    process.act,
                    Writer(story, f"{process.name}-successor {trio.current_time()}", story.random.choice(story.ids)),
                )


def _cast(story: Story, process: str, climate: Climate) -> Sequence[Actor]:
    """Give those who live in a process."""
    random = story.random
    writers = [Writer(story, f"{process}-writer{number}", random.choice(story.ids)) for number in range(random.randint(0, 3))]
    readers = [Reader(story, f"{process}-reader{number}", random.choice(story.ids)) for number in range(random.randint(0, 3))]
    if random.random() < climate.crowds:
        story.count("crowds")
        stream = random.choice(story.ids)
        readers += [Reader(story, f"{process}-one of many {number}", stream) for number in range(random.randint(*CROWD))]
    meddlers = [Meddler(story, f"{process}-meddler")] if random.random() < 0.6 else []
    starters = [Starter(story, f"{process}-starter{number}") for number in range(2)] if random.random() < climate.starts else []
    successors = [
        Successor(story, f"{process}-successor{number}") for number in range(random.randint(1, 2) if story.recovers else 0)
    ]
    return [*writers, *readers, *meddlers, *starters, *successors]


async def _live(story: Story, process: Process, actors: Sequence[Actor], climate: Climate) -> None:
    """Run a process from some moment on, and perhaps end it in one way or another."""
    await story.pause(30)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(process.run, actors)
        await process.up.wait()
        if story.random.random() < climate.holds:
            nursery.start_soon(_hold, story, process)
        fate = story.random.choice(["stays", "stays", "is killed", "leaves"])
        if fate != "stays":
            await story.pause(STORM_SECONDS)
        if fate == "is killed":
            process.kill()
        elif fate == "leaves":
            await process.leave()


async def _hold(story: Story, process: Process) -> None:
    """Block the process now and then, or stop it."""
    for _ in range(story.random.choice([1, 2])):
        await story.pause(40)
        hold = story.random.choice([process.be_blocked, process.be_stopped])
        await hold(story.random.uniform(1.0, 59.0))


async def _settle(story: Story, last: Process, nursery: trio.Nursery) -> None:
    """Wait until all has come to its end, and say what has not."""
    with trio.move_on_after(SETTLE_SECONDS + story.world.put_back):
        while story.acting or _open_streams(story):
            gc.collect()
            await trio.sleep(10)
            if not story.world.times_gone_back:
                _see_whose_all_is(story)
            if not story.acting:  # nobody looks any more at what does not end, so somebody has to
                for stream in _open_streams(story):
                    nursery.start_soon(last.act, Reader(story, f"somebody who looks at {stream}", stream))
        with trio.move_on_after(TELL_SECONDS):
            while any(handle.should_be_told for handle in story.handles):  # noqa: ASYNC110 - nor does who finds out
                await trio.sleep(10)
        for handle in story.handles:
            if handle.should_be_told:
                story.complain(f"{handle.name} was never told that its stream is no longer its own")
        return
    for actor in story.acting:
        story.complain(f"{actor.name} waits for ever")
    for stream in _open_streams(story):
        story.complain(f"{stream} never ends")


def _see_whose_all_is(story: Story) -> None:
    """Say which streams have a session that lives, and no writer in it: an `open` that fails leaves nothing behind."""
    for process in story.processes:
        if process.is_alive and trio.current_time() > process.calm_since + UNDO_SECONDS:
            for stream in _open_streams(story):
                session = life_of(story.world.streams[stream].head).state.session
                held = any(handle.process is process and handle.holds(stream) for handle in story.handles)
                if session_id(session) == process.way.session and not held:
                    story.complain(f"{stream} is nobody's, and {process.name} lives")


async def _see_all_removed(story: Story) -> None:
    """Wait until nothing is kept any more, and say what is."""
    await trio.sleep(2 * LONGEST_STALL)
    longest = 2 * KEEP_SESSION_SECONDS + story.ttl.total_seconds() + 600 + story.world.put_back
    if _open_streams(story):  # what was under way when its process left, and nobody has looked at
        story.may_forget = True
        longest += FORGET_OPEN_SECONDS
    with trio.move_on_after(longest):
        while not all(is_name(id) or id.startswith(BELL) for id in story.world.streams):  # noqa: ASYNC110 - sweeps tell nobody
            await trio.sleep(60)
    if story.world.streams:  # names of streams that were taken back, or that their successors have lost
        story.world.jump(2 * FORGET_OPEN_SECONDS + story.ttl.total_seconds() + story.world.put_back)
        with trio.move_on_after(300):
            while story.world.streams:  # noqa: ASYNC110
                await trio.sleep(60)
    for stream in story.world.streams:
        story.complain(f"{stream} was never removed")


def _open_streams(story: Story) -> list[str]:
    streams = [past for past in story.world.streams.values() if not past.is_reserved]
    return [past.id for past in streams if past.ends_at is None]
