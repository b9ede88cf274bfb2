"""What HTTPStorage and StorageHTTP say to one another: MessagePack in the bodies of POSTs, because records are bytes.

    POST  read      a Read          a Page, or nil
    POST  change    [Change, …]     [true | false | Failure, …]; those of one stream are made in order
    POST  scan      a Scan          [[id, Head], …]
    POST  expired   an Expired      [[id, Head], …]
    POST  watch     [id, …]         lines, each a JSON array of ids: the first, which is empty, when all are watched, and then of those that
                                    were rung; an empty one is a heartbeat

An answer of another status than 200 is a Failure. Each says what time it is: `streamkeep-time`, in seconds since the epoch.

An answer that takes long begins before it is known, with status 200: `BEAT` every `BEAT_SECONDS`, which is a byte that MessagePack never
uses, and in front of the rest `SLOWLY_DONE`, or `SLOWLY_FAILED` for a Failure. So a storage may be slow, and a server from which nothing
comes any more is noticed all the same, before the sessions of those who talk to it are taken for dead.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Final

import msgspec

from streamkeep.errors import (
    InvalidArgumentError,
    StorageCorruptError,
    StorageError,
    StorageFullError,
    StorageUnavailableError,
    StreamkeepError,
)
from streamkeep.storage import Head

CONTENT_TYPE: Final = "application/vnd.streamkeep.storage.1+msgpack"
TIME_HEADER: Final = "streamkeep-time"
BEAT: Final = b"\xc1"
BEAT_SECONDS: Final = 1.5
SLOWLY_DONE: Final = b"+"
SLOWLY_FAILED: Final = b"-"
SILENCE_SECONDS: Final = 5.0
"""So long nothing may come of an answer. Less than a lease: a session has to be renewed over another connection meanwhile."""
HEARTBEAT_SECONDS: Final = 3.0
MAX_BODY_BYTES: Final = 64 << 20
"""The longest body of a request; a batch of changes is far shorter unless one of them is not."""


Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
"""What an offset, a limit, a tail or a version may be: all storages have integers of so many bits."""


class Read(msgspec.Struct, frozen=True):
    """See `Storage.read`."""

    stream: str
    start: Count
    limit: Count


class Change(msgspec.Struct, frozen=True):
    """A commit; or, without a head, a deletion. See `Storage.commit` and `Storage.delete`."""

    stream: str
    seen: Count | None
    head: Head | None
    records: Sequence[bytes] = ()

    def check(self) -> None:
        """Raise InvalidArgumentError if no storage could be asked for this."""
        head = self.head
        if head is None and self.seen is None:
            raise InvalidArgumentError("what is deleted was seen")
        if head is not None and not (
            abs(head.version) < 2**63
            and len(self.records) <= head.tail < 2**63
            and 0 <= head.first <= head.tail
            and math.isfinite(head.expires_at)
        ):
            raise InvalidArgumentError(
                "a head has a version, a tail that counts its records, a first one up to that, and a time at which it expires"
            )


class Scan(msgspec.Struct, frozen=True):
    """See `Storage.scan`."""

    after: str
    limit: Count


class Expired(msgspec.Struct, frozen=True):
    """See `Storage.expired`."""

    before: float
    limit: Count


class Failure(msgspec.Struct, frozen=True):
    """What was raised."""

    kind: str
    message: str

    def error(self) -> StreamkeepError:
        """Give it as an error."""
        return _ERRORS.get(self.kind, StorageError)(self.message)


_ERRORS: Final[Mapping[str, type[StreamkeepError]]] = {
    "invalid": InvalidArgumentError,
    "unavailable": StorageUnavailableError,
    "full": StorageFullError,
    "corrupt": StorageCorruptError,
}


def failure_of(error: StreamkeepError) -> Failure:
    """Give what a client is told of an error."""
    kinds = (kind for kind, its_class in _ERRORS.items() if isinstance(error, its_class))
    return Failure(next(kinds, "failed"), str(error))
