"""Those who use streams in a simulated history: processes, and in them writers, readers and people who interfere.

They behave as users are told to, and as badly as users do: they pause, give up waiting, drop handles, come back, and die. What they
are told they write down; whether it is true is not theirs to judge, but for what only they can know at that moment.
"""

import gc
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from math import inf
from random import Random
from typing import Final, Protocol
from weakref import ReferenceType, ref

import msgspec
import trio

from streamkeep import (
    KeyInUseError,
    OffsetOutOfRangeError,
    Recovery,
    StorageError,
    StreamAlreadyExistsError,
    StreamBusyError,
    StreamCompletedError,
    StreamEvent,
    StreamInput,
    StreamManager,
    StreamManagerClosedError,
    StreamNotFoundError,
    StreamTakenOverError,
    StreamTimeoutError,
    _lifecycle,
)
from streamkeep._manager import Opening
from streamkeep.errors import StorageCorruptError
from streamkeep.events import StreamEventType, event_of
from streamkeep.storage import Head

from .accounts import Reading, Writing, failure_of
from .world import CALM, LONGEST_STALL, Past, SimulatedStorage, Weather, World, is_reserved

PROMPT_SECONDS: Final = 2.0
"""Within this, in calm weather, a reader gets what was stored, and a writer learns that its stream is no longer its own."""
SURELY_ALIVE_SECONDS: Final = 2 * LONGEST_STALL + 40.0
"""A process whose way to the storage was good for so long is not dead to anybody: what others have read, or sent, before is over."""
OWNER: Final = "ann"
KEY: Final = "chat"
LEASE: Final = timedelta(seconds=10)
GRACE: Final = timedelta(seconds=5)
ATTEMPTS: Final = 6
"""How often somebody tries again what failed."""
LETTERS: Final = {
    StreamEventType.CHUNK: b"c",
    StreamEventType.DONE: b"d",
    StreamEventType.ERROR: b"e",
    StreamEventType.RECOVERING: b"r",
    StreamEventType.RESTARTED: b"s",
}
RECOVERY: Final = Recovery("go", {"question": "why"}, attempts=2, backoff=timedelta(seconds=3), within=timedelta(minutes=2))


class Actor(Protocol):
    """Somebody who lives in a process, and does what calling it does."""

    name: str

    async def __call__(self, process: "Process", /) -> None: ...


