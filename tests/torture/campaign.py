"""A campaign: producers, readers and servers over one SQLite file, and a tormentor who kills, stops and restarts them.

The tormentor's choices follow from the seed alone; what they meet does not. It touches only processes that it started, and
whatever happens none of them outlives the campaign.
"""

import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Final, Literal

import anyio
from anyio.abc import TaskGroup
from tests.torture.actor import Actor
from tests.torture.checker import Database
from tests.torture.ledger import Ledger
from tests.torture.stage import GRACE, LEASE, TTL, Part, Stage

from streamkeep import StreamkeepError, StreamManager

Deed = Literal["kill", "stop", "stop and kill", "terminate", "massacre"]

UP_SECONDS: Final = 240.0
HANG_SECONDS: Final = 45.0
"""So long nothing may happen at all, when there is something to do, before that is a hang and not a slow machine. It is less than
the minute after which managers sweep: a reader must come to its end without that."""
LEAVE_SECONDS: Final = 120.0
PAUSE_SECONDS: Final = 0.12
LOOK_SECONDS: Final = 2.0
REPORT_SECONDS: Final = 10.0

_COUNTED: Final = {
    "kill": "kills",
    "stop": "stops",
    "terminate": "terminations",
    "massacre": "massacres",
    "locked out": "locked out at the start",
}
_GOOD_CODES: Final = (0, -signal.SIGKILL, -signal.SIGTERM)
_LOCKED_OUT: Final = "has held the database for 30 seconds"
"""What a process says that could not start because of one that was stopped, or given no time, while it held the lock."""


@dataclass(frozen=True, slots=True)
class Options:
    """What a campaign is to be. It ends after so many kills, or seconds."""

    stage: Stage
    kills: int | None = None
    seconds: float | None = None
    producers: int = 3
    readers: int = 3
    servers: int = 2

    @property
    def roles(self) -> Sequence[str]:
        """Who takes part."""
        numbers = {"producer": self.producers, "reader": self.readers, "server": self.servers}
        return [f"{kind}-{number}" for kind, among in numbers.items() for number in range(among)]


@dataclass(frozen=True, slots=True)
class Torment:
    """What is done to one of them.

    Attributes:
        pause: seconds before it.
        victim: its number.
        deed: what is done.
        length: seconds for which it is stopped, if it is.
        rest: seconds before it is started again, if it has ended.
        is_hasty: whether it is done also to one who has just been started, and has not done anything yet.
    """

    pause: float
    victim: int
    deed: Deed
    length: float
    rest: float
    is_hasty: bool


def torments(seed: int, victims: int) -> Iterator[Torment]:
    """Give what to do, for ever; the same for the same seed."""
    choices = random.Random(seed)
    deeds: Sequence[Deed] = ("kill", "stop", "stop and kill", "terminate", "massacre")
    while True:
        yield Torment(
            pause=choices.expovariate(1 / PAUSE_SECONDS),
            victim=choices.randrange(victims),
            deed=choices.choices(deeds, weights=(60, 15, 10, 10, 1))[0],
            length=choices.choice((0.01, 0.1, 0.5, 1.5, 2.5, 4.0)),
            rest=choices.choice((0, 0, 0.1, 0.5, 2.0)),
            is_hasty=choices.random() < 0.2,
        )


