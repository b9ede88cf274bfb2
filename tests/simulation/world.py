"""The world of a simulated history: one storage, many ways to it that fail, and what the storage was really told.

Time is trio's, on a clock that jumps to the next moment at which anything is to happen. The world performs one operation at a
time, whole, in the moment in which it arrives, and writes it down; that record is what the checks believe. It knows nothing of sessions
or of what may follow what.

The storage has one clock, which may jump; and it may go back to what it was at an earlier moment, as after a failover to a standby that was
behind. A process may be blocked (its event loop stands still, and its session's thread goes on) or stopped (nothing of it goes on).
"""

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from random import Random
from threading import Thread
from typing import Any, Final, Self, TypeVar

import trio

from streamkeep._lifecycle import SESSION_PREFIX, session_of
from streamkeep.errors import StorageError
from streamkeep.events import is_terminal
from streamkeep.storage import Doorbell, Head, Page, Storage
from streamkeep.storages.memory import MemoryStorage

T = TypeVar("T")

LONGEST_STALL: Final = 40.0

ANSWER_SECONDS: Final = 60.0
"""How long, in real time, the storage may take for an answer."""
MAX_OPERATIONS: Final = 40_000
"""After so many operations a history goes round in circles."""
EPOCH: Final = 4_000_000_000.0
"""What the storage's clock shows when a history begins; in the future, because an engine may forget what by its own clock is over."""
RECONNECT_SECONDS: Final = 10.0
BATCH: Final = 1_000
"""How many records are restored at once."""


@dataclass(slots=True)
class Past:
    """A stream from its creation to its deletion, as the storage was told it.

    Attributes:
        id: the stream's id.
        head: the newest head.
        records: the log.
        stored_at: for each record, when it was committed, in virtual seconds.
        created_at: when it was created.
        deleted_at: when it was deleted, or None.
        lost_at: when the storage went back to before its last change, or None.
        origin: what it was before the storage went back.
    """

    id: str
    head: Head
    created_at: float
    records: list[bytes] = field(default_factory=list)
    stored_at: list[float] = field(default_factory=list)
    deleted_at: float | None = None
    lost_at: float | None = None
    origin: "Past | None" = None

    @property
    def is_reserved(self) -> bool:
        """Whether it is no stream, but the head of a session or a name."""
        return is_reserved(self.id)

    @property
    def root(self) -> "Past":
        """Give what it was before the storage went back for the first time."""
        return self if self.origin is None else self.origin.root

    @property
    def ends_at(self) -> int | None:
        """The offset of its terminal event; None if it has not come to its end."""
        return len(self.records) - 1 if self.records and is_terminal(self.records[-1]) else None


@dataclass(frozen=True, slots=True)
class Weather:
    """How a process's way to the storage behaves. Chances are per call or ring, times in virtual seconds.

    Attributes:
        latency: the longest that a request, an answer or a ring is under way.
        lost_requests: the chance that a request never arrives, and its caller is told so.
        lost_answers: the chance that an answer gets lost, and its caller is told so.
        stalls: the chance that a request or its answer is under way for up to `stall_seconds`.
        stall_seconds: how long that is.
        late_rings: the chance that it comes up to `stall_seconds` late.
        false_rings: the chance that it comes once more.
        short_pages: the chance that a page has fewer records than were asked for.
    """

    latency: float = 0.05
    lost_requests: float = 0.0
    lost_answers: float = 0.0
    stalls: float = 0.0
    stall_seconds: float = 0.0
    late_rings: float = 0.0
    false_rings: float = 0.0
    short_pages: float = 0.0

    @property
    def is_tame(self) -> bool:
        """Whether all that is asked is answered, and in seconds."""
        return not (self.lost_requests or self.lost_answers or self.stalls)

    @classmethod
    def random(cls, random: Random, calm: float) -> "Weather":
        """Give some weather; `calm` is the chance that it is calm."""
        if random.random() < calm:
            return CALM

        def chance(most: float) -> float:
            return random.choice([0.0, random.random() * most])

        return cls(
            latency=random.choice([0.0, 0.001, 0.05, 1.0]),
            lost_requests=chance(0.3),
            lost_answers=chance(0.3),
            stalls=chance(0.1),
            stall_seconds=random.choice([2.0, 12.0, LONGEST_STALL]),
            late_rings=chance(1.0),
            false_rings=chance(1.0),
            short_pages=chance(0.5),
        )