@dataclass(slots=True)
class Story:
    """What is being told: the world, who did what, and what was wrong with it.

    Attributes:
        acting: who is at it.
        processes: all that have ever lived.
        deleted: ids that somebody has deleted.
        may_forget: whether a clock jumps so far that open streams whose writer has died are forgotten.
        violations: promises that were seen to be broken.
        reached: how often the history came to this or that, so that it can be seen that something was tried.
        released: is set, and replaced, when a writer has released a stream.
        started: the streams whose start under the key has returned to somebody.
        recovers: whether streams are to be gone on with.
    """

    world: World
    random: Random
    ids: list[str]
    ttl: timedelta
    writings: list[Writing] = field(default_factory=list)
    handles: list["Handle"] = field(default_factory=list)
    acting: list[Actor] = field(default_factory=list)
    processes: list["Process"] = field(default_factory=list)
    deleted: set[str] = field(default_factory=set)
    may_forget: bool = False
    violations: list[str] = field(default_factory=list)
    reached: dict[str, int] = field(default_factory=dict)
    released: trio.Event = field(default_factory=trio.Event)
    started: set[str] = field(default_factory=set)
    recovers: bool = False

    def __post_init__(self) -> None:
        self.world.committed = self._see_commit
        self.world.deleted = self._see_deletion

    def count(self, what: str) -> None:
        """Count that the history came to this."""
        self.reached[what] = self.reached.get(what, 0) + 1

    def complain(self, what: str) -> None:
        """Write down that a promise was broken."""
        self.world.note(f"VIOLATION {what}")
        self.violations.append(what)

    async def pause(self, longest: float) -> None:
        """Do nothing for a while, mostly short."""
        await trio.sleep(longest * self.random.random() ** 3)

    def _see_commit(
        self, way: SimulatedStorage, stream: str, before: Head | None, head: Head, records: Sequence[bytes]
    ) -> None:
        """Check that no writer that lives is declared dead: nobody else ends its stream with ABORTED, or takes it over."""
        if before is None or is_reserved(stream):
            return
        was, state = _lifecycle.life_of(before).state, _lifecycle.life_of(head).state
        is_left_by_others = bool(was.session) and not state.session and way.session != _lifecycle.session_id(was.session)
        is_declared_dead = (
            state.error == "ABORTED" or state.session not in {"", was.session} or (state.status == "open" and is_left_by_others)
        )
        if was.session and state.status == "open" and not state.session:
            self.released.set()
            self.released = trio.Event()
        if was.status == "open" and is_declared_dead:
            self.count("declared dead")
            self._expect_dead(way, _lifecycle.session_id(was.session), f"{stream} was taken from its writer")

    def _see_deletion(self, way: SimulatedStorage, past: Past) -> None:
        """Check that nothing is forgotten before it has come to its end, but what somebody deletes, or what an `open` takes back."""
        if past.is_reserved or past.ends_at is not None or past.id in self.deleted:
            return
        session = _lifecycle.session_id(_lifecycle.life_of(past.head).state.session)
        if past.records or way.session != session:
            if not self.may_forget:
                self.complain(f"{past.id} was forgotten before it had come to its end")
            self._expect_dead(way, session, f"{past.id} was forgotten")
        else:
            self.count("taken back")

    def see_start(self, stream: str) -> None:
        """Check that nothing else runs under the key, when a start under it has returned."""
        self.started.add(stream)
        if self.world.times_gone_back:
            return
        running = [past.id for past in self.world.streams.values() if past.id in self.started and past.ends_at is None]
        if stream in running and len(running) > 1:
            self.complain(f"{running} run under one key")

    def _expect_dead(self, way: SimulatedStorage, session: str, what: str) -> None:
        for process in self.processes:
            if process.way.session == session and process.way is not way and process.is_surely_alive:
                self.complain(f"{what}, and {process.name} lives")


@dataclass(frozen=True, slots=True)
class Handle:
    """A StreamInput that somebody has, or has had."""

    process: "Process"
    id: str
    stream: ReferenceType[StreamInput]
    name: str
    opened_at: float

    def holds(self, stream: str) -> bool:
        """Whether it is an open handle of this stream."""
        held = self.stream()
        return held is not None and held.id == stream and not held.is_closed

    @property
    def should_be_told(self) -> bool:
        """Whether it is believed to be open by a process in whose way there has been nothing lately."""
        stream = self.stream()
        return (
            stream is not None
            and self.process.is_alive
            and trio.current_time() >= self.process.calm_since
            and not stream.is_closed
            and not stream.cancelled.is_set()
        )