class Campaign:
    """Torments the actors, and has the ledger judge what comes of it."""

    def __init__(self, options: Options) -> None:
        self.done: Counter[str] = Counter()
        self._options = options
        self._stage = options.stage
        self._database = Database(options.stage.database)
        self.ledger = Ledger(self._database)
        self._actors = [Actor(Part(options.stage, role), self.ledger) for role in options.roles]
        self._urls: dict[str, str] = {}
        self._began = time.monotonic()

    async def run(self) -> None:
        """Torment until it is enough, let everybody come to an end, and judge."""
        try:
            async with anyio.create_task_group() as tasks:
                for actor in self._actors:
                    self._start(actor, tasks)
                await self._all_up()
                async with anyio.create_task_group() as meanwhile:
                    meanwhile.start_soon(self._look_on, tasks)
                    await self._torment(tasks)
                    meanwhile.cancel_scope.cancel()
                await self._calm_down()
                tasks.cancel_scope.cancel()
        finally:
            for actor in self._actors:
                actor.send(signal.SIGKILL)
                if not actor.is_buried:
                    actor.bury()
        await self._end_the_rest()
        self.ledger.judge(is_over=True)
        self.ledger.hold(self._database.complaints())
        for stream, evidence in self.ledger.evidence():
            (self._stage.directory / f"{stream}.evidence").write_text(evidence)

    # Starting

    def _start(self, actor: Actor, tasks: TaskGroup) -> None:
        tasks.start_soon(self._note_url, actor, actor.start())

    async def _all_up(self) -> None:
        """Wait until there is something to torment: imports take their time."""
        with anyio.fail_after(UP_SECONDS):
            while not self._is_all_up:
                await anyio.sleep(0.05)
                self.ledger.read()

    @property
    def _is_all_up(self) -> bool:
        counts = self.ledger.counts
        return len(self._urls) == self._options.servers and bool(counts["told write"] and counts["seen"])

    async def _note_url(self, actor: Actor, url: Connection) -> None:
        with url, suppress(EOFError):  # it was killed before it was up
            await anyio.wait_readable(url.fileno())
            self._urls[actor.role] = url.recv()
            actor.is_up = True
            new = self._stage.servers.with_suffix(".new")
            new.write_text("\n".join(self._urls.values()))
            new.replace(self._stage.servers)

    # Tormenting

    @property
    def _is_enough(self) -> bool:
        options = self._options
        by_kills = options.kills is not None and self.done["kill"] >= options.kills
        by_time = options.seconds is not None and time.monotonic() - self._began >= options.seconds
        return by_kills or by_time or bool(self.ledger.complaints)

    async def _torment(self, tasks: TaskGroup) -> None:
        async with anyio.create_task_group() as under_way:
            for torment in torments(self._stage.seed, len(self._actors)):
                if self._is_enough:
                    break
                await anyio.sleep(torment.pause)
                self.ledger.read()
                for victim in self._victims(torment):
                    if not victim.is_tormented and (victim.has_begun or torment.is_hasty):
                        victim.is_tormented = True
                        self._strike(victim, torment)
                        under_way.start_soon(self._go_through, victim, torment, tasks)

    def _victims(self, torment: Torment) -> Sequence[Actor]:
        if torment.deed != "massacre":
            return [self._actors[torment.victim]]
        self.done["massacre"] += 1
        return self._actors

    def _strike(self, victim: Actor, torment: Torment) -> None:
        """Do the first, or only, thing at once, so that all die in the same moment if they are to."""
        match torment.deed:
            case "stop" | "stop and kill":
                self.done["stop"] += victim.send(signal.SIGSTOP)
            case "terminate":
                self.done["terminate"] += victim.send(signal.SIGTERM)
            case "kill" | "massacre":
                self._kill(victim)

    def _kill(self, victim: Actor) -> None:
        self.done["kill"] += victim.send(signal.SIGKILL)

    async def _go_through(self, victim: Actor, torment: Torment, tasks: TaskGroup) -> None:
        if torment.deed in ("stop", "stop and kill"):
            await anyio.sleep(torment.length)
        if torment.deed == "stop":
            victim.send(signal.SIGCONT)
        else:
            await self._die(victim, torment)
            await anyio.sleep(torment.rest)
            self._start(victim, tasks)
        victim.is_tormented = False

    async def _die(self, victim: Actor, torment: Torment) -> None:
        if torment.deed == "stop and kill":
            self._kill(victim)
        with anyio.move_on_after(LEAVE_SECONDS):
            self._blame(victim, await victim.ended())
            return
        victim.send(signal.SIGKILL)
        await victim.ended()
        self.ledger.hold([f"{victim.role} did not end after {torment.deed}: {victim.last_words}"])

    # Looking on

    async def _look_on(self, tasks: TaskGroup) -> None:
        reported = self._began
        while True:
            await anyio.sleep(LOOK_SECONDS)
            self.ledger.judge()
            if time.monotonic() - reported > REPORT_SECONDS:
                reported = time.monotonic()
                self.ledger.hold(self._database.complaints())
                self._report()
            for actor in self._actors:
                if not actor.is_tormented and not actor.is_alive:
                    self._blame(actor, actor.bury(), by_itself=True)
                    self._start(actor, tasks)

    def _blame(self, actor: Actor, code: int | None, *, by_itself: bool = False) -> None:
        """Complain of an actor that failed, or that ended `by_itself` when it should have gone on."""
        if _LOCKED_OUT in actor.last_words:
            self.done["locked out"] += 1
        elif by_itself or code not in _GOOD_CODES or "Traceback" in actor.last_words:
            self.ledger.hold([f"{actor.role} ended with {code}: {actor.last_words}"])

    def _report(self) -> None:
        done = ", ".join(f"{number} {deed}" for deed, number in self.done.items())
        counts = self.ledger.counts
        print(
            f"{time.monotonic() - self._began:.0f} s: {done}; {counts['streams']} streams ended, {counts['chunks']} chunks, "
            f"{counts['takeovers']} take-overs, {len(self.ledger.complaints)} complaints",
            file=sys.stderr,
        )

    # Coming to an end

    async def _calm_down(self) -> None:
        """Let everybody finish; but half of the producers die, and leave what they have begun to the others."""
        self._stage.calm.touch()
        mortals = [actor for actor in self._actors if not actor.role.startswith("server")]
        for actor in mortals[: self._options.producers : 2]:
            self._kill(actor)
        await self._all_end(mortals)
        servers = [actor for actor in self._actors if actor.role.startswith("server")]
        for actor in servers:
            actor.send(signal.SIGTERM)
        await self._all_end(servers)

    async def _all_end(self, actors: Sequence[Actor]) -> None:
        patient_until = time.monotonic() + HANG_SECONDS
        progress = 0
        while waiting := [actor for actor in actors if actor.is_alive]:
            await anyio.sleep(0.1)
            self.ledger.read()
            if progress != (progress := self.ledger.progress):
                patient_until = time.monotonic() + HANG_SECONDS
            elif time.monotonic() > patient_until:
                self.ledger.hold([f"{actor.role} hangs" for actor in waiting])
                return
        for actor in actors:
            if not actor.is_buried:
                self._blame(actor, actor.bury())

    async def _end_the_rest(self) -> None:
        """End what nobody reads: that takes somebody who looks at it."""
        try:
            async with StreamManager.connect(self._stage.url, lease=LEASE, grace=GRACE, ttl=TTL) as streams:
                with anyio.move_on_after(HANG_SECONDS):
                    while any(stored.is_open for stored in self._database.streams().values()):
                        for info in await streams.list(limit=10_000):
                            if info.status == "open":
                                await streams.info(info.id)
                        await anyio.sleep(0.2)
        except StreamkeepError as error:
            self.ledger.hold([f"what was left could not be ended: {error}"])

    def counts(self) -> dict[str, object]:
        """Give what was done, and what came of it."""
        return {**{counted: self.done[deed] for deed, counted in _COUNTED.items()}, **dict(sorted(self.ledger.counts.items()))}
