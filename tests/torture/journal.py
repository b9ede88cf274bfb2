"""Journals: what each process says of what it does, so that whatever happens to it the checker knows what was promised to whom.

An entry is in the kernel's hands before its writer goes on, so it survives `kill -9` of the writer. What somebody is about to do
is written before the call, and what was answered after it; a process that dies in between leaves the first without the second.
An entry that was cut short by death is no entry. Nothing here judges.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal, Self
from zlib import crc32

import msgspec

from streamkeep import StreamEventType

Act = Literal["open", "resume", "write", "done", "error", "close", "cancel", "delete"]

ENDED: Final = "ended"
"""Why a reader stops: it has seen the terminal event."""
NOT_FOUND: Final = "StreamNotFoundError"


class Event(msgspec.Struct, frozen=True, array_like=True):
    """What is remembered of an event. A chunk and an output name their handle and its count; an error its status."""

    type: str
    handle: str
    number: int = 0
    crc: int = 0

    @property
    def is_terminal(self) -> bool:
        """Whether a stream ends with it."""
        return self.type != StreamEventType.CHUNK


def event_of(type_: StreamEventType, data: bytes) -> Event:
    """Read an event's JSON: `[handle, number, padding]`, or what an error looks like."""
    if type_ is StreamEventType.ERROR:
        return Event(type_, _error_decoder.decode(data).status)
    handle, number, _padding = _chunk_decoder.decode(data)
    return Event(type_, handle, number, crc32(data))


class _Failure(msgspec.Struct):
    status: str


_error_decoder: Final = msgspec.json.Decoder(_Failure)
_chunk_decoder: Final = msgspec.json.Decoder(tuple[str, int, str])


class Meant(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Somebody is about to do this."""

    at: float
    stream: str
    handle: str
    act: Act
    number: int = 0
    crc: int = 0


class Told(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """It was done: a chunk was stored at `offset`; a stream is open, its tail is `offset`; `cancel` has (1) or has not (0) ended it."""

    at: float
    stream: str
    handle: str
    act: Act
    number: int = 0
    offset: int = 0


class Refused(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """It was not done, or perhaps it was: `why` is the exception's name."""

    at: float
    stream: str
    handle: str
    act: Act
    why: str


class Began(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A reader begins, or goes on after it was killed, behind the offset `after` (-1: at the beginning)."""

    at: float
    stream: str
    reading: str
    after: int


class Saw(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A reader was given this event."""

    at: float
    stream: str
    reading: str
    offset: int
    event: Event


class Stumbled(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A reader lost its connection, and will try again."""

    at: float
    stream: str
    reading: str
    why: str


class Left(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A reader has come to its end: `ENDED`, or the name of an exception."""

    at: float
    stream: str
    reading: str
    why: str


Entry = Meant | Told | Refused | Began | Saw | Stumbled | Left

_decoder: Final = msgspec.json.Decoder(Entry)
_encoder: Final = msgspec.json.Encoder()


class Journal:
    """The journal of one process, at `path`, which it alone writes to."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC)

    def meant(self, stream: str, handle: str, act: Act, number: int = 0, crc: int = 0) -> None:
        """Write `Meant`."""
        self._write(Meant(time.time(), stream, handle, act, number, crc))

    def told(self, stream: str, handle: str, act: Act, number: int = 0, offset: int = 0) -> None:
        """Write `Told`."""
        self._write(Told(time.time(), stream, handle, act, number, offset))

    def refused(self, stream: str, handle: str, act: Act, why: Exception) -> None:
        """Write `Refused`."""
        self._write(Refused(time.time(), stream, handle, act, type(why).__name__))

    def began(self, stream: str, reading: str, after: int) -> None:
        """Write `Began`."""
        self._write(Began(time.time(), stream, reading, after))

    def saw(self, stream: str, reading: str, offset: int, event: Event) -> None:
        """Write `Saw`."""
        self._write(Saw(time.time(), stream, reading, offset, event))

    def stumbled(self, stream: str, reading: str, why: str) -> None:
        """Write `Stumbled`."""
        self._write(Stumbled(time.time(), stream, reading, why))

    def left(self, stream: str, reading: str, why: str) -> None:
        """Write `Left`."""
        self._write(Left(time.time(), stream, reading, why))

    def _write(self, entry: Entry) -> None:
        os.write(self._file, _encoder.encode(entry) + b"\n")


class JournalReader:
    """Reads a journal that grows; a context manager."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._rest = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._file.close()

    def read(self) -> Sequence[Entry]:
        """Give the entries that have come since the last call."""
        *lines, self._rest = (self._rest + self._file.read()).split(b"\n")
        return [_decoder.decode(line) for line in lines]
