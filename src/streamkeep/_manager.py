"""StreamManager: where streams are opened, subscribed to, cancelled, deleted and listed.

What a stream may become is decided in `_lifecycle`; here it is only read, asked and committed. What is there while a manager is open is in
`_running`; what runs in the background has files of its own.
"""

import logging
import re
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace as replace_
from datetime import timedelta
from functools import partial
from ssl import SSLContext
from types import TracebackType
from typing import Any, Final, Self, TypeVar, get_args, overload

import msgspec
from anyio import CancelScope

from . import _lifecycle, _names
from ._cancel import ASK_EVERY, cancel, read_life, same_life
from ._claims import Claims
from ._core import Core, Limits, new_name
from ._durations import check_durations
from ._encoding import Encode, checked
from ._guard import GuardedStorage
from ._info import StreamInfo, StreamStatus, info_of
from ._input import StreamInput
from ._lifecycle import Beginning, Life, Terms
from ._listing import StreamPage, Wanted, list_streams
from ._names import Kind
from ._naming import look_up
from ._presence import Presence, presence_of
from ._recoveries import Recoveries
from ._recovery import Recovery, checked_name, input_of, terms_of
from ._running import Running
from ._subscription import From, Subscription
from ._telling import checked_hooks
from .errors import (
    InvalidArgumentError,
    StorageCorruptError,
    StorageError,
    StreamAlreadyExistsError,
    StreamManagerClosedError,
    StreamNotFoundError,
)
from .events import MAX_OFFSET, ReadAs, decoder_of, encode_json
from .hooks import Hooks
from .storage import Head, Storage
from .storages import http_storage, storage_for
from .storages.memory import MemoryStorage
from .storages.retrying import RetryingStorage

T = TypeVar("T")

logger: Final = logging.getLogger("streamkeep")

STREAM_ID: Final = re.compile(r"[A-Za-z0-9_~][A-Za-z0-9_~.:@=+-]{0,254}")
MAX_METADATA: Final = 4_096


class Opening(Awaitable[StreamInput]):
    """What `StreamManager.open` returns: await it for the StreamInput, or enter it to have it completed or released as well."""

    def __init__(self, open_input: Callable[[], Awaitable[StreamInput]]) -> None:
        self._open_input = open_input
        self._input: StreamInput | None = None
        self._within: AbstractContextManager[None] = nullcontext()

    def __await__(self) -> Generator[Any, Any, StreamInput]:
        return self._open_input().__await__()

    async def __aenter__(self) -> StreamInput:
        self._input = await self._open_input()
        self._within = self._input.producing()
        self._within.__enter__()
        return self._input

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._input is not None
        try:
            await self._input.__aexit__(exc_type, exc, traceback)
        finally:
            self._within.__exit__(None, None, None)


