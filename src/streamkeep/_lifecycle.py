"""The rules of a stream's life: who may write, and until when; and of a session's, which says that its writers are alive.

Everything that affects that lives in this file, as functions from values to values. It reads no clock, no storage and no
event loop: the caller reads a head, asks here what follows, and commits the answer on the condition that the head has
not changed meanwhile. That condition is what keeps two writers apart; no clock is. A session only says when others may try.

          begin ──► open ──finish──► done | error
                    │  ▲       ▲
     extend, grow ──┘  │       │
              release, take_over, then abandon or cancel

A stream that is to be gone on with (see `RecoveryTerms`) is not ended when its writer has died: it is left for another one, as often and
as long as was said when it was opened.

`now` is always the storage's time, and only for what expires. `silent` is for how many seconds the caller has itself observed that
the session of the stream's writer is not renewed; `math.inf` once that session has said that it is over.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from types import MappingProxyType
from typing import Final, Literal
from zlib import crc32

import msgspec
from msgspec.structs import replace

from .errors import (
    OffsetOutOfRangeError,
    Status,
    StorageCorruptError,
    StreamBusyError,
    StreamCompletedError,
    StreamkeepError,
    StreamNotFoundError,
    StreamTakenOverError,
)
from .events import ErrorInfo
from .storage import Head

FORGET_OPEN_SECONDS: Final = 86_400.0
"""An open stream expires so long after it was opened or extended, in case that nobody ever looks at it again."""
EXTEND_SECONDS: Final = FORGET_OPEN_SECONDS / 2
"""A writer extends its stream when less than this is left; one that writes does so by writing."""

COPY_SECONDS: Final = 86_400.0
"""How long a copy that was interrupted can be gone on with; then the stream counts as abandoned."""

MEASURE_BYTES: Final = 1 << 20
MEASURE_RECORDS: Final = 2_048
"""A stream's size is noted in its state each time it has grown by this, so that whoever resumes it reads no more than that."""

MAX_EPOCHS: Final = 64
MAX_BACKOFF_SECONDS: Final = 3_600.0
MAX_DOUBLINGS: Final = 64
MAX_RELEASE_PAUSE_SECONDS: Final = 1.0
MAX_WAIT_SECONDS: Final = 366 * 86_400.0

NOTHING: Final[Mapping[str, str]] = MappingProxyType({})

CANCELLED: Final = ErrorInfo("CANCELLED", "the stream was cancelled")
ABORTED: Final = ErrorInfo("ABORTED", "the writer went away before the stream was completed")


@dataclass(frozen=True, slots=True)
class Terms:
    """How long things last, in seconds."""

    ttl: float
    lease: float
    grace: float


class RecoveryTerms(msgspec.Struct, frozen=True, array_like=True):
    """How a stream is gone on with whose writer has died; see `Recovery`."""

    name: str
    """Who can do it has registered that."""
    attempts: int
    """How many writers may die, and be followed by another one."""
    backoff: float
    """How many seconds after the first death another one may begin; twice as many after the second, …"""
    within: float
    """How many seconds later the stream is ended, if nobody goes on."""

    def pause(self, attempt: int) -> float:
        """Give how many seconds nobody begins after so many deaths."""
        return min(self.backoff * 2.0 ** min(attempt - 1, MAX_DOUBLINGS), MAX_BACKOFF_SECONDS)


class Epoch(msgspec.Struct, frozen=True, array_like=True):
    """Where in the log a writer began, or whoever else ended the stream (Kafka's word). Its name is unlike all others."""

    name: str
    start: int


