"""A workload: everything a StreamManager does, over SQLite, in an order that the seed decides.

It goes step by step: what one step asks for is asked at once, so that it is committed as a group, and the next one begins when all of
it is answered. So the same seed asks for the same, and on a machine that is not busy it also writes the same to the files. Each step
tells the ledger what it writes and what it was told.
"""

import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from random import Random
from typing import Final, TypeVar

import anyio
import pytest
from tests.inside import storage_of
from tests.powerloss.history import History, WitnessedStorage
from tests.powerloss.ledger import Begun, Gone, Stored, Unwanted, Written
from tests.powerloss.recorder import Tape
from tests.powerloss.recovery import DATABASE, end_sessions, resume

from streamkeep import ErrorInfo, StorageError, StreamInput, StreamManager, StreamTakenOverError
from streamkeep._lifecycle import CANCELLED
from streamkeep.events import chunk_record, done_record, error_record
from streamkeep.storages.sqlite._database import Synchronous
from streamkeep.testing.clock import FakeClock

T = TypeVar("T")

# Nothing lapses by itself: only where a step moves the clock.
TTL: Final = timedelta(days=1)
LEASE: Final = timedelta(hours=1)
GRACE: Final = timedelta(days=10_000)
TRIES: Final = 10
FAILURE: Final = ErrorInfo("INTERNAL", "the producer has failed")

Relief = Callable[[StorageError], None]
"""Called after a StorageError, before the next try; raises it if there was to be none."""


@dataclass(frozen=True, slots=True)
class Size:
    """How long a workload is: how often the database is opened, and how many steps are made each time."""

    sessions: int = 2
    steps: int = 12


def no_relief(error: StorageError) -> None:
    """Nothing was to fail."""
    raise error


