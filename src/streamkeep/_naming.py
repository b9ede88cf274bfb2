"""Naming: names as a storage has them: looked up, kept as long as the streams that they name, and forgotten with them."""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import anyio

from . import _names
from ._guard import GuardedStorage
from ._lifecycle import Life, State
from .errors import StorageCorruptError, StorageError
from .storage import Head

READ_AT_ONCE: Final = 64


@dataclass(frozen=True, slots=True)
class Named:
    """A name as it was found: its head, if it has one, the stream that it names, and that stream's head, unless it is gone."""

    head: Head | None = None
    stream: str = ""
    life: Life | None = None

    @property
    def version(self) -> int | None:
        """The version of the name's head."""
        return None if self.head is None else self.head.version


async def look_up(storage: GuardedStorage, name: str) -> Named:
    """Find what a name names, by the name's id. Raises StorageError; StorageCorruptError: one of the two heads cannot be read."""
    page = await storage.read(name)
    if page is None:
        return Named()
    state = _names.name_of(page.head)
    there = await storage.read(state.stream)
    return Named(page.head, state.stream, _names.named_by(state, None if there is None else there.head, storage.time()))


async def names_life(storage: GuardedStorage, name: str, life: Life) -> bool:
    """Say whether a name names this very stream. Raises StorageError."""
    return await _head_naming(storage, name, life.state) is not None


async def keep_names(storage: GuardedStorage, stream: str, state: State) -> None:
    """Put off the day on which the names of a stream are forgotten, as that of the stream was. Raises StorageError."""
    for name in _names.names_for(stream, state):
        head = await _head_naming(storage, name, state)
        if head is not None:
            await storage.commit(name, head.version, _names.keep(head, storage.time()))


async def forget_names(storage: GuardedStorage, stream: str, state: State) -> None:
    """Forget the names of a stream that is gone, but those that name another one by now. Raises StorageError."""
    for name in _names.names_for(stream, state):
        head = await _head_naming(storage, name, state)
        if head is not None:
            await storage.delete(name, head.version)


async def forget_name(storage: GuardedStorage, name: str, head: Head) -> bool:
    """Forget a name that has expired, unless the stream that it names is there: some clock jumped. Raises StorageError."""
    with suppress(StorageCorruptError):  # of what cannot be read nobody can say that it is named
        if (await look_up(storage, name)).life is not None:
            await storage.commit(name, head.version, _names.keep(head, storage.time()))
            return False
    return await storage.delete(name, head.version)


async def read_heads(storage: GuardedStorage, streams: Iterable[str]) -> Mapping[str, Head]:
    """Read the heads of some streams at once; those that are not there are left out. Raises StorageError."""
    heads: dict[str, Head] = {}
    failures: list[StorageError] = []
    rest = iter(streams)

    async def read_rest() -> None:
        for stream in rest:
            try:
                page = await storage.read(stream)
            except StorageError as error:
                failures.append(error)
                return
            if page is not None:
                heads[stream] = page.head

    async with anyio.create_task_group() as reads:
        for _ in range(READ_AT_ONCE):
            reads.start_soon(read_rest)
    if failures:
        raise failures[0]
    return heads


async def _head_naming(storage: GuardedStorage, name: str, state: State) -> Head | None:
    """Read a name, and give its head if it names this life of a stream."""
    page = await storage.read(name)
    with suppress(StorageCorruptError):
        if page is not None and _names.name_of(page.head).life == state.life:
            return page.head
    return None