class State(msgspec.Struct, frozen=True):
    """What a head's opaque bytes say. It stays the same bytes from write to write, so that a write does not pay for it."""

    created_at: float
    ttl: float
    epochs: tuple[Epoch, ...]
    session: str = ""
    """Whose writer may write; empty when it was released."""
    free_at: float = 0.0
    """When there is no session: from when on anybody may take the stream over."""
    status: Literal["open", "done", "error"] = "open"
    error: Status | None = None
    metadata: Mapping[str, str] = {}
    size: int = 0
    """How many bytes the first `measured` records have."""
    measured: int = 0
    owner: str = ""
    """Whose it is, what it was opened under, and the client's name of that start: see `_names`. Empty: nobody's, nothing."""
    key: str = ""
    run: str = ""
    recovery: RecoveryTerms | None = None
    left_by: str = ""
    """Whose writer had it last, if it is to be gone on with and has none."""
    attempt: int = 0
    """How many of its writers have died."""
    checkpoint: str = ""
    """What its producer needs to go on behind the last record, as JSON; empty if nothing was kept."""
    superseded: int = 0
    """Records before this offset are of an answer that has begun again since."""
    carrier: Mapping[str, str] | msgspec.UnsetType = msgspec.UNSET
    """What hooks keep with the stream, such as a traceparent; unset, and not a byte of the head, where they keep nothing."""

    @property
    def described(self) -> Mapping[str, str]:
        """What was given to `open`, as text: the metadata, and the owner if it has one."""
        return {**self.metadata, "owner": self.owner} if self.owner else self.metadata

    @property
    def carried(self) -> Mapping[str, str]:
        """What hooks keep with the stream."""
        return {} if self.carrier is msgspec.UNSET else self.carrier

    @property
    def life(self) -> str:
        """What tells this stream from others that live under the id before and after."""
        return self.epochs[0].name

    @property
    def writer(self) -> str:
        """The name of the last epoch, which is that of the handle that may write."""
        return self.epochs[-1].name


class Life(msgspec.Struct, frozen=True):
    """A head, with its state read."""

    head: Head
    state: State


def life_of(head: Head, known: Life | None = None) -> Life:
    """Read a head; quickly, if its state is the one that is known. StorageCorruptError: its state is not one of ours."""
    if known is not None and head.state == known.head.state:
        return Life(head, known.state)
    try:
        life = Life(head, _decoder.decode(head.state))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise StorageCorruptError("the stream's head is damaged, or was written by a newer version of streamkeep") from error
    if not life.state.epochs:
        raise StorageCorruptError("the stream's head is damaged")
    return life


def is_expired(life: Life, now: float) -> bool:
    """Say whether the stream counts as absent, whether or not anybody has removed it yet. An open one never does."""
    return life.state.status != "open" and now >= life.head.expires_at


def abandoned_at(state: State, terms: Terms) -> float | None:
    """Say when a stream that has no writer may be ended by anybody; None if it has one."""
    if state.session:
        return None
    return state.free_at + (terms.lease + terms.grace if state.recovery is None else state.recovery.within)


def is_abandoned(state: State, silent: float, now: float, terms: Terms) -> bool:
    """Say whether anybody may end this open stream, because its writer is gone and nobody has taken it over."""
    at = abandoned_at(state, terms)
    return silent >= terms.lease + terms.grace if at is None else now >= at


@dataclass(frozen=True, slots=True)
class Beginning:
    """What is said of a stream when it is opened, and stays so: see `State`."""

    ttl: float
    metadata: Mapping[str, str] = field(default_factory=dict)
    owner: str = ""
    key: str = ""
    run: str = ""
    recovery: RecoveryTerms | None = None


def beginning_of(state: State) -> Beginning:
    """Give what was said of a stream when it was opened."""
    return Beginning(state.ttl, state.metadata, state.owner, state.key, state.run, state.recovery)


def begin(
    now: float, session: str, writer: str, what: Beginning, *, after_version: int = 0, carrier: Mapping[str, str] = NOTHING
) -> Life:
    """Give the first head of a stream; `after_version` is that of an expired stream under the same id, `carrier` what hooks keep."""
    state = State(
        created_at=now,
        ttl=what.ttl,
        epochs=(Epoch(writer, 0),),
        session=session,
        metadata=what.metadata,
        owner=what.owner,
        key=what.key,
        run=what.run,
        recovery=what.recovery,
        carrier=carrier or msgspec.UNSET,
    )
    return Life(Head(version_after(after_version, now, writer), 0, _encode(state), now + _forgotten_after(state)), state)


