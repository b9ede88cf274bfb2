"""Sweeper: removes what has expired, in the background. It asks for what is due, and so costs nothing for what is kept."""

import logging
import random
from collections.abc import Sequence
from typing import Final

import anyio
from anyio.lowlevel import checkpoint

from . import _lifecycle, _names
from ._guard import GuardedStorage, commit_once
from ._naming import forget_name, forget_names
from ._observer import Observer
from ._recovering import forget_expired
from ._recovery import BELL, PREFIX
from ._telling import Telling
from .errors import StorageCorruptError, StorageError, StorageFullError
from .storage import Head

logger: Final = logging.getLogger("streamkeep")

_NO_STREAM: Final = (_lifecycle.SESSION_PREFIX, BELL)
SWEEP_SECONDS: Final = 60.0
SWEEP_STREAMS: Final = 500
ROOM_STREAMS: Final = tuple(100 << doubled for doubled in range(8))
"""How many are removed at the first try to make room, the second, …: thousands may need room at once, and take what others have made."""
REMOVED_AT_ONCE: Final = 64
"""Enough for a storage to remove many in one go, and few enough for the event loop to do other things."""


class Sweeper:
    """Sweeps a manager's storage, one sweep at a time."""

    def __init__(self, storage: GuardedStorage, observer: Observer, telling: Telling | None = None) -> None:
        self._storage = storage
        self._observer = observer
        self._telling = telling
        self._turn = anyio.Lock()
        self._pages = 0  # how many it has swept, and what was removed by that
        self._removed = 0

    async def run(self) -> None:
        """Sweep every minute or so: not all processes at the same moment."""
        while True:
            try:
                await self.sweep()
            except StorageError as error:
                await checkpoint()  # ends here if the manager is being closed, and its storage with it
                logger.warning("the storage cannot be swept now: %s", error)
            await anyio.sleep(SWEEP_SECONDS * random.uniform(0.5, 1.0))  # noqa: S311 - jitter

    async def sweep(self) -> None:
        """Remove all that has expired. Raises StorageError."""
        limit = SWEEP_STREAMS
        while True:
            async with self._turn:  # page by page: who needs room must not wait for all of it
                found, removed = await self._sweep_page(limit)
            if not removed and found < limit:  # a page may be short because its heads are large
                return
            if found - removed > limit / 2:  # what cannot be removed is found again, and must not hide the rest
                limit *= 2

    async def commit(self, stream: str, seen: int | None, head: Head, records: Sequence[bytes] = ()) -> bool:
        """Commit as `commit_once` does, and make room for it in a full storage. StorageFullError: nothing more has expired."""
        limits = iter(ROOM_STREAMS)
        while True:
            before = (self._pages, self._removed)  # room that is made while this is refused is room for it
            try:
                return await commit_once(self._storage, stream, seen, head, records)
            except StorageFullError:
                limit = next(limits, 0)
                if not limit or not await self._make_room(limit, *before):
                    raise

    async def _make_room(self, limit: int, pages: int, removed: int) -> bool:
        """Remove some of what has expired, unless somebody has swept since there were so many `pages`; False if nothing was removed."""
        async with self._turn:
            if pages == self._pages:
                await self._sweep_page(limit)
            return self._removed > removed

    async def _sweep_page(self, limit: int) -> tuple[int, int]:
        """Remove some of what has expired; give how much there was, at most `limit`, and how much was removed."""
        found = await self._storage.expired(self._storage.time(), limit)
        removed = await self._remove_all(found)
        self._pages += 1
        self._removed += removed
        return len(found), removed

    async def _remove_all(self, found: Sequence[tuple[str, Head]]) -> int:
        removed = 0
        damaged: list[tuple[str, StorageError]] = []
        failure: StorageError | None = None

        async def remove(stream: str, head: Head) -> None:
            nonlocal removed, failure
            try:
                if await self._remove(stream, head):
                    removed += 1  # not above, where the sum would be begun before the others' deletions and ended after them
            except StorageCorruptError as error:
                damaged.append((stream, error))
            except StorageError as error:
                failure = error

        rest = iter(found)

        async def remove_rest() -> None:
            for stream, head in rest:
                await remove(stream, head)
                await checkpoint()  # a storage in memory waits for nothing

        async with anyio.create_task_group() as removals:
            for _ in range(min(len(found), REMOVED_AT_ONCE)):
                removals.start_soon(remove_rest)
        if damaged:
            logger.warning("%d streams cannot be swept, such as %s: %s", len(damaged), *damaged[0])
        if failure is not None:
            raise failure
        return removed

    async def _remove(self, stream: str, head: Head) -> bool:
        """Remove what has expired, if it may go; a stream with its names."""
        if stream.startswith(_lifecycle.PROTOCOL_PREFIX):
            return False  # what may be forgotten of it, its own part knows, and sweeps
        if _names.is_name(stream):
            return await forget_name(self._storage, stream, head)
        if stream.startswith(PREFIX):
            return await forget_expired(self._storage, stream, head)
        if not self._is_removable(stream, head) or not await self._storage.delete(stream, head.version):
            return False
        if not stream.startswith(_NO_STREAM):
            life = _lifecycle.life_of(head)
            if self._telling is not None:
                self._telling.removed(stream, life, "expired")
            await forget_names(self._storage, stream, life.state)
        return True

    def _is_removable(self, stream: str, head: Head) -> bool:
        """Say whether what has expired may go. An open stream goes when its writer is known to be gone, not because some clock jumped."""
        if stream.startswith(_NO_STREAM):
            return True
        life = _lifecycle.life_of(head)
        if life.state.status != "open":
            return True
        silent, terms = self._observer.silence_of(life.state.session)
        return _lifecycle.is_abandoned(life.state, silent, self._storage.time(), terms)
