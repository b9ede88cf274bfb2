"""Running: a manager from its being entered to its being closed; it begins and ends all that runs in the background, and opens streams."""

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Final, Self, TypeVar

import anyio
from anyio import CancelScope
from anyio.lowlevel import checkpoint

from . import _lifecycle
from ._background import Background
from ._claims import Claims
from ._core import Core, Limits
from ._encoding import Encode
from ._feed import PAGE_RECORDS, Feeds
from ._guard import GuardedStorage, commit_once
from ._input import StreamInput
from ._lifecycle import Life, Terms
from ._outbox import RELEASE_SECONDS, Outbox
from ._recovering import Found, add_entry, find_entries, first_entry
from ._recovery import Entry, entry_for, entry_id, records_of, recovery_of, sessions_of
from ._telling import Telling
from .errors import (
    KeyInUseError,
    StorageError,
    StorageFullError,
    StreamkeepError,
    StreamManagerClosedError,
)
from .hooks import Hooks, Sample
from .storage import Head

T = TypeVar("T")

logger: Final = logging.getLogger("streamkeep")

SAMPLE_SECONDS: Final = 1.0
RELEASES_AT_ONCE: Final = 64
RELEASES_A_SECOND: Final = 1_000
"""Closing takes as much longer than a few seconds as many writers take on a slow storage."""
UNDO_RETRY_SECONDS: Final = 1.0
MAX_UNDO_RETRY_SECONDS: Final = 30.0
UNDO_PAUSES: Final = (0.0, 0.1, 1.0, 5.0, 30.0, 60.0)
"""When to look for what an `open` whose answer was lost may have created: it may still be under way."""


