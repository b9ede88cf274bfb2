"""The `-notify` file of a SQLite database: which streams have changed lately, for other processes to see.

A hint where to look, never data: what it says may be lost with a process that dies, or be too much. It holds two counts of all
changes ever, and a ring of the checksums of the last ones. The first count goes ahead of the ring and the second follows it, so
a reader that takes them the other way round knows whether the ring was overwritten under its eyes.
"""

import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from zlib import crc32

from streamkeep.storages._ids import id_bytes

_RING: Final = 4096
_BEGUN_AT: Final = 0
_PUBLISHED_AT: Final = 8
_RING_AT: Final = 16
_ENTRY: Final = 4
_MOST: Final = 1 << 62


def checksum(stream: str) -> int:
    """Give what stands for a stream in the file. Two streams may share it; then one is rung for the other."""
    return crc32(id_bytes(stream))


@dataclass(frozen=True, slots=True)
class Changes:
    """The checksums of the changes after count `since`, up to `count`; None: too many to say."""

    since: int
    count: int
    checksums: Sequence[int] | None


class Notify:
    """The file, by a descriptor that one thread uses."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def count(self) -> int:
        """Say how many changes were ever published."""
        return self._count_at(_PUBLISHED_AT)

    def repair(self) -> None:
        """Begin anew if the counts cannot be right. Nobody syncs the file, so after a power failure anything may be in it.

        Only one may do so at a time, as with `publish`, and before anybody relies on the counts.
        """
        if not self._count_at(_PUBLISHED_AT) <= self._count_at(_BEGUN_AT) < _MOST:
            self._write(_BEGUN_AT, bytes(_RING_AT))

    def publish(self, checksums: Sequence[int]) -> Changes:
        """Add these changes, and give them back with their place. Only one may do so at a time, among all processes."""
        since = self._count_at(_BEGUN_AT)
        count = since + len(checksums)
        self._write(_BEGUN_AT, count.to_bytes(8, "little"))
        if len(checksums) <= _RING:
            first = since % _RING
            self._write(_RING_AT + first * _ENTRY, array("I", checksums[: _RING - first]).tobytes())
            self._write(_RING_AT, array("I", checksums[_RING - first :]).tobytes())
        self._write(_PUBLISHED_AT, count.to_bytes(8, "little"))
        return Changes(since, count, checksums)

    def since(self, since: int) -> Changes:
        """Give the changes after count `since`."""
        count = self.count()
        if count - since > _RING:
            return Changes(since, count, None)
        checksums = self._entries(since % _RING, count - since)
        is_overwritten = self._count_at(_BEGUN_AT) - since > _RING
        return Changes(since, count, None if is_overwritten else checksums)

    def _entries(self, first: int, number: int) -> Sequence[int]:
        until_wrap = min(number, _RING - first)
        data = self._read(_RING_AT + first * _ENTRY, until_wrap * _ENTRY)
        if number > until_wrap:
            data = data.ljust(until_wrap * _ENTRY, b"\0") + self._read(_RING_AT, (number - until_wrap) * _ENTRY)
        return array("I", data.ljust(number * _ENTRY, b"\0"))

    def _count_at(self, position: int) -> int:
        return int.from_bytes(self._read(position, 8), "little")

    # Not pread and pwrite, which Windows has not.

    def _read(self, position: int, size: int) -> bytes:
        os.lseek(self._descriptor, position, os.SEEK_SET)
        return os.read(self._descriptor, size)

    def _write(self, position: int, data: bytes) -> None:
        if data:
            os.lseek(self._descriptor, position, os.SEEK_SET)
            os.write(self._descriptor, data)
