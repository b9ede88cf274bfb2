"""Core: what a manager's parts share while it is open: the storage, its terms, and who writes and follows here."""

import logging
import uuid
from collections.abc import Awaitable, Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Final, Protocol

import anyio

from . import _lifecycle, _names
from ._background import Background
from ._guard import GuardedStorage
from ._lifecycle import Life, Mail, State, Terms
from ._naming import forget_names, keep_names
from ._observer import Observer
from ._recovering import Found, find_entries, forget_entries, hand_on, keep_entry, ring
from ._recovery import records_of
from ._sessions import Session
from ._sweeper import Sweeper
from ._telling import Telling
from .errors import StorageError
from .events import error_record

logger: Final = logging.getLogger("streamkeep")

LOOK_SECONDS: Final = 300.0
"""How often a writer that is quiet looks whether its stream is still its own, in case that nobody could tell it; and after how long a
feed that gets nothing asks whether the stream still has its writer."""
LOOKS_AT_ONCE: Final = 50
LOOK_PAUSES: Final = (1.0, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
"""When to look again, after a look that failed."""
REPORT_SECONDS: Final = 1.0


@dataclass(frozen=True, slots=True)
class Limits:
    """What one stream may hold. Reaching a limit raises `LimitExceededError`, and stores nothing.

    Attributes:
        max_event_bytes: the JSON of one chunk, output or ErrorInfo. (What is kept of an exception is 64 KiB of text.)
        max_events: events in a stream, the terminal one not counted.
        max_stream_bytes: all events of a stream together, the terminal one not counted.
        max_queued_events: what `write_soon` may be ahead of the storage.
    """

    max_event_bytes: int = 4 << 20
    max_events: int = 1_000_000
    max_stream_bytes: int = 256 << 20
    max_queued_events: int = 10_000


class Outbox(Protocol):
    """What is known here of a writer: see `_input`."""

    @property
    def stream(self) -> str:
        """The id of its stream."""
        ...

    @property
    def committed_at(self) -> float:
        """When it has last committed, by the event loop's clock."""
        ...

    async def look(self) -> None:
        """Find out whether the stream is still its own. Raises StorageError."""
        ...

    @property
    def busy_until(self) -> float:
        """Until when it counts as busy, by the event loop's clock."""
        ...

    @property
    def writer(self) -> str:
        """Its name, which the stream's head has as long as it is the one writer."""
        ...

    @property
    def queued(self) -> int:
        """How many records wait to be stored."""
        ...

    @property
    def life(self) -> Life:
        """Its stream, as it has last committed it."""
        ...

    def left(self) -> None:
        """Note that the last who followed its stream here has left."""
        ...

    def cancel(self, life: str) -> None:
        """End the stream with CANCELLED, soon, if it is the one that has this `life`."""
        ...


class Feed(Protocol):
    """What is known here of what followers of one stream share: see `_feed`."""

    def take(self, life: Life, records: Sequence[bytes]) -> None:
        """Take what a writer of this manager's has just stored."""
        ...

    def look(self) -> None:
        """Read the stream, and see who writes it."""
        ...


def new_name() -> str:
    """Give a name that nobody else has."""
    return uuid.uuid4().hex


class Core:
    """A manager that is open, as its parts see it."""

    def __init__(
        self,
        storage: GuardedStorage,
        background: Background,
        terms: Terms,
        limits: Limits,
        telling: Telling | None = None,
    ) -> None:
        self.storage = storage
        self.now: Final = storage.time
        self.background = background
        self.terms = terms
        self.limits = limits
        self.telling = telling
        self.session = Session(storage, background, terms, self._take)
        self.observer = Observer(storage, background, terms, self.session.name)
        self.sweeper = Sweeper(storage, self.observer, telling)
        self._reported: set[object] = set()
        self._reported_at = 0.0
        self._outboxes: dict[str, list[Outbox]] = {}
        self._feeds: dict[str, list[Feed]] = {}
        self._opening: set[str] = set()
        self._is_to_look_at_all = False
        self._is_looking_at_all = False
        self._unsure: set[Outbox] = set()

    def report(self, what: str, error: StorageError) -> None:
        """Log that the storage has failed; a sentence, and the traceback of a kind of error, once a second at most.

        It may concern thousands of streams, and may name each of them.
        """
        if anyio.current_time() - self._reported_at >= REPORT_SECONDS:
            self._reported.clear()
            self._reported_at = anyio.current_time()
        sentence, kind = str(error), (type(error), type(error.__cause__))
        if sentence not in self._reported:
            logger.warning("%s: %s", what, error, exc_info=None if kind in self._reported else error)
            self._reported.update((sentence, kind))

    # Writers

    def keep(self, outbox: Outbox) -> None:
        """Count a writer as one of this manager's, whom its followers here follow."""
        self._outboxes.setdefault(outbox.stream, []).append(outbox)
        self._tell_feeds(outbox.stream)

    def forget(self, outbox: Outbox) -> None:
        """Count it no more."""
        there = self._outboxes[outbox.stream]
        there.remove(outbox)
        if not there:
            del self._outboxes[outbox.stream]
        self._tell_feeds(outbox.stream)

    def _tell_feeds(self, stream: str) -> None:
        for feed in self._feeds.get(stream, ()):
            feed.look()

    def stored(self, stream: str, life: Life, records: Sequence[bytes]) -> None:
        """Give those who follow a stream here what a writer of this manager's has just stored: they need not read it."""
        for feed in self._feeds.get(stream, ()):
            feed.take(life, records)

    def writer_of(self, stream: str, life: Life) -> Outbox | None:
        """Give the writer of a stream, if it is one of this manager's."""
        there = self._outboxes.get(stream, ())
        return next((outbox for outbox in there if outbox.writer == life.state.writer), None)

    def outboxes(self, stream: str | None = None) -> Iterator[Outbox]:
        """Give the writers of a stream, or all, that this manager has now."""
        some = self._outboxes.values() if stream is None else [self._outboxes.get(stream, [])]
        return iter([outbox for outboxes in some for outbox in outboxes])

    @contextmanager
    def opening(self, stream: str, writer: str) -> Generator[Mapping[str, str]]:
        """While in this block, a stream of this writer may be stored already, and is not abandoned. Gives what hooks keep with it."""
        self._opening.add(writer)
        try:
            yield _lifecycle.NOTHING if self.telling is None else self.telling.opening(stream, writer)
        finally:
            self._opening.discard(writer)
            if self.telling is not None:
                self.telling.tried(stream, writer)

    # Readers

    def is_followed(self, stream: str) -> bool:
        """Say whether anybody follows a stream in this process."""
        return stream in self._feeds

    def add_feed(self, stream: str, feed: Feed) -> None:
        """Have a feed told of what this manager's writers store."""
        self._feeds.setdefault(stream, []).append(feed)

    def remove_feed(self, stream: str, feed: Feed) -> None:
        """Tell it no more; and this manager's writer of the stream, if there is one, that the last follower has left."""
        feeds = self._feeds[stream]
        feeds.remove(feed)
        if not feeds:
            del self._feeds[stream]
            for outbox in self.outboxes(stream):
                outbox.left()

    # Mail

    def _take(self, mail: Mail) -> None:
        for stream, life in mail.cancel.items():
            self._cancel(stream, life)
        self.look(mail.streams)

    def _cancel(self, stream: str, life: str) -> None:
        for outbox in self.outboxes(stream):
            outbox.cancel(life)

    def look(self, streams: Iterable[str]) -> None:
        """Have writers find out, soon, whether these streams are still theirs, and end what has no writer although it is this session's."""
        for stream in streams:
            if stream == _lifecycle.LOOK_AT_ALL:
                self._look_at_all()
            elif outboxes := list(self.outboxes(stream)):
                self.background.start(partial(self._look_at, outboxes), "looking at a stream")
            else:
                self.background.start(partial(self._end_without_writer, stream), f"looking at stream {stream}")

    def _look_at_all(self) -> None:
        self._is_to_look_at_all = True
        if not self._is_looking_at_all:
            self._is_looking_at_all = True
            self.background.start(self._look_while_asked, "looking at all streams")

    async def _look_while_asked(self) -> None:
        # One look after another: who asks during one may mean a stream that it has passed already.
        try:
            while self._is_to_look_at_all:
                self._is_to_look_at_all = False
                await self._look_at(list(self.outboxes()))
        finally:
            self._is_looking_at_all = False

    async def _end_without_writer(self, stream: str) -> None:
        """End a stream that is open again because the storage went back to before this manager's writer had ended or released it."""
        try:
            page = await self.storage.read(stream)
            if page is None or (state := _lifecycle.life_of(page.head).state).session != self.session.name:
                return
            if state.writer not in self._opening and not any(self.outboxes(stream)):
                await self._abandon(stream, _lifecycle.life_of(page.head), inf, self.terms)
        except StorageError as error:
            self.report(f"stream {stream}: cannot see whether it still has a writer", error)

    async def _look_at(self, outboxes: list[Outbox]) -> None:
        for first in range(0, len(outboxes), LOOKS_AT_ONCE):
            async with anyio.create_task_group() as looks:
                for outbox in outboxes[first : first + LOOKS_AT_ONCE]:
                    looks.start_soon(self._look_once, outbox)

    async def _look_once(self, outbox: Outbox) -> None:
        try:
            await outbox.look()
        except StorageError as error:
            self.report(f"stream {outbox.stream}: cannot see whether it is still its writer's", error)
            if outbox not in self._unsure:
                self._unsure.add(outbox)
                self.background.start(partial(self._look_again, outbox), f"looking at stream {outbox.stream} again")

    async def _look_again(self, outbox: Outbox) -> None:
        """Look until that succeeds, for a while: whoever has told the writer does so once."""
        try:
            for pause in LOOK_PAUSES:
                await anyio.sleep(pause)
                try:
                    return await outbox.look()
                except StorageError:
                    continue
        finally:
            self._unsure.discard(outbox)

    async def tend(self) -> None:
        """Look now and then at what quiet writers have, a few at a time, and put off the day on which it would be forgotten."""
        while True:
            began_at = anyio.current_time()
            quiet = [outbox for outbox in self.outboxes() if outbox.committed_at < began_at - LOOK_SECONDS / 2]
            pause = LOOK_SECONDS / (len(quiet) // LOOKS_AT_ONCE + 1)
            for first in range(0, len(quiet), LOOKS_AT_ONCE):
                await anyio.sleep(pause)
                await self._look_at(quiet[first : first + LOOKS_AT_ONCE])
            await anyio.sleep(max(pause, began_at + LOOK_SECONDS - anyio.current_time()))

    def keep_names_soon(self, stream: str, life: Life) -> None:
        """Have the names of a stream that was extended forgotten later as well, in the background."""
        if _names.names_for(stream, life.state) or life.state.recovery is not None:
            self.background.start(partial(self._keep_names, stream, life), f"keeping the names of stream {stream}")

    async def _keep_names(self, stream: str, life: Life) -> None:
        try:
            await keep_names(self.storage, stream, life.state)
            if life.state.recovery is not None:
                await keep_entry(self.storage, life.state)
        except StorageError as error:  # the next time is soon enough
            self.report(f"stream {stream}: its names cannot be kept longer yet", error)

    def forget_names_soon(self, stream: str, life: Life) -> None:
        """Have the names of a stream that is gone forgotten too, in the background; if that fails, they expire."""
        if _names.names_for(stream, life.state):
            self.background.start(partial(self._forget_names, stream, life), f"forgetting the names of stream {stream}")

    async def _forget_names(self, stream: str, life: Life) -> None:
        with suppress(StorageError):
            await forget_names(self.storage, stream, life.state)

    def let_recovery_go(self, stream: str, life: Life) -> None:
        """Have a stream that this manager's writer has ended, released or lost be no more among those of its session."""
        if life.state.recovery is not None:
            self._insist_soon(stream, partial(self._let_recovery_go, stream, life))

    def forget_entries_soon(self, stream: str, found: Sequence[Found]) -> None:
        """Have the entries that a stream had, before this manager has taken it over, be no more, in the background."""
        if found:
            self.background.start(partial(self._forget_entries, found), f"the entries of stream {stream}")

    async def _forget_entries(self, found: Sequence[Found]) -> None:
        with suppress(StorageError):  # who goes on with streams forgets them when it finds them
            await forget_entries(self.storage, found)

    async def _let_recovery_go(self, stream: str, life: Life) -> None:
        own, name = self.session.name, life.state.life
        found = await find_entries(self.storage, [own], name)  # first: one that is stored later is not meant
        page = await self.storage.read(stream)
        state = None if page is None else _lifecycle.life_of(page.head).state
        if state is None or state.life != name or state.session not in {own, ""} or state.status != "open":
            await forget_entries(self.storage, found)
        elif not state.session:
            await self._hand_on(found)

    async def _hand_on_left(self, state: State) -> None:
        await self._hand_on(await find_entries(self.storage, [state.session], state.life))

    async def _hand_on(self, found: Sequence[Found]) -> None:
        """Have those go on with a stream who can, although they do not know of its session that it is dead."""
        await hand_on(self.storage, found, self.sweeper.commit)
        await ring(self.storage, self.session.name)

    def _insist_soon(self, stream: str, do: Callable[[], Awaitable[None]]) -> None:
        self.background.start(partial(self._insist, stream, do), f"the entry of stream {stream}")

    async def _insist(self, stream: str, do: Callable[[], Awaitable[None]]) -> None:
        """Do something about the entry of a stream; while the storage fails, again and again, for a while."""
        for pause in LOOK_PAUSES:
            try:
                await do()
            except StorageError as error:
                self.report(f"stream {stream}: the entry of its recovery is not up to date yet", error)
                await anyio.sleep(pause)
            else:
                return

    # Streams whose writer is another manager's

    def silence_of(self, life: Life) -> tuple[float, Terms]:
        """Give for how long the session of a stream's writer is known to be silent, and its terms."""
        return self.observer.silence_of(life.state.session)

    async def end_if_abandoned(self, stream: str, life: Life) -> bool:
        """End a stream whose writer is gone; True if it has changed, whoever did it. Raises StorageError."""
        return await self._abandon(stream, life, *self.silence_of(life))

    async def _abandon(self, stream: str, life: Life, silent: float, terms: Terms) -> bool:
        ended = _lifecycle.abandon(life, self.now(), silent, terms, new_name())
        if ended is None:
            return False
        is_left = _lifecycle.is_left(ended.state)
        records = records_of(ended.state) if is_left else [error_record(_lifecycle.ABORTED)]
        is_done = await self.sweeper.commit(stream, life.head.version, ended.head, records)
        if is_done:
            _report_death(stream, life.state, ended.state)
            if self.telling is not None and not is_left:
                self.telling.ended(stream, ended)
        if is_left and is_done:  # once is enough: who knows that the session is dead finds the stream all the same
            self._insist_soon(stream, partial(self._hand_on_left, life.state))
        # Readers need not wait until a writer has been told that is dead, or would be.
        self.tell_writer_soon(stream, life)
        return True

    async def ask_for_writer(self, stream: str, life: Life) -> None:
        """Have the session of a stream look whether it has a writer for it; what it finds, it stores."""
        session = life.state.session
        if session == self.session.name:
            self.look([stream])
        elif session:
            await self.observer.tell(session, stream)

    async def ask_for_quiet_writer(self, stream: str, life: Life) -> None:
        """Do so if nothing was written for long; of a stream that a storage which went back has opened again, nobody else may ask."""
        if self.now() - _lifecycle.committed_at(life.head) >= LOOK_SECONDS:
            await self.ask_for_writer(stream, life)

    async def ask_writer_to_cancel(self, stream: str, life: Life) -> None:
        """Have the writer of a stream cancel it, whatever manager's it is; it may be written faster than others can cancel it."""
        self._cancel(stream, life.state.life)
        if self._is_anothers(life):
            await self.observer.tell(life.state.session, stream, cancel=life.state.life)

    async def tell_writer(self, stream: str, life: Life) -> None:
        """Let the writer that a stream had know that it is no longer its own; at once if it is one of this manager's."""
        for outbox in self.outboxes(stream):
            await self._look_once(outbox)
        if self._is_anothers(life):
            await self.observer.tell(life.state.session, stream)

    def tell_writer_soon(self, stream: str, life: Life) -> None:
        """Let another manager's writer know it in the background."""
        if self._is_anothers(life):
            self.observer.tell_soon(life.state.session, stream)

    def _is_anothers(self, life: Life) -> bool:
        return life.state.session not in {self.session.name, ""}


def _report_death(stream: str, state: State, ended: State) -> None:
    """Have the log say what has become of a stream with a recovery whose writer is gone: nobody else is there to say it."""
    if state.recovery is None:
        return
    name, deaths = state.recovery.name, state.attempt + 1
    if _lifecycle.is_left(ended):
        logger.warning("stream %s (%s): its writer has died, %d so far; it waits for another one", stream, name, deaths)
    elif state.session:
        logger.error("stream %s (%s): its writer has died, %d so far, and it is ended with ABORTED", stream, name, deaths)
    else:
        logger.error("stream %s (%s): nobody went on with it in time, and it is ended with ABORTED", stream, name)