class StreamManager:
    """Durable streams over a storage.

    `StreamManager.connect(url)` opens and closes a storage of its own; `StreamManager(storage)` uses one that is open,
    and leaves it open. Enter the manager with `async with` before use, in the event loop that will use it. It may be left in another task,
    and entered again when it has been left. Used in another event loop, thread or forked process it raises WrongEventLoopError.

    Args:
        storage: an entered storage.
        ttl: how long a completed stream is kept, unless `open` says otherwise. Genkit's default, 5 minutes.
        lease: so long after the last sign of life that was seen of it, a manager's writers may be taken over from. A sign of life is given
            every third of that, also while the event loop is blocked, for up to a minute.
        grace: how long after the lease a stream is left for another writer, before anybody ends it with ABORTED.
        limits: see `Limits`.
        encode: makes JSON of chunks and outputs, at the call; a `JSONEncoding`, or any function that gives bytes of JSON or raises. It is
            called in whatever thread writes. What it raises becomes an InvalidArgumentError.
        hooks: told what happens to streams here; see `Hooks`.
    """

    def __init__(
        self,
        storage: Storage,
        *,
        ttl: timedelta = timedelta(minutes=5),
        lease: timedelta = timedelta(seconds=10),
        grace: timedelta = timedelta(seconds=5),
        limits: Limits | None = None,
        encode: Encode | None = None,
        hooks: Sequence[Hooks] = (),
    ) -> None:
        check_durations(ttl=ttl, lease=lease, grace=grace)
        if min(ttl, grace) < timedelta(0) or lease <= timedelta(0):
            raise InvalidArgumentError("ttl and grace must not be negative, and lease must be positive")
        self._storage = GuardedStorage(storage)
        self._terms = Terms(ttl.total_seconds(), lease.total_seconds(), grace.total_seconds())
        self._limits = limits or Limits()
        self._encode = encode_json if encode is None else checked(encode)
        self._hooks = checked_hooks(hooks)
        self._make_storage: Callable[[], Storage] | None = None  # for who has made it, and so opens and closes it
        self._running: Running | None = None
        self._hearing = ExitStack()
        self._was_entered = False

    @classmethod
    def connect(
        cls,
        url: str,
        *,
        ttl: timedelta = timedelta(minutes=5),
        lease: timedelta = timedelta(seconds=10),
        grace: timedelta = timedelta(seconds=5),
        limits: Limits | None = None,
        encode: Encode | None = None,
        hooks: Sequence[Hooks] = (),
    ) -> "StreamManager":
        """Give a manager over the storage that a URL names.

        `memory://`, `sqlite:///relative.db`, `sqlite:////absolute.db`; with an extra each, and a page of `docs/how-to/` that says more,
        `redis://host`, `postgresql://host/database`, `nats://host`.

        Nothing is opened before the manager is entered. One that is entered again opens the storage anew; what was in memory is gone.
        Raises InvalidArgumentError if the URL names no known storage.
        """
        manager = StreamManager(storage_for(url), ttl=ttl, lease=lease, grace=grace, limits=limits, encode=encode, hooks=hooks)
        manager._make_storage = partial(storage_for, url)
        return manager

    async def __aenter__(self) -> Self:
        if self._running is not None:
            self._running.background.check_here()
            raise RuntimeError("this StreamManager is entered already")
        if self._make_storage is not None and self._was_entered:
            self._storage = GuardedStorage(self._make_storage())
        owns_storage = self._make_storage is not None
        running = Running(self._storage, self._terms, self._limits, self._hooks, owns_storage=owns_storage)
        self._running, self._was_entered = running, True
        try:
            with self._hearing_of_retries(running) as hearing:
                await running.begin()
                self._hearing = hearing.pop_all()
        except BaseException:
            self._running = None
            raise
        return self

    @contextmanager
    def _hearing_of_retries(self, running: Running) -> Generator[ExitStack]:
        """Have hooks be told of what the storage tries again; until what this gives is closed."""
        with ExitStack() as stack:
            retrying = _retrying_in(self._storage)
            if retrying is not None and running.telling is not None:
                retried = running.telling.storage_retried
                retrying.retried.append(retried)
                stack.callback(retrying.retried.remove, retried)
            yield stack

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with CancelScope(shield=True):
            await self.aclose()

    @property
    def limits(self) -> Limits:
        """What one stream may hold here."""
        return self._limits

    @property
    def storage(self) -> Storage:
        """The storage, whose errors are all StorageErrors. Raises StreamManagerClosedError, WrongEventLoopError."""
        return self._check_running().core.storage

    @property
    def is_running(self) -> bool:
        """Whether it has been entered and not been closed."""
        return self._running is not None and not self._running.is_closing

    def open(
        self,
        stream: str,
        *,
        resume: bool = False,
        metadata: Mapping[str, str] | None = None,
        ttl: timedelta | None = None,
        encode: Encode | None = None,
        owner: str = "",
        key: str | None = None,
        run: str | None = None,
        replace: bool = False,
        recovery: Recovery | None = None,
    ) -> Opening:
        """Create a stream and give its one writer, a StreamInput: `async with streams.open(id) as stream`, or `await streams.open(id)`.

        Args:
            stream: 1 to 255 letters, digits and `_~.:@=+-`; the first is not one of `.:@=+-`.
            resume: take over an open stream whose writer has released it, or whose manager gave no sign of life for its lease, and go on
                where its log ends; create the stream if there is none.
            metadata: strings to be kept with the stream; `info` gives them back.
            ttl: how long this stream is kept when it has completed; the manager's unless it is given.
            encode: makes JSON of what this writer is given; the manager's unless it is given.
            owner: whose stream it is: any text of at most 1,024 characters. Keys and runs are an owner's own.
            key: what the app calls the conversation, or whatever it is of which one stream at a time may run: any text that is not empty,
                up to about 200 characters. The newest stream that was opened under it is its `current` one.
            run: the client's name of this very start, such as an Idempotency-Key: one stream is started by it, as long as that is kept.
            replace: cancel what runs under the key, and run instead of it. Of several who do so at once the last one runs. Where the key's
                record or its stream cannot be read (StorageCorruptError without `replace`), it is replaced as it is.
            recovery: have the stream gone on with when its writer dies, or releases it, by who iterates over `recoveries`; unless it is
                given, it ends with ABORTED then. A stream that is resumed keeps what it was opened with.

        Raises (when awaited or entered) StreamAlreadyExistsError, InvalidArgumentError, StorageError, StreamManagerClosedError,
        WrongEventLoopError; with `resume`, StreamCompletedError, and StreamBusyError while its writer may be alive, which says when to try
        again; with `key`, KeyInUseError while a stream runs under it, whose id that says, unless `replace` is given; with `run`,
        KeyInUseError if a stream was started by it, running or ended; with either, StreamTakenOverError if that took so long that this
        manager was taken for dead meanwhile. A stream whose start has died before its key and run were its own
        is gone on with under the same conditions. When it raises, or is cancelled, it leaves no stream behind.
        """
        check_durations(ttl=ttl)
        ttl_seconds = self._terms.ttl if ttl is None else ttl.total_seconds()
        if not 0 <= ttl_seconds < float("inf"):
            raise InvalidArgumentError("ttl must not be negative")
        if resume and (key, run) != (None, None):
            raise InvalidArgumentError("a stream that is resumed keeps its names; it cannot be given others")
        what_it_is = Beginning(
            ttl_seconds,
            dict(metadata or {}),
            _names.checked_owner(owner),
            "" if key is None else _names.checked_text("key", key),
            "" if run is None else _names.checked_text("run", run),
            terms_of(recovery),
        )
        input = "" if recovery is None else input_of(recovery)
        writer_encode = self._encode if encode is None else checked(encode)
        return Opening(lambda: self._open(stream, what_it_is, input, writer_encode, resume=resume, replace=replace))

    def recoveries(self, *names: str, encode: Encode | None = None) -> Recoveries:
        """Give streams to go on with: those that were opened with a `Recovery` of one of these names, and whose writers are gone.

            async with streams.recoveries("answer") as lost, anyio.create_task_group() as tasks:
                async for stream in lost:
                    tasks.start_soon(go_on, stream)

        A writer is gone when its manager gave no sign of life for lease and grace, or has released the stream. Of all who ask, in whatever
        process, one gets it, at most as often as its recovery says. What it needs is at hand: `stream.recovery.input`,
        `stream.checkpoint`, `stream.attempt`, and by `subscribe` what was written so far. It ends the stream as any writer does.

        Raises InvalidArgumentError; when entered StorageError, StreamManagerClosedError, WrongEventLoopError.
        """
        if not names:
            raise InvalidArgumentError("`recoveries` takes the names of those that can be gone on with here")
        known = frozenset(map(checked_name, names))
        return Recoveries(self._check_running, known, self._encode if encode is None else checked(encode))

    @overload
    def subscribe(
        self,
        stream: str,
        after: int | None = None,
        *,
        last: int | None = None,
        follow: bool = True,
        superseded: bool = True,
        idle_timeout: timedelta | None = None,
    ) -> Subscription[Any]: ...

    @overload
    def subscribe(
        self,
        stream: str,
        after: int | None = None,
        *,
        last: int | None = None,
        follow: bool = True,
        superseded: bool = True,
        chunk_type: ReadAs[T],
        output_type: ReadAs[Any] | None = None,
        idle_timeout: timedelta | None = None,
    ) -> Subscription[T]: ...

    def subscribe(
        self,
        stream: str,
        after: int | None = None,
        *,
        last: int | None = None,
        follow: bool = True,
        superseded: bool = True,
        chunk_type: ReadAs[T] | None = None,
        output_type: ReadAs[Any] | None = None,
        idle_timeout: timedelta | None = None,
    ) -> Subscription[T] | Subscription[Any]:
        """Give every event of a stream with a greater offset than `after`, first those that are stored, then live.

        Args:
            stream: its id.
            after: the offset of the last event that was seen; None for all.
            last: only so many of the events that are stored when it is entered, and then live; 0: from now on. Not with `after`.
            follow: False: it ends behind what is stored when it is entered, and waits for nothing.
            superseded: False: where an answer has begun again (RESTARTED), what came before is left out, unless `after` or `last` says
                where to begin.
            chunk_type: what `event.chunk` is decoded into: a pydantic model, a dataclass, a msgspec struct, …, or what a `TypeAdapter` of
                pydantic's reads; JSON values otherwise.
            output_type: the same for `event.output`.
            idle_timeout: raise StreamTimeoutError when nothing came for so long.

        Raises InvalidArgumentError; when entered StreamNotFoundError, OffsetOutOfRangeError (an `after` that the stream has not
        reached), StorageError, StreamManagerClosedError, WrongEventLoopError. A stream whose writer has died is ended with ABORTED, by its
        readers that follow.
        """
        stream = checked_id(stream)
        check_offset(after)
        check_last(last)
        check_durations(idle_timeout=idle_timeout)
        if None not in {after, last}:
            raise InvalidArgumentError("`after` and `last` each say where to begin; give one of them")
        return Subscription(
            self._check_running,
            stream,
            From(after, last, follow, superseded),
            None if idle_timeout is None else idle_timeout.total_seconds(),
            msgspec.json.decode if chunk_type is None else decoder_of(chunk_type),
            msgspec.json.decode if output_type is None else decoder_of(output_type),
        )

    async def cancel(self, stream: str, *, life: str | None = None) -> bool:
        """End an open stream with ERROR, status CANCELLED; its producer, in whatever process, learns of it at once.

        One that is written so fast that this is always too late is ended so by its writer, which is asked to. False: it had ended already.

        Args:
            stream: its id.
            life: what `StreamInfo.life` says of the stream that is meant; a later one under its id is left alone, and is not found.

        Raises StreamNotFoundError, InvalidArgumentError, StorageError, StreamManagerClosedError, WrongEventLoopError.
        """
        core = self._check_running().core
        stream = checked_id(stream)
        return await cancel(core, stream, life)

    async def delete(self, stream: str, *, life: str | None = None) -> None:
        """Forget a stream and its events at once, open or not, and also if its head cannot be read.

        One that is written so fast that this is always too late is cancelled first.

        Args:
            stream: its id.
            life: what `StreamInfo.life` says of the stream that is meant; a later one under its id is left alone, and is not found.

        Raises StreamNotFoundError, InvalidArgumentError, StorageError, StreamManagerClosedError, WrongEventLoopError.
        """
        core = self._check_running().core
        stream = checked_id(stream)
        meant, lost, is_found = life, 0, False
        while True:
            try:
                found = await read_life(core, stream)
            except StorageCorruptError:
                if life is not None:
                    raise  # nobody can say whether it is the one that is meant
                await _delete_unreadable(core, stream)
                return
            except StreamNotFoundError:
                if not is_found:
                    raise
                return  # somebody else has deleted it meanwhile
            meant, is_found = same_life(meant, found), True
            if await _delete_once(core, stream, found):
                if core.telling is not None:
                    core.telling.removed(stream, found, "deleted")
                core.forget_names_soon(stream, found)
                await core.tell_writer(stream, found)
                return
            lost += 1
            if lost % ASK_EVERY == 0 and found.state.status == "open":
                await core.ask_writer_to_cancel(stream, found)

    async def info(self, stream: str) -> StreamInfo:
        """Say what is known of a stream. One whose writer is known to have died is ended with ABORTED first.

        Raises StreamNotFoundError, InvalidArgumentError, StorageError, StreamManagerClosedError, WrongEventLoopError.
        """
        core = self._check_running().core
        stream = checked_id(stream)
        life = await read_life(core, stream)
        while life.state.status == "open" and await core.end_if_abandoned(stream, life):
            life = await read_life(core, stream)
        return info_of(stream, life)

    def presence(self, stream: StreamInfo) -> Presence:
        """Say who is at a stream: whether its writer is alive, and how many follow it here, as far as this process knows.

        What is known of a writer elsewhere is what was seen of its session since somebody has first asked, or followed one of its streams.
        Raises StreamManagerClosedError, WrongEventLoopError.
        """
        return presence_of(self._check_running(), stream)

    async def current(self, key: str, owner: str = "") -> StreamInfo:
        """Say what is known of the newest stream that this owner has opened under a key, running or ended; as `info` does.

        Raises StreamNotFoundError, also if that one was deleted or has expired, whatever was opened before it; InvalidArgumentError,
        StorageError, StreamManagerClosedError, WrongEventLoopError.
        """
        return await self._named("key", Kind.KEY, key, owner)

    async def started_by(self, run: str, owner: str = "") -> StreamInfo:
        """Say what is known of the stream that this owner's run has started. Raises as `current` does."""
        return await self._named("run", Kind.RUN, run, owner)

    async def _named(self, what: str, kind: Kind, text: str, owner: str) -> StreamInfo:
        core = self._check_running().core
        name = _names.name_id(_names.checked_owner(owner), kind, _names.checked_text(what, text))
        while (named := await look_up(core.storage, name)).life is not None:
            life = named.life
            if life.state.status != "open" or not await core.end_if_abandoned(named.stream, life):
                return info_of(named.stream, life)
        raise StreamNotFoundError(f"no stream was opened under this {what}, or the newest one is gone")

    async def list(
        self,
        after: str = "",
        limit: int = 100,
        *,
        owner: str | None = None,
        key_prefix: str | None = None,
        status: StreamStatus | None = None,
    ) -> StreamPage:
        """Give at most `limit` streams, by id; all, or those that are asked for.

        Page by page: go on with `next` of a page as `after`, until it is None. A page costs a request or two, or a few more if what is
        asked for is rare: a call looks at a thousand streams at most, and then gives what it has, be it nothing.

        Args:
            after: where to begin: an id, or a key with `key_prefix`; what is greater follows.
            limit: how many streams at most.
            owner: only streams that were opened with this owner; no others are looked at, unless it is empty: nobody's streams.
            key_prefix: of each key of the owner (nobody's, unless `owner` says whose) that begins so, the newest stream; by key.
            status: only streams that are `open`, `done`, `error` or `unreadable`. One whose writer has died is open until somebody finds
                that out.

        Raises InvalidArgumentError, StorageError, StreamManagerClosedError, WrongEventLoopError.
        """
        core = self._check_running().core
        if owner is not None:
            _names.checked_owner(owner)
        if key_prefix is not None:
            _names.checked_text("key", key_prefix, may_be_empty=True)
        _check_page(after, limit, status, is_by_key=key_prefix is not None)
        return await list_streams(core, after, limit, Wanted(owner, key_prefix, status))

    async def sweep(self) -> None:
        """Remove what has expired. It is done every minute without asking. Raises StorageError."""
        await self._check_running().core.sweeper.sweep()

    async def aclose(self) -> None:
        """Release the writers' streams, end all waits with StreamManagerClosedError, and return when no background work is left.

        What it has opened is closed. It can be called again, and from any task.
        """
        running = self._running
        if running is None:
            return
        running.background.check_here()
        try:
            await running.close()
        finally:
            if running.is_closed and self._running is running:
                self._running = None
                self._hearing.close()

    def _check_running(self) -> "Running":
        """Give what is open. Raises StreamManagerClosedError if it has not been entered, or is closed; WrongEventLoopError."""
        running = self._running
        if running is None:
            state = "closed" if self._was_entered else "not running: enter it with `async with` first"
            raise StreamManagerClosedError(f"the stream manager is {state}")
        return running.check()

    async def _open(
        self, stream: str, what: Beginning, input: str, encode: Encode, *, resume: bool, replace: bool
    ) -> StreamInput:
        stream, what = checked_id(stream), replace_(what, metadata=checked_metadata(what.metadata))
        running = self._check_running()
        core = running.core
        try:
            await core.session.start()
        except StorageError:
            running.check()  # it could not begin because the manager is closed
            raise
        await running.undone(stream)
        claims = Claims(core, stream, what, replace=replace)
        await claims.look()
        writer = new_name()
        with core.opening(stream, writer) as carrier:
            return await self._open_as(running, writer, stream, what, input, claims, encode, carrier, resume=resume)

    async def _open_as(
        self,
        running: "Running",
        writer: str,
        stream: str,
        what: Beginning,
        input: str,
        claims: Claims,
        encode: Encode,
        carrier: Mapping[str, str],
        *,
        resume: bool,
    ) -> StreamInput:
        core, version = running.core, 0
        while True:
            running.check()
            life = _lifecycle.begin(core.now(), core.session.name, writer, what, after_version=version, carrier=carrier)
            if await running.create(stream, life, claims, input):
                return await running.give(stream, life, 0, encode, claims, input)
            page = await core.storage.read(stream)
            if page is None:
                continue
            version = page.head.version
            if await running.undo_now(stream, page.head):
                continue
            if _is_expired(page.head, core.now()):
                await core.storage.delete(stream, version)
                core.forget_names_soon(stream, _lifecycle.life_of(page.head))
            elif not resume:
                raise StreamAlreadyExistsError("stream already exists")
            elif resumed := await running.take_over(stream, page.head, writer, encode, carrier):
                return resumed


