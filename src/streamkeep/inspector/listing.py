"""Listing: the streams that a page asks for, of a storage that may hold very many."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import anyio

from .._info import StreamInfo, StreamStatus
from .._manager import STREAM_ID, StreamManager

LOOK_SECONDS: Final = 0.5
"""How long is looked for streams before a page is told what was found until then."""
LOOKED_AT: Final = 200
LAST_OF_IDS: Final = "\x7f"
"""Greater than all that ids are made of."""


@dataclass(frozen=True, slots=True)
class Filter:
    """Which streams are asked for.

    Attributes:
        status: None: any.
        owner: exactly this one; None: anybody's.
        key_prefix: how their keys begin.
        id_prefix: how their ids begin.
    """

    status: StreamStatus | None
    owner: str | None
    key_prefix: str
    id_prefix: str

    def includes(self, stream: StreamInfo) -> bool:
        """Say whether a stream is one of them, as far as the manager's list does not."""
        return stream.key.startswith(self.key_prefix) and stream.id.startswith(self.id_prefix)

    @property
    def begin(self) -> str:
        """The cursor before the first of them."""
        if not self.id_prefix:
            return ""
        return f"{self.id_prefix[:-1]}{chr(ord(self.id_prefix[-1]) - 1)}{LAST_OF_IDS}"

    def is_past(self, cursor: str) -> bool:
        """Say whether none of them is behind a cursor."""
        return cursor > self.id_prefix and not cursor.startswith(self.id_prefix)


@dataclass(frozen=True, slots=True)
class Found:
    """Some streams by id, and where to go on; None: there are no more."""

    streams: Sequence[StreamInfo]
    next: str | None


async def list_filtered(streams: StreamManager, wanted: Filter, after: str, limit: int) -> Found:
    """Give at most so many streams behind a cursor, or those that are found in half a second. Raises as `StreamManager.list` does."""
    if wanted.id_prefix and not STREAM_ID.fullmatch(wanted.id_prefix):
        return Found((), None)  # no id begins so
    found: list[StreamInfo] = []
    until = anyio.current_time() + LOOK_SECONDS
    cursor: str | None = max(after, wanted.begin)
    looked_at = max(limit, LOOKED_AT) if wanted.key_prefix else limit
    while cursor is not None and len(found) < limit:
        page = await streams.list(cursor, looked_at, owner=wanted.owner, status=wanted.status)
        found.extend(stream for stream in page if wanted.includes(stream))
        cursor = page.next
        if cursor is not None and wanted.is_past(cursor):
            cursor = None
        if anyio.current_time() >= until:
            break
    if len(found) > limit:
        return Found(found[:limit], found[limit - 1].id)
    return Found(found, cursor)
