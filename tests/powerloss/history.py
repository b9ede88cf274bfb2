"""What a storage was asked for and what it answered, and therefore what may be there after a power cut.

All commits and deletions of one database are one sequence. After a cut the state must be the one after some prefix of it: not shorter
than what is sure, not longer than what was asked for.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.powerloss.disk import Sync
from tests.powerloss.recorder import Tape
from tests.powerloss.recovery import OneLoopStorage, State

from streamkeep.errors import StorageFullError
from streamkeep.storage import Head
from streamkeep.storages.sqlite._database import Synchronous


@dataclass(frozen=True, slots=True)
class Asked:
    """A mark: the storage has been asked for a change."""

    number: int


@dataclass(frozen=True, slots=True)
class Answered:
    """A mark: the storage has answered."""

    number: int


@dataclass(frozen=True, slots=True)
class Shown:
    """A mark: somebody has read the state after so many changes."""

    number: int


@dataclass(frozen=True, slots=True)
class _Change:
    """What was asked for; no head: a deletion."""

    stream: str
    head: Head | None
    records: tuple[bytes, ...]


class History:
    """Every change that was asked of the storages of one database, in order; `before` are the states it has had so far."""

    def __init__(self, tape: Tape, before: Sequence[State] = ({},)) -> None:
        self._tape = tape
        self._before = before
        self._changes: list[_Change] = []
        self._answers: dict[int, bool] = {}

    def ask(self, stream: str, head: Head | None, records: Sequence[bytes] = ()) -> int:
        """Note that this is about to be asked for, and give its number, which is how many states there were before it."""
        number = len(self._before) + len(self._changes)
        self._changes.append(_Change(stream, head, tuple(records)))
        self._tape.mark(Asked(number))
        return number

    def answer(self, number: int, answer: bool) -> None:
        """Note the answer."""
        self._answers[number] = answer
        self._tape.mark(Answered(number))

    def show(self, state: State) -> None:
        """Note that somebody has read the state as it is after all that was asked for so far."""
        states = self.states()
        assert state == states[-1], "the storage does not hold what it was asked to"
        self._tape.mark(Shown(len(states) - 1))

    def states(self) -> Sequence[State]:
        """Give the states before, and that after each change; a refused one changes nothing."""
        states = list(self._before)
        for number, change in enumerate(self._changes, len(states)):
            states.append(_after(change, states[-1]) if self._answers[number] else states[-1])
        return states


class WitnessedStorage(OneLoopStorage):
    """The real storage, with a history of what it was asked and what it answered; and perhaps another clock."""

    def __init__(
        self, path: Path, synchronous: Synchronous, history: History, clock: Callable[[], float] | None = None
    ) -> None:
        super().__init__(path, synchronous=synchronous)
        self._history = history
        self._clock = clock

    def time(self) -> float:
        return super().time() if self._clock is None else self._clock()

    async def commit(self, stream: str, seen: int | None, head: Head, records: Sequence[bytes] = ()) -> bool:
        number = self._history.ask(stream, head, records)
        try:
            is_done = await super().commit(stream, seen, head, records)
        except StorageFullError:
            page = await self.read(stream)
            assert page is None or page.head != head, "StorageFullError, and the commit was stored"
            raise
        self._history.answer(number, is_done)
        return is_done

    async def delete(self, stream: str, seen: int) -> bool:
        number = self._history.ask(stream, None)
        is_done = await super().delete(stream, seen)
        self._history.answer(number, is_done)
        return is_done


class Bounds:
    """How many of the changes are sure, and how many possible, as the tape is played."""

    def __init__(self, synchronous: Synchronous, *, sure: int = 0, possible: int = 0) -> None:
        self.synchronous: Final = synchronous
        self._known = sure
        self.sure = sure
        self.possible = possible

    def play(self, entry: object) -> None:
        """Take in the next entry of the tape."""
        match entry:
            case Asked(number):
                self.possible = number
            case Answered(number) | Shown(number):
                self._known = max(self._known, number)
            case Sync():
                # NORMAL syncs the log before a checkpoint, and what was known by then was in it.
                self.sure = self._known
            case _:
                pass
        if self.synchronous == "FULL":
            self.sure = self._known


def why_impossible(state: State, states: Sequence[State], bounds: Bounds) -> str | None:
    """Say why this state cannot be what a power cut leaves of that history; None: it can."""
    if any(state == candidate for candidate in states[bounds.sure : bounds.possible + 1]):
        return None
    allowed = f"{bounds.sure} changes are sure and {bounds.possible} possible"
    prefixes = [number for number, candidate in enumerate(states) if state == candidate]
    if prefixes:
        return f"{allowed}, and what is left is the state after {prefixes[-1]}"
    return f"{allowed}, and what is left is the state after no number of them: {_tails(state)}"


def _tails(state: State) -> dict[str, int]:
    return {stream: len(records) for stream, (_, records) in state.items()}


def _after(change: _Change, state: State) -> State:
    if change.head is None:
        return {stream: log for stream, log in state.items() if stream != change.stream}
    _, records = state.get(change.stream, (None, ()))
    return {**state, change.stream: (change.head, records + change.records)}
