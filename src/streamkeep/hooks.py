"""Hooks: what a manager tells of its streams, to apps and to instrumentation.

    class Bill(Hooks):
        def ended(self, stream: StreamInfo, outcome: Outcome) -> None:
            bill.note(stream.owner, stream.id, outcome)

    StreamManager.connect("sqlite:///streams.db", hooks=[Bill()])

Hooks are given values, and nothing by which they could harm a stream. What one raises is logged, once a second at most for each kind of
error, and changes nothing.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

from ._info import StreamInfo
from .errors import Status

__all__ = ["Commit", "Delivery", "Hooks", "Outcome", "Reader", "Sample", "StorageFailure"]

Outcome = Literal["done", "deleted", "expired", "released", "taken over", "stopped", "lost", "unknown"] | Status
"""How a stream has ended, or what has become of its writer.

Of a stream: `done`; the status of its error, such as `INTERNAL`, `CANCELLED` (somebody has stopped it) or `ABORTED` (its writer has died);
`deleted` or `expired`, while it was open.

Of a writer: `done` or a status, if it has itself ended the stream; `released`, for another one to go on; `taken over` by another one;
`stopped` or `deleted` by somebody else; `lost`, by a storage that has not what it had acknowledged; `unknown`, if the manager was closed
before the storage had taken the end.
"""


@dataclass(frozen=True, slots=True)
class Commit:
    """Events that a writer has stored at once.

    Attributes:
        stream: the stream's id.
        writer: the writer, as in `StreamInfo.writer`.
        first: the offset of the first of them.
        events: how many there are; 0, if only the head was changed.
        bytes: how many bytes they have, one for each event's type among them.
        seconds: how long the storage took.
        queued: how many events wait for the next commit.
        is_end: whether the last one has ended the stream.
    """

    stream: str
    writer: str
    first: int
    events: int
    bytes: int
    seconds: float
    queued: int
    is_end: bool


@dataclass(frozen=True, slots=True)
class Reader:
    """A subscription that was entered.

    Attributes:
        number: what tells it from all others of this process.
        stream: the stream, as it was found.
        after: the offset behind which it begins; None: at the start.
    """

    number: int
    stream: StreamInfo
    after: int | None


@dataclass(frozen=True, slots=True)
class Delivery:
    """Events that a reader was given at once.

    Attributes:
        reader: the reader.
        first: the offset of the first of them.
        events: how many there are.
        seconds: how long before, by the storage's clock, the commit began that has stored the last of them, if the reader has all that
            is stored now; None: it does not, or it was given what had been stored before it came.
    """

    reader: Reader
    first: int
    events: int
    seconds: float | None


@dataclass(frozen=True, slots=True)
class StorageFailure:
    """An error of the storage's.

    Attributes:
        operation: the method of the storage that has failed: `commit`, `read`, …
        error: the name of the error's class, such as `StorageUnavailableError`.
        is_retried: whether it is tried again by `RetryingStorage`, and nobody is told yet.
    """

    operation: str
    error: str
    is_retried: bool


@dataclass(frozen=True, slots=True)
class Sample:
    """How a manager is doing at a moment.

    Attributes:
        session: the name of the manager's session, which tells it from other managers.
        streams: how many streams are being written here.
        queued: how many of their events wait to be stored; also those that the storage has not acknowledged yet.
        readers: how many subscriptions are entered here.
        lag: how many events the slowest of them has not been given that are known here.
        session_seconds: how long ago the session began; None: it has not, for nothing was written yet.
        renewed_seconds: how long ago its last sign of life was begun that is stored. After the lease other managers may take its
            streams for abandoned.
    """

    session: str
    streams: int
    queued: int
    readers: int
    lag: int
    session_seconds: float | None
    renewed_seconds: float | None


class Hooks:
    """What a manager tells. Subclass it, and override what you want to know; give it as `StreamManager(..., hooks=[...])`.

    Each method is a plain function, called in the manager's event loop, in the context of whoever did what it tells of. One that blocks
    blocks the event loop: what takes long, or awaits, belongs behind a queue of the app's own. What it raises is logged, and changes
    nothing. Methods that are not overridden cost nothing.

    A process that is killed tells nothing more. What must not be missed is read from the storage: see `StreamManager.list`.
    """

    def started(self, stream: StreamInfo) -> None:
        """A new stream is open, and is written here."""

    def taken_over(self, stream: StreamInfo, before: StreamInfo) -> None:
        """A stream that was there, as it was `before`, is written here from now on."""

    def ended(self, stream: StreamInfo, outcome: Outcome) -> None:
        """A stream has ended, by this manager: by its writer, by `cancel`, by `delete`, or because its writer was found dead.

        Of all managers, in whatever processes, the one whose change of the storage has ended it tells this, once. (A `delete` whose answer
        was lost, and that another one has raced, may be told by both. An end whose answer was lost is told when it is known.)
        """

    def writer_left(self, stream: StreamInfo, outcome: Outcome) -> None:
        """A writer of this manager's writes no more: told once for each `started` and `taken_over`.

        After `ended`, if this writer has ended its stream itself. Where somebody else has, also by this manager, either may come first.
        """

    def opening(self, stream: str, writer: str) -> Mapping[str, str]:
        """A stream is about to be created, or taken over: `stream` is its id. In the context of who opens it.

        What this gives is kept with the stream, and is its `carrier` for the hooks of all processes: a traceparent, say, 1,024 characters
        at most. `started` or `taken_over` follows, with a stream that has this `writer`; or `not_opened`.
        """
        del stream, writer
        return {}

    def not_opened(self, stream: str, writer: str) -> None:
        """It was not opened, after all."""

    def producing(self, stream: StreamInfo) -> AbstractContextManager[object] | None:
        """A producer is about to run: give a context manager to be entered, in the context in which it runs.

        Where a runner runs it, as for `StreamsHTTP.respond`, that context is the run's own, and is not left; `async with streams.open(...)`
        leaves it at the end of the block.
        """

    def committed(self, commit: Commit) -> None:
        """A writer of this manager's has stored events, or changed its stream's head."""

    def reader_entered(self, reader: Reader) -> None:
        """A subscription was entered, in the context of who has entered it."""

    def reader_left(self, reader: Reader) -> None:
        """It was left; or dropped a while ago; or the manager is closed. Told once for each `reader_entered`."""

    def delivered(self, delivery: Delivery) -> None:
        """A reader was given events."""

    def storage_failed(self, failure: StorageFailure) -> None:
        """The storage has failed, or is asked again after it could not be reached."""

    def sampled(self, sample: Sample) -> None:
        """How the manager is doing, told every second; and when it is closed, with nothing in it."""
