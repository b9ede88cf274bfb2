"""StreamManager: where streams are opened, subscribed to, cancelled, deleted and listed.

It owns the background work, all of it in one task group: one task renews the leases of all its writers, one sweeps, each open
writer has one that listens for its being cancelled, each stream that is followed has one that reads it. What a stream may
become is decided in `_lifecycle`; here it is only read, asked and committed.
"""

import logging
import math
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, Final, Literal, Self, TypeVar, overload
from weakref import ReferenceType, ref

import anyio
import msgspec
from anyio import CancelScope
from anyio.abc import TaskGroup

from . import _lifecycle
from ._input import GOODBYE_SECONDS, Limits, StreamInput
from ._lifecycle import Life, Terms
from ._subscription import PAGE_RECORDS, Feed, Subscription
from .errors import (
    InvalidArgumentError,
    Status,
    StorageCorruptError,
    StorageError,
    StorageFullError,
    StreamAlreadyExistsError,
    StreamkeepError,
    StreamManagerClosedError,
    StreamNotFoundError,
)
from .events import MAX_OFFSET, decoder_of, error_record
from .storage import Head, Storage
from .storages import storage_for
from .storages.memory import MemoryStorage

T = TypeVar("T")
Handle = ReferenceType[StreamInput]

logger: Final = logging.getLogger("streamkeep")

STREAM_ID: Final = re.compile(r"[A-Za-z0-9_~][A-Za-z0-9_~.:@=+-]{0,254}")
SURROGATE: Final = re.compile("[\ud800-\udfff]")
QUIET_SECONDS: Final = 0.1
SWEEP_SECONDS: Final = 60.0
RETRY_SECONDS: Final = 1.0
SCAN_IDS: Final = 100
MAX_METADATA: Final = 4_096


@dataclass(frozen=True, slots=True)
class StreamInfo:
    """What is known of a stream without reading its events. Times are seconds since the epoch.

    Attributes:
        id: the stream's id.
        status: `open`, `done` or `error`.
        error: the status of the error it ended with (`CANCELLED`, `ABORTED`, …), if it did.
        tail: how many events it holds, the terminal one included.
        created_at: when it was opened.
        updated_at: when it was last written to, or its lease renewed.
        writer: the name of the handle that may write; empty when there is none.
        lease_until: until when an open stream cannot be taken over, nor given up, unless its writer renews or lets go.
        expires_at: when it counts as absent.
        metadata: what was given to `open`.
    """

    id: str
    status: Literal["open", "done", "error"]
    error: Status | None
    tail: int
    created_at: float
    updated_at: float
    writer: str
    lease_until: float
    expires_at: float
    metadata: Mapping[str, str]


class Opening(Awaitable[StreamInput]):
    """What `StreamManager.open` returns: await it for the StreamInput, or enter it to have it completed or let go of as well."""

    def __init__(self, open_input: Callable[[], Awaitable[StreamInput]]) -> None:
        self._open_input = open_input
        self._input: StreamInput | None = None

    def __await__(self) -> Generator[Any, Any, StreamInput]:
        return self._open_input().__await__()

    async def __aenter__(self) -> StreamInput:
        self._input = await self._open_input()
        return self._input

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._input is not None
        await self._input.__aexit__(exc_type, exc, traceback)