class Process:
    """A process: a manager, a way to the storage, and those who use it."""

    def __init__(self, story: Story, name: str, weather: Weather) -> None:
        self.name = name
        self.weather = weather
        self.calm_since = 0.0 if weather is CALM else inf
        self._tame_since = 0.0 if weather.is_tame else inf
        self._story = story
        self.way = SimulatedStorage(story.world, name, weather)
        self._life = trio.CancelScope()
        self._streams = StreamManager(self.way, ttl=story.ttl, lease=LEASE, grace=GRACE)
        self.up = trio.Event()
        self.over = trio.Event()
        story.processes.append(self)

    @property
    def streams(self) -> StreamManager:
        """Its manager."""
        return self._streams

    @property
    def is_alive(self) -> bool:
        """Whether it has been neither killed nor closed."""
        return not self.way.is_cut and self._streams.is_running

    @property
    def is_surely_alive(self) -> bool:
        """Whether nothing keeps its session from being renewed, or has lately."""
        since = self._tame_since
        return self.is_alive and (since == 0 or trio.current_time() >= since + SURELY_ALIVE_SECONDS)

    async def run(self, actors: Sequence["Actor"]) -> None:
        """Live until all actors are done and `leave` or `kill` is called."""
        try:
            with self._life:
                async with self._streams:
                    self.up.set()
                    async with trio.open_nursery() as nursery:
                        for act in actors:
                            nursery.start_soon(self.act, act)
                        nursery.start_soon(trio.sleep_forever)
        finally:
            self.over.set()

    def kill(self) -> None:
        """Die, without a word to anybody."""
        self._story.world.note(f"{self.name} is killed")
        self._story.count("killed")
        self.way.is_cut = True
        self.way.go_on()
        self._life.cancel()

    async def leave(self) -> None:
        """Close the manager while its users still use it, then end."""
        self._story.world.note(f"{self.name} leaves")
        await self._streams.aclose()
        await trio.sleep(PROMPT_SECONDS)
        self._life.cancel()
        await self.over.wait()

    def calm_down(self) -> None:
        """Let what it asks of the storage succeed from now on."""
        # What was sent before may still be under way, there and back, while others are quick.
        slow = self._story.world.commit_seconds[1]
        self._since(2 * self.weather.stall_seconds + slow + 1, is_tame=self.weather.is_tame and not slow)
        self.way.weather = self.weather = CALM

    async def be_blocked(self, seconds: float) -> None:
        """Do nothing for a while but what the session does."""
        self._story.world.note(f"{self.name} is blocked for {seconds} s")
        self._story.count("blocked")
        await self._be_held(self.way.block, seconds, is_tame=True)

    async def be_stopped(self, seconds: float) -> None:
        """Do nothing for a while."""
        self._story.world.note(f"{self.name} is stopped for {seconds} s")
        self._story.count("stopped")
        await self._be_held(self.way.stop, seconds, is_tame=False)

    async def _be_held(self, hold: Callable[[], None], seconds: float, *, is_tame: bool) -> None:
        is_calm = self.weather is CALM
        self.calm_since = inf
        if not is_tame:
            self._tame_since = inf
        hold()
        try:
            await trio.sleep(seconds)
        finally:
            self.way.go_on()
            if is_calm or self.weather is CALM:
                self._since(0.0, is_tame=is_tame)

    def _since(self, seconds: float, *, is_tame: bool) -> None:
        self.calm_since = trio.current_time() + seconds
        if not is_tame:
            self._tame_since = self.calm_since

    async def act(self, act: "Actor") -> None:
        """Let somebody act in it."""
        self._story.acting.append(act)
        try:
            await act(self)
        except StreamManagerClosedError:
            if self.is_alive:
                self._story.complain(f"{self.name} runs, and says that it is closed")
        except StorageCorruptError as error:
            if not self._story.world.times_gone_back:
                self._story.complain(f"{self.name} calls its storage damaged: {error}")
        finally:
            self._story.acting.remove(act)

    def may_be_absent(self, stream: str, since: float) -> bool:
        """Say whether the stream can have been absent at some time since then."""
        pasts = [past for past in self._story.world.pasts if past.id == stream]
        there = self._story.world.streams.get(stream)
        return (
            there is None
            or there.created_at >= since
            or any(at is not None and at >= since for past in pasts for at in (past.deleted_at, past.lost_at))
            or self._story.world.latest >= there.head.expires_at
        )


