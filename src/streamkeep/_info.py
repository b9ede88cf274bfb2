"""StreamInfo: what is known of a stream without reading its events."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from . import _lifecycle
from ._lifecycle import Life
from .errors import Status

StreamStatus = Literal["open", "done", "error", "unreadable"]


@dataclass(frozen=True, slots=True)
class StreamInfo:
    """What is known of a stream without reading its events. Times are seconds since the epoch, by the storage's clock.

    Attributes:
        id: the stream's id.
        life: what tells this stream from others that live under its id before and after; empty if that cannot be read.
        status: `open`, `done` or `error`; `unreadable` (in lists only) if its head is damaged, or from a newer version.
        error: the status of the error it ended with (`CANCELLED`, `ABORTED`, …), if it did.
        tail: how many events it holds, the terminal one included.
        created_at: when it was opened.
        updated_at: about when it was last written to.
        session: the session of the manager whose writer may write; empty when there is none.
        expires_at: when a completed stream counts as absent.
        metadata: what was given to `open`; with its owner, if it has one.
        owner: whose it is; empty: nobody's.
        key: what it was opened under; empty: nothing. `current` says whether it is the newest one of that.
        is_recovering: whether its writer is gone, and another one is to go on with it.
        attempt: how many of its writers have died.
        superseded: events before this offset are of an answer that has begun again since; 0: it has not.
        writer: the name of the one handle that may write, or was the last one that might; empty if that cannot be read.
        carrier: what hooks keep with the stream, for hooks of other processes: see `Hooks.opening`. Not for clients.
    """

    id: str
    life: str
    status: StreamStatus
    error: Status | None
    tail: int
    created_at: float
    updated_at: float
    session: str
    expires_at: float
    metadata: Mapping[str, str]
    owner: str = ""
    key: str = ""
    is_recovering: bool = False
    attempt: int = 0
    superseded: int = 0
    writer: str = ""
    carrier: Mapping[str, str] = field(default_factory=dict)


def info_of(stream: str, life: Life) -> StreamInfo:
    """Say what is known of a stream."""
    head, state = life.head, life.state
    return StreamInfo(
        id=stream,
        life=state.life,
        status=state.status,
        error=state.error,
        tail=head.tail,
        created_at=state.created_at,
        updated_at=_lifecycle.committed_at(head),
        session=state.session,
        expires_at=head.expires_at,
        metadata=dict(state.described),  # copies: who is told of a stream must not change it
        owner=state.owner,
        key=state.key,
        is_recovering=_lifecycle.is_left(state),
        attempt=state.attempt,
        superseded=state.superseded,
        writer=state.writer,
        carrier=dict(state.carried),
    )
