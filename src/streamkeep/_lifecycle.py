"""The rules of a stream's life: who may write, and until when.

Everything that affects that lives in this file, as functions from values to values. It reads no clock, no storage and no
event loop: the caller reads a head, asks here what follows, and commits the answer on the condition that the head has
not changed meanwhile. That condition, not the clock, is what keeps two writers apart; a lease only says when others may try.

          begin ──► open ──finish──► done | error
                    │  ▲       ▲
     extend, grow ──┘  │       │
              release, take_over, then abandon or cancel
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

import msgspec
from msgspec.structs import replace

from .errors import (
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
"""An open stream that nobody tends may be forgotten so long after its lease; until then readers are told that it was aborted."""

COPY: Final = "copy"
"""The writer of a stream that is being copied from another storage, and is not whole yet."""
COPY_SECONDS: Final = 86_400.0
"""How long a copy that was interrupted can be gone on with; then the stream counts as abandoned."""

CANCELLED: Final = ErrorInfo("CANCELLED", "the stream was cancelled")
ABORTED: Final = ErrorInfo("ABORTED", "the writer went away before the stream was completed")


@dataclass(frozen=True, slots=True)
class Terms:
    """How long things last, in seconds."""

    ttl: float
    lease: float
    grace: float


class State(msgspec.Struct, frozen=True):
    """What a head's opaque bytes say. It stays the same bytes from write to write, so that a write does not pay for it."""

    created_at: float
    writer: str = ""
    """The handle that may write; empty when it has let go."""
    lease_until: float = 0.0
    status: Literal["open", "done", "error"] = "open"
    error: Status | None = None
    metadata: Mapping[str, str] = {}


class Life(msgspec.Struct, frozen=True):
    """A head, with its state read."""

    head: Head
    state: State


def life_of(head: Head) -> Life:
    """Read a head. StorageCorruptError: its state is not one of ours."""
    try:
        return Life(head, _decoder.decode(head.state))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise StorageCorruptError("a head's state is not one of streamkeep's") from error


def is_written(state: State, now: float) -> bool:
    """Say whether the stream's writer is believed to live."""
    return state.status == "open" and bool(state.writer) and now < state.lease_until


def is_expired(head: Head, now: float) -> bool:
    """Say whether the stream counts as absent, whether or not anybody has removed it yet."""
    return now >= head.expires_at


def abandoned_at(state: State, terms: Terms) -> float:
    """Say when a stream that nobody renews may be completed by anybody."""
    return state.lease_until + terms.grace


def begin(now: float, writer: str, terms: Terms, metadata: Mapping[str, str], *, after_version: int = 0) -> Life:
    """Give the first head of a stream; `after_version` is that of an expired stream under the same id."""
    state = State(created_at=now, writer=writer, lease_until=now + terms.lease, metadata=metadata)
    head = Head(_version(after_version, now), 0, _encode(state), _expiry(state, terms, now))
    return Life(head, state)


def grow(life: Life, count: int, now: float) -> Life:
    """Append `count` records; the state's bytes stay."""
    head = life.head
    return Life(Head(_version(head.version, now), head.tail + count, head.state, head.expires_at), life.state)


def extend(life: Life, now: float, terms: Terms) -> Life:
    """Renew the writer's lease."""
    return _change(life, replace(life.state, lease_until=now + terms.lease), now, terms)


def take_over(life: Life, now: float, writer: str, terms: Terms) -> Life:
    """Make `writer` the one writer of an open stream.

    StreamCompletedError: it has ended. StreamBusyError: its writer's lease has not lapsed.
    """
    state = life.state
    if state.status != "open":
        raise StreamCompletedError(f"the stream has already completed ({_ending(state)})")
    if is_written(state, now):
        raise StreamBusyError("the stream's writer is alive", lease_until=state.lease_until)
    return _change(life, replace(state, writer=writer, lease_until=now + terms.lease), now, terms)


def finish(life: Life, now: float, terms: Terms, error: Status | None = None) -> Life:
    """Append the terminal record and end the stream; `error` is its status if it failed."""
    ended = replace(life.state, writer="", lease_until=0.0, status="error" if error else "done", error=error)
    return _change(grow(life, 1, now), ended, now, terms)


def release(life: Life, now: float, terms: Terms) -> Life:
    """Let go: anybody may take over at once, and has as long for it as if the writer had died now."""
    return _change(life, replace(life.state, writer="", lease_until=now + terms.lease), now, terms)


def abandon(life: Life, now: float, terms: Terms) -> Life | None:
    """End a stream whose writer is gone, with ABORTED as its terminal record; None while it is not time, or it has ended."""
    if life.state.status != "open" or now < abandoned_at(life.state, terms):
        return None
    return finish(life, now, terms, ABORTED.status)


def cancel(life: Life, now: float, terms: Terms) -> Life | None:
    """End an open stream, with CANCELLED as its terminal record; None if it has ended already."""
    if life.state.status != "open":
        return None
    return finish(life, now, terms, CANCELLED.status)


def copy_under_way(life: Life, tail: int, now: float, *, after_version: int) -> Head:
    """Give the head of what is copied of a stream until all of it is; `after_version` is that of the copy so far."""
    state = replace(life.state, writer=COPY, lease_until=now + COPY_SECONDS, status="open", error=None)
    # The last head is the original's own: no version before it may be the same.
    version = _version(max(after_version, life.head.version), now)
    return Head(version, tail, _encode(state), state.lease_until + FORGET_OPEN_SECONDS)


def why_refused(life: Life | None, writer: str) -> StreamkeepError:
    """Say why a commit of `writer` was refused, from the head that is there now."""
    if life is None:
        return StreamNotFoundError("the stream was deleted")
    if life.state.status != "open":
        return StreamCompletedError(f"the stream was completed by somebody else ({_ending(life.state)})")
    if life.state.writer != writer:
        return StreamTakenOverError("another writer has taken the stream over")
    return StorageCorruptError("the storage has not what it had acknowledged: a failover or a crash has taken the last moments")


def _change(life: Life, state: State, now: float, terms: Terms) -> Life:
    head = life.head
    return Life(Head(_version(head.version, now), head.tail, _encode(state), _expiry(state, terms, now)), state)


def _version(seen: int, now: float) -> int:
    # The time of the commit in microseconds, so that a stream which is created again after its deletion goes on with
    # greater numbers although nobody remembers the old ones. It also tells when the stream was last written to.
    return max(seen + 1, int(now * 1_000_000))


def _expiry(state: State, terms: Terms, now: float) -> float:
    if state.status == "open":
        return abandoned_at(state, terms) + FORGET_OPEN_SECONDS
    return now + terms.ttl


def _ending(state: State) -> str:
    return state.error or state.status


_decoder: Final = msgspec.json.Decoder(State)


def _encode(state: State) -> bytes:
    return msgspec.json.encode(state)