class Writer:
    """Somebody who writes a stream, or goes on with one."""

    def __init__(self, story: Story, name: str, stream: str, *, start: "Start | None" = None) -> None:
        self.name = name
        self._story = story
        self._stream = stream
        self._start = start
        self._random = story.random
        self._handles = 0
        self.scope = trio.CancelScope()

    async def __call__(self, process: Process) -> None:
        """Open the stream, write to it, and end in one way or another; perhaps again."""
        for _ in range(self._random.randint(1, 3)):
            await self._story.pause(20)
            await self.open_and_write(process)
            # Automatic collection is off, so that a dropped handle dies at the same moment in every run.
            gc.collect()

    async def open_and_write(self, process: Process) -> None:
        """Open the stream, trying a few times, write to it, and end."""
        resume = self._start is None and self._random.random() < 0.7
        for _ in range(ATTEMPTS):
            try:
                with trio.CancelScope() as self.scope:
                    await self._open_once(process, resume=resume)
            except StreamBusyError as busy:
                await trio.sleep(max(0.0, min(busy.retry_after, 60.0)))
            except _OnPurpose:
                return
            except KeyInUseError as told:
                self._story.count("told what runs")
                self._story.world.note(f"{process.name} {self.name} is told of {told.stream}")
                return
            except (StreamAlreadyExistsError, StreamCompletedError):
                return
            except (StreamTakenOverError, StreamNotFoundError):  # by leaving the block: what was queued is lost
                self._story.count("told at the end")
                return
            except StorageCorruptError:
                raise
            except StorageError:
                resume = self._start is None
                await self._story.pause(5)
            else:
                return

    async def go_on(self, process: Process, stream: StreamInput) -> None:
        """Write a stream that another one has left, and end it."""
        if self._random.random() < (0.5 if stream.checkpoint is None else 0.2):
            self._story.count("begun again")
            await stream.restart()
        await self._write_and_end(process, stream)

    async def _open_once(self, process: Process, *, resume: bool) -> None:
        if self._random.random() < 0.1:
            await self._open_impatiently(process, resume=resume)
            return
        opening = self._opening(process, resume=resume)
        if self._random.random() < 0.5:
            async with opening as stream:
                await self._write_and_end(process, stream)
        else:
            await self._write_and_end(process, await opening)

    def _opening(self, process: Process, *, resume: bool) -> Opening:
        recovery = RECOVERY if self._story.recovers and self._random.random() < 0.7 else None
        if (start := self._start) is None:
            return process.streams.open(self._stream, resume=resume, recovery=recovery)
        return process.streams.open(self._stream, owner=OWNER, key=KEY, run=start.run, replace=start.replace, recovery=recovery)

    async def _open_impatiently(self, process: Process, *, resume: bool) -> None:
        """Open it, and go away before it is open; or, if that is too late, let go of it."""
        with trio.move_on_after(self._random.choice([0.1, 1.0, 20.0]) * self._random.random()) as timeout:
            await (await self._opening(process, resume=resume)).close()
        if timeout.cancelled_caught:
            self._story.count("opened impatiently")

    async def _write_and_end(self, process: Process, stream: StreamInput) -> None:
        if self._start is not None:
            self._story.count("started")
            self._story.see_start(stream.id)
        self._handles += 1
        name = f"{self.name}.{self._handles}"
        account = Writing(name, stream.id, stream.tail)
        self._story.writings.append(account)
        self._story.handles.append(Handle(process, stream.id, ref(stream), name, trio.current_time()))
        self._story.count("opened" if stream.tail == 0 else "resumed")
        self._story.world.note(f"{process.name} {name} opened {stream.id} at {stream.tail}")
        try:
            for _ in range(self._random.randint(0, 12)):
                await self._step(stream, account)
            await self._end(stream, account)
        except (StreamCompletedError, StreamTakenOverError, StreamNotFoundError) as error:
            self._story.count(f"writer told {error.status}")
            self._story.world.note(f"{process.name} {name} is told: {error}")
            if not stream.cancelled.is_set():
                self._story.complain(f"{name} was told {error.status}, and its stream is not `cancelled`")

    async def _step(self, stream: StreamInput, account: Writing) -> None:
        random = self._random
        if random.random() < 0.01 and "crowds" not in self._story.reached:
            await self._flood(stream, account)
        match random.choice(["write", "write", "soon", "soon", "flush", "together", "impatient", "pause"]):
            case "write":
                await self._write(stream, account)
            case "soon":
                for _ in range(random.randint(1, 4)):
                    stream.write_soon(chunk := account.next_chunk(), checkpoint=checkpoint_of(chunk))
            case "flush":
                await self._flush(stream, account)
            case "together":
                # Each task's call comes before its first wait, so numbers are in the order of calls.
                async with trio.open_nursery() as writes:
                    for _ in range(random.randint(2, 4)):
                        writes.start_soon(self._write_quietly, stream, account)
            case "impatient":
                with trio.move_on_after(random.random() * 0.2):
                    await self._write(stream, account)
            case _:
                await self._story.pause(60)

    async def _flood(self, stream: StreamInput, account: Writing) -> None:
        """Write more than goes into one commit, one page, or what readers share."""
        for _ in range(self._random.randint(1_000, 3_000)):
            stream.write_soon(chunk := account.next_chunk(), checkpoint=checkpoint_of(chunk))
        if self._random.random() < 0.5:
            await self._flush(stream, account)

    async def _write(self, stream: StreamInput, account: Writing) -> None:
        number = account.calls
        try:
            offset = await stream.write(chunk := account.next_chunk(), checkpoint=checkpoint_of(chunk))
        except StorageCorruptError:
            raise
        except StorageError:
            await self._story.pause(3)
            if self._random.random() < 0.5:
                await self._flush(stream, account)
            return
        account.places[number] = offset
        account.stored = max(account.stored, number + 1)

    async def _write_quietly(self, stream: StreamInput, account: Writing) -> None:
        # In a nursery errors come as groups; so they are kept here.
        try:
            await self._write(stream, account)
        except (StreamCompletedError, StreamTakenOverError, StreamNotFoundError, StreamManagerClosedError):
            account.was_told = True
        except StorageCorruptError as error:
            account.was_told = True
            if not self._story.world.times_gone_back:
                self._story.complain(f"{account.name} calls its storage damaged: {error}")

    async def _flush(self, stream: StreamInput, account: Writing) -> bool:
        for _ in range(ATTEMPTS):
            asked = account.calls
            try:
                await stream.flush()
            except StorageCorruptError:
                raise
            except StorageError:
                await self._story.pause(5)
            else:
                account.stored = max(account.stored, asked)
                return True
        return False

    async def _end(self, stream: StreamInput, account: Writing) -> None:
        ways = ["done", "done", "error", "close", "drop", "raise", "cancel"]
        match self._random.choice(ways):
            case "done":
                await self._complete(stream, account, "done", lambda: stream.done(account.name))
            case "error":
                await self._complete(stream, account, "error", lambda: stream.error(failure_of(account.name)))
            case "close":
                await self._complete(stream, account, "close", stream.close)
            case "raise":
                raise _OnPurpose
            case "cancel":
                self.scope.cancel()
                await trio.sleep_forever()
            case _:
                self._story.count("dropped")  # and released, with a ResourceWarning

    async def _complete(self, stream: StreamInput, account: Writing, how: str, complete: Callable[[], Awaitable[None]]) -> None:
        account.ending = how
        try:
            await complete()
            account.has_ended = True
        except StorageCorruptError:
            raise
        except StorageError:
            account.has_ended = await self._flush(stream, account)
        if account.has_ended:
            self._story.count(how)
            if not account.was_told:
                account.stored = account.calls