@dataclass(frozen=True, slots=True)
class Mark:
    """What is noted of a stream when it has so many records: a checkpoint; or, if that is None, that with the last of them the answer
    begins again.
    """

    tail: int
    checkpoint: str | None


def grow(life: Life, count: int, size: int, now: float, marks: Sequence[Mark] = ()) -> Life:
    """Append `count` records, after which all records have `size` bytes; the state's bytes stay, unless there is something to note."""
    head, state = life.head, life.state
    tail = head.tail + count
    version = version_after(head.version, now, state.writer)
    expires_at = now + _forgotten_after(state) if is_to_be_extended(life, now) else head.expires_at
    if not marks and size - state.size < MEASURE_BYTES and tail - state.measured < MEASURE_RECORDS:
        return Life(Head(version, tail, head.state, expires_at), state)
    begun_again = [mark.tail - 1 for mark in marks if mark.checkpoint is None]
    state = replace(
        state,
        size=size,
        measured=tail,
        superseded=begun_again[-1] if begun_again else state.superseded,
        checkpoint=(marks[-1].checkpoint or "") if marks else state.checkpoint,
    )
    return Life(Head(version, tail, _encode(state), expires_at), state)


def is_to_be_extended(life: Life, now: float) -> bool:
    """Say whether the day on which an open stream is forgotten is near."""
    return life.head.expires_at - now < EXTEND_SECONDS + longest_wait(life.state.recovery)


def longest_wait(recovery: RecoveryTerms | None) -> float:
    """Give how much longer than others a stream is kept when nobody looks at it: as long as it waits for who goes on, a year at most."""
    return 0.0 if recovery is None else min(recovery.within, MAX_WAIT_SECONDS)


def _forgotten_after(state: State) -> float:
    return FORGET_OPEN_SECONDS + longest_wait(state.recovery)


def extend(life: Life, now: float) -> Life:
    """Put off the day on which an open stream is forgotten."""
    return _change(life, life.state, now)


def take_over(
    life: Life, now: float, session: str, writer: str, silent: float, terms: Terms, *, carrier: Mapping[str, str] = NOTHING
) -> Life:
    """Make `writer` the one writer of an open stream; what its hooks keep is kept instead of what others have kept, unless it is nothing.

    StreamCompletedError: it has ended. StreamBusyError: its writer may be alive.
    """
    state = life.state
    if state.status != "open":
        raise StreamCompletedError(f"the stream has already completed ({_ending(state)})")
    wait = terms.lease - silent if state.session else pause_before(life, now)
    if wait > 0:
        raise StreamBusyError("the stream has a writer that may be alive", retry_after=wait)
    kept = carrier or state.carrier
    return _change(life, replace(state, session=session, left_by="", epochs=_epochs(life, writer), carrier=kept), now)


def pause_before(life: Life, now: float) -> float:
    """Give for how many seconds more nobody may take over a stream that has no writer; not positive: anybody may."""
    left_at, free_at = committed_at(life.head), life.state.free_at
    # A clock that went back since the stream was released does not make it somebody's again: neither at once, nor for as long as that.
    return 0.0 if left_at - now > free_at - left_at else free_at - max(now, left_at)


def is_left(state: State) -> bool:
    """Say whether the stream waits for another writer that goes on with it, and its readers for that one."""
    return state.status == "open" and not state.session and state.recovery is not None


def finish(life: Life, now: float, error: Status | None = None) -> Life:
    """Append the terminal record and end the stream; `error` is its status if it failed."""
    ended = replace(life.state, session="", free_at=0.0, status="error" if error else "done", error=error)
    head = life.head
    return _change(Life(Head(head.version, head.tail + 1, head.state, head.expires_at), life.state), ended, now)


