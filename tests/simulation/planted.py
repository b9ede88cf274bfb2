"""Bugs to plant, each one that such libraries have had: what the simulation must find, or its silence means nothing.

A bug replaces one function of streamkeep for a while. Each says which promise it breaks.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from streamkeep import _lifecycle
from streamkeep._input import StreamInput
from streamkeep._lifecycle import Life, Terms
from streamkeep._manager import StreamManager
from streamkeep._subscription import Feed, Subscription
from streamkeep.errors import StorageError
from streamkeep.storage import Doorbell, Head, Page
from streamkeep.storages.memory import MemoryStorage

Plant = Callable[[pytest.MonkeyPatch], None]


def a_failed_commit_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    """What went into a commit that failed is lost, though the writer goes on."""
    commit = StreamInput._commit

    async def forgetful(self: StreamInput) -> None:
        try:
            await commit(self)
        except StorageError:
            self._doubt = None
            raise

    patch.setattr(StreamInput, "_commit", forgetful)


def a_failed_commit_is_made_anew(patch: pytest.MonkeyPatch) -> None:
    """What went into a commit whose answer was lost is stored twice."""
    commit = StreamInput._commit

    async def eager(self: StreamInput) -> None:
        try:
            await commit(self)
        except StorageError:
            assert self._doubt is not None
            self._queue[:0] = self._doubt[1]
            self._doubt = None
            there = await self._read_life()
            self._life = there or self._life
            raise

    patch.setattr(StreamInput, "_commit", eager)


def a_refused_commit_counts_as_done(patch: pytest.MonkeyPatch) -> None:
    """A writer that was taken over from, or cancelled, is told that what it writes is stored."""

    async def deaf(self: StreamInput) -> None:
        self._doubt = self._doubt or self._plan()
        life, records = self._doubt
        await self._storage.commit(self.id, self._life.head.version, life.head, records)
        self._doubt, self._life = None, life
        if life.state.writer != self._writer:
            self._stop()

    patch.setattr(StreamInput, "_commit", deaf)


def a_refused_commit_is_tried_on_the_newest_head(patch: pytest.MonkeyPatch) -> None:
    """A writer that was taken over from writes on, beside the new one."""
    commit = StreamInput._commit

    async def stubborn(self: StreamInput) -> None:
        there = await self._read_life()
        if there is not None and self._doubt is None:
            self._life = there
        await commit(self)

    patch.setattr(StreamInput, "_commit", stubborn)


def a_write_returns_before_it_is_stored(patch: pytest.MonkeyPatch) -> None:
    """A write that has returned dies with the process."""

    async def hasty(self: StreamInput, chunk: object) -> int:
        return self.write_soon(chunk)

    patch.setattr(StreamInput, "write", hasty)


def done_overtakes_what_is_queued(patch: pytest.MonkeyPatch) -> None:
    """What was written soon before `done` is lost."""
    finish = StreamInput._finish

    async def finish_at_once(self: StreamInput, *args: Any, **options: Any) -> None:
        self._queue.clear()
        await finish(self, *args, **options)

    patch.setattr(StreamInput, "_finish", finish_at_once)


def what_has_ended_is_cancelled_again(patch: pytest.MonkeyPatch) -> None:
    """A stream gets two ends."""

    def cancel(life: Life, now: float, terms: Terms) -> Life:
        return _lifecycle.finish(life, now, terms, "CANCELLED")

    patch.setattr(_lifecycle, "cancel", cancel)


def leases_are_not_renewed(patch: pytest.MonkeyPatch) -> None:
    """A writer that lives is taken for dead."""

    async def sleep(self: StreamManager) -> None:
        pass

    patch.setattr(StreamManager, "_renew_leases", sleep)


def nobody_ends_what_was_abandoned(patch: pytest.MonkeyPatch) -> None:
    """Readers of a writer that has died wait for ever."""
    patch.setattr(_lifecycle, "abandon", lambda life, now, terms: None)


def a_writer_is_not_told_that_it_was_cancelled(patch: pytest.MonkeyPatch) -> None:
    """It goes on being paid for."""

    async def deaf(self: StreamManager, stream: str, handle: object) -> None:
        pass

    patch.setattr(StreamManager, "_listen", deaf)


def an_open_stream_expires(patch: pytest.MonkeyPatch) -> None:
    """It is forgotten when its lease has lapsed, and nobody is told of its end."""
    patch.setattr(_lifecycle, "FORGET_OPEN_SECONDS", 0.0)
    patch.setattr(_lifecycle, "abandoned_at", lambda state, terms: state.lease_until)


def after_is_read_as_from(patch: pytest.MonkeyPatch) -> None:
    """A reader that comes back gets its last event again."""
    subscribe = Subscription.__init__

    def inclusive(self: Subscription[Any], keeper: Any, stream: str, after: int | None, *args: Any) -> None:
        subscribe(self, keeper, stream, after - 1 if after else None, *args)

    patch.setattr(Subscription, "__init__", inclusive)


def a_feed_waits_before_it_reads(patch: pytest.MonkeyPatch) -> None:
    """What was stored between a reader's first page and the watching comes late, or never."""
    read_on = Feed._read_on

    async def asleep(self: Feed, doorbell: Doorbell, patience: Any) -> None:
        await doorbell.wait()
        await read_on(self, doorbell, patience)

    patch.setattr(Feed, "_read_on", asleep)


def followers_are_not_told_that_their_feed_failed(patch: pytest.MonkeyPatch) -> None:
    """They wait for ever."""

    def silently(self: Feed, why: Any) -> None:
        self.failure = why

    patch.setattr(Feed, "fail", silently)


def a_failed_feed_reads_as_the_end(patch: pytest.MonkeyPatch) -> None:
    """Readers take a failure of the storage for the stream's end."""
    wait = Subscription._wait

    async def content(self: Subscription[Any], feed: Feed) -> None:
        try:
            await wait(self, feed)
        except StorageError:
            self._is_over = True

    patch.setattr(Subscription, "_wait", content)


def what_is_shared_is_trimmed_and_not_counted(patch: pytest.MonkeyPatch) -> None:
    """Slow readers get the wrong events."""
    trim = Feed._trim

    def forgetful(self: Feed, newest: int) -> None:
        base = self.base
        trim(self, newest)
        self.base = base

    patch.setattr(Feed, "_trim", forgetful)


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


BUGS: tuple[Plant, ...] = (
    a_failed_commit_is_forgotten,
    a_failed_commit_is_made_anew,
    a_refused_commit_counts_as_done,
    a_refused_commit_is_tried_on_the_newest_head,
    a_write_returns_before_it_is_stored,
    done_overtakes_what_is_queued,
    what_has_ended_is_cancelled_again,
    leases_are_not_renewed,
    nobody_ends_what_was_abandoned,
    a_writer_is_not_told_that_it_was_cancelled,
    an_open_stream_expires,
    after_is_read_as_from,
    a_feed_waits_before_it_reads,
    followers_are_not_told_that_their_feed_failed,
    a_failed_feed_reads_as_the_end,
    what_is_shared_is_trimmed_and_not_counted,
    a_storage_compares_no_versions,
    a_storage_reads_head_and_records_apart,
)
