"""Power cuts at every operation of a workload, and what is wrong with what they leave.

A workload runs once, on a tape. Each cut is then made on a model of the disk: played up to there, it says what may have survived; that is
written to a directory, opened by streamkeep, and compared with what was acknowledged. Some of what is left is opened on a tape
again, and cut again while streamkeep recovers.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Final

from tests.powerloss.disk import Disk, Image, Operation, Sync, Write
from tests.powerloss.history import Bounds, History, WitnessedStorage, why_impossible
from tests.powerloss.ledger import Ledger
from tests.powerloss.recorder import CHECKPOINT_PAGES, Tape, recorded
from tests.powerloss.recovery import DATABASE, DamageError, State, digest_of, go_on, latest_in, put_down, read_all, recover
from tests.powerloss.workload import Relief, Size, Workload, no_relief

from streamkeep.storages.sqlite._database import Synchronous

CREATION: Final = 25
"""So many operations, about, make a new database."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be cut, and how often. The same plan makes the same choices.

    Attributes:
        seed: what all chance comes from.
        synchronous: what the storage is opened with.
        size: how long the workload is.
        variants: how many times chance decides at each cut what survives; beside that all does, a write is torn, and nothing does.
            0: nothing survives, and that is all.
        recoveries: how many of the cuts are recovered from, once after a power cut and once after a kill, and the recovery is cut
            everywhere; one of them while the database is being created.
        checkpoint_pages: how long SQLite lets its log become.
    """

    seed: int
    synchronous: Synchronous
    size: Size
    variants: int = 2
    recoveries: int = 4
    checkpoint_pages: int = CHECKPOINT_PAGES

    def random(self, *about: object) -> Random:
        """Give the chance that this plan has for something."""
        return Random(f"{self.seed} {self.synchronous} {about}")


@dataclass(slots=True)
class Findings:
    """What was done, and what was wrong."""

    counts: Counter[str] = field(default_factory=Counter)
    complaints: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Moment:
    """When the power is cut: what is on the disk, what was about to be done, and what may and must be there.

    There are no `states` where some commits have failed, and no `ledger` where nobody kept one.
    """

    name: str
    disk: Disk
    operation: Operation | None
    states: Sequence[State]
    bounds: Bounds
    ledger: Ledger | None

    def survivors(self, plan: Plan) -> Iterator[tuple[str, Image]]:
        """Give what may be there when the power is back, and by what name to call it."""
        yield "nothing survives", self.disk.without_power()
        if plan.variants == 0:
            return
        yield "all survives", self.disk.with_power()
        for variant in range(plan.variants):
            yield f"chance {variant}", self.disk.by_chance(plan.random(self.name, variant))
        if isinstance(self.operation, Write):
            yield "torn write", self.disk.torn(self.operation, plan.random(self.name, "torn"))

    def complaints(self, found: State | DamageError) -> Sequence[str]:
        """Say what is wrong with what was found."""
        if isinstance(found, DamageError):
            return [str(found)]
        if self.states and (why := why_impossible(found, self.states, self.bounds)):
            return [why]
        return self.ledger.complaints(found) if self.ledger and self.bounds.synchronous == "FULL" else []

    def number_of(self, state: State) -> int:
        """Say after how many changes the database is in this state, which is possible now."""
        possible = range(self.bounds.sure, self.bounds.possible + 1)
        return max(number for number in possible if self.states[number] == state)


@dataclass(frozen=True, slots=True)
class Recording:
    """A tape, what there was when it began, and the states that the database went through."""

    name: str
    disk: Disk
    entries: Sequence[object]
    states: Sequence[State]
    bounds: Bounds
    ledger: Ledger | None = None

    def moments(self) -> Iterator[Moment]:
        """Give the moment before each operation, and that after the last; a moment is over when the next one is asked for."""
        disk, bounds, ledger = deepcopy((self.disk, self.bounds, self.ledger))
        for number, entry in enumerate([*self.entries, None]):
            if entry is None or isinstance(entry, Operation):
                yield Moment(f"{self.name}, cut {number}", disk, entry, self.states, bounds, ledger)
            if isinstance(entry, Operation):
                disk.do(entry)
            bounds.play(entry)
            if ledger is not None:
                ledger.play(entry)


class Examiner:
    """Cuts the power at moments, looks at what has survived, in a directory of its own, and keeps account of it in `findings`."""

    def __init__(self, plan: Plan, directory: Path, findings: Findings) -> None:
        self.plan = plan
        self.findings = findings
        self._directory = directory
        self._known: dict[str, State | DamageError] = {}

    async def cut(self, moment: Moment) -> None:
        """Cut the power."""
        self.findings.counts["cuts"] += 1
        for way, image in moment.survivors(self.plan):
            self.findings.counts["checks"] += 1
            found = await self.recovered(image)
            self.complain(f"{moment.name}, {way}", moment.complaints(found))

    async def cut_everywhere(self, recording: Recording) -> None:
        """Cut the power at all its moments."""
        for moment in recording.moments():
            await self.cut(moment)

    async def recovered(self, image: Image) -> State | DamageError:
        """Give what streamkeep finds in these files, which it is asked only once."""
        digest = digest_of(image)
        if digest not in self._known:
            self.findings.counts["images"] += 1
            try:
                self._known[digest] = await recover(image, self._directory)
            except DamageError as damage:
                self._known[digest] = damage
        return self._known[digest]

    def complain(self, about: str, complaints: Sequence[str]) -> None:
        """Keep account of what is wrong."""
        self.findings.complaints += [f"{self.plan}: {about}: {complaint}" for complaint in complaints]


class PowerCuts:
    """Carries out a plan."""

    def __init__(self, plan: Plan, directory: Path, findings: Findings) -> None:
        self._plan = plan
        self._directory = directory
        self._examiner = Examiner(plan, directory / "survived", findings)

    async def run(self) -> None:
        """Record the workload and cut it everywhere; recover from some of the cuts, and cut that everywhere."""
        recording = await record(self._plan, self._directory / "workload")
        recovered_from = self._chosen_moments(sum(1 for _ in recording.moments()))
        for number, moment in enumerate(recording.moments()):
            await self._examiner.cut(moment)
            if number in recovered_from:
                await self._cut_recovery(await self._record_after_cut(moment))
                await self._cut_recovery(await self._record_after_kill(moment))

    async def run_kills(self) -> None:
        """Record the workload; kill the process before each sync, and cut what a new one does with what was not synced."""
        recording = await record(self._plan, self._directory / "workload")
        for moment in recording.moments():
            if isinstance(moment.operation, Sync):
                await self._cut_recovery(await self._record_after_kill(moment))

    def _chosen_moments(self, total: int) -> Collection[int]:
        random = self._plan.random("recoveries")
        while_it_is_created = random.randrange(CREATION)
        return {while_it_is_created, *random.sample(range(CREATION, total), self._plan.recoveries - 1)}

    async def _cut_recovery(self, recovery: Recording | None) -> None:
        if recovery is not None:
            self._examiner.findings.counts["recoveries"] += 1
            await self._examiner.cut_everywhere(recovery)

    async def _record_after_cut(self, moment: Moment) -> Recording | None:
        """Recover from a power cut; all that is found then is on the disk."""
        image = moment.disk.by_chance(self._plan.random(moment.name, "recovered"))
        number = await self._number_of(moment, image)
        if number is None:
            return None
        bounds = Bounds(self._plan.synchronous, sure=number, possible=number)
        return await self._record_recovery(f"after {moment.name}", image, Disk(image), moment.states[: number + 1], bounds)

    async def _record_after_kill(self, moment: Moment) -> Recording | None:
        """Go on in a new process after the old one was killed; the system still has all that was written, the disk has not."""
        image = moment.disk.with_power()
        number = await self._number_of(moment, image)
        if number is None:
            return None
        bounds = deepcopy(moment.bounds)
        bounds.possible = number
        states = moment.states[: number + 1]
        return await self._record_recovery(f"killed at {moment.name}", image, deepcopy(moment.disk), states, bounds)

    async def _number_of(self, moment: Moment, image: Image) -> int | None:
        """Say how many changes are found in what has survived; None: it is not as it should be."""
        found = await self._examiner.recovered(image)
        complaints = moment.complaints(found)
        self._examiner.complain(f"{moment.name}, to be recovered from", complaints)
        return None if complaints or isinstance(found, DamageError) else moment.number_of(found)

    async def _record_recovery(self, name: str, image: Image, disk: Disk, states: Sequence[State], bounds: Bounds) -> Recording:
        directory = self._directory / "reopened"
        put_down(image, directory)
        tape = Tape(deepcopy(disk))
        history = History(tape, states)
        with recorded(tape, self._plan.checkpoint_pages):
            async with WitnessedStorage(directory / DATABASE, self._plan.synchronous, history) as storage:
                state = await read_all(storage)
                history.show(state)
                storage.earliest = latest_in(state)
                await go_on(storage, state)
        return Recording(name, disk, tape.entries, history.states(), bounds)


async def record(plan: Plan, directory: Path) -> Recording:
    """Run the plan's workload on a disk that refuses nothing."""
    tape = Tape(Disk())
    history = await run_workload(plan, tape, directory)
    return Recording("workload", Disk(), tape.entries, history.states(), Bounds(plan.synchronous), Ledger())


async def run_workload(plan: Plan, tape: Tape, directory: Path, relief: Relief = no_relief) -> History:
    """Run the plan's workload, from the beginning; what it writes is on the tape then."""
    put_down({}, directory)
    workload = Workload(directory, plan.synchronous, tape, plan.random("workload"), relief=relief)
    with recorded(tape, plan.checkpoint_pages):
        await workload.run(plan.size)
    return workload.history
