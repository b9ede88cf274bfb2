"""A producer process: it opens streams, goes on with those that dead producers left behind, cancels some and deletes some.

It decides by its random numbers, and notes in its journal whatever it is about to do and whatever it was told. It never judges.
"""

import random
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, suppress
from datetime import timedelta
from itertools import count
from typing import Final
from zlib import crc32

import anyio
from tests.torture.journal import Act, Journal
from tests.torture.stage import GRACE, LEASE, SLOTS, TTL, Part
from tests.torture.streams import BRIEF, BRIEF_SECONDS, DOOMED, FLOW, LASTING, kind_of, new_id, recent_streams

from streamkeep import (
    PublicError,
    StorageError,
    StreamCompletedError,
    StreamInfo,
    StreamInput,
    StreamkeepError,
    StreamManager,
    StreamNotFoundError,
    StreamTakenOverError,
)
from streamkeep.events import encode_json
from streamkeep.storages.sqlite import SQLiteStorage

KINDS: Final = (LASTING, LASTING, LASTING, LASTING, BRIEF, DOOMED)
ROUTE: Final = "/recite"
"""What servers want of streams that are to be read through their flow of this name."""
LOST: Final = (StreamCompletedError, StreamTakenOverError, StreamNotFoundError)


async def produce(part: Part) -> None:
    """Play a producer until it is calm, which is when no more streams are to be opened and all of this one's are over."""
    async with AsyncExitStack() as stack:
        storage = await stack.enter_async_context(SQLiteStorage(part.stage.database, synchronous=part.stage.synchronous))
        lasting = await stack.enter_async_context(StreamManager(storage, ttl=TTL, lease=LEASE, grace=GRACE))
        # Streams of this one are soon forgotten.
        brief = await stack.enter_async_context(
            StreamManager(storage, ttl=timedelta(seconds=BRIEF_SECONDS), lease=LEASE, grace=GRACE)
        )
        producer = _Producer(part, lasting, brief)
        slots = await stack.enter_async_context(anyio.create_task_group())
        for _ in range(SLOTS):
            slots.start_soon(producer.run)


class _Producer:
    def __init__(self, part: Part, lasting: StreamManager, brief: StreamManager) -> None:
        self._part = part
        self._random = part.choices()
        self._journal = Journal(part.journal)
        self._lasting = lasting
        self._brief = brief
        self._serial = count()

    async def run(self) -> None:
        """Do one thing after the other."""
        acts = (self._begin, self._go_on, self._cancel, self._delete)
        while not self._part.stage.is_calm:
            (act,) = self._random.choices(acts, weights=(6, 5, 2, 1))
            with suppress(StorageError):  # noted already
                await act()
            await anyio.sleep(self._random.uniform(0, 0.05))

    def _name(self) -> str:
        return f"{self._part.name}-{next(self._serial)}"

    def _manager(self, stream: str) -> StreamManager:
        return self._brief if kind_of(stream) == BRIEF else self._lasting

    async def _open_streams(self, kind: str) -> Sequence[StreamInfo]:
        recent = await recent_streams(self._lasting, kind, self._random)
        return [info for info in recent if info.status == "open"]

    async def _begin(self) -> None:
        handle = self._name()
        await self._open(new_id(self._random.choice(KINDS), handle), handle, "open")

    async def _go_on(self) -> None:
        # Only lasting streams: another one could be gone by now, and would be created anew under the same id.
        there = await self._open_streams(LASTING)
        if left_behind := [info for info in there if not info.session] or there:
            await self._open(self._random.choice(left_behind).id, self._name(), "resume")

    async def _cancel(self) -> None:
        if there := await self._open_streams(self._random.choice((*KINDS, FLOW))):
            stream = self._random.choice(there).id
            await self._noting(stream, self._name(), "cancel", lambda: self._manager(stream).cancel(stream))

    async def _delete(self) -> None:
        if there := await self._open_streams(DOOMED):
            stream = self._random.choice(there).id
            await self._noting(stream, self._name(), "delete", lambda: self._lasting.delete(stream))

    async def _noting(self, stream: str, handle: str, act: Act, call: Callable[[], Awaitable[object]], number: int = 0) -> bool:
        """Make a call between an intent and its answer; whether it went well."""
        self._journal.meant(stream, handle, act, number)
        try:
            answer = await call()
        except StreamkeepError as error:
            self._journal.refused(stream, handle, act, error)
            if isinstance(error, StorageError):
                raise
            return False
        self._journal.told(stream, handle, act, number, int(answer) if isinstance(answer, bool) else 0)
        return True

    async def _open(self, stream: str, handle: str, act: Act) -> None:
        self._journal.meant(stream, handle, act)
        opening = self._manager(stream).open(stream, resume=act == "resume", metadata={"route": ROUTE})
        try:
            stream_input = await opening
        except StreamkeepError as error:
            self._journal.refused(stream, handle, act, error)
            return
        self._journal.told(stream, handle, act, offset=stream_input.tail)
        await _Writing(self._random, self._journal, stream_input, handle, self._noting).run()


