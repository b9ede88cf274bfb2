"""Where in a stream a request goes on, and whether it names one instead of starting one. It only reads what the request says."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any, Final
from urllib.parse import parse_qsl

import msgspec

from .._info import StreamInfo
from ..errors import InvalidArgumentError, OffsetOutOfRangeError
from ..events import MAX_OFFSET
from ..wire import LIFE_CHARACTERS, Cursor, parse_cursor
from .framing import Framing, parse_offset
from .response import STREAM_ID_HEADER, Scope, headers_of

OFFSET_HEADER: Final = "x-genkit-stream-offset"
_OF_ONE_TRY: Final = re.compile(
    r"""
      connection | content-(length|type) | date | keep-alive | priority | te | transfer-encoding    # how the message is sent
    | cdn-loop | cf-(connecting-ip|ray) | forwarded | true-client-ip | via | x-real-ip              # which way it came
    | x-envoy-(attempt-count|expected-rq-timeout-ms) | x-forwarded-(for|port|proto) | x-request-start
    | b3 | sentry-trace | traceparent | tracestate | uber-trace-id | x-cloud-trace-context          # what it is traced by
    | x-b3-(flags|parentspanid|sampled|spanid|traceid) | x-datadog-(parent-id|sampling-priority|tags|trace-id)
    | x-(amz-cf|amzn-trace|correlation|request|vercel)-id | fly-request-id | x-azure-ref
    | x-stainless-retry-count                                                                       # which try it is
    """,
    re.VERBOSE,
)
"""Headers that may differ where a request is sent again, and say nothing of who sends it but from where. One more costs a run."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where in a stream a reader goes on: behind an offset (None: at the start), of one life of its id if the reader says which.

    Or with the `last` events that are stored; and whether it follows, or ends behind what is stored.
    """

    after: int | None = None
    life: str = ""
    last: int | None = None
    follow: bool = True


START: Final = Place()


def stream_named_in(scope: Scope) -> tuple[str | None, bool]:
    """Give the stream that a request to start one names instead, and whether a cursor does."""
    named = headers_of(scope).get(STREAM_ID_HEADER)
    if named is not None:
        return named, False
    cursor = cursor_in(scope)
    return (None, False) if cursor is None else (cursor.stream, True)


def cursor_in(scope: Scope) -> Cursor | None:
    """Give the cursor that a request goes on from, if it names one."""
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


def reading_of(scope: Scope, info: StreamInfo) -> Place:
    """Give where a request to read begins: where it goes on, or with the `?last=` events; and whether it follows, as `?follow=` says.

    InvalidArgumentError: as `place_of`, or these are no number, and neither true nor false.
    """
    place, query = place_of(scope, info), query_of(scope)
    last, follow = query.get("last", ""), query.get("follow", "true")
    if follow not in {"true", "false"}:
        raise InvalidArgumentError("`follow` is true or false")
    if last and not (last.isascii() and last.isdigit() and len(last) <= len(str(MAX_OFFSET)) and int(last) <= MAX_OFFSET):
        raise InvalidArgumentError(f"`last` is a whole number from 0 to {MAX_OFFSET}, in ASCII digits")
    # Who comes back with a place has had the last ones.
    newest = int(last) if last and place == START else None
    return replace(place, last=newest, follow=follow == "true")


def check_life(place: Place, life: str) -> None:
    """Raise OffsetOutOfRangeError if a place is in another life of its id than this one."""
    if place.life and place.life != life[:LIFE_CHARACTERS]:
        raise OffsetOutOfRangeError("the stream was deleted, or has expired, and another one has its id now")


def in_life(place: Place, info: StreamInfo) -> Place:
    """Give the same place, in the stream that somebody was let in to, and in no later one under its id."""
    return replace(place, life=place.life or info.life[:LIFE_CHARACTERS])


def is_all_seen(info: StreamInfo, place: Place, framing: Framing) -> bool:
    """Say whether who goes on here has seen all that a framing shows of an ended stream."""
    if info.status == "open":
        return False
    is_end_shown = info.status != "done" or framing.shows_done
    last_shown = info.tail - 1 if is_end_shown else info.tail - 2
    seen = info.tail - 1 if place.last == 0 else -1 if place.after is None else place.after
    return last_shown <= seen < info.tail


def again(place: Place) -> Place:
    """Give where to begin so that the last event is sent again: Genkit's clients need a terminal one in every response."""
    return Place(place.after - 1, place.life) if place.after else START


def run_of(scope: Scope, owner: str = "") -> str | None:
    """Give the run that a request's `Idempotency-Key` names: those of one route are apart from those of another. None: it has none.

    Keys may be guessed. Where nobody has said who is asking, a request is the one before only if it says the same of its sender, whatever
    the app knows its users by: in all of its query, and in all headers but those that differ from one try to the next.
    """
    headers = headers_of(scope)
    key = headers.get("idempotency-key")
    if not key:
        return None
    asking = owner or [scope.get("query_string", b"").decode("latin-1"), *sorted(_lasting(scope))]
    return sha256(msgspec.json.encode([scope["path"], key, asking])).hexdigest()


def _lasting(scope: Scope) -> Iterator[tuple[str, str]]:
    for name, text in scope["headers"]:
        if not _OF_ONE_TRY.fullmatch(known := name.decode("latin-1").lower()):
            yield known, text.decode("latin-1")


def query_of(scope: Mapping[str, Any]) -> Mapping[str, str]:
    """Give a request's query; of repeated names the last."""
    return dict(parse_qsl(scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True))