class InMemoryStreamManager(StreamManager):
    """A StreamManager over memory, for tests and for services of one process that may forget. (Genkit: the same name.)

    Args:
        ttl: how long a completed stream is kept.
        max_streams: how many streams it holds at most; opening one more raises StorageFullError.
        encode: makes JSON of chunks and outputs; see `StreamManager`.
        hooks: told what happens to streams here.
    """

    def __init__(
        self,
        *,
        ttl: timedelta = timedelta(minutes=5),
        max_streams: int = 10_000,
        encode: Encode | None = None,
        hooks: Sequence[Hooks] = (),
    ) -> None:
        super().__init__(MemoryStorage(max_streams=max_streams), ttl=ttl, encode=encode, hooks=hooks)
        self._make_storage = partial(MemoryStorage, max_streams=max_streams)


class RemoteStreamManager(StreamManager):
    """A StreamManager over the streams of a server, which has a `streamkeep.http.StorageHTTP` under `url`. Extra: `streamkeep[client]`.

    It does all that a StreamManager does, and its writers live and die with this process: the server keeps what they have written, and
    nothing else. `StreamManager.connect(url)` is the same without `headers` and `ssl_context`.

    Args:
        url: `https://host/path`, or `https://TOKEN@host/path`; see `streamkeep.storages.http.HTTPStorage`.
        headers: more headers of each request.
        ssl_context: whom to believe, and the client's certificate.
        ttl: as for `StreamManager`, and so is all below.
        lease: so long after the last sign of life that was seen of it, this manager's writers may be taken over from.
        grace: how long after the lease a stream is left for another writer.
        limits: see `Limits`.
        encode: makes JSON of chunks and outputs.
        hooks: told what happens to streams here.
    """

    def __init__(
        self,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        ssl_context: SSLContext | None = None,
        ttl: timedelta = timedelta(minutes=5),
        lease: timedelta = timedelta(seconds=10),
        grace: timedelta = timedelta(seconds=5),
        limits: Limits | None = None,
        encode: Encode | None = None,
        hooks: Sequence[Hooks] = (),
    ) -> None:
        make_storage = partial(http_storage, url, headers, ssl_context)
        super().__init__(make_storage(), ttl=ttl, lease=lease, grace=grace, limits=limits, encode=encode, hooks=hooks)
        self._make_storage = make_storage