CALM: Final = Weather()


class World:
    """One storage, what it was told, and the network between it and the processes.

    Attributes:
        streams: what lives, by id.
        pasts: all that ever lived.
        surprises: what the storage did that its contract forbids.
        trace: what happened, a line each.
        commit_seconds: how long a commit takes, for everybody, at least and at most.
        latest: the latest time that the storage's clock has shown.
        put_back: by how many seconds it was put back, all in all.
        times_gone_back: how often the storage went back.
        committed: called after each commit with who made it, the stream as it was and as it is, and the new records.
        deleted: called after each deletion with who made it and what the stream was.
    """

    def __init__(self, ask: Callable[[Coroutine[Any, Any, Any]], Any], storage: Storage, random: Random) -> None:
        self.streams: dict[str, Past] = {}
        self.pasts: list[Past] = []
        self.surprises: list[str] = []
        self.trace: list[str] = []
        self.random: Final = random
        self.commit_seconds = (0.0, 0.0)
        self.latest = EPOCH
        self.put_back = 0.0
        self.times_gone_back = 0
        self.committed: Callable[[SimulatedStorage, str, Head | None, Head, Sequence[bytes]], None] = _nothing
        self.deleted: Callable[[SimulatedStorage, Past], None] = _nothing
        self._jumped = 0.0
        self._ask = ask
        self._storage = storage
        self._network: trio.Nursery | None = None
        self._bells: defaultdict[str, list[_Bell]] = defaultdict(list)
        self._operations = 0

    @asynccontextmanager
    async def network(self) -> AsyncGenerator[None]:
        """Carry requests, answers and rings while the block runs."""
        async with trio.open_nursery() as self._network:
            yield
            self._network.cancel_scope.cancel()

    def send(self, carry: Callable[[], Awaitable[None]]) -> None:
        """Have something carried, whatever becomes of whoever sent it."""
        assert self._network is not None
        self._network.start_soon(carry)

    def note(self, line: str) -> None:
        """Write down what happened, and when."""
        self._operations += 1
        if self._operations > MAX_OPERATIONS:
            raise RuntimeError(f"the history goes round in circles: {MAX_OPERATIONS} operations")
        self.trace.append(f"{trio.current_time():12.6f} {line}")

    # What becomes of the storage.

    def time(self) -> float:
        """Give what the storage's clock shows."""
        now = EPOCH + trio.current_time() + self._jumped
        self.latest = max(self.latest, now)
        return now

    def jump(self, seconds: float) -> None:
        """Let the storage's clock show so much more from now on, or less."""
        self.note(f"the storage's clock jumps by {seconds} s")
        self._jumped += seconds
        self.put_back += max(0.0, -seconds)
        self.time()

    def moment(self) -> Mapping[str, tuple[Past, Head, int]]:
        """Give what the storage holds now, for `go_back`."""
        return {stream: (past, past.head, len(past.records)) for stream, past in self.streams.items()}

    def go_back(self, moment: Mapping[str, tuple[Past, Head, int]]) -> None:
        """Let the storage hold what it held then. Every bell rings when its connection is found to be lost."""
        self.note(f"the storage goes back to {len(moment)} heads")
        self.times_gone_back += 1
        for stream, past in list(self.streams.items()):
            if stream not in moment or moment[stream][1] != past.head:
                self._ask(self._storage.delete(stream, past.head.version))
                past.lost_at = trio.current_time()
                del self.streams[stream]
        for stream, (past, head, tail) in moment.items():
            if stream not in self.streams:
                self._restore(past, head, tail)
        for bells in list(self._bells.values()):
            for bell in bells:
                bell.ring_after(RECONNECT_SECONDS * self.random.random())

    def _restore(self, origin: Past, head: Head, tail: int) -> None:
        past = Past(origin.id, head, trio.current_time(), origin.records[:tail], origin.stored_at[:tail], origin=origin)
        seen: int | None = None
        for end in (*range(BATCH, tail, BATCH), tail):
            start = (end - 1) // BATCH * BATCH if end else 0
            now = head if end == tail else Head(head.version - tail + end, end, head.state, head.expires_at)
            done = self._ask(self._storage.commit(past.id, seen, now, past.records[start:end]))
            self._expect(done is True, f"{past.id} cannot be restored")
            seen = now.version
        self.streams[past.id] = past
        self.pasts.append(past)

    # What the storage is asked, each in one moment.

    def read(self, stream: str, start: int, limit: int) -> Page | None:
        """Read, and compare with what was committed."""
        page: Page | None = self._ask(self._storage.read(stream, start, limit))
        past = self.streams.get(stream)
        if page is None or past is None:
            self._expect(page is None and past is None, f"a read of {stream} does not know whether it exists")
            return page
        records = past.records[start : start + len(page.records)]
        self._expect(page.head == past.head, f"a read of {stream} gives another head")
        self._expect(list(page.records) == records, f"a read of {stream} from {start} on gives other records")
        self._expect(bool(page.records) or not (limit and past.records[start:]), f"a read of {stream} gives no records")
        return page

    def commit(self, way: "SimulatedStorage", stream: str, seen: int | None, head: Head, records: Sequence[bytes]) -> bool:
        """Commit, write it down, and ring."""
        past = self.streams.get(stream)
        before = past.head if past else None
        done: bool = self._ask(self._storage.commit(stream, seen, head, records))
        self._expect(done == ((past.head.version if past else None) == seen), f"a commit to {stream} ended in {done}")
        if done:
            past = past or self._begin(stream, head)
            past.head = head
            past.records.extend(records)
            past.stored_at.extend([trio.current_time()] * len(records))
            self._expect(head.tail == len(past.records), f"the log of {stream} has not as many records as its head says")
            self._ring(stream)
            self.committed(way, stream, before, head, records)
        return done

    def delete(self, way: "SimulatedStorage", stream: str, seen: int) -> bool:
        """Delete, write it down, and ring."""
        past = self.streams.get(stream)
        done: bool = self._ask(self._storage.delete(stream, seen))
        self._expect(done == (past is not None and past.head.version == seen), f"a deletion of {stream} ended in {done}")
        if done and past is not None:
            past.deleted_at = trio.current_time()
            del self.streams[stream]
            self._ring(stream)
            self.deleted(way, past)
        return done

    def scan(self, after: str, limit: int) -> Sequence[tuple[str, Head]]:
        """Scan, and compare."""
        found: Sequence[tuple[str, Head]] = self._ask(self._storage.scan(after, limit))
        there = sorted(stream for stream in self.streams if stream > after)[:limit]
        self._expect(
            list(found) == [(stream, self.streams[stream].head) for stream in there], f"a scan after {after!r} gives {found}"
        )
        return found

    def expired(self, before: float, limit: int) -> Sequence[tuple[str, Head]]:
        """Ask what has expired, and compare. In which order it comes is the storage's affair, and not the history's."""
        found: Sequence[tuple[str, Head]] = self._ask(self._storage.expired(before, limit))
        due = {stream: past.head for stream, past in self.streams.items() if past.head.expires_at <= before}
        self._expect(all(due.get(stream) == head for stream, head in found), f"what has expired by {before} is {found}")
        self._expect(
            len(found) == min(limit, len(due)) == len(dict(found)), f"of {len(due)} expired streams {len(found)} are given"
        )
        return sorted(found)

    def watch(self, stream: str, bell: "_Bell") -> None:
        """Ring this bell too."""
        self._bells[stream].append(bell)

    def forget(self, stream: str, bell: "_Bell") -> None:
        """Ring it no more."""
        self._bells[stream].remove(bell)

    def _begin(self, stream: str, head: Head) -> Past:
        past = self.streams[stream] = Past(stream, head, trio.current_time())
        self.pasts.append(past)
        return past

    def _ring(self, stream: str) -> None:
        for bell in tuple(self._bells[stream]):
            bell.ring_later()

    def _expect(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self.surprises.append(otherwise)


class SimulatedStorage:
    """One process's way to the world's storage; a Storage like any other to those who use it.

    Requests travel apart from their callers: one whose caller was cancelled, or has died, may still arrive, and later.

    Attributes:
        weather: how it behaves; may be changed at any time.
        is_cut: whether the process is dead, so that nothing is sent, and nothing answered.
        session: the id under which the process has the head of its session, once it has one.
    """

    def __init__(self, world: World, name: str, weather: Weather) -> None:
        self.weather = weather
        self.is_cut = False
        self.session = ""
        self._is_blocked = False
        self._is_stopped = False
        self._runs_again = trio.Event()
        self._world = world
        self._name = name

    def block(self) -> None:
        """Let the process do nothing from now on but what its session does."""
        self._is_blocked = True

    def stop(self) -> None:
        """Let the process do nothing from now on."""
        self._is_stopped = True

    def go_on(self) -> None:
        """Let it go on."""
        self._is_blocked = self._is_stopped = False
        runs_again, self._runs_again = self._runs_again, trio.Event()
        runs_again.set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        pass

    async def read(self, stream: str, start: int = 0, limit: int = 0) -> Page | None:
        """See `Storage.read`."""
        if limit and self._world.random.random() < self.weather.short_pages:
            limit = self._world.random.randint(1, min(limit, 4))
        return await self._call(f"read {stream} {start} {limit}", lambda: self._world.read(stream, start, limit), stream)

    async def commit(self, stream: str, seen: int | None, head: Head, records: Sequence[bytes] = ()) -> bool:
        """See `Storage.commit`."""
        kept = tuple(records)
        if _is_renewal(stream, head):
            self.session = stream
        what = f"commit {stream} {seen} -> {head.version} +{len(kept)}"
        seconds = self._world.random.uniform(*self._world.commit_seconds)
        return await self._call(what, lambda: self._world.commit(self, stream, seen, head, kept), stream, seconds)

    async def delete(self, stream: str, seen: int) -> bool:
        """See `Storage.delete`."""
        return await self._call(f"delete {stream} {seen}", lambda: self._world.delete(self, stream, seen), stream)

    async def scan(self, after: str = "", limit: int = 100) -> Sequence[tuple[str, Head]]:
        """See `Storage.scan`."""
        return await self._call(f"scan {after!r}", lambda: self._world.scan(after, limit))

    async def expired(self, before: float, limit: int = 100) -> Sequence[tuple[str, Head]]:
        """See `Storage.expired`."""
        return await self._call(f"expired {before:.6f}", lambda: self._world.expired(before, limit))

    def time(self) -> float:
        """See `Storage.time`."""
        return self._world.time()

    def clone(self) -> None:
        """See `Storage.clone`: all processes are in one event loop, and what a blocked one does is decided here."""

    def watch(self, stream: str) -> AbstractAsyncContextManager[Doorbell]:
        """See `Storage.watch`."""
        return self._watch(stream)

    @asynccontextmanager
    async def _watch(self, stream: str) -> AsyncGenerator[Doorbell]:
        bell = _Bell(self._world, self)
        await self._call(f"watch {stream}", lambda: self._world.watch(stream, bell), stream)
        try:
            yield bell
        finally:
            self._world.forget(stream, bell)

    async def _call(self, what: str, do: Callable[[], T], stream: str = "", seconds: float = 0.0) -> T:
        await self._until_it_runs(stream)
        chance, weather = self._world.random.random, self.weather
        arrives, is_answered = chance() >= weather.lost_requests, chance() >= weather.lost_answers
        there, back = self.delay() + seconds, self.delay()
        answers: list[T] = []
        over = trio.Event()

        async def carry() -> None:
            await trio.sleep(there)
            if arrives:
                answers.append(do())
                self._world.note(f"{self._name} {what}: {_shown(answers[0])}{'' if is_answered else ' (answer lost)'}")
            else:
                self._world.note(f"{self._name} {what}: lost")
            await trio.sleep(back)
            over.set()

        self._world.send(carry)
        await over.wait()
        await self._until_it_runs(stream)
        if not (arrives and is_answered):
            raise StorageError(f"{what.split(maxsplit=1)[0]} got lost")
        return answers[0]

    async def _until_it_runs(self, stream: str) -> None:
        """Wait while the process does nothing. Raises StorageError if it is dead."""
        while not self.is_cut and (self._is_stopped or (self._is_blocked and not self._is_for_session(stream))):
            await self._runs_again.wait()
        if self.is_cut:
            raise StorageError("this process is dead")

    def _is_for_session(self, stream: str) -> bool:
        return bool(self.session) and stream.startswith(self.session)  # its mailbox too

    def delay(self) -> float:
        """Give how long something is under way this time."""
        random, weather = self._world.random, self.weather
        return random.random() * (weather.stall_seconds if random.random() < weather.stalls else weather.latency)


class _Bell:
    """A doorbell whose rings come when the weather lets them."""

    def __init__(self, world: World, way: SimulatedStorage) -> None:
        self._world = world
        self._way = way
        self._rung = trio.Event()

    async def wait(self) -> None:
        await self._rung.wait()
        self._rung = trio.Event()

    def ring_later(self) -> None:
        chance, weather = self._world.random.random, self._way.weather
        self.ring_after(chance() * weather.stall_seconds if chance() < weather.late_rings else self._way.delay())
        if chance() < weather.false_rings:
            self.ring_after(chance() * weather.stall_seconds)

    def ring_after(self, delay: float) -> None:
        """Ring once, then."""

        async def carry() -> None:
            await trio.sleep(delay)
            self._rung.set()

        self._world.send(carry)


@contextmanager
def asking(open_storage: Callable[[], Storage]) -> Generator[tuple[Callable[[Coroutine[Any, Any, Any]], Any], Storage]]:
    """Give a storage, entered, and what runs its coroutines while the world waits: an asyncio loop in a thread of its own."""
    storage = open_storage()
    if isinstance(storage, MemoryStorage):  # which never suspends
        yield _at_once, storage
        return
    loop = asyncio.new_event_loop()
    thread = Thread(target=loop.run_forever, name="simulated-storage")
    thread.start()

    def ask(coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(ANSWER_SECONDS)

    try:
        ask(_enter(storage))
        try:
            yield ask, storage
        finally:
            ask(_leave(storage))
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def _at_once(coroutine: Coroutine[Any, Any, T]) -> T:
    try:
        coroutine.send(None)
    except StopIteration as end:
        answer: T = end.value
        return answer
    raise AssertionError("a memory storage suspends")


async def _enter(storage: Storage) -> None:
    await storage.__aenter__()


async def _leave(storage: Storage) -> None:
    await storage.__aexit__(None, None, None)


def _shown(answer: object) -> str:
    match answer:
        case Page(head, records):
            return f"{head.version} of {head.tail}, {len(records)} records"
        case _:
            return str(answer)


def is_reserved(stream: str) -> bool:
    """Say whether this is the id of no stream."""
    return stream.startswith(".")


def _is_renewal(stream: str, head: Head) -> bool:
    is_session = stream.startswith(SESSION_PREFIX) and "." not in stream[len(SESSION_PREFIX) :]  # else it is a mailbox
    return is_session and not session_of(head).is_challenged


def _nothing(*_: object) -> None:
    pass
