"""Who is at a stream, as far as this process knows: its writer, and those who follow it here."""

from dataclasses import dataclass
from typing import Literal

from ._info import StreamInfo
from ._running import Running

Where = Literal["here", "elsewhere", "none"]


@dataclass(frozen=True, slots=True)
class Presence:
    """Who is at a stream, as far as this process knows.

    Attributes:
        writer: `here`, a manager's own; `elsewhere`, of another manager; `none`: it was released, or the stream has ended.
        silent: for how many seconds its session is known to have given no sign of life; inf: it has said that it is over.
        dead_after: after how many such seconds it counts as dead, and whoever looks ends the stream.
        readers: how many follow the stream by this manager. Others leave no trace in the storage.
    """

    writer: Where
    silent: float
    dead_after: float
    readers: int


def presence_of(running: Running, stream: StreamInfo) -> Presence:
    """Say who is at a stream. Its session is observed for a while from now on, so that more is known to who asks again."""
    core = running.core
    silent, terms = core.observer.silence_of(stream.session)
    writer: Where = "none" if not stream.session else "here" if stream.session == core.session.name else "elsewhere"
    return Presence(writer, silent, terms.lease + terms.grace, running.feeds.followers_of(stream.id))