@dataclass(frozen=True, slots=True)
class Start:
    """How somebody starts under the key."""

    run: str | None
    replace: bool


class Starter:
    """Somebody who starts streams under the one key of the history, each with an id of its own, and writes them."""

    def __init__(self, story: Story, name: str) -> None:
        self.name = name
        self._story = story

    async def __call__(self, process: Process) -> None:
        """Start a few times, in one way or another; a run may be somebody else's too."""
        random = self._story.random
        for number in range(random.randint(1, 4)):
            await self._story.pause(20)
            start = Start(random.choice([None, "r1", "r2", "r3"]), replace=random.random() < 0.3)
            id = f"{self.name}.{number}"
            await Writer(self._story, id, id, start=start).open_and_write(process)
            gc.collect()


class Successor:
    """Somebody who goes on with what dead writers have left."""

    def __init__(self, story: Story, name: str) -> None:
        self.name = name
        self._story = story
        self._handles = 0

    async def __call__(self, process: Process) -> None:
        """Go on with a few streams, one after the other, for a while."""
        await self._story.pause(30)
        with trio.move_on_after(self._story.random.choice([30.0, 200.0])):
            async with process.streams.recoveries(RECOVERY.name) as lost:
                for _ in range(self._story.random.randint(1, 5)):
                    await self._go_on(process, await anext(lost))
                    gc.collect()

    async def _go_on(self, process: Process, stream: StreamInput) -> None:
        self._story.count("gone on with")
        self._check(stream)
        self._handles += 1
        writer = Writer(self._story, f"{self.name}.{self._handles}", stream.id)
        try:
            with trio.CancelScope() as writer.scope:
                if self._story.random.random() < 0.5:
                    async with stream:
                        await writer.go_on(process, stream)
                else:
                    await writer.go_on(process, stream)
        except (_OnPurpose, StreamCompletedError, StreamTakenOverError, StreamNotFoundError):
            return
        except StorageCorruptError:
            raise
        except StorageError:
            await self._story.pause(5)

    def _check(self, stream: StreamInput) -> None:
        """Check that what is needed to go on is at hand, and is that of the last writer."""
        if stream.recovery != RECOVERY and not self._story.world.times_gone_back:
            self._story.complain(f"{self.name} has {stream.recovery} of {stream.id}")
        if not 0 <= stream.attempt <= RECOVERY.attempts:
            self._story.complain(f"{stream.id} is gone on with after {stream.attempt} deaths")
        past = self._story.world.streams.get(stream.id)
        if past is not None and len(past.records) == stream.tail and stream.checkpoint != (kept := checkpoint_in(past.records)):
            self._story.complain(
                f"{self.name} is given the checkpoint {stream.checkpoint} of {stream.id}, where {kept} was kept"
            )


