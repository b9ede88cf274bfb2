"""What tests of the core have in common."""

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import anyio

from streamkeep import StreamBusyError, StreamEventType, StreamInput, StreamManager
from streamkeep._core import Core
from streamkeep._running import Running
from streamkeep.storage import Head
from streamkeep.storages.memory import MemoryStorage, _Stream
from streamkeep.testing.faults import FaultyStorage


@dataclass(frozen=True)
class Process:
    """A process that can die, or be stopped for a while."""

    streams: StreamManager
    storage: FaultyStorage

    def die(self) -> None:
        self.storage.is_down = True

    def come_back(self) -> None:
        self.storage.is_down = False


async def resumed(streams: StreamManager, stream: str) -> StreamInput:
    """Take a stream over as soon as that is allowed."""
    while True:
        try:
            return await streams.open(stream, resume=True)
        except StreamBusyError as busy:
            await anyio.sleep(busy.retry_after)


async def replay(streams: StreamManager, stream: str = "s") -> list[Any]:
    """Give what is stored: chunks, and last the output or the error's status and message if the stream has ended."""
    found: list[Any] = []
    tail = (await streams.info(stream)).tail
    async with streams.subscribe(stream) as events:
        while len(found) < tail:
            event = await anext(events)
            match event.type:
                case StreamEventType.CHUNK:
                    found.append(event.chunk)
                case StreamEventType.DONE:
                    found.append(("done", event.output))
                case StreamEventType.ERROR:
                    found.append((event.error.status, event.error.message))
                case StreamEventType.RECOVERING:
                    found.append(("recovering", event.attempt))
                case StreamEventType.RESTARTED:
                    found.append("restarted")
    return found


def running_of(streams: StreamManager) -> Running:
    """Give what a manager is while it is open."""
    assert streams._running is not None
    return streams._running


def core_of(streams: StreamManager) -> Core:
    """Give what its parts share."""
    return running_of(streams).core


def frames(error: BaseException) -> int:
    """Count the frames of an exception's traceback."""
    return len(list(traceback.walk_tb(error.__traceback__)))


class BackupStorage(MemoryStorage):
    """A memory that can go back to what it was: a failover to a standby that was behind, a backup that is restored."""

    def __init__(self, *, clock: Callable[[], float] | None = None) -> None:
        super().__init__(clock=clock)
        self._backup: dict[str, tuple[Head, list[bytes]]] = {}

    def back_up(self) -> None:
        """Remember what there is."""
        self._backup = {stream: (kept.head, list(kept.records)) for stream, kept in self._streams.items()}

    def go_back(self) -> None:
        """Be again as remembered. Nobody is rung for."""
        self._streams = {stream: _Stream(head, head.first, list(records)) for stream, (head, records) in self._backup.items()}
        self._sorted_ids = None
