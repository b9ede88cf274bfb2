"""What the callers of a manager have written and been told, stream by stream, and what must therefore be there.

It is kept by marks on the tape, so that it is known for every moment. Unlike a history it need not know which of several tries
took effect: what is there must begin what was written, and reach as far as was told.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.powerloss.recovery import State

from streamkeep._lifecycle import SESSION_PREFIX


@dataclass(frozen=True, slots=True)
class Begun:
    """A mark: the stream may exist from now on."""

    stream: str


@dataclass(frozen=True, slots=True)
class Written:
    """A mark: the record may be stored from now on, after all that were written before."""

    stream: str
    record: bytes


@dataclass(frozen=True, slots=True)
class Stored:
    """A mark: somebody was told that the stream exists and holds so many records."""

    stream: str
    tail: int


@dataclass(frozen=True, slots=True)
class Unwanted:
    """A mark: the stream may be gone from now on."""

    stream: str


@dataclass(frozen=True, slots=True)
class Gone:
    """A mark: somebody was told that the stream is gone."""

    stream: str


@dataclass(slots=True)
class _Account:
    records: list[bytes] = field(default_factory=list)
    told: int = -1
    may_be_gone: bool = False
    must_be_gone: bool = False


class Ledger:
    """The accounts of all streams, as the tape is played."""

    def __init__(self) -> None:
        self._accounts: dict[str, _Account] = {}

    def play(self, entry: object) -> None:
        """Take in the next entry of the tape."""
        match entry:
            case Begun(stream):
                self._accounts[stream] = _Account()
            case Written(stream, record):
                self._accounts[stream].records.append(record)
            case Stored(stream, tail):
                self._accounts[stream].told = tail
            case Unwanted(stream):
                self._accounts[stream].may_be_gone = True
            case Gone(stream):
                self._accounts[stream].must_be_gone = True
            case _:
                pass

    def complaints(self, state: State) -> Sequence[str]:
        """Say what is missing in this state, and what is in it that nobody wrote."""
        found = [
            self._complaint(stream, records) for stream, (_, records) in state.items() if not stream.startswith(SESSION_PREFIX)
        ]
        missing = [
            f"{stream} is missing, of which {account.told} records were acknowledged"
            for stream, account in self._accounts.items()
            if stream not in state and account.told >= 0 and not account.may_be_gone
        ]
        return [complaint for complaint in found if complaint] + missing

    def _complaint(self, stream: str, records: Sequence[bytes]) -> str | None:
        account = self._accounts.get(stream)
        if account is None or account.must_be_gone:
            return f"{stream} is there, and must not be"
        if list(records) != account.records[: len(records)]:
            return f"{stream} holds other records than were written"
        if len(records) < account.told:
            return f"{stream} holds {len(records)} records, and {account.told} were acknowledged"
        return None