def _retrying_in(storage: object) -> RetryingStorage | None:
    """Find what tries again, if anything does, in a storage that may wrap others."""
    while storage is not None and not isinstance(storage, RetryingStorage):
        storage = getattr(storage, "storage", None)
    return storage


def checked_id(stream: str) -> str:
    """Give a stream's id, as a plain str. InvalidArgumentError: this cannot be one."""
    if not isinstance(stream, str) or not STREAM_ID.fullmatch(stream):
        raise InvalidArgumentError(
            "a stream id is 1 to 255 letters, digits and _~.:@=+-, and begins with a letter, a digit, _ or ~"
        )
    return str.__str__(stream)


def check_offset(after: int | None) -> None:
    """Raise InvalidArgumentError unless `after` may be an offset, or is None."""
    if after is not None and (type(after) is not int or not 0 <= after <= MAX_OFFSET):
        raise InvalidArgumentError(f"an offset is a whole number between 0 and {MAX_OFFSET}")


def check_last(last: int | None) -> None:
    """Raise InvalidArgumentError unless `last` may be a number of events, or is None."""
    if last is not None and (type(last) is not int or not 0 <= last <= MAX_OFFSET):
        raise InvalidArgumentError(f"`last` is a whole number between 0 and {MAX_OFFSET}")


