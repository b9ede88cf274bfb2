"""A disk that forgets: what a directory may hold after the power has failed, given what was written to it and what was synced.

It is a model of the least that a file system promises, and knows nothing of SQLite. What was not synced may be lost, all or any of
it, in any order, sector by sector; a name that was given or taken away is sure only when the directory was synced, even if
the file was; a file's size and what is in it reach the disk independently of one another; where a file has grown and nothing was
written yet, there may be anything.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Final, assert_never

SECTOR: Final = 512
"""What a disk writes whole or not at all."""
PAGE: Final = 4096
"""What the system's cache keeps clean or dirty as one."""

Image = Mapping[str, bytes]
"""The files of a directory, by name."""


@dataclass(frozen=True, slots=True)
class Create:
    """A name is given to a new, empty file."""

    file: int
    name: str


@dataclass(frozen=True, slots=True)
class Write:
    """Bytes are written to the system's cache."""

    file: int
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Truncate:
    """A file is given this size."""

    file: int
    size: int


@dataclass(frozen=True, slots=True)
class Sync:
    """What was written to the file is on the disk when this is over, and the directory's names too, if it was synced as well."""

    file: int
    with_directory: bool


@dataclass(frozen=True, slots=True)
class FailedSync:
    """The disk has refused what was written, and the system takes its pages for clean all the same: no later sync writes them.

    So does Linux: the error is reported once, and what was not written is still read from the cache.
    """

    file: int


@dataclass(frozen=True, slots=True)
class Delete:
    """A name is taken away."""

    name: str
    with_directory: bool


Operation = Create | Write | Truncate | Sync | FailedSync | Delete
Share = Callable[[], float]
"""Asked for each file: how much of what was not synced has reached the disk, from 0 to 1."""


@dataclass(slots=True)
class _File:
    """What the disk holds for sure, what the cache held when all was clean, and what was done to the cache since."""

    durable: bytearray
    clean: bytearray
    pending: list[Write | Truncate] = field(default_factory=list)

    def sync(self) -> None:
        cached = self.cached()
        for page in _blocks(self.pending, PAGE, len(cached)):
            _copy(cached, self.durable, page)
        _resize(self.durable, len(cached))
        self.clean, self.pending = cached, []

    def fail_to_sync(self) -> None:
        self.clean, self.pending = self.cached(), []

    def cached(self) -> bytearray:
        content = bytearray(self.clean)
        for change in self.pending:
            _apply(change, content)
        return content

    def survivor(self, share: float, random: Random) -> bytes:
        """Give what is on the disk if each sector, and the size, is as it was at some moment since the last sync."""
        if not self.pending or share == 0:
            return bytes(self.durable)
        cached, survivor, size = bytearray(self.clean), bytearray(self.durable), len(self.durable)
        unwritten = random.randbytes if share < 1 and random.random() < 0.5 else bytes
        for change in self.pending:
            before = len(cached)
            _apply(change, cached)
            for sector in _blocks([change], SECTOR, max(before, len(cached))):
                if random.random() < share:
                    _pad(survivor, sector.stop, unwritten)
                    _copy(cached, survivor, sector)
            if len(cached) != before and random.random() < share:
                size = len(cached)
        _pad(survivor, size, unwritten)
        return bytes(survivor[:size])


class Disk:
    """Files and names, with what is not synced yet. `survived` is what was there when the power came back."""

    def __init__(self, survived: Image | None = None) -> None:
        survived = survived or {}
        self._files = {number: _File(bytearray(data), bytearray(data)) for number, data in enumerate(survived.values())}
        self._names = {name: number for number, name in enumerate(survived)}
        self._pending: list[tuple[str, int | None]] = []

    def new_number(self) -> int:
        """Give a number that no file has."""
        return len(self._files)

    def file(self, name: str) -> int | None:
        """Give the number of the file that has this name now."""
        return self._all_names().get(name)

    def do(self, operation: Operation) -> None:
        """Let it happen."""
        match operation:
            case Create(number, name):
                self._files[number] = _File(bytearray(), bytearray())
                self._pending.append((name, number))
            case Write() | Truncate():
                self._files[operation.file].pending.append(operation)
            case Sync():
                self._files[operation.file].sync()
                self._sync_names(operation.with_directory)
            case FailedSync():
                self._files[operation.file].fail_to_sync()
            case Delete():
                self._pending.append((operation.name, None))
                self._sync_names(operation.with_directory)
            case _:
                assert_never(operation)

    def without_power(self) -> Image:
        """Give what is there if nothing has survived but what was synced."""
        return self._image(lambda: 0.0, Random(0))

    def with_power(self) -> Image:
        """Give what the system shows, power or no power: all of it."""
        return {name: bytes(self._files[number].cached()) for name, number in self._all_names().items() if number is not None}

    def by_chance(self, random: Random) -> Image:
        """Give what is there if of each file, and of the names, some has survived: sometimes nothing, sometimes all."""
        return self._image(lambda: random.choice([0.0, 0.1, 0.5, 0.9, 1.0]), random)

    def torn(self, write: Write, random: Random) -> Image:
        """Give what is there if all has survived, and of this write, which is under way, the first sectors."""
        end = write.offset + len(write.data)
        cut = random.choice([*range(_next_sector(write.offset), end, SECTOR), write.offset])
        pending = self._files[write.file].pending
        pending.append(Write(write.file, write.offset, write.data[: cut - write.offset]))
        try:
            return self.with_power()
        finally:
            pending.pop()

    def _sync_names(self, with_directory: bool) -> None:
        if with_directory:
            self._names = {name: number for name, number in self._all_names().items() if number is not None}
            self._pending = []

    def _all_names(self) -> dict[str, int | None]:
        return dict([*self._names.items(), *self._pending])

    def _image(self, share: Share, random: Random) -> Image:
        kept = share()
        names = dict([*self._names.items(), *(entry for entry in self._pending if random.random() < kept)])
        return {name: self._files[number].survivor(share(), random) for name, number in names.items() if number is not None}


def _apply(change: Write | Truncate, content: bytearray) -> None:
    match change:
        case Write(_, offset, data):
            _pad(content, offset, bytes)
            content[offset : offset + len(data)] = data
        case Truncate(_, size):
            _resize(content, size)
        case _:
            assert_never(change)


def _blocks(changes: list[Write | Truncate], size: int, end: int) -> Iterator[slice]:
    """Give the blocks that these changes touch, up to `end`."""
    touched: set[int] = set()
    for change in changes:
        match change:
            case Write(_, offset, data):
                touched.update(range(offset // size, -(-(offset + len(data)) // size)))
            case Truncate(_, start):
                touched.update(range(start // size, -(-end // size)))
            case _:
                assert_never(change)
    return (slice(block * size, (block + 1) * size) for block in sorted(touched))


def _copy(source: bytearray, target: bytearray, block: slice) -> None:
    _pad(target, block.start, bytes)
    target[block] = source[block].ljust(len(target[block]), b"\0")


def _resize(content: bytearray, size: int) -> None:
    del content[size:]
    _pad(content, size, bytes)


def _pad(content: bytearray, size: int, filler: Callable[[int], bytes]) -> None:
    if len(content) < size:
        content += filler(size - len(content))


def _next_sector(offset: int) -> int:
    return (offset // SECTOR + 1) * SECTOR
