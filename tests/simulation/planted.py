"""Bugs to plant, each one that such libraries have had: what the simulation must find, or its silence means nothing.

A bug replaces one function of streamkeep for a while. Each says which promise it breaks.
"""

from collections.abc import Mapping, Sequence
from math import inf
from typing import Any, Final, Protocol

import pytest
import trio

from streamkeep import _lifecycle
from streamkeep._claims import Claims
from streamkeep._core import Core
from streamkeep._feed import NO_RECORDS, Feed, Records
from streamkeep._input import StreamInput
from streamkeep._lifecycle import Life, Mail, Mark
from streamkeep._observer import Observed, Observer
from streamkeep._outbox import Outbox
from streamkeep._recoveries import Recoveries
from streamkeep._recovery import PREFIX
from streamkeep._running import Running
from streamkeep._sessions import _Renewal
from streamkeep._subscription import From, Subscription
from streamkeep._sweeper import Sweeper
from streamkeep.errors import StorageError
from streamkeep.events import RESTARTED_RECORD
from streamkeep.storage import Doorbell, Head, Page
from streamkeep.storages.memory import MemoryStorage

from .histories import TEMPERATE, Climate


class Plant(Protocol):
    """A bug."""

    __name__: str

    def __call__(self, patch: pytest.MonkeyPatch, /) -> None: ...


def a_failed_commit_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    """What went into a commit that failed is lost, though the writer goes on."""
    commit = Outbox._commit

    async def forgetful(self: Outbox) -> None:
        try:
            await commit(self)
        except StorageError:
            self._doubt = None
            raise

    patch.setattr(Outbox, "_commit", forgetful)


def a_failed_commit_is_made_anew(patch: pytest.MonkeyPatch) -> None:
    """What went into a commit whose answer was lost is stored twice."""
    commit = Outbox._commit

    async def eager(self: Outbox) -> None:
        try:
            await commit(self)
        except StorageError:
            assert self._doubt is not None
            self._queue[:0] = self._doubt[1]
            self._doubt = None
            head = await self._read_head()
            self.life = _lifecycle.life_of(head) if head else self.life
            raise

    patch.setattr(Outbox, "_commit", eager)


def a_refused_commit_counts_as_done(patch: pytest.MonkeyPatch) -> None:
    """A writer that was taken over from, or cancelled, is told that what it writes is stored."""

    async def deaf(self: Outbox) -> None:
        self._doubt = self._doubt or self._plan()
        life, records = self._doubt
        await self._core.storage.commit(self.stream, self.life.head.version, life.head, records)
        self._doubt, self.life = None, life
        if not _lifecycle.is_written(life.state):
            self._stop()

    patch.setattr(Outbox, "_commit", deaf)


def a_refused_commit_is_tried_on_the_newest_head(patch: pytest.MonkeyPatch) -> None:
    """A writer that was taken over from writes on, beside the new one."""
    commit = Outbox._commit

    async def stubborn(self: Outbox) -> None:
        head = await self._read_head()
        if head is not None and self._doubt is None:
            self.life = _lifecycle.life_of(head)
        await commit(self)

    patch.setattr(Outbox, "_commit", stubborn)


def a_write_returns_before_it_is_stored(patch: pytest.MonkeyPatch) -> None:
    """A write that has returned dies with the process."""

    async def hasty(self: StreamInput, chunk: object) -> int:
        return self.write_soon(chunk)

    patch.setattr(StreamInput, "write", hasty)


def done_overtakes_what_is_queued(patch: pytest.MonkeyPatch) -> None:
    """What was written soon before `done` is lost."""
    finish = Outbox.finish

    async def finish_at_once(self: Outbox, *args: Any, **options: Any) -> None:
        self._queue.clear()
        await finish(self, *args, **options)

    patch.setattr(Outbox, "finish", finish_at_once)


def what_has_ended_is_cancelled_again(patch: pytest.MonkeyPatch) -> None:
    """A stream gets two ends."""

    def cancel(life: Life, now: float, who: str) -> Life:
        return _lifecycle._finish_for(life, now, "CANCELLED", who)

    patch.setattr(_lifecycle, "cancel", cancel)