def release(life: Life, now: float, *, held: float = inf) -> Life:
    """Release the stream: anybody may take over at once, and has as long for it as if the writer had died now.

    One that is to be gone on with has a record that says so. A writer of such a stream that went on with it and `held` it for less than the
    backoff, or a second if that is longer, is followed by another one when that is over: what takes a stream over and lets go of it, again
    and again, does so not faster.
    """
    recovery = life.state.recovery
    pause = (
        0.0
        if recovery is None or len(life.state.epochs) == 1
        else max(0.0, min(recovery.pause(1), MAX_RELEASE_PAUSE_SECONDS) - held)
    )
    return _leave(life, now, life.state.attempt, now + pause)


def abandon(life: Life, now: float, silent: float, terms: Terms, who: str) -> Life | None:
    """See to a stream whose writer is gone; None while it is not time, or it has ended.

    It is ended, with ABORTED as its terminal record. One that is to be gone on with is left for that, with a record that says so, unless
    too many writers have died, or nobody has come.
    """
    state = life.state
    if state.status != "open" or not is_abandoned(state, silent, now, terms):
        return None
    if state.session and state.recovery is not None and state.attempt < state.recovery.attempts:
        attempt = state.attempt + 1
        left = Life(life.head, replace(state, epochs=_epochs(life, who)))
        return _leave(left, now, attempt, now + state.recovery.pause(attempt))
    return _finish_for(life, now, ABORTED.status, who)


def cancel(life: Life, now: float, who: str) -> Life | None:
    """End an open stream, with CANCELLED as its terminal record; None if it has ended already. `who` is a name not used before."""
    return None if life.state.status != "open" else _finish_for(life, now, CANCELLED.status, who)


def copy_under_way(life: Life, tail: int, now: float, *, after_version: int) -> Head:
    """Give the head of what is copied of a stream until all of it is; `after_version` is that of the copy so far."""
    state = replace(
        life.state, session="", free_at=now + COPY_SECONDS, status="open", error=None, size=0, measured=0, recovery=None
    )
    # The last head is the original's own: no version before it may be the same.
    version = version_after(max(after_version, life.head.version), now, state.writer)
    return Head(version, tail, _encode(state), state.free_at + FORGET_OPEN_SECONDS)


def is_copy(state: State, now: float) -> bool:
    """Say whether this is what a copy has made so far, which nobody else may write to yet."""
    return state.status == "open" and not state.session and state.recovery is None and state.free_at > now


def is_written(state: State) -> bool:
    """Say whether the stream has a writer, alive or not."""
    return state.status == "open" and bool(state.session)


def why_refused(head: Head | None, state: State) -> StreamkeepError:
    """Say why a commit of a stream's writer was refused, from the head that is there now."""
    if head is None:
        return StreamNotFoundError("the stream was deleted")
    try:
        there = life_of(head).state
    except StorageCorruptError as error:
        return error
    return _why_refused(there, state)


def _why_refused(there: State, state: State) -> StreamkeepError:
    if there.life != state.life:
        return StreamNotFoundError("the stream was deleted, and another one was created under its id")
    if there.error == ABORTED.status:
        return StreamCompletedError("the stream was ended with ABORTED: no sign of life of its writer was seen for too long")
    if there.status != "open":
        return StreamCompletedError(f"the stream was completed by somebody else ({_ending(there)})")
    if there.writer != state.writer:
        return StreamTakenOverError("another writer has taken the stream over")
    return StorageCorruptError("the storage has not what it had acknowledged: a failover or a crash has taken the last moments")


