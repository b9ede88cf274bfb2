"""A disk that refuses: at every write or sync of a workload in turn, once or until there is space again.

The workload is told of it by a StorageError, waits for space, and tries again, as streamkeep says that its callers can. Whatever was
acknowledged must then be there, once; and if the power fails at any moment afterwards, it must still be there.

Nothing that was not synced survives these cuts. With NORMAL, what survives by chance can be a damaged database: SQLite tries a checkpoint
again after a sync of the log has failed, and Linux says then that all is synced. SQLiteStorage promises no more.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, Literal

import apsw
from tests.powerloss.cuts import Examiner, Findings, Moment, Plan, Recording, run_workload
from tests.powerloss.disk import Disk, Operation, Sync, Truncate, Write
from tests.powerloss.history import Bounds
from tests.powerloss.ledger import Ledger
from tests.powerloss.recorder import Tape
from tests.powerloss.recovery import DamageError

from streamkeep import StorageError, StorageFullError

Kind = Literal["no space", "no space once", "a write fails", "a sync fails"]
KINDS: Final[Sequence[Kind]] = ["no space", "no space once", "a write fails", "a sync fails"]

NEVER: Final = 1 << 60

_CODES: Final[dict[Kind, int]] = {
    "no space": apsw.SQLITE_FULL,
    "no space once": apsw.SQLITE_FULL,
    "a write fails": apsw.SQLITE_IOERR_WRITE,
    "a sync fails": apsw.SQLITE_IOERR_FSYNC,
}


class Trouble:
    """Refuses one of the operations that it concerns, counted from 0; "no space" goes on until there is `relief`.

    Attributes:
        first: which one it refuses.
        met: how many operations it would have concerned.
        told: the StorageErrors that came of it.
    """

    def __init__(self, kind: Kind, first: int) -> None:
        self.first = first
        self.met = 0
        self.told: list[StorageError] = []
        self._kind: Kind = kind
        self._is_over = False
        self._sizes: dict[int, int] = {}

    def __call__(self, operation: Operation) -> None:
        """Let the operation happen, or raise what SQLite calls such a failure."""
        if self._concerns(operation):
            self.met += 1
            if self.met > self.first and not self._is_over:
                self._is_over = self._kind != "no space"
                raise apsw.exception_for(_CODES[self._kind])
        self._note_size(operation)

    def relief(self, error: StorageError) -> None:
        """Make space."""
        self.told.append(error)
        self._is_over = True

    def misnamed(self) -> Sequence[str]:
        """Give the errors that should have been of another class."""
        expected = StorageFullError if self._kind.startswith("no space") else StorageError
        return [f"a {self._kind} was told as {error!r}" for error in self.told if type(error) is not expected]

    def _concerns(self, operation: Operation) -> bool:
        if self._kind == "a sync fails":
            return isinstance(operation, Sync)
        if self._kind == "no space":
            return isinstance(operation, Write) and _end(operation) > self._sizes.get(operation.file, 0)
        return isinstance(operation, Write)

    def _note_size(self, operation: Operation) -> None:
        match operation:
            case Write():
                self._sizes[operation.file] = max(self._sizes.get(operation.file, 0), _end(operation))
            case Truncate(file, size):
                self._sizes[file] = size
            case _:
                pass


class Refusals:
    """Carries out a plan on a disk that refuses. What is right is known by the ledger, since the outcome of a commit may be unknown."""

    def __init__(self, plan: Plan, directory: Path, findings: Findings) -> None:
        self._plan = replace(plan, variants=0)
        self._directory = directory
        self._examiner = Examiner(self._plan, directory / "survived", findings)

    async def run(self, kind: Kind, times: int | None = None) -> None:
        """Let the disk refuse at each operation in turn, or at so many of them; and after each run cut the power everywhere."""
        harmless = Trouble(kind, first=NEVER)
        await run_workload(self._plan, Tape(Disk(), harmless), self._directory / "refusing")
        firsts = range(harmless.met)
        for first in firsts if times is None else self._plan.random(kind).sample(firsts, min(times, harmless.met)):
            await self._refuse(f"{kind}, {first}", Trouble(kind, first))

    async def _refuse(self, name: str, trouble: Trouble) -> None:
        tape = Tape(Disk(), trouble)
        await run_workload(self._plan, tape, self._directory / "refusing", trouble.relief)
        self._examiner.complain(name, trouble.misnamed())
        counts = self._examiner.findings.counts
        counts["refusals"] += 1
        counts["errors"] += len(trouble.told)
        for moment in Recording(name, Disk(), tape.entries, [], Bounds(self._plan.synchronous), Ledger()).moments():
            await self._examiner.cut(moment)
            if moment.operation is None:
                await self._check_end(moment)

    async def _check_end(self, moment: Moment) -> None:
        assert moment.ledger is not None
        found = await self._examiner.recovered(moment.disk.without_power())
        if not isinstance(found, DamageError):
            self._examiner.complain(f"{moment.name}, the end", moment.ledger.complaints(found))


def _end(write: Write) -> int:
    return write.offset + len(write.data)