def checkpoint_of(chunk: list[object]) -> object:
    """Give what is kept with a chunk: itself, of every second one."""
    return chunk if int(str(chunk[1])) % 2 == 0 else None


def checkpoint_in(records: Sequence[bytes]) -> object:
    """Give the last checkpoint that was kept with these records."""
    for record in reversed(records):
        if record[:1] == LETTERS[StreamEventType.RESTARTED]:
            return None
        if (
            record[:1] == LETTERS[StreamEventType.CHUNK]
            and (kept := checkpoint_of(msgspec.json.decode(record[1:]))) is not None
        ):
            return kept
    return None


class _OnPurpose(Exception):  # noqa: N818 - it is not an error
    """What a producer raises that fails."""


class Reader:
    """Somebody who reads a stream to its end, in one go or coming back."""

    def __init__(self, story: Story, name: str, stream: str) -> None:
        self.name = name
        self._story = story
        self._stream = stream
        self._random = story.random
        self._after: int | None = None

    async def __call__(self, process: Process) -> None:
        """Read until the stream ends, or until there is a reason not to."""
        await self._story.pause(30)
        while not await self._read(process):
            await self._story.pause(5)

    async def _read(self, process: Process) -> bool:
        """Read until there is nothing more to come, or there is a reason to come back; say which."""
        began = trio.current_time()
        try:
            return await self._read_once(process)
        except StreamNotFoundError:
            if not process.may_be_absent(self._stream, began):
                self._story.complain(f"{self.name} was told that {self._stream} does not exist")
            return self._after is not None or self._random.random() < 0.3 or trio.current_time() > LAST_HOPE
        except OffsetOutOfRangeError:
            if sum(past.id == self._stream for past in self._story.world.pasts) < 2:
                self._story.complain(f"{self.name} was told that {self._stream} is shorter than what it has read")
            return True
        except StreamTimeoutError:
            self._story.count("timed out")
            return False
        except StorageCorruptError:
            raise
        except StorageError:
            return False

    async def _read_once(self, process: Process) -> bool:
        account = Reading(self.name, self._stream, 0 if self._after is None else self._after + 1)
        slowness = self._random.choice([0.0, 0.0, 0.0, 0.5, 20.0])
        idle = timedelta(seconds=20) if self._random.random() < 0.2 else None
        async with process.streams.subscribe(self._stream, self._after, idle_timeout=idle) as events:
            asked = trio.current_time()
            while batch := await events.batch():
                for event in batch:
                    self._see(process, account, event, asked)
                if self._random.random() < 0.05:
                    return False
                await self._story.pause(slowness)
                asked = trio.current_time()
            self._check_end(account)
            self._story.count("read to the end")
            return True

    def _check_end(self, account: Reading) -> None:
        last = account.next + len(account.seen) - 1
        if not any(past.id == self._stream and past.ends_at == last for past in self._story.world.pasts):
            self._story.complain(f"{self.name} was led to believe that {self._stream} ends at {last}")

    def _see(self, process: Process, account: Reading, event: StreamEvent[object], asked: float) -> None:
        self._after = event.offset
        record = LETTERS[event.type] + event.data
        assert event_of(record, event.offset) == event
        if problem := account.see(event.offset, record, self._story.world.pasts):
            self._story.complain(problem)
        elif account.candidates:
            # Streams of the same id may have begun alike; which one this is will show.
            stored_at = max(past.stored_at[event.offset] for past in account.candidates)
            waited = trio.current_time() - max(asked, stored_at)
            is_calm = stored_at >= process.calm_since and not any(self._story.world.commit_seconds)
            if waited > PROMPT_SECONDS and is_calm:
                self._story.complain(f"{self.name} got offset {event.offset} of {self._stream} {waited:.1f} s late")
        self._story.count("events read")