def check_history(seen: Life, reached: int, life: Life) -> None:
    """Raise unless who has read the records before offset `reached`, last when the stream was as `seen`, can go on with it as it is.

    StreamNotFoundError: it is another stream. OffsetOutOfRangeError: the storage went back (to a backup, to a standby that was behind), and
    has not those records, or others in their place. As in Kafka, the epoch of the last record tells: it must not end before that.
    """
    if life.state.life != seen.state.life:
        raise StreamNotFoundError("the stream was deleted, and created anew, while it was read")
    if life.head.tail < reached or _epoch_end(life.state, _epoch_at(seen.state, reached)) < reached:
        raise lost(reached)


def lost(reached: int) -> OffsetOutOfRangeError:
    """Say that the stream has not what was read of it."""
    return OffsetOutOfRangeError(
        f"the stream has no longer all of the {reached} events that were read: its storage has lost the last ones"
    )


def _leave(life: Life, now: float, attempt: int, free_at: float) -> Life:
    head, old = life.head, life.state
    left_by = "" if old.recovery is None else old.session
    state = replace(old, session="", free_at=free_at, left_by=left_by, attempt=attempt)
    tail = head.tail if state.recovery is None else head.tail + 1
    return _change(Life(Head(head.version, tail, head.state, head.expires_at), life.state), state, now)


def _finish_for(life: Life, now: float, error: Status, who: str) -> Life:
    """End a stream in place of its writer, which begins an epoch: a reader may have seen more than this storage now has."""
    return finish(Life(life.head, replace(life.state, epochs=_epochs(life, who))), now, error)


def _epochs(life: Life, name: str) -> tuple[Epoch, ...]:
    first, *others = life.state.epochs
    return (first, *others[-(MAX_EPOCHS - 2) :], Epoch(name, life.head.tail))


def _epoch_at(state: State, reached: int) -> str:
    """Give the epoch of the last record before an offset."""
    names = [epoch.name for epoch in state.epochs if epoch.start < reached]
    return names[-1] if names else state.life


def _epoch_end(state: State, name: str) -> float:
    """Give the offset before which an epoch has all its records: -1 if it never was."""
    ends = [*(epoch.start for epoch in state.epochs[1:]), inf]
    return next((end for epoch, end in zip(state.epochs, ends, strict=True) if epoch.name == name), -1)


def _change(life: Life, state: State, now: float) -> Life:
    head = life.head
    expires_at = now + (_forgotten_after(state) if state.status == "open" else state.ttl)
    return Life(Head(version_after(head.version, now, state.writer), head.tail, _encode(state), expires_at), state)


def outcome_of(state: State) -> Literal["done"] | Status:
    """Give how an ended stream has ended: `done`, or the status of its error."""
    return state.error or ("UNKNOWN" if state.status == "error" else "done")


def _ending(state: State) -> str:
    return state.error or state.status


# Versions: the time of the commit in 256ths of a millisecond, so that a stream which is created again after its deletion goes on with
# greater numbers although nobody remembers the old ones; and, in the last bits, something of who makes it, so that two histories of a
# storage that went back do not meet in the same number.
_TICKS_A_SECOND: Final = 256_000
_NAME_BITS: Final = 12


def version_after(seen: int, now: float, name: str) -> int:
    """Give the version that follows another one, 0 if there is none, when `name` commits."""
    ticks = max((seen >> _NAME_BITS) + 1, int(now * _TICKS_A_SECOND))
    return ticks << _NAME_BITS | crc32(name.encode()) & ((1 << _NAME_BITS) - 1)


def committed_at(head: Head) -> float:
    """Give about when a head was committed, in seconds since the epoch."""
    return (head.version >> _NAME_BITS) / _TICKS_A_SECOND


_decoder: Final = msgspec.json.Decoder(State)


def _encode(state: "State | SessionState | Mail") -> bytes:
    return msgspec.json.encode(state)


# Sessions