class Workload:
    """One program that uses a database, its own and a neighbour's storage."""

    def __init__(
        self, directory: Path, synchronous: Synchronous, tape: Tape, random: Random, *, relief: Relief = no_relief
    ) -> None:
        self.history = History(tape)
        self._path = directory / DATABASE
        self._synchronous: Synchronous = synchronous
        self._tape = tape
        self._random = random
        self._relief = relief
        self._clock = FakeClock(1.8e9)
        self._inputs: dict[str, StreamInput] = {}
        self._open: set[str] = set()
        self._completed: set[str] = set()
        self._free = [f"stream-{number}" for number in range(1000)]

    async def run(self, size: Size) -> None:
        """Do it all."""
        for _ in range(size.sessions):
            await self._session(size.steps)

    async def _session(self, steps: int) -> None:
        async with self._manager() as streams:
            for stream in sorted(self._open):
                await self._resume(streams, stream)
            for _ in range(steps):
                await self._step(streams)
        self._inputs.clear()

    async def _step(self, streams: StreamManager) -> None:
        step = self._random.choice(_STEPS) if len(self._inputs) > 1 else Workload._begin
        await step(self, streams)

    @asynccontextmanager
    async def _manager(self) -> AsyncGenerator[StreamManager]:
        async with AsyncExitStack() as stack:

            async def enter() -> StreamManager:
                storage = WitnessedStorage(self._path, self._synchronous, self.history, self._clock)
                return StreamManager(await stack.enter_async_context(storage), ttl=TTL, lease=LEASE, grace=GRACE)

            yield await stack.enter_async_context(await self._insist(enter))

    # Steps

    async def _begin(self, streams: StreamManager) -> None:
        stream = self._free.pop(0)
        is_retry = False

        async def begin() -> StreamInput:
            nonlocal is_retry
            resume, is_retry = is_retry, True
            return await streams.open(stream, resume=resume, metadata={"of": stream})

        self._tape.mark(Begun(stream))
        self._inputs[stream] = await self._insist(begin)
        self._tape.mark(Stored(stream, 0))
        self._open.add(stream)

    async def _write_together(self, streams: StreamManager) -> None:
        async with anyio.create_task_group() as writers:
            for stream_input in self._inputs.values():
                writers.start_soon(self._write, stream_input)

    async def _write_soon(self, streams: StreamManager) -> None:
        chosen = self._some_input()
        for _ in range(self._random.randrange(1, 20)):
            chunk = self._chunk()
            self._tape.mark(Written(chosen.id, chunk_record(chunk)))
            chosen.write_soon(chunk)
        await self._insist(chosen.flush)
        self._tape.mark(Stored(chosen.id, chosen.tail))

    async def _finish(self, streams: StreamManager) -> None:
        chosen = self._some_input()
        if self._random.random() < 0.5:
            record, ending = done_record("the end"), chosen.done("the end")
        else:
            record, ending = error_record(FAILURE), chosen.error(FAILURE)
        self._tape.mark(Written(chosen.id, record))
        await self._stubbornly(chosen, ending)
        self._has_ended(chosen.id, chosen.tail)

    async def _hand_over(self, streams: StreamManager) -> None:
        chosen = self._some_input()
        await self._insist(chosen.close)
        await self._resume(streams, chosen.id)

    async def _be_taken_over_from(self, streams: StreamManager) -> None:
        old = self._some_input()
        await self._insist(lambda: end_sessions(storage_of(streams)))  # as if its process had died
        async with self._manager() as neighbour:
            successor = await self._resume(neighbour, old.id)
            await self._write(successor)
            with pytest.raises(StreamTakenOverError):
                await self._insist(lambda: old.write("too late"))
        await self._resume(streams, old.id)

    async def _cancel(self, streams: StreamManager) -> None:
        chosen = self._some_input()
        self._tape.mark(Written(chosen.id, error_record(CANCELLED)))
        await self._insist(lambda: streams.cancel(chosen.id))
        self._has_ended(chosen.id, chosen.tail + 1)

    async def _delete(self, streams: StreamManager) -> None:
        stream = self._random.choice(sorted(self._inputs.keys() | self._completed))
        self._tape.mark(Unwanted(stream))
        await self._insist(lambda: streams.delete(stream))
        self._is_gone(stream)

    async def _expire(self, streams: StreamManager) -> None:
        self._clock.advance(TTL.total_seconds() + 1)
        expired = sorted(self._completed)
        for stream in expired:
            self._tape.mark(Unwanted(stream))
        await self._insist(streams.sweep)
        for stream in expired:
            self._is_gone(stream)

    # What steps are made of

    def _some_input(self) -> StreamInput:
        return self._inputs[self._random.choice(sorted(self._inputs))]

    def _chunk(self) -> str:
        long = self._random.randrange(1_000, 9_000) if self._random.random() < 0.15 else 8
        return self._random.randbytes(math.ceil(long / 2)).hex()

    async def _write(self, stream_input: StreamInput) -> None:
        chunk = self._chunk()
        self._tape.mark(Written(stream_input.id, chunk_record(chunk)))
        await self._stubbornly(stream_input, stream_input.write(chunk))
        self._tape.mark(Stored(stream_input.id, stream_input.tail))

    async def _resume(self, streams: StreamManager, stream: str) -> StreamInput:
        successor = self._inputs[stream] = await self._insist(lambda: resume(streams, stream))
        return successor

    async def _stubbornly(self, stream_input: StreamInput, call: Awaitable[object]) -> None:
        # What was accepted keeps its place: it is not to be written again, but flushed.
        try:
            await call
        except StorageError as error:
            self._relief(error)
            await self._insist(stream_input.flush)

    async def _insist(self, call: Callable[[], Awaitable[T]]) -> T:
        for _ in range(TRIES):
            try:
                return await call()
            except StorageError as error:
                self._relief(error)
        raise AssertionError(f"it has failed {TRIES} times")

    def _has_ended(self, stream: str, tail: int) -> None:
        self._tape.mark(Stored(stream, tail))
        del self._inputs[stream]
        self._open.discard(stream)
        self._completed.add(stream)

    def _is_gone(self, stream: str) -> None:
        self._tape.mark(Gone(stream))
        self._inputs.pop(stream, None)
        self._open.discard(stream)
        self._completed.discard(stream)
        self._free.insert(0, stream)


_STEPS: Final[Sequence[Callable[[Workload, StreamManager], Awaitable[None]]]] = [
    *[Workload._write_together] * 6,
    *[Workload._write_soon] * 3,
    *[Workload._begin] * 3,
    *[Workload._finish] * 2,
    Workload._hand_over,
    Workload._be_taken_over_from,
    Workload._cancel,
    Workload._delete,
    Workload._expire,
]
