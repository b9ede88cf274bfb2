"""Requests of the protocol, as values: what their headers and queries say. Raises RefusedError for what can never be right."""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Literal
from urllib.parse import parse_qsl, unquote, urlsplit

from ..errors import Status, StreamkeepError
from . import _rules
from ._messages import TOKEN
from ._rules import Append, Config, ForkAsked, Tag

MAX_SAFE: Final = (1 << 53) - 1
_NUMBER: Final = re.compile(r"0|[1-9][0-9]*")
_RFC3339: Final = re.compile(
    r"\d{4}-\d{2}-\d{2}[Tt]\d{2}:\d{2}:\d{2}(\.\d+)?([Zz]|[+-]\d{2}:\d{2})",
    re.ASCII,
)
_OFFSET: Final = re.compile(r"[A-Za-z0-9_-]{1,255}")
_CURSOR: Final = re.compile(r"[0-9]{1,255}")
MAX_NAME: Final = 256
CURSOR_EPOCH: Final = 1_728_432_000.0
"""2024-10-09T00:00:00Z (10.1)."""
CURSOR_SECONDS: Final = 20.0


class RefusedError(StreamkeepError):
    """A request that is not done, and its HTTP code."""

    def __init__(self, code: int, reason: str, *, name: str = "", headers: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__(reason)
        self.status: Status = "INVALID_ARGUMENT"
        self.code = code
        self.name = name
        self.headers = headers


@dataclass(frozen=True, slots=True)
class Reading:
    """What a GET asks for; `offset` is as it was given."""

    offset: str
    live: Literal["", "long-poll", "sse"]
    cursor: int | None


def is_true(headers: Mapping[str, str], name: str) -> bool:
    """Say whether a presence header is there: only `true` counts, in any case (4.1)."""
    return headers.get(name, "").strip().lower() == "true"


def reading_of(query: bytes) -> Reading:
    """Read the query of a GET (5.6 to 5.8)."""
    try:
        pairs = parse_qsl(query.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=100)
    except ValueError:
        raise RefusedError(400, "the query cannot be read") from None
    offsets = [value for name, value in pairs if name == "offset"]
    modes = [value for name, value in pairs if name == "live"]
    cursors = [value for name, value in pairs if name == "cursor"]
    if len(offsets) > 1 or len(modes) > 1:
        raise RefusedError(400, "offset and live may be given once")
    if offsets and not _OFFSET.fullmatch(offsets[0]):
        raise RefusedError(400, "the offset is malformed")
    cursor = int(cursors[-1]) if cursors and _CURSOR.fullmatch(cursors[-1]) else None
    match modes:
        case []:
            return Reading(offsets[0] if offsets else "-1", "", cursor)
        case ["long-poll" | "sse" as live]:
            if not offsets:
                raise RefusedError(400, "a live read begins at an offset")
            return Reading(offsets[0], live, cursor)
        case _:
            raise RefusedError(400, "live is long-poll or sse")


def config_of(headers: Mapping[str, str]) -> Config:
    """Read what a PUT asks for (5.1)."""
    content_type = _content_type(headers)
    ttl, expires = headers.get("stream-ttl"), headers.get("stream-expires-at")
    if ttl is not None and expires is not None:
        raise RefusedError(400, "Stream-TTL and Stream-Expires-At exclude one another")
    if ttl is not None and (not _NUMBER.fullmatch(ttl) or len(ttl) > 16 or int(ttl) > MAX_SAFE):
        raise RefusedError(400, "Stream-TTL is a whole number of seconds")
    at = _rules.NEVER if expires is None else _time(expires)
    return Config(content_type, None if ttl is None else int(ttl), expires or "", at, is_true(headers, "stream-closed"))


def fork_of(headers: Mapping[str, str], roots: Sequence[str]) -> ForkAsked | None:
    """Read where a PUT forks from (4.2); None: it does not. `roots` are the paths that all streams are under, here and for clients."""
    named = headers.get("stream-forked-from")
    offset, sub = headers.get("stream-fork-offset"), headers.get("stream-fork-sub-offset")
    if named is None:
        if offset is not None or sub is not None:
            raise RefusedError(400, "Stream-Fork-Offset and Stream-Fork-Sub-Offset are for forks")
        return None
    if offset is not None and not _OFFSET.fullmatch(offset):
        raise RefusedError(400, "Stream-Fork-Offset is malformed")
    if sub is not None and (not _NUMBER.fullmatch(sub) or len(sub) > 16):
        raise RefusedError(400, "Stream-Fork-Sub-Offset is a whole number")
    count = int(sub or 0)
    if count and offset is None:
        raise RefusedError(400, "Stream-Fork-Sub-Offset needs Stream-Fork-Offset")
    return ForkAsked(source_of(named, roots), offset, count)


def source_of(named: str, roots: Sequence[str]) -> str:
    """Give the path of the stream that a URL's path names: with a root of all streams, or below it."""
    try:
        path = unquote(urlsplit(named).path if "://" in named else named, errors="strict")
    except ValueError:
        raise RefusedError(400, "the path is not UTF-8") from None
    root = next((root for root in roots if root and path.startswith(root + "/")), "")
    return path.removeprefix(root).removeprefix("/")


def append_of(headers: Mapping[str, str], body: bytes) -> Append:
    """Read what a POST asks for (5.2)."""
    closes = is_true(headers, "stream-closed")
    if not body and not closes:
        raise RefusedError(400, "the body is empty")
    content_type = _content_type(headers) if body else None
    if body and content_type is None:
        raise RefusedError(400, "the body has no Content-Type")
    seq = headers.get("stream-seq")
    if seq is not None and not 1 <= len(seq) <= MAX_NAME:
        raise RefusedError(400, f"Stream-Seq has 1 to {MAX_NAME} characters")
    return Append(body, content_type, closes, seq, _tag(headers))


def _tag(headers: Mapping[str, str]) -> Tag | None:
    given = [headers.get(f"producer-{name}") for name in ("id", "epoch", "seq")]
    match given:
        case [None, None, None]:
            return None
        case [str(id), str(epoch), str(seq)]:
            if not 1 <= len(id.strip()) <= MAX_NAME:
                raise RefusedError(400, f"Producer-Id has 1 to {MAX_NAME} characters")
            return Tag(id, _whole(epoch, "Producer-Epoch"), _whole(seq, "Producer-Seq"))
        case _:
            raise RefusedError(400, "Producer-Id, Producer-Epoch and Producer-Seq belong together")


def _whole(text: str, name: str) -> int:
    if not re.fullmatch(r"[0-9]{1,16}", text) or int(text) > MAX_SAFE:
        raise RefusedError(400, f"{name} is a whole number below 2**53")
    return int(text)


def _content_type(headers: Mapping[str, str]) -> str | None:
    given = headers.get("content-type")
    if given is None or not given.strip():
        return None
    if len(given) > MAX_NAME or not TOKEN.fullmatch(given.strip()):
        raise RefusedError(400, "the Content-Type is malformed")
    return given.strip()


def _time(text: str) -> float:
    """Read a time of RFC 3339, with its offset."""
    try:
        time = datetime.fromisoformat(text.upper()) if _RFC3339.fullmatch(text) else None
        at = None if time is None else (time - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds()
    except (ValueError, OverflowError):
        at = None
    if at is None:
        raise RefusedError(400, "Stream-Expires-At is a time of RFC 3339")
    return at


def cursor_after(given: int | None, now: float) -> str:
    """Give the cursor of a live answer: how many intervals have passed, and always more than a client already has (10.1)."""
    interval = max(0, int((now - CURSOR_EPOCH) / CURSOR_SECONDS))
    if given is None or given < interval:
        return str(interval)
    return str(given + max(1, round(random.uniform(1, 3_600) / CURSOR_SECONDS)))  # noqa: S311 - jitter
