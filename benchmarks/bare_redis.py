"""Redis without streamkeep: redis-py's pipelines and one script a commit, as one would write them by hand."""

import asyncio
import time
import uuid
from contextlib import AsyncExitStack
from typing import Self
from urllib.parse import urlsplit

import msgspec
from redis.asyncio import Redis
from redis.asyncio.client import PubSub

from benchmarks.answer import CHUNK
from streamkeep import StreamEvent, StreamEventType

STATE = b'{"created_at":1795396516.8,"writer":"0123456789abcdef0123456789abcdef","lease_until":1795396526.8,"status":"open"}'
PAGE = 512

# The head is swapped if its version is the one that was seen, and the record appended; subscribers are told.
APPEND = """
local head = redis.call('GET', KEYS[1])
if (head and string.match(head, '^%d+') or '0') ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2])
redis.call('RPUSH', KEYS[2], ARGV[3])
redis.call('PUBLISH', KEYS[2], '')
return 1
"""

encode = msgspec.json.Encoder().encode


class Bare:
    """Keys of its own in the server that `url` names; whatever follows the number of the database is ignored."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._url = f"{parts.scheme}://{parts.netloc}{parts.path}"
        self._name = f"bare-{uuid.uuid4().hex}"

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            self._redis = await stack.enter_async_context(Redis.from_url(self._url))
            self._other = await stack.enter_async_context(Redis.from_url(self._url))
            self._append = await self._redis.script_load(APPEND)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        async for key in self._redis.scan_iter(f"{self._name}*"):
            await self._redis.unlink(key)
        await self._stack.aclose()

    async def append(self, writers: int, each: int) -> float:
        """Give the commits a second: in each round, one of each writer in one pipeline."""
        name = f"{self._name}-{uuid.uuid4().hex}"
        started = time.perf_counter()
        for version in range(each):
            await self._commit([f"{name}-{number}" for number in range(writers)], version)
        return writers * each / (time.perf_counter() - started)

    async def replay(self, count: int) -> float:
        """Give the events a second that are read, page by page, and made into objects."""
        name = f"{self._name}-{uuid.uuid4().hex}"
        await self._redis.rpush(f"{name}-log", *[encode(CHUNK)] * count)
        started = time.perf_counter()
        events: list[StreamEvent[object]] = []
        while page := await _range(self._redis, f"{name}-log", len(events), len(events) + PAGE - 1):
            events += [StreamEvent(StreamEventType.CHUNK, len(events) + i, data) for i, data in enumerate(page)]
        assert len(events) == count
        return count / (time.perf_counter() - started)

    async def deliver(self, count: int) -> list[float]:
        """Give the seconds from each write to its record in another connection, which hears of it by pub/sub and reads."""
        name = f"{self._name}-{uuid.uuid4().hex}"
        seconds: list[float] = []
        async with self._other.pubsub() as bells:
            await bells.subscribe(f"{name}-log")
            await bells.get_message(timeout=None)
            for version in range(count):
                started = time.perf_counter()
                _, (record,) = await asyncio.gather(self._commit([name], version), self._next(bells, f"{name}-log", version))
                seconds.append(time.perf_counter() - started)
                assert record
        return seconds

    async def _next(self, bells: PubSub, log: str, offset: int) -> list[bytes]:
        await bells.get_message(timeout=None)
        return await _range(self._other, log, offset, offset)

    async def _commit(self, names: list[str], version: int) -> None:
        async with self._redis.pipeline(transaction=False) as pipeline:
            for name in names:
                head = b"%d %d 1795396526.8 %s" % (version + 1, version + 1, STATE)
                await pipeline.evalsha(self._append, 2, f"{name}-head", f"{name}-log", version, head, encode(CHUNK))
            assert await pipeline.execute() == [1] * len(names)


async def _range(redis: Redis, log: str, first: int, last: int) -> list[bytes]:
    return await redis.lrange(log, first, last)  # type: ignore[return-value]  # without decode_responses they are bytes
