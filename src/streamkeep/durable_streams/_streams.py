"""Streams: what the protocol does with a storage. What follows of a request is decided in `_rules`; here it is read and committed."""

import logging
import math
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import anyio
import anyio.to_thread
import msgspec

from .._background import Background
from .._guard import GuardedStorage, commit_once
from .._lifecycle import version_after
from ..errors import (
    StorageCorruptError,
    StorageError,
    StorageFullError,
    StreamkeepError,
    StreamManagerClosedError,
    StreamNotFoundError,
)
from ..storage import PAGE_BYTES, Head
from . import _paths, _rules
from ._log import Log
from ._messages import first_of, is_continued, is_json, same_type
from ._requests import RefusedError
from ._rules import Answer, Append, Bounds, Config, Decision, ForkAsked, Origin, State, Stream

logger: Final = logging.getLogger("streamkeep")

PAGE_RECORDS: Final = 4_096
"""How many records are read at once, if they are short; long ones end a page by themselves."""
LONG_BYTES: Final = 1 << 17
"""A body of so much is taken apart in a thread: it may be millions of messages, and live readers do not wait for that."""
IDLE_LOGS: Final = 1_000
SWEEP_SECONDS: Final = 30.0
SWEEP_STREAMS: Final = 500
KNOWN_ANCESTORS: Final = 10_000
MAX_DEPTH: Final = 1_000
"""How many forks of forks there may be: a read of the last one goes through all of them, once."""
FOLLOW_SECONDS: Final = 600.0
FOLLOW_PAUSE: Final = 20
"""How many times as long as it takes to follow all links it is not done."""
LINK_SECONDS: Final = 60.0
"""How long a fork may take to be made after its link; a link to nothing is removed then."""


class Link(msgspec.Struct, frozen=True, array_like=True):
    """Says that a stream has a fork."""

    fork: str
    life: str
    at: float
    source: str
    source_life: str