SESSION_PREFIX: Final = ".session."
"""No stream's id begins with a dot. What does, comes before all of them in a scan: see `AFTER_RESERVED`."""
PROTOCOL_PREFIX: Final = ".ds."
"""What begins so is no manager's: `streamkeep.durable_streams` keeps its streams under it."""
AFTER_RESERVED: Final = "/"
KEEP_SESSION_SECONDS: Final = 3_600.0
"""How long the head of a session that is not renewed, or over, may be looked up; one that is gone is observed as one that is silent."""
ABSENT: Final = -1
MAX_MAIL: Final = 256
LOOK_AT_ALL: Final = "*"


class SessionState(msgspec.Struct, frozen=True):
    """What the head of a session says."""

    beat: int
    """Counts its renewals, from 1; nobody else changes it. ABSENT, if somebody has asked a session that is not there."""
    lease: float
    grace: float
    is_over: bool = False
    is_challenged: bool = False
    """Somebody has asked for a sign of life, by a commit of their own: what is as slow for them as for the session is no silence."""


class Mail(msgspec.Struct, frozen=True):
    """What the head of a session's mailbox says. It is a head of its own, so that no number of senders can get in the way of a renewal."""

    streams: tuple[str, ...]
    """Streams that are, or may be, no longer the session's; LOOK_AT_ALL when there are too many to say."""
    cancel: Mapping[str, str] = {}
    """Streams that their writers are to cancel themselves, with their `life`: they commit faster than whoever wishes it. What is too much
    is left out, and asked for again."""


def session_id(session: str) -> str:
    """Give the id under which a session has its head."""
    return SESSION_PREFIX + session


def mailbox_id(session: str) -> str:
    """Give the id under which a session has its mailbox, while there is something in it."""
    return session_id(session) + ".mail"


def session_of(head: Head) -> SessionState:
    """Read a session's head. StorageCorruptError: it is none."""
    try:
        return _session_decoder.decode(head.state)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise StorageCorruptError(
            "the head of a session is damaged, or was written by a newer version of streamkeep"
        ) from error


def seems_alive(head: Head, now: float) -> bool:
    """Say whether a session was renewed lately, by the storage's time: good enough to wait for it, and for nothing else."""
    state = session_of(head)
    return not state.is_over and state.beat != ABSENT and now < committed_at(head) + state.lease + state.grace


def renew(head: Head | None, beat: int, now: float, session: str, terms: Terms, *, is_over: bool = False) -> Head:
    """Give the next head of a session, or its first one: also if a storage went back, or somebody has removed it."""
    return _session_head(
        0 if head is None else head.version, SessionState(beat, terms.lease, terms.grace, is_over), now, session
    )


def challenge(head: Head | None, state: SessionState, now: float, who: str) -> Head:
    """Ask a session for a sign of life; None: also one that is not there, because the storage has lost it, or a clock that jumped."""
    return _session_head(0 if head is None else head.version, replace(state, is_challenged=True), now, who)


def mail_of(head: Head) -> Mail:
    """Read a mailbox. One that cannot be read may say anything."""
    try:
        return _mail_decoder.decode(head.state)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return Mail((LOOK_AT_ALL,))


def post(head: Head | None, mail: Mail, now: float, who: str) -> Head:
    """Send a session mail, by the next head of its mailbox; None: that is empty."""
    there = Mail(()) if head is None else mail_of(head)
    streams = (*there.streams, *mail.streams)
    cancel = {**there.cancel, **mail.cancel}
    state = Mail(streams if len(streams) <= MAX_MAIL else (LOOK_AT_ALL,), dict(list(cancel.items())[:MAX_MAIL]))
    return Head(version_after(0 if head is None else head.version, now, who), 0, _encode(state), now + KEEP_SESSION_SECONDS)


def _session_head(seen: int, state: SessionState, now: float, who: str) -> Head:
    return Head(version_after(seen, now, who), 0, _encode(state), now + KEEP_SESSION_SECONDS)


_session_decoder: Final = msgspec.json.Decoder(SessionState)
_mail_decoder: Final = msgspec.json.Decoder(Mail)
