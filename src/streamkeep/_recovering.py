"""Recovering: entries of streams that are to be gone on with, as a storage has them; see `_recovery`."""

from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from . import _lifecycle
from ._guard import GuardedStorage, commit_once
from ._lifecycle import State
from ._recovery import BELL, Entry, entry_head, entry_id, entry_of, rung, session_in
from .errors import StorageCorruptError, StorageError
from .storage import Head

Commit = Callable[[str, int | None, Head], Awaitable[bool]]
"""Commits a head as `commit_once` does; and makes room for it in a full storage, say."""


async def add_entry(storage: GuardedStorage, session: str, entry: Entry, commit: Commit | None = None) -> None:
    """Store the entry of a stream among those of a session, whatever is there; by `commit`, if it is given. Raises StorageError."""
    commit = commit or partial(commit_once, storage)
    id = entry_id(session, entry.life)
    while True:
        seen = await _head(storage, id)
        head = entry_head(seen, entry, storage.time())
        if await commit(id, None if seen is None else seen.version, head):
            return


@dataclass(frozen=True, slots=True)
class Found:
    """An entry as it was found. It is forgotten only as it was then: it may have been stored anew since, for somebody else."""

    id: str
    head: Head

    @property
    def entry(self) -> Entry | None:
        """What it says; None: that cannot be read."""
        with suppress(StorageCorruptError):
            return entry_of(self.head)
        return None


def first_entry(found: Iterable[Found]) -> Entry | None:
    """Give what the first of these that can be read says."""
    return next((each.entry for each in found if each.entry is not None), None)


async def find_entries(storage: GuardedStorage, sessions: Iterable[str], life: str) -> list[Found]:
    """Give the entries that a stream has among those of some sessions. Raises StorageError."""
    ids = [entry_id(session, life) for session in dict.fromkeys(sessions)]
    heads = [(id, await _head(storage, id)) for id in ids]
    return [Found(id, head) for id, head in heads if head is not None]


async def forget_entries(storage: GuardedStorage, found: Iterable[Found]) -> None:
    """Forget entries, unless they were stored anew. Raises StorageError."""
    for each in found:
        await storage.delete(each.id, each.head.version)


async def keep_entry(storage: GuardedStorage, state: State) -> None:
    """Put off the day on which an entry is forgotten, as that of its stream was. Raises StorageError."""
    id = entry_id(state.session, state.life)
    head = await _head(storage, id)
    if head is not None:
        await storage.commit(id, head.version, entry_head(head, entry_of(head), storage.time()))


async def forget_expired(storage: GuardedStorage, id: str, head: Head) -> bool:
    """Forget an entry that has expired, unless its stream is open: some clock jumped. Raises StorageError."""
    with suppress(StorageCorruptError):
        entry = entry_of(head)
        there = await _head(storage, entry.stream)
        if there is not None and (state := _lifecycle.life_of(there).state).life == entry.life and state.status == "open":
            await storage.commit(id, head.version, entry_head(head, entry, storage.time()))
            return False
    return await storage.delete(id, head.version)


async def hand_on(storage: GuardedStorage, found: Iterable[Found], commit: Commit) -> None:
    """Have others find a stream that was left by a session which they do not know to be dead. Raises StorageError."""
    for each in found:
        if each.entry is not None and session_in(each.id):
            await add_entry(storage, "", each.entry, commit)
            await storage.delete(each.id, each.head.version)


async def ring(storage: GuardedStorage, who: str) -> None:
    """Have those look who go on with streams. If it fails, they look by themselves."""
    with suppress(StorageError):
        seen = await _head(storage, BELL)
        await storage.commit(BELL, None if seen is None else seen.version, rung(seen, storage.time(), who))


async def _head(storage: GuardedStorage, id: str) -> Head | None:
    page = await storage.read(id)
    return None if page is None else page.head