class Running:
    """A manager from its being entered to its being closed."""

    def __init__(
        self, storage: GuardedStorage, terms: Terms, limits: Limits, hooks: Sequence[Hooks] = (), *, owns_storage: bool
    ) -> None:
        self.background = Background()
        self.telling = Telling(hooks, self.background) if hooks else None
        if self.telling is not None:
            storage.failed = self.telling.storage_failed
        self.core = Core(storage, self.background, terms, limits, self.telling)
        self.feeds = Feeds(self.core)
        self.is_closing = False
        self.is_closed = False
        self._owns_storage = owns_storage
        self._has_storage = False
        self._turn = anyio.Lock(fast_acquire=True)  # a cancellation before anything is ended would leave all of it running
        self._undoing: dict[str, anyio.Event] = {}
        self._doubts: dict[tuple[str, int], Callable[[], Awaitable[bool]]] = {}

    async def begin(self) -> None:
        """Open the storage, and begin the background work. Who closes meanwhile waits until that is done."""
        async with self._turn:
            self.background.begin()
            await self._open_storage()
        self.background.start(self.core.sweeper.run, "the sweeper")
        self.background.start(self.core.tend, "tending writers")
        if self.telling is not None and self.telling.of_samples:
            self.background.start(partial(self._sample, self.telling), "telling hooks how the manager is doing")

    async def _open_storage(self) -> None:
        if self._owns_storage:
            await self.core.storage.__aenter__()
            self._has_storage = True

    def check(self) -> Self:
        """Give this, if it is open and this is its event loop."""
        self.background.check_here()
        if self.is_closing:
            raise StreamManagerClosedError("the stream manager is closed")
        return self

    async def close(self) -> None:
        """End everything; who comes second waits as well, and goes on where a cancelled first one stopped."""
        self.is_closing = True
        async with self._turn:
            if self.is_closed:
                return
            try:
                await self._end_all()
                self.is_closed = True
            finally:
                is_storage_gone = self._owns_storage and not self._has_storage
                if self.telling is not None and (self.is_closed or is_storage_gone):
                    self._tell_of_end(self.telling)

    async def _end_all(self) -> None:
        try:
            await self._release_all()
            with anyio.move_on_after(RELEASE_SECONDS):
                await self.core.observer.finish()
            await self.core.session.stop()
        finally:
            # asyncio's own `Task.cancel` goes through shields, and must not leave anything behind.
            self.core.session.give_up()
            self.background.stop()
            if self._has_storage:
                self._has_storage = False
                with CancelScope(shield=True):
                    await self.core.storage.__aexit__(None, None, None)
        await self.background.wait()

    def _tell_of_end(self, telling: Telling) -> None:
        for outbox in self.core.outboxes():
            telling.fenced(outbox.stream, outbox.life, None)
        telling.closed(self.core.session.name)

    async def _sample(self, telling: Telling) -> None:
        while True:
            readers, lag = telling.readers()
            session, outboxes = self.core.session, list(self.core.outboxes())
            queued = sum(outbox.queued for outbox in outboxes)
            began, renewed = session.ages()
            telling.sampled(Sample(session.name, len(outboxes), queued, readers, lag, began, renewed))
            await anyio.sleep(SAMPLE_SECONDS)

    async def create(self, stream: str, life: Life, claims: Claims, input: str = "") -> bool:
        """Store the first head of a stream, and name it; False if there is one. Nothing is left behind if this raises.

        KeyInUseError: somebody else was first.
        """
        is_there = False
        try:
            if life.state.recovery is not None:  # first, so that no stream is left alone
                await self._add_entry(entry_for(stream, life.state, input))
            is_there = await claims.create(life, partial(self.core.sweeper.commit, stream, None, life.head))
            if is_there:
                await claims.claim(life)
        except BaseException as error:
            if is_there or not isinstance(error, StorageFullError):
                self._undo(stream, life.head, partial(self._remove, stream, life))
            if isinstance(error, KeyInUseError):
                await self.undone(stream)
            raise
        finally:
            if not is_there:
                self.core.let_recovery_go(stream, life)
        return is_there

    async def take_over(
        self, stream: str, head: Head, writer: str, encode: Encode, carrier: Mapping[str, str]
    ) -> StreamInput | None:
        """Go on with an open stream; None if it has changed meanwhile. KeyInUseError: another one runs under its key."""
        core = self.core
        old = _lifecycle.life_of(head)
        silent, terms = core.silence_of(old)
        life = _lifecycle.take_over(old, core.now(), core.session.name, writer, silent, terms, carrier=carrier)
        size = await self._size(stream, old)  # first, so that nothing can go wrong once the stream is ours
        claims = Claims(core, stream, _lifecycle.beginning_of(old.state), replace=False)
        await claims.look_for(old)
        taken = await self._take_entry(stream, old)
        if taken is None:
            return None
        found, input = taken
        is_ours = False
        try:
            is_ours = await core.sweeper.commit(stream, head.version, life.head)
            if not is_ours:
                return None
            await claims.claim(life)
        except BaseException:
            self._undo(stream, life.head, partial(self._release, stream, life))
            raise
        finally:
            if not is_ours:
                core.let_recovery_go(stream, life)
        core.forget_entries_soon(stream, found)
        core.tell_writer_soon(stream, old)  # not here, where a cancellation would leave the stream to nobody
        core.keep_names_soon(stream, life)
        return await self.give(stream, life, size, encode, claims, input, before=old)

    async def _take_entry(self, stream: str, life: Life) -> tuple[Sequence[Found], str] | None:
        """Have a stream, before it is taken over, found if this session dies; give the entries that it had, and the input kept in them.

        None: it has changed meanwhile.
        """
        state = life.state
        if state.recovery is None:
            return (), ""
        own = self.core.session.name
        found = await find_entries(self.core.storage, (own, *sessions_of(state)), state.life)
        entry = first_entry(found)
        if entry is None:  # lost; or with somebody quicker, and one without the input must not come to lie over that
            page = await self.core.storage.read(stream)
            if page is None or page.head != life.head:
                return None
            entry = entry_for(stream, state, "")
        await self._add_entry(entry)
        return [each for each in found if each.id != entry_id(own, state.life)], entry.input

    async def _add_entry(self, entry: Entry) -> None:
        await add_entry(self.core.storage, self.core.session.name, entry, self.core.sweeper.commit)

    async def give(
        self,
        stream: str,
        life: Life,
        size: int,
        encode: Encode,
        claims: Claims,
        input: str = "",
        *,
        before: Life | None = None,
    ) -> StreamInput:
        """Give the handle of a stream that is ours, and was there as it was `before`."""
        outbox = Outbox(self.core, stream, life, size)
        if self.telling is not None:
            self.telling.opened(stream, life, before)
        if self.is_closing:
            await _release(outbox)
            if self.telling is not None:
                self.telling.fenced(stream, outbox.life, None)  # unless it could be released
            self.check()
        if claims.is_exclusive:  # whoever has replaced it meanwhile has found no writer to be told
            self.core.look([stream])
        return StreamInput(outbox, encode, recovery_of(life.state.recovery, input))

    async def undone(self, stream: str) -> None:
        """Wait until nothing is left of an earlier `open` of this stream that failed; not for long."""
        if (undoing := self._undoing.get(stream)) is not None:
            with anyio.move_on_after(RELEASE_SECONDS):
                await undoing.wait()

    async def _size(self, stream: str, life: Life) -> int:
        """Give how many bytes a stream's records have: what its state says, and what has come since."""
        size, start = life.state.size, life.state.measured
        while start < life.head.tail and (page := await self.core.storage.read(stream, start, PAGE_RECORDS)) and page.records:
            size += sum(map(len, page.records))
            start += len(page.records)
        return size

    async def undo_now(self, stream: str, head: Head) -> bool:
        """Say whether this is the head of an earlier `open` that failed and has arrived only now; it is undone then."""
        undo = self._doubts.get((stream, head.version))
        if undo is None:
            return False
        await undo()
        return True

    def _undo(self, stream: str, head: Head, undo: Callable[[], Awaitable[bool]]) -> None:
        over = self._undoing[stream] = anyio.Event()
        self._doubts[stream, head.version] = undo

        async def run() -> None:
            try:
                for pause in UNDO_PAUSES:
                    await anyio.sleep(pause)
                    if await _answer(undo, stream):
                        return
                    over.set()  # it is not there; it may still come, if it is under way
            finally:
                over.set()
                del self._doubts[stream, head.version]
                if self._undoing.get(stream) is over:
                    del self._undoing[stream]

        self.background.start(run, f"undoing the opening of stream {stream}")

    async def _remove(self, stream: str, life: Life) -> bool:
        page = await self.core.storage.read(stream)
        if page is None or page.head != life.head or not await self.core.storage.delete(stream, life.head.version):
            return False
        self.core.forget_names_soon(stream, life)
        self.core.let_recovery_go(stream, life)
        return True

    async def _release(self, stream: str, life: Life) -> bool:
        page = await self.core.storage.read(stream)
        if page is None or page.head != life.head:
            return False
        released = _lifecycle.release(life, self.core.now())
        try:
            return await commit_once(self.core.storage, stream, life.head.version, released.head, records_of(life.state))
        finally:
            self.core.let_recovery_go(stream, life)

    async def _release_all(self) -> None:
        outboxes = list(self.core.outboxes())
        seconds = RELEASE_SECONDS + len(outboxes) / RELEASES_A_SECOND
        async with anyio.create_task_group() as releases:
            for number, outbox in enumerate(outboxes):
                assert isinstance(outbox, Outbox)
                releases.start_soon(_release, outbox, seconds)
                if number % RELEASES_AT_ONCE == 0:
                    await checkpoint()  # to begin thousands at once would hold the event loop up
        if left := list(self.core.outboxes()):
            logger.warning(
                "%d streams, such as %s, could not be released in time; what was queued for them may not be stored",
                len(left),
                left[0].stream,
            )


async def _release(outbox: Outbox, seconds: float = RELEASE_SECONDS) -> None:
    outbox.cancelled.set()
    with anyio.move_on_after(seconds):
        try:
            await outbox.release(StreamManagerClosedError("the stream manager is closed"))
        except StreamkeepError as error:
            outbox.warn("could not be released", error)


async def _answer(undo: Callable[[], Awaitable[bool]], stream: str) -> bool:
    """Undo, as often as it takes until the storage has answered: one that fails says nothing of what is there."""
    pause = UNDO_RETRY_SECONDS
    while True:
        try:
            return await undo()
        except StorageError as error:
            logger.info("stream %s: an attempt to open it cannot be undone yet: %s", stream, error)
        await anyio.sleep(pause)
        pause = min(2 * pause, MAX_UNDO_RETRY_SECONDS)