def sessions_are_not_renewed(patch: pytest.MonkeyPatch) -> None:
    """A writer that lives is taken for dead."""

    async def sleep(self: _Renewal) -> None:
        await trio.sleep_forever()

    patch.setattr(_Renewal, "_renew_on", sleep)


def a_session_is_not_begun_again(patch: pytest.MonkeyPatch) -> None:
    """A writer that lives is taken for dead, once the storage has gone back to before its session."""
    renew = _Renewal._try_to_renew

    async def only_what_is_there(self: _Renewal, *, is_over: bool) -> bool:
        page = await self._storage.read(self._id)
        if self._beat and (page is None or _lifecycle.session_of(page.head).beat == _lifecycle.ABSENT):
            return True
        return await renew(self, is_over=is_over)

    patch.setattr(_Renewal, "_try_to_renew", only_what_is_there)


def nobody_is_challenged(patch: pytest.MonkeyPatch) -> None:
    """A writer that lives is taken for dead, because the storage is slow."""
    patch.setattr(Observed, "proven", property(lambda self: self.silent))


def a_first_look_counts_as_silence(patch: pytest.MonkeyPatch) -> None:
    """A writer that lives is taken for dead by who sees it for the first time."""
    see = Observed.see

    def impatient(self: Observed, state: _lifecycle.SessionState, after: float) -> None:
        see(self, state, after)
        self.silent += 2 * self.terms.lease
        self.challenged_at, self.challenge_took = 0.0, 0.0

    patch.setattr(Observed, "see", impatient)


def nobody_ends_what_was_abandoned(patch: pytest.MonkeyPatch) -> None:
    """Readers of a writer that has died wait for ever."""
    patch.setattr(_lifecycle, "abandon", lambda *_: None)


def nobody_ends_what_has_no_writer(patch: pytest.MonkeyPatch) -> None:
    """A stream that is open again, because the storage went back, keeps its readers waiting for ever."""

    async def content(self: Core, stream: str) -> None:
        pass

    patch.setattr(Core, "_end_without_writer", content)


def an_open_that_failed_is_not_undone(patch: pytest.MonkeyPatch) -> None:
    """An id belongs to nobody for a while."""

    def content(self: Running, *_: object) -> None:
        pass

    patch.setattr(Running, "_undo", content)


def no_mail_is_sent(patch: pytest.MonkeyPatch) -> None:
    """A writer is not told that it was cancelled, and goes on being paid for."""

    async def silent(self: Observer, session: str, stream: str, *, cancel: str = "") -> None:
        pass

    patch.setattr(Observer, "tell", silent)


def mail_is_lost_at_a_renewal(patch: pytest.MonkeyPatch) -> None:
    """A writer is not told that it was cancelled, and goes on being paid for."""
    begin = _Renewal.__init__

    def deaf(self: _Renewal, *args: Any) -> None:
        begin(self, *args)
        self._host.take = _do_nothing  # type: ignore[method-assign] # that is the bug

    patch.setattr(_Renewal, "__init__", deaf)


def _do_nothing(_: Mail) -> None:
    pass


def an_open_stream_expires(patch: pytest.MonkeyPatch) -> None:
    """It is forgotten as soon as a clock says so, and nobody is told of its end."""
    patch.setattr(_lifecycle, "FORGET_OPEN_SECONDS", 0.0)
    patch.setattr(Sweeper, "_is_removable", lambda *_: True)


def sessions_are_kept_for_ever(patch: pytest.MonkeyPatch) -> None:
    """Each process leaves something behind."""
    removable = Sweeper._is_removable

    def careful(self: Sweeper, stream: str, head: Head) -> bool:
        return not stream.startswith(_lifecycle.SESSION_PREFIX) and removable(self, stream, head)

    patch.setattr(Sweeper, "_is_removable", careful)


