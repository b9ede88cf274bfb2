"""Listing: what is known of streams, and which there are, page by page."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, overload

from . import _lifecycle, _names
from ._core import Core
from ._info import StreamInfo, StreamStatus, info_of
from ._names import Kind, Name
from ._naming import read_heads
from .errors import StorageCorruptError
from .storage import Head

SCAN_STREAMS: Final = 1_000
"""How many streams are read at once; and how many a call looks at, at most, if it may not give more, for those that are asked for."""


@dataclass(frozen=True, slots=True)
class StreamPage(Sequence[StreamInfo]):
    """Some of the streams that were asked for. It may be empty although there are more: go on while `next` is not None.

    Attributes:
        streams: the same, as a sequence.
        next: what to give as `after` for what follows; None: nothing does.
    """

    streams: Sequence[StreamInfo]
    next: str | None

    @overload
    def __getitem__(self, index: int) -> StreamInfo: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[StreamInfo]: ...

    def __getitem__(self, index: int | slice) -> StreamInfo | Sequence[StreamInfo]:
        return self.streams[index]

    def __iter__(self) -> Iterator[StreamInfo]:
        return iter(self.streams)

    def __len__(self) -> int:
        return len(self.streams)


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which streams are asked for; None: all."""

    owner: str | None
    key_prefix: str | None
    status: StreamStatus | None

    @property
    def kind(self) -> Kind | None:
        """What names lead to them; None: they are found among all streams."""
        if self.key_prefix is not None:
            return Kind.KEY
        return Kind.OWN if self.owner else None

    def includes(self, info: StreamInfo) -> bool:
        """Say whether this is one of them."""
        is_owners = self.kind is not None or self.owner in {None, info.owner}
        return is_owners and self.status in {None, info.status}


async def list_streams(core: Core, after: str, limit: int, wanted: Wanted) -> StreamPage:
    """Give at most `limit` streams after a cursor, having looked at a bounded number. Raises StorageError."""
    found: list[StreamInfo] = []
    looked, size = 0, limit
    while len(found) < limit and looked < max(limit, SCAN_STREAMS):
        size = min(size, SCAN_STREAMS)
        page = await _look_at(core, after, size, wanted)
        if not page:
            return StreamPage(found, None)
        for cursor, info in page:
            after = cursor
            if info is not None and wanted.includes(info):
                found.append(info)
                if len(found) == limit:
                    break
        looked += len(page)
        size *= 2  # few of them are wanted
    return StreamPage(found, after)


async def _look_at(core: Core, after: str, limit: int, wanted: Wanted) -> Sequence[tuple[str, StreamInfo | None]]:
    """Give streams after a cursor, each with its own cursor; None in the place of one that is gone."""
    if wanted.kind is not None:
        return await _look_at_names(core, after, limit, wanted.owner or "", wanted.kind, wanted.key_prefix or "")
    found = await core.storage.scan(max(after, _lifecycle.AFTER_RESERVED), limit)
    now = core.now()
    return [(stream, _listed(stream, head, now)) for stream, head in found]


async def _look_at_names(
    core: Core, after: str, limit: int, owner: str, kind: Kind, prefix: str
) -> Sequence[tuple[str, StreamInfo | None]]:
    begin = _names.names_of(owner, kind, prefix)
    found = await core.storage.scan(max(begin, _names.name_id(owner, kind, after)) if after else begin, limit)
    named = {id: _readable(head) for id, head in found if id.startswith(begin)}
    streams = {name.stream for name in named.values() if name is not None}
    heads = await read_heads(core.storage, streams)
    now = core.now()
    return [(_names.text_in(id), _named(name, heads, now)) for id, name in named.items()]


def _readable(head: Head) -> Name | None:
    try:
        return _names.name_of(head)
    except StorageCorruptError:
        return None


def _named(name: Name | None, heads: Mapping[str, Head], now: float) -> StreamInfo | None:
    """Say what is known of the stream that is named, if that is there: one that cannot be read may be it."""
    if name is None or (head := heads.get(name.stream)) is None:
        return None
    try:
        life = _names.named_by(name, head, now)
    except StorageCorruptError:
        return _listed(name.stream, head, now)
    return None if life is None else info_of(name.stream, life)


def _listed(stream: str, head: Head, now: float) -> StreamInfo | None:
    try:
        life = _lifecycle.life_of(head)
    except StorageCorruptError as error:
        updated_at = _lifecycle.committed_at(head)
        return StreamInfo(stream, "", "unreadable", error.status, head.tail, updated_at, updated_at, "", head.expires_at, {})
    return None if _lifecycle.is_expired(life, now) else info_of(stream, life)