LAST_HOPE: Final = 150.0
"""After so many virtual seconds nobody waits any longer for a stream that is not there."""


class Meddler:
    """Somebody who cancels, deletes, sweeps and looks, now and then."""

    def __init__(self, story: Story, name: str) -> None:
        self.name = name
        self._story = story

    async def __call__(self, process: Process) -> None:
        """Interfere a few times."""
        for _ in range(self._story.random.randint(1, 4)):
            await self._story.pause(60)
            try:
                await self._interfere(process, self._story.random.choice(self._story.ids))
            except StorageCorruptError:
                raise
            except (StreamNotFoundError, StorageError):
                pass

    async def _interfere(self, process: Process, stream: str) -> None:
        story = self._story
        match story.random.choice(["cancel", "cancel", "cancel", "delete", "replace", "sweep", "list"]):
            case "cancel":
                asked_at = trio.current_time()
                if await process.streams.cancel(stream):
                    story.count("cancelled")
                    if asked_at >= process.calm_since and not any(
                        story.world.commit_seconds
                    ):  # else they find out by themselves
                        await _expect_to_be_told(story, stream, asked_at)
            case "delete" | "replace" as how:
                story.deleted.add(stream)
                await process.streams.delete(stream)
                story.count("deleted")
                if how == "replace":
                    await Writer(story, f"{self.name} {trio.current_time()}", stream).open_and_write(process)
            case "sweep":
                await process.streams.sweep()
            case _:
                ids = [info.id for info in await process.streams.list()]
                if ids != sorted(set(ids)):
                    story.complain(f"a list of all streams is {ids}")


async def _expect_to_be_told(story: Story, stream: str, asked_at: float) -> None:
    """Check that who wrote a stream that has been cancelled since then learns of it at once; whoever wrote it before is told otherwise."""
    await trio.sleep(PROMPT_SECONDS)
    writers = [handle for handle in story.handles if handle.id == stream and handle.opened_at < asked_at]
    last = max(writers, key=lambda handle: handle.opened_at, default=None)
    if last is not None and last.should_be_told:
        story.complain(f"{last.name} was not told within {PROMPT_SECONDS} s that {stream} was cancelled")