def after_is_read_as_from(patch: pytest.MonkeyPatch) -> None:
    """A reader that comes back gets its last event again."""
    subscribe = Subscription.__init__

    def inclusive(self: Subscription[Any], running: Any, stream: str, begin: From, *args: Any) -> None:
        subscribe(self, running, stream, From(begin.after - 1) if begin.after else begin, *args)

    patch.setattr(Subscription, "__init__", inclusive)


def whoever_claims_a_name_has_it(patch: pytest.MonkeyPatch) -> None:
    """A claim that came second counts."""
    commit = Claims._commit

    async def stubborn(self: Claims, *args: Any) -> bool:
        await commit(self, *args)
        return True

    patch.setattr(Claims, "_commit", stubborn)


def nobody_compares_histories(patch: pytest.MonkeyPatch) -> None:
    """A reader is shown two histories as one, or waits for what the storage has no more."""
    patch.setattr(_lifecycle, "check_history", lambda *_: None)


def a_feed_waits_before_it_reads(patch: pytest.MonkeyPatch) -> None:
    """What was stored between a reader's first page and the watching comes late, or never."""
    read_on = Feed._read_on

    async def asleep(self: Feed, doorbell: Doorbell) -> None:
        await doorbell.wait()
        await read_on(self, doorbell)

    patch.setattr(Feed, "_read_on", asleep)


def followers_are_not_told_that_their_feed_failed(patch: pytest.MonkeyPatch) -> None:
    """They wait for ever."""

    def silently(self: Feed, why: Any) -> None:
        self._failure = why

    patch.setattr(Feed, "_fail", silently)


def a_failed_feed_reads_as_the_end(patch: pytest.MonkeyPatch) -> None:
    """Readers take a failure of the storage for the stream's end."""
    take = Subscription._records

    async def content(self: Subscription[Any]) -> Records:
        try:
            return await take(self)
        except StorageError:
            self._is_over = True
            return NO_RECORDS

    patch.setattr(Subscription, "_records", content)


def what_is_shared_is_dropped_and_not_counted(patch: pytest.MonkeyPatch) -> None:
    """Readers get the wrong events."""
    drop = Feed._drop_all

    def forgetful(self: Feed) -> None:
        base = self.base
        drop(self)
        self.base = base

    patch.setattr(Feed, "_drop_all", forgetful)


def who_is_ahead_of_what_is_shared_is_given_nothing_at_all(patch: pytest.MonkeyPatch) -> None:
    """A reader that has read a page alone is told that the storage has lost it."""
    since = Feed.since

    def generous(self: Feed, offset: int) -> Records | None:
        return Records(offset, ()) if offset > self.tail else since(self, offset)

    patch.setattr(Feed, "since", generous)


def a_storage_compares_no_versions(patch: pytest.MonkeyPatch) -> None:
    """Of two writers both write."""
    commit = MemoryStorage.commit

    async def careless(self: MemoryStorage, stream: str, seen: int | None, head: Head, records: Sequence[bytes] = ()) -> bool:
        return await commit(self, stream, self._version(stream), head, records)

    patch.setattr(MemoryStorage, "commit", careless)


def a_storage_reads_head_and_records_apart(patch: pytest.MonkeyPatch) -> None:
    """A page has the newest head, and not the newest record."""
    read = MemoryStorage.read

    async def torn(self: MemoryStorage, stream: str, start: int = 0, limit: int = 0) -> Page | None:
        page = await read(self, stream, start, limit)
        return page and Page(page.head, page.records[:-1])

    patch.setattr(MemoryStorage, "read", torn)


def a_storage_does_not_find_all_that_is_due(patch: pytest.MonkeyPatch) -> None:
    """What has expired is kept for ever."""
    expired = MemoryStorage.expired

    async def lazy(self: MemoryStorage, before: float, limit: int = 100) -> Sequence[tuple[str, Head]]:
        return (await expired(self, before, limit))[1:]

    patch.setattr(MemoryStorage, "expired", lazy)


