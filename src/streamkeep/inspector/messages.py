"""What the page is told, as JSON: streams, who is at them, and rows, which are previews of events."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from math import isinf
from typing import Any, Final

from .._info import StreamInfo
from .._presence import Presence
from ..events import StreamEvent, StreamEventType, encode_json

PREVIEW_BYTES: Final = 320
OF_HOOKS: Final = frozenset({"writer", "carrier"})
"""What is known of a stream for hooks, and for nobody else."""

Row = tuple[int, str, str, int, float | None]
"""An event's offset, its type, how its JSON begins, how many bytes of JSON it has, and when it arrived, if that was seen."""


def listed(stream: StreamInfo) -> Mapping[str, object]:
    """Say of a stream what a list shows."""
    return {
        "id": stream.id,
        "life": stream.life,
        "status": stream.status,
        "error": stream.error,
        "tail": stream.tail,
        "updated_at": stream.updated_at,
        "owner": stream.owner,
        "key": stream.key,
        "is_recovering": stream.is_recovering,
    }


def known(stream: StreamInfo, presence: Presence, own_readers: int, now: float) -> Mapping[str, object]:
    """Say all that is known of a stream, at a moment of the storage's clock. `own_readers` follow it for pages like this one."""
    metadata = {name: text for name, text in stream.metadata.items() if name != "owner"}
    shown = {name: value for name, value in asdict(stream).items() if name not in OF_HOOKS}
    return {
        "stream": {**shown, "metadata": metadata},
        "writer": {
            "where": presence.writer,
            "silent": None if isinf(presence.silent) else round(presence.silent, 1),
            "dead_after": presence.dead_after,
        },
        "readers": {"app": max(0, presence.readers - own_readers), "pages": own_readers},
        "now": now,
    }


def row(event: StreamEvent[Any], data: bytes, at: float | None) -> Row:
    """Give the preview of an event, whose JSON is `data`."""
    return (event.offset, event.type.value, data[:PREVIEW_BYTES].decode(errors="ignore"), len(data), at)


def shown_data(event: StreamEvent[Any], *, internal: bool) -> bytes:
    """Give an event's JSON; of an error without what only those may see who run the service, unless `internal` says that they look."""
    if event.type is not StreamEventType.ERROR:
        return event.data
    error = event.error
    if internal:
        return encode_json(error)
    return encode_json({name: value for name, value in asdict(replace(error, internal="")).items() if name != "internal"})


_CONTENT: Final[Mapping[StreamEventType, bytes]] = {
    StreamEventType.CHUNK: b"chunk",
    StreamEventType.DONE: b"output",
    StreamEventType.ERROR: b"error",
    StreamEventType.RECOVERING: b"recovering",
    StreamEventType.RESTARTED: b"restarted",
}


def line_of(event: StreamEvent[Any], data: bytes) -> bytes:
    """Give an event as one line of JSON; `streamkeep tail --json` prints the same of chunks, outputs and errors."""
    return b'{"offset":%d,"type":"%b","%b":%b}' % (event.offset, event.type.value.encode(), _CONTENT[event.type], data)
