"""Claims: what a stream that is being opened has to do with names. Here it is decided which stream runs under a key, and which is a run's.

Names are looked at before the stream is created, so that who starts again what runs changes nothing. They are claimed when it is there,
each by a commit on the condition that the name is still the one that was seen, so that of many who start at once one wins. Who dies in
between leaves a stream that nobody writes, and a name to it at most.

The run comes before the key: who repeats a start must find it before a second one has replaced the first.
"""

from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

import anyio

from . import _names
from ._cancel import cancel
from ._core import Core
from ._guard import commit_once
from ._lifecycle import Beginning, Life, life_of, why_refused
from ._names import Kind
from ._naming import Named, forget_names, look_up, names_life
from .errors import KeyInUseError, StorageCorruptError, StorageError, StreamNotFoundError
from .storage import Head

T = TypeVar("T")


class Claims:
    """What one `open` claims for its stream; for a stream without owner, key and run, nothing."""

    def __init__(self, core: Core, stream: str, what: Beginning, *, replace: bool) -> None:
        self._core = core
        self._stream = stream
        self._replace = replace
        self._own = _names.name_id(what.owner, Kind.OWN, stream) if what.owner else ""
        self._run = _names.name_id(what.owner, Kind.RUN, what.run) if what.run else ""
        self._key = _names.name_id(what.owner, Kind.KEY, what.key) if what.key else ""
        self._is_noted = not what.owner
        self._seen: dict[str, Named] = {}

    @property
    def is_exclusive(self) -> bool:
        """Whether there is something to be claimed that others may claim too."""
        return bool(self._seen)

    async def look(self) -> None:
        """Raise KeyInUseError if there is no need to begin. Changes nothing, but ends what was abandoned. Raises StorageError."""
        for name in filter(None, (self._run, self._key)):
            self._seen[name] = await self._look_at(name)

    async def look_for(self, life: Life) -> None:
        """Do the same for a stream that is there, and is to be gone on with: its names are its own, unless who began it died between."""
        self._is_noted = not self._own or await names_life(self._core.storage, self._own, life)
        for name in filter(None, (self._run, self._key)):
            if not await names_life(self._core.storage, name, life):
                self._seen[name] = await self._look_at(name)

    async def create(self, life: Life, commit: Callable[[], Awaitable[bool]]) -> bool:
        """Create the stream by `commit`, give its answer or raise its error; and note meanwhile whose it is, if nobody is in the way."""
        if self._is_noted:
            return await commit()

        async def note() -> None:
            with suppress(StorageError):  # it is done again
                self._is_noted = await commit_once(self._core.storage, self._own, None, self._naming(Named(), life))

        if await _beside(commit, note):
            return True
        if self._is_noted:  # somebody else's stream is there
            self._is_noted = False
            with suppress(StorageError):  # it expires
                await forget_names(self._core.storage, self._stream, life.state)
        return False

    async def claim(self, life: Life) -> None:
        """Make the stream, which is there, the one that the names name. Raises KeyInUseError, StreamTakenOverError, StorageError."""
        while not self._is_noted:
            page = await self._core.storage.read(self._own)
            self._is_noted = await self._commit(self._own, Named(None if page is None else page.head), life)
        for name, named in self._seen.items():  # what was no obstacle is none now, unless the name has changed
            await self._claim(name, named, life)

    async def _claim(self, name: str, named: Named, life: Life) -> None:
        while True:
            if named.life is not None and named.life.state.status == "open":
                with suppress(StreamNotFoundError):
                    await cancel(self._core, named.stream, named.life.state.life)
            if await self._commit(name, named, life):
                return
            page = await self._core.storage.read(self._stream)
            if page is None or (there := life_of(page.head)).state.status != "open":
                return  # the answer was lost, and whoever has replaced it already has cancelled it
            if there.state.writer != life.state.writer:
                raise why_refused(page.head, life.state)  # this took so long that it was taken for dead
            named = await self._look_at(name)

    async def _look_at(self, name: str) -> Named:
        """Find what a name names, and raise KeyInUseError if that is in the way. What is open then is to be replaced."""
        core = self._core
        while True:
            try:
                named = await look_up(core.storage, name)
            except StorageCorruptError:
                if name == self._run or not self._replace:
                    raise
                page = await core.storage.read(name)
                return Named(None if page is None else page.head)  # of what cannot be read nothing can be cancelled
            if named.life is None:
                return named
            if name == self._run:
                raise KeyInUseError("this run was started already", stream=named.stream, is_same_run=True)
            if named.life.state.status != "open" or self._replace:
                return named
            if not await core.end_if_abandoned(named.stream, named.life):
                await core.ask_for_quiet_writer(named.stream, named.life)
                raise KeyInUseError("a stream is being written under this key", stream=named.stream)

    async def _commit(self, name: str, named: Named, life: Life) -> bool:
        return await self._core.sweeper.commit(name, named.version, self._naming(named, life))

    def _naming(self, named: Named, life: Life) -> Head:
        return _names.naming(named.head, self._stream, life, self._core.now())


async def _beside(call: Callable[[], Awaitable[T]], other: Callable[[], Coroutine[Any, Any, None]]) -> T:
    """Give what a call gives, or raise what it raises, bare. Another one, which raises nothing, is made meanwhile."""
    answers: list[T] = []
    failures: list[Exception] = []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(other)
        try:
            answers.append(await call())
        except Exception as error:  # raised here, it would arrive in a group
            failures.append(error)
    if failures:
        raise failures[0]
    return answers[0]