def checked_metadata(metadata: Mapping[str, str]) -> Mapping[str, str]:
    """Give metadata, as plain strings. InvalidArgumentError: they are not a few short strings under names."""
    if not all(isinstance(text, str) and not _names.SURROGATE.search(text) for item in metadata.items() for text in item):
        raise InvalidArgumentError("metadata are strings of Unicode under names that are such strings")
    if sum(len(key) + len(value) for key, value in metadata.items()) > MAX_METADATA:
        raise InvalidArgumentError(f"metadata has more than {MAX_METADATA} characters")
    return {str.__str__(key): str.__str__(value) for key, value in metadata.items()}


def _check_page(after: str, limit: int, status: StreamStatus | None, *, is_by_key: bool) -> None:
    if not isinstance(after, str) or _names.SURROGATE.search(after) or (not is_by_key and "\0" in after):
        raise InvalidArgumentError("`after` is an id, or a key with `key_prefix`; or what a page had as `next`")
    if type(limit) is not int or limit < 1:
        raise InvalidArgumentError("`limit` is a whole number, 1 or more")
    if status not in {None, *get_args(StreamStatus)}:
        raise InvalidArgumentError(f"a status is one of {', '.join(get_args(StreamStatus))}")


def _is_expired(head: Head, now: float) -> bool:
    try:
        return _lifecycle.is_expired(_lifecycle.life_of(head), now)
    except StorageCorruptError:
        return False


async def _delete_once(core: Core, stream: str, life: Life) -> bool:
    """Delete, and say whether it is gone: the same question as `commit_once` asks."""
    try:
        return await core.storage.delete(stream, life.head.version)
    except StorageError:
        page = await core.storage.read(stream)
        if page is not None and _lifecycle.life_of(page.head).state.life == life.state.life:
            raise
        return True


async def _delete_unreadable(core: Core, stream: str) -> None:
    page = await core.storage.read(stream)
    if page is not None:
        await core.storage.delete(stream, page.head.version)