class StreamManager:
    """Durable streams over a storage.

    `StreamManager.connect(url)` opens and closes a storage of its own; `StreamManager(storage)` uses one that is open,
    and leaves it open. Enter the manager with `async with` before use, in the event loop that will use it.

    Args:
        storage: an entered storage.
        ttl: how long a completed stream is kept. Genkit's default, 5 minutes.
        lease: how long a writer is believed to live without being heard of. It is renewed every third of that.
        grace: how long after the lease a stream is left for another writer, before anybody ends it with ABORTED.
        limits: see `Limits`.
        clock: gives seconds since the epoch; for tests.
    """

    def __init__(
        self,
        storage: Storage,
        *,
        ttl: timedelta = timedelta(minutes=5),
        lease: timedelta = timedelta(seconds=10),
        grace: timedelta = timedelta(seconds=5),
        limits: Limits | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if min(ttl, grace) < timedelta(0) or lease <= timedelta(0):
            raise InvalidArgumentError("ttl and grace must not be negative, and lease must be positive")
        self.storage = storage
        self.terms = Terms(ttl.total_seconds(), lease.total_seconds(), grace.total_seconds())
        self.limits = limits or Limits()
        self.clock = clock
        self._owns_storage = False
        self._resources = AsyncExitStack()
        self._tasks: TaskGroup | None = None
        self._closing = False
        self._room_sought_at = -math.inf
        self._scopes: set[CancelScope] = set()
        self._goodbyes = anyio.Lock()
        self._idle = anyio.Event()
        self._inputs: dict[Handle, CancelScope] = {}
        self._feeds: dict[str, Feed] = {}

    @classmethod
    def connect(
        cls,
        url: str,
        *,
        ttl: timedelta = timedelta(minutes=5),
        lease: timedelta = timedelta(seconds=10),
        grace: timedelta = timedelta(seconds=5),
        limits: Limits | None = None,
    ) -> "StreamManager":
        """Give a manager over the storage that a URL names.

        `memory://`, `sqlite:///relative.db`, `sqlite:////absolute.db`; with an extra each, and a page of `docs/how-to/` that says more,
        `redis://host`, `postgresql://host/database`, `nats://host`.

        Nothing is opened before the manager is entered. Raises InvalidArgumentError if the URL names no known storage.
        """
        manager = StreamManager(storage_for(url), ttl=ttl, lease=lease, grace=grace, limits=limits)
        manager._owns_storage = True
        return manager

    async def __aenter__(self) -> Self:
        if self._tasks is not None:
            raise RuntimeError("a StreamManager is entered once")
        async with AsyncExitStack() as stack:
            if self._owns_storage:
                await self.storage.__aenter__()
                stack.push_async_callback(self._close_storage)
            self._tasks = await stack.enter_async_context(anyio.create_task_group())
            self._resources = stack.pop_all()
        self._spawn(self._renew_leases)
        self._spawn(self._sweep_on)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # The task group is told of no error, so that what leaves the block leaves it as it is, and not in an exception group.
        try:
            with CancelScope(shield=True):
                await self.aclose()
        finally:
            self._stop_tasks()  # asyncio's own `Task.cancel` goes through shields, and must not leave them behind
            await self._resources.aclose()

    @property
    def is_running(self) -> bool:
        """Whether it has been entered and not been closed."""
        return self._tasks is not None and not self._closing

    def open(self, stream: str, *, resume: bool = False, metadata: Mapping[str, str] | None = None) -> Opening:
        """Create a stream and give its one writer, a StreamInput: `async with streams.open(id) as stream`, or `await streams.open(id)`.

        Args:
            stream: 1 to 255 letters, digits and `_~.:@=+-`; the first is not one of `.:@=+-`.
            resume: take over an open stream whose writer let go, or whose lease has lapsed, and go on where its log
                ends; create the stream if there is none.
            metadata: strings to be kept with the stream, such as its owner; `info` gives them back.

        Raises (when awaited or entered) StreamAlreadyExistsError, InvalidArgumentError, StorageError; with `resume`,
        StreamCompletedError and StreamBusyError.
        """
        return Opening(lambda: self._open(stream, dict(metadata or {}), resume=resume))

    @overload
    def subscribe(
        self, stream: str, after: int | None = None, *, idle_timeout: timedelta | None = None
    ) -> Subscription[Any]: ...

    @overload
    def subscribe(
        self,
        stream: str,
        after: int | None = None,
        *,
        chunk_type: type[T],
        output_type: type[Any] | None = None,
        idle_timeout: timedelta | None = None,
    ) -> Subscription[T]: ...

    def subscribe(
        self,
        stream: str,
        after: int | None = None,
        *,
        chunk_type: type[T] | None = None,
        output_type: type[Any] | None = None,
        idle_timeout: timedelta | None = None,
    ) -> Subscription[T] | Subscription[Any]:
        """Give every event of a stream with a greater offset than `after`, first those that are stored, then live.

        Args:
            stream: its id.
            after: the offset of the last event that was seen; None for all.
            chunk_type: what `event.chunk` is decoded into: a pydantic model, a dataclass, a msgspec struct, …; JSON values otherwise.
            output_type: the same for `event.output`.
            idle_timeout: raise StreamTimeoutError when nothing came for so long.

        Raises InvalidArgumentError; when entered StreamNotFoundError, OffsetOutOfRangeError (an `after` that the stream has not
        reached), StorageError. A stream whose writer has died is ended with ABORTED, by its readers.
        """
        check_id(stream)
        check_offset(after)
        return Subscription(
            self,
            stream,
            after,
            None if idle_timeout is None else idle_timeout.total_seconds(),
            msgspec.json.decode if chunk_type is None else decoder_of(chunk_type),
            msgspec.json.decode if output_type is None else decoder_of(output_type),
        )

    async def cancel(self, stream: str) -> bool:
        """End an open stream with ERROR, status CANCELLED; its producer, in whatever process, learns of it at once.

        False: it had ended already. Raises StreamNotFoundError, InvalidArgumentError, StorageError.
        """
        record = error_record(_lifecycle.CANCELLED)
        while True:
            life = await self._life(stream)
            ended = _lifecycle.cancel(life, self.clock(), self.terms)
            if ended is None:
                return False
            if await self.storage.commit(stream, life.head.version, ended.head, [record]):
                await self._tell_inputs(stream)
                return True

    async def delete(self, stream: str) -> None:
        """Forget a stream and its events at once, open or not. Raises StreamNotFoundError, InvalidArgumentError, StorageError."""
        while True:
            life = await self._life(stream)
            if await self.storage.delete(stream, life.head.version):
                await self._tell_inputs(stream)
                return

    async def info(self, stream: str) -> StreamInfo:
        """Say what is known of a stream. Raises StreamNotFoundError, InvalidArgumentError, StorageError."""
        return _info_of(stream, await self._life(stream))

    async def list(self, after: str = "", limit: int = 100) -> Sequence[StreamInfo]:
        """Give at most `limit` streams with greater ids than `after`, by id; fewer only when there are no more.

        Page by page: go on with the last id of a page as `after`.
        """
        self.check_running()
        found: list[StreamInfo] = []
        while len(found) < limit:
            ids = await self.storage.scan(after, min(limit - len(found), SCAN_IDS))
            if not ids:
                break
            after = ids[-1]
            for stream in ids:
                page = await self.storage.read(stream)
                if page is not None and not _lifecycle.is_expired(page.head, self.clock()):
                    found.append(_info_of(stream, _lifecycle.life_of(page.head)))
        return found

    async def sweep(self) -> None:
        """Remove what has expired, and end what was abandoned. It is done every minute without asking."""
        after = ""
        while ids := await self.storage.scan(after, SCAN_IDS):
            after = ids[-1]
            for stream in ids:
                try:
                    await self._sweep_one(stream)
                except StorageCorruptError as error:
                    logger.warning("stream %s cannot be swept: %s", stream, error)

    async def aclose(self) -> None:
        """Let go of the writers' streams, end all waits with StreamManagerClosedError, and return when no background work is left.

        It can be called again, and from any task; what it has opened is closed when the block is left.
        """
        if self._tasks is None:
            self._closing = True
            return
        self._closing = True
        async with self._goodbyes:  # who comes second waits as well, and goes on where a cancelled first one stopped
            await self._let_go()
        self._stop_tasks()
        if not self._scopes:
            self._idle.set()
        await self._idle.wait()

    def check_running(self) -> None:
        """Raise StreamManagerClosedError if it has not been entered, or is closed."""
        if not self.is_running:
            state = "closed" if self._closing else "not running: enter it with `async with` first"
            raise StreamManagerClosedError(f"the stream manager is {state}")

    async def _open(self, stream: str, metadata: Mapping[str, str], *, resume: bool) -> StreamInput:
        check_id(stream)
        check_metadata(metadata)
        self.check_running()
        writer = uuid.uuid4().hex
        version = 0
        while True:
            life = _lifecycle.begin(self.clock(), writer, self.terms, metadata, after_version=version)
            if await self._create(stream, life):
                return await self._keep(StreamInput(self, stream, life))
            page = await self.storage.read(stream)
            if page is None:
                continue
            version = page.head.version
            if _lifecycle.is_expired(page.head, self.clock()):
                await self.storage.delete(stream, version)
            elif not resume:
                raise StreamAlreadyExistsError("stream already exists")
            elif resumed := await self._take_over(stream, page.head, writer):
                return resumed

    async def _create(self, stream: str, life: Life) -> bool:
        try:
            return await self.storage.commit(stream, None, life.head)
        except StorageFullError:
            await self._make_room()
        return await self.storage.commit(stream, None, life.head)

    async def _make_room(self) -> None:
        """Remove what has expired and only waits for the next sweep; once a second at most, however many are refused."""
        now = anyio.current_time()
        if now - self._room_sought_at >= RETRY_SECONDS:
            self._room_sought_at = now
            await self.sweep()

    async def _take_over(self, stream: str, head: Head, writer: str) -> StreamInput | None:
        life = _lifecycle.take_over(_lifecycle.life_of(head), self.clock(), writer, self.terms)
        stored_bytes = await self._stored_bytes(stream)  # first, so that nothing can go wrong once the stream is ours
        if not await self.storage.commit(stream, head.version, life.head):
            return None
        return await self._keep(StreamInput(self, stream, life, stored_bytes))

    async def _stored_bytes(self, stream: str) -> int:
        size = start = 0
        while (page := await self.storage.read(stream, start, PAGE_RECORDS)) and page.records:
            size += sum(map(len, page.records))
            start += len(page.records)
        return size

    async def _life(self, stream: str) -> Life:
        check_id(stream)
        self.check_running()
        page = await self.storage.read(stream)
        if page is None or _lifecycle.is_expired(page.head, self.clock()):
            raise StreamNotFoundError("stream not found")
        return _lifecycle.life_of(page.head)

    # What StreamInput and Subscription need of it.

    def start_commit(self, stream_input: StreamInput) -> None:
        """Commit what is queued from a background task; a failure shows at the handle's next call, which tries again."""

        async def commit() -> None:
            try:
                await stream_input.commit_queued()
            except StreamkeepError as error:
                logger.warning("stream %s: queued events are not stored yet: %s", stream_input.id, error)

        self._spawn(commit)

    def forget_input(self, stream_input: StreamInput) -> None:
        """Stop renewing its lease and listening for its end."""
        if listening := self._inputs.pop(ref(stream_input), None):
            listening.cancel()

    def join_feed(self, stream: str, life: Life) -> Feed:
        """Give the feed of a stream to one more follower; the first one starts it."""
        feed = self._feeds.get(stream)
        if feed is None or feed.failure is not None or feed.life.state.created_at != life.state.created_at:
            feed = self._feeds[stream] = Feed(self, stream, life)
            self._spawn(feed.follow)
        feed.followers += 1
        return feed

    def leave_feed(self, feed: Feed) -> None:
        """Take one follower off; the last one stops it."""
        feed.followers -= 1
        if feed.followers == 0:
            feed.scope.cancel()
            if self._feeds.get(feed.stream) is feed:
                del self._feeds[feed.stream]

    # Background work.

    def _spawn(self, run: Callable[[], Awaitable[None]]) -> CancelScope:
        scope = CancelScope()
        if self._tasks is not None and not self._closing:
            self._tasks.start_soon(self._run, run, scope)
        return scope

    async def _run(self, run: Callable[[], Awaitable[None]], scope: CancelScope) -> None:
        # Counted from here on: a task that asyncio cancels before it begins has no end that could be waited for.
        self._scopes.add(scope)
        if self._closing:
            scope.cancel()
        try:
            with scope:
                await run()
        finally:
            self._scopes.discard(scope)
            if self._closing and not self._scopes:
                self._idle.set()

    async def _keep(self, stream_input: StreamInput) -> StreamInput:
        if self._closing:
            await self._let_go_of(stream_input)
            self.check_running()
        # Only weakly: a handle that everybody has dropped is a writer that has died, and its lease must lapse.
        handle = ref(stream_input)
        stream = stream_input.id
        self._inputs[handle] = self._spawn(lambda: self._listen(stream, handle))
        return stream_input

    def _stop_tasks(self) -> None:
        self._inputs.clear()
        for scope in tuple(self._scopes):
            scope.cancel()

    def _live_inputs(self) -> Sequence[StreamInput]:
        for handle, listening in tuple(self._inputs.items()):
            if handle() is None:
                listening.cancel()
                del self._inputs[handle]
        return [stream_input for handle in self._inputs if (stream_input := handle()) is not None]

    async def _listen(self, stream: str, handle: Handle) -> None:
        """Tell a quiet writer when its stream is no longer its own; one that writes finds out by writing."""
        while handle() is not None:
            try:
                async with self.storage.watch(stream) as doorbell:
                    while await self._look_when_quiet(handle):
                        await doorbell.wait()
            except StorageError as error:
                logger.warning("stream %s: cannot listen for its being cancelled: %s", stream, error)
                await anyio.sleep(RETRY_SECONDS)

    async def _look_when_quiet(self, handle: Handle) -> bool:
        """Have the writer look when it has not committed for a moment; False if it is gone."""
        seen: int | None = -1
        while (commits := _commits(handle)) != seen:
            seen = commits
            await anyio.sleep(QUIET_SECONDS)
        if (stream_input := handle()) is None:
            return False
        await stream_input.look()
        return True

    async def _tell_inputs(self, stream: str) -> None:
        for stream_input in self._live_inputs():
            if stream_input.id == stream:
                # What was stored is a success, whether or not its writer can be told now; else it finds out by listening.
                with suppress(StorageError):
                    await stream_input.look()

    async def _renew_leases(self) -> None:
        while True:
            await anyio.sleep(self.terms.lease / 3)
            async with anyio.create_task_group() as renewals:
                for stream_input in self._live_inputs():
                    renewals.start_soon(self._renew, stream_input)
                    del stream_input

    async def _renew(self, stream_input: StreamInput) -> None:
        with anyio.move_on_after(self.terms.lease / 3):
            try:
                await stream_input.renew()
            except StreamkeepError as error:
                logger.warning("stream %s: its lease is not renewed: %s", stream_input.id, error)

    async def _sweep_on(self) -> None:
        while True:
            try:
                await self.sweep()
            except StorageError as error:
                logger.warning("the storage cannot be swept now: %s", error)
            await anyio.sleep(SWEEP_SECONDS)

    async def _sweep_one(self, stream: str) -> None:
        page = await self.storage.read(stream)
        now = self.clock()
        if page is None:
            return
        if _lifecycle.is_expired(page.head, now):
            await self.storage.delete(stream, page.head.version)
        elif ended := _lifecycle.abandon(_lifecycle.life_of(page.head), now, self.terms):
            await self.storage.commit(stream, page.head.version, ended.head, [error_record(_lifecycle.ABORTED)])

    async def _close_storage(self) -> None:
        with CancelScope(shield=True):
            await self.storage.__aexit__(None, None, None)

    async def _let_go(self) -> None:
        async with anyio.create_task_group() as goodbyes:
            for stream_input in self._live_inputs():
                goodbyes.start_soon(self._let_go_of, stream_input)

    async def _let_go_of(self, stream_input: StreamInput) -> None:
        stream_input.cancelled.set()
        with anyio.move_on_after(GOODBYE_SECONDS):
            try:
                await stream_input.let_go(StreamManagerClosedError("the stream manager is closed"))
            except StreamkeepError as error:
                logger.warning("stream %s could not be let go of: %s", stream_input.id, error)


class InMemoryStreamManager(StreamManager):
    """A StreamManager over memory, for tests and for services of one process that may forget. (Genkit: the same name.)

    Args:
        ttl: how long a completed stream is kept.
        max_streams: how many streams it holds at most; opening one more raises StorageFullError.
    """

    def __init__(self, *, ttl: timedelta = timedelta(minutes=5), max_streams: int = 10_000) -> None:
        super().__init__(MemoryStorage(max_streams=max_streams), ttl=ttl)
        self._owns_storage = True


def check_id(stream: str) -> None:
    """Raise InvalidArgumentError unless `stream` may be a stream's id."""
    if not isinstance(stream, str) or not STREAM_ID.fullmatch(stream):
        raise InvalidArgumentError(
            "a stream id is 1 to 255 letters, digits and _~.:@=+-, and begins with a letter, a digit, _ or ~"
        )


def check_offset(after: int | None) -> None:
    """Raise InvalidArgumentError unless `after` may be an offset, or is None."""
    if after is not None and (type(after) is not int or not 0 <= after <= MAX_OFFSET):
        raise InvalidArgumentError(f"an offset is a whole number between 0 and {MAX_OFFSET}")


def check_metadata(metadata: Mapping[str, str]) -> None:
    """Raise InvalidArgumentError unless these are a few short strings under names."""
    if not all(isinstance(text, str) and not SURROGATE.search(text) for item in metadata.items() for text in item):
        raise InvalidArgumentError("metadata are strings of Unicode under names that are such strings")
    if sum(len(key) + len(value) for key, value in metadata.items()) > MAX_METADATA:
        raise InvalidArgumentError(f"metadata has more than {MAX_METADATA} characters")


def _commits(handle: Handle) -> int | None:
    stream_input = handle()
    return None if stream_input is None else stream_input.commits


def _info_of(stream: str, life: Life) -> StreamInfo:
    head, state = life.head, life.state
    return StreamInfo(
        id=stream,
        status=state.status,
        error=state.error,
        tail=head.tail,
        created_at=state.created_at,
        updated_at=head.version / 1_000_000,
        writer=state.writer,
        lease_until=state.lease_until,
        expires_at=head.expires_at,
        metadata=state.metadata,
    )
