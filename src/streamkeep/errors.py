"""Every exception that streamkeep raises, and the canonical statuses they carry.

    StreamkeepError                   a status, its HTTP code, and whether the message may be shown
    ├── InvalidArgumentError          INVALID_ARGUMENT     a bad id, offset, chunk or request
    │   └── OffsetOutOfRangeError     OUT_OF_RANGE         an offset that the stream never reached
    ├── StreamNotFoundError           NOT_FOUND            no such stream, or it has expired
    ├── StreamAlreadyExistsError      ALREADY_EXISTS       the id is taken
    │   └── KeyInUseError             ALREADY_EXISTS       a stream runs under the key, or was started by the same run: follow that
    ├── StreamBusyError               FAILED_PRECONDITION  its writer may be alive; try again a little later
    ├── StreamInputClosedError        FAILED_PRECONDITION  this handle was completed or closed by its owner
    ├── StreamCompletedError          FAILED_PRECONDITION  somebody else completed or cancelled the stream
    ├── StreamTakenOverError          ABORTED              another writer has taken the stream over
    ├── StreamTimeoutError            DEADLINE_EXCEEDED    nothing came for as long as the reader would wait
    ├── StreamManagerClosedError      UNAVAILABLE          the manager is not running
    ├── WrongEventLoopError           FAILED_PRECONDITION  used in another thread, event loop or process than it was entered in
    ├── LimitExceededError            RESOURCE_EXHAUSTED   a documented limit was reached
    ├── StorageError                  UNAVAILABLE          the storage failed; what was asked for may or may not be done
    │   ├── StorageUnavailableError   UNAVAILABLE          it cannot be reached for now; asking again may help
    │   ├── StorageFullError          RESOURCE_EXHAUSTED   no space left; nothing was stored
    │   └── StorageCorruptError       DATA_LOSS            the storage is damaged, foreign, or from a newer version
    ├── RemoteError                   UNAVAILABLE          what another server has could not be had; see `streamkeep.client`
    │   ├── RefusedError              the server's own     it has answered with an error, or its flow has failed
    │   │   └── GoneError             NOT_FOUND            it was there, and is not kept any more; it says what still is
    │   ├── UnexpectedAnswerError     UNKNOWN              what it has answered cannot be read
    │   └── StreamLostError           UNAVAILABLE          the connection was lost, and so was every try to go on
    └── PublicError                   any                  raised by a producer: its message is for readers

The statuses and their HTTP codes are Genkit's (and gRPC's).
"""

from collections.abc import Mapping
from typing import ClassVar, Final, Literal, TypeVar, get_args

__all__ = [
    "GoneError",
    "InvalidArgumentError",
    "KeyInUseError",
    "LimitExceededError",
    "OffsetOutOfRangeError",
    "PublicError",
    "RefusedError",
    "RemoteError",
    "Status",
    "StorageCorruptError",
    "StorageError",
    "StorageFullError",
    "StorageUnavailableError",
    "StreamAlreadyExistsError",
    "StreamBusyError",
    "StreamCompletedError",
    "StreamInputClosedError",
    "StreamLostError",
    "StreamManagerClosedError",
    "StreamNotFoundError",
    "StreamTakenOverError",
    "StreamTimeoutError",
    "StreamkeepError",
    "UnexpectedAnswerError",
    "WrongEventLoopError",
]

E = TypeVar("E", bound=Exception)

Status = Literal[
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "UNAUTHENTICATED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
]
"""What an error's `status` may be: Genkit's statuses, which are gRPC's. Each has the HTTP code that Genkit gives it."""

STATUSES: Final[Mapping[str, Status]] = {status: status for status in get_args(Status)}

HTTP_CODES: Final[Mapping[Status, int]] = {
    "CANCELLED": 499,
    "UNKNOWN": 500,
    "INVALID_ARGUMENT": 400,
    "DEADLINE_EXCEEDED": 504,
    "NOT_FOUND": 404,
    "ALREADY_EXISTS": 409,
    "PERMISSION_DENIED": 403,
    "UNAUTHENTICATED": 401,
    "RESOURCE_EXHAUSTED": 429,
    "FAILED_PRECONDITION": 400,
    "ABORTED": 409,
    "OUT_OF_RANGE": 400,
    "UNIMPLEMENTED": 501,
    "INTERNAL": 500,
    "UNAVAILABLE": 503,
    "DATA_LOSS": 500,
}


class StreamkeepError(Exception):
    """The base of all errors here.

    `status` is the canonical status; `public` says whether the message may be shown to a client, who else reads only
    the status.
    """

    status: Status = "INTERNAL"
    public: ClassVar[bool] = True

    @property
    def http_code(self) -> int:
        """The HTTP code that Genkit gives this status."""
        return HTTP_CODES[self.status]


class InvalidArgumentError(StreamkeepError):
    """What was passed in can never be right: an id, an offset, a value that is not JSON."""

    status: Status = "INVALID_ARGUMENT"


class OffsetOutOfRangeError(InvalidArgumentError):
    """A reader has, or names, events that the stream has not: it has mixed up streams, or the storage went back and lost some."""

    status: Status = "OUT_OF_RANGE"


class StreamNotFoundError(StreamkeepError):
    """No stream lives under this id: it never did, has expired, or was deleted."""

    status: Status = "NOT_FOUND"


class StreamAlreadyExistsError(StreamkeepError):
    """A stream, open or completed, lives under this id."""

    status: Status = "ALREADY_EXISTS"


