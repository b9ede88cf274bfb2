"""Recovery: which streams are to be gone on with when their writer has died, and with what. Pure: values to values.

Each of them has an *entry* while it is open: a small head of its own. Entries lie by the session of the stream's writer, so that who
finds that session dead finds its streams, and nobody searches for them among all that are kept. An entry says nothing about who may
write; that the stream's own head does.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

import msgspec

from . import _names
from ._durations import check_durations
from ._lifecycle import FORGET_OPEN_SECONDS, RecoveryTerms, State, longest_wait, version_after
from .errors import InvalidArgumentError, StorageCorruptError
from .events import encode_json, recovering_record
from .storage import Head

PREFIX: Final = ".recovery."
BELL: Final = ".recovery"
"""The id of a head that is changed when a stream is left by its writer, so that it need not be waited for long."""
NOBODY: Final = "0"
"""Whose entries are those of streams that were released by a session which goes on."""
MAX_INPUT_BYTES: Final = 64 << 10
MAX_CHECKPOINT_BYTES: Final = 4 << 10
MAX_NAME: Final = 255
MAX_SECONDS: Final = timedelta.max.total_seconds() - 1
"""What a timedelta can be made of: of its greatest the seconds are rounded up."""


@dataclass(frozen=True, slots=True)
class Recovery:
    """How a stream is gone on with when its writer has died: what is given to `open`, and what who goes on finds.

    Attributes:
        name: what it is that goes on, as it is given to `recoveries`; the same in every process and every version of the app.
        input: what that needs to begin, as JSON of 64 KiB at most: a question, or an id under which the app has it.
        attempts: how many writers may die, and be followed by another one. After one more the stream ends with ABORTED. A writer that
            releases the stream, as one does when its process is shut down, is not counted.
        backoff: how long after the first death another one may begin; twice as long after the second, and so on, up to an hour.
        within: how long the stream then waits for one, before it ends with ABORTED: longer than the app is down at a deployment.
    """

    name: str
    input: Any = None
    attempts: int = 3
    backoff: timedelta = timedelta(seconds=1)
    within: timedelta = timedelta(minutes=5)

    def __post_init__(self) -> None:
        check_durations(backoff=self.backoff, within=self.within)


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """What the head of an entry says."""

    stream: str
    life: str
    ttl: float
    """How much longer than others it is kept."""
    name: str
    input: str
    """As JSON."""


def terms_of(recovery: Recovery | None) -> RecoveryTerms | None:
    """Give what is kept of it in a stream's head. InvalidArgumentError: it is none."""
    if recovery is None:
        return None
    checked_name(recovery.name)
    backoff, within = recovery.backoff.total_seconds(), recovery.within.total_seconds()
    if type(recovery.attempts) is not int or recovery.attempts < 1 or backoff < 0 or within <= 0:
        raise InvalidArgumentError(
            "of a recovery, `attempts` is 1 or more, `backoff` is not negative, and `within` is positive"
        )
    return RecoveryTerms(recovery.name, recovery.attempts, backoff, within)


def recovery_of(terms: RecoveryTerms | None, input: str) -> Recovery | None:
    """Give what was given to `open`."""
    if terms is None:
        return None
    backoff, within = (timedelta(seconds=min(seconds, MAX_SECONDS)) for seconds in (terms.backoff, terms.within))
    return Recovery(terms.name, msgspec.json.decode(input or "null"), terms.attempts, backoff, within)


def checked_name(name: str) -> str:
    """Give the name of a recovery. InvalidArgumentError: this cannot be one."""
    if not isinstance(name, str) or not 1 <= len(name) <= MAX_NAME or _names.SURROGATE.search(name):
        raise InvalidArgumentError(f"the name of a recovery is Unicode text of 1 to {MAX_NAME} characters")
    return str.__str__(name)


def encoded(what: str, value: object, most: int) -> str:
    """Give a value as JSON. InvalidArgumentError: it is none, or too long."""
    data = encode_json(value)
    if len(data) > most:
        raise InvalidArgumentError(f"{what} has {len(data)} bytes of JSON, {most} are allowed")
    return data.decode()


def checkpoint_of(value: object) -> str:
    """Give a checkpoint as it is kept. InvalidArgumentError: it cannot be one."""
    return encoded("a checkpoint", value, MAX_CHECKPOINT_BYTES)


def input_of(recovery: Recovery) -> str:
    """Give the input as it is kept. InvalidArgumentError: it cannot be one."""
    return encoded("the input of a recovery", recovery.input, MAX_INPUT_BYTES)


# Heads.


def entries_of(session: str) -> str:
    """Give what the ids of a session's entries begin with; a scan after this finds them."""
    return f"{PREFIX}{session or NOBODY}."


def entry_id(session: str, life: str) -> str:
    """Give the id under which a life of a stream has its entry, among those of a session."""
    return entries_of(session) + life


def sessions_of(state: State) -> tuple[str, ...]:
    """Give the sessions among whose entries a stream's may be, in the order in which they are to be looked through: an entry that is handed
    on goes from a session's to nobody's.
    """
    return (*filter(None, (state.session, state.left_by)), "")


def records_of(state: State) -> list[bytes]:
    """Give what is appended to a stream when it is left without a writer."""
    return [] if state.recovery is None else [recovering_record(state.attempt)]


def session_in(entry: str) -> str:
    """Give the session among whose entries this one is; empty if nobody's."""
    session = entry.removeprefix(PREFIX).partition(".")[0]
    return "" if session == NOBODY else session


def after_session(session: str) -> str:
    """Give what comes after all entries of a session in a scan, and before those of the next one."""
    return f"{PREFIX}{session or NOBODY}/"


def entry_of(head: Head) -> Entry:
    """Read the head of an entry. StorageCorruptError: it is none."""
    try:
        entry = _decoder.decode(head.state)
        msgspec.json.decode(entry.input or "null")
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise StorageCorruptError(
            "the entry of a recovery is damaged, or was written by a newer version of streamkeep"
        ) from error
    return entry


def entry_for(stream: str, state: State, input: str) -> Entry:
    """Give the entry of a stream."""
    assert state.recovery is not None
    return Entry(stream, state.life, state.ttl + longest_wait(state.recovery), state.recovery.name, input)


def entry_head(seen: Head | None, entry: Entry, now: float) -> Head:
    """Give the next head of an entry; None: it is the first one."""
    # As for names: what is written is extended twice a day, and what is not ends within the day after.
    expires_at = now + 2 * FORGET_OPEN_SECONDS + entry.ttl
    return Head(version_after(0 if seen is None else seen.version, now, entry.life), 0, msgspec.json.encode(entry), expires_at)


def rung(seen: Head | None, now: float, who: str) -> Head:
    """Give the next head of the bell."""
    return Head(version_after(0 if seen is None else seen.version, now, who), 0, b"", now + FORGET_OPEN_SECONDS)


_decoder: Final = msgspec.json.Decoder(Entry)
