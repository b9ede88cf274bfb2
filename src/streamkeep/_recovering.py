"""Recovering: entries of streams that are to be gone on with, as a storage has them; see `_recovery`."""

from collections.abc import Mapping
from contextlib import suppress

from . import _lifecycle
from ._guard import GuardedStorage, commit_once
from ._lifecycle import State
from ._recovery import BELL, Entry, entry_head, entry_id, entry_of, rung
from .errors import StorageCorruptError, StorageError
from .storage import Head


async def add_entry(storage: GuardedStorage, session: str, entry: Entry) -> None:
    """Store the entry of a stream among those of a session, whatever is there. Raises StorageError."""
    id = entry_id(session, entry.life)
    while True:
        seen = await _head(storage, id)
        head = entry_head(seen, entry, storage.time())
        if await commit_once(storage, id, None if seen is None else seen.version, head):
            return


async def find_entries(storage: GuardedStorage, state: State) -> Mapping[str, Head]:
    """Give the entries that a stream has, as its head is, by their ids: one, or none, or two while it is handed on. Raises StorageError."""
    ids = dict.fromkeys(entry_id(session, state.life) for session in (state.session, state.left_by, ""))
    return {id: head for id in ids if (head := await _head(storage, id)) is not None}


async def look_at_entry(storage: GuardedStorage, session: str, life: str) -> Head | None:
    """Give the entry of a stream among those of a session. Raises StorageError."""
    return await _head(storage, entry_id(session, life))


async def forget_entry(storage: GuardedStorage, session: str, life: str, seen: Head | None) -> None:
    """Forget an entry as it was seen. One that was added since is of who has taken the stream over meanwhile. Raises StorageError."""
    if seen is not None:
        await storage.delete(entry_id(session, life), seen.version)


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


async def hand_on(storage: GuardedStorage, session: str, life: str, seen: Head | None) -> None:
    """Have others find a stream that a session has released, and goes on without, by its entry as it was seen. Raises StorageError."""
    if seen is not None:
        await add_entry(storage, "", entry_of(seen))
        await forget_entry(storage, session, life, seen)


async def ring(storage: GuardedStorage, who: str) -> None:
    """Have those look who go on with streams. If it fails, they look by themselves."""
    with suppress(StorageError):
        seen = await _head(storage, BELL)
        await storage.commit(BELL, None if seen is None else seen.version, rung(seen, storage.time(), who))


async def _head(storage: GuardedStorage, id: str) -> Head | None:
    page = await storage.read(id)
    return None if page is None else page.head
