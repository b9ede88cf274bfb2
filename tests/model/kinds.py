"""The storages that are compared with their model: how each is made, and on which event loop it runs."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from streamkeep.storage import Storage
from streamkeep.storages.memory import MemoryStorage
from streamkeep.storages.sqlite import SQLiteStorage

OpenStorage = Callable[[], Storage]
"""Each call gives a storage, not entered, over the same data: another process, as far as can be."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A storage on an event loop. `at` gives what opens storages over the data in a directory, which it makes if it needs it."""

    name: str
    backend: Literal["asyncio", "trio"]
    at: Callable[[Path], OpenStorage]


def _memory(_: Path) -> OpenStorage:
    storage = MemoryStorage()
    return lambda: storage  # its content belongs to the object


def _sqlite(directory: Path) -> OpenStorage:
    directory.mkdir()
    return lambda: SQLiteStorage(directory / "streams.db", synchronous="NORMAL")  # power failures are not the matter here


KINDS: Final = (
    Kind("memory", "asyncio", _memory),
    Kind("memory-trio", "trio", _memory),
    Kind("sqlite", "asyncio", _sqlite),
)
