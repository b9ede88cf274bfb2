"""Writers and readers over one storage, and an account of what they were told: to be believed against what is stored at the end."""

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Final

import anyio

from streamkeep import StreamManager

PACE_SECONDS: Final = 0.002
BOUND_SECONDS: Final = 60
"""For what an engine does after a fault: it may replay a log first."""
LEASE: Final = timedelta(seconds=40)
"""Longer than any fault that is not meant to kill: what is tested is the storage, not the machine's speed."""

Seen = tuple[str, int, bytes]


@dataclass(slots=True)
class Account:
    """What was told of one stream.

    Attributes:
        id: the stream's id.
        acknowledged: of how many chunks the writer was told that they are stored.
        is_done: whether it was told that the stream is complete.
        readings: what each reader saw, event by event.
    """

    id: str
    acknowledged: int = 0
    is_done: bool = False
    readings: list[list[Seen]] = field(default_factory=list)

    @property
    def progress(self) -> int:
        """How far the slowest of its writer and readers has come."""
        return min([self.acknowledged, *map(len, self.readings)])

    def __str__(self) -> str:
        seen = ", ".join(str(len(reading)) for reading in self.readings)
        return f"{self.id}: {self.acknowledged} acknowledged, {seen or 'none'} seen"

    def expected(self) -> list[Seen]:
        """Give the stream as it must be: each chunk says which it is."""
        chunks: list[Seen] = [("chunk", offset, b"%d" % offset) for offset in range(self.acknowledged)]
        return [*chunks, ("done", self.acknowledged, b"%d" % self.acknowledged)] if self.is_done else chunks


class Load:
    """Streams that are written, one chunk after the other, and followed, until `finish`."""

    def __init__(self) -> None:
        self.accounts: list[Account] = []
        self._finishing = False
        self._changed = anyio.Event()

    async def write(self, streams: StreamManager, account: Account) -> None:
        """Write to a stream until it is to end."""
        async with streams.open(account.id) as stream:
            while not self._finishing:
                assert await stream.write(account.acknowledged) == account.acknowledged
                account.acknowledged += 1
                self._change()
                await anyio.sleep(PACE_SECONDS)
            await stream.done(account.acknowledged)
        account.is_done = True
        self._change()

    async def read(self, streams: StreamManager, account: Account) -> None:
        """Follow a stream to its end, in one subscription."""
        seen: list[Seen] = []
        account.readings.append(seen)
        async with streams.subscribe(account.id) as events:
            async for event in events:
                seen.append((event.type.value, event.offset, event.data))
                self._change()

    async def advances(self, by: int = 20) -> None:
        """Return when every writer has been told of so many chunks more, and every reader has seen as many."""
        goals = [(account, max([account.acknowledged, *map(len, account.readings)]) + by) for account in self.accounts]
        await self.until(lambda: all(account.progress >= goal for account, goal in goals))

    async def until(self, condition: Callable[[], bool]) -> None:
        """Return when it is so; TimeoutError if it never comes."""
        with anyio.move_on_after(BOUND_SECONDS):
            while not condition():
                await self._changed.wait()
            return
        raise TimeoutError("\n".join(map(str, self.accounts)))

    def finish(self) -> None:
        """Let the writers complete their streams."""
        self._finishing = True

    def _change(self) -> None:
        changed, self._changed = self._changed, anyio.Event()
        changed.set()


@asynccontextmanager
async def load(writers_url: str, readers_url: str, *, streams: int = 3, readers: int = 2) -> AsyncGenerator[Load]:
    """Give a load that has begun; leaving the block completes its streams, and checks every account against what is stored."""
    under_way = Load()
    async with connected(writers_url) as writing, connected(readers_url) as reading, anyio.create_task_group() as tasks:
        for number in range(streams):
            account = Account(f"stream-{number}")
            under_way.accounts.append(account)
            tasks.start_soon(under_way.write, writing, account)
        await under_way.until(lambda: all(account.acknowledged for account in under_way.accounts))
        for account in under_way.accounts:
            for _ in range(readers):
                tasks.start_soon(under_way.read, reading, account)
        await under_way.advances(5)
        yield under_way
        under_way.finish()
        tasks.cancel_scope.deadline = anyio.current_time() + BOUND_SECONDS
    await check(under_way.accounts, readers_url)


async def check(accounts: Sequence[Account], url: str) -> None:
    """AssertionError, if what is stored or what a reader saw is not just what the writer was told."""
    async with connected(url) as streams:
        for account in accounts:
            assert account.is_done, f"{account.id} was not completed in time"
            expected = account.expected()
            assert await stored(streams, account.id) == expected
            assert all(reading == expected for reading in account.readings)


async def stored(streams: StreamManager, stream: str) -> list[Seen]:
    """Read a stream to its end."""
    with anyio.fail_after(BOUND_SECONDS):
        async with streams.subscribe(stream) as events:
            return [(event.type.value, event.offset, event.data) async for event in events]


def connected(url: str, *, lease: timedelta = LEASE, grace: timedelta = LEASE) -> StreamManager:
    """Give a manager, not entered, that is patient enough for a server to come back."""
    return StreamManager.connect(url, lease=lease, grace=grace)
