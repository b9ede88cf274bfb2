"""What has expired is found by markers: small messages, beside the commits, whose subjects say when a stream may be forgotten.

JetStream has no index but its subjects, which it keeps as a tree. So the second in which a stream expires is written with eight
hexadecimal digits, and each digit is a token of the marker's subject. *All seconds before this one* is then about a hundred prefixes,
which one request asks for, and whose answer costs what it finds.

A marker is stored before the commit that moves the expiry, and removed after the next one that moves it. A process that dies in between
leaves a marker too many, and never one too few; whoever finds it, when its second has come, removes it. A marker is valid if the stream's
head expires in its second.
"""

from collections.abc import AsyncGenerator, Mapping, Sequence
from datetime import datetime
from typing import Final

import msgspec

from streamkeep.errors import StorageError
from streamkeep.storages.nats._link import Connection

_DIGITS: Final = 8
_END: Final = 16**_DIGITS
_FOUND_AT_ONCE: Final = 1_000  # JetStream gives the last messages of 1,024 subjects, and refuses when there are more
_BYTES_AT_ONCE: Final = 4 << 20

CONTENT: Final = bytes(100)
"""What a marker holds: nothing. It is at least as large as a deletion, which takes its place where JetStream is full."""


class Marker(msgspec.Struct, frozen=True):
    """It says that a stream expires in a second."""

    token: str
    second: int
    sequence: int
    stored_at: float


def second_of(expires_at: float) -> int:
    """Give the second in which a stream expires. What no marker can say is the first one, or the last."""
    return int(min(max(0.0, expires_at), _END - 1.0))


def subject_of(name: str, second: int, token: str) -> str:
    """Give the subject of a marker."""
    return f"{name}.due.{'.'.join(f'{second:0{_DIGITS}x}')}.{token}"


class Markers:
    """Reads the markers in one JetStream stream."""

    def __init__(self, name: str) -> None:
        self._name = name

    async def until(self, connection: Connection, second: int) -> AsyncGenerator[Sequence[Marker]]:
        """Give the markers up to a second, earlier ones first, a few at a time."""
        waiting = [prefixes_until(second)]
        while waiting:
            prefixes = waiting.pop()
            found = await self._last(connection, [self._filter(prefix) for prefix in prefixes])
            if found is not None:
                if found:
                    yield found
            elif len(prefixes) > 1:
                middle = len(prefixes) // 2
                waiting += [prefixes[middle:], prefixes[:middle]]
            elif len(prefixes[0]) < _DIGITS:
                waiting.append([f"{prefixes[0]}{digit:x}" for digit in range(16)])
            else:
                subjects = [subject async for subject in connection.subjects(self._name, self._filter(prefixes[0]))]
                for begin in range(0, len(subjects), _FOUND_AT_ONCE):
                    yield await self._last(connection, subjects[begin : begin + _FOUND_AT_ONCE]) or []

    def _filter(self, prefix: str) -> str:
        return f"{self._name}.due.{'.'.join(prefix)}.>"

    async def _last(self, connection: Connection, filters: Sequence[str]) -> Sequence[Marker] | None:
        """Give all markers whose subjects match; None: they are too many for one answer."""
        found: list[Marker] = []
        begin = 1
        while True:
            body = {"multi_last": filters, "seq": begin, "batch": _FOUND_AT_ONCE + 24, "max_bytes": _BYTES_AT_ONCE}
            batch = await connection.request_batch(f"$JS.API.DIRECT.GET.{self._name}", msgspec.json.encode(body))
            if batch.is_refused:
                return None
            found += [_decode(message.headers) for message in batch.messages]
            if not batch.pending or not found:
                return found
            begin = found[-1].sequence + 1


def prefixes_until(second: int) -> Sequence[str]:
    """Give what the digits of all seconds up to this one begin with, in the order of time."""
    digits = f"{second + 1:0{_DIGITS}x}"
    if len(digits) > _DIGITS:
        return [f"{digit:x}" for digit in range(16)]
    return [f"{digits[:place]}{digit:x}" for place in range(_DIGITS) for digit in range(int(digits[place], 16))]


def _decode(headers: Mapping[str, str]) -> Marker:
    try:
        *_, token = tokens = headers["Nats-Subject"].split(".")
        second = int("".join(tokens[-_DIGITS - 1 : -1]), 16)
        stored_at = datetime.fromisoformat(f"{headers['Nats-Time-Stamp'][:19]}+00:00").timestamp()
        return Marker(token, second, int(headers["Nats-Sequence"]), stored_at)
    except (KeyError, ValueError) as error:
        raise StorageError("JetStream's answer cannot be understood") from error