class KeyInUseError(StreamAlreadyExistsError):
    """Nothing was started, because a stream is there already: one that runs under this key, or one that this very run has started.

    `stream` is its id, to be followed. Its start may still fail, or it may be deleted: whoever does not find it starts again.
    `is_same_run`: whether it is the one that this run has started.
    """

    def __init__(self, message: str, *, stream: str, is_same_run: bool = False) -> None:
        super().__init__(message)
        self.stream = stream
        self.is_same_run = is_same_run


class StreamBusyError(StreamkeepError):
    """The stream has a writer that may be alive, so it cannot be taken over. `retry_after`: try again in so many seconds.

    By then its session has been observed for its lease, or has been renewed.
    """

    status: Status = "FAILED_PRECONDITION"

    def __init__(self, message: str, *, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class StreamInputClosedError(StreamkeepError):
    """This handle was completed or closed by its owner. (Genkit: "stream writer is closed".)"""

    status: Status = "FAILED_PRECONDITION"


class StreamCompletedError(StreamkeepError):
    """The stream was completed or cancelled by somebody else. (Genkit: "stream has already completed".)"""

    status: Status = "FAILED_PRECONDITION"


class StreamTakenOverError(StreamkeepError):
    """Another writer has taken the stream over; this one can write no more."""

    status: Status = "ABORTED"


class StreamTimeoutError(StreamkeepError):
    """Nothing came for as long as the reader had said that it would wait."""

    status: Status = "DEADLINE_EXCEEDED"


class StreamManagerClosedError(StreamkeepError):
    """The manager is closed, or was never entered."""

    status: Status = "UNAVAILABLE"


class WrongEventLoopError(StreamkeepError):
    """This belongs to another event loop, another thread's or the process's that this one was forked from. Nothing was changed.

    Open a manager or a storage where you want to use it. From another thread only `StreamInput.write_soon` may be called.
    """

    status: Status = "FAILED_PRECONDITION"


class LimitExceededError(StreamkeepError):
    """A limit was reached; the message names it. Nothing was stored."""

    status: Status = "RESOURCE_EXHAUSTED"


class StorageError(StreamkeepError):
    """The storage failed, and whether it did what was asked for is unknown. The message is for the log, not for clients."""

    status: Status = "UNAVAILABLE"
    public = False


class StorageUnavailableError(StorageError):
    """The storage cannot be reached, or lost the connection before it answered. Asking again may help; `RetryingStorage` does."""


class StorageFullError(StorageError):
    """The storage has no space left. Nothing of the commit was stored."""

    status: Status = "RESOURCE_EXHAUSTED"


class StorageCorruptError(StorageError):
    """The storage is damaged, is not one of ours, or was written by a newer version."""

    status: Status = "DATA_LOSS"


class RemoteError(StreamkeepError):
    """What another server has could not be had to its end. What was given until then is whole, in order, and came once.

    Attributes:
        stream: the stream's id; None: the server has not said it.
        cursor: where to go on, as `after`; None: at the beginning.
        events: how many events, or chunks of a flow, have been given.
    """

    status: Status = "UNAVAILABLE"
    public = False

    def __init__(self, message: str, *, stream: str | None = None, cursor: str | None = None, events: int = 0) -> None:
        super().__init__(message)
        self.stream = stream
        self.cursor = cursor
        self.events = events


class RefusedError(RemoteError):
    """The server has answered with an error, or its flow has failed: the same request will not do better.

    `status`, `message` and `details` are what the server says. `http_status` is the answer's code; None: it began well, and ended so.
    `place`, which only the error's text has, is what was asked.
    """

    def __init__(
        self,
        message: str,
        *,
        status: Status = "UNKNOWN",
        details: object = None,
        http_status: int | None = None,
        place: str = "",
    ) -> None:
        super().__init__(f"{status}: {message}{place and f' ({place})'}")
        self.status = status
        self.message = message
        self.details = details
        self.http_status = http_status


class GoneError(RefusedError):
    """What was asked for was there, and the server does not keep it any more (HTTP 410). To ask again does not help.

    `cursor` is where to begin with what is still kept; what was before that, and had not been read, is lost. None: the stream is gone.
    """


class UnexpectedAnswerError(RemoteError):
    """What the server has answered cannot be read: it is no event stream, is malformed, too long, or leads to another server."""

    status: Status = "UNKNOWN"


class StreamLostError(RemoteError):
    """The connection was lost, and so was every try to go on, or there is no way to; `__cause__` is what happened last.

    `retry_after`: the server has asked for so many seconds, which is longer than was to be waited.
    """

    retry_after: float | None = None


class PublicError(StreamkeepError):
    """Raise it in a producer to show its message and details to readers; any other exception reads `internal` there.

    Its counterpart is Genkit's `PublicError` (`UserFacingError` in JS), which is understood as well.
    """

    def __init__(self, status: Status, message: str, details: object = None) -> None:
        super().__init__(message)
        self.status = status
        self.details = details


def fresh(error: E) -> E:
    """Give an equal exception that was never raised: one for each who waits, because a traceback grows with every raise."""
    copy = error.__class__.__new__(error.__class__, *error.args)
    copy.__dict__.update(error.__dict__)
    if error.__cause__ is not None:
        copy.__cause__ = error.__cause__  # it is not raised again, and says where it comes from
    return copy
