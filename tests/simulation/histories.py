"""Random histories of streams, over any storage, on virtual time; and whether the promises held in them.

A history is several processes with clocks that disagree, whose way to one storage loses, delays and repeats; in them rival
writers, take-overs, cancels and deletions, readers that are slow, that come back, that die. All of it follows from a seed: the
same seed gives the same history, to the byte. Hours pass in milliseconds, because a clock jumps to the next thing that is to happen.

    outcome = simulate(42, MemoryStorage)
    assert not outcome.violations, outcome

What is checked of each history: nothing that was acknowledged is lost, nothing is stored or shown twice, order is kept, no writer
comes back after another took over, there is one terminal event at most, every reader comes to it or is told why not, a writer is told that
its stream is no longer its own, all streams end, and all that has expired is removed.
"""

import gc
import logging
import traceback
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from importlib import import_module
from random import Random
from typing import Any, Final
from unittest.mock import patch

import trio
import trio.testing

from streamkeep.storage import Storage

from .accounts import check_all
from .actors import PROMPT_SECONDS, Actor, Meddler, Process, Reader, Story, Writer
from .world import CALM, LONGEST_STALL, Weather, World, asking

# The one way to have trio's order of tasks from a seed: it is there for Hypothesis, and is not documented.
_trio_run: Final[Any] = import_module("trio._core._run")

STORM_SECONDS: Final = 120.0
SETTLE_SECONDS: Final = 900.0
"""How long all may take to come to its end when the storm is over, if no clock is wrong by more than this."""
SKEWS: Final = (0.0, 0.3, -0.3, 4.0, -4.0, 20.0, -20.0)
WRONG_HOUR: Final = 3600.0


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


def simulate(seed: int, open_storage: Callable[[], Storage]) -> Outcome:
    """Live through the history that follows from a seed, and give what became of it.

    Args:
        seed: any whole number.
        open_storage: gives a storage that holds nothing, not entered. It runs on asyncio, in a thread of its own.

    An exception that nothing here expects, of the storage or of streamkeep, is a violation too.
    """
    random = Random(seed)
    with asking(open_storage) as (ask, storage), _deterministic(seed):
        world = World(ask, storage, random)
        story = Story(world, random, ["a", "b"][: random.randint(1, 2)], timedelta(seconds=random.choice([1, 20, 300])))
        clock = trio.testing.MockClock(autojump_threshold=0)
        try:
            trio.run(partial(_tell, story), clock=clock)
        except Exception as error:  # whatever breaks a history is reported with its seed
            story.violations.append("".join(traceback.format_exception(error)))
    broken = [*story.violations, *world.surprises, *check_all(world.pasts, story.writings, story.deleted)]
    return Outcome(seed, tuple(broken), story.reached, "\n".join(world.trace).encode())


@contextmanager
def _deterministic(seed: int) -> Generator[None]:
    """Let what happens in the block follow from the seed: the order of tasks, and when dropped objects die."""
    logger = logging.getLogger("streamkeep")
    before = _trio_run._r.getstate(), logger.disabled
    gc.freeze()  # what is there already is not looked at: collecting after each dropped handle is quick
    gc.disable()
    scheduling = patch.object(_trio_run, "_ALLOW_DETERMINISTIC_SCHEDULING", new=True)
    logger.disabled = True  # thousands of lines on what is meant to fail
    _trio_run._r.seed(seed)
    try:
        with scheduling:
            yield
    finally:
        state, logger.disabled = before
        _trio_run._r.setstate(state)
        gc.enable()
        gc.unfreeze()


async def _tell(story: Story) -> None:
    random = story.random
    async with story.world.network(), trio.open_nursery() as nursery:
        skew_of = random.choice([_no_skew, _skew])
        processes = [
            Process(story, f"p{number}", Weather.random(random), skew_of(random)) for number in range(random.randint(2, 4))
        ]
        for process in processes:
            nursery.start_soon(_live, story, process, _cast(story, process.name))
        await trio.sleep(STORM_SECONDS)
        for process in processes:
            process.calm_down()
        last = Process(story, "last", CALM, 0.0)
        nursery.start_soon(last.run, [Reader(story, f"the last reader of {stream}", stream) for stream in story.ids])
        await last.up.wait()
        await _settle(story)
        for process in (*processes, last):
            if process.is_alive:
                await process.leave()
        nursery.cancel_scope.cancel()


def _no_skew(_: Random) -> float:
    return 0.0


def _skew(random: Random) -> float:
    """Give by how much a clock is wrong: not at all, a little, more than a lease, or by an hour."""
    return WRONG_HOUR if random.random() < 0.02 else random.choice(SKEWS)


def _cast(story: Story, process: str) -> Sequence[Actor]:
    """Give those who live in a process."""
    random = story.random
    writers = [Writer(story, f"{process}-writer{number}", random.choice(story.ids)) for number in range(random.randint(0, 3))]
    readers = [Reader(story, f"{process}-reader{number}", random.choice(story.ids)) for number in range(random.randint(0, 3))]
    meddlers = [Meddler(story, f"{process}-meddler")] if random.random() < 0.6 else []
    return [*writers, *readers, *meddlers]


async def _live(story: Story, process: Process, actors: Sequence[Actor]) -> None:
    """Run a process from some moment on, and perhaps end it in one way or another."""
    await story.pause(30)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(process.run, actors)
        await process.up.wait()
        fate = story.random.choice(["stays", "stays", "is killed", "leaves"])
        if fate != "stays":
            await story.pause(STORM_SECONDS)
        if fate == "is killed":
            process.kill()
        elif fate == "leaves":
            await process.leave()


async def _settle(story: Story) -> None:
    """Wait until all has come to its end, and say what has not."""
    with trio.move_on_after(SETTLE_SECONDS + 2 * story.worst_skew):
        while _unsettled(story):
            gc.collect()
            await trio.sleep(10)
        await trio.sleep(2 * LONGEST_STALL + PROMPT_SECONDS)
        for handle in story.handles:
            if handle.should_be_told:
                story.complain(f"{handle.name} was never told that its stream is no longer its own")
        while story.world.streams:  # noqa: ASYNC110 - sweeps tell nobody
            await trio.sleep(60)
        return
    for what in (*_unsettled(story), *(f"{stream} was never removed" for stream in story.world.streams)):
        story.complain(what)


def _unsettled(story: Story) -> list[str]:
    never_done = [f"{actor.name} waits for ever" for actor in story.acting]
    return never_done + [f"{past.id} never ends" for past in story.world.streams.values() if past.ends_at is None]
