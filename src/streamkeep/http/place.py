"""Where in a stream a request goes on, and whether it names one instead of starting one. It only reads what the request says."""

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Final
from urllib.parse import parse_qsl

from .._listing import StreamInfo
from ..errors import InvalidArgumentError, OffsetOutOfRangeError
from .framing import LIFE_CHARACTERS, Cursor, parse_cursor, parse_offset
from .response import STREAM_ID_HEADER, Scope, headers_of

OFFSET_HEADER: Final = "x-genkit-stream-offset"
MAX_QUERY_FIELDS: Final = 100


@dataclass(frozen=True, slots=True)
class Place:
    """Where in a stream a reader goes on: behind an offset (None: at the start), of one life of its id if the reader says which."""

    after: int | None = None
    life: str = ""


START: Final = Place()


def stream_named_in(scope: Scope) -> tuple[str | None, bool]:
    """Give the stream that a request to start one names instead, and whether a cursor does."""
    named = headers_of(scope).get(STREAM_ID_HEADER)
    if named is not None:
        return named, False
    cursor = _cursor_in(scope)
    return (None, False) if cursor is None else (cursor.stream, True)


def _cursor_in(scope: Scope) -> Cursor | None:
    return parse_cursor(headers_of(scope).get("last-event-id") or query_of(scope).get("lastEventId"))


def place_of(scope: Scope, info: StreamInfo) -> Place:
    """Give where a request wants to go on in a stream.

    InvalidArgumentError: it names no place, or one of another stream. OffsetOutOfRangeError: one of another life of this id.
    """
    headers, query = headers_of(scope), query_of(scope)
    named = headers.get("last-event-id") or query.get("lastEventId") or headers.get(OFFSET_HEADER) or query.get("after")
    cursor = parse_cursor(named)
    if cursor is None:
        return Place(parse_offset(named))
    if cursor.stream != info.id:
        raise InvalidArgumentError("the cursor is one of another stream")
    place = Place(cursor.offset, cursor.life)
    check_life(place, info.life)
    return place


def check_life(place: Place, life: str) -> None:
    """Raise OffsetOutOfRangeError if a place is in another life of its id than this one."""
    if place.life and place.life != life[:LIFE_CHARACTERS]:
        raise OffsetOutOfRangeError("the stream was deleted, or has expired, and another one has its id now")


def is_all_seen(info: StreamInfo, place: Place) -> bool:
    """Say whether who goes on here has seen the stream's end."""
    return info.status != "open" and place.after == info.tail - 1


def again(place: Place) -> Place:
    """Give where to begin so that the last event is sent again: Genkit's clients need a terminal one in every response."""
    return Place(place.after - 1, place.life) if place.after else START


def run_of(scope: Scope, owner: str = "") -> str | None:
    """Give the run that a request's `Idempotency-Key` names: those of one route are apart from those of another. None: it has none.

    Keys may be guessed. Where nobody has said who is asking, those of clients with other credentials are apart too: whatever signs users in
    may be the app that is not asked when a request comes again.
    """
    headers = headers_of(scope)
    key = headers.get("idempotency-key")
    if not key:
        return None
    asking = "" if owner else f"\n{headers.get('authorization', '')}\n{headers.get('cookie', '')}"
    return sha256(f"{scope['path']}\n{key}{asking}".encode()).hexdigest()


def query_of(scope: Mapping[str, Any]) -> Mapping[str, str]:
    """Give a request's query; of repeated names the last. InvalidArgumentError: it is malformed."""
    try:
        return dict(
            parse_qsl(scope.get("query_string", b"").decode("ascii"), keep_blank_values=True, max_num_fields=MAX_QUERY_FIELDS)
        )
    except ValueError as error:
        raise InvalidArgumentError("the query string is malformed") from error
