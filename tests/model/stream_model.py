"""What becomes of streams, said once more and without a storage, a task or a wait: the model that managers are compared with.

Its methods are those of StreamManager and StreamInput; they return what those return, and raise what those raise. It knows when
background work is due, because time is told to it: `now` is the storage's clock, `elapsed` the event loops' time. A writer is alive as long
as its manager is, whatever the clock says.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Final, Literal

import msgspec

from streamkeep.errors import (
    InvalidArgumentError,
    LimitExceededError,
    OffsetOutOfRangeError,
    Status,
    StreamAlreadyExistsError,
    StreamBusyError,
    StreamCompletedError,
    StreamInputClosedError,
    StreamkeepError,
    StreamManagerClosedError,
    StreamNotFoundError,
    StreamTakenOverError,
)

TTL: Final = 30.0
LEASE: Final = 12.0
GRACE: Final = 5.0
FORGET: Final = 86_400.0
MAX_EVENT_BYTES: Final = 40
MAX_EVENTS: Final = 6
MAX_STREAM_BYTES: Final = 45

Why = type[StreamkeepError]
Event = tuple[Literal["chunk", "done", "error"], object]


@dataclass(eq=False)
class Log:
    """A stream, from its opening to its deletion."""

    id: str
    created_at: float
    metadata: Mapping[str, str]
    writer: "Writer | None" = None
    free_at: float = 0.0
    expires_at: float = 0.0
    events: list[Event] = field(default_factory=list)
    size: int = 0
    status: Literal["open", "done", "error"] = "open"
    error: Status | None = None

    @property
    def abandoned_at(self) -> float:
        return self.free_at + LEASE + GRACE


@dataclass(eq=False)
class Writer:
    """A handle. `why` is what it says when it is used, once it can write no more."""

    manager: "Manager"
    log: Log
    tail: int
    size: int
    why: Why | None = None
    has_untold_loss: bool = False
    is_cancelled: bool = False

    def check(self) -> None:
        if self.why is not None:
            self.has_untold_loss = False
            raise self.why("")


@dataclass(eq=False)
class Follower:
    """A reader that goes on. `why` is the error it ends with, if not with the stream."""

    manager: "Manager"
    log: Log
    first: int
    last: int | None = None
    why: Why | None = None

    @property
    def events(self) -> list[Event]:
        return self.log.events[self.first : self.last]

    @property
    def is_over(self) -> bool:
        return self.why is not None or self.log.status != "open"

    def stop(self, why: Why) -> None:
        if not self.is_over:
            self.why, self.last = why, len(self.log.events)


@dataclass(eq=False)
class Manager:
    """A manager: which handles it has, and what it follows, each with the time at which its feed looks whether there is a writer."""

    kept: list[Writer] = field(default_factory=list)
    feeds: dict[Log, float] = field(default_factory=dict)


class Model:
    """All streams, all managers, and the time."""

    def __init__(self, now: float) -> None:
        self.now = now
        self.elapsed = 0.0
        self.logs: dict[str, Log] = {}
        self.managers: list[Manager] = []
        self.followers: list[Follower] = []

    # Managers.

    def start(self) -> Manager:
        manager = Manager()
        self.managers.append(manager)
        self.sweep()
        return manager

    def close_manager(self, manager: Manager) -> None:
        for writer in tuple(manager.kept):
            writer.is_cancelled = True
            self._let_go(writer, StreamManagerClosedError)
        for follower in self.followers:
            if follower.manager is manager:
                follower.stop(StreamManagerClosedError)
        self.managers.remove(manager)

    def open(
        self, manager: Manager, stream: str, metadata: Mapping[str, str], *, resume: bool, is_cut_off: bool = False
    ) -> Writer:
        log = self._living(stream)
        if log is None:
            log = self.logs[stream] = Log(stream, self.now, metadata)
        elif not resume:
            raise StreamAlreadyExistsError
        elif log.status != "open":
            raise StreamCompletedError
        elif log.writer is not None and not is_cut_off:
            raise StreamBusyError("", retry_after=LEASE)
        writer = log.writer = Writer(manager, log, len(log.events), log.size)
        manager.kept.append(writer)
        log.expires_at = self.now + FORGET
        self._set_deadlines(log)
        return writer

    def cancel(self, manager: Manager, stream: str) -> bool:
        log = self._found(stream)
        if log.status != "open":
            return False
        self._end(log, "CANCELLED")
        self._tell(log)
        return True

    def delete(self, manager: Manager, stream: str) -> None:
        log = self._found(stream)
        self._forget(log)
        self._tell(log)

    def info(self, stream: str) -> tuple[object, ...]:
        log = self._found(stream)
        self._abandon(log)
        return self._info(log)

    def list_streams(self, after: str, limit: int) -> list[tuple[object, ...]]:
        living = [log for stream in sorted(self.logs) if (log := self._living(stream)) and stream > after]
        return [self._info(log) for log in living[:limit]]

    def sweep(self) -> None:
        for log in tuple(self.logs.values()):
            is_over = log.status != "open" or (log.writer is None and self.now >= log.abandoned_at)
            if is_over and self.now >= log.expires_at:
                self._forget(log)

    def read(self, manager: Manager, stream: str, after: int | None) -> list[Event]:
        """Give the events that are there for a reader who then leaves."""
        log = self._subscribed(stream, after)
        if log not in manager.feeds:
            self._abandon(log)  # nobody there has waited yet, so nobody waits any longer
        return log.events[0 if after is None else after + 1 :]

    def follow(self, manager: Manager, stream: str, after: int | None) -> Follower:
        log = self._subscribed(stream, after)
        follower = Follower(manager, log, 0 if after is None else after + 1)
        self.followers.append(follower)
        if log.status == "open" and log not in manager.feeds:
            manager.feeds[log] = self._deadline(log)
            self._abandon(log)
        return follower

    def unfollow(self, follower: Follower) -> None:
        self.followers.remove(follower)
        others = [other for other in self.followers if other.manager is follower.manager and other.log is follower.log]
        if not others:
            follower.manager.feeds.pop(follower.log, None)

    # Writers.

    def write(self, writer: Writer, chunk: object) -> int:
        offset = self._put(writer, chunk)
        if not self._append(writer, chunk):
            self._fence(writer)
            writer.check()
        return offset

    def write_soon(self, writer: Writer, chunk: object) -> int:
        offset = self._put(writer, chunk)
        if not self._append(writer, chunk):
            self._fence(writer)
            writer.has_untold_loss = True
        return offset

    def write_soon_and_flush(self, writer: Writer, chunk: object) -> int:
        offset = self.write_soon(writer, chunk)
        self.flush(writer)
        return offset

    def flush(self, writer: Writer) -> None:
        if writer.why is not StreamInputClosedError:
            writer.check()

    def done(self, writer: Writer, output: object) -> None:
        size = len(_json(output))
        writer.check()
        if size > MAX_EVENT_BYTES:
            raise LimitExceededError
        self._finish(writer, None, output)

    def error(self, writer: Writer) -> None:
        writer.check()
        self._finish(writer, "INTERNAL")

    def close(self, writer: Writer) -> None:
        self._let_go(writer, StreamInputClosedError)
        if writer.has_untold_loss:
            writer.check()

    def leave_by_exception(self, writer: Writer) -> None:
        try:
            if writer.why is None:
                self.error(writer)
            else:
                self.close(writer)
        except StreamkeepError:
            return  # the exception that it is left by arrives instead

    def look(self, writer: Writer) -> None:
        if writer in writer.manager.kept and not self._is_its_own(writer):
            self._fence(writer)

    def drop(self, writer: Writer) -> None:
        """Release it: what its dropping does."""
        self._let_go(writer, StreamInputClosedError)

    # Time.

    @property
    def kept(self) -> list[Writer]:
        """All handles that their managers tend."""
        return [writer for manager in self.managers for writer in manager.kept]

    def pass_time(self, seconds: float) -> None:
        """Let time pass, and what is due be done."""
        self.now += seconds
        self.elapsed += seconds
        for manager in self.managers:
            for log, deadline in tuple(manager.feeds.items()):
                if deadline <= self.elapsed:
                    self._abandon(log)

    # What these have in common.

    def _living(self, stream: str) -> Log | None:
        log = self.logs.get(stream)
        return None if log is None or (log.status != "open" and self.now >= log.expires_at) else log

    def _found(self, stream: str) -> Log:
        log = self._living(stream)
        if log is None:
            raise StreamNotFoundError
        return log

    def _subscribed(self, stream: str, after: int | None) -> Log:
        log = self._found(stream)
        if after is not None and after >= len(log.events):
            raise OffsetOutOfRangeError
        return log

    def _info(self, log: Log) -> tuple[object, ...]:
        is_held = log.writer is not None
        tail = len(log.events)
        return log.id, log.status, log.error, tail, log.created_at, is_held, log.expires_at, dict(log.metadata)

    def _is_its_own(self, writer: Writer) -> bool:
        return self.logs.get(writer.log.id) is writer.log and writer.log.writer is writer

    def _put(self, writer: Writer, chunk: object) -> int:
        size = len(_json(chunk)) + 1
        if size - 1 > MAX_EVENT_BYTES:
            raise LimitExceededError
        writer.check()
        if writer.tail >= MAX_EVENTS or writer.size + size > MAX_STREAM_BYTES:
            raise LimitExceededError
        writer.size += size
        return writer.tail

    def _append(self, writer: Writer, chunk: object) -> bool:
        if not self._is_its_own(writer):
            return False
        writer.log.events.append(("chunk", chunk))
        writer.log.size = writer.size
        if writer.log.expires_at - self.now < FORGET / 2:
            writer.log.expires_at = self.now + FORGET
        writer.tail += 1
        return True

    def _finish(self, writer: Writer, error: Status | None, output: object = None) -> None:
        if self._is_its_own(writer):
            writer.why = StreamInputClosedError
            self._stop(writer)
            self._end(writer.log, error, output)
            writer.tail += 1
        else:
            self._fence(writer)
            writer.check()

    def _let_go(self, writer: Writer, why: Why) -> None:
        if writer.why is not None:
            return
        if self._is_its_own(writer):
            writer.why = why
            self._stop(writer)
            writer.log.writer = None
            writer.log.free_at = self.now
            writer.log.expires_at = self.now + FORGET
            self._set_deadlines(writer.log)
        else:
            self._fence(writer)

    def _fence(self, writer: Writer) -> None:
        there = self.logs.get(writer.log.id)
        if there is None:
            writer.why = StreamNotFoundError
        elif there.status != "open":
            writer.why = StreamCompletedError
        else:
            writer.why = StreamTakenOverError
        writer.is_cancelled = True
        self._stop(writer)

    def _stop(self, writer: Writer) -> None:
        if writer in writer.manager.kept:
            writer.manager.kept.remove(writer)

    def _tell(self, log: Log) -> None:
        for writer in self.kept:
            if writer.log is log:
                self.look(writer)

    def _deadline(self, log: Log) -> float:
        return inf if log.writer else self.elapsed + log.abandoned_at - self.now

    def _set_deadlines(self, log: Log) -> None:
        for manager in self.managers:
            if log in manager.feeds:
                manager.feeds[log] = self._deadline(log)

    def _abandon(self, log: Log) -> None:
        if log.status == "open" and log.writer is None and self.now >= log.abandoned_at:
            self._end(log, "ABORTED")

    def _end(self, log: Log, error: Status | None, output: object = None) -> None:
        log.status, log.error = "error" if error else "done", error
        log.events.append((log.status, error or output))
        log.writer, log.expires_at = None, self.now + TTL
        self._no_feeds(log)

    def _forget(self, log: Log) -> None:
        del self.logs[log.id]
        self._no_feeds(log)
        for follower in self.followers:
            if follower.log is log:
                follower.stop(StreamNotFoundError)

    def _no_feeds(self, log: Log) -> None:
        for manager in self.managers:
            manager.feeds.pop(log, None)


def _json(value: object) -> bytes:
    try:
        return msgspec.json.encode(value)
    except TypeError:
        raise InvalidArgumentError from None