def _link_of(head: Head) -> Link:
    try:
        return msgspec.json.decode(head.state, type=Link)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise StorageCorruptError("a link to a fork cannot be read") from error


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a fork begins: behind so many records of its source, with the beginning of the next one as its own first records."""

    source: Stream
    origin: Origin
    base: int
    records: Sequence[bytes]


class Streams:
    """The streams of one storage, for one event loop. `changed` is told of streams that have grown here."""

    def __init__(
        self, storage: GuardedStorage, background: Background, bounds: Bounds, changed: Callable[[Stream], object]
    ) -> None:
        self.storage = storage
        self.by: Final = uuid.uuid4().hex[:16]
        self._background = background
        self._bounds = bounds
        self._changed = changed
        self._logs: OrderedDict[str, Log] = OrderedDict()
        self._ancestors: dict[tuple[str, str], State] = {}

    def log(self, path: str) -> Log:
        """Give the one log that this process has of a stream."""
        id = _paths.stream_id(path)
        log = self._logs.get(id)
        if log is None:
            log = self._logs[id] = Log(self.storage, self._background, id, self._changed)
            for old in list(self._logs)[: max(0, len(self._logs) - IDLE_LOGS)]:
                if self._logs[old].is_idle and old != id:
                    del self._logs[old]
        else:
            self._logs.move_to_end(id)
        return log

    def wake(self) -> None:
        """Have all live readers look what else there is."""
        for log in self._logs.values():
            log.wake()

    async def find(self, path: str) -> Stream | None:
        """Give a stream as it is, be it expired or deleted; None: there is none. Raises StorageError."""
        page = await self.storage.read(_paths.stream_id(path))
        return None if page is None else _rules.stream_of(page.head)

    async def find_with(self, path: str, position: int) -> tuple[Stream | None, Sequence[bytes]]:
        """Give a stream as it is, and what is behind a position: nothing, or a page. Raises StorageError."""
        while True:
            page = await self.storage.read(_paths.stream_id(path), position, PAGE_RECORDS)
            if page is None:
                return None, ()
            stream = _rules.stream_of(page.head)
            if not stream.state.base:
                return stream, page.records
            if not stream.earliest <= position < stream.tail:
                return stream, ()
            with suppress(RefusedError):  # it has just forgotten that: so it is as it is now
                return stream, await self.read(stream, position)

    async def read(self, stream: Stream, position: int) -> Sequence[bytes]:
        """Give a page of what is behind a position, inherited records as well; it may be more than the stream was known to have.

        StreamNotFoundError: the stream was deleted. RefusedError: it has forgotten what was there. StorageCorruptError: what it has
        inherited is missing.
        """
        records: list[bytes] = []
        size = 0
        while size < PAGE_BYTES and len(records) < PAGE_RECORDS:
            try:
                more, is_own = await self._read_part(stream, position + len(records))
            except RefusedError:
                if records:  # what it had inherited; whoever reads on is told
                    break
                raise
            records.extend(more)
            size += sum(map(len, more))
            if is_own:
                break
        return records

    async def _read_part(self, stream: Stream, position: int) -> tuple[Sequence[bytes], bool]:
        """Give some records that are kept together, and whether they are the stream's own."""
        state, limit = stream.state, PAGE_RECORDS
        is_own = position >= state.base
        while position < state.base:
            origin, limit = state.origin, min(limit, state.base - position)
            assert origin is not None
            state = await self._ancestor(origin)
        page = await self.storage.read(_paths.stream_id(state.path), position - state.base, limit)
        is_there = page is not None and _rules.stream_of(page.head).state.life == state.life
        if is_own and page is not None and is_there and position - state.base < page.head.first:
            raise forgotten()
        if page is not None and is_there and (is_own or page.records):
            return page.records, is_own
        if is_own:
            raise StreamNotFoundError("the stream was deleted while it was read")
        raise StorageCorruptError("what the stream has inherited is missing")

    async def _ancestor(self, origin: Origin) -> State:
        """Give what a stream was forked from, as far as that never changes; the rest may be out of date."""
        there = self._ancestors.get((origin.path, origin.life))
        if there is None:
            source = await self.find(origin.path)
            if source is None or source.state.life != origin.life:
                raise StorageCorruptError("what the stream was forked from is missing")
            there = _rules.ancestor(source.state)
            if len(self._ancestors) >= KNOWN_ANCESTORS:
                self._ancestors.clear()
            self._ancestors[origin.path, origin.life] = there
        return there

    # Creating

    async def create(self, path: str, config: Config, body: bytes, asked: ForkAsked | None) -> tuple[Answer, Stream | None]:
        """Create a stream, or find it as it is asked for; give the answer, and the stream. Raises StorageError."""
        version = 0
        while True:
            there = await self.find(path)
            place = None
            if asked is not None:
                place = await self._place(asked, config)
                if isinstance(place, Answer) and (there is None or _rules.absence(there, self.storage.time()) is not None):
                    return place, None
            if there is not None:
                version = there.head.version
                gone = _rules.absence(there, self.storage.time())
                if gone is None:
                    return self._found(there, config, place, asked)
                if gone.code == 410:
                    self._collect_soon(there)
                    return Answer(409, reason="the path is of a stream that was deleted, and has forks"), None
                await self._remove(there)
            made = await self._make(path, config, body, place if isinstance(place, _Place) else None, version)
            if made is not None:
                return made

    def _found(
        self, there: Stream, config: Config, place: "_Place | Answer | None", asked: ForkAsked | None
    ) -> tuple[Answer, Stream | None]:
        if isinstance(place, Answer):
            # The source may have been deleted since, or refuse forks: one that is there as it is asked for stays what it is.
            if asked is not None and _rules.is_fork_as_asked(there.state, config, asked.source, asked.offset, asked.sub):
                return Answer(200), there
            return Answer(409, reason="there is another stream under this path"), None
        source, origin = (None, None) if place is None else (place.source, place.origin)
        if _rules.matches(there.state, config, source, origin):
            return Answer(200), there
        return Answer(409, reason="the stream exists, and was created otherwise"), None

    async def _make(
        self, path: str, config: Config, body: bytes, place: _Place | None, version: int
    ) -> tuple[Answer, Stream | None] | None:
        """Create a stream that is not there; None: somebody else did so meanwhile."""
        kind = config.content_type or "application/octet-stream" if place is None else place.source.state.content_type
        records: Sequence[bytes] | None = ()
        if len(body) >= LONG_BYTES:
            records = await anyio.to_thread.run_sync(lambda: _rules.records_of(body, json=is_json(kind)))
        elif body:
            records = _rules.records_of(body, json=is_json(kind))
        if records is None:
            return Answer(400, reason="the body is not JSON"), None
        if sum(map(len, records)) > self._bounds.max_bytes:
            return Answer(413, reason="that is more than a stream may hold"), None
        life, now = uuid.uuid4().hex[:16], self.storage.time()
        if place is None:
            stream = _rules.create(life, path, config, records, now, self.by, after_version=version)
            return await self._commit(path, stream, records)
        source, origin = place.source.state, place.origin
        made = None
        try:
            answer, pinned = await self._keep(source, path, life, origin.position or math.inf)
            if pinned is None:
                return answer, None
            all_records = [*place.records, *records]
            stream = _rules.fork(
                life, path, config, pinned, origin, place.base, all_records, now, self.by, after_version=version
            )
            made = await self._commit(path, stream, all_records)
            if made is not None and self.storage.time() >= now + LINK_SECONDS / 2:
                # For so long nobody knows that it was about to be made: its source may have been removed, or gone on to forget.
                inherited_from = stream.state.inherited_from
                answer, pinned = await self._keep(
                    source, path, life, inherited_from if inherited_from < place.base else math.inf
                )
                if pinned is None and made[1] is not None and await self._remove(made[1]):
                    return answer, None
            return made
        finally:
            if made is None:  # where it is not known whether it was made, the link is found to lead nowhere, or not
                with anyio.CancelScope(shield=True), anyio.move_on_after(LINK_SECONDS):
                    await self._unlink_unless_made(path, life, origin)

    async def _keep(self, source: State, fork: str, life: str, begin: float) -> tuple[Answer, Stream | None]:
        """Have a stream kept for a fork, from a position on, and give it as it is kept; None: it cannot be."""
        link, now = _paths.link_id(source.path, source.life, life), self.storage.time()
        entry = msgspec.json.encode(Link(fork, life, now, source.path, source.life))
        await commit_once(self.storage, link, None, Head(version_after(0, now, self.by), 0, entry, _rules.NEVER))
        pinned: list[Stream | None] = []

        def decide(stream: Stream | None, now: float) -> Decision:
            decision = _rules.pin(stream, source.life, now, self.by)
            pinned[:] = [decision.stream]
            return decision

        answer = await self.log(source.path).decide(decide)
        there = pinned[0]
        return (_forgotten_by_source(), None) if there is not None and there.earliest > begin else (answer, there)

    async def _commit(self, path: str, stream: Stream, records: Sequence[bytes]) -> tuple[Answer, Stream | None] | None:
        sealed = _rules.sealed(stream, uuid.uuid4().hex[:16])
        if not await commit_once(self.storage, _paths.stream_id(path), None, sealed.head, records):
            return None
        if sealed.head.tail:
            self._changed(sealed)
        return Answer(201), sealed

    async def _place(self, asked: ForkAsked, config: Config) -> _Place | Answer:
        """Find where a fork begins."""
        source = await self.find(asked.source)
        gone = _rules.absence(source, self.storage.time())
        if source is None or (gone is not None and gone.code == 404):
            return Answer(404, reason="there is no such source")
        state = source.state
        if gone is not None:
            return Answer(409, reason="the source was deleted, and is only kept for its forks")
        if config.content_type is not None and not same_type(config.content_type, state.content_type):
            return Answer(409, reason="the content type is not the source's")
        position = _position_in(source, asked.offset)
        if isinstance(position, Answer):
            return position
        if state.depth >= MAX_DEPTH:
            return Answer(409, reason="forks of forks go no deeper")
        origin = Origin(state.path, state.life, position, asked.sub, asked.offset is None)
        return await self._refined(source, origin)

    async def _refined(self, source: Stream, origin: Origin) -> _Place | Answer:
        """Go on from an offset by so many messages or bytes, not further than its append goes."""
        base, left = origin.position, origin.sub
        records: list[bytes] = []
        json = is_json(source.state.content_type)
        page: list[bytes] = []
        while left:
            if not page:
                page = list(await self.read(source, base)) if base < source.tail else []
            if not page:
                return Answer(400, reason="the sub-offset is behind what was appended there")
            record = page.pop(0)
            first, count = first_of(record, left, json=json)
            left -= count
            if len(first) < len(record):
                return _Place(source, origin, base, [first]) if not left else Answer(400, reason="the sub-offset is too large")
            base += 1
            if left and not is_continued(record):
                return Answer(400, reason="the sub-offset is behind what was appended there")
        return _Place(source, origin, base, records)

    # Appending, reading, deleting

    async def append(self, path: str, asked: Append) -> Answer:
        """Append to a stream, or close it. Raises StorageError."""
        if is_json(asked.content_type or "") and len(asked.body) >= LONG_BYTES:
            await anyio.to_thread.run_sync(lambda: asked.records(json=True))
        by, bounds = self.by, self._bounds
        return await self.log(path).decide(lambda stream, now: _rules.append(stream, asked, now, by, bounds))

    async def renew(self, stream: Stream) -> None:
        """Note that a stream is read, if it lives for as long as it is. Raises StorageError."""
        if _rules.is_renewal_due(stream.state, self.storage.time()):
            try:
                await self.log(stream.state.path).decide(lambda stream, now: _rules.renew(stream, now, self.by))
            except StorageFullError as error:
                logger.warning("a stream that is read cannot be kept for longer: %s", error)  # it can be read

    async def delete(self, path: str) -> Answer:
        """Delete a stream, and what was only kept for it. If this is cancelled, it goes on. Raises StorageError."""
        done, became = self._background.loop.event(), list[Answer | StreamkeepError]()

        async def delete() -> None:
            try:
                became.append(await self._delete(path))
            except StreamkeepError as error:
                became.append(error)

        self._background.start(delete, "deleting a stream", ended=done.set)
        await done.wait()
        match became:
            case [Answer() as answer]:
                return answer
            case [StreamkeepError() as error]:
                raise error
            case _:
                raise StreamManagerClosedError("the server is shutting down")

    async def _delete(self, path: str) -> Answer:
        deleted: list[Stream] = []

        def decide(stream: Stream | None, now: float) -> Decision:
            deleted[:] = [] if stream is None else [stream]
            return _rules.delete(stream, now, self.by)

        answer = await self.log(path).decide(decide)
        for stream in deleted:
            if answer.code == 410:
                self._collect_soon(stream)
            elif answer.code == 204:
                await self._after_deletion(stream)
        return answer

    async def _after_deletion(self, stream: Stream) -> None:
        if stream.state.is_pinned:
            await self._collect(stream.state.path, stream.state.life)
        elif stream.state.origin is not None:
            await self._unlink(stream.state.life, stream.state.origin)

    # Forks and expiry

    async def _unlink_unless_made(self, path: str, life: str, origin: Origin) -> None:
        there = await self.find(path)
        if there is None or there.state.life != life:
            await self._unlink(life, origin)

    async def _unlink(self, life: str, origin: Origin) -> None:
        """Forget that a stream has a fork, and the stream, if it was kept for that."""
        await self._collect(origin.path, origin.life, _paths.link_id(origin.path, origin.life, life))

    def _collect_soon(self, stream: Stream) -> None:
        """See whether a stream that is kept for its forks has any."""

        async def collect() -> None:
            try:
                await self._collect(stream.state.path, stream.state.life)
            except StorageError as error:
                logger.warning("a stream without forks cannot be removed now: %s", error)

        self._background.start(collect, "removing a stream without forks")

    async def _collect(self, path: str, life: str, link: str = "") -> None:
        """Remove a stream that is kept for its forks, or let it be as others, if it has none any more; and then its source.

        `link` is one that leads nowhere. Such links go last: who finds one that was left behind goes on from here.
        """
        while True:
            stream = await self.find(path)
            is_kept = stream is not None and stream.state.life == life and stream.state.is_pinned
            has_forks, dead = await self._forks(path, life, link)
            if stream is None or not is_kept or has_forks:
                await self._remove_links(dead)
                return
            version = stream.head.version
            answer = await self.log(path).decide(lambda stream, now: _rules.unpin(stream, version, now, self.by))  # noqa: B023
            if answer.code == 409:
                continue
            await self._remove_links(dead)
            origin = stream.state.origin
            if answer.code != 204 or origin is None:
                return
            path, life, link = origin.path, origin.life, _paths.link_id(origin.path, origin.life, life)

    async def _remove_links(self, links: Iterable[tuple[str, int]]) -> None:
        for id, version in links:
            await self.storage.delete(id, version)

    async def _forks(self, path: str, life: str, gone: str) -> tuple[bool, Sequence[tuple[str, int]]]:
        """Say whether a stream has forks, and give the links that lead nowhere, as `gone` does."""
        begin = after = _paths.links_of(path, life)
        dead: list[tuple[str, int]] = []
        while found := [(id, head) for id, head in await self.storage.scan(after, 100) if id.startswith(begin)]:
            for after, head in found:
                if after != gone and await self._is_fork(head):
                    return True, dead
                dead.append((after, head.version))
        return False, dead

    async def _is_fork(self, head: Head) -> bool:
        link = _link_of(head)
        fork = await self.find(link.fork)
        if fork is None or fork.state.life != link.life:
            return self.storage.time() < link.at + LINK_SECONDS  # it may be about to be made
        return True  # also if it has expired: until it is removed, somebody may just put that off

    async def follow_links_for_ever(self) -> None:
        """Remove, again and again, what is kept for forks that are gone: who has removed them may have died before it could do that."""
        pause = LINK_SECONDS
        while True:
            await anyio.sleep(pause)
            began = anyio.current_time()
            try:
                await self.follow_links()
            except StorageError as error:
                logger.warning("what is kept for forks cannot be looked at now: %s", error)
            pause = max(FOLLOW_SECONDS, (anyio.current_time() - began) * FOLLOW_PAUSE)

    async def follow_links(self) -> None:
        """Remove links to forks that are gone, and what was only kept for these. Raises StorageError."""
        after = _paths.LINK
        while found := [(id, head) for id, head in await self.storage.scan(after, 100) if id.startswith(_paths.LINK)]:
            for after, head in found:
                try:
                    if not await self._is_fork(head):
                        link = _link_of(head)
                        await self._collect(link.source, link.source_life, after)
                except StorageCorruptError as error:
                    logger.warning("a link to a fork cannot be followed: %s", error)

    async def sweep_for_ever(self) -> None:
        """Remove what has expired, again and again."""
        while True:
            try:
                await self.sweep()
            except StorageError as error:
                logger.warning("the storage cannot be swept now: %s", error)
            await anyio.sleep(SWEEP_SECONDS)

    async def sweep(self) -> None:
        """Remove streams that have expired. Raises StorageError."""
        limit = SWEEP_STREAMS
        while True:
            found = await self.storage.expired(self.storage.time(), limit)
            ours = [head for id, head in found if id.startswith(_paths.STREAM)]
            removed = 0
            for head in ours:
                removed += await self._sweep(head)
            if len(found) < limit and not removed:
                return
            if removed < limit / 2:
                limit *= 2  # what others have to remove must not hide the rest

    async def _sweep(self, head: Head) -> bool:
        try:
            stream = _rules.stream_of(head)
        except StorageCorruptError as error:
            logger.warning("a stream cannot be swept: %s", error)
            return False
        return _rules.is_expired(stream, self.storage.time()) and await self._remove(stream)

    async def _remove(self, stream: Stream) -> bool:
        """Remove a stream that has expired, unless somebody uses it."""
        deleted = await self.storage.delete(_paths.stream_id(stream.state.path), stream.head.version)
        if deleted and stream.state.origin is not None:
            await self._unlink(stream.state.life, stream.state.origin)
        return deleted


def _position_in(source: Stream, offset: str | None) -> int | Answer:
    """Give the position at which a fork is asked for."""
    if offset in {None, "now"}:
        return source.tail
    if offset == "-1":
        return 0
    position = _rules.position_of(source.state, offset or "")
    if position is None or position > source.tail:
        return Answer(400, reason="the source has no such offset")
    return position if position >= source.earliest else _forgotten_by_source()


def _forgotten_by_source() -> Answer:
    return Answer(410, reason="the source has forgotten what was there")


def forgotten() -> RefusedError:
    """Give what a reader is answered whose stream has forgotten what it asks for (5.6)."""
    return RefusedError(410, "the stream has forgotten what was there; its oldest record is at the offset -1")
