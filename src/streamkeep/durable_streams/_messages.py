"""Content as the protocol sees it: types, JSON messages, and server-sent events of them. Pure: bytes to bytes."""

import base64
import re
from collections.abc import Sequence
from typing import Final

import msgspec

from .._depth import check_depth
from ..errors import InvalidArgumentError

RECORD_BYTES: Final = 1 << 20
"""An append of more is stored as several records. One of less is the last of its append."""

_RAWS: Final = msgspec.json.Decoder(list[msgspec.Raw])
_RAW: Final = msgspec.json.Decoder(msgspec.Raw)
_WHITE: Final = b" \t\r\n"
_HALF: Final = re.compile(rb"\\u[dD][89a-fA-F]")
_ESCAPED: Final = re.compile(rb"\\(?:(u[dD][89a-fA-F][0-9a-fA-F]{2})|.)", re.DOTALL)
_LINE_END: Final = re.compile(rb"\r\n|\r|\n")
TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+/[!#$%&'*+.^_`|~0-9A-Za-z-]+[ \t]*(;[\x20-\x7e\t]*)?")


def media_type(content_type: str) -> str:
    """Give a content type without its parameters, in lower case."""
    return content_type.partition(";")[0].strip().lower()


def same_type(one: str, other: str) -> bool:
    """Say whether two content types are the same: case and parameters such as the charset do not matter (RFC 9110, 8.3.1)."""
    return media_type(one) == media_type(other)


def is_json(content_type: str) -> bool:
    """Say whether streams of this type hold messages, and not just bytes (9.1)."""
    return media_type(content_type) == "application/json"


def is_text(content_type: str) -> bool:
    """Say whether server-sent events carry this type as it is (5.8)."""
    return is_json(content_type) or media_type(content_type).startswith("text/")


# JSON mode (9.1)


def messages_in(body: bytes) -> Sequence[bytes] | None:
    """Give the messages of a body, byte for byte: an array's elements, or the one value that it is; None: it is not JSON."""
    try:
        body.decode()  # the parser does not look into strings
        check_depth(_without_halves(body))
        if body.lstrip(_WHITE)[:1] == b"[":
            return _elements(body)
        _RAW.decode(_without_halves(body))
        return [body.strip(_WHITE)]
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, InvalidArgumentError):
        return None


def _elements(array: bytes) -> list[bytes]:
    """Give the elements of a JSON array, byte for byte. Raises MsgspecError."""
    readable = _without_halves(array)
    raws = [bytes(raw).strip(_WHITE) for raw in _RAWS.decode(readable)]
    if readable is array:
        return raws
    elements, at = [], 0
    for raw in raws:  # in between there is only white space, and a comma
        at = readable.index(raw, at)
        elements.append(array[at : at + len(raw)])
        at += len(raw)
    return elements


def _without_halves(text: bytes) -> bytes:
    """Give JSON, as long as it was, without what our parser refuses, and other languages send: escaped halves of surrogate pairs."""
    return _ESCAPED.sub(lambda found: b"\\u0000" if found[1] else found[0], text) if _HALF.search(text) else text


def split_messages(messages: Sequence[bytes]) -> Sequence[bytes]:
    """Give messages as records, each with commas between them, and full when it has RECORD_BYTES."""
    records: list[bytes] = []
    some: list[bytes] = []
    size = 0
    for message in messages:
        some.append(message)
        size += len(message) + 1
        if size > RECORD_BYTES:  # with the commas between them, RECORD_BYTES at least
            records.append(b",".join(some))
            some, size = [], 0
    if some:
        records.append(b",".join(some))
    return _ended(records)


def split_bytes(body: bytes) -> Sequence[bytes]:
    """Give bytes as records."""
    if len(body) < RECORD_BYTES:
        return [body] if body else []
    return _ended([body[start : start + RECORD_BYTES] for start in range(0, len(body), RECORD_BYTES)])


def _ended(records: list[bytes]) -> Sequence[bytes]:
    """Give records of one append, of which the last one, and no other, is short: empty, if it has to be."""
    return [*records, b""] if records and is_continued(records[-1]) else records


def is_continued(record: bytes) -> bool:
    """Say whether what follows a record is of the same append."""
    return len(record) >= RECORD_BYTES


def first_of(record: bytes, count: int, *, json: bool) -> tuple[bytes, int]:
    """Give the first messages, or bytes, of a record, and how many they are: `count`, or all there are."""
    if not json:
        return record[:count], min(count, len(record))
    messages = _elements(b"[" + record + b"]")
    return b",".join(messages[:count]), min(count, len(messages))


def body_of(records: Sequence[bytes], *, json: bool) -> bytes:
    """Give records as the body of an answer."""
    return b"[" + b",".join(filter(None, records)) + b"]" if json else b"".join(records)


# Server-sent events (5.8)


def whole_text(records: Sequence[bytes], content_type: str) -> int:
    """Give how many of the first records do not end within a character of UTF-8; all of them where that does not matter."""
    count = len(records)
    if is_text(content_type) and not is_json(content_type):
        while count and _ends_within_character(b"".join(records[max(0, count - 4) : count])[-4:]):
            count -= 1
    return count


def _ends_within_character(end: bytes) -> bool:
    for back in range(1, min(3, len(end)) + 1):
        byte = end[-back]
        if byte & 0xC0 != 0x80:
            wanted = 4 if byte & 0xF8 == 0xF0 else 3 if byte & 0xF0 == 0xE0 else 2 if byte & 0xE0 == 0xC0 else 1
            return back < wanted
    return False


def data_event(records: Sequence[bytes], content_type: str) -> bytes:
    """Give records as one event. Nothing in them can end a line of ours, and so none can begin another event."""
    if not is_text(content_type):
        return b"event: data\ndata:" + base64.b64encode(b"".join(records)) + b"\n\n"
    text = body_of(records, json=is_json(content_type))
    if b"\n" not in text and b"\r" not in text:
        return b"event: data\ndata:" + _guarded(text) + b"\n\n"
    return b"event: data\n" + b"".join([b"data:" + _guarded(line) + b"\n" for line in _LINE_END.split(text)]) + b"\n"


def _guarded(line: bytes) -> bytes:
    return b" " + line if line[:1] == b" " else line  # a reader takes one space away


def control_event(offset: str, cursor: str | None, *, is_up_to_date: bool, is_closed: bool) -> bytes:
    """Give the event that says where its reader is."""
    fields: dict[str, object] = {"streamNextOffset": offset}
    if cursor is not None:
        fields["streamCursor"] = cursor
    if is_up_to_date:
        fields["upToDate"] = True
    if is_closed:
        fields["streamClosed"] = True
    return b"event: control\ndata:" + msgspec.json.encode(fields) + b"\n\n"