Noting = Callable[[str, str, Act, Callable[[], Awaitable[object]], int], Awaitable[bool]]


class _Writing:
    """One handle's life, from its opening to its end."""

    def __init__(
        self, choices: random.Random, journal: Journal, stream_input: StreamInput, handle: str, noting: Noting
    ) -> None:
        self._random = choices
        self._journal = journal
        self._input = stream_input
        self._stream = stream_input.id
        self._handle = handle
        self._noting = noting
        self._numbers = count()
        self._queued: list[tuple[int, int]] = []

    async def run(self) -> None:
        """Write some chunks in various ways, and end in one of them."""
        try:
            async with self._input:
                for _ in range(self._random.randrange(2, 25)):
                    await self._insistently(self._random.choice((self._one, self._burst, self._soon)))
                    await anyio.sleep(self._random.choice((0, 0.01, 0.05, 0.3)))
                await self._insistently(self._flush)
                await self._end()
        except LOST as error:
            self._journal.refused(self._stream, self._handle, "write", error)

    async def _insistently(self, act: Callable[[], Awaitable[None]]) -> None:
        """Do it, and when the storage fails, wait until it is back: what was to be written keeps its place."""
        try:
            await act()
        except StorageError as error:
            self._journal.refused(self._stream, self._handle, "write", error)
            await anyio.sleep(0.1)
            await self._insistently(self._input.flush)

    def _chunk(self) -> tuple[int, list[str | int]]:
        number = next(self._numbers)
        size = self._random.choice((0, 10, 10, 100, 1_000, 20_000)) if number % 7 == 0 else 5
        chunk: list[str | int] = [self._handle, number, "x" * size]
        self._journal.meant(self._stream, self._handle, "write", number, crc32(encode_json(chunk)))
        return number, chunk

    async def _one(self) -> None:
        number, chunk = self._chunk()
        offset = await self._input.write(chunk)
        self._journal.told(self._stream, self._handle, "write", number, offset)

    async def _burst(self) -> None:
        failures: list[StreamkeepError] = []

        async def one() -> None:
            try:
                await self._one()
            except StreamkeepError as error:
                failures.append(error)

        async with anyio.create_task_group() as writes:
            for _ in range(self._random.randrange(2, 12)):
                writes.start_soon(one)
        for failure in failures:
            raise failure

    async def _soon(self) -> None:
        number, chunk = self._chunk()
        self._queued.append((number, self._input.write_soon(chunk)))
        if self._random.random() < 0.3:
            await self._flush()

    async def _flush(self) -> None:
        await self._input.flush()
        for number, offset in self._queued:
            self._journal.told(self._stream, self._handle, "write", number, offset)
        self._queued.clear()

    async def _end(self) -> None:
        written = next(self._numbers)
        ends: dict[Act, Callable[[], Awaitable[object]]] = {
            "done": lambda: self._input.done([self._handle, written, ""]),
            "error": lambda: self._input.error(PublicError("DATA_LOSS", "on purpose")),
            "close": self._input.close,
        }
        (act,) = self._random.choices(tuple(ends), weights=(6, 1, 3))
        await self._noting(self._stream, self._handle, act, ends[act], written)