def the_first_checkpoint_of_a_commit_counts(patch: pytest.MonkeyPatch) -> None:
    """Who goes on does so behind an earlier chunk than the last one that has a checkpoint, and writes what is there again."""
    take = Outbox._take_marks

    def first(self: Outbox, count: int) -> list[Mark]:
        return take(self, count)[:1]

    patch.setattr(Outbox, "_take_marks", first)


def a_restart_keeps_the_checkpoint(patch: pytest.MonkeyPatch) -> None:
    """An answer that begins again is gone on with behind what was superseded."""

    async def restart(self: StreamInput) -> None:
        await self._outbox.stored(self._outbox.put(RESTARTED_RECORD))

    patch.setattr(StreamInput, "restart", restart)


def who_goes_on_asks_nobody_whether_the_writer_is_dead(patch: pytest.MonkeyPatch) -> None:
    """A stream is taken from a writer that lives."""

    async def find(self: Recoveries, core: Core) -> None:
        self._found.extend([id for id, _ in await core.storage.scan(PREFIX, 100) if id.startswith(PREFIX)])

    async def abandon(self: Core, stream: str, life: Life) -> bool:
        return await self._abandon(stream, life, inf, self.terms)

    patch.setattr(Recoveries, "_find", find)
    patch.setattr(Core, "end_if_abandoned", abandon)


CALM: Final = Climate(slow_commits=0, jumps=0, goes_back=0, calm=1, holds=0)
ROUGH: Final = Climate(slow_commits=0, jumps=0, goes_back=0, calm=0, holds=1)
SLUGGISH: Final = Climate(slow_commits=1, jumps=0, goes_back=0, calm=0.8, holds=0)
CROWDED: Final = Climate(slow_commits=0, jumps=0, goes_back=0, calm=0, starts=1)
FORGETFUL: Final = Climate(slow_commits=0, jumps=0, goes_back=1, calm=0.8, holds=0)
RECOVERING: Final = Climate(slow_commits=0, jumps=0, goes_back=0, calm=0.5, holds=0, recovers=1)

BUGS: Final[Mapping[Plant, Climate]] = {
    a_failed_commit_is_forgotten: TEMPERATE,
    a_failed_commit_is_made_anew: TEMPERATE,
    a_refused_commit_counts_as_done: TEMPERATE,
    a_refused_commit_is_tried_on_the_newest_head: TEMPERATE,
    a_write_returns_before_it_is_stored: TEMPERATE,
    done_overtakes_what_is_queued: TEMPERATE,
    what_has_ended_is_cancelled_again: TEMPERATE,
    sessions_are_not_renewed: CALM,
    a_session_is_not_begun_again: FORGETFUL,
    nobody_is_challenged: SLUGGISH,
    a_first_look_counts_as_silence: TEMPERATE,
    nobody_ends_what_was_abandoned: TEMPERATE,
    nobody_ends_what_has_no_writer: FORGETFUL,
    an_open_that_failed_is_not_undone: ROUGH,
    no_mail_is_sent: CALM,
    mail_is_lost_at_a_renewal: CALM,
    an_open_stream_expires: TEMPERATE,
    sessions_are_kept_for_ever: TEMPERATE,
    after_is_read_as_from: TEMPERATE,
    whoever_claims_a_name_has_it: CROWDED,
    nobody_compares_histories: FORGETFUL,
    a_feed_waits_before_it_reads: TEMPERATE,
    followers_are_not_told_that_their_feed_failed: TEMPERATE,
    a_failed_feed_reads_as_the_end: TEMPERATE,
    what_is_shared_is_dropped_and_not_counted: TEMPERATE,
    who_is_ahead_of_what_is_shared_is_given_nothing_at_all: TEMPERATE,
    a_storage_compares_no_versions: TEMPERATE,
    a_storage_reads_head_and_records_apart: TEMPERATE,
    a_storage_does_not_find_all_that_is_due: TEMPERATE,
    the_first_checkpoint_of_a_commit_counts: RECOVERING,
    a_restart_keeps_the_checkpoint: RECOVERING,
    who_goes_on_asks_nobody_whether_the_writer_is_dead: RECOVERING,
}
"""The bugs, each with a climate in which it does harm in one history of fifty at least."""
