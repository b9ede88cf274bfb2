"""The journals of all processes as they grow, cut into streams; each stream is judged when it has ended, and forgotten when it is gone.

So a campaign may last for days: what it holds, in memory and on disk, is what happened in the last minutes. It decides when there
is enough to judge by; what is right is decided in `checker`.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.torture.checker import CHUNK, Case, Database, Stored
from tests.torture.journal import Began, Entry, Event, JournalReader, Left, Meant, Refused, Saw, Stumbled, Told

FORGET_SECONDS: Final = 30
"""How long a stream that is gone is remembered, for processes that were stopped and have not said yet what they know."""


@dataclass(slots=True)
class Story:
    """What is known of a stream so far."""

    entries: list[Entry] = field(default_factory=list)
    log: Sequence[Event] | None = None
    is_judged: bool = False
    was_there: bool = False
    is_wrong: bool = False

    @property
    def last_at(self) -> float:
        """When somebody had something to say of it last."""
        return max((entry.at for entry in self.entries[-50:]), default=0.0)


class Ledger:
    """All journals in a directory, and what follows from them."""

    def __init__(self, database: Database) -> None:
        self.counts: Counter[str] = Counter()
        self.complaints: list[str] = []
        self._database = database
        self._stories: defaultdict[str, Story] = defaultdict(Story)
        self._journals: dict[str, tuple[Path, JournalReader]] = {}
        self._closed: dict[Path, set[str]] = {}
        self._streams_in: defaultdict[Path, set[str]] = defaultdict(set)
        self._unfinished: defaultdict[str, dict[str, tuple[str, int]]] = defaultdict(dict)

    @property
    def progress(self) -> int:
        """A number that grows whenever anybody gets anywhere."""
        return sum(number for kind, number in self.counts.items() if not kind.startswith("stumbled"))

    def open(self, role: str, journal: Path) -> None:
        """Read the journal of a process that is about to start."""
        journal.touch()
        self._journals[role] = journal, JournalReader(journal)

    def close(self, role: str) -> None:
        """Read the rest of the journal of a process that has died."""
        path, reader = self._journals.pop(role)
        with reader:
            self._take(path, reader.read())
        self._closed[path] = self._streams_in.pop(path, set())

    def has_entries(self, role: str) -> bool:
        """Whether the process that plays this role now has said anything."""
        return role in self._journals and bool(self._streams_in[self._journals[role][0]])

    def unfinished(self, role: str) -> Mapping[str, tuple[str, int]]:
        """Give the readings that a reader has begun and not left, with stream and last offset."""
        return dict(self._unfinished[role])

    def read(self) -> None:
        """Take in what the journals say by now."""
        for path, reader in tuple(self._journals.values()):
            self._take(path, reader.read())

    def judge(self, *, is_over: bool = False) -> None:
        """Judge all streams that have ended or gone, and forget what is not needed any more."""
        read_at = time.time()
        there = self._database.streams()
        self._note_logs(there.values(), anew=is_over)
        # Whatever is in those logs was in the journals before; what comes into the journals now must be in those logs.
        self.read()
        for stream, story in tuple(self._stories.items()):
            if is_over or story.last_at < read_at:  # or else it could have been created only after the database was read
                self._judge(stream, story, is_there=stream in there, is_over=is_over)
        self._forget(before=read_at - FORGET_SECONDS)

    def evidence(self) -> Iterable[tuple[str, str]]:
        """Give all that is known of each stream that something is wrong with."""
        for stream, story in self._stories.items():
            if story.is_wrong:
                log = "\n".join(f"{offset}: {event}" for offset, event in enumerate(story.log or ()))
                yield stream, f"The log:\n{log}\n\nThe journals:\n" + "\n".join(map(repr, story.entries))

    def hold(self, complaints: Iterable[str]) -> None:
        """Note what is wrong, once."""
        self.complaints += [complaint for complaint in complaints if complaint not in self.complaints]

    def _take(self, path: Path, entries: Sequence[Entry]) -> None:
        for entry in entries:
            story = self._stories[entry.stream]
            story.entries.append(entry)
            story.is_judged = False
            self._streams_in[path].add(entry.stream)
            self.counts[_kind(entry)] += 1
            self._note_reading(entry)

    def _note_reading(self, entry: Entry) -> None:
        match entry:
            case Began(reading=reading, after=after) | Saw(reading=reading, offset=after):
                self._unfinished[_role(reading)][reading] = entry.stream, after
            case Left(reading=reading):
                del self._unfinished[_role(reading)][reading]
            case _:
                pass

    def _note_logs(self, there: Iterable[Stored], *, anew: bool) -> None:
        ended = [stored for stored in there if not stored.is_open and (anew or self._stories[stored.id].log is None)]
        for stream, log in self._database.logs(ended):
            story = self._stories[stream]
            if story.log is None:
                story.log = log
                story.is_judged = False
                self._count(log)
            elif story.log != log:
                self.hold([f"{stream}: its log has changed after its end"])

    def _count(self, log: Sequence[Event]) -> None:
        self.counts["streams"] += 1
        self.counts["chunks"] += len(log) - 1
        self.counts["takeovers"] += max(0, len({event.handle for event in log if event.type == CHUNK}) - 1)
        self.counts[f"ended {log[-1].type if log[-1].type == 'done' else log[-1].handle}"] += 1

    def _judge(self, stream: str, story: Story, *, is_there: bool, is_over: bool) -> None:
        if is_there and story.log is None and not is_over:
            return
        if not story.is_judged or story.was_there != is_there or is_over:
            complaints = Case(stream, story.entries, story.log, is_there=is_there, is_over=is_over).complaints()
            story.is_judged, story.was_there, story.is_wrong = True, is_there, story.is_wrong or bool(complaints)
            self.hold(complaints)

    def _forget(self, before: float) -> None:
        busy = {stream for readings in self._unfinished.values() for stream, _ in readings.values()}
        for stream, story in tuple(self._stories.items()):
            if story.is_judged and not story.was_there and not story.is_wrong and stream not in busy and story.last_at < before:
                del self._stories[stream]
        for path, streams in tuple(self._closed.items()):
            if not any(stream in self._stories for stream in streams):
                del self._closed[path]
                path.unlink()


def _role(reading: str) -> str:
    return reading.partition(".")[0]


def _kind(entry: Entry) -> str:
    match entry:
        case Meant(act=act):
            return f"meant {act}"
        case Told(act=act):
            return f"told {act}"
        case Refused(act=act, why=why):
            return f"refused {act}: {why}"
        case Began():
            return "began"
        case Saw():
            return "seen"
        case Stumbled(why=why):
            return f"stumbled: {why}"
        case Left(why=why):
            return f"left: {why}"
